"""The plan of rows that lie apart as a function with gradients: of the sweeps done, or of the fixed point.

Adjoint of a half step of columns at (f, g), from dg summed over processes, and of rows, with K = exp(S + f + g):

    beta = dg / c,   dS -= K beta_j,   df -= K beta;        alpha = df / r,   dS -= K alpha_i,   dg -= K^T alpha.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .collectives import place_of, reduced
from .converged import fixed_point, with_exact_columns
from .converged import implicit as implicit_lines
from .rows import Problem, Step, blocks, divided, entries, swept


class Rows(torch.autograd.Function):
    """The local rows of the plan; and f, g, c, and the half steps or steps, without a gradient.

    Of logits, scale, r, c or None, and f0. What all processes share, scale, c and an f0 of columns, has on each a share of its
    gradient: their sum is the whole, as that of any parameter beside data that lie apart.
    """

    @staticmethod
    def forward(ctx: Any, S: Tensor, scale: Tensor, r: Tensor, c: Tensor | None, f0: Tensor, options: tuple[Any, ...]) -> Any:
        """options: columns first, half steps or Newton's steps, tol, group, Newton's method, the implicit gradient."""
        first, count, tol, group, newton, implicit = options
        problem = Problem(S, scale, r, None, group)
        if newton:
            problem, f, g, done = fixed_point(problem, c, count, tol)
            steps = [Step(False, f, g if first else with_exact_columns(problem, f, g))]
        else:
            problem, steps = swept(problem, c, f0, first, count, tol)
            done = len(steps) - 1
        f, g = steps[-1].f, steps[-1].g
        plan = torch.empty_like(S)
        for rows in blocks(S):
            plan[:, rows] = entries(problem, rows, f, g).to(S.dtype)
        found = f, g, g if problem.c is None else problem.c
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(S, scale, r, c, problem.c, *(x for step in steps for x in (step.f, step.g)))
        ctx.columns, ctx.group, ctx.implicit = [step.columns for step in steps], group, implicit
        return plan, *found, done

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_plan: Tensor | None, *_: Any) -> Any:
        """In two passes: the adjoint's lines, of every half step, and then the gradient of the logits, block by block."""
        if d_plan is None:
            return (None,) * 6
        S, scale, r, given, c, *kept = ctx.saved_tensors
        problem = Problem(S, scale, r, c, ctx.group)
        steps = list(map(Step, ctx.columns, kept[::2], kept[1::2]))
        f, g = steps[-1].f, steps[-1].g
        if ctx.implicit:
            d_r, d_c = implicit_lines(problem, f, g, d_plan)
            lines, d_f0 = [(Step(False, f, g), d_r), (Step(True, f, g), d_c)], None
            d_r = d_r.clone()
        else:
            lines, d_r, d_c, d_f0 = _lines(problem, steps, d_plan)
        d_S, d_scale = torch.empty_like(S), torch.zeros_like(scale)
        for rows in blocks(S):
            slope = entries(problem, rows, f, g) * d_plan[:, rows].double()
            for step, factor in lines:
                across = factor[:, None, :] if step.columns else factor[:, rows, None]
                slope -= entries(problem, rows, step.f, step.g) * across
            d_scale += (slope * S[:, rows].double().where(slope != 0, 0.0)).sum((1, 2))
            d_S[:, rows] = (slope * scale[:, None, None]).to(S.dtype)
        if c is None:
            return d_S, d_scale, d_r, None, d_f0, None
        total = c.sum(1, keepdim=True)
        of_total = (d_c * c).sum(1, keepdim=True) / total  # which the columns take from all rows
        d_r += of_total.where(r > 0, 0.0)
        if given is None:
            return d_S, d_scale, d_r, None, d_f0, None
        ratio = total / given.where(c > 0, 0.0).sum(1, keepdim=True)
        d_given = ((d_c - of_total) * ratio).where(c > 0, 0.0) / place_of(ctx.group)[1]
        return d_S, d_scale, d_r, d_given, d_f0, None


def _lines(problem: Problem, steps: list[Step], d_plan: Tensor) -> tuple[list[tuple[Step, Tensor]], Tensor, Tensor, Tensor]:
    """alpha or beta of every half step, gradients in r and c, and in the potential before the first."""
    S, _, r, c, group = problem
    _, f, g = steps[-1]
    df, dg = torch.zeros_like(f), torch.zeros_like(g)
    for rows in blocks(S):
        terms = entries(problem, rows, f, g) * d_plan[:, rows].double()
        df[:, rows] = terms.sum(2)
        dg += terms.sum(1)
    lines: list[tuple[Step, Tensor]] = []
    d_r, d_c = torch.zeros_like(r), torch.zeros_like(g)
    for step, before in zip(reversed(steps[1:]), reversed(steps[:-1]), strict=True):
        if step.columns:
            assert c is not None
            factor = divided(reduced(dg, "sum", group), c)
            d_c, dg = d_c + factor, torch.zeros_like(dg)
            at = Step(True, before.f, step.g)
            for rows in blocks(S):
                df[:, rows] -= (entries(problem, rows, at.f, at.g) @ factor.unsqueeze(2)).squeeze(2)
        else:
            factor = divided(df, r)
            d_r, df = d_r + factor, torch.zeros_like(df)
            at = Step(False, step.f, before.g)
            for rows in blocks(S):
                dg -= (factor[:, None, rows] @ entries(problem, rows, at.f, at.g)).squeeze(1)
        lines.append((at, factor))
    return lines, d_r, d_c, df if steps[0].columns else dg
