"""One JSON row per configuration and target, what makes a row fail, and the table of the worst."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from rich.table import Table

from fastdsm.kernels.common.configuration import TARGETS, Configuration

from .compilation import SHARED_LIMIT, compile_configuration, describe, disassemble, kernel_name, source
from .execution import Execution, execute, parameter_words
from .launches import Call, ordinary_calls
from .model import predicted_time
from .sass import Program, count, parse

SWEEPS, FEWER_SWEEPS = 20, 4
"""Counts are for SWEEPS; one more sweep costs the slope between the two, 16 apart for the unrolled loops' sake."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """An ordinary call, of SWEEPS sweeps: its arguments, and those for FEWER_SWEEPS if they take the same kernel."""

    call: Call
    arguments: Mapping[str, Any]
    fewer: Mapping[str, Any] | None


def usages(calls: Iterable[Call]) -> Iterator[tuple[Configuration, Usage]]:
    """What serves each call, launch by launch, and how."""
    for call in calls:
        launches, others = call.record(SWEEPS), call.record(FEWER_SWEEPS)
        for launch, other in zip_longest(launches, others):
            if launch is not None:
                same = other is not None and identify(launch.configuration) == identify(other.configuration)
                fewer = other.arguments if call.sweeps and same else None
                yield launch.configuration, Usage(call, launch.arguments, fewer)


def largest_usages() -> dict[str, list[Usage]]:
    """By key of the configuration: the largest ordinary call of each operation that it serves."""
    found: dict[str, dict[str, Usage]] = defaultdict(dict)
    for configuration, usage in usages(ordinary_calls()):
        found[identify(configuration)][usage.call.operation] = usage
    return {key: list(by_operation.values()) for key, by_operation in found.items()}


def identify(configuration: Configuration) -> str:
    """Text that two configurations share exactly when they compile to the same code."""
    return json.dumps([kernel_name(configuration), {**describe(configuration), "label": ""}])


def analyse(configuration: Configuration, target: str, calls: Sequence[Usage]) -> Row:
    """Compile, read and count one configuration."""
    row: Row = {"kernel": kernel_name(configuration), **describe(configuration), "target": target}
    row["source"] = source(configuration)
    try:
        compiled = compile_configuration(configuration, target)
    except Exception as error:  # the compiler raises its own assortment; the row says what it was
        return {**row, "error": f"{type(error).__name__}: {error}"[:500]}
    resources, text = disassemble(compiled.cubin)
    program = parse(text)
    classes = count(program.instructions)
    row |= {
        "registers": resources.registers,
        "stack_bytes": resources.stack,
        "local_bytes": resources.local,
        "spill_instructions": classes["LDL"] + classes["STL"],
        "shared_bytes": compiled.shared,
        "code_bytes": 16 * len(program.instructions),
        "instructions": _sorted(classes),
        "loops": [{"depth": loop.depth, "instructions": _sorted(program.body(loop))} for loop in program.loops],
    }
    signature = configuration.signature()
    executed = [_executed(configuration, program, signature, target, usage) for usage in calls]
    return {**row, "executed": executed}


def _executed(configuration: Configuration, program: Program, signature: Mapping[str, Any], target: str, usage: Usage) -> Row:
    row: Row = {**usage.call.describe(), **({"n_iters": SWEEPS} if usage.call.sweeps else {})}
    run = execute(program, parameter_words(signature, usage.arguments, target))
    if run is None:
        return {**row, "thread_instructions_per_matrix": None}
    threads, counts = 32 * configuration.num_warps, run.counts
    row |= {
        "warp_instructions": _sorted(counts),
        "assumed_branches": run.assumed,
        "thread_instructions_per_matrix": round(counts.total() * threads / configuration.matrices, 1),
        **predicted_time(counts, threads, configuration.matrices, usage.call.bytes_per_matrix),
    }
    if usage.fewer is not None:
        short = execute(program, parameter_words(signature, usage.fewer, target))
        if short is not None:
            row |= _slope(run, short, threads / configuration.matrices)
    return row


def _slope(run: Execution, short: Execution, scale: float) -> Row:
    """Thread-instructions per matrix that one more sweep takes."""
    more = Counter(run.counts)
    more.subtract(short.counts)
    each = {kind: number * scale / (SWEEPS - FEWER_SWEEPS) for kind, number in more.items()}
    return {
        "per_sweep": {kind: round(number, 2) for kind, number in sorted(each.items()) if number},
        "per_sweep_total": round(sum(each.values()), 2),
    }


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted((kind, number) for kind, number in counts.items() if number))


def faults(row: Row) -> list[str]:
    """Why a row fails; empty when the kernel can be launched, spills nothing and does its work.

    Every kernel stores results and takes exponentials, logarithms, roots or reciprocals, or of an mHC layer sums: Triton has
    been seen to compile a tile that was too large for it to nothing, without a word. On Hopper attention of 16 bits is to use
    the tensor-core instructions of a whole warp group.
    """
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = [f"{name} = {row[name]}" for name in ("stack_bytes", "local_bytes", "spill_instructions") if row[name]]
    limit = SHARED_LIMIT[row["target"]]
    if row["shared_bytes"] > limit:
        found.append(f"shared_bytes = {row['shared_bytes']}, the device has {limit}")
    work = ("MUFU", "FFMA", "FADD") if row.get("label", "").startswith("mhc") else ("MUFU",)
    for names in (("STG",), work):
        if not any(row["instructions"].get(name) for name in names):
            found.append(f"no {' or '.join(names)}: compiled to nothing")
    if row["target"] == "sm_90" and row["pointers"].get("operands.stream_ptr") in ("bf16", "fp16"):
        found += ["no HGMMA"] * (not row["instructions"].get("HGMMA"))
    return found


def title(row: Row) -> str:
    """Kernel, constants and target in one line."""
    constants = ", ".join(f"{name}={value}" for name, value in row["constants"].items())
    types = ", ".join(dict.fromkeys(row["pointers"].values()))
    return f"{row['kernel']}({constants}; {types}; {row['num_warps']} warps) {row['target']}"


def ordered(rows: Iterable[Row]) -> list[Row]:
    """In an order that does not depend on how they were computed."""
    names = ("kernel", "constants", "pointers", "num_warps", "num_stages")
    return sorted(rows, key=lambda row: (json.dumps([row[name] for name in names]), TARGETS.index(row["target"])))


def summary(rows: Sequence[Row], most: int = 12) -> Iterator[Table]:
    """The kernels nearest to or beyond the registers, and what 4x4 float32 matrices cost."""
    worst = Table("kernel", "registers", "stack", "shared", "code", title="most registers, spills first")
    compiled = [row for row in rows if "error" not in row]
    for row in sorted(compiled, key=lambda row: (-row["stack_bytes"], -row["registers"]))[:most]:
        numbers = (row["registers"], row["stack_bytes"], row["shared_bytes"], row["code_bytes"])
        worst.add_row(title(row), *map(str, numbers))
    yield worst
    small = Table(
        "operation",
        "target",
        "registers",
        "per sweep",
        "in all",
        "MUFU",
        "predicted ns",
        "copy ns",
        title=f"4x4 float32, {SWEEPS} sweeps: thread-instructions per matrix",
    )
    for row in compiled:
        for run in row["executed"]:
            if (run["n"], run["m"], run["dtype"]) == (4, 4, "float32") and run["thread_instructions_per_matrix"]:
                mufu = run["warp_instructions"].get("MUFU", 0) * 32 * row["num_warps"] // row["matrices"]
                numbers = (row["registers"], run.get("per_sweep_total"), run["thread_instructions_per_matrix"], mufu)
                times = (run["predicted_ns"], run["predicted_copy_ns"])
                small.add_row(run["operation"], row["target"], *map(str, numbers + times))
    yield small
