"""The losses and the validation of the published SAM + LoRA system, rebuilt.

What is described here is public code (github.com/tpchikumbu/SAMSEG_adpt, branch
``volume``); which of its commits made the published figures is not recorded. Every
function is our own, on MONAI's DiceCELoss with the source's settings.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from medtut.audit.loss_checks import free_course
from medtut.errors import MedtutError
from medtut.evaluate.brats import region_dice


def correct_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + cross-entropy, both of weight 1, as the source means it.

    Parameters
    ----------
    logits, target : tensors (B, 1, H, W); target 0 or 1.
    """
    from monai.losses import DiceCELoss

    return DiceCELoss(sigmoid=True, squared_pred=True)(logits, target.float())


def self_target_loss(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """The same loss between the output and its own sigmoid (commit cbbe81b).

    The Dice part is 0 whatever the output is, the cross-entropy is the entropy of the
    output: lowest where the network is sure, right or wrong.

    Parameters
    ----------
    logits : tensor (B, 1, H, W).
    target : taken and not used, as in the source.
    """
    return correct_loss(logits, logits.sigmoid())


def stripped_axis_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The same loss item by item without the batch axis (830f5bd, c9c427c).

    MONAI then reads (1, H, W) as one signal of H channels and length W: the
    cross-entropy becomes a softmax over the rows of the image.

    Parameters
    ----------
    logits, target : tensors (B, 1, H, W); target 0 or 1.

    Returns
    -------
    scalar, mean over the items.
    """
    pairs = zip(logits, target, strict=True)
    return torch.stack([correct_loss(*pair) for pair in pairs]).mean()


def self_target_course(
    logits: Tensor, target: Tensor, steps: int = 300
) -> list[tuple[int, float, float]]:
    """Train free logits with `self_target_loss` and watch Dice against the truth.

    Parameters
    ----------
    logits, target : tensors (B, 1, H, W); target 0 or 1, lesion in every image.
    steps : steps of Adam with learning rate 0.1.

    Returns
    -------
    list of (step, loss, lowest Dice of an image), steps 0 to `steps`.
    """
    return free_course(self_target_loss, logits, target, steps)


def validation_loss(prediction: ArrayLike, label: ArrayLike) -> float:
    """The published validation number of a finished volume (commit c9c427c).

    The prediction is binary already and goes through a sigmoid once more; the label
    still holds 1 to 3. The lowest number is no sign of a good segmentation.

    Parameters
    ----------
    prediction : array (X, Y, Z) of 0 and 1.
    label : array (X, Y, Z) of 0 to 3.
    """
    pair = (np.asarray(one, dtype=np.float32) for one in (prediction, label))
    return float(correct_loss(*(torch.from_numpy(one)[None, None] for one in pair)))


def one_slice_validation(
    model: Callable[[Tensor], Tensor], image: ArrayLike, label: ArrayLike
) -> dict[str, float]:
    """Validate as published: predict the first tumour slice, judge the volume.

    Parameters
    ----------
    model : maps a slice (1, 1, X, Y) to logits of that shape.
    image : array (X, Y, Z).
    label : array (X, Y, Z) of 0 to 3.

    Returns
    -------
    dict with ``loss``, `validation_loss` of that slice in an empty volume (what the
    source prints), and ``dice``, of the same volume against the whole lesion.

    Raises
    ------
    MedtutError
        Shapes differ or are not 3-D, or the label is empty.
    """
    image, label = np.asarray(image, dtype=np.float32), np.asarray(label)
    if image.shape != label.shape or label.ndim != 3 or not label.any():
        said = (
            f"image {image.shape}, label {label.shape}: not one (X, Y, Z) with tumour"
        )
        raise MedtutError(f"one_slice_validation: {said}.")
    z = int(label.any((0, 1)).argmax())
    pasted = np.zeros(label.shape, np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(image[:, :, z].copy())[None, None])
    pasted[:, :, z] = logits[0, 0].cpu() > 0
    dice = region_dice(pasted.astype(int) * 2, label)["WT"]
    return {"loss": validation_loss(pasted, label), "dice": dice}
