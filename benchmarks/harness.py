"""Check, measure and time several implementations of one operation, in interleaved rounds.

A case is an operation at one size and in one direction. Each implementation is first run and its output held against
float64; one whose output is wrong is left out, and the row says so. Then its peak memory is taken, and then come rounds
in which every implementation runs once, so that what disturbs the machine disturbs all of them alike; a ratio is the
median of the ratios within rounds. fastdsm's own time is pytest-benchmark's, the others are taken in the set-up of its
rounds by the same clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .memory import peak_extra_bytes
from .rows import BACKWARD, Row, current_run
from .targets import SWEEPS

SHAPES = ((65536, 4, 4), (8192, 16, 16), (512, 64, 64), (32, 256, 256))
# Between the rounding of 20 float32 sweeps, about 3e-7, and the mistakes to be caught, from 1e-4 on.
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# A call on a GPU takes microseconds: a round makes several, about so long together, over copies of the input that exceed any
# L2 cache. What takes longer than CAPTURED seconds is timed as called only: there the host's part is small.
CUDA_ROUND, CUDA_CALLS = 0.01, 20
CUDA_COPIES_BYTES = 256 * 2**20
CAPTURED = 0.02
ORACLE_ENTRIES = 2**18  # the oracle takes seconds, and its unrolled graph many times this memory
MOST_ROUNDS = 15
FEWEST_ROUNDS = 3

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Definition:
    """What an implementation is meant to compute: ``function`` maps float64 matrices, each by itself, to the truth."""

    name: str
    function: Callable[[Tensor], Outputs]


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operation: ``function`` maps the input to the outputs of its ``definition``."""

    name: str
    call: str
    function: Callable[[Tensor], Outputs]
    definition: Definition
    left_out: str | None = None
    capturable: bool = False  # into a CUDA graph


@dataclass(frozen=True)
class Case:
    """An operation at one size and in one direction, with the input every implementation gets.

    ``value_tolerance`` and ``gradient_tolerance`` bound errors relative to the largest true entry; no gradient
    tolerance where the gradient itself is ill-conditioned (that of sigma2 near a multiple singular value).
    """

    operation: str
    source: Tensor
    direction: str
    sweeps: int | None = SWEEPS
    value_tolerance: float = VALUE_TOLERANCE
    gradient_tolerance: float | None = GRADIENT_TOLERANCE
    seconds: float = 6.0  # about how long all rounds together may take; an eighth of it on a GPU

    @property
    def device(self) -> str:
        """Where the case runs: "cpu" or "cuda"."""
        return self.source.device.type

    def checked(self, x: Tensor) -> Tensor:
        """Take the matrices that are held against float64: every k-th, about ORACLE_ENTRIES in all."""
        return x[:: max(1, self.source.numel() // ORACLE_ENTRIES)]

    def cotangents(self, outputs: Outputs) -> list[Tensor]:
        """Draw one random cotangent for each output, the same for every implementation, for all matrices."""
        generator = torch.Generator().manual_seed(1)
        shapes = [(len(self.source), *out.shape[1:]) for out in outputs]
        return [torch.randn(shape, generator=generator).to(self.source) for shape in shapes]


@dataclass
class _Contender:
    """An implementation in its rounds: the prepared call, what it returned last, and its times."""

    implementation: Implementation
    call: Callable[[], Outputs]
    calls: int = 1  # in a round
    extra_bytes: int | None = None
    last: Outputs = ()
    seconds: list[float] = field(default_factory=list)
    graph: torch.cuda.CUDAGraph | None = None  # of the calls of a round
    device_seconds: list[float] = field(default_factory=list)

    def run(self) -> Outputs:
        """Make the calls of one round; on a GPU, wait for the last of them."""
        for _ in range(self.calls):
            result = self.call()
        if result[0].is_cuda:
            torch.cuda.synchronize()
        return result

    def once(self) -> None:
        begin = perf_counter()
        self.last = self.run()
        self.seconds.append(perf_counter() - begin)

    def capture(self) -> None:
        """Make the graph, after one call on the stream that it is captured on."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for _ in range(self.calls):
                self.call()

    def replay(self) -> None:
        """Time the graph, if there is one, between two events."""
        if self.graph is not None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            self.device_seconds.append(1e-3 * begin.elapsed_time(end))


def seconds_of(job: Callable[[], object], count: int) -> float:
    """Of one call on a CPU, from so many."""
    begin = perf_counter()
    for _ in range(count):
        job()
    return (perf_counter() - begin) / count


def measure(benchmark: BenchmarkFixture, case: Case, implementations: Sequence[Implementation]) -> None:
    """Measure a case and leave its rows, as dicts, in ``benchmark.extra_info["rows"]``.

    With ``--benchmark-disable`` outputs are checked, everything runs once more, and there are no rows.

    ``implementations`` holds "fastdsm" and "eager" at least. Raises AssertionError where the output of one of these two
    is wrong: without them there is nothing to compare.
    """
    truths: dict[str, Outputs] = {}
    contenders, rows, once = [], [], 0.0
    for implementation in implementations:
        if implementation.left_out is not None:
            rows.append(_row(case, implementation, left_out=implementation.left_out))
            continue
        name = implementation.definition.name
        if name not in truths:
            truths[name] = _truth(case, implementation.definition)
        contender = _Contender(implementation, _prepared(case, implementation.function, truths[name]))
        problem = _problem(case, contender, truths[name])
        if problem is None:
            contenders.append(contender)
        elif implementation.name in ("fastdsm", "eager"):
            raise AssertionError(f"{implementation.name}, {case.operation} {tuple(case.source.shape)}: {problem}")
        else:
            rows.append(_row(case, implementation, left_out=problem))
    on_cuda = case.device == "cuda"
    for contender in contenders:
        begin = perf_counter()
        contender.extra_bytes = peak_extra_bytes(contender.call, case.device)
        if on_cuda:
            torch.cuda.synchronize()
        seconds = perf_counter() - begin
        if on_cuda:
            contender.calls = min(max(int(CUDA_ROUND / seconds), 1), CUDA_CALLS)
            if contender.implementation.capturable and seconds < CAPTURED:
                contender.capture()
        once += seconds * contender.calls
    rounds = min(max(int((case.seconds / 8 if on_cuda else case.seconds) / once), FEWEST_ROUNDS), MOST_ROUNDS)

    moved = _moved_bytes(case, contenders[0].last)
    floor = _Contender(_clone(), _clone_of(moved, case.device), CUDA_CALLS if on_cuda else 1)
    if on_cuda:
        floor.capture()
    (ours,) = (x for x in contenders if x.implementation.name == "fastdsm")
    others = [floor, *(x for x in contenders if x is not ours)]

    def others_in_turn() -> None:
        for contender in others:
            contender.once()
        for contender in (*others, ours):
            contender.replay()

    ours.last = benchmark.pedantic(ours.run, setup=others_in_turn, rounds=rounds)
    if benchmark.disabled:
        return
    ours.seconds = list(benchmark.stats.stats.data)
    (eager,) = (x for x in contenders if x.implementation.name == "eager")
    for contender in (*contenders, floor):
        rows.append(_timed_row(case, contender, truths, floor, eager, moved))
    benchmark.extra_info["rows"] = [asdict(row) for row in rows]


def _truth(case: Case, definition: Definition) -> Outputs:
    """Outputs in float64 and, for both directions, the gradient, of the matrices that are checked."""
    x = case.checked(case.source).double().requires_grad_(case.direction == BACKWARD)
    outputs = definition.function(x)
    if case.direction != BACKWARD:
        return outputs
    cotangents = [case.checked(seeds).double() for seeds in case.cotangents(outputs)]
    (gradient,) = torch.autograd.grad(outputs, x, cotangents)
    return (*(out.detach() for out in outputs), gradient)


def _prepared(case: Case, function: Callable[[Tensor], Outputs], truth: Outputs) -> Callable[[], Outputs]:
    """Make the call to be timed, without arguments: inputs and cotangents exist before it."""
    copies = 1
    if case.device == "cuda":
        copies = 1 + CUDA_COPIES_BYTES // (case.source.numel() * case.source.element_size())
    inputs = cycle([case.source.clone().requires_grad_(case.direction == BACKWARD) for _ in range(copies)])
    if case.direction != BACKWARD:
        return lambda: function(next(inputs))
    cotangents = case.cotangents(truth[:-1])

    def both() -> Outputs:
        x = next(inputs)
        outputs = function(x)
        (gradient,) = torch.autograd.grad(outputs, x, cotangents)
        return (*(out.detach() for out in outputs), gradient)

    return both


def _errors(case: Case, outputs: Outputs, truth: Outputs) -> Iterator[tuple[float, float]]:
    """(largest error, largest true entry) of each output, NaN counted as an infinite error."""
    for out, true in zip(outputs, truth, strict=True):
        difference = (case.checked(out).double() - true).abs().nan_to_num(nan=torch.inf)
        yield float(difference.amax()), float(true.abs().amax())


def _problem(case: Case, contender: _Contender, truth: Outputs) -> str | None:
    """Call once; what is wrong with the outputs, or None."""
    try:
        contender.last = contender.call()
    except Exception as failure:  # whatever another package may raise must not end the run
        return f"failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
    errors = list(_errors(case, contender.last, truth))
    bounds: list[float | None] = [case.value_tolerance] * len(errors)
    if case.direction == BACKWARD:
        bounds[-1] = case.gradient_tolerance
    for index, ((error, size), bound) in enumerate(zip(errors, bounds, strict=True)):
        if bound is not None and not error <= bound * size:
            return f"output {index} misses {contender.implementation.definition.name} in float64 by {error:.1e}"
    return None


def _moved_bytes(case: Case, outputs: Outputs) -> int:
    """Least traffic: the input and every output; backward also the cotangents, the gradient being among the outputs."""
    tensors = [case.source, *outputs]
    if case.direction == BACKWARD:
        tensors += outputs[:-1]
    return sum(x.numel() * x.element_size() for x in tensors)


def _clone() -> Implementation:
    definition = Definition("the same bytes", lambda x: (x,))
    return Implementation("clone", "torch.clone", lambda x: (x,), definition, capturable=True)


def _clone_of(moved: int, device: str) -> Callable[[], Outputs]:
    """Make a clone that moves as many bytes: it reads half of them and writes the other half."""
    count = moved // 8
    copies = 1 if device == "cpu" else 1 + CUDA_COPIES_BYTES // (4 * count)
    buffers = cycle([torch.zeros(count, device=device) for _ in range(copies)])
    return lambda: (next(buffers).clone(),)


def _timed_row(
    case: Case, contender: _Contender, truths: dict[str, Outputs], floor: _Contender, eager: _Contender, moved: int
) -> Row:
    error = gradient_error = None
    truth = truths.get(contender.implementation.definition.name)
    if truth is not None:
        errors = list(_errors(case, contender.last, truth))
        if case.direction == BACKWARD:
            wrong, size = errors.pop()
            gradient_error = wrong / size
        error = max(wrong for wrong, _ in errors)
    ratios = [theirs / own for theirs, own in zip(eager.seconds, contender.seconds, strict=True)]
    scale = contender.calls / eager.calls
    device = [theirs / own for theirs, own in zip(eager.device_seconds, contender.device_seconds, strict=False)]
    return _row(
        case,
        contender.implementation,
        seconds_median=median(contender.seconds) / contender.calls,
        seconds_min=min(contender.seconds) / contender.calls,
        rounds=len(contender.seconds),
        bytes=moved,
        device_seconds=median(contender.device_seconds) / contender.calls if contender.device_seconds else None,
        percent_of_floor=_percent_of_floor(floor, contender),
        peak_extra_bytes=contender.extra_bytes,
        error=error,
        gradient_error=gradient_error,
        ratio_to_eager=scale * median(ratios),
        device_ratio_to_eager=scale * median(device) if device else None,
    )


def _percent_of_floor(floor: _Contender, contender: _Contender) -> float:
    """The clone's time in percent of this one, as the device spent it where that was measured."""
    device = floor.device_seconds and contender.device_seconds
    own, least = (median(x.device_seconds if device else x.seconds) / x.calls for x in (contender, floor))
    return 100 * least / own


def _row(case: Case, implementation: Implementation, *, left_out: str | None = None, **numbers: Any) -> Row:
    fields: dict[str, Any] = dict.fromkeys(
        ("seconds_median", "seconds_min", "device_seconds", "percent_of_floor", "peak_extra_bytes", "error",
         "gradient_error", "ratio_to_eager", "device_ratio_to_eager")
    )  # fmt: skip
    fields |= {"rounds": 0, "bytes": 0} | numbers
    return Row(
        operation=case.operation,
        shape=tuple(case.source.shape),
        dtype=str(case.source.dtype).removeprefix("torch."),
        sweeps=case.sweeps,
        direction=case.direction,
        implementation=implementation.name,
        call=implementation.call,
        definition=implementation.definition.name,
        checked=len(case.checked(case.source)),
        input_bytes=case.source.numel() * case.source.element_size(),
        left_out=left_out,
        run=current_run(case.device),
        **fields,
    )
