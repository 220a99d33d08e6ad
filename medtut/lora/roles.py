"""Which layers of a model play which role: query, key, value, output, mlp, conv.

Names differ between libraries and even between versions of one (``query`` became
``q_proj`` in transformers 5), so a role is read from structure: the words of the last
part of the name, the siblings next to it, the classes and names above it, and the
shape. A ``value`` layer without a query or key beside it is not attention; a ``proj``
is an attention output only inside an attention block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

ROLES = ("query", "key", "value", "output", "mlp", "conv")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Words that may accompany q, k, v in a name without changing what the layer is.
_FILLER = {"proj", "projection", "layer", "linear", "lin", "dense", "to", "in", "c"}
_FILLER |= {"w", "fc", "attn", "self", "weight"}
_WORD = {"q": "query", "k": "key", "v": "value"}
_WORD |= {"query": "query", "key": "key", "value": "value"}
_FUSED = {
    "qkv": ("query", "key", "value"),
    "kv": ("key", "value"),
    "qk": ("query", "key"),
}
_OUT = {"out_proj", "o_proj", "out_lin", "to_out", "wo", "proj_out", "out", "o"}
_OUT |= {"output", "out_projection", "output_proj", "proj", "c_proj", "projection"}
_MLP = {"fc1", "fc2", "lin1", "lin2", "linear1", "linear2", "c_fc", "mlp", "ffn"}
_MLP |= {"gate_proj", "up_proj", "down_proj", "intermediate"}
_ATTENTION = re.compile(r"(attn|attention|sablock|self_att)", re.I)
_MLP_BLOCK = re.compile(r"(mlp|feed_?forward|ffn|intermediate)", re.I)
# Perceptrons that are heads, not part of a transformer block.
_HEAD = re.compile(r"(head|hypernet|classifier|pooler|prediction)", re.I)
# Modules that read the weights of their children and never call them.
_READS_WEIGHTS = {"ShiftedWindowAttention", "ShiftedWindowAttentionV2"}


@dataclass(frozen=True)
class Candidate:
    """A layer that can be adapted.

    ``parts`` names the pieces of a fused layer in the order they lie in the weight,
    or of ``nn.MultiheadAttention``; it is empty for a plain layer. ``blocked`` says
    why the layer cannot be adapted in place, if so.
    """

    name: str
    module: nn.Module
    roles: frozenset[str]
    parts: tuple[str, ...] = ()
    blocked: str = ""


def _split(path: str) -> list[str]:
    """Name parts without trailing numbers (``to_out.0`` belongs to ``to_out``)."""
    words = path.split(".")
    while len(words) > 1 and words[-1].isdigit():
        words.pop()
    return words


def attention_parts(word: str) -> tuple[str, ...]:
    """Which of query, key, value a name stands for; empty if none.

    ``q_proj`` -> (query,), ``to_kv`` -> (key, value), ``query_key_value`` -> all.
    """
    word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word)
    if re.fullmatch(r"W(q|k|v|qkv|kv)", word):
        word = word[1:]
    found: list[str] = []
    for token in re.split(r"[_\-]+", word.lower()):
        if token in _FUSED:
            found += _FUSED[token]
        elif token in _WORD:
            found.append(_WORD[token])
        elif re.fullmatch(r"w(q|k|v)", token):
            found.append(_WORD[token[1]])
        elif token and token not in _FILLER:
            return ()
    return tuple(found)


def _supported(module: nn.Module) -> bool:
    """A layer whose forward is the plain one and whose weight is a plain parameter."""
    if isinstance(module, nn.MultiheadAttention):
        return type(module).forward is nn.MultiheadAttention.forward
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward
    elif isinstance(module, CONVS):
        plain = type(module).forward in {c.forward for c in CONVS}
    else:
        return False
    weight = module._parameters.get("weight")
    return plain and weight is not None and not nn.parameter.is_lazy(weight)


def _classify(
    name: str, module: nn.Module, modules: dict[str, nn.Module]
) -> tuple[set[str], tuple[str, ...]]:
    """Roles of one Linear or Conv, and its parts if it is a fused projection."""
    roles: set[str] = {"conv"} if isinstance(module, CONVS) else set()
    words = _split(name)
    last = words[-1]
    above = [modules[".".join(words[:i])] for i in range(len(words) - 1, -1, -1)]
    parent = above[0] if above else None
    siblings = [n for n, _ in parent.named_children()] if parent is not None else []
    beside = {p for s in siblings if s != last for p in attention_parts(s)}
    near = " ".join([*words[-3:-1], *(type(m).__name__ for m in above[:2])])

    parts = attention_parts(last)
    if len(parts) > 1:
        rows = module.weight.shape[0]
        return (roles | set(parts), parts) if rows % len(parts) == 0 else (roles, ())
    if parts:
        if beside - set(parts):
            roles |= set(parts)
        return roles, ()
    if isinstance(module, CONVS) or _HEAD.search(name):
        return roles, ()

    in_attention = len(beside) > 1 or (
        parent is not None
        and bool(_ATTENTION.search(f"{type(parent).__name__} {words[-2:-1]}"))
    )
    if last.lower() in _OUT and in_attention:
        return roles | {"output"}, ()
    # BERT style: attention.output.dense is the output, output.dense the MLP's second.
    if last == "dense" and words[-2:-1] == ["output"]:
        inside = len(words) > 2 and bool(_ATTENTION.search(words[-3]))
        return roles | ({"output"} if inside else {"mlp"}), ()
    layer = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    if last.lower() in _MLP and not in_attention:
        inside = isinstance(parent, layer) or _MLP_BLOCK.search(near)
        if inside or any(s.lower() in _MLP - {last.lower()} for s in siblings):
            return roles | {"mlp"}, ()
    if _MLP_BLOCK.search(near):
        roles.add("mlp")
    return roles, ()


def scan(model: nn.Module) -> list[Candidate]:
    """All layers of ``model`` that can be adapted, with their roles.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    list of Candidate
        In the order of ``named_modules``; a module used under two names comes once.
    """
    modules = dict(model.named_modules())
    # A module used twice is listed once; its second name must still be found above.
    modules |= dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, module in model.named_modules():
        if not name or not _supported(module):
            continue
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            continue  # its out_proj is never called; it is the part "output"
        if isinstance(module, nn.MultiheadAttention):
            parts = ("query", "key", "value", "output")
            found.append(Candidate(name, module, frozenset(parts), parts))
            continue
        roles, parts = _classify(name, module, modules)
        blocked = ""
        if type(parent).__name__ in _READS_WEIGHTS:
            blocked = (
                f"{type(parent).__name__} reads this layer's weight and never calls "
                "it, so an adapter would change nothing"
            )
        found.append(Candidate(name, module, frozenset(roles), parts, blocked))
    return found


def describe(candidates: list[Candidate]) -> str:
    """One line per role: how many layers, and a few of their names."""
    if not candidates:
        return "  no Linear, Conv or MultiheadAttention layer at all"
    lines = []
    for role in (*ROLES, ""):
        hits = [c for c in candidates if (role in c.roles if role else not c.roles)]
        if hits:
            names = ", ".join(c.name for c in hits[:3])
            more = f", ... ({len(hits)} in all)" if len(hits) > 3 else ""
            lines.append(f"  {role or 'no role':8} {names}{more}")
    return "\n".join(lines)
