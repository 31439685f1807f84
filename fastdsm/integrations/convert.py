"""``convert``: a model's softmax attention replaced by Sinkhorn's, weights kept."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .._ops import arguments
from ..nn import SinkhornAttention
from . import multihead
from .modules import attention_modules, mentions
from .report import Entry, Report


def convert(
    model: nn.Module,
    *,
    n_iters: int = 3,
    temperature: float = 1.0,
    first: str = "col",
    tol: float | None = None,
    backend: str = "auto",
    causal: str = "own",
    leave: Iterable[str] = (),
) -> Report:
    """Replace every attention that is understood, in place, and say what became of each.

    Understood are nn.MultiheadAttention (also in nn.TransformerEncoder, nn.TransformerDecoder and their layers), whose place
    :class:`fastdsm.nn.SinkhornAttention` takes, and timm's attention of ViT, DeiT, BEiT, EVA, Swin and their kin, which become
    :mod:`fastdsm.integrations.timm`'s. Parameters stay the same objects under the same names: a state_dict fits as before, and
    so does an optimiser. An nn.TransformerEncoder no longer makes nested tensors. A module in several places is replaced in all
    of them by one.

    Args:
        model: any module but an nn.MultiheadAttention itself, which cannot be replaced in place.
        n_iters, temperature, first, tol, backend: as for :func:`fastdsm.sinkhorn_attention`; n_iters=0 is softmax.
        causal: "own": self-attention in an nn.TransformerDecoderLayer is left, as it is causal; "error": it is replaced, and a
            call with is_causal=True is an error. Of other modules nothing tells before the call, and it is an error there.
        leave: paths to leave as they are, as patterns of fnmatch, such as "head.*".

    Returns:
        A :class:`Report`. What is left has its reason: subclasses, hooks, keys without queries (add_bias_kv, add_zero_attn),
        classes that are not known, and transformers' modules, which :mod:`fastdsm.integrations.transformers` serves.

    Raises:
        TypeError, ValueError: arguments out of range. In a converted model's forward: as the modules do, and for one query over
            several keys, as in attention that pools: its only plan is the uniform one.

    A plan is of all its queries: cross attention of a decoder reads later positions through it, and padded queries move the
    others unless ``query_padding_mask`` says which they are. Padding of keys is padding of queries in self-attention.
    """
    arguments.check_choice(causal, "causal", ("own", "error"))
    arguments.check_choice(first, "first", ("col", "row"))
    arguments.check_temperature(temperature)
    arguments.check_tol(tol)
    options: dict[str, Any] = {
        "n_iters": arguments.count_of(n_iters, "n_iters"), "temperature": float(temperature), "first": first, "tol": tol,
        "backend": backend,
    }  # fmt: skip
    if isinstance(model, nn.MultiheadAttention):
        raise TypeError("model must hold its attention, got an nn.MultiheadAttention, which cannot be replaced in place")
    patterns = [leave] if isinstance(leave, str) else list(leave)
    roles = _roles(model)
    found, made = Report(), dict[nn.Module, SinkhornAttention]()
    for path, module in list(attention_modules(model)):
        kind = type(module).__name__
        if any(fnmatchcase(path, pattern) for pattern in patterns):
            found.left.append(Entry(path, kind, "left by request"))
            continue
        why_not = _why_not(module)
        if why_not is None and roles.get(module) == "decoder" and causal == "own":
            why_not = "causal self-attention of a decoder keeps its own"
        if why_not is not None:
            found.left.append(Entry(path, kind, why_not))
            continue
        if isinstance(module, nn.MultiheadAttention):
            made[module] = multihead.replacement(module, _SELF_ATTENTION[roles.get(module)], **options)
        else:
            _timm().become_sinkhorn(module, **options)
        found.changed.append(Entry(path, kind, f"now {type(made.get(module, module)).__name__}"))
    _put(model, made)
    return found


_SELF_ATTENTION = {"self": True, "decoder": True, "memory": False, None: None}


def _roles(model: nn.Module) -> dict[nn.Module, str | None]:
    """What torch's layers use their attention for; None where two layers that share one differ."""
    roles: dict[nn.Module, str | None] = {}
    for layer in model.modules():
        parts = {}
        if isinstance(layer, nn.TransformerEncoderLayer):
            parts = {"self": layer.self_attn}
        elif isinstance(layer, nn.TransformerDecoderLayer):
            parts = {"decoder": layer.self_attn, "memory": layer.multihead_attn}
        for role, attention in parts.items():
            roles[attention] = role if roles.get(attention, role) == role else None
    return roles


def _why_not(module: nn.Module) -> str | None:
    """What keeps a module from being converted, whatever it is used for."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return multihead.why_not(module)
    if isinstance(module, SinkhornAttention) or hasattr(module, "sinkhorn_options"):
        return "is Sinkhorn's already"
    if mentions(kind, "ALL_ATTENTION_FUNCTIONS"):
        return "transformers': see fastdsm.integrations.transformers.register"
    if kind.__module__.startswith("timm.") and kind in _timm().SINKHORN:
        return None
    return f"not known: {kind.__module__}.{kind.__qualname__}"


def _timm() -> Any:
    """What serves timm, which is there where a module of its is."""
    from . import timm

    return timm


def _put(model: nn.Module, made: dict[nn.Module, SinkhornAttention]) -> None:
    """Modules in the place of those they were made of, wherever these stand; no nested tensors around them."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in made:
                parent._modules[name] = made[child]
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(x in encoder.modules() for x in made.values()):
            encoder.use_nested_tensor = False
