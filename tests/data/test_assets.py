"""Assets: pinned bytes from mock archives and a server on this machine."""

import functools
import hashlib
import http.server
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import yaml

from medtut.data import asset_registry, assets, download

CONTENT = bytes(range(256)) * 40


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        info = "toy_wheel-1.0.dist-info"
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-wheel\nVersion: 1.0\n"
        )
        file.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
            "Tag: py3-none-any\n",
        )
        file.writestr(f"{info}/RECORD", "")
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def sdist(members: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, os.path.abspath(__file__)
            file.addfile(info)
    return buffer.getvalue()


class Setup:
    """A cache, a registry and a little package index, all in a temporary folder."""

    def __init__(self, tmp_path: Path, monkeypatch) -> None:
        self.tmp, self.patch = tmp_path, monkeypatch
        self.web = tmp_path / "web"
        self.web.mkdir()
        self.canary = tmp_path / "canary.txt"
        self.wheel = wheel({"pkg/data/a.bin": CONTENT, "pkg/data/b.bin": CONTENT[:999]})
        run = f"open({str(self.canary)!r}, 'w').write('code ran')\n"
        self.sdist = sdist(
            {
                "toy-sdist-1.0/PKG-INFO": b"Metadata-Version: 2.1\n"
                b"Name: toy-sdist\nVersion: 1.0\n",
                "toy-sdist-1.0/setup.py": (
                    run + "from setuptools import setup\n"
                    "setup(name='toy-sdist', version='1.0')\n"
                ).encode(),
                "toy-sdist-1.0/data/c.bin": CONTENT[::-1],
            }
        )
        self.archives = {
            "w": self.archive(
                "toy-wheel", "toy_wheel-1.0-py3-none-any.whl", self.wheel
            ),
            "s": self.archive("toy-sdist", "toy-sdist-1.0.tar.gz", self.sdist),
        }
        self.assets = {
            "one": self.asset(a=("a.bin", CONTENT, self.member("w", "pkg/data/a.bin"))),
            "two": self.asset(
                b=("b.bin", CONTENT[:999], self.member("w", "pkg/data/b.bin"))
            ),
            "three": self.asset(
                c=(
                    "c.bin",
                    CONTENT[::-1],
                    self.member("s", "toy-sdist-1.0/data/c.bin"),
                )
            ),
        }
        self.apply()

    @staticmethod
    def archive(project: str, filename: str, data: bytes) -> dict:
        return {
            "project": project,
            "version": "1.0",
            "filename": filename,
            "sha256": sha(data),
            "bytes": len(data),
        }

    @staticmethod
    def member(archive: str, member: str) -> dict:
        return {"archive": archive, "member": member}

    @staticmethod
    def asset(**files) -> dict:
        return {
            "title": "Toy",
            "licence": "CC0",
            "files": {
                key: {
                    "filename": name,
                    "sha256": sha(data),
                    "bytes": len(data),
                    "sources": list(sources),
                }
                for key, (name, data, *sources) in files.items()
            },
        }

    def apply(self) -> None:
        path = self.tmp / "assets.yml"
        path.write_text(
            yaml.safe_dump(
                {"archives": self.archives, "assets": self.assets}, sort_keys=False
            ),
            encoding="utf-8",
        )
        registry = asset_registry.load_registry(path)
        self.patch.setattr(assets, "registry", lambda: registry)

    def stick(self) -> Path:
        folder = self.tmp / "stick"
        folder.mkdir(exist_ok=True)
        self.patch.setenv("MEDTUT_ASSET_DIR", str(folder))
        return folder

    def files(self) -> list[str]:
        cache = self.tmp / "cache"
        return sorted(p.name for p in cache.rglob("*") if p.is_file())

    def index(self, base: str, html: bool) -> None:
        """Lay out a package index: one page per project, in one of its two forms."""
        for archive, data in (("w", self.wheel), ("s", self.sdist)):
            a = self.archives[archive]
            (self.web / a["filename"]).write_bytes(data)
            page = self.web / "simple" / a["project"]
            page.mkdir(parents=True)
            url = f"{base}/{a['filename']}"
            if html:
                text = (
                    "<!DOCTYPE html><html><body>"
                    f'<a href="{url}#sha256={sha(data)}">{a["filename"]}</a>'
                    "</body></html>"
                )
            else:
                entry = {
                    "filename": a["filename"],
                    "url": url,
                    "hashes": {"sha256": sha(data)},
                }
                text = json.dumps(
                    {
                        "meta": {"api-version": "1.0"},
                        "name": a["project"],
                        "files": [entry],
                    }
                )
            (page / "index.html").write_text(text, encoding="utf-8")


class Handler(http.server.SimpleHTTPRequestHandler):
    html = True

    def log_message(self, *args) -> None:
        pass

    def guess_type(self, path) -> str:
        if str(path).endswith("index.html"):
            json_type = "application/vnd.pypi.simple.v1+json"
            return "text/html" if type(self).html else json_type
        return "application/octet-stream"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDTUT_OFFLINE", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in ("MEDTUT_ASSET_DIR", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return Setup(tmp_path, monkeypatch)


@pytest.fixture
def serve(toy, monkeypatch):
    servers = []

    def start(html: bool = True, index: bool = True) -> str:
        handler = type("H", (Handler,), {"html": html})
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(handler, directory=str(toy.web))
        )
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        if index:
            toy.index(base, html)
        monkeypatch.setenv("PIP_INDEX_URL", f"{base}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("MEDTUT_OFFLINE")
        return base

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# ---- the real registry ----------------------------------------------------------


def test_every_asset_has_a_card_and_pins():
    for name, asset in assets.ASSETS.items():
        card = assets.describe(name)
        for word in (name, "**Licence.**", "**Citation.**", "**Used for.**"):
            assert word in card, f"{name}: card lacks {word}"
        assert asset.bytes > 0
    rows = assets.list_assets()
    assert [r["name"] for r in rows] == list(assets.ASSETS)


def test_embedded_template_needs_no_network(toy, monkeypatch):
    import nibabel
    import numpy as np

    monkeypatch.undo()
    monkeypatch.setenv("MEDTUT_OFFLINE", "1")
    monkeypatch.setenv("MEDTUT_CACHE", str(toy.tmp / "never"))
    paths = assets.fetch("mni152-2mm")
    assert list(paths) == ["t1", "gm", "wm"]
    assert not (toy.tmp / "never").exists()
    assert assets.status("mni152-2mm")["embedded"]
    volumes = {}
    for key, path in paths.items():
        image = nibabel.load(path)
        volumes[key] = np.asanyarray(image.dataobj)
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_zooms() == (2.0, 2.0, 2.0)
        assert volumes[key].shape == (99, 117, 95)
        assert volumes[key].dtype == np.uint8
    # Symmetric about x = 0, tissue where a brain has it: the frontal horns of the
    # ventricles beside the origin are dark in all three maps of density.
    np.testing.assert_array_equal(volumes["t1"], volumes["t1"][::-1])
    tissue = volumes["gm"].astype(int) + volumes["wm"]
    assert tissue.max() <= 256
    assert (tissue > 128).sum() * 8e-3 == pytest.approx(1500, rel=0.25)  # mL


def test_embedded_template_is_what_its_script_makes():
    import importlib.util

    import nibabel
    import numpy as np

    script = Path(__file__).parents[2] / "data_scripts" / "mni152.py"
    spec = importlib.util.spec_from_file_location("mni152_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ramp = np.full((5, 6, 7), 10, np.uint8)
    ramp[2, 2, 2] = 74  # a point of height 64 spreads as 8 : 4 : 2 : 1
    small = module.half(ramp)
    assert small.shape == (3, 3, 4)
    assert small[1, 1, 1] == 18
    assert small[0, 0, 0] == 10
    if not assets.status("nilearn-mni152")["cached"]:
        pytest.skip("nilearn-mni152 is not in the cache (medtut assets fetch it)")
    sources = assets.fetch("nilearn-mni152", progress=False)
    for key, path in assets.fetch("mni152-2mm").items():
        voxels, affine = module.template(sources[key])
        stored = nibabel.load(path)
        np.testing.assert_array_equal(np.asanyarray(stored.dataobj), voxels)
        np.testing.assert_array_equal(stored.affine, affine)


# ---- local folders --------------------------------------------------------------


def test_offline_with_an_empty_cache_says_what_to_do(toy):
    with pytest.raises(assets.AssetUnavailable) as caught:
        assets.fetch("one", progress=False)
    text = str(caught.value)
    for word in ("medtut assets fetch one", "MEDTUT_ASSET_DIR", "a.bin", "MB"):
        assert word in text
    assert str(toy.tmp / "cache") in text
    assert toy.files() == []
    assert assets.status("one")["cached"] is False
    assert assets.verify("one") == {"a": "missing"}


def test_a_mistyped_folder_is_named(toy, monkeypatch):
    monkeypatch.setenv("MEDTUT_ASSET_DIR", str(toy.tmp / "stikc"))
    with pytest.raises(assets.AssetUnavailable, match="stikc, which is no folder"):
        assets.fetch("one", progress=False)


@pytest.mark.parametrize("where", ["one/a.bin", "a.bin"])
def test_a_file_on_a_stick(toy, where):
    path = toy.stick() / where
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CONTENT)
    got = assets.fetch("one", progress=False)["a"]
    assert got.read_bytes() == CONTENT
    assert got.is_relative_to(toy.tmp / "cache")
    assert assets.verify("one") == {"a": "ok"}
    path.unlink()
    assert assets.fetch("one")["a"] == got  # from the cache


def test_an_archive_on_a_stick_gives_every_asset_in_it(toy):
    (toy.stick() / "toy_wheel-1.0-py3-none-any.whl").write_bytes(toy.wheel)
    assert assets.fetch("one", progress=False)["a"].read_bytes() == CONTENT
    assert toy.files() == ["a.bin", "b.bin"]


def test_pip_find_links_is_looked_into(toy, monkeypatch):
    folder = toy.tmp / "links"
    folder.mkdir()
    (folder / "toy-sdist-1.0.tar.gz").write_bytes(toy.sdist)
    monkeypatch.setenv("PIP_FIND_LINKS", f"https://example.invalid/ {folder}")
    path = assets.fetch("three", progress=False)["c"]
    assert path.read_bytes() == CONTENT[::-1]


def test_one_wrong_byte_is_refused_with_both_hashes(toy):
    wrong = CONTENT[:-1] + b"!"
    path = toy.stick() / "a.bin"
    path.write_bytes(wrong)
    with pytest.raises(assets.AssetError) as caught:
        assets.fetch("one", progress=False)
    assert not isinstance(caught.value, assets.AssetUnavailable)
    assert sha(CONTENT) in str(caught.value)
    assert sha(wrong) in str(caught.value)
    assert toy.files() == []
    assert path.exists()  # the user's file is not ours to delete


def test_a_cached_file_that_rotted_is_noticed_and_replaced(toy):
    source = toy.stick() / "a.bin"
    source.write_bytes(CONTENT)
    path = assets.fetch("one", progress=False)["a"]
    path.write_bytes(CONTENT[:-1] + b"!")
    assert assets.verify("one") == {"a": "wrong"}
    assert assets.fetch("one", progress=False)["a"].read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1] + b"!")
    source.unlink()
    with pytest.raises(assets.AssetUnavailable):
        assets.fetch("one", progress=False)
    assert not path.exists()


def test_a_truncated_or_changed_archive_is_refused(toy):
    path = toy.stick() / "toy-sdist-1.0.tar.gz"
    path.write_bytes(toy.sdist[:-200])
    with pytest.raises(assets.AssetError, match="expected sha256"):
        assets.fetch("three", progress=False)
    # Even with the hash of the damaged archive pinned, nothing half comes out.
    toy.archives["s"] = toy.archive("toy-sdist", path.name, toy.sdist[:-200])
    toy.apply()
    with pytest.raises(assets.AssetError, match="cannot be read"):
        assets.fetch("three", progress=False)
    assert toy.files() == []


def test_member_missing_or_of_another_size(toy):
    path = toy.stick() / "toy_wheel-1.0-py3-none-any.whl"
    path.write_bytes(toy.wheel)
    toy.assets["one"]["files"]["a"]["sources"] = [toy.member("w", "pkg/none.bin")]
    toy.apply()
    with pytest.raises(assets.AssetError, match=r"pkg/none\.bin"):
        assets.fetch("one", progress=False)
    toy.assets["one"]["files"]["a"].update(
        sources=[toy.member("w", "pkg/data/a.bin")], bytes=100
    )
    toy.apply()
    with pytest.raises(assets.AssetError, match="more than 100 bytes"):
        assets.fetch("one", progress=False)
    assert "a.bin" not in toy.files()


def test_a_link_inside_an_archive_is_not_followed(tmp_path):
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(sdist({"d/a": b"1"}, link="d/link"))
    with pytest.raises(download.WrongBytes, match="regular file"):
        download.extract(archive, "d/link", tmp_path / "out", 10)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("member", ["../a", "a/../../b", "/a", "a//b", "c:/a", "a\\b"])
def test_a_member_path_that_climbs_is_refused(toy, member):
    toy.assets["one"]["files"]["a"]["sources"] = [toy.member("w", member)]
    with pytest.raises(assets.AssetError, match="plain relative path"):
        toy.apply()


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "abc"},
        {"filename": "../a.bin"},
        {"sources": []},
        {"sources": [{"url": "x", "archive": "w", "member": "m"}]},
        {"sources": [{"archive": "w"}]},
        {"sources": [{"archive": "unknown", "member": "m"}]},
        {"colour": "blue"},
    ],
)
def test_a_wrong_entry_is_refused(toy, change):
    toy.assets["one"]["files"]["a"].update(change)
    with pytest.raises(assets.AssetError, match="one"):
        toy.apply()


def test_unknown_name_lists_those_there_are(toy):
    for call in (assets.fetch, assets.status, assets.describe, assets.verify):
        with pytest.raises(assets.AssetError, match="one, two, three"):
            call("four")


# ---- over the network, on this machine ------------------------------------------


@pytest.mark.parametrize("html", [True, False], ids=["html", "json"])
def test_from_a_package_index_without_running_anything(toy, serve, html):
    serve(html)
    # The sdist is the hard case: pip itself would run its setup.py.
    path = assets.fetch("three", progress=False)["c"]
    assert path.read_bytes() == CONTENT[::-1]
    assert not toy.canary.exists()
    assert toy.files() == ["c.bin"]
    if html:
        assets.fetch("one", progress=False)
        assert toy.files() == ["a.bin", "b.bin", "c.bin"]


def test_the_canary_sings_when_pip_is_left_alone(toy, serve, monkeypatch):
    # The control for the test above: a build backend that does run setup.py.
    monkeypatch.setattr(
        download, "_INERT_BACKEND", "exec(open('setup.py').read().split('from')[0])\n"
    )
    serve()
    with pytest.raises(assets.AssetError):
        assets.fetch("three", progress=False)
    assert toy.canary.exists()


def test_an_index_with_another_archive_is_refused(toy, serve):
    serve()
    (toy.web / "toy_wheel-1.0-py3-none-any.whl").write_bytes(wheel({"x": b"evil"}))
    with pytest.raises(assets.AssetError) as caught:
        assets.fetch("one", progress=False)
    assert not isinstance(caught.value, assets.AssetUnavailable)
    assert toy.archives["w"]["sha256"] in str(caught.value)
    assert toy.files() == []


def test_official_address_first_then_the_archive(toy, serve):
    base = serve(index=False)
    (toy.web / "a.bin").write_bytes(CONTENT)
    file = toy.assets["one"]["files"]["a"]
    file["sources"] = [{"url": f"{base}/a.bin"}]
    toy.apply()
    assert assets.fetch("one", progress=False)["a"].read_bytes() == CONTENT
    assert toy.files() == ["a.bin"]
    # wrong bytes at the address, and nothing else to try
    (toy.tmp / "cache" / "assets" / "one" / "a.bin").unlink()
    (toy.web / "a.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(assets.AssetError, match="expected sha256"):
        assets.fetch("one", progress=False)
    assert toy.files() == []
    # the next source is tried
    toy.index(base, html=True)
    file["sources"].append(toy.member("w", "pkg/data/a.bin"))
    toy.apply()
    assert assets.fetch("one", progress=False)["a"].read_bytes() == CONTENT


def test_a_dead_network_is_unavailable_and_names_what_was_tried(toy, serve):
    base = serve(index=False)
    toy.assets["one"]["files"]["a"]["sources"].insert(0, {"url": f"{base}/none.bin"})
    toy.apply()
    with pytest.raises(assets.AssetUnavailable) as caught:
        assets.fetch("one", progress=False)
    assert "none.bin" in str(caught.value)
    assert "404" in str(caught.value)
    assert "toy_wheel" in str(caught.value)
    assert toy.files() == []


def test_offline_stays_off_a_network_that_is_there(toy, serve, monkeypatch):
    base = serve()
    (toy.web / "a.bin").write_bytes(CONTENT)
    toy.assets["one"]["files"]["a"]["sources"].insert(0, {"url": f"{base}/a.bin"})
    toy.apply()
    monkeypatch.setenv("MEDTUT_OFFLINE", "1")
    with pytest.raises(assets.AssetUnavailable, match="MEDTUT_OFFLINE is set"):
        assets.fetch("one", progress=False)
    assert toy.files() == []
    monkeypatch.setenv("MEDTUT_OFFLINE", "0")
    assert assets.fetch("one", progress=False)["a"].read_bytes() == CONTENT


def test_without_pip_the_message_says_so(toy, serve, monkeypatch):
    serve()
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(assets.AssetUnavailable, match="ensurepip"):
        assets.fetch("one", progress=False)


def test_two_processes_fetch_at_once(toy):
    import subprocess

    stick = toy.stick()
    (stick / "toy_wheel-1.0-py3-none-any.whl").write_bytes(toy.wheel)
    code = (
        "import sys; from pathlib import Path\n"
        "from medtut.data import assets, asset_registry\n"
        "r = asset_registry.load_registry(Path(sys.argv[1]))\n"
        "assets.registry = lambda: r\n"
        "for n in ('one', 'two'):\n"
        "    print(*[p.stat().st_size for p in assets.fetch(n, False).values()])\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(toy.tmp / "assets.yml")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:
        out, _ = worker.communicate(timeout=60)
        assert out.split() == [str(len(CONTENT)), "999"]
    assert toy.files() == ["a.bin", "b.bin"]
