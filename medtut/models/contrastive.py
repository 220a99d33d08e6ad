"""Two losses that bring a scan and its report together, starting equally warm.

The softmax loss of CLIP (Radford et al. 2021, arXiv:2103.00020) asks which report of
the batch belongs to a scan, and which scan to a report. The sigmoid loss of SigLIP
(Zhai et al. 2023, arXiv:2303.15343) asks of every pair whether it belongs together.
Both multiply cosines by ``exp(log_scale)``; both start at 10 here, so that comparing
them compares the losses and not two temperatures.

Over several processes each computes the rows of its own scans against everybody's
reports. The mean of the losses over processes, and of the gradients (what DDP and
`medtut.train.fit` take), are those of one process with the whole batch.
"""

from __future__ import annotations

import math
import re
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medtut.errors import MedtutError

LOG_SCALE, BIAS = math.log(10.0), -10.0  # of SigLIP; the scale serves both losses
SCALARS = r"(^|\.)(log_scale|logit_bias)$"


class _Gather(torch.autograd.Function):
    """Everybody's rows; the gradient of a row is the sum of everybody's for it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _everybody(x: Tensor, gather: bool) -> tuple[Tensor, int]:
    """Rows of all processes, and where those of this one begin."""
    if not gather or not dist.is_initialized():
        return x, 0
    return _Gather.apply(x), dist.get_rank() * len(x)


def _logits(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """``exp(log_scale) a b^T`` in float32, also under autocast."""
    wide = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return log_scale.exp() * a.to(wide) @ b.to(wide).mT


def _check(image: Tensor, text: Tensor) -> None:
    if image.shape != text.shape or image.dim() != 2:
        raise MedtutError(
            f"A contrastive loss needs as many scans as reports, (B, latent) each; got "
            f"{tuple(image.shape)} and {tuple(text.shape)}."
        )


def softmax_loss(
    image: Tensor, text: Tensor, log_scale: Tensor, gather: bool = False
) -> Tensor:
    """Cross-entropy over the rows and over the columns, averaged.

    Parameters
    ----------
    image, text : Tensor, (B, latent)
        Of length one; row i of both belongs together.
    log_scale : Tensor, ()
    gather : bool
        Against the rows of all processes, which must be as many on each.

    Returns
    -------
    Tensor, ()
    """
    _check(image, text)
    (texts, first), (images, _) = _everybody(text, gather), _everybody(image, gather)
    own = torch.arange(len(image), device=image.device) + first
    return 0.5 * (
        F.cross_entropy(_logits(image, texts, log_scale), own)
        + F.cross_entropy(_logits(text, images, log_scale), own)
    )


def _sigmoid_rows(
    image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, first: int
) -> Tensor:
    logits = _logits(image, text, log_scale) + bias
    sign = torch.full_like(logits, -1.0)
    sign.diagonal(first).fill_(1.0)
    return -F.logsigmoid(sign * logits).sum()


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    chunk: int | None = None,
    gather: bool = False,
) -> Tensor:
    """``-sum_ij log sigmoid(y_ij (exp(log_scale) image_i . text_j + bias)) / B``.

    Parameters
    ----------
    image, text : Tensor, (B, latent)
        Of length one; row i of both belongs together: y is 1 there and -1 elsewhere.
    log_scale, bias : Tensor, ()
    chunk : int, optional
        Rows at a time. The B x B logits are then never there at once, also not for the
        backward pass, which computes each chunk again.
    gather : bool
        Against the reports of all processes, which must be as many on each.

    Returns
    -------
    Tensor, ()
    """
    _check(image, text)
    texts, first = _everybody(text, gather)
    total, rows = 0.0, max(chunk or len(image), 1)
    run = partial(checkpoint, _sigmoid_rows, use_reentrant=False)
    for start in range(0, len(image), rows):
        args = image[start : start + rows], texts, log_scale, bias, first + start
        total = total + (run(*args) if chunk else _sigmoid_rows(*args))
    return total / len(image)


def param_groups(
    model: nn.Module, lr: float, scale_lr: float, weight_decay: float = 0.01
) -> list[dict]:
    """Groups for an optimizer: matrices, the rest, and the temperature and bias.

    One step of Adam moves a number by about its learning rate, whatever the gradient.
    At the rate of a fine-tuning the temperature, a number around 2, and SigLIP's bias,
    around -10, hardly move: they get a rate of their own. For `medtut.train.fit` say
    ``groups={contrastive.SCALARS: scale_lr / lr}``.

    Parameters
    ----------
    model : nn.Module
        Whose temperature and bias are called ``log_scale`` and ``logit_bias``.
    lr, scale_lr, weight_decay : float
        Decay is for tensors of two or more dimensions only.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = scale_lr if re.search(SCALARS, name) else lr
            groups.setdefault((rate, weight_decay * (p.dim() > 1)), []).append(p)
    return [
        {"params": own, "lr": rate, "weight_decay": decay}
        for (rate, decay), own in groups.items()
    ]
