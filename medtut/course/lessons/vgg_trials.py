"""Lesson 04's smaller experiments: the published run, its grid, folds, baselines."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.course.lessons.vgg import by_case, probabilities, train_arm
from medtut.course.lessons.vgg_pictures import Task
from medtut.data import brain_mri
from medtut.data.brain_mri import CLASSES
from medtut.errors import MedtutError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medtut.course.lessons.l04 import Settings
    from medtut.models.prefix import PrefixCache

# The published net at a size for a laptop: an eighth of the channels, 64 pixels.
SCRATCH = {"width": 1 / 8, "side": 64, "hidden": 512}
# The published grid; its Adam is AdamW without decay.
GRID = {
    "lr": (1e-3, 5e-3, 1e-2),
    "batch_size": (16, 32, 64),
    "optimizer": ("adam", "adamw", "sgd"),
    "epochs": (3, 10),
}
PUBLISHED = {"lr": 1e-3, "batch_size": 32, "optimizer": "adam", "epochs": 10}


def stored_rows(images: np.ndarray, side: int) -> Tensor:
    """Pictures as the published code keeps them: (N, side, side, 3) in [0, 1]."""
    import torch
    from torch.nn import functional as F

    grey = torch.from_numpy(images)[:, None].float() / 255
    small = F.interpolate(grey, (side, side), mode="bilinear", antialias=True)
    return small.movedim(1, 3).expand(-1, -1, -1, 3).contiguous()


def published_run(
    task: Task,
    seed: int = 0,
    *,
    lr: float,
    batch_size: int,
    optimizer: str,
    epochs: float,
    init: str = "torch",
    straight: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Train the published net from scratch and judge it, as the source does.

    Parameters
    ----------
    init : {"torch", "he"}
        As published, or as the depth needs it.
    straight : bool
        Hand it the true channels in the place of the scrambled ones.

    Returns
    -------
    dict
        ``losses`` by step; ``validation`` and ``test``, probabilities (N, 4);
        ``counts``, the training pictures of each class.
    """
    import torch
    from torch.nn import functional as F

    from medtut.models.published_vgg import PublishedVGG16
    from medtut.models.vgg import initialise
    from medtut.train import TrainConfig, fit

    net = PublishedVGG16(**SCRATCH, seed=seed)
    if init != "torch":
        initialise(net, init, seed)
    rows = stored_rows(task.images, SCRATCH["side"])
    if straight:
        rows = rows.movedim(3, 1).contiguous()
    items = [
        {"image": rows[i], "label": int(task.labels[i])} for i in task.train.tolist()
    ]
    losses: list[float] = []

    def loss(model: nn.Module, batch: dict) -> Tensor:
        value = F.cross_entropy(model(batch["image"]), batch["label"])
        losses.append(float(value.detach()))
        return value

    config = TrainConfig(
        steps=max(1, round(epochs * len(items) / batch_size)),
        batch_size=min(batch_size, len(items)),
        lr=lr,
        optimizer="sgd" if optimizer == "sgd" else "adamw",
        weight_decay=0.01 if optimizer == "adamw" else 0.0,
        schedule="constant",
        clip_norm=0.0,
        seed=seed,
    )
    fit(net, loss, items, config, progress=progress)
    net.cpu().eval()
    with torch.inference_mode():
        parts = {"validation": task.validation, "test": task.test}
        found = {
            name: torch.cat([net(x) for x in rows[at].split(64)]).double().softmax(1)
            for name, at in parts.items()
        }
    counts = task.counts("train").tolist()
    return {"losses": losses, "counts": counts} | {
        name: p.numpy() for name, p in found.items()
    }


def grid_search(task: Task, settings: Settings, seed: int, arm: str) -> dict[str, Any]:
    """The published grid, chosen on validation; for its net or one of our arms.

    Returns
    -------
    dict
        ``cases`` of the chosen point on the test pictures, see `by_case`; ``table``,
        one row a point: settings, validation and test score, answers ever given. A
        point whose loss left the finite numbers has no row.

    Raises
    ------
    MedtutError
        No point is left.
    """
    from medtut.train import TrainError

    rows = []
    truth = {part: task.labels[getattr(task, part)] for part in ("validation", "test")}
    for values in itertools.product(*GRID.values()):
        point = dict(zip(GRID, values, strict=True))
        try:
            if arm == "published":
                found = published_run(task, seed, **point)
            else:
                found = _grid_point(task, settings, seed, arm, **point)
        except TrainError:
            continue
        said = {part: found[part].argmax(1) for part in truth}
        row = {part: float(by_case(said[part], truth[part]).mean()) for part in truth}
        answers = np.bincount(said["test"], minlength=len(CLASSES))
        cases = by_case(said["test"], truth["test"]).tolist()
        rows.append({**point, **row, "answers": answers.tolist(), "cases": cases})
    if not rows:
        raise MedtutError(f"grid_search: no point of {arm} has a finite loss.")
    best = max(rows, key=lambda row: row["validation"])
    table = [{k: v for k, v in row.items() if k != "cases"} for row in rows]
    return {"cases": np.array(best["cases"]), "table": table}


def _grid_point(
    task: Task,
    settings: Settings,
    seed: int,
    arm: str,
    *,
    lr: float,
    batch_size: int,
    optimizer: str,
    epochs: float,
) -> dict[str, np.ndarray]:
    """Probabilities of one of our arms on validation and test, at a grid's point."""
    given = settings.model_copy(update={"batch_size": batch_size})
    more = {"epochs": epochs, "optimizer": optimizer, "evaluations": 1}
    cache, _ = train_arm(arm, seed, lr, given, task, **more)
    return {
        part: probabilities(cache, task.images[getattr(task, part)], settings)
        for part in ("validation", "test")
    }


def kfold(
    task: Task,
    settings: Settings,
    rate: float,
    grouped: bool,
    below: PrefixCache | None = None,
) -> list[float]:
    """Balanced accuracy of the pooled head on each fold of ``Training``.

    ``grouped`` keeps near-duplicates together; without it they are dealt out. Four
    epochs at most, on pictures as they are; `below` as in `train_arm`.
    """
    learn = np.sort(np.concatenate([task.train, task.validation]))
    groups = task.groups[learn] if grouped else np.arange(len(learn))
    scores = []
    # Other looks would be drawn anew for every fold, and every one has another.
    change = {"epochs": min(settings.epochs, 4.0), "copies": 0, "lesions": 0}
    settings = settings.model_copy(update=change)
    for train, held in brain_mri.grouped_folds(task.labels[learn], groups, k=5):
        fold = replace(task, train=learn[train], validation=learn[held])
        cache, _ = train_arm(
            "pooled", 0, rate, settings, fold, evaluations=1, below=below
        )
        found = probabilities(cache, task.images[fold.validation], settings)
        truth = task.labels[fold.validation]
        scores.append(float(by_case(found.argmax(1), truth).mean()))
    return scores


def baselines(task: Task, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Answers, by part and name, of models that see no network's features.

    ``pca``: standardised pixels, 256 principal components, logistic regression.
    ``size``: a forest on width, height and bytes of the file, no pixel looked at.
    Both learn from the training pictures and are asked on validation and test.
    """
    from sklearn.decomposition import PCA
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    learn = task.train
    pixels = task.images.reshape(len(task.images), -1).astype(np.float32)
    parts = min(256, len(learn) - 1)
    models = {
        "pca": make_pipeline(
            StandardScaler(),
            PCA(parts, svd_solver="randomized", random_state=seed),
            LogisticRegression(max_iter=2000, class_weight="balanced", C=0.01),
        ),
        "size": RandomForestClassifier(
            200, class_weight="balanced", random_state=seed, min_samples_leaf=2
        ),
    }
    inputs = {"pca": pixels, "size": brain_mri.size_features(task.pictures)}
    for name, model in models.items():
        model.fit(inputs[name][learn], task.labels[learn])
    return {
        part: {
            name: model.predict(inputs[name][getattr(task, part)])
            for name, model in models.items()
        }
        for part in ("validation", "test")
    }
