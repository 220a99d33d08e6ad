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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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
    places = {key: _place(name, f) for key, f in asset.files.items()}
    there = [
        path.is_file() and path.stat().st_size == asset.files[key].bytes
        for key, path in places.items()
    ]
    folder = next(iter(places.values())).parent
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
        _Fetch(name, asset, progress).run(missing)
    return {key: _place(name, file) for key, file in asset.files.items()}


class _Fetch:
    """One call of `fetch`: what was tried and why it failed."""

    def __init__(self, name: str, asset: Asset, progress: bool) -> None:
        self.name, self.asset, self.progress = name, asset, progress
        self.unreachable: list[str] = []
        self.wrong: list[str] = []
        # A host or archive that failed once is not waited for again in this call.
        self.given_up: set[str] = set()

    def run(self, missing: list[str]) -> None:
        writable_dir(_folder(self.name))
        # A cached file with a wrong byte goes first: nobody may pick it up meanwhile.
        for key in missing:
            _place(self.name, self.asset.files[key]).unlink(missing_ok=True)
        for key in missing:
            path = _place(self.name, self.asset.files[key])
            if not path.is_file() and not self._get(key):
                self._fail(key)

    def _get(self, key: str) -> bool:
        file = self.asset.files[key]
        if any(self._try(self._from_folder, file, d) for d in local_dirs()):
            return True
        if offline():
            return False
        for source in file.sources:
            if source.url and self._try(self._from_url, file, source.url):
                return True
            if source.archive and self._try(self._from_index, file, source.archive):
                return True
        return False

    def _try(self, way: Callable, file: AssetFile, place: Any) -> bool:
        try:
            return way(file, place)
        except Unreachable as error:
            self.unreachable.append(str(error))
        except WrongBytes as error:
            self.wrong.append(str(error))
        return False

    def _from_folder(self, file: AssetFile, folder: Path) -> bool:
        for path in (folder / self.name / file.filename, folder / file.filename):
            if path.is_file():
                download.check(path, file.sha256, str(path))
                self._keep(file, lambda p, path=path: shutil.copyfile(path, p))
                return True
        for source in file.sources:
            if not source.archive:
                continue
            archive = registry().archives[source.archive]
            path = folder / archive.filename
            if path.is_file() and str(path) not in self.given_up:
                self.given_up.add(str(path))  # opened once; all its members are taken
                download.check(path, archive.sha256, str(path))
                self._unpack(path, source.archive)
                return True
        return False

    def _from_url(self, file: AssetFile, url: str) -> bool:
        host = urlsplit(url).netloc
        if host in self.given_up:
            return False
        try:
            self._keep(
                file, lambda p: download.from_url(url, p, file.sha256, self.progress)
            )
        except Unreachable:
            self.given_up.add(host)
            raise
        return True

    def _from_index(self, file: AssetFile, key: str) -> bool:
        if key in self.given_up:
            return False
        self.given_up.add(key)
        archive = registry().archives[key]
        room = writable_dir(cache_dir() / "assets")
        with tempfile.TemporaryDirectory(
            dir=room, prefix=".getting-", ignore_cleanup_errors=True
        ) as staging:
            path = download.package_archive(
                archive.project,
                archive.version,
                archive.filename,
                archive.sha256,
                archive.bytes,
                Path(staging),
                self.progress,
            )
            self._unpack(path, key)
        return True

    def _unpack(self, path: Path, key: str) -> None:
        """Take every pinned file out of an archive, those of other assets too.

        Two assets share one archive of 34 MB: it is downloaded once.
        """
        for name, asset in registry().assets.items():
            for file in asset.files.values():
                for source in file.sources:
                    place = _place(name, file)
                    if source.archive != key or place.is_file():
                        continue
                    self._keep(
                        file,
                        lambda p, f=file, m=source.member: download.extract(
                            path, m, p, f.bytes
                        ),
                        place,
                    )

    def _keep(
        self, file: AssetFile, make: Callable[[Path], Any], place: Path | None = None
    ) -> None:
        def checked(partial: Path) -> None:
            make(partial)
            download.check(partial, file.sha256, file.filename)

        write_by_rename(place or _place(self.name, file), checked)

    def _fail(self, key: str) -> None:
        file = self.asset.files[key]
        size = f"{self.asset.bytes / 1e6:.1f} MB"
        archives = [registry().archives[s.archive] for s in file.sources if s.archive]
        also = f", or {archives[0].filename}" if archives else ""
        away = " MEDTUT_OFFLINE is set." if offline() else ""
        for folder in os.environ.get("MEDTUT_ASSET_DIR", "").split(os.pathsep):
            if folder and not Path(folder).expanduser().is_dir():
                away += f" MEDTUT_ASSET_DIR names {folder}, which is no folder."
        tried = "".join(f"\n  - {t}" for t in (*self.wrong, *self.unreachable))
        todo = (
            f"\nConnect once and run `medtut assets fetch {self.name}` ({size}), or "
            f"put {file.filename}{also} into a folder and name that folder in "
            "MEDTUT_ASSET_DIR."
        )
        if self.wrong:
            raise AssetError(
                f"Asset '{self.name}': '{key}' was found, but with other bytes than "
                f"the pinned ones, and was refused.{tried}{todo}"
            )
        raise AssetUnavailable(
            f"Asset '{self.name}': '{key}' is not in the cache "
            f"({_folder(self.name)}) and could not be fetched.{away}{tried}{todo}"
        )
