"""``HyperConnections``: a stack of branches on n residual streams, from one stream to one stream.

Behind each branch but the last the streams are written and the next branch's input is read in one call (``mhc_post_pre``).
Streams are n times as large as what branches see, and are what such a stack keeps for its backward. With ``recompute`` it keeps
them every so many branches alone: those between are made again, by one pre and one post each, from what branches returned,
which is kept; no branch runs twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .._ops import mhc_calls
from .._ops.sharded import own
from ..mhc.layer import mhc_head
from .hyper_connection import HyperConnection, check_whole, whole_precision


class HyperConnections(nn.Module):
    """Branches one after the other, each by a :class:`HyperConnection` of its own.

    Args:
        branches: modules from (..., C) to (..., C).
        dim: C.
        streams: n, 1 to 16.
        head: read the streams at the end by learnt weights, as DeepSeek's ``mhc_head``; False: their mean.
        recompute: None, or how many branches have their streams made again in the backward, from those before the first.
        options: of :class:`HyperConnection`; not channels_first or sigma2_floor.

    forward(x (..., C), *args, **kwargs), the arguments for every branch, gives (..., C) in x's dtype. The parameters of layer i
    are under ``layers.i``. Values and gradients are those of the layers called one by one.

    Source: mHC, arXiv 2512.24880; the head: DeepSeek-V4's inference code.
    """

    def __init__(
        self,
        branches: Iterable[nn.Module],
        dim: int,
        streams: int = 4,
        *,
        head: bool = False,
        recompute: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if options.get("channels_first") or options.get("sigma2_floor") is not None:
            raise ValueError("a stack has neither channels_first nor sigma2_floor; use HyperConnection for every layer")
        if recompute is not None and recompute < 1:
            raise ValueError(f"recompute must be None or >= 1, got {recompute}")
        self.layers = nn.ModuleList(HyperConnection(branch, dim, streams, **options) for branch in branches)
        if not self.layers:
            raise ValueError("branches must have at least one module")
        self.dim, self.streams, self.recompute = dim, streams, recompute
        like = {name: options.get(name) for name in ("device", "dtype")}
        self.head_fn = nn.Parameter(torch.empty(streams, streams * dim, **like)) if head else None
        self.head_scale = nn.Parameter(torch.empty(1, **like)) if head else None
        self.head_base = nn.Parameter(torch.empty(streams, **like)) if head else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the head's parameters anew: it starts near the mean; the layers have their own."""
        if self.head_fn is not None and self.head_scale is not None and self.head_base is not None:
            nn.init.normal_(self.head_fn, std=(self.streams * self.dim) ** -0.5)
            nn.init.constant_(self.head_scale, 0.01)
            with torch.no_grad():
                self.head_base.copy_(self._first.base[: self.streams])

    @property
    def _first(self) -> HyperConnection:
        layer = self.layers[0]
        assert isinstance(layer, HyperConnection)
        return layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., C) through all branches."""
        check_whole(x)
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (..., {self.dim}), got {tuple(x.shape)}")
        X = self._first.expand(x).reshape(-1, self.streams, self.dim)
        layers: list[Any] = list(self.layers)
        size = len(layers) if self.recompute is None else self.recompute
        for begin in range(0, len(layers), size):
            some = layers[begin : begin + size]
            kept = self.recompute is None or not torch.is_grad_enabled() or torch.compiler.is_compiling()
            X = self._through(some, X, x.shape, None if kept else _Segment(some, X), args, kwargs)
        with whole_precision(X):
            if self.head_fn is None or self.head_scale is None or self.head_base is None:
                return X.mean(1).reshape(x.shape)
            mixing = self._first.mixing
            read = mhc_head(
                X, *(own(x, self._first.tokens_apart) for x in (self.head_fn, self.head_scale, self.head_base)),
                norm_eps=mixing.norm_eps, pre_eps=mixing.pre_eps, backend=self._first.backend,
            )  # fmt: skip
            return read.reshape(x.shape)

    @staticmethod
    def _through(
        layers: list[HyperConnection], X: Tensor, shape: torch.Size, segment: _Segment | None, args: Any, kwargs: Any
    ) -> Tensor:
        """Streams (T, n, C) behind these layers."""
        tokens = shape[:-1]
        with whole_precision(X), nullcontext() if segment is None else segment.keeping():
            h, post, comb, X = layers[0].read(X, tokens)
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            written = layer.branch(h.reshape(shape), *args, **kwargs)
            with whole_precision(X), nullcontext() if segment is None else segment.keeping():
                written = written.reshape(-1, shape[-1]).to(X.dtype)
                if after is None:
                    X = mhc_calls.post(written, X, post, comb, layer.backend_for(X))
                    break
                X, h, post, comb = after.read_behind(written, X, post, comb, tokens)
            if segment is not None:
                segment.made(X, written)
        if segment is not None:
            segment.done()
        return X


class _Kept:
    """A tensor of a backward, or the number of the streams that it is."""

    def __init__(self, value: Tensor | int) -> None:
        self.value = value


class _Segment:
    """Layers whose streams, but the first, are not kept for the backward but made again, from what branches returned."""

    def __init__(self, layers: list[HyperConnection], first: Tensor) -> None:
        self._layers, self._shape = layers, first.shape
        self._written: list[Tensor] = []
        self._kept: list[_Kept] = []  # of the call that is made, until what it makes is known
        self._made = {0: first.detach()}

    def keeping(self) -> AbstractContextManager[Any]:
        """Within this, tensors are kept by this segment."""
        return saved_tensors_hooks(self._keep, self._given)

    def made(self, X: Tensor, written: Tensor) -> None:
        """The streams behind the next layer."""
        self._written.append(written.detach())
        number = len(self._written)
        self._made[number] = X.detach()
        for kept in self._kept:
            kept.value = self._number_of(kept.value)
        self._kept.clear()
        self._made = {0: self._made[0], number: self._made[number]}

    def done(self) -> None:
        """All layers are through."""
        self._kept.clear()
        self._made = {0: self._made[0]}

    def _number_of(self, value: Tensor | int) -> Tensor | int:
        """Of streams that were made here their number, of all else itself."""
        for number, X in self._made.items():
            if number > 0 and isinstance(value, Tensor) and _are_same(value, X):
                return number
        return value

    def _keep(self, tensor: Tensor) -> _Kept:
        kept = _Kept(self._number_of(tensor))
        if isinstance(kept.value, Tensor) and tensor.shape == self._shape:
            self._kept.append(kept)
        return kept

    def _given(self, kept: _Kept) -> Tensor:
        if isinstance(kept.value, Tensor):
            return kept.value
        number = kept.value
        if number not in self._made:
            self._make(number)
        # A backward goes down: what lies above is not asked for again.
        self._made = {i: X for i, X in self._made.items() if i <= number + 1}
        return self._made[number]

    def _make(self, last: int) -> None:
        """Streams up to those behind layer ``last``, from the last that are known."""
        with torch.no_grad():
            for number in range(max(i for i in self._made if i <= last), last):
                X = self._made[number]
                with whole_precision(X):
                    layer = self._layers[number]
                    _, post, comb, _ = layer.read(X)
                    self._made[number + 1] = mhc_calls.post(self._written[number], X, post, comb, layer.backend_for(X))


def _are_same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.dtype == y.dtype
