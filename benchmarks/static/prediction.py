"""What the static model predicts of an ordinary call, from machine code compiled and executed now."""

from __future__ import annotations

from dataclasses import dataclass

from fastdsm.kernels.common.configuration import Launch

from .compilation import compile_configuration, disassemble, kernel_name
from .execution import execute, parameter_words
from .launches import Call
from .model import predicted_time
from .report import SWEEPS
from .sass import parse


@dataclass(frozen=True)
class Prediction:
    """Nanoseconds a matrix of a batch that fills the chip, by what they are bound, and the kernels; None: not countable."""

    kernels: tuple[str, ...]
    ns: float | None
    bound: str


def predict(call: Call, target: str) -> Prediction:
    """Sum what the launches of a call take one after the other."""
    launches = call.record(SWEEPS)
    names = tuple(kernel_name(launch.configuration) for launch in launches)
    times = [_of_launch(launch, target, call.bytes_per_matrix) for launch in launches]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return Prediction(names, None, "")
    return Prediction(names, sum(ns for ns, _ in known), max(known)[1])


def _of_launch(launch: Launch, target: str, moved: int) -> tuple[float, str] | None:
    configuration = launch.configuration
    parameters = parameter_words(configuration.signature(), launch.arguments, target)
    _, text = disassemble(compile_configuration(configuration, target).cubin)
    run = execute(parse(text), parameters)
    if run is None:
        return None
    found = predicted_time(run.counts, 32 * configuration.num_warps, configuration.matrices, moved)
    return float(found["predicted_ns"]), str(found["predicted_bound"])
