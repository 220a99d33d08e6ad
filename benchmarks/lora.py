"""Step time, memory and inference time of LoRA on Swin-Tiny (``medtut bench lora``).

Arms: full fine-tuning, our layers, Hugging Face peft, and loralib's rule (separate
products, merged on ``eval()``), all on the same random weights, rank 8 on query and
value, dropout 0. The arms take turns within one run and CPU time is compared, so that
load on the machine hits all of them alike. Memory is the peak of one process per arm.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtut.errors import MedtutError
from medtut.files import write_json, write_text
from medtut.lora.inject import LoRAConfig, inject, merge, replace_modules
from medtut.lora.roles import scan
from medtut.machine import describe_machine, peak_memory, versions

ARMS = ("full", "medtut", "peft", "loralib rule")
R, ALPHA = 8, 16.0


class LoralibRule(nn.Module):
    """loralib's arithmetic: two products beside the base, merged by ``eval()``."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale, self.merged = alpha / r, False
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def train(self, mode: bool = True) -> LoralibRule:
        super().train(mode)
        if self.merged == mode:
            sign = -1 if mode else 1
            change = (self.lora_B @ self.lora_A).detach() * self.scale
            self.base.weight.data += sign * change
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base.weight, self.base.bias)
        if not self.merged:
            y = y + (x @ self.lora_A.T @ self.lora_B.T) * self.scale
        return y


def _swin(seed: int) -> nn.Module:
    try:
        import peft  # noqa: F401  needed later: say so before anything is measured
        from transformers import SwinConfig, SwinForImageClassification
    except ImportError as error:
        raise MedtutError(
            "the benchmark needs transformers and peft: pip install 'medtut[test]'"
        ) from error
    torch.manual_seed(seed)
    config = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        num_labels=2,
        drop_path_rate=0.0,
    )
    return SwinForImageClassification(config)


def build(arm: str, seed: int = 0) -> nn.Module:
    """Swin-Tiny for one arm; the same random base weights for all."""
    model = _swin(seed)
    if arm == "medtut":
        inject(model, LoRAConfig(r=R, alpha=ALPHA))
    elif arm in ("peft", "loralib rule"):
        chosen = [c for c in scan(model) if c.roles & {"query", "value"}]
        model.requires_grad_(False)
        if arm == "peft":
            import peft

            names = [c.name for c in chosen]
            config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=names)
            model = peft.get_peft_model(model, config)
        else:
            new = {id(c.module): LoralibRule(c.module, R, ALPHA) for c in chosen}
            replace_modules(model, new)
    elif arm != "full":
        raise MedtutError(f"unknown arm {arm!r}; arms are {', '.join(ARMS)}")
    return model


def _stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(pixel_values=x).logits, y).backward()
        optimizer.step()

    return step


def _take_turns(
    jobs: dict[str, Callable[[], object]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """CPU seconds of each job per round; the order rotates."""
    names = list(jobs)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(-warmup, rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.process_time()
                jobs[name]()
                if i >= 0:
                    times[name].append(time.process_time() - start)
    finally:
        gc.enable()
    return times


def _memory_of(arm: str, batch: int, size: int, threads: int, seed: int) -> dict:
    """Peak memory of an arm in a process of its own: before, and over two steps."""
    code = (
        "import json, torch; from benchmarks import lora; "
        f"torch.set_num_threads({threads}); "
        f"print(json.dumps(lora._measure_memory({arm!r}, {batch}, {size}, {seed})))"
    )
    root = Path(__file__).parents[1]  # where a process with -c finds this file
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root)
    if result.returncode:
        tail = result.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise MedtutError(f"the memory run of {arm} failed: {' '.join(tail)}")
    return json.loads(result.stdout.splitlines()[-1])


def _measure_memory(arm: str, batch: int, size: int, seed: int) -> dict[str, float]:
    model = build(arm, seed)
    built = peak_memory()
    step = _stepper(model, *_batch(batch, size, seed))
    for _ in range(2):
        step()
    return {
        "built_mb": round(built / 1e6, 1),
        "peak_mb": round(peak_memory() / 1e6, 1),
    }


def _batch(batch: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x, torch.arange(batch) % 2


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(v), 4) for name, v in times.items()}


def _paired(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of the ratio within a round."""
    pairs = zip(times[a], times[b], strict=True)
    return statistics.median(x / y for x, y in pairs)


def run_bench(
    out: Path = Path("benchmarks/results"),
    *,
    steps: int = 30,
    warmup: int = 3,
    threads: int = 1,
    batch: int = 2,
    size: int = 224,
    memory: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure and write ``lora_swin.json`` and ``lora_swin.md`` into ``out``.

    Parameters
    ----------
    out : Path
        Folder for the two files.
    steps, warmup : int
        Rounds measured, and rounds thrown away before.
    threads : int
        Threads of PyTorch.
    batch, size : int
        Images per step, and their side in pixels.
    memory : bool
        Also run one process per arm for its peak memory.
    seed : int

    Returns
    -------
    dict
        Settings, machine, CPU-second medians, paired ratios, memory, and for the two
        targets (a step at most 1.00 of peft's, merged inference within 3 % of the
        base) whether they were met.

    Raises
    ------
    MedtutError
        If transformers or peft is missing, or the folder cannot be written.
    """
    if steps < 1:
        raise MedtutError(f"steps must be at least 1, not {steps}")
    peaks = {}
    if memory:
        peaks = {arm: _memory_of(arm, batch, size, threads, seed) for arm in ARMS}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, y = _batch(batch, size, seed)
        jobs = {arm: _stepper(build(arm, seed), x, y) for arm in ARMS}
        step_times = _take_turns(jobs, steps, warmup)
        jobs.clear()
        infer_times = _take_turns(_inference_jobs(x, seed), steps, warmup)
    finally:
        torch.set_num_threads(before)
    to_peft = {arm: round(_paired(step_times, arm, "peft"), 4) for arm in step_times}
    to_base = {k: round(_paired(infer_times, k, "base"), 4) for k in infer_times}
    result = {
        "settings": {
            "model": "Swin-Tiny, random weights",
            "adapters": f"query and value, r={R}, alpha={ALPHA:g}, dropout 0",
            "batch": batch,
            "size": size,
            "threads": threads,
            "rounds": steps,
            "optimizer": "AdamW",
        },
        "machine": {
            **{k: describe_machine()[k] for k in ("cpu", "cores", "system")},
            **{k: versions()[k] for k in ("python", "torch")},
        },
        "step_cpu_s": _medians(step_times),
        "step_ratio_to_peft": to_peft,
        "inference_cpu_s": _medians(infer_times),
        "inference_ratio_to_base": to_base,
        "memory": peaks,
        "targets": {
            "step at most 1.00 of peft": _paired(step_times, "medtut", "peft") <= 1,
            "merged inference within 3 % of base": abs(
                _paired(infer_times, "merged", "base") - 1
            )
            <= 0.03,
        },
    }
    _save(Path(out), result)
    return result


def _inference_jobs(x: Tensor, seed: int) -> dict[str, Callable[[], object]]:
    base, merged, apart = _swin(seed), build("medtut", seed), build("medtut", seed)
    merge(merged)

    def job(model: nn.Module) -> Callable[[], object]:
        model.eval()

        def run() -> None:
            with torch.no_grad():
                model(pixel_values=x)

        return run

    return {"base": job(base), "merged": job(merged), "unmerged": job(apart)}


def to_markdown(result: dict[str, Any]) -> str:
    """The result as two short tables."""
    s, m = result["settings"], result["machine"]
    lines = [
        f"# LoRA on {s['model']}",
        "",
        f"{s['adapters']}; {s['size']}² pixels, batch {s['batch']}, {s['optimizer']}, "
        f"{s['threads']} thread(s). Medians of CPU time over {s['rounds']} rounds in "
        "which the arms took turns; ratios are medians of the ratio within a round.",
        "",
        f"Machine: {m['cpu']}, {m['cores']} cores, {m['system']}, Python "
        f"{m['python']}, torch {m['torch']}.",
        "",
        "| training step | CPU s | to peft | peak MB |",
        "|---|---:|---:|---:|",
    ]
    for arm, seconds in result["step_cpu_s"].items():
        peak = result["memory"].get(arm, {}).get("peak_mb", "not measured")
        ratio = result["step_ratio_to_peft"][arm]
        lines.append(f"| {arm} | {seconds:.3f} | {ratio:.3f} | {peak} |")
    lines += ["", "| inference | CPU s | to base |", "|---|---:|---:|"]
    for name, seconds in result["inference_cpu_s"].items():
        ratio = result["inference_ratio_to_base"][name]
        lines.append(f"| {name} | {seconds:.3f} | {ratio:.3f} |")
    lines.append("")
    for text, met in result["targets"].items():
        lines.append(f"- {text}: {'met' if met else 'not met'}")
    return "\n".join(lines) + "\n"


def _save(out: Path, result: dict[str, Any]) -> None:
    write_json(out / "lora_swin.json", result)
    write_text(out / "lora_swin.md", to_markdown(result))


def main() -> None:
    """Run the benchmark, show its table and write it."""
    from rich.console import Console
    from rich.markdown import Markdown

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    Console().print(Markdown(to_markdown(run_bench(out))))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
