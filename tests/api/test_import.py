"""``import fastdsm`` brings in nothing heavy: what only some calls need comes with the first of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import import_time

from ..uninterpreted import ROOT

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "triton", "sympy", "matplotlib", "transformers",
         "timm", "rich", "typer", "fastdsm.kernels")  # fmt: skip


def _brought_in(statement: str) -> list[str]:
    """Modules that ``statement`` imports in a fresh process, beyond torch's own."""
    code = (
        f"import json, sys, torch\nbefore = set(sys.modules)\n{statement}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def _heavy(modules: list[str]) -> list[str]:
    return [name for name in modules if any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY)]


def test_nothing_heavy() -> None:
    modules = _brought_in("import fastdsm")
    assert "fastdsm.diagnostics.monitor" in modules
    assert _heavy(modules) == []


def test_what_is_heavy_is_noticed() -> None:
    modules = _brought_in("import fastdsm, torch._dynamo")
    assert "torch._dynamo" in _heavy(modules)


def test_time_beyond_torch_is_a_median_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    seconds = {"torch": iter([9.0, 1.0, 1.5, 1.0]), "torch, fastdsm": iter([9.0, 1.25, 2.0, 1.125])}

    def seconds_of(modules: str) -> float:
        timed.append(modules)
        return next(seconds[modules])

    monkeypatch.setattr(import_time, "_seconds", seconds_of)
    row = import_time.measured(pairs=3)
    assert timed[:4] in (
        ["torch", "torch, fastdsm", "torch, fastdsm", "torch"],
        ["torch, fastdsm", "torch", "torch", "torch, fastdsm"],
    )
    assert (row.rounds, row.seconds_median, row.torch_seconds_median) == (3, 1.25, 1.0)
    assert (row.beyond_seconds_median, row.beyond_seconds_min) == (0.25, 0.125)
