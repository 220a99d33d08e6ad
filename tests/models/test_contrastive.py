"""Two losses: closed forms, chunks, and two processes against one.

Run as a script, this file is one of those processes.
"""

import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from medtut.errors import MedtutError
from medtut.models import contrastive
from medtut.models.contrastive import param_groups, sigmoid_loss, softmax_loss

BATCH, LATENT = 8, 5


def pairs(n: int = BATCH, width: int = LATENT, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [F.normalize(torch.randn(n, width), dim=-1) for _ in range(2)]


def scalars() -> list[torch.Tensor]:
    start = (contrastive.LOG_SCALE, contrastive.BIAS)
    return [torch.tensor(v, requires_grad=True) for v in start]


def one_process(kind: str, image: torch.Tensor, text: torch.Tensor, **kw) -> dict:
    """Loss, and its gradients down to what made the vectors."""
    parts = [t.clone().requires_grad_() for t in (image, text)]
    scale, bias = scalars()
    vectors = [F.normalize(p.tanh(), dim=-1) for p in parts]
    if kind == "softmax":
        loss = softmax_loss(*vectors, scale, **kw)
    else:
        loss = sigmoid_loss(*vectors, scale, bias, **kw)
    loss.backward()
    grads = {"image": parts[0].grad, "text": parts[1].grad, "scale": scale.grad}
    return {"loss": loss.detach(), **grads, "bias": bias.grad}


# -- values ----------------------------------------------------------------------------
def test_both_start_at_the_temperature_and_bias_of_siglip():
    assert math.exp(contrastive.LOG_SCALE) == pytest.approx(10)
    assert contrastive.BIAS == -10


def log1pexp(z: float) -> float:
    return math.log1p(math.exp(z))


def test_sigmoid_loss_at_the_start_has_a_closed_form():
    """Reports orthogonal to all scans but their own, which they equal."""
    eye = torch.eye(BATCH)
    scale, bias = scalars()
    got = sigmoid_loss(eye, eye, scale, bias).item()  # own: 10 - 10; others: 0 - 10
    assert got == pytest.approx(math.log(2) + (BATCH - 1) * log1pexp(-10), rel=1e-6)
    empty = torch.zeros(BATCH, BATCH)  # every cosine 0
    got = sigmoid_loss(empty, empty, scale, bias).item()
    assert got == pytest.approx(log1pexp(10) + (BATCH - 1) * log1pexp(-10), rel=1e-6)


def test_softmax_loss_at_the_start_has_a_closed_form():
    eye, scale = torch.eye(BATCH), scalars()[0]
    want = math.log(math.exp(10) + BATCH - 1) - 10
    assert softmax_loss(eye, eye, scale).item() == pytest.approx(want, abs=1e-6)
    empty = torch.zeros(BATCH, BATCH)
    assert softmax_loss(empty, empty, scale).item() == pytest.approx(math.log(BATCH))


def test_losses_pair_by_pair():
    image, text = pairs()
    scale, bias = torch.tensor(0.7), torch.tensor(-1.5)
    logits = torch.empty(BATCH, BATCH, dtype=torch.float64)
    for i in range(BATCH):
        for j in range(BATCH):
            logits[i, j] = math.exp(0.7) * float(image[i].double() @ text[j].double())
    soft = sum(
        -(logits[i].softmax(0)[i].log() + logits[:, i].softmax(0)[i].log()) / 2
        for i in range(BATCH)
    )
    assert softmax_loss(image, text, scale).item() == pytest.approx(
        soft.item() / BATCH, rel=1e-5
    )
    total = 0.0
    for i in range(BATCH):
        for j in range(BATCH):
            z = (logits[i, j] - 1.5).item() * (1 if i == j else -1)
            total += math.log1p(math.exp(-z))
    got = sigmoid_loss(image, text, scale, bias).item()
    assert got == pytest.approx(total / BATCH, rel=1e-5)


def test_large_logits_and_autocast():
    image, text = pairs()
    cold = torch.tensor(math.log(1e4), requires_grad=True)
    for loss in (softmax_loss(image, text, cold),
                 sigmoid_loss(image, -image, cold, torch.tensor(0.0))):  # fmt: skip
        assert loss.isfinite()
        assert torch.autograd.grad(loss, cold)[0].isfinite()
    scale, bias = scalars()
    want = sigmoid_loss(image, text, scale, bias), softmax_loss(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        got = sigmoid_loss(image, text, scale, bias), softmax_loss(image, text, scale)
    assert got == want


def test_sizes_that_do_not_pair():
    image, text = pairs()
    for loss in (lambda *a: softmax_loss(*a, scalars()[0]),
                 lambda *a: sigmoid_loss(*a, *scalars())):  # fmt: skip
        with pytest.raises(MedtutError, match=r"\(8, 5\) and \(7, 5\)"):
            loss(image, text[:7])


# -- chunks ----------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 3, 8, 20])
def test_chunks_equal_the_dense_loss(chunk):
    dense = one_process("sigmoid", *pairs())
    parts = one_process("sigmoid", *pairs(), chunk=chunk)
    for name, value in dense.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6, msg=name)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, backward included."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out):
            self.numel = max(self.numel, out.numel())
        return out


def test_chunks_never_hold_all_pairs():
    n, largest, kept = 64, {}, {}
    for chunk in (None, 4):
        total = 0

        def keep(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.numel()
            return t

        image, text = (t.requires_grad_() for t in pairs(n, 2))
        with Largest() as seen:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = sigmoid_loss(image, text, *scalars(), chunk=chunk)
            forward = total
            loss.backward()
        largest[chunk], kept[chunk] = seen.numel, forward
    assert largest == {None: n * n, 4: 4 * n}
    assert kept[None] > n * n
    assert kept[4] < n * n  # of the chunks only their inputs


# -- learning rates --------------------------------------------------------------------
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))


def test_temperature_and_bias_have_a_rate_of_their_own():
    model = Two()
    groups = param_groups(model, 1e-5, 1e-2, weight_decay=0.1)
    rates = {
        id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]
    }  # fmt: skip
    assert rates == {
        id(model.head.weight): (1e-5, 0.1),
        id(model.head.bias): (1e-5, 0.0),
        id(model.log_scale): (1e-2, 0.0),
        id(model.logit_bias): (1e-2, 0.0),
    }
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for _ in range(20):
        optimizer.zero_grad()
        (model.logit_bias + model.log_scale + model.head.weight.sum()).backward()
        optimizer.step()
    assert model.log_scale.item() == pytest.approx(2 - 20 * 1e-2, abs=1e-3)


def test_the_pattern_serves_the_training_loop():
    from medtut.train import TrainConfig

    factor = TrainConfig(groups={contrastive.SCALARS: 50}).groups
    assert factor == {contrastive.SCALARS: 50}
    import re

    named = ["log_scale", "clip.logit_bias", "layer.bias", "my_log_scale", "q_scale"]
    assert [n for n in named if re.search(contrastive.SCALARS, n)] == named[:2]


# -- two processes ---------------------------------------------------------------------
def rows_of(rank: int) -> slice:
    return slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / f"{rank}.pt")],
            env={**env, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind, extra in (("softmax", {}), ("sigmoid", {}), ("sigmoid", {"chunk": 3})):
        key = f"{kind}{extra}"
        want = one_process(kind, *pairs())
        alone = [one_process(kind, *(t[rows_of(r)] for t in pairs())) for r in range(2)]
        for name in ("loss", "scale", "bias"):
            if want[name] is not None:
                mean = (both[0][key][name] + both[1][key][name]) / 2
                torch.testing.assert_close(
                    mean, want[name], rtol=0, atol=1e-6, msg=name
                )
        for name in ("image", "text"):  # averaging over processes halves these
            rows = torch.cat([both[r][key][name] for r in range(2)]) / 2
            torch.testing.assert_close(rows, want[name], rtol=0, atol=1e-6, msg=name)
        assert abs((alone[0]["loss"] + alone[1]["loss"]) / 2 - want["loss"]) > 1e-2


def test_gathering_alone_changes_nothing():
    for kind in ("softmax", "sigmoid"):
        one, two = (one_process(kind, *pairs(), gather=g) for g in (False, True))
        assert torch.equal(one["loss"], two["loss"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    mine = [t[rows_of(int(os.environ["RANK"]))] for t in pairs()]
    told = {}
    for kind, extra in (("softmax", {}), ("sigmoid", {}), ("sigmoid", {"chunk": 3})):
        told[f"{kind}{extra}"] = one_process(kind, *mine, gather=True, **extra)
    torch.save(told, sys.argv[1])
    torch.distributed.destroy_process_group()
