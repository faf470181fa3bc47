"""Changing a model's labels, and the settings that depend on them."""

import copy
import json
import logging
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.focoos import read_info
from hf_faim2f.conversion.mask2former import convert_config
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli import main
from hf_faim2f.data.dataset import Description
from hf_faim2f.data.readers.folder import load_folder
from hf_faim2f.errors import ConversionError, DatasetError
from hf_faim2f.model import configuration_checks_faim2f, segmentation_labels_faim2f
from hf_faim2f.training.start import start_model
from hf_faim2f.zoo import open_model, open_settings
from tests.support.reference_models import small_model
from tests.support.shapes import write_folder

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
OLD = [*map(str, range(10)), "background"]
SAME_NUMBER = [f"sort {number}" for number in range(11)]
TWELVE = [f"kind {number}" for number in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A panoptic model with the shipped model's labels, the last of which is stuff, and non-default normalization."""
    place = tmp_path_factory.mktemp("models") / "panoptic"
    model = small_model(
        id2label=dict(enumerate(OLD)), label_ids_to_fuse=[10], postprocessing_type="panoptic", decoder_layers=1
    )
    model.save_pretrained(place)
    FaiM2FImageProcessor.from_model_config(
        model.config, size={"shortest_edge": 64}, image_mean=[0.1, 0.2, 0.3]
    ).save_pretrained(place)
    return place


def two_sure_things(classes: int) -> tuple[Tensor, Tensor]:
    """Logits of two queries that are confident in class 10, one in the left and one in the right half of an image."""
    class_logits = torch.full((1, 10, classes + 1), -9.0)
    class_logits[..., -1] = 9.0
    class_logits[0, :2, 10], class_logits[0, :2, -1] = 9.0, -9.0
    mask_logits = torch.full((1, 10, 16, 16), -9.0)
    mask_logits[0, 0, :, :8] = mask_logits[0, 1, :, 8:] = 9.0
    return class_logits, mask_logits


def segments(processor: Any, outputs: Any) -> int:
    found = processor.post_process_panoptic_segmentation(outputs, target_sizes=[(16, 16)])[0]
    return len({int(value) for value in found["segmentation"].unique()})


GAPS = [
    ({0: "road", 255: "void"}, "must be 0 to 1, but id 1 is missing and id 255 is present"),
    ({1: "road", 2: "car"}, "must be 0 to 1, but id 0 is missing and id 2 is present"),
    ({"0": "a", "2": "b", "3": "c"}, "must be 0 to 2, but id 1 is missing and id 3 is present"),
    ({}, "must name at least one class"),
    ({"road": 0}, "must map class ids to names"),
]


@pytest.mark.parametrize(("id2label", "message"), GAPS)
def test_ids_with_gaps_are_refused_wherever_they_come_from(
    id2label: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        FaiM2FConfig(id2label=id2label)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder, id2label=id2label)
    with pytest.raises(ValueError, match=message):
        AutoModelForUniversalSegmentation.from_pretrained(folder, id2label=id2label, ignore_mismatched_sizes=True)
    config = FaiM2FConfig(num_labels=4)
    with pytest.raises(ValueError, match=message):
        config.id2label = id2label
    assert config.num_labels == 4
    values = {**json.loads((folder / "config.json").read_text()), "id2label": id2label}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_conversion_and_data_refuse_gaps(tmp_path: Path) -> None:
    theirs = Mask2FormerConfig()
    theirs.id2label = {0: "road", 255: "void"}
    with pytest.raises(
        ConversionError, match=r"config.json cannot be converted \(.*id 1 is missing and id 255 is present"
    ):
        convert_config(theirs, "semantic")
    data: Any = {0: "road", 255: "void"}
    with pytest.raises(DatasetError, match="must be class names in the order of their ids, .* not 0, 255"):
        load_folder(write_folder(tmp_path / "data", 1), labels=data)
    with pytest.raises(DatasetError, match="not none"):
        Description("nothing", "semantic", ())
    for same in (("car", "sky", "car"), ("car", "car "), ("low wall", "low  wall"), ("caf\u00e9", "cafe\u0301")):
        with pytest.raises(DatasetError, match="^cars has the class names .*, which read the same: rename or merge"):
            Description("cars", "semantic", same)


def test_label2id_and_stuff_follow_the_labels_of_a_configuration() -> None:
    values = json.loads(FaiM2FConfig(id2label=dict(enumerate(OLD)), label_ids_to_fuse=[10]).to_json_string())

    def read(**more: Any) -> FaiM2FConfig:
        config = FaiM2FConfig.from_dict(copy.deepcopy(values), **more)
        assert config.label2id == {name: index for index, name in config.id2label.items()}
        assert json.loads(config.to_json_string())["label2id"] == config.label2id
        return config

    assert read().label_ids_to_fuse == [10]
    assert read(id2label=dict(enumerate(OLD))).label_ids_to_fuse == [10]  # unchanged labels
    assert read(num_labels=11).label_ids_to_fuse == [10]
    for labels in (TWELVE, SAME_NUMBER, ["a", "b"]):
        names = dict(enumerate(labels))
        # Ids as strings, like in transformers' run_semantic_segmentation.py.
        for more in ({}, {"label2id": {name: str(index) for index, name in names.items()}}, {"num_labels": len(names)}):
            config = read(id2label=names, **more)
            assert config.id2label == names and config.label_ids_to_fuse == []
        assert read(label2id={name: index for index, name in names.items()}).id2label == names
        assert read(label_ids_to_fuse=[1], id2label=names).label_ids_to_fuse == [1]
        assert read(id2label=names, label_ids_to_fuse=None).label_ids_to_fuse is None
    config = read(num_labels=12)
    assert config.id2label[11] == "LABEL_11" and config.label_ids_to_fuse == []
    with pytest.raises(ValueError, match="`num_labels` is 3, but `id2label` names 2 classes"):
        read(id2label={0: "a", 1: "b"}, num_labels=3)
    with pytest.raises(ValueError, match="`label2id` has 'a' as class 1, but `id2label` has 'b' there"):
        read(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0})
    with pytest.raises(ValueError, match="has the class 7 in label_ids_to_fuse, but only the classes 0 to 1"):
        read(id2label={0: "a", 1: "b"}, label_ids_to_fuse=[7])
    config = read()
    config.id2label = dict(enumerate(TWELVE))  # like in scripts
    assert config.label2id["kind 11"] == 11 and config.label_ids_to_fuse == []
    config.num_labels = 2
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    stale = {**values, "id2label": {0: "a", 1: "b"}, "label_ids_to_fuse": None}
    assert FaiM2FConfig.from_dict(stale).label2id == {"a": 0, "b": 1}  # from a file with the old label2id
    with pytest.raises(ValueError, match="`label2id` has 'a' and 'b' as class 0: give each an id of its own"):
        FaiM2FConfig(label2id={"a": 0, "b": 0, "c": 1})


def test_setting_label2id_alone_warns_that_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(configuration_checks_faim2f.logger, "warning_once", said.append)
    config = FaiM2FConfig(id2label={0: "a", 1: "b"})
    config.label2id = {"b": "1", "a": "0"}
    assert not said
    for value in ({"a": 1, "b": 0}, {"x": 0, "y": 1}, {"a": 0, "b": 0}):
        config.label2id = value  # type: ignore[assignment]
        assert config.id2label == {0: "a", 1: "b"} and config.label2id == {"a": 0, "b": 1}
    assert len(said) == 3 and all("follows from `id2label`: set id2label" in sentence for sentence in said)


@pytest.mark.parametrize("labels", [TWELVE, SAME_NUMBER], ids=["another number", "the same number"])
def test_new_labels_through_plain_loading_leave_the_old_stuff(
    labels: list[str], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForUniversalSegmentation.from_pretrained(
        folder, id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
    ).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))

    def sure_outputs(of: Any) -> Any:
        with torch.no_grad():
            outputs = of(**processor(photo, return_tensors="pt"))
        outputs["class_queries_logits"], outputs["masks_queries_logits"] = two_sure_things(len(labels))
        return outputs

    logger = logging.getLogger("hf_faim2f.model.segmentation_post_processing_faim2f")
    logger.addHandler(caplog.handler)
    try:
        processor.post_process_panoptic_segmentation.__func__.__globals__["logger"].warning_once.cache_clear()
        assert segments(processor, sure_outputs(model)) == 2
        assert "and not [10] as this image processor does" in caplog.text
        if len(labels) != len(OLD):  # detected by their number, even in outputs of another model
            outputs = dict(zip(("class_queries_logits", "masks_queries_logits"), two_sure_things(12), strict=True))
            assert segments(processor, outputs) == 2
            assert "are of a model with 11 classes, and the outputs of one with 12" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    # With the old labels, their stuff is one segment.
    old = AutoModelForUniversalSegmentation.from_pretrained(folder)
    outputs = sure_outputs(old)
    outputs["class_queries_logits"], outputs["masks_queries_logits"] = two_sure_things(11)
    assert segments(processor, outputs) == 1
    # Saved together, model and processor give correct results with every way of loading.
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True))
    trainer.save_model(str(tmp_path / "out"))
    processor.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(labels)}
    assert config["label2id"] == {name: index for index, name in enumerate(labels)}
    loaded = AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "out").eval()
    assert segments(AutoImageProcessor.from_pretrained(tmp_path / "out"), sure_outputs(loaded)) == 2
    segment = pipeline("image-segmentation", model=loaded, image_processor=processor)
    segment.model.forward = lambda *_, **__: sure_outputs(loaded.__class__.forward.__get__(loaded))
    assert len(segment(photo, subtask="panoptic")) == 2
    for _, beside in (open_model(tmp_path / "out"), open_settings(tmp_path / "out")):
        assert beside.label_ids_to_fuse == [] and beside.label_ids_to_fuse_among == len(labels)
        assert segments(beside, dict(outputs, fused_classes=None)) == 2


def test_taking_the_labels_of_a_model(folder: Path) -> None:
    processor = FaiM2FImageProcessor.from_pretrained(folder, num_labels=11)
    assert processor.label_ids_to_fuse == [10] and processor.label_ids_to_fuse_among == 11
    config = AutoConfig.from_pretrained(folder, id2label=dict(enumerate(TWELVE)), label_ids_to_fuse=[3, 1])
    processor.take_labels_from(config)
    assert processor.label_ids_to_fuse == [1, 3] and processor.label_ids_to_fuse_among == processor.num_labels == 12
    again = FaiM2FImageProcessor.from_dict(processor.to_dict())
    assert again.to_dict() == processor.to_dict() and again.label_ids_to_fuse_among == 12
    told = FaiM2FImageProcessor.from_dict(processor.to_dict(), label_ids_to_fuse=[4])
    assert told.label_ids_to_fuse == [4] and told.label_ids_to_fuse_among is None
    assert told.num_labels == 12


@pytest.mark.parametrize("labels", [["meadow", "flower"], TWELVE], ids=["two", "twelve"])
def test_the_command_gives_a_panoptic_model_new_labels(labels: list[str], folder: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "flowers", 4)
    for mask in (data / "masks").iterdir():
        with Image.open(mask) as image:
            image.point(lambda value: min(value, 1)).save(mask)
    (data / "labels.txt").write_text("\n".join(labels) + "\n")
    out = tmp_path / "out"
    assert main(["train", "--model", str(folder), "--new-labels", "--data", str(data), "--format", "folder", "--out",
                 str(out), "--batch-size", "2", "--image-size", "64", "--samples", "0", "--eval-limit", "1",
                 "--no-tensorboard", "--steps", "1", "--crop", "64x64"]) == 0  # fmt: skip
    config = json.loads((out / "final" / "config.json").read_text())
    processor = json.loads((out / "final" / "preprocessor_config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(labels)}
    assert config["label2id"] == {name: index for index, name in enumerate(labels)}
    assert config["label_ids_to_fuse"] is None and config["postprocessing_type"] == "semantic"
    assert "label_ids_to_fuse" not in processor and "label_ids_to_fuse_among" not in processor
    assert processor["image_mean"] == [0.1, 0.2, 0.3] and processor["ignore_index"] == 255
    evaluate = ["evaluate", str(out / "final"), "--data", str(data), "--format", "folder", "--no-card"]
    assert main([*evaluate, "--out", str(tmp_path / "evaluation")]) == 0


def test_panoptic_data_says_what_is_stuff_of_the_new_labels(folder: Path) -> None:
    streets = Description("streets", "panoptic", ("road", "car"), frozenset({1}))
    start = start_model(str(folder), streets, new_labels=True)
    assert start.model.config.label_ids_to_fuse == start.processor.label_ids_to_fuse == [0]
    assert start.processor.label_ids_to_fuse_among == 2


def test_the_example_writes_a_folder_that_can_be_evaluated(folder: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 4)
    example = runpy.run_path(str(DIGITS.parent / "finetune_folder.py"))["main"]
    example(str(folder), str(data), str(tmp_path / "out"), 1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label2id"] == {"ground": 0, "square": 1, "disc": 2, "bar": 3}
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(data), "--format", "folder", "--no-card", "--out",
                 str(tmp_path / "evaluation")]) == 0  # fmt: skip


def test_pixels_without_label_are_255_unless_that_is_a_class() -> None:
    shipped = FaiM2FImageProcessor.from_pretrained(DIGITS)
    converted = read_info("fai-mf-s-coco-ins").processor
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    ids = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]], dtype=np.uint8)
    for processor in (shipped, converted):
        assert processor.ignore_index == 255
        batch = processor(image, ids, do_resize=False, do_reduce_labels=True, return_tensors="pt")
        assert batch["class_labels"][0].tolist() == [0, 1]
        assert [int(mask.sum()) for mask in batch["mask_labels"][0]] == [4, 8]
    assert FaiM2FImageProcessor.from_model_config(FaiM2FConfig(num_labels=256)).ignore_index is None
    assert FaiM2FImageProcessor.from_model_config(FaiM2FConfig(num_labels=2), ignore_index=0).ignore_index == 0


def test_the_256th_instance_is_not_left_out_unasked() -> None:
    processor = FaiM2FImageProcessor(do_resize=False, ignore_index=255)
    ids = np.arange(300, dtype=np.int32).reshape(15, 20)
    image = np.zeros((15, 20, 3), dtype=np.uint8)
    classes = {number: number % 3 for number in range(300)}
    with pytest.raises(ValueError, match=r"gives id 255 the class 0, but .* ignore_index 255 .* such as -1"):
        processor(image, ids, classes)
    assert len(processor(image, ids, classes, ignore_index=-1)["class_labels"][0]) == 300
    assert len(processor(image, ids, classes, ignore_index=255)["class_labels"][0]) == 299
    assert len(processor(image, ids, {**classes, 255: 255})["class_labels"][0]) == 299  # here, 255 is void as well
    with pytest.raises(ValueError, match="gives id 256 the class 1, but"):
        processor(image, ids, classes, do_reduce_labels=True)


def test_reducing_to_a_class_that_is_ignored_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(segmentation_labels_faim2f.logger, "warning_once", said.append)
    processor, image = FaiM2FImageProcessor(do_resize=False, do_reduce_labels=True), np.zeros((2, 2, 3), np.uint8)
    for ignored, expected in ((255, [0, 1]), (0, [1])):
        labels = processor(image, np.array([[0, 1], [2, 2]]), ignore_index=ignored)
        assert labels["class_labels"][0].tolist() == expected
    assert len(said) == 1 and "ignore_index 0 leaves that class unlabeled" in said[0]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"label_ids_to_fuse": ["sky"]}, "`label_ids_to_fuse` must be a list of class ids"),
        ({"label_ids_to_fuse": [5]}, "has the class 5 in label_ids_to_fuse, but only the classes 0 to 4"),
        ({"label_weights": [1.0, 2.0]}, "`label_weights` must be 5 numbers above 0"),
    ],
)
def test_values_of_labels_are_checked_when_they_are_set(values: dict[str, Any], complaint: str) -> None:
    """A name never equals a class id, so nothing would be fused."""
    config = small_model().config
    for name, value in values.items():
        with pytest.raises(ValueError, match=complaint):
            setattr(config, name, value)
    config = small_model().config
    config.label_ids_to_fuse = (3, 1)
    assert config.label_ids_to_fuse == [1, 3]


@pytest.mark.parametrize("name", ["cls_sigmoid", "use_auxiliary_loss", "backbone_freeze_norm"])
def test_text_is_no_truth_value_of_a_configuration(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be true or false, got 'false'"):
        FaiM2FConfig(**{name: "false"})


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("ignore_value", "255", "an integer, such as 255, got '255'"),
        ("ignore_value", None, "an integer, such as 255, got None"),
        ("activation_function", "rellu", "one of .*gelu.* got 'rellu'"),
        ("activation_function", ["relu"], "one of"),
    ],
)
def test_values_that_a_model_cannot_use_are_named(name: str, value: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"FaiM2FConfig: `{name}` must be {what}"):
        FaiM2FConfig(**{name: value})


@pytest.mark.parametrize("ids", [np.uint8, np.int32])
def test_an_ignore_index_beyond_a_byte_drops_no_other_class(ids: Any) -> None:
    """In a uint8 tensor, torch treats -1 as 255, and 300 as 44."""
    processor = FaiM2FImageProcessor(do_resize=False)
    segmentation_map: np.ndarray = np.array([[0, 1], [44, 255]], dtype=ids)
    for ignored in (-1, 300, -100):
        labels = processor(np.zeros((2, 2, 3), np.uint8), segmentation_map, ignore_index=ignored)
        assert labels["class_labels"][0].tolist() == [0, 1, 44, 255], ignored
        assert labels["mask_labels"][0].sum() == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({0: "road", 255: "void"}, "0 to 1 of these logits, but .* (is not one of them|has no name)"),
        (dict(enumerate(OLD)), "is not one of them"),
        ({1: "car"}, "but 0 has no name"),
    ],
)
def test_names_of_other_labels_are_refused(names: dict[int, str], message: str) -> None:
    outputs = {"class_queries_logits": torch.zeros(1, 4, 3), "masks_queries_logits": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match=message):
        FaiM2FImageProcessor().post_process_detections(outputs, id2label=names)


def test_a_trained_model_without_new_labels_keeps_its_own(folder: Path) -> None:
    model, processor = open_model(folder)
    assert model.config.label_ids_to_fuse == processor.label_ids_to_fuse == [10]
    assert isinstance(model, FaiM2FForUniversalSegmentation) and model.config.thing_ids == list(range(10))


def test_what_is_said_of_stuff_when_labels_change(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(configuration_checks_faim2f.logger, "warning_once", said.append)
    values = small_model(label_ids_to_fuse=[3, 4]).config.to_dict()
    names = dict(enumerate("abcde"))
    assert FaiM2FConfig.from_dict(values, id2label=names).label_ids_to_fuse == []
    assert len(said) == 1 and "label_ids_to_fuse [3, 4], of the old ones, is emptied: set it again" in said[0]
    assert FaiM2FConfig.from_dict(values, id2label=names, label_ids_to_fuse=[0]).label_ids_to_fuse == [0]
    # If the stuff classes were undefined before, they still are.
    assert FaiM2FConfig.from_dict({**values, "label_ids_to_fuse": None}, id2label=names).label_ids_to_fuse is None
    assert len(said) == 1
    processor = FaiM2FImageProcessor()
    processor.label_ids_to_fuse = [4, 3]
    assert processor.label_ids_to_fuse == [3, 4]


def test_an_old_mark_of_unlabeled_pixels_is_no_class_of_the_new_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapillary Vistas has 65 classes, and marks unlabeled pixels with 65."""
    said: list[str] = []
    monkeypatch.setattr(configuration_checks_faim2f.logger, "warning_once", said.append)
    values = small_model(num_labels=5, ignore_value=5).config.to_dict()
    names = dict(enumerate("abcdef"))
    config = FaiM2FConfig.from_dict(values, id2label=names)
    assert config.ignore_value == 255 and FaiM2FImageProcessor.from_model_config(config).ignore_index == 255
    assert len(said) == 1 and "ignore_value 5, which was no class of the old ones, is one of the new" in said[0]
    config = FaiM2FConfig.from_dict(values)
    config.num_labels = 6
    assert config.ignore_value == 255
    # Stated with the new labels, of no class of them, or of a class before: it stays.
    assert FaiM2FConfig.from_dict(values, ignore_value=5, id2label=names).ignore_value == 5
    assert FaiM2FConfig.from_dict(values, id2label=dict(enumerate("vwxyz"))).ignore_value == 5
    assert FaiM2FConfig.from_dict({**values, "ignore_value": 0}, id2label=names).ignore_value == 0
    assert FaiM2FConfig.from_dict({**values, "ignore_value": 255}, num_labels=300).ignore_value == 255
    assert len(said) == 2


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"id2label": {0: "a", 1: 3}}, "`id2label` must name at least one class, each by a string"),
        ({"label2id": ["a"]}, "`label2id` must map names to class ids"),
        ({"num_labels": "3"}, "`num_labels` must be a positive integer, got '3'"),
    ],
)
def test_labels_of_the_wrong_kind_are_one_sentence(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaiM2FConfig(**keywords)
