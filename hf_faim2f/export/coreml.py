"""`faim2f export coreml`: an ML program for Core ML, `model.mlpackage`, which only Apple's systems run.

coremltools converts on any system, but the package is not run or verified here.
"""

from pathlib import Path
from typing import Any

import coremltools
import torch

from ..errors import ExportError, first_line
from .formats import FORMATS
from .graph import OUTPUTS, FaiM2FGraph, quietly

PACKAGE = FORMATS["coreml"].files[0].partition("/")[0]
# Operations that coremltools does not support, and supported ones that are equivalent on booleans.
SAME = {
    torch.ops.aten.__or__.Tensor: torch.ops.aten.logical_or.default,
    torch.ops.aten.__and__.Tensor: torch.ops.aten.logical_and.default,
}


def write(graph: FaiM2FGraph, folder: Path, precision: str) -> None:
    """Writes the package of a graph of a fixed size into `folder`, for iOS 16, macOS 13 and later.

    Raises:
        ExportError: the graph's input is of bytes, torch cannot export it, or coremltools cannot convert it.
        OSError: a file cannot be written.
    """
    if graph.input_name == "image":
        raise ExportError(
            "Core ML has no inputs of bytes, which the input `image` is: export with the input pixel_values."
        )
    program = coremltools.precision.FLOAT32 if precision == "fp32" else coremltools.precision.FLOAT16
    try:
        with quietly(), torch.no_grad():
            exported = torch.export.export(graph, (), kwargs=graph.sample()).run_decompositions({})
            for node in exported.graph.nodes:
                node.target = SAME.get(node.target, node.target) if node.op == "call_function" else node.target
            converted: Any = coremltools.convert(
                exported,
                minimum_deployment_target=coremltools.target.iOS16,
                compute_precision=program,
                skip_model_load=True,
            )
            spec = converted.get_spec()
            found = [value.name for value in spec.description.output]
            for old, new in zip(found, OUTPUTS[graph.outputs], strict=True):
                coremltools.utils.rename_feature(spec, old, new, rename_inputs=False)
            named = coremltools.models.MLModel(spec, weights_dir=converted.weights_dir, skip_model_load=True)
            named.short_description = f"faim2f.outputs: {graph.outputs}; faim2f.input: {graph.input_name}"
            package = folder / PACKAGE
            named.save(str(package))
            # Only for a debugger, and contains local paths.
            (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
            for path in package.rglob("*.mlmodel"):
                path.chmod((package / "Manifest.json").stat().st_mode)  # coremltools lets only the owner read it
    except OSError:  # such as a full disk
        raise
    except Exception as error:  # of torch's exporter or coremltools
        raise ExportError(
            f"coremltools {coremltools.__version__} cannot convert this model ({first_line(error)}), and nothing was "
            "kept: please report it with the model's config.json."
        ) from error


__all__ = ["write"]
