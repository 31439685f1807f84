"""Two processes of one gloo group, which live as long as a module's tests: starting them costs seconds, a task milliseconds."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE, SECONDS = 2, 120.0
LAST = 3.0  # for what the others have to say once one has failed: they may wait for it in a collective


class Pool:
    """``run`` calls a function of a module in every process; what it returns is pickled."""

    def __init__(self, tasks: list[Any], results: Any) -> None:
        self._tasks, self._results, self._broken = tasks, results, False

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results, by rank; an error in one of them is an error here, with its traceback."""
        assert not self._broken, "an earlier task left a process behind, see its error"
        for tasks in self._tasks:
            tasks.put((function, arguments))
        found: dict[int, Any] = {}
        errors: list[str] = []
        while len(found) < SIZE:
            try:
                rank, (text, value) = self._results.get(timeout=LAST if errors else SECONDS)
            except Empty:
                self._broken = True
                missing = set(range(SIZE)) - found.keys()
                errors.append(f"nothing from {missing}")
                break
            found[rank] = value
            if text is not None:
                errors.append(f"rank {rank}:\n{text}")
        assert not errors, "\n".join(errors)
        return [found[rank] for rank in range(SIZE)]


@contextmanager
def pool(folder: Path) -> Iterator[Pool]:
    """A pool whose processes meet in ``folder``; they end with it."""
    context = mp.get_context("spawn")
    tasks, results = [context.SimpleQueue() for _ in range(SIZE)], context.Queue()
    workers = [
        context.Process(target=_work, args=(rank, str(folder / "store"), queue, results), daemon=True)
        for rank, queue in enumerate(tasks)
    ]
    for worker in workers:
        worker.start()
    try:
        yield Pool(tasks, results)
        for queue in tasks:
            queue.put(None)
        for worker in workers:
            worker.join(timeout=10)
    finally:
        for worker in workers:
            worker.terminate()


def _work(rank: int, store: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=SIZE, store=dist.FileStore(store, SIZE))
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            results.put((rank, (None, function(*arguments))))
        except Exception:
            results.put((rank, (traceback.format_exc(), None)))
    dist.destroy_process_group()
