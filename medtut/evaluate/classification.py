"""Judge a classifier: scores with intervals, floors, predictions on disk, Grad-CAM.

Probabilities are (N, K) with rows that sum to 1, truth is (N,) integers 0..K-1.
Calibration, priors and thresholds are in `medtut.evaluate.calibration`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike as Array
from torch import Tensor, nn

from medtut.errors import MedtutError
from medtut.files import write_text

FIXED = ["path", "truth", "predicted"]  # the first columns of a table of predictions


def checked(probabilities: Array, truth: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays.

    Raises
    ------
    MedtutError
        Shapes that do not fit, rows that are no probabilities, unknown classes.
    """
    p, y = np.asarray(probabilities, dtype=float), np.asarray(truth)
    said = f"Probabilities {p.shape} and truth {y.shape}: "
    if p.ndim != 2 or p.shape[1] < 2 or not len(p) or y.shape != p.shape[:1]:
        raise MedtutError(f"{said}they must be (N, K) and (N,), N >= 1, K >= 2.")
    good = (p >= 0).all(1) & (np.abs(p.sum(1) - 1) < 1e-3)  # False for NaN as well
    if not good.all():
        raise MedtutError(
            f"{said}{(~good).sum()} rows are no probabilities, first row "
            f"{good.argmin()}: {p[good.argmin()]}. Apply softmax to logits first."
        )
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= p.shape[1]:
        raise MedtutError(f"{said}truth must be integers 0 to {p.shape[1] - 1}.")
    return p, y.astype(int)


def confusion_scores(tables: Array) -> tuple[dict, dict]:
    """Scores of confusion tables (B, K, K), rows the truth: overall and per class.

    As scikit-learn's with ``zero_division=0`` and the classes present in the truth as
    labels: the precision of a class never said is 0; a class without truth has no
    recall and no F1 (NaN), and averages leave it out. Written for all bootstrap tables
    at once, where scikit-learn would take milliseconds for each.

    Returns
    -------
    name to (B,), and name to (B, K)
    """
    table = np.asarray(tables, dtype=float)
    right = np.diagonal(table, axis1=1, axis2=2)
    true, said = table.sum(2), table.sum(1)
    nowhere = np.where(true > 0, 0.0, np.nan)
    each = {
        "precision": right / np.maximum(said, 1e-12),
        "recall": right / np.maximum(true, 1e-12) + nowhere,
        "f1": 2 * right / np.maximum(true + said, 1e-12) + nowhere,
    }
    overall = {"accuracy": right.sum(1) / true.sum(1)}
    overall["balanced_accuracy"] = np.nanmean(each["recall"], axis=1)
    for name, one in each.items():
        overall[f"macro_{name}"] = np.nanmean(one + nowhere, axis=1)
        overall[f"weighted_{name}"] = np.nansum(one * true, axis=1) / true.sum(1)
    return overall, each


def report(
    probabilities: Array,
    truth: Array,
    classes: Sequence[str],
    groups: Sequence[Any] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge probabilities, with 95 % percentile bootstrap intervals over cases.

    Parameters
    ----------
    probabilities, truth : (N, K) and (N,)
    classes : K names.
    groups : (N,), optional
        Patient or cluster of duplicates of each case: these are drawn together, since
        copies are no independent evidence. By default each case is its own.
    n_boot, seed : how many resamples, and their seed.

    Returns
    -------
    dict, ready for JSON; every score is [value, low, high]
        ``classes``; ``confusion``, (K, K) counts, rows the truth, columns what was
        said; ``overall``, name to score: accuracy, balanced_accuracy, macro_ and
        weighted_ precision, recall and f1, nll (nats) and brier (0 to 2);
        ``per_class``, class to precision, recall, f1 and auroc (one against the rest),
        None where there is no such number; ``notes`` on numbers that are missing or
        set by convention.

    Notes
    -----
    AUROC is the share of pairs (of the class, not of it) in the right order, ties half
    (Hanley and McNeil 1982). A resample without a class counts for its other scores.

    Raises
    ------
    MedtutError
        See `checked`; or when `classes` or `groups` do not fit.
    """
    p, y = checked(probabilities, truth)
    n, k = p.shape
    group = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)[
        1
    ]
    if (len(classes), len(group)) != (k, n):
        raise MedtutError(f"{len(classes)} classes, {len(group)} groups for {p.shape}.")
    of = group.max() + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(of, np.full(of, 1 / of), size=n_boot)
    # The first row is the data as they are, the others are resamples.
    weight = np.vstack([np.ones(n), drawn[:, group]])
    cell = np.eye(k * k)[y * k + p.argmax(1)]
    overall, each = confusion_scores((weight @ cell).reshape(-1, k, k))
    own, wanted = p[np.arange(n), y], np.eye(k)[y]
    losses = {"nll": -np.log(own.clip(1e-12)), "brier": ((p - wanted) ** 2).sum(1)}
    overall |= {key: weight @ one / weight.sum(1) for key, one in losses.items()}
    each["auroc"] = np.stack([_auroc(p[:, c], y == c, weight) for c in range(k)], 1)
    confusion = cell.sum(0).reshape(k, k).astype(int)
    absent = "{} is not in the truth: no recall, F1, AUROC; averages leave it out"
    unsaid = "{} was never said: its precision, 0/0, counts as 0"
    cases = (absent, confusion.sum(1)), (unsaid, confusion.sum(0))
    return {
        "classes": list(classes),
        "confusion": confusion.tolist(),
        "overall": {key: _score(one) for key, one in overall.items()},
        "per_class": {
            name: {key: _score(one[:, c]) for key, one in each.items()}
            for c, name in enumerate(classes)
        },
        "notes": [
            s.format(classes[c]) for s, m in cases for c in np.flatnonzero(m == 0)
        ],
    }


def _score(column: np.ndarray) -> list[float] | None:
    if np.isnan(column[0]):
        return None
    return [float(column[0]), *np.nanquantile(column[1:], [0.025, 0.975]).tolist()]


def _auroc(p: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> np.ndarray:
    gap = p[positive][:, None] - p[~positive]
    better = 0.5 * (np.sign(gap) + 1)
    up, down = weight[:, positive], weight[:, ~positive]
    pairs = up.sum(1) * down.sum(1)
    right = ((up @ better) * down).sum(1)
    return np.where(pairs > 0, right / np.maximum(pairs, 1), np.nan)


def floors(train_truth: Array, test_truth: Array, k: int) -> dict[str, Any]:
    """What is reached without looking at an image: to stand beside every model.

    Parameters
    ----------
    train_truth, test_truth : (N,) and (M,) classes 0..k-1

    Returns
    -------
    dict
        ``constant``, a list: for each class, always said, correct, of, and the scores
        of `confusion_scores`; ``prior_entropy``, the loss in nats of a model that knows
        only the training frequencies, on training data; ``prior_cross_entropy``, the
        same on the test data (infinite for a test class that training never had).
    """
    train, test = (np.bincount(t, minlength=k) for t in (train_truth, test_truth))
    tables = np.einsum("t,cs->cts", test, np.eye(k))  # always c: one full column
    overall, _ = confusion_scores(tables)
    constant = [
        {"correct": int(test[c]), "of": int(test.sum())}
        | {name: float(column[c]) for name, column in overall.items()}
        for c in range(k)
    ]
    with np.errstate(divide="ignore"):
        cost = -np.log(train / train.sum())
    own, other = (float(n[n > 0] @ cost[n > 0] / n.sum()) for n in (train, test))
    return {"constant": constant, "prior_entropy": own, "prior_cross_entropy": other}


def write_predictions(
    path: Path,
    paths: Sequence[Any],
    truth: Array,
    probabilities: Array,
    classes: Sequence[str],
) -> Path:
    """Write a CSV by rename: path, truth, predicted (names), and a column per class.

    Numbers are written so that reading gives the same bits, and every score with them.
    """
    p, y = checked(probabilities, truth)
    writer = csv.writer(out := io.StringIO(), lineterminator="\n")
    writer.writerow([*FIXED, *classes])
    for file, t, row in zip(paths, y, p, strict=True):
        said = (classes[t], classes[row.argmax()])
        writer.writerow([Path(file).as_posix(), *said, *row.tolist()])
    return write_text(path, out.getvalue())


def read_predictions(path: Path) -> tuple[list[str], Array, Array, list[str]]:
    """Read what `write_predictions` wrote: paths, truth, probabilities, classes.

    Raises
    ------
    MedtutError
        A file that is missing or no such table, by name.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        if header[:3] != FIXED:
            raise ValueError(f"its first columns are {header[:3]}, not {FIXED}")
        truth = np.array([header[3:].index(row[1]) for row in rows])
        p, y = checked(np.array([row[3:] for row in rows], dtype=float), truth)
    except (OSError, ValueError, IndexError, MedtutError) as error:
        raise MedtutError(f"{path} is no table of predictions: {error}") from error
    return [row[0] for row in rows], y, p, header[3:]


def grad_cam(model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Where a layer's channels speak for a class (Grad-CAM, Selvaraju et al. 2017).

    Eq. 1 and 2: channels are weighted by the mean gradient of the class score, summed,
    and what speaks against the class is cut off. The model runs in eval mode and is
    left as it was, without a hook or a gradient.

    Parameters
    ----------
    model : nn.Module
        ``model(x) -> (N, K)`` logits.
    layer : nn.Module
        Of the model, with an output (N, C, h, w).
    x, target : (N, 3, H, W) and (N,)

    Returns
    -------
    (N, H, W) in [0, 1], each divided by its largest value; all 0 where none speaks for
    the class.

    Raises
    ------
    MedtutError
        If `layer` did not run, or gives no maps.
    """
    kept: list[Tensor] = []
    modes = [(one, one.training) for one in model.modules()]
    handle = layer.register_forward_hook(lambda _m, _x, out: kept.append(out))
    try:
        for one, _ in modes:
            one.training = False
        with torch.enable_grad():  # and a frozen model needs an input that wants one
            logits = model(x.detach().clone().requires_grad_())
            if not kept or getattr(kept[-1], "ndim", 0) != 4:
                raise MedtutError("grad_cam: the layer did not run, or gives no maps.")
            score = logits.gather(1, target.long()[:, None]).sum()
            (slope,) = torch.autograd.grad(score, kept[-1])
    finally:
        handle.remove()
        for one, mode in modes:
            one.training = mode
    maps = (slope.mean((2, 3), keepdim=True) * kept[-1].detach()).sum(1, keepdim=True)
    maps = nn.functional.interpolate(maps.relu(), x.shape[2:], mode="bilinear")[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
