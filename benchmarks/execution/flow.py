"""Control flow: basic blocks, which conditions decide it, and in which order lanes that have parted come together again."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .elements import i4
from .parsing import Instruction

_LEAVING = ("ret", "exit", "trap")


@dataclass
class Block:
    """Instructions up to the first that may leave it; a barrier is a block of its own. functions: translations, by masked."""

    index: int
    instructions: list[Instruction]
    barrier: bool = False
    functions: dict[bool, Any] = field(default_factory=dict)


def blocks_of(statements: list[str | Instruction]) -> tuple[list[Block], dict[str, int]]:
    """Basic blocks, and those that labels stand before."""
    used = {i.operands[-1] for i in statements if isinstance(i, Instruction) and i.parts[0] == "bra"}
    labels: dict[str, int] = {}
    blocks: list[Block] = []
    current: list[Instruction] = []

    def close() -> None:
        nonlocal current
        if current:
            blocks.append(Block(len(blocks), current))
            current = []

    for statement in statements:
        if isinstance(statement, str):
            if statement in used:
                close()
                labels[statement] = len(blocks)
        elif (statement.parts[0] == "bar" and statement.parts[1] != "warp") or statement.parts[0] == "barrier":
            close()
            blocks.append(Block(len(blocks), [statement], barrier=True))
        else:
            current.append(statement)
            if statement.parts[0] in ("bra", *_LEAVING):
                close()
    close()
    return blocks, labels


def deciding(blocks: list[Block], registers: Container[str]) -> set[str]:
    """Predicates that decide branches, by themselves or joined with others."""
    instructions = [i for block in blocks for i in block.instructions]
    found = {i.predicate[0] for i in instructions if i.parts[0] == "bra" and i.predicate}
    joins = [i for i in instructions if i.parts[-1] == "pred" and i.parts[0] in ("and", "or", "xor", "not", "mov")]
    more = True
    while more:
        joined = {x for i in joins if i.operands[0] in found for x in i.operands[1:] if x in registers}
        more = not joined <= found
        found |= joined
    return found


def ranks(blocks: list[Block], labels: dict[str, int]) -> np.ndarray:
    """The rank of each block: a branch's sides come before where they meet, and a loop before what follows it.

    Reverse post-order of a depth-first search that follows edges out of loops first. Block numbers will not do: compilers
    move rare blocks behind all others.
    """
    successors = [[x for x in _successors(block, labels) if x < len(blocks)] for block in blocks]
    loops = _loops(successors)
    within = [{header for header, body in loops.items() if b in body} for b in range(len(blocks))]

    def leaving_first(b: int) -> list[int]:
        return sorted(successors[b], key=lambda x: len(within[x] & within[b]))

    seen, order = {0}, []
    stack = [(0, iter(leaving_first(0)))]
    while stack:
        b, rest = stack[-1]
        step = next((x for x in rest if x not in seen), None)
        if step is None:
            order.append(b)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(leaving_first(step))))
    rank = np.full(len(blocks) + 1, len(blocks) + 1, i4)
    rank[order[::-1]] = np.arange(len(order))
    return rank


def _successors(block: Block, labels: dict[str, int]) -> list[int]:
    last = block.instructions[-1]
    to = [labels[last.operands[-1]]] if last.parts[0] == "bra" else []
    if last.parts[0] not in ("bra", *_LEAVING) or last.predicate is not None:
        to.append(block.index + 1)
    return to


def _loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Blocks of each natural loop, by its header."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for b, to in enumerate(successors):
        for x in to:
            predecessors[x].append(b)
    dominators = _dominators(predecessors)
    loops: dict[int, set[int]] = {}
    for b, to in enumerate(successors):
        for header in to:
            if header in dominators[b]:
                body, stack = loops.setdefault(header, {header}), [b]
                while stack:
                    x = stack.pop()
                    if x not in body:
                        body.add(x)
                        stack += predecessors[x]
    return loops


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    count = len(predecessors)
    dominators = [{0}] + [set(range(count)) for _ in range(count - 1)]
    changed = True
    while changed:
        changed = False
        for b in range(1, count):
            new = {b} | (set.intersection(*(dominators[p] for p in predecessors[b])) if predecessors[b] else set())
            if new != dominators[b]:
                dominators[b], changed = new, True
    return dominators
