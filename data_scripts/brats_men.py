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

import numpy as np
from brats2020 import QUANTILES, near_duplicates, thumbnail

from medtut.data.brats import Case, load_case, save_split, split_cases
from medtut.data.brats_men import (
    MEN,
    PUBLISHED_CROP,
    cut_off,
    find_men_cases,
    patient_of,
    union_box,
)
from medtut.data.download import sha256_of
from medtut.errors import MedtutError
from medtut.files import write_json

CASES, SHAPE = 1000, (240, 240, 155)
CLASSES = ("background", "non-enhancing core", "oedema", "enhancing tumour")


def look(case: Case) -> dict:
    """Read one case and return what the passport says of it."""
    volume = load_case(case, MEN)
    tumour = volume.label > 0
    brain = (volume.image != 0).any(0)
    return {
        "id": case.id,
        "patient": patient_of(case.id),
        "shape": list(tumour.shape),
        "spacing_mm": [round(s, 4) for s in volume.spacing],
        "voxels": np.bincount(volume.label.ravel(), minlength=4).tolist(),
        "tumour_outside_brain": int((tumour & ~brain).sum()),
        "tumour_slices": int(tumour.any((0, 1)).sum()),
        "quantiles": {
            name: np.quantile(image[image != 0], QUANTILES).round(2).tolist()
            for name, image in zip(MEN, volume.image, strict=True)
        },
        "thumbnail": thumbnail(volume.image[0]),
    }


def passport(cases: list[Case], facts: list[dict], root: Path, hashes: bool) -> dict:
    """Gather what was seen; see the module's text for source and citation."""
    files = [p for c in cases for p in (*c.images.values(), c.mask)]
    voxels = np.sum([f["voxels"] for f in facts], axis=0)
    medians = {
        m: np.median([f["quantiles"][m] for f in facts], axis=0).tolist() for m in MEN
    }
    lost = cut_off(cases)
    return {
        "name": "BraTS-MEN 2023 training",
        "source": "https://www.synapse.org/brats2023",
        "terms": "register with Synapse; research use; cite the papers",
        "cases": len(facts),
        "patients": len({f["patient"] for f in facts}),
        "bytes": sum(p.stat().st_size for p in files),
        "slices": sum(f["shape"][2] for f in facts),
        "slices_with_tumour": sum(f["tumour_slices"] for f in facts),
        "label_voxels": dict(zip(CLASSES, voxels.tolist(), strict=True)),
        "crop": {
            "derived": union_box(cases),
            "published": PUBLISHED_CROP,
            "tumour_voxels_lost_by_published": lost,
        },
        "intensity_quantiles": {
            "at": QUANTILES,
            "of": "voxels that are not 0; the median over cases",
            **medians,
        },
        "all_zero_images": 0,  # the reader refuses them
        "near_duplicates": near_duplicates(facts),
        "per_case": [
            {k: v for k, v in f.items() if k != "thumbnail"} for f in facts
        ],
        "files": {
            p.relative_to(root).as_posix(): {
                "bytes": p.stat().st_size,
                **({"sha256": sha256_of(p)} if hashes else {}),
            }
            for p in files
        },
    }  # fmt: skip


def size(region: list | tuple) -> str:
    """Write the sides of a crop, such as 138 x 202 x 138."""
    return " x ".join(str(high - low) for low, high in region)


def differences(card: dict) -> list[str]:
    """How the folder differs from the published training set, in words."""
    odd = [f["id"] for f in card["per_case"] if tuple(f["shape"]) != SHAPE]
    empty = [f["id"] for f in card["per_case"] if not f["tumour_slices"]]
    said = []
    if card["cases"] != CASES:
        said.append(f"{card['cases']} cases, the published set has {CASES}")
    if odd:
        said.append(f"{len(odd)} cases are not {SHAPE}: {', '.join(odd[:5])}")
    if empty:
        said.append(f"{len(empty)} cases have an empty mask: {', '.join(empty[:5])}")
    if card["near_duplicates"]:
        said.append(f"near-duplicate cases: {card['near_duplicates'][:5]}")
    return said


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
    from tqdm.auto import tqdm

    cases = find_men_cases(args.folder)
    facts, bad = [], []
    for case in tqdm(cases, "reading", delay=3, unit="case"):
        try:
            facts.append(look(case))
        except MedtutError as error:  # go on: all bad files are named in one run
            bad.append(str(error))
    if bad:
        raise MedtutError(f"{len(bad)} of {len(cases)} cases:\n" + "\n".join(bad))
    card = passport(cases, facts, args.folder, args.hash)
    split = split_cases((f["id"] for f in facts), seed=args.seed, patient_of=patient_of)
    write_json(args.out / "passport.json", card)
    save_split(args.out / "split.json", split)
    print(report(card))
    print(
        f"{args.out / 'passport.json'} and split.json: {len(split.train)} train, "
        f"{len(split.validation)} validation, {len(split.test)} test (seed {args.seed})"
    )
    said = differences(card)
    print(
        "".join(f"DIFFERENT: {line}\n" for line in said)
        or "this is the published set\n",
        end="",
    )
    return int(bool(said))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the training part, unpacked")
    parser.add_argument(
        "--out", type=Path, default=Path("brats_men"), help="default: %(default)s"
    )
    parser.add_argument("--hash", action="store_true", help="sha256 of every file too")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (MedtutError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
