"""Integer and predicate instructions of one thread, values unknown (None) unless they follow from the arguments.

Each operation gets the machine, the opcode's suffixes and its operands, writes what it can and returns whether it did;
what it did not write is forgotten by the caller. All arithmetic is modulo 2^32.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable
from itertools import product

from .division import absolute, reciprocal, to_float, to_integer
from .machine import MASK, Logical, Machine, Value, signed


def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P[T0-9]+", operand) is not None


def _split(operands: list[str]) -> tuple[str, list[str], list[str], list[str]]:
    """Destination, carry-out predicates, sources, carry-in predicates."""
    destination, rest = operands[0], operands[1:]
    outs: list[str] = []
    while rest and _is_predicate(rest[0]):
        outs.append(rest.pop(0))
    ins: list[str] = []
    while rest and _is_predicate(rest[-1]):
        ins.insert(0, rest.pop())
    return destination, outs, rest, ins


def _add(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    destination, outs, sources, ins = _split(operands)
    if "64" in suffixes:
        return False
    total = 0
    for source in sources:
        value = machine.read(source.lstrip("-"))
        if value is None:
            return False
        total += (~value & MASK) + 1 if source[0] == "-" else value
    for carry in ins if "X" in suffixes else []:
        truth = machine.predicate(carry)
        if truth is None:
            return False
        total += truth
    machine.write(destination, total)
    for place, out in enumerate(outs):
        machine.set(out, total > MASK if place == 0 else total >> 32 > 1)
    return True


def _multiply_add(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """IMAD: a b + c; WIDE and HI: of a pair c the pair, and its upper half."""
    destination, outs, sources, ins = _split(operands)
    if len(sources) != 3 or outs:
        return False
    a, b, c = (machine.read(source) for source in sources)
    known_zero = 0 in (a, b)
    if not known_zero and (a is None or b is None):
        return False
    with_sign = "U32" not in suffixes
    x, y = (0 if value is None else signed(value) if with_sign else value for value in (a, b))
    high = machine.read(sources[2], 1) if {"WIDE", "HI"} & set(suffixes) else 0
    carry = machine.predicate(ins[0]) if ins and "X" in suffixes else False
    if c is None or high is None or carry is None:
        return False
    total = x * y + (high << 32 | c) + carry
    if "WIDE" in suffixes:
        name = re.fullmatch(r"(U?R)(\d+)", destination)
        if name is None:
            return False
        machine.write(f"{name.group(1)}{int(name.group(2)) + 1}", total >> 32)
    machine.write(destination, total >> 32 if "HI" in suffixes else total)
    return True


def _shifted_add(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """LEA: (a << shift) + b; HI: b and the upper half of the shifted pair of a below c, or, SX32, below its sign."""
    destination, outs, sources, ins = _split(operands)
    a, b, *above, amount = (machine.read(source) for source in sources)
    carry = machine.predicate(ins[0]) if ins and "X" in suffixes else False
    if a is None or b is None or amount is None or carry is None or any("-" in source for source in sources):
        return False
    if "HI" in suffixes:
        high = -(a >> 31) if "SX32" in suffixes else above[0]
        if high is None:
            return False
        a = ((high << 32 | a) << amount >> 32) & MASK
    else:
        a = a << amount & MASK
    machine.write(destination, a + b + carry)
    for out in outs:
        machine.set(out, a + b + carry > MASK)
    return True


def _move(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    machine.write(operands[0], machine.read(operands[1]))
    return True


def _load_constant(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    name = re.fullmatch(r"(U?R)(\d+)", operands[0])
    if name is None:
        return False
    for offset in range(4 if "128" in suffixes else 2 if "64" in suffixes else 1):
        value = machine.read(operands[1], offset) if not {"U8", "S8", "U16", "S16"} & set(suffixes) else None
        machine.write(f"{name.group(1)}{int(name.group(2)) + offset}", value)
    return True


def _special(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """Of the thread, in program 0, which is a cluster by itself."""
    name = re.fullmatch(r"(U?R)(\d+)", operands[0])
    if name is None or not operands[1].startswith(("SR_TID", "SR_CTAID", "SR_CgaCtaId", "SRZ")):
        return False
    for offset in range(1 if "32" in suffixes or operands[1] != "SRZ" else 2):
        machine.write(f"{name.group(1)}{int(name.group(2)) + offset}", machine.lane if operands[1] == "SR_TID.X" else 0)
    return True


def _select(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    a, b = machine.read(operands[1]), machine.read(operands[2])
    choice = machine.predicate(operands[3])
    unknown = (b if a is None else a) if machine.guessing and None in (a, b) else a if a == b else None
    machine.write(operands[0], unknown if choice is None else a if choice else b)
    return True


def _extremum(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """IMNMX, VIMNMX and VIADDMNMX: the last predicate says minimum."""
    destination, _, sources, ins = _split(operands)
    values = [machine.read(source) for source in sources]
    smallest = machine.predicate(ins[0]) if ins else None
    if machine.guessing and smallest is not None and values[-1] is not None and None in values[:-1]:
        machine.write(destination, values[-1])
        return True
    if smallest is None or any(value is None for value in values):
        return False
    known = [value for value in values if value is not None]
    if len(known) == 3:
        known = [(known[0] + known[1]) & MASK, known[2]]
    key = (lambda value: value) if "U32" in suffixes else signed
    machine.write(destination, min(known, key=key) if smallest else max(known, key=key))
    return True


def _lookup(table: int, bits: Iterable[Logical]) -> Logical:
    """A truth table at bits of which some may be unknown: known when all completions agree."""
    choices = [(bit,) if bit is not None else (False, True) for bit in bits]
    results = {bool(table >> (a << 2 | b << 1 | c) & 1) for a, b, c in product(*choices)}
    return results.pop() if len(results) == 1 else None


def _logic(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """LOP3.LUT [P,] R, a, b, c, table, P: the predicate tells whether the result is not zero."""
    out = operands[0] if _is_predicate(operands[0]) else None
    destination, a, b, c, table = operands[1:6] if out else operands[:5]
    values = [machine.read(source) for source in (a, b, c)]
    result: Value = 0
    for bit in range(32):
        truth = _lookup(int(table, 16), [None if value is None else bool(value >> bit & 1) for value in values])
        if truth is None:
            result = None
            break
        result = (result or 0) | truth << bit
    if destination not in ("RZ", "URZ"):
        machine.write(destination, result)
    if out:
        machine.set(out, None if result is None else result != 0)
    return True


def _predicate_logic(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    bits = [machine.predicate(operand) for operand in operands[2:5]]
    for out, table in zip(operands[:2], operands[5:7], strict=True):
        machine.set(out, _lookup(int(table, 16), bits))
    return True


def _shift(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    low, amount, high = (machine.read(source) for source in operands[1:4])
    if amount is None:
        return False
    amount = amount & 63 if "W" in suffixes else min(amount, 63)
    if "R" in suffixes and "HI" in suffixes:
        if high is None:
            return False
        machine.write(operands[0], (signed(high) if "S32" in suffixes or "S64" in suffixes else high) >> amount)
    elif "L" in suffixes and "HI" not in suffixes:
        if low is None:
            return False
        machine.write(operands[0], low << amount)
    else:
        if low is None or high is None:
            return False
        pair = high << 32 | low
        machine.write(operands[0], pair >> amount if "R" in suffixes else pair << amount >> 32)
    return True


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_COMBINATIONS = {"AND": 0b11000000, "OR": 0b11111100, "XOR": 0b00111100}


def _compare(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """ISETP; FSETP, DSETP and HSETP2 too, whose comparison is unknown but may not matter."""
    combination = next((suffix for suffix in suffixes if suffix in _COMBINATIONS), None)
    if combination is None or len(operands) < 5:
        return False
    truth = _comparison(machine, suffixes, operands)
    other = machine.predicate(operands[4])
    table = _COMBINATIONS[combination]
    machine.set(operands[0], _lookup(table, (truth, other, False)))
    machine.set(operands[1], _lookup(table, (None if truth is None else not truth, other, False)))
    return True


def _comparison(machine: Machine, suffixes: list[str], operands: list[str]) -> Logical:
    a, b = machine.read(operands[2]), machine.read(operands[3])
    relation = _COMPARISONS.get(suffixes[0])
    if relation is None or a is None or b is None or {"64", "U64", "S64"} & set(suffixes):
        return None
    if "U32" not in suffixes:
        a, b = signed(a), signed(b)
    if "EX" not in suffixes:
        return relation(a, b)
    lower = machine.predicate(operands[5])
    if a != b:
        return relation(a, b)
    return lower


def _float_compare(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    return _compare(machine, ["unknown", *suffixes[1:]], operands)


def _vote(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """All threads are taken to agree with thread 0."""
    outs = [operand for operand in operands[:-1] if _is_predicate(operand)]
    registers = [operand for operand in operands[:-1] if not _is_predicate(operand)]
    truth = machine.predicate(operands[-1])
    for out in outs:
        machine.set(out, truth)
    for register in registers:
        if register not in ("RZ", "URZ"):
            machine.write(register, None if truth is None else MASK * truth)
    return True


def _from_predicates(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """P2R Rd, PR, Ra, mask: predicates into the bits of the mask, of one byte if a suffix such as B1 says so."""
    base, mask = machine.read(operands[2]), machine.read(operands[3])
    prefix, shift = operands[1].removesuffix("R"), _byte_shift(suffixes)
    if base is None or mask is None:
        return False
    for index in range(7):
        if mask >> index & 1:
            bit = machine.predicate(f"{prefix}{index}")
            if bit is None:
                return False
            base = base & ~(1 << index + shift) | bit << index + shift
    machine.write(operands[0], base)
    return True


def _to_predicates(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """R2P PR, Ra, mask; Ra may end in a byte such as .B1."""
    source, *part = operands[1].split(".")
    value, mask, shift = machine.read(source), machine.read(operands[2]), _byte_shift(part)
    if mask is None:
        return False
    for index in range(7):
        if mask >> index & 1:
            machine.set(f"P{index}", None if value is None else bool(value >> index + shift & 1))
    return True


def _byte_shift(suffixes: list[str]) -> int:
    return next((8 * int(suffix[1]) for suffix in suffixes if re.fullmatch(r"B[0-3]", suffix)), 0)


def _granted(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """No wait is long: a barrier has completed, tensor memory is free, and the elected thread is this one."""
    if not ({"TRYWAIT", "FIND_AND_SET"} & set(suffixes) or operands[1:2] == ["URZ"]):
        return False
    machine.set(operands[0], True)
    return True


def _reduction(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    machine.write(operands[0], next(machine.reductions, None))
    return True


def _shuffle(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    return machine.guessing and _move(machine, suffixes, operands[1:])


def _extend(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """SGXT Rd, Ra, width: the low bits, sign-extended."""
    value, width = machine.read(operands[1]), machine.read(operands[2])
    if value is None or not width or width > 32:
        return False
    value &= (1 << width) - 1
    negative = "U32" not in suffixes and value >> (width - 1)
    machine.write(operands[0], value - (1 << width) if negative else value)
    return True


def _half_constant(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """HFMA2 Rd, -RZ, RZ, a, b moves the bits of two halves, which may be those of any constant."""
    halves = operands[3:5]
    plain = all(re.fullmatch(r"-?[0-9.]+(e[+-]?[0-9]+)?", half) for half in halves)
    if "BF16" in suffixes or operands[1:3] != ["-RZ", "RZ"] or not plain:
        return False
    high, low = (int.from_bytes(struct.pack("<e", float(half)), "little") for half in halves)
    machine.write(operands[0], high << 16 | low)
    return True


Operation = Callable[[Machine, list[str], list[str]], bool]

INTEGER_OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD", "UVIADD", "IADD"), _add),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply_add),
    **dict.fromkeys(("LEA", "ULEA"), _shifted_add),
    **dict.fromkeys(("MOV", "UMOV", "R2UR", "MOV32I"), _move),
    **dict.fromkeys(("LDC", "ULDC", "LDCU"), _load_constant),
    **dict.fromkeys(("S2R", "S2UR", "CS2R", "CS2UR"), _special),
    **dict.fromkeys(("SEL", "USEL"), _select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "UIMNMX", "UVIMNMX", "VIADDMNMX", "UVIADDMNMX"), _extremum),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("ISETP", "UISETP"), _compare),
    **dict.fromkeys(("FSETP", "DSETP", "HSETP2"), _float_compare),
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    **dict.fromkeys(("SYNCS", "UTCATOMSWS", "ELECT"), _granted),
    **dict.fromkeys(("SGXT", "USGXT"), _extend),
    **dict.fromkeys(("P2R", "UP2UR"), _from_predicates),
    "R2P": _to_predicates,
    "IABS": absolute,
    "I2F": to_float,
    "MUFU": reciprocal,
    "F2I": to_integer,
    "SHFL": _shuffle,
    "REDUX": _reduction,
    "HFMA2": _half_constant,
}
