"""What the monitor records over two processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastdsm
from fastdsm.diagnostics import SpectralMonitor
from fastdsm.diagnostics.measured import Row

from .pool import SIZE, Pool

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def plans() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 2, 5, 5) * torch.linspace(0.2, 3, 6)[:, None, None, None]


def recorded(together: bool) -> list[Row]:
    layer = fastdsm.nn.SinkhornProjection()
    with SpectralMonitor(layer, processes=dist.group.WORLD if together else None) as monitor:
        layer(plans().chunk(SIZE)[dist.get_rank()])
    return monitor.rows


def test_rows_of_all_processes(workers: Pool) -> None:
    layer = fastdsm.nn.SinkhornProjection()
    with SpectralMonitor(layer) as monitor:
        layer(plans())
    (expected,) = monitor.rows
    own = workers.run(recorded, False)
    assert own[0][0].sigma2 != own[1][0].sigma2
    for ((row,),) in zip(workers.run(recorded, True), strict=True):
        assert row[:3] == expected[:3]
        assert row[3:9] == pytest.approx(expected[3:9], rel=1e-5, abs=1e-7)


def of_shards() -> tuple[float, int]:
    """A layer that is called with a DTensor, and one whose plan no process has."""
    from fastdsm.distributed import SinkhornContextParallel

    mesh = init_device_mesh("cpu", (SIZE,))
    layer = fastdsm.nn.SinkhornProjection()
    with SpectralMonitor(layer) as monitor:
        layer(distribute_tensor(plans(), mesh, [Shard(0)]))
    attention = fastdsm.nn.SinkhornAttention(8, 2, batch_first=True)
    SinkhornContextParallel()._apply(attention, mesh)
    x = torch.randn(1, 4, 8)
    with SpectralMonitor(nn.Sequential(attention)) as other:
        attention(x, x, x, need_weights=False)
    with pytest.raises(ValueError, match="on no process"):
        attention.plan(x, x)
    return monitor.rows[0].sigma2, len(other.rows)


def test_dtensors(workers: Pool) -> None:
    own = workers.run(recorded, False)
    for rows, (sigma2, others) in zip(own, workers.run(of_shards), strict=True):
        assert sigma2 == pytest.approx(rows[0].sigma2, rel=1e-6)
        assert others == 0
