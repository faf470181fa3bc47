"""A batch in parts, accumulated or across processes, gives the same step as the whole batch."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data.collate import SegmentationCollator
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.model import loss_faim2f
from hf_faim2f.training.recipe import make_optimizer
from hf_faim2f.training.trainer import BatchTotals, batch_totals, whole_batch_losses
from hf_faim2f.zoo import open_model
from tests.support import forks
from tests.support.reference_models import small_config, small_model
from tests.support.shapes import LABELS, Shapes
from tests.support.train_in_processes import RECIPE, fixed_points, frozen_norms, run

# For logged values; losses have four digits. A wrong weight of a part would change them by several percent.
STEPS_TOLERANCE = 1e-4


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_faim2f, "draw_points", fixed_points)


def shapes_model(**overrides: object) -> FaiM2FForUniversalSegmentation:
    values = {"id2label": dict(enumerate(LABELS)), "decoder_layers": 2, "train_num_points": 200, **overrides}
    return frozen_norms(small_model(**values)).train()


def collator(model: FaiM2FForUniversalSegmentation) -> SegmentationCollator:
    return SegmentationCollator(FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}))


def test_totals_by_hand() -> None:
    """5 queries: images with 2, 0 and 7 segments match 2, 0 and 5 of them; 8 of 15 queries are "no object"."""
    config = small_config(num_queries=5, no_object_weight=0.25)
    totals = batch_totals([torch.zeros(count) for count in (2, 0, 7)], config)
    assert totals.segments == 9 and totals.class_weight == 7 + 0.25 * 8


def test_totals_with_class_weights_by_hand() -> None:
    """Five of the seven segments of the last image are matched, and each counts as the mean of the seven."""
    config = small_config(num_queries=5, no_object_weight=0.25, num_labels=3, label_weights=[1, 2, 8])
    totals = batch_totals([torch.tensor([0, 2]), torch.tensor([]), torch.tensor([0, 0, 1, 1, 1, 2, 2])], config)
    assert totals.segments == 9
    assert totals.class_weight.item() == pytest.approx(1 + 8 + 5 * (2 * 1 + 3 * 2 + 2 * 8) / 7 + 0.25 * 8)


@pytest.mark.usefixtures("points")
@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_parts_add_up_with_class_weights(cls_sigmoid: bool) -> None:
    model = shapes_model(cls_sigmoid=cls_sigmoid, num_queries=9, label_weights=[0.1, 1, 5, 3])
    batch = collator(model)([Shapes(4)[index] for index in range(4)])
    whole = model(**batch).loss_dict
    parts = (slice(0, 1), slice(1, 4))
    totals = batch_totals(batch["class_labels"], model.config)
    summed = dict.fromkeys(whole, 0.0)
    for part in parts:
        inputs = {name: values[part] for name, values in batch.items()}
        outputs = model(**inputs, num_items_in_batch=totals.segments)
        losses = whole_batch_losses(outputs.loss_dict, inputs["class_labels"], totals, model.config, processes=1)
        summed = {name: value + losses[name].item() for name, value in summed.items()}
    assert summed == {name: pytest.approx(value.item(), rel=1e-5) for name, value in whole.items()}


@pytest.mark.usefixtures("points")
@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_parts_add_up_to_add_up_to_the_whole_batch(cls_sigmoid: bool) -> None:
    """Every named loss and every gradient; one image has no segments, and one has more segments than queries."""
    model = shapes_model(cls_sigmoid=cls_sigmoid, num_queries=3)
    batch = collator(model)([Shapes(4)[index] for index in range(4)])
    batch["class_labels"][1] = batch["class_labels"][1][:0]
    batch["mask_labels"][1] = torch.full_like(batch["mask_labels"][1], -1)
    many = torch.arange(64, dtype=torch.int32).repeat_interleave(64).view(64, 64) // 8
    batch["mask_labels"][2], batch["class_labels"][2] = many, torch.arange(8) % len(LABELS)
    whole = model(**batch)
    whole.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    totals = BatchTotals(*(sum(part) for part in zip(
        *(batch_totals(batch["class_labels"][part], model.config) for part in (slice(0, 1), slice(1, 4))), strict=True
    )))  # fmt: skip
    summed = dict.fromkeys(whole.loss_dict, 0.0)
    for part in (slice(0, 1), slice(1, 4)):
        inputs = {name: values[part] for name, values in batch.items()}
        outputs = model(**inputs, num_items_in_batch=totals.segments)
        # As for two processes, so that the factor has an effect; averaging the gradients would divide it out again.
        losses = whole_batch_losses(outputs.loss_dict, inputs["class_labels"], totals, model.config, processes=2)
        (sum(losses.values()) / 2).backward()
        summed = {name: value + losses[name].item() / 2 for name, value in summed.items()}
    assert set(summed) >= {"loss_ce", "loss_ce_0", "loss_mask", "loss_dice_1"}
    for name, value in summed.items():
        assert value == pytest.approx(whole.loss_dict[name].item(), rel=1e-5), name
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("points")
def test_accumulated_batches_make_the_steps_of_the_whole_batch(tmp_path: Path) -> None:
    whole, halves, single = (run(tmp_path / str(at_once), at_once) for at_once in (4, 2, 1))
    assert len(whole["log"]) == RECIPE.steps
    for parts in (halves, single):
        for expected, found in zip(whole["log"], parts["log"], strict=True):
            assert found == pytest.approx(expected, rel=STEPS_TOLERANCE)


@pytest.mark.large
@pytest.mark.usefixtures("points")
def test_two_processes_make_the_steps_of_one_and_measure_the_same(tmp_path: Path) -> None:
    """Each process accumulates two parts of one image; one of them evaluates three of the five images."""
    one = run(tmp_path / "one", 4)
    for process in forks.run_together(forks.MODULE, "tests.support.train_in_processes", tmp_path / "two"):
        assert process.returncode == 0, process.error
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    for expected, found in zip(one["log"], two["log"], strict=True):
        assert found == pytest.approx(expected, rel=STEPS_TOLERANCE)
    for subtask, result in one["results"].items():
        numbers = {name: value for name, value in result.items() if name != "per_class"}
        assert numbers == pytest.approx(
            {name: two["results"][subtask][name] for name in numbers}, rel=1e-6, nan_ok=True
        ), subtask
    assert one["results"]["semantic"]["mIoU"] > 0


@pytest.mark.large
def test_two_processes_augment_every_epoch_anew_and_measure_the_saved_model(tmp_path: Path) -> None:
    """Batch norms have other statistics in each process, and only those of the first are saved."""
    for process in forks.run_together(forks.MODULE, "tests.support.train_in_processes", tmp_path, "--live"):
        assert process.returncode == 0, process.error
    first, second = (json.loads((tmp_path / f"live-{rank}.json").read_text()) for rank in (0, 1))
    drawn = first["drawn"][:18] + second["drawn"][:18]  # Accelerate reads a batch ahead
    assert Counter(image for image, _ in drawn) == dict.fromkeys(range(12), 3)
    assert len({number for _, number in drawn}) == 36
    model, processor = open_model(tmp_path / "final")
    found = Evaluator(processor, model.config.id2label)(model, Shapes(5, seed=100))["semantic"]
    for results in (first["results"], second["results"]):
        for name, value in found.items():
            if name != "per_class":
                assert results["semantic"][name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_plain_accelerate_loop_trains(precision: str) -> None:
    """Without Trainer: `prepare`, gradients accumulated over two batches; the loss falls and stays finite."""
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests use another precision
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1, train_num_points=200).train()
    faster = replace(RECIPE, learning_rate=1e-3)
    loader: DataLoader = DataLoader(Shapes(80), batch_size=4, collate_fn=collator(model))  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model, faster), loader)
    losses = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                accelerator.backward(outputs.loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(outputs.loss.item())
    assert torch.tensor(losses).isfinite().all() and outputs.masks_queries_logits.isfinite().all()
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
