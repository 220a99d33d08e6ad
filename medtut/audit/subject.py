"""What is audited, how its model is called, and how it is loaded from a file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medtut.errors import MedtutError

# What of a subject a detector can start from; the rest only helps.
AUDITED = (
    "model", "split", "images", "metric", "segmentation_loss", "evaluation",
    "predictions", "reported", "losses", "class_metric", "select", "layout",
    "hu", "rescale", "switches", "bootstrap", "intervals",
)  # fmt: skip


class SubjectError(MedtutError):
    """What was handed to the audit cannot be audited."""


@dataclass
class Subject:
    """A model and what is known about its training, its data and its metric.

    Attributes
    ----------
    model : nn.Module, optional
        The model, adapters attached, in the state in which training would start.
        Without one only the detectors of data, losses and metrics run.
    batch : tensor, tuple, list or dict, optional
        One batch. A tuple gives the model as many items as its forward requires, so
        (image, target) works; a dict gives the keys that forward names.
    loss : callable, optional
        ``loss(model, batch) -> scalar tensor``.
    forward : callable, optional
        ``forward(model, batch) -> output``, when the rules above do not fit.
    optimizer : torch.optim.Optimizer or callable, optional
        The one used, or ``optimizer(model)`` that makes it.
    split : mapping or dataclass, optional
        Name of a side ("train", "test") to its ids, paths or (id, z) tuples, to its
        images (N, H, W) or (N, C, H, W), or to a dict with ``ids`` and ``images``.
    patient_of : callable, optional
        ``patient_of(entry of the split) -> patient``, where names do not tell.
    images : tensor or array, optional
        Images (B, C, H, W) as the model gets them; by default those of `batch`.
    metric : callable, optional
        ``metric(prediction, label) -> number`` of two label maps.
    segmentation_loss : callable, optional
        ``segmentation_loss(logits, target) -> scalar tensor`` of (B, 1, H, W) each,
        target 0 or 1: the criterion alone, where `loss` runs the model as well.
    evaluation : callable, optional
        ``evaluation(model, image, label) -> number``: your validation of one volume
        (X, Y, Z), from slicing to score.
    predictions : array, optional
        Classes (N,) or scores (N, K) of a classifier on its test set.
    truth : array, optional
        The classes (N,) that belong to `predictions`.
    train_counts, test_counts : sequence of int, optional
        Training and test images of each class.
    reported : dict, optional
        A classifier's ``accuracy``, ``precision``, ``recall`` as published: fractions
        up to 1, or percent; as text where closing zeros count.
    losses : sequence of float, optional
        Mean training cross-entropies in nats, one per step or epoch.
    class_metric : callable, optional
        ``class_metric(predicted, truth) -> {name: number}`` of integer tensors (N,).
    select : callable, optional
        ``select(validation, test) -> choice``: the code that chooses a model, an epoch
        or a threshold; see `chosen_on_test` for the parts.
    layout : callable, optional
        ``layout(picture) -> tensor``: your step from uint8 (H, W, 3) to (3, H, W).
    hu : array, optional
        A CT volume as your reader returns it: HU, or [-1, 1] as the model gets it.
    rescale : callable, optional
        ``rescale(stored, slope, intercept) -> HU``: your step from a file's numbers.
    switches : mapping, optional
        Name of an ablation switch to a pair (on, off) of functions that make the model,
        or to the dotted name of the part of `model` that it is about.
    bootstrap : callable, optional
        ``bootstrap(scores, truth, seed)`` of arrays (N,) -> draws, or (low, high).
    intervals : mapping, optional
        Name of a score to (low, high), or [value, low, high].
    expects_adapters : bool, optional
        Whether finding no adapter at all is an error. By default only when a name in
        the model says that there should be some.
    """

    model: nn.Module | None = None
    batch: Any = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    optimizer: Any = None
    split: Any = None
    patient_of: Callable[[Any], Any] | None = None
    images: Any = None
    metric: Callable[[Any, Any], Any] | None = None
    segmentation_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    evaluation: Callable[[nn.Module, Any, Any], Any] | None = None
    predictions: Any = None
    truth: Any = None
    train_counts: Any = None
    test_counts: Any = None
    reported: Mapping[str, Any] | None = None
    losses: Any = None
    class_metric: Callable[[Tensor, Tensor], Mapping[str, Any]] | None = None
    select: Callable[[dict, dict], Any] | None = None
    layout: Callable[[Any], Any] | None = None
    hu: Any = None
    rescale: Callable[[Any, float, float], Any] | None = None
    switches: Mapping[str, Any] | None = None
    bootstrap: Callable[[Any, Any, int], Any] | None = None
    intervals: Mapping[str, Any] | None = None
    expects_adapters: bool | None = None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors_in(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from tensors_in(getattr(value, one.name))


def _copied(value: Any) -> Any:
    """Clone a batch's tensors, so that a model working in place does no harm."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(one) for one in value)
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return value


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple, dict]:
    """Choose what of a batch goes to `model.forward`."""
    if not isinstance(batch, tuple | list | Mapping):
        return (batch,), {}
    named = inspect.signature(model.forward).parameters.values()
    loose = {one.kind for one in named}
    plain = [one for one in named if one.kind <= one.POSITIONAL_OR_KEYWORD]
    required = [one for one in plain if one.default is one.empty]
    if isinstance(batch, Mapping):
        if inspect.Parameter.VAR_KEYWORD in loose:
            return (), dict(batch)
        known = {one.name: batch[one.name] for one in plain if one.name in batch}
        if all(one.name in known for one in required) and known:
            return (), known
        guesses = ("image", "pixel_values", "x", "input", "inputs", "images")
        found = next((batch[key] for key in guesses if key in batch), batch)
        return (found,), {}
    if inspect.Parameter.VAR_POSITIONAL in loose and not plain:
        return tuple(batch), {}
    return tuple(batch[: max(1, len(required))]), {}


def call(subject: Subject) -> list[Tensor]:
    """Run the model on the batch and return its floating-point outputs.

    Raises
    ------
    SubjectError
        If there is no batch, the model fails on it, or nothing comes back.
    """
    batch = _copied(subject.batch)
    try:
        if subject.forward is not None:
            output = subject.forward(subject.model, batch)
        else:
            args, kwargs = _arguments(subject.model, batch)
            output = subject.model(*args, **kwargs)
    except Exception as error:
        raise SubjectError(
            f"The model failed on the batch: {type(error).__name__}: {error}. Let the "
            "factory return a batch that fits, or forward(model, batch)."
        ) from error
    found = [one for one in tensors_in(output) if one.is_floating_point()]
    if not found:
        raise SubjectError("The model's output holds no floating-point tensor.")
    return found


def loss_of(subject: Subject) -> Tensor:
    """Return the subject's loss, or a random weighted sum of the outputs.

    A sum of squares would not do: behind a normalisation it is constant, and every
    gradient would be zero.
    """
    if subject.loss is not None:
        try:
            value = subject.loss(subject.model, _copied(subject.batch))
        except Exception as error:
            raise SubjectError(
                f"The loss failed on the batch: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise SubjectError("loss(model, batch) must return a tensor of one number.")
        return value.sum()
    outputs = call(subject)
    generator = torch.Generator().manual_seed(0)
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for one in outputs:
        weight = torch.randn(one.shape, generator=generator).to(one.device)
        total = total + (one.float() * weight).sum() / max(one.numel(), 1)
    return total


def with_batch(subject: Subject) -> tuple[Subject, str | None]:
    """Return a subject that has a batch, made up from the first layer if need be."""
    if subject.batch is not None:
        return subject, None
    for batch in _made_up(subject.model):
        trial = Subject(**{**vars(subject), "batch": batch})
        try:
            with torch.no_grad():
                call(trial)
        except SubjectError:
            continue
        shape = "×".join(str(n) for n in batch.shape)
        return trial, f"no batch was given; ran on random numbers of shape {shape}"
    raise SubjectError(
        "No batch was given and none could be made up from the first layer. Let the "
        "factory return {'model': model, 'batch': batch}."
    )


def _made_up(model: nn.Module) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {nn.Conv1d: (256,), nn.Conv2d: (64, 64), nn.Conv3d: (32, 32, 32)}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield torch.randn(4, module.in_features, generator=generator)
            yield torch.randn(2, 5, module.in_features, generator=generator)
            return
        if isinstance(module, nn.Embedding):
            high = module.num_embeddings
            yield torch.randint(high, (2, min(8, high)), generator=generator)
            return
        for kind, size in sizes.items():
            if isinstance(module, kind):
                yield torch.randn(2, module.in_channels, *size, generator=generator)
                if len(size) == 2:
                    shape = (2, module.in_channels, 224, 224)
                    yield torch.randn(*shape, generator=generator)
                return


def as_subject(value: Any, origin: str = "the factory") -> Subject:
    """Turn a model, a dict or a `Subject` into a `Subject`.

    Raises
    ------
    SubjectError
        If it is none of these, a dict with unknown keys, or holds nothing to audit.
    """
    if isinstance(value, Subject):
        subject = value
    elif isinstance(value, nn.Module):
        subject = Subject(value)
    elif isinstance(value, dict):
        known = [one.name for one in fields(Subject)]
        unknown = [str(key) for key in value if key not in known]
        if unknown:
            raise SubjectError(
                f"{origin} returned unknown keys: {', '.join(unknown)}. "
                f"Known: {', '.join(known)}."
            )
        subject = Subject(**value)
    else:
        raise SubjectError(
            f"{origin} returned {type(value).__name__}; expected a torch module, a "
            "dict with 'model', or a medtut.audit.Subject."
        )
    if all(getattr(subject, key) is None for key in AUDITED):
        raise SubjectError(
            f"What {origin} returned has no 'model', and nothing else that is looked "
            f"at: {', '.join(AUDITED[1:])}."
        )
    if not isinstance(subject.model, nn.Module | None):
        kind = type(subject.model).__name__
        raise SubjectError(f"The model of {origin} is {kind}, not a torch module.")
    return subject


def load_factory(target: str) -> Subject:
    """Import ``FILE.py:factory`` and call the factory (this runs the file's code).

    Parameters
    ----------
    target : str
        Such as ``"train.py:build_model"``.

    Raises
    ------
    SubjectError
        For a missing file, an unknown function, code that raises, a wrong return.
    """
    file, colon, name = target.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise SubjectError(f"Write the target as FILE.py:factory; got {target!r}.")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise SubjectError(f"There is no file {file!r} (looked in {Path.cwd()}).")
    module_name = f"medtut_audited_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise SubjectError(f"{file!r} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # its own imports, as when run as a script
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    what, value = f"Importing {file}", None
    try:
        spec.loader.exec_module(module)
        factory = getattr(module, name, None)
        if callable(factory):
            what = f"{name}() in {file}"
            value = factory()
    except (Exception, SystemExit) as error:
        raise SubjectError(_raised(what, error, path)) from error
    finally:
        sys.path.remove(str(path.parent))
        sys.modules.pop(module_name, None)
    if not callable(factory):
        there = {k: v for k, v in vars(module).items() if inspect.isfunction(v)}
        own = [key for key, one in there.items() if one.__module__ == module_name]
        listed = ", ".join(own) or "none"
        raise SubjectError(f"{file} has no function {name!r}. There are: {listed}.")
    return as_subject(value, f"{name}() in {path.name}")


def _raised(what: str, error: BaseException, path: Path) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [one.lineno for one in frames if Path(one.filename) == path]
    line = f" (line {own[-1]})" if own else ""
    return f"{what} raised {type(error).__name__}{line}: {error}"
