"""What every kernel of attention is handed beside its own: operands of the logits, their strides and sizes, each one argument.

Each is of one kind and stands where plain parameters would: the order decides what the assembler makes of a kernel, down to
whether it spills. ``line`` is the side that stays on chip, ``stream`` the other, as in ``tile.py``.
"""

from typing import NamedTuple

import triton.language as tl


class Operands(NamedTuple):
    """Query and key (B, heads, lines, d), features side by side; bias in their dtype or in float32, and mask (B, H, N, M);
    padding (B, lines); temperature (B, H); base and fine part of the potentials (sets, B, H, lines)."""

    line_ptr: tl.pointer_type
    stream_ptr: tl.pointer_type
    bias_ptr: tl.pointer_type
    bias32_ptr: tl.pointer_type
    mask_ptr: tl.pointer_type
    line_padding_ptr: tl.pointer_type
    stream_padding_ptr: tl.pointer_type
    temperature_ptr: tl.pointer_type
    line_base_ptr: tl.pointer_type
    line_fine_ptr: tl.pointer_type
    stream_base_ptr: tl.pointer_type
    stream_fine_ptr: tl.pointer_type


class VectorStrides(NamedTuple):
    """Of batch, head and line."""

    b: tl.int64
    h: tl.int64
    n: tl.int64


class EntryStrides(NamedTuple):
    """Of batch, head, line and what is along a line: stream or features."""

    b: tl.int64
    h: tl.int64
    n: tl.int64
    m: tl.int64


class Strides(NamedTuple):
    """Of the operands."""

    line: VectorStrides
    stream: VectorStrides
    bias: EntryStrides
    mask: EntryStrides


class Sizes(NamedTuple):
    """Numbers of query heads, of those to a head of the stream, of lines and of features; then which operands there are.

    bias_kind: 0 none, 1 read the one of the dtype of the query, 2 the float32 one.
    """

    heads: tl.int32
    stream_group: tl.int32
    n_lines: tl.int32
    n_stream: tl.int32
    d: tl.int32
    bias_kind: tl.int32
    has_mask: tl.int32
    has_line_padding: tl.int32
    has_stream_padding: tl.int32
    has_temperature: tl.int32


class Scales(NamedTuple):
    """k and k' at the temperature, or at temperature 1 where each head has its own."""

    logits: tl.float32
    bias: tl.float32


class Logits(NamedTuple):
    """All that logits and their plan are made of: the shared arguments of every kernel, and one value inside it."""

    operands: Operands
    strides: Strides
    sizes: Sizes
    scales: Scales
