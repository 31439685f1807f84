"""A multiprocessor at work: programs of warps that issue in order, as the assembler has scheduled them.

Every instruction says how many cycles its warp waits after it, which of six counters it raises until its result is there or its
operands are read, and for which of them it waits; so latencies of fixed length are in the code, and of the others it is known
who waits for whom. Warps take turns by who has been ready longest. What is not modelled: instruction caches, banks of registers
and of shared memory, divergence, how memory orders its requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from .accesses import IDLE, Access, accesses
from .devices import Device
from .execution import Execution
from .pipes import BARRIER, COMMITS, COPIED, GLOBAL, ISSUE, PIPES, READ_LATENCY, SHARED, Use, use_of
from .sass import Instruction

_PARTS = 4
_HANDED_OVER = 2  # cycles in which a part hands an instruction over to what it shares with the others
_NONE = 7  # no counter
COPIES, PRODUCTS = 6, 8  # what stands for a counter of copies to shared memory, and of a warpgroup's products
_COUNTERS = 9
_OUTSTANDING = 600.0  # cycles of work that memory holds likewise: about its latency
_QUEUE = 32.0  # cycles of work that the pipe of shared memory holds before a warp has to wait with issuing more


Step = tuple[int, float, float, int, int, int, int, float, float]


def steps_of(
    run: Execution, parameters: Mapping[int, int], warps: int, device: Device, common: Sequence[range] = ()
) -> list[Step]:
    """Pipe, its cycles, latency, stall, counters waited for, raised by the result and by reading, cycles of memory and of L2.

    warps: on the multiprocessor at a time, which share its L1. common: lower words of addresses that all programs read.
    """
    moved = accesses(run, parameters, device.l1_bytes // warps, common)
    found: list[Step] = []
    of_block: dict[int, list[tuple[int, Use, tuple[int, int, int, int]]]] = {}
    for at, number in enumerate(run.path):
        if number not in of_block:
            numbered = enumerate(run.program.blocks[number].instructions)
            of_block[number] = [(place, use_of(i), _scheduled(i)) for place, i in numbered if i.kind != "NOP"]
        for place, use, scheduled in of_block[number]:
            access = moved.get((at, place))
            if access is None:
                found.append((use.pipe, use.cycles, use.latency or 0.0, *scheduled, 0.0, 0.0))
            elif access is IDLE:
                found.append((ISSUE, 1, 1.0, *scheduled, 0.0, 0.0))
            else:
                found.append((use.pipe, access.cycles, _latency(use, access, device), *scheduled, *_traffic(access, device)))
    return found


def _scheduled(instruction: Instruction) -> tuple[int, int, int, int]:
    control = instruction.control
    waits, result = control >> 11 & 63, control >> 5 & 7
    if instruction.base == "LDGSTS":
        result = COPIES
    elif instruction.base == "HGMMA":
        result = PRODUCTS
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        waits |= 1 << PRODUCTS
    return max(control & 15, 1), waits, result, control >> 8 & 7


def _latency(use: Use, access: Access, device: Device) -> float:
    if use.pipe == SHARED:
        return device.shared_latency
    if access.new:
        return device.memory_latency
    return device.l2_latency if access.sent else device.l1_latency


def _traffic(access: Access, device: Device) -> tuple[float, float]:
    """Cycles of this multiprocessor's share of memory, and of L2."""
    share = device.multiprocessors * device.clock_ghz
    return access.new * share / device.memory, access.sent * share / device.l2


def cycles(steps: Sequence[Step], warps: int, programs: int, resident: int) -> float:
    """Until ``programs`` programs of ``warps`` warps, ``resident`` at a time, are done on one multiprocessor."""
    resident = min(resident, programs)
    issue, own = [0.0] * _PARTS, [[0.0] * PIPES for _ in range(_PARTS)]  # when each part, and each pipe of it, is free
    all_memory = memory = l2 = 0.0  # when the pipe to any memory is free, and this multiprocessor's share of two
    counters = [[0.0] * _COUNTERS for _ in range(warps * resident)]  # of each warp, when they will be down
    copied: list[list[float]] = [[] for _ in range(warps * resident)]  # of each warp, when each group of copies is there
    place = [0] * (warps * resident)
    left, running = programs - resident, [warps] * resident
    at_barrier: list[list[int]] = [[] for _ in range(resident)]
    ready = [(float(warp // warps), 0.0, warp) for warp in range(warps * resident)]  # who may go when, and since when
    end = 0.0
    while ready:
        at, since, warp = heapq.heappop(ready)
        part, slot = warp % _PARTS, warp // warps
        pipe, busy, latency, stall, _, result, reading, new, sent = steps[place[warp]]
        moves = pipe in (SHARED, GLOBAL)
        start = max(at, issue[part], own[part][pipe])
        if moves:
            start = max(start, all_memory - _QUEUE)
            if sent:
                start = max(start, memory - _OUTSTANDING, l2 - _OUTSTANDING)
        if start > at and ready and ready[0][0] < start:
            heapq.heappush(ready, (start, since, warp))  # another one comes first
            continue
        issue[part] = start + 1
        own[part][pipe] = start + (_HANDED_OVER if moves else busy)
        done, read = start + latency, start + READ_LATENCY
        if moves:
            all_memory = max(all_memory, start) + busy
            done, read = all_memory + latency, all_memory + READ_LATENCY
            if sent:
                l2 = max(l2, start) + sent
                memory = max(memory, start) + new
                done = max(l2, memory if new else 0.0) + latency
        of_warp = counters[warp]
        if result != _NONE:
            of_warp[result] = max(of_warp[result], done)
        if reading != _NONE:
            of_warp[reading] = max(of_warp[reading], read)
        place[warp] += 1
        following = start + stall
        if pipe == COMMITS:
            copied[warp].append(max(of_warp[COPIES], *copied[warp][-1:], 0.0))
        elif pipe == COPIED and len(copied[warp]) > latency:
            following = max(following, copied[warp][-1 - int(latency)])
        if place[warp] == len(steps):
            end = max(end, following)
            running[slot] -= 1
            if not running[slot] and left:
                left -= 1
                running[slot] = warps
                for other in range(slot * warps, (slot + 1) * warps):
                    place[other], counters[other], copied[other] = 0, [0.0] * _COUNTERS, []
                    heapq.heappush(ready, (following, following, other))
        elif pipe == BARRIER:
            at_barrier[slot].append(warp)
            if len(at_barrier[slot]) == warps:
                for other in at_barrier[slot]:
                    then = _ready(start + latency, steps[place[other]][4], counters[other])
                    heapq.heappush(ready, (then, then, other))
                at_barrier[slot] = []
        else:
            then = _ready(following, steps[place[warp]][4], of_warp)
            heapq.heappush(ready, (then, then, warp))
    return end


def _ready(at: float, waits: int, counters: Sequence[float]) -> float:
    """When the counters that the next instruction waits for are down."""
    if waits:
        for number in range(_COUNTERS):
            if waits >> number & 1 and counters[number] > at:
                at = counters[number]
    return at
