"""Check a BraTS-MEN 2023 folder, write its passport, its crop and a split by patient.

The set is not redistributed here. Get it yourself:

1. Make an account at Synapse, join the BraTS 2023 challenge and accept its terms (free,
   for research): https://www.synapse.org/brats2023
2. Download the training data of the meningioma task there, in the browser or with the
   Synapse client. The client finds your token in the variable SYNAPSE_AUTH_TOKEN: keep
   it there, never in a file that may be published.
3. Unpack it and run: python data_scripts/brats_men.py FOLDER
   where FOLDER holds BraTS-MEN-00000-000 and so on.

Whoever publishes results on it cites: LaBella et al., arXiv:2305.07642 (the challenge);
LaBella et al., Scientific Data 11, 2024, 496 (the data); LaBella et al.,
arXiv:2405.09787 (its results).

Leaves with 0 if the folder is the published set, with 1 if it can be read but differs
from it (it says how), and with 2 if a file is bad or the folder is not of this kind.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import brats2020
from brats2020 import command, defects, facts_of, hand_over, look_at_all, other_set

from medtut.data.brats import Case, load_case, split_cases
from medtut.data.brats_men import (
    MEN,
    PUBLISHED_CROP,
    cut_off,
    find_men_cases,
    patient_of,
    union_box,
)

CASES, SHAPE = 1000, (240, 240, 155)
CLASSES = ("background", "non-enhancing core", "oedema", "enhancing tumour")
ABOUT = {
    "name": "BraTS-MEN 2023 training",
    "source": "https://www.synapse.org/brats2023",
    "terms": "register with Synapse; research use; cite the papers",
}


def look(case: Case) -> dict:
    """Read one case and return what the passport says of it."""
    volume = load_case(case, MEN)
    tumour = volume.label > 0
    brain = (volume.image != 0).any(0)
    return {
        **facts_of(case, volume, MEN),
        "patient": patient_of(case.id),
        "tumour_outside_brain": int((tumour & ~brain).sum()),
    }


def passport(cases: list[Case], facts: list[dict], root: Path, hashes: bool) -> dict:
    """Gather what was seen; see the module's text for source and citation."""
    return {
        **brats2020.passport(cases, facts, root, hashes, ABOUT, CLASSES),
        "patients": len({f["patient"] for f in facts}),
        "crop": {
            "derived": union_box(cases),
            "published": PUBLISHED_CROP,
            "tumour_voxels_lost_by_published": cut_off(cases),
        },
    }


def size(region: list | tuple) -> str:
    """Write the sides of a crop, such as 138 x 202 x 138."""
    return " x ".join(str(high - low) for low, high in region)


def differences(card: dict) -> list[str]:
    """How the folder differs from the published training set, in words."""
    return other_set(card, CASES, SHAPE) + defects(card)


def report(card: dict) -> str:
    """What a person wants to know at once."""
    total, kept, both = card["slices"], card["slices_with_tumour"], card["crop"]
    lost = both["tumour_voxels_lost_by_published"]
    same = tuple(both["derived"]) == tuple(both["published"])
    outside = sum(f["tumour_outside_brain"] > 0 for f in card["per_case"])
    lines = [
        f"{card['cases']} cases of {card['patients']} patients, "
        f"{card['bytes'] / 1e9:.1f} GB",
        f"{total:,} slices, {kept:,} of them with tumour ({kept / total:.1%})",
        *(f"  {name}: {n:,} voxels" for name, n in card["label_voxels"].items()),
        f"the box that holds all brains and tumours is {both['derived']}, "
        f"{size(both['derived'])}; the published crop is {size(both['published'])}"
        + (": the same" if same else f", {both['published']}: another"),
        f"the published crop loses {sum(lost.values()):,} voxels of tumour in "
        f"{len(lost)} cases",
        f"{outside} cases have tumour where all four images are 0",
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Check the folder; see the module's text for the exit codes."""
    cases = find_men_cases(args.folder)
    facts = look_at_all(cases, look)
    card = passport(cases, facts, args.folder, args.hash)
    split = split_cases((f["id"] for f in facts), seed=args.seed, patient_of=patient_of)
    return hand_over(args, card, split, report(card), differences(card))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    return command(argv, __doc__, "brats_men", run)


if __name__ == "__main__":
    sys.exit(main())
