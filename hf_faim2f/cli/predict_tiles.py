"""`faim2f predict --tiles`: predicts large images tile by tile, and writes the same files as for other images."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, PredictorError
from ..files import printable, write_whole
from ..runtime.large_images import LargePrediction, Picture
from ..runtime.prediction_files import (
    DOCUMENT,
    LABELS,
    LONGEST_OVERLAY,
    OVERLAY,
    QUALITY,
    SEGMENTS,
    check_inside,
    remove_others,
    write_inside,
    write_png,
)
from ..runtime.predictor import Predictor
from ..runtime.tile_merging import Grid
from ..version import __version__
from .output import say

# Maximum number of segments in a 16-bit map.
MOST_NUMBERS = 65535


def check_tiles(predictor: Predictor) -> None:
    """Raises PredictorError if the model takes other windows than 8-bit gray or RGB images in 0..255."""
    processor: Any = predictor.network.processor
    if processor.num_channels not in (1, 3):
        raise PredictorError(
            f"--tiles reads gray and RGB images, but {predictor.network.name} takes {processor.num_channels} channels: "
            "leave --tiles out."
        )
    if not processor.to_dict()["do_rescale"]:
        raise PredictorError(
            f"--tiles reads images as 8 bits, but the image processor of {predictor.network.name} does not rescale "
            "them (do_rescale is false): leave --tiles out."
        )


@dataclass
class TileRun:
    """The settings that all images of a command share.

    Args:
        predictor: the opened model.
        out: the folder for the files.
        tile: side of a tile in pixels.
        overlap: fraction of a tile that it shares with the next.
        subtask, threshold, batch_size: as in `Predictor.stream`.
        overlays: whether to draw.
        about: facts for each JSON.
    """

    predictor: Predictor
    out: Path
    tile: int
    overlap: float
    subtask: str | None
    threshold: float | None
    batch_size: int | None
    overlays: bool
    about: Mapping[str, Any]


def predict_tiles(
    run: TileRun, source: Path, name: Path, progress: Callable[[int], Any] = lambda count: lambda: None
) -> str | None:
    """Predicts an image and writes its files; returns a sentence if it cannot be read.

    Args:
        run: the settings that images share.
        source: the image's file.
        name: the relative path of its files without suffix.
        progress: called with the number of tiles; returns a function that is called after each tile.

    Raises:
        OSError: something cannot be written.
        PredictorError: the network returns NaN.
    """
    try:
        with _predicted(run, source, progress) as prediction:
            _write(run, source, name, prediction)
    except ImageError as error:
        return printable(error)
    return None


@contextmanager
def _predicted(run: TileRun, source: Path, progress: Callable[[int], Any]) -> Iterator[LargePrediction]:
    with Picture(source) as picture:
        grid = Grid(picture.size, run.tile, run.overlap)
        subtask = run.subtask or run.predictor.subtasks[0]
        with LargePrediction(run.predictor, picture, grid, subtask, run.threshold, run.out) as prediction:
            after_each = progress(prediction.tiles)
            for _ in prediction.predict(run.batch_size):
                after_each()
            yield prediction


def _write(run: TileRun, source: Path, name: Path, prediction: LargePrediction) -> None:
    stem = run.out / name
    check_inside(run.out, stem)

    def path(suffix: str) -> Path:
        return stem.with_name(stem.name + suffix)

    # The largest value stands for no class, as in the maps of other images.
    kind = np.uint8 if len(prediction.id2label) <= 255 else np.uint16
    labels = (band.astype(kind) for band in prediction.label_bands())
    count = len(prediction.segments)
    has_numbers = prediction.subtask != "semantic" and count <= MOST_NUMBERS
    remove_others(stem, [LABELS, *([SEGMENTS] if has_numbers else []), *([OVERLAY] if run.overlays else [])])
    write_whole(path(LABELS), lambda file: write_png(file, prediction.size, labels))
    if has_numbers:
        small = np.uint8 if count < 255 else np.uint16
        numbers = (band.astype(small) for band in prediction.segment_bands())
        write_whole(path(SEGMENTS), lambda file: write_png(file, prediction.size, numbers))
    elif prediction.subtask != "semantic":
        say(f"{printable(source)}: {count} segments are too many for a 16-bit map, so no map is written.")
    if run.overlays:
        drawn = prediction.draw(LONGEST_OVERLAY)
        write_whole(path(OVERLAY), lambda file: drawn.save(file, "JPEG", quality=QUALITY))
    height, width = prediction.size
    document = {
        "image": {"file": printable(source), "height": height, "width": width},
        **run.about,
        "subtask": prediction.subtask,
        "tiles": {"side": run.tile, "overlap": run.overlap, "count": prediction.tiles},
        "segments": prediction.to_json(),
        "version": __version__,
    }
    write_inside(run.out, path(DOCUMENT), json.dumps(document, allow_nan=False, indent=1).encode())


__all__ = ["TileRun", "check_tiles", "predict_tiles"]
