"""Executions of public calls, configuration by configuration: launches, issues, the worst error of a call that launched it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.static.compilation import describe, kernel_name, source
from benchmarks.static.report import identify
from fastdsm._verify.sinkhorn import Record
from fastdsm.kernels.common.configuration import Configuration

from .calls import Call
from .hook import Execution
from .report import Report

SHOWN = 4
"""Harmful issues in a row at the most, in full."""


@dataclass
class Worst:
    """The error that comes closest to its budget, as a share of it; where, and of how many calls."""

    share: float = 0.0
    at: str = ""
    calls: int = 0

    def add(self, call: Call, records: list[Record], kernel: str) -> None:
        """Records of a call that launched ``kernel``."""
        self.calls += 1
        for record in records:
            if concerns(record, kernel) and not record.share < self.share:  # NaN too
                self.share, self.at = record.share, f"{record.quantity}, {call.name}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"calls": self.calls, "worst": round(self.share, 4), "at": self.at}


def concerns(record: Record, kernel: str) -> bool:
    """Whether what was compared is, or follows from, a result of such a kernel: a call that raised says nothing of which."""
    if record.quantity.startswith("raised"):
        return True
    if "_bounds_" in kernel:
        return record.group == "bounds"
    if kernel.startswith("_sigma2_"):
        return record.quantity == "sigma2 of a plan"
    if kernel.endswith("_bwd_kernel"):
        return record.quantity.startswith("gradient")
    return record.group != "bounds" and record.quantity != "sigma2 of a plan"


@dataclass
class Executed:
    """What was executed of a configuration; with approximations off by their documented errors, where that was tried."""

    configuration: Configuration
    report: Report
    programs: int = 0
    exact: Worst = field(default_factory=Worst)
    noisy: Worst = field(default_factory=Worst)

    def row(self, target: str) -> dict[str, Any]:
        """For the record."""
        issues: Counter[str] = Counter()
        for issue in self.report.issues.values():
            issues[issue.kind] += issue.count
        return {
            "kernel": kernel_name(self.configuration),
            **describe(self.configuration),
            "target": target,
            "source": source(self.configuration),
            "launches": self.report.launches,
            "programs": self.programs,
            "lane_instructions": self.report.lane_instructions,
            **self.exact.as_dict(),
            "noise": self.noisy.as_dict() if self.noisy.calls else None,
            "issues": dict(sorted(issues.items())),
            "harmful": [str(issue) for issue in self.report.harmful()[:SHOWN]],
        }


class Recording(Execution):
    """An execution that keeps what it does by configuration."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._empty = self.report
        self.executed: dict[str, Executed] = {}
        self._touched: set[str] = set()

    def launch(self, configuration: Configuration, programs: int, arguments: Mapping[str, Any]) -> None:
        """With the report of the configuration."""
        key = identify(configuration)
        mine = self.executed.setdefault(key, Executed(configuration, deepcopy(self._empty)))
        mine.programs += programs
        self._touched.add(key)
        self.report = mine.report
        super().launch(configuration, programs, arguments)

    def judge(self, call: Call, noise: Any) -> list[Record]:
        """Run a call, and put the errors of its results to what it launched."""
        self.noise, self._touched = noise, set()
        records = call.run()
        for key in self._touched:
            mine = self.executed[key]
            (mine.exact if noise is None else mine.noisy).add(call, records, kernel_name(mine.configuration))
        return records


class Planning(Execution):
    """No execution: which configurations calls launch. What they were to write becomes numbers, so that calls go on."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._touched: set[str] = set()

    def launch(self, configuration: Configuration, programs: int, arguments: Mapping[str, Any]) -> None:
        """Nothing runs."""
        self._touched.add(identify(configuration))
        for x in tree_leaves(dict(arguments)):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.isnan().any():
                x.nan_to_num_(nan=0.5)
            elif isinstance(x, torch.Tensor) and x.dtype == torch.int32 and (x > 1).any():
                x.fill_(1)

    def launched(self, call: Call) -> set[str]:
        """Keys of the configurations."""
        self._touched = set()
        call.run()
        return self._touched
