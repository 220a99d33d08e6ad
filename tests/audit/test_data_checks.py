"""Leaking splits and channels moved by view: planted defects and clean controls."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medtut.audit import (
    Subject,
    SubjectError,
    audit,
    hwc_viewed_as_chw,
    split_shares_a_patient,
)
from medtut.audit.cli import run_audit
from medtut.audit.data_checks import patient_id

IDS = [f"BraTS20_Training_{k:03d}" for k in range(1, 13)]


def shared(split, **more):
    findings, notes = split_shares_a_patient(Subject(split=split, **more))
    assert notes == []
    return findings


# -------------------------------------------------------------------------- by id
@pytest.mark.parametrize(
    ("item", "patient"),
    [
        ("BraTS20_Training_355", "brats20_training_355"),
        (
            "d/BraTS20_Training_355/BraTS20_Training_355_flair.nii.gz",
            IDS[0][:-3] + "355",
        ),
        (Path("BraTS20_Training_001_t1ce_z034.png"), IDS[0]),
        (("BraTS20_Training_001", 34), IDS[0]),
        ((Path("x/BraTS20_Training_001_flair.nii"), "seg.nii", 3), IDS[0]),
        ({"image": "BraTS20_Training_001-slice-12.npy", "label": "y"}, IDS[0]),
        ("C:\\data\\BraTS20_Training_001_slice12.PNG", IDS[0]),
        ("train/p7/slice_012.png", "p7"),
        ("slices/slice_012.png", "slice_012.png"),
        ("BraTS-MEN-00004-001-t2f.nii.gz", "BraTS-MEN-00004"),
        ("Te-no_0010.jpg", "Te-no_0010"),
        (17, "17"),
    ],
)
def test_patient_of_a_name(item, patient):
    assert patient_id(item) == patient.casefold()


def leaky_slices(patients=12, slices=20):
    entries = [(p, z) for p in IDS[:patients] for z in range(slices)]
    order = np.random.default_rng(0).permutation(len(entries))
    cut = int(0.9 * len(entries))
    return {
        "train": [entries[k] for k in order[:cut]],
        "validation": [entries[k] for k in order[cut:]],
    }


@dataclass(frozen=True)
class Sides:
    train: tuple
    test: tuple


@pytest.mark.parametrize(
    ("split", "count"),
    [
        (leaky_slices(), 11),
        ({"train": IDS, "test": IDS[-1:]}, 1),
        (Sides(tuple(IDS[:7]), tuple(IDS[5:])), 2),
        ({"train": {"ids": IDS}, "test": {"ids": np.array(IDS[3:5])}}, 2),
        ({"train": [f"{IDS[0]}_z034.png"], "test": [f"{IDS[0]}_z035.png"]}, 1),
        ({"train": torch.arange(5), "test": torch.arange(4, 8)}, 1),
    ],
)
def test_shared_patients_are_counted(split, count):
    (one,) = shared(split)
    assert one.severity == "error"
    assert one.numbers["shared_patients"] == count
    assert one.where == " / ".join(split if isinstance(split, dict) else vars(split))


@pytest.mark.parametrize(
    "split",
    [
        {"train": IDS[:6], "test": IDS[6:]},
        Sides(tuple(IDS[:6]), tuple(IDS[6:])),
        {"train": [], "test": IDS},
        {"train": ["slices/slice_1.png"], "test": ["slices/slice_2.png"]},
        {"train": [f"train/{k}.png" for k in "ab"], "test": ["test/c.png"]},
        {"train": IDS},
    ],
)
def test_clean_ids_raise_no_alarm(split):
    assert shared(split) == []


def test_every_pair_of_sides_and_the_own_rule():
    split = {"train": IDS[:6], "validation": IDS[5:8], "test": IDS[8:] + IDS[:1]}
    assert [one.where for one in shared(split)] == [
        "train / validation",
        "train / test",
    ]
    odd = {"train": ["a-1", "b-1"], "test": ["a-2"]}
    assert shared(odd) == []
    (one,) = shared(odd, patient_of=lambda item: item[0])
    assert one.numbers["shared_patients"] == 1


@pytest.mark.parametrize(
    "split", ["train.txt", 3, {"train": "a"}, {"a": np.zeros((2, 2))}, {"a": {}}]
)
def test_splits_that_cannot_be_read(split):
    with pytest.raises(SubjectError, match="split"):
        shared(split)


# ------------------------------------------------------------------ by their images
def smooth(shape, period, rng):
    """Smooth random field by trilinear interpolation of coarse noise."""
    coarse = [max(2, n // period + 2) for n in shape]
    noise = torch.from_numpy(rng.normal(size=(1, 1, *coarse)))
    mode = {2: "bilinear", 3: "trilinear"}[len(shape)]
    up = nn.functional.interpolate(noise, size=shape, mode=mode, align_corners=True)
    return up[0, 0].numpy()


@pytest.fixture(scope="module")
def heads():
    """Five heads: the template's slabs, each deformed, with its own bias and noise."""
    from scipy.ndimage import map_coordinates

    from medtut.data.brain_slices import template

    maps = template()
    slab = 0.55 * maps["gm"][:, :, 36:66] + 0.42 * maps["wm"][:, :, 36:66]
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        grid = [
            axis + 1.5 * smooth(slab.shape, 20, rng) for axis in np.indices(slab.shape)
        ]
        head = map_coordinates(slab, grid, order=1) * np.exp(
            0.1 * smooth(slab.shape, 50, rng)
        )
        head += rng.normal(0, 0.02, head.shape) * (head > 0.01)
        found.append(np.moveaxis(head, 2, 0)[9:21].astype(np.float32))
    return np.stack(found)  # (heads, slices, X, Y)


def test_neighbouring_slices_of_a_patient_are_found(heads):
    slices = heads.reshape(-1, *heads.shape[2:])
    split = {"train": slices[::2], "test": slices[1::2]}
    (one,) = shared(split)
    assert one.severity == "warning"
    assert one.numbers["of_images"] == 30
    assert one.numbers["near_duplicates"] >= 27
    assert one.numbers["largest_correlation"] > 0.99


def test_one_exact_copy_is_named(heads):
    train = heads[:4].reshape(-1, *heads.shape[2:])
    test = np.concatenate([heads[4], 3 * train[17:18] + 5])
    for form in (np.asarray, torch.tensor, lambda x: np.repeat(x[:, None], 3, 1)):
        (one,) = shared({"train": {"images": form(train)}, "test": form(test)})
        assert one.numbers["near_duplicates"] == 1
        assert one.numbers["largest_correlation"] == pytest.approx(1, abs=1e-4)
        assert "its number 12 and number 17" in one.message


def test_other_patients_mirrored_blank_and_noise_images_are_no_duplicates(heads):
    flat = heads.reshape(-1, *heads.shape[2:])
    for k in range(5):
        others = np.delete(heads, k, 0).reshape(-1, *heads.shape[2:])
        assert shared({"train": others, "test": heads[k]}) == []
    assert shared({"train": flat, "test": flat[:, ::-1].copy()}) == []
    blank = np.zeros((3, 64, 64))
    assert shared({"train": blank, "test": blank + 1}) == []
    noise = np.random.default_rng(0).normal(size=(200, 64, 64))
    assert shared({"train": noise[:100], "test": noise[100:]}) == []
    assert shared({"train": noise, "test": noise[:0]}) == []


def test_many_images_are_sampled_and_nan_is_survived(heads):
    few = heads[0][:6, ::4, ::4]
    many = np.concatenate([few, np.random.default_rng(0).normal(size=(9000, 25, 30))])
    many[-1] = np.nan
    few = np.pad(few, ((0, 0), (0, 0), (0, 0)))
    (one,) = shared({"train": np.asarray(many[:, :25, :30]), "test": many[:2]})
    assert one.numbers["near_duplicates"] >= 1


# ------------------------------------------------------------- HWC viewed as CHW
def viewed(x):
    """The defect: the memory of (B, H, W, C), viewed as (B, C, H, W)."""
    return x.permute(0, 2, 3, 1).contiguous().view(x.shape)


def alarm(x):
    return hwc_viewed_as_chw(Subject(images=x))[0]


@pytest.fixture(scope="module")
def photos():
    from sklearn.datasets import load_sample_images

    crops = [
        torch.tensor(one[r : r + 120, c : c + 160]).permute(2, 0, 1).float() / 255
        for one in load_sample_images().images
        for r in (0, 150, 300)
        for c in (0, 200, 400)
    ]
    return torch.stack(crops)


@pytest.fixture(scope="module")
def brains(heads):
    return torch.from_numpy(heads[:, ::4].reshape(-1, 1, *heads.shape[2:]))


def pictures(photos, brains):
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    large = nn.functional.interpolate(brains, size=(224, 224), mode="bilinear")
    return {
        "photo": photos,
        "normalised": (photos - mean) / 0.22,
        "grey photo": photos.mean(1, keepdim=True).repeat(1, 3, 1, 1),
        "small": nn.functional.interpolate(photos, size=(64, 64), mode="area"),
        "odd": photos[:, :, :75, :95],
        "brain": brains.repeat(1, 3, 1, 1),
        "large brain": large.repeat(1, 3, 1, 1),
        "noisy brain": (large + 0.1 * torch.randn(large.shape)).repeat(1, 3, 1, 1),
        "four contrasts": torch.cat([brains, -brains, brains**2, 1 - brains], 1),
    }


def test_viewed_pictures_are_caught_and_sound_ones_left_alone(photos, brains):
    torch.manual_seed(0)
    for name, x in pictures(photos, brains).items():
        assert alarm(x) == [], name
        (one,) = alarm(viewed(x))
        assert one.severity == "error", name
        assert one.numbers["images"] > 0.6 * len(x), name
        assert one.numbers["ratio"] < 1, name
    (one,) = alarm(viewed(photos))
    assert one.numbers["ratio"] < 0.4
    spoilt = viewed(photos)
    spoilt[:, 0, 0, 0] = torch.nan
    assert alarm(spoilt)[0].numbers == pytest.approx(one.numbers, rel=0.05)
    assert one.where == "images 18×3×120×160"


def test_plain_pictures_without_the_defect(photos):
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 48).expand(2, 3, 48, 48).clone()
    colours = torch.rand(3, 3, 1, 1).expand(3, 3, 48, 48).clone()
    noise = torch.randn(4, 3, 48, 48)
    coarse = torch.randn(4, 3, 16, 16)
    clean = {
        "constant": torch.ones(2, 3, 48, 48),
        "one colour each": colours,
        "ramp": ramp,
        "ramp down": ramp.mT,
        "coloured ramp": ramp.mT * colours[:2],
        "noise": noise,
        "grey noise": noise[:, :1].repeat(1, 3, 1, 1),
        "enlarged three times": coarse.repeat_interleave(3, 2).repeat_interleave(3, 3),
        "stripes of three": (torch.arange(48) % 3).float().view(48, 1) * ramp,
        "with nan": torch.full((1, 3, 48, 48), torch.nan),
        "one channel": photos[:, :1],
        "channels last": photos.permute(0, 2, 3, 1),
        "integers": (photos * 255).to(torch.uint8),
        "features": torch.randn(2, 64, 8, 8),
    }
    for name, x in clean.items():
        assert alarm(x) == [], name
    assert len(alarm(viewed(noise[:, :1].repeat(1, 3, 1, 1)))) == 1
    assert len(alarm(viewed((photos * 255).to(torch.uint8)))) == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(24, 70),
    width=st.integers(24, 70),
    period=st.integers(6, 24),
    noise=st.floats(0, 0.15),
    tie=st.floats(0, 1),
    offset=st.floats(0, 3),
)
def test_any_smooth_picture(seed, height, width, period, noise, tie, offset):
    """Channels may be independent or equal, shifted in level, with noise or none."""
    rng = np.random.default_rng(seed)
    base = smooth((height, width), period, rng)
    x = np.stack(
        [
            tie * base
            + (1 - tie) * smooth((height, width), period, rng)
            + noise * rng.normal(size=base.shape)
            + k * offset
            for k in range(3)
        ]
    )
    x = torch.from_numpy(x)[None].float()
    assert alarm(x) == []
    if noise < 0.05 and period <= 12:  # a ramp without structure may look like another
        assert len(alarm(viewed(x))) == 1


def test_images_of_the_batch_are_looked_at(photos):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert audit({"model": model, "batch": photos[:4]}).exit_code == 0
    report = audit({"model": model, "batch": (viewed(photos[:4]), torch.ones(4))})
    assert [one.detector for one in report.findings] == ["hwc_viewed_as_chw"]
    labelled = {"image": viewed(photos[:4]), "label": torch.ones(4, 3, 8, 8)}
    assert len(hwc_viewed_as_chw(Subject(batch=labelled))[0]) == 1
    assert len(alarm(viewed(photos).numpy())) == 1
    mixed = torch.cat([photos[:6], viewed(photos[6:9])])
    assert alarm(mixed) == []  # not most of them: no wrong call, odd pictures


# ------------------------------------------------------------- without a model, CLI
def test_audit_runs_what_the_subject_gives(photos):
    report = audit({"split": leaky_slices(), "images": viewed(photos)})
    assert report.checked == ("split_shares_a_patient", "hwc_viewed_as_chw")
    assert len(report.findings) == 2
    clean = audit({"split": {"train": IDS[:3], "test": IDS[3:]}})
    assert (clean.exit_code, clean.notes) == (0, ())
    assert clean.checked == ("split_shares_a_patient",)
    bare = audit(nn.Linear(3, 3))
    assert "split_shares_a_patient" not in bare.checked
    for empty in (Subject(), {}, {"batch": 1}):
        with pytest.raises(SubjectError, match="no 'model'"):
            audit(empty)


def test_command_line_carries_the_fields(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "def leaky():\n    return {'split': {'train': ['a_z1'], 'test': ['a_z2']}}\n"
        "def clean():\n    return {'split': {'train': ['a'], 'test': ['b']},"
        " 'metric': lambda p, t: float('nan') if not (p + t).any()"
        " else 2.0 * ((p == t) & (t > 0)).sum() / ((p > 0).sum() + (t > 0).sum())}\n",
        encoding="utf-8",
    )
    assert run_audit(f"{file}:leaky") == 1
    assert "shared patients 1" in capsys.readouterr().out
    assert run_audit(f"{file}:clean") == 0
    assert "metric_misbehaves" in capsys.readouterr().out


def test_a_split_object_is_read_by_its_lists_of_names():
    from medtut.audit import Subject
    from medtut.data.splits import Split, split_cases

    sound = split_cases([f"target_{i:03d}" for i in range(20)], seed=3)
    assert split_shares_a_patient(Subject(split=sound)) == ([], [])
    bare = Split(("a_1",), ("b_1",), ("c_1",), seed=0)
    assert split_shares_a_patient(Subject(split=bare)) == ([], [])

    class Careless:
        def __init__(self):
            self.train, self.test, self.seed = ["p1_z1"], ["p1_z2", "p2_z1"], 7

    found, _ = split_shares_a_patient(Subject(split=Careless()))
    assert found[0].numbers["shared_patients"] == 1
