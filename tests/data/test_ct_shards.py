"""Tar shards that say when they are not whole."""

import io
import json
import tarfile

import numpy as np
import pytest
from ct_small import ct_rate

from medtut.data.ct_rate import find_volumes, text
from medtut.data.ct_shards import read_shards, write_shards
from medtut.data.ct_volume import CTError

SHAPE = (3, 4, 5)


@pytest.fixture
def records(tmp_path):
    return find_volumes(ct_rate(tmp_path / "set"))


@pytest.fixture
def volumes():
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (4, *SHAPE)).astype(np.float16)


@pytest.fixture
def shards(records, volumes, tmp_path):
    return write_shards(records, tmp_path / "shards", 3, volumes)


def rewrite(path, change):
    """Write a shard anew from changed members, with an index that believes it."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    change(members)
    ends = {}
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index = json.loads((beside := path.with_name(path.name + ".json")).read_text())
    from medtut.data.download import sha256_of

    ends = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    beside.write_text(json.dumps(index | ends))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_round_trip(records, volumes, shards, tmp_path):
    assert [p.name for p in shards] == ["shard-000000.tar", "shard-000001.tar"]
    folder = tmp_path / "shards"
    for pattern in (folder, folder / "*.tar", str(folder / "shard-*.tar"), shards):
        samples = list(read_shards(pattern))
        assert [s["key"] for s in samples] == [r.key for r in records]
    for sample, record, volume in zip(samples, records, volumes, strict=True):
        assert np.array_equal(sample["volume"], volume)
        assert sample["text"] == text(record)
        assert np.array_equal(sample["labels"], record.labels)
        assert (sample["name"], sample["patient"]) == (record.name, record.patient)
    with tarfile.open(shards[0]) as tar:
        assert tar.getnames()[:3] == [
            "train_2_a_1.npy", "train_2_a_1.txt", "train_2_a_1.json"
        ]  # fmt: skip


def test_same_input_same_bytes(records, volumes, shards, tmp_path):
    again = write_shards(records, tmp_path / "again", 3, volumes)
    for one, other in zip(shards, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_shuffled_by_seed(records, volumes, tmp_path):
    many = write_shards(records, tmp_path / "one_each", 1, volumes)

    def order(paths, seed):
        return [s["key"] for s in read_shards(paths, seed)]

    plain = [r.key for r in records]
    assert order(many, 1) == order(many, 1)
    assert sorted(order(many, 1)) == sorted(plain)
    assert len({tuple(order(many, seed)) for seed in range(8)}) > 3
    # One shard: within it too.
    (one,) = write_shards(records, tmp_path / "all_in_one", 9, volumes)
    assert len({tuple(order([one], seed)) for seed in range(8)}) > 3
    for sample in read_shards([one], 3):
        place = plain.index(sample["key"])
        assert np.array_equal(sample["volume"], volumes[place])


def test_a_truncated_shard_is_refused_at_every_length(shards):
    whole = shards[0].read_bytes()
    ends = json.loads(shards[0].with_name(shards[0].name + ".json").read_text())["ends"]
    places = list(ends.values())
    assert places == sorted(places)
    assert places[-1] <= len(whole)
    # At the end of the first volume tarfile itself sees nothing wrong:
    shards[0].write_bytes(whole[: places[0]])
    with tarfile.open(shards[0]) as tar:
        assert len(tar.getnames()) == 3
    for size in (0, 100, places[0] - 1, places[0], places[1] + 700, len(whole) - 1):
        shards[0].write_bytes(whole[:size])
        with pytest.raises(
            CTError, match=r"shard-000000\.tar has .* cut off"
        ) as caught:
            list(read_shards(shards))
        lost = [k for k, end in ends.items() if end > size]
        assert (f"from key {lost[0]} on" in str(caught.value)) if lost else True
    shards[0].write_bytes(whole + bytes(512))
    with pytest.raises(CTError, match="too long"):
        list(read_shards(shards))


def test_one_changed_byte_is_refused(shards):
    content = bytearray(shards[1].read_bytes())
    content[700] ^= 1  # within the array
    shards[1].write_bytes(content)
    with pytest.raises(CTError, match=r"shard-000001\.tar is not the file"):
        list(read_shards(shards))
    assert len(list(read_shards(shards, verify=False))) == 4


def test_no_index_or_a_broken_one(shards):
    beside = shards[0].with_name(shards[0].name + ".json")
    for content in ("{", "[]", "{}"):
        beside.write_text(content)
        with pytest.raises(CTError, match="no good index"):
            list(read_shards(shards))
    beside.unlink()
    with pytest.raises(CTError, match="no good index"):
        list(read_shards(shards))


@pytest.mark.parametrize("suffix", [".npy", ".txt", ".json"])
def test_a_missing_member_is_named(shards, suffix):
    rewrite(shards[0], lambda m: m.pop("train_10_a_1" + suffix))
    with pytest.raises(CTError, match=rf"000000.*key train_10_a_1: .*{suffix}"):
        list(read_shards(shards))


def test_bad_members_are_named(shards):
    volume = np.zeros(SHAPE, np.float16)
    nan = volume.copy()
    nan[1, 2, 3] = np.nan
    cases = {
        "NaN": npy(nan),
        "infinite": npy(np.full(SHAPE, np.inf, np.float16)),
        "shape": npy(volume[:2]),
        "float32": npy(volume.astype(np.float32)),
        "damaged": npy(volume)[:-3],
    }
    for said, content in cases.items():
        rewrite(shards[0], lambda m, c=content: m.update({"train_10_a_1.npy": c}))
        with pytest.raises(CTError, match=rf"000000.*key train_10_a_1.*{said}"):
            list(read_shards(shards))
    rewrite(shards[0], lambda m: m.update({"train_10_a_1.npy": npy(volume)}))
    assert len(list(read_shards(shards))) == 4
    rewrite(shards[0], lambda m: m.update({"train_10_a_1.json": b"{}"}))
    with pytest.raises(CTError, match="key train_10_a_1 is damaged"):
        list(read_shards(shards))


def test_nothing_bad_is_written(records, volumes, tmp_path):
    volumes[2, 0, 0, 0] = np.nan
    with pytest.raises(CTError, match=r"key train_10_a_2: 1 of 60 values are NaN"):
        write_shards(records, tmp_path / "x", 9, volumes)
    assert not list((tmp_path / "x").iterdir()), "no half a shard"
    with pytest.raises(CTError, match="3 volumes for 4 records"):
        write_shards(records, tmp_path / "x", 9, volumes[:3])
    with pytest.raises(CTError, match="is twice"):
        write_shards([records[0]] * 4, tmp_path / "x", 9, volumes)


def test_nothing_is_overwritten(records, volumes, shards, tmp_path):
    with pytest.raises(CTError, match="has shards already"):
        write_shards(records, tmp_path / "shards", 1, volumes)
    with pytest.raises(CTError, match="No shard"):
        list(read_shards(tmp_path / "none"))


def test_records_are_prepared_where_no_volumes_are_given(
    records, tmp_path, monkeypatch
):
    from medtut.data import ct_shards

    seen = []
    fake = np.zeros((4, *SHAPE), np.float16)
    monkeypatch.setattr(ct_shards, "load", lambda r: (seen.append(r), fake)[1])
    assert len(write_shards(records, tmp_path / "y", 2)) == 2
    assert seen == [records]
