"""Pieces of lesson 05: its patients, the arms of its sweep, and LoRA on a scanner."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.course.lessons.ct_designs import BATCHES as BATCHES
from medtut.course.lessons.ct_designs import CUBE as CUBE
from medtut.course.lessons.ct_designs import DESIGNS, Design
from medtut.course.lessons.ct_designs import LOSSES as LOSSES
from medtut.course.lessons.ct_designs import SINGLE as SINGLE
from medtut.data.cache import cache_dir
from medtut.data.chest_anatomy import recipe as chest_recipe
from medtut.data.ct_rate import FINDINGS
from medtut.errors import MedtutError

if TYPE_CHECKING:
    from torch import Tensor

    from medtut.data.ct_rate import Record
    from medtut.models.ctclip import CTCLIP
    from medtut.models.text_tower import TextTower

# Of the pretraining script: the two rarest, which no report that it read names.
WITHHELD = ("Pericardial effusion", "Mosaic attenuation pattern")
# Numbers of the first patient, so that no two parts share a person.
FIRST = {"train": 0, "dev": 2000, "test": 3000, "target_train": 4000,
         "target_test": 5000, "other_body": 6000}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Part:
    """Some patients.

    Attributes
    ----------
    records : list of Record
    volumes : (N, D, H, W) float16, read from the disk as it is needed.
    truth : (N, 18) of 0 and 1.
    """

    records: list[Record]
    volumes: np.ndarray
    truth: np.ndarray

    def some(self, which: slice) -> Part:
        """Those patients."""
        return Part(self.records[which], self.volumes[which], self.truth[which])

    def texts(self) -> list[str]:
        """Findings and impression of every report."""
        return [f"{r.findings} {r.impression}".strip() for r in self.records]


def load_part(name: str, settings: Any) -> Part:
    """Patients of `FIRST`: drawn, or of ``data`` where it stands for the target.

    Drawn, the source is the body lung1 on the source scanner, the target is that body
    on the target scanner, and the other body, lung2, is on the source scanner. A folder
    in the layout of CT-RATE replaces the target: its ``train`` to adapt on, its
    ``valid`` to be judged on.

    Raises
    ------
    MedtutError
        The folder holds fewer labelled volumes than the settings ask for.
    """
    from medtut.data import ct_rate
    from medtut.data.chest_cohort import ChestSpec, chest_folder

    count = getattr(settings, "dev" if name == "other_body" else name)
    target = name.startswith("target")
    split = "train" if name.endswith("train") else "valid"
    if target and settings.data is not None:
        found = ct_rate.find_volumes(settings.data, split)
        known = [r for r in found if r.labels is not None]
        if len(known) < count:
            raise MedtutError(
                f"{settings.data} holds {len(known)} labelled volumes in {split}, the "
                f"settings ask for {count}; set {name} lower."
            )
        order = np.random.default_rng(0).permutation(len(known))[:count]
        records = [known[i] for i in sorted(order)]
    else:
        body = "lung2" if name == "other_body" else "lung1"
        scanner = "target" if target else "source"
        outlines = name == "test"  # for `pointing`
        spec = ChestSpec(body, scanner, split, count, FIRST[name], outlines=outlines)
        records = ct_rate.find_volumes(chest_folder(spec, progress=True), split)
    volumes = ct_rate.load(records, settings.image, settings.spacing, progress=True)
    return Part(records, volumes, np.stack([r.labels for r in records]))


def weights_file(settings: Any) -> Path:
    """The file of the checkpoint: the course's own for "small", else a path."""
    from medtut.models.ct_predict import MAKE, SMALL_WEIGHTS

    path = SMALL_WEIGHTS if settings.weights == "small" else Path(settings.weights)
    if not path.is_file():
        raise MedtutError(f"There is no checkpoint {path}; {MAKE}.")
    return path


def voxels(part: Part) -> np.ndarray | None:
    """Voxels (N, 18) of every finding of drawn patients; None for others."""
    if not part.records[0].path.is_relative_to(cache_dir()):
        return None
    passport = part.records[0].path.parents[4] / "passport.json"
    known = json.loads(passport.read_text(encoding="utf-8"))["patients"]
    each = [known[r.name]["findings"] for r in part.records]
    return np.array([[p.get(f, {}).get("voxels", 0) for f in FINDINGS] for p in each])


def real_chest() -> Path:
    """The CT that nothing was drawn on.

    Raises
    ------
    AssetUnavailable
        Without a network, when it was not fetched before.
    """
    from medtut.data.assets import fetch

    return fetch("slicerio-chest")["image"]


@lru_cache(maxsize=2)
def text_tower(source: str) -> TextTower:
    """The text tower, loaded once."""
    from medtut.models.text_tower import load_text_tower

    return load_text_tower(source)


def prompt_vectors(
    clip: CTCLIP, source: str, templates: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (18, P, latent) of the sentences that affirm and that deny a finding.

    By the adapted tower of the arm that has one.
    """
    import torch

    from medtut.models.text_tower import TEMPLATES, prompt_features

    tower = getattr(clip, "words", None) or text_tower(source)
    found = prompt_features(tower, FINDINGS, templates or TEMPLATES)
    with torch.no_grad():
        sides = (clip.encode_text(torch.from_numpy(p)) for p in found)
        return tuple(side.cpu().numpy() for side in sides)


def embed(clip: CTCLIP, volumes: np.ndarray, batch: int = 8) -> np.ndarray:
    """Vectors (N, latent) of volumes."""
    import torch

    clip.eval()
    parts = np.array_split(volumes, range(batch, len(volumes), batch))
    with torch.inference_mode():
        found = [
            clip.encode_image(torch.from_numpy(np.array(v, np.float32))[:, None])
            for v in parts
        ]
    return torch.cat(found).cpu().numpy()


def zero_shot(
    clip: CTCLIP, vectors: np.ndarray, source: str, templates: Any = None
) -> np.ndarray:
    """P (N, 18) of the findings from vectors of volumes."""
    from medtut.evaluate.zero_shot import pair_scores

    sides = prompt_vectors(clip, source, templates)
    return pair_scores(vectors, *sides, float(clip.log_scale.detach().exp()))


def mean_auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Macro AUROC over the findings that some patients have and some have not."""
    from medtut.evaluate.zero_shot import auroc

    return float(np.nanmean(auroc(scores, truth)))


def _as_seen(outlines: np.ndarray, settings: Any) -> np.ndarray:
    """Outlines (18, D, H, W) on the grid of the settings, which shares its middle."""
    from medtut.data.ct_volume import SPACING

    grid = zip(
        settings.image, settings.spacing, outlines.shape[1:], SPACING, strict=True
    )
    places = [
        np.clip(np.rint((np.arange(n) - (n - 1) / 2) * step / old + (size + 1) / 2),
                0, size + 1).astype(int)
        for n, step, size, old in grid
    ]  # fmt: skip
    edged = np.pad(outlines, [(0, 0), *[(1, 1)] * 3])  # nothing lies beyond
    return edged[np.ix_(range(len(edged)), *places)]


def pointing(clip: CTCLIP, part: Part, settings: Any, count: int = 60) -> np.ndarray:
    """How often the strongest token of a sentence lies on the finding it names.

    The pointing game of Zhang et al. (2018, arXiv:1608.00507), for patients that have
    the finding, beside what a random token of the body would hit.

    Parameters
    ----------
    part : of drawn patients with outlines; the first `count` are asked.

    Returns
    -------
    (18, 2) shares of hits and of chance; NaN where no patient has the finding.
    """
    import torch
    from torch.nn.functional import adaptive_max_pool3d

    from medtut.data.chest_cohort import outlines_of
    from medtut.models.ctclip import relevance
    from medtut.models.text_tower import TEMPLATES

    sides = prompt_vectors(clip, settings.text, TEMPLATES[:1])
    yes, no = (torch.from_numpy(p[:, 0]) for p in sides)
    found: list[list[tuple[float, float]]] = [[] for _ in FINDINGS]
    for record, volume in zip(part.records[:count], part.volumes, strict=False):
        image = torch.from_numpy(np.array(volume, np.float32))
        outlines = torch.from_numpy(_as_seen(outlines_of(record.path), settings))
        for i in outlines.flatten(1).any(1).nonzero().flatten().tolist():
            tokens = relevance(clip, image, yes[i] - no[i])
            there, inside = (
                adaptive_max_pool3d(x[None].float(), tokens.shape).flatten()
                for x in (outlines[i], image > -0.95)
            )
            hit = float(there[tokens.argmax()])
            chance = float(there[inside > 0].mean())
            found[i].append((hit, chance))
    return np.array([np.mean(f, 0) if f else (np.nan, np.nan) for f in found])


# -- the arms of the sweep -------------------------------------------------------------
def embedded(part: Part, settings: Any) -> np.ndarray:
    """Tokens (N, d, h, w, dim) of the checkpoint's embedding, float16, from the cache.

    The largest of each 2 x 2 x 2, so that an arm trains in seconds. The embedding is
    frozen and the same in all arms: what is switched lies above it.
    """
    import torch
    from torch.nn.functional import max_pool3d

    from medtut.data.cache import cached_arrays
    from medtut.data.download import sha256_of
    from medtut.models.ctclip import load_ctclip

    def make() -> dict[str, np.ndarray]:
        stem, found = load_ctclip(weights_file(settings)).image_tower.embed, []
        with torch.inference_mode():
            for v in part.volumes:
                x = stem(torch.from_numpy(np.array(v, np.float32))[None, None])
                pooled = max_pool3d(x.permute(0, 4, 1, 2, 3), 2)
                found.append(pooled.permute(0, 2, 3, 4, 1).half())
        return {"tokens": torch.cat(found).numpy()}

    files = [sha256_of(weights_file(settings)), *(r.name for r in part.records)]
    key = {"version": 2, "recipe": chest_recipe()["version"], "files": files,
           "truth": part.truth.tolist(),
           "data": settings.data, "image": settings.image,
           "spacing": settings.spacing}  # fmt: skip
    return cached_arrays("ctclip_tokens", key, make)["tokens"]


def sentences(part: Part) -> list[list[str]]:
    """The sentences of each report."""
    return [re.split(r"(?<=\.)\s+(?=[A-Z])", text) for text in part.texts()]


def report_vectors(part: Part, source: str) -> np.ndarray:
    """The mean vector (N, width) of each report's sentences."""
    each = sentences(part)
    vectors = text_tower(source).embed([s for one in each for s in one])
    ends = np.cumsum([len(one) for one in each])[:-1]
    return np.stack([rows.mean(0) for rows in np.split(vectors, ends)])


def arm_model(design: Design, settings: Any, shape: tuple[int, ...]) -> Any:
    """An untrained model on tokens (d, h, w, dim): tower, pooling and projection.

    The text side is the checkpoint's and stays, as in LiT (Zhai et al. 2022,
    arXiv:2111.07991): a few hundred reports do not teach what "no" means. One arm has
    LoRA in its text tower as ``words``. A low-rank projection has an eighth of
    the latent width as its rank, as 64 is of the published 512.
    """
    from torch import nn

    from medtut.models.ctclip import CTCLIP, load_ctclip
    from medtut.models.ctvit import CTViT

    *grid, dim = shape
    tower = CTViT(dim, grid, (1, 1, 1), settings.depth, settings.depth, heads=4,
                  norm=design.norm, ffn=design.ffn)  # fmt: skip
    tower.embed = nn.Identity()  # its work is done
    # -log(B - 1): the share of pairs that match, whatever the batch.
    start = -float(np.log(max(design.batch or settings.batch_size, 2) - 1))
    words = load_ctclip(weights_file(settings)).to_text.requires_grad_(False)
    latent, width = words.weight.shape
    clip = CTCLIP(tower, width, latent, design.projection, design.loss,
                  max(1, latent // 8), bias=start)  # fmt: skip
    clip.to_text = words
    if design.text == "lora":
        from medtut.course.lessons.ct_text import AdaptedText

        clip.words = AdaptedText(text_tower(settings.text))
    return clip


class Pairs:
    """Tokens and the vector of the own report, or its number."""

    def __init__(self, tokens: np.ndarray, texts: np.ndarray) -> None:
        self.tokens, self.texts = tokens, texts

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens[n].astype("f4"), "text": self.texts[n]}


def train_arm(
    name: str, seed: int, rate: float, settings: Any, parts: dict[str, Part],
    epochs: float | None = None, progress: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Train one arm on the reports of ``train``; return model and result of `fit`.

    Every arm sees the same number of volumes, so a batch of 4 takes sixteen times the
    steps of one of 64. Where the settings say how often to validate, the weights that
    are best on dev patients are kept, else the last. A warm-up takes half of the steps
    at most.
    """
    import torch
    from torch.nn.functional import normalize

    from medtut.course.lessons.common import precision, train_config
    from medtut.models.contrastive import SCALARS
    from medtut.train import fit

    design = DESIGNS[name]
    tokens = embedded(parts["train"], settings)
    adapted, said = design.text == "lora", sentences(parts["train"])
    texts = (np.arange(len(tokens)) if adapted
             else report_vectors(parts["train"], settings.text))  # fmt: skip
    torch.manual_seed(seed)
    model = arm_model(design, settings, tokens.shape[1:])
    batch = min(design.batch or settings.batch_size, len(tokens))

    def loss(clip: Any, items: dict[str, Tensor]) -> Tensor:
        mixed = clip.image_tower.mix(items["tokens"])
        image = normalize(clip.to_image(mixed).float(), dim=-1)
        text = items["text"]
        text = clip.words.reports([said[i] for i in text]) if adapted else text
        return clip.loss(image, clip.encode_text(text))

    steps = max(2, round((epochs or settings.epochs) * len(tokens) / batch))
    every, more, given = 0, {}, {}
    if settings.validate_every:
        dev = parts["dev"].some(slice(settings.validate_samples))
        every = max(1, round(settings.validate_every * len(tokens) / batch))
        more["validate"] = lambda clip: {
            "score": mean_auroc(arm_scores(clip, dev, settings), dev.truth)
        }
    if settings.warmup is not None:
        given["warmup"] = min(settings.warmup, steps // 2)
    if settings.clip_norm is not None:
        given["clip_norm"] = settings.clip_norm
    config = train_config(
        settings.model_copy(update={"batch_size": batch}), rate, seed, steps, every,
        precision=precision(settings), groups={SCALARS: 10.0}, **given,
    )  # fmt: skip
    data = Pairs(tokens, texts)
    return model, fit(model, loss, data, config, progress=progress, **more)


def arm_scores(model: Any, part: Part, settings: Any) -> np.ndarray:
    """Zero-shot P (N, 18) of a trained arm."""
    import torch
    from torch.nn.functional import normalize

    model.eval()
    tokens = torch.from_numpy(embedded(part, settings)).to(model.log_scale)
    with torch.inference_mode():
        found = [model.to_image(model.image_tower.mix(t)) for t in tokens.split(32)]
    vectors = normalize(torch.cat(found), dim=-1).cpu().numpy()
    return zero_shot(model, vectors, settings.text)
