"""Check a TotalSegmentator folder, write its passport and few-shot protocols.

The set is not redistributed here. It is public, CC BY 4.0, from Zenodo. There are two:

1. v1 (1,204 CTs, 104 structures, https://zenodo.org/records/6802614,
   Totalsegmentator_dataset.zip, about 28 GB): the one of the published few-shot lists,
   and the one with the five heart chambers.
2. v2.0.1 (1,228 CTs, 117 structures, https://zenodo.org/records/10047292,
   Totalsegmentator_dataset_v201.zip, about 24 GB): labels corrected, `heart` as one.

Whichever it is, from a shell or a browser:
   curl -L -O https://zenodo.org/records/10047292/files/Totalsegmentator_dataset_v201.zip
   python data_scripts/totalsegmentator.py FOLDER --archive Totalsegmentator_dataset_v201.zip
checks the archive against the md5 that Zenodo states (v2.0.1) and unpacks it. Then, or
if it is unpacked already:
   python data_scripts/totalsegmentator.py FOLDER
FOLDER holds s0000, s0001, ... and meta.csv.

With --lists DIR, the folder `totalseg_selected` of the published partitions
(jusiro/fewshot-finetuning, local_data/partitions/transferability), every list is
checked against the folder and drawn from: `protocol_<structure>.json` has the support
ids of every k and seed out of the training list, and the test list as it is.

Whoever publishes results on it cites Wasserthal et al., Radiology: Artificial
Intelligence 5(5), 2023, e230024.

Leaves with 0 if the folder is a published set, with 1 if it can be read but differs
from it (it says how), and with 2 if a file is bad or the folder is not of this kind.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from medtut.data.ct_volume import read_hu
from medtut.data.download import sha256_of
from medtut.data.few_shot import draw_protocol, save_protocol
from medtut.data.organs import BASE, NOVEL
from medtut.data.totalseg import Record, find_cases, read_labels, read_partition
from medtut.errors import MedtutError
from medtut.files import renamed, write_json

# Cases and structures, by what only this version has.
PUBLISHED = {
    "v1": (1_204, 104, "heart_myocardium"),
    "v2": (1_228, 117, "atrial_appendage_left"),
}
MD5 = {"fe250e5718e0a3b5df4c4ea9d58a62fe": "v2.0.1"}
MEMBER = re.compile(r"(?:.*/)?(s\d{4}/(?:ct|segmentations/\w+)\.nii\.gz|meta\.csv)")
ABOUT = {
    "name": "TotalSegmentator",
    "source": "https://doi.org/10.5281/zenodo.6802613",
    "terms": "CC BY 4.0; cite doi:10.1148/ryai.230024",
}


def unpack(archive: Path, folder: Path) -> str:
    """Check an archive and unpack its cases; nothing is overwritten."""
    with open(archive, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise MedtutError(
            f"{archive} is no whole zip ({error}): get it again."
        ) from error
    count = 0
    with opened as whole:
        for name in whole.namelist():
            found = MEMBER.fullmatch(name)
            if not found or (target := folder / found[1]).exists():
                continue
            with (
                renamed(target) as part,
                whole.open(name) as old,
                open(part, "wb") as new,
            ):
                shutil.copyfileobj(old, new)
            count += 1
    known = MD5.get(md5, "no archive whose md5 is known here; compare it with Zenodo's")
    return f"{archive.name}: md5 {md5} ({known}), {count} files unpacked to {folder}"


def facts_of(record: Record, structures: Sequence[str]) -> dict:
    """Read one case: shape, spacing, range in HU and millilitres of every structure."""
    ct = read_hu(record.image)
    voxel = float(np.prod(ct.spacing)) / 1000
    names = [s for s in structures if s in record.annotated]
    ml = {s: float(read_labels(record, [s]).sum()) * voxel for s in names}
    at = np.quantile(ct.hu[::4, ::4, ::2], (0.01, 0.25, 0.5, 0.75, 0.99))
    return {
        "id": record.id,
        "shape": list(ct.hu.shape),
        "spacing_mm": [round(s, 4) for s in ct.spacing],
        "stored": ct.facts["orientation"],
        "quantiles_hu": at.round().tolist(),
        "ml": {s: round(v, 2) for s, v in ml.items()},
    }


def look_at(
    records: Sequence[Record], count: int, structures: Sequence[str]
) -> list[dict]:
    """Read some cases, evenly spread; all bad files are named in one error."""
    from tqdm.auto import tqdm

    picks = np.unique(np.linspace(0, len(records) - 1, min(count, len(records))))
    facts, bad = [], []
    for i in tqdm(picks.astype(int), "reading", delay=3, unit="case"):
        try:
            facts.append(facts_of(records[i], structures))
        except MedtutError as error:
            bad.append(str(error))
    if bad:
        raise MedtutError(f"{len(bad)} of {len(picks)} cases:\n" + "\n".join(bad))
    return facts


def passport(
    records: Sequence[Record], facts: list[dict], about: dict, hashes: bool
) -> dict:
    """Gather what was seen."""
    files: list[Path] = []
    for r in records:
        labels = [] if r.labels is None else [r.labels]
        if r.labels is not None and r.labels.is_dir():
            labels = sorted(r.labels.glob("*.nii.gz"))
        files += [r.image, *labels]
    named = Counter(s for r in records for s in r.annotated)
    seen = dict.fromkeys(name for f in facts for name in f["ml"])
    empty = {s: [f["id"] for f in facts if f["ml"].get(s) == 0] for s in seen}
    names = {f"{p.parent.name}/{p.name}": p for p in files} if hashes else {}
    return {
        **about,
        "cases": len(records),
        "labelled": sum(r.labels is not None for r in records),
        "files": len(files),
        "bytes": sum(p.stat().st_size for p in files),
        "cases_with_labels_of": dict(sorted(named.items())),
        "looked_at": facts,
        "empty_among_those": empty,
        "sha256": {name: sha256_of(path) for name, path in names.items()},
    }


def report(card: dict) -> str:
    """What a person wants to know at once."""
    lines = [
        f"{card['cases']:,} cases, {card['labelled']:,} with labels, "
        f"{card['files']:,} files, {card['bytes'] / 1e9:.1f} GB; "
        f"{len(card['looked_at'])} read"
    ]
    for name, empty in card["empty_among_those"].items():
        ml = [f["ml"][name] for f in card["looked_at"] if f["ml"].get(name)]
        middle = f"median {np.median(ml):.1f} ml" if ml else "in none"
        lines.append(f"  {name}: {middle}, empty in {len(empty)}")
    return "\n".join(lines)


def differences(card: dict) -> list[str]:
    """How the folder differs from the published set of its version, in words."""
    named = card["cases_with_labels_of"]
    version = next((v for v, (*_, only) in PUBLISHED.items() if only in named), None)
    if version is None:
        return ["neither v1's heart chambers nor v2's structures: another set's labels"]
    cases, structures, _ = PUBLISHED[version]
    own = {s: n for s, n in named.items() if s not in ("lung_left", "lung_right")}
    if version == "v2":
        own.pop("kidney_cyst", None)  # put together by the reader from two files
    short = {s: n for s, n in own.items() if n < card["cases"]}
    said = []
    if card["cases"] != cases:
        said.append(f"{card['cases']:,} cases, {version} has {cases:,}")
    if len(own) != structures:
        said.append(f"{len(own)} structures, {version} has {structures}")
    if short:
        some = ", ".join(f"{s} in {n:,}" for s, n in list(short.items())[:5])
        said.append(f"{len(short)} structures are not in all cases: {some}")
    return said


def protocols(
    lists: Path, root: Path, there: set[str], args: argparse.Namespace
) -> list[str]:
    """Check upstream's lists against the folder and draw from them; what was odd."""
    said, paths = [], sorted(lists.glob("*_train.txt"))
    if not paths:
        raise MedtutError(f"{lists} has no list (*_train.txt): give totalseg_selected.")
    for path in paths:
        name = path.name.removesuffix("_train.txt")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pool, test = (
                [r.id for r in read_partition(p, root)]
                for p in (path, path.with_name(f"{name}_test.txt"))
            )
        said += [str(w.message) for w in caught]
        if gone := sorted({*pool, *test} - there):
            some = ", ".join(gone[:5])
            said.append(f"{name}: {len(gone)} listed cases are not there ({some})")
        pool, test = ([i for i in ids if i in there] for ids in (pool, test))
        shots = [k for k in args.shots if k <= len(pool)]
        if not shots or not test:
            continue
        drawn = draw_protocol(pool, test, shots, args.seeds, name=name)
        save_protocol(args.out / f"protocol_{name}.json", drawn)
        if lost := sorted(set(args.shots) - set(shots)):
            said.append(f"{name}: {len(pool)} volumes to learn from, no k = {lost}")
    return said


def hand_over(args: argparse.Namespace, card: dict, said: list[str]) -> int:
    """Write the passport and print what it holds; 1 if the set is another."""
    write_json(args.out / "passport.json", card)
    print(report(card))
    lines = "".join(f"DIFFERENT: {line}\n" for line in said)
    print(lines or "this is the published set\n", end="")
    print(f"passport and protocols: {args.out}")
    return int(bool(said))


def run(args: argparse.Namespace) -> int:
    """Check the folder; see the module's text for the exit codes."""
    if args.archive:
        print(unpack(args.archive, args.folder))
    records = find_cases(args.folder)
    card = passport(
        records, look_at(records, args.read, (*BASE, *NOVEL)), ABOUT, args.hash
    )
    said = differences(card)
    if args.lists:
        there = {r.id for r in records}
        said += protocols(args.lists, args.folder, there, args)
    return hand_over(args, card, said)


def command(
    argv: list[str] | None, text: str, out: str,
    run: Callable[[argparse.Namespace], int], *more: tuple[str, str],
) -> int:  # fmt: skip
    """Read the command line of a script that checks a set, and do what it asks."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the set")
    for name, words in more:
        parser.add_argument(name, type=Path, help=words)
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument("--read", type=int, default=20, help="cases to read")
    parser.add_argument("--hash", action="store_true", help="sha256 of every file too")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--seeds", type=int, default=5, help="draws of each k")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (MedtutError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    more = (
        ("--archive", "the zip as downloaded: check and unpack it first"),
        ("--lists", "totalseg_selected of the published partitions"),
    )
    return command(argv, __doc__, "totalsegmentator", run, *more)


if __name__ == "__main__":
    sys.exit(main())
