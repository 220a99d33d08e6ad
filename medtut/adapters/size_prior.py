"""Adapting once more to each test volume, by what is known of a structure's size.

Constrained transductive inference of FSEFT's first version (arXiv 2303.17051v1; commit
db2a2da of the published code, ``fseft/transductive/TI_modules.py``, gone since). It
needs no label of the test volume: the support volumes say about how large the structure
is, and a prediction that is far larger or smaller costs something.

With p the predicted share of the volume's voxels and p* the expected one, the relative
error is ``r = (p* - p) / max(p, p*)``, so that ``|r| = 1 - min(p, p*) / max(p, p*)``:
the same for a factor too large and that factor too small, 0 to 1. The loss is
``max(|r| - margin, 0)`` with the derivatives

    ``-1 / p*``  below the margin,  0 within,  ``p* / p**2``  above it.

Upstream takes ``max`` as a constant (``:38``), which changes nothing below and gives
``1 / p`` above: ``p / p*`` times too much. The penalty that it reports above is ``|r| +
margin`` (``:44``), two margins too large. Here autograd goes through all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from medtut.adapters.parts import AdapterError
from medtut.models.partial_loss import soft_dice

ENOUGH = 5  # support volumes from which on outliers are dropped


def support_prior(sizes: ArrayLike) -> np.ndarray:
    """Expected size of every structure, from the labels of the support volumes.

    The mean; of five volumes and more without those further than one standard deviation
    from the median. The bound itself counts as near: five equal sizes are kept, where
    upstream's strict comparison keeps none and gives NaN (``utils.py:89-92`` beside the
    file named above).

    Parameters
    ----------
    sizes : (k,) or (k, C)
        Of C structures in k volumes, in voxels of one spacing.

    Returns
    -------
    (C,) float64; C is 1 for (k,).

    Raises
    ------
    AdapterError
        No volume, or a size that is none. A support volume without the structure says
        nothing of its size.
    """
    table = np.asarray(sizes, float)
    table = table[:, None] if table.ndim == 1 else table
    good = np.isfinite(table) & (table > 0)
    if table.ndim != 2 or not table.size or not good.all():
        raise AdapterError(
            f"support_prior: sizes of shape {table.shape} with a smallest of "
            f"{table.min(initial=np.inf):g}; a number above 0 is needed for every "
            "support volume and structure. Leave out volumes without the structure."
        )
    if len(table) < ENOUGH:
        return table.mean(0)
    # Not empty: half of the sizes lie on either side of the median, so if all were
    # further than a from it, the standard deviation would be above a.
    bound = table.std(0) * (1 + 1e-9)
    near = np.abs(table - np.median(table, 0)) <= bound
    return np.where(near, table, 0).sum(0) / near.sum(0)


def size_prior_loss(
    probability: Tensor, prior: ArrayLike | Tensor, margin: float = 0.3
) -> Tensor:
    """How far predicted sizes are from expected ones, beyond a margin.

    Parameters
    ----------
    probability : (C, ...)
        Of C structures at every voxel of one volume.
    prior : one number, or C
        Expected share of the voxels, above 0 and below 1.
    margin : float
        Relative error that is free, 0 to below 1. At 0.3 everything is, from 0.7 times
        the expected size to 1.43 times.

    Returns
    -------
    Scalar in 0 to 1 - margin, the mean over structures.

    Raises
    ------
    AdapterError
        Another number of priors, or one that is no share; another margin.
    """
    # float32: in half precision the mean over a volume is too coarse for a small organ.
    share = probability.float().flatten(1).mean(1)
    target = torch.as_tensor(prior, dtype=share.dtype, device=share.device)
    if target.numel() not in (1, len(share)) or not ((target > 0) & (target < 1)).all():
        raise AdapterError(
            f"size_prior_loss: priors {target.tolist()} for {len(share)} structures; "
            "one share of the volume above 0 and below 1 is needed for each. Sizes are "
            "counted on the grid of the prediction."
        )
    if not 0 <= margin < 1:
        raise AdapterError(f"size_prior_loss: margin={margin} is not in 0 to below 1")
    error = (target - share) / torch.maximum(share, target)
    return (error.abs() - margin).clamp(min=0).mean()


@dataclass(frozen=True, eq=False)
class SizePrior:
    """Expected sizes, and how strongly to hold to them.

    Attributes
    ----------
    sizes : (C,) voxels, on the grid of the features; see `support_prior`.
        Not a share: two scans show the same organ in more or less of a body.
    margin, weight : 0.3 and 0.1 as published.
    sharpness : factor on the logits before voxels are summed; 1 as published.
        A probability of 0.002 on 200,000 voxels of background is 400 voxels, as much
        as a pancreas at 6 mm, though none of them is predicted. The larger the factor,
        the nearer the sum to the number of voxels above one half.
    """

    sizes: ArrayLike
    margin: float = 0.3
    weight: float = 0.1
    sharpness: float = 1.0

    def __call__(self, probability: Tensor) -> Tensor:
        """``weight`` times `size_prior_loss` of (C, X, Y, Z) probabilities."""
        share = np.asarray(self.sizes, float) / probability[0].numel()
        if self.sharpness != 1:
            logits = torch.logit(probability.float(), 1e-6)
            probability = torch.sigmoid(self.sharpness * logits)
        return self.weight * size_prior_loss(probability, share, self.margin)


def transduce(
    head: nn.Module, support: Sequence[tuple[ArrayLike, ArrayLike]],
    volume: ArrayLike | None = None, prior: SizePrior | None = None, *,
    steps: int = 50, warmup: int = 0, rate: float = 1e-2,
) -> nn.Module:  # fmt: skip
    """Train a copy of a black-box head on the support, and on a test volume's size.

    Every step takes the soft Dice of one support volume, in turn, and after the warm-up
    the prior's loss of the test volume, whose labels are not needed. Without a prior it
    is the plain adaptation: what to compare with. A head that was trained before has
    its warm-up behind it.

    Parameters
    ----------
    head : module of (1, F, X, Y, Z) features, with C outputs
        The head of an adapted network, ``model.get_submodule(done.parts.head)``: a
        linear probe, or with its spatial adapter. What needs a gradient is trained.
    support : pairs of features (F, X, Y, Z) and labels (C, X, Y, Z) of 0 and 1
        Features from `medtut.models.frozen_features.cached_features`.
    volume : features (F, X, Y, Z) of one test volume
    prior : SizePrior, optional
    steps, warmup : of them without the prior.
    rate : of AdamW, constant; no decay.

    Returns
    -------
    nn.Module, in eval mode; `head` is as it was.

    Raises
    ------
    AdapterError
        Nothing to train, no support, a prior without a volume, shapes or steps that do
        not fit.
    """
    adapted = copy.deepcopy(head).eval()
    learn = [p for p in adapted.parameters() if p.requires_grad]
    lost = [] if learn else ["the head has nothing that needs a gradient"]
    lost += [] if len(support) else ["there is no support volume"]
    lost += ["a prior needs the volume"] if prior and volume is None else []
    lost += [] if 0 <= warmup <= steps > 0 else [f"{warmup=} of {steps=} steps"]
    if lost:
        raise AdapterError(f"transduce: {'; '.join(lost)}")

    def ready(values: ArrayLike) -> Tensor:
        return torch.as_tensor(np.array(values, np.float32)).to(learn[0])

    pairs = [(ready(x), ready(y)) for x, y in support]
    test = None if prior is None else ready(volume)
    optimizer = torch.optim.AdamW(learn, rate, weight_decay=0)
    for step in range(steps):
        x, y = pairs[step % len(pairs)]
        loss = soft_dice(_answer(adapted, x, len(y)), y[None]).mean()
        if test is not None and step >= warmup:
            loss = loss + prior(_answer(adapted, test, len(y))[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapted


def _answer(head: nn.Module, features: Tensor, outputs: int) -> Tensor:
    """(1, C, X, Y, Z) probabilities."""
    try:
        found = head(features[None]).sigmoid()
    except RuntimeError as error:
        shape = tuple(features.shape)
        raise AdapterError(f"transduce: the head takes no {shape}: {error}") from error
    if found.shape[1:] != (outputs, *features.shape[1:]):
        raise AdapterError(
            f"transduce: the head gives {tuple(found.shape)[1:]}, features of "
            f"{tuple(features.shape)} have labels of {outputs} structures"
        )
    return found
