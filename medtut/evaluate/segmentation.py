"""Segmentation metrics per case."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from medtut.errors import MedtutError


def outputs(model: nn.Module, images: Tensor, batch: int = 8) -> Tensor:
    """What a model gives for images (N, ...) in eval mode, on the CPU.

    Its mode is the one it was in afterwards; `batch` images are run at a time.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad():
        found = [model(part.to(device)).cpu() for part in images.split(batch)]
    model.train(training)
    return torch.cat(found)


def tissue_dice(prediction: Tensor, label: Tensor, classes: int) -> np.ndarray:
    """Dice of every foreground class in every case, through MONAI.

    Parameters
    ----------
    prediction, label : integer tensors ``(cases, height, width)``.
    classes : number of classes; class 0 is background and is left out.

    Returns
    -------
    array ``(cases, classes - 1)``. A class that is absent from both is NaN (there was
    nothing to find), a class found where there is none scores 0.

    Raises
    ------
    MedtutError
        The shapes differ.
    """
    from monai.metrics import compute_dice
    from monai.networks.utils import one_hot

    if prediction.shape != label.shape:
        raise MedtutError(
            f"tissue_dice: prediction {tuple(prediction.shape)} and label "
            f"{tuple(label.shape)} must have the same shape."
        )
    with torch.no_grad():
        scores = compute_dice(
            one_hot(prediction[:, None], classes),
            one_hot(label[:, None], classes),
            include_background=False,
            ignore_empty=False,
        )
        nothing = [
            ((prediction != k) & (label != k)).flatten(1).all(1)
            for k in range(1, classes)
        ]
    scores[torch.stack(nothing, dim=1)] = torch.nan
    return scores.cpu().numpy()
