"""pygmtools.sinkhorn, whose max_iter counts half steps, rows first where there are as many columns, else columns first.

Its lines all have a mass of 1, so that the side which was normalised last is the one to give as a marginal: columns after an
even number, ``col_marginal=1.0``; rows after an odd one, which is the default.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm

from .parity import DTYPES, assert_close, assert_same, leaves_of, value_tolerance

pygmtools = pytest.importorskip("pygmtools", reason="the extra parity")

STEPS = pytest.mark.parametrize("steps", [1, 2, 9, 10])


def origin_of(s: Tensor, **options: Any) -> Tensor:
    found: Tensor = pygmtools.sinkhorn(s, backend="pytorch", **options)
    return found


def exact(steps: int) -> dict[str, float]:
    """The masses that the side normalised last ends with."""
    return {"col_marginal": 1.0} if steps % 2 == 0 else {"row_marginal": 1.0}


def lines_of(n1: Tensor, n2: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, n, m), True within the first n1 rows and n2 columns."""
    rows, columns = (torch.arange(size) < count.unsqueeze(-1) for size, count in zip(shape, (n1, n2), strict=True))
    return rows.unsqueeze(-1) & columns.unsqueeze(-2)


@DTYPES
@STEPS
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_square(tau: float, steps: int, dtype: torch.dtype) -> None:
    (s,) = leaves_of((4, 6, 6), dtype=dtype)
    found = fastdsm.sinkhorn(s, temperature=tau, half_steps=steps, first="row")
    assert_same(found, origin_of(s, max_iter=steps, tau=tau), [s], gradient=2e-5 if dtype == torch.float32 else None)


@DTYPES
@STEPS
def test_rectangular(steps: int, dtype: torch.dtype) -> None:
    (s,) = leaves_of((4, 5, 8), dtype=dtype)
    found = fastdsm.sinkhorn(s, half_steps=steps, first="row", **exact(steps))
    assert_same(found, origin_of(s, max_iter=steps), [s])


@DTYPES
@STEPS
def test_rectangular_with_more_rows(steps: int, dtype: torch.dtype) -> None:
    """The origin transposes, and so does the swap."""
    (s,) = leaves_of((4, 8, 5), dtype=dtype)
    found = fastdsm.sinkhorn(s.mT, half_steps=steps, first="row", **exact(steps)).mT
    assert_same(found, origin_of(s, max_iter=steps), [s])


@DTYPES
@STEPS
def test_counts_of_lines(steps: int, dtype: torch.dtype) -> None:
    """n1 and n2 are a mask. The origin's ``batched_operation=True`` has the same values and NaN as gradient."""
    (s,) = leaves_of((4, 6, 8), dtype=dtype)
    n1, n2 = torch.tensor([6, 3, 1, 5]), torch.tensor([8, 4, 3, 5])
    mask = lines_of(n1, n2, (6, 8))
    found = fastdsm.sinkhorn(s, half_steps=steps, first="row", mask=mask, **exact(steps))
    assert_same(found, origin_of(s, n1=n1.clone(), n2=n2.clone(), max_iter=steps), [s])
    batched = origin_of(s.detach().clone(), n1=n1.clone(), n2=n2.clone(), max_iter=steps, batched_operation=True)
    assert_close(found.detach(), batched, value_tolerance(dtype))


@DTYPES
@STEPS
def test_more_rows_in_some(steps: int, dtype: torch.dtype) -> None:
    """The shorter side of each pair is the origin's rows, and so two calls, one for each order of sides."""
    (s,) = leaves_of((4, 6, 8), dtype=dtype)
    n1, n2 = torch.tensor([6, 6, 5, 3]), torch.tensor([8, 4, 2, 3])
    mask = lines_of(n1, n2, (6, 8))
    rows_first = fastdsm.sinkhorn(s, half_steps=steps, first="row", mask=mask, **exact(steps))
    columns_first = fastdsm.sinkhorn(s, half_steps=steps, first="col", mask=mask, **exact(steps + 1))
    found = torch.where((n1 > n2)[:, None, None], columns_first, rows_first)
    assert_same(found, origin_of(s, n1=n1.clone(), n2=n2.clone(), max_iter=steps), [s])


@DTYPES
@STEPS
def test_dummy_rows(steps: int, dtype: torch.dtype) -> None:
    """Rows of logits -100, after the temperature, up to as many as there are columns, which are cut off again.

    Potentials of 100 are rounded by 4e-6 in float32, in the origin as well.
    """
    (s,) = leaves_of((4, 5, 8), dtype=dtype)
    value = 4e-6 if dtype == torch.float32 else None
    padded = torch.nn.functional.pad(s / 0.5, (0, 0, 0, 3), value=-100.0)
    found = fastdsm.sinkhorn(padded, half_steps=steps, first="row")[:, :5]
    assert_same(found, origin_of(s, max_iter=steps, tau=0.5, dummy_row=True), [s], value=value)


@DTYPES
@STEPS
def test_dummy_rows_with_counts(steps: int, dtype: torch.dtype) -> None:
    (s,) = leaves_of((3, 5, 8), dtype=dtype)
    n1, n2 = torch.tensor([5, 3, 2]), torch.tensor([8, 6, 4])
    inside = lines_of(n1, n2, (8, 8))
    value = 4e-6 if dtype == torch.float32 else None
    padded = torch.nn.functional.pad(s, (0, 0, 0, 3)).where(inside, -100.0)
    plan = fastdsm.sinkhorn(padded, half_steps=steps, first="row", mask=lines_of(n2, n2, (8, 8)))
    found = plan.where(inside, 0.0)[:, :5]
    assert_same(found, origin_of(s, n1=n1.clone(), n2=n2.clone(), max_iter=steps, dummy_row=True), [s], value=value)


def test_unmatched() -> None:
    """Scores of lines that stay unmatched: a line more on each side, which the origin never normalises.

    Sweeps that leave a line out are no sweeps of ours. Where they converge the plan is ours with the masses that those lines
    came to hold.
    """
    s, u, v = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 6), (3, 5), (3, 6)))
    origin = origin_of(s, unmatch1=u, unmatch2=v, max_iter=2000)
    scores = torch.cat([torch.cat([s, u[..., None]], -1), torch.nn.functional.pad(v, (0, 1), value=-torch.inf)[:, None]], -2)
    matched = origin.sum((-2, -1)).unsqueeze(-1)
    rows, columns = (torch.cat([torch.ones(3, n), total - matched], -1) for n, total in ((5, 6), (6, 5)))
    found = fastdsm.sinkhorn(scores, row_marginal=rows, col_marginal=columns, solver="newton")
    assert_close(found[:, :-1, :-1], origin, 1e-9)
