"""What the package promises of its speed on a GPU, and whether a run kept it."""

from __future__ import annotations

from collections.abc import Iterable

from .rows import BACKWARD, FORWARD, Row
from .targets import ATTENTION_SWEEPS, FLASH, LAYER_SHAPES, READ, SWEEPS, TWENTY, Shape, Verdict

# Batches that fill the chip, for which a call is more than its launch.
FULL_SHAPES: tuple[Shape, ...] = (
    (1048576, 4, 4),
    (262144, 7, 7),
    (262144, 8, 8),
    (65536, 16, 16),
    (4096, 64, 64),
    (1024, 256, 256),
)
# Sinkhorn attention of bfloat16 operands (heads, lines, which of query, key and value, features), and what is timed beside it.
HEADS_SHAPE: Shape = (64, 4096, 3, 64)
WIDE_SHAPE: Shape = (16, 4096, 3, 256)
MORE_SWEEPS, FLASH_SINKHORN = 10, "flash-sinkhorn"
HEADS_RATIO, PEER_RATIO = 10.0, 2.0
# One matrix, of which a sweep may take so many times as long as reading it once.
ONE_SHAPE: Shape = (1, 8192, 8192)
FEWER_SWEEPS, READS = 10, 1.25
# Newton's method at logit std 2, no slower than 20 sweeps; with larger matrices nothing is promised.
NEWTON_SHAPE: Shape = (1048576, 4, 4)
NEWTON_SHAPES: tuple[Shape, ...] = (NEWTON_SHAPE, (262144, 7, 7), (262144, 8, 8), (65536, 16, 16), (4096, 64, 64))
# What passes over the streams of an mHC layer, in percent of a copy, and the layer, forward and backward, beside Liger's.
LAYER_SHAPE = LAYER_SHAPES["cuda"][0]
COPY_PERCENT, LIGER_RATIO = 70.0, 2.0
_LAYER = ("mhc layer", LAYER_SHAPE, BACKWARD)


def of_sweeps(n_iters: int) -> str:
    """Name of fastdsm's row with another number of sweeps, from which the time of one follows."""
    return f"fastdsm, {n_iters} sweeps"


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Hold the rows of a GPU to these promises; what was not measured fails."""
    rows = [x for x in rows if x.run.device == "cuda"]
    found = {(x.operation, x.shape, x.implementation): x for x in rows if x.direction == FORWARD}

    def seconds(operation: str, shape: Shape, implementation: str) -> float | None:
        row = found.get((operation, shape, implementation))
        return None if row is None else row.device_seconds or row.seconds_median

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    def at_least(operation: str, shape: Shape, promise: str, measured: float | None, required: float) -> Verdict:
        return Verdict(shape, operation, promise, measured, required, measured is not None and measured >= required)

    def at_most(operation: str, shape: Shape, promise: str, measured: float | None, required: float) -> Verdict:
        return Verdict(shape, operation, promise, measured, required, measured is not None and measured <= required)

    name = "sinkhorn_attention"
    ours, eager = (seconds(name, HEADS_SHAPE, x) for x in ("fastdsm", "eager"))
    more = seconds(name, HEADS_SHAPE, of_sweeps(MORE_SWEEPS))
    half_sweep = None if ours is None or more is None else (more - ours) / (2 * (MORE_SWEEPS - ATTENTION_SWEEPS))
    flash, peer = (seconds(name, HEADS_SHAPE, x) for x in (FLASH, FLASH_SINKHORN))
    whole, fewer = seconds("sinkhorn", ONE_SHAPE, "fastdsm"), seconds("sinkhorn", ONE_SHAPE, of_sweeps(FEWER_SWEEPS))
    sweep = None if whole is None or fewer is None else (whole - fewer) / (SWEEPS - FEWER_SWEEPS)
    newton, twenty = (seconds("newton", NEWTON_SHAPE, x) for x in ("fastdsm", TWENTY))
    read = seconds("sinkhorn", ONE_SHAPE, READ)
    both = {x.implementation: x.seconds_median for x in rows if (x.operation, x.shape, x.direction) == _LAYER}
    passing = [(name, found.get((name, LAYER_SHAPE, "fastdsm"))) for name in ("mhc_post", "mhc_post_pre")]
    return [
        at_most(name, HEADS_SHAPE, "a half sweep, in forwards of flash attention, at most", ratio(half_sweep, flash), 1.0),
        at_least(name, HEADS_SHAPE, "times faster than the loop that stores its matrix", ratio(eager, ours), HEADS_RATIO),
        at_least(name, HEADS_SHAPE, "times faster than flash-sinkhorn", ratio(peer, ours), PEER_RATIO),
        at_most("sinkhorn", ONE_SHAPE, "a sweep, in reads of the matrix, at most", ratio(sweep, read), READS),
        at_most("newton", NEWTON_SHAPE, "Newton's method, in times of 20 sweeps, at most", ratio(newton, twenty), 1.0),
        *(
            at_least(name, LAYER_SHAPE, "% of a copy", None if row is None else row.percent_of_floor, COPY_PERCENT)
            for name, row in passing
        ),
        at_least(
            "mhc layer",
            LAYER_SHAPE,
            "with backward, times faster than Liger's",
            ratio(both.get("Liger"), both.get("fastdsm")),
            LIGER_RATIO,
        ),
    ]
