"""``SinkhornAttention``: nn.MultiheadAttention's constructor and call with a doubly-stochastic plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import sinkhorn_attention
from ..projection import sinkhorn
from .spectral_floor import SpectralFloor

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class SinkhornAttention(nn.Module):
    """Multi-head attention in which :func:`fastdsm.sinkhorn_attention` takes softmax's place.

    Constructor and call are nn.MultiheadAttention's, in its order, without ``add_bias_kv`` and ``add_zero_attn``: a key that no
    query stands beside has no mass to receive. Parameters are named as there, so that weights load from one of equal ``kdim``
    and ``vdim``.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as for nn.MultiheadAttention.
        n_iters, temperature, first, tol, backend: as for :func:`fastdsm.sinkhorn_attention`; temperature a float.
        sigma2_floor: None, or a floor in (0, 1) under which :class:`SpectralFloor` lets no head's plan fall, by its
            temperature. It needs the logits as a matrix: O(N M) memory per head instead of O(N + M).

    forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
    is_causal=False) returns (output, weights or None), shaped as there. ``attn_mask`` and ``key_padding_mask`` follow its
    convention (True takes an entry *out*; floating ones are added); attn_mask (N, M) or (batch * num_heads, N, M).
    ``is_causal`` is an error. need_weights=True stores the plan, without dropout.

    Source: Sinkformers, arXiv 2110.11773.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, both >= 1, got {embed_dim} and {num_heads}")
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        self.options: dict[str, Any] = {"n_iters": n_iters, "first": first, "tol": tol, "backend": backend}
        self.temperature = temperature
        self.floor = None if sigma2_floor is None else SpectralFloor(sigma2_floor, n_iters)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = (embed_dim, embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim)
        if set(widths) == {embed_dim}:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **like))
            weights = [self.in_proj_weight]
        else:
            weights = [nn.Parameter(torch.empty(embed_dim, width, **like)) for width in widths]
            for name, weight in zip(_SEPARATE, weights, strict=True):
                self.register_parameter(name, weight)
        for weight in weights:
            nn.init.xavier_uniform_(weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim, **like)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **like)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

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
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; nn.MultiheadAttention's arguments and results."""
        if is_causal:
            raise ValueError("is_causal=True has no Sinkhorn plan: a lower-triangular doubly-stochastic matrix is the identity")
        shapes = [tuple(x.shape) for x in (query, key, value)]
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(f"query, key and value must all be (lines, features) or batches of that, got {shapes}")
        q, k, v = (self._projected(x, which) for which, x in enumerate((query, key, value)))
        bias = self._mask(attn_mask, q, k)
        padding = None if key_padding_mask is None else key_padding_mask.reshape(-1, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            weights = self._plan(q, k, bias, padding)
            out = nn.functional.dropout(weights, dropout) @ self._unpadded(v, padding)
        else:
            temperature: float | Tensor = self.temperature
            if self.floor is not None:
                logits, mask = self._logits(q, k, bias, padding)
                temperature = self.floor(logits, temperature, mask)
            mixed = sinkhorn_attention(
                q, k, v, bias, dropout, temperature=temperature, key_padding_mask=padding, **self.options
            )  # fmt: skip
            assert isinstance(mixed, Tensor)
            out = mixed
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        batched = query.dim() == 3
        out = out.squeeze(0) if not batched else out if self.batch_first else out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    def plan(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """The plan of every head (B, H, N, M), without dropout, for operands as those of a call; stored: O(N M) per head."""
        q, k = self._projected(query, 0), self._projected(key, 1)
        padding = None if key_padding_mask is None else key_padding_mask.reshape(-1, k.shape[2])
        return self._plan(q, k, self._mask(attn_mask, q, k), padding)

    def _plan(self, q: Tensor, k: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
        logits, mask = self._logits(q, k, bias, padding)
        temperature = self.temperature if self.floor is None else self.floor(logits, self.temperature, mask)
        plan = sinkhorn(logits, temperature=temperature, mask=mask, **self.options)
        assert isinstance(plan, Tensor)
        return plan

    def _projected(self, x: Tensor, which: int) -> Tensor:
        """Query (0), key (1) or value (2) of every head, (B, H, lines, d)."""
        weight = (
            self.in_proj_weight.chunk(3)[which] if hasattr(self, "in_proj_weight") else self.get_parameter(_SEPARATE[which])
        )
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[which]
        x = nn.functional.linear(x, weight, bias)
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return self._heads(x)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, embed_dim) to (B, H, N, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """The mask in sinkhorn_attention's convention: bool True takes part; four dimensions if per head."""
        if attn_mask is None:
            return None
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(-1, self.num_heads, q.shape[2], k.shape[2])
        return ~attn_mask if attn_mask.dtype == torch.bool else attn_mask

    @staticmethod
    def _logits(q: Tensor, k: Tensor, bias: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """q k^T / sqrt(d) plus a floating mask (B, H, N, M), and which entries take part."""
        logits = q @ k.mT / q.shape[-1] ** 0.5
        mask = None if padding is None else ~padding[:, None, None]
        if bias is not None and bias.dtype == torch.bool:
            mask = bias if mask is None else mask & bias
        elif bias is not None:
            logits = logits + bias
        return logits, mask

    @staticmethod
    def _unpadded(v: Tensor, padding: Tensor | None) -> Tensor:
        """Values with zeros on padded lines, whatever stands there."""
        return v if padding is None else v.masked_fill(padding[:, None, :, None], 0.0)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, temperature={self.temperature}"
