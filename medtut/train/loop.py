"""The training loop of the course, to be read from top to bottom.

One step: load ``accumulate`` batches, average their gradients (over the processes too),
clip, move the weights, write one line of log; sometimes validate, sometimes write a
checkpoint. accelerate brings the device, autocast, the fp16 loss scale and the
processes; everything that decides the result stands here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medtut.train import checkpoint
from medtut.train.config import TrainConfig, TrainError
from medtut.train.log import Log
from medtut.train.machine import (
    average_gradients,
    ctrl_c,
    make_accelerator,
    make_folder,
    make_optimizer,
    same_everywhere,
)
from medtut.train.memory import PeakMemory
from medtut.train.order import Batches, Seeded, own_randomness
from medtut.train.refuse import check, check_loss, not_finite


class TrainingInterrupted(TrainError):
    """The user stopped the run; the message says where it can go on."""


@dataclass
class FitResult:
    """What a run gave.

    Attributes
    ----------
    history : list of dict
        The log: ``{"event": "step", "step", "loss", "lr", ...}`` and
        ``{"event": "eval", "step", ...}`` with the numbers of ``validate``.
    best : dict or None
        Step and numbers of the best validation; its weights are in the model now.
    steps : int
        Optimizer steps done.
    seconds : float
        Spent in the loop, the time before a restart included.
    peak_memory_mb : float
        See `medtut.train.memory.PeakMemory`.
    stopped : {"steps", "patience"}
        Why it ended.
    """

    history: list[dict]
    best: dict | None
    steps: int
    seconds: float
    peak_memory_mb: float
    stopped: str


def fit(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    train_set: Any,
    config: TrainConfig,
    *,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    out: Path | str | None = None,
    resume: bool = True,
    progress: bool = True,
    collate: Callable | None = None,
) -> FitResult:
    """Train the parameters of ``model`` that require a gradient.

    Parameters
    ----------
    model : nn.Module
        Changed in place; at the end it holds the best weights if there is a
        ``validate``, else the last.
    loss_fn : callable
        ``loss_fn(model, batch)`` returns the mean loss over the batch, a scalar.
    train_set : sequence
        ``len`` and ``[]``; what it draws at random is seeded per sample.
    config : TrainConfig
    validate : callable, optional
        ``validate(model)`` returns numbers by name, ``config.monitor`` among them. The
        model is in eval mode and records no gradients.
    out : path, optional
        Folder for ``log.jsonl`` and ``checkpoint.pt``. Without it nothing is written.
    resume : bool
        Go on from the checkpoint in ``out`` if there is one, else start over.
    progress : bool
        Draw a bar.
    collate : callable, optional
        List of samples -> batch; torch's default otherwise.

    Returns
    -------
    FitResult

    Raises
    ------
    TrainError
        If the run cannot start, the checkpoint belongs to another one, or the loss is
        not finite.
    TrainingInterrupted
        After Ctrl-C: the step is finished and saved first. A second Ctrl-C ends it at
        once, as ever.
    """
    from accelerate.utils import gather_object, send_to_device, set_seed
    from tqdm.auto import tqdm

    check(model, train_set, config, validate)
    accelerator = make_accelerator(config)
    processes, device = accelerator.num_processes, accelerator.device
    cuda = device.type == "cuda"
    if config.batch_size % processes:
        raise TrainError(
            f"batch_size {config.batch_size} cannot be shared evenly by {processes} "
            f"processes; choose a multiple of {processes}."
        )
    model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = accelerator.prepare(make_optimizer(model, config))
    same_everywhere(model, accelerator)

    start, best, best_weights, stale, before, stopped = 0, None, None, 0, 0.0, ""
    folder = None if out is None else make_folder(Path(out), accelerator)
    path = None if folder is None else folder / "checkpoint.pt"
    base = "" if folder is None else checkpoint.base_hash(model)
    states: list = []  # of every process, in the checkpoint
    if path and path.is_file() and resume:
        state = checkpoint.read(path, config, len(train_set), base)
        checkpoint.put_back(model, state["weights"], str(path))
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        states = state["random"]
        start, best, best_weights = state["step"], state["best"], state["best_weights"]
        stale, before, stopped = state["stale"], state["seconds"], state["stopped"]
        if stopped == "steps" and start < config.steps:
            stopped = ""  # the run was made longer
    outside = checkpoint.random_state()  # the caller's, given back at the end
    modes = {m: m.training for m in model.modules()}
    if not model.training:
        model.train()
    # Every process draws its own dropout.
    set_seed((config.seed + accelerator.process_index) % 2**32)
    if accelerator.process_index < len(states):
        checkpoint.set_random_state(states[accelerator.process_index])
    accelerator.wait_for_everyone()
    if path and accelerator.is_main_process:
        checkpoint.clean(path.parent, path)
        if not resume:
            path.unlink(missing_ok=True)

    # Only one process writes.
    log_path = folder / "log.jsonl" if folder and accelerator.is_main_process else None
    log = Log(log_path, keep_to=start)
    began = time.perf_counter()
    seconds = lambda: before + time.perf_counter() - began  # noqa: E731

    def save(step: int) -> None:
        if path is None:
            return
        now = gather_object([checkpoint.random_state()])
        if accelerator.is_main_process:
            scaler = accelerator.scaler
            state = {
                "step": step,
                "weights": checkpoint.changing(model),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
                "random": now,
                "best": best,
                "best_weights": best_weights,
                "stale": stale,
                "seconds": seconds(),
                "stopped": stopped,
                "config": config.to_dict(),
                "samples": len(train_set),
                "base": base,
            }
            checkpoint.write(path, state)
        accelerator.wait_for_everyone()

    loader = torch.utils.data.DataLoader(
        Seeded(train_set, config.seed),
        batch_sampler=Batches(
            len(train_set),
            config.batch_size,
            start * config.accumulate,
            config.steps * config.accumulate,
            config.seed,
            accelerator.process_index,
            processes,
        ),
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=cuda,
        # Starting workers draws a number; it must not come out of the run's own.
        generator=torch.Generator().manual_seed(config.seed),
    )
    shown = progress and accelerator.is_main_process
    bar = tqdm(total=config.steps, initial=start, unit="step", disable=not shown)
    try:
        with PeakMemory(device) as memory, ctrl_c() as interrupted:
            batches = iter(loader) if not stopped else iter(())
            for step in range(start, config.steps if not stopped else start):
                lr = config.lr * config.lr_factor(step)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["factor"]

                total = torch.zeros((), device=device)
                for _ in range(config.accumulate):
                    batch = send_to_device(next(batches), device, non_blocking=cuda)
                    with accelerator.autocast():
                        loss = loss_fn(model, batch)
                    check_loss(loss, step)
                    accelerator.backward(loss / config.accumulate)
                    total += loss.detach().float() / config.accumulate

                # One reduction tells every process the mean loss and of any Ctrl-C.
                news = torch.stack(
                    [total, total.new_tensor(float(interrupted.is_set()))]
                )
                mean_loss, stop_asked = accelerator.reduce(news, "mean").tolist()
                refusal = partial(not_finite, step, lr, len(train_set), config)
                if not math.isfinite(mean_loss):
                    raise refusal(f"loss is {mean_loss}")
                average_gradients(parameters, accelerator)
                norm = {}
                if config.clip_norm:
                    length = accelerator.clip_grad_norm_(parameters, config.clip_norm)
                    norm = {"grad_norm": float(length)}
                    # The loss scale of fp16 skips such a step; here it would be taken.
                    if accelerator.scaler is None and not length.isfinite():
                        raise refusal(f"gradient's norm is {float(length)}")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done = step + 1
                log.add("step", done, loss=mean_loss, lr=lr, **norm, seconds=seconds())

                due = config.eval_every and done % config.eval_every == 0
                if validate and (due or done == config.steps):
                    scores = _validate(model, validate, config, accelerator)
                    log.add("eval", done, **scores, seconds=seconds())
                    if _better(scores[config.monitor], best, config):
                        # Copies: the model's own tensors go on changing.
                        best = {"step": done, **scores}
                        best_weights, stale = checkpoint.copy_of(model), 0
                    else:
                        stale += 1
                    bar.set_postfix({config.monitor: f"{scores[config.monitor]:.4g}"})
                bar.set_description(f"loss {mean_loss:.4g}", refresh=False)
                bar.update()

                if config.patience and stale >= config.patience:
                    stopped = "patience"
                elif done == config.steps:
                    stopped = "steps"
                due = config.checkpoint_every and done % config.checkpoint_every == 0
                if due or stopped or stop_asked:
                    save(done)
                start = done
                if stopped:
                    break
                if stop_asked:
                    raise TrainingInterrupted(_interrupted(done, config, path))
            if best_weights is not None:
                checkpoint.put_back(model, best_weights, "best weights")
            peak = memory.mb
    finally:
        bar.close()
        optimizer.zero_grad(set_to_none=True)
        for module, mode in modes.items():
            module.training = mode
        checkpoint.set_random_state(outside)
    return FitResult(log.history, best, start, seconds(), peak, stopped)


def _validate(
    model: nn.Module, validate: Callable, config: TrainConfig, accelerator: Any
) -> dict[str, float]:
    """Call ``validate`` in eval mode; every process goes on with the same numbers."""
    from accelerate.utils import broadcast_object_list

    same_everywhere(model, accelerator, buffers_only=True)  # batch-norm statistics
    modes = {m: m.training for m in model.modules()}
    model.eval()
    # Its own random numbers, the same ones each time: scores are compared on equal
    # terms, and validating more often does not change the training.
    with own_randomness(config.seed, 0), torch.no_grad(), accelerator.autocast():
        scores = validate(model)
    for module, mode in modes.items():
        module.training = mode
    if config.monitor not in scores:
        raise TrainError(
            f"validate gave {', '.join(scores) or 'nothing'}, but not "
            f"'{config.monitor}'. Set TrainConfig.monitor to one of them."
        )
    if taken := scores.keys() & {"event", "step", "seconds"}:
        raise TrainError(f"validate must not use the name {sorted(taken)[0]!r}.")
    return broadcast_object_list([{k: float(v) for k, v in scores.items()}])[0]


def _better(score: float, best: dict | None, config: TrainConfig) -> bool:
    if math.isnan(score) or best is None:
        return not math.isnan(score)
    last = best[config.monitor]
    return score > last if config.mode == "max" else score < last


def _interrupted(step: int, config: TrainConfig, path: Path | None) -> str:
    where = f"saved in {path}; call fit with the same out folder to go on"
    if path is None:
        where = (
            "the weights are in the model, but nothing was saved: give fit an out "
            "folder next time"
        )
    return f"Stopped on request after step {step} of {config.steps}; {where}."
