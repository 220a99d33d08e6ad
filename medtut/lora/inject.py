"""Putting adapters into a model, and taking them out again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from medtut.lora.attention import LoRAMultiheadAttention, block_fast_path
from medtut.lora.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from medtut.lora.core import AdapterSpec, LoRAError, LoRALayer, check_rank
from medtut.lora.layers import LoRAFusedLinear, LoRALinear
from medtut.lora.roles import ROLES, Candidate, describe, scan

Patterns = str | Iterable[str] | None


def as_patterns(value: Patterns, where: str) -> tuple[re.Pattern[str], ...]:
    """Compile one regular expression or several."""
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    try:
        return tuple(re.compile(text) for text in texts)
    except (re.error, TypeError) as error:
        raise LoRAError(f"{where}: not a regular expression: {error}") from error


@dataclass(frozen=True)
class LoRAConfig(AdapterSpec):
    """What to adapt, and how.

    Attributes
    ----------
    r, alpha, scaling, dropout, variant
        See :class:`medtut.lora.core.AdapterSpec`.
    roles : sequence of str
        Of "query", "key", "value", "output", "mlp", "conv".
    pattern : str or sequence of str, optional
        Regular expression(s) searched in module names. If given, it alone selects
        the layers, and ``roles`` only says which parts of a fused projection or of
        ``nn.MultiheadAttention`` are adapted (all its parts if none of them fits).
    rank_pattern : dict of str to int
        Regular expression searched in the module name -> rank; the first that fits
        wins, ``r`` is for the rest.
    qkv_layout : {"thirds", "per-head"}
        How fused projections are laid out.
    qkv_heads : int, optional
        Heads for "per-head"; read from the parent's ``num_heads`` if left out.

    Raises
    ------
    LoRAError
        For an unknown role, a bad expression, or a setting out of range.
    """

    roles: tuple[str, ...] = ("query", "value")
    pattern: str | tuple[str, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    qkv_layout: str = "thirds"
    qkv_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        roles = (self.roles,) if isinstance(self.roles, str) else tuple(self.roles)
        object.__setattr__(self, "roles", roles)
        unknown = [role for role in roles if role not in ROLES]
        if unknown:
            raise LoRAError(
                f"unknown role {unknown[0]!r}; roles are {', '.join(ROLES)}. For "
                "anything else give a regular expression as pattern."
            )
        if not roles and not self.pattern:
            raise LoRAError("give at least one role, or a pattern.")
        as_patterns(self.pattern, "pattern")
        as_patterns(self.rank_pattern, "rank_pattern")
        for key, r in self.rank_pattern.items():
            check_rank(r, f"rank_pattern[{key!r}]")

    def spec_for(self, name: str) -> AdapterSpec:
        """Settings of the layer called ``name``."""
        ranks = (r for key, r in self.rank_pattern.items() if re.search(key, name))
        r = next(ranks, self.r)
        return AdapterSpec(r, self.alpha, self.scaling, self.dropout, self.variant)


@dataclass(frozen=True)
class Injection:
    """What was adapted: layers by name, and the settings."""

    layers: dict[str, LoRALayer]
    config: LoRAConfig | None = None

    @property
    def parameters(self) -> int:
        """Number of adapter parameters."""
        layers = self.layers.values()
        return sum(p.numel() for one in layers for _, p in adapter_parameters(one))

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers, {self.parameters:,} adapter parameters"]
        for name, layer in self.layers.items():
            parts = "" if layer.parts == ("all",) else f" [{', '.join(layer.parts)}]"
            lines.append(f"  {name}{parts}  r={layer.spec.r}")
        return "\n".join(lines)


def is_adapter(name: str) -> bool:
    """Whether a parameter name belongs to an adapter."""
    return any(word.startswith("lora_") for word in name.split("."))


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every adapter tensor that can be trained."""
    return ((n, p) for n, p in model.named_parameters() if is_adapter(n))


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Adapted layers by name; a layer used twice comes once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}


def make_layer(
    base: nn.Module,
    spec: AdapterSpec,
    parts: Iterable[str],
    *,
    check: bool,
    **shape: Any,
) -> LoRALayer:
    """The adapted form of one layer.

    ``order`` in ``shape`` marks a fused projection; what else can be there is what
    `LoRAFusedLinear` takes.
    """
    keys: dict[str, object] = asdict(spec) | {"_check": check}
    kind: type[LoRALayer]
    if isinstance(base, nn.MultiheadAttention):
        kind, keys["parts"] = LoRAMultiheadAttention, parts
    elif isinstance(base, nn.Linear) and shape.get("order"):
        kind, keys = LoRAFusedLinear, {**keys, "parts": parts, **shape}
    elif isinstance(base, nn.Linear):
        kind = LoRALinear
    else:
        kind = (LoRAConv1d, LoRAConv2d, LoRAConv3d)[base.weight.dim() - 3]
    return kind(base, **keys)


def select(
    candidates: list[Candidate], config: LoRAConfig
) -> list[tuple[Candidate, tuple[str, ...]]]:
    """Candidates the configuration asks for, with the parts to adapt."""
    patterns = as_patterns(config.pattern, "pattern")
    chosen = []
    for c in candidates:
        parts = tuple(p for p in c.parts if p in config.roles)
        if any(p.search(c.name) for p in patterns):
            chosen.append((c, parts or c.parts))
        elif not patterns and c.roles & set(config.roles):
            chosen.append((c, parts))
    return chosen


def replace_modules(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Swap modules by identity, under every name they have."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in new:
                parent._modules[child_name] = new[id(child)]


def guard_fast_paths(model: nn.Module) -> None:
    """Keep PyTorch's fused encoder kernels from reading past the adapters."""
    for module in model.modules():
        inside = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder))
        if not inside or not adapted_layers(module):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.__dict__.setdefault("_nested_before", module.use_nested_tensor)
            module.use_nested_tensor = False
        elif block_fast_path not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(block_fast_path)


def inject(
    model: nn.Module, config: LoRAConfig | None = None, *, keep: Patterns = ()
) -> Injection:
    """Freeze a model and put adapters into it, in place.

    Parameters
    ----------
    model : nn.Module
    config : LoRAConfig, optional
    keep : str or sequence of str
        Regular expressions over parameter names that stay as trainable as they were
        (a new head, for example); everything else but the adapters is frozen.

    Returns
    -------
    Injection

    Raises
    ------
    LoRAError
        If nothing matches (the message lists what there is), if the model already
        has adapters, or if a rank does not fit. The model is then unchanged.
    """
    config = config or LoRAConfig()
    if isinstance(model, LoRALayer) or adapted_layers(model):
        first = next(iter(adapted_layers(model)), "") or "the model itself"
        raise LoRAError(
            f"this model already has adapters (first: {first}). Build a fresh model, "
            "or call medtut.lora.eject(model) before injecting again."
        )
    candidates = scan(model)
    chosen = select(candidates, config)
    if not chosen:
        what, kind = f"roles {', '.join(config.roles)}", type(model).__name__
        if config.pattern:
            what = f"pattern {config.pattern!r}"
        bare = (
            f"\nThe model is a single {kind}, which cannot be swapped in place: put it "
            "into nn.Sequential, or use LoRALinear directly."
        )
        raise LoRAError(
            f"nothing to adapt: {what} match no layer of {kind}. Adaptable layers by "
            f"role:\n{describe(candidates)}{'' if list(model.children()) else bare}"
        )
    for c, _ in chosen:
        if c.blocked:
            raise LoRAError(f"cannot adapt {c.name}: {c.blocked}.")
    if not config.pattern:
        found = frozenset().union(*(c.roles for c, _ in chosen))
        for role in (role for role in config.roles if role not in found):
            warnings.warn(f"no layer has the role {role!r}", stacklevel=2)

    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        layers = {c.name: _build(model, c, parts, config) for c, parts in chosen}
    except LoRAError:
        for n, p in model.named_parameters():
            p.requires_grad_(trainable[n])
        raise
    kept = as_patterns(keep, "keep")
    for n, p in model.named_parameters():
        p.requires_grad_(trainable[n] and any(k.search(n) for k in kept))
    replace_modules(model, {id(c.module): layers[c.name] for c, _ in chosen})
    guard_fast_paths(model)
    return Injection(layers, config)


def _build(
    model: nn.Module, c: Candidate, parts: tuple[str, ...], config: LoRAConfig
) -> LoRALayer:
    shape = {"order": c.parts, "layout": config.qkv_layout, "heads": config.qkv_heads}
    if shape["heads"] is None and config.qkv_layout == "per-head":
        parent = model.get_submodule(c.name.rpartition(".")[0])
        shape["heads"] = getattr(parent, "num_heads", None)
    try:
        return make_layer(c.module, config.spec_for(c.name), parts, check=True, **shape)
    except LoRAError as error:
        raise LoRAError(f"{c.name}: {error}") from error


def eject(model: nn.Module) -> None:
    """Take all adapters out; the base weights are back, bit for bit, still frozen."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if hook is block_fast_path]:
            del hooks[key]
        if isinstance(module, nn.TransformerEncoder):
            before = module.__dict__.pop("_nested_before", module.use_nested_tensor)
            module.use_nested_tensor = before
    layers = adapted_layers(model)
    replace_modules(model, {id(m): m.restore() for m in layers.values()})


def _require(model: nn.Module) -> dict[str, LoRALayer]:
    layers = adapted_layers(model)
    if not layers:
        raise LoRAError("this model has no adapters; call inject or load_adapter first")
    return layers


def merge(model: nn.Module) -> None:
    """Fold all updates into the weights, keeping the originals aside.

    In float32 outputs change by rounding only (below 1e-5); in half precision the
    merged weight is rounded once to the base's dtype.
    """
    for layer in _require(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, bit for bit, in any dtype."""
    for layer in _require(model).values():
        layer.unmerge()


def delta_weight(module: LoRALayer) -> Tensor:
    """Change of the layer's weight, of the weight's shape.

    Raises
    ------
    LoRAError
        If the layer adapts several weights; use ``module.deltas()`` then.
    """
    if not isinstance(module, LoRALayer):
        raise LoRAError(f"{type(module).__name__} is not an adapted layer")
    deltas = module.deltas()
    if len(deltas) > 1:
        raise LoRAError(
            f"this {type(module).__name__} changes {', '.join(deltas)}: use .deltas()"
        )
    return next(iter(deltas.values()))


def update_norm(model: nn.Module) -> dict[str, float]:
    """Frobenius norm of every weight's change, by parameter name."""
    return {
        f"{name}.{target}".lstrip("."): float(delta.norm())
        for name, layer in _require(model).items()
        for target, delta in layer.deltas().items()
    }
