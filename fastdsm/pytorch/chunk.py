"""Cutting a batch into cache-sized chunks, and loading one: scaled, masked, with its marginals."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..problem import Problem
from .layout import BatchLast, Layout, choose_layout
from .sweeps import Chunk

# Entries per chunk, so that K and its temporaries stay in cache; the backward also holds 2 T (n + m) vectors.
_FORWARD_ENTRIES = 1 << 18
_BACKWARD_ENTRIES = 1 << 16


def chunks(problem: Problem, backward: bool) -> Iterator[tuple[slice, Chunk]]:
    """Each part of the batch with its loaded chunk; on an accelerator the whole batch is one."""
    batch, n, m = problem.logits.shape
    size = batch
    if problem.logits.device.type == "cpu":
        size = max((_BACKWARD_ENTRIES if backward else _FORWARD_ENTRIES) // (n * m), 2)
    layout = choose_layout(problem.logits)
    buffers = problem.logits.new_empty((2, min(size, batch) * n * m), dtype=problem.compute_dtype)
    for start in range(0, batch, max(size, 1)):
        part = slice(start, min(start + size, batch))
        yield part, _load(problem, layout, part, buffers)


def _load(problem: Problem, layout: Layout, part: slice, buffers: Tensor) -> Chunk:
    dtype = problem.compute_dtype
    S = layout.matrix(problem.logits[part])
    if layout is BatchLast:
        S = S.contiguous()
    S = S.to(dtype)
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
    K, scratch = (buffer[: S.numel()].view(S.shape) for buffer in buffers)
    f0 = None if problem.f0 is None else layout.vector(problem.f0[part])
    uniform = row is None and col is None
    if uniform and S.device.type == "cpu" and bool(S.amin() > -torch.inf):
        n, m = S.shape[layout.rows], S.shape[layout.cols]
        r, c = (1.0, n / m) if problem.unit_rows else (m / n, 1.0)
        shapes = (S.select(layout.cols, 0).shape, S.select(layout.rows, 0).shape)
        whole_r, whole_c = (S.new_full((), x).expand(shape) for x, shape in zip((r, c), shapes, strict=True))
        return Chunk(layout, S, K, scratch, whole_r, whole_c, None, None, f0, uniform)
    r, c, out_r, out_c = _marginals(S, row, col, layout, problem.unit_rows)
    if f0 is not None:
        f0 = torch.where(r == 0, 0.0, f0)
    return Chunk(layout, S, K, scratch, r, c, out_r, out_c, f0, uniform)


def _marginals(
    S: Tensor, row: Tensor | None, col: Tensor | None, at: Layout, unit_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r and c, 0 on excluded lines, and the indicators of those lines."""
    valid = S != -torch.inf
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
