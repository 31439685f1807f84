"""Sinkhorn attention as ``fastdsm verify`` leaves it out: dropout, products in TF32, the gradient of sigma2.

The budgets are those of the policy (``fastdsm._verify.sinkhorn``), with what plain PyTorch errs in the same arithmetic: under
TF32 each matrix product of the plain run, of its gradient too, has its operands cut to 10 bits of mantissa, as tensor cores do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdsm import reference, sinkhorn_attention, sinkhorn_attention_sigma2
from fastdsm._verify.attention import AttentionCase, _evaluate, _held_in, _inputs
from fastdsm._verify.sinkhorn import SIGMA2_TOL, Record, Target, compare, gradient_size

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
DROPPED, SEED = 0.25, 7


class _TF32(TorchDispatchMode):
    """Products of matrices in float32 take their operands cut."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = tuple(
                x if x.dtype != torch.float32 else (x.contiguous().view(torch.int32) & -0x2000).view(x.dtype) for x in args
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def _multiplied(precision: str) -> Iterator[None]:
    """float32 products of the calls within."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _oracle(p: float, kept: Tensor) -> Callable[..., Any]:
    """The reference with a dropout of the entries of ``kept``, (B, H, N, M), bool, at probability p."""

    def attention(query: Tensor, key: Tensor, value: Tensor, return_info: bool, **options: Any) -> Any:
        eye = torch.eye(key.shape[2], dtype=torch.promote_types(value.dtype, torch.float32)).expand(*key.shape[:3], -1)
        plan, info = reference.sinkhorn_attention(query, key, eye, return_info=return_info, **options)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (plan * kept / (1 - p)) @ value.to(plan.dtype), info

    return attention


def _kept(operands: Mapping[str, Any], backend: str) -> Tensor:
    """Which entries a dropout keeps: those whose result shows in the product with the identity."""
    key = operands["key"]
    eye = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:3], -1)
    torch.manual_seed(SEED)
    found = sinkhorn_attention(**{**operands, "value": eye}, dropout_p=DROPPED, backend=backend, enable_gqa=True)
    assert isinstance(found, Tensor)
    return found != 0


def attention(
    case: AttentionCase, target: Target, *, first: str = "col", dropout: bool = False, precision: str = "highest"
) -> list[Record]:
    """Output, gradients, sigma2."""
    operands, cotangent = _inputs(case, target.device)
    operands["first"] = first
    with _multiplied(precision):
        oracle = _oracle(DROPPED, _kept(operands, target.backend)) if dropout else reference.sinkhorn_attention
        torch.manual_seed(SEED)
        found = _evaluate(
            partial(sinkhorn_attention, dropout_p=DROPPED * dropout, backend=target.backend, enable_gqa=True),
            partial(sinkhorn_attention_sigma2, backend=target.backend, enable_gqa=True),
            operands,
            cotangent,
        )
    both = oracle, reference.sinkhorn_attention_sigma2
    truth = _evaluate(*both, *_held_in(torch.float64, operands, cotangent))
    plain = _plain(precision, lambda: _evaluate(*both, *_held_in(torch.float32, operands, cotangent)))
    record = partial(compare, target=target, case=case)
    size = max(1.0, truth.out.abs().max().item())
    records = [
        record("attention", "output", found.out, truth.out, plain.out, size=size),
        record("attention", "sigma2", found.sigma2, truth.sigma2, plain.sigma2, relative=SIGMA2_TOL),
    ]
    for name, slope in truth.gradients.items():
        given, usual = found.gradients[name], plain.gradients[name]
        size = gradient_size(slope, cotangent)
        records.append(record("attention", f"gradient of {name}", given, slope, usual, size=size))
    return records


def _plain(precision: str, run: Callable[[], Any]) -> Any:
    if precision == "highest":
        return run()
    with _TF32():
        return run()


def sigma2(case: AttentionCase, target: Target, *, first: str = "col", precision: str = "highest") -> list[Record]:
    """sigma2 of the plan to the accuracy of its dtype, and its gradient."""
    operands, cotangent = _inputs(case, target.device)
    del operands["value"]
    operands["first"] = first
    weight = cotangent[..., 0, 0].float()

    def evaluate(call: Callable[..., Any], given: Mapping[str, Any], weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: given[name].detach().clone().requires_grad_() for name in ("query", "key")}
        value = call(**{**given, **leaves})
        slopes = torch.autograd.grad(value, list(leaves.values()), weight)
        return value.detach(), dict(zip(leaves, slopes, strict=True))

    with _multiplied(precision):
        call = partial(sinkhorn_attention_sigma2, accuracy=1e-12, backend=target.backend, enable_gqa=True)
        value, slopes = evaluate(call, operands, weight)
    oracle = reference.sinkhorn_attention_sigma2
    truth, expected = evaluate(oracle, *_held_in(torch.float64, operands, weight))
    plain, usual = _plain(precision, lambda: evaluate(oracle, *_held_in(torch.float32, operands, weight)))
    record = partial(compare, target=target, case=case)
    return [
        record("attention", "sigma2", value, truth, plain, relative=SIGMA2_TOL),
        *(
            record(
                "attention",
                f"gradient of sigma2 in {name}",
                x,
                expected[name],
                usual[name],
                size=gradient_size(expected[name], weight),
            )
            for name, x in slopes.items()
        ),
    ]
