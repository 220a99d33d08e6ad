"""The checks of lesson 03 against right answers, wrong ideas, and known numbers."""

import inspect
import math

import numpy as np
import pytest
import torch
from exercise_cases import ExerciseCases

from medtut.course import exercises as ex
from medtut.course.exercises import engine, exercise

LESSON = ex.exercises_of("03_sam_lora")


# Right answers written another way than the solution.
def _count_tensors(d, blocks, r, roles):
    A, B = torch.empty(r, d), torch.empty(d, r)
    return torch.tensor(
        sum(A.numel() + B.numel() for _ in range(blocks) for _ in roles)
    )


def _count_modules(d, blocks, r, roles="qv"):
    with torch.device("meta"):
        pairs = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(d, r, bias=False), torch.nn.Linear(r, d, bias=False)
            )
            for _ in range(blocks * len(roles))
        )
    return sum(p.numel() for p in pairs.parameters())


def _loss_axes(logits, target):
    p = torch.sigmoid(logits)
    axes = (1, 2, 3)
    both = (p * target).sum(axes)
    dice = (2 * both + 1e-5) / ((p + target).sum(dim=axes) + 1e-5)
    return torch.mean(1 - dice)


def _loss_loop(logits, target):
    total = 0
    for x, t in zip(logits, target, strict=True):
        p = (torch.tanh(x / 2) + 1) / 2
        total = total + (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
    return 1 - total / len(logits)


def _loss_einsum(logits, target):
    p = logits.double().sigmoid()
    both = torch.einsum("nchw,nchw->n", p, target.double())
    size = torch.einsum("nchw->n", p + target)
    return 1 - ((2 * both + 1e-5) / (size + 1e-5)).mean()


def _box_projections(mask, margin):
    lesion = mask > 0
    if not lesion.any():
        raise ValueError("Empty mask: leave this slice out.")
    ends = []
    for axis, length in ((0, mask.shape[1]), (1, mask.shape[0])):
        hit = np.flatnonzero(lesion.any(axis))
        ends.append(np.clip([hit[0] - margin, hit[-1] + margin], 0, length - 1))
    (x0, x1), (y0, y1) = ends
    return [x0, y0, x1, y1]


def _box_torch(mask, margin):
    places = torch.nonzero(torch.from_numpy(mask))
    if not len(places):
        raise ValueError("no lesion")
    low, high = places.amin(0).flip(0) - margin, places.amax(0).flip(0) + margin
    last = torch.tensor(mask.shape).flip(0) - 1
    return torch.cat([low.clamp(min=0), torch.minimum(high, last)])


def _volume_flat(slices_pred, slices_truth):
    size = slices_pred.sum() + slices_truth.sum()
    return 2 * (slices_pred & slices_truth).sum() / size  # 0/0 is NaN in torch


def _volume_numpy(slices_pred, slices_truth):
    p, t = (np.concatenate([s.numpy() for s in x]) for x in (slices_pred, slices_truth))
    total = np.count_nonzero(p) + np.count_nonzero(t)
    return 2.0 * np.count_nonzero(p * t) / total if total else np.nan


# -------------------------------------------------------------------- 03.1
@pytest.mark.parametrize(
    ("d", "blocks", "per_rank"),
    [(768, 12, 36_864), (1024, 24, 98_304), (1280, 32, 163_840)],
)
def test_published_adapter_sizes(d, blocks, per_rank):
    count = LESSON["03.1"].solution_function
    assert [count(d, blocks, r) for r in (1, 64, 256)] == [
        per_rank,
        64 * per_rank,
        256 * per_rank,
    ]


def test_fused_pair_has_the_right_number_for_query_and_value_only():
    outcome = exercise("03.1").check(lambda d, n, r, roles: n * r * (d + 3 * d))
    assert outcome.misconception == "the fused layer as one"
    seen = engine.observe(lambda d, n, r, roles: 4 * n * d * r, LESSON["03.1"].cases[0])
    assert seen.value == 2_359_296  # why roles is an argument


def _size(*shapes):
    return sum(math.prod(shape) for shape in shapes)


def _blocks(in_a_block):
    return lambda d, n, r, s: n * in_a_block(d, r, len(s))


_COUNTS = {
    "the fused layer as one": lambda d, r, k: _size((r, d), (3 * d, r)),
    "the value forgotten": lambda d, r, k: _size((r, d), (d, r)),
    "only A": lambda d, r, k: k * _size((r, d)),
    "one pair for all roles": lambda d, r, k: _size((r, d), (k * d, r)),
    "B as wide as the fused layer": lambda d, r, k: k * _size((r, d), (3 * d, r)),
    "the key adapted too": lambda d, r, k: 3 * _size((r, d), (d, r)),
    "the frozen weight counted": lambda d, r, k: k * _size((d, d)),
}


# -------------------------------------------------------------------- 03.2
def _wrong_loss(name, case):
    idea = next(m for m in LESSON["03.2"].misconceptions if m.name == name)
    return idea.wrong[0](*LESSON["03.2"].cases[case].args()).value


def test_what_the_inputs_of_the_loss_are_there_for():
    large, small = LESSON["03.2"].cases[0].args()[1].flatten(1).sum(1)
    assert large > 30 * small
    right = LESSON["03.2"].solution_function(*LESSON["03.2"].cases[0].args()).value
    assert _wrong_loss("batch flattened", 0) < right - 0.2  # the small one is hidden
    assert _wrong_loss("no smoothing", 2).isnan()
    assert _wrong_loss("the target is never used", 4) < 1e-3  # sure is enough


def test_solution_agrees_with_monai():
    from monai.losses import DiceLoss

    solve = inspect.unwrap(LESSON["03.2"].solution_function)
    for case in LESSON["03.2"].cases:
        logits, target = case.args()
        want = DiceLoss(sigmoid=True)(logits, target)
        assert torch.allclose(solve(logits, target), want, atol=1e-6), case.label


def _own_words_published(logits, target):
    y = torch.sigmoid(logits)
    both = (torch.sigmoid(logits) * y).sum((1, 2, 3))
    size = torch.sigmoid(logits).sum((1, 2, 3)) + y.sum((1, 2, 3))
    return (1 - (2 * both + 1e-5) / (size + 1e-5)).mean()


def _own_words_float(logits, target):
    return _loss_axes(logits, target).item()


def _own_words_number(logits, target):
    with torch.no_grad():
        return _loss_axes(logits, target)


def _own_words_threshold(logits, target):
    p = (torch.sigmoid(logits) >= 0.5).float()
    dice = (2 * (p * target).sum((1, 2, 3)) + 1e-5) / (
        p.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1e-5
    )
    return 1 - dice.mean()


def _overflows(logits, target):
    p = 1 / (1 + torch.exp(-logits))
    both, size = (p * target).sum((1, 2, 3)), (p + target).sum((1, 2, 3))
    return 1 - ((2 * both + 1e-5) / (size + 1e-5)).mean()


def _half_detached(logits, target):
    p = logits.sigmoid().flatten(1)
    t = target.flatten(1)
    size = p.detach().sum(1) + t.sum(1)
    return (1 - (2 * (p * t).sum(1) + 1e-5) / (size + 1e-5)).mean()


def test_changed_target_is_seen():
    def answer(logits, target):
        value = _loss_axes(logits, target.clone())
        target.zero_()
        return value

    assert "changed its input" in exercise("03.2").check(answer).text


def test_loss_is_judged_without_gradient_mode_too():
    with torch.no_grad():
        assert exercise("03.2").check(_loss_axes).status == "correct"
        assert not torch.is_grad_enabled()


# -------------------------------------------------------------------- 03.3
def test_box_agrees_with_a_library():
    from scipy import ndimage

    mask = np.zeros((40, 50), np.uint8)
    mask[11:14, 20:33], mask[30, 7] = 1, 3
    rows, columns = ndimage.find_objects((mask > 0).astype(int))[0]
    want = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
    assert inspect.unwrap(LESSON["03.3"].solution_function)(mask, 0) == want


def _accidental(mask, margin):
    rows, columns = np.where(mask > 0)
    h, w = mask.shape
    x0, x1 = max(min(columns) - margin, 0), min(max(columns) + margin, w - 1)
    y0, y1 = max(min(rows) - margin, 0), min(max(rows) + margin, h - 1)
    return x0, y0, x1, y1


def _labels_kept(mask, margin):
    lesion = mask == 1
    return _box_projections(lesion if lesion.any() else mask, margin)


def test_value_error_where_there_is_a_box_stays_an_error():
    def answer(mask, margin):
        raise ValueError("never")

    outcome = exercise("03.3").check(answer)
    assert outcome.status == "incorrect"
    assert "ValueError at line" in outcome.text


# -------------------------------------------------------------------- 03.4
def test_volume_agrees_with_a_library():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    truth = rng.random((5, 8, 9)) < 0.2
    found = truth ^ (rng.random(truth.shape) < 0.1)
    got = LESSON["03.4"].solution_function(torch.tensor(found), torch.tensor(truth))
    assert got == pytest.approx(f1_score(truth.ravel(), found.ravel()))


def test_a_perfect_slice_against_thirty_is_nearly_nothing():
    """One slice of thirty equal ones, the rest of the volume left empty."""
    truth = torch.ones(30, 6, 6, dtype=torch.bool)
    wrong = {m.name: m.wrong[0] for m in LESSON["03.4"].misconceptions}
    assert wrong["one slice against the volume"](truth, truth) == pytest.approx(2 / 31)
    assert LESSON["03.4"].solution_function(truth, truth) == 1


def test_shortcuts_flatter():
    """Leaving slices out, or filling up with empty ones, lifts the score."""
    ideas = {m.name: m.wrong for m in LESSON["03.4"].misconceptions}
    right = LESSON["03.4"].solution_function
    false_alarm, missed = (LESSON["03.4"].cases[k].args() for k in (1, 2))
    assert ideas["empty slices skipped"][0](*false_alarm) > right(*false_alarm)
    assert ideas["misses skipped"][0](*missed) > right(*missed)
    empty = torch.zeros(40, *missed[0].shape[1:], dtype=torch.bool)
    fuller = [torch.cat([volume, empty]) for volume in missed]
    assert right(*fuller) == right(*missed)
    assert ideas["empty slices count as 1"][0](*fuller) > 0.9


# -------------------------------------------------------------------- all four
RIGHT = {
    "03.1": [_count_tensors, _count_modules],
    "03.2": [_loss_axes, _loss_loop, _loss_einsum],
    "03.3": [_box_projections, _box_torch],
    "03.4": [_volume_flat, _volume_numpy],
}
OWN_WORDS = {
    "03.1": [(_blocks(one), name) for name, one in _COUNTS.items()],
    "03.2": [
        (_own_words_published, "the target is never used"),
        (_own_words_float, "no gradient"),
        (_own_words_number, "no gradient"),
        (_own_words_threshold, "thresholded"),
        (
            lambda x, t: _loss_axes(x.squeeze(1)[None], t[:, 0][None]),
            "batch flattened",
        ),
    ],
    "03.3": [
        (_accidental, "left to NumPy"),
        (lambda m, k: _box_projections(m.T, k), "rows and columns swapped"),
        (lambda m, k: _box_projections(m, 0), "no margin"),
    ],
}
BROKEN = {
    "03.2": [
        (_half_detached, "gradient is not"),
        (_overflows, "does exp overflow?"),
        (lambda logits, target: "0.5", "expected a scalar tensor"),
        (lambda logits, target: logits, "one loss for the whole batch"),
        (lambda logits, target: torch.tensor(0.25), "expected 0."),
        (lambda logits, target: logits[5].sum(), "IndexError at line"),
        (lambda logits, target: print(), "returned None"),
    ],
    "03.3": [
        (lambda mask, margin: (1, 2, 3), "expected four numbers"),
        (lambda mask, margin: "abcd", "expected four numbers"),
        (
            lambda mask, margin: (1, 2, 3, 4),
            "expected (9, 7, 18, 11), got (1, 2, 3, 4)",
        ),
        (_labels_kept, "On three labels in one lesion"),
        (
            lambda m, k: _box_projections(m, k) if m.any() else (1, 2, 3, 4),
            "expected a ValueError",
        ),
    ],
    "03.4": [
        (
            lambda p, t: _volume_numpy(p, t) if (p | t).any() else 0.5,
            "expected NaN",
        ),
    ],
}


class TestLesson03(ExerciseCases):
    lesson = "03_sam_lora"
    functions = ("adapter_parameters", "soft_dice_loss", "prompt_box", "volume_dice")
    right, own_words, broken = RIGHT, OWN_WORDS, BROKEN
