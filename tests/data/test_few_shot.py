"""The few-shot protocol: nested, disjoint, saved; k means k."""

import json

import pytest

from medtut.data.few_shot import (
    Protocol,
    draw_protocol,
    leave_one_out,
    load_protocol,
    published_support,
    save_protocol,
)
from medtut.data.organs import OrganError

POOL, TEST = [f"s{i:03}" for i in range(40)], [f"t{i}" for i in range(5)]


def draw(**how):
    return draw_protocol(**{"pool": POOL, "test": TEST, "name": "spleen"} | how)


def test_supports_are_nested_and_disjoint():
    protocol = draw(shots=(10, 1, 30, 5), seeds=6, validation=3)
    assert protocol.shots == (1, 5, 10, 30)
    for seed in range(6):
        before = ()
        for k in protocol.shots:
            support = protocol.support(k, seed)
            assert len(set(support)) == k, "k means k, also 30"
            assert support[: len(before)] == before
            before = support
        others = {*protocol.validation[seed], *protocol.test}
        assert len(protocol.validation[seed]) == 3
        assert not set(before) & others
    assert len({protocol.support(10, s) for s in range(6)}) == 6
    assert protocol.test == tuple(TEST)


def test_a_seed_stays_what_it_was():
    """More seeds, another order of the pool or smaller k change no draw."""
    protocol = draw(seeds=3)
    assert draw(seeds=5, pool=POOL[::-1]).orders[:3] == protocol.orders
    assert draw(shots=(1, 5), seeds=3).support(5, 2) == protocol.support(5, 2)
    assert protocol.support(1, 0) != protocol.support(1, 1)


def test_what_was_not_drawn():
    protocol = draw(seeds=2)
    for k, seed in ((2, 0), (1, 2), (1, -1)):
        with pytest.raises(
            OrganError, match=r"has k in \(1, 5, 10\) and seeds below 2"
        ):
            protocol.support(k, seed)


def test_refused():
    with pytest.raises(OrganError, match=r"1 volumes \(s003\) .*test set.*overlap"):
        draw(test=[*TEST, "s003"])
    with pytest.raises(OrganError, match=r"1 volumes \(s001\) stand twice"):
        draw(pool=[*POOL, "s001"])
    with pytest.raises(OrganError, match=r"k = 30 and 11 for validation need 41.* 40"):
        draw(shots=(1, 30), validation=11)
    with pytest.raises(OrganError, match=r"2 volumes \(s000, s007\) have no voxel"):
        draw(voxels={i: 10 * (i != "s000") for i in POOL if i != "s007"})
    for bad in ({"shots": ()}, {"shots": (0, 1)}, {"seeds": 0}, {"test": []}):
        with pytest.raises(OrganError, match=r"Each k must be at least 1"):
            draw(**bad)
    assert draw(voxels=dict.fromkeys(POOL, 1)) == draw()


def test_an_edited_protocol_is_checked_too():
    good = ("x", (1, 2), (("a", "b"),), (("v",),), ("t",))
    assert Protocol(*good).support(2, 0) == ("a", "b")
    for at, bad, said in (
        (2, (("a", "t"),), "t in more than one"),
        (2, (("a", "a"),), "a in more than one"),
        (3, (("b",),), "b in more than one"),
        (4, ("t", "t"), "t in more than one"),
        (2, (("a", "b", "c"),), "3 support volumes, k = 2"),
        (1, (2, 1), "shots"),
        (1, (1, 1, 2), "shots"),
    ):
        with pytest.raises(OrganError, match=said):
            Protocol(*good[:at], bad, *good[at + 1 :])


def test_leave_one_out():
    assert leave_one_out(("a",)) == leave_one_out(("a", "b")) == ()
    folds = leave_one_out(("a", "b", "c"))
    assert folds == ((("b", "c"), "a"), (("a", "c"), "b"), (("a", "b"), "c"))


def test_the_published_draw():
    """30-shot is 29, and the support of k = 1 is not always in that of k = 5."""
    for k in (1, 5, 10):
        train, left = published_support(POOL, k, 1)
        assert len(train) == k
        assert left not in train
    assert len(published_support(POOL, 30, 1)[0]) == 29
    assert len(published_support(POOL[:30], 30, 1)[0]) == 29
    assert published_support(POOL, 5, 2) == published_support(POOL, 5, 2)
    nested = [
        set(published_support(POOL, 1, f)[0]) <= set(published_support(POOL, 5, f)[0])
        for f in range(1, 21)
    ]
    print(f"published support of k = 1 within that of k = 5: {sum(nested)} of 20")


def test_saved_and_read_back(tmp_path):
    path, protocol = tmp_path / "p" / "spleen.json", draw(validation=2)
    assert save_protocol(path, protocol) == path
    assert load_protocol(path) == protocol
    assert load_protocol(path, [*POOL, *TEST, "new"]) == protocol
    assert save_protocol(path, protocol) == path, "the same one again"
    assert [p.name for p in path.parent.iterdir()] == ["spleen.json"]
    with pytest.raises(OrganError, match=r"spleen.json holds another protocol"):
        save_protocol(path, draw(seeds=4))
    with pytest.raises(OrganError, match=r"names 1 volumes that are not there \(t0\)"):
        load_protocol(path, [*POOL, *TEST[1:]])


def test_damaged(tmp_path):
    path = save_protocol(tmp_path / "p.json", draw())
    content = json.loads(path.read_text())
    content["orders"][0][0] = "s999"
    path.write_text(json.dumps(content))
    with pytest.raises(OrganError, match=r"p.json is no protocol.*digest differs"):
        load_protocol(path)
    for text in ("", "[1]", "{}", path.read_text()[:50]):
        path.write_text(text)
        with pytest.raises(OrganError, match="is no protocol"):
            load_protocol(path)
    with pytest.raises(OrganError, match="is no protocol"):
        load_protocol(tmp_path / "none.json")
