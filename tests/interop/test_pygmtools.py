"""pygmtools: ``compat.pygmtools`` in the place of what its graph matching calls; tests/compat compares the call by itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import compat

from .parity import assert_close

pygmtools = pytest.importorskip("pygmtools", reason="the extra parity")


def test_graph_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reweighted random walks, which project at every step."""
    from pygmtools import pytorch_backend

    K = torch.rand(2, 12, 12, dtype=torch.float64)
    match = functools.partial(
        pygmtools.rrwm, K + K.mT, torch.tensor([3, 3]), torch.tensor([4, 4]), max_iter=5, backend="pytorch"
    )
    origin = match()
    calls: list[Any] = []

    def swapped(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        found: Tensor = compat.pygmtools.sinkhorn(*args, **options)
        return found

    monkeypatch.setattr(pytorch_backend, "sinkhorn", swapped)  # the swap
    assert_close(match(), origin, 1e-12)
    assert calls


def test_unmatched() -> None:
    """Scores of lines that stay unmatched: a line more on each side, which the origin never normalises.

    Sweeps that leave a line out are no sweeps of ours. Where they converge the plan is ours with the masses that those lines
    came to hold.
    """
    s, u, v = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 6), (3, 5), (3, 6)))
    origin = pygmtools.sinkhorn(s, unmatch1=u, unmatch2=v, max_iter=2000, backend="pytorch")
    scores = torch.cat([torch.cat([s, u[..., None]], -1), torch.nn.functional.pad(v, (0, 1), value=-torch.inf)[:, None]], -2)
    matched = origin.sum((-2, -1)).unsqueeze(-1)
    rows, columns = (torch.cat([torch.ones(3, n), total - matched], -1) for n, total in ((5, 6), (6, 5)))
    found = fastdsm.sinkhorn(scores, row_marginal=rows, col_marginal=columns, solver="newton")
    assert_close(found[:, :-1, :-1], origin, 1e-9)
