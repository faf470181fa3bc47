"""`faim2f predict`: segments images and writes JSON, label maps and overlays.

`runtime.prediction_files` describes the files and their names. Outputs keep the subfolders of images below a given
folder, or from the first wildcard of a pattern on. With `--ray`, `cli.predict_ray` does the work and writes Parquet.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.annotations import FORMS
from ..errors import ImageError, PredictorError, SettingsError
from ..files import FoundFile, check_empty_folder, find_files, printable
from ..model.image_loading_faim2f import ARRAY_SUFFIXES, IMAGE_SUFFIXES
from ..runtime.backends import BATCH_SIZE, usual_batch_size
from ..runtime.drawing import supervision
from ..runtime.precision import PICTURES
from ..runtime.prediction import Prediction
from ..runtime.prediction_files import ANNOTATIONS, LEFT_OUT, PredictionWriter, output_names, write_inside
from ..runtime.predictor import RUNTIMES, Predictor
from .output import (
    MISTAKES,
    emit_predicted,
    interrupted,
    mistake,
    no_bars,
    one_document,
    require_packages,
    say,
    say_skipped,
    use_weights_url,
)
from .parser import MODEL_HELP, OneSentenceParser

PROGRAM = "faim2f predict"
DESCRIPTION = "Segments images; writes JSON, label maps and overlays."
EXAMPLES = (
    ("A folder with everything below it, and a pattern", "my-model photos 'more/**/*.jpg' --out predictions"),
    ("In ONNX Runtime, without overlays, for a program", "my-onnx photos --runtime onnxruntime --no-overlays --json "
     "--out predictions"),
    ("With labels to correct in CVAT or Label Studio", "my-model photos --annotations coco --out predictions"),
    ("Rows of datasets, to Parquet, with Ray workers on this machine", "my-model rows.parquet --ray local --out bulk"),
)  # fmt: skip
SUMMARY = {
    "out": "the folder that was written",
    "images": "number of requested images",
    "written": "number of images that were predicted",
    "left_out": "why each of the other images was skipped, one sentence each",
}
SUBTASKS = ("semantic", "instance", "panoptic")


@dataclass
class PredictRun:
    """A request with checked arguments; nothing is written yet."""

    options: argparse.Namespace
    predictor: Predictor
    images: list[Path]
    names: list[Path]
    stream: Iterator[tuple[int, Prediction | ImageError]]

    def writer(self, after_each: Callable[[], object] = lambda: None) -> PredictionWriter:
        """The writer of this run's files."""
        options = self.options
        about = {"model": printable(options.model), "runtime": options.runtime, "threshold": options.threshold}
        return PredictionWriter(
            options.out, self.images, self.names, about, overlays=options.overlays, annotations=options.annotations,
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
        from .predict_ray import run  # Ray is needed for --ray only

        return run(options, program, emit)
    try:
        prepared = prepare(options)
    except MISTAKES as error:
        return mistake(program, error)
    try:
        problems = predict(prepared)
        _finish(prepared, problems)
    except (OSError, PredictorError) as error:  # such as a full disk, or a GPU that fails
        return mistake(program, error, everywhere=True)
    except KeyboardInterrupt:
        return interrupted(program, f"the files in {options.out} are complete.")
    return emit_predicted(emit, options.out, len(prepared.images), problems)


def build_parser(program: str = PROGRAM) -> OneSentenceParser:
    """Builds the command's parser; call `parse` to use it."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=SUMMARY)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or an export's folder")
    images = "files, folders (searched at any depth) and patterns such as 'photos/**/*.jpg'; with --ray also "
    images += "datasets: Parquet files, folders that `datasets` saved, Hub ids"
    parser.add_argument("images", metavar="IMAGES", nargs="+", help=images)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="the folder to write: new or empty; with --ray also that of an earlier run to continue",
    )
    overwrite = "write into a folder that is not empty, and replace existing files"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    parser.add_argument("--runtime", default="torch", choices=tuple(RUNTIMES), help="runtime (default: torch)")
    parser.add_argument("--subtask", choices=SUBTASKS, help="kind of segmentation (default: the model's own)")
    parser.add_argument(
        "--threshold", type=float, metavar="X", help="lowest score of a segment, 0 to 1 (default: the model's)"
    )
    batch = f"most images (of one size) in a batch (default: {BATCH_SIZE}, 1 for torch on a CPU, or the graph's own)"
    parser.add_argument("--batch-size", type=int, metavar="N", help=batch)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    precision = "precision of the torch network (default: fp32); bf16 is faster on devices that support it; auto takes "
    precision += f"bf16 there if the first {PICTURES} images get the same answers in it"
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "auto"), help=precision)
    compile_text = "compile the torch network first, which takes a minute or more the first time (default: no)"
    parser.add_argument("--compile", action="store_true", help=compile_text)
    overlays = "also write each image with its segments drawn over it (default: yes)"
    parser.add_argument("--overlays", action=argparse.BooleanOptionalAction, help=overlays)
    annotations = "also copy the images to OUT/annotations, with the segments as labels to correct in an annotation "
    annotations += "tool (default: no)"
    parser.add_argument("--annotations", choices=FORMS, help=annotations)
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
            raise SettingsError(f"--{name.replace('_', '-')} goes with --ray: leave it out, or pass --ray local.")
    options.overlays = options.overlays is not False
    if options.annotations is not None and options.overwrite and (options.out / ANNOTATIONS).exists():
        raise SettingsError(
            f"{options.out / ANNOTATIONS} exists already: remove it, or choose another folder for --out."
        )
    if not (options.overwrite and options.out.is_dir()):
        check_empty_folder(options.out, SettingsError, ", or pass --overwrite")
    found: list[FoundFile] = find_files(options.images, IMAGE_SUFFIXES, "image", options.out, ARRAY_SUFFIXES)
    images = [one.path for one in found]
    if options.overlays:
        try:
            supervision()
        except ImportError as error:
            raise ImportError(f"{str(error).rstrip('.')}, or pass --no-overlays.") from error
    names = output_names(found)
    if options.annotations is not None and any(name.parts[0].casefold() == ANNOTATIONS for name in names):
        raise SettingsError(f"The images are in a folder called {ANNOTATIONS}, as that of --annotations is: rename it.")
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
    return PredictRun(options, predictor, images, names, stream)


def predict(prepared: PredictRun) -> list[str]:
    """Predicts and writes all images; returns one sentence per skipped image.

    Raises:
        OSError: something cannot be written.
    """
    options = prepared.options
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"{len(prepared.images)} {'image' if len(prepared.images) == 1 else 'images'}, into {options.out}.")
    problems = []
    with (
        tqdm(total=len(prepared.images), unit="image", disable=no_bars()) as bar,
        prepared.writer(bar.update) as writer,
    ):
        for index, prediction in prepared.stream:
            if isinstance(prediction, ImageError):
                problems.append((index, printable(prediction)))
                bar.update()
            else:
                writer.put(index, prediction)
    return [problem for _, problem in sorted(problems)]


def _finish(prepared: PredictRun, problems: list[str]) -> None:
    """Lists the skipped images in a file and on standard output."""
    out: Path = prepared.options.out
    (out / LEFT_OUT).unlink(missing_ok=True)  # that of an earlier run
    if problems:
        write_inside(out, out / LEFT_OUT, "".join(f"{problem}\n" for problem in problems).encode())
        say_skipped(problems)
    say(f"Written: {len(prepared.images) - len(problems)} of {len(prepared.images)} in {out}.")
