"""`faim2f export tensorrt`: builds a folder with `model.engine`, atomically, from a model or its ONNX graph.

Two NVIDIA libraries with the same API build engines. `tensorrt-rtx` builds ahead of time for GPUs that need not be
present. `tensorrt` builds for the GPU of this machine, on which it times candidate kernels. Networks are strongly
typed: all types are those of the graph. (By default, both libraries may multiply float32 in TF32.)
"""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ..download import has_weights
from ..errors import ExportError, PredictorError
from ..files import check_new_folder, new_folder, sha256_of, write_whole
from ..model.image_processing_faim2f import FaiM2FImageProcessor, resized_size, scale_and_shift
from ..model.remote_code_faim2f import copy_remote_code
from ..version import __version__
from .check import LEVELS, MOST
from .engine import (
    DESCRIPTION,
    ENGINE,
    MODULES,
    EngineRunner,
    gpu_here,
    import_library,
    is_installed,
    logger_of,
    one_line,
    open_engine,
    read_description,
    why_no_gpu,
)
from .onnx import LARGEST_SIDE, SMALLEST_SIDE, export_onnx, sizes_of_photographs

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
AHEAD_OF_TIME = ("sm75", "sm80", "sm86", "sm89", "sm120")
GPUS = ("current", *AHEAD_OF_TIME)
BEFORE_BFLOAT16 = ("sm75",)
# GPUs on which `tensorrt-rtx` does not support float32 matrix products, according to its support matrix.
WITHOUT_FLOAT32_PRODUCTS = ("sm75",)
# Default minimum, most frequent and maximum values of dimensions that the graph leaves dynamic. The sizes are for image
# processors that do not resize; for others see `sizes_of_photographs`.
BATCHES = (1, 1, 8)
SIZES = ((64, 64), (640, 640), (1024, 1024))
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # other types have their own names, in lowercase
MOST_REFUSALS = 5


@dataclass(frozen=True)
class Request:
    """A validated request for an engine."""

    library: str
    trt: Any  # the library
    gpu: str
    precision: str | None
    batches: Sequence[int] | None
    sizes: Sequence[tuple[int, int]] | None
    timing_cache: Path | None


def export_tensorrt(
    source: str | Path,
    out_dir: str | Path,
    precision: str | None = None,
    gpu: str = "current",
    library: str | None = None,
    batches: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    timing_cache: str | Path | None = None,
    verify: bool = True,
    **graph: Any,
) -> list[str]:
    """Writes `out_dir` with `model.engine`, its description `engine.json`, the configuration and the image processor.

    Args:
        source: a folder written by `export_onnx`, its `model.onnx`, or a model folder, which is exported to ONNX first.
        out_dir: a folder that does not exist yet.
        precision: "fp32", "fp16", "bf16" or "int8"; None for that of the ONNX graph, or "fp32" for a model. A graph can
            only be built in its own precision, except that fp16 can be built as bf16.
        gpu: one of `GPUS`; "current" for the GPU of this machine.
        library: "tensorrt" or "tensorrt-rtx"; None for the first that is installed and can build for `gpu`.
        batches: minimum, most frequent and maximum batch size, if it is dynamic in the graph.
        sizes: the same for (height, width), if they are dynamic in the graph.
        timing_cache: file from which `tensorrt` reads kernel timings and to which it writes new ones.
        verify: compare the ONNX graph exported from a model with torch.
        graph: `outputs`, `input_name`, `size` and `batch` of `export_onnx`, for a model.

    Returns:
        What was verified and what was not, one sentence per line.

    Raises:
        ExportError, OSError: the export failed, or cannot be written; nothing is left behind.
    """
    source, out_dir = Path(source), Path(out_dir)
    check_new_folder(out_dir, ExportError)
    for name, value, known in (("precision", precision, PRECISIONS), ("gpu", gpu, GPUS), ("library", library, MODULES)):
        if value not in known and not (value is None and name != "gpu"):
            raise ExportError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
    _check_ranges(batches, sizes)
    chosen = _choose_library(library, gpu)
    target = _target(chosen, gpu)
    if precision == "bf16" and target in BEFORE_BFLOAT16:
        raise ExportError(f"{target} (Turing) has no bfloat16: build for it in fp16.")
    if timing_cache is not None and chosen != "tensorrt":
        raise ExportError(f"{chosen} does not time kernels while it builds, and keeps no timing cache: leave that out.")
    cache = None if timing_cache is None else Path(timing_cache)
    if cache is not None and not cache.parent.is_dir():
        raise ExportError(f"{cache.parent} is not a folder; make it first, or name another place for {cache.name}.")
    request = Request(chosen, import_library(chosen), target, precision, batches, sizes, cache)
    path = _graph_file(source)
    if path is not None and graph:
        names = " and ".join("input" if name == "input_name" else name for name in graph)
        raise ExportError(
            f"{path} is a graph already, whose {names} cannot be chosen: name the model's folder instead."
        )
    if path is None and precision == "int8":
        raise ExportError(
            f"int8 is built from an ONNX graph with QuantizeLinear and DequantizeLinear nodes, but {source} is "
            "not an ONNX folder: export it, then let `faim2f quantize --for tensorrt` calibrate it on your images, and "
            "name that folder."
        )
    lines = []
    beside = tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent)
    with beside as between, new_folder(out_dir) as staging:
        if path is None:
            halves = "fp16" if precision in ("fp16", "bf16") else "fp32"
            path = Path(between) / "onnx" / "model.onnx"
            lines += export_onnx(source, path.parent, precision=halves, verify=verify, **graph)
        lines += _write(staging, path, request)
    return lines


def _check_ranges(batches: Sequence[int] | None, sizes: Sequence[tuple[int, int]] | None) -> None:
    if batches is not None and not (len(batches) == 3 and 1 <= batches[0] <= batches[1] <= batches[2]):
        raise ExportError(
            f"batches {':'.join(map(str, batches))} must be smallest:usual:largest, each at least 1 and as large as "
            "the one before."
        )
    if sizes is None:
        return
    ordered = len(sizes) == 3 and all(
        SMALLEST_SIDE <= a <= b <= c <= LARGEST_SIDE for a, b, c in zip(*sizes, strict=True)
    )
    if not ordered:
        raise ExportError(
            f"sizes {':'.join(f'{height}x{width}' for height, width in sizes)} (height x width) must be "
            f"smallest:usual:largest, each side {SMALLEST_SIDE} to {LARGEST_SIDE} pixels and as large as before."
        )


def _choose_library(library: str | None, gpu: str) -> str:
    here = gpu_here()
    installed = [name for name in MODULES if is_installed(name)]
    if library is not None:
        if library not in installed:
            raise ExportError(f"{library} is not installed: pip install 'hf-faim2f[{library}]'.")
        return library
    if "tensorrt" in installed and here is not None and gpu in ("current", here):
        return "tensorrt"
    if "tensorrt-rtx" in installed:
        return "tensorrt-rtx"
    if installed:
        raise ExportError(
            "tensorrt builds engines for the GPU of its machine only, and "
            f"{'there is none here' if here is None else f'that is {here} here'}: to build for {gpu} ahead of time, "
            "pip install 'hf-faim2f[tensorrt-rtx]'."
        )
    raise ExportError(
        "building engines needs tensorrt-rtx, or tensorrt on a machine with a GPU, and neither is installed: "
        "pip install 'hf-faim2f[tensorrt-rtx]'."
    )


def _target(library: str, gpu: str) -> str:
    """The compute capability to build for, such as "sm86"."""
    here = gpu_here()
    if gpu == "current":
        if here is None:
            raise ExportError(
                f"the engine was to be for the GPU of this machine, but {why_no_gpu()}: name the GPU "
                f"that it is for, one of {', '.join(AHEAD_OF_TIME)}, which tensorrt-rtx builds for ahead of time."
            )
        return here
    if library == "tensorrt" and gpu != here:
        raise ExportError(
            f"tensorrt builds engines for the GPU of its machine only, {here or 'of which there is none here'}: to "
            f"build for {gpu}, choose tensorrt-rtx, or run this on a machine with that GPU."
        )
    return gpu


def _graph_file(source: Path) -> Path | None:
    """The ONNX file that `source` is or contains; None if `source` must be a model folder.

    A graph beside weights is not used: it may be of other weights.
    """
    graph = source if source.is_file() else source / "model.onnx"
    return graph if graph.is_file() and not has_weights(source) else None


def _write(folder: Path, path: Path, request: Request) -> list[str]:
    from .graph_file import kind_of, load_model, read_settings

    model, content = load_model(path)
    from .candidates import keep_all

    kind = kind_of(model, path)
    keep_all(model)
    config, processor = read_settings(path.parent)
    precision, products = _take_precision(model, path, request)
    profile = _profile(model, processor, request)
    engine, tensors = _build(model.SerializeToString(), profile, request)
    (folder / ENGINE).write_bytes(engine)
    opset = next((entry.version for entry in model.opset_import if not entry.domain), None)
    described = {
        "outputs_kind": kind,
        "precision": precision,
        "float32_products_in": "float16" if products else "float32 or tf32",
        "gpu": request.gpu,
        **tensors,
        "labels": [config.id2label[i] for i in range(config.num_labels)],
        "library": {"name": request.library, "version": request.trt.__version__},
        "versions": {"hf_faim2f": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "onnx": {"sha256": sha256_of(content), "opset": opset},
        "engine": {"sha256": sha256_of(engine), "bytes": len(engine)},
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(path.parent / name, folder / name)
    copy_remote_code(folder)
    lines = _end_of_sizes(profile, processor)
    if precision == "bf16":
        lines.append("bf16 was made of a graph in fp16; the bf16 outputs were not compared: that needs a GPU")
    if products:
        lines.append(
            f"matrix products that are float32 in the graph ({products}) are float16 in the engine: {request.library} "
            f"has no float32 products for {request.gpu}"
        )
    usual = profile[1] if profile is not None else tensors["inputs"][0]["shape"]
    return [*lines, _try_engine(folder, content, usual, processor, replace(request, precision=precision))]


def _take_precision(model: Any, path: Path, request: Request) -> tuple[str, int]:
    """Changes the graph to the requested precision; returns it and the number of products converted to float16."""
    from .precision import halves_to_bfloat16, precision_of, products_in_half

    found = precision_of(model)
    precision = request.precision or found
    if precision == "int8" != found:
        raise ExportError(
            f"{path} has no QuantizeLinear and DequantizeLinear nodes, of which int8 is built: let "
            f"`faim2f quantize --for tensorrt` calibrate it on your images, or build it in {found}."
        )
    if precision == "bf16" and found == "fp16":
        halves_to_bfloat16(model)
    elif precision != found:
        raise ExportError(
            f"{path} is in {found}, and an engine takes its types from its graph: build it in {found}, or name the "
            f"model's folder to export it in {precision}."
        )
    if request.library == "tensorrt-rtx" and request.gpu in WITHOUT_FLOAT32_PRODUCTS:
        return precision, products_in_half(model)
    return precision, 0


def _profile(model: Any, processor: FaiM2FImageProcessor, request: Request) -> list[tuple[int, ...]] | None:
    """Minimum, most frequent and maximum shape (B, C, H, W) of the input; None if it is fixed in the graph."""
    sides = [side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]  # 0 if it is not fixed
    fixed_batch, channels, height, width = sides
    if fixed_batch and request.batches is not None:
        raise ExportError(f"the graph takes {fixed_batch} images at once and no range of batches: leave that out.")
    if height and width and request.sizes is not None:
        raise ExportError(f"the graph takes images of {height}x{width} and no range of sizes: leave that out.")
    if all(sides):
        return None
    batches = [fixed_batch] * 3 if fixed_batch else request.batches or BATCHES
    if height and width:
        sizes = [(height, width)] * 3
    elif request.sizes is None and processor.do_resize:
        sizes = [*sizes_of_photographs(processor)]
    else:
        sizes = [*(request.sizes or SIZES)]
    if processor.do_resize:
        wanted = processor.size
        sides = [*resized_size(1000, 1000, wanted, processor.size_divisor or 0)]
        lowest, _, highest = sizes
        if not all(low <= side <= high for low, side, high in zip(lowest, sides, highest, strict=True)):
            raise ExportError(
                f"the image processor resizes images to {dict(wanted)}, which is beyond the engine's sizes, "
                f"{lowest[0]}x{lowest[1]} to {highest[0]}x{highest[1]}: name a range of sizes that holds it."
            )
    return [(batch, channels, *size) for batch, size in zip(batches, sizes, strict=True)]


def _end_of_sizes(profile: list[tuple[int, ...]] | None, processor: FaiM2FImageProcessor) -> list[str]:
    """A sentence about the longest images that fit into the engine, if its sizes and the image processor allow some."""
    shortest, longest = processor.size.get("shortest_edge"), processor.size.get("longest_edge")
    if profile is None or profile[0][2:] == profile[2][2:] or not processor.do_resize or shortest is None:
        return []
    height, width = profile[2][2:]
    sides = {"": height} if height == width else {"portrait ": height, "landscape ": width}
    limits = [
        f"{kind}images of up to the aspect ratio {math.floor(100 * side / shortest) / 100:g}:1"
        for kind, side in sides.items()
        if longest is None or longest > side
    ]
    return [f"{' and '.join(limits)} fit into the engine: name larger sizes for longer images"] if limits else []


def _build(graph: bytes, profile: list[tuple[int, ...]] | None, request: Request) -> tuple[bytes, dict[str, Any]]:
    """The engine, and its inputs and outputs in the form of `engine.json`."""
    trt = request.trt
    logger = logger_of(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        raise ExportError(_refusals([parser.get_error(i) for i in range(parser.num_errors)], request))
    config = builder.create_builder_config()
    if request.library == "tensorrt-rtx":
        capability = getattr(trt.ComputeCapability, request.gpu.upper(), None)
        if capability is None:
            known = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
            raise ExportError(
                f"tensorrt-rtx {trt.__version__} does not build for {request.gpu}, only for {', '.join(known)}."
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    if profile is not None:
        shapes = builder.create_optimization_profile()
        shapes.set_shape(network.get_input(0).name, *profile)
        config.add_optimization_profile(shapes)
    cache = _read_timings(config, request) if request.timing_cache is not None else None
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reason = one_line(logger.errors[-1]) if logger.errors else "it gives no reason"
        raise ExportError(f"{request.library} {trt.__version__} cannot build for {request.gpu}: {reason}.")
    if cache is not None:
        _write_timings(cache, request)
    inputs = [_describe(network.get_input(i)) for i in range(network.num_inputs)]
    if profile is not None:
        inputs[0]["profile"] = dict(zip(("smallest", "usual", "largest"), map(list, profile), strict=True))
    outputs = [_describe(network.get_output(i)) for i in range(network.num_outputs)]
    return bytes(serialized), {"inputs": inputs, "outputs": outputs}


def _describe(tensor: Any) -> dict[str, Any]:
    """Name, shape (-1 for dynamic dimensions) and type, named as in torch and NumPy."""
    return {"name": tensor.name, "shape": list(tensor.shape), "type": _type_name(tensor.dtype)}


def _type_name(kind: Any) -> str:
    return TYPES.get(kind.name, kind.name.lower())


def _refusals(errors: list[Any], request: Request) -> str:
    told = "; ".join(
        f"{error.node_name() or f'number {error.node()}'} ({error.node_operator() or 'no type'}): "
        f"{one_line(error.desc()) or error.code().name}"
        for error in errors[:MOST_REFUSALS]
    )
    if len(errors) > MOST_REFUSALS:
        told += f"; and {len(errors) - MOST_REFUSALS} more"
    count = f"{len(errors)} {'node' if len(errors) == 1 else 'nodes'}"
    return f"the parser of {request.library} {request.trt.__version__} refuses {count} of the graph: {told}."


def _read_timings(config: Any, request: Request) -> Any:
    path = request.timing_cache
    assert path is not None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ExportError(
            f"{path} is not a timing cache of this {request.library} and GPU: name another file, or remove it."
        )
    return cache


def _write_timings(cache: Any, request: Request) -> None:
    path = request.timing_cache
    assert path is not None
    write_whole(path, bytes(cache.serialize()))


def _try_engine(
    folder: Path, content: bytes, shape: Sequence[int], processor: FaiM2FImageProcessor, request: Request
) -> str:
    """Runs the engine, if its GPU is present, and the graph in ONNX Runtime on one input; returns a sentence about it.

    Raises:
        ExportError: the engine cannot be opened, its outputs are not finite, or in fp32 or fp16 they disagree.
    """
    if gpu_here() != request.gpu:
        return f"the engine was built for {request.gpu} and not opened or run, for which that GPU is needed"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape[0], shape[1], 8, 8, generator=generator)
    image = 255 * torch.nn.functional.interpolate(image, size=tuple(shape[2:]), mode="bilinear")
    names = [output.name for output in session.get_outputs()]
    engine = read_description(folder)
    scale, shift = scale_and_shift(processor.to_dict())
    sample = image.to(torch.uint8) if engine.input_name == "image" else image * scale + shift
    try:
        found = EngineRunner(engine, *open_engine(engine), torch.device("cuda", 0))(sample)
    except PredictorError as error:
        raise ExportError(str(error)) from None
    told = []
    for name, expected in zip(names, session.run(names, {engine.input_name: sample.numpy()}), strict=True):
        ours, theirs = found[name].cpu().double(), torch.from_numpy(expected).double()
        if ours.shape != theirs.shape or not ours.isfinite().all():
            raise ExportError(
                f"the engine gives {name} of shape {tuple(ours.shape)}, finite or not, where the graph gives "
                f"{tuple(theirs.shape)}, all of them finite: build it in fp32, or by another version of the library."
            )
        if expected.dtype.kind == "f":
            errors = (ours - theirs).abs() / theirs.abs().max().clamp(min=1e-12)
            told.append(f"{name} by at most {float(errors.max()):.1e} of the largest")
            # Of each query, or pixel. Rounding may change a few of them entirely, see `export.check`.
            entries = errors if name == "segmentation_scores" else errors.reshape(*errors.shape[:2], -1).amax(-1)
            typical = np.quantile(entries.numpy(), LEVELS[-1], method="lower")
            if request.precision in ("fp32", "fp16") and name.endswith(("logits", "scores")) and typical > MOST:
                raise ExportError(
                    f"the engine disagrees with its graph: a tenth of its {name} differ by {typical:.0%} or more of "
                    "the largest value: build it in fp32, or by another version of the library."
                )
        else:
            told.append(f"{name} in {int((ours != theirs).sum())} of {theirs.numel()} values")
    return (
        f"the engine was run on the {request.gpu} of this machine beside the graph in onnxruntime, on one input of "
        f"{'x'.join(map(str, shape))}: they differ in {'; '.join(told)}"
    )


__all__ = ["AHEAD_OF_TIME", "GPUS", "MODULES", "PRECISIONS", "export_tensorrt"]
