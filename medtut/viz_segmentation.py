"""Pictures of lesson 02: overlays, panels, one-patient GIFs, curves from the log.

Labels are 0 background, 1 necrotic core, 2 oedema, 3 enhancing tumour. A slice is
(height, width), turned so that anterior is up; a volume is (X, Y, Z) as on disk.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike as Array

from medtut.errors import MedtutError
from medtut.files import write_bytes
from medtut.viz import BLUE, GREY, ORANGE, VERMILION, figure, picture_html

# Of the Okabe-Ito colours these three stay furthest apart, and from grey, when a
# 40 % tint is seen with each of the three kinds of colour blindness.
CLASSES = {"necrotic core": VERMILION, "oedema": BLUE, "enhancing tumour": ORANGE}
COLOURS = np.array([[0, 0, 0], [213, 94, 0], [0, 114, 178], [230, 159, 0]], np.uint8)
# What the published suite paints: black, red, green, blue.
PUBLISHED_COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
GIF_BYTES, GIF_SIDE = 100_000, 150


class Sample(NamedTuple):
    """One slice with its true name: what a picture is drawn from.

    Attributes
    ----------
    case : patient id.
    z : index of the axial slice in the volume.
    image : ``(height, width)`` floats.
    truth, prediction : ``(height, width)`` integers 0..3.
    """

    case: str
    z: int
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def window(image: Array, low: float = 0.5, high: float = 99.5) -> np.ndarray:
    """Map the percentiles `low`..`high` of an image to 0..1 and clip the rest.

    Parameters
    ----------
    image : numbers of any shape; what is no number counts as 0.
    low, high : percentiles over the whole image.

    Returns
    -------
    float array of the same shape in 0..1; all 0 when the image is constant.
    """
    picture = np.nan_to_num(np.asarray(image, dtype=float), posinf=0, neginf=0)
    bottom, top = np.percentile(picture, [low, high])
    return np.clip((picture - bottom) / (top - bottom or 1), 0, 1)


def _indices(image: Array, label: Array) -> np.ndarray:
    """Return a label map as indices, refused when it does not fit the image."""
    found = np.asarray(label)
    fits = found.ndim == 2 and found.shape == np.shape(image)
    if not fits or found.min() < 0 or found.max() >= len(COLOURS):
        raise MedtutError(
            f"image {np.shape(image)} and label {found.shape} with values "
            f"{np.unique(found)[:9]} must be slices (height, width) of one shape, with "
            "labels 0 to 3 (on disk BraTS writes enhancing tumour as 4: map it to 3)."
        )
    return found.astype(int)


def overlay(image: Array, label: Array, alpha: float = 0.4) -> np.ndarray:
    """Tint the lesion on a windowed slice; what is background stays as it was.

    Parameters
    ----------
    image, label : ``(height, width)``.
    alpha : share of the colour within the lesion.

    Returns
    -------
    ``(height, width, 3)`` uint8.

    Raises
    ------
    MedtutError
        The shapes differ, or a label has no colour.
    """
    found = _indices(image, label)
    rgb = 255 * window(image)[..., None].repeat(3, axis=-1)
    rgb[found > 0] = (1 - alpha) * rgb[found > 0] + alpha * COLOURS[found[found > 0]]
    return np.rint(rgb).astype(np.uint8)


def _scaled_as_published(image: Array) -> np.ndarray:
    """z-score over the whole slice times 255, cut to whole numbers as a cast does."""
    picture = np.asarray(image, dtype=np.float64)
    z = (picture - picture.mean()) / (picture.std() + 1e-8)
    return np.trunc(255 * z).astype(np.int64)


def wrapped_fraction(image: Array) -> float:
    """Share of the pixels that wrap when a z-scored slice is written as uint8.

    A pixel wraps when 255 z, cut to a whole number, lies outside 0..255: all that is
    clearly darker than the slice's mean, and all beyond one standard deviation above.
    """
    scaled = _scaled_as_published(image)
    return float(np.mean((scaled < 0) | (scaled > 255)))


def published_overlay(image: Array, label: Array) -> np.ndarray:
    """The overlay as the published suite makes it, kept for the autopsy.

    A float slice of mean 0 times 255 is cast to uint8, then every pixel becomes 0.7
    image + 0.3 colour, background (black) included. The cast of a number outside 0..255
    is undefined in C; the wrap modulo 256 that x86 shows is written out here, so that
    the picture is the same everywhere.

    Parameters
    ----------
    image, label : ``(height, width)``; the image is z-scored here, which leaves one
        that already is unchanged.

    Returns
    -------
    ``(height, width, 3)`` uint8.
    """
    grey = 0.7 * (_scaled_as_published(image) & 255)
    mixed = grey[..., None] + 0.3 * PUBLISHED_COLOURS[_indices(image, label)]
    return np.rint(mixed).astype(np.uint8)


def legend_patches() -> list[Any]:
    """One coloured patch per class, for ``legend(handles=...)``."""
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=name) for name, colour in CLASSES.items()]


def _panels(rows: Mapping[str, Mapping[str, np.ndarray]], title: str = "") -> Any:
    """A grid of named pictures, row by row, with the legend below."""
    cells = [(row, *cell) for row, panels in rows.items() for cell in panels.items()]
    down, across = len(rows), len(cells) // len(rows)
    fig, axes = figure(down, across, width=2.3 * across, height=2.6 * down + 0.6)
    for place, (ax, (row, said, picture)) in enumerate(zip(axes, cells, strict=True)):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[], ylabel="" if place % across else row)
        ax.set_title(said, fontsize=9)
        ax.spines[:].set_visible(False)
    fig.suptitle(title, fontsize=10)
    below = {"loc": "outside lower center", "ncols": 3, "fontsize": 9}
    fig.legend(handles=legend_patches(), **below)
    return fig


def five_panels(image: Array, truth: Array, prediction: Array, title: str) -> Any:
    """MRI, truth, prediction, and both laid over the MRI.

    Parameters
    ----------
    image, truth, prediction : ``(height, width)``.
    title : names case and slice, such as ``"BraTS20_Training_007, slice 71"``.
    """
    from medtut.evaluate import region_dice

    true, found = _indices(image, truth), _indices(image, prediction)
    dice = float(region_dice(found, true)["foreground"])
    panels = {
        "MRI": window(image),
        "truth": COLOURS[true],
        f"prediction, Dice {dice:.2f}": COLOURS[found],
        "truth on MRI": overlay(image, true),
        "prediction on MRI": overlay(image, found),
    }
    return _panels({"": panels}, title)


def slices_of(
    case: str, image: Array, truth: Array, prediction: Array, step: int = 1
) -> list[Sample]:
    """Slices of one patient that hold tumour, true or predicted, from the lowest up.

    Parameters
    ----------
    image, truth, prediction : ``(X, Y, Z)``.
    step : levels of the scan from one slice to the next, where some were left out.
    """
    parts = [np.rot90(np.asarray(part)) for part in (image, truth, prediction)]
    if parts[0].ndim != 3 or len({part.shape for part in parts}) != 1:
        shapes = ", ".join(str(part.shape) for part in parts)
        raise MedtutError(f"{case}: needs three (X, Y, Z) of one shape, got {shapes}.")
    tumour = np.flatnonzero(((parts[1] > 0) | (parts[2] > 0)).any(axis=(0, 1)))
    return [
        Sample(case, int(z) * step, *(part[..., z] for part in parts)) for z in tumour
    ]


def ranked_patients(
    scores: Mapping[str, float], load: Callable[[str], Any], step: int = 1
) -> Any:
    """Best, median and worst patient, each at the slice with its largest tumour.

    Parameters
    ----------
    scores : case id -> Dice of the whole patient; NaN (nothing to find) is left out.
        With an even number the lower of the two middle patients is the median.
    load : ``load(case)`` gives image, truth and prediction ``(X, Y, Z)``; called for
        three patients only.
    step : as in `slices_of`.

    Raises
    ------
    MedtutError
        Fewer than three patients have a score.
    """
    order = sorted((c for c in scores if not np.isnan(scores[c])), key=scores.get)
    if len(order) < 3:
        raise MedtutError(f"ranked_patients: {len(order)} of 3 patients have a score.")
    rows = {}
    for place, rank in ("best", -1), ("median", (len(order) - 1) // 2), ("worst", 0):
        case = order[rank]
        slices = slices_of(case, *load(case), step)
        one = max(slices, key=lambda s: ((s.truth > 0).sum(), (s.prediction > 0).sum()))
        rows[place] = {
            f"{case}, slice {one.z}": window(one.image),
            "truth": overlay(one.image, one.truth),
            f"prediction, Dice {scores[case]:.2f}": overlay(one.image, one.prediction),
        }
    return _panels(rows)


def _frame(sample: Sample, palette: Any) -> Any:
    """Truth and prediction side by side, with names, as a picture of the palette."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    pair = np.hstack([overlay(sample.image, part) for part in sample[3:]])
    canvas = ImageOps.pad(Image.fromarray(pair), (2 * GIF_SIDE, GIF_SIDE))
    canvas = ImageOps.expand(canvas, (0, 34, 0, 18))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    said = f"{sample.case}, slice {sample.z}\nleft: truth, right: prediction"
    draw.text((4, 2), said, "white", font)
    for column, (name, colour) in enumerate(CLASSES.items()):
        draw.text((4 + 118 * column, GIF_SIDE + 35), name, colour, font)
    return canvas.quantize(palette=palette, dither=Image.Dither.NONE)


def _write_gif(path: Path | str, samples: Sequence[Sample], whose: str) -> str:
    """Write the animation, of as many slices as find room, and return its alt text."""
    from PIL import Image

    # Few greys and the tints on them: an adaptive palette may drop a small lesion.
    greys = np.linspace(0, 255, 20)[:, None].repeat(3, axis=1)
    tints = [0.6 * greys[::3] + 0.4 * colour for colour in COLOURS[1:]]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.vstack([greys, COLOURS, *tints]).astype(np.uint8).tobytes())
    for count in (24, 16, 11, 7, 4, 1):
        places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round()
        kept = [samples[int(i)] for i in places]
        first, *rest = (_frame(sample, palette) for sample in kept)
        made = io.BytesIO()
        first.save(made, "GIF", save_all=True, append_images=rest, duration=400, loop=0)
        if made.tell() < GIF_BYTES:
            break
    write_bytes(Path(path), made.getvalue())
    shown = f"Animation of {len(kept)} axial slices of {whose}"
    return f"{shown}: true tumour on the left, predicted tumour on the right."


def patient_gif(path: Path | str, samples: Sequence[Sample]) -> str:
    """Animate the slices of one patient, truth beside prediction.

    Parameters
    ----------
    path : the GIF to write, by rename, below 100 kB: slices are left out evenly
        (at most 24 frames) rather than the patient's outline blurred.
    samples : slices of one case, such as `slices_of` gives; put in order of z.

    Returns
    -------
    Alternative text.

    Raises
    ------
    MedtutError
        There are no slices, or they come from several patients.
    """
    cases = sorted({one.case for one in samples})
    if len(cases) != 1:
        names = ", ".join(cases[:3]) or "no slices at all"
        raise MedtutError(f"{path} is to show one patient, and got {names}.")
    return _write_gif(path, sorted(samples, key=lambda s: s.z), f"patient {cases[0]}")


def random_samples_gif(path: Path | str, samples: Sequence[Sample], seed: int) -> str:
    """Animate 20 slices drawn at random over patients, the same ones for one seed.

    Returns
    -------
    Alternative text.
    """
    if not samples:
        raise MedtutError(f"random_samples_gif: no slices for {path}.")
    order = np.random.default_rng(seed).permutation(len(samples))
    drawn = [samples[i] for i in order[:20]]
    return _write_gif(path, drawn, f"{len({one.case for one in drawn})} patients")


def gif_html(path: Path | str, alt: str) -> str:
    """The animation inside an ``<img>`` with its alternative text."""
    return picture_html(Path(path).read_bytes(), "gif", alt)


def curves(log: Any, score: str = "score", loss: str = "loss") -> Any:
    """Training loss, validation loss and score over steps, from the log of a run.

    Parameters
    ----------
    log : ``FitResult.history``, or the path of ``log.jsonl`` as `medtut.train.fit`
        writes it.
    score, loss : names that ``validate`` gives; a loss it does not give is not drawn.
        The highest score is marked.

    Raises
    ------
    MedtutError
        There is no log, it holds no training step, or its validations lack `score`.
    """
    rows = log
    if isinstance(log, str | Path):
        text = Path(log).read_text("utf-8") if Path(log).is_file() else ""
        # A run that was cut off may leave half a line.
        rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    steps, evals = ([r for r in rows if r["event"] == e] for e in ("step", "eval"))
    if not steps or (evals and score not in evals[0]):
        raise MedtutError(
            f"curves: {log if rows is not log else 'the history'} is missing, holds no "
            f"training step, or no {score!r} among {', '.join((evals or [{}])[0])}. "
            "fit(..., out=FOLDER) writes FOLDER/log.jsonl."
        )
    fig, axes = figure(1, 2 if evals else 1, width=8.5 if evals else 5)

    def draw(ax: Any, part: list, name: str, **look: Any) -> tuple:
        # null in the log was a number that is not finite, and becomes NaN here.
        x, y = (np.array([row.get(k) for row in part], float) for k in ("step", name))
        ax.plot(x, y, **look)
        ax.set(xlabel="step", ylabel=name if ax is axes[0] else f"validation {name}")
        return x, y

    x, y = draw(axes[0], steps, "loss", color=GREY, lw=0.5, marker="", label="one step")
    mean = np.convolve(y, np.ones(n := len(y) // 25 + 1) / n, "valid")
    axes[0].plot(x[n - 1 :], mean, marker="", label=f"mean of {n} step(s)")
    if evals:
        if loss in evals[0]:
            draw(axes[0], evals, loss, color=VERMILION, label="validation")
        x, y = draw(axes[1], evals, score, color=BLUE)
        best = np.nan_to_num(y, nan=-np.inf).argmax()
        axes[1].axvline(x[best], color=ORANGE, ls="--", marker="")
        axes[1].set_title(f"best {y[best]:.3f} at step {x[best]:.0f}", fontsize=9)
    axes[0].legend(fontsize=9, frameon=False)
    return fig
