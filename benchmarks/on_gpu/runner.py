"""Steps, each a process with a time limit of its own, in calls that go on where the last one stopped.

What has come of them is kept in a file, a line when a step begins and one when it ends. A step that ran to its end, well or
not, is not run again. One that was stopped, because the call's time was up, because the call itself was ended or because it
took longer than it may, is begun again: with what is left of its limit, and when no step is left that has not had its turn, for
as long again. That it then goes on rather than begins anew is its own affair.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, time
from types import FrameType

from ..rows import ROOT
from .lines import Record, append, read

STATE, LOG = "state.jsonl", "log.txt"
DONE, FAILED, SKIPPED, STOPPED = "done", "failed", "skipped", "stopped"
BEGUN = "begun"
_CALL_ENDED = "the call was ended"
_GRACE = 3.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take. modules: what it imports; programs: what it calls; None of a program: not here."""

    name: str
    command: Sequence[str]
    limit: float
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def lacking(self) -> str:
        """What of its needs is missing here, empty if nothing is."""
        modules = [name for name in self.modules if find_spec(name) is None]
        programs = [name for name in self.programs if shutil.which(name, path=_path()) is None]
        return ", ".join([*(f"the module {x}" for x in modules), *(f"the program {x}" for x in programs)])


@dataclass(frozen=True)
class Progress:
    """Of one step: what came of it, None if it is still to be ended, why, and the seconds spent on it."""

    outcome: str | None = None
    reason: str = ""
    seconds: float = 0.0


def progress_of(out: Path) -> dict[str, Progress]:
    """What has come of each step, by name, from the file."""
    found: dict[str, Progress] = {}
    for line in read(out / STATE):
        before = found.get(line["step"], Progress())
        if line["outcome"] != BEGUN:
            found[line["step"]] = Progress(line["outcome"], line["reason"], before.seconds + line["seconds"])
    return found


def run(steps: Sequence[Step], out: Path, seconds: float) -> Iterator[tuple[Step, Progress]]:
    """Run what is left of ``steps`` for ``seconds`` in all, and yield what comes of each."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = monotonic() + seconds
    _end_the_last_call(out)
    with _ended_by_signal():
        for times in (1, 2):
            for step in steps:
                before = progress_of(out).get(step.name, Progress())
                if before.outcome in (DONE, FAILED) or (times == 2 and before.outcome == SKIPPED):
                    continue
                own, left = times * step.limit - before.seconds, deadline - monotonic()
                if left < _least(step):
                    return
                if own >= _least(step):
                    yield step, _attempt(step, out, min(own, left))


def _least(step: Step) -> float:
    """With fewer seconds left it is not begun."""
    return min(5.0, step.limit / 5)


def _end_the_last_call(out: Path) -> None:
    """What has begun and not ended was stopped together with its call, about when the log was last written to."""
    last = next(reversed(read(out / STATE)), None)
    if last is not None and last["outcome"] == BEGUN:
        seconds = (out / LOG).stat().st_mtime - last["time"] if (out / LOG).exists() else 0.0
        _ended(last["step"], out, Progress(STOPPED, _CALL_ENDED, max(0.0, seconds)))


def _path() -> str:
    """Where programs are looked for: where CUDA is installed as well."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])


def _attempt(step: Step, out: Path, limit: float) -> Progress:
    if lacking := step.lacking():
        return _ended(step.name, out, Progress(SKIPPED, f"needs {lacking}"))
    append(out / STATE, {"step": step.name, "outcome": BEGUN, "reason": "", "seconds": 0.0, "time": time()})
    begin = monotonic()
    with (out / LOG).open("a") as log:
        print(f"\n=== {step.name}: {' '.join(step.command)}", file=log, flush=True)
        environment = {**os.environ, "PATH": _path(), "PYTHONUNBUFFERED": "1", **step.environment}
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:
            _end(process)
            _ended(step.name, out, Progress(STOPPED, _CALL_ENDED, monotonic() - begin))
            raise
        _end(process)
    seconds = monotonic() - begin
    if code is None:
        return _ended(step.name, out, Progress(STOPPED, f"not done after {limit:.0f} s", seconds))
    return _ended(step.name, out, Progress(FAILED if code else DONE, f"exit code {code}" if code else "", seconds))


def _ended(name: str, out: Path, progress: Progress) -> Progress:
    line: Record = {"outcome": progress.outcome, "reason": progress.reason, "seconds": round(progress.seconds, 1)}
    append(out / STATE, {"step": name, **line, "time": time()})
    return progress


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process and its children to end, then end them; those of a process that has ended by itself, too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM, by which a call is ended from outside, unwinds as Ctrl-C does, so that the step of the moment ends too."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
