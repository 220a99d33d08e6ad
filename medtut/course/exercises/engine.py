"""How an answer is checked: run it, compare it, and recognise known wrong ideas.

Every misconception is executable: a function that computes what a person with that
idea would compute. An answer has the misconception when it behaves like that function
on every case, so a new wrong idea costs three lines and can be tested by itself.
"""

from __future__ import annotations

import dis
import inspect
import linecache
import math
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from medtut.course.exercises.cards import Card, Outcome


@dataclass(frozen=True)
class Case:
    """One input of a check; `args` is called again for every run, so it is fresh."""

    label: str
    args: Callable[[], tuple]


@dataclass(frozen=True)
class Misconception:
    """A wrong idea with a name, what to say about it, and what it computes."""

    name: str
    message: str
    wrong: tuple[Callable[..., Any], ...]


@dataclass(frozen=True)
class Seen:
    """What one call did: its value or its error, and whether it changed its input."""

    value: Any = None
    error: BaseException | None = None
    mutated: bool = False


def _is_stub(function: Any) -> bool:
    """Whether a function's body is only `...`, `pass`, a docstring or `return None`."""
    code = _code(function)
    if code is None:
        return False
    idle = {"RESUME", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "NOP", "POP_TOP"}
    steps = list(dis.get_instructions(code))
    if any(step.opname not in idle for step in steps):
        return False
    loaded = [step.argval for step in steps if step.opname.endswith("_CONST")]
    return all(value is None or value is Ellipsis for value in loaded)


def _code(function: Any) -> Any | None:
    """Return the code object of a Python function, None for anything else."""
    return function.__code__ if inspect.isfunction(function) else None


def _snapshot(args: tuple) -> list[Any]:
    return [a.clone() if hasattr(a, "clone") else a for a in args]


def _changed(before: list[Any], after: tuple) -> bool:
    import torch

    def differs(old: Any, new: Any) -> bool:
        if isinstance(old, torch.Tensor):
            return not torch.equal(old, new)
        return False

    return any(differs(old, new) for old, new in zip(before, after, strict=True))


@contextmanager
def _unchanged_torch():
    """Keep an answer's changes of torch's global settings away from the lesson."""
    import torch

    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)


def observe(function: Callable[..., Any], case: Case) -> Seen:
    """Call a function on one case and note everything it did; never raises."""
    args = case.args()
    before = _snapshot(args)
    try:
        value = function(*args)
        return Seen(value=value, mutated=_changed(before, args))
    except KeyboardInterrupt:  # the stop button stays the stop button
        raise
    except BaseException as error:
        return Seen(error=error)


def where(error: BaseException, function: Any) -> str:
    """Say at which line of the answer an error rose."""
    code = _code(function)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if code and f.filename == code.co_filename]
    if not own or not own[-1].lineno:
        return ""
    number = own[-1].lineno
    line = linecache.getline(own[-1].filename, number).strip()
    return f" at line {number}" + (f": {line}" if line else "")


def describe(value: Any) -> str:
    """Short words for a value: numbers as they are, tensors by shape and dtype."""
    import torch

    if isinstance(value, torch.Tensor):
        shape = "×".join(str(n) for n in value.shape) or "scalar"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {shape}"
    if isinstance(value, tuple | list):
        inner = ", ".join(describe(v) for v in value[:3])
        return f"a {type(value).__name__} of {len(value)} ({inner})"
    try:
        said = repr(value)
    except Exception:  # an object may fight back
        said = f"an object of type {type(value).__name__}"
    return textwrap.shorten(said, 80, placeholder=" …")


def tensors_differ(got: Any, want: Any, rtol: float = 1e-4) -> str | None:
    """Compare tensors by shape and value; None when they agree.

    Returns
    -------
    str or None
        What is different, in one sentence.
    """
    import torch

    if not isinstance(got, torch.Tensor):
        return f"expected {describe(want)}, got {describe(got)}"
    if got.shape != want.shape:
        return f"expected {describe(want)}, got {describe(got)}"
    a, b = got.detach().double().cpu(), want.detach().double().cpu()
    size = float(b.abs().max()) if b.numel() else 0.0
    gap = float((a - b).abs().max()) if b.numel() else 0.0
    if gap <= rtol * max(size, 1e-12):
        return None
    said = (
        f"largest difference {gap:.4g} where the largest expected entry is {size:.4g}"
    )
    ratio = float((a * b).sum() / (b * b).sum().clamp_min(1e-30))
    if float((a - ratio * b).abs().max()) <= 1e-4 * max(size * abs(ratio), 1e-12):
        said += f"; yours is {ratio:.4g} times the expected tensor"
    return said


def numbers_differ(got: Any, want: Any, rtol: float = 1e-6) -> str | None:
    """Compare numbers; a 0-d tensor or NumPy scalar counts as a number."""
    if isinstance(got, bool | str | complex) or not hasattr(got, "__float__"):
        return f"expected the number {want:.6g}, got {describe(got)}"
    number = float(got)
    if math.isclose(number, float(want), rel_tol=rtol, abs_tol=0.0):
        return None
    return f"expected {want:.6g}, got {number:.6g}"


@dataclass
class Exercise:
    """One exercise: its text, its check, its hints and its solution.

    Attributes
    ----------
    id : str
        "01.1": lesson and number.
    title, ask : str
        Name and what is asked for.
    difficulty : int
        1 to 3 dots.
    minutes : int
        What it takes someone who has read the lesson.
    hints : sequence of str
        Three, each saying more.
    solution_function : callable
        A right answer, whose source is the solution shown.
    explanation : str
        Why it is right.
    cases : sequence of Case
        Inputs of the check.
    misconceptions : sequence of Misconception
        Wrong ideas to recognise; the first that fits is named.
    differ : callable
        ``differ(got, want) -> str | None``: what is different, or None.
    """

    id: str
    title: str
    ask: str
    difficulty: int
    minutes: int
    hints: Sequence[str]
    solution_function: Callable[..., Any]
    explanation: str
    cases: Sequence[Case]
    misconceptions: Sequence[Misconception]
    differ: Callable[[Any, Any], str | None] = tensors_differ
    _next_hint: int = field(default=1, init=False, repr=False)

    # ------------------------------------------------------------------ text
    @property
    def name(self) -> str:
        """Name of the function that the answer defines."""
        return self.solution_function.__name__

    @property
    def signature(self) -> str:
        """First line of the answer."""
        return f"def {self.name}{inspect.signature(self.solution_function)}:"

    @property
    def card(self) -> Card:
        """Title, difficulty, minutes and what is asked."""
        dots = "●" * self.difficulty + "○" * (3 - self.difficulty)
        title = f"Exercise {self.id} {dots} ({self.minutes} min): {self.title}"
        return Card("card", title, self.ask)

    def __repr__(self) -> str:
        return self.card.text

    def _repr_html_(self) -> str:
        return self.card._repr_html_()

    def stub(self) -> str:
        """Source of the untouched answer cell."""
        return f"{self.signature}\n    ...\n"

    def solution_source(self) -> str:
        """Source of the solved answer cell."""
        return textwrap.dedent(inspect.getsource(self.solution_function)).strip() + "\n"

    def hint(self, number: int | None = None) -> Card:
        """Show hint `number` (1 to 3), or the next one not yet shown."""
        count = len(self.hints)
        wanted = self._next_hint if number is None else number
        if isinstance(wanted, bool) or wanted not in range(1, count + 1):
            card = Card("hint", f"Exercise {self.id} has hints 1 to {count}.")
        else:
            self._next_hint = min(wanted + 1, count)
            head = f"Hint {wanted} of {count} for exercise {self.id}"
            card = Card("hint", head, self.hints[wanted - 1])
        card.show()
        return card

    def solution(self) -> Card:
        """Show the solution and why it is right."""
        head = f"Solution of exercise {self.id}"
        card = Card("solution", head, self.explanation, self.solution_source())
        card.show()
        return card

    # ----------------------------------------------------------------- check
    def check(self, answer: Any) -> Outcome:
        """Check an answer and show the outcome; never raises.

        Parameters
        ----------
        answer : callable
            The function asked for.

        Returns
        -------
        Outcome
            correct, incorrect, misconception or not attempted.
        """
        with _unchanged_torch():
            outcome = self._judge(answer)
        outcome.show()
        return outcome

    def _judge(self, answer: Any) -> Outcome:
        if answer is None or answer is Ellipsis or _is_stub(answer):
            return self._not_attempted()
        if not callable(answer):
            return self._incorrect(
                f"Pass the function itself, {self.name}, not {describe(answer)}."
            )
        seen = [observe(answer, case) for case in self.cases]
        if all(self._left_open(one) for one in seen):
            return self._not_attempted()
        wants = [observe(self.solution_function, case) for case in self.cases]
        faults = [
            self._fault(one, want, answer)
            for one, want in zip(seen, wants, strict=True)
        ]
        if not any(faults):
            said = f"All {len(faults)} inputs give what they should."
            return Outcome.of(self.id, "correct", said)
        for idea in self.misconceptions:
            if any(self._behaves_like(seen, wrong) for wrong in idea.wrong):
                return Outcome.of(self.id, "misconception", idea.message, idea.name)
        first = next(i for i, fault in enumerate(faults) if fault)
        return self._incorrect(f"On {self.cases[first].label}: {faults[first]}.")

    def _not_attempted(self) -> Outcome:
        said = f"Fill in {self.name}, run its cell, then run this one again."
        return Outcome.of(self.id, "not attempted", said)

    def _incorrect(self, message: str) -> Outcome:
        return Outcome.of(self.id, "incorrect", message)

    @staticmethod
    def _left_open(one: Seen) -> bool:
        return one.value is Ellipsis or isinstance(one.error, NotImplementedError)

    def _difference(self, got: Any, want: Any) -> str | None:
        """Compare, treating a value that cannot be compared as different."""
        try:
            return self.differ(got, want)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return f"what came back could not be compared ({type(error).__name__})"

    def _fault(self, one: Seen, want: Seen, answer: Any) -> str | None:
        if one.error is not None:
            kind = type(one.error).__name__
            said = textwrap.shorten(_message(one.error), 200, placeholder=" …")
            return f"{kind}{where(one.error, answer)}" + (f" ({said})" if said else "")
        if one.value is None:
            return "the function returned None; is the return missing?"
        difference = self._difference(one.value, want.value)
        if difference is None and one.mutated:
            return "the value is right, but your function changed its input"
        return difference

    def _behaves_like(self, seen: list[Seen], wrong: Callable[..., Any]) -> bool:
        for case, one in zip(self.cases, seen, strict=True):
            model = observe(wrong, case)
            if (one.error is None) != (model.error is None):
                return False
            if one.error is not None:
                if type(one.error) is not type(model.error):
                    return False
            elif (
                one.mutated != model.mutated
                or self._difference(one.value, model.value) is not None
            ):
                return False
        return True


def _message(error: BaseException) -> str:
    """Text of an error, even of one whose own text fails."""
    try:
        return str(error)
    except Exception:
        return ""
