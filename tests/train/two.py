"""One of several gloo processes; the launcher's variables are in the environment."""

import os
import sys

import torch
from helpers import CONFIG, Data, Net, mse, validate

from medtut.train import TrainConfig, fit

RANK, ALONE = int(os.environ.get("RANK", 0)), "WORLD_SIZE" not in os.environ
DRAWN: list[float] = []


def loss(model: torch.nn.Module, batch: tuple) -> torch.Tensor:
    """The error, and a tensor that only the first process uses.

    Alone it counts half, as the mean over two processes does.
    """
    DRAWN.append(torch.rand(()).item())
    model.calls += 1 + RANK  # a statistic that each process would keep in its own way
    value = mse(model, batch)
    if RANK == 0:
        value = value + (0.5 if ALONE else 1.0) * (model.extra - 1).square().sum()
    return value


def score(model: torch.nn.Module) -> dict[str, float]:
    """A score that differs between the processes: the first one's counts."""
    return {"score": validate(model)["score"] + RANK}


if __name__ == "__main__":
    torch.set_num_threads(1)
    result, out = sys.argv[1:]
    # Another start on every process: the first one's weights must win.
    model = Net(seed=RANK, dropout=0.0, norm=False)
    model.extra = torch.nn.Parameter(torch.zeros(3))
    model.register_buffer("calls", torch.zeros(()))
    settings = {**CONFIG, "steps": 12, "clip_norm": 0.5}
    fitted = fit(
        model,
        loss,
        Data(),
        TrainConfig(**settings),
        validate=score,
        out=out,
        progress=False,
    )
    assert torch.distributed.is_initialized() != ALONE
    told = {"history": fitted.history, "best": fitted.best, "drawn": DRAWN}
    torch.save({"weights": model.state_dict(), **told}, f"{result}.{RANK}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
