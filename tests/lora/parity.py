"""Element-wise comparison with Hugging Face peft, for any LoRA linear layer.

The comparison runs at alpha != r and with a non-zero B. With alpha = r a missing
division by r is invisible, and with B = 0 nearly every mistake is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

TOLERANCE = 1e-5


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Largest difference at most 1e-5, relative to the larger of 1 and the scale."""
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} against {theirs.shape}"
    ours, theirs = ours.detach(), theirs.detach()
    scale = max(1.0, float(theirs.abs().max()))
    error = float((ours - theirs).abs().max())
    assert error <= TOLERANCE * scale, f"{what}: differs by {error:.2e}"


def peft_linear(base: nn.Linear, r: int, alpha: float, **config: Any) -> nn.Module:
    """peft's own LoRA layer over ``base``, freshly initialised."""
    import peft
    from peft.tuners.lora.layer import Linear

    settings = peft.LoraConfig(r=r, lora_alpha=alpha, **config)
    return Linear(base, "default", settings, r=r, lora_alpha=alpha)


def assert_parity(
    make_layer: Callable[[nn.Linear, int, float], nn.Module],
    *,
    in_features: int = 12,
    out_features: int = 10,
    r: int = 4,
    alpha: float = 7.0,
    bias: bool = True,
    **peft_config: Any,
) -> None:
    """Fail unless a LoRA linear layer computes what peft's computes.

    Parameters
    ----------
    make_layer : callable
        ``make_layer(base, r, alpha)`` gives a layer over an ``nn.Linear`` with
        trainable attributes ``A`` (r, in) and ``B`` (out, r).
    peft_config
        Further settings of ``peft.LoraConfig``, such as ``use_rslora=True``.

    Raises
    ------
    AssertionError
        If outputs, input gradients or adapter gradients differ by more than 1e-5, or
        if the untouched layer does not start as its base.
    """
    generator = torch.Generator().manual_seed(0)

    def linear() -> nn.Linear:
        torch.manual_seed(1)
        return nn.Linear(in_features, out_features, bias=bias)

    x = torch.randn(3, 5, in_features, generator=generator)
    ours = make_layer(linear(), r, alpha)
    theirs = peft_linear(linear(), r, alpha, **peft_config)
    assert ours.A.shape == (r, in_features), f"A is {tuple(ours.A.shape)}"
    assert ours.B.shape == (out_features, r), f"B is {tuple(ours.B.shape)}"
    close(ours(x), linear()(x), "output before training (B should start at 0)")

    A = torch.randn(r, in_features, generator=generator)
    B = torch.randn(out_features, r, generator=generator)
    with torch.no_grad():
        ours.A.copy_(A)
        ours.B.copy_(B)
        theirs.lora_A["default"].weight.copy_(A)
        theirs.lora_B["default"].weight.copy_(B)

    goal = torch.randn(3, 5, out_features, generator=generator)
    inputs = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        out = layer(given)
        ((out - goal) ** 2).sum().backward()
        inputs.append((given, out))
    close(inputs[0][1], inputs[1][1], "output")
    close(inputs[0][0].grad, inputs[1][0].grad, "gradient of the input")
    close(ours.A.grad, theirs.lora_A["default"].weight.grad, "gradient of A")
    close(ours.B.grad, theirs.lora_B["default"].weight.grad, "gradient of B")


def peft_output_factor() -> int:
    """How often the installed peft adds the out_proj update of MultiheadAttention.

    Once would be right; up to 0.21.2 it is twice (huggingface/peft, pull request
    3774). Measured, so that the comparison holds before and after the fix.
    """
    import peft
    from peft.tuners.lora.layer import MultiheadAttention

    torch.manual_seed(0)
    base = nn.MultiheadAttention(4, 1)
    base.out_proj.weight.data.zero_()
    config = peft.LoraConfig(r=1, lora_alpha=1.0)
    layer = MultiheadAttention(base, "default", config=config, r=1, lora_alpha=1.0)
    out = layer.base_layer.out_proj
    torch.nn.init.ones_(out.lora_B["default"].weight)
    layer.merge()
    once = out.lora_B["default"].weight @ out.lora_A["default"].weight
    return round(float((out.base_layer.weight / once).mean()))
