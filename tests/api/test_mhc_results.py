"""What the layer's calls return beside its results, and the buffers they write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import mhc

TORCH, TRITON = {"backend": "torch"}, {"backend": "triton"}


def layer(n: int = 4, channels: int = 16, dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (2, 3)) -> Any:
    rows = n * (n + 2)
    residual = torch.randn(*batch, n, channels, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    parameters = torch.randn(rows, n * channels) / (n * channels) ** 0.5, torch.tensor([1.0, 1.0, 2.0]), torch.randn(rows)
    return residual, *(x.to(wide) for x in parameters)


def written(inputs: Any) -> Any:
    """What mhc_post takes, for streams as those of :func:`layer`."""
    residual = inputs[0]
    _, (post, comb) = mhc.mhc_pre(*inputs)
    return torch.randn(*residual.shape[:-2], residual.shape[-1]).to(residual.dtype), residual, post, comb


@pytest.mark.parametrize("backend", [TORCH, TRITON], ids=str)
@pytest.mark.parametrize("n", [1, 3, 4, 6, 16])
def test_info_is_of_the_mix(n: int, backend: dict[str, str]) -> None:
    inputs = layer(n)
    h, (post, comb), info = mhc.mhc_pre(*inputs, return_info=True, **backend)
    assert isinstance(info, mhc.MixInfo)
    exact = comb.double()
    torch.testing.assert_close(info.singular_values.double(), torch.linalg.svdvals(exact), rtol=0, atol=2e-6)
    assert bool((info.singular_values.diff(dim=-1) <= 0).all())
    if n > 1:
        torch.testing.assert_close(info.sigma2.double(), fastdsm.sigma2(exact), rtol=0, atol=2e-6)
    off = torch.stack([(exact.sum(side) - 1).abs().amax(-1) for side in (-1, -2)]).amax(0)
    torch.testing.assert_close(info.residual.double(), off, rtol=0, atol=1e-6)
    for x, y in zip((h, post, comb), (mhc.mhc_pre(*inputs, **backend)[0], *mhc.mhc_pre(*inputs, **backend)[1]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("variant", list(mhc.VARIANTS))
def test_info_in_float64(variant: str) -> None:
    *_, (_, comb), info = mhc.mhc_pre(*layer(dtype=torch.float64), variant=variant, return_info=True)
    torch.testing.assert_close(info.singular_values, torch.linalg.svdvals(comb), rtol=0, atol=1e-12)
    torch.testing.assert_close(info.sigma2, fastdsm.sigma2(comb, tol=1e-12), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", [TORCH, TRITON], ids=str)
def test_info_has_no_gradient_and_takes_none_away(backend: dict[str, str]) -> None:
    inputs = layer()
    grads = []
    for asked in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        h, (post, comb), *info = mhc.mhc_pre(*leaves, return_info=asked, **backend)
        assert not any(x.requires_grad for found in info for x in found)
        grads.append(torch.autograd.grad(h.square().sum() + post.sum() + comb.square().sum(), leaves))
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)


def test_info_of_the_converged_mix() -> None:
    *_, info = mhc.mhc_pre(*layer(), variant="paper", solver="newton", return_info=True)
    assert float(info.residual.max()) < 1e-6
    *_, short = mhc.mhc_pre(*layer(), variant="paper", sinkhorn_repeat=1, return_info=True)
    assert float(short.residual.max()) > 1e-2


@pytest.mark.parametrize("backend", [TORCH, TRITON], ids=str)
def test_info_behind_post(backend: dict[str, str]) -> None:
    inputs = layer()
    of = written(inputs)
    mixed, h, mixes, info = mhc.mhc_post_pre(*of, *inputs[1:], return_info=True, **backend)
    other, (post, comb), expected = mhc.mhc_pre(mixed, *inputs[1:], return_info=True, **backend)
    for x, y in zip((h, *mixes, *info), (other, post, comb, *expected), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


def test_info_where_a_token_is_broken_and_where_there_is_none() -> None:
    residual, *rest = layer(batch=(3,))
    residual[1, 0, 0] = torch.nan
    *_, info = mhc.mhc_pre(residual, *rest, return_info=True)
    for x in info:
        assert x.isnan().reshape(3, -1).all(1).tolist() == [False, True, False]
    *_, info = mhc.mhc_pre(residual[:0], *rest, return_info=True)
    assert [tuple(x.shape) for x in info] == [(0,), (0, 4), (0,)]


CALLS: dict[str, Callable[..., Any]] = {
    "pre": lambda inputs, of, **on: mhc.mhc_pre(*inputs, **on)[0],
    "newton": lambda inputs, of, **on: mhc.mhc_pre(*inputs, variant="paper", solver="newton", **on)[0],
    "post": lambda inputs, of, **on: mhc.mhc_post(*of, **on),
    "post pre": lambda inputs, of, **on: mhc.mhc_post_pre(*of, *inputs[1:], **on)[:2],
    "shifted": lambda inputs, of, **on: mhc.mhc_post_pre(*of, *inputs[1:], mixes=mhc.mhc_mixes(*inputs[:2]), **on)[:2],
}


@pytest.mark.parametrize("backend", [TORCH, TRITON], ids=str)
@pytest.mark.parametrize(("n", "channels"), [(4, 16), (4, 5), (6, 16)])
@pytest.mark.parametrize("name", CALLS)
def test_buffers_hold_the_result(name: str, n: int, channels: int, backend: dict[str, str]) -> None:
    inputs = layer(n, channels, torch.bfloat16)
    of, call = written(inputs), CALLS[name]
    expected = call(inputs, of, **backend)
    several = isinstance(expected, tuple)
    out = tuple(torch.full_like(x, torch.nan) for x in (expected if several else (expected,)))
    found = call(inputs, of, out=out if several else out[0], **backend)
    for x, buffer, truth in zip(found if several else (found,), out, expected if several else (expected,), strict=True):
        assert x.data_ptr() == buffer.data_ptr()
        assert torch.equal(buffer, truth)


def test_a_buffer_off_the_grid_of_vectors() -> None:
    inputs = layer(4, 16, torch.bfloat16)
    of = written(inputs)
    out = torch.empty(of[1].numel() + 1, dtype=torch.bfloat16)[1:].view(of[1].shape)
    h = torch.empty(of[0].numel() + 1, dtype=torch.bfloat16)[1:].view(of[0].shape)
    expected = mhc.mhc_post_pre(*of, *inputs[1:], **TRITON)
    mhc.mhc_post_pre(*of, *inputs[1:], out=(out, h), **TRITON)
    assert torch.equal(out, expected[0])
    torch.testing.assert_close(h, expected[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["pre", "post", "post pre"])
def test_buffers_under_compile(name: str) -> None:
    inputs = layer()
    of, call = written(inputs), CALLS[name]
    expected = call(inputs, of)
    shaped: Any = [torch.empty_like(x) for x in expected] if isinstance(expected, tuple) else torch.empty_like(expected)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(out: Any) -> Any:
        call(inputs, of, out=out)
        return out

    torch.testing.assert_close(step(shaped), list(expected) if isinstance(expected, tuple) else expected)


def test_buffers_that_cannot_be() -> None:
    inputs = layer()
    of = written(inputs)
    residual = inputs[0]
    room: Tensor = torch.empty_like(residual)
    bad: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "out must be a tensor of shape", 3),
        (ValueError, "out must have shape", room[0]),
        (ValueError, "torch.float32 on cpu", room.double()),
        (ValueError, "contiguous", room.mT.contiguous().mT),
        (ValueError, "share memory", residual),
        (ValueError, "share memory", residual.view(residual.shape)),
    ]
    for kind, message, out in bad:
        with pytest.raises(kind, match=message):
            mhc.mhc_post(*of, out=out)
    with pytest.raises(ValueError, match=r"no gradient passes through a buffer"):
        mhc.mhc_post(of[0].requires_grad_(), *of[1:], out=room)
    with torch.no_grad():
        mhc.mhc_post(*of, out=room)
    with pytest.raises(TypeError, match="pair of tensors"):
        mhc.mhc_post_pre(*of, *inputs[1:], out=room)
    arena = torch.empty(2 * room.numel())
    halves = arena[: room.numel()].view(room.shape), arena[room.numel() :].view(room.shape)
    with torch.no_grad():
        halves[0].copy_(residual)
        assert torch.equal(mhc.mhc_post(of[0], halves[0], *of[2:], out=halves[1]), mhc.mhc_post(*of))
