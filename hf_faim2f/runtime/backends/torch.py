"""The network in PyTorch, from a model's folder or the Hub."""

from pathlib import Path

import torch
from torch import Tensor

from ...download import has_weights
from ...errors import PredictorError, first_line
from ...zoo import NATIVE_CODE, RUNTIME_FILES, open_model
from ..precision import warn_if_emulated
from . import BATCH_SIZE, Network

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_network(name: str, device: str | None = None, precision: str = "fp32", compile: bool = False) -> Network:
    """Opens the model on a device, optimized for inference.

    Args:
        name: a folder, published name or Hub id. Its code is not run; the classes are this package's.
        device: in torch's notation, such as "cpu" or "cuda:1"; None for a CUDA GPU if there is one.
        precision: a key of `TYPES`, for weights and activations; post-processing is always float32.
        compile: compile the network when it first runs; see `FaiM2FForUniversalSegmentation.optimize_for_inference`.

    Raises:
        PredictorError: there is no such model, device or precision, or a part of the model is missing or unusable.
    """
    if precision not in TYPES:
        raise PredictorError(f"precision must be one of {', '.join(TYPES)}, not {precision!r}.")
    place, dtype = _device(device), TYPES[precision]
    warn_if_emulated(precision, place)
    folder = Path(name)
    for runtime, file in RUNTIME_FILES.items():
        if (folder / file).is_file() and not has_weights(folder):
            trust = "if you trust where it comes from, " if runtime in NATIVE_CODE else ""
            code = ", which runs the native code in it" if runtime in NATIVE_CODE else ""
            raise PredictorError(
                f"{name} has {file} and no weights for torch: {trust}choose the runtime {runtime}{code}."
            )
    model, processor = open_model(name, error=PredictorError)
    # Fold batch norms in float32, and round the result once.
    model.optimize_for_inference().to(place, dtype)
    if compile:
        model.optimize_for_inference(compile=True)

    @torch.no_grad()
    def run(batch: Tensor) -> dict[str, Tensor]:
        outputs = model(pixel_values=batch.to(place, dtype, non_blocking=True))
        return {name: outputs[name] for name in ("class_queries_logits", "masks_queries_logits")}

    usual = 1 if place.type == "cpu" else BATCH_SIZE
    return Network(name, model.config, processor, run, usual_batch=usual, device=place)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails if it does not exist
    except Exception as error:
        raise PredictorError(f"There is no device {name!r} for torch here: {first_line(error)}.") from error
    return device


__all__ = ["open_network"]
