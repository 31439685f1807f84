"""The model of a multiprocessor, by programs whose time is known: chains, pipes, barriers, memory, residency, addresses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import machine_code
from benchmarks.static import layer
from benchmarks.static.accesses import IDLE, Access, accesses
from benchmarks.static.devices import H100, resident
from benchmarks.static.execution import execute, step_of
from benchmarks.static.machine import Machine
from benchmarks.static.multiprocessor import COPIES, Step, cycles, steps_of
from benchmarks.static.pipes import BARRIER, COMMITS, COPIED, FMA, GLOBAL, SHARED, TENSOR, XU
from benchmarks.static.predicted import read
from benchmarks.static.sass import parse
from benchmarks.static.section import fits, section

NONE = 7
PARTS = 4


def step(
    pipe: int = FMA, busy: float = 1, latency: float = 0, stall: int = 1, waits: int = 0, result: int = NONE, new: float = 0
) -> Step:
    """One instruction; ``new``: cycles of memory's share, and of L2's as many."""
    return pipe, busy, latency, stall, waits, result, NONE, new, new


def test_a_chain_takes_its_latencies_and_warps_hide_one_another() -> None:
    chain = [step(stall=4)] * 100
    assert cycles(chain, warps=1, programs=1, resident=1) == 400
    assert cycles(chain, warps=1, programs=4, resident=4) == pytest.approx(400, abs=4)  # one on each part
    assert cycles(chain, warps=1, programs=16, resident=16) == pytest.approx(400, abs=20)  # four fill the part
    assert cycles(chain, warps=1, programs=32, resident=32) == pytest.approx(800, abs=40)
    assert cycles(chain, warps=1, programs=32, resident=16) == pytest.approx(800, abs=40)  # one after the other


def test_a_result_is_waited_for_by_its_counter() -> None:
    special = [step(XU, 8, 18, result=2), step(waits=1 << 2)] * 50
    assert cycles(special, warps=1, programs=1, resident=1) == pytest.approx(50 * 19, abs=20)
    assert cycles(special, warps=1, programs=64, resident=64) == pytest.approx(50 * 8 * 16, rel=0.05)  # the pipe's throughput
    other = [step(XU, 8, 18, result=2), step(waits=1 << 3)] * 50
    assert cycles(other, warps=1, programs=1, resident=1) == pytest.approx(50 * 8, abs=20)  # waits for nothing


def test_a_barrier_is_passed_by_the_last_and_shared_memory_is_shared() -> None:
    exchange = [step(SHARED, 10, 29, result=0), step(waits=1), step(BARRIER, latency=20)]
    alone = cycles(exchange * 10, warps=1, programs=1, resident=1)
    together = cycles(exchange * 10, warps=8, programs=1, resident=1)
    assert alone == pytest.approx(10 * (10 + 29 + 20), abs=20)
    assert together == pytest.approx(10 * (8 * 10 + 29 + 20), rel=0.1)  # eight times through one pipe, then all go on


def test_memory_is_bound_by_its_rate_or_its_latency() -> None:
    load = [step(GLOBAL, 4, 570, result=0, new=40), step(waits=1)]
    assert cycles(load * 5, warps=1, programs=1, resident=1) == pytest.approx(5 * 614, abs=20)
    assert cycles(load * 5, warps=4, programs=160, resident=16) == pytest.approx(160 * 4 * 5 * 40, rel=0.02)


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [
        (4, 56, 0, 9),
        (8, 254, 4096, 1),
        (1, 168, 256, 12),
        (2, 255, 512, 4),
        (4, 32, 100_000, 2),
        (1, 16, 0, 32),
        (16, 87, 0, 1),
    ],
)
def test_how_many_programs_are_resident(warps: int, registers: int, shared: int, programs: int) -> None:
    assert resident(warps, registers, shared) == programs


SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;                    /* 0x0000000000007919 */
                                                                         /* 0x000e220000002100 */
        /*0010*/                   IMAD R2, R0, {stride}, RZ ;           /* 0x0000000000027824 */
                                                                         /* 0x001fe400078e02ff */
        /*0020*/                   ISETP.GE.AND P0, PT, R0, 0x8, PT ;    /* 0x000000080000780c */
                                                                         /* 0x000fe40003f06270 */
        /*0030*/              {guard} {access} ;                         /* 0x0000000002047984 */
                                                                         /* 0x000e280000000800 */
        /*0040*/                   FADD R5, R4, R4 ;                     /* 0x0000000404057221 */
                                                                         /* 0x001fe20000000000 */
        /*0050*/                   EXIT ;                                /* 0x000000000000794d */
                                                                         /* 0x000fea0003800000 */
"""


def access_of(access: str, stride: int, guard: str = "    ") -> Access:
    """What the one memory instruction does."""
    run = execute(parse(SASS.format(access=access, stride=hex(stride), guard=guard)), {})
    assert run is not None
    (found,) = accesses(run, {}, 4096).values()
    return found


def test_banks_lines_and_sectors() -> None:
    assert access_of("LDS R4, [R2]", 4).cycles == 1
    assert access_of("LDS R4, [R2+0x10]", 0).cycles == 1  # all threads read one word
    assert access_of("LDS R4, [R2]", 8).cycles == 2
    assert access_of("LDS R4, [R2]", 128).cycles == 32
    assert access_of("LDS.128 R4, [R2]", 16).cycles == 4
    assert access_of("LDS R4, [R2]", 128, "@!P0").cycles == 8  # eight threads' guards are true
    assert access_of("LDG.E R4, [R2.64]", 4) == Access(1, 128, 128)
    assert access_of("LDG.E.128 R4, [R2.64]", 16) == Access(4, 512, 512)
    assert access_of("LDG.E R4, [R2.64]", 64) == Access(16, 1024, 1024)  # a sector for each, two to a line
    assert access_of("STG.E [R2.64], R4", 32) == Access(8, 1024, 1024)
    assert access_of("LDG.E R4, [R2.64]", 4, "@!PT") is IDLE


def test_the_assembler_s_schedule_is_read() -> None:
    run = execute(parse(SASS.format(access="LDS R4, [R2]", stride="0x4", guard="    ")), {})
    assert run is not None
    first, multiply, _, load, add, _ = steps_of(run, {}, 1, H100)
    assert (first[3], first[5]) == (1, 0)  # a cycle's stall; its result raises counter 0
    assert (multiply[3], multiply[4], multiply[5]) == (2, 1, NONE)  # which the product waits for
    assert (load[0], load[2], load[5]) == (SHARED, H100.shared_latency, 0)
    assert add[4] == 1


def test_memory_that_was_touched_comes_from_a_cache() -> None:
    text = SASS.format(access="LDG.E R4, [R2.64]", stride="0x4", guard="    ").replace("FADD R5, R4, R4", "LDG.E R6, [R2.64]")
    run = execute(parse(text), {})
    assert run is not None
    assert list(accesses(run, {}, 4096).values()) == [Access(1, 128, 128), Access(1, 0, 0)]
    assert list(accesses(run, {}, 64).values()) == [Access(1, 128, 128), Access(1, 0, 128)]  # L1's share does not hold it
    latencies = [x[2] for x in steps_of(run, {}, 1, H100) if x[0] == GLOBAL]
    assert latencies == [H100.memory_latency, H100.l1_latency]


DIVISION = """
I2F.RP R2, R1
MUFU.RCP R2, R2
VIADD R3, R2, 0xffffffe
F2I.FTZ.U32.TRUNC.NTZ R3, R3
IMAD.MOV R4, RZ, RZ, -R3
IMAD R5, R4, R1, RZ
IMAD.MOV.U32 R2, RZ, RZ, RZ
IMAD.HI.U32 R3, R3, R5, R2
IMAD.HI.U32 R6, R3, R0, RZ
IMAD.MOV R7, RZ, RZ, -R6
IMAD R7, R7, R1, R0
ISETP.GE.U32.AND P0, PT, R7, R1, PT
@P0 IMAD.IADD R7, R7, 0x1, -R1
@P0 VIADD R6, R6, 0x1
ISETP.GE.U32.AND P1, PT, R7, R1, PT
@P1 VIADD R6, R6, 0x1
"""


@pytest.mark.parametrize(
    ("a", "b"), [(0, 1), (7, 3), (8191, 256), (1 << 31, 3), (0xFFFFFFFF, 1), (0xFFFFFFFF, 0x7FFFFFFF), (16777217, 16777217)]
)
def test_a_division_by_a_reciprocal_is_followed(a: int, b: int) -> None:
    lines = DIVISION.strip().splitlines()
    text = "\n".join(f"        /*{16 * place:04x}*/       {line} ;" for place, line in enumerate(lines))
    machine = Machine({})
    machine.write("R0", a)
    machine.write("R1", b)
    for instruction in parse(text).instructions:
        step_of(instruction)(machine)
    assert machine.read("R6") == a // b


def test_copies_to_shared_memory_are_waited_for_by_groups() -> None:
    copy = step(GLOBAL, 4, 570, result=COPIES, new=40)
    one_by_one = [copy, step(COMMITS), step(COPIED)] * 10
    behind = [copy, step(COMMITS), step(COPIED, latency=3)] * 10  # three may be on their way
    assert cycles(one_by_one, warps=1, programs=1, resident=1) == pytest.approx(10 * 614, rel=0.02)
    # The fourth goes on when the first is there, at 614, the eighth when the fifth is, which went behind that; then two more.
    assert cycles(behind, warps=1, programs=1, resident=1) == pytest.approx(2 * 614 + 2 * 40, rel=0.02)


def test_products_of_a_warpgroup_are_waited_for() -> None:
    product = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR24], R24"
    lines = [product, product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"]
    control = "/* 0x0000000000000000 */ /* 0x000fe20000000000 */"
    run = execute(parse("\n".join(f"   /*{16 * i:04x}*/   {line} ; {control}" for i, line in enumerate(lines))), {})
    assert run is not None
    steps = steps_of(run, {}, 4, H100)
    assert [x[0] for x in steps[:2]] == [TENSOR] * 2
    assert cycles(steps, warps=4, programs=1, resident=1) == pytest.approx(2 * 16 + 32, abs=8)
    many = cycles([*steps[:2] * 100, *steps[2:]], warps=4, programs=1, resident=1)
    assert many == pytest.approx(200 * 16 + 32, rel=0.02)  # a part's rate


def test_what_all_programs_read_is_not_new() -> None:
    text = SASS.format(access="LDG.E R4, [R2.64]", stride="0x4", guard="    ")
    run = execute(parse(text), {})
    assert run is not None
    assert list(accesses(run, {}, 4096, [range(128)]).values()) == [Access(1, 0, 128)]
    assert list(accesses(run, {}, 4096, [range(128, 256)]).values()) == [Access(1, 128, 128)]


def test_mixes_are_at_most_a_tenth_of_the_pre() -> None:
    times = {(row["device"], row["call"]): row["whole"] for row in layer.read()}
    assert all(0 < times[name, layer.MIXES] <= 0.1 * times[name, "pre"] for name, _ in times)
    assert all(time is not None for time in times.values())


def test_the_committed_predictions_explain_what_was_measured() -> None:
    """All that can be followed and is the same kernel, but for the two whose squarings the data end."""
    rows = [row for row in read() if row.where and not row.changed and row.predicted is not None]
    off = {(row.operations, row.n) for row in rows if not fits(row)}
    assert off <= {(("sigma2",), 64), (("sigma2_bounds",), 64)}
    assert sum(map(fits, rows)) >= 10


def test_the_section_says_where_the_model_is_off() -> None:
    rows = read()
    (row,) = [x for x in rows if x.case.endswith("forward, 1024 of 128x128")]
    current = machine_code.sources()
    (line,) = [x for x in section(rows, layer.read(), current).splitlines() if x.startswith("| 1,024 of 128 × 128: forward (")]
    assert "off" not in line
    wrong = [replace(x, predicted=0.5 * x.predicted) if x == row and x.predicted else x for x in rows]
    (line,) = [x for x in section(wrong, layer.read(), current).splitlines() if x.startswith("| 1,024 of 128 × 128: forward (")]
    assert "**off**" in line
    (line,) = [x for x in section(rows, layer.read(), ()).splitlines() if x.startswith("| 1,024 of 128 × 128: forward (")]
    assert "predicted before the kernel was changed" in line
    measured = sum(bool(x.where) for x in rows)
    text = section(rows, layer.read(), ())
    assert "have changed.\n\n| float32, 20 sweeps |" in text
    for count in (measured, len(rows) - measured):
        assert f"Since they were predicted the kernels of {count} of these {count} have changed." in text
