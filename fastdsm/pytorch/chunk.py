"""Cutting a batch into cache-sized chunks, and loading one: scaled, masked, with its marginals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..problem import Problem
from .layout import BatchLast, Layout, choose_layout, copy
from .sweeps import TAME_RANGE, Chunk

# Entries per chunk, so that K and its temporaries stay in cache; the backward also holds u of every sweep.
_FORWARD_ENTRIES = 1 << 19
_BACKWARD_ENTRIES = 1 << 17


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
    size = max((_BACKWARD_ENTRIES if backward else _FORWARD_ENTRIES) // (n * m), 2) if on_cpu else batch
    layout = choose_layout(problem.logits)
    flat = (min(size, batch) * n * m,)
    buffers = [
        problem.logits.new_empty(flat if needed else (0,), dtype=problem.compute_dtype)
        for needed in (_needs_copy(problem, layout), True, layout.needs_scratch(max(n, m)), backward)
    ]
    for start in range(0, batch, max(size, 1)):
        where = slice(start, min(start + size, batch))
        chunk = _load(problem, layout, where, buffers)
        wild = _wild(chunk, problem) if on_cpu else None
        if wild is None or bool(wild.all()):
            yield Part(where, chunk, None)
        elif bool(wild.any()):
            yield Part(where, _tame(chunk, problem), ~wild)
            yield Part(where, chunk, wild)
        else:
            yield Part(where, _tame(chunk, problem), None)


def _needs_copy(problem: Problem, layout: Layout) -> bool:
    """Whether S cannot be the logits themselves."""
    return layout is BatchLast or problem.logits.dtype != problem.compute_dtype


def _wild(chunk: Chunk, problem: Problem) -> Tensor:
    """(B,): where not all that ``sweeps`` asks of a tame matrix holds."""
    dims = (chunk.layout.rows, chunk.layout.cols)
    spread = chunk.S.amax(dims) - chunk.S.amin(dims)
    return ~(spread <= TAME_RANGE) | (not chunk.uniform or chunk.f0 is not None)


def _tame(chunk: Chunk, problem: Problem) -> Chunk:
    """The chunk for its tame matrices: nothing excluded, marginals constant."""
    n, m = chunk.matrix_shape
    r, c = (1.0, n / m) if problem.unit_rows else (m / n, 1.0)
    whole_r, whole_c = (chunk.S.new_full((), x).expand(old.shape) for x, old in ((r, chunk.r), (c, chunk.c)))
    return replace(chunk, r=whole_r, c=whole_c, excluded_rows=None, excluded_cols=None, tame=True)


def _load(problem: Problem, layout: Layout, part: slice, buffers: list[Tensor]) -> Chunk:
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
    row, col = (None if x is None else layout.vector(x[part]) for x in (problem.row_marginal, problem.col_marginal))
    if problem.mask is not None:
        S = S.masked_fill(~layout.matrix(problem.mask[part]), -torch.inf)
    for marginal, spread in ((row, layout.down), (col, layout.across)):
        if marginal is not None:
            S = S.masked_fill(spread(marginal == 0), -torch.inf)
    r, c, out_r, out_c = _marginals(S, row, col, layout, problem.unit_rows)
    f0 = None if problem.f0 is None else torch.where(r == 0, 0.0, layout.vector(problem.f0[part]))
    return Chunk(layout, S, K, W, scratch, r, c, out_r, out_c, f0, row is None and col is None, tame=False)


def _marginals(
    S: Tensor, row: Tensor | None, col: Tensor | None, at: Layout, unit_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r and c, 0 on excluded lines, and the indicators of those lines."""
    valid = ~S.isneginf()
    rows, cols = valid.any(at.cols), valid.any(at.rows)
    n_rows, n_cols = (x.sum(at.line, keepdim=True).clamp_(min=1).to(S.dtype) for x in (rows, cols))
    if row is not None:
        total = (row * rows).sum(at.line, keepdim=True)
    elif col is not None:
        total = (col * cols).sum(at.line, keepdim=True)
    else:
        total = n_rows if unit_rows else n_cols
    r = torch.where(rows, total / n_rows if row is None else row, 0.0)
    c = torch.where(cols, total / n_cols if col is None else col, 0.0)
    return r, c, (~rows).to(S.dtype), (~cols).to(S.dtype)
