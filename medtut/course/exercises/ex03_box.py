"""Exercise 03.3: the box prompt of a mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medtut.course.exercises.engine import Case, Exercise, Misconception, describe
from medtut.course.exercises.ex02_split import Probed


# ------------------------------------------------------------------------------ 03.3
def prompt_box(mask, margin):
    rows, columns = np.nonzero(mask > 0)
    if rows.size == 0:
        raise ValueError("the mask is empty: there is nothing to draw a box around")
    height, width = mask.shape
    return (
        max(int(columns.min()) - margin, 0),
        max(int(rows.min()) - margin, 0),
        min(int(columns.max()) + margin, width - 1),
        min(int(rows.max()) + margin, height - 1),
    )


@dataclass(frozen=True)
class Refused:
    """A ValueError: raised by the answer, or left to a minimum of nothing."""

    own: bool


def _probe_box(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Make a ValueError a thing that can be compared."""
    if hasattr(answer, "__wrapped__"):
        return answer

    @functools.wraps(answer)
    def run(mask, margin):
        try:
            return answer(mask, margin)
        except ValueError as error:
            if mask.any():  # nothing to refuse: an ordinary mistake
                raise
            left = ("zero-size array", "empty iterable", "empty sequence")
            return Refused(own=not any(words in str(error) for words in left))

    return run


def _as_box(value: Any) -> np.ndarray | None:
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (4,) else None


def _box_differs(got: Any, want: Any) -> str | None:
    """Compare two boxes, or two refusals."""
    if isinstance(got, Refused) and isinstance(want, Refused):
        if got == want:
            return None
        return "the ValueError says nothing about an empty mask"
    if isinstance(want, Refused):
        return f"expected a ValueError, got {describe(got)}"
    here, there = _as_box(got), _as_box(want)
    if here is None or there is None:
        same = got is None and want is None
        return None if same else f"expected four numbers, got {describe(got)}"
    if np.array_equal(here, there):
        return None
    said = [tuple(f"{n:g}" for n in one) for one in (there, here)]
    return "expected ({}), got ({})".format(*(", ".join(one) for one in said))


def _edges(mask: Any, of: Callable[[Any], Any] = lambda mask: mask > 0) -> list[int]:
    """First and last column, first and last row: x0, y0, x1, y1 without a margin."""
    rows, columns = np.nonzero(of(mask))
    if rows.size == 0:
        raise ValueError("empty")
    return [int(n) for n in (columns.min(), rows.min(), columns.max(), rows.max())]


def _like(
    of: Callable[[Any], Any] = lambda mask: mask > 0,
    end: int = 0,
    grow: tuple[int, int, int, int] = (-1, -1, 1, 1),
    beyond: int = 0,
    clip: str = "both",
    order: tuple[int, ...] = (0, 1, 2, 3),
    finish: Callable[[list[int]], Any] = tuple,
    empty: Callable[[Any], Any] | None = None,
) -> Callable[..., Any]:
    """A box with one thing changed: the wrong ideas differ in one each."""

    def wrong(mask, margin):
        if empty is not None and not mask.any():
            return empty(mask)
        box = _edges(mask, of)
        box[2], box[3] = box[2] + end, box[3] + end
        box = [edge + sign * margin for edge, sign in zip(box, grow, strict=True)]
        height, width = mask.shape if clip != "turned" else mask.shape[::-1]
        if clip in ("both", "turned", "low"):
            box[0], box[1] = max(box[0], 0), max(box[1], 0)
        if clip in ("both", "turned"):
            box[2] = min(box[2], width - 1 + beyond)
            box[3] = min(box[3], height - 1 + beyond)
        return finish([box[k] for k in order])

    return wrong


def _left_to_numpy(mask, margin):
    np.nonzero(mask > 0)[0].min()  # of nothing: NumPy's own ValueError
    return _like()(mask, margin)


def _index_error(mask, margin):
    np.nonzero((mask > 0).any(1))[0][0]
    return _like()(mask, margin)


def _corner_and_size(box: list[int]) -> tuple[int, ...]:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def _corner_and_count(box: list[int]) -> tuple[int, ...]:
    return box[0], box[1], box[2] - box[0] + 1, box[3] - box[1] + 1


def _centre_and_size(box: list[int]) -> tuple[float, ...]:
    x0, y0, x1, y1 = box
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def _slice(kind: str) -> np.ndarray:
    """A label map (20, 30), drawn so that no two edges have one number."""
    mask = np.zeros((20, 30), np.uint8)
    if kind in ("middle", "parts"):
        mask[7:12, 9:19] = 2
    if kind == "parts":
        mask[8:10, 11:16], mask[13, 10], mask[6, 20] = 1, 3, 3
    if kind == "corner":
        mask[15:20, 24:29] = 3
    if kind == "edge":
        mask[1:6, 2:6] = 1
    if kind == "point":
        mask[4, 17] = 1
    return mask


class _Box(Probed):
    probe = staticmethod(_probe_box)


def box() -> Exercise:
    def idea(name: str, message: str, *wrong: Callable[..., Any]) -> Misconception:
        return Misconception(name, message, tuple(_probe_box(one) for one in wrong))

    def case(said: str, kind: str, margin: int) -> Case:
        return Case(f"{said}, margin {margin}", lambda: (_slice(kind), margin))

    return _Box(
        id="03.3",
        title="the box of a mask",
        ask="Write prompt_box(mask, margin): the box prompt (x0, y0, x1, y1) in pixels "
        "of a NumPy label map (height, width), in which the lesion is every label "
        "above 0. x counts columns and y rows; x1 and y1 are the last column and row "
        "of the lesion. Each side moves out by margin pixels, but not out of the "
        "image, whose last column is width - 1. An empty mask has no box: raise a "
        "ValueError that says so.",
        difficulty=1,
        minutes=6,
        hints=(
            "np.nonzero of a 2-D array gives two arrays. Which is x?",
            "Rows come first in an array and second in a box. Ask for an empty mask "
            "before you take a minimum, and clip after the margin.",
            "rows, columns = np.nonzero(mask > 0); x0 = max(columns.min() - margin, 0) "
            "and x1 = min(columns.max() + margin, width - 1); the same for rows.",
        ),
        solution_function=_probe_box(prompt_box),
        explanation="Arrays count (row, column), boxes (x, y): swapped, a box is right "
        "only on the diagonal, and the model segments whatever lies there. This box is "
        "drawn from the truth, which no user has: the lesson also asks what is left of "
        "the Dice when it is moved, taken from the slice before, or missing.",
        cases=(
            case("a lesion in the middle", "middle", 0),
            case("three labels in one lesion", "parts", 2),
            case("a lesion at the lower right corner", "corner", 3),
            case("a lesion near the upper left corner", "edge", 5),
            case("a single pixel", "point", 0),
            case("an empty mask", "empty", 2),
        ),
        misconceptions=(
            idea(
                "rows and columns swapped",
                "An array counts rows first, a box columns first: np.nonzero gives "
                "(rows, columns), and rows are y.",
                _like(order=(1, 0, 3, 2)),
            ),
            idea(
                "ends in pairs",
                "You returned (x0, x1, y0, y1) or the like. A box prompt is two "
                "corners: (x0, y0) and (x1, y1).",
                _like(order=(0, 2, 1, 3)),
                _like(order=(1, 3, 0, 2)),
            ),
            idea(
                "corner and size",
                "You returned a corner (or the centre) and a size, as in other "
                "formats. SAM wants two corners.",
                _like(finish=_corner_and_size),
                _like(finish=_corner_and_count),
                _like(finish=_centre_and_size),
            ),
            idea(
                "exclusive end",
                "Your x1 and y1 lie one past the lesion, as the end of a Python slice "
                "does. Here they are the last column and row themselves.",
                _like(end=1),
                _like(end=1, beyond=1),
            ),
            idea(
                "clipped one pixel too far",
                "The last column is width - 1, and the last row height - 1; your box "
                "may reach width or height.",
                _like(beyond=1),
            ),
            idea(
                "not clipped",
                "Near the border your box leaves the image. Clip all four sides after "
                "the margin.",
                _like(clip="none"),
            ),
            idea(
                "clipped at zero only",
                "You clip at 0 but not at the far sides, width - 1 and height - 1.",
                _like(clip="low"),
            ),
            idea(
                "height and width swapped",
                "You clip x by the height and y by the width. mask.shape is (height, "
                "width).",
                _like(clip="turned"),
            ),
            idea(
                "no margin",
                "You did not use margin: the box is tight.",
                _like(grow=(0, 0, 0, 0)),
            ),
            idea(
                "margin on one corner",
                "You moved one corner only. The box grows on all four sides.",
                _like(grow=(-1, -1, 0, 0)),
                _like(grow=(0, 0, 1, 1)),
            ),
            idea(
                "margin inwards",
                "Your margin shrinks the box: x0 and y0 become smaller, x1 and y1 "
                "larger.",
                _like(grow=(1, 1, -1, -1)),
            ),
            idea(
                "one label only",
                "You boxed one of the labels. The lesion is all of them, mask > 0.",
                _like(lambda mask: mask == 1),
                _like(lambda mask: (mask == mask.max()) & (mask > 0)),
            ),
            idea(
                "a box for an empty mask",
                "For an empty mask you made up a box. The model would segment "
                "something in it, and a slice without tumour would get one. Raise a "
                "ValueError.",
                _like(empty=lambda mask: (0, 0, 0, 0)),
                _like(empty=lambda mask: (0, 0, 29, 19)),
                _like(empty=lambda mask: (0, 0, 30, 20)),
                _like(empty=lambda mask: None),
            ),
            idea(
                "left to NumPy",
                "The empty mask does raise a ValueError, but one about the minimum of "
                "nothing. Whoever meets it cannot know what to do: ask first, and "
                "raise one that names the empty mask.",
                _left_to_numpy,
            ),
            idea(
                "another error",
                "An empty mask makes your answer stumble over an index. Ask first, and "
                "raise a ValueError that names the empty mask.",
                _index_error,
            ),
        ),
        differ=_box_differs,
    )
