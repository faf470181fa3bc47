"""Predictions as files: names that do not collide, maps as PNG, and a writer with background threads.

Files for an image `a/photo.jpg`:

- `a/photo.json`: the image's file and size (upright by its EXIF orientation, like all outputs), the settings, and each
  segment's class, score, box, area and mask (COCO run lengths);
- `a/photo.labels.png`: the class of each pixel; pixels of no class have the largest value of the file, 255 or 65535;
- `a/photo.segments.png`, except for semantic predictions: the number of each pixel's segment in the JSON, counted from
  1, and 0 for no segment;
- `a/photo.overlay.jpg`, on request: the segments drawn over the image;
- in `annotations/`, on request: a copy of the image, with its segments as labels for an annotation tool.

Each file is written atomically, the JSON last.
"""

import io
import json
import os
import re
import struct
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..data.annotations import AnnotationFolder, Mark, image_suffix
from ..errors import SettingsError
from ..files import FoundFile, printable, write_whole
from ..version import __version__
from .prediction import Prediction
from .predictor import background_threads

DOCUMENT, LABELS, SEGMENTS, OVERLAY = ".json", ".labels.png", ".segments.png", ".overlay.jpg"
# For videos; see `cli.predict_video`.
FILM, LINES = ".overlay.mp4", ".frames.jsonl"
SUFFIXES = (DOCUMENT, LABELS, SEGMENTS, OVERLAY, FILM, LINES)
LEFT_OUT = "left_out.txt"
# The folder of annotations, and what it holds besides images once it is finished: one of these, by format.
ANNOTATIONS, FINISHED = "annotations", ("annotations", "data.yaml", "labels.txt")
# File systems limit names to 255 bytes, including the suffixes and the mark of a temporary file.
LONGEST_NAME = 200
# Longer side of an overlay in pixels, so that labels are readable and JPEG supports the size.
LONGEST_OVERLAY = 2048
# The start of a JSON that is read to recognize a prediction, in bytes; more than its facts before the segments.
HEAD = 1 << 16
QUALITY = 90
# PNG compression: the zlib level, above which maps take much longer for little gain; and the strategy Z_RLE, which only
# looks for runs and makes maps smaller and, in 8 bits, faster to write.
COMPRESSION, RUN_LENGTHS = 3, 3
# Few threads, because each of them holds all of a prediction's masks at the image's size while drawing.
THREADS = 2
# Limits on the predictions in the queue and on their pixels; one prediction is always accepted.
MOST_WAITING = 8
MOST_WAITING_PIXELS = 2**25


class PredictionWriter:
    """Writes predictions in background threads; a context manager whose exit waits for them.

    After an error, here or in the block, files that are being written are finished, and queued ones are dropped. The
    annotations then have the images written by then, unless a file cannot be written.

    Args:
        folder: an existing folder for the files.
        sources: the images' files.
        names: the relative path of each image's files, without suffix; see `output_names`.
        about: further facts for each JSON: model, runtime, threshold and so on.
        overlays: whether to draw overlays.
        annotations: the format of labels to write as well, one of `data.annotations.FORMS`; None for none.
        labels: all class names of the model, for the annotations.
        after_each: called in the caller's thread after each written prediction.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Path],
        names: Sequence[Path],
        about: Mapping[str, Any],
        *,
        overlays: bool = True,
        annotations: str | None = None,
        labels: Sequence[str] = (),
        after_each: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, self.sources, self.names, self.about = folder, sources, names, dict(about)
        self.overlays, self.after_each = overlays, after_each
        self.annotations = None
        if annotations is not None:
            self.annotations = AnnotationFolder(folder / ANNOTATIONS, annotations, labels)
            self.annotations.write = lambda path, content: write_inside(folder, path, content)
        self.executor = background_threads("writing", THREADS)
        self.waiting: deque[tuple[int, Future[None]]] = deque()  # (future, number of pixels)
        self.stopped = False

    def put(self, index: int, prediction: Prediction) -> None:
        """Queues the prediction of an image; waits while the queue is full.

        Raises:
            OSError: an earlier prediction cannot be written.
        """
        pixels = prediction.size[0] * prediction.size[1]
        while self.waiting and (self.waiting[0][1].done() or self._is_full(pixels)):
            self._finish_first()
        self.waiting.append((pixels, self.executor.submit(self._write, index, prediction)))

    def write(self, index: int, prediction: Prediction) -> None:
        """Writes the files of one image, in this thread.

        Raises:
            OSError: they cannot be written.
        """
        files = {LABELS: label_map_png(prediction)}
        if prediction.subtask != "semantic":
            files[SEGMENTS] = segment_map_png(prediction)
        if self.overlays:
            files[OVERLAY] = _encode(prediction.draw(LONGEST_OVERLAY), "JPEG", quality=QUALITY)
        height, width = prediction.size
        document = {
            "image": {"file": printable(self.sources[index]), "height": height, "width": width},
            **self.about,
            "subtask": prediction.subtask,
            "segments": prediction.to_json(),
            "version": __version__,
        }
        files[DOCUMENT] = json.dumps(document, allow_nan=False, indent=1).encode()
        if self.annotations is not None:
            marks = [
                Mark(segment.class_id, segment.mask.numpy(), segment.box, score=segment.score)
                for segment in reversed(prediction.segments)  # the best is on top
                if segment.mask.any()
            ]
            source, name = self.sources[index], PurePosixPath(self.names[index].as_posix())
            suffix = image_suffix(source.name)
            content = source.read_bytes() if suffix == source.suffix else _encode(prediction.image, "PNG")
            self.annotations.add(index, name, content, suffix, prediction.size, marks)
        stem = self.folder / self.names[index]
        check_inside(self.folder, stem)
        remove_others(stem, files)
        for suffix, content in files.items():
            write_inside(self.folder, stem.with_name(stem.name + suffix), content)

    def _is_full(self, pixels: int) -> bool:
        unwritten = pixels + sum(waiting for waiting, _ in self.waiting)
        return len(self.waiting) >= MOST_WAITING or unwritten > MOST_WAITING_PIXELS

    def _finish_first(self) -> None:
        self.waiting[0][1].result()
        self.waiting.popleft()
        self.after_each()

    def _write(self, index: int, prediction: Prediction) -> None:
        if self.stopped:
            return
        try:
            self.write(index, prediction)
        except BaseException:
            self.stopped = True  # set here, before this thread can start the next one
            raise

    def __enter__(self) -> "PredictionWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self.waiting:
                self._finish_first()
        except BaseException as error:
            kind = type(error)
            raise
        finally:
            self.stopped = True
            self.executor.shutdown(cancel_futures=True)
            if self.annotations is not None and (
                kind is None or (self.annotations.has_images and not issubclass(kind, OSError))
            ):
                self.annotations.finish()


def output_names(found: Sequence[FoundFile]) -> list[Path]:
    """Names the files of each image: a relative path without suffix, from the end of the image's path.

    Colliding names are prefixed with as many parent folders as needed. No two output files have the same name, even if
    the file system ignores case, and none is a folder of another.
    """
    parts = [Path(os.path.abspath(one.path)).parts[1:] for one in found]
    depths = [min(one.depth, len(own)) for one, own in zip(found, parts, strict=True)]
    while _add_parents(parts, depths):
        pass
    relative = [Path(*own[-depth:]) for own, depth in zip(parts, depths, strict=True)]
    taken = {_file_system_key(folder) for path in relative for folder in path.parents}
    taken.add(_file_system_key(Path(LEFT_OUT)))
    names = []
    for path in relative:
        number = 1
        while True:
            base = (path.stem, path.name)[number - 1] if number <= 2 else f"{path.name}-{number - 1}"
            name = path.with_name(_shortened(base, number))
            files = {_file_system_key(name.with_name(name.name + suffix)) for suffix in SUFFIXES}
            if not files & taken:
                break
            number += 1
        taken |= files
        names.append(name)
    return names


def _add_parents(parts: Sequence[tuple[str, ...]], depths: list[int]) -> bool:
    """Adds a parent folder to each name that images in different folders share; returns whether any name changed."""
    groups: dict[str, list[int]] = {}
    for index, (own, depth) in enumerate(zip(parts, depths, strict=True)):
        path = Path(*own[-depth:])
        groups.setdefault(_file_system_key(path.with_name(path.stem)), []).append(index)
    changed = False
    for members in groups.values():
        if len({_file_system_key(Path(*parts[index][:-1])) for index in members}) > 1:
            for index in members:
                if depths[index] < len(parts[index]):
                    depths[index] += 1
                    changed = True
    return changed


def _shortened(name: str, number: int) -> str:
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    end = f"-{number}"
    while len(os.fsencode(name + end)) > LONGEST_NAME:
        name = name[:-1]
    return name + end


def _file_system_key(path: Path) -> str:
    """A key that is equal for paths that some file systems treat as equal (case, Unicode composition)."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def label_map_png(prediction: Prediction) -> bytes:
    """Encodes the class of each pixel as a gray PNG; the largest value of the type stands for no class."""
    return map_png(prediction.label_map.numpy(), len(prediction.id2label))


def segment_map_png(prediction: Prediction) -> bytes:
    """Encodes the number of each pixel's segment, from 1, as a gray PNG; 0 stands for no segment."""
    return map_png(prediction.segment_map().numpy() + 1, len(prediction.segments) + 1)


def map_png(values: np.ndarray, count: int) -> bytes:
    """Encodes a map of integers from -1 to `count` - 1 as a gray PNG: in 8 bits if they fit, else in 16."""
    # -1 wraps to the largest value of the type. A palette would be faster, but many readers convert it to RGB.
    array = values.astype(np.uint8 if count <= 255 else np.uint16)
    return _encode(Image.fromarray(array), "PNG", compress_level=COMPRESSION, compress_type=RUN_LENGTHS)


def write_png(file: BinaryIO, size: tuple[int, int], bands: Iterable[np.ndarray]) -> None:
    """Writes a gray PNG (ISO/IEC 15948) from bands of rows, whose type gives the depth, with one band in memory.

    Args:
        file: binary, open for writing.
        size: (height, width) in pixels.
        bands: (rows, width), uint8 or uint16, from the top.
    """
    file.write(b"\x89PNG\r\n\x1a\n")
    packer = zlib.compressobj(COMPRESSION, zlib.DEFLATED, 15, 9, RUN_LENGTHS)
    begun = False
    for band in bands:
        if not begun:
            header = struct.pack(">IIBBBBB", size[1], size[0], 8 * band.dtype.itemsize, 0, 0, 0, 0)
            _chunk(file, b"IHDR", header)
            begun = True
        rows = band.astype(band.dtype.newbyteorder(">")).view(np.uint8).reshape(len(band), -1)
        # Each row begins with the number of its filter: none.
        _chunk(file, b"IDAT", packer.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes()))
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")
    file.flush()


def _chunk(file: BinaryIO, name: bytes, content: bytes) -> None:
    if content or name == b"IEND":
        file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))


def _encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def remove_others(stem: Path, written: Iterable[str]) -> None:
    """Removes an earlier prediction's JSON, and its files that the new prediction does not replace.

    For example, the new prediction has other settings, or is of a video instead of an image. Without a prediction's
    JSON, the files may be somebody's own, so they stay.

    Call it before the first new file is written, so that a JSON never describes the files of another prediction, and
    `check_inside` before it.

    Args:
        stem: path of the files without suffix.
        written: the suffixes of the new files.

    Raises:
        OSError: a file cannot be removed.
    """
    if not is_prediction(stem.with_name(stem.name + DOCUMENT)):
        return
    kept = set(written) - {DOCUMENT}
    for suffix in SUFFIXES:  # the JSON first
        if suffix not in kept:
            stem.with_name(stem.name + suffix).unlink(missing_ok=True)


def check_replaced(folder: Path, names: Iterable[Path]) -> None:
    """Rejects JSON files that predictions would replace and that are not predictions, such as labelme's annotations.

    Args:
        folder: the folder of all files.
        names: the relative paths of the files without suffix.

    Raises:
        SettingsError: there is such a file.
        OSError: a file cannot be read.
    """
    for name in names:
        path = folder / name.with_name(name.name + DOCUMENT)
        if os.path.lexists(path) and not is_prediction(path):
            raise SettingsError(
                f"{path} is not a prediction, and would be replaced by one: remove it, or choose another folder for "
                "--out."
            )


def other_predictions(folder: Path, names: Iterable[Path]) -> list[Path]:
    """The JSON files of the predictions below a folder that have none of these names, sorted.

    The name of an image depends on the other images of a run, so one of them may be of an image that has another name
    now.

    Args:
        folder, names: as in `check_replaced`.
    """
    own = {_file_system_key(folder / name.with_name(name.name + DOCUMENT)) for name in names}
    found = sorted(folder.rglob(f"*{DOCUMENT}"))
    return [path for path in found if _file_system_key(path) not in own and is_prediction(path)]


def is_prediction(path: Path) -> bool:
    """Whether a file is a prediction's JSON, by its first facts: the segments after them may be large."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(HEAD)
    return re.match(rb'\{\n "(image|film)": \{\n  "file": ', head) is not None and b'\n "subtask": "' in head


def write_inside(folder: Path, path: Path, content: bytes) -> None:
    """Writes a file below a folder atomically.

    Raises:
        OSError: the file cannot be written, or a link leads out of the folder.
    """
    check_inside(folder, path)
    try:
        write_whole(path, content)
    except OSError as error:
        if error.filename is None:  # a write that fails, such as on a full disk, names no file
            error.filename = str(path)
        raise


def check_inside(folder: Path, path: Path) -> None:
    """Creates the parent folder of `path`, which must be inside `folder`.

    Raises:
        OSError: it cannot be created, or a link leads out of `folder`.
    """
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{path.parent} is a link that leads out of {folder}: remove it, or choose another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)


__all__ = [
    "ANNOTATIONS",
    "FINISHED",
    "LEFT_OUT",
    "PredictionWriter",
    "check_inside",
    "check_replaced",
    "is_prediction",
    "label_map_png",
    "other_predictions",
    "output_names",
    "remove_others",
    "segment_map_png",
    "write_inside",
    "write_png",
]
