"""The semantic model: label maps in; a loss and per-pixel logits of every class out, as in transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from hf_faim2f import FaiM2FConfig, FaiM2FForSemanticSegmentation, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.data.item import class_map
from hf_faim2f.model.outputs_faim2f import semantic_logits
from hf_faim2f.model.segmentation_labels_faim2f import segments_of_class_maps
from tests.support.reference_models import small_model

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
NAMES = dict(enumerate(["wall", "sky", "tree", "road", "bed"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "semantic"
    model = small_model(id2label=NAMES, decoder_layers=1)
    model.save_pretrained(place)
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(place)
    return place


def sums_of_scores(classes: Tensor, masks: Tensor, cls_sigmoid: bool) -> np.ndarray:
    """(B, C, h, w), in float64."""
    c, m = classes.double().numpy(), masks.double().numpy()
    of_classes = 1 / (1 + np.exp(-c)) if cls_sigmoid else np.exp(c) / np.exp(c).sum(-1, keepdims=True)
    return np.einsum("bqc,bqhw->bchw", of_classes[..., :-1], 1 / (1 + np.exp(-m)))


@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_logits_are_the_logarithms_of_what_the_argmax_is_taken_of(cls_sigmoid: bool) -> None:
    classes, masks = torch.randn(2, 7, 5) * 3, torch.randn(2, 7, 6, 8) * 5
    got = semantic_logits(classes, masks, cls_sigmoid).numpy()
    scores = sums_of_scores(classes, masks, cls_sigmoid)
    assert got.shape == (2, 4, 6, 8) and got.dtype == np.float32
    np.testing.assert_allclose(np.exp(got), scores + 1e-6, rtol=1e-4)
    np.testing.assert_array_equal(got.argmax(1), scores.argmax(1))
    shares = scores / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(torch.from_numpy(got).softmax(1).numpy(), shares, atol=1e-5)
    nothing = semantic_logits(torch.tensor([[[-99.0, 99.0]]]), torch.full((1, 1, 1, 1), -999.0))
    assert torch.isfinite(nothing).all()


@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_the_models_logits_are_those_of_its_kind_of_classes(cls_sigmoid: bool) -> None:
    model = FaiM2FForSemanticSegmentation(small_model(cls_sigmoid=cls_sigmoid).config).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 64))
    scores = sums_of_scores(output.class_queries_logits, output.masks_queries_logits, cls_sigmoid)
    np.testing.assert_allclose(output.logits.exp().numpy(), scores + 1e-6, rtol=1e-4)


def test_maps_of_classes_become_one_segment_a_class() -> None:
    labels = torch.tensor([[[3, 3, 255], [0, 255, 3]], [[255, 255, 255], [255, 255, 255]]], dtype=torch.uint8)
    maps, classes = segments_of_class_maps(labels, 4, 255)
    assert maps[0].tolist() == [[1, 1, -1], [0, -1, 1]] and classes[0].tolist() == [0, 3]
    assert maps[1].eq(-1).all() and classes[1].shape == (0,)
    maps, classes = segments_of_class_maps(torch.full((1, 1, 1), 255), 256, 255)
    assert maps[0].item() == 0 and classes[0].tolist() == [255]  # a class like any other
    wrong = [
        (torch.tensor([[[4]]]), "labels have the value 4, which is none of the classes 0 to 3 and not 255"),
        (torch.tensor([[[-100]]]), "labels have the value -100"),
        (torch.tensor([[4]]), r"integers of shape \(B, H, W\)"),
        (torch.tensor([[[1.0]]]), "not torch.float32"),
    ]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            segments_of_class_maps(bad, 4, 255)


def test_an_ignored_class_is_not_trained() -> None:
    """As in SegFormer: the pixels of a background class that is ignored do not count."""
    labels = torch.tensor([[[0, 2, 0], [1, 2, 2]]])
    maps, classes = segments_of_class_maps(labels, 3, 0)
    assert maps[0].tolist() == [[-1, 1, -1], [0, 1, 1]] and classes[0].tolist() == [1, 2]
    for ignored, num_labels, expected in ((0, 3, 0), (255, 3, 255), (255, 300, None), (65, 65, 65), (-1, 3, -1)):
        config = FaiM2FConfig(num_labels=num_labels)
        config.semantic_loss_ignore_index = ignored
        assert FaiM2FImageProcessor.from_model_config(config).ignore_index == expected


def test_the_loss_is_the_universal_models_of_the_processors_masks(folder: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    labels = np.kron(random.integers(0, 5, (2, 8, 12)), np.ones((8, 8), dtype=np.int64))
    labels[:, :16] = 255
    processor = FaiM2FImageProcessor.from_pretrained(folder)
    inputs = processor(list(pixels), list(labels.astype(np.uint8)), return_tensors="pt")
    semantic = FaiM2FForSemanticSegmentation.from_pretrained(folder).eval()
    torch.manual_seed(3)
    expected = FaiM2FForUniversalSegmentation.from_pretrained(folder).eval()(**inputs)
    torch.manual_seed(3)
    got = semantic(inputs["pixel_values"], labels=torch.from_numpy(labels))
    torch.testing.assert_close(got.loss, expected.loss)
    assert set(got.loss_dict) == set(expected.loss_dict)
    assert got.to_tuple()[0] is got.loss and got.to_tuple()[1] is got.logits and got.logits.shape == (2, 5, 16, 24)
    assert semantic(inputs["pixel_values"], return_dict=False)[0].shape == (2, 5, 16, 24)
    got.loss.backward()
    assert all(parameter.grad is not None for parameter in semantic.transformer_decoder.class_predictor.parameters())
    semantic.config.semantic_loss_ignore_index = 4  # SegFormer's name of the setting
    with pytest.raises(ValueError, match="labels have the value 255"):
        segments_of_class_maps(torch.from_numpy(labels), 3, semantic.config.ignore_value)


def test_one_folder_loads_in_all_auto_classes(folder: Path, tmp_path: Path) -> None:
    universal = AutoModelForUniversalSegmentation.from_pretrained(folder)
    semantic = AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert type(universal) is FaiM2FForUniversalSegmentation and type(semantic) is FaiM2FForSemanticSegmentation
    semantic.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["FaiM2FForSemanticSegmentation"]
    assert config["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
    assert "keys_to_ignore_at_inference" not in config
    for kind in (AutoModel, AutoModelForUniversalSegmentation, AutoModelForImageSegmentation):
        loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is FaiM2FForUniversalSegmentation
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, universal.state_dict()[name])
        assert loaded.config.keys_to_ignore_at_inference == ["loss_dict", "fused_classes"]
    assert type(AutoModelForSemanticSegmentation.from_pretrained(tmp_path)) is FaiM2FForSemanticSegmentation
    # Trainer would gather none of the other class's outputs.
    other = FaiM2FForUniversalSegmentation(semantic.config)
    assert other.config.keys_to_ignore_at_inference == ["loss_dict", "fused_classes"]
    assert "class_queries_logits" in semantic.config.keys_to_ignore_at_inference


def test_both_classes_as_remote_code_save_the_same_auto_map(tmp_path: Path) -> None:
    """Whichever class is loaded first: 4.57 records in a class the Auto class that it was loaded by."""
    small_model().save_pretrained(tmp_path / "first")
    kinds = (AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation)
    models = [kind.from_pretrained(tmp_path / "first", trust_remote_code=True) for kind in kinds]
    for model in models:
        model.save_pretrained(tmp_path / "again")
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        assert config["auto_map"] == json.loads((tmp_path / "first" / "config.json").read_text())["auto_map"]


def test_it_is_traced() -> None:
    config = small_model().config
    config.torchscript = True
    model = FaiM2FForSemanticSegmentation(config).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, pixels)(pixels)[0], model(pixels)[0])


def test_answers_are_the_universal_models() -> None:
    """With the image processor, with transformers' pipeline for every subtask, and for a batch that is run in parts."""
    universal = AutoModelForUniversalSegmentation.from_pretrained(DIGITS).eval()
    semantic = FaiM2FForSemanticSegmentation.from_pretrained(DIGITS).eval()
    processor = FaiM2FImageProcessor.from_pretrained(DIGITS)
    scenes = DigitScenes("test", 2, seed=7)
    images = [Image.fromarray(scenes[number]["image"].permute(1, 2, 0).numpy()) for number in range(2)]
    inputs = processor(images, return_tensors="pt")
    with torch.no_grad():
        theirs, ours = universal(**inputs), semantic(**inputs)
    sizes = [(128, 128)] * 2
    expected = processor.post_process_semantic_segmentation(theirs, target_sizes=sizes)
    got = processor.post_process_semantic_segmentation(ours, target_sizes=sizes)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    # Like the image processors of other semantic models, and their users.
    enlarged = F.interpolate(ours.logits, (128, 128), mode="bilinear", align_corners=False).argmax(1)
    assert (enlarged != torch.stack(expected)).float().mean() < 0.01
    pipes = [pipeline("image-segmentation", model=m, image_processor=processor) for m in (universal, semantic)]
    for more in ({}, {"subtask": "semantic"}, {"subtask": "instance"}, {"subtask": "panoptic"}):
        first, second = (pipe(images[0], **more) for pipe in pipes)
        assert len(first) > 1 and [s["label"] for s in first] == [s["label"] for s in second]
        assert all(np.array_equal(a["mask"], b["mask"]) for a, b in zip(first, second, strict=True))
    semantic.optimize_for_inference()
    many = inputs["pixel_values"].repeat(5, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(semantic(many).logits[-1], ours.logits[-1], atol=1e-3, rtol=1e-3)


class Maps(Dataset[dict[str, Tensor]]):
    """Scenes prepared like images in transformers' run_semantic_segmentation.py."""

    def __init__(self, processor: Any, count: int) -> None:
        self.scenes = DigitScenes("test", count, seed=11)
        self.processor = processor

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.scenes[index]
        pixels = self.processor(item["image"], input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        labels = class_map(item).long()
        return {"pixel_values": pixels[0], "labels": labels.masked_fill(labels < 0, 255)}


def test_transformers_trainer_evaluates_and_trains_it(tmp_path: Path) -> None:
    """The steps of run_semantic_segmentation.py: logits as NumPy, resized to the labels, argmax, mean IoU."""
    model = AutoModelForSemanticSegmentation.from_pretrained(DIGITS)
    processor = AutoImageProcessor.from_pretrained(DIGITS)
    seen: list[np.ndarray] = []

    def compute_metrics(eval_pred: Any) -> dict[str, float]:
        logits, labels = eval_pred
        enlarged = F.interpolate(torch.from_numpy(logits), labels.shape[-2:], mode="bilinear", align_corners=False)
        predicted = enlarged.argmax(1).numpy()
        seen.append(predicted)
        ious = []
        for label in range(logits.shape[1]):
            p, t = (predicted == label) & (labels != 255), labels == label
            if t.any():
                ious.append((p & t).sum() / (p | t).sum())
        return {"mean_iou": float(np.mean(ious)), "accuracy": float((predicted == labels)[labels != 255].mean())}

    data = Maps(processor, 4)
    arguments = TrainingArguments(
        str(tmp_path / "run"), per_device_eval_batch_size=2, per_device_train_batch_size=2, max_steps=1,
        learning_rate=0.0, remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=default_data_collator,
        compute_metrics=compute_metrics, processing_class=processor,
    )  # fmt: skip
    metrics = trainer.evaluate()
    # The digits' card has 84 on other scenes; the published figures use the processor's maps.
    assert metrics["eval_mean_iou"] > 0.75 and metrics["eval_accuracy"] > 0.97 and metrics["eval_loss"] > 0
    with torch.no_grad():
        outputs = model.eval()(torch.stack([data[number]["pixel_values"] for number in range(4)]))
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(128, 128)] * 4)
    assert (torch.stack(maps).numpy() != seen[0]).mean() < 0.01
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert type(loaded) is FaiM2FForUniversalSegmentation and loaded.config.label_ids_to_fuse == [10]
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").label_ids_to_fuse == [10]


def test_the_universal_models_predictions_in_a_trainer_stay_two(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForUniversalSegmentation.from_pretrained(folder, label_ids_to_fuse=[1])
    assert list(model(torch.zeros(1, 3, 64, 64))) == ["class_queries_logits", "masks_queries_logits", "fused_classes"]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True))
    data: Any = [{"pixel_values": torch.zeros(3, 64, 64)}] * 3
    predictions = trainer.predict(data).predictions
    assert [array.shape for array in predictions] == [(3, 10, 6), (3, 10, 16, 16)]


def test_new_labels_of_a_semantic_model(folder: Path) -> None:
    """Like in run_semantic_segmentation.py: a configuration with the data's labels, and the weights that match."""
    names = {0: "a", 1: "b", 2: "c"}
    config = AutoConfig.from_pretrained(
        folder, id2label=names, label2id={name: str(index) for index, name in names.items()}
    )
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    output = model(torch.zeros(1, 3, 64, 64), labels=torch.zeros(1, 64, 64, dtype=torch.long))
    assert output.logits.shape == (1, 3, 16, 16) and torch.isfinite(output.loss)
    everything_ignored = model(torch.zeros(1, 3, 64, 64), labels=torch.full((1, 64, 64), 255))
    assert torch.isfinite(everything_ignored.loss)
