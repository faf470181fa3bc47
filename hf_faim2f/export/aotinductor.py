"""`faim2f export torch`: a folder with `model.pt2`, native code for a model, compiled by torch's AOTInductor.

The compiled package runs in torch without this library's model code and without a compiler. It contains native code for
one kind of CPU or GPU and one release of torch. Opening it runs that code, so a package is only opened if the caller
selected this runtime by name. `compiled.json` records what a package needs, and is checked first.
"""

import errno
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ..errors import ExportError, first_line
from ..files import check_new_folder, new_folder, sha256_of
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..model.remote_code_faim2f import AUTO_MAP, copy_remote_code
from ..version import __version__
from .graph import INPUTS, OUTPUTS, FaiM2FGraph, quietly
from .onnx import check_any_size, check_shape, check_words, defers_guards, load_for_export, resizing_to

PACKAGE, DESCRIPTION = "model.pt2", "compiled.json"
PRECISIONS = ("fp32", "bf16")
DEVICES = ("cpu", "cuda")
# Maximum size of compiled.json in bytes; real ones are far smaller.
LARGEST_DESCRIPTION = 1 << 20
# Entries of `torch.cpu.get_capabilities` for instructions that compilers do not emit by themselves.
NOT_EMITTED = ("clflush", "clflushopt", "clwb")
# Settings of torch's compiler. `freezing` lets it fold weights and fuse activations into convolutions; without
# `dynamic_threads` the exporter's number of threads would be compiled in.
COMPILER = {"freezing": True, "cpp.dynamic_threads": True}


@dataclass(frozen=True)
class Compiled:
    """The contents of `compiled.json`.

    Args:
        folder: folder of the package and its description.
        outputs: a key of `graph.OUTPUTS`.
        input_name: one of `graph.INPUTS`.
        shape: the input's (B, num_channels, H, W), None where it is dynamic.
        device: one of `DEVICES`.
        gpu: compute capability, such as "sm90"; None for the CPU.
        system: operating system and architecture, such as "Linux x86_64".
        instruction_sets: those that the code may use, as in `instruction_sets`.
        torch: the release of torch, such as "2.13".
        sha256: SHA-256 of the package.
    """

    folder: Path
    outputs: str
    input_name: str
    shape: tuple[int | None, ...]
    device: str
    gpu: str | None
    system: str
    instruction_sets: tuple[str, ...]
    torch: str
    sha256: str


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of this machine's CPU that a compiler may use, by torch's names, sorted.

    Raises:
        ExportError: this release of torch does not report them.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        raise ExportError(
            f"torch {torch.__version__} does not report the CPU's instruction sets, which a compiled package depends "
            "on: install torch 2.13 or later."
        )
    return tuple(sorted(name for name, has in capabilities().items() if has is True and name not in NOT_EMITTED))


def system_here() -> str:
    """The operating system and architecture, such as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def torch_release() -> str:
    """The first two numbers of torch's version, such as "2.13"."""
    return ".".join(torch.__version__.split(".")[:2])


def gpu_capability() -> str | None:
    """The compute capability of the first GPU, such as "sm90"; None if there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def export_package(
    model: str | Path,
    out_dir: str | Path,
    outputs: str = "logits",
    input_name: str = "pixel_values",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    verify: bool = True,
) -> list[str]:
    """Writes `out_dir` with `model.pt2`, its description `compiled.json`, the configuration and the image processor.

    Compiling takes one to several minutes and needs a C++ compiler; running the package needs none.

    Args:
        model: a folder, published name or Hub id.
        out_dir: a folder that does not exist yet.
        outputs, input_name: see `FaiM2FGraph`.
        size: (height, width) in pixels, to which the saved image processor resizes; None for any size.
        batch: the batch size; None for any.
        precision: "fp32" or "bf16", that of the network; inputs and outputs are the same in both.
        device: "cpu" or "cuda". The package is for CPUs that have all instruction sets of this machine's, or for GPUs
            of the same compute capability as the first one here.
        verify: run the package and compare it with torch before keeping it.

    Returns:
        What was verified, one sentence per line.

    Raises:
        ExportError, OSError: the export failed, or cannot be written; nothing is left behind.
    """
    out_dir = Path(out_dir)
    check_words(
        ("outputs", outputs, OUTPUTS),
        ("input", input_name, INPUTS),
        ("precision", precision, PRECISIONS),
        ("device", device, DEVICES),
    )
    check_shape(size, batch)
    check_new_folder(out_dir, ExportError)
    if device == "cuda" and gpu_capability() is None:
        raise ExportError("A package for cuda is compiled on a machine with that GPU, and torch finds none here.")
    sets = instruction_sets()
    _check_compiler()
    network, processor = load_for_export(model, input_name)
    if size is None:
        check_any_size(model, network.config.backbone_config)
    else:
        processor = resizing_to(processor, size)
    graph = FaiM2FGraph(network, processor, outputs, input_name, precision, batch, size)
    with new_folder(out_dir) as staging:
        _compile(graph, staging / PACKAGE, device)
        _describe(staging, graph, device, sets)
        network.config.auto_map = dict(AUTO_MAP)
        network.config.save_pretrained(staging)
        processor.save_pretrained(staging)
        copy_remote_code(staging)
        lines = _check(staging, graph, network, processor) if verify else []
    return lines


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
        found = shutil.which(compiler)
    except Exception:  # torch's own class, which is not public
        found = None
    if found is None:
        raise ExportError(
            "Compiling a package needs a C++ compiler, and torch finds none: install g++ or clang, or name one by the "
            "variable CXX. Running the package needs none."
        )


def _compile(graph: FaiM2FGraph, path: Path, device: str) -> None:
    """Exports the graph and compiles it into the file `path`.

    Raises:
        ExportError: torch cannot export or compile this model.
        OSError: a file cannot be written.
    """
    # The network as torch runs it fastest: maps channels-last, and fused attention.
    graph.model.set_attn_implementation("sdpa")
    graph.model.optimize_for_inference()
    graph.to(device)
    sample = {name: values.to(device) for name, values in graph.sample().items()}
    any_number, any_side = torch.export.Dim.DYNAMIC(min=1), torch.export.Dim.DYNAMIC
    axes = {} if graph.batch is not None else {0: any_number}
    axes |= {} if graph.size is not None else {2: any_side, 3: any_side}
    package = io.BytesIO()  # on a full disk, torch's own writer aborts the process
    try:
        with quietly(), torch.no_grad():
            exported = torch.export.export(
                graph,
                (),
                kwargs=sample,
                dynamic_shapes={graph.input_name: axes} if axes else None,
                prefer_deferred_runtime_asserts_over_guards=defers_guards(graph.config),
            )
            torch._inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=COMPILER)
    except Exception as error:  # of torch's exporter, its compiler or the C++ compiler
        reason = getattr(error, "inner_exception", error)  # of the compiler's own exception
        if isinstance(reason, OSError):  # such as a full disk
            raise reason from error
        if os.strerror(errno.ENOSPC) in str(reason):  # in the output of the C++ compiler
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        advice = "" if graph.size is not None else ", or name a --size"
        raise ExportError(
            f"torch {torch.__version__} cannot compile this model ({first_line(error)}), and nothing was kept: please "
            f"report it with the model's config.json{advice}."
        ) from error
    finally:
        graph.to("cpu")
    path.write_bytes(package.getbuffer())


def _describe(folder: Path, graph: FaiM2FGraph, device: str, sets: tuple[str, ...]) -> None:
    content = folder / PACKAGE
    batch, (height, width) = graph.batch, graph.size or (None, None)
    values = {
        "outputs_kind": graph.outputs,
        "input": {"name": graph.input_name, "shape": [batch, graph.config.num_channels, height, width]},
        "precision": graph.precision,
        "device": device,
        "gpu": gpu_capability() if device == "cuda" else None,
        "cpu": {"system": system_here(), "instruction_sets": list(sets)},
        "labels": [graph.config.id2label[i] for i in range(graph.config.num_labels)],
        "torch": torch_release(),
        "versions": {"hf_faim2f": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "package": {"sha256": sha256_of(content), "bytes": content.stat().st_size},
    }
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check(
    folder: Path, graph: FaiM2FGraph, model: FaiM2FForUniversalSegmentation, processor: FaiM2FImageProcessor
) -> list[str]:
    """Opens the package as the runtime does, and compares it with the model in float64."""
    from .check import Exported, check

    run = open_package(read_description(folder))
    exported = Exported("aotinductor", lambda inputs: {name: out.cpu().numpy() for name, out in run(inputs).items()})
    return check(exported, graph, model, processor)


def read_description(folder: Path) -> Compiled:
    """Reads the description of a package, without opening the package.

    Raises:
        ExportError: it is missing, or was not written by `faim2f export torch`.
    """
    for name in (PACKAGE, DESCRIPTION):
        if not (folder / name).is_file():
            raise ExportError(
                f"There is no file {folder / name}: the runtime aotinductor takes a folder that `faim2f export torch` "
                "wrote."
            )
    path = folder / DESCRIPTION
    if path.stat().st_size > LARGEST_DESCRIPTION:
        raise ExportError(f"{path} is larger than any description of a package: export the package again.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shape = tuple(None if side is None else int(side) for side in values["input"]["shape"])
        found = Compiled(
            folder=folder,
            outputs=values["outputs_kind"],
            input_name=values["input"]["name"],
            shape=shape,
            device=values["device"],
            gpu=values["gpu"],
            system=values["cpu"]["system"],
            instruction_sets=tuple(map(str, values["cpu"]["instruction_sets"])),
            torch=values["torch"],
            sha256=values["package"]["sha256"],
        )
        sides = len(shape) == 4 and shape[1] is not None and (shape[2] is None) == (shape[3] is None)
        sides = sides and all(side is None or side > 0 for side in shape)
        known = found.outputs in OUTPUTS and found.input_name in INPUTS and found.device in DEVICES
        texts = (found.system, found.torch, found.sha256, found.gpu or "")
        if not (sides and known and all(isinstance(text, str) for text in texts)):
            raise ValueError("it has values that are never written")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ExportError(f"{path} does not describe a package ({error!r}): export the package again.") from None
    return found


def open_package(compiled: Compiled) -> Callable[[Tensor], dict[str, Tensor]]:
    """Opens a package, which runs its native code; returns its network.

    Returns:
        A function from the input (B, num_channels, H, W) to the outputs by name, on the package's device.

    Raises:
        ExportError: the package is not the one that `compiled.json` describes, or is for another CPU, GPU, system or
            release of torch.
    """
    _check_machine(compiled)
    path = compiled.folder / PACKAGE
    again = "export the model again"
    with tempfile.TemporaryDirectory(prefix="faim2f-") as between:
        # A private copy, so that nobody can change the file between the check and the loading.
        copied = Path(between) / PACKAGE
        shutil.copyfile(path, copied)
        if sha256_of(copied) != compiled.sha256:
            raise ExportError(
                f"{path} is not the file that {DESCRIPTION} describes (its SHA-256 is another): copy the whole folder "
                f"again, or {again}."
            )
        try:
            with quietly():
                runner = torch._inductor.aoti_load_package(str(copied))
        except Exception as error:
            raise ExportError(f"torch cannot open {path} ({first_line(error)}): {again} with this torch.") from error
    names = OUTPUTS[compiled.outputs]

    @torch.no_grad()
    def run(inputs: Tensor) -> dict[str, Tensor]:
        outputs = runner(**{compiled.input_name: inputs.to(compiled.device)})
        return {name: outputs[name] for name in names}

    return run


def _check_machine(compiled: Compiled) -> None:
    """Raises ExportError if the code cannot run here: an unsupported instruction would kill the process silently."""
    path = compiled.folder / PACKAGE
    if compiled.system != system_here():
        raise ExportError(
            f"{path} was compiled for {compiled.system}, and this is {system_here()}: export the model here."
        )
    missing = sorted(set(compiled.instruction_sets) - set(instruction_sets()))
    if missing:
        raise ExportError(
            f"{path} was compiled for a CPU with {', '.join(missing)}, which the CPU of this machine does not have: "
            "export the model on this machine, or choose the runtime torch or onnxruntime with the model's other "
            "folders."
        )
    if compiled.torch != torch_release():
        raise ExportError(
            f"{path} was compiled by torch {compiled.torch}, and {torch_release()} is installed: install that release, "
            "or export the model again."
        )
    if compiled.device == "cuda" and compiled.gpu != gpu_capability():
        raise ExportError(
            f"{path} was compiled for a GPU of type {compiled.gpu}, but this machine has {gpu_capability() or 'none'}: "
            "export the model on this machine, or choose another runtime."
        )


__all__ = [
    "DESCRIPTION",
    "DEVICES",
    "PACKAGE",
    "PRECISIONS",
    "Compiled",
    "export_package",
    "instruction_sets",
    "open_package",
    "read_description",
    "system_here",
    "torch_release",
]
