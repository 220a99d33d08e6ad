"""Prompts of SAM: images and boxes in, masks of the original size out.

Two frames are at work. An image as it is shown has (H, W) pixels; a box on it is
(x0, y0, x1, y1), x along columns, y along rows, both ends the numbers of pixels inside.
The model sees the image with its longest side stretched to ``side`` and zeros below or
to the right of it (Kirillov et al., arXiv:2304.02643, appendix A). `prepare` and
`scale_boxes` go into that frame, `restore` comes back.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.errors import MedtutError

# Of ImageNet's RGB values, 0..255, as segment-anything has them.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
Size = tuple[int, int]
Array = np.ndarray | Tensor


def resized(size: Size, side: int) -> Size:
    """(H, W) after the longest side became ``side``: (138, 202) -> (700, 1024)."""
    from segment_anything.utils.transforms import ResizeLongestSide

    return ResizeLongestSide.get_preprocess_shape(*size, side)


def padded(size: Size, side: int, multiple: int | None = None) -> Size:
    """(H, W) of the model input for an image of ``size``; see `prepare`."""
    if multiple is None:
        return side, side
    return tuple(-(-n // multiple) * multiple for n in resized(size, side))


def prepare(
    image: Array, side: int, norm: str = "minmax", multiple: int | None = None
) -> Tensor:
    """One image as the model takes it.

    Parameters
    ----------
    image : array, (H, W) or (H, W, 3)
        Grey is repeated to three channels.
    side : int
        ``sam.image_encoder.img_size``.
    norm : {"minmax", "sam"}
        "minmax": the resized image's own range to [0, 1], as LiteMedSAM was trained
        (a constant image gives zeros). "sam": minus mean, over standard deviation of
        ImageNet; takes whole numbers from 0 to 255 or fractions from 0 to 1. Padding
        is zero after either.
    multiple : int, optional
        Pad each side only up to the next multiple of this, not to a square: an encoder
        without a table of positions (LiteMedSAM, 4 pixels a token) then spends nothing
        on padding. Everything keeps its place in the corner of the full input.

    Returns
    -------
    Tensor, (3, side, side), float32; the last two `padded` with ``multiple``

    Raises
    ------
    MedtutError
        For another shape (a volume, for example), NaN, or values out of range.
    """
    array = np.array(image)
    if array.ndim not in (2, 3) or not array.size or array.shape[2:] not in ((), (3,)):
        raise MedtutError(
            f"prepare: {array.shape} is no shape of an image, (H, W) or (H, W, 3). "
            "Of a volume take one slice, such as volume[:, :, z]."
        )
    x = torch.from_numpy(array.astype(np.float32, order="C"))
    low, high, top = x.min(), x.max(), 1 if array.dtype.kind == "f" else 255
    fits = {"sam": 0 <= low <= high <= top, "minmax": high - low < np.inf}
    if not fits.get(norm):
        raise MedtutError(
            f"prepare: norm={norm!r} for values from {low:g} to {high:g}. 'sam' takes "
            "integers from 0 to 255 or floats from 0 to 1, 'minmax' any finite numbers."
        )
    size = resized(array.shape[:2], side)
    x = x.reshape(1, *array.shape[:2], -1).permute(0, 3, 1, 2)
    x = F.interpolate(x, size, mode="bilinear", antialias=True)[0].expand(3, -1, -1)
    if norm == "sam":
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        x = (x * (255 / top) - mean) / std
    else:
        x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-8)
    high, wide = padded(array.shape[:2], side, multiple)
    return F.pad(x, (0, wide - size[1], 0, high - size[0]))


def check_boxes(boxes: Array, size: Size) -> np.ndarray:
    """Boxes (..., 4) as float32, clipped to an image of (H, W).

    Raises
    ------
    MedtutError
        If the last axis is not 4 long, a number is not finite, a box is inverted or
        nothing of it lies in the image; says which box.
    """
    array = np.asarray(boxes.detach().cpu() if torch.is_tensor(boxes) else boxes)
    if array.shape[-1:] != (4,):
        raise MedtutError(f"boxes are (..., 4): x0, y0, x1, y1; not {array.shape}.")
    last = np.array([size[1] - 1, size[0] - 1])
    first, second = array[..., :2], array[..., 2:]
    good = ((first <= second) & (first <= last) & (second >= 0)).all(-1)
    if not good.all():
        raise MedtutError(
            f"box {array[~good][0].tolist()} is inverted or outside the image of "
            f"{size[1]} columns, {size[0]} rows; x0 <= x1 are columns, y0 <= y1 rows."
        )
    return np.clip(array, 0, [*last, *last]).astype(np.float32)


def scale_boxes(boxes: Array, size: Size, side: int) -> Tensor:
    """Boxes (..., 4) on an image of (H, W), as pixels of the padded model input.

    Parts outside are cut off; see `check_boxes` for what is refused. Each axis has its
    own scale, since the resized sides are whole numbers: for 138 x 202 at 1024 it is
    5.0693 along x and 5.0725 along y.
    """
    new = resized(size, side)
    scale = torch.tensor([new[1] / size[1], new[0] / size[0]] * 2)
    return torch.as_tensor(check_boxes(boxes, size)) * scale


def restore(
    logits: Tensor, size: Size, side: int, multiple: int | None = None
) -> Tensor:
    """Low-resolution logits (..., h, w) -> (..., H, W), differentiable.

    Stretched to the model input, the padding cut away, and resized to the image, as
    segment-anything does.
    """
    high, wide = resized(size, side)
    x = logits.reshape(-1, 1, *logits.shape[-2:])
    whole = padded(size, side, multiple)
    x = F.interpolate(x, whole, mode="bilinear", align_corners=False)
    x = F.interpolate(x[..., :high, :wide], size, mode="bilinear", align_corners=False)
    return x.reshape(*logits.shape[:-2], *size)


def box_of(mask: Array) -> np.ndarray:
    """Tight box of a mask (H, W): its first and last column and row, no margin.

    Returns
    -------
    array, (4,), float32
        x0, y0, x1, y1, the prompt that the published system trains *and* tests with.

    Raises
    ------
    MedtutError
        If the mask is empty or not an image.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or not mask.any():
        raise MedtutError(
            f"box_of: the mask {mask.shape} is empty, or not one slice (H, W). Count "
            "an empty slice as such, or prompt with the box of a neighbouring slice."
        )
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()], np.float32)


def jitter(boxes: Array, sigma: float, rng: Generator, size: Size) -> np.ndarray:
    """Boxes (..., 4) as a hand might draw them: each edge moved on its own.

    Parameters
    ----------
    boxes : array, (..., 4)
        On an image of ``size``.
    sigma : float
        Standard deviation of a move, as a fraction of the box's side along it, which
        counts as at least one pixel.
    rng : numpy.random.Generator
    size : (H, W)

    Returns
    -------
    array, (..., 4), float32
        Clipped to the image; edges that crossed are swapped.
    """
    if not 0 <= sigma < np.inf:
        raise MedtutError(f"jitter: sigma is {sigma!r}; give 0 or more, such as 0.05.")
    pairs = check_boxes(boxes, size).reshape(*np.shape(boxes)[:-1], 2, 2)
    sides = np.maximum(np.diff(pairs, axis=-2), 1)
    moved = pairs + sigma * sides * rng.standard_normal(pairs.shape)
    moved = np.sort(np.clip(moved, 0, [size[1] - 1, size[0] - 1]), axis=-2)
    return moved.reshape(np.shape(boxes)).astype(np.float32)


def decode(
    sam: nn.Module,
    embeddings: Tensor,
    boxes: Tensor | None = None,
    points: Tensor | None = None,
    point_labels: Tensor | None = None,
    masks: Tensor | None = None,
    multimask: bool = False,
) -> tuple[Tensor, Tensor]:
    """Masks for M prompts on each of N images, in one call.

    Prompts of several kinds are given together; with none, M is 1.

    Parameters
    ----------
    sam : Sam or LiteMedSAM
    embeddings : Tensor, (N, 256, h, w)
        Or fewer rows and columns: the corner of an input whose rest is padding.
    boxes : Tensor, (N, M, 4), optional
        Pixels of the padded model input, from `scale_boxes`.
    points : Tensor, (N, M, P, 2), optional
        (x, y) in the same pixels.
    point_labels : Tensor, (N, M, P)
        1 on the object, 0 on the background, -1 no point.
    masks : Tensor, (N, M, 1, 4h, 4w), optional
        Logits of an earlier answer.
    multimask : bool
        Three masks a prompt (K = 3) in place of one.

    Returns
    -------
    logits : Tensor, (N, M, K, 4h, 4w)
        0 is the threshold; `restore` brings them to the image's size.
    iou : Tensor, (N, M, K)
        The model's own guess of their quality.

    Raises
    ------
    MedtutError
        For shapes that do not belong together and boxes that cannot be.

    Notes
    -----
    segment-anything's decoder repeats its images once per prompt, which is right for
    one image and gives N * N * M masks for N (segment-anything, issue 277). Its first
    act is to add image and mask embedding; so the images go in with the latter, one
    per prompt, and it is shown one image of zeros.
    """
    known = () if point_labels is None else point_labels.unique().tolist()
    if (points is None) != (point_labels is None) or not {-1, 0, 1}.issuperset(known):
        raise MedtutError("decode: points need labels: 1 on, 0 off, -1 no point.")
    encoder, side = sam.prompt_encoder, sam.image_encoder.img_size
    n, (h, w) = len(embeddings), encoder.image_embedding_size
    if embeddings.dim() == 4:
        h, w = min(h, embeddings.shape[2]), min(w, embeddings.shape[3])
    given = [x for x in (boxes, points, masks) if x is not None]
    m = given[0].shape[1] if given and given[0].dim() > 1 else 1
    p = points.shape[2] if points is not None and points.dim() > 2 else 1
    expected = {
        "embeddings": (embeddings, (n, encoder.embed_dim, h, w)),
        "boxes": (boxes, (n, m, 4)),
        "points": (points, (n, m, p, 2)),
        "point_labels": (point_labels, (n, m, p)),
        "masks": (masks, (n, m, 1, 4 * h, 4 * w)),
    }
    for what, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise MedtutError(
                f"decode: {what} have shape {tuple(x.shape)}, not {shape}"
            )
    if boxes is not None:
        check_boxes(boxes, (side, side))
    flat = [None if x is None else x.flatten(0, 1) for x in (boxes, points, masks)]
    pair = None if points is None else (flat[1], point_labels.flatten(0, 1))
    sparse, dense = encoder(pair, flat[0], flat[2])
    images = embeddings.repeat_interleave(m, 0)
    blank, places = torch.zeros_like(images[:1]), encoder.get_dense_pe()[..., :h, :w]
    sparse, dense = sparse.expand(n * m, -1, -1), images + dense[..., :h, :w]
    logits, iou = sam.mask_decoder(blank, places, sparse, dense, multimask)
    return logits.unflatten(0, (n, m)), iou.unflatten(0, (n, m))
