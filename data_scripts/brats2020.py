"""Check a BraTS 2020 folder, write its passport and a split by patient.

The set is not redistributed here. Get it yourself:

1. Register with the organisers and accept their terms (free, for research):
   https://www.med.upenn.edu/cbica/brats2020/registration.html
2. Download, from them or the copy on Kaggle (needs an account; read the licence stated
   on its page too): https://www.kaggle.com/datasets/awsaf49/brats20-dataset-training-validation
   with the Kaggle client: kaggle datasets download awsaf49/brats20-dataset-training-validation
3. Unpack it and run: python data_scripts/brats2020.py FOLDER
   where FOLDER is BraTS2020_TrainingData or MICCAI_BraTS2020_TrainingData.

Whoever publishes results on it cites: Menze et al., IEEE TMI 34(10), 2015, 1993-2024;
Bakas et al., Scientific Data 4, 2017, 170117; Bakas et al., arXiv:1811.02629.

Leaves with 0 if the folder is the published set, with 1 if it can be read but differs
from it (it says how), and with 2 if a file is bad or the folder is not of this kind.
"""  # noqa: E501

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.brats import (
    MODALITIES,
    Case,
    Volume,
    find_cases,
    load_case,
    save_split,
    split_cases,
)
from medtut.data.download import sha256_of
from medtut.data.splits import Split
from medtut.errors import MedtutError
from medtut.files import write_json

CASES, SHAPE = 369, (240, 240, 155)
KEPT_BY_SOURCE = 24_354  # slices with tumour, as the published code reports
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
CLASSES = ("background", "necrotic core", "oedema", "enhancing tumour")
ABOUT = {
    "name": "BraTS 2020 training",
    "source": "https://www.med.upenn.edu/cbica/brats2020/data.html",
    "terms": "register with the organisers; research use; cite the three papers",
}
NEAR = 0.995  # correlation of two thumbnails from which they are called the same


def thumbnail(image: np.ndarray, side: int = 24) -> np.ndarray:
    """Reduce a volume to standardised (side³,) values, by its nearest voxels."""
    picks = [
        np.linspace(0, n - 1, min(side, n)).round().astype(int) for n in image.shape
    ]
    values = image[np.ix_(*picks)].astype(np.float64).ravel()
    values -= values.mean()
    return values / (np.linalg.norm(values) or 1)


def facts_of(case: Case, volume: Volume, names: tuple[str, ...]) -> dict:
    """What a passport says of one case of any BraTS set."""
    return {
        "id": case.id,
        "shape": list(volume.label.shape),
        "spacing_mm": [round(s, 4) for s in volume.spacing],
        "voxels": np.bincount(volume.label.ravel(), minlength=4).tolist(),
        "tumour_slices": int(volume.label.any((0, 1)).sum()),
        "quantiles": {
            name: np.quantile(image[image != 0], QUANTILES).round(2).tolist()
            for name, image in zip(names, volume.image, strict=True)
        },
        "thumbnail": thumbnail(volume.image[0]),
    }


def look(case: Case) -> dict:
    """Read one case and return what the passport says of it."""
    facts = facts_of(case, load_case(case, MODALITIES), MODALITIES)
    return {**facts, "mask": case.mask.name}


def near_duplicates(facts: list[dict]) -> list[list[str]]:
    """Pairs of cases whose thumbnails of the first image correlate above `NEAR`."""
    pairs = []
    for i, one in enumerate(facts):
        for other in facts[:i]:
            same = one["shape"] == other["shape"]
            if same and float(one["thumbnail"] @ other["thumbnail"]) > NEAR:
                pairs.append([other["id"], one["id"]])
    return pairs


def passport(
    cases: list[Case],
    facts: list[dict],
    root: Path,
    hashes: bool,
    about: dict = ABOUT,
    classes: tuple[str, ...] = CLASSES,
) -> dict:
    """Gather what was seen; see the module's text for source and citation."""
    files = [p for c in cases for p in (*c.images.values(), c.mask)]
    voxels = np.sum([f["voxels"] for f in facts], axis=0)
    medians = {
        name: np.median([f["quantiles"][name] for f in facts], axis=0).tolist()
        for name in facts[0]["quantiles"]
    }
    return {
        **about,
        "cases": len(facts),
        "bytes": sum(p.stat().st_size for p in files),
        "slices": sum(f["shape"][2] for f in facts),
        "slices_with_tumour": sum(f["tumour_slices"] for f in facts),
        "label_voxels": dict(zip(classes, voxels.tolist(), strict=True)),
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


def other_set(card: dict, count: int, shape: tuple[int, ...]) -> list[str]:
    """How number and sizes of the cases differ from a published set, in words."""
    odd = [f["id"] for f in card["per_case"] if tuple(f["shape"]) != shape]
    said = []
    if card["cases"] != count:
        said.append(f"{card['cases']} cases, the published set has {count}")
    if odd:
        said.append(f"{len(odd)} cases are not {shape}: {', '.join(odd[:5])}")
    return said


def defects(card: dict) -> list[str]:
    """Copies and empty masks, in words."""
    empty = [f["id"] for f in card["per_case"] if not f["tumour_slices"]]
    said = []
    if card["near_duplicates"]:
        said.append(f"near-duplicate cases: {card['near_duplicates'][:5]}")
    if empty:
        said.append(f"{len(empty)} cases have an empty mask: {', '.join(empty[:5])}")
    return said


def differences(card: dict) -> list[str]:
    """How the folder differs from the published training set, in words."""
    kept, said = card["slices_with_tumour"], other_set(card, CASES, SHAPE)
    if not said and abs(kept - KEPT_BY_SOURCE) > 0.01 * KEPT_BY_SOURCE:
        said.append(f"{kept} slices hold tumour, the source reports {KEPT_BY_SOURCE}")
    return said + defects(card)


def report(card: dict) -> str:
    """What a person wants to know at once."""
    total, kept = card["slices"], card["slices_with_tumour"]
    lines = [
        f"{card['cases']} cases, {card['bytes'] / 1e9:.1f} GB",
        f"{total:,} slices, {kept:,} of them with tumour ({kept / total:.1%}); a full "
        f"set has {CASES} x {SHAPE[2]} = {CASES * SHAPE[2]:,}, and {KEPT_BY_SOURCE:,} "
        "is what the published code kept",
    ]
    lines += [f"  {name}: {n:,} voxels" for name, n in card["label_voxels"].items()]
    renamed = [f for f in card["per_case"] if not f["mask"].lower().count("_seg.nii")]
    lines += [
        f"  the mask of {f['id']} is called {f['mask']}: read; a search for *_seg.nii "
        "alone loses this case"
        for f in renamed
    ]
    return "\n".join(lines)


def look_at_all(cases: list, look: Callable[[Any], dict]) -> list[dict]:
    """Look at every case; all bad files are named in one error."""
    from tqdm.auto import tqdm

    facts, bad = [], []
    for case in tqdm(cases, "reading", delay=3, unit="case"):
        try:
            facts.append(look(case))
        except MedtutError as error:
            bad.append(str(error))
    if bad:
        raise MedtutError(f"{len(bad)} of {len(cases)} cases:\n" + "\n".join(bad))
    return facts


def hand_over(
    args: argparse.Namespace, card: dict, split: Split, told: str, said: list[str]
) -> int:
    """Write passport and split, print what they hold; 1 if the set is another."""
    write_json(args.out / "passport.json", card)
    save_split(args.out / "split.json", split)
    print(told)
    print(
        f"{args.out / 'passport.json'} and split.json: {len(split.train)} train, "
        f"{len(split.validation)} validation, {len(split.test)} test (seed {args.seed})"
    )
    print(
        "".join(f"DIFFERENT: {line}\n" for line in said)
        or "this is the published set\n",
        end="",
    )
    return int(bool(said))


def run(args: argparse.Namespace) -> int:
    """Check the folder; see the module's text for the exit codes."""
    cases = find_cases(args.folder)
    facts = look_at_all(cases, look)
    card = passport(cases, facts, args.folder, args.hash)
    split = split_cases([f["id"] for f in facts], seed=args.seed)
    return hand_over(args, card, split, report(card), differences(card))


def command(
    argv: list[str] | None,
    text: str,
    out: str,
    run: Callable[[argparse.Namespace], int],
) -> int:
    """Read the command line of a script that checks a set, and do what it asks."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the training part, unpacked")
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument("--hash", action="store_true", help="sha256 of every file too")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (MedtutError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    return command(argv, __doc__, "brats2020", run)


if __name__ == "__main__":
    sys.exit(main())
