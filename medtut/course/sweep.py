"""``medtut sweep``: arms times seeds, one JSON per run, restartable run by run.

The runs under ``benchmarks/sweeps/<lesson>/<arm>/seed<k>.json`` are committed: a
quick notebook trains a little live and draws the full comparison from these files.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtut import machine
from medtut.course.catalog import environment, find_lesson
from medtut.course.files import check_cache, check_writable, repository_root
from medtut.course.lesson import _plain
from medtut.course.profiles import SettingsError, choose_profile, lesson_module, resolve
from medtut.course.profiles import _did_you_mean as did_you_mean
from medtut.course.report import minutes
from medtut.errors import MedtutError
from medtut.files import read_json, write_json

if TYPE_CHECKING:
    import numpy as np


def parse_seeds(text: str) -> list[int]:
    """Read ``"0-4"``, ``"0,2,5"`` or a mixture of both.

    Examples
    --------
    >>> parse_seeds("0-2,7")
    [0, 1, 2, 7]
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise SettingsError(f"--seeds {text!r}: write it as 0-4 or 0,2,5")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(seeds))


def run_sweep(
    lesson: str | int,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] = range(5),
    profile: str | None = None,
    overrides: dict[str, Any] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    console: Any = None,
) -> list[dict[str, Any]]:
    """Run every arm with every seed that has no result yet.

    The lesson's module gives ``ARMS`` (name to settings that differ) and
    ``run_arm(arm, seed, settings) -> metrics``. Seeds are the outer loop: broken off,
    a sweep has the same number of seeds of every arm.

    Parameters
    ----------
    lesson : str or int
        Number or slug.
    arms : sequence of str, optional
        All by default.
    seeds : sequence of int
    profile : str, optional
        Given here, it beats ``MEDTUT_PROFILE``.
    overrides : dict, optional
        Settings for all arms; an arm's own settings win.
    out : path, optional
        Default ``benchmarks/sweeps/<slug>`` in the clone.
    force : bool
        Make runs again whose stored settings differ.

    Returns
    -------
    list of dict
        One per run, stored and new; a run that raised has only ``arm``, ``seed`` and
        ``error``, and leaves no file.

    Raises
    ------
    SettingsError
        No such lesson or arm; stored runs with other settings (before anything runs).
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    slug = sweep_slug(lesson)
    module = lesson_module(slug)
    known = getattr(module, "ARMS", None)
    if not known or not hasattr(module, "run_arm"):
        raise SettingsError(f"lesson {slug} has no arms to sweep")
    if "seed" in (overrides or {}):
        raise SettingsError("use --seeds in the place of --set seed=...")
    for arm in arms or []:
        if arm not in known:
            raise SettingsError(
                f"lesson {slug} has no arm {arm!r}{did_you_mean(arm, known)}; the "
                f"arms are {', '.join(known)}"
            )
    cohort = getattr(module, "COHORT_VERSION", None)
    folder = Path(out) if out else _folder(slug)
    with environment(MEDTUT_PROFILE=profile or choose_profile()):
        todo = []
        for seed, arm in itertools.product(seeds, arms or known):
            given = {**(overrides or {}), **known[arm], "seed": seed}
            settings = resolve(slug, None, given)
            path = folder / arm / f"seed{seed}.json"
            stored = _stored(path, settings.stored(), cohort, force)
            todo.append((arm, settings, path, stored))
        check_cache()
        check_writable(folder)
        results = []
        for arm, settings, path, stored in todo:
            result = stored or _one(module, slug, arm, settings, path)
            said = "stored" if stored else minutes(result.get("seconds", 0))
            if "error" in result:
                said = f"FAILED: {result['error']}"
            text = f"{slug} {arm} seed {settings.seed}: {said}"
            console.print(text, highlight=False, markup=False)
            results.append(result)
    return results


def load_sweep(
    lesson: str | int, out: str | Path | None = None
) -> list[dict[str, Any]]:
    """Return the stored runs of a lesson, by arm and seed.

    Raises
    ------
    MedtutError
        When there are none, or the runs are of more than one profile or cohort: they
        cannot be compared.
    """
    slug = sweep_slug(lesson)
    folder = Path(out) if out else _folder(slug)
    runs = [read_json(path) for path in sorted(folder.glob("*/seed*.json"))]
    runs = [run for run in runs if run]
    if not runs:
        raise MedtutError(f"no stored runs in {folder}; make them: medtut sweep {slug}")
    kinds = {(run["settings"]["profile"], run["cohort"]) for run in runs}
    if len(kinds) > 1:
        listed = ", ".join(f"{p} (cohort {c})" for p, c in sorted(kinds, key=str))
        raise MedtutError(f"the runs in {folder} cannot be compared: {listed}")
    return sorted(runs, key=lambda run: (run["arm"], run["seed"]))


def by_arm(runs: Sequence[dict[str, Any]], key: str = "cases") -> dict[str, np.ndarray]:
    """A number of some runs by arm: ``(seeds, patients)`` or ``(seeds,)``.

    Arms that do not have it are left out; seeds ascend.
    """
    import numpy as np

    found: dict[str, list] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["metrics"].get(key) is not None:
            found.setdefault(run["arm"], []).append(run["metrics"][key])
    return {arm: np.array(values, dtype=float) for arm, values in found.items()}


def committed(lesson: str, key: str = "cases") -> dict[str, np.ndarray]:
    """`by_arm` of the stored runs of a lesson."""
    return by_arm(load_sweep(lesson), key)


def chosen_rate(lesson: str, arm: str) -> float:
    """The learning rate that the stored runs of an arm chose on validation.

    Raises
    ------
    MedtutError
        When there is no run of this arm.
    """
    rates = committed(lesson, "lr").get(arm)
    if rates is None:
        raise MedtutError(f"no sweep of {arm}: medtut sweep {lesson[:2]} --arms {arm}")
    return float(rates[0])


def sweep_slug(lesson: str | int) -> str:
    """Return the slug of a lesson, or its number when it has no notebook yet."""
    try:
        return find_lesson(lesson).slug
    except SettingsError as error:
        try:
            lesson_module(lesson)
        except SettingsError:
            raise error from None  # this one lists the lessons there are
        text = str(lesson)
        return f"{int(text):02d}" if text.isdigit() else text


def _folder(slug: str) -> Path:
    return repository_root() / "benchmarks" / "sweeps" / Path(slug)


def _stored(
    path: Path, settings: dict[str, Any], cohort: Any, force: bool
) -> dict[str, Any] | None:
    """Return the run a file holds, None if there is none or it is to be made again."""
    if not path.exists():
        return None
    old, why = read_json(path), "is not a stored run"
    if isinstance(old, dict) and {"settings", "cohort"} <= set(old):
        before = {**old["settings"], "cohort version": old["cohort"]}
        now = {**settings, "cohort version": cohort}
        differ = [
            f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if not differ:
            return old
        why = f"was made with other settings ({'; '.join(differ)})"
    if force:
        return None
    raise SettingsError(
        f"{path} {why}; --force makes it again, --out puts the new runs elsewhere"
    )


def _one(module: Any, slug: str, arm: str, settings: Any, path: Path) -> dict[str, Any]:
    start, seed = time.perf_counter(), settings.seed
    try:
        metrics = _plain("metrics", dict(module.run_arm(arm, seed, settings)))
    except Exception as error:
        # One diverging run must not cost a night's sweep.
        return {"arm": arm, "seed": seed, "error": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - start, 1)
    result = {
        "lesson": slug,
        "arm": arm,
        "seed": seed,
        "settings": settings.stored(),
        "cohort": getattr(module, "COHORT_VERSION", None),
        "metrics": metrics,
        "seconds": seconds,
        "hours": round(seconds / 3600, 4),
        # Without the folder the program lies in.
        "command": shlex.join(
            ["medtut", *(arg for arg in sys.argv[1:] if not Path(arg).is_absolute())]
        ),
        "versions": machine.versions(),
        "machine": machine.describe_machine(),
    }
    write_json(path, result)
    return result
