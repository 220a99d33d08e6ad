"""BraTS-MEN: the reader, both pipelines, the derived crop, slices and the way back."""

import itertools

import nibabel
import numpy as np
import pytest
from brats_small import LPS, SHAPE, arrays, rewrite

from medtut.data import brats_men
from medtut.data.brats import find_cases, load_case, save_prediction, split_cases
from medtut.data.brats_men import (
    MEN,
    PUBLISHED_CROP,
    MenSlices,
    choose_slices,
    crop,
    cut_off,
    find_men_cases,
    patient_of,
    rgb8,
    scale_clean,
    scale_published,
    to_volume,
    uncrop,
    union_box,
    volume_slices,
)
from medtut.data.brats_slices import SliceDataset
from medtut.errors import MedtutError

IDS = ("BraTS-MEN-00007-000", "BraTS-MEN-00012-000")
PIPELINES = ("clean", "published")


def label(seed=0):
    return np.where(arrays(seed)[1] == 4, 3, arrays(seed)[1]).astype(np.uint8)


def write_study(root, name, seed=0, mask=True):
    """The lesion of `brats_small` with the names and labels of BraTS-MEN."""
    folder = root / name
    folder.mkdir(parents=True)
    volumes = dict(zip(MEN, arrays(seed)[0], strict=True))
    for kind, voxels in (volumes | ({"seg": label(seed)} if mask else {})).items():
        image = nibabel.Nifti1Image(voxels, LPS)
        nibabel.save(image, folder / f"{name}-{kind}.nii.gz")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(IDS):
        write_study(tmp_path / "data", name, seed)
    return tmp_path / "data"


@pytest.fixture
def cases(root):
    return find_men_cases(root)


# --- the reader ------------------------------------------------------------------


def test_names_labels_and_order(cases):
    assert [c.id for c in cases] == list(IDS)
    assert tuple(cases[0].images) == MEN
    assert cases[0].images["t1n"].name == "BraTS-MEN-00007-000-t1n.nii.gz"
    volume = load_case(cases[0], ("t2w", "t1c"))
    np.testing.assert_array_equal(volume.image, arrays(0)[0][[3, 0], ::-1, ::-1])
    # 3 on disk is 3 in the package: nothing is lost and nothing is moved.
    np.testing.assert_array_equal(volume.label, label()[::-1, ::-1])
    assert set(np.unique(volume.label)) == {0, 1, 2, 3}
    assert volume.spacing == (1, 1, 2)


def test_the_two_sets_do_not_mix(root, tmp_path):
    with pytest.raises(MedtutError, match=r"<case>_flair\.nii.*_seg.*BraTS-MEN-00007"):
        find_cases(root)
    (tmp_path / "none").mkdir()
    with pytest.raises(MedtutError, match=r"<case>-t1c\.nii, -t1n\.nii.*-seg.*Found n"):
        find_men_cases(tmp_path / "none")


def test_missing_and_doubled_files(root):
    path = root / IDS[0] / f"{IDS[0]}-t2f.nii.gz"
    path.rename(path.with_name(f"other-{path.name}"))
    assert len(find_men_cases(root)) == 2, "any name before the last part will do"
    path.with_name(f"other-{path.name}").unlink()
    with pytest.raises(MedtutError, match=r"00007-000 has no files \*-t2f\.nii"):
        find_men_cases(root)
    assert len(find_men_cases(root, modalities=("t1c",))) == 2


def test_masks_may_be_left_out(root):
    assert [c.mask for c in find_men_cases(root, masks=False)] == [None, None]


def test_studies_without_masks(tmp_path):
    write_study(tmp_path / "data", IDS[0], mask=False)
    with pytest.raises(MedtutError, match=r"no <case>-seg\.nii.*validation part"):
        find_men_cases(tmp_path / "data")
    (case,) = find_men_cases(tmp_path / "data", masks=False)
    images, mask = volume_slices(case, ("t1c",))
    assert images.shape == (SHAPE[2], 1, SHAPE[1], SHAPE[0])
    assert mask is None
    assert union_box([case]) == union_box([case])
    for refused in (lambda: MenSlices([case]), lambda: cut_off([case])):
        with pytest.raises(MedtutError, match=r"BraTS-MEN-00007-000 has no"):
            refused()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("seg", lambda v: np.where(v == 3, 4, v), ["4 (", "0, 1, 2 and 3", "2021"]),
        ("seg", lambda v: np.where(v == 3, 7, v), ["7 (", "resampled"]),
        ("seg", lambda v: v[1:], ["(23, 20, 12), (24, 20, 12)"]),
        ("seg", lambda v: v[..., None], ["not a 3-D volume", "(24, 20, 12, 1)"]),
        ("t1c", lambda v: v[..., None], ["not a 3-D volume"]),
        ("t1c", lambda v: np.where(v > 0, np.nan, 0.0), ["NaN"]),
        ("t1c", lambda v: v * 0, ["every voxel is 0"]),
    ],
)
def test_bad_files_are_named(root, cases, kind, change, words):
    rewrite(root / IDS[0] / f"{IDS[0]}-{kind}.nii.gz", change)
    with pytest.raises(MedtutError) as caught:
        MenSlices(cases, ("t1c",))
    for word in [f"{IDS[0]}-{kind}.nii.gz", *words]:
        assert word in str(caught.value)


def test_a_truncated_file(root, cases):
    path = cases[0].images["t1c"]
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(MedtutError, match=r"00007-000-t1c.*get it again"):
        volume_slices(cases[0])


def test_predictions_get_the_labels_of_the_set(cases, tmp_path):
    path = save_prediction(
        tmp_path / "p.nii.gz", load_case(cases[0], MEN).label, cases[0]
    )
    np.testing.assert_array_equal(np.asarray(nibabel.load(path).dataobj), label())


def test_the_slices_of_lesson_02_are_read_too(cases):
    data = SliceDataset(cases[:1], ("t1c",), size=16)
    assert [z for _, z in data.index] == np.flatnonzero(label().any((0, 1))).tolist()
    assert set(np.unique(data[len(data) // 2]["label"])) <= {0, 1, 2, 3}


def test_studies_of_one_patient_stay_together():
    assert patient_of("BraTS-MEN-00007-001") == "BraTS-MEN-00007"
    assert patient_of("BraTS20_Training_001") == "BraTS20_Training_001"
    assert patient_of("scan-001") == "scan-001"
    ids = [f"BraTS-MEN-{n:05d}-00{t}" for n in range(8) for t in range(2)]
    split = split_cases(ids, patient_of=patient_of)
    patients = [
        {patient_of(i) for i in p} for p in (split.train, split.validation, split.test)
    ]
    assert all(not a & b for a, b in itertools.combinations(patients, 2))


def test_the_drawn_cohort_is_read(tmp_path, monkeypatch):
    """The writer of the drawn cohort and this reader agree, at full size."""
    from medtut.data import brain_cohort

    spec = brain_cohort.CohortSpec("target", ("meningioma",), 1)
    rng = np.random.default_rng(0)
    drawn, brain = np.zeros((240, 240, 78), np.uint8), np.zeros((240, 240, 78))
    drawn[100:110, 60:90, 30:33] = 3
    brain[60:180, 40:200, 5:70] = rng.uniform(0.5, 1, (120, 160, 65))
    images = dict.fromkeys(brain_cohort.CONTRASTS, brain)
    made = brain_cohort.Patient(images, drawn, {"kind": "meningioma"})
    monkeypatch.setattr(brain_cohort, "draw_patient", lambda *a: made)
    (case,) = find_men_cases(brain_cohort.cohort_folder(spec, "brats-men"))
    volume = load_case(case, ("t1c",))
    assert volume.spacing == (1, 1, 2)
    np.testing.assert_array_equal(volume.label, drawn)
    assert union_box([case], ("t1c",)) == ((60, 180), (40, 200), (5, 70))
    assert cut_off([case]) == {}
    assert cut_off([case], ((0, 240), (0, 240), (31, 147))) == {case.id: 300}


# --- the crop --------------------------------------------------------------------


def test_the_box_is_the_union_of_brains_and_tumours(root, cases):
    brain = np.logical_or(*(arrays(s)[0].any(0)[::-1, ::-1] for s in (0, 1)))
    want = tuple(
        (int(s.min()), int(s.max()) + 1) for s in map(np.unique, np.nonzero(brain))
    )
    assert union_box(cases) == want
    assert want[0][1] < 24
    assert want[2][0] > 0
    # A voxel in one image of one case, and one of a tumour outside of the brain.
    for kind, corner in (("t2f", (0, 10, 5)), ("seg", (12, 10, 0))):
        path = root / IDS[1] / f"{IDS[1]}-{kind}.nii.gz"

        def one(voxels, corner=corner):
            voxels[corner] = 1
            return voxels

        rewrite(path, one)
    assert union_box(cases) == ((want[0][0], 24), want[1], (0, want[2][1]))
    assert union_box(cases[:1])[2] == want[2]
    assert union_box(cases, ("t1c",))[0] == want[0], "only what is asked for counts"


def test_boxes_are_measured_once(cases, monkeypatch):
    first = union_box(cases)
    monkeypatch.setattr(brats_men, "load_case", None)
    assert union_box(cases) == first


def test_no_case_or_other_shapes(root, cases):
    with pytest.raises(MedtutError, match="one shape"):
        union_box([])
    for kind in (*MEN, "seg"):
        rewrite(root / IDS[0] / f"{IDS[0]}-{kind}.nii.gz", lambda v: v[:, :, :-1])
    with pytest.raises(MedtutError, match=r"one shape.*\(24, 20, 1"):
        union_box(cases)


def test_crop_and_uncrop():
    volume = np.random.default_rng(0).integers(1, 9, SHAPE)
    region = ((3, 20), (0, 19), (5, 12))
    part = crop(volume, region)
    assert part.shape == (17, 19, 7)
    back = uncrop(part, region, SHAPE)
    np.testing.assert_array_equal(crop(back, region), part)
    assert np.count_nonzero(back) == part.size
    assert back.dtype == volume.dtype
    for leaves in (
        ((0, 25), (0, 20), (0, 12)),
        ((-1, 5), (0, 20), (0, 12)),
        ((5, 5), (0, 20), (0, 12)),
        PUBLISHED_CROP,
    ):
        with pytest.raises(MedtutError, match="union_box"):
            crop(volume, leaves)
    with pytest.raises(MedtutError, match="do not fill"):
        uncrop(part[:, :, :1], region, SHAPE)


def test_the_published_crop_has_the_published_size():
    part = crop(np.zeros((240, 240, 155), bool), PUBLISHED_CROP)
    assert part.shape == (138, 202, 138)
    # Symmetric: turning a volume from LPS to RAS does not move it.
    for (low, high), size in zip(PUBLISHED_CROP[:2], (240, 240), strict=True):
        assert low == size - high
    assert round(1024 / 202 * 138) == 700


def test_what_a_fixed_crop_loses(cases):
    mask = load_case(cases[0], MEN).label > 0
    x, y, z = map(np.unique, np.nonzero(mask))
    whole = tuple((int(v.min()), int(v.max()) + 1) for v in (x, y, z))
    assert cut_off(cases, whole) == {}
    less = (whole[0], whole[1], (whole[2][0] + 1, whole[2][1]))
    lost = int(mask[:, :, z.min()].sum())
    assert cut_off(cases, less) == dict.fromkeys(IDS, lost)
    with pytest.raises(MedtutError, match=rf"cuts {lost} voxels.*{IDS[0]}-seg"):
        MenSlices(cases, region=less)


# --- intensities -----------------------------------------------------------------


def volume(seed=0, pad=0):
    image = arrays(seed)[0][0].astype(np.float32)
    return np.pad(image, [(pad, pad), (pad, pad), (0, 0)])


def test_published_scaling_step_by_step():
    image = volume().astype(np.float64)
    score = image.copy()
    score[score == 0] = np.nan
    score = (image - np.nanmean(score)) / np.nanstd(score)
    top = 255 / (1 - score.max() / score.min())  # lowest to 0, highest to 255
    grey = np.round(score * (-top / score.min()) + top, 2)
    low, high = np.percentile(grey, (1, 99))
    want = ((grey.clip(low, high) - low) / (high - low)).astype(np.float32)
    found = scale_published(volume())
    assert found.dtype == np.float32
    eight = (want * 255).astype(np.uint8)
    np.testing.assert_array_equal(rgb8(found[:, :, 6])[..., 0], eight[:, :, 6])
    np.testing.assert_allclose(found, eight / 255, atol=1e-6)
    assert (found.min(), found.max()) == (0, 1)


def test_the_z_score_never_reaches_the_model():
    image = volume()
    low, high = np.percentile(image, (1, 99))
    direct = np.clip((image - low) / (high - low), 0, 1)
    assert np.abs(direct - scale_published(image)).max() < 1.1 / 255


def test_air_changes_the_published_scale_and_not_the_clean_one():
    inner = (slice(9, -9), slice(9, -9))
    brain = volume() > 0
    wide = scale_published(volume(pad=9))[inner]
    assert np.abs(wide - scale_published(volume()))[brain].max() > 0.02
    np.testing.assert_array_equal(
        scale_clean(volume(pad=9))[inner], scale_clean(volume())
    )


def test_clean_scaling():
    image = volume()
    found = scale_clean(image)
    low, high = np.percentile(image[image > 0], (0.5, 99.5))
    np.testing.assert_allclose(
        found[image > 0], ((image[image > 0] - low) / (high - low)).clip(0, 1), 1e-6
    )
    assert not found[image == 0].any()
    assert found.dtype == np.float32
    np.testing.assert_allclose(scale_clean(image * 7), found, atol=1e-5)
    # Air is 0, also where tissue is negative.
    assert not scale_clean(np.where(image > 0, image - 300, 0))[image == 0].any()


def test_images_that_cannot_be_scaled():
    nearly = np.zeros(SHAPE)
    nearly[0, 0, 0] = 5
    flat = np.ones(SHAPE)
    for scale, image in (
        (scale_published, nearly),
        (scale_published, flat),
        (scale_clean, nearly),
    ):
        with pytest.raises(MedtutError, match="cannot be scaled"):
            scale(image)


# --- choosing slices -------------------------------------------------------------


def three_axes(*areas):
    mask = np.zeros((6, 5, len(areas)), np.uint8)
    for z, area in enumerate(areas):
        mask[:, :, z].flat[:area] = 3
    return mask


def test_policies():
    mask = three_axes(0, 0, 2, 5, 0, 9, 9, 1, 0)
    assert choose_slices(mask, "max") == [5]
    assert choose_slices(mask, "all") == [2, 3, 5, 6, 7]
    assert choose_slices(mask, "second") == [2, 5, 7]
    drawn = choose_slices(mask, "random", 3, seed=1)
    assert drawn == choose_slices(mask, "random", 3, seed=1) == sorted(set(drawn))
    assert len(drawn) == 3
    assert set(drawn) <= {2, 3, 5, 6, 7}
    assert len({tuple(choose_slices(mask, "random", 2, s)) for s in range(20)}) > 3
    assert choose_slices(mask, "random", 99) == [2, 3, 5, 6, 7]
    assert all(isinstance(z, int) for z in choose_slices(mask, "second"))


def test_levels_are_those_of_the_volume_and_not_of_the_published_list():
    mask = three_axes(*[0] * 20, 4, 4, 4, 4, *[0] * 4)
    areas = [mask[:, :, z].sum() for z in range(0, mask.shape[2], 2)]
    assert np.nonzero(areas)[0].tolist() == [10, 11], "what find_slices(skip=1) returns"
    assert not mask[:, :, [10, 11]].any(), "no tumour there"
    assert choose_slices(mask, "second") == [20, 22]


@pytest.mark.parametrize("policy", ["max", "all", "second", "random"])
def test_an_empty_mask_has_no_slices(policy):
    with pytest.raises(MedtutError, match=r"not empty.* 0 voxels"):
        choose_slices(np.zeros(SHAPE), policy)


def test_wrong_policies_and_shapes():
    with pytest.raises(MedtutError, match="'every'"):
        choose_slices(three_axes(0, 1), "every")
    for shape in ((6, 5, 4, 2), (6, 5)):
        with pytest.raises(MedtutError, match=r"\(6, 5"):
            choose_slices(np.ones(shape), "all")


# --- items -----------------------------------------------------------------------


def test_items_of_the_clean_pipeline(cases):
    data = MenSlices(cases, ("t2f", "t1c"), "all")
    levels = np.flatnonzero(label().any((0, 1))).tolist()
    assert data.index == [
        (c.id, z, m) for c in cases for z in levels for m in ("t2f", "t1c")
    ]
    assert len(data) == 2 * 2 * len(levels)
    for i in (0, 1, len(data) - 1):
        item, (name, z, modality) = data[i], data.index[i]
        assert (item["case"], item["z"], item["modality"]) == (name, z, modality)
        found = load_case(cases[IDS.index(name)], (modality,))
        want = np.rot90(scale_clean(found.image[0])[:, :, z])
        np.testing.assert_allclose(item["image"], want, atol=3e-4)
        np.testing.assert_array_equal(item["mask"], np.rot90(found.label[:, :, z] > 0))
        assert item["image"].dtype == np.float32
        assert item["mask"].dtype == bool
        assert item["image"].shape == item["mask"].shape == (SHAPE[1], SHAPE[0])
    with pytest.raises(IndexError):
        data[len(data)]


def test_items_of_the_published_pipeline_lie_as_on_disk(cases):
    data = MenSlices(cases[:1], ("t1c",), "max", "published")
    item = data[0]
    assert item["z"] == (label() > 0).sum((0, 1)).argmax()
    on_disk = scale_published(arrays(0)[0][0].astype(np.float32))[:, :, item["z"]]
    np.testing.assert_array_equal(item["mask"], label()[:, :, item["z"]] > 0)
    np.testing.assert_array_equal(rgb8(item["image"]), rgb8(on_disk))
    assert rgb8(item["image"]).shape == (*SHAPE[:2], 3)
    assert rgb8(item["image"]).dtype == np.uint8


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_region_leaves_levels_and_values_alone(cases, pipeline):
    region = union_box(cases)
    assert region[2][0] > 0
    whole = MenSlices(cases, ("t1n",), "all", pipeline)
    part = MenSlices(cases, ("t1n",), "all", pipeline, region)
    assert part.index == whole.index
    sizes = [high - low for low, high in region[:2]]
    want = tuple(sizes) if pipeline == "published" else tuple(sizes[::-1])
    for one, other in zip(part, whole, strict=False):
        assert one["image"].shape == one["mask"].shape == want
        assert one["mask"].sum() == other["mask"].sum()
        # Scaled before the crop: what is cut is air.
        assert one["image"].sum() == pytest.approx(other["image"].sum())


def test_random_levels_are_the_same_in_every_modality_and_not_in_every_case(root):
    for n in range(20, 24):
        write_study(root, f"BraTS-MEN-{n:05d}-000", seed=0)
    data = MenSlices(find_men_cases(root), ("t1c", "t2w"), "random", count=1, seed=4)
    pairs = list(zip(data.index[::2], data.index[1::2], strict=True))
    assert all(a[:2] == b[:2] for a, b in pairs)
    assert len({a[1] for a, _ in pairs}) > 1
    again = MenSlices(find_men_cases(root), ("t1c", "t2w"), "random", count=1, seed=4)
    assert again.index == data.index


def test_items_can_be_changed_without_harm(cases):
    data = MenSlices(cases[:1], ("t1c",))
    data[0]["image"][:] = 9
    assert data[0]["image"].max() <= 1
    torch = pytest.importorskip("torch")
    assert torch.from_numpy(data[0]["image"]).shape == data[0]["mask"].shape


# --- the cache -------------------------------------------------------------------


def test_prepared_once_also_after_an_interruption(cases, cache, monkeypatch):
    read, stop = [], {IDS[1]}

    def counted(case, modalities):
        if case.id in stop:
            raise KeyboardInterrupt
        read.append(case.id)
        return load_case(case, modalities)

    monkeypatch.setattr(brats_men, "load_case", counted)
    with pytest.raises(KeyboardInterrupt):
        MenSlices(cases)
    stop.clear()
    first = MenSlices(cases, policy="all")
    assert read == list(IDS), "the first case is not read again"
    for policy in ("max", "second", "random"):
        MenSlices(cases[::-1], policy=policy)
    assert read == list(IDS), "a policy needs no new reading"
    again = MenSlices(cases, policy="all")
    np.testing.assert_array_equal(again[3]["image"], first[3]["image"])
    for other in (
        {"pipeline": "published"},
        {"modalities": ("t1c",)},
        {"region": union_box(cases[:1], ("t1c",))},
    ):
        before = len(read)
        MenSlices(cases[:1], **other)
        assert len(read) == before + 1, other
    rewrite(cases[0].images["t1c"], lambda v: v * 2 + (v > 0))
    MenSlices(cases)
    assert read[-1] == IDS[0], "a changed file is read again"
    monkeypatch.setattr(brats_men, "VERSION", brats_men.VERSION + 1)
    MenSlices(cases)
    assert read[-2:] == list(IDS)


def test_an_empty_mask_is_named_and_leaves_no_entry(root, cases, cache):
    rewrite(root / IDS[1] / f"{IDS[1]}-seg.nii.gz", lambda v: v * 0)
    with pytest.raises(
        MedtutError, match=rf"{IDS[1]} has no tumour slice.*-seg.nii.gz"
    ):
        MenSlices(cases)
    assert len(list(cache.rglob("*.npz"))) == 1
    images, mask = volume_slices(cases[1], ("t1c",))
    assert len(images) == len(mask) == SHAPE[2]
    assert not mask.any()


def test_wrong_arguments(cases):
    for wrong, word in (
        ({"cases": []}, "at least one"),
        ({"cases": [cases[0]] * 2}, "each once"),
        ({"pipeline": "raw"}, "'raw'"),
        ({"policy": "some"}, "'some'"),
        ({"modalities": ("flair",)}, "found with t1c"),
        ({"region": PUBLISHED_CROP}, "union_box"),
    ):
        with pytest.raises(MedtutError, match=word):
            MenSlices(**({"cases": cases} | wrong))


# --- volumes and the way back ----------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("cropped", [False, True])
def test_the_way_back_is_exact(cases, pipeline, cropped):
    region = union_box(cases) if cropped else None
    images, mask = volume_slices(cases[0], ("t2w", "t1c"), pipeline, region)
    want = load_case(cases[0], ("t1c",))
    assert images.dtype == np.float32
    assert images.shape == (len(mask), 2, *mask.shape[1:])
    back = to_volume(mask, SHAPE, pipeline, region)
    assert back.dtype == bool
    np.testing.assert_array_equal(back, want.label > 0)
    scaled = {"clean": scale_clean, "published": scale_published}[pipeline]
    grey = to_volume(images[:, 1], SHAPE, pipeline, region)
    np.testing.assert_allclose(grey, scaled(want.image[0]), atol=1e-6)


def test_all_levels_hold_the_slices_of_the_items(cases):
    images, mask = volume_slices(cases[0], ("t1c",), "published")
    for item in MenSlices(cases[:1], ("t1c",), "all", "published"):
        np.testing.assert_array_equal(rgb8(images[item["z"], 0]), rgb8(item["image"]))
        np.testing.assert_array_equal(mask[item["z"]], item["mask"])


def test_a_stack_that_is_no_volume(cases):
    for stack in (np.zeros((1, 20, 24)), np.zeros((12, 24, 20))):
        with pytest.raises(MedtutError, match="do not fill"):
            to_volume(stack, SHAPE, "clean", None)
