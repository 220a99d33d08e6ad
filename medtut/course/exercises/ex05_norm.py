"""Exercise 05.2: a norm that stays finite in float16."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from medtut.course.exercises.engine import Case, Exercise, describe
from medtut.course.exercises.ex05_attention import Answer, idea, tensors_may_be_wild


# ------------------------------------------------------------------------------ 05.2
def rms_norm(x, weight, eps):
    wide = x.float()  # squares above 65,504 do not fit into float16
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * (mean_square + eps).rsqrt() * weight.float()).to(x.dtype)


PRECISION = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def _norms_differ(got: Any, want: Any) -> str | None:
    """Compare dtype, then shape and values as closely as the dtype can hold them."""
    if isinstance(got, torch.Tensor) and got.dtype != want.dtype:
        return f"expected {describe(want)}, got {describe(got)}"
    return tensors_may_be_wild(got, want, PRECISION.get(want.dtype, 1e-4))


def _tokens(
    said: str,
    shape: tuple[int, ...],
    size: float | tuple[float, ...] = 1.0,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Tokens around 0.7 times `size`, which may be a number for each row."""

    def draw() -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(len(said))
        x = torch.randn(shape, generator=generator) + 0.7
        weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
        return (torch.tensor(size).view(-1, 1) * x).to(dtype), weight.to(dtype), eps

    return Case(said, draw)


def _wide(divide: Answer, weigh: Answer = lambda x, w: x * w) -> Answer:
    """Make ``x / divide(x, eps)`` in float32, then `weigh`, then the dtype of x."""

    def answer(x, weight, eps):
        wide = x.float()
        return weigh(wide / divide(wide, eps), weight.float()).to(x.dtype)

    return answer


def _mean_square(x: torch.Tensor, dim: int | None = -1) -> torch.Tensor:
    return x.square().mean(dim, keepdim=True) if dim is not None else x.square().mean()


def _root(x: torch.Tensor, eps: float) -> torch.Tensor:
    return (_mean_square(x) + eps).sqrt()


def _layer_norm(x, weight, eps):
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), None, eps).to(x.dtype)


def _layer_norm_sample(x, weight, eps):
    y = x.float() - x.float().mean(-1, keepdim=True)
    return (y / (y.std(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _published(x, weight, eps):
    return x * (weight / (_mean_square(x).sqrt() + eps))


def _in_float16(x, weight, eps):
    y = x.half()
    return (y * (_mean_square(y) + eps).rsqrt()).to(x.dtype) * weight


def norm() -> Exercise:
    return Exercise(
        id="05.2",
        title="a norm for float16",
        ask="Write rms_norm(x, weight, eps): divide each token of x (..., d) by the "
        "root of (the mean of its squares, plus eps), multiply by weight (d,), and "
        "return the dtype of x, which may be float32, bfloat16 or float16. Numbers up "
        "to 10,000 in float16 have to come out right, and a token of zeros as zeros, "
        "also for eps = 1e-8.",
        difficulty=2,
        minutes=6,
        hints=(
            "The largest float16 is 65,504 and the smallest 6e-8. What becomes of "
            "300², and of eps = 1e-8?",
            "Compute in float32 and go back at the end. A mean over the last axis "
            "only, with keepdim=True, so that it still fits x.",
            "wide = x.float(); wide * (wide.square().mean(-1, keepdim=True) + "
            "eps).rsqrt() * weight.float(), then .to(x.dtype).",
        ),
        solution_function=rms_norm,
        explanation="Zhang and Sennrich 2019 (arXiv:1910.07467). The published module "
        "adds eps beside the root and computes in the precision that comes in: in "
        "float16 its 1e-8 is 0, so a token of zeros, which padding makes, is 0 · (w / "
        "0) = NaN, and from 256 on a square is infinite, so such tokens become 0. It "
        "looks well in float32, where tests run. Under the root, eps also says which "
        "tokens count as silent: those much smaller than √eps.",
        cases=(
            _tokens("three tokens", (3, 8)),
            _tokens("as many tokens as numbers in each", (8, 8)),
            _tokens("tokens of two volumes", (2, 5, 8)),
            _tokens("tokens as small as √eps", (4, 6), size=1e-3),
            _tokens(
                "float16: zeros, 300 and 10,000",
                (4, 8),
                (0.0, 1.0, 300.0, 1e4),
                1e-8,
                torch.float16,
            ),
            _tokens(
                "bfloat16 up to 100,000", (3, 8), (1.0, 1e3, 1e5), 1e-6, torch.bfloat16
            ),
        ),
        misconceptions=(
            idea(
                "eps outside the root",
                "You added eps to the root. A small token is then scaled up to full "
                "size, noise and all, and where 1e-8 is rounded to 0, as in float16, "
                "zeros become 0 / 0. It belongs under the root.",
                _published,
                lambda x, w, eps: x / (_mean_square(x).sqrt() + eps) * w,
                _wide(lambda x, eps: _mean_square(x).sqrt() + eps),
                _wide(lambda x, eps: _mean_square(x).sqrt().clamp(min=eps)),
            ),
            idea(
                "squared in float16",
                "You squared in the precision of x. From 256 on a square does not fit "
                "into float16: it is infinite, and the token becomes 0. Go to float32 "
                "before you square.",
                lambda x, w, eps: x / _root(x, eps) * w,
                lambda x, w, eps: x * (_mean_square(x) + eps).rsqrt() * w,
                lambda x, w, eps: (
                    x
                    * (x.square().float().mean(-1, keepdim=True) + eps).rsqrt()
                    * w.float()
                ).to(x.dtype),
            ),
            idea(
                "LayerNorm",
                "You subtracted the mean: that is LayerNorm. RMSNorm leaves it where "
                "it is, and saves one pass.",
                _layer_norm,
                _layer_norm_sample,
            ),
            idea(
                "standard deviation",
                "You divided by the standard deviation, which has the mean taken out. "
                "The root of the mean square has it in.",
                _wide(lambda x, eps: (x.var(-1, keepdim=True) + eps).sqrt()),
                _wide(
                    lambda x, eps: (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
                ),
            ),
            idea(
                "wrong axis",
                "You averaged over tokens, so each depends on its neighbours, and on "
                "what else is in the batch. A token is normalised by itself: dim=-1.",
                _wide(lambda x, eps: (_mean_square(x, 0) + eps).sqrt()),
                _wide(lambda x, eps: (_mean_square(x, None) + eps).sqrt()),
                _wide(lambda x, eps: (_mean_square(x, 1) + eps).sqrt()),
                _wide(lambda x, eps: (_mean_square(x, -2) + eps).sqrt()),
            ),
            idea(
                "no keepdim",
                "The mean lost its axis. With as many tokens as numbers in each it "
                "fits the wrong one without a word: use keepdim=True.",
                _wide(lambda x, eps: (x.square().mean(-1) + eps).sqrt()),
            ),
            idea(
                "sum in place of mean",
                "You divided by the length of the token. The mean of the squares is "
                "asked for: the result is √d times as long.",
                _wide(lambda x, eps: (x.square().sum(-1, keepdim=True) + eps).sqrt()),
                lambda x, w, eps: (F.normalize(x.float(), dim=-1) * w.float()).to(
                    x.dtype
                ),
            ),
            idea(
                "no root",
                "You divided by the mean square, and forgot its root: twice as large a "
                "token comes out half as large.",
                _wide(lambda x, eps: _mean_square(x) + eps),
            ),
            idea(
                "mean of sizes",
                "You averaged absolute values. Close, but the name says it: root of "
                "the mean of squares.",
                _wide(lambda x, eps: x.abs().mean(-1, keepdim=True) + eps),
            ),
            idea(
                "no eps",
                "Without eps a token of zeros is 0 / 0.",
                _wide(lambda x, eps: _root(x, 0)),
            ),
            idea(
                "no weight",
                "The learned weight (d,) is missing.",
                _wide(_root, lambda x, w: x),
            ),
            idea(
                "another weight",
                "The normalised token is multiplied by weight as it is. (1 + weight "
                "belongs to models that start it at 0; RMSNorm adds nothing.)",
                _wide(_root, lambda x, w: x * (1 + w)),
                _wide(_root, lambda x, w: x + w),
            ),
            idea(
                "left in float32",
                "The values are right, and the dtype is float32 whatever came in; the "
                "layer after it then fails, or doubles its memory. End with "
                ".to(x.dtype).",
                lambda x, w, eps: rms_norm(x.float(), w, eps),
            ),
            idea(
                "always float16",
                "You went through float16 whatever x was. bfloat16 reaches 3e38 and "
                "does not fit; the published attention casts so too.",
                _in_float16,
                lambda x, w, eps: (
                    x.float() / _root(x.float(), eps) * w.float()
                ).half(),
            ),
        ),
        differ=_norms_differ,
    )
