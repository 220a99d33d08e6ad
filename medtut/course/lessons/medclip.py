"""Lesson 02's designs: what is built, how it is trained, and how it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medtut.course.lessons import common
from medtut.course.lessons.common import Task
from medtut.data.brain_cohort import CohortSpec, cohort_folder
from medtut.data.brats import MODALITIES, Case, find_cases, load_case
from medtut.data.brats_slices import (
    SliceDataset,
    to_volume,
    tumour_slices,
    volume_slices,
)
from medtut.data.splits import split_slices
from medtut.errors import MedtutError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medtut.course.lessons.l02 import Settings
    from medtut.train import FitResult


@dataclass(frozen=True)
class Arm:
    """One way to adapt the tower.

    Attributes
    ----------
    method : lora, dora, head or full.
    dense : the pyramid decoder, or the published one on a single vector.
    published_loss : cross-entropy alone and the published normalisation.
    modalities : what the tower sees.
    leaky : the published split over slices in the place of one over patients.
    longer : factor on the steps; more than 1 to let a slow design reach its plateau.
    """

    method: str = "lora"
    dense: bool = True
    published_loss: bool = False
    modalities: tuple[str, ...] = ("flair",)
    leaky: bool = False
    longer: int = 1

    @property
    def normalise(self) -> Literal["brain", "slice"]:
        """Over the brain of the volume, or over each slice as published."""
        return "slice" if self.published_loss else "brain"


DESIGNS: dict[str, Arm] = {
    "published": Arm(dense=False, published_loss=True, longer=2),
    "lora": Arm(),
    "head": Arm(method="head"),
    "dora": Arm(method="dora"),
    "full": Arm(method="full"),
    "vector": Arm(dense=False),
    "lora_4": Arm(modalities=MODALITIES),
    "leaky": Arm(leaky=True),
}


@dataclass(frozen=True)
class Prediction:
    """One patient: image, truth and predicted labels (X, Y, Z), spacing in mm."""

    case: str
    image: np.ndarray
    truth: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float, float]


def load_task(settings: Settings) -> Task:
    """Find the patients: the drawn cohort, or the BraTS folder given as `data`.

    The parts are the first, next and last patients of a seeded order.
    """
    if settings.data is None:
        spec = CohortSpec("target", count=sum(settings.patients))
        folder = cohort_folder(spec, progress=True)
    else:
        folder = Path(settings.data)
    cases = {case.id: case for case in find_cases(folder)}
    return Task(cases, common.deal({i: [i] for i in cases}, settings, folder, "cases"))


def build(arm: Arm | str, settings: Settings, weights: str | None = None) -> nn.Module:
    """The tower with its pretrained weights and the arm's decoder and adapter."""
    from medtut.lora import LoRAConfig, inject
    from medtut.models.medclip import (
        DenseDecoder,
        MedCLIPSegmenter,
        VectorDecoder,
        inflate_channels,
    )
    from medtut.models.medclip_io import load_official, load_small_tower

    arm = DESIGNS[arm] if isinstance(arm, str) else arm
    tower = load_small_tower() if settings.tower == "small" else load_official(weights)
    if len(arm.modalities) > 1:
        inflate_channels(tower, len(arm.modalities))
    head = DenseDecoder(tower.widths) if arm.dense else VectorDecoder()
    model = MedCLIPSegmenter(tower, head)
    if arm.method in ("lora", "dora"):
        config = LoRAConfig(
            r=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            variant=arm.method,  # type: ignore[arg-type]
            roles=("query", "value"),
        )
        inject(model, config, keep="^seg_head")
    else:
        model.encoder.requires_grad_(arm.method == "full")
    if len(arm.modalities) > 1:
        # A frozen average of the modalities would throw their differences away.
        model.encoder.model.embeddings.patch_embeddings.requires_grad_(True)
    return model


def loss_of(arm: Arm) -> Any:
    """``loss(model, batch)``: cross-entropy alone, or with soft Dice (MONAI)."""
    from torch.nn import functional as F

    if arm.published_loss:
        return lambda model, batch: F.cross_entropy(
            model(batch["image"]), batch["label"]
        )
    from monai.losses import DiceCELoss

    both = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    return lambda model, batch: both(model(batch["image"]), batch["label"][:, None])


def slices_of(
    task: Task, parts: tuple[str, ...], arm: Arm, step: int
) -> tuple[SliceDataset, list[int]]:
    """The slices of some parts as the arm sees them, and which of them to use.

    Every `step`-th level with tumour, and a fourth as dense a sample of the others: the
    source drops all of those, and a model that never saw one marks something on each.
    """
    cases = [case for part in parts for case in task.part(part)]
    data = SliceDataset(cases, arm.modalities, arm.normalise, slices="all")
    tumour = {case.id: set(tumour_slices(case)) for case in cases}
    used = [
        i
        for i, (case, z) in enumerate(data.index)
        if z % (step if z in tumour[case] else 4 * step) == 0
    ]
    return data, used


def predict(model: nn.Module, case: Case, arm: Arm, step: int = 1) -> Prediction:
    """Label every `step`-th level of a patient, on the patient's own grid."""
    from medtut.evaluate import outputs

    volume = load_case(case)
    stack = volume_slices(case, arm.modalities, arm.normalise)[::step]
    truth = volume.label[:, :, ::step]
    x, y, z = volume.spacing
    return Prediction(
        case.id,
        volume.image[0, :, :, ::step],
        truth,
        to_volume(outputs(model, stack).argmax(1), truth.shape),
        (x, y, z * step),
    )


def foreground(predictions: list[Prediction]) -> np.ndarray:
    """Foreground Dice of every patient, ``(patients,)``."""
    from medtut.evaluate import region_dice

    return np.array([region_dice(p.label, p.truth)["foreground"] for p in predictions])


def train_arm(
    name: str,
    seed: int,
    rate: float,
    settings: Settings,
    task: Task,
    *,
    steps: int | None = None,
    out: Path | None = None,
    weights: str | None = None,
    progress: bool = False,
) -> tuple[nn.Module, FitResult]:
    """Adapt the tower with one arm at one learning rate.

    The weights that are kept are those of the best validation, as in the source.
    """
    import torch

    from medtut.train import fit

    arm = DESIGNS[name]
    torch.manual_seed(seed)
    model = build(arm, settings, weights)
    steps = (steps or settings.steps) * arm.longer
    data, seen, _ = dealt(task, arm, settings, seed)
    train = torch.utils.data.Subset(data, seen)
    often = max(1, steps // (4 if arm.dense else 10))
    config = common.train_config(settings, rate, seed, steps, often)
    loss, coarse = loss_of(arm), 3 * settings.level_step

    def validate(model: nn.Module) -> dict[str, float]:
        if arm.published_loss:  # the source watches its own metric
            score, entropy = judged_as_published(model, task, arm, coarse)
            return {"score": score, "loss": entropy}
        found = [predict(model, c, arm, coarse) for c in task.part("validation")]
        scores = foreground(found)
        if np.isnan(scores).all():
            raise MedtutError(
                f"no tumour on every {coarse}th level of the validation patients "
                f"({', '.join(task.split.validation)}): set level_step lower."
            )
        return {"score": float(np.nanmean(scores))}

    result = fit(
        model, loss, train, config, validate=validate, out=out, progress=progress
    )
    return model, result


def _stacked(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and labels (N, H, W) of slices."""
    import torch

    return tuple(torch.stack([one[key] for one in items]) for key in ("image", "label"))


def judged_as_published(
    model: nn.Module, task: Task, arm: Arm, step: int
) -> tuple[float, float]:
    """The source's Dice and cross-entropy on the validation patients' slices."""
    from torch.nn import functional as F

    from medtut.evaluate import inflation, outputs

    data, used = slices_of(task, ("validation",), arm, step)
    images, truth = _stacked([data[i] for i in used])
    logits = outputs(model, images)
    dice = inflation(logits.argmax(1), truth)["published"]
    return dice, float(F.cross_entropy(logits, truth))


def dealt(
    task: Task, arm: Arm, settings: Settings, seed: int
) -> tuple[SliceDataset, list[int], list[int]]:
    """Slices to train on and slices that the arm's own split holds out.

    A leaky arm throws training and test patients into one heap and deals out slices,
    as published; as many patients' worth are trained on as in the other arms.
    """
    step = settings.level_step
    data, used = slices_of(task, ("train", "test"), arm, step)
    if not arm.leaky:
        known = set(task.split.train)
        mine = [i for i in used if data.index[i][0] in known]
        return data, mine, [i for i in used if data.index[i][0] not in known]
    share = len(task.split.train) / len(data.cases)
    first, rest = split_slices(len(used), share, seed)
    return data, [used[i] for i in first], [used[i] for i in rest]


def held_out(
    model: nn.Module, name: str, seed: int, task: Task, settings: Settings
) -> Any:
    """The source's own metric on the slices that the arm's own split held out.

    Slices without tumour are left out, as the source leaves them out.
    """
    from medtut.evaluate import inflation, outputs

    data, _, chosen = dealt(task, DESIGNS[name], settings, seed)
    items = [item for i in chosen if (item := data[i])["label"].any()]
    images, truth = _stacked(items)
    found = outputs(model, images).argmax(1)
    return inflation(found, truth, [item["case"] for item in items])


def decoder_alone(
    model: nn.Module, task: Task, settings: Settings, seed: int, rounds: int = 5
) -> list[tuple[int, float, float]]:
    """Train a fresh published decoder on the vectors of `model`'s tower as it is.

    The vectors are computed once, so that many more steps are cheap: is the published
    design merely under-trained?

    Returns
    -------
    (step, cross-entropy on training slices, on validation slices) at the beginning and
    after each round of ``settings.steps`` steps, on the decoder's own 16 x 16 grid.
    """
    import torch
    from torch.nn import functional as F

    from medtut.evaluate import outputs
    from medtut.models.medclip import VectorDecoder

    def vectors(part: str) -> tuple[Any, Any]:
        arm = DESIGNS["published"]
        data, used = slices_of(task, (part,), arm, settings.level_step)
        images, labels = _stacked([data[i] for i in used])
        x = outputs(model.encoder.eval(), images)
        each = (F.one_hot(one, 4).permute(2, 0, 1).float() for one in labels)
        share = torch.stack([F.avg_pool2d(one, 14) for one in each])
        return x.to(device), share.to(device)

    def entropy(x: Any, share: Any) -> Any:
        return -(head(x).log_softmax(1) * share).sum(1).mean()

    device = next(model.parameters()).device
    known, unknown = vectors("train"), vectors("validation")
    torch.manual_seed(seed)
    head = VectorDecoder().to(device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3)
    course = []
    for step in range(rounds * settings.steps + 1):
        if step % settings.steps == 0:
            with torch.no_grad():
                both = [float(entropy(*part)) for part in (known, unknown)]
            course.append((step, *both))
        pick = torch.randint(len(known[0]), (16,), device=device)
        optimiser.zero_grad()
        entropy(known[0][pick], known[1][pick]).backward()
        optimiser.step()
    return course
