"""Processes that compile kernels side by side.

Programs of their own, not children by ``multiprocessing``, which would run the caller's script once more where that is not
guarded by ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any


class Compiler:
    """One of them; leaving the ``with`` block ends it."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment.pop("TRITON_INTERPRET", None)  # which replaces the compiler
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastdsm._ops.compiling"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def places(self, *arguments: Any) -> list[int]:
        """What ``fastdsm._ops.launchable.places`` returns; dtypes by their names."""
        found: list[int] = self._answer("places", *arguments)
        return found

    def compile(self, place: int, target: str) -> bool:
        """Compile a row of the finite table; whether it was not in Triton's cache already."""
        return bool(self._answer("compile", place, target))

    def _answer(self, *request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"a process that compiles has ended with code {self._process.wait()}; what it printed says why")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]


class Compilers:
    """Up to so many processes that compile, started as they are needed."""

    def __init__(self, most: int) -> None:
        self._most, self._stack = most, ExitStack()
        self._idle: SimpleQueue[Compiler] = SimpleQueue()
        self._started = 0

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def each(self, ask: Callable[[Compiler, Any], Any], of: Sequence[Any]) -> Iterator[Any]:
        """``ask`` any of them about each of ``of``: the answers as they come."""
        while self._started < min(self._most, len(of)):
            self._idle.put(self._stack.enter_context(Compiler()))
            self._started += 1
        if not of:
            return

        def answer(x: Any) -> Any:
            compiler = self._idle.get()
            try:
                return ask(compiler, x)
            finally:
                self._idle.put(compiler)

        with ThreadPoolExecutor(self._started) as threads:
            futures: list[Future[Any]] = [threads.submit(answer, x) for x in of]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                threads.shutdown(cancel_futures=True)
