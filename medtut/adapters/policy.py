"""One call that adapts a segmentation network: freeze, method, head, decoder."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medtut.adapters.layers import CHILD
from medtut.adapters.methods import METHODS
from medtut.adapters.parts import AdapterError, Parts, find_parts
from medtut.lora.inject import is_adapter

POLICIES = ("frozen", "fine-tuned", "new")


@dataclass(frozen=True)
class Adaptation:
    """What was done to a model.

    Attributes
    ----------
    method : str
    parts : Parts
    trainable : tuple of str
        Parameter names, in the model's order.
    counts : dict of str to int
        Parameters that train, as "adapter" (the method's own, in the backbone or on
        the last map; all of the backbone for "full"), "head", "decoder" and
        "bottleneck"; the rest as "frozen".
    renewed : tuple of str
        Modules that were re-initialised.
    settings : dict
        The arguments of :func:`adapt` with the method's defaults filled in, enough to
        do the same again.
    """

    method: str
    parts: Parts
    trainable: tuple[str, ...]
    counts: dict[str, int]
    renewed: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def total(self) -> int:
        """Parameters that train."""
        return sum(n for part, n in self.counts.items() if part != "frozen")

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The tensors for the optimizer, and none that is frozen."""
        return [model.get_parameter(name) for name in self.trainable]

    def set_modes(self, model: nn.Module) -> nn.Module:
        """Bring the model into the mode to train in, and return it.

        As published, a frozen network adapts in ``eval()``: no dropout, no drop path,
        and the running statistics of batch norms are used and stay. Full fine-tuning
        trains in ``train()``, and so do re-initialised modules, whose batch norms
        would otherwise use the empty statistics they start with.
        """
        model.train(self.method == "full")
        for name in self.renewed:
            model.get_submodule(name).train()
        return model


def is_new(name: str) -> bool:
    """Whether a parameter was added by a method, by its name."""
    return is_adapter(name) or CHILD in name.split(".")


@contextlib.contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """A block with its own random numbers, which leaves the global ones as they were.

    Each piece that is drawn (head, decoder, adapter) starts over from the seed, so
    that two methods with one seed have the same new head and decoder.
    """
    with torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
        torch.manual_seed(seed)
        yield


def head_rows(head: nn.Module, rows: Sequence[int | None]) -> tuple[Tensor, Tensor]:
    """Weight and bias of a head that keeps these outputs; None makes a row of zeros.

    The zero row is the background of a softmax task. The pretrained rows answer each
    for one structure, by a sigmoid: z = log p / (1 - p). Beside a logit of 0 the
    softmax of one structure *is* that sigmoid, and with several of them the background
    wins exactly where no sigmoid reaches one half. So a new task starts as the
    pretrained network; upstream draws this row at random (fseft/modeling/heads.py:29).

    Raises
    ------
    AdapterError
        If a row does not exist.
    """
    n = len(head.weight)
    if not rows or any(r is not None and not 0 <= r < n for r in rows):
        raise AdapterError(f"structure={list(rows)}: the head has rows 0 to {n - 1}")
    bias = head.weight.new_zeros(n) if head.bias is None else head.bias
    pick = [n if r is None else r for r in rows]  # row n is the zeros put below
    tables = head.weight.detach(), bias.detach()
    weight, bias = (torch.cat([t, torch.zeros_like(t[:1])])[pick] for t in tables)
    return weight, bias


def adapt(
    model: nn.Module,
    method: str,
    *,
    structure: int | Sequence[int | None] | None = None,
    classes: int | None = None,
    decoder: str = "frozen",
    bottleneck: str = "frozen",
    train_head: bool = True,
    parts: Parts | None = None,
    seed: int = 0,
    **options: Any,
) -> Adaptation:
    """Freeze a segmentation network, in place, and make one method's share trainable.

    Parameters
    ----------
    model : nn.Module
        Not adapted yet; on any device, also "meta".
    method : str
        "as-is" (zero-shot: nothing trains), "probe" (the head alone), "spatial",
        "lora", "adaptformer", "compacter", "bias", "norm" or "full". See
        :mod:`medtut.adapters.methods` for what each is and its options.
    structure : int, or sequence of int and None, optional
        Rows of the pretrained head that the new head keeps, None for the background
        of a softmax task (see :func:`head_rows`).
    classes : int, optional
        Outputs of a head drawn anew, where no pretrained row fits. With neither, the
        pretrained head stays whole.
    decoder, bottleneck : {"frozen", "fine-tuned", "new"}
        "new" starts it again at random. Pretrained head rows mean nothing to a new
        decoder's features, so then the head is drawn anew as well, as in the
        published protocol; ``structure`` only says how many outputs it has.
    train_head : bool
        False keeps the head frozen, whatever the method.
    parts : Parts, optional
        From :func:`medtut.adapters.find_parts`, where the parts cannot be told.
    seed : int
        For all that is drawn, wherever the global random numbers stand.
    **options
        The method's: ``rank``, ``scale``, ``joint``, ``adaptive``, ``kernel``,
        ``select``, ``n``, ``norms``, ``alpha``, ``scaling``, ``roles``.

    Returns
    -------
    Adaptation

    Raises
    ------
    AdapterError or medtut.lora.LoRAError
        If something does not fit. The model then computes what it did before.
    """
    policies = {"decoder": decoder, "bottleneck": bottleneck}
    settings = {"structure": structure, "classes": classes, **policies}
    settings |= {"train_head": train_head, "seed": seed}
    if method not in METHODS:
        raise AdapterError(f"no method {method!r}: choose from {', '.join(METHODS)}")
    if any(is_new(name) for name, _ in model.named_parameters()):
        raise AdapterError("this model is adapted already: start from a fresh copy")
    parts = parts or find_parts(model)
    there = {parts.of(name) for name, _ in model.named_parameters()}
    for part, policy in policies.items():
        usable = POLICIES if part in there and method != "as-is" else POLICIES[:1]
        if policy not in usable:
            raise AdapterError(f"{part}={policy!r}: possible here: {', '.join(usable)}")
    head = model.get_submodule(parts.head)
    rows = [structure] if isinstance(structure, int) else structure
    fresh = decoder == "new" or (rows is None and classes is not None)
    if rows is None:
        rows = range(len(head.weight)) if classes is None else [None] * classes
    weight, bias = head_rows(head, rows)
    if classes not in (None, len(rows)):
        raise AdapterError(f"classes={classes} does not fit structure={structure}")
    new = {part for part, policy in policies.items() if policy == "new"}
    new |= {"head"} if fresh else set()
    modules = [(n, m) for n, m in model.named_modules() if m._parameters]
    renewed = {name: m for name, m in modules if parts.of(name) in new}
    stuck = [n for n, m in renewed.items() if not hasattr(m, "reset_parameters")]
    run = METHODS[method]
    known = list(inspect.signature(run).parameters.values())[2:]
    chosen = {p.name: p.default for p in known} | options
    if stuck or len(chosen) > len(known):
        usable = ", ".join(p.name for p in known) or "none"
        unknown = f"unknown option of {method}, which has: {usable}"
        raise AdapterError(f"no way to start {stuck[0]} anew" if stuck else unknown)

    with seeded(seed, model):
        own = run(model, parts, **options)
    if fresh or structure is not None:
        head.weight, head.bias = nn.Parameter(weight), nn.Parameter(bias)
        head.out_channels = len(weight)
    with seeded(seed, model):
        for module in renewed.values():
            module.reset_parameters()

    policies |= {"adapter": "new", "backbone": "frozen"}
    policies["head"] = "new" if train_head and method != "as-is" else "frozen"
    counts = dict.fromkeys(("adapter", "head", "decoder", "bottleneck", "frozen"), 0)
    for name, p in model.named_parameters():
        part = "adapter" if is_new(name) else parts.of(name)
        p.requires_grad_(name in own or policies[part] != "frozen")
        part = "adapter" if part == "backbone" else part
        counts[part if p.requires_grad else "frozen"] += p.numel()
    trainable = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    done = Adaptation(
        method, parts, trainable, counts, tuple(renewed), settings | chosen
    )
    done.set_modes(model)
    return done
