"""How bytes of an asset get onto this machine. Nothing here runs foreign code.

Three ways, each ending in a file whose sha256 has been compared:

* `from_url`: an official address, through ``pooch`` (temporary name, hash, rename and
  progress bar are what it is for);
* `package_archive`: a wheel or sdist by exact name, version and hash, through ``pip
  download``. pip, rather than requests of our own to an index, because it knows what
  we would have to copy: the user's index, mirrors, find-links, proxy, certificates and
  passwords. The archive is only downloaded; it is never installed or imported;
* `extract`: one named member of such an archive, read as a stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from medtut.data.asset_registry import Archive

# pip asks every sdist for its metadata, which means running its setup.py. With this
# stand-in for setuptools, found first on the path and without build isolation, pip is
# answered by us and the archive's own code stays unread; building is not among the
# answers. It covers sdists that name setuptools or no build backend; those in
# assets.yml are of that kind.
_INERT_BACKEND = '''\
"""Answers pip's question about an sdist without running anything of it."""
import os
import pathlib
import sys

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name, version = os.environ["MEDTUT_SDIST"].split("==")
    stem = name.replace("-", "_")
    folder = pathlib.Path(metadata_directory) / f"{stem}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n",
        encoding="utf-8",
    )
    return folder.name

__legacy__ = sys.modules[__name__]
'''


class Unreachable(Exception):
    """A source gave nothing: no network, no such file, no pip."""


class WrongBytes(Exception):
    """A source gave bytes other than the pinned ones."""


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, sha256: str, what: str) -> Path:
    """Return ``path`` if its bytes are the pinned ones.

    Raises
    ------
    WrongBytes
        With both hashes; the file is left where it is.
    """
    got = sha256_of(path)
    if got != sha256:
        raise WrongBytes(f"{what}: expected sha256 {sha256}, got {got}")
    return path


def from_url(url: str, target: Path, progress: bool) -> None:
    """Download ``url`` to ``target``, which must not exist yet; the caller checks it.

    Raises
    ------
    Unreachable
    """
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    get = pooch.HTTPDownloader(progressbar=progress, timeout=20)
    try:
        # The hash is ours to compare: pooch reports a mismatch as a bare ValueError,
        # and the reader needs both numbers.
        pooch.retrieve(url, None, target.name, target.parent, downloader=get)
    except (requests.RequestException, OSError, ValueError) as error:
        raise Unreachable(f"{url}: {_first_line(error)}") from error


def package_archive(archive: Archive, staging: Path, progress: bool) -> Path:
    """Download one archive of a Python package with pip; never build or install it.

    Parameters
    ----------
    archive : Archive
        A ``name-1.0.tar.gz`` or ``name-1.0-py3-none-any.whl`` of `assets.yml`.
    staging : Path
        An empty folder of the caller, who removes it afterwards.

    Raises
    ------
    Unreachable, WrongBytes
    """
    filename, pinned = archive.filename, f"{archive.project}=={archive.version}"
    if importlib.util.find_spec("pip") is None:
        raise Unreachable(
            f"{filename}: this Python has no pip (get it with `python -m ensurepip`)"
        )
    scratch, stub, dest = (staging / n for n in ("tmp", "stub", "archive"))
    for folder in (scratch, stub / "setuptools", dest):
        folder.mkdir(parents=True)
    for name in ("__init__.py", "build_meta.py"):
        (stub / "setuptools" / name).write_text(_INERT_BACKEND, encoding="utf-8")
    # --require-hashes: pip compares the bytes before it looks into them.
    wanted = staging / "wanted.txt"
    wanted.write_text(f"{pinned} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    sort = "--only-binary" if filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", sort, ":all:"]
    command += ["--no-build-isolation", "--ignore-requires-python"]
    command += ["--require-hashes", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--timeout", "20", "--retries", "1"]
    command += ["--dest", str(dest), "-r", str(wanted)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(stub),
        "MEDTUT_SDIST": pinned,
        "PIP_USE_PEP517": "1",  # before 25.3 pip would run setup.py by itself
        **{name: str(scratch) for name in ("TMPDIR", "TEMP", "TMP")},
    }
    log = staging / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=scratch
        )
        try:
            _wait(process, staging, archive, progress)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        if "DO NOT MATCH THE HASHES" in text:
            got = ", ".join(re.findall(r"Got\s+(\w+)", text)) or "?"
            raise WrongBytes(f"{filename}: expected sha256 {archive.sha256}, got {got}")
        errors = re.findall(r"(?m)^ERROR.*", text) or ["no reason given"]
        raise Unreachable(f"{filename}: pip: {errors[-1]}")
    if not (dest / filename).is_file():
        found = ", ".join(sorted(p.name for p in dest.iterdir())) or "nothing"
        raise Unreachable(f"{filename}: pip brought {found} instead")
    return dest / filename


def _wait(
    process: subprocess.Popen, staging: Path, archive: Archive, progress: bool
) -> None:
    """Wait for pip, drawing a bar from the size of what has arrived.

    pip's own bar goes to a terminal only; this one shows in a notebook too.
    """
    from tqdm.auto import tqdm

    size, name = archive.bytes, archive.filename
    shown = {"unit": "B", "unit_scale": True, "disable": not progress}
    with tqdm(total=size, desc=name, **shown) as bar:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
            with contextlib.suppress(OSError):
                arrived = [p.stat().st_size for p in staging.rglob(f"*{name}*")]
                bar.update(min(max(arrived, default=0), size) - bar.n)
        bar.update(0 if process.returncode else size - bar.n)


def extract(archive: Path, member: str, target: Path, size: int) -> Path:
    """Copy one regular file out of a wheel, zip or tar archive.

    Only the bytes of that member are read, and never more than ``size`` of them; no
    path of the archive decides where anything is written.

    Raises
    ------
    WrongBytes
        If the archive is damaged, or the member missing, no file, or of another size.
    """
    try:
        with _open_member(archive, member) as source:
            data = source.read(size + 1)  # so that too long is noticed
    except Exception as error:  # zlib, lzma, zipfile, tarfile: each has its own
        raise WrongBytes(
            f"{archive.name}: '{member}' cannot be read ({_first_line(error)})"
        ) from error
    if len(data) != size:
        got = f"more than {size}" if len(data) > size else len(data)
        raise WrongBytes(f"{archive.name}: '{member}' has {got} bytes, not {size}")
    target.write_bytes(data)
    return target


@contextlib.contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as file, file.open(member) as source:
            yield source
        return
    with tarfile.open(archive) as file:
        # Stops at the member: an index would read the whole archive.
        item = next((item for item in file if item.name == member), None)
        if item is None or not item.isreg():
            raise KeyError(f"there is no regular file {member}")
        with file.extractfile(item) as source:
            yield source


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
