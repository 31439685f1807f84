"""The demo's one figure: sigma2 and entropy of every head, contraction by depth, and time against the usual loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .measurement import EPS, N_ITERS, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DARK, _GREY, _ACCENT, _SECOND = "#1f2933", "#b8c0c8", "#0b6e99", "#c2571a"


def draw(measurement: Measurement, subtitle: str, path: Path) -> None:
    """Write the figure to ``path`` (PNG) without touching pyplot's state, so that no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(13.5, 9.6), dpi=140, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, height_ratios=(1, 1.15))
    figure.suptitle(f"{_finding(measurement)}\n", fontsize=15, fontweight="bold", color=_DARK, x=0.01, ha="left")
    figure.text(0.01, 0.952, subtitle, fontsize=10.5, color="#52606d")
    _heat_map(figure, axes[0, 0], measurement.sigma2, "second singular value σ₂ of the plan", "viridis", 1.0)
    _heat_map(figure, axes[0, 1], measurement.shannon, "Shannon entropy of the rows, 1 = uniform", "cividis", 1.0)
    _contraction(axes[1, 0], measurement)
    _times(axes[1, 1], measurement)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _finding(found: Measurement) -> str:
    """The title: what mixing by the averaged heads alone would do to detail over the whole stack."""
    kept = found.product_sigma2[-1].item()
    layers = len(found.product_sigma2)
    return f"Mixing by the Sinkhorn plans alone, {layers} layers keep at most {kept:.1%} of what tells tokens apart"


def _heat_map(figure: Figure, axis: Axes, values: Tensor, title: str, colours: str, top: float) -> None:
    """Layers down, heads across, every value written in its cell."""
    image = axis.imshow(values.numpy(), cmap=colours, vmin=0.0, vmax=top, aspect="auto")
    layers, heads = values.shape
    axis.set_xticks(range(heads), [str(h + 1) for h in range(heads)])
    axis.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for layer in range(layers):
        for head in range(heads):
            value = values[layer, head].item()
            ink = "white" if value < 0.6 * top else _DARK
            axis.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=ink)
    _title(axis, title)
    bar = figure.colorbar(image, ax=axis, pad=0.015, aspect=28, extend="max" if values.max() > top else "neither")
    bar.outline.set_visible(False)


def _contraction(axis: Axes, found: Measurement) -> None:
    """Product of sigma2 by depth: every head followed through the layers, the averaged heads, and what is measured."""
    layers = len(found.mean_sigma2)
    depth = list(range(layers + 1))

    def from_one(values: Tensor) -> list[float]:
        return [1.0, *values.tolist()]

    for head in found.sigma2.cumprod(0).T:
        axis.plot(depth, from_one(head), color=_GREY, lw=1.0, zorder=1)
    axis.plot([], [], color=_GREY, lw=1.0, label="bound, one head's plans (12 heads)")
    bound = found.mean_sigma2.cumprod(0)
    axis.plot(depth, from_one(bound), color=_ACCENT, lw=2.4, marker="o", ms=5, label="bound, plans averaged over heads")
    axis.plot(
        depth, from_one(found.product_sigma2), color=_SECOND, lw=2.0, ls=(0, (4, 2)), marker="s", ms=4.5,
        label="measured, product of these averages",
    )  # fmt: skip
    axis.plot(
        depth, from_one(found.softmax_product_sigma2), color=_DARK, lw=1.4, ls=(0, (1, 1.2)),
        label="measured, the model's own softmax attention averaged",
    )  # fmt: skip
    axis.axhline(EPS, color=_DARK, lw=0.8)
    axis.text(0.05, EPS * 0.9, "ε = 2⁻⁹, half a bfloat16 unit", va="top", fontsize=9, color=_DARK)
    axis.set_yscale("log")
    axis.set_ylim(min(EPS, bound.min().item(), found.product_sigma2.min().item()) / 2.2, 1.6)
    axis.set_xticks(depth)
    axis.set_xlabel("layers passed")
    axis.set_ylabel("share of detail left at most")
    _plain(axis)
    axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 0.1))
    _title(axis, "contraction by depth")


def _times(axis: Axes, found: Measurement) -> None:
    """Milliseconds per head, each curve sorted: the usual loop and fastdsm, forward, and with the backward."""
    heads = [times for layer in found.head_times for times in layer]
    curves: tuple[tuple[str, list[float], dict[str, Any]], ...] = (
        ("usual loop, forward + backward", [t.usual_both for t in heads], {"color": _SECOND, "ls": "-"}),
        ("usual loop, forward", [t.usual_forward for t in heads], {"color": _SECOND, "ls": (0, (2, 1.5))}),
        ("fastdsm, forward + backward", [t.fast_both for t in heads], {"color": _ACCENT, "ls": "-"}),
        ("fastdsm, forward", [t.fast_forward for t in heads], {"color": _ACCENT, "ls": (0, (2, 1.5))}),
    )
    for label, seconds, style in curves:
        axis.plot(range(1, len(heads) + 1), [1e3 * s for s in sorted(seconds)], lw=2.0, label=label, **style)
    axis.set_yscale("log")
    fastest, slowest = (f(s for _, seconds, _ in curves for s in seconds) for f in (min, max))
    axis.set_ylim(1e3 * fastest / 1.5, 1e3 * slowest * 6)
    ticks = [m * 10.0**k for k in range(-3, 4) for m in (1, 2, 5) if 1e3 * fastest / 1.5 <= m * 10.0**k <= 1e3 * slowest * 1.5]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(1, len(heads))
    axis.set_xlabel(f"the {len(heads)} heads, sorted by time")
    axis.set_ylabel("milliseconds")
    _plain(axis)
    axis.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    _title(axis, f"time for one head's {N_ITERS} sweeps, medians")


def _plain(axis: Axes) -> None:
    """Light horizontal grid, no box."""
    axis.grid(axis="y", color="#e4e7eb", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=11.5, color=_DARK)
