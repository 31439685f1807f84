"""``SpectralMonitor``: the spectra of a network's Sinkhorn layers while it trains.

A forward hook on every fastdsm layer keeps a few of its plans; when the network's forward ends, the plans of all layers of
one size are measured in one batch, so that many small layers cost hardly more than one. The numbers stay on the device: on a
GPU they travel to the host by an asynchronous copy, and a row is written once its copy has arrived, which is asked and never
waited for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import arguments, sharded
from .._ops.mixing import MOST_STREAMS
from ..nn import HyperConnection, SinkhornAttention, SinkhornProjection
from .measured import Pending, Row, Thresholds, groups_of
from .sinks import sinks_of
from .streams import Mixed, PendingStreams, StreamRow, cosine_of

# Of the plans of one layer at one step, at most this many entries are kept: four heads of 512 x 512.
_MAX_ENTRIES = 1 << 20


class SpectralMonitor:
    """Record sigma2 and its kin of every fastdsm layer of a module, step by step: ``monitor = SpectralMonitor(model)``.

    A step is a forward of ``module`` in training mode. :class:`fastdsm.nn.SinkhornProjection` (inside
    :class:`fastdsm.nn.HyperConnection`, too) and :class:`fastdsm.nn.SinkhornAttention` are found by themselves, under their
    names in ``module``; any other plan is reported by ``monitor.record("name", plan)`` from within the forward. A layer called
    more than once in a step, by weight sharing or checkpointing, is recorded at its first call. For an attention layer the
    sampled plans are made once more, dense.

    Args:
        module: the network; it keeps working as before, hooks are all that is added.
        every: record each so many steps, >= 1, the first among them.
        path: file for the rows, ``.jsonl`` (pandas.read_json(path, lines=True)) or ``.csv``; overwritten. None: memory alone.
        tensorboard: a log directory or a SummaryWriter; a directory needs the extra ``fastdsm[monitor]``.
        sample: plans kept per layer, head and step, >= 1, evenly spaced over batch and tokens; fewer where they are large.
        uniform: a head whose mean sigma2 is at most this has collapsed to the uniform plan.
        identity: a head whose mean distance to the identity (1 for the uniform plan) is at most this has collapsed to it.
        training_only: whether forwards in evaluation mode are passed over.
        processes: None, or a ProcessGroup over whose processes every row is taken together: means, extremes; all of them must
            watch the same layers at the same steps, and each then writes the same rows. ``stream_rows`` are of one process.

    Attributes:
        rows: a list of :class:`fastdsm.diagnostics.Row` of all steps recorded, as far as they have reached the host;
            they stay in memory, some 300 bytes each.
        stream_rows: of every :class:`fastdsm.nn.HyperConnection` of up to 16 streams beside that a
            :class:`fastdsm.diagnostics.StreamRow`, in the order of their calls: the singular values of its mix and of the
            product of all mixes so far, and the cosine between its streams.
        step: forwards counted so far.

    Forwards inside ``torch.func`` (vmap, grad, jvp, ...) are not steps, and layers inside it are not recorded: what these see
    are wrapped tensors. Forwards of several threads are steps by themselves, numbered as they end, under one lock.

    Of a DTensor a process records what it has. An attention layer under ``fastdsm.distributed.SinkhornContextParallel`` is
    passed over: no process has its plan.

    Copies of ``module`` (deepcopy, pickle, torch.save, torch.optim.swa_utils.AveragedModel) are not watched.

    ``close()``, or leaving a ``with`` block, removes the hooks and writes what is left; it waits for the device, since ``rows``
    then has to be complete. Hooks break the graph of torch.compile(module): attach the monitor first, without fullgraph.

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.
    """

    def __init__(
        self,
        module: nn.Module,
        every: int = 1,
        path: str | Path | None = None,
        tensorboard: Any = None,
        sample: int = 64,
        uniform: float = 0.05,
        identity: float = 0.05,
        training_only: bool = True,
        processes: Any = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.rows: list[Row] = []
        self.stream_rows: list[StreamRow] = []
        self.step = 0
        self._every, self._sample = arguments.count_of(every, "every", 1), arguments.count_of(sample, "sample", 1)
        self._thresholds = Thresholds(uniform, identity)
        self._sinks = sinks_of(path, tensorboard)
        self._forward = _Forward()
        self._lock = threading.Lock()
        self._training_only, self._processes = training_only, processes
        self._pending: deque[Pending] = deque()
        self._pending_streams: deque[PendingStreams] = deque()
        self._hooks = [module.register_forward_pre_hook(_Hook(self._begin))]
        for name, layer in module.named_modules():
            if isinstance(layer, SinkhornProjection):
                self._hooks.append(layer.register_forward_hook(_Hook(self._of_projection(name))))
            elif isinstance(layer, SinkhornAttention):
                self._hooks.append(layer.register_forward_hook(_Hook(self._of_attention(name)), with_kwargs=True))
            elif isinstance(layer, HyperConnection) and layer.streams <= MOST_STREAMS:
                hook = _Hook(self._of_connection(name, layer.mixing.transposed))
                self._hooks.append(layer.projection.register_forward_hook(hook, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(_Hook(self._end)))  # after those of the layers: module may be one

    def record(self, name: str, plan: Tensor, heads: bool = False) -> None:
        """Keep plans (..., n, m) for this step under ``name``; ``heads``: they are (..., H, n, m), to be told apart."""
        if not self._wants(name):
            return
        plan = sharded.local(plan)
        arguments.check_matrices(plan, name)
        if plan.numel() == 0:
            return
        plans = plan.detach().reshape(-1, plan.shape[-3] if heads else 1, *plan.shape[-2:])
        stride = _stride(len(plans), self._sample, plans[0].numel())
        self._forward.kept[name] = plans[::stride].to(torch.float32, copy=True)

    def close(self) -> None:
        """Remove the hooks, and write what is left."""
        for hook in self._hooks:
            hook.remove()
        with self._lock:
            self._write(wait=True)
            for sink in self._sinks:
                sink.close()
            self._hooks, self._sinks = [], []

    def __enter__(self) -> SpectralMonitor:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name not in ("_forward", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _forward=_Forward(), _lock=threading.Lock())

    def __exit__(self, *_: object) -> None:
        self.close()

    def figure(self, path: str | Path) -> None:
        """Draw sigma2 of every layer over the steps recorded so far to ``path``; needs the extra ``fastdsm[monitor]``."""
        from .monitor_figure import draw

        draw(self.rows, Path(path))

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._forward.kept, self._forward.mixed = {}, []
        self._forward.recorded = self._counts(module) and self.step % self._every == 0

    def _end(self, module: nn.Module, *_: Any) -> None:
        if not self._counts(module):
            return
        groups, mixed = groups_of(self._forward.kept), self._forward.mixed
        self._forward.kept, self._forward.mixed, self._forward.recorded = {}, [], False
        with self._lock:
            if mixed:
                self._pending_streams.append(PendingStreams.of(self.step, mixed))
            for group in groups:
                self._pending.append(Pending.of(self.step, group, self._processes))
            self.step += 1
            self._write(wait=False)

    def _counts(self, module: nn.Module) -> bool:
        return (module.training or not self._training_only) and not torch._C._are_functorch_transforms_active()

    def _wants(self, name: str) -> bool:
        """Whether a plan of this name is to be kept."""
        forward = self._forward
        return forward.recorded and name not in forward.kept and not torch._C._are_functorch_transforms_active()

    def _of_projection(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, plan: Tensor) -> None:
            self.record(name, plan)

        return hook

    def _of_attention(self, name: str) -> Callable[..., None]:
        def hook(layer: SinkhornAttention, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            if self._wants(name) and layer.context_group is None:
                with torch.no_grad():
                    self.record(name, plan_of_call(self._sample, layer, *args, **kwargs), heads=True)

        return hook

    def _of_connection(self, name: str, transposed: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, kwargs: dict[str, Any], plan: Tensor) -> None:
            streams, forward = kwargs.get("streams"), self._forward
            if streams is None or not forward.recorded or any(layer.layer == name for layer in forward.mixed):
                return
            plans = plan.detach().reshape(-1, *plan.shape[-2:])
            stride = _stride(len(plans), self._sample, plans[0].numel() if len(plans) else 1)
            if len(plans):
                mixes = (plans.mT if transposed else plans)[::stride].to(torch.float32, copy=True)
                forward.mixed.append(Mixed(name, mixes, cosine_of(streams.detach()[::stride])))

        return hook

    def _write(self, wait: bool) -> None:
        """Turn what has arrived on the host into rows, in order."""
        while self._pending_streams and (wait or self._pending_streams[0].arrived):
            self.stream_rows += self._pending_streams.popleft().rows()
        while self._pending and (wait or self._pending[0].arrived):
            rows = self._pending.popleft().rows(self._thresholds)
            self.rows += rows
            for sink in self._sinks:
                sink.write(rows)


class _Forward(threading.local):
    """What a thread has kept of the forward that it is in, if that is recorded."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.mixed: list[Mixed] = []
        self.recorded = False


class _Hook:
    """A monitor's hook on the module that it watches. In a copy of that module, or in a file, it does nothing."""

    def __init__(self, function: Callable[..., None] | None) -> None:
        # Not a decorator: it imports torch._dynamo, a second that an optimiser takes too, but `import fastdsm` need not.
        self._function = None if function is None else torch.compiler.disable(function)

    def __call__(self, *args: Any) -> None:
        if self._function is not None:
            self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


def plan_of_call(
    sample: int,
    layer: SinkhornAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    query_padding_mask: Tensor | str | None = "auto",
) -> Tensor:
    """Plans (at most ``sample``, H, N, M) of one call of an attention layer, from the call's own arguments."""
    if query.dim() == 3:
        # Found out before parts are taken: of these nobody could tell whether they are one.
        query_padding_mask, key_padding_mask = layer.paddings(query, key, key_padding_mask, query_padding_mask)
        at = 0 if layer.batch_first else 1
        batch, lines, keys = query.shape[at], query.shape[1 - at], key.shape[1 - at]
        stride = _stride(batch, sample, layer.num_heads * lines * keys)
        query, key = (x.movedim(at, 0)[::stride].movedim(0, at) for x in (query, key))
        query_padding_mask, key_padding_mask = (x if x is None else x[::stride] for x in (query_padding_mask, key_padding_mask))
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, layer.num_heads))[::stride].flatten(0, 1)
    return layer.plan(query, key, key_padding_mask, attn_mask, query_padding_mask)


def _stride(count: int, sample: int, entries: int) -> int:
    """Every so many of ``count`` plans of ``entries`` each are kept: at most ``sample``, and no more than fit."""
    return max(-(-count // max(min(sample, _MAX_ENTRIES // max(entries, 1)), 1)), 1)
