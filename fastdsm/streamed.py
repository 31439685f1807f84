"""Sinkhorn attention that never stores its matrix: the sweeps and their exact adjoint, on the passes a backend provides.

A pass recomputes the logits S tile by tile. The side whose lines are exact at the end is called *last* (the query's for
first="col"), the other *first*; masses: 1 for each query line, (valid queries) / (valid keys) for each key line. A sweep is

    first <- log mass - LSE(S + last);   last <- log mass - LSE(S + first)

whose second half goes together with the product by the value in the final sweep, and with the first half of the next
sweep where a backend can hold a line whole: one pass a sweep. From the second sweep on the old
potential keeps exp(S + first + last) within the factor b = max(N, M) of the masses: no maximum is needed.

The adjoint takes dP = grad_out value^T (dropout's factors included) to dS. With A_t = exp(S + last_t + first_t),
B_t = exp(S + last_(t-1) + first_t), and d_last, d_first the line sums of P * dP:

    for t = T..1:  alpha = d_last / mass;      dS -= A_t * (alpha 1^T);  d_first -= A_t^T alpha
                   beta = d_first / mass;      dS -= B_t * (1 beta^T);   d_last = -B_t beta;  d_first = 0

A_t and B_t are P times a rank-one matrix: 2 T vectors a side carry all of it into one last pass. The factors
exp(last_t - last_T) stay within b^(T - t): beyond ``_LOG_RANGE`` nats the terms are referred to another sweep's potentials,
and B_1, which starts from arbitrary potentials, always is.

Potentials of large logits are large numbers, and rounding them, or S plus one of them, errs by more than a line sum may. So
the driver keeps them in float64, passes return sums in float64, and a pass gets a potential as a base, that of the first
sweep, and what has been added to it since. The base's rounding is then one and the same in every pass, a change of S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .problem import Attention, Dropout, Potentials, Terms

_LOG_RANGE = 60.0  # float32 ends at 88 nats; products with alpha and beta need some of it
_BLOCK_ENTRIES = 1 << 22


class Passes(Protocol):
    """What streams over the logits; ``over`` "cols" sums over the keys for each query, "rows" the other way round."""

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

    The first side starts without a potential: slot 0 holds what rounding added to its first one. residual (B, H), 0 where it
    was not asked for; sweeps (B, H) int32.
    """

    f: Tensor
    g: Tensor
    residual: Tensor
    sweeps: Tensor


def slots(sweeps: Sweeps) -> int:
    """K of :class:`State`."""
    return sweeps.n_iters + 1 if sweeps.keep else 1


@dataclass(frozen=True)
class _Potential:
    """One side's, exact in float64, and as the passes see it in the compute dtype: a base, and what has been added to it."""

    exact: Tensor
    base: Tensor
    fine: Tensor

    @classmethod
    def on(cls, base: Tensor, exact: Tensor) -> _Potential:
        """The exact one on a base."""
        return cls(exact, base, (exact - base).to(base.dtype))


def _seen(sweeps: Sweeps, last: _Potential, first: _Potential) -> Potentials:
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
    last, first = _by_side(state.f, state.g, sweeps)
    over_last, over_first = ("cols", "rows") if sweeps.columns_first else ("rows", "cols")
    last_mass, first_mass = _by_side(*_log_masses(problem), sweeps)
    active = torch.ones_like(state.sweeps, dtype=torch.bool)
    state.sweeps.fill_(min(sweeps.n_iters, 1) if sweeps.tol >= 0 else sweeps.n_iters)
    dtype = problem.compute_dtype
    zero_last, zero_first = (torch.zeros_like(x[:, :, 0], dtype=dtype) for x in (last, first))
    x, y = _Potential(zero_last.double(), zero_last, zero_last), _Potential(zero_first.double(), zero_first, zero_first)
    line, other = torch.empty_like(x.exact), torch.empty_like(y.exact)
    fused = sweeps.columns_first and value is not None and out is not None
    if sweeps.keep:
        last[:, :, 0], first[:, :, 0] = x.exact, y.exact

    both = False  # whether the last pass has left what the next half sweep needs
    for t in range(1, sweeps.n_iters + 1):
        if not both:
            passes.lse(problem, over_first, _seen(sweeps, x, y), t == 1, other, active)
        exact = _normalised(y.exact, other, first_mass)
        if sweeps.tol >= 0 and t > 1:
            active = active & ~(_relative(y.exact, exact) <= sweeps.tol)
            state.sweeps += active
            exact = torch.where(active.unsqueeze(-1), exact, y.exact)
        if t == 1:
            # Without a fine part, which would be rounded away next to S + y as long as the last side has no base.
            base = exact.to(dtype)
            y = _Potential(base.double(), base, zero_first)
            if sweeps.keep:
                first[:, :, 0] = y.exact - exact
        else:
            y = _Potential.on(y.base, exact)
        if fused and t == sweeps.n_iters:
            break
        now = _seen(sweeps, x, y)
        both = t < sweeps.n_iters and passes.sweep(problem, over_last, now, t == 1, line, other, active)
        if both:
            other += last_mass
        else:
            passes.lse(problem, over_last, now, t == 1, line, active)
        exact = _normalised(x.exact, line, last_mass)
        if t == 1:
            x = _Potential.on(exact.to(dtype), exact)
        else:
            x = _Potential.on(x.base, exact if sweeps.tol < 0 else torch.where(active.unsqueeze(-1), exact, x.exact))
        if sweeps.keep:
            last[:, :, t], first[:, :, t] = x.exact, y.exact
    if fused or sweeps.n_iters == 0:
        now, online = _seen(sweeps, x, y), sweeps.n_iters <= 1
        if fused:
            assert value is not None
            assert out is not None
            passes.attend(problem, now, online, value, dropout, out, line)
        else:
            passes.lse(problem, over_last, now, True, line)
        exact = _normalised(x.exact, line, last_mass)
        x = _Potential.on(exact.to(dtype) if online else x.base, exact)
    now = _seen(sweeps, x, y)
    last[:, :, -1], first[:, :, -1] = x.exact, y.exact
    if out is not None and value is not None and not fused:
        passes.apply(problem, "cols", now, value, dropout, out)
    if residual:
        passes.lse(problem, over_first, now, False, other)
        state.residual.copy_(_relative(y.exact, _normalised(y.exact, other, first_mass)))
    else:
        state.residual.zero_()


def final_potentials(problem: Attention, sweeps: Sweeps, state: State) -> Potentials:
    """Those of the plan."""
    ends = (x[:, :, -1] for x in _by_side(state.f, state.g, sweeps))
    return _seen(sweeps, *(_Potential.on(x.to(problem.compute_dtype), x) for x in ends))


def _normalised(potential: Tensor, lse: Tensor, log_mass: Tensor) -> Tensor:
    """The potential that gives lines whose log-sum is ``lse`` their mass; 0 on empty lines."""
    return torch.where(lse == -torch.inf, 0.0, potential + log_mass - lse)


def _relative(potential: Tensor, normalising: Tensor) -> Tensor:
    """Largest relative error (B, H) of line sums that ``normalising`` would put right."""
    return torch.expm1(potential - normalising).abs().amax(-1)


def _log_masses(problem: Attention) -> tuple[Tensor, Tensor]:
    """Log mass (B or 1, H or 1, 1) of a query line and of a key line that takes part."""
    if all(x is None for x in (problem.mask, problem.bias, problem.query_padding, problem.key_padding)):
        one = problem.query.new_zeros((1, 1, 1), dtype=torch.float64)
        return one, torch.full_like(one, math.log(problem.query.shape[2] / problem.key.shape[2]))
    queries, keys = valid_lines(problem)
    counts = [x.sum(-1, keepdim=True).clamp(min=1).double() for x in (queries, keys)]
    return torch.zeros_like(counts[0]), (counts[0] / counts[1]).log()


def valid_lines(problem: Attention) -> tuple[Tensor, Tensor]:
    """Which query lines (B or 1, H or 1, N) and which key lines (B or 1, H or 1, M) have an entry that takes part."""
    N, M = problem.query.shape[2], problem.key.shape[2]
    like = problem.query.new_ones((1, 1, 1), dtype=torch.bool)
    queries = like.expand(1, 1, N) if problem.query_padding is None else ~problem.query_padding[:, None, :]
    keys = like.expand(1, 1, M) if problem.key_padding is None else ~problem.key_padding[:, None, :]
    if problem.mask is None and problem.bias is None:
        some = (keys.any(-1, keepdim=True), queries.any(-1, keepdim=True))
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
    return torch.cat(rows, -1), cols


def _unexpanded(x: Tensor) -> Tensor:
    """``x`` with the batch and head dimensions it is merely expanded over cut to one."""
    for dim in (0, 1):
        if x.stride(dim) == 0:
            x = x.narrow(dim, 0, min(1, x.shape[dim]))
    return x


@dataclass(frozen=True)
class AttentionGradients:
    """Where a backward writes; ``bias`` of the shape the bias has without the dimensions it is expanded over, or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


def of_one_line(problem: Attention, sweeps: Sweeps) -> bool:
    """Whether the marginals alone determine the plan: its derivative is zero, not the rounding of terms that cancel."""
    return sweeps.n_iters > 0 and 1 in (problem.query.shape[2], problem.key.shape[2])


def attention_backward(
    passes: Passes,
    problem: Attention,
    value: Tensor,
    sweeps: Sweeps,
    dropout: Dropout | None,
    grad_out: Tensor,
    state: State,
    gradients: AttentionGradients,
    implicit: bool,
) -> None:
    """Fill ``gradients`` from the kept potentials."""
    dtype = problem.compute_dtype
    last, first = _by_side(state.f, state.g, sweeps)
    end = last.shape[2] - 1
    start = _Potential.on(last[:, :, 0].to(dtype), last[:, :, 0])
    last_slots, first_slots = (_slots(x, x[:, :, min(1, end)].to(dtype)) for x in (last, first))

    def at(t: int, s: int) -> Potentials:
        """exp(S + last_t + first_s)."""
        return _seen(sweeps, start if t == 0 < end else last_slots[t], first_slots[s])

    plan = at(end, end)
    d_value = torch.empty_like(value, dtype=dtype)
    passes.apply(problem, "rows", plan, grad_out, dropout, d_value)
    gradients.value.copy_(d_value)
    del d_value
    targets = {"query": gradients.query, "key": gradients.key, "bias": gradients.bias}
    if of_one_line(problem, sweeps):
        for target in targets.values():
            if target is not None:
                target.zero_()
        return
    d_query, d_key = torch.empty_like(plan.f_fine), torch.empty_like(plan.g_fine)
    passes.products(problem, "cols", plan, value, grad_out, dropout, d_query)
    passes.products(problem, "rows", plan, value, grad_out, dropout, d_key)
    d_last, d_first = _by_side(d_query, d_key, sweeps)
    terms = (_implicit_terms if implicit else _unrolled_terms)(passes, problem, sweeps, state, at, d_last, d_first)
    for which, target in targets.items():
        if target is not None:
            passes.gradient(problem, which, terms, value, grad_out, dropout, target)


def _slots(exact: Tensor, base: Tensor) -> list[_Potential]:
    """A side's potentials (B, H, K, lines), slot by slot on one base."""
    fine = (exact - base.unsqueeze(2)).to(base.dtype).movedim(2, 0).contiguous()
    return [_Potential(x, base, y) for x, y in zip(exact.unbind(2), fine, strict=True)]


def _by_side(query: Tensor, key: Tensor, sweeps: Sweeps) -> tuple[Tensor, Tensor]:
    """The last side's and the first's, of a query's and a key's; and back."""
    return (query, key) if sweeps.columns_first else (key, query)


def weighed(passes: Passes, problem: Attention, over: str, at: Potentials, w: Tensor) -> Tensor:
    """P w (B, H, N) over "cols", or P^T w (B, H, M) over "rows"."""
    out = torch.empty_like(at.g_base if over == "rows" else at.f_base)
    passes.weigh(problem, over, at, w.contiguous(), out)
    return out


def _weighed(passes: Passes, problem: Attention, sweeps: Sweeps, at: Potentials, w: Tensor, to_first: bool) -> Tensor:
    """The same by sides: exp(S + last + first), or its transpose (``to_first``), times w."""
    return weighed(passes, problem, "rows" if to_first == sweeps.columns_first else "cols", at, w)


def centred(x: Tensor, valid: Tensor) -> Tensor:
    """x (B, H, lines) less its mean over the valid lines, 0 elsewhere."""
    x = torch.where(valid, x, 0.0)
    mean = x.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(valid, x - mean, 0.0)


def _masses(problem: Attention, sweeps: Sweeps) -> tuple[Tensor, Tensor]:
    """Masses of a line of the last side and of the first, compute dtype."""
    query, key = (x.exp().to(problem.compute_dtype) for x in _log_masses(problem))
    return _by_side(query, key, sweeps)


def _unrolled_terms(
    passes: Passes,
    problem: Attention,
    sweeps: Sweeps,
    state: State,
    at: Callable[[int, int], Potentials],
    d_last: Tensor,
    d_first: Tensor,
) -> Terms:
    """The adjoint of the module's docstring."""
    last, first = _by_side(state.f, state.g, sweeps)
    last_mass, first_mass = _masses(problem, sweeps)
    final = sweeps.n_iters
    reach = max(int(_LOG_RANGE / math.log(max(problem.query.shape[2], problem.key.shape[2], 2))), 1)
    done = state.sweeps.unsqueeze(-1)
    segments: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def take(reference: tuple[int, int], t: int, s: int, x: Tensor | None, y: Tensor | None) -> None:
        """Record exp(S + last_t + first_s) times x y^T (None: ones), in terms of the potentials of ``reference``."""
        left = (last[:, :, t] - last[:, :, reference[0]]).exp().to(problem.compute_dtype)
        right = (first[:, :, s] - first[:, :, reference[1]]).exp().to(problem.compute_dtype)
        pair = (left if x is None else x * left, right if y is None else y * right)
        segments.setdefault(reference, []).append(pair)

    if final == 0:
        take((0, 0), 0, 0, d_last / last_mass, None)
    for t in range(final, 0, -1):
        step = final - (final - t) // reach * reach
        active = done >= t
        alpha = torch.where(active, d_last / last_mass, 0.0)
        take((step, step), t, t, alpha, None)
        d_first = d_first - _weighed(passes, problem, sweeps, at(t, t), alpha, to_first=True)
        sums = first_mass if t > 1 else first_mass * first[:, :, 0].exp().to(first_mass.dtype)
        beta = torch.where(active, d_first / sums, 0.0)
        take((step, step) if t > 1 else (0, 1), t - 1, t, None, beta)
        if t > 1:
            d_last = torch.where(active, -_weighed(passes, problem, sweeps, at(t - 1, t), beta, to_first=False), d_last)
            d_first = torch.where(active, 0.0, d_first)
    pairs = [pair for group in segments.values() for pair in group]
    left, right = (torch.stack(vectors, 2) for vectors in zip(*pairs, strict=True))
    counts = [len(group) for group in segments.values()]
    return Terms(at(final, final), [at(*reference) for reference in segments], *_by_side(left, right, sweeps), counts)


def _implicit_terms(
    passes: Passes,
    problem: Attention,
    sweeps: Sweeps,
    state: State,
    at: Callable[[int, int], Potentials],
    d_last: Tensor,
    d_first: Tensor,
) -> Terms:
    """Right at the fixed point: mass alpha + P beta = d_last, P^T alpha + mass beta = d_first, by conjugate gradients.

    Without alpha, (I - P^T P / (masses)) beta = (d_first - P^T d_last / last mass) / first mass: positive semi-definite,
    with the constants as null space, which the right side has no part in. At most ``n_iters`` steps, fewer where a head is
    done: as the sweeps, they converge the faster the smaller sigma_2 is.
    """
    end = state.f.shape[2] - 1
    plan = at(end, end)
    last_mass, first_mass = _masses(problem, sweeps)
    valid = _by_side(*valid_lines(problem), sweeps)[1].expand(d_first.shape)

    def product(x: Tensor, to_first: bool) -> Tensor:
        return _weighed(passes, problem, sweeps, plan, x, to_first)

    rest = centred((d_first - product(d_last / last_mass, True)) / first_mass, valid)
    beta, direction = torch.zeros_like(rest), rest
    square = rest.square().sum(-1, keepdim=True)
    enough = square * torch.finfo(rest.dtype).eps ** 2
    for _ in range(sweeps.n_iters):
        active = square > enough
        if active.device.type == "cpu" and not bool(active.any()):
            break
        image = centred(direction - product(product(direction, False) / last_mass, True) / first_mass, valid)
        step = torch.where(active, square / (direction * image).sum(-1, keepdim=True), 0.0)
        beta, rest = beta + step * direction, rest - step * image
        new_square = rest.square().sum(-1, keepdim=True)
        direction = rest + torch.where(active, new_square / square, 0.0) * direction
        square = new_square
    alpha = (d_last - product(beta, False)) / last_mass
    left, right = torch.stack([alpha, torch.ones_like(alpha)], 2), torch.stack([torch.ones_like(beta), beta], 2)
    return Terms(plan, [plan], *_by_side(left, right, sweeps), [2])
