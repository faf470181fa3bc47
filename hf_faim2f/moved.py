"""Keeps old import paths of public names working, with a DeprecationWarning."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# New module: the old modules whose public names it now has. All names are relative to hf_faim2f.
_NEW = {
    "benchmarking.comparison": "benchmarking.plot",
    "benchmarking.latency": "runtime.input_size runtime.latency runtime.machine",
    "benchmarking.memory": "runtime.peak_memory",
    "cli": "commands",
    "conversion.mask2former": "conversion.mask2former_names",
    "conversion.mask2former_zoo": "conversion.mask2former_zoo_weights",
    "conversion.weights": "conversion.checkpoint conversion.converted_model",
    "data.collate": "data.training_items data.unlabelled",
    "data.dataset": "data.lazy data.skip_bad",
    "data.formats": "data.open data.recognition",
    "data.readers": "data.ade20k data.cityscapes data.coco data.folder data.hub",
    "distributed": "bulk",
    "distributed.workers": "distributed.driver distributed.worker",
    "errors": "bulk.errors conversion.errors data.errors export.errors hub.hub_errors hub_errors",
    "evaluation.evaluator": "evaluation.run",
    "evaluation.report": "evaluation.written",
    "evaluation.semantic": "evaluation.confusion",
    "evaluation.streaming": "evaluation.segments",
    "export.graph_file": "export.report",
    "family.mask2former": "family.mask2former_zoo",
    "family.presets": "family.datasets",
    "hub.check": "hub.contents hub.stranger",
    "hub.results": "hub.known_metrics",
    "hub.sections": "hub.card_holes",
    "runtime.backends": "runtime.onnxruntime runtime.tensorrt",
    "runtime.backends.torch": "runtime.torch_runtime",
    "runtime.drawing": "drawing runtime.label_placement",
    "runtime.tile_merging": "runtime.block_map",
    "runtime.tiles": "runtime.sliding_window",
    "serving": "app",
    "serving.inference": "serving.telemetry",
    "serving.requests": "app.limits app.models app.work",
    "training.backbone": "training.trained_backbone",
    "training.progress": "training.console training.pictures",
    "training.recipe": "training.class_weights",
    "training.run_folder": "training.run_card",
    "training.start": "training.queries",
    "training.trainer": "training.divergence training.whole_batch",
    "zoo": "finite_weights hub.download hub.load",
}
# Packages whose modules kept their name: data.coco is now data.readers.coco.
_PACKAGES = ("data.readers", "runtime.backends")
MOVED = {
    f"hf_faim2f.{old}": f"hf_faim2f.{new}" + (f".{old.rpartition('.')[2]}" if new in _PACKAGES else "")
    for new, names in _NEW.items()
    for old in names.split()
}
# Public names that changed as well.
RENAMED = {
    ("hf_faim2f.app.work", "Work"): "RequestHandler",
    ("hf_faim2f.benchmarking.plot", "draw"): "draw_plot",
    ("hf_faim2f.hub.load", "load_model"): "open_model",
}


def new_path(old: str) -> str | None:
    """The new name of a module that moved, or whose package moved; None if it did not move."""
    parent, _, name = old.rpartition(".")
    if old in MOVED or not parent:
        return MOVED.get(old)
    above = new_path(parent)
    return above and f"{above}.{name}"


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        moved = name.startswith("hf_faim2f.") and new_path(name)
        return ModuleSpec(name, self, is_package=True) if moved else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = import_module(str(new_path(old)))
        warnings.warn(f"{old} has moved: import from {new.__name__}.", DeprecationWarning, stacklevel=2)
        module.__getattr__ = lambda name: getattr(new, RENAMED.get((old, name), name))  # type: ignore[method-assign]


def keep_old_paths() -> None:
    """Adds a finder for the old modules, which Python asks last."""
    sys.meta_path.append(_MovedModules())


__all__ = ["MOVED", "keep_old_paths", "new_path"]
