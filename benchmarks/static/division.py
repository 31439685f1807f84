"""The steps of an integer division: reciprocals in float32 that the integers after them correct."""

from __future__ import annotations

import struct

from .machine import MASK, Machine, signed


def absolute(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """IABS."""
    value = machine.read(operands[1])
    machine.write(operands[0], None if value is None else abs(signed(value)))
    return True


def to_float(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """I2F.RP, the first step of a division: the bits of the next float32 upwards."""
    value = machine.read(operands[1])
    if value is None or suffixes != ["RP"]:
        return False
    size = max(value.bit_length() - 24, 0)
    above = -(-value // (1 << size)) << size  # 24 bits are exact
    machine.write(operands[0], _bits(float(above)))
    return True


def reciprocal(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """MUFU.RCP of a known number, its second step, which may err in the last place: what follows corrects it."""
    value = machine.read(operands[1])
    if suffixes != ["RCP"] or not value:
        return False
    machine.write(operands[0], _bits(1.0 / _float(value)))
    return True


def to_integer(machine: Machine, suffixes: list[str], operands: list[str]) -> bool:
    """F2I.U32.TRUNC, its third."""
    value = machine.read(operands[1])
    if value is None or not {"U32", "TRUNC"} <= set(suffixes):
        return False
    machine.write(operands[0], int(min(max(_float(value), 0.0), float(MASK))))
    return True


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def _float(bits: int) -> float:
    found: float = struct.unpack("<f", bits.to_bytes(4, "little"))[0]
    return found
