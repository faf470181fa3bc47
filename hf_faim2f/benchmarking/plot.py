"""The plot of `faim2f benchmark`: quality against frames per second, and the time of each step."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .latency import END_TO_END, STEPS

MARKERS = ("o", "s", "^", "D", "v", "P")
STEP_COLORS = {"preprocess": "#8ecae6", "network": "#1d3557", "postprocess": "#f4a261"}
# Frame rates whose ratio exceeds this are drawn on a logarithmic axis.
WIDE = 8.0
# Approximate width and height of a panel in inches; font size, letter width and line height in points.
PANEL = (4.8, 3.4)
SMALL, LETTER, LINE = 8.5, 4.8, 11.0
# Inches from an axis to its legend, and inches of a figure's height outside the axes.
LEGEND_BELOW, MARGINS = 0.5, 1.4
# Candidate positions of a name, in points above its marker.
OFFSETS = (12, -12, 24, -24, 36, -36, 48, -48, 60, -60)
RESOLUTION = 110  # dots per inch


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes the figure as PNG."""
    figure_of(document).savefig(path, dpi=RESOLUTION)


def figure_of(document: dict[str, Any]) -> Any:
    """A matplotlib figure of a benchmark's results.

    One panel per metric and dataset shows it against frames per second. For each model in each runtime, a filled marker
    is the rate from image to result, and a hollow one that of the network alone. The last panel shows the time of each
    step.

    Args:
        document: the contents of `results.json`.
    """
    from matplotlib.figure import Figure

    results = document["results"]
    metrics: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        if result["metric"] is not None:
            metrics.setdefault((result["metric"]["name"], result["metric"]["dataset"]), []).append(result)
    panels = len(metrics) + 1
    figure = Figure(figsize=(1.5 + 5.5 * panels, max(4.6, 2.6 + 0.5 * len(results))), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    models = list(dict.fromkeys(result["name"] for result in results))
    runtimes = list(dict.fromkeys(result["runtime"] for result in results))
    for axis, ((metric, dataset), members) in zip(axes, metrics.items(), strict=False):
        _draw_metric(axis, metric, dataset, members, models, runtimes)
    _draw_times(axes[-1], results)
    machine = document["machine"]
    used = ", ".join(dict.fromkeys([*machine["gpus"], machine["processor"]]))
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    figure.suptitle(f"{used}, {threads}, {machine['date'][:10]}", fontsize=11)
    left_out = [_name(result) for result in results if result["metric"] is None]
    if left_out:
        text = f"No metric is known of, so that only their times are drawn: {', '.join(left_out)}."
        figure.supxlabel(textwrap.fill(text, 55 * panels), fontsize=SMALL)
    return figure


def _draw_metric(
    axis: Any,
    metric: str,
    dataset: str,
    members: Sequence[dict[str, Any]],
    models: Sequence[str],
    runtimes: Sequence[str],
) -> None:
    rates = []
    for result in members:
        batch = result["batches"][0]
        both = [batch["images_per_second"][END_TO_END], batch["images_per_second"]["network"]]
        rates += both
        value = result["metric"]["value"]
        color, marker = _look(result, models, runtimes)
        axis.plot(both, [value, value], color=color, linewidth=1, alpha=0.5, zorder=1)
        axis.plot(both[1], value, marker, color=color, markerfacecolor="white", markersize=7, gid="network")
        axis.plot(both[0], value, marker, color=color, markersize=9, gid="end_to_end")
    if max(rates) > WIDE * min(rates):
        axis.set_xscale("log")
        axis.set_xlim(min(rates) / 1.4, max(rates) * 1.4)
        _plain_ticks(axis)
    else:
        axis.set_xlim(0, 1.15 * max(rates))
    values = [result["metric"]["value"] for result in members]
    room = max(1.5, 0.25 * (max(values) - min(values)))
    axis.set_ylim(min(values) - room, max(values) + room)
    _name_points(axis, members, models, runtimes)
    sizes = {result["batches"][0]["batch"] for result in members}
    batch_text = f", batches of {sizes.pop()}" if len(sizes) == 1 else ""
    axis.set(xlabel=f"frames per second{batch_text}", ylabel=f"{metric}, percent", title=f"{metric}\n{dataset}")
    axis.grid(alpha=0.3)
    handles = [
        axis.plot([], [], "o", color="gray", markerfacecolor=fill, label=label, gid="legend")[0]
        for fill, label in (("gray", "from image to result"), ("white", "network alone"))
    ]
    _legend_below(axis, handles)


def _name_points(axis: Any, members: Sequence[dict[str, Any]], models: Sequence[str], runtimes: Sequence[str]) -> None:
    """Places names above the markers, or below or farther away to avoid overlaps."""
    to_axis = axis.transAxes.inverted().transform
    width, height = (inches * 72 for inches in PANEL)
    taken: list[tuple[float, float, float]] = []  # left end, right end and height, as fractions of the axis
    for result in sorted(members, key=lambda one: -one["batches"][0]["images_per_second"][END_TO_END]):
        point = (result["batches"][0]["images_per_second"][END_TO_END], result["metric"]["value"])
        x, y = to_axis(axis.transData.transform(point))
        half = 0.5 * LETTER * len(_name(result)) / width
        middle = min(max(x, half), 1 - half)
        for offset in OFFSETS:
            ends = (middle - half, middle + half, y + offset / height)
            if not any(
                ends[0] < right and left < ends[1] and abs(ends[2] - level) < LINE / height
                for left, right, level in taken
            ):
                break
        taken.append(ends)
        axis.annotate(
            _name(result),
            point,
            xytext=((middle - x) * width, offset),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=_look(result, models, runtimes)[0],
        )


def _draw_times(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """Draws stacked bars of the steps' median times at the smallest batch size."""
    rows = list(range(len(results)))
    ends = [0.0] * len(results)
    for step in STEPS:
        lengths = [1000 * result["batches"][0]["seconds"][step]["median"] for result in results]
        axis.barh(rows, lengths, left=ends, color=STEP_COLORS[step], label=step, height=0.6)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for row, end, result in zip(rows, ends, results, strict=True):
        batch = result["batches"][0]
        text = f" {1000 * batch['seconds'][END_TO_END]['median']:.3g} ms"
        axis.text(end, row, text, va="center", fontsize=SMALL)
    axis.set_yticks(rows, [f"{_name(result)}\nbatches of {result['batches'][0]['batch']}" for result in results])
    axis.tick_params(axis="y", labelsize=SMALL)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(ends))
    axis.set(xlabel="milliseconds per batch (median)", title="Time per step")
    _legend_below(axis, axis.get_legend_handles_labels()[0])
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _legend_below(axis: Any, handles: Sequence[Any]) -> None:
    """Places the legend below the axis label, for any height of the axis."""
    below = -LEGEND_BELOW / (axis.figure.get_size_inches()[1] - MARGINS)
    settings = {"ncols": len(handles), "fontsize": SMALL, "frameon": False, "borderaxespad": 0.0}
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, below), **settings)


def _look(result: dict[str, Any], models: Sequence[str], runtimes: Sequence[str]) -> tuple[str, str]:
    """The color of each model and the marker of each runtime."""
    return f"C{models.index(result['name']) % 10}", MARKERS[runtimes.index(result["runtime"]) % len(MARKERS)]


def _plain_ticks(axis: Any) -> None:
    """Shows frame rates as plain numbers instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _name(result: dict[str, Any]) -> str:
    return f"{result['name']} ({result['runtime']})"


__all__ = ["draw", "figure_of"]
