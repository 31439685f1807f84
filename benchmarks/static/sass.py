"""SASS text as instructions, basic blocks and natural loops.

Blocks come from the branches, loops from back edges u -> v where v dominates u: an assembler also moves cold code to
the end and jumps back from there, and such a jump is no loop.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

JUMPS = frozenset({"BRA", "BRX", "JMP", "CALL", "RET", "EXIT"})
"""Opcodes after which another block begins."""

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);"
    r"(?:\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/)?",
    re.MULTILINE,
)
_ADDRESS = re.compile(r"(?:^|[\s(])`?\(?(0x[0-9a-f]+)\)?\s*$")

# First match wins; opcodes are compared without their suffixes.
_CLASSES = (
    ("FFMA", r"FFMA"),
    ("FMUL", r"FMUL"),
    ("FADD", r"FADD"),
    ("FMNMX", r"FMNMX"),
    ("FSEL/FSETP", r"FSEL|FSET|FCHK|FSWZADD"),
    ("MUFU", r"MUFU"),
    ("FP64", r"DFMA|DMUL|DADD|DMNMX|DSET"),
    ("HGMMA", r"HGMMA|QGMMA"),
    ("MMA", r"HMMA|UTC.*MMA|IMMA|DMMA|WARPGROUP"),
    ("HALF", r"HFMA2|HADD2|HMUL2|HSET|HMNMX"),
    ("SHFL", r"SHFL|REDUX|CREDUX"),
    ("BAR", r"BAR|SYNCS|DEPBAR|LDGDEPBAR|MEMBAR|ERRBAR|UCGABAR.*|UTCBAR"),
    ("LDS", r"LDS|LDSM|LDTM"),
    ("STS", r"STS|STSM|STTM|ATOMS"),
    ("LDG", r"LDG|LD|LDGSTS|UBLKCP"),
    ("STG", r"STG|ST|RED|ATOM|ATOMG"),
    ("LDL", r"LDL"),
    ("STL", r"STL"),
    ("CONVERT", r"F2F|F2FP|F2I|I2F|FRND|I2FP|I2I|F2IP"),
    ("BRANCH", r"BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|YIELD|NANOSLEEP"),
    ("NOP", r"NOP"),
)
_CLASS_PATTERNS = tuple((name, re.compile(rf"(?:{pattern})(?:2|4)?$")) for name, pattern in _CLASSES)


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction.

    guard: its predicate such as "P0" or "!UP1", empty without one. control: the bits of its encoding from the 105th on, by
    which the assembler schedules it; 0 where the text has no encoding.
    """

    address: int
    guard: str
    opcode: str
    operands: str
    control: int = 0

    @property
    def base(self) -> str:
        """Opcode without suffixes."""
        return self.opcode.split(".", 1)[0]

    @property
    def kind(self) -> str:
        """Its class: FFMA, MUFU, SHFL, ...; integer and move instructions are "OTHER"."""
        base = self.base
        if base in ("FSETP", "DSETP", "HSETP2"):
            base = base[0] + "SET"
        if base == "HFMA2" and self.operands.split(", ")[1:3] == ["-RZ", "RZ"]:
            return "OTHER"  # how the assembler moves a constant
        return next((name for name, pattern in _CLASS_PATTERNS if pattern.match(base)), "OTHER")

    @property
    def target(self) -> int | None:
        """Address that a branch or call goes to, if the text names one."""
        if self.base not in ("BRA", "CALL", "JMP"):
            return None
        found = _ADDRESS.search(self.operands)
        return int(found.group(1), 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether a branch may fall through: guarded, or with a predicate among its operands."""
        if self.guard not in ("", "PT", "UPT"):
            return True
        return re.match(r"!?U?P[0-9]|UR|DIV", self.operands) is not None or ".DIV" in self.opcode


@dataclass(frozen=True)
class Block:
    """Straight-line code ``instructions`` (never empty) and the indices of the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: its ``header`` block, all its ``blocks``, and its ``depth``, 1 for an outermost one."""

    header: int
    blocks: frozenset[int]
    depth: int


@dataclass(frozen=True)
class Program:
    """Reachable code of one kernel; block 0 is the entry."""

    blocks: tuple[Block, ...]
    loops: tuple[Loop, ...]

    @property
    def instructions(self) -> list[Instruction]:
        """All reachable instructions in order of address."""
        return [instruction for block in self.blocks for instruction in block.instructions]

    def innermost(self) -> list[Loop]:
        """Loops that hold no other."""
        return [loop for loop in self.loops if not any(other.blocks < loop.blocks for other in self.loops)]

    def body(self, loop: Loop) -> Counter[str]:
        """Instructions of a loop by class, those of inner loops included, each counted once."""
        return count(instruction for index in sorted(loop.blocks) for instruction in self.blocks[index].instructions)


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """Instructions by class; NOPs, padding at the end, are left out."""
    return Counter(kind for kind in (instruction.kind for instruction in instructions) if kind != "NOP")


def parse(text: str) -> Program:
    """Read the output of ``cuobjdump -sass`` for one kernel."""
    instructions = [
        Instruction(int(address, 16), guard or "", opcode, operands.strip(), int(word or "0", 16) >> 41)
        for address, guard, opcode, operands, word in _LINE.findall(text)
    ]
    if not instructions:
        raise ValueError(f"expected SASS instructions, got {text[:200]!r}")
    blocks = _reachable(_blocks(instructions))
    return Program(blocks, _loops(blocks))


def _blocks(instructions: list[Instruction]) -> list[Block]:
    starts = {instructions[0].address}
    for here, following in pairwise(instructions):
        if here.base in JUMPS:
            starts.add(following.address)
        if here.target is not None:
            starts.add(here.target)
    groups: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.address in starts:
            groups.append([])
        groups[-1].append(instruction)
    index = {group[0].address: number for number, group in enumerate(groups)}
    blocks = []
    for number, group in enumerate(groups):
        last = group[-1]
        follows = [number + 1] if number + 1 < len(groups) else []
        if last.base in ("EXIT", "RET", "BRX"):
            successors = follows if last.conditional else []
        elif last.target is not None:
            successors = [index[last.target]]
            if last.conditional or last.base == "CALL":
                successors += follows
        else:
            successors = follows
        blocks.append(Block(tuple(group), tuple(dict.fromkeys(successors))))
    return blocks


def _reachable(blocks: list[Block]) -> tuple[Block, ...]:
    seen, stack = {0}, [0]
    while stack:
        for successor in blocks[stack.pop()].successors:
            if successor not in seen:
                seen.add(successor)
                stack.append(successor)
    number = {old: new for new, old in enumerate(sorted(seen))}
    return tuple(Block(blocks[old].instructions, tuple(number[s] for s in blocks[old].successors)) for old in number)


def _predecessors(blocks: tuple[Block, ...]) -> list[list[int]]:
    predecessors: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(number)
    return predecessors


def _dominators(blocks: tuple[Block, ...]) -> list[frozenset[int]]:
    predecessors = _predecessors(blocks)
    every = frozenset(range(len(blocks)))
    dominators = [frozenset([0]), *[every] * (len(blocks) - 1)]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            common = frozenset.intersection(*(dominators[p] for p in predecessors[number])) | {number}
            if common != dominators[number]:
                dominators[number], changed = common, True
    return dominators


def _loops(blocks: tuple[Block, ...]) -> tuple[Loop, ...]:
    predecessors = _predecessors(blocks)
    dominators = _dominators(blocks)
    bodies: dict[int, set[int]] = {}
    for tail, block in enumerate(blocks):
        for header in block.successors:
            if header in dominators[tail]:
                body = bodies.setdefault(header, {header})
                stack = [tail]
                while stack:
                    number = stack.pop()
                    if number not in body:
                        body.add(number)
                        stack.extend(predecessors[number])
    return tuple(
        Loop(header, frozenset(body), sum(body <= other for other in bodies.values()))
        for header, body in sorted(bodies.items())
    )
