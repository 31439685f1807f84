"""The record of executions: it says what the table says, a failing row is none, a run goes on where the last one stopped."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from benchmarks.execution import record, table
from benchmarks.execution.recording import concerns
from benchmarks.static.compilation import describe, kernel_name, source
from benchmarks.static.report import identify
from fastdsm import kernels
from fastdsm._verify.sinkhorn import Case, Record
from fastdsm.kernels.common.configuration import TARGETS

from ..uninterpreted import rows_of

PLAIN = "sinkhorn forward registers fp32 packed"
CLEAN = {"launches": 1, "calls": 1, "worst": 0.5, "at": "plan", "noise": None, "issues": {}, "harmful": []}


def row(label: str = PLAIN, target: str = "sm_90", **found: Any) -> dict[str, Any]:
    """Of the configuration of that label."""
    (configuration,) = (x for x in kernels.configurations() if x.label == label)
    named = {"kernel": kernel_name(configuration), **describe(configuration), "target": target}
    return {**named, "source": source(configuration), **CLEAN, **found}


def _counted() -> list[Any]:
    """What the committed record's rows come to, and how many there are to be. Not interpreted, which source knows of."""
    return [record.counts(record.read(record.RESULTS)), {target: len(table.wanted(target)) for target in TARGETS}]


def test_the_committed_record_says_how_much_of_the_table_was_executed() -> None:
    """Every configuration has a row of its source as it is, a reason, or is counted by kernel among those left."""
    header = json.loads(record.RESULTS.read_text().splitlines()[0])
    counts, wanted = rows_of(__name__, "_counted")
    assert {name: header.get(name) for name in TARGETS} == counts, "python -m benchmarks.execution"
    assert sum(x["executed"] for x in counts.values()) == len(record.read(record.RESULTS)) > 0
    for target, found in counts.items():
        assert found["executed"] + sum((found["unexecuted"] | found["left"]).values()) == wanted[target]


def test_nothing_in_the_committed_record_fails() -> None:
    assert [fault for found in record.read(record.RESULTS).values() for fault in record.faults(found)] == []


def test_register_kernels_were_executed_with_approximations_off_by_their_errors() -> None:
    """At least once each; what only masks and float64 reach is executed by the calls of 4x4, too."""
    rows = [x for x in record.read(record.RESULTS).values() if "registers" in x["label"]]
    assert [x["label"] for x in rows if x["noise"] is None] == []


@pytest.mark.parametrize("unexecuted", table.UNEXECUTED, ids=lambda x: f"{x.kernel} {x.reason}")
def test_what_is_not_executed_is_in_the_table(unexecuted: table.Unexecuted) -> None:
    assert any(unexecuted.holds(x, target) for target in unexecuted.targets for x in table.wanted(target))


def test_every_family_is_wanted_on_hopper_and_two_elsewhere() -> None:
    assert len(table.wanted("sm_90")) == len([x for x in kernels.configurations() if "sm_90" in x.targets])
    for target in ("sm_80", "sm_100"):
        assert {table.family(x) for x in table.wanted(target)} == set(table.ELSEWHERE)


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({}, ""),
        ({"worst": 1.01}, "error 1.01 times its budget"),
        ({"worst": float("nan")}, "error nan times its budget"),
        ({"noise": {"worst": 2.0, "at": "plan"}}, "error with noise 2.0 times its budget"),
        ({"at": ""}, "no result of it was judged"),
        ({"harmful": ["race in shared memory"]}, "race in shared memory"),
    ],
)
def test_a_row_that_fails_is_not_kept(found: dict[str, Any], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "execution.jsonl"
    faults = record.faults(row(**found))
    assert [fault in x for x in faults] == [True] * bool(fault)
    record.write(path, [row(**found), row(target="sm_80")])
    assert len(record.read(path)) == 2 - bool(fault)
    header = json.loads(path.read_text().splitlines()[0])
    assert header["sm_90"]["executed"] == 1 - bool(fault)
    assert header["sm_80"]["executed"] == 1


@pytest.mark.parametrize(
    ("kernel", "concerned"),
    [
        ("_sinkhorn_fwd_kernel", {"plan", "sigma2 of the call", "gradient of logits", "raised"}),
        ("_sinkhorn_bwd_kernel", {"gradient of logits", "raised"}),
        ("_sigma2_fwd_kernel", {"sigma2 of a plan", "raised"}),
        ("_sigma2_bounds_fwd_kernel", {"gap of the bounds", "raised"}),
        ("_attention_sweep_fwd_kernel", {"plan", "sigma2 of the call", "gradient of logits", "raised"}),
    ],
)
def test_an_error_is_put_to_the_kernels_it_may_come_from(kernel: str, concerned: set[str]) -> None:
    groups = {
        "plan": "forward", "sigma2 of the call": "sigma2", "sigma2 of a plan": "sigma2", "gap of the bounds": "bounds",
        "gradient of logits": "gradient", "raised": "forward",
    }  # fmt: skip
    case = Case((1, 4, 4), torch.float32, 1.0)
    records = [Record("triton", group, quantity, case, 1.0, 1.0) for quantity, group in groups.items()]
    assert {x.quantity for x in records if concerns(x, kernel)} == concerned


def test_rows_of_other_source_or_another_compiler_go(tmp_path: Path) -> None:
    path = tmp_path / "execution.jsonl"
    record.write(path, [row(), row(target="sm_80", source="another")])
    assert [x["target"] for x in record.read(path).values()] == ["sm_90"]
    missing = {target: [x.label for x in record.missing(record.read(path), target)] for target in ("sm_80", "sm_90")}
    assert PLAIN in missing["sm_80"]
    assert PLAIN not in missing["sm_90"]
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(header), "triton": "3.5.0"}), *rows]))
    assert record.read(path) == {}


def test_parts_that_go_side_by_side_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "execution.jsonl"
    other = Thread(target=record.write, args=(path, [row()]))
    with record._alone(tmp_path):
        other.start()
        other.join(0.3)
        assert not path.exists()
    other.join()
    assert len(record.read(path)) == 1


def _unreached() -> list[str]:
    """Configurations without a reason that no call launches. In a process of its own: see ``rows_of``."""
    from benchmarks.execution import command

    torch.set_num_threads(1)
    found = []
    for target in ("sm_90", "sm_100"):
        reached = set().union(*(keys for _, keys in command.planned(target)))
        left = [x for x in table.wanted(target) if not table.reason(x, target) and identify(x) not in reached]
        found += [f"{kernel_name(x)} {x.label} {target}" for x in left]
    return found


@pytest.mark.slow
def test_every_configuration_is_launched_by_a_call_or_has_a_reason_why_not() -> None:
    assert rows_of(__name__, "_unreached") == []


def _executed() -> list[Any]:
    """Rows of a run of one call, calls of the next, and what failed in either; then a call whose result is wrong."""
    import tempfile

    from rich.console import Console

    from benchmarks.execution import calls, command, judged

    console = Console(stderr=True)
    record.RESULTS = Path(tempfile.mkdtemp(), "execution.jsonl")
    made: list[str] = []
    judge = command.run
    command.run = lambda recording, call: (made.append(call.name), judge(recording, call))  # type: ignore[assignment]

    def run(match: str) -> list[str]:
        return command.execute("sm_90", match, 1, 1, console)

    call = calls._call(judged.plan_alone, Case((130, 4, 4), torch.float32, 2.0, 3), "plan alone")
    command.FAMILIES = (calls._noisy(lambda: iter([call])),)
    failed = run(PLAIN)
    rows = list(record.read(record.RESULTS).values())
    again = run(PLAIN)
    record.RESULTS.unlink()
    plan = judged.sinkhorn
    judged.sinkhorn = lambda *x, **y: plan(*x, **y) * 1.001  # type: ignore[assignment]
    return [rows, made, failed, again, run(PLAIN), len(record.read(record.RESULTS))]


def test_a_call_is_executed_recorded_and_not_made_again() -> None:
    rows, made, failed, again, wrong, kept = rows_of(__name__, "_executed")
    (found,) = rows
    assert (found["label"], found["target"], found["launches"], found["programs"]) == (PLAIN, "sm_90", 2, 4)
    assert 0 < found["worst"] < 1
    assert 0 < found["noise"]["worst"] < 1
    assert found["worst"] != found["noise"]["worst"]
    assert made == ["plan alone: float32 130x4x4, std 2, 3 sweeps"] * 2, "once, and where its result was wrong"
    unreached = ["info", "info sigma2"]
    assert failed == again == [f"_sinkhorn_fwd_kernel {PLAIN} {x} sm_90: no call launches it" for x in unreached]
    assert any(f"{PLAIN} sm_90: error" in x and "times its budget, plan alone" in x for x in wrong)
    assert kept == 0
