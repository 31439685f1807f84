"""mHC and Sinkhorn layers under DDP and FSDP2 on two gloo processes: the gradient of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastdsm

from .pool import SIZE, Pool

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
BATCH, LINES, STREAMS, WIDTH = 4, 5, 4, 12
EXACT, BRAIN = 1e-11, 3e-2


class Attending(nn.Module):
    """A branch of one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = fastdsm.nn.SinkhornAttention(WIDTH, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    """Three mHC layers, one of them around Sinkhorn attention, with a learnable temperature and a floor under sigma2."""

    def __init__(self, rematerialise: bool | None = None, floor: float | None = None) -> None:
        super().__init__()
        branches = (nn.Linear(WIDTH, WIDTH), Attending(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
        self.layers = nn.ModuleList(fastdsm.nn.HyperConnection(x, WIDTH, streams=STREAMS) for x in branches)
        self.temperature = nn.Parameter(torch.tensor([0.8]))
        self.projection = fastdsm.nn.SinkhornProjection(sigma2_floor=floor)
        self.rematerialise = rematerialise

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.rematerialise is None else checkpoint(layer, x, use_reentrant=self.rematerialise)
        plans = self.projection(x[..., :STREAMS] * 3) + fastdsm.sinkhorn(x[..., :STREAMS], temperature=self.temperature)
        return torch.cat([x, plans @ x], -1)


def whole_batch() -> Tensor:
    return torch.randn(BATCH, LINES, STREAMS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(dtype: torch.dtype = torch.float64, **options: Any) -> Net:
    torch.manual_seed(0)
    net = Net(**options).to(dtype)
    for layer in net.layers:
        nn.init.normal_(layer.scale)
    return net


def slopes(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of the mean square of what comes out, whole, by the names of the bare net."""
    net(x).float().square().mean().backward() if x.dtype != torch.float64 else net(x).square().mean().backward()
    found = {}
    for name, p in net.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.replace("module.", "").replace("_orig_mod.", "")] = grad.detach().clone()
    return found


def mine(x: Tensor) -> Tensor:
    """This process's part of the batch."""
    return x.chunk(SIZE)[dist.get_rank()].clone().requires_grad_()


def replicated(net: Net, **options: Any) -> nn.Module:
    return DistributedDataParallel(net, **options)


def sharded(net: Net, **options: Any) -> nn.Module:
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (SIZE,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def compiled(net: Net) -> nn.Module:
    torch.compiler.reset()
    return DistributedDataParallel(torch.compile(net, backend="aot_eager", fullgraph=True))


def hybrid(net: Net) -> nn.Module:
    return sharded(net, mesh=init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("replicas", "shards")))


# How a net is spread, and how it is made.
WAYS: dict[str, tuple[Callable[[Net], nn.Module], dict[str, Any]]] = {
    "DDP": (replicated, {}),
    "DDP, checkpoint": (replicated, {"rematerialise": False}),
    "DDP, reentrant checkpoint": (partial(replicated, static_graph=True), {"rematerialise": True}),
    "DDP, compiled": (compiled, {}),
    "DDP, floor": (replicated, {"floor": 0.9}),
    "FSDP2": (sharded, {}),
    "FSDP2, kept": (partial(sharded, reshard_after_forward=False), {}),
    "FSDP2, checkpoint": (sharded, {"rematerialise": False}),
    "FSDP2, floor": (sharded, {"floor": 0.9}),
    "HSDP": (hybrid, {}),
}


def trained(way: str) -> dict[str, Tensor]:
    spread, options = WAYS[way]
    return slopes(spread(made(**options)), mine(whole_batch()))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert x.abs().max() > 0
        assert (found[name].double() - x.double()).abs().max() <= tolerance * x.abs().max(), name


@pytest.mark.parametrize("way", WAYS)
def test_gradients(workers: Pool, way: str) -> None:
    expected = slopes(made(**WAYS[way][1]), whole_batch().requires_grad_())
    for found in workers.run(trained, way):
        assert_same(found, expected, EXACT)


def in_bfloat16() -> dict[str, Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return slopes(sharded(made(torch.float32), mp_policy=policy), mine(whole_batch().float()))


def test_mixed_precision(workers: Pool) -> None:
    expected = slopes(made(), whole_batch().requires_grad_())
    for found in workers.run(in_bfloat16):
        assert_same(found, expected, BRAIN)


def saved_and_loaded() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A net from the meta device, given the state of another; the state that it has then, and its gradients."""
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(sharded(made()), options=options)
    with torch.device("meta"):
        net = Net().to(torch.float64)
    net = sharded(net)
    net.to_empty(device="cpu")
    set_model_state_dict(net, state, options=options)
    return get_model_state_dict(net, options=options), slopes(net, mine(whole_batch()))


def test_state(workers: Pool) -> None:
    net = made()
    expected = slopes(net, whole_batch().requires_grad_())
    for state, found in workers.run(saved_and_loaded):
        assert_same(found, expected, EXACT)
        for name, x in net.state_dict().items():
            assert torch.equal(state[name], x), name


def scalar_temperature() -> str:
    net = made()
    net.temperature = nn.Parameter(torch.tensor(0.8))
    with pytest.raises(ValueError, match="scalar") as raised:
        sharded(net)
    return str(raised.value)


def test_a_temperature_has_one_dimension(workers: Pool) -> None:
    """torch shards no parameter of shape ()."""
    assert all("1D tensor" in text for text in workers.run(scalar_temperature))
