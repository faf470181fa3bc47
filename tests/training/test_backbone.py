"""Training a new backbone alone: means over segments match a plain computation, and it learns to classify them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from hf_faim2f.data import SegmentationCollator
from hf_faim2f.data.collate import TrainingItems
from hf_faim2f.data.item import Item, make_item
from hf_faim2f.errors import ModelError
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.training.backbone import segment_means, train_backbone
from hf_faim2f.training.recipe import Recipe
from hf_faim2f.training.run import train
from hf_faim2f.training.run_folder import BACKBONE, begin_run, last_checkpoint
from tests.support.reference_models import small_model
from tests.support.short_training import processor_of, shapes_model
from tests.support.train_in_processes import Drawn, frozen_norms


@pytest.mark.parametrize("compact", [True, False])
def test_means_are_those_of_the_pixels_under_each_segment(compact: bool) -> None:
    """A segment of whole cells gives the mean of these cells; one within a cell gives that cell."""
    features = torch.randn(2, 5, 4, 6)
    ids = torch.full((2, 16, 24), -1, dtype=torch.int32)
    ids[0, :8, :12] = 0  # cells 0..1, 0..2
    ids[0, 12:, 20:] = 1  # the last cell
    ids[1, 5, 5] = 0  # a pixel in cell 1, 1
    counts = [2, 1]
    labels = [ids[0], ids[1]]
    if not compact:
        labels = [torch.stack([one == k for k in range(n)]) for one, n in zip(ids, counts, strict=True)]
    expected = torch.stack([features[0, :, :2, :3].mean((1, 2)), features[0, :, 3, 5], features[1, :, 1, 1]])
    torch.testing.assert_close(segment_means(features, labels, counts), expected)


def test_images_without_segments_have_no_means() -> None:
    empty = torch.full((16, 24), -1, dtype=torch.int32)
    assert segment_means(torch.randn(1, 5, 4, 6), [empty], [0]).shape == (0, 5)


def striped_items(count: int) -> list[Item]:
    """Squares of noise on noise, whose classes differ in the direction of their stripes."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(count):
        image = torch.randint(0, 256, (3, 64, 64), generator=generator)
        segments = torch.full((64, 64), -1)
        label = index % 2
        stripes = torch.arange(32) % 8 < 4
        square = stripes[:, None].expand(32, 32) if label else stripes.expand(32, 32)
        image[:, 16:48, 16:48] = 200 * square
        segments[16:48, 16:48] = 0
        items.append(make_item(image.to(torch.uint8), segments, [label], index, str(index)))
    return items


def test_a_backbone_learns_to_name_segments_and_the_rest_of_the_model_stays() -> None:
    torch.manual_seed(0)
    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe("test", steps=1, batch_size=4, backbone_steps=30, backbone_learning_rate=2e-3)
    collator = SegmentationCollator(FaiM2FImageProcessor())
    log = train_backbone(model, striped_items(40), collator, recipe, log_every=1)
    assert [row["backbone_step"] for row in log] == list(range(1, 31))
    named = [sum(row[f"named_{level}"] for row in log[-8:]) / 8 for level in range(4)]
    lowest = min(row["backbone_loss"] for row in log[-8:])
    assert max(named) > 0.9 and lowest < 0.5 * log[0]["backbone_loss"]
    assert model.training
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("backbone.") for name in changed)


def test_norms_and_biases_are_not_decayed() -> None:
    """As in the training of the whole model. A decay of 100 multiplies weights by 0.9 in each of these steps."""
    model = small_model()
    before = {name: value.clone() for name, value in model.backbone.named_parameters()}
    recipe = Recipe("test", steps=1, batch_size=4, weight_decay=100, backbone_steps=4, backbone_learning_rate=1e-3)
    train_backbone(model, striped_items(8), SegmentationCollator(FaiM2FImageProcessor()), recipe)
    kept = [
        (value.norm() / before[name].norm()).item() for name, value in model.backbone.named_parameters()
        if value.ndim == 1 and name.endswith("weight")
    ]  # fmt: skip
    decayed = [
        (value.norm() / before[name].norm()).item() for name, value in model.backbone.named_parameters()
        if value.ndim > 1
    ]  # fmt: skip
    assert min(kept) > 0.98 and max(decayed) < 0.9


def test_the_same_seed_trains_the_same() -> None:
    recipe = dataclasses.replace(Recipe("test", steps=1, batch_size=4), backbone_steps=3)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = small_model()
        train_backbone(model, striped_items(8), SegmentationCollator(FaiM2FImageProcessor()), recipe, seed=5)
        states.append(model.backbone.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=0, msg=name)


def test_passes_of_a_batch_make_the_steps_of_the_whole_batch() -> None:
    """Although their numbers of segments differ. Batch norm statistics would depend on the passes."""
    recipe = Recipe("test", steps=1, batch_size=4, backbone_steps=2, backbone_learning_rate=1e-5)
    items = striped_items(4)
    items[0]["segments"][:8], items[0]["classes"], items[0]["crowd"] = 1, torch.tensor([0, 1]), torch.zeros(2).bool()
    items[1]["segments"][:], items[1]["classes"], items[1]["crowd"] = -1, torch.tensor([]).long(), torch.zeros(0).bool()
    found, sizes = {}, []
    for at_once in (None, 4, 3, 1):
        torch.manual_seed(0)
        model = frozen_norms(small_model())
        model.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        collator = SegmentationCollator(FaiM2FImageProcessor())
        log = train_backbone(model, items, collator, recipe, at_once=at_once, log_every=1)
        assert max(sizes) == (at_once or 4)
        sizes.clear()
        found[at_once] = log, model.backbone.state_dict()
    first = found[None][0][0]["backbone_loss"]
    assert found[4][0] == found[None][0] and first == pytest.approx(math.log(model.config.num_labels), abs=1e-3)
    assert [log[0]["backbone_loss"] for log, _ in found.values()] == pytest.approx([first] * 4, abs=2e-4)
    for name, tensor in found[None][1].items():
        torch.testing.assert_close(found[4][1][name], tensor, rtol=0, atol=0, msg=name)
        for at_once in (3, 1):
            torch.testing.assert_close(found[at_once][1][name], tensor, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_its_backbone_in_its_passes_and_precision(tmp_path: Path, precision: str) -> None:
    model, seen = shapes_model(), []

    def spy(module: Any, arguments: Any, output: Any) -> None:
        seen.append((len(output.feature_maps[0]), output.feature_maps[0].dtype))

    model.backbone.register_forward_hook(spy)
    recipe = Recipe("test", steps=1, batch_size=4, backbone_steps=1)
    train(model, processor_of(model), striped_items(4), None, recipe, tmp_path, per_device_batch_size=2,
          precision=precision)  # fmt: skip
    # Without the passes of the step itself, which transformers 4.57 takes in the precision of an earlier run.
    assert seen[:2] == [(2, torch.bfloat16 if precision == "bf16" else torch.float32)] * 2 and len(seen) == 4


def test_every_epoch_is_augmented_anew() -> None:
    drawn, recipe = Drawn(), Recipe("r", 1, 4, backbone_steps=10)
    items = TrainingItems(striped_items(8), (drawn,))
    train_backbone(small_model(), items, SegmentationCollator(FaiM2FImageProcessor()), recipe)
    assert len(drawn.found) == 40 and len(set(drawn.found)) == 40
    for start in range(0, 40, 8):
        assert {image for image, _ in drawn.found[start : start + 8]} == set(range(8))


def test_the_backbone_of_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    model, recipe = shapes_model(), Recipe("test", steps=1, batch_size=2, backbone_steps=1)
    state = {name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}
    state.pop(next(iter(state)))
    for content in (save(state), b"damaged"):
        (tmp_path / BACKBONE).write_bytes(content)
        with pytest.raises(ModelError, match=rf"{BACKBONE} is damaged, or .* of type 'faim2f_\w+': choose another out"):
            train(model, processor_of(model), striped_items(4), None, recipe, tmp_path)


def test_a_trained_backbone_belongs_to_its_settings(tmp_path: Path) -> None:
    """A run that was interrupted before its first checkpoint; the number of steps determines the backbone's."""
    begin_run(tmp_path, {"model": "m", "data": "a", "steps": 10, "workers": 2}, {})
    assert last_checkpoint(tmp_path, {"model": "m", "data": "b", "steps": 10}) is None
    (tmp_path / BACKBONE).touch()
    assert last_checkpoint(tmp_path, {"model": "m", "data": "a", "steps": 10}) is None
    for changed, name in (({"data": "b", "steps": 10}, "data a, not with data b"), ({"data": "a"}, "steps 10, not")):
        with pytest.raises(ValueError, match=name):
            last_checkpoint(tmp_path, {"model": "m", **changed})
