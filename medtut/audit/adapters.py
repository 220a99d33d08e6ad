"""Find adapters in any model by what they look like, not by whose class they are.

Three ways in: tensor names that libraries use for LoRA-like factors; names with
"lora" or "adapter" on trainable tensors; and pairs of thin trainable matrices beside
the frozen matrix that their product fits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import nn

# Names that stand for a factor of a low-rank product, whoever trains it.
_FACTOR = re.compile(
    r"^(lora_([abe]|up|down|left|right|magnitude\w*|embedding_[ab]|[qkvo](_?[ab])?"
    r"|[ab]_\w+)|[ab]_lora|(linear|w)_[ab](_\w+)?|vera_(lambda_)?[abd]"
    r"|(hada|lokr)_w\w+|ia3_l)$",
    re.IGNORECASE,
)
_LOOSE = re.compile(r"lora|adapter", re.IGNORECASE)


@dataclass
class Site:
    """The adapter tensors that sit on one module.

    Attributes
    ----------
    name : str
        The module, as in `named_modules`.
    parameters : dict
        Full name to parameter.
    """

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of adapter parameters."""
        return sum(one.numel() for one in self.parameters.values())

    @property
    def trainable(self) -> bool:
        """Whether anything of it is trained."""
        return any(one.requires_grad for one in self.parameters.values())


def _site_name(name: str, parameter: nn.Parameter) -> str | None:
    """Name of the site a parameter belongs to, None for an ordinary parameter."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        if _FACTOR.match(parts[i]):
            return ".".join(parts[:i]) or parts[i]
        if parameter.requires_grad and _LOOSE.search(parts[i]):
            end = i + 1  # "adapters.0.down" is one site per index
            if end < len(parts) - 1 and parts[end].isdigit():
                end += 1
            return ".".join(parts[:end])
    return None


def find_adapters(model: nn.Module) -> list[Site]:
    """Return the adapter sites of a model, in the order of its parameters."""
    sites: dict[str, Site] = {}
    for name, parameter in model.named_parameters():
        where = _site_name(name, parameter)
        if where is not None:
            sites.setdefault(where, Site(where)).parameters[name] = parameter
    known = {id(p) for site in sites.values() for p in site.parameters.values()}
    for where, pair in _low_rank_pairs(model, known):
        sites.setdefault(where, Site(where)).parameters.update(pair)
    return list(sites.values())


def _low_rank_pairs(model: nn.Module, known: set[int]):
    """Yield pairs (r, in), (out, r) that stand beside a frozen (out, in)."""
    for where, module in model.named_modules():
        near = module.named_parameters(remove_duplicate=False)
        flat = {
            n: p
            for n, p in near
            if n.count(".") < 2 and p.ndim >= 2 and id(p) not in known
        }
        thin = {n: p for n, p in flat.items() if p.requires_grad}
        frozen = {tuple(p.shape[:2]) for p in flat.values() if not p.requires_grad}
        for (out_f, in_f), (down, a) in product(frozen, thin.items()):
            r = a.shape[0]
            if a.shape[1] != in_f or 2 * r > min(out_f, in_f):
                continue
            fits = {n: p for n, p in thin.items() if p.shape[:2] == (out_f, r)}
            up = next((n for n in fits if n != down), None)
            if up is None or {id(a), id(fits[up])} & known:
                continue
            known |= {id(a), id(fits[up])}
            prefix = f"{where}." if where else ""
            yield where or "(model)", {prefix + n: thin[n] for n in (down, up)}


def hinted(model: nn.Module) -> list[str]:
    """Module names or classes that say there should be adapters."""
    return [
        f"{name or '(model)'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if _LOOSE.search(type(module).__name__) or _LOOSE.search(name.split(".")[-1])
    ]


def switch(model: nn.Module, site: Site) -> dict[str, Any]:
    """Return a site's own switches: merged, disabled, and a scale that is zero."""
    module = dict(model.named_modules()).get(site.name)
    flags = {"merged": "merged", "disabled": "disable_adapters"}
    said: dict[str, Any] = {
        key: True for key, flag in flags.items() if getattr(module, flag, 0) is True
    }
    for scale in (getattr(module, key, None) for key in ("scaling", "scale")):
        values = scale.values() if isinstance(scale, dict) else [scale]
        if any(isinstance(one, int | float) and one == 0 for one in values):
            said["scale"] = 0
    return said
