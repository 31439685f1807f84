"""fastdsm.compat itself: every module says how each of its calls counts, and is imported when it is asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from fastdsm import compat

from ..uninterpreted import ROOT


def _resolved(name: str) -> object:
    found: object = compat
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_every_row_is_a_call() -> None:
    rows = compat.conventions()
    assert len({row.call for row in rows}) == len(rows) > 20
    for row in rows:
        assert callable(_resolved(row.call))
        assert all(row), row


@pytest.mark.parametrize("origin", compat.ORIGINS)
def test_every_origin_has_rows(origin: str) -> None:
    assert importlib.import_module(f"fastdsm.compat.{origin}").CONVENTIONS
    assert any(row.call.startswith(f"{origin}.") for row in compat.conventions())


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    compat.table()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "call"
    assert len(lines) == len(compat.conventions())
    starts = [header.index(name) for name in compat.Convention._fields]
    for line, row in zip(lines, compat.conventions(), strict=True):
        assert [line[start:].split("  ")[0] for start in starts] == list(row)


def test_modules_come_with_the_first_call() -> None:
    code = (
        "import sys, fastdsm; loaded = [n for n in sys.modules if n.startswith('fastdsm.compat.')]; "
        "assert loaded == ['fastdsm.compat._shared'], loaded; "
        "fastdsm.compat.swav; assert 'fastdsm.compat.swav' in sys.modules; "
        "assert 'scipy' not in sys.modules and 'ot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_an_unknown_origin() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'tensorflow'; origins are hyper_connections"):
        compat.tensorflow  # noqa: B018


SQUARE, BATCH = torch.ones(3, 3), torch.ones(2, 3, 3)
SCALED: dict[str, Callable[[float], object]] = {
    "eps": lambda x: compat.sinkformers.SinkhornDistance(x, 3),
    "reg": lambda x: compat.pot.sinkhorn(torch.ones(3) / 3, torch.ones(3) / 3, SQUARE, x),
    "reg of a batch": lambda x: compat.pot.batch.solve_batch(BATCH, x),
    "reg of a solution": lambda x: compat.geomloss.solve(SQUARE, reg=x),
    "tau": lambda x: compat.gumbel.gumbel_sinkhorn(SQUARE, tau=x),
    "tau of pairs": lambda x: compat.pygmtools.sinkhorn(SQUARE, tau=x),
    "epsilon": lambda x: compat.swav.sinkhorn(SQUARE, epsilon=x),
    "teacher_temp": lambda x: compat.dinov2.sinkhorn_knopp_teacher(SQUARE, x),
}


@pytest.mark.parametrize("case", SCALED)
def test_errors_have_the_origins_names(case: str) -> None:
    name = case.split()[0]
    with pytest.raises(ValueError, match=f"^{name} must be > 0 and finite, got -1.0"):
        SCALED[case](-1.0)
    with pytest.raises(TypeError, match=f"^{name} must be a float or a tensor, got str"):
        SCALED[case]("1")  # type: ignore[arg-type]
