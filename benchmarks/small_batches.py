"""fastdsm.sinkhorn of few matrices beside the two eager loops: python -m benchmarks.small_batches [threads ...]

Every size at every batch, forward, and forward with backward of a random cotangent by torch.autograd.grad, with so many threads
each (default: 1, then 2). Outputs are held against float64 first. Then come rounds in which each call runs once untimed, since
the other calls' code and memory are still in the caches, and then for about a millisecond, in alternating order; a ratio is the
median over the rounds of the faster loop's time by fastdsm's. Rows replace benchmarks/results/small_batches.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

import fastdsm

from .baselines import COLUMNS_THEN_ROWS, log_softmax_loop, sinkhorn_loop
from .harness import GRADIENT_TOLERANCE, SWEEPS, VALUE_TOLERANCE, seconds_of
from .rows import BACKWARD, FORWARD, RESULTS, Run, current_run, write_rows

BATCHES = {
    4: (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    16: (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    64: (1, 2, 4, 8, 16, 32, 64),
}
_SLICE, _ROUNDS, _SECONDS = 1e-3, 60, 1.5  # of one call in a round, of a case at least a tenth of these, and at most so long


@dataclass(frozen=True)
class SmallBatchRow:
    """Microseconds of the three calls at one size, in one direction, medians over the rounds; ``ratio``: see above."""

    shape: tuple[int, int, int]
    direction: str
    rounds: int
    fastdsm: float
    logsumexp_loop: float
    log_softmax_loop: float
    ratio: float
    ratio_of_minima: float
    run: Run


def _project(logits: Tensor) -> Tensor:
    plan = fastdsm.sinkhorn(logits, n_iters=SWEEPS)
    return plan


CALLS = (_project, sinkhorn_loop, log_softmax_loop)


def measured(batch: int, n: int, direction: str) -> SmallBatchRow:
    """Check and time the three calls; AssertionError where an output is wrong."""
    logits, cotangent = torch.randn(2, batch, n, n, generator=torch.Generator().manual_seed(0))
    jobs = [_job(call, logits, cotangent, direction) for call in CALLS]
    truth = _job(lambda x: COLUMNS_THEN_ROWS.function(x)[0], logits.double(), cotangent.double(), direction)()
    tolerance = GRADIENT_TOLERANCE if direction == BACKWARD else VALUE_TOLERANCE
    for call, job in zip(CALLS, jobs, strict=True):
        error = (job().double() - truth).abs().max() / truth.abs().max()
        assert error <= tolerance, f"{call.__name__}, {direction}, {batch} of {n}x{n}: off by {error:.1e}"
    counts = [max(int(_SLICE / seconds_of(job, 3)), 1) for job in jobs]
    times: list[list[float]] = [[] for _ in jobs]
    end = perf_counter() + _SECONDS
    while len(times[0]) < _ROUNDS and (len(times[0]) < _ROUNDS // 10 or perf_counter() < end):
        for k in (0, 1, 2) if len(times[0]) % 2 else (2, 1, 0):
            jobs[k]()
            times[k].append(1e6 * seconds_of(jobs[k], counts[k]))
    ratios = [min(others) / ours for ours, *others in zip(*times, strict=True)]
    ours, *others = (min(x) for x in times)
    own, by_logsumexp, by_log_softmax = (median(x) for x in times)
    return SmallBatchRow(
        shape=(batch, n, n),
        direction=direction,
        rounds=len(ratios),
        fastdsm=own,
        logsumexp_loop=by_logsumexp,
        log_softmax_loop=by_log_softmax,
        ratio=median(ratios),
        ratio_of_minima=min(others) / ours,
        run=current_run("cpu"),
    )


def _job(call: Callable[[Tensor], Tensor], logits: Tensor, cotangent: Tensor, direction: str) -> Callable[[], Tensor]:
    """The call to be timed: the plan, or the gradient."""
    if direction == FORWARD:
        return lambda: call(logits)
    leaf = logits.clone().requires_grad_()
    return lambda: torch.autograd.grad(call(leaf), leaf, cotangent)[0]


def main() -> None:
    """Measure, print and record."""
    rows = []
    for threads in [int(x) for x in sys.argv[1:]] or [1, 2]:
        torch.set_num_threads(threads)
        current_run.cache_clear()
        print(f"{threads} thread{'s' * (threads > 1)}, us   fastdsm  logsumexp  log_softmax  ratio (of minima)")
        for n, batches in BATCHES.items():
            for direction in (FORWARD, BACKWARD):
                for batch in batches:
                    row = measured(batch, n, direction)
                    rows.append(row)
                    numbers = f"{row.fastdsm:9.1f}  {row.logsumexp_loop:9.1f}  {row.log_softmax_loop:11.1f}"
                    print(
                        f"{batch:5} {n}x{n} {direction:17} {numbers}  {row.ratio:5.2f} ({row.ratio_of_minima:.2f})", flush=True
                    )
    write_rows(RESULTS / "small_batches.jsonl", rows)
    slower = [row for row in rows if row.ratio < 1.0]
    print(f"slower than the faster loop: {len(slower)} of {len(rows)}")


if __name__ == "__main__":
    main()
