"""A folder with a TensorRT engine: `model.engine`, `engine.json` that describes it, and the libraries that open it.

An engine holds code for one kind of GPU, made and read by one version of one library. None of that can be seen from
its bytes before they run, so all of it is written down beside them and looked at first.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import ExportError
from .graph import INPUTS, OUTPUTS

ENGINE, DESCRIPTION = "model.engine", "engine.json"
# Two libraries of NVIDIA's with one API, and what Python calls them.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Far above what any engine of this family needs in its description.
LARGEST_DESCRIPTION = 1 << 20


@dataclass(frozen=True)
class Engine:
    """What `engine.json` says.

    Args:
        folder: where it and the engine are.
        outputs: a key of `graph.OUTPUTS`; the names are that entry's, in any order.
        input_name: one of `graph.INPUTS`.
        smallest, largest: the shapes (B, 3, H, W) of the input that the engine takes, both included.
        gpu: compute capability, "sm86".
        library, version: that built it, the only ones that open it.
        sha256: of the engine's file.
    """

    folder: Path
    outputs: str
    input_name: str
    smallest: tuple[int, ...]
    largest: tuple[int, ...]
    gpu: str
    library: str
    version: str
    sha256: str


def read_description(folder: Path) -> Engine:
    """What lies beside an engine; nothing of the engine is read.

    Raises:
        ExportError: it is not there, or not what `faim2f export tensorrt` writes.
    """
    for name in (ENGINE, DESCRIPTION):
        if not (folder / name).is_file():
            raise ExportError(
                f"There is no file {folder / name}: the runtime tensorrt takes a folder that `faim2f export tensorrt` "
                "wrote."
            )
    path = folder / DESCRIPTION
    if path.stat().st_size > LARGEST_DESCRIPTION:
        raise ExportError(f"{path} is larger than any description of an engine: export the engine again.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        (entry,) = values["inputs"]
        profile = entry.get("profile") or {"smallest": entry["shape"], "largest": entry["shape"]}
        engine = Engine(
            folder=folder,
            outputs=values["outputs_kind"],
            input_name=entry["name"],
            smallest=tuple(map(int, profile["smallest"])),
            largest=tuple(map(int, profile["largest"])),
            gpu=values["gpu"],
            library=values["library"]["name"],
            version=values["library"]["version"],
            sha256=values["engine"]["sha256"],
        )
        ordered = all(0 < low <= high for low, high in zip(engine.smallest, engine.largest, strict=True))
        known = engine.library in MODULES and engine.input_name in INPUTS and engine.outputs in OUTPUTS
        texts = (engine.gpu, engine.version, engine.sha256)
        if not (ordered and len(engine.smallest) == 4 and known and all(isinstance(text, str) for text in texts)):
            raise ValueError("its values are none that are written there")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} does not describe an engine ({error!r}): export the engine again.") from None
    return engine


def read_engine(engine: Engine) -> bytes:
    """The engine's bytes, which are those that were written.

    Raises:
        ExportError: they are others, or fewer.
    """
    content = (engine.folder / ENGINE).read_bytes()
    if hashlib.sha256(content).hexdigest() != engine.sha256:
        raise ExportError(
            f"{engine.folder / ENGINE} is not the file that {DESCRIPTION} describes (its SHA-256 is another): copy the "
            "whole folder again, or export the engine again."
        )
    return content


def open_engine(engine: Engine, device: int = 0) -> tuple[Any, Any]:
    """The library and its opened engine, on a GPU of this machine.

    Raises:
        ExportError: there is no such GPU or library, or the engine was built for another one or by another version.
    """
    here = gpu_here(device)
    if here is None:
        raise ExportError(
            f"{engine.folder / ENGINE} runs on an NVIDIA GPU ({engine.gpu}), and {why_no_gpu()}: run it where there is "
            "one, or choose the runtime onnxruntime or torch with the model's other folders."
        )
    if here != engine.gpu:
        raise ExportError(
            f"{engine.folder / ENGINE} was built for {engine.gpu}, and the GPU here is {here}: build one for it by "
            f"`faim2f export tensorrt ... --gpu {here}`."
        )
    trt = import_library(engine.library)
    if trt.__version__ != engine.version:
        raise ExportError(
            f"{engine.folder / ENGINE} was built by {engine.library} {engine.version}, and {trt.__version__} is "
            "installed, which cannot open it: install that version, or export the engine again."
        )
    logger = logger_of(trt)
    logger.errors.clear()
    with torch.cuda.device(device):
        opened = trt.Runtime(logger).deserialize_cuda_engine(read_engine(engine))
    if opened is None:
        reason = one_line(logger.errors[-1]) if logger.errors else "it does not say why"
        raise ExportError(f"{engine.library} cannot open {engine.folder / ENGINE}: {reason}.")
    return trt, opened


def gpu_here(device: int | None = None) -> str | None:
    """A GPU of this machine as "sm86", by torch, which holds the buffers of engines; None where there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def why_no_gpu() -> str:
    """Why there is none, as the end of a sentence."""
    return "no NVIDIA GPU is found here" if torch.version.cuda else f"torch {torch.__version__} runs on none"


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(MODULES[library]) is not None


def import_library(library: str) -> ModuleType:
    """One of `MODULES`.

    Raises:
        ExportError: it is not there, or does not load.
    """
    if not is_installed(library):
        raise ExportError(f"{library} is not installed: pip install 'hf-faim2f[{library}]'.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(MODULES[library])
    except (ImportError, OSError) as error:
        raise ExportError(
            f"{library} is installed but cannot be loaded ({error}): install it anew by "
            f"pip install --force-reinstall 'hf-faim2f[{library}]'."
        ) from None


@functools.cache
def logger_of(trt: Any) -> Any:
    """What the library says. It keeps the first logger that it is given in a process, so there is one."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


__all__ = [
    "DESCRIPTION",
    "ENGINE",
    "MODULES",
    "Engine",
    "gpu_here",
    "import_library",
    "is_installed",
    "logger_of",
    "one_line",
    "open_engine",
    "read_description",
    "read_engine",
    "why_no_gpu",
]
