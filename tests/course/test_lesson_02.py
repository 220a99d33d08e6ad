"""The designs of lesson 02: what they train, what they see, how they are judged."""

import copy
import json
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medtut.course.lessons import l02, medclip
from medtut.course.lessons.medclip import DESIGNS, build
from medtut.course.profiles import PROFILES, SettingsError, resolve
from medtut.data.brats_slices import SliceDataset
from medtut.errors import MedtutError
from tests.data.brats_small import SHAPE, arrays, write_case

LESSON = "02"
TUMOUR = [int(z) for z in np.flatnonzero(arrays(0)[1].any((0, 1)))]  # in every case
PATIENTS = {"train_patients": 4, "validation_patients": 1, "test_patients": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Nine patients, and a cache of their own."""
    folder = tmp_path_factory.mktemp("brats")
    for i in range(9):
        write_case(folder / "set", f"p{i}", seed=i)
    return folder


@pytest.fixture(autouse=True)
def surroundings(root, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(root / "cache"))
    monkeypatch.delenv("MEDTUT_PROFILE", raising=False)


@pytest.fixture
def settings(root):
    def made(**changes):
        small = {**PATIENTS, "level_step": 2, "steps": 2, "batch_size": 2}
        return resolve(LESSON, "smoke", {"data": str(root / "set"), **small, **changes})

    return made


@pytest.fixture
def task(settings):
    return medclip.load_task(settings())


@pytest.fixture(scope="module")
def random_tower():
    from medtut.models.medclip import SwinTower

    torch.manual_seed(0)
    return SwinTower("small").eval()


@pytest.fixture
def tower(random_tower, monkeypatch):
    """A random tower stands in for the pretrained one."""
    from medtut.models import medclip_io

    monkeypatch.setattr(
        medclip_io, "load_small_tower", lambda: copy.deepcopy(random_tower)
    )
    return random_tower


class Known(nn.Module):
    """Answers with the label of a picture it has seen, else with background."""

    def __init__(self, data):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.labels = {i["image"].numpy().tobytes(): i["label"] for i in data}
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        nothing = torch.zeros(x.shape[-2:], dtype=torch.long)
        found = [self.labels.get(i.numpy().tobytes(), nothing) for i in x]
        return 20.0 * F.one_hot(torch.stack(found), 4).movedim(-1, 1).float()


def known(task, arm):
    cases = list(task.cases.values())
    data = SliceDataset(cases, arm.modalities, arm.normalise, slices="all")
    return Known(data[i] for i in range(len(data)))


# --- settings --------------------------------------------------------------------


def test_presets_fit_the_schema_and_full_has_the_published_values():
    assert set(l02.PRESETS) == set(PROFILES)
    found = {name: resolve(LESSON, name) for name in PROFILES}
    for one in found.values():
        assert (one.rank, one.alpha, one.dropout) == (8, 16, 0.1)
    assert (found["full"].tower, found["full"].batch_size) == ("tiny", 2)
    assert found["quick"].tower == found["smoke"].tower == "small"
    patients = [getattr(found["full"], f"{p}_patients") for p in medclip_parts()]
    assert sum(patients) == 368  # of BraTS 2020, as many as the source saw


def medclip_parts():
    return ("train", "validation", "test")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"alpha": 0}, "alpha = 0"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"steps": "ten"}, "steps = 'ten'.*whole number"),
        ({"tower": "base"}, "tower = 'base'"),
        ({"test_patients": 2}, "test_patients = 2"),
        ({"level_step": 0}, "level_step = 0"),
        ({"oracle_slices": 1}, "oracle_slices = 1"),
        ({"train_patient": 3}, "unknown setting.*did you mean 'train_patients'"),
    ],
)
def test_wrong_settings_are_refused(given, says):
    with pytest.raises(SettingsError, match=f"(?s){says}"):
        resolve(LESSON, "quick", given)


def test_each_arm_differs_from_the_main_one_in_what_its_name_says():
    def changed(arm, base):
        names = [f.name for f in fields(arm)]
        return {n for n in names if getattr(arm, n) != getattr(base, n)}

    base = DESIGNS["lora"]
    found = {name: changed(arm, base) for name, arm in DESIGNS.items()}
    assert found == {
        "published": {"dense", "published_loss", "longer"},
        "lora": set(),
        "head": {"method"},
        "dora": {"method"},
        "full": {"method"},
        "vector": {"dense"},
        "lora_4": {"modalities"},
        "leaky": {"leaky"},
    }
    assert [DESIGNS[n].method for n in ("head", "dora", "full")] == [
        "head",
        "dora",
        "full",
    ]
    assert DESIGNS["published"].longer > 1  # the baseline gets more, never less
    assert DESIGNS["published"].normalise == "slice"
    assert {DESIGNS[n].normalise for n in DESIGNS if n != "published"} == {"brain"}


def test_arms_of_the_sweep_are_the_designs_at_the_same_settings():
    assert set(l02.ARMS) == set(DESIGNS)
    assert not any(l02.ARMS.values())
    assert {*l02.RATE_OF, *l02.RATE_OF.values(), *l02.LEAK} <= set(DESIGNS)
    assert l02.TUNING_SEED not in range(5)


# --- patients and slices ---------------------------------------------------------


def test_parts_share_no_patient_and_stay_the_same(settings, task):
    parts = [getattr(task.split, p) for p in medclip_parts()]
    assert [len(p) for p in parts] == [4, 1, 3]
    everyone = [i for part in parts for i in part]
    assert len(set(everyone)) == 8
    assert everyone != sorted(everyone)
    again = medclip.load_task(settings(seed=7))
    assert again.split == task.split, "the seed of a run does not move the patients"
    assert [c.id for c in task.part("test")] == list(task.split.test)


def test_folder_with_too_few_patients_is_refused(settings, root):
    with pytest.raises(MedtutError) as caught:
        medclip.load_task(settings(train_patients=6))
    text = str(caught.value)
    assert str(root / "set") in text
    assert "holds 9 cases" in text
    assert "6 + 1 + 3" in text
    assert "train_patients" in text


def levels_wanted(step):
    rest = [z for z in range(0, SHAPE[2], 4 * step) if z not in TUMOUR]
    return sorted([z for z in TUMOUR if z % step == 0] + rest)


@pytest.mark.parametrize("step", [1, 2])
def test_tumour_levels_are_kept_and_a_quarter_of_the_others(task, step):
    arm = DESIGNS["lora"]
    data, used = medclip.slices_of(task, ("validation", "test"), arm, step)
    wanted = [
        (case, z)
        for case in (*task.split.validation, *task.split.test)
        for z in levels_wanted(step)
    ]
    assert [data.index[i] for i in used] == wanted
    with_tumour = [bool(data[i]["label"].any()) for i in used]
    assert 0 < sum(with_tumour) < len(used)


def test_slices_are_what_the_arm_sees(task):
    four, _ = medclip.slices_of(task, ("test",), DESIGNS["lora_4"], 2)
    theirs, _ = medclip.slices_of(task, ("test",), DESIGNS["published"], 2)
    ours, _ = medclip.slices_of(task, ("test",), DESIGNS["lora"], 2)
    z = TUMOUR[0]
    assert four[z]["image"].shape == (4, 224, 224)
    assert torch.equal(four[z]["image"][:1], ours[z]["image"])
    air = ours[z]["image"] == 0
    assert air.any()
    # Over the whole slice as published: air is no 0 there.
    assert (theirs[z]["image"][air] < -0.1).all()


@pytest.mark.parametrize("name", [n for n in DESIGNS if n != "leaky"])
def test_honest_arms_train_and_test_on_different_patients(task, settings, name):
    data, seen, rest = medclip.dealt(task, DESIGNS[name], settings(), seed=0)
    assert {data.index[i][0] for i in seen} == set(task.split.train)
    assert {data.index[i][0] for i in rest} == set(task.split.test)


def test_leaky_arm_deals_out_slices_and_trains_on_as_many(task, settings):
    def dealt(name, seed=0):
        return medclip.dealt(task, DESIGNS[name], settings(), seed)

    data, seen, rest = dealt("leaky")
    train, test = ({data.index[i][0] for i in part} for part in (seen, rest))
    assert train & test, "patients are on both sides"
    assert not (train | test) & set(task.split.validation)
    assert not set(seen) & set(rest)
    _, honest, left = dealt("lora")
    assert sorted(seen + rest) == sorted(honest + left)
    assert abs(len(seen) - len(honest)) <= 1
    assert dealt("leaky")[1] == seen
    assert dealt("leaky", 1)[1] != seen


# --- models ----------------------------------------------------------------------

DENSE, VECTOR, ADAPTERS = 143_172, 1_567_332, 47_104  # small tower, rank 8
TOWER = 3_086_044 + 131_072
COUNTS = {
    "head": DENSE,
    "lora": DENSE + ADAPTERS,
    "leaky": DENSE + ADAPTERS,
    "dora": DENSE + ADAPTERS + 2_944,  # one magnitude per output of 24 layers
    "full": DENSE + TOWER,
    "published": VECTOR + ADAPTERS,
    "vector": VECTOR + ADAPTERS,
    "lora_4": DENSE + ADAPTERS + 4 * 16 * 32 + 32,  # and the patch embedding
}


def trained(model):
    return {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", COUNTS)
def test_what_each_arm_trains(tower, settings, name):
    found = trained(build(name, settings()))
    assert sum(found.values()) == COUNTS[name]
    outside = {n for n in found if not n.startswith("seg_head.")}
    if name == "head":
        assert not outside
    elif name != "full":
        patch = {n for n in outside if "patch_embeddings" in n}
        assert len(patch) == 2 * (name == "lora_4")
        parts = {p for n in outside - patch for p in n.split(".")}
        assert {"q_proj", "v_proj"} <= parts
        assert not {"k_proj", "o_proj", "fc1", "layernorm_before"} & parts
    assert set(COUNTS) == set(DESIGNS)


def test_settings_reach_the_adapter(tower, settings):
    from medtut.lora import adapted_layers

    model = build("lora", settings(rank=2, alpha=7.0, dropout=0.3))
    assert sum(trained(model).values()) == DENSE + ADAPTERS // 4
    layers = list(adapted_layers(model).values())
    assert len(layers) == 24
    specs = {layer.spec for layer in layers}
    (spec,) = specs
    assert (spec.r, spec.alpha, spec.dropout) == (2, 7.0, 0.3)


@torch.no_grad()
def test_every_arm_starts_from_the_pretrained_tower(tower, settings):
    picture = torch.randn(1, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    want = tower(picture)
    for name in ("published", "head", "dora", "lora_4"):
        model = build(name, settings()).eval()
        torch.testing.assert_close(model.encoder(picture), want)


def test_medclips_own_tower_is_taken_where_the_settings_say_so(
    tower, settings, monkeypatch
):
    from medtut.models import medclip_io

    asked = []

    def load(path):
        asked.append(path)
        return copy.deepcopy(tower)

    monkeypatch.setattr(medclip_io, "load_official", load)
    build("head", settings(tower="tiny"), "here.zip")
    assert asked == ["here.zip"]


def test_losses():
    class Fixed(nn.Module):
        def forward(self, x):
            return x

    label = torch.zeros(1, 8, 8, dtype=torch.long)
    label[0, 2:5, 2:5] = 3
    logits = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"image": logits, "label": label}
    plain = medclip.loss_of(DESIGNS["published"])(Fixed(), batch)
    assert plain == pytest.approx(float(F.cross_entropy(logits, label)))
    # Soft Dice over the three tumour classes, with MONAI's smoothing of 1e-5.
    p, t = logits.softmax(1)[0, 1:], F.one_hot(label[0], 4).movedim(-1, 0)[1:]
    both, sums = (p * t).sum((1, 2)), (p + t).sum((1, 2))
    dice = 1 - ((2 * both + 1e-5) / (sums + 1e-5)).mean()
    ours = medclip.loss_of(DESIGNS["lora"])(Fixed(), batch)
    assert float(ours) == pytest.approx(float(plain) + float(dice), abs=1e-5)


# --- judging ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), [("lora", 1), ("published", 3)])
def test_prediction_lies_on_the_patients_own_grid(task, name, step):
    arm = DESIGNS[name]
    model = known(task, arm).train()
    for case in task.part("test"):
        found = medclip.predict(model, case, arm, step)
        truth = arrays(int(case.id[1:]))[1]
        # Written with x and y the other way round, read as all cases are.
        truth = np.where(truth == 4, 3, truth)[::-1, ::-1, ::step]
        assert np.array_equal(found.truth, truth)
        assert found.label.shape == found.image.shape == truth.shape
        # The way through 224 pixels and back loses nothing on this small grid.
        assert np.array_equal(found.label, truth)
        assert found.spacing == (1, 1, 2 * step)
        assert found.case == case.id
    assert model.training, "the mode is put back"
    assert not any(model.modes)
    assert medclip.foreground([found]) == pytest.approx([1.0])


def test_judged_as_published(task):
    arm = DESIGNS["published"]
    data, used = medclip.slices_of(task, ("validation",), arm, 1)
    dice, loss = medclip.judged_as_published(known(task, arm), task, arm, 1)
    assert dice == pytest.approx(1)
    assert loss < 1e-6
    nothing = Known([])
    dice, loss = medclip.judged_as_published(nothing, task, arm, 1)
    labels = [data[i]["label"].numpy() for i in used]
    pairs = [np.stack(labels[k : k + 2]) for k in range(0, len(labels), 2)]
    by_hand = []
    for pair in pairs:
        empty = (pair == 0).mean()
        there = [c for c in range(1, 4) if (pair == c).any()]
        by_hand.append(2 * empty / (1 + empty) / (1 + len(there)))
    assert dice == pytest.approx(np.mean(by_hand))
    wrong = (np.stack(labels) > 0).mean()
    assert loss == pytest.approx(20 * wrong, rel=1e-3)


def test_own_split_is_scored_on_tumour_slices_it_held_out(task, settings, monkeypatch):
    import medtut.evaluate

    given = {}
    original = medtut.evaluate.inflation

    def watch(prediction, label, patients):
        given.update(label=label, patients=patients)
        return original(prediction, label, patients)

    monkeypatch.setattr(medtut.evaluate, "inflation", watch)
    model = known(task, DESIGNS["lora"])
    score = medclip.held_out(model, "lora", 0, task, settings())
    assert score["published"] == score["without_background"] == pytest.approx(1)
    levels = [z for z in TUMOUR if z % 2 == 0]
    assert given["patients"] == [p for p in task.split.test for _ in levels]
    assert given["label"].flatten(1).any(1).all()
    medclip.held_out(model, "leaky", 0, task, settings())
    data, _, rest = medclip.dealt(task, DESIGNS["leaky"], settings(), 0)
    wanted = [data.index[i] for i in rest]
    assert given["patients"] == [p for p, z in wanted if z in TUMOUR]


# --- training --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "published"])
def test_an_arm_runs_from_the_rate_to_the_numbers(tower, settings, monkeypatch, name):
    grid = {"0.001": 0.2, "0.003": 0.4, "0.01": 0.3}
    monkeypatch.setattr(l02, "tuned", lambda *_: grid)
    used = []
    original = l02.train_arm

    def watch(*args):
        model, result = original(*args)
        used.append((args[:3], result.steps))
        return model, result

    monkeypatch.setattr(l02, "train_arm", watch)
    chosen = settings(steps=1, batch_size=1, train_patients=1)
    found = l02.run_arm(name, 3, chosen)
    assert used == [((name, 3, 0.003), DESIGNS[name].longer)]
    assert found["lr"] == 0.003
    assert found["validation_by_lr"] == grid
    assert found["trainable"] == COUNTS[name]
    task = medclip.load_task(chosen)
    assert found["patients"] == list(task.split.test)
    assert len(found["cases"]) == len(found["WT"]) == len(found["HD95 WT"]) == 3
    assert found["score"] == pytest.approx(np.mean(found["cases"]))
    for key in ("own_split_foreground", "own_split_published"):
        assert 0 <= found[key] <= 1
    steps = list(range(1, DESIGNS[name].longer + 1))
    assert [s for s, _ in found["validation"]] == steps
    assert found["best_step"] in steps
    losses = [s for s, _ in found["validation_loss"]]
    assert losses == (steps if name == "published" else [])
    json.dumps(found, allow_nan=False)


def test_decoder_alone_learns_by_heart_and_leaves_the_model_alone(tower, settings):
    chosen = settings(steps=6)
    model = build("published", chosen)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    task = medclip.load_task(chosen)
    course = medclip.decoder_alone(model, task, chosen, seed=0, rounds=2)
    assert [step for step, *_ in course] == [0, 6, 12]
    known, unknown = np.array(course)[:, 1:].T
    # An untrained decoder says about a quarter for each class.
    assert known[0] == pytest.approx(np.log(4), abs=0.1)
    assert unknown[0] == pytest.approx(np.log(4), abs=0.1)
    assert known[2] < known[1] < known[0]
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert medclip.decoder_alone(model, task, chosen, seed=0, rounds=0) == course[:1]


@pytest.fixture
def counted(monkeypatch):
    """Trainings that were asked for; none is done."""
    ran = []

    def train_arm(name, seed, rate, settings, task, steps=None):
        ran.append((name, seed, rate, steps))
        best = {"step": 1, "score": -abs(rate - 3e-3)}
        model = nn.Conv2d(1, 4, 1)
        return model, SimpleNamespace(history=[], best=best, steps=1)

    monkeypatch.setattr(l02, "train_arm", train_arm)
    return ran


@pytest.fixture
def empty_cache(tmp_path, root, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))


def test_rate_is_chosen_on_validation_once_for_all_seeds(
    empty_cache, counted, settings
):
    for seed in (0, 1):
        l02.run_arm("lora", seed, settings(steps=9, seed=seed))
    tuning = [(l02.TUNING_SEED, rate, 4) for rate in l02.LEARNING_RATES]
    assert [one[1:] for one in counted] == [*tuning, (0, 3e-3, None), (1, 3e-3, None)]
    assert {one[0] for one in counted} == {"lora"}


def test_another_arm_or_setting_is_tuned_again(empty_cache, counted, settings):
    for change in ({}, {"rank": 4}, {"steps": 4}, {"batch_size": 1}, {"rank": 4}):
        l02.tuned("lora", settings(**change))
    assert len(counted) == 4 * len(l02.LEARNING_RATES)
    l02.tuned("head", settings())
    assert len(counted) == 5 * len(l02.LEARNING_RATES)
    assert counted[-1][0] == "head"


def test_leaky_arm_takes_the_rate_of_the_one_it_varies(empty_cache, counted, settings):
    found = l02.run_arm("leaky", 0, settings())
    assert [one[0] for one in counted] == ["lora"] * 3 + ["leaky"]
    assert found["own_split_published"] is not None


def test_arms_outside_the_leak_have_no_score_on_their_own_split(
    empty_cache, counted, settings
):
    found = l02.run_arm("head", 0, settings())
    assert found["own_split_published"] is None
    assert found["own_split_foreground"] is None
    # A rate found nothing: absent classes and distances are no NaN in the file.
    json.dumps(found, allow_nan=False)


# --- the committed runs ----------------------------------------------------------


@pytest.fixture
def stored(monkeypatch):
    from medtut.course import sweep

    def runs(*rows):
        made = [
            {"arm": a, "seed": s, "metrics": {"cases": c, "lr": lr, "own": own}}
            for a, s, c, lr, own in rows
        ]
        monkeypatch.setattr(sweep, "load_sweep", lambda lesson: made)

    return runs


def test_committed_runs_by_arm_and_seed(stored):
    stored(
        ("lora", 1, [0.3, 0.4], 0.01, 0.7),
        ("lora", 0, [0.1, 0.2], 0.01, 0.6),
        ("head", 0, [0.5, 0.6], 0.003, None),
    )
    cases = l02.committed()
    assert set(cases) == {"lora", "head"}
    np.testing.assert_array_equal(cases["lora"], [[0.1, 0.2], [0.3, 0.4]])
    own = l02.committed("own")
    assert set(own) == {"lora"}
    np.testing.assert_array_equal(own["lora"], [0.6, 0.7])
    assert l02.chosen_rate("head") == 0.003
    assert l02.chosen_rate("leaky") == l02.chosen_rate("lora") == 0.01


def test_rate_of_an_arm_without_runs_says_what_to_run(stored):
    stored(("lora", 0, [0.1], 0.01, None))
    with pytest.raises(MedtutError, match="medtut sweep 02 --arms published"):
        l02.chosen_rate("published")


def test_no_runs_at_all_says_what_to_run(tmp_path, monkeypatch):
    from medtut.course import sweep

    monkeypatch.setattr(sweep, "_folder", lambda slug: tmp_path)
    with pytest.raises(MedtutError, match="medtut sweep 02"):
        l02.committed()
