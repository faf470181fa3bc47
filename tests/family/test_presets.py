"""Facts about the published models."""

import json
from pathlib import Path

import pytest
import torch

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation
from hf_faim2f.family import ALIASES, FAMILY, find_preset, load_config, load_labels, published_peers
from tests.support.reference_models import MODELS, description


def test_the_family_is_the_nine_published_models() -> None:
    assert sorted(FAMILY) == sorted(MODELS)
    for name, preset in FAMILY.items():
        assert preset.weights_url == f"https://public.focoos.ai/pretrained_models/{name}/model_final.pth"
        assert preset.resolution == description(name)["config"].get("resolution", 640)


@pytest.mark.parametrize("name", [*MODELS, *ALIASES])
def test_a_configuration_is_one_call(name: str) -> None:
    config = load_config(name)
    assert isinstance(config, FaiM2FConfig)
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(config)
    expected = description(ALIASES.get(name, name))["parameters"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_labels_can_be_replaced() -> None:
    assert load_config("fai-mf-m-ade", num_labels=3).num_labels == 3
    assert load_config("fai-mf-m-ade", id2label={0: "a", 1: "b"}).label2id is not None
    assert load_config("fai-mf-m-ade").id2label[149] == "flag"
    assert load_config("fai-mf-s-coco-ins").label2id["toothbrush"] == 79


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match="Known: fai-m2f-s-ade, .*fai-mf-l-coco-ins. Did you mean 'fai-mf-m-ade'"):
        load_config("fai-mf-n-ade")
    with pytest.raises(ValueError, match="ade20k, coco"):
        load_labels("voc")


def test_one_configuration_does_not_leak_into_the_next() -> None:
    first = load_config("fai-mf-m-ade")
    first.backbone_config.depths = [1, 1, 1]
    assert load_config("fai-mf-m-ade").backbone_config.depths == [4, 5, 3]


def test_published_metrics_are_whole() -> None:
    figures = {name: preset.published for name, preset in FAMILY.items()}
    assert [figures[name]["mIoU"] for name in ("fai-m2f-s-ade", "fai-mf-m-ade", "fai-mf-l-ade")] == [
        41.23,
        45.32,
        48.27,
    ]
    assert [figures[f"fai-mf-{size}-coco-ins"]["segm/AP"] for size in "sml"] == [41.45, 43.09, 44.23]
    assert [figures[f"bisenetformer-{size}-ade"]["mIoU"] for size in "sml"] == [42.91, 43.43, 45.07]
    assert figures["bisenetformer-m-ade"]["fps_t4_tensorrt_640"] == 185
    # The published mean equals the mean of the published per-class table.
    tables = {name: published["per_class_IoU"] for name, published in figures.items() if "per_class_IoU" in published}
    assert list(tables) == ["fai-mf-l-ade", *(f"bisenetformer-{size}-ade" for size in "sml")]
    for name, per_class in tables.items():
        assert sum(per_class.values()) / 150 == pytest.approx(figures[name]["mIoU"], abs=0.01)
        assert set(per_class) == set(load_labels("ade20k"))
    again = find_preset("fai-mf-m-ade").re_evaluated
    classes = [value for key, value in again.items() if key.startswith("sem_seg/IoU-")]
    assert len(classes) == 150 and sum(classes) / 150 == pytest.approx(again["sem_seg/mIoU"], abs=0.01)
    assert published_peers()["ADE20K val"]["Mask2Former R50"]["fps_t4_tensorrt_640"] == 21.5


def test_data_files_are_packaged() -> None:
    folder = Path(__file__).parents[2] / "hf_faim2f" / "family" / "data"
    assert {path.name for path in folder.iterdir()} == {"labels.json", "mask2former_zoo.json", "published.json"}
    assert json.loads((folder / "labels.json").read_text())["coco"][0] == "person"
