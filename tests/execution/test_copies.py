"""Kernels whose matrices each decide for themselves, in lanes that hold copies of what they decide by: the copies agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ..uninterpreted import rows_of

pytestmark = pytest.mark.slow

LINES = 16  # larger tiles take minutes to compile, and more entries of a matrix to a thread
# Bounds of sigma2 decide by what sigma2 does; of the slack, which nothing hangs on, their copies may differ.
DECIDING = ("_newton_tile_fwd", "_implicit_tile_bwd", "_temperature_tile_fwd", "_sigma2_fwd")


def _counts() -> list[dict[str, int]]:
    """Products joined to sums across lanes, by kernel and label, 32 and 64 bits; "one row": of 4x4 tiles that lie otherwise."""
    from benchmarks.execution.contraction import joined
    from benchmarks.execution.hook import Execution  # not where kernels are interpreted
    from fastdsm import kernels

    execution, found = Execution("sm_90"), {}
    for configuration in kernels.configurations():
        name = configuration.kernel.fn.__name__
        small = configuration.constants.get("P", 4) <= LINES and not {"fp16", "bf16"} & set(configuration.label.split())
        if not (small and name.startswith(DECIDING) and "sm_90" in configuration.targets):
            continue
        found[f"{name} {configuration.label}"] = len(joined(execution.executable(configuration).module))
        if (name, configuration.label) == ("_newton_tile_fwd_kernel", "fp32 4"):
            other = replace(configuration, constants={**configuration.constants, "ROWS": 1, "COLS": 1})
            found["one row"] = len(joined(execution.executable(other).module))
    return [found]


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    found: dict[str, int] = rows_of(__name__, "_counts")[0]
    return found


def test_no_product_is_joined_to_a_sum_across_lanes(counts: dict[str, int]) -> None:
    seen = counts.pop("one row")
    assert len(counts) == 17
    assert {name for name, count in counts.items() if count} == set()
    assert seen > 0  # where a lane's share of a sum is one product
