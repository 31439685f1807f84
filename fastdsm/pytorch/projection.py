"""Sinkhorn projection and its exact gradient in plain PyTorch, one cache-sized chunk of the batch at a time.

Forward: the sweeps leave P = diag(u) K diag(v). Backward: the sweeps are run again for the chunk with the factors u_t, v_t
of every sweep recorded, then the adjoint goes back through them. With A_t = diag(u_t) K diag(v_t) after the row step,
B_t = diag(u_(t-1)) K diag(v_t) after the column step and D the cotangent of P:

    df = (P * D) 1,  dg = (P * D)^T 1
    for t = T..1:  dS -= A_t * (df / r) 1^T;  dg -= A_t^T (df / r);  dS -= B_t * 1 (dg / c)^T;  df = -B_t (dg / c);  dg = 0

Cotangents of the last f and g are added to the first df and dg. Both corrections of dS are K times a rank-one matrix, so dS =
P * D - K * (sum of 2T outer products): vectors are stored per sweep, never a matrix. A segment with another K contributes a
product of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .._ops.problem import Gradients, Outputs, Problem
from ..reference import deflated
from . import few
from .chunk import parts
from .layout import copy
from .spectrum import deflated_uniform, largest_singular_value
from .sweeps import Chunk, Swept, log_of, run
from .tape import Tape

Pair = tuple[Tensor, ...]
"""A vector of rows and one of columns."""


def sinkhorn_forward(problem: Problem, outputs: Outputs, tape: Tape | None = None) -> None:
    """Fill ``outputs`` for ``problem``; of few matrices leave on ``tape`` what their gradient can start from."""
    by_parts = partial(_forward_by_parts, problem, outputs)
    if outputs.residual is None and outputs.sigma2 is None:
        few.forward(problem, outputs.plan, by_parts, tape)
    else:
        by_parts()


def _forward_by_parts(problem: Problem, outputs: Outputs) -> None:
    for part in parts(problem, backward=False, target=outputs.plan):
        chunk, at = part.chunk, part.chunk.layout
        swept = run(chunk, problem.n_iters, problem.tol, potentials=outputs.f is not None)
        if outputs.residual is not None and outputs.sweeps is not None:
            residual = chunk.column_error(swept.v, chunk.col_sums(swept.u, chunk.vectors.history[1].take()))
            part.write(outputs.residual, residual if swept.poison is None else residual + swept.poison)
            part.write(outputs.sweeps, swept.sweeps)
        if outputs.f is not None and outputs.g is not None:
            part.write(outputs.f, at.vector(swept.f + log_of(swept.u)))
            part.write(outputs.g, at.vector(swept.g + log_of(swept.v)))
        plan = at.batch_first(_plan(chunk, swept))
        part.write(outputs.plan, plan)
        if outputs.sigma2 is not None:
            if chunk.tame:
                M = deflated_uniform(plan, chunk.tame.r * chunk.tame.c)
            else:
                M = deflated(plan.double(), at.vector(chunk.r).double(), at.vector(chunk.c).double())
            sigma2 = largest_singular_value(M.to(plan.dtype).reshape(-1, *plan.shape[-2:]))
            part.write(outputs.sigma2, sigma2.view(M.shape[:-2]))


def _plan(chunk: Chunk, swept: Swept) -> Tensor:
    """P = diag(u) K diag(v), overwriting K."""
    at = chunk.layout
    return chunk.K.mul_(at.down(swept.poisoned_u(at))).mul_(at.across(swept.v))


def sinkhorn_backward(
    problem: Problem,
    grad_plan: Tensor,
    gradients: Gradients,
    sweeps: Tensor | None,
    tape: Tape | None = None,
    grad_potentials: Pair | None = None,
) -> None:
    """Fill ``gradients``, the exact adjoint of the sweeps done: ``sweeps`` (B,) where problem.tol >= 0, else n_iters.

    tape: what the forward left there. grad_potentials: cotangents of f (B, n) and g (B, m), compute dtype.
    """
    if sweeps is not None and sweeps.is_cpu:  # memory for those done, not for those allowed
        done = int(sweeps.max()) if len(sweeps) else 0
        problem = replace(problem, n_iters=min(problem.n_iters, max(done, min(problem.n_iters, 1))))
    by_parts = partial(_backward_by_parts, problem, grad_plan, gradients, sweeps, grad_potentials)
    if gradients.f0 is None and grad_potentials is None:
        few.backward(problem, grad_plan, gradients.logits, by_parts, tape)
    else:
        by_parts()


def _backward_by_parts(
    problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None, grad_potentials: Pair | None = None
) -> None:
    for part in parts(problem, backward=True, target=gradients.logits):
        chunk, at = part.chunk, part.chunk.layout
        stops = None if sweeps is None else part.of(sweeps)
        swept = run(chunk, problem.n_iters, record=True, stops=stops)
        copy(at.batch_first(chunk.W), part.of(grad_plan))
        if not chunk.tame:
            chunk.W.masked_fill_(chunk.S.isneginf(), 0.0)
        given = None if grad_potentials is None else tuple(at.vector(part.of(x)) for x in grad_potentials)
        d_logits, lines = _adjoint(chunk, swept, stops, gradients.f0 is not None, given)
        tau = problem.temperature
        if isinstance(tau, Tensor):
            d_logits.div_(at.whole(part.of(tau)))
        elif tau != 1.0:
            d_logits.div_(tau)
        part.write(gradients.logits, at.batch_first(d_logits))
        for target, line in zip((gradients.f0, gradients.log_row, gradients.log_col), lines, strict=True):
            if target is not None:
                part.write(target, at.vector(line))


def _adjoint(
    chunk: Chunk, swept: Swept, stops: Tensor | None, lines: bool, given: Pair | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """dS from the cotangents of P in W and of f and g, if ``given``, and the adjoints of f0, log r, log c if ``lines``.

    df and -dg are carried, which spares the signs.
    """
    at = chunk.layout
    W = chunk.W.mul_(at.down(swept.poisoned_u(at))).mul_(at.across(swept.v))
    df, dg = (torch.empty_like(x) for x in (swept.u, swept.v))
    at.product_sums(W, chunk.K, chunk.room, df, dg)
    if given is not None:
        for x, more, marginal in zip((df, dg), given, (chunk.r, chunk.c), strict=True):
            x.add_(torch.where(marginal == 0, 0.0, more))
    less_dg: Tensor | None = dg.neg_()
    d_row, less_d_col = (df.new_zeros(x.shape if lines else ()) for x in (df, dg))
    if not swept.segments:
        return W.sub_(at.down(chunk.over_r(df))).mul_(chunk.K), (d_row, df, less_d_col)
    done, last = sum(len(segment.u) - 1 for segment in swept.segments), swept.segments[-1]
    earlier = None  # dS of the segments behind, whose K is another
    for segment in reversed(swept.segments):
        if segment is not last:
            earlier = W.mul_(chunk.K) if earlier is None else earlier.add_(W.mul_(chunk.K))
            W = torch.zeros_like(earlier)
            chunk.set_kernel(segment.f, segment.g)
        low_rank = at.LowRank(W, chunk.vectors.waiting, chunk.vectors.history)
        vs = reversed(segment.v) if segment.v else chunk.forgotten_v(segment.u[:-1])
        a, less_b = low_rank.next()
        for before, u, v in zip(reversed(segment.u[:-1]), reversed(segment.u[1:]), vs, strict=True):
            active = None if stops is None else at.scalar(stops >= done)
            done -= 1
            if lines:
                d_row += _where(active, df)
            _only(active, torch.mul(u, chunk.over_r(df), out=a))
            image = torch.mul(chunk.col_sums(a, less_b), v, out=less_b)
            less_dg = image if less_dg is None else less_dg.add_(image)
            if lines:
                less_d_col += _where(active, less_dg)
            _only(active, torch.mul(v, chunk.over_c(less_dg), out=less_b))
            low_rank.take(a, v, before, less_b)
            taken, (a, less_b) = less_b, low_rank.next()
            df_before = torch.mul(chunk.row_sums(taken, a), before, out=a)
            df = df_before if active is None else torch.where(active, df_before, df)
            less_dg = None if active is None else torch.where(active, 0.0, less_dg)
        W = low_rank.rest()
    W.mul_(chunk.K)
    return W if earlier is None else earlier.add_(W), (df, d_row, -less_d_col)


def _only(active: Tensor | None, x: Tensor) -> None:
    """Set to 0 what is not active."""
    if active is not None:
        x.masked_fill_(~active, 0.0)


def _where(active: Tensor | None, x: Tensor) -> Tensor:
    return x if active is None else torch.where(active, x, 0.0)
