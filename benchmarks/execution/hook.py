"""fastdsm's kernels, compiled by Triton and executed on CPU tensors: all that knows of ``Configuration`` is here.

    execution = Execution("sm_90")
    execution.install()                              # before any call; TRITON_INTERPRET must not be set
    fastdsm.sinkhorn(logits, backend="triton")       # compiled PTX, on the CPU
    execution.report.issues

Every launch is compiled for the target up to PTX, and runs with every tensor of the launch registered at its real address.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdsm._ops.plain import Kept
from fastdsm.kernels.common.arithmetic import INTERPRET
from fastdsm.kernels.common.configuration import Configuration, settle_key

from .approximations import Noise
from .compilation import stopping_at_ptx
from .launching import launch
from .module import Module
from .regions import regions_of
from .report import Report


@dataclass
class Ran:
    """What was executed of one configuration."""

    launches: int = 0
    programs: int = 0
    seconds: float = 0.0
    lane_instructions: int = 0


@dataclass(frozen=True)
class Executable:
    """A parsed kernel, its dynamic shared memory, and its scratch memory for each program, in bytes."""

    module: Module
    shared: int
    scratch: int


@dataclass
class Execution:
    """Launches of ``target``, "sm_80", "sm_90" or "sm_100", executed, and what was found.

    noise: what approximations are off by, exact if None. contract: products and sums contracted where ptxas may. ran: by kernel
    and label.
    """

    target: str
    noise: Noise | None = None
    contract: bool = False
    report: Report = field(default_factory=Report)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ran: dict[str, Ran] = field(default_factory=lambda: defaultdict(Ran))
    _executables: dict[Any, Executable] = field(default_factory=dict, init=False)

    def install(self) -> None:
        """Execute launches from now on, and have uninitialised memory filled with NaN; calls take CPU tensors."""
        if bool(INTERPRET.value):
            raise RuntimeError(
                "expected kernels for Triton's compiler, got its interpreter's; unset TRITON_INTERPRET at the start"
            )

        def runner(configuration: Configuration, programs: int, device: torch.device) -> Callable[..., None]:
            def run(*values: Any) -> None:
                known = dict(zip(configuration.kernel.arg_names, values, strict=True))
                arguments = {name: x for name, x in known.items() if name not in configuration.constants}
                self.launch(configuration, programs, arguments)

            return run

        def on(configuration: Configuration, device: torch.device) -> Configuration:
            own = configuration.own
            return own if own is not None and own.targets == (self.target,) else configuration

        def runs_on(configuration: Configuration, device: torch.device) -> bool:
            return self.target in configuration.targets

        for name, function in {"runner": runner, "on": on, "runs_on": runs_on}.items():
            setattr(Configuration, name, function)
        Kept.forget()  # launches prepared before
        triton.knobs.runtime.interpret = True  # what is asked whether kernels take CPU tensors; they have been decorated
        torch.use_deterministic_algorithms(True, warn_only=True)

    def launch(self, configuration: Configuration, programs: int, arguments: Mapping[str, Any]) -> None:
        """What ``Configuration.runner`` returns does on a GPU."""
        if self.target not in configuration.targets:
            raise ValueError(f"expected a kernel for {self.target}, got one for {configuration.targets}")
        leaves = dict(leaf for name, value in arguments.items() for leaf in _leaves(name, value))
        tensors = {name: x for name, x in leaves.items() if isinstance(x, torch.Tensor)}
        for name, x in tensors.items():
            configuration.check_pointer(name, x)
        executable = self.executable(configuration)
        spare = torch.zeros(max(executable.scratch * programs, 1), dtype=torch.uint8)
        parameters = executable.module.parameters
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in leaves.values()]
        values = [float(x) if kind in ("f32", "f64") else x for (_, kind), x in zip(parameters, values, strict=False)]
        values = [*values, spare.data_ptr(), 0][: len(parameters)]  # scratch memory, and the profiler's
        regions = regions_of({**tensors, **({"scratch": spare} if executable.scratch else {})})
        start, before = time.time(), self.report.lane_instructions
        self.report.context = configuration.label
        launch(executable.module, programs, values, executable.shared, regions, self.report, noise=self.noise)
        spent = time.time() - start
        self.seconds["run"] += spent
        ran = self.ran[f"{executable.module.name} {configuration.label}"]
        ran.launches += 1
        ran.programs += programs
        ran.seconds += spent
        ran.lane_instructions += self.report.lane_instructions - before

    def executable(self, configuration: Configuration) -> Executable:
        """Compiled and parsed, at the first call."""
        pointers, constants = sorted(configuration.pointers.items()), sorted(configuration.constants.items())
        key = configuration.kernel.fn.__name__, str(pointers), str(constants), str(configuration.options())
        if key not in self._executables:
            start = time.time()
            settle_key(configuration.kernel)
            source = ASTSource(configuration.kernel, configuration.signature(), constexprs=dict(configuration.constants))
            with stopping_at_ptx():
                target = GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)
                kernel = triton.compile(source, target=target, options=configuration.options())
            compiled = time.time()
            module = self.parsed(kernel.asm["ptx"])
            self.seconds["compile"] += compiled - start
            self.seconds["parse"] += time.time() - compiled
            scratch = getattr(kernel.metadata, "global_scratch_size", 0)
            self._executables[key] = Executable(module, kernel.metadata.shared, scratch)
        return self._executables[key]

    def parsed(self, ptx: str) -> Module:
        """Every kernel comes by here."""
        return Module(ptx, contract=self.contract)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An argument by its name; of a tuple each of its own, by path; a mask as bytes, prepared launches pass it as it came."""
    if not isinstance(value, tuple):
        yield name, value.view(torch.uint8) if isinstance(value, torch.Tensor) and value.dtype == torch.bool else value
        return
    fields = getattr(value, "_fields", range(len(value)))
    for each, inner in zip(fields, value, strict=True):
        yield from _leaves(f"{name}.{each}", inner)
