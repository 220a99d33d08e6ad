"""Pretrain the small MedCLIP tower of lesson 02 on drawn slices and their reports.

    python data_scripts/pretrain_medclip_small.py [--patients 60] [--steps 600]

Image and text are matched as MedCLIP does it (Wang et al., EMNLP 2022,
arXiv:2210.10163): the target is not "only the own report", but how many entities a
picture and a report share. Beside it the tower learns, without any label, to tell from
one sequence what the other three would show: a stand-in for the ImageNet weights from
which MedCLIP's tower began. The pictures are single contrasts of the *source* scanner
of the drawn cohort; the reports are generated from the labels. The text encoder is
thrown away at the end, as in the published segmentation code.

16 minutes on one core of a CPU with bfloat16, and 3 to draw the patients. An
interrupted run goes on where it stopped.
`--smoke` does a few steps to see that everything fits together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brain_reports import (
    entities,
    entity_names,
    phrases,
    slice_facts,
    write_report,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from medtut.data import brain_cohort
from medtut.data.brain_cohort import CohortSpec, cohort_folder
from medtut.data.brats import MODALITIES, find_cases
from medtut.data.brats_slices import SliceDataset
from medtut.data.cache import write_by_rename
from medtut.errors import MedtutError
from medtut.models.medclip import DenseDecoder, SwinTower
from medtut.models.medclip_io import SMALL_WEIGHTS, stored_name
from medtut.train import TrainConfig, fit

SEED = 0
COHORT_SEED = 1000  # not 0: no pretraining patient is a patient of the lesson
KINDS = ("glioma", "meningioma", "pituitary")
HELD_OUT = 1 / 6  # of the patients
SHIFT = 14  # pixels
LIMIT = 8_000_000  # bytes of the file


# -- text ------------------------------------------------------------------------------
def words(text: str) -> list[str]:
    """Words and commas of a report."""
    return text.replace(",", " ,").split()


class TextEncoder(nn.Module):
    """A small transformer over words, (batch, length) -> (batch, 512)."""

    def __init__(
        self,
        vocabulary: Iterable[str],
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        length: int = 56,
    ) -> None:
        super().__init__()
        # 0 is padding, 1 a word that is not known.
        self.index = {word: i for i, word in enumerate(sorted(set(vocabulary)), 2)}
        self.embed = nn.Embedding(len(self.index) + 2, width, padding_idx=0)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.projection_head = nn.Linear(width, 512, bias=False)

    def tokens(self, text: str) -> Tensor:
        """Numbers of the words, (length,) int64, padded with 0."""
        numbers = [self.index.get(w, 1) for w in words(text)][: len(self.place)]
        return F.pad(torch.tensor(numbers), (0, len(self.place) - len(numbers)))

    def forward(self, tokens: Tensor) -> Tensor:
        empty = tokens == 0
        y = self.blocks(self.embed(tokens) + self.place, src_key_padding_mask=empty)
        weight = (~empty).to(y.dtype)[:, :, None]
        mean = (self.norm(y) * weight).sum(1) / weight.sum(1).clamp_min(1)
        return self.projection_head(mean)


# -- matching --------------------------------------------------------------------------
def soft_targets(mine: Tensor, others: Tensor, sharpness: float) -> Tensor:
    """How well each of `others` fits each of `mine`; rows sum to 1.

    Both are entity vectors, (n, entities) and (m, entities).
    """
    alike = F.normalize(mine, dim=1) @ F.normalize(others, dim=1).T
    return (sharpness * alike).softmax(1)


def semantic_matching_loss(
    image: Tensor,
    text: Tensor,
    image_entities: Tensor,
    text_entities: Tensor,
    scale: Tensor | float,
    sharpness: float = 20.0,
) -> Tensor:
    """Cross-entropy to the soft targets, from pictures to reports and back.

    `image` (n, 512) and `text` (m, 512) have length 1; `scale` is the inverse
    temperature.
    """
    logits = scale * image @ text.T
    there = soft_targets(image_entities, text_entities, sharpness)
    back = soft_targets(text_entities, image_entities, sharpness)
    return (F.cross_entropy(logits, there) + F.cross_entropy(logits.T, back)) / 2


class Matcher(nn.Module):
    """Both towers and the temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = SwinTower("small")
        for layer in self.tower.model.modules():
            # transformers' 0.02 suits widths of 768: at 32 hardly anything would move.
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                fan_in = layer.weight[0].numel()
                nn.init.trunc_normal_(layer.weight, std=fan_in**-0.5)
        # Air is exactly 0: without a bias its tokens would be 0 too, where every layer
        # norm multiplies the gradient by its 1 / sqrt(eps).
        nn.init.normal_(self.tower.model.embeddings.patch_embeddings.projection.bias)
        said = [
            w for values in phrases().values() for ways in values.values() for w in ways
        ]
        self.text = TextEncoder({w for way in said for w in words(way)} | {","})
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        # Stands in for the ImageNet weights of MedCLIP's tower, without a label.
        self.translate = DenseDecoder(self.tower.widths, classes=len(MODALITIES))
        # Two towers that begin at random give every sample nearly the same vector, and
        # spend most of a short training on leaving it. Centred and scaled, they begin
        # to tell samples apart at once. MedCLIP, whose towers were pretrained, has no
        # need of it; `fold_centre` moves it into the weights that are kept.
        self.centre = nn.ModuleDict(
            {k: nn.BatchNorm1d(512, affine=False) for k in ("image", "text")}
        )

    def scaled(self, what: str, vector: Tensor) -> Tensor:
        """Embeddings of length 1 of what a tower gave for "image" or "text"."""
        # Similarities in half precision would be too coarse to rank by.
        with torch.autocast(vector.device.type, enabled=False):
            return F.normalize(self.centre[what](vector.float()), dim=1)

    def embed(self, what: str, x: Tensor) -> Tensor:
        """Embeddings of pictures ("image") or token rows ("text")."""
        return self.scaled(what, (self.tower if what == "image" else self.text)(x))


def loss_fn(model: Matcher, batch: dict[str, Tensor]) -> Tensor:
    """Semantic matching, and what the other three sequences would show.

    The second term is the mean absolute error of all four sequences at 56 x 56, told
    from the one that is seen: it needs no label, and it makes the stages say what
    lies where. Both terms begin near 1.
    """
    stages = model.tower.stages(batch["image"])
    image = model.scaled("image", model.tower.project(stages[-1]))
    text = model.embed("text", batch["tokens"])
    named, scale = batch["entities"], model.log_scale.clamp(0, 4.6).exp()
    shown = model.translate(stages)
    with torch.autocast(image.device.type, enabled=False):
        match = semantic_matching_loss(image, text, named, named, scale)
        return match / math.log(len(image)) + F.l1_loss(shown.float(), batch["views"])


# -- pictures and reports --------------------------------------------------------------
def jitter(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Another gain, gamma and noise inside the head; the background stays 0."""
    inside = image != 0
    values = image[inside]
    low, high = values.min(), values.max()
    unit = (values - low) / (high - low).clamp_min(1e-6)
    values = unit ** float(rng.uniform(0.7, 1.4)) * (high - low) + low
    values = values * float(rng.uniform(0.8, 1.25)) + float(rng.uniform(-0.25, 0.25))
    noise = rng.normal(0, rng.uniform(0, 0.15), len(values)).astype(np.float32)
    out = torch.zeros_like(image)
    out[inside] = values + torch.from_numpy(noise)
    return out


class Pairs(Dataset):
    """Single-contrast pictures, each with a report drawn for what it shows now.

    Parameters
    ----------
    slices : SliceDataset
        Four contrasts.
    kinds : dict of str to str
        Kind of tumour by case.
    text : TextEncoder
        For its vocabulary.
    train : bool
        Mirror, shift and jitter; slices with tumour come twice.
    """

    def __init__(
        self, slices: Any, kinds: dict[str, str], text: TextEncoder, train: bool
    ) -> None:
        self.slices, self.kinds, self.train = slices, kinds, train
        self.text = text
        top: dict[str, int] = {}
        for case, z in slices.index:
            top[case] = max(top.get(case, 0), z)
        self.index: list[tuple[int, int, float]] = []
        for i, (case, z) in enumerate(slices.index):
            item = slices[i]
            if float((item["image"][0] != 0).float().mean()) < 0.06:
                continue  # little or nothing of the head
            times = 1 + (train and bool(item["label"].any()))
            self.index += [
                (i, c, z / top[case])
                for c in range(len(MODALITIES))
                for _ in range(times)
            ]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        i, contrast, height = self.index[n]
        item = self.slices[i]
        views, label = item["image"], item["label"]
        # In training the loop has seeded NumPy for this sample.
        rng = np.random.default_rng(np.random.randint(2**31) if self.train else n)
        if self.train:
            shift = tuple(int(s) for s in rng.integers(-SHIFT, SHIFT + 1, 2))
            views, label = (t.roll(shift, (-2, -1)) for t in (views, label))
            if rng.random() < 0.5:
                views, label = views.flip(-1), label.flip(-1)
        image = views[contrast : contrast + 1]
        if self.train:
            image = jitter(image, rng)
        # Read from the moved label, so that "left" is left in this very picture.
        facts = slice_facts(
            label.numpy(), MODALITIES[contrast], self.kinds[item["case"]], height
        )
        return {
            "image": image,
            "views": F.avg_pool2d(views, 4),
            "tokens": self.text.tokens(write_report(facts, rng)),
            "entities": torch.from_numpy(entities(facts)),
        }


# -- validation ------------------------------------------------------------------------
def spread(data: Sequence, count: int) -> list[Any]:
    """`count` samples, spread evenly."""
    return [
        data[i]
        for i in np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    ]


@torch.no_grad()
def matching(model: Matcher, samples: list[dict[str, Tensor]]) -> dict[str, float]:
    """How much of a picture's findings the best matching report has right.

    Returns
    -------
    dict
        "score": share of entities in common with the best of all reports (the own one
        among them), "chance": with a report at random, and per field the share of
        pictures for which the field is right, where the picture has it.
    """
    image, tokens, named = (
        torch.stack([s[k] for s in samples]) for k in ("image", "tokens", "entities")
    )
    image = torch.cat([model.embed("image", part) for part in image.split(32)])
    text = model.embed("text", tokens)
    with torch.autocast(image.device.type, enabled=False):
        best = (image @ text.T).argmax(1)
        alike = F.normalize(named, dim=1) @ F.normalize(named, dim=1).T
    out = {
        "score": float(alike[torch.arange(len(best)), best].mean()),
        "chance": float(alike.mean()),
    }
    fields = [field for field, _ in entity_names()]
    for field in dict.fromkeys(fields):
        columns = [i for i, f in enumerate(fields) if f == field]
        mine, found = named[:, columns], named[best][:, columns]
        has = mine.any(1)
        out[field] = float((mine == found).all(1)[has].float().mean())
    return out


@torch.no_grad()
def fold_centre(model: Matcher) -> SwinTower:
    """Move the batch normalisation of the picture's vector into the tower, exactly.

    The projection has no bias, so the mean is taken off in the layer norm before it.
    Without this the vector would be a large constant with a small signal on top, and
    who reads the vector alone would be worse off than under the matching loss.
    """
    tower, norm = model.tower, model.centre["image"]
    weight = tower.projection_head.weight
    mean = torch.linalg.pinv(weight.double()) @ norm.running_mean.double()
    tower.model.layernorm.bias -= mean.float()
    weight /= (norm.running_var + norm.eps).sqrt()[:, None]
    return tower


def save_tower(tower: SwinTower, path: Path, note: dict[str, Any]) -> None:
    """Write a tower in half precision as safetensors, `note` in its metadata."""
    tensors = {
        stored_name(k): v.detach().half().cpu().contiguous()
        for k, v in tower.state_dict().items()
        if stored_name(k)
    }
    size = sum(v.nbytes for v in tensors.values())
    if size > LIMIT:
        raise MedtutError(f"{path} would have {size} bytes; {LIMIT} are allowed.")
    text = {k: str(v) for k, v in note.items()}
    write_by_rename(path, lambda p: save_file(tensors, p, metadata=text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=60)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=SMALL_WEIGHTS)
    parser.add_argument(
        "--work", type=Path, default=Path("build/pretrain_medclip_small")
    )
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--smoke", action="store_true", help="a few steps, no weights")
    args = parser.parse_args()
    if args.smoke:
        args.patients, args.steps, args.batch = 6, min(args.steps, 4), 8
        args.work, args.out = args.work / "smoke", args.work / "smoke.safetensors"
    if args.threads:
        torch.set_num_threads(args.threads)

    spec = CohortSpec("source", KINDS, count=args.patients, seed=COHORT_SEED)
    folder = cohort_folder(spec, progress=True)
    passport = json.loads((folder / "passport.json").read_text(encoding="utf-8"))
    kinds = {name: facts["kind"] for name, facts in passport["patients"].items()}
    cases = sorted(find_cases(folder), key=lambda case: case.id)
    split = len(cases) - max(3, round(len(cases) * HELD_OUT))

    torch.manual_seed(SEED)
    model = Matcher()
    train, held_out = (
        Pairs(
            SliceDataset(part, MODALITIES, slices="all", step=2), kinds, model.text, t
        )
        for part, t in ((cases[:split], True), (cases[split:], False))
    )
    count = 16 if args.smoke else 384
    samples = spread(held_out, count)
    print(
        f"{split} patients, {len(train)} pictures; {len(held_out)} held out", flush=True
    )

    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch,
        lr=args.lr,
        weight_decay=0.05,
        warmup=min(100, args.steps // 4),
        # The weights stay float32; the products run at half the cost.
        precision="bf16",
        clip_norm=1.0,
        eval_every=max(args.steps // 6, 1),
        checkpoint_every=50,
        seed=SEED,
    )
    result = fit(
        model,
        loss_fn,
        train,
        config,
        validate=lambda m: matching(m, samples),
        out=args.work,
    )
    facts = {
        "made_by": "data_scripts/pretrain_medclip_small.py",
        "patients": args.patients,
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "seed": SEED,
        "cohort_seed": COHORT_SEED,
        "cohort_version": brain_cohort.version(),
        "minutes": round(result.seconds / 60, 1),
        "best_step": result.best["step"],
        "held_out": {k: round(v, 3) for k, v in result.best.items() if k != "step"},
    }
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    save_tower(fold_centre(model), args.out, facts)
    print(json.dumps(facts, indent=1))
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
