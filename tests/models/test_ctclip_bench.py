"""The benchmark's arms and files, on a tiny CT-CLIP; no timing is asserted."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import ctclip as bench
from benchmarks import ctclip_arms as arms
from medtut import cli
from medtut.errors import MedtutError
from medtut.lora import find_dead
from medtut.models.published_ctclip import norms_by_type

TINY = arms.SHAPES["test"]
UNEVEN = replace(TINY, tower=TINY.tower | {"image": (6, 8, 16)})  # grid 3 x 2 x 4
FEW = [arms.BASE, arms.SAME, arms.ALL_ON]


def go(out, names=FEW, **kw):
    return bench.run_bench(out, "test", device="cpu", arms=names, apart=False, **kw)


def vectors(name, state=None):
    """Image vectors of an arm, with the weights of the first row where they fit."""
    model = arms.build(name, UNEVEN)
    if state:
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert all("image_tower.bias" in m or m == "logit_bias" for m in missing)
    x = torch.randn(2, 1, 6, 8, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.encode_image(x)


def test_same_function_is_the_published_one_and_its_neighbours_are_not():
    model = arms.build(arms.BASE, UNEVEN)
    state = model.state_dict()
    want = vectors(arms.BASE, state)
    for name in state:  # GEGLU's halves are the other way round
        if name.endswith("to_gate_value.weight"):
            state[name] = torch.cat(state[name].chunk(2)[::-1])
    for name in (arms.SAME, "same function, written out", "sigmoid alone"):
        torch.testing.assert_close(vectors(name, state), want, rtol=0, atol=1e-5)
    for name, own in (("swiglu alone", state), ("same, fused, bias used", state)):
        assert (vectors(name, own) - want).abs().max() > 1e-4, name
    assert (vectors("rms alone", state) - want).abs().max() > 1e-4


def test_each_arm_is_what_its_name_says():
    base = arms.build("same function, written out", TINY)
    start = base.config | base.image_tower.config
    changes = {
        arms.SAME: {"attention": "fused"},
        "rms alone": {"norm": "rms"},
        "swiglu alone": {"ffn": "swiglu"},
        "sigmoid alone": {"loss": "sigmoid"},
        "bf16 alone": {},
        "width by 64 alone": {"ffn_multiple": 64},
    }
    on = {"attention": "fused", "norm": "rms", "ffn": "swiglu", "ffn_multiple": 64}
    on |= {"loss": "sigmoid"}
    changes |= {
        arms.ALL_ON: on,
        "all on, without bf16": on,
        "all on, bias used": on | {"position": "bias"},
        "all on, rope": on | {"position": "rope"},
        "all on, checkpointing": on | {"checkpoint": True},
        "all on, attention pooling": on | {"projection": "attention"},
        "all on, low rank 64": on | {"projection": "low_rank"},
        "all on, compiled": on,
        "all on, flash-attn": on | {"attention": "flash"},
        "all on, softmax": {k: v for k, v in on.items() if k != "loss"},
    }
    for name, change in changes.items():
        model = arms.build(name, TINY)
        found = model.config | model.image_tower.config
        differs = {k: v for k, v in found.items() if v != start[k]}
        differs.pop("image_tower", None)
        assert differs == change, name
        wide = arms.precision(arms.ARMS[name], "cpu")
        bf16 = name == "bf16 alone" or (name.startswith("all on") and "out" not in name)
        assert (wide is torch.bfloat16) == bf16, name
        assert arms.ARMS[name].compiled == name.endswith("compiled")
        kind = "RMSNorm" if "norm" in change else "LayerNorm"
        assert set(norms_by_type(model.image_tower)) == {kind}, name
    assert arms.precision(arms.ARMS[arms.BASE], "cuda") is torch.float16


@pytest.mark.parametrize("name", [arms.BASE, arms.ALL_ON, "same, fused, bias used"])
def test_only_the_published_one_has_parameters_out_of_reach(name):
    model = arms.build(name, TINY)
    volumes = torch.randn(2, 1, *model.image_tower.image)
    loss = model.loss(*model(volumes, torch.randn(2, arms.TEXT_WIDTH)))
    assert bool(find_dead(model, loss)) == (name == arms.BASE)


def test_parts_of_a_step(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench.Turn, "mark", lambda self: next(clock))
    model = arms.build(arms.BASE, TINY)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    turn = bench.Turn(arms.BASE, model, TINY, 2, "cpu")
    assert turn.step() == {"visual": 1, "backward": 1, "total": 5}
    turn.leave()
    moved = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert "to_image.1.weight" in moved
    assert all(p.grad is None for p in model.parameters())


def test_warm_up_waits_for_a_step_that_counts(monkeypatch):
    turn = bench.Turn(arms.SAME, arms.build(arms.SAME, TINY), TINY, 2, "cpu")
    steps = []

    def step():  # the third is the first with finite gradients
        steps.append(1)
        if len(steps) == 3:
            turn.optimizer.state["p"] = 1

    monkeypatch.setattr(turn, "step", step)
    turn.warm_up(1)
    assert len(steps) == 3
    turn.warm_up(2)
    assert len(steps) == 5
    turn.optimizer.state.clear()
    with pytest.raises(MedtutError, match="not finite"):
        turn.warm_up(0)


# -- files -----------------------------------------------------------------------------
def test_files_of_both_devices(tmp_path):
    names = [*FEW, "all on, flash-attn", "all on, softmax"]
    result = go(tmp_path, names)
    text = (tmp_path / "ctclip_cpu.json").read_text(encoding="utf-8")
    assert json.loads(text) == result
    assert set(result["arms"]) == set(names)
    assert result["arms"]["all on, flash-attn"] == {
        "skipped": "flash-attn is not installed"
    }
    assert result["arms"][arms.BASE]["total_speedup"] == 1
    page = (tmp_path / "ctclip.md").read_text(encoding="utf-8")
    assert f"| {arms.BASE} | 1.00 |  |  |  |" in page  # GPU cells are empty
    assert "## GPU" not in page
    assert "are untested" in page
    gpu = json.loads(text)
    gpu["settings"]["shape"], gpu["memory_ratio"], gpu["step_speedup"] = (
        "published", 0.5, 1.4,
    )  # fmt: skip
    gpu["arms"][arms.BASE]["memory_ratio"] = 0.75
    other = tmp_path / "ctclip_gpu.json"
    other.write_text(json.dumps(gpu), encoding="utf-8")
    kept = other.read_bytes()
    go(tmp_path)
    page = (tmp_path / "ctclip.md").read_text(encoding="utf-8")
    assert other.read_bytes() == kept
    assert f"| {arms.BASE} | 1.00 |  | 1.00 | 0.75 |" in page
    for text in ("## CPU", "## GPU", "0.50, met", "1.40, not met"):
        assert text in page
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ctclip.md", "ctclip_cpu.json", "ctclip_gpu.json",
    ]  # fmt: skip


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    sizes = replace(TINY, rounds=3)
    monkeypatch.setitem(bench.SHAPES, "test", sizes)
    real, calls = bench.Turn, []

    class Stops(real):
        def __init__(self, name, *rest):
            calls.append(name)
            if len(calls) == 3 + 3 + 2:  # memory, one round, and into the second
                raise KeyboardInterrupt
            super().__init__(name, *rest)

    monkeypatch.setattr(bench, "Turn", Stops)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    part = tmp_path / "ctclip_cpu.part.json"
    first = json.loads(part.read_text(encoding="utf-8"))["rounds"]
    assert len(first) == 1
    seen = {}
    monkeypatch.setattr(bench, "summary", lambda s, m: seen.update(s) or _summary(s, m))
    calls[:] = ["again"] * 100
    go(tmp_path)
    assert len(calls) == 100 + 2 * 3  # no memory again, two rounds of three arms
    assert seen["rounds"][0] == first[0]
    assert calls[-6:-3] != calls[-3:]  # the order rotates
    assert not part.exists()
    part.write_text(json.dumps(seen | {"settings": {}}), encoding="utf-8")
    calls[:] = ["anew"] * 100
    go(tmp_path)
    assert len(calls) == 100 + 3 + 9  # other settings: nothing is taken over


_summary = bench.summary


def test_ratios_are_within_a_round():
    rounds = [
        {arms.BASE: dict.fromkeys(bench.PARTS, a), "x": dict.fromkeys(bench.PARTS, b)}
        for a, b in ((1.0, 4.0), (10.0, 5.0), (3.0, 3.0))
    ]
    one = {"peak": 4e8, "model": 2e8, "parameters": 7}
    state = {"rounds": rounds, "memory": {arms.BASE: one, "x": one | {"model": 5e7}}}
    state |= {"arms": [arms.BASE, "x"], "settings": {"apart": True}, "batch": 2}
    row = bench.summary(state, {})["arms"]["x"]
    assert row["total_speedup"] == 1.0
    assert row["total_speedup_range"] == [0.25, 2.0]
    assert (row["memory_ratio"], row["peak_mb"]) == (0.25, 400.0)


def test_the_batch_is_halved_until_all_fit(monkeypatch):
    limit, asked = {arms.BASE: 16, arms.SAME: 4}, []

    def fake(name, shape, batch, device):
        asked.append((name, batch))
        return {"full": True} if batch > limit[name] else {"peak": batch}

    monkeypatch.setattr(bench, "measure_memory", fake)
    state = {"arms": list(limit), "memory": {}, "batch": 32}
    bench.memories(state, "test", "cuda", 1, lambda: None, False)
    assert state["batch"] == 4
    assert state["memory"] == {n: {"peak": 4} for n in limit}  # all at one batch
    limit[arms.SAME], state = 0, state | {"memory": {}}
    with pytest.raises(MedtutError, match="does not fit"):
        bench.memories(state, "test", "cuda", 1, lambda: None, False)


def test_what_may_fail_is_named_and_left_out(monkeypatch):
    def broken(*args, **kw):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    found = bench.measure_memory("all on, compiled", TINY, 2, "cpu")
    assert found == {"skipped": "no compiler here"}
    monkeypatch.setattr(bench, "prepare", broken)
    with pytest.raises(RuntimeError):
        bench.measure_memory(arms.SAME, TINY, 2, "cpu")


def test_bad_requests(tmp_path):
    for kw, says in (
        ({"shape": "huge"}, "choose one of"),
        ({"shape": "published", "device": "cpu"}, "needs a CUDA GPU"),
        ({"shape": "test", "arms": ["all on"]}, "first"),
        ({"shape": "test", "arms": [arms.BASE, "qk"]}, "first"),
        ({"shape": "test", "batch": 1}, "at least 2"),
    ):
        with pytest.raises(MedtutError, match=says):
            bench.run_bench(tmp_path, **{"device": "cpu"} | kw)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(MedtutError, match="cannot write"):
        go(tmp_path / "file")


def test_medtut_bench_hands_its_options_on(monkeypatch):
    seen = []

    def run_path(path, run_name):
        seen.append((path.replace("\\", "/").split("/")[-1], sys.argv[1:]))

    monkeypatch.setattr(runpy, "run_path", run_path)
    monkeypatch.setattr(sys, "argv", ["medtut"])
    line = ["bench", "ctclip", "--out", "here", "--shape", "quick", "--quick"]
    assert CliRunner().invoke(cli.app, line).exit_code == 0
    want = ["--out", "here", "--shape", "quick", "--quick"]
    assert seen == [("ctclip.py", want)]
