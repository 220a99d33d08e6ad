"""Losses of pretraining with partial labels, and of the adaptation.

`soft_dice` is the published loss of one structure (upstream ``utils/losses.py:10-24``):
``1 - (2 Σpt + 1) / (Σp + Σt + 1)`` with probabilities p and labels t. The 1 in both
makes an absent, unpredicted structure a perfect one, and an absent one that is
predicted cost ``Σp / (Σp + 1)``: soon 1, with hardly a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from medtut.data.organs import fault


def soft_dice(probability: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss of every sample and channel.

    Parameters
    ----------
    probability, target : (B, C, X, Y, Z)

    Returns
    -------
    (B, C) float32, 0 for a perfect one
    """
    # float32: in half precision a sum over 96³ voxels is infinite.
    p, t = probability.float().flatten(2), target.float().flatten(2)
    return 1 - (2 * (p * t).sum(2) + smooth) / (p.sum(2) + t.sum(2) + smooth)


def balanced_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of every sample and channel, in two halves.

    Half the mean over the voxels of the structure and half the mean over the others, so
    that 100 voxels weigh as much as the 131,000 around them. Of an absent structure
    the second half is left.

    Parameters
    ----------
    logits, target : (B, C, X, Y, Z)

    Returns
    -------
    (B, C) float32
    """
    z, t = logits.float().flatten(2), target.float().flatten(2)
    inside = (t * softplus(-z)).sum(2) / t.sum(2).clamp(min=1)
    outside = ((1 - t) * softplus(z)).sum(2) / (1 - t).sum(2).clamp(min=1)
    return (inside + outside) / 2


class PartialDice(nn.Module):
    """Sigmoid soft Dice over the structures that a volume's labels speak about.

    ``Σ_c m_c L_c / Σ_c m_c`` for a volume with annotated mask m, and the mean over the
    volumes that have any (upstream gives NaN for one without). A structure that is not
    annotated gets a gradient of exactly 0, whatever its logits are.

    Parameters
    ----------
    unlabelled : "ignore" or "background"
        The second takes every structure as annotated, so that what a hospital did not
        outline is learned as absent. It is there to show what that does.
    smooth : see `soft_dice`.
    balance : float
        Weight of `balanced_cross_entropy`, added to each structure's Dice; 0 as
        published. A network that begins at random predicts nothing of a small organ
        for hundreds of steps with Dice alone: where Σp is large beside Σt, its
        gradient is as small for the voxels of the organ as for all others.
    """

    def __init__(
        self, unlabelled: Literal["ignore", "background"] = "ignore", smooth: float = 1,
        balance: float = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.unlabelled, self.smooth, self.balance = unlabelled, smooth, balance

    def forward(self, logits: Tensor, target: Tensor, annotated: Tensor) -> Tensor:
        """Return the loss, a scalar; 0 if nothing is annotated.

        Parameters
        ----------
        logits, target : (B, C, X, Y, Z)
        annotated : (B, C) bool or 0 and 1

        Raises
        ------
        OrganError
            Shapes that do not fit.
        """
        if logits.shape != target.shape or annotated.shape != logits.shape[:2]:
            shapes = [tuple(x.shape) for x in (logits, target, annotated)]
            raise fault("loss_shape", shapes=shapes)
        mask = annotated.to(logits.device).bool()
        if self.unlabelled == "background":
            mask = torch.ones_like(mask)
        # Chosen before the sigmoid, not multiplied after it: 0 times NaN is NaN.
        chosen = logits.masked_fill(~mask[..., None, None, None], 0)
        each = soft_dice(chosen.sigmoid(), target, self.smooth)
        if self.balance:
            each = each + self.balance * balanced_cross_entropy(chosen, target)
        each = each.masked_fill(~mask, 0)
        counts = mask.sum(1)
        mean = each.sum(1) / counts.clamp(min=1)
        return mean.sum() / (counts > 0).sum().clamp(min=1)


class AdaptationLoss(nn.Module):
    """Soft Dice of a task with one structure, or with several that exclude each other.

    MONAI's `DiceLoss` or `DiceCELoss` with the published smoothing, in float32.

    Parameters
    ----------
    task : "binary" or "softmax"
        Sigmoid over every channel; or softmax over channels of which the first is
        background.
    include_background : bool
        As published. Background is nearly all of a volume, so its loss is close to 0
        at once, and it takes a share of the mean.
    ce : bool
        Add cross entropy.
    smooth : see `soft_dice`.
    """

    def __init__(
        self, task: Literal["binary", "softmax"] = "binary",
        include_background: bool = True, ce: bool = False, smooth: float = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        from monai.losses import DiceCELoss, DiceLoss

        soft, how = task == "softmax", {"smooth_nr": smooth, "smooth_dr": smooth}
        how |= {"include_background": include_background or not soft}
        self.loss = (DiceCELoss if ce else DiceLoss)(
            softmax=soft, sigmoid=not soft, **how
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Parameters
        ----------
        logits, target : (B, C, X, Y, Z)
            The target is one-hot, for softmax with its background channel.

        Raises
        ------
        OrganError
            Shapes that do not fit.
        """
        if logits.shape != target.shape:
            raise fault("loss_shape", shapes=[tuple(x.shape) for x in (logits, target)])
        return self.loss(logits.float(), target.float())
