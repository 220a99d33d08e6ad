"""Lesson 04's pictures: who learns from which, and in what looks."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.data import brain_mri, mri_augment
from medtut.data.brain_mri import CLASSES, Picture
from medtut.data.cache import cached_arrays, digest
from medtut.errors import MedtutError

if TYPE_CHECKING:
    from medtut.course.lessons.l04 import Settings

HEALTHY = CLASSES.index("no_tumor")


@dataclass
class Task:
    """Pictures of both parts, prepared, and who learns from which.

    Attributes
    ----------
    folder : in the Kaggle layout.
    pictures, images, groups : files, (N, side, side) uint8, and (N,) group ids.
    train, validation, test : positions. The first two are one grouped fold of
        ``Training``; the third is ``Testing``.
    """

    folder: Path
    pictures: Sequence[Picture]
    images: np.ndarray
    groups: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int, in the order of `CLASSES`."""
        return np.array([p.label for p in self.pictures])

    def counts(self, part: str) -> np.ndarray:
        """Pictures of every class in train, validation or test, (4,)."""
        return np.bincount(self.labels[getattr(self, part)], minlength=len(CLASSES))


def load_task(settings: Settings) -> Task:
    """Find the pictures: the folder given as `data`, else the drawn ones.

    Raises
    ------
    MedtutError
        The folder is not in the layout, or a picture cannot be read.
    """
    if settings.data is not None:
        folder = Path(settings.data)
    else:
        from medtut.data.brain_cohort import mri_folder

        counts = settings.train_patients, settings.test_patients
        folder = mri_folder(*counts, progress=True)
    pictures = brain_mri.find_pictures(folder)
    images = brain_mri.load_pictures(pictures, mri_augment.prepare, settings.side)
    groups = brain_mri.groups(pictures, images)
    if (table := folder / "patients.csv").is_file():
        groups = _patients(table, pictures, folder)
    learn = np.flatnonzero([p.part == "Training" for p in pictures])
    labels = np.array([p.label for p in pictures])
    least = min(
        len(set(groups[learn[labels[learn] == k]])) for k in range(len(CLASSES))
    )
    if least < 2:
        raise MedtutError(
            f"{folder}: a class of Training has only {least} picture or patient apart "
            "from copies; with a fold for validation it needs two or more."
        )
    folds = brain_mri.grouped_folds(
        labels[learn], groups[learn], min(settings.folds, least), seed=0
    )
    train, validation = (learn[side] for side in folds[0])
    test = np.flatnonzero([p.part == "Testing" for p in pictures])
    return Task(folder, pictures, images, groups, train, validation, test)


def _patients(table: Path, pictures: Sequence[Picture], folder: Path) -> np.ndarray:
    """Who is shown, (N,) int, from a ``patients.csv`` with columns file and patient.

    Raises
    ------
    MedtutError
        The table cannot be read, or a picture is not in it.
    """
    try:
        # Spreadsheets put a byte order mark before the first column's name.
        with open(table, newline="", encoding="utf-8-sig") as file:
            of = {row["file"]: row["patient"] for row in csv.DictReader(file)}
    except (KeyError, ValueError, csv.Error) as error:
        raise MedtutError(
            f"{table} cannot be read ({error!r}). It must be UTF-8 text with commas "
            "and the columns file and patient."
        ) from error
    names = [p.path.relative_to(folder).as_posix() for p in pictures]
    if missing := [name for name in names if not of.get(name)]:
        raise MedtutError(
            f"{table} does not say whom {len(missing)} pictures show, such as "
            f"{missing[0]}. Complete it, or take it away to split by near copies."
        )
    return np.unique([of[name] for name in names], return_inverse=True)[1]


@dataclass
class Views:
    """Pictures to learn from: as they are, as other scanners show them, and drawn into.

    Attributes
    ----------
    images : (M, side, side) uint8
    labels : (M,) int
    drawn : (M,) bool, a lesion was drawn
    pictures : how many there are; they come first, and again in each look
    """

    images: np.ndarray
    labels: np.ndarray
    drawn: np.ndarray
    pictures: int

    def __len__(self) -> int:
        return len(self.labels)


def views(task: Task, positions: np.ndarray, settings: Settings, plain: bool) -> Views:
    """What an arm learns from; made once and kept.

    Every picture as it is and in ``copies`` other looks, and ``lesions`` drawn lesions
    for each picture without tumour, every second one of these in another look too.
    """
    labels = task.labels[positions]
    if plain:
        none = np.zeros(len(labels), bool)
        return Views(task.images[positions], labels, none, len(labels))
    images = task.images[positions]
    healthy = np.flatnonzero(labels == HEALTHY)
    jobs = [(i, k, "") for k in range(settings.copies + 1) for i in range(len(labels))]
    jobs += [
        (int(i), k, kind)
        for k in range(settings.lesions)
        for kind in mri_augment.LESIONS
        for i in healthy
    ]

    def one(job: tuple[int, int, str]) -> np.ndarray:
        i, k, kind = job
        seed = 1000 * int(positions[i]) + 10 * k + len(kind) % 10
        image = images[i].astype(np.float32) / 255
        if kind:
            image = mri_augment.draw_lesion(image, kind, seed)
        if k if not kind else k % 2:
            image = mri_augment.mimic_scanner(image, seed)
        return np.uint8(np.rint(255 * image))

    def make() -> dict[str, np.ndarray]:
        from tqdm.auto import tqdm

        bar = tqdm(jobs, "drawing other scanners", delay=3)
        return {"images": np.stack([one(job) for job in bar])}

    key = [mri_augment.VERSION, settings.copies, settings.lesions, labels.tolist()]
    key += [positions.tolist(), digest("pictures", images.tobytes().hex())]
    found = cached_arrays("l04_views", key, make)["images"]
    kinds = [kind for _, _, kind in jobs]
    of = [CLASSES.index(kind) if kind else labels[i] for i, _, kind in jobs]
    drawn = np.array([bool(kind) for kind in kinds])
    return Views(found, np.array(of), drawn, len(labels))


class Balanced:
    """Training items in a seeded order in which every class comes up as often.

    Drawn lesions come on top: they take the places of a `drawn_share` of the items,
    whatever those showed, and the even classes are those of the rest.

    Parameters
    ----------
    views : what there is.
    length : items.
    settings : say how many items show a picture as it is, and how many a drawn lesion.
    even : whether classes come up as often as one another, or as they occur.
    """

    def __init__(
        self,
        views: Views,
        length: int,
        seed: int,
        settings: Settings,
        even: bool = True,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.views = views
        real = np.flatnonzero(~views.drawn)
        count = np.bincount(views.labels[real])
        weight = 1 / count[views.labels[real]] if even else np.ones(len(real))
        # The first n are the pictures as they are; the others are their other looks.
        n = views.pictures
        self.order = rng.choice(real, length, p=weight / weight.sum())
        as_it_is = rng.random(length) < settings.plain_share
        self.order[as_it_is] = self.order[as_it_is] % n
        if drawn := np.flatnonzero(views.drawn).tolist():
            swap = rng.random(length) < settings.drawn_share
            self.order[swap] = rng.choice(drawn, int(swap.sum()))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        at = self.order[i]
        return {"image": self.views.images[at], "label": int(self.views.labels[at])}
