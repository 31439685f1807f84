"""Sinkhorn attention that never stores its matrix: the sweeps, on the passes a backend provides.

A pass recomputes the logits S tile by tile. The side whose lines are exact at the end is called *last* (the query's for
first="col"), the other *first*; masses: 1 for each query line, (valid queries) / (valid keys) for each key line. A sweep is

    first <- log mass - LSE(S + last);   last <- log mass - LSE(S + first)

whose second half goes together with the product by the value in the final sweep, and with the first half of the next
sweep where a backend can hold a line whole: one pass a sweep. From the second sweep on the old
potential keeps exp(S + first + last) within the factor b = max(N, M) of the masses: no maximum is needed.

Potentials of large logits are large numbers, and rounding them, or S plus one of them, errs by more than a line sum may. So
the driver keeps them in float64, passes return sums in float64, and a pass gets a potential as a base, that of the first
sweep, and what has been added to it since. The base's rounding is then one and the same in every pass, a change of S; how far
a potential counts as another than the exact one is known (``potentials.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..problem import Attention, Dropout, Potentials, Terms
from .potentials import Potential

_BLOCK_ENTRIES = 1 << 22


class Passes(Protocol):
    """What streams over the logits; ``over`` "cols" sums over the keys for each query, "rows" the other way round.

    UNIT: of the exponents they form (``potentials.py``).
    """

    UNIT: float

    def lse(
        self, problem: Attention, over: str, at: Potentials, online: bool, out: Tensor, active: Tensor | None = None
    ) -> None:
        """out (float64) <- log sum exp(S + f + g), -inf on empty lines; with a running maximum if ``online``.

        Heads that are not ``active`` (B, H) may be left as they were.
        """

    def sweep(
        self, problem: Attention, over: str, at: Potentials, online: bool, out: Tensor, other: Tensor, active: Tensor
    ) -> bool:
        """:meth:`lse`, and ``other`` (float64) <- that of the other way round once the lines of ``out`` have sum 1.

        In one pass over the logits, where that is possible: false if it is not, and nothing is done.
        """

    def attend(
        self,
        problem: Attention,
        at: Potentials,
        online: bool,
        value: Tensor,
        dropout: Dropout | None,
        out: Tensor,
        line: Tensor,
    ) -> None:
        """line (float64) <- lse over "cols"; out <- exp(S + f + g - line) value, 0 on empty lines."""

    def apply(self, problem: Attention, over: str, at: Potentials, x: Tensor, dropout: Dropout | None, out: Tensor) -> None:
        """out <- P x over "cols", or P^T x over "rows", summed over the query heads of a key head; P = exp(S + f + g)."""

    def weigh(self, problem: Attention, over: str, at: Potentials, w: Tensor, out: Tensor) -> None:
        """out <- P w, or P^T w, for one vector per head, in the compute dtype."""

    def products(
        self,
        problem: Attention,
        over: str,
        at: Potentials,
        value: Tensor,
        grad_out: Tensor,
        dropout: Dropout | None,
        out: Tensor,
    ) -> None:
        """out <- line sums of P * (grad_out value^T), for each query head, of the very products that ``gradient`` forms."""

    def gradient(
        self,
        problem: Attention,
        which: str,
        terms: Terms,
        value: Tensor,
        grad_out: Tensor,
        dropout: Dropout | None,
        out: Tensor,
    ) -> None:
        """out <- the gradient of the query, the key or the bias, from dS = P * (grad_out value^T) - terms."""


@dataclass(frozen=True)
class Sweeps:
    """How to sweep: ``n_iters``; the side exact at the end; ``tol`` >= 0 stops a head; ``keep`` every sweep's potentials."""

    n_iters: int
    columns_first: bool
    tol: float = -1.0
    keep: bool = False


@dataclass
class State:
    """Potentials f (B, H, K, N) and g (B, H, K, M), float64, after every sweep from the start on, or the last (K = 1).

    The first side starts without a potential: slot 0 holds how much more than the exact one its first one is. residual (B, H),
    0 where it was not asked for; sweeps (B, H) int32.
    """

    f: Tensor
    g: Tensor
    residual: Tensor
    sweeps: Tensor


def slots(sweeps: Sweeps) -> int:
    """K of :class:`State`."""
    return sweeps.n_iters + 1 if sweeps.keep else 1


def seen(sweeps: Sweeps, last: Potential, first: Potential) -> Potentials:
    """What passes are to see of both sides."""
    f, g = (last, first) if sweeps.columns_first else (first, last)
    return Potentials(f.base, g.base, f.fine, g.fine, sweeps.columns_first)


def attention_forward(
    passes: Passes,
    problem: Attention,
    value: Tensor | None,
    sweeps: Sweeps,
    dropout: Dropout | None,
    out: Tensor | None,
    state: State,
    residual: bool,
) -> None:
    """Fill ``out`` (B, H, N, e), if there is a value, and ``state``."""
    last, first = by_side(state.f, state.g, sweeps)
    over_last, over_first = ("cols", "rows") if sweeps.columns_first else ("rows", "cols")
    last_mass, first_mass = by_side(*log_masses(problem), sweeps)
    active = torch.ones_like(state.sweeps, dtype=torch.bool)
    state.sweeps.fill_(min(sweeps.n_iters, 1) if sweeps.tol >= 0 else sweeps.n_iters)
    unit, dtype = passes.UNIT, problem.compute_dtype
    x, y = (Potential.near(torch.zeros_like(side[:, :, 0]), unit, dtype) for side in (last, first))
    line, other = torch.empty_like(x.exact), torch.empty_like(y.exact)
    fused = sweeps.columns_first and value is not None and out is not None
    if sweeps.keep:
        last[:, :, 0], first[:, :, 0] = x.exact, y.exact

    both = False  # whether the last pass has left what the next half sweep needs
    for t in range(1, sweeps.n_iters + 1):
        if not both:
            passes.lse(problem, over_first, seen(sweeps, x, y), t == 1, other, active)
        exact = _normalised(y.counted, other, first_mass)
        if sweeps.tol >= 0 and t > 1:
            active = active & ~(_relative(problem, sweeps, y.counted, exact) <= sweeps.tol)
            state.sweeps += active
            exact = torch.where(active.unsqueeze(-1), exact, y.exact)
        if t == 1:
            # Without a fine part, which would be rounded away next to S + y as long as the last side has no base.
            y = Potential.near(exact, unit, dtype)
            if sweeps.keep:
                first[:, :, 0] = y.exact - exact
        else:
            y = y.moved(exact, unit)
        if fused and t == sweeps.n_iters:
            break
        now = seen(sweeps, x, y)
        both = t < sweeps.n_iters and passes.sweep(problem, over_last, now, t == 1, line, other, active)
        if both:
            other += last_mass
        else:
            passes.lse(problem, over_last, now, t == 1, line, active)
        exact = _normalised(x.counted, line, last_mass)
        if t == 1:
            x = Potential.near(exact, unit, dtype).moved(exact, unit)
        else:
            x = x.moved(exact if sweeps.tol < 0 else torch.where(active.unsqueeze(-1), exact, x.exact), unit)
        if sweeps.keep:
            last[:, :, t], first[:, :, t] = x.exact, y.exact
    if fused or sweeps.n_iters == 0:
        now, online = seen(sweeps, x, y), sweeps.n_iters <= 1
        if fused:
            assert value is not None
            assert out is not None
            passes.attend(problem, now, online, value, dropout, out, line)
        else:
            passes.lse(problem, over_last, now, True, line)
        exact = _normalised(x.counted, line, last_mass)
        x = (Potential.near(exact, unit, dtype) if online else x).moved(exact, unit)
    now = seen(sweeps, x, y)
    last[:, :, -1], first[:, :, -1] = x.exact, y.exact
    if out is not None and value is not None and not fused:
        passes.apply(problem, "cols", now, value, dropout, out)
    if residual:
        passes.lse(problem, over_first, now, False, other)
        state.residual.copy_(_relative(problem, sweeps, y.counted, _normalised(y.counted, other, first_mass)))
    else:
        state.residual.zero_()


def renewed(passes: Passes, problem: Attention, sweeps: Sweeps, state: State) -> State:
    """The last potentials alone, the last side's found again from the first's: lines have their mass to float64's accuracy."""
    unit, dtype = passes.UNIT, problem.compute_dtype
    x, y = (Potential.near(z[:, :, -1], unit, dtype).moved(z[:, :, -1], unit) for z in by_side(state.f, state.g, sweeps))
    line = torch.empty_like(x.exact)
    passes.lse(problem, "cols" if sweeps.columns_first else "rows", seen(sweeps, x, y), True, line)
    exact = _normalised(x.counted, line, by_side(*log_masses(problem), sweeps)[0])
    f, g = by_side(exact.unsqueeze(2), y.exact.unsqueeze(2), sweeps)
    return replace(state, f=f, g=g)


def final_potentials(passes: Passes, problem: Attention, sweeps: Sweeps, state: State) -> Potentials:
    """Those of the plan."""
    ends = (x[:, :, -1] for x in by_side(state.f, state.g, sweeps))
    return seen(sweeps, *(Potential.near(x, passes.UNIT, problem.compute_dtype).moved(x, passes.UNIT) for x in ends))


def _normalised(potential: Tensor, lse: Tensor, log_mass: Tensor) -> Tensor:
    """The potential that gives lines whose log-sum is ``lse`` their mass; 0 on empty lines."""
    return torch.where(lse == -torch.inf, 0.0, potential + log_mass - lse)


def _relative(problem: Attention, sweeps: Sweeps, potential: Tensor, normalising: Tensor) -> Tensor:
    """Largest relative error (B, H) of sums of the first side's lines that ``normalising`` would put right."""
    worst = torch.expm1(potential - normalising).abs().amax(-1)
    return worst if problem.processes is None or sweeps.columns_first else problem.processes.max(worst)


def log_masses(problem: Attention) -> tuple[Tensor, Tensor]:
    """Log mass (B or 1, H or 1, 1) of a query line and of a key line that takes part."""
    if all(x is None for x in (problem.mask, problem.bias, problem.query_padding, problem.key_padding)):
        one = problem.query.new_zeros((1, 1, 1), dtype=torch.float64)
        return one, torch.full_like(one, math.log(problem.queries / problem.key.shape[2]))
    queries, keys = valid_lines(problem)
    counts = [x.sum(-1, keepdim=True).double() for x in (queries, keys)]
    if problem.processes is not None:
        counts[0] = problem.processes.sum(counts[0])
    counts = [x.clamp(min=1) for x in counts]
    return torch.zeros_like(counts[0]), (counts[0] / counts[1]).log()


def valid_lines(problem: Attention) -> tuple[Tensor, Tensor]:
    """Which query lines (B or 1, H or 1, N) and which key lines (B or 1, H or 1, M) have an entry that takes part."""
    N, M = problem.query.shape[2], problem.key.shape[2]
    like = problem.query.new_ones((1, 1, 1), dtype=torch.bool)
    queries = like.expand(1, 1, N) if problem.query_padding is None else ~problem.query_padding[:, None, :]
    keys = like.expand(1, 1, M) if problem.key_padding is None else ~problem.key_padding[:, None, :]
    anywhere = (lambda x: x) if problem.processes is None else problem.processes.max
    if problem.mask is None and problem.bias is None:
        some = (keys.any(-1, keepdim=True), anywhere(queries.any(-1, keepdim=True)))
        return queries & some[0], keys & some[1]
    rows, cols = [], torch.zeros_like(keys)
    for start in range(0, N, max(_BLOCK_ENTRIES // max(M, 1), 1)):
        block = slice(start, start + max(_BLOCK_ENTRIES // max(M, 1), 1))
        entries = queries[:, :, block, None] & keys[:, :, None, :]
        if problem.mask is not None:
            entries = entries & _unexpanded(problem.mask)[:, :, block]
        if problem.bias is not None:
            entries = entries & (_unexpanded(problem.bias)[:, :, block] != -torch.inf)
        rows.append(entries.any(-1))
        cols = cols | entries.any(-2)
    return torch.cat(rows, -1), anywhere(cols)


def _unexpanded(x: Tensor) -> Tensor:
    """``x`` with the batch and head dimensions it is merely expanded over cut to one."""
    for dim in (0, 1):
        if x.stride(dim) == 0:
            x = x.narrow(dim, 0, min(1, x.shape[dim]))
    return x


def by_side(query: Tensor, key: Tensor, sweeps: Sweeps) -> tuple[Tensor, Tensor]:
    """The last side's and the first's, of a query's and a key's; and back."""
    return (query, key) if sweeps.columns_first else (key, query)


def weighed(passes: Passes, problem: Attention, over: str, at: Potentials, w: Tensor) -> Tensor:
    """P w (B, H, N) over "cols", or P^T w (B, H, M) over "rows"."""
    out = torch.empty_like(at.g_base if over == "rows" else at.f_base)
    passes.weigh(problem, over, at, w.contiguous(), out)
    return out


def centred(x: Tensor, valid: Tensor) -> Tensor:
    """x (B, H, lines) less its mean over the valid lines, 0 elsewhere."""
    x = torch.where(valid, x, 0.0)
    mean = x.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(valid, x - mean, 0.0)
