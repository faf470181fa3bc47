"""Reads, opens and runs folders with a TensorRT engine.

`model.engine` holds code for one type of GPU, and only the library version that built it can load it. None of this can
be read from the engine file, so `engine.json` records it and is checked first.

Inputs and outputs of a running engine are torch tensors on the GPU. Only the input is copied to the GPU, and only the
results of post-processing are copied back. For each batch shape, the work is captured once as a CUDA graph and then
replayed. `tensorrt-rtx` compiles kernels at run time and therefore captures CUDA graphs itself.
"""

import functools
import importlib
import importlib.util
import json
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, PredictorError
from ..files import sha256_of
from .graph import INPUTS, OUTPUTS

ENGINE, DESCRIPTION = "model.engine", "engine.json"
# Two NVIDIA libraries with the same API, and their Python module names.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Number of most recently used input shapes whose buffers and graphs are kept.
MOST_SHAPES = 4
TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "BOOL": torch.bool,
}
# Maximum size of engine.json in bytes; real ones are far smaller.
LARGEST_DESCRIPTION = 1 << 20


@dataclass(frozen=True)
class Engine:
    """The contents of `engine.json`.

    Args:
        folder: folder of the engine and its description.
        outputs: a key of `graph.OUTPUTS`; the engine's outputs have the names listed there, in any order.
        input_name: one of `graph.INPUTS`.
        smallest, largest: minimum and maximum input shape (B, 3, H, W), inclusive.
        gpu: compute capability, such as "sm86".
        library, version: what built the engine; only the same version can open it.
        sha256: SHA-256 of the engine file.
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
    """Reads the description of an engine, without reading the engine.

    Raises:
        ExportError: it is missing, or was not written by `faim2f export tensorrt`.
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
            raise ValueError("it has values that are never written")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ExportError(f"{path} does not describe an engine ({error!r}): export the engine again.") from None
    return engine


def read_engine(engine: Engine) -> bytes:
    """Reads the engine file and compares its SHA-256 with the description.

    Raises:
        ExportError: the file was changed.
    """
    content = (engine.folder / ENGINE).read_bytes()
    if sha256_of(content) != engine.sha256:
        raise ExportError(
            f"{engine.folder / ENGINE} is not the file that {DESCRIPTION} describes (its SHA-256 is another): copy the "
            "whole folder again, or export the engine again."
        )
    return content


def open_engine(engine: Engine, device: int = 0) -> tuple[Any, Any]:
    """Opens an engine on a GPU of this machine; returns the library and the engine.

    Raises:
        ExportError: there is no such GPU or library, or the engine was built for another GPU or by another version.
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
        reason = one_line(logger.errors[-1]) if logger.errors else "it gives no reason"
        raise ExportError(f"{engine.library} cannot open {engine.folder / ENGINE}: {reason}.")
    return trt, opened


@dataclass
class Buffers:
    """Buffers for the engine's inputs and outputs for one shape, and its execution context."""

    context: Any  # the library's execution context, which holds intermediate results
    input: Tensor
    outputs: dict[str, Tensor]
    graph: Any = None  # torch.cuda.CUDAGraph; None if the library captures graphs itself


class EngineRunner:
    """Runs an opened engine on batches (B, 3, H, W), one at a time: threads that call it wait for each other."""

    def __init__(self, engine: Engine, trt: Any, opened: Any, device: torch.device) -> None:
        self.engine, self.trt, self.opened, self.device = engine, trt, opened, device
        self.stream, self.lock = torch.cuda.Stream(device), threading.Lock()
        self.shapes: OrderedDict[tuple[int, ...], Buffers] = OrderedDict()
        # A captured graph ties its context to one shape, so each shape has its own context. tensorrt-rtx captures
        # graphs itself, and a shared context keeps the kernels that it has compiled.
        self.shared = self._context() if engine.library == "tensorrt-rtx" else None

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """Returns the outputs by name, on the GPU, in new memory.

        Raises:
            PredictorError: the engine does not accept this shape, or fails.
        """
        with self.lock:  # the buffers of a shape are those of every call
            return self._run(batch)

    def _run(self, batch: Tensor) -> dict[str, Tensor]:
        count = len(batch)
        if count < self.engine.smallest[0]:  # pad with copies of the last image, and drop their outputs
            batch = torch.cat([batch, batch[-1:].expand(self.engine.smallest[0] - count, -1, -1, -1)])
        shape = tuple(batch.shape)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            # Earlier work may still use these buffers.
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            if shape not in self.shapes:
                if len(self.shapes) == MOST_SHAPES:
                    self.shapes.popitem(last=False)
                self.shapes[shape] = self._prepare(shape)
            self.shapes.move_to_end(shape)
            buffers = self.shapes[shape]
            # Copying from pinned memory does not block the CPU.
            host = batch.contiguous()
            buffers.input.copy_(host.pin_memory() if host.device.type == "cpu" else host, non_blocking=True)
            if buffers.graph is not None:
                buffers.graph.replay()
            else:
                self._bind(buffers)
                self._start(buffers)
            outputs = {name: buffers.outputs[name][:count].clone() for name in OUTPUTS[self.engine.outputs]}
        reader = torch.cuda.current_stream(self.device)
        reader.wait_stream(self.stream)
        for output in outputs.values():
            output.record_stream(reader)
        return outputs

    def _context(self) -> Any:
        with torch.cuda.device(self.device):
            if self.engine.library == "tensorrt-rtx":
                settings = self.opened.create_runtime_config()
                settings.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                context = self.opened.create_execution_context(settings)
            else:
                context = self.opened.create_execution_context()
        if context is None:
            raise PredictorError(
                f"The engine in {self.engine.folder} cannot be prepared, usually for lack of GPU memory: "
                "end other programs on it, or build the engine for smaller batches or images."
            )
        return context

    def _prepare(self, shape: tuple[int, ...]) -> Buffers:
        """Allocates buffers for a shape and, with `tensorrt`, captures the graph that fills them."""
        context = self.shared or self._context()
        if not context.set_input_shape(self.engine.input_name, shape):
            raise PredictorError(
                f"The engine in {self.engine.folder} takes inputs of {self.engine.smallest} to {self.engine.largest} "
                f"(batch, channels, height, width), not {shape}."
            )
        buffers = Buffers(
            context,
            self._empty(self.engine.input_name, shape),
            {name: self._empty(name, tuple(context.get_tensor_shape(name))) for name in OUTPUTS[self.engine.outputs]},
        )
        if self.shared is None:
            self._bind(buffers)
            self._start(buffers)  # warm-up: the setup for a new shape cannot be captured
            self.stream.synchronize()
            buffers.graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are captured: other threads post-process on the GPU meanwhile, and in the default
            # mode "global" an allocation of theirs would end the capture with an error.
            with torch.cuda.graph(buffers.graph, stream=self.stream, capture_error_mode="thread_local"):
                self._start(buffers)
        return buffers

    def _empty(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=TYPES[self.opened.get_tensor_dtype(name).name], device=self.device)

    def _bind(self, buffers: Buffers) -> None:
        buffers.context.set_input_shape(self.engine.input_name, tuple(buffers.input.shape))
        for name, tensor in {self.engine.input_name: buffers.input, **buffers.outputs}.items():
            buffers.context.set_tensor_address(name, tensor.data_ptr())

    def _start(self, buffers: Buffers) -> None:
        if not buffers.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise PredictorError(f"The engine in {self.engine.folder} failed on the GPU: its memory may be too small.")


def gpu_here(device: int | None = None) -> str | None:
    """The compute capability of a GPU of this machine, such as "sm86", according to torch; None if there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def why_no_gpu() -> str:
    """The reason why there is no GPU, as the end of a sentence."""
    return "no NVIDIA GPU is found here" if torch.version.cuda else f"torch {torch.__version__} has no CUDA support"


def is_installed(library: str) -> bool:
    """Whether a library, a key of `MODULES`, is installed; does not import it."""
    return importlib.util.find_spec(MODULES[library]) is not None


def import_library(library: str) -> ModuleType:
    """Imports a library, a key of `MODULES`.

    Raises:
        ExportError: it is missing, or cannot be loaded.
    """
    if not is_installed(library):
        raise ExportError(f"{library} is not installed: pip install 'hf-faim2f[{library}]'.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(MODULES[library])
    except (ImportError, OSError) as error:
        raise ExportError(
            f"{library} is installed but cannot be loaded ({error}): reinstall it with "
            f"pip install --force-reinstall 'hf-faim2f[{library}]'."
        ) from None


@functools.cache
def logger_of(trt: Any) -> Any:
    """A logger that collects errors. There is only one, because the library keeps the first logger of the process."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def one_line(text: str) -> str:
    """A library's message on one line, without a period at the end."""
    return " ".join(text.split()).rstrip(".")


__all__ = [
    "DESCRIPTION",
    "ENGINE",
    "MODULES",
    "Engine",
    "EngineRunner",
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
