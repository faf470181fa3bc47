"""The network in OpenVINO, from a folder of `faim2f export openvino`."""

import openvino  # noqa: F401  the library that `load_backend` names if it is missing

from . import Network, open_format


def open_network(name: str, device: str | None = None) -> Network:
    """Opens the network on a device.

    Args:
        name: a folder with `openvino_model.xml`, `openvino_model.bin`, `format.json`, the model's configuration and its
            image processor.
        device: "cpu", or another device of OpenVINO, such as "gpu" or "gpu:1"; None for the CPU.

    Raises:
        PredictorError: there is no such folder or device, or the folder is damaged.
    """
    return open_format("openvino", name, device)


__all__ = ["open_network"]
