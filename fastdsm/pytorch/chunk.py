"""Cutting a batch into cache-sized chunks, and loading one: scaled, masked, with its marginals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Problem
from .layout import BatchLast, Layout, Ring, choose_layout, copy
from .sweeps import KEEP_V_ABOVE, TAME_RANGE, Chunk

# Entries of a chunk by max(n, m): enough to pay for the calls, few enough for the caches and for a forward and backward that
# take less than four times the input's memory; the backward holds u and v of every sweep.
_FORWARD_ENTRIES = ((8, 1 << 19), (math.inf, 1 << 20))
_BACKWARD_ENTRIES = ((8, 1 << 17), (math.inf, 7 << 16))
_IN_HAND = {False: 2, True: 3}  # vectors of a kind that a forward, a backward uses at once


@dataclass(frozen=True)
class Part:
    """A slice of the batch, loaded; ``chosen`` (B,): the matrices this pass is for, None for all."""

    where: slice
    chunk: Chunk
    chosen: Tensor | None

    def write(self, target: Tensor, value: Tensor) -> None:
        """Copy ``value`` (batch first) to this slice of ``target``, where chosen."""
        kept = target[self.where]
        if self.chosen is None:
            copy(kept, value)
        else:
            kept.copy_(torch.where(self.chosen.view(-1, *(1,) * (value.dim() - 1)), value, kept))


def parts(problem: Problem, backward: bool) -> Iterator[Part]:
    """The batch in pieces; a piece with tame and wild matrices comes twice, once for each kind.

    On an accelerator the batch is one piece, and wild: looking at values would stall the host.
    """
    batch, n, m = problem.logits.shape
    on_cpu = problem.logits.device.type == "cpu"
    entries = next(x for side, x in (_BACKWARD_ENTRIES if backward else _FORWARD_ENTRIES) if max(n, m) <= side)
    size = max(entries // (n * m), 2) if on_cpu else batch
    layout = choose_layout(problem.logits)
    flat = (min(size, batch) * n * m,)
    buffers = [
        problem.logits.new_empty(flat if needed else (0,), dtype=problem.compute_dtype)
        for needed in (_needs_copy(problem, layout), True, layout.needs_scratch(max(n, m)), backward)
    ]
    spare = _IN_HAND[backward]
    kept = problem.n_iters + spare if backward else 0
    counts = ((n, kept), (m, kept if max(n, m) > KEEP_V_ABOVE else min(kept, spare)))
    rows, cols = ([buffers[1].new_empty(x * min(size, batch) * side) for x in (count, spare)] for side, count in counts)
    uniform = problem.row_marginal is None and problem.col_marginal is None
    for start in range(0, batch, max(size, 1)):
        where = slice(start, min(start + size, batch))
        S, K, scratch, W = _load(problem, layout, where, buffers)
        row, col = S.select(layout.cols, 0).shape, S.select(layout.rows, 0).shape
        history, in_hand = ((Ring(x, row), Ring(y, col)) for x, y in zip(rows, cols, strict=True))
        store = (layout, S, K, W, scratch, layout.operands(K, scratch), in_hand, history if backward else in_hand)
        tame = None
        if on_cpu and uniform and problem.f0 is None:
            dims = (layout.rows, layout.cols)
            tame = S.amax(dims) - S.amin(dims) <= TAME_RANGE
        if tame is not None and bool(tame.any()):
            r, c = (1.0, n / m) if problem.unit_rows else (m / n, 1.0)
            whole_r, whole_c = S.new_full((), r).expand(row), S.new_full((), c).expand(col)
            chunk = Chunk(*store, whole_r, whole_c, None, None, None, uniform, (r, c))
            yield Part(where, chunk, None if bool(tame.all()) else tame)
        if tame is None or not bool(tame.all()):
            lines = _marginals(S, problem, layout, where)
            f0 = None if problem.f0 is None else torch.where(lines[0] == 0, 0.0, layout.vector(problem.f0[where]))
            chunk = Chunk(*store, *lines, f0, uniform)
            yield Part(where, chunk, None if tame is None or not bool(tame.any()) else ~tame)


def _needs_copy(problem: Problem, layout: Layout) -> bool:
    """Whether S cannot be the logits themselves."""
    return layout is BatchLast or problem.logits.dtype != problem.compute_dtype


def _load(problem: Problem, layout: Layout, part: slice, buffers: list[Tensor]) -> tuple[Tensor, ...]:
    """S, and the buffers K, scratch and W, of this part's shape or empty."""
    logits = problem.logits[part]
    own, K, scratch, W = (layout.buffer(x, logits.shape if x.numel() else torch.Size((0, 0, 0))) for x in buffers)
    S = logits
    if _needs_copy(problem, layout):
        copy(layout.batch_first(own), logits)
        S = own
    if isinstance(problem.temperature, Tensor):
        tau = problem.temperature[part]
        S = S / (tau.view(-1, 1, 1) if layout.line == -1 else tau)
    elif problem.temperature != 1.0:
        S = S / problem.temperature
    if problem.mask is not None:
        S = S.masked_fill(~layout.matrix(problem.mask[part]), -torch.inf)
    for marginal, spread in ((problem.row_marginal, layout.down), (problem.col_marginal, layout.across)):
        if marginal is not None:
            S = S.masked_fill(spread(layout.vector(marginal[part]) == 0), -torch.inf)
    return S, K, scratch, W


def _marginals(S: Tensor, problem: Problem, at: Layout, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r and c, 0 on excluded lines, and the indicators of those lines."""
    row, col = (None if x is None else at.vector(x[part]) for x in (problem.row_marginal, problem.col_marginal))
    valid = ~S.isneginf()
    rows, cols = valid.any(at.cols), valid.any(at.rows)
    n_rows, n_cols = (x.sum(at.line, keepdim=True).clamp_(min=1).to(S.dtype) for x in (rows, cols))
    if row is not None:
        total = (row * rows).sum(at.line, keepdim=True)
    elif col is not None:
        total = (col * cols).sum(at.line, keepdim=True)
    else:
        total = n_rows if problem.unit_rows else n_cols
    r = torch.where(rows, total / n_rows if row is None else row, 0.0)
    c = torch.where(cols, total / n_cols if col is None else col, 0.0)
    return r, c, (~rows).to(S.dtype), (~cols).to(S.dtype)
