"""Old import paths of public names give the same objects as the new ones."""

import importlib
import subprocess
import sys

import pytest

from hf_faim2f.moved import MOVED, RENAMED

# Names imported by the old paths in the README, documentation, examples and `__all__` of the public packages.
OLD_NAMES = {
    "app.limits": ("serving.requests", "Limits"),
    "app.models": ("serving.requests", "Choice open_choices"),
    "app.page": ("serving.page", "build_page"),
    "app.work": ("serving.requests", "Request"),
    "benchmarking.plot": ("benchmarking.comparison", "figure_of"),
    "bulk": ("distributed", "BulkError Plan Settings"),
    "bulk.errors": ("errors", "BulkError"),
    "bulk.plan": ("distributed.plan", "Plan Settings"),
    "commands.train": ("cli.train", "TrainSettings"),
    "conversion.checkpoint": ("conversion.weights", "read_state_dict"),
    "conversion.converted_model": ("conversion.weights", "ConvertedModel check_keys write_model_folder"),
    "conversion.errors": ("errors", "ConversionError"),
    "conversion.mask2former_names": ("conversion.mask2former", "to_our_names to_their_names"),
    "conversion.mask2former_zoo_weights": ("conversion.mask2former_zoo", "Weight convert_state_dict weights_of"),
    "data.ade20k": ("data", "load_ade20k load_ade20k_parquet"),
    "data.cityscapes": ("data", "load_cityscapes"),
    "data.coco": ("data", "load_coco_instance load_coco_panoptic"),
    "data.errors": ("errors", "DatasetError"),
    "data.folder": ("data", "load_folder"),
    "data.hub": ("data", "load_hub"),
    "data.lazy": ("data", "Description ItemReader Task describe lazy_dataset"),
    "data.open": ("data.formats", "DataSource open_data find_format"),
    "data.recognition": ("data.formats", "Recognized recognize"),
    "data.skip_bad": ("data", "BadItem find_bad_items without_bad_items"),
    "data.training_items": ("data", "TrainingItems"),
    "data.unlabelled": ("data.collate", "MixedItems UnlabelledImages is_unlabelled"),
    "distributed.worker": ("distributed.workers", "Attempts Worker"),
    "drawing": ("runtime.drawing", "Segments below beside draw_segments scaled segments_of_item"),
    "evaluation.confusion": ("evaluation.semantic", "draw_confusion most_confused row_percent"),
    "evaluation.run": ("evaluation.evaluator", "SUBTASKS Evaluator panoptic_reference"),
    "evaluation.segments": ("evaluation.streaming", "Segment read_map check_same_size"),
    "evaluation.written": ("evaluation.report", "PredictionFiles"),
    "export.errors": ("errors", "ExportError"),
    "export.report": ("export.graph_file", "report"),
    "family.datasets": ("family", "DATASETS Dataset"),
    "family.mask2former_zoo": ("family.mask2former", "find_zoo_model zoo"),
    "finite_weights": ("zoo", "check_finite first_not_finite"),
    "hub.card_holes": ("hub.sections", "has_results holes"),
    "hub.contents": ("errors", "FolderError"),
    "hub.download": ("zoo", "DamagedFileError download_model"),
    "hub.hub_errors": ("errors", "HubError"),
    "hub.known_metrics": ("hub.results", "Metric known_metric"),
    "hub.stranger": ("hub.check", "check_loading"),
    "hub_errors": ("errors", "hub_error is_network_error is_transient"),
    "runtime.block_map": ("runtime.tile_merging", "BlockMap free_bytes"),
    "runtime.input_size": ("benchmarking.latency", "open_at_size own_size"),
    "runtime.label_placement": ("runtime.drawing", "LabelPlacement"),
    "runtime.latency": ("benchmarking.latency", "Contender Latency measure_in_turn"),
    "runtime.machine": ("benchmarking.latency", "describe_machine"),
    "runtime.onnxruntime": ("runtime.backends.onnxruntime", "open_network"),
    "runtime.peak_memory": ("benchmarking.memory", "measure_memory"),
    "runtime.sliding_window": ("runtime.tiles", "segment_by_windows"),
    "runtime.torch_runtime": ("runtime.backends.torch", "open_network"),
    "serving.telemetry": ("serving.inference", "JsonLines Metrics log_as_json"),
    "training.class_weights": ("training.recipe", "balanced_weights read_class_weights weight_words"),
    "training.console": ("training.progress", "BarCallback TableCallback"),
    "training.divergence": ("errors", "DivergenceError"),
    "training.pictures": ("training.progress", "CurveCallback SamplesCallback draw_curve"),
    "training.queries": ("training.start", "resize_queries"),
    "training.run_card": ("training.run_folder", "TrainedOn card_of"),
    "training.trained_backbone": ("training.backbone", "load_backbone"),
    "training.whole_batch": ("training.trainer", "whole_batch_losses"),
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_path_gives_the_same_objects(old: str) -> None:
    new, names = OLD_NAMES[old]
    sys.modules.pop(f"hf_faim2f.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"hf_faim2f.{old} has moved: import from hf_faim2f"):
        module = importlib.import_module(f"hf_faim2f.{old}")
    for name in names.split():
        assert getattr(module, name) is getattr(importlib.import_module(f"hf_faim2f.{new}"), name), name
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_object_has_its_old_name_in_its_old_place(old: tuple[str, str]) -> None:
    module, name = old
    new = getattr(importlib.import_module(MOVED[module]), RENAMED[old])
    assert getattr(importlib.import_module(module), name) is new


@pytest.mark.parametrize("old", MOVED)
def test_no_module_has_the_name_of_an_old_one(old: str) -> None:
    """The import hook for old names comes last, so a module with an old name would hide it."""
    importlib.import_module(MOVED[old])
    assert importlib.import_module(old).__spec__.origin is None  # type: ignore[union-attr]


@pytest.mark.slow  # starts processes
def test_the_warning_names_the_line_that_imports() -> None:
    code = "import hf_faim2f\nfrom hf_faim2f.drawing import Segments\nimport hf_faim2f.app.work as work\nwork.Work\n"
    done = subprocess.run([sys.executable, "-W", "default::DeprecationWarning:__main__", "-c", code],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "<string>:2: DeprecationWarning: hf_faim2f.drawing has moved: import from hf_faim2f.run" in done.stderr
    assert "<string>:3: DeprecationWarning: hf_faim2f.app.work has moved" in done.stderr
    with pytest.raises(ModuleNotFoundError, match="hf_faim2f.nothing"):
        importlib.import_module("hf_faim2f.nothing")
