"""Exercises 01.3 and 01.4: exact merging, and the best adapter of a given rank."""

from __future__ import annotations

from typing import Any

import torch

from medtut.course.exercises.engine import (
    Case,
    Exercise,
    Misconception,
    describe,
    tensors_differ,
)


def random_tensor(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


# ------------------------------------------------------------------------------ 01.3
def merge_unmerge(weight, delta, toggles):
    original = weight.clone()  # subtracting cannot bring back what rounding removed
    for _ in range(toggles):
        merged = original + delta  # what inference uses
        restored = original.clone()
    return merged, restored


def _toggle_subtract(weight, delta, toggles):
    restored = weight
    for _ in range(toggles):
        merged = restored + delta
        restored = merged - delta
    return merged, restored


def _toggle_subtract_in_place(weight, delta, toggles):
    for _ in range(toggles):
        weight += delta
        merged = weight.clone()
        weight -= delta
    return merged, weight


def _toggle_float32(weight, delta, toggles):
    wide, step = weight.float(), delta.float()
    for _ in range(toggles):
        wide = wide + step
        merged = wide.to(weight.dtype)
        wide = wide - step
    return merged, wide.to(weight.dtype)


def _toggle_reference(weight, delta, toggles):
    original = weight  # a second name for the same tensor, not a copy
    for _ in range(toggles):
        weight += delta
        merged = weight.clone()
        weight = original
    return merged, weight


def _toggle_merged(weight, delta, toggles):
    return weight + delta, weight + delta


def _toggle_dtype(weight, delta, toggles):
    return (weight.float() + delta.float()), weight.float()


def _toggle_dtype_restored(weight, delta, toggles):
    return weight + delta, weight.float()


def _toggle_never(weight, delta, toggles):
    return weight.clone(), weight.clone()


def _pair_differs(got: Any, want: Any) -> str | None:
    if not (isinstance(got, tuple | list) and len(got) == 2):
        return f"expected the pair (merged, restored), got {describe(got)}"
    for name, one, other in zip(("merged", "restored"), got, want, strict=True):
        if not isinstance(one, torch.Tensor) or one.shape != other.shape:
            return f"{name}: expected {describe(other)}, got {describe(one)}"
        if one.dtype != other.dtype:
            return f"{name}: expected {describe(other)}, got {describe(one)}"
    said = tensors_differ(got[0], want[0], rtol=2**-6)  # the order of rounding is free
    if said:
        return f"merged: {said}"
    if torch.equal(got[1], want[1]):
        return None
    wrong = int((got[1] != want[1]).sum())
    gap = float((got[1].double() - want[1].double()).abs().max())
    return (
        f"restored: {wrong} of {want[1].numel()} entries changed, "
        f"the largest by {gap:.3g}; expected none"
    )


def _toggle_case(dtype: torch.dtype, size: float, toggles: int) -> Case:
    def args() -> tuple:
        weight = random_tensor(8, 8, seed=toggles, dtype=dtype)
        return weight, random_tensor(8, 8, seed=99, dtype=dtype) * size, toggles

    kind = str(dtype).removeprefix("torch.")
    said = f"a {kind} weight, ΔW about {size:g} times as large, {toggles} toggles"
    return Case(said, args)


def merge() -> Exercise:
    return Exercise(
        id="01.3",
        title="merge, and undo it exactly",
        ask="Write merge_unmerge(weight, delta, toggles): merge delta into weight and "
        "undo it, toggles times. Return (merged, restored): the weight as inference "
        "uses it, and the weight afterwards, bit for bit as it was. Both keep the "
        "weight's dtype (bfloat16 here), and the caller's tensor stays as it is.",
        difficulty=2,
        minutes=6,
        hints=(
            "In bfloat16 a number has 8 significant bits. Is (w + d) - d always w?",
            "What the addition rounded away cannot be subtracted back. Where could "
            "the original bits still be?",
            "Keep weight.clone() before the first merge and hand it back. A second "
            "name for the same tensor is no copy.",
        ),
        solution_function=merge_unmerge,
        explanation="Rounding loses bits that no subtraction can bring back. A kept "
        "copy returns them for the price of its memory; medtut's unmerge does this.",
        cases=(
            _toggle_case(torch.bfloat16, 1.0, 5),
            _toggle_case(torch.bfloat16, 0.01, 3),
            _toggle_case(torch.bfloat16, 2.0**20, 2),
        ),
        misconceptions=(
            Misconception(
                "subtracting what was added",
                "(w + d) - d is not w in bfloat16: the sum was rounded, and each "
                "toggle can lose more.",
                (_toggle_subtract, _toggle_subtract_in_place),
            ),
            Misconception(
                "float32 makes it exact",
                "float32 rounds later, not never: with a large ΔW the small weight's "
                "bits are gone from the sum in float32 too.",
                (_toggle_float32,),
            ),
            Misconception(
                "a reference, not a copy",
                "original = weight is a second name for the same tensor: adding in "
                "place changed both, and the caller's weight as well. Use clone().",
                (_toggle_reference,),
            ),
            Misconception(
                "still merged",
                "What you return as restored still contains delta.",
                (_toggle_merged,),
            ),
            Misconception(
                "dtype changed",
                "You return float32. The weight came as bfloat16, and a layer that "
                "changes dtype no longer fits its neighbours.",
                (_toggle_dtype, _toggle_dtype_restored),
            ),
            Misconception(
                "never merged",
                "Restored is right, but merged does not contain delta: the adapter "
                "would have no effect at inference.",
                (_toggle_never,),
            ),
        ),
        differ=_pair_differs,
    )


# ------------------------------------------------------------------------------ 01.4
def best_rank_r(delta, r):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    A = Vh[:r]  # (r, in)
    B = U[:, :r] * S[:r]  # (out, r): each column times its singular value
    return A, B


def _svd(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.linalg.svd(delta, full_matrices=False)


def _smallest(delta, r):
    U, S, Vh = _svd(delta)
    return Vh[-r:], U[:, -r:] * S[-r:]


def _no_values(delta, r):
    U, _, Vh = _svd(delta)
    return Vh[:r], U[:, :r]


def _values_twice(delta, r):
    U, S, Vh = _svd(delta)
    return S[:r, None] * Vh[:r], U[:, :r] * S[:r]


def _columns_of_vh(delta, r):
    U, S, Vh = _svd(delta)
    return Vh[:, :r].T, U[:, :r] * S[:r]


def _columns_of_full_vh(delta, r):
    U, S, Vh = torch.linalg.svd(delta)
    return Vh[:, :r].T, U[:, :r] * S[:r]


def _all_ranks(delta, r):
    U, S, Vh = _svd(delta)
    return Vh, U * S


def _product(delta, r):
    A, B = best_rank_r(delta, r)
    return B @ A


def _swapped(delta, r):
    A, B = best_rank_r(delta, r)
    return B, A


def _factors_differ(got: Any, want: Any) -> str | None:
    """Compare by shapes and product: signs and the split of S are free."""
    if isinstance(want, torch.Tensor) or isinstance(got, torch.Tensor):
        if not (isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)):
            return f"expected the pair (A, B), got {describe(got)}"
        return tensors_differ(got, want)
    pair = isinstance(got, tuple | list) and len(got) == 2
    if not (pair and all(isinstance(one, torch.Tensor) for one in got)):
        return f"expected the pair (A, B), got {describe(got)}"
    for name, one, other in zip("AB", got, want, strict=True):
        if one.shape != other.shape:
            return f"{name}: expected {describe(other)}, got {describe(one)}"
    said = tensors_differ(_multiply(*got), _multiply(*want))
    return said and f"B @ A: {said}"


def _multiply(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Multiply two factors in the order with the smaller inner dimension."""
    pairs = [(a, b) for a, b in ((second, first), (first, second)) if _conform(a, b)]
    left, right = min(pairs, key=lambda pair: pair[0].shape[1])
    return left.double() @ right.double()


def _conform(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape[1] == right.shape[0]


def _svd_case(out_f: int, in_f: int, r: int) -> Case:
    def args() -> tuple:
        left = torch.linalg.qr(random_tensor(out_f, out_f, seed=out_f))[0]
        right = torch.linalg.qr(random_tensor(in_f, in_f, seed=in_f + 50))[0]
        count = min(out_f, in_f)
        values = 5.0 * 0.7 ** torch.arange(count)
        return (left[:, :count] * values) @ right[:count], r

    return Case(f"a {out_f}×{in_f} update and r = {r}", args)


def best() -> Exercise:
    return Exercise(
        id="01.4",
        title="the best adapter of rank r",
        ask="Write best_rank_r(delta, r): return (A, B), A of shape (r, in) and B of "
        "shape (out, r), so that B @ A is as close to delta as any matrix of rank r.",
        difficulty=2,
        minutes=8,
        hints=(
            "Eckart and Young: the closest matrix of rank r keeps the largest r terms "
            "of the singular value decomposition.",
            "torch.linalg.svd gives U, S, Vh with S sorted from large to small. Vh is "
            "already transposed: its rows are the directions.",
            "A = Vh[:r] and B = U[:, :r] * S[:r]: the singular values go into one of "
            "the two factors, once.",
        ),
        solution_function=best_rank_r,
        explanation="The r largest singular values carry the most energy; the "
        "squared error is the sum of the squared rest (Eckart and Young 1936). √S in "
        "both factors is as good: only the product counts.",
        cases=(_svd_case(12, 8, 2), _svd_case(6, 10, 3), _svd_case(7, 7, 2)),
        misconceptions=(
            Misconception(
                "smallest singular values",
                "You kept the last r terms. S is sorted from large to small, so the "
                "first r are the ones that count.",
                (_smallest,),
            ),
            Misconception(
                "singular values forgotten",
                "U and Vh have unit columns and rows: without S every direction has "
                "the same weight.",
                (_no_values,),
            ),
            Misconception(
                "singular values twice",
                "S stands in both factors, so the product holds S². Put it into one, "
                "or √S into each.",
                (_values_twice,),
            ),
            Misconception(
                "columns of Vh",
                "torch.linalg.svd returns V already transposed: the directions are "
                "the rows of Vh, so A = Vh[:r].",
                (_columns_of_vh, _columns_of_full_vh),
            ),
            Misconception(
                "full rank",
                "You kept all singular values: B @ A is delta itself, and r had no "
                "effect.",
                (_all_ranks, lambda delta, r: (delta, torch.eye(len(delta)))),
            ),
            Misconception(
                "the product",
                "You returned B @ A. The product is right; the two factors are asked "
                "for, because they are what an adapter stores.",
                (_product,),
            ),
            Misconception(
                "A and B swapped",
                "The first of the pair must be A, of shape (r, in).",
                (_swapped,),
            ),
        ),
        differ=_factors_differ,
    )
