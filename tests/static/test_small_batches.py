"""The benchmark of few matrices: what it times it checks first. Times are not tested."""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks import small_batches
from benchmarks.rows import BACKWARD, FORWARD


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_three_calls_in_rounds(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_batches, "_SECONDS", 0.0)
    row = small_batches.measured(2, 4, direction)
    assert (row.shape, row.direction, row.rounds) == ((2, 4, 4), direction, small_batches._ROUNDS // 10)
    assert min(row.fastdsm, row.logsumexp_loop, row.log_softmax_loop, row.ratio, row.ratio_of_minima) > 0


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_wrong_plan_is_not_timed(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Tensor) -> Tensor:
        return 1.001 * small_batches.log_softmax_loop(logits)

    monkeypatch.setattr(small_batches, "CALLS", (small_batches.CALLS[0], wrong, small_batches.CALLS[2]))
    with pytest.raises(AssertionError, match=r"wrong, .* 2 of 4x4: off by"):
        small_batches.measured(2, 4, direction)
