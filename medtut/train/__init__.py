"""One readable training loop for every lesson. Read `loop.py` from top to bottom."""

from medtut.train.config import TrainConfig
from medtut.train.loop import FitResult, TrainError, TrainingInterrupted, fit

__all__ = ["FitResult", "TrainConfig", "TrainError", "TrainingInterrupted", "fit"]
