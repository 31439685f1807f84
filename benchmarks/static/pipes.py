"""Where an instruction goes, for how many cycles it keeps others from there, and when its result is there.

Of each of a multiprocessor's four parts: one instruction of a warp is issued in a cycle; multiply-adds take both halves of 16
lanes by turns, integer ones, comparisons, logic and moves one half, two cycles, and so do doubles; a special function takes
four lanes, eight cycles. Memory of any kind is shared by the four: 32 lanes and 128 bytes in a cycle. (CUDA programming guide,
throughput of native arithmetic instructions, compute capability 9.0: 128, 64, 64, 16 and 32 results per cycle and
multiprocessor.) Tensor cores: what a warpgroup's product of 64 by N takes is N / 2 cycles of each part, whatever its 16 bits or
TF32 (the data sheet's 989 and 495 TFLOP/s); a warp's own of 16 by 8 by 16 takes 8, as on a chip of half that rate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .sass import Instruction

PIPES = 12
ISSUE, FMA, ALU, XU, FP64, UNIFORM, SHARED, GLOBAL, BARRIER, TENSOR, COMMITS, COPIED = range(PIPES)
_FMA = re.compile(r"FFMA|FMUL|FADD|IMAD|HFMA2|HMUL2|HADD2|FSWZADD|FFMA2|FMUL2|FADD2")
_ALU = re.compile(
    r"FMNMX|FSEL|FSET|FSETP|FCHK|IADD3|VIADD|LOP3|PLOP3|ISETP|SEL|SHF|PRMT|MOV|LEA|VIMNMX|VIADDMNMX|P2R|R2P|SGXT|BMSK|IABS|"
    r"CS2R|F2FP|HSETP2|HMNMX2|IDP|VOTE|FLO|POPC"
)
_XU = re.compile(r"MUFU|F2F|F2I|I2F|FRND|S2R|R2UR|REDUX")
_SHARED = re.compile(r"SHFL|LDS|STS|ATOMS|LDSM|STSM")
_WARPGROUP = re.compile(r"HGMMA\.64x(\d+)x")
_GLOBAL = re.compile(r"LDG|STG|LD|ST|RED|ATOM|ATOMG|LDGSTS")
# Cycles from issue to a result for which the assembler cannot wait by counting; guesses from dependent chains on Ampere and
# Hopper (arXiv 2208.11174, 2402.13499), rounded.
SPECIAL_LATENCY, SHUFFLE_LATENCY, DOUBLE_LATENCY, BARRIER_LATENCY, OTHER_LATENCY = 18, 24, 16, 20, 12
TENSOR_LATENCY = 32  # of a warp's product, and of a warpgroup's beyond its cycles
READ_LATENCY = 10  # until what a store or an address was read from may be overwritten


@dataclass(frozen=True)
class Use:
    """pipe: where it goes. cycles: for which it keeps it. latency: until its result is there, None where memory decides.

    A COMMITS ends a group of copies to shared memory; a COPIED waits until no more groups are on their way than its latency.
    """

    pipe: int
    cycles: float
    latency: float | None


def use_of(instruction: Instruction) -> Use:
    """Of one warp."""
    base = instruction.base
    if base.startswith("U") or base in ("S2UR", "ULDC"):
        return Use(UNIFORM, 2, OTHER_LATENCY)
    if _FMA.fullmatch(base):
        return Use(FMA, 2 if base == "IMAD" else 1, OTHER_LATENCY)
    if base[0] == "D" and base != "DEPBAR":
        return Use(FP64, 2, DOUBLE_LATENCY)
    if _ALU.fullmatch(base):
        return Use(ALU, 2, OTHER_LATENCY)
    if _XU.fullmatch(base):
        return Use(XU, 8 if base == "MUFU" else 2, SPECIAL_LATENCY)
    if base == "SHFL":
        return Use(SHARED, 1, SHUFFLE_LATENCY)
    if _SHARED.fullmatch(base):
        return Use(SHARED, 1, None)
    if _GLOBAL.fullmatch(base):
        return Use(GLOBAL, 1, None)
    if found := _WARPGROUP.search(instruction.opcode):
        return Use(TENSOR, int(found.group(1)) / 2, int(found.group(1)) / 2 + TENSOR_LATENCY)
    if base == "HMMA":
        return Use(
            TENSOR, 8 if ".16816." in instruction.opcode or ".1688.F32.TF32" in instruction.opcode else 4, TENSOR_LATENCY
        )
    if base == "LDGDEPBAR":
        return Use(COMMITS, 1, 0)
    if base == "DEPBAR":
        return Use(COPIED, 1, int(instruction.operands.split(",")[1], 16))
    if base == "BAR":
        return Use(BARRIER, 1, BARRIER_LATENCY)
    return Use(ISSUE, 1, OTHER_LATENCY)
