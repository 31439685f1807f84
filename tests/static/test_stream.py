"""The machine code of the stream kernels: nothing spills, and a sweep reads the matrix once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.static.compilation import compile_configuration, disassemble
from benchmarks.static.launches import recorded
from benchmarks.static.report import analyse, faults
from benchmarks.static.sass import parse
from fastdsm import kernels
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm.kernels.common.configuration import TARGETS, Configuration

from ..uninterpreted import rows_of

N = 2048


def _passes() -> dict[str, Configuration]:
    """What serves a sweep of an ordinary call, its adjoint, and a pass of sigma2."""
    logits, other = torch.empty(1, N, N), torch.empty(1, N, N)
    with recorded() as launches:
        kernels.sinkhorn_forward(Problem(logits, 5), Outputs(other))
        kernels.sinkhorn_backward(Problem(logits, 5), other, Gradients(torch.empty_like(logits)), None)
        kernels.sigma2(other, None, None, None, 1e-4, other[:, 0, 0], other[:, 0], other[:, :, 0])
    passes = [x for x in launches if ("lines" in x.arguments and x.arguments.get("t") == 3) or "direction_ptr" in x.arguments]
    return {x.configuration.kernel.fn.__name__: x.configuration for x in passes}


def _loads(configuration: Configuration) -> tuple[list[int], int]:
    """Bytes that a program loads by instructions of 16 bytes a thread, into registers or shared memory: in each loop with such
    loads but for loops in it, and outside of loops."""
    program = parse(disassemble(compile_configuration(configuration, "sm_90").cubin)[1])
    each = [
        16 * 32 * configuration.num_warps * sum(x.base in ("LDG", "LDGSTS") and ".128" in x.opcode for x in block.instructions)
        for block in program.blocks
    ]
    loops = [set(loop.blocks) for loop in program.loops]
    inner = [loop for loop in loops if any(loop < other for other in loops)]
    within = [sum(each[index] for index in loop.difference(*inner)) for loop in loops if loop not in inner]
    return [count for count in within if count], sum(each[index] for index in set(range(len(each))).difference(*loops))


def _analyse() -> list[dict[str, Any]]:
    """Each pass: its faults by target, its loads. In a process of its own: see ``rows``."""
    rows = []
    for name, configuration in _passes().items():
        inside, outside = _loads(configuration)
        found = {target: faults(analyse(configuration, target, [])) for target in TARGETS}
        rows.append(
            {
                "kernel": name,
                "rows": configuration.constants["ROWS"],
                "ahead": configuration.constants["STAGES"] - 1,
                "faults": found,
                "inside": inside,
                "outside": outside,
            }
        )
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return rows_of(__name__, "_analyse")


def test_no_pass_spills(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 3
    assert {row["kernel"]: row["faults"] for row in rows if any(row["faults"].values())} == {}


def test_a_pass_reads_the_matrix_once(rows: list[dict[str, Any]]) -> None:
    """The loop that loads vectors goes over groups of rows, and loads what one holds; outside are the groups that are loaded
    ahead of the loop, and the column vectors. Loops in it are the first sweep's, over pieces of its rows."""
    for row in rows:
        group = row["rows"] * N * 4
        assert row["inside"] == [group]
        assert row["outside"] <= row["ahead"] * group + 3 * N * 4
