"""Sinkhorn attention in plain PyTorch: plans stored for a few heads at a time, or streamed where one head is too large.

A stored plan is projected by the sweeps of :mod:`fastdsm.pytorch.projection`, which take one exponential per logit in all;
beyond ``DENSE_ENTRIES`` logits a head, memory stays bounded by streaming (:mod:`fastdsm.pytorch.passes`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .._ops.problem import Attention, Dropout, Gradients, Outputs, Problem
from .._ops.streamed import gradient as streamed_gradient
from .._ops.streamed import spectrum as streamed_spectrum
from .._ops.streamed import sweeps as streamed
from .._ops.streamed.gradient import AttentionGradients, Cotangents
from .._ops.streamed.spectrum import Accuracy, Spectrum, spectrum
from .._ops.streamed.sweeps import State, Sweeps
from . import passes
from .blocks import Block, blocks
from .projection import Pair, sinkhorn_backward, sinkhorn_forward

DENSE_ENTRIES = 1 << 22


def attention_forward(
    problem: Attention,
    value: Tensor,
    sweeps: Sweeps,
    dropout: Dropout | None,
    out: Tensor,
    state: State,
    residual: bool,
) -> None:
    """Fill ``out`` and ``state``."""
    if sweeps.keep or not _stored(problem):
        streamed.attention_forward(passes, problem, value, sweeps, dropout, out, state, residual)
        return
    for at in blocks(problem, whole=True):
        plan = _projected(at.logits(problem), sweeps, [x[at.by_head] for x in (state.residual, state.sweeps, state.f, state.g)])
        out[at.by_head] = (at.dropped(plan, dropout) @ at.keys(value, problem)).flatten(1, 2).to(out.dtype)


def attention_backward(
    problem: Attention,
    value: Tensor,
    sweeps: Sweeps,
    dropout: Dropout | None,
    given: Cotangents,
    state: State,
    gradients: AttentionGradients,
    implicit: bool,
) -> None:
    """Fill ``gradients``; where nothing was kept but the last potentials, the sweeps are run again.

    Potentials of stored plans are the compute dtype's, whose rounding, of hundreds, a plan formed from them would have.
    """
    one = given.of_plan_alone and streamed_gradient.of_one_line(problem, sweeps)
    complete = implicit or sweeps.keep or one
    if complete or not _stored(problem):
        if not complete:
            state = _kept(problem, sweeps, state)
        elif not sweeps.keep and _stored(problem):
            state = streamed.renewed(passes, problem, sweeps, state)
        streamed_gradient.attention_backward(passes, problem, value, sweeps, dropout, given, state, gradients, implicit)
        return
    totals = {name: torch.zeros_like(x, dtype=problem.compute_dtype) for name, x in vars(gradients).items() if x is not None}
    for at in blocks(problem, whole=True):
        S, dO = at.logits(problem), at.queries(given.out, problem)
        plan = at.dropped(_projected(S, sweeps), dropout)
        totals["value"][at.by_group] += (plan.mT @ dO).sum(2)
        d_plan = at.dropped(torch.matmul(dO, at.keys(value, problem).mT, out=plan), dropout)
        stops = state.sweeps[at.by_head].flatten() if sweeps.tol >= 0 else None
        dS = _projected_backward(S, sweeps, d_plan, stops, _potentials_of(given, state, at))
        for which in totals.keys() - {"value"}:
            at.add_gradient(problem, which, dS, totals[which])
    for name, total in totals.items():
        getattr(gradients, name).copy_(total)


def _stored(problem: Attention) -> bool:
    return problem.query.shape[2] * problem.key.shape[2] <= DENSE_ENTRIES


def _kept(problem: Attention, sweeps: Sweeps, state: State) -> State:
    """The state with the potentials of every sweep."""
    again = replace(sweeps, keep=True)
    f, g = (x.new_empty((*x.shape[:2], streamed.slots(again), x.shape[3])) for x in (state.f, state.g))
    state = State(f, g, torch.empty_like(state.residual), torch.empty_like(state.sweeps))
    streamed.attention_forward(passes, problem, None, again, None, None, state, residual=False)
    return state


def _oriented(S: Tensor, sweeps: Sweeps) -> Problem:
    """The projection of logits (..., N, M), transposed unless columns come first."""
    flat = S.flatten(0, -3)
    logits = flat if sweeps.columns_first else flat.mT
    return Problem(logits, sweeps.n_iters, unit_rows=sweeps.columns_first, tol=sweeps.tol)


def _projected(S: Tensor, sweeps: Sweeps, info: list[Tensor] | None = None) -> Tensor:
    """The plan of logits S (b, g, r, N, M); ``info``: residual, sweeps (b, g r), f and g (b, g r, 1, lines) to be filled."""
    problem = _oriented(S, sweeps)
    plan = torch.empty_like(S)
    flat = plan.flatten(0, -3)
    count, n, m = problem.logits.shape
    row, col = S.new_empty((count, n)), S.new_empty((count, m))
    found = (S.new_empty((count,)), S.new_empty((count,), dtype=torch.int32), row, col) if info else ()
    sinkhorn_forward(problem, Outputs(flat if sweeps.columns_first else flat.mT, *found))
    if info:
        order = found if sweeps.columns_first else (*found[:2], col, row)
        for target, x in zip(info, order, strict=True):
            target.copy_(x.view(target.shape))
    return plan


def _potentials_of(given: Cotangents, state: State, at: Block) -> Pair | None:
    """Cotangents (b h, lines) of the potentials of a block of whole heads."""
    if given.of_plan_alone:
        return None
    both = ((given.f, state.f), (given.g, state.g))
    return tuple((torch.zeros_like(like[:, :, 0]) if x is None else x)[at.by_head].flatten(0, 1) for x, like in both)


def _projected_backward(
    S: Tensor, sweeps: Sweeps, d_plan: Tensor, stops: Tensor | None, grad_potentials: Pair | None
) -> Tensor:
    """dS from the cotangents of the plan and, where there are any, of f and g."""
    dS = torch.empty_like(S)
    cotangent, target = d_plan.flatten(0, -3), dS.flatten(0, -3)
    if not sweeps.columns_first:
        cotangent, target = cotangent.mT, target.mT
        grad_potentials = None if grad_potentials is None else grad_potentials[::-1]
    sinkhorn_backward(_oriented(S, sweeps), cotangent, Gradients(target), stops, grad_potentials=grad_potentials)
    return dS


def attention_sigma2(problem: Attention, sweeps: Sweeps, accuracy: Accuracy, found: Spectrum) -> None:
    """Fill ``found``; sweeps keep nothing."""
    if not _stored(problem):
        streamed_spectrum.attention_sigma2(passes, problem, sweeps, accuracy, found)
        return
    queries, keys = (x.expand(y.shape) for x, y in zip(streamed.valid_lines(problem), (found.u, found.v), strict=True))
    for at in blocks(problem, whole=True):
        plan = _projected(at.logits(problem), sweeps).flatten(1, 2)

        def product(x: Tensor, plan: Tensor = plan) -> Tensor:
            return (x.unsqueeze(-2) @ plan.mT).squeeze(-2)

        def adjoint(x: Tensor, plan: Tensor = plan) -> Tensor:
            return (x.unsqueeze(-2) @ plan).squeeze(-2)

        def squares(plan: Tensor = plan) -> Tensor:
            return plan.square().sum((-2, -1))

        part = Spectrum(*(x[at.by_head] for x in (found.value, found.u, found.v, found.upper)))
        spectrum(product, adjoint, squares, queries[at.by_head], keys[at.by_head], accuracy, part)
