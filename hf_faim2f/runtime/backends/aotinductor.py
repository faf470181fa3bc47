"""The network as native code of torch's AOTInductor, from a folder of `faim2f export torch`."""

from pathlib import Path

from ...errors import ExportError, PredictorError
from ...export.aotinductor import DESCRIPTION, PACKAGE, open_package, read_description
from ...export.graph_file import check_labels
from ...zoo import open_settings
from . import BATCH_SIZE, Network, check_size


def open_network(name: str, device: str | None = None) -> Network:
    """Opens the package.

    Args:
        name: a folder with `model.pt2`, `compiled.json`, the model's configuration and its image processor. A package
            is native code: open only those from a source that you trust.
        device: None, or the device that the package was compiled for.

    Raises:
        PredictorError: there is no such folder, or the package is for another device, CPU, GPU or release of torch,
            or its labels are not those of the configuration.
    """
    try:
        compiled = read_description(Path(name))
        if device not in (None, compiled.device):
            raise PredictorError(
                f"{name} was compiled for {compiled.device} and cannot run on {device}: leave the device out, or "
                "export the model for that device."
            )
        config, processor = open_settings(name, error=PredictorError)
        check_labels(compiled.folder / DESCRIPTION, config)
        batch, _, height, width = compiled.shape
        size = None if height is None or width is None else (height, width)
        check_size(Path(name) / PACKAGE, processor, size)
        run = open_package(compiled)
    except ExportError as error:
        raise PredictorError(str(error)) from error
    usual = 1 if compiled.device == "cpu" else BATCH_SIZE
    return Network(name, config, processor, run, compiled.outputs, compiled.input_name, batch, size, usual_batch=usual)


__all__ = ["open_network"]
