"""A published folder on Inference Endpoints: loaded like in their toolkit, in a process without this package."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.handler import EndpointHandler
from hf_faim2f.model.inference_api_faim2f import RequestError, SegmentationRequests
from tests.support.lively_model import lively_model, photographs, save_model

# The toolkit's steps: imports handler.py alone under this module name, with the folder on the path; then one call per
# request.
SCRIPT = """
import base64, importlib.util, io, json, sys
for name in ("hf_faim2f", "conversion"):
    sys.modules[name] = None  # importing it fails
from PIL import Image
folder, picture = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)
with open(picture, "rb") as file:
    content = file.read()
text = base64.b64encode(content).decode()
report = {"answers": [], "errors": []}
for inputs, parameters in (
    (Image.open(picture), {"subtask": "instance", "threshold": 0.2}),
    (content, {"subtask": "panoptic", "threshold": "0.2", "overlap_mask_area_threshold": 0.0}),
    (text, {"subtask": "semantic"}),
):
    report["answers"].append(handler({"inputs": inputs, "parameters": parameters}))
report["default"] = handler({"inputs": text})
for request in ({"inputs": "?"}, {}, {"inputs": text, "parameters": {"threshold": 2}}, {"inputs": content[:300]}):
    try:
        handler(request)
    except ValueError as error:
        report["errors"].append(str(error))
print("REPORT" + json.dumps(report))
"""


@pytest.mark.large
def test_the_toolkit_gets_the_pipeline_s_answers(tmp_path: Path) -> None:
    folder, home, picture = save_model(tmp_path / "a model"), tmp_path / "home", tmp_path / "picture.png"
    home.mkdir()
    photographs()[0].save(picture)
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(picture)],
        capture_output=True, text=True, env=environment, cwd=home, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT"))[len("REPORT") :])
    expected = pipeline("image-segmentation", model=str(folder), device="cpu")
    asked: tuple[dict[str, Any], ...] = (
        {"subtask": "instance", "threshold": 0.2},
        {"subtask": "panoptic", "threshold": 0.2, "overlap_mask_area_threshold": 0.0},
        {"subtask": "semantic"},
        {},
    )
    for answer, parameters in zip([*report["answers"], report["default"]], asked, strict=True):
        wanted = expected(str(picture), **parameters)
        assert [one["label"] for one in answer] == [one["label"] for one in wanted]
        assert answer or not parameters
        for one, other in zip(answer, wanted, strict=True):
            assert one["score"] == (None if other["score"] is None else pytest.approx(other["score"], abs=1e-5))
            mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["mask"]))))
            assert mask.shape == np.asarray(other["mask"]).shape and (mask != np.asarray(other["mask"])).mean() < 1e-3
    parts = (
        "inputs is not base64",
        "inputs must be an image's file",
        "threshold must be a number",
        "The file cannot",
    )
    assert len(report["errors"]) == len(parts)
    assert all(part in error and "\n" not in error for part, error in zip(parts, report["errors"], strict=True))


def test_the_handler_opens_a_folder_where_this_package_is(tmp_path: Path) -> None:
    handler = EndpointHandler(str(save_model(tmp_path / "model")))
    found = handler({"inputs": photographs()[1], "parameters": {"subtask": "semantic"}})
    masks = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["mask"])))) for one in found]
    assert (sum(mask // 255 for mask in masks) == 1).all() and masks[0].shape == photographs()[1].size[::-1]


@pytest.mark.parametrize("settings", [{"do_rescale": False}, {"num_channels": 1, "image_mean": 0.5, "image_std": 0.5}])
def test_a_picture_keeps_what_its_file_states(tmp_path: Path, settings: dict[str, Any]) -> None:
    """12 bits in 16 with the largest value stated, of which 0 is white."""
    values = np.linspace(0, 4095, 24 * 36).reshape(24, 36).astype(np.uint16)
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path, tiffinfo={281: 4095, 262: 0})
    processor = FaiM2FImageProcessor(size=64, **settings)
    expected = processor(path, return_tensors="pt")["pixel_values"]
    requests = SegmentationRequests(lively_model().eval(), processor)
    with Image.open(path) as picture:
        found, size = requests._prepare(picture)
    assert size == (24, 36) and torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_the_size_is_that_of_the_upright_picture(tmp_path: Path, kind: str) -> None:
    requests = SegmentationRequests(lively_model().eval(), FaiM2FImageProcessor(size=64))
    for orientation, size in ((1, (24, 36)), (3, (24, 36)), (6, (36, 24))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (36, 24)).save(tmp_path / "picture", kind, exif=exif)
        with Image.open(tmp_path / "picture") as picture:
            assert requests._prepare(picture)[1] == size


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic"])
def test_nan_is_no_answer(subtask: str) -> None:
    model = lively_model().eval()
    with torch.no_grad():
        decoder: Any = model.transformer_decoder
        decoder.class_predictor.weight.fill_(float("nan"))
    requests = SegmentationRequests(model, FaiM2FImageProcessor(size=64))
    with pytest.raises(RequestError, match="outputs have NaN") as error:
        requests({"inputs": photographs()[0], "parameters": {"subtask": subtask}})
    assert error.value.status == 500
