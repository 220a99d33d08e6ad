"""The nine sets that FSEFT's network was pretrained on: where they are, and checks.

None of them is redistributed here. Without a folder, this prints the registry
(medtut/data/abdomen_sets.yml): where each set is, its terms, how it lies on disk, and
which of its ids is which structure of the 29 of the template:
   python data_scripts/abdomen_pretraining_sets.py
   python data_scripts/abdomen_pretraining_sets.py --set kits
Read the terms at the source, get the sets you may use, unpack them, and put each into
the layout that the published lists want (files are linked, or copied):
   python data_scripts/abdomen_pretraining_sets.py ROOT --set kits --place DOWNLOADED
Then check what is there:
   python data_scripts/abdomen_pretraining_sets.py ROOT [--lists .../pretrain/train.txt]
counts volumes of every set, reads some (grid, Hounsfield units, ids), says which
structures the whole collection annotates and how often, and with --lists whether the
2,042 published volumes are all there. Whoever publishes results cites every set used.

Leaves with 0 if everything that is there is whole, with 1 if it differs from what was
published (it says how), and with 2 if a file is bad or there is no set at all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretraining_layout import cases_of, place
from totalsegmentator import look_at

from medtut.data.organs import STRUCTURES
from medtut.data.partial import pretraining_sets
from medtut.data.totalseg import read_partition
from medtut.errors import MedtutError
from medtut.files import write_json


def described(name: str, one: dict) -> str:
    """One entry of the registry in words."""
    ids = ", ".join(
        f"{s} {i if isinstance(i, int) else f'{i[0]} ({i[1]} half)'}"
        for s, i in one["ids"].items()
    )
    lines = [
        f"{name}: {one['set']}, {one['listed']} of its {one['cases']} volumes listed",
        f"  where: {one['where']}",
        f"  terms: {one['terms']}",
        f"  cite: {one['cite']}",
        f"  layout: {one['folder']}/ {' and '.join(one['layout'])}",
        f"  ids: {ids}",
    ]
    return "\n".join(lines + [f"  note: {one['note']}"] * bool(one["note"]))


def check(root: Path, args: argparse.Namespace) -> int:
    """Look at every set below a root; see the module's text for the exit codes."""
    sets, cards, said = pretraining_sets(), {}, []
    listed: dict[str, set[Path]] = {}
    if args.lists:
        for record in read_partition(args.lists, root):
            listed.setdefault(record.facts["dataset"], set()).add(record.image)
    for name, one in sets.items():
        records, alone = cases_of(root, one)
        if not records and not alone:
            continue
        for path in alone[:5]:
            said.append(f"{name}: {path.name} has no partner; {len(alone)} in all")
        facts = look_at(records, args.read, tuple(one["ids"])) if records else []
        cards[name] = {"volumes": len(records), "looked_at": facts}
        if len(records) != one["cases"]:
            said.append(f"{name}: {len(records)} volumes, published are {one['cases']}")
        for structure in one["ids"]:
            if facts and not any(f["ml"].get(structure) for f in facts):
                said.append(f"{name}: {structure} is empty in all {len(facts)} read")
    if not cards:
        raise MedtutError(f"{root} holds none of the sets; see --help for the layout.")
    gone = sorted(p for paths in listed.values() for p in paths if not p.is_file())
    if gone:
        some = ", ".join(p.relative_to(root).as_posix() for p in gone[:3])
        said.append(f"{len(gone)} listed volumes are not there: {some}")
    volumes = {
        s: sum(c["volumes"] for n, c in cards.items() if s in sets[n]["ids"])
        for s in STRUCTURES
    }
    card = {"sets": cards, "volumes_with_labels_of": volumes}
    write_json(args.out / "passport.json", card)
    for name, found in cards.items():
        print(f"{name}: {found['volumes']} volumes, {len(found['looked_at'])} read")
    print("volumes that annotate a structure:")
    print("\n".join(f"  {n:5d} {s}" for s, n in volumes.items()))
    lines = "".join(f"DIFFERENT: {line}\n" for line in said)
    print(lines or "all that is there is whole\n", end="")
    return int(bool(said))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    sets = pretraining_sets()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, nargs="?", help="holds 04_LiTS and so on")
    parser.add_argument("--set", choices=sets, help="one entry of the registry")
    parser.add_argument("--place", type=Path, help="a download to put below root")
    parser.add_argument("--lists", type=Path, help="upstream's pretrain/train.txt")
    parser.add_argument("--read", type=int, default=3, help="volumes to read per set")
    parser.add_argument("--out", type=Path, default=Path("abdomen_pretraining_sets"))
    args = parser.parse_args(argv)
    try:
        if args.place:
            if not (args.root and args.set):
                raise MedtutError("--place needs a root and --set.")
            count = place(args.place, args.root, sets[args.set])
            print(f"{count} volumes of {args.set} placed below {args.root}")
            return 0
        if args.root:
            return check(args.root, args)
        names = [args.set] if args.set else list(sets)
        print("\n\n".join(described(name, sets[name]) for name in names))
        return 0
    except (MedtutError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
