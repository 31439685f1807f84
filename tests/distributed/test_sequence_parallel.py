"""mHC under tensor and sequence parallelism on two processes, alone and under FSDP2: one process's values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import fastdsm

from .pool import SIZE, Pool

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
WIDTH, STREAMS, TOKENS = 8, 4, 6
PLAN = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1)), "3": RowwiseParallel(output_layouts=Shard(1))}


def block() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def connections() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [fastdsm.nn.HyperConnection(block(), WIDTH, streams=STREAMS, norm_weight=True) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.scale)
    return nn.Sequential(*layers).double()


def stack() -> fastdsm.nn.HyperConnections:
    torch.manual_seed(0)
    made = fastdsm.nn.HyperConnections([block(), block()], WIDTH, STREAMS, head=True).double()
    for layer in made.layers:
        nn.init.normal_(layer.scale)
    return made


def streams() -> Tensor:
    return torch.randn(2, TOKENS, STREAMS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slopes(net: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in net.named_parameters()}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def expected(net: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = net(x)
    out.square().sum().backward()
    return out.detach(), slopes(net)


def under(style: dict[str, bool], over: str) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's tokens of two connections in tensor and sequence parallelism, or of a stack of them."""
    from fastdsm.distributed import HyperConnectionParallel

    mesh = init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("data", "model"))
    model = mesh["model"]
    if over == "stack":
        net: nn.Module = stack()
        prefix = "layers."
        parallelize_module(net, model, HyperConnectionParallel(**style))
        x = streams()[:, :, 0]
    else:
        net, prefix, x = connections(), "", streams()
        parallelize_module(net, model, {str(i): HyperConnectionParallel(**style) for i in range(2)})
    for i in range(2):
        parallelize_module(net.get_submodule(f"{prefix}{i}.branch"), model, PLAN)
    if over == "FSDP2":
        for layer in net:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
    part = x.chunk(SIZE, 1)[dist.get_rank()].clone()
    if style:
        part = DTensor.from_local(part, model, [Shard(1)])
    out = net(part)
    assert isinstance(out, DTensor) == (not style.get("use_local_output", True))
    local = out.to_local() if isinstance(out, DTensor) else out
    local.square().sum().backward()
    return local.detach(), slopes(net)


@pytest.mark.parametrize("over", ["plain", "FSDP2", "stack"])
@pytest.mark.parametrize("style", [{}, {"use_local_output": False}], ids=str)
def test_one_process(workers: Pool, style: dict[str, bool], over: str) -> None:
    out, grads = expected(stack(), streams()[:, :, 0]) if over == "stack" else expected(connections(), streams())
    found = workers.run(under, style, over)
    torch.testing.assert_close(torch.cat([x for x, _ in found], 1), out, rtol=0, atol=1e-11)
    for _, theirs in found:
        assert theirs.keys() == grads.keys()
        for name, x in grads.items():
            torch.testing.assert_close(theirs[name], x, rtol=1e-11, atol=1e-11 * x.abs().max().item(), msg=name)


def refusals() -> list[str]:
    from fastdsm.distributed import HyperConnectionParallel, SinkhornContextParallel

    mesh = init_device_mesh("cpu", (SIZE,))
    layer, texts = connections()[0], []
    part = DTensor.from_local(streams().chunk(SIZE, 1)[dist.get_rank()], mesh, [Shard(1)])
    learnable = connections()[0]
    learnable.projection.temperature = nn.Parameter(torch.tensor(1.0))
    for kind, call in (
        (ValueError, lambda: layer(part)),
        (ValueError, lambda: stack()(part[:, :, 0])),
        (TypeError, lambda: parallelize_module(nn.Linear(2, 2), mesh, HyperConnectionParallel())),
        (TypeError, lambda: parallelize_module(nn.Linear(2, 2), mesh, SinkhornContextParallel())),
        (ValueError, lambda: parallelize_module(learnable, mesh, HyperConnectionParallel())),
    ):
        with pytest.raises(kind) as raised:
            call()
        texts.append(str(raised.value))
    sharded = connections()[0]
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(ValueError, match="whole on every process") as raised:
        sharded.read(streams()[0])
    return [*texts, str(raised.value)]


def test_what_is_refused(workers: Pool) -> None:
    words = (
        "HyperConnectionParallel",
        "HyperConnectionParallel",
        "Linear",
        "Linear",
        "temperature",
        "fully_shard",
    )
    for texts in workers.run(refusals):
        assert all(word in text for word, text in zip(words, texts, strict=True)), texts


def replicas() -> bool:
    """Parameters that tensor parallelism has replicated beside streams that are whole on every process."""
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (SIZE,))
    net = connections()[0]
    for name, p in list(net.named_parameters(recurse=False)):
        net.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
    net(streams()).square().sum().backward()
    _, grads = expected(connections()[0], streams())
    return all(torch.allclose(whole(p.grad), grads[name], atol=1e-11) for name, p in net.named_parameters())


def test_parameters_that_are_replicated(workers: Pool) -> None:
    assert workers.run(replicas) == [True] * SIZE
