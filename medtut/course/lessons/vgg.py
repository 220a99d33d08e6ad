"""Lesson 04's designs: how a VGG16 is adapted, trained and asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.course.lessons.common import precision
from medtut.course.lessons.vgg_pictures import Balanced, Task, views
from medtut.data.brain_mri import CLASSES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medtut.course.lessons.l04 import Settings
    from medtut.models.prefix import PrefixCache
    from medtut.train import FitResult


@dataclass(frozen=True)
class Arm:
    """One way to make a classifier of a VGG16.

    Attributes
    ----------
    where : head, linear, conv, both or full; see `medtut.models.vgg.adapt`.
    pooled : mean and maximum of the last maps and one linear layer, in the place of
        VGG16's three linear layers, whose ImageNet weights are not to be had offline.
    variant, rank : of the adapters.
    plain : no pictures of other scanners, no drawn lesions.
    balance : how classes of unlike frequency are treated: "resample" draws them
        evenly, "weights" weighs their losses (scikit-learn's "balanced"), "logit" moves
        the logits in the loss (Menon et al. 2021), "none" does nothing.
    """

    where: str = "conv"
    pooled: bool = False
    variant: str = "lora"
    rank: int = 8
    plain: bool = False
    balance: str = "resample"


DESIGNS: dict[str, Arm] = {
    "head": Arm("head"),
    "lora_linear": Arm("linear"),
    "lora_conv": Arm(),
    "lora_both": Arm("both"),
    "full": Arm("full"),
    "dora": Arm("linear", variant="dora"),
    "pissa": Arm("linear", variant="pissa"),
    "pooled": Arm("head", pooled=True),
    "pooled_conv": Arm(pooled=True),
    "pooled_conv_plain": Arm(pooled=True, plain=True),
    "pooled_conv_rank2": Arm(pooled=True, rank=2),
    "pooled_conv_rank32": Arm(pooled=True, rank=32),
    "unbalanced": Arm("head", pooled=True, balance="none"),
    "weights": Arm("head", pooled=True, balance="weights"),
    "logit": Arm("head", pooled=True, balance="logit"),
}


def build(arm: Arm | str, settings: Settings, classes: int = len(CLASSES)) -> nn.Module:
    """VGG16 with its convolutions, the arm's head and adapters.

    Linear layers and head start the same in every run; adapters follow torch's seed.
    """
    import torch

    from medtut.models import vgg

    arm = DESIGNS[arm] if isinstance(arm, str) else arm
    state = torch.get_rng_state()
    model = vgg.vgg16(
        classes,
        width=settings.width,
        hidden=settings.hidden,
        dropout=0.0,
        head="pooled" if arm.pooled else "linears",
    )
    torch.set_rng_state(state)
    if settings.weights != "random":
        vgg.load_features(model, settings.weights)
    blocks = range(settings.first_block, 6)
    vgg.adapt(model, arm.where, r=arm.rank, variant=arm.variant, blocks=tuple(blocks))
    return model.to(memory_format=torch.channels_last)  # a quarter faster here


def inputs(images: Any, model: nn.Module | None = None) -> Tensor:
    """(N, side, side) uint8 -> (N, 3, side, side), as a model's weights want them.

    That is Keras' way for the course's convolutions, and where none were loaded.
    """
    import torch

    from medtut.models.vgg import to_input

    x = torch.as_tensor(images).float() / 255
    x = to_input(x, getattr(model, "convention", "keras"))
    return x if model is None else x.to(next(model.parameters()).device)


def train_arm(
    name: str,
    seed: int,
    rate: float,
    settings: Settings,
    task: Task,
    *,
    epochs: float | None = None,
    positions: np.ndarray | None = None,
    evaluations: int = 3,
    optimizer: str = "adamw",
    below: PrefixCache | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> tuple[PrefixCache, FitResult]:
    """Train one arm at one learning rate; the best validation weights are kept.

    Parameters
    ----------
    positions : training pictures, by default the task's.
    optimizer : adamw, sgd, or adam, which is the first without decay.
    below : cache of an arm with less frozen, to go on from.

    Returns
    -------
    the cache, whose ``encoder`` is the model, and what `medtut.train.fit` returns.
    """
    import torch
    from torch.nn import functional as F

    from medtut.evaluate import calibration
    from medtut.models.prefix import PrefixCache
    from medtut.train import TrainConfig, fit

    arm = DESIGNS[name]
    torch.manual_seed(seed)
    model = build(arm, settings)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    cache = PrefixCache(model, True, settings.memory_mb, at_once=32, below=below)
    positions = task.train if positions is None else positions
    seen = views(task, positions, settings, arm.plain)
    size, even = settings.batch_size, arm.balance == "resample"
    steps = max(1, round((epochs or settings.epochs) * len(positions) / size))
    items = Balanced(seen, steps * size, seed, settings, even)
    count = np.bincount(task.labels[positions], minlength=len(CLASSES))
    weight = torch.ones(len(CLASSES))
    offset = torch.zeros(len(CLASSES))
    if arm.balance == "weights":
        weight = torch.from_numpy(calibration.class_weights(count)).float()
    if arm.balance == "logit":
        offset = torch.from_numpy(calibration.logit_offset(count)).float()
    encode(cache, seen.images[np.unique(items.order)], settings, progress)

    def loss(_: nn.Module, batch: dict) -> Tensor:
        logits = cache(inputs(batch["image"], model)).float()
        on = logits.device
        return F.cross_entropy(
            logits + offset.to(on), batch["label"], weight.to(on), label_smoothing=0.05
        )

    def validate(_: nn.Module) -> dict[str, float]:
        found = probabilities(cache, task.images[task.validation], settings)
        truth = task.labels[task.validation]
        return {"score": float(by_case(found.argmax(1), truth).mean())}

    config = TrainConfig(
        steps=steps,
        batch_size=settings.batch_size,
        lr=rate,
        optimizer="sgd" if optimizer == "sgd" else "adamw",
        weight_decay=0.0 if optimizer == "adam" else 0.01,
        warmup=steps // 20,
        eval_every=max(1, steps // evaluations),
        precision=precision(settings),
        seed=seed,
    )
    result = fit(
        model, loss, items, config, validate=validate, out=out, progress=progress
    )
    return cache, result


def by_case(answers: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """1 or 0 by picture, weighted so that the mean is the balanced accuracy."""
    count = np.bincount(truth)
    weight = len(truth) / ((count > 0).sum() * count[truth])
    return (answers == truth) * weight


def autocast(settings: Settings) -> Any:
    """The precision of training, for what runs outside of it."""
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    half = precision(settings) == "bf16"
    return torch.autocast(where, torch.bfloat16, enabled=half)


def encode(
    cache: PrefixCache, images: np.ndarray, settings: Settings, progress: bool = False
) -> None:
    """Run what is frozen once over pictures, in batches."""
    from tqdm.auto import tqdm

    from medtut.models.prefix import first_trainable

    if first_trainable(cache.encoder) == 0:
        return
    with autocast(settings):
        for i in tqdm(range(0, len(images), 32), "frozen layers", disable=not progress):
            cache.rows(inputs(images[i : i + 32], cache.encoder))


def probabilities(
    cache: PrefixCache, images: np.ndarray, settings: Settings
) -> np.ndarray:
    """(N, 4) softmax of a model, in eval mode."""
    import torch

    model = cache.encoder
    training = model.training
    model.eval()
    encode(cache, images, settings)
    with torch.inference_mode(), autocast(settings):
        found = [
            cache(inputs(one, model))
            for one in np.array_split(images, -(-len(images) // 64))
        ]
    model.train(training)
    return torch.cat(found).double().softmax(1).cpu().numpy()
