"""The oracle where it alone is at stake: what it must not read."""

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
