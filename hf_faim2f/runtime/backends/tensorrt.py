"""The network as a TensorRT engine, from a folder that `faim2f export tensorrt` wrote; needs the GPU that it is for.

Input and outputs are torch's tensors on the GPU, which the engine reads and writes where they are; nothing but the
input goes there, and nothing but what the post-processing asks for comes back. What a batch of one shape makes the GPU
do is recorded once as a CUDA graph and then started as one. `tensorrt-rtx` compiles kernels while it runs, and so
records its graphs itself.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ExportError, PredictorError
from ...export.engine import Engine, open_engine, read_description
from ...export.graph import OUTPUTS
from ...zoo import open_settings
from ..network import Network

# Shapes whose buffers and graphs are kept, the last used.
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


def open_network(name: str, device: str | None = None) -> Network:
    """The engine, ready to run.

    Args:
        name: a folder with `model.engine`, `engine.json`, the model's configuration and its image processor. An engine
            is a program: open only those that you or somebody you trust built.
        device: "cuda" or "cuda:N"; None for the first.

    Raises:
        PredictorError: there is no such folder or GPU, or the engine is for another GPU or library.
    """
    matched = re.fullmatch(r"cuda(?::(\d+))?", device or "cuda")
    if matched is None:
        raise PredictorError(f"device must be cuda or cuda:N for tensorrt, not {device!r}.")
    index = int(matched[1] or 0)
    try:
        engine = read_description(Path(name))
        config, processor = open_settings(name, error=PredictorError)
        if torch.cuda.is_available() and index >= torch.cuda.device_count():
            raise PredictorError(f"There is no device {device!r} here, only {torch.cuda.device_count()} of CUDA.")
        trt, opened = open_engine(engine, index)
    except ExportError as error:
        raise PredictorError(str(error)) from error
    runner = Runner(trt, opened, engine, torch.device("cuda", index))
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


@dataclass
class Buffers:
    """What the engine reads and writes for one shape, and how it is started."""

    context: Any  # the library's, which holds the intermediate results
    input: Tensor
    outputs: dict[str, Tensor]
    graph: Any = None  # torch.cuda.CUDAGraph, where this file records it


class Runner:
    """An opened engine that turns (B, 3, H, W) into its outputs.

    One batch at a time: a second call while one runs in another thread would write into the same buffers.
    """

    def __init__(self, trt: Any, opened: Any, engine: Engine, device: torch.device) -> None:
        self.trt, self.opened, self.engine, self.device = trt, opened, engine, device
        self.stream = torch.cuda.Stream(device)
        self.shapes: OrderedDict[tuple[int, ...], Buffers] = OrderedDict()
        # A recorded graph holds its context to the shape that it was recorded with, so that each shape has its own.
        # One that records for itself has one for all, and with it the kernels that it has compiled.
        self.shared = self._context() if engine.library == "tensorrt-rtx" else None

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """The outputs by name, on the GPU, in memory of their own.

        Raises:
            PredictorError: the engine does not take this shape, or fails.
        """
        count = len(batch)
        if count < self.engine.smallest[0]:  # filled up by copies of the last image, which are left out again
            batch = torch.cat([batch, batch[-1:].expand(self.engine.smallest[0] - count, -1, -1, -1)])
        shape = tuple(batch.shape)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            # Earlier work may still read or write what is used here.
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            if shape not in self.shapes:
                if len(self.shapes) == MOST_SHAPES:
                    self.shapes.popitem(last=False)
                self.shapes[shape] = self._prepare(shape)
            self.shapes.move_to_end(shape)
            buffers = self.shapes[shape]
            # Pinned memory is what a GPU can fetch while the processor goes on.
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
                f"The engine in {self.engine.folder} cannot be made ready, as a rule for want of memory on the GPU: "
                "end other programs there, or build it for fewer or smaller images."
            )
        return context

    def _prepare(self, shape: tuple[int, ...]) -> Buffers:
        """Buffers for a shape; and, with `tensorrt`, the recorded graph that fills them."""
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
            self._start(buffers)  # what is set up for a new shape cannot be recorded
            self.stream.synchronize()
            buffers.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(buffers.graph, stream=self.stream):
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


__all__ = ["open_network"]
