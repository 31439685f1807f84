"""``mhc_pre``, ``mhc_post``, ``mhc_post_pre`` and ``mhc_head``."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

from torch import Tensor

from .._ops import mhc_calls, sharded
from .._ops.arguments import check_choice, count_of, resolve_backend
from .._ops.mixing import Mixing
from .._ops.problem import compute_dtype
from ..projection import sinkhorn
from ..reference import mhc as oracle
from ..results import MixInfo
from .arguments import of_tokens, parameter, streams_of, weighted
from .buffers import check_buffer
from .variants import mixing_of

Mixes = tuple[Tensor, Tensor]


class _Options(TypedDict, total=False):
    """What the overloads share."""

    norm_weight: Tensor | None
    norm_eps: float
    mhc_mult: int | None
    post_mult_value: float
    pre_eps: float | None
    sinkhorn_eps: float | None
    sinkhorn_repeat: int
    n_splits: int | None
    variant: str
    transposed: bool | None
    backend: str


class _PreOptions(_Options, total=False):
    solver: str
    out: Tensor | None


class _PostPreOptions(_Options, total=False):
    mixes: Tensor | None
    out: tuple[Tensor, Tensor] | None


class _Layer(NamedTuple):
    """What pre takes beside streams, as the operators do."""

    fn: Tensor
    scale: Tensor
    base: Tensor
    mixing: Mixing
    backend: str


@overload
def mhc_pre(
    residual: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    return_info: Literal[False] = ...,
    **options: Unpack[_PreOptions],
) -> tuple[Tensor, Mixes]: ...
@overload
def mhc_pre(
    residual: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, return_info: Literal[True], **options: Unpack[_PreOptions]
) -> tuple[Tensor, Mixes, MixInfo]: ...
@overload
def mhc_pre(
    residual: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, return_info: bool, **options: Unpack[_PreOptions]
) -> tuple[Tensor, Mixes] | tuple[Tensor, Mixes, MixInfo]: ...
@sharded.by_shards("residual")
def mhc_pre(
    residual: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    mhc_mult: int | None = None,
    post_mult_value: float = 2.0,
    pre_eps: float | None = None,
    sinkhorn_eps: float | None = None,
    sinkhorn_repeat: int = 20,
    n_splits: int | None = None,
    variant: str = "deepseek",
    transposed: bool | None = None,
    solver: str = "sinkhorn",
    return_info: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Mixes] | tuple[Tensor, Mixes, MixInfo]:
    """The input of a branch, and how its output will be written: the streams' product with fn, the projection, the collapse.

    Args:
        residual: streams (..., n, C), float16, bfloat16, float32 or float64, n <= 16.
        fn: (n (n + 2), n C), rows of pre, of post, and of the mix of streams row by row.
        scale: (3,), of the three. base: (n (n + 2),).
        norm_weight: None, or (n C,), which multiplies the normalised streams. norm_eps: under the root of their mean square.
        mhc_mult: None, or n, for an error where the streams are not as many.
        post_mult_value: what the sigmoids of post are multiplied by.
        pre_eps, sinkhorn_eps: None for the variant's; the others of "deepseek" are "liger", "megatron", "transformer_engine",
            "paper" and "lucidrains" (:data:`fastdsm.mhc.VARIANTS`).
        sinkhorn_repeat: sweeps, >= 1, without eps >= 0.
        n_splits: accepted and not needed.
        transposed: None for the variant's: whether the mix is read as [old, new], as DeepSeek does, or as [new, old].
        solver: "sinkhorn", or of a variant without eps "newton": the converged mix, at most ``sinkhorn_repeat`` steps, with its
            implicit gradient (:func:`fastdsm.sinkhorn`); made of several calls.
        return_info: also return a :class:`fastdsm.mhc.MixInfo`: sigma_2, all singular values and the residual of each token's
            mix, made where the mixes are.
        out: None, or a contiguous (..., C) like residual for layer_input, where no gradient is asked for.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        layer_input (..., C) like residual; post (..., n, 1) and comb (..., n, n), always as [old, new], in float32 (float64 for
        float64), for :func:`mhc_post`; with ``return_info`` also the info.

    Raises:
        TypeError, ValueError: with the role of the argument, what was expected and what came.

    Source: mHC, arXiv 2512.24880; DeepSeek-V4's inference code for names and order.
    """
    n, channels = streams_of(residual, mhc_mult)
    options = _mixing(variant, transposed, norm_eps, post_mult_value, pre_eps, sinkhorn_eps, sinkhorn_repeat, return_info)
    layer = _layer(residual, fn, scale, base, norm_weight, options, backend, n * (n + 2), 3)
    check_choice(solver, "solver", ("sinkhorn", "newton"))
    inputs = (residual.reshape(-1, n, channels), *layer[:3], None, *layer.mixing, layer.backend)
    if out is not None:
        check_buffer(out, "out", (*residual.shape[:-2], channels), residual, inputs[:4])
    if solver == "newton":
        h, post, comb, info = _converged(inputs[0], layer)
        h = h if out is None else out.view(-1, channels).copy_(h)
    elif out is not None:
        h = out
        _, post, comb, info = mhc_calls.pre_out(*inputs, out.view(-1, channels))
    else:
        h, _, post, comb, info, *_ = mhc_calls.pre(*inputs)
    found = _restored(residual, h, (channels,)), _written(residual, post, comb)
    return (*found, _info(residual, info)) if return_info else found


@sharded.by_shards("residual")
def mhc_head(
    residual: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    mhc_mult: int | None = None,
    pre_eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """The streams (..., n, C) as one, (..., C), before the last projection: ``mhc_pre`` of n mixes alone.

    fn (n, n C), scale (1,), base (n,); the others, errors and source as for :func:`mhc_pre`.
    """
    n, channels = streams_of(residual, mhc_mult)
    mixing = Mixing(pre_eps=pre_eps, norm_eps=norm_eps)
    layer = _layer(residual, fn, scale, base, norm_weight, mixing, backend, n, 1)
    h = mhc_calls.pre(residual.reshape(-1, n, channels), *layer[:3], None, *layer.mixing, layer.backend)[0]
    return _restored(residual, h, (channels,))


@sharded.by_shards("residual", x=1, post_layer_mix=None, comb_res_mix=2)
def mhc_post(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The streams after a branch: X'_new = post_new x + sum_old comb[old, new] X_old, (..., n, C) like residual.

    Args:
        x: the branch's output (..., C), rounded to residual's dtype where it has another.
        residual: (..., n, C). post_layer_mix: (..., n, 1) or (..., n). comb_res_mix: (..., n, n), as [old, new].
        out: None, or a contiguous tensor like residual for the result, where no gradient is asked for; not residual itself.
        backend: "auto", "triton", "torch" or "reference".

    Errors and source as for :func:`mhc_pre`.
    """
    n, channels = streams_of(residual)
    inputs = _post_inputs(x, residual, post_layer_mix, comb_res_mix)
    backend = resolve_backend(backend, residual)
    if out is None:
        return _restored(residual, mhc_calls.post(*inputs, backend), (n, channels))
    check_buffer(out, "out", tuple(residual.shape), residual, inputs)
    mhc_calls.post_out(*inputs, backend, out.view(-1, n, channels))
    return out


@overload
def mhc_post_pre(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    return_info: Literal[False] = ...,
    **options: Unpack[_PostPreOptions],
) -> tuple[Tensor, Tensor, Mixes]: ...
@overload
def mhc_post_pre(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    return_info: Literal[True],
    **options: Unpack[_PostPreOptions],
) -> tuple[Tensor, Tensor, Mixes, MixInfo]: ...
@overload
def mhc_post_pre(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    return_info: bool,
    **options: Unpack[_PostPreOptions],
) -> tuple[Tensor, Tensor, Mixes] | tuple[Tensor, Tensor, Mixes, MixInfo]: ...
@sharded.by_shards("residual", x=1, post_layer_mix=None, comb_res_mix=2, mixes=1)
def mhc_post_pre(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    mixes: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    mhc_mult: int | None = None,
    post_mult_value: float = 2.0,
    pre_eps: float | None = None,
    sinkhorn_eps: float | None = None,
    sinkhorn_repeat: int = 20,
    n_splits: int | None = None,
    variant: str = "deepseek",
    transposed: bool | None = None,
    return_info: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Mixes] | tuple[Tensor, Tensor, Mixes, MixInfo]:
    """:func:`mhc_post` of one layer with :func:`mhc_pre` of the next: new residual, layer_input, (post, comb)[, info].

    Arguments, errors and source as there. mixes: None, or (..., n (n + 2)) of an earlier layer, as :func:`mhc_mixes` makes
    them, from which this layer's pre is then taken, by its own scale and base (the shifted layer); post and comb are still of
    the new residual's own. out: None, or buffers for the new residual and for layer_input.
    """
    n, channels = streams_of(residual, mhc_mult)
    options = _mixing(variant, transposed, norm_eps, post_mult_value, pre_eps, sinkhorn_eps, sinkhorn_repeat, return_info)
    layer = _layer(residual, fn, scale, base, norm_weight, options, backend, n * (n + 2), 3)
    given = None
    if mixes is not None:
        flat = of_tokens(mixes, "mixes", (n * (n + 2),), residual, compute_dtype(residual.dtype))
        given = oracle.pre_of(flat, layer.scale, layer.base, n, layer.mixing)
    inputs = (*_post_inputs(x, residual, post_layer_mix, comb_res_mix), *layer[:3], given, *layer.mixing, layer.backend)
    if out is None:
        mixed, h, _, post, comb, info, *_ = mhc_calls.post_pre(*inputs)
    else:
        mixed, h = _buffers(out, residual, inputs[:8])
        _, post, comb, info = mhc_calls.post_pre_out(*inputs, mixed.view(-1, n, channels), h.view(-1, channels))
    found = (
        _restored(residual, mixed, (n, channels)), _restored(residual, h, (channels,)), _written(residual, post, comb)
    )  # fmt: skip
    return (*found, _info(residual, info)) if return_info else found


def _buffers(out: Any, residual: Tensor, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """For the new residual and the layer's input, apart from each other and from the inputs."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out must be a pair of tensors, for the new residual and for layer_input, got {type(out).__name__}")
    mixed = check_buffer(out[0], "out[0]", tuple(residual.shape), residual, inputs)
    shape = (*residual.shape[:-2], residual.shape[-1])
    return mixed, check_buffer(out[1], "out[1]", shape, residual, (mixed, *inputs))


def _converged(X: Tensor, layer: _Layer) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """h, post, comb and info with the fixed point of the projection."""
    n, mixing = X.shape[1], layer.mixing
    if mixing.sinkhorn_eps > 0.0:
        raise ValueError(
            f'solver="newton" converges a projection without eps, got sinkhorn_eps={mixing.sinkhorn_eps}; '
            'use variant="paper" or "transformer_engine"'
        )
    pre, post, logits = oracle.gates(oracle.mixes(X, layer.fn, mixing.norm_eps), layer.scale, layer.base, n, mixing)
    first = "col" if mixing.columns_first else "row"
    plan = sinkhorn(logits, n_iters=mixing.n_iters, first=first, solver="newton", backend=layer.backend)
    info = oracle.spectrum(plan) if mixing.spectrum else None
    return oracle.collapse(X, pre).to(X.dtype), post, plan if mixing.transposed else plan.mT, info


def _mixing(
    variant: str,
    transposed: bool | None,
    norm_eps: float,
    post_mult: float,
    pre_eps: Any,
    sinkhorn_eps: Any,
    repeat: Any,
    info: Any,
) -> Mixing:
    options = {"norm_eps": norm_eps, "post_mult": post_mult, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps}
    options["spectrum"] = bool(info)
    mixing = mixing_of(variant, transposed, **options)
    return mixing._replace(n_iters=count_of(repeat, "sinkhorn_repeat", 1 if mixing.sinkhorn_eps > 0.0 else 0))


def _layer(
    residual: Tensor, fn: Any, scale: Any, base: Any, norm_weight: Any, mixing: Mixing, backend: str, rows: int, scales: int
) -> _Layer:
    n, channels = residual.shape[-2:]
    width = n * channels
    counted = f"for n={n}, C={channels}"
    fn = parameter(fn, "fn", (rows, width), residual, counted)
    fn = weighted(fn, norm_weight, residual)
    scale = parameter(scale, "scale", (scales,), residual, "of pre, post and comb" if scales == 3 else "of pre")
    base = parameter(base, "base", (rows,), residual, counted)
    return _Layer(fn, scale, base, mixing, resolve_backend(backend, residual))


def _post_inputs(x: Any, residual: Tensor, post: Any, comb: Any) -> tuple[Tensor, ...]:
    n, channels = residual.shape[-2:]
    wide = compute_dtype(residual.dtype)
    if isinstance(post, Tensor) and post.dim() == residual.dim() and post.shape[-1] == 1:
        post = post.squeeze(-1)
    return (
        of_tokens(x, "x", (channels,), residual, residual.dtype),
        residual.reshape(-1, n, channels),
        of_tokens(post, "post_layer_mix", (n,), residual, wide),
        of_tokens(comb, "comb_res_mix", (n, n), residual, wide),
    )


def _restored(residual: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(*residual.shape[:-2], *shape)


def _written(residual: Tensor, post: Tensor, comb: Tensor) -> tuple[Tensor, Tensor]:
    n = residual.shape[-2]
    return _restored(residual, post, (n, 1)), _restored(residual, comb, (n, n))


def _info(residual: Tensor, info: Any) -> MixInfo:
    n = residual.shape[-2]
    info = _restored(residual, info, (n + 2,))
    return MixInfo(info[..., n], info[..., :n], info[..., n + 1])
