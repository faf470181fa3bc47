"""`faim2f predict --ray`: bulk inference on millions of images, written as Parquet by Ray workers.

Images are files, as without Ray, or rows of datasets: Parquet files, folders that `datasets` saved, Hub ids. The folder
`--out` will contain `part-…-of-….parquet` (`distributed.parts` documents the columns) and `_run`, from which the same
command continues after an interruption.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..distributed.parts import Piece, errors_of, escape_path
from ..distributed.plan import OPEN_HERE, ModelFiles, Plan, Settings, begin, check_folder, digest_of, locked, pin_model
from ..distributed.rows import find_rows, names_rows
from ..distributed.workers import check_address, connected, predict_parts
from ..errors import BulkError, SettingsError
from ..files import files_below, write_whole
from ..model.image_loading_faim2f import IMAGE_SUFFIXES
from ..runtime.prediction_files import LEFT_OUT
from ..runtime.predictor import Predictor
from ..runtime.video import names_film
from ..version import __version__
from .output import MISTAKES, emit_predicted, interrupted, mistake, no_bars, say, say_skipped
from .predict_video import find_sources

PART_SIZE = 256
# Maximum number of images in a part, which is kept in memory, and maximum number of parts.
LARGEST_PART, MOST_PARTS = 10_000, 100_000


@dataclass
class RayRun:
    """A request with arguments that are checked as far as possible; nothing is written yet."""

    options: argparse.Namespace
    pieces: list[Piece]
    settings: Settings
    model: ModelFiles


def run(options: argparse.Namespace, program: str, emit: Callable[[Any], None]) -> int:
    """Runs the command and passes its JSON document to `emit`; returns the exit status."""
    try:
        prepared = prepare(options)
        out: Path = options.out
        with locked(out):
            plan = begin(out, prepared.pieces, prepared.settings, prepared.model)
            del prepared  # frees the memory of millions of pieces; the plan stores them
            problems = predict(plan, options)
    except MISTAKES as error:
        return mistake(program, error)
    except KeyboardInterrupt:
        return interrupted(program, f"finished parts in {options.out} stay; the same command continues the run.")
    return emit_predicted(emit, out, plan.images, problems)


def prepare(options: argparse.Namespace) -> RayRun:
    """Checks the arguments, and finds the model and the images.

    Raises:
        ValueError, OSError: invalid arguments or unusable input; one sentence.
    """
    check_address(options.ray)
    if options.overwrite:
        raise SettingsError("--overwrite cannot be combined with --ray, which resumes its runs: choose another folder.")
    if options.annotations is not None:
        raise SettingsError("--annotations cannot be combined with --ray, which writes Parquet: leave it out.")
    if options.overlays:
        raise SettingsError("--overlays cannot be combined with --ray, which writes no overlays: leave it out.")
    if options.precision == "auto" or options.compile:
        flag = "--compile" if options.compile else "--precision auto"
        raise SettingsError(f"{flag} cannot be combined with --ray: leave it out, or pass --precision bf16.")
    if options.tiles is not None or options.overlap is not None:
        raise SettingsError("--tiles cannot be combined with --ray: leave one of them out.")
    films = [word for word in options.images if names_film(word)]
    if films or options.track or options.every != 1:
        raise SettingsError("--ray does not predict video: leave it out.")
    if options.device not in (None, "cpu", "cuda"):
        raise SettingsError(
            f"With --ray, --device is cpu or cuda, because Ray assigns the GPUs: it cannot be {options.device}."
        )
    size = PART_SIZE if options.part_size is None else options.part_size
    if not 1 <= size <= LARGEST_PART:
        raise SettingsError(f"--part-size must be from 1 to {LARGEST_PART}, not {size}.")
    if options.workers is not None and options.workers < 1:
        raise SettingsError(f"--workers must be at least 1, not {options.workers}.")
    check_folder(options.out)
    pieces, digest = find_pieces(options.images, options.out, options.column, options.split)
    count = sum(piece.count for piece in pieces)
    if count > MOST_PARTS * size:
        raise SettingsError(f"{count} images in parts of {size} are too many files: pass --part-size {LARGEST_PART}.")
    model, folder = pin_model(options.model)
    subtask = options.subtask
    if options.runtime in OPEN_HERE:
        predictor = Predictor.from_pretrained(folder, options.runtime, "cpu", options.precision)
        predictor.stream([], subtask, options.threshold, options.batch_size)  # checks the request
        subtask = subtask or predictor.subtasks[0]
    settings = Settings(
        model.digest, options.runtime, options.precision, subtask, options.threshold, digest, size, __version__
    )
    return RayRun(options, pieces, settings, model)


def find_pieces(words: Sequence[str], out: Path, column: str | None, split: str | None) -> tuple[list[Piece], str]:
    """Finds the images that the command line names; returns them with a digest that identifies them.

    Raises:
        ValueError: an argument matches nothing, or both image files and rows.
    """
    of_rows = [word for word in words if names_rows(word, out)]
    of_files = [word for word in words if word not in of_rows]
    for word in of_rows:
        if Path(word).is_dir() and any(files_below(Path(word), IMAGE_SUFFIXES)):
            raise SettingsError(
                f"{escape_path(word)} contains both image files and datasets: pass a folder or pattern for each."
            )
    if not of_rows and (column or split):
        flag = "--column" if column else "--split"
        raise SettingsError(f"{flag} is for datasets, but no dataset is named: leave it out.")
    images = find_sources(of_files, out, takes_films=False)
    pieces = [Piece(str(one.path.absolute()), escape_path(str(one.path))) for one in images]
    stamps: Iterable[str] = (_stamp(one.path) for one in images)
    if of_rows:
        rows = find_rows(of_rows, column, split, out)
        pieces += rows.pieces
        stamps = chain(stamps, rows.stamps)
    return pieces, digest_of(pieces, stamps)


def _stamp(path: Path) -> str:
    """The size and modification time of a file; "" if there is none, such as behind a broken link."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def predict(plan: Plan, options: argparse.Namespace) -> list[str]:
    """Predicts the missing parts; returns one sentence per skipped image of the whole run.

    Raises:
        BulkError: not all parts could be predicted.
    """
    left = [number for number in range(plan.parts) if plan.errors_in(number) is None]
    before = plan.images - sum(piece.count for number in left for piece in plan.pieces(number))
    say(f"{_images(plan.images)} in {plan.parts} {'part' if plan.parts == 1 else 'parts'}, into {options.out}.")
    if before:
        say(f"{_images(before)} are finished from an earlier run.")
    if left:
        with connected(options.ray), tqdm(total=plan.images, initial=before, unit="image", disable=no_bars()) as bar:
            for done in predict_parts(plan, left, options.device, options.batch_size, options.workers):
                bar.update(done.images)
    return _finish(plan, options)


def _finish(plan: Plan, options: argparse.Namespace) -> list[str]:
    """Collects the errors of all parts, and lists them in a file and on standard output."""
    problems = []
    for number in range(plan.parts):
        errors = plan.errors_in(number)
        if errors is None:
            raise BulkError(f"{plan.part(number)} is missing: run the same command again.")
        if errors:
            problems += errors_of(plan.part(number))
    path = plan.folder / LEFT_OUT
    path.unlink(missing_ok=True)  # that of an earlier run
    if problems:
        content = "".join(f"{problem}\n" for problem in problems).encode()
        write_whole(path, content, beside=plan.unfinished, durable=True)
        say_skipped(problems)
        say(f"All of them: {path}")
    say(f"Written: {plan.images - len(problems)} of {plan.images} in {options.out}.")
    return problems


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
