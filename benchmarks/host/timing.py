"""The host's time of every call, beside an empty autograd.Function and another package's call, in interleaved rounds.

A call is first made unstubbed and held against float64, then stubbed, where it has to launch the kernels that it should and no
others. Of a call, a round times slices of about a millisecond, and the least of all counts: what disturbs the host only adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..peers import sinkhorn_peers
from ..rows import BACKWARD, FORWARD, current_run
from .calls import Call, calls, same
from .rows import COMPILED, EMPTY, OWN, REAL, STUBBED, HostRow
from .stubs import stubbed

SLICE = 1e-3  # seconds of one call at a time: so short that others rarely come between, on a machine that others use as well
SLICES = 6  # in a round, one after the other: in the first, caches hold what the calls before needed
MOST_CALLS = 200  # in a slice: fewer than a GPU's queue holds
PEER, PEER_SHAPE = "hyper-connections", (1, 4, 4)
Shape = tuple[int, ...]


class _Empty(torch.autograd.Function):
    """What any call with a gradient costs in PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Take an output."""
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Take a gradient."""
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


@dataclass
class Timed:
    """What is timed: ``run`` makes one call, or with ``less`` three where that makes one: their difference, halved, counts."""

    call: str
    shape: Shape
    direction: str
    run: Callable[[], Any]
    launches: str
    kernels: int | None = None
    less: Timed | None = None
    count: int = 1
    seconds: list[float] = field(default_factory=list)

    def prepare(self) -> None:
        """Warm up, and choose how many calls a slice makes."""
        for _ in range(5):
            self.run()
        begin = perf_counter()
        for _ in range(5):
            self.run()
        self.count = min(max(int(5 * SLICE / (perf_counter() - begin)), 1), MOST_CALLS)

    def round(self, wait: Callable[[], None]) -> None:
        """Time the slices of one round, each up to the last call's return."""
        for _ in range(SLICES):
            begin = perf_counter()
            for _ in range(self.count):
                self.run()
            self.seconds.append((perf_counter() - begin) / self.count)
            wait()


def measured(device: str, rounds: int, match: str = "") -> Iterator[HostRow]:
    """The rows of the calls whose text contains ``match``: stubbed, and on a GPU real as well."""
    chosen = [call for call in calls(device) if match in call.text]
    for call in chosen:
        check_answer(call)
        launched: list[str] = []
        with stubbed(launched):
            check_launches(call, launched)
    yield from _rows(device, chosen, rounds, STUBBED)
    if device == "cuda":
        yield from _rows(device, chosen, rounds, REAL)


def check_answer(call: Call) -> None:
    """Hold what a call returns, and its gradient, against the truth; AssertionError where it is wrong."""
    x, exact = call.source.clone().requires_grad_(), call.source.double().requires_grad_()
    found, truth = call.seen(call.output(call.function(x))), call.truth(exact)
    _check(call, "output", found, truth)
    if truth.requires_grad and call.backward is not None:
        cotangent = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(found)
        gradients = (torch.autograd.grad(y, at, cotangent.to(y))[0] for y, at in ((found, x), (truth, exact)))
        _check(call, "gradient", *gradients)


def _check(call: Call, what: str, found: Tensor, truth: Tensor) -> None:
    error = float((found.detach().to(truth) - truth.detach()).abs().nan_to_num(nan=torch.inf).amax())
    if not error <= call.tolerance * float(truth.detach().abs().amax()):
        raise AssertionError(f"{call.text}: the {what} misses the truth by {error:.1e}")


def check_launches(call: Call, launched: list[str]) -> None:
    """What a stubbed call launches, the first time and after; AssertionError where it is not what it should be."""
    for which, run in _runs(call):
        expected = call.kernels if which == FORWARD else (*call.kernels, *(call.backward or ()))
        for _ in range(3):
            launched.clear()
            run()
            if Counter(launched) != Counter(expected):
                raise AssertionError(f"{call.text}, {which}: launched {dict(Counter(launched))}, not {dict(Counter(expected))}")


def _runs(call: Call) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The call without a gradient, and forward and backward of it."""
    yield FORWARD, _without_gradient(call.function, call.source)
    if call.backward is not None:
        with torch.no_grad():
            cotangent = torch.randn_like(call.output(call.function(call.source)))
        function = call.function if call.output is same else lambda x: call.output(call.function(x))
        yield BACKWARD, _with_gradient(function, call.source, cotangent)


def _without_gradient(function: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return function(x)

    return run


def _with_gradient(function: Callable[[Tensor], Tensor], source: Tensor, cotangent: Tensor) -> Callable[[], Any]:
    x = source.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(x), x, cotangent)


def _rows(device: str, chosen: list[Call], rounds: int, launches: str) -> Iterator[HostRow]:
    """The rows of one mode, in which everything is timed in the same rounds, but for graphs: of these, each call by itself."""
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    left_out = [(call, BACKWARD, call.no_gradient) for call in chosen if call.backward is None]
    with stubbed() if launches == STUBBED else nullcontext():
        jobs = [*_empty(device), *_peer(device), *(job for call in chosen for job in _jobs(call, launches))]
        _in_turn(jobs, rounds, wait)
        for call in chosen:
            try:
                one, three = _graphs(call, launches)
            except Exception as failure:  # whatever a compiler may raise, as where there is none, must not end the run
                left_out.append((call, COMPILED, f"failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"))
                continue
            _in_turn([one, three], rounds, wait)
            jobs.append(three)
    run = current_run(device)
    empty = {job.direction: min(job.seconds) for job in jobs if job.call == EMPTY}
    for job in jobs:
        least, middle = min(job.seconds), median(job.seconds)
        ratio = None
        if job.less is None:
            ratio = least / empty[job.direction]
        else:
            least, middle = ((a - b) / 2 for a, b in ((least, min(job.less.seconds)), (middle, median(job.less.seconds))))
        yield HostRow(job.call, job.shape, job.direction, job.launches, job.kernels, least, middle, rounds, ratio, None, run)
    for call, direction, why in left_out:
        yield HostRow(call.text, call.shape, direction, launches, None, None, None, 0, None, why, run)


def _in_turn(jobs: list[Timed], rounds: int, wait: Callable[[], None]) -> None:
    """Make the rounds."""
    for job in jobs:
        job.prepare()
    for _ in range(rounds):
        for job in jobs:
            job.round(wait)


def _empty(device: str) -> list[Timed]:
    x = torch.zeros(64, 4, 4, device=device)
    runs = ((FORWARD, _without_gradient(_Empty.apply, x)), (BACKWARD, _with_gradient(_Empty.apply, x, torch.ones_like(x))))
    return [Timed(EMPTY, tuple(x.shape), direction, run, OWN, 0) for direction, run in runs]


def _peer(device: str) -> list[Timed]:
    """Another package's call, of one matrix, which computes: there is nothing to stub in it."""
    x = torch.zeros(PEER_SHAPE, device=device)
    found = []
    for direction in (FORWARD, BACKWARD):
        (peer,) = (peer for peer in sinkhorn_peers(x, direction) if peer.name == PEER)
        if peer.left_out is not None:
            return []
        if direction == FORWARD:
            run = _without_gradient(peer.function, x)
        else:
            run = _with_gradient(partial(_first, peer.function), x, torch.ones_like(x))
        found.append(Timed(peer.call, PEER_SHAPE, direction, run, OWN))
    return found


def _jobs(call: Call, launches: str) -> Iterator[Timed]:
    for direction, run in _runs(call):
        kernels = len(call.kernels) + (len(call.backward or ()) if direction == BACKWARD else 0)
        yield Timed(call.text, call.shape, direction, run, launches, kernels)


def _graphs(call: Call, launches: str) -> tuple[Timed, Timed]:
    """One call in a graph and three, of inputs of their own each, lest they be one."""
    inputs = [call.source.clone() for _ in range(3)]
    function = call.function

    def one(x: Tensor, y: Tensor, z: Tensor) -> Any:
        return (function(x),)

    def three(x: Tensor, y: Tensor, z: Tensor) -> Any:
        return function(x), function(y), function(z)

    torch.compiler.reset()
    runs = [partial(_of_graph, torch.compile(function, fullgraph=True), inputs) for function in (one, three)]
    for run in runs:
        run()
    single = Timed(call.text, call.shape, COMPILED, runs[0], launches)
    return single, Timed(call.text, call.shape, COMPILED, runs[1], launches, len(call.kernels), less=single)


def _of_graph(graph: Callable[..., Any], inputs: list[Tensor]) -> Any:
    with torch.no_grad():
        return graph(*inputs)


def _first(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> Tensor:
    return function(x)[0]


def _nothing() -> None:
    pass
