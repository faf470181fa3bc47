"""`faim2f export onnx`: exports a model to a folder with `model.onnx`, which is written atomically.

transformers 5.x has its own exporter, `transformers.exporters.OnnxExporter`; with 4.57 Optimum's is used. Their graphs
are simplified in the same way, and have the same names, shapes and results.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..download import has_weights
from ..errors import ExportError, first_line
from ..files import check_new_folder, new_folder
from ..model.configuration_faim2f import FaiM2FConfig, FaiM2FResNetConfig, STDCConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor, resized_size
from ..model.image_settings_faim2f import takes_fractions
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..model.remote_code_faim2f import AUTO_MAP, copy_remote_code
from ..version import __version__
from ..zoo import RUNTIME_FILES, model_type, open_model, open_settings

OPSETS = range(18, 21)  # supported by both exporters
SMALLEST_SIDE, LARGEST_SIDE = 32, 8192
# The aspect ratio of the longest photographs that an engine of default sizes takes: 16:9 and 2:1 fit.
WIDEST = 2
# Backbones (by model type) whose graphs were verified at other sizes than that of the export. With others, an exporter
# may not terminate, or may make branches that depend on the size constant.
ANY_SIZE = (STDCConfig.model_type, FaiM2FResNetConfig.model_type, "resnet", "rt_detr_resnet", "swin")


def export_onnx(
    model: str | Path,
    out_dir: str | Path,
    outputs: str = "logits",
    input_name: str = "pixel_values",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    precision: str = "fp32",
    opset: int = 18,
    verify: bool = True,
) -> list[str]:
    """Writes `out_dir` with `model.onnx`, the configuration, the image processor and their code.

    Args:
        model: a folder or Hub id of a `faim2f` model.
        out_dir: a folder that does not exist yet.
        outputs, input_name, precision: see `FaiM2FGraph`.
        size: (height, width) in pixels, to which the saved image processor resizes; None for any size.
        batch: the batch size; None for any.
        opset: 18 to 20.
        verify: run the file in ONNX Runtime and compare it with torch before keeping it.

    Returns:
        What was verified, one sentence per line.

    Raises:
        ExportError, OSError: the export failed, or cannot be written; nothing is left behind.
    """
    out_dir = Path(out_dir)
    _check_request(out_dir, outputs, input_name, size, batch, precision, opset)
    check_libraries()
    network, processor = load_for_export(model, input_name)
    if size is None:
        check_any_size(model, network.config.backbone_config)
    else:
        processor = resizing_to(processor, size)
    with new_folder(out_dir) as staging:
        lines = _write(staging, network, processor, outputs, input_name, precision, batch, size, opset, verify)
    return lines


def _check_request(
    out_dir: Path,
    outputs: str,
    input_name: str,
    size: tuple[int, int] | None,
    batch: int | None,
    precision: str,
    opset: int,
) -> None:
    from .graph import INPUTS, OUTPUTS, PRECISIONS

    check_words(("outputs", outputs, OUTPUTS), ("input", input_name, INPUTS), ("precision", precision, PRECISIONS))
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} cannot be written: choose {OPSETS.start} to {OPSETS.stop - 1}, of which "
            f"{OPSETS.start} is supported most widely."
        )
    check_shape(size, batch)
    check_new_folder(out_dir, ExportError)


def check_words(*rows: tuple[str, str, Iterable[str]]) -> None:
    """Raises ExportError unless each row's value is one of its words: (name, value, words)."""
    for name, value, known in rows:
        if value not in known:
            raise ExportError(f"{name} must be one of {', '.join(known)}, not {value!r}.")


def check_shape(size: tuple[int, int] | None, batch: int | None) -> None:
    """Raises ExportError for a fixed size (height, width) or batch size that no graph can have."""
    if size is not None and not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in size):
        raise ExportError(
            f"size {size[0]}x{size[1]} (height x width) is not supported: each side must have "
            f"{SMALLEST_SIDE} to {LARGEST_SIDE} pixels."
        )
    if batch is not None and batch < 1:
        raise ExportError(f"batch must be at least 1 or dynamic, not {batch}.")


def check_any_size(model: str | Path, backbone: PretrainedConfig) -> None:
    """Raises ExportError if a backbone cannot be exported for images of any size."""
    reason = None
    if backbone.model_type not in ANY_SIZE:
        reason = f"is of type {backbone.model_type!r}, and not one of {', '.join(ANY_SIZE)}"
    elif getattr(backbone, "use_absolute_embeddings", False):
        reason = "has position embeddings of one size (use_absolute_embeddings)"
    if reason is not None:
        raise ExportError(
            f"{model} cannot be exported for images of any size, because its backbone {reason}: name the size, such as "
            "--size 640x640."
        )


def defers_guards(config: PretrainedConfig) -> bool:
    """Whether torch cannot prove its guards for all sizes: about the levels of deformable attention, or the pooling of
    ResNet d, which rounds up. The graph is verified at several sizes instead."""
    return config.pixel_decoder_type == "deformable" or config.backbone_config.model_type == "rt_detr_resnet"


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _has_own_exporter() -> bool:
    """Whether transformers has an exporter (5.x); else Optimum's is used."""
    return _has("transformers.exporters.exporter_onnx")


def check_libraries() -> None:
    """Raises ExportError if a library is missing that exporting to ONNX needs."""
    extra, needed = "onnx", ["onnx", "onnxruntime", "onnxscript"]
    if not _has_own_exporter():
        extra = "optimum"
        needed.append("optimum.exporters.onnx")
    missing = [name for name in needed if not _has(name)]
    if missing:
        raise ExportError(
            f"exporting to ONNX needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed: pip install 'hf-faim2f[{extra}]'."
        )


def load_for_export(source: str | Path, input_name: str) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor]:
    """Opens the model and its image processor.

    Raises:
        ExportError: the model cannot be opened, or is of another type; or its images are no bytes, as "image" is.
    """
    if Path(source).is_dir():
        _check_source(Path(source))
    settings: dict[str, Any] = open_settings(source, error=ExportError)[1].to_dict()
    if input_name == "image" and takes_fractions(settings):
        raise ExportError(
            f"The image processor of {source} takes pixels in 0..1 (do_rescale is false, image_mean is "
            f"{settings['image_mean']}), which a graph of bytes (input 'image') would round to 0 or 1: export it with "
            "the input 'pixel_values'."
        )
    return open_model(source, error=ExportError)


def _check_source(folder: Path) -> None:
    """Raises ExportError if a folder holds an export, or a model of another type."""
    exported = [file for file in RUNTIME_FILES.values() if (folder / file).is_file()]
    if exported and not has_weights(folder):
        raise ExportError(f"{folder} is an export already (it has {exported[0]}): name the folder of its model.")
    kind = model_type(folder, ExportError)
    if kind != FaiM2FConfig.model_type:
        raise ExportError(
            f"{folder} holds a model of type {kind!r}, and only {FaiM2FConfig.model_type!r} can be exported: convert "
            "checkpoints of other libraries with `faim2f convert` first."
        )


def resizing_to(processor: FaiM2FImageProcessor, size: tuple[int, int]) -> FaiM2FImageProcessor:
    """The same image processor, which resizes all images to `size`, (height, width), and does not pad them."""
    settings: dict[str, Any] = processor.to_dict()
    settings.update(do_resize=True, size={"height": size[0], "width": size[1]}, size_divisor=0, pad_size=None)
    return FaiM2FImageProcessor.from_dict(settings)


def sizes_of_photographs(processor: FaiM2FImageProcessor) -> tuple[tuple[int, int], ...]:
    """Smallest, usual and largest (height, width) to which a processor resizes images of up to `WIDEST`, both ways.

    Raises:
        ExportError: it makes them larger than an image may be.
    """
    try:
        usual, wide, high = (
            resized_size(height, width, processor.size, processor.size_divisor or 0)
            for height, width in ((1000, 1000), (1000, 1000 * WIDEST), (1000 * WIDEST, 1000))
        )
    except ValueError as error:
        raise ExportError(f"no range of sizes follows from the image processor ({error}): name one.") from error
    least = min(2 * SMALLEST_SIDE, *processor.size.values(), *usual, *wide, *high)
    height, width = (min(max(sides), LARGEST_SIDE) for sides in zip(usual, wide, high, strict=True))
    return (least, least), usual, (height, width)


def _write(
    folder: Path,
    network: FaiM2FForUniversalSegmentation,
    processor: FaiM2FImageProcessor,
    outputs: str,
    input_name: str,
    precision: str,
    batch: int | None,
    size: tuple[int, int] | None,
    opset: int,
    verify: bool,
) -> list[str]:
    from .check import check
    from .graph import FaiM2FGraph

    graph = FaiM2FGraph(network, processor, outputs, input_name, precision, batch, size)
    path = folder / "model.onnx"
    write_graph(graph, path, opset)
    network.config.auto_map = dict(AUTO_MAP)
    network.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    copy_remote_code(folder)
    return check(path, graph, network, processor) if verify else []


def write_graph(graph: Any, path: Path, opset: int = 18) -> None:
    """Exports a `FaiM2FGraph` to the ONNX file `path`, without verifying it.

    Raises:
        ExportError: the exporter does not support this model, or the graph takes more bytes than an ONNX file can hold.
    """
    from .candidates import keep_candidates
    from .graph_file import clean

    dimensions = graph.dimensions()
    try:
        if _has_own_exporter():
            exported = _export_by_transformers(graph, dimensions, opset)
        else:
            from .optimum import export_graph

            exported = export_graph(graph, dimensions, opset, path)
        clean(exported, dimensions)
        if graph.outputs == "semantic":
            keep_candidates(exported, graph.config.num_labels)
    except (ExportError, OSError):
        raise
    except Exception as error:  # of torch's exporter, or a graph of another structure than expected
        advice = "" if graph.size is not None else ", or name a --size"
        raise ExportError(
            f"this model, with a backbone of type {graph.config.backbone_config.model_type!r}, cannot be exported to "
            f"ONNX ({first_line(error)}), and nothing was kept: please report it with the model's config.json{advice}."
        ) from error
    _describe(exported, graph)
    _save(exported, path)


def _export_by_transformers(graph: Any, dimensions: dict[str, list[int | str]], opset: int) -> Any:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    from .graph import quietly

    sides = dimensions[graph.input_name]
    # The minimum is two cells of the coarsest level, below which torch would specialize. Smaller sizes also work.
    open_axes = {
        axis: torch.export.Dim(side, min=1 if side == "batch" else 2 * SMALLEST_SIDE)
        for axis, side in enumerate(sides)
        if isinstance(side, str)
    }
    config = OnnxConfig(
        opset_version=opset,
        dynamic_shapes={graph.input_name: open_axes} if open_axes else None,
        prefer_deferred_runtime_asserts_over_guards=defers_guards(graph.config),
    )
    with quietly(), torch.no_grad():
        made = OnnxExporter().export(graph, graph.sample(), config=config)
    # Earlier 5.x, such as 5.20, the last version for Python 3.10, returns torch's ONNXProgram.
    return made.model if isinstance(made, torch.onnx.ONNXProgram) else made.program


def _describe(exported: Any, graph: Any) -> None:
    """Describes the graph in its metadata, for programs that only have the file."""
    exported.producer_name, exported.producer_version = "hf_faim2f", __version__
    exported.metadata_props.update(
        {"faim2f.outputs": graph.outputs, "faim2f.input": graph.input_name, "faim2f.precision": graph.precision}
    )


def _save(exported: Any, path: Path) -> None:
    """Saves a single file with the weights inside: every runtime reads it, and all models are far smaller than 2 GB."""
    import onnx
    import onnx_ir

    proto = onnx_ir.serde.serialize_model(exported)
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ExportError(f"the graph takes {proto.ByteSize()} bytes, more than an ONNX file can hold.")
    onnx.save(proto, path)


__all__ = [
    "LARGEST_SIDE",
    "SMALLEST_SIDE",
    "check_any_size",
    "check_libraries",
    "check_shape",
    "check_words",
    "defers_guards",
    "export_onnx",
    "load_for_export",
    "resizing_to",
    "sizes_of_photographs",
    "write_graph",
]
