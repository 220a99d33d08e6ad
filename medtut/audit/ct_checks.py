"""Detectors of what goes wrong with CT volumes, ablation switches and intervals.

Each takes a `Subject` and returns (findings, notes), both empty where the subject does
not carry what the detector looks at. What each looks for was found in published code,
where nothing fails and all numbers look usual.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from torch import nn

from medtut.audit.classifier_checks import Result, _asked, _finding
from medtut.audit.detectors import _change, _effect, _output, _randomise
from medtut.audit.state import preserved, set_training
from medtut.audit.subject import Subject, SubjectError, with_batch

TISSUE = 0.01  # least share of soft tissue; 0.2 and more in a chest
PADDING = -1100  # HU; below it is no tissue, but perhaps padding
SIZES = (0.1, 1.0)  # of the noise; the second for effects that rounding hides


def hu_rescaled_twice(subject: Subject) -> Result:
    """Find a CT reader that applies slope and intercept to what is HU already.

    `hu` is a volume as read, in HU or as model input in [-1, 1] (thousands of HU): too
    little of it in the range of soft tissue is an error. Values far below air alone are
    a note, since scanners pad outside their round field of view.
    `rescale` is your step, called as ``rescale(stored, slope, intercept) -> HU`` with
    int16 arrays (8, 8, 8): once with stored numbers, once with HU, which it must leave
    as they are, or refuse by raising.
    """
    name, found, notes = "hu_rescaled_twice", [], []
    if subject.hu is not None:
        v = np.asarray(subject.hu, dtype=float)
        v = 1000 * v if np.abs(v).max() <= 1 else v
        numbers = {"tissue": float((np.abs(v) < 200).mean()), "least": float(v.min())}
        numbers["median"] = float(np.median(v))
        if numbers["tissue"] < TISSUE and numbers["median"] < -200:
            found += _finding(name, "hu", "dark", numbers)
        elif v.min() < PADDING:
            notes.append(f"hu goes down to {v.min():.0f}: padding? Clip it to -1000")
    hu = np.resize([-1000, 0], (8, 8, 8)).astype(np.int16)
    asked = {"never": hu + np.int16(1024), "twice": hu} if subject.rescale else {}
    for key, given in asked.items():
        rule = f"int16 {given.min()} and {given.max()}, slope 1, intercept -1024"
        try:
            got = _asked(subject, "rescale", rule, given.copy(), 1.0, -1024.0)
        except SubjectError:
            if key == "never":
                raise
            continue  # it refuses HU, as it should
        got = np.asarray(got)
        if got.shape != hu.shape or np.abs(got - hu).max() > 1:
            numbers = {"air": float(got.min()), "water": float(got.max())}
            found += _finding(name, "rescale", key, numbers)
    return found, notes


def switch_changes_nothing(subject: Subject) -> Result:
    """Find a switch, or a part of the model, that has no influence on the output.

    `switches` maps a name to the dotted name of a part of `model` ("visual.bias"),
    whose weights are then moved; or to a pair (on, off) of functions that make a model
    each, which get equal weights where their names and shapes agree. A pair is also
    asked whether switching on brings a new kind of norm beside the old kind.
    """
    name, found = "switch_changes_nothing", []
    for what, switch in (subject.switches or {}).items():
        if isinstance(switch, str):
            change = _moved(subject, switch)
        else:
            on, off = (make() for make in switch)
            new, old = (_norms(one) for one in (on, off))
            if new.keys() - old.keys() and (kept := new.keys() & old.keys()):
                said = {"on": new, "off": old, "left": {key: new[key] for key in kept}}
                said = {k: _counted(one) for k, one in said.items()}
                found += _finding(name, what, "half_norms", said, "warning")
            change = max(_apart(subject, on, off, size) for size in SIZES)
        if change == 0:
            found += _finding(name, what, "no_effect", {"what": what})
    return found, []


def _moved(subject: Subject, part: str) -> float:
    """Change of the output when the weights of a part of the model are moved."""
    try:
        moved = list(subject.model.get_submodule(part).parameters())
    except AttributeError as error:
        raise SubjectError(f"switches: the model has no part {part!r}.") from error
    with preserved(subject.model):
        set_training(subject.model, False)
        return _effect(subject, moved, _output(subject))


def _apart(subject: Subject, on: nn.Module, off: nn.Module, size: float) -> float:
    """Difference of two models' outputs when what they share is equal, and random."""
    with preserved(on), preserved(off):  # and the random state
        for one in (on, off):
            set_training(one, False)
            _randomise(one.parameters(), size)
        size_of = {k: v.shape for k, v in off.state_dict().items()}
        same = {k: v for k, v in on.state_dict().items() if size_of.get(k) == v.shape}
        off.load_state_dict(same, strict=False)
        ready, _ = with_batch(replace(subject, model=on))
        return _change(_output(ready), _output(replace(ready, model=off)))


def _norms(model: nn.Module) -> Counter[str]:
    kinds = ((type(m).__name__, m) for m in model.modules())
    return Counter(k for k, m in kinds if "norm" in k.lower() and not [*m.children()])


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kinds[key]} {key}" for key in sorted(kinds)) or "no norms"


def bootstrap_of_zero_width(subject: Subject) -> Result:
    """Find an interval of exactly zero width, of a bootstrap that does not resample.

    `bootstrap` is called as ``bootstrap(scores, truth, seed)`` with scores (64,), truth
    (64,) of 0 and 1, and returns its draws (B,) or (B, K), or low and high.
    `intervals` maps a name to (low, high), or [value, low, high]; of those at 0 and 1,
    which a perfect score may have, nothing is said.
    """
    name, found, pairs = "bootstrap_of_zero_width", [], dict(subject.intervals or {})
    if (ask := subject.bootstrap) is not None:
        truth = np.arange(64) % 2
        scores = np.random.default_rng(0).normal(size=64) + truth
        rule = "scores and truth (64,) and a seed, or gave fewer than two numbers"
        asked = replace(subject, bootstrap=lambda *a: np.array(ask(*a), dtype=float))
        got = _asked(asked, "bootstrap", rule, scores, truth, 0)
        if got.size < 2:
            raise SubjectError(f"bootstrap failed on {rule}.")
        ends = np.sort(got.reshape(len(got), -1), axis=0)[[0, -1]]
        pairs["bootstrap"] = ends[:, np.ptp(ends, axis=0).argmin()]
    for key, one in pairs.items():
        ends = np.ravel((0, 1) if one is None else one)[-2:]
        if len(ends) < 2:
            raise SubjectError(f"intervals: {key!r} must be (low, high), not {one}.")
        low, high = map(float, ends)
        if low == high and low not in (0, 1):
            found += _finding(name, key, "zero_width", {"low": low, "high": high})
    return found, []
