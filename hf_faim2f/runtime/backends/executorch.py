"""The network in ExecuTorch, from a folder of `faim2f export executorch`."""

import executorch.runtime  # noqa: F401  the library that `load_backend` names if it is missing

from . import Network, open_format


def open_network(name: str, device: str | None = None) -> Network:
    """Opens the program on the CPU.

    Args:
        name: a folder with `model.pte`, `format.json`, the model's configuration and its image processor.
        device: "cpu" or None.

    Raises:
        PredictorError: there is no such folder or device, or the folder is damaged.
    """
    return open_format("executorch", name, device)


__all__ = ["open_network"]
