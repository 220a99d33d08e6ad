"""One of several gloo processes; the launcher's variables are in the environment."""

import sys

import torch
from helpers import CONFIG, Data, Net, mse, validate

from medtut.train import TrainConfig, fit

if __name__ == "__main__":
    torch.set_num_threads(1)
    result, out = sys.argv[1:]
    import os

    rank = int(os.environ.get("RANK", 0))
    # Another start on every process: the first one's weights must win.
    model = Net(seed=rank, dropout=0.0, norm=False)
    settings = {**CONFIG, "steps": 12, "clip_norm": 0.5}
    fitted = fit(
        model,
        mse,
        Data(),
        TrainConfig(**settings),
        validate=validate,
        out=out,
        progress=False,
    )
    assert torch.distributed.is_initialized() == ("WORLD_SIZE" in os.environ)
    torch.save(
        {"weights": model.state_dict(), "history": fitted.history, "best": fitted.best},
        f"{result}.{rank}",
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
