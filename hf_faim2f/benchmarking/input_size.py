"""The size at which a predictor's network sees images, as its processor has it or as it is asked for."""

import os
from dataclasses import replace
from typing import Any

from ..model.image_processing_faim2f import FaiM2FImageProcessor, resized_size
from ..runtime.network import PredictorError
from ..runtime.predictor import Predictor

SMALLEST_SIDE, LARGEST_SIDE = 32, 8192  # as in exported graphs


def own_size(processor: FaiM2FImageProcessor) -> tuple[int, int]:
    """(height, width) that the processor resizes to; of one that keeps proportions that of a square image."""
    settings: dict[str, Any] = processor.to_dict()
    size: dict[str, int] = settings["size"]
    square = size.get("shortest_edge", 1)
    return resized_size(square, square, size, settings["size_divisor"])


def open_at_size(
    path: str | os.PathLike[str], runtime: str, device: str | None = None, size: tuple[int, int] | None = None
) -> Predictor:
    """A predictor whose images are all resized to one size.

    Args:
        path, runtime, device: as `Predictor.from_pretrained` takes them.
        size: (height, width) in pixels; None for the processor's own way.

    Raises:
        PredictorError: there is no such predictor, or its graph does not take the size.
    """
    if size is not None and not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in size):
        raise PredictorError(
            f"size {size[0]}x{size[1]} (height x width) is not supported: each side must have {SMALLEST_SIDE} to "
            f"{LARGEST_SIDE} pixels."
        )
    predictor = Predictor.from_pretrained(path, runtime, device)
    network = predictor.network
    if size is None or size == network.size:
        return predictor
    if network.size is not None:
        raise PredictorError(
            f"The graph of {network.name} takes {network.size[0]}x{network.size[1]} pixels (height x width), not "
            f"{size[0]}x{size[1]}: leave the size out, or export it for that one."
        )
    settings: dict[str, Any] = network.processor.to_dict()
    settings.update(do_resize=True, size={"height": size[0], "width": size[1]}, size_divisor=0, pad_size=None)
    processor = FaiM2FImageProcessor.from_dict(settings)
    return Predictor(replace(network, processor=processor))


__all__ = ["open_at_size", "own_size"]
