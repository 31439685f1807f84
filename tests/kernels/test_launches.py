"""Every launch passes what its kernel is compiled for: recorded from calls of every family, nothing run."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

import fastdsm
from benchmarks.static.compilation import kernel_name
from fastdsm import kernels
from fastdsm.kernels.common.configuration import Configuration
from fastdsm.kernels.mhc import launch_post

from ..launched import misfits

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def _project(n: int, m: int, dtype: torch.dtype) -> None:
    on = {"backend": "triton"}
    logits = torch.randn(3, n, m).to(dtype).requires_grad_()
    temperature = torch.ones(3, dtype=DOUBLE if dtype == DOUBLE else SINGLE, requires_grad=True)
    masked = {"mask": torch.ones(3, n, m, dtype=torch.bool), "tol": 1e-3, "first": "row"}
    fastdsm.sinkhorn(logits, n_iters=2, **on).square().sum().backward()
    fastdsm.sinkhorn(logits, temperature=temperature, n_iters=2, **masked, **on).square().sum().backward()
    found = fastdsm.sinkhorn_sigma2(logits, temperature=temperature, n_iters=2, **on)
    (found.plan.square().sum() + found.sigma2.sum()).backward()
    fastdsm.sigma2(found.plan.detach(), **on)
    fastdsm.sigma2_bounds(found.plan.detach(), **on)
    if n <= 64:
        fastdsm.sinkhorn(logits, solver="newton", **on).square().sum().backward()
        fastdsm.temperature_for_sigma2(logits, 0.9, n_iters=2, **on)


def _attend(n: int, d: int, dtype: torch.dtype) -> None:
    on = {"backend": "triton"}
    query, key, value = (torch.randn(2, 2, n, d, dtype=dtype, requires_grad=True) for _ in range(3))
    bias, padding = torch.randn(n, n, dtype=dtype, requires_grad=True), torch.zeros(2, n, dtype=torch.bool)
    fastdsm.sinkhorn_attention(query, key, value, **on).sum().backward()
    fastdsm.sinkhorn_attention(query, key, value, dropout_p=0.1, key_padding_mask=padding, **on).sum().backward()
    fastdsm.sinkhorn_attention(query, key, value, bias, first="row", temperature=torch.ones(2, 2), **on).sum().backward()
    converged = {"tol": 1e-3, "grad": "implicit", "n_iters": 3}
    fastdsm.sinkhorn_attention(query, key, value, padding[0], **converged, **on).sum().backward()
    fastdsm.sinkhorn_attention_sigma2(query, key, **on)[0].sum().backward()


def _layer(n: int, dtype: torch.dtype) -> None:
    """What lies on whole vectors, and by two tokens of few, many streams."""
    on = {"backend": "triton"}
    wide = DOUBLE if dtype == DOUBLE else SINGLE
    rows, channels = n * (n + 2), 16
    X, x = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((3, n, channels), (3, channels)))
    fn, base = (torch.randn(*shape, dtype=wide) for shape in ((rows, n * channels), (rows,)))
    scale, mixes = torch.ones(3, dtype=wide), torch.randn(3, rows, dtype=wide)
    h, (post, comb) = fastdsm.mhc.mhc_pre(X, fn, scale, base, **on)
    for given in (None, mixes):
        mixed, h, _ = fastdsm.mhc.mhc_post_pre(h + x, X, post, comb, fn, scale, base, mixes=given, **on)
    fastdsm.mhc.mhc_post(h, mixed, post, comb, **on).sum().backward()
    fastdsm.mhc.mhc_head(X, fn[:n], scale[:1], base[:n], **on).sum().backward()


def test_every_kernel_is_launched_with_the_types_it_is_compiled_for() -> None:
    launched, found = set(), []

    def record(configuration: Configuration, programs: int, **arguments: Any) -> None:
        launched.add(kernel_name(configuration))
        found.extend(misfits(configuration, arguments))

    with patch.object(Configuration, "launch", record), patch.object(launch_post, "FEW_TOKENS", 0):
        for dtype in (HALF, BRAIN, SINGLE, DOUBLE):
            for n, m in ((4, 4), (6, 6), (7, 9), (100, 100), *([(300, 257)] if dtype != DOUBLE else [])):
                _project(n, m, dtype)
        for dtype in (HALF, BRAIN, SINGLE):
            for n, d in ((33, 16), (300, 100), (520, 200)):
                _attend(n, d, dtype)
        for dtype in (HALF, BRAIN, SINGLE, DOUBLE):
            for n in (2, 4, 9):
                _layer(n, dtype)
    assert found == []
    assert launched == {kernel_name(configuration) for configuration in kernels.configurations()}
