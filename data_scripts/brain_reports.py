"""Reports of brain slices, written from what is in them.

A sentence is generated from the label map of a slice, so it is true by construction,
with synonyms, and it says what is absent as well as what is present. MedCLIP (Wang et
al., EMNLP 2022, arXiv:2210.10163) compares a picture and a report by the medical
entities both name; `entities` is that list as a vector.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medtut.errors import MedtutError

if TYPE_CHECKING:
    from numpy.random import Generator


@lru_cache(maxsize=1)
def phrases() -> dict[str, dict[str, list[str]]]:
    """What every field of `SliceFacts` can be, and how a report may put it."""
    import yaml

    path = Path(__file__).with_name("brain_reports.yml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def entity_names() -> tuple[tuple[str, str], ...]:
    """(field, value) of every entry of `entities`."""
    return tuple((f, value) for f, said in phrases().items() for value in said)


@dataclass(frozen=True)
class SliceFacts:
    """What a report says; a field is "" where there is nothing to say.

    The values are the keys of `phrases`. Without a tumour (``kind`` "none") the fields
    after it are "".
    """

    contrast: str
    level: str
    kind: str
    side: str = ""
    region: str = ""
    size: str = ""
    necrosis: str = ""
    solid: str = ""
    oedema: str = ""


def slice_facts(
    label: np.ndarray,
    contrast: str,
    kind: str,
    height: float | None = None,
    mm: float = 240 / 224,
) -> SliceFacts:
    """Read a label slice.

    Parameters
    ----------
    label : (H, W) int, 0 background, 1 necrosis, 2 oedema, 3 enhancing tumour
        Anterior up, the patient's left on the left.
    contrast : {"flair", "t1", "t1ce", "t2"}
        Enhancement is only reported after contrast agent.
    kind : {"glioma", "meningioma", "pituitary", "none"}
        Of the patient; a slice without label is reported as without tumour.
    height : float, optional
        Place of the slice in the volume, 0 lowest to 1 highest.
    mm : float
        Side of a pixel.

    Raises
    ------
    MedtutError
        Unknown contrast or kind, another shape, or other labels.
    """
    label = np.asarray(label)
    said = phrases()
    if contrast not in said["contrast"] or kind not in said["kind"]:
        raise MedtutError(
            f"slice_facts: no report for {contrast!r} and {kind!r}; there are "
            f"{', '.join(said['contrast'])} and {', '.join(said['kind'])}."
        )
    if label.ndim != 2 or not np.isin(label, (0, 1, 2, 3)).all():
        raise MedtutError(
            "slice_facts: a label slice is (H, W) with values 0 to 3, not "
            f"{label.shape} with {np.unique(label)[:6]}."
        )
    level = "" if height is None else _bin(height, 0.4, 0.62, "level")
    # The tumour proper says where it is; oedema only where there is nothing else.
    extent = np.argwhere(np.isin(label, (1, 3)))
    extent = extent if len(extent) else np.argwhere(label)
    if not len(extent) or kind == "none":
        return SliceFacts(contrast, level, "none")
    row, column = extent.mean(0) / label.shape
    necrotic, oedema, solid = (float((label == c).sum() * mm**2) for c in (1, 2, 3))
    diameter = 2 * (max(necrotic + solid, 1) / np.pi) ** 0.5
    return SliceFacts(
        contrast,
        level,
        kind,
        side="left" if column < 0.47 else "right" if column > 0.53 else "midline",
        region=_bin(row, 0.42, 0.58, "region"),
        size=_bin(diameter, 20, 40, "size"),
        necrosis="yes" if necrotic > 10 else "no",
        solid="no" if solid < 10 else "enhancing" if contrast == "t1ce" else "yes",
        oedema="no" if oedema < 25 else "mild" if oedema < 400 else "marked",
    )


def _bin(value: float, low: float, high: float, field: str) -> str:
    return list(phrases()[field])[int(value >= low) + int(value >= high)]


def write_report(facts: SliceFacts, rng: Generator) -> str:
    """Put facts into words: synonyms and the order of the findings are drawn."""
    ways = [phrases()[f][value] for f, value in asdict(facts).items() if value]
    said = [way[int(rng.integers(len(way)))] for way in ways]
    opening = 2 if facts.level else 1
    rest = said[opening:]
    return ", ".join([*said[:opening], *(rest[i] for i in rng.permutation(len(rest)))])


def slice_report(
    label: np.ndarray,
    contrast: str,
    kind: str,
    rng: Generator,
    height: float | None = None,
) -> str:
    """Report of one slice; see `slice_facts` for the arguments.

    Returns
    -------
    str
        Lower case, findings separated by commas. The same rng state gives the same
        words.
    """
    return write_report(slice_facts(label, contrast, kind, height), rng)


def entities(facts: SliceFacts) -> np.ndarray:
    """What is named, present or absent, as a vector of 0 and 1 along `entity_names`."""
    named = [getattr(facts, field) == value for field, value in entity_names()]
    return np.array(named, np.float32)
