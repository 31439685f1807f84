"""fastdsm on a CPU beside the loops it replaces: python -m benchmarks.origins [threads ...] [words ...]

SwAV's loop in place and a mixture's router of Megatron-LM (few sweeps of wide matrices), POT's products (one large matrix in
float64), sinkhorn(q k^T) v (short attention), the mHC layer: each in this project's words, with its origin's operations.
Outputs are held to each other first. Then come rounds in which both run, in alternating order; a ratio is the median over the
rounds of the origin's time by fastdsm's. Rows replace those of the same cases in benchmarks/results/origins.jsonl. Default is 1
thread, then 2; with words only cases whose origin contains one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import fastdsm

from . import layers
from .harness import seconds_of
from .origin_case import Case
from .rows import BACKWARD, FORWARD, RESULTS, Run, current_run

_ROUNDS, _SLICE, _SECONDS = 30, 5e-3, 3.0  # of a case, seconds of one call in a round and of a case at the most
_SWEEPS_OF_ATTENTION = 3


@dataclass(frozen=True)
class OriginRow:
    """Milliseconds of both at one size, medians over the rounds; ``ratio``: see above."""

    origin: str
    shape: tuple[int, ...]
    sweeps: int
    direction: str
    rounds: int
    fastdsm: float
    loop: float
    ratio: float
    run: Run


def swav(scores: Tensor, sweeps: int) -> Tensor:
    """Scores (samples, prototypes): masses 1 / prototypes, then 1 / samples, in place, as SwAV on one process."""
    Q = scores.exp().mT
    prototypes, samples = Q.shape
    Q /= Q.sum()
    for _ in range(sweeps):
        Q /= Q.sum(1, keepdim=True)
        Q /= prototypes
        Q /= Q.sum(0, keepdim=True)
        Q /= samples
    return (Q * samples).mT


def router(cost: Tensor, sweeps: int) -> Tensor:
    """Cost (tokens, experts), tokens of mass 1: factors in turn, as Megatron-LM's, without its test of convergence."""
    cost = cost.exp()
    tokens, experts = cost.shape
    d0, d1, eps = cost.new_ones(tokens), cost.new_ones(experts), 1e-8
    for _ in range(sweeps):
        d0 = (1 / tokens) / ((d1 * cost).sum(1) + eps)
        d1 = (1 / experts) / ((d0.unsqueeze(1) * cost).sum(0) + eps)
    return d1 * cost * d0.unsqueeze(1) * tokens


def products(cost: Tensor, reg: float, sweeps: int) -> Tensor:
    """Sinkhorn-Knopp by products with K, as POT's ot.sinkhorn of masses 1 / n and 1 / m; rows of sum 1."""
    n, m = cost.shape
    K, u = (-cost / reg).exp(), cost.new_full((n,), 1 / n)
    for _ in range(sweeps):
        v = (1 / m) / (K.mT @ u)
        u = (1 / n) / (K @ v)
    return u.unsqueeze(1) * K * v * n


def cases() -> Iterator[Case]:
    """Sizes that people run, deterministic inputs."""
    torch.manual_seed(0)
    for shape in ((64, 3000), (256, 3000), (128, 65_536)):
        scores = torch.randn(shape) * 3
        ours = partial(fastdsm.sinkhorn, scores, n_iters=3)
        yield Case("SwAV", shape, 3, FORWARD, ours, partial(swav, scores, 3), 1e-5)
    cost = torch.randn(4096, 64)
    for sweeps in (1, 3, 20):
        ours = partial(fastdsm.sinkhorn, cost, n_iters=sweeps, first="row")
        yield Case("router", (4096, 64), sweeps, FORWARD, ours, partial(router, cost, sweeps), 1e-4)
    for n in (200, 500, 1000, 2000):
        cost = torch.rand(n, n, dtype=torch.float64)
        for reg in (0.1, 0.01):
            loop = partial(products, cost, reg, 100)
            yield Case(f"products, eps {reg:g}", (n, n), 100, FORWARD, partial(_transport, cost, reg, 100), loop, 1e-10)
    for lines in (16, 64, 128, 197, 256):
        operands = [torch.randn(8, 12, lines, 64) for _ in range(3)]
        for direction in (FORWARD, BACKWARD):
            own, usual = (_attention(call, operands, direction) for call in (_attended, _of_stored_logits))
            yield Case("attention", (96, lines, 64), _SWEEPS_OF_ATTENTION, direction, own, usual, 1e-5)
            eager = _attention(_looped, operands, direction)
            yield Case("attention, eager loop", (96, lines, 64), _SWEEPS_OF_ATTENTION, direction, own, eager, 1e-4)
    yield from layers.cases()


def _transport(cost: Tensor, reg: float, sweeps: int) -> Tensor:
    plan = fastdsm.sinkhorn(-cost / reg, n_iters=sweeps)
    return plan


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = fastdsm.sinkhorn_attention(query, key, value, n_iters=_SWEEPS_OF_ATTENTION)
    return out


def _of_stored_logits(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    plan = fastdsm.sinkhorn(query @ key.mT / query.shape[-1] ** 0.5, n_iters=_SWEEPS_OF_ATTENTION)
    return plan @ value


def _looped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As it is written down: logsumexp after logsumexp, and autograd."""
    S = query @ key.mT / query.shape[-1] ** 0.5
    f = torch.zeros_like(S[..., :1])
    for _ in range(_SWEEPS_OF_ATTENTION):
        g = -torch.logsumexp(S + f, -2, keepdim=True)
        f = -torch.logsumexp(S + g, -1, keepdim=True)
    return (S + f + g).exp() @ value


def _attention(call: Callable[..., Tensor], operands: list[Tensor], direction: str) -> Callable[[], Tensor]:
    """The output, or the query's gradient among those of all three."""
    if direction == FORWARD:
        return lambda: call(*operands)
    leaves = [x.clone().requires_grad_() for x in operands]
    return lambda: torch.autograd.grad(call(*leaves), leaves, operands[2])[0]


def measured(case: Case) -> OriginRow:
    """Check and time both; AssertionError where they differ."""
    if case.tolerance is not None:
        ours, loop = case.ours(), case.loop()
        apart = (ours - loop).abs().max() / loop.abs().max()
        assert apart <= case.tolerance, f"{case.origin} {case.shape}, {case.direction}: {apart:.1e} apart"
    jobs = (case.ours, case.loop)
    counts = [max(int(_SLICE / seconds_of(job, 1)), 1) for job in jobs]
    times: list[list[float]] = [[], []]
    end = perf_counter() + _SECONDS
    while len(times[0]) < _ROUNDS and (len(times[0]) < 3 or perf_counter() < end):
        for k in (0, 1) if len(times[0]) % 2 else (1, 0):
            times[k].append(1e3 * seconds_of(jobs[k], counts[k]))
    ratio = median(theirs / own for own, theirs in zip(*times, strict=True))
    own, theirs = (median(x) for x in times)
    return OriginRow(
        case.origin, case.shape, case.sweeps, case.direction, len(times[0]), own, theirs, ratio, current_run("cpu")
    )


def _record(rows: list[OriginRow]) -> None:
    """Keep the rows of other cases."""

    def of(row: Any) -> tuple[Any, ...]:
        return row["origin"], *row["shape"], row["sweeps"], row["direction"], row["run"]["threads"]

    path = RESULTS / "origins.jsonl"
    new = [json.loads(json.dumps(asdict(row))) for row in rows]
    made = {of(row) for row in new}
    kept = [row for row in map(json.loads, path.read_text().splitlines()) if of(row) not in made]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept + new))


def main() -> None:
    """Measure, print and record."""
    rows, words = [], [x for x in sys.argv[1:] if not x.isdigit()]
    for threads in [int(x) for x in sys.argv[1:] if x.isdigit()] or [1, 2]:
        torch.set_num_threads(threads)
        current_run.cache_clear()
        for case in cases():
            if words and not any(word in case.origin for word in words):
                continue
            row = measured(case)
            rows.append(row)
            name = f"{row.origin} {' x '.join(map(str, row.shape))}, {row.sweeps} sweeps, {row.direction}"
            print(
                f"{threads} thread{'s' * (threads > 1)}  {name:62} {row.fastdsm:9.2f} ms {row.loop:9.2f} ms {row.ratio:6.2f}",
                flush=True,
            )
    _record(rows)
    slower = [row for row in rows if row.ratio < 1.0]
    print(f"slower than the loop it replaces: {len(slower)} of {len(rows)}")


if __name__ == "__main__":
    main()
