"""nn.SinkhornAttention sharded by fully_shard, whose mixed precision casts query and key apart, on a gloo process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from fastdsm.nn import SinkhornAttention

LENGTHS = torch.tensor([6, 4, 1])
PADDING = torch.arange(6) >= LENGTHS[:, None]


def attended(layer: nn.Module, call: Callable[..., Any], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What comes out on lines that are no padding, and the gradients of the parameters, whole."""
    layer.zero_grad()
    out = call(x, x, x, PADDING, False)[0][~PADDING]
    out.float().square().sum().backward()
    slopes = (p.grad for p in layer.parameters())
    return out.detach().float(), [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in slopes]


def _worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=1, store=dist.FileStore(store, 1))
    try:
        _sharded()
    finally:
        dist.destroy_process_group()


def _sharded() -> None:
    """In the process of a group of its own: casts do not depend on how many there are."""
    torch.manual_seed(0)
    mesh, x = init_device_mesh("cpu", (1,)), torch.randn(3, 6, 12)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    told, untold = (SinkhornAttention(12, 3, batch_first=True, temperature=0.1, self_attention=x) for x in (True, None))
    expected = attended(told, told, x)
    untold.load_state_dict(told.state_dict())
    seen: list[bool] = []
    for layer in (told, untold):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].data_ptr() == given[1].data_ptr()))
    for call in (told, partial(checkpoint, told, use_reentrant=False), partial(checkpoint, told, use_reentrant=True)):
        found = attended(told, call, x.clone().requires_grad_())
        for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-2 * b.abs().max().item())
    assert not any(seen), "the casts are one tensor: nothing to be told"
    alone = attended(untold, untold, x)[0]
    assert (alone - expected[0]).abs().max() > 0.1 * expected[0].abs().max(), "padding that nobody tells of was found"


def test_padding_under_mixed_precision(tmp_path: Path) -> None:
    """With self_attention=True padding is known though the casts of one tensor are two."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "store"),), 1)
