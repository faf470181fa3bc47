"""The installed libraries of docs/guides/integrations.md give the same segments, classes and pixels as `Predictor`.

Supervision is in every development environment. The others are too large for that: their tests run only where they are
installed, and docs/limits.md says when that last happened.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, Prediction, Predictor
from tests.support.shipped_digits import DIGITS

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "docs" / "images" / "scene.jpg"


def example(name: str) -> Any:
    """Imports a file of examples/integrations as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "integrations" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.from_pretrained(DIGITS)


def own(predictor: Predictor, subtask: str) -> Prediction:
    prediction = predictor(SCENE, subtask=subtask)[0]
    assert len(prediction.segments) == 6
    return prediction


@pytest.mark.parametrize("subtask", ["semantic", "instance", "panoptic"])
def test_supervision(predictor: Predictor, subtask: str) -> None:
    """`Detections.from_transformers` accepts and draws the image processor's results."""
    sv = pytest.importorskip("supervision")
    model = FaiM2FForUniversalSegmentation.from_pretrained(DIGITS).eval()
    processor = FaiM2FImageProcessor.from_pretrained(DIGITS)
    image = Image.open(SCENE)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    process = getattr(processor, f"post_process_{subtask}_segmentation")
    result = process(outputs, target_sizes=[(image.height, image.width)])[0]
    detections = sv.Detections.from_transformers(result, id2label=model.config.id2label)

    if subtask == "instance":  # transformers' rules for instances, which differ from `Predictor`'s
        masks = [(result["segmentation"] == info["id"]).numpy() for info in result["segments_info"]]
        class_ids = [info["label_id"] for info in result["segments_info"]]
    else:
        prediction = own(predictor, subtask)
        found = dict(
            zip([segment.class_id for segment in prediction.segments], prediction.masks().numpy(), strict=True)
        )
        class_ids = detections.class_id.tolist()
        masks = [found.pop(class_id) for class_id in class_ids]
        assert not found
    assert len(class_ids) >= 5 and detections.class_id.tolist() == class_ids
    assert np.array_equal(detections.mask, np.stack(masks))
    assert detections.data["class_name"].tolist() == [model.config.id2label[index] for index in class_ids]
    drawn = sv.MaskAnnotator(opacity=1.0).annotate(np.array(image), detections)
    assert drawn.shape == (384, 384, 3) and not np.array_equal(drawn, np.array(image))


def test_sahi(predictor: Predictor) -> None:
    pytest.importorskip("sahi")
    from sahi.predict import get_prediction, get_sliced_prediction

    detector = example("sahi_slices").FaiM2FDetectionModel(model=predictor, confidence_threshold=0.5)
    prediction = own(predictor, "instance")
    masks = prediction.masks().numpy()
    image = Image.open(SCENE)
    for found, segment, mask in zip(
        get_prediction(image, detector).object_prediction_list, prediction.segments, masks, strict=True
    ):
        assert (found.category.id, found.category.name) == (segment.class_id, segment.label)
        assert found.score.value == segment.score and np.array_equal(found.mask.bool_mask, mask)
        assert tuple(found.bbox.to_xyxy()) == segment.box
    # Four scenes with one slice each, whose masks are shifted to the scene's position.
    large = Image.fromarray(np.tile(np.array(image), (2, 2, 1)))
    sliced = get_sliced_prediction(
        large, detector, slice_height=384, slice_width=384, overlap_height_ratio=0, overlap_width_ratio=0,
        perform_standard_pred=False, postprocess_type="NMS", verbose=0,
    ).object_prediction_list  # fmt: skip
    for segment, mask in zip(prediction.segments, masks, strict=True):
        same = [found.mask.bool_mask for found in sliced if found.category.id == segment.class_id]
        assert len(same) == 4 and np.array_equal(np.any(same, axis=0), np.tile(mask, (2, 2)))


def test_fiftyone(predictor: Predictor) -> None:
    """Tests the labels only, because a dataset needs MongoDB."""
    pytest.importorskip("fiftyone")
    module = example("fiftyone_model")
    prediction = own(predictor, "instance")
    labels = module.FaiM2FModel(str(DIGITS), subtask="instance").predict(np.array(Image.open(SCENE)))
    for found, segment, mask in zip(labels.detections, prediction.segments, prediction.masks().numpy(), strict=True):
        assert (found.label, found.confidence) == (segment.label, segment.score)
        drawn = found.to_segmentation(frame_size=(384, 384), target=1).mask
        assert np.array_equal(drawn.astype(bool), mask)
    model = module.FaiM2FModel(str(DIGITS), subtask="semantic", threshold=0.5)
    label_map = model.predict(np.array(Image.open(SCENE))).mask
    assert np.array_equal(label_map.astype(int) - 1, own(predictor, "semantic").label_map.numpy())
    assert model.mask_targets[11] == "background" and 0 not in model.mask_targets


@pytest.mark.parametrize("subtask", ["semantic", "instance", "panoptic"])
def test_label_studio(predictor: Predictor, subtask: str) -> None:
    pytest.importorskip("label_studio_sdk")
    from label_studio_sdk.converter.brush import decode_rle
    from label_studio_sdk.label_interface import LabelInterface

    module = example("label_studio_predictions")
    prediction = own(predictor, subtask)
    made = module.to_prediction(prediction, "digits")
    interface = LabelInterface(module.labeling_config(predictor.network.config.id2label))
    assert interface.validate_prediction(made, return_errors=True) == []
    for region, segment, mask in zip(made["result"], prediction.segments, prediction.masks().numpy(), strict=True):
        assert region["value"]["brushlabels"] == [segment.label] and region.get("score") == segment.score
        decoded = decode_rle(region["value"]["rle"]).reshape(384, 384, 4)
        assert np.array_equal(decoded[..., 3] > 0, mask)


def test_label_studio_leaves_out_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without the library, which only encodes the masks."""
    brush = ModuleType("brush")
    brush.mask2rle = lambda mask: [int(mask.sum())]  # type: ignore[attr-defined]
    for name in ("label_studio_sdk", "label_studio_sdk.converter"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "label_studio_sdk.converter.brush", brush)
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(SCENE, tmp_path / "images" / name)
    (tmp_path / "images" / "b.jpg").write_bytes(SCENE.read_bytes()[:500])
    assert example("label_studio_predictions").main(str(DIGITS), str(tmp_path / "images"), str(tmp_path / "out")) == 1
    tasks = json.loads((tmp_path / "out").read_text())
    assert [task["data"]["image"].rsplit("/")[-1] for task in tasks] == ["a.jpg", "c.jpg"]
    assert "b.jpg" in capsys.readouterr().err
