"""The predictor for all runtimes: images in, predictions out.

A pipeline of three bounded stages: a background thread decodes and resizes images ahead, the calling thread runs the
network batch by batch, and a small thread pool post-processes the outputs of the previous batch.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError, PredictorError, with_name
from ..model.channels_faim2f import RGB, picture_of
from ..model.image_loading_faim2f import check_pixels, decode_image, eight_bit_image, load_images
from ..model.image_settings_faim2f import to_bytes
from .backends import RUNTIMES, Network, check_outputs, load_backend
from .precision import Choice, choose_precision, multiplies_bfloat16
from .prediction import SUBTASKS, Prediction, answer, several_images, usual_threshold

# Limit on the images that wait for others of their size, in batches.
MOST_WAITING = 2
# Threads that post-process.
POST_PROCESSING_THREADS = 2
# Read-ahead limit for large batches; for small ones, MOST_WAITING batches.
MOST_AHEAD = 16
# Limit on the pixels of images that wait or are read ahead, because an image takes memory in proportion to its own
# size, not to the network's.
MOST_WAITING_PIXELS = 2**25

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass
class PreparedImage:
    """An image prepared for the network, or the error that prevents it."""

    index: int
    error: ImageError | None = None
    image: Any = None  # Pillow's, RGB and upright
    values: Any = None  # (C, H, W), the network's input without padding


class Predictor:
    """A model in a runtime; all runtimes give the same predictions (see `prediction.py` for label maps of graphs).

    Images with the same size at the network may share a batch. There is no padding, so a prediction does not depend on
    the other images in its batch.

    Args:
        network: from a runtime's `open_network`; see `from_pretrained`.

    Attributes:
        precision_choice: what `precision="auto"` chose, and why; None if it was not asked for.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.precision_choice: Choice | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        runtime: str = "torch",
        device: str | torch.device | None = None,
        precision: str | None = None,
        *,
        compile: bool = False,
        calibration: Iterable[Any] | None = None,
    ) -> "Predictor":
        """Opens a model. Code in the model's folder is not run.

        Args:
            path: for torch, a model's folder, a published name such as "fai-mf-m-ade", which is downloaded when it is
                first used, or a Hub id (see `zoo.resolve`); for another runtime, a folder written by `faim2f export`
                in the format of that name (onnx for onnxruntime, torch for aotinductor). Except for onnxruntime and
                openvino, open only folders that you trust. Graphs exported with the outputs `logits` support every
                subtask, others only their own.
            runtime: a key of `RUNTIMES`.
            device: where the network runs, such as "cpu" or "cuda:0"; None for a GPU if the runtime finds one.
            precision: for torch only: "fp32" (default), "bf16", "fp16" or "auto"; graphs have a fixed one. bfloat16 is
                up to twice as fast on devices with instructions for it, with nearly the same results. "auto" selects
                bfloat16 if the device has such instructions and predictions of the calibration images agree with
                float32, else float32; `precision_choice` records the choice and the reason.
            compile: for torch only: compile the network, when it first runs; see `optimize_for_inference`.
            calibration: for "auto", a few images like those to be predicted, of any accepted types.

        Raises:
            PredictorError: the model, runtime, device or precision does not exist, or they cannot be combined.
        """
        open_network, device = load_backend(runtime), None if device is None else str(device)
        if runtime != "torch":
            if precision is not None:
                raise PredictorError(
                    f"The precision of {runtime} is that of its graph, and cannot be chosen here: leave it out, or "
                    f"export the model in {'another' if precision == 'auto' else precision}."
                )
            if compile:
                raise PredictorError(f"compile is for the runtime torch, not for {runtime}: leave it out.")
            return cls(open_network(os.fspath(path), device))
        if (calibration is None) == (precision == "auto"):
            raise PredictorError(
                'precision="auto" and calibration go together: pass a few images on which to compare float32 and '
                "bfloat16, or leave out both."
            )
        if calibration is None:
            return cls(open_network(os.fspath(path), device, precision or "fp32", compile))
        exact = cls(open_network(os.fspath(path), device))
        place = exact.network.device or torch.device("cpu")
        if multiplies_bfloat16(place):
            rounded = cls(open_network(os.fspath(path), device, "bf16"))
            own, images = exact.subtasks[0], several_images(calibration)
            choice = choose_precision(exact, rounded, images, own, usual_threshold(exact.network, own))
        else:
            choice = Choice("fp32", f"this {place.type} has no instructions that multiply bfloat16")
        chosen = cls(open_network(os.fspath(path), device, choice.precision, compile))
        chosen.precision_choice = choice
        return chosen

    @property
    def subtasks(self) -> tuple[str, ...]:
        """The supported ones of "semantic", "instance" and "panoptic"; first the one that the model was trained for."""
        able = SUBTASKS[self.network.outputs]
        return tuple(sorted(able, key=lambda subtask: subtask != self.network.config.postprocessing_type))

    def __call__(
        self,
        images: Any,
        subtask: str | None = None,
        threshold: float | None = None,
        batch_size: int | None = None,
    ) -> list[Prediction]:
        """Predicts images: one prediction each, in order.

        Args:
            images: one or several images of any sizes; see `load_images` for the accepted types. Several may be a list,
                a batch (B, C, H, W) or any other iterable, such as a column of a dataset.
            subtask: one of `subtasks`; None for the first.
            threshold: the lowest score of a segment, 0..1; None for the default: that of the image processor for
                instances, and 0.5 for panoptic segments, as in transformers.
            batch_size: the largest batch; None for 1, or for the fixed batch size of a graph (the last batch is filled
                up with copies).

        Raises:
            PredictorError: the network does not support the request, or returns NaN.
            ImageError: an image cannot be used; the message says which and why.
        """
        sources = list(several_images(images))
        if not sources:
            raise ImageError("The list of images is empty: pass at least one image.")
        if len(sources) == 1:  # in this thread, with all cores
            subtask, _ = self._check_request(subtask, threshold, batch_size)
            one = self._prepare((0, sources[0]))
            if one.error is not None:
                raise one.error
            return [self._answer(one, self._run([one.values])[0], subtask, threshold)]
        predictions: dict[int, Prediction] = {}
        for index, made in self.stream(sources, subtask, threshold, batch_size):
            if isinstance(made, ImageError):
                raise made
            predictions[index] = made
        return [predictions[index] for index in range(len(sources))]

    def stream(
        self,
        images: Iterable[Any],
        subtask: str | None = None,
        threshold: float | None = None,
        batch_size: int | None = None,
        *,
        in_order: bool = False,
    ) -> Iterator[tuple[int, Prediction | ImageError]]:
        """Yields each image's index with its prediction or, for an unusable image, an `ImageError`.

        A background thread reads and resizes a few images ahead, so `images` may be a long generator, such as the
        frames of a video or of a camera. Other threads post-process outputs while the network runs the next batch. If
        image sizes differ, predictions may come in another order than the images, unless `in_order` is true. The other
        arguments are those of `__call__`.

        Args:
            in_order: yield predictions in the order of the images; where sizes alternate, batches are smaller.

        Raises:
            PredictorError: the network does not support the request; or, while iterating, it returns NaN.
        """
        subtask, size = self._check_request(subtask, threshold, batch_size)
        images = several_images(images)
        return self._stream(images, size, lambda one, own: self._answer(one, own, subtask, threshold), in_order)

    def stream_outputs(
        self, images: Iterable[Any], make: Callable[[PreparedImage, dict[str, Tensor]], Made], batch_size: int | None
    ) -> Iterator[tuple[int, Made | ImageError]]:
        """Like `stream` in order, but yields `make(image, outputs)`, where outputs are a batch of one."""
        _, size = self._check_request(None, None, batch_size)
        return self._stream(images, size, make, in_order=True)

    def _check_request(self, subtask: str | None, threshold: float | None, batch_size: int | None) -> tuple[str, int]:
        network = self.network
        subtask = self.subtasks[0] if subtask is None else subtask
        if subtask not in SUBTASKS["logits"]:
            raise PredictorError(f"subtask must be one of {', '.join(SUBTASKS['logits'])}, not {subtask!r}.")
        if subtask not in self.subtasks:
            raise PredictorError(
                f"The graph of {network.name} was exported with the outputs {network.outputs}, which answer "
                f"{' and '.join(self.subtasks)} segmentation, but not {subtask}: export it with the outputs logits."
            )
        if threshold is not None and subtask == "semantic":
            raise PredictorError("A semantic label map has no threshold: leave it out, or choose another subtask.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise PredictorError(f"threshold must be from 0 to 1, not {threshold!r}.")
        if batch_size is not None and batch_size < 1:
            raise PredictorError(f"The batch size must be at least 1, not {batch_size}.")
        if network.batch is not None and batch_size not in (None, network.batch):
            raise PredictorError(
                f"The graph of {network.name} takes {network.batch} images at once, not {batch_size}: leave the batch "
                "size out."
            )
        if network.largest_batch is not None and (batch_size or 1) > network.largest_batch:
            raise PredictorError(
                f"{network.name} takes at most {network.largest_batch} images at once, not {batch_size}: choose a "
                "smaller batch size, or build it for more."
            )
        return subtask, batch_size or network.batch or 1

    def _stream(
        self,
        images: Iterable[Any],
        batch_size: int,
        make: Callable[[PreparedImage, dict[str, Tensor]], Made],
        in_order: bool,
    ) -> Iterator[tuple[int, Made | ImageError]]:
        # One thread, because decoding large photographs takes much memory.
        count = max(batch_size, min(MOST_WAITING * batch_size, MOST_AHEAD))
        prepared = ahead(background_threads("images"), self._prepare, enumerate(images), count, _most_ahead)

        def network_outputs() -> Iterator[tuple[PreparedImage, dict[str, Tensor]]]:
            for batch in _batches(prepared, batch_size, in_order):
                outputs = [{}] if batch[0].error is not None else self._run([one.values for one in batch])
                while batch:  # releases the images one by one
                    yield batch.pop(0), outputs.pop(0)

        def post_process(made: tuple[PreparedImage, dict[str, Tensor]]) -> tuple[int, Made | ImageError, int]:
            one, own = made
            result = make(one, own) if one.error is None else one.error
            return one.index, result, _most_ahead(one)

        # Post-process a batch while the network runs the next one.
        pool = background_threads("post-processing", POST_PROCESSING_THREADS)
        predictions = ahead(pool, post_process, network_outputs(), batch_size, lambda made: made[2])
        try:
            for index, result, _ in predictions:
                yield index, result
        finally:
            predictions.close()
            prepared.close()

    def _prepare(self, entry: tuple[int, Any]) -> PreparedImage:
        """Reads and resizes an image; runs in the background thread."""
        index, source = entry
        is_path = isinstance(source, (str, os.PathLike))
        name = os.fspath(source) if is_path else f"image {index}"
        try:
            image, values = self._input_of(source)
        except (ValueError, OSError) as error:
            # The loader numbers the images of a call, which has one here.
            return PreparedImage(index, ImageError(with_name(error, name, source if is_path else "")))
        return PreparedImage(index, None, image, values)

    def _input_of(self, source: Any) -> tuple[Image.Image, Tensor]:
        """The image, upright and RGB, and the network's input (C, H, W) without padding.

        Raises:
            ValueError: the image cannot be read, or resizing it would leave no pixels.
        """
        processor = self.network.processor
        settings: dict[str, Any] = processor.to_dict()
        # An image processor that does not rescale expects pixels in 0..1.
        is_rgb = processor.num_channels == RGB
        picture = eight_bit_image(source) if settings["do_rescale"] and is_rgb else source
        if is_rgb and isinstance(picture, Image.Image) and picture.mode in ("L", "RGB") and settings["do_rescale"]:
            # Used without a copy, because copying large images takes long.
            source, image = picture, picture.convert("RGB") if picture.mode == "L" else picture
        else:
            source, image = self._pixels_and_image(picture, settings["do_rescale"], processor.num_channels)
        as_bytes = self.network.input_name == "image"
        overrides = {"do_rescale": False, "do_normalize": False} if as_bytes else {}
        inputs = processor([source], input_data_format="channels_first", return_tensors="pt", do_pad=False, **overrides)
        values = inputs["pixel_values"][0]
        self._check_size(values)
        return image, to_bytes(values) if as_bytes else values

    @staticmethod
    def _pixels_and_image(source: Any, do_rescale: bool, num_channels: int) -> tuple[Tensor, Image.Image]:
        """Pixels as read, (1 or 3, H, W) or (num_channels, H, W), and the 8-bit image, of the first three channels."""
        source = decode_image(source, num_channels=num_channels)
        pixels = next(load_images([source], do_rescale=do_rescale, num_channels=num_channels)).cpu()
        check_pixels(source, pixels, do_rescale)
        # Without rescaling, values are in 0..1, or in 0..255 if the means are. Values just above 1 are of the former.
        bytes_ = (pixels if do_rescale or pixels.max() >= 2 else 255 * pixels).round().clamp(0, 255).to(torch.uint8)
        # uint8 if that is exact, so that the image processor need not check the range of the values.
        return bytes_ if torch.equal(bytes_.to(torch.float32), pixels) else pixels, picture_of(bytes_)

    def _check_size(self, values: Tensor) -> None:
        expected = self.network.size
        if expected is not None and tuple(values.shape[1:]) != expected:
            raise ValueError(
                f"image 0 was prepared as {values.shape[1]}x{values.shape[2]} pixels (height x width), but the graph "
                f"takes {expected[0]}x{expected[1]}: export the model again."
            )
        if self.network.sizes is not None:
            smallest, largest = self.network.sizes
            sides = zip(smallest, values.shape[1:], largest, strict=True)
            if not all(low <= side <= high for low, side, high in sides):
                raise ValueError(
                    f"image 0 was prepared as {values.shape[1]}x{values.shape[2]} pixels (height x width), and the "
                    f"network takes {smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]}: leave it out, or build "
                    "the network for other sizes."
                )

    def _run(self, values: list[Tensor]) -> list[dict[str, Tensor]]:
        """Runs the network on images of the same size; returns the outputs of each as a batch of one.

        Raises:
            PredictorError: an output is NaN, or has other classes than the configuration.
        """
        network = self.network
        missing = (network.batch or len(values)) - len(values)
        outputs = network.run(torch.stack([*values, *values[-1:] * missing]))
        check_outputs(network, outputs)
        return _split(outputs, len(values))

    def _answers(
        self, batch: list[PreparedImage], outputs: dict[str, Tensor], subtask: str, threshold: float | None
    ) -> Iterator[Prediction]:
        """The predictions of a batch."""
        for one, own in zip(batch, _split(outputs, len(batch)), strict=True):
            yield self._answer(one, own, subtask, threshold)

    def _answer(self, one: PreparedImage, own: dict[str, Tensor], subtask: str, threshold: float | None) -> Prediction:
        """The prediction of one image from its own outputs."""
        return answer(self.network, own, tuple(one.values.shape[1:]), one.image, subtask, threshold)


def _split(outputs: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The outputs of the first `count` images, each as a batch of one."""
    return [{name: values[place : place + 1] for name, values in outputs.items()} for place in range(count)]


def _batches(items: Iterable[PreparedImage], batch_size: int, in_order: bool = False) -> Iterator[list[PreparedImage]]:
    """Groups images of equal size into batches; a size with few images is flushed early, an unusable image at once.

    In order, every change of size, and every unusable image, ends a batch.
    """
    waiting: dict[tuple[int, ...], list[PreparedImage]] = {}
    for item in items:
        if in_order and waiting and (item.error is not None or tuple(item.values.shape) not in waiting):
            yield waiting.popitem()[1]
        if item.error is not None:
            yield [item]
            continue
        size = tuple(item.values.shape)
        waiting.setdefault(size, []).append(item)
        if len(waiting[size]) == batch_size:
            yield waiting.pop(size)
        elif _too_many([one for group in waiting.values() for one in group], batch_size):
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def _too_many(waiting: list[PreparedImage], batch_size: int) -> bool:
    return len(waiting) >= MOST_WAITING * batch_size or sum(map(_pixels, waiting)) > MOST_WAITING_PIXELS


def _pixels(one: PreparedImage) -> int:
    return 0 if one.image is None else one.image.width * one.image.height


def _most_ahead(one: PreparedImage) -> int:
    """Read-ahead limit for images of this one's size."""
    return max(1, MOST_WAITING_PIXELS // max(1, _pixels(one)))


def background_threads(name: str, count: int = 1) -> ThreadPoolExecutor:
    """A pool of threads named "faim2f-NAME...", each of which runs torch on one core.

    By default, torch starts one thread per core for every thread that calls it; several such teams on the same cores
    mostly wait for each other.
    """
    return ThreadPoolExecutor(count, thread_name_prefix=f"faim2f-{name}", initializer=_compute_alone)


_setting_threads = threading.Lock()


def _compute_alone() -> None:
    with _setting_threads:
        count = torch.get_num_threads()
        if count == 1:
            return
        torch.set_num_threads(1)
        # This also sets the default for future threads; a short-lived thread restores it.
        restorer = threading.Thread(target=torch.set_num_threads, args=(count,))
        restorer.start()
        restorer.join()


def ahead(
    executor: ThreadPoolExecutor,
    make: Callable[[Given], Made],
    items: Iterable[Given],
    count: int,
    fit: Callable[[Made], int],
) -> Any:
    """Yields `make(item)` for each item in order, computed ahead by an executor, which is shut down at the end.

    Args:
        executor: runs `make`.
        make: turns an item into a result.
        items: consumed as needed.
        count: maximum look-ahead.
        fit: maximum look-ahead for results of the given one's size.
    """
    waiting: deque[Future[Made]] = deque()
    most = 1  # until the size of the results is known
    try:
        for item in items:
            waiting.append(executor.submit(make, item))
            # A large result after small ones counts as soon as it is computed, before it is yielded.
            while len(waiting) > min(
                [most, *(fit(one.result()) for one in waiting if one.done() and not one.exception())]
            ):
                made = waiting.popleft().result()
                most = min(count, fit(made))
                yield made
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


__all__ = ["RUNTIMES", "ImageError", "Predictor", "ahead", "background_threads"]
