"""What a backward keeps of its sweeps is capped in bytes, whatever the batch, the sweeps and the device: as numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdsm._ops.problem import Gradients, Problem
from fastdsm.kernels.common import configuration
from fastdsm.kernels.common.configuration import history_programs, recorded
from fastdsm.kernels.panel import launch as panel
from fastdsm.kernels.registers import launch as registers
from fastdsm.kernels.tile import launch as tile

CAP = 268_435_456  # 256 MiB
NOWHERE = torch.device("meta")
KEPT = ("history_ptr", "aside_ptr", "work_ptr")


@pytest.fixture(autouse=True)
def _multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as an H100 has."""
    monkeypatch.setattr(configuration, "multiprocessors", lambda device: 132)


def test_programs() -> None:
    found = [history_programs(*x, NOWHERE) for x in ((10, 8, 1), (10**6, 8, 1), (10**6, 8, 2**22), (10**6, 8, 2**22 + 1))]
    assert found == [10, 8 * 132, 64, 63]
    assert history_programs(10**6, 8, CAP + 1, NOWHERE) == 1


def of_tile(problem: Problem, grad: Tensor, gradients: Gradients) -> None:
    tile.sinkhorn_backward(problem, grad, gradients, None)


def of_panel(problem: Problem, grad: Tensor, gradients: Gradients) -> None:
    panel.sinkhorn_backward(problem, grad, gradients, None)


@pytest.mark.parametrize(
    ("backward", "size", "sweeps"),
    [
        (of_tile, 64, 5000),
        (of_tile, 6, 5000),
        (of_panel, 256, 500),
        (registers.sinkhorn_backward, 8, 300),
        (registers.sinkhorn_backward, 5, 300),
    ],
)
def test_bytes_of_a_backward(backward: Callable[[Problem, Tensor, Gradients], None], size: int, sweeps: int) -> None:
    """All of the cap that whole programs can use, and what one matrix needs where the sweeps are few."""
    logits = torch.empty(1 << 20, size, size, device=NOWHERE)
    with recorded() as launches:
        for n_iters in (sweeps, 20):
            backward(Problem(logits, n_iters), logits, Gradients(logits))
    long, short = launches
    held = [sum(x.arguments[name].nbytes for name in KEPT if name in x.arguments) for x in launches]
    assert 1 < long.programs < short.programs <= 1 << 20
    assert held[0] <= CAP < held[0] * (long.programs + 1) / long.programs
    assert held[1] < CAP
