"""Few-shot adaptation as the published code runs it, for the lesson's autopsy.

Source: github.com/jusiro/fewshot-finetuning at 032f403, written anew from what it does
and cited by file and line. Our own forms are in `medtut.adapters`,
`medtut.evaluate.organs` and `medtut.data.few_shot`; the last also has
`published_support`: min(k + 1, 30) volumes are drawn and the last is taken away
(upstream fseft/datasets/dataset.py:53-58), so that 30-shot trains on 29, and a list of
29 (lung_upper_lobe_right_train.txt) cannot be drawn from at k = 30 at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medtut.data.few_shot import published_support as published_support
from medtut.errors import MedtutError


class PublishedPHM(nn.Module):
    """Compacter's map ``x H + b``, ``H`` a sum of n Kronecker products, as published.

    The rule starts as N(0, 0.01^2) (upstream peft/Compacter.py:264) and the weights as
    Xavier uniform with gain sqrt 2 (:302), so ``x H`` is about 0.06 of the size of
    x: next to nothing. n^3 + C^2 / n + C parameters.
    """

    def __init__(self, width: int, n: int = 4) -> None:
        super().__init__()
        self.rule = nn.Parameter(0.01 * torch.randn(n, n, n))
        self.weight = nn.Parameter(torch.empty(n, width // n, width // n))
        for block in self.weight.data:
            nn.init.xavier_uniform_(block, gain=2**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        H = sum(map(torch.kron, self.rule, self.weight))
        return x @ H + self.bias


def published_compacter(model: nn.Module, n: int = 4, seed: int = 0) -> set[str]:
    """Put the published Compacter into every block of ``model.swinViT``, in place.

    The output of attention, and of MLP, is *replaced* by a map of it (upstream
    peft/Compacter.py:69,77): there is no residual around the adapter. As the map is
    almost zero, the blocks begin by adding almost nothing, whatever was pretrained.

    Parameters
    ----------
    model : SwinUNETR
    n : int
        4 as published; divides the widths.
    seed : int

    Returns
    -------
    set of str
        What trains in ``swinViT``: the maps (199,744 at feature size 48) and all norms
        (17,280; :28-37), together 217,024.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in [m for m in model.swinViT.modules() if hasattr(m, "attn")]:
            # The dropouts, at rate 0, stand where the maps belong: after the last
            # linear of each. To put them there renames no pretrained tensor.
            block.attn.proj_drop = PublishedPHM(block.dim, n).to(block.attn.proj.weight)
            block.mlp.drop2 = PublishedPHM(block.dim, n).to(block.attn.proj.weight)
    names = {f"swinViT.{k}" for k, _ in model.swinViT.named_parameters()}
    return {k for k in names if "drop" in k or "norm" in k}


@torch.no_grad()
def relative_change(model: nn.Module, adapted: nn.Module, x: Tensor) -> list[float]:
    """How far an adapter moves the features at the start, ``|h' - h| / |h|``.

    Parameters
    ----------
    model, adapted : SwinUNETR
        Before, and a copy with the adapter; both in ``eval``.
    x : Tensor, (N, 1, X, Y, Z)

    Returns
    -------
    list of 5 float
        For the patch embedding and after each of the four stages, as the decoder gets
        them. 0 is the identity; sqrt 2 what two unrelated maps of one size have.
    """
    pairs = zip(model.swinViT(x, True), adapted.swinViT(x, True), strict=True)
    return [float((b - a).norm() / a.norm()) for a, b in pairs]


def published_bias(model: nn.Module) -> dict[str, int]:
    """Parameters that "Bias" trains in ``swinViT``, by name, with their sizes.

    Chosen by "bias" in the name, below "mlp" or "attn" (upstream peft/Bias.py:35-38).
    ``relative_position_bias_table`` is such a name: of 210,690 at feature size 48,
    197,730 (94 %) are position tables and 12,960 biases. With norms and patch embedding
    there are 21,648 biases, and 219,378 with the tables.
    """
    return {
        name: p.numel()
        for name, p in model.named_parameters()
        if "swinViT" in name and "bias" in name and ("mlp" in name or "attn" in name)
    }


def published_dice(pred: Any, label: Any) -> tuple[float, float, float]:
    """Dice, recall and precision as reported (upstream utils/metrics.py:7-24).

    1 is added to the denominator only: a perfect organ of v voxels scores
    2v / (2v + 1), 0.995 at 100 voxels, and two empty masks score 0. Recall without an
    organ, and precision without a prediction, are NaN.

    Parameters
    ----------
    pred : array-like
        Above 0.5 is foreground.
    label : array-like of the same shape, 0 or 1

    Raises
    ------
    MedtutError
        For two shapes.
    """
    pred, label = (torch.as_tensor(m).float() for m in (pred, label))
    if pred.shape != label.shape:
        raise MedtutError(f"published_dice: {pred.shape} is not {label.shape}.")
    pred = (pred > 0.5).float()
    hit, size = (pred * label).sum(), label.sum()
    dice = 2 * hit / (pred.sum() + size + 1)
    return float(dice), float(hit / size), float(hit / pred.sum())


def published_ground_truth(mask: Any) -> Any:
    """The part of a test label that binary tasks are scored on: the largest component.

    Components are 26-connected (upstream fseft/datasets/utils.py:54,
    utils/metrics.py:38); the rest of the organ is taken for background, so finding it
    costs precision.

    Parameters
    ----------
    mask : array-like, (X, Y, Z), 0 or 1

    Returns
    -------
    numpy.ndarray of the same shape
    """
    from medtut.evaluate.organs import largest_component

    return largest_component(mask)
