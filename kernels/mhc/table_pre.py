"""The finite table of ``pre``'s kernels, as compiled without a spill, and which of them serves what."""

from __future__ import annotations

import functools

import torch

from fastdsm._ops.mixing import MOST_STREAMS

from ..common.configuration import Configuration, pointers_of
from ..registers.launch import TYPES
from .backward import _mhc_dots_bwd_kernel, _mhc_mix_bwd_kernel, _mhc_streams_bwd_kernel, _mhc_sum_bwd_kernel
from .collapse import _mhc_mix_fwd_kernel
from .mixes import MAX_LINES
from .product import _mhc_product_fwd_kernel

_ROWS = (16, 32, 64, 128)  # of fn, of a program of the product
# Its tokens and channels at a time, by rows.
_FEW = 16
FEW_TOKENS = 256  # as many are cut into blocks of _FEW: more programs are worth more than fn, which each reads
_MANY: dict[torch.dtype, tuple[tuple[int, int], ...]] = {
    torch.bfloat16: ((256, 64), (256, 32), (128, 32), (64, 32)),
    torch.float16: ((256, 32), (256, 16), (128, 16), (64, 32)),
    torch.float32: ((256, 32), (256, 16), (128, 16), (64, 16)),
}
_LINES = (1, 2, 3, 4, 8, 16)  # of the kernels that make mixes
_DOT_LINES = (4, 8, 16)  # streams that a program has room for
_GRADIENT_ROWS = (16, 32)  # of fn, of a program of its gradient that has them all


def block_of(size: int, blocks: tuple[int, ...]) -> int:
    """The smallest block that holds ``size``, or the largest."""
    return next((block for block in blocks if size <= block), blocks[-1])


@functools.cache
def _product(dtype: torch.dtype, many: bool, rows: int) -> Configuration:
    few = _FEW, 64 if dtype == torch.bfloat16 and rows < _ROWS[-1] else 32
    block_t, block_k = _MANY[dtype][_ROWS.index(rows)] if many else few
    return Configuration(
        kernel=_mhc_product_fwd_kernel,
        pointers={"X_ptr": TYPES[dtype], "fn_ptr": "fp32", "partials_ptr": "fp32"},
        constants={"BLOCK_T": block_t, "BLOCK_D": rows, "BLOCK_K": block_k},
        num_warps=8 if many else 4,
        num_stages=3,
        maxnreg=255,
        matrices=block_t,
        label=f"mhc product {TYPES[dtype]} {block_t} tokens {rows} rows",
    )


def _mix_tokens(lines: int, head: bool) -> int:
    """Tokens of a program that makes mixes."""
    return 32 if head or lines <= MAX_LINES.value else 128 // lines


@functools.cache
def _mix(dtype: torch.dtype, lines: int, head: bool, info: bool) -> Configuration:
    block = _mix_tokens(lines, head)
    block_c = 128 if lines <= 4 else 64 if dtype.itemsize == 2 else 32
    return Configuration(
        kernel=_mhc_mix_fwd_kernel,
        pointers=dict.fromkeys(("X_ptr", "h_ptr"), TYPES[dtype])
        | dict.fromkeys(
            ("partials_ptr", "scale_ptr", "base_ptr", "given_ptr", "pre_ptr", "post_ptr", "comb_ptr", "info_ptr", "sums_ptr"),
            "fp32",
        ),
        constants={
            "LINES": lines,
            "HEAD": head,
            "INFO": info,
            "BLOCK_T": block,
            "BLOCK_C": block_c,
        },
        num_warps=4,
        maxnreg=255,
        matrices=block,
        label=f"mhc mix {TYPES[dtype]} " + ("head" if head else f"{lines} streams") + " with its spectrum" * info,
    )


@functools.cache
def _dots(dtype: torch.dtype, lines: int) -> Configuration:
    return Configuration(
        kernel=_mhc_dots_bwd_kernel,
        pointers=dict.fromkeys(("dh_ptr", "X_ptr"), TYPES[dtype]) | {"dots_ptr": "fp32"},
        constants={"LINES": lines, "BLOCK_T": 16, "BLOCK_C": 128 if lines <= 4 else 64},
        num_warps=4,
        matrices=16,
        label=f"mhc dots {TYPES[dtype]} {lines} streams",
    )


@functools.cache
def _mix_backward(lines: int, head: bool) -> Configuration:
    block = _mix_tokens(lines, head)
    return Configuration(
        kernel=_mhc_mix_bwd_kernel,
        pointers=dict.fromkeys(pointers_of(_mhc_mix_bwd_kernel), "fp32"),
        constants={"LINES": lines, "HEAD": head, "BLOCK_T": block},
        num_warps=1 if head or lines <= MAX_LINES.value else 4,
        maxnreg=255,
        matrices=block,
        label="mhc mix backward " + ("head" if head else f"{lines} streams"),
    )


@functools.cache
def _streams(dtype: torch.dtype, streams: int, block_d: int, single: bool) -> Configuration:
    few = streams > 1
    block_t = 16 if few else 64 if single and dtype == torch.bfloat16 else 32
    return Configuration(
        kernel=_mhc_streams_bwd_kernel,
        pointers=dict.fromkeys(("dh_ptr", "X_ptr", "add_ptr", "dX_ptr"), TYPES[dtype])
        | dict.fromkeys(("fn_ptr", "ds_ptr", "weights_ptr", "dfn_ptr"), "fp32"),
        constants={"STREAMS": streams, "BLOCK_T": block_t, "BLOCK_C": 64, "BLOCK_D": block_d, "SINGLE": single},
        num_warps=4 if few else 8,
        num_stages=3 if few else 2,
        matrices=block_t,
        label=f"mhc streams backward {TYPES[dtype]} {streams} streams {block_d} rows" + " of more" * (not single),
    )


@functools.cache
def sum_backward() -> Configuration:
    """What adds up partial gradients."""
    return Configuration(
        kernel=_mhc_sum_bwd_kernel,
        pointers=dict.fromkeys(pointers_of(_mhc_sum_bwd_kernel), "fp32"),
        constants={"BLOCK": 1024, "LINES": 64, "BLOCK_D": 32},
        num_warps=4,
        matrices=1024,
        label="mhc sum backward",
    )


def product_of(dtype: torch.dtype, tokens: int, rows: int) -> Configuration:
    """What multiplies by fn of so many rows."""
    return _product(dtype, tokens > FEW_TOKENS, block_of(rows, _ROWS))


def mix_of(dtype: torch.dtype, streams: int, head: bool, info: bool) -> Configuration:
    """What makes mixes, with their spectra where ``info`` is asked for."""
    return _mix(dtype, MOST_STREAMS if head else block_of(streams, _LINES), head, info and not head)


def dots_of(dtype: torch.dtype, streams: int) -> Configuration:
    """What multiplies dh with streams."""
    return _dots(dtype, block_of(streams, _DOT_LINES))


def mix_backward_of(streams: int, head: bool) -> Configuration:
    """The backward of :func:`mix_of`."""
    return _mix_backward(MOST_STREAMS if head else block_of(streams, _LINES), head)


def streams_of(dtype: torch.dtype, streams: int, rows: int) -> Configuration:
    """What makes dX and fn's gradient: of all rows if there are few, of four streams together where these fit."""
    together = 4 if streams == 4 and dtype == torch.bfloat16 and rows <= _GRADIENT_ROWS[-1] else 1
    single = rows <= _GRADIENT_ROWS[-1]
    return _streams(dtype, together, block_of(rows, _GRADIENT_ROWS), single)


def configurations() -> list[Configuration]:
    """Every kernel that ``pre`` can launch."""
    products = [_product(dtype, many, rows) for dtype in TYPES for many in (False, True) for rows in _ROWS]
    kinds = [(lines, False) for lines in _LINES] + [(MOST_STREAMS, True)]
    mixes = [_mix(dtype, *kind, info) for dtype in TYPES for kind in kinds for info in ((False,) if kind[1] else (False, True))]
    backwards = [_dots(dtype, lines) for dtype in TYPES for lines in _DOT_LINES]
    backwards += [_mix_backward(*kind) for kind in kinds] + [sum_backward()]
    # From 17 to 32 rows are those of four streams alone.
    few = [(dtype, rows) for dtype in TYPES for rows in _GRADIENT_ROWS if (dtype, rows) != (torch.bfloat16, _GRADIENT_ROWS[-1])]
    streams = [_streams(dtype, 1, rows, True) for dtype, rows in few]
    streams += [_streams(dtype, 1, _GRADIENT_ROWS[-1], False) for dtype in TYPES]
    streams += [_streams(torch.bfloat16, 4, rows, True) for rows in _GRADIENT_ROWS]
    return products + mixes + backwards + streams
