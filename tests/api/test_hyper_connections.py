"""``HyperConnections``: a stack is its layers, and keeps no more streams than it says."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdsm import mhc
from fastdsm.nn import HyperConnections
from fastdsm.nn.hyper_connections import _Kept


def stacked(**options: Any) -> HyperConnections:
    torch.manual_seed(0)
    made = HyperConnections([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)], 8, 3, **options)
    for layer in made.layers:
        nn.init.constant_(layer.scale, 0.7)
    return made


@pytest.mark.parametrize("variant", ["paper", "deepseek"])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("recompute", [None, 1, 2, 5, 9])
def test_is_its_layers(recompute: int | None, head: bool, variant: str) -> None:
    stack = stacked(recompute=recompute, head=head, variant=variant).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    X = stack.layers[0].expand(x)
    for layer in stack.layers:
        X = layer(X)
    if head:
        read = [stack.head_fn, stack.head_scale, stack.head_base]
        expected = mhc.mhc_head(X, *read, pre_eps=mhc.VARIANTS[variant].pre_eps)
    else:
        expected = X.mean(-2)
    found, cotangent, inputs = stack(x), torch.randn_like(x), [x, *stack.parameters()]
    torch.testing.assert_close(found, expected)
    for y, z in zip(*(torch.autograd.grad(out, inputs, cotangent) for out in (found, expected)), strict=True):
        torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("recompute", "kept"), [(1, 5), (2, 3), (5, 1)])
def test_streams_that_are_kept(recompute: int, kept: int) -> None:
    """Those before each segment, and no others; the gradients are the same to the bit."""
    x = torch.randn(7, 8)
    wanted = stacked()
    wanted(x).square().sum().backward()
    gc.collect()
    before = {id(y) for y in gc.get_objects()}
    stack = stacked(recompute=recompute)
    out = stack(x)
    gc.collect()
    alive = [y for y in gc.get_objects() if id(y) not in before]
    values = [y.value for y in alive if isinstance(y, _Kept)] + [y for y in alive if isinstance(y, Tensor)]
    streams = {y.data_ptr() for y in values if isinstance(y, Tensor) and y.shape == (7, 3, 8)}
    assert len(streams) == kept
    out.square().sum().backward()
    for y, z in zip(stack.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(y.grad, z.grad)


def test_second_derivatives_and_errors() -> None:
    stack = HyperConnections([nn.Tanh() for _ in range(3)], 2, 2, n_iters=3, recompute=2).double()
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: stack(x), (x, *stack.parameters()), fast_mode=True)
    with pytest.raises(ValueError, match="at least one module"):
        HyperConnections([], 8)
    with pytest.raises(ValueError, match="recompute must be None or >= 1"):
        HyperConnections([nn.Tanh()], 8, recompute=0)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 2\)"):
        stack(torch.randn(2, 3))


def test_a_temperature_that_layers_share() -> None:
    """A tensor goes by the projection as a module, also where streams are made again."""
    x, temperature = torch.randn(5, 8, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    given = [stacked(recompute=recompute, temperature=t).double() for recompute, t in ((None, 2.0), (2, temperature))]
    results = [torch.autograd.grad(y.square().sum(), z.layers[0].fn)[0] for z in given for y in [z(x)]]
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)
