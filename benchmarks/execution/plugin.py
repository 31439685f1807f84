"""The project's tests with compiled kernels, executed, in the place of Triton's interpreter.

    PTX_TARGET=sm_90 python -m pytest -p benchmarks.execution.plugin tests/kernels/test_registers.py

PTX_TARGET: sm_80, sm_90 (the default) or sm_100. PTX_NOISE: "worst" has approximations off by their documented error, up or
down, "uniform" by up to that. PTX_CONTRACT=1: products and sums contracted where ptxas may. PTX_CACHE_DIR: see ``compilation``.

A test in which an issue is found that is not benign fails. What ran and all issues are listed at the end, but for those of the
processes of xdist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "0"  # while kernels are imported

import numpy as np
import pytest

from .hook import Execution

_NOISE = {"worst": np.sign, "uniform": np.positive}

execution = Execution(
    os.environ.get("PTX_TARGET", "sm_90"),
    noise=_NOISE[os.environ["PTX_NOISE"]] if os.environ.get("PTX_NOISE") else None,
    contract=bool(os.environ.get("PTX_CONTRACT")),
)
execution.install()


@pytest.fixture(autouse=True)
def _no_issues() -> Iterator[None]:
    before = set(execution.report.issues)
    yield
    found = [issue for key, issue in execution.report.issues.items() if key not in before and not issue.benign]
    if found:
        pytest.fail("\n".join(map(str, found)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of kernels that the interpreter alone runs, declared or changed by the test, are skipped."""
    for item in items:
        if item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason="about Triton's interpreter"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What ran in this process, and what was found."""
    if not execution.report.launches:
        return
    report, seconds = execution.report, {name: round(spent, 1) for name, spent in execution.seconds.items()}
    terminalreporter.section(f"executed for {execution.target}")
    terminalreporter.write_line(
        f"{report.launches} launches, {report.lane_instructions} instructions of threads; seconds: {seconds}"
    )
    for label, ran in sorted(execution.ran.items()):
        counts = f"{ran.launches} launches, {ran.programs} programs, {ran.lane_instructions} instructions, {ran.seconds:.1f} s"
        terminalreporter.write_line(f"{label}: {counts}")
    for issue in report.issues.values():
        terminalreporter.write_line(str(issue))
