"""Launches prepared once: made again for other tensors of the same shapes, strides, dtypes, devices and alignments.

All arguments but pointers and what a float temperature decides stay as they were. A pointer is known by its memory: that of
an output, which is fresh when launches are recorded and therefore nobody else's; that of an input which has the argument's
name, since inputs may share memory; or else memory of the call's own, which is taken anew each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .configuration import Launch, current
from .operands import OF_TEMPERATURE


class Prepared:
    """The ``launches`` that were recorded for ``inputs``, by the names that kernels have for them, and ``outputs``."""

    def __init__(
        self, launches: Sequence[Launch], inputs: Mapping[str, Tensor | None], outputs: Sequence[Tensor | None]
    ) -> None:
        given = {name: (at, x.data_ptr()) for at, (name, x) in enumerate(inputs.items()) if x is not None}
        written = {x.data_ptr(): len(inputs) + at for at, x in enumerate(outputs) if x is not None}
        own: dict[int, int] = {}
        self._own: list[Tensor] = []  # stand for memory of the call's own, without holding any
        device = next(x.device for x in inputs.values() if x is not None)
        self._index = device.index
        per_matrix = inputs.get("temperature") is not None
        self._launches = []
        for launch in launches:
            slots: list[tuple[int, int]] = []
            numbers = []
            for position, name in enumerate(launch.configuration.kernel.arg_names):
                x = launch.arguments.get(name)
                if isinstance(x, Tensor):
                    launch.configuration.check_pointer(name, x)
                    at, pointer = given.get(name.removesuffix("_ptr"), (0, None))
                    if pointer != x.data_ptr():
                        at = written.get(x.data_ptr(), -1)
                    if at < 0:
                        if x.data_ptr() not in own:
                            own[x.data_ptr()] = len(inputs) + len(outputs) + len(self._own)
                            self._own.append(x.new_empty(1).expand(x.numel()))
                        at = own[x.data_ptr()]
                    slots.append((position, at))
                elif name in OF_TEMPERATURE and not per_matrix:
                    numbers.append((position, OF_TEMPERATURE[name]))
            arguments = {name: None if isinstance(x, Tensor) else x for name, x in launch.arguments.items()}
            with current(device):
                run = launch.configuration.runner(launch.programs, device)
            self._launches.append((run, launch.configuration.values(arguments, device), slots, numbers))

    def __call__(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], temperature: float) -> None:
        """Launch for others of the same form, and a temperature that all matrices share."""
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                self(inputs, outputs, temperature)
            return
        tensors = [*inputs, *outputs, *map(torch.empty_like, self._own)] if self._own else [*inputs, *outputs]
        for run, values, slots, numbers in self._launches:
            values = values.copy()
            for position, at in slots:
                values[position] = tensors[at]
            for position, number in numbers:
                values[position] = number / temperature
            run(*values)
