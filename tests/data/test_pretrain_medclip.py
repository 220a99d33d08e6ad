"""``data_scripts/pretrain_medclip_small.py``: how the small tower was pretrained."""

import copy
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from brain_reports import SliceFacts, entities, entity_names, slice_facts
from torch.nn import functional as F


@pytest.fixture(scope="module")
def script():
    root = Path(__file__).parents[2] / "data_scripts"
    spec = importlib.util.spec_from_file_location(
        "pretrain_medclip_script", root / "pretrain_medclip_small.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def matcher(script):
    torch.manual_seed(0)
    return script.Matcher()


# --- matching --------------------------------------------------------------------


def test_soft_targets_are_shares_that_follow_what_two_reports_have_in_common(script):
    named = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0]])
    shares = script.soft_targets(named[:3], named, sharpness=20.0)
    assert shares.shape == (3, 4)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    first = shares[0]
    assert first[0] == first[3] > first[1] > first[2], "a twin is as good as the own"
    # By hand: exp(20 cos) over its sum.
    cosines = torch.tensor([1, 2 / math.sqrt(6), 0, 1])
    torch.testing.assert_close(first, (20 * cosines).softmax(0))
    even = script.soft_targets(named[:1], named, sharpness=0.0)
    torch.testing.assert_close(even, torch.full((1, 4), 0.25))


def test_loss_prefers_the_right_pairs(script):
    torch.manual_seed(0)
    n = 6
    text = F.normalize(torch.eye(n, 512), dim=1)
    named = torch.eye(n)

    def loss(image, words=text, facts=named):
        return float(script.semantic_matching_loss(image, words, named, facts, 20.0))

    right, shifted = loss(text), loss(text.roll(1, 0))
    unsure = loss(F.normalize(torch.ones(n, 512), dim=1))
    assert right < 1e-4 < math.log(n) / 2 < unsure < shifted
    # Which report stands where does not matter, as long as the facts move with it.
    order = torch.randperm(n)
    moved = loss(text, text[order], named[order])
    assert moved == pytest.approx(right, abs=1e-6)
    # Both directions count: one picture for all leaves only the way back wrong.
    image = text[[0] * n].clone().requires_grad_()
    script.semantic_matching_loss(image, text, named, named, 20.0).backward()
    assert (image.grad.abs().amax(1) > 0).all()


def test_another_report_with_the_same_facts_is_no_mistake(script):
    """MedCLIP's point: it is not the own report alone that fits."""
    text = torch.eye(2, 512)
    same, different = torch.tensor([[1.0, 1], [1, 1]]), torch.eye(2)

    def loss(facts):
        args = (text.roll(1, 0), text, facts, facts, 20.0)
        return float(script.semantic_matching_loss(*args))

    between = F.normalize(text.sum(0, keepdim=True).expand(2, -1), dim=1)
    assert loss(different) > loss(same)
    assert float(
        script.semantic_matching_loss(between, text, same, same, 20.0)
    ) == pytest.approx(math.log(2))


# --- what is kept ----------------------------------------------------------------


@torch.no_grad()
def test_folded_tower_gives_what_the_centred_one_gave(script, matcher):
    model = copy.deepcopy(matcher)
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(4, 1, 224, 224, generator=generator)
    norm = model.centre["image"]
    raw = model.tower(pictures)
    norm.running_mean.copy_(raw.mean(0))
    norm.running_var.copy_(torch.rand(512, generator=generator) * 3 + 0.2)
    model.eval()
    want = norm(model.tower(pictures))
    stages = model.tower.stages(pictures)
    assert (want - model.tower(pictures)).abs().max() > 0.1, (
        "there is something to fold"
    )
    folded = script.fold_centre(model)
    torch.testing.assert_close(folded(pictures), want, rtol=1e-4, atol=1e-4)
    # What a dense decoder reads is not touched.
    for before, after in zip(stages, folded.stages(pictures), strict=True):
        assert torch.equal(before, after)


def test_saved_tower_is_read_by_the_package(script, matcher, tmp_path):
    from medtut.models.medclip_io import load_small_tower

    path = tmp_path / "tower.safetensors"
    script.save_tower(matcher.tower, path, {"seed": 0})
    assert path.stat().st_size < script.LIMIT
    x = torch.randn(1, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    tower = copy.deepcopy(matcher.tower).eval()
    with torch.no_grad():
        gap = (load_small_tower(path)(x) - tower(x)).abs().max()
    assert gap < 0.02 * tower(x).abs().max()  # half precision


# --- pictures and reports --------------------------------------------------------


def brain(column, z):
    """A round head with a lesion at a column; every contrast has its own grey."""
    y, x = np.ogrid[:224, :224]
    head = (y - 112) ** 2 + (x - 112) ** 2 < 80**2
    label = np.zeros((224, 224), np.int64)
    label[(y - 100) ** 2 + (x - column) ** 2 < 18**2] = 2
    label[(y - 100) ** 2 + (x - column) ** 2 < 12**2] = 3
    views = [head * (1.0 + c) + 0.5 * c * (label > 0) for c in range(4)]
    return {
        "image": torch.tensor(np.stack(views), dtype=torch.float32),
        "label": torch.from_numpy(label),
        "case": f"p{column}",
        "z": z,
    }


class Slices:
    """What `Pairs` needs of a SliceDataset."""

    def __init__(self, columns=(60, 165)):
        self.index = [(f"p{c}", z) for c in columns for z in (0, 9)]
        self.items = [brain(c, z) for c in columns for z in (0, 9)]
        self.items[0]["image"][:] = 0  # a level of air

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.fixture(scope="module")
def pairs(script, matcher):
    kinds = {"p60": "glioma", "p165": "meningioma"}
    return lambda train: script.Pairs(Slices(), kinds, matcher.text, train)


def said(text, tokens):
    names = {number: word for word, number in text.index.items()}
    assert 1 not in tokens, "a word that the encoder does not know"
    return " ".join(names[int(t)] for t in tokens if t)


def side_of(picture):
    """Side of the brightest pixels of a contrast in which the lesion is bright."""
    columns = np.nonzero((picture > 0.99 * picture.max()).numpy())[-1]
    return "left" if columns.mean() < picture.shape[-1] / 2 else "right"


def named(vector):
    """Entities as a set of (field, value)."""
    hits = zip(entity_names(), vector, strict=True)
    return dict(name for name, hit in hits if hit)


def test_pairs_leave_air_out_and_show_lesions_twice_in_training(pairs):
    still, moving = pairs(False), pairs(True)
    assert len(still) == 3 * 4  # slices with a head, times contrasts
    assert len(moving) == 2 * 3 * 4
    assert {c for _, c, _ in still.index} == {0, 1, 2, 3}
    assert {height for *_, height in still.index} == {0.0, 1.0}


def test_held_out_pictures_stand_still_and_say_the_same_again(pairs, script):
    data = pairs(False)
    for n in range(len(data)):
        one, two = data[n], data[n]
        i, contrast, height = data.index[n]
        source = data.slices[i]
        assert torch.equal(one["image"], source["image"][contrast : contrast + 1])
        assert torch.equal(one["tokens"], two["tokens"])
        torch.testing.assert_close(one["views"], F.avg_pool2d(source["image"], 4))
        facts = slice_facts(
            source["label"].numpy(),
            script.MODALITIES[contrast],
            data.kinds[source["case"]],
            height,
        )
        assert isinstance(facts, SliceFacts)
        assert torch.equal(one["entities"], torch.from_numpy(entities(facts)))


def test_words_mirror_with_the_picture(pairs, matcher):
    data = pairs(True)
    np.random.seed(0)
    seen = set()
    for n, (i, contrast, _) in enumerate(data.index):
        if contrast == 0:
            continue  # there the lesion is as bright as the head
        for _ in range(3):
            item = data[n]
            # The other contrasts move along; the last shows the lesion best.
            side = side_of(item["views"][3])
            facts = named(item["entities"])
            assert facts["side"] == side
            words = said(matcher.text, item["tokens"]).split()
            assert side in words
            assert {"left": "right", "right": "left"}[side] not in words
            grey = F.avg_pool2d(item["image"], 4)[0]
            overlap = ((grey != 0) == (item["views"][contrast] != 0)).float().mean()
            assert overlap > 0.99, "picture and views are moved alike"
            seen.add((data.slices[i]["case"], side))
    assert seen == {(c, s) for c in ("p60", "p165") for s in ("left", "right")}


def test_jitter_changes_the_scale_and_leaves_air_alone(script):
    image = brain(60, 0)["image"][3:]
    moved = script.jitter(image, np.random.default_rng(0))
    assert ((moved == 0) == (image == 0)).all()
    assert (moved - image)[image != 0].abs().max() > 0.05
    lesion = image == image.max()
    assert moved[lesion].mean() > moved[(image != 0) & ~lesion].mean()


def test_matching_is_perfect_for_towers_that_know_and_chance_for_those_that_do_not(
    script,
):
    facts = [
        SliceFacts("flair", "low", "glioma", side=s, region=r)
        for s in ("left", "right")
        for r in ("anterior", "posterior")
    ]
    vectors = [torch.from_numpy(entities(f)).float() for f in facts]
    samples = [{"image": v, "tokens": v, "entities": v} for v in vectors]

    class Both:
        def __init__(self, knows):
            self.knows = knows

        def embed(self, what, x):
            x = x if self.knows or what == "text" else torch.ones_like(x)
            return F.normalize(x.float(), dim=1)

    good, blind = (
        script.matching(Both(True), samples),
        script.matching(Both(False), samples),
    )
    assert good["score"] == pytest.approx(1)
    assert (good["side"], good["region"]) == (1, 1)
    assert blind["score"] < 0.95
    assert blind["side"] == blind["region"] == 0.5
    assert good["chance"] == blind["chance"] == pytest.approx((1 + 0.8 + 0.8 + 0.6) / 4)
