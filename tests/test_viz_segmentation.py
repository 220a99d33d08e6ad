"""The pictures of lesson 02 show what is there, and refuse what would mislead."""

import json

import numpy as np
import pytest
from PIL import Image

from medtut import viz_segmentation as vs
from medtut.errors import MedtutError


def slice_of_head(seed=0):
    """A drawn slice (40, 48): black outside, tissue, a hot pixel; and its labels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:40j, -1:1:48j]
    image = np.where(x**2 + y**2 < 0.8, rng.normal(300, 60, x.shape), 0)
    image[3, 24] = 9000
    label = np.zeros(image.shape, int)
    label[10:22, 20:34], label[13:19, 24:30], label[15:17, 26:28] = 2, 3, 1
    return image.astype(np.float32), label


def patient(case, depth=5):
    """Volumes (X, Y, Z) of one patient; slice 0 is empty, slice 3 the largest."""
    image, label = slice_of_head(depth)
    volume = np.stack([np.rot90(image, -1)] * depth, axis=-1)
    truth = np.stack([np.rot90(label, -1)] * depth, axis=-1)
    truth[..., 0] = 0
    for z in set(range(1, depth)) - {3}:
        truth[..., z][truth[..., z] == 2] = 0
    prediction = truth.copy()
    prediction[:24, :, :] = 0
    return case, volume, truth, prediction


def texts(fig):
    """Every text of a figure with its size in points."""
    from matplotlib.text import Text

    return [(t.get_text(), t.get_fontsize()) for t in fig.findobj(Text) if t.get_text()]


# ------------------------------------------------------------------------- overlays
def test_window_clips_and_never_wraps():
    image, _ = slice_of_head()
    unit = vs.window(image)
    assert unit.min() == 0
    assert unit.max() == 1
    assert unit[3, 24] == 1  # the hot pixel stays the brightest
    order = np.argsort(image.ravel(), kind="stable")
    assert (np.diff(unit.ravel()[order]) >= 0).all()
    assert 0.4 < np.median(unit[image > 0]) < 0.8  # tissue is not darkened by it


@pytest.mark.parametrize("image", [np.full((4, 5), 7.0), np.full((4, 5), np.nan)])
def test_window_of_an_image_without_range_is_black(image):
    assert (vs.window(image) == 0).all()


def test_window_survives_what_is_not_a_number():
    image, _ = slice_of_head()
    image[:3, :3] = [np.nan, np.inf, -np.inf]
    assert np.isfinite(vs.window(image)).all()
    assert (vs.window(image)[:3, :3] == 0).all()


def test_overlay_tints_the_lesion_and_nothing_else():
    image, label = slice_of_head()
    picture = vs.overlay(image, label)
    assert picture.dtype == np.uint8
    assert picture.shape == (*image.shape, 3)
    grey = np.rint(255 * vs.window(image)).astype(np.uint8)
    assert (picture[label == 0] == grey[label == 0][:, None]).all()
    for k in (1, 2, 3):
        want = 0.6 * 255 * vs.window(image)[label == k][:, None] + 0.4 * vs.COLOURS[k]
        assert np.abs(picture[label == k] - want).max() <= 0.5
    assert (vs.overlay(image, label, alpha=0) == grey[..., None]).all()


def test_colours_are_those_of_the_legend():
    patches = vs.legend_patches()
    rgb = [np.rint(255 * np.array(p.get_facecolor()[:3])).tolist() for p in patches]
    assert rgb == vs.COLOURS[1:].tolist()
    assert [p.get_label() for p in patches] == list(vs.CLASSES)


@pytest.mark.parametrize("paint", [vs.overlay, vs.published_overlay])
def test_overlay_refuses_what_does_not_fit(paint):
    image, label = slice_of_head()
    with pytest.raises(MedtutError, match="map it to 3"):
        paint(image, np.where(label == 3, 4, label))
    with pytest.raises(MedtutError, match="of one shape"):
        paint(image, label.T)
    with pytest.raises(MedtutError, match="of one shape"):
        paint(image[None], label[None])


def test_published_overlay_wraps_by_hand_counted_pixels():
    # Mean 3, deviation 1.915: 255 z is -399, -133, -133, 133, 133, 399.
    image = np.array([[0.0, 2.0, 2.0], [4.0, 4.0, 6.0]])
    label = np.array([[0, 0, 1], [0, 2, 3]])
    wrapped = np.array([[113, 123, 123], [133, 133, 143]])
    picture = vs.published_overlay(image, label)
    assert picture.dtype == np.uint8
    assert (picture[0, 0] == round(0.7 * wrapped[0, 0])).all()  # black became grey
    assert picture[1, 2].tolist() == [
        round(0.7 * wrapped[1, 2]),
        round(0.7 * wrapped[1, 2]),
        round(0.7 * wrapped[1, 2] + 0.3 * 255),
    ]
    assert vs.wrapped_fraction(image) == pytest.approx(4 / 6)


def test_wrapped_fraction_counts_below_the_mean_and_beyond_one_deviation():
    z = np.array([-2.0, -0.5, -0.001, 0.0, 0.3, 0.99, 1.01, 1.5])
    z = np.concatenate([z, -z])
    z /= z.std()
    want = np.mean((255 * z <= -1) | (255 * z >= 256))
    assert vs.wrapped_fraction(100 + 7 * z) == pytest.approx(want)
    assert vs.wrapped_fraction(np.ones((3, 3))) == 0


# -------------------------------------------------------------------------- figures
def test_five_panels_name_case_slice_dice_and_classes():
    image, label = slice_of_head()
    prediction = np.where(label == 3, 0, label)
    fig = vs.five_panels(image, label, prediction, "case_007, slice 71")
    said = [text for text, _ in texts(fig)]
    assert said.count("case_007, slice 71") == 1
    assert {"MRI", "truth", "truth on MRI", "prediction on MRI", *vs.CLASSES} < set(
        said
    )
    assert "prediction, Dice 0.67" in said  # two of three classes right, one missed
    assert len([ax for ax in fig.axes if ax.images]) == 5
    assert min(size for _, size in texts(fig)) >= 8


def test_ranked_patients_are_best_lower_median_and_worst():
    scores = {"a": 0.4, "b": 0.9, "c": np.nan, "d": 0.1, "e": 0.6}
    loaded = []

    def load(case):
        loaded.append(case)
        return patient(case)[1:]

    fig = vs.ranked_patients(scores, load)
    assert loaded == ["b", "a", "d"]
    said = [text for text, _ in texts(fig)]
    assert {"best", "median", "worst", "b, slice 3", "a, slice 3"} <= set(said)
    assert "prediction, Dice 0.10" in said
    assert [ax.get_ylabel() for ax in fig.axes[::3]] == ["best", "median", "worst"]
    shown = fig.axes[0].images[0].get_array()
    assert np.allclose(shown, vs.window(slice_of_head(5)[0]))
    with pytest.raises(MedtutError, match="2 of 3"):
        vs.ranked_patients({"a": 0.1, "b": 0.2, "c": np.nan}, load)


def test_slices_are_turned_and_named():
    image, label = slice_of_head(5)
    slices = vs.slices_of(*patient("p", 5))
    assert [(s.case, s.z) for s in slices] == [("p", z) for z in (1, 2, 3, 4)]
    assert np.array_equal(slices[2].image, image)
    assert np.array_equal(slices[2].truth, label)
    with pytest.raises(MedtutError, match="p: needs three"):
        vs.slices_of("p", np.ones((2, 2, 2)), np.ones((2, 2, 3)), np.ones((2, 2, 3)))


# ----------------------------------------------------------------------------- GIFs
def frames_of(path):
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
        return picture.n_frames


def test_patient_gif_shows_one_patient_in_order(tmp_path):
    slices = vs.slices_of(*patient("case 7"))
    alt = vs.patient_gif(tmp_path / "one.gif", slices[::-1])
    assert frames_of(tmp_path / "one.gif") == 4
    assert "4 axial slices of patient case 7" in alt
    assert [p.name for p in tmp_path.iterdir()] == ["one.gif"]
    again = tmp_path / "again.gif"
    vs.patient_gif(again, slices)
    assert again.read_bytes() == (tmp_path / "one.gif").read_bytes()
    vs.patient_gif(tmp_path / "lowest.gif", slices[:1])
    pictures = [
        Image.open(path).convert("RGB") for path in (again, tmp_path / "lowest.gif")
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()  # z grows from frame to frame


def test_patient_gif_refuses_several_patients_and_leaves_nothing(tmp_path):
    mixed = vs.slices_of(*patient("one")) + vs.slices_of(*patient("two"))
    with pytest.raises(MedtutError, match="show one patient, and got one, two"):
        vs.patient_gif(tmp_path / "mixed.gif", mixed)
    with pytest.raises(MedtutError, match="got no slices"):
        vs.patient_gif(tmp_path / "none.gif", [])
    with pytest.raises(MedtutError, match="no slices"):
        vs.random_samples_gif(tmp_path / "none.gif", [], seed=0)
    assert list(tmp_path.iterdir()) == []


def test_random_samples_follow_the_seed(tmp_path):
    slices = [s for k in range(9) for s in vs.slices_of(*patient(f"p{k}"))]
    alt = vs.random_samples_gif(tmp_path / "a.gif", slices, seed=1)
    vs.random_samples_gif(tmp_path / "b.gif", slices, seed=1)
    vs.random_samples_gif(tmp_path / "c.gif", slices, seed=2)
    a, b, c = ((tmp_path / f"{name}.gif").read_bytes() for name in "abc")
    assert a == b != c
    assert frames_of(tmp_path / "a.gif") <= 20
    assert "slices of 8 patients" in alt or "slices of 9 patients" in alt


def test_gif_of_noise_stays_small_and_keeps_its_colours(tmp_path):
    rng = np.random.default_rng(0)
    label = np.zeros((240, 240), int)
    label[80:160, 80:160] = 2
    noise = [vs.Sample("n", z, rng.random((240, 240)), label, label) for z in range(30)]
    alt = vs.patient_gif(tmp_path / "n.gif", noise)
    assert (tmp_path / "n.gif").stat().st_size < 100_000
    frames = frames_of(tmp_path / "n.gif")
    assert f"{frames} axial slices" in alt
    with Image.open(tmp_path / "n.gif") as picture:
        first = np.asarray(picture.convert("RGB")).astype(int)
    inside, outside = first[110:140, 75:105], first[40:60, 10:40]
    assert (inside[..., 2] - inside[..., 0]).mean() > 40  # oedema is blue
    assert abs(outside[..., 2] - outside[..., 0]).max() <= 1  # the rest is grey


# --------------------------------------------------------------------------- curves
ROWS = [
    {"event": "step", "step": 1, "loss": 1.5, "lr": 0.1, "seconds": 0.1},
    {"event": "step", "step": 2, "loss": None, "lr": 0.1, "seconds": 0.2},
    {"event": "eval", "step": 2, "score": 0.3, "loss": 1.2, "seconds": 0.3},
    {"event": "step", "step": 3, "loss": 1.0, "lr": 0.1, "seconds": 0.4},
    {"event": "eval", "step": 3, "score": 0.7, "loss": 0.9, "seconds": 0.5},
    {"event": "step", "step": 4, "loss": 0.8, "lr": 0.1, "seconds": 0.6},
    {"event": "eval", "step": 4, "score": None, "loss": 0.8, "seconds": 0.7},
]


def test_curves_mark_the_best_validation_and_read_a_cut_off_log(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    path.write_text(lines + '{"event": "st', encoding="utf-8")
    for log in (path, str(path), ROWS):
        fig = vs.curves(log)
        left, right = fig.axes
        assert right.get_title() == "best 0.700 at step 3"
        assert right.get_ylabel() == "validation score"
        names = [text.get_text() for text in left.get_legend().get_texts()]
        assert names == ["one step", "mean of 1 step(s)", "validation"]
        assert left.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
        assert left.lines[2].get_ydata().tolist() == [1.2, 0.9, 0.8]
        assert min(size for _, size in texts(fig)) >= 8


def test_curves_read_what_fit_writes(tmp_path):
    import torch

    from medtut.train import TrainConfig, fit

    model = torch.nn.Linear(2, 1)
    config = TrainConfig(steps=4, batch_size=2, eval_every=2, device="cpu")
    fit(
        model,
        lambda m, batch: m(batch).square().mean(),
        [torch.ones(2)] * 4,
        config,
        validate=lambda m: {"score": 0.5, "loss": 1.0},
        out=tmp_path,
        progress=False,
    )
    fig = vs.curves(tmp_path / "log.jsonl")
    assert fig.axes[1].get_title() == "best 0.500 at step 2"


def test_curves_without_validation_have_one_panel():
    assert len(vs.curves([row for row in ROWS if row["event"] == "step"]).axes) == 1


def test_curves_say_what_is_missing(tmp_path):
    path = tmp_path / "log.jsonl"
    with pytest.raises(MedtutError, match=r"log\.jsonl is missing"):
        vs.curves(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(MedtutError, match="no training step"):
        vs.curves(path)
    with pytest.raises(MedtutError, match="'dice' among event, step, score"):
        vs.curves(ROWS, score="dice")
