"""Packed matrices that pieces of 16 bytes do not divide (5 and 7 lines; 6 of 16 bits), by way of shared memory.

Moved value by value between memory and their threads, the values of a warp would lie in a sector each: 1,568 sectors of 32
bytes to store 32 matrices of 7x7 in float32, which fill 196. So the matrices of a program, which lie on end, are moved as one
run, in pieces of 16 bytes of which each thread takes every BLOCK-th; what is over at the end of the run, where the last
program has fewer matrices, value by value. Between shared memory and its registers a thread moves its own matrix value by
value: in float32 these are 25 or 49 words apart, an odd number, so that each thread of a warp has a bank to itself.

Offsets stand in the instructions: as sums beside them, the compiler would keep those of a whole matrix through a loop. In the
interpreter a buffer of the host stands for shared memory, so that all of this runs but the instructions.
"""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl

from ..common.arithmetic import INTERPRET, narrow
from .values import load_value, store_value

_HOST = ctypes.create_string_buffer(1 << 15)
_HOST_ADDRESS = tl.constexpr(ctypes.addressof(_HOST) if INTERPRET else 0)  # part of a kernel's key in Triton's cache
_ARRIVED = tl.constexpr("cp.async.wait_all; mov.b32 $0, 0;")


@triton.constexpr_function
def pieces(lines: int, bits: int) -> int:
    """Pieces of 16 bytes that a thread moves for its share of a program's matrices."""
    return triton.cdiv(lines * lines * bits, 128)


@triton.constexpr_function
def by_itself(lines: int, bits: int) -> bool:
    """Whether pieces divide a matrix, and its thread moves it by itself."""
    return lines * lines * bits % 128 == 0


@triton.constexpr_function
def _full(piece: int, lines: int, bits: int) -> bool:
    """Whether all of a thread's ``piece`` lies in a program's matrices, which what pieces round up to does not."""
    return 128 * (piece + 1) <= lines * lines * bits


@triton.constexpr_function
def _declaration(size: int) -> str:
    return f"{{.shared .align 16 .b8 workspace[{size}]; mov.u32 $0, workspace;}}"


@triton.constexpr_function
def _moving(offset: int, inwards: bool, full: bool) -> str:
    """16 bytes, ``offset`` on from [$1] in shared memory and [$2] in the other, if that many and 16 are $3 or less.

    ``full``: shared memory holds something there in any case, and may be read before that is known.
    """
    shared, memory = f"[$1 + {offset}]", f"[$2 + {offset}]"
    fill = f"@p cp.async.ca.shared.global {shared}, {memory}, 16;"
    drain = f"{'' if full else '@p '}ld.shared.v4.b32 {{a, b, c, d}}, {shared}; @p st.global.v4.b32 {memory}, {{a, b, c, d}};"
    move = fill if inwards else drain
    return f"{{.reg .pred p; .reg .b32 a, b, c, d; setp.ge.s32 p, $3, {offset + 16}; {move} mov.b32 $0, 0;}}"


@triton.constexpr_function
def _getting(bits: int, at: int) -> str:
    return f"ld.shared.b{bits} $0, [$1 + {at}];"


@triton.constexpr_function
def _putting(bits: int, at: int) -> str:
    return f"{{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b{bits} [$1 + {at}], $2; mov.b32 $0, 0;}}"


@triton.jit
def workspace_of(ptr, BLOCK: tl.constexpr, LINES: tl.constexpr):
    """Address, for each thread the same, of room for BLOCK matrices, 0 if none is needed. To be called once in a kernel."""
    BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    if by_itself(LINES, BITS):
        workspace = tl.zeros([BLOCK], tl.int32)
    elif INTERPRET:
        workspace = tl.full([BLOCK], _HOST_ADDRESS, tl.int64)
    else:
        declaration: tl.constexpr = _declaration(16 * BLOCK * pieces(LINES, BITS))
        lane = tl.arange(0, BLOCK)
        workspace = tl.inline_asm_elementwise(declaration, "=r,r", [lane], tl.int32, is_pure=False, pack=1)
    return workspace


@triton.jit
def _lane(BLOCK: tl.constexpr):
    """A thread's number, as if it were new each time, so that nothing that follows from it is kept in the meantime."""
    lane = tl.arange(0, BLOCK)
    if not INTERPRET:
        lane = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [lane], tl.int32, is_pure=False, pack=1)
    return lane


@triton.jit
def _get(at, OFFSET: tl.constexpr, T: tl.constexpr):
    """For each thread a value of shared memory, OFFSET bytes from ``at``."""
    BITS: tl.constexpr = T.primitive_bitwidth
    if INTERPRET:
        value = tl.load((at + OFFSET).to(tl.pointer_type(T), bitcast=True))
    elif BITS == 16:
        value = tl.inline_asm_elementwise(_getting(BITS, OFFSET), "=h,r", [at], tl.int16, is_pure=False, pack=1)
        value = value.to(T, bitcast=True)
    else:
        value = tl.inline_asm_elementwise(_getting(BITS, OFFSET), "=f,r", [at], tl.float32, is_pure=False, pack=1)
    return value


@triton.jit
def _put(at, OFFSET: tl.constexpr, value, there):
    """The mirror of :func:`_get`, where ``there``."""
    BITS: tl.constexpr = value.dtype.primitive_bitwidth
    if INTERPRET:
        tl.store((at + OFFSET).to(tl.pointer_type(value.dtype), bitcast=True), value, mask=there)
    else:
        some = there.to(tl.int32)
        if BITS == 16:
            bits = value.to(tl.int16, bitcast=True)
            tl.inline_asm_elementwise(_putting(BITS, OFFSET), "=r,r,h,r", [at, bits, some], tl.int32, is_pure=False, pack=1)
        else:
            tl.inline_asm_elementwise(_putting(BITS, OFFSET), "=r,r,f,r", [at, value, some], tl.int32, is_pure=False, pack=1)


@triton.jit
def _move_16_bytes(at, pointer, OFFSET: tl.constexpr, left, IN: tl.constexpr, FULL: tl.constexpr):
    """From ``pointer`` to ``at``, or back, OFFSET bytes on from both, if that many and 16 are left; FULL as in _moving."""
    T: tl.constexpr = pointer.dtype.element_ty
    BYTES: tl.constexpr = T.primitive_bitwidth // 8
    if INTERPRET:
        there = left >= OFFSET + 16
        for e in tl.static_range(16 // BYTES):
            value = pointer + (OFFSET // BYTES + e)
            if IN:
                _put(at, OFFSET + BYTES * e, tl.load(value, mask=there), there)
            else:
                tl.store(value, _get(at, OFFSET + BYTES * e, T), mask=there)
    else:
        moving: tl.constexpr = _moving(OFFSET, IN, FULL)
        tl.inline_asm_elementwise(moving, "=r,r,l,r", [at, pointer.to(tl.int64), left], tl.int32, is_pure=False, pack=1)


@triton.jit
def _count(first, batch, workspace):
    """Matrices of the program that begins with matrix ``first``."""
    return tl.minimum(batch - first, workspace.shape[0]).to(tl.int32)


@triton.jit
def _move(ptr, first, batch, workspace, LINES: tl.constexpr, IN: tl.constexpr):
    """The program's matrices into shared memory or back."""
    T: tl.constexpr = ptr.dtype.element_ty
    BYTES: tl.constexpr = T.primitive_bitwidth // 8
    BLOCK: tl.constexpr = workspace.shape[0]
    run = ptr + first * (LINES * LINES)
    size = _count(first, batch, workspace) * (LINES * LINES * BYTES)
    lane = _lane(BLOCK)
    for piece in tl.static_range(pieces(LINES, 8 * BYTES)):
        at, run_at, left = workspace + 16 * lane, run + 16 // BYTES * lane, size - 16 * lane
        _move_16_bytes(at, run_at, 16 * BLOCK * piece, left, IN, _full(piece, LINES, 8 * BYTES))
    byte = size // 16 * 16 + BYTES * lane
    over = byte < size
    if IN:
        _put(workspace + byte, 0, load_value(run + byte // BYTES, over, 0.0), over)
        if not INTERPRET:
            tl.inline_asm_elementwise(_ARRIVED, "=r,r", [lane], tl.int32, is_pure=False, pack=1)
    else:
        store_value(run + byte // BYTES, _get(workspace + tl.minimum(byte, size - BYTES), 0, T), over)


@triton.jit
def fill(ptr, first, batch, workspace, LINES: tl.constexpr):
    """Brings the matrices from ``first`` on, as many as there are, into shared memory."""
    tl.debug_barrier()  # what it held has been read
    _move(ptr, first, batch, workspace, LINES, True)
    tl.debug_barrier()


@triton.jit
def filled(first, batch, workspace, T: tl.constexpr, LINES: tl.constexpr):
    """A thread's own of the matrices that :func:`fill` has brought; the last one where there are fewer."""
    BYTES: tl.constexpr = T.primitive_bitwidth // 8
    place = tl.minimum(_lane(workspace.shape[0]), _count(first, batch, workspace) - 1)
    x = []
    for e in tl.static_range(LINES * LINES):
        x = x + [_get(workspace + place * (LINES * LINES * BYTES), BYTES * e, T)]
    return x


@triton.jit
def drain(ptr, first, batch, x, workspace, LINES: tl.constexpr):
    """The mirror of both: each thread's matrix into shared memory, and all of them on to where they belong."""
    T: tl.constexpr = ptr.dtype.element_ty
    BYTES: tl.constexpr = T.primitive_bitwidth // 8
    lane = _lane(workspace.shape[0])
    tl.debug_barrier()
    for e in tl.static_range(LINES * LINES):
        _put(workspace + lane * (LINES * LINES * BYTES), BYTES * e, narrow(x[e], T), lane >= 0)
    tl.debug_barrier()
    _move(ptr, first, batch, workspace, LINES, False)
