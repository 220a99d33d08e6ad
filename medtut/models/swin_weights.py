"""Published checkpoints for few-shot adaptation: where they are, and how they fit.

``swin_weights.yml`` holds the facts and the messages. Files of other people are opened
with ``weights_only=True``: nothing in them is run. Upstream loads with ``strict=False``
and without a word (utils/models.py:65), so a head, or all of a file, may be left out
unnoticed; here everything that is filled, left random or ignored is named, and a file
that does not fill what it should is refused.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from medtut.data.assets import local_dirs, offline
from medtut.data.cache import cache_dir, writable_dir
from medtut.data.download import Unreachable, from_url
from medtut.data.organs import STRUCTURES
from medtut.errors import MedtutError

_FACTS = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))
# Trainers keep their best score beside the weights, often as a number of numpy's.
_NUMBER = np.float64(0).__reduce__()[0]
_HARMLESS = [(_NUMBER, f"numpy.{c}.multiarray.scalar") for c in ("core", "_core")]
_HARMLESS += [np.dtype, *(type(np.dtype(t)) for t in ("f4", "f8", "i8", "b1"))]


class Loaded(NamedTuple):
    """What `load_published` did, by name.

    Attributes
    ----------
    loaded : tuple of str
        Tensors of the model that were filled.
    missing : tuple of str
        Parameters of the model that were not, and are as random as they were.
    ignored : tuple of str
        Keys of the file that were not used.
    structures : tuple of str
        What the outputs mean, if the classifier was filled; else nothing.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]
    structures: tuple[str, ...]


@cache
def registry() -> dict[str, dict[str, Any]]:
    """The published checkpoints by name, and what each needs.

    "fseft", "clipdriven", "suprem_swinunetr", "suprem_unet", "btcv", and "selfsup", the
    true self-supervised file. (Upstream documents one address for the last two.)

    Returns
    -------
    dict of dict
        ``title, note, licence`` (as far as it is stated);
        ``architecture``: "swin_unetr" or "suprem_unet";
        ``url``: official address, and ``filename`` to keep the file under;
        ``direct``: whether the address is the file, and no page with a button;
        ``structures``: what it was trained to find, and, where a classifier is filled,
        its outputs in order; ``spacing`` (mm) and ``hu``: what upstream feeds it;
        ``fills``: how the parameters begin that it fills; all others stay random;
        ``rename``: patterns and replacements, after ``module.`` and ``backbone.``;
        ``needs``, ``bars``: patterns that one key must match, and that none may.
    """
    lists = _FACTS["lists"] | {"template": STRUCTURES, "none": ()}
    found = {k: _FACTS["common"] | entry for k, entry in _FACTS["checkpoints"].items()}
    for entry in found.values():
        named = lists[entry["structures"]][: entry.pop("count", None)]
        entry |= {"structures": tuple(named), "fills": tuple(entry["fills"])}
    return found


def _fault(key: str, **facts: Any) -> MedtutError:
    return MedtutError(_FACTS["messages"][key].format(**facts).strip())


def _entry(name: str) -> dict[str, Any]:
    if name not in registry():
        raise _fault("unknown", name=name, names=", ".join(registry()))
    return registry()[name]


def published_file(name: str, progress: bool = True) -> Path:
    """A checkpoint's file: from a folder of the user, the cache, or its address.

    Parameters
    ----------
    name : str
        See `registry`.
    progress : bool

    Notes
    -----
    No checksum is published and we could not fetch the files, so none is pinned;
    `load_published` checks every name and shape. ``MEDTUT_ASSET_DIR`` names folders to
    look in first.

    Raises
    ------
    MedtutError
        If it is nowhere and cannot be fetched: gives the address and the file's name.
    """
    entry, folder = _entry(name), cache_dir() / "assets" / "swin-published"
    for place in (*local_dirs(), folder):
        if (path := place / entry["filename"]).is_file():
            return path
    why = "MEDTUT_OFFLINE is set" if offline() else "its address is a page, not a file"
    if entry["direct"] and not offline():
        try:
            path = writable_dir(folder) / entry["filename"]
            from_url(entry["url"], path, progress)
            return path
        except Unreachable as error:
            why = str(error)
    raise _fault("absent", name=name, why=why, **entry)


def _tensors(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a file by its own names; nothing in it is run."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            state = torch.load(path, "cpu", weights_only=True, mmap=is_zipfile(path))
        for wrapper in {"state_dict", "net"} & state.keys():
            state = state[wrapper]
        found = {k: v for k, v in state.items() if torch.is_tensor(v)}
        next(iter(found)).split(".")
    except Exception as error:  # of many kinds, by what is wrong with the file
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks to run {code[1]}" if code else str(error).split("\n")[0][:80]
        raise _fault("unreadable", path=path, why=why or "no tensors") from error
    return found


def _match(
    name: str, stored: dict[str, Tensor], model: nn.Module, head: bool
) -> tuple[dict[str, str], list[str]]:
    """Names of the tensors to fill by the file's keys, and what is wrong with them."""
    entry, own, names = _entry(name), model.state_dict(), {}
    for key in stored:
        names[key] = re.sub(r"(^|\.)(?:module\.|backbone\.)+", r"\1", key)
        for pattern, replacement in entry["rename"]:
            names[key] = re.sub(pattern, replacement, names[key])
    fills = tuple(f for f in entry["fills"] if head or f != "classifier")
    used = {k: n for k, n in names.items() if n in own and n.startswith(fills)}
    wanted = {n for n, _ in model.named_parameters() if n.startswith(fills)}
    lacks = [f for f in fills if not any(n.startswith(f) for n in wanted)]
    fit = re.search(entry["needs"], "\n".join(stored), re.MULTILINE)
    wrong = [] if fit else [f"no key matches {entry['needs']}"]
    wrong += [f"the model is no {entry['architecture']}: no {f}" for f in lacks]
    wrong += [f"{k} is no part of it" for k in stored if re.search(entry["bars"], k)]
    wrong += [f"{n} is missing" for n in sorted(wanted - set(used.values()))]
    wrong += ["keys mean the same"] * (len(used) - len(set(used.values())))
    for tensor, theirs, ours in ((n, stored[k], own[n]) for k, n in used.items()):
        if theirs.shape != ours.shape:
            wrong += [f"for {tensor} {[*theirs.shape]}, the model has {[*ours.shape]}"]
        elif tensor.endswith("_index") and not theirs.equal(ours.cpu()):
            wrong += [f"{tensor} is that of another window"]
        elif not theirs.isfinite().all():
            wrong += [f"{tensor} holds numbers that are not finite"]
    return used, wrong


def load_published(
    name: str, path: Path | str, model: nn.Module, *, head: bool = True
) -> Loaded:
    """Fill a model with a published checkpoint, in place.

    Parameters
    ----------
    name : str
        See `registry`.
    path : path
        Of the file, such as `published_file` gives.
    model : SwinUNETR or SupremUNet
        Of the checkpoint's feature size; with as many outputs as it has, if it has a
        classifier that is wanted.
    head : bool
        Whether to take the classifier, where there is one.

    Returns
    -------
    Loaded
        ``model.facts`` then says what it was trained for, at which spacing and window.

    Raises
    ------
    MedtutError
        If the file cannot be read, or is not this checkpoint: names what is wrong, and
        the checkpoints that it would fit. The model is then unchanged.
    """
    entry, stored = _entry(name), _tensors(path)
    used, wrong = _match(name, stored, model, head)
    if wrong:
        fits = [n for n in registry() if not _match(n, stored, model, False)[1]]
        facts = {"fits": ", ".join(fits) or "none", "keys": ", ".join([*stored][:2])}
        facts |= {"wrong": wrong[0], "count": len(wrong), "path": path, "name": name}
        raise _fault("wrong", kind=type(model).__name__, **facts, **entry)
    model.load_state_dict({n: stored[k] for k, n in used.items()}, strict=False)
    loaded = tuple(used.values())
    missing = tuple(n for n, _ in model.named_parameters() if n not in loaded)
    outputs = entry["structures"] if "classifier.weight" in loaded else ()
    model.facts = {"checkpoint": name, "structures": outputs}
    model.facts |= {"spacing": entry["spacing"], "hu": entry["hu"]}
    return Loaded(loaded, missing, tuple(k for k in stored if k not in used), outputs)
