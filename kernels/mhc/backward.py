"""The backward of ``pre`` in four launches: X and dh are read twice, and nothing else that is large.

With s = fn vec X, m = sum (vec X)^2 / k, q = (m + norm_eps)^(-1/2) and l_d = scale_d q s_d + base_d the logits of the mixes, of
which ``mixes.py`` has the adjoint dl:

    dpre_i += <dh, X_i>                                                               _mhc_dots_bwd_kernel
    dbase_d = sum_t dl_d,   dscale = sum_td dl_d q s_d over the d that it scales
    ds_d = scale_d q dl_d,   dm = -q^2 / 2 sum_d ds_d s_d,   c = 2 dm / k             _mhc_mix_bwd_kernel
    dX_i = pre_i dh + fn_i^T ds + c X_i,   dfn = sum_t ds X^T                         _mhc_streams_bwd_kernel
    sums over blocks of tokens                                                        _mhc_sum_bwd_kernel

Given weights in place of pre, <dh, X_i> is their gradient.
"""

import triton
import triton.language as tl

from ..attention.tile import dot
from ..common.arithmetic import narrow, rounded_product
from ..common.configuration import finite_jit
from ..registers.memory import load_line, store_line
from ..registers.sweeps import products as products_of
from ..registers.values import load_value, store_value
from .collapse import matrix_logits, sigmoids
from .exact import pieces_of, product_of_pieces
from .mixes import (
    MAX_LINES,
    Options,
    everywhere,
    inverse_root,
    load_matrix,
    matrix_steps,
    project,
    project_adjoint,
    store_matrix,
)
from .tiles import Strides, inside, load_tile, partly_summed, tokens_from, vectors
from .wide import places, wide_adjoint, wide_logits, wide_project


@finite_jit
def _mhc_dots_bwd_kernel(
    dh_ptr, X_ptr, dots_ptr,
    tokens: tl.int64, streams: tl.int32, channels: tl.int32, parts: tl.int32, channels_of_part: tl.int32,
    dh_strides: Strides, X_strides: Strides,
    LINES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dots (parts, tokens, streams): <dh, X_i> over a part of the channels."""
    program = tl.program_id(0)
    part = program % parts
    token, live = tokens_from((program // parts).to(tl.int64) * BLOCK_T, tokens, BLOCK_T)
    dots = []
    for _ in tl.static_range(LINES):
        dots = dots + [tl.zeros([BLOCK_T, BLOCK_C // 8], tl.float32)]
    last = tl.minimum((part + 1) * channels_of_part, channels)
    for channel in range(part * channels_of_part, last, BLOCK_C):
        dh = load_tile(dh_ptr, dh_strides.token, token, token >= 0, channel, last, BLOCK_C).to(tl.float32)
        more = []
        for i in tl.static_range(LINES):
            there = (token >= 0) & (i < streams)
            x = load_tile(X_ptr + i * X_strides.stream, X_strides.token, token, there, channel, last, BLOCK_C)
            more = more + [dots[i] + partly_summed(dh * x.to(tl.float32))]
        dots = more
    for i in tl.static_range(LINES):
        own_ptr = dots_ptr + (part * tokens + token) * streams + i
        tl.store(own_ptr, tl.sum(dots[i], 1), mask=live & (i < streams))


@triton.jit
def add_parts(parts_ptr, stride, parts):
    """The sum of ``parts`` values, ``stride`` apart, for each token."""
    there = everywhere(parts_ptr)
    total = load_value(parts_ptr, there, 0.0)
    for part in range(1, parts):
        total += load_value(parts_ptr + part * stride, there, 0.0)
    return total


@triton.jit
def leave(ds_ptr, sums_ptr, scale_ptr, totals_ptr, token, live, streams, rows, width, size, norm_eps):
    """From dl, which is in the place of ds: ds, c, and sums over the tokens of dl and of dl q s, whose copies are one."""
    q = inverse_root(tl.load(sums_ptr + token * (rows + 1) + rows), size, norm_eps)
    inner = tl.zeros([token.shape[0]], tl.float32)
    for first in range(0, rows, 8):
        d = first + tl.arange(0, 8)
        mask = live[:, None] & (d < rows)[None, :]
        factor = tl.load(scale_ptr + tl.minimum(d // streams, 2), mask=d < rows, other=0.0)
        s = tl.load((sums_ptr + token * (rows + 1))[:, None] + d[None, :], mask=mask, other=0.0)
        pointers = (ds_ptr + token * width)[:, None] + d[None, :]
        dl = tl.load(pointers, mask=mask, other=0.0)
        ds = factor[None, :] * (q[:, None] * dl)
        tl.debug_barrier()  # every lane that holds a copy has loaded it
        tl.store(pointers, ds, mask=mask)
        inner += tl.sum(rounded_product(ds, s), 1)
        tl.store(totals_ptr + d, tl.sum(dl, 0), mask=d < rows)
        tl.store(totals_ptr + rows + d, tl.sum(rounded_product(dl, q[:, None] * s), 0), mask=d < rows)
    tl.store(ds_ptr + token * width + rows, -(q * q) / size * inner, mask=live)


@finite_jit
def _mhc_mix_bwd_kernel(
    dots_ptr, dpre_ptr, dpost_ptr, dcomb_ptr, sums_ptr, scale_ptr, base_ptr,
    weights_ptr, dgiven_ptr, ds_ptr, block_sums_ptr, history_ptr,
    tokens: tl.int64, streams: tl.int32, rows: tl.int32, width: tl.int32, parts: tl.int32, size: tl.float32, options: Options,
    has_given: tl.int32, has_dpre: tl.int32, has_dpost: tl.int32, has_dcomb: tl.int32,
    LINES: tl.constexpr, HEAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """ds and, behind it, c (tokens, width); sums over a block of dl and of dl q s (blocks, 2, rows); pre or dgiven."""
    block = tl.program_id(0).to(tl.int64)
    token, live = tokens_from(block * BLOCK_T, tokens, BLOCK_T)
    own = block * BLOCK_T + tl.arange(0, BLOCK_T)  # of the history: what lies beyond the last token has its own, too
    count = tl.num_programs(0).to(tl.int64) * BLOCK_T
    own_ptr = sums_ptr + token * (rows + 1)
    out_ptr = ds_ptr + token * width
    q = inverse_root(tl.load(own_ptr + rows), size, options.norm_eps)
    pre = sigmoids(own_ptr, q, tl.load(scale_ptr), base_ptr, streams, LINES)
    for i in tl.static_range(LINES):
        if i < streams:
            at = token * streams + i
            dpre = load_value(dpre_ptr + at, live & (has_dpre != 0), 0.0)
            products = add_parts(dots_ptr + at, tokens * streams, parts)
            if has_given != 0:
                store_value(dgiven_ptr + at, products, live)
            else:
                store_value(weights_ptr + at, pre[i] + options.pre_eps, live)
                dpre += products
            store_value(out_ptr + i, dpre * (pre[i] * (1.0 - pre[i])), live)
    if not HEAD:
        post = sigmoids(own_ptr + streams, q, tl.load(scale_ptr + 1), base_ptr + streams, streams, LINES)
        dpost = load_line(dpost_ptr + token * streams, 1, live & (has_dpost != 0), streams, LINES)
        slopes = [options.post_mult * (value * (1.0 - value)) for value in post]
        store_line(out_ptr + streams, 1, live, streams, products_of(dpost, slopes))
        step_a, step_b, comb_a, comb_b = matrix_steps(options, streams)
        factor = tl.load(scale_ptr + 2)
        base_ptr += 2 * streams
        own_ptr += 2 * streams
        out_ptr += 2 * streams
        dcomb_ptr += token * (streams * streams)
        there = live & (has_dcomb != 0)
        if LINES <= MAX_LINES:
            M = matrix_logits(own_ptr, q, factor, base_ptr, step_a, step_b, LINES)
            history_ptr += own
            x, K, p, w = project(M, options, history_ptr, count, LINES, True)
            dP = load_matrix(dcomb_ptr, comb_a, comb_b, there, LINES)
            dM = project_adjoint(M, dP, x, K, p, w, options, history_ptr, count, LINES)
            store_matrix(out_ptr, step_a, step_b, live, dM, LINES)
        else:
            at, valid = places(step_a, step_b, streams, LINES)
            M = wide_logits(own_ptr, q, factor, base_ptr, at, valid)
            x, K, p, w = wide_project(M, options, history_ptr, own, count, True)
            comb_at, _valid = places(comb_a, comb_b, streams, LINES)
            dP = tl.load(dcomb_ptr[:, None, None] + comb_at, mask=there[:, None, None] & valid, other=0.0)
            tl.debug_barrier()  # lines of the history have come from other lanes
            dM = wide_adjoint(M, dP, x, K, p, w, options, history_ptr, own, count)
            tl.store(out_ptr[:, None, None] + at, dM, mask=live[:, None, None] & valid)
    tl.debug_barrier()
    totals_ptr = block_sums_ptr + block * 2 * rows
    leave(ds_ptr, sums_ptr, scale_ptr, totals_ptr, token, live, streams, rows, width, size, options.norm_eps)


@triton.jit
def halves(x):
    """x in two bfloat16 pieces, which leave an error of 2^-17."""
    high = narrow(x, tl.bfloat16)
    return high, narrow(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def add_product(total, ds, w):
    """total + ds w, to the accuracy of float32 if w is, of 16 bits if w is two pieces."""
    if w[0].dtype == tl.float32:
        total = dot(ds, w[0], total, "tf32x3")
    else:
        high, low = halves(ds)
        total = dot(low, w[0], total, "ieee")
        total = dot(high, w[1], total, "ieee")
        total = dot(high, w[0], total, "ieee")
    return total


@triton.jit
def load_fn(fn_ptr, k, row, rows, channel, channels, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Some rows of fn at some channels of a stream: WIDE, in float32, else in two pieces."""
    w = load_tile(fn_ptr, k, row.to(tl.int64), row < rows, channel, channels, BLOCK_C)
    return (w,) if WIDE else halves(w)


@triton.jit
def load_ds(ds_ptr, width, token, live, row, rows):
    """ds of some rows, 0 of tokens that are not ``live``."""
    pointers = (ds_ptr + token * width)[:, None] + row[None, :]
    return tl.load(pointers, mask=live[:, None] & (row < rows)[None, :], other=0.0)


@finite_jit
def _mhc_streams_bwd_kernel(
    dh_ptr, X_ptr, fn_ptr, ds_ptr, weights_ptr, add_ptr, dX_ptr, dfn_ptr,
    tokens: tl.int64, streams: tl.int32, channels: tl.int32, rows: tl.int32, width: tl.int32,
    parts: tl.int32, tokens_of_part: tl.int64, dh_strides: Strides, X_strides: Strides, add_strides: Strides,
    has_add: tl.int32,
    STREAMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """dX, and dfn (parts, rows, streams channels) of a part of the tokens, STREAMS streams and BLOCK_D rows.

    SINGLE: these are all rows. Else programs of the first rows make dX, and read all of fn for each block of tokens.
    """
    groups = streams // STREAMS
    row_blocks = tl.cdiv(rows, BLOCK_D)
    program = tl.program_id(0)
    first_stream = (program % groups) * STREAMS
    first_row = (program // groups % row_blocks) * BLOCK_D
    part = program // (groups * row_blocks) % parts
    channel = (program // (groups * row_blocks * parts)) * BLOCK_C
    row = first_row + tl.arange(0, BLOCK_D)
    k = streams.to(tl.int64) * channels
    WIDE: tl.constexpr = X_ptr.dtype.element_ty == tl.float32
    w = []
    dw = []
    for i in tl.static_range(STREAMS):
        if SINGLE:
            w = w + [load_fn(fn_ptr + (first_stream + i) * channels, k, row, rows, channel, channels, WIDE, BLOCK_C)]
        dw = dw + [tl.zeros([BLOCK_C, BLOCK_D], tl.float32)]
    end = tl.minimum((part + 1) * tokens_of_part, tokens)
    for start in range(part * tokens_of_part, end, BLOCK_T):
        token, live = tokens_from(start, tokens, BLOCK_T)
        ds = load_ds(ds_ptr, width, token, live, row, rows)
        pieces = pieces_of(tl.trans(ds), X_ptr.dtype.element_ty)
        there = (token >= 0) & (first_row == 0)
        adding = live & (has_add != 0) & (first_row == 0)
        dh = load_tile(dh_ptr, dh_strides.token, token, there, channel, channels, BLOCK_C)
        mask = inside(live, channel, channels, X_ptr, BLOCK_C)
        more = []
        for i in tl.static_range(STREAMS):
            stream = first_stream + i
            X_stream_ptr = X_ptr + stream * X_strides.stream
            x = load_tile(X_stream_ptr, X_strides.token, token, token >= 0, channel, channels, BLOCK_C)
            add_stream_ptr = add_ptr + stream * add_strides.stream
            more_dX = load_tile(add_stream_ptr, add_strides.token, token, adding, channel, channels, BLOCK_C)
            more = more + [dw[i] + product_of_pieces(tl.trans(x), pieces)]
            if SINGLE or first_row == 0:
                c = tl.load(ds_ptr + token * width + rows)
                weight = tl.load(weights_ptr + token * streams + stream)
                dX = c[:, None] * x.to(tl.float32) + weight[:, None] * dh.to(tl.float32)
                if SINGLE:
                    dX = add_product(dX, ds, w[i])
                else:
                    for first in range(0, rows, BLOCK_D):
                        other = first + tl.arange(0, BLOCK_D)
                        fn_stream_ptr = fn_ptr + stream * channels
                        tile = load_fn(fn_stream_ptr, k, other, rows, channel, channels, WIDE, BLOCK_C)
                        dX = add_product(dX, load_ds(ds_ptr, width, token, live, other, rows), tile)
                dX += more_dX.to(tl.float32)
                dX_pointers = vectors(dX_ptr + stream * channels, k, token, channel, BLOCK_C)
                tl.store(dX_pointers, narrow(dX, X_ptr.dtype.element_ty), mask=mask)
        dw = more
    for i in tl.static_range(STREAMS):
        dfn_stream_ptr = dfn_ptr + (part.to(tl.int64) * rows) * k + (first_stream + i) * channels
        mask = inside(row < rows, channel, channels, dfn_ptr, BLOCK_C)
        tl.store(vectors(dfn_stream_ptr, k, row.to(tl.int64), channel, BLOCK_C), tl.trans(dw[i]), mask=mask)


@triton.jit
def sum_blocks(
    block_sums_ptr, dbase_ptr, dscale_ptr, blocks, rows, streams, LINES: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """dbase, and dscale, of the rows that each scales."""
    of_scale = tl.zeros([4, BLOCK_D], tl.float32)
    for first_row in range(0, rows, BLOCK_D):
        row = first_row + tl.arange(0, BLOCK_D)
        base = tl.zeros([LINES, BLOCK_D], tl.float32)
        scaled = tl.zeros([LINES, BLOCK_D], tl.float32)
        for first in range(0, blocks, LINES):
            block = first + tl.arange(0, LINES)
            mask = (block < blocks)[:, None] & (row < rows)[None, :]
            pointers = block_sums_ptr + block[:, None].to(tl.int64) * (2 * rows) + row[None, :]
            base += tl.load(pointers, mask=mask, other=0.0)
            scaled += tl.load(pointers + rows, mask=mask, other=0.0)
        tl.store(dbase_ptr + row, tl.sum(base, 0), mask=row < rows)
        mine = tl.minimum(row // streams, 2)[None, :] == tl.arange(0, 4)[:, None]
        of_scale += tl.where(mine, tl.sum(scaled, 0)[None, :], 0.0)
    scale = tl.arange(0, 4)
    tl.store(dscale_ptr + scale, tl.sum(of_scale, 1), mask=scale < tl.where(rows > streams, 3, 1))


@finite_jit
def _mhc_sum_bwd_kernel(
    dfn_parts_ptr, block_sums_ptr, dfn_ptr, dbase_ptr, dscale_ptr,
    size: tl.int64, parts: tl.int32, blocks: tl.int32, rows: tl.int32, streams: tl.int32,
    BLOCK: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dfn of its parts; dbase and dscale, by program 0, of sums over blocks of tokens."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tl.max_constancy(at < size, 4)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        pointers = tl.max_contiguous(tl.multiple_of(dfn_parts_ptr + part * size + at, 16), 4)
        total += tl.load(pointers, mask=mask, other=0.0)
    tl.store(tl.max_contiguous(tl.multiple_of(dfn_ptr + at, 16), 4), total, mask=mask)
    if tl.program_id(0) == 0:
        sum_blocks(block_sums_ptr, dbase_ptr, dscale_ptr, blocks, rows, streams, LINES, BLOCK_D)
