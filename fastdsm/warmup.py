"""Compiling before traffic: ``fastdsm.warmup``."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from ._ops.arguments import DTYPES
from ._ops.compilers import Compilers

CALLS = (
    "sinkhorn", "sinkhorn_sigma2", "sigma2", "sigma2_bounds", "temperature_for_sigma2",
    "sinkhorn_attention", "sinkhorn_attention_sigma2", "mhc_pre", "mhc_post", "mhc_post_pre", "mhc_head",
)  # fmt: skip
"""The calls that launch kernels; modules, penalties and diagnostics launch those of the calls they are made of."""


class Warmed(NamedTuple):
    """What :func:`warmup` has done: kernels that are ready now, how many of them it had to compile, and for what."""

    kernels: int
    compiled: int
    target: str


def warmup(
    *,
    device: torch.device | str | int | None = None,
    target: str | None = None,
    calls: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    n: int | Iterable[int | tuple[int, int]] | None = None,
    features: int | Iterable[int] | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Warmed:
    """Compile what the named calls can launch, in parallel processes, into Triton's cache: nothing compiles in traffic.

    Without ``calls``, ``dtypes``, ``n`` and ``features`` that is every kernel there is, about a thousand, a second or more of a
    processor each. What is in the cache already is not compiled again. The cache is Triton's: ~/.triton/cache, or
    TRITON_CACHE_DIR. It may be filled where there is no GPU, as in the build of a container image, by naming a ``target``, and
    serves processes with the same versions of fastdsm and Triton.

    Args:
        device: the CUDA device to compile for, by default the current one.
        target: "sm_80", "sm_90", "sm_100" or the like instead, which needs no device.
        calls: names of public calls, of ``fastdsm.warmup.CALLS``, forward and backward with every option; None for all.
        dtypes: of logits, plans, query, key, value and streams; None for all.
        n: lines of the matrices, or (n, m) where they are rectangular, in attention queries and keys, of an mHC layer its
            streams; None for any.
        features: of attention's query, key and value, or channels of a stream; None for any.
        jobs: processes; by default one for each processor.
        progress: called with the kernels done and those there are, after each.

    Returns:
        :class:`Warmed`: how many kernels are ready, how many of them were compiled now, and the target.

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.
        RuntimeError: without triton or a device to compile for, or where a kernel does not compile.
    """
    if find_spec("triton") is None:
        raise RuntimeError(
            "warmup compiles Triton's kernels, and triton is not installed; without it every call takes PyTorch's"
        )
    names = None if calls is None else _chosen("calls", calls, CALLS)
    types = [str(x).removeprefix("torch.") for x in (DTYPES if dtypes is None else _chosen("dtypes", dtypes, DTYPES))]
    if names is None and not (dtypes is None and n is None and features is None):
        names = list(CALLS)
    sizes, widths = _sizes(n), _features(features)
    resolved = _target(device, target)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise ValueError(f"jobs must be an int >= 1, the number of processes, got {jobs!r}")
    with Compilers(jobs or processors) as compilers:
        asked = [(None, types)] if names is None else [([name], [dtype]) for name, dtype in itertools.product(names, types)]
        listed = compilers.each(lambda compiler, x: compiler.places(*x, sizes, widths, resolved), asked)
        places = sorted(set().union(*listed))
        compiled = 0
        for done, new in enumerate(compilers.each(lambda compiler, place: compiler.compile(place, resolved), places), start=1):
            compiled += new
            if progress is not None:
                progress(done, len(places))
    return Warmed(len(places), compiled, resolved)


def _chosen(name: str, given: Iterable[Any], of: Sequence[Any]) -> list[Any]:
    """``given`` as a list, all of them among ``of``."""
    items = [given] if isinstance(given, (str, torch.dtype)) else list(given)
    for x in items:
        if x not in of:
            raise ValueError(f"{name} must be among {', '.join(map(str, of))}, got {x!r}")
    return list(dict.fromkeys(items))


def _sizes(n: int | Iterable[int | tuple[int, int]] | None) -> list[tuple[int, int]] | None:
    if n is None:
        return None
    pairs = [x if isinstance(x, tuple) else (x, x) for x in ([n] if isinstance(n, int) else n)]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in pair):
            raise ValueError(f"n must be lines of a matrix, >= 1, or pairs (n, m) of them, got {pair!r}")
    return pairs


def _features(features: int | Iterable[int] | None) -> list[int] | None:
    if features is None:
        return None
    found = [features] if isinstance(features, int) else list(features)
    for x in found:
        if isinstance(x, bool) or not isinstance(x, int) or x < 1:
            raise ValueError(f"features must be numbers of them, >= 1, got {x!r}")
    return found


def _target(device: torch.device | str | int | None, target: str | None) -> str:
    """The target that is named, or that of the device."""
    if target is not None:
        if device is not None:
            raise ValueError(f"expected a device or a target, got device {device!r} and target {target!r}; leave one out")
        if re.fullmatch(r"sm_\d{2,3}", target) is None or int(target[3:]) < 80:
            raise ValueError(f'target must be "sm_80" or later, as "sm_90" or "sm_100", got {target!r}')
        return target
    if not torch.cuda.is_available():
        raise RuntimeError('there is no CUDA device to compile for; name the target it is to be, as target="sm_90"')
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
