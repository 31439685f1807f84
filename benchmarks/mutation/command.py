"""The command: make each change, print and record what saw it, and fail if one went unseen that is not explained."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ..rows import ROOT
from .changes import CHANGES
from .rows import MUTATION, record
from .run import Verdict, verdicts


def main(
    match: Annotated[str, typer.Option(help="only changes whose file, reason or tests contain this")] = "",
    part: Annotated[str, typer.Option(help="K/N: the K-th of N parts")] = "1/1",
) -> None:
    """Break the code in one small way after another; exit code 1 if the tests named for it do not see one.

    The rows replace those of the same changes in benchmarks/results/mutation.jsonl, as they come.
    """
    console = Console(soft_wrap=True)
    chosen = [change for change in CHANGES if change.matches(match)][of_part(part)]
    found: list[Verdict] = []
    for verdict in verdicts(chosen, ROOT):
        found.append(verdict)
        record([verdict], CHANGES)
        console.print(_line(verdict), markup=False, highlight=False)
    judged = [x for x in found if x.change.equivalent is None]
    caught = sum(x.caught for x in judged)
    share = f" ({caught / len(judged):.0%})" if judged else ""
    console.print(f"{caught} of {len(judged)} changes caught{share}, {len(found) - len(judged)} explained: {MUTATION}")
    raise typer.Exit(1 if caught < len(judged) or not found else 0)


def of_part(part: str) -> slice:
    """Every N-th, from the K-th on."""
    k, _, n = part.partition("/")
    if not (k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise typer.BadParameter(f"expected K/N with 1 <= K <= N, got {part}")
    return slice(int(k) - 1, None, int(n))


def _line(verdict: Verdict) -> str:
    explained = f" (equivalent: {verdict.change.equivalent})" if verdict.change.equivalent else ""
    outcome = f"caught by {verdict.by}" if verdict.caught else f"SURVIVED{explained}"
    return f"{verdict.seconds:5.1f} s  {verdict.change}: {outcome}"
