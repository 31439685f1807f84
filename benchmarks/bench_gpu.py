"""What only a GPU is asked for: long heads, one large matrix, Newton's method beside sweeps, full batches, temperatures."""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from typing import Any, cast

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fastdsm

from .baselines import (
    ATTENTION,
    COLUMNS_THEN_ROWS,
    FIXED_POINT,
    attention_baselines,
    attention_definition,
    sinkhorn_eager,
    split,
)
from .bench_newton import MOST_SWEEPS, TOL, TOLERANCE
from .bench_sinkhorn import OURS
from .gpu_targets import (
    FEWER_SWEEPS,
    FLASH_SINKHORN,
    FULL_SHAPES,
    HEADS_SHAPE,
    MORE_SWEEPS,
    NEWTON_SHAPES,
    ONE_SHAPE,
    WIDE_SHAPE,
    of_sweeps,
)
from .harness import SHAPES, Case, Definition, Implementation, Outputs, measure
from .peers import peer, sinkhorn_peers
from .rows import BACKWARD, FORWARD
from .targets import ATTENTION_SWEEPS, FLASH, READ, TWENTY

# Half a unit in the last place of bfloat16 is 2^-9 of an output; plans and their gradients are rounded to it on the way.
BFLOAT16_TOLERANCE, BFLOAT16_GRADIENT_TOLERANCE = 1e-2, 4e-2

# The float32 search ends 3e-6 of sigma2 apart from that in float64, which moves a temperature by a few times as much.
SIGMA2, TEMPERATURE_TOLERANCE = 0.5, 1e-4


@pytest.fixture(autouse=True)
def _on_a_gpu(device: str) -> None:
    if device == "cpu":
        pytest.skip("asked of a GPU alone")


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", [HEADS_SHAPE, WIDE_SHAPE], ids=str)
def bench_attention_of_many_heads(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...], direction: str) -> None:
    """Attend with heads of 4,096 lines; flash attention's softmax is the yardstick of a half sweep."""
    operands = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    eager, _ = attention_baselines()
    implementations = [_attention(ATTENTION_SWEEPS, "fastdsm"), eager, _flash()]
    if direction == FORWARD:
        implementations += [_attention(MORE_SWEEPS), peer(FLASH_SINKHORN, "flash_sinkhorn", _flash_sinkhorn)]
    tolerances = BFLOAT16_TOLERANCE, BFLOAT16_GRADIENT_TOLERANCE
    measure(benchmark, Case("sinkhorn_attention", operands, direction, ATTENTION_SWEEPS, *tolerances), implementations)


def _attention(n_iters: int, name: str | None = None) -> Implementation:
    def attend(x: Tensor) -> Outputs:
        return (fastdsm.sinkhorn_attention(*split(x), n_iters=n_iters),)

    call = f"fastdsm.sinkhorn_attention(query, key, value, n_iters={n_iters})"
    definition = ATTENTION if n_iters == ATTENTION_SWEEPS else attention_definition(n_iters)
    return Implementation(name or of_sweeps(n_iters), call, attend, definition)


def _flash() -> Implementation:
    def softmax(x: Tensor) -> Outputs:
        query, key, value = (operand.unsqueeze(0) for operand in split(x))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return (scaled_dot_product_attention(query, key, value)[0],)

    def oracle(x: Tensor) -> Outputs:
        query, key, value = split(x)
        return ((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value,)

    call = "scaled_dot_product_attention(query, key, value), SDPBackend.FLASH_ATTENTION"
    return Implementation(FLASH, call, softmax, Definition("softmax attention", oracle))


def _flash_sinkhorn() -> Implementation:
    """Points x_i = s q_i and y_j = s k_j with 2 s^2 = d^-1/2: -|x_i - y_j|^2 = logits_ij - |x_i|^2 - |y_j|^2."""
    solve = import_module("flash_sinkhorn.sinkhorn_solvers").sinkhorn_flashstyle_alternating
    apply = import_module("flash_sinkhorn.kernels.apply_flash").apply_plan_mat_flashstyle

    def attend(x: Tensor) -> Outputs:
        scale = math.sqrt(x.shape[-1] ** -0.5 / 2)
        ones = torch.ones(x.shape[1], device=x.device)
        outs = []
        for query, key, value in zip(*split(x), strict=True):
            points, targets = scale * query.float(), scale * key.float()
            options: dict[str, Any] = {"eps": 1.0, "allow_tf32": True}
            f, g = solve(points, targets, ones, ones, n_iters=ATTENTION_SWEEPS, ott_convention=True, **options)
            f, g = f - points.square().sum(-1), g - targets.square().sum(-1)
            outs.append(apply(points, targets, f, g, ones.log(), ones.log(), value.float(), axis=1, **options))
        return (torch.stack(outs).to(x.dtype),)

    def oracle(x: Tensor) -> Outputs:
        query, key, value = split(x)
        points, targets = (math.sqrt(x.shape[-1] ** -0.5 / 2) * y for y in (query, key))
        norms = [y.square().sum(-1) for y in (points, targets)]
        logits = 2 * points @ targets.mT - norms[0].unsqueeze(-1) - norms[1].unsqueeze(-2)
        return (cast(Tensor, fastdsm.reference.sinkhorn(logits, n_iters=ATTENTION_SWEEPS)) @ value,)

    call = f"for each head: sinkhorn_flashstyle_alternating(q, k, n_iters={ATTENTION_SWEEPS}), apply_plan_mat_flashstyle"
    definition = Definition("log-domain sweeps on -|x_i - y_j|^2, times the value", oracle)
    return Implementation(FLASH_SINKHORN, call, attend, definition)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", FULL_SHAPES, ids=str)
def bench_full_batches(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...], direction: str) -> None:
    """Project batches that fill the chip."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    measure(benchmark, Case("sinkhorn", logits, direction), [OURS, sinkhorn_eager(), *sinkhorn_peers(logits, direction)])


def bench_sweep_of_one_matrix(benchmark: BenchmarkFixture, device: str) -> None:
    """Project one matrix of 268 MB: what a sweep takes beside reading it once."""
    logits = torch.randn(ONE_SHAPE, generator=torch.Generator().manual_seed(0)).to(device)

    def fewer(x: Tensor) -> Outputs:
        return (fastdsm.sinkhorn(x, n_iters=FEWER_SWEEPS),)

    def oracle(x: Tensor) -> Outputs:
        return (cast(Tensor, fastdsm.reference.sinkhorn(x, n_iters=FEWER_SWEEPS)),)

    definition = Definition(f"{FEWER_SWEEPS} log-domain sweeps, columns then rows", oracle)
    call = f"fastdsm.sinkhorn(x, n_iters={FEWER_SWEEPS})"
    sums = Definition("sums of the rows", lambda x: (x.sum(-1),))
    implementations = [
        OURS,
        sinkhorn_eager(),
        Implementation(of_sweeps(FEWER_SWEEPS), call, fewer, definition, capturable=True),
        Implementation(READ, "x.sum(-1)", lambda x: (x.sum(-1),), sums, capturable=True),
    ]
    measure(benchmark, Case("sinkhorn", logits, FORWARD), implementations)


@pytest.mark.parametrize("shape", NEWTON_SHAPES, ids=str)
def bench_newton_beside_twenty_sweeps(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...]) -> None:
    """Converge projections of normal logits of standard deviation 2."""
    logits = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def newton(x: Tensor) -> Outputs:
        return (fastdsm.sinkhorn(x, solver="newton", tol=TOL),)

    def sweeps(x: Tensor) -> Outputs:
        return (fastdsm.sinkhorn(x, tol=TOL, n_iters=MOST_SWEEPS),)

    by_newton, by_sweeps = f'solver="newton", tol={TOL:g}', f"tol={TOL:g}, n_iters={MOST_SWEEPS}"
    implementations = [
        Implementation("fastdsm", f"fastdsm.sinkhorn(x, {by_newton})", newton, FIXED_POINT, capturable=True),
        Implementation("eager", f"fastdsm.sinkhorn(x, {by_sweeps})", sweeps, FIXED_POINT, capturable=True),
        Implementation(TWENTY, OURS.call, OURS.function, COLUMNS_THEN_ROWS, capturable=True),
    ]
    measure(benchmark, Case("newton", logits, FORWARD, None, TOLERANCE, None), implementations)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def bench_temperature(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...]) -> None:
    """Find the temperature at which plans of standard normal logits have a sigma2 of a half: one launch beside many."""

    def search(x: Tensor, backend: str) -> Outputs:
        temperature, reached = fastdsm.temperature_for_sigma2(x, SIGMA2, backend=backend)
        return temperature, reached.to(temperature)

    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    by_torch = partial(search, backend="torch")
    definition = Definition(f"the temperature of sigma2 = {SIGMA2}, and that there is one", by_torch)
    call = f"fastdsm.temperature_for_sigma2(x, {SIGMA2})"
    implementations = [
        Implementation("fastdsm", call, partial(search, backend="auto"), definition),
        Implementation("eager", f'{call[:-1]}, backend="torch")', by_torch, definition),
    ]
    measure(benchmark, Case("temperature_for_sigma2", logits, FORWARD, None, TEMPERATURE_TOLERANCE, None), implementations)
