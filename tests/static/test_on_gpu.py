"""The script for the minutes that a GPU is at hand: what a stopped call leaves, what the next one does, and every step, dry."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.on_gpu import results, table
from benchmarks.on_gpu.lines import append, read
from benchmarks.on_gpu.outcomes import FILE, outcomes
from benchmarks.on_gpu.runner import DONE, FAILED, LOG, SKIPPED, STATE, STOPPED, Step, progress_of, run
from benchmarks.on_gpu.steps import ROWS, TESTS, dry, steps
from benchmarks.rows import read_rows, write_rows
from benchmarks.static.report import Row as Build

from ..uninterpreted import ROOT
from .test_bench import RUN, gpu_records


def shell(name: str, command: str, limit: float = 20.0, **changes: object) -> Step:
    return replace(Step(name, ("sh", "-c", command), limit), **changes)


def outcome_of(chosen: list[Step], out: Path, seconds: float = 60.0) -> dict[str, str | None]:
    """What each step has come to after one more call."""
    list(run(chosen, out, seconds))
    return {name: progress.outcome for name, progress in progress_of(out).items()}


def test_lines_outlive_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append(path, {"a": 1}, {"a": 2})
    with path.open("a") as file:
        file.write('{"a": 3, "b"')
    append(path, {"a": 4})
    assert read(path) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_what_has_ended_is_not_run_again(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    chosen = [
        shell("good", f"echo good >> {ran}"),
        shell("bad", f"echo bad >> {ran}; exit 3"),
        shell("lacking", f"echo lacking >> {ran}", modules=("no_such_module",), programs=("no-such-program",)),
    ]
    assert outcome_of(chosen, tmp_path) == {"good": DONE, "bad": FAILED, "lacking": SKIPPED}
    found = progress_of(tmp_path)
    assert found["bad"].reason == "exit code 3"
    assert found["lacking"].reason == "needs the module no_such_module, the program no-such-program"
    assert results.failed(tmp_path, chosen)
    assert not results.failed(tmp_path, [chosen[0], chosen[2]])
    assert ran.read_text().split() == ["good", "bad"]
    chosen[2] = replace(chosen[2], modules=(), programs=())
    assert outcome_of(chosen, tmp_path)["lacking"] == DONE
    assert ran.read_text().split() == ["good", "bad", "lacking"]


def test_a_step_that_hangs_is_stopped_with_its_children_and_has_one_more_turn_after_the_others(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    chosen = [
        shell("hangs", f"echo hangs >> {ran}; sh -c 'trap \"\" TERM; sleep 3; sleep 3; echo child >> {ran}' & wait", 1.0),
        shell("after", f"echo after >> {ran}"),
    ]
    assert outcome_of(chosen, tmp_path) == {"hangs": STOPPED, "after": DONE}
    assert ran.read_text().split() == ["hangs", "after", "hangs"]
    assert progress_of(tmp_path)["hangs"].reason.startswith("not done after")
    assert outcome_of(chosen, tmp_path) == {"hangs": STOPPED, "after": DONE}  # it has had its two turns
    time.sleep(1.0)
    assert ran.read_text().split() == ["hangs", "after", "hangs"]


def test_a_call_whose_time_is_up_leaves_the_rest_to_the_next(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    chosen = [
        shell("goes on", f"test -e {ran} && exit 0; touch {ran}; sleep 30", 5.0),
        shell("last", "true", 5.0),
    ]
    assert outcome_of(chosen, tmp_path, 2.0) == {"goes on": STOPPED}
    assert outcome_of(chosen, tmp_path) == {"goes on": DONE, "last": DONE}
    assert 1.0 < progress_of(tmp_path)["goes on"].seconds < 10.0


def call(out: Path) -> None:
    """In a process of its own: a step that is done at the second time."""
    list(run([shell("first", f"test -e {out}/began && exit 0; touch {out}/began; echo begun; sleep 15", 90.0)], out, 90.0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_ended_from_outside_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    code = f"from pathlib import Path; from tests.static.test_on_gpu import call; call(Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, process_group=0)
    for _ in range(600):
        if (tmp_path / LOG).exists() and "begun\n" in (tmp_path / LOG).read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(20) != 0
    call(tmp_path)
    found = [line["outcome"] for line in read(tmp_path / STATE)]
    assert found == ["begun", STOPPED, "begun", DONE]
    assert progress_of(tmp_path)["first"].seconds < 30.0


def test_tests_that_have_an_outcome_are_not_run_again(tmp_path: Path) -> None:
    """The second of four ends the whole run, the first time; it is run last in the next, in which the fourth fails."""
    (tmp_path / "test_four.py").write_text(
        "import os, pathlib\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def test_a(): assert not (here / 'once').exists()\n"
        "def test_b():\n"
        "    if not (here / 'once').exists():\n"
        "        (here / 'once').touch(); os._exit(5)\n"
        "def test_c(): pass\n"
        "def test_d(): assert False, 'as it should'\n"
    )
    path = tmp_path / TESTS
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.on_gpu.outcomes", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, FILE: str(path), "PYTHONPATH": str(ROOT)}
    codes = [subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL).returncode for _ in range(3)]
    assert codes == [5, 1, 0]
    assert [(line["test"][-1], line["outcome"]) for line in read(path)] == [
        ("a", "begun"), ("a", "passed"), ("b", "begun"),
        ("c", "begun"), ("c", "passed"), ("d", "begun"), ("d", "failed"), ("b", "begun"), ("b", "passed"),
    ]  # fmt: skip
    assert sorted(outcomes(path).values()) == ["failed", "passed", "passed", "passed"]
    assert "as it should" in next(line["message"] for line in read(path) if line["outcome"] == "failed")


def test_differences_of_the_table() -> None:
    (known, *_) = [row for row in table.committed().values() if row["target"] == "sm_90"]
    builds = table.committed()

    def lines(**changes: object) -> list[str]:
        row: Build = {**known, **changes}
        return list(table.differences([row], builds))

    assert lines() == []
    assert lines(registers=known["registers"] + 8)[0].endswith(f"registers {known['registers']} -> {known['registers'] + 8}")
    assert "spill_instructions 0 -> 2" in lines(spill_instructions=2)[0]
    assert lines(source="another")[0].endswith("no committed row of this source")
    assert "does not compile: X" in lines(error="X")[0]


def test_rows_take_the_place_of_those_of_the_same_cases_and_machine(tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    before = gpu_records()
    write_rows(kept / ROWS, before)
    again = [replace(x, device_seconds=1.0) for x in before if x.operation == "newton"]
    append(out / ROWS, *map(asdict, again))
    list(results.take(out, kept))
    assert read_rows(kept / ROWS) == [*(x for x in before if x.operation != "newton"), *again]
    another = [replace(x, run=replace(x.run, machine="Another GPU, 80GB")) for x in again]
    append(out / ROWS, *map(asdict, another))
    list(results.take(out, kept))
    assert read_rows(kept / ROWS) == [*(x for x in before if x.operation != "newton"), *again]
    assert read_rows(kept / "cuda-another-gpu-80gb.jsonl") == another
    append(out / ROWS, asdict(replace(another[0], run=RUN)))
    with pytest.raises(ValueError, match="expected rows of a GPU, got rows of cpu"):
        list(results.take(out, kept))


def test_the_dry_run_has_the_steps_of_the_real_one(tmp_path: Path) -> None:
    real = steps(tmp_path, "sm_90", 16)
    assert len({step.name for step in real}) == len(real)
    left_out = {step.name for step in real} - {step.name for step in dry(tmp_path)}
    assert all("check, " in name for name in left_out)
    assert len(left_out) == 9


@pytest.mark.slow
def test_every_step_dry_with_an_interruption(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.on_gpu", str(tmp_path), "--dry"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    first = subprocess.run(
        [*command, "--minutes", "0.1"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert "not begun" in first.stdout
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    log = (tmp_path / LOG).read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert {step.name: progress_of(tmp_path)[step.name].outcome for step in dry(tmp_path)} == {
        step.name: DONE for step in dry(tmp_path)
    }
    assert "table: 1 kernels, 0 unlike the committed rows" in done.stdout
    assert len(read_rows(tmp_path / ROWS)) == 4
    (predicted,) = read(tmp_path / "prediction.jsonl")
    assert predicted["predicted"] > 0
    assert re.search(r"verify: \d+ comparisons, 0 over their budget", done.stdout)
    assert len(list(tmp_path.iterdir())) == 8  # which some places that lend a GPU limit
