"""Attention of heads whose logits fit on chip: one launch forward, one backward. The contract is that of ``backends``."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdsm._ops.problem import Attention, Dropout, Potentials
from fastdsm._ops.streamed.gradient import AttentionGradients, Cotangents
from fastdsm._ops.streamed.sweeps import State, Sweeps

from ..common.configuration import Configuration, pointers_of, stand_in
from .arguments import EntryStrides
from .operands import block_of, by_line, dropout_arguments, drops, has_entries, logits_of, whole_lines
from .short_backward import Target, _attention_short_adjoint_bwd_kernel, _attention_short_gradient_bwd_kernel
from .short_forward import _attention_short_fwd_kernel
from .table import ELEMENTS

_HALVES = (torch.float16, torch.bfloat16)
_FORWARD, *_BACKWARDS = (
    _attention_short_fwd_kernel,
    _attention_short_adjoint_bwd_kernel,
    _attention_short_gradient_bwd_kernel,
)
LINES, FEATURES = (64, 128), (64, 128)
# Where registers hold a head: of 128 lines on Hopper a forward of 64 features and nothing per entry; a backward on Hopper, of
# 64 lines and features. Triton 3.7.1 compiles none of them for Blackwell: it finds no layout for a sum over a vector that is
# made of a product.
_FEW, _NARROW = LINES[0], FEATURES[0]
_HOPPER, _ALL = ("sm_90",), ("sm_80", "sm_90")


def serves(query: Tensor, key: Tensor, value: Tensor, entries: bool, saving: bool) -> bool:
    """Whether these launches do, and those of a gradient where one is to be saved for: of 16 bits and 2 to 64 lines a side.

    64 features with a gradient, 128 without; without one and nothing per entry, 128 lines of 64 features.
    """
    most, features = max(query.shape[2], key.shape[2]), max(query.shape[3], value.shape[3])
    least = min(query.shape[2], key.shape[2])
    if query.dtype not in _HALVES or value.dtype != query.dtype or least < 2 or 0 in (query.numel(), value.numel()):
        return False
    many = most > _FEW
    if most > LINES[-1] or features > (_NARROW if saving or many else FEATURES[-1]) or (many and (saving or entries)):
        return False
    kind = ELEMENTS[query.dtype], LINES[many], _NARROW, entries, False, False
    return _configuration(_BACKWARDS[0] if saving else _FORWARD, *kind).runs_on(query.device)


def _warps(kernel: Any, lines: int, features: int, entries: bool) -> int:
    """As many as need not spill."""
    few = kernel is _FORWARD and lines == _FEW and not (entries and features > _NARROW)
    return 4 if few else 8


@functools.cache
def _configuration(
    kernel: Any, element: str, lines: int, features: int, entries: bool, dropout: bool, line_is_key: bool
) -> Configuration:
    halves = ("operands.line_ptr", "operands.stream_ptr", "operands.bias_ptr", "x_ptr", "out_ptr", "line_v_ptr", "stream_v_ptr")
    types = dict.fromkeys((*halves, "d_query.out_ptr", "d_key.out_ptr", "d_value.out_ptr"), element)
    types |= dict.fromkeys(("operands.mask_ptr", "operands.line_padding_ptr", "operands.stream_padding_ptr"), "u8")
    types |= {"seed_ptr": "i64", "sweeps_ptr": "i32", "line_f_ptr": "fp64", "stream_f_ptr": "fp64"}
    return Configuration(
        kernel,
        {name: types.get(name, "fp32") for name in pointers_of(kernel)},
        {
            "BLOCK_L": lines,
            "BLOCK_S": lines,
            "BLOCK_D": features,
            "BLOCK_E": features,
            "PIECES": 3 if element == "bf16" else 2,
            "ENTRIES": entries,
            "HAS_DROPOUT": dropout,
            "LINE_IS_KEY": line_is_key,
        },
        _warps(kernel, lines, features, entries),
        matrices=1,
        targets=_ALL if kernel is _FORWARD and lines == _FEW else _HOPPER,
        label=f"{element} short {kernel.fn.__name__.split('_')[3]} {lines} lines {features}"
        + " entries" * entries
        + " dropout" * dropout
        + " by key" * line_is_key,
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    kinds = ((False, False), (True, False), (True, True))
    few = [(_FORWARD, _FEW, features, *kind) for features, kind in itertools.product(FEATURES, kinds)]
    backward = [(kernel, _FEW, _NARROW, *kind) for kernel, kind in itertools.product(_BACKWARDS, kinds)]
    many = (_FORWARD, LINES[1], _NARROW, False, False)
    return [
        _configuration(kernel, ELEMENTS[dtype], *rest, by_key)
        for kernel, *rest in (*few, many, *backward)
        for dtype, by_key in itertools.product(_HALVES, (False, True))
    ]


@dataclass(frozen=True)
class _Call:
    """What the launches of a call have in common. kind: of their configurations but for the kernel."""

    kind: tuple[Any, ...]
    arguments: dict[str, Any]
    absent: Tensor
    programs: int
    device: torch.device

    @classmethod
    def of(cls, problem: Attention, value: Tensor, sweeps: Sweeps, dropout: Dropout | None) -> _Call:
        query, key = problem.query, problem.key
        over, dropped = "cols" if sweeps.columns_first else "rows", drops(dropout)
        most = max(query.shape[2], key.shape[2])
        kind = (
            ELEMENTS[query.dtype],
            block_of(most, LINES),
            block_of(max(query.shape[3], value.shape[3]), FEATURES),
            dropped or has_entries(problem),
            dropped,
            not sweeps.columns_first,
        )
        absent = stand_in(query.device, "fp32")
        arguments = {
            **logits_of(problem, over, Potentials(absent, absent, absent, absent, sweeps.columns_first))._asdict(),
            "line_group": 1 if over == "cols" else query.shape[1] // key.shape[1],
            "n_iters": sweeps.n_iters,
            "tol": sweeps.tol,
            "scalings": math.floor(45 / math.log2(most)),
            **dropout_arguments(dropout, query.device),
        }
        return cls(kind, arguments, absent, query.shape[0] * query.shape[1], query.device)

    def launch(self, kernel: Any, **arguments: Any) -> None:
        """One of them."""
        _configuration(kernel, *self.kind).on(self.device).launch(self.programs, **self.arguments, **arguments)


def forward(problem: Attention, value: Tensor, sweeps: Sweeps, dropout: Dropout | None, out: Tensor, state: State) -> None:
    """Fill ``out`` and ``state``, of the last potentials alone."""
    x = whole_lines(value)
    line, stream = (state.f, state.g) if sweeps.columns_first else (state.g, state.f)
    _Call.of(problem, value, sweeps, dropout).launch(
        _FORWARD,
        x_ptr=x,
        out_ptr=out,
        line_f_ptr=line,
        stream_f_ptr=stream,
        residual_ptr=state.residual,
        sweeps_ptr=state.sweeps,
        x_strides=by_line(x),
        out_strides=EntryStrides(*out.stride()),
        e=x.shape[3],
        out_e=out.shape[3],
        x_group=problem.query.shape[1] // value.shape[1],
    )


def backward(
    problem: Attention,
    value: Tensor,
    sweeps: Sweeps,
    dropout: Dropout | None,
    given: Cotangents,
    done: Tensor,
    gradients: AttentionGradients,
) -> None:
    """Fill ``gradients``; done (B, H): the sweeps of each head."""
    (B, H, N, d), (G, M) = problem.query.shape, problem.key.shape[1:3]
    call, columns = _Call.of(problem, value, sweeps, dropout), sweeps.columns_first
    absent, lines = call.absent, call.kind[1]
    history = torch.empty((B * H, max(sweeps.n_iters, 1), 4 * lines), dtype=torch.float32, device=call.device)
    grad_out, values = whole_lines(given.out), whole_lines(value)
    (line_v, line_v_group), (stream_v, stream_v_group) = ((grad_out, 1), (values, H // G))[:: 1 if columns else -1]
    line_df, stream_df = (given.f, given.g)[:: 1 if columns else -1]
    shared = {
        "line_v_ptr": line_v,
        "stream_v_ptr": stream_v,
        "sweeps_ptr": done,
        "history_ptr": history,
        "line_v_strides": by_line(line_v),
        "stream_v_strides": by_line(stream_v),
        "e": grad_out.shape[3],
        "line_v_group": line_v_group,
        "stream_v_group": stream_v_group,
    }
    of_keys = {"key": gradients.key, "value": gradients.value}
    wide = {} if G == H else {x: y.new_empty((B, H, *y.shape[2:]), dtype=torch.float32) for x, y in of_keys.items()}
    adjoint, gradient = _BACKWARDS
    call.launch(
        adjoint,
        **shared,
        line_df_ptr=absent if line_df is None else line_df.contiguous(),
        stream_df_ptr=absent if stream_df is None else stream_df.contiguous(),
        d_value=_target(gradients.value, wide.get("value"), absent),
        out_e=value.shape[3],
        has_line_df=int(line_df is not None),
        has_stream_df=int(stream_df is not None),
    )
    entries = absent
    if gradients.bias is not None:
        entries = torch.empty((B, H, N, M) if columns else (B, H, M, N), dtype=torch.float32, device=call.device)
    call.launch(
        gradient,
        **shared,
        entries_ptr=entries,
        d_query=_target(gradients.query, None, absent),
        d_key=_target(gradients.key, wide.get("key"), absent),
        out_d=d,
        has_entries=int(gradients.bias is not None),
    )
    for name, x in wide.items():
        of_keys[name].copy_(x.unflatten(1, (G, -1)).sum(2))
    if gradients.bias is not None:
        gradients.bias.copy_((entries if columns else entries.mT).sum_to_size(gradients.bias.shape))


def _target(x: Tensor, wide: Tensor | None, absent: Tensor) -> Target:
    strides = EntryStrides(*(x if wide is None else wide).stride())
    return Target(x, absent if wide is None else wide, int(wide is not None), strides)
