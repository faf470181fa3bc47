"""What a runtime is to the predictor: a network that turns a batch of tensors into tensors, and what it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import PredictorError, first_line
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


def read_settings(name: str) -> tuple[FaiM2FConfig, FaiM2FImageProcessor]:
    """Configuration and image processor of a folder, or of an id on the Hub; no code of it is run.

    Raises:
        PredictorError: there is none, or it is of another kind of model.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise PredictorError(f"{name} is no model's folder: it has no config.json.")
    kind = attempt(name, "configuration", lambda: FaiM2FConfig.get_config_dict(name)[0]).get("model_type")
    if kind != FaiM2FConfig.model_type:
        raise PredictorError(f"{name} is a model of type {kind!r}, not {FaiM2FConfig.model_type!r}.")
    config = attempt(name, "configuration", lambda: FaiM2FConfig.from_pretrained(name))
    processor = attempt(name, "image processor", lambda: FaiM2FImageProcessor.from_pretrained(name))
    processor.take_labels_from(config)
    return config, processor


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


def attempt(name: str, what: str, load: Callable[[], Any]) -> Any:
    """What `load` gives.

    Raises:
        PredictorError: it failed, in whatever way a stranger's files, the network and the libraries find.
    """
    try:
        return load()
    except Exception as error:
        place = "" if Path(name).is_dir() else ", which is no folder here,"
        raise PredictorError(f"The {what} of {name}{place} cannot be loaded: {first_line(error)}.") from error


# How many images go through a network together where nobody says.

BATCH_SIZE = 4


def usual_batch_size(network: Network) -> int | None:
    """As many as are a gain on a processor, or as the network takes; None for one that takes one number only."""
    return min(BATCH_SIZE, network.largest_batch or BATCH_SIZE) if network.batch is None else None


__all__ = [
    "BATCH_SIZE",
    "Network",
    "attempt",
    "check_numbers",
    "read_settings",
    "usual_batch_size",
]
