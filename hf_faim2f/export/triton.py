"""`faim2f export triton`: writes a model repository for NVIDIA's Triton Inference Server, atomically.

The model's configuration follows Triton's `model_config.proto`. Graphs run in its ONNX Runtime back end, and engines of
the library `tensorrt` in its TensorRT back end.
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..download import has_weights
from ..errors import ExportError
from ..files import check_new_folder, new_folder, printable
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from .engine import DESCRIPTION, read_description, read_engine

# No output names the file of labels: Triton would attach a label to the place of a value, not to the value, which is
# the class.
CONFIG, LABELS, VERSION = "config.pbtxt", "labels.txt", "1"
# Triton's name of each type of tensor that our graphs have.
TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "int64": "TYPE_INT64"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LARGEST_BATCH, MILLISECONDS = 8, 5.0


@dataclass(frozen=True)
class Network:
    """A graph or an engine as Triton sees it.

    Args:
        backend: "onnxruntime" or "tensorrt".
        file: the name that the back end expects.
        content: the file's bytes.
        kind: a key of `graph.OUTPUTS`.
        inputs, outputs: type and shape of each tensor by name; -1 for a dynamic dimension.
        largest_batch: the largest batch of an engine; None for a graph.
    """

    backend: str
    file: str
    content: bytes
    kind: str
    inputs: Mapping[str, tuple[str, Sequence[int]]]
    outputs: Mapping[str, tuple[str, Sequence[int]]]
    largest_batch: int | None = None


def export_triton(
    source: str | Path,
    out_dir: str | Path,
    name: str | None = None,
    largest_batch: int | None = None,
    milliseconds: float = MILLISECONDS,
    verify: bool = True,
    **graph: Any,
) -> list[str]:
    """Writes `out_dir`, a model repository with one model.

    It has `NAME/config.pbtxt`, `NAME/labels.txt` (a class a line), `NAME/1/model.onnx` or `model.plan`, and the
    configuration and image processor beside them, for clients.

    Args:
        source: a model, which is exported to ONNX first; or a folder written by `export_onnx` or `export_tensorrt`.
        out_dir: a folder that does not exist yet.
        name: the model's name in Triton; None for that of the source.
        largest_batch: the largest batch that Triton forms from requests; None for `LARGEST_BATCH` or an engine's own.
            Networks with a fixed batch size are served without batching.
        milliseconds: how long a request waits for others to share its batch.
        verify: compare the ONNX graph exported from a model with torch.
        graph: `outputs`, `input_name`, `size`, `batch` and `precision` of `export_onnx`, for a model.

    Returns:
        What was verified and written, one sentence per line.

    Raises:
        ExportError, OSError: the export failed, or cannot be written; nothing is left behind.
    """
    from .graph_file import check_labels, read_settings
    from .onnx import export_onnx

    source, out_dir = Path(source), Path(out_dir)
    check_new_folder(out_dir, ExportError)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.absolute().name).lstrip("._-") if name is None else name
    if not NAME.fullmatch(name):
        raise ExportError(f"{name!r} cannot be a model's name in Triton: choose letters, digits, '.', '_' and '-'.")
    if largest_batch is not None and largest_batch < 1:
        raise ExportError(f"The largest batch must be at least 1, not {largest_batch}.")
    is_engine = (source / DESCRIPTION).is_file()
    is_graph = (source / "model.onnx").is_file() and not has_weights(source)
    if (is_engine or is_graph) and graph:
        names = " and ".join("input" if option == "input_name" else option for option in graph)
        raise ExportError(f"{source} is an export already, whose {names} cannot be chosen: name the model's folder.")
    lines = []
    beside = tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent)
    with beside as between, new_folder(out_dir) as staging:
        folder = source
        if not is_engine and not is_graph:
            folder = Path(between) / "onnx"
            lines += export_onnx(str(source), folder, verify=verify, **graph)
        network = _engine(folder) if is_engine else _graph(folder / "model.onnx")
        config, processor = read_settings(folder)
        if is_engine:
            check_labels(folder / DESCRIPTION, config)
        lines += _write(staging / name, network, config, processor, largest_batch, milliseconds)
    return lines


def _graph(path: Path) -> Network:
    from .graph_file import kind_of, load_model

    model, content = load_model(path)
    import onnx

    def tensors(values: Any) -> dict[str, tuple[str, list[int]]]:
        found = {}
        for value in values:
            tensor = value.type.tensor_type
            sides = [side.dim_value if side.HasField("dim_value") else -1 for side in tensor.shape.dim]
            found[value.name] = (str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), sides)
        return found

    kind = kind_of(model, path)
    return Network("onnxruntime", "model.onnx", content, kind, tensors(model.graph.input), tensors(model.graph.output))


def _engine(folder: Path) -> Network:
    engine = read_description(folder)
    if engine.library != "tensorrt":
        raise ExportError(
            f"{folder} was built by {engine.library}, and Triton opens engines of the library tensorrt alone: export "
            "the engine with --library tensorrt on the GPU that will run it."
        )
    values = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    try:
        inputs, outputs = (
            {one["name"]: (one["type"], [int(side) for side in one["shape"]]) for one in values[key]}
            for key in ("inputs", "outputs")
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ExportError(f"{folder / DESCRIPTION} does not describe an engine ({error!r}): export it again.") from None
    if engine.smallest[0] > 1 and engine.largest[0] > engine.smallest[0]:
        raise ExportError(
            f"The engine in {folder} takes {engine.smallest[0]} to {engine.largest[0]} images at once, and Triton's "
            "batches have any size from 1: export it with --batches from 1, or with a single batch size."
        )
    content = read_engine(engine)
    return Network("tensorrt", "model.plan", content, engine.outputs, inputs, outputs, engine.largest[0])


def _write(
    folder: Path,
    network: Network,
    config: FaiM2FConfig,
    processor: FaiM2FImageProcessor,
    largest_batch: int | None,
    milliseconds: float,
) -> list[str]:
    is_dynamic = all(shape[0] == -1 for _, shape in (*network.inputs.values(), *network.outputs.values()))
    if largest_batch is not None and not is_dynamic:
        raise ExportError(
            "The network has a fixed batch size, which Triton cannot change: leave the largest batch out."
        )
    if largest_batch is not None and largest_batch > (network.largest_batch or largest_batch):
        raise ExportError(f"The engine takes at most {network.largest_batch} images at once, not {largest_batch}.")
    batch = (largest_batch or network.largest_batch or LARGEST_BATCH) if is_dynamic else 0
    (folder / VERSION).mkdir(parents=True)
    (folder / VERSION / network.file).write_bytes(network.content)
    labels = [printable(config.id2label[class_id]) for class_id in range(config.num_labels)]
    (folder / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    (folder / CONFIG).write_text(config_text(folder.name, network, batch, milliseconds), encoding="utf-8")
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in folder.glob("*.py"):  # Triton's back ends do not use the model code
        path.unlink()
    what = f"batches of up to {batch}" if batch else "no batching, because the network's batch size is fixed"
    return [f"{folder.name}: for Triton's {network.backend} back end, with {what}; no server has run it"]


def config_text(name: str, network: Network, batch: int, milliseconds: float) -> str:
    """The model's configuration in protobuf's text format.

    Args:
        name: the model's name.
        network: the network to serve.
        batch: the largest batch; Triton adds the batch axis to all shapes. 0 if the shapes include that axis.
        milliseconds: the longest wait for a batch.

    Raises:
        ExportError: Triton does not support the type of a tensor.
    """

    def tensor(key: str, entry: str, type_name: str, shape: Sequence[int]) -> str:
        if type_name not in TYPES:
            raise ExportError(f"{entry} has the type {type_name}, and Triton's configuration has {', '.join(TYPES)}.")
        dims = ", ".join(map(str, shape[1:] if batch else shape))
        rows = [f"name: {json.dumps(entry)}", f"data_type: {TYPES[type_name]}", f"dims: [ {dims} ]"]
        inner = "".join(f"    {row}\n" for row in rows)
        return f"{key} [\n  {{\n{inner}  }}\n]"

    parts = [f"name: {json.dumps(name)}", f"backend: {json.dumps(network.backend)}", f"max_batch_size: {batch}"]
    for key, tensors in (("input", network.inputs), ("output", network.outputs)):
        parts += [tensor(key, entry, *described) for entry, described in tensors.items()]
    if batch:
        parts.append(f"dynamic_batching {{\n  max_queue_delay_microseconds: {round(1000 * milliseconds)}\n}}")
    parts.append(f'parameters {{\n  key: "faim2f.outputs"\n  value {{ string_value: {json.dumps(network.kind)} }}\n}}')
    return "\n".join([*parts, ""])


__all__ = ["config_text", "export_triton"]
