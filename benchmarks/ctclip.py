"""CT-CLIP as published and ours, part by part (``medtut bench ctclip``).

Arms with the same shapes, batch and optimizer take turns within one run: the published
module as it was, ours computing the same function, each switch alone, all on. A GPU is
timed by its events, a CPU by its own seconds, which other programs disturb less. Peak
memory is that of one process per arm. The text tower is left out: features are given.

    python benchmarks/ctclip.py            # published shape on a GPU, quick on a CPU
    python benchmarks/ctclip.py --quick    # tiny sizes, no evidence, no files

An interrupted run goes on where it was, after the same command.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # run as a file, which sees its own folder only
    sys.path.insert(0, str(ROOT))

from benchmarks.ctclip_arms import (  # noqa: E402
    ALL_ON,
    ARMS,
    BASE,
    MAY_FAIL,
    SHAPES,
    TEXT_WIDTH,
    Shape,
    precision,
    prepare,
)
from benchmarks.ctclip_page import to_markdown  # noqa: E402
from medtut.errors import MedtutError  # noqa: E402
from medtut.files import read_json, write_json, write_text  # noqa: E402
from medtut.machine import describe_machine, peak_memory, versions  # noqa: E402
from medtut.models.ct_attention import attention_memory  # noqa: E402
from medtut.models.ctclip import CTCLIP  # noqa: E402

OUT = ROOT / "benchmarks" / "results"
PARTS = ("visual", "backward", "total")


class Turn:
    """Training steps of one arm; its model goes to the device, and back by `leave`."""

    def __init__(self, name: str, model: CTCLIP, shape: Shape, batch: int, device: str):
        self.model, self.device = model.to(device).train(), device
        dtype = precision(ARMS[name], device)
        self.cast = {"device_type": device, "dtype": dtype} if dtype else None
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        self.trained = list(model.parameters())
        decay = [p for p in self.trained if p.dim() > 1]
        rest = [p for p in self.trained if p.dim() <= 1]
        groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, 1.25e-6, (0.9, 0.99))
        like = {"generator": torch.Generator().manual_seed(1)}
        image = model.image_tower.image
        self.x = torch.rand(batch, 1, *image, **like).mul_(2).sub_(1).to(device)
        self.text = torch.randn(batch, TEXT_WIDTH, **like).to(device)

    def mark(self) -> Any:
        if self.device == "cpu":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self) -> dict[str, float]:
        """One step as published, without profiling; seconds of its parts."""
        model, scaler = self.model, self.scaler
        begin = self.mark()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(**self.cast) if self.cast else nullcontext():
            start = self.mark()
            image = model.encode_image(self.x)
            seen = self.mark()
            loss = model.loss(image, model.encode_text(self.text))
        forward = self.mark()
        scaler.scale(loss).backward()
        back = self.mark()
        scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, 0.5)
        scaler.step(self.optimizer)
        scaler.update()
        end = self.mark()
        if self.device == "cuda":
            torch.cuda.synchronize()
        pairs = ((start, seen), (forward, back), (begin, end))
        apart = (
            b - a if self.device == "cpu" else a.elapsed_time(b) / 1e3 for a, b in pairs
        )
        return dict(zip(PARTS, apart, strict=True))

    def warm_up(self, steps: int) -> None:
        """At least so many, and until one was not skipped for its float16 gradients.

        Before that, the optimizer holds no numbers: a step costs less time and memory.
        """
        for done in range(50):
            if done >= steps and self.optimizer.state:
                return
            self.step()
        raise MedtutError("50 steps in a row had gradients that are not finite")

    def leave(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.to("cpu")
        del self.optimizer, self.x, self.text
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


# -- memory: one process per arm -------------------------------------------------------
def measure_memory(name: str, shape: Shape, batch: int, device: str) -> dict[str, Any]:
    """Peak of two training steps in this process, in bytes; or why there is none."""
    before = 0 if device == "cuda" else peak_memory()
    try:
        model = prepare(name, shape)
        turn = Turn(name, model, shape, batch, device)
        turn.warm_up(2)
    except torch.cuda.OutOfMemoryError:
        return {"full": True}
    except Exception as error:
        if name not in MAY_FAIL:
            raise
        return {"skipped": " ".join(str(error).split())[:160]}
    cuda = device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
    count = sum(p.numel() for p in model.parameters())
    return {"peak": peak, "model": peak - before, "parameters": count}


def _apart(name: str, which: str, batch: int, device: str, threads: int) -> dict:
    """`measure_memory` in a process of its own."""
    code = (
        "import json, torch; from benchmarks import ctclip as b; "
        f"torch.set_num_threads({threads}); print(json.dumps("
        f"b.measure_memory({name!r}, b.SHAPES[{which!r}], {batch}, {device!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    if done.returncode:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise MedtutError(f"the memory run of {name!r} failed: {' '.join(tail)}")
    return json.loads(done.stdout.splitlines()[-1])


def memories(
    state: dict, which: str, device: str, threads: int, save: Any, apart: bool
) -> None:
    """Fill ``state["memory"]``; on a GPU halve the batch until every arm fits."""
    while missing := [n for n in state["arms"] if n not in state["memory"]]:
        batch, name = state["batch"], missing[0]
        if apart:
            found = _apart(name, which, batch, device, threads)
        else:
            found = measure_memory(name, SHAPES[which], batch, device)
        if found.get("full"):
            if batch == 1:
                raise MedtutError(
                    f"{name!r} does not fit into this GPU at batch 1; take a larger "
                    "one, or --shape quick."
                )
            state["batch"], state["memory"] = batch // 2, {}
        else:
            state["memory"][name] = found
        save()


# -- time: the arms take turns ---------------------------------------------------------
def times(state: dict, shape: Shape, device: str, save: Any) -> None:
    """Fill ``state["rounds"]``: for each, seconds of the parts per arm."""
    if len(state["rounds"]) >= shape.rounds:
        return
    names = [n for n in state["arms"] if "skipped" not in state["memory"][n]]
    models = {name: prepare(name, shape) for name in names}
    while (i := len(state["rounds"])) < shape.rounds:
        shift, seconds = i * 5 % len(names), {}
        for name in names[shift:] + names[:shift]:
            turn = Turn(name, models[name], shape, state["batch"], device)
            turn.warm_up(shape.warmup + (i == 0))
            found = [turn.step() for _ in range(shape.steps)]
            turn.leave()
            seconds[name] = {
                part: statistics.median(f[part] for f in found) for part in PARTS
            }
        state["rounds"].append(seconds)
        save()


def attention_table(shape: Shape, device: str) -> list[dict[str, Any]]:
    """Bytes of one attention against the number of tokens; None where refused."""
    like = {"device": device}
    if device == "cuda":
        like["dtype"] = torch.float16
    rows = []
    for backend in ("explicit", "fused", "flash"):
        for bias in ("none", "fixed", "trained"):
            found = []
            for n in shape.tokens:
                try:
                    found.append(attention_memory(backend, n, bias, **like))
                except (MedtutError, RuntimeError):
                    found.append(None)
            rows.append({"backend": backend, "bias": bias, "bytes": found})
    return rows


# -- one run ---------------------------------------------------------------------------
def run_bench(
    out: Path = OUT,
    shape: str | None = None,
    *,
    batch: int | None = None,
    threads: int = 1,
    arms: list[str] | None = None,
    device: str | None = None,
    apart: bool = True,
) -> dict[str, Any]:
    """Measure, write ``ctclip_<cpu|gpu>.json`` and ``ctclip.md`` from all there are.

    Parameters
    ----------
    out : Path
        Folder of the files. A result for the other kind of device stays.
    shape : {"published", "quick", "test"}, optional
        Published on a GPU, else quick.
    batch : int, optional
        Volumes per step; on a GPU where halving begins.
    threads : int
        Of PyTorch on the CPU.
    arms : list of str, optional
        Of `ARMS`; the first must be "published as it was". All by default.
    device : {"cpu", "cuda"}, optional
        A GPU where there is one.
    apart : bool
        A process of its own for each arm's memory; without, memory means nothing.

    Raises
    ------
    MedtutError
        For an unknown shape, arm, or the published shape without a GPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    which = shape or ("published" if device == "cuda" else "quick")
    arms = list(arms or ARMS)
    if which not in SHAPES:
        raise MedtutError(f"--shape {which}: choose one of {', '.join(SHAPES)}.")
    if which == "published" and device == "cpu":
        raise MedtutError(
            "--shape published needs a CUDA GPU: 13,824 tokens per volume and 349 "
            "million parameters. On a CPU use --shape quick."
        )
    if arms[0] != BASE or not set(arms) <= set(ARMS):
        raise MedtutError(f"arms: {BASE!r} first, then any of {', '.join(ARMS)}.")
    sizes, kind = SHAPES[which], "gpu" if device == "cuda" else "cpu"
    if batch is not None and batch < 2:
        raise MedtutError(f"--batch {batch}: a contrastive loss needs at least 2.")
    machine = describe_machine() | versions()
    settings = {
        "shape": which,
        "tower": sizes.tower,
        "started_at_batch": batch or sizes.batch,
        "threads": threads,
        "rounds": sizes.rounds,
        "steps": sizes.steps,
        "apart": apart,
        "arms": arms,
        "machine": {k: machine.get(k) for k in ("cpu", "device", "python", "torch")},
    }
    part, out = Path(out) / f"ctclip_{kind}.part.json", Path(out)
    settings = json.loads(json.dumps(settings))
    state = read_json(part, {})
    if state.get("settings") != settings:
        state = {"settings": settings, "arms": arms, "memory": {}, "rounds": []}
        state["batch"] = batch or sizes.batch

    def save() -> None:
        write_json(part, state)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memories(state, which, device, threads, save, apart)
        times(state, sizes, device, save)
    finally:
        torch.set_num_threads(before)
    result = summary(state, machine)
    result["attention"] = attention_table(sizes, device)
    result["tokens"] = list(sizes.tokens)
    write_json(out / f"ctclip_{kind}.json", result)
    both = {k: read_json(out / f"ctclip_{k}.json") for k in ("cpu", "gpu")}
    write_text(out / "ctclip.md", to_markdown(both))
    part.unlink(missing_ok=True)
    return result


def summary(state: dict, machine: dict) -> dict[str, Any]:
    """Medians, ratios to the first row (of each round), and what was promised."""
    rounds, memory, rows = state["rounds"], state["memory"], {}
    for name in state["arms"]:
        if "skipped" in memory[name]:
            rows[name] = {"skipped": memory[name]["skipped"]}
            continue
        row: dict[str, Any] = {"parameters": memory[name]["parameters"]}
        for part in PARTS:
            row[f"{part}_s"] = statistics.median(r[name][part] for r in rounds)
            speeds = [r[BASE][part] / r[name][part] for r in rounds]
            row[f"{part}_speedup"] = round(statistics.median(speeds), 3)
            if part == "total":
                row["total_speedup_range"] = [round(f(speeds), 3) for f in (min, max)]
        if state["settings"]["apart"]:  # else all arms share one process's peak
            one, base = memory[name], memory[BASE]["model"]
            row["peak_mb"] = round(one["peak"] / 1e6, 1)
            row["model_mb"] = round(one["model"] / 1e6, 1)
            row["memory_ratio"] = round(one["model"] / base, 3)
        rows[name] = row
    top = rows.get(ALL_ON, {})
    keys = ("cpu", "cores", "memory_gb", "system", "device", "python", "torch")
    return {
        "settings": state["settings"] | {"batch": state["batch"]},
        "machine": {k: machine.get(k) for k in keys},
        "arms": rows,
        "memory_ratio": top.get("memory_ratio"),
        "step_speedup": top.get("total_speedup"),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, write its files and show the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--shape", choices=("published", "quick"))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny, no files")
    a = parser.parse_args(argv)
    if a.quick:
        few = [n for n in ARMS if n != "all on, compiled"]
        with tempfile.TemporaryDirectory() as scratch:
            run_bench(Path(scratch), "test", arms=few, apart=False, threads=a.threads)
            print((Path(scratch) / "ctclip.md").read_text(encoding="utf-8"))
        return
    run_bench(a.out, a.shape, batch=a.batch, threads=a.threads)
    print((a.out / "ctclip.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
