"""Parallel styles of torch.distributed.tensor.parallel for this package's modules, as ``parallelize_module`` takes them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..nn import HyperConnection, HyperConnections, SinkhornAttention


class HyperConnectionParallel(ParallelStyle):
    """nn.HyperConnection, or a stack of them, on streams whose tokens lie apart, as sequence parallelism has them.

    A connection computes token by token, so that its streams may be a part of them; its parameters' gradients are then a part
    too, and wrong by all of the rest if nothing adds them up. Parameters become replicated DTensors whose gradients are summed
    over the mesh. The branch has a plan of its own: what it reads is this process's part, as a SequenceParallel norm or
    ``ColwiseParallel(input_layouts=Shard(1))`` take it, and so must be what it returns, as that of
    ``RowwiseParallel(output_layouts=Shard(1))`` is.

    Args:
        sequence_dim: the dimension of x along which processes have parts, where x is a DTensor; a plain one is taken as a part.
        use_local_output: whether the module returns a plain tensor, else a DTensor.

    Raises:
        TypeError: for another module. ValueError: for a learnable temperature or parameters that are sharded already.
    """

    def __init__(self, *, sequence_dim: int = 1, use_local_output: bool = True) -> None:
        super().__init__()
        self.sequence_dim, self.use_local_output = sequence_dim, use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (HyperConnection, HyperConnections)):
            raise TypeError(f"expected an nn.HyperConnection or nn.HyperConnections of fastdsm, got {type(module).__name__}")
        connections = [module] if isinstance(module, HyperConnection) else list(module.layers)
        for connection in connections:
            assert isinstance(connection, HyperConnection)
            if next(connection.projection.parameters(), None) is not None:
                raise ValueError("a learnable temperature of the projection would get a part of its gradient; use a float")
            connection.tokens_apart = True
        for owner in dict.fromkeys((module, *connections)):  # in one order on every process, as each is sent around
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if not isinstance(parameter, DTensor):
                    whole = distribute_tensor(parameter, device_mesh, [Replicate()])
                    owner.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))
        placed = [Shard(self.sequence_dim)]

        def taken(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            x, *others = args
            return (x.redistribute(device_mesh, placed).to_local() if isinstance(x, DTensor) else x, *others), kwargs

        def given(_: nn.Module, args: Any, found: Any) -> Any:
            first, *others = found if isinstance(found, tuple) else (found,)
            first = DTensor.from_local(first, device_mesh, placed, run_check=False)
            return (first, *others) if others else first

        module.register_forward_pre_hook(taken, with_kwargs=True)
        if not self.use_local_output:
            module.register_forward_hook(given)
        return module


class SinkhornContextParallel(ParallelStyle):
    """nn.SinkhornAttention on sequences of which every process has a part.

    The module then calls :func:`fastdsm.distributed.sinkhorn_attention`: its inputs are this process's lines, padding masks of
    these, attn_mask their rows over all keys; need_weights must be False. Its parameters' gradients are this process's share,
    as those of any module over a part of the data: data parallelism over the same processes adds them up.

    Raises:
        TypeError: for another module.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, SinkhornAttention):
            raise TypeError(f"expected an nn.SinkhornAttention of fastdsm, got {type(module).__name__}")
        module.context_group = device_mesh.get_group()
        return module
