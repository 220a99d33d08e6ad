"""Lesson 06: settings, arms, patients, protocol, and what each method begins with."""

from types import SimpleNamespace

import few_shot_small as small
import numpy as np
import pytest
import torch

import medtut.adapters
import medtut.train
from medtut.course.lessons import fseft, l06
from medtut.course.profiles import PROFILES, SettingsError, resolve
from medtut.data.abdomen_anatomy import DRAWN
from medtut.data.abdomen_cohort import annotated_by, source_hospitals
from medtut.data.organs import BASE, NOVEL, STRUCTURES, OrganError
from medtut.data.totalseg import load_case, read_labels
from medtut.errors import MedtutError

ROWS = [STRUCTURES.index(n) for n in BASE]


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


# --- settings and arms --------------------------------------------------------------


def test_presets_fit_the_schema_and_share_no_patient():
    assert set(l06.PRESETS) == set(PROFILES)
    found = {name: resolve("06", name) for name in PROFILES}
    assert found["smoke"].steps < found["quick"].steps < found["full"].steps
    assert (found["quick"].shots, found["quick"].test) == ((1, 5, 10), 12)
    rois = {name: one.roi for name, one in found.items()}
    assert rois == {name: tuple(p["roi"]) for name, p in l06.PRESETS.items()}
    for one in found.values():
        tuning = max(one.shots[1:2]) + fseft.HELD
        counts = {"pool": one.pool, "test": one.test, "tuning": tuning,
                  "source": one.source, "source_test": 2}  # fmt: skip
        assert set(counts) == set(fseft.FIRST)
        spans = [range(a, a + counts[n]) for n, a in fseft.FIRST.items()]
        assert sum(map(len, spans)) == len(set().union(*spans))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"roi": [48, 64, 64]}, r"roi.*multiple of 32.*\[64, 64, 64\]"),
        ({"roi": [32, 32, 32]}, r"roi.*\[32, 32, 64\]"),
        ({"roi": [64, 64]}, "roi"),
        ({"spacing": 0}, "spacing"),
        ({"shots": []}, "shots"),
        ({"shots": [0, 1]}, "shots.*ascend"),
        ({"shots": [2, 1]}, "shots.*ascend"),
        ({"shots": [1, 5]}, "pool.*k = 5 cannot be drawn from a pool of 3"),
        ({"pool": 1}, "pool = 1.*k = 2 cannot"),
        ({"test": 2}, "test"),
        ({"source": 0}, "source"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_values_out_of_range_are_refused(given, said):
    with pytest.raises(SettingsError, match=said):
        resolve("06", "smoke", given)


def test_arms_parse():
    assert l06.parse("novel_k5_lora") == ("novel", 5, "lora")
    assert l06.parse("base_k1_zero_shot") == ("base", 1, "zero_shot")
    trained = [a for a in l06.ARMS if a not in l06.PRETRAIN]
    parsed = [l06.parse(a) for a in trained]
    assert [f"{t}_k{k}_{m}" for t, k, m in parsed] == trained
    assert {t for t, _, _ in parsed} == set(fseft.TASKS)
    assert {k for _, k, _ in parsed} == {1, 5, 10} == set(resolve("06", "quick").shots)
    assert {m for _, _, m in parsed} == set(fseft.METHODS)
    assert not any(l06.ARMS.values()), "no arm changes a setting"
    # What the lesson compares is there, and black-box methods are at every k.
    for k in (1, 5, 10):
        assert {f"base_k{k}_{m}" for m in fseft.BLACK_BOX[1:]} <= set(trained)
        assert {f"novel_k{k}_{m}" for m in ("lora", "full", "scratch")} <= set(trained)
    assert {f"novel_k5_{m}" for m in (*l06.RANKS, *l06.NOVEL_ALL)} <= set(trained)
    assert "novel_k5_zero_shot" not in trained, "there is no head for it"


def test_a_network_that_is_not_there_is_named(settings, tmp_path, monkeypatch):
    gone = settings.model_copy(update={"weights": str(tmp_path / "gone.safetensors")})
    with pytest.raises(MedtutError, match=r"gone\.safetensors.*pretrain_swin"):
        fseft.weights_file(gone)
    monkeypatch.setattr(fseft, "SMALL_WEIGHTS", tmp_path / "small.safetensors")
    mine = settings.model_copy(update={"weights": "small"})
    with pytest.raises(MedtutError, match=r"small\.safetensors"):
        fseft.weights_file(mine)
    (tmp_path / "small.safetensors").touch()
    assert fseft.weights_file(mine) == tmp_path / "small.safetensors"


# --- patients and protocol ----------------------------------------------------------


def test_parts_are_of_their_own_numbers(world, settings):
    world.drawn.clear()
    parts = {n: fseft.target_patients(n, settings) for n in ("pool", "test", "tuning")}
    parts |= {n: fseft.source_patients(n, settings) for n in ("source", "source_test")}
    assert {n: len(p) for n, p in parts.items()} == {
        "pool": 3, "test": 3, "tuning": 2 + fseft.HELD, "source": 3, "source_test": 12
    }  # fmt: skip
    for name, people in parts.items():
        first = fseft.FIRST[name]
        numbers = {int(p.case.record.id[1:]) - 1 for p in people}
        assert min(numbers) == first
        assert max(numbers) < first + 1000
    target = [p.case.record.id for n in list(parts)[:3] for p in parts[n]]
    assert len(target) == len(set(target))
    assert {f for *_, f in world.drawn if "target" in _} <= {"trunk"}


def test_a_patient_is_what_the_reader_reads(settings, pool):
    for one in pool:
        case, names = one.case, one.case.structures
        want = load_case(case.record, names, settings.spacing, roi=settings.roi)
        assert case.image.shape == (1, *settings.roi)
        assert case.image.dtype == np.float32
        np.testing.assert_allclose(case.image, want.image, atol=5e-4)  # kept in 16 bits
        assert np.array_equal(case.labels, want.labels)
        assert np.array_equal(case.annotated, want.annotated)
        np.testing.assert_allclose(case.affine, want.affine)
        np.testing.assert_allclose(case.original[0], want.original[0])
        assert case.original[1] == want.original[1] == one.truth.shape
        chosen = (*NOVEL[:2], *BASE[::-1])
        truth = read_labels(case.record, chosen).astype(bool)
        assert np.array_equal(one.masks(chosen), truth)
        assert truth.any((1, 2, 3)).sum() >= 10
    gone = [not p.masks(["gallbladder"]).any() for p in pool]
    assert gone == [False, False, True]


def test_sources_outline_their_own_and_the_test_patients_everything(settings):
    train = fseft.source_patients("source", settings)
    for one, name in zip(train, source_hospitals(), strict=True):
        known = [n for n, k in zip(STRUCTURES, one.case.annotated, strict=True) if k]
        assert set(known) == set(annotated_by(name)) & set(STRUCTURES)
        labelled = one.case.labels.any((1, 2, 3))
        assert not (labelled & ~one.case.annotated).any(), "no truth where none is told"
        assert labelled.sum() == len(known)
    for one in fseft.source_patients("source_test", settings):
        known = np.array(STRUCTURES)[one.case.annotated]
        # A lung is outlined where all its lobes are.
        assert set(known) == {*DRAWN, "lung_left", "lung_right"} & {*STRUCTURES}


def test_supports_are_nested_disjoint_and_as_many_as_said(settings, pool, test):
    protocol = l06.protocol(settings)
    ids = {p.case.record.id for p in pool}
    assert protocol.shots == settings.shots
    assert set(protocol.test) == {p.case.record.id for p in test}
    drawn = set()
    for seed in range(l06.SEEDS):
        few = {k: l06.support(k, seed, settings) for k in protocol.shots}
        for k, people in few.items():
            names = [p.case.record.id for p in people]
            assert len(set(names)) == k
            assert set(names) <= ids - set(protocol.test)
            assert names == list(protocol.support(2, seed))[:k], "nested"
        drawn.add(tuple(p.case.record.id for p in few[2]))
    assert len(drawn) > 1
    assert l06.support(2, l06.SEEDS + 1, settings) == l06.support(2, 1, settings)
    with pytest.raises(OrganError, match="3"):
        l06.support(3, 0, settings)


def test_bad_protocols_are_refused(settings, pool, monkeypatch):
    other = settings.model_copy(update={"seed": 77})
    with monkeypatch.context() as patch:
        patch.setattr(fseft, "target_patients", lambda part, s: pool)
        with pytest.raises(OrganError, match="s0001"):
            l06.protocol(other)
    # Had it not been refused with the settings: never fewer volumes than k says.
    greedy = settings.model_copy(update={"shots": (1, 9)})
    with pytest.raises(OrganError, match="9"):
        l06.protocol(greedy)


# --- what an adaptation begins with -------------------------------------------------


def test_heads_keep_the_rows_of_the_base_organs(settings):
    old = network(settings).classifier
    model, done = fseft.start("base", "probe", 0, settings)
    assert torch.equal(model.classifier.weight, old.weight[ROWS])
    assert torch.equal(model.classifier.bias, old.bias[ROWS])
    assert done.total == 9 * 13
    model, done = fseft.start("softmax", "probe", 0, settings)
    assert (model.classifier.weight[0] == 0).all()
    assert model.classifier.bias[0] == 0
    assert torch.equal(model.classifier.weight[1:], old.weight[ROWS])
    assert done.total == 10 * 13
    model, done = fseft.start("base", "zero_shot", 0, settings)
    assert done.total == 0
    model, done = fseft.start("pretrain", "full", 0, settings)
    assert torch.equal(model.classifier.weight, old.weight)
    assert done.total == sum(p.numel() for p in model.parameters())


def test_novel_heads_are_new_and_the_decoder_trains(settings):
    old, heads = network(settings).state_dict(), []
    for method in ("probe", "lora", "scratch"):
        model, done = fseft.start("novel", method, 3, settings)
        assert model.classifier.weight.shape[0] == len(NOVEL) == 16
        assert (model.classifier.bias == -4).all()
        assert done.counts["decoder"] > 1e5
        heads.append(model.classifier.weight)
        if method != "scratch":
            assert done.counts["bottleneck"] == 0
            same = model.decoder1.state_dict()
            assert all(torch.equal(v, old[f"decoder1.{k}"]) for k, v in same.items())
    assert torch.equal(heads[0], heads[1]), "of equal seeds"
    other = fseft.start("novel", "probe", 4, settings)[0]
    assert not torch.equal(heads[0], other.classifier.weight)


def test_scratch_is_the_same_network_with_other_weights(settings):
    old = network(settings)
    model, done = fseft.start("novel", "scratch", 0, settings)
    assert model.config["window_size"] == old.config["window_size"]
    assert done.total == sum(p.numel() for p in model.parameters())
    full, of_full = fseft.start("novel", "full", 0, settings)
    assert of_full.total == done.total
    mine, theirs = model.state_dict(), old.state_dict()
    key = "swinViT.layers1.0.blocks.0.attn.qkv.weight"
    assert torch.equal(full.state_dict()[key], theirs[key])
    second = fseft.start("novel", "scratch", 1, settings)[0].state_dict()
    assert not torch.equal(mine[key], second[key])


def test_ranks_reach_as_far_as_the_layers_do(settings):
    for method, narrow, wide in (("rank16", 12, 16), ("rank2", 2, 2)):
        model, _ = fseft.start("novel", method, 0, settings)
        slots = {n: len(p) for n, p in model.named_parameters() if "lora_A_" in n}
        assert {r for n, r in slots.items() if "layers1" in n} == {narrow}
        assert {r for n, r in slots.items() if "layers2" in n} == {wide}
    with pytest.raises(MedtutError, match="12"):
        medtut.adapters.adapt(fseft.start("base", "zero_shot", 0, settings)[0],
                              "lora", rank=16)  # fmt: skip
    model, _ = fseft.start("novel", "adaptive", 0, settings)
    ranks = medtut.adapters.effective_ranks(model)
    assert sorted(set(ranks.values())) == [36, 48]
    assert len(ranks) == 8


# --- arms ---------------------------------------------------------------------------


def test_rates_are_chosen_once_on_patients_of_their_own(settings, monkeypatch):
    calls, best = [], 3e-3

    def train(task, method, learn, seed, rate, given, steps):
        assert (seed, given) == (l06.TUNING_SEED, long)
        calls.append((task, method, rate, steps, [p.case.record.id for p in learn]))
        return (rate,)

    def dice_table(model, task, method, held, given):
        calls[-1] += ([p.case.record.id for p in held],)
        return np.array([[1.0 if model == best else 0.2, np.nan]])

    monkeypatch.setattr(fseft, "train", train)
    monkeypatch.setattr(fseft, "dice_table", dice_table)
    long = settings.model_copy(update={"steps": 9})
    grid = l06.tuned("novel", "lora", long)
    assert grid == {str(r): 1.0 if r == best else 0.2 for r in l06.RATES}
    assert [c[:4] for c in calls] == [("novel", "lora", r, 4) for r in l06.RATES]
    ids = [f"s{n + 3001:04d}" for n in range(6)]
    assert all(c[4:] == (ids[:2], ids[2:]) for c in calls)
    for method in (*l06.RANKS, "lora"):
        assert l06.tuned("novel", method, long) == grid
    assert len(calls) == len(l06.RATES)
    l06.tuned("base", "lora", long)
    l06.tuned("novel", "probe", long)
    assert len(calls) == 3 * len(l06.RATES)
    # What a rate does not depend on; and what it does.
    more = long.model_copy(update={"test": 5, "source": 2, "seed": 9})
    assert l06.tuned("novel", "lora", more) == grid
    assert len(calls) == 3 * len(l06.RATES)
    long = long.model_copy(update={"steps": 10})
    l06.tuned("novel", "lora", long)
    assert len(calls) == 4 * len(l06.RATES)


def test_a_table_for_json():
    table = np.array([[0.123456, np.nan], [1, 0]])
    assert l06.rounded(table) == [[0.1235, None], [1.0, 0.0]]


def test_arms_run(settings, monkeypatch):
    asked = []

    def tuned(*given):
        asked.append(given[:2])
        return {"0.003": 0.1, "0.01": 0.4}

    monkeypatch.setattr(l06, "tuned", tuned)
    zero = l06.run_arm("base_k1_zero_shot", 0, settings)
    assert (zero["trainable"], zero["support"], zero["validation_by_lr"]) == (0, [], {})
    assert not asked
    lora = l06.run_arm("base_k1_lora", 1, settings)
    assert asked == [("base", "lora")]
    assert (lora["lr"], len(lora["support"])) == (0.01, 1)
    assert lora["support"] == list(l06.protocol(settings).support(1, 1))
    assert lora["train_seconds"] > 0
    assert lora["trainable"] == sum(
        n for part, n in lora["counts"].items() if part != "frozen"
    )
    adaptive = l06.run_arm("novel_k2_adaptive", 0, settings)
    assert len(adaptive["support"]) == 2
    assert 0 <= adaptive["rank_mean"] <= 16
    assert adaptive["rank_mean"] == sum(adaptive["ranks"].values()) / 24
    assert "ranks" not in lora
    for told, width in ((zero, 9), (lora, 9), (adaptive, 16)):
        table = np.array(told["table"], float)
        assert table.shape == (3, width)
        assert told["score"] == pytest.approx(np.nanmean(table), abs=1e-4)
    given = l06.adapt_one("base", 1, "probe", 0, settings, rate=0.5)
    assert (given["lr"], given["validation_by_lr"]) == (0.5, {})


def test_pretraining_goes_on_with_both_readings(settings, monkeypatch):
    told = {}
    real = medtut.train.fit

    def fit(model, loss, data, config, **more):
        told[loss.partial.unlabelled] = [t.tobytes() for t in data.inputs], config
        return real(model, loss, data, config, **more)

    monkeypatch.setattr(medtut.train, "fit", fit)
    tables = {}
    for arm, how in l06.PRETRAIN.items():
        found = l06.run_arm(arm, 0, settings)
        table = tables[how] = np.array(found["table"], float)
        assert table.shape == (12, 9)
        assert found["score"] == pytest.approx(np.nanmean(table), abs=1e-4)
        assert found["trainable"] == sum(
            p.numel() for p in network(settings).parameters()
        )
    assert told["ignore"] == told["background"], "patients, order, steps and rate"
    assert told["ignore"][1].steps == settings.steps
