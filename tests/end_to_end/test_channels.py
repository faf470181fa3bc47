"""A four-channel model made from a trained three-channel one: training, evaluation, prediction, card, check and
export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.transformers_model import their_config
from PIL import Image

from hf_faim2f import FaiM2FConfig, FaiM2FImageProcessor, Predictor
from hf_faim2f.cli import main
from hf_faim2f.data.augmentation import SSDColorJitter, channel_note
from hf_faim2f.data.files import read_header, read_image
from hf_faim2f.data.formats import DataSource, open_data
from hf_faim2f.data.item import make_item
from hf_faim2f.errors import ConversionError, DatasetError
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.hub.check import check_loading, list_files
from hf_faim2f.model.channels_faim2f import picture_of
from hf_faim2f.zoo import open_model
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, shapes, write_folder

QUICK = ["--batch-size", "2", "--image-size", "64", "--samples", "1", "--eval-limit", "2", "--no-tensorboard",
         "--subtasks", "semantic", "--steps", "1"]  # fmt: skip


def four_channels(seed: int) -> np.ndarray:
    """(64, 64, 4) uint16: the shapes in 16 bits, and a channel with finer steps."""
    pixels = shapes(seed)[0].astype(np.uint16) * 257
    return np.dstack([pixels, 65535 - pixels[..., 0] // 3])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_folder(tmp_path_factory.mktemp("channels") / "data", 4)
    for number in range(4):
        (root / "images" / f"{number:03}.png").unlink()
        np.save(root / "images" / f"{number:03}.npy", four_channels(number))
    return root


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A run that starts from a model with three channels."""
    model = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1, train_num_points=64)
    model.save_pretrained(data.parent / "rgb")
    FaiM2FImageProcessor.from_model_config(model.config, size=64).save_pretrained(data.parent / "rgb")
    out = data.parent / "run"
    words = ["--model", str(data.parent / "rgb"), "--data", str(data), "--out", str(out), "--channels", "4"]
    assert main(["train", *words, *QUICK]) == 0
    return out / "final"


def test_a_trained_model_gets_channels(trained: Path, data: Path) -> None:
    model, processor = open_model(str(trained))
    assert model.config.num_channels == processor.num_channels == 4 == len(processor.image_std)
    assert processor.image_mean == [0.485, 0.456, 0.406, 0.485]
    card = (trained / "README.md").read_text()
    assert card.count('np.load("image.npy")  # (4, H, W)') == 2 and "pipeline(" not in card and "PIL" not in card
    recorded = (trained.parent / "run.yaml").read_text()
    assert "channels: 4" in recorded


def test_training_says_what_it_does(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(data.parent / "rgb"), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main(["train", *words, *QUICK, "--channels", "4"]) == 0
    said = capsys.readouterr().out
    assert "The first layer's weights for 3 channels are spread over 4." in said
    assert "Images of 4 channels have neither saturation nor hue" in said
    assert main(["train", *words[:-1], str(tmp_path / "other"), *QUICK]) == 2
    assert "4 channels" in (error := capsys.readouterr().err) or "(64, 64, 4)" in error


def test_it_is_evaluated_and_predicts(trained: Path, data: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(trained), "--data", str(data), "--split", "all", "--out", str(tmp_path / "e")]) == 0
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["images"] == 4
    words = ["predict", str(trained), str(data / "images"), "--out", str(tmp_path / "p"), "--annotations", "coco"]
    assert main([*words, "--overlays"]) == 0
    assert len(list((tmp_path / "p" / "annotations").rglob("*.npy"))) == 4
    predictor = Predictor.from_pretrained(trained)
    array = four_channels(0)
    one, other = predictor([array, np.moveaxis(array, -1, 0)], subtask="semantic")
    assert torch.equal(one.label_map, other.label_map) and one.size == (64, 64)
    assert np.array_equal(np.asarray(one.image), shapes(0)[0])  # the displayed image: the first three channels as RGB
    with pytest.raises(ValueError, match="image 0 has mode 'RGB', but the model takes 4 channels"):
        predictor(Image.fromarray(shapes(0)[0]))


@pytest.mark.large
def test_remote_code_loads_it(trained: Path) -> None:
    check_loading(list_files(trained))


@pytest.mark.parametrize("input_name", ["pixel_values", pytest.param("image", marks=pytest.mark.large)])
def test_it_is_exported(trained: Path, tmp_path: Path, input_name: str) -> None:
    export_onnx(trained, tmp_path / "onnx", size=(64, 64), input_name=input_name)
    graph, torch_ = Predictor.from_pretrained(tmp_path / "onnx", "onnxruntime"), Predictor.from_pretrained(trained)
    array = np.dstack([shapes(3)[0], shapes(4)[0][..., :1]])
    one, other = (predictor(array, subtask="semantic")[0].label_map for predictor in (graph, torch_))
    assert (one == other).float().mean() > 0.99


def test_items_keep_every_bit(data: Path) -> None:
    source = {"path": str(data / "images" / "000.npy"), "bytes": None}
    image = read_image(source, 4)
    assert image.dtype == torch.float32 and read_header(source) == (1, 64, 64)
    assert torch.allclose(image * 257, torch.from_numpy(four_channels(0).astype(np.float32)).permute(2, 0, 1))
    opened = open_data("folder", DataSource(str(data), num_channels=4), "train")
    assert opened.description.num_channels == 4 and opened.items[0]["image"].shape == (4, 64, 64)
    assert opened.first(1).items[0]["image"].dtype == torch.float32
    with pytest.raises(DatasetError, match="scenes of digits have 3 channels, but the model takes 4"):
        open_data("digits", DataSource(num_channels=4), "train")


def test_color_jitter_changes_all_channels_alike() -> None:
    image = torch.full((5, 4, 4), 100.0)
    item = make_item(image, torch.zeros(4, 4), [0], 0, "0.npy")
    seen = set()
    for seed in range(20):
        jittered = SSDColorJitter()(item, torch.Generator().manual_seed(seed))["image"]
        assert jittered.dtype == torch.float32 and len(jittered.unique()) == 1
        seen.add(float(jittered[0, 0, 0]))
    assert len(seen) > 10
    assert channel_note([SSDColorJitter()], 3) is None and channel_note([], 5) is None
    assert picture_of(image[:1]).getpixel((0, 0)) == (100, 100, 100)


def test_transformers_mask2former_reads_rgb_only() -> None:
    backbone = {"model_type": "swin", "num_channels": 4}
    with pytest.raises(ConversionError, match="num_channels.* its image processor reads RGB"):
        their_config(
            FaiM2FConfig(backbone, pixel_decoder_type="deformable", encoder_layers=6, feature_size=256,
                         mask_feature_size=256, pre_norm=False, use_level_embedding=True, decoder_layers=9,
                         dim_feedforward=2048, enforce_input_projection=False)
        )  # fmt: skip
