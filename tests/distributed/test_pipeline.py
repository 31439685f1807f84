"""mHC cut into pipeline stages on two processes: streams cross as one tensor (..., n, C)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastdsm

from .pool import Pool

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
WIDTH, STREAMS, TOKENS, BATCH, PARTS = 6, 4, 3, 4, 2


class Stage(nn.Module):
    """Half of a network: the first expands to streams, the second takes their mean."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList(fastdsm.nn.HyperConnection(nn.Linear(WIDTH, WIDTH), WIDTH, STREAMS) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0].expand(x).contiguous() if self.first else x
        for layer in self.layers:
            x = layer(x)
        return x if self.first else self.layers[0].reduce(x)


def stages() -> list[Stage]:
    torch.manual_seed(0)
    return [Stage(True), Stage(False)]


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, TOKENS, WIDTH)


def loss(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum()


def piped() -> tuple[dict[str, Tensor], list[Tensor]]:
    """The gradients of this process's stage, and its losses."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank = dist.get_rank()
    stage = stages()[rank]
    x, target = data()
    losses: list[Tensor] = []
    schedule = ScheduleGPipe(PipelineStage(stage, rank, 2, torch.device("cpu")), PARTS, loss_fn=loss, scale_grads=False)
    schedule.step(*([x] if rank == 0 else []), **({"target": target, "losses": losses} if rank == 1 else {}))
    return {name: p.grad for name, p in stage.named_parameters()}, [x.detach() for x in losses]


def test_stages(workers: Pool) -> None:
    first, second = stages()
    x, target = data()
    total = loss(second(first(x)), target)
    total.backward()
    (of_first, _), (of_second, losses) = workers.run(piped)
    torch.testing.assert_close(torch.stack(losses).sum(), total.detach(), rtol=1e-5, atol=1e-5)
    for stage, found in ((first, of_first), (second, of_second)):
        for name, p in stage.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)
