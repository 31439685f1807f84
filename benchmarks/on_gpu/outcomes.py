"""A pytest plugin: each test's outcome is appended to a file when it has one, and a test that has is not run again.

A test in whose middle a run was stopped is run after the others.

    ON_GPU_OUTCOMES=FILE python -m pytest -p benchmarks.on_gpu.outcomes tests/gpu
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .lines import append, read

FILE = "ON_GPU_OUTCOMES"
BEGUN = "begun"


def outcomes(path: Path) -> dict[str, str]:
    """Of each test the latest."""
    return {line["test"]: line["outcome"] for line in read(path)}


class _Outcomes:
    def __init__(self, path: Path) -> None:
        self.path = path

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has an outcome."""
        latest = outcomes(self.path)
        left = [item for item in items if latest.get(item.nodeid, BEGUN) == BEGUN]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = sorted(left, key=lambda item: item.nodeid in latest)

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        """Keep that it has begun."""
        append(self.path, {"test": nodeid, "outcome": BEGUN})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what the call came to, or what kept it from being made."""
        if report.when == "call" or report.outcome != "passed":
            message = report.longreprtext[-2000:] if report.failed else ""
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "message": message}
            append(self.path, line)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """With nothing left to run, a test run has succeeded."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and read(self.path):
            session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    """Workers of xdist choose by the same file, which the process that they report to writes."""
    plugin = _Outcomes(Path(os.environ[FILE]))
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(plugin)
    else:
        config.pluginmanager.register(_Chosen(plugin))


class _Chosen:
    """Of the plugin what chooses."""

    def __init__(self, plugin: _Outcomes) -> None:
        self.pytest_collection_modifyitems = plugin.pytest_collection_modifyitems
