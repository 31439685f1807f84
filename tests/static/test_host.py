"""The benchmark of the host's time: what stubs leave behind, what they let through, promises and the report. No times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastdsm
from benchmarks.host import command, targets
from benchmarks.host.calls import calls
from benchmarks.host.rows import COMPILED, EMPTY, OWN, REAL, STUBBED, HostRow, read, record
from benchmarks.host.section import section
from benchmarks.host.stubs import stubbed
from benchmarks.host.timing import check_answer, check_launches, measured
from benchmarks.rows import BACKWARD, FORWARD, Run
from fastdsm import kernels, projection
from fastdsm._ops import arguments, runs
from fastdsm.kernels.common.configuration import Configuration

from ..uninterpreted import rows_of

RUN = Run("cpu", "A Processor", 1, {"python": "3.11.7", "torch": "2.13.0"}, "abc1234", "2026-01-02T03:04:05+00:00")


def row(call: str, shape: tuple[int, ...], direction: str, found: float, launches: str = STUBBED) -> HostRow:
    """``found``: the ratio, or in a graph the microseconds."""
    seconds, ratio = (1e-6 * found, None) if direction == COMPILED else (5e-6 * found, found)
    return HostRow(call, shape, direction, launches, 1, seconds, seconds, 9, ratio, None, RUN)


def records() -> list[HostRow]:
    """Every promise kept by a tenth."""
    empty = [row(EMPTY, targets.FOUR, direction, 1.0, OWN) for direction in (FORWARD, BACKWARD)]
    return [*empty, *(row(*key, 0.9 * most) for key, most in targets.MOST.items())]


def left_by_stubs() -> dict[str, Any]:
    """In a process without the interpreter: what differs after the context, and after one that an error ends."""
    x = torch.randn(3, 4, 4)
    plan = fastdsm.sinkhorn(x)
    before = Configuration.compile, arguments.resolve_backend, dict(projection._calls.kept), dict(runs._runs)
    (configuration, *_) = kernels.configurations()
    configuration.compiled[0] = "a kernel"
    names: list[str] = []
    with stubbed(names):
        inside = fastdsm.sinkhorn(x), fastdsm.sinkhorn(x), fastdsm.sinkhorn(x.requires_grad_())
        empty_inside = not configuration.compiled.get(0)
    try:
        with stubbed():
            fastdsm.sinkhorn(x)
            raise KeyError("of the block")
    except KeyError:
        pass
    after = Configuration.compile, arguments.resolve_backend, dict(projection._calls.kept), dict(runs._runs)
    found = [compiled for x in kernels.configurations() for compiled in x.compiled.values()]
    return {
        "same": before == after,
        "compiled": found,
        "names": names,
        "inside": len(inside),
        "empty_inside": empty_inside,
        "right": torch.equal(plan, fastdsm.sinkhorn(x.detach())),
    }


def checked_calls() -> list[str]:
    """In a process without the interpreter: each call is right, and its launches, stubbed, are those it says."""
    torch.set_num_threads(1)
    found = calls("cpu")
    for call in found:
        check_answer(call)
        names: list[str] = []
        with stubbed(names):
            check_launches(call, names)
    return [call.text for call in found]


def faults_found() -> list[str]:
    """In a process without the interpreter: what the checks say of a wrong answer, and of other launches."""
    call, newton, *_ = calls("cpu")
    messages = []
    names: list[str] = []
    try:
        check_answer(replace(call, truth=newton.truth))
    except AssertionError as error:
        messages.append(str(error))
    try:
        with stubbed(names):
            check_launches(replace(call, kernels=newton.kernels), names)
    except AssertionError as error:
        messages.append(str(error))
    return messages


def one_call() -> list[list[Any]]:
    """In a process without the interpreter: the rows of one call, from end to end."""
    torch.set_num_threads(1)
    return [
        [x.call, x.direction, x.launches, x.kernels, x.seconds_min, x.left_out] for x in measured("cpu", 2, "sigma2_bounds")
    ]


def test_stubs_restore_everything() -> None:
    found = rows_of("tests.static.test_host", "left_by_stubs")
    assert found == {
        "same": True,
        "compiled": ["a kernel"],
        "names": ["_sinkhorn_fwd_kernel"] * 3,
        "inside": 3,
        "empty_inside": True,
        "right": True,
    }


def test_stubs_are_refused_where_kernels_are_interpreted() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 replaces the launches"), stubbed():
        pass


def test_every_call_is_right_and_launches_what_it_says() -> None:
    found = rows_of("tests.static.test_host", "checked_calls")
    assert {text for text, _, _ in targets.MOST} <= set(found)
    public = {name for name in fastdsm.__all__ if name.startswith(("sinkhorn", "sigma2", "round", "temperature"))}
    assert public == {text.partition("(")[0] for text in found}


def test_a_wrong_answer_and_other_launches_end_the_run() -> None:
    wrong, other = rows_of("tests.static.test_host", "faults_found")
    assert wrong.startswith("sinkhorn(x): the output misses the truth by ")
    assert other == "sinkhorn(x), forward: launched {'_sinkhorn_fwd_kernel': 1}, not {'_newton_fwd_kernel': 1}"


def test_measured_rows() -> None:
    found = rows_of("tests.static.test_host", "one_call")
    ours = [x[1:] for x in found if x[0] == "sigma2_bounds(p)"]
    assert [x[0] for x in ours] == [FORWARD, COMPILED, BACKWARD]
    assert ours[0][1:3] == [STUBBED, 1]
    assert ours[0][3] > 0
    assert ours[2][3:] == [None, "is not differentiable"]
    assert [x[2] for x in found if x[0] == EMPTY] == [OWN, OWN]


def test_promises_kept() -> None:
    found = targets.verdicts(records())
    assert len(found) == len(targets.MOST)
    assert all(x.ok for x in found)


@pytest.mark.parametrize("key", targets.MOST, ids=str)
def test_a_missed_promise_is_found(key: targets.Key) -> None:
    rows = [row(*key, 1.01 * targets.MOST[key]) if targets.key_of(x) == key else x for x in records()]
    missed = [x for x in targets.verdicts(rows) if not x.ok]
    assert [(x.shape, x.direction, x.required) for x in missed] == [(*key[1:], targets.MOST[key])]


def test_what_was_not_measured_fails_and_real_launches_are_not_held_to_it() -> None:
    assert not any(x.ok for x in targets.verdicts([]))
    assert all(x.measured is None for x in targets.verdicts([replace(x, launches=REAL) for x in records()]))


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (9.0, 1)])
def test_the_command_tells_a_missed_promise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float, code: int) -> None:
    rows = records()
    rows[2] = replace(rows[2], ratio=factor * rows[2].ratio)
    kept: list[HostRow] = []
    monkeypatch.setattr(command, "measured", lambda *_: iter(rows))
    monkeypatch.setattr(command, "record", kept.extend)
    app = command.typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, [])
    output = " ".join(result.output.split())
    assert result.exit_code == code
    assert kept == rows
    assert ("missed: forward, sinkhorn(x): empty Functions, at most 1.5, measured 12.15" in output) == bool(code)
    assert f"{len(targets.MOST) - code} of {len(targets.MOST)} promises kept" in output


def test_rows_survive_the_file_and_replace_those_of_their_device(tmp_path: Path) -> None:
    path = tmp_path / "host.jsonl"
    there = [replace(x, run=replace(RUN, device="cuda")) for x in records()]
    for rows in (there, records()[:3], records()):
        record(rows, path)
    assert read(path) == [*records(), *there]
    path.write_text('{"call": "sinkhorn(x)"}\n')
    with pytest.raises(ValueError, match="a row has the fields"):
        read(path)


def test_report_takes_every_number_from_the_rows() -> None:
    rows = records()
    rows[3] = replace(rows[3], ratio=2.5)
    rows.append(HostRow("sigma2_bounds(p)", targets.EIGHT, BACKWARD, STUBBED, None, None, None, 0, None, "why", RUN))
    text = section(rows)
    assert (
        "| `sinkhorn(x)` | 64 × 4 × 4 | 6.75 µs, 1.35 × (≤ 1.5 ×) | 9 µs, 2.50 × (missed: ≤ 2 ×) | 13.5 µs (≤ 15 µs) |" in text
    )
    assert "| an empty autograd.Function | 64 × 4 × 4 | 5 µs, 1.00 × | 5 µs, 1.00 × |  |" in text
    assert "| `sigma2_bounds(p)` | 64 × 8 × 8 | 22.5 µs, 4.50 × (≤ 5 ×) |  |  |" in text
    assert "| 2,000 µs, 400.00 × |" in section([*rows, row("sigma2(p)", targets.EIGHT, BACKWARD, 400.0)])
    assert "A Processor; 2026-01-02, commit abc1234; python 3.11.7, torch 2.13.0." in text
