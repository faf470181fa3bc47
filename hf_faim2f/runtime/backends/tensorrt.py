"""The network as a TensorRT engine, from a folder of `faim2f export tensorrt`; needs the GPU that it was built for."""

import re
from pathlib import Path

import torch

from ...errors import ExportError, PredictorError
from ...export.engine import DESCRIPTION, EngineRunner, open_engine, read_description
from ...export.graph_file import check_labels
from ...zoo import open_settings
from . import Network


def open_network(name: str, device: str | None = None) -> Network:
    """Opens the engine on a GPU.

    Args:
        name: a folder with `model.engine`, `engine.json`, the model's configuration and its image processor. An engine
            can execute arbitrary code: open only those from a source that you trust.
        device: "cuda" or "cuda:N"; None for the first GPU.

    Raises:
        PredictorError: there is no such folder or GPU, or the engine is for another GPU or library version, or its
            labels are not those of the configuration.
    """
    matched = re.fullmatch(r"cuda(?::(\d+))?", device or "cuda")
    if matched is None:
        raise PredictorError(f"device must be cuda or cuda:N for tensorrt, not {device!r}.")
    index = int(matched[1] or 0)
    try:
        engine = read_description(Path(name))
        config, processor = open_settings(name, error=PredictorError)
        check_labels(engine.folder / DESCRIPTION, config)
        if torch.cuda.is_available() and index >= torch.cuda.device_count():
            raise PredictorError(f"There is no device {device!r} here, only {torch.cuda.device_count()} CUDA devices.")
        runner = EngineRunner(engine, *open_engine(engine, index), torch.device("cuda", index))
    except ExportError as error:
        raise PredictorError(str(error)) from error
    (least, _, *low), (most, _, *high) = engine.smallest, engine.largest
    return Network(
        name,
        config,
        processor,
        runner,
        engine.outputs,
        engine.input_name,
        batch=most if least == most else None,
        size=(high[0], high[1]) if low == high else None,
        largest_batch=most,
        sizes=((low[0], low[1]), (high[0], high[1])),
    )


__all__ = ["open_network"]
