"""The pieces of lesson 05: patients, what an arm sees, LoRA on a scanner, judgement."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

import medtut.train
from medtut.course.lessons import ct, ct_target, l05
from medtut.course.lessons.ct import DESIGNS, Part
from medtut.course.profiles import PROFILES, SettingsError, resolve
from medtut.data import chest_cohort
from medtut.data.chest_cohort import ChestSpec, chest_folder
from medtut.data.chest_findings import ChestPatient, Drawn, sample_findings
from medtut.data.ct_rate import FINDINGS, find_volumes
from medtut.errors import MedtutError
from medtut.lora import find_dead
from medtut.models import text_tower
from medtut.models.contrastive import SCALARS
from medtut.models.ctclip import CTCLIP, load_ctclip, relevance, save_ctclip
from medtut.models.ctvit import CTViT
from medtut.models.text_tower import TEMPLATES, prompts

LESSON, WIDTH = "05_ctclip_modern", 12
IMAGE, SPACING = (24, 32, 32), (12.0, 10.8, 10.8)
TINY = {"image": list(IMAGE), "spacing": list(SPACING), "precision": "fp32", "rank": 4,
        "dev": 8, "test": 10, "target_train": 4, "target_test": 8}  # fmt: skip
CACHES = ct.text_tower, l05.source_parts, l05.target_parts
NAMED = [i for i, f in enumerate(FINDINGS) if f not in ct.WITHHELD]


def patient(seed, body="lung1"):
    """A box with lungs, brighter where a finding is; lung2 is wider."""
    rng = np.random.default_rng(seed)
    hu = np.full((96, 96, 48), -1000, np.float32)
    edge = 12 if body == "lung1" else 6
    hu[edge:-edge, 20:-20, 4:-4] = 40
    hu[18:42, 30:-30, 8:-8] = hu[54:78, 30:-30, 8:-8] = -850
    findings, masks = {}, {}
    for name, severity in sample_findings(rng).items():
        i = FINDINGS.index(name)
        mask = np.zeros(hu.shape, bool)
        mask[20 + i : 26 + i, 30 + 2 * i : 34 + 2 * i, 8 + i : 9 + i + i % 3] = True
        hu[mask] = 20 * i
        kind = "pacemaker" if name == "Medical material" else ""
        voxels = 1 + (severity > 0.3) if severity < 0.6 else int(mask.sum())
        findings[name] = Drawn(severity, "left", "left lower lobe", 9.0, voxels, kind)
        masks[name] = mask
    hu += rng.integers(-9, 10, 48).astype(np.float32)
    facts = {"contrast": False, "ratio": 0.47}
    return ChestPatient(hu, findings, masks, hu.astype(np.uint8), facts, np.ones(3))


class Tower:
    """A text tower whose vectors are drawn from the text alone."""

    width = WIDTH

    def __init__(self, source="?"):
        self.source = source

    def embed(self, texts, cache=True):
        rngs = (np.random.default_rng(list(t.encode())) for t in texts)
        return np.stack([r.normal(size=WIDTH) for r in rngs]).astype("f4")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("l05")
    torch.manual_seed(0)
    tower = CTViT(16, IMAGE, (6, 8, 8), 1, 1, 2, 8, stem="histogram")
    clip = CTCLIP(tower, WIDTH, 8, "attention", pool_heads=4, bias=-2.0, log_scale=1.5)
    save_ctclip(clip, folder / "tiny.safetensors", spacing=SPACING)
    return folder


@pytest.fixture(autouse=True)
def drawn(root, monkeypatch):
    """A cache of the module, patients that need no drawing, texts that need no BERT."""
    monkeypatch.setenv("MEDTUT_CACHE", str(root / "cache"))
    monkeypatch.delenv("MEDTUT_PROFILE", raising=False)
    asked = []

    def draw(body, scanner, seed, difficulty):
        asked.append((body, scanner, *seed))
        return patient(seed, body)

    monkeypatch.setattr(chest_cohort, "draw_patient", draw)
    monkeypatch.setattr(chest_cohort, "load_body", lambda name: None)
    monkeypatch.setattr(text_tower, "load_text_tower", Tower)
    for kept in CACHES:
        kept.cache_clear()
    yield asked
    for kept in CACHES:
        kept.cache_clear()


@pytest.fixture
def settings(root):
    def made(**changes):
        given = {"weights": str(root / "tiny.safetensors"), **TINY, **changes}
        return resolve(LESSON, "smoke", given)

    return made


@pytest.fixture
def clip(root):
    return load_ctclip(root / "tiny.safetensors")


@pytest.fixture
def part(settings):
    return ct.load_part("target_train", settings())


# --- where a sentence looks ---------------------------------------------------------


def test_outlines_go_to_the_grid_of_the_settings(settings):
    outlines = np.zeros((18, 48, 96, 96), bool)
    outlines[3, 30, 40, 50] = outlines[5, 47, 0, 95] = True
    same = settings(image=[48, 96, 96], spacing=[6.0, 3.6, 3.6])
    assert np.array_equal(ct._as_seen(outlines, same), outlines)
    larger = settings(image=[50, 100, 90], spacing=[6.0, 3.6, 3.6])
    found = np.argwhere(ct._as_seen(outlines, larger)).tolist()
    assert found == [[3, 31, 42, 47]]  # 1 more below, 2 in front, 3 less on the side
    finer = settings(image=[96, 96, 96], spacing=[3.0, 3.6, 3.6])
    assert np.argwhere(ct._as_seen(outlines, finer)).tolist() == [
        [3, 60, 40, 50], [3, 61, 40, 50], [5, 94, 0, 95], [5, 95, 0, 95]
    ]  # fmt: skip


def test_pointing_counts_hits_and_what_chance_hits(settings, clip, monkeypatch):
    given = settings()
    part = ct.load_part("test", given)
    nodule, opacity = FINDINGS.index("Lung nodule"), FINDINGS.index("Lung opacity")
    outlines = np.zeros((18, 48, 96, 96), bool)
    outlines[nodule, 12:24, 24:48, :24] = True  # all of token (1, 1, 0), no other
    outlines[opacity, :, 48:72] = True  # the tokens (:, 2, :)
    monkeypatch.setattr(chest_cohort, "outlines_of", lambda path: outlines)
    yes, no = ct.prompt_vectors(clip, given.text, TEMPLATES[:1])
    asked = []

    def strongest(model, volume, direction):
        assert model is clip
        assert tuple(volume.shape) == IMAGE
        found = torch.zeros(4, 4, 4)
        which = np.abs(yes[:, 0] - no[:, 0] - direction.numpy()).max(1).argmin()
        asked.append(int(which))
        # The nodule is found in every third volume, the opacity never.
        found[(1, 1, 0) if len(asked) % 6 == 1 else (0, 0, 0)] = 1
        return found

    monkeypatch.setattr("medtut.models.ctclip.relevance", strongest)
    volumes = part.volumes.astype("f4")
    found = ct.pointing(clip, Part(part.records, volumes, part.truth), given, count=6)
    assert asked == [nodule, opacity] * 6
    inside = F.max_pool3d(torch.from_numpy(volumes[:6, None]), (6, 8, 8))[:, 0] > -0.95
    there = torch.zeros(2, 4, 4, 4, dtype=bool)
    there[0, 1, 1, 0] = there[1, :, 2] = True
    share = [[float(t[i].float().mean()) for t in there] for i in inside]
    assert found[nodule] == pytest.approx([1 / 3, np.mean(share, 0)[0]])
    assert found[opacity] == pytest.approx([0, np.mean(share, 0)[1]])
    others = [i for i in range(18) if i not in (nodule, opacity)]
    assert np.isnan(found[others]).all()
    assert 0 < np.mean(share) < 1


def test_the_test_part_has_outlines(settings):
    record = ct.load_part("test", settings()).records[0]
    assert chest_cohort.outlines_of(record.path).shape == (18, 48, 96, 96)


# --- settings --------------------------------------------------------------------


def test_presets_fit_the_schema():
    assert set(l05.PRESETS) == set(PROFILES)
    found = {name: resolve(LESSON, name) for name in PROFILES}
    for one in found.values():
        assert (one.image, one.spacing) == ((48, 96, 96), (6.0, 3.6, 3.6))
        assert (one.weights, one.text) == ("small", "asset")
        # No person is in two parts, whichever of them were drawn as one split.
        counts = one.model_dump() | {"other_body": one.dev}
        spans = [range(a, a + counts[n]) for n, a in ct.FIRST.items()]
        assert sum(map(len, spans)) == len(set().union(*spans))
        # The checkpoint's own patients come from another seed, so 0 is free.
        assert min(map(min, spans)) == 0
    assert found["smoke"].train < found["quick"].train < found["full"].train
    assert set(ct.FIRST) - {"other_body"} <= set(l05.Settings.model_fields)


@pytest.mark.parametrize(
    "given",
    [
        {"train": 7}, {"dev": 7}, {"test": 7}, {"target_train": 3}, {"target_test": 7},
        {"epochs": 0.0}, {"batch_size": 1}, {"depth": 0}, {"precision": "fp16"},
        {"rank": 0}, {"target_steps": 0}, {"image": [48, 96]}, {"spacing": 6.0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(given):
    ((name, _),) = given.items()
    with pytest.raises(SettingsError, match=name):
        resolve(LESSON, "smoke", given)


def test_what_a_rate_does_not_depend_on_are_settings():
    fields = set(l05.Settings.model_fields)
    assert {*l05.SOURCE_UNUSED, *l05.TARGET_UNUSED} <= fields
    assert "target_steps" not in l05.TARGET_UNUSED
    assert not {"train", "dev", "epochs"} & set(l05.SOURCE_UNUSED)


def test_every_arm_is_a_design_or_on_the_target():
    assert set(l05.ARMS) == {*DESIGNS, *l05.TARGET}
    assert len(DESIGNS) == 8 + 8 + 3
    assert set(l05.SINGLE_METRICS) == set(ct.SINGLE)
    plain = ct.CUBE["rms_swiglu_sigmoid"]
    for design in ct.SINGLE.values():
        fields = vars(plain)
        changed = [k for k in fields if getattr(design, k) != fields[k]]
        assert changed in (["text"], ["projection"])
    assert len({*map(repr, DESIGNS.values())}) == 19, "each is tuned by itself"
    cube = {(d.norm, d.ffn, d.loss) for d in ct.CUBE.values()}
    assert len(cube) == 8
    assert {d.batch for d in ct.CUBE.values()} == {0}
    for name, design in (ct.CUBE | ct.BATCHES).items():
        words = name.split("_")
        assert design.loss in words
        if name in ct.CUBE:
            assert words == [design.norm, design.ffn, design.loss]
        else:
            assert words == [design.loss, f"b{design.batch}"]
            assert (design.norm, design.ffn) == ("rms", "swiglu")


# --- patients --------------------------------------------------------------------


def test_parts_are_of_their_own_body_scanner_and_numbers(
    settings, drawn, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    for name, who, split in (
        ("train", ("lung1", "source"), "train"),
        ("target_train", ("lung1", "target"), "train"),
        ("target_test", ("lung1", "target"), "valid"),
        ("other_body", ("lung2", "source"), "valid"),
    ):
        drawn.clear()
        part, first = ct.load_part(name, settings()), ct.FIRST[name]
        count = (settings().model_dump() | {"other_body": settings().dev})[name]
        numbers = range(first, first + count)
        assert sorted(drawn) == [(*who, 0, n) for n in numbers]
        keys = [f"{split}_{n + 1}_a_1.nii.gz" for n in numbers]
        assert [r.name for r in part.records] == keys
        assert part.volumes.shape == (count, *IMAGE)
        assert part.volumes.dtype == np.float16
        people = [patient((0, n), who[0]) for n in numbers]
        truth = [[int(f in p.findings) for f in FINDINGS] for p in people]
        assert part.truth.tolist() == truth
        for text, record in zip(part.texts(), part.records, strict=True):
            assert text == f"{record.findings} {record.impression}"
        sizes = [[p.findings[f].voxels if f in p.findings else 0 for f in FINDINGS]
                 for p in people]  # fmt: skip
        assert ct.voxels(part).tolist() == sizes


def test_own_patients_stand_for_the_target_alone(settings, tmp_path, drawn):
    for split, count in (("train", 6), ("valid", 8)):
        spec = ChestSpec("lung1", "source", split, count, 70, seed=5)
        shutil.copytree(chest_folder(spec), tmp_path / "own", dirs_exist_ok=True)
    given = settings(data=str(tmp_path / "own"))
    drawn.clear()
    part = ct.load_part("target_train", given)
    assert not drawn
    names = [r.name for r in part.records]
    every = [r.name for r in find_volumes(tmp_path / "own", "train")]
    assert len(set(names)) == 4
    assert names == [n for n in every if n in names], "in the set's order"
    again = ct.load_part("target_train", given)
    assert [r.name for r in again.records] == names
    assert ct.voxels(part) is None, "of real patients nobody knows"
    assert len(ct.load_part("target_test", given).records) == 8
    source = ct.load_part("dev", given)
    assert ct.voxels(source) is not None
    assert source.records[0].name == "valid_2001_a_1.nii.gz"
    with pytest.raises(MedtutError, match=r"own holds 6 labelled .* train.* for 7.*set "
                       "target_train lower"):  # fmt: skip
        ct.load_part("target_train", settings(data=given.data, target_train=7))


def test_a_checkpoint_that_is_not_there_is_named(settings, monkeypatch, tmp_path):
    from medtut.models import ct_predict

    assert ct.weights_file(settings()).name == "tiny.safetensors"
    with pytest.raises(MedtutError, match=r"gone\.safetensors.*pretrain_ctclip_small"):
        ct.weights_file(settings(weights=str(tmp_path / "gone.safetensors")))
    monkeypatch.setattr(ct_predict, "SMALL_WEIGHTS", tmp_path / "small.safetensors")
    with pytest.raises(MedtutError, match=r"small\.safetensors"):
        ct.weights_file(settings(weights="small"))
    (tmp_path / "small.safetensors").touch()
    assert ct.weights_file(settings(weights="small")).parent == tmp_path


# --- zero-shot -------------------------------------------------------------------


@torch.no_grad()
def test_vectors_are_those_of_each_volume(clip, part):
    found = ct.embed(clip.train(), part.volumes, batch=3)
    assert found.shape == (4, 8)
    assert not clip.training
    for volume, vector in zip(part.volumes, found, strict=True):
        x = torch.from_numpy(np.float32(volume))[None, None]
        np.testing.assert_allclose(vector, clip.encode_image(x)[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-3


@torch.no_grad()
def test_zero_shot_asks_with_both_sentences_of_every_finding(clip, part, settings):
    vectors = ct.embed(clip, part.volumes)
    p = ct.zero_shot(clip, vectors, "somewhere")
    assert ct.text_tower("somewhere").source == "somewhere"
    assert p.shape == (4, 18)
    for k in (0, 9, 17):
        sides = []
        for said in prompts(FINDINGS[k], TEMPLATES):
            v = clip.encode_text(torch.from_numpy(Tower().embed(said)))
            sides.append(F.normalize(v.mean(0), dim=0).numpy())
        z = math.exp(1.5) * vectors @ (sides[0] - sides[1])
        np.testing.assert_allclose(p[:, k], 1 / (1 + np.exp(-z)), atol=1e-3)
    first = ct.zero_shot(clip, vectors, "somewhere", TEMPLATES[:1])
    assert np.abs(first - p).max() > 0.01
    yes, no = ct.prompt_vectors(clip, "somewhere", TEMPLATES[1:3])
    assert yes.shape == no.shape == (18, 2, 8)


@torch.no_grad()
def test_relevance_adds_up_to_the_answer(clip, part):
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    for volume in part.volumes[:2]:
        found = relevance(clip, torch.from_numpy(np.float32(volume)), direction)
        found = found.numpy()
        assert found.shape == (4, 4, 4)
        tokens = clip.image_tower(torch.from_numpy(np.float32(volume))[None, None])
        assert found.sum() == pytest.approx(
            float(clip.to_image(tokens)[0] @ direction), abs=1e-5
        )
        # By hand, a token at a time: its share of attention times what it says.
        pool, out = clip.to_image
        flat = tokens.reshape(64, 16)
        share = (flat @ pool.query.weight.T).softmax(0)
        for n in (0, 21, 63):
            value = (pool.value.weight @ flat[n]).view(4, 4) * share[n][:, None]
            want = float(out.weight @ value.flatten() @ direction)
            assert found.flat[n] == pytest.approx(want, abs=1e-6)
        assert np.ptp(found) > 1e-4


# --- the arms of the sweep -------------------------------------------------------


@torch.no_grad()
def test_arms_begin_at_the_embedding_of_the_checkpoint(
    clip, part, settings, root, monkeypatch
):
    found = ct.embedded(part, settings())
    assert found.shape == (4, 2, 2, 2, 16)
    assert found.dtype == np.float16
    for volume, tokens in zip(part.volumes, found, strict=True):
        x = clip.image_tower.embed(torch.from_numpy(np.float32(volume))[None, None])[0]
        cubes = x.reshape(2, 2, 2, 2, 2, 2, 16).permute(0, 2, 4, 1, 3, 5, 6)
        want = cubes.flatten(3, 5).amax(3)
        np.testing.assert_allclose(tokens, want.numpy(), atol=2e-3, rtol=2e-3)
    # Kept; other weights, patients and grids are something else.
    from medtut.models import ctclip

    made, plain = [], ctclip.load_ctclip
    monkeypatch.setattr(ctclip, "load_ctclip", lambda p: made.append(p) or plain(p))
    assert np.array_equal(ct.embedded(part, settings()), found)
    assert not made
    torch.manual_seed(1)
    for p in clip.image_tower.embed.parameters():
        p.mul_(1.5)
    save_ctclip(clip, root / "second.safetensors", spacing=SPACING)
    second = settings(weights=str(root / "second.safetensors"))
    assert not np.array_equal(ct.embedded(part, second), found)
    fewer = Part(part.records[:3], part.volumes[:3], part.truth[:3])
    assert np.array_equal(ct.embedded(fewer, settings()), found[:3])
    wider = settings(spacing=[12.0, 12.0, 12.0])
    other = ct.load_part("target_train", wider)
    assert not np.array_equal(other.volumes, part.volumes)
    assert not np.array_equal(ct.embedded(other, wider), found)
    assert len(made) == 3


def test_a_model_has_the_switches_of_its_design(settings, clip):
    shape, given = (2, 3, 2, 16), settings(depth=2, batch_size=16)
    for name, design in DESIGNS.items():
        if design.text == "lora":
            continue  # test_lesson_05_text.py has a BERT
        model = ct.arm_model(design, given, shape)
        assert model.config["projection"] == design.projection
        assert model.kind == design.loss
        tower = model.image_tower
        assert (tower.config["norm"], tower.config["ffn"]) == (design.norm, design.ffn)
        assert len(tower.spatial.layers) == len(tower.temporal.layers) == 2
        batch = design.batch or 16
        if design.loss == "sigmoid":
            bias = float(model.logit_bias.detach())
            assert 1 / (1 + math.exp(-bias)) == pytest.approx(1 / batch, rel=1e-4), name
        # The text side is the checkpoint's and stays, all else is trained.
        still = [n for n, p in model.named_parameters() if not p.requires_grad]
        assert still == ["to_text.weight"]
        assert torch.equal(model.to_text.weight, clip.to_text.weight)
        image = model.to_image(tower.mix(torch.randn(3, *shape)))
        assert image.shape == (3, 8)
        text = model.encode_text(torch.randn(3, WIDTH))
        assert find_dead(model, model.loss(F.normalize(image, dim=-1), text)) == []


def test_a_report_is_the_mean_of_its_sentences():
    said = ["A node of 4.5 mm is seen.", "No effusion.", "A lung nodule."]
    records = [SimpleNamespace(findings=" ".join(said[:2]), impression=said[2]),
               SimpleNamespace(findings="", impression=said[1])]  # fmt: skip
    found = ct.report_vectors(Part(records, None, None), "text")
    each = Tower().embed(said)
    np.testing.assert_allclose(found, [each.mean(0), each[1]], atol=1e-6)


@pytest.fixture
def spy(monkeypatch):
    """What `fit` was given, while it fits."""
    calls, plain = [], medtut.train.fit

    def fit(model, loss, data, config, **more):
        calls.append(SimpleNamespace(model=model, loss=loss, data=data, config=config))
        calls[-1].more = more
        return plain(model, loss, data, config, **more)

    monkeypatch.setattr(medtut.train, "fit", fit)
    return calls


def synthetic(n=12, seed=0):
    """Patients of whom `embedded` is given by `tokens`."""
    rng = np.random.default_rng(seed)
    records = [SimpleNamespace(findings=f"Report {k}.", impression="", name=str(k))
               for k in range(n)]  # fmt: skip
    truth = rng.integers(0, 2, (n, 18)).astype(np.uint8)
    return Part(records, rng.normal(size=(n, 2, 2, 2, 16)).astype("f2"), truth)


@pytest.fixture
def tokens(monkeypatch):
    """Patients that are embedded already."""
    monkeypatch.setattr(ct, "embedded", lambda part, settings: part.volumes)


@pytest.mark.parametrize(
    ("name", "batch", "steps"),
    [
        ("layer_geglu_softmax", 3, 8), ("sigmoid_b4", 4, 6), ("softmax_b8", 8, 3),
        ("sigmoid_b64", 12, 2),
    ],
)  # fmt: skip
def test_every_arm_sees_as_many_volumes(settings, spy, tokens, name, batch, steps):
    part, given = synthetic(), settings(epochs=2.0, batch_size=3)
    model, result = ct.train_arm(name, 3, 1e-3, given, {"train": part})
    (call,) = spy
    assert (call.config.batch_size, call.config.steps, result.steps) == (
        batch, steps, steps
    )  # fmt: skip
    assert (call.config.lr, call.config.seed) == (1e-3, 3)
    assert call.config.groups == {SCALARS: 10.0}
    assert call.config.precision == "fp32"
    assert len(call.data) == 12
    item = call.data[5]
    assert item["tokens"].dtype == np.float32
    assert np.array_equal(item["tokens"], part.volumes[5])
    assert np.array_equal(item["text"], Tower().embed(["Report 5."])[0])
    again, _ = ct.train_arm(name, 3, 1e-3, given, {"train": part})
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    half = ct.train_arm(name, 4, 1e-3, given, {"train": part}, epochs=1.0)[1]
    assert half.steps == max(2, steps // 2)
    torch.manual_seed(3)
    start = ct.arm_model(DESIGNS[name], given, (2, 2, 2, 16))
    assert torch.equal(start.to_text.weight, model.to_text.weight)
    moved = zip(start.parameters(), model.parameters(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in moved) > 20


@pytest.mark.parametrize("name", ["layer_geglu_softmax", "rms_swiglu_sigmoid"])
def test_an_arm_learns_which_report_belongs_to_which_volume(settings, tokens, name):
    part, given = synthetic(8), settings(epochs=40.0, batch_size=4)
    model, result = ct.train_arm(name, 0, 3e-3, given, {"train": part})
    loss = [row["loss"] for row in result.history if "loss" in row]
    assert loss[-1] < 0.5 * loss[0]
    model.eval()
    with torch.no_grad():
        tokens = torch.from_numpy(part.volumes).float()
        image = F.normalize(model.to_image(model.image_tower.mix(tokens)), dim=-1)
        text = model.encode_text(torch.from_numpy(Tower().embed(part.texts())))
    assert ((image @ text.T).argmax(1) == torch.arange(8)).float().mean() > 0.8


@torch.no_grad()
def test_scores_of_an_arm_are_zero_shot(settings, tokens):
    part, given = synthetic(5), settings(text="words")
    torch.manual_seed(0)
    model = ct.arm_model(DESIGNS["sigmoid_b4"], given, (2, 2, 2, 16)).train()
    found = ct.arm_scores(model, part, given)
    assert found.shape == (5, 18)
    assert not model.training
    one = Part(part.records[3:4], part.volumes[3:4], part.truth[3:4])
    np.testing.assert_allclose(ct.arm_scores(model, one, given)[0], found[3], atol=1e-5)
    tokens = torch.from_numpy(part.volumes).float()
    vectors = model.to_image(model.image_tower.mix(tokens))
    want = ct.zero_shot(model, vectors.numpy(), "words")
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert found.std() > 1e-3


# --- another scanner -------------------------------------------------------------


def test_what_is_trained_is_what_was_asked_for(clip, part, root):
    x = torch.from_numpy(np.float32(part.volumes[:2]))[:, None]
    before = clip.encode_image(x).detach()
    for how in ("lora", "head", "full", "as_is"):
        model = load_ctclip(root / "tiny.safetensors")
        count = ct_target.prepare_for(model, how, 4)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
        torch.testing.assert_close(model.encode_image(x), before)  # nothing yet
        image = [n for n, _ in load_ctclip(root / "tiny.safetensors").named_parameters()
                 if n.startswith(("to_image", "image_tower"))]  # fmt: skip
        if how == "full":
            assert names == image
        elif how == "head":
            assert names == [n for n in image if n.startswith("to_image")]
        elif how == "as_is":
            assert (count, names) == (0, [])
            continue
        else:
            assert all("lora_" in n for n in names)
            kinds = (
                "embed.join",
                "embed.inner",
                "attention.to_",
                "ffn.to_",
                "to_image.0",
            )
            for kind in kinds:
                assert any(kind in n for n in names), kind
        # Whatever counts as trained can learn.
        assert find_dead(model, (model.encode_image(x) ** 3).sum()) == []


def test_the_rank_of_every_profile_fits_the_courses_model():
    tower = CTViT(128, (48, 96, 96), (6, 8, 8), 2, 1, 4, 32, stem="histogram")
    for name in PROFILES:
        model = CTCLIP(tower, 384, 128, "attention", pool_heads=32)
        rank = resolve(LESSON, name).rank
        assert 0 < ct_target.prepare_for(model, "lora", rank) < 1_000_000
        tower = CTViT(**tower.config)


def test_a_sentence_belongs_to_scans_of_which_it_is_true(clip, part):
    loss = ct_target.SentenceLoss(clip, "text")
    x = torch.from_numpy(np.float32(part.volumes))[:, None]
    truth = torch.from_numpy(part.truth).float()
    torch.manual_seed(2)
    got = loss(clip, {"volume": x, "truth": truth})
    torch.manual_seed(2)
    way = int(torch.randint(len(TEMPLATES), ()))
    image, terms = clip.encode_image(x), []
    for k in NAMED:
        for side, belongs in zip((0, 1), (truth[:, k], 1 - truth[:, k]), strict=True):
            said = prompts(FINDINGS[k], TEMPLATES)[side][way]
            text = clip.encode_text(torch.from_numpy(Tower().embed([said])))[0]
            logit = clip.log_scale.exp() * image @ text + clip.logit_bias
            terms.append(F.binary_cross_entropy_with_logits(logit, belongs))
    torch.testing.assert_close(got, sum(terms) / len(terms))
    # What is withheld is asked by nobody.
    other = truth.clone()
    other[:, [i for i in range(18) if i not in NAMED]] += 1
    torch.manual_seed(2)
    assert torch.equal(loss(clip, {"volume": x, "truth": other % 2}), got)
    other[:, NAMED[3]] = 1 - other[:, NAMED[3]]
    torch.manual_seed(2)
    assert not torch.equal(loss(clip, {"volume": x, "truth": other % 2}), got)


def test_withheld_here_and_in_the_pretraining_are_the_same():
    import ast
    from pathlib import Path

    path = Path(__file__).parents[2] / "data_scripts" / "pretrain_ctclip_small.py"
    values = {
        node.targets[0].id: node.value
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(values["WITHHELD"]) == ct.WITHHELD
    assert set(ct.WITHHELD) < set(FINDINGS)


@pytest.mark.parametrize("how", ["lora", "head", "full"])
def test_adapting_changes_the_image_side_alone(settings, part, clip, spy, how):
    given = settings(target_steps=3)
    model, result = ct_target.adapt(how, 1, 1e-2, given, part)
    assert result.steps == spy[0].config.steps == 3
    assert result.best is None
    assert len(spy[0].data) == 4
    start = dict(clip.named_parameters())
    changed = {n for n, p in model.named_parameters()
               if n in start and not torch.equal(p, start[n])}  # fmt: skip
    parts = {n.split(".")[0] for n in changed}
    wanted = {"lora": set(), "head": {"to_image"}, "full": {"to_image", "image_tower"}}
    assert parts == wanted[how]
    x = torch.from_numpy(np.float32(part.volumes))[:, None]
    with torch.no_grad():
        gap = model.eval().encode_image(x) - clip.encode_image(x)
        assert gap.abs().max() > 1e-3
    again, _ = ct_target.adapt(how, 1, 1e-2, given, part)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_rate_is_judged_on_patients_that_were_not_trained_on(settings, part, spy):
    given = settings(target_steps=5)
    model, result = ct_target.adapt("head", 1, 1e-2, given, part, validate=True)
    (call,) = spy
    assert call.config.steps == 2
    assert np.array_equal(call.data.volumes, part.volumes[:3])
    assert np.array_equal(call.data.truth, part.truth[:3])
    item = call.data[2]
    assert item["volume"].shape == (1, *IMAGE)
    assert np.array_equal(item["truth"], part.truth[2])
    loss = ct_target.SentenceLoss(model, given.text)
    items = {
        "volume": torch.from_numpy(np.float32(part.volumes[3:]))[:, None],
        "truth": torch.from_numpy(part.truth[3:]).float(),
    }
    torch.manual_seed(0)
    with torch.no_grad():
        want = -np.mean([float(loss(model.eval(), items)) for _ in range(4)])
    assert result.best["score"] == pytest.approx(want, abs=1e-5)


def test_as_it_is_nothing_is_trained(settings, part, clip, spy):
    model, result = ct_target.adapt("as_is", 1, 1e-2, settings(), part)
    assert (result, spy) == (None, [])
    pairs = zip(model.parameters(), clip.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --- runs ------------------------------------------------------------------------


def test_a_rate_is_chosen_once_and_by_the_dev_patients(settings, root, monkeypatch):
    asked, parts = [], {n: synthetic(8, k) for k, n in enumerate(("train", "dev"))}

    def train_arm(name, seed, rate, settings, given, epochs):
        asked.append((name, seed, rate, epochs))
        assert given is parts
        return rate, None

    def arm_scores(model, part, settings):
        assert part is parts["dev"]
        noise = np.random.default_rng(0).random(part.truth.shape)
        return part.truth + noise * {3e-4: 3, 1e-3: 0.5, 3e-3: 9}[model]

    monkeypatch.setattr(l05, "source_parts", lambda settings: parts)
    monkeypatch.setattr(l05, "train_arm", train_arm)
    monkeypatch.setattr(l05, "arm_scores", arm_scores)
    given = settings(epochs=3.0)
    grid = l05.tuned("sigmoid_b8", given)
    assert asked == [("sigmoid_b8", 1000, r, 1.5) for r in l05.LEARNING_RATES]
    assert grid["0.001"] == 1 > grid["0.0003"] > grid["0.003"]
    for change in ({"target_steps": 9}, {"test": 12}, {"rank": 2}, {"seed": 4}):
        assert l05.tuned("sigmoid_b8", settings(epochs=3.0, **change)) == grid
    assert len(asked) == 3
    for change in ({"epochs": 4.0}, {"train": 9}, {"depth": 2}, {"batch_size": 8}):
        l05.tuned("sigmoid_b8", settings(**{"epochs": 3.0, **change}))
    l05.tuned("sigmoid_b4", given)
    copy = shutil.copy(root / "tiny.safetensors", root / "copy.safetensors")
    with open(copy, "ab") as file:
        file.write(b" ")
    l05.tuned("sigmoid_b8", settings(epochs=3.0, weights=str(copy)))
    assert len(asked) == 3 * 7


def test_on_the_target_a_rate_is_chosen_by_loss(settings, monkeypatch):
    asked, part = [], synthetic(4)

    def adapt(name, seed, rate, settings, given, validate):
        asked.append((name, seed, rate, given is part, validate))
        return None, SimpleNamespace(best={"score": -rate})

    monkeypatch.setattr(l05, "target_parts", lambda settings: {"target_train": part})
    monkeypatch.setattr(l05, "adapt", adapt)
    grid = l05.tuned("lora", settings())
    assert asked == [("lora", 1000, r, True, True) for r in l05.TARGET_RATES]
    assert grid == {str(r): -r for r in l05.TARGET_RATES}
    for change in ({"train": 9}, {"epochs": 2.0}, {"depth": 3}, {"target_test": 9}):
        assert l05.tuned("lora", settings(**change)) == grid
    assert len(asked) == len(l05.TARGET_RATES)
    for change in ({"rank": 2}, {"target_steps": 7}, {"target_train": 5}):
        l05.tuned("lora", settings(**change))
    l05.tuned("head", settings())
    assert len(asked) == len(l05.TARGET_RATES) * 5


def test_a_run_on_the_source_stores_what_the_lesson_reads(settings, monkeypatch):
    monkeypatch.setattr(l05, "tuned", lambda *_: {"0.0003": 0.5, "0.003": 0.6})
    given = settings(epochs=3.0)
    found = l05.run_arm("sigmoid_b4", 2, given)
    json.dumps(found)
    assert (found["lr"], found["steps"]) == (0.003, 6)
    assert found["validation_by_lr"] == {"0.0003": 0.5, "0.003": 0.6}
    parts = l05.source_parts(given)
    assert list(parts) == ["train", "dev", "test"]
    model, result = ct.train_arm("sigmoid_b4", 2, 0.003, given, parts)
    scores = ct.arm_scores(model, parts["test"], given)
    np.testing.assert_allclose(found["scores"], scores, atol=1e-4)
    truth = parts["test"].truth
    assert [[int(c) for c in row] for row in found["truth"]] == truth.tolist()
    known = [k for k in range(18) if 0 < truth[:, k].sum() < len(truth)]
    areas = [roc_auc_score(truth[:, k], scores[:, k]) for k in known]
    assert found["score"] == pytest.approx(np.mean(areas))
    assert len(known) > 5
    loss = [row["loss"] for row in result.history]
    assert found["loss"] == pytest.approx([loss[0], loss[-1]])
    assert found["failed"] == (loss[-1] >= loss[0])
    every = sum(p.numel() for p in model.parameters())
    assert found["trainable"] == every - model.to_text.weight.numel()
    assert found["train_seconds"] > 0


def test_a_run_on_the_target_is_judged_there(settings, clip, monkeypatch):
    monkeypatch.setattr(l05, "tuned", lambda *_: {"0.0001": -3.0, "0.001": -2.0})
    given = settings(target_steps=2)
    parts = l05.target_parts(given)
    assert list(parts) == ["target_train", "target_test"]
    test = parts["target_test"]
    plain, lora = l05.run_arm("as_is", 0, given), l05.run_arm("lora", 0, given)
    json.dumps([plain, lora])
    vectors = ct.embed(clip, test.volumes)
    want = ct.zero_shot(clip, vectors, given.text, TEMPLATES[:1])
    np.testing.assert_allclose(plain["scores"], want, atol=1e-4)
    assert plain["score"] == pytest.approx(l05.macro(want, test.truth))
    assert (plain["lr"], plain["validation_by_lr"], plain["trainable"]) == (None, {}, 0)
    assert not plain.keys() & {"loss", "failed", "steps", "train_seconds"}
    assert (lora["lr"], lora["steps"]) == (0.001, 2)
    assert lora["trainable"] > 0
    assert np.abs(np.subtract(lora["scores"], plain["scores"])).max() > 1e-4
    for one in (plain, lora):
        assert one["truth"] == ["".join(map(str, row)) for row in test.truth.tolist()]


def test_a_loss_that_ends_no_lower_has_failed(settings, monkeypatch):
    parts = {"target_train": synthetic(4), "target_test": synthetic(8)}
    monkeypatch.setattr(l05, "target_parts", lambda settings: parts)
    monkeypatch.setattr(l05, "tuned", lambda *_: {"0.1": 0.0})
    monkeypatch.setattr(l05, "embed", lambda *_: None)
    monkeypatch.setattr(l05, "zero_shot", lambda *_: parts["target_test"].truth * 1.0)
    for losses, failed, ends in (
        ([3.0, *[9.0] * 38, 2.0], False, [7.5, 7.25]),  # a tenth at each end
        ([1.0] * 20, True, [1.0, 1.0]),
        ([3.0, 1.0, float("nan"), 1.0], True, [3.0, 1.0]),
    ):
        steps = [{"step": k, "loss": v} for k, v in enumerate(losses)]
        rows = [*steps, {"step": 9, "score": 1.0}]
        result = SimpleNamespace(history=rows, steps=len(losses), seconds=1.0)
        done = torch.nn.Linear(1, 1), result
        monkeypatch.setattr(l05, "adapt", lambda *_, done=done: done)
        found = l05.run_arm("full", 0, settings())
        assert found["failed"] is failed
        assert found["loss"] == ends
        assert (found["score"], found["trainable"]) == (1.0, 2)


# --- judged ----------------------------------------------------------------------


def scored(seeds, n, good, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, (n, 18))
    truth[:, 4] = 0  # nobody has it
    return truth, good * truth + rng.normal(size=(seeds, n, 18))


def test_areas_are_macro_auroc_with_the_same_draws_for_all():
    truth, scores = scored(3, 40, 1.0)
    found = l05.areas(scores, truth, draws=50)
    assert found.shape == (3, 51)
    known = [k for k in range(18) if k != 4]
    for one, row in zip(scores, found, strict=True):
        want = np.mean([roc_auc_score(truth[:, k], one[:, k]) for k in known])
        assert row[0] == pytest.approx(want)
        assert l05.macro(one, truth) == pytest.approx(want)
    assert found[:, 1:].std(1).min() > 0.003
    assert np.abs(found[:, 1:].mean(1) - found[:, 0]).max() < 0.02
    # The same ranks have the same areas, draw for draw, in another arm too.
    np.testing.assert_allclose(l05.areas(scores[1:] * 3 + 1, truth, 50), found[1:])


def test_a_contrast_is_paired_over_patients_and_seeds():
    truth, scores = scored(3, 40, 0.7)
    one = l05.areas(scores, truth, draws=200)
    noise = np.random.default_rng(1).normal(size=scores.shape)
    other = l05.areas(scores + 0.02 * noise, truth, draws=200)
    assert l05.contrast(one, one) == (0, 0, 0)
    mean, low, high = l05.contrast(one + 0.25, one)
    np.testing.assert_allclose((mean, low, high), 0.25)
    mean, low, high = l05.contrast(one, other)
    assert mean == pytest.approx((one - other)[:, 0].mean())
    assert low < mean < high
    back = l05.contrast(other, one)
    np.testing.assert_allclose(back, (-mean, -high, -low), atol=1e-9)
    # Paired: far narrower than the spread of an arm.
    wide = np.diff(l05.spread(one))[0]
    assert high - low < wide / 3
    low, high = l05.spread(one)
    assert low < one[:, 0].mean() < high


def test_an_interval_is_as_wide_as_seeds_and_patients_make_it():
    draws, rng = 4000, np.random.default_rng(0)
    zero = np.zeros((4, draws + 1))
    # Patients alone: every seed moves alike, so averaging seeds helps nothing.
    alike = zero + rng.normal(size=draws + 1)
    _, low, high = l05.contrast(alike, zero)
    assert (high - low) / 3.92 == pytest.approx(1.0, rel=0.05)
    # Seeds alone: resampled means of four seeds.
    seeds = zero + np.array([0.0, 0.0, 0.0, 1.0])[:, None]
    mean, low, high = l05.contrast(seeds, zero)
    assert mean == 0.25
    assert (low, high) == (0.0, 0.75)


def test_findings_of_a_voxel_can_be_left_out(settings):
    part = ct.load_part("target_test", settings())
    size, truth = ct.voxels(part), part.truth
    assert ((size == 1) & (truth == 1)).any()
    scores = np.random.default_rng(0).random(truth.shape)
    wanted = []
    for k in range(18):
        keep = [n for n in range(len(truth)) if truth[n, k] == 0 or size[n, k] >= 2]
        if 0 < truth[keep, k].sum() < len(keep):
            wanted.append(roc_auc_score(truth[keep, k], scores[keep, k]))
    found = l05.macro_visible(scores, part)
    assert found == pytest.approx(np.mean(wanted))
    assert found != pytest.approx(l05.macro(scores, truth))
    assert l05.macro_visible(scores, part, 0) == pytest.approx(l05.macro(scores, truth))


def test_of_real_patients_all_findings_count(settings, tmp_path, monkeypatch):
    part = ct.load_part("target_test", settings())
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))  # the part lies outside of it now
    scores = np.random.default_rng(0).random(part.truth.shape)
    assert ct.voxels(part) is None
    assert l05.macro_visible(scores, part) == pytest.approx(
        l05.macro(scores, part.truth)
    )


def test_truth_of_committed_runs_is_that_of_the_arm(monkeypatch):
    runs = [
        {"arm": "full", "metrics": {"truth": ["000", "001"]}},
        {"arm": "lora", "metrics": {"truth": ["010", "111", "100"]}},
        {"arm": "lora", "metrics": {"truth": ["010", "111", "100"]}},
    ]
    asked = []
    load = lambda slug: asked.append(slug) or runs  # noqa: E731
    monkeypatch.setattr(l05.sweep, "load_sweep", load)
    found = l05.sweep_truth("lora")
    assert found.tolist() == [[0, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert asked == [LESSON]


def test_columns_are_those_that_have_an_auroc():
    report = {"findings": {"a": {"auroc": [0.5, 0.4, 0.6]}, "b": None,
                           "c": {"auroc": [0.9, 0.8, 0.95]}}}  # fmt: skip
    at, numbers = l05.columns(report, ["c", "b", "a"])
    assert at.tolist() == [0, 2]
    assert numbers.tolist() == [[0.9, 0.5], [0.8, 0.4], [0.95, 0.6]]


# --- judgement -------------------------------------------------------------------


def test_the_baseline_learns_from_labels_alone():
    rng = np.random.default_rng(0)

    def drawn(n):
        truth = rng.integers(0, 2, (n, 18)).astype(np.uint8)
        truth[:2] = [[0] * 18, [1] * 18]
        volumes = rng.normal(-0.5, 0.05, (n, 8, 8, 8))
        volumes[:, :2, :2, :2] += 0.6 * truth[:, 4, None, None, None]
        return Part([SimpleNamespace()] * n, volumes.astype("f2"), truth)

    train, dev, test = drawn(60), drawn(30), drawn(40)
    found = l05.baseline(train, dev, test)
    assert found.shape == (40, 18)
    assert roc_auc_score(test.truth[:, 4], found[:, 4]) > 0.95
    others = [k for k in range(18) if k != 4]
    assert abs(l05.macro(found[:, others], test.truth[:, others]) - 0.5) < 0.1
    one = test.some(slice(3, 9))
    assert len(one.records) == 6
    np.testing.assert_allclose(l05.baseline(train, dev, one), found[3:9], rtol=1e-5)
    assert np.array_equal(one.truth, test.truth[3:9])


def test_the_gap_of_spreads_has_an_interval_over_seeds():
    wide, narrow = np.zeros((5, 3)), np.zeros((5, 3))
    wide[:, 0], narrow[:, 0] = [0, 1, 2, 3, 4], [0, 0.1, 0.2, 0.1, 0]
    found = l05.spread_gap(wide, narrow)
    sides = wide[:, 0].std(ddof=1), narrow[:, 0].std(ddof=1)
    assert found[0] == pytest.approx(sides[0] - sides[1])
    assert 0 < found[1] < found[0] < found[2] < 4
    back = l05.spread_gap(narrow, wide)
    assert back[0] == -found[0]
    assert back[2] < 0
    same = l05.spread_gap(wide, wide)
    assert same[0] == 0
    assert same[1] < -0.1 < 0.1 < same[2], "seeds are drawn for each arm by itself"


def test_outlines_of_a_patient_are_those_of_the_file(settings):
    given = settings()
    part = ct.load_part("test", given)
    found = l05.outlines(part, 2, given)
    assert found.shape == (18, *IMAGE)
    plain = chest_cohort.outlines_of(part.records[2].path)
    assert np.array_equal(found, ct._as_seen(plain, given))
    assert found.any()
