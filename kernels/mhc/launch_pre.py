"""``pre`` of an mHC layer and its backward: what is launched for them."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from fastdsm._ops.mixing import Mixing

from ..common.configuration import multiprocessors
from .mixes import WIDE_SEGMENT, Options
from .table_pre import configurations, dots_of, mix_backward_of, mix_of, product_of, streams_of, sum_backward
from .tiles import Strides

__all__ = ["configurations", "mix", "pre", "pre_backward", "product"]

_VECTOR = 8  # lines are made of so many channels, at least 16 bytes, as often as it takes
_PROGRAMS_PER_SM = 2
_MAX_PARTS = 32


def whole_vectors(x: Tensor, vector: int) -> bool:
    """Whether lines start on 16 bytes, and are made and lie apart by whole runs of ``vector`` channels."""
    steps = [step for step, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    return x.data_ptr() % 16 == 0 and not any(number % vector for number in (x.shape[-1], *steps))


def aligned(x: Tensor) -> Tensor:
    """``x`` if its lines can be moved in pieces of 16 bytes; else a copy that can, with zeros behind each line."""
    if whole_vectors(x, _VECTOR):
        return x
    copy = x.new_zeros((*x.shape[:-1], -(-x.shape[-1] // _VECTOR) * _VECTOR))
    copy[..., : x.shape[-1]] = x
    return copy


def strides(x: Tensor) -> Strides:
    """From token to token, and from stream to stream where there are several."""
    return Strides(*x.stride()[:-1], *([0] * (3 - x.dim())))


def options(mixing: Mixing) -> Options:
    """As the kernels take them."""
    log2_eps = math.log2(mixing.sinkhorn_eps) if mixing.sinkhorn_eps > 0 else -math.inf
    return Options(
        n_iters=mixing.n_iters,
        columns_first=int(mixing.columns_first),
        transposed=int(mixing.transposed),
        eps=mixing.sinkhorn_eps,
        log2_eps=log2_eps,
        floor=mixing.sinkhorn_eps if mixing.floored else 0.0,
        log2_first=-math.inf if mixing.floored else log2_eps,
        pre_eps=mixing.pre_eps,
        post_mult=mixing.post_mult,
        norm_eps=mixing.norm_eps,
    )


def width_of(rows: int) -> int:
    """Columns of partial sums: of the rows of fn, of squares, and what makes them whole vectors."""
    return -(-(rows + 1) // 8) * 8


def _split(size: int, step: int, programs: int, device: torch.device) -> int:
    """How much of ``size``, in whole steps, each takes of so many that ``programs`` of each fill the device."""
    wanted = max(_PROGRAMS_PER_SM * multiprocessors(device) // programs, 1)
    return triton.cdiv(triton.cdiv(size, step), min(wanted, _MAX_PARTS)) * step


def product(X: Tensor, fn: Tensor) -> Tensor:
    """Partial sums (parts, T, P) of fn vec X and, behind them, of squares."""
    tokens, streams, channels = X.shape
    rows = fn.shape[0]
    fn = aligned(fn.view(rows, streams, channels))
    X = aligned(X)
    configuration = product_of(X.dtype, tokens, rows)
    block_k = configuration.constants["BLOCK_K"]
    programs = triton.cdiv(tokens, configuration.matrices) * triton.cdiv(rows, configuration.constants["BLOCK_D"])
    blocks = streams * triton.cdiv(X.shape[2], block_k)
    blocks_of_part = _split(blocks, 1, programs, X.device)
    parts = triton.cdiv(blocks, blocks_of_part)
    partials = torch.empty((parts, tokens, width_of(rows)), dtype=torch.float32, device=X.device)
    configuration.launch(
        programs * parts,
        X_ptr=X,
        fn_ptr=fn,
        partials_ptr=partials,
        tokens=tokens,
        streams=streams,
        channels=X.shape[2],
        rows=rows,
        width=partials.shape[2],
        parts=parts,
        blocks_of_part=blocks_of_part,
        X_strides=strides(X),
    )
    return partials


def mix(
    partials: Tensor,
    X: Tensor,
    scale: Tensor,
    base: Tensor,
    mixing: Mixing,
    given: Tensor | None = None,
    collapse: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """h, pre, post, comb, info and sums of partial sums; h = None without ``collapse``, post = comb = None of a head.

    info (T, n + 2): singular values of comb, sigma2 and residual, None where ``mixing`` does not ask for its spectrum.
    out (T, C), contiguous: where h goes.

    given: (T, n), X is collapsed by it.
    """
    tokens, streams, channels = X.shape
    rows = base.shape[0]
    head = rows == streams
    X = aligned(X) if collapse else X
    configuration = mix_of(X.dtype, streams, head, mixing.spectrum)
    new = functools.partial(torch.empty, dtype=torch.float32, device=X.device)
    pre, sums = new((tokens, streams)), new((tokens, rows + 1))
    post, comb = (None, None) if head else (new((tokens, streams)), new((tokens, streams, streams)))
    info = new((tokens, streams + 2)) if mixing.spectrum and not head else None
    direct = out is not None and X.shape[2] == channels and whole_vectors(out, _VECTOR)
    h = out if direct else torch.empty((tokens, X.shape[2]), dtype=X.dtype, device=X.device) if collapse else None
    blocks = triton.cdiv(tokens, configuration.matrices)
    step = configuration.constants["BLOCK_C"]
    channels_of_part = _split(X.shape[2], step, blocks, X.device) if collapse else 0
    channel_parts = triton.cdiv(X.shape[2], channels_of_part) if collapse else 1
    configuration.launch(
        blocks * channel_parts,
        partials_ptr=partials,
        X_ptr=X,
        scale_ptr=scale,
        base_ptr=base,
        given_ptr=given,
        h_ptr=h,
        pre_ptr=pre,
        post_ptr=post,
        comb_ptr=comb,
        info_ptr=info,
        sums_ptr=sums,
        tokens=tokens,
        streams=streams,
        channels=X.shape[2],
        rows=rows,
        width=partials.shape[2],
        parts=partials.shape[0],
        channel_parts=channel_parts,
        channels_of_part=channels_of_part,
        size=float(streams * channels),
        X_strides=strides(X),
        options=options(mixing),
        has_given=int(given is not None),
    )
    if h is not None and not direct:
        h = h[:, :channels].contiguous() if out is None else out.copy_(h[:, :channels])
    return h, pre, post, comb, info, sums


def pre(
    X: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    mixing: Mixing,
    given: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """h (T, C), pre, post (T, n), comb (T, n, n), info, and the sums (T, D + 1) that the backward wants; see :func:`mix`."""
    h, pre, post, comb, info, sums = mix(product(X, fn), X, scale, base, mixing, given, out=out)
    assert h is not None
    return h, pre, post, comb, info, sums


def pre_backward(
    dh: Tensor,
    dpre: Tensor | None,
    dpost: Tensor | None,
    dcomb: Tensor | None,
    X: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    sums: Tensor,
    mixing: Mixing,
    given: Tensor | None = None,
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """dX (T, n, C), dfn, dscale, dbase, and dgiven (T, n) of weights that were ``given``.

    dpre: of the pre that was returned, on top of what h gives. add (T, n, C): another gradient of X, added before rounding.
    """
    _tokens, streams, channels = X.shape
    rows = base.shape[0]
    fn, X, dh = aligned(fn.view(rows, streams, channels)), aligned(X), aligned(dh)
    add = None if add is None else aligned(add)
    dots = _dot_products(dh, X)
    weights, dgiven, ds, block_sums = _mix_gradients(dots, dpre, dpost, dcomb, scale, base, sums, mixing, given, channels)
    dX, dfn_parts = _stream_gradients(dh, X, fn, ds, weights, add)
    dfn, dbase, dscale = torch.empty_like(fn), torch.empty_like(base), torch.empty_like(scale)
    configuration = sum_backward()
    configuration.launch(
        triton.cdiv(fn.numel(), configuration.matrices),
        dfn_parts_ptr=dfn_parts,
        block_sums_ptr=block_sums,
        dfn_ptr=dfn,
        dbase_ptr=dbase,
        dscale_ptr=dscale,
        size=fn.numel(),
        parts=dfn_parts.shape[0],
        blocks=block_sums.shape[0],
        rows=rows,
        streams=streams,
    )
    return dX[..., :channels].contiguous(), dfn[..., :channels].contiguous().view(rows, -1), dscale, dbase, dgiven


def _dot_products(dh: Tensor, X: Tensor) -> Tensor:
    """<dh, X_i> over parts of the channels (parts, T, n)."""
    tokens, streams, channels = X.shape
    configuration = dots_of(X.dtype, streams)
    blocks = triton.cdiv(tokens, configuration.matrices)
    channels_of_part = _split(channels, configuration.constants["BLOCK_C"], blocks, X.device)
    parts = triton.cdiv(channels, channels_of_part)
    dots = torch.empty((parts, tokens, streams), dtype=torch.float32, device=X.device)
    configuration.launch(
        blocks * parts,
        dh_ptr=dh,
        X_ptr=X,
        dots_ptr=dots,
        tokens=tokens,
        streams=streams,
        channels=channels,
        parts=parts,
        channels_of_part=channels_of_part,
        dh_strides=strides(dh),
        X_strides=strides(X),
    )
    return dots


def _mix_gradients(
    dots: Tensor,
    dpre: Tensor | None,
    dpost: Tensor | None,
    dcomb: Tensor | None,
    scale: Tensor,
    base: Tensor,
    sums: Tensor,
    mixing: Mixing,
    given: Tensor | None,
    channels: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """What collapsed X, its gradient if it was given, ds with c behind it, and sums of tokens for base and scale."""
    parts, tokens, streams = dots.shape
    rows = base.shape[0]
    head = rows == streams
    configuration = mix_backward_of(streams, head)
    blocks = triton.cdiv(tokens, configuration.matrices)
    new = functools.partial(torch.empty, dtype=torch.float32, device=dots.device)
    weights, dgiven = (new((tokens, streams)), None) if given is None else (given, new((tokens, streams)))
    ds, block_sums = new((tokens, width_of(rows))), new((blocks, 2, rows))
    sweeps = max(mixing.n_iters - 1, 0)
    slots, lines = sweeps + triton.cdiv(sweeps, WIDE_SEGMENT.value), 2 * configuration.constants["LINES"]
    history = None if head else new((slots, lines, blocks * configuration.matrices))
    configuration.launch(
        blocks,
        dots_ptr=dots,
        dpre_ptr=dpre,
        dpost_ptr=dpost,
        dcomb_ptr=dcomb,
        sums_ptr=sums,
        scale_ptr=scale,
        base_ptr=base,
        weights_ptr=weights,
        dgiven_ptr=dgiven,
        ds_ptr=ds,
        block_sums_ptr=block_sums,
        history_ptr=history,
        tokens=tokens,
        streams=streams,
        rows=rows,
        width=ds.shape[1],
        parts=parts,
        size=float(streams * channels),
        options=options(mixing),
        has_given=int(given is not None),
        has_dpre=int(dpre is not None),
        has_dpost=int(dpost is not None),
        has_dcomb=int(dcomb is not None),
    )
    return weights, dgiven, ds, block_sums


def _stream_gradients(
    dh: Tensor, X: Tensor, fn: Tensor, ds: Tensor, weights: Tensor, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dX, and dfn over parts of the tokens (parts, D, n, C)."""
    tokens, streams, channels = X.shape
    rows = fn.shape[0]
    configuration = streams_of(X.dtype, streams, rows)
    step = configuration.matrices
    sizes = configuration.constants
    groups = triton.cdiv(rows, sizes["BLOCK_D"]) * (streams // sizes["STREAMS"])
    programs = groups * triton.cdiv(channels, sizes["BLOCK_C"])
    tokens_of_part = _split(tokens, step, programs, X.device)
    parts = triton.cdiv(tokens, tokens_of_part)
    dX = torch.empty(X.shape, dtype=X.dtype, device=X.device)
    dfn = torch.empty((parts, *fn.shape), dtype=torch.float32, device=X.device)
    configuration.launch(
        programs * parts,
        dh_ptr=dh,
        X_ptr=X,
        fn_ptr=fn,
        ds_ptr=ds,
        weights_ptr=weights,
        add_ptr=add,
        dX_ptr=dX,
        dfn_ptr=dfn,
        tokens=tokens,
        streams=streams,
        channels=channels,
        rows=rows,
        width=ds.shape[1],
        parts=parts,
        tokens_of_part=tokens_of_part,
        dh_strides=strides(dh),
        X_strides=strides(X),
        add_strides=strides(X if add is None else add),
        has_add=int(add is not None),
    )
    return dX, dfn
