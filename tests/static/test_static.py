"""The reader of machine code on recorded text, and the machine code of the kernels against the promised numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from benchmarks.static import command, newton
from benchmarks.static import record as record_file
from benchmarks.static.compilation import Resources, describe, kernel_name, read_resources
from benchmarks.static.devices import H200
from benchmarks.static.execution import execute, parameter_words
from benchmarks.static.integers import INTEGER_OPERATIONS
from benchmarks.static.launches import OPERATIONS, Call
from benchmarks.static.machine import Machine
from benchmarks.static.model import CLOCK_GHZ, predicted_time
from benchmarks.static.report import analyse, faults, title, usages
from benchmarks.static.sass import count, parse
from fastdsm import kernels

from ..uninterpreted import rows_of

# As compiled for sm_90: while done < n: {y = exp2(x y); k = min(n - done, segment); k times y = 1 / y; done += k}.
# The block at 0x130 lies behind the exit and jumps back: no loop. Parameters: x_ptr, n, segment, at 0x210.
NESTED = """
        Function : nested
        /*0000*/                   LDC R1, c[0x0][0x28] ;                             /* 0x00000a00ff017b82 */
                                                                                      /* 0x000e220000000800 */
        /*0010*/                   IMAD.MOV.U32 R4, RZ, RZ, RZ ;
        /*0020*/                   ULDC UR6, c[0x0][0x218] ;
        /*0030*/                   FSETP.NEU.AND P3, PT, |R2|, +INF , PT ;
        /*0040*/              @!P3 BRA 0x130 ;
        /*0050*/                   IADD3 R6, -R4, UR6, RZ ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/                   IMNMX R6, R6, c[0x0][0x21c], PT ;
        /*0080*/                   MOV R7, R6 ;
        /*0090*/                   MUFU.RCP R5, R5 ;
        /*00a0*/                   VIADD R7, R7, 0xffffffff ;
        /*00b0*/                   ISETP.GT.AND P1, PT, R7, RZ, PT ;
        /*00c0*/               @P1 BRA 0x90 ;
        /*00d0*/                   IADD3 R4, R4, R6, RZ ;
        /*00e0*/                   ISETP.GE.AND P0, PT, R4, UR6, PT ;
        /*00f0*/              @!P0 BRA 0x50 ;
        /*0100*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0110*/                   EXIT ;
        /*0120*/                   BRA 0x120;
        /*0130*/                   FADD R2, R2, 1 ;
        /*0140*/                   BRA 0x50 ;
        /*0150*/                   NOP;
"""


def _parameters(n: int, segment: int) -> dict[int, int]:
    signature = {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr", "segment": "i32"}
    return parameter_words(signature, {"x_ptr": 1 << 40, "n": n, "segment": segment}, "sm_90")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("FFMA.FTZ R1, R2, R3, R4", "FFMA"),
        ("FFMA2 R2, R4, R6, R8", "FFMA"),
        ("FMNMX R1, R2, R3, !PT", "FMNMX"),
        ("FSETP.GT.AND P0, PT, |R7|, 8.5e+37, PT", "FSEL/FSETP"),
        ("MUFU.RCP R1, R2", "MUFU"),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "SHFL"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "BAR"),
        ("LDS.128 R4, [R2+0x10]", "LDS"),
        ("STS [R2], R4", "STS"),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", "LDG"),
        ("LDG.E.128 R4, desc[UR4][R2.64]", "LDG"),
        ("STG.E desc[UR4][R2.64], R5", "STG"),
        ("LDL.64 R2, [R1+0x8]", "LDL"),
        ("STL [R1+0x8], R2", "STL"),
        ("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24", "HGMMA"),
        ("DFMA R2, R4, R6, R8", "FP64"),
        ("HFMA2.MMA R8, -RZ, RZ, 1.625, 0", "OTHER"),
        ("HFMA2.BF16 R8, R2, R3, R4", "HALF"),
        ("F2FP.BF16.F32.PACK_AB R2, R3, R4", "CONVERT"),
        ("IMAD.WIDE R2, R3, 0x4, R4", "OTHER"),
        ("EXIT", "BRANCH"),
    ],
)
def test_class_of_an_instruction(line: str, kind: str) -> None:
    (instruction,) = parse(f"        /*0000*/                   {line} ;\n").instructions
    assert instruction.kind == kind


def test_loop_nest_of_recorded_code() -> None:
    program = parse(NESTED)
    outer, inner = program.loops
    assert (outer.depth, inner.depth) == (1, 2)
    assert inner.blocks < outer.blocks
    assert program.body(inner) == {"MUFU": 1, "OTHER": 2, "BRANCH": 1}
    assert program.body(outer) == {"MUFU": 2, "OTHER": 7, "BRANCH": 2}
    assert count(program.instructions)["FADD"] == 1, "code behind the exit that is jumped to is reachable"
    assert 0x120 not in [instruction.address for instruction in program.instructions]


@pytest.mark.parametrize(("n", "segment", "outer", "inner"), [(20, 22, 1, 20), (20, 6, 4, 20), (1, 1, 1, 1), (23, 22, 2, 23)])
def test_trips_follow_the_arguments(n: int, segment: int, outer: int, inner: int) -> None:
    run = execute(parse(NESTED), _parameters(n, segment))
    assert run is not None
    assert run.counts["MUFU"] == outer + inner
    assert run.counts["FADD"] == 0
    assert run.assumed == 1, "the comparison of a float at 0x30"


def test_a_loop_that_data_may_leave_early_is_counted_in_full() -> None:
    converges = NESTED.replace("ISETP.GT.AND P1, PT, R7, RZ, PT", "ISETP.GT.AND P1, PT, R7, RZ, P3")
    run = execute(parse(converges), _parameters(20, 22))
    assert run is not None
    assert run.counts["MUFU"] == 21
    assert run.assumed == 20, "19 decisions to go on and the comparison of a float"


def test_reductions_decide_where_they_are_given() -> None:
    decided = NESTED.replace(
        "ISETP.GT.AND P1, PT, R7, RZ, PT",
        "REDUX.MAX.S32 UR9, R7 ;\n        /*00b8*/                   ISETP.GT.AND P1, PT, UR9, RZ, PT",
    )
    run = execute(parse(decided), _parameters(20, 22), [2, 1, 1, 0])
    assert run is not None
    assert run.counts["MUFU"] == 1 + 4


@pytest.mark.parametrize(
    ("operation", "suffixes", "operands", "found", "carry"),
    [
        ("LEA", "", "R9, P1, R1, R2, 0x4", 0x10 + 7, False),
        ("LEA", "", "R9, P1, R3, R3, 0x1", 0xFFFFFFFD, True),
        ("LEA", "HI", "R9, P1, R3, R2, RZ, 0x7", 0x7F + 7, False),
        ("LEA", "HI.X.SX32", "R9, R3, R2, 0x1, P0", 7, None),
        ("IMAD", "HI", "R9, R3, R2, R2", 0xFFFFFFFF, None),
        ("IMAD", "HI.U32", "R9, R3, R2, RZ", 6, None),
        ("HFMA2", "", "R9, -RZ, RZ, 0, 8.94069671630859375e-07", 15, None),
        ("HFMA2", "", "R9, -RZ, RZ, -0, 0", 0x80000000, None),
        ("HFMA2", "", "R9, -RZ, RZ, 1.875, 0", 0x3F800000, None),
        ("HFMA2", "BF16", "R9, -RZ, RZ, 1, 0", None, None),
    ],
)
def test_integers(operation: str, suffixes: str, operands: str, found: int | None, carry: bool | None) -> None:
    machine = Machine({}, ())
    for name, value in (("R1", 1), ("R2", 7), ("R3", 0xFFFFFFFF)):
        machine.write(name, value)
    machine.set("P0", True)
    known = INTEGER_OPERATIONS[operation](machine, suffixes.split("."), operands.split(", "))
    assert known == (found is not None)
    assert machine.values(["R9", "P1"]) == {"R9": found, "P1": carry}


def test_a_loop_on_data_alone_has_no_count() -> None:
    endless = NESTED.replace("ISETP.GT.AND P1, PT, R7, RZ, PT", "FSETP.GT.AND P1, PT, R5, 1, PT")
    assert execute(parse(endless), _parameters(20, 22)) is None


def test_parameters_are_laid_out_by_their_alignment() -> None:
    signature = {"a": "i32", "x_ptr": "*fp16", "b": "fp64", "c": "i32"}
    words = parameter_words(signature, {"a": -1, "x_ptr": 2 << 32, "b": 1.0, "c": 7}, "sm_80")
    assert words == {
        0x160: 0xFFFFFFFF, 0x164: 0, 0x168: 0, 0x16C: 2, 0x170: 0, 0x174: 0x3FF00000, 0x178: 7, 0xC: 1 << 20,
    }  # fmt: skip


def test_resources() -> None:
    text = "Function k:\n  REG:255 STACK:48 SHARED:0 LOCAL:8 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert read_resources(text) == Resources(255, 48, 8)
    with pytest.raises(ValueError, match="expected a line REG"):
        read_resources("nothing")


def test_a_spill_is_a_fault() -> None:
    row = {"target": "sm_80", "stack_bytes": 0, "local_bytes": 0, "spill_instructions": 0, "shared_bytes": 166_912}
    row |= {"instructions": {"STG": 1, "MUFU": 1}}
    assert faults(row) == []
    assert faults({**row, "stack_bytes": 16, "spill_instructions": 4}) == ["stack_bytes = 16", "spill_instructions = 4"]
    assert faults({**row, "shared_bytes": 166_913}) == ["shared_bytes = 166913, the device has 166912"]
    assert faults({**row, "instructions": {**row["instructions"], "MUFU": 0}}) == ["no MUFU: compiled to nothing"]
    assert faults({**row, "error": "ValueError: no"}) == ["does not compile: ValueError: no"]


def _command(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]) -> Result:
    monkeypatch.setattr(command, "rows_of", lambda targets, match, jobs: iter([(1, row)]))
    monkeypatch.setattr(command, "record", lambda path, rows, table: None)
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, ["--match", "k", "--target", "sm_90"])


def test_a_run_replaces_its_rows_and_drops_what_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = kernels.configurations()[:2]
    hashes = {id(table[0]): "one", id(table[1]): "two"}
    monkeypatch.setattr(record_file, "source", lambda configuration: hashes[id(configuration)])

    def row(index: int, target: str, registers: int) -> dict[str, Any]:
        named = {"kernel": kernel_name(table[index]), **describe(table[index]), "target": target}
        return {**named, "source": hashes[id(table[index])], "registers": registers}

    def recorded_rows() -> tuple[dict[str, Any], dict[tuple[str, str], int]]:
        header, *rows = (json.loads(line) for line in path.read_text().splitlines())
        return header, {(x["source"], x["target"]): x["registers"] for x in rows}

    path = tmp_path / "new" / "static.jsonl"
    gone = {
        "kernel": "gone",
        "target": "sm_90",
        "registers": 9,
        "constants": {},
        "pointers": {},
        "num_warps": 1,
        "num_stages": 1,
    }
    record_file.record(path, [gone, row(0, "sm_80", 40), row(1, "sm_90", 50)], table)
    header, _ = recorded_rows()
    assert (header["rows"], header["of"]) == (2, 6)
    record_file.record(path, [row(0, "sm_80", 41), row(0, "sm_90", 42)], table)
    assert recorded_rows()[1] == {("one", "sm_80"): 41, ("one", "sm_90"): 42, ("two", "sm_90"): 50}
    hashes[id(table[1])] = "edited"
    record_file.record(path, [], table)
    assert recorded_rows()[1] == {("one", "sm_80"): 41, ("one", "sm_90"): 42}
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(lines[0]), "triton": "3.5.0"}), *lines[1:]]))
    record_file.record(path, [row(0, "sm_100", 43)], table)
    assert recorded_rows()[1] == {("one", "sm_100"): 43}


def test_the_command_fails_on_a_spill_and_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"kernel": "k", "constants": {"BLOCK": 4}, "pointers": {"x_ptr": "fp32"}, "num_warps": 4, "num_stages": 1}
    row |= {"matrices": 1, "target": "sm_90", "registers": 40, "stack_bytes": 0, "local_bytes": 0}
    row |= {
        "spill_instructions": 0,
        "shared_bytes": 0,
        "code_bytes": 16,
        "instructions": {"STG": 1, "MUFU": 1},
        "loops": [],
        "executed": [],
    }
    clean = _command(monkeypatch, row)
    assert clean.exit_code == 0
    assert json.loads(clean.stdout.splitlines()[0]) == row
    spilled = _command(monkeypatch, {**row, "stack_bytes": 8})
    assert spilled.exit_code == 1
    assert "k(BLOCK=4; fp32; 4 warps) sm_90: stack_bytes = 8" in spilled.output


def test_predicted_time_is_that_of_the_slowest_resource() -> None:
    times = predicted_time({"MUFU": 10, "FFMA": 40}, threads=128, matrices=128, bytes_per_matrix=4300)
    assert times["predicted_ns"] == times["predicted_copy_ns"] == 1.0
    assert times["predicted_bound"] == "copy"
    times = predicted_time({"MUFU": 160}, threads=128, matrices=1, bytes_per_matrix=4)
    assert times["predicted_ns"] == pytest.approx(160 * 128 / 16 / H200.multiprocessors / CLOCK_GHZ, abs=1e-4)
    assert times["predicted_bound"] == "mufu"


def _analyse() -> list[dict[str, Any]]:
    """Rows for sm_90 of what ordinary calls launch. In a process of its own: see ``rows``."""
    calls = [Call(operation, 4, 4, torch.float32) for operation in OPERATIONS]
    calls += [Call("forward", 4, 4, torch.bfloat16), *(Call("forward", n, n, torch.float32) for n in (8, 16))]
    return [analyse(configuration, "sm_90", [usage]) for configuration, usage in usages(calls)]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return rows_of(__name__, "_analyse")


def _newton() -> list[dict[str, Any]]:
    """Instructions of Newton's method at logit std 2 and of 20 sweeps. In a process of its own."""
    return newton.rows((2.0,), 12) + newton.rows((2.0,), 16, lines=8)


@pytest.mark.slow
def test_newton_takes_fewer_instructions_than_20_sweeps() -> None:
    found = rows_of(__name__, "_newton")
    for row, sweeps in (found[:2], found[2:]):
        assert 600 < row["instructions"] < sweeps["instructions"]
        assert row["predicted_ns"] < sweeps["predicted_ns"]


def _small(rows: list[dict[str, Any]], operation: str, n: int = 4) -> dict[str, Any]:
    """What an n x n float32 matrix costs in 20 sweeps."""
    runs = [run for row in rows for run in row["executed"]]
    return next(run for run in runs if (run["operation"], run["n"], run["dtype"]) == (operation, n, "float32"))


def test_no_kernel_spills(rows: list[dict[str, Any]]) -> None:
    assert {title(row): faults(row) for row in rows if faults(row)} == {}


@pytest.mark.parametrize(("operation", "n"), [("forward", 4), ("forward+sigma2", 4), ("backward", 4), ("forward", 8)])
def test_sweeps_of_small_matrices_stay_in_registers(rows: list[dict[str, Any]], operation: str, n: int) -> None:
    per_sweep = dict(_small(rows, operation, n)["per_sweep"])
    assert per_sweep.pop("BAR", 0.0) <= 1 / 15  # one where a segment of 5 lines and more ends, which keeps loads behind it
    assert not {"SHFL", "LDS", "STS", "STG", "LDL", "STL"} & set(per_sweep)


@pytest.mark.parametrize("operation", ["forward", "forward+sigma2", "backward"])
def test_sweeps_of_4x4_read_nothing(rows: list[dict[str, Any]], operation: str) -> None:
    assert "LDG" not in _small(rows, operation)["per_sweep"]


def test_a_sweep_of_4x4_takes_at_most_52_instructions(rows: list[dict[str, Any]]) -> None:
    assert 0 < _small(rows, "forward")["per_sweep_total"] <= 52


def test_instructions_of_4x4_forward(rows: list[dict[str, Any]]) -> None:
    assert 0 < _small(rows, "forward")["thread_instructions_per_matrix"] <= 1550


def test_instructions_of_8x8_forward(rows: list[dict[str, Any]]) -> None:
    assert 0 < _small(rows, "forward", 8)["thread_instructions_per_matrix"] <= 4500


def test_instructions_of_4x4_backward(rows: list[dict[str, Any]]) -> None:
    assert 0 < _small(rows, "backward")["thread_instructions_per_matrix"] <= 3000


def test_sigma2_adds_at_most_a_quarter(rows: list[dict[str, Any]]) -> None:
    plain, fused = (_small(rows, name)["thread_instructions_per_matrix"] for name in ("forward", "forward+sigma2"))
    assert plain < fused <= 1.25 * plain
