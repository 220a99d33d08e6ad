"""Check the Kaggle set "Brain Tumor Classification (MRI)" and write its passport.

The set is not redistributed here. Get it yourself:

1. Read the licence on its page, by Sartaj Bhuvaji and others; it also holds pictures
   from elsewhere, whose terms count too (see medtut/data/cards/brain-tumor-mri.md):
   https://www.kaggle.com/datasets/sartajbhuvaji/brain-tumor-classification-mri
2. Download it there with an account, or with the Kaggle client:
   kaggle datasets download sartajbhuvaji/brain-tumor-classification-mri
3. Unpack it and run: python data_scripts/brain_tumor_mri.py FOLDER
   FOLDER holds Training and Testing, itself or in a folder below it, as the archive
   has them. With --place DIR the two are copied to DIR, ready for
   medtut run 04 --data DIR

Leaves with 0 if the folder has the published counts and no broken file, with 1 if it
can be read but differs (it says how), and with 2 if it is not of this kind.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

from medtut.data.brain_mri import (
    CLASSES,
    PARTS,
    Picture,
    count_report,
    counts,
    duplicates,
    find_pictures,
    groups,
    load_pictures,
    scan,
)
from medtut.errors import MedtutError
from medtut.files import write_json


def locate(folder: Path) -> Path:
    """Find the folder that holds the two parts: the given one or one below it."""
    if not folder.is_dir():
        raise MedtutError(f"{folder} is no folder. Unpack the archive and give that.")
    wanted = {part.casefold() for part in PARTS}
    inner = sorted(p for p in folder.rglob("*") if p.is_dir() and p.name[0] not in "._")
    for place in (folder, *inner):
        if wanted <= {p.name.casefold() for p in place.iterdir() if p.is_dir()}:
            return place
    raise MedtutError(f"No {' and '.join(PARTS)} in {folder}. Is it unpacked?")


def place(source: Path, target: Path) -> Path:
    """Copy both parts to `target`, which must not have them yet."""
    if any((target / part).exists() for part in PARTS):
        raise MedtutError(f"{target} has {' or '.join(PARTS)} already: nothing copied.")
    for part in source.iterdir():
        if part.is_dir() and part.name.title() in PARTS:
            partial = target / f".{part.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(part, partial)
            partial.rename(target / part.name.title())
    return target


def pair_facts(pictures: list[Picture], pairs: np.ndarray) -> dict:
    """How many pairs, within and across the parts, and those with two labels."""
    part = np.array([p.part for p in pictures])
    label = np.array([p.label for p in pictures])
    i, j = np.asarray(pairs, int).reshape(-1, 2).T
    names = [str(p.path) for p in pictures]
    return {
        "pairs": len(i),
        "across_parts": int((part[i] != part[j]).sum()),
        "contradictory": [
            [names[a], names[b]]
            for a, b in zip(i, j, strict=True)
            if label[a] != label[b]
        ],
    }


def passport(root: Path) -> dict:
    """Gather what was seen; see the module's text for source and licence."""
    images, pictures, broken = load_pictures(find_pictures(root), skip_broken=True)
    known, ids = scan(pictures), groups(pictures, images)
    sizes = np.bincount(ids)
    same = {
        kind: np.argwhere(np.triu(known[kind][:, None] == known[kind], 1))
        for kind in ("content", "pixels")
    }
    part = np.array([p.part for p in pictures])
    across = set(ids[part == PARTS[0]]) & set(ids[part == PARTS[1]])
    return {
        "name": "Brain Tumor Classification (MRI)",
        "source": "https://www.kaggle.com/datasets/sartajbhuvaji/"
        "brain-tumor-classification-mri",
        "terms": "as its page states: read them there",
        "counts": {
            k: dict(zip(CLASSES, v, strict=True)) for k, v in counts(pictures).items()
        },
        "different": count_report(pictures),
        "broken": {str(k): v for k, v in broken.items()},
        "bytes": int(known["bytes"].sum()),
        "all_black": [
            str(p.path) for p, x in zip(pictures, images, strict=True) if not x.any()
        ],
        "quantiles_of_prepared": np.quantile(
            images[::10], (0.01, 0.25, 0.5, 0.75, 0.99)
        ).tolist(),
        "at_512": {
            name: float(np.mean([
                known["width"][i] == known["height"][i] == 512
                for i, p in enumerate(pictures) if p.label == k
            ]))
            for k, name in enumerate(CLASSES)
        },
        "same_bytes": pair_facts(pictures, same["content"]),
        "same_pixels": pair_facts(pictures, same["pixels"]),
        "near_duplicates": pair_facts(pictures, duplicates(images)),
        "groups": {
            "all": len(sizes),
            "of_several": int((sizes > 1).sum()),
            "largest": int(sizes.max()),
            "across_parts": len(across),
        },
        "files": {
            p.path.relative_to(root).as_posix(): {"bytes": int(n), "sha256": str(sha)}
            for p, n, sha in zip(
                pictures, known["bytes"], known["content"], strict=True
            )
        },
    }  # fmt: skip


def report(card: dict) -> str:
    """What a person wants to know at once."""
    lines = [f"{part}: {row}" for part, row in card["counts"].items()]
    for name in ("same_bytes", "same_pixels", "near_duplicates"):
        facts = card[name]
        lines.append(
            f"{name.replace('_', ' ')}: {facts['pairs']} pairs, {facts['across_parts']}"
            f" across the parts, {len(facts['contradictory'])} with two labels"
        )
        lines += [f"  two labels: {a} and {b}" for a, b in facts["contradictory"][:5]]
    lines += [f"groups: {card['groups']}", f"512 × 512: {card['at_512']}"]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Check the folder; see the module's text for the exit codes."""
    root = locate(args.folder)
    if args.place:
        root = place(root, args.place)
    card = passport(root)
    write_json(args.out, card)
    print(report(card))
    said = card["different"] + list(card["broken"].values()) + card["all_black"]
    print(
        "".join(f"DIFFERENT: {line}\n" for line in said)
        or "the counts are those of the published set\n",
        end="",
    )
    print(f"passport: {args.out}; use it: medtut run 04 --data {root}")
    return int(bool(said))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the archive, unpacked")
    parser.add_argument("--place", type=Path, help="copy the two parts there")
    parser.add_argument("--out", type=Path, default=Path("brain_tumor_mri.json"))
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (MedtutError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
