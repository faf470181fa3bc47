"""Export formats of full-size models: whether each model converts, its file sizes, error and latency.

    python benchmarks/formats.py [MODEL ...] [--formats openvino ...] [--minutes M] [--table]

The models are the published architectures and two of Mask2Former's, with random weights that give confident
predictions. Each is exported as logits of one 640x640 image, verified by the exporter, opened by the runtime and timed
in turn with torch. Lines are appended to `results/formats.jsonl`; results that are already there are not measured
again, and `--table` prints them.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mask2former_export import EXPORTS, converted
from measurement import RESULTS, record, time_in_turn
from transformers.utils import logging
from untrained import save_untrained

from hf_faim2f.errors import FaiM2FError
from hf_faim2f.export.formats import FORMATS, export_format
from hf_faim2f.family import FAMILY
from hf_faim2f.runtime import Predictor

SIZE = (640, 640)
MODELS = (*FAMILY, "swin-base-coco-640", "r50-cityscapes-512x1024")
RUNS = 5


def source_of(name: str, folder: Path) -> Path:
    """Writes the model's folder, and returns it."""
    return converted(name, folder) if name in EXPORTS else save_untrained(folder / name, name)


def pairs() -> Iterator[tuple[str, str]]:
    """Each format with each of its precisions."""
    for name, row in FORMATS.items():
        for precision in row.precisions:
            yield name, precision


def measure(source: Path, out: Path, name: str, precision: str, threads: int) -> dict[str, Any]:
    """Exports, verifies and times one format; a refusal is recorded as a result, too."""
    start = time.perf_counter()
    try:
        lines = export_format(name, source, out, size=SIZE, batch=1, precision=precision)
    except FaiM2FError as error:
        return {"outcome": "refused", "reason": str(error)}
    found: dict[str, Any] = {
        "outcome": "verified" if lines else "written",
        "seconds": time.perf_counter() - start,
        "mb": sum(path.stat().st_size for path in out.rglob("*") if path.suffix != ".json" and path.is_file()) / 1e6,
        "compared": lines,
    }
    runtime = FORMATS[name].runs
    if runtime is None:
        return found
    pixels = torch.randn(1, 3, *SIZE)
    ours, plain = Predictor.from_pretrained(out, runtime).network, Predictor.from_pretrained(source).network
    answers, expected = ours.run(pixels), plain.run(pixels)
    found["error"] = max(float((answers[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())
    found["ms"] = {
        key: 1000 * figures["median"]
        for key, figures in time_in_turn(
            {name: lambda: ours.run(pixels), "torch": lambda: plain.run(pixels)}, RUNS, threads=threads
        ).items()
    }
    return found


def results() -> list[dict[str, Any]]:
    path = RESULTS / "formats.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _why(reason: str) -> str:
    """A refusal in a few words."""
    if found := re.search(r"largest error (\S+) of the largest logit, where torch in \w+ has ([^, ]+)", reason):
        return f"it does not agree with the model (error {float(found[1]):.1g}, torch {float(found[2]):.1g})"
    if found := re.search(r"infinite or NaN values in (\w+)", reason):
        return f"the model itself gives infinite or NaN values in {found[1]}, also in torch"
    if found := re.search(r"only supports tensors with rank <= 5", reason):
        return "Core ML has tensors of at most 5 dimensions, and deformable attention and Swin have 6"
    return reason.partition(", and nothing was kept")[0]


def table() -> str:
    """The results as Markdown: a row for each model, a column for each format and precision, and notes."""
    found = {(row["model"], row["format"], row["precision"]): row for row in results()}
    columns = list(pairs())
    lines = ["| model | " + " | ".join(f"{name} {precision}" for name, precision in columns) + " |"]
    lines.append("|" + " --- |" * (1 + len(columns)))
    notes: list[str] = []
    for model in MODELS:
        cells = []
        for name, precision in columns:
            row = found.get((model, name, precision))
            if row is None:
                cells.append("not run")
            elif row["outcome"] == "refused":
                reason = _why(row["reason"])
                notes += [reason] * (reason not in notes)
                cells.append(f"refused ({1 + notes.index(reason)})")
            elif "ms" in row:
                ms, torch_ms = row["ms"][name], row["ms"]["torch"]
                cells.append(f"{row['mb']:.0f} MB, {row['error']:.0e}, {ms:.0f} : {torch_ms:.0f} ms")
            else:
                cells.append(f"{row['mb']:.0f} MB")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=tuple(FORMATS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after so long")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no model is called {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end = time.monotonic() + 60 * options.minutes
    done = {(row["model"], row["format"], row["precision"]) for row in results()}
    for model in () if options.table else options.models or MODELS:
        wanted = [
            (name, precision)
            for name, precision in pairs()
            if name in options.formats and precision in options.precisions and (model, name, precision) not in done
        ]
        if not wanted or time.monotonic() > end:
            continue
        with tempfile.TemporaryDirectory() as place:
            source = source_of(model, Path(place))
            for name, precision in wanted:
                if time.monotonic() > end:
                    break
                figures = measure(source, Path(place) / f"{name}-{precision}", name, precision, threads)
                row = {"model": model, "format": name, "precision": precision, **figures}
                print(json.dumps(row), flush=True)
                record("formats", row, threads)
    print(table())


if __name__ == "__main__":
    main()
