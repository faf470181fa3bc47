"""Draws published metric against measured images per second for ours and the peers: COCO instances, ADE20K semantics.

    python benchmarks/peers_figure.py [--results FILE] [--out FOLDER]

Reads what `peers.py` wrote, by default `results/peers.json`, and writes `peers_coco.svg` and `peers_ade20k.svg`, by
default to `docs/images`. Filled markers are float32, and open ones bfloat16, of the same models. The metrics are those
published by the models' authors, because the measured models have random weights; rows without one are not drawn.
"""

import argparse
import itertools
import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FormatStrFormatter, NullFormatter
from matplotlib.transforms import Bbox
from measurement import RESULTS
from peers import PICTURES, Row, import_torchvision, rows

IMAGES = Path(__file__).parents[1] / "docs" / "images"
AXES = {
    "COCO": "published mask AP, COCO val2017",
    "ADE20K": "published mIoU, ADE20K val, single scale",
}
WHAT = {"COCO": "from 640x480 picture to instances", "ADE20K": "from 683x512 picture to label map"}
BLUE = "#1d3557"
# Models joined by a line: the start of their rows' names, and the line's label, color and marker.
SERIES = (
    ("fai-m", "ours", BLUE, "o"),
    ("bisenetformer", "BiSeNetFormer (ours)", "#2a9d8f", "^"),
    ("RF-DETR", "RF-DETR-Seg", "#c1121f", "s"),
    ("YOLO26", "YOLO26-seg", "#e07a00", "D"),
    ("SegFormer", "SegFormer", "#6a4c93", "s"),
    ("Mask2Former", "Mask2Former, transformers", "#6c757d", "P"),
)
HALF = ", bfloat16"  # ends the names of such rows
# Candidate offsets of a label from its point, in points, best first, and its alignment.
PLACES = [(8, -3, "left"), (-8, -3, "right"), (0, 8, "center"), (0, -14, "center"), (7, 7, "left"), (-7, 7, "right")]
PLACES += [(7, -13, "left"), (-7, -13, "right"), (0, 20, "center"), (0, -26, "center"), (12, 14, "left")]
PLACES += [(-12, 14, "right"), (-12, -22, "right"), (12, -22, "left")]


def points_of(start: str, half: bool, found: list[Row], results: dict[str, Any]) -> list[tuple[float, float, str]]:
    """Images per second, published metric and name of a series in float32 or bfloat16 (`half`), the fastest first."""
    points = [
        (1 / results[row.name]["seconds"]["median"], row.published, row.name)
        for row in found
        if row.name in results and row.published is not None and row.name.startswith(start)
        and row.name.endswith(HALF) == half
    ]  # fmt: skip
    return sorted(points, key=lambda point: -point[0])


def write_labels(axis: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Writes each label beside its point, where it overlaps no other label or point and crosses the fewest lines."""
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    markers = [axis.transData.transform(label[:2]) for label in labels]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in markers]
    if (legend := axis.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    along = np.linspace(0, 1, 60)[:, None]
    lines = [axis.transData.transform(line.get_xydata()) for line in axis.lines]
    pieces = [start + along * (end - start) for line in lines for start, end in itertools.pairwise(line)]
    dots = np.concatenate([np.empty((0, 2)), *pieces])
    for x, y, name, color in filter(itemgetter(2), labels):
        best: tuple[int, tuple[int, int, str], Bbox] | None = None
        for place in PLACES:
            text = write(axis, name, (x, y), place, color)
            box = text.get_window_extent()
            text.remove()
            if box.x0 < axis.bbox.x0 or box.x1 > axis.bbox.x1 or any(box.overlaps(other) for other in taken):
                continue
            crossed = int(((dots > np.array(box.min) - 1) & (dots < np.array(box.max) + 1)).all(1).sum())
            if best is None or crossed < best[0]:
                best = crossed, place, box
        if best is None:
            raise ValueError(f"There is no place for the label {name!r}.")
        taken.append(best[2])
        write(axis, name, (x, y), best[1], color)


def write(axis: Axes, name: str, point: tuple[float, float], place: tuple[int, int, str], color: str) -> Annotation:
    """Writes a label at a place of `PLACES`."""
    return axis.annotate(name, point, place[:2], textcoords="offset points", ha=place[2], color=color, fontsize=8)


def draw(data: str, results: dict[str, Any]) -> Figure:
    """Draws the figure of one dataset."""
    found = [row for row in rows() if row.data == data]
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axis = figure.subplots()
    labels, rates = [], []
    for start, label, color, marker in SERIES:
        looks: list[tuple[bool, dict[str, Any]]] = [(False, {"label": label, "linestyle": "-"})]
        looks.append((True, {"markerfacecolor": "white", "linestyle": ":"}))
        for half, look in looks:
            if points := points_of(start, half, found, results):
                places = zip(*[point[:2] for point in points], strict=True)
                axis.plot(*places, marker, color=color, markersize=5, **look)
                rates += [point[0] for point in points]
                # Both precisions have the same metric, and are named once.
                labels += [(rate, quality, "" if half else name.split(",")[0], color) for rate, quality, name in points]
    if any(row.name in results for row in found if row.name.endswith(HALF)):
        axis.plot([], [], "o:", color="#555a63", markerfacecolor="white", markersize=5, label="in bfloat16")
    axis.set_xscale("log")
    axis.set_xlim(min(rates) / 1.6, max(rates) * 2.2)
    low, high = axis.get_ylim()
    axis.set_ylim(low - 1, high + 1)
    axis.set_xticks([2.0**power for power in range(-4, 6) if min(rates) / 1.6 < 2.0**power < max(rates) * 2.2])
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="minor", length=0)
    axis.set_xlabel(f"images per second, {WHAT[data]}")
    axis.set_ylabel(AXES[data])
    first = results[next(row.name for row in found if row.name in results)]
    threads = f"{first['threads']} CPU threads" if first["threads"] > 1 else "CPU time of one thread"
    axis.set_title(f"{threads}, one picture at a time, {first['date'][:7]}", fontsize=10, color="#555a63")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left", fontsize=8)
    write_labels(axis, labels)
    return figure


def main() -> None:
    """Writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    options = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "peers"
    import_torchvision()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    drawn = {row.data for row in rows() if row.name in results and row.published is not None}
    for data in [data for data in PICTURES if data in drawn]:
        path = options.out / f"peers_{data.lower()}.svg"
        draw(data, results).savefig(path, metadata={"Date": None})
        print(f"Drawn: {path.name}")


if __name__ == "__main__":
    main()
