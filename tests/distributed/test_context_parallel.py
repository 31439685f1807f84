"""Sinkhorn attention over a sequence of which two processes have a part each: values and gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fastdsm

from .pool import SIZE, Pool

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
BATCH, HEADS, LINES, WIDTH = 2, 4, 6, 3

# Options of a call by name; tensors are whole.
CALLS = (
    "plain", "row, 5 sweeps", "no sweeps", "tol, implicit", "half steps", "padding", "float padding", "mask of rows",
    "mask of heads", "bias", "bias of heads", "mask of keys", "grouped heads", "temperature",
    "temperature of heads", "lines apart",
)  # fmt: skip


# Of those, what is served where keys are gathered; three heads.
GATHERED = [x for x in CALLS if x not in ("half steps", "grouped heads", "temperature", "temperature of heads")]


def operands(name: str, heads: int = HEADS) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Query, key, value and what has a gradient beside them; and the other options."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    keys = LINES + 4 if name == "lines apart" else LINES
    groups = 2 if name == "grouped heads" else 1 if name == "one key head" else heads
    lines = SIZE if name == "a line each" else LINES
    given = {
        "query": normal(BATCH, heads, lines, WIDTH), "key": normal(BATCH, groups, keys, WIDTH),
        "value": normal(BATCH, groups, keys, WIDTH + 2),
    }  # fmt: skip
    padding = torch.zeros(BATCH, LINES, dtype=torch.bool)
    padding[0, 4:] = True
    entries = normal(LINES, keys) > -1.5
    entries.fill_diagonal_(True)
    options: dict[str, dict[str, Any]] = {
        "row, 5 sweeps": {"first": "row", "n_iters": 5},
        "no sweeps": {"n_iters": 0},
        "tol, implicit": {"tol": 1e-13, "n_iters": 400, "grad": "implicit"},
        "half steps": {"half_steps": 5},
        "padding": {"key_padding_mask": padding, "query_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.zeros(BATCH, LINES, dtype=torch.float64).masked_fill(padding, -torch.inf)},
        "mask of rows": {"attn_mask": entries},
        "mask of heads": {"attn_mask": entries | (normal(1, heads, 1, 1) > 0)},
        "mask of keys": {"attn_mask": (torch.arange(keys) < keys - 1).expand(1, 1, 1, keys)},
        "grouped heads": {"enable_gqa": True},
        "one key head": {"enable_gqa": True},
        "row, tol": {"first": "row", "tol": 1e-3, "n_iters": 50},
    }
    if name.startswith("bias"):
        given["attn_mask"] = normal(BATCH, heads if "heads" in name else 1, LINES, keys)
    if name.startswith("temperature"):
        given["temperature"] = normal(heads if "heads" in name else 1).exp()
    return given, options.get(name, {})


def mine(name: str, x: Tensor) -> Tensor:
    """This process's lines of it."""
    if name == "temperature" or (name == "attn_mask" and x.shape[-2] == 1):
        return x
    return x.chunk(SIZE, -1 if name.endswith("padding_mask") else -2)[dist.get_rank()]


def own(call: str, heads: int, backend: str = "auto") -> tuple[Tensor, dict[str, Tensor]]:
    import fastdsm.distributed

    given, options = operands(call, heads)
    if backend == "triton":
        given = {name: x.float() for name, x in given.items()}
        options["backend"] = backend
    leaves = {name: mine(name, x).clone().requires_grad_() for name, x in given.items()}
    options = {name: mine(name, x) if isinstance(x, Tensor) else x for name, x in options.items()}
    out = fastdsm.distributed.sinkhorn_attention(**leaves, **options)
    out.square().sum().backward()
    return out.detach(), {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize(
    ("heads", "call"),
    [(HEADS, call) for call in CALLS] + [(3, call) for call in (*GATHERED, "one key head", "a line each", "row, tol")],
)
def test_one_process(workers: Pool, heads: int, call: str) -> None:
    given, options = operands(call, heads)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    out = fastdsm.sinkhorn_attention(**leaves, **options)
    out.square().sum().backward()
    found = workers.run(own, call, heads)
    torch.testing.assert_close(torch.cat([x for x, _ in found], -2), out.detach(), rtol=0, atol=1e-11)
    for name, x in leaves.items():
        parts = [slopes[name] for _, slopes in found]
        grad = sum(parts) if name == "temperature" else torch.cat(parts, -2)
        assert x.grad is not None
        torch.testing.assert_close(grad, x.grad, rtol=0, atol=1e-10 * max(1.0, x.grad.abs().max().item()))


@pytest.mark.parametrize("call", ["plain", "row, 5 sweeps", "padding", "mask of rows"])
def test_kernels_over_gathered_keys(workers: Pool, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, in float32."""
    given, options = operands(call, 3)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    out = fastdsm.sinkhorn_attention(**leaves, **options)
    out.square().sum().backward()
    found = workers.run(own, call, 3, "triton")
    torch.testing.assert_close(torch.cat([x for x, _ in found], -2).double(), out.detach(), rtol=0, atol=2e-6)
    for name, x in leaves.items():
        grad = torch.cat([slopes[name] for _, slopes in found], -2).double()
        torch.testing.assert_close(grad, x.grad, rtol=0, atol=2e-5)


def dropped(heads: int) -> Tensor:
    """Which entries are kept, with the random numbers of a tensor-parallel job: the same on every process."""
    import fastdsm.distributed

    torch.manual_seed(0)
    query = torch.zeros(1, heads, 8, 1)
    value = torch.eye(16).expand(1, heads, 16, 16).chunk(SIZE, -2)[dist.get_rank()]
    return fastdsm.distributed.sinkhorn_attention(query, query, value, dropout_p=0.5)


def test_ranks_drop_entries_of_their_own(workers: Pool) -> None:
    kept = torch.cat(workers.run(dropped, 2), -2) != 0
    assert 0.3 < kept.float().mean() < 0.7
    assert not torch.equal(kept[:, 0], kept[:, 1])
    first, second = (x != 0 for x in workers.run(dropped, 1))
    assert 0.3 < first.float().mean() < 0.7
    assert not torch.equal(first, second)


def compiled() -> bool:
    import fastdsm.distributed

    given, _ = operands("plain")
    parts = [mine(name, x) for name, x in given.items()]
    call = torch.compile(fastdsm.distributed.sinkhorn_attention, backend="aot_eager", fullgraph=True)
    return torch.allclose(call(*parts), fastdsm.distributed.sinkhorn_attention(*parts), atol=1e-12)


def test_compiled(workers: Pool) -> None:
    assert workers.run(compiled) == [True] * SIZE


def refused() -> list[str]:
    import fastdsm.distributed

    found = []
    query, few = torch.randn(4, 4, 3), torch.randn(2, 3, 4, 3)
    learnt = torch.ones(3, requires_grad=True)
    for kind, x, options in (
        (ValueError, query, {}),
        (NotImplementedError, few, {"half_steps": 3}),
        (NotImplementedError, few, {"temperature": learnt}),
        (NotImplementedError, few, {"first": "row", "grad": "implicit", "tol": 1e-3}),
        (NotImplementedError, few, {"backend": "reference"}),
    ):
        with pytest.raises(kind) as raised:
            fastdsm.distributed.sinkhorn_attention(x, x, x, **options)
        found.append(str(raised.value))
    return found


def test_what_cannot_be_exchanged(workers: Pool) -> None:
    for texts in workers.run(refused):
        assert "(B, heads, lines, features)" in texts[0]
        assert all("multiple of the" in text for text in texts[1:])


def inside_torchs_context() -> tuple[list[str], Tensor]:
    """The plain calls there, and the one that is right."""
    from torch.distributed.tensor.experimental import context_parallel

    import fastdsm.distributed

    mesh = init_device_mesh("cpu", (SIZE,))
    given, _ = operands("plain")
    query, key, value = (x.clone() for x in given.values())
    layer = fastdsm.nn.SinkhornAttention(8, 2, batch_first=True)
    x, texts = torch.randn(1, 4, 8), []
    with context_parallel(mesh, buffers=[query, key, value], buffer_seq_dims=[2, 2, 2]):
        for call in (
            lambda: fastdsm.sinkhorn_attention(query, key, value),
            lambda: fastdsm.sinkhorn_attention_sigma2(query, key),
            lambda: layer(x, x, x),
            lambda: layer(x, x, x, need_weights=False),
        ):
            with pytest.raises(RuntimeError, match="context_parallel") as raised:
                call()
            texts.append(str(raised.value))
        out = fastdsm.distributed.sinkhorn_attention(query, key, value, group=mesh.get_group())
    fastdsm.sinkhorn_attention(query, key, value)
    kept = nn.functional.scaled_dot_product_attention
    try:
        nn.functional.scaled_dot_product_attention = lambda *x, **y: kept(*x, **y)
        fastdsm.sinkhorn_attention(query, key, value)  # replaced by somebody else: no sign
    finally:
        nn.functional.scaled_dot_product_attention = kept
    return texts, out


def test_inside_torchs_context_parallel(workers: Pool) -> None:
    """Head and tail of the sequence are on one process there; attention without a mask does not mind their order."""
    given, _ = operands("plain")
    expected = fastdsm.sinkhorn_attention(**given)
    found = workers.run(inside_torchs_context)
    for texts, _ in found:
        assert len(texts) == 4
        assert all("fastdsm.distributed.sinkhorn_attention" in text for text in texts)
    got = torch.cat([out for _, out in found], -2)
    chunks = got.sum((0, 1, 3)), expected.sum((0, 1, 3))
    torch.testing.assert_close(chunks[0].sort().values, chunks[1].sort().values, rtol=0, atol=1e-11)


def styled() -> tuple[Tensor, dict[str, Tensor], str]:
    from torch.distributed.tensor.parallel import parallelize_module

    from fastdsm.distributed import SinkhornContextParallel

    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": fastdsm.nn.SinkhornAttention(8, 4, batch_first=True)}).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    parallelize_module(net, init_device_mesh("cpu", (SIZE,)), {"attention": SinkhornContextParallel()})
    part = x.chunk(SIZE, 1)[dist.get_rank()]
    padding = padded().chunk(SIZE, 1)[dist.get_rank()]
    out, _ = net["attention"](part, part, part, key_padding_mask=padding, need_weights=False)
    out.square().sum().backward()
    with pytest.raises(ValueError, match="need_weights") as raised:
        net["attention"](part, part, part)
    return out.detach(), {name: p.grad for name, p in net.named_parameters()}, str(raised.value)


def padded() -> Tensor:
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return padding


def test_the_style_of_a_module(workers: Pool) -> None:
    torch.manual_seed(0)
    layer = fastdsm.nn.SinkhornAttention(8, 4, batch_first=True).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    out, _ = layer(x, x, x, key_padding_mask=padded(), need_weights=False)
    out.square().sum().backward()
    found = workers.run(styled)
    torch.testing.assert_close(torch.cat([part for part, _, _ in found], 1), out.detach(), rtol=0, atol=1e-11)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(sum(slopes[f"attention.{name}"] for _, slopes, _ in found), p.grad, rtol=0, atol=1e-10)
