"""Blocks of the logits of an attention in plain PyTorch: some heads, some query lines, every key line.

Inside a block tensors have five dimensions, (b, g, r, lines, ...): r query heads for each of g key heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._ops.problem import Attention, Dropout, Potentials

BLOCK_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Block:
    """Where the block lies in what has a line for every query head (``batch``, ``heads``) or key head (``groups``)."""

    batch: slice
    heads: slice
    groups: slice
    rows: slice

    @property
    def by_head(self) -> tuple[slice, slice]:
        """Index of the block in (B, H, ...)."""
        return self.batch, self.heads

    @property
    def by_row(self) -> tuple[slice, slice, slice]:
        """Index of the block in (B, H, N, ...)."""
        return self.batch, self.heads, self.rows

    @property
    def by_group(self) -> tuple[slice, slice]:
        """Index of the block in (B, G, ...)."""
        return self.batch, self.groups

    def split(self, x: Tensor) -> Tensor:
        """(b, g, r, ...) of (b, g r, ...)."""
        return x.unflatten(1, (self.groups.stop - self.groups.start, -1))

    def rows_of(self, x: Tensor) -> Tensor:
        """The block's part (b, g, r, rows, ...) of (B, H, N, ...)."""
        return self.split(x[self.by_row])

    def heads_of(self, x: Tensor) -> Tensor:
        """The block's part (b, g, r, ...) of (B, H, ...)."""
        return self.split(x[self.by_head])

    def queries(self, x: Tensor, problem: Attention) -> Tensor:
        """Lines of x (B, H, N, e), in the compute dtype, zero where the query is padded."""
        padding = problem.query_padding
        x = self.rows_of(x).to(problem.compute_dtype)
        return x if padding is None else x.masked_fill(padding[self.batch, None, None, self.rows, None], 0.0)

    def keys(self, x: Tensor, problem: Attention) -> Tensor:
        """Lines (b, g, 1, M, e) of x (B, G, M, e), in the compute dtype, zero where the key is padded."""
        padding = problem.key_padding
        x = x[self.by_group].unsqueeze(2).to(problem.compute_dtype)
        return x if padding is None else x.masked_fill(padding[self.batch, None, None, :, None], 0.0)

    def temperature(self, problem: Attention) -> float | Tensor:
        """A number, or (b, g, r, 1, 1)."""
        tau = problem.temperature
        return self.heads_of(tau)[..., None, None] if isinstance(tau, Tensor) else tau

    def logits(self, problem: Attention) -> Tensor:
        """S, (b, g, r, rows, M), in the compute dtype, -inf where an entry takes no part."""
        tau = self.temperature(problem)
        S = (self.queries(problem.query, problem) * (problem.scale / tau)) @ self.keys(problem.key, problem).mT
        if problem.bias is not None:
            S += self.rows_of(problem.bias).to(S.dtype) / tau
        if problem.mask is not None:
            S.masked_fill_(~self.rows_of(problem.mask), -torch.inf)
        if problem.query_padding is not None:
            S.masked_fill_(problem.query_padding[self.batch, None, None, self.rows, None], -torch.inf)
        if problem.key_padding is not None:
            S.masked_fill_(problem.key_padding[self.batch, None, None, None, :], -torch.inf)
        return S

    def exponent(self, S: Tensor, at: Potentials) -> Tensor:
        """S + f + g, in place, in the order of :class:`Potentials`: fine parts are often large and of opposite signs."""
        f, g = self.rows_of(at.f_base).unsqueeze(-1), self.heads_of(at.g_base).unsqueeze(-2)
        S = S.add_(g).add_(f) if at.columns_first else S.add_(f).add_(g)
        return S.add_(self.rows_of(at.f_fine).unsqueeze(-1) + self.heads_of(at.g_fine).unsqueeze(-2))

    def dropped(self, P: Tensor, dropout: Dropout | None) -> Tensor:
        """P with dropout's zeros and factors 1 / (1 - p), in place: a function of the seed and an entry's place alone.

        A 64-bit finaliser (the mixing steps of SplitMix64, Steele et al. 2014) of a counter; the top 24 bits decide.
        """
        if dropout is None:
            return P
        dims = (self.batch, self.heads, self.rows, slice(0, P.shape[-1]))
        place = [torch.arange(d.start, d.stop, device=P.device).view(-1, *(1,) * (3 - i)) for i, d in enumerate(dims)]
        z = dropout.seed
        for index, factor in zip(place, (_STEP_BATCH, _STEP_HEAD, _STEP_ROW, _STEP_COLUMN), strict=True):
            z = z + index * factor
        for shift, factor in ((30, _MIX_FIRST), (27, _MIX_SECOND)):
            z = (z ^ _shifted(z, shift)) * factor
        z = _shifted(z ^ _shifted(z, 31), 40)
        return P.mul_(self.split(z >= round(dropout.p * 2**24))).div_(1.0 - dropout.p)

    def add_gradient(self, problem: Attention, which: str, dS: Tensor, total: Tensor) -> None:
        """Add to ``total``, the gradient of the query, key or bias, what the block's dS contributes."""
        tau = self.temperature(problem)
        if which == "query":
            total[self.by_row] += (dS @ self.keys(problem.key, problem)).mul_(problem.scale / tau).flatten(1, 2)
        elif which == "key":
            weighted = self.queries(problem.query, problem) * (problem.scale / tau)
            total[self.by_group] += (dS.mT @ weighted).sum(2)
        else:
            full = zip(total.shape, (self.batch, self.heads, self.rows, slice(None)), strict=True)
            target = total[tuple(index if size > 1 else slice(None) for size, index in full)]
            target += (dS / tau).flatten(1, 2).sum_to_size(target.shape)


# Odd constants without pattern; the last is 2^64 over the golden ratio, as in SplitMix64.
_STEP_BATCH, _STEP_HEAD, _STEP_ROW, _STEP_COLUMN = (
    0x2545F4914F6CDD1D, 0x369DEA0F31A53F85, 0x5851F42D4C957F2D, 0x9E3779B97F4A7C15 - 2**64,
)  # fmt: skip
_MIX_FIRST, _MIX_SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def blocks(problem: Attention, whole: bool = False) -> Iterator[Block]:
    """All logits in blocks of about ``BLOCK_ENTRIES``, but never less than a line; ``whole``: than a head."""
    B, H, N, _ = problem.query.shape
    G, M = problem.key.shape[1:3]
    repeats, lines = H // G, max(N if whole else min(N, BLOCK_ENTRIES // max(M, 1)), 1)
    count = max(BLOCK_ENTRIES // max(lines * M, 1), 1) if lines >= N else 1
    batches = max(count // H, 1)
    groups = min(max(count // repeats, 1), G)
    heads = repeats if groups > 1 or count >= repeats else count
    for b in range(0, B, batches):
        for g in range(0, G, groups):
            end = min(g + groups, G)
            for h in range(0, repeats, heads):
                for n in range(0, N, lines):
                    taken = slice(g * repeats + h, (end - 1) * repeats + min(h + heads, repeats))
                    yield Block(slice(b, min(b + batches, B)), taken, slice(g, end), slice(n, min(n + lines, N)))
