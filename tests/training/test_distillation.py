"""A teacher's outputs match the student's view, its losses are exact in parts, and unsuitable teachers are rejected."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data.augmentation import RandomFlip, ResizeShortestEdge, crop_item
from hf_faim2f.data.collate import MixedItems, SegmentationCollator, TrainingItems, UnlabelledImages
from hf_faim2f.data.dataset import Description
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.data.item import Item, make_item
from hf_faim2f.errors import DatasetError, DivergenceError, ModelError
from hf_faim2f.family.digits import LABELS as DIGIT_LABELS
from hf_faim2f.family.digits import THING_IDS
from hf_faim2f.model import loss_faim2f
from hf_faim2f.model.loss_faim2f import FaiM2FLoss
from hf_faim2f.model.point_sampling_faim2f import SegmentTargets
from hf_faim2f.training import Recipe, distillation
from hf_faim2f.training.distillation import (
    Answers,
    DistillationCollator,
    DistillationLoss,
    Teacher,
    answer,
    open_teacher,
)
from hf_faim2f.training.pixel_classes import pixel_class_loss, pixel_log_probabilities
from hf_faim2f.training.run import train
from hf_faim2f.training.trainer import FaiM2FTrainer
from tests.support import forks
from tests.support.painting_teacher import COLORS, painting_teacher
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, THINGS, Shapes, write_folder
from tests.support.shipped_digits import DIGITS
from tests.support.short_training import processor_of, shapes_model
from tests.support.train_in_processes import RECIPE, fixed_points, run

SEMANTIC = Description("shapes", "semantic", LABELS)
PANOPTIC = Description("shapes", "panoptic", LABELS, frozenset(THINGS))
SCENES = Description("scenes", "panoptic", tuple(DIGIT_LABELS), frozenset(THING_IDS))


def square_at(top: int, left: int, height: int, width: int, side: int = 20) -> Item:
    """An image of this size with one square, of class 1, on the ground."""
    segments = torch.zeros(height, width, dtype=torch.int32)
    segments[top : top + side, left : left + side] = 1
    pixels = COLORS[segments.long()].permute(2, 0, 1).to(torch.uint8)
    return make_item(pixels, segments, [0, 1], 0, "square.png")


def answers_for(items: list[Item], teacher: Teacher, points: Tensor) -> tuple[Answers, dict[str, Any]]:
    student = SegmentationCollator(FaiM2FImageProcessor(do_resize=False, image_mean=0.3, image_std=0.1))
    batch = DistillationCollator(student, teacher.processor)(items)
    return answer(teacher, batch["teacher_inputs"], batch["pixel_mask"], points), batch


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 64, "width": 96}},  # like the first image
        {"size": {"shortest_edge": 160}},
        {"size": {"height": 120, "width": 200}, "image_mean": 0.0, "image_std": 1.0},  # another shape
        {"size": {"shortest_edge": 100}, "size_divisor": 32},  # rounded up
        {"do_resize": False, "do_rescale": False, "image_mean": 128.0, "image_std": 50.0},
    ],
)
def test_soft_masks_lie_where_the_student_sees_the_square(settings: dict[str, Any]) -> None:
    """In a padded batch with an image of another shape, for all offsets of the square within a cell."""
    teacher = painting_teacher(**settings)
    errors = []
    for shift in range(4):
        items = [square_at(12 + shift, 40 + shift, 64, 96), square_at(40 + shift, 8 + shift, 80, 64)]
        answers, batch = answers_for(items, teacher, torch.rand(1, 2))
        frame = batch["pixel_values"].shape[-2:]
        assert frame == (80, 96)
        assert len({masks.shape[1:] for masks in answers.masks}) == 1  # equal, so that the loss does not pad them
        for item, masks, classes in zip(items, answers.masks, answers.classes, strict=True):
            assert classes.tolist() == [0, 1]
            for segment, mask in enumerate(masks):
                where = (item["segments"] == segment).nonzero().float() + 0.5
                rows, columns = ((torch.arange(cells) + 0.5) * side / cells
                                 for cells, side in zip(mask.shape, frame, strict=True))  # fmt: skip
                center = torch.stack([(mask.sum(1) * rows).sum(), (mask.sum(0) * columns).sum()]) / mask.sum()
                area = mask.mean() * frame[0] * frame[1]
                assert area == pytest.approx(len(where), rel=0.05)
                if segment == 1:
                    errors.append(center - where.mean(0))
    # Resampling coarse maps causes errors of a few hundredths in either direction; a wrong frame would always cause the
    # same error.
    assert torch.stack(errors).abs().max() < 0.2
    assert torch.stack(errors).mean(0).abs().max() < 0.05, torch.stack(errors)


def test_the_classes_of_pixels_are_those_of_the_labels() -> None:
    torch.manual_seed(0)
    points = torch.rand(2000, 2)
    items = [square_at(13, 41, 64, 96), square_at(42, 9, 80, 64)]
    answers, batch = answers_for(items, painting_teacher(size={"shortest_edge": 256}), points)
    targets = SegmentTargets(batch["mask_labels"], batch["class_labels"], 4, 2, torch.device("cpu"))
    for image in range(2):
        truth = targets.sample_all(image, points)
        clear = (truth > 0.999).any(0)  # not on a border
        assert clear.float().mean() > 0.5
        assert (answers.probabilities[image].argmax(0) == truth.argmax(0))[clear].float().mean() > 0.995
        inside = torch.stack([batch["pixel_mask"][image][int(y * 80), int(x * 96)] for x, y in points.tolist()])
        assert (answers.weights[image][inside == 0] == 0).all()
        assert (answers.weights[image][clear] > 0.95).float().mean() > 0.98
    torch.testing.assert_close(answers.probabilities.sum(1), torch.ones(2, 2000))


def test_a_teacher_with_the_labels_in_another_order() -> None:
    items, points = [square_at(12, 40, 64, 96)], torch.rand(50, 2)
    plain, _ = answers_for(items, painting_teacher(), points)
    mapped, _ = answers_for(items, painting_teacher(classes=[2, 3, 0, 1]), points)
    assert plain.classes[0].tolist() == [0, 1] and mapped.classes[0].tolist() == [2, 3]
    torch.testing.assert_close(mapped.masks[0], plain.masks[0])
    torch.testing.assert_close(mapped.probabilities[:, [2, 3, 0, 1]], plain.probabilities)


@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_pixels_are_scored_as_the_teachers_classes(cls_sigmoid: bool) -> None:
    """In the middle of the square and far from it, with logits 2 for the class, 1 for the others and 0 for none."""
    teacher = painting_teacher()
    teacher.model.config.cls_sigmoid = cls_sigmoid
    more = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    teacher.model.register_forward_hook(
        lambda _, inputs, outputs: {**outputs, "class_queries_logits": outputs["class_queries_logits"] / 10 + more}
    )
    points = torch.tensor([[50 / 96, 22 / 64], [10 / 96, 50 / 64]])
    answers, _ = answers_for([square_at(12, 40, 64, 96)], teacher, points)
    if cls_sigmoid:
        own, other = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
        covered = own
    else:
        own, other = (math.exp(value) / (math.exp(2) + 3 * math.exp(1) + 1) for value in (2, 1))
        covered = own + 3 * other
    expected = torch.full((4, 2), other)
    expected[1, 0] = expected[0, 1] = own
    torch.testing.assert_close(answers.probabilities[0], expected / (own + 3 * other), rtol=0, atol=1e-4)
    torch.testing.assert_close(answers.weights[0], torch.full((2,), covered), rtol=0, atol=1e-4)


@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_confident_queries_become_segments(cls_sigmoid: bool) -> None:
    """Unsure and empty ones do not, nor do unsure masks if their score is used; those of a stuff class are merged. With
    sigmoids, the classes do not compete, and the last query is sure enough."""
    logits = torch.full((6, 4), -9.0)
    logits[0, 0] = logits[1, 0] = logits[2, 1] = logits[3, 1] = logits[4, 2] = 9.0
    logits[5] = torch.tensor([0.0, 0.1, 0.0, 0.0])
    masks = torch.full((6, 1, 4), -9.0)
    masks[0, 0, 0] = masks[1, 0, 1] = masks[2, 0, 2] = masks[3, 0, 3] = masks[5, 0, 0] = 9.0
    masks[3, 0, 3] = 0.1
    teacher = painting_teacher(classes=[0, 1, 2])
    teacher.model.config.cls_sigmoid = cls_sigmoid

    def found(**changes: Any) -> list[tuple[int, list[float]]]:
        own = Teacher(teacher.name, teacher.model, FaiM2FImageProcessor(**changes), teacher.classes, frozenset({0}))
        kept, classes = distillation._segments(own, logits, masks)
        return sorted(zip(classes.tolist(), kept[:, 0].round(decimals=2).tolist(), strict=True))

    last = [(1, [1, 0, 0, 0])] if cls_sigmoid else []
    assert found() == [(0, [1, 1, 0, 0]), (1, [0, 0, 0, pytest.approx(0.52)]), (1, [0, 0, 1, 0]), *last]
    assert found(use_mask_score=True, threshold=0.6) == [(0, [1, 1, 0, 0]), (1, [0, 0, 1, 0])]


def test_the_losses_are_those_of_the_criterion_and_of_the_pixels() -> None:
    """If an image counts as unlabeled, its labels have no effect; the teacher's losses are weighted."""
    model = shapes_model().train()
    items = [Shapes(3)[index] for index in range(3)]
    points = torch.rand(40, 2)
    teacher = painting_teacher(weight=0.5)
    answers, batch = answers_for(items, teacher, points)
    parts: list[Any] = []
    criterion = model.criterion
    criterion.register_forward_pre_hook(lambda _, arguments: parts.append(arguments))
    model(batch["pixel_values"], batch["mask_labels"], batch["class_labels"])
    masks, classes, *_, auxiliary, _ = parts[0]

    def losses(is_labelled: list[bool], class_labels: list[Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        loss = DistillationLoss(
            criterion, teacher, answers, torch.tensor(is_labelled), torch.tensor(7.0), torch.tensor(3)
        )
        return loss(masks, classes, batch["mask_labels"], class_labels, auxiliary, torch.tensor(9.0))

    found = losses([True, False, True], batch["class_labels"])
    torch.manual_seed(0)
    taught = criterion(masks, classes, answers.masks, answers.classes, auxiliary, torch.tensor(7.0))
    own = criterion(masks.full()[[0, 2]], classes[[0, 2]], batch["mask_labels"][::2], batch["class_labels"][::2],
                    [{"masks_queries_logits": one["masks_queries_logits"].full()[[0, 2]],
                      "class_queries_logits": one["class_queries_logits"][[0, 2]]} for one in auxiliary],
                    torch.tensor(9.0))  # fmt: skip
    for name, value in own.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name.replace("loss", "teacher")], 0.5 * taught[name])
    predicted = pixel_log_probabilities(masks, classes, points, cls_sigmoid=False)
    pixels = pixel_class_loss(predicted, answers.probabilities, answers.weights)
    torch.testing.assert_close(found["teacher_pixel"], 5 * 0.5 * pixels)

    nothing = losses([False] * 3, [torch.zeros(0, dtype=torch.long)] * 3)
    assert list(nothing) == list(found)
    assert all(float(value.detach()) == 0 for name, value in nothing.items() if name.startswith("loss_"))
    sum(nothing.values()).backward()


@pytest.mark.large
@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_accumulated_batches_make_the_steps_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls_sigmoid: bool
) -> None:
    """With a teacher, and with half of the images unlabeled, so that some parts have no labels."""
    monkeypatch.setattr(loss_faim2f, "draw_points", fixed_points)
    unlabelled = UnlabelledImages(write_folder(tmp_path / "data", 12, seed=50) / "images")
    more = {"teacher": painting_teacher(), "unlabelled": unlabelled, "cls_sigmoid": cls_sigmoid}
    whole, halves, single = (run(tmp_path / str(at_once), at_once, **more) for at_once in (4, 2, 1))
    assert len(whole["log"]) == RECIPE.steps and {"teacher_ce", "teacher_pixel"} <= set(whole["log"][0])
    for parts in (halves, single):
        for expected, found in zip(whole["log"], parts["log"], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.large
def test_two_processes_make_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_faim2f, "draw_points", fixed_points)
    images = write_folder(tmp_path / "data", 12, seed=50) / "images"
    one = run(tmp_path / "one", 4, teacher=painting_teacher(), unlabelled=UnlabelledImages(images))
    for process in forks.run_together(forks.MODULE, "tests.support.train_in_processes", tmp_path / "two", images):
        assert process.returncode == 0, process.error
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    for expected, found in zip(one["log"], two["log"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def quick(out: Path, model: FaiM2FForUniversalSegmentation | None = None, **changes: Any) -> dict[str, Tensor]:
    """Trains a few steps with a teacher and a checkpoint every second step; returns the averaged weights."""
    model = model or shapes_model(dropout=0.1)
    folder = out.parent / "data"
    if not folder.exists():
        write_folder(folder, 3, seed=50)
    items = MixedItems(Shapes(4), UnlabelledImages(folder / "images"))  # type: ignore[arg-type]
    augmented = TrainingItems(items, [ResizeShortestEdge((48, 80)), RandomFlip()])
    recipe = Recipe("test", steps=4, batch_size=2, learning_rate=1e-3, clip=1.0, ema_decay=0.5)
    processor = processor_of(model)
    train(model, processor, augmented, None, recipe, out, save_every=2, log_every=1,
          collator=SegmentationCollator(processor), teacher=painting_teacher(), **changes)  # fmt: skip
    return load_file(out / "final" / "model.safetensors")


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = quick(tmp_path / "whole")
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = quick(tmp_path / "again")
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0, msg=name)
    log = json.loads((tmp_path / "whole" / "log.json").read_text())["log"]
    names = {"teacher_ce", "teacher_mask", "teacher_dice", "teacher_pixel", "loss_ce"}
    assert all(names <= set(entry) and entry["teacher_pixel"] > 0 for entry in log if "loss" in entry)
    named = [sum(value for name, value in entry.items() if name.startswith(("loss_", "teacher_"))) for entry in log[:2]]
    assert named == pytest.approx([entry["loss"] for entry in log[:2]], abs=2e-3)


def test_a_student_in_peft_s_wrapper_learns_from_the_teacher(tmp_path: Path) -> None:
    """The wrapper forwards attribute reads, but not assignments."""
    model, items = shapes_model(), Shapes(2)
    collator = DistillationCollator(SegmentationCollator(processor_of(model)), painting_teacher().processor)
    trainer = FaiM2FTrainer(
        model=peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")),
        recipe=Recipe("test", steps=1, batch_size=2, learning_rate=1e-3),
        teacher=painting_teacher(), data_collator=collator, train_dataset=items,
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
    )  # fmt: skip
    loss, outputs = trainer.compute_loss(trainer.model, collator([items[0], items[1]]), return_outputs=True)
    assert {"teacher_ce", "teacher_pixel", "loss_ce"} <= set(outputs.loss_dict)
    assert torch.isclose(loss, torch.stack(list(outputs.loss_dict.values())).sum(), rtol=1e-4)
    assert type(model.criterion) is FaiM2FLoss


def test_in_bfloat16_and_with_weights_that_diverge(tmp_path: Path) -> None:
    weights = quick(tmp_path / "bf16", precision="bf16")
    assert all(value.isfinite().all() for value in weights.values())
    broken = shapes_model()
    with torch.no_grad():
        next(broken.transformer_decoder.parameters()).fill_(float("inf"))
    with pytest.raises(DivergenceError, match="diverged in step 1"):
        quick(tmp_path / "broken", model=broken)


def save(model: FaiM2FForUniversalSegmentation, folder: Path) -> str:
    model.save_pretrained(folder)
    processor_of(model).save_pretrained(folder)
    return str(folder)


def test_teachers_that_are_refused(tmp_path: Path) -> None:
    """Other labels, some of the labels, no instances, and random weights."""
    labels = dict(enumerate(LABELS))

    def named(names: list[str], **settings: Any) -> str:
        return save(small_model(id2label=dict(enumerate(names)), decoder_layers=1, **settings), tmp_path / "model")

    shapes: Any = Shapes(4)
    with pytest.raises(ModelError, match=r"Class 3 is 'ring' in .*, but 'bar' in shapes: a teacher must have"):
        open_teacher(named(["ground", "square", "disc", "ring"]), SEMANTIC, shapes)
    with pytest.raises(ModelError, match=r"has 5 classes, but shapes 4: a teacher must have the labels"):
        open_teacher(named([*LABELS, "ring"]), SEMANTIC, shapes)
    with pytest.raises(ModelError, match=r"has 3 classes, but shapes 4"):
        open_teacher(named(list(LABELS[:3])), SEMANTIC, shapes)
    with pytest.raises(ModelError, match=r"does not distinguish instances, as shapes does"):
        open_teacher(named(list(LABELS), postprocessing_type="semantic"), PANOPTIC, shapes)
    for random in (named(list(labels.values())), named(list(reversed(LABELS)))):
        with pytest.raises(ModelError, match=r"finds 0 of the \d+ labeled segments in 4 images of shapes .*random"):
            open_teacher(random, SEMANTIC, shapes)
    four = replace(SEMANTIC, num_channels=4)
    with pytest.raises(ModelError, match=r"takes images of 3 channels, but those of shapes have 4"):
        open_teacher(named(list(LABELS)), four, shapes)
    with pytest.raises(ModelError, match=r"fai-m2f-s-ade has 150 classes, but shapes 4"):  # before any download
        open_teacher("fai-m2f-s-ade", SEMANTIC, shapes)


def test_a_trained_teacher_is_opened_and_says_what_it_finds(tmp_path: Path) -> None:
    """The shipped model, also with permuted labels; with entirely different labels it finds nothing."""
    scenes: Any = DigitScenes("train", 10)
    teacher = open_teacher(DIGITS, SCENES, scenes, weight=2.0)
    assert (teacher.weight, teacher.short_name) == (2.0, "digits")
    assert teacher.fused == {DIGIT_LABELS.index("background")}
    found, wanted = _numbers(teacher.notes[0])
    assert found > 0.7 * wanted > 10

    order = [*range(5, 11), *range(5)]
    labels = tuple(DIGIT_LABELS[index] for index in order)

    class Renamed:
        def __len__(self) -> int:
            return len(scenes)

        def __getitem__(self, index: int) -> Item:
            item = scenes[index].copy()
            item["classes"] = torch.tensor([order.index(label) for label in item["classes"].tolist()])
            return item

    things = frozenset(index for index, label in enumerate(labels) if label != "background")
    shuffled = Description("scenes", "panoptic", labels, things)
    again = open_teacher(DIGITS, shuffled, Renamed())  # type: ignore[arg-type]
    assert _numbers(again.notes[0]) == (found, wanted) and "matched by name" in again.notes[1]
    with pytest.raises(ModelError, match="was trained on other data"):
        open_teacher(DIGITS, shuffled, scenes)


def _numbers(note: str) -> tuple[int, int]:
    numbers = [int(word) for word in note.split() if word.isdigit()]
    return numbers[0], numbers[1]


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [
        ({"size": 360}, {"size": 360}, (40, 60)),
        ({"size": 360}, {"size": 720}, (80, 120)),
        ({"size": 360}, {"size": 720, "size_divisor": 32}, (96, 128)),
        ({"size": {"height": 100, "width": 200}}, {"size": {"height": 200, "width": 200}}, (80, 60)),
        ({"size": {"height": 80, "width": 90}}, {"do_resize": False}, (20, 40)),
    ],
)
def test_the_teacher_sees_crops_at_the_scale_of_whole_images(
    student: dict[str, Any], teacher: dict[str, Any], size: tuple[int, int]
) -> None:
    """A crop of 40x60 is no whole image, which the teacher would enlarge to its size."""
    own, other = FaiM2FImageProcessor(**student), FaiM2FImageProcessor(**teacher)
    items = [square_at(5, 20, 40, 60)]
    batch = DistillationCollator(SegmentationCollator(own), other)(items)
    assert batch["pixel_values"].shape[-2:] == (40, 60)
    seen = batch["teacher_inputs"]["pixel_values"]
    assert seen.shape[-2:] == size
    expected = other.preprocess(
        items[0]["image"], input_data_format="channels_first", return_tensors="pt",
        do_resize=True, size={"height": size[0], "width": size[1]}, size_divisor=0,
    )  # fmt: skip
    assert torch.equal(seen, expected["pixel_values"])
    # Items that the student resizes are whole images, and the teacher resizes them to its own size.
    whole = DistillationCollator(SegmentationCollator(own, do_resize=True), other)(items)
    expected = other.preprocess(items[0]["image"], input_data_format="channels_first", return_tensors="pt")
    assert torch.equal(whole["teacher_inputs"]["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("teacher", "size"),
    [
        ({"size": {"height": 100, "width": 100}}, (20, 20)),
        ({"size": {"shortest_edge": 400, "longest_edge": 600}}, (60, 120)),  # sees the whole image as 300x600
    ],
)
def test_the_teacher_sees_a_crop_at_the_scale_of_its_image(teacher: dict[str, Any], size: tuple[int, int]) -> None:
    """The image of 200x400 has the student's size. By the square crop alone, its scale would be another one."""
    crop = crop_item(square_at(5, 20, 200, 400), 0, 0, 40, 80)
    items = [crop, crop_item(crop, 0, 0, 40, 40)]
    own, other = FaiM2FImageProcessor(size={"shortest_edge": 200}), FaiM2FImageProcessor(**teacher)
    batch = DistillationCollator(SegmentationCollator(own), other)(items)
    assert batch["teacher_inputs"]["pixel_mask"].sum((1, 2)).tolist() == [size[0] * size[1], size[0] * size[1] // 2]


def test_mixed_items_are_half_unlabelled(tmp_path: Path) -> None:
    images = UnlabelledImages(write_folder(tmp_path, 5, seed=50) / "images")
    for folder in (tmp_path, tmp_path / "masks"):
        with pytest.raises(DatasetError, match="masks has maps of labels: name a folder that has only images."):
            UnlabelledImages(folder)
    camvid = shutil.copytree(tmp_path / "images", tmp_path / "camvid" / "trainannot")
    UnlabelledImages(camvid.parent)  # any name may have that end
    (camvid.parent / "train").mkdir()
    with pytest.raises(DatasetError, match="trainannot has maps of labels"):
        UnlabelledImages(camvid.parent)
    roboflow = shutil.copytree(tmp_path / "images", tmp_path / "roboflow")
    (roboflow / "_classes.csv").touch()
    UnlabelledImages(roboflow)  # as in an export for classification
    shutil.copy(next(roboflow.glob("*.png")), roboflow / "a_mask.png")
    with pytest.raises(DatasetError, match=r"roboflow has maps of labels \(_classes.csv\)"):
        UnlabelledImages(roboflow)
    assert len(images) == 5 and not len(images[0]["classes"]) and (images[0]["segments"] == -1).all()
    mixed = MixedItems(Shapes(2), images)  # type: ignore[arg-type]
    assert [len(mixed[index]["classes"]) > 0 for index in range(len(mixed))] == [True] * 5 + [False] * 5
    assert len({mixed[index]["file_name"] for index in range(5, 10)}) == 5
    collated = DistillationCollator(SegmentationCollator(FaiM2FImageProcessor(size=64)), FaiM2FImageProcessor(size=64))(
        [TrainingItems(mixed, [RandomFlip(1)])[index] for index in (0, 5)]
    )
    assert collated["is_labelled"].tolist() == [True, False]
    flipped = np.asarray(images[0]["image"].flip(-1), dtype=np.float32)
    scale = 1 / 255 / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    own = (torch.from_numpy(flipped) * scale) - torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255 * scale
    torch.testing.assert_close(collated["teacher_inputs"]["pixel_values"][1], own, rtol=1e-4, atol=1e-5)
