"""The first detectors. Each leaves the model bit for bit as it found it.

Every detector takes a `Subject` and returns (findings, notes).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from medtut.audit.adapters import Site, find_adapters, hinted, switch
from medtut.audit.report import Finding
from medtut.audit.state import preserved, same_bits, set_training
from medtut.audit.subject import Subject, SubjectError, call, loss_of

Result = tuple[list[Finding], list[str]]

# Above this many sites the one-by-one test takes an even sample of them.
MAX_SITES = 64


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _randomise(parameters: Iterable[Tensor], size: float, seed: int = 0) -> None:
    """Add noise, so that zero-initialised factors take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in parameters:
            noise = torch.randn(one.shape, generator=generator) * size
            one.add_(noise.to(one.device, one.dtype))


def _output(subject: Subject) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [one.detach().clone() for one in call(subject)]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest absolute difference of two outputs; infinite when shapes differ."""
    if [one.shape for one in before] != [one.shape for one in after]:
        return float("inf")
    gaps = [0.0]
    for a, b in zip(before, after, strict=True):
        if a.numel() and not same_bits(a, b):
            gap = (a.double() - b.double()).abs()
            # A number that turned into NaN is a change as well.
            gaps.append(float(gap.nan_to_num(nan=float("inf")).max()))
    return max(gaps)


def _effect(subject: Subject, parameters: list[Tensor], base: list[Tensor]) -> float:
    """Change of the output when the parameters are moved, a little or a lot."""
    kept = [one.detach().clone() for one in parameters]
    change = 0.0
    for size in (0.1, 1.0):  # the second for effects that rounding hides
        _randomise(parameters, size)
        change = _change(base, _output(subject))
        for one, bits in zip(parameters, kept, strict=True):
            one.data.copy_(bits)
        if change > 0:
            break
    return change


def adapters_change_nothing(subject: Subject) -> Result:
    """Find adapters whose weights have no influence on the output.

    All adapter tensors are moved at once, then those of each site alone: with B = 0,
    moving A alone would rightly change nothing. Catches a helper that returns the layer
    untouched, α // r = 0, an adapter that forward never calls, and one switched off.
    """
    model, name = subject.model, "adapters_change_nothing"
    sites = find_adapters(model)
    if not sites:
        return _no_adapters(subject)
    merged = [one.name for one in sites if switch(model, one).get("merged")]
    if merged:
        return [], [
            f"{len(merged)} adapters are merged ({_listed(merged)}): unmerge them "
            "before the audit, or their own tensors have no effect by design"
        ]
    with preserved(model):
        set_training(model, False)
        base = _output(subject)
        noise = _change(base, _output(subject))
        if noise > 0:
            return [], [
                f"the output changes by {noise:.3g} from call to call with the same "
                "weights, so the effect of adapters cannot be told"
            ]
        every = [p for one in sites for p in one.parameters.values()]
        dead, notes = sites, []
        counts = {"sites": len(sites)}
        said = "No adapter has any effect: with noise on all their weights the "
        said += "output stays the same to the last bit."
        if _effect(subject, every, base) > 0:
            tried = sites[:: -(-len(sites) // MAX_SITES)]
            own = [list(one.parameters.values()) for one in tried]
            effects = [_effect(subject, one, base) for one in own]
            dead = [one for one, e in zip(tried, effects, strict=True) if e == 0]
            if len(tried) < len(sites):
                notes.append(f"tried {len(tried)} of {len(sites)} adapters one by one")
            counts = {"sites_without_effect": len(dead), "of_sites": len(tried)}
            said = f"{len(dead)} of {len(tried)} adapters have no effect on the "
            said += "output, whatever their weights."
    if not dead:
        return [], notes
    numbers: dict[str, Any] = {"largest_output_change": 0.0, **counts}
    numbers["parameters"] = sum(one.size for one in dead)
    where = _listed(one.name for one in dead)
    return [Finding(name, "error", where, said + _why(model, dead), numbers)], notes


def _why(model: nn.Module, sites: list[Site]) -> str:
    """Name the cause when a site's own switches give it away."""
    said = [switch(model, one) for one in sites]
    if any("scale" in one for one in said):
        return " Their scale is 0: was α // r meant to be α / r?"
    if any("disabled" in one for one in said):
        return " They are switched off."
    return " Does forward call them?"


def _no_adapters(subject: Subject) -> Result:
    model = subject.model
    hints = hinted(model)
    parameters = list(model.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    numbers = {"sites": 0, "parameters": sum(p.numel() for p in parameters)}
    expected = subject.expects_adapters
    if expected or (expected is None and hints):
        because = "the subject says so" if expected else _listed(hints, 3)
        question = "Did the helper return the layer untouched, or keep its factors"
        message = (
            f"No adapter tensors were found, though they are expected ({because}). "
            f"{question} where model.parameters() does not see them?"
        )
        where = _listed(hints) if hints else "(model)"
        found = Finding("adapters_change_nothing", "error", where, message, numbers)
        return [found], []
    if frozen and expected is None:
        return [], [
            "part of the model is frozen and there are no adapters; if there should be "
            "some, say expects_adapters=True"
        ]
    return [], []


def trainable_without_gradient(subject: Subject) -> Result:
    """Find trainable tensors that no gradient reaches.

    Trainable tensors are moved a little first, so that a zero start (B = 0 makes A's
    gradient exactly zero) raises no alarm.
    """
    model, name = subject.model, "trainable_without_gradient"
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in wanted.values())
    if not wanted:
        every = sum(p.numel() for p in model.parameters())
        numbers = {"trainable": 0, "parameters": every}
        message = "Nothing is trainable: every parameter has requires_grad=False."
        return [Finding(name, "error", "(model)", message, numbers)], []
    with preserved(model):
        set_training(model, False)
        _randomise(wanted.values(), 0.02)
        for one in model.parameters():
            one.grad = None
        torch.manual_seed(0)
        _backward(subject)
        faults = {key: _fault(one) for key, one in wanted.items()}
    found = []
    for fault in _FAULTS:
        if names := [key for key, one in faults.items() if one is fault]:
            severity, message = fault
            numbers = {
                "tensors": len(names),
                "of_trainable_tensors": len(wanted),
                "parameters": sum(wanted[one].numel() for one in names),
                "of_trainable_parameters": total,
            }
            found.append(Finding(name, severity, _listed(names), message, numbers))
    return found + _frozen_adapters(model, name), []


_UNREACHED = ("error", "trainable, but no gradient reaches it: it is not used")
_ZERO = ("warning", "reached, but every entry of the gradient is exactly zero")
_BROKEN = ("error", "the gradient holds NaN or infinity")
_FAULTS = (_UNREACHED, _ZERO, _BROKEN)  # as they are listed


def _fault(one: Tensor) -> tuple[str, str] | None:
    """What is wrong with the gradient of a trainable tensor."""
    if one.grad is None:
        return _UNREACHED
    if not torch.isfinite(one.grad).all():
        return _BROKEN
    return _ZERO if one.numel() and not one.grad.any() else None


def _frozen_adapters(model: nn.Module, name: str) -> list[Finding]:
    sites = find_adapters(model)
    still = [one for one in sites if not one.trainable]
    if not still:
        return []
    numbers = {
        "sites": len(still),
        "of_sites": len(sites),
        "parameters": sum(one.size for one in still),
    }
    message = (
        "Adapters are there, but all their tensors are frozen: nothing trains them."
    )
    where = _listed(one.name for one in still)
    return [Finding(name, "warning", where, message, numbers)]


def frozen_that_moved(subject: Subject, steps: int = 2, lr: float = 1e-3) -> Result:
    """Find frozen tensors that differ after a few training steps.

    Trains as a loop would: ``model.train()``, steps with the subject's optimiser (or
    AdamW with weight decay on what is trainable), a validation pass in ``eval()``, and
    ``train()`` again. Buffers of modules whose parameters are all frozen, such as a
    BatchNorm's running statistics, count as frozen too.
    """
    model, name = subject.model, "frozen_that_moved"
    if not any(p.requires_grad for p in model.parameters()):
        return [], ["nothing is trainable, so no step was taken"]
    given = subject.optimizer
    owned = given if isinstance(given, torch.optim.Optimizer) else None
    notes: list[str] = []
    with preserved(model, owned):
        torch.manual_seed(0)
        model.train()
        params = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        buffers = _frozen_buffers(model)
        before = {n: t.detach().clone() for n, t in {**params, **buffers}.items()}
        optimizer = _optimizer(subject, lr)
        try:
            for _ in range(steps):
                _step(subject, optimizer)
        except SubjectError as error:
            notes.append(f"steps were taken in eval mode, as train mode fails: {error}")
            set_training(model, False)
            before = {n: t.detach().clone() for n, t in {**params, **buffers}.items()}
            for _ in range(steps):
                _step(subject, optimizer)
        else:
            model.eval()  # what a validation loop does; some layers merge here
            _output(subject)
            model.train()
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        moved = {
            n: _change([bits], [now[n].detach()])
            for n, bits in before.items()
            if n not in now or not same_bits(bits, now[n].detach())
        }
    found = []
    weights = (
        f"Frozen tensors changed in {steps} steps and one validation pass, though "
        "requires_grad is False. Is the storage shared with a trainable tensor, or "
        "written to in forward, train() or eval()?"
    )
    stats = (
        "Buffers of frozen modules changed: running statistics follow the new data "
        "although the weights beside them are frozen. Keep these modules in eval()."
    )
    kinds = ("error", params, weights), ("warning", buffers, stats)
    for severity, those, message in kinds:
        if names := [n for n in moved if n in those]:
            numbers = {
                "tensors": len(names),
                "of_frozen_tensors": len(those),
                "largest_change": max(moved[one] for one in names),
                "steps": steps,
            }
            found.append(Finding(name, severity, _listed(names), message, numbers))
    return found, notes


def _frozen_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers whose nearest module with parameters has none that is trained."""
    modules = dict(model.named_modules())
    found = {}
    for name, buffer in model.named_buffers():
        path = name.rpartition(".")[0]
        while path and next(modules[path].parameters(), None) is None:
            path = path.rpartition(".")[0]
        owner = list(modules[path].parameters())
        if owner and not any(p.requires_grad for p in owner):
            found[name] = buffer
    return found


def _optimizer(subject: Subject, lr: float) -> torch.optim.Optimizer:
    given = subject.optimizer
    if isinstance(given, torch.optim.Optimizer):
        return given
    if given is not None:
        return given(subject.model)
    wanted = [p for p in subject.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(wanted, lr=lr, weight_decay=0.01)


def _backward(subject: Subject) -> None:
    with torch.enable_grad():
        loss = loss_of(subject)
        if loss.requires_grad:
            loss.backward()


def _step(subject: Subject, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    _backward(subject)
    optimizer.step()
