"""Problems of Sinkhorn attention with potentials of their plans, and the dense formulas that a pass over them is held to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdsm._ops.problem import Attention, Dropout, Potentials
from fastdsm.kernels.attention import launch as attention

SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
AXES = ("cols", "rows")
OPTIONS = ("plain", "bias", "half bias", "broadcast bias", "mask", "padding", "temperature", "strided", "everything")


def make(option: str = "plain", dtype: torch.dtype = SINGLE, n: int = 17, m: int = 33, d: int = 16) -> Attention:
    """Two batches, four query heads, two key heads; NaN lies under every mask and padding."""
    b, h, g = 2, 4, 2
    every = option == "everything"
    problem = Attention(torch.randn(b, h, n, d).to(dtype), torch.randn(b, g, m, d).to(dtype), d**-0.5, 0.7)
    if option == "strided" or every:  # (B, N, H, d) storage, and lines that are no whole vectors
        query = torch.randn(b, n, h, d + 1).to(dtype)[..., 1:].transpose(1, 2)
        key = torch.randn(b, m, g, 2 * d).to(dtype)[..., ::2].transpose(1, 2)
        problem = replace(problem, query=query, key=key)
    if option == "bias" or every:
        bias = torch.randn(b, h, m, n).mT
        bias[0, 1, 3, :] = -torch.inf
        problem = replace(problem, bias=bias)
    if option == "half bias":
        problem = replace(problem, bias=torch.randn(b, h, n, m).to(HALF))
    if option == "broadcast bias":
        problem = replace(problem, bias=torch.randn(1, h, 1, m).to(dtype).expand(b, h, n, m))
    if option == "mask" or every:
        mask = torch.rand(b, 1, n, m) < 0.7
        mask[1, :, 2], mask[0, :, :, 4] = False, False
        problem = replace(problem, mask=mask.expand(b, h, n, m))
        if problem.bias is not None:
            problem.bias[~problem.mask] = torch.nan
    if option == "padding" or every:
        query_padding, key_padding = torch.rand(b, n) < 0.2, torch.rand(b, m) < 0.2
        query_padding[1, 0], key_padding[0, m - 1] = True, True
        problem = replace(problem, query_padding=query_padding, key_padding=key_padding)
        problem.query.masked_fill_(query_padding[:, None, :, None], torch.nan)
        problem.key.masked_fill_(key_padding[:, None, :, None], torch.nan)
        if problem.bias is not None:
            problem.bias.masked_fill_(key_padding[:, None, None, :], torch.nan)
    if option == "temperature" or every:
        problem = replace(problem, temperature=torch.rand(b, h) + 0.5)
    return problem


def heads(x: Tensor, problem: Attention) -> Tensor:
    """(B, G, ...) repeated to the query heads."""
    return x.repeat_interleave(problem.query.shape[1] // problem.key.shape[1], 1)


def groups(x: Tensor, problem: Attention) -> Tensor:
    """(B, H, ...) summed over the query heads of each key head."""
    return x.unflatten(1, (problem.key.shape[1], -1)).sum(2)


def logits(problem: Attention, dtype: torch.dtype) -> Tensor:
    """S (B, H, N, M) in ``dtype``."""
    query, key, padding = problem.query, problem.key, torch.zeros((), dtype=torch.bool)
    if problem.query_padding is not None and problem.key_padding is not None:
        query = query.masked_fill(problem.query_padding[:, None, :, None], 0)
        key = key.masked_fill(problem.key_padding[:, None, :, None], 0)
        padding = problem.query_padding[:, None, :, None] | problem.key_padding[:, None, None, :]
    tau = problem.temperature[..., None, None] if isinstance(problem.temperature, Tensor) else problem.temperature
    s = query.to(dtype) @ heads(key, problem).to(dtype).mT * problem.scale
    if problem.bias is not None:
        s = s + problem.bias.to(dtype)
    s = s / tau
    if problem.mask is not None:
        s = s.masked_fill(~problem.mask, -torch.inf)
    return s.masked_fill(padding, -torch.inf)


@dataclass
class Case:
    """A problem, and potentials of a plan whose rows are exact."""

    problem: Attention
    at: Potentials

    @property
    def f(self) -> Tensor:
        return self.at.f_base.double() + self.at.f_fine

    @property
    def g(self) -> Tensor:
        return self.at.g_base.double() + self.at.g_fine

    def exponent(self, dtype: torch.dtype) -> Tensor:
        """S + f + g in the order that is promised."""
        return exponent(self.problem, self.at, dtype)

    def plan(self, dtype: torch.dtype) -> Tensor:
        return self.exponent(dtype).exp()


def exponent(problem: Attention, at: Potentials, dtype: torch.dtype) -> Tensor:
    f, f_fine, g, g_fine = (x.to(dtype) for x in (at.f_base, at.f_fine, at.g_base, at.g_fine))
    first, last = (g[:, :, None], f[..., None]) if at.columns_first else (f[..., None], g[:, :, None])
    return ((logits(problem, dtype) + first) + last) + (f_fine[..., None] + g_fine[:, :, None])


def case(
    option: str = "plain", dtype: torch.dtype = SINGLE, n: int = 17, m: int = 33, d: int = 16, columns_first: bool = True
) -> Case:
    problem = make(option, dtype, n, m, d)
    s = logits(problem, DOUBLE)
    g = -s.logsumexp(-2)
    g = torch.where(g == torch.inf, 0.0, g)
    f = -(s + g[:, :, None]).logsumexp(-1)
    f = torch.where(f == torch.inf, 0.0, f)
    f_base, g_base = ((x + torch.randn_like(x) * 0.3).float() for x in (f, g))
    return Case(problem, Potentials(f_base, g_base, (f - f_base).float(), (g - g_base).float(), columns_first))


def empty(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def values(problem: Attention, e: int, dtype: torch.dtype, side: str) -> Tensor:
    """Vectors on the keys (B, G, M, e) or on the queries (B, H, N, e), NaN on padding."""
    lines = problem.key if side == "key" else problem.query
    padding = problem.key_padding if side == "key" else problem.query_padding
    x = torch.randn(*lines.shape[:3], e).to(dtype)
    return x if padding is None else x.masked_fill(padding[:, None, :, None], torch.nan)


def product(plan: Tensor, x: Tensor, problem: Attention, over: str) -> Tensor:
    """What ``apply`` is to leave, in the dtype of the plan."""
    x = x.nan_to_num(0.0).to(plan.dtype)
    return plan @ heads(x, problem) if over == "cols" else groups(plan.mT @ x, problem)


def factors(c: Case, dropout: Dropout) -> Tensor:
    """Z (B, H, N, M), by applying the plan to the identity."""
    b, h, n, _ = c.problem.query.shape
    m = c.problem.key.shape[2]
    out = empty(b, h, n, m)
    eye = torch.eye(m).expand(b, c.problem.key.shape[1], m, m)
    attention.apply(c.problem, "cols", c.at, eye, dropout, out)
    return (out / c.plan(DOUBLE) * (1 - dropout.p)).nan_to_num(0.0).round() / (1 - dropout.p)
