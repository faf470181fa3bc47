"""The folder alone, in a process with transformers and torch but without this package."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hf_faim2f
from hf_faim2f import FaiM2FImageProcessor
from tests.support.reference_models import small_model

MODEL_FOLDER = Path(hf_faim2f.__file__).parent / "model"

# Blocks this package, loads the folder in every possible way, and prints the results.
SCRIPT = """
import json, sys
from importlib.metadata import version
blocked = ["hf_faim2f", "conversion", "torchvision", "timm"]
if version("transformers") >= "5":
    blocked.append("scipy")  # 4.57 imports scikit-learn wherever it is installed, and that needs it
for name in blocked:
    sys.modules[name] = None  # importing it fails
import numpy as np, torch, transformers
from PIL import Image
folder, again, picture = sys.argv[1:]
report = {}
kinds = ["", "ForUniversalSegmentation", "ForInstanceSegmentation", "ForSemanticSegmentation", "ForImageSegmentation"]
for kind in kinds:
    model = getattr(transformers, "AutoModel" + kind).from_pretrained(folder, trust_remote_code=True)
    report["AutoModel" + kind] = type(model).__name__
    if kind == "ForSemanticSegmentation":
        semantic = model
report["config"] = type(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__
processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.open(picture)
segment = transformers.pipeline("image-segmentation", model=folder, trust_remote_code=True)
for subtask in ("semantic", "instance", "panoptic"):
    segments = segment(image, subtask=subtask, threshold=0.0, overlap_mask_area_threshold=0.0)
    report[subtask] = [[s["label"], s["score"], list(s["mask"].size), int(np.asarray(s["mask"]).sum()) // 255]
                       for s in segments]
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
    of_semantic = semantic(**processor(image, return_tensors="pt"))
report["mean"] = float(outputs.masks_queries_logits.mean())
report["logits"] = [list(of_semantic.logits.shape), float(of_semantic.masks_queries_logits.mean())]
maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])
report["map"] = list(maps[0].shape)
model.save_pretrained(again)
processor.save_pretrained(again)
loaded = transformers.AutoModel.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    outputs = loaded(**processor(image, return_tensors="pt"))
report["mean again"] = float(outputs.masks_queries_logits.mean())
print("REPORT" + json.dumps(report))
"""


def run_alone(*arguments: object, home: Path) -> tuple[dict, str]:
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd=home,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("REPORT"))
    return json.loads(line.removeprefix("REPORT")), result.stderr + result.stdout


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small_model(id2label={0: "wall", 1: "sky", 2: "tree", 3: "road", 4: "bed"}, num_queries=6)
    folder = tmp_path / "a model"  # a space, and no valid module name, like names that users choose
    model.save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


def test_loads_and_segments_without_this_package(saved: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    home = tmp_path / "home"
    home.mkdir()
    report, printed = run_alone(saved, tmp_path / "again", tmp_path / "picture.png", home=home)
    names = ["AutoModel"] + [f"AutoModelFor{k}Segmentation" for k in ("Universal", "Instance", "Semantic", "Image")]
    classes = ["FaiM2FForUniversalSegmentation"] * 5
    classes[names.index("AutoModelForSemanticSegmentation")] = "FaiM2FForSemanticSegmentation"
    assert [report[name] for name in names] == classes
    assert report["config"] == "FaiM2FConfig"
    assert "not supported" not in printed
    assert report["logits"] == [[1, 5, 16, 24], report["mean"]]
    assert report["map"] == [60, 90]
    for subtask in ("semantic", "instance", "panoptic"):
        assert report[subtask], subtask
        for label, score, size, area in report[subtask]:
            assert label in ("wall", "sky", "tree", "road", "bed") and size == [90, 60]
            assert (score is None) == (subtask == "semantic")
            assert 0 < area <= 60 * 90 or subtask == "instance"  # a later instance may cover an earlier one completely
    assert sum(area for *_, area in report["semantic"]) == 60 * 90
    # The same numbers as with the package, and after saving and loading again.
    processor = FaiM2FImageProcessor.from_pretrained(saved)
    with torch.no_grad():
        expected = hf_faim2f.FaiM2FForUniversalSegmentation.from_pretrained(saved)(
            **processor(Image.fromarray(pixels), return_tensors="pt")
        )
    assert report["mean"] == pytest.approx(float(expected.masks_queries_logits.mean()), rel=1e-4)
    assert report["mean again"] == pytest.approx(report["mean"], rel=1e-6)

    # The folder that the process without the package saved is as complete as the first, and loads as well.
    first = {path.name for path in saved.iterdir()}
    second = {path.name for path in (tmp_path / "again").iterdir()}
    assert second == first
    home = tmp_path / "home2"
    home.mkdir()
    third, _ = run_alone(tmp_path / "again", tmp_path / "once more", tmp_path / "picture.png", home=home)
    assert third == report


TWO_FOLDERS = """
import sys
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForUniversalSegmentation, pipeline
kinds = [AutoConfig, AutoImageProcessor, AutoModel, AutoModelForUniversalSegmentation]
for folder in sys.argv[1:]:
    things = [kind.from_pretrained(folder, trust_remote_code=True) for kind in kinds]
    segment = pipeline("image-segmentation", model=folder, trust_remote_code=True)
    things += [segment.model, segment.image_processor, segment.model.config]
    print("CODE", folder[-5:], *{getattr(sys.modules[type(thing).__module__], "WHOSE", "?") for thing in things})
"""


@pytest.mark.large
def test_each_folder_runs_its_own_code(saved: Path, tmp_path: Path) -> None:
    """Two folders loaded by one process, or two revisions of one, do not run each other's code."""
    folders = []
    for name in ("first", "other"):
        folders.append(shutil.copytree(saved, tmp_path / name))
        for entry in ("configuration_faim2f", "modeling_faim2f", "image_processing_faim2f"):
            with (folders[-1] / f"{entry}.py").open("a") as file:
                file.write(f'\nWHOSE = "{name}"\n')
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TWO_FOLDERS, *map(str, folders), str(folders[0])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert printed == ["CODE first first", "CODE other other", "CODE first first"]
    assert "not supported" not in done.stderr


def relative_imports(path: Path) -> set[str]:
    return set(re.findall(r"^\s*from \.(\w+) import", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("entry", ["configuration_faim2f", "modeling_faim2f", "image_processing_faim2f"])
def test_entry_files_name_all_that_they_need(entry: str) -> None:
    """transformers 4.57 copies only the files that the entry file itself imports; indirect imports would be missing."""
    direct = relative_imports(MODEL_FOLDER / f"{entry}.py")
    needed, todo = set(), list(direct)
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += relative_imports(MODEL_FOLDER / f"{name}.py")
    assert needed - {entry} == direct


def test_the_ground_floor_imports_only_what_everyone_has() -> None:
    allowed = {"torch", "numpy", "PIL", "transformers", "scipy"} | set(sys.stdlib_module_names)
    for path in MODEL_FOLDER.glob("*.py"):
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module).split(".")[0])
        assert modules <= allowed, path.name
        assert ("scipy" in modules) <= (path.name == "loss_faim2f.py")
