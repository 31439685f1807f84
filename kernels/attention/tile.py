"""Tiles of attention logits, recomputed from query and key: what every pass over them shares.

In base 2, with k = log2(e) scale / temperature and k' = log2(e) / temperature of the head,

    x_ij = k q_i . k_j + k' bias_ij,    -inf where mask or padding exclude the entry,    P_ij = 2^(x_ij + f_i + g_j).

A pass keeps a block of LINES on chip and streams the other side past it: the lines are queries and the stream keys where sums
run over columns, the reverse where they run over rows. The code knows two sides only.

Each potential is a base and a fine part, times log2(e) once per line. The exponent is formed in one order everywhere,
((x + first base) + last base) + (fine + fine), whichever side is streamed: large bases are then rounded alike in all passes.

What excludes a whole line, padding or the ragged end, costs nothing per logit: its vector is loaded as 0, whatever lies in
memory, and its base as -inf, so that every P there is 0. What excludes single entries, and bias, are the ENTRIES kernels'.

A product of float32 P with operands of 16 bits splits P into pieces of their type: two leave an error below 2^-17 of P in
bfloat16 and 2^-23 in float16, three in bfloat16 below float32's. The range of float16 is too small for the plan of a sweep
that is not finished, and for derivatives: each line of P is brought to 2^14 .. 2^15 at its largest by a power of two, the
unit, which grows with what is streamed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.arithmetic import INTERPRET, LOG2_E, narrow


class Side(NamedTuple):
    """One side at a head: its vectors, the padding of its batch, and how many lines and features there are."""

    ptr: tl.pointer_type
    stride_n: tl.int64
    padding_ptr: tl.pointer_type
    has_padding: tl.int32
    n: tl.int32
    d: tl.int32


class Potential(NamedTuple):
    """Base and fine part at a head."""

    base_ptr: tl.pointer_type
    fine_ptr: tl.pointer_type


class Entries(NamedTuple):
    """Bias and mask at a head; strides: those of the logits."""

    bias_ptr: tl.pointer_type
    bias32_ptr: tl.pointer_type
    mask_ptr: tl.pointer_type


@triton.jit
def head_scales(logits, head):
    """k and k' of a head."""
    operands, sizes, scales = logits.operands, logits.sizes, logits.scales
    temperature = tl.load(operands.temperature_ptr + head, mask=sizes.has_temperature != 0, other=1.0)
    return scales.logits / temperature, scales.bias / temperature


@triton.jit
def at_head(ptr, strides, b, h):
    """Where vectors of head ``h`` of batch ``b`` begin."""
    return ptr + b * strides.b + h * strides.h


@triton.jit
def line_side(logits, b, h):
    """The lines of head ``h``, of their own heads, of batch ``b``."""
    operands, strides, sizes = logits.operands, logits.strides, logits.sizes
    return Side(
        ptr=at_head(operands.line_ptr, strides.line, b, h),
        stride_n=strides.line.n,
        padding_ptr=operands.line_padding_ptr + b * sizes.n_lines,
        has_padding=sizes.has_line_padding,
        n=sizes.n_lines,
        d=sizes.d,
    )


@triton.jit
def stream_side(logits, b, h):
    """The same of the stream."""
    operands, strides, sizes = logits.operands, logits.strides, logits.sizes
    return Side(
        ptr=at_head(operands.stream_ptr, strides.stream, b, h),
        stride_n=strides.stream.n,
        padding_ptr=operands.stream_padding_ptr + b * sizes.n_stream,
        has_padding=sizes.has_stream_padding,
        n=sizes.n_stream,
        d=sizes.d,
    )


@triton.jit
def line_potential(logits, offset):
    """The lines' potential, ``offset`` lines on."""
    operands = logits.operands
    return Potential(base_ptr=operands.line_base_ptr + offset, fine_ptr=operands.line_fine_ptr + offset)


@triton.jit
def stream_potential(logits, offset):
    """The same of the stream."""
    operands = logits.operands
    return Potential(base_ptr=operands.stream_base_ptr + offset, fine_ptr=operands.stream_fine_ptr + offset)


@triton.jit
def used_lines(side, first, BLOCK: tl.constexpr):
    """Which of BLOCK lines from ``first`` exist and are no padding."""
    lines = first + tl.arange(0, BLOCK)
    used = lines < side.n
    return used & (tl.load(side.padding_ptr + lines, mask=used & (side.has_padding != 0), other=0) == 0)


@triton.jit
def load_side(side, first, used, BLOCK_D: tl.constexpr):
    """Vectors of the lines of a side from ``first`` on."""
    return load_lines(side.ptr, side.stride_n, side.d, first, used, BLOCK_D)


@triton.jit
def load_lines(ptr, stride_n, d, first, used, BLOCK_D: tl.constexpr):
    """Vectors of the lines from ``first`` on, (lines, BLOCK_D), 0 where not ``used`` and from ``d`` on.

    Lines are made of whole 16-byte vectors.
    """
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    lines, features = tl.arange(0, used.shape[0]).to(tl.int64), tl.arange(0, BLOCK_D)
    pointers = ptr + first * stride_n + (lines[:, None] * stride_n + features[None, :])
    pointers = tl.max_contiguous(tl.multiple_of(pointers, (16, 16)), (1, VECTOR))
    mask = tl.max_constancy(used[:, None] & (features < d)[None, :], (1, VECTOR))
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_lines(ptr, stride_n, stride_d, d, first, exists, tile):
    """The reverse of :func:`load_lines`, in the dtype of the pointer."""
    lines = (first + tl.arange(0, tile.shape[0])).to(tl.int64)
    features = tl.arange(0, tile.shape[1])
    pointers = ptr + lines[:, None] * stride_n + features[None, :].to(tl.int64) * stride_d
    tl.store(pointers, narrow(tile, ptr.dtype.element_ty), mask=exists[:, None] & (features < d)[None, :])


@triton.jit
def load_pair(left_ptr, right_ptr, first, used, other, factor):
    """Values of two vectors on the lines from ``first`` on, times ``factor``; ``other`` and 0 where not used.

    In one tile: with as many values as a program of four warps has threads, each is prepared once and exchanged, where the
    compiler would have every thread prepare all it needs of fewer.
    """
    lines = first + tl.arange(0, used.shape[0])[:, None]
    is_left = tl.arange(0, 2)[None, :] == 0
    values = tl.load(tl.where(is_left, left_ptr + lines, right_ptr + lines), mask=used[:, None], other=0.0) * factor
    left, right = tl.split(tl.where(used[:, None], values, tl.where(is_left, other, 0.0)))
    return left, right


@triton.jit
def load_potential(potential, first, used):
    """Base and fine part of lines from ``first`` on, in base 2; the base is -inf where a line is not used."""
    return load_pair(potential.base_ptr, potential.fine_ptr, first, used, -float("inf"), LOG2_E)


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """acc + left right in float32. PRECISION is that of float32 operands.

    The interpreter would multiply the bits of bfloat16, and its BLAS rounds a product and its transpose differently on some
    processors; logits must be the same in every pass, so there they are float64's, rounded once.
    """
    if INTERPRET:
        acc += tl.dot(left.to(tl.float64), right.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    elif left.dtype == tl.float32:
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """left right^T in float32."""
    return dot(left, tl.trans(right), tl.zeros([left.shape[0], right.shape[0]], tl.float32), PRECISION)


@triton.jit
def exponent(x, line_values, stream_potential, start, stream_used, STREAM_FIRST: tl.constexpr):
    """x + f + g; line_values: the lines' potential as loaded.

    The potential of the stream is loaded here, behind the product that x is: 128 values of it are half a thread's registers
    where, as on Blackwell, a thread has a line of its own.
    """
    base, fine = load_potential(stream_potential, start, stream_used)
    if STREAM_FIRST:
        x = (x + base[None, :]) + line_values[0][:, None]
    else:
        x = (x + line_values[0][:, None]) + base[None, :]
    return x + (line_values[1][:, None] + fine[None, :])


@triton.jit
def log_sum(total):
    """log2 of float32 sums in float64: -inf of 0, NaN of what is not finite. The exponent is split off, as a float32
    logarithm of a large sum would be rounded by more than the sum."""
    bits = total.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    value = tl.log2(mantissa).to(tl.float64) + ((bits >> 23) - 127).to(tl.float64) + (total - total).to(tl.float64)
    return tl.where(total == 0, -float("inf"), value)


@triton.jit
def entries_of(logits, b, h):
    """What :func:`load_entries` reads at head ``h`` of batch ``b``."""
    operands, strides = logits.operands, logits.strides
    bias_offset = b * strides.bias.b + h * strides.bias.h
    mask_offset = b * strides.mask.b + h * strides.mask.h
    return Entries(
        bias_ptr=operands.bias_ptr + bias_offset,
        bias32_ptr=operands.bias32_ptr + bias_offset,
        mask_ptr=operands.mask_ptr + mask_offset,
    )


@triton.jit
def load_entries(entries, logits, k_bias, line_used, stream_used, first_line, first_stream):
    """What bias and mask add to x, (lines, streams); 0 on lines not used, where either may hold anything.

    Inside a tile offsets are of 32 bits.
    """
    bias, mask, sizes = logits.strides.bias, logits.strides.mask, logits.sizes
    lines, streams = tl.arange(0, line_used.shape[0])[:, None], tl.arange(0, stream_used.shape[0])[None, :]
    inside = line_used[:, None] & stream_used[None, :]
    x = tl.zeros(inside.shape, tl.float32)
    if sizes.bias_kind != 0:
        at = first_line * bias.n + first_stream * bias.m
        offsets = lines * bias.n.to(tl.int32) + streams * bias.m.to(tl.int32)
        if sizes.bias_kind == 1:
            x = tl.load(entries.bias_ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            x = tl.load(entries.bias32_ptr + at + offsets, mask=inside, other=0.0)
    if sizes.has_mask != 0:
        at = first_line * mask.n + first_stream * mask.m
        offsets = lines * mask.n.to(tl.int32) + streams * mask.m.to(tl.int32)
        used = tl.load(entries.mask_ptr + at + offsets, mask=inside, other=1) != 0
        x = tl.where(used, x, -float("inf"))
    return x * k_bias


@triton.jit
def drop(p, seed, dropout_p, dropout_scale, head, first_line, first_stream, line_is_key):
    """Z P: the uniform number of an entry is the Philox word at (j, i, head), whichever side is streamed."""
    lines = tl.broadcast_to((first_line + tl.arange(0, p.shape[0]))[:, None], p.shape)
    streams = tl.broadcast_to((first_stream + tl.arange(0, p.shape[1]))[None, :], p.shape)
    i = tl.where(line_is_key != 0, streams, lines)
    j = tl.where(line_is_key != 0, lines, streams)
    zero = tl.zeros(p.shape, tl.int32)
    word, _, _, _ = tl.philox(seed, j, i, zero + head.to(tl.int32), zero)
    keep = tl.uint_to_uniform_float(word) >= dropout_p
    return tl.where(keep, p * dropout_scale, 0.0)


@triton.jit
def accumulate(acc, unit, p, x, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p x and the units of its lines, p in float32, in PIECES for an x of 16 bits; PRECISION: of a float32 x."""
    if x.dtype == tl.float32:
        acc = dot(p, x, acc, PRECISION)
    else:
        if x.dtype == tl.float16:
            peak = tl.minimum(tl.max(tl.abs(p), axis=1), 2.0**100)
            power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            new_unit = tl.maximum(unit, power)
            acc *= (unit / new_unit)[:, None]
            p *= (2.0**14 / new_unit)[:, None]
            unit = new_unit
        for _ in tl.static_range(PIECES):
            piece = narrow(p, x.dtype)
            acc = dot(piece, x, acc, PRECISION)
            p -= piece.to(tl.float32)
    return acc, unit


@triton.jit
def first_unit(BLOCK: tl.constexpr):
    """The unit of lines to which nothing was added."""
    return tl.full([BLOCK], 2.0**-100, tl.float32)


@triton.jit
def accumulated(acc, unit, dtype: tl.constexpr):
    """What :func:`accumulate` summed of vectors of ``dtype``."""
    if dtype == tl.float16:
        acc *= (unit * 2.0**-14)[:, None]
    return acc
