"""The content-keyed cache."""

import errno
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from medtut.data import cache


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_over(room: Path) -> list[str]:
    return [str(p) for p in room.rglob("*") if ".making-" in str(p)]


def test_folder_is_the_one_named(room, monkeypatch):
    assert cache.cache_dir() == room
    monkeypatch.setenv("MEDTUT_CACHE", "")
    assert cache.cache_dir().name == "medtut"


def test_same_key_is_made_once_and_another_key_is_another_file(room):
    made = []

    def make(path):
        made.append(path)
        path.write_text(f"made {len(made)}", encoding="utf-8")

    first = cache.cached_file("kind/sub", {"a": 1, "b": [2, "x"]}, make, ".txt")
    again = cache.cached_file("kind/sub", {"b": [2, "x"], "a": 1}, make, ".txt")
    assert first == again
    assert len(made) == 1
    assert first.suffix == ".txt"
    assert first.is_relative_to(room)
    others = [{"a": 2, "b": [2, "x"]}, {"a": "1", "b": [2, "x"]}, {"a": 1}]
    paths = {cache.cached_file("kind/sub", key, make, ".txt") for key in others}
    paths.add(cache.cached_file("other", {"a": 1, "b": [2, "x"]}, make, ".txt"))
    assert len(paths | {first}) == 5
    assert first.read_text(encoding="utf-8") == "made 1"
    assert not left_over(room)


@pytest.mark.parametrize(
    "key", [{"a": Path("x")}, {1: "a"}, [{"a": {2: 3}}], float("nan"), {"a": {1, 2}}]
)
def test_a_key_that_is_not_json_is_refused(key):
    with pytest.raises(cache.CacheError, match="key"):
        cache.cached_file("kind", key, lambda p: p.write_text(""))


@pytest.mark.parametrize("name", ["", "../up", "/abs", "a/../b", "a b", "a\\b"])
def test_a_name_that_leaves_the_cache_is_refused(name):
    with pytest.raises(cache.CacheError, match="Cache name"):
        cache.cached_file(name, 1, lambda p: p.write_text(""))


def test_a_maker_that_fails_leaves_nothing(room):
    def make(path):
        path.write_text("half", encoding="utf-8")
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        cache.cached_file("kind", 1, make)
    assert [p for p in room.rglob("*") if p.is_file()] == []
    assert not left_over(room)
    with pytest.raises(cache.CacheError, match="wrote no file"):
        cache.cached_file("kind", 1, lambda p: None)


def test_a_full_disk_is_said_in_words_and_a_makers_own_file_error_is_its_own():
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    def missing(path):
        Path("not there").read_text(encoding="utf-8")

    with pytest.raises(cache.CacheError, match="MEDTUT_CACHE"):
        cache.cached_file("kind", 1, full)
    with pytest.raises(FileNotFoundError):
        cache.cached_file("kind", 1, missing)


def test_an_unwritable_cache_says_what_to_do(tmp_path, monkeypatch):
    # A file where the folder should be: refused for root too, on every system.
    (tmp_path / "blocked").write_text("", encoding="utf-8")
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "blocked"))
    with pytest.raises(cache.CacheError, match=r"blocked.*MEDTUT_CACHE"):
        cache.cached_file("kind", 1, lambda p: p.write_text(""))


def test_arrays_come_back_the_same_the_first_time_and_later():
    made = []

    def make():
        made.append(1)
        return {"x": np.arange(6, dtype=np.int16).reshape(2, 3), "y": np.float32(0.5)}

    for _ in range(2):
        got = cache.cached_arrays("arrays", {"v": 1}, make)
        assert got["x"].dtype == np.int16
        np.testing.assert_array_equal(got["x"], [[0, 1, 2], [3, 4, 5]])
        assert got["y"].shape == ()
    assert len(made) == 1
    with pytest.raises(cache.CacheError, match="objects"):
        cache.cached_arrays("arrays", 2, lambda: {"x": np.array([{}])})


@pytest.mark.parametrize("damage", [b"", b"not a zip", None])
def test_an_unreadable_entry_is_made_again(damage):
    values = np.arange(1000.0)
    cache.cached_arrays("arrays", 1, lambda: {"x": values})
    path = cache.entry_path("arrays", 1, ".npz")
    path.write_bytes(path.read_bytes()[:4000] if damage is None else damage)
    got = cache.cached_arrays("arrays", 1, lambda: {"x": values})
    np.testing.assert_array_equal(got["x"], values)


def _write_slowly(path: Path) -> None:
    # Many small writes: if the other process saw this file, it would be a short one.
    with open(path, "wb") as file:
        for i in range(2000):
            file.write(i.to_bytes(4, "little") * 64)
            file.flush()


def _worker(folder: str, barrier, results) -> None:
    import os

    os.environ["MEDTUT_CACHE"] = folder
    barrier.wait(timeout=60)
    sizes = []
    for key in range(5):
        path = cache.cached_file("kind", key, _write_slowly)
        sizes.append(path.stat().st_size)
    results.put(sizes)


def test_two_processes_at_once_both_get_a_whole_file(room):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_worker, args=(str(room), barrier, results))
        for _ in range(2)
    ]
    for w in workers:
        w.start()
    sizes = [results.get(timeout=60) for _ in workers]
    for w in workers:
        w.join(timeout=60)
    assert sizes == [[2000 * 256] * 5] * 2
    assert not left_over(room)
