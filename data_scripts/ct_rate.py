"""Check a CT-RATE folder, put it in its layout, write its passport and a split.

The set is not redistributed here. Get it yourself:

1. Read its terms and accept them with an account (CC BY-NC-SA 4.0: not commercial,
   share alike, cite): https://huggingface.co/datasets/ibrahimhamamci/CT-RATE
2. `hf auth login` once, or your token in the variable HF_TOKEN; never in a file that
   may be published. Then, from the folder that shall hold it, the validation part
   (3,039 volumes; the whole set is terabytes):
   hf download ibrahimhamamci/CT-RATE --repo-type dataset --local-dir .
   --include "dataset/valid_fixed/*" "dataset/radiology_text_reports/*"
   "dataset/multi_abnormality_labels/*" "dataset/metadata/*"     (one line)
3. Run: python data_scripts/ct_rate.py FOLDER
   FOLDER holds `dataset`. If volumes and tables lie otherwise, --place DIR links (or
   copies) them by their names into DIR/dataset as the set has them.

There are two releases. `train` and `valid` are numbers as stored by the scanner, with
slope and intercept in the metadata, and without the spacing in the header;
`train_fixed` and `valid_fixed` are in Hounsfield units, and the same metadata must
*not* be applied to them again, which the published script does (CT-CLIP, issue 50). A
folder is taken as its name says, and some volumes are read to see whether that is so.

Whoever publishes results on it cites Hamamci et al., arXiv:2403.17834.

Leaves with 0 if the folder is the published set, with 1 if it can be read but differs
from it (it says how), and with 2 if a file is bad or the folder is not of this kind.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from medtut.data.ct_rate import (
    FINDINGS,
    SPLITS,
    Record,
    find_volumes,
    patient_of,
    text,
)
from medtut.data.ct_volume import read_hu
from medtut.data.splits import save_split, split_cases
from medtut.errors import MedtutError
from medtut.files import write_json

# Volumes, scans, patients: 50,188 of 25,692 of 21,304 in all.
PUBLISHED = {"train": (47_149, 24_128, 20_000), "valid": (3_039, 1_564, 1_304)}
TABLES = {
    "reports": "radiology_text_reports",
    "labels": "multi_abnormality_labels",
    "metadata": "metadata",
}


def place(source: Path, target: Path, fixed: bool) -> int:
    """Link or copy volumes and tables into the layout; nothing is overwritten."""
    count = 0
    for path in sorted(source.rglob("[!.]*")):
        table = re.fullmatch(
            r"(train|valid)\w*_(reports|labels|metadata)\.csv", path.name
        )
        if table:
            new = target / "dataset" / TABLES[table[2]] / path.name
        elif path.name.endswith(".nii.gz"):
            patient = patient_of(path.name)
            split = patient.split("_")[0] + "_fixed" * fixed
            scan = path.name.rsplit("_", 1)[0]
            new = target / "dataset" / split / patient / scan / path.name
        else:
            continue
        if new.exists():
            raise MedtutError(f"{new} is there already: nothing more is placed.")
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, new)
        except OSError:  # another disk, or a file system without links
            partial = new.with_name(f".{new.name}.partial")
            shutil.copyfile(path, partial)
            partial.rename(new)
        count += 1
    return count


def looked_at(records: list[Record], count: int) -> list[dict]:
    """Read some volumes, evenly spread: shape, spacing and the range in HU."""
    from tqdm.auto import tqdm

    picks = np.unique(np.linspace(0, len(records) - 1, min(count, len(records))))
    facts, bad = [], []
    for i in tqdm(picks.astype(int), "reading", delay=3, unit="volume"):
        r = records[i]
        try:
            ct = read_hu(r.path, r.slope, r.intercept, r.spacing)
        except MedtutError as error:
            bad.append(str(error))
            continue
        at = np.quantile(ct.hu[::4, ::4, ::2], (0.01, 0.25, 0.5, 0.75, 0.99))
        sides = [round(s, 4) for s in ct.spacing]
        given = {"shape": list(ct.hu.shape), "spacing_mm": sides}
        facts.append({"name": r.name, **given, "quantiles_hu": at.round().tolist()})
    if bad:
        raise MedtutError(f"{len(bad)} of {len(picks)} volumes:\n" + "\n".join(bad))
    return facts


def passport(root: Path, split: str, count: int) -> dict:
    """Gather what was seen of one split; see the module's text for the terms."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        records = find_volumes(root, split, missing="keep")
    words = [len(text(r).split()) for r in records]
    labels = np.array([r.labels for r in records])
    return {
        "volumes": len(records),
        "scans": len({r.key.rsplit("_", 1)[0] for r in records}),
        "patients": len({r.patient for r in records}),
        "bytes": sum(r.path.stat().st_size for r in records),
        "rescaled_by": dict(
            Counter(f"{r.slope:g} · x {r.intercept:+g}" for r in records if r.slope)
        ),
        "without_report": [r.name for r in records if not (r.findings or r.impression)],
        "without_findings": sum(not r.findings for r in records),
        "words_of_report": np.quantile(words, (0, 0.5, 1)).tolist(),
        "share_with_finding": dict(
            zip(FINDINGS, labels.mean(0).round(4).tolist(), strict=True)
        ),
        "looked_at": looked_at(records, count),
        "notes": [str(w.message) for w in said],
        "names": [r.name for r in records],
    }


def differences(card: dict, split: str) -> list[str]:
    """How a split differs from the published one, in words."""
    kinds = ("volumes", "scans", "patients")
    wanted = PUBLISHED[split.removesuffix("_fixed")]
    counts = [
        f"{split}: {card[kind]:,} {kind}, the published set has {n:,}"
        for kind, n in zip(kinds, wanted, strict=True)
        if card[kind] != n
    ]
    bare = card["without_report"]
    lost = [f"{split}: {len(bare)} volumes without report: {', '.join(bare[:5])}"]
    return counts + lost * bool(bare) + [f"{split}: {note}" for note in card["notes"]]


def report(card: dict, split: str) -> str:
    """What a person wants to know at once."""
    how = card["rescaled_by"] or "nothing: taken as Hounsfield units"
    lines = [
        f"{split}: {card['volumes']:,} volumes of {card['scans']:,} scans of "
        f"{card['patients']:,} patients, {card['bytes'] / 1e9:.1f} GB",
        f"  rescaled by {how}; {len(card['looked_at'])} volumes read, all in HU",
        f"  {card['without_findings']} without findings; words in findings and "
        f"impression: {card['words_of_report']} (least, median, most)",
    ]
    return "\n".join(
        lines + [f"  {v:7.2%} {k}" for k, v in card["share_with_finding"].items()]
    )


def run(args: argparse.Namespace) -> int:
    """Check the folder; see the module's text for the exit codes."""
    root = args.folder
    if args.place:
        print(f"{place(root, args.place, args.fixed)} files placed in {args.place}")
        root = args.place
    base = root / "dataset" if (root / "dataset").is_dir() else root
    splits = [s + end for s in SPLITS for end in ("", "_fixed")]
    there = [s for s in splits if (base / s).is_dir()]
    if not there:
        raise MedtutError(f"{base} has none of {', '.join(splits)}. Try --place DIR.")
    cards = {s: passport(root, s, args.read) for s in there}
    about = {
        "name": "CT-RATE",
        "source": "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE",
        "terms": "CC BY-NC-SA 4.0; accept them at the source; cite arXiv:2403.17834",
    }
    write_json(args.out / "passport.json", about | {"splits": cards})
    said = []
    for name, card in cards.items():
        # The published validation patients are the test; some of train are for choices.
        parts = (0.9, 0.1, 0) if name.startswith("train") else (0, 0.3, 0.7)
        if card["patients"] > 1:
            split = split_cases(card["names"], parts, args.seed, patient_of)
            save_split(args.out / f"split_{name}.json", split)
        print(report(card, name))
        said += differences(card, name)
    lines = "".join(f"DIFFERENT: {line}\n" for line in said)
    print(lines or "this is the published set\n", end="")
    print(f"passport and splits by patient (seed {args.seed}): {args.out}")
    return int(bool(said))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds dataset")
    parser.add_argument("--place", type=Path, help="put everything in its layout here")
    parser.add_argument("--fixed", action="store_true", help="with --place: in HU")
    parser.add_argument("--read", type=int, default=20, help="volumes to look at")
    parser.add_argument("--out", type=Path, default=Path("ct_rate"))
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (MedtutError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
