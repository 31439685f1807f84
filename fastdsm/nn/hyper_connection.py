"""``HyperConnection``: manifold-constrained hyper-connections (mHC, arXiv 2512.24880).

n residual streams X (n, C) per token are mixed by a doubly-stochastic matrix of their own, H, read into a branch F, and
written back:

    z = RMSNorm(vec X)
    pre  = sigmoid(a_pre  z W_pre  + b_pre)          (n,)
    post = 2 sigmoid(a_post z W_post + b_post)       (n,)
    H    = Sinkhorn(a_mix mat(z W_mix) + b_mix)      (n, n)
    X   <- H X + post F(pre X)^T

The gates a start at 0.01 and W at zero mean, so that the biases decide at first. Those are not the paper's: b_mix is 0 on
the diagonal and ``-offset`` beside it, so that H starts near the identity, pre reads the mean, and post writes with weight 1.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from .._ops.problem import compute_dtype
from .projection import SinkhornProjection


class HyperConnection(nn.Module):
    """A branch of a network connected to n residual streams.

    Everything but the branch is computed in float32 (float64 for float64 streams), whatever autocast and the module's dtype
    are, and is rounded once to the dtype of the streams: what the branch gets, and the result.

    Args:
        branch: a module from (..., C) to (..., C): attention, an MLP, their normalisation included. It may take more arguments,
            and return a tuple, of which the first goes to the streams.
        dim: C.
        streams: n >= 1.
        n_iters, temperature, sigma2_floor, first, eps: of the :class:`SinkhornProjection` of H; the paper sweeps 20 times,
            columns first, without eps; DeepSeek's code rows first with eps=1e-6.
        offset: what the off-diagonal logits of H start below the diagonal ones.
        transposed: mix by H^T X, as DeepSeek's code and those after it, in place of the paper's H X.
        channels_first: streams lie beside each other in every channel, (..., C, n), as in TransformerEngine; the parameters
            stay in the order of (n, C).
        device, dtype: of the parameters.

    forward(x (..., n, C), *args, **kwargs) gives (..., n, C) in x's dtype, or a tuple of that and what else the branch returned
    for these arguments. ``expand`` and ``reduce`` lead from (..., C) to streams and back.

    Source: mHC, arXiv 2512.24880.
    """

    def __init__(
        self,
        branch: nn.Module,
        dim: int,
        streams: int = 4,
        n_iters: int = 20,
        temperature: float = 1.0,
        sigma2_floor: float | None = None,
        offset: float = 4.0,
        *,
        first: str = "col",
        eps: float = 0.0,
        transposed: bool = False,
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or streams < 1:
            raise ValueError(f"dim and streams must be >= 1, got dim={dim}, streams={streams}")
        self.branch, self.dim, self.streams, self.offset = branch, dim, streams, offset
        self.transposed, self.channels_first = transposed, channels_first
        n = streams
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.RMSNorm(n * dim, **like)
        self.weight = nn.Parameter(torch.empty(n * dim, 2 * n + n * n, **like))
        self.gates = nn.Parameter(torch.empty(3, **like))
        self.bias = nn.Parameter(torch.empty(2 * n + n * n, **like))
        self.projection = SinkhornProjection(n_iters, temperature, first, sigma2_floor=sigma2_floor, eps=eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the connection's own parameters anew, as the constructor does; not the branch's."""
        n = self.streams
        read = math.log(1 / (n - 1)) if n > 1 else 8.0  # sigmoid(read) = 1 / n
        self.norm.reset_parameters()
        nn.init.normal_(self.weight, std=1 / math.sqrt(n * self.dim))
        nn.init.constant_(self.gates, 0.01)
        with torch.no_grad():
            self.bias[:n] = read
            self.bias[n : 2 * n] = 0.0
            self.bias[2 * n :] = (-self.offset * (1 - torch.eye(n, device=self.bias.device))).flatten()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Mix the streams ``x`` (..., n, C), and add the branch to them."""
        self._check(x)
        with _whole_precision(x):
            streams = (x.mT if self.channels_first else x).to(compute_dtype(x.dtype))
            pre, post, plan = self._mixes(streams)
            read = (pre.unsqueeze(-2) @ streams).squeeze(-2).to(x.dtype)
        written = self.branch(read, *args, **kwargs)
        written, *more = written if isinstance(written, tuple) else (written,)
        with _whole_precision(x):
            mixed = (plan.mT if self.transposed else plan) @ streams
            mixed = (mixed + post.unsqueeze(-1) * written.to(mixed.dtype).unsqueeze(-2)).to(x.dtype)
        mixed = mixed.mT if self.channels_first else mixed
        return (mixed, *more) if more else mixed

    def _check(self, x: Tensor) -> None:
        shape = (self.dim, self.streams) if self.channels_first else (self.streams, self.dim)
        if x.dim() < 2 or x.shape[-2:] != shape:
            raise ValueError(
                f"x must have shape (..., {shape[0]}, {shape[1]}), got {tuple(x.shape)}; expand() makes streams of (..., C)"
            )

    def _mixes(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre (..., n), post (..., n) and H (..., n, n), of streams (..., n, C) in the dtype of the arithmetic."""
        n, dtype = self.streams, streams.dtype
        weight, gates, bias, scale = (p.to(dtype) for p in (self.weight, self.gates, self.bias, self.norm.weight))
        z = nn.functional.rms_norm(streams.flatten(-2), self.norm.normalized_shape, scale, self.norm.eps)
        sizes = [n, n, n * n]
        raw = (z @ weight).split(sizes, -1)
        pre, post, mix = (a * z + b for a, z, b in zip(gates, raw, bias.split(sizes), strict=True))
        return pre.sigmoid(), 2 * post.sigmoid(), self.projection(mix.unflatten(-1, (n, n)))

    def expand(self, x: Tensor) -> Tensor:
        """(..., C) to n equal streams, (..., n, C)."""
        streams = x.unsqueeze(-2).expand(*x.shape[:-1], self.streams, x.shape[-1])
        return streams.mT if self.channels_first else streams

    def reduce(self, x: Tensor) -> Tensor:
        """The mean of the streams, to (..., C)."""
        return x.mean(-1 if self.channels_first else -2)


def _whole_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where autocast would narrow products, it is off."""
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
