"""How often each block of a kernel runs: its control flow executed with real arguments, its floats unknown.

Loop counts of machine code cannot be read off the text: the assembler unrolls by itself. So one thread of program 0 is
stepped through: integers and predicates that follow from the arguments are computed (Kleene logic: false and unknown
is false), whatever comes from floating point or memory is unknown. A branch on an unknown stays inside the innermost
loop it can stay in (a matrix that never meets its tolerance), else leaves the code that calls a subroutine (the slow
path of a division) aside, else falls through; each such choice is counted in ``assumed``.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .integers import INTEGER_OPERATIONS
from .machine import Machine
from .sass import JUMPS, Instruction, Program, count

_PARAMETERS_AT = {"sm_80": 0x160, "sm_90": 0x210, "sm_100": 0x380}
_PROGRAMS_AT = {"sm_80": 0xC, "sm_90": 0xC, "sm_100": 0x370}
_PROGRAMS = 1 << 20  # so many that none comes to a second block of matrices
_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
_PREDICATE = re.compile(r"U?P[T0-9]+")
_MOST_BLOCKS = 10_000


@dataclass(frozen=True)
class Execution:
    """What ran.

    path: the blocks of the program in order. assumed: branches taken on an unknown condition.
    """

    program: Program
    path: tuple[int, ...]
    assumed: int

    @property
    def visits(self) -> tuple[int, ...]:
        """How often each block of the program runs."""
        times = Counter(self.path)
        return tuple(times[number] for number in range(len(self.program.blocks)))

    @property
    def counts(self) -> Counter[str]:
        """Instructions that one warp issues, by class."""
        total: Counter[str] = Counter()
        for block, visits in zip(self.program.blocks, self.visits, strict=True):
            for kind, number in count(block.instructions).items() if visits else ():
                total[kind] += number * visits
        return total


def parameter_words(signature: Mapping[str, Any], arguments: Mapping[str, Any], target: str) -> dict[int, int]:
    """Constant bank 0 as a launch of many programs fills it: 32-bit words by byte offset. Pointers are addresses."""
    data = bytearray()
    for kind, value in scalars((kind, arguments.get(name)) for name, kind in signature.items()):
        form = "Q" if kind.startswith("*") else _FORMATS[kind]
        data += bytes(-len(data) % struct.calcsize(form)) + struct.pack(form, value)
    data += bytes(-len(data) % 4)
    base = _PARAMETERS_AT[target]
    words = {base + 4 * index: word for index, (word,) in enumerate(struct.iter_unpack("I", data))}
    return {**words, _PROGRAMS_AT[target]: _PROGRAMS}


def scalars(arguments: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """Types and values of what is passed, tuples taken apart and constants left out."""
    for kind, value in arguments:
        if isinstance(kind, tuple):
            yield from scalars(zip(kind, value, strict=True))
        elif kind != "constexpr":
            yield kind, value


def execute(
    program: Program, parameters: Mapping[int, int], reductions: Iterable[int] = (), *, guessing: bool = False
) -> Execution | None:
    """Run the control flow; None when it does not end soon: a loop depends on data alone, or there is too much to step.

    reductions: what the warp's integer reductions find, in order; more than these are unknown. guessing: of what may be one of
    two, of which one is known, that one is taken.
    """
    return _Run(program, Machine(parameters, reductions, guessing)).finish()


class _Run:
    def __init__(self, program: Program, machine: Machine) -> None:
        self.program = program
        self.machine = machine
        deciding = _deciding(program)
        self.steps = [[step_of(i) for i in block.instructions if deciding & set(destinations(i))] for block in program.blocks]
        self.index = {block.instructions[0].address: number for number, block in enumerate(program.blocks)}
        self.loops = [
            sorted((loop for loop in program.loops if number in loop.blocks), key=lambda loop: -loop.depth)
            for number in range(len(program.blocks))
        ]
        self.assumed = 0
        self.returns: list[int] = []

    def finish(self) -> Execution | None:
        path: list[int] = []
        number: int | None = 0
        for _ in range(_MOST_BLOCKS):
            if number is None:
                return Execution(self.program, tuple(path), self.assumed)
            path.append(number)
            for step in self.steps[number]:
                step(self.machine)
            number = self._following(number)
        return None

    def _following(self, number: int) -> int | None:
        block = self.program.blocks[number]
        last = block.instructions[-1]
        base, following = last.base, self.index.get(last.address + 16)
        if base not in JUMPS:
            return following
        taken = self._taken(last)
        if base == "CALL":
            if taken is not False and following is not None:
                self.returns.append(following)
            return self.index[last.target] if taken is not False and last.target is not None else following
        if base in ("EXIT", "RET", "BRX"):
            end = self.returns.pop() if base == "RET" and self.returns and taken is not False else None
            return following if taken is False else end
        assert last.target is not None
        target = self.index[last.target]
        if taken is None:
            self.assumed += 1
            return self._choose(number, target, following)
        return target if taken else following

    def _taken(self, branch: Instruction) -> bool | None:
        guard = self.machine.predicate(branch.guard) if branch.guard else True
        if ".DIV" in branch.opcode:
            return False
        operand = re.match(r"!?U?P[T0-9]+", branch.operands)
        return _both(guard, self.machine.predicate(operand.group(0)) if operand else True)

    def _choose(self, number: int, target: int, following: int | None) -> int | None:
        for loop in self.loops[number]:
            stays = [s for s in (following, target) if s in loop.blocks]
            if len(stays) == 1:
                return stays[0]
        calls = [s is not None and self._calls(s) for s in (following, target)]
        return target if calls == [True, False] else following

    def _calls(self, number: int) -> bool:
        return any(i.opcode.startswith("CALL") for i in self.program.blocks[number].instructions)


def _both(a: bool | None, b: bool | None) -> bool | None:
    if a is False or b is False:
        return False
    return None if a is None or b is None else True


def step_of(instruction: Instruction) -> Callable[[Machine], None]:
    """The effect of one instruction on integers and predicates."""
    base, suffixes, operands = _parts(instruction)
    operation = INTEGER_OPERATIONS.get(base)
    written = destinations(instruction)

    def effect(machine: Machine) -> None:
        if operation is None or not operation(machine, suffixes, operands):
            machine.forget(written)

    if instruction.guard in ("", "PT", "UPT"):
        return effect

    def guarded(machine: Machine) -> None:
        condition = machine.predicate(instruction.guard)
        if condition is not False:
            before = machine.values(written)
            effect(machine)
            if condition is None:
                machine.forget(name for name, old in before.items() if machine.values([name])[name] != old)

    return guarded


def _parts(instruction: Instruction) -> tuple[str, list[str], list[str]]:
    base, *suffixes = instruction.opcode.split(".")
    return base, suffixes, [operand.strip().replace(".reuse", "") for operand in instruction.operands.split(",")]


def _deciding(program: Program) -> set[str]:
    """Registers and predicates that branches and guards may depend on; what others hold need not be followed."""
    return behind(program, set().union(*(mentioned(i) for i in program.instructions if i.base in JUMPS)))


def behind(program: Program, names: set[str]) -> set[str]:
    """``names`` of registers and predicates, and all that these may depend on."""
    effects = [(set(destinations(i)), mentioned(i)) for i in program.instructions]
    before = -1
    while len(names) != before:
        before = len(names)
        for written, read in effects:
            if written & names:
                names |= read
    return names


def mentioned(instruction: Instruction) -> set[str]:
    """Every register and predicate in the text; of wide operands the second register too."""
    text = f"{instruction.guard} {instruction.operands}"
    found = set(re.findall(r"U?P[0-9]", text))
    if every := re.search(r"\b(U?P)R\b", text):
        found |= {f"{every.group(1)}{index}" for index in range(7)}
    for prefix, number in re.findall(r"\b(U?R)(\d+)", text):
        found |= {f"{prefix}{int(number) + offset}" for offset in (0, 1)}
    return found


def destinations(instruction: Instruction) -> list[str]:
    """Registers and predicates that an instruction may write, wide results included."""
    base, suffixes, operands = _parts(instruction)
    if base in ("BAR", "R2P", "RET", "BRX", "BRA", "CALL", "EXIT", "WARPSYNC", "DEPBAR", "NANOSLEEP"):
        return [f"P{index}" for index in range(7)] if base == "R2P" else []
    first = next((place for place, operand in enumerate(operands) if not _PREDICATE.fullmatch(operand)), 0)
    written = operands[:first]
    found = re.fullmatch(r"(U?R)(\d+)(?:\.64)?", operands[first])
    if found and "SETP" not in base:
        prefix, number = found.group(1), int(found.group(2))
        written += [f"{prefix}{number + offset}" for offset in range(_width(base, suffixes))]
    if base in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD"):  # carries out follow the register
        written += [operand for operand in operands[first + 1 : first + 3] if _PREDICATE.fullmatch(operand)]
    return written


def _width(base: str, suffixes: list[str]) -> int:
    if base in ("HGMMA", "QGMMA"):
        shape = next((re.fullmatch(r"64x(\d+)x\d+", suffix) for suffix in suffixes if "x" in suffix), None)
        return int(shape.group(1)) // 2 if shape else 128
    if base in ("HMMA", "IMMA", "DMMA") or "128" in suffixes or base == "LDSM":
        return 4
    pair = {"64", "WIDE"} & set(suffixes) or "F64" in suffixes[:1]
    return 2 if pair or base[0] == "D" or base in ("CS2R", "FFMA2", "FADD2", "FMUL2") else 1
