"""Pieces of lesson 06: its patients, its tasks, and one adaptation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import medtut
from medtut.course.lessons.fseft_data import FIRST as FIRST
from medtut.course.lessons.fseft_data import HELD as HELD
from medtut.course.lessons.fseft_data import Patient
from medtut.course.lessons.fseft_data import load_patients as load_patients
from medtut.course.lessons.fseft_data import source_patients as source_patients
from medtut.course.lessons.fseft_data import target_patients as target_patients
from medtut.data.organs import BASE, NOVEL, STRUCTURES
from medtut.errors import MedtutError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medtut.adapters import Adaptation
    from medtut.train import FitResult

SMALL_WEIGHTS = (
    Path(medtut.__file__).parent / "models/weights/swin_unetr_small.safetensors"
)
# Of cross-entropy beside Dice, chosen on the tuning patients: with 1 a linear probe had
# 0.55 there and found too much of what is small, with 0.1 it had 0.63, and with 0, as
# published, the spatial adapter could end with nothing found at all.
BALANCE = 0.1
BLACK_BOX = ("zero_shot", "probe", "spatial1", "spatial3")
# The method of `medtut.adapters.adapt` and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero_shot": ("as-is", {}),
    "probe": ("probe", {}),
    "spatial1": ("spatial", {"kernel": 1}),
    "spatial3": ("spatial", {"kernel": 3}),
    "bias": ("bias", {}),
    "norm": ("norm", {}),
    "lora": ("lora", {"rank": 4}),
    "adaptformer": ("adaptformer", {"rank": 16}),
    "compacter": ("compacter", {}),
    "full": ("full", {}),
    "scratch": ("full", {}),
    # The first stage is 12 wide: where it cannot have a rank of 16, it has 12.
    **{f"rank{r}": ("lora", {"rank": r, "cap": True}) for r in (1, 2, 8, 16)},
    "adaptive": ("lora", {"rank": 16, "cap": True, "adaptive": True}),
}
TASKS = {"base": BASE, "softmax": BASE, "novel": NOVEL}


def weights_file(settings: Any) -> Path:
    """The file of the network: "small", "fseft" (the published one), or a path.

    Raises
    ------
    MedtutError
        It is nowhere; says where it comes from.
    """
    from medtut.models.swin_weights import published_file

    if settings.weights == "fseft":
        return published_file("fseft")
    path = SMALL_WEIGHTS if settings.weights == "small" else Path(settings.weights)
    if not path.is_file():
        raise MedtutError(
            f"There is no network {path}; data_scripts/pretrain_swin_unetr_small.py "
            "makes the small one, in less than an hour on two cores."
        )
    return path


@lru_cache(maxsize=2)
def pretrained(path: Path) -> nn.Module:
    """The network, read once; to be copied before it is changed.

    A file of `save_swin_unetr`, or else the published checkpoint "fseft".
    """
    from medtut.models.swin_unetr import build_swin_unetr, load_swin_unetr
    from medtut.models.swin_weights import load_published

    if path.suffix == ".safetensors":
        return load_swin_unetr(path)
    model = build_swin_unetr()
    load_published("fseft", path, model)
    return model.eval()


def start(task: str, method: str, seed: int, settings: Any) -> tuple[Any, Adaptation]:
    """A network made ready for a task by a method.

    The head keeps its rows for base organs. Novel structures have none: their head is
    new, and the decoder trains too, as published. "scratch" is the same network with
    random weights throughout.
    """
    from medtut.adapters import adapt
    from medtut.models.swin_unetr import build_swin_unetr

    model = pretrained(weights_file(settings))
    how, options = METHODS[method]
    model = (
        build_swin_unetr(seed=seed, **model.config) if method == "scratch"
        else copy.deepcopy(model)
    )  # fmt: skip
    rows = [STRUCTURES.index(n) for n in BASE]
    heads = {
        "base": {"structure": rows}, "softmax": {"structure": [None, *rows]},
        "novel": {"classes": len(NOVEL), "decoder": "fine-tuned"},
        "pretrain": {},
    }  # fmt: skip
    done = adapt(model, how, seed=seed, **heads[task], **options)
    if task == "novel":
        import torch

        # An organ is a rare thing: one voxel in 50.
        torch.nn.init.constant_(model.classifier.bias, -4.0)
    return model, done


def task_target(patient: Patient, task: str, names: Sequence[str]) -> np.ndarray:
    """One-hot truth (S, X, Y, Z) uint8 on the network's grid."""
    places = [patient.case.structures.index(n) for n in names]
    labels = patient.case.labels[places]
    if task == "softmax":
        labels = np.concatenate([1 - labels.max(0, keepdims=True), labels])
    return labels


class Crops:
    """Random regions of the support volumes, of each as many.

    Parameters
    ----------
    inputs : one (C, X, Y, Z) for each patient: images, or cached features.
    shift : bool
        Shift intensities by up to 0.1 in one sample of five, as published.
    """

    def __init__(
        self, patients: Sequence[Patient], task: str, names: Sequence[str], roi: Any,
        inputs: Sequence[np.ndarray] | None = None, length: int = 1,
    ) -> None:  # fmt: skip
        self.targets = [task_target(p, task, names) for p in patients]
        places = [patients[0].case.structures.index(n) for n in names]
        self.known = [p.case.annotated[places] for p in patients]
        self.shift, self.roi, self.length = inputs is None, roi, length
        self.inputs = inputs or [p.case.image for p in patients]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        import torch

        i = n % len(self.inputs)
        x, y = self.inputs[i], self.targets[i]
        slack = [full - side for full, side in zip(y.shape[1:], self.roi, strict=True)]
        first = [int(torch.randint(s + 1, ())) for s in slack]
        place = (
            slice(None),
            *(slice(f, f + s) for f, s in zip(first, self.roi, strict=True)),
        )
        image = torch.from_numpy(np.array(x[place], np.float32))
        if self.shift and torch.rand(()) < 0.2:
            image = image + 0.2 * (torch.rand(()) - 0.5)
        return {"x": image, "y": torch.from_numpy(y[place].astype("f4")),
                "known": torch.from_numpy(self.known[i])}  # fmt: skip


class Loss:
    """Dice and cross-entropy; of separate organs or, for "softmax", of one choice.

    Parameters
    ----------
    run : the forward pass: of the whole network, or of the head on cached features.
    shrink : callable, optional
        From the number of steps done to the threshold of the proximal step that an
        adaptive rank takes after every step of the optimizer; here at the start of the
        next.
    """

    def __init__(
        self, task: str, run: Callable | None = None, shrink: Callable | None = None,
        unlabelled: Any = "ignore",
    ) -> None:  # fmt: skip
        from medtut.models.partial_loss import AdaptationLoss, PartialDice

        soft = task == "softmax"
        self.softmax = AdaptationLoss("softmax", ce=True) if soft else None
        self.partial = PartialDice(unlabelled, balance=BALANCE)
        self.run, self.shrink, self.steps = run, shrink, 0

    def __call__(self, model: Any, items: dict[str, Tensor]) -> Tensor:
        from medtut.adapters import proximal_step

        if self.shrink and self.steps:
            proximal_step(model, self.shrink(self.steps))
        self.steps += 1
        logits = (self.run or type(model).__call__)(model, items["x"]).float()
        if self.softmax is not None:
            return self.softmax(logits, items["y"])
        return self.partial(logits, items["y"], items["known"])


def features_of(patients: Sequence[Patient], settings: Any) -> list[np.ndarray]:
    """Last feature maps of the frozen network, from the cache."""
    from medtut.models.frozen_features import cached_features

    model = pretrained(weights_file(settings))
    return cached_features(model, [p.case.image for p in patients], roi=settings.roi)


def head(model: Any, x: Tensor) -> Tensor:
    """What a black-box method trains: the head and what hangs on it."""
    return model.classifier(x)


def train(
    task: str, method: str, support: Sequence[Patient], seed: int, rate: float,
    settings: Any, steps: int | None = None, progress: bool = False, **more: Any,
) -> tuple[Any, Adaptation, FitResult | None]:  # fmt: skip
    """Adapt the network to a task on the support volumes; None where nothing trains.

    Parameters
    ----------
    **more
        ``validate`` of `medtut.train.fit`.
    """
    from medtut.course.lessons.common import train_config
    from medtut.train import fit

    model, done = start(task, method, seed, settings)
    if method == "zero_shot":
        return model, done, None
    steps = steps or settings.steps
    black = method in BLACK_BOX and task != "novel"
    inputs = features_of(support, settings) if black else None
    # The penalty's steps shrink with the learning rate's half cosine, as in a proximal
    # gradient step, and would take a diagonal of 1 to zero in half of the run. The
    # diagonal can move twice as fast, so that a loss which needs it can hold it.
    pace = 3 / steps if method == "adaptive" else 0.0
    groups = {r"\.d$": 2 * pace / rate} if pace else {}

    def shrink(done: int) -> float:
        return pace * (1 + math.cos(math.pi * done / steps)) / 2

    loss = Loss(task, head if black else None, shrink if pace else None)
    data = Crops(support, task, TASKS[task], settings.roi, inputs,
                 steps * settings.batch_size)  # fmt: skip
    config = train_config(settings, rate, seed, steps, 0, groups=groups, clip_norm=1.0)
    result = fit(model, loss, data, config, progress=progress, **more)
    return model, done, result


def probabilities(
    model: Any, task: str, method: str, patients: Sequence[Patient], settings: Any
) -> list[np.ndarray]:
    """(S, X, Y, Z) of the structures for every patient, on the network's grid."""
    import torch

    from medtut.evaluate.organs import predict_volume

    soft, found = task == "softmax", []
    if method in BLACK_BOX and task != "novel":
        maps = features_of(patients, settings)
        with torch.inference_mode():
            for x in maps:
                z = model.classifier(torch.from_numpy(np.array(x, np.float32))[None])[0]
                found.append((z.softmax(0) if soft else z.sigmoid()).numpy())
    else:
        way = "softmax" if soft else "sigmoid"
        found = [
            predict_volume(model, p.case.image, settings.roi, activation=way)
            for p in patients
        ]
    return [p[1:] for p in found] if soft else found


def decide(probability: np.ndarray, patient: Patient, task: str) -> np.ndarray:
    """Masks (S, x, y, z) bool on the grid of the file.

    Probabilities are interpolated first and cut afterwards. A softmax chooses one
    structure, or the background, for every voxel.
    """
    from medtut.data.totalseg import to_original

    back = to_original(probability, patient.case)
    if task != "softmax":
        return back > 0.5
    rest = 1 - back.sum(0)
    return (back == back.max(0)) & (back > rest)


def dice_table(
    model: Any, task: str, method: str, patients: Sequence[Patient], settings: Any
) -> np.ndarray:
    """Dice (patients, structures) in the files' space; see `dice_there`."""
    found = probabilities(model, task, method, patients, settings)
    names = TASKS[task]
    return np.array([dice_there(decide(p, person, task), person.masks(names))
                     for p, person in zip(found, patients, strict=True)])  # fmt: skip


def dice_there(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Dice of every structure; NaN of one that the patient does not have.

    Whatever was found in its place: so all methods are compared on the same patients.
    """
    from medtut.evaluate.organs import dice

    return np.where(truth.any((1, 2, 3)), dice(found, truth), np.nan)
