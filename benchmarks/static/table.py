"""The whole table of launchable kernels, compiled by a few processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from fastdsm import kernels

from .report import Row, Usage, analyse, identify, largest_usages


def rows_of(targets: Sequence[str], match: str, jobs: int) -> Iterator[tuple[int, Row]]:
    """How many rows there will be, and each row as it is done, in no particular order.

    match: text that a kernel's name, constants, types or label must contain.
    """
    calls, table = largest_usages(), kernels.configurations()
    keys = [identify(configuration) for configuration in table]
    texts = [f"{key} {configuration.label}" for key, configuration in zip(keys, table, strict=True)]
    chosen = [
        (index, target)
        for index, text in enumerate(texts)
        for target in targets
        if match in text and target in table[index].targets
    ]
    # Not forked: a child of a process with threads, as PyTorch's and Rich's, may hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_row, index, target, calls.get(keys[index], [])) for index, target in chosen]
        for future in as_completed(futures):
            yield len(chosen), future.result()


def _row(index: int, target: str, calls: Sequence[Usage]) -> Row:
    """A kernel does not travel between processes; its place in the table does."""
    return analyse(kernels.configurations()[index], target, calls)
