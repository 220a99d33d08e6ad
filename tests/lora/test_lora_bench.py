"""The benchmark's arms and files, on a tiny Swin; no timing is asserted."""

import json

import pytest
import torch

from benchmarks import lora as bench
from medtut.errors import MedtutError

from .parity import close


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def swin(seed):
        torch.manual_seed(seed)
        return transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=32,
                embed_dim=12,
                depths=[1, 1],
                num_heads=[2, 2],
                num_labels=2,
                window_size=4,
                drop_path_rate=0.0,
            )
        )

    monkeypatch.setattr(bench, "_swin", swin)


def test_all_arms_compute_the_same_step():
    """Same weights, same factors: one training loss, and the same merged output."""
    x, y = bench._batch(2, 32, 0)
    outs = []
    for arm in bench.ARMS[1:]:
        model = bench.build(arm)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == 2 * 8 * (24 + 48)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view_as(p))
        model.train()
        outs.append((model(pixel_values=x).logits, model.eval()(pixel_values=x).logits))
    for trained, still in outs[1:]:
        close(trained, outs[0][0], "training mode")
        close(still, outs[0][1], "evaluation mode")
    assert y.tolist() == [0, 1]


def test_files_are_written(tmp_path):
    result = bench.run_bench(
        tmp_path / "r", steps=2, warmup=1, size=32, memory=False, threads=1
    )
    text = (tmp_path / "r" / "lora_swin.json").read_text(encoding="utf-8")
    assert json.loads(text) == result
    assert set(result["step_cpu_s"]) == set(bench.ARMS)
    assert set(result["inference_cpu_s"]) == {"base", "merged", "unmerged"}
    assert set(result["machine"]) == {"cpu", "cores", "system", "python", "torch"}
    table = (tmp_path / "r" / "lora_swin.md").read_text(encoding="utf-8")
    assert "| medtut |" in table
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "lora_swin.json",
        "lora_swin.md",
    ]


def test_turns_rotate_and_pairs_are_within_a_round():
    order = []
    jobs = {n: (lambda n=n: order.append(n)) for n in "ab"}
    times = bench._take_turns(jobs, rounds=2, warmup=1)
    assert "".join(order) == "baabba"
    assert len(times["a"]) == 2
    pairs = {"x": [1.0, 10.0, 3.0], "y": [2.0, 5.0, 3.0]}
    assert bench._paired(pairs, "x", "y") == 1.0


def test_memory_of_an_arm_is_measured():
    found = bench._measure_memory("medtut", 2, 32, 0)
    assert 0 < found["built_mb"] <= found["peak_mb"]


def test_bad_requests(tmp_path):
    with pytest.raises(MedtutError, match="arm"):
        bench.build("qlora")
    with pytest.raises(MedtutError, match="steps"):
        bench.run_bench(tmp_path, steps=0)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(MedtutError, match="cannot write"):
        bench._save(tmp_path / "file", {"a": 1} | _RESULT)


_RESULT = {
    "settings": dict.fromkeys(
        ["model", "adapters", "size", "batch", "optimizer", "threads", "rounds"], 1
    ),
    "machine": dict.fromkeys(["cpu", "cores", "system", "python", "torch"], 1),
    "step_cpu_s": {},
    "inference_cpu_s": {},
    "targets": {},
    "memory": {},
}
