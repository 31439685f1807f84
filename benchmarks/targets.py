"""What the package promises of its speed and memory, and whether a run kept it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rows import BACKWARD, FORWARD, Row

Shape = tuple[int, ...]

SWEEPS = 20
# What is timed beside an operation without being another way to compute it.
FLASH, READ, TWENTY = "flash attention", "one read", "20 sweeps"
YARDSTICKS = ("eager", "clone", FLASH, READ, TWENTY)
# Times faster than the eager loop, float32, so many sweeps, on a CPU with 2 threads.
EAGER_RATIO: dict[tuple[str, Shape], float] = {
    (FORWARD, (65536, 4, 4)): 8.0,
    (FORWARD, (8192, 16, 16)): 6.0,
    (FORWARD, (512, 64, 64)): 5.0,
    (FORWARD, (32, 256, 256)): 5.0,
    (BACKWARD, (65536, 4, 4)): 6.0,
    (BACKWARD, (8192, 16, 16)): 5.0,
    (BACKWARD, (512, 64, 64)): 4.0,
    (BACKWARD, (32, 256, 256)): 4.0,
}
# The same of matrices that no cache holds, forward.
LARGE_SHAPE, LARGE_RATIO = (2, 2048, 2048), 2.0
# mHC layers of 4 streams, (tokens, streams, channels), float32 on a CPU and bfloat16 on a GPU.
LAYER_SHAPES: dict[str, tuple[Shape, Shape]] = {
    "cpu": ((1024, 4, 256), (64, 4, 1024)),
    "cuda": ((8192, 4, 4096), (64, 4, 4096)),
}
# Sinkhorn attention, float32: times faster forward, and peak extra memory as a share of the loop's, both passes.
ATTENTION_SHAPE, ATTENTION_SWEEPS = (8, 1024, 3, 64), 3  # heads, lines of query and key, which operand, features
ATTENTION_RATIO = 2.0
ATTENTION_MEMORY = 0.25
# solver="newton" to a residual of 1e-6 at logit std 4, float32: times faster than the sweeps to the same residual.
NEWTON_SHAPE = (65536, 4, 4)
NEWTON_RATIO = 5.0
# Peak extra memory of forward and backward, in sizes of the input; output and gradient count.
MOST_MEMORY = 4.0


@dataclass(frozen=True)
class Verdict:
    """One promise at one size: what was asked, what was measured."""

    shape: Shape
    direction: str
    promise: str
    measured: float | None  # None where it was not measured
    required: float
    ok: bool


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Hold the CPU rows of fastdsm.sinkhorn, of Newton's method and of attention to these promises, and to every other row."""
    on_cpu = [row for row in rows if row.run.device == "cpu"]
    rows = [row for row in on_cpu if row.operation == "sinkhorn"]
    found = _attention_verdicts([row for row in on_cpu if row.operation == "sinkhorn_attention"])
    found.append(_newton_verdict([row for row in on_cpu if row.operation == "newton"]))
    for (direction, shape), required in EAGER_RATIO.items():
        group = [row for row in rows if (row.direction, row.shape) == (direction, shape) and row.left_out is None]
        ours = next((row for row in group if row.implementation == "fastdsm"), None)
        ratio = ours.ratio_to_eager if ours else None
        found.append(_at_least(shape, direction, "times faster than the eager loop", ratio, required))
        name, fastest = fastest_other(group)
        found.append(_at_least(shape, direction, f"times faster than {name}", fastest, 1.0))
        if direction == BACKWARD:
            size = ours.peak_extra_bytes / ours.input_bytes if ours and ours.peak_extra_bytes is not None else None
            ok = size is not None and size < MOST_MEMORY
            found.append(Verdict(shape, direction, "inputs of extra memory, less than", size, MOST_MEMORY, ok))
    large = [row for row in rows if (row.implementation, row.direction, row.shape) == ("fastdsm", FORWARD, LARGE_SHAPE)]
    ratio = large[0].ratio_to_eager if large else None
    return [*found, _at_least(LARGE_SHAPE, FORWARD, "times faster than the eager loop", ratio, LARGE_RATIO)]


def _attention_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    by_name = {(row.implementation, row.direction): row for row in rows}
    ours = by_name.get(("fastdsm", FORWARD))
    ratio = ours.ratio_to_eager if ours else None
    bytes_held = [row.peak_extra_bytes if row else None for row in (by_name.get((x, BACKWARD)) for x in ("fastdsm", "eager"))]
    share = bytes_held[0] / bytes_held[1] if bytes_held[0] is not None and bytes_held[1] else None
    ok = share is not None and share < ATTENTION_MEMORY
    promise = "of the eager loop's extra memory, less than"
    return [
        _at_least(ATTENTION_SHAPE, FORWARD, "times faster than the eager loop", ratio, ATTENTION_RATIO),
        Verdict(ATTENTION_SHAPE, BACKWARD, promise, share, ATTENTION_MEMORY, ok),
    ]


def _newton_verdict(rows: Sequence[Row]) -> Verdict:
    ratios = [x.ratio_to_eager for x in rows if (x.shape, x.implementation) == (NEWTON_SHAPE, "fastdsm")]
    return _at_least(NEWTON_SHAPE, FORWARD, "times faster than the sweeps", ratios[0] if ratios else None, NEWTON_RATIO)


def fastest_other(group: Sequence[Row]) -> tuple[str, float | None]:
    """The fastest of torch.compile and the peers in one case, and how many times faster fastdsm is, by medians."""
    timed = {row.implementation: row for row in group if row.seconds_median is not None}
    ours = timed.pop("fastdsm", None)
    others = [row for name, row in timed.items() if name not in YARDSTICKS and not name.startswith("fastdsm")]
    if ours is None or not others:
        return "torch.compile and every peer", None
    ratio, name = min((times_faster(ours, row), row.implementation) for row in others)
    return name, ratio


def times_faster(ours: Row, other: Row) -> float:
    """In graphs where both were captured into one, else as called: a call that a graph replays has no host's part."""
    if ours.device_seconds is not None and other.device_seconds is not None:
        return other.device_seconds / ours.device_seconds
    assert ours.seconds_median is not None
    assert other.seconds_median is not None
    return other.seconds_median / ours.seconds_median


def _at_least(shape: Shape, direction: str, promise: str, measured: float | None, required: float) -> Verdict:
    return Verdict(shape, direction, promise, measured, required, measured is not None and measured >= required)
