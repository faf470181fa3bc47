"""Export with Optimum, on transformers 4.57: the configuration of `faim2f`, its registration, and the command.

Optimum looks up models by type in tables that are filled on import. It does not import remote code, so `optimum-cli`
itself does not know `faim2f`. Run it through this module instead:

    python -m hf_faim2f.export.optimum export onnx --model DIR --task image-segmentation --trust-remote-code OUT

`register()` does the same for programs that call `main_export` or `onnx_export_from_model`. The resulting folders, and
those written by `faim2f export onnx`, load with `ORTModelForCustomTasks.from_pretrained(OUT)`.
"""

import sys
from pathlib import Path
from typing import Any

import onnx_ir
from optimum.exporters.onnx import export
from optimum.exporters.onnx.config import VisionOnnxConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedVisionConfig

from ..errors import ExportError
from ..model.configuration_faim2f import FaiM2FConfig, FaiM2FResNetConfig, STDCConfig
from .graph import FaiM2FGraph, quietly
from .graph_file import clean

TASK = "image-segmentation"
OPSET = 18
# Backbones (by model type) whose operations do not depend on the image size.
TRACEABLE = (STDCConfig.model_type, FaiM2FResNetConfig.model_type, "resnet", "rt_detr_resnet")


class FaiM2FOnnxConfig(VisionOnnxConfig):
    """Exports class and mask logits from `pixel_values` of any batch and image size."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig
    DEFAULT_ONNX_OPSET = OPSET
    ATOL_FOR_VALIDATION = 1e-3

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Rejects models that Optimum would trace at one size and declare valid for all sizes."""
        if type(self) is FaiM2FOnnxConfig and config.backbone_config.model_type not in TRACEABLE:
            raise ExportError(
                f"a backbone of type {config.backbone_config.model_type!r} branches on the size of an image, and "
                "Optimum would keep the branches of one size for all: use `faim2f export onnx`, which does not."
            )
        super().__init__(config, *args, **kwargs)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"pixel_values": {0: "batch", 2: "height", 3: "width"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {
            "class_queries_logits": {0: "batch"},
            "masks_queries_logits": {0: "batch", 2: "mask_height", 3: "mask_width"},
        }

    def post_process_exported_models(
        self, path: Path, models_and_onnx_configs: dict[str, Any], onnx_files_subpaths: list[str]
    ) -> tuple[dict[str, Any], list[str]]:
        """Cleans the graphs, instead of merging duplicate weights as in Optimum; there are none."""
        for name in onnx_files_subpaths:
            model = onnx_ir.load(Path(path) / name)
            values = (*model.graph.inputs, *model.graph.outputs)
            clean(model, {str(v.name): [s if isinstance(s, int) else str(s) for s in v.shape or ()] for v in values})
            onnx_ir.save(model, Path(path) / name)
        return models_and_onnx_configs, onnx_files_subpaths


class FaiM2FGraphOnnxConfig(FaiM2FOnnxConfig):
    """The inputs and outputs of a `FaiM2FGraph`."""

    def __init__(self, graph: FaiM2FGraph, dimensions: dict[str, list[int | str]]) -> None:
        super().__init__(graph.config, task=TASK)
        self.graph = graph
        self.open_axes = {
            name: {axis: side for axis, side in enumerate(sides) if isinstance(side, str)}
            for name, sides in dimensions.items()
        }

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {self.graph.input_name: self.open_axes[self.graph.input_name]}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {name: axes for name, axes in self.open_axes.items() if name != self.graph.input_name}

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, Any]:
        sample = self.graph.sample()
        return {name: value if framework == "pt" else value.numpy() for name, value in sample.items()}


def register() -> None:
    """Registers `faim2f` with Optimum's exporters for the task "image-segmentation"; may be called repeatedly."""
    TasksManager.create_register("onnx")(FaiM2FConfig.model_type, TASK)(FaiM2FOnnxConfig)
    # Optimum selects the Auto class from tables of transformers' own models.
    loader = ("transformers", "AutoModelForUniversalSegmentation")
    TasksManager._CUSTOM_CLASSES[("pt", FaiM2FConfig.model_type, TASK)] = loader


def export_graph(graph: FaiM2FGraph, dimensions: dict[str, list[int | str]], opset: int, path: Path) -> onnx_ir.Model:
    """Exports the graph to `path` with Optimum, and reads it back."""
    config = FaiM2FGraphOnnxConfig(graph, dimensions)
    with quietly():
        export(graph, config, path, opset=opset, no_dynamic_axes=not any(config.open_axes.values()))
    return onnx_ir.load(path)


def main() -> None:
    """Runs `optimum-cli` with `faim2f` registered."""
    from optimum.commands.optimum_cli import main as optimum_cli

    register()
    sys.argv[0] = "optimum-cli"
    try:
        optimum_cli()
    except ExportError as error:
        print(f"optimum-cli: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
