"""Test settings that must be made before transformers is imported: no network, and a cache of remote code for this run
only."""

import os
import tempfile
from pathlib import Path

_HOME = tempfile.TemporaryDirectory(prefix="faim2f-tests-")
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "FAIM2F_SHARED" not in os.environ:  # pytest-xdist's workers inherit it from the controller
    _SHARED = tempfile.TemporaryDirectory(prefix="faim2f-shared-")
    os.environ["FAIM2F_SHARED"] = _SHARED.name

import pytest  # noqa: E402
import torch  # noqa: E402

# Two test processes share the two cores (pytest -n 2): with one thread each, they do not wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

TESTS = Path(__file__).parent
# Files and folders whose results do not depend on the version of transformers: readers, metrics, parsing, drawing, Ray,
# and commands around code that other tests run in both environments (`runtime/test_predictor.py`,
# `export/test_onnx.py`). They are marked `newest_only`, and `make test-optimum` leaves them out; single tests are
# marked in their files.
NEWEST_ONLY = (
    "cli/test_benchmark.py",
    "cli/test_command_line.py",
    "cli/test_data.py",
    "cli/test_predict_video.py",
    "cli/test_data_command.py",
    "cli/test_evaluate.py",
    "cli/test_models.py",
    "cli/test_predict.py",
    "data/test_annotations.py",
    "data/test_augmentation.py",
    "data/test_binary_masks.py",
    "data/test_coco.py",
    "data/test_counts.py",
    "data/test_files.py",
    "data/test_formats.py",
    "data/test_hub.py",
    "data/test_item.py",
    "data/test_label_maps.py",
    "data/test_outlines.py",
    "data/test_roboflow_masks.py",
    "data/test_skip_bad.py",
    "data/test_supervisely.py",
    "data/test_trees.py",
    "distributed",
    "end_to_end/test_cityscapes.py",
    "end_to_end/test_docs.py",
    "end_to_end/test_integrations.py",
    "end_to_end/test_learning.py",
    "end_to_end/test_orientation.py",
    "end_to_end/test_panoptic.py",
    "end_to_end/test_release.py",
    "end_to_end/test_train_job.py",
    "evaluation",
    "export/test_aotinductor.py",
    "export/test_openvino.py",
    "export/test_quantize.py",
    "export/test_tensorrt.py",
    "export/test_triton.py",
    "export/test_web.py",
    "fuzz",
    "model/test_image_files.py",
    "runtime/test_drawing.py",
    "runtime/test_large_images.py",
    "runtime/test_precision.py",
    "runtime/test_tensorrt.py",
    "runtime/test_tiles.py",
    "serving",
    "test_files.py",
    "test_layout.py",
    "test_masks.py",
    "test_moved.py",
    "training/test_batch_size.py",
    "training/test_class_weights.py",
    "training/test_run_card.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skips collection of files that `-m "not newest_only"` deselects, so that they are not imported."""
    if "not newest_only" in config.option.markexpr and collection_path in [TESTS / place for place in NEWEST_ONLY]:
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(TESTS / place) for place in NEWEST_ONLY):
            item.add_marker(pytest.mark.newest_only)
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.slow)
    # Files with slow tests come first, so that pytest-xdist's processes finish at about the same time.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds each test, so that its random numbers do not depend on the order of tests."""
    torch.manual_seed(0)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Seeds shared fixtures too, because they run before the seed of their first test is set."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)
