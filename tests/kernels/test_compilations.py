"""Nothing that varies at run time compiles a kernel anew, and a call is one launch or two: counted without a GPU.

The launchers run in a process of their own: under the interpreter of the other tests nothing is ever compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import triton

from benchmarks.static.launches import recorded
from benchmarks.static.report import identify
from fastdsm import kernels
from fastdsm._ops.problem import Gradients, Outputs, Problem, compute_dtype
from fastdsm.kernels.common.configuration import Configuration
from fastdsm.kernels.registers import launch_converged as registers_converged
from fastdsm.kernels.tile import launch_converged as tile_converged

from ..launched import misfits
from ..uninterpreted import rows_of

SIZES = ((1, 1), (4, 4), (3, 5), (7, 7), (20, 20), (64, 33), (200, 130))
BATCHES = (1, 16, 31, 132)
SWEEPS = (0, 1, 3, 16, 20)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _numbers(n: int, m: int, dtype: torch.dtype) -> Iterator[Problem]:
    """Problems that differ in batch, sweeps and temperature alone."""
    inner = compute_dtype(dtype)
    for batch in BATCHES:
        yield Problem(torch.zeros(batch, n, m, dtype=dtype), 20)
    logits = torch.zeros(16, n, m, dtype=dtype)
    for n_iters in SWEEPS:
        yield Problem(logits, n_iters)
    for temperature in (1.0, 0.3, 2, torch.ones(16, dtype=inner), torch.ones(1, dtype=inner).expand(16)):
        yield Problem(logits, 20, temperature=temperature)


def _options(n: int, m: int, dtype: torch.dtype) -> Iterator[Problem]:
    """Problems with other strides, alignment, marginals, start, mask, tolerance, or many sweeps."""
    inner = compute_dtype(dtype)
    logits = torch.zeros(16, n, m, dtype=dtype)
    yield Problem(torch.zeros(16, m, n, dtype=dtype).transpose(1, 2), 20)
    yield Problem(torch.zeros(32, n, m, dtype=dtype)[::2], 20)
    yield Problem(torch.zeros(16 * n * m + 1, dtype=dtype)[1:].view(16, n, m), 20)
    rows, columns = torch.full((16, n), 1 / n, dtype=inner), torch.full((1, m), 1 / m, dtype=inner).expand(16, m)
    yield Problem(logits, 20, row_marginal=rows, col_marginal=columns)
    yield Problem(logits, 20, col_marginal=columns, unit_rows=False)
    yield Problem(logits, 20, f0=torch.zeros(16, n, dtype=inner))
    yield Problem(logits, 20, mask=torch.ones(16, n, m, dtype=torch.bool))
    yield Problem(logits, 20, tol=1e-3)
    yield Problem(logits, 100)


def _outputs(problem: Problem, info: bool, sigma2: bool) -> Outputs:
    batch, n, m = problem.logits.shape
    new = partial(torch.empty, dtype=problem.compute_dtype)
    plan = torch.empty(batch, n, m, dtype=problem.logits.dtype)
    spectrum = new(batch) if sigma2 else None
    if not info:
        return Outputs(plan, sigma2=spectrum)
    return Outputs(plan, new(batch), torch.empty(batch, dtype=torch.int32), new(batch, n), new(batch, m), spectrum)


def _gradients(problem: Problem, marginals: bool) -> Gradients:
    batch, n, m = problem.logits.shape
    new = partial(torch.empty, dtype=problem.compute_dtype)
    logits = torch.empty(batch, n, m, dtype=problem.logits.dtype)
    return Gradients(logits, new(batch, n), new(batch, n), new(batch, m)) if marginals else Gradients(logits)


def _calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """What a call is for, with the name of its family, and the call."""
    for (n, m), dtype, (name, problems) in product(SIZES, DTYPES, (("numbers", _numbers), ("options", _options))):
        for problem in problems(n, m, dtype):
            for info, sigma2 in product((False, True), repeat=2):
                outputs = _outputs(problem, info, sigma2)
                family = f"{name}: forward {n}x{m} {dtype}{' info' * info}{' sigma2' * sigma2}"
                yield family, partial(kernels.sinkhorn_forward, problem, outputs)
                if registers_converged.supports_forward(problem, outputs) or tile_converged.supports_forward(problem, sigma2):
                    yield f"newton {family}", partial(kernels.newton_forward, problem, outputs)
            cotangent = torch.zeros_like(problem.logits)
            sweeps = torch.full((problem.logits.shape[0],), problem.n_iters, dtype=torch.int32)
            for marginals in (False, True):
                arguments = problem, cotangent, _gradients(problem, marginals), sweeps
                family = f"{name}: backward {n}x{m} {dtype}{' marginals' * marginals}"
                yield family, partial(kernels.sinkhorn_backward, *arguments)
                small = registers_converged.supports_backward(problem, cotangent, arguments[2])
                if small or tile_converged.supports_backward(problem):
                    g = torch.zeros(problem.logits.shape[0], m)
                    yield f"implicit {family}", partial(kernels.implicit_backward, problem, cotangent, g, arguments[2])


class _NullKernel:
    """Stands in for a compiled kernel; a launch of it is one entry more in ``launched``."""

    def __init__(self, launched: list[str], name: str) -> None:
        self.launched, self.name = launched, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.launched.append(self.name)


def _count() -> list[dict[str, Any]]:
    """Run every call without a device; per call: its name, launches, compilations, and the configurations it used.

    What launches ask to be compiled is counted and not done (the ahead-of-time tests do that).
    """
    launched: list[str] = []
    compiled: list[str] = []

    def compile_nothing(source: Any, target: Any, options: Any) -> _NullKernel:
        compiled.append(source.name)
        return _NullKernel(launched, source.name)

    triton.compile = compile_nothing
    table = {identify(configuration) for configuration in kernels.configurations()}
    used: list[str] = []
    unfit: list[str] = []
    launch = Configuration.launch

    def watched(configuration: Configuration, programs: int, **arguments: Any) -> None:
        used.append(identify(configuration))
        unfit.extend(misfits(configuration, arguments))
        launch(configuration, programs, **arguments)

    Configuration.launch = watched
    rows = []
    for name, call in _calls():
        counts = len(launched), len(compiled), len(used), len(unfit)
        call()
        keys = used[counts[2] :]
        rows.append(
            {
                "name": name,
                "launches": len(launched) - counts[0],
                "compilations": len(compiled) - counts[1],
                "configurations": keys,
                "strays": [key for key in keys if key not in table],
                "unfit": unfit[counts[3] :],
            }
        )
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return rows_of(__name__, "_count")


def test_every_call_is_one_launch(rows: list[dict[str, Any]]) -> None:
    """But for Newton's method on tiles, which is launched after sweeps unless it is to make one or none."""
    kernels_of = {row["name"]: [json.loads(key)[0] for key in row["configurations"]] for row in rows if row["launches"] != 1}
    assert kernels_of
    assert {name: x for name, x in kernels_of.items() if x != ["_sinkhorn_tile_fwd_kernel", "_newton_tile_fwd_kernel"]} == {}


def test_every_launch_is_in_the_finite_table(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["strays"]] == []


def test_every_launch_passes_what_its_kernel_is_compiled_for(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["unfit"]] == []


def test_a_configuration_compiles_once_whatever_varies(rows: list[dict[str, Any]]) -> None:
    used = {key for row in rows for key in row["configurations"]}
    assert sum(row["compilations"] for row in rows) == len(used)


def test_batch_sweeps_and_temperature_never_choose_the_kernel(rows: list[dict[str, Any]]) -> None:
    by_family: dict[str, set[str]] = {}
    for row in rows:
        if row["name"].startswith("numbers"):
            by_family.setdefault(row["name"], set()).update(row["configurations"])
    assert len(by_family) == len(SIZES) * len(DTYPES) * 6
    assert {name: keys for name, keys in by_family.items() if len(keys) != 1} == {}


def _keys() -> list[str]:
    """What Triton's cache knows the kernels by."""
    return sorted({configuration.kernel.cache_key for configuration in kernels.configurations()})


def test_each_process_finds_the_kernels_of_the_last_in_tritons_cache() -> None:
    keys = rows_of(__name__, "_keys")
    assert len(keys) > 20
    assert rows_of(__name__, "_keys") == keys


def test_an_empty_batch_launches_nothing() -> None:
    with recorded() as launches:
        problem = Problem(torch.zeros(0, 4, 4), 20)
        kernels.sinkhorn_forward(problem, _outputs(problem, True, True))
    assert sum(launch.programs for launch in launches) == 0
