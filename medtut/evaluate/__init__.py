"""Judging: metrics per case and statistics over cases and seeds."""

from medtut.evaluate.segmentation import tissue_dice
from medtut.evaluate.statistics import Comparison, interval, paired_comparison

__all__ = ["Comparison", "interval", "paired_comparison", "tissue_dice"]
