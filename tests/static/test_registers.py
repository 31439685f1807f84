"""The machine code of the register kernels: packed matrices cross memory in pieces of 16 bytes, whatever their size."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.static.compilation import compile_configuration, disassemble
from fastdsm.kernels.registers import launch as registers

from ..uninterpreted import rows_of


def _crossings() -> list[dict[str, Any]]:
    """Accesses to memory of a thread of each packed forward, sm_90. In a process of its own."""
    rows = []
    for configuration in registers.configurations():
        constants = configuration.constants
        if not constants.get("PACKED") or constants.get("WITH_INFO", True) or constants["WITH_SIGMA2"]:
            continue
        sass = disassemble(compile_configuration(configuration, "sm_90").cubin)[1]
        accesses = re.findall(r"\b(LDG|LDGSTS|STG)(\.\S+)", sass)
        rows.append(
            {
                "label": configuration.label,
                "pieces": constants["LINES"] ** 2 * (4 if configuration.pointers["logits_ptr"] == "fp32" else 2) / 16,
                "stored": sum(name == "STG" and ".128" in kind for name, kind in accesses),
                "loaded": sum(name != "STG" and ".128" in kind for name, kind in accesses),
                "narrow": sum(".128" not in kind for _, kind in accesses),
            }
        )
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return rows_of(__name__, "_crossings")


def test_packed_matrices_cross_in_pieces_of_16_bytes(rows: list[dict[str, Any]]) -> None:
    """Beside them: the temperature, and in each of three passes what is no whole piece at the end of a run."""
    assert len(rows) == 15
    for row in rows:
        assert row["pieces"] <= row["stored"] < row["pieces"] + 1, row
        assert row["loaded"] >= row["stored"], row
        assert row["narrow"] <= 4, row
