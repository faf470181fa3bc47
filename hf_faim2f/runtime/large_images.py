"""Prediction of large images tile by tile, in memory that does not grow with the image's size.

An image that Pillow accepts is decoded whole. A larger one must be a TIFF file, from which rasterio (the extra `large`)
reads windows. Results are kept on disk until they are written; `tile_merging` merges the tiles.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from ..errors import ImageError, PredictorError, first_line, with_name
from ..files import printable
from ..masks import encode_column_blocks, encode_run_lengths
from ..model.channels_faim2f import picture_of
from ..model.image_files_faim2f import EXIF_ORIENTATION
from ..model.image_loading_faim2f import check_pixels, eight_bit_image, load_images
from .drawing import Segments, draw_segments
from .prediction import Box, answer
from .predictor import Predictor, PreparedImage
from .tile_merging import BLOCK, Blend, BlockMap, ClassScores, Fragment, Grid, Merging, Votes, free_bytes

# TIFF's tags, and the photometric interpretations that are read in windows: gray, RGB, YCbCr.
WIDTH, HEIGHT, PHOTOMETRIC = 256, 257, 262
PLAIN = (1, 2, 6)
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Maximum number of pixels in a strip or tile of a file, because each is decoded whole.
MOST_PIXELS_OF_BLOCK = 1 << 26
# Bytes of decoded blocks that rasterio caches: more than a row of blocks of an image of 60,000 columns. (GDAL itself
# reads the variable of the same name in megabytes.)
CACHE = 256 << 20
# In a panoptic prediction, a thing is dropped if better ones leave it at most this fraction of its area: the default
# of `post_process_panoptic_segmentation`.
LEAST_OWN = 0.8
# With more segments than this, an overlay shows classes instead.
MOST_DRAWN = 100


class Picture:
    """An image file whose windows can be read; a context manager.

    Attributes:
        size: (height, width) in pixels, upright.

    Raises:
        ImageError: it cannot be read, or is large and cannot be read in windows; the message says why.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = printable(os.fspath(path))
        self.whole: Image.Image | None = None
        self.file: Any = None
        self.stack = ExitStack()
        tags = _tiff_tags(path)
        limit = Image.MAX_IMAGE_PIXELS
        if tags and limit is not None and tags[0] * tags[1] > limit:
            with self.stack.pop_all() as stack:
                self._open_windows(path, tags, stack)
                self.stack = stack.pop_all()
            return
        try:
            self.whole = _eight_bits(eight_bit_image(path))
        except (ValueError, OSError) as error:
            text = with_name(error, self.name, path)
            raise ImageError(f"{text.rstrip('.')}{more_on_large(text)}.") from error
        self.size = (self.whole.height, self.whole.width)

    def read(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        """A window as an RGB image.

        Raises:
            ImageError: it cannot be decoded.
        """
        if self.whole is not None:
            return self.whole.crop((left, top, right, bottom))
        return self._bands(((top, bottom), (left, right)), None)

    def reduced(self, longest: int) -> Image.Image:
        """The image, reduced so that its longer side has at most this number of pixels."""
        factor = min(1.0, longest / max(self.size))
        height, width = (max(1, round(side * factor)) for side in self.size)
        if self.whole is not None:
            return self.whole.resize((width, height), Image.Resampling.BILINEAR)
        return self._bands(None, (height, width))

    def _open_windows(self, path: Any, tags: tuple[int, int, int, int], stack: ExitStack) -> None:
        height, width, photometric, orientation = tags
        what = f"{self.name} has {height}x{width} pixels (height x width) and is therefore read in windows"
        try:
            import rasterio
        except ImportError as error:
            raise ImageError(f"{what}, which needs rasterio ({error}): install hf-faim2f[large].") from error
        if orientation != 1:
            raise ImageError(f"{what}, which does not support its EXIF orientation: save it upright.")
        if photometric not in PLAIN:
            raise ImageError(f"{what}, which supports gray and RGB only: convert it.")
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about missing georeferencing
                self.file = stack.enter_context(rasterio.open(os.path.abspath(path), driver="GTiff"))
        except (rasterio.errors.RasterioError, OSError) as error:
            raise ImageError(f"{self.name} cannot be opened as an image: {first_line(error, kind=False)}.") from error
        self.size = (self.file.height, self.file.width)
        if any(kind != "uint8" for kind in self.file.dtypes):
            raise ImageError(f"{what}, which supports 8 bits per channel only, not {self.file.dtypes[0]}: convert it.")
        count, others = self.file.count, [kind.name for kind in self.file.colorinterp[1:]]
        is_gray = photometric == 1 and others in ([], ["alpha"])
        if not is_gray and (photometric == 1 or count < 3):
            raise ImageError(
                f"{what}, but its {count} bands are neither gray nor RGB: save three of them as RGB, for example with "
                "`gdal_translate -b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB IN OUT`."
            )
        bits = int(self.file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
        if bits not in ((1, 2, 4, 8) if is_gray else (8,)):
            raise ImageError(f"{what}, which does not support {bits} bits per channel: save it with 8.")
        self.scale = 255 // (2**bits - 1)
        rows, columns = self.file.block_shapes[0]
        if rows * columns > MOST_PIXELS_OF_BLOCK:
            raise ImageError(
                f"{what}, but its blocks of {rows}x{columns} are decoded whole: save it in tiles, for example with "
                "`vips tiffsave IN OUT --tile` or `rio convert --co tiled=yes IN OUT`."
            )

    def _bands(self, window: Any, shape: tuple[int, int] | None) -> Image.Image:
        count = self.file.count
        indexes = [1, 2, 3] if count >= 3 else [1]
        settings: dict[str, Any] = {} if shape is None else {"out_shape": (len(indexes), *shape)}
        if window is not None:
            settings["window"] = window
        try:
            bands = self.file.read(indexes, **settings)
        except Exception as error:  # rasterio's and GDAL's
            raise ImageError(f"{self.name} cannot be decoded, it may be truncated: {first_line(error)}.") from error
        bands = bands * np.uint8(self.scale) if self.scale != 1 else bands
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(bands, (3, *bands.shape[1:])).transpose(1, 2, 0)))

    def __enter__(self) -> "Picture":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def more_on_large(text: str) -> str:
    """Advice to append to Pillow's message about an image that is too large; empty for other messages."""
    if "decompression bomb" not in text and "exceeds limit" not in text:
        return ""
    other = "or " if "MAX_IMAGE_PIXELS" in text else ""  # another way than that of the message
    return f"; {other}save it as a tiled TIFF file, and read it in windows with --tiles 1024"


@dataclass
class LargeSegment:
    """A segment of a large image, without its mask; `LargePrediction.run_lengths` encodes the mask."""

    class_id: int
    label: str
    score: float | None
    box: Box
    area: int
    fragments: list[Fragment] = field(default_factory=list, repr=False)  # if empty: all pixels of its class
    number: int | None = None  # if set: only the fragments' pixels that have this number in the map of segments


class LargePrediction:
    """The prediction of a large image; a context manager that removes its temporary files.

    Attributes:
        subtask: "semantic", "instance" or "panoptic".
        size: (height, width) in pixels.
        tiles: the number of tiles.
        segments: in the order of `Prediction.segments`.
    """

    def __init__(
        self, predictor: Predictor, picture: Picture, grid: Grid, subtask: str, threshold: float | None, folder: Path
    ) -> None:
        network = predictor.network
        self.predictor, self.picture, self.grid = predictor, picture, grid
        self.subtask, self.threshold, self.size = subtask, threshold, picture.size
        self.id2label: Mapping[int, str] = network.config.id2label
        self.stuff_ids = frozenset(network.config.label_ids_to_fuse or (self.id2label if subtask == "semantic" else ()))
        needed = self.size[0] * self.size[1] * 6
        if needed > free_bytes(folder):
            raise ImageError(f"{picture.name} needs {needed / 1e9:.1f} GB of temporary space on the disk of {folder}.")
        self.stack = ExitStack()
        self.labels = self.stack.enter_context(BlockMap(self.size, np.uint16, folder))
        self.numbers = self.stack.enter_context(BlockMap(self.size, np.uint32, folder))
        self.tiles = sum(1 for _ in grid.places())
        self.merging = Merging(grid)
        self.blend = Blend(grid, self.labels)
        self.stuff_scores: dict[int, list[float]] = {}
        self.segments: list[LargeSegment] = []

    def predict(self, batch_size: int | None = None) -> Iterator[None]:
        """Predicts tile by tile; yields after each.

        Raises:
            ImageError: a window cannot be read.
            PredictorError: the network returns NaN.
        """
        places = list(self.grid.places())
        windows = (self.picture.read(*self.grid.area(place)) for place in places)
        for index, found in self.predictor.stream_outputs(windows, self._of_tile, batch_size):
            if isinstance(found, ImageError):
                raise ImageError(f"A window of {self.picture.name} cannot be used: {found}")
            things, scores = found
            self.merging.add(places[index], things)
            if scores is not None:
                self.blend.add(places[index], scores)
            yield
        self._number()

    def _of_tile(self, one: PreparedImage, outputs: dict[str, Tensor]) -> tuple[list[Any], ClassScores | Votes | None]:
        """The instances of a tile, and its class scores; None instead of the scores for instance segmentation."""
        network, size = self.predictor.network, (one.image.height, one.image.width)
        if self.subtask == "semantic" and network.outputs == "logits":
            found = network.processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
            return [], ClassScores(found[0].segmentation_scores.cpu(), size)
        made = answer(network, outputs, tuple(one.values.shape[1:]), one.image, self.subtask, self.threshold)
        classes = 1 + max(self.id2label)
        if self.subtask == "semantic":
            return [], Votes(made.label_map.numpy(), classes)
        if self.subtask == "instance":
            return made.segments, None
        things = [segment for segment in made.segments if segment.class_id not in self.stuff_ids]
        stuff = np.isin(made.label_map.numpy(), list(self.stuff_ids))
        for segment in made.segments:
            if segment.class_id in self.stuff_ids:
                self.stuff_scores.setdefault(segment.class_id, []).append(segment.score or 0.0)
        return things, Votes(np.where(stuff, made.label_map.numpy(), -1), classes)

    def _number(self) -> None:
        """Creates the segments, best first, and writes their numbers into the segment map."""
        for group in self.merging.groups():
            first = group[0]
            boxes = np.array([one.box for one in group])
            box = (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())
            self.segments.append(LargeSegment(first.class_id, first.label, first.score, box, first.area, group))
            if len(group) > 1:
                self.segments[-1].area = sum(
                    int(np.count_nonzero(mask)) for mask, _ in self._columns(self.segments[-1])
                )
        if self.subtask == "panoptic":
            self._separate()
        if self.subtask != "instance":
            for segment in self.segments:  # things take precedence over stuff
                for fragment in segment.fragments:
                    mask = fragment.pixels()
                    self.labels.write(fragment.box[1], fragment.box[0], np.zeros(mask.shape, np.uint16), mask)
            for class_id, (box, area) in sorted(self._classes().items()):
                scores = self.stuff_scores.get(class_id, [])
                score = sum(scores) / len(scores) if scores else None
                self.segments.append(LargeSegment(class_id, self.id2label[class_id], score, box, area))
        if self.subtask != "semantic":
            self.segments.sort(key=lambda segment: -(segment.score or 0.0))
        for number, segment in reversed(list(enumerate(self.segments, 1))):
            self._paint(segment, number)
            segment.number = number if self.subtask == "panoptic" else None

    def _separate(self) -> None:
        """Gives each pixel to the best thing that has it, and drops those that keep too little, as in a whole image."""
        self.segments.sort(key=lambda segment: -(segment.score or 0.0))
        kept = []
        for segment in self.segments:
            own, places = 0, []
            for mask, (left, top, right, bottom) in self._columns(segment):
                free = mask & (self.numbers.read(top, left, bottom - top + 1, right - left + 1) == 0)
                rows, columns = (np.flatnonzero(free.any(axis)) for axis in (1, 0))
                if len(rows):
                    own += int(np.count_nonzero(free))
                    places.append((left + columns[0], top + rows[0], left + columns[-1], top + rows[-1]))
            if own <= LEAST_OWN * segment.area:
                continue
            self._paint(segment, 1)
            boxes = np.array(places)
            segment.area, segment.box = own, (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())
            kept.append(segment)
        self.segments = kept

    def _paint(self, segment: LargeSegment, number: int) -> None:
        for fragment in segment.fragments:
            mask = fragment.pixels()
            self.numbers.write(fragment.box[1], fragment.box[0], np.full(mask.shape, number, np.uint32), mask)

    def _classes(self) -> dict[int, tuple[Box, int]]:
        """Box and area of each class in the label map."""
        found: dict[int, tuple[Box, int]] = {}
        for top, band in self.labels.bands():
            for left in range(0, band.shape[1], BLOCK):
                block = band[:, left : left + BLOCK]
                for value in np.unique(block[block > 0]).tolist():
                    mask = block == value
                    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                    box = (left + columns[0], top + rows[0], left + columns[-1], top + rows[-1])
                    old, area = found.get(value - 1, ((1 << 62, 1 << 62, -1, -1), 0))
                    whole: Any = (*map(min, old[:2], box[:2]), *map(max, old[2:], box[2:]))
                    found[value - 1] = tuple(map(int, whole)), area + int(np.count_nonzero(mask))  # type: ignore
        return found

    def _columns(self, segment: LargeSegment) -> Iterator[tuple[np.ndarray, Box]]:
        """The mask of a segment in blocks of columns, each with its box."""
        x_min, y_min, x_max, y_max = segment.box
        for left in range(x_min, x_max + 1, BLOCK):
            right = min(left + BLOCK, x_max + 1)
            if segment.fragments:
                mask = np.zeros((y_max - y_min + 1, right - left), dtype=bool)
                for fragment in segment.fragments:
                    rows = max(y_min, fragment.box[1]), min(y_max, fragment.box[3]) + 1
                    inside = fragment.inside((left, rows[0], right, rows[1]))
                    if inside is not None:
                        mask[rows[0] - y_min : rows[1] - y_min] |= inside
                if segment.number is not None:
                    mask &= self.numbers.read(y_min, left, *mask.shape) == segment.number
            else:
                mask = self.labels.read(y_min, left, y_max - y_min + 1, right - left) == segment.class_id + 1
            yield mask, (left, y_min, right - 1, y_max)

    def run_lengths(self, segment: LargeSegment) -> dict[str, Any]:
        """A segment's mask as compressed COCO run lengths."""
        if len(segment.fragments) == 1 and segment.number is None:
            fragment = segment.fragments[0]
            return encode_run_lengths([fragment.pixels()], [fragment.box], self.size)[0]
        return encode_column_blocks(self._columns(segment), self.size)

    def to_json(self) -> list[dict[str, Any]]:
        """Like `Prediction.to_json`."""
        return [
            {
                "class_id": segment.class_id,
                "label": segment.label,
                "score": segment.score,
                "box": list(segment.box),
                "area": segment.area,
                "segmentation": self.run_lengths(segment),
            }
            for segment in self.segments
        ]

    def segment_bands(self) -> Iterator[np.ndarray]:
        """Yields the number of each pixel's segment, from 1, 0 for none, in bands (rows, W) uint32."""
        of_class = np.zeros(2 + max(self.id2label), dtype=np.uint32)
        for number, segment in enumerate(self.segments, 1):
            if not segment.fragments:
                of_class[segment.class_id + 1] = number
        for (_, numbers), (_, labels) in zip(self.numbers.bands(), self.labels.bands(), strict=True):
            yield np.where(numbers > 0, numbers, of_class[labels])

    def label_bands(self) -> Iterator[np.ndarray]:
        """Yields the class of each pixel, -1 for none, in bands (rows, W) int32."""
        table = np.array([-1, *(segment.class_id for segment in self.segments)], dtype=np.int32)
        for numbers in self.segment_bands():
            yield table[numbers]

    def draw(self, longest: int) -> Image.Image:
        """Draws the segments, or the classes if there are many segments, over the reduced image."""
        image = self.picture.reduced(longest)
        rows = np.arange(image.height) * self.size[0] // image.height
        columns = np.arange(image.width) * self.size[1] // image.width
        sampled = []
        first = 0
        for band in self.segment_bands():
            sampled.append(band[rows[(rows >= first) & (rows < first + len(band))] - first][:, columns])
            first += len(band)
        numbers = np.concatenate(sampled).astype(np.int64)
        class_ids = np.array([-1, *(segment.class_id for segment in self.segments)])
        present = [int(number) for number in np.unique(numbers) if number]
        scores: list[float | None] = [self.segments[number - 1].score for number in present]
        if len(present) > MOST_DRAWN:
            scores = []  # classes, which are drawn instead, have no scores
            numbers, present = class_ids[numbers] + 1, sorted({class_ids[number] + 1 for number in present})
            class_ids = np.arange(-1, max(present))
        segments = Segments(
            torch.from_numpy(numbers == np.array(present, dtype=np.int64)[:, None, None]),
            torch.tensor([class_ids[number] for number in present], dtype=torch.int64),
            torch.tensor(scores) if scores and None not in scores else None,
            self.stuff_ids,
        )
        return draw_segments(image, segments, self.id2label)

    def __enter__(self) -> "LargePrediction":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def check_grid(tile: int, overlap: float, least: int) -> None:
    """Raises PredictorError if tiles cannot be of this size or overlap.

    Args:
        tile: side in pixels.
        overlap: as a fraction of a tile.
        least: the smallest allowed side in pixels.
    """
    if tile < least:
        raise PredictorError(f"A tile must have at least {least} pixels a side, not {tile}.")
    if not 0 <= overlap <= 0.5:
        raise PredictorError(f"The overlap of tiles must be from 0 to 0.5 of their side, not {overlap:g}.")


def _eight_bits(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = next(load_images([image], do_rescale=True))
    check_pixels(image, pixels, do_rescale=True)
    return picture_of(pixels)


def _tiff_tags(path: str | os.PathLike[str]) -> tuple[int, int, int, int] | None:
    """Height, width, photometric interpretation and orientation of a TIFF file; None if it is damaged or no TIFF."""
    try:
        if not Path(path).is_file():
            return None
        with open(path, "rb") as file:
            head = file.read(8)
            if head[:4] not in TIFF_HEADS:
                return None
            if head[2:3] == b"+" or head[3:4] == b"+":
                head += file.read(8)
            directory = TiffImagePlugin.ImageFileDirectory_v2(head)
            file.seek(directory.next)
            directory.load(file)
            values: Sequence[Any] = [
                directory.get(tag, default)
                for tag, default in ((HEIGHT, 0), (WIDTH, 0), (PHOTOMETRIC, 1), (EXIF_ORIENTATION, 1))
            ]
            height, width, photometric, orientation = (int(value) for value in values)
            return height, width, photometric, orientation
    except Exception:  # Pillow raises many types for damaged files; opening the image later gives a better message
        return None


__all__ = ["LargePrediction", "LargeSegment", "Picture", "check_grid", "more_on_large"]
