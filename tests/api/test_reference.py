"""The oracle where it alone is at stake: what it must not read, and where a step of its own would be rounding."""

from __future__ import annotations

import pytest
import torch

from fastdsm import reference


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("excluded", ["mask", "-inf", "marginal"])
def test_f0_of_an_excluded_line_is_never_read(first: str, excluded: str) -> None:
    """NaN there is as 0; line 1 of the side that f0 belongs to takes no part."""
    logits, f0 = torch.randn(2, 5, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    line = torch.zeros(2, 5, 5, dtype=torch.bool)
    line[:, 1] = True
    line = line if first == "col" else line.mT
    options: dict[str, object] = {"first": first}
    if excluded == "mask":
        options["mask"] = ~line
    elif excluded == "marginal":
        options["row_marginal" if first == "col" else "col_marginal"] = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0]).double()
    else:
        logits = logits.masked_fill(line, -torch.inf)
    for n_iters in (1, 3):
        (unseen, info), (clean, known) = (
            reference.sinkhorn(logits, f0=f0.index_fill(1, torch.tensor([1]), x), n_iters=n_iters, return_info=True, **options)
            for x in (torch.nan, 0.0)
        )
        assert torch.equal(unseen, clean)
        assert clean.isfinite().all()
        assert torch.equal(torch.cat([info.f, info.g]), torch.cat([known.f, known.g]))


def test_a_step_that_is_rounding_does_not_move_a_converged_plan() -> None:
    """Logit std 30: next to a permutation a Newton step is no better than what it starts from."""
    plan, info = reference.sinkhorn(torch.randn(200, 3, 3) * 30, solver="newton", tol=1e-6, return_info=True)
    assert isinstance(plan, torch.Tensor)
    assert info.converged.double().mean() > 0.5
    assert ((plan.sum(-2) - 1).abs().amax(-1)[info.converged] <= 1e-6).all()


@pytest.mark.parametrize("first", ["col", "row"])
def test_columns_are_scaled_to_the_rows_total(first: str) -> None:
    logits, row, col = torch.randn(2, 3, 4).double(), torch.rand(2, 3).double() + 0.1, torch.rand(2, 4).double() + 0.1
    plan = reference.sinkhorn(logits, row_marginal=row, col_marginal=col, first=first, n_iters=300)
    assert isinstance(plan, torch.Tensor)
    assert (plan.sum(-1) - row).abs().max() < 1e-12
    assert (plan.sum(-2) - col * (row.sum(-1) / col.sum(-1)).unsqueeze(-1)).abs().max() < 1e-12
