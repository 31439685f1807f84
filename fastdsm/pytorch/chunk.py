"""Cutting a batch into cache-sized chunks, and loading one: scaled, masked, with its marginals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .._ops.problem import Problem, doubled, part_of
from .layout import BatchLast, Layout, choose_layout, copy
from .ring import Ring
from .sweeps import AT_ONCE, Chunk, Tame, Vectors, tame_range

# Entries of a chunk by max(n, m): enough to pay for the calls, few enough for the caches and for a forward and backward that
# take less than four times the input's memory; the backward holds u of every sweep, and v where it is kept. Up to n = 16,
# vectors are so long that torch shares an operation on them between threads, each with the matrices it had before.
_FORWARD_ENTRIES = ((8, 1 << 18), (math.inf, 1 << 20))
_BACKWARD_ENTRIES = ((8, 1 << 18), (16, 700_000), (math.inf, 1 << 19))
# Of logits that float32 serves: potentials of larger ones are rounded by 1e-5 and more, and exp(-90) is a denormal number, on
# which a processor is so slow that float64 takes 0.9 to 0.3 of float32's time (normal logits of std 60; (512, 64, 64) 0.5).
_SINGLE_RANGE = 128.0
_AT_HAND = 2  # vectors of a kind that sweeps use at once


@dataclass(frozen=True)
class Part:
    """Some matrices of the batch, loaded: those at an index, or a slice, all of it or those ``chosen`` (B,).

    With ``blocks``, every B of it is (blocks, B / blocks).
    """

    where: slice | Tensor
    blocks: int | None
    chunk: Chunk
    chosen: Tensor | None = None

    def of(self, whole: Tensor) -> Tensor:
        """These matrices' lines of a tensor with one for every matrix of the batch: a view of a slice."""
        return part_of(whole, self.where, self.blocks)

    def write(self, target: Tensor, value: Tensor) -> None:
        """Copy ``value`` (batch first) to these lines of ``target``."""
        if isinstance(self.where, Tensor):
            target[self.where] = value.to(target.dtype)
            return
        kept = self.of(target)
        if self.chosen is None:
            if kept.data_ptr() != value.data_ptr():  # else it was made there
                copy(kept, value)
        else:
            chosen = self.chosen.view(*self.chosen.shape, *(1,) * (value.dim() - self.chosen.dim()))
            kept.copy_(torch.where(chosen, value, kept))


class _Memory:
    """What the pieces of a batch share, so that no page is faulted in twice; each matrix is taken at its first use."""

    def __init__(self, problem: Problem, layout: Layout, size: int, backward: bool) -> None:
        n, m = problem.logits.shape[1:]
        self._layout, self._entries = layout, size * n * m
        self._like = problem.logits.new_empty(0, dtype=problem.compute_dtype)
        self._matrices: dict[str, Tensor] = {}
        waiting = layout.waiting if backward else 0
        u, v = _AT_HAND, _AT_HAND
        if backward:
            u, v = problem.n_iters + 1, problem.n_iters if layout.keeps_v else min(problem.n_iters, AT_ONCE)
        self._vectors: dict[torch.Size, Vectors] = {}
        self._terms = self._like.new_empty(waiting * (n + m) * size)
        row_terms, col_terms = self._terms.split([waiting * n * size, waiting * m * size])
        self._lines = [
            [(u, self._like.new_empty(u * n * size)), (waiting, row_terms)],
            [(v, self._like.new_empty(v * m * size)), (waiting, col_terms)],
        ]

    def matrix(self, use: str, shape: torch.Size, share: int = 1) -> Tensor:
        """The matrix for ``use``, of (B, n, m) ``shape`` in the layout, never more than one ``share``-th of a piece."""
        if use not in self._matrices:
            self._matrices[use] = self._like.new_empty(self._entries // share)
        return self._layout.buffer(self._matrices[use], shape)

    def room(self, shape: torch.Size) -> Tensor:
        """A matrix in the place of terms that do not wait yet, empty if it does not fit."""
        fits = shape.numel() <= self._terms.numel()
        return self._layout.buffer(self._terms, shape) if fits else self._like

    def vectors(self, row: torch.Size, col: torch.Size) -> Vectors:
        """Row and column vectors of these shapes, none handed out."""
        if row not in self._vectors:
            shapes = (row, col)
            rows, cols = ([Ring(flat, count, x) for count, flat in lines] for lines, x in zip(self._lines, shapes, strict=True))
            history, waiting = zip(rows, cols, strict=True)
            every = [vector for ring in (*rows, *cols) for vector in ring]
            weights = {id(vector): self._layout.weights(vector) for vector in every}
            self._vectors[row] = Vectors(history, waiting, weights)
        vectors = self._vectors[row]
        for ring in (*vectors.history, *vectors.waiting):
            ring.rewind()
        return vectors


def parts(problem: Problem, backward: bool, target: Tensor | None = None) -> Iterator[Part]:
    """The batch in pieces. One with tame and wild matrices comes twice, or those that are fewer by themselves, then the others.

    K or W is where the piece of ``target`` (B, n, m) is to be, where that can serve. On an accelerator the batch is one piece,
    and wild: looking at values would stall the host.
    """
    batch, n, m = problem.logits.shape
    layout, on_cpu = choose_layout(problem.logits, problem.compute_dtype), problem.logits.device.type == "cpu"
    entries = next(x for side, x in (_BACKWARD_ENTRIES if backward else _FORWARD_ENTRIES) if max(n, m) <= side)
    size = _size(batch, max(entries // max(n * m, 1), 2), layout.multiple()) if on_cpu else batch
    memory = _Memory(problem, layout, size, backward)
    uniform = problem.row_marginal is None and problem.col_marginal is None
    for start in range(0, batch, max(size, 1)):
        where = slice(start, min(start + size, batch))
        blocks = layout.blocks(where.stop - where.start, max(n, m)) if on_cpu else None
        piece = problem.part(where, blocks)
        S = load(piece, layout, partial(memory.matrix, "S"))
        top = chosen = huge = None
        may_be_tame = uniform and problem.f0 is None
        if on_cpu and (may_be_tame or S.dtype == torch.float32):
            dims = (layout.rows, layout.cols)
            largest, least = S.amax(dims), S.amin(dims)
            tame = largest - least <= tame_range(problem.n_iters, n, m, S.dtype)
            if S.dtype == torch.float32:
                huge = beyond_single(S, dims, largest, least) & ~(tame & may_be_tame)
                huge = huge if bool(huge.any()) else None
            if huge is not None and bool(huge.all()):
                yield _in_float64(problem, torch.arange(where.start, where.stop), backward)
                continue
            if huge is not None:
                S = S.masked_fill(layout.whole(huge), 0.0)
                largest, tame = largest.masked_fill(huge, 0.0), tame | huge
        if on_cpu and may_be_tame:
            count = int(tame.sum())
            mixed, movable = 0 < count < tame.numel(), layout.movable(n * m * problem.compute_dtype.itemsize)
            top = largest if 2 * count >= tame.numel() or (mixed and not movable) else None
            if mixed and movable:
                few = tame if top is None else ~tame
                chosen, index = ~few, few.flatten().nonzero().squeeze(1)
                some = problem.part(index + start)
                S_some = load(some, layout, partial(memory.matrix, "S of some", share=2))
                top_some = largest.flatten()[index] if top is None else None
                yield Part(index + start, None, _chunk(some, layout, S_some, memory, backward, top_some, None))
            elif mixed:  # the wild first: a backward of the tame overwrites S
                yield Part(where, blocks, _chunk(piece, layout, S, memory, backward, None, None), ~tame)
                chosen = tame
        home = None if target is None or chosen is not None else _home(target[where], problem.compute_dtype)
        yield Part(where, blocks, _chunk(piece, layout, S, memory, backward, top, home), chosen)
        if huge is not None:
            yield _in_float64(problem, huge.flatten().nonzero().squeeze(1) + start, backward)


def beyond_single(S: Tensor, dims: tuple[int, int], largest: Tensor, least: Tensor) -> Tensor:
    """Matrices (B,) with logits beyond ``_SINGLE_RANGE``, which are to be computed in float64; ``largest``, ``least``: of S."""
    if bool(least.isneginf().any()):
        least = S.masked_fill(S.isneginf(), torch.inf).amin(dims)  # of those that take part
    return ((largest > _SINGLE_RANGE) | (least < -_SINGLE_RANGE)) & (largest < torch.inf)


def _in_float64(problem: Problem, index: Tensor, backward: bool) -> Part:
    """Some matrices in float64, by themselves, in the place of what was made of them before."""
    some = problem.part(index).map_tensors(doubled)
    layout = choose_layout(some.logits, torch.float64)
    memory = _Memory(some, layout, len(index), backward)
    S = load(some, layout, partial(memory.matrix, "S"))
    return Part(index, None, _chunk(some, layout, S, memory, backward, None, None))


def _home(piece: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The flat memory of a piece of what is to be computed, if it can hold a matrix."""
    return piece.view(-1) if piece.dtype == dtype and piece.is_contiguous() else None


def _size(batch: int, most: int, multiple: int) -> int:
    """Matrices of a piece: ``most`` rounded to a multiple, unless the last piece then is too small to pay for its calls."""
    size = math.ceil(most / multiple) * multiple
    if 0 < batch % size < size / 2:
        size = math.ceil(batch / math.ceil(batch / size) / multiple) * multiple
    return min(size, batch)


def _chunk(
    problem: Problem,
    layout: Layout,
    S: Tensor,
    memory: _Memory,
    backward: bool,
    top: Tensor | None,
    home: Tensor | None,
) -> Chunk:
    """The chunk of a piece, for its tame matrices where ``top`` (B,), their largest logits, is given."""
    shape = problem.logits.shape
    n, m = shape[-2:]
    row, col = S.select(layout.cols, 0).shape, S.select(layout.rows, 0).shape
    place = None if home is None else layout.buffer(home, shape)
    lanes = issubclass(layout, BatchLast)  # what is made there has to be copied; K of a backward is of no more use by then
    K = place if place is not None and lanes == backward else memory.matrix("K", shape)
    scratch = memory.matrix("scratch", shape) if layout.needs_scratch else S.new_empty(0)
    W = S.new_empty(0)
    if backward and top is not None and S.data_ptr() != problem.logits.data_ptr():
        W = S
    elif backward:
        W = place if place is not None and not lanes else memory.matrix("W", shape)
    store = (layout, S, K, W, scratch, memory.room(shape), layout.operands(K, scratch), memory.vectors(row, col))
    uniform = problem.row_marginal is None and problem.col_marginal is None
    if top is not None:
        r, c = (1.0, n / m) if problem.unit_rows else (m / n, 1.0)
        r_line, c_line = S.new_full((), r).expand(row), S.new_full((), c).expand(col)
        return Chunk(*store, r_line, c_line, None, None, None, uniform, Tame(r, c, layout.scalar(top)))
    lines = marginals(S, problem, layout)
    f0 = None if problem.f0 is None else torch.where(lines[0] == 0, 0.0, layout.vector(problem.f0))
    return Chunk(*store, *lines, f0, uniform)


def load(problem: Problem, layout: Layout, buffer: Callable[[torch.Size], Tensor]) -> Tensor:
    """S, -inf where excluded, which is the logits themselves where they can serve, else in the ``buffer`` for a shape."""
    S = problem.logits
    own = issubclass(layout, BatchLast) or problem.logits.dtype != problem.compute_dtype
    if own:
        S = buffer(S.shape)
        copy(layout.batch_first(S), problem.logits)
    tau = problem.temperature
    if isinstance(tau, Tensor):
        tau = layout.whole(tau)
    if isinstance(tau, Tensor) or tau != 1.0:
        S = S.div_(tau) if own else S / tau
    if problem.mask is not None:
        S = S.masked_fill(~layout.matrix(problem.mask), -torch.inf)
    for marginal, spread in ((problem.row_marginal, layout.down), (problem.col_marginal, layout.across)):
        if marginal is not None:
            S = S.masked_fill(spread(layout.vector(marginal) == 0), -torch.inf)
    return S


def marginals(S: Tensor, problem: Problem, at: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r and c, 0 on excluded lines, and the indicators of those lines."""
    row, col = (None if x is None else at.vector(x) for x in (problem.row_marginal, problem.col_marginal))
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
