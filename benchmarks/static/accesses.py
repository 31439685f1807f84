"""What memory instructions of a warp touch: lines and sectors of memory, banks of shared memory.

The path is that of the execution; along it the integers of all 32 threads of warp 0 are followed as far as addresses and guards
depend on them. An address that is not known is taken for that of neighbouring threads.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .execution import Execution, behind, destinations, mentioned, step_of
from .machine import Machine
from .sass import Instruction

WARP, LINE, SECTOR, BANKS = 32, 128, 32, 32
KINDS = ("LDG", "STG", "LDS", "STS")


@dataclass(frozen=True)
class Access:
    """cycles: of the pipe of all memory. new: bytes that no access before touched. sent: bytes to L2 or from it."""

    cycles: int
    new: int = 0
    sent: int = 0


IDLE = Access(0)


def width_of(opcode: str) -> int:
    """Bytes of a thread."""
    suffixes = opcode.split(".")
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in suffixes:
            return size
    return 4


def accesses(
    run: Execution, parameters: Mapping[int, int], l1_bytes: int, common: Sequence[range] = ()
) -> dict[tuple[int, int], Access]:
    """By place in the path and in its block, what each instruction of memory does. l1_bytes: the warp's share of that cache.

    common: lower words of addresses that others touch too, so that nothing there is new.
    """
    program = run.program
    moving = [i for i in program.instructions if i.kind in KINDS]
    names = set().union(*(mentioned(i) for i in moving)) if moving else set()
    deciding = behind(program, names)
    plans = [
        [(place, i, step_of(i) if deciding & set(destinations(i)) else None) for place, i in enumerate(block.instructions)]
        for block in program.blocks
    ]
    plans = [[x for x in plan if x[2] is not None or x[1].kind in KINDS] for plan in plans]
    lanes = [Machine(parameters, guessing=True, lane=lane) for lane in range(WARP)]
    cache: OrderedDict[int, None] = OrderedDict()
    seen: set[int] = set()
    found = {}
    for at, number in enumerate(run.path):
        for place, instruction, step in plans[number]:
            if instruction.kind in KINDS:
                addresses = list(_addresses(instruction, lanes))
                if instruction.kind in ("LDS", "STS"):
                    found[at, place] = _shared(instruction, addresses)
                else:
                    access = _global(instruction, addresses, cache, seen, l1_bytes)
                    ours = addresses and any(addresses[0] in place_of for place_of in common)
                    found[at, place] = replace(access, new=0) if ours else access
            if step is not None:
                for machine in lanes:
                    step(machine)
    return found


def _addresses(instruction: Instruction, lanes: list[Machine]) -> Iterator[int]:
    """Lower words of the addresses of the threads whose guard is not false."""
    inside = re.findall(r"\[([^\]]*)\]", instruction.operands)
    terms = inside[-1].split("+") if inside else []
    width = width_of(instruction.opcode)
    for lane, machine in enumerate(lanes):
        if instruction.guard and machine.predicate(instruction.guard) is False:
            continue
        values = [machine.read(term.strip().removesuffix(".X4")) for term in terms if term.strip()]
        known = [value for value in values if value is not None]
        yield sum(known) & 0xFFFFFFFF if len(known) == len(values) else lane * width


def _global(
    instruction: Instruction, addresses: list[int], cache: OrderedDict[int, None], seen: set[int], l1_bytes: int
) -> Access:
    if not addresses:
        return IDLE
    width = width_of(instruction.opcode)
    sectors = {address // SECTOR for address in addresses} | {(address + width - 1) // SECTOR for address in addresses}
    lines = len({sector * SECTOR // LINE for sector in sectors})
    fresh = sectors - seen
    seen |= sectors
    new = len(fresh) * SECTOR
    if instruction.kind == "STG":
        return Access(lines, new, len(sectors) * SECTOR)
    missed = 0
    for sector in sectors:
        if sector in cache:
            cache.move_to_end(sector)
        else:
            missed += SECTOR
            cache[sector] = None
            if len(cache) * SECTOR > l1_bytes:
                cache.popitem(last=False)
    return Access(lines, new, missed)


def _shared(instruction: Instruction, addresses: list[int]) -> Access:
    """A bank serves a word in a cycle, to all threads that read it."""
    if instruction.base in ("LDSM", "STSM"):
        return Access(int(instruction.opcode[-1]) if instruction.opcode[-1] in "24" else 1)
    width = width_of(instruction.opcode)
    words = {address // 4 + place for address in addresses for place in range(max(width // 4, 1))}
    return Access(max(Counter(word % BANKS for word in words).values())) if words else IDLE
