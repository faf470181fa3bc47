"""Images that are stored turned, and what is done with their annotations, said once for a whole data set."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import pyarrow
from transformers.utils import logging

from ..errors import DatasetError
from .dataset import describe
from .files import AnnotationFrame, Source, is_of_stored, is_unclear, read_head, source_name
from .readers.hub import FencedReader, is_downloaded

logger = logging.get_logger(__name__)

# An image, and its map or the (height, width) that its annotations are made for.
Pair = tuple[Source, Source | tuple[int, int]]
# Heads are read at once, which hides the latency of network file systems.
READERS = 8
# Names in a warning.
MOST_NAMED = 10


def warn_of_turned(dataset: datasets.Dataset, frame: AnnotationFrame | None) -> None:
    """Warns of images that are stored turned, where it is not plain that their annotations are upright.

    Only heads of files are read, at 0.1 ms each; what cannot be read is told when it is asked for.

    Args:
        dataset: from a reader of this package.
        frame: what the person says of annotations whose size does not tell; the warning about them is then left out.
    """
    name = describe(dataset).name
    names = defaultdict(list)
    with ThreadPoolExecutor(READERS) as pool:
        for kind, image in pool.map(_kind_of, _pairs(dataset)):
            names[kind].append(image)
    if names["stored"]:
        logger.warning(
            f"{name}: {_count(names['stored'])} stored turned (EXIF orientation), with annotations of the size of the "
            f"stored pixels, which are turned upright with them: {_listed(names['stored'])}."
        )
    if names["unclear"] and frame is None:
        logger.warning(
            f"{name}: {_count(names['unclear'])} stored turned (EXIF orientation), and the size of the annotations "
            "does not tell whether they were made on the image upright or on its stored pixels. They are taken as "
            "upright; if they were made on the stored pixels, pass --annotation-frame stored (in Python "
            f"annotation_frame='stored'), else 'upright', which silences this: {_listed(names['unclear'])}."
            + (" Other annotations of this data set were made on the stored pixels." if names["stored"] else "")
        )


def _pairs(dataset: datasets.Dataset) -> Iterator[Pair]:
    reader = dataset.format["format_kwargs"]["transform"]
    columns = reader.columns if isinstance(reader, FencedReader) else ("image", "annotation")
    if columns[1] not in dataset.column_names:
        columns = ("image", "height", "width")

    def source(value: Any) -> dict[str, Any]:
        is_struct = isinstance(value, pyarrow.StructScalar) and value.is_valid
        data, path = (value["bytes"], value["path"].as_py()) if is_struct else (value, None)
        if isinstance(data, pyarrow.BinaryScalar) and data.is_valid:
            # Of a file that is mapped into memory no more is read than is asked for.
            return {"bytes": pyarrow.BufferReader(data.as_buffer()), "path": path}
        allowed = path is not None and (not isinstance(reader, FencedReader) or is_downloaded(path))
        return {"bytes": None, "path": path if allowed else None}

    for table in dataset.with_format("arrow", columns=list(columns)).iter(256):
        for image, *annotation in zip(*(table.column(column) for column in columns), strict=True):
            size = [value.as_py() for value in annotation] if len(annotation) == 2 else []
            yield source(image), (size[0], size[1]) if size else source(annotation[0])


def _kind_of(pair: Pair) -> tuple[str, str]:
    """ "unclear", "stored" or "plain", and the image's name."""
    image, annotation = pair
    name = source_name(image)
    try:
        orientation, *upright = read_head(image)
        if orientation == 1:
            return "plain", ""
        if not isinstance(annotation, tuple):
            own, *size = read_head(annotation)
            if own != 1:
                return "plain", ""
            annotation = (size[0], size[1])
    except DatasetError:
        return "plain", ""
    height, width = upright
    if annotation not in ((height, width), (width, height)):
        return "plain", ""  # refused when it is read
    if is_unclear((height, width), orientation):
        return "unclear", name
    return ("stored" if is_of_stored(image, annotation, (height, width), orientation, None) else "plain"), name


def _count(names: list[str]) -> str:
    return "1 image is" if len(names) == 1 else f"{len(names)} images are"


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} others" if more > 0 else "")
