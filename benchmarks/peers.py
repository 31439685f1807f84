"""Other packages that do parts of this job, each through its own public call, imported only where it is installed.

Several differ in what they compute; each is held against its own definition, and nothing is added to its call but what
brings logits into the form it takes. Where a package has several calls, the fastest on these sizes is measured: of
hyper-connections the log-domain one, of POT's batched ones the Bregman projection of exp(logits), on PyTorch tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from .baselines import COLUMNS_THEN_ROWS, ROWS_THEN_COLUMNS
from .harness import SWEEPS, Definition, Implementation, Outputs
from .rows import BACKWARD


def sinkhorn_peers(source: Tensor, direction: str) -> Iterator[Implementation]:
    """Every peer of :func:`fastdsm.sinkhorn` for this device; one that does not serve the case says why."""
    yield peer("hyper-connections", "hyper_connections", _hyper_connections)
    yield peer("POT", "ot", _pot)
    yield peer("GeomLoss", "geomloss", lambda: _geomloss(source))
    if source.is_cuda:
        yield peer("Liger", "liger_kernel", lambda: _liger(source))
        yield peer("flash-sinkhorn", "flash_sinkhorn", lambda: _flash_sinkhorn(source, direction))


def peer(name: str, module: str, build: Callable[[], Implementation]) -> Implementation:
    """What ``build`` makes of an installed ``module``; where it is missing, or has no such call, a row that says so."""
    if not find_spec(module):
        return _left_out(name, "not installed")
    try:
        return build()
    except (ImportError, AttributeError, TypeError) as error:
        return _left_out(name, f"has no such call in this version: {error}")


def _left_out(name: str, reason: str) -> Implementation:
    return Implementation(name, "", lambda x: (x,), Definition("", lambda x: (x,)), left_out=reason)


def _hyper_connections() -> Implementation:
    from hyper_connections.mHCv2 import log_domain_sinkhorn_knopps

    call = f"hyper_connections.mHCv2.log_domain_sinkhorn_knopps(x, iters={SWEEPS})"
    return Implementation(
        "hyper-connections", call, lambda x: (log_domain_sinkhorn_knopps(x, iters=SWEEPS),), COLUMNS_THEN_ROWS
    )


def _pot() -> Implementation:
    from ot.batch import bregman_projection_batch

    def plan(x: Tensor) -> Outputs:
        # Its own marginals, 1 / n, lie on the CPU.
        a, b = (torch.full_like(x[:, :, 0], 1 / x.shape[1]), torch.full_like(x[:, 0], 1 / x.shape[2]))
        return (bregman_projection_batch(x.exp(), a, b, max_iter=SWEEPS, tol=0.0, grad="autodiff")["T"],)

    call = f'ot.batch.bregman_projection_batch(x.exp(), 1 / n, 1 / m, max_iter={SWEEPS}, tol=0.0, grad="autodiff")'
    return Implementation("POT", call, plan, ROWS_THEN_COLUMNS)


def _geomloss(source: Tensor) -> Implementation:
    from geomloss.ot import solve_batch

    spread = max(float(source.amax() - source.amin()), 1.0)
    temperatures = [spread ** (1 - step / (SWEEPS - 1)) for step in range(SWEEPS)]
    return Implementation(
        "GeomLoss",
        f"geomloss.ot.solve_batch(-x, reg=1.0, max_iter={SWEEPS}).plan",
        lambda x: (solve_batch(-x, reg=1.0, max_iter=SWEEPS).plan,),
        Definition(
            "annealed averaged sweeps and one full one, total 1; gradient of the last sweep alone",
            lambda x: (_annealed_plan(x, temperatures),),
        ),
    )


def _annealed_plan(logits: Tensor, temperatures: list[float]) -> Tensor:
    """GeomLoss's solver on the cost -logits with marginals 1 / n, from its published algorithm.

    At each temperature both potentials average with their update; at the end both are updated once more, at once, and
    through that alone the gradient flows.
    """
    n = logits.shape[-1]

    def updated(f: Tensor, g: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        of_rows = torch.logsumexp((logits + g.unsqueeze(-2)) / temperature - math.log(n), -1)
        of_columns = torch.logsumexp((logits + f.unsqueeze(-1)) / temperature - math.log(n), -2)
        return -temperature * of_rows, -temperature * of_columns

    with torch.no_grad():
        half_mean = 0.5 * logits.mean((-2, -1)).unsqueeze(-1)
        f, g = half_mean - logits.mean(-1), half_mean - logits.mean(-2)
        for temperature in temperatures:
            next_f, next_g = updated(f, g, temperature)
            f, g = 0.5 * (f + next_f), 0.5 * (g + next_g)
    f, g = updated(f, g, 1.0)
    return torch.exp(logits + f.unsqueeze(-1) + g.unsqueeze(-2)) / n**2


def _liger(source: Tensor) -> Implementation:
    """Liger projects inside the coefficients of hyper-connections: identity weights bring the logits there."""
    n = source.shape[-1]
    if n != 4:
        return _left_out("Liger", "its projection is part of hyper-connections of 4 streams")
    liger_mhc_coeffs = import_module("liger_kernel.transformers.functional").liger_mhc_coeffs
    streams = torch.zeros(2 * n, device=source.device)
    weights = torch.eye(n * n, device=source.device)
    weights = torch.cat([streams.expand(n * n, -1), weights], dim=1)
    bias = torch.zeros(n * n + 2 * n, device=source.device)
    one = torch.ones((), device=source.device)

    def plan(x: Tensor) -> Outputs:
        return (liger_mhc_coeffs(x, weights, bias, one, one, one, allow_fp32=True, tmax=SWEEPS)[2],)

    call = f"liger_kernel.transformers.functional.liger_mhc_coeffs(x, [0, I], 0, 1, 1, 1, allow_fp32=True, tmax={SWEEPS})[2]"
    return Implementation("Liger", call, plan, Definition("RMS norm of 16 logits; softmax + eps, sweeps with eps", _with_eps))


def _with_eps(x: Tensor, eps: float = 1e-6) -> Outputs:
    """Liger's variant: RMS-normalised logits, a softmax, then divisions by sums, eps added each time."""
    logits = x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + eps)
    plan = logits.softmax(-1) + eps
    plan = plan / (plan.sum(-2, keepdim=True) + eps)
    for _ in range(SWEEPS - 1):
        plan = plan / (plan.sum(-1, keepdim=True) + eps)
        plan = plan / (plan.sum(-2, keepdim=True) + eps)
    return (plan,)


def _flash_sinkhorn(source: Tensor, direction: str) -> Implementation:
    """Points x_i = logits_i / 2 and y_j = e_j: -|x_i - y_j|^2 = logits_ij - |x_i|^2 - 1."""
    name, n = "flash-sinkhorn", source.shape[-1]
    if direction == BACKWARD:
        return _left_out(name, "no gradient of the plan")
    if n < 256:
        return _left_out(name, "takes one matrix at a time: a Python loop over the batch")
    solve = import_module("flash_sinkhorn.sinkhorn_solvers").sinkhorn_flashstyle_alternating
    targets = torch.eye(n, device=source.device)
    ones = torch.ones(n, device=source.device)
    options = {"eps": 1.0, "n_iters": SWEEPS, "allow_tf32": False, "ott_convention": True}

    def plan_of(logits: Tensor) -> Tensor:
        f, g = solve(logits / 2, targets, ones, ones, **options)
        return torch.exp(_scores(logits) + f.unsqueeze(-1) + g)

    call = f"for each: flash_sinkhorn.sinkhorn_solvers.sinkhorn_flashstyle_alternating(x / 2, I, 1, 1, n_iters={SWEEPS})"
    definition = Definition("columns then rows on -|x_i / 2 - e_j|^2", lambda x: COLUMNS_THEN_ROWS.function(_scores(x)))
    return Implementation(name, call, lambda x: (torch.stack([plan_of(matrix) for matrix in x]),), definition)


def _scores(logits: Tensor) -> Tensor:
    return logits - (logits / 2).square().sum(-1, keepdim=True) - 1.0
