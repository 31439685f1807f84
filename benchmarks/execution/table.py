"""Which configurations are to be executed, and which are not, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.static.compilation import kernel_name
from fastdsm import kernels
from fastdsm.kernels.common.configuration import TARGETS, Configuration

EVERYTHING = "sm_90"
ELSEWHERE = ("registers", "attention")
"""Families with instructions of their own on other targets: inline assembly, tensor cores."""


@dataclass(frozen=True)
class Unexecuted:
    """Configurations that are not executed: of kernels whose name begins so, with these constants, on these targets."""

    kernel: str
    reason: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    pointers: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS

    def holds(self, configuration: Configuration, target: str) -> bool:
        """Whether this is one of them."""
        return (
            kernel_name(configuration).startswith(self.kernel)
            and target in self.targets
            and self.constants.items() <= configuration.constants.items()
            and self.pointers.items() <= configuration.pointers.items()
        )


UNEXECUTED = (
    Unexecuted(
        "_sinkhorn_fwd_kernel", "sigma2 comes with info in every public call", {"WITH_SIGMA2": True, "WITH_INFO": False}
    ),
    Unexecuted("_newton_fwd_kernel", "sigma2 comes with info in every public call", {"WITH_SIGMA2": True, "WITH_INFO": False}),
    Unexecuted("_sigma2_fwd_kernel", "plans to 4x4 are the register family's", {"P": 4}),
    Unexecuted(
        "_attention_apply_fwd_kernel",
        "only singular vectors are multiplied in float32 by plans of bfloat16, and sigma2 drops nothing",
        {"HAS_DROPOUT": True},
        {"operands.line_ptr": "bf16", "x_ptr": "fp32"},
    ),
    *(
        Unexecuted("_attention_", "tcgen05 and its tensor memory are not emulated", {"PRECISION": x}, targets=("sm_100",))
        for x in ("bf16x6", "tf32")
    ),
)


def family(configuration: Configuration) -> str:
    """The folder its kernel lies in."""
    module: str = configuration.kernel.fn.__module__
    return module.removeprefix(f"{kernels.__name__}.").split(".")[0]


def wanted(target: str) -> list[Configuration]:
    """What is to be executed for ``target``, or to be listed."""
    compiled = [x for x in kernels.configurations() if target in x.targets]
    return [x for x in compiled if target == EVERYTHING or family(x) in ELSEWHERE]


def reason(configuration: Configuration, target: str) -> str:
    """Why it is not executed; empty where it is."""
    return next((x.reason for x in UNEXECUTED if x.holds(configuration, target)), "")
