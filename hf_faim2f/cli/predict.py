"""`faim2f predict`: segments images and video, and writes JSON, label maps and overlays.

`runtime.prediction_files` describes the files and their names. Outputs keep the images' subfolders below a given
folder, or from the first wildcard of a pattern on. `cli.predict_video` predicts video. With `--ray`, `cli.predict_ray`
predicts images and writes Parquet.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.annotations import FORMS
from ..errors import DatasetError, ImageError, PredictorError, SettingsError
from ..files import check_empty_folder, printable
from ..runtime.backends import BATCH_SIZE, usual_batch_size
from ..runtime.large_images import check_grid, more_on_large
from ..runtime.precision import PICTURES
from ..runtime.prediction import PANOPTIC_THRESHOLD, Prediction, usual_threshold
from ..runtime.prediction_files import (
    ANNOTATIONS,
    LEFT_OUT,
    PredictionWriter,
    check_replaced,
    other_predictions,
    output_names,
    write_inside,
)
from ..runtime.predictor import RUNTIMES, Predictor
from ..runtime.tiles import LEAST_WINDOW
from ..runtime.video import FILM_SUFFIXES, is_live
from .output import (
    MISTAKES,
    emit_predicted,
    interrupted,
    mistake,
    no_bars,
    one_document,
    out_of_memory,
    require_packages,
    say,
    say_skipped,
    use_weights_url,
)
from .parser import MODEL_HELP, OneSentenceParser
from .predict_tiles import TileRun, check_tiles, predict_tiles
from .predict_video import FilmRun, check_settings, check_subtask, find_sources, live_file, predict_films

PROGRAM = "faim2f predict"
DESCRIPTION = "Segments images and video; writes JSON, label maps and overlays."
EXAMPLES = (
    ("A folder with its subfolders, and a pattern", "my-model photos 'more/**/*.jpg' --out predictions"),
    ("In ONNX Runtime, without overlays, for a program", "my-onnx photos --runtime onnxruntime --no-overlays --json "
     "--out predictions"),
    ("With labels to correct in CVAT or Label Studio", "my-model photos --annotations coco --out predictions"),
    ("A video, with an id for each object", "my-model clip.mp4 --track --out predictions"),
    ("An image of any size, in tiles", "my-model map.tif --tiles 1024 --overlap 0.2 --out predictions"),
    ("Rows of datasets, to Parquet, with Ray workers on this machine", "my-model rows.parquet --ray local --out bulk"),
)  # fmt: skip
SUMMARY = {
    "out": "the folder that was written",
    "images": "number of requested images and videos",
    "written": "number of those that were predicted",
    "left_out": "why the others were skipped, or not read to their end, one sentence each",
}
OVERLAP = 0.2
SUBTASKS = ("semantic", "instance", "panoptic")


@dataclass
class PredictRun:
    """A request with checked arguments; nothing is written yet."""

    options: argparse.Namespace
    predictor: Predictor
    images: list[Path]
    names: list[Path]
    stream: Iterator[tuple[int, Prediction | ImageError]]
    films: list[str]
    film_names: list[Path]
    film_run: FilmRun
    problems: dict[int, str] = field(default_factory=dict)  # why images are skipped, by their indices
    film_problems: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        """A sentence for each image that was skipped, and each video that was not read to its end, up to now."""
        return [problem for _, problem in sorted(self.problems.items())] + self.film_problems

    def writer(self, after_each: Callable[[], object] = lambda: None) -> PredictionWriter:
        """The writer of this run's files."""
        options = self.options
        return PredictionWriter(
            options.out, self.images, self.names, self.film_run.about,
            overlays=options.overlays, annotations=options.annotations,
            labels=list(self.predictor.network.config.id2label.values()), after_each=after_each,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0, 1 if an image was skipped, or 2 after one sentence on standard error."""
    options = parse(build_parser(program), arguments)
    with one_document(options.json) as emit:
        return _run(options, program, emit)


def _run(options: argparse.Namespace, program: str, emit: Callable[[Any], None]) -> int:
    try:
        use_weights_url(options.weights_url, options.model)
    except MISTAKES as error:
        return mistake(program, error)
    if options.ray is not None:
        try:
            require_packages(("ray.data", "datasets"), "ray")
        except ImportError as error:
            return mistake(program, error)
        from .predict_ray import run  # imports Ray, which only --ray needs

        return run(options, program, emit)
    try:
        prepared = prepare(options)
    except MISTAKES as error:
        return mistake(program, error)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / LEFT_OUT).unlink(missing_ok=True)  # that of an earlier run
        if prepared.images:
            (predict if options.tiles is None else predict_large)(prepared)
        written = len(prepared.images) - len(prepared.problems)
        if prepared.films:
            written += predict_films(prepared.film_run, prepared.films, prepared.film_names, prepared.film_problems)
        _finish(prepared, written)
    except (OSError, PredictorError, DatasetError) as error:  # such as a full disk, or a GPU that fails
        return mistake(program, error, everywhere=True)
    except torch.OutOfMemoryError:
        network = prepared.predictor.network
        return out_of_memory(program, options.batch_size or network.batch or network.usual_batch)
    except KeyboardInterrupt:
        with suppress(OSError):
            _list_left_out(prepared)
        return interrupted(program, f"the files in {options.out} are complete.")
    return emit_predicted(emit, options.out, len(prepared.images) + len(prepared.films), prepared.left_out, written)


def build_parser(program: str = PROGRAM) -> OneSentenceParser:
    """Builds the command's parser; call `parse` to use it."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=SUMMARY)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or an export's folder")
    images = "files, folders (searched recursively) and patterns such as 'photos/**/*.jpg'; also videos, stream URLs "
    images += "such as rtsp://HOST/PATH, and camera indices; with --ray also datasets: Parquet files, folders that "
    images += "`datasets` saved, Hub ids"
    parser.add_argument("images", metavar="IMAGES", nargs="+", help=images)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="the folder to write: new or empty; with --ray also that of an earlier run to continue",
    )
    overwrite = "write into a folder that is not empty; a new prediction replaces the earlier one of the same name, "
    overwrite += "also removing files of it that are not written again"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    parser.add_argument("--runtime", default="torch", choices=tuple(RUNTIMES), help="runtime (default: torch)")
    parser.add_argument("--subtask", choices=SUBTASKS, help="kind of segmentation (default: the model's own)")
    threshold = f"lowest score of a segment, 0 to 1 (default: the model's for instances, {PANOPTIC_THRESHOLD} for "
    threshold += "panoptic)"
    parser.add_argument("--threshold", type=float, metavar="X", help=threshold)
    batch = f"most images (of one size) in a batch (default: 1 on a CPU, {BATCH_SIZE} on a GPU, or the graph's own)"
    parser.add_argument("--batch-size", type=int, metavar="N", help=batch)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    precision = "precision of the torch network (default: fp32); bf16 is faster on devices with support; auto chooses "
    precision += f"bf16 there if the first {PICTURES} images get the same predictions in both"
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "auto"), help=precision)
    compile_text = "compile the torch network first, which takes a minute or more the first time (default: no)"
    parser.add_argument("--compile", action="store_true", help=compile_text)
    overlays = "also write each image with its segments drawn over it (default: yes)"
    parser.add_argument("--overlays", action=argparse.BooleanOptionalAction, help=overlays)
    annotations = "also copy the images to OUT/annotations, with the segments as labels to correct in an annotation "
    annotations += "tool (default: no)"
    parser.add_argument("--annotations", choices=FORMS, help=annotations)
    tiles = "predict each image in overlapping square tiles of N pixels, and merge the results; TIFF files too "
    tiles += "large for Pillow are read in windows (default: whole images)"
    parser.add_argument("--tiles", type=int, metavar="N", help=tiles)
    overlap = f"with --tiles: fraction of its side by which a tile overlaps the next, 0 to 0.5 (default: {OVERLAP})"
    parser.add_argument("--overlap", type=float, metavar="X", help=overlap)
    track = "in video: give each object an id and a color of its own for as long as it is visible"
    parser.add_argument("--track", action="store_true", help=track)
    every = "in video: predict and write only every Nth frame (default: 1)"
    parser.add_argument("--every", type=int, default=1, metavar="N", help=every)
    ray = "write Parquet, one row per image, with Ray workers: `local` for this machine, a cluster's HOST:PORT, or "
    ray += "`auto` (default: without Ray)"
    parser.add_argument("--ray", metavar="ADDRESS", help=ray)
    workers = "with --ray: maximum number of workers (default: one per GPU, or per two CPU cores)"
    parser.add_argument("--workers", type=int, metavar="N", help=workers)
    parser.add_argument(
        "--part-size", type=int, metavar="N", help="with --ray: images in each Parquet file (default: 256)"
    )
    column = "with --ray: the dataset's column of images (default: the only one with images)"
    parser.add_argument("--column", metavar="NAME", help=column)
    parser.add_argument("--split", metavar="NAME", help="with --ray: only this split of a dataset (default: all)")
    parser.add_weights_url()
    parser.add_json()
    return parser


def parse(parser: OneSentenceParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments. Unlike argparse alone, it accepts images both before and after the flags."""
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest):
        parser.parse_args(arguments)  # reports the unknown flag
    options.images += rest
    return options


def prepare(options: argparse.Namespace) -> PredictRun:
    """Checks the arguments, finds the images and loads the model.

    Raises:
        ValueError, OSError, ImportError: invalid arguments or unusable input; one sentence.
    """
    for name in ("workers", "part_size", "column", "split"):
        if getattr(options, name) is not None:
            raise SettingsError(f"--{name.replace('_', '-')} requires --ray: leave it out, or pass --ray local.")
    options.overlays = options.overlays is not False
    if options.annotations is not None and options.overwrite and (options.out / ANNOTATIONS).exists():
        raise SettingsError(
            f"{options.out / ANNOTATIONS} exists already: remove it, or choose another folder for --out."
        )
    if not (options.overwrite and options.out.is_dir()):
        check_empty_folder(options.out, SettingsError, ", or pass --overwrite")
    if options.overlap is not None and options.tiles is None:
        raise SettingsError("--overlap requires --tiles: leave it out, or pass --tiles 1024.")
    options.overlap = OVERLAP if options.overlap is None else options.overlap
    if options.tiles is not None:
        check_grid(options.tiles, options.overlap, LEAST_WINDOW)
        if options.annotations is not None:
            raise SettingsError("--annotations cannot be combined with --tiles: leave one of them out.")
    if options.every < 1:
        raise SettingsError(f"--every must be at least 1, not {options.every}.")
    live = list(dict.fromkeys(word for word in options.images if is_live(word)))
    sources = find_sources([word for word in options.images if word not in live], options.out)
    found = [one for one in sources if one.path.suffix.lower() not in FILM_SUFFIXES]
    named = [one for one in sources if one.path.suffix.lower() in FILM_SUFFIXES]
    films = [*live, *(str(one.path) for one in named)]
    if films and options.tiles is not None:
        raise SettingsError("--tiles is for images, but a video is named: leave one of them out.")
    if films:
        check_settings(options)
    elif options.track or options.every > 1:
        flag = "--track" if options.track else "--every"
        raise SettingsError(f"{flag} is for video, but no video is named: leave it out.")
    images = [one.path for one in found]
    if options.precision == "auto" and (options.tiles is not None or not images):
        what = "whole images, which --tiles does not read" if images else "images, but only videos are named"
        raise SettingsError(f"--precision auto compares precisions on {what}: choose fp32 or bf16.")
    all_names = output_names([*found, *map(live_file, live), *named])
    names = all_names[: len(found)]
    if options.annotations is not None and any(name.parts[0].casefold() == ANNOTATIONS for name in names):
        raise SettingsError(f"The images are in a folder called {ANNOTATIONS}, which --annotations writes: rename it.")
    if options.overwrite:
        check_replaced(options.out, all_names)
    predictor = Predictor.from_pretrained(
        options.model,
        options.runtime,
        options.device,
        options.precision,
        compile=options.compile,
        calibration=images[:PICTURES] if options.precision == "auto" else None,
    )
    if predictor.precision_choice is not None:
        say(f"Precision {predictor.precision_choice}")
    batch_size = options.batch_size
    if batch_size is None:
        batch_size = usual_batch_size(predictor.network)
    # `stream` checks the request now, and runs nothing before the first prediction is requested.
    stream = predictor.stream(images, options.subtask, options.threshold, batch_size)
    check_subtask(predictor, options)
    if options.tiles is not None:
        check_tiles(predictor)
    about = {
        "model": printable(options.model),
        "runtime": options.runtime,
        "precision": _precision(options, predictor),
        "threshold": _threshold(options, predictor),
    }
    film_run = FilmRun(options, predictor, batch_size, about)
    return PredictRun(options, predictor, images, names, stream, films, all_names[len(found) :], film_run)


def _precision(options: argparse.Namespace, predictor: Predictor) -> str | None:
    """The precision of the torch network; None in other runtimes, whose graphs have one of their own."""
    if options.runtime != "torch":
        return None
    choice = predictor.precision_choice
    return options.precision or "fp32" if choice is None else choice.precision


def _threshold(options: argparse.Namespace, predictor: Predictor) -> float | None:
    """The threshold that applies; None for semantic predictions, which have no scores."""
    subtask = options.subtask or predictor.subtasks[0]
    if subtask == "semantic" or options.threshold is not None:
        return options.threshold
    return usual_threshold(predictor.network, subtask)


def predict(prepared: PredictRun) -> None:
    """Predicts and writes all images.

    Raises:
        OSError: something cannot be written.
    """
    say(f"{len(prepared.images)} {'image' if len(prepared.images) == 1 else 'images'} to predict.")
    with (
        tqdm(total=len(prepared.images), unit="image", disable=no_bars()) as bar,
        prepared.writer(bar.update) as writer,
    ):
        for index, prediction in prepared.stream:
            if isinstance(prediction, ImageError):
                text = printable(prediction)
                more = more_on_large(text)
                prepared.problems[index] = f"{text.rstrip('.')}{more}." if more else text
                bar.update()
            else:
                writer.put(index, prediction)


def predict_large(prepared: PredictRun) -> None:
    """Predicts and writes all images tile by tile.

    Raises:
        OSError: something cannot be written.
    """
    options, about = prepared.options, prepared.film_run.about
    say(f"{len(prepared.images)} {'image' if len(prepared.images) == 1 else 'images'} to predict.")
    run = TileRun(
        prepared.predictor, options.out, options.tiles, options.overlap, options.subtask, options.threshold,
        prepared.film_run.batch_size, options.overlays, about,
    )  # fmt: skip
    with tqdm(total=0, unit="tile", disable=no_bars()) as bar:

        def progress(count: int) -> Callable[[], object]:
            bar.total += count
            return bar.update

        for index, (source, name) in enumerate(zip(prepared.images, prepared.names, strict=True)):
            problem = predict_tiles(run, source, name, progress)
            if problem is not None:
                prepared.problems[index] = problem


def _list_left_out(prepared: PredictRun) -> None:
    """Lists the skipped images and videos on standard output and in a file."""
    out: Path = prepared.options.out
    if prepared.left_out:
        say_skipped(prepared.left_out, "image" if not prepared.films else "file")
        write_inside(out, out / LEFT_OUT, "".join(f"{problem}\n" for problem in prepared.left_out).encode())


def _finish(prepared: PredictRun, written: int) -> None:
    """Says what was skipped and written, and which predictions of earlier runs stay."""
    _list_left_out(prepared)
    out: Path = prepared.options.out
    say(f"Written: {written} of {len(prepared.images) + len(prepared.films)} in {out}.")
    names = [*prepared.names, *prepared.film_names]
    labels, are_own = out / ANNOTATIONS, any(name.parts[0].casefold() == ANNOTATIONS for name in names)
    if prepared.options.overwrite and prepared.options.annotations is None and labels.is_dir() and not are_own:
        say(f"{labels} has the labels of an earlier run, not of these predictions: remove it.")
    if prepared.options.overwrite and (others := other_predictions(out, names)):
        say(f"From earlier runs, {len(others)} under other names stay, such as {printable(others[0])}.")
