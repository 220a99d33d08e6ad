"""The Kaggle "Brain Tumor Classification (MRI)" folder: pictures by class, no patients.

``Training`` and ``Testing`` hold ``glioma_tumor``, ``meningioma_tumor``, ``no_tumor``
and ``pituitary_tumor``, in upper or lower case, with JPEG or PNG files. The set names
no patient, mixes sources and holds copies, so this module also finds duplicates, folds
that keep them together, and what a file's size gives away.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from medtut.data.brats_slices import file_facts
from medtut.data.cache import cached_arrays
from medtut.data.image_folder import SUFFIXES
from medtut.data.mri_augment import prepare
from medtut.data.near_duplicates import alike, thumbnails
from medtut.errors import MedtutError

VERSION = 1  # part of every cache key
CLASSES = ("glioma", "meningioma", "no_tumor", "pituitary")
FOLDERS = ("glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor")
PARTS = ("Training", "Testing")
REAL_COUNTS = {"Training": (826, 822, 395, 827), "Testing": (100, 115, 105, 74)}
LARGEST = 50_000_000  # pixels: a picture of MRI has at most a million
# Thumbnails of one slice or its neighbour; see `duplicates` for what these catch.
CLOSE, DETAIL = 0.94, 0.85
Prepare = Callable[[np.ndarray, int], np.ndarray]


class Picture(NamedTuple):
    """A file, the part it stands in, and the index of its class in `CLASSES`."""

    path: Path
    part: str
    label: int


def _folders(folder: Path, wanted: Sequence[str]) -> list[Path]:
    """The wanted subfolders of one folder, whatever their case, and no others."""
    found = [p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._"]
    names = Counter(p.name.casefold() for p in found)
    by_name = {p.name.casefold(): p for p in found}
    keys = [name.casefold() for name in wanted]
    odd = [p.name for p in found if p.name.casefold() not in keys]
    missing = [name for name in wanted if name.casefold() not in names]
    twice = [name for name in wanted if names[name.casefold()] > 1]
    said = {"missing": missing, "not known": odd, "there twice": twice}
    if wrong := [f"{', '.join(v)} {k}" for k, v in said.items() if v]:
        inner = [p.parent for p in folder.glob("*/[Tt]raining")]
        raise MedtutError(
            f"{folder} must hold the folders {', '.join(wanted)} and no others: "
            f"{'; '.join(wrong)}. "
            + (f"Did you mean {inner[0]}?" if inner else "Unpack the set anew.")
        )
    return [by_name[key] for key in keys]


def find_pictures(folder: Path | str) -> list[Picture]:
    """List the pictures of both parts, by part, class and name.

    Hidden files and what is no picture (``Thumbs.db``) are passed over.

    Raises
    ------
    MedtutError
        No such folder; a part or class that is missing, not known or there in two
        spellings; a class without a picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MedtutError(
            f"{folder} is no folder. Give the one that holds {' and '.join(PARTS)}; "
            "data_scripts/brain_tumor_mri.py says where to get the set."
        )
    pictures = []
    for part, place in zip(PARTS, _folders(folder, PARTS), strict=True):
        for label, home in enumerate(_folders(place, FOLDERS)):
            files = [
                path
                for path in home.iterdir()
                if path.suffix.lower() in SUFFIXES and path.name[0] not in "._"
            ]
            if not files:
                raise MedtutError(
                    f"{home} holds no picture ({', '.join(SUFFIXES)}). Every class "
                    "needs some: unpack the set anew."
                )
            files.sort(key=lambda path: path.name)
            pictures += [Picture(path, part, label) for path in files]
    return pictures


def counts(pictures: Iterable[Picture]) -> dict[str, tuple[int, ...]]:
    """Pictures of each class, by part."""
    found = Counter((p.part, p.label) for p in pictures)
    return {part: tuple(found[part, k] for k in range(len(CLASSES))) for part in PARTS}


def count_report(pictures: Iterable[Picture]) -> list[str]:
    """How the counts differ from the published set's, a line each; empty if not."""
    return [
        f"{part}: {there} {name}, the published set has {real}"
        for part, row in counts(pictures).items()
        for name, there, real in zip(CLASSES, row, REAL_COUNTS[part], strict=True)
        if there != real
    ]


def read_grey(path: Path) -> np.ndarray:
    """Read a picture as (H, W) uint8.

    Colours become their luminance, transparent parts black; 16 bits are stretched from
    their own minimum to their maximum, since nobody knows what is white.

    Raises
    ------
    MedtutError
        A file that is broken, cut short, of several pages, or of more than 50 million
        pixels, whatever its header claims.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.width * file.height > LARGEST:
                raise ValueError(f"it has {file.width} × {file.height} pixels")
            if getattr(file, "n_frames", 1) > 1:
                raise ValueError("it holds several pages")
            file.draft("L", None)  # a JPEG's luminance is stored as such: twice as fast
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":
                values = np.asarray(image).astype(np.float64)
                low, high = values.min(), values.max()
                values = (values - low) * (255 / ((high - low) or 1))
                return np.rint(values).astype(np.uint8)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                black = Image.new("RGBA", image.size, (0, 0, 0, 255))
                image = Image.alpha_composite(black, image)
            return np.asarray(image.convert("L"))
    except Exception as error:  # Pillow's readers raise many kinds
        raise MedtutError(f"{path} cannot be read: {error}.") from error


def _in_threads(work: Callable[[Path], Any], pictures: Sequence[Picture]) -> list[Any]:
    """Results in order; for a broken file its `MedtutError`, and on with the next."""
    from tqdm.auto import tqdm

    def one(picture: Picture) -> Any:
        try:
            return work(picture.path)
        except MedtutError as error:
            return error

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(one, pictures)
        bar = tqdm(found, "reading pictures", len(pictures), delay=3, unit="picture")
        return list(bar)


def scan(pictures: Sequence[Picture]) -> dict[str, np.ndarray]:
    """What is known of each file, from the cache if its facts have not changed.

    Returns
    -------
    dict of (N,) arrays
        ``width``, ``height``, ``bytes`` (int); ``content`` and ``pixels``, hex sha256
        of the bytes and of the grey pixels; ``broken``, why it cannot be read, or "".
    """

    def look(path: Path) -> tuple:
        grey = read_grey(path)
        content = path.read_bytes()
        hashes = [hashlib.sha256(x).hexdigest() for x in (content, _with_shape(grey))]
        return (*grey.shape[::-1], len(content), *hashes, "")

    def make() -> dict[str, np.ndarray]:
        found = [
            (0, 0, 0, "", "", str(x)) if isinstance(x, MedtutError) else x
            for x in _in_threads(look, pictures)
        ]
        names = ("width", "height", "bytes", "content", "pixels", "broken")
        return {
            k: np.array(v) for k, v in zip(names, zip(*found, strict=True), strict=True)
        }

    key = [VERSION, [file_facts(p.path) for p in pictures]]
    return cached_arrays("brain_mri/scan", key, make)


def _with_shape(grey: np.ndarray) -> bytes:
    return repr(grey.shape).encode() + grey.tobytes()


def load_pictures(
    pictures: Sequence[Picture],
    prepare: Prepare = prepare,
    side: int = 128,
    skip_broken: bool = False,
) -> Any:
    """Read, prepare and shrink pictures once; later calls read the cache.

    Only the small ones are in memory together: 3,264 at 128² take 53 MB.

    Parameters
    ----------
    pictures : sequence of Picture
    prepare : callable
        ``prepare(grey, side)`` makes (side, side) uint8 of (H, W) uint8. A function of
        a module, not a lambda: the cache knows it by its name and by ``VERSION`` of
        its module.
    side : int
    skip_broken : bool
        Go on without the files that cannot be read.

    Returns
    -------
    (N, side, side) uint8
        With ``skip_broken`` a tuple of the array, the list of pictures in it, and a
        dict from the path of each broken file to what is wrong with it.

    Raises
    ------
    MedtutError
        Broken files, all of them in one message, or no picture at all.
    """
    module = sys.modules[prepare.__module__]
    name = f"{prepare.__module__}.{prepare.__qualname__}"
    if not pictures or "<" in name:
        raise MedtutError(
            f"load_pictures: {len(pictures)} pictures and prepare={name}. At least one "
            "picture is needed, and a function that has a name of its own."
        )
    why = scan(pictures)["broken"].tolist()
    broken = {p.path: text for p, text in zip(pictures, why, strict=True) if text}
    kept = [p for p in pictures if p.path not in broken]
    if not kept or (broken and not skip_broken):
        raise MedtutError(
            f"{len(broken)} of {len(pictures)} pictures cannot be read. Get them anew "
            "or go on without them (skip_broken=True):\n" + "\n".join(broken.values())
        )

    def make() -> dict[str, np.ndarray]:
        found = _in_threads(lambda path: prepare(read_grey(path), side), kept)
        for one in found:
            if isinstance(one, MedtutError):  # spoiled since it was scanned
                raise one
        return {"images": np.stack(found)}

    key = [VERSION, side, name, getattr(module, "VERSION", 0)]
    key += [file_facts(p.path) for p in kept]
    images = cached_arrays("brain_mri/images", key, make)["images"]
    return (images, kept, broken) if skip_broken else images


def size_features(pictures: Sequence[Picture]) -> np.ndarray:
    """Width, height and bytes of every file, (N, 3) int: no pixel looked at.

    A class that came from one source shows in these: a classifier on them alone is the
    floor that a classifier of pictures has to pass.
    """
    known = scan(pictures)
    return np.stack([known[k] for k in ("width", "height", "bytes")], axis=1)


def sources(pictures: Sequence[Picture]) -> np.ndarray:
    """Where a picture seems to come from, (N,) int: 0 the collection, 1 the web.

    Of the real set the gliomas are all 512 × 512, as the T1ce collection of Cheng
    (figshare 1512427, 2017) has them, and pictures without tumour, found on the web,
    have sizes of every kind. So 512 × 512 is called the collection. It is a guess by
    size: some on the web are 512 × 512 too. Holding one source out asks whether a
    model has learned the disease or the source.
    """
    return (size_features(pictures)[:, :2] != 512).any(1).astype(int)


def duplicates(images: np.ndarray) -> np.ndarray:
    """Pairs of pictures that show the same slice, or its neighbour.

    Their 32-pixel thumbnails correlate above 0.94, and what is left of them after a
    3 × 3 mean is taken away above 0.85. Chosen by looking at pairs of the real set's
    2,870 training pictures: copies saved anew, at another size or quality, lie above
    0.98; from there down to these limits all pairs looked at were neighbouring slices
    of one head with one tumour. No pair joins two classes and no group is larger than
    8; the first pair that does is at 0.92 and 0.75, two heads. What it does not catch:
    slices further apart, another plane or contrast of the same patient, mirrored or
    turned copies. The collection has 233 patients with 13 slices each on average, so
    most relations between pictures stay unseen, and scores of grouped folds are still
    too good.

    Parameters
    ----------
    images : (N, side, side) as `load_pictures` gives them, heads cropped

    Returns
    -------
    (M, 2) int
        Positions i < j.
    """
    small = thumbnails(torch.as_tensor(np.asarray(images)))
    found = []
    for start, part in zip(range(0, len(small), 512), small.split(512), strict=True):
        i, j = torch.nonzero(alike(part, small, CLOSE, DETAIL), as_tuple=True)
        found.append(torch.stack([i + start, j], 1)[i + start < j])
    return torch.cat(found).numpy()


def groups(pictures: Sequence[Picture], images: np.ndarray) -> np.ndarray:
    """Group ids (N,) int, from 0: copies and near-duplicates share one.

    Files of the same bytes or the same grey pixels are joined, and `duplicates`, and
    what is joined to one of a group is in the group.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    known = scan(pictures)
    pairs = [duplicates(images)]
    for kind in ("content", "pixels"):
        _, first, back = np.unique(known[kind], return_index=True, return_inverse=True)
        pairs.append(np.stack([np.arange(len(back)), first[back]], 1))
    i, j = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(i)), (i, j)), shape=(len(images),) * 2)
    return connected_components(graph, directed=False)[1]


def grouped_folds(
    labels: np.ndarray, groups: np.ndarray, k: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """k stratified folds (train, held out) of positions, no group on both sides."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    found = list(folds.split(np.zeros(len(labels)), labels, groups))
    for train, held in found:
        check_apart(groups, train, held)
    return found


def check_apart(groups: np.ndarray, *sides: np.ndarray) -> None:
    """Raise a `MedtutError` if a group stands on two sides (positions) of a split."""
    seen: dict[int, int] = {}
    for side, positions in enumerate(sides):
        for group in set(np.asarray(groups)[positions].tolist()):
            if seen.setdefault(group, side) != side:
                raise MedtutError(
                    f"Group {group} stands on side {seen[group]} and on side {side} of "
                    "the split: copies of one picture would be learned and tested. "
                    "Split by groups (grouped_folds)."
                )
