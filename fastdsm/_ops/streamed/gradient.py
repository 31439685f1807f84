"""The exact adjoint of Sinkhorn attention's sweeps, on the passes a backend provides, and the implicit gradient.

The adjoint of the sweeps of ``sweeps.py`` takes dP = grad_out value^T (dropout's factors included) to dS. With
A_t = exp(S + last_t + first_t), B_t = exp(S + last_(t-1) + first_t), and d_last, d_first the line sums of P * dP:

    for t = T..1:  alpha = d_last / mass;      dS -= A_t * (alpha 1^T);  d_first -= A_t^T alpha
                   beta = d_first / mass;      dS -= B_t * (1 beta^T);   d_last = -B_t beta;  d_first = 0

Cotangents of the last potentials are added to the first d_last and d_first. The masses are the sums that lines really have
(``potentials.py``). A_t and B_t are P times a rank-one matrix: 2 T vectors a side carry all of it into one last pass. The
factors exp(last_t - last_T) stay within b^(T - t): beyond ``_LOG_RANGE`` nats the terms are referred to another sweep's
potentials, and B_1, which starts from arbitrary potentials, always is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Attention, Dropout, Potentials, Terms
from .potentials import Potential, counted
from .sweeps import Passes, State, Sweeps, by_side, centred, log_masses, seen, valid_lines, weighed

_LOG_RANGE = 60.0  # float32 ends at 88 nats; products with alpha and beta need some of it


@dataclass(frozen=True)
class AttentionGradients:
    """Where a backward writes; ``bias`` of the shape the bias has without the dimensions it is expanded over, or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Cotangents:
    """Of the attention's result (B, H, N, e), and of its potentials f (B, H, N) and g (B, H, M), compute dtype, or None."""

    out: Tensor
    f: Tensor | None = None
    g: Tensor | None = None

    @property
    def of_plan_alone(self) -> bool:
        """Whether the potentials have none."""
        return self.f is None and self.g is None


def of_one_line(problem: Attention, sweeps: Sweeps) -> bool:
    """Whether the marginals alone determine the plan: its derivative is zero, not the rounding of terms that cancel."""
    return sweeps.n_iters > 0 and 1 in (problem.queries, problem.key.shape[2])


def attention_backward(
    passes: Passes,
    problem: Attention,
    value: Tensor,
    sweeps: Sweeps,
    dropout: Dropout | None,
    given: Cotangents,
    state: State,
    gradients: AttentionGradients,
    implicit: bool,
) -> None:
    """Fill ``gradients`` from the kept potentials."""
    dtype, grad_out = problem.compute_dtype, given.out
    unit, masses = passes.UNIT, by_side(*log_masses(problem), sweeps)
    last, first = (_Side.of(x, mass, unit, dtype) for x, mass in zip(by_side(state.f, state.g, sweeps), masses, strict=True))
    end = len(last.slots) - 1
    if end > 0:
        last.slots[0] = Potential.near(torch.zeros_like(last.counted[0]), unit, dtype)
        first.sums[1] *= first.slots[0].exact.exp()

    def at(t: int, s: int) -> Potentials:
        """exp(S + last_t + first_s)."""
        return seen(sweeps, last.slots[t], first.slots[s])

    plan = at(end, end)
    d_value = torch.empty_like(value, dtype=dtype)
    passes.apply(problem, "rows", plan, grad_out, dropout, d_value)
    gradients.value.copy_(d_value)
    del d_value
    targets = {"query": gradients.query, "key": gradients.key, "bias": gradients.bias}
    if of_one_line(problem, sweeps) and given.of_plan_alone:
        for target in targets.values():
            if target is not None:
                target.zero_()
        return
    d_query, d_key = torch.empty_like(plan.f_fine), torch.empty_like(plan.g_fine)
    passes.products(problem, "cols", plan, value, grad_out, dropout, d_query)
    passes.products(problem, "rows", plan, value, grad_out, dropout, d_key)
    if not given.of_plan_alone:
        for target, more in zip((d_query, d_key), _of_potentials(problem, given, implicit), strict=True):
            target += more
    d_last, d_first = by_side(d_query, d_key, sweeps)
    if implicit:
        terms = _implicit_terms(passes, problem, sweeps, plan, last.sums[-1], first.sums[-1], d_last, d_first)
    else:
        terms = _unrolled_terms(passes, problem, sweeps, state.sweeps, last, first, at, d_last, d_first)
    for which, target in targets.items():
        if target is not None:
            passes.gradient(problem, which, terms, value, grad_out, dropout, target)


def _of_potentials(problem: Attention, given: Cotangents, implicit: bool) -> tuple[Tensor, Tensor]:
    """Cotangents of f and g, 0 on lines without a partner; of a fixed point, whose potentials are free by a constant
    (+1, -1), without their part along it."""
    lengths = problem.query.shape[2], problem.key.shape[2]
    lines = [x.expand(*problem.query.shape[:2], n) for x, n in zip(valid_lines(problem), lengths, strict=True)]
    f, g = (
        torch.zeros_like(valid, dtype=problem.compute_dtype) if x is None else torch.where(valid, x, 0.0)
        for x, valid in zip((given.f, given.g), lines, strict=True)
    )
    if not implicit:
        return f, g
    count = (lines[0].sum(-1, keepdim=True) + lines[1].sum(-1, keepdim=True)).clamp(min=1)
    mean = (f.sum(-1, keepdim=True) - g.sum(-1, keepdim=True)) / count
    return torch.where(lines[0], f - mean, 0.0), torch.where(lines[1], g + mean, 0.0)


@dataclass(frozen=True)
class _Side:
    """A side's potentials after every sweep, all on the base of the first.

    counted: (K, B, H, lines), float64. sums, the compute dtype: of lines that a potential has given their mass.
    """

    slots: list[Potential]
    counted: Tensor
    sums: Tensor

    @classmethod
    def of(cls, exact: Tensor, log_mass: Tensor, unit: float, dtype: torch.dtype) -> _Side:
        """Of potentials (B, H, K, lines) of a :class:`State`."""
        exact = exact.movedim(2, 0)
        one = Potential.near(exact[min(1, len(exact) - 1)], unit, dtype)
        fine = (exact - one.ground).to(dtype).contiguous()
        count = one.ground + counted(fine, unit)
        slots = [Potential(x, one.base, y, one.ground, z) for x, y, z in zip(exact, fine, count, strict=True)]
        return cls(slots, count, (log_mass + (count - exact)).exp().to(dtype))


def _weighed(passes: Passes, problem: Attention, sweeps: Sweeps, at: Potentials, w: Tensor, to_first: bool) -> Tensor:
    """The same by sides: exp(S + last + first), or its transpose (``to_first``), times w."""
    return weighed(passes, problem, "rows" if to_first == sweeps.columns_first else "cols", at, w)


def _unrolled_terms(
    passes: Passes,
    problem: Attention,
    sweeps: Sweeps,
    done: Tensor,
    last: _Side,
    first: _Side,
    at: Callable[[int, int], Potentials],
    d_last: Tensor,
    d_first: Tensor,
) -> Terms:
    """The adjoint of the module's docstring."""
    final = sweeps.n_iters
    reach = max(int(_LOG_RANGE / math.log(max(problem.queries, problem.key.shape[2], 2))), 1)
    done = done.unsqueeze(-1)
    segments: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def take(reference: tuple[int, int], t: int, s: int, x: Tensor | None, y: Tensor | None) -> None:
        """Record exp(S + last_t + first_s) times x y^T (None: ones), in terms of the potentials of ``reference``."""
        left = (last.counted[t] - last.counted[reference[0]]).exp().to(problem.compute_dtype)
        right = (first.counted[s] - first.counted[reference[1]]).exp().to(problem.compute_dtype)
        pair = (left if x is None else x * left, right if y is None else y * right)
        segments.setdefault(reference, []).append(pair)

    if final == 0:
        take((0, 0), 0, 0, d_last / last.sums[0], None)
    for t in range(final, 0, -1):
        step = final - (final - t) // reach * reach
        active = done >= t
        alpha = torch.where(active, d_last / last.sums[t], 0.0)
        take((step, step), t, t, alpha, None)
        d_first = d_first - _weighed(passes, problem, sweeps, at(t, t), alpha, to_first=True)
        beta = torch.where(active, d_first / first.sums[t], 0.0)
        take((step, step) if t > 1 else (0, 1), t - 1, t, None, beta)
        if t > 1:
            d_last = torch.where(active, -_weighed(passes, problem, sweeps, at(t - 1, t), beta, to_first=False), d_last)
            d_first = torch.where(active, 0.0, d_first)
    pairs = [pair for group in segments.values() for pair in group]
    left, right = (torch.stack(vectors, 2) for vectors in zip(*pairs, strict=True))
    counts = [len(group) for group in segments.values()]
    return Terms(at(final, final), [at(*reference) for reference in segments], *by_side(left, right, sweeps), counts)


def _implicit_terms(
    passes: Passes,
    problem: Attention,
    sweeps: Sweeps,
    plan: Potentials,
    last_mass: Tensor,
    first_mass: Tensor,
    d_last: Tensor,
    d_first: Tensor,
) -> Terms:
    """Right at the fixed point: mass alpha + P beta = d_last, P^T alpha + mass beta = d_first, by conjugate gradients.

    Without alpha, (I - P^T P / (masses)) beta = (d_first - P^T d_last / last mass) / first mass: positive semi-definite,
    with the constants as null space, which the right side has no part in. At most ``n_iters`` steps, fewer where a head is
    done: as the sweeps, they converge the faster the smaller sigma_2 is. A saturated plan falls into parts, each with a null
    vector of its own: a direction without curvature beyond rounding is one, and the head is done.
    """
    valid = by_side(*valid_lines(problem), sweeps)[1].expand(d_first.shape)

    def product(x: Tensor, to_first: bool) -> Tensor:
        return _weighed(passes, problem, sweeps, plan, x, to_first)

    rest = centred((d_first - product(d_last / last_mass, True)) / first_mass, valid)
    beta, direction = torch.zeros_like(rest), rest
    square = rest.square().sum(-1, keepdim=True)
    eps = torch.finfo(rest.dtype).eps
    enough = square * eps**2
    for _ in range(sweeps.n_iters):
        active = square > enough
        if active.device.type == "cpu" and not bool(active.any()):
            break
        image = centred(direction - product(product(direction, False) / last_mass, True) / first_mass, valid)
        curvature = (direction * image).sum(-1, keepdim=True)
        active = active & (curvature > eps * direction.square().sum(-1, keepdim=True))
        step = torch.where(active, square / curvature, 0.0)
        beta, rest = beta + step * direction, rest - step * image
        new_square = torch.where(active, rest.square().sum(-1, keepdim=True), 0.0)
        direction = rest + torch.where(active, new_square / square, 0.0) * direction
        square = new_square
    alpha = (d_last - product(beta, False)) / last_mass
    left, right = torch.stack([alpha, torch.ones_like(alpha)], 2), torch.stack([torch.ones_like(beta), beta], 2)
    return Terms(plan, [plan], *by_side(left, right, sweeps), [2])
