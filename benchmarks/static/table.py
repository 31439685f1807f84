"""The whole table of launchable kernels, compiled by a few processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from fastdsm import kernels

from .report import Row, Usage, analyse, identify, largest_usages

Place = tuple[int, str]  # in the table, and the target


def rows_of(targets: Sequence[str], match: str, jobs: int) -> Iterator[tuple[int, Row]]:
    """How many rows there will be, and each row as it is done, in no particular order.

    match: text that a kernel's name, constants, types or label must contain.
    """
    chosen = places(targets, match)
    for row in compiled(chosen, largest_usages(), jobs):
        yield len(chosen), row


def places(targets: Sequence[str], match: str) -> list[Place]:
    """Where in the table those kernels are that contain ``match``, for each of the targets that they are compiled for."""
    table = kernels.configurations()
    texts = [f"{identify(configuration)} {configuration.label}" for configuration in table]
    return [
        (index, target)
        for index, text in enumerate(texts)
        for target in targets
        if match in text and target in table[index].targets
    ]


def compiled(chosen: Sequence[Place], calls: Mapping[str, Sequence[Usage]], jobs: int) -> Iterator[Row]:
    """A row of each as it is done; ``calls``: by key of the configuration, what is executed of it."""
    table = kernels.configurations()
    # Not forked: a child of a process with threads, as PyTorch's and Rich's, may hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_row, index, target, calls.get(identify(table[index]), [])) for index, target in chosen]
        for future in as_completed(futures):
            yield future.result()


def _row(index: int, target: str, calls: Sequence[Usage]) -> Row:
    """A kernel does not travel between processes; its place in the table does."""
    return analyse(kernels.configurations()[index], target, calls)
