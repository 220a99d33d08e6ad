"""Exercises of lesson 01, LoRA mathematics.

Shapes follow PyTorch's Linear: a weight is (out, in), A is (r, in), B is (out, r).
"""

from __future__ import annotations

import math

from medtut.course.exercises.engine import (
    Case,
    Exercise,
    Misconception,
    numbers_differ,
)
from medtut.course.exercises.ex01_matrices import best, merge, random_tensor


# ------------------------------------------------------------------------------ 01.1
def scaled_update(A, B, alpha, r):
    return (alpha / r) * (B @ A)


def _update_case(out_f: int, in_f: int, r: int, alpha: float) -> Case:
    return Case(
        f"A ({r}×{in_f}), B ({out_f}×{r}), alpha = {alpha:g}, r = {r}",
        lambda: (
            random_tensor(r, in_f, seed=r),
            random_tensor(out_f, r, seed=r + 1),
            alpha,
            r,
        ),
    )


def _update() -> Exercise:
    return Exercise(
        id="01.1",
        title="the update of one layer",
        ask="Write scaled_update(A, B, alpha, r): the matrix ΔW that LoRA adds to a "
        "frozen weight of shape (out, in). A has shape (r, in), B (out, r).",
        difficulty=1,
        minutes=3,
        hints=(
            "ΔW must have the shape of the weight, (out, in). Which order of the two "
            "factors gives it?",
            "B @ A has the right shape. What is missing is the factor that lets one "
            "alpha serve several ranks.",
            "ΔW = (α/r)·BA, with a true division: / and not //.",
        ),
        solution_function=scaled_update,
        explanation="B (out, r) times A (r, in) has the weight's shape, and α/r scales "
        "it (Hu et al. 2021, section 4.1). With α < r the factor is below one, not "
        "zero, so the division must be a true one.",
        cases=(
            _update_case(6, 5, 4, 16),
            _update_case(5, 5, 2, 3),
            _update_case(7, 9, 8, 4),
        ),
        misconceptions=(
            Misconception(
                "integer division",
                "You multiplied by alpha // r. Integer division is 0 when α < r, so "
                "the adapter then changes nothing, without any error.",
                (
                    lambda A, B, alpha, r: (alpha // r) * (B @ A),
                    lambda A, B, alpha, r: int(alpha / r) * (B @ A),
                ),
            ),
            Misconception(
                "no scale",
                "B @ A is right; the factor α/r is missing.",
                (lambda A, B, alpha, r: B @ A,),
            ),
            Misconception(
                "alpha without r",
                "You multiplied by α and did not divide by r. It agrees with LoRA "
                "only at r = 1.",
                (lambda A, B, alpha, r: alpha * (B @ A),),
            ),
            Misconception(
                "r over alpha",
                "You multiplied by r/α: the fraction is upside down.",
                (lambda A, B, alpha, r: (r / alpha) * (B @ A),),
            ),
            Misconception(
                "square root of r",
                "α/√r is the rank-stabilised scale (rsLoRA). It comes later in this "
                "lesson; LoRA as published divides by r.",
                (lambda A, B, alpha, r: (alpha / math.sqrt(r)) * (B @ A),),
            ),
            Misconception(
                "factors in the wrong order",
                "A @ B is (r, in) times (out, r): it fits only when in = out, and then "
                "gives an r×r matrix. The weight's shape needs B @ A.",
                (
                    lambda A, B, alpha, r: (alpha / r) * (A @ B),
                    lambda A, B, alpha, r: A @ B,
                ),
            ),
            Misconception(
                "transposed",
                "Your matrix is (in, out). PyTorch stores a Linear's weight as "
                "(out, in), and ΔW must fit it.",
                (
                    lambda A, B, alpha, r: (alpha / r) * (B @ A).T,
                    lambda A, B, alpha, r: (B @ A).T,
                ),
            ),
        ),
    )


# ------------------------------------------------------------------------------ 01.2
def lora_parameters(in_f, out_f, r, kernel=1):
    down = r * in_f * kernel**2  # A: r filters that see the whole window
    up = out_f * r  # B: a 1×1 convolution, or a matrix
    return down + up


def _count_case(in_f: int, out_f: int, r: int, kernel: int) -> Case:
    layer = f"Conv2d({in_f}, {out_f}, {kernel})"
    if kernel == 1:
        layer = f"Linear({in_f}, {out_f})"
    return Case(f"{layer} at r = {r}", lambda: (in_f, out_f, r, kernel))


def _count() -> Exercise:
    return Exercise(
        id="01.2",
        title="what an adapter costs",
        ask="Write lora_parameters(in_f, out_f, r, kernel=1): the number of trainable "
        "parameters LoRA adds to Linear(in_f, out_f), or to Conv2d(in_f, out_f, "
        "kernel), where A is a convolution with r filters and B a 1×1 convolution.",
        difficulty=1,
        minutes=5,
        hints=(
            "Count the two factors one after the other, then add.",
            "For a Linear: A has r·in entries and B out·r. In a convolution each of "
            "A's r filters sees in·k·k numbers.",
            "r·in·k² + out·r.",
        ),
        solution_function=lora_parameters,
        explanation="Only A sees the k×k window; B mixes r channels at one pixel. For "
        "Conv2d(64, 64, 3) at r = 8 that is 4,608 + 512 = 5,120, against 36,864 in the "
        "frozen kernel.",
        cases=(
            _count_case(768, 512, 8, 1),
            _count_case(64, 64, 8, 3),
            _count_case(48, 96, 4, 3),
            _count_case(10, 20, 2, 5),
        ),
        misconceptions=(
            Misconception(
                "one factor as large as the weight",
                "r·in·out counts r full weights. The two factors are thin: r·in "
                "entries and out·r entries, added.",
                (
                    lambda i, o, r, k=1: r * i * o,
                    lambda i, o, r, k=1: r * i * o * k * k,
                ),
            ),
            Misconception(
                "loralib's convolution",
                "r·k²·(in + out) is the count of loralib's convolution, which gives B "
                "a window too. Here B is a 1×1 convolution: out·r.",
                (lambda i, o, r, k=1: r * k * k * (i + o),),
            ),
            Misconception(
                "B forgotten",
                "You counted A only. B has out·r entries and is trained as well.",
                (lambda i, o, r, k=1: r * i * k * k,),
            ),
            Misconception(
                "base weight counted",
                "You added the frozen weight. It is not trained, so it does not count.",
                (
                    lambda i, o, r, k=1: r * i * k * k + o * r + i * o * k * k,
                    lambda i, o, r, k=1: r * i * k * k + o * r + i * o,
                ),
            ),
            Misconception(
                "kernel ignored",
                "r·(in + out) is right for a Linear. A convolution's A sees a k×k "
                "window.",
                (lambda i, o, r, k=1: r * (i + o),),
            ),
            Misconception(
                "k instead of k²",
                "A 2-D window has k·k positions; you counted k, which is right for a "
                "Conv1d.",
                (lambda i, o, r, k=1: r * i * k + o * r,),
            ),
        ),
        differ=numbers_differ,
    )


# ------------------------------------------------------------------------------ 01.5
def scaling(alpha, r):
    return alpha / math.sqrt(r)


def _scaling_case(alpha: float, r: int) -> Case:
    return Case(f"alpha = {alpha:g}, r = {r}", lambda: (alpha, r))


def _scale() -> Exercise:
    return Exercise(
        id="01.5",
        title="a scale that does not depend on the rank",
        ask="Adam's first step from B = 0 makes all entries of B equally large, "
        "whatever the rank. Write scaling(alpha, r): the factor in front of BA that "
        "keeps the norm of ΔW the same for every r, and is alpha at r = 1.",
        difficulty=3,
        minutes=8,
        hints=(
            "Every entry of BA is a sum of r products with random signs. How does the "
            "size of such a sum grow with r?",
            "A sum of r independent terms grows like √r, so ‖BA‖ ∝ √r.",
            "Divide by what grows: α/√r.",
        ),
        solution_function=scaling,
        explanation="‖BA‖ grows as √r, so α/√r keeps ‖ΔW‖ flat; α/r overcorrects and "
        "shrinks it as 1/√r (Kalajdzievski 2023, rsLoRA). Ranks compared at one "
        "learning rate without this differ in step size too.",
        cases=(
            _scaling_case(16, 4),
            _scaling_case(16, 64),
            _scaling_case(8, 2),
            _scaling_case(32, 256),
            _scaling_case(3, 1),
        ),
        misconceptions=(
            Misconception(
                "alpha over r",
                "α/r is LoRA as published: the update then shrinks as 1/√r when the "
                "rank grows.",
                (lambda alpha, r: alpha / r,),
            ),
            Misconception(
                "alpha alone",
                "Without the rank in the factor the update grows as √r.",
                (lambda alpha, r: alpha,),
            ),
            Misconception(
                "times the root",
                "α·√r makes it worse: ‖BA‖ already grows as √r, so ‖ΔW‖ would grow "
                "as r.",
                (lambda alpha, r: alpha * math.sqrt(r),),
            ),
            Misconception(
                "alpha over r squared",
                "r² counts both factors as if their sizes grew with r; only the sum "
                "over r terms does, and only as √r.",
                (lambda alpha, r: alpha / r**2,),
            ),
            Misconception(
                "alpha forgotten",
                "1/√r is flat over ranks, but the factor must be α at r = 1.",
                (lambda alpha, r: 1 / math.sqrt(r),),
            ),
            Misconception(
                "root of alpha over r",
                "√(α/r) takes the root of α as well; only r goes under the root.",
                (lambda alpha, r: math.sqrt(alpha / r),),
            ),
        ),
        differ=numbers_differ,
    )


def make() -> list[Exercise]:
    """Return fresh exercises of lesson 01, in order."""
    return [_update(), _count(), merge(), best(), _scale()]
