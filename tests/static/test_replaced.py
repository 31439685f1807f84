"""The table of loops that calls replace: each case once, every loss in bold and in the README."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import replaced, report
from benchmarks.origins import OriginRow
from benchmarks.rows import BACKWARD, FORWARD, Run

RUN = Run("cpu", "A Processor", 1, {"torch": "2.13.0"}, "abc1234", "2026-01-02T03:04:05+00:00")
LATER = replace(RUN, threads=2, commit="def5678", date="2026-01-05T00:00:00+00:00")


def rows() -> list[OriginRow]:
    return [
        OriginRow("products, eps 0.1", (2000, 200), 100, FORWARD, 30, 2.0, 3.0, 1.5, RUN),
        OriginRow("products, eps 0.1", (2000, 200), 100, FORWARD, 30, 2.0, 1.5, 0.75, LATER),
        OriginRow("products, eps 0.01", (2000, 200), 100, FORWARD, 30, 2.0, 1.8, 0.9, RUN),
        OriginRow("router", (64, 8), 3, BACKWARD, 30, 0.001, 0.02, 20.4, RUN),
        OriginRow("router", (64, 8), 20, FORWARD, 30, 1.0, 0.999, 0.999, RUN),
    ]


def test_section() -> None:
    *_, first, second, third, fourth, _, made = replaced.section(rows()).splitlines()
    assert first == "| products, eps 0.1 | 2,000 × 200 | 100 | forward | 2 ms / 3 ms: 1.50 | 2 ms / 1.5 ms: **0.75** |"
    assert second == "| products, eps 0.01 | 2,000 × 200 | 100 | forward | 2 ms / 1.8 ms: **0.90** |  |"
    assert third == "| router | 64 × 8 | 3 | forward + backward | 1 µs / 20 µs: 20 |  |"
    assert fourth.endswith(": 1.00 |  |")
    assert made == "A Processor; 2026-01-02 to 2026-01-05, commits abc1234, def5678; torch 2.13.0."


def test_losses() -> None:
    assert replaced.losses(rows()) == [
        "- Loops that calls replace, CPU, 1 and 2 threads, where they are faster: products 0.75 to 0.90."
    ]
    assert replaced.losses(rows()[:1]) == []


def test_the_pages_have_the_committed_rows() -> None:
    committed = replaced.read()
    assert replaced.section(committed) in report.PERFORMANCE.read_text()
    for line in replaced.losses(committed):
        assert f"\n{line}\n" in report.README.read_text()
