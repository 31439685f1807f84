"""Loads and stores of matrices and their lines, made as those of one vector.

Lanes run along the axis whose stride is known to be 1. Where none is, the compiler chooses, Triton 3.6 the first axis and
3.7 the last, and the layout of that one load becomes that of the whole kernel. With the first axis along lanes a sum over
what was meant to be one thread's own is an exchange, and kernels spill. A vector leaves no choice: its last axes, when it
is a tile again, lie along lanes first, then along warps.
"""

import triton
import triton.language as tl


@triton.jit
def _flat(tile, like):
    """``tile`` as a vector, once broadcast to the shape of ``like``."""
    return tl.reshape(tl.broadcast_to(tile, like.shape), (like.numel,))


@triton.jit
def load_entries(pointers, mask, other):
    """``tl.load`` for pointers of any shape; ``mask`` broadcasts to it."""
    flat = tl.load(_flat(pointers, pointers), mask=_flat(mask, pointers), other=other)
    return tl.reshape(flat, pointers.shape)


@triton.jit
def store_entries(pointers, values, mask):
    """``tl.store`` for pointers of any shape; ``values`` and ``mask`` broadcast to it."""
    tl.store(_flat(pointers, pointers), _flat(values, pointers), mask=_flat(mask, pointers))
