"""Sinkhorn attention: ``fastdsm.sinkhorn_attention``."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import reference
from ._ops import arguments, masks, transforms
from .results import AttentionInfo, default_tol


class _Options(TypedDict, total=False):
    """What the overloads share."""

    key_padding_mask: Tensor | None
    query_padding_mask: Tensor | None
    temperature: float | Tensor
    n_iters: int
    first: str
    tol: float | None
    grad: str | None
    backend: str


@overload
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_info: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, AttentionInfo]: ...
@overload
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_info: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, AttentionInfo]: ...
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    n_iters: int = 3,
    first: str = "col",
    tol: float | None = None,
    grad: str | None = None,
    return_info: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AttentionInfo]:
    """Attention with a doubly-stochastic plan: softmax's place in scaled_dot_product_attention taken by Sinkhorn.

    out = P value, P = exp(S + f + g) after ``n_iters`` sweeps on S = (scale query key^T + attn_mask) / temperature. Each
    query line has mass 1, each key line (valid queries) / (valid keys). On a GPU no (N, M) matrix is ever stored, forward or
    backward: memory beside inputs and outputs is O(n_iters (N + M)) per head; on a CPU a few heads' plans at most.

    Args:
        query: (..., H, N, d), float16, bfloat16, float32 or float64, any strides; 2 and 3 dimensions are without heads.
        key: (..., G, M, d), value: (..., G, M, e). G = H, or with ``enable_gqa`` a divisor of H: query head h meets key
            head h // (H / G). The arithmetic is float32 (float64 for float64); float32 products follow
            torch.get_float32_matmul_precision() on a GPU.
        attn_mask: broadcastable to (..., H, N, M): bool, True where an entry takes part, or floating, added to
            scale query key^T (differentiable). A floating one takes an entry out where it is -inf or at most half the lowest
            number of its dtype, as finfo(dtype).min is. Larger values are logits: a column of -1e4 is scaled to its mass.
        dropout_p: probability in [0, 1) with which an entry of the plan is dropped, as in scaled_dot_product_attention:
            also in evaluation, unless the caller passes 0.
        is_causal: must be False. A lower-triangular doubly-stochastic matrix is the identity.
        scale: of the logits, default 1 / sqrt(d).
        enable_gqa: allow fewer key and value heads than query heads.
        key_padding_mask: (..., M), query_padding_mask: (..., N): bool, True where a line is padding, or floating, which takes
            a line out as attn_mask does an entry, and is added to the logits of the others (a bool one is the faster). What
            lies on padded lines is never used; padded and fully masked query lines give zeros, in value and gradient.
        temperature: > 0, a float or a tensor broadcastable to (..., H), then differentiable.
        n_iters: sweeps, >= 0; 0 is scaled_dot_product_attention ("col").
        first: "col": query lines are exact at the end; "row": key lines are.
        tol: None, or a relative residual >= 0 at which each head stops by itself.
        grad: None or "unrolled", the exact gradient of the sweeps done; "implicit", the fixed point's by conjugate gradients
            (at most n_iters steps), right only where the sweeps have converged, wherefore it needs ``tol``.
        return_info: also return an :class:`AttentionInfo`, at the price of one more pass.
        backend: as for :func:`fastdsm.sinkhorn`.

    Returns:
        (..., H, N, e) in value's dtype. Differentiable in query, key, value, a floating attn_mask and temperature. Forward mode
        and second derivatives, for dropout_p=0 alone, store every head's matrix in float64, as for :func:`fastdsm.sinkhorn`.

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.

    Source: Sinkformers (Sander et al., arXiv 2110.11773), whose attention this is for "row" counted in half steps.
    """
    call = Checked(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_padding_mask, query_padding_mask, temperature, n_iters, first, tol, grad, backend,
    )  # fmt: skip
    if call.backend == "reference":
        found = reference.sinkhorn_attention(*call.operands, return_info=return_info, **call.keywords)
        if not isinstance(found, Tensor):
            return call.restore(found[0]), AttentionInfo(*map(call.restore, found[1]))
        return call.restore(found)
    saving = transforms.backward_may_follow(call.inputs)  # for it the kernels keep every sweep's potentials
    out, f, g, residual, sweeps = transforms.sinkhorn_attention(*call.inputs, return_info, saving)
    if not return_info:
        return call.restore(out)
    converged = residual <= (default_tol(residual.dtype) if tol is None else tol)
    potentials = (x[:, :, -1].to(residual.dtype) for x in (f, g))
    return call.restore(out), AttentionInfo(*map(call.restore, (residual, converged, sweeps, *potentials)))


class Checked:
    """A call's arguments, checked and brought to (B, H, N, d)."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        key_padding_mask: Tensor | None,
        query_padding_mask: Tensor | None,
        temperature: float | Tensor,
        n_iters: int,
        first: str,
        tol: float | None,
        grad: str | None,
        backend: str,
    ) -> None:
        if is_causal:
            raise ValueError(
                "is_causal=True has no Sinkhorn plan: a lower-triangular doubly-stochastic matrix is the identity, and "
                "normalising a column reads future queries; use softmax attention there, or attn_mask for another pattern"
            )
        query, key, value = _autocast(query, key, value)
        _check_operands(query, key, value, enable_gqa)
        n_iters = arguments.count_of(n_iters, "n_iters")
        arguments.check_choice(first, "first", ("col", "row"))
        arguments.check_tol(tol)
        if grad is not None:
            arguments.check_choice(grad, "grad", ("unrolled", "implicit"))
        if grad == "implicit" and tol is None:
            raise ValueError('grad="implicit" is right at the fixed point only and needs tol, such as tol=1e-4, got tol=None')
        if isinstance(dropout_p, Tensor) or not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be a float in [0, 1), got {dropout_p}")
        self.backend = arguments.resolve_backend(backend, query)
        batch, (N, d), M = query.shape[:-2], query.shape[-2:], key.shape[-2]
        if 0 in (N, M) and self.backend == "reference":
            self.backend = "torch"  # the oracle takes maxima; there is nothing to compare
        self._lead = batch
        like = query[..., :1].expand(*query.shape[:-1], M)
        tau = arguments.temperature_of(temperature, like)
        if not isinstance(tau, Tensor) and arguments.is_symbol(tau):
            tau = arguments.filled(tau, like.shape[:-2], like)
        bias, mask = _attn_mask(attn_mask, query, M)
        paddings = []
        for x, name, length, role in (
            (query_padding_mask, "query_padding_mask", N, "query"),
            (key_padding_mask, "key_padding_mask", M, "key"),
        ):
            padding, added = _padding(x, name, query, length, role)
            paddings.append(padding)
            if added is not None:
                added = added[:, None, :, None] if role == "query" else added[:, None, None, :]
                bias = added if bias is None else bias + added
        query, key, value = map(_four, (query, key, value))
        if mask is not None:
            query, key, value = _without_unmet(query, key, value, mask, paddings)
        elif bias is not None:
            query, key, value = _without_unmet(query, key, value, bias != -torch.inf, paddings)
        heads = query.shape[1]
        tensors = [
            query,
            key,
            value,
            bias,
            mask,
            tau.reshape(query.shape[0], heads) if isinstance(tau, Tensor) else None,
            *paddings,
        ]
        scale = 1.0 / math.sqrt(d) if scale is None else float(scale)
        number = 1.0 if isinstance(tau, Tensor) else tau
        seed = None
        if dropout_p > 0:
            seed = torch.randint(2**62, (1,), device=query.device)
        self.inputs: tuple[Any, ...] = (
            *tensors, seed, scale, number, n_iters, first == "col", -1.0 if tol is None else float(tol),
            float(dropout_p), grad == "implicit", self.backend,
        )  # fmt: skip
        self.operands = (query, key, value, mask if bias is None else bias, float(dropout_p))
        self.keywords: dict[str, Any] = {
            "scale": scale, "temperature": number if tensors[5] is None else tensors[5], "n_iters": n_iters, "first": first,
            "tol": tol, "query_padding_mask": paddings[0], "key_padding_mask": paddings[1],
        }  # fmt: skip

    def restore(self, x: Tensor) -> Tensor:
        """Give a result (B, H, ...) the leading dimensions of the query."""
        return x if len(self._lead) == 2 else x.reshape((*self._lead, *x.shape[2:]))


def _without_unmet(
    query: Tensor, key: Tensor, value: Tensor, taking_part: Tensor, paddings: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines that a mask leaves without a partner become padding, or zeros where that is so for some heads: NaN there too."""
    B, H, N, _ = query.shape
    G, M = key.shape[1:3]
    met = masks.met_lines(taking_part, *paddings)
    for k, (x, padding, lines) in enumerate(zip(met, tuple(paddings), (N, M), strict=True)):
        unmet = ~x.any(1).expand(B, lines)
        paddings[k] = unmet if padding is None else padding | unmet
    if taking_part.shape[1] == 1:
        return query, key, value
    of_queries, of_keys = (x.expand(B, H, lines).unsqueeze(-1) for x, lines in zip(met, (N, M), strict=True))
    of_keys = of_keys.unflatten(1, (G, -1)).any(2)  # by any of the query heads that share a key head
    return query.masked_fill(~of_queries, 0.0), key.masked_fill(~of_keys, 0.0), value.masked_fill(~of_keys, 0.0)


def _four(x: Tensor) -> Tensor:
    """(B, H, lines, features) of any number of leading dimensions."""
    if x.dim() < 4:
        return x[(None,) * (3 - x.dim())].unsqueeze(1)
    return x if x.dim() == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _autocast(*operands: Tensor) -> list[Tensor]:
    """As scaled_dot_product_attention: in an autocast region operands take its dtype, float64 ones excepted."""
    found = []
    for x in operands:
        narrows = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        known = narrows and x.device.type in ("cpu", "cuda")  # torch 2.11 cannot trace the general question
        on = known and torch.is_autocast_enabled(x.device.type)
        found.append(x.to(torch.get_autocast_dtype(x.device.type)) if on else x)
    return found


def _check_operands(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape (..., lines, features), got {type(x).__name__}")
        if x.dtype not in arguments.DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert with {name}.float()")
        arguments.check_dense(x, name)
        if x.dtype != query.dtype:
            raise TypeError(f"query, key and value must have one dtype, got query {query.dtype} and {name} {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"query, key and value must be on one device, got query on {query.device}, {name} on {x.device}")
        if x.dim() < 2 or x.dim() != query.dim():
            raise ValueError(
                f"query, key and value must have the same number of dimensions, at least 2, got {_shapes(named)}; "
                "add leading dimensions of size 1"
            )
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(f"query and key must have the same number of features, at least 1, got {_shapes(named)}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key and value must have the same number of lines, got {_shapes(named)}")
    heads = slice(None, -3) if query.dim() > 3 else slice(None, -2)
    if not query.shape[heads] == key.shape[heads] == value.shape[heads]:
        raise ValueError(f"query, key and value must have the same batch dimensions, got {_shapes(named)}; expand one of them")
    if query.dim() <= 3:
        return
    many, few = query.shape[-3], key.shape[-3]
    if few != value.shape[-3]:
        raise ValueError(f"key and value must have the same number of heads, got {_shapes(named)}")
    if many != few and not enable_gqa:
        raise ValueError(f"query and key must have the same number of heads unless enable_gqa=True, got {_shapes(named)}")
    if few == 0 or many % few:
        raise ValueError(f"with enable_gqa the key's heads must divide the query's, got {many} and {few} in {_shapes(named)}")


def _shapes(named: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())


def _attn_mask(attn_mask: Tensor | None, query: Tensor, M: int) -> tuple[Tensor | None, Tensor | None]:
    """As a bias or as a mask, four dimensions, 1 where it is broadcast."""
    if attn_mask is None:
        return None, None
    if not isinstance(attn_mask, Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.dtype in arguments.DTYPES):
        kind = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise TypeError(f"attn_mask must be a bool or floating-point tensor, got {kind}")
    arguments.check_device(attn_mask, "attn_mask", query)
    shape = (*query.shape[:-1], M)
    arguments.broadcast(attn_mask, "attn_mask", shape)
    x = attn_mask[(None,) * (len(shape) - attn_mask.dim())]
    if x.dim() > 4:
        x = x.expand(*shape[:-3], *x.shape[-3:])
    x = _four(x)
    return (None, x) if x.dtype == torch.bool else (masks.lowered(x), None)


def _padding(x: Tensor | None, name: str, query: Tensor, length: int, role: str) -> tuple[Tensor | None, Tensor | None]:
    """(B, length): bool, which lines are padding, and what is added to the logits of the others, or None."""
    if x is None:
        return None, None
    masks.check_kind(x, name, f"where a {role} line is padding")
    arguments.check_device(x, name, query)
    batch = query.shape[:-3] if query.dim() > 3 else query.shape[:-2]
    if x.dim() < 1 or x.shape[-1] != length:
        raise ValueError(f"{name} must have shape (..., {length}), one entry per {role} line, got {tuple(x.shape)}")
    x = arguments.broadcast(x, name, (*batch, length)).reshape(math.prod(batch), length)
    out = masks.taken_out(x)
    if x.dtype == torch.bool:
        return out, None
    added = x.masked_fill(out, 0.0)
    nothing = not added.requires_grad and arguments.may_read(added) and not bool(added.any())
    return out, None if nothing else added
