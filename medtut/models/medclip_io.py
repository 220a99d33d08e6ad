"""Weights of the MedCLIP towers, and the pair of files the published code keeps.

``load_small_tower`` gives the course's own tower, which lies in the package;
``load_official`` reads MedCLIP's, from its official address or from a file. Files of
other people are opened with ``weights_only=True``: nothing in them is run.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from medtut.data.assets import local_dirs, offline
from medtut.data.cache import cache_dir, writable_dir, write_by_rename
from medtut.errors import MedtutError
from medtut.lora import load_adapter, save_adapter
from medtut.models.medclip import MedCLIPSegmenter, SwinTower

SMALL_WEIGHTS = Path(__file__).parent / "weights" / "medclip_small.safetensors"
# What medclip/medclip_vit_weight.txt of RyanWangZf/MedCLIP points to.
OFFICIAL_URL = "https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip"
OFFICIAL_FILE = OFFICIAL_URL.rsplit("/", 1)[1]

# transformers 4 -> 5. The first that fits counts.
_RENAMED = (
    (r"attention\.self\.(q|k|v)(?:uery|ey|alue)\.", r"attention.\1_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"attention\.self\.(relative_\w+)", r"attention.relative_position_bias.\1"),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
)


def stored_name(key: str) -> str:
    """Name of a tensor in transformers 5, whichever version wrote it; "" if computed.

    The tables of relative positions follow from the architecture: some versions store
    them, some do not.
    """
    if key.endswith(("relative_position_index", "position_ids")):
        return ""
    for old, new in _RENAMED:
        key, hits = re.subn(old, new, key)
        if hits:
            break
    return key


def load_tower_state(tower: SwinTower, state: Mapping[str, Tensor], where: str) -> None:
    """Copy a state dict into a tower, across the renames of transformers.

    Raises
    ------
    MedtutError
        If a tensor is missing, unknown or of another shape; says which, in `where`.
    """
    own, given = (
        {name: v for k, v in d.items() if (name := stored_name(k))}
        for d in (tower.state_dict(keep_vars=True), state)
    )
    shapes = [{k: tuple(v.shape) for k, v in d.items()} for d in (own, given)]
    if wrong := sorted(k for k, _ in shapes[0].items() ^ shapes[1].items()):
        ours, theirs = (d.get(wrong[0], "nothing") for d in shapes)
        raise MedtutError(
            f"{where} does not fit SwinTower({tower.config!r}): for {wrong[0]} it has "
            f"{theirs}, the tower {ours} ({len(set(wrong))} such tensors). Is it "
            "another model, or another flavour of it?"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(given[key])


def load_small_tower(path: Path | None = None) -> SwinTower:
    """The course's own tower, pretrained on drawn slices and their reports.

    ``data_scripts/pretrain_medclip_small.py`` makes it again;
    ``medtut/data/cards/medclip-small.md`` is its card.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = path or SMALL_WEIGHTS
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MedtutError(
            f"{path} cannot be read ({error}). Reinstall medtut, or make the file "
            "with: python data_scripts/pretrain_medclip_small.py"
        ) from error
    tower = SwinTower("small")
    load_tower_state(tower, state, str(path))
    return tower.eval()


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise MedtutError(
            f"{path} cannot be opened as plain weights ({str(error)[:80]!r}). It is "
            "missing, damaged, or holds more than tensors, which is never run here."
        ) from error
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise MedtutError(f"{path} holds no state dict, but a {type(state).__name__}.")
    return state


def official_file() -> Path:
    """The official archive: from a folder of the user, the cache, or the network.

    Notes
    -----
    Its authors publish no checksum and we could not fetch it, so none is pinned; the
    sha256 of what came is logged by pooch. ``MEDTUT_ASSET_DIR`` names folders to look
    in first.
    """
    folder = cache_dir() / "assets" / "medclip-official"
    for place in (*local_dirs(), folder):
        if (path := place / OFFICIAL_FILE).is_file():
            return path
    try:
        if offline():
            raise MedtutError("MEDTUT_OFFLINE is set")
        import pooch

        folder = writable_dir(folder)
        # Without a hash to compare with, pooch writes by rename and logs the sha256.
        bar = {"progressbar": True}
        return Path(pooch.retrieve(OFFICIAL_URL, None, OFFICIAL_FILE, folder, **bar))
    except Exception as error:  # whatever the network does
        raise MedtutError(
            f"MedCLIP's weights are not here and could not be fetched ({error}). Get "
            f"{OFFICIAL_URL} by hand; give its path, or name its folder in "
            "MEDTUT_ASSET_DIR."
        ) from error


def load_official(path: Path | str | None = None) -> SwinTower:
    """MedCLIP's own image tower (the Swin flavour), without its text tower.

    Parameters
    ----------
    path : path, optional
        ``medclip-vit-pretrained.zip`` or the ``pytorch_model.bin`` in it; from
        `official_file` if left out.

    Raises
    ------
    MedtutError
        If the file cannot be had or opened, or holds another model (the ResNet one).
    """
    path = Path(path or official_file())
    with tempfile.TemporaryDirectory() as room:
        binary = path
        if zipfile.is_zipfile(path):  # a .bin of PyTorch is a zip as well
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("pytorch_model.bin"):
                        binary = Path(archive.extract(name, room))
        state = _load_pickle(binary)
    mine = "vision_model."
    vision = {k.removeprefix(mine): v for k, v in state.items() if k.startswith(mine)}
    tower = SwinTower("tiny")
    load_tower_state(tower, vision, str(path))
    return tower.eval()


def save_published_pair(model: MedCLIPSegmenter, folder: Path | str) -> Path:
    """Write what the published code keeps: ``lora_medclip/`` and ``seg_head.pth``."""
    folder = Path(folder)
    save_adapter(model.encoder, folder / "lora_medclip")
    state = {k: v.detach().cpu() for k, v in model.seg_head.state_dict().items()}
    write_by_rename(folder / "seg_head.pth", lambda p: torch.save(state, p))
    return folder


def load_published_pair(model: MedCLIPSegmenter, folder: Path | str) -> None:
    """Put such a pair into a fresh model of the same architecture.

    Raises
    ------
    MedtutError
        If a file is missing, damaged, or of another architecture. If the head does
        not fit, the model is unchanged.
    """
    path = Path(folder) / "seg_head.pth"
    state, own = _load_pickle(path), model.seg_head.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        raise MedtutError(
            f"{path} was saved from another head than {type(model.seg_head).__name__}: "
            f"it has {len(state)} tensors such as {next(iter(state), 'none')}."
        )
    load_adapter(model.encoder, Path(folder) / "lora_medclip")
    model.seg_head.load_state_dict(state)
