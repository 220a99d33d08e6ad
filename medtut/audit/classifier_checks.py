"""Detectors of what goes wrong around a classifier, and is hidden by its accuracy.

Each takes a `Subject` and returns (findings, notes), both empty where the subject does
not carry what the detector looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medtut.audit.report import Finding
from medtut.audit.state import preserved, set_training
from medtut.audit.subject import Subject, SubjectError, call, tensors_in

Result = tuple[list[Finding], list[str]]

# Output over inputs, relative to its size: 3e-6 in a VGG16 as torch initialises it, and
# 0.01 or more in networks that train.
SPREAD = 1e-4
FEW = 10  # answers below which one class throughout proves nothing
NEAR = 0.01  # relative distance of a loss from an entropy
TRIES = 12
EXPLAINED = 0.8  # share of the variance; 1 in sound layouts, below 0.4 in the others
# Rows the truth. No average but micro gives precision, or F1, of the accuracy, 0.68.
KEYS = ("precision", "recall")
CONFUSION = [[30, 6, 3, 1], [2, 20, 5, 3], [1, 1, 10, 8], [0, 0, 2, 8]]


@cache
def _texts() -> dict[str, str]:
    import yaml

    return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text("utf-8"))


def _finding(
    name: str, where: str, text: str, numbers: dict[str, Any], kind: Any = "error"
) -> list[Finding]:
    said = _texts()[text].format(**numbers)
    return [Finding(name, kind, where, said, numbers)]


def _asked(subject: Subject, key: str, rule: str, *args: Any) -> Any:
    try:
        return getattr(subject, key)(*args)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise SubjectError(f"{key} failed on {rule}: {why}") from error


def _percent(value: Any) -> tuple[float, int]:
    """A share in percent and its decimals; up to 1 it is read as a fraction."""
    number = Decimal(str(value))
    number = number.scaleb(2) if number <= 1 else number
    return float(number), max(0, -int(number.as_tuple().exponent))


def constant_answer(
    accuracy_percent: Any, counts: Any, digits: int | None = None
) -> list[int]:
    """Classes whose share of the test images, always answered, is this accuracy.

    Parameters
    ----------
    accuracy_percent : number or str, such as 29.19
    counts : (K,) test images of each class
    digits : int, optional
        Decimals to which the accuracy is rounded; by default those written.

    Returns
    -------
    list of int
        Often empty: the accuracy is not a constant predictor's.
    """
    value = Decimal(str(accuracy_percent))
    digits = -int(value.as_tuple().exponent) if digits is None else digits
    shares = 100 * np.asarray(counts) / np.sum(counts)
    near = np.abs(shares - float(value)) <= 0.5 * 10.0**-digits + 1e-9
    return np.flatnonzero(near).tolist()


def constant_predictor(subject: Subject) -> Result:
    """Find a classifier whose answer does not depend on the image.

    Looks at the model's output (N, K) over the batch, tensors of zeros moved a little
    (a head may start at zero); at `predictions`, (N,) classes or (N, K) scores, with
    `truth`; and at a `reported` accuracy with `test_counts`.
    """
    name, found = "constant_predictor", []
    if subject.model is not None:
        found += _constant_model(subject, name)
    counts = subject.test_counts
    if subject.truth is not None:
        counts = np.bincount(np.asarray(subject.truth))
    if counts is not None and np.count_nonzero(counts) < 2:
        return found, []
    if subject.predictions is not None:
        scores = np.asarray(subject.predictions)
        said = scores.argmax(1) if scores.ndim == 2 else scores
        if len(said) >= FEW and len(np.unique(said)) == 1:
            k = int(said[0])
            same = scores.ndim == 2 and np.ptp(scores, axis=0).max() < SPREAD
            key = "constant_scores" if same else "constant_class"
            found += _finding(name, "predictions", key, {"cases": len(said), "k": k})
            if counts is not None:
                found += _of_counts(name, k, counts, "error")
    given = (subject.reported or {}).get("accuracy")
    if given is not None and counts is not None:
        percent, digits = _percent(given)
        # With fewer digits than tell 1 image from the next, a match proves nothing.
        if 10.0**-digits * np.sum(counts) <= 100:
            for k in constant_answer(percent, counts, digits):
                found += _of_counts(name, k, counts, "warning")
    return found, []


def _of_counts(name: str, k: int, counts: Any, kind: Any) -> list[Finding]:
    correct, of = int(counts[k]) if k < len(counts) else 0, int(np.sum(counts))
    numbers = {"accuracy": f"{100 * correct / of:.2f}", "correct": correct, "of": of}
    return _finding(name, "accuracy", "constant_accuracy", numbers | {"k": k}, kind)


def _constant_model(subject: Subject, name: str) -> list[Finding]:
    generator = torch.Generator().manual_seed(0)
    with preserved(subject.model), torch.no_grad():
        set_training(subject.model, False)
        for one in subject.model.parameters():
            if not one.any():
                noise = torch.randn(one.shape, generator=generator)
                one.add_(0.02 * noise.to(one.device, one.dtype))
        out = call(subject)[0].double()
    n = len(out) if out.ndim == 2 else 0
    inputs = [x for x in tensors_in(subject.batch) if x.ndim > 1 and len(x) == n]
    if n < 2 or out.shape[1] < 2 or not any((x != x[:1]).any() for x in inputs):
        return []
    spread = float((out - out.mean(0)).abs().max() / out.abs().max().clamp_min(1e-300))
    if spread > SPREAD:
        return []
    numbers = {"spread": spread, "inputs": n}
    return _finding(name, "output of the model", "constant_model", numbers)


def micro_averaged(subject: Subject) -> Result:
    """Find precision or F1 that is only the accuracy under another name.

    `class_metric` is called as ``class_metric(predicted, truth) -> {name: number}``
    with integer tensors (100,), four classes of unequal size. `reported` numbers are
    judged by `predictions` and `truth` if they are there, else by agreement to 0.01 %.
    """
    name, found, notes = "micro_averaged", [], []
    if subject.class_metric is not None:
        cells = np.indices((4, 4)).reshape(2, 16).repeat(np.ravel(CONFUSION), axis=1)
        truth, said = torch.tensor(cells)
        rule = "integer tensors (100,), 0 to 3, or gave no {name: number}"
        got = _asked(subject, "class_metric", rule, said, truth.clone())
        if not isinstance(got, Mapping):
            raise SubjectError(f"class_metric failed on {rule}.")
        right = float((truth == said).float().mean())
        same = [
            k
            for k, v in got.items()
            if np.isclose(float(v) / np.array([1, 100]), right).any()
        ]
        if names := [k for k in same if "prec" in k.lower() or "f1" in k.lower()]:
            numbers = {"accuracy": right, "names": ", ".join(names)}
            found += _finding(name, "class_metric", "micro_metric", numbers)
        elif any("recall" in k.lower() for k in same):
            notes.append("the recall is the accuracy, as a weighted one always is")
    reported = subject.reported or {}
    given = [_percent(reported[k]) for k in ("accuracy", *KEYS) if k in reported]
    digits = min((d for _, d in given), default=0)
    if len(given) == 3 and np.ptp([v for v, _ in given]) < 10.0**-digits / 2:
        numbers = {"accuracy": f"{given[0][0]:.{digits}f} %", "digits": digits}
        sure = digits >= 2
        if subject.predictions is not None and subject.truth is not None:
            numbers |= (macro := _macro(subject))
            sure = any(abs(v - given[0][0]) > 10.0**-digits for v in macro.values())
        if sure and given[0][0] < 100:
            found += _finding(name, "reported", "micro_reported", numbers)
    return found, notes


def _macro(subject: Subject) -> dict[str, float]:
    """Macro precision and recall of the subject's predictions, in percent."""
    from sklearn.metrics import precision_recall_fscore_support as scores

    said = np.asarray(subject.predictions)
    said = said.argmax(1) if said.ndim == 2 else said
    macro = scores(subject.truth, said, average="macro", zero_division=0)
    return {f"macro_{k}": 100 * float(v) for k, v in zip(KEYS, macro[:2], strict=True)}


def loss_at_class_prior(subject: Subject) -> Result:
    """Find a training loss that stays where a model stays that never saw an image.

    `losses` are mean cross-entropies in nats, at least four: one per epoch, or so many
    steps that the noise of a batch averages out;
    `train_counts` the training images of each class. Both quarters of the second half
    must be within 1 % of the entropy of these frequencies, or at ln K and above (of a
    balanced or weighted loss, or a network that diverged).
    """
    if subject.losses is None:
        return [], []
    losses = np.asarray(subject.losses, dtype=float)
    if subject.train_counts is None or losses.ndim != 1 or len(losses) < 4:
        raise SubjectError("losses (at least four) need train_counts, and be numbers.")
    prior = np.asarray(subject.train_counts) / np.sum(subject.train_counts)
    known = prior[prior > 0]
    entropy, uniform = float(-(known * np.log(known)).sum()), float(np.log(len(prior)))
    later = losses[len(losses) // 2 :]
    middle = np.array([np.median(part) for part in np.array_split(later, 2)])
    numbers = {"loss": float(np.median(later)), "entropy": entropy}
    if (np.abs(middle / entropy - 1) < NEAR).all():
        return _finding("loss_at_class_prior", "losses", "prior_entropy", numbers), []
    if not (middle < (1 - NEAR) * uniform).any():  # NaN is not below either
        numbers["entropy"] = uniform
        return _finding("loss_at_class_prior", "losses", "uniform_entropy", numbers), []
    return [], []


def _part(seed: int) -> dict[str, np.ndarray]:
    """Scores of 8 candidates, and probabilities and truth for a threshold."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 64)
    tumour = rng.beta(1 + 2 * truth, 3 - 2 * truth)
    p = np.stack([1 - tumour, tumour], 1)
    return {"scores": rng.uniform(0.3, 0.9, 8), "probabilities": p, "truth": truth}


def chosen_on_test(subject: Subject) -> Result:
    """Find a model, an epoch or a threshold that is chosen on the test set.

    `select` is the code that chooses, called as ``select(validation, test) -> choice``.
    Each part is a dict of arrays: ``scores`` (8,) of the candidates, higher is better,
    ``probabilities`` (64, 2) and ``truth`` (64,) for a threshold; take what you need.
    A choice is an index, a number or an array of them. The test part is exchanged, the
    validation part kept, and the choice must stay; and the other way round it must not
    always stay. So code that reads the test part only to report it passes.
    """
    if subject.select is None:
        return [], []

    def choice(validation: int, test: int) -> bytes:
        parts = _part(validation), _part(test)
        rule = "dicts of scores, probabilities and truth"
        return np.asarray(_asked(subject, "select", rule, *parts)).tobytes()

    name, first = "chosen_on_test", choice(0, 100)
    if choice(0, 100) != first:
        return [], ["select chooses at random: seed it, so that it can be checked"]
    changed = sum(choice(0, 101 + k) != first for k in range(TRIES))
    stuck = all(choice(1 + k, 100) == first for k in range(TRIES))
    numbers = {"changed": changed, "tries": TRIES}
    found = _finding(name, "select", "test_decides", numbers) if changed else []
    if stuck and not changed:
        found = _finding(name, "select", "validation_ignored", numbers, "warning")
    return found, []


def layout_scrambles(subject: Subject) -> Result:
    """Find a step from (H, W, 3) to (3, H, W) that does not keep the picture.

    `layout` is called with a uint8 array (224, 224, 3) whose channels show a spot each,
    in places of their own, and returns (3, H, W) or (1, 3, H, W), array or tensor.
    Every channel that comes back must be a mix of the true ones: so resizing, scaling,
    normalising, grey and BGR pass, while scrambled memory and exchanged axes do not.
    """
    if subject.layout is None:
        return [], []
    row, column = np.mgrid[:224, :224] / 224
    spots = (0.2, 0.45), (0.5, 0.8), (0.8, 0.3)
    far = [((row - r) ** 2 + (column - c) ** 2) / 0.02 for r, c in spots]
    picture = np.rint(255 * np.exp(-np.stack(far, -1))).astype(np.uint8)
    out = _asked(subject, "layout", "uint8 (224, 224, 3)", picture.copy())
    out = torch.as_tensor(out).detach().double().cpu()
    if out.shape[:-2] not in ((3,), (1,), (1, 3), (1, 1)):
        raise SubjectError(f"layout gave {tuple(out.shape)} in place of (3, H, W).")
    out = out.reshape(-1, *out.shape[-2:])
    true = torch.as_tensor(picture).permute(2, 0, 1).double()
    viewed = torch.as_tensor(picture).view(3, 224, 224).double()
    readings = {"": true, "viewed": viewed, "transposed": true.mT}
    explained = {key: _explained(out, one) for key, one in readings.items()}
    best = max(explained, key=lambda key: explained[key])
    if explained[""] > EXPLAINED:
        return [], []
    cause = best if explained[best] > EXPLAINED else "moved"
    numbers = {"explained": explained[""], "cause": _texts()[cause]}
    return _finding("layout_scrambles", "layout", "scrambled", numbers), []


def _explained(out: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of the variance of the worst channel (C, H, W) that a mix explains."""
    basis = torch.nn.functional.interpolate(basis[None], out.shape[1:], mode="area")[0]
    y, x = (one.flatten(1).T - one.flatten(1).mean(1) for one in (out, basis))
    rest = y - x @ torch.linalg.lstsq(x, y).solution
    return float((1 - rest.square().sum(0) / y.square().sum(0).clamp_min(1e-12)).min())
