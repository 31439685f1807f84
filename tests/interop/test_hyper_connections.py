"""hyper-connections: its mHC modules with the constraint replaced; the projections are compared in tests/compat."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fastdsm import compat

from .parity import assert_same, leaves_of, randomised

pytest.importorskip("hyper_connections", reason="the extra parity")
from hyper_connections import manifold_constrained_hyper_connections as first_version
from hyper_connections import mHCv2 as second_version  # noqa: N813

VERSIONS = pytest.mark.parametrize("version", [first_version, second_version], ids=["mHC", "mHCv2"])


@VERSIONS
@pytest.mark.parametrize("options", [{}, {"log_domain_sinkhorn": True}, {"num_dynamic_alpha_proposals": 2}, {"num_fracs": 2}])
def test_module(version: Any, options: dict[str, Any]) -> None:
    streams, dim = 4, 16
    make = partial(version.mHC, streams, dim=dim, layer_index=0, **options)
    origin = randomised(make(branch=nn.Linear(dim, dim)))
    swapped = make(branch=nn.Linear(dim, dim), residual_mix_constraint_fn=compat.hyper_connections.sinkhorn_knopps)  # the swap
    swapped.load_state_dict(origin.state_dict())
    expand, reduce = version.mHC.get_expand_reduce_stream_functions(streams)
    (x,) = leaves_of((2, 7, dim), dtype=torch.float32)
    found, theirs = (reduce(module(expand(x))) for module in (swapped, origin))
    assert_same(found, theirs, *([x, *module.parameters()] for module in (swapped, origin)))


def test_a_module_that_exists() -> None:
    """The constructor's ``sinkhorn_iters`` are bound to the origin's function, not to what stands in its place."""
    origin = randomised(first_version.mHC(4, dim=16, branch=nn.Linear(16, 16), sinkhorn_iters=5, layer_index=1))
    swapped = copy.deepcopy(origin)
    swapped.residual_mix_constraint_fn = partial(compat.hyper_connections.sinkhorn_knopps, iters=5)  # the swap
    (x,) = leaves_of((8, 3, 16), dtype=torch.float32)
    assert_same(swapped(x), origin(x), *([x, *module.parameters()] for module in (swapped, origin)))
