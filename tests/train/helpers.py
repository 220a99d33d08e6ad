"""A tiny run, as a script of its own, so that it can be killed or run twice at once.

``python helpers.py OUT RESULT [KILL]`` trains and writes the weights to RESULT. KILL:
``loss:N`` dies in the N-th call of the loss, ``write:N`` in the middle of the N-th
checkpoint.
"""

import os
import random
import signal
import sys

import numpy as np
import torch
from torch import nn

from medtut.train import TrainConfig, fit

CONFIG = {
    "steps": 17,
    "batch_size": 4,
    "lr": 0.02,
    "warmup": 3,
    "accumulate": 2,
    "eval_every": 4,
    "checkpoint_every": 3,
    "seed": 5,
    "device": "cpu",
}


class Net(nn.Module):
    """Frozen layer, batch norm, dropout, a trained layer: what a checkpoint holds."""

    def __init__(self, seed: int = 0, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(6, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.base(x)))))


class Data(torch.utils.data.Dataset):
    """Eleven samples, so that no epoch is a whole number of batches."""

    def __init__(self, size: int = 11, noise: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, 6, generator=generator)
        self.y = self.x[:, :2].sin()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[i]
        if self.noise:  # one draw from every generator an augmentation may use
            x = x + 0.1 * torch.randn(6) + 0.1 * np.random.rand() + random.random()
        return x, self.y[i]


def mse(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Mean squared error."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def validate(model: nn.Module) -> dict[str, float]:
    """Minus the error on the clean data, and a draw that moves the generators."""
    data = Data(noise=False)
    torch.rand(1)
    return {"score": -mse(model, (data.x, data.y)).item()}


def die() -> None:
    """End this process at once, without any clean-up."""
    if hasattr(signal, "SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(9)


def main(out: str, result: str, kill: str = "") -> None:
    """Train once."""
    kind, _, number = kill.partition(":")
    calls = {"loss": 0, "write": 0}
    real_save = torch.save

    def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
        calls["loss"] += 1
        # numpy's own stream takes part, so that its state must be saved as well
        value = mse(model, batch) * (1 + 0.01 * np.random.rand() * random.random())
        if kind == "loss" and calls["loss"] == int(number):
            die()
        return value

    def save(state: dict, file) -> None:
        calls["write"] += 1
        if kind == "write" and calls["write"] == int(number):
            file.write(b"half a checkpoint")
            file.flush()
            die()
        real_save(state, file)

    torch.save = save
    model = Net()
    fitted = fit(
        model,
        loss,
        Data(),
        TrainConfig(**CONFIG),
        validate=validate,
        out=out,
        progress=False,
    )
    assert fitted.stopped == "steps"
    real_save({"weights": model.state_dict(), "best": fitted.best}, result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
