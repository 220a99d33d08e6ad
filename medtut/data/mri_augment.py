"""Pictures as another scanner would have made them, and lesions drawn into them.

A set gathered from several places lets a network read the place instead of the
disease: in the Kaggle set every glioma comes from one collection of dark T1 pictures
with contrast agent, and nearly every picture without a tumour from elsewhere. Two
things loosen that bond. Head crop, window and random tone curves take away what only
tells the scanner. And a lesion drawn into a picture *without* tumour shows the network
a tumour in every style the set has.

Grey pictures (H, W) throughout; float32 in [0, 1] unless said otherwise.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from medtut.errors import MedtutError

VERSION = 1  # part of every cache key: a change here changes the pictures
BACKGROUND = 0.06  # of the window: air and its noise lie below
LESIONS = ("glioma", "meningioma")  # kinds that can be drawn


def prepare(grey: np.ndarray, side: int) -> np.ndarray:
    """Crop to the head, pad to a square, resize.

    Margins and the size of the file differ between sources and say nothing about the
    disease, so they go.

    Parameters
    ----------
    grey : (H, W) uint8
        A picture of any size.
    side : int
        Pixels of the result.

    Returns
    -------
    (side, side) uint8
        Windowed from the 1st to the 99.5th percentile.
    """
    from PIL import Image, ImageOps
    from scipy import ndimage

    low, high = np.percentile(grey, (1, 99.5))
    image = np.clip((grey.astype(np.float32) - low) / max(high - low, 1), 0, 1)
    # On a small copy: the box need not be exact, and labelling is slow on a large one.
    step = max(1, max(grey.shape) // 128)
    head = ndimage.gaussian_filter(image[::step, ::step], 1) > 0.08
    parts, count = ndimage.label(head)
    if count:
        largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
        rows, columns = ndimage.find_objects(parts)[largest - 1]
        # A picture that is dark all over has no head to be found: keep it whole.
        if min(rows.stop - rows.start, columns.stop - columns.start) >= 16:
            box = [slice(s.start * step, s.stop * step) for s in (rows, columns)]
            image = image[tuple(box)]
    picture = Image.fromarray(np.uint8(np.rint(255 * image)))
    if max(picture.size) > side * min(picture.size):  # a strip: Pillow rounds it away
        longest = max(picture.size)
        picture = picture.resize([max(1, n * side // longest) for n in picture.size])
    return np.asarray(ImageOps.pad(picture, (side, side), Image.Resampling.BILINEAR))


@functools.cache
def _shape_and_noise(side: int) -> tuple[Any, Any]:
    """MONAI's part: geometry before the tones change, blur and noise after."""
    from monai import transforms as mt

    angle = float(np.deg2rad(20))
    geometry = mt.Compose(
        [
            mt.RandFlip(prob=0.5, spatial_axis=1),
            mt.RandAffine(
                prob=1.0,
                rotate_range=angle,
                shear_range=0.1,
                scale_range=((-0.2, 0.2), (-0.2, 0.2)),
                translate_range=side / 16,
                padding_mode="zeros",
            ),
        ]
    )
    noise = mt.Compose(
        [
            mt.RandGaussianSmooth((0.3, 1.2), (0.3, 1.2), prob=0.4),
            mt.RandGaussianNoise(prob=1.0, std=0.04),
        ]
    )
    return geometry, noise


def mimic_scanner(picture: np.ndarray, seed: int) -> np.ndarray:
    """The same head as another scanner, sequence and technician would show it.

    Mirrored, turned (20°), sheared, scaled (20 %) and moved by up to a
    sixteenth of its side; then, with probability
    0.35 a gamma curve, 0.25 the tones turned over inside the head (fluid becomes
    bright, as on T2), 0.25 a random tone curve, which need not rise, else nothing; a
    linear bias field; blur and noise. None of these changes which tumour it is: a
    mirrored head is a head, and the label does not rest on the side or on the sequence.
    (Upside down would not be safe in a set whose heads all stand upright.)

    Parameters
    ----------
    picture : (H, W) float32 in [0, 1]
    seed : int
        The same seed gives the same picture.
    """
    from scipy import ndimage

    geometry, noise = _shape_and_noise(max(picture.shape))
    rng = np.random.default_rng(seed)
    geometry.set_random_state(seed)
    noise.set_random_state(seed + 1)
    image = np.asarray(geometry(picture[None]))[0]
    head = ndimage.binary_fill_holes(image > BACKGROUND)
    kind = rng.random()
    if kind < 0.35:
        image = image ** np.exp(rng.uniform(-0.8, 0.8))
    elif kind < 0.6:
        turned = (1 - image.clip(0, 1)) ** np.exp(rng.uniform(-0.3, 0.9))
        image = np.where(head, turned * rng.uniform(0.7, 1.0), image)
    elif kind < 0.85:
        tones = rng.uniform(0, 1, 5)
        tones[0] *= 0.05
        curve = np.interp(image, np.linspace(0, 1, 5), tones)
        image = np.where(head, curve, 0.3 * image)
    rows, columns = np.ogrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    bias = rng.uniform(-0.25, 0.25, 2)
    image = image * (1 + bias[0] * rows + bias[1] * columns)
    image = np.asarray(noise(image[None].astype(np.float32)))[0]
    top = max(float(np.percentile(image, 99)), 0.2)
    return np.clip(image / top, 0, 1).astype(np.float32)


def draw_lesion(picture: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """Draw a glioma or a meningioma into a picture of a head without tumour.

    A meningioma sits at the edge of the head and is even and mostly bright, at times
    with oedema; a glioma lies deep, is ragged, and shows a bright ring round a core,
    a mottled mass, or oedema alone. Sizes are in parts of the picture's side. It is a
    sketch in two dimensions: it teaches what a tumour may look like in *this* style of
    picture, not what one looks like. (In spirit CutPaste, Li et al. 2021, with the
    patch drawn.)

    Parameters
    ----------
    picture : (H, W) float32 in [0, 1]
    kind : {"glioma", "meningioma"}
    seed : int

    Returns
    -------
    (H, W) float32 in [0, 1]
        A copy of the picture if there is no head in it to draw into.

    Raises
    ------
    MedtutError
        For another kind.
    """
    from scipy import ndimage

    if kind not in LESIONS:
        known = " or ".join(LESIONS)
        raise MedtutError(f"draw_lesion: kind={kind!r} cannot be drawn; {known} can.")
    rng = np.random.default_rng(seed)
    side = max(picture.shape) / 128  # lengths below are of a picture of 128
    smooth = functools.partial(_texture, rng, picture.shape)
    head = ndimage.binary_fill_holes(ndimage.gaussian_filter(picture, side) > 0.08)
    depth = ndimage.distance_transform_edt(head)
    if depth.max() < 8 * side:
        return picture.copy()
    outer = kind == "meningioma"
    radius = rng.uniform(6, 18 if outer else 20) * side
    low = 6 * side if outer else max(14 * side, 0.9 * radius)
    high = 6 * side + 0.9 * radius if outer else np.inf
    places = np.argwhere((depth > low) & (depth < high))
    places = places[places[:, 0] < 0.75 * picture.shape[0]]  # not into the neck
    if not len(places):
        places = np.argwhere(depth > 0.5 * depth.max())
    row, column = places[rng.integers(len(places))]
    turn, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.35, 0.35))
    y, x = np.ogrid[: picture.shape[0], : picture.shape[1]]
    along = np.cos(turn) * (x - column) + np.sin(turn) * (y - row)
    across = np.cos(turn) * (y - row) - np.sin(turn) * (x - column)
    far = np.hypot(along * stretch, across / stretch) / radius  # 1 at the border
    inside = ndimage.gaussian_filter((depth > 4 * side).astype(np.float32), 0.7)
    top, median = np.percentile(picture[head], (97, 50))

    def within(limit: float, distance: np.ndarray, soft: float) -> np.ndarray:
        return inside / (1 + np.exp(-((limit - distance) / soft).clip(-30, 30)))

    image, paint = picture, _paint
    if outer:
        far = far + 0.08 * smooth(5 * side)
        mass = within(1, far, 0.05)
        bright, even, dark = (
            rng.uniform(0.75, 1.05) * top,
            rng.uniform(1.15, 1.6) * median,
            rng.uniform(0.5, 0.8) * median,
        )
        level = rng.choice([bright, even, dark], p=[0.65, 0.25, 0.1])
        if rng.random() < 0.4:
            oedema = within(1.6, far - 0.25 * smooth(6 * side), 0.12)
            image = paint(image, 0.5 * oedema, median * rng.choice([0.55, 1.5]))
        texture = 1 + 0.04 * smooth(side) + 0.05 * smooth(5 * side)
        image = paint(image, mass, level * texture)
    else:
        far = far + 0.18 * smooth(4 * side) + 0.1 * smooth(2 * side)
        reach = rng.uniform(1.3, 2.0)
        oedema = within(reach, far - 0.3 * smooth(6 * side), 0.15)
        level = median * rng.choice([rng.uniform(0.45, 0.75), rng.uniform(1.3, 2.0)])
        image = paint(image, rng.uniform(0.4, 0.9) * oedema, level)
        look, mass = rng.random(), within(1, far, 0.06)
        if look < 0.5:
            core = within(rng.uniform(0.55, 0.85), far, 0.06)
            rim = top * rng.uniform(0.7, 1.05) * (1 + 0.12 * smooth(1.5 * side))
            image = paint(image, np.clip(mass - core, 0, 1), rim)
            core_level = rng.choice([rng.uniform(0.25, 0.6), rng.uniform(1.4, 2.0)])
            image = paint(image, core, median * core_level)
        elif look < 0.8:
            mottled = median * rng.uniform(0.8, 1.6) + 0.2 * top * smooth(3 * side)
            image = paint(image, mass, mottled)
    return np.clip(image, 0, 1).astype(np.float32)


def _texture(
    rng: np.random.Generator, shape: tuple[int, int], size: float
) -> np.ndarray:
    """Smooth noise with standard deviation 1."""
    from scipy import ndimage

    noise = ndimage.gaussian_filter(rng.normal(size=shape), size)
    return noise / max(float(noise.std()), 1e-6)


def _paint(image: np.ndarray, amount: np.ndarray, level: Any) -> np.ndarray:
    return image * (1 - amount) + amount * level
