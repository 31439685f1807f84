"""``python -m benchmarks.on_gpu OUT``: run what is left of the steps for some minutes, and say what has been found so far."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from . import results
from .runner import run
from .steps import dry, steps


def main() -> None:
    """Run, or with ``--take`` bring the rows to where ``make report`` finds them; exit code 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of what is found; the same one in every call")
    parser.add_argument("--minutes", type=float, default=9.0, help="that this call may take")
    parser.add_argument("--dry", action="store_true", help="every step once, small, without a GPU")
    parser.add_argument("--take", action="store_true", help="nothing is run; OUT's rows go to benchmarks/results")
    asked = parser.parse_args()
    if asked.take:
        print(*results.take(asked.out), sep="\n")
        return
    if asked.dry:
        chosen = dry(asked.out)
    elif torch.cuda.is_available():
        chosen = steps(asked.out, "sm_{}{}".format(*torch.cuda.get_device_capability()), os.cpu_count() or 1)
    else:
        sys.exit("there is no CUDA device; --dry goes through the steps without one")
    for step, progress in run(chosen, asked.out, 60 * asked.minutes):
        print(
            f"{step.name}: {progress.outcome}, {progress.seconds:.0f} s{f' ({x})' if (x := progress.reason) else ''}",
            flush=True,
        )
    print(*results.summary(asked.out, chosen), sep="\n")
    sys.exit(1 if results.failed(asked.out, chosen) else 0)


if __name__ == "__main__":
    main()
