"""What the published system measured, beside what it should; bounds and baselines.

The metric is that of the lesson's published training script: it flattens a batch and
averages Dice over all classes, background included. The oracle says how good any
decoder with a coarse output grid can get; the baselines how far no learning gets.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from medtut.errors import MedtutError
from medtut.evaluate.brats import region_dice


def published_dice(prediction: Tensor, label: Tensor, classes: int = 4) -> float:
    """Dice as published: the batch as one heap of pixels, background as a class.

    Parameters
    ----------
    prediction, label : integer tensors (batch, H, W), labels 0 to ``classes - 1``.

    Returns
    -------
    mean over the classes 0 to ``classes - 1`` that at least one of the two has.
    """
    if prediction.shape != label.shape:
        shapes = f"{tuple(prediction.shape)} and label {tuple(label.shape)}"
        raise MedtutError(f"published_dice: prediction {shapes} need the same shape.")
    return float(np.nanmean(_pooled(prediction, label, classes)))


def _pooled(prediction: Tensor, label: Tensor, classes: int) -> np.ndarray:
    """Dice of every class over all pixels at once; NaN where it is in neither."""
    found = F.one_hot(prediction.flatten().long(), classes).double()
    truth = F.one_hot(label.flatten().long(), classes).double()
    return (2 * (found * truth).sum(0) / (found.sum(0) + truth.sum(0))).numpy()


def inflation(
    prediction: Tensor,
    label: Tensor,
    patients: Sequence[str] | None = None,
    batch: int = 2,
) -> dict[str, float]:
    """Score the same prediction as published and as it should be.

    Parameters
    ----------
    prediction, label : integer tensors (slices, H, W), labels 0 to 3.
    patients : whose slice each is; by default every slice counts as a patient.
    batch : slices in a batch, 2 in the source.

    Returns
    -------
    dict with ``published`` (`published_dice`, averaged over batches as the source
    does), ``without_background`` (the same batches, class 0 left out), ``per_patient``
    (mean over patients of `region_dice`'s foreground) and ``inflation``, the first
    minus the third.

    Raises
    ------
    MedtutError
        Shapes differ, or not one patient per slice.
    """
    owner = np.arange(len(label)) if patients is None else np.asarray(patients)
    if prediction.shape != label.shape or len(owner) != len(label) or not len(owner):
        raise MedtutError(
            f"inflation: {tuple(prediction.shape)} predicted, {tuple(label.shape)} "
            f"labels and {len(owner)} patients do not belong together."
        )
    batches = zip(prediction.split(batch), label.split(batch), strict=True)
    table = np.array([_pooled(*one, 4) for one in batches])
    rows = [torch.from_numpy(owner == one) for one in np.unique(owner)]
    dice = [region_dice(prediction[k], label[k])["foreground"] for k in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nanmean says what NaN says already
        published, without, per_patient = (
            float(np.nanmean(np.nanmean(one, axis=1)))
            for one in (table, table[:, 1:], np.array(dice)[:, None])
        )
    scores = {"published": published, "without_background": without}
    return scores | {"per_patient": per_patient, "inflation": published - per_patient}


def oracle_grid(
    label: Tensor, grid: int = 16, classes: int = 4, steps: int = 60, lr: float = 1.0
) -> Tensor:
    """The labels that the best grid of logits gives after bilinear upsampling.

    Whatever a network learns, a decoder that ends in ``grid x grid`` logits and
    ``interpolate(mode="bilinear", align_corners=False)`` cannot express more. The
    grid of every slice is fitted to its label by cross-entropy with Adam; that is a
    convex problem, started from the log share of each class in each cell. (Fitted to
    cross-entropy, not to Dice: a near-optimum. After 60 steps it is within 0.01 Dice
    of 300 steps.)

    Parameters
    ----------
    label : integer tensor (slices, H, W).

    Returns
    -------
    int64 tensor of labels, shaped like `label`.
    """
    if label.ndim != 3 or label.min() < 0 or label.max() >= classes:
        raise MedtutError(
            f"oracle_grid: no (slices, H, W) of labels 0 to {classes - 1}."
        )
    # Bilinear upsampling is one small matrix per axis, so the gradient is explicit:
    # no graph to keep, and a few slices at once stay in the processor's cache.
    down, right = (
        F.interpolate(torch.eye(grid)[None], n, mode="linear", align_corners=False)[0]
        for n in label.shape[1:]
    )
    best = []
    for part in label.long().split(8):
        truth = F.one_hot(part, classes).permute(0, 3, 1, 2).float().contiguous()
        logits = (F.adaptive_avg_pool2d(truth, grid) + 1e-3).log()
        optimizer = torch.optim.Adam([logits], lr=lr)
        for _ in range(steps):
            share = (down.T @ logits @ right).softmax(1)
            logits.grad = down @ (share - truth) @ right.T
            optimizer.step()
        best.append((down.T @ logits @ right).argmax(1))
    return torch.cat(best)


def threshold_baseline(volume: ArrayLike, q: float = 0.0) -> np.ndarray:
    """No learning: of the brain above Otsu's threshold, the brightest ``1 - q``.

    Parameters
    ----------
    volume : array (X, Y, Z), one sequence such as FLAIR; voxels of exactly 0 lie
        outside the brain.
    q : share of the bright voxels to drop; choose it on training patients.

    Returns
    -------
    uint8 array shaped like `volume`: 2 where tumour is guessed (scored as WT), else 0.
    """
    volume = np.asarray(volume, dtype=np.float32)
    brain = volume[volume != 0]
    if not 0 <= q < 1 or not np.isfinite(volume).all() or not brain.size:
        raise MedtutError(
            f"threshold_baseline: q = {q} must lie in 0..1 and the volume be finite, "
            "not all 0."
        )
    # Otsu (IEEE SMC 1979): the cut with the largest variance between both sides.
    count, edges = np.histogram(brain, 256)
    middle = (edges[1:] + edges[:-1]) / 2
    low, total = count.cumsum(), (count * middle).cumsum()
    high = np.maximum(brain.size - low, 1)
    apart = low * high * (total / np.maximum(low, 1) - (total[-1] - total) / high) ** 2
    bright = brain[brain > edges[1 + apart[:-1].argmax()]]
    cut = np.quantile(bright, q) if bright.size else np.inf
    return ((volume != 0) & (volume >= cut)).astype(np.uint8) * 2


def brightest_blob(volume: ArrayLike, q: float = 0.0) -> np.ndarray:
    """Largest connected piece of `threshold_baseline`, in the same form."""
    from scipy.ndimage import label as pieces

    found = threshold_baseline(volume, q)
    numbered, _ = pieces(found)
    sizes = np.bincount(numbered.ravel())
    sizes[0] = 0  # what is outside every piece
    return found * (numbered == sizes.argmax()) if sizes.any() else found
