"""Exercise 02.4: grey levels that do not wrap."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from medtut.course.exercises.engine import Case, Exercise, Misconception, describe
from medtut.course.exercises.ex02_split import Probed


# ------------------------------------------------------------------------------ 02.4
def window(image, low, high):
    bottom, top = np.percentile(image, [low, high])
    if top <= bottom:  # a constant image has nothing to show
        return np.zeros(image.shape, np.uint8)
    unit = np.clip((image - bottom) / (top - bottom), 0, 1)  # first clip, then cast
    return np.round(255 * unit).astype(np.uint8)


def _wrap(picture: Any) -> np.ndarray:
    """Cast as x86 does: the fraction is cut off, then modulo 256."""
    return (np.trunc(picture).astype(np.int64) & 255).astype(np.uint8)


def _unit(image: Any, low: float, high: float) -> np.ndarray:
    """Percentiles to 0 and 1, unclipped; a constant image becomes 0."""
    bottom, top = np.percentile(image, [low, high])
    return (image - bottom) / (top - bottom) if top > bottom else 0 * image


def _grey(picture: Any) -> np.ndarray:
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)


def _probe_window(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Let a cast of NaN be an error: what it gives depends on the machine."""
    if hasattr(answer, "__wrapped__"):
        return answer

    @functools.wraps(answer)
    def run(image, low, high):
        with warnings.catch_warnings(), np.errstate(invalid="warn", divide="ignore"):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "invalid value encountered in cast")
            return answer(image, low, high)

    return run


def _wrong_constant(image, low, high):
    bottom, top = np.percentile(image, [low, high])
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.clip((image - bottom) / (top - bottom), 0, 1)
    if np.isnan(unit).any():
        raise RuntimeWarning("invalid value encountered in cast")
    return _grey(unit)


def _wrong_brain_only(image, low, high):
    brain = image[image != 0]
    if brain.size == 0 or np.ptp(brain) == 0:
        return np.zeros(image.shape, np.uint8)
    bottom, top = np.percentile(brain, [low, high])
    return _grey((image - bottom) / (top - bottom))


def _grey_differs(got: Any, want: Any) -> str | None:
    """Compare pictures; one grey level is a matter of rounding."""
    if not hasattr(got, "shape") or not hasattr(got, "dtype"):
        return f"expected a uint8 picture, got {describe(got)}"
    picture = np.asarray(got)
    if picture.dtype != want.dtype or picture.shape != want.shape:
        return (
            f"expected {want.dtype} of shape {want.shape}, got {picture.dtype} of "
            f"shape {picture.shape}"
        )
    gap = np.abs(picture.astype(float) - want.astype(float))
    tolerance = 1 if want.dtype == np.uint8 else 1e-3
    if gap.max() <= tolerance:
        return None
    place = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
    return (
        f"{int((gap > tolerance).sum())} of {gap.size} pixels differ; at {place} "
        f"expected {want[place]}, got {picture[place]}"
    )


def _head(kind: str) -> np.ndarray:
    """A drawn slice: black outside, tissue within, a few very bright vessels."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    image = np.where(x**2 + y**2 < 0.8, rng.normal(300, 60, x.shape), 0)
    image[20:22, 10:18] = 2500
    if kind == "z-scored":
        image = (image - image.mean()) / image.std()
    if kind == "constant":
        image = np.full_like(image, 0.25)
    return image.astype(np.float32)


class _Window(Probed):
    probe = staticmethod(_probe_window)


def windowing() -> Exercise:
    def case(said: str, kind: str, low: float, high: float) -> Case:
        return Case(
            f"{said}, percentiles {low:g} to {high:g}",
            lambda: (_head(kind), low, high),
        )

    return _Window(
        id="02.4",
        title="grey levels that do not wrap",
        ask="Write window(image, low, high): a float image (height, width) as uint8 "
        "for showing. The percentile low of the whole image becomes 0, high becomes "
        "255, linear between; what lies outside gets the nearer end. A constant image "
        "becomes all 0.",
        difficulty=2,
        minutes=6,
        hints=(
            "A uint8 holds 0 to 255. What becomes of -3 or 300 in a cast?",
            "Bring the image to 0..1 with two numbers from np.percentile, clip it "
            "while it is still float, and cast last.",
            "np.clip((image - bottom) / (top - bottom), 0, 1) * 255, then "
            ".astype(np.uint8); when top equals bottom, return zeros.",
        ),
        solution_function=window,
        explanation="A float outside 0..255 has no defined uint8: many machines wrap "
        "it, so dark tissue turns bright, as in the published overlays; others stop at "
        "the ends. Clip while still float and nothing is left to the machine. "
        "Percentiles keep one bright vessel from darkening all the rest.",
        cases=(
            case("a skull-stripped slice", "raw", 1, 98),
            case("a z-scored slice", "z-scored", 20, 97),
            case("the whole range", "raw", 0, 100),
            case("a constant image", "constant", 1, 99),
        ),
        misconceptions=(
            Misconception(
                "cast without clipping",
                "Values outside 0..255 wrap in the cast: bright vessels turn dark and "
                "dark tissue bright. Clip while the image is still float; a clip after "
                "the cast comes too late, for by then everything is in 0..255.",
                (
                    lambda image, low, high: _wrap(255 * _unit(image, low, high)),
                    lambda image, low, high: np.clip(
                        _wrap(255 * _unit(image, low, high)), 0, 255
                    ),
                ),
            ),
            Misconception(
                "z-score times 255",
                "That is the published overlay: mean 0 times 255. Half the tissue is "
                "negative and wraps. Bring the image to 0..1 first.",
                (
                    lambda image, low, high: _wrap(
                        255 * (image - image.mean()) / (image.std() + 1e-8)
                    ),
                    lambda image, low, high: _wrap(255 * image),
                ),
            ),
            Misconception(
                "minimum and maximum",
                "You stretched from minimum to maximum and did not use low and high: "
                "one bright vessel then makes all tissue dark.",
                (lambda image, low, high: _grey(_unit(image, 0, 100)),),
            ),
            Misconception(
                "times 256",
                "1.0 times 256 is 256, which wraps to 0: the brightest pixels turn "
                "black. The largest uint8 is 255.",
                (
                    lambda image, low, high: _wrap(
                        256 * np.clip(_unit(image, low, high), 0, 1)
                    ),
                ),
            ),
            Misconception(
                "division by zero",
                "In a constant image both percentiles are equal, and 0/0 is NaN, whose "
                "cast gives what the machine likes. Return zeros then.",
                (_wrong_constant,),
            ),
            Misconception(
                "fractions in place of percentiles",
                "np.percentile counts from 0 to 100: percentile 0.98 is nearly the "
                "minimum. Use low and high as they come (np.quantile takes fractions).",
                (lambda image, low, high: _grey(_unit(image, low / 100, high / 100)),),
            ),
            Misconception(
                "cast before scaling",
                "You cast while the image was in 0..1, so only 0 and 1 are left: a "
                "picture in black and white. Multiply by 255 first.",
                (
                    lambda image, low, high: (
                        255 * np.clip(_unit(image, low, high), 0, 1).astype(np.uint8)
                    ),
                ),
            ),
            Misconception(
                "still floats",
                "The values are fine and still floats; a uint8 picture is asked for.",
                (
                    lambda image, low, high: (
                        255 * np.clip(_unit(image, low, high), 0, 1)
                    ),
                    lambda image, low, high: np.clip(_unit(image, low, high), 0, 1),
                ),
            ),
            Misconception(
                "percentiles of the brain alone",
                "You left the zeros out. That is a fair choice for skull-stripped "
                "images, but z-scoring moves background away from 0; here the "
                "percentiles are of the whole image.",
                (_wrong_brain_only,),
            ),
        ),
        differ=_grey_differs,
    )
