"""The process that compiles: ``python -m fastdsm._ops.compiling``, spoken to by :class:`fastdsm._ops.compilers.Compiler`.

A request is a line of JSON on standard input, its answer one on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .. import kernels
from .launchable import places


def _places(calls: list[str] | None, dtypes: list[str], *others: Any) -> list[int]:
    return places(calls, [getattr(torch, name) for name in dtypes], *others)


def _compile(place: int, target: str) -> bool:
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    configuration = kernels.configurations()[place]
    try:
        configuration.compile(GPUTarget("cuda", int(target.removeprefix("sm_")), 32))
    except Exception as error:  # the compiler raises its own assortment; which kernel it was is what it does not say
        name = f"{configuration.kernel.fn.__name__} ({configuration.label})"
        raise RuntimeError(f"{name} does not compile for {target}: {type(error).__name__}: {error}") from error
    return hits != [True]


_ANSWERS: dict[str, Callable[..., Any]] = {"places": _places, "compile": _compile}


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends this process
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a compiler prints is no answer
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": _ANSWERS[name](*arguments)}
        except Exception as error:
            answer = {"error": str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
