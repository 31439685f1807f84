"""Sinkhorn sweeps in the scaling domain with log-domain safety, on one cache-sized chunk of a batch.

After a first sweep, K = exp(S + f + g) has exact row sums, and every later sweep multiplies: v <- c / (K^T u),
u <- r / (K v), P = diag(u) K diag(v). How a matrix gets there and how long it may go on depends on that matrix alone, so
that no neighbour in the batch changes a bit of it.

*Tame*: uniform marginals, no f0, nothing excluded, and D = max S - min S <= 20 nats. log-sum-exp moves by no
more than its arguments, hence f_t and g_t spread over at most D each after any step. K has row sums r, and entries of a
row differ by at most e^(2D), so none is below r e^(-2D) / m: float32 drops nothing. log u_t spreads over at most 2 D, and
its mean (weighted by r; v likewise) never falls and rises by no more than the dual objective can, KL(P* | K) <= 2 D + log m.
So |log u|, |log v| <= 4 D + log m, which float32 holds. One K serves all sweeps, whatever their number. Where it need not serve
more than the R below after the first, D may be 60: entries of exp(S - top) are e^-60 or more, those of K are so over n m, which
float32 does not drop, and the factors stay within 2^45.

*Wild*, everything else: the first sweep takes maxima out twice, and K is rebuilt in time. A column sum K^T 1 of a matrix
with row sums r lies between c_j / b and c_j b, b = max(total / min r, total / min c, 2) of the larger total, which is
max(n, m) for uniform marginals; so one sweep multiplies u and v by factors within [1/b, b]. An entry that float32 dropped
from K (below 2^-126) is at most 2^-126 max(u) max(v) in P, thus at most 2^-36 for R = floor(45 / log2 b) sweeps (one less
for uneven marginals); then f += log u, g += log v and K = exp(S + f + g) is rebuilt from the logits. R = 0: every sweep in
the log domain.

float64 ends at 2^-1022: 150 nats are tame, 400 where sweeps are few, and R = floor(470 / log2 b) drops no more than 2^-82.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Layout
from .ring import Ring


class Reach(NamedTuple):
    """What a dtype's exponents allow: nats of tame logits, of those swept few times, and bits that factors may grow by."""

    tame: float
    few: float
    gain: float


REACH = {torch.float32: Reach(20.0, 60.0, 45.0), torch.float64: Reach(150.0, 400.0, 470.0)}
AT_ONCE = 2  # sweeps whose v a backward computes again in one go, where it is not kept


@dataclass
class Segment:
    """Consecutive sweeps that share one K = exp(S + f + g).

    ``u``: row factors in this K's gauge, first those the segment's first column step started from, then those after each
    of its sweeps; ``v``: column factors after each of its sweeps, empty where they are not kept: v_t = c / (K^T u_(t-1)).
    """

    f: Tensor
    g: Tensor
    u: list[Tensor]
    v: list[Tensor]


@dataclass
class Tame:
    """What all tame matrices of a chunk have in common, r and c, and the largest logit of each."""

    r: float
    c: float
    top: Tensor


@dataclass
class Vectors:
    """Where row and column vectors come from: those of a history, or two where none is kept; those of the adjoint's terms.

    ``weights``: what contractions take for each of these vectors, by its id.
    """

    history: tuple[Ring, Ring]
    waiting: tuple[Ring, Ring]
    weights: dict[int, Any]


@dataclass
class Chunk:
    """Some matrices of a problem, in one layout.

    S is -inf on excluded entries; r, c are 0 on excluded lines, where the ``excluded`` indicators are 1; None: no line is.
    ``K``, ``W`` (backward), ``scratch`` (some layouts) and ``room`` (a while) are buffers of S's shape, else empty;
    ``operands`` are K as contractions want it; ``tame``: whether this is a pass for those.
    """

    layout: Layout
    S: Tensor
    K: Tensor
    W: Tensor
    scratch: Tensor
    room: Tensor
    operands: tuple[Any, Any]
    vectors: Vectors
    r: Tensor
    c: Tensor
    excluded_rows: Tensor | None
    excluded_cols: Tensor | None
    f0: Tensor | None
    uniform: bool
    tame: Tame | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.S.shape[self.layout.rows], self.S.shape[self.layout.cols]

    def set_kernel(self, f: Tensor, g: Tensor) -> None:
        """K = exp(S + f + g)."""
        at = self.layout
        torch.add(self.S, at.down(f), out=self.K).add_(at.across(g)).exp_()
        at.refresh(self.K, self.scratch)

    def col_sums(self, u: Tensor, out: Tensor) -> Tensor:
        """K^T u, perhaps in ``out``."""
        return self._contract(self.operands[0], u, out)

    def row_sums(self, v: Tensor, out: Tensor) -> Tensor:
        """K v, likewise."""
        return self._contract(self.operands[1], v, out)

    def _contract(self, operand: Any, x: Tensor, out: Tensor) -> Tensor:
        weights = self.vectors.weights.get(id(x))
        return self.layout.contract(operand, self.layout.weights(x) if weights is None else weights, self.scratch, out)

    def next_v(self, u: Tensor) -> Tensor:
        """v = c / (K^T u)."""
        out = self.vectors.history[1].take()
        return self.col_factor(self.col_sums(u, out), out)

    def next_u(self, v: Tensor) -> Tensor:
        """u = r / (K v)."""
        out = self.vectors.history[0].take()
        return self.row_factor(self.row_sums(v, out), out)

    def row_factor(self, sums: Tensor, out: Tensor) -> Tensor:
        """out = r / sums, 0 on excluded rows."""
        if self.tame:
            return _times(torch.reciprocal(sums, out=out), self.tame.r)
        return torch.div(self.r, sums if self.excluded_rows is None else sums + self.excluded_rows, out=out)

    def col_factor(self, sums: Tensor, out: Tensor) -> Tensor:
        """out = c / sums, 0 on excluded columns."""
        if self.tame:
            return _times(torch.reciprocal(sums, out=out), self.tame.c)
        return torch.div(self.c, sums if self.excluded_cols is None else sums + self.excluded_cols, out=out)

    def over_r(self, x: Tensor) -> Tensor:
        """x / r, 0 / 0 = 0 on excluded rows."""
        if self.tame:
            return x if self.tame.r == 1.0 else x / self.tame.r
        return x / (self.r if self.excluded_rows is None else self.r + self.excluded_rows)

    def over_c(self, x: Tensor) -> Tensor:
        """x / c, 0 / 0 = 0 on excluded columns."""
        if self.tame:
            return x if self.tame.c == 1.0 else x / self.tame.c
        return x / (self.c if self.excluded_cols is None else self.c + self.excluded_cols)

    def forgotten_v(self, u: list[Tensor]) -> Iterator[Tensor]:
        """The v of each u, the last first, where no history holds them; overwritten when others are asked for."""
        rows, cols = self.vectors.history
        for end in range(len(u), 0, -AT_ONCE):
            some = rows.together(u[max(end - AT_ONCE, 0) : end])
            out = cols.last(len(some))
            yield from reversed(self.col_factor(self.col_sums(some, out), out).unbind(0))

    def column_error(self, v: Tensor, sums: Tensor) -> Tensor:
        """Residual (B,): largest |v_j sums_j / c_j - 1| over the columns that take part, sums = K^T u."""
        if self.excluded_cols is not None:
            return ((v * sums + self.excluded_cols) / (self.c + self.excluded_cols) - 1.0).abs().amax(self.layout.line)
        return (v * sums / self.c - 1.0).abs().amax(self.layout.line)


@dataclass
class Swept:
    """Where the sweeps ended: P = diag(u) K diag(v), K the chunk's, with potentials ``f``, ``g``; ``sweeps`` (B,) int32.

    ``poison`` (B,): NaN for a matrix with NaN or +inf among its logits, else 0; None if none can be, as among the tame.
    """

    u: Tensor
    v: Tensor
    f: Tensor
    g: Tensor
    sweeps: Tensor
    poison: Tensor | None
    segments: list[Segment]

    def poisoned_u(self, at: Layout) -> Tensor:
        """U, NaN in a matrix that is to be NaN."""
        return self.u if self.poison is None else self.u + at.scalar(self.poison)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x.mul_(factor)


def log_of(x: Tensor) -> Tensor:
    """Log x, 0 where x is 0 (an excluded line)."""
    return torch.where(x == 0, 0.0, x.log())


def _shifted_exp(x: Tensor, dim: int, out: Tensor) -> Tensor:
    """out = exp(x - top); top, the maximum along ``dim`` (0 for lines of -inf only), is returned."""
    top = x.amax(dim)
    top = top.masked_fill_(top == -torch.inf, 0.0)
    torch.sub(x, top.unsqueeze(dim), out=out).exp_()
    return top


def _row_step(chunk: Chunk, shifted: Tensor) -> tuple[Tensor, Tensor]:
    """From S + g: K with row sums r; returned are its row potential and the largest entry of S + g per row."""
    at = chunk.layout
    top = _shifted_exp(shifted, at.cols, chunk.K)
    sums = at.sums(chunk.K, at.cols)
    f = torch.where(chunk.r == 0, 0.0, log_of(chunk.r) - sums.log() - top)
    chunk.K.mul_(at.down(chunk.row_factor(sums, sums)))
    return f, top


def _tame_sweep(chunk: Chunk, top: Tensor, potentials: bool) -> tuple[Segment, Tensor]:
    """The first sweep of tame matrices, with one exponential per entry: sets K; its segment (f, g: 0 if unwanted), and v."""
    at, K, (rows, cols) = chunk.layout, chunk.K, chunk.vectors.history
    torch.sub(chunk.S, at.across(top), out=K).exp_()
    sums = at.sums(K, at.rows, cols.take())
    v = chunk.col_factor(sums, sums)
    before = at.sums(K.mul_(at.across(v)), at.cols, rows.take())
    u = chunk.row_factor(before, rows.take())
    K.mul_(at.down(u))
    at.refresh(K, chunk.scratch)
    f, g = (u.log(), v.log() - top) if potentials else (u.new_zeros(()), u.new_zeros(()))
    return Segment(f, g, [chunk.over_r(before), u.fill_(1.0)], [v] * at.keeps_v), v.fill_(1.0)


def _log_sweep(chunk: Chunk, f: Tensor) -> tuple[Segment, Tensor, Tensor]:
    """One sweep in the log domain from row potential f: sets K; its segment, v, and the largest S + f per column.

    Potentials of large logits are rounded by more than a plan's sums may err, so the sweep is done once more in their
    gauge: u and v, both near 1, carry what the rounding took.
    """
    at, c, K = chunk.layout, chunk.c, chunk.K
    top = _shifted_exp(torch.add(chunk.S, at.down(f), out=K), at.rows, K)
    g = torch.where(c == 0, 0.0, log_of(c) - at.sums(K, at.rows).log() - top)
    f_new, _ = _row_step(chunk, torch.add(chunk.S, at.across(g), out=K))
    chunk.set_kernel(f_new, g)
    before = torch.where(chunk.r == 0, 0.0, (f - f_new).exp())
    v = chunk.next_v(before)
    return Segment(f_new, g, [before, chunk.next_u(v)], [v] * at.keeps_v), v, top


def tame_range(n_iters: int, n: int, m: int, dtype: torch.dtype) -> float:
    """Up to how many nats between the logits of a matrix one K serves so many sweeps in ``dtype``."""
    return REACH[dtype].few if n_iters - 1 <= _uniform_sweeps(n, m, dtype) else REACH[dtype].tame


def _uniform_sweeps(n: int, m: int, dtype: torch.dtype) -> int:
    """R for uniform marginals."""
    return int(REACH[dtype].gain / math.log2(max(n, m, 2)))


def _sweeps_per_kernel(chunk: Chunk, n_iters: int) -> int:
    """How many scaling sweeps one K serves: all, R, or 0 where every sweep is in the log domain."""
    if chunk.tame:
        return n_iters
    if chunk.uniform:
        return _uniform_sweeps(*chunk.matrix_shape, chunk.S.dtype)
    if chunk.S.device.type != "cpu":
        return 0  # looking at the marginals would stall the host
    gain, line = 2.0, chunk.layout.line
    total = torch.maximum(chunk.r.sum(line), chunk.c.sum(line))  # of lines that take part, where they may differ under a mask
    for x in (chunk.r, chunk.c):
        least = x.masked_fill(x == 0, math.inf).amin(line)
        gain = max(gain, float((total / least).nan_to_num_(nan=math.inf).amax()))
    return max(int(REACH[chunk.S.dtype].gain / math.log2(gain)) - 1, 0)


def run(
    chunk: Chunk,
    n_iters: int,
    tol: float = -1.0,
    record: bool = False,
    potentials: bool = False,
    stops: Tensor | None = None,
) -> Swept:
    """``n_iters`` sweeps, each matrix stopping at residual <= tol (if tol >= 0), or after its ``stops`` (B,) sweeps.

    ``record`` keeps the factors of every sweep for the adjoint; without ``potentials`` f and g may come out as 0.
    """
    at = chunk.layout
    freezing = tol >= 0.0 or stops is not None
    sure = min(n_iters, 1) if freezing else n_iters
    counts = torch.full(chunk.r.select(at.line, 0).shape, sure, dtype=torch.int32, device=chunk.r.device)
    if n_iters == 0:
        f, top = _row_step(chunk, chunk.S)
        one_u, one_v = torch.ones_like(chunk.r), torch.ones_like(chunk.c)
        return Swept(one_u, one_v, f, torch.zeros_like(chunk.c), counts, _poison(top, at), [])
    poison = None
    if chunk.tame:
        segment, v = _tame_sweep(chunk, chunk.tame.top, potentials)
    else:
        segment, v, top = _log_sweep(chunk, torch.zeros_like(chunk.r) if chunk.f0 is None else chunk.f0)
        poison = _poison(top, at)
    if freezing:  # a ring hands this vector out again for the residual, and those that stop here still need it
        v = v.clone()
        segment.v[:] = [v] * len(segment.v)
    segments = [segment]
    active = torch.ones_like(counts, dtype=torch.bool)
    left = budget = _sweeps_per_kernel(chunk, n_iters)

    for done in range(1, n_iters):
        u, sums = segment.u[-1], None
        if freezing:
            if stops is None:
                sums = chunk.col_sums(u, chunk.vectors.history[1].take())
                active = active & ~(chunk.column_error(v, sums) <= tol)
            else:
                active = stops > done
            if active.device.type == "cpu" and not bool(active.any()):
                break
            counts += active
        if left == 0:
            old, old_v, f, g, sums = segment, v, segment.f + log_of(u), segment.g + log_of(v), None
            if budget == 0:
                segment, v, _ = _log_sweep(chunk, f)
            else:
                segment, v, left = Segment(f, g, [torch.ones_like(u)], []), torch.ones_like(v), budget
            if freezing:
                segment, v = _only_active(chunk, active, segment, v, old, old_v)
            if freezing or budget > 0:
                chunk.set_kernel(segment.f, segment.g)
            segments.append(segment)
            u = segment.u[-1]
        if budget > 0:
            new_v = chunk.next_v(u) if sums is None else chunk.col_factor(sums, sums)
            new_u = chunk.next_u(new_v)
            if freezing:
                new_u, new_v = (torch.where(at.scalar(active), new, old) for new, old in ((new_u, u), (new_v, v)))
            v, left = new_v, left - 1
            segment.u.append(new_u)
            if at.keeps_v:
                segment.v.append(new_v)
        if not record:
            del segment.u[:-1], segment.v[:-1], segments[:-1]
    return Swept(segment.u[-1], v, segment.f, segment.g, counts, poison, segments)


def _only_active(
    chunk: Chunk, active: Tensor, new: Segment, new_v: Tensor, old: Segment, old_v: Tensor
) -> tuple[Segment, Tensor]:
    """The segment ``new`` and its v for the active matrices, the old ones for the others: how long some go on must not
    change a bit of those that stopped."""
    on = chunk.layout.scalar(active)
    f, g, v = (torch.where(on, x, y) for x, y in ((new.f, old.f), (new.g, old.g), (new_v, old_v)))
    return Segment(f, g, [torch.where(on, u, old.u[-1]) for u in new.u], [v] * len(new.v)), v


def _poison(top: Tensor, at: Layout) -> Tensor:
    return torch.where(top.amax(at.line) < torch.inf, 0.0, torch.nan)
