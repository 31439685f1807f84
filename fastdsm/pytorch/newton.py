"""solver="newton": Newton's method on the dual of the projection, every matrix to its tolerance, in plain PyTorch.

From the column potential g after a first column step (that of a sweep from f0), each step solves H d = c - P^T 1 and tries g
+ d; ``system.py`` states P, the convex objective h and H, ``laplacian.py`` solves. Near the solution the residual squares at
every step, whatever sigma_2 is, where a sweep takes it times sigma_2^2.

Far from it h is no parabola. Along a direction of spread s = max d - min d the weights exp(S + g + t d) of a row are those of
a bounded random variable, hence |h'''| <= s h''. With a = d^T H d = -h'(0) this gives h''(t) <= a e^(s t), so

    h(t) <= h(0) - a t + a (e^(s t) - 1 - s t) / s^2,   least at t = log(1 + s) / s,   where h has fallen:

the damped step t d can always be made (Sun and Tran-Dinh 2019 state this for generalised self-concordant functions; what is
added to H below only makes d^T H d less than a). It is slow where the full step would have served. So: the full step is
tried, cut to a spread of ``LONGEST_STEP``; where the residual was ``PURE_BELOW`` or more and h has not fallen, it is taken
back and the next step is the damped one. Below that residual steps are pure Newton and are not judged: h changes by less than
rounding there.

``GROUND`` times the residual times c is added to the diagonal while the residual is ``PURE_BELOW`` or more, the rounding of
column sums below: columns whose rows give all to them have no edge that float32 can tell from none, and would never move.
Steps of bounded spread keep every potential finite: a matrix without support ends at ``n_iters`` with its residual.

Cold problems, whose logits leave more than ``WARM_RANGE`` nats when the largest of each row and then of each column is taken
off, are warmed: logits are halved until they do not, and doubled again, with the potentials, each time the residual is
``COOLED_BELOW``. Potentials grow as logits do, so that the next problem starts close to where it ends. A start that is as good
already is not warmed. 100 x 100 squared distances in the unit square over 1e-3, 1e-5 and 1e-7 take 17, 30 and 30 steps to 1e-8,
where without it the last two are at a residual of 2 and 4 after 400.

Measured on 65,536 matrices, n = 4, float32, steps to 1e-6, median / 99 % / 99.9 %, the first sweep counted: logit std 4: 5 /
8 / 10; 8: 7 / 12 / 14; 16: 9 / 15 / 17; 32: 13 / 18 / 21; 100: 9 / 19 / 22 (not warmed 14 / 32 / 40, and without ``GROUND`` 3 %
not done after 60). 1,000 at n = 16: std 4: 6 / 8 / 9; 16: 11 / 18 / 19; 100: 13 / 18 / 20 (27 / 44 / 50). With a sweep in place
of the damped step and uncut steps, n = 4: std 4: 5 / 11 / 15; std 8: 7 / 21 / more than 20.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .._ops.problem import Outputs, Problem, doubled
from ..reference import deflated
from .chunk import beyond_single, load
from .host import may_look
from .laplacian import solve
from .layout import BatchFirst, copy
from .spectrum import largest_singular_value
from .sweeps import log_of
from .system import Point, System, fold, pieces

LONGEST_STEP = 8.0
WARM_RANGE = 128.0  # nats
COOLED_BELOW = 0.1
PURE_BELOW = 1e-2
GROUND = 1e-3
_FORCING = (1e-3, 1e-1)  # accuracy of conjugate gradients: the residual, within these
_DROP_BELOW = 0.75  # matrices that are done are dropped when fewer than this share goes on


def newton_forward(problem: Problem, outputs: Outputs) -> None:
    """Fill ``outputs``: the plan, and all else where it is given; at most ``problem.n_iters`` steps."""
    wide = wide_matrices(problem)
    if wide is None or bool(wide.all()):
        _forward(problem if wide is None else problem.map_tensors(doubled), outputs)
        return
    for index in (~wide, wide):
        where = index.nonzero().squeeze(1)
        some, part = outputs.room_for(len(where)), problem.part(where)
        _forward(part.map_tensors(doubled) if index is wide else part, some)
        outputs.put(where, some)


def wide_matrices(problem: Problem) -> Tensor | None:
    """Which matrices (B,) float32 does not serve, on a CPU; None where there are none."""
    if problem.compute_dtype == torch.float64 or problem.logits.device.type != "cpu" or problem.logits.numel() == 0:
        return None
    S = load(problem, BatchFirst, problem.logits.new_empty)
    wide = beyond_single(S, (-2, -1), S.amax((-2, -1)), S.amin((-2, -1)))
    return wide if bool(wide.any()) else None


def _forward(problem: Problem, outputs: Outputs) -> None:
    """Fill ``outputs`` in the arithmetic of the problem."""
    for where, system in pieces(problem, problem.compute_dtype):
        at = system.at
        f0 = torch.zeros_like(system.r) if problem.f0 is None else at.vector(problem.f0[where])
        base, fine, steps = run(system, f0, problem.n_iters, problem.tol)
        end = system.at_potential(base, fine)
        plan = at.batch_first(end.P.mul_(at.whole(torch.where(system.poisoned, torch.nan, system.unit.squeeze(at.line)))))
        copy(outputs.plan[where], plan)
        if outputs.residual is not None and outputs.sweeps is not None:
            outputs.residual[where] = end.residual.masked_fill(system.poisoned, torch.nan)
            outputs.sweeps[where] = steps
        if outputs.f is not None and outputs.g is not None:
            f = torch.where(system.r == 0, 0.0, log_of(system.r * system.unit) - end.log_sums)
            outputs.f[where] = at.vector(f)
            outputs.g[where] = at.vector(base + fine)
        if outputs.sigma2 is not None:
            r, c = (at.vector(x * system.unit).double() for x in (system.r, system.c))
            outputs.sigma2[where] = largest_singular_value(deflated(plan.double(), r, c).to(plan.dtype))


def run(system: System, f0: Tensor, n_iters: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Column potential, as base and fine part, and the steps done (B,) int32.

    What happens to a matrix depends on that matrix alone. Those that are done leave the piece, if the host may look.
    """
    at = system.at
    f0 = torch.where((system.r == 0) | f0.isinf(), 0.0, f0)  # float32 may not hold what potentials of 1e38 come to
    base, fine = system.column_step(f0), torch.zeros_like(system.c)
    steps = torch.full_like(system.poisoned, min(n_iters, 1), dtype=torch.int32)
    if n_iters == 0:
        return torch.zeros_like(base), fine, steps
    damped = torch.zeros_like(system.poisoned)
    point = system.at_potential(base, fine)
    halvings = torch.where(point.residual > COOLED_BELOW, _halvings(system), 0.0)
    warm = system
    if _any(halvings > 0):
        warm = _warmed(system, halvings)
        base = torch.where(at.scalar(halvings > 0), warm.column_step(torch.zeros_like(f0)), base)
        point = warm.at_potential(base, fine)
    whole, index = (base, fine, steps), None
    d = direction(warm, point)
    residual, objective = point.residual, point.objective
    for _ in range(1, n_iters):
        going = ~(residual <= tol) | (halvings > 0)
        if may_look(going):
            count = int(going.sum())
            if count < _DROP_BELOW * len(going):
                _put_back(whole, (base, fine, steps), index, at.batch)
                if count == 0:
                    break
                kept = going.nonzero().squeeze(1)
                index = kept if index is None else index[kept]
                system, warm, halvings = system.take(kept), warm.take(kept), halvings[kept]
                base, fine, d = (x.index_select(at.batch, kept) for x in (base, fine, d))
                steps, damped, going, residual, objective = (x[kept] for x in (steps, damped, going, residual, objective))
        steps = steps + going
        spread = d.amax(at.line) - d.amin(at.line)
        spread = spread.clamp(min=torch.finfo(spread.dtype).tiny)
        length = torch.where(damped, torch.log1p(spread), spread).clamp(max=LONGEST_STEP) / spread
        new_base, new_fine = fold(base, fine + d * at.scalar(length), at)
        cooled = (halvings > 0) & (residual <= COOLED_BELOW)
        if _any(cooled):
            halvings = halvings - cooled.to(halvings.dtype)
            warm, there = _warmed(system, halvings), at.scalar(cooled)
            new_base, new_fine = torch.where(there, 2.0 * (base + fine), new_base), torch.where(there, 0.0, new_fine)
        point = warm.at_potential(new_base, new_fine)
        judged = (residual >= PURE_BELOW) & ~damped & ~cooled
        refused = judged & ~(point.objective <= objective) & ~(point.residual <= tol)
        moved = going & ~refused
        there = at.scalar(moved)
        base, fine = torch.where(there, new_base, base), torch.where(there, new_fine, fine)
        d = torch.where(there, direction(warm, point), d)
        residual = torch.where(moved, point.residual, residual)
        objective = torch.where(moved, point.objective, objective)
        damped = refused
    scale = at.scalar(halvings.exp2())  # of those that n_iters steps leave warm
    base, fine = torch.where(scale > 1, (base + fine) * scale, base), torch.where(scale > 1, 0.0, fine)
    _put_back(whole, (base, fine, steps), index, at.batch)
    return whole


def _any(x: Tensor) -> bool:
    """Whether any is true, as far as the host may look."""
    return not may_look(x) or bool(x.any())


def _halvings(system: System) -> Tensor:
    """How often (B,) the logits are to be halved for what rows and columns leave of them to be within ``WARM_RANGE``."""
    at = system.at
    rest = system.S
    for dim in (at.cols, at.rows):
        top = rest.amax(dim, keepdim=True)
        rest = rest - torch.where(top == -torch.inf, 0.0, top)
    spread = -rest.masked_fill(rest == -torch.inf, 0.0).amin((at.rows, at.cols))
    return (spread / WARM_RANGE).clamp(min=1.0).log2().ceil()


def _warmed(system: System, halvings: Tensor) -> System:
    """The system of the logits at 2^halvings times their temperature."""
    return replace(system, S=system.S * system.at.whole(torch.exp2(-halvings)))


def direction(system: System, point: Point) -> Tensor:
    """Newton's direction, around 0."""
    at = system.at
    b, accuracy = system.aim - point.col_sums, point.residual.clamp(*_FORCING)
    rough = torch.where(point.residual >= PURE_BELOW, point.residual.clamp(max=1.0) * GROUND, system.rounding)
    d = solve(at, point.P, system.inverse_r, b, system.c * at.scalar(rough), accuracy)
    valid = 1.0 - system.spare_cols
    mean = at.sums(d * valid, at.line) / at.sums(valid, at.line).clamp(min=1.0)
    return (d - at.scalar(mean)) * valid


def _put_back(whole: tuple[Tensor, ...], parts: tuple[Tensor, ...], index: Tensor | None, dim: int) -> None:
    """Write what the matrices still in hand have come to into the tensors of all."""
    for all_of, part in zip(whole, parts, strict=True):
        if index is None:
            all_of.copy_(part)
        elif all_of.dim() == 1:
            all_of[index] = part
        else:
            all_of.index_copy_(dim, index, part)
