"""``fastdsm verify --backend triton`` in pieces: each case's comparisons are appended as they are made, and not made again.

    python -m benchmarks.on_gpu.verification OUT JOBS [EVERY]

EVERY: only each so many-th case. Exit code 1 where a comparison is over its budget.
"""

from __future__ import annotations

import sys
from multiprocessing import get_context
from pathlib import Path

import torch

from fastdsm._verify.grid import grid, verify
from fastdsm._verify.sinkhorn import Case, Target, targets

from .lines import Record, append, read

COMPARISONS = "verify.jsonl"


def make(out: Path, jobs: int, every: int) -> None:
    """Verify what ``out`` lacks, in ``jobs`` processes of one thread each."""
    target = next(x for x in targets() if x.backend == "triton")
    made = {line["case"] for line in read(out / COMPARISONS)}
    asked = [(case, target) for case in grid(target)[::every] if str(case) not in made]
    with get_context("spawn").Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:  # CUDA bears no fork
        for name, records in pool.imap_unordered(_verified, asked):
            append(out / COMPARISONS, {"case": name, "comparisons": records})


def _verified(case_and_target: tuple[Case, Target]) -> tuple[str, list[Record]]:
    case, target = case_and_target
    return str(case), [_without_nan(record.as_dict()) for record in verify(case, target)]


def _without_nan(record: Record) -> Record:
    """NaN, which JSON lacks, becomes null; what is wrong with it is in ``ok``."""
    return {name: None if value != value else value for name, value in record.items()}


def misses(out: Path) -> tuple[int, list[Record]]:
    """How many comparisons there are, and those over their budget."""
    found = [record for line in read(out / COMPARISONS) for record in line["comparisons"]]
    return len(found), [record for record in found if not record["ok"]]


def main(out: str, jobs: str, every: str = "1") -> None:
    """Verify, and print the misses."""
    make(Path(out), int(jobs), int(every))
    number, missed = misses(Path(out))
    for record in missed:
        print(record)
    print(f"{number} comparisons, {len(missed)} over their budget")
    sys.exit(1 if missed or not number else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
