"""``python -m benchmarks.static.short``: attention of heads that fit on chip, counted, and the model's times.

bfloat16, 64 features, 3 sweeps, 768 heads; times are predictions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler, from Triton's import on

import torch

from fastdsm._ops.problem import Attention
from fastdsm._ops.streamed.gradient import AttentionGradients, Cotangents
from fastdsm._ops.streamed.sweeps import State, Sweeps
from fastdsm.kernels.attention import launch_short
from fastdsm.kernels.common.configuration import Launch

from .compilation import compile_configuration, disassemble
from .devices import DEVICES
from .execution import execute, parameter_words
from .launches import recorded
from .prediction import launch_time
from .sass import parse

HEADS, FEATURES, SWEEPS, TARGET = 768, 64, 3, "sm_90"


@dataclass(frozen=True)
class Counted:
    """Of a launch: its kernel, lines a side, warp-instructions of a head, microseconds on each device."""

    kernel: str
    lines: int
    instructions: int
    times: tuple[float | None, ...]


def rows(lines: int) -> Iterator[Counted]:
    """Forward, and the two of the backward where there are any."""
    for x in _launches(lines):
        configuration = x.configuration
        program = parse(disassemble(compile_configuration(configuration, TARGET).cubin)[1])
        words = parameter_words(configuration.signature(), x.arguments, TARGET)
        run = execute(program, words, guessing=True)
        assert run is not None
        times = [launch_time(x, x.programs, (), device) for device in DEVICES]
        instructions = run.counts.total() * configuration.num_warps
        micros = tuple(None if time is None else round(time / 1000, 1) for time in times)
        yield Counted(configuration.kernel.fn.__name__, lines, instructions, micros)


def _launches(lines: int) -> list[Launch]:
    query, key, value, cotangent = torch.empty(4, 1, HEADS, lines, FEATURES, dtype=torch.bfloat16).unbind()
    f, g = torch.empty(2, 1, HEADS, 1, lines, dtype=torch.float64).unbind()
    state = State(f, g, torch.empty(1, HEADS), torch.empty(1, HEADS, dtype=torch.int32))
    problem, sweeps = Attention(query, key, FEATURES**-0.5), Sweeps(SWEEPS, True)
    with recorded() as launches:
        launch_short.forward(problem, value, sweeps, None, cotangent, state)
        if launch_short.serves(query, key, value, False, True):
            gradients = AttentionGradients(query, key, value, None)
            launch_short.backward(problem, value, sweeps, None, Cotangents(cotangent), state.sweeps, gradients)
    return launches


if __name__ == "__main__":
    for lines in launch_short.LINES:
        for row in rows(lines):
            times = ", ".join(f"{time} us on {device.name}" for time, device in zip(row.times, DEVICES, strict=True))
            print(f"{row.kernel}, {lines} lines: {row.instructions:,} warp-instructions a head; {HEADS} heads: {times}")
