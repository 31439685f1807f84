"""Launches prepared once: made again for other tensors of the same shapes, strides, dtypes, devices and alignments.

All arguments but pointers and what a float temperature decides stay as they were. A pointer is known by its memory: that of
an output, which is fresh when launches are recorded and therefore nobody else's; that of an input which has the argument's
name, since inputs may share memory; that of what stands in for an absent tensor, which it goes on to do; or else memory of the
call's own, which is taken anew each time. Arguments that are a NamedTuple are made anew with the pointers among its fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .configuration import Launch, current, stand_in
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

        def place_of(launch: Launch, name: str, x: Tensor) -> int:
            """Of a pointer among inputs, outputs and the call's own; -1 where what stands in stays."""
            launch.configuration.check_pointer(name, x)
            if x is stand_in(device, launch.configuration.pointers[name]):
                return -1
            at, pointer = given.get(name.removesuffix("_ptr"), (0, None))
            if pointer == x.data_ptr():
                return at
            if x.data_ptr() in written:
                return written[x.data_ptr()]
            if x.data_ptr() not in own:
                own[x.data_ptr()] = len(inputs) + len(outputs) + len(self._own)
                self._own.append(x.new_empty(1).expand(x.numel()))
            return own[x.data_ptr()]

        for launch in launches:
            slots: list[tuple[int, int]] = []
            tuples: list[tuple[int, Any, list[tuple[int, int]]]] = []
            numbers = []
            arguments = dict(launch.arguments)
            for position, name in enumerate(launch.configuration.kernel.arg_names):
                x: Any = launch.arguments.get(name)
                if isinstance(x, Tensor):
                    at = place_of(launch, name, x)
                    if at >= 0:
                        slots.append((position, at))
                        arguments[name] = None
                elif hasattr(x, "_fields"):
                    places = [
                        (field, place_of(launch, f"{name}.{x._fields[field]}", y))
                        for field, y in enumerate(x)
                        if isinstance(y, Tensor)
                    ]
                    places = [(field, at) for field, at in places if at >= 0]
                    if places:
                        moving = {field for field, _ in places}
                        arguments[name] = x._make(None if field in moving else y for field, y in enumerate(x))
                        tuples.append((position, x._make, places))
                elif name in OF_TEMPERATURE and not per_matrix:
                    numbers.append((position, OF_TEMPERATURE[name]))
            with current(device):
                run = launch.configuration.runner(launch.programs, device)
            self._launches.append((run, launch.configuration.values(arguments, device), slots, tuples, numbers))

    def __call__(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], temperature: float) -> None:
        """Launch for others of the same form, and a temperature that all matrices share."""
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                self(inputs, outputs, temperature)
            return
        tensors = [*inputs, *outputs, *map(torch.empty_like, self._own)] if self._own else [*inputs, *outputs]
        for run, values, slots, tuples, numbers in self._launches:
            values = values.copy()
            for position, at in slots:
                values[position] = tensors[at]
            for position, number in numbers:
                values[position] = number / temperature
            if tuples:
                _fill(values, tuples, tensors)
            run(*values)


def _fill(values: list[Any], tuples: Sequence[tuple[int, Any, Sequence[tuple[int, int]]]], tensors: Sequence[Any]) -> None:
    """Make NamedTuples among the values anew, by where they stand, how they are made, and fields with their tensors."""
    for position, make, places in tuples:
        fields = list(values[position])
        for field, at in places:
            fields[field] = tensors[at]
        values[position] = make(fields)
