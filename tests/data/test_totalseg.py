"""Readers of labelled abdominal CT: layouts, grids and what they refuse."""

import gzip

import nibabel
import numpy as np
import pytest
from organ_small import (
    ORIGIN,
    SHAPE,
    SPACING,
    affine,
    arrays,
    save,
    write_case,
    write_flare,
)

from medtut.data.ct_volume import CTError
from medtut.data.organs import (
    BASE,
    FLARE22,
    GLUTEUS,
    HEART,
    HIGHEST,
    LABEL_MAPS,
    LUNG,
    NOVEL,
    STRUCTURES,
    TOTALSEG_V1,
    TOTALSEG_V2,
    UNIONS,
    UPSTREAM,
)
from medtut.data.totalseg import (
    OrganError,
    Record,
    find_cases,
    load_case,
    read_labels,
    read_partition,
    to_original,
)

ORGANS = ("liver", "spleen", "aorta")
VOXEL = np.prod(SPACING)


def truth(organs=ORGANS):
    return np.stack([arrays()[1][name] for name in organs])


# --- names -------------------------------------------------------------------------


def test_names_and_ids():
    assert len(STRUCTURES) == len(set(STRUCTURES)) == 29
    assert len(BASE) == 9
    assert set(BASE) <= set(STRUCTURES)
    assert (len(HEART), len(LUNG), len(GLUTEUS), len(set(NOVEL))) == (5, 5, 6, 16)
    assert not set(NOVEL) & set(STRUCTURES)
    upstream = [UPSTREAM.get(name, name) for name in STRUCTURES]
    assert upstream[:4] == ["spleen", "rkidney", "lkidney", "gall"]
    assert (upstream[8], upstream[15], upstream[28]) == (
        "postcava",
        "prost_ut",
        "colon_tumor",
    )
    assert set(UPSTREAM) <= set(STRUCTURES)
    for kind, ids in LABEL_MAPS.items():
        assert len(set(ids.values())) == len(ids), kind
        assert 1 <= min(ids.values()) <= max(ids.values()) <= HIGHEST[kind]
    assert sorted(FLARE22.values()) == list(range(1, 14))
    assert [TOTALSEG_V1[h] for h in HEART] == [44, 45, 46, 47, 48]
    assert not set(HEART) & set(TOTALSEG_V2)
    assert "heart" in TOTALSEG_V2
    assert "heart" not in TOTALSEG_V1
    for structures in (BASE, LUNG, GLUTEUS):
        assert set(structures) <= set(TOTALSEG_V1) & set(TOTALSEG_V2)
    assert UNIONS["lung_left"] + UNIONS["lung_right"] == LUNG


# --- layouts -----------------------------------------------------------------------


def test_totalsegmentator(tmp_path):
    for name in ("s0002", "s0001"):
        write_case(tmp_path, name)
    text = "image_id;institute\ns0001;A\ns0003;B\n"
    (tmp_path / "meta.csv").write_text(text, encoding="utf-8-sig")
    one, two = find_cases(tmp_path)
    assert (one.id, two.id) == ("s0001", "s0002")
    assert set(one.annotated) == set(ORGANS)
    assert one.facts["institute"] == "A"
    assert two.facts == {}
    assert find_cases(tmp_path / "s0001")[0].id == "s0001"
    (tmp_path / "meta.csv").write_text("name,institute\ns0001,A\n")
    assert find_cases(tmp_path)[0].facts == {}, "another table is no table"
    write_case(tmp_path / "up" / "data", "s0005")
    assert [r.id for r in find_cases(tmp_path / "up")] == ["s0005"]
    np.testing.assert_array_equal(read_labels(one, ORGANS), truth())
    assert find_cases(tmp_path)[0].ids is None


def test_one_file_of_many_ids(tmp_path):
    hu, masks = arrays()
    folder = tmp_path / "s0001"
    save(folder / "ct.nii.gz", hu, affine())
    one = sum(m * TOTALSEG_V2[o] for o, m in masks.items())
    one[hu > 120] = 116  # the sternum, which the course does not read
    save(folder / "segmentations.nii.gz", one.astype(np.uint8), affine())
    (record,) = find_cases(tmp_path)
    assert set(TOTALSEG_V2) < set(record.annotated)  # and what they make up together
    assert "lung_left" in record.annotated
    got = read_labels(record, ("liver", "lung_left"))
    np.testing.assert_array_equal(got[0], masks["liver"] & (hu <= 120))
    assert not got[1].any()
    with pytest.raises(OrganError, match=r"holds \[0.*0 to 104.*label_map"):
        read_labels(find_cases(tmp_path, "totalseg_v1")[0], ("liver",))
    with pytest.raises(OrganError, match="'v3': take one of totalseg_v2"):
        find_cases(tmp_path, "v3")


def test_a_pair_with_a_table_of_names(tmp_path):
    hu, masks = arrays()
    save(tmp_path / "scan_ct.nii.gz", hu, affine())
    labels = nibabel.Nifti1Image((masks["liver"] * 7 + masks["aorta"] * 9), affine())
    table = '<Label Key="7" Red="0"><![CDATA[liver]]></Label>'
    table += '<Label Key="9"><![CDATA[aorta]]></Label>'
    labels.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, table.encode()))
    nibabel.save(labels, tmp_path / "scan_seg.nii.gz")
    (record,) = find_cases(tmp_path)
    assert record.id == "scan_ct"
    assert record.ids == {"liver": 7, "aorta": 9}, "not those of version 2"
    np.testing.assert_array_equal(
        read_labels(record, ("aorta", "liver")), truth(("aorta", "liver"))
    )


def test_lobes_make_a_lung(tmp_path):
    folder = write_case(tmp_path)
    parts = np.zeros((3, *SHAPE), np.uint8)
    for i, lobe in enumerate(UNIONS["lung_right"]):
        parts[i, 15:20, 4 * i : 4 * i + 3, 5] = 1
        save(folder / "segmentations" / f"{lobe}.nii.gz", parts[i], affine())
    (record,) = find_cases(tmp_path)
    assert "lung_right" in record.annotated
    np.testing.assert_array_equal(read_labels(record, ("lung_right",))[0], parts.max(0))
    (folder / "segmentations" / "lung_upper_lobe_right.nii.gz").unlink()
    assert "lung_right" not in find_cases(tmp_path)[0].annotated
    # A hospital that outlines the lung as one, whether it has lobes or not.
    whole = parts.max(0)
    whole[20, 20, 5] = 1
    save(folder / "segmentations" / "lung_right.nii.gz", whole, affine())
    np.testing.assert_array_equal(read_labels(record, ("lung_right",))[0], whole)


def test_flare(tmp_path):
    write_flare(tmp_path, "FLARE22_Tr_0001", FLARE22)
    write_flare(tmp_path, "FLARE22_Tr_0002", FLARE22, labels=False)
    one, two = find_cases(tmp_path)
    assert (one.id, two.labels, two.annotated) == ("FLARE22_Tr_0001", None, ())
    assert len(one.annotated) == 13
    np.testing.assert_array_equal(read_labels(one, ORGANS), truth())
    assert not read_labels(one, ("pancreas",)).any()


def test_no_case(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(OrganError, match=r"holds no case: .*data_scripts/flare22"):
            find_cases(folder)


def test_both_sides_with_one_id(tmp_path):
    """Left and right are the patient's, however the file is stored."""
    hu, _ = arrays()
    kidneys = np.zeros(SHAPE, np.uint8)
    kidneys[4:8, 8:12, 5:9] = 1  # towards -x, the patient's left
    kidneys[18:22, 8:11, 5:9] = 1
    ids = {"kidney_right": (1, "right"), "kidney_left": (1, "left")}
    for codes in ("RAS", "LPI", "SAL"):
        image = save(tmp_path / codes / "i.nii.gz", hu, affine(), codes)
        labels = save(tmp_path / codes / "l.nii.gz", kidneys, affine(), codes)
        record = Record("k", image, labels, ids)
        case = load_case(record, ("kidney_left", "kidney_right"), 2.5)
        left, right = case.labels
        assert np.argwhere(left)[:, 0].max() < np.argwhere(right)[:, 0].min()
        assert read_labels(record, tuple(ids)).sum() == kidneys.sum()


# --- upstream's lists --------------------------------------------------------------


def test_partition_lists(tmp_path):
    write_case(tmp_path / "14_TotalSegmentator" / "data", "s0241")
    case = "14_TotalSegmentator/data/{0}/"
    line = f"{case}ct.nii.gz   {case}segmentations/spleen.nii.gz"
    path = tmp_path / "spleen_train.txt"
    path.write_text("\n".join(line.format(s) for s in ("s0241", "s0001")) + "\n\n")
    records = read_partition(path, tmp_path)
    assert [r.id for r in records] == ["s0241", "s0001"]
    assert records[0].facts == {"dataset": "14_TotalSegmentator", "structure": "spleen"}
    np.testing.assert_array_equal(
        read_labels(records[0], ["spleen"]), truth(["spleen"])
    )
    path.write_text(line.format("s0001") + "\n" + line.format("s0001"))
    with pytest.warns(UserWarning, match=r"line 2: s0001 stands twice"):
        assert len(read_partition(path, tmp_path)) == 1
    path.write_text(
        "05_KiTS/img/img0000.nii.gz\t05_KiTS/label/label0000.nii.gz\n"
        "17_FLARE22/train/images/FLARE22_Tr_0001_0000.nii.gz "
        "17_FLARE22/train/labels/FLARE22_Tr_0001.nii.gz"
    )
    kits, flare = read_partition(path, tmp_path)
    assert (kits.highest, len(kits.annotated)) == (3, 4)
    assert (flare.id, flare.highest) == ("FLARE22_Tr_0001", 13)
    path.write_text("a.nii.gz b.nii.gz c.nii.gz")
    with pytest.raises(OrganError, match=r"line 1: 3 words"):
        read_partition(path, tmp_path)
    path.write_text("99_New/a.nii.gz 99_New/b.nii.gz")
    with pytest.raises(OrganError, match=r"line 1: 99_New/a.nii.gz is of no known set"):
        read_partition(path, tmp_path)


# --- the grid of the network, and back ---------------------------------------------


def test_load_case(tmp_path):
    write_case(tmp_path)
    (record,) = find_cases(tmp_path)
    case = load_case(record, (*ORGANS, "pancreas"), 2.0, roi=32, partial=True)
    assert case.image.dtype == np.float32
    assert case.image.shape[0] == 1
    assert min(case.image.shape[1:]) >= 32
    assert case.labels.shape == (4, *case.image.shape[1:])
    assert case.labels.dtype == np.uint8
    assert case.annotated.tolist() == [True, True, True, False]
    assert not case.labels[3].any()
    assert case.empty == ()
    np.testing.assert_allclose(np.diag(case.affine)[:3], 2)
    assert (case.image.min(), case.image.max()) == (0, pytest.approx(0.7, abs=0.2))
    np.testing.assert_allclose(case.spacing, SPACING)
    # HU -175..250 to 0..1, and labels where the image is brighter.
    assert case.image[0][case.labels[0] == 1].mean() == pytest.approx(
        245 / 425, abs=0.02
    )
    assert load_case(record, (), 2.0).labels.shape[0] == 0


def test_the_published_chain(tmp_path):
    """Against MONAI's own transforms from the file on, as upstream composes them."""
    from monai.transforms import (
        Compose,
        CropForegroundd,
        EnsureChannelFirstd,
        LoadImaged,
        Orientationd,
        ScaleIntensityRanged,
        Spacingd,
        SpatialPadd,
    )

    folder = write_case(tmp_path, codes="LPS")
    both = ("image", "label")
    chain = Compose(
        [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            Orientationd(both, "RAS", labels=None),
            Spacingd(both, (1.7,) * 3, mode=("bilinear", "nearest")),
            ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
            CropForegroundd(both, source_key="image", allow_smaller=True),
            SpatialPadd(both, 48),
        ]
    )
    files = (folder / "ct.nii.gz", folder / "segmentations" / "liver.nii.gz")
    want = chain(dict(zip(both, files, strict=True)))
    case = load_case(find_cases(tmp_path)[0], ("liver",), 1.7, roi=48)
    np.testing.assert_allclose(case.image, want["image"].numpy(), atol=1e-4)
    assert (case.labels != want["label"].numpy()).mean() < 1e-4
    np.testing.assert_allclose(case.affine, want["image"].affine.numpy(), atol=1e-5)


@pytest.mark.parametrize("codes", ["LPS", "SAL", "PIR"])
def test_other_orientations_give_the_same(tmp_path, codes):
    write_case(tmp_path / "a")
    write_case(tmp_path / "b", codes=codes)
    one, two = (load_case(find_cases(tmp_path / f)[0], ORGANS, 2.5) for f in "ab")
    np.testing.assert_allclose(one.image, two.image, atol=1e-5)
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_allclose(one.affine, two.affine, atol=1e-4)
    back = to_original(two.labels, two)
    want = nibabel.load(tmp_path / "b" / "s0001" / "segmentations" / "liver.nii.gz")
    assert back.shape[1:] == want.shape, "as stored"


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL"])
def test_back_is_exact_where_no_voxel_was_lost(tmp_path, codes):
    write_case(tmp_path, codes=codes)
    (record,) = find_cases(tmp_path)
    # The spacing of the file, and finer: nearest there and back is the identity.
    for spacing in (SPACING, (1.0, 1.25, 1.5)):
        case = load_case(record, ORGANS, spacing, roi=40)
        back = to_original(case.labels, case)
        assert back.dtype == np.uint8
        np.testing.assert_array_equal(back, read_labels(record, ORGANS))
        single = to_original(case.labels[0].astype(bool), case)
        assert single.dtype == bool
        np.testing.assert_array_equal(single, back[0])


def test_back_places_every_voxel(tmp_path):
    """A probability rises along x and z: so it does afterwards, in mm."""
    write_case(tmp_path, codes="LAS")
    case = load_case(find_cases(tmp_path)[0], (), 4.0)

    def places(matrix, shape):
        moved = np.tensordot(matrix[:3, :3], np.indices(shape), 1)
        return moved + matrix[:3, 3, None, None, None]

    world = places(case.affine, case.image.shape[1:])
    back = to_original(world.astype(np.float32), case)
    wanted = places(*case.original)
    ends = [end((1, 2, 3)).reshape(3, 1, 1, 1) for end in (world.min, world.max)]
    inside = np.all((wanted > ends[0]) & (wanted < ends[1]), axis=0)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(back[:, inside], wanted[:, inside], atol=1e-2)


def test_the_edge_of_the_volume_is_reached(tmp_path):
    """Coarse voxels end before the file does: what touches its end is not cut off."""
    write_case(tmp_path)
    case = load_case(find_cases(tmp_path)[0], (), 5.0)
    full = np.ones(case.image.shape[1:], np.float32)
    assert (to_original(full, case) > 0.5)[4:-4, 3:-3].all()


def test_anisotropic_series(tmp_path):
    spacing = (2.2, 2.2, 5.0)
    write_case(tmp_path, spacing=spacing)
    (record,) = find_cases(tmp_path)
    case = load_case(record, ORGANS)
    want = truth().sum((1, 2, 3)) * np.prod(spacing)
    np.testing.assert_allclose(case.labels.sum((1, 2, 3)) * 1.5**3, want, rtol=0.15)
    back = to_original(case.labels.astype(np.float32), case) > 0.5
    np.testing.assert_allclose(back.sum((1, 2, 3)), truth().sum((1, 2, 3)), rtol=0.1)
    np.testing.assert_allclose(case.spacing, spacing, rtol=1e-6)


def test_overlapping_structures(tmp_path):
    folder = write_case(tmp_path)
    body = np.zeros(SHAPE, np.uint8)
    body[5:20, 5:16, 4:14] = 1
    save(folder / "segmentations" / "colon.nii.gz", body, affine())
    (record,) = find_cases(tmp_path)
    case = load_case(record, (*ORGANS, "colon"), SPACING)
    back = to_original(case.labels, case)
    np.testing.assert_array_equal(back, np.concatenate([truth(), body[None]]))


def test_a_prediction_of_another_shape(tmp_path):
    write_case(tmp_path)
    case = load_case(find_cases(tmp_path)[0], (), 3.0)
    for shape in ((3, 4, 5), (1, 1, *case.image.shape[1:])):
        with pytest.raises(OrganError, match=r"s0001 have the shapes .*batch"):
            to_original(np.zeros(shape), case)


# --- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize("spacing", [0, -1.5, float("nan"), (1.5, 1.5, 0)])
def test_a_spacing_that_is_none(tmp_path, spacing):
    write_case(tmp_path)
    with pytest.raises(OrganError, match=r"spacing of .*mm above 0"):
        load_case(find_cases(tmp_path)[0], ORGANS, spacing)


def test_empty_organ_is_reported(tmp_path):
    folder = write_case(tmp_path)
    save(
        folder / "segmentations" / "spleen.nii.gz", np.zeros(SHAPE, np.uint8), affine()
    )
    case = load_case(find_cases(tmp_path)[0], ORGANS, 3.0)
    assert case.empty == ("spleen",)
    assert case.annotated.all(), "absent, which is something else than unknown"


def test_labels_of_another_volume(tmp_path):
    folder = write_case(tmp_path)
    path, mask = folder / "segmentations" / "liver.nii.gz", arrays()[1]["liver"]
    for values, matrix, codes in (
        (mask[:-1], affine(), "RAS"),
        (mask, affine((2, 2.5, 3.2)), "RAS"),
        (mask, affine(), "LPS"),
        (mask, affine() + np.eye(4)[:, [3, 3, 3, 0]] * 0, "LAS"),
    ):
        save(path, values, matrix, codes)
        with pytest.raises(OrganError, match=r"liver.nii.gz belongs to another volume"):
            load_case(find_cases(tmp_path)[0], ("liver",))
    moved = affine()
    moved[2, 3] += 1.0
    save(path, mask, moved)
    with pytest.raises(OrganError, match=r"up to 1.0 mm"):
        read_labels(find_cases(tmp_path)[0], ("liver",))
    moved[2, 3] -= 0.999  # of rounding in a header
    save(path, mask, moved)
    assert read_labels(find_cases(tmp_path)[0], ("liver",)).any()


def test_unknown_ids(tmp_path):
    folder = write_case(tmp_path)
    path, mask = folder / "segmentations" / "liver.nii.gz", arrays()[1]["liver"]
    for bad in (mask * 2, mask * np.float32(0.5), mask - np.int16(1), mask * np.nan):
        save(path, bad, affine())
        with pytest.raises(OrganError, match=r"liver.nii.gz holds .*0 to 1 are known"):
            read_labels(find_cases(tmp_path)[0], ("liver",))
    write_flare(tmp_path / "f", "FLARE22_Tr_0001", FLARE22 | {"aorta": 14})
    with pytest.raises(OrganError, match=r"0001.nii.gz holds .*0 to 13 are known"):
        load_case(find_cases(tmp_path / "f")[0], ("liver",))


def test_missing_organ_file(tmp_path):
    folder = write_case(tmp_path)
    (folder / "segmentations" / "spleen.nii.gz").unlink()
    (record,) = find_cases(tmp_path)
    with pytest.raises(
        OrganError, match=r"no labels of spleen; there are aorta, liver"
    ):
        load_case(record, ORGANS)
    assert load_case(record, ORGANS, 3, partial=True).annotated.tolist() == [1, 0, 1]
    with pytest.raises(OrganError, match=r"no labels of speen"):
        load_case(record, ("speen",), partial=True)
    with pytest.raises(OrganError, match=r"heart_myocardium.*first version"):
        read_labels(record, ("heart_myocardium",))
    bare = Record("s", record.image)
    with pytest.raises(OrganError, match=r"ct.nii.gz: no labels of liver; .* none"):
        read_labels(bare, ("liver",))


def test_files_that_are_broken(tmp_path):
    folder = write_case(tmp_path)
    (record,) = find_cases(tmp_path)
    path = folder / "segmentations" / "liver.nii.gz"
    whole = path.read_bytes()
    plain = gzip.decompress(whole)
    path.write_bytes(gzip.compress(plain[: len(plain) // 2]))
    with pytest.raises(OrganError, match=r"(?s)liver.nii.gz cannot be read.*cut off"):
        read_labels(record, ("liver",))
    path.write_bytes(whole[:60])
    with pytest.raises(CTError, match=r"liver.nii.gz cannot be used"):
        read_labels(record, ("liver",))
    path.write_bytes(whole)
    image, hu = folder / "ct.nii.gz", arrays()[0]
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    with pytest.raises(CTError, match=r"ct.nii.gz cannot be used"):
        load_case(record, ("liver",))
    bad = hu.astype(np.float32)
    bad[3, 3, 3] = np.nan
    save(image, bad, affine())
    with pytest.raises(CTError, match=r"1 of .* voxels are NaN"):
        load_case(record, ("liver",))
    save(image, hu[..., :1], affine())
    with pytest.raises(CTError, match=r"at least 2 slices"):
        load_case(record, ("liver",))
    save(image, hu + 1024, affine())
    with pytest.raises(CTError, match=r"not in HU"):
        load_case(record, ("liver",))


def test_origin_is_kept(tmp_path):
    write_case(tmp_path)
    case = load_case(find_cases(tmp_path)[0], (), SPACING)
    low, high = np.array(ORIGIN), np.array(ORIGIN) + np.array(SHAPE) * SPACING
    assert ((case.affine[:3, 3] >= low - 1e-4) & (case.affine[:3, 3] < high)).all()
