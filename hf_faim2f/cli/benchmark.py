"""`faim2f benchmark`: measures the latency of each step, the throughput and the peak memory of models.

Writes `results.json`, `table.md` and `plot.png` to the folder `--out`, atomically; see `benchmarking.comparison`.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..benchmarking.comparison import (
    PLOT,
    RESULTS,
    TABLE,
    Candidate,
    generated_pictures,
    measure,
    report_of,
    table_of,
    write_report,
)
from ..benchmarking.latency import Contender, describe_machine, open_at_size, own_size
from ..download import has_weights
from ..errors import ImageError, ModelError, PredictorError, SettingsError, with_name
from ..export import aotinductor, engine, formats
from ..files import check_empty_folder, find_files, read_object
from ..hub.check import QUANTIZATION
from ..hub.results import Metric, known_metric
from ..model.channels_faim2f import RGB
from ..model.image_loading_faim2f import IMAGE_SUFFIXES, load_images
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..runtime.predictor import RUNTIMES
from ..zoo import open_settings, resolve, runtimes_of
from .output import DONE, MISTAKES, interrupted, mistake, no_bars, one_document, require_packages, say, use_weights_url
from .parser import OneSentenceParser
from .predict import SUBTASKS

PROGRAM = "faim2f benchmark"
DESCRIPTION = "Measures latency by step, throughput and peak memory of models; writes JSON, a table and a plot."
EXAMPLES = (
    ("A model in all runtimes that it has files for, on generated images", "my-model my-onnx --out figures"),
    (
        "One runtime, one thread and batches of 1, on photos",
        "my-model --runtime torch --images photos --batch-sizes 1 --threads 1 --device cpu --out figures",
    ),
)  # fmt: skip
DOCUMENT = {
    "out": "the folder that was written",
    "machine": "CPU, GPUs, versions, date and load",
    "runs, warm_up": "numbers of measured batches and of warm-up batches",
    "device_asked_for": "--device, or null",
    "notes": "what was requested but skipped, and why",
    "explained": "the meaning of each figure",
    "results": "one entry for each model and runtime: name, model, runtime, subtask, metric, memory in bytes, and for "
    "each batch size seconds (median, p99, all) by step, images_per_second and peak_memory_bytes",
}
BATCH_SIZES = (1, 4, 8)
RUNS, WARM_UP = 30, 3
# Decoded images are held in memory, and more of them would hardly change the results.
MOST_IMAGES = 32
# The files that describe exports for these runtimes.
DESCRIPTIONS = {"tensorrt": engine.DESCRIPTION, "aotinductor": aotinductor.DESCRIPTION}


@dataclass
class BenchmarkRun:
    """A benchmark with checked arguments and opened models; nothing is written yet."""

    options: argparse.Namespace
    candidates: list[Candidate]
    notes: list[str]
    machine: dict[str, Any]


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0, or 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as emit:
        try:
            try:
                prepared = prepare(options)
            except MISTAKES as error:
                return mistake(program, error)
            try:
                emit({"out": str(options.out), "notes": prepared.notes, **_run(prepared)})
            except (OSError, PredictorError) as error:
                return mistake(program, error, everywhere=True)
        except KeyboardInterrupt:
            return interrupted(program, "nothing was written.")
    return DONE


def _run(prepared: BenchmarkRun) -> dict[str, Any]:
    """Measures, writes the results, and returns the contents of `results.json`.

    Raises:
        PredictorError, OSError: a network fails, or the results cannot be written.
    """
    options, candidates = prepared.options, prepared.candidates
    for note in prepared.notes:
        say(note)
    for one in candidates:
        sizes = " ".join(map(str, one.batch_sizes))
        say(f"{one.model} in {one.runtime}: {one.contender.subtask}, {one.pictures}, batches of {sizes}.")
    measure(
        candidates,
        runs=options.runs,
        warm_up=options.warm_up,
        device=options.device,
        size=options.size,
        threads=options.threads,
        no_bars=no_bars(),
    )
    report = report_of(candidates, prepared.machine, runs=options.runs, warm_up=options.warm_up, device=options.device)
    out: Path = options.out
    write_report(report, out)
    say(f"\n{table_of(report)}\nWritten: {out / RESULTS}, {out / TABLE}, {out / PLOT}.")
    return report


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=DOCUMENT)
    models = "folders, published names (see `faim2f models`) or Hub ids of models, and folders of `faim2f export`"
    parser.add_argument("models", metavar="MODEL", nargs="+", help=models)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write: new or empty")
    runtime = "runtimes, for folders that have files for them (default: all without native code)"
    parser.add_argument("--runtime", nargs="+", choices=tuple(RUNTIMES), help=runtime)
    images = f"files, folders and patterns; the first {MOST_IMAGES} images are used (default: generated images of "
    images += "the network's input size, which are not resized)"
    parser.add_argument("--images", nargs="+", metavar="IMAGES", help=images)
    size = "size in pixels to which images are resized (default: that of the model's image processor)"
    parser.add_argument("--size", type=_size, metavar="HxW", help=size)
    parser.add_argument("--subtask", choices=SUBTASKS, help="kind of segmentation (default: each model's own)")
    sizes = f"images per batch (default: {' '.join(map(str, BATCH_SIZES))}, or the graph's own)"
    parser.add_argument("--batch-sizes", type=_count, nargs="+", metavar="N", help=sizes)
    runs = f"measured batches (default: {RUNS})"
    parser.add_argument("--runs", type=_count, default=RUNS, metavar="N", help=runs)
    warm_up = f"warm-up batches before them (default: {WARM_UP})"
    parser.add_argument("--warm-up", type=_count, default=WARM_UP, metavar="N", help=warm_up)
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: torch's own setting)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    metrics = "a model whose card gives the quality metric of models without one, such as its exports (default: none)"
    parser.add_argument("--metrics-from", metavar="MODEL", help=metrics)
    parser.add_weights_url()
    parser.add_json()
    return parser


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 640x640")
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def prepare(options: argparse.Namespace) -> BenchmarkRun:
    """Checks the arguments, loads the models, and prepares each image once.

    Raises:
        ValueError, OSError, ImportError: invalid arguments or unusable input; one sentence.
    """
    use_weights_url(options.weights_url, *options.models, *filter(None, [options.metrics_from]))
    check_empty_folder(options.out, SettingsError)
    require_packages(("matplotlib",), "train")
    twice = next((name for name, count in Counter(map(os.path.normpath, options.models)).items() if count > 1), None)
    if twice is not None:
        raise SettingsError(f"{twice} is named twice: name each model once.")
    notes: list[str] = []
    images = None if options.images is None else _read_images(options.images, notes)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pairs = [(model, runtime) for model in options.models for runtime in choose_runtimes(model, options.runtime)]
    names = short_names(options.models)
    candidates = [_candidate(options, model, runtime, names[model], images, notes) for model, runtime in pairs]
    unused = [runtime for runtime in options.runtime or () if runtime not in {one.runtime for one in candidates}]
    notes += [f"None of the models has files for {runtime}." for runtime in unused]
    return BenchmarkRun(options, candidates, notes, describe_machine())


def choose_runtimes(model: str, asked: Sequence[str] | None) -> list[str]:
    """The requested runtimes that a model's folder has files for; by default all, except those with native code.

    If there are none, returns the first requested runtime, whose error message names what is missing.
    """
    wanted = list(dict.fromkeys(asked or RUNTIMES))
    able = runtimes_of(model, asked or ())
    return [runtime for runtime in wanted if runtime in able] or wanted[:1]


def short_names(models: Sequence[str]) -> dict[str, str]:
    """For each model, the shortest path suffix that distinguishes it from the others."""
    parts = {model: Path(os.path.abspath(model)).parts[1:] for model in models}
    depths = dict.fromkeys(models, 1)
    while True:
        names = {model: "/".join(own[-depths[model] :]) for model, own in parts.items()}
        counts = Counter(names.values())
        longer = [model for model in models if counts[names[model]] > 1 and depths[model] < len(parts[model])]
        if not longer:
            return names
        for model in longer:
            depths[model] += 1


def _read_images(words: Sequence[str], notes: list[str]) -> list[Image.Image]:
    """Finds and decodes the images as upright RGB images.

    Raises:
        ValueError: there are no images, or one cannot be read.
    """
    paths = [found.path for found in find_files(words, IMAGE_SUFFIXES, "image")]
    if len(paths) > MOST_IMAGES:
        notes.append(f"The first {MOST_IMAGES} of {len(paths)} images are used.")
    images = []
    for path in paths[:MOST_IMAGES]:
        try:
            pixels = next(load_images([path], do_rescale=True))
        except ValueError as error:
            raise ImageError(with_name(error, str(path), path)) from error
        array = pixels.expand(3, -1, -1).permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
        images.append(Image.fromarray(np.ascontiguousarray(array)))
    return images


def _candidate(
    options: argparse.Namespace,
    model: str,
    runtime: str,
    name: str,
    images: list[Image.Image] | None,
    notes: list[str],
) -> Candidate:
    """Opens a model in a runtime.

    Raises:
        ValueError: it cannot be opened, or not with the requested options.
    """
    predictor = open_at_size(model, runtime, options.device, options.size)
    network = predictor.network
    size = own_size(network.processor)
    if (channels := network.processor.num_channels) != RGB:
        raise ModelError(f"{model} takes {channels} channels, but only models of RGB images are benchmarked.")
    if images is None:
        most = max(options.batch_sizes or [network.batch or max(BATCH_SIZES)])
        contender = Contender(predictor, generated_pictures(size, most), options.subtask)
        pictures = f"{most} generated images of {size[0]}x{size[1]}, which are not resized"
    else:
        contender = Contender(predictor, images, options.subtask)
        sides = sorted({f"{image.height}x{image.width}" for image in images})
        sizes = sides[0] if len(sides) == 1 else f"{len(sides)} sizes"
        pictures = f"{len(images)} {'image' if len(images) == 1 else 'images'} of {sizes}"
    assert contender.subtask is not None
    metric = _metric(options, model, runtime, contender, notes)
    return Candidate(model, runtime, name, contender, _batch_sizes(options, contender, notes), metric, pictures)


def _batch_sizes(options: argparse.Namespace, contender: Contender, notes: list[str]) -> tuple[int, ...]:
    """The requested batch sizes, or those of the default ones that the network accepts.

    Raises:
        PredictorError: it does not accept a requested batch size.
    """
    network = contender.predictor.network
    if options.batch_sizes is not None:
        for batch_size in options.batch_sizes:
            contender.check_batch(batch_size)
        return tuple(sorted(set(options.batch_sizes)))
    if network.batch is not None:
        contender.check_batch(network.batch)
        return (network.batch,)
    if len(contender.sizes) > 1:
        notes.append(f"The images have several input sizes at {network.name}, so they are processed one by one.")
        return (1,)
    return tuple(n for n in BATCH_SIZES if n <= (network.largest_batch or n))


def _known_metric(name: str, subtask: str, labels: int) -> Metric | None:
    """The known metric of a model, see `known_metric`; None if there is none or the model cannot be found."""
    try:
        folder = resolve(name)
    except ModelError:
        return None
    return known_metric(name, subtask, labels, folder)


def _metric(
    options: argparse.Namespace, model: str, runtime: str, contender: Contender, notes: list[str]
) -> Metric | None:
    """The known quality metric, if the model is benchmarked at the image size that the metric is valid for.

    Raises:
        SettingsError: no metric is known of the model in --metrics-from.
    """
    subtask, labels = str(contender.subtask), contender.predictor.network.config.num_labels
    source, metric = model, _known_metric(model, subtask, labels)
    if metric is None and options.metrics_from is not None:
        source, metric = options.metrics_from, _known_metric(options.metrics_from, subtask, labels)
        if metric is None:
            raise SettingsError(
                f"{source} has no known metric for {subtask} segmentation into {labels} classes: name "
                "another model with --metrics-from, or leave it out."
            )
    if metric is None:
        return None
    # A card beside weights is of these, and else of the export.
    is_own = source == model and (runtime == "torch" or not has_weights(Path(model)))
    precision = None if is_own else _precision(Path(model), runtime)
    if precision == "int8":
        what = f"the export of {model}" if source == model else model
        notes.append(f"The metric of {source} is left out for {what}, which is quantized and so has another.")
        return None
    valid, used = (_resizing(one) for one in (open_settings(source)[1], contender.predictor.network.processor))
    if used != valid:
        what = f"{model}'s metric" if source == model else f"The metric of {source} for {model}"
        notes.append(f"{what} is left out: it is valid for images {valid}, and here they are {used}.")
        return None
    if precision not in (None, "fp32"):
        what = f"its export for {runtime}" if source == model else model
        notes.append(f"The metric of {source} is that of float32, and {what} computes in {precision}.")
    return metric


def _precision(folder: Path, runtime: str) -> str | None:
    """The precision of an export, as far as its description says it; None for an ONNX graph that is not quantized."""
    if (folder / QUANTIZATION).is_file():
        return "int8"
    described = DESCRIPTIONS.get(runtime, formats.DESCRIPTION if RUNTIMES[runtime].is_format else None)
    return None if described is None else str(read_object(folder / described).get("precision"))


def _resizing(processor: FaiM2FImageProcessor) -> str:
    """How an image processor resizes images, in words."""
    settings: dict[str, Any] = processor.to_dict()
    if not settings["do_resize"]:
        return "that are not resized"
    size: dict[str, int | None] = settings["size"]
    if "height" in size:
        return f"resized to {size['height']}x{size['width']}"
    words = f"resized to a shorter side of {size['shortest_edge']}"
    words += f" and a longer of at most {size['longest_edge']}" if size.get("longest_edge") else ""
    return words + (f", in multiples of {settings['size_divisor']}" if settings["size_divisor"] else "")
