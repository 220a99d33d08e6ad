"""Splits by patient: seeded, disjoint, saved. And the published one, by slice.

Neighbouring slices of one patient are almost the same picture. A split over slices puts
such pairs on both sides, and the score on the "unseen" side then flatters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from medtut.data.cache import digest
from medtut.errors import MedtutError
from medtut.files import write_json

PARTS = ("train", "validation", "test")


class SplitError(MedtutError):
    """A split that cannot be made, shares a case, or is not the one saved."""


@dataclass(frozen=True)
class Split:
    """Case ids of three parts that share none, and how they were drawn."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    fractions: tuple[float, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for one, other in combinations(PARTS, 2):
            if shared := sorted(set(getattr(self, one)) & set(getattr(self, other))):
                raise SplitError(
                    f"{len(shared)} ids are in {one} and in {other} "
                    f"({', '.join(shared[:5])}): each may stand in one part only."
                )


def split_cases(
    ids: Iterable[str],
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    patient_of: Callable[[str], str] = str,
) -> Split:
    """Draw train, validation and test patients.

    Parameters
    ----------
    ids : iterable of str
        Cases; their order does not matter.
    fractions : three numbers that sum to 1
        Of the patients. A part with a fraction above 0 gets at least one.
    seed : int
    patient_of : callable
        From a case id to the patient, where one has several studies: they stay
        together. By default every case is a patient.

    Raises
    ------
    SplitError
        Doubled ids, wrong fractions, or fewer patients than parts.
    """
    ids = sorted(ids)
    share = np.asarray(fractions, dtype=float)
    patients = sorted({patient_of(i) for i in ids})
    least, n = share > 0, len(patients)
    wrong = share.shape != (3,) or (share < 0).any() or abs(share.sum() - 1) > 1e-6
    if wrong or len(set(ids)) < len(ids) or n < least.sum():
        raise SplitError(
            f"Cannot split {len(set(ids))} different ids ({len(ids)} given, {n} "
            f"patients) by {fractions}: every id must be there once, the three "
            "fractions sum to 1, and each part get a patient."
        )
    first = np.clip(round(share[0] * n), least[0], n - least[1:].sum())
    second = np.clip(round(share[:2].sum() * n), first + least[1], n - least[2])
    order = np.random.default_rng(seed).permutation(n)
    groups = [{patients[i] for i in p} for p in np.split(order, [first, second])]
    parts = [tuple(i for i in ids if patient_of(i) in group) for group in groups]
    return Split(*parts, tuple(share.tolist()), int(seed))


def save_split(path: Path | str, split: Split) -> Path:
    """Write a split as JSON with seed, fractions, ids and a digest, by rename.

    Raises
    ------
    SplitError
        If another split is there already: a split is made once.
    """
    path = Path(path)
    if path.exists() and load_split(path) != split:
        raise SplitError(
            f"{path} holds another split, and results were perhaps made with it. Save "
            "this one under another name, or delete that file yourself."
        )
    return write_json(path, asdict(split) | {"digest": digest("split", asdict(split))})


def load_split(path: Path | str, ids: Iterable[str] | None = None) -> Split:
    """Read a saved split.

    Parameters
    ----------
    path : path
    ids : iterable of str, optional
        The cases there are now. If the split knows others, or not all of them, it is
        refused: a case added later changes nothing in silence.

    Raises
    ------
    SplitError
        No such file, damaged, edited, or made for other cases.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("digest") != digest("split", content):
            raise ValueError("it was changed after it was saved: its digest differs")
        lists = {k: tuple(v) for k, v in content.items() if isinstance(v, list)}
        split = Split(**{**content, **lists})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SplitError(
            f"{path} is no split as save_split wrote it: {error!r}. Take it from your "
            "version control, or delete it and draw again with the same seed."
        ) from error
    known = {*split.train, *split.validation, *split.test}
    now = known if ids is None else set(ids)
    if now != known:
        raise SplitError(
            f"{path} was made for other cases: {len(now - known)} are new, "
            f"{len(known - now)} are gone ({', '.join(sorted(now ^ known)[:5])}). Load "
            "it without ids to keep to its own, or draw a split under another name."
        )
    return split


def split_slices(
    index: Sized | int, fraction: float = 0.9, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split over slices, as the published code does; for the autopsy only.

    It draws ``int(fraction · n)`` slices at random for training and takes the rest for
    validation, so most patients are on both sides. The source sets no seed.

    Parameters
    ----------
    index : sequence or int
        The slices, for example a `SliceDataset`, or their number.

    Returns
    -------
    (n_train,), (n_rest,) int64
        Positions in ``index``.
    """
    count = index if isinstance(index, int) else len(index)
    order = np.random.default_rng(seed).permutation(count)
    return order[: int(fraction * count)], order[int(fraction * count) :]
