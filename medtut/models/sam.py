"""Segment Anything (SAM) models: building, adapting, loading, smaller inputs.

SAM (Kirillov et al., ICCV 2023, arXiv:2304.02643) is a vision transformer that turns
an image into a 256 x 64 x 64 embedding, a prompt encoder and a light mask decoder. All
are those of the ``segment-anything`` package; what is added here is LoRA by role, the
reading of Meta's checkpoints without running what is in them, and position tables for
smaller inputs. `medtut.models.litemedsam` has a small one with real weights.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.errors import MedtutError
from medtut.lora import Injection, LoRAConfig, LoRAError, adapted_layers, inject, scan
from medtut.lora.inject import is_adapter, select
from medtut.lora.roles import describe
from medtut.models.medclip_io import _load_pickle

_META = "https://dl.fbaipublicfiles.com/segment_anything/sam_{}_{}.pth"
_ENDS = {"vit_b": "01ec64", "vit_l": "0b3195", "vit_h": "4b8939"}
#: Where Meta keeps its checkpoints (358 MB, 1.2 GB, 2.4 GB; Apache-2.0).
OFFICIAL = {kind: _META.format(kind, end) for kind, end in _ENDS.items()}
_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h", 96: "tiny"}


def build_sam(
    kind: str, image_size: int | None = None, checkpoint: Path | str | None = None
) -> nn.Module:
    """A SAM in evaluation mode, made by ``segment-anything``.

    Parameters
    ----------
    kind : {"vit_b", "vit_l", "vit_h", "tiny"}
        93,735,472 / 312,342,832 / 641,090,608 parameters. "tiny" is for tests and
        rehearsals: an encoder of 4 blocks, 96 wide, two of them global.
    image_size : int, optional
        Side of the padded square input, a multiple of 16; 1024 by default, 256 for
        "tiny". Another size than 1024 interpolates the position tables, see
        `resize_input`.
    checkpoint : path, optional
        A file of Meta's or with the same names (MedSAM's, for example); without it the
        weights are random.

    Returns
    -------
    segment_anything.modeling.Sam

    Raises
    ------
    MedtutError
        For an unknown kind or size, or a checkpoint that cannot be opened or is of
        another kind.
    """
    from segment_anything.build_sam import _build_sam, sam_model_registry

    makers = {**sam_model_registry, "tiny": lambda: _build_sam(96, 4, 3, (1, 3))}
    if kind not in makers:
        raise MedtutError(f"build_sam: no {kind!r}; there are {', '.join(makers)}.")
    sam = makers[kind]()
    if checkpoint is not None:
        load_state(sam, checkpoint, kind)
    return resize_input(sam, image_size or (256 if kind == "tiny" else 1024))


def _looks_like(state: dict[str, Tensor]) -> str:
    table = state.get("image_encoder.pos_embed")
    if table is not None and table.dim() == 4:
        kind = _WIDTHS.get(table.shape[3], f"a SAM {table.shape[3]} wide")
        return f"{kind} for {16 * table.shape[1]} pixels"
    tiny = any(k.startswith("image_encoder.layers.") for k in state)
    return "LiteMedSAM" if tiny else "no SAM that is known here"


def load_state(model: nn.Module, path: Path | str, name: str) -> None:
    """Copy a checkpoint into a SAM; every tensor must be there, and nothing else.

    Parameters
    ----------
    model : nn.Module
    path : path
        Opened with ``weights_only=True``: nothing in it is run.
    name : str
        What the model is called in messages.

    Raises
    ------
    MedtutError
        If the file is missing, truncated, no plain weights, or of another model (the
        message says which it looks like). The model is then unchanged.
    """
    path = Path(path)
    if not path.is_file():
        places = "\n  ".join(OFFICIAL.values())
        raise MedtutError(f"There is no file {path}. Meta's are at\n  {places}")
    state, own = _load_pickle(path), model.state_dict()
    shapes = [{k: tuple(v.shape) for k, v in d.items()} for d in (own, state)]
    if wrong := sorted({k for k, _ in shapes[0].items() ^ shapes[1].items()}):
        mine, theirs = (d.get(wrong[0], "nothing") for d in shapes)
        raise MedtutError(
            f"{path} does not fit {name}: for {wrong[0]} it has {theirs}, the model "
            f"{mine} ({len(wrong)} such tensors). It looks like {_looks_like(state)}."
        )
    model.load_state_dict(state)


@torch.no_grad()
def resize_input(sam: nn.Module, side: int) -> nn.Module:
    """Let a SAM take inputs of another size, in place.

    Absolute positions are interpolated bicubically (Dosovitskiy et al., ICLR 2021,
    section 3.2), relative ones of the global blocks linearly, as segment-anything
    does at run time. Window blocks see the same 14 x 14 windows as before and keep
    theirs. The same size changes nothing.

    Parameters
    ----------
    sam : Sam
        With segment-anything's vision transformer.
    side : int
        Pixels, a multiple of the patch of 16. The embedding is side / 16 wide and the
        masks side / 4.

    Raises
    ------
    MedtutError
        For a side that is no multiple, or a model without such tables.
    """
    encoder, prompts = sam.image_encoder, sam.prompt_encoder
    if not hasattr(encoder, "pos_embed") or side < 16 or side % 16:
        raise MedtutError(
            f"resize_input: a {type(encoder).__name__} cannot take {side} pixels. Use "
            "a multiple of 16, and a model with a table of positions (ViT-B, -L, -H)."
        )
    n = side // 16
    table = F.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), (n, n), mode="bicubic")
    encoder.pos_embed.data = table.permute(0, 2, 3, 1).contiguous()
    for attention in (b.attn for b in encoder.blocks if b.window_size == 0):
        for table in (attention.rel_pos_h, attention.rel_pos_w):
            new = F.interpolate(table.T[None], 2 * n - 1, mode="linear")
            table.data = new[0].T.contiguous()
    encoder.img_size = side
    prompts.input_image_size, prompts.image_embedding_size = (side, side), (n, n)
    prompts.mask_input_size = (4 * n, 4 * n)
    return sam


def qkv_layout(sam: nn.Module) -> str:
    """How the encoder's fused qkv lies in its rows, for `LoRAConfig`.

    segment-anything has three thirds, [q | k | v]. TinyViT (LiteMedSAM) has q, k and
    v of the first head, then of the second...: its first third is not the query.
    """
    return "thirds" if hasattr(sam.image_encoder, "blocks") else "per-head"


def adapt_sam(
    sam: nn.Module,
    config: LoRAConfig | None = None,
    *,
    encoder: str = "lora",
    decoder: str = "frozen",
) -> Injection:
    """Choose what is trained in a SAM, in place; the prompt encoder is frozen always.

    Parameters
    ----------
    sam : Sam or LiteMedSAM
    config : LoRAConfig, optional
        By default query and value at rank 8. Its ``qkv_layout`` is set to the
        model's. Its ``pattern`` selects layers of the encoder only; names begin with
        ``image_encoder.``, as those of ``rank_pattern`` do with that or
        ``mask_decoder.``.
    encoder, decoder : {"frozen", "lora", "full"}

    Returns
    -------
    Injection
        The adapted layers, none if there are none.

    Raises
    ------
    LoRAError
        For an unknown mode, if nothing matches, a rank does not fit or the model has
        adapters already. The model is then unchanged.

    Notes
    -----
    Per unit of rank, query and value cost 36,864 / 98,304 / 163,840 parameters in
    ViT-B / L / H and 5,888 in the decoder, whose narrow layers take ranks up to 128.
    """
    config = config or LoRAConfig()
    modes = {"image_encoder": encoder, "mask_decoder": decoder}
    if not {encoder, decoder} <= {"frozen", "lora", "full"}:
        raise LoRAError(f"{encoder!r}, {decoder!r}: modes are frozen, lora and full.")
    if adapted_layers(sam):
        inject(sam, config)  # refuses, and says what to do
    candidates, names = scan(sam), []
    for part in (part for part, mode in modes.items() if mode == "lora"):
        rule = config if part == "image_encoder" else replace(config, pattern=None)
        mine = [c for c in candidates if c.name.startswith(part + ".")]
        names += (chosen := [f"^{re.escape(c.name)}$" for c, _ in select(mine, rule)])
        if not chosen:
            what, have = rule.pattern or rule.roles, describe(mine)
            raise LoRAError(f"nothing to adapt in {part}: {what} fits none of\n{have}")
    rule = replace(config, pattern=tuple(names), qkv_layout=qkv_layout(sam))
    injection = inject(sam, rule) if names else Injection({}, config)
    for name, p in sam.named_parameters():
        full = modes.get(name.split(".")[0]) == "full"
        p.requires_grad_(full or is_adapter(name))
    return injection
