"""fastdsm.compat itself: every module says how each of its calls counts, and is imported when it is asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

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
