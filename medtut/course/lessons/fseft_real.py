"""Lesson 06 on a real CT: as the network finds it, and adapted from a few slices."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.course.lessons import fseft
from medtut.data.organs import BASE, STRUCTURES
from medtut.errors import MedtutError

if TYPE_CHECKING:
    from medtut.data.organ_records import Record
    from medtut.data.totalseg import OrganCase

EVERY = 5  # one slice of the network's grid in so many is labelled


@dataclass(frozen=True, eq=False)
class RealCT:
    """One real patient.

    Attributes
    ----------
    case : OrganCase
    structures : base organs that are labelled and not empty; () without labels.
    """

    case: OrganCase
    structures: tuple[str, ...]


def read_real(settings: Any) -> RealCT:
    """The first case of ``data``, or the chest CT of the course, which has no labels.

    Raises
    ------
    AssetUnavailable
        Without a network, when the chest CT was not fetched before.
    OrganError
        The folder has no case, or its labels belong to another volume.
    """
    from medtut.data.assets import fetch
    from medtut.data.organ_records import Record, find_cases
    from medtut.data.totalseg import load_case

    if settings.data is None:
        record: Record = Record("slicerio-chest", fetch("slicerio-chest")["image"])
    else:
        record = find_cases(settings.data)[0]
    have = tuple(n for n in BASE if n in record.annotated)
    case = load_case(record, have, settings.spacing, roi=settings.roi)
    return RealCT(case, tuple(n for n in have if n not in case.empty))


def labelled_slices(case: OrganCase) -> np.ndarray:
    """Places of every fifth axial slice (Z,) bool; of the padding none."""
    there = case.image[0].any((0, 1))
    first = int(there.argmax()) + EVERY // 2
    chosen = np.zeros(len(there), bool)
    chosen[first::EVERY] = True
    return chosen & there


def zero_shot(case: OrganCase, settings: Any) -> np.ndarray:
    """Probabilities (9, X, Y, Z) of the base organs by the network as it is."""
    model, _ = fseft.start("base", "zero_shot", 0, settings)
    person = fseft.Patient(case, np.zeros(case.original[1], np.uint8))
    return fseft.probabilities(model, "base", "zero_shot", [person], settings)[0]


def adapt_to_slices(
    real: RealCT, settings: Any, seed: int = 0, steps: int = 100, rate: float = 3e-3
) -> np.ndarray:
    """Probabilities after a spatial adapter has learned from the labelled slices.

    The frozen features of the volume are computed once; the loss looks at the labelled
    slices alone, though the adapter's neighbourhood reaches two voxels beyond.

    Raises
    ------
    MedtutError
        Without labels, or when the labelled slices show no organ.
    """
    import torch

    from medtut.adapters import adapt
    from medtut.models.partial_loss import PartialDice

    case, names = real.case, real.structures
    chosen = labelled_slices(case)
    places = [case.structures.index(n) for n in names]
    target = torch.from_numpy(case.labels[places][..., chosen].astype("f4"))[None]
    if not target.any():
        raise MedtutError(
            f"{case.record.image}: no base organ in its labelled slices, so there is "
            "nothing to learn from. Give a CT of the abdomen with labels."
        )
    model = copy.deepcopy(fseft.pretrained(fseft.weights_file(settings)))
    rows = [STRUCTURES.index(n) for n in names]
    done = adapt(model, "spatial", structure=rows, seed=seed)
    person = fseft.Patient(case, np.zeros(case.original[1], np.uint8))
    maps = np.array(fseft.features_of([person], settings)[0], np.float32)
    x, loss = torch.from_numpy(maps)[None], PartialDice(balance=fseft.BALANCE)
    known = torch.ones(1, len(names), dtype=torch.bool)
    optimizer = torch.optim.AdamW(done.parameters(model), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model.classifier(x)[..., chosen], target, known).backward()
        optimizer.step()
    with torch.inference_mode():
        return model.classifier(x)[0].sigmoid().numpy()


def scores(
    real: RealCT, probability: np.ndarray, rest: bool = True
) -> dict[str, float]:
    """Dice in the space of the file, of every structure that is in its truth.

    Parameters
    ----------
    rest : bool
        Leave out what lies in the labelled slices.
    """
    from medtut.data.totalseg import read_labels, to_original
    from medtut.evaluate.organs import dice

    case, names = real.case, real.structures
    found = to_original(probability, case) > 0.5
    truth = read_labels(case.record, names).astype(bool)
    if rest:
        seen = np.zeros(case.image.shape[1:], np.uint8)
        seen[..., labelled_slices(case)] = 1
        keep = to_original(seen, case) == 0
        found, truth = found & keep, truth & keep
    values = dice(found, truth)
    there = truth.any((1, 2, 3))
    return {n: float(v) for n, v, t in zip(names, values, there, strict=True) if t}


def volume_viewer(record: Record, masks: np.ndarray, folder: Path) -> Any:
    """Show a CT with found organs (S, x, y, z) in niivue, in three dimensions.

    They are written as ``<case>-found.nii.gz`` on the grid of the file, numbered.
    """
    import nibabel
    from ipyniivue import NiiVue

    from medtut.data.cache import write_by_rename
    from medtut.data.ct_volume import load_image

    source = load_image(record.image)  # NRRD, as the chest CT of the course is, too
    numbers = np.arange(1, 1 + len(masks), dtype=np.uint8)[:, None, None, None]
    image = nibabel.Nifti1Image((masks * numbers).max(0), source.affine)
    path = folder / f"{record.id}-found.nii.gz"
    write_by_rename(path, lambda p: nibabel.save(image, p))
    viewer = NiiVue()
    mask = {"path": str(path), "colormap": "warm", "opacity": 0.5}
    viewer.load_volumes([{"path": str(record.image)}, mask])
    return viewer
