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

from ..common.configuration import Configuration
from .post import _mhc_post_fwd_kernel
from .post_backward import _mhc_post_bwd_kernel
from .streams import GROUP

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
GROUPS = (1, 2, 4)
WARPS, LANES = 4, 32
# Of a stream in each thread: 16 bytes, but 8 where the backward keeps cotangents and dot products of 16 streams.
_BYTES = dict.fromkeys(itertools.product((False, True), GROUPS), 16) | {(True, 4): 8}
_FEATURES = ("branch_ptr", "streams_ptr", "new_streams_ptr", "grad_new_streams_ptr", "grad_branch_ptr", "grad_streams_ptr")


def groups_of(streams: Tensor) -> int:
    """Warps to whom the streams of a token (T, n, C) are left."""
    return next(groups for groups in GROUPS if streams.shape[1] <= groups * GROUP.value)


def aligned(*features: Tensor) -> bool:
    """Whether the channels of every token and stream start on 16 bytes and are made of whole vectors of as many."""
    return all(_whole_vectors(x) for x in features)


def _whole_vectors(x: Tensor) -> bool:
    vector = 16 // x.element_size()
    steps = [stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    return x.data_ptr() % 16 == 0 and not any(number % vector for number in (*steps, x.shape[-1]))


@functools.cache
def _configuration(kernel: Any, dtype: torch.dtype, groups: int, aligned: bool) -> Configuration:
    """A row of a tile for each warp; of a stream the widest vector for each thread, or one channel where not ``aligned``."""
    backward = kernel is _mhc_post_bwd_kernel
    vector = _BYTES[backward, groups] // dtype.itemsize if aligned else 1
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    return Configuration(
        kernel=kernel,
        pointers={name: TYPES[dtype] if name in _FEATURES else "fp32" for name in names},
        constants={"GROUPS": groups, "ROWS": WARPS, "CHANNELS": LANES * vector, "ALIGNED": aligned}
        | ({"LANES": LANES} if backward else {}),
        num_warps=WARPS,
        matrices=WARPS // groups,
        label=f"mhc post{' backward' * backward} {TYPES[dtype]} {groups * GROUP.value} streams{' aligned' * aligned}",
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    kinds = itertools.product((_mhc_post_fwd_kernel, _mhc_post_bwd_kernel), TYPES, GROUPS, (True, False))
    return [_configuration(*kind) for kind in kinds]


def post(x: Tensor, X: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X' (T, n, C), X'_new = post_new x + sum_old comb[old, new] X_old."""
    tokens, _, channels = X.shape
    new_streams = X.new_empty(X.shape)
    configuration = _configuration(_mhc_post_fwd_kernel, X.dtype, groups_of(X), aligned(x, X))
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
