"""What the package promises of the host's time, and whether a run kept it: one thread, launches stubbed."""

from __future__ import annotations

from collections.abc import Iterable

from ..rows import BACKWARD, FORWARD
from ..targets import Shape, Verdict
from .rows import COMPILED, STUBBED, HostRow

FOUR: Shape = (64, 4, 4)
EIGHT: Shape = (64, 8, 8)
HEADS_OF_64: Shape = (4, 64, 3, 32)
Key = tuple[str, Shape, str]
# At most so many empty autograd.Functions of the same direction; of COMPILED at most so many microseconds.
MOST: dict[Key, float] = {
    ("sinkhorn(x)", FOUR, FORWARD): 1.5,
    ("sinkhorn(x)", FOUR, BACKWARD): 2.0,
    ("sinkhorn(x)", FOUR, COMPILED): 15.0,
    ("sinkhorn_sigma2(x).plan", FOUR, FORWARD): 3.5,
    ("sinkhorn_sigma2(x).sigma2", EIGHT, FORWARD): 5.0,
    ('sinkhorn(x, solver="newton")', EIGHT, FORWARD): 5.0,
    ("sinkhorn(x, tol=1e-3)", EIGHT, FORWARD): 5.0,
    ("sinkhorn(x, mask=mask)", EIGHT, FORWARD): 5.0,
    ("sinkhorn(x, row_marginal=r, col_marginal=c)", EIGHT, FORWARD): 5.0,
    ("sinkhorn(x, return_info=True)", EIGHT, FORWARD): 5.0,
    ("sigma2(p)", EIGHT, FORWARD): 5.0,
    ("sigma2_bounds(p)", EIGHT, FORWARD): 5.0,
    ("round_to_birkhoff(p)", EIGHT, FORWARD): 10.4,
    ("temperature_for_sigma2(x, 0.5)", EIGHT, FORWARD): 17.4,
    ("sinkhorn_attention(x, x, x), bfloat16", HEADS_OF_64, FORWARD): 12.0,
    ("sinkhorn_attention(x, x, x), bfloat16", HEADS_OF_64, BACKWARD): 8.0,
}


def key_of(row: HostRow) -> Key:
    """What a promise is made of."""
    return row.call, row.shape, row.direction


def measured(row: HostRow) -> float | None:
    """What a promise bounds: the ratio to an empty Function; in a graph, microseconds."""
    if row.direction != COMPILED:
        return row.ratio
    return None if row.seconds_min is None else 1e6 * row.seconds_min


def verdict(row: HostRow) -> Verdict | None:
    """Whether a stubbed row keeps what is promised of it; None where nothing is."""
    most = MOST.get(key_of(row)) if row.launches == STUBBED else None
    return None if most is None else _verdict(key_of(row), measured(row), most)


def verdicts(rows: Iterable[HostRow]) -> list[Verdict]:
    """Every promise beside the row of it; what was not measured fails."""
    found = {key_of(row): measured(row) for row in rows if row.launches == STUBBED}
    return [_verdict(key, found.get(key), most) for key, most in MOST.items()]


def _verdict(key: Key, found: float | None, most: float) -> Verdict:
    call, shape, direction = key
    unit = "microseconds" if direction == COMPILED else "empty Functions"
    return Verdict(shape, direction, f"{call}: {unit}, at most", found, most, found is not None and found <= most)
