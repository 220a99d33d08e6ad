"""Low-rank layers: what LoRA, DoRA and PiSSA add to a linear map.

Every adapted layer *is* still the layer it replaces (``LoRALinear`` is an
``nn.Linear``): it shares the base parameters under their old names, so
``state_dict`` keys, ``isinstance`` checks and code that reads ``layer.weight`` keep
working, and only names that start with ``lora_`` are new.

A layer holds one or more *slots*: a pair of factors and the rows of the weight it
changes. A plain layer has one slot for all rows; a fused qkv has one per chosen
part; multi-head attention has up to four.

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), section 4.1; rank-stabilised scale,
Kalajdzievski 2023 (arXiv 2312.03732); DoRA, Liu et al. 2024 (arXiv 2402.09353), eq. 5
and section 4.3; PiSSA, Meng et al. 2024 (arXiv 2404.02948), eqs. 2-4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medtut.errors import MedtutError

SCALINGS = ("alpha/r", "alpha/sqrt(r)", "none")
VARIANTS = ("lora", "dora", "pissa")


class LoRAError(MedtutError):
    """Something about an adapter that the user can put right."""


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of one adapted layer.

    Attributes
    ----------
    r : int
        Rank of the update, at least 1.
    alpha : float
        Numerator of the scale, above 0.
    scaling : {"alpha/r", "alpha/sqrt(r)", "none"}
        Rule for the factor in front of ``B A``; "none" means 1.
    dropout : float
        Probability in [0, 1) of zeroing an input of the low-rank branch.
    variant : {"lora", "dora", "pissa"}

    Raises
    ------
    LoRAError
        For a value outside its range.
    """

    r: int = 8
    alpha: float = 16.0
    scaling: str = "alpha/r"
    dropout: float = 0.0
    variant: str = "lora"

    def __post_init__(self) -> None:
        check_rank(self.r)
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise LoRAError(
                f"alpha must be a number above 0, not {self.alpha!r}: with 0 the "
                "adapter changes nothing. alpha = r or alpha = 2 r are usual."
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise LoRAError(
                f"dropout must lie in [0, 1), not {self.dropout!r}; 0 switches it off."
            )
        for what, known in (("scaling", SCALINGS), ("variant", VARIANTS)):
            if (value := getattr(self, what)) not in known:
                raise LoRAError(
                    f"unknown {what} {value!r}; use one of {', '.join(known)}."
                )

    @property
    def scale(self) -> float:
        """The factor in front of ``B A``."""
        if self.scaling == "none":
            return 1.0
        return self.alpha / (self.r if self.scaling == "alpha/r" else math.sqrt(self.r))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_rank(r: object, where: str = "r") -> None:
    """Refuse a rank that is not a whole number of at least 1."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise LoRAError(
            f"{where} must be a whole number of at least 1, not {r!r}: an update of "
            "rank 0 changes nothing. Leave the layer out if it needs no adapter."
        )


def name(kind: str, part: str) -> str:
    """Attribute that holds one tensor of one slot."""
    return f"lora_{kind}" if part == "all" else f"lora_{kind}_{part}"


@dataclass
class Slot:
    """One low-rank update: factors, and where in which weight it goes.

    ``A`` is (r, ...) and ``B`` is (rows, r, ...); ``A0``/``B0`` are PiSSA's frozen
    starting factors; ``magnitude`` (rows,) is DoRA's; ``rows`` is None for all rows.
    """

    part: str
    target: str
    rows: Tensor | None
    A: Tensor
    B: Tensor
    A0: Tensor | None = None
    B0: Tensor | None = None
    magnitude: Tensor | None = None

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ``delta = scale * B @ A``, exact for PiSSA too."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    def take(self, table: Tensor) -> Tensor:
        """This slot's rows of a table that has one for every output."""
        if self.rows is None:
            return table
        return table.index_select(0, self.rows.to(table.device))

    def put(self, table: Tensor, rows: Tensor) -> Tensor:
        """The table with this slot's rows replaced."""
        return rows if self.rows is None else table.index_copy(0, self.rows, rows)


def row_ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """DoRA's ``m / ||W + s B A||``, and 1 for a row of zeros, which has no direction.

    Layers that start at zero and pruned rows would otherwise turn into 0 / 0.
    """
    zero = norm == 0
    ratio = magnitude / norm.masked_fill(zero, 1)
    return ratio.masked_fill(zero, 1)


class LoRALayer(nn.Module):
    """What all adapted layers share: slots, effective weight, merge and unmerge.

    Training mode never changes the merge state: ``train()`` and ``eval()`` leave the
    weights alone. ``merge`` keeps the original parameter object aside and ``unmerge``
    puts that very object back, so nothing is recomputed and no bit can drift.
    """

    spec: AdapterSpec
    parts: tuple[str, ...]

    def _adopt(self, base: nn.Module, spec: AdapterSpec) -> None:
        """Take over ``base``: same parameters, same names, hooks and attributes."""
        nn.Module.__init__(self)
        for key, value in base.__dict__.items():
            # Registries are copied so that our additions do not leak into the base.
            copied = value.copy() if isinstance(value, (dict, set)) else value
            self.__dict__[key] = copied
        base.requires_grad_(False)
        self.spec = spec
        self.parts = ()
        self._origin = [base]  # in a list: not a submodule
        self._targets: dict[str, str] = {}
        self._pristine: dict[str, nn.Parameter] = {}

    # -- slots -----------------------------------------------------------------
    def _add_slot(
        self,
        part: str,
        target: str,
        rows: Tensor | None,
        a_shape: tuple[int, ...],
        b_shape: tuple[int, ...],
        check: bool = True,
    ) -> None:
        weight = self.get_parameter(target)
        r = self.spec.r
        most = min(b_shape[0], math.prod(a_shape[1:]))
        if check and r > most:
            raise LoRAError(
                f"rank {r} is larger than this {type(self._origin[0]).__name__} "
                f"allows: its update is a {b_shape[0]} x {math.prod(a_shape[1:])} "
                f"matrix, so r can be at most {most}. Lower r, or give this layer its "
                "own with rank_pattern."
            )
        # Adapters stay in float32 over a half-precision base: their updates are far
        # below the resolution of 16 bits.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        kind = {"device": weight.device, "dtype": dtype}
        A = torch.empty(a_shape, **kind)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B = torch.zeros(b_shape, **kind)
        if rows is not None:
            rows = rows.to(weight.device)
            self.register_buffer(name("rows", part), rows, persistent=False)
        if self.spec.variant != "lora":
            own = weight.detach() if rows is None else weight.detach()[rows]
            own = own.to(dtype).flatten(1)
        if self.spec.variant == "pissa":
            A, B = self._principal_factors(own, A, B)
            self.register_buffer(name("A0", part), A.clone())
            self.register_buffer(name("B0", part), B.clone())
        self.register_parameter(name("A", part), nn.Parameter(A))
        self.register_parameter(name("B", part), nn.Parameter(B))
        if self.spec.variant == "dora":
            magnitude = nn.Parameter(own.norm(dim=1))
            self.register_parameter(name("magnitude", part), magnitude)
        self._targets[part] = target
        self.parts = (*self.parts, part)

    def _principal_factors(self, W: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
        """PiSSA's start: the top-r singular triplets, split evenly, over the scale."""
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        r = self.spec.r
        root = (S[:r] / self.spec.scale).sqrt()
        a = (root[:, None] * Vh[:r]).reshape(A.shape)
        b = (U[:, :r] * root).reshape(B.shape)
        return [a.contiguous(), b.contiguous()]

    def slots(self) -> list[Slot]:
        """The low-rank updates of this layer, in the order of ``parts``."""
        kinds = ("rows", "A", "B", "A0", "B0", "magnitude")
        return [
            Slot(part, target, *(getattr(self, name(k, part), None) for k in kinds))
            for part, target in self._targets.items()
        ]

    def targets(self) -> list[str]:
        """Names, inside this layer, of the weights that are adapted."""
        return list(dict.fromkeys(self._targets.values()))

    def _set_weight(self, target: str, value: Tensor) -> None:
        owner, _, last = target.rpartition(".")
        self.get_submodule(owner)._parameters[last] = value

    def base_weight(self, target: str) -> Tensor:
        """The weight as it was before adaptation, merged or not."""
        return self._pristine.get(target, self.get_parameter(target))

    # -- the update as a matrix ------------------------------------------------
    def _low_rank(self, slot: Slot) -> Tensor:
        """Scaled product of one slot, as a (rows, in) matrix."""
        update = slot.B.flatten(1) @ slot.A.flatten(1)
        if slot.A0 is not None and slot.B0 is not None:
            update = update - slot.B0.flatten(1) @ slot.A0.flatten(1)
        return self.spec.scale * update

    def _slots_of(self, target: str) -> list[Slot]:
        return [slot for slot in self.slots() if slot.target == target]

    def effective_weight(self, target: str) -> Tensor:
        """Base weight plus update, differentiable, in the factors' dtype."""
        base, slots = self.base_weight(target), self._slots_of(target)
        out = base.detach().to(slots[0].A.dtype).flatten(1)
        for slot in slots:
            rows = slot.take(out) + self._low_rank(slot)
            if slot.magnitude is not None:
                # The norm is a constant for the gradient (DoRA, section 4.3).
                norm = rows.detach().norm(dim=1)
                rows = rows * row_ratio(slot.magnitude, norm)[:, None]
            out = slot.put(out, rows)
        return out.reshape(base.shape)

    @torch.no_grad()
    def delta(self, target: str) -> Tensor:
        """Change of one weight, of its shape, in the factors' dtype."""
        after = self.effective_weight(target)
        if self.spec.variant == "dora":
            return after - self.base_weight(target).to(after.dtype)
        # Not as a difference: that would lose the digits that matter.
        out = torch.zeros_like(after).flatten(1)
        for slot in self._slots_of(target):
            out = slot.put(out, self._low_rank(slot))
        return out.reshape(after.shape)

    def deltas(self) -> dict[str, Tensor]:
        """Change of every adapted weight, by its name inside the layer."""
        return {target: self.delta(target) for target in self.targets()}

    # -- merging ---------------------------------------------------------------
    @property
    def merged(self) -> bool:
        """Whether the update is folded into the weight at the moment."""
        return bool(self._pristine)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the weight; a second call does nothing."""
        if self.merged:
            return
        for target in self.targets():
            base = self.get_parameter(target)
            value = self.effective_weight(target).to(base.dtype)
            self._pristine[target] = base
            self._set_weight(target, nn.Parameter(value, requires_grad=False))

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        for target, base in self._pristine.items():
            self._set_weight(target, base)
        self._pristine = {}

    def restore(self) -> nn.Module:
        """The plain layer this one replaced, with its own weights."""
        self.unmerge()
        base = self._origin[0]
        for key in base._parameters:
            base._parameters[key] = self._parameters[key]
        base.train(self.training)
        return base

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # A move to another device or dtype while merged must take the original along.
        result = super()._apply(fn, recurse)
        for target, base in self._pristine.items():
            moved = fn(base.data)
            self._pristine[target] = nn.Parameter(moved, requires_grad=False)
        return result

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if self.merged:
            raise LoRAError(
                "this model is merged: loading weights into it would be undone by the "
                "next unmerge. Call medtut.lora.unmerge(model) first."
            )
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        s = self.spec
        extra = f"r={s.r}, alpha={s.alpha:g}, scaling={s.scaling}, {s.variant}"
        if self.parts != ("all",):
            extra += f", parts={'+'.join(self.parts)}"
        return f"{super().extra_repr()}, {extra}".lstrip(", ")
