"""How fast single slices are read in random order, four ways.

* `SliceDataset`: prepared once, read through a memory map;
* MONAI's `PersistentDataset` with the same preparation, one entry per slice;
* the same with one entry per volume;
* plain nibabel, one slice through ``dataobj``, prepared at every read.

All give the same arrays (checked). The arms take turns, after one warm-up in which the
caches are filled; CPU time is compared, so that load on the machine hits all alike.

    python benchmarks/slices.py            # four small cases, less than a minute
    python benchmarks/slices.py --shape 240 240 155 --cases 8
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.data import PersistentDataset
from monai.transforms import Transform

from medtut.data import brats_slices as bs
from medtut.data.brats import Case, find_cases, load_case
from medtut.files import write_json, write_text
from medtut.machine import describe_machine, versions

OUT = Path(__file__).parent / "results"
Read = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def write_cases(root: Path, count: int, shape: tuple[int, ...], suffix: str) -> None:
    """Noise in an ellipsoid with a lesion in it: as hard to unpack as an image."""
    grid = np.indices(shape, dtype=np.float32)
    middle = np.array(shape, np.float32).reshape(3, 1, 1, 1) / 2
    near = (((grid - middle) / middle) ** 2).sum(0)
    for i in range(count):
        rng = np.random.default_rng(i)
        name = f"BraTS20_Training_{i + 1:03d}"
        image = np.where(near < 0.8, rng.normal(300, 40, shape), 0).astype(np.int16)
        label = np.select([near < 0.02, near < 0.06, near < 0.2], [1, 4, 2])
        (root / name).mkdir(parents=True)
        for kind, voxels in (("flair", image), ("seg", label.astype(np.uint8))):
            path = root / name / f"{name}_{kind}{suffix}"
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


def prepare(image: np.ndarray, label: np.ndarray, size: int) -> dict:
    """(X, Y, n) voxels and classes -> n slices, as `SliceDataset` makes them."""
    scaled = bs.normalise_volume(image[None].astype(np.float32), "slice")
    return {
        "image": bs._to_slices(scaled, size, "bilinear"),
        "label": bs._to_slices(label[None], size, bs.NEAREST)[:, 0].byte(),
    }


class Prepare(Transform):
    """What `PersistentDataset` keeps: a case, or one slice of it."""

    def __init__(self, cases: list[Case], size: int) -> None:
        self.cases, self.size = {c.id: c for c in cases}, size

    def __call__(self, item: dict) -> dict:
        volume = load_case(self.cases[item["case"]])
        z = [item["z"]] if "z" in item else list(item["kept"])
        return prepare(volume.image[0][..., z], volume.label[..., z], self.size)


def arms(folders: dict[str, Path], cache: Path, size: int) -> tuple[dict, int]:
    """Return ``read(i)`` of every arm, and how many slices there are."""
    cases = find_cases(folders[".nii.gz"], ("flair",))
    data = bs.SliceDataset(cases, normalise="slice", size=size)
    index, transform = data.index, Prepare(cases, size)
    items = [{"case": case, "z": z} for case, z in index]
    by_slice = PersistentDataset(items, transform, cache / "slice")
    kept = {c.id: bs.tumour_slices(c) for c in cases}
    names = list(kept)
    by_volume = PersistentDataset(
        [{"case": n, "kept": kept[n]} for n in names], transform, cache / "volume"
    )

    def ours(i: int) -> tuple:
        item = data[i]
        return item["image"], item["label"]

    def persistent(i: int) -> tuple:
        item = by_slice[i]
        return item["image"][0], item["label"][0].long()

    def volumes(i: int) -> tuple:
        case, z = index[i]
        item, row = by_volume[names.index(case)], kept[case].index(z)
        return item["image"][row], item["label"][row].long()

    def plain(folder: Path) -> Read:
        there = {c.id: c for c in find_cases(folder, ("flair",))}

        def read(i: int) -> tuple:
            case, z = there[index[i][0]], slice(index[i][1], index[i][1] + 1)
            image = np.asarray(nibabel.load(case.images["flair"]).dataobj[..., z])
            mask = np.asarray(nibabel.load(case.mask).dataobj[..., z])
            made = prepare(image, np.where(mask == 4, 3, mask), size)
            return made["image"][0], made["label"][0].long()

        return read

    reads = {
        "SliceDataset": ours,
        "PersistentDataset, per slice": persistent,
        "PersistentDataset, per volume": volumes,
    }
    reads |= {f"nibabel, {s}": plain(folder) for s, folder in folders.items()}
    return reads, len(index)


def measure(reads: dict[str, Read], count: int, rounds: int, seed: int) -> dict:
    """CPU seconds per read, per arm and round; every arm reads the same slices."""
    names, times = list(reads), {name: [] for name in reads}
    order = random.Random(seed)
    for i in range(count):  # fills the caches, and all must give the same
        want = reads["SliceDataset"](i)
        for name, read in reads.items():
            image, label = read(i)
            assert torch.equal(label, want[1]), name
            torch.testing.assert_close(image, want[0], rtol=1e-3, atol=1e-3)
    for turn in range(rounds):
        chosen = order.sample(range(count), min(count, 64))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            # A slow arm reads fewer of them.
            few = chosen if "nibabel" not in name else chosen[:16]
            start = time.process_time()
            for i in few:
                reads[name](i)
            times[name].append((time.process_time() - start) / len(few))
    return times


def markdown(result: dict) -> str:
    """The result as a short table."""
    s, m, v = result["settings"], result["machine"], result["versions"]
    shape = " x ".join(map(str, s["shape"]))
    lines = [
        "# Reading slices in random order",
        "",
        f"{s['cases']} cases of {shape} voxels, {s['slices']} slices with tumour, "
        f"{s['size']}² pixels, FLAIR and label, one thread. Median over {s['rounds']} "
        "rounds in which the arms took turns, caches filled before; ratios are medians "
        "of the ratio within a round.",
        "",
        f"Machine: {m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}; "
        f"Python {v['python']}, torch {v['torch']}, monai {v['monai']}.",
        "",
        "| reader | reads per CPU second | times PersistentDataset | MB on disk |",
        "|---|---:|---:|---:|",
    ]
    for name, rate in result["reads_per_cpu_s"].items():
        ratio, size = result["ratio"][name], result["cache_mb"].get(name, "")
        lines.append(f"| {name} | {rate:,.0f} | {ratio:.2f} | {size} |")
    met = "met" if result["met"] else "not met"
    lines += ["", f"- not slower than PersistentDataset per slice: {met}"]
    return "\n".join(lines) + "\n"


def disk_mb(folder: Path) -> float:
    """MB (10^6 bytes) of the files below a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return round(sum(p.stat().st_size for p in files) / 1e6, 1)


def main(argv: list[str] | None = None) -> None:
    """Measure, and write slices.json and slices.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--shape", type=int, nargs=3, default=[96, 96, 40])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folders = {s: Path(scratch) / s.strip(".") for s in (".nii", ".nii.gz")}
        for suffix, folder in folders.items():
            write_cases(folder, a.cases, tuple(a.shape), suffix)
        cache = Path(scratch) / "cache"
        os.environ["MEDTUT_CACHE"] = str(cache / "ours")
        reads, count = arms(folders, cache, a.size)
        times = measure(reads, count, a.rounds, a.seed)
        stored = ("ours", "slice", "volume")
        sizes = dict(zip(reads, (disk_mb(cache / n) for n in stored), strict=False))
    base = times["PersistentDataset, per slice"]
    ratio = {
        name: round(statistics.median(b / t for b, t in zip(base, own, strict=True)), 3)
        for name, own in times.items()
    }
    result = {
        "settings": {**vars(a), "slices": count, "out": None},
        "machine": describe_machine(),
        "versions": versions(),
        "reads_per_cpu_s": {
            name: round(1 / statistics.median(own), 1) for name, own in times.items()
        },
        "ratio": ratio,
        "cache_mb": sizes,
        "met": ratio["SliceDataset"] >= 1,
    }
    del result["settings"]["out"]
    write_json(a.out / "slices.json", result)
    write_text(a.out / "slices.md", markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
