"""Export formats of other runtimes, one module each in this folder: their properties, and how a folder is written.

A format's module has `write(graph, folder)`, which writes its files, and, where the format runs here,
`open_files(description, contents, device)`, which returns the network. `format.json` describes an exported folder, and
is checked before any other file of it is opened.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import ExportError
from ..files import check_new_folder, new_folder, sha256_of
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..model.remote_code_faim2f import AUTO_MAP, copy_remote_code
from ..version import __version__
from .graph import INPUTS, OUTPUTS, FaiM2FGraph
from .onnx import check_any_size, check_shape, check_words, load_for_export, resizing_to

DESCRIPTION = "format.json"
# Maximum size in bytes of format.json, and of any other file of an export; real ones are far smaller.
LARGEST_DESCRIPTION, LARGEST_FILE = 1 << 20, 1 << 32


@dataclass(frozen=True)
class Format:
    """An export format.

    Args:
        title: its name in prose.
        library: the converter's import name.
        extra: the extra of this package that installs it.
        files: what is written, relative to the folder; the first one identifies the format.
        precisions: supported precisions of the network, as on the command line.
        any_size: whether image size and batch size can be dynamic.
        runs: this package's runtime for the files, a key of `runtime.RUNTIMES`; None if there is none.
        elsewhere: other targets for the files, which are not tested.
    """

    title: str
    library: str
    extra: str
    files: tuple[str, ...]
    precisions: tuple[str, ...]
    any_size: bool
    runs: str | None
    elsewhere: str


FORMATS = {
    "openvino": Format(
        "OpenVINO",
        "openvino",
        "openvino",
        ("openvino_model.xml", "openvino_model.bin"),
        ("fp32", "fp16", "bf16"),
        True,
        "openvino",
        "Intel's GPUs and NPUs, and ARM CPUs",
    ),
    "executorch": Format(
        "ExecuTorch",
        "executorch",
        "executorch",
        ("model.pte",),
        ("fp32",),
        False,
        "executorch",
        "phones, in an app with ExecuTorch and XNNPACK",
    ),
    "litert": Format(
        "LiteRT",
        "litert_torch",
        "litert",
        ("model.tflite",),
        ("fp32",),
        False,
        "litert",
        "Android and iOS, with LiteRT in the app",
    ),
    "coreml": Format(
        "Core ML",
        "coremltools",
        "coreml",
        (
            "model.mlpackage/Manifest.json",
            "model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
            "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        ),
        ("fp32", "fp16"),
        False,
        None,
        "iOS 16, macOS 13 and later",
    ),
}


@dataclass(frozen=True)
class Description:
    """The contents of `format.json`.

    Args:
        folder: folder of the files.
        format: a key of `FORMATS`.
        outputs: a key of `graph.OUTPUTS`.
        input_name: one of `graph.INPUTS`.
        shape: the input's (B, num_channels, H, W), None where it is dynamic.
        precision: one of the format's.
        sha256: SHA-256 of each of the format's files.
    """

    folder: Path
    format: str
    outputs: str
    input_name: str
    shape: tuple[int | None, ...]
    precision: str
    sha256: Mapping[str, str]


def export_format(
    name: str,
    model: str | Path,
    out_dir: str | Path,
    outputs: str = "logits",
    input_name: str = "pixel_values",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    precision: str = "fp32",
    verify: bool = True,
) -> list[str]:
    """Writes `out_dir` with a format's files, `format.json`, the configuration and the image processor.

    Args:
        name: a key of `FORMATS`.
        model: a folder, published name or Hub id.
        out_dir: a folder that does not exist yet.
        outputs, input_name: see `FaiM2FGraph`.
        size: (height, width) in pixels, to which the saved image processor resizes; None for any size, if the format
            allows it.
        batch: the batch size; None for any, or for 1 if the format needs a fixed one.
        precision: one of the format's; inputs and outputs have the same types in all.
        verify: run the files and compare them with torch before keeping them, if there is a runtime for the format.

    Returns:
        What was verified, one sentence per line.

    Raises:
        ExportError, OSError: the export failed, or cannot be written; nothing is left behind.
    """
    out_dir = Path(out_dir)
    check_words(("format", name, FORMATS))
    row = FORMATS[name]
    check_words(("outputs", outputs, OUTPUTS), ("input", input_name, INPUTS), ("precision", precision, row.precisions))
    if not row.any_size:
        if size is None:
            raise ExportError(f"{row.title} needs a fixed image size: pass one, such as --size 640x640.")
        batch = 1 if batch is None else batch
    check_shape(size, batch)
    check_new_folder(out_dir, ExportError)
    module = _module(name)
    network, processor = load_for_export(model, input_name)
    if size is None:
        check_any_size(model, network.config.backbone_config)
    else:
        processor = resizing_to(processor, size)
    # The network is converted in float32; the format's module reduces its precision.
    graph = FaiM2FGraph(network, processor, outputs, input_name, "fp32", batch, size)
    with new_folder(out_dir) as staging:
        module.write(graph, staging, precision)
        _describe(staging, name, graph, precision)
        network.config.auto_map = dict(AUTO_MAP)
        network.config.save_pretrained(staging)
        processor.save_pretrained(staging)
        copy_remote_code(staging)
        graph.precision = precision
        lines = _check(staging, graph, network, processor) if verify and row.runs else []
    return lines


def _module(name: str) -> Any:
    """The module of a format.

    Raises:
        ExportError: its library is not installed.
    """
    row = FORMATS[name]
    if importlib.util.find_spec(row.library) is None:
        raise ExportError(
            f"{row.title} needs {row.library}, which is not installed: pip install 'hf-faim2f[{row.extra}]'."
        )
    return import_module(f".{name}", __package__)


def _describe(folder: Path, name: str, graph: FaiM2FGraph, precision: str) -> None:
    row = FORMATS[name]
    batch, (height, width) = graph.batch, graph.size or (None, None)
    values = {
        "format": name,
        "outputs_kind": graph.outputs,
        "input": {"name": graph.input_name, "shape": [batch, graph.config.num_channels, height, width]},
        "outputs": list(OUTPUTS[graph.outputs]),
        "precision": precision,
        "labels": [graph.config.id2label[i] for i in range(graph.config.num_labels)],
        "versions": {
            "hf_faim2f": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            row.library: metadata.version(row.library),
        },
        "files": {
            file: {"sha256": sha256_of(folder / file), "bytes": (folder / file).stat().st_size} for file in row.files
        },
    }
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check(
    folder: Path, graph: FaiM2FGraph, model: FaiM2FForUniversalSegmentation, processor: FaiM2FImageProcessor
) -> list[str]:
    """Opens the files as the runtime does, and compares them with the model in float64."""
    from .check import Exported, check

    description = read_description(folder)
    run = open_exported(description)
    exported = Exported(
        str(FORMATS[description.format].runs),
        lambda inputs: {name: values.numpy() for name, values in run(inputs).items()},
    )
    return check(exported, graph, model, processor)


def read_description(folder: Path, name: str | None = None) -> Description:
    """Reads the description of an exported folder, without reading the format's files.

    Args:
        folder: what `export_format` wrote.
        name: the expected format; None for any.

    Raises:
        ExportError: a file is missing, or the folder was not written by `export_format`, or has another format.
    """
    path = folder / DESCRIPTION
    for file in (DESCRIPTION, *(FORMATS[name].files if name else ())):
        if not (folder / file).is_file():
            raise ExportError(
                f"There is no file {folder / file}: `faim2f export {name or 'FORMAT'}` writes a folder that has it."
            )
    if path.stat().st_size > LARGEST_DESCRIPTION:
        raise ExportError(f"{path} is too large for a description of an export: export the model again.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        row = FORMATS[values["format"]]
        shape = tuple(None if side is None else int(side) for side in values["input"]["shape"])
        found = Description(
            folder=folder,
            format=values["format"],
            outputs=values["outputs_kind"],
            input_name=values["input"]["name"],
            shape=shape,
            precision=values["precision"],
            sha256={file: str(values["files"][file]["sha256"]) for file in row.files},
        )
        sides = len(shape) == 4 and shape[1] is not None and (shape[2] is None) == (shape[3] is None)
        sides = sides and all(side is None or side > 0 for side in shape)
        known = found.outputs in OUTPUTS and found.input_name in INPUTS and found.precision in row.precisions
        if not (sides and known and name in (None, found.format)):
            raise ValueError("it has invalid values")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ExportError(f"{path} does not describe an export ({error!r}): export the model again.") from None
    return found


def open_exported(description: Description, device: str | None = None) -> Callable[[Tensor], dict[str, Tensor]]:
    """Opens an export in its runtime; returns its network.

    Args:
        description: of the folder, from `read_description`.
        device: one of the runtime's; None for the CPU.

    Returns:
        A function from the input (B, num_channels, H, W) on the CPU to the outputs by name, on the CPU.

    Raises:
        ExportError: the files are not those that the description names, or the runtime cannot open them.
    """
    row = FORMATS[description.format]
    if row.runs is None:
        raise ExportError(f"This package has no runtime for {row.title}: its files are for {row.elsewhere}.")
    module = _module(description.format)
    contents = {file: _read(description, file) for file in row.files}
    return module.open_files(description, contents, device)


def _read(description: Description, file: str) -> bytes:
    """The contents of one of a format's files, compared with its SHA-256."""
    path = description.folder / file
    if not path.is_file():  # reading a pipe would block
        raise ExportError(f"There is no file {path}: export the model again.")
    with path.open("rb") as opened:
        content = opened.read(min(path.stat().st_size, LARGEST_FILE) + 1)
    if sha256_of(content) != description.sha256[file]:
        raise ExportError(
            f"{path} is not the file that {DESCRIPTION} describes (its SHA-256 differs): copy the whole folder "
            "again, or export the model again."
        )
    return content


def check_tensors(
    description: Description, inputs: Sequence[tuple[str, Sequence[int | None]]], outputs: Sequence[str]
) -> None:
    """Compares the tensors of a file with the description.

    Args:
        description: of the file's folder.
        inputs: the name and the shape of each input, None where it is dynamic.
        outputs: the name of each output.

    Raises:
        ExportError: they differ.
    """
    wanted = list(OUTPUTS[description.outputs])
    if [(name, tuple(shape)) for name, shape in inputs] != [(description.input_name, description.shape)] or (
        sorted(outputs) != sorted(wanted)
    ):
        path = description.folder / FORMATS[description.format].files[0]
        raise ExportError(f"{path} has different inputs or outputs than {DESCRIPTION} states: export the model again.")


__all__ = [
    "DESCRIPTION",
    "FORMATS",
    "Description",
    "Format",
    "check_tensors",
    "export_format",
    "open_exported",
    "read_description",
]
