"""The operators of Sinkhorn attention torch sees, with fake kernels and a rule for vmap; as :mod:`fastdsm._ops.operators`.

Tensors arrive validated: query (B, H, N, d), key and value (B, G, M, .), bias and mask (B or 1, H or 1, N or 1, M or 1),
temperature (B, H), paddings (B, N) and (B, M), the seed of a dropout (1,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .attention_runs import ShortBackward, ShortForward
from .operators import LIBRARY, implement
from .problem import attention_of, compute_dtype, dropout_of
from .runs import Forms, Run, Tensors, run_of
from .streamed.gradient import AttentionGradients, Cotangents
from .streamed.spectrum import Accuracy, Spectrum
from .streamed.sweeps import State, Sweeps, slots

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? temperature, Tensor? query_padding, "
    "Tensor? key_padding, Tensor? seed, float scale, float tau, SymInt n_iters, bool columns_first, float tol, "
    "float dropout_p, bool implicit, str backend"
)
TENSORS = 9  # the tensors lead
LIBRARY.define(f"sinkhorn_attention({_INPUTS}, bool residual, bool saving) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    "sinkhorn_attention_backward(Tensor grad_out, Tensor? grad_f, Tensor? grad_g, Tensor f, Tensor g, Tensor sweeps, "
    f"{_INPUTS}, bool with_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"sinkhorn_attention_sigma2({_INPUTS}, float accuracy, int max_steps, bool bounds) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _sweeps(options: Sequence[Any], saving: bool, short: bool) -> Sweeps:
    """The passes of kernels keep every sweep's potentials for an unrolled backward; the PyTorch path, and kernels of heads
    that are ``short``, sweep again."""
    n_iters, columns_first, tol, _, implicit, backend = options
    return Sweeps(n_iters, columns_first, tol, keep=saving and backend == "triton" and not implicit and not short)


def _is_short(query: Tensor, key: Tensor, value: Tensor, *inputs: Any) -> bool:
    """Of the forward's inputs."""
    bias, mask, _, _, _, seed = inputs[:6]
    *_, implicit, backend, _, saving = inputs
    return backends.short(query, key, value, any(x is not None for x in (bias, mask, seed)), implicit, saving, backend)


def _results_like(query: Tensor, key: Tensor, value: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Uninitialised (out, f, g, residual, sweeps)."""
    *options, _, saving = inputs[-8:]
    B, H, N, _ = query.shape
    K = slots(_sweeps(options, saving, _is_short(query, key, value, *inputs)))
    dtype = compute_dtype(query.dtype)
    return (
        value.new_empty((B, H, N, value.shape[3])),
        query.new_empty((B, H, K, N), dtype=torch.float64),
        query.new_empty((B, H, K, key.shape[2]), dtype=torch.float64),
        query.new_empty((B, H), dtype=dtype),
        query.new_empty((B, H), dtype=torch.int32),
    )


@implement("sinkhorn_attention")
def _attention(
    query: Tensor, key: Tensor, value: Tensor, *inputs: Any, run: Run | None = None, forms: Forms = None
) -> Tensors | tuple[Tensor, ...]:
    if _is_short(query, key, value, *inputs):
        tensors = (query, key, value, *inputs[:6])
        run = run or run_of(ShortForward, query, tensors, forms, key.shape[2], value.shape[3], tuple(inputs[6:-2]))
        return run(tensors)
    out, f, g, residual, sweeps = results = _results_like(query, key, value, *inputs)
    *options, wanted, saving = inputs[-8:]
    _, _, _, p, _, backend = options
    backends.attention_forward(
        attention_of(query, key, value, *inputs[:5], *inputs[6:8]),
        value,
        _sweeps(options, saving, False),
        dropout_of(inputs[5], p),
        out,
        State(f, g, residual, sweeps),
        wanted,
        backend,
    )
    return results


def _gradients_like(with_bias: bool, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    d_bias = query.new_empty((0,)) if bias is None or not with_bias else bias.new_empty(bias.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), d_bias


@implement("sinkhorn_attention_backward")
def _attention_backward(
    grad_out: Tensor,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    f: Tensor,
    g: Tensor,
    sweeps: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *inputs: Any,
    run: Run | None = None,
    forms: Forms = None,
) -> Tensors | tuple[Tensor, ...]:
    n_iters, columns_first, tol, p, implicit, backend, with_bias = inputs[-7:]
    if _is_short(query, key, value, *inputs[:-1], False, True):
        bias = inputs[0] if with_bias else None
        tensors = (grad_out, grad_f, grad_g, sweeps, query, key, value, *inputs[:6])
        like = tuple((tuple(x.shape), x.dtype) for x in (query, key, value, bias) if x is not None)
        run = run or run_of(ShortBackward, query, tensors, forms, like, tuple(inputs[6:-1]))
        *found, d_bias = run(tensors)
        return *found, query.new_empty((0,)) if d_bias is None else d_bias
    d_query, d_key, d_value, d_bias = results = _gradients_like(with_bias, query, key, value, inputs[0])
    backends.attention_backward(
        attention_of(query, key, value, *inputs[:5], *inputs[6:8]),
        value,
        Sweeps(n_iters, columns_first, tol, keep=f.shape[2] == n_iters + 1 > 1),
        dropout_of(inputs[5], p),
        Cotangents(grad_out, grad_f, grad_g),
        State(f, g, torch.empty_like(sweeps), sweeps),
        AttentionGradients(d_query, d_key, d_value, d_bias if d_bias.dim() > 1 else None),
        implicit,
        backend,
    )
    return results


def _spectrum_like(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    B, H, N, _ = query.shape
    shapes = ((B, H), (B, H, N), (B, H, key.shape[2]), (B, H))
    return tuple(query.new_empty(shape, dtype=compute_dtype(query.dtype)) for shape in shapes)


@implement("sinkhorn_attention_sigma2")
def _attention_sigma2(query: Tensor, key: Tensor, value: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    results = _spectrum_like(query, key)
    n_iters, columns_first, tol, _, _, backend, accuracy, max_steps, bounds = inputs[-9:]
    backends.attention_sigma2(
        attention_of(query, key, value, *inputs[:5], *inputs[6:8]),
        Sweeps(n_iters, columns_first, tol),
        Accuracy(accuracy, max_steps, bounds),
        Spectrum(*results),
        backend,
    )
    return results


torch.library.register_fake("fastdsm::sinkhorn_attention", _results_like, lib=LIBRARY)
torch.library.register_fake(
    "fastdsm::sinkhorn_attention_sigma2", lambda query, key, *_: _spectrum_like(query, key), lib=LIBRARY
)
torch.library.register_fake(
    "fastdsm::sinkhorn_attention_backward",
    lambda grad_out, grad_f, grad_g, f, g, sweeps, query, key, value, bias, *inputs: _gradients_like(
        inputs[-1], query, key, value, bias
    ),
    lib=LIBRARY,
)


def _over_batch(operator: Any, query_at: int, gradient_of_bias: int | None) -> Callable[..., Any]:
    """vmap's rule: the new dimension joins the batch; a bias or mask for all of the batch is expanded over it first."""

    def rule(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        batch = inputs[query_at].movedim(in_dims[query_at] or 0, 0).shape[in_dims[query_at] is not None]
        bias_at, seed_at = query_at + 3, query_at + TENSORS - 1
        if in_dims[seed_at] is not None:
            raise NotImplementedError('dropout_p > 0 inside torch.vmap needs randomness="same"')

        def join(at: int, x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor) or at == seed_at:
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            if at in (bias_at, bias_at + 1):
                x = x.expand(size, batch, *x.shape[2:])
            return x.reshape(-1, *x.shape[2:])

        joined = [join(at, x, dim) for at, (x, dim) in enumerate(zip(inputs, in_dims, strict=True))]
        results = [x.unflatten(0, (size, -1)) if x.dim() > 1 else x.expand(size, *x.shape) for x in operator(*joined)]
        if gradient_of_bias is not None and inputs[bias_at] is not None and results[gradient_of_bias].dim() > 2:
            one = inputs[bias_at].movedim(in_dims[bias_at] or 0, 0).shape[in_dims[bias_at] is not None] == 1
            if one and batch > 1:
                results[gradient_of_bias] = results[gradient_of_bias].sum(1, keepdim=True)
        return tuple(results), (0,) * len(results)

    return rule


for _name, _at, _bias in (
    ("sinkhorn_attention", 0, None),
    ("sinkhorn_attention_backward", 6, 3),
    ("sinkhorn_attention_sigma2", 0, None),
):
    _rule = _over_batch(getattr(torch.ops.fastdsm, _name).default, _at, _bias)
    torch.library.register_vmap(f"fastdsm::{_name}", _rule, lib=LIBRARY)
