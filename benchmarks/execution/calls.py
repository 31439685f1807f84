"""The public calls by which kernels are executed, on few small matrices: a grid of sizes by dtypes by options.

What a call launches depends on sizes, dtypes, options and alignment alone, so that a grid over these reaches every
configuration that public calls can reach; values are drawn, and every result is judged by ``fastdsm._verify``'s policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fastdsm._verify.attention import AttentionCase
from fastdsm._verify.mhc import MhcCase, verify_mhc_case
from fastdsm._verify.newton import NewtonCase, verify_newton_case
from fastdsm._verify.sinkhorn import Case, Record, Target, verify_case

from . import judged, judged_attention

TARGET = Target("triton", "cpu")
SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
NARROW = (SINGLE, HALF, BRAIN)
DTYPES = (*NARROW, DOUBLE)

# (B, n, m). A program of the smaller families takes up to 128 matrices: one is full, and one is not.
FOUR = ((130, 4, 4), (130, 3, 4))
PACKED = tuple((130, n, n) for n in (5, 6, 7, 8))
TILES = ((33, 4, 4), (17, 7, 5), (5, 9, 16), (2, 17, 30), (1, 40, 64), (1, 100, 90))
CONVERGED = TILES[:5]
# Rows of whole 16-byte vectors or not, of every number of columns that is padded to another.
PANELS = ((2, 132, 40), (2, 132, 41), (1, 132, 104), (1, 132, 103), (1, 24, 200), (1, 24, 199))
DOUBLE_PANELS = tuple((1, n, m) for n, m in ((12, 40), (13, 41), (18, 104), (19, 103), (24, 200), (24, 199)))
STREAMS = tuple((1, 17, m) for m in (264, 263, 520, 519, 1040, 1039, 2080, 2079, 4160, 4159, 8200, 8199))
PLANS = ((33, 4, 4), (33, 4, 3), (17, 8, 8), (5, 16, 9), (2, 30, 17), (1, 64, 40))
# Lines of an attention, the fewer of which are to fit on chip, by features.
LINES, FEATURES = ((70, 33), (40, 150), (20, 300)), (24, 72, 136)
FEW_LINES = 30, 20  # as many as Lanczos takes steps: singular vectors are exact but for rounding
MULTIPLIED = (*((dtype, "highest") for dtype in NARROW), (SINGLE, "high"))


@dataclass(frozen=True)
class Call:
    """A public call and its gradients, judged. noise: whether it is also made with approximations off by their errors."""

    name: str
    run: Callable[[], list[Record]]
    noise: bool = False


def _call(judge: Callable[[Any, Target], list[Record]], case: Case, name: str = "") -> Call:
    return Call(f"{name}{': ' * bool(name)}{case}", partial(judge, case, TARGET))


def register_calls() -> Iterator[Call]:
    """Matrices of which a thread holds one."""
    for dtype, shape in itertools.product(NARROW, (*FOUR, *PACKED)):
        for std, n_iters in ((1.0, 20), (30.0, 20), (3.0, 0), (3.0, 1)):
            yield _call(verify_case, Case(shape, dtype, std, n_iters))
        yield _call(verify_case, Case(shape, dtype, 3.0, 60))
        for option in ("row first", "temperature"):
            yield _call(verify_case, Case(shape, dtype, 2.0, 20, option))
        yield _call(judged.plan_alone, Case(shape, dtype, 2.0), "plan alone")
        for std in (0.1, 1.0, 4.0):
            yield _call(verify_newton_case, NewtonCase(shape, dtype, std, 40))
        for option in ("row first", "temperature"):
            yield _call(verify_newton_case, NewtonCase(shape, dtype, 2.0, 40, option))
        yield _call(judged.converged_alone, NewtonCase(shape, dtype, 2.0, 40), "plan alone, its sigma2")
    for dtype in NARROW:
        yield _call(verify_case, Case(FOUR[0], dtype, 2.0, 20, "mask"))
    yield _call(verify_case, Case(FOUR[0], DOUBLE, 1.0, 20))


def tile_calls() -> Iterator[Call]:
    """Matrices that a program keeps on chip; of 4x4 what marginals, masks or a tolerance keep from the registers."""
    options = itertools.cycle(("marginals", "tol", "f0", "mask", "row first"))
    for dtype, shape in itertools.product(NARROW, TILES):
        for option in itertools.islice(options, 2):
            yield _call(verify_case, Case(shape, dtype, 2.0, 5, option))
    for dtype, shape in itertools.product(NARROW, CONVERGED):
        yield _call(verify_newton_case, NewtonCase(shape, dtype, 1.0, 40, "marginals"))
        yield _call(verify_newton_case, NewtonCase(shape, dtype, 4.0, 40, "one marginal"))
    for shape in CONVERGED:
        yield _call(judged.temperature, Case(shape, SINGLE, 2.0), "temperature")


def spectrum_calls() -> Iterator[Call]:
    """Plans in float64, small enough that their sigma2 and its bounds come from the chip."""
    for shape in PLANS:
        yield _call(verify_case, Case(shape, DOUBLE, 1.0, 2))


def panel_calls() -> Iterator[Call]:
    """Matrices that are read again in each sweep."""
    for dtype in DTYPES:
        for shape, option in zip(
            DOUBLE_PANELS if dtype == DOUBLE else PANELS, itertools.cycle(("", "marginals")), strict=False
        ):
            yield _call(verify_case, Case(shape, dtype, 2.0, 3, option))


def stream_calls() -> Iterator[Call]:
    """Matrices of more than 256 columns."""
    for dtype, shape in itertools.product(NARROW, STREAMS):
        yield _call(verify_case, Case(shape, dtype, 2.0, 2))
    for dtype, m in itertools.product(NARROW, (200, 199)):
        yield _call(verify_case, Case((1, 270, m), dtype, 2.0, 2))
    for dtype, shape, option in itertools.product(NARROW, STREAMS[:2], ("row first", "marginals", "tol")):
        yield _call(verify_case, Case(shape, dtype, 2.0, 2, option))


def attention_calls() -> Iterator[Call]:
    """Sinkhorn attention by every block of features; float32 multiplied exactly, and as TF32."""
    for (dtype, precision), d in itertools.product(MULTIPLIED, FEATURES):
        yield from _attentions(dtype, precision, d)


def _attentions(dtype: torch.dtype, precision: str, d: int) -> Iterator[Call]:
    def call(judge: Any, first: str, case: AttentionCase, dropout: bool = False) -> Call:
        how = {"first": first, "precision": precision} | ({"dropout": True} if dropout else {})
        words = [f"{first} first"] + ["dropout"] * dropout + ["in TF32"] * (precision == "high")
        return _call(partial(judge, **how), case, ", ".join(words))

    def case(std: float, n_iters: int, option: str = "", lines: tuple[int, int] = LINES[0]) -> AttentionCase:
        return AttentionCase((1, 2, 1, *lines, d, 20), dtype, std, n_iters, option)

    attend, sigma2 = judged_attention.attention, judged_attention.sigma2
    large = 10.0 if precision == "high" else 50.0  # products of 50 in TF32 are off by 0.02: a plan of other entries
    for std, n_iters in ((1.0, 3), (large, 3), (3.0, 0)):
        yield call(attend, "col", case(std, n_iters))
    yield call(attend, "row", case(1.0, 3))
    for lines in LINES[1:] if dtype != SINGLE else ():
        yield call(attend, "col", case(1.0, 3, lines=lines))
    for option, first, dropout in itertools.product(("", "bias"), ("col", "row"), (False, True)):
        if option or dropout:
            yield call(attend, first, case(2.0, 3, option), dropout)
    for option in ("mask", *(("temperature", "padding") if d == FEATURES[0] else ())):
        yield call(attend, "col", case(2.0, 3, option))
    for option, first in (("", "col"), ("", "row"), ("bias", "col")):
        yield call(sigma2, first, case(2.0, 3, option, FEW_LINES))
    for option in ("", "bias") if dtype != SINGLE else ():  # of query heads with a key head each, whose gradient stays narrow
        yield call(sigma2, "col", replace(case(2.0, 3, option, FEW_LINES), shape=(1, 2, 2, *FEW_LINES, d, 20)))


def short_attention_calls() -> Iterator[Call]:
    """Attention of heads that fit on chip: with gradients, and results alone of more features and lines."""
    for dtype, first in itertools.product((HALF, BRAIN), ("col", "row")):
        yield from _short_attentions(dtype, first)


def _short_attentions(dtype: torch.dtype, first: str) -> Iterator[Call]:
    def call(judge: Any, shape: tuple[int, ...], option: str = "", dropout: bool = False, n_iters: int = 3) -> Call:
        case = AttentionCase((1, 2, 1, *shape), dtype, 2.0, n_iters, option)
        words = ["short", f"{first} first"] + ["dropout"] * dropout
        return _call(partial(judge, first=first, dropout=dropout), case, ", ".join(words))

    attend, result, shape = judged_attention.attention, judged_attention.result_alone, (40, 33, 24, 20)
    for option in ("", "bias", "mask", "padding", "temperature"):
        yield call(attend, shape, option)
    yield call(attend, shape, dropout=True)
    for n_iters in (0, 20):
        yield call(attend, shape, n_iters=n_iters)
    for option, dropout in (("", False), ("bias", False), ("", True)):
        yield call(result, (40, 33, 72, 20), option, dropout)
        yield call(result, shape, option, dropout)
    yield call(result, (100, 128, 24, 20))


def layer_calls() -> Iterator[Call]:
    """mHC layers by streams; by tokens, of which few are cut otherwise; channels of whole vectors, and not."""
    for dtype in NARROW:
        for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16):
            for option in ("deepseek", "paper", "info", "head"):
                yield _call(verify_mhc_case, MhcCase((3, n, 16), dtype, 1.0, 20, option))
        for tokens, n in itertools.product((40, 260), (1, 2, 4, 6, 9)):
            yield _call(verify_mhc_case, MhcCase((tokens, n, 8), dtype, 4.0, 3, "deepseek"))
        for channels, option in itertools.product((16, 5), ("post pre", "shifted")):
            yield _call(verify_mhc_case, MhcCase((130, 4, channels), dtype, 1.0, 20, option))
        for n in (3, 7, 12):
            yield _call(verify_mhc_case, MhcCase((5, n, 11), dtype, 16.0, 20, "liger"))


def _noisy(calls: Callable[[], Iterator[Call]]) -> Callable[[], Iterator[Call]]:
    return lambda: (replace(call, noise=True) for call in calls())


FAMILIES = (
    _noisy(register_calls),
    tile_calls,
    spectrum_calls,
    panel_calls,
    stream_calls,
    layer_calls,
    short_attention_calls,
    attention_calls,
)
"""By what they cost."""
