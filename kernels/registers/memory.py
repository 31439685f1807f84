"""Matrices and lines between memory and the registers of one thread each: tuples of vectors of BLOCK values, one a thread."""

import triton
import triton.language as tl

from ..common.arithmetic import narrow
from .packed import load_packed
from .values import load_value, store_value


@triton.jit
def load_strided(ptr, matrix, live, n, m, stride_b, stride_n, stride_m, default):
    """Any strides and any n, m <= 4, ``default`` beyond."""
    start = ptr + matrix * stride_b
    x = []
    for e in tl.static_range(16):
        there = live & (e // 4 < n) & (e % 4 < m)
        x = x + [load_value(start + ((e // 4) * stride_n + (e % 4) * stride_m), there, default)]
    return x


@triton.jit
def store_strided(ptr, matrix, live, n, m, stride_b, stride_n, stride_m, x):
    """The mirror of :func:`load_strided`."""
    start = ptr + matrix * stride_b
    for e in tl.static_range(16):
        value = narrow(x[e], ptr.dtype.element_ty)
        store_value(start + ((e // 4) * stride_n + (e % 4) * stride_m), value, live & (e // 4 < n) & (e % 4 < m))


@triton.jit
def load_logits(
    logits_ptr, mask_ptr, first, batch, workspace, n, m,
    logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
    PACKED: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Logits in float32, -inf where an entry is masked or beyond n or m."""
    if PACKED:
        x = load_packed(logits_ptr, first, batch, workspace, LINES)
    else:
        matrix = first + tl.arange(0, workspace.shape[0])
        live = matrix < batch
        values = load_strided(logits_ptr, matrix, live, n, m, logits_stride_b, logits_stride_n, logits_stride_m, float("-inf"))
        take = load_strided(mask_ptr, matrix, live & (has_mask != 0), n, m, mask_stride_b, mask_stride_n, mask_stride_m, 1)
        x = []
        for e in tl.static_range(16):
            x = x + [tl.where(take[e] != 0, values[e].to(tl.float32), float("-inf"))]
    return x


@triton.jit
def load_line(start, stride, there, count, LINES: tl.constexpr):
    """Values ``stride`` apart from ``start`` on, one for each of ``count`` <= LINES lines, 0 beyond."""
    x = []
    for i in tl.static_range(LINES):
        x = x + [load_value(start + i * stride, there & (i < count), 0.0)]
    return x


@triton.jit
def store_line(start, stride, there, count, x):
    """The mirror of :func:`load_line`."""
    for i in tl.static_range(len(x)):
        store_value(start + i * stride, x[i], there & (i < count))
