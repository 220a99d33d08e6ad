"""The radiologist's report on a drawn chest, from the numbers that drew it.

A report affirms only what was drawn, and denies a part of what was not.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.chest_findings import ChestPatient

_NONE: frozenset[str] = frozenset()


@lru_cache(maxsize=1)
def phrases() -> dict[str, Any]:
    """The sentences of ``chest_reports.yml``."""
    import yaml

    path = Path(__file__).with_name("chest_reports.yml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _words(name: str, patient: ChestPatient) -> dict[str, str]:
    """What the gaps of a finding's sentences are filled with."""
    drawn, text = patient.findings[name], phrases()
    degree = text["degrees"][min(2, int(3 * drawn.severity))]
    side = "both" if drawn.side == "bilateral" else f"the {drawn.side}"
    lungs = "both lungs" if drawn.side == "bilateral" else f"{side} lung"
    kind = text["devices"].get(drawn.detail, "")
    return {
        "degree": degree, "Degree": degree.capitalize(), "mm": f"{drawn.size_mm:.0f}",
        "cm": f"{drawn.size_mm / 10:.1f}", "side": drawn.side, "lungs": lungs,
        "where": f"the {drawn.lobe}" if drawn.lobe else lungs, "kind": kind,
        "Kind": kind[:1].upper() + kind[1:], "ratio": f"{patient.facts['ratio']:.2f}",
        "Side": drawn.side.capitalize(),
    }  # fmt: skip


def sentences(
    patient: ChestPatient, rng: np.random.Generator, withheld: frozenset[str] = _NONE
) -> list[tuple[str, str | None, bool]]:
    """Sentences of the findings section, in the order of the report.

    Parameters
    ----------
    withheld : findings that are never named, present or not.

    Returns
    -------
    list of (text, finding or None for normal anatomy, whether it affirms the finding)
    """
    text, found = phrases(), []
    silent = rng.uniform(0.25, 0.6)  # how much of what is absent nobody mentions
    for name, words in text["findings"].items():
        if name in withheld:
            continue
        if name in patient.findings:
            sentence = _pick(rng, words["present"]).format(**_words(name, patient))
            found.append((sentence, name, True))
        elif rng.random() > silent:
            found.append((_pick(rng, words["absent"]), name, False))
    for options in text["normal"]:
        if rng.random() < 0.6:
            found.append((_pick(rng, options), None, False))
    return [found[k] for k in rng.permutation(len(found))]


def report(
    patient: ChestPatient, rng: np.random.Generator, withheld: frozenset[str] = _NONE
) -> dict[str, str]:
    """The four sections of a report, named as CT-RATE's columns.

    The impression repeats what is present, in other words, the severest first.
    """
    text, said = phrases(), sentences(patient, rng, withheld)
    present = [name for name in patient.findings if name not in withheld]
    present.sort(key=lambda n: -patient.findings[n].severity)
    short = [
        _pick(rng, text["findings"][n]["short"]).format(**_words(n, patient))
        for n in present
    ]
    contrast = text["technique"]["contrast" if patient.facts["contrast"] else "native"]
    return {
        "ClinicalInformation_EN": _pick(rng, text["clinical"]),
        "Technique_EN": _pick(rng, contrast),
        "Findings_EN": " ".join(sentence for sentence, _, _ in said),
        "Impressions_EN": " ".join(short) or _pick(rng, text["nothing"]),
    }
