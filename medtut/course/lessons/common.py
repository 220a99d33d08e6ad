"""What the modules of several lessons share: settings, patients, rates, records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from medtut.course.profiles import LessonSettings
from medtut.data.cache import cached_json
from medtut.data.splits import Split
from medtut.errors import MedtutError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medtut.data.brats import Case
    from medtut.train import TrainConfig

TUNING_SEED = 1000  # order and initialisation that no reported run has


class TrainingSettings(LessonSettings):
    """Settings of every lesson that trains.

    Attributes
    ----------
    steps, batch_size : of every training.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)


class PatientSettings(TrainingSettings):
    """Settings of a lesson on a cohort.

    Attributes
    ----------
    train_patients, validation_patients, test_patients : of the drawn cohort.
    """

    train_patients: int = Field(ge=1)
    validation_patients: int = Field(ge=1)
    test_patients: int = Field(ge=3)

    @property
    def patients(self) -> tuple[int, int, int]:
        """Patients of train, validation and test."""
        return self.train_patients, self.validation_patients, self.test_patients


@dataclass
class Task:
    """Cases of the target scanner, and the split they come from."""

    cases: dict[str, Case]
    split: Split

    def part(self, name: str) -> list[Case]:
        """Cases of train, validation or test."""
        return [self.cases[i] for i in getattr(self.split, name)]


def deal(
    patients: Mapping[str, Sequence[str]],
    settings: PatientSettings,
    folder: Path,
    unit: str = "patients",
) -> Split:
    """Split cases: the first, next and last patients of a seeded order.

    Parameters
    ----------
    patients : their cases by name, which stay together.
    settings : say how many patients each part gets.
    folder, unit : for the message.

    Raises
    ------
    MedtutError
        There are fewer patients than the settings ask for.
    """
    wanted = settings.patients
    if len(patients) < sum(wanted):
        raise MedtutError(
            f"{folder} holds {len(patients)} {unit} with masks; the settings ask for "
            f"{' + '.join(map(str, wanted))}. Set train_patients, validation_patients "
            "and test_patients lower."
        )
    order = np.random.default_rng(0).permutation(sorted(patients)).tolist()
    ends = pairwise(np.cumsum((0, *wanted)))
    return Split(
        *(tuple(c for p in order[a:b] for c in patients[p]) for a, b in ends), seed=0
    )


def tuned(
    lesson: str,
    arm: str,
    cohort: Any,
    settings: TrainingSettings,
    rates: Sequence[float],
    score: Callable[[float], float],
    unused: Collection[str] = (),
) -> dict[str, float]:
    """Validation score at every rate of a grid.

    Kept in the cache, so that the five seeds of an arm tune once.

    Parameters
    ----------
    lesson, arm, cohort
        Such as ``"l02"``, the repr of a design, and the version of the data.
    settings, unused
        All settings count but the seed, the profile, `out`, and those in `unused`.
    score : callable
        From a rate to a number, larger being better, of a training with `TUNING_SEED`.
    """
    given = settings.model_dump(exclude={"out", "seed", "profile", *unused})
    key = {"arm": arm, "cohort": cohort, "rates": rates, **given}
    return cached_json(
        f"{lesson}_tuning", key, lambda: {str(rate): score(rate) for rate in rates}
    )


def best_rate(grid: Mapping[str, float]) -> float:
    """The rate of a grid with the best validation score; of equals the first."""
    return float(max(grid, key=grid.__getitem__))


def precision(settings: Any) -> str:
    """ "bf16" or "fp32"; "auto" takes the first where the machine computes in it."""
    import torch

    if settings.precision != "auto":
        return settings.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # Without the instructions for it, bfloat16 on a CPU is slower than float32.
    known = getattr(torch.cpu, "get_capabilities", dict)()
    native = known.get("avx512_bf16") or known.get("amx_bf16")
    return "bf16" if native else "fp32"


def train_config(
    settings: TrainingSettings,
    rate: float,
    seed: int,
    steps: int,
    eval_every: int,
    **more: Any,
) -> TrainConfig:
    """How all arms are trained: AdamW, decay 0.01, a twentieth of the steps warm-up.

    `more` are other settings of `medtut.train.TrainConfig`.
    """
    from medtut.train import TrainConfig

    more = {"warmup": steps // 20} | more
    more |= {"batch_size": settings.batch_size, "seed": seed, "eval_every": eval_every}
    return TrainConfig(steps=steps, lr=rate, weight_decay=0.01, **more)


def record(
    cases: np.ndarray,
    grid: Mapping[str, float],
    model: nn.Module,
    history: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> dict[str, Any]:
    """What every run of a sweep stores.

    Parameters
    ----------
    cases : (cases,) test scores.
    grid : validation score by rate, of which the best was taken.
    model : as trained; its trainable parameters are counted.
    history : of the training; rows with a ``score`` are validations.
    more : what else the lesson stores.
    """
    return {
        "score": float(cases.mean()),
        "cases": cases.tolist(),
        "lr": best_rate(grid),
        "validation_by_lr": dict(grid),
        "validation": [
            [row["step"], row["score"]] for row in history if "score" in row
        ],
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **more,
    }


def real_patient(
    name: str, spacing: float, side: int, *then: Any, mask: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """Image and tumour mask of a real scan, each ``(1, side, side, Z)``, through MONAI.

    Parameters
    ----------
    name : {"brain1", "brain2"}
        Of the PyRadiomics test data: T1 with contrast agent and with the skull.
    spacing, side
        Of the levels' pixels, in mm and in number; the levels stay where they are.
    then : transforms on the dictionary of both.
    mask : how the mask is interpolated.

    Raises
    ------
    AssetUnavailable
        Without a network, when the file was not fetched before.
    """
    from monai import transforms as mt

    from medtut.data.assets import fetch

    files = fetch("pyradiomics-brain")
    both = ("image", "label")
    read = mt.Compose(
        [
            mt.LoadImaged(both, ensure_channel_first=True),
            mt.Orientationd(both, "RAS", labels=None),
            mt.Spacingd(both, (spacing, spacing, -1.0), mode=("bilinear", mask)),
            mt.ResizeWithPadOrCropd(both, (side, side, -1)),
            *then,
            mt.Rotate90d(both),
        ]
    )
    found = read({part: files[f"{name}_{part}"] for part in both})
    return tuple(found[part].as_tensor() for part in both)
