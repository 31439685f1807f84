"""compat.pygmtools, against the package in every combination of its options that is served."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdsm.compat import pygmtools as compat

from ..interop.parity import DTYPES, assert_close, assert_same, leaves_of
from .oracles import log_projection

pygmtools = pytest.importorskip("pygmtools", reason="the extra parity")

STEPS = pytest.mark.parametrize("steps", [1, 2, 9, 10])
SHAPES = [(4, 6, 6), (4, 5, 8), (4, 8, 5), (1, 3, 5)]


def counts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """n1 and n2 of a batch, the longer side here the one, there the other."""
    rows, columns = (torch.tensor([size, max(size - 2, 1), 1, min(4, size)][: shape[0]]) for size in shape[1:])
    return {"n1": rows, "n2": columns.roll(1)}


@DTYPES
@STEPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dummy_row", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_the_package(
    tau: float,
    dummy_row: bool,
    counted: bool,
    shape: tuple[int, ...],
    steps: int,
    dtype: torch.dtype,
) -> None:
    """In float32 potentials of dummy rows, of 100, are rounded by 8e-6, in the package as well."""
    (s,) = leaves_of(shape, dtype=dtype)
    options = {"max_iter": steps, "tau": tau, "dummy_row": dummy_row}
    given = counts(shape) if counted else {}
    origin = pygmtools.sinkhorn(s, **{name: x.clone() for name, x in given.items()}, **options, backend="pytorch")
    single = dtype == torch.float32
    value, gradient = (1e-5 if dummy_row else None, 2e-5) if single else (None, None)
    assert_same(compat.sinkhorn(s, **given, **options), origin, [s], value=value, gradient=gradient)


@DTYPES
def test_batched_operation(dtype: torch.dtype) -> None:
    """The origin's gradient is NaN with it, ours is what it is without."""
    (s,) = leaves_of((4, 6, 8), dtype=dtype)
    given = counts((4, 6, 8))
    found = compat.sinkhorn(s, **given, batched_operation=True)
    origin = pygmtools.sinkhorn(s, given["n1"].clone(), given["n2"].clone(), backend="pytorch")
    assert_same(found, origin, [s])


def test_one_matrix_and_numpy() -> None:
    s = np.random.default_rng(0).random((5, 7))
    found = compat.sinkhorn(s, 4, 6, dummy_row=True, max_iter=11, tau=0.5)
    assert isinstance(found, np.ndarray)
    assert found.dtype == s.dtype
    origin = pygmtools.sinkhorn(s, 4, 6, dummy_row=True, max_iter=11, tau=0.5, backend="numpy")
    assert np.abs(found - origin).max() < 1e-12
    single = compat.sinkhorn(s.astype(np.float32)[None], backend="numpy")
    assert single.dtype == np.float32
    assert np.abs(single - compat.sinkhorn(s)[None]).max() < 1e-6
    assert compat.sinkhorn(torch.from_numpy(s), backend="pytorch").shape == (5, 7)


def test_large_scores_strides_and_nothing() -> None:
    s = torch.randn(7, 3, 14).permute(1, 0, 2)[..., ::2] * 40
    assert_close(compat.sinkhorn(s), log_projection(s, 10, "row").exp(), 1e-6)
    assert compat.sinkhorn(s[:0]).shape == (0, 7, 7)
    assert not compat.sinkhorn(s, n1=torch.tensor([0, 0, 7]))[:2].any()


def test_signature() -> None:
    ours, theirs = (inspect.signature(module.sinkhorn).parameters for module in (compat, pygmtools))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_bad_input() -> None:
    s = torch.randn(2, 4, 5)
    with pytest.raises(NotImplementedError, match="unmatch1 and unmatch2 are not served"):
        compat.sinkhorn(s, unmatch1=torch.zeros(2, 4), unmatch2=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="n1 must lie in 0 to 4"):
        compat.sinkhorn(s, n1=torch.tensor([5, 1]))
    with pytest.raises(ValueError, match="n2 must be 2 integers"):
        compat.sinkhorn(s, n2=torch.tensor([5]))
    with pytest.raises(ValueError, match="max_iter must be >= 1"):
        compat.sinkhorn(s, max_iter=0)
    with pytest.raises(ValueError, match="backend must be one of 'pytorch', got 'numpy'"):
        compat.sinkhorn(s, backend="numpy")
    with pytest.raises(ValueError, match="flatten the batch"):
        compat.sinkhorn(torch.randn(1, 2, 3, 4))
