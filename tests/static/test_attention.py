"""The machine code of the attention kernels: nothing spills, and an exponential is taken once for each logit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.static.compilation import compile_configuration, disassemble, kernel_name
from fastdsm.kernels.attention import launch as attention

from ..uninterpreted import rows_of


def _machine_code() -> list[dict[str, Any]]:
    """Numbers for sm_90 of what bfloat16 of 64 features launches, plain. In a process of its own: see ``rows``."""
    rows = []
    for configuration in attention.configurations():
        constants = configuration.constants
        if configuration.label.startswith("bf16") and constants["BLOCK_D"] == 64 and not constants.get("ENTRIES", False):
            if constants.get("HAS_DROPOUT", False) or "sm_90" not in configuration.targets:
                continue
            resources, sass = disassemble(compile_configuration(configuration, "sm_90").cubin)
            row = {"kernel": kernel_name(configuration), "kind": constants.get("KIND", ""), **asdict(resources)}
            logits = constants["BLOCK_L"] * constants["BLOCK_S"] // (32 * configuration.num_warps)
            rows.append({**row, "exponentials": sass.count("MUFU.EX2") / logits, "hgmma": sass.count("HGMMA")})
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return rows_of(__name__, "_machine_code")


def test_no_kernel_spills_and_all_use_tensor_cores(rows: list[dict[str, Any]]) -> None:
    assert len({row["kernel"] for row in rows}) == 7
    assert [row for row in rows if row["stack"] or row["local"] or not row["hgmma"]] == []


def test_a_half_sweep_takes_one_exponential_per_logit(rows: list[dict[str, Any]]) -> None:
    taken = [row["exponentials"] for row in rows if row["kind"] in ("bounded", "weighted") or "attend" in row["kernel"]]
    assert len(taken) == 5
    assert set(taken) == {1.0}


def test_a_whole_sweep_takes_no_more(rows: list[dict[str, Any]]) -> None:
    taken = [row["exponentials"] for row in rows if "whole" in row["kernel"]]
    assert len(taken) == 6
    assert set(taken) == {1.0}
