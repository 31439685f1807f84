"""The benchmark suite's bookkeeping: rows, targets, memory, the check of outputs, the report. Times are not tested."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import fastdsm
from benchmarks import gpu_targets, machine_code, report
from benchmarks.baselines import COLUMNS_THEN_ROWS, mean_free, sigma2_by_eigvalsh, sigma2_by_svdvals, sinkhorn_loop
from benchmarks.harness import Case, Definition, Implementation, measure
from benchmarks.memory import peak_extra_bytes
from benchmarks.rows import BACKWARD, FORWARD, Row, Run, read_rows, row_of, write_rows
from benchmarks.targets import (
    ATTENTION_SHAPE,
    EAGER_RATIO,
    FLASH,
    LARGE_RATIO,
    LARGE_SHAPE,
    NEWTON_SHAPE,
    READ,
    TWENTY,
    verdicts,
)

command = import_module("fastdsm.cli.bench")  # fastdsm.cli.bench is also the name of the function in it

RUN = Run("cpu", "A Processor", 2, {"python": "3.11.7", "torch": "2.13.0"}, "abc1234", "2026-01-02T03:04:05+00:00")


def row(implementation: str, seconds: float, ratio: float, direction: str = FORWARD, **changes: object) -> Row:
    base = Row(
        "sinkhorn", (65536, 4, 4), "float32", 20, direction, implementation, "call", "definition", seconds, seconds, None,
        5, 8_000_000, 25.0, 4_000_000, 9_000_000, 16384, 2e-7, None, ratio, None, None, RUN,
    )  # fmt: skip
    return replace(base, **changes)


def records() -> list[Row]:
    """Both directions of every promised size, every promise kept with a margin of two."""
    rows = []
    for (direction, shape), required in EAGER_RATIO.items():
        for name, ratio in (("fastdsm", 2 * required), ("eager", 1.0), ("torch.compile", 2.0), ("POT", 0.5)):
            rows.append(row(name, 0.01 / ratio, ratio, direction, shape=shape))
        rows.append(row("GeomLoss", 0.0, 0.0, direction, shape=shape, **left_out()))
    for name, ratio in (("fastdsm", 2 * LARGE_RATIO), ("eager", 1.0)):
        rows.append(row(name, 0.01 / ratio, ratio, shape=LARGE_SHAPE))
    for direction in (FORWARD, BACKWARD):
        for name, ratio, held in (("fastdsm", 4.0, 1_000), ("eager", 1.0, 8_000)):
            changes = {"operation": "sinkhorn_attention", "shape": ATTENTION_SHAPE, "sweeps": 3, "peak_extra_bytes": held}
            rows.append(row(name, 0.01 / ratio, ratio, direction, **changes))
    for name, ratio in (("fastdsm", 10.0), ("eager", 1.0)):
        rows.append(row(name, 0.01 / ratio, ratio, operation="newton", shape=NEWTON_SHAPE, sweeps=None))
    return rows


def left_out() -> dict[str, object]:
    numbers = ("seconds_median", "seconds_min", "percent_of_floor", "peak_extra_bytes", "error", "ratio_to_eager")
    return dict.fromkeys(numbers) | {"left_out": "not installed"}


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu.jsonl"
    write_rows(path, records())
    assert read_rows(path) == records()
    assert len(path.read_text().splitlines()) == len(records())


def test_a_row_with_other_fields_is_refused() -> None:
    record = asdict(records()[0])
    del record["error"]
    with pytest.raises(ValueError, match="a row has the fields"):
        row_of(record)


def test_targets_kept() -> None:
    found = verdicts(records())
    assert len(found) == 24  # two per size and direction, memory per size, two of attention, one each of Newton and large ones
    assert all(verdict.ok for verdict in found)


@pytest.mark.parametrize(
    ("direction", "change", "promise"),
    [
        (FORWARD, {"ratio_to_eager": 7.9}, "times faster than the eager loop"),
        (BACKWARD, {"ratio_to_eager": 5.9}, "times faster than the eager loop"),
        (BACKWARD, {"peak_extra_bytes": 16_000_000}, "inputs of extra memory, less than"),
        (FORWARD, {"seconds_median": 0.0051}, "times faster than torch.compile"),
    ],
)
def test_a_missed_target_is_found(direction: str, change: dict[str, object], promise: str) -> None:
    rows = records()
    at = next(i for i, x in enumerate(rows) if (x.implementation, x.direction, x.shape[-1]) == ("fastdsm", direction, 4))
    rows[at] = replace(rows[at], **change)
    missed = [verdict for verdict in verdicts(rows) if not verdict.ok]
    assert [(verdict.direction, verdict.promise) for verdict in missed] == [(direction, promise)]


@pytest.mark.parametrize(("direction", "change"), [(FORWARD, {"ratio_to_eager": 1.9}), (BACKWARD, {"peak_extra_bytes": 2_000})])
def test_a_missed_target_of_attention_is_found(direction: str, change: dict[str, object]) -> None:
    rows = records()
    key = ("sinkhorn_attention", "fastdsm", direction)
    at = next(i for i, x in enumerate(rows) if (x.operation, x.implementation, x.direction) == key)
    rows[at] = replace(rows[at], **change)
    missed = [verdict for verdict in verdicts(rows) if not verdict.ok]
    assert [(verdict.shape, verdict.direction) for verdict in missed] == [(ATTENTION_SHAPE, direction)]


def test_a_missed_target_of_newton_is_found() -> None:
    rows = records()
    at = next(i for i, x in enumerate(rows) if (x.operation, x.implementation) == ("newton", "fastdsm"))
    rows[at] = replace(rows[at], ratio_to_eager=4.9)
    missed = [verdict for verdict in verdicts(rows) if not verdict.ok]
    assert [(verdict.shape, verdict.promise) for verdict in missed] == [(NEWTON_SHAPE, "times faster than the sweeps")]


def test_a_missed_target_of_large_matrices_is_found() -> None:
    rows = [replace(x, ratio_to_eager=LARGE_RATIO - 0.1) if x.shape == LARGE_SHAPE else x for x in records()]
    assert [verdict.shape for verdict in verdicts(rows) if not verdict.ok] == [LARGE_SHAPE]


def gpu_records() -> list[Row]:
    """Every promise to a GPU kept: milliseconds by operation, size and implementation."""
    run = replace(RUN, device="cuda", machine="A GPU")
    milliseconds = {
        ("sinkhorn_attention", gpu_targets.HEADS_SHAPE): {
            "fastdsm": 5.0, "eager": 100.0, gpu_targets.of_sweeps(10): 12.0, FLASH: 1.0,
            gpu_targets.FLASH_SINKHORN: 20.0,
        },
        ("sinkhorn", gpu_targets.ONE_SHAPE): {"fastdsm": 2.4, gpu_targets.of_sweeps(10): 1.4, READ: 0.09},
        ("newton", gpu_targets.NEWTON_SHAPE): {"fastdsm": 0.06, TWENTY: 0.07},
    }  # fmt: skip
    of_layers = [
        row("fastdsm", 1.0, 1.0, operation=name, shape=gpu_targets.LAYER_SHAPE, run=run, percent_of_floor=80.0)
        for name in ("mhc_post", "mhc_post_pre")
    ] + [
        row(name, time, 1.0, BACKWARD, operation="mhc layer", shape=gpu_targets.LAYER_SHAPE, run=run)
        for name, time in (("fastdsm", 1e-3), ("Liger", 3e-3))
    ]
    return of_layers + [
        row(name, 1.0, 1.0, operation=operation, shape=shape, run=run, device_seconds=1e-3 * time)
        for (operation, shape), times in milliseconds.items()
        for name, time in times.items()
    ]


def test_gpu_targets_kept() -> None:
    found = gpu_targets.verdicts(gpu_records())
    assert [verdict.measured for verdict in found] == pytest.approx([0.5, 20.0, 4.0, 0.1 / 0.09, 6 / 7, 80.0, 80.0, 3.0])
    assert all(verdict.ok for verdict in found)


@pytest.mark.parametrize("missed", range(8))
def test_a_missed_gpu_target_is_found(missed: int) -> None:
    slower = [
        ("sinkhorn_attention", gpu_targets.of_sweeps(10), 3),
        ("sinkhorn_attention", "eager", 0.4),
        ("sinkhorn_attention", gpu_targets.FLASH_SINKHORN, 0.4),
        ("sinkhorn", "fastdsm", 1.2),
        ("newton", "fastdsm", 1.2),
        ("mhc_post", "fastdsm", 1.2),
        ("mhc_post_pre", "fastdsm", 1.2),
        ("mhc layer", "fastdsm", 1.6),
    ]
    operation, name, factor = slower[missed]

    def changed(x: Row) -> Row:
        if (x.operation, x.implementation) != (operation, name):
            return x
        device = None if x.device_seconds is None else factor * x.device_seconds
        percent, seconds = x.percent_of_floor / factor, factor * x.seconds_median
        return replace(x, device_seconds=device, percent_of_floor=percent, seconds_median=seconds)

    rows = [changed(x) for x in gpu_records()]
    assert [verdict.ok for verdict in gpu_targets.verdicts(rows)] == [i != missed for i in range(8)]


def test_what_a_gpu_did_not_measure_fails() -> None:
    assert [(verdict.measured, verdict.ok) for verdict in gpu_targets.verdicts(records())] == [(None, False)] * 8


def test_what_was_not_measured_fails() -> None:
    found = verdicts([])
    assert len(found) == 24
    assert not any(verdict.ok for verdict in found)
    assert all(verdict.measured is None for verdict in found)


def test_a_gpu_run_is_not_held_to_the_cpu_targets() -> None:
    rows = [replace(x, run=replace(RUN, device="cuda")) for x in records()]
    assert all(verdict.measured is None for verdict in verdicts(rows))


def test_report_takes_every_number_from_the_rows() -> None:
    text = report.section(records(), "speedup.png")
    line = next(line for line in text.splitlines() if line.startswith("| `sinkhorn` | 65,536 of 4 × 4 | forward |"))
    assert line.endswith("| 625 µs | 16.0 | 8.0 (torch.compile) | 2.2 × input | 25 | 2e-07 |")
    assert "A Processor, 2 threads; 2026-01-02, commit abc1234; python 3.11.7, torch 2.13.0." in text
    assert "![Speedup over the eager loop, by size](speedup.png)" in text


def test_report_replaces_what_lies_between_the_markers() -> None:
    begin, end = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
    once = report.spliced(f"before\n{begin}\nold\n{end}\nafter\n", "benchmark", "new")
    assert once == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert report.spliced(once, "benchmark", "new") == once
    with pytest.raises(ValueError, match="expected the markers"):
        report.spliced(once, "proof", "new")


def test_report_says_who_was_left_out_and_why() -> None:
    rows = records()
    rows[1:1] = [row("Liger", 0.0, 0.0, **left_out() | {"left_out": reason}) for reason in ("wrong", "small", "wrong")]
    text = report.section(rows, "speedup.png")
    assert text.endswith("\n\nLeft out, in cases where:\n\n- Liger: wrong; small\n- GeomLoss: not installed")


def test_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw(records(), tmp_path / "speedup.png")
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_counts_what_lives_at_once() -> None:
    x = torch.zeros(1000)

    def call() -> torch.Tensor:
        first = x + 1  # 4000 bytes
        second = torch.cat([first, first])  # and 8000
        del first
        return torch.cat([second, second])  # 8000 and 16000

    assert peak_extra_bytes(call, "cpu") == 24_000
    assert peak_extra_bytes(lambda: x, "cpu") == 0


def test_baselines_compute_what_they_are_held_against() -> None:
    x = torch.randn(3, 5, 5, dtype=torch.float64)
    plan = sinkhorn_loop(x)
    torch.testing.assert_close(plan, fastdsm.reference.sinkhorn(x, n_iters=20))
    value = fastdsm.reference.sigma2(plan)
    torch.testing.assert_close(sigma2_by_svdvals(plan), value)
    torch.testing.assert_close(sigma2_by_eigvalsh(plan), value)
    torch.testing.assert_close(mean_free(plan).sum(-1), torch.zeros(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_measured_rows(benchmark, direction: str) -> None:
    """One tiny case from end to end: a right peer is timed, a wrong and an absent one are left out with the reason."""
    right = Implementation("right", "", lambda x: (fastdsm.reference.sinkhorn(x, n_iters=20),), COLUMNS_THEN_ROWS)
    wrong = Implementation("wrong", "", lambda x: (x.softmax(-1),), COLUMNS_THEN_ROWS)
    broken = Implementation("broken", "", lambda x: (x[0] @ x[0, :2],), COLUMNS_THEN_ROWS)
    absent = replace(right, name="absent", left_out="not installed")
    implementations = [replace(right, name="fastdsm"), replace(right, name="eager"), right, wrong, broken, absent]
    case = Case("sinkhorn", torch.randn(3, 4, 4), direction, seconds=0.0)
    measure(benchmark, case, implementations)
    if benchmark.disabled:
        pytest.skip("--benchmark-disable leaves nothing to look at")
    rows = {entry["implementation"]: row_of(entry) for entry in json.loads(json.dumps(benchmark.extra_info.pop("rows")))}
    assert set(rows) == {"fastdsm", "eager", "right", "wrong", "broken", "absent", "clone"}
    assert rows["absent"].left_out == "not installed"
    assert "misses" in rows["wrong"].left_out
    assert rows["broken"].left_out.startswith("failed: RuntimeError: ")
    assert rows["wrong"].seconds_median is None
    assert rows["eager"].ratio_to_eager == 1.0
    assert rows["clone"].percent_of_floor == 100.0
    ours = rows["fastdsm"]
    size = 3 * 4 * 4 * 4
    assert ours.bytes == (2 if direction == FORWARD else 4) * size
    assert ours.input_bytes == size
    assert ours.rounds == 3
    assert ours.checked == 3
    assert ours.error < 1e-6
    assert (ours.gradient_error is None) == (direction == FORWARD)
    assert ours.peak_extra_bytes >= (1 if direction == FORWARD else 2) * size


def test_a_right_output_with_a_wrong_gradient_is_left_out(benchmark) -> None:
    """A thousandth too large, or NaN; our own stops the measurement."""
    right = Implementation("right", "", lambda x: (fastdsm.reference.sinkhorn(x, n_iters=20),), COLUMNS_THEN_ROWS)
    value = lambda x: fastdsm.reference.sinkhorn(x, n_iters=20)  # noqa: E731
    wrong = replace(right, name="wrong", function=lambda x: (1.001 * value(x) - 0.001 * value(x).detach(),))
    undefined = replace(right, name="undefined", function=lambda x: (value(x) + 0.0 * (x - x).sqrt(),))  # whose gradient is NaN
    implementations = [replace(right, name="fastdsm"), replace(right, name="eager"), wrong, undefined]
    case = Case("sinkhorn", torch.randn(3, 4, 4), BACKWARD, seconds=0.0)
    measure(benchmark, case, implementations)
    with pytest.raises(AssertionError, match=r"fastdsm, .*: output 1 misses"):
        measure(benchmark, case, [replace(wrong, name="fastdsm"), implementations[1]])
    if benchmark.disabled:
        pytest.skip("--benchmark-disable leaves nothing to look at")
    rows = {entry["implementation"]: row_of(entry) for entry in benchmark.extra_info.pop("rows")}
    for name in ("wrong", "undefined"):
        assert rows[name].left_out is not None
        assert rows[name].left_out.startswith("output 1 misses")
    assert rows["eager"].left_out is None


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_a_wrong_output_of_our_own_stops_the_measurement(benchmark) -> None:
    wrong = Implementation("fastdsm", "", lambda x: (x * 2,), Definition("the same", lambda x: (x,)))
    with pytest.raises(AssertionError, match="misses the same in float64"):
        measure(benchmark, Case("copy", torch.ones(2, 2, 2), FORWARD), [wrong])


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command.bench)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


def test_outside_a_checkout_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "_CHECKOUT", tmp_path)
    code, output = invoke()
    assert code == 2
    assert "fastdsm bench needs a checkout" in output


@pytest.mark.parametrize(("strict", "code"), [((), 0), (("--strict",), 1)])
def test_a_missed_target_fails_only_when_strict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, strict: tuple[str, ...], code: int
) -> None:
    rows = records()
    rows[0] = replace(rows[0], ratio_to_eager=1.0)
    monkeypatch.setattr(command, "_measured", lambda *_: rows)
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path)
    found, output = invoke(*strict)
    assert found == code
    assert "fail" in output
    assert read_rows(tmp_path / "cpu.jsonl") == rows
    monkeypatch.setattr(command, "_measured", lambda *_: records())
    assert invoke(*strict)[0] == 0


def test_machine_code_section_comes_from_the_recorded_rows(tmp_path: Path) -> None:
    calls = {(4, "forward"): 1200.0, (4, "forward+sigma2"): 1500.0, (4, "backward"): 2900.0}
    calls |= {(8, "forward"): 4500.0, (8, "backward"): 14000.0}
    rows = [
        {
            "target": target,
            "registers": 72,
            "stack_bytes": 8 * (operation == "backward"),
            "local_bytes": 0,
            "executed": [{"operation": operation, "n": n, "m": n, "dtype": "float32", "thread_instructions_per_matrix": count}],
        }
        for target in ("sm_90", "sm_100")
        for (n, operation), count in calls.items()
    ]
    path = tmp_path / "static.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"triton": "3.7.1", "ptxas": "12.9", "of": 1872}, *rows]))
    text = machine_code.section(path)
    assert "10 builds compiled of the 1,872 that can be launched" in text
    assert "4 of them spill" in text
    assert "| 4 × 4, forward + sigma2 | 1,500 (72) | 1,500 (72) |" in text
    assert "| 8 × 8, backward | 14,000 (72) | 14,000 (72) |" in text
