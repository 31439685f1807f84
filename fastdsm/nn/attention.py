"""``SinkhornAttention``: nn.MultiheadAttention's constructor and call with a doubly-stochastic plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._ops.masks import taken_out
from .._ops.sharded import refuse_context_parallel
from ..attention import sinkhorn_attention
from ..projection import sinkhorn
from .attention_masks import Paddings, are_one, check_operands, entries_of, logits_of, padding_of, used_lines
from .spectral_floor import SpectralFloor

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class _Projection(nn.Linear):
    """A linear map whose bias starts at 0."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SinkhornAttention(nn.Module):
    """Multi-head attention in which :func:`fastdsm.sinkhorn_attention` takes softmax's place.

    Constructor and call are nn.MultiheadAttention's, in its order, and so are the names of the parameters, their first values
    and the attributes. Weights load from one of equal ``kdim`` and ``vdim``. The module stands in nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer, and nn.TransformerEncoder, which needs ``encoder.use_nested_tensor = False`` where it existed
    before.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as for nn.MultiheadAttention.
        add_bias_kv, add_zero_attn: must be False: a key that no query stands beside has no mass to receive.
        n_iters, temperature, first, tol, backend: as for :func:`fastdsm.sinkhorn_attention`; temperature a float.
        sigma2_floor: None, or a floor in (0, 1) under which :class:`SpectralFloor` lets no head's plan fall, by its
            temperature. It needs the logits as a matrix: O(N M) memory per head instead of O(N + M).
        self_attention: whether query and key are the same lines, so that key_padding_mask is padding of the query too: True,
            False, or None, which is found out in each call (see ``query_padding_mask``).
        separate_projections: modules ``q_proj``, ``k_proj``, ``v_proj`` in place of one packed weight, for tensor parallelism
            by columns, which leaves each process its own heads.

    forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
    is_causal=False, query_padding_mask="auto") returns (output, weights or None), shaped as there.

    Masks follow nn.MultiheadAttention's convention: True takes an entry or a line *out*; floating ones are added to the logits,
    and take out at -inf and at most half the lowest number of their dtype, as finfo(dtype).min. attn_mask is (N, M) or
    (batch * num_heads, N, M); key_padding_mask (batch, M), query_padding_mask (batch, N), without batch (M,) and (N,). What
    lies on padded lines is never used. A padded query gives ``out_proj.bias``, with weights 0: unlike a softmax, a plan is one
    of all its lines, so that padding left in would move the others.

    query_padding_mask: a mask; None, no query is padding; or "auto": with ``self_attention`` True key_padding_mask, with False
    none, with None key_padding_mask where query and key are one tensor, or share storage, offset, shape and strides. That
    cannot be seen where they come as copies: inside torch.vmap and under torch.compile unless it is one tensor, after a cast by
    FSDP's mixed precision or by a reentrant checkpoint's inputs packed anew. Set ``self_attention`` there.

    ``is_causal`` is an error. need_weights=True stores the plan, dropped out as it is used.

    Raises:
        TypeError, ValueError: masks of other shapes or of integers, nested tensors, and as ``sinkhorn_attention``.

    Source: Sinkformers, arXiv 2110.11773.
    """

    # nn.TransformerEncoder and its layer ask this before they take a path that computes softmax themselves.
    _qkv_same_embed_dim = False

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    q_proj: _Projection
    k_proj: _Projection
    v_proj: _Projection

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        n_iters: int = 3,
        temperature: float = 1.0,
        first: str = "col",
        tol: float | None = None,
        sigma2_floor: float | None = None,
        self_attention: bool | None = None,
        separate_projections: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, both >= 1, got {embed_dim} and {num_heads}")
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                "add_bias_kv and add_zero_attn must be False: they add a key without a query, and it has no mass to receive; "
                f"got {add_bias_kv} and {add_zero_attn}"
            )
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        self.head_dim = embed_dim // num_heads
        self.kdim, self.vdim = (embed_dim if width is None else width for width in (kdim, vdim))
        self.bias_k, self.bias_v, self.add_zero_attn = None, None, False
        self.options: dict[str, Any] = {"n_iters": n_iters, "first": first, "tol": tol, "backend": backend}
        self.temperature, self.self_attention = temperature, self_attention
        self.context_group: Any = None  # set by fastdsm.distributed.SinkhornContextParallel
        self.floor = None if sigma2_floor is None else SpectralFloor(sigma2_floor, n_iters)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = (embed_dim, self.kdim, self.vdim)
        self.separate_projections = separate_projections
        packed = not separate_projections and set(widths) == {embed_dim}
        for name, width in zip(_SEPARATE, widths, strict=True):
            own = not (packed or separate_projections)
            self.register_parameter(name, nn.Parameter(torch.empty(embed_dim, width, **like)) if own else None)
        self.register_parameter(
            "in_proj_weight", nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **like)) if packed else None
        )
        has_bias = bias and not separate_projections
        self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * embed_dim, **like)) if has_bias else None)
        if separate_projections:
            self.q_proj, self.k_proj, self.v_proj = (_Projection(width, embed_dim, bias=bias, **like) for width in widths)
        self.out_proj = _Projection(embed_dim, embed_dim, bias=bias, **like)
        self._reset_own()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor does: for a module that was made on the meta device."""
        self.out_proj.reset_parameters()
        self._reset_own()

    def _reset_own(self) -> None:
        """What stands before the output."""
        if self.separate_projections:
            for module in (self.q_proj, self.k_proj, self.v_proj):
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight)
            return
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        query_padding_mask: Tensor | str | None = "auto",
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; nn.MultiheadAttention's arguments and results."""
        if is_causal:
            raise ValueError("is_causal=True has no Sinkhorn plan: a lower-triangular doubly-stochastic matrix is the identity")
        check_operands(query, key, value, self.batch_first)
        batched = query.dim() == 3
        paddings = self.paddings(query, key, key_padding_mask, query_padding_mask)
        (q, k, v), bias = self._operands((query, key, value), attn_mask, paddings)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if self.context_group is not None:
            if need_weights or self.floor is not None:
                raise ValueError(
                    "under SinkhornContextParallel the plan is on no process: need_weights=False and no sigma2_floor, "
                    f"got need_weights={need_weights}, sigma2_floor={None if self.floor is None else self.floor.floor}"
                )
            from ..distributed import sinkhorn_attention as over_processes

            out = over_processes(
                q, k, v, bias, dropout, group=self.context_group, temperature=self.temperature,
                query_padding_mask=paddings[0], key_padding_mask=paddings[1], **self.options,
            )  # fmt: skip
        elif need_weights:
            refuse_context_parallel("nn.SinkhornAttention")
            logits, mask = logits_of(q, k, bias, paddings)
            weights = self._plan(logits, mask)
            out = nn.functional.dropout(weights, dropout) @ used_lines(v, mask)
        else:
            temperature = self.temperature if self.floor is None else self._temperature(*logits_of(q, k, bias, paddings))
            out = sinkhorn_attention(
                q, k, v, bias, dropout, temperature=temperature,
                query_padding_mask=paddings[0], key_padding_mask=paddings[1], **self.options,
            )  # fmt: skip
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        out = out.squeeze(0) if not batched else out if self.batch_first else out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        query_padding_mask: Tensor | str | None = "auto",
    ) -> Tensor:
        """The plan of every head (B, H, N, M), without dropout, for operands as those of a call; stored: O(N M) per head."""
        if self.context_group is not None:
            raise ValueError("under SinkhornContextParallel the plan is on no process")
        check_operands(query, key, key, self.batch_first)
        paddings = self.paddings(query, key, key_padding_mask, query_padding_mask)
        (q, k), bias = self._operands((query, key), attn_mask, paddings)
        return self._plan(*logits_of(q, k, bias, paddings))

    def paddings(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, query_padding_mask: Tensor | str | None
    ) -> Paddings:
        """Padding masks of a call's query and key, (B, N) and (B, M), bool or floating; what "auto" stands for."""
        batched = query.dim() == 3
        batch, lines = (0, 1) if self.batch_first and batched else (1, 0)
        count = query.shape[batch] if batched else 1
        of_key = padding_of(key_padding_mask, "key_padding_mask", count, key.shape[lines], batched)
        if not isinstance(query_padding_mask, str):
            return padding_of(query_padding_mask, "query_padding_mask", count, query.shape[lines], batched), of_key
        if query_padding_mask != "auto":
            raise ValueError(f'query_padding_mask must be a tensor, None or "auto", got {query_padding_mask!r}')
        same = are_one(query, key) if self.self_attention is None else self.self_attention
        if of_key is None or not same:
            return None, of_key
        if query.shape[lines] != key.shape[lines]:
            raise ValueError(
                f"self_attention=True asks for queries and keys of one length, got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        return taken_out(of_key), of_key  # what a floating one adds, it adds to keys

    def _operands(
        self, given: tuple[Tensor, ...], attn_mask: Tensor | None, paddings: Paddings
    ) -> tuple[list[Tensor], Tensor | None]:
        """Query, key and value of every head, (B, H, lines, d), whose padded lines were 0; ``attn_mask`` beside them."""
        heads = []
        for which, x in enumerate(given):
            x = x.unsqueeze(0) if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)
            padding = paddings[min(which, 1)]
            if padding is not None:  # not even the projections' gradients may see what lies there
                x = x.masked_fill(taken_out(padding).unsqueeze(-1), 0.0)
            heads.append(self._projected(x, which).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        q, k = heads[:2]
        keys = k.shape[2] * (1 if self.context_group is None else self.context_group.size())
        return heads, entries_of(attn_mask, q.shape[0], q.shape[1], (q.shape[2], keys), given[0].dim() == 3)

    def _projected(self, x: Tensor, which: int) -> Tensor:
        """Query (0), key (1) or value (2) of all heads, side by side."""
        if self.separate_projections:
            projected: Tensor = (self.q_proj, self.k_proj, self.v_proj)[which](x)
            return projected
        weight: Tensor | None = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[which]
        if weight is None:
            assert self.in_proj_weight is not None
            weight = self.in_proj_weight.chunk(3)[which]
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[which]
        return nn.functional.linear(x, weight, bias)

    def _plan(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        return sinkhorn(logits, temperature=self._temperature(logits, mask), mask=mask, **self.options)

    def _temperature(self, logits: Tensor, mask: Tensor | None) -> float | Tensor:
        if self.floor is None:
            return self.temperature
        held: Tensor = self.floor(logits, self.temperature, mask)
        return held

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, temperature={self.temperature}"
