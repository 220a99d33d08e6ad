"""Lesson 06: regions, losses, training, judgement and arms, on small bodies."""

import math
import re
from itertools import pairwise
from types import SimpleNamespace

import few_shot_small as small
import numpy as np
import pytest
import torch

import medtut.adapters
import medtut.train
from medtut.course.lessons import fseft
from medtut.data.organs import BASE, NOVEL, STRUCTURES
from medtut.data.totalseg import OrganCase
from medtut.evaluate.organs import predict_volume


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """A cache of the module, small patients, a random network."""
    small.forget()
    with pytest.MonkeyPatch.context() as patch:
        settings, drawn = small.open_course(patch, tmp_path_factory.mktemp("l06"))
        before = {k: v.clone() for k, v in network(settings).state_dict().items()}
        yield SimpleNamespace(settings=settings, drawn=drawn)
        # After all that the module ran: nothing has touched the pretrained network.
        after = network(settings).state_dict()
        assert all(torch.equal(v, before[k]) for k, v in after.items())
    small.forget()


def network(settings):
    return fseft.pretrained(fseft.weights_file(settings))


@pytest.fixture
def settings(world):
    return world.settings


@pytest.fixture
def pool(settings):
    return fseft.target_patients("pool", settings)


@pytest.fixture
def test(settings):
    return fseft.target_patients("test", settings)


def nudge(model, done, seed=0, size=0.05):
    """Move what trains, so that no part is at its start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in done.parameters(model):
            p += size * torch.randn(p.shape, generator=rng)
    return model.eval()


# --- regions and losses -------------------------------------------------------------


def test_regions_of_every_patient_alike(settings, pool):
    roi = (16, 20, 24)
    data = fseft.Crops(pool, "base", BASE, roi, length=9)
    assert len(data) == 9
    torch.manual_seed(0)
    first, places = [], set()
    for n in range(60):
        item = data[n]
        assert item["x"].shape == (1, *roi)
        assert item["y"].shape == (9, *roi)
        assert item["known"].all()
        # Where it is from: image and labels were cut at one place.
        case = pool[n % 3].case
        at = np.argwhere(item["y"].numpy().any(0))
        if len(at):
            density = item["x"].numpy()[0][item["y"].numpy().any(0)]
            assert density.min() > 0.2, "organs are brighter than fat"
        shift = item["x"] - fit_of(case.image[0], item["x"][0])
        assert shift.min() >= -0.1001
        assert shift.max() <= 0.1001
        first.append(float(shift.flatten()[0]))
        assert np.ptp(shift.numpy()) < 1e-3, "one shift for all voxels"
        places.add(tuple(at[0]) if len(at) else None)
    moved = np.abs(first) > 1e-4
    assert 3 <= moved.sum() <= 25
    assert len(places) > 20


def fit_of(volume, crop):
    """The region of a volume that differs from a crop by a number only."""
    shape = [v - c + 1 for v, c in zip(volume.shape, crop.shape, strict=True)]
    crop = crop.numpy()
    probe = crop[:4, 0, 0] - crop[0, 0, 0]
    for x, y, z in np.ndindex(*shape):
        line = volume[x : x + 4, y, z]
        if np.abs(line - line[0] - probe).max() < 1e-3:
            end = [a + s for a, s in zip((x, y, z), crop.shape, strict=True)]
            part = volume[x : end[0], y : end[1], z : end[2]]
            if np.ptp(part - crop) < 1e-3:
                return torch.from_numpy(part)
    raise AssertionError("no such region")


def test_features_are_not_shifted_and_unknown_labels_stay_unknown(settings, pool):
    maps = [np.full((12, *settings.roi), n, np.float16) for n in range(3)]
    data = fseft.Crops(pool, "softmax", BASE, (16, 16, 16), maps)
    torch.manual_seed(1)
    for n in range(30):
        item = data[n]
        assert item["x"].shape == (12, 16, 16, 16)
        assert (item["x"] == n % 3).all()
        assert (item["y"].sum(0) == 1).all(), "one of ten for every voxel"
    source = fseft.source_patients("source", settings)
    data = fseft.Crops(source, "pretrain", STRUCTURES, settings.roi)
    for n, one in enumerate(source):
        assert np.array_equal(data[n]["known"], one.case.annotated)
        assert not np.array_equal(data[n]["known"], source[n - 1].case.annotated)


def test_targets_are_of_the_named_structures(pool):
    case = pool[0].case
    for names in (NOVEL, BASE[::-1]):
        got = fseft.task_target(pool[0], "novel", names)
        for name, mask in zip(names, got, strict=True):
            assert np.array_equal(mask, case.labels[case.structures.index(name)])
    soft = fseft.task_target(pool[0], "softmax", BASE)
    assert np.array_equal(soft[0], 1 - case.labels[:9].max(0))
    assert np.array_equal(soft[1:], case.labels[:9])


def test_loss_is_of_separate_organs_or_of_one_choice():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 4, 4, 4, generator=rng)
    y = torch.nn.functional.one_hot(z.argmax(1), 4).movedim(-1, 1).float()
    known = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]]).bool()
    items = {"x": z, "y": y, "known": known}

    def run(model, x):
        return x

    from medtut.models.partial_loss import AdaptationLoss, PartialDice

    assert fseft.Loss("base", run)(None, items) == PartialDice(balance=fseft.BALANCE)(
        z, y, known
    )
    every = PartialDice("background", balance=fseft.BALANCE)(z, y, known)
    assert fseft.Loss("pretrain", run, unlabelled="background")(None, items) == every
    soft = fseft.Loss("softmax", run)(None, items)
    assert soft == AdaptationLoss("softmax", ce=True)(z, y)
    moved = fseft.Loss("softmax", run)(None, items | {"x": z + 3})
    assert moved.item() == pytest.approx(soft.item(), abs=1e-5), "a choice"
    base = fseft.Loss("base", run)
    assert base(None, items | {"x": z + 3}) > base(None, items) + 0.1, "each by itself"
    assert fseft.Loss("base")(lambda x: x, items) == fseft.Loss("base", run)(
        None, items
    )


@pytest.mark.parametrize("task", ["base", "softmax"])
def test_head_on_kept_features_is_the_network(settings, pool, task):
    """The volume is one window: the adapter then sees what it sees in the network."""
    model, done = fseft.start(task, "spatial3", 0, settings)
    nudge(model, done)
    one, maps = pool[0], fseft.features_of(pool[:1], settings)
    assert maps[0].dtype == np.float16
    data = {True: fseft.Crops([one], task, BASE, settings.roi, maps),
            False: fseft.Crops([one], task, BASE, settings.roi)}  # fmt: skip
    losses = {}
    for kept, crops in data.items():
        crops.shift = False
        items = {k: v[None] for k, v in crops[0].items()}
        loss = fseft.Loss(task, fseft.head if kept else None)(model, items)
        loss.backward()
        grad = model.classifier.weight.grad.clone()
        model.zero_grad()
        losses[kept] = loss.item(), grad
    assert losses[True][0] == pytest.approx(losses[False][0], abs=1e-3)
    torch.testing.assert_close(losses[True][1], losses[False][1], atol=1e-3, rtol=0.02)
    assert losses[True][1].abs().max() > 0.01
    # And so are the probabilities, by which it is judged.
    (got,) = fseft.probabilities(model, task, "spatial3", [one], settings)
    way = "softmax" if task == "softmax" else "sigmoid"
    want = predict_volume(model, one.case.image, settings.roi, activation=way)[-9:]
    assert got.shape == (9, *settings.roi)
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert np.ptp(want) > 0.05
    (whole,) = fseft.probabilities(model, task, "lora", [one], settings)
    np.testing.assert_allclose(whole, want, atol=1e-6)


def test_proximal_steps_follow_every_step(monkeypatch):
    steps = []
    monkeypatch.setattr(medtut.adapters, "proximal_step", lambda m, t: steps.append(t))
    items = {"x": torch.zeros(1, 2, 2, 2, 2), "y": torch.zeros(1, 2, 2, 2, 2),
             "known": torch.ones(1, 2)}  # fmt: skip
    for loss in (fseft.Loss("base", lambda m, x: x),
                 fseft.Loss("base", lambda m, x: x, lambda n: n / 10)):  # fmt: skip
        assert not steps
        for _ in range(4):
            loss(None, items)
    assert steps == [0.1, 0.2, 0.3]  # none before the first step


# --- training -----------------------------------------------------------------------


def test_zero_shot_trains_nothing(settings):
    model, done, result = fseft.train("base", "zero_shot", [], 0, 1.0, settings)
    assert (done.total, result) == (0, None)
    state = network(settings).state_dict()
    own = model.state_dict()
    assert all(torch.equal(own[k], state[k]) for k in own if "classifier" not in k)


def test_a_probe_changes_the_head_alone_and_seeds_decide(settings, pool, monkeypatch):
    def weights(method, seed, people=pool[:2], **more):
        got = fseft.train("base", method, people, seed, 1e-2, settings, **more)
        assert got[2].steps == more.get("steps", settings.steps)
        return got[0].state_dict()

    start = fseft.start("base", "probe", 0, settings)[0].state_dict()
    one, same, other = (weights("probe", seed, steps=3) for seed in (0, 0, 1))
    for key, value in one.items():
        assert torch.equal(value, same[key]), key
        assert torch.equal(value, start[key]) == ("classifier" not in key), key
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    lora, again = (weights("lora", 0) for _ in range(2))
    assert all(torch.equal(v, again[k]) for k, v in lora.items())
    changed = {k for k in start if k in lora and not torch.equal(lora[k], start[k])}
    assert changed == {"classifier.weight", "classifier.bias"}
    grown = {k for k, v in lora.items() if "lora_B_" in k and v.any()}
    assert len(grown) == 24


def stub(monkeypatch, told):
    def fit(model, loss, data, config, **more):
        told.update(model=model, loss=loss, data=data, config=config, more=more)
        return SimpleNamespace(seconds=0.0)

    monkeypatch.setattr(medtut.train, "fit", fit)


def test_who_gets_what_to_train_with(settings, pool, monkeypatch):
    told = {}
    stub(monkeypatch, told)
    long = settings.model_copy(update={"steps": 40, "batch_size": 2})
    for task, method in (("base", "probe"), ("novel", "probe"), ("base", "lora")):
        fseft.train(task, method, pool[:2], 5, 0.01, long)
        kept = (task, method) == ("base", "probe")
        assert (told["loss"].run is fseft.head) == kept
        assert told["data"].shift == (not kept)
        assert told["data"].inputs[0].shape[0] == (12 if kept else 1)
        assert len(told["data"]) == 80
        c = told["config"]
        assert (c.steps, c.lr, c.seed, c.batch_size) == (40, 0.01, 5, 2)
        assert (c.weight_decay, c.clip_norm, c.warmup) == (0.01, 1.0, 2)
        assert not c.groups
        assert told["loss"].shrink is None
    fseft.train("novel", "adaptive", pool[:2], 5, 0.01, long, 20)
    shrink, config = told["loss"].shrink, told["config"]
    assert config.steps == 20
    steps = [shrink(n) for n in range(1, 20)]
    # A diagonal that nothing holds is zero after half of the run ...
    assert sum(steps[:9]) == pytest.approx(1.2, abs=0.15)
    assert sum(steps) > 1.3
    assert all(a > b > 0 for a, b in pairwise(steps))
    # ... and it can move twice as fast as it is pulled, at every step.
    ((pattern, factor),) = config.groups.items()
    named = dict(told["model"].named_parameters())
    moved = [n for n in named if re.search(pattern, n)]
    assert len(moved) == 24  # q, k and v of eight layers
    assert all((named[n] == 1).all() for n in moved)
    for n in (1, 7, 15):
        assert 0.01 * factor * config.lr_factor(n) == pytest.approx(
            2 * shrink(n), rel=0.15
        )
    assert math.isclose(shrink(0), 3 / 20)


# --- judgement ----------------------------------------------------------------------


def fine_patient():
    """A line of four voxels of 2 mm, in a file of eight of 1 mm."""
    coarse, fine = np.diag([2.0, 2, 2, 1]), np.diag([1.0, 2, 2, 1])
    fine[0, 3] = -0.5
    image = np.zeros((1, 4, 2, 2), np.float32)
    record = SimpleNamespace(id="line")
    case = OrganCase(record, BASE, image, np.zeros((9, 4, 2, 2), np.uint8),
                     np.ones(9, bool), (), coarse, (fine, (8, 2, 2)))  # fmt: skip
    return fseft.Patient(case, np.zeros((8, 2, 2), np.uint8))


def test_probabilities_are_cut_after_they_are_interpolated():
    one = fine_patient()
    p = np.array([0.9, 0.3, 0, 0], np.float32)[None, :, None, None].repeat(2, 2)
    p = p.repeat(2, 3)
    # Voxels of the file lie at -0.25, 0.25, 0.75, 1.25 ...: 0.9, 0.75, 0.45, 0.225
    found = fseft.decide(p, one, "base")[0, :, 0, 0]
    assert found.tolist() == [True, True, False, False] + 4 * [False]
    p[0, :, :, :] = np.array([0.9, 0.45, 0.0, 0.0])[:, None, None]
    # 0.9, 0.7875, 0.5625, 0.34: cut first, the third voxel would not be found.
    found = fseft.decide(p, one, "base")[0, :, 0, 0]
    assert found.tolist() == [True, True, True, False] + 4 * [False]
    assert found.dtype == bool


def test_a_softmax_chooses_one_or_none():
    one = fine_patient()
    p = np.zeros((3, 4, 2, 2), np.float32)
    p[:, 0] = np.array([0.4, 0.35, 0.0])[:, None, None]  # background 0.25
    p[:, 1] = np.array([0.1, 0.3, 0.15])[:, None, None]  # background 0.45
    p[:, 2:] = np.array([0.2, 0.1, 0.65])[:, None, None, None]
    found = fseft.decide(p, one, "softmax")[:, :, 0, 0]
    assert found[:, 0].tolist() == [True, False, False], "below one half, yet chosen"
    assert found[:, 7].tolist() == [False, False, True]
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4, 4, 2, 2)).astype("f4")
    p = np.exp(z) / np.exp(z).sum(0)
    found = fseft.decide(p[1:], one, "softmax")
    assert found.sum(0).max() == 1
    assert found.sum(0).min() == 0
    assert found.any((1, 2, 3)).sum() > 1


@pytest.mark.parametrize("task", ["base", "softmax", "novel"])
def test_the_truth_has_a_dice_of_one(settings, test, task, monkeypatch):
    names = fseft.TASKS[task]

    def truth(model, task, method, people, settings):
        places = [test[0].case.structures.index(n) for n in names]
        return [p.case.labels[places].astype(np.float32) for p in people]

    monkeypatch.setattr(fseft, "probabilities", truth)
    table = fseft.dice_table(None, task, "lora", test, settings)
    assert table.shape == (3, len(names))
    lost = np.isnan(table)
    assert np.argwhere(lost).tolist() == ([] if task == "novel" else [[2, 2]])
    assert (table[~lost] == 1).all()
    monkeypatch.setattr(fseft, "probabilities", lambda *a: truth(*a)[::-1])
    wrong = fseft.dice_table(None, task, "lora", test, settings)
    assert np.nanmean(wrong) < 0.9
    assert (np.nan_to_num(wrong[1], nan=1) == 1).all()
