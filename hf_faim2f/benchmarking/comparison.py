"""Compares models in their runtimes: measures them in turn, and reports the results as JSON, a table and a plot.

`latency` and `memory` define each figure. The timed steps are those of `faim2f predict`, run one after the other.
"""

import functools
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..files import new_folder
from ..hub.results import Metric
from ..runtime.predictor import RUNTIMES
from .latency import END_TO_END, STEPS, Contender, Latency, measure_in_turn, open_at_size
from .memory import PeakMemory, measure_memory

RESULTS, TABLE, PLOT = "results.json", "table.md", "plot.png"
MEGABYTE = 1e6
# Grid cells along each side of the patterns in generated images.
CELLS = (3, 8, 40)
EXPLAINED = {
    "preprocess": "from decoded images in memory to the network's batch on the CPU",
    "network": "from that batch to the outputs; measured by CUDA events on a GPU, else by the clock",
    "postprocess": "from the outputs to label maps and segments at the images' own sizes, on the CPU",
    "end_to_end": "wall-clock time of the three steps, one after the other in one thread",
    "seconds": "per batch; p99 is the 99th percentile, or the maximum of fewer than 100 runs",
    "images_per_second": "all images divided by the time of all runs",
    "order": "in turn, one run of each model, runtime and batch size after the other, in one process",
}
# The plot.
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


@dataclass
class Candidate:
    """A model in a runtime, with its measurements.

    Args:
        model: a folder or Hub id.
        runtime: a key of `RUNTIMES`.
        name: the model's name in tables and plots.
        contender: the opened model with its images.
        batch_sizes: the batch sizes to measure.
        metric: the model's known quality metric, if any.
        pictures: a description of the images.
    """

    model: str
    runtime: str
    name: str
    contender: Contender
    batch_sizes: tuple[int, ...]
    metric: Metric | None
    pictures: str
    latencies: list[Latency] = field(default_factory=list)
    memory: PeakMemory | None = None


def generated_pictures(size: tuple[int, int], count: int) -> list[Image.Image]:
    """Generates images of smooth colored patterns, coarse and fine; always the same ones.

    Args:
        size: (height, width) in pixels.
        count: number of images.
    """
    random = np.random.default_rng(0)
    height, width = size
    pictures = []
    for _ in range(count):
        layers = [
            np.asarray(
                Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
                    (width, height), Image.Resampling.BICUBIC
                ),
                dtype=np.float32,
            )
            for cells in CELLS
        ]
        pictures.append(Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)))
    return pictures


def measure(
    candidates: Sequence[Candidate],
    *,
    runs: int,
    warm_up: int,
    device: str | None,
    size: tuple[int, int] | None,
    threads: int | None,
    no_bars: bool | None = None,
) -> None:
    """Times all candidates in turn, then measures the memory of each in its own process.

    Args:
        candidates: their `latencies` and `memory` are filled in.
        runs, warm_up: numbers of measured batches, and of warm-up batches before them.
        device, size, threads: those with which the candidates were opened.
        no_bars: tqdm's `disable`.

    Raises:
        PredictorError: a network fails.
    """
    owners = [one for one in candidates for _ in one.batch_sizes]
    jobs = [(one.contender, batch_size) for one in candidates for batch_size in one.batch_sizes]
    with tqdm(total=len(jobs) * (runs + warm_up), unit="run", disable=no_bars) as bar:
        latencies = measure_in_turn(jobs, runs, warm_up, after_each=bar.update)
    for one, latency in zip(owners, latencies, strict=True):
        one.latencies.append(latency)
    for one in tqdm(candidates, desc="memory", unit="process", disable=no_bars):
        one.memory = measure_memory(
            functools.partial(open_at_size, one.model, one.runtime, device, size),
            one.contender.largest(max(one.batch_sizes)),
            one.contender.subtask,
            one.batch_sizes,
            modules=[RUNTIMES[one.runtime].module],
            gpu=_gpu(device),
            threads=threads,
        )


def _gpu(device: str | None) -> str | None:
    """The GPU whose memory is measured: the requested one, or the first."""
    if not torch.cuda.is_available() or (device or "cuda").partition(":")[0] != "cuda":
        return None
    return device or "cuda"


def report_of(
    candidates: Sequence[Candidate], machine: dict[str, Any], *, runs: int, warm_up: int, device: str | None
) -> dict[str, Any]:
    """The contents of `results.json`: all measurements and their settings, as plain data."""
    return {
        "machine": machine,
        "runs": runs,
        "warm_up": warm_up,
        "device_asked_for": device,
        "explained": EXPLAINED,
        "results": [_result(one) for one in candidates],
    }


def _result(one: Candidate) -> dict[str, Any]:
    network, memory = one.contender.predictor.network, one.memory
    assert memory is not None
    return {
        "name": one.name,
        "model": one.model,
        "runtime": one.runtime,
        "subtask": one.contender.subtask,
        "outputs": network.outputs,
        "outputs_on": str(one.contender.gpu or "cpu"),
        "images": one.pictures,
        "network_sizes": [list(size) for size in one.contender.sizes],
        "metric": None if one.metric is None else asdict(one.metric),
        "memory": {"how": memory.how, "before_bytes": memory.before, "loading_bytes": memory.loading},
        "batches": [_batch(one, latency, memory) for latency in one.latencies],
    }


def _batch(one: Candidate, latency: Latency, memory: PeakMemory) -> dict[str, Any]:
    names, size = (*STEPS, END_TO_END), latency.batch_size
    # torch's count is exact, but does not include the memory of other runtimes.
    gpu = (memory.gpu_allocated if one.runtime == "torch" else memory.gpu_taken).get(size)
    gpu_memory_how = None
    if gpu is not None:
        by_torch = one.runtime == "torch"
        gpu_memory_how = "torch.cuda.max_memory_allocated" if by_torch else "what was no longer free on the GPU"
    peaks = [peak for peak in (memory.loading, memory.running[size]) if peak is not None]
    return {
        "batch": size,
        "runs": latency.runs,
        "network_timed_by": "CUDA events" if one.contender.gpu else "the clock",
        "seconds": {
            name: {"median": latency.median(name), "p99": latency.p99(name), "all": latency.seconds[name]}
            for name in names
        },
        "images_per_second": {name: latency.images_per_second(name) for name in names},
        "peak_memory_bytes": max(peaks) if peaks else None,
        "running_memory_bytes": memory.running[size],
        "gpu_memory_bytes": gpu,
        "gpu_memory_how": gpu_memory_how,
    }


def table_of(report: dict[str, Any]) -> str:
    """The results as a Markdown table, with one row per batch size of each model in each runtime."""
    has_gpu = any(batch["gpu_memory_bytes"] is not None for one in report["results"] for batch in one["batches"])
    head = ["model", "runtime", "subtask", "batch", "input", *STEPS, "end to end", "images/s", "network alone"]
    head += ["peak MB", *(["GPU MB"] if has_gpu else [])]
    rows = []
    for one in report["results"]:
        sizes = one["network_sizes"]
        for batch in one["batches"]:
            rates = batch["images_per_second"]
            row = [one["name"], one["runtime"], one["subtask"], str(batch["batch"])]
            row.append(f"{sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else f"{len(sizes)} sizes")
            for name in (*STEPS, END_TO_END):
                seconds = batch["seconds"][name]
                row.append(f"{1000 * seconds['median']:.1f} / {1000 * seconds['p99']:.1f}")
            row += [f"{rates[END_TO_END]:.1f}", f"{rates['network']:.1f}", _megabytes(batch["peak_memory_bytes"])]
            rows.append(row + ([_megabytes(batch["gpu_memory_bytes"])] if has_gpu else []))
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    machine, runs = report["machine"], report["runs"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    p99 = "the longest" if runs < 100 else "the time of 99 in 100"
    about = [
        f"{', '.join([*machine['gpus'], machine['processor']])}, {machine['cores']} cores (load {machine['load']}), "
        f"{machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}; {machine['date']}; {versions}.",
        f"Milliseconds per batch: median / p99 of {runs} runs after {report['warm_up']} warm-up runs; p99 of {runs} "
        f"runs is {p99}. Images are in memory. Peak memory is above what was resident before the model was loaded.",
    ]
    about += [f"{one['name']} in {one['runtime']}: {one['images']}." for one in report["results"]]
    for one in report["results"]:
        metric = one["metric"]
        known = "no metric is known" if metric is None else f"{metric['name']} {metric['value']:.2f} on "
        about.append(f"{one['name']} in {one['runtime']}: {known}")
        if metric is not None:
            about[-1] += f"{metric['dataset']}, {metric['source']}"
    return "\n".join([*lines, "", *about]) + "\n"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / MEGABYTE:.0f}"


def write_report(report: dict[str, Any], out: Path) -> None:
    """Writes `results.json`, `table.md` and `plot.png` into a new or empty folder, atomically.

    Raises:
        OSError: they cannot be written.
    """
    with new_folder(out) as staging:
        (staging / RESULTS).write_text(json.dumps(report, allow_nan=False, indent=1), encoding="utf-8")
        (staging / TABLE).write_text(table_of(report), encoding="utf-8")
        draw_plot(report, staging / PLOT)


def draw_plot(document: dict[str, Any], path: Path) -> None:
    """Writes the plot as PNG: quality against frames per second, and the time of each step."""
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
        text = f"Only times are shown, because no metric is known: {', '.join(left_out)}."
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


__all__ = [
    "PLOT",
    "RESULTS",
    "TABLE",
    "Candidate",
    "draw_plot",
    "figure_of",
    "generated_pictures",
    "measure",
    "report_of",
    "table_of",
    "write_report",
]
