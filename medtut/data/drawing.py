"""Draw a cohort into the cache; interrupted, it goes on where it stopped."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medtut.data.cache import entry_path, writable_dir
from medtut.files import write_json, write_text


def write_table(path: Path, header: list[str], rows: Iterable[Iterable]) -> None:
    """Write a CSV by rename."""
    csv.writer(text := io.StringIO()).writerows([header, *rows])
    write_text(path, text.getvalue())


def drawn_cohort(
    name: str,
    key: dict[str, Any],
    jobs: dict[str, Callable[[Path], dict[str, Any]]],
    said: dict[str, str],
    prepare: Callable[[], Any],
    finish: Callable[[Path, dict[str, Any]], None],
    progress: bool = False,
) -> Path:
    """Return the folder of a cohort, with ``passport.json`` written last.

    Parameters
    ----------
    name, key : of the cache entry; see `medtut.data.cache.entry_path`.
    jobs : name of a patient to a function of the folder
        It writes the patient's files, whole or not at all, and returns the facts for
        the passport. What is done is noted in ``.done`` and not done again.
    said : source and licence, for the passport.
    prepare : called before the first patient, where there is one to draw.
    finish : called with the folder and the facts of all patients, before the passport.
    """
    folder = entry_path(name, key)
    passport = folder / "passport.json"
    if passport.is_file():
        return folder
    writable_dir(folder)
    prepare()  # once, before the threads

    def one(patient: str) -> dict[str, Any]:
        note = folder / ".done" / f"{patient}.json"
        if not note.is_file():
            write_json(note, jobs[patient](folder))
        return json.loads(note.read_text("utf-8"))

    # Threads suffice: the arithmetic and the compression release the interpreter.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(one, jobs)
        if progress:
            from tqdm.auto import tqdm

            found = tqdm(found, total=len(jobs), desc="drawing patients")
        patients = dict(zip(jobs, found, strict=True))
    finish(folder, patients)
    whole = said | key | {"patients": patients}
    write_text(passport, json.dumps(whole, indent=1))
    return folder
