"""A kernel with everything that decides its machine code: the row of the one finite table of what can be launched.

No run-time argument is specialised on (``finite_jit``), so machine code depends on the pointer types, the constants and
the launch numbers alone; batch size, strides, temperature and sweeps never compile anything anew.
"""

from __future__ import annotations

import dis
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import CodeType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITCallable

from .arithmetic import INTERPRET

HISTORY_BYTES = 1 << 28  # of all programs of a backward together, at the most; long iterations run in fewer programs
ELEMENTS = {
    "u8": torch.uint8, "i32": torch.int32, "i64": torch.int64,
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
TARGETS = ("sm_80", "sm_90", "sm_100")
_SCALARS = {tl.int32: "i32", tl.int64: "i64", tl.float32: "fp32", tl.float64: "fp64"}


def finite_jit(function: Callable[..., None]) -> Any:
    """``triton.jit`` that specialises on nothing: every scalar carries a dtype annotation, pointers end in ``_ptr``.

    Parameters that always come together may be one, annotated with a NamedTuple whose fields are annotated likewise; fields
    may be such tuples themselves.
    """
    names = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is not tl.constexpr]
    names = [name for name in names if "constexpr" not in str(function.__annotations__.get(name, ""))]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


def pointers_of(kernel: Any) -> list[str]:
    """Names of its pointers, those in tuples by path."""

    def paths(fields: Mapping[str, Any]) -> Iterator[str]:
        for name, annotation in fields.items():
            if hasattr(annotation, "_fields"):
                yield from (f"{name}.{path}" for path in paths(annotation.__annotations__))
            elif name.endswith("_ptr"):
                yield name

    return list(paths({name: x.annotation for name, x in inspect.signature(kernel.fn).parameters.items()}))


def settle_key(function: Any, callers: tuple[Any, ...] = ()) -> None:
    """Have Triton's cache know ``function`` by one key in every process.

    Triton hashes into the key of a function the constants that its callees use, but only of callees whose own key is known
    already: which they are depends on what was launched before. So callees come first.
    """
    if isinstance(function, JITCallable) and function.hash is None and not any(function is x for x in callers):
        for name in global_names(function.fn.__code__):
            settle_key(function.fn.__globals__.get(name), (*callers, function))
        _ = function.cache_key


def global_names(code: CodeType) -> list[str]:
    """Names that the code, comprehensions in it included, looks up globally; in order."""
    own = [x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"]
    return own + [name for x in code.co_consts if isinstance(x, CodeType) for name in global_names(x)]


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 where programs run one after the other, in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def history_programs(blocks: int, per_sm: int, bytes_of_one: int, device: torch.device) -> int:
    """Programs that walk over ``blocks`` of matrices: ``per_sm`` on each, with ``HISTORY_BYTES`` in all, or one with more."""
    return min(blocks, per_sm * multiprocessors(device), max(1, HISTORY_BYTES // bytes_of_one))


@dataclass(frozen=True)
class Configuration:
    """One launchable kernel.

    kernel: from :func:`finite_jit`. pointers: element type of each ``*_ptr`` argument, e.g. {"logits_ptr": "fp16"}, in tuples
    by path, {"operands.line_ptr": "fp16"}. constants: every constexpr argument. matrices: matrices handled by one program.
    targets: what it is compiled for; where one of them has a configuration of its own, ``own``, the others.
    """

    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    matrices: int
    num_stages: int = 1
    maxnreg: int | None = None
    label: str = field(default="", compare=False)
    targets: tuple[str, ...] = TARGETS
    own: Configuration | None = field(default=None, compare=False)
    compiled: dict[int | None, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def with_own(self, own: Configuration, target: str) -> Configuration:
        """This one, and ``own`` in its place on ``target``."""
        others = tuple(x for x in TARGETS if x != target)
        return replace(self, targets=others, own=replace(own, targets=(target,)))

    def on(self, device: torch.device) -> Configuration:
        """The one to launch on ``device``."""
        if self.own is None or device.type != "cuda":
            return self
        return self.own if self.own.targets == (f"sm_{torch.cuda.get_device_capability(device)[0]}0",) else self

    def runs_on(self, device: torch.device) -> bool:
        """Whether it is compiled for ``device``; on a CPU every kernel can be interpreted."""
        return device.type != "cuda" or f"sm_{torch.cuda.get_device_capability(device)[0]}0" in self.targets

    def everywhere(self) -> list[Configuration]:
        """This one, and the one that a target has of its own."""
        return [self] if self.own is None else [self, self.own]

    def options(self) -> dict[str, int]:
        """What the compiler takes beside the constants. ``maxnreg``: registers a thread may take, where ptxas by itself
        would take fewer and spill."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}

    def signature(self) -> dict[str, Any]:
        """Argument types as the compiler wants them: of a NamedTuple, one of types."""
        parameters = inspect.signature(self.kernel.fn).parameters.values()
        return {parameter.name: self._type(parameter.name, parameter.annotation) for parameter in parameters}

    def _type(self, name: str, annotation: Any) -> Any:
        if name in self.constants:
            return "constexpr"
        if name in self.pointers:
            return "*" + self.pointers[name]
        if hasattr(annotation, "_fields"):
            return annotation(*(self._type(f"{name}.{field}", x) for field, x in annotation.__annotations__.items()))
        return _SCALARS[annotation]

    def compile(self, target: GPUTarget | None = None) -> Any:
        """The compiled kernel, for the current device unless ``target`` names another; from Triton's cache if it is there."""
        settle_key(self.kernel)
        source = ASTSource(self.kernel, self.signature(), constexprs=dict(self.constants))
        return triton.compile(source, target=target, options=self.options())

    def launch(self, programs: int, **arguments: Any) -> None:
        """Run ``programs`` programs where the first tensor among the arguments lies; nothing to do when there are none.

        What is compiled is what the table says, at the first launch and ahead of time alike: Triton's own launch would take
        the types from the arguments, specialise on the numbers in tuples, and spend up to 50 us on that every time.

        An absent tensor is None. Inside :func:`recorded` nothing runs.
        """
        if not programs:
            return
        if recording():
            _recording.launches.append(Launch(self, programs, arguments))
            return
        first = next(iter(arguments.values()))
        while isinstance(first, tuple):
            first = first[0]
        device = first.device
        with current(device):
            self.runner(programs, device)(*self.values(arguments, device))

    def values(self, arguments: Mapping[str, Any], device: torch.device) -> list[Any]:
        """Arguments and constants in the kernel's order; a tensor that no kernel reads stands in for one that is absent."""
        known = {**arguments, **self.constants}
        return [
            stand_in(device, self.pointers[name]) if known[name] is None and name in self.pointers else known[name]
            for name in self.kernel.arg_names
        ]

    def check_pointer(self, name: str, x: torch.Tensor) -> None:
        """``x`` has the type that the machine code takes it for."""
        if x.dtype != ELEMENTS[self.pointers[name]]:
            kernel = self.kernel.fn.__name__
            raise TypeError(f"{kernel} takes {name} as {self.pointers[name]}, and got {x.dtype}: its configuration is wrong")

    def runner(self, programs: int, device: torch.device) -> Callable[..., None]:
        """What runs ``programs`` programs with :meth:`values` on ``device``, the current one.

        Machine code is what the table says: compiled by it once for each device, never by what arguments happen to be.
        """
        compiled = self.compiled.get(device.index)
        if compiled is None:
            if INTERPRET:
                return partial(self._interpret, programs)
            compiled = self.compiled[device.index] = self.compile()
        run: Callable[..., None] = compiled[(programs, 1, 1)]
        return run

    def _interpret(self, programs: int, *values: Any) -> None:
        self.kernel[(programs,)](**dict(zip(self.kernel.arg_names, values, strict=True)), **self.options())


@dataclass(frozen=True)
class Launch:
    """One launch: its configuration, programs, and arguments by name; an absent tensor is None."""

    configuration: Configuration
    programs: int
    arguments: Mapping[str, Any]


_recording = threading.local()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches that this thread makes inside the block, in order; none of them runs."""
    launches: list[Launch] = []
    outer, _recording.launches = getattr(_recording, "launches", None), launches
    try:
        yield launches
    finally:
        _recording.launches = outer


def recording() -> bool:
    """Whether this thread is inside such a block."""
    return getattr(_recording, "launches", None) is not None


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one where it is not."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _NOTHING


_NOTHING = nullcontext()


@cache
def stand_in(device: torch.device, element: str) -> torch.Tensor:
    """A tensor of one element for a pointer that is never followed."""
    return torch.zeros(1, dtype=ELEMENTS[element], device=device)
