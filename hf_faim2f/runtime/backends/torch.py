"""The network in torch, from a model's folder or the Hub."""

from pathlib import Path

import torch
from torch import Tensor

from ...errors import PredictorError, first_line
from ...model.inference_faim2f import number_at_once
from ...zoo import open_model
from ..network import Network

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_network(name: str, device: str | None = None, precision: str = "fp32") -> Network:
    """The model, optimized for inference, on a device.

    Args:
        name: a folder, or an id on the Hub. No code of it is run: the classes are this package's.
        device: as torch writes it, such as "cpu" or "cuda:1"; None for a GPU of CUDA where there is one.
        precision: a key of `TYPES`, of weights and network; the post-processing is float32 always.

    Raises:
        PredictorError: there is no such model, device or precision, or something of it is missing or does not fit.
    """
    if precision not in TYPES:
        raise PredictorError(f"precision must be one of {', '.join(TYPES)}, not {precision!r}.")
    place, dtype = _device(device), TYPES[precision]
    folder = Path(name)
    if (folder / "model.onnx").is_file() and not any(folder.glob("*.safetensors*")):
        raise PredictorError(f"{name} has model.onnx and no weights for torch: choose the runtime onnxruntime.")
    model, processor = open_model(name, error=PredictorError)
    # Folded in float32, and rounded once.
    model.optimize_for_inference().to(place, dtype)

    @torch.no_grad()
    def run(batch: Tensor) -> dict[str, Tensor]:
        outputs = model(pixel_values=batch.to(place, dtype, non_blocking=True))
        return {name: outputs[name] for name in ("class_queries_logits", "masks_queries_logits")}

    on_processor = place.type == "cpu"
    at_once = number_at_once if on_processor else None
    return Network(name, model.config, processor, run, at_once=at_once, on_processor=on_processor)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # whether it is there
    except Exception as error:
        raise PredictorError(f"There is no device {name!r} for torch here: {first_line(error)}.") from error
    return device


__all__ = ["open_network"]
