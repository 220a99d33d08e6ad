"""The designs of lesson 03: whom they train on, what they are asked, how judged."""

import copy
import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medtut.course.lessons import l03, sam_judge
from medtut.course.lessons import sam as designs
from medtut.course.lessons.sam import DESIGNS, PACKED, Arm, build, load_task, slices_of
from medtut.course.lessons.sam_judge import PROMPTS, Frames, judge, through_volume
from medtut.course.profiles import PROFILES, SettingsError, resolve
from medtut.data import image_folder
from medtut.data.brats import load_case
from medtut.data.brats_men import MEN, patient_of
from medtut.errors import MedtutError
from medtut.lora import adapted_layers
from medtut.models import litemedsam, sam_prompts
from medtut.models.sam_prompts import box_of, scale_boxes
from tests.data.brats_small import LPS, arrays

LESSON = "03"
PARTS = ("train", "validation", "test")
TUMOUR = [int(z) for z in np.flatnonzero(arrays(0)[1].any((0, 1)))]  # in every case
SMALL = {"train_patients": 2, "validation_patients": 1, "test_patients": 3}
TWICE = ("BraTS-MEN-00001", "BraTS-MEN-00003", "BraTS-MEN-00004")  # with two studies


def write_study(root, name, seed):
    folder = root / name
    folder.mkdir(parents=True)
    images, label = arrays(seed)
    volumes = dict(zip(MEN, images, strict=True))
    volumes["seg"] = np.where(label == 4, 3, label).astype("u1")
    for kind, voxels in volumes.items():
        image = nibabel.Nifti1Image(voxels, LPS)
        nibabel.save(image, folder / f"{name}-{kind}.nii.gz")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Seven patients, three of them with two studies, and a cache of their own."""
    folder = tmp_path_factory.mktemp("men")
    for i in range(7):
        patient = f"BraTS-MEN-0000{i}"
        for study in range(1 + (patient in TWICE)):
            write_study(folder / "set", f"{patient}-00{study}", 10 * study + i)
    return folder


@pytest.fixture(autouse=True)
def surroundings(root, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(root / "cache"))
    monkeypatch.delenv("MEDTUT_PROFILE", raising=False)


@pytest.fixture
def settings(root):
    def made(**changes):
        return resolve(LESSON, "smoke", {"data": str(root / "set"), **SMALL, **changes})

    return made


@pytest.fixture
def task(settings):
    return load_task(settings())


@pytest.fixture(scope="module")
def random_sam():
    torch.manual_seed(0)
    return litemedsam.LiteMedSAM().eval()


@pytest.fixture
def lite(random_sam, monkeypatch):
    """Random weights stand in for the published ones; returns what was asked for."""
    asked = []

    def load(path=None):
        asked.append(path)
        return copy.deepcopy(random_sam)

    monkeypatch.setattr(litemedsam, "load_litemedsam", load)
    return asked


@pytest.fixture
def empty_lite(monkeypatch):
    """LiteMedSAM without numbers: enough to count what is trained."""

    def load(path=None):
        with torch.device("meta"):
            return litemedsam.LiteMedSAM()

    monkeypatch.setattr(litemedsam, "load_litemedsam", load)


# --- settings --------------------------------------------------------------------


def test_presets_fit_the_schema_and_full_is_the_source():
    assert set(l03.PRESETS) == set(PROFILES)
    found = {name: resolve(LESSON, name) for name in PROFILES}
    full = found["full"]
    assert (full.model, full.side) == ("vit_b", 1024)
    assert full.train_patients + full.validation_patients + full.test_patients == 880
    assert (full.train_patients, full.test_patients) == (680, 150)
    assert full.steps == 680 * 50  # an epoch shows every volume once
    for name in ("smoke", "quick"):
        assert (found[name].model, found[name].first_layer) == ("litemedsam", 2)
        assert found[name].side <= 256
        assert found[name].jitter == 0.05


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": "vit_g"}, "model = 'vit_g'"),
        ({"side": 250}, "side = 250"),
        ({"side": 48}, "side = 48"),
        ({"side": 2048}, "side = 2048"),
        ({"first_layer": 0}, "first_layer = 0"),
        ({"first_layer": 4}, "first_layer = 4"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": "ten"}, "steps = 'ten'.*whole number"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"jitter": 1.0}, "jitter = 1.0"),
        ({"jitter": -0.05}, "jitter = -0.05"),
        ({"slices": 0}, "slices = 0"),
        ({"train_patients": 0}, "train_patients = 0"),
        ({"validation_patients": 0}, "validation_patients = 0"),
        ({"test_patients": 2}, "test_patients = 2"),
        ({"slice": 3}, "unknown setting.*did you mean 'slices'"),
    ],
)
def test_wrong_settings_are_refused(given, says):
    with pytest.raises(SettingsError, match=f"(?s){says}"):
        resolve(LESSON, "quick", given)


def test_arms_of_the_sweep_are_the_designs_at_the_same_settings():
    assert set(l03.ARMS) == set(DESIGNS)
    assert not any(l03.ARMS.values())
    assert {*l03.TUNED, *l03.UNTRAINED} <= set(DESIGNS)
    assert l03.TUNING_SEED not in range(5)
    rates = l03.LEARNING_RATES
    assert len(set(rates)) == len(rates) > 1


# --- patients --------------------------------------------------------------------


def test_studies_of_a_patient_stay_together(settings, task):
    parts = [getattr(task.split, part) for part in PARTS]
    patients = [{patient_of(name) for name in part} for part in parts]
    assert [len(p) for p in patients] == [2, 1, 3]
    assert len(set.union(*patients)) == 6, "no patient is in two parts"
    for part, names in zip(parts, patients, strict=True):
        wanted = {
            n + end for n in names for end in ("-000", "-001")[: 1 + (n in TWICE)]
        }
        assert set(part) == wanted
    assert sum(map(len, parts)) > 6, "a patient with two studies was drawn"
    assert set(task.cases) == {name for part in parts for name in part}
    assert [case.id for case in task.part("test")] == list(task.split.test)
    again = load_task(settings(seed=7))
    assert again.split == task.split, "the seed of a run does not move the patients"


def test_patients_are_shuffled(task):
    order = [name for part in PARTS for name in getattr(task.split, part)]
    assert order != sorted(order)


def test_region_holds_every_brain_and_tumour(task):
    for case in task.cases.values():
        volume = load_case(case, MEN)
        inside = np.any([*volume.image, volume.label], axis=0)
        part = inside[tuple(slice(*side) for side in task.region)]
        assert part.sum() == inside.sum()
    assert all(
        b - a < n for (a, b), n in zip(task.region, volume.label.shape, strict=True)
    )


def test_missing_folder_is_named(settings, root):
    with pytest.raises(MedtutError, match=r"no folder .*nowhere"):
        load_task(settings(data=str(root / "nowhere")))


def test_folder_with_too_few_patients_says_how_many(settings, root):
    with pytest.raises(MedtutError) as caught:
        load_task(settings(train_patients=4))
    text = str(caught.value)
    assert str(root / "set") in text
    assert "holds 7 patients" in text, "patients, not their ten studies"
    assert "4 + 1 + 3" in text
    assert "train_patients" in text


@pytest.fixture
def drawn(root, monkeypatch):
    """Cohorts that were asked for; the small folder stands in."""
    asked = []

    def cohort_folder(spec, layout, progress):
        asked.append((spec, layout))
        return root / "set"

    monkeypatch.setattr(designs, "cohort_folder", cohort_folder)
    return asked


@pytest.fixture
def photos(tmp_path):
    """Three pictures of two sizes with masks, one of them empty."""
    from PIL import Image

    for kind in ("images", "masks"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
    for i, size in enumerate([(20, 30), (20, 30), (24, 18)]):
        image = np.random.default_rng(i).integers(0, 255, size).astype("u1")
        mask = np.zeros(size, "u1")
        mask[4 : 12 + i, 5:13] = 255 * (i != 1)
        for kind, values in (("images", image), ("masks", mask)):
            Image.fromarray(values).save(tmp_path / "photos" / kind / f"p{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("with_photos", [False, True])
def test_cohort_is_drawn_without_volumes_of_ones_own(
    settings, drawn, photos, with_photos
):
    chosen = (
        settings(data=str(photos)) if with_photos else resolve(LESSON, "smoke", SMALL)
    )
    found = load_task(chosen)
    ((spec, layout),) = drawn
    assert layout == "brats-men"
    assert (spec.scanner, spec.tumours, spec.count) == ("target", ("meningioma",), 6)
    assert len(found.part("test")) >= 3


def test_own_volumes_are_not_drawn(settings, drawn, root, photos):
    load_task(settings())
    assert not drawn
    assert designs.is_cohort(str(root / "set"))
    assert not designs.is_cohort(str(photos))


# --- slices ----------------------------------------------------------------------


def levels(items):
    """Case -> its levels, one scan's worth."""
    found = {}
    for item in items:
        found.setdefault((item["case"], item["modality"]), []).append(item["z"])
    by_case = {}
    for (case, _), z in found.items():
        assert by_case.setdefault(case, z) == z, "the same levels in every scan"
    return by_case


def test_training_slices_follow_the_policy(task, settings):
    def chosen(policy, slices=2, seed=0):
        args = (task, "train", Arm(policy=policy), settings(slices=slices), seed)
        return levels(slices_of(*args))

    area = (arrays(0)[1] > 0).sum((0, 1))
    studies = list(task.split.train)
    assert chosen("max") == {name: [int(area.argmax())] for name in studies}
    assert chosen("all") == dict.fromkeys(studies, TUMOUR)
    drawn = [chosen("random", seed=seed) for seed in range(6)]
    for one in drawn:
        assert list(one) == studies
        assert all(len(z) == 2 and set(z) <= set(TUMOUR) for z in one.values())
    assert drawn[0] == chosen("random")
    assert any(one != drawn[0] for one in drawn), "another seed draws others"
    assert chosen("random", 99) == chosen("all")


@pytest.mark.parametrize("policy", ["random", "max", "all"])
@pytest.mark.parametrize(
    ("count", "wanted"), [(1, [2]), (2, [1, 3]), (9, [0, 1, 2, 3])]
)
def test_judged_slices_are_spread_and_the_same_for_all(
    task, settings, policy, count, wanted
):
    assert len(TUMOUR) == 4
    found = [
        slices_of(task, "test", Arm(policy=policy), settings(slices=count), seed)
        for seed in (0, 3)
    ]
    picked = [TUMOUR[i] for i in wanted]
    for items in found:
        assert levels(items) == dict.fromkeys(task.split.test, picked)
        assert len(items) == len(task.split.test) * len(picked) * 4


def test_items_hold_the_mask_and_the_one_beside_it(task, settings):
    items = slices_of(task, "test", Arm(), settings(slices=4), 0)
    low = task.region[2][0]
    for case in task.part("test"):
        own = [i for i in items if i["case"] == case.id]
        assert {i["modality"] for i in own} == set(MEN)
        _, truth = sam_judge.volume_slices(case, MEN, region=task.region)
        for item in own:
            z = item["z"]
            assert np.array_equal(item["mask"], truth[z - low])
            # The next one up; on the topmost level, the one below.
            near = z + 1 if z < TUMOUR[-1] else z - 1
            assert np.array_equal(item["beside"], truth[near - low])
    areas = {int(i["mask"].sum()) for i in items}
    assert len(areas) > 1, "levels can be told apart"


def test_packed_items_are_three_scans_in_order(task, settings):
    chosen = settings(slices=2)
    assert PACKED == ("t1c", "t2f", "t2w")
    for part in ("train", "test"):
        single = slices_of(task, part, Arm(), chosen, 0)
        packed = slices_of(task, part, Arm(packed=True), chosen, 0)
        assert len(packed) * 4 == len(single)
        scans = {(i["case"], i["z"], i["modality"]): i for i in single}
        for item in packed:
            assert item["image"].shape == (*item["mask"].shape, 3)
            for k, name in enumerate(PACKED):
                one = scans[item["case"], item["z"], name]
                assert np.array_equal(item["image"][..., k], one["image"])
                assert np.array_equal(item["mask"], one["mask"])
                if part == "test":
                    assert np.array_equal(item["beside"], one["beside"])


# --- what is trained -------------------------------------------------------------

ENCODER, DECODER = 5_726_740, 4_058_340
PER_RANK = 4 * (6 * 160 + 2 * 320)  # q and v of eight blocks, in and out
TRAINED = {
    "zero": 0,
    "zero_packed": 0,
    "lora": 4 * PER_RANK,
    "full": ENCODER,
    "decoder": DECODER,
    "lora_decoder": DECODER + 4 * PER_RANK,
    "published": 64 * PER_RANK,
    **dict.fromkeys(("unscaled_64", "alpha_64", "rs_64"), 64 * PER_RANK),
    **dict.fromkeys(("max", "all", "packed"), 4 * PER_RANK),
}
SCALES = {"published": 1, "unscaled_64": 1, "alpha_64": 1 / 16, "rs_64": 1 / 4}


def test_every_design_is_counted():
    assert set(TRAINED) == set(DESIGNS)
    different = {name for name, arm in DESIGNS.items() if arm.self_target}
    assert different == {"published"}
    assert {n for n, arm in DESIGNS.items() if arm.packed} == {"packed", "zero_packed"}
    policies = {n: arm.policy for n, arm in DESIGNS.items() if arm.policy != "random"}
    assert policies == {"max": "max", "all": "all"}


@pytest.mark.parametrize("name", TRAINED)
def test_what_each_arm_trains(empty_lite, settings, name):
    model = build(name, settings())
    live = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(live.values()) == TRAINED[name]
    assert not any(n.startswith("prompt_encoder") for n in live)
    layers = adapted_layers(model)
    if DESIGNS[name].encoder != "lora":
        assert not layers
        return
    assert list(layers) == [
        f"image_encoder.layers.{i}.blocks.{j}.attn.qkv"
        for i, depth in ((2, 6), (3, 2))
        for j in range(depth)
    ]
    for layer in layers.values():
        assert layer.parts == ("query", "value")
        assert layer.spec.scale == pytest.approx(SCALES.get(name, 1))
        assert layer.spec.dropout == 0


@pytest.mark.parametrize(("first", "blocks"), [(1, 10), (2, 8), (3, 2)])
def test_first_layer_moves_the_cut(empty_lite, settings, first, blocks):
    assert len(adapted_layers(build("lora", settings(first_layer=first)))) == blocks


def test_checkpoint_of_the_settings_is_taken(lite, settings):
    build("zero", settings())
    build("zero", settings(checkpoint="mine.pth"))
    assert lite == [None, "mine.pth"]


def test_random_weights_are_asked_for_by_name(lite, settings):
    model = build("lora", settings(checkpoint="random"))
    assert not lite, "no file is looked for"
    assert not model.training
    assert len(adapted_layers(model)) == 8


def test_metas_sam_needs_a_checkpoint(settings):
    with pytest.raises(MedtutError, match=r"vit_b needs Meta's weights.*'random'"):
        build("lora", settings(model="vit_b"))


@pytest.mark.parametrize(
    ("changes", "missing", "wanted"),
    [
        ({}, False, None),
        ({}, True, "random"),
        ({"checkpoint": "mine.pth"}, True, "mine.pth"),
        ({"model": "vit_b"}, True, None),  # refused later, in its own words
    ],
)
def test_a_lesson_without_weights_says_so(
    settings, monkeypatch, changes, missing, wanted
):
    from medtut.data import assets

    asked, said = [], []

    def fetch(name):
        asked.append(name)
        if missing:
            raise assets.AssetUnavailable("no network")

    monkeypatch.setattr(assets, "fetch", fetch)
    chosen = settings(**changes)
    lesson = SimpleNamespace(settings=chosen, fell_back=lambda *w: said.append(w))
    found = l03.with_weights(lesson)
    assert found == chosen.model_copy(update={"checkpoint": wanted})
    assert asked == ([] if changes else ["litemedsam"])
    assert ["no number below is evidence" in w[1] for w in said] == (
        [True] if wanted == "random" else []
    )


@pytest.mark.parametrize(
    ("profile", "model", "side"),
    [
        ("smoke", "litemedsam", 64),
        ("quick", "litemedsam", 256),
        ("full", "vit_b", 1024),
    ],
)
def test_pictures_are_seen_at_the_models_own_size(profile, model, side):
    chosen = resolve(LESSON, profile)
    found = l03.picture_settings(chosen)
    assert (found.model, found.side) == (model, side)
    assert found == chosen.model_copy(update={"side": side})


def test_metas_sam_is_built_where_the_settings_say_so(settings, monkeypatch):
    from medtut.models import sam as models

    asked, original = [], models.build_sam

    def build_sam(kind, side, checkpoint):
        asked.append((kind, side, checkpoint))
        with torch.device("meta"):
            return original("tiny", None)

    monkeypatch.setattr(models, "build_sam", build_sam)
    chosen = settings(model="vit_b", side=256, checkpoint="b.pth")
    model = build(Arm(rank=2), chosen)
    build("zero", settings(model="vit_b", side=256, checkpoint="random"))
    assert asked == [("vit_b", 256, "b.pth"), ("vit_b", 256, None)]
    assert list(adapted_layers(model)) == [
        f"image_encoder.blocks.{i}.attn.qkv" for i in range(4)
    ]


@torch.no_grad()
def test_an_adapted_model_starts_as_the_pretrained_one(lite, random_sam, settings):
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = random_sam.image_encoder(x)
    found = build("lora_decoder", settings()).eval().image_encoder(x)
    torch.testing.assert_close(found, want)


# --- frames ----------------------------------------------------------------------


def item_of(size, rows, columns, seed=0, **more):
    """A picture of noise with a rectangle; rows and columns end before."""
    image = np.random.default_rng(seed).random(size).astype(np.float32)
    mask = np.zeros(size, bool)
    mask[slice(*rows), slice(*columns)] = True
    return {"image": image, "mask": mask, "case": "p", "z": 0, "modality": "t1c"} | more


def test_frames_of_both_kinds_of_models(settings):
    item = item_of((24, 20), (6, 18), (4, 12))
    small = Frames([item], settings(side=64), 0.0)[0]
    assert len(Frames([item, item], settings(), 0.0)) == 2
    # 20 columns become 53 pixels, and 56 with padding to whole tokens of 4.
    assert small["x"].shape == (3, 64, 56)
    assert (small["x"][..., 53:] == 0).all()
    assert float(small["x"].min()) == 0
    assert float(small["x"].max()) == 1
    sam_like = Frames([item], settings(side=64, model="vit_b"), 0.0)[0]
    assert sam_like["x"].shape == (3, 64, 64)
    assert float(sam_like["x"].min()) < -1, "ImageNet's mean is taken off"
    for frame in (small, sam_like):
        scale = torch.tensor([53 / 20, 64 / 24] * 2)
        torch.testing.assert_close(
            frame["box"], torch.tensor([[4.0, 6, 11, 17]]) * scale
        )
        assert frame["mask"].shape == (1, 24, 20)
        assert frame["mask"].dtype == torch.float32
        assert np.array_equal(frame["mask"][0] > 0, item["mask"])


def test_jitter_is_drawn_anew_seeded_and_stays_inside(settings):
    item = item_of((24, 20), (0, 24), (1, 20))
    frames = Frames([item], settings(side=64), 0.5)

    def boxes(seed):
        torch.manual_seed(seed)
        return torch.cat([frames[0]["box"] for _ in range(20)])

    one = boxes(0)
    assert torch.equal(one, boxes(0))
    assert not torch.equal(one, boxes(1))
    assert len(one.unique(dim=0)) == 20
    last = torch.tensor([19 * 53 / 20, 23 * 64 / 24])
    assert (one[:, :2] <= one[:, 2:]).all()
    assert (one >= 0).all()
    assert (one[:, 2:] <= last + 1e-4).all()


def test_no_jitter_is_the_tight_box(settings):
    item = item_of((24, 20), (6, 18), (4, 12))
    frames = Frames([item], settings(side=64), 0.0)
    assert torch.equal(frames[0]["box"], frames[0]["box"])
    want = scale_boxes(box_of(item["mask"])[None], (24, 20), 64)
    assert torch.equal(frames[0]["box"], want)


@pytest.mark.parametrize("model", ["litemedsam", "vit_b"])
def test_an_answer_lies_where_the_box_was(settings, monkeypatch, model):
    """A decoder that fills its box shows whether both ways meet."""
    chosen = settings(side=128, model=model)
    pixels = 1 if model == "litemedsam" else 4  # of the input, to one of the logits

    def fill(sam, embedding, boxes):
        h, w = embedding.shape[2:]
        y, x = torch.meshgrid(torch.arange(4 * h), torch.arange(4 * w), indexing="ij")
        x0, y0, x1, y1 = boxes[:, 0].movedim(-1, 0)[..., None, None] / pixels
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        return (20.0 * inside - 10)[:, None, None], None

    monkeypatch.setattr(sam_prompts, "decode", fill)
    items = [
        item_of((60, 44), (12, 40), (6, 30)),
        item_of((60, 44), (30, 59), (20, 43)),
    ]
    frames = [Frames([item], chosen, 0.0)[0] for item in items]
    token = 4 if model == "litemedsam" else 16
    h, w = (n // token for n in frames[0]["x"].shape[1:])
    box = torch.stack([frame["box"] for frame in frames])
    logits = sam_judge.answer(None, torch.zeros(2, 256, h, w), box, (60, 44), chosen)
    assert logits.shape == (2, 1, 60, 44)
    for item, found in zip(items, logits, strict=True):
        # The box ends on its last pixel's corner: a row and a column less at most.
        assert sam_judge.dice(found[0].numpy() > 0, item["mask"]) > 0.92


# --- judging ---------------------------------------------------------------------


class Oracle(nn.Module):
    """A stand-in for the model: ``knows`` gives the logits of a picture and its box.

    It is asked through `answer`, and notes the box in the pixels of its input.
    """

    def __init__(self, items, settings, knows):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        frames = [Frames([item], settings, 0.0)[0]["x"] for item in items]
        self.place = {x.numpy().tobytes(): k for k, x in enumerate(frames)}
        assert len(self.place) == len(items)
        self.knows, self.boxes, self.modes, self.asked = knows, [], [], []

    def encode(self, x):
        assert x.shape[0] == 1
        assert not torch.is_grad_enabled()
        self.asked.append(self.place[x[0].numpy().tobytes()])
        return torch.tensor([self.asked[-1]])

    def answer(self, _, embedding, box, size, settings):
        self.modes.append(self.training)
        self.boxes.append(None if box is None else box.clone())
        found = torch.as_tensor(np.asarray(self.knows(int(embedding))))
        assert found.shape == size
        return found.float()[None, None]


@pytest.fixture
def ask(settings, monkeypatch):
    def asked(items, knows, prompts=PROMPTS[1:2], seed=0):
        oracle = Oracle(items, settings(), knows).train()
        monkeypatch.setattr(
            sam_judge, "answer", lambda sam, *args: sam.answer(sam, *args)
        )
        found = judge(oracle, oracle.encode, items, settings(), prompts, seed)
        return oracle, found

    return asked


def sure(mask):
    return 20.0 * mask - 10


def test_perfect_is_one_and_empty_is_zero(ask, task, settings):
    items = slices_of(task, "test", Arm(), settings(slices=2), 0)
    oracle, found = ask(items, lambda k: sure(items[k]["mask"]), PROMPTS)
    assert list(found) == list(PROMPTS)
    for verdict in found.values():
        assert verdict.patients == list(task.split.test)
        assert verdict.table.shape == (len(verdict.patients), 4)
        assert (verdict.table == 1).all()
        assert (verdict.mean == 1).all()
        assert (verdict.dice == 1).all()
        for mask, item in zip(verdict.masks, items, strict=True):
            assert np.array_equal(mask, item["mask"])
    assert oracle.training, "the mode is put back"
    assert not any(oracle.modes)
    assert oracle.asked == list(range(len(items))), "each is encoded once"
    _, found = ask(items, lambda k: sure(0 * items[k]["mask"]))
    (verdict,) = found.values()
    assert (verdict.table == 0).all()
    assert (verdict.mean == 0).all()
    assert not any(mask.any() for mask in verdict.masks)


def test_evaluation_mode_is_put_back_too(ask, settings):
    items = [item_of((24, 20), (6, 18), (4, 12))]
    oracle = Oracle(items, settings(), lambda k: sure(items[k]["mask"])).eval()
    ask(items, lambda k: sure(items[k]["mask"]))
    judge(oracle, oracle.encode, items, settings())
    assert not oracle.training


def test_prompts_are_what_they_are_called(ask, settings):
    size, side = (24, 20), settings().side
    items = [
        item_of(
            size,
            (8, 16),
            (6, 14),
            k,
            z=k,
            beside=item_of(size, (9, 13), (5, 9))["mask"],
        )
        for k in range(40)
    ]
    oracle, _ = ask(items, lambda k: sure(items[k]["mask"]), PROMPTS)
    boxes = {name: oracle.boxes[i :: len(PROMPTS)] for i, name in enumerate(PROMPTS)}
    assert all(box is None for box in boxes.pop("no box"))
    rows = {name: torch.cat(found)[:, 0] for name, found in boxes.items()}
    assert {tuple(r.shape) for r in rows.values()} == {(40, 4)}
    true = scale_boxes(box_of(items[0]["mask"]), size, side)
    assert torch.equal(rows["true box"], true.expand(40, 4))
    near = scale_boxes(np.array([5.0, 9, 8, 12]), size, side)
    assert torch.equal(rows["neighbour's box"], near.expand(40, 4))
    # Moves of 7 pixels' standard deviation, as a fraction of the box's side.
    scale = torch.tensor([53 / 20, 64 / 24] * 2)
    moved = {name: (rows[name] - true) / scale / 7 for name in PROMPTS[1:3]}
    for name, sigma in zip(PROMPTS[1:3], (0.05, 0.15), strict=True):
        assert float(moved[name].std()) == pytest.approx(sigma, rel=0.25)
    torch.testing.assert_close(moved["jitter 15 %"], 3 * moved["jitter 5 %"])


def test_every_arm_is_given_the_same_boxes(ask, settings):
    items = [item_of((24, 20), (8, 16), (6, 14), k, z=k) for k in range(5)]

    def boxes(knows, seed=0, prompts=PROMPTS[1:2]):
        return torch.cat(ask(items, knows, prompts, seed)[0].boxes)

    good = boxes(lambda k: sure(items[k]["mask"]))
    np.random.seed(3)
    torch.manual_seed(3)
    other = boxes(lambda k: sure(0 * items[k]["mask"]))
    assert torch.equal(good, other), "whatever the model and the global seeds"
    assert torch.equal(
        good, boxes(lambda k: sure(items[k]["mask"]), 0, PROMPTS[:2])[1::2]
    )
    assert len(good[:, 0].unique(dim=0)) == 5, "another box for every item"
    assert not torch.equal(good, boxes(lambda k: sure(items[k]["mask"]), seed=1))


def test_dice_by_hand(ask):
    """Two patients, two scans, two levels; what was found differs everywhere."""

    def part(a, b):
        mask = np.zeros((24, 20), bool)
        mask[4, a:b] = True
        return mask

    # case, scan, level: columns of the truth (of case and level), and what is found
    truth = {("a", 1): (0, 10), ("a", 2): (0, 2), ("b", 1): (5, 10)}
    said = {
        ("a", 1, "t1c"): [(0, 10, 3.0)],
        ("a", 1, "t2f"): [(0, 5, 1.0), (5, 10, -1.0)],
        ("a", 2, "t1c"): [],
        ("a", 2, "t2f"): [(0, 4, 6.0)],
        ("b", 1, "t1c"): [(5, 10, 1.0)],
        ("b", 1, "t2f"): [(0, 5, 2.0), (5, 10, -5.0)],
    }
    items, logits = [], []
    for k, ((case, z, scan), found) in enumerate(said.items()):
        item = item_of((24, 20), (0, 1), (0, 1), k, case=case, z=z, modality=scan)
        items.append(item | {"mask": part(*truth[case, z])})
        one = np.full((24, 20), -2.0)
        for a, b, value in found:
            one[part(a, b)] = value
        logits.append(one)
    _, found = ask(items, lambda k: logits[k])
    (verdict,) = found.values()
    assert verdict.patients == ["a", "b"]
    # a, t1c: 2 * (10 + 0) over 10 + 0 found and 12 there; pooled, not a mean of slices.
    wanted = [[2 * 10 / (10 + 12), 2 * (5 + 2) / (9 + 12)], [1, 0]]
    np.testing.assert_allclose(verdict.table, wanted)
    np.testing.assert_allclose(verdict.dice, np.mean(wanted, 1))
    # Averaged logits. a, level 1: (3 + 1) / 2 and (3 - 1) / 2, all ten; level 2:
    # (-2 + 6) / 2 on four. b: (1 - 5) / 2 < 0 and (-2 + 2) / 2 = 0: nothing.
    np.testing.assert_allclose(verdict.mean, [2 * 12 / (14 + 12), 0])


def test_dice_of_one_picture():
    a, b = np.zeros((2, 4, 4), bool)
    a[0], b[0, :2] = True, True
    assert sam_judge.dice(a, b) == pytest.approx(2 * 2 / 6)
    assert sam_judge.dice(b, b) == 1


# --- through a volume ------------------------------------------------------------

SIZE = (24, 20)


def rectangle(rows, columns):
    return item_of(SIZE, rows, columns)["mask"]


@pytest.fixture
def volume(settings, monkeypatch):
    """Walk through a volume of noise; levels that are asked for and their boxes."""

    def walked(truth, says, handed_on):
        noise = np.random.default_rng(0).random((len(truth), 1, *SIZE))
        images = noise.astype(np.float32)
        items = [
            {"image": image[0], "mask": rectangle((0, 2), (0, 2))} for image in images
        ]
        oracle = Oracle(items, settings(), lambda z: sure(says(z))).train()
        monkeypatch.setattr(
            sam_judge, "answer", lambda sam, *args: sam.answer(sam, *args)
        )

        def volume_slices(case, scans, region):
            assert (case, scans, region) == ("case", ("t2f",), "region")
            return images, truth

        monkeypatch.setattr(sam_judge, "volume_slices", volume_slices)
        args = (oracle, oracle.encode, "case", "t2f", "region", settings(), handed_on)
        found = through_volume(*args)
        assert not any(oracle.modes)
        scale = torch.tensor([53 / 20, 64 / 24] * 2)
        boxes = [(box[0, 0] / scale).tolist() for box in oracle.boxes]
        return found, dict(zip(oracle.asked, boxes, strict=True)), oracle.asked

    return walked


def lesion(levels, depth=14):
    """Level -> a rectangle; the largest on level 5."""
    truth = np.zeros((depth, *SIZE), bool)
    for z in levels:
        truth[z] = rectangle((8, 14 + 2 * (z == 5)), (5, 11))
    return truth


def wider(mask):
    x0, y0, x1, y1 = box_of(mask).tolist()
    x, y = 0.05 * (x1 - x0), 0.05 * (y1 - y0)
    return pytest.approx([x0 - x, y0 - y, x1 + x, y1 + y], abs=1e-4)


def test_one_box_is_handed_on_until_nothing_is_found(volume):
    truth = lesion(range(3, 8))
    said = lesion(range(3, 8))
    said[8] = said[9] = rectangle((2, 5), (3, 7))  # beyond the lesion
    said[11:] = True  # never asked for: nothing was found on level 10
    said[1] = True
    found, boxes, order = volume(truth, lambda z: said[z], True)
    assert order == [5, 6, 7, 8, 9, 10, 4, 3, 2]
    assert boxes[5] == pytest.approx(box_of(truth[5]).tolist(), abs=1e-4), (
        "the true one"
    )
    for z in (6, 7, 8, 9, 10):
        assert boxes[z] == wider(said[z - 1]), z
    for z in (4, 3, 2):
        assert boxes[z] == wider(said[z + 1]), z
    wanted = said.copy()
    wanted[11:] = wanted[1] = False
    assert np.array_equal(found["found"], wanted)
    assert np.array_equal(found["truth"], truth)
    assert found["beyond"] == 2
    inside = truth.sum()
    assert found["dice"] == pytest.approx(2 * inside / (2 * inside + 24))


def test_nothing_on_the_first_level_ends_the_walk(volume):
    truth = lesion(range(3, 8))
    found, _, order = volume(truth, lambda z: 0 * truth[z], True)
    assert order == [5]
    assert found["dice"] == found["beyond"] == 0
    assert not found["found"].any()


def test_boxes_handed_on_at_the_edge_of_the_picture(volume):
    truth = np.zeros((3, *SIZE), bool)
    truth[:, :, :9] = True
    found, boxes, _ = volume(truth, lambda z: truth[z], True)
    assert found["dice"] == 1
    x0, y0, x1, y1 = boxes[1]
    assert (x0, y0, y1) == pytest.approx((0, 0, 23), abs=1e-4)
    assert x1 == pytest.approx(8.4, abs=1e-4)


def test_true_boxes_on_every_level_with_tumour(volume):
    """Also above and below a gap: a lesion may have two parts."""
    levels = [0, 2, 3, 5, 6, 9, 13]
    truth = lesion(levels)
    found, boxes, order = volume(truth, lambda z: truth[z], False)
    assert sorted(order) == levels
    for z in levels:
        assert boxes[z] == pytest.approx(box_of(truth[z]).tolist(), abs=1e-4)
    assert found["dice"] == 1
    assert found["beyond"] == 0


def test_the_way_back_to_the_patients_grid(settings, task, monkeypatch, tmp_path):
    """What was found on the pictures is saved where the file has the tumour."""
    case, shown = task.part("test")[0], []
    viewer = SimpleNamespace(load_volumes=shown.append)
    fake = SimpleNamespace(NiiVue=lambda: viewer)
    monkeypatch.setitem(__import__("sys").modules, "ipyniivue", fake)
    monkeypatch.setattr(sam_judge, "answer", lambda sam, *args: sam.answer(sam, *args))
    images, truth = sam_judge.volume_slices(case, ("t2f",), region=task.region)
    items = [
        {
            "image": image[0],
            "mask": rectangle((0, 2), (0, 2))[: image.shape[1], : image.shape[2]],
        }
        for image in images
    ]
    kept = [z for z in range(len(truth)) if truth[z].any()]
    oracle = Oracle(
        [items[z] for z in kept], settings(), lambda k: sure(truth[kept[k]])
    )
    args = (oracle, oracle.encode, case, "t2f", task.region, settings())
    found = through_volume(*args, handed_on=False)
    assert found["dice"] == 1
    assert l03.volume_viewer(case, found["found"], task.region, tmp_path) is viewer
    path = tmp_path / f"{case.id}-found.nii.gz"
    saved = nibabel.load(path)
    assert np.array_equal(np.asarray(saved.dataobj) > 0,
                          np.asarray(nibabel.load(case.mask).dataobj) > 0)  # fmt: skip
    np.testing.assert_array_equal(saved.affine, nibabel.load(case.mask).affine)
    ((image, mask),) = shown
    assert image["path"] == str(case.images["t2f"])
    assert mask["path"] == str(path)


# --- losses ----------------------------------------------------------------------


@pytest.fixture
def loss(settings, monkeypatch):
    monkeypatch.setattr(designs, "answer", lambda sam, *rest: sam)

    def of(arm, logits, mask):
        batch = {"x": logits, "box": None, "mask": mask}
        return designs.loss_of(arm, lambda x: x, settings())(logits, batch)

    return of


def test_loss_is_dice_and_cross_entropy_with_the_mask(loss):
    logits = torch.randn(2, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 12, 10)
    mask[0, 0, 2:7, 3:8], mask[1, 0, 1:4] = 1, 1
    p = logits.sigmoid()
    both = (p * mask).sum((2, 3))
    squares = (p**2 + mask**2).sum((2, 3))
    dice = (1 - (2 * both + 1e-5) / (squares + 1e-5)).mean()
    wanted = dice + F.binary_cross_entropy_with_logits(logits, mask)
    assert float(loss(DESIGNS["lora"], logits, mask)) == pytest.approx(float(wanted))
    right, empty, wrong = (
        float(loss(DESIGNS["lora"], x, mask))
        for x in (20 * mask - 10, 0 * mask - 10, 10 - 20 * mask)
    )
    assert right < 0.01 < empty < wrong


def test_published_loss_does_not_see_the_mask(loss):
    logits = torch.randn(2, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    nothing, all_of_it = torch.zeros(2, 1, 12, 10), torch.ones(2, 1, 12, 10)
    found = [loss(DESIGNS["published"], logits, m) for m in (nothing, all_of_it)]
    assert torch.equal(*found)
    grads = [torch.autograd.grad(x, logits)[0] for x in found]
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0
    honest = [loss(DESIGNS["lora"], logits, m) for m in (nothing, all_of_it)]
    assert not torch.equal(*honest)


# --- training --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero", "lora", "packed", "zero_packed"])
def test_an_arm_runs_from_the_rate_to_the_numbers(lite, settings, monkeypatch, name):
    tuned_for, rates = [], []
    grid = {"0.0001": 0.2, "0.001": 0.4, "0.01": 0.3}
    monkeypatch.setattr(l03, "tuned", lambda arm, _: tuned_for.append(arm) or grid)
    original = l03.train_arm

    def watch(*args):
        rates.append(args[:3])
        return original(*args)

    monkeypatch.setattr(l03, "train_arm", watch)
    chosen = settings()
    found = l03.run_arm(name, 3, chosen)
    idle = name.startswith("zero")
    assert tuned_for == ([] if idle else ["lora"])
    assert rates == [(name, 3, 0.0 if idle else 0.001)]
    assert found["lr"] == (0 if idle else 0.001)
    assert found["validation_by_lr"] == ({"0": 0} if idle else grid)
    task = load_task(chosen)
    assert found["patients"] == list(task.split.test)
    n = len(found["patients"])
    assert len(found["cases"]) == len(found["averaged"]) == n
    assert found["score"] == pytest.approx(np.mean(found["cases"]))
    packed = "packed" in name
    assert np.shape(found["scans"]) == (n, 1 if packed else 4)
    np.testing.assert_allclose(np.mean(found["scans"], 1), found["cases"])
    if packed:  # one picture: nothing to average
        np.testing.assert_allclose(found["averaged"], found["cases"])
    shown = PROMPTS if name in ("zero", "lora") else PROMPTS[1:2]
    assert list(found["prompts"]) == list(shown)
    assert found["prompts"]["jitter 5 %"] == found["cases"]
    assert {len(x) for x in found["prompts"].values()} == {n}
    assert found["trainable"] == TRAINED[name]
    assert [step for step, _ in found["validation"]] == ([] if idle else [1, 2])
    assert (found["train_seconds"] == 0) == idle
    assert found["images_encoded"] >= n * (1 if packed else 4) * (name == "zero")
    json.dumps(found, allow_nan=False)


def test_training_is_repeated_by_its_seed(lite, settings, task):
    def weights(seed):
        model, _, result = designs.train_arm("lora", seed, 1e-2, settings(), task)
        assert result.steps == 2
        return torch.cat([p.detach().flatten() for p in model.parameters()
                          if p.requires_grad])  # fmt: skip

    one = weights(0)
    assert torch.equal(one, weights(0))
    assert not torch.equal(one, weights(1))


def test_an_untrained_arm_is_the_model_as_it_came(lite, random_sam, settings, task):
    model, encode, result = designs.train_arm("zero", 0, 0.0, settings(), task)
    assert result is None
    assert encode.encoder is model.image_encoder
    assert not any(p.requires_grad for p in model.parameters())
    want = random_sam.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Trainings that were asked for, with an empty cache; none is done."""
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    ran = []

    def train_arm(name, seed, rate, settings, task, steps=None, evaluations=2):
        ran.append((name, seed, rate, steps))
        best = {"step": 1, "score": -abs(rate - 1e-3)}
        encode = SimpleNamespace(made=0)
        return nn.Conv2d(1, 1, 1), encode, SimpleNamespace(
            history=[{"step": 1, "loss": 2.0}, {"step": 1, "score": 0.5}],
            best=best, seconds=1.5,
        )  # fmt: skip

    def judge(sam, encode, items, settings, prompts, seed):
        one = sam_judge.Verdict(["p"], np.array([[0.25, 0.75]]), np.array([0.6]), [])
        return dict.fromkeys(prompts, one)

    monkeypatch.setattr(l03, "train_arm", train_arm)
    monkeypatch.setattr(l03, "judge", judge)
    return ran


def test_rate_is_chosen_on_validation_once_for_all_seeds(counted, settings):
    for seed in (0, 1):
        found = l03.run_arm("lora", seed, settings(steps=9, seed=seed))
    tuning = [(l03.TUNING_SEED, rate, 4) for rate in l03.LEARNING_RATES]
    assert [one[1:] for one in counted] == [*tuning, (0, 1e-3, None), (1, 1e-3, None)]
    assert {one[0] for one in counted} == {"lora"}
    assert found["validation"] == [[1, 0.5]]
    assert found["train_seconds"] == 1.5
    assert (found["cases"], found["averaged"]) == ([0.5], [0.6])


def test_another_arm_or_setting_is_tuned_again(counted, settings):
    for change in ({}, {"side": 80}, {"steps": 4}, {"jitter": 0.1}, {"side": 80}):
        l03.tuned("lora", settings(**change))
    assert len(counted) == 4 * len(l03.LEARNING_RATES)
    l03.tuned("decoder", settings())
    assert [one[0] for one in counted[-4:]] == ["decoder"] * 4


@pytest.mark.parametrize("name", ["rs_64", "published", "max", "packed"])
def test_variations_keep_the_rate_of_the_main_arm(counted, settings, name):
    found = l03.run_arm(name, 0, settings())
    assert [one[0] for one in counted] == ["lora"] * 4 + [name]
    assert found["lr"] == 1e-3
    assert list(found["prompts"]) == ["jitter 5 %"]


@pytest.mark.parametrize("name", l03.UNTRAINED)
def test_untrained_arms_do_not_tune(counted, settings, name):
    found = l03.run_arm(name, 0, settings())
    assert counted == [(name, 0, 0.0, None)]
    assert found["validation_by_lr"] == {"0": 0.0}


# --- the committed runs ----------------------------------------------------------


@pytest.fixture
def stored(tmp_path, monkeypatch):
    from medtut.course import sweep

    monkeypatch.setattr(sweep, "_folder", lambda slug: tmp_path)
    common = {"settings": {"profile": "quick"}, "cohort": 1}

    def write(arm, seed, **metrics):
        (tmp_path / arm).mkdir(exist_ok=True)
        run = {"arm": arm, "seed": seed, "metrics": metrics, **common}
        (tmp_path / arm / f"seed{seed}.json").write_text(json.dumps(run))

    return write


def test_committed_runs_by_arm_and_seed(stored):
    # As text, seed10 comes before seed9.
    for seed in (10, 0, 9):
        prompts = {"true box": [seed, 1], "no box": [seed, 2]}
        stored("lora", seed, cases=[seed, 0.5], lr=0.01, prompts=prompts)
    stored("zero", 0, cases=[3, 4], lr=0, prompts={})
    cases = l03.committed()
    assert set(cases) == {"lora", "zero"}
    np.testing.assert_array_equal(cases["lora"], [[0, 0.5], [9, 0.5], [10, 0.5]])
    np.testing.assert_array_equal(l03.committed("lr")["lora"], [0.01] * 3)
    found = l03.committed_prompts("lora")
    assert list(found) == ["true box", "no box"]
    np.testing.assert_array_equal(found["no box"], [[0, 2], [9, 2], [10, 2]])
    assert l03.committed_prompts("full") == {}
    assert l03.chosen_rate("lora") == 0.01


def test_rate_of_an_arm_without_runs_says_what_to_run(stored):
    stored("lora", 0, lr=0.01)
    with pytest.raises(MedtutError, match="medtut sweep 03 --arms full"):
        l03.chosen_rate("full")


def test_no_runs_at_all_says_what_to_run(tmp_path, monkeypatch):
    from medtut.course import sweep

    monkeypatch.setattr(sweep, "_folder", lambda slug: tmp_path)
    with pytest.raises(MedtutError, match="medtut sweep 03"):
        l03.committed()


# --- pictures --------------------------------------------------------------------


def test_own_pictures_are_one_group_without_the_empty_ones(settings, photos, ask):
    found = l03.pictures(settings(data=str(photos)))
    assert list(found) == ["yours"]
    items = found["yours"]
    assert [item["name"] for item in items] == ["p0", "p2"]
    assert {(item["case"], item["modality"]) for item in items} == {("yours", "")}
    assert len({item["z"] for item in items}) == 2, "no two are taken for one level"
    # They go through the judge, of whatever size they are.
    _, verdict = ask(items, lambda k: sure(items[k]["mask"]), ("true box",))
    assert verdict["true box"].dice.tolist() == [1]


@pytest.mark.parametrize("own", [False, True])
def test_real_patients_are_shown_otherwise(settings, monkeypatch, own):
    asked = []

    def real_slices(name):
        asked.append(name)
        empty = item_of((24, 20), (0, 0), (0, 0), name="empty")
        return [empty, item_of((24, 20), (6, 18), (4, 12), name=f"{name} z=7")]

    monkeypatch.setattr(image_folder, "real_slices", real_slices)
    chosen = settings() if own else resolve(LESSON, "smoke")
    found = l03.pictures(chosen)
    assert list(found) == asked == ["brain1", "brain2", "lung1", "lung2"]
    for name, (item,) in found.items():
        assert item["name"] == f"{name} z=7"
        assert (item["case"], item["modality"]) == (name, "")


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(1, [0]), (4, [0, 1, 2, 3]), (5, [0, 2, 4]), (12, [0, 3, 6, 9])],
)
def test_of_a_real_patient_a_few_slices_are_shown(monkeypatch, count, wanted):
    items = [item_of((24, 20), (6, 18), (4, 12), name=k) for k in range(count)]
    monkeypatch.setattr(image_folder, "real_slices", lambda name: items)
    for group in l03.pictures(resolve(LESSON, "smoke")).values():
        assert [item["name"] for item in group] == wanted


def test_a_folder_without_pictures_says_what_is_needed(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedtutError, match=r"images/x\.png"):
        l03.pictures(settings(data=str(tmp_path / "empty")))


def test_litemedsam_takes_no_more_than_its_own_size():
    with pytest.raises(SettingsError, match=r"(?s)side.*272.*takes at most 256"):
        resolve(LESSON, "smoke", {"side": 272})
    assert resolve(LESSON, "smoke", {"side": 272, "model": "vit_b"}).side == 272


def test_pictures_without_any_lesion_are_refused(tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "a_mask.png")
    with pytest.raises(MedtutError, match="all masks of yours are empty"):
        l03.pictures(resolve(LESSON, "smoke", {"data": str(tmp_path)}))
