"""The mHC layer beside its definition, eager and compiled, and Liger's; post, and post with the next pre, beside a copy.

The branch is the identity, so that what is timed is the layer. Of a backward all parameters' gradients are part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fastdsm
from fastdsm.nn import HyperConnection

from . import layers
from .harness import SWEEPS, VALUE_TOLERANCE, Case, Definition, Implementation, Outputs, measure
from .peers import peer
from .rows import BACKWARD, FORWARD
from .targets import LAYER_SHAPES

# Of bfloat16 streams: half a unit in the last place is 2^-9 of an output.
_TOLERANCES = {"cpu": (VALUE_TOLERANCE, 1e-4), "cuda": (1e-2, 4e-2)}
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
_NAME = "DeepSeek's mHC layer"


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("number", range(2))
def bench_mhc_layer(benchmark: BenchmarkFixture, device: str, number: int, direction: str) -> None:
    """Streams (tokens, 4, C) through a layer."""
    streams = _normal(LAYER_SHAPES[device][number], device)
    layer = HyperConnection(nn.Identity(), streams.shape[-1], variant="deepseek", device=device)
    nn.init.constant_(layer.scale, 0.5)
    parameters = [layer.fn, layer.scale, layer.base]
    definition = Definition(_NAME, _of_matrices(partial(_defined, parameters=parameters)))
    compiled = torch.compile(layers.eager, fullgraph=True, dynamic=False)
    call = "fastdsm.nn.HyperConnection(nn.Identity(), C)(x)"
    implementations = [
        _trained("fastdsm", call, layer, parameters, definition),
        _trained("eager", "definition", partial(_defined, parameters=parameters), parameters, definition),
        _trained(
            "torch.compile",
            "torch.compile(definition)",
            partial(_defined, parameters=parameters, by=compiled),
            parameters,
            definition,
        ),
    ]
    if device == "cuda":
        implementations.append(peer("Liger", "liger_kernel", lambda: _liger(layer)))
    tolerances = _TOLERANCES[device]
    measure(benchmark, Case("mhc layer", streams, direction, SWEEPS, *tolerances), implementations)


@pytest.mark.parametrize("operation", ["mhc_post", "mhc_post_pre"])
def bench_mhc_streams(benchmark: BenchmarkFixture, device: str, operation: str) -> None:
    """What passes over the streams; the copy beside it moves streams in and results out, without the branch's output."""
    streams = _normal(LAYER_SHAPES[device][0], device)
    tokens, _, channels = streams.shape
    layer = HyperConnection(nn.Identity(), channels, variant="deepseek", device=device)
    parameters = [x.detach() for x in (layer.fn, layer.scale, layer.base)]
    _, (post, comb) = fastdsm.mhc.mhc_pre(streams, *parameters)
    written = _normal((tokens, channels), device)

    def of(x: Tensor, backend: str) -> Outputs:
        """Of all tokens, or of those that are held against float64."""
        wide = x.dtype == torch.float64
        given = [y[:: tokens // len(x)].to(torch.float64 if wide else y.dtype) for y in (written, post, comb)]
        if operation == "mhc_post":
            return (fastdsm.mhc.mhc_post(given[0], x, *given[1:], backend=backend),)
        after = [y.double() if wide else y for y in parameters]
        return fastdsm.mhc.mhc_post_pre(given[0], x, *given[1:], *after, backend=backend)[:2]

    definition = Definition(f"{operation} of the oracle", partial(of, backend="reference"))
    implementations = [
        Implementation("fastdsm", f"fastdsm.mhc.{operation}(...)", partial(of, backend="auto"), definition, capturable=True),
        Implementation("eager", f'fastdsm.mhc.{operation}(..., backend="torch")', partial(of, backend="torch"), definition),
    ]
    sweeps = SWEEPS if operation == "mhc_post_pre" else None
    measure(benchmark, Case(operation, streams, FORWARD, sweeps, *_TOLERANCES[device]), implementations)


def _normal(shape: Sequence[int], device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, _DTYPES[device])


def _of_matrices(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Outputs]:
    return lambda x: (call(x),)


def _defined(x: Tensor, parameters: Sequence[Tensor], by: Callable[..., Tensor] = layers.eager) -> Tensor:
    """The definition in float32 inside, or float64, rounded to the streams' dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return by(x.to(wide), *(y.detach().to(wide) if wide == torch.float64 else y for y in parameters)).to(x.dtype)


class _WithParameters(torch.autograd.Function):
    """A call whose backward makes the gradients of parameters as well, as in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            out = call(leaf)
        ctx.graph = out, [leaf, *parameters]
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        out, inputs = ctx.graph
        return torch.autograd.grad(out, inputs, cotangents[0])[0], None, None


def _trained(
    name: str, call: str, function: Callable[[Tensor], Tensor], parameters: list[Any], definition: Definition
) -> Implementation:
    def run(x: Tensor) -> Outputs:
        if x.requires_grad:
            return (_WithParameters.apply(x, function, parameters),)
        with torch.no_grad():
            return (function(x),)

    return Implementation(name, call, run, definition, capturable=name == "fastdsm")


def _liger(ours: HyperConnection) -> Implementation:
    """LigerMHC of the same parameters, whose mix is not transposed."""
    layer = import_module("liger_kernel.transformers").LigerMHC(nn.Identity(), hc=4, c=ours.dim, tmax=SWEEPS).to(ours.fn.device)
    with torch.no_grad():
        layer.phi.copy_(ours.fn.mT)
        layer.b.copy_(ours.base)
        for mine, theirs in zip(ours.scale, (layer.alpha_pre, layer.alpha_post, layer.alpha_res), strict=True):
            theirs.copy_(mine)
    same = HyperConnection.from_liger(nn.Identity(), layer).double()
    definition = Definition("Liger's mHC layer", _of_matrices(same))
    call = f"liger_kernel.transformers.LigerMHC(nn.Identity(), hc=4, c=C, tmax={SWEEPS})(x)"
    return _trained("Liger", call, layer, list(layer.parameters()), definition)
