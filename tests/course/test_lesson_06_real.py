"""Lesson 06: the part on a real CT, with a body of three boxes."""

from types import SimpleNamespace

import few_shot_small as small
import nibabel
import numpy as np
import pytest

from medtut.course.lessons import fseft_real
from medtut.data.ct_volume import CTError
from medtut.data.organ_records import find_cases
from medtut.data.organs import BASE, OrganError
from medtut.data.totalseg import read_labels
from medtut.errors import MedtutError
from medtut.evaluate.organs import dice
from medtut.models.partial_loss import PartialDice

LAYERS = [
    f"swinViT.layers{s}.0.blocks.{b}.attn.qkv" for s in range(1, 5) for b in (0, 1)
]


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory):
    small.forget()
    with pytest.MonkeyPatch.context() as patch:
        yield small.open_course(patch, tmp_path_factory.mktemp("l06"))[0]
    small.forget()


# --- a real CT ----------------------------------------------------------------------


def write_real(root, codes="RAS", spacing=(4.0, 4.0, 5.0), drop=()):
    """A body of 40 x 36 x 55 voxels with three organs; returns the truth in RAS."""
    shape = (40, 36, 55)
    rng = np.random.default_rng(0)
    hu = np.full(shape, -1000, np.float32)
    hu[2:-2, 2:-2] = -60
    masks = {n: np.zeros(shape, np.uint8) for n in ("liver", "spleen", "aorta")}
    masks["liver"][22:36, 6:30, 10:45] = 1
    masks["spleen"][4:14, 6:16, 20:40] = 1
    masks["aorta"][16:20, 24:29, 5:50] = 1
    for n, (name, mask) in enumerate(masks.items()):
        hu[mask > 0] = (110, 180, 240)[n]
        mask *= name not in drop
    hu += rng.normal(0, 5, shape)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-80, -70, 200)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes)
    )

    def save(path, values):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(values, affine).as_reoriented(turn)
        nibabel.save(image, path)

    folder = root / "s0001"
    save(folder / "ct.nii.gz", hu.astype(np.int16))
    for name, mask in masks.items():
        save(folder / "segmentations" / f"{name}.nii.gz", mask)
    return masks


@pytest.fixture(scope="module")
def grid(settings):
    """Settings with a finer grid: 32 x 32 x 64 voxels of 5 mm."""
    return settings.model_copy(update={"spacing": 5.0})


def reading(grid, folder):
    given = grid.model_copy(update={"data": str(folder)})
    return given, fseft_real.read_real(given)


@pytest.fixture(scope="module")
def real(grid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    write_real(folder, drop=("aorta",))
    return reading(grid, folder)


def test_an_empty_organ_is_not_asked_for(real):
    _, found = real
    assert found.case.structures == ("spleen", "liver", "aorta"), "in the order of BASE"
    assert found.structures == ("spleen", "liver")
    assert found.case.empty == ("aorta",)


def test_other_orientations_are_the_same_body(real, grid, tmp_path):
    found = real[1]
    for codes in ("LPS", "SAL"):
        write_real(tmp_path / codes, codes, drop=("aorta",))
        _, other = reading(grid, tmp_path / codes)
        assert other.structures == found.structures
        np.testing.assert_allclose(other.case.image, found.case.image, atol=0.02)
        assert (other.case.labels != found.case.labels).mean() < 0.002
        assert other.case.original[1] != found.case.original[1] or codes == "LPS"
        perfect = other.case.labels[:2].astype("f4")
        back = fseft_real.scores(other, perfect, rest=False)
        assert set(back) == {"spleen", "liver"}
        assert min(back.values()) > 0.85
        np.testing.assert_allclose(
            [*back.values()], [*fseft_real.scores(found, perfect, False).values()],
            atol=0.01,
        )  # fmt: skip


def test_thick_slices_and_labels_of_another_volume(grid, tmp_path):
    write_real(tmp_path / "thick", spacing=(1.5, 1.5, 5.0))
    _, found = reading(grid, tmp_path / "thick")
    assert found.case.spacing == (1.5, 1.5, 5.0)
    assert found.case.image.shape == (1, 32, 32, 64)
    sizes = found.case.labels.sum((1, 2, 3)) * 5.0**3
    truth = read_labels(found.case.record, found.structures).sum((1, 2, 3)) * 1.5**2 * 5
    np.testing.assert_allclose(sizes[:2], truth[:2], rtol=0.2)  # spleen and liver
    write_real(tmp_path / "wrong")
    write_real(tmp_path / "moved", spacing=(4.0, 4.0, 4.5))
    liver = "s0001/segmentations/liver.nii.gz"
    (tmp_path / "moved" / liver).replace(tmp_path / "wrong" / liver)
    with pytest.raises(OrganError, match=r"liver\.nii\.gz"):
        reading(grid, tmp_path / "wrong")
    with pytest.raises(OrganError):
        reading(grid, tmp_path / "nowhere")
    (tmp_path / "wrong/s0001/ct.nii.gz").write_bytes(b"none")
    with pytest.raises((CTError, OrganError), match=r"ct\.nii\.gz"):
        reading(grid, tmp_path / "wrong")


def test_one_slice_in_five_is_labelled(real):
    case = real[1].case
    chosen = fseft_real.labelled_slices(case)
    there = case.image[0].any((0, 1))
    assert chosen.shape == (64,)
    at = np.flatnonzero(chosen)
    assert at[0] == np.flatnonzero(there)[0] + 2
    assert (np.diff(at) == 5).all()
    assert not (chosen & ~there).any(), "none of the padding"
    assert there.sum() == 55
    assert at[-1] + 5 < 64, "the next one is padding"
    assert len(at) == 11


def test_scores_leave_out_what_was_labelled(real):
    _, found = real
    p = found.case.labels[:2].astype("f4")
    chosen = fseft_real.labelled_slices(found.case)
    full = fseft_real.scores(found, p)
    spoiled = p.copy()
    spoiled[..., chosen] = 0.0
    every = fseft_real.scores(found, spoiled, rest=False)
    most = fseft_real.scores(found, spoiled)
    truth = read_labels(found.case.record, found.structures).astype(bool)
    for name in found.structures:
        assert every[name] < most[name] - 0.05, "the slices themselves are not asked"
        assert most[name] <= full[name]
    none = fseft_real.scores(found, np.zeros_like(p))
    assert none == {"spleen": 0.0, "liver": 0.0}
    assert dice(truth, truth).tolist() == [1, 1]
    # A structure without truth in the rest has no score, whatever was found.
    other = fseft_real.RealCT(found.case, ("spleen", "liver", "aorta"))
    one = np.concatenate([p, np.ones_like(p[:1])])
    assert set(fseft_real.scores(other, one)) == {"spleen", "liver"}


def test_a_few_slices_teach(real, monkeypatch):
    given, found = real
    seen, plain = [], PartialDice.forward

    def forward(self, logits, target, known):
        seen.append((logits.detach().sigmoid().numpy()[0], target.numpy()[0]))
        return plain(self, logits, target, known)

    monkeypatch.setattr(PartialDice, "forward", forward)
    places = [BASE.index(n) for n in found.structures]
    start = fseft_real.zero_shot(found.case, given)
    assert start.shape == (9, 32, 32, 64)
    none = fseft_real.adapt_to_slices(found, given, steps=0)
    np.testing.assert_allclose(none, start[places], atol=1e-3)
    after = fseft_real.adapt_to_slices(found, given, steps=15, rate=0.03)
    assert after.shape == (2, 32, 32, 64)
    before, learned = (fseft_real.scores(found, p) for p in (start[places], after))
    assert np.mean([*learned.values()]) > np.mean([*before.values()]) + 0.1
    again = fseft_real.adapt_to_slices(found, given, steps=2)
    assert np.array_equal(again, fseft_real.adapt_to_slices(found, given, steps=2))
    # The loss sees the labelled slices, and what is true in them.
    chosen = fseft_real.labelled_slices(found.case)
    first, target = seen[0]
    assert np.array_equal(target, found.case.labels[:2][..., chosen])
    np.testing.assert_allclose(first, none[..., chosen], atol=1e-5)
    other = fseft_real.adapt_to_slices(found, given, seed=1, steps=2)
    assert not np.array_equal(again, other)


def test_nothing_to_learn_from(real, grid, tmp_path):
    given, found = real
    for names in ((), ("aorta",)):
        with pytest.raises(MedtutError, match="no base organ in its labelled slices"):
            fseft_real.adapt_to_slices(fseft_real.RealCT(found.case, names), given)
    write_real(tmp_path)
    for path in (tmp_path / "s0001/segmentations").iterdir():
        path.unlink()
    _, bare = reading(grid, tmp_path)
    assert bare.structures == ()
    with pytest.raises(MedtutError, match=r"ct\.nii\.gz: no base organ"):
        fseft_real.adapt_to_slices(bare, given)


def test_without_data_it_is_the_chest_of_the_course(grid, tmp_path, monkeypatch):
    import nrrd

    from medtut.data import assets

    write_real(tmp_path)
    source = nibabel.load(tmp_path / "s0001/ct.nii.gz")
    header = {"space": "right-anterior-superior", "space origin": [-80, -70, 200],
              "space directions": np.diag([4.0, 4, 5])}  # fmt: skip
    path = tmp_path / "chest.nrrd"
    nrrd.write(str(path), np.asarray(source.dataobj, np.int16), header)
    monkeypatch.setattr(assets, "fetch", lambda name: {"image": path})
    found = fseft_real.read_real(grid)
    assert (found.case.record.id, found.structures) == ("slicerio-chest", ())
    assert found.case.labels.shape[0] == 0
    # A NRRD is shown too, and the masks lie on its grid.
    mask = np.zeros((1, *found.case.original[1]), bool)
    mask[0, 3, 4, 5] = True
    shown = viewer(monkeypatch, found.case.record, mask, tmp_path)
    assert shown[0]["path"] == str(path)
    written = nibabel.load(shown[1]["path"])
    np.testing.assert_allclose(written.affine, source.affine)


def viewer(monkeypatch, record, masks, folder):
    """What niivue is asked to load."""
    import ipyniivue

    loaded = []
    fake = SimpleNamespace(load_volumes=loaded.extend)
    monkeypatch.setattr(ipyniivue, "NiiVue", lambda: fake)
    assert fseft_real.volume_viewer(record, masks, folder) is fake
    return loaded


def test_what_is_shown_lies_on_the_grid_of_the_file(grid, tmp_path, monkeypatch):
    write_real(tmp_path, "LPS")
    (record,) = find_cases(tmp_path)
    masks = read_labels(record, ("spleen", "liver")).astype(bool)
    shown = viewer(monkeypatch, record, masks, tmp_path / "out")
    assert [v["path"] for v in shown] == [
        str(record.image), str(tmp_path / "out" / "s0001-found.nii.gz")
    ]  # fmt: skip
    source, written = (nibabel.load(v["path"]) for v in shown)
    np.testing.assert_allclose(written.affine, source.affine)
    values = np.asarray(written.dataobj)
    assert np.array_equal(values, masks[0] + 2 * masks[1])
