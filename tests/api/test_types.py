"""What a type checker sees of the public calls: `make lint` checks this file too, in which nothing has to be told apart."""

from __future__ import annotations

import torch
from torch import Tensor

import fastdsm


def test_results_have_the_types_that_options_give_them() -> None:
    logits, query = torch.randn(8, 4, 4), torch.randn(2, 4, 16, 8)
    plan: Tensor = fastdsm.sinkhorn(logits, n_iters=3)
    plan, info = fastdsm.sinkhorn(logits, return_info=True)
    assert info.residual.shape == (8,)
    value: Tensor = fastdsm.sigma2(plan)
    value, u, v = fastdsm.sigma2(plan, return_vectors=True)
    assert value.shape == (8,)
    assert u.shape == v.shape == (8, 4)
    out: Tensor = fastdsm.sinkhorn_attention(query, query, query)
    out, certificate = fastdsm.sinkhorn_attention(query, query, query, return_info=True)
    assert out.shape == query.shape
    assert certificate.sweeps.shape == (2, 4)
    lower: Tensor = fastdsm.sinkhorn_attention_sigma2(query, query)
    _, lower, upper = fastdsm.sinkhorn_attention_sigma2(query, query, return_bounds=True)
    assert (lower <= upper).all()


def test_of_an_option_that_is_not_known_either_may_come() -> None:
    for wanted in (False, True):
        found = fastdsm.sinkhorn(torch.randn(2, 2), return_info=wanted)
        plan = found if isinstance(found, Tensor) else found[0]
        assert plan.shape == (2, 2)
