"""The page that ``medtut bench ctclip`` writes from its results."""

from __future__ import annotations

from benchmarks.ctclip_arms import ARMS, BY_LOSS

LOSS_ONLY = {n for pair in BY_LOSS.values() for n in pair} - set(BY_LOSS)


def _cells(result: dict | None, name: str, *keys: str) -> list[str]:
    row = (result or {}).get("arms", {}).get(name, {})
    if "skipped" in row:
        return ["not run", *[""] * (len(keys) - 1)]
    styles = {"_s": "{:.4f}", "_mb": "{:,.0f}", "parameters": "{:,}"}
    style = (
        next((f for e, f in styles.items() if k.endswith(e)), "{:.2f}") for k in keys
    )
    return [
        f.format(row[k]) if k in row else "" for k, f in zip(keys, style, strict=True)
    ]


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    head = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    return ["", *head, *(f"| {' | '.join(row)} |" for row in rows)]


def _device(kind: str, result: dict) -> list[str]:
    """The tables of one device."""
    s, m, rows = result["settings"], result["machine"], result["arms"]
    unit = "GPU seconds (events)" if kind == "gpu" else "CPU seconds"
    where = (
        f"{m['device']}, " if kind == "gpu" else f"{s['threads']} thread(s), "
    ) + f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}"
    loads = "the most PyTorch had allocated"
    if kind == "cpu":
        loads = (
            "the most the process held; model MB and its ratio leave out what Python "
            "and the libraries took before the model was built"
        )
    if not s["apart"]:
        loads = "not measured"
    lines = [
        "", f"## {kind.upper()}", "",
        f"{where}; Python {m['python']}, torch {m['torch']}. Shape {s['shape']}"
        + (f" ({s['tower']})" if s["tower"] else "") + f", batch {s['batch']}. "
        f"{unit}: medians over {s['rounds']} rounds; speed-ups are medians of the "
        f"ratio within a round, with the least and the most. Memory is {loads}.",
    ]  # fmt: skip
    keys = ("visual_s", "backward_s", "total_s", "visual_speedup", "backward_speedup")
    keys += ("total_speedup", "peak_mb", "model_mb", "memory_ratio", "parameters")
    titles = ["arm", "visual", "backward", "step", "× visual", "× backward"]
    titles += ["× step", "peak MB", "model MB", "memory ratio", "parameters", "range"]
    shown = [n for n in rows if n not in LOSS_ONLY]
    table = []
    for n in shown:
        span = rows[n].get("total_speedup_range")
        ends = "–".join(f"{x:.2f}" for x in span) if span else ""
        table.append([n, *_cells(result, n, *keys), ends])
    lines += _table(titles, table)
    for n in shown:
        if "skipped" in rows[n]:
            lines += ["", f"{n}: not run, {rows[n]['skipped']}"]
    table = [
        [title, loss, *_cells(result, n, "visual_s", "backward_s", "total_s")]
        for title, pair in BY_LOSS.items()
        for n, loss in zip(pair, ("softmax", "sigmoid"), strict=True)
    ]
    lines += ["", "### By part and loss"]
    lines += _table(["arm", "loss", "visual", "backward", "step"], table)
    tokens = result["tokens"]
    lines += [
        "", "### Memory of one attention against its tokens", "",
        "8 heads of 32, batch 1, kB "
        + ("at the peak of forward and backward, float16." if kind == "gpu" else
           "kept for the backward pass, bias included, float32.")
        + " Four times the tokens: 4 is linear, 16 the square.",
    ]  # fmt: skip
    table = []
    for one in result["attention"]:
        known = [f"{b / 1e3:,.0f}" if b else "refused" for b in one["bytes"]]
        a, b = one["bytes"][-2:]
        table.append([f"{one['backend']}, bias {one['bias']}", *known])
        table[-1].append(f"{b / a:.1f}" if a and b else "")
    return lines + _table(["attention", *map(str, tokens), "4 × tokens"], table)


def to_markdown(both: dict[str, dict | None]) -> str:
    """One page of the results there are; a device without one has empty cells."""
    keys = ("total_speedup", "memory_ratio")
    names = [n for n in ARMS if n not in LOSS_ONLY]
    rows = [
        [n, *_cells(both["cpu"], n, *keys), *_cells(both["gpu"], n, *keys)]
        for n in names
    ]
    lines = [
        "# CT-CLIP: the published module and ours",
        "",
        "Step and memory against the first row, which is the published module as it "
        "was (CT-ViT with its unused decoder, second projections and position network; "
        "softmax loss; float16 autocast on a GPU, float32 on a CPU; unprofiled; its "
        "codebook left out, which costs it less here than it did). Same volumes, "
        "batch, optimizer (AdamW, gradients clipped at 0.5), taking turns in one run. "
        "The text tower is left out: its features are given. More than 1 × step is "
        "faster; less than 1 in memory is less.",
        "",
        "“Same function” has the published outputs to rounding, and so leaves the "
        "position bias out, as the published code does; “bias used” adds it, and "
        "trains it. "
        "“Alone” turns one switch in the function written out; the fused attention "
        "alone is the third row. “All on” is fused, RMSNorm, SwiGLU, sigmoid, bfloat16 "
        "and a width that is a multiple of 64, without the bias and without "
        "checkpointing; the rows below it change one thing each. A network as narrow "
        "as the quick shape's says little about the published one.",
    ]
    titles = ["arm", "CPU × step", "CPU memory", "GPU × step", "GPU memory"]
    lines += _table(titles, rows)
    for kind, result in both.items():
        if result:
            lines += _device(kind, result)
    gpu = both["gpu"]
    if gpu and gpu["settings"]["shape"] == "published" and gpu["step_speedup"]:
        speed, memory = gpu["step_speedup"], gpu["memory_ratio"]
        met = {True: "met", False: "not met"}
        lines += [
            "",
            f"- all on, memory at most 0.55: {memory:.2f}, {met[memory <= 0.55]}",
            f"- all on, step at least 1.5 ×: {speed:.2f}, {met[speed >= 1.5]}",
        ]
    else:
        lines += [
            "",
            "No GPU at the published shape yet: at most 0.55 of the memory and 1.5 × "
            "the step are untested.",
        ]
    return "\n".join(lines) + "\n"
