"""Check a FLARE22 folder, put it in its layout, write its passport and a protocol.

The set is not redistributed here, and its rules forbid to pass it on. Get it yourself:

1. Join the challenge and accept its rules (named accounts; no redistribution; cite the
   challenge summary): https://flare22.grand-challenge.org
   The 50 labelled cases are also at https://zenodo.org/records/7860267
   (FLARE22Train.zip, about 1.5 GB). Labels of the 50 public tuning cases came after the
   challenge; the published few-shot lists use 22 of them as test.
2. Unpack it and run: python data_scripts/flare22.py FOLDER
   FOLDER holds `images` (FLARE22_Tr_0001_0000.nii.gz) and `labels`
   (FLARE22_Tr_0001.nii.gz). If the files lie otherwise, --place DIR links (or copies)
   them by their names into DIR/train and DIR/tuning, as upstream's lists want them.
3. With --test FOLDER, the tuning cases, `protocol.json` gets the support ids of every k
   and seed out of FOLDER and those of --test to judge on.

Whoever publishes results on it cites Ma et al., Lancet Digital Health 6(11), 2024,
e815-e826.

Leaves with 0 if the folder is the published training set, with 1 if it can be read but
differs from it (it says how), and with 2 if a file is bad or it is not of this kind.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pretraining_layout import link
from totalsegmentator import command, hand_over, look_at, passport

from medtut.data.few_shot import draw_protocol, save_protocol
from medtut.data.organs import FLARE22
from medtut.data.totalseg import find_cases
from medtut.errors import MedtutError

CASES = 50
NAME = re.compile(r"FLARE(22_Tr|Ts)_\d{4}(_0000)?\.nii\.gz")
ABOUT = {
    "name": "FLARE22",
    "source": "https://flare22.grand-challenge.org",
    "terms": "the challenge's rules: no redistribution; cite the challenge summary",
}


def place(source: Path, target: Path) -> int:
    """Link or copy images and labels into train and tuning; nothing is overwritten."""
    count = 0
    for path in sorted(source.rglob("FLARE*.nii.gz")):
        found = NAME.fullmatch(path.name)
        if not found:
            continue
        part = "train" if found[1] == "22_Tr" else "tuning"
        link(path, target / part / ("images" if found[2] else "labels") / path.name)
        count += 1
    if not count:
        raise MedtutError(f"{source} has no file named as in FLARE22: nothing placed.")
    return count


def differences(card: dict) -> list[str]:
    """How the folder differs from the published training set, in words."""
    said = []
    if card["labelled"] != CASES:
        said.append(f"{card['labelled']} labelled cases, the published set has {CASES}")
    if card["cases"] > card["labelled"]:
        said.append(f"{card['cases'] - card['labelled']} images have no labels")
    return said


def run(args: argparse.Namespace) -> int:
    """Check the folder; see the module's text for the exit codes."""
    root = args.folder
    if args.place:
        print(f"{place(root, args.place)} files placed in {args.place}")
        root = args.place / "train"
    records = find_cases(root, "flare22")
    labelled = [r for r in records if r.labels is not None]
    if not labelled:
        raise MedtutError(f"{root}: {len(records)} images and no labels beside them.")
    facts = look_at(labelled, args.read, tuple(FLARE22))
    card = passport(records, facts, ABOUT, args.hash)
    if args.test:
        test = [r.id for r in find_cases(args.test, "flare22") if r.labels is not None]
        pool = [r.id for r in labelled]
        drawn = draw_protocol(pool, test, args.shots, args.seeds, name="flare22")
        save_protocol(args.out / "protocol.json", drawn)
    return hand_over(args, card, differences(card))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    more = (
        ("--place", "put everything in its layout here"),
        ("--test", "folder of the labelled tuning cases"),
    )
    return command(argv, __doc__, "flare22", run, *more)


if __name__ == "__main__":
    sys.exit(main())
