"""Prompts: N images with M prompts each, boxes, and the two frames."""

import numpy as np
import pytest
import torch

from medtut.errors import MedtutError
from medtut.models.sam import build_sam
from medtut.models.sam_prompts import (
    MEAN,
    STD,
    box_of,
    decode,
    jitter,
    padded,
    prepare,
    resized,
    restore,
    scale_boxes,
)

SIDE, N, M = 64, 3, 2


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    model = build_sam("tiny", SIDE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def prompts():
    """Everything at once; no two images and no two prompts are alike."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    first = rand(N, M, 2) * 30
    return {
        "embeddings": rand(N, 256, 4, 4) - 0.5,
        "boxes": torch.cat([first, first + rand(N, M, 2) * 30], -1),
        "points": rand(N, M, 3, 2) * SIDE,
        "point_labels": torch.tensor([[[1, 0, -1], [1, 1, 0]]] * N),
        "masks": rand(N, M, 1, 16, 16) * 8 - 4,
    }


KINDS = [
    (),
    ("boxes",),
    ("points", "point_labels"),
    ("masks",),
    ("boxes", "points", "point_labels"),
    ("boxes", "points", "point_labels", "masks"),
]


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_one_call_equals_the_loop(sam, prompts, kinds, multimask):
    given = {k: prompts[k] for k in kinds}
    logits, iou = decode(sam, prompts["embeddings"], **given, multimask=multimask)
    m, k = (M if kinds else 1), (3 if multimask else 1)
    assert logits.shape == (N, m, k, 16, 16)
    assert iou.shape == (N, m, k)
    for i in range(N):
        mine = {k: v[i] for k, v in given.items()}
        pair = (mine["points"], mine["point_labels"]) if "points" in mine else None
        sparse, dense = sam.prompt_encoder(pair, mine.get("boxes"), mine.get("masks"))
        want, quality = sam.mask_decoder(
            prompts["embeddings"][i : i + 1],
            sam.prompt_encoder.get_dense_pe(),
            sparse,
            dense,
            multimask,
        )
        torch.testing.assert_close(logits[i], want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(iou[i], quality, rtol=1e-5, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3  # the images do matter
    if kinds:
        assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3  # and the prompts


def test_gradients_reach_each_image_on_its_own(sam, prompts):
    embeddings = prompts["embeddings"].clone().requires_grad_()
    logits, _ = decode(sam, embeddings, prompts["boxes"])
    (grad,) = torch.autograd.grad(logits[1].sum(), embeddings)
    assert grad[1].abs().max() > 0
    assert grad[[0, 2]].abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(N, 4)}, "boxes have shape"),
        ({"boxes": torch.zeros(N, M, 5)}, "boxes have shape"),
        ({"boxes": torch.zeros(N + 1, M, 4)}, "boxes have shape"),
        ({"embeddings": torch.zeros(N, 256, 8, 8)}, r"embeddings have .*256, 4, 4"),
        ({"embeddings": torch.zeros(256, 4, 4)}, "embeddings have shape"),
        ({"points": torch.zeros(N, M + 1, 3, 2)}, "points have shape"),
        ({"points": torch.zeros(N, M, 2)}, "points have shape"),
        ({"point_labels": torch.ones(N, M, 2)}, "point_labels have shape"),
        ({"point_labels": torch.full((N, M, 3), 2)}, "1 on, 0 off"),
        ({"point_labels": None}, "1 on, 0 off"),
        ({"points": None}, "1 on, 0 off"),
        ({"masks": torch.zeros(N, M, 1, 64, 64)}, r"masks have .*16, 16"),
        ({"boxes": torch.tensor([9.0, 9, 5, 12]).expand(N, M, 4)}, "inverted"),
        ({"boxes": torch.tensor([70.0, 9, 80, 12]).expand(N, M, 4)}, "outside"),
    ],
)
def test_shapes_that_do_not_belong_together(sam, prompts, change, message):
    with pytest.raises(MedtutError, match=message):
        decode(sam, **(prompts | change))


# -- boxes ---------------------------------------------------------------------
def test_box_of_a_mask():
    mask = np.zeros((20, 30), bool)
    mask[4:9, 11:26] = True
    mask[2, 13] = True
    assert box_of(mask).tolist() == [11, 2, 25, 8]
    assert box_of(torch.tensor(mask).long() * 3).tolist() == [11, 2, 25, 8]
    assert box_of(np.eye(1)).tolist() == [0, 0, 0, 0]
    assert box_of(mask).dtype == np.float32


@pytest.mark.parametrize("shape", [(20, 30), (2, 20, 30), (20,)])
def test_no_box(shape):
    mask = np.zeros(shape) if len(shape) == 2 else np.ones(shape)
    with pytest.raises(MedtutError, match="is empty, or not one slice"):
        box_of(mask)


def test_the_real_crop_at_1024():
    assert resized((138, 202), 1024) == (700, 1024)
    boxes = scale_boxes(
        np.array([[10.0, 20, 100, 60], [0, 0, 201, 137]]), (138, 202), 1024
    )
    assert boxes.dtype == torch.float32
    assert boxes[0, 0] / 10 == pytest.approx(5.0693, abs=5e-5)
    assert boxes[0, 1] / 20 == pytest.approx(700 / 138)
    want = torch.tensor([10, 20, 100, 60]) * torch.tensor([1024 / 202, 700 / 138] * 2)
    torch.testing.assert_close(boxes[0], want)
    assert boxes.max() < 1024


def test_scaled_as_segment_anything_does():
    from segment_anything.utils.transforms import ResizeLongestSide

    boxes, size = np.array([[[3.0, 5, 60, 41]]]), (50, 77)
    ours = scale_boxes(boxes, size, 256)
    theirs = ResizeLongestSide(256).apply_boxes(boxes[0], size)
    torch.testing.assert_close(ours[0], torch.tensor(theirs, dtype=torch.float32))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([30, 5, 40, 9], r"\[30.*outside the image of 30 columns, 20 rows"),
        ([5, 20, 9, 25], "outside"),
        ([-9, 5, -1, 9], "outside"),
        ([9, 5, 4, 9], "inverted"),
        ([4, 9, 9, 5], "inverted"),
        ([4, float("nan"), 9, 5], "inverted or outside"),
        ([4, 5, 9], r"\(\.\.\., 4\)"),
    ],
)
def test_boxes_that_cannot_be(box, message):
    good = [[1, 1, 5, 5]] if len(box) == 4 else []
    with pytest.raises(MedtutError, match=message):
        scale_boxes(np.array([*good, box]), (20, 30), 64)
    with pytest.raises(MedtutError, match=message):
        jitter(np.array([*good, box]), 0.1, np.random.default_rng(0), (20, 30))


def test_a_box_that_sticks_out_is_cut():
    scaled = scale_boxes(torch.tensor([-5.0, 4, 99, 99]), (20, 30), 30)
    assert scaled.tolist() == [0, 4, 29, 19]


def test_jitter_moves_each_edge_by_its_side():
    size, box = (1000, 1000), np.array([400.0, 300, 500, 700])
    boxes = np.tile(box, (4000, 1))
    moved = jitter(boxes, 0.05, np.random.default_rng(0), size)
    assert moved.shape == boxes.shape
    assert moved.dtype == np.float32
    shift = moved - boxes
    np.testing.assert_allclose(shift.mean(0), 0, atol=1)
    np.testing.assert_allclose(shift.std(0), [5, 20, 5, 20], rtol=0.05)
    apart = np.corrcoef(shift.T) - np.eye(4)
    assert np.abs(apart).max() < 0.08  # no two edges move together
    again = jitter(boxes, 0.05, np.random.default_rng(0), size)
    assert np.array_equal(moved, again)
    assert not np.array_equal(
        moved, jitter(boxes, 0.05, np.random.default_rng(1), size)
    )
    still = jitter(torch.tensor(box), 0, np.random.default_rng(0), size)
    assert still.tolist() == box.tolist()


def test_jitter_stays_in_the_image_and_upright():
    rng = np.random.default_rng(0)
    boxes = np.tile([0.0, 10, 3, 19], (500, 1))
    moved = jitter(boxes, 2.0, rng, (20, 30))
    assert moved.min() == 0
    assert moved[:, [0, 2]].max() <= 29
    assert moved[:, [1, 3]].max() == 19
    assert (moved[:, :2] <= moved[:, 2:]).all()
    point = jitter(np.full((200, 4), 7.0), 0.5, rng, (20, 30))
    assert point.std() == pytest.approx(0.5, rel=0.2)  # at least a pixel counts
    for sigma in (-0.1, float("nan"), float("inf")):
        with pytest.raises(MedtutError, match="sigma"):
            jitter(boxes, sigma, rng, (20, 30))


# -- images --------------------------------------------------------------------
@pytest.mark.parametrize(("size", "side"), [((138, 202), 1024), ((90, 60), 64)])
def test_prepared_as_segment_anything_does(sam, size, side):
    from segment_anything.utils.transforms import ResizeLongestSide

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3))
    image = np.kron(coarse, np.ones((8, 8, 1)))[: size[0], : size[1]].astype(np.uint8)
    ours = prepare(image, side, "sam")
    assert ours.shape == (3, side, side)
    assert ours.dtype == torch.float32
    theirs = ResizeLongestSide(side).apply_image(image)  # rounds to whole numbers
    high, wide = theirs.shape[:2]
    want = (torch.tensor(theirs).permute(2, 0, 1) - sam.pixel_mean) / sam.pixel_std
    gap = (ours[:, :high, :wide] - want).abs() * sam.pixel_std
    assert gap.max() <= 1.01
    assert (high, wide) == ((700, 1024) if side == 1024 else (64, 43))
    assert ours[:, high:].abs().sum() == 0
    assert ours[:, :, wide:].abs().sum() == 0
    torch.testing.assert_close(ours, prepare(image / 255, side, "sam"))
    for ours_, theirs_ in ((MEAN, sam.pixel_mean), (STD, sam.pixel_std)):
        torch.testing.assert_close(torch.tensor(ours_), theirs_.flatten())


def test_minmax_uses_the_range_of_the_image_not_of_the_padding():
    image = np.linspace(300, 700, 40 * 20).reshape(40, 20)
    x = prepare(image, 64)
    assert x.shape == (3, 64, 64)
    assert x[0, :, 32:].abs().sum() == 0
    assert x[:, :, :32].max() == 1
    assert x[:, :, :32].min() == 0
    assert x[0, 32, 16] == pytest.approx(0.5, abs=0.02)  # 0.7 if zeros had counted
    assert torch.equal(x[0], x[1])
    torch.testing.assert_close(x, prepare(image.astype(np.float32) * 3 - 9, 64))
    torch.testing.assert_close(x, prepare(np.stack([image] * 3, -1), 64))
    assert prepare(np.full((5, 5), 7), 64).abs().sum() == 0  # constant, not NaN
    assert prepare(image > 500, 64).max() == 1


def test_colours_stay_apart_and_order_does_not_matter():
    image = np.zeros((8, 8, 3))
    image[..., 2] = 1
    assert prepare(image, 16)[:, 3, 3].tolist() == [0, 0, 1]
    volume = np.random.default_rng(0).random((6, 9, 4)).astype(">f4")
    turned = np.rot90(volume[:, :, 2])
    x = prepare(turned, 18)
    assert x.shape == (3, 18, 18)
    assert x[0, :18, :12].max() == 1
    torch.testing.assert_close(x, prepare(turned.astype("<f4").copy(), 18))
    assert torch.equal(x, prepare(torch.tensor(turned.astype("<f4").copy()), 18))


@pytest.mark.parametrize("shape", [(9,), (4, 9, 9, 3), (9, 9, 4), (3, 9, 9), (0, 9)])
def test_what_is_no_image(shape):
    with pytest.raises(MedtutError, match="Of a volume take one slice"):
        prepare(np.zeros(shape), 64)


@pytest.mark.parametrize(
    ("image", "norm"),
    [
        (np.full((4, 4), np.nan), "minmax"),
        (np.full((4, 4), np.inf), "minmax"),
        (np.full((4, 4), np.nan), "sam"),
        (np.full((4, 4), 200.0), "sam"),
        (np.full((4, 4), -1), "sam"),
        (np.full((4, 4), 256), "sam"),
        (np.ones((4, 4)), "zscore"),
    ],
)
def test_values_that_do_not_fit(image, norm):
    with pytest.raises(MedtutError, match="'sam' takes"):
        prepare(image, 64, norm)


def test_restored_as_segment_anything_does(sam):
    logits = torch.randn(2, 3, 1, 16, 16, requires_grad=True)
    out = restore(logits, (40, 23), SIDE)
    assert out.shape == (2, 3, 1, 40, 23)
    want = sam.postprocess_masks(logits.flatten(0, 1), (64, 37), (40, 23))
    torch.testing.assert_close(out, want.unflatten(0, (2, 3)))
    out[0].sum().backward()
    assert logits.grad[0].abs().max() > 0
    assert logits.grad[1].abs().max() == 0


def test_without_the_padding_everything_keeps_its_place(sam, monkeypatch):
    """A frame cut to a multiple is the corner of the full one, in and out."""
    image = np.random.default_rng(0).random((50, 77))
    full, cut = prepare(image, 256), prepare(image, 256, multiple=4)
    assert cut.shape[1:] == padded((50, 77), 256, 4) == (168, 256)
    assert padded((50, 77), 256) == (256, 256)
    assert torch.equal(cut, full[:, :168])
    assert full[:, 168:].abs().sum() == 0
    logits = torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(0))
    corner = restore(logits[:, :168], (50, 77), 256, multiple=4)
    torch.testing.assert_close(corner, restore(logits, (50, 77), 256))

    seen = []
    forward = sam.mask_decoder.forward
    monkeypatch.setattr(
        sam.mask_decoder, "forward", lambda *a: seen.append(a) or forward(*a)
    )
    embeddings = torch.randn(2, 256, 4, 4)
    boxes = torch.tensor([[[3.0, 4, 30, 40]]] * 2)
    with torch.no_grad():
        decode(sam, embeddings, boxes)
        logits, _ = decode(sam, embeddings[..., :3, :], boxes)
    assert logits.shape == (2, 1, 1, 12, 16)
    for whole, part in zip(seen[0][:4], seen[1][:4], strict=True):
        part_of = whole[..., :3, :] if whole.dim() == 4 else whole
        assert torch.equal(part, part_of)  # the same places, the same box


def test_there_and_back():
    """A box drawn on the image comes back where it was, through both frames."""
    size, side = (50, 77), 256
    mask = np.zeros(size, np.float32)
    mask[12:31, 20:61] = 1
    x = prepare(mask, side)[:1] * 2 - 1
    back = restore(x, size, side)[0] > 0
    assert (back.numpy() == (mask > 0)).all()
    x0, y0, x1, y1 = scale_boxes(box_of(mask), size, side).round().int().tolist()
    inside = x[0, y0 : y1 + 1, x0 : x1 + 1] > 0
    assert inside.float().mean() > 0.97
