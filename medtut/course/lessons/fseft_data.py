"""Lesson 06: patients of the target and source hospitals, on the network's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from medtut.data.abdomen_anatomy import DRAWN, recipe
from medtut.data.organs import BASE, NOVEL, STRUCTURES

if TYPE_CHECKING:
    from medtut.data.totalseg import OrganCase

# Numbers of the first patient, so that no two parts share a person.
FIRST = {"pool": 0, "test": 2000, "tuning": 3000, "source": 4000, "source_test": 5000}
HELD = 4  # of the tuning patients, to choose rates by


@dataclass(frozen=True, eq=False)
class Patient:
    """A volume on the network's grid, and the whole truth on that of its file.

    Attributes
    ----------
    case : OrganCase
    truth : (x, y, z) uint8, 1 + the place in ``case.structures``; 0 is none of them.
    """

    case: OrganCase
    truth: np.ndarray

    def masks(self, names: Sequence[str]) -> np.ndarray:
        """Truth (S, x, y, z) bool of these structures."""
        places = [self.case.structures.index(n) for n in names]
        return np.stack([self.truth == 1 + i for i in places])


def _numbered(masks: np.ndarray) -> np.ndarray:
    """One number a voxel; structures do not overlap, so nothing is lost."""
    numbers = np.arange(1, 1 + len(masks), dtype=np.uint8)
    return (masks * numbers[:, None, None, None]).max(0)


def load_patients(
    spec: Any, grid: Grid, structures: Sequence[str], partial: bool = False
) -> list[Patient]:
    """Patients of an `AbdomenSpec`, drawn once, read by the reader of the real set.

    Parameters
    ----------
    partial : bool
        Take structures that the hospital does not outline as not annotated.
    """
    from medtut.data.abdomen_cohort import abdomen_folder
    from medtut.data.cache import cached_arrays
    from medtut.data.organ_records import find_cases
    from medtut.data.totalseg import OrganCase, load_case, read_labels

    records = find_cases(abdomen_folder(spec, progress=True))
    structures = tuple(structures)

    def read() -> dict[str, np.ndarray]:
        found = {}
        for r in records:
            case = load_case(r, structures, grid.spacing, roi=grid.roi, partial=partial)
            truth = read_labels(r, structures, partial)
            parts = (
                case.image.astype(np.float16), _numbered(case.labels), _numbered(truth),
                case.annotated, case.affine, case.original[0],
            )  # fmt: skip
            found |= {f"{r.id} {n}": part for n, part in enumerate(parts)}
        return found

    key = {"spec": repr(spec), "recipe": recipe()["version"], "version": 1,
           "spacing": grid.spacing, "roi": grid.roi,
           "structures": structures, "partial": partial}  # fmt: skip
    got, people = cached_arrays("organ_patients", key, read), []
    for r in records:
        image, index, truth, annotated, affine, original = (
            got[f"{r.id} {n}"] for n in range(6)
        )
        labels = np.stack([index == n + 1 for n in range(len(structures))])
        case = OrganCase(
            r, structures, image.astype(np.float32), labels.astype(np.uint8),
            annotated, (), affine, (original, truth.shape),
        )  # fmt: skip
        people.append(Patient(case, truth))
    return people


def target_patients(part: str, settings: Any) -> list[Patient]:
    """Patients of the target hospital: "pool", "test" or "tuning".

    All are scanned from the hips to the shoulders, so that every structure is there,
    but for a gallbladder that was taken out.
    """
    counts = {"pool": settings.pool, "test": settings.test}
    count = counts.get(part, max(settings.shots[1:2] or settings.shots) + HELD)
    return _target(part, count, Grid(settings.spacing, settings.roi))


def source_patients(part: str, settings: Any) -> tuple[Patient, ...]:
    """Patients of the three sources: "source", as outlined there, or "source_test"."""
    count = settings.source if part == "source" else HELD
    return _source(part, count, Grid(settings.spacing, settings.roi))


class Grid(NamedTuple):
    """What patients depend on, of all settings: mm, and voxels of a region."""

    spacing: float
    roi: tuple[int, int, int]


@lru_cache(maxsize=8)
def _target(part: str, count: int, grid: Grid) -> list[Patient]:
    from medtut.data.abdomen_cohort import AbdomenSpec

    spec = AbdomenSpec("target", count, FIRST[part], field="trunk")
    return load_patients(spec, grid, BASE + NOVEL)


@lru_cache(maxsize=2)
def _source(part: str, count: int, grid: Grid) -> tuple[Patient, ...]:
    from medtut.data.abdomen_cohort import AbdomenSpec, source_hospitals

    found: list[Patient] = []
    more: dict[str, Any] = {} if part == "source" else {"annotated": DRAWN}
    for name in source_hospitals():
        spec = AbdomenSpec(name, count, FIRST[part], **more)
        found += load_patients(spec, grid, STRUCTURES, partial=True)
    return tuple(found)
