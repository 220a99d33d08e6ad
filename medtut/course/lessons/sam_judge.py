"""Lesson 03: pictures and prompts for a SAM, its answers, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.data.brats_men import Region, volume_slices

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medtut.course.lessons.l03 import Settings
    from medtut.data.brats import Case

PROMPTS = ("true box", "jitter 5 %", "jitter 15 %", "neighbour's box", "no box")


class Frames:
    """Pictures as a SAM takes them, each with its mask and the masks beside it.

    Parameters
    ----------
    slices : list of dict
        Items of `MenSlices`; their images (H, W) or (H, W, 3).
    settings : for the model's input.
    jitter : float
        Of the box, drawn anew each time an item is taken; see `sam_prompts.jitter`.
    """

    def __init__(
        self, slices: Sequence[dict], settings: Settings, jitter: float
    ) -> None:
        self.slices, self.jitter = slices, jitter
        self.side, self.small = settings.side, settings.model == "litemedsam"

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Input ``x`` (3, h, w), ``box`` (1, 4) in its pixels, ``mask`` (1, H, W)."""
        import torch

        from medtut.models.sam_prompts import box_of, jitter, prepare, scale_boxes

        item = self.slices[i]
        size = item["mask"].shape
        draw = np.random.default_rng(int(torch.randint(2**31, ()).item()))
        box = jitter(box_of(item["mask"])[None], self.jitter, draw, size)
        norm = "minmax" if self.small else "sam"
        return {
            "x": prepare(item["image"], self.side, norm, 4 if self.small else None),
            "box": scale_boxes(box, size, self.side),
            "mask": torch.from_numpy(item["mask"])[None].float(),
        }


def answer(
    sam: nn.Module,
    embedding: Tensor,
    box: Tensor | None,
    size: tuple[int, int],
    settings: Settings,
) -> Tensor:
    """Logits (B, 1, H, W) on the pixels of the pictures, for one prompt on each."""
    from medtut.models.sam_prompts import decode, restore

    multiple = 4 if settings.model == "litemedsam" else None
    logits = decode(sam, embedding, box)[0][:, 0]
    return restore(logits, size, settings.side, multiple)


@dataclass(frozen=True)
class Verdict:
    """Dice of every patient under one kind of prompt.

    ``table`` (patients, scans): overlap summed over the patient's slices; ``mean``
    (patients,) of the logits averaged over scans, and ``patients`` their names.
    ``masks``: predicted masks of all items, in their order.
    """

    patients: list[str]
    table: np.ndarray
    mean: np.ndarray
    masks: list[np.ndarray]

    @property
    def dice(self) -> np.ndarray:
        """(patients,): the mean over scans."""
        return self.table.mean(1)


def judge(
    sam: nn.Module,
    encode: Any,
    items: list[dict],
    settings: Settings,
    prompts: Sequence[str] = PROMPTS[1:2],
    seed: int = 0,
) -> dict[str, Verdict]:
    """Ask for the lesion on every item and score patients, for each kind of prompt.

    Parameters
    ----------
    items : of `slices_of`, for validation or test.
    prompts : of `PROMPTS`
    seed : of the jitter; item k of all arms is given the same box.
    """
    import torch

    from medtut.models.sam_prompts import box_of, jitter, scale_boxes

    sigma = {"jitter 5 %": 0.05, "jitter 15 %": 0.15}
    frames = Frames(items, settings, 0.0)
    device = next(sam.parameters()).device
    logits: dict[str, list] = {name: [] for name in prompts}
    training = sam.training
    sam.eval()
    with torch.no_grad():
        for k, item in enumerate(items):
            embedding = encode(frames[k]["x"][None].to(device))
            size = item["mask"].shape
            for name in prompts:
                near = name == "neighbour's box"
                box = box_of(item["beside" if near else "mask"])[None]
                draw = np.random.default_rng((seed, k))
                box = jitter(box, sigma.get(name, 0.0), draw, size)
                given = scale_boxes(box, size, settings.side)[None].to(device)
                given = None if name == "no box" else given
                found = answer(sam, embedding, given, size, settings)
                logits[name].append(found[0, 0].cpu().numpy())
    sam.train(training)
    return {name: _verdict(items, found) for name, found in logits.items()}


def _verdict(items: list[dict], logits: list[np.ndarray]) -> Verdict:
    sums: dict[tuple[str, str], np.ndarray] = {}
    pooled: dict[tuple[str, int], list] = {}
    for item, found in zip(items, logits, strict=True):
        add = sums.setdefault((item["case"], item["modality"]), np.zeros(2))
        add += _overlap(found > 0, item["mask"])
        pooled.setdefault((item["case"], item["z"]), [item["mask"]]).append(found)
    cases, scans = (list(dict.fromkeys(k[i] for k in sums)) for i in (0, 1))
    table = np.array([[np.divide(*sums[c, s]) for s in scans] for c in cases])
    fused = dict.fromkeys(cases, 0.0)
    for (case, _), (mask, *found) in pooled.items():
        fused[case] = fused[case] + _overlap(np.mean(found, 0) > 0, mask)
    mean = np.array([np.divide(*fused[c]) for c in cases])
    return Verdict(cases, table, mean, [found > 0 for found in logits])


def _overlap(found: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Numerator and denominator of Dice."""
    return np.array([2.0 * (found & mask).sum(), float(found.sum() + mask.sum())])


def through_volume(
    sam: nn.Module,
    encode: Any,
    case: Case,
    scan: str,
    region: Region,
    settings: Settings,
    handed_on: bool = True,
) -> dict[str, Any]:
    """Segment every slice of a volume, and score all of them.

    Parameters
    ----------
    handed_on : bool
        One true box on the largest slice; every next one, up and down, gets the box of
        the mask just found, 5 % wider, until nothing is found. Else every slice with
        tumour gets its true box, and the others are left empty.

    Returns
    -------
    dict
        ``dice`` of the volume, ``found`` and ``truth`` (Z, H, W), ``beyond``: slices
        without tumour on which something was found.
    """
    import torch

    from medtut.models.sam_prompts import box_of, scale_boxes

    images, truth = volume_slices(case, (scan,), region=region)
    size = truth.shape[1:]
    device = next(sam.parameters()).device
    found = np.zeros_like(truth)
    top = int(truth.sum((1, 2)).argmax())
    sam.eval()
    for way in (range(top, len(truth)), range(top - 1, -1, -1)):
        mask = found[top] if handed_on and way.step < 0 else truth[top]
        for z in way:
            mask = mask if handed_on else truth[z]
            if not mask.any():
                if handed_on:
                    break
                continue  # a lesion of several parts has empty slices in between
            box = box_of(mask)
            grown = 0.05 * (box[2:] - box[:2]) * (handed_on and z != top)
            box = box + np.concatenate([-grown, grown])
            frame = Frames([{"image": images[z, 0], "mask": mask}], settings, 0.0)[0]
            given = scale_boxes(box, size, settings.side)[None, None].to(device)
            with torch.no_grad():
                embedding = encode(frame["x"][None].to(device))
                logits = answer(sam, embedding, given, size, settings)
            mask = found[z] = (logits[0, 0] > 0).cpu().numpy()
    beyond = int((found.any((1, 2)) & ~truth.any((1, 2))).sum())
    score = dice(found, truth)
    return {"dice": score, "found": found, "truth": truth, "beyond": beyond}


def dice(found: np.ndarray, mask: np.ndarray) -> float:
    """Dice of one picture with lesion."""
    return float(np.divide(*_overlap(found, mask)))
