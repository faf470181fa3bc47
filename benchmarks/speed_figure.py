"""Draws the speed figure: published mIoU on ADE20K against measured images per second, from image to label map.

    python benchmarks/speed_figure.py [LINE]

Reads a line of `results/end_to_end.jsonl`, by default the last one, and writes `results/speed.png`. The README shows
line 8 (machine D in docs/performance.md). The metrics are those published by the models' authors, because that
benchmark's models have random weights.
"""

import json
import sys
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter
from measurement import RESULTS

from hf_faim2f.family.presets import find_preset, published_peers

OURS = {"s": "fai-m2f-s-ade", "m": "fai-mf-m-ade", "l": "fai-mf-l-ade"}
BISENETFORMER = {f"BiSeNetFormer {size}": f"bisenetformer-{size}-ade" for size in "sml"}
PEERS = {
    "transformers, Mask2Former R50": "Mask2Former R50",
    "transformers, SegFormer-B0": "SegFormer-B0",
}
BLUE, LIGHT_BLUE, GRAY = "#1d3557", "#2a9d8f", "#8a8f98"


def draw(figures: dict[str, Any]) -> Figure:
    """Draws the figure for one line of results."""
    rates = {name: 1 / seconds["median"] for name, seconds in figures["seconds"].items()}
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    series = (
        ("float32", "", OURS, BLUE, "o-"),
        ("bfloat16", ", bfloat16", OURS, LIGHT_BLUE, "o-"),
        ("float32", "", BISENETFORMER, BLUE, "^--"),
        ("bfloat16", ", bfloat16", BISENETFORMER, LIGHT_BLUE, "^--"),
    )
    for kind, suffix, names, color, style in series:
        points = [
            (rates[key], find_preset(name).published["mIoU"], name)
            for size, name in names.items()
            if (key := f"ours, {size}{suffix}") in rates
        ]
        if not points:
            continue
        label = f"ours, {kind}" if names is OURS else f"BiSeNetFormer, {kind}"
        axis.plot(*zip(*[point[:2] for point in points], strict=True), style, color=color, label=label)
        # Names are to the left of one family's slower series, and to the right of the other family's faster one.
        last = "bfloat16" if f"ours, {next(iter(names))}, bfloat16" in rates else "float32"
        if kind == ("float32" if names is OURS else last):
            place, side = ((-8, -4), "right") if names is OURS else ((8, -4), "left")
            for rate, quality, name in points:
                axis.annotate(name, (rate, quality), place, textcoords="offset points", ha=side, color=color)
    published = published_peers()["ADE20K val"]
    for key, name in PEERS.items():
        place = (rates[key], published[name]["mIoU"])
        axis.plot(*place, "s", color=GRAY, label="transformers, float32" if key == next(iter(PEERS)) else None)
        axis.annotate(name, place, (8, -4), textcoords="offset points", color="#555a63")
    axis.set_xscale("log")
    axis.set_xlim(min(rates[key] for key in PEERS) / 1.6, max(rates[key] for key in rates if "ours" in key) * 3.4)
    axis.set_ylim(36, 50)
    axis.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16])
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="minor", length=0)
    axis.set_xlabel("images per second, from 640x640 image to label map")
    axis.set_ylabel("published mIoU, ADE20K val")
    machine = f"{figures['threads']} CPU cores, one image at a time, {figures['date'][:7]}"
    axis.set_title(machine, fontsize=10, color="#555a63")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left", fontsize=9)
    return figure


def main() -> None:
    """Writes the figure."""
    lines = (RESULTS / "end_to_end.jsonl").read_text(encoding="utf-8").splitlines()
    line = int(sys.argv[1]) if len(sys.argv) > 1 else len(lines)
    if not 1 <= line <= len(lines):
        sys.exit(f"There is no line {line}: end_to_end.jsonl has {len(lines)}.")
    path = RESULTS / "speed.png"
    draw(json.loads(lines[line - 1])).savefig(path, dpi=130)
    print(f"Drawn: {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
