"""The mHC layer's public calls and modules on the kernels: the PyTorch path's values, and as many launches as are promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdsm import mhc
from fastdsm.kernels.common.configuration import Configuration
from fastdsm.kernels.mhc import launch_post
from fastdsm.nn import HyperConnection, HyperConnections


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that were launched, by name."""
    found: list[str] = []
    launch = Configuration.launch

    def logged(configuration: Configuration, programs: int, **arguments: Any) -> None:
        found.append(configuration.kernel.fn.__name__)
        launch(configuration, programs, **arguments)

    monkeypatch.setattr(Configuration, "launch", logged)
    return found


def of_both(make: Any, x: Tensor) -> list[list[Tensor]]:
    """Results and gradients of a module on the kernels, then on the PyTorch path."""
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        module, leaf = make(backend), x.detach().clone().requires_grad_()
        out = module(leaf)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(out.shape, generator=generator).to(out.dtype)
        found.append([out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], cotangent)])
    return found


def opened(module: nn.Module) -> nn.Module:
    """With gates that let mixes depend on streams."""
    for layer in module.modules():
        if isinstance(layer, HyperConnection):
            nn.init.constant_(layer.scale, 0.7)
    return module


@pytest.mark.parametrize("variant", mhc.VARIANTS)
def test_a_connection(variant: str, launches: list[str]) -> None:
    """Three launches forward, five backward; its own gradient of the streams is added where that of post goes."""
    x = torch.randn(5, 4, 16)
    kernels, paths = of_both(lambda backend: opened(HyperConnection(nn.Tanh(), 16, variant=variant, backend=backend)), x)
    for found, expected in zip(kernels, paths, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert launches[:3] == ["_mhc_product_fwd_kernel", "_mhc_mix_fwd_kernel", "_mhc_post_fwd_kernel"]
    assert len(launches) == 3 + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_connection_of_narrow_streams(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 4, 24).to(dtype)
    kernels, paths = of_both(lambda backend: opened(HyperConnection(nn.Tanh(), 24, variant="deepseek", backend=backend)), x)
    unit = torch.finfo(dtype).eps
    for found, expected in zip(kernels, paths, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=2 * unit, atol=2 * unit * size)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("recompute", [None, 2])
def test_a_stack(recompute: int | None, few: bool, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two branches streams are written and read in two launches, between two segments, and of few tokens, in three."""
    if not few:
        monkeypatch.setattr(launch_post, "FEW_TOKENS", 0)

    def make(backend: str) -> nn.Module:
        branches = [nn.Linear(8, 8) for _ in range(3)]
        return opened(HyperConnections(branches, 8, 4, variant="deepseek", head=True, recompute=recompute, backend=backend))

    kernels, paths = of_both(make, torch.randn(2, 3, 8))
    for found, expected in zip(kernels, paths, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    apart = ["post", "product", "mix"]
    together = apart if few else ["post_pre", "mix"]
    forward = ["product", "mix", *together, *(together if recompute is None else apart), *apart]
    assert launches[: len(forward)] == [f"_mhc_{name}_fwd_kernel" for name in forward]


def test_forms_that_kernels_do_not_read() -> None:
    """Strides, offsets, expanded streams, and gradients that come expanded."""
    n, channels = 4, 8
    fn, scale, base = torch.randn(24, n * channels), torch.ones(3), torch.randn(24)
    whole = torch.randn(3, 2, n, channels + 3)
    forms = [
        whole[..., 1 : channels + 1],
        torch.randn(3, 2, channels, n).mT,
        torch.randn(1, 2, n, channels).expand(3, 2, -1, -1),
    ]
    for residual in forms:
        results = []
        for backend in ("triton", "torch"):
            leaf = (
                residual.detach().clone().requires_grad_() if residual.is_contiguous() else residual.detach().requires_grad_()
            )
            h, (post, comb) = mhc.mhc_pre(leaf, fn, scale, base, backend=backend)
            mixed = mhc.mhc_post(
                h.sum(-1, keepdim=True).expand(3, 2, channels), leaf, post, comb.mT.contiguous().mT, backend=backend
            )
            results.append([mixed, *torch.autograd.grad(mixed.sum() + h.mean(), leaf)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
