"""The README's short table: every number from the rows, losses told, and no case that is shown without a row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import headline, replaced, report
from benchmarks.headline import MILLION, SHOWN
from benchmarks.rows import RESULTS, Row, Run, read_rows
from benchmarks.targets import FLASH

RUNS = {
    "cpu": Run("cpu", "A Processor", 2, {"torch": "2.13.0"}, "abc1234", "2026-01-02T03:04:05+00:00"),
    "cuda": Run("cuda", "NVIDIA H100 80GB HBM3", 2, {"torch": "2.11.0"}, "abc1234", "2026-01-03T03:04:05+00:00"),
}
SECONDS = {"fastdsm": 0.01, "eager": 0.08, "clone": 0.005}


def records() -> dict[str, list[Row]]:
    """Every case that is shown, eight times faster than eager, five times than everybody else."""
    rows: dict[str, list[Row]] = {"cpu": [], "cuda": []}
    for shown in SHOWN:
        for name in (*SECONDS, *shown.peers[1:]):
            seconds = SECONDS.get(name, 0.05)
            case = (shown.operation, shown.shape, "float32", 20, shown.direction, name, "call", "definition", seconds, seconds)
            rest = (None, 5, 8_000_000, 25.0, 4_000_000, 9_000_000, 16384, 2e-7, None, 0.08 / seconds, None, None)
            rows[shown.device].append(Row(*case, *rest, RUNS[shown.device]))
    return rows


def changed(name: str, at: int = 0, **changes: object) -> dict[str, list[Row]]:
    """With the row of this implementation in the case shown at this place changed."""
    shown, rows = SHOWN[at], records()
    rows[shown.device] = [
        replace(row, **changes)
        if (row.implementation, row.operation, row.shape, row.direction)
        == (name, shown.operation, shown.shape, shown.direction)
        else row
        for row in rows[shown.device]
    ]
    return rows


def test_every_number_is_from_the_rows() -> None:
    lines = headline.section(changed("fastdsm", seconds_median=0.02, ratio_to_eager=4.0)).splitlines()
    assert len(lines) - 6 == len(SHOWN)
    assert (
        lines[2]
        == "| H100 | `sinkhorn` | 1,048,576 of 4 × 4 | forward | 20 ms | eager 4.0, hyper-connections 2.5, GeomLoss 2.5 |"
    )
    assert lines[9] == "| CPU | `sigma2` | 128 of 64 × 64 | forward | 10 ms | eager 8.0, eigvalsh 5.0 |"
    assert "NVIDIA H100 80GB HBM3, torch 2.11.0, 2026-01-03; A Processor, 2 threads, torch 2.13.0, 2026-01-02. " in lines[11]
    assert lines[-1] == "Lost: nothing that was measured."


def test_times_in_graphs_are_compared_where_both_have_one() -> None:
    rows = changed("fastdsm", device_seconds=1e-4, device_ratio_to_eager=123.0)
    assert "| 10 ms (100 µs) | eager 123, hyper-connections 5.0, GeomLoss 5.0 |" in headline.section(rows)
    key = ("GeomLoss", MILLION.shape, MILLION.direction)
    both = [replace(x, device_seconds=2e-3) if (x.implementation, x.shape, x.direction) == key else x for x in rows["cuda"]]
    assert "| 10 ms (100 µs) | eager 123, hyper-connections 5.0, GeomLoss 20 |" in headline.section(rows | {"cuda": both})


def test_a_loss_is_told_in_the_table_and_in_words() -> None:
    text = headline.section(changed("POT", at=6, seconds_median=0.005))
    assert "**POT 0.50**, GeomLoss 5.0 |" in text
    assert text.endswith("as above:\n\n- CPU: `sinkhorn` of 65,536 of 4 × 4, with backward (POT 0.50).")


def test_a_loss_that_is_not_shown_is_told() -> None:
    rows = records()
    rows["cpu"] += [replace(row, shape=(3, 5, 5), ratio_to_eager=0.25) for row in rows["cpu"][-4:-1]]
    text = headline.section(rows)
    assert "3 of 5 × 5 |" not in text
    assert text.endswith("- CPU: `sigma2` of 3 of 5 × 5 (eager 0.25).")


def test_flash_attention_is_told_beside_the_losses() -> None:
    rows = records()
    group = [row for row in rows["cuda"] if row.operation == "sinkhorn_attention"][:4]  # of one case
    at = rows["cuda"].index(group[-1])
    rows["cuda"].insert(at, replace(group[-1], implementation=FLASH, seconds_median=0.001))
    assert headline.section(rows).endswith(
        "- PyTorch's flash attention, which is of softmax, another function: 0.10 to 0.10 times."
    )


def test_a_peer_that_was_left_out_is_an_error() -> None:
    with pytest.raises(ValueError, match="no time of POT"):
        headline.section(changed("POT", at=6, seconds_median=None, left_out="failed"))


@pytest.mark.parametrize("at", range(len(SHOWN)))
@pytest.mark.parametrize("name", ["fastdsm", "eager"])
def test_a_missing_row_is_an_error(at: int, name: str) -> None:
    shown, rows = SHOWN[at], records()
    key = (shown.operation, shown.shape, shown.direction, name)
    rows[shown.device] = [x for x in rows[shown.device] if (x.operation, x.shape, x.direction, x.implementation) != key]
    with pytest.raises(ValueError, match="the README shows"):
        headline.section(rows)
    with pytest.raises(ValueError, match="the README shows"):
        headline.section({device: x for device, x in records().items() if device != shown.device})


def test_the_sentence_at_the_top() -> None:
    rows = changed("fastdsm", device_seconds=1e-4, device_ratio_to_eager=123.0)
    key = ("clone", MILLION.shape, MILLION.direction)
    rows["cuda"] = [
        replace(x, device_seconds=8e-5) if (x.implementation, x.shape, x.direction) == key else x for x in rows["cuda"]
    ]
    assert headline.proof(rows) == (
        "1,048,576 matrices of 4 × 4 take 100 µs for 20 sweeps on an H100, in a CUDA graph: 123 times faster than the "
        "eager loop, 1.2 times as long as a copy of the same bytes."
    )
    with pytest.raises(ValueError, match="the README shows"):
        headline.proof(records())


def test_the_pages_are_what_the_committed_rows_say() -> None:
    rows = {path.stem: read_rows(path) for path in (RESULTS / "cpu.jsonl", *sorted(RESULTS.glob("cuda*.jsonl")))}
    text = report.README.read_text(encoding="utf-8")
    assert f"\n{headline.proof(rows)}\n" in text
    assert f"\n{headline.section(rows, replaced.losses(replaced.read()))}\n" in text
    assert text.count("\n") < 120
    page = report.PERFORMANCE.read_text(encoding="utf-8")
    for name, of_device in rows.items():
        assert f"\n{report.section(of_device, f'results/{name}-speedup.png')}\n" in page
        assert (report.PERFORMANCE.parent / "results" / f"{name}-speedup.png").is_file()
