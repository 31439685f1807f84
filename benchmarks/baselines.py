"""What one would write without fastdsm: eager loops, torch.compile of them, and full decompositions for sigma2."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

import fastdsm

from .harness import SWEEPS, Definition, Implementation, Outputs
from .targets import ATTENTION_SWEEPS


def sinkhorn_loop(logits: Tensor) -> Tensor:
    """Log-domain Sinkhorn as it is usually written, alternating torch.logsumexp; differentiated by autograd."""
    row_potential = torch.zeros_like(logits[..., 0])
    for _ in range(SWEEPS):
        col_potential = -torch.logsumexp(logits + row_potential.unsqueeze(-1), dim=-2)
        row_potential = -torch.logsumexp(logits + col_potential.unsqueeze(-2), dim=-1)
    return torch.exp(logits + row_potential.unsqueeze(-1) + col_potential.unsqueeze(-2))


def log_softmax_loop(logits: Tensor) -> Tensor:
    """The other usual loop, alternating torch.log_softmax; differentiated by autograd."""
    for _ in range(SWEEPS):
        logits = torch.log_softmax(torch.log_softmax(logits, dim=-2), dim=-1)
    return torch.exp(logits)


def attention_loop(operands: Tensor) -> Tensor:
    """Sinkhorn attention as it is usually written, the logits and every sweep's stored; operands: :func:`split`.

    Of 16-bit operands the logits become float32, as under autocast: potentials of 16 bits would err by hundredths.
    """
    query, key, value = split(operands)
    logits = (query @ key.mT).float() * query.shape[-1] ** -0.5
    row_potential = torch.zeros_like(logits[..., 0])
    for _ in range(ATTENTION_SWEEPS):
        col_potential = -torch.logsumexp(logits + row_potential.unsqueeze(-1), dim=-2)
        row_potential = -torch.logsumexp(logits + col_potential.unsqueeze(-2), dim=-1)
    return torch.exp(logits + row_potential.unsqueeze(-1) + col_potential.unsqueeze(-2)).to(value.dtype) @ value


def split(operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (heads, N, d), views of operands (heads, N, 3, d)."""
    query, key, value = operands.unbind(-2)
    return query, key, value


def mean_free(plan: Tensor) -> Tensor:
    """(I - J) P (I - J) of square matrices with uniform marginals."""
    centred = plan - plan.mean(-2, keepdim=True)
    return centred - centred.mean(-1, keepdim=True)


def sigma2_by_svdvals(plan: Tensor) -> Tensor:
    """Every singular value, and the largest of them."""
    return torch.linalg.svdvals(mean_free(plan))[..., 0]


def sigma2_by_eigvalsh(plan: Tensor) -> Tensor:
    """Every eigenvalue of the Gram matrix, and the root of the largest."""
    matrix = mean_free(plan)
    return torch.linalg.eigvalsh(matrix.mT @ matrix)[..., -1].clamp(min=0).sqrt()


def _oracle_sinkhorn(x: Tensor, first: str = "col") -> Outputs:
    return (cast(Tensor, fastdsm.reference.sinkhorn(x, n_iters=SWEEPS, first=first)),)


def _oracle_fixed_point(x: Tensor) -> Outputs:
    return (cast(Tensor, fastdsm.reference.sinkhorn(x, solver="newton")),)


def _oracle_both(x: Tensor) -> Outputs:
    spectrum = fastdsm.reference.sinkhorn_sigma2(x, n_iters=SWEEPS)
    return spectrum.plan, spectrum.sigma2


COLUMNS_THEN_ROWS = Definition("log-domain sweeps, columns then rows", _oracle_sinkhorn)
ROWS_THEN_COLUMNS = Definition(
    "log-domain sweeps, rows then columns, total 1", lambda x: (_oracle_sinkhorn(x, "row")[0] / x.shape[-1],)
)
FIXED_POINT = Definition("the limit of the sweeps", _oracle_fixed_point)
PLAN_AND_SIGMA2 = Definition("the plan, and the norm of its mean-free part", _oracle_both)
SIGMA2 = Definition("norm of the mean-free part", lambda x: (fastdsm.reference.sigma2(x),))
SIGMA2_TWICE = Definition("norm of the mean-free part, from below and above", lambda x: SIGMA2.function(x) * 2)


def attention_definition(n_iters: int) -> Definition:
    """Sinkhorn attention of operands (heads, N, 3, d)."""

    def oracle(x: Tensor) -> Outputs:
        query, key, value = (operand.unsqueeze(0) for operand in split(x))
        return (cast(Tensor, fastdsm.reference.sinkhorn_attention(query, key, value, n_iters=n_iters))[0],)

    return Definition(f"{n_iters} log-domain sweeps, columns then rows, times the value", oracle)


ATTENTION = attention_definition(ATTENTION_SWEEPS)


def attention_baselines() -> list[Implementation]:
    """The eager loop and torch.compile of it."""
    compiled = torch.compile(attention_loop, fullgraph=True, dynamic=False)
    return [
        Implementation("eager", "loop of torch.logsumexp", lambda x: (attention_loop(x),), ATTENTION),
        Implementation("torch.compile", "torch.compile(loop)", lambda x: (compiled(x),), ATTENTION),
    ]


def sinkhorn_baselines() -> list[Implementation]:
    """The eager loop and torch.compile of it, compiled anew: static shapes, one graph."""
    compiled = torch.compile(sinkhorn_loop, fullgraph=True, dynamic=False)
    return [
        sinkhorn_eager(),
        Implementation("torch.compile", "torch.compile(loop)", lambda x: (compiled(x),), COLUMNS_THEN_ROWS, capturable=True),
    ]


def sinkhorn_eager() -> Implementation:
    """The eager loop."""
    call = "loop of torch.logsumexp"
    return Implementation("eager", call, lambda x: (sinkhorn_loop(x),), COLUMNS_THEN_ROWS, capturable=True)
