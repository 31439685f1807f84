"""A call of Sinkhorn attention, checked and brought to (B, H, N, d)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import arguments, masks


@dataclass(frozen=True)
class Given:
    """A potential from which a plan starts, (..., H, lines) of "query" or "key" lines: as good as an addition to the logits."""

    potential: Tensor
    side: str

    @classmethod
    def of(cls, f0: Tensor | None, first: str) -> Given | None:
        """Of the side that is not updated first."""
        return None if f0 is None else cls(f0, "query" if first == "col" else "key")

    def whole(self, query: Tensor, length: int) -> Tensor:
        """(B, H, lines) in the compute dtype."""
        x = arguments.line_vector(self.potential, "f0", query, length, self.side)
        assert x is not None
        heads = query.shape[-3] if query.dim() > 3 else 1
        return x.reshape(math.prod(query.shape[:-2]) // max(heads, 1), heads, length)


class Checked:
    """A call's arguments, checked and brought to (B, H, N, d).

    share: this process and of how many, which draw alike and must not drop the same entries of their different heads.
    """

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
        given: Given | None = None,
        share: tuple[int, int] = (0, 1),
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
            raise ValueError(f"dropout_p must be a float in [0, 1), got {dropout_p!r}")
        if isinstance(scale, Tensor):
            raise TypeError(
                f"scale must be a float, got a tensor of shape {tuple(scale.shape)}, which would get no gradient; multiply the "
                "query by it and give scale=1.0"
            )
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
        start = None if given is None else given.whole(query, N if given.side == "query" else M)
        query, key, value = map(_four, (query, key, value))
        met: tuple[Tensor, Tensor] | None = None
        if mask is not None:
            query, key, value, met = _without_unmet(query, key, value, mask, paddings)
        elif bias is not None:
            query, key, value, met = _without_unmet(query, key, value, bias != -torch.inf, paddings)
        heads = query.shape[1]
        self.start: tuple[str, Tensor] | None = None
        if given is not None and start is not None:
            at = 0 if given.side == "query" else 1
            start = _on_lines(start, None if met is None else met[at], paddings[at])
            self.start = given.side, start
            number = tau.reshape(query.shape[0], heads, 1, 1) if isinstance(tau, Tensor) else tau
            bias = _with_lines(bias, start.unsqueeze(-1 - at) * number)
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
            rank, processes = share
            seed = torch.randint(2**62, (processes,), device=query.device)[rank : rank + 1]
        self.inputs: tuple[Any, ...] = (
            *tensors, seed, scale, number, n_iters, first == "col", -1.0 if tol is None else float(tol),
            float(dropout_p), grad == "implicit", self.backend,
        )  # fmt: skip
        self.operands = (query, key, value, masks.joined(bias, mask), float(dropout_p))
        self.keywords: dict[str, Any] = {
            "scale": scale, "temperature": number if tensors[5] is None else tensors[5], "n_iters": n_iters, "first": first,
            "tol": tol, "query_padding_mask": paddings[0], "key_padding_mask": paddings[1],
        }  # fmt: skip

    def restore(self, x: Tensor) -> Tensor:
        """Give a result (B, H, ...) the leading dimensions of the query."""
        return x if len(self._lead) == 2 else x.reshape((*self._lead, *x.shape[2:]))

    def started(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials (B, H, lines) with the one that the plan started from, where one was given."""
        if self.start is None:
            return f, g
        side, x = self.start
        return (f + x, g) if side == "query" else (f, g + x)


def _without_unmet(
    query: Tensor, key: Tensor, value: Tensor, taking_part: Tensor, paddings: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Lines that a mask leaves without a partner become padding, or zeros where that is so for some heads: NaN there too.

    Also returns which query and key lines have one, (B or 1, H or 1, lines).
    """
    B, H, N, _ = query.shape
    G, M = key.shape[1:3]
    met = masks.met_lines(taking_part, *paddings)
    for k, (x, padding, lines) in enumerate(zip(met, tuple(paddings), (N, M), strict=True)):
        unmet = ~x.any(1).expand(B, lines)
        paddings[k] = unmet if padding is None else padding | unmet
    if taking_part.shape[1] == 1:
        return query, key, value, met
    of_queries, of_keys = (x.expand(B, H, lines).unsqueeze(-1) for x, lines in zip(met, (N, M), strict=True))
    of_keys = of_keys.unflatten(1, (G, -1)).any(2)  # by any of the query heads that share a key head
    return query.masked_fill(~of_queries, 0.0), key.masked_fill(~of_keys, 0.0), value.masked_fill(~of_keys, 0.0), met


def _on_lines(x: Tensor, met: Tensor | None, padding: Tensor | None) -> Tensor:
    """x (B, H, lines), 0 where a line takes no part; -inf, which would take one out, is NaN."""
    x = x.masked_fill(x == -torch.inf, torch.nan)
    if met is not None:
        x = x.masked_fill(~met, 0.0)
    return x if padding is None else x.masked_fill(padding.unsqueeze(1), 0.0)


def _with_lines(bias: Tensor | None, added: Tensor) -> Tensor:
    """A bias and what is added to whole lines; what the bias takes out stays out."""
    return added if bias is None else torch.where(bias == -torch.inf, -torch.inf, bias + added)


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
