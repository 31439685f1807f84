"""What a call of many matrices takes on a GPU, from machine code: its launches' programs, simulated on one multiprocessor.

The machine code, where its loops can be followed, gives what the warps of a program issue and touch; registers and shared
memory say how many programs a multiprocessor has at a time; from where that number is steady, the rest takes its share. Kernels
of a call follow one another, each after the launch's own time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

from fastdsm.kernels.common import configuration as configurations
from fastdsm.kernels.common.configuration import Launch

from .compilation import compile_configuration, disassemble, kernel_name, source
from .devices import Device, resident
from .execution import Execution, execute, parameter_words
from .launches import Call
from .multiprocessor import cycles, steps_of
from .report import FEWER_SWEEPS, SWEEPS
from .sass import Program, parse

_MOST_STEPS = 60_000  # of a warp; what takes more is followed for fewer sweeps, and the others take as long each
_MOST_STEPS_OF_ONE = 1_000_000  # where no number of sweeps could be less
_STEADY = (2, 4)  # times as many programs as run at a time


@dataclass(frozen=True)
class Prediction:
    """Of one call: nanoseconds a matrix, None if the code cannot be followed; of its kernels the names and sources."""

    kernels: tuple[str, ...]
    sources: tuple[str, ...]
    ns: float | None


def predict(call: Call, batch: int, device: Device) -> Prediction:
    """Sum the launches of ``batch`` matrices, which SWEEPS sweeps are made of where the call makes sweeps."""
    with mock.patch.object(configurations, "multiprocessors", return_value=device.multiprocessors):
        launches = call.record_batch(SWEEPS, batch)
    names = tuple(kernel_name(launch.configuration) for launch in launches)
    sources = tuple(source(launch.configuration) for launch in launches)
    times = [_time(call, place, launch, batch, device) for place, launch in enumerate(launches)]
    known = [time for time in times if time is not None]
    return Prediction(names, sources, sum(known) / batch if len(known) == len(times) else None)


def launch_time(launch: Launch, programs: int, common: Sequence[range], device: Device) -> float | None:
    """Nanoseconds of a launch of so many programs that each do the same once; common: lower words of what all of them read."""
    code = _code(launch, device, common)
    run = code.run(launch, device, _MOST_STEPS_OF_ONE)
    each = -(-programs // device.multiprocessors)
    return None if run is None else device.launch + code.cycles(run, each, each, device) / device.clock_ghz


def _time(call: Call, place: int, launch: Launch, batch: int, device: Device) -> float | None:
    """Nanoseconds of one launch."""
    code = _code(launch, device)
    blocks = -(-batch // launch.configuration.matrices)
    most = -(-launch.programs // device.multiprocessors)
    each = -(-blocks // device.multiprocessors)
    for sweeps in ((SWEEPS,), (FEWER_SWEEPS, 2 * FEWER_SWEEPS)) if call.sweeps else ((SWEEPS,),):
        runs = [code.run(call.record(number)[place], device) for number in sweeps]
        if None not in runs:
            times = [code.cycles(run, each, most, device) for run in runs if run is not None]
            slope = (times[-1] - times[0]) / FEWER_SWEEPS
            return device.launch + (times[-1] + slope * (SWEEPS - sweeps[-1])) / device.clock_ghz
    return None


def _code(launch: Launch, device: Device, common: Sequence[range] = ()) -> _Code:
    compiled = compile_configuration(launch.configuration, device.target)
    resources, text = disassemble(compiled.cubin)
    warps = launch.configuration.num_warps
    return _Code(parse(text), warps, resident(warps, resources.registers, compiled.shared), common)


_Run = tuple[Execution, Mapping[int, int]]  # what ran, with which parameters


@dataclass(frozen=True)
class _Code:
    program: Program
    warps: int
    programs: int  # on a multiprocessor at a time, as far as registers and shared memory decide
    common: Sequence[range]  # lower words of addresses that all programs read

    def run(self, launch: Launch, device: Device, most_steps: int = _MOST_STEPS) -> _Run | None:
        """The path of one program, unless its loops end by data or it is too long."""
        parameters = parameter_words(launch.configuration.signature(), launch.arguments, device.target)
        found = execute(self.program, parameters, guessing=True)
        return None if found is None or found.counts.total() > most_steps else (found, parameters)

    def cycles(self, run: _Run, each: int, most: int, device: Device) -> float:
        """Of ``each`` blocks of matrices on a multiprocessor, at most ``most`` of them at a time."""
        together = min(self.programs, most)
        steps = steps_of(*run, self.warps * together, device, self.common)
        few, more = (times * together for times in _STEADY)
        if each <= more:
            return cycles(steps, self.warps, each, together)
        before, after = (cycles(steps, self.warps, number, together) for number in (few, more))
        return after + (each - more) * (after - before) / (more - few)
