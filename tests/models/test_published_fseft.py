"""The numbers of the autopsy, from the published recipe written anew."""

import copy
import math
import random

import numpy as np
import pytest
import torch

from medtut.errors import MedtutError
from medtut.models.published_fseft import (
    PublishedPHM,
    published_bias,
    published_compacter,
    published_dice,
    published_ground_truth,
    published_support,
    relative_change,
)
from medtut.models.swin_unetr import build_swin_unetr


@pytest.fixture(scope="module")
def published_size():
    return build_swin_unetr()


@pytest.fixture(scope="module")
def small():
    return build_swin_unetr(12, 1).eval()


def sizes(model):
    return {name: p.numel() for name, p in model.named_parameters()}


def test_bias_is_mostly_position_tables(published_size):
    chosen = published_bias(published_size)
    tables = {n: s for n, s in chosen.items() if n.endswith("position_bias_table")}
    assert sum(chosen.values()) == 210_690
    assert sum(tables.values()) == 197_730 == 13**3 * 2 * (3 + 6 + 12 + 24)
    assert sum(chosen.values()) - sum(tables.values()) == 12_960 == 9 * 1_440
    assert sum(tables.values()) / sum(chosen.values()) == pytest.approx(
        0.9385, abs=1e-4
    )
    swin = {n: s for n, s in sizes(published_size).items() if n.startswith("swinViT.")}
    every = sum(s for n, s in swin.items() if n.endswith(".bias"))
    assert every == 21_648
    assert every + sum(tables.values()) == 219_378
    assert set(chosen) < set(swin)


def test_compacter_counts(published_size):
    model = copy.deepcopy(published_size)
    before = sizes(model)
    trained = published_compacter(model)
    after = sizes(model)
    assert set(before) < set(after)  # no pretrained tensor is renamed
    added = sum(s for n, s in after.items() if n not in before)
    # two maps per block: n^3 + C^2 / n + C
    widths = [48, 48, 96, 96, 192, 192, 384, 384]
    assert added == sum(2 * (64 + c * c // 4 + c) for c in widths) == 199_744
    norms = {n for n in trained if n in before}
    assert sum(before[n] for n in norms) == 17_280
    assert sum(after[n] for n in trained) == 217_024


def test_compacter_map():
    torch.manual_seed(0)
    layer = PublishedPHM(16)
    assert layer.rule.std().item() == pytest.approx(0.01, rel=0.3)
    bound = math.sqrt(2) * math.sqrt(6 / 8)  # Xavier of a 4 x 4 block
    assert 0.8 * bound < layer.weight.abs().max() <= bound
    x = torch.randn(2, 3, 16)
    H = torch.zeros(16, 16)
    for a in range(4):
        for b in range(4):
            block = sum(layer.rule[i, a, b] * layer.weight[i] for i in range(4))
            H[4 * a : 4 * a + 4, 4 * b : 4 * b + 4] = block
    assert torch.allclose(layer(x), x @ H, atol=1e-6)
    ratios = []
    for seed in range(8):
        torch.manual_seed(seed)
        big, y = PublishedPHM(192), torch.randn(64, 192)
        ratios.append(float((big(y).norm() / y.norm()).detach()))
    assert 0.03 < np.mean(ratios) < 0.09  # "about 0.06"


def test_compacter_wipes_the_features_and_ours_do_not(small):
    from medtut.adapters import adapt

    x = torch.rand(1, 1, 32, 32, 64, generator=torch.Generator().manual_seed(0))
    adapted = copy.deepcopy(small)
    published_compacter(adapted)
    change = relative_change(small, adapted.eval(), x)
    assert change[0] == 0.0  # the patch embedding comes before any block
    assert all(0.8 < c < 1.5 for c in change[1:]), change
    other = copy.deepcopy(small)
    published_compacter(other, seed=1)
    assert relative_change(adapted, other.eval(), x)[1] < 0.4  # whatever the draw
    for method in ("lora", "adaptformer"):
        ours = copy.deepcopy(small)
        adapt(ours, method)
        assert relative_change(small, ours.eval(), x) == [0.0] * 5
    with torch.no_grad():
        assert not torch.allclose(adapted(x), small(x), atol=0.05)


def test_compacter_replaces_what_it_follows(small):
    model = copy.deepcopy(small)
    published_compacter(model)
    block, plain = (m.swinViT.layers1[0].blocks[0].eval() for m in (model, small))
    x = torch.randn(1, 7, 7, 7, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one = x + block.attn.proj_drop(plain.forward_part1(x, None))
        two = one + block.mlp.drop2(plain.forward_part2(one))
        assert torch.allclose(block(x, None), two, atol=1e-6)


def organ(voxels, shape=(12, 12, 12)):
    mask = np.zeros(shape, np.uint8)
    mask.flat[:voxels] = 1
    return mask


def test_dice_adds_one_to_the_denominator_only():
    dice, recall, precision = published_dice(organ(100), organ(100))
    assert dice == pytest.approx(200 / 201)
    assert round(dice, 3) == 0.995
    assert (recall, precision) == (1.0, 1.0)
    dice, recall, precision = published_dice(organ(0), organ(0))
    assert dice == 0.0
    assert math.isnan(recall)
    assert math.isnan(precision)
    half = np.where(organ(50), 0.6, 0.5)  # 0.5 is background
    dice, recall, precision = published_dice(torch.from_numpy(half), organ(100))
    assert dice == pytest.approx(100 / 151)
    assert (recall, precision) == (0.5, 1.0)
    with pytest.raises(MedtutError, match="is not"):
        published_dice(organ(1), organ(1, (5, 5)))


def test_thirty_shot_is_twenty_nine():
    ids = [f"s{i:04d}" for i in range(41)]
    for k in (1, 5, 10, 29):
        train, held = published_support(ids, k, 1)
        assert len(train) == k
        assert held not in train
    for k in (30, 100):
        train, held = published_support(ids, k, 1)
        assert len(train) == 29
        assert held not in train
    state = random.getstate()
    random.seed(2)  # what the published line does for fold 3
    drawn = random.sample(ids, 6)
    random.setstate(state)
    assert published_support(ids, 5, 3) == (drawn[:-1], drawn[-1])
    # Not nested: what is drawn for k = 5 need not be among the 10.
    assert published_support(ids, 5, 1)[1] == published_support(ids, 10, 1)[0][5]
    # lung_upper_lobe_right_train.txt has 29 lines
    with pytest.raises(ValueError, match="larger than population"):
        published_support(ids[:29], 30, 1)


def test_ground_truth_loses_the_smaller_parts():
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[:3, :3, :3] = 1
    mask[3, 3, 3] = 1  # by a corner: of the same component
    mask[6:, 6:, 6:] = 1
    kept = published_ground_truth(mask)
    assert kept.sum() == 28
    assert not kept[6:, 6:, 6:].any()
    dice, recall, precision = published_dice(mask, kept)  # all of the organ is found
    assert recall == 1.0
    assert precision == pytest.approx(28 / 36)
    assert dice == pytest.approx(56 / 65)
