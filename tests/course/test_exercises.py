"""The exercise mechanism, and the checks of lesson 01 against wrong answers."""

import pytest
import torch
from exercise_cases import ExerciseCases

from medtut.course import exercises as ex
from medtut.course.exercises import exercise

LESSON = ex.exercises_of("01_lora_math")


# Right answers written another way than the solution.
def _update_einsum(A, B, alpha, r):
    return torch.einsum("or,ri->oi", B * (alpha / r), A)


def _update_loop(A, B, alpha, r):
    total = torch.zeros(B.shape[0], A.shape[1])
    for k in range(r):
        total += torch.outer(B[:, k], A[k])
    return total * alpha / r


def _count_tensors(in_f, out_f, r, kernel=1):
    return torch.empty(r, in_f, kernel, kernel).numel() + torch.empty(out_f, r).numel()


def _count_modules(in_f, out_f, r, kernel=1):
    parts = torch.nn.Sequential(
        torch.nn.Conv2d(in_f, r, kernel, bias=False),
        torch.nn.Conv2d(r, out_f, 1, bias=False),
    )
    return torch.tensor(sum(p.numel() for p in parts.parameters()))


def _merge_in_place(weight, delta, toggles):
    kept = weight.detach().clone()
    for _ in range(toggles):
        weight.add_(delta)
        merged = weight.clone()
        weight.copy_(kept)
    return [merged, weight]


def _merge_wide(weight, delta, toggles):
    merged = (weight.float() + delta.float()).to(weight.dtype)
    return merged, weight


def _best_roots(delta, r):
    U, S, Vh = torch.linalg.svd(delta)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], -(-U[:, :r] * root)


def _best_eigen(delta, r):
    _, V = torch.linalg.eigh(delta.double().T @ delta.double())
    A = V[:, -r:].T.float()
    return A, delta @ A.T


def _open_body(A, B, alpha, r):
    """Text alone."""


def _open_none(A, B, alpha, r):
    return None


def _open_ellipsis(A, B, alpha, r):
    delta = ...
    return delta


def _open_error(A, B, alpha, r):
    raise NotImplementedError("later")


@pytest.mark.parametrize(
    "answer", [None, ..., _open_body, _open_none, _open_ellipsis, _open_error]
)
def test_ways_of_not_attempting(answer):
    assert exercise("01.1").check(answer).status == "not attempted"


class _Nasty:
    def __getattr__(self, name):
        raise RuntimeError("no " + name)

    def __repr__(self):
        raise RuntimeError("no repr")


class _NastyError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def _crash(A, B, alpha, r):
    scale = alpha / r
    return scale * undefined_name  # noqa: F821


def _leave(A, B, alpha, r):
    raise SystemExit(0)


def _deep(A, B, alpha, r):
    return _deep(A, B, alpha, r)


def _raise_nasty(A, B, alpha, r):
    raise _NastyError


def _no_return(A, B, alpha, r):
    (alpha / r) * (B @ A)


def _changes_input(A, B, alpha, r):
    answer = (alpha / r) * (B @ A)
    A.zero_()
    return answer


RIGHT = {
    "01.1": [_update_einsum, _update_loop],
    "01.2": [_count_tensors, _count_modules],
    "01.3": [_merge_in_place, _merge_wide],
    "01.4": [_best_roots, _best_eigen],
    "01.5": [lambda alpha, r: alpha * r**-0.5, lambda a, r: torch.tensor(a / r**0.5)],
}
OWN_WORDS = {
    "01.1": [
        (lambda A, B, alpha, r: torch.mm(B, A), "no scale"),
        (lambda A, B, alpha, r: torch.mm(B, A).mul(alpha // r), "integer division"),
    ],
}
BROKEN = {
    "01.1": [
        (_crash, "NameError at line"),
        (_leave, "SystemExit"),
        (_deep, "RecursionError"),
        (_raise_nasty, "_NastyError"),
        (_no_return, "is the return missing"),
        (_changes_input, "changed its input"),
        (lambda A, B, alpha, r: _Nasty(), "On A (4×5)"),
        (lambda: 3, "TypeError"),
        (3, "Pass the function itself"),
        (lambda A, B, alpha, r: "text", "expected a float32 tensor"),
        (lambda A, B, alpha, r: 3 * (alpha / r) * (B @ A), "3 times the expected"),
        (lambda A, B, alpha, r: (B @ A) * float("nan"), "largest difference nan"),
    ],
}


class TestLesson01(ExerciseCases):
    lesson = "01_lora_math"
    functions = (
        "scaled_update",
        "lora_parameters",
        "merge_unmerge",
        "best_rank_r",
        "scaling",
    )
    right, own_words, broken = RIGHT, OWN_WORDS, BROKEN


def test_object_that_fights_back_does_not_raise():
    assert exercise("01.1").check(_Nasty()).status == "incorrect"


def test_stop_button_stays_a_stop_button():
    def stopped(A, B, alpha, r):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exercise("01.1").check(stopped)


def test_answer_cannot_change_torch_for_the_lesson():
    def meddles(A, B, alpha, r):
        torch.manual_seed(1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return None if r else A

    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    exercise("01.1").check(meddles)
    assert torch.equal(torch.rand(3), want)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_hints_escalate_and_wrong_number_is_told():
    one = exercise("01.1")
    assert [one.hint().body for _ in range(4)] == [*one.hints, one.hints[2]]
    assert one.hint(2).body == one.hints[1]
    assert "hints 1 to 3" in one.hint(9).text
    assert ex.solution_source("01.1") in one.solution().text


def test_unknown_exercise_lists_known():
    with pytest.raises(ex.ExerciseError, match=r"01\.1, 01\.2"):
        exercise("01.9")
    with pytest.raises(ex.ExerciseError):
        exercise("first")
    assert ex.exercises_of(77) == {}


def test_html_is_escaped_and_outcomes_are_read_from_a_notebook(monkeypatch):
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    shown = []
    shell = InteractiveShell.instance()
    monkeypatch.setattr(shell.display_pub, "publish", lambda **k: shown.append(k))
    try:
        one = exercise("01.1")
        outcome = one.check(lambda A, B, alpha, r: (alpha // r) * (B @ A))
        outcome._ipython_display_()  # last expression of the same cell: not twice
    finally:
        InteractiveShell.clear_instance()
    assert len(shown) == 2
    assert "<strong>" in shown[0]["data"]["text/html"]
    cells = [{"outputs": [{"data": k["data"]} for k in shown]}, {}]
    assert ex.outcomes_in({"cells": cells}) == {"01.1": "misconception"}
    assert "α &lt; r" in outcome._repr_html_()


def test_scale_of_01_5_is_flat_in_a_real_first_adam_step():
    """The exercise's own claim: entries of B equal in size after one step."""
    torch.manual_seed(0)
    scale = exercise("01.5").solution_function
    norms = []
    for r in (4, 16, 64, 256):
        A = (torch.rand(r, 256) * 2 - 1) / 16
        B = 1e-3 * torch.randn(256, r).sign()
        norms.append(float((scale(16, r) * B @ A).norm()))
    assert max(norms) / min(norms) < 1.1
