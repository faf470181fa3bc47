"""What a runtime is to the predictor: a network that turns a batch of tensors into tensors, and what it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import PredictorError
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor


@dataclass
class Network:
    """A model that is ready to run.

    Args:
        name: the folder or Hub id that it came from, for messages.
        config: of the model.
        processor: makes its input, and makes answers of its logits.
        run: takes the input, (B, 3, H, W) on the processor, and returns the outputs by name, wherever they are.
        outputs: which they are, a key of `export.graph.OUTPUTS`.
        input_name: "pixel_values" (float32) or "image" (uint8); see `export.graph.INPUTS`.
        batch: the number B that it takes; None for any.
        size: the (H, W) that it takes; None for any.
        largest_batch: the most images that it takes, where `batch` is None; None for any number.
        sizes: the smallest and the largest (H, W) that it takes, where `size` is None; None for any.
        at_once: of images of H and W, the number that is fastest run together; None for as many as there are.
        on_processor: torch's own threads run it, on the cores on which images are read and answered, too.
    """

    name: str
    config: FaiM2FConfig
    processor: FaiM2FImageProcessor
    run: Callable[[Tensor], dict[str, Tensor]]
    outputs: str = "logits"
    input_name: str = "pixel_values"
    batch: int | None = None
    size: tuple[int, int] | None = None
    largest_batch: int | None = None
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    at_once: Callable[[int, int], int] | None = None
    on_processor: bool = False


def check_numbers(name: str, outputs: Mapping[str, Tensor]) -> None:
    """PredictorError where an output has NaN, of which every post-processing would make the first class.

    A sum tells, in a fraction of the time that a look at each value takes. Infinite logits alone are no fault.

    Args:
        name: what gave the outputs, for the message.
        outputs: by name.
    """
    for key, values in outputs.items():
        if values.is_floating_point() and bool(values.sum().isnan()) and bool(values.isnan().any()):
            raise PredictorError(
                f"{name} answers with {key} that are NaN: its training diverged, or its precision is too low for it. "
                "Take an earlier checkpoint, or fp32."
            )


# How many images go through a network together where nobody says.

BATCH_SIZE = 4


def usual_batch_size(network: Network) -> int | None:
    """As many as are a gain on a processor, or as the network takes; None for one that takes one number only."""
    return min(BATCH_SIZE, network.largest_batch or BATCH_SIZE) if network.batch is None else None


__all__ = [
    "BATCH_SIZE",
    "Network",
    "check_numbers",
    "usual_batch_size",
]
