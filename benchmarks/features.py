"""What an epoch of VGG16 costs from kept features, and with the trunk run every time.

`medtut.models.prefix.PrefixCache` runs what lies below the first layer that learns
once per image. Here the same step - features, classifier, loss, backward, Adam - is
timed with the features kept (after the first epoch, which is reported apart) and with
the whole network. The two take turns on the same model and the same batches, and CPU
time is compared, so that load on the machine hits both alike. Both give the same
logits (checked). Weights are random: they do not change the time.

    python benchmarks/features.py            # some minutes, 3 GB
    python benchmarks/features.py --quick    # seconds: a narrow net, no evidence
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
from torch import Tensor

from medtut.files import write_json, write_text
from medtut.machine import describe_machine, versions
from medtut.models.prefix import PrefixCache, first_trainable, stages
from medtut.models.vgg import adapt, to_input, vgg16

OUT = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """What is trained; ``blocks`` are those whose convolutions are adapted."""

    name: str
    where: str
    head: str
    blocks: tuple[int, ...]
    target: float | None


CASES = (
    Case("head only", "head", "linears", (), 20.0),
    Case("head only, pooled", "head", "pooled", (), 20.0),
    Case("LoRA on the two linears", "linear", "linears", (), 20.0),
    Case("LoRA on block 5", "conv", "pooled", (5,), None),
    Case("LoRA on blocks 4 and 5", "conv", "pooled", (4, 5), None),
)


def measure(case: Case, a: argparse.Namespace) -> dict:
    """CPU seconds of an epoch, both ways, turn by turn; the first epoch apart."""
    small = {"width": 0.125, "hidden": 64} if a.quick else {}
    model = vgg16(head=case.head, dropout=0.0, **small)
    adapt(model, case.where, r=4 if a.quick else 8, blocks=case.blocks)
    seeded = torch.Generator().manual_seed(0)
    grey = torch.rand(a.images, a.side, a.side, generator=seeded)
    x = to_input(grey, "torchvision")
    truth = torch.randint(4, (a.images,), generator=seeded)
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer, cache = torch.optim.Adam(live, 1e-4), PrefixCache(model)

    def epoch(forward: Callable[[Tensor], Tensor]) -> float:
        start = time.process_time()
        for rows in torch.arange(a.images).split(a.batch):
            F.cross_entropy(forward(x[rows]), truth[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start

    first = epoch(cache)  # makes the features
    with torch.no_grad():
        some = x[: a.batch]
        torch.testing.assert_close(cache(some), model(some), rtol=1e-4, atol=1e-4)
    arms = {"whole": model, "kept": cache}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(a.rounds):
        for name in sorted(arms, reverse=turn % 2 == 0):
            times[name].append(epoch(arms[name]))
    pairs = zip(times["whole"], times["kept"], strict=True)
    ratio = statistics.median(w / k for w, k in pairs)
    return {
        **asdict(case),
        "images": a.images,
        "side": a.side,
        "batch": a.batch,
        "kept_stages": f"{first_trainable(model)} of {len(stages(model))}",
        "first_epoch_s": round(first, 3),
        "epoch_s": {k: round(statistics.median(v), 4) for k, v in times.items()},
        "ratio": round(ratio, 1),
        "met": None if case.target is None else ratio >= case.target,
    }


def markdown(result: dict) -> str:
    """The result as a short table."""
    m, v = result["machine"], result["versions"]
    one = result["cases"][0]
    lines = [
        "# An epoch of VGG16 with the frozen part kept",
        "",
        "CPU seconds of one epoch (features, classifier, loss, backward, Adam) over "
        f"{one['images']} pictures of {one['side']}², batches of {one['batch']}, "
        f"median over {result['rounds']} rounds in which both ways took turns, "
        f"{result['threads']} threads. The first epoch makes the features.",
        "",
        f"Machine: {m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}; "
        f"Python {v['python']}, torch {v['torch']}.",
        "",
        "| trained | stages kept | first epoch, s | whole network, s | kept, s "
        "| times faster | wanted |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in result["cases"]:
        met = "met" if c["met"] else "not met"
        wanted = f"{c['target']:g}, {met}" if c["target"] else ""
        lines.append(
            f"| {c['name']} | {c['kept_stages']} | {c['first_epoch_s']:.2f} "
            f"| {c['epoch_s']['whole']:.2f} | {c['epoch_s']['kept']:.3f} "
            f"| {c['ratio']:.1f} | {wanted} |"
        )
    if result["quick"]:
        lines += ["", "Quick: a narrow net and small pictures, no evidence."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, and write features.json and features.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    if a.quick:
        a.images, a.side, a.batch, a.rounds = 8, 32, 4, 1
    results, before = [], os.environ.get("MEDTUT_CACHE")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.environ["MEDTUT_CACHE"] = scratch
        try:
            for case in (c for c in CASES if a.only in c.name):
                results.append(measure(case, a))
                print(results[-1]["name"], results[-1]["epoch_s"], results[-1]["ratio"])
        finally:
            os.environ.pop("MEDTUT_CACHE")
            if before is not None:
                os.environ["MEDTUT_CACHE"] = before
    if not results:
        parser.error(f"no case is called like {a.only!r}")
    result = {
        "quick": a.quick,
        "rounds": a.rounds,
        "threads": a.threads,
        "machine": describe_machine(),
        "versions": versions(),
        "cases": results,
    }
    write_json(a.out / "features.json", result)
    write_text(a.out / "features.md", markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
