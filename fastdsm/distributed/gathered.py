"""Sinkhorn attention whose keys and values are gathered, while queries stay apart: for heads that processes do not divide.

The package's own sweeps and adjoint, on passes whose sums over queries are reduced: of keys' lines, one all-reduce of (B, H, M)
float64 numbers a sweep, and before the first one for their maximum; the adjoint takes as many. What each process then has of
the keys' and values' gradients is added up by the backward of the gather.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._ops.attention_call import Checked
from .._ops.backends import attention_passes
from .._ops.problem import Attention, Dropout, Potentials, attention_of, compute_dtype
from .._ops.streamed.gradient import AttentionGradients, Cotangents, attention_backward
from .._ops.streamed.sweeps import Passes, State, Sweeps, attention_forward, slots
from .collectives import place_of, reduced


class Queries:
    """A group's."""

    def __init__(self, lines: int, group: Any) -> None:
        self._group = group
        self.queries = lines * place_of(group)[1]

    def sum(self, x: Tensor) -> Tensor:
        """Of every process's x."""
        return reduced(x, "sum", self._group)

    def max(self, x: Tensor) -> Tensor:
        """Likewise; of bool whether any is true."""
        return reduced(x.int(), "max", self._group).bool() if x.dtype == torch.bool else reduced(x, "max", self._group)


class Reduced:
    """Passes over this process's queries, whose sums over queries are those of all; :class:`Passes`."""

    def __init__(self, passes: Passes, of: Queries) -> None:
        self._passes, self._of = passes, of
        self.UNIT = passes.UNIT
        # Of this process's queries; what these give values' and keys' gradients is its part of a sum.
        self.attend, self.apply, self.gradient = passes.attend, passes.apply, passes.gradient

    def lse(
        self, problem: Attention, over: str, at: Potentials, online: bool, out: Tensor, active: Tensor | None = None
    ) -> None:
        """As there."""
        self._passes.lse(problem, over, at, online, out, active)
        if over != "rows":
            return
        if active is not None:  # what is left as it was may be anything
            out.masked_fill_(~active.unsqueeze(-1), 0.0)
        top = self._of.max(out) if online else torch.zeros_like(out)
        top = top.masked_fill(top == -torch.inf, 0.0)
        out.copy_(self._of.sum((out - top).exp()).log() + top)

    def sweep(
        self, problem: Attention, over: str, at: Potentials, online: bool, out: Tensor, other: Tensor, active: Tensor
    ) -> bool:
        """As there; lines of keys are not whole before they are reduced."""
        if over == "rows" or not self._passes.sweep(problem, over, at, online, out, other, active):
            return False
        other.masked_fill_(~active.unsqueeze(-1), 0.0)
        other.copy_(self._of.sum(other.exp()).log())
        return True

    def weigh(self, problem: Attention, over: str, at: Potentials, w: Tensor, out: Tensor) -> None:
        """As there."""
        self._passes.weigh(problem, over, at, w, out)
        self._add(over, out)

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
        """As there."""
        self._passes.products(problem, over, at, value, grad_out, dropout, out)
        self._add(over, out)

    def _add(self, over: str, out: Tensor) -> None:
        if over == "rows":
            out.copy_(self._of.sum(out))


def attention(call: Checked, group: Any) -> Tensor:
    """Of this process's queries and all keys and values, as :class:`Checked` has them."""
    temperature, implicit, columns_first = call.inputs[5], call.inputs[-2], call.inputs[-5]
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise NotImplementedError("a temperature has no gradient where heads are not a multiple of the processes; detach it")
    if implicit and not columns_first:
        raise NotImplementedError('grad="implicit" takes first="col" where heads are not a multiple of the processes')
    if call.backend == "reference":
        raise NotImplementedError('backend="reference" takes heads that are a multiple of the processes')
    found: Tensor = _Gathered.apply(group, *call.inputs)
    return found


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, query: Tensor, key: Tensor, value: Tensor, *inputs: Any) -> Tensor:
        *_, seed, scale, tau, n_iters, columns_first, tol, p, implicit, backend = inputs
        problem, passes = _problem(group, query, key, value, *inputs[:5], scale, tau, backend)
        sweeps = Sweeps(n_iters, columns_first, tol, keep=not implicit)
        B, H, N, _ = query.shape
        out = value.new_empty((B, H, N, value.shape[3]))
        f, g = (query.new_empty((B, H, slots(sweeps), lines), dtype=torch.float64) for lines in (N, key.shape[2]))
        state = State(
            f, g, query.new_empty((B, H), dtype=compute_dtype(query.dtype)), query.new_empty((B, H), dtype=torch.int32)
        )
        dropout = None if seed is None else Dropout(p, seed)
        attention_forward(passes, problem, value, sweeps, dropout, out, state, residual=False)
        ctx.save_for_backward(query, key, value, *inputs[:5], seed, f, g, state.sweeps)
        ctx.options = group, scale, tau, backend, sweeps, p, implicit
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        query, key, value, bias, *others, seed, f, g, done = ctx.saved_tensors
        group, scale, tau, backend, sweeps, p, implicit = ctx.options
        problem, passes = _problem(group, query, key, value, bias, *others, scale, tau, backend)
        wanted = bias is not None and ctx.needs_input_grad[4]
        empty = torch.empty_like
        found = AttentionGradients(empty(query), empty(key), empty(value), empty(bias) if wanted else None)
        attention_backward(
            passes, problem, value, sweeps, None if seed is None else Dropout(p, seed), Cotangents(grad_out.contiguous()),
            State(f, g, f.new_empty(done.shape), done), found, implicit,
        )  # fmt: skip
        return None, found.query, found.key, found.value, found.bias, *[None] * (len(ctx.needs_input_grad) - 5)


def _problem(group: Any, query: Tensor, *others: Any) -> tuple[Attention, Reduced]:
    *inputs, backend = others
    of = Queries(query.shape[2], group)
    problem = replace(attention_of(query, *inputs), processes=of)
    return problem, Reduced(attention_passes(problem, backend), of)
