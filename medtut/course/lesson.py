"""What a notebook holds on to while it runs: settings, numbers, figures.

A lesson's second code cell opens it::

    from medtut.course import open_lesson

    lesson = open_lesson("01_lora_math", profile=profile, seed=seed, steps=steps)

and everything the lesson reports goes through ``lesson.record`` and ``lesson.show``,
so that reports, slides and claims read the same numbers the notebook printed.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from medtut import machine
from medtut.course.files import check_writable, repository_root
from medtut.course.profiles import LessonSettings, profile_table, resolve
from medtut.errors import MedtutError
from medtut.files import read_json, write_bytes, write_json

FIGURE_BYTES = 55_000
# The last two are for pictures of one's own: an hour's run must not end over a figure.
FIGURE_DPI = (110, 90, 75, 60, 48, 36)
NOT_EVIDENCE = "smoke profile: seconds of training, not evidence"


def open_lesson(slug: str, **settings: Any) -> Lesson:
    """Check the settings of a lesson and start its record.

    Parameters
    ----------
    slug : str
        ``"01_lora_math"``, or ``"bonus/01_name"`` for a bonus notebook.
    **settings
        The names of the notebook's parameters cell; None means "from the profile".

    Raises
    ------
    SettingsError
        Unknown name, wrong type, unknown profile.
    MedtutError
        The output folder cannot be written.
    """
    if settings.get("data") is None:
        # The runner passes the folder this way, to keep it out of the notebook.
        settings["data"] = os.environ.get("MEDTUT_DATA") or None
    return Lesson(slug, resolve(slug, settings.pop("profile", None), settings))


class Lesson:
    """A running lesson. Its settings are attributes: ``lesson.steps``.

    Attributes
    ----------
    slug : str
    settings : LessonSettings
    out : Path
        Folder of this run: ``MEDTUT_OUT``, else the setting ``out``, else
        ``build/<profile>/<slug>`` in the clone.
    metrics : dict
        Everything recorded so far.
    """

    def __init__(self, slug: str, settings: LessonSettings):
        self.slug = slug
        self.settings = settings
        chosen = os.environ.get("MEDTUT_OUT") or settings.out
        default = repository_root() / "build" / settings.profile / Path(slug)
        self.out = check_writable(Path(chosen) if chosen else default)
        self.metrics: dict[str, Any] = {}
        self.figures: list[dict[str, Any]] = []
        self._fallbacks: list[dict[str, str]] = []
        self._start = time.perf_counter()
        self._status = "running"
        if (read_json(self.path) or {}).get("status") == "complete":
            os.replace(self.path, self.out / "metrics.previous.json")
        self._write()
        if not self.evidence:
            _display_html(f"<p><strong>{NOT_EVIDENCE}.</strong></p>", NOT_EVIDENCE)

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings")
        if settings is not None and name in type(settings).model_fields:
            return getattr(settings, name)
        known = ", ".join(type(settings).model_fields) if settings else "none"
        raise AttributeError(f"no setting {name!r}; the settings are {known}")

    def __repr__(self) -> str:
        values = self.settings.model_dump(exclude={"out", "data"})
        said = ", ".join(f"{key}={value!r}" for key, value in values.items())
        stamp = "" if self.evidence else f" ({NOT_EVIDENCE})"
        return f"Lesson {self.slug}: {said}{stamp}"

    @property
    def evidence(self) -> bool:
        """Whether numbers of this profile may be quoted."""
        return bool(profile_table()[self.settings.profile]["evidence"])

    @property
    def path(self) -> Path:
        """The file the numbers are in."""
        return self.out / "metrics.json"

    def record(self, **values: Any) -> None:
        """Add numbers to ``metrics.json``; a name recorded before is replaced.

        Values are numbers, text, booleans, None, and lists, tuples and dicts of
        them. NumPy and torch numbers of one element count as numbers.

        Raises
        ------
        MedtutError
            For NaN or infinity, and for anything JSON has no word for.
        """
        clean = {name: _plain(name, value) for name, value in values.items()}
        self.metrics.update(clean)
        self._write()

    def show(self, fig: Any, name: str, alt: str) -> Path:
        """Save a matplotlib figure, show it with its alternative text, close it.

        Parameters
        ----------
        fig : matplotlib.figure.Figure
        name : str
            File name without suffix; the figure goes to ``figures/<name>.png``.
        alt : str
            What the picture says, for someone who does not see it.

        Raises
        ------
        MedtutError
            Empty `alt`, a name that is no file name, or a figure that stays above
            55 kB at the lowest resolution.
        """
        alt = " ".join(str(alt).split())
        if not alt:
            raise MedtutError(
                f"figure {name!r} needs alternative text: say what it shows"
            )
        if not name or Path(name).name != name or Path(name).suffix:
            raise MedtutError(f"{name!r} is not a plain name for a figure")
        image = _png(fig, name)
        width, height = (round(80 * inches) for inches in fig.get_size_inches())
        file = f"figures/{name}.png"
        path = write_bytes(self.out / file, image)
        entry = {"name": name, "file": file, "alt": alt}
        entry |= {"width": width, "height": height}
        self.figures = [old for old in self.figures if old["name"] != name] + [entry]
        write_json(self.out / "figures.json", self.figures)
        data = base64.b64encode(image).decode("ascii")
        _display_html(
            f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" '
            f'width="{width}" height="{height}" '
            'style="max-width:100%;height:auto;background:#fff">',
            f"[figure {name}: {alt}]",
        )
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close(fig)
        return path

    def fell_back(self, what: str, to: str) -> None:
        """Record and say that something was not to be had and what took its place.

        Examples
        --------
        ``lesson.fell_back("the brain slices", "slices drawn from the MNI152 maps")``
        """
        entry = {"what": what, "to": to}
        if entry not in self._fallbacks:
            self._fallbacks.append(entry)
        self._write()
        note = f"Not available: {what}. This run uses {to} instead."
        _display_html(f"<p><em>{html.escape(note)}</em></p>", note)

    def finish(self) -> None:
        """Mark the run complete, with its seconds and peak memory."""
        self._status = "complete"
        self._write()
        stamp = "" if self.evidence else f" ({NOT_EVIDENCE})"
        print(
            f"{len(self.metrics)} numbers and {len(self.figures)} figures recorded, "
            f"profile {self.settings.profile}{stamp}"
        )

    def _write(self) -> None:
        write_json(
            self.path,
            {
                "lesson": self.slug,
                "profile": self.settings.profile,
                "evidence": self.evidence,
                "status": self._status,
                "settings": self.settings.stored(),
                "fell_back": self._fallbacks,
                "seconds": round(time.perf_counter() - self._start, 2),
                "peak_memory_mb": round(machine.peak_memory() / 2**20, 1),
                "machine": machine.describe_machine(),
                "versions": machine.versions(),
                "metrics": self.metrics,
            },
        )


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(f"{name}.{k}", item) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if hasattr(value, "tolist"):
        # NumPy scalars and arrays, torch tensors: without importing either.
        return _plain(name, value.tolist())
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise MedtutError(
                f"record: {name} is {value}; find out why before writing it down"
            )
        return value
    raise MedtutError(
        f"record: {name} is a {type(value).__name__}; only numbers, text, booleans, "
        "lists and dicts can be recorded"
    )


def _png(fig: Any, name: str) -> bytes:
    """Return a PNG within the limit: fewer colours, then fewer pixels."""
    from PIL import Image

    for dpi in FIGURE_DPI:
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=dpi, facecolor="white")
        image = Image.open(buffer).convert("RGB")
        # Maximum coverage: median cut would give a legend's rare colours to the greys.
        few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
        for picture in (image, few):
            small = io.BytesIO()
            picture.save(small, format="png", optimize=True)
            if small.tell() <= FIGURE_BYTES:
                return small.getvalue()
    raise MedtutError(
        f"figure {name!r} stays above {FIGURE_BYTES // 1000} kB at {FIGURE_DPI[-1]} "
        "dpi: make it smaller"
    )


def _display_html(markup: str, plain: str) -> None:
    """Show HTML in a notebook; stay silent in a plain Python process."""
    if "IPython" not in sys.modules:
        return
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is not None:
        display({"text/html": markup, "text/plain": plain}, raw=True)
