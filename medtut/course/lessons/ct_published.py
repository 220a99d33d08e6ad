"""Lesson 05's autopsy: what the source's tables and code say, and ours beside it.

Every function is pure: it builds something small from a seed, or only shapes on the
meta device, leaves the global random state alone, and returns numbers. The notebook
prints and records them; keys of returned dicts are names of its metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.random import fork_rng

from medtut.course.files import read_json, repository_root
from medtut.evaluate.zero_shot import auroc
from medtut.lora import Ledger
from medtut.models import published_ctclip as published
from medtut.models.ct_attention import Attention, attention_memory, make_norm
from medtut.models.ctclip import CTCLIP, make_projection
from medtut.models.ctvit import CTViT, FeedForward, PositionBias

Array = np.ndarray
ALL_ON = {"flash": True, "rms": True, "swiglu": True}
SMALL = {"dim": 32, "image": (6, 16, 16), "patch": (2, 4, 4), "spatial_depth": 1,
         "temporal_depth": 1, "heads": 2, "dim_head": 16}  # fmt: skip
TEXT_WIDTH = 12

# README at 81bee44, "Efficiency Comparison": GB; ms of visual encoder, backward, step.
EFFICIENCY = {
    ("as it was", "softmax"): (118.98, 344.53, 882.98, 1313.41),
    ("as it was", "sigmoid"): (118.98, 344.52, 881.89, 1311.98),
    ("all on", "softmax"): (90.94, 321.12, 827.26, 1234.15),
    ("all on", "sigmoid"): (90.95, 320.68, 827.22, 1234.89),
}
PARTS = ("visual", "backward", "total")
# The same, "Performance Metrics", rows 2 and 3: AUROC, F1, precision, recall.
SOFTMAX, SIGMOID = (0.604, 0.450, 0.294, 0.666), (0.620, 0.453, 0.308, 0.774)
# The same, "Dataset" and "Training Time".
VOLUMES, TRAINED, EPOCH_SECONDS = (47_319, 3_038), 7_463, 45 * 60


# -- the source's tables ---------------------------------------------------------------
def source_arithmetic() -> dict[str, float]:
    """What follows from the numbers of the README by arithmetic alone.

    Returns
    -------
    dict
        ``source_speedup_visual``, ``_backward``, ``_total`` of the sigmoid rows;
        ``source_memory_saved_gb``; ``attention_matrix_gb``, in 10^9 bytes, of the N x N
        matrices of the layers in plane: 16 volumes, 24 planes, 8 heads, 4 layers, 576^2
        numbers in float32 (the softmax) and float16 (its copy that multiplies the
        values); ``source_epoch_compute_share``, of 45 minutes, at batch 8 as stated,
        and ``..._16`` as in the code; ``source_volumes_sum``; ``source_implied_f1`` of
        the baseline's precision and recall; gains of AUROC and recall in points
        (``*_points``) and in percent of the baseline (``*_relative_gain``).
    """
    old, new = (EFFICIENCY[k, "sigmoid"] for k in ("as it was", "all on"))
    times = zip(PARTS, old[1:], new[1:], strict=True)
    found = {f"source_speedup_{part}": a / b for part, a, b in times}
    found["source_memory_saved_gb"] = old[0] - new[0]
    found["attention_matrix_gb"] = 16 * 24 * 8 * 4 * 576**2 * (4 + 2) / 1e9
    one_by_one = TRAINED * new[-1] / 1000 / EPOCH_SECONDS
    found["source_epoch_compute_share"] = one_by_one / 8
    found["source_epoch_compute_share_16"] = one_by_one / 16
    found["source_volumes_sum"] = sum(VOLUMES)
    _, _, precision, recall = SOFTMAX
    found["source_implied_f1"] = 2 * precision * recall / (precision + recall)
    for name, k in {"auroc": 0, "recall": 3}.items():
        found[f"source_{name}_points"] = 100 * (SIGMOID[k] - SOFTMAX[k])
        found[f"source_{name}_relative_gain"] = 100 * (SIGMOID[k] / SOFTMAX[k] - 1)
    return found


# -- parameters ------------------------------------------------------------------------
def published_books() -> tuple[Ledger, dict[str, float]]:
    """Ledger of the published module without its text tower, and what to record.

    The whole counts a BERT-base beside it; its pooler, which is out of reach as well,
    is not counted among the dead.
    """
    books = published.published_ledger()
    whole = books.total.parameters + published.BERT_BASE
    dead = books.rows["dead"].parameters
    keys = "published_parameters", "published_dead_parameters", "published_dead_share"
    return books, dict(zip(keys, (whole, dead, dead / whole), strict=True))


def projection_diet(rank: int = 64) -> dict[str, int]:
    """Parameters of each way from tokens to the latent vector, at published size."""
    with torch.device("meta"):
        kinds = ("published", "low_rank", "attention", "mean")
        made = {kind: make_projection(kind, CTViT(), 512, rank) for kind in kinds}
    return {k: sum(p.numel() for p in one.parameters()) for k, one in made.items()}


def norm_counts() -> dict[str, int]:
    """Norms with all switches on: of both stacks as published, and anywhere in ours."""
    with torch.device("meta"):
        counts = published.norms_by_type(published.PublishedCTViT(**ALL_ON))
        ours = [type(m) for m in CTViT().modules()]
    return {
        "published_rms_norms": counts["RMSNorm"],
        "published_layer_norms": counts["LayerNorm"],
        "ours_rms_norms": sum(issubclass(kind, nn.RMSNorm) for kind in ours),
        "ours_layer_norms": sum(issubclass(kind, nn.LayerNorm) for kind in ours),
    }


# -- what a part does ------------------------------------------------------------------
def small_clip(ours: bool, seed: int = 0, **switches: Any) -> CTCLIP:
    """A CT-CLIP of 32 channels, ours or as published.

    Parameters
    ----------
    **switches
        Of `CTViT` or `PublishedCTViT`, and ``loss``; for ours ``projection``.
    """
    own = {k: switches.pop(k) for k in ("loss", "projection") if k in switches}
    clip, tower = published.PublishedCTCLIP, published.PublishedCTViT
    clip, tower = (CTCLIP, CTViT) if ours else (clip, tower)
    with fork_rng(devices=[]):
        torch.manual_seed(seed)
        return clip(tower(**SMALL | switches), TEXT_WIDTH, 16, **own)


def small_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random volumes (3, 1, 6, 16, 16) and text features (3, 12) for `small_clip`."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (3, 1, *SMALL["image"]), (3, TEXT_WIDTH)
    return tuple(torch.randn(shape, generator=draw) for shape in shapes)


def contrast(model: CTCLIP, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch, as `medtut.audit.Subject` asks for it."""
    return model.loss(*model(*batch))


def bias_change(ours: bool, seed: int = 0) -> float:
    """Relative change of the tokens when the position network gets random weights."""
    tower, draw = small_clip(ours, seed).image_tower, torch.Generator().manual_seed(1)
    volumes, _ = small_batch(seed)
    with torch.no_grad():
        before = tower(volumes)
        for p in tower.bias.parameters():
            p.normal_(generator=draw)
        return _distance(tower(volumes), before)


def _distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def flash_differences(
    seeds: Iterable[int] = range(5), tokens: int = 576, size: float = 1.0
) -> Array:
    """How far one attention moves when flash is switched on, and by float16 alone.

    Published size (512, 8 heads of 32), equal weights at PyTorch's initialisation, one
    plane of random tokens with numbers of about `size`. Keys are made of tokens that
    no norm has seen, so what the flash path gives depends on that.

    Returns
    -------
    array (seeds, 2)
        Norm of the difference over norm of the written-out output: of the flash path;
        and of the written-out function in float16.
    """
    found, sizes = [], {"dim": 512, "heads": 8, "dim_head": 32, "rms": False}
    for seed in seeds:
        with fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind = published.PublishedAttention
            plain, flash = (kind(**sizes, flash=on) for on in (False, True))
            x = size * torch.randn(1, tokens, 512)
        flash.load_state_dict(plain.state_dict(), strict=False)
        want, half = plain(x), plain.half()(x.half()).float()
        found.append((_distance(flash(x), want), _distance(half, want)))
    return np.array(found)


@torch.no_grad()
def rms_in_float16(dim: int = 64) -> dict[str, dict[str, int]]:
    """Tokens of 0, 1 and 300 through both RMSNorms, everything in float16.

    Returns
    -------
    dict
        "published" and "ours": how many of the three tokens became NaN (``nan``), and
        how many that were not 0 became 0 (``lost``).
    """
    x = torch.tensor([[0.0], [1.0], [300.0]]).expand(3, dim).half()
    norms, found = (published.PublishedRMSNorm(dim), make_norm("rms", dim)), {}
    for name, norm in zip(("published", "ours"), norms, strict=True):
        y = norm.half()(x)
        lost = ((y == 0) & (x != 0)).all(1)
        found[name] = {"nan": int(y.isnan().all(1).sum()), "lost": int(lost.sum())}
    return found


def bootstrap_of(
    resample: bool, draws: int = 200
) -> Callable[[Array, Array, int], Array]:
    """A bootstrap of the AUROC: (scores, truth, seed) to draws, as `Subject` asks.

    Without `resample` it is that of CT-CLIP (scripts/bootstrap_values.py, line 110 at
    a2a155c), which draws patients and then puts all of them into every sample.
    """

    def run(scores: Array, truth: Array, seed: int) -> Array:
        everybody = np.arange(len(scores))
        drawn = np.random.default_rng(seed).choice(everybody, (draws, len(scores)))
        used = drawn if resample else [everybody] * draws
        return np.array([auroc(scores[i, None], truth[i, None])[0] for i in used])

    return run


def interval_width(resample: bool, patients: int = 60, seed: int = 0) -> float:
    """Width of the 95 % interval of `bootstrap_of` for a weak score."""
    truth = np.arange(patients) % 3 == 0
    scores = np.random.default_rng(seed).normal(size=patients) + truth
    draws = bootstrap_of(resample)(scores, truth, seed)
    return float(np.ptp(np.quantile(draws, [0.025, 0.975])))


# -- built right -----------------------------------------------------------------------
def fused_difference(seeds: Iterable[int] = range(3), side: int = 12) -> float:
    """Largest difference of fused attention from the one written out, in float32.

    With normalised queries and keys, learned scales other than 1, and the bias of a
    plane of side x side, once fixed and once trained, since PyTorch takes another
    kernel for the latter. Of the output; and of all gradients, each as a share of its
    largest entry.
    """
    worst = 0.0
    for seed in seeds:
        with fork_rng(devices=[]):
            torch.manual_seed(seed)
            one, net = Attention(64, 2, 32), PositionBias(2, 32)
            x, weight = torch.randn(2, 2, side**2, 64)
            for scales in (one.q_scale, one.k_scale):
                nn.init.uniform_(scales, 0.5, 1.5)
        fixed = net(side, side).detach()
        for bias in (fixed, fixed.clone().requires_grad_()):
            every, results = (x.requires_grad_(), bias, *one.parameters()), []
            for one.backend in ("explicit", "fused"):
                y = one(x, bias)
                trained = [p for p in every if p.requires_grad]
                grads = torch.autograd.grad((weight * y).sum(), trained)
                results.append([y.detach(), *grads])
            for k, (want, got) in enumerate(zip(*results, strict=True)):
                size = float(want.abs().max()) if k else 1.0
                worst = max(worst, float((got - want).abs().max()) / size)
    return worst


def memory_curves(tokens: Sequence[int], batch: int = 1) -> dict[str, list[int]]:
    """Bytes that one attention keeps for its gradient, for each number of tokens.

    `batch` planes at once, which share one bias.
    """
    ways = {"written out": ("explicit", "none"), "fused": ("fused", "none")}
    ways |= {f"fused, {bias} bias": ("fused", bias) for bias in ("fixed", "trained")}
    return {
        name: [attention_memory(backend, n, bias, batch) for n in tokens]
        for name, (backend, bias) in ways.items()
    }


def gated_flops(kind: str, tokens: int = 64) -> int:
    """Operations of matrices in one feed-forward and its gradient, published width."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(tokens, 512, requires_grad=True)
        FeedForward(512, kind, "rms", None)(x).sum().backward()
    return counter.get_total_flops()


# -- the committed benchmark -----------------------------------------------------------
def load_bench(kind: str) -> dict[str, Any] | None:
    """What ``medtut bench ctclip`` wrote on a "cpu" or "gpu"; None where it did not."""
    folder = repository_root() / "benchmarks" / "results"
    return read_json(folder / f"ctclip_{kind}.json", None)


def by_part(result: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """Seconds of `PARTS` of each (arm, loss) that ran, from a `load_bench`."""
    names = {  # of benchmarks/ctclip_arms.py: with softmax, with sigmoid
        "published": ("published as it was", "published, sigmoid"),
        "same, fused": ("same function, fused", "same function, fused, sigmoid"),
        "all on": ("all on, softmax", "all on"),
    }
    return {
        (arm, loss): [row[f"{part}_s"] for part in PARTS]
        for arm, pair in names.items()
        for loss, name in zip(("softmax", "sigmoid"), pair, strict=True)
        if "total_s" in (row := result["arms"].get(name, {}))
    }


def by_cost(result: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """Memory and speed of the step, both relative to the published module; parameters.

    Of all on, with checkpointing, and with each projection, from a `load_bench`.
    """
    names = "checkpointing", "low rank 64", "attention pooling"
    keys = "memory_ratio", "total_speedup", "parameters"
    rows = {arm: result["arms"].get(arm, {})
            for arm in ("all on", *(f"all on, {n}" for n in names))}  # fmt: skip
    return {arm: tuple(row[k] for k in keys) for arm, row in rows.items()
            if all(row.get(k) is not None for k in keys)}  # fmt: skip
