"""``HyperConnection``: manifold-constrained hyper-connections (mHC, arXiv 2512.24880).

n residual streams X (n, C) per token are mixed by a doubly-stochastic matrix of their own, H, read into a branch F, and
written back:

    z = vec X / rms(vec X)
    pre  = sigmoid(a_pre  W_pre  z + b_pre)          (n,)
    post = 2 sigmoid(a_post W_post z + b_post)       (n,)
    H    = Sinkhorn(a_mix mat(W_mix z) + b_mix)      (n, n)
    X   <- H X + post F(pre X)^T

``fn`` is W, its rows those of pre, post and the mix row by row; ``scale`` is a, ``base`` b, as DeepSeek's code names them. The
gates a start at 0.01 and W at zero mean, so that the biases decide at first. Those are not the paper's: b_mix is 0 on the
diagonal and ``-offset`` beside it, so that H starts near the identity, pre reads the mean, and post writes with weight 1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import mhc_calls
from .._ops.arguments import resolve_backend
from .._ops.mixing import MOST_STREAMS, Mixing
from .._ops.problem import compute_dtype
from .._ops.sharded import is_sharded, own
from ..mhc.variants import mixing_of
from ..reference import mhc as oracle
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
        n_iters, temperature, sigma2_floor: of the :class:`SinkhornProjection` of H; the paper sweeps 20 times.
        offset: what the off-diagonal logits of H start below the diagonal ones.
        variant: whose layer it is, of :data:`fastdsm.mhc.VARIANTS`: order of the sides, eps, and how H is read.
        first, eps, transposed, pre_eps: None for the variant's; first "col" or "row"; eps of the projection, 0 for none;
            transposed: mix by H^T X, as DeepSeek's code and those after it, in place of the paper's H X; pre_eps: added to pre.
        post_mult: what the sigmoids of post are multiplied by.
        norm_eps: under the root of the mean square. norm_weight: whether the normalised streams are multiplied by a weight.
        channels_first: streams lie beside each other in every channel, (..., C, n), as in TransformerEngine; the parameters
            stay in the order of (n, C).
        backend: "auto", "triton" or "torch".
        device, dtype: of the parameters.

    forward(x (..., n, C), *args, **kwargs) gives (..., n, C) in x's dtype, or a tuple of that and what else the branch returned
    for these arguments. ``expand`` and ``reduce`` lead from (..., C) to streams and back. ``from_deepseek``, ``from_liger`` and
    ``from_transformer_engine`` take over the weights of those.

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
        variant: str = "paper",
        first: str | None = None,
        eps: float | None = None,
        transposed: bool | None = None,
        pre_eps: float | None = None,
        post_mult: float = 2.0,
        norm_eps: float = 1e-6,
        norm_weight: bool = False,
        channels_first: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or streams < 1:
            raise ValueError(f"dim and streams must be >= 1, got dim={dim}, streams={streams}")
        mixing = mixing_of(variant, transposed, pre_eps=pre_eps, post_mult=post_mult, norm_eps=norm_eps)
        first = ("col" if mixing.columns_first else "row") if first is None else first
        eps = mixing.sinkhorn_eps if eps is None else eps
        self.branch, self.dim, self.streams, self.offset, self.backend = branch, dim, streams, offset, backend
        self.channels_first = channels_first
        self.tokens_apart = False  # set by fastdsm.distributed.HyperConnectionParallel
        self.projection = SinkhornProjection(
            n_iters, temperature, first, sigma2_floor=sigma2_floor, backend=backend, eps=eps, floored=mixing.floored
        )
        self.mixing = mixing._replace(n_iters=n_iters, columns_first=first == "col", sinkhorn_eps=eps)
        n = streams
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fn = nn.Parameter(torch.empty(n * (n + 2), n * dim, **like))
        self.scale = nn.Parameter(torch.empty(3, **like))
        self.base = nn.Parameter(torch.empty(n * (n + 2), **like))
        self.norm_weight = nn.Parameter(torch.empty(n * dim, **like)) if norm_weight else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the connection's own parameters anew, as the constructor does; not the branch's."""
        n = self.streams
        read = math.log(1 / (n - 1)) if n > 1 else 8.0  # sigmoid(read) = 1 / n
        nn.init.normal_(self.fn, std=1 / math.sqrt(n * self.dim))
        nn.init.constant_(self.scale, 0.01)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        with torch.no_grad():
            self.base[:n] = read
            self.base[n : 2 * n] = 0.0
            self.base[2 * n :] = (-self.offset * (1 - torch.eye(n, device=self.base.device))).flatten()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Mix the streams ``x`` (..., n, C), and add the branch to them."""
        self._check(x)
        streams = x.mT if self.channels_first else x
        with whole_precision(x):
            read, post, comb, flat = self.read(streams.reshape(-1, *streams.shape[-2:]), streams.shape[:-2])
        written = self.branch(read.reshape(*streams.shape[:-2], self.dim), *args, **kwargs)
        written, *more = written if isinstance(written, tuple) else (written,)
        with whole_precision(x):
            mixed = mhc_calls.post(written.reshape(-1, self.dim).to(x.dtype), flat, post, comb, self.backend_for(x))
        mixed = mixed.reshape(streams.shape)
        mixed = mixed.mT if self.channels_first else mixed
        return (mixed, *more) if more else mixed

    def _check(self, x: Tensor) -> None:
        check_whole(x)
        shape = (self.dim, self.streams) if self.channels_first else (self.streams, self.dim)
        if x.dim() < 2 or x.shape[-2:] != shape:
            raise ValueError(
                f"x must have shape (..., {shape[0]}, {shape[1]}), got {tuple(x.shape)}; expand() makes streams of (..., C)"
            )

    def backend_for(self, x: Tensor) -> str:
        """The word to dispatch on."""
        return resolve_backend(self.backend, x)

    def read(self, X: Tensor, tokens: torch.Size | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the branch reads (T, C), post (T, n), comb (T, n, n) as [old, new], and the streams X (T, n, C) again, through
        which their own gradient goes. tokens: the shape that hooks see T as.
        """
        fn, scale, base, mixing = self._weights(compute_dtype(X.dtype))
        if mixing is None:
            return *self._read_apart(X, fn, scale, base, tokens), X
        read, _, post, comb, X = mhc_calls.pre_through(X, fn, scale, base, None, *mixing, self.backend_for(X))
        return read, post, self._shown(comb, X, tokens), X

    def read_behind(
        self, written: Tensor, X: Tensor, post: Tensor, comb: Tensor, tokens: torch.Size | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Streams behind the branch of an earlier connection, and of these what :meth:`read` gives but the last."""
        fn, scale, base, mixing = self._weights(compute_dtype(X.dtype))
        if mixing is None:
            X = mhc_calls.post(written, X, post, comb, self.backend_for(X))
            return X, *self._read_apart(X, fn, scale, base, tokens)
        options = (None, *mixing, self.backend_for(X))
        X, read, _, post, comb, *_ = mhc_calls.post_pre(written, X, post, comb, fn, scale, base, *options)
        return X, read, post, self._shown(comb, X, tokens)

    def _shown(self, comb: Tensor, X: Tensor, tokens: torch.Size | None) -> Tensor:
        """comb, after hooks of the projection have seen its plan."""
        if not self.projection._forward_hooks:
            return comb
        plan = comb if self.mixing.transposed else comb.mT
        shape = plan.shape if tokens is None else (*tokens, *plan.shape[1:])
        plan = self.projection(None, projected=plan.reshape(shape), streams=X).reshape(plan.shape)
        return plan if self.mixing.transposed else plan.mT

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Mixing | None]:
        """fn, scale, base in the dtype of the arithmetic, and what is computed of the mixes; None where operators do not."""
        fn, scale, base = (own(x, self.tokens_apart).to(dtype) for x in (self.fn, self.scale, self.base))
        if self.norm_weight is not None:
            fn = fn * own(self.norm_weight, self.tokens_apart).to(dtype)
        temperature = self.projection.temperature
        if self.projection.floor is not None or self.streams > MOST_STREAMS or isinstance(temperature, Tensor):
            return fn, scale, base, None
        if temperature != 1.0:
            n = self.streams
            scale = torch.cat([scale[:2], scale[2:] / temperature])
            base = torch.cat([base[: 2 * n], base[2 * n :] / temperature])
        return fn, scale, base, self.mixing

    def _read_apart(
        self, X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, tokens: torch.Size | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By the formulas, with the projection as a module."""
        n, mixing = self.streams, self.mixing
        pre, post, logits = oracle.gates(oracle.mixes(X, fn, mixing.norm_eps), scale, base, n, mixing)
        shape = logits.shape if tokens is None else (*tokens, n, n)
        plan = self.projection(logits.reshape(shape), streams=X).reshape(-1, n, n)
        return oracle.collapse(X, pre).to(X.dtype), post, plan if mixing.transposed else plan.mT

    def expand(self, x: Tensor) -> Tensor:
        """(..., C) to n equal streams, (..., n, C)."""
        streams = x.unsqueeze(-2).expand(*x.shape[:-1], self.streams, x.shape[-1])
        return streams.mT if self.channels_first else streams

    def reduce(self, x: Tensor) -> Tensor:
        """The mean of the streams, to (..., C)."""
        return x.mean(-1 if self.channels_first else -2)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        mixing = {name: getattr(self.mixing, name) for name in ("pre_eps", "post_mult", "norm_eps", "transposed")}
        shown = {"dim": self.dim, "streams": self.streams, **mixing}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    @classmethod
    def from_deepseek(cls, branch: nn.Module, fn: Tensor, scale: Tensor, base: Tensor, **options: Any) -> HyperConnection:
        """DeepSeek's layer with its weights, fn (n (n + 2), n C), scale (3,), base (n (n + 2),)."""
        streams = round(math.sqrt(fn.shape[0] + 1)) - 1
        if fn.dim() != 2 or fn.shape[0] != streams * (streams + 2) or fn.shape[1] % streams:
            raise ValueError(f"fn must have shape (n (n + 2), n C), got {tuple(fn.shape)}")
        known: dict[str, Any] = {"variant": "deepseek", "device": fn.device, "dtype": fn.dtype}
        layer = cls(branch, fn.shape[1] // streams, streams, **known | options)
        with torch.no_grad():
            for own, theirs, name in ((layer.fn, fn, "fn"), (layer.scale, scale, "scale"), (layer.base, base, "base")):
                if theirs.shape != own.shape:
                    raise ValueError(f"{name} must have shape {tuple(own.shape)}, got {tuple(theirs.shape)}")
                own.copy_(theirs)
        return layer

    @classmethod
    def from_liger(cls, branch: nn.Module, weights: nn.Module | Mapping[str, Tensor], **options: Any) -> HyperConnection:
        """LigerMHC's layer: a module, or its state, with phi (n C, n (n + 2)), b, alpha_pre, alpha_post and alpha_res."""
        state = weights.state_dict() if isinstance(weights, nn.Module) else weights
        missing = [name for name in ("phi", "b", "alpha_pre", "alpha_post", "alpha_res") if name not in state]
        if missing:
            raise ValueError(f"weights must have phi, b, alpha_pre, alpha_post and alpha_res, got none of {', '.join(missing)}")
        scale = torch.stack([state[name].reshape(()) for name in ("alpha_pre", "alpha_post", "alpha_res")])
        options = {"variant": "liger", "norm_eps": getattr(weights, "rms_eps", 1e-6)} | options
        return cls.from_deepseek(branch, state["phi"].mT, scale, state["b"].flatten(), **options)

    @classmethod
    def from_transformer_engine(
        cls, branch: nn.Module, phi: Tensor, alpha: Tensor, beta: Tensor, norm_weight: Tensor | None = None, **options: Any
    ) -> HyperConnection:
        """TransformerEngine's layer: phi (24, n C) and norm_weight (n C,) in the order of its (C, n), alpha (3,), beta (1, 24).

        Its streams come as (..., C, n), which ``channels_first=False`` changes to (..., n, C).
        """
        streams = round(math.sqrt(phi.shape[0] + 1)) - 1

        def in_order(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, streams)).mT.flatten(-2)

        options = {"variant": "transformer_engine", "channels_first": True, "norm_weight": norm_weight is not None} | options
        layer = cls.from_deepseek(branch, in_order(phi), alpha, beta.flatten(), **options)
        if norm_weight is not None:
            with torch.no_grad():
                assert layer.norm_weight is not None
                layer.norm_weight.copy_(in_order(norm_weight))
        return layer


def check_whole(x: Tensor) -> None:
    """ValueError for a DTensor: of a part of the tokens the parameters' gradients are a part."""
    if is_sharded(x):
        raise ValueError(
            "x must be a plain tensor, got a DTensor; give the module fastdsm.distributed.HyperConnectionParallel(), which "
            "takes sequence-parallel streams and adds up the gradients of its parameters over the processes"
        )


def whole_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where autocast would narrow products, it is off."""
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
