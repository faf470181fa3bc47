"""`faim2f predict`: what a model sees in images, as JSON, maps and pictures.

For each image `a/photo.jpg` the folder of `--out` gets

- `photo.json`: the image's file and size, upright by its EXIF orientation as everything here, and each segment's
  class, score, box, area and mask (COCO's run lengths);
- `photo.labels.png`: the class of each pixel, and for none the largest value that the file can hold, 255 or 65535;
- `photo.segments.png`, but for semantic predictions: the place of each pixel's segment in the JSON, counted from 1,
  and 0 for none;
- `photo.overlay.jpg`: the segments drawn over the image.

Images of a folder keep the folders that are below it, and those of a pattern the folders from its first star on. Images
whose names would be the same get as many of their folders as tell them apart. Each file appears whole or not at all,
the JSON last. With `--ray` it is `cli.predict_ray` that predicts, and writes Parquet.
"""

import argparse
import glob
import io
import itertools
import json
import os
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ImageError, PredictorError
from ..files import files_below, files_of_pattern, place_of, write_whole
from ..model.image_loading_faim2f import IMAGE_SUFFIXES
from ..runtime.drawing import supervision
from ..runtime.network import BATCH_SIZE, usual_batch_size
from ..runtime.prediction import Prediction
from ..runtime.predictor import RUNTIMES, Predictor, background_threads
from ..version import __version__
from .output import (
    DONE,
    MISTAKES,
    SOME_LEFT_OUT,
    interrupted,
    mistake,
    no_bars,
    one_document,
    require_packages,
    say,
    say_skipped,
)
from .parser import OneSentenceParser

PROGRAM = "faim2f predict"
DESCRIPTION = "Segments images; writes JSON, label maps and pictures."
EXAMPLES = (
    ("A folder with all that is below it, and a pattern", "my-model photos 'more/**/*.jpg' --out predictions"),
    ("In onnxruntime, without pictures, for a program", "my-onnx photos --runtime onnxruntime --no-overlays --json "
     "--out predictions"),
    ("Rows of data sets, as Parquet, by workers of this machine", "my-model rows.parquet --ray local --out bulk"),
)  # fmt: skip
SUMMARY = {
    "out": "the folder that was written",
    "images": "how many were asked for",
    "written": "how many of them have their files",
    "left_out": "why each of the others has none, a sentence each",
}
SUBTASKS = ("semantic", "instance", "panoptic")
DOCUMENT, LABELS, SEGMENTS, OVERLAY = ".json", ".labels.png", ".segments.png", ".overlay.jpg"
LEFT_OUT = "left_out.txt"
# File systems take 255 bytes for a name; what stands behind it and the mark of an unfinished file need some.
LONGEST_NAME = 200
# The longer side of an overlay: names can be read, and JPEG can hold it.
LONGEST_OVERLAY = 2048
QUALITY = 90
# Of PNG: higher levels take much longer, for little.
COMPRESSION = 3
# Of PNG, too: zlib's Z_RLE, which looks for runs alone. Files of such maps get smaller, and in 8 bits are made faster.
RUN_LENGTHS = 3
# Each that draws has every segment's mask at the picture's size.
MOST_WRITERS = 2
# Predictions that wait to be written, and their pixels: one may always wait, however large it is.
MOST_UNWRITTEN = 8
MOST_UNWRITTEN_PIXELS = 2**25


class Found(NamedTuple):
    """An image, and how many of the last parts of its path name it, the file's among them."""

    path: Path
    depth: int


@dataclass
class Prepared:
    """What is to be done, of which everything that a person can get wrong has been checked; nothing is written yet."""

    options: argparse.Namespace
    predictor: Predictor
    images: list[Path]
    names: list[Path]
    stream: Any


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; 0 for success, 1 if some image could not be used, 2 for a mistake, told in one sentence."""
    options = parse(build_parser(program), arguments)
    with one_document(options.json) as tell:
        return _run(options, program, tell)


def _run(options: argparse.Namespace, program: str, tell: Callable[[Any], None]) -> int:
    if options.ray is not None:
        try:
            require_packages(("ray.data", "datasets"), "ray")
        except ImportError as error:
            return mistake(program, error)
        from .predict_ray import run  # only who asks for it needs Ray

        return run(options, program, tell)
    try:
        prepared = prepare(options)
    except MISTAKES as error:
        return mistake(program, error)
    try:
        problems = predict(prepared)
        finish(prepared, problems)
    except (OSError, PredictorError) as error:  # a full disk, a GPU that fails
        return mistake(program, error, everywhere=True)
    except KeyboardInterrupt:
        return interrupted(program, f"what is in {options.out} is whole.")
    tell(document_of(options.out, len(prepared.images), problems))
    return SOME_LEFT_OUT if problems else DONE


def document_of(out: Path, images: int, problems: list[str]) -> dict[str, Any]:
    """What --json prints."""
    return {"out": str(out), "images": images, "written": images - len(problems), "left_out": problems}


def build_parser(program: str = PROGRAM) -> OneSentenceParser:
    """The command's parser; `parse` is how it is used."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=SUMMARY)
    parser.add_argument("model", metavar="MODEL", help="a model's folder or Hub id, or a folder of `faim2f export`")
    images = "files, folders with all that is below them, and patterns such as 'photos/**/*.jpg'; with --ray also "
    images += "data sets: Parquet files, what `datasets` saved, names of the Hub"
    parser.add_argument("images", metavar="IMAGES", nargs="+", help=images)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="the folder to write: new, or empty; with --ray also one of the same run, which goes on",
    )
    overwrite = "write into a folder that has things in it, over files of the same names"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    parser.add_argument("--runtime", default="torch", choices=tuple(RUNTIMES), help="what runs it (default: torch)")
    parser.add_argument("--subtask", choices=SUBTASKS, help="what to predict (default: what the model was trained for)")
    parser.add_argument(
        "--threshold", type=float, metavar="X", help="least score of a segment, 0 to 1 (default: the model's)"
    )
    batch = f"images of one size in a batch (default: {BATCH_SIZE}, 1 for torch on a CPU, or what the graph takes)"
    parser.add_argument("--batch-size", type=int, metavar="N", help=batch)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    precision = "of torch's network (default: fp32); bf16 is faster where the device can"
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help=precision)
    parser.add_argument("--overlays", action=argparse.BooleanOptionalAction, help="draw pictures, too (default: yes)")
    ray = "Parquet of a row an image, by workers of Ray: local for this machine, or a cluster's HOST:PORT, or auto "
    ray += "(default: without Ray)"
    parser.add_argument("--ray", metavar="ADDRESS", help=ray)
    workers = "with --ray: the most workers (default: one a GPU, or one for two cores)"
    parser.add_argument("--workers", type=int, metavar="N", help=workers)
    parser.add_argument(
        "--part-size", type=int, metavar="N", help="with --ray: images of a Parquet file (default: 256)"
    )
    column = "with --ray: a data set's column of images (default: the one that holds some)"
    parser.add_argument("--column", metavar="NAME", help=column)
    parser.add_argument("--split", metavar="NAME", help="with --ray: of a data set only this (default: all)")
    parser.add_json()
    return parser


def parse(parser: OneSentenceParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked. Images may stand on both sides of the flags, which argparse by itself does not take."""
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest):
        parser.parse_args(arguments)  # tells which
    options.images += rest
    return options


def prepare(options: argparse.Namespace) -> Prepared:
    """Checks what was asked, finds the images and loads the model.

    Raises:
        ValueError, OSError, ImportError: a person's mistake, in one sentence.
    """
    for name in ("workers", "part_size", "column", "split"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --ray: leave it out, or pass --ray local.")
    options.overlays = options.overlays is not False
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another folder for --out.")
    if out.is_dir() and any(out.iterdir()) and not options.overwrite:
        raise ValueError(f"{out} is not empty: choose a new folder for --out, or pass --overwrite.")
    found = find_images(options.images, out)
    images = [one.path for one in found]
    if options.overlays:
        try:
            supervision()
        except ImportError as error:
            raise ImportError(f"{str(error).rstrip('.')}, or pass --no-overlays.") from error
    predictor = Predictor.from_pretrained(options.model, options.runtime, options.device, options.precision)
    batch_size = options.batch_size
    if batch_size is None:
        batch_size = usual_batch_size(predictor.network)
    # Checks the request; nothing runs before it is asked for the first.
    stream = predictor.stream(images, options.subtask, options.threshold, batch_size)
    return Prepared(options, predictor, images, output_names(found), stream)


def predict(prepared: Prepared) -> list[str]:
    """Predicts and writes; what was wrong with the images that could not be used.

    Raises:
        OSError: something cannot be written.
    """
    options = prepared.options
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"{len(prepared.images)} {'image' if len(prepared.images) == 1 else 'images'}, into {options.out}.")
    problems = []
    with (
        tqdm(total=len(prepared.images), unit="image", disable=no_bars()) as bar,
        Writing(prepared, bar.update) as writing,
    ):
        for index, made in prepared.stream:
            if isinstance(made, ImageError):
                problems.append((index, _shown(made)))
                bar.update()
            else:
                writing.put(index, made)
    return [problem for _, problem in sorted(problems)]


class Writing:
    """Writes predictions in other threads, beside the network; a context, whose end waits for the last.

    After an error, also one outside, nothing more is begun: what is being written is finished, and the rest left.

    Args:
        prepared: says where and what.
        written: called, in this thread, after each.
    """

    def __init__(self, prepared: Prepared, written: Callable[[], object]) -> None:
        self.prepared, self.written = prepared, written
        self.executor = background_threads("writing", MOST_WRITERS)
        self.waiting: deque[tuple[int, Future[None]]] = deque()  # with their pixels
        self.stopped = False

    def put(self, index: int, made: Prediction) -> None:
        """Gives a prediction to write; waits while too much is unwritten.

        Raises:
            OSError: one before cannot be written.
        """
        pixels = made.size[0] * made.size[1]
        while self.waiting and (self.waiting[0][1].done() or self._full(pixels)):
            self._finish_first()
        self.waiting.append((pixels, self.executor.submit(self._write, index, made)))

    def _full(self, pixels: int) -> bool:
        unwritten = pixels + sum(waiting for waiting, _ in self.waiting)
        return len(self.waiting) >= MOST_UNWRITTEN or unwritten > MOST_UNWRITTEN_PIXELS

    def _finish_first(self) -> None:
        self.waiting[0][1].result()
        self.waiting.popleft()
        self.written()

    def _write(self, index: int, made: Prediction) -> None:
        if self.stopped:
            return
        try:
            write(self.prepared, index, made)
        except BaseException:
            self.stopped = True  # here, before the thread can begin the next
            raise

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self.waiting:
                self._finish_first()
        finally:
            self.stopped = True
            self.executor.shutdown(cancel_futures=True)


def finish(prepared: Prepared, problems: list[str]) -> None:
    """Says how it went, and lists what was left out in a file."""
    path = prepared.options.out / LEFT_OUT
    path.unlink(missing_ok=True)  # of an earlier run
    if problems:
        _write_whole(prepared.options.out, path, "".join(f"{problem}\n" for problem in problems).encode())
        say_skipped(problems)
    say(f"Written: {len(prepared.images) - len(problems)} of {len(prepared.images)} in {prepared.options.out}.")


def write(prepared: Prepared, index: int, made: Prediction) -> None:
    """An image's files.

    Raises:
        OSError: they cannot be written.
    """
    options, out = prepared.options, prepared.options.out
    stem = out / prepared.names[index]

    def put(suffix: str, content: bytes) -> None:
        _write_whole(out, stem.with_name(stem.name + suffix), content)

    put(LABELS, _png(made.label_map, len(made.id2label)))
    if made.subtask != "semantic":
        put(SEGMENTS, _png(made.segment_map() + 1, len(made.segments) + 1))
    if options.overlays:
        put(OVERLAY, _encoded(made.draw(LONGEST_OVERLAY), "JPEG", quality=QUALITY))
    document = {
        "image": {"file": _shown(prepared.images[index]), "height": made.size[0], "width": made.size[1]},
        "model": _shown(options.model),
        "runtime": options.runtime,
        "subtask": made.subtask,
        "threshold": options.threshold,
        "segments": made.to_json(),
        "version": __version__,
    }
    put(DOCUMENT, json.dumps(document, allow_nan=False, indent=1).encode())


def find_images(words: Sequence[str], out: Path) -> list[Found]:
    """The files that are named, those in the folders that are, at any depth, and those that patterns stand for.

    Each comes once, and nothing in `out` comes from a folder or a pattern. What is hidden is not looked for.

    Raises:
        ValueError: a word stands for no image.
    """
    found: dict[str, Found] = {}
    inside = os.path.realpath(out) + os.sep
    for word in words:
        path = base = Path(word)
        if path.is_dir():
            images = images_below(path)
        elif os.path.lexists(path):
            found.setdefault(place_of(path), Found(path, 1))
            continue
        elif glob.has_magic(word):
            images = _images_of_pattern(word)
            base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        else:
            raise ValueError(f"There is no file or folder {_shown(word)}.")
        images = [image for image in images if not place_of(image).startswith(inside)]
        if not images:
            raise ValueError(f"There is no image in {_shown(word)} ({', '.join(IMAGE_SUFFIXES)}).")
        for image in images:
            depth = len(Path(os.path.relpath(image, base)).parts)
            found.setdefault(place_of(image), Found(image, depth))
    return list(found.values())


def _images_of_pattern(pattern: str) -> list[Path]:
    """What a pattern stands for; of one that ends in a star, which says nothing of the kind, images only."""
    any_kind = not pattern.endswith("*")
    return [
        path
        for path, itself in files_of_pattern(pattern)
        if (itself and any_kind) or path.suffix.lower() in IMAGE_SUFFIXES
    ]


def images_below(path: Path) -> list[Path]:
    """The images in a folder, at any depth, by name."""
    return [image for image in files_below(path) if image.suffix.lower() in IMAGE_SUFFIXES]


def output_names(found: Sequence[Found]) -> list[Path]:
    """For each image a relative path without suffix, of the last parts of its own.

    No two of the files that begin with them are the same, not even where case does not count, and none is a folder
    of another.
    """
    parts = [Path(os.path.abspath(one.path)).parts[1:] for one in found]
    depths = [min(one.depth, len(own)) for one, own in zip(found, parts, strict=True)]
    while _tell_apart(parts, depths):
        pass
    relative = [Path(*own[-depth:]) for own, depth in zip(parts, depths, strict=True)]
    taken = {_key(folder) for path in relative for folder in path.parents} | {_key(Path(LEFT_OUT))}
    names = []
    for path in relative:
        number = 1
        while True:
            base = (path.stem, path.name)[number - 1] if number <= 2 else f"{path.name}-{number - 1}"
            name = path.with_name(_shortened(base, number))
            files = {_key(name.with_name(name.name + suffix)) for suffix in (DOCUMENT, LABELS, SEGMENTS, OVERLAY)}
            if not files & taken:
                break
            number += 1
        taken |= files
        names.append(name)
    return names


def _tell_apart(parts: Sequence[tuple[str, ...]], depths: list[int]) -> bool:
    """One more folder for images of several folders that have one name; whether there were any."""
    groups: dict[str, list[int]] = {}
    for index, (own, depth) in enumerate(zip(parts, depths, strict=True)):
        path = Path(*own[-depth:])
        groups.setdefault(_key(path.with_name(path.stem)), []).append(index)
    changed = False
    for members in groups.values():
        if len({_key(Path(*parts[index][:-1])) for index in members}) > 1:
            for index in members:
                if depths[index] < len(parts[index]):
                    depths[index] += 1
                    changed = True
    return changed


def _shortened(name: str, number: int) -> str:
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    while len(os.fsencode(name)) > LONGEST_NAME:
        name = name[:-1]
    return f"{name}-{number}"


def _key(path: Path) -> str:
    """The same for what some file systems take for the same."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _shown(name: object) -> str:
    """A file's name, or a sentence with one, of which all can be printed."""
    return "".join(character if character.isprintable() else "?" for character in str(name))


def _png(values: Tensor, count: int) -> bytes:
    """A map of whole numbers below `count`, and -1, in 8 bits where they do."""
    # -1 becomes the largest number of the type.
    array = values.numpy().astype(np.uint8 if count <= 255 else np.uint16)
    # A palette would be faster to write, but many readers make three channels of it.
    return _encoded(Image.fromarray(array), "PNG", compress_level=COMPRESSION, compress_type=RUN_LENGTHS)


def _encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def _write_whole(out: Path, path: Path, content: bytes) -> None:
    """Writes a file of `out`, so that a reader finds all of it or what was there before."""
    if not path.parent.resolve().is_relative_to(out.resolve()):
        raise OSError(f"{path.parent} is a link that leads out of {out}: remove it, or choose another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
