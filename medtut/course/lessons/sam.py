"""Lesson 03's designs: how a SAM is adapted, trained, prompted and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.course.lessons import common
from medtut.course.lessons.sam_judge import Frames, answer, judge
from medtut.data.brain_cohort import CohortSpec, cohort_folder
from medtut.data.brats_men import (
    MEN,
    MenSlices,
    Region,
    find_men_cases,
    patient_of,
    union_box,
)
from medtut.errors import MedtutError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medtut.course.lessons.l03 import Settings
    from medtut.models.sam_stages import PrefixCache
    from medtut.train import FitResult

RANDOM = "random"  # in the place of a checkpoint: runs, and is no evidence
PACKED = ("t1c", "t2f", "t2w")  # three scans as the three colours


@dataclass(frozen=True)
class Arm:
    """One way to adapt a SAM.

    Attributes
    ----------
    encoder, decoder : frozen, lora or full; see `medtut.models.sam.adapt_sam`.
    rank, alpha, scaling : of the adapters on query and value.
    policy : which slices of a patient are trained on.
    packed : three scans as the colours of one picture, not one picture a scan.
    self_target : the published loss, which compares a prediction with itself.
    """

    encoder: str = "lora"
    decoder: str = "frozen"
    rank: int = 4
    alpha: float = 4.0
    scaling: str = "alpha/r"
    policy: str = "random"
    packed: bool = False
    self_target: bool = False


# The scale is 1 at rank 4 in all three families; only there do they agree.
DESIGNS: dict[str, Arm] = {
    "zero": Arm(encoder="frozen"),
    "lora": Arm(),
    "full": Arm(encoder="full"),
    "decoder": Arm(encoder="frozen", decoder="full"),
    "lora_decoder": Arm(decoder="full"),
    "published": Arm(rank=64, scaling="none", self_target=True),
    "unscaled_64": Arm(rank=64, scaling="none"),
    "alpha_64": Arm(rank=64),
    "rs_64": Arm(rank=64, alpha=2.0, scaling="alpha/sqrt(r)"),
    "max": Arm(policy="max"),
    "all": Arm(policy="all"),
    "packed": Arm(packed=True),
    "zero_packed": Arm(encoder="frozen", packed=True),
}


@dataclass
class Task(common.Task):
    """Cases of the target scanner, their split, and the crop that holds all."""

    region: Region


def is_cohort(folder: str) -> bool:
    """Whether a folder holds BraTS-MEN volumes, and not pictures with masks."""
    return any(Path(folder).rglob("*.nii*"))


def load_task(settings: Settings) -> Task:
    """Find the patients: the BraTS-MEN folder given as `data`, else the drawn cohort.

    Raises
    ------
    MedtutError
        The folder is not there, or holds fewer patients than the settings ask for.
    """
    if settings.data is not None and not Path(settings.data).is_dir():
        raise MedtutError(f"data: there is no folder {settings.data}.")
    if settings.data is None or not is_cohort(settings.data):
        count = sum(settings.patients)
        spec = CohortSpec("target", tumours=("meningioma",), count=count)
        folder = cohort_folder(spec, layout="brats-men", progress=True)
    else:
        folder = Path(settings.data)
    cases = {case.id: case for case in find_men_cases(folder)}
    patients: dict[str, list[str]] = {}
    for name in sorted(cases):
        patients.setdefault(patient_of(name), []).append(name)
    split = common.deal(patients, settings, folder)
    used = {i: cases[i] for i in (*split.train, *split.validation, *split.test)}
    return Task(used, split, union_box(list(used.values())))


def build(arm: Arm | str, settings: Settings) -> nn.Module:
    """The SAM of the settings with its weights, and what the arm trains in it.

    Raises
    ------
    AssetUnavailable
        LiteMedSAM's weights are not here and cannot be fetched.
    MedtutError
        One of segment-anything's models without a checkpoint, or one that does not fit.
    """
    from medtut.lora import LoRAConfig
    from medtut.models.litemedsam import LiteMedSAM, load_litemedsam
    from medtut.models.sam import adapt_sam, build_sam

    arm = DESIGNS[arm] if isinstance(arm, str) else arm
    file = settings.checkpoint
    if settings.model == "litemedsam":
        sam = LiteMedSAM().eval() if file == RANDOM else load_litemedsam(file)
        blocks = rf"image_encoder\.layers\.[{settings.first_layer}-3]\..*qkv"
    else:
        if file is None:
            raise MedtutError(
                f"{settings.model} needs Meta's weights: set checkpoint to the file, "
                f"or to {RANDOM!r} to see the lesson run without."
            )
        sam = build_sam(settings.model, settings.side, None if file == RANDOM else file)
        blocks = r"image_encoder\.blocks\..*qkv"
    config = LoRAConfig(
        arm.rank, arm.alpha, arm.scaling, roles=("query", "value"), pattern=blocks
    )
    adapt_sam(sam, config, encoder=arm.encoder, decoder=arm.decoder)
    return sam


def slices_of(
    task: Task, part: str, arm: Arm, settings: Settings, seed: int
) -> list[dict]:
    """Training slices by the arm's policy; a few evenly spaced ones to judge on."""
    train = part == "train"
    names = PACKED if arm.packed else MEN
    found = MenSlices(
        task.part(part),
        names,
        policy=arm.policy if train else "all",
        region=task.region,
        count=settings.slices,
        seed=seed,
    )
    items = [found[i] for i in range(len(found))]
    levels: dict[str, list[int]] = {}
    for item in items:
        if item["z"] not in levels.setdefault(item["case"], []):
            levels[item["case"]].append(item["z"])
    if not train:
        kept = {case: _spread(z, settings.slices) for case, z in levels.items()}
        beside = {(i["case"], i["z"]): i["mask"] for i in items}
        for item in items:
            z = levels[item["case"]]
            row = z.index(item["z"])
            near = z[row + 1] if row + 1 < len(z) else z[max(0, row - 1)]
            item["beside"] = beside[item["case"], near]
        items = [i for i in items if i["z"] in kept[i["case"]]]
    if not arm.packed:
        return items
    n = len(names)
    return [
        items[k] | {"image": np.stack([i["image"] for i in items[k : k + n]], -1)}
        for k in range(0, len(items), n)
    ]


def _spread(levels: Sequence[int], count: int) -> set[int]:
    """``count`` of the levels in the middle of as many equal parts."""
    at = (np.arange(count) + 0.5) / count * len(levels)
    return {levels[int(i)] for i in at}


def loss_of(arm: Arm, encode: Any, settings: Settings) -> Any:
    """``loss(sam, batch)``: Dice with cross-entropy, weighted 1:1 as the source has it.

    The published form hands the prediction over as its own target.
    """
    from monai.losses import DiceCELoss

    both = DiceCELoss(sigmoid=True, squared_pred=True)

    def loss(sam: nn.Module, batch: dict) -> Tensor:
        size = batch["mask"].shape[-2:]
        logits = answer(sam, encode(batch["x"]), batch["box"], size, settings)
        return both(logits, logits.sigmoid() if arm.self_target else batch["mask"])

    return loss


def train_arm(
    name: str,
    seed: int,
    rate: float,
    settings: Settings,
    task: Task,
    *,
    steps: int | None = None,
    evaluations: int = 2,
    out: Path | None = None,
    progress: bool = False,
) -> tuple[nn.Module, PrefixCache, FitResult | None]:
    """Adapt a SAM with one arm at one learning rate; keeps the best validation."""
    import torch

    from medtut.models.sam_stages import PrefixCache
    from medtut.train import fit

    arm = DESIGNS[name]
    torch.manual_seed(seed)
    sam = build(arm, settings)
    encode = PrefixCache(sam.image_encoder, half=True)
    if not any(p.requires_grad for p in sam.parameters()):
        return sam, encode, None
    steps = steps or settings.steps
    items = slices_of(task, "train", arm, settings, seed)
    train = Frames(items, settings, settings.jitter)
    held = slices_of(task, "validation", arm, settings, seed)

    def validate(sam: nn.Module) -> dict[str, float]:
        (found,) = judge(sam, encode, held, settings).values()
        return {"score": float(found.dice.mean())}

    # Every second epoch, as the source has it, and at the least so often.
    often = max(1, min(steps // evaluations, 2 * len(train) // settings.batch_size))
    config = common.train_config(settings, rate, seed, steps, often)
    loss = loss_of(arm, encode, settings)
    result = fit(
        sam, loss, train, config, validate=validate, out=out, progress=progress
    )
    return sam, encode, result
