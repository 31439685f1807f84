"""Sinkhorn attention as ``fastdsm verify`` leaves it out: dropout, products in TF32, the gradient of sigma2.

The budgets are those of the policy (``fastdsm._verify.sinkhorn``), with what plain PyTorch errs in the same arithmetic: under
TF32 each matrix product of the plain run, of its gradient too, has its operands cut to 10 bits of mantissa, as tensor cores do.
Of large logits the error of a single run is a matter of luck, of how its products happen to be rounded: plain PyTorch is run
with the features in several orders, and errs as it does at worst.
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
from fastdsm._verify.attention import AttentionCase, _held_in, _inputs
from fastdsm._verify.sinkhorn import SIGMA2_TOL, Record, Target, compare, gradient_size

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
DROPPED, SEED = 0.25, 7
ORDERS = 4
FEATURED = ("query", "key")


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

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        eye = torch.eye(key.shape[2], dtype=torch.promote_types(value.dtype, torch.float32)).expand(*key.shape[:3], -1)
        plan, info = reference.sinkhorn_attention(query, key, eye, **options)
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
    """Output, residual and gradients."""
    operands, cotangent = _inputs(case, target.device)
    operands["first"] = first
    with _multiplied(precision):
        oracle = _oracle(DROPPED, _kept(operands, target.backend)) if dropout else reference.sinkhorn_attention
        torch.manual_seed(SEED)
        call = partial(sinkhorn_attention, dropout_p=DROPPED * dropout, backend=target.backend, enable_gqa=True)
        found, slopes = _evaluate(partial(call, return_info=True), operands, cotangent)
    oracle = partial(oracle, return_info=True)
    truth, expected = _evaluate(oracle, *_held_in(torch.float64, operands, cotangent))
    runs = _plain_runs(precision, oracle, operands, cotangent)
    plain = _farthest(truth[0], [run[0][0] for run in runs])
    residual = _farthest(truth[1].residual, [run[0][1].residual for run in runs])
    usual = {name: _farthest(x, [run[1][name] for run in runs]) for name, x in expected.items()}
    size = max(1.0, truth[0].abs().max().item())
    record = partial(compare, "attention", target=target, case=case)
    results = [
        record("output", *(x.detach() for x in (found[0], truth[0], plain)), size=size),
        record("residual", found[1].residual, truth[1].residual, residual),
    ]
    return [*results, *_of_gradients("gradient of", slopes, expected, usual, cotangent, case, target)]


def result_alone(case: AttentionCase, target: Target, *, first: str = "col", dropout: bool = False) -> list[Record]:
    """Output, where no gradient will be asked for."""
    operands, cotangent = _inputs(case, target.device)
    operands["first"] = first
    oracle = _oracle(DROPPED, _kept(operands, target.backend)) if dropout else reference.sinkhorn_attention
    torch.manual_seed(SEED)
    call = partial(sinkhorn_attention, dropout_p=DROPPED * dropout, backend=target.backend, enable_gqa=True)
    found, _ = call(**operands, return_info=True)
    truth, plain = (
        oracle(**_held_in(dtype, operands, cotangent)[0], return_info=True)[0] for dtype in (torch.float64, torch.float32)
    )
    size = max(1.0, truth.abs().max().item())
    return [compare("attention", "output", found, truth, plain, size=size, target=target, case=case)]


def _plain_runs(
    precision: str, oracle: Callable[..., Any], operands: Mapping[str, Any], cotangent: Tensor
) -> list[tuple[Any, dict[str, Tensor]]]:
    """What plain float32 returns and its gradients, with the features of queries and keys in ``ORDERS`` orders.

    Cut to 10 bits, operands err alike in any order: there each feature of the queries is also multiplied by a number, by which
    that of the keys is divided.
    """
    single, weight = _held_in(torch.float32, operands, cotangent)
    runs = []
    for k in range(ORDERS):
        generator = torch.Generator().manual_seed(k)
        order = torch.randperm(operands["query"].shape[-1], generator=generator)
        factor = torch.ones(len(order)) if precision == "highest" else 1 + torch.rand(len(order), generator=generator)
        factors = dict(zip(FEATURED, (factor, 1 / factor), strict=True))
        given = {name: (x * factors[name])[..., order] if name in FEATURED else x for name, x in single.items()}
        found, slopes = _plain(precision, partial(_evaluate, oracle, given, weight))
        back = order.argsort()
        runs.append((found, {name: x[..., back] * factors[name] if name in FEATURED else x for name, x in slopes.items()}))
    return runs


def _farthest(truth: Tensor, runs: list[Tensor]) -> Tensor:
    """Of several results the one that errs most."""
    return max(runs, key=lambda x: float((x.detach().double() - truth.detach()).abs().max()))


def _evaluate(call: Callable[..., Any], operands: Mapping[str, Any], cotangent: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """What a call returns, and the gradients of it, or of the first of several."""
    floating = {name: x for name, x in operands.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in floating.items()}
    found = call(**{**operands, **leaves})
    slopes = torch.autograd.grad(found[0] if isinstance(found, tuple) else found, list(leaves.values()), cotangent)
    return found, dict(zip(leaves, slopes, strict=True))


def _of_gradients(
    name: str,
    found: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    cotangent: Tensor,
    case: AttentionCase,
    target: Target,
) -> Iterator[Record]:
    for of, x in found.items():
        size = gradient_size(truth[of], cotangent)
        yield compare("attention", f"{name} {of}", x, truth[of], plain[of], target=target, case=case, size=size)


def _plain(precision: str, run: Callable[[], Any]) -> Any:
    if precision == "highest":
        return run()
    with _TF32():
        return run()


def sigma2(case: AttentionCase, target: Target, *, first: str = "col", precision: str = "highest") -> list[Record]:
    """sigma2 of the plan, and its gradient: for few enough lines that Lanczos ends with all of them."""
    operands, cotangent = _inputs(case, target.device)
    del operands["value"]
    operands["first"] = first
    weight = cotangent[..., 0, 0].float()
    with _multiplied(precision):
        call = partial(sinkhorn_attention_sigma2, accuracy=1e-12, backend=target.backend, enable_gqa=True)
        value, slopes = _evaluate(call, operands, weight)
    oracle = reference.sinkhorn_attention_sigma2
    truth, expected = _evaluate(oracle, *_held_in(torch.float64, operands, weight))
    runs = _plain_runs(precision, oracle, operands, weight)
    plain = _farthest(truth, [run[0] for run in runs])
    usual = {name: _farthest(x, [run[1][name] for run in runs]) for name, x in expected.items()}
    of_value = compare(
        "attention", "sigma2", value, truth.detach(), plain.detach(), target=target, case=case, relative=SIGMA2_TOL
    )
    return [of_value, *_of_gradients("gradient of sigma2 in", slopes, expected, usual, weight, case, target)]
