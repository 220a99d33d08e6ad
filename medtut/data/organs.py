"""Names of structures in abdominal CT, and the label maps of the sets that hold them.

Names are those of TotalSegmentator v2, so that a folder of one file per organ needs no
table; where it has no such structure the name is in its style. Its classes moved
between versions: v1 (104 classes, the one the published few-shot lists were made from)
has five heart chambers, v2's task ``total`` (117 classes) has only ``heart``. Novel
heart structures therefore need the first data set, or the task
``heartchambers_highres``.

The tables stand in ``organs.yml``. Sources: upstream FSEFT
``pretrain/datasets/templates.py:3-7`` (order of the template) and ``:61-62`` (FLARE22),
``fseft/datasets/configs.py:51-52`` (base organs); TotalSegmentator
``map_to_binary.py`` (``total_v1``, ``total``, ``heartchambers_highres``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from medtut.errors import MedtutError


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


_TABLES, _MESSAGES = _read("organs.yml"), _read("organ_messages.yml")
STRUCTURES = tuple(_TABLES["structures"])
"""The 29 structures of the pretraining template; upstream counts them from 1."""
BASE = tuple(_TABLES["base"])
"""The 9 organs of the adaptation experiments that the pretraining has seen."""
HEART, LUNG, GLUTEUS = (tuple(_TABLES[key]) for key in ("heart", "lung", "gluteus"))
NOVEL = HEART + LUNG + GLUTEUS
"""The 16 structures that no pretraining label names (5 heart, 5 lung, 6 gluteal)."""
UPSTREAM: dict[str, str] = _TABLES["upstream"]
"""Upstream's word for a structure, where it differs from ours."""
UNIONS = {name: tuple(parts) for name, parts in _TABLES["unions"].items()}
"""Structures that a set may hold in parts only: annotated where every part is."""
LABEL_MAPS: dict[str, dict[str, int]] = _TABLES["label_maps"]
"""Structure -> id in a multi-label file, by the kind of file (see `HIGHEST`)."""
TOTALSEG_V2, TOTALSEG_V1 = LABEL_MAPS["totalseg_v2"], LABEL_MAPS["totalseg_v1"]
FLARE22 = LABEL_MAPS["flare22"]
HIGHEST: dict[str, int] = _TABLES["highest"]
"""Highest id that each kind of file may hold; more means that it is another kind."""


class OrganError(MedtutError):
    """A labelled abdominal CT, a protocol or a prediction is not as it should be."""


def fault(key: str, /, **facts: Any) -> OrganError:
    """Return the error of ``organ_messages.yml`` called ``key``, to be raised."""
    return OrganError(_MESSAGES[key].format(**facts))
