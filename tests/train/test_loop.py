"""The loop, in one process."""

import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from helpers import Data, Net, mse, validate

from medtut.train import TrainConfig, TrainError, TrainingInterrupted, checkpoint, fit
from medtut.train.order import Batches, Seeded, epoch_order


def run(model=None, loss=mse, data=None, **options):
    keys = ("validate", "out", "resume", "collate")
    extra = {k: options.pop(k) for k in keys if k in options}
    settings = {"steps": 6, "batch_size": 4, "lr": 0.05, "device": "cpu", **options}
    model = Net() if model is None else model
    data = Data() if data is None else data
    return model, fit(
        model, loss, data, TrainConfig(**settings), progress=False, **extra
    )


def losses(result):
    return [h["loss"] for h in result.history if h["event"] == "step"]


# ---- settings -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"lr": "1e-4"}, "YAML"),
        ({"lr": 0}, "greater than 0"),
        ({"lr": math.nan}, "greater than 0"),
        ({"optimizer": "adam"}, "adamw, sgd"),
        ({"precision": "int8"}, "fp32"),
        ({"device": "gpu"}, "auto"),
        ({"warmup": 6}, "smaller than steps"),
        ({"clip_norm": -1}, "at least 0"),
        ({"groups": {"(": 1}}, "regular expression"),
        ({"groups": {"head": "2"}}, "number"),
        ({"groups": ["head"]}, "map"),
        ({"groups": {"tail": 2}}, r"matches no trained parameter.*head\.weight"),
        ({"patience": 2}, "validate"),
        ({"patience": 2, "validate": validate}, "eval_every"),
        ({"monitor": "dice", "validate": validate}, "gave score"),
        ({"precision": "fp16"}, "GPU"),
        ({"data": []}, "empty"),
        ({"data": iter([1])}, "no order"),
        ({"loss": lambda m, b: mse(m, b).detach()}, "does not depend"),
        ({"loss": lambda m, b: m(b[0])}, "one number"),
        ({"model": Net().requires_grad_(False)}, "nothing would be trained"),
    ],
)
def test_bad_settings_are_refused_in_words(setting, word):
    with pytest.raises(TrainError, match=word):
        run(**setting)


def test_an_out_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(TrainError, match="Choose another"):
        run(out=tmp_path / "file" / "out")


def test_schedule():
    cosine = TrainConfig(steps=10, warmup=2)
    factors = [cosine.lr_factor(s) for s in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    flat = TrainConfig(steps=10, warmup=4, schedule="constant")
    assert [flat.lr_factor(s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    _, result = run(steps=4, warmup=2, lr=0.1)
    assert [h["lr"] for h in result.history] == pytest.approx([0.05, 0.1, 0.1, 0.05])


# ---- what a step does -----------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_is_plain_training(optimizer):
    """The loop against the same thing written out in torch."""
    model, result = run(
        Net(dropout=0.0),
        optimizer=optimizer,
        weight_decay=0.1,
        schedule="constant",
        clip_norm=0.3,
        data=Data(noise=False),
        seed=7,
    )
    plain, data = Net(dropout=0.0), Data(noise=False)
    learns = [p for p in plain.parameters() if p.requires_grad]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    extra = {"momentum": 0.9} if optimizer == "sgd" else {}
    solver = kind(learns, lr=0.05, weight_decay=0.1, **extra)
    order = np.concatenate([epoch_order(11, 7, e) for e in range(3)])
    for step in range(6):
        rows = order[4 * step : 4 * step + 4]
        loss = mse(plain, (data.x[rows], data.y[rows]))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learns, 0.3)
        assert result.history[step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert result.history[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        solver.step()
        solver.zero_grad()
    for (name, a), b in zip(
        model.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_accumulation_equals_a_big_batch():
    small, a = run(Net(dropout=0, norm=False), batch_size=2, accumulate=4)
    big, b = run(Net(dropout=0, norm=False), batch_size=8)
    assert losses(a) == pytest.approx(losses(b), abs=1e-6)
    torch.testing.assert_close(small.head.weight, big.head.weight, rtol=0, atol=1e-6)


def test_only_what_requires_a_gradient_moves_and_the_world_is_left_as_it_was():
    model, before = Net(), Net()
    model.drop.eval()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    run(model, weight_decay=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.base.weight, before.base.weight)
    assert not torch.equal(model.head.weight, before.head.weight)
    assert model.training
    assert not model.drop.training  # the caller's choice stays
    assert all(p.grad is None for p in model.parameters())


def test_groups_scale_the_learning_rate():
    """With plain SGD's first step, a weight moves by lr x factor x gradient."""
    moved = []
    for factor in (1.0, 3.0):
        model, start = Net(), Net()
        options = {"groups": {r"^head\.": factor}} if factor != 1 else {}
        run(model, steps=1, optimizer="sgd", lr=0.1, **options)
        moved.append(model.head.weight - start.head.weight)
        other = model.norm.weight - start.norm.weight
        moved.append(other)
    torch.testing.assert_close(moved[2], 3 * moved[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved[3], moved[1])


def test_bf16_runs_and_stays_near():
    seen = []

    def loss(model, batch):
        hidden = model.base(batch[0])
        seen.append(hidden.dtype)
        return mse(model, batch)

    model, a = run(loss=loss, precision="bf16")
    _, b = run()
    assert set(seen) == {torch.bfloat16}
    assert model.head.weight.dtype == torch.float32
    assert losses(a) == pytest.approx(losses(b), rel=0.1)
    assert losses(a) != losses(b)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_weights(clip):
    data = Data(noise=False)
    bad = int(epoch_order(11, 0, 0)[9])  # seen at step 3
    data.x[bad, 0] = math.nan
    model = Net(norm=False)
    message = rf"loss is nan at step 3 .*samples .*{bad}.*step 2"
    with pytest.raises(TrainError, match=message):
        run(model, data=data, clip_norm=clip)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_keeps_the_weights(tmp_path):
    """The square root's slope at 0 is infinite while the loss is an ordinary number."""

    def loss(model, batch):
        return mse(model, batch) + model.head.weight.sum().mul(0).abs().sqrt()

    model = Net(norm=False)
    with pytest.raises(TrainError, match=r"gradient's norm is nan at step 1"):
        run(model, loss=loss, out=tmp_path, checkpoint_every=1)
    assert torch.equal(model.head.weight, Net(norm=False).head.weight)
    assert not (tmp_path / "checkpoint.pt").exists()


# ---- order ----------------------------------------------------------------------


def test_order_depends_on_seed_and_epoch_only_and_uses_every_sample():
    batches = list(Batches(11, 4, 0, 11, seed=2, process=0, processes=1))
    indices = [i for batch in batches for _, i in batch]
    for epoch in range(4):
        assert sorted(indices[11 * epoch : 11 * epoch + 11]) == list(range(11))
    assert indices[:11] != indices[11:22]
    assert list(Batches(11, 4, 5, 11, 2, 0, 1)) == batches[5:]
    shares = [list(Batches(11, 4, 0, 11, 2, p, 2)) for p in range(2)]
    for whole, a, b in zip(batches, *shares, strict=True):
        assert len(a) == len(b) == 2
        assert sorted(a + b) == whole
    other = list(Batches(11, 4, 0, 11, seed=3, process=0, processes=1))
    assert other != batches


def test_augmentation_follows_the_position_not_the_worker():
    _, alone = run(Net(dropout=0.2), steps=4)
    _, helped = run(Net(dropout=0.2), steps=4, num_workers=2)
    assert losses(alone) == losses(helped)
    data = Seeded(Data(), 0)
    assert torch.equal(data[3, 1][0], data[3, 1][0])
    assert not torch.equal(data[3, 1][0], data[14, 1][0])  # the next epoch's draw


# ---- best weights ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["max", "min"])
def test_early_stop_puts_the_best_weights_back(mode):
    scores = [0.1, 0.5, 0.3, 0.2, 0.9]
    if mode == "min":
        scores = [-s for s in scores]
    seen = []

    def check(model):
        assert not model.training
        seen.append(model.state_dict()["head.weight"].clone())
        return {"dice": scores[len(seen) - 1], "other": 1}

    model, result = run(
        validate=check, steps=50, eval_every=3, patience=2, monitor="dice", mode=mode
    )
    assert result.stopped == "patience"
    assert len(seen) == 4
    assert result.steps == 12
    assert result.best == {"step": 6, "dice": scores[1], "other": 1.0}
    assert torch.equal(model.head.weight, seen[1])
    assert not torch.equal(model.head.weight, seen[3])


def test_a_score_that_is_nan_is_never_the_best():
    scores = iter([math.nan, 0.2, math.nan])
    _, result = run(validate=lambda m: {"score": next(scores)}, eval_every=2)
    assert result.best["step"] == 4
    evals = [h["score"] for h in result.history if h["event"] == "eval"]
    assert evals == [None, 0.2, None]  # NaN is not JSON


def test_validating_more_often_does_not_change_the_training():
    _, plain = run()
    _, often = run(validate=validate, eval_every=1)
    assert losses(plain) == losses(often)
    with pytest.raises(TrainError, match="'step'"):
        run(validate=lambda m: {"score": 1.0, "step": 2})


def test_copies_are_copies():
    model = Net()
    copies = checkpoint.copy_of(model)
    assert set(copies) == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    with torch.no_grad():
        for tensor in checkpoint.changing(model).values():
            tensor.add_(1)
    fresh = Net().state_dict()
    assert all(torch.equal(copies[n], fresh[n]) for n in copies)


# ---- files ----------------------------------------------------------------------


def read_log(out):
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_log_checkpoint_and_result(tmp_path):
    out = tmp_path / "run"
    _, result = run(out=out, validate=validate, eval_every=3)
    assert read_log(out) == result.history
    assert [h["step"] for h in result.history] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert result.steps == 6
    assert result.seconds > 0
    assert 50 < result.peak_memory_mb < 20_000
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert "base.weight" not in state["weights"]  # the frozen base is not written


def test_ctrl_c_finishes_the_step_saves_and_goes_on(tmp_path):
    whole, _ = run(validate=validate)
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return mse(model, batch)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"after step 3 of 6; saved in"):
        run(loss=loss, validate=validate, out=tmp_path, checkpoint_every=0)
    assert signal.getsignal(signal.SIGINT) is handler
    model, result = run(validate=validate, out=tmp_path)
    assert [h["step"] for h in result.history if h["event"] == "step"] == [*range(1, 7)]
    assert torch.equal(model.head.weight, whole.head.weight)
    calls.clear()
    with pytest.raises(TrainingInterrupted, match="nothing was saved"):
        run(loss=loss)
    calls.clear()

    def twice(model, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(loss=twice)


def test_best_weights_patience_and_time_survive_a_restart(tmp_path):
    def once(out, interrupt):
        scores, calls = iter([0.1, 0.9, 0.5, 0.4, 0.3, 0.2]), []

        def loss(model, batch):
            calls.append(1)
            if len(calls) == 7 and interrupt:  # the best is behind, patience has begun
                time.sleep(0.3)
                signal.raise_signal(signal.SIGINT)
            return mse(model, batch)

        options = {"steps": 50, "eval_every": 2, "patience": 3, "out": out}
        options |= {"validate": lambda m: {"score": next(scores)}, "loss": loss}
        if interrupt:
            with pytest.raises(TrainingInterrupted):
                run(**options)
        return run(**options)

    whole, a = once(tmp_path / "whole", interrupt=False)
    resumed, b = once(tmp_path / "cut", interrupt=True)
    assert (b.stopped, b.steps, b.best) == (a.stopped, a.steps, a.best)
    assert (b.stopped, b.steps, b.best["step"]) == ("patience", 10, 4)
    assert torch.equal(resumed.head.weight, whole.head.weight)
    seconds = [entry["seconds"] for entry in b.history]
    assert seconds == sorted(seconds)  # the time before the restart counts


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, a = run(out=tmp_path, validate=validate, eval_every=2)
    again, b = run(out=tmp_path, validate=validate, eval_every=2, loss=None)
    assert torch.equal(first.head.weight, again.head.weight)
    assert b.history == a.history
    assert b.best == a.best
    assert (b.steps, b.stopped) == (6, "steps")


def test_resume_false_starts_over(tmp_path):
    run(out=tmp_path)
    _, result = run(out=tmp_path, resume=False, lr=0.01)
    assert [h["step"] for h in read_log(tmp_path)] == [*range(1, 7)]
    assert result.history[0]["lr"] == 0.01


def test_a_constant_run_can_be_made_longer(tmp_path):
    options = {"schedule": "constant", "out": tmp_path}
    run(steps=4, **options)
    longer, result = run(steps=9, **options)
    once, _ = run(steps=9, schedule="constant")
    assert result.steps == 9
    assert torch.equal(longer.head.weight, once.head.weight)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lr": 0.1}, "lr was 0.05 and is 0.1"),
        ({"steps": 9}, "steps was 6 and is 9"),
        ({"model": Net(seed=1)}, "frozen weights"),
        ({"data": Data(12)}, "had 11 samples and has 12"),
        ({"model": Net(norm=False)}, "norm.*does not fit|does not fit.*norm"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, word):
    run(out=tmp_path)
    before = read_log(tmp_path)
    with pytest.raises(TrainError, match=word):
        run(out=tmp_path, **change)
    assert read_log(tmp_path) == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(out=tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TrainError, match="cannot be read"):
        run(out=tmp_path)


def test_precision_and_device_may_change_between_fits():
    for precision in ("fp32", "bf16", "fp32"):
        run(precision=precision, steps=1)
