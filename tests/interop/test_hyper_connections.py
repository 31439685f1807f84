"""hyper-connections: its projections, and its mHC modules with the constraint replaced.

Its loops normalise columns first and compute in float32 whatever comes, so that in float64 the definition is what is compared.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastdsm

from ..half_steps import half_steps, log_plan
from .parity import DTYPES, assert_close, assert_same, leaves_of, randomised

pytest.importorskip("hyper_connections", reason="the extra parity")
from hyper_connections import manifold_constrained_hyper_connections as first_version
from hyper_connections import mHCv2 as second_version  # noqa: N813

VERSIONS = pytest.mark.parametrize("version", [first_version, second_version], ids=["mHC", "mHCv2"])


@DTYPES
@VERSIONS
@pytest.mark.parametrize("name", ["sinkhorn_knopps", "log_domain_sinkhorn_knopps"])
@pytest.mark.parametrize("iters", [1, 3, 20])
def test_projection(version: Any, name: str, iters: int, dtype: torch.dtype) -> None:
    (logits,) = leaves_of((32, 4, 4), dtype=dtype, scale=2.0)
    origin = getattr(version, name)(logits, iters=iters)
    found = fastdsm.sinkhorn(logits, n_iters=iters)
    assert found.dtype == origin.dtype
    assert_same(found, origin, [logits], value=1e-6, gradient=1e-5)


def test_float64_stays_float64() -> None:
    """The origin rounds float64 logits to float32; the definition is what ours agrees with."""
    logits = torch.randn(32, 4, 4, dtype=torch.float64) * 2
    truth = log_plan(logits, *half_steps(logits, 40, "col")).exp()
    assert (first_version.log_domain_sinkhorn_knopps(logits) - truth).abs().max() > 1e-9
    assert_close(fastdsm.sinkhorn(logits), truth, 1e-12)


def test_large_logits() -> None:
    """At a standard deviation of 20 the origin's loop without logarithms underflows; the one with them does not."""
    (logits,) = leaves_of((256, 4, 4), dtype=torch.float32, scale=20.0)
    truth = log_plan(logits, *half_steps(logits, 40, "col")).exp().detach()
    assert (first_version.sinkhorn_knopps(logits) - truth).abs().max() > 1e-3
    assert_close(first_version.log_domain_sinkhorn_knopps(logits).detach(), truth, 1e-5)
    assert_close(fastdsm.sinkhorn(logits).detach(), truth, 2e-6)


@VERSIONS
@pytest.mark.parametrize("options", [{}, {"log_domain_sinkhorn": True}, {"num_dynamic_alpha_proposals": 2}, {"num_fracs": 2}])
def test_module(version: Any, options: dict[str, Any]) -> None:
    streams, dim = 4, 16
    make = partial(version.mHC, streams, dim=dim, layer_index=0, **options)
    origin = randomised(make(branch=nn.Linear(dim, dim)))
    swapped = make(branch=nn.Linear(dim, dim), residual_mix_constraint_fn=fastdsm.sinkhorn)  # the swap
    swapped.load_state_dict(origin.state_dict())
    expand, reduce = version.mHC.get_expand_reduce_stream_functions(streams)
    (x,) = leaves_of((2, 7, dim), dtype=torch.float32)
    found, theirs = (reduce(module(expand(x))) for module in (swapped, origin))
    assert_same(found, theirs, *([x, *module.parameters()] for module in (swapped, origin)))


def test_a_module_that_exists() -> None:
    """The constructor's ``sinkhorn_iters`` are bound to the origin's function, not to what stands in its place."""
    origin = randomised(first_version.mHC(4, dim=16, branch=nn.Linear(16, 16), sinkhorn_iters=5, layer_index=1))
    swapped = copy.deepcopy(origin)
    swapped.residual_mix_constraint_fn = partial(fastdsm.sinkhorn, n_iters=5)  # the swap
    (x,) = leaves_of((8, 3, 16), dtype=torch.float32)
    assert_same(swapped(x), origin(x), *([x, *module.parameters()] for module in (swapped, origin)))
