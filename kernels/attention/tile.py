"""Tiles of attention logits, recomputed from query and key: what every pass over them shares.

In base 2, with k = log2(e) scale / temperature and k' = log2(e) / temperature of the head,

    x_ij = k q_i . k_j + k' bias_ij,    -inf where mask or padding exclude the entry,    P_ij = 2^(x_ij + f_i + g_j).

A pass keeps a block of LINES on chip and streams the other side past it: the lines are queries and the stream keys where sums
run over columns, the reverse where they run over rows. The code knows two sides only:

    side = (pointer at its head, its stride of lines, padding pointer at its batch, has_padding, n, d).

Each potential is a base and a fine part, times log2(e) once per line. The exponent is formed in one order everywhere,
((x + first base) + last base) + (fine + fine), whichever side is streamed: large bases are then rounded alike in all passes.

What excludes a whole line, padding or the ragged end, costs nothing per logit: its vector is loaded as 0, whatever lies in
memory, and its base as -inf, so that every P there is 0. What excludes single entries, and bias, are the ENTRIES kernels'.

A product of float32 P with operands of 16 bits splits P into pieces of their type: two leave an error below 2^-17 of P in
bfloat16 and 2^-23 in float16, three in bfloat16 below float32's. The range of float16 is too small for the plan of a sweep
that is not finished, and for derivatives: each line of P is brought to 2^14 .. 2^15 at its largest by a power of two, the
unit, which grows with what is streamed.
"""

import triton
import triton.language as tl

from ..common.arithmetic import INTERPRET, LOG2_E, narrow


@triton.jit
def head_scales(temperature_ptr, has_temperature, scale, bias_scale, head):
    """k and k' of a head; ``scale`` and ``bias_scale`` are those at temperature 1 where each head has its own."""
    temperature = tl.load(temperature_ptr + head, mask=has_temperature != 0, other=1.0)
    return scale / temperature, bias_scale / temperature


@triton.jit
def side_of(ptr, strides, padding_ptr, has_padding, n, d, b, h):
    """One side of head ``h`` of batch ``b``; strides: of batch, head and line."""
    return (ptr + b * strides[0] + h * strides[1], strides[2], padding_ptr + b * n, has_padding, n, d)


@triton.jit
def used_lines(side, first, BLOCK: tl.constexpr):
    """Which of BLOCK lines from ``first`` exist and are no padding."""
    lines = first + tl.arange(0, BLOCK)
    used = lines < side[4]
    return used & (tl.load(side[2] + lines, mask=used & (side[3] != 0), other=0) == 0)


@triton.jit
def load_side(side, first, used, BLOCK_D: tl.constexpr):
    """Vectors of the lines of a side from ``first`` on."""
    return load_lines(side[0], side[1], side[5], first, used, BLOCK_D)


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
def load_potential(base_ptr, fine_ptr, first, used):
    """Base and fine part of lines from ``first`` on, in base 2; the base is -inf where a line is not used."""
    return load_pair(base_ptr, fine_ptr, first, used, -float("inf"), LOG2_E)


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
def exponent(x, line_potential, stream_base_ptr, stream_fine_ptr, start, stream_used, STREAM_FIRST: tl.constexpr):
    """x + f + g.

    The potential of the stream is loaded here, behind the product that x is: 128 values of it are half a thread's registers
    where, as on Blackwell, a thread has a line of its own.
    """
    base, fine = load_potential(stream_base_ptr, stream_fine_ptr, start, stream_used)
    if STREAM_FIRST:
        x = (x + base[None, :]) + line_potential[0][:, None]
    else:
        x = (x + line_potential[0][:, None]) + base[None, :]
    return x + (line_potential[1][:, None] + fine[None, :])


@triton.jit
def log_sum(total):
    """log2 of float32 sums in float64: -inf of 0, NaN of what is not finite. The exponent is split off, as a float32
    logarithm of a large sum would be rounded by more than the sum."""
    bits = total.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    value = tl.log2(mantissa).to(tl.float64) + ((bits >> 23) - 127).to(tl.float64) + (total - total).to(tl.float64)
    return tl.where(total == 0, -float("inf"), value)


@triton.jit
def entries_of(bias_ptr, bias32_ptr, bias_strides, bias_kind, mask_ptr, mask_strides, has_mask, b, h):
    """What :func:`load_entries` reads at one head; strides: of batch, head, line and stream."""
    bias_offset = b * bias_strides[0] + h * bias_strides[1]
    mask_offset = b * mask_strides[0] + h * mask_strides[1]
    bias = (bias_ptr + bias_offset, bias32_ptr + bias_offset, bias_strides[2], bias_strides[3], bias_kind)
    return bias, (mask_ptr + mask_offset, mask_strides[2], mask_strides[3], has_mask)


@triton.jit
def load_entries(entries, k_bias, line_used, stream_used, first_line, first_stream):
    """What bias and mask add to x, (lines, streams); 0 on lines not used, where either may hold anything.

    entries = ((bias, the same as float32, strides of line and stream, kind), (mask, strides, has_mask)); kind 0: no bias,
    1: read the first pointer, of the dtype of the query, 2: the second. Inside a tile offsets are of 32 bits.
    """
    bias, mask = entries
    lines, streams = tl.arange(0, line_used.shape[0])[:, None], tl.arange(0, stream_used.shape[0])[None, :]
    inside = line_used[:, None] & stream_used[None, :]
    x = tl.zeros(inside.shape, tl.float32)
    if bias[4] != 0:
        at = first_line * bias[2] + first_stream * bias[3]
        offsets = lines * bias[2].to(tl.int32) + streams * bias[3].to(tl.int32)
        if bias[4] == 1:
            x = tl.load(bias[0] + at + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            x = tl.load(bias[1] + at + offsets, mask=inside, other=0.0)
    if mask[3] != 0:
        at = first_line * mask[1] + first_stream * mask[2]
        offsets = lines * mask[1].to(tl.int32) + streams * mask[2].to(tl.int32)
        used = tl.load(mask[0] + at + offsets, mask=inside, other=1) != 0
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
