"""``fastdsm demo``: a pretrained transformer's attention, projected, measured, timed, printed and plotted."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__
from ..diagnostics import effective_depth
from .outputs import writable_folder

if TYPE_CHECKING:
    from ..demo.measurement import Measurement
    from ..demo.model import AttentionLogits


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the figure and the numbers.", file_okay=False, callback=writable_folder)
    ] = Path("demo_output"),
    heads: Annotated[bool, typer.Option("--heads", help="Print every head, not only every layer.")] = False,
) -> None:
    """Project, measure and time the attention of a real transformer on real text.

    Takes the logits of all 72 heads of all-MiniLM-L6-v2 on a page of Alice in Wonderland, projects them with
    fastdsm.sinkhorn_sigma2 and reports, for every head: residual, sigma2, entropy, time against the usual PyTorch loop
    (checked first), and how deep such a stack could be before tokens become indistinguishable. Offline, on the CPU.

    Needs the extra: pip install 'fastdsm\\[demo]'

    Examples:

        fastdsm demo

        fastdsm demo --out results --heads
    """
    from ..demo import measurement
    from ..demo.model import DemoUnavailableError, attention_logits, require_extra

    console = Console()
    try:
        require_extra()
        with console.status("running the transformer"):
            source = attention_logits()
    except DemoUnavailableError as error:
        console.print(str(error), markup=False, style="red", soft_wrap=True)
        raise typer.Exit(2) from None
    from ..demo.figure import draw

    with console.status("projecting and measuring"):
        found = measurement.measure(source.logits)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("timing in pairs", total=measurement.timing_steps(source.logits))
        for step in measurement.time_all(source.logits, found):
            progress.update(bar, advance=1, description=step)

    layers, n_heads, tokens = source.logits.shape[:3]
    subtitle = (
        f"{source.model} on {tokens} tokens of Alice in Wonderland, {layers} layers x {n_heads} heads, "
        f"{measurement.N_ITERS} sweeps, float32; {platform.machine()}, {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__}"
    )
    console.print(subtitle, style="dim", highlight=False)
    console.print(_measured(found, heads))
    console.print(_timed(found, heads))
    console.print(_conclusion(found), highlight=False)
    figure, numbers = out / "attention.png", out / "attention.json"
    draw(found, subtitle, figure)
    numbers.write_text(json.dumps(_document(found, source), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)


def _measured(found: Measurement, by_head: bool) -> Table:
    """What the plans are: one row per layer, or one per head."""
    table = Table(
        title="Sinkhorn plans",
        caption="softmax: of the model's own attention; depth: equal layers to 2^-9"
        + ("" if by_head else "; averaged: of the heads' mean plan"),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    kinds = ("head", "residual", "sigma2") if by_head else ("worst\nresidual", "mean\nsigma2", "range", "averaged\nsigma2")
    for name in ("layer", *kinds, "logit\nstd", "softmax\nsigma2", "entropy", "depth"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    layers, heads = found.sigma2.shape
    depth = effective_depth(found.sigma2 if by_head else found.mean_sigma2)
    for i in range(layers):
        if not by_head:
            values = found.sigma2[i]
            own: tuple[str, ...] = (
                f"{found.residual[i].max():.0e}",
                f"{values.mean():.2f}",
                f"{values.min():.2f}-{values.max():.2f}",
                f"{found.mean_sigma2[i]:.2f}",
            )
            shared = (found.logit_std[i].mean(), found.softmax_sigma2[i].mean(), found.shannon[i].mean(), depth[i])
            table.add_row(str(i + 1), *own, *map(_number, shared))
            continue
        for h in range(heads):
            own = (str(h + 1), f"{found.residual[i, h]:.0e}", f"{found.sigma2[i, h]:.3f}")
            shared = (found.logit_std[i, h], found.softmax_sigma2[i, h], found.shannon[i, h], depth[i, h])
            table.add_row(str(i + 1), *own, *map(_number, shared))
        table.add_section()
    return table


def _number(value: torch.Tensor) -> str:
    """Two decimals, or none where there are none."""
    return f"{value:.0f}" if value == value.round() else f"{value:.2f}"


def _timed(found: Measurement, by_head: bool) -> Table:
    """Median milliseconds of all heads of a layer in one call, or of one head in one call."""
    table = Table(
        title="Milliseconds",
        caption=f"{'one head' if by_head else 'all heads of a layer'} in one call, median of alternating runs",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("layer", *(["head"] if by_head else [])):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for kind in ("forward", "forward +\nbackward"):
        for name in (f"{kind}\nusual", "fastdsm", "ratio"):
            table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for i, layer in enumerate(found.layer_times):
        for label, times in enumerate(found.head_times[i], start=1) if by_head else [(0, layer)]:
            cells = []
            for usual, fast in ((times.usual_forward, times.fast_forward), (times.usual_both, times.fast_both)):
                cells += [f"{1e3 * usual:.2f}", f"{1e3 * fast:.2f}", f"{usual / fast:.1f}x"]
            table.add_row(str(i + 1), *([str(label)] if by_head else []), *cells)
        if by_head:
            table.add_section()
    return table


def _conclusion(found: Measurement) -> str:
    """What was found, in plain words, with what it does not say."""
    from ..demo.measurement import EPS, N_ITERS

    layers, heads = found.sigma2.shape
    loose = int((found.residual > 1e-3).sum())
    worst = found.residual.max().item()
    forward, both = (
        sorted(getattr(t, f"usual_{kind}") / getattr(t, f"fast_{kind}") for t in found.layer_times)
        for kind in ("forward", "both")
    )
    depth = found.stack_depth
    reach = (
        f"reaches {EPS:.4f} after layer {depth:.0f}"
        if depth <= layers
        else f"does not reach {EPS:.4f} within {layers} layers; {found.repeated_depth:.0f} such layers would"
    )
    exceeding = int((found.sigma2 > 1).sum())
    above = f" {exceeding} with sigma2 above 1, which only an unfinished plan can have." if exceeding else ""
    plan, gradient = (
        max(found.agreement, key=lambda a: getattr(a, f"{kind}_error") / getattr(a, f"{kind}_budget"))
        for kind in ("plan", "gradient")
    )
    checked = (
        f" Checked first: where they come closest to the budget, plans err by {plan.plan_error:.0e} against float64 "
        f"(allowed {plan.plan_budget:.0e}), gradients by {gradient.gradient_error:.0e} (allowed "
        f"{gradient.gradient_budget:.0e})."
    )
    lines = (
        f"Speed. A layer's {heads} heads in one call: {forward[0]:.1f} to {forward[-1]:.1f} times as fast as the usual "
        f"loop forward, {both[0]:.1f} to {both[-1]:.1f} times with the backward.{checked}",
        f"Convergence. After {N_ITERS} sweeps {loose} of {layers * heads} plans still miss a column sum by more than "
        f"0.1 %, the worst by {worst:.0%}.{above}",
        f"Depth. With the heads averaged, the bound on what tells tokens apart {reach}. Measured, the product of all "
        f"{layers} keeps at most {found.product_sigma2[-1]:.1%}; the model's own softmax attention, averaged alike, "
        f"{found.softmax_product_sigma2[-1]:.1%}.",
        "What this does not say: the model adds a residual connection around every layer and was not trained with "
        "these plans, so its own depth is not bounded by these numbers; they describe pure mixing by the plans.",
    )
    return "\n".join(lines)


def _document(found: Measurement, source: AttentionLogits) -> dict[str, Any]:
    """Every number, as JSON holds them: inf and NaN become null."""
    numbers = {key: _plain(value) for key, value in vars(found).items() if not key.endswith("_times") and key != "agreement"}
    return {
        "model": source.model,
        "text": source.text,
        "tokens": source.tokens,
        "fastdsm": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **numbers,
        "agreement": [asdict(layer) for layer in found.agreement],
        "layer_seconds": [asdict(times) for times in found.layer_times],
        "head_seconds": [[asdict(times) for times in layer] for layer in found.head_times],
    }


def _plain(value: Any) -> Any:
    """Tensors as nested lists, numbers that JSON lacks as null."""
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
