"""Launching what follows a branch of an mHC layer: its output joins the streams, and their gradients leave it.

Streams X (T, n, C) and the branch's output F (T, C) are of one dtype of at most 32 bits, the last stride 1; post (T, n) and
comb (T, n, n), comb[old, new], are float32 and contiguous; n is at most 16. Results are new and contiguous.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from fastdsm._ops.mixing import Mixing

from ..common.configuration import Configuration, multiprocessors
from ..registers.launch import TYPES
from .launch_pre import mix, product, whole_vectors, width_of
from .post import _mhc_post_fwd_kernel
from .post_backward import _mhc_post_bwd_kernel
from .post_pre import _mhc_post_pre_fwd_kernel
from .streams import GROUP

GROUPS = (1, 2, 4)
WARPS, LANES = 4, 32
# Of a stream in each thread: 16 bytes, but 8 where the backward keeps cotangents and dot products of 16 streams.
_BYTES = dict.fromkeys(itertools.product((False, True), GROUPS), 16) | {(True, 4): 8}
_FEATURES = {
    "branch_ptr",
    "streams_ptr",
    "new_streams_ptr",
    "h_ptr",
    "grad_new_streams_ptr",
    "grad_branch_ptr",
    "grad_streams_ptr",
}
# post with the next pre: so many tokens that fn comes from L2 at 12 KB each, a vector of 16 bytes of one token in each thread,
# and two steps on their way to shared memory behind the one at work, as a program has an SM to itself.
TOKENS, TOKENS_WARPS, STAGES, ROWS = 128, 8, 3, 32
MAX_PARTS, FIRST_STEPS = 32, 4  # what a program does once takes about as long as so many of its steps
FEW_TOKENS = 128  # of as many the parts, a launch each, are done sooner: in one they are a block, whatever their number
MAX_STRIDE = 1 << 24  # offsets in a tile of 128 lines are of 32 bits


def groups_of(streams: Tensor) -> int:
    """Warps to whom the streams of a token (T, n, C) are left."""
    return next(groups for groups in GROUPS if streams.shape[1] <= groups * GROUP.value)


def aligned(*features: Tensor) -> bool:
    """Whether the channels of every token and stream start on 16 bytes and are made of whole vectors of as many."""
    return all(whole_vectors(x, 16 // x.element_size()) for x in features)


@functools.cache
def _configuration(kernel: Any, dtype: torch.dtype, groups: int, aligned: bool) -> Configuration:
    """A row of a tile for each warp; of a stream the widest vector for each thread, or one channel where not ``aligned``."""
    backward = kernel is _mhc_post_bwd_kernel
    vector = _BYTES[backward, groups] // dtype.itemsize if aligned else 1
    return Configuration(
        kernel=kernel,
        pointers=_pointers(kernel, dtype),
        constants={"GROUPS": groups, "ROWS": WARPS, "CHANNELS": LANES * vector, "ALIGNED": aligned}
        | ({"LANES": LANES} if backward else {}),
        num_warps=WARPS,
        maxnreg=255 if backward else None,
        matrices=WARPS // groups,
        label=f"mhc post{' backward' * backward} {TYPES[dtype]} {groups * GROUP.value} streams{' aligned' * aligned}",
    )


@functools.cache
def _post_pre(dtype: torch.dtype, given: bool) -> Configuration:
    """post with the next pre, and with h if it is ``given`` the weights."""
    kernel, vector = _mhc_post_pre_fwd_kernel, 16 // dtype.itemsize
    channels = TOKENS_WARPS * LANES // TOKENS * vector
    return Configuration(
        kernel=kernel,
        pointers=_pointers(kernel, dtype),
        constants={"GIVEN": given, "TOKENS": TOKENS, "CHANNELS": channels, "ROWS": ROWS, "VECTOR": vector},
        num_warps=TOKENS_WARPS,
        num_stages=STAGES,
        matrices=TOKENS,
        label=f"mhc post pre {TYPES[dtype]}{' given' * given}",
    )


def _pointers(kernel: Any, dtype: torch.dtype) -> dict[str, str]:
    """Element types of a kernel's pointers, features of ``dtype``."""
    return {name: TYPES[dtype] if name in _FEATURES else "fp32" for name in kernel.arg_names if name.endswith("_ptr")}


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    kinds = itertools.product((_mhc_post_fwd_kernel, _mhc_post_bwd_kernel), TYPES, GROUPS, (True, False))
    return [_configuration(*kind) for kind in kinds] + [_post_pre(*kind) for kind in itertools.product(TYPES, (False, True))]


def post(x: Tensor, X: Tensor, post: Tensor, comb: Tensor, out: Tensor | None = None) -> Tensor:
    """X' (T, n, C), X'_new = post_new x + sum_old comb[old, new] X_old; in ``out`` if that is given, contiguous."""
    tokens, _, channels = X.shape
    new_streams = X.new_empty(X.shape) if out is None else out
    configuration = _configuration(_mhc_post_fwd_kernel, X.dtype, groups_of(X), aligned(x, X, new_streams))
    configuration.launch(
        triton.cdiv(tokens, configuration.matrices) * triton.cdiv(channels, configuration.constants["CHANNELS"]),
        **_inputs(x, X, post, comb),
        new_streams_ptr=new_streams,
    )
    return new_streams


def post_backward(grad: Tensor, x: Tensor, X: Tensor, post: Tensor, comb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (T, C), dX (T, n, C), dpost (T, n) and dcomb (T, n, n) of the cotangent ``grad`` of X'."""
    dx, dX, dpost, dcomb = (like.new_empty(like.shape) for like in (x, X, post, comb))
    configuration = _configuration(_mhc_post_bwd_kernel, X.dtype, groups_of(X), aligned(grad, x, X))
    configuration.launch(
        triton.cdiv(X.shape[0], configuration.matrices),
        **_inputs(x, X, post, comb),
        grad_new_streams_ptr=grad,
        grad_stride_t=grad.stride(0),
        grad_stride_n=grad.stride(1),
        grad_branch_ptr=dx,
        grad_streams_ptr=dX,
        grad_post_ptr=dpost,
        grad_comb_ptr=dcomb,
    )
    return dx, dX, dpost, dcomb


def post_pre(
    x: Tensor,
    X: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    mixing: Mixing,
    given: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """X', and of it all that ``pre`` returns; given (T, n): h is collapsed by it. out: where X' and h go, contiguous."""
    new_streams, h, partials = _partials(x, X, post, comb, fn, given, out)
    collapsed, pre, next_post, next_comb, info, sums = mix(
        partials, new_streams, scale, base, mixing, given, collapse=h is None, out=out[1] if out and h is None else None
    )
    h = collapsed if h is None else h
    assert h is not None
    assert next_post is not None
    assert next_comb is not None
    return new_streams, h, pre, next_post, next_comb, info, sums


def _partials(
    x: Tensor,
    X: Tensor,
    weights: Tensor,
    comb: Tensor,
    fn: Tensor,
    given: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """X', h if it comes with it, and partial sums: in one launch, or in that of :func:`post` and that of ``pre``'s product."""
    if X.shape[0] > FEW_TOKENS and fuses(x, X, fn) and (out is None or aligned(*out)):
        return post_partials(x, X, weights, comb, fn, given, out)
    new_streams = post(x, X, weights, comb, out[0] if out else None)
    return new_streams, None, product(new_streams, fn)


def fuses(x: Tensor, X: Tensor, fn: Tensor) -> bool:
    """Whether :func:`post_partials` takes them: no more streams than a thread makes, whole vectors, lines that are near."""
    _, n, channels = X.shape
    near = max(x.stride(0), X.stride(0), n * channels) < MAX_STRIDE
    return n <= GROUP.value and near and aligned(x, X, fn.view(-1, n, channels))


def post_partials(
    x: Tensor,
    X: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    given: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """X', h if weights are given, and partial sums (S, T, P) of fn vec X' and, behind them, of squares."""
    (tokens, _, channels), rows = X.shape, fn.shape[0]
    configuration = _post_pre(X.dtype, given is not None)
    blocks, steps = triton.cdiv(tokens, TOKENS), triton.cdiv(channels, configuration.constants["CHANNELS"])
    steps_of_part = _steps_of_part(blocks, steps, multiprocessors(X.device))
    parts = triton.cdiv(steps, steps_of_part)
    new_streams = X.new_empty(X.shape) if out is None else out[0]
    h = None if given is None else X.new_empty((tokens, channels)) if out is None else out[1]
    partials = fn.new_empty((parts, tokens, width_of(rows)))
    configuration.launch(
        blocks * parts,
        **_inputs(x, X, post, comb),
        fn_ptr=fn,
        given_ptr=given,
        new_streams_ptr=new_streams,
        h_ptr=h,
        partials_ptr=partials,
        rows=rows,
        width=partials.shape[2],
        parts=parts,
        channels_of_part=steps_of_part * configuration.constants["CHANNELS"],
    )
    return new_streams, h, partials


@functools.cache
def _steps_of_part(blocks: int, steps: int, multiprocessors: int) -> int:
    """Of ``steps`` along the channels how many a program makes, so that all of ``blocks`` are done soonest, an SM each."""

    def time(parts: int) -> int:
        return triton.cdiv(blocks * parts, multiprocessors) * (triton.cdiv(steps, parts) + FIRST_STEPS)

    return triton.cdiv(steps, min(range(1, min(steps, MAX_PARTS) + 1), key=time))


def _inputs(x: Tensor, X: Tensor, post: Tensor, comb: Tensor) -> dict[str, Any]:
    """Kernel arguments that describe what a layer's post is of."""
    return {
        "branch_ptr": x,
        "streams_ptr": X,
        "post_ptr": post,
        "comb_ptr": comb,
        "branch_stride_t": x.stride(0),
        "stride_t": X.stride(0),
        "stride_n": X.stride(1),
        "tokens": X.shape[0],
        "n": X.shape[1],
        "channels": X.shape[2],
    }
