"""`faim2f predict --ray`: images by the million, as Parquet, by workers of Ray on this machine or on a cluster.

Images are files, as without Ray, or rows of data sets: Parquet files, folders that `datasets` saved, names of the Hub.
The folder of `--out` gets `part-…-of-….parquet` (`distributed.parts` has the columns) and `_run`, by which the same
command goes on with a run that was interrupted, in whatever way.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..distributed.driver import check_address, connected, predict_parts
from ..distributed.parts import errors_of
from ..distributed.pieces import Piece, printable
from ..distributed.plan import ModelFiles, Plan, Settings, begin, check_folder, digest_of, locked, pin_model
from ..distributed.rows import find_rows, names_rows
from ..errors import BulkError
from ..files import write_whole
from ..runtime.predictor import Predictor
from ..version import __version__
from .output import DONE, MISTAKES, SOME_LEFT_OUT, interrupted, mistake, no_bars, say, say_skipped
from .predict import LEFT_OUT, document_of, find_images, images_below

PART_SIZE = 256
# A part is in memory as a whole; and so many files are still good to handle.
LARGEST_PART, MOST_PARTS = 10_000, 100_000
# Runtimes that open where there is no GPU, so that what a person got wrong is known before anything begins.
OPEN_HERE = ("torch", "onnxruntime")


@dataclass
class Prepared:
    """What is to be done, of which all that can be has been checked; nothing is written yet."""

    options: argparse.Namespace
    pieces: list[Piece]
    settings: Settings
    model: ModelFiles


def run(options: argparse.Namespace, program: str, tell: Callable[[Any], None]) -> int:
    """Runs the command, and gives `tell` its document; the exit status."""
    try:
        prepared = prepare(options)
        out: Path = options.out
        with locked(out):
            plan = begin(out, prepared.pieces, prepared.settings, prepared.model)
            del prepared  # the plan has all of it
            problems = predict(plan, options)
    except MISTAKES as error:
        return mistake(program, error)
    except KeyboardInterrupt:
        return interrupted(program, f"what is finished in {options.out} stays, and the same command goes on.")
    tell(document_of(out, plan.images, problems))
    return SOME_LEFT_OUT if problems else DONE


def prepare(options: argparse.Namespace) -> Prepared:
    """Checks what was asked, and finds the model and the images.

    Raises:
        ValueError, OSError: a person's mistake, in one sentence.
    """
    check_address(options.ray)
    if options.overwrite:
        raise ValueError("--overwrite does not go with --ray, which goes on with its own run: choose another folder.")
    if options.overlays:
        raise ValueError("--overlays does not go with --ray, which writes no pictures: leave it out.")
    if options.device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"With --ray the device is cpu or cuda, and Ray says which GPU: it cannot be {options.device}."
        )
    size = PART_SIZE if options.part_size is None else options.part_size
    if not 1 <= size <= LARGEST_PART:
        raise ValueError(f"--part-size must be from 1 to {LARGEST_PART}, not {size}.")
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {options.workers}.")
    check_folder(options.out)
    pieces, digest = find_pieces(options.images, options.out, options.column, options.split)
    count = sum(piece.count for piece in pieces)
    if count > MOST_PARTS * size:
        raise ValueError(f"{count} images in parts of {size} are too many files: pass --part-size {LARGEST_PART}.")
    model, folder = pin_model(options.model)
    subtask = options.subtask
    if options.runtime in OPEN_HERE:
        predictor = Predictor.from_pretrained(folder, options.runtime, "cpu", options.precision)
        predictor.stream([], subtask, options.threshold, options.batch_size)  # checks the request
        subtask = subtask or predictor.subtasks[0]
    settings = Settings(
        model.digest, options.runtime, options.precision, subtask, options.threshold, digest, size, __version__
    )
    return Prepared(options, pieces, settings, model)


def find_pieces(words: Sequence[str], out: Path, column: str | None, split: str | None) -> tuple[list[Piece], str]:
    """The images that words stand for, and a digest of which they are.

    Raises:
        ValueError: a word stands for nothing, or for both image files and rows.
    """
    of_rows = [word for word in words if names_rows(word)]
    of_files = [word for word in words if word not in of_rows]
    for word in of_rows:
        if Path(word).is_dir() and images_below(Path(word)):
            raise ValueError(
                f"{printable(word)} has both image files and data sets in it: name folders or patterns for each."
            )
    if not of_rows and (column or split):
        flag = "--column" if column else "--split"
        raise ValueError(f"{flag} is for data sets, and none is named: leave it out.")
    images = find_images(of_files, out) if of_files else []
    pieces = [Piece(str(one.path.absolute()), printable(str(one.path))) for one in images]
    stamps: list[str] = []
    if of_rows:
        rows = find_rows(of_rows, column, split)
        pieces += rows.pieces
        stamps = rows.stamps
    return pieces, digest_of(pieces, stamps)


def predict(plan: Plan, options: argparse.Namespace) -> list[str]:
    """Does what is not done; what was wrong with images, of the whole run.

    Raises:
        BulkError: it cannot be done, or not all of it.
    """
    left = [number for number in range(plan.parts) if plan.errors_in(number) is None]
    before = plan.images - sum(piece.count for number in left for piece in plan.pieces(number))
    say(f"{_images(plan.images)} in {plan.parts} {'part' if plan.parts == 1 else 'parts'}, into {options.out}.")
    if before:
        say(f"Of an earlier run {_images(before)} are finished.")
    if left:
        with connected(options.ray), tqdm(total=plan.images, initial=before, unit="image", disable=no_bars()) as bar:
            for done in predict_parts(plan, left, options.device, options.batch_size, options.workers):
                bar.update(done.images)
    return finish(plan, options)


def finish(plan: Plan, options: argparse.Namespace) -> list[str]:
    """Counts what is there, says how it went, and lists what could not be used in a file."""
    problems = []
    for number in range(plan.parts):
        errors = plan.errors_in(number)
        if errors is None:
            raise BulkError(f"{plan.part(number)} is missing: run the same command again.")
        if errors:
            problems += errors_of(plan.part(number))
    path = plan.folder / LEFT_OUT
    path.unlink(missing_ok=True)  # of an earlier run
    if problems:
        content = "".join(f"{problem}\n" for problem in problems).encode()
        write_whole(path, content, beside=plan.unfinished, durable=True)
        say_skipped(problems)
        say(f"All of them: {path}")
    say(f"Written: {plan.images - len(problems)} of {plan.images} in {options.out}.")
    return problems


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
