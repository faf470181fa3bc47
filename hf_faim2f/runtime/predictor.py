"""Images in, predictions out: one predictor over every runtime."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..model.image_loading_faim2f import load_images
from ..model.image_processing_faim2f import FaiM2FImageProcessor, scale_and_shift
from .answers import SUBTASKS, answer, without_padding
from .network import Network, PredictorError
from .prediction import Prediction

# Images of other sizes that may wait, in batches, for more of theirs.
MOST_WAITING = 2

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Args:
        module: beside this one; its `open_network(name, device)` gives a `Network`.
        extra: the extra of the package with the libraries that it needs; empty for none.
    """

    module: str
    extra: str = ""


RUNTIMES = {
    "torch": Runtime("torch_runtime"),
    "onnxruntime": Runtime("onnxruntime", "onnx"),
    "tensorrt": Runtime("tensorrt"),  # an engine names its library, and so its extra, itself
}


class ImageError(ValueError):
    """An image cannot be used. One sentence: which, and what is wrong with it."""


@dataclass
class Prepared:
    """An image as the network takes it, or what is wrong with it."""

    index: int
    error: ImageError | None = None
    image: Any = None  # Pillow's, RGB and upright
    values: Any = None  # (3, H, W), of the network's input
    inner: tuple[int, int] = (0, 0)  # (height, width) of it without padding


class Predictor:
    """A model and the runtime that it runs in; the predictions are the same from each.

    Images of one size at the network go through it together. They never share padding, so that what is predicted of
    one does not depend on the others.

    Args:
        network: as a runtime's `open_network` gives it; see `from_pretrained`.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        runtime: str = "torch",
        device: str | None = None,
        precision: str | None = None,
    ) -> "Predictor":
        """A predictor from a model's files. No code of them is run.

        Args:
            path: for torch a model's folder, or its id on the Hub; for onnxruntime a folder that `faim2f export onnx`
                wrote, and for tensorrt one of `faim2f export tensorrt`. Graphs of `logits` answer everything;
                `semantic` ones, `instances` and `queries` what they have.
            runtime: a key of `RUNTIMES`.
            device: where the network runs, such as "cpu" or "cuda:0"; None for a GPU where the runtime finds one.
            precision: for torch "fp32", "bf16" or "fp16", by default the first; the others have their graph's. Bfloat16
                is up to twice as fast where the device has instructions for it, and answers nearly the same.

        Raises:
            PredictorError: there is no such model, runtime, device or precision, or they do not fit each other.
        """
        if runtime not in RUNTIMES:
            raise PredictorError(f"runtime must be one of {', '.join(RUNTIMES)}, not {runtime!r}.")
        row = RUNTIMES[runtime]
        try:
            module = import_module(f".{row.module}", __package__)
        except ImportError as error:
            if not row.extra:
                raise
            raise PredictorError(
                f"The runtime {runtime} needs {error.name}, which cannot be imported ({error}): install "
                f"hf-faim2f[{row.extra}]."
            ) from error
        if precision is None:
            return cls(module.open_network(os.fspath(path), device))
        if runtime != "torch":
            raise PredictorError(
                f"The precision of {runtime} is that of its graph, and cannot be chosen here: leave it out, or export "
                f"the model in {precision}."
            )
        return cls(module.open_network(os.fspath(path), device, precision))

    @property
    def subtasks(self) -> tuple[str, ...]:
        """What can be asked, some of "semantic", "instance" and "panoptic"; first what the model was trained for."""
        able = SUBTASKS[self.network.outputs]
        return tuple(sorted(able, key=lambda subtask: subtask != self.network.config.postprocessing_type))

    def __call__(
        self,
        images: Any,
        subtask: str | None = None,
        threshold: float | None = None,
        batch_size: int | None = None,
    ) -> list[Prediction]:
        """Predictions, one an image, in their order.

        Args:
            images: one image or several, of any sizes; see `load_images` for all that can be one.
            subtask: one of `subtasks`; None for the first.
            threshold: the least score of a segment, 0..1; None for the processor's own for instances, and for
                transformers' 0.5 for panoptic segments.
            batch_size: the most images that go through the network together; None for one, or for what a graph with a
                fixed batch takes, whose last batch is filled up.

        Raises:
            PredictorError: this network does not answer that.
            ImageError: an image that cannot be used; the message says which and why.
        """
        several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        sources = list(images) if several else [images]
        if not sources:
            raise ImageError("The list of images is empty: pass at least one image.")
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
    ) -> Iterator[tuple[int, Prediction | ImageError]]:
        """Predictions as they are made, or what is wrong with an image, each with the image's place.

        Images are read and resized in another thread while the network runs, a few of them ahead. They come out
        in another order where their sizes differ. The arguments are those of a call.

        Raises:
            PredictorError: this network does not answer that.
        """
        subtask, size = self._check_request(subtask, threshold, batch_size)
        return self._stream(images, subtask, threshold, size)

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
        self, images: Iterable[Any], subtask: str, threshold: float | None, batch_size: int
    ) -> Iterator[tuple[int, Prediction | ImageError]]:
        prepared = _ahead(self._prepare, enumerate(images), batch_size + 1)
        try:
            for batch in _batches(prepared, batch_size):
                if batch[0].error is not None:
                    yield batch[0].index, batch[0].error
                else:
                    outputs = self._run([one.values for one in batch])
                    answers = self._answers(batch, outputs, subtask, threshold)
                    yield from zip((one.index for one in batch), answers, strict=True)
        finally:
            prepared.close()

    def _prepare(self, entry: tuple[int, Any]) -> Prepared:
        """Reads and resizes an image; in the other thread."""
        index, source = entry
        is_path = isinstance(source, (str, os.PathLike))
        name = os.fspath(source) if is_path else f"image {index}"
        try:
            # A pipe or a device would be waited for, perhaps for ever.
            if is_path and Path(source).exists() and not Path(source).is_file():
                raise ValueError("image 0 is no file.")
            pixels = next(load_images([source]))
            image, values, inner = self._input_of(pixels)
        except (ValueError, OSError) as error:
            # The readers number the images that they are given, which is one here.
            text = str(error).replace(f"image 0 ({name})", name, 1).replace("image 0", name, 1)
            return Prepared(index, ImageError(text))
        return Prepared(index, None, image, values, inner)

    def _input_of(self, pixels: Tensor) -> tuple[Image.Image, Tensor, tuple[int, int]]:
        """Picture, input (3, H, W) and its (height, width) without padding, of pixels (1 or 3, H, W) as they are read.

        Raises:
            ValueError: it would be resized to what cannot be.
        """
        processor = self.network.processor
        pixels = pixels.cpu()
        settings: dict[str, Any] = processor.to_dict()
        # A processor that does not rescale is for pixels in 0..1.
        bytes_ = (pixels if settings["do_rescale"] else 255 * pixels).round().clamp(0, 255).to(torch.uint8)
        image = Image.fromarray(bytes_.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        as_bytes = self.network.input_name == "image"
        # Bytes where they say the same: they need no look at whether their range is that of floats.
        source = bytes_ if torch.equal(bytes_.to(torch.float32), pixels) else pixels
        overrides = {"do_rescale": False, "do_normalize": False} if as_bytes else {}
        inputs = processor(source, input_data_format="channels_first", return_tensors="pt", **overrides)
        values, mask = inputs["pixel_values"][0], inputs["pixel_mask"][0].bool()
        inner = (int(mask.any(1).sum()), int(mask.any(0).sum()))
        self._check_size(values, inner)
        return image, _as_bytes(values, mask, processor) if as_bytes else values, inner

    def _check_size(self, values: Tensor, inner: tuple[int, int]) -> None:
        expected = self.network.size
        if expected is not None and (tuple(values.shape[1:]) != expected or inner != expected):
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

    def _run(self, values: list[Tensor]) -> dict[str, Tensor]:
        """The network's outputs for images of one size; what fills up a fixed batch is left out of them."""
        missing = (self.network.batch or len(values)) - len(values)
        outputs = self.network.run(torch.stack([*values, *values[-1:] * missing]))
        return {name: found[: len(values)] for name, found in outputs.items()}

    def _answers(
        self, batch: list[Prepared], outputs: dict[str, Tensor], subtask: str, threshold: float | None
    ) -> Iterator[Prediction]:
        """The predictions for prepared images that went through the network together."""
        for place, one in enumerate(batch):
            own = {name: values[place : place + 1] for name, values in outputs.items()}
            own = without_padding(own, tuple(one.values.shape[1:]), one.inner)
            yield answer(self.network, own, one.inner, one.image, subtask, threshold)


def _as_bytes(values: Tensor, mask: Tensor, processor: FaiM2FImageProcessor) -> Tensor:
    """What a graph normalizes: bytes, and in the padding those that come out as 0."""
    scale, shift = scale_and_shift(processor.to_dict())
    nothing = (-shift / scale).expand_as(values)
    return torch.where(mask, values, nothing).round().clamp(0, 255).to(torch.uint8)


def _batches(items: Iterable[Prepared], batch_size: int) -> Iterator[list[Prepared]]:
    """Images of one size, and bad ones by themselves; a size of which no more come does not wait for the end."""
    waiting: dict[tuple[int, ...], list[Prepared]] = {}
    for item in items:
        if item.error is not None:
            yield [item]
            continue
        size = tuple(item.values.shape)
        waiting.setdefault(size, []).append(item)
        if len(waiting[size]) == batch_size:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= MOST_WAITING * batch_size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def _ahead(make: Callable[[Given], Made], items: Iterable[Given], count: int) -> Any:
    """`make` of each item in order, in another thread, `count` of them before they are asked for."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="faim2f-images")
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(make, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


__all__ = ["RUNTIMES", "ImageError", "Predictor"]
