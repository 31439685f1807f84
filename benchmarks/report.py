"""``python -m benchmarks.report``: README's table, docs/performance.md, figures and predictions, from committed results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from . import headline, machine_code, replaced
from .host import rows as host_rows
from .host import section as host_section
from .rows import BACKWARD, FORWARD, RESULTS, ROOT, Row, Run, read_rows
from .static import layer, predicted
from .static import section as prediction_section
from .targets import fastest_other
from .text import pass_text, size_text, time_text

README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"  # beside it docs/results is a link to benchmarks/results
COLORS = {"fastdsm": "#d1495b", "torch.compile": "#30638e", "hyper-connections": "#00798c", "POT": "#8d6a9f",
          "GeomLoss": "#edae49", "Liger": "#3d7d3d", "flash-sinkhorn": "#6b4f3a"}  # fmt: skip


def main() -> None:
    """Rewrite both pages between their markers, a figure for each device with results, and what the model predicts."""
    found = {
        path.stem: read_rows(path) for path in (RESULTS / "cpu.jsonl", *sorted(RESULTS.glob("cuda*.jsonl"))) if path.exists()
    }
    sections = []
    for name, rows in found.items():
        draw(rows, RESULTS / f"{name}-speedup.png")
        sections.append(section(rows, f"{RESULTS.name}/{name}-speedup.png"))
    loops = replaced.read() if replaced.ORIGINS.exists() else []
    if loops:
        sections.append(replaced.section(loops))
    if machine_code.STATIC.exists():
        sections.append(machine_code.section())
    if host_rows.HOST.exists():
        sections.append(host_section.section(host_rows.read()))
    if not found:
        raise SystemExit(f"no results in {RESULTS}; run fastdsm bench first")
    if predicted.PREDICTIONS.exists():
        predicted.PREDICTIONS.with_suffix(".md").write_text(
            prediction_section.section(predicted.read(), layer.read(), machine_code.sources()) + "\n"
        )
    PERFORMANCE.write_text(spliced(PERFORMANCE.read_text(), "benchmark", "\n\n".join(sections)))
    text = spliced(README.read_text(), "proof", headline.proof(found))
    README.write_text(spliced(text, "benchmark", headline.section(found, replaced.losses(loops))))


def spliced(text: str, name: str, content: str) -> str:
    """Put ``content`` between the markers of this name in ``text``; ValueError where they are missing."""
    opening, closing = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (begin and end):
        raise ValueError(f"expected the markers {opening} and {closing}, in this order; add them where the text belongs")
    return f"{before}{opening}\n\n{content}\n\n{closing}{after}"


def section(rows: Sequence[Row], figure: str) -> str:
    """Figure, table and conditions of one device, in Markdown."""
    lines = [
        f"![Speedup over the eager loop, by size]({figure})",
        "",
        "| operation | matrices | pass | time | × eager | × fastest other | extra memory | % of clone | error |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_line(list(group)) for _, group in groupby(rows, key=_case)),
        "",
        conditions([row.run for row in rows]),
        *left_out(rows),
    ]
    return "\n".join(lines)


def left_out(rows: Iterable[Row]) -> list[str]:
    """A list of who was not timed in some case, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.left_out is not None:
            reasons.setdefault(row.implementation, {})[row.left_out] = None
    if not reasons:
        return []
    return ["", "Left out, in cases where:", "", *(f"- {name}: {'; '.join(why)}" for name, why in reasons.items())]


def _case(row: Row) -> tuple[str, tuple[int, ...], str]:
    return row.operation, row.shape, row.direction


def _line(group: list[Row]) -> str:
    """The table's line of one case: fastdsm beside the fastest of the rest."""
    ours = next(row for row in group if row.implementation == "fastdsm")
    if ours.left_out is not None or ours.seconds_median is None or ours.peak_extra_bytes is None:
        raise ValueError(f"fastdsm was not measured in {_case(ours)}; run fastdsm bench again")
    name, ratio = fastest_other(group)
    cells = (
        f"`{ours.operation}`",
        size_text(ours.shape),
        pass_text(ours.direction),
        time_text(ours.seconds_median) + (f" ({time_text(ours.device_seconds)})" if ours.device_seconds else ""),
        f"{ours.device_ratio_to_eager or ours.ratio_to_eager:.1f}",
        "" if ratio is None else f"{ratio:.1f} ({name})",
        f"{ours.peak_extra_bytes / ours.input_bytes:.1f} × input",
        f"{ours.percent_of_floor:.0f}",
        f"{ours.error:.0e}",
    )
    return "| " + " | ".join(cells) + " |"


def conditions(runs: list[Run]) -> str:
    """What was measured against what, where, with which versions, when; rows may be of several commits on one machine."""
    run = runs[0]
    on_cpu = run.device == "cpu"
    where = f"{run.machine}, {run.threads} threads" if on_cpu else run.machine
    spread = "4" if on_cpu else "2, and 4 for 65,536 of 4 × 4 and 64 of 64 × 64"
    also = (
        ""
        if on_cpu
        else (
            "Attention of 4,096 lines: bfloat16, the loop on float32 logits. In brackets: of a call among others in a CUDA "
            "graph, without what the host does for it; ratios and % of clone are of those times where both have one. "
        )
    )
    return (
        f"{where}; {'; '.join(_made(runs))}. {also}"
        "float32, standard normal logits, 20 sweeps (attention: normal operands, 3 sweeps; newton: standard "
        f"deviation {spread}, to a residual of 1e-6, eager: sweeps to the same); medians of interleaved rounds in one process. "
        "Eager: the loop of alternating `torch.logsumexp`, and "
        "`torch.linalg.svdvals` for sigma2. Others: `torch.compile` of the loop, `torch.linalg.eigvalsh`, and the "
        "packages listed, each by its own public call, its output held against float64 first. Extra memory: the most "
        "held at once beyond the inputs, output and gradient included. % of clone: the time of a clone that moves as "
        "many bytes, in percent of this time. Error: the largest, of the output that was timed, against float64."
    )


def _made(runs: Iterable[Run]) -> Iterator[str]:
    """When, at which commits and with which versions; those of the same versions together."""
    of_versions: dict[str, list[Run]] = {}
    for run in runs:
        of_versions.setdefault(", ".join(f"{name} {version}" for name, version in run.versions.items()), []).append(run)
    for versions, made in of_versions.items():
        commits = list(dict.fromkeys(run.commit for run in made))
        yield f"{made[0].date[:10]}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}; {versions}"


def draw(rows: Iterable[Row], path: Path) -> None:
    """Draw how many times faster than the eager loop each implementation projects, where both directions were measured."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in rows if row.operation == "sinkhorn" and row.ratio_to_eager is not None]
    shapes = sorted({row.shape for row in rows if row.direction == BACKWARD}, key=lambda shape: shape[-1])
    present = {row.implementation for row in rows}
    names = [name for name in COLORS if name in present]
    figure, panels = pyplot.subplots(1, 2, figsize=(max(11, 2 * len(shapes)), 4.2), sharey=True, layout="constrained")
    for panel, direction in zip(panels, (FORWARD, BACKWARD), strict=True):
        for place, name in enumerate(names):
            ratios = {
                row.shape: row.device_ratio_to_eager or row.ratio_to_eager
                for row in rows
                if (row.direction, row.implementation) == (direction, name) and row.ratio_to_eager is not None
            }
            width = 0.84 / len(names)
            centres = [i + (place - (len(names) - 1) / 2) * width for i, shape in enumerate(shapes) if shape in ratios]
            heights = [ratios[shape] for shape in shapes if shape in ratios]
            bars = panel.bar(centres, [h - 1 for h in heights], width, bottom=1, color=COLORS[name], label=name)
            if name == "fastdsm":
                for bar, height in zip(bars, heights, strict=True):
                    panel.annotate(
                        f"{height:.3g}×", (bar.get_x() + width / 2, max(height, 1)), (0, 2),
                        textcoords="offset points", ha="center", va="bottom", fontsize=9, color=COLORS[name],
                    )  # fmt: skip
        panel.axhline(1, color="black", linewidth=1)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500])
        panel.set_xticks(range(len(shapes)), [size_text(shape).replace(" of ", " of\n") for shape in shapes])
        panel.set_title(direction.replace("+", " + "))
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.margins(y=0.12)
    panels[0].set_ylabel("times faster than the eager loop")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    run = rows[0].run
    threads = f", {run.threads} threads" if run.device == "cpu" else ""
    figure.supxlabel(f"float32, 20 sweeps; {run.machine}{threads}, torch {run.versions['torch']}, {run.date[:10]}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
