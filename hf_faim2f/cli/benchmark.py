"""`faim2f benchmark`: how long models take, in which steps, and with how much memory.

The folder of `--out` gets `results.json`, `table.md` and `plot.png`, all or none. What is timed is what
`faim2f predict` runs, one step after the other; see `runtime/latency.py` and `runtime/peak_memory.py` for what each
figure is.
"""

import argparse
import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..benchmarking.latency import (
    END_TO_END,
    STEPS,
    Contender,
    Latency,
    describe_machine,
    measure_in_turn,
    open_at_size,
    own_size,
)
from ..benchmarking.memory import PeakMemory, measure_memory
from ..benchmarking.plot import draw
from ..errors import ImageError, PredictorError
from ..hub.results import Metric, known_metric
from ..model.image_loading_faim2f import load_images
from ..runtime.predictor import RUNTIMES, Predictor
from ..zoo import open_settings
from .output import DONE, MISTAKES, interrupted, mistake, no_bars, one_document, require_packages, say
from .parser import OneSentenceParser
from .predict import SUBTASKS, find_images

PROGRAM = "faim2f benchmark"
DESCRIPTION = "Measures latency by steps, throughput and peak memory of models; writes JSON, a table and a plot."
EXAMPLES = (
    ("A model in all runtimes that it has files for, on generated pictures", "my-model my-onnx --out figures"),
    (
        "One runtime and thread, batches of 1, on photos",
        "my-model --runtime torch --images photos --batch-sizes 1 --threads 1 --device cpu --out figures",
    ),
)
DOCUMENT = {
    "out": "the folder that was written",
    "machine": "processor, GPUs, versions, date and load",
    "runs, warm_up": "batches that count, and those before them",
    "device_asked_for": "--device, or null",
    "notes": "what was left out of what was asked, and why",
    "explained": "what each figure is",
    "results": "a model in a runtime each: name, model, runtime, subtask, metric, memory in bytes, and of each batch "
    "size seconds (median, p99, all) by steps, images_per_second and peak_memory_bytes",
}
RESULTS, TABLE, PLOT = "results.json", "table.md", "plot.png"
# What a folder has for each runtime that is not torch.
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.engine"}
BATCH_SIZES = (1, 4, 8)
RUNS, WARM_UP = 30, 3
# Decoded images are held in memory, and a few tell as much as many.
MOST_IMAGES = 32
# Cells along the sides of the patterns that generated pictures are mixed of.
CELLS = (3, 8, 40)
MEGABYTE = 1e6
RUNTIME_FOLDER = Predictor.__module__.rpartition(".")[0]
EXPLAINED = {
    "preprocess": "from decoded images in memory to the network's batch on the processor",
    "network": "from that batch to the outputs; by CUDA events where they are on a GPU, else by the clock",
    "postprocess": "from the outputs to label maps and segments at the images' own sizes, on the processor",
    "end_to_end": "the clock's time for the three steps, one after the other in one thread",
    "seconds": "of a batch; p99 is the time that 99 of 100 runs took at most, of fewer than 100 runs the longest",
    "images_per_second": "all images over the time of all runs",
    "order": "in turn, one run of each model, runtime and batch size after the other, in one process",
}


@dataclass
class Candidate:
    """A model in a runtime, and what is measured of it."""

    model: str
    runtime: str
    name: str
    contender: Contender
    batch_sizes: tuple[int, ...]
    metric: Metric | None
    pictures: str
    latencies: list[Latency] = field(default_factory=list)
    memory: PeakMemory | None = None


@dataclass
class Prepared:
    """A benchmark of which everything that a person can get wrong has been checked; nothing is written yet."""

    options: argparse.Namespace
    candidates: list[Candidate]
    notes: list[str]
    machine: dict[str, Any]


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; 0 for success, 2 for a mistake in what was asked, told in one sentence."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as tell:
        try:
            try:
                prepared = prepare(options)
            except MISTAKES as error:
                return mistake(program, error)
            try:
                measure(prepared)
                tell({"out": str(options.out), "notes": prepared.notes, **write(prepared)})
            except (OSError, PredictorError) as error:
                return mistake(program, error, everywhere=True)
        except KeyboardInterrupt:
            return interrupted(program, "nothing was written.")
    return DONE


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=DOCUMENT)
    models = "folders or Hub ids of models, and folders of `faim2f export`"
    parser.add_argument("models", metavar="MODEL", nargs="+", help=models)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write: new, or empty")
    runtime = "what runs them: those of these for which a model's folder has files (default: all of them)"
    parser.add_argument("--runtime", nargs="+", choices=tuple(RUNTIMES), help=runtime)
    images = f"files, folders and patterns; the first {MOST_IMAGES} are used (default: generated pictures of the "
    images += "size at which the network sees them, so that nothing is resized)"
    parser.add_argument("--images", nargs="+", metavar="IMAGES", help=images)
    size = "pixels to which images are resized for the network (default: as the model's processor does)"
    parser.add_argument("--size", type=_size, metavar="HxW", help=size)
    parser.add_argument("--subtask", choices=SUBTASKS, help="what is predicted (default: as each was trained)")
    sizes = f"images at once (default: {' '.join(map(str, BATCH_SIZES))}, or what the graph takes)"
    parser.add_argument("--batch-sizes", type=_count, nargs="+", metavar="N", help=sizes)
    runs = f"batches that count (default: {RUNS})"
    parser.add_argument("--runs", type=_count, default=RUNS, metavar="N", help=runs)
    warm_up = f"batches before them that do not (default: {WARM_UP})"
    parser.add_argument("--warm-up", type=_count, default=WARM_UP, metavar="N", help=warm_up)
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="threads of the processor (default: as torch has it)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    metrics = "a model whose card's metric stands for those that have none, which are exports of it (default: none)"
    parser.add_argument("--metrics-from", metavar="MODEL", help=metrics)
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


def prepare(options: argparse.Namespace) -> Prepared:
    """Checks what was asked, loads the models, and prepares each image once.

    Raises:
        ValueError, OSError, ImportError: a person's mistake, in one sentence.
    """
    _check_out(options.out)
    require_packages(("matplotlib",), "train")
    twice = next((name for name, count in Counter(map(os.path.normpath, options.models)).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice: name each model once.")
    notes: list[str] = []
    images = None if options.images is None else _read_images(options.images, options.out, notes)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pairs = [(model, runtime) for model in options.models for runtime in runtimes_of(model, options.runtime)]
    names = short_names(options.models)
    candidates = [_candidate(options, model, runtime, names[model], images, notes) for model, runtime in pairs]
    unused = [runtime for runtime in options.runtime or () if runtime not in {one.runtime for one in candidates}]
    notes += [f"None of the models has files for {runtime}." for runtime in unused]
    return Prepared(options, candidates, notes, describe_machine())


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another folder for --out.")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder for --out.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{above} is no folder that can be written: choose another place for --out.")


def runtimes_of(model: str, asked: Sequence[str] | None) -> list[str]:
    """Those of the runtimes that a model's folder has files for.

    Where it has none for any that was asked for, the first of those, which says what it misses.
    """
    folder = Path(model)
    able = [runtime for runtime, file in FILES.items() if (folder / file).is_file()]
    if not able or any(folder.glob("*.safetensors*")):
        able.insert(0, "torch")
    wanted = list(dict.fromkeys(asked or RUNTIMES))
    return [runtime for runtime in wanted if runtime in able] or wanted[:1]


def short_names(models: Sequence[str]) -> dict[str, str]:
    """For each model as many of the last parts of its path as tell it from the others."""
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


def _read_images(words: Sequence[str], out: Path, notes: list[str]) -> list[Image.Image]:
    """The images, decoded, upright and RGB.

    Raises:
        ValueError: there is none, or one cannot be read.
    """
    paths = [found.path for found in find_images(words, out)]
    if len(paths) > MOST_IMAGES:
        notes.append(f"The first {MOST_IMAGES} of {len(paths)} images are used.")
    images = []
    for path in paths[:MOST_IMAGES]:
        try:
            pixels = next(load_images([path], do_rescale=True))
        except ValueError as error:
            text = str(error).replace(f"image 0 ({path})", str(path), 1).replace("image 0", str(path), 1)
            raise ImageError(text) from error
        array = pixels.expand(3, -1, -1).permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
        images.append(Image.fromarray(np.ascontiguousarray(array)))
    return images


def generated_pictures(size: tuple[int, int], count: int) -> list[Image.Image]:
    """Pictures (height, width) of smooth colored patterns, large and small; the same ones every time."""
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


def _candidate(
    options: argparse.Namespace,
    model: str,
    runtime: str,
    name: str,
    images: list[Image.Image] | None,
    notes: list[str],
) -> Candidate:
    """A model, opened and checked.

    Raises:
        ValueError: it cannot be opened, or does not do what was asked.
    """
    predictor = open_at_size(model, runtime, options.device, options.size)
    network = predictor.network
    size = own_size(network.processor)
    if images is None:
        most = max(options.batch_sizes or [network.batch or max(BATCH_SIZES)])
        contender = Contender(predictor, generated_pictures(size, most), options.subtask)
        pictures = f"{most} generated pictures of {size[0]}x{size[1]}, which are not resized"
    else:
        contender = Contender(predictor, images, options.subtask)
        sides = sorted({f"{image.height}x{image.width}" for image in images})
        told = sides[0] if len(sides) == 1 else f"{len(sides)} sizes"
        pictures = f"{len(images)} {'image' if len(images) == 1 else 'images'} of {told}"
    assert contender.subtask is not None
    metric = _metric(options, model, contender, notes)
    return Candidate(model, runtime, name, contender, _batch_sizes(options, contender, notes), metric, pictures)


def _batch_sizes(options: argparse.Namespace, contender: Contender, notes: list[str]) -> tuple[int, ...]:
    """Those that were asked for, or what the network takes of the usual ones.

    Raises:
        PredictorError: it does not take one that was asked for.
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
        notes.append(f"The images have several sizes at the network of {network.name}: they go through it one by one.")
        return (1,)
    return tuple(n for n in BATCH_SIZES if n <= (network.largest_batch or n))


def _metric(options: argparse.Namespace, model: str, contender: Contender, notes: list[str]) -> Metric | None:
    """What is known of the model, at the size at which it is known.

    Raises:
        ValueError: the model that others' metrics shall be from has none.
    """
    subtask, labels = str(contender.subtask), contender.predictor.network.config.num_labels
    metric = known_metric(model, subtask, labels)
    if metric is None and options.metrics_from is not None:
        metric = known_metric(options.metrics_from, subtask, labels)
        if metric is None:
            raise ValueError(
                f"No metric of {subtask} segmentation into {labels} classes is known of {options.metrics_from}: name "
                "another model with --metrics-from, or none."
            )
    height, width = own_size(open_settings(model)[1])
    if metric is not None and options.size not in (None, (height, width)):
        notes.append(f"{model} is not measured at its own {height}x{width}, for which its metric is: it gets none.")
        return None
    return metric


def measure(prepared: Prepared) -> None:
    """Times every candidate, in turn; then the memory of each, alone.

    Raises:
        PredictorError: a network fails.
    """
    options, candidates = prepared.options, prepared.candidates
    for note in prepared.notes:
        say(note)
    for one in candidates:
        sizes = " ".join(map(str, one.batch_sizes))
        say(f"{one.model} in {one.runtime}: {one.contender.subtask}, {one.pictures}, batches of {sizes}.")
    owners = [one for one in candidates for _ in one.batch_sizes]
    jobs = [(one.contender, batch_size) for one in candidates for batch_size in one.batch_sizes]
    with tqdm(total=len(jobs) * (options.runs + options.warm_up), unit="run", disable=no_bars()) as bar:
        latencies = measure_in_turn(jobs, options.runs, options.warm_up, after_each=bar.update)
    for one, latency in zip(owners, latencies, strict=True):
        one.latencies.append(latency)
    for one in tqdm(candidates, desc="memory", unit="process", disable=no_bars()):
        one.memory = measure_memory(
            functools.partial(open_at_size, one.model, one.runtime, options.device, options.size),
            one.contender.images,
            one.contender.subtask,
            one.batch_sizes,
            modules=[f"{RUNTIME_FOLDER}.{RUNTIMES[one.runtime].module}"],
            gpu=_gpu(options.device),
            threads=options.threads,
        )


def _gpu(device: str | None) -> str | None:
    """The GPU whose memory is measured: that which was asked for, or the first."""
    if not torch.cuda.is_available() or (device or "cuda").partition(":")[0] != "cuda":
        return None
    return device or "cuda"


def document_of(prepared: Prepared) -> dict[str, Any]:
    """Everything that was measured, and how, as plain data."""
    options = prepared.options
    return {
        "machine": prepared.machine,
        "runs": options.runs,
        "warm_up": options.warm_up,
        "device_asked_for": options.device,
        "explained": EXPLAINED,
        "results": [_result(one) for one in prepared.candidates],
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
    # torch's own count is exact; of other runtimes' memory it knows nothing.
    gpu = (memory.gpu_allocated if one.runtime == "torch" else memory.gpu_taken).get(size)
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
        "gpu_memory_how": None
        if gpu is None
        else "torch.cuda.max_memory_allocated"
        if one.runtime == "torch"
        else "what was no longer free on the GPU",
    }


def table_of(document: dict[str, Any]) -> str:
    """The results as Markdown: a row a batch size of a model in a runtime."""
    has_gpu = any(batch["gpu_memory_bytes"] is not None for one in document["results"] for batch in one["batches"])
    head = ["model", "runtime", "answer", "batch", "input", *STEPS, "end to end", "images/s", "network alone"]
    head += ["peak MB", *(["GPU MB"] if has_gpu else [])]
    rows = []
    for one in document["results"]:
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
    machine, runs = document["machine"], document["runs"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    p99 = "the longest" if runs < 100 else "the time of 99 in 100"
    about = [
        f"{', '.join([*machine['gpus'], machine['processor']])}, {machine['cores']} cores (load {machine['load']}), "
        f"{machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}; {machine['date']}; {versions}.",
        f"Milliseconds a batch: median / p99 of {runs} runs after {document['warm_up']} to warm up; p99 of {runs} runs "
        f"is {p99}. Images are in memory. Peak memory is above what was resident before the model was loaded.",
    ]
    about += [f"{one['name']} in {one['runtime']}: {one['images']}." for one in document["results"]]
    for one in document["results"]:
        metric = one["metric"]
        known = "no metric is known" if metric is None else f"{metric['name']} {metric['value']:.2f} on "
        about.append(f"{one['name']} in {one['runtime']}: {known}")
        if metric is not None:
            about[-1] += f"{metric['dataset']}, {metric['source']}"
    return "\n".join([*lines, "", *about]) + "\n"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / MEGABYTE:.0f}"


def write(prepared: Prepared) -> dict[str, Any]:
    """Writes all three files, or none, and says the table; the content of `results.json`.

    Raises:
        OSError: they cannot be written.
    """
    out: Path = prepared.options.out
    document = document_of(prepared)
    table = table_of(document)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.{os.getpid()}.partial"
    staging.mkdir()
    try:
        (staging / RESULTS).write_text(json.dumps(document, allow_nan=False, indent=1), encoding="utf-8")
        (staging / TABLE).write_text(table, encoding="utf-8")
        draw(document, staging / PLOT)
        if out.is_dir():
            out.rmdir()  # it is empty, or this fails
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"\n{table}\nWritten: {out / RESULTS}, {out / TABLE}, {out / PLOT}.")
    return document
