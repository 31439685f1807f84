"""The mHC layer on a CPU beside what people run: DeepSeek's definition, eager and compiled, and hyper-connections'.

Cases of :mod:`benchmarks.origins`, forward and backward in streams and parameters, the branch an identity. hyper-connections
normalises every stream by itself, which is another function of the same work: it is timed, not held to the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastdsm.nn import HyperConnection

from .origin_case import Case
from .rows import BACKWARD, FORWARD

_SWEEPS, _EPS = 20, 1e-6


def eager(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """Streams (T, n, C) after the layer, as its definition reads."""
    n = x.shape[1]
    flat = x.flatten(1)
    mixes = (flat @ fn.mT) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + _EPS)
    pre = torch.sigmoid(scale[0] * mixes[:, :n] + base[:n]) + _EPS
    post = 2 * torch.sigmoid(scale[1] * mixes[:, n : 2 * n] + base[n : 2 * n])
    comb = (scale[2] * mixes[:, 2 * n :] + base[2 * n :]).unflatten(-1, (n, n)).softmax(-1) + _EPS
    comb = comb / (comb.sum(-2, keepdim=True) + _EPS)
    for _ in range(_SWEEPS - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + _EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + _EPS)
    h = (pre.unsqueeze(-1) * x).sum(1)
    return post.unsqueeze(-1) * h.unsqueeze(1) + (comb.unsqueeze(-1) * x.unsqueeze(2)).sum(1)


def cases() -> Iterator[Case]:
    """n = 4 streams of C channels, so many tokens."""
    for tokens, channels in ((1024, 256), (64, 1024), (4096, 256)):
        layer = HyperConnection(nn.Identity(), channels, variant="deepseek")
        nn.init.constant_(layer.scale, 0.5)
        parameters = [layer.fn, layer.scale, layer.base]
        streams, cotangent = torch.randn(2, tokens, 4, channels).unbind()
        torch.compiler.reset()
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        loops = {
            "mHC layer, eager": _of(eager, parameters),
            "mHC layer, torch.compile": _of(compiled, parameters),
        }
        shape = (tokens, 4, channels)
        for name, loop in loops.items():
            for direction in (FORWARD, BACKWARD):
                ours, theirs = (_job(call, streams, parameters, cotangent, direction) for call in (layer, loop))
                yield Case(name, shape, _SWEEPS, direction, ours, theirs, 1e-5)
        if importlib.util.find_spec("hyper_connections") is not None:
            from hyper_connections.manifold_constrained_hyper_connections import ManifoldConstrainedHyperConnections

            other = ManifoldConstrainedHyperConnections(4, dim=channels, branch=nn.Identity(), layer_index=0)
            beside = streams.reshape(tokens // 16, 16, 4, channels).permute(2, 0, 1, 3).reshape(-1, 16, channels)
            theirs = _job(other, beside, list(other.parameters()), beside.clone(), BACKWARD)
            ours = _job(layer, streams, parameters, cotangent, BACKWARD)
            yield Case("mHC layer, hyper-connections", shape, _SWEEPS, BACKWARD, ours, theirs, None)


def _of(call: Callable[..., Tensor], parameters: list[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """``call`` of streams alone."""
    return lambda x: call(x, *parameters)


def _job(
    call: Callable[[Tensor], Tensor], streams: Tensor, parameters: list[nn.Parameter], cotangent: Tensor, direction: str
) -> Callable[[], Tensor]:
    """The streams after the layer, or their gradient among those of all."""
    if direction == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(streams)

        return forward
    leaf = streams.clone().requires_grad_()
    return lambda: torch.autograd.grad(call(leaf), [leaf, *parameters], cotangent, allow_unused=True)[0]
