"""What a training run drops or initializes randomly is reported in one line each, whatever does not match."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.data.dataset import Description
from hf_faim2f.errors import ModelError
from hf_faim2f.training.start import start_model
from hf_faim2f.zoo import open_model
from tests.support.reference_models import small_model

DATA = Description("cars", "semantic", ("road", "car"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = small_model(decoder_layers=2, num_labels=2, id2label={0: "road", 1: "car"})
    model.save_pretrained(tmp_path / "parent")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(
        tmp_path / "parent"
    )
    return tmp_path / "parent"


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_other_image_channels_are_named_or_refused(folder: Path) -> None:
    """An edited configuration: the first convolution does not match."""
    config = json.loads((folder / "config.json").read_text())
    change(folder, backbone_config={**config["backbone_config"], "num_channels": 4})
    with pytest.raises(ModelError, match="are missing or of another shape, the first backbone.stem.convolution.weight"):
        start_model(str(folder), DATA)
    start = start_model(str(folder), DATA, new_labels=True)
    assert start.notes == [
        f"{folder} gets the 2 labels of cars; new and random: backbone.stem.convolution.weight."
    ]  # fmt: skip
    assert start.model.backbone.stem.convolution.weight.shape[1] == 4


def test_weights_that_nothing_reads_are_dropped_with_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second decoder layer's weights, which the configuration no longer has, and an unrelated one."""
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "extra.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    change(folder, decoder_layers=1)
    kept = start_model(str(folder), DATA).model.state_dict()
    (line,) = [message for message in caplog.messages if "dropped" in message]
    assert line.startswith(f"Weights of {folder} that the model does not use are dropped: extra.weight, ")
    assert line.endswith(f" and {len(set(weights) - set(kept)) + 1 - 4} more.")


def test_labels_that_differ_in_name_alone_keep_their_weights_and_say_so(folder: Path) -> None:
    other = Description("pets", "semantic", ("cat", "dog"))
    start = start_model(str(folder), other, new_labels=True)
    assert start.notes == [f"{folder} gets the 2 labels of pets; all weights fit and stay."]
    old = open_model(folder)[0].state_dict()
    assert all(torch.equal(tensor, old[name]) for name, tensor in start.model.state_dict().items())


def test_a_model_that_stays_one_for_another_task_says_so(folder: Path) -> None:
    """Its weights learn instances, but its configuration still says that it predicts label maps."""
    other = Description("pets", "instance", DATA.labels, frozenset({0, 1}))
    start = start_model(str(folder), other)
    assert start.model.config.postprocessing_type == "semantic"
    (note,) = start.notes
    assert note.startswith(f"{folder} stays a model for semantic segmentation, although pets is for instance: ")
    assert not start_model(str(folder), DATA).notes
    renewed = start_model(str(folder), other, new_labels=True)
    assert renewed.model.config.postprocessing_type == "instance" and "all weights fit and stay" in renewed.notes[0]


def test_on_a_trained_backbone_the_rest_is_random_and_said_to_be(tmp_path: Path) -> None:
    start_model("digits", DATA).model.save_pretrained(tmp_path / "trained")
    FaiM2FImageProcessor().save_pretrained(tmp_path / "trained")
    start = start_model("digits", DATA, backbone=str(tmp_path / "trained"))
    assert start.notes == [
        f"A new digits with the 2 labels of cars, on the backbone of {tmp_path / 'trained'}; all other weights are "
        "random."
    ]


def test_a_size_of_images_makes_the_image_processor_resize(folder: Path) -> None:
    FaiM2FImageProcessor.from_pretrained(folder, do_resize=False).save_pretrained(folder)
    assert not start_model(str(folder), DATA).processor.do_resize
    resized = start_model(str(folder), DATA, image_size=96).processor
    assert resized.do_resize and dict(resized.size)["shortest_edge"] == 96
