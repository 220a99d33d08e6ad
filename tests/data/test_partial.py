"""The registry of partly labelled sets, and the sampler that balances them."""

from collections import Counter

import numpy as np
import pytest

from medtut.data.organs import STRUCTURES, OrganError
from medtut.data.partial import (
    BalancedSampler,
    annotated_mask,
    pretraining_sets,
    set_of,
)


def test_the_registry():
    sets = pretraining_sets()
    assert len({s["set"] for s in sets.values()}) == 9
    assert sum(s["listed"] for s in sets.values()) == 2042
    assert sum(s["listed"] for s in sets.values() if s["set"] == "MSD") == 661
    seen = set()
    for name, one in sets.items():
        keys = "set folder listed cases where terms cite layout native ids note"
        assert " ".join(one) == keys, name
        assert 0 < one["listed"] <= one["cases"]
        assert one["where"].startswith("http")
        seen |= set(one["ids"])
        halves = {}
        for structure, at in one["ids"].items():
            assert structure in STRUCTURES
            if isinstance(at, list):
                halves.setdefault(at[0], set()).add(at[1])
                assert structure.endswith(at[1])
        assert all(sides == {"left", "right"} for sides in halves.values())
        plain = [at for at in one["ids"].values() if isinstance(at, int)]
        ids = sorted([*plain, *halves])
        assert ids == list(range(1, len(ids) + 1)), name
        image, labels = one["layout"]
        assert image != labels
        assert image.count("{}") == labels.count("{}") == 1
        assert set_of(f"{one['folder']}/{image}", "here") is one
    assert seen == set(STRUCTURES), "every structure of the template is somewhere"


def test_a_set_that_nobody_knows():
    with pytest.raises(OrganError, match=r"list, line 3: 02_New/a.*01_Multi-Atlas"):
        set_of("02_New/a.nii.gz", "list, line 3")
    with pytest.raises(OrganError, match="no known set"):
        set_of("04_LiTSother/img/a.nii.gz", "here")


def test_annotated_mask():
    mask = annotated_mask(("liver", "spleen", "unheard of"))
    assert mask.dtype == bool
    assert mask.shape == (29,)
    assert [STRUCTURES[i] for i in np.flatnonzero(mask)] == ["spleen", "liver"]
    assert not annotated_mask(()).any()
    assert annotated_mask(("b",), ("a", "b")).tolist() == [False, True]


GROUPS = ["A"] * 50 + ["B"] * 3 + ["C"] * 7


def test_every_group_as_often():
    sampler = BalancedSampler(GROUPS, 90, seed=1)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 90
    assert Counter(GROUPS[i] for i in drawn) == {"A": 30, "B": 30, "C": 30}
    counts = Counter(drawn)
    assert max(counts[i] for i in range(50)) == 1, "none twice before all came"
    assert {counts[i] for i in (50, 51, 52)} == {10}
    assert {counts[i] for i in range(53, 60)} == {4, 5}
    for start in range(0, 90, 3):
        assert len({GROUPS[i] for i in drawn[start : start + 3]}) == 3
    assert len(list(BalancedSampler(GROUPS))) == 60


def test_seeded_and_new_in_every_epoch():
    one, same = BalancedSampler(GROUPS, seed=3), BalancedSampler(GROUPS, seed=3)
    first = list(one)
    assert list(one) == list(same) == first
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first
    assert list(BalancedSampler(GROUPS, seed=4)) != first
    assert (
        len({tuple(GROUPS[i] for i in first[n : n + 3]) for n in range(0, 60, 3)}) > 2
    )


def test_with_a_loader():
    from torch.utils.data import DataLoader

    sampler = BalancedSampler(GROUPS, 30)
    loader = DataLoader(range(60), 3, sampler=sampler)
    assert [i for batch in loader for i in batch.tolist()] == list(sampler)


def test_nothing_to_draw():
    for groups, length in (([], None), (["A"], 0)):
        with pytest.raises(OrganError, match=r"BalancedSampler: .*at least 1"):
            BalancedSampler(groups, length)
