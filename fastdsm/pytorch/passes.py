"""The passes of Sinkhorn attention (:class:`fastdsm._ops.streamed.sweeps.Passes`) in plain PyTorch, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops.problem import Attention, Dropout, Potentials, Terms
from .blocks import Block, blocks

UNIT = 1.0


def lse(problem: Attention, over: str, at: Potentials, online: bool, out: Tensor, active: Tensor | None = None) -> None:
    """As in :class:`~fastdsm._ops.streamed.sweeps.Passes`."""
    if over == "rows":
        out.fill_(-torch.inf)
    for block in blocks(problem):
        S = block.exponent(block.logits(problem), at)
        if over == "cols":
            out[block.by_row] = _log_sum_exp(S, -1, online)
        else:
            target = out[block.by_head]
            target.copy_(torch.logaddexp(target, _log_sum_exp(S, -2, online)))


def _top(S: Tensor, dim: int) -> Tensor:
    """Largest along ``dim``, 0 where all are -inf."""
    top = S.amax(dim, keepdim=True)
    return top.masked_fill_(top == -torch.inf, 0.0)


def _log_sum_exp(S: Tensor, dim: int, online: bool) -> Tensor:
    """log sum exp along ``dim``, (b, heads, lines), float64, using up S (b, g, r, ., .)."""
    return _exponentials(S, dim, online)[2]


def _exponentials(S: Tensor, dim: int, online: bool) -> tuple[Tensor, Tensor, Tensor]:
    """exp(S - top) in place of S, top being 0 unless ``online``; its sums along ``dim``, kept; and log sum exp S, float64."""
    top = _top(S, dim) if online else S.new_zeros(())
    P = S.sub_(top).exp_() if online else S.exp_()
    sums = P.sum(dim, keepdim=True)
    return P, sums, (top.double() + sums.double().log()).squeeze(dim).flatten(1, 2)


def sweep(problem: Attention, over: str, at: Potentials, online: bool, out: Tensor, other: Tensor, active: Tensor) -> bool:
    """As in :class:`~fastdsm._ops.streamed.sweeps.Passes`; blocks hold the lines of queries whole."""
    if over == "rows":
        return False
    other.zero_()
    for block in blocks(problem):
        P, sums, out[block.by_row] = _exponentials(block.exponent(block.logits(problem), at), -1, online)
        shares = torch.where(sums == 0, 0.0, sums.reciprocal())
        other[block.by_head] += (shares.mT @ P).squeeze(-2).flatten(1, 2)
    other.log_()
    return True


def attend(
    problem: Attention,
    at: Potentials,
    online: bool,
    value: Tensor,
    dropout: Dropout | None,
    out: Tensor,
    line: Tensor,
) -> None:
    """As in :class:`~fastdsm._ops.streamed.sweeps.Passes`."""
    for block in blocks(problem):
        P, sums, line[block.by_row] = _exponentials(block.exponent(block.logits(problem), at), -1, True)
        product = block.dropped(P, dropout) @ block.keys(value, problem)
        out[block.by_row] = (product / sums.masked_fill_(sums == 0, 1.0)).flatten(1, 2).to(out.dtype)


def apply(problem: Attention, over: str, at: Potentials, x: Tensor, dropout: Dropout | None, out: Tensor) -> None:
    """As in :class:`~fastdsm._ops.streamed.sweeps.Passes`."""
    if over == "rows":
        out.zero_()
    for block in blocks(problem):
        P = block.dropped(block.exponent(block.logits(problem), at).exp_(), dropout)
        if over == "cols":
            out[block.by_row] = (P @ block.keys(x, problem)).flatten(1, 2).to(out.dtype)
        else:
            out[block.by_group] += (P.mT @ block.queries(x, problem)).sum(2)


def weigh(problem: Attention, over: str, at: Potentials, w: Tensor, out: Tensor) -> None:
    """As in :class:`~fastdsm._ops.streamed.sweeps.Passes`."""
    if over == "rows":
        out.zero_()
    for block in blocks(problem):
        P = block.exponent(block.logits(problem), at).exp_()
        if over == "cols":
            out[block.by_row] = (P @ block.heads_of(w).unsqueeze(-1)).squeeze(-1).flatten(1, 2)
        else:
            out[block.by_head] += (block.rows_of(w).unsqueeze(-2) @ P).squeeze(-2).flatten(1, 2)


def products(
    problem: Attention, over: str, at: Potentials, value: Tensor, grad_out: Tensor, dropout: Dropout | None, out: Tensor
) -> None:
    """As in :class:`~fastdsm._ops.streamed.sweeps.Passes`."""
    out.zero_()
    for block in blocks(problem):
        dS = _products(problem, block, block.logits(problem), at, value, grad_out, dropout)
        if over == "cols":
            out[block.by_row] = dS.sum(-1).flatten(1, 2)
        else:
            out[block.by_head] += dS.sum(-2).flatten(1, 2)


def _products(
    problem: Attention, block: Block, S: Tensor, at: Potentials, value: Tensor, grad_out: Tensor, dropout: Dropout | None
) -> Tensor:
    """P * (grad_out value^T) of a block, using up its logits S."""
    dP = block.dropped(block.queries(grad_out, problem) @ block.keys(value, problem).mT, dropout)
    return dP.mul_(block.exponent(S, at).exp_())


def gradient(
    problem: Attention, which: str, terms: Terms, value: Tensor, grad_out: Tensor, dropout: Dropout | None, out: Tensor
) -> None:
    """As in :class:`~fastdsm._ops.streamed.sweeps.Passes`."""
    total = torch.zeros_like(out, dtype=problem.compute_dtype)
    for block in blocks(problem):
        S = block.logits(problem)
        dS = _products(problem, block, S.clone(), terms.plan, value, grad_out, dropout)
        start = 0
        for at, count in zip(terms.segments, terms.counts, strict=True):
            x, y = (block.heads_of(z)[..., start : start + count, :] for z in (terms.x, terms.y))
            dS -= block.exponent(S.clone(), at).exp_().mul_(x[..., block.rows].mT @ y)
            start += count
        block.add_gradient(problem, which, dS, total)
    out.copy_(total)
