"""The Hub's inference API for image segmentation: inputs, parameters and responses.

Parameters, their defaults and the segments are those of transformers' `ImageSegmentationPipeline`. The functions are
used by `handler.py` on Hugging Face Inference Endpoints, and by `faim2f serve` on any machine.
"""

import base64
import binascii
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_files_faim2f import IMAGE_FORMATS, READ_FORMATS, exif_orientation, most_pixels

SUBTASKS = ("panoptic", "instance", "semantic")
# Fields of a request. The Hub's older clients send `options`, which have no effect here.
FIELDS = ("inputs", "parameters", "options")
# Maximum number of pixels of an image, unless the caller sets another limit.
MAX_PIXELS = 25_000_000
MEGA = 1_000_000
NAME = "The file"
# zlib's Z_RLE strategy: masks compress as well as with the default strategy, in a fifth of the time.
PNG_SETTINGS = {"compress_level": 3, "compress_type": 3}
# Maximum length of a request's value in an error message, in characters.
LONGEST_SHOWN = 40


class RequestError(ValueError):
    """A request cannot be answered. The message is one sentence for the client.

    Args:
        message: the sentence.
        status: the HTTP status code.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Parameters:
    """The parameters of a request, as in transformers' `ImageSegmentationPipeline`.

    Args:
        subtask: one of `SUBTASKS`.
        threshold: the lowest score of a segment, 0 to 1; without effect on "semantic", like the following two.
        mask_threshold: the lowest probability of a pixel of a mask, 0 to 1; for "panoptic" only.
        overlap_mask_area_threshold: the fraction of its area that a segment must keep beside others, 0 to 1; for
            "panoptic" only.
    """

    subtask: str = "panoptic"
    threshold: float = 0.9
    mask_threshold: float = 0.5
    overlap_mask_area_threshold: float = 0.5

    @classmethod
    def of(cls, values: Any) -> "Parameters":
        """Checks untrusted parameters. None, for all or one of them, means the default.

        Numbers may be strings, as in a URL's query.

        Raises:
            RequestError: a parameter is unknown or invalid.
        """
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            raise RequestError(f"The parameters must be an object of names and values, not {_shown(values)}.")
        known = cls.__dataclass_fields__
        for name in values:
            if name not in known:
                raise RequestError(f"There is no parameter {_shown(name)}: choose from {', '.join(known)}.")
        given = {name: value for name, value in values.items() if value is not None}
        subtask = given.pop("subtask", cls.subtask)
        if subtask not in SUBTASKS:
            raise RequestError(f"subtask must be one of {', '.join(SUBTASKS)}, not {_shown(subtask)}.")
        return cls(subtask, **{name: _fraction(name, value) for name, value in given.items()})

    @classmethod
    def of_request(cls, request: Mapping[str, Any], query: "Mapping[str, str] | None" = None) -> "Parameters":
        """Checks the parameters of a request, in its field `parameters` and in its URL's query.

        Raises:
            RequestError: as `of`; or a parameter is in both, or beside `parameters` instead of in it; or another field
                is unknown.
        """
        for name in cls.__dataclass_fields__:
            if name in request:
                raise RequestError(
                    f"{name} is next to the field parameters: put it inside, as parameters: {{{name}: ...}}."
                )
        for name in request:
            if name not in FIELDS:
                raise RequestError(f"There is no field {_shown(name)}: put settings into the field parameters.")
        own = request.get("parameters")
        if not query or not isinstance(own, Mapping):
            return cls.of(query if own is None and query else own)
        for name in query:
            if name in own:
                raise RequestError(f"{_shown(name)} is in the address and in parameters: leave it out of one of them.")
        return cls.of({**query, **own})


def _shown(value: Any) -> str:
    """A value for a message: short, and without the contents of containers, which may be large."""
    if value is not None and not isinstance(value, (str, int, float)):
        return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    text = ascii(value[:LONGEST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def _fraction(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        raise RequestError(f"{name} must be a number from 0 to 1, not {_shown(value)}.")
    return number


def picture_bytes(inputs: Any) -> bytes:
    """The image's file from the field `inputs` of a request: base64 text, also as a data URL, or bytes.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(inputs, (bytes, bytearray, memoryview)):
        return bytes(inputs)
    if not isinstance(inputs, str):
        raise RequestError(f"inputs must be an image's file in base64, not {_shown(inputs)}.")
    if inputs.startswith(("http://", "https://")):
        raise RequestError("inputs is a URL, but nothing is fetched from other hosts: send the image's file.")
    if inputs.startswith("data:"):
        inputs = inputs.partition(",")[2]
    try:
        return base64.b64decode(inputs, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("inputs is not base64: encode the bytes of the image's file.") from error


def open_picture(source: Any, name: str = NAME, pixels: int = MAX_PIXELS, taker: str = "this server") -> Image.Image:
    """Opens an untrusted file as an image (its first frame) without decoding it, and checks its size by its header.

    The tiles of a TIFF file may be larger than the image, and are decoded whole, so they are limited as well.

    Args:
        source: a path, or an open binary file.
        name: name of the image in messages.
        pixels: the largest number of pixels.
        taker: what has this limit, in messages.

    Raises:
        RequestError: it is not an image of `IMAGE_FORMATS`, or has too many pixels (status 413).
    """
    try:
        picture = Image.open(source, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        text = f"{name} has more than {pixels / MEGA:g} million pixels: make it smaller."
        raise RequestError(text, 413) from error
    except Exception as error:  # Pillow's plugins may raise anything for a malformed header
        raise RequestError(f"{name} cannot be read as an image: {READ_FORMATS} files can.") from error
    width, height = picture.size
    most = most_pixels(picture)
    if most > pixels:
        picture.close()
        if width * height <= pixels:
            raise RequestError(
                f"{name} has tiles of {most / MEGA:.1f} million pixels, and {taker} takes "
                f"{pixels / MEGA:g} million: save it with smaller tiles.",
                413,
            )
        raise RequestError(
            f"{name} has {width}x{height} pixels, {width * height / MEGA:.1f} million, and {taker} takes "
            f"{pixels / MEGA:g} million: make it smaller.",
            413,
        )
    return picture


def segments_of(
    processor: Any, outputs: Any, size: tuple[int, int], parameters: Parameters, id2label: Mapping[int, str]
) -> Iterator[tuple[float | None, str, np.ndarray]]:
    """Yields the score, label and mask (H, W), bool, of each segment in the pipeline's order; the score may be None.

    Args:
        processor: the model's image processor.
        outputs: the model's outputs for one image, as a batch of one.
        size: (H, W) of the image.
        parameters: of the request.
        id2label: the name of each class.
    """
    if parameters.subtask == "semantic":
        label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0].cpu().numpy()
        for class_id in np.flatnonzero(np.bincount(label_map.ravel())).tolist():
            yield None, id2label[class_id], label_map == class_id
        return
    post_process = getattr(processor, f"post_process_{parameters.subtask}_segmentation")
    found = post_process(
        outputs,
        threshold=parameters.threshold,
        mask_threshold=parameters.mask_threshold,
        overlap_mask_area_threshold=parameters.overlap_mask_area_threshold,
        target_sizes=[size],
    )[0]
    places = found["segmentation"].cpu().numpy().astype(np.int32)  # the ids of segments, -1 or 0 for none
    for info in found["segments_info"]:
        yield float(info["score"]), id2label[info["label_id"]], places == info["id"]


def mask_png(mask: np.ndarray) -> str:
    """A mask (H, W), bool, as a gray PNG of 0 and 255, in base64."""
    file = io.BytesIO()
    Image.fromarray(mask.view(np.uint8) * np.uint8(255)).save(file, "PNG", **PNG_SETTINGS)
    return base64.b64encode(file.getvalue()).decode("ascii")


class SegmentationRequests:
    """Answers requests with a model.

    Args:
        model: a `FaiM2FForUniversalSegmentation`, in evaluation mode.
        processor: its image processor.
        pixels: the largest number of pixels of an image.
    """

    def __init__(self, model: Any, processor: Any, pixels: int = MAX_PIXELS) -> None:
        self.model, self.processor, self.pixels = model, processor, pixels

    @torch.no_grad()
    def __call__(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The segments of an image: score (None for "semantic"), label, and mask as a PNG in base64.

        Args:
            request: `inputs`, an image as a PIL image or as `picture_bytes` takes it, and optionally `parameters`.

        Raises:
            RequestError: the request is invalid, or the model's outputs have NaN.
        """
        parameters = Parameters.of_request(request)
        picture = request.get("inputs")
        if not isinstance(picture, Image.Image):
            picture = open_picture(io.BytesIO(picture_bytes(picture)), pixels=self.pixels)
        pixel_values, size = self._prepare(picture)
        outputs = self.model(pixel_values=pixel_values.to(self.model.device, self.model.dtype))
        if outputs.class_queries_logits.isnan().any() or outputs.masks_queries_logits.isnan().any():
            text = "The model's outputs have NaN: its weights are not finite, or its precision is too low."
            raise RequestError(text, 500)  # an answer would look valid: one class everywhere, or nothing
        segments = segments_of(self.processor, outputs, size, parameters, self.model.config.id2label)
        return [{"score": score, "label": label, "mask": mask_png(mask)} for score, label, mask in segments]

    def _prepare(self, picture: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """The network's input (1, 3, H, W), and the (height, width) of the upright image."""
        try:
            # Not decoded before: the processor needs what the header states about the values. It may be of another copy
            # of this code, so that it would not know our `Decoded`.
            pixel_values = self.processor([picture], return_tensors="pt", do_pad=False)["pixel_values"]
            height, width = picture.height, picture.width  # as decoded, before it is turned
            return pixel_values, (width, height) if exif_orientation(picture) >= 5 else (height, width)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(str(error).replace("image 0", NAME)) from error


__all__ = [
    "MAX_PIXELS",
    "MEGA",
    "SUBTASKS",
    "Parameters",
    "RequestError",
    "SegmentationRequests",
    "mask_png",
    "open_picture",
    "picture_bytes",
    "segments_of",
]
