"""Pretrain the small CT-CLIP of lesson 05 on drawn chests, their reports and outlines.

    python data_scripts/pretrain_ctclip_small.py [--patients 2400]

Reports alone teach a small tower little in an hour on a CPU: what a sentence speaks of
are a few of 442,368 voxels. So it is told where to look as well, in three steps.

1. Patches. The embedding learns to tell from single patches which finding they show;
   patches with findings come often, as they do not in whole volumes. The findings are
   outlined, as ReXGroundingCT outlines those of CT-RATE (Baharoon et al. 2025,
   arXiv:2507.22030); that alignment finer than volume to report helps is what fVLM
   found (Shui et al. 2025, arXiv:2501.14548).
2. Words. Both projections, on volumes that are pooled once: a sentence belongs to every
   scan of which it is true by that scan's own report, as in MedCLIP (Wang et al. 2022,
   arXiv:2210.10163), by SigLIP's loss on pairs; and a scan belongs to its own report,
   by the loss of the model. Among the sentences are the published prompts ("There is
   X."): without them the published pair of prompts found half of what the sentences of
   reports found. Other wordings are left out, to measure what wording costs.
3. Volumes. The whole model, with the losses of both steps.

Two findings, the rarest, are `WITHHELD`: no sentence that names them is read, and their
outlines are not used. The patients are of the body lung1 and the *source* scanner, with
a seed of their own: no patient of the lesson is among them. An interrupted run goes on
where it stopped. `--smoke` does a few steps to see that everything fits together.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from medtut.data import chest_cohort, ct_rate
from medtut.data.cache import cached_arrays
from medtut.data.chest_cohort import ChestSpec, chest_folder
from medtut.data.chest_reports import phrases
from medtut.data.ct_rate import FINDINGS
from medtut.data.ct_volume import SIZE, SPACING
from medtut.errors import MedtutError
from medtut.evaluate.zero_shot import auroc, pair_scores
from medtut.models.contrastive import SCALARS
from medtut.models.ct_predict import SMALL_WEIGHTS
from medtut.models.ct_stem import HistogramStem
from medtut.models.ctclip import CTCLIP, save_ctclip
from medtut.models.ctvit import CTViT
from medtut.models.text_tower import (
    TEMPLATES,
    load_text_tower,
    prompt_features,
    prompts,
)
from medtut.train import TrainConfig, fit

SEED, COHORT_SEED = 0, 1000  # no pretraining patient is a patient of the lesson
PART = 800  # patients that are drawn together
PATCH, DIM, LATENT, HEADS = (6, 8, 8), 128, 128, 32
TOKENS = 64  # patches of a volume that step 1 sees at a time
LIMIT = 8_000_000  # bytes of the file
WITHHELD = ("Pericardial effusion", "Mosaic attenuation pattern")
# What step 2 trains.
WORDS = ("to_image.1.weight", "to_text.weight", "log_scale", "logit_bias")
NAMED = [i for i, f in enumerate(FINDINGS) if f not in WITHHELD]


# -- what a report says ----------------------------------------------------------------
@lru_cache(maxsize=1)
def patterns() -> list[tuple[re.Pattern[str], int, bool]]:
    """Pattern of every sentence about a finding, the finding, whether it affirms it.

    Denials first: "There is no X." also fits "There is {degree} X.".
    """
    found = []
    for i, name in enumerate(FINDINGS):
        for kind, ways in phrases()["findings"][name].items():
            for way in ways:
                text = re.sub(r"\\\{\w+\\\}", r".+?", re.escape(way))
                found.append((re.compile(text), i, kind != "absent"))
    return sorted(found, key=lambda one: one[2])


@cache
def said(sentence: str) -> tuple[int, bool] | None:
    """Finding of a sentence and whether it affirms it; None: normal anatomy."""
    for pattern, finding, affirms in patterns():
        if pattern.fullmatch(sentence):
            return finding, affirms
    return None


def sentences(record: ct_rate.Record) -> list[str]:
    """Sentences of a report that name nothing withheld.

    A point within a number ends none.
    """
    text = f"{record.findings} {record.impression}".strip()
    every = [s for s in re.split(r"(?<=\.)\s+(?=[A-Z])", text) if s]
    return [s for s in every if (said(s) or (NAMED[0], 0))[0] in NAMED]


class Corpus:
    """Reports of the training patients, as vectors.

    Attributes
    ----------
    truth : (N, 18) float32, 1 where the report affirms the finding.
    ways : (finding, affirms) -> numbers of its sentences in `vectors`.
    asked : number of the published prompt of each of `ways`.
    vectors : (S, width), of the sentences.
    reports : (N, width), of the whole.
    """

    def __init__(self, records: list[ct_rate.Record], tower: Any) -> None:
        self.truth = torch.zeros(len(records), len(FINDINGS))
        known: dict[tuple[int, bool], set[str]] = {}
        for row, record in zip(self.truth, records, strict=True):
            for sentence in sentences(record):
                if what := said(sentence):
                    known.setdefault(what, set()).add(sentence)
                    row[what[0]] += (1 - row[what[0]]) * what[1]
        asked = {(f, yes): prompts(FINDINGS[f])[1 - yes][0] for f, yes in known}
        for what, prompt in asked.items():
            known[what].add(prompt)
        every = sorted(set().union(*known.values()))
        place = {s: i for i, s in enumerate(every)}
        self.ways = {k: [place[s] for s in sorted(v)] for k, v in sorted(known.items())}
        self.asked = [place[asked[k]] for k in self.ways]
        self.vectors = torch.from_numpy(tower.embed(every))
        whole = [" ".join(sentences(r)) for r in records]
        self.reports = torch.from_numpy(tower.embed(whole))


# -- volumes and outlines --------------------------------------------------------------
def cohort(first: int, count: int) -> tuple[list[ct_rate.Record], np.ndarray, Tensor]:
    """Records, volumes (N, D, H, W) and outlines (N, d, h, w, 18) of a part.

    An outline is the number of voxels of a finding in a patch; two or more are 2.
    """
    spec = ChestSpec(
        "lung1", "source", "train", count, first, COHORT_SEED, outlines=True
    )
    records = ct_rate.find_volumes(chest_folder(spec, progress=True), "train")

    def outlines() -> dict[str, np.ndarray]:
        found = []
        for record in records:
            x = torch.from_numpy(chest_cohort.outlines_of(record.path))
            for axis, side in zip((1, 3, 5), PATCH, strict=True):
                x = x.unflatten(axis, (-1, side))
            found.append(x.sum((2, 4, 6)).clamp(max=2).permute(1, 2, 3, 0).byte())
        return {"outlines": torch.stack(found).numpy()}

    key = {"spec": repr(spec), "recipe": chest_cohort.recipe()["version"],
           "patch": PATCH, "version": 2}  # fmt: skip
    where = cached_arrays("ctclip_outlines", key, outlines)["outlines"]
    return records, ct_rate.load(records), torch.from_numpy(where)


def other_scanner() -> Any:
    """What another scanner may do to a volume (1, D, H, W), 1000 HU being 1.

    Sharpness, calibration and noise vary between scanners; a model that has seen such
    variation carries over better (Zhang et al. 2020, arXiv:1906.03347).
    """
    from monai import transforms as mt

    sigma = ((0.2, 0.7),) * 3
    return mt.Compose(
        [
            mt.RandGaussianSmooth(*sigma, prob=0.4),
            mt.RandScaleIntensityFixedMean(prob=0.7, factors=0.04),
            mt.RandShiftIntensity(0.025, prob=0.7),
            mt.RandGaussianNoise(prob=0.6, std=0.016),
            mt.ThresholdIntensity(-1, above=True, cval=-1),
            mt.ThresholdIntensity(1, above=False, cval=1),
            mt.EnsureType(track_meta=False),
        ]
    )


class Patches(Dataset):
    """`TOKENS` described patches of a volume, and what is outlined in them.

    Of every finding at most 24 patches, and 60 more from inside the body; each volume
    as it is and as `other_scanner` might show it.
    """

    def __init__(
        self, stem: HistogramStem, volumes: list[np.ndarray], outlines: list[Tensor]
    ) -> None:
        rng, change = np.random.default_rng(SEED), other_scanner()
        change.set_random_state(SEED)
        self.rows: list[tuple[Tensor, Tensor]] = []
        pairs = [pair for both in zip(volumes, outlines, strict=True)
                 for pair in zip(*both, strict=True)]  # fmt: skip
        for again in (False, True):
            for volume, outline in tqdm(pairs, desc="describing patches"):
                x = torch.from_numpy(np.array(volume, np.float32))[None]
                x = (change(x) if again else x)[None]
                # One part more on each side, as the convolution sees it.
                parts = F.pad(stem.describe(x)[0].permute(3, 0, 1, 2), (1, 1) * 3)
                inside = F.avg_pool3d(x[0], PATCH)[0] > -0.95
                masks = [*(outline[..., k] > 0 for k in NAMED), inside]
                picked: set[tuple[int, ...]] = set()
                for mask, most in zip(masks, [24] * len(NAMED) + [60], strict=True):
                    found = mask.nonzero().numpy()
                    chosen = rng.permutation(len(found))[:most]
                    picked |= set(map(tuple, found[chosen].tolist()))
                at = sorted(picked)
                seen = [
                    parts[(slice(None), *(slice(2 * i, 2 * i + 3) for i in p))].half()
                    for p in at
                ]
                label = outline[tuple(np.transpose(at))][:, NAMED]
                self.rows.append((torch.stack(seen), label))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        parts, outline = self.rows[n]
        pick = torch.randint(len(parts), (TOKENS,))
        return {"parts": parts[pick].float(), "outline": outline[pick].float() / 2}


class Scans(Dataset):
    """Volumes of several parts, each time as `other_scanner` might show them."""

    def __init__(self, volumes: list[np.ndarray], outlines: list[Tensor]) -> None:
        self.volumes, self.outlines = volumes, outlines
        self.change = other_scanner()
        self.index = [(p, i) for p, v in enumerate(volumes) for i in range(len(v))]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        part, i = self.index[n]
        x = torch.from_numpy(np.array(self.volumes[part][i], np.float32))[None]
        # The loop has seeded NumPy for this sample.
        self.change.set_random_state(int(np.random.randint(2**31)))
        x = self.change(x)
        outline = self.outlines[part][i][..., NAMED].float() / 2
        return {"volume": x, "outline": outline, "number": torch.tensor(n)}


# -- model and losses ------------------------------------------------------------------
class PatchModel(nn.Module):
    """The embedding with a head on single patches."""

    def __init__(self, stem: HistogramStem) -> None:
        super().__init__()
        self.stem = stem
        self.head = nn.Linear(DIM, len(NAMED))

    def forward(self, parts: Tensor) -> Tensor:
        """Logits of patches (..., 32, 3, 3, 3), which a convolution would visit."""
        stem, join = self.stem, self.stem.join
        y = F.gelu(stem.inner(parts.movedim(-4, -1))).movedim(-1, -4).flatten(-4)
        y = F.linear(y, join.weight.flatten(1), join.bias)
        return self.head(stem.norm(stem.out(F.gelu(y))))


class Pretrained(nn.Module):
    """The model, and the base rate of "here" of each finding, which is not kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        tower = CTViT(DIM, SIZE, PATCH, 2, 1, heads=4, dim_head=32, stem="histogram")
        start = {"loss": "sigmoid", "pool_heads": HEADS, "bias": -2.0}
        self.clip = CTCLIP(tower, width, LATENT, "attention", **start)
        self.rare = nn.Parameter(torch.zeros(len(NAMED)))

    @torch.no_grad()
    def go_on_from(self, patches: PatchModel) -> None:
        """Begin with what the patches taught.

        Each layer starts as nothing but its residual connection, so the pooling finds
        the tokens as its queries, taken from the patches' head, know them. The other
        queries start as the mean over tokens.
        """
        query = self.clip.to_image[0].query.weight
        query[: len(NAMED)] = patches.head.weight
        query[len(NAMED) :] = 0
        self.rare.copy_(patches.head.bias)
        tower = self.clip.image_tower
        for layer in (*tower.spatial.layers, *tower.temporal.layers):
            layer.attention.to_out.weight.zero_()
            layer.ffn.to_out.weight.zero_()
            layer.peg.conv.weight.zero_()
            layer.peg.conv.bias.zero_()

    @torch.no_grad()
    def pooled(self, volume: Tensor) -> Tensor:
        """What each query finds in a volume (D, H, W): tokens (HEADS, DIM)."""
        tokens = self.clip.image_tower(volume[None, None]).flatten(1, 3)[0]
        return self.clip.to_image[0].query(tokens).softmax(0).T @ tokens

    @torch.no_grad()
    def say_what_queries_say(self, pooled: Tensor) -> None:
        """Let each value begin as its own query, centred over the volumes.

        Whatever a query for a finding looks at most, how much it liked it is the
        evidence. The mean token is nearly the same in all volumes; it is the constant.
        """
        n, pool, out = len(NAMED), *self.clip.to_image
        value = pool.value.weight.view(HEADS, -1, DIM)
        value.zero_()
        value[:n, 0] = 0.3 * pool.query.weight[:n]
        mean = pooled[:, n].mean(0)
        value[n, 0] = mean / mean.square().sum()
        columns = out.weight.view(LATENT, HEADS, -1)
        columns *= 0.1
        columns[:, : n + 1, 0] = torch.randn(LATENT, n + 1) / (n + 1) ** 0.5
        level = torch.einsum("nhc,hc->h", pooled[:, :n], value[:n, 0]) / len(pooled)
        columns[:, n, 0] -= columns[:, :n, 0] @ level


def here(logits: Tensor, outline: Tensor, share: Tensor, most: float) -> Tensor:
    """Binary cross-entropy of "here it is", where `share` (findings,) is how rare.

    A square root: rare findings count more, and not all patches are alarms.
    """
    weight = ((1 - share) / share.clamp_min(1e-5)).sqrt().clamp(1, most)
    return F.binary_cross_entropy_with_logits(logits, outline, pos_weight=weight)


class SentenceLoss:
    """Which sentences are true, and which is the own report."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __call__(self, clip: CTCLIP, image: Tensor, number: Tensor) -> Tensor:
        """Of vectors (B, LATENT) of length 1 and the numbers of their patients."""
        corpus = self.corpus
        # One sentence of every kind; which, the loop's seeded stream says. Half of them
        # are the published prompt.
        draw = torch.rand(len(corpus.ways)).tolist()
        picked = [
            asked if u < 0.5 else ways[int((2 * u - 1) * len(ways))]
            for u, ways, asked in zip(
                draw, corpus.ways.values(), corpus.asked, strict=True
            )
        ]
        text = clip.encode_text(corpus.vectors[picked])
        own = clip.encode_text(corpus.reports[number])
        columns = [corpus.truth[number, f] == yes for f, yes in corpus.ways]
        true = torch.stack(columns, 1).float()
        with torch.autocast(image.device.type, enabled=False):
            logits = clip.log_scale.exp() * image.float() @ text.T + clip.logit_bias
            pairs = F.binary_cross_entropy_with_logits(logits, true)
            return pairs + 0.1 * clip.loss(image, own) / math.log(len(image))


class VolumeLoss:
    """Where, and which sentences; see the top of this file."""

    def __init__(self, sentences: SentenceLoss, share: Tensor) -> None:
        self.sentences, self.share = sentences, share

    def __call__(self, model: Pretrained, batch: dict[str, Tensor]) -> Tensor:
        clip = model.clip
        tokens = clip.image_tower(batch["volume"])
        where = clip.to_image[0].query(tokens)[..., : len(NAMED)]
        image = F.normalize(clip.to_image(tokens).float(), dim=-1)
        with torch.autocast(tokens.device.type, enabled=False):
            there = here(where.float() + model.rare, batch["outline"], self.share, 40)
        return there + self.sentences(clip, image, batch["number"])


# -- validation ------------------------------------------------------------------------
@torch.no_grad()
def judge(
    clip: CTCLIP, volumes: np.ndarray, truth: np.ndarray, asked: Any
) -> np.ndarray:
    """Zero-shot AUROC (18,) with the prompts of `prompt_features`."""
    parts = [
        clip.encode_image(torch.from_numpy(np.array(v, np.float32))[:, None])
        for v in np.array_split(volumes, max(1, len(volumes) // 16))
    ]
    yes, no = (
        clip.encode_text(torch.from_numpy(p).flatten(0, 1)).view(*p.shape[:2], -1)
        for p in asked
    )
    return auroc(pair_scores(torch.cat(parts).numpy(), yes.numpy(), no.numpy()), truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=2400)
    parser.add_argument("--held-out", type=int, default=160)
    parser.add_argument("--patch-steps", type=int, default=12000)
    parser.add_argument("--word-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=SMALL_WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("build/pretrain_ctclip"))
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--smoke", action="store_true", help="a few steps, no weights")
    args = parser.parse_args()
    if args.smoke:
        args.patients, args.held_out, args.batch = 12, 4, 4
        args.steps, args.patch_steps, args.word_steps = 4, 4, 4
        args.work, args.out = args.work / "smoke", args.work / "smoke.safetensors"
    if args.threads:
        torch.set_num_threads(args.threads)

    tower = load_text_tower("asset")
    began = time.time()
    ends = [*range(0, args.patients, PART), args.patients]
    parts = [cohort(a, b - a) for a, b in pairwise(ends)]
    drawn = time.time() - began
    records = [r for part in parts for r in part[0]]
    volumes, outlines = [part[1] for part in parts], [part[2] for part in parts]
    # The last patients are held out.
    keep = len(outlines[-1]) - args.held_out
    if keep < 1:
        raise MedtutError("--held-out leaves no patient of the last part to train on.")
    held = volumes[-1][keep:], np.stack([r.labels for r in records[-args.held_out :]])
    volumes[-1], outlines[-1] = volumes[-1][:keep], outlines[-1][:keep]
    corpus = Corpus(records[: -args.held_out], tower)
    asked = prompt_features(tower, FINDINGS, TEMPLATES[:1])
    print(f"{len(corpus.truth)} patients, {len(corpus.vectors)} sentences", flush=True)

    torch.manual_seed(SEED)
    model = Pretrained(tower.width)
    common: dict[str, Any] = {"precision": "bf16", "weight_decay": 0.02, "seed": SEED}
    first = PatchModel(model.clip.image_tower.embed)
    patches = Patches(first.stem, volumes, outlines)
    often = torch.cat([(label > 0).float() for _, label in patches.rows]).mean(0)

    def patch_loss(m: PatchModel, batch: dict[str, Tensor]) -> Tensor:
        logits = m(batch["parts"])
        with torch.autocast(logits.device.type, enabled=False):
            return here(logits.float(), batch["outline"], often, 10)

    config = TrainConfig(
        steps=args.patch_steps,
        batch_size=8,
        lr=2 * args.lr,
        warmup=min(50, args.patch_steps // 4),
        checkpoint_every=1000,
        **common,
    )
    one = fit(first, patch_loss, patches, config, out=args.work / "patches")
    del patches
    model.go_on_from(first)

    sentence_loss, clip = SentenceLoss(corpus), model.clip
    scans = Scans(volumes, outlines)
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # from which `Scans` draws
    every = tqdm(range(len(scans)), desc="pooling volumes")
    pooled = torch.stack([model.pooled(scans[n]["volume"][0]) for n in every])
    model.say_what_queries_say(pooled)
    for name, p in clip.named_parameters():
        p.requires_grad_(name in WORDS)

    def words_loss(m: Pretrained, batch: dict[str, Tensor]) -> Tensor:
        pool, out = m.clip.to_image
        value = pool.value.weight.view(HEADS, -1, DIM)
        mixed = torch.einsum("bhc,hkc->bhk", batch["pooled"], value).flatten(1)
        return sentence_loss(m.clip, F.normalize(out(mixed), dim=-1), batch["number"])

    rows = [{"pooled": z, "number": torch.tensor(n)} for n, z in enumerate(pooled)]
    config = TrainConfig(
        steps=args.word_steps,
        batch_size=64 if not args.smoke else 4,
        lr=5 * args.lr,
        warmup=min(50, args.word_steps // 4),
        checkpoint_every=1000,
        groups={SCALARS: 2.0},
        **common | {"precision": "fp32"},
    )
    middle = fit(model, words_loss, rows, config, out=args.work / "words")
    model.requires_grad_(True)
    print("after the words", np.nanmean(judge(clip.eval(), *held, asked)), flush=True)
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch,
        lr=args.lr / 2,
        warmup=min(50, args.steps // 4),
        eval_every=max(args.steps // 6, 1),
        checkpoint_every=50,
        # The embedding has learned already.
        groups={SCALARS: 2.0, r"image_tower\.embed": 0.2, "to_text": 0.5},
        **common,
    )

    def validate(m: Pretrained) -> dict[str, float]:
        each = judge(m.clip, *held, asked)
        print({f: round(float(a), 3) for f, a in zip(FINDINGS, each, strict=True)})
        return {"score": float(np.nanmean(each[NAMED])), "all": float(np.nanmean(each))}

    share = sum((o > 0).flatten(0, 3).float().sum(0) for o in outlines)
    share = (share / sum(o[..., 0].numel() for o in outlines))[NAMED]
    loss = VolumeLoss(sentence_loss, share)
    two = fit(model, loss, scans, config, validate=validate, out=args.work / "volumes")
    facts = {
        "made_by": "data_scripts/pretrain_ctclip_small.py",
        "patients": len(corpus.truth),
        "held_out": args.held_out,
        "withheld": ", ".join(WITHHELD),
        "cohort": chest_cohort.recipe()["version"],
        "seed": SEED,
        "steps": [one.steps, middle.steps, two.steps],
        "best": two.best,
        "minutes_drawing": round(drawn / 60, 1),
        "minutes_patches": round(one.seconds / 60, 1),
        "minutes_words": round(middle.seconds / 60, 1),
        "minutes_volumes": round(two.seconds / 60, 1),
        "torch": torch.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_ctclip(model.clip, args.out, spacing=SPACING, **facts)
    facts["bytes"] = args.out.stat().st_size
    (args.work / "facts.json").write_text(json.dumps(facts, indent=1), "utf-8")
    print(json.dumps(facts, indent=1))
    if facts["bytes"] > LIMIT:
        args.out.unlink()
        said_so = f"{facts['bytes']} bytes; {LIMIT} are allowed."
        raise MedtutError(f"{args.out} had {said_so}")


if __name__ == "__main__":
    main()
