"""What a training step of a SAM costs with its frozen beginning kept, and without.

`medtut.models.sam_stages.PrefixCache` runs what lies below the first trainable block
once per image. Here the same step - encode, decode one box, loss, backward, Adam - is
timed with the features kept (after the first epoch) and with the whole encoder run
every time. The two take turns on the same model and the same images, and CPU time is
compared, so that load on the machine hits both alike. Both give the same embedding
(checked). Weights are random: they do not change the time.

    python benchmarks/prefix.py            # some minutes; ViT-B needs about 9 GB
    python benchmarks/prefix.py --quick    # seconds: small inputs, no evidence
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtut.files import write_json, write_text
from medtut.lora import LoRAConfig
from medtut.machine import describe_machine, versions
from medtut.models import litemedsam
from medtut.models.litemedsam import LiteMedSAM
from medtut.models.sam import adapt_sam, build_sam
from medtut.models.sam_prompts import decode
from medtut.models.sam_stages import PrefixCache, first_trainable, stages

OUT = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One model and what is adapted in it; ``pattern`` "" is the decoder alone."""

    name: str
    kind: str
    pattern: str
    side: int
    rounds: int
    target: float


CASES = (
    Case("LiteMedSAM, layers 2-3", "litemedsam", r"layers\.[23]\..*qkv", 256, 5, 1.3),
    Case("LiteMedSAM, layer 3", "litemedsam", r"layers\.3\..*qkv", 256, 5, 1.8),
    Case("LiteMedSAM, decoder only", "litemedsam", "", 256, 5, 6.0),
    Case("ViT-B, decoder only", "vit_b", "", 1024, 2, 20.0),
)


def build(case: Case) -> nn.Module:
    """The model with random weights; LoRA on query and value, or the decoder free."""
    torch.manual_seed(0)
    if case.kind == "litemedsam":
        sam = LiteMedSAM().eval()
    else:
        sam = build_sam(case.kind, case.side)
    config = LoRAConfig(r=8, pattern=case.pattern or None)
    if case.pattern:
        adapt_sam(sam, config)
    else:
        adapt_sam(sam, config, encoder="frozen", decoder="full")
    return sam


def measure(case: Case, batch: int) -> dict:
    """CPU seconds of a step, both ways, turn by turn; the first epoch apart."""
    sam = build(case)
    x = torch.rand(batch, 3, case.side, case.side)
    box = torch.tensor([0.2, 0.3, 0.7, 0.6]) * case.side
    boxes = box.expand(batch, 1, 4)
    target = torch.zeros(batch, 1, 1, case.side, case.side)
    target[..., int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = 1
    optimizer = torch.optim.Adam((p for p in sam.parameters() if p.requires_grad), 1e-4)
    cache = PrefixCache(sam.image_encoder)

    def step(encode: Callable[[Tensor], Tensor]) -> float:
        start = time.process_time()
        logits, _ = decode(sam, encode(x), boxes)
        logits = F.interpolate(logits[:, 0], case.side, mode="bilinear")
        F.binary_cross_entropy_with_logits(logits, target[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    first = step(cache)  # makes the features
    with torch.no_grad():
        torch.testing.assert_close(cache(x), sam.image_encoder(x), rtol=1e-4, atol=1e-4)

    def plain(x: Tensor) -> Tensor:
        """The encoder as one would write it first: no strips in the first layer."""
        rows, litemedsam.ROWS = litemedsam.ROWS, case.side
        try:
            return sam.image_encoder(x)
        finally:
            litemedsam.ROWS = rows

    arms = {"whole": sam.image_encoder, "kept": cache}
    if case.kind == "litemedsam":
        arms["plain"] = plain
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(case.rounds):
        for name in sorted(arms, reverse=turn % 2 == 0):
            times[name].append(step(arms[name]))
    ratio, *plainer = (
        statistics.median(w / k for w, k in zip(times[n], times["kept"], strict=True))
        for n in arms
        if n != "kept"
    )
    names = [name for name, _ in stages(sam.image_encoder)]
    cut = first_trainable(sam.image_encoder)
    return {
        **asdict(case),
        "batch": batch,
        "kept_stages": f"{cut} of {len(names)}",
        "first_step_s": round(first, 4),
        "step_s": {k: round(statistics.median(v), 4) for k, v in times.items()},
        "ratio": round(ratio, 2),
        "ratio_plain": round(plainer[0], 2) if plainer else None,
        "met": ratio >= case.target,
    }


def markdown(result: dict) -> str:
    """The result as a short table."""
    m, v = result["machine"], result["versions"]
    lines = [
        "# A training step with the frozen beginning kept",
        "",
        "CPU seconds of one step (encode, decode one box, loss, backward, Adam), "
        f"median over rounds in which both ways took turns, {result['threads']} "
        'threads. The first step makes the features. "Whole" is our encoder, whose '
        "first layer runs in strips that fit a processor's cache; the last column "
        "compares with the same encoder without strips.",
        "",
        f"Machine: {m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}; "
        f"Python {v['python']}, torch {v['torch']}.",
        "",
        "| adapted | input | images | stages kept | first step, s | whole encoder, s "
        "| kept, s | times faster | wanted | faster than without strips |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for c in result["cases"]:
        step, met = c["step_s"], "met" if c["met"] else "not met"
        lines.append(
            f"| {c['name']} | {c['side']}² | {c['batch']} | {c['kept_stages']} "
            f"| {c['first_step_s']:.2f} | {step['whole']:.2f} | {step['kept']:.2f} "
            f"| {c['ratio']:.2f} | {c['target']:g}, {met} | {c['ratio_plain'] or ''} |"
        )
    if result["quick"]:
        lines += ["", "Quick: small inputs and models, no evidence."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, and write prefix.json and prefix.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="images (ViT-B: 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    cases = [c for c in CASES if a.only in c.name]
    if a.quick:
        small = {"vit_b": "tiny"}
        cases = [
            Case(c.name, small.get(c.kind, c.kind), c.pattern, 64, 1, c.target)
            for c in cases
        ]
    results, before = [], os.environ.get("MEDTUT_CACHE")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.environ["MEDTUT_CACHE"] = scratch
        try:
            for case in cases:
                results.append(measure(case, 1 if case.kind == "vit_b" else a.batch))
                print(results[-1]["name"], results[-1]["step_s"], results[-1]["ratio"])
        finally:
            os.environ.pop("MEDTUT_CACHE")
            if before is not None:
                os.environ["MEDTUT_CACHE"] = before
    result = {
        "quick": a.quick,
        "threads": a.threads,
        "machine": describe_machine(),
        "versions": versions(),
        "cases": results,
    }
    write_json(a.out / "prefix.json", result)
    write_text(a.out / "prefix.md", markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
