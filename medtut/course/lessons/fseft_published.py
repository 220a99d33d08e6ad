"""Lesson 06's opening: what FSEFT's numbers and code say, and ours beside it.

Every function is pure: it builds something small from a seed, or only shapes on the
meta device, leaves the global random state alone, and returns numbers. Upstream is
jusiro/fewshot-finetuning at 032f403. The notebook prints, draws and records.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medtut import viz
from medtut.adapters import adapt
from medtut.data.few_shot import draw_protocol
from medtut.data.partial import BalancedSampler, pretraining_sets
from medtut.errors import MedtutError
from medtut.evaluate.organs import dice
from medtut.models import published_fseft as published
from medtut.models.partial_loss import PartialDice, soft_dice
from medtut.models.swin_unetr import SwinUNETR, build_swin_unetr, parts
from medtut.models.swin_weights import load_published, registry

# Methods for one organ; "as published" has upstream's settings, and so its count.
JOINT = {"rank": 4, "joint": True, "scaling": "none"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-shot": ("as-is", {}),
    "linear probe": ("probe", {}),
    "spatial adapter, 1³": ("spatial", {"kernel": 1}),
    "spatial adapter, 3³": ("spatial", {"kernel": 3}),
    "bias of attention and MLP": ("bias", {"select": "blocks"}),
    "bias, as published": ("bias", {"select": "published"}),
    "bias, all": ("bias", {"select": "all"}),
    "bias, all, and tables": ("bias", {"select": "all+tables"}),
    "norm": ("norm", {}),
    "LoRA, as published": ("lora", JOINT),
    "LoRA for q, k, v apart": ("lora", {"rank": 4}),
    "AdaptFormer, as published": ("adaptformer", {"rank": 16}),
    "Compacter, as published": ("compacter", {"norms": True}),
    "Compacter, no norms": ("compacter", {}),
    "all parameters": ("full", {}),
}
# Novel structures, 10 shots, the paper's table: lungs, heart, gluteal muscles, average.
NOVEL_TABLE = {
    "LoRA": (26.16, 76.12, 69.89, 57.39),
    "AdaptFormer": (23.84, 72.32, 69.79, 55.32),
    "all parameters": (31.01, 60.79, 65.35, 52.38),
    "norm": (26.09, 65.91, 64.53, 52.18),
    "bias": (26.17, 65.78, 64.34, 52.10),
    "decoder alone": (25.98, 65.69, 64.23, 51.97),
    "all, from 'selfsup'": (19.59, 53.14, 55.37, 42.70),
}
# The project page, base organs of TotalSegmentator, 10 shots (read off its figure).
BASE_TEN = 77.8, 77.3  # LoRA, spatial adapter
# The same figure: log10 of the parameters, as the axis says.
FIGURE_LOG10 = {"linear probe": 1.69, "norm": 4.24, "LoRA, as published": 4.84,
                "spatial adapter, 3³": 5.09, "bias, as published": 5.32,
                "all parameters": 7.79}  # fmt: skip


# -- counts ----------------------------------------------------------------------------
class Row(NamedTuple):
    """What a method trains for one organ: decoder frozen, and fine-tuned as well."""

    method: str
    trained: int
    with_decoder: int | None


@cache
def full_size() -> SwinUNETR:
    """The published network, feature size 48 and 29 outputs, as shapes alone."""
    return build_swin_unetr().to("meta")


def method_table() -> list[Row]:
    """Parameters that each method of `METHODS` trains, counted on `full_size`.

    Zero-shot trains nothing, so it has no second number; all parameters hold the
    decoder already.
    """
    rows, decoder = [], parts(full_size())["decoder"]
    for name, (method, options) in METHODS.items():
        done = adapt(copy.deepcopy(full_size()), method, structure=0, **options)
        both = done.total + (0 if done.counts["decoder"] else decoder)
        rows.append(Row(name, done.total, None if method == "as-is" else both))
    return rows


def counts(table: Sequence[Row]) -> dict[str, float]:
    """What the lesson records of a `method_table`, by the names of its metrics."""
    chosen, whole = published.published_bias(full_size()), parts(full_size())
    by_name = {row.method: row for row in table}
    lora, head = by_name["LoRA, as published"], by_name["linear probe"].trained
    return {
        "published_bias_parameters": sum(chosen.values()),
        "published_bias_tables": sum(n for k, n in chosen.items() if "table" in k),
        "honest_bias_parameters": by_name["bias of attention and MLP"].trained - head,
        "lora_trainable": lora.trained,
        "lora_decoder_trainable": lora.with_decoder,
        "decoder_share": whole["decoder"] / sum(whole.values()),
    }


def step_flops(side: int = 96) -> dict[str, int]:
    """Operations of matrices and convolutions in one forward pass, by who does them.

    "network" makes the last map of a region of side³ voxels at published size, "head"
    is the linear probe on it.
    """
    from torch.utils.flop_counter import FlopCounterMode

    net, found = copy.deepcopy(full_size()).eval(), {}
    adapt(net, "probe", structure=0)
    x = torch.empty(1, 1, side, side, side, device="meta")
    with torch.no_grad():
        for name, run in {"network": net.features, "head": net.classifier}.items():
            with FlopCounterMode(display=False) as counter:
                x = run(x)
            found[name] = counter.get_total_flops()
    return found


# -- the source's tables ---------------------------------------------------------------
def source_arithmetic() -> dict[str, float]:
    """What follows from published numbers by arithmetic alone.

    Returns
    -------
    dict
        ``source_listed``: volumes in the pretraining list, by set and added up;
        ``source_average_error``: largest distance, in points, of a row's average from
        the mean of its three groups; ``source_lora_minus_full_*`` and
        ``source_*_minus_decoder``, in points; ``source_base_lora_minus_spatial``, at 10
        shots; standard errors, in points, where Dice varies by 10 between patients:
        ``source_se_of_five`` volumes, and ``source_se_of_nine_organs`` with five each.
    """
    of = NOVEL_TABLE
    found = {"source_listed": sum(s["listed"] for s in pretraining_sets().values())}
    gaps = [abs(np.mean(row[:3]) - row[3]) for row in of.values()]
    found["source_average_error"] = max(gaps)
    pairs = zip(of["LoRA"], of["all parameters"], strict=True)
    names = ("lungs", "heart", "gluteus", "average")
    for name, (lora, full) in zip(names, pairs, strict=True):
        found[f"source_lora_minus_full_{name}"] = lora - full
    for name in ("LoRA", "norm", "bias"):
        gain = of[name][3] - of["decoder alone"][3]
        found[f"source_{name.lower()}_minus_decoder"] = gain
    short = {"LoRA": "lora", "AdaptFormer": "adaptformer", "all parameters": "full"}
    for name, word in (short | {"all, from 'selfsup'": "selfsup"}).items():
        found[f"source_novel_{word}"] = of[name][3]
    found["source_base_lora_minus_spatial"] = BASE_TEN[0] - BASE_TEN[1]
    errors = {
        "source_se_of_five": 10 / 5**0.5,
        "source_se_of_nine_organs": 10 / 45**0.5,
    }
    return found | errors


def one_address() -> dict[str, str]:
    """File that upstream's README links for a name (lines 97, 98), and the true one."""
    file = {name: registry()[name]["filename"] for name in ("btcv", "selfsup")}
    return {"btcv, linked": file["btcv"], "selfsup, linked": file["btcv"],
            "selfsup, meant": file["selfsup"]}  # fmt: skip


def mistaken_for(name: str = "selfsup") -> str:
    """What our loader says to a file laid out like btcv's that is called `name`."""
    net, file = build_swin_unetr(12, 14), registry()[name]["filename"]
    state = net.state_dict().items()
    keys = {k.replace("classifier", "out.conv.conv"): v for k, v in state}
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": keys}, path := Path(folder, file))
        try:
            load_published(name, path, net, head=False)
        except MedtutError as error:
            return str(error).replace(str(path), file)
    return "accepted"


# -- what a part does ------------------------------------------------------------------
def start_changes(
    seeds: Iterable[int] = range(5), model: SwinUNETR | None = None
) -> dict[str, np.ndarray]:
    """How far each method moves the features of the encoder before any training.

    On a region of noise, see `published_fseft.relative_change`.

    Parameters
    ----------
    seeds : of adapters, noise, and the network where none is given
    model : SwinUNETR, optional
        Else one of width 12 with random weights.

    Returns
    -------
    dict of array (seeds, 5)
        After the patch embedding and each of the four stages.
    """
    ours = {"Compacter, ours": ("compacter", {}), "AdaptFormer": ("adaptformer", {})}
    ours |= {"LoRA": ("lora", JOINT)}
    found: dict[str, list] = {name: [] for name in ("Compacter, as published", *ours)}
    for seed in seeds:
        net = model or build_swin_unetr(12, 1, seed=seed, window_size=4).eval()
        x = torch.rand(1, 1, 32, 32, 64, generator=torch.Generator().manual_seed(seed))
        for name in found:
            changed = copy.deepcopy(net)
            if name in ours:
                method, options = ours[name]
                adapt(changed, method, seed=seed, **options)
            else:
                published.published_compacter(changed, seed=seed)
            found[name].append(published.relative_change(net, changed.eval(), x))
    return {name: np.array(rows) for name, rows in found.items()}


def dice_cases() -> dict[str, tuple[float, float]]:
    """Three predictions that are right in every voxel: Dice as published, and ours."""
    nothing, one, two = np.zeros((3, 12, 10, 20), np.uint8)
    one[:5, :5, :4] = two[:5, :5, :4] = two[8:11, :5, 10:14] = 1  # 100, and 60 more
    cases = {"100 voxels": (one, one), "nothing, and nothing found": (nothing, nothing)}
    cases["100 and 60 voxels apart"] = (two, published.published_ground_truth(two))
    return {
        name: (published.published_dice(mask, truth)[0], float(dice(mask, mask)[0]))
        for name, (mask, truth) in cases.items()
    }


def shots(asked: Sequence[int] = (1, 5, 10, 30), listed: int = 41) -> dict[str, Any]:
    """Volumes that a run trains on, of a list: as published, and by our protocol."""
    ids = [f"s{i:04d}" for i in range(listed)]
    ours = draw_protocol(ids, ["test"], asked, seeds=1)
    theirs = {k: len(published.published_support(ids, k, 1)[0]) for k in asked}
    return {"published": theirs, "ours": {k: len(ours.support(k, 0)) for k in asked}}


# -- partial labels --------------------------------------------------------------------
def gradient_reach(seed: int = 0) -> dict[str, np.ndarray]:
    """Largest gradient on the logits of each organ, under both rules for no label.

    Returns
    -------
    dict of array (volumes 2, organs 3)
        The first volume's labels speak of organs 0 and 1, the second's of organ 0.
        "ignore" and "background".
    """
    draw = torch.Generator().manual_seed(seed)
    known = torch.tensor([[True, True, False], [True, False, False]])
    logits = torch.randn(2, 3, 4, 4, 4, generator=draw).requires_grad_()
    target = torch.rand(2, 3, 4, 4, 4, generator=draw) < 0.3
    target &= known[..., None, None, None]
    found = {}
    for rule in ("ignore", "background"):
        (grad,) = torch.autograd.grad(PartialDice(rule)(logits, target, known), logits)
        found[rule] = grad.abs().amax((2, 3, 4)).numpy()
    return found


def mean_loss(share: float, p: Tensor, voxels: int = 100) -> tuple[Tensor, Tensor]:
    """Mean soft Dice loss of an organ that a share of the hospitals outlines.

    It is there in all volumes; the network gives each of its voxels probability p.

    Returns
    -------
    two of (N,), as p is
        Over those that outline it; and over all, the rest taken for background.
    """
    each = p[:, None, None].expand(-1, 1, voxels)
    truths = torch.ones_like(each), torch.zeros_like(each)
    present, absent = (soft_dice(each, truth)[:, 0] for truth in truths)
    return present, share * present + (1 - share) * absent


def sampler_shares(epochs: int = 20) -> dict[str, tuple[float, float]]:
    """Share of each pretraining set among volumes, and among what is drawn."""
    groups = [k for k, one in pretraining_sets().items() for _ in range(one["listed"])]
    sampler, drawn = BalancedSampler(groups, length=140), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        drawn += [groups[i] for i in sampler]
    return {
        name: (groups.count(name) / len(groups), drawn.count(name) / len(drawn))
        for name in pretraining_sets()
    }


# -- a rank that is found --------------------------------------------------------------
def found_rank(
    proximal: bool, weight: float = 0.2, lr: float = 0.1, true: int = 3
) -> tuple[int, float]:
    """Learn the diagonal of an update B diag(d) A of known rank, with a penalty on it.

    B and A stay at orthonormal factors, so that the best d is known: d starts at one,
    and its target has `true` entries of 1 to 2 and 13 of the size of noise, 0.05.

    Parameters
    ----------
    proximal : soft threshold after each step; else the penalty's gradient is added.
    weight, lr : of the penalty, and of a step. 300 steps are taken.

    Returns
    -------
    (int, float)
        Entries of d that are not exactly zero, and the largest of the others' places.
    """
    draw = torch.Generator().manual_seed(0)
    target = 0.05 * torch.randn(16, generator=draw)
    target[:true] = torch.linspace(2, 1, true)
    B, A = (torch.linalg.qr(torch.randn(24, 16, generator=draw))[0] for _ in range(2))
    d, want = torch.ones(16, requires_grad=True), (B * target) @ A.T
    for _ in range(300):
        loss = ((B * d) @ A.T - want).square().sum() / 2
        loss = loss if proximal else loss + weight * d.abs().sum()
        (grad,) = torch.autograd.grad(loss, d)
        with torch.no_grad():
            d -= lr * grad
            if proximal:
                d.copy_(torch.nn.functional.softshrink(d, lr * weight))
    return int(d.count_nonzero()), d.detach()[true:].abs().max().item()


# -- pictures --------------------------------------------------------------------------
def draw_network(ax: Any) -> None:
    """The parts of the network in the order data goes, as wide as their parameters."""
    trains = {
        "swinViT": "backbone (swinViT)\nbias · norm · LoRA\nAdaptFormer · Compacter",
        "bottleneck-and-skips": "bottleneck and skips\n(convolutions)",
        "decoder": "decoder\nwith every method\nfor novel structures",
        "classifier": "head\nprobe · spatial\nadapter",
    }
    sizes, left = parts(full_size()), 0.0
    colours = (viz.BLUE, viz.GREY, viz.VERMILION, viz.GREEN)
    for (part, said), colour in zip(trains.items(), colours, strict=True):
        width = sizes[part] / 1e6
        ax.barh(0, width, 0.7, left=left, color=colour, ec=colour)
        middle = left + width / 2 if part != "classifier" else left + 2.6
        ax.text(middle, 0.45, f"{sizes[part]:,}", ha="center", va="bottom", fontsize=9)
        ax.text(middle, -0.45, said, ha="center", va="top", fontsize=8)
        left += width + 1.2
    ax.set(xlim=(-1.5, left + 4), ylim=(-1.6, 0.9))
    ax.set_axis_off()


def draw_methods(ax: Any, table: Sequence[Row]) -> None:
    """Parameters that train, decoder frozen and fine-tuned, on a logarithmic axis."""
    rows = [row for row in table if row.trained]
    places = np.arange(len(rows))[::-1]
    frozen, both = np.array([row[1:] for row in rows]).T
    ax.hlines(places, frozen, both, color="#cccccc", lw=1.5)
    looks = {
        "decoder frozen": (frozen, viz.BLUE, "o"),
        "and the decoder": (both, viz.VERMILION, "s"),
    }
    for label, (x, colour, marker) in looks.items():
        ax.plot(x, places, ls="none", color=colour, marker=marker, ms=5, label=label)
    ax.set_yticks(places, [row.method for row in rows], fontsize=8.5)
    ax.set(xscale="log", xlabel="parameters that train for one organ", xlim=(20, 3e8))
    ax.legend(frameon=False, fontsize=8.5, loc="lower left")


def draw_changes(ax: Any, changes: dict[str, np.ndarray]) -> None:
    """A line per method over the stages, with every seed as a dot."""
    for (name, rows), style in zip(changes.items(), ("-", "-", "--", ":"), strict=True):
        (line,) = ax.plot(range(5), rows.mean(0), style, label=name)
        ax.plot(range(5), rows.T, ls="none", marker=".", ms=4, color=line.get_color())
    ax.set_xticks(range(5), ["patches", *(f"stage {k}" for k in range(1, 5))])
    ax.set(ylabel="relative change", ylim=(-0.08, 1.6))
    ax.legend(frameon=False, fontsize=8.5, loc="upper left")


def draw_majority(ax: Any, shares: Sequence[float] = (0.2, 0.4, 0.6)) -> None:
    """`mean_loss` over the probability given to the organ's voxels."""
    p = torch.linspace(0, 1, 201)
    ax.plot(p, mean_loss(1.0, p)[0], color=viz.BLACK, marker="", label="masked")
    for share, colour in zip(
        shares, (viz.VERMILION, viz.ORANGE, viz.BLUE), strict=True
    ):
        loss = mean_loss(share, p)[1]
        ax.plot(
            p,
            loss,
            color=colour,
            marker="",
            label=f"background, {share:.0%} outline it",
        )
        best = int(loss.argmin())
        ax.plot(p[best], loss[best], color=colour, marker="o", ls="none")
    ax.set(xlabel="probability that the network gives to the organ", ylabel="mean loss")
    ax.legend(frameon=False, fontsize=8.5)
