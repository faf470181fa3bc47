"""Calibration: selects and prepares images for the graph, and measures the ranges of activations on them."""

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import ExportError, first_line, with_name
from ..files import files_below, warn_of_unread
from ..masks import maps_among
from ..model.image_loading_faim2f import (
    ARRAY_SUFFIXES,
    IMAGE_SUFFIXES,
    check_pixels,
    decode_image,
    load_images,
)
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.image_settings_faim2f import to_bytes
from .graph import quietly
from .graph_file import LAYERS


@dataclass
class Calibration:
    """Readable images of a folder and the inputs prepared from them.

    Args:
        folder: folder with the images, at any depth.
        paths: the selected images, each of which could be read.
        skipped: one sentence per unusable image, with the reason.
        held_out: inputs for measuring errors, not used for the ranges of activations unless there is only one image.
        held_out_paths: the images of these inputs.
    """

    folder: Path
    prepare: Callable[[Path], np.ndarray]
    batch: int
    paths: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    held_out_paths: list[Path] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)

    def inputs(self) -> Iterator[np.ndarray]:
        """Yields batches (B, C, H, W) of the images that are not held out, with one batch in memory at a time."""
        yield from _batches((self.prepare(path) for path in self.paths), self.batch)

    def names(self, paths: list[Path]) -> list[str]:
        """Paths relative to the folder."""
        return [path.relative_to(self.folder).as_posix() for path in paths]


def choose_images(
    folder: Path, processor: FaiM2FImageProcessor, graph_input: Any, most: int, most_held_out: int
) -> Calibration:
    """Selects at most `most` images of a folder, in a fixed random order, and holds out every fourth.

    Args:
        folder: the folder; hidden files and folders are ignored.
        processor: the image processor, which must resize to the graph's input size if that is fixed.
        graph_input: name, type and shape of the graph's input, an `onnx.ValueInfoProto`.
        most: maximum number of images, at least 1.
        most_held_out: maximum number of held-out images, at least 1.

    Raises:
        ExportError: there is no such folder, it has no readable image, or a folder of label maps; or the images of a
            batch differ in size.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; name one with images like those that the model will see.")
    files = list(files_below(folder))
    warn_of_unread(str(folder), files, IMAGE_SUFFIXES)
    found = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    found = found or [path for path in files if path.suffix.lower() in ARRAY_SUFFIXES]
    if not found:
        raise ExportError(f"{folder} has no image in it ({', '.join(IMAGE_SUFFIXES)}).")
    if (reason := maps_among(folder, found)) is not None:
        raise ExportError(reason)
    # Shuffle, because folders are often sorted by content.
    random.Random(0).shuffle(found)
    sides = [side.dim_value for side in graph_input.type.tensor_type.shape.dim]  # 0 if it is not fixed
    as_bytes = graph_input.name == "image"

    def prepare(path: Path) -> np.ndarray:
        return _prepare(path, processor, as_bytes)

    calibration = Calibration(folder, prepare, sides[0] or 1)
    held_out: list[np.ndarray] = []
    shape: tuple[int, ...] | None = None
    for path in found:
        if len(calibration.paths) + len(held_out) == most:
            break
        try:
            values = prepare(path)
        except (ValueError, OSError) as error:
            # The loader calls the only image of the batch "image 0".
            name = path.relative_to(folder).as_posix()
            text = with_name(error, name, path).replace(str(path), name)
            calibration.skipped.append(" ".join(text.split()))
            continue
        if any(side not in (0, own) for side, own in zip(sides[2:], values.shape[1:], strict=True)):
            raise ExportError(
                f"the image processor beside the graph makes images of {values.shape[1]}x{values.shape[2]} (height x "
                f"width), and the graph takes {sides[2] or 'any'}x{sides[3] or 'any'}: export the model again."
            )
        if calibration.batch > 1 and values.shape != (shape := shape or values.shape):
            raise ExportError(
                f"the graph takes {calibration.batch} images at once, which must be of one size, and the image "
                f"processor beside it makes images of different sizes of those in {folder}: export the model with "
                "--size, or without --batch."
            )
        if len(calibration.paths) > 3 * len(held_out) and len(held_out) < most_held_out:
            calibration.held_out_paths.append(path)
            held_out.append(values)
        else:
            calibration.paths.append(path)
    if not calibration.paths:
        raise ExportError(f"none of the {len(found)} images in {folder} can be read: {calibration.skipped[0]}")
    if not held_out:
        calibration.held_out_paths, held_out = calibration.paths[:], [prepare(calibration.paths[0])]
    calibration.held_out = list(_batches(iter(held_out), calibration.batch))
    return calibration


def _prepare(path: Path, processor: FaiM2FImageProcessor, as_bytes: bool) -> np.ndarray:
    """Prepares an image as (C, H, W): float32 `pixel_values`, or uint8 pixels that the graph normalizes.

    Raises:
        ValueError, OSError: the image cannot be read, or resizing it would leave no pixels.
    """
    do_rescale, num_channels = processor.to_dict()["do_rescale"], processor.num_channels
    source = decode_image(path, num_channels=num_channels)
    pixels = next(load_images([source], None, do_rescale, num_channels))
    check_pixels(source, pixels, do_rescale)
    # Without padding, as `Predictor` prepares images.
    overrides = {"do_rescale": False, "do_normalize": False} if as_bytes else {}
    inputs = processor(pixels, input_data_format="channels_first", return_tensors="pt", do_pad=False, **overrides)
    values = inputs["pixel_values"][0]
    return (to_bytes(values) if as_bytes else values).numpy()


def _batches(items: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Batches of exactly `size` items; the last is padded with copies of its last item."""
    batch: list[np.ndarray] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack([*batch, *batch[-1:] * (size - len(batch))])


def activation_ranges(network: Any, calibration: Calibration) -> Any:
    """The minimum and maximum of each layer's inputs and outputs, over all images except the held-out ones.

    Args:
        network: an `onnx.ModelProto` that takes the images as input.
        calibration: the images.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    name: str = network.graph.input[0].name
    batches = tqdm(calibration.inputs(), total=-(-len(calibration.paths) // calibration.batch), unit="batch",
                   desc="calibrate", disable=None)  # fmt: skip
    # The calibrator writes a second graph next to the one it reads.
    with tempfile.TemporaryDirectory(prefix="faim2f-") as folder, quietly():
        onnx.save(network, Path(folder, "network.onnx"))
        calibrator = create_calibrator(
            Path(folder, "network.onnx"),
            LAYERS,
            str(Path(folder, "augmented.onnx")),
            calibrate_method=CalibrationMethod.MinMax,
        )
        for batch in batches:
            # The calibrator keeps all activations of a call in memory, so each call gets one batch.
            calibrator.collect_data(_OneBatch({name: batch}))
        return calibrator.compute_data()


def open_session(model: Any, is_quantized: bool = False) -> Any:
    """Opens a graph, an `onnx.ModelProto`, in onnxruntime, on the CPU.

    Args:
        model: the graph.
        is_quantized: whether this package quantized it; else it is the user's.

    Raises:
        ExportError: onnxruntime cannot.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:  # of onnxruntime's own classes
        what = "the quantized graph" if is_quantized else "the graph"
        remedy = "export the model again here, or install the version of onnxruntime that it was exported with"
        remedy = "please report it with the model's config.json" if is_quantized else remedy
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {what} ({first_line(error)}): {remedy}."
        ) from error


class _OneBatch:
    """Calibration data for ONNX Runtime: one batch."""

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter([batch])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


__all__ = ["Calibration", "activation_ranges", "choose_images", "open_session"]
