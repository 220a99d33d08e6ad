"""What each method of FSEFT puts into the network, or lets train of its backbone.

Every method takes the model and its :class:`~medtut.adapters.parts.Parts`, checks
that it fits before it changes anything, and returns the names of those *old*
parameters that train; what it adds trains anyway. Counts, with C running over the
widths of the transformer blocks (sum 1,440 at feature size 48), are in each docstring.

Sources: the family is that of Silva-Rodriguez et al. (arXiv 2303.17051); published
forms are cited as upstream file:line of jusiro/fewshot-finetuning at 032f403.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from medtut.adapters import layers as small
from medtut.adapters.adaptive_rank import add_diagonals
from medtut.adapters.parts import ATTENTION, AdapterError, Parts
from medtut.lora.core import AdapterSpec, check_rank
from medtut.lora.inject import LoRAConfig, inject, make_layer, replace_modules

NORMS = (nn.LayerNorm, nn.GroupNorm, _NormBase)
QKV = ("query", "key", "value")
MLP = frozenset({"mlp"})


def _units(model: nn.Module, parts: Parts, roles: frozenset[str]) -> dict[str, int]:
    """Name and width of the MLPs, or attention modules, of the transformer blocks.

    A unit is the parent of linear layers of these roles and no others; it must give
    back the width it takes, and call its children by name (an ``nn.Sequential`` would
    run the adapter as one of them).
    """
    groups: dict[str, list] = {}
    for c in parts.layers(model):
        fits = isinstance(c.module, nn.Linear) and c.roles and c.roles <= roles
        groups.setdefault(c.name.rpartition(".")[0], []).append(fits and c.module)
    units = {}
    for name, linears in groups.items():
        listed = isinstance(model.get_submodule(name), nn.Sequential)
        if listed or not all(linears) or len(linears) < 2:
            continue
        if linears[0].in_features == linears[-1].out_features:
            units[name] = linears[0].in_features
    if not units:
        what = f"no transformer {'MLP' if roles == MLP else 'attention'} to adapt"
        raise AdapterError(f"{type(model).__name__} has {what}: try lora or norm")
    return units


def nothing(model: nn.Module, parts: Parts) -> set[str]:
    """No parameter outside the head (as-is, and the linear probe)."""
    return set()


def full(model: nn.Module, parts: Parts) -> set[str]:
    """All there is; of the head, :func:`medtut.adapters.adapt` decides."""
    return {n for n, _ in model.named_parameters() if parts.of(n) != "head"}


def spatial(model: nn.Module, parts: Parts, *, kernel: int = 3) -> set[str]:
    """Residual convolutions on the map the head reads: 2 kernel^3 48^2.

    4,608 for kernel 1, 124,416 for kernel 3. It hangs on the head: ``head(x)``
    runs it too, on the map ``x`` that the frozen network makes or on one from a cache.
    """
    if kernel not in (1, 3, 5, 7):
        raise AdapterError(f"kernel must be 1, 3, 5 or 7, not {kernel!r}")
    head = model.get_submodule(parts.head)
    shape = head.in_channels, kernel, head.weight.dim() - 2
    small.hang(head, small.SpatialAdapter(*shape), small.inside)
    return set()


def lora(
    model: nn.Module,
    parts: Parts,
    *,
    rank: int = 4,
    alpha: float | None = None,
    scaling: str = "alpha/r",
    joint: bool = False,
    roles: tuple[str, ...] | None = None,
    adaptive: bool = False,
    cap: bool = False,
) -> set[str]:
    """Low-rank updates of the backbone, by :mod:`medtut.lora`.

    Parameters
    ----------
    rank : int
        r. With ``joint`` one update of rank 3 r spans q, k and v together, as
        published: 12 r C = 69,120 at r = 4. Otherwise each of q, k, v has its own
        pair: 6 r C = 34,560. On a U-Net every convolution of the encoder has one.
    alpha, scaling
        Scale ``alpha / r``; ``alpha`` is ``2 r`` if left out. The published code has
        no scale at all (upstream peft/LoRA.py:46-48): ``scaling="none"`` or
        ``alpha = r``.
        With ``joint`` the r of the scale is the r given here, not 3 r.
    roles : sequence of str, optional
        See :data:`medtut.lora.ROLES`; query, key and value, or conv without them.
    adaptive : bool
        Rank chosen by a penalty, see :mod:`medtut.adapters.adaptive_rank`; one more
        parameter per rank and slot.
    cap : bool
        Give layers that are narrower than ``rank`` the largest rank they allow,
        instead of refusing. Their scale is ``alpha`` over that.
    """
    layers = parts.layers(model)
    default = QKV if any(c.roles & ATTENTION for c in layers) else ("conv",)
    roles = tuple(roles or default)
    config = LoRAConfig(
        rank, 2 * rank if alpha is None else alpha, scaling, roles=roles
    )
    chosen = [c for c in layers if c.roles & set(roles)]
    if not chosen:
        raise AdapterError(f"no layer of the backbone has a role of {', '.join(roles)}")
    if not joint:
        exact = "|".join(re.escape(c.name) for c in chosen)
        sides = {c.name: min(len(c.module.weight) // max(len(c.parts), 1),
                             c.module.weight[0].numel()) for c in chosen}  # fmt: skip
        fewer = {f"^{re.escape(n)}$": r for n, r in sides.items() if cap and r < rank}
        config = replace(config, pattern=f"^(?:{exact})$", rank_pattern=fewer)
        inject(model, config)
    elif set(roles) != set(QKV) or any(len(c.parts) < 3 for c in chosen):
        raise AdapterError("joint=True needs fused projections of query, key and value")
    else:
        # medtut.lora divides by the rank it has, which is 3 r here.
        spec = AdapterSpec(3 * rank, config.scale * 3 * rank)
        new = {id(c.module): make_layer(c.module, spec, (), check=True) for c in chosen}
        replace_modules(model, new)
    if adaptive:
        add_diagonals(model)
    return set()


def adaptformer(
    model: nn.Module, parts: Parts, *, rank: int = 16, scale: float = 0.1
) -> set[str]:
    """A bottleneck beside each transformer MLP: sum of 2 rank C + rank + C.

    47,648 at rank 16. The branch reads what the MLP reads, the normalised tokens, as
    in the paper's equation (arXiv 2205.13535), and shares its drop path; the
    published one reads them before the norm and has no drop path (upstream
    peft/AdaptFormer.py:60-63). ``rank`` there is 16 whatever the configuration says.
    """
    check_rank(rank, "rank")
    for name, width in _units(model, parts, MLP).items():
        branch = small.Bottleneck(width, rank, scale)
        small.hang(model.get_submodule(name), branch, small.parallel)
    return set()


def compacter(
    model: nn.Module, parts: Parts, *, n: int = 4, norms: bool = False
) -> set[str]:
    """A PHM map after attention and after MLP: sum of 2 (C^2 / n + C + n^3).

    199,744 at n = 4; 217,024 with the norms trained too, as published. Ours adds the
    map to the output it follows and starts it at zero, which is the identity; the
    published one *replaces* that output by a map with a rule of size 0.01 (upstream
    peft/Compacter.py:69,77,264) and so begins by wiping the pretrained features.
    """
    check_rank(n, "n")
    units = _units(model, parts, ATTENTION) | _units(model, parts, MLP)
    if wrong := {width for width in units.values() if width % n}:
        raise AdapterError(f"n = {n} does not divide the widths {sorted(wrong)}")
    own = norm(model, parts) if norms else set()
    for name, width in units.items():
        small.hang(model.get_submodule(name), small.PHMLinear(width, n), small.residual)
    return own


def bias(model: nn.Module, parts: Parts, *, select: str | None = None) -> set[str]:
    """The biases of the backbone: 9 C in the blocks' attention and MLP.

    Parameters
    ----------
    select : {"blocks", "all", "all+tables", "published"}, optional
        "blocks": attention and MLP, 12,960. "all": norms and patch embedding too,
        21,648. "all+tables": and the relative position tables, 219,378, which are no
        biases. "published": "blocks" and the tables, 210,690, what a search for
        "bias" in the names finds (upstream peft/Bias.py:35-38). By default "blocks", or
        "all" where there are no blocks. (A convolution's bias right before a norm by
        batch statistics, as in SuPreM's U-Net, trains but changes nothing.)
    """
    own = {n: p for n, p in model.named_parameters() if parts.of(n) == "backbone"}
    every = {name for name in own if name.endswith(".bias")}
    layers = [c for c in parts.layers(model) if c.roles & (ATTENTION | MLP)]
    blocks = every & {f"{c.name}.bias" for c in layers}
    # A table stands on the attention module itself, with a column per head.
    above = {c.name.rpartition(".")[0] for c in layers if c.roles & ATTENTION}
    heads = {n: (getattr(model.get_submodule(n), "num_heads", 0),) for n in above}
    tab = {n for n, p in own.items() if heads.get(n.rpartition(".")[0]) == p.shape[-1:]}
    known = {"blocks": blocks, "all": every, "all+tables": every | tab}
    known["published"] = blocks | tab
    select = select or ("blocks" if blocks else "all")
    if not known.get(select):
        usable = ", ".join(key for key, names in known.items() if names)
        raise AdapterError(f"no biases for select={select!r}; usable here: {usable}")
    return known[select]


def norm(model: nn.Module, parts: Parts) -> set[str]:
    """Scales and shifts of the backbone's normalisation layers: 17,280."""
    norms = [n for n, m in model.named_modules() if isinstance(m, NORMS)]
    own = {n for n, _ in model.named_parameters() if parts.of(n) == "backbone"}
    chosen = {n for n in own if n.rpartition(".")[0] in norms}
    if not chosen:
        raise AdapterError("the norms of this backbone have no scales and shifts")
    return chosen


METHODS = {"as-is": nothing, "probe": nothing, "spatial": spatial, "lora": lora}
METHODS |= {"adaptformer": adaptformer, "compacter": compacter, "bias": bias}
METHODS |= {"norm": norm, "full": full}
