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

import math

import torch
from torch import Tensor, nn

from .projection import SinkhornProjection


class HyperConnection(nn.Module):
    """A branch of a network connected to n residual streams.

    Args:
        branch: a module from (..., C) to (..., C): attention, an MLP, their normalisation included.
        dim: C.
        streams: n >= 1.
        n_iters, temperature, sigma2_floor: of the :class:`SinkhornProjection` of H; the paper sweeps 20 times.
        offset: what the off-diagonal logits of H start below the diagonal ones.

    forward(x (..., n, C)) gives (..., n, C) in x's dtype. ``expand`` and ``reduce`` lead from (..., C) to streams and back.

    Source: mHC, arXiv 2512.24880; columns first, then rows, without eps.
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
    ) -> None:
        super().__init__()
        if dim < 1 or streams < 1:
            raise ValueError(f"dim and streams must be >= 1, got dim={dim}, streams={streams}")
        self.branch, self.dim, self.streams = branch, dim, streams
        n = streams
        self.norm = nn.RMSNorm(n * dim)
        self.weight = nn.Parameter(torch.randn(n * dim, 2 * n + n * n) / math.sqrt(n * dim))
        self.gates = nn.Parameter(torch.full((3,), 0.01))
        read = math.log(1 / (n - 1)) if n > 1 else 8.0  # sigmoid(read) = 1 / n
        mix = -offset * (1 - torch.eye(n))
        self.bias = nn.Parameter(torch.cat([torch.full((n,), read), torch.zeros(n), mix.flatten()]))
        self.projection = SinkhornProjection(n_iters, temperature, sigma2_floor=sigma2_floor)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the streams ``x`` (..., n, C), and add the branch to them."""
        n = self.streams
        if x.dim() < 2 or x.shape[-2:] != (n, self.dim):
            raise ValueError(
                f"x must have shape (..., {n}, {self.dim}), got {tuple(x.shape)}; expand() makes streams of (..., C)"
            )
        sizes = [n, n, n * n]
        raw = (self.norm(x.flatten(-2)) @ self.weight).split(sizes, -1)
        pre, post, mix = (a * z + b for a, z, b in zip(self.gates, raw, self.bias.split(sizes), strict=True))
        plan = self.projection(mix.unflatten(-1, (n, n)))
        branch = self.branch((pre.sigmoid().unsqueeze(-2) @ x).squeeze(-2))
        return plan @ x + 2 * post.sigmoid().unsqueeze(-1) * branch.unsqueeze(-2)

    def expand(self, x: Tensor) -> Tensor:
        """(..., C) to n equal streams (..., n, C)."""
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.streams, x.shape[-1])

    @staticmethod
    def reduce(x: Tensor) -> Tensor:
        """The mean of the streams, (..., n, C) to (..., C)."""
        return x.mean(-2)
