"""Heads cropped, shown as other scanners would, and lesions drawn into them."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from medtut.data import mri_augment
from medtut.data.mri_augment import LESIONS, draw_lesion, mimic_scanner, prepare
from medtut.errors import MedtutError

SEEDS = range(12)


def ellipse(height, width, row, column, tall, wide):
    y, x = np.ogrid[:height, :width]
    return ((y - row) / tall) ** 2 + ((x - column) / wide) ** 2 < 1


@pytest.fixture
def head():
    """An even head, its upper part wide, its lower part narrow; float (128, 128)."""
    shape = ellipse(128, 128, 52, 64, 36, 46) | ellipse(128, 128, 84, 64, 32, 18)
    y, x = np.ogrid[:128, :128]
    return (shape * (0.5 + 0.1 * np.sin(x / 5) * np.cos(y / 7))).astype(np.float32)


# --- prepare ---------------------------------------------------------------------


@pytest.mark.parametrize("margins", [(0, 0, 0, 0), (40, 40, 40, 40), (5, 90, 60, 10)])
@pytest.mark.parametrize("scale", [1, 3])
def test_prepare_finds_the_head_whatever_the_margins(margins, scale):
    head = np.uint8(200 * ellipse(120, 100, 59.5, 49.5, 60, 50))
    top, bottom, left, right = margins
    picture = np.pad(head, ((top, bottom), (left, right)), constant_values=4)
    found = prepare(np.kron(picture, np.ones((scale, scale), np.uint8)), 64)
    assert (found.shape, found.dtype) == ((64, 64), np.uint8)
    inside = found > 128
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    # The head's longer side fills the picture; the shorter one is padded evenly.
    assert rows[0] <= 3
    assert rows[-1] >= 60
    assert 64 * 100 / 120 - 5 <= len(columns) <= 64 * 100 / 120 + 3
    assert abs(columns[0] - (63 - columns[-1])) <= 3


def test_prepare_drops_what_lies_beside_the_head():
    picture = np.uint8(180 * ellipse(200, 200, 100, 80, 60, 50))
    want = prepare(picture, 64)
    picture[5:12, 180:195] = 255  # a label in the corner
    assert np.abs(prepare(picture, 64).astype(int) - want).mean() < 12


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (200, 150)])
def test_prepare_of_a_black_picture_is_black(shape):
    found = prepare(np.zeros(shape, np.uint8), 48)
    assert (found.shape, found.max()) == ((48, 48), 0)


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (3, 700), (9, 9)])
def test_prepare_of_strips_and_tiny_pictures(shape):
    picture = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    found = prepare(picture, 32)
    assert (found.shape, found.dtype) == ((32, 32), np.uint8)
    assert found.max() > 0


def test_prepare_keeps_proportions_and_spreads_the_tones():
    found = prepare(np.uint8(40 + 20 * ellipse(60, 240, 30, 120, 30, 120)), 64)
    rows = np.flatnonzero((found > 128).any(1))
    assert 14 <= len(rows) <= 18, "a quarter as high as wide"
    assert found.max() == 255


# --- other scanners --------------------------------------------------------------


def test_mimicry_is_repeated_by_its_seed(head):
    before = head.copy()
    looks = [mimic_scanner(head, seed) for seed in SEEDS]
    assert np.array_equal(head, before)
    for seed, look in zip(SEEDS, looks, strict=True):
        assert np.array_equal(mimic_scanner(head, seed), look), seed
        assert (look.shape, look.dtype) == (head.shape, np.float32)
        assert look.min() >= 0
        assert 0.9 < look.max() <= 1
        assert np.abs(look - head).mean() > 0.01
    gaps = [np.abs(a - b).mean() for a, b in pairwise(looks)]
    assert min(gaps) > 0.01


def test_a_black_picture_stays_near_black():
    assert mimic_scanner(np.zeros((64, 64), np.float32), 3).mean() < 0.3


@pytest.mark.parametrize("side", [32, 128])
def test_labels_are_safe(head, side):
    """The head stays in the picture, and its narrow end stays below."""
    small = ndimage.zoom(head, side / 128, order=1)
    # Only the geometry: the tones may end up anywhere.
    geometry, _ = mri_augment._shape_and_noise(side)
    kept, mirrored = [], 0
    asymmetric = small.copy()
    asymmetric[:, : side // 2] *= 0.5  # darker on the left
    for seed in range(60):
        geometry.set_random_state(seed)
        look = np.asarray(geometry(asymmetric[None]))[0] > 0.1
        kept.append(look.sum() / (small > 0.1).sum())
        rows = np.flatnonzero(look.any(1))
        wide = look.sum(1)
        middle = (rows[0] + rows[-1]) // 2
        assert wide[rows[0] : middle].max() > wide[middle : rows[-1]].min() * 1.2
        above, below = wide[rows[0] : middle].sum(), wide[middle : rows[-1]].sum()
        assert above > 1.1 * below, f"upside down with seed {seed}"
        geometry.set_random_state(seed)
        tone = np.asarray(geometry(asymmetric[None]))[0]
        columns = np.flatnonzero(look.any(0))
        centre = (columns[0] + columns[-1]) // 2
        mirrored += tone[:, :centre].sum() > tone[:, centre:].sum()
    assert min(kept) > 0.55, "scaled by 0.8 to 1.2 each way"
    assert max(kept) < 1.7
    assert 15 < mirrored < 45


def test_tones_are_sometimes_turned_over(head):
    """Against the same head, moved alike, in its own tones."""
    same = []
    geometry, _ = mri_augment._shape_and_noise(128)
    for seed in range(60):
        geometry.set_random_state(seed)
        moved = ndimage.gaussian_filter(np.asarray(geometry(head[None]))[0], 1)
        inside = ndimage.binary_erosion(moved > 0.2, iterations=4)
        look = ndimage.gaussian_filter(mimic_scanner(head, seed), 1)
        same.append(np.corrcoef(look[inside], moved[inside])[0, 1])
    kind = np.array([np.random.default_rng(seed).random() for seed in range(60)])
    same = np.array(same)
    turned = (kind >= 0.35) & (kind < 0.6)
    assert (same[turned] < -0.3).all()
    assert (same[(kind < 0.35) | (kind >= 0.85)] > 0.3).all()


# --- drawn lesions ---------------------------------------------------------------


@pytest.fixture
def drawn(head):
    found = {k: [draw_lesion(head, k, seed) for seed in SEEDS] for k in LESIONS}
    return {k: (v, [np.abs(x - head) > 0.05 for x in v]) for k, v in found.items()}


@pytest.mark.parametrize("kind", LESIONS)
def test_a_lesion_changes_a_part_of_the_head(head, drawn, kind):
    looks, changed = drawn[kind]
    inside = head > 0
    for seed, look, where in zip(SEEDS, looks, changed, strict=True):
        assert np.array_equal(draw_lesion(head, kind, seed), look)
        assert (look.shape, look.dtype) == (head.shape, np.float32)
        assert look.min() >= 0
        assert look.max() <= 1
        assert 0.005 < where.sum() / inside.sum() < 0.6
        assert np.abs(look - head)[~inside].max() < 0.02, "outside of the head"
    assert not np.array_equal(looks[0], looks[1])


def test_gliomas_lie_deep_and_meningiomas_at_the_edge(head, drawn):
    depth = ndimage.distance_transform_edt(head > 0)
    mean = {
        k: np.array([depth[where].mean() for where in changed])
        for k, (_, changed) in drawn.items()
    }
    assert mean["glioma"].mean() > 1.25 * mean["meningioma"].mean()


@pytest.mark.parametrize("kind", LESIONS)
def test_nothing_is_drawn_where_there_is_no_head(kind):
    empty = np.zeros((64, 64), np.float32)
    empty[30:34, 30:34] = 0.8  # too small for a head
    found = draw_lesion(empty, kind, 0)
    assert np.array_equal(found, empty)
    assert found is not empty


@pytest.mark.parametrize("kind", ["pituitary", "Glioma", ""])
def test_another_kind_is_refused(head, kind):
    with pytest.raises(MedtutError, match=f"kind='{kind}'.*glioma or meningioma"):
        draw_lesion(head, kind, 0)
