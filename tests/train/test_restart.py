"""Runs that are killed, and runs in two processes."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def start(script: str, *args: object, **env: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, args)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **{k: str(v) for k, v in env.items()},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> int:
    output, _ = process.communicate(timeout=120)
    if process.returncode > 0 and process.returncode != 9:
        raise AssertionError(output)
    return process.returncode


def steps_of(out: Path) -> list[tuple]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry.pop("seconds")
    return [tuple(sorted(entry.items())) for entry in entries]


# Three deaths in a row: before anything was saved, while a checkpoint was half written,
# and once more at random. Each counts from where its process began, and each comes
# early enough to strike before the run ends.
_DRAW = random.Random(20)
KILLS = [f"loss:{_DRAW.randint(2, 5)}", "write:2", f"loss:{_DRAW.randint(2, 9)}"]


def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    # The run nobody disturbs goes on beside the others: importing torch takes longest.
    calm = start("helpers.py", tmp_path / "calm", tmp_path / "calm.pt")
    out, end = tmp_path / "out", tmp_path / "end.pt"
    for kill in KILLS:
        assert finish(start("helpers.py", out, end, kill)) != 0, f"{kill}: not killed"
    assert not end.exists()
    assert list(out.glob("*.partial")) == []  # of the write that died
    assert finish(start("helpers.py", out, end)) == 0
    assert finish(calm) == 0
    result, whole = torch.load(end), torch.load(tmp_path / "calm.pt")
    for name, tensor in whole["weights"].items():
        assert torch.equal(result["weights"][name], tensor), name
    assert result["best"] == whole["best"]
    # Every step once, with the same loss.
    assert steps_of(out) == steps_of(tmp_path / "calm")


def test_two_processes_equal_one_at_the_same_global_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start("two.py", tmp_path / "one", tmp_path / "out1")]
    processes += [
        start(
            "two.py",
            tmp_path / "two",
            tmp_path / "out2",
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=2,
            LOCAL_WORLD_SIZE=2,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            ACCELERATE_USE_CPU="true",
        )
        for rank in range(2)
    ]
    assert [finish(p) for p in processes] == [0, 0, 0]
    one = torch.load(tmp_path / "one.0")
    for rank in range(2):
        two = torch.load(tmp_path / f"two.{rank}")
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(
                two["weights"][name], tensor, rtol=0, atol=1e-6, msg=name
            )
        for mine, theirs in zip(one["history"], two["history"], strict=True):
            assert mine["step"] == theirs["step"]
            for key in mine.keys() & {"loss", "score", "grad_norm"}:
                assert mine[key] == pytest.approx(theirs[key], abs=1e-6)
    # both processes hold the same bits, and one of them wrote the log
    first, second = (torch.load(tmp_path / f"two.{r}") for r in range(2))
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    assert first["best"] == second["best"]
    # each drew numbers of its own: equal dropout on both would halve its effect
    assert not set(first["drawn"]) & set(second["drawn"])
    assert len(steps_of(tmp_path / "out2")) == 12 + 3
