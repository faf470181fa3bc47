"""Training by recipe: parameter groups, schedules, accumulation, averaging, and killed runs that are resumed."""

import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import SwinConfig, TrainingArguments

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data.augmentation import RandomCrop, from_config, to_config
from hf_faim2f.data.collate import SegmentationCollator, TrainingItems
from hf_faim2f.data.digits import LABELS, DigitScenes
from hf_faim2f.errors import SettingsError
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.family.digits import THING_IDS, digits_config
from hf_faim2f.training import RECIPES, Recipe, find_recipe
from hf_faim2f.training import recipe as recipe_module
from hf_faim2f.training import run as run_module
from hf_faim2f.training import trainer as trainer_module
from hf_faim2f.training.recipe import follow_recipe, make_optimizer, make_schedule, parameter_groups
from hf_faim2f.training.run import shortened, train
from hf_faim2f.training.trainer import FaiM2FTrainer
from tests.support.forks import Fork
from tests.support.reference_models import small_model
from tests.support.shapes import Shapes
from tests.support.short_training import RECIPE, digits_model, processor_of, shapes_model
from tests.support.train_in_processes import Drawn


def test_every_parameter_is_in_one_group_with_its_decay_and_rate() -> None:
    model, recipe = small_model(), Recipe("r", 10, 2, learning_rate=1e-2, backbone_multiplier=0.1)
    groups = parameter_groups(model, recipe)
    place = {id(p): group for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert len(place) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        group = place[id(parameter)]
        assert group["lr"] == (1e-3 if name.startswith("backbone") else 1e-2), name
        plain = parameter.ndim == 1 or "query" in name
        assert group["weight_decay"] == (0.0 if plain else 0.05), name


def test_positions_are_not_decayed() -> None:
    backbone = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4)
    model = small_model(backbone_config=backbone)
    decayed = {id(p) for group in parameter_groups(model, RECIPE) if group["weight_decay"] for p in group["params"]}  # type: ignore[attr-defined]
    tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 4 and not decayed.intersection(map(id, tables))


def test_frozen_parameters_are_in_no_group() -> None:
    model = small_model(backbone_freeze_at=4).train()
    groups = parameter_groups(model, RECIPE)
    assert all(p.requires_grad for group in groups for p in group["params"])  # type: ignore[attr-defined]


def test_a_wrapped_backbone_keeps_its_rate() -> None:
    """torch.compile, DistributedDataParallel and PEFT prefix the names of parameters."""
    model, recipe = small_model(), Recipe("r", 10, 2, backbone_multiplier=0.1)
    wrapped = torch.nn.ModuleDict({"base_model": model})
    assert parameter_groups(wrapped, recipe) == parameter_groups(model, recipe)


CLIPPED = replace(RECIPE, clip=0.01, mask_points=32)


def trainer(folder: Path, arguments: dict[str, Any], **more: Any) -> FaiM2FTrainer:
    """A trainer with plain training arguments, which the recipe's must override."""
    model = shapes_model()
    how = TrainingArguments(str(folder), use_cpu=True, report_to=[], remove_unused_columns=False, disable_tqdm=True,
                            per_device_train_batch_size=2, **arguments)  # fmt: skip
    collator = SegmentationCollator(processor_of(model), do_resize=True)
    return FaiM2FTrainer(recipe=CLIPPED, model=model, args=how, train_dataset=Shapes(8), data_collator=collator, **more)


def test_the_recipe_replaces_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping, steps and points; a warning names other arguments that the user may have set."""
    said: list[str] = []
    monkeypatch.setattr(recipe_module.logger, "warning", said.append)
    plain = trainer(tmp_path, {})
    assert (plain.args.max_grad_norm, plain.args.max_steps) == (0.01, RECIPE.steps)
    assert plain.model.config.train_num_points == 32
    assert trainer(tmp_path, {"max_steps": 2, "learning_rate": RECIPE.learning_rate}).args.max_steps == 2
    assert not said
    own = {"learning_rate": 3e-5, "max_grad_norm": 5.0, "lr_scheduler_type": "cosine", "optim": "adamw_torch"}
    assert trainer(tmp_path, own).args.max_grad_norm == 0.01
    told = "learning_rate, max_grad_norm, lr_scheduler_type"
    assert len(said) == 1 and f"takes {told} from the recipe test" in said[0]
    ignored = {"num_train_epochs": 1, "optim": "sgd", "adam_beta2": 0.5}
    assert trainer(tmp_path, ignored).args.max_steps == RECIPE.steps
    assert len(said) == 2 and "ignores optim, adam_beta2, num_train_epochs: it uses AdamW" in said[1]
    trainer(tmp_path, {"num_train_epochs": 1, "max_steps": 2})
    assert len(said) == 2


def test_the_hub_gets_averaged_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would push each checkpoint, whose weights are not averaged."""
    said: list[str] = []
    monkeypatch.setattr(recipe_module.logger, "warning", said.append)
    for decay, strategy in ((0.5, "end"), (0.0, "every_save")):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, push_to_hub=True)
        follow_recipe(arguments, replace(CLIPPED, ema_decay=decay))
        assert arguments.hub_strategy == strategy
    assert len(said) == 1 and "checkpoints hold the weights before averaging" in said[0]


def test_a_process_uses_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer would split batches by DataParallel, and double them."""
    said: list[str] = []
    batches: list[int] = []
    monkeypatch.setattr(recipe_module.logger, "warning", said.append)
    finish = TrainingArguments.__post_init__

    def two_gpus(arguments: TrainingArguments) -> None:
        finish(arguments)
        assert arguments.device.type == "cpu"  # looks for GPUs
        arguments._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", two_gpus)
    made = trainer(tmp_path, {"max_steps": 1, "save_strategy": "no"})
    made.model.register_forward_pre_hook(
        lambda model, positional, named: batches.append(len(named["pixel_values"])), with_kwargs=True
    )
    made.train()
    assert batches == [2] and len(said) == 1 and "one of 2 GPUs" in said[0]


def test_another_training_starts_the_schedule_and_the_average_anew(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"max_steps": 3, "logging_steps": 1, "save_strategy": "no"})
    rates = []
    for _ in range(2):
        made.train()
        rates.append([entry["learning_rate"] for entry in made.state.log_history if "loss" in entry])
        assert made.average is not None and int(made.average.averaged.n_averaged) == 3
    assert rates[0] == rates[1] and max(rates[0]) == RECIPE.learning_rate


def test_averaged_weights_are_what_is_saved_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, {"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    made.train()
    name = "transformer_decoder.class_predictor.weight"
    trained, averaged = (each.state_dict()[name].clone() for each in (made.model, made.averaged_model()))
    assert not torch.equal(trained, averaged)
    made.save_model(str(tmp_path / "saved"))
    assert torch.equal(load_file(tmp_path / "saved/model.safetensors")[name], averaged)
    assert torch.equal(load_file(tmp_path / "checkpoint-2/model.safetensors")[name], trained)
    seen: list[Any] = []

    def loss_of(model: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        seen.append(model)
        return torch.zeros(()), (torch.zeros(2, 1),)

    batch = made.data_collator([Shapes(2)[0]])
    made.compute_loss(made.model.eval(), batch)
    assert not made._of_step  # the log is of training alone
    made.compute_loss(made.model.train(), batch)
    assert made._of_step
    monkeypatch.setattr(made, "compute_loss", loss_of)
    made.predict(Shapes(2))
    assert seen == [made.averaged_model()] and made.model is not made.averaged_model()
    made.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    made._load_best_model()
    best = load_file(tmp_path / "checkpoint-1/average.safetensors")[f"module.{name}"]
    assert torch.equal(made.averaged_model().state_dict()[name], best) and not torch.equal(best, averaged)


@pytest.mark.parametrize(
    ("arguments", "more", "complaint"),
    [
        ({"max_steps": 60}, {}, "max_steps is 60, but .* ends after 6 steps: pass dataclasses.replace"),
        ({"label_smoothing_factor": 0.1}, {}, "does not use label_smoothing_factor"),
        ({"eval_strategy": "epoch"}, {"eval_dataset": Shapes(2)}, "eval_strategy needs an evaluator: pass one"),
        ({}, {"compute_metrics": lambda prediction: {}}, "does not use compute_metrics: .* with an evaluator"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(
    tmp_path: Path, arguments: dict[str, Any], more: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SettingsError, match=complaint):
        trainer(tmp_path, arguments, **more)


@pytest.mark.parametrize("name", RECIPES)
def test_schedules(name: str) -> None:
    recipe = find_recipe(name)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), shortened(recipe, 100))
    schedule = make_schedule(optimizer, shortened(recipe, 100))
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"] / recipe.learning_rate)
        optimizer.step()
        schedule.step()
    warm = min(recipe.warmup_steps, 10)
    assert rates[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    after = rates[warm:]
    if recipe.schedule == "step":
        assert after == pytest.approx([1.0] * (90 - warm) + [0.1] * 5 + [0.01] * 5)
        return
    assert after == sorted(after, reverse=True)
    known = {
        "poly": {25: 0.75**0.9, 50: 0.5**0.9, 90: 0.1**0.9, 99: 0.01**0.9},
        "cosine": {25: (1 + 0.5**0.5) / 2, 50: 0.5, 75: (1 - 0.5**0.5) / 2, 99: math.sin(math.pi / 200) ** 2},
    }[recipe.schedule]
    assert {step: rates[step] for step in known} == pytest.approx(known)


def test_recipes_are_data() -> None:
    """Augmentations survive a round trip through JSON; the crops are the published ones."""
    crops = {
        "ade20k-semantic": (640, 640),
        "coco-instance": (1024, 1024),
        "cityscapes": (512, 1024),
        "coco-panoptic": (1024, 1024),
    }
    for name, recipe in RECIPES.items():
        config = json.loads(json.dumps(to_config(recipe.augmentations)))
        assert from_config(config) == recipe.augmentations
        if name in crops:
            sizes = [(step["height"], step["width"]) for step in config if "height" in step]
            assert sizes == [crops[name]]
            assert {"name": "RandomFlip", "probability": 0.5} in config
    assert (find_recipe("cityscapes").steps, find_recipe("cityscapes").batch_size) == (90_000, 16)


def test_unknown_recipes_list_the_known() -> None:
    with pytest.raises(ValueError, match="Known: ade20k-semantic, .* Did you mean 'digits'"):
        find_recipe("digit")
    with pytest.raises(ValueError, match="schedule must be"):
        Recipe("r", 1, 1, schedule="linear")


def test_an_evaluation_that_would_not_be_is_refused(tmp_path: Path) -> None:
    model = digits_model()
    processor = processor_of(model)
    evaluator = Evaluator(processor, model.config.id2label)
    for items, more in ((Shapes(2), {}), (None, {"evaluator": evaluator}), (None, {"evaluate_every": 2})):
        with pytest.raises(ValueError, match="needs both evaluator and eval_items: pass both"):
            train(model, processor, Shapes(4), items, RECIPE, tmp_path, **more)  # type: ignore[arg-type]


def test_augmented_items_are_not_resized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the recipe's random scales would be undone."""
    model, made = shapes_model(), []

    class Stopped(Exception):
        pass

    def stop(**arguments: Any) -> None:
        made.append(arguments["data_collator"].do_resize)
        raise Stopped

    monkeypatch.setattr(run_module, "FaiM2FTrainer", stop)
    for items in (Shapes(4), TrainingItems(Shapes(4)), TrainingItems(Shapes(4), [RandomCrop(32, 32)])):
        with pytest.raises(Stopped):
            train(model, processor_of(model), items, None, RECIPE, tmp_path)  # type: ignore[arg-type]
    assert made == [True, True, False]


def losses(history: list[dict]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_a_run_leaves_a_folder_that_loads(tmp_path: Path) -> None:
    model = digits_model()
    processor = processor_of(model)
    evaluator = Evaluator(processor, model.config.id2label, ("semantic", "instance", "panoptic"), THING_IDS)
    trainer = train(
        model, processor, DigitScenes("train", 24, size=64), DigitScenes("test", 3, size=64), RECIPE, tmp_path,
        evaluator=evaluator, evaluate_every=3, log_every=1, save_every=3,
    )  # fmt: skip
    history = trainer.state.log_history
    for entry in (entry for entry in history if "loss" in entry):
        last = entry["loss_ce"] + entry["loss_mask"] + entry["loss_dice"]
        inner = sum(entry[f"loss_{kind}_intermediate"] for kind in ("ce", "mask", "dice"))
        assert last + inner == pytest.approx(entry["loss"], rel=1e-3)
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert max(rates) == pytest.approx(1e-3)
    measured = [entry for entry in history if "eval_semantic_mIoU" in entry]
    assert [entry["step"] for entry in measured] == [3, 6]
    assert all("eval_instance_AP" in entry and "eval_panoptic_PQ" in entry for entry in measured)
    assert {"final", "log.json", "curve.png", "checkpoint-3", "checkpoint-6"} <= {p.name for p in tmp_path.iterdir()}
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    kept = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "final")
    averaged, latest = trainer.averaged_model().state_dict(), trainer.model.state_dict()
    name = "transformer_decoder.class_predictor.weight"
    assert torch.equal(kept.state_dict()[name], averaged[name])
    assert not torch.equal(averaged[name], latest[name])
    assert json.loads((tmp_path / "log.json").read_text())["recipe"]["name"] == "test"


RUN = """
import sys
from pathlib import Path
from dataclasses import replace
from tests.support.shapes import Shapes
from tests.support.short_training import RECIPE, digits_model, processor_of, shapes_model
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.training.run import train
model = digits_model()
trainer = train(model, processor_of(model), DigitScenes("train", 400, size=64), None, replace(RECIPE, steps=40),
                Path(sys.argv[1]), save_every=5, log_every=1)
import json
import math
print("LOSSES" + json.dumps({e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}))
"""


@pytest.mark.newest_only  # test_final.py interrupts runs in both environments
@pytest.mark.slow
def test_killed_and_resumed_the_curve_continues_where_it_was(tmp_path: Path) -> None:

    def finish(process: Fork) -> dict[str, float]:
        process.wait()
        assert process.returncode == 0, process.error
        return json.loads(next(line for line in process.out.splitlines() if line.startswith("LOSSES"))[6:])

    whole = finish(Fork(RUN, tmp_path / "whole"))
    killed = tmp_path / "killed"
    process = Fork(RUN, killed)
    for _ in range(3000):  # until a checkpoint is complete and the run has continued
        time.sleep(0.1)
        if (killed / "checkpoint-10" / "trainer_state.json").exists():
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists()
    resumed = finish(Fork(RUN, killed))
    assert set(resumed) == set(whole) and len(whole) == 40
    for step, loss in whole.items():
        assert resumed[step] == pytest.approx(loss, rel=1e-4), step
    first = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "whole" / "final").state_dict()
    second = FaiM2FForUniversalSegmentation.from_pretrained(killed / "final").state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("at_once", [pytest.param(4, marks=pytest.mark.large), 2])
def test_a_run_resumed_in_an_epoch_sees_what_it_would_have_seen(tmp_path: Path, at_once: int) -> None:
    """With another division of the batch, too, and with other intervals: those of the second call count."""
    recipe = replace(RECIPE, steps=8)

    def images(out: Path, **options: Any) -> list[tuple[int, float]]:
        model, drawn = shapes_model(), Drawn()
        items = TrainingItems(Shapes(12), (drawn,))
        train(model, processor_of(model), items, None, recipe, out, **options)
        return drawn.found

    whole = images(tmp_path, save_every=4)[:32]  # Accelerate reads a batch ahead
    assert len(set(whole)) == 32  # each image is augmented anew in every epoch
    assert {image for image, _ in whole[:12]} == {image for image, _ in whole[12:24]}
    shutil.rmtree(tmp_path / "checkpoint-8")
    assert images(tmp_path, save_every=1, per_device_batch_size=at_once)[:16] == whole[16:]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-7", "checkpoint-8"}


def test_a_resumed_run_follows_the_schedule_of_its_new_steps_and_keeps_its_recipe(tmp_path: Path) -> None:
    """Also in its first step, for which the optimizer's state has the rate of the earlier schedule."""
    recipe = Recipe("test", steps=2, batch_size=2, learning_rate=1e-3, schedule="cosine", backbone_multiplier=0.5)
    rates: list[list[float]] = []

    def start(recipe: Recipe) -> FaiM2FTrainer:
        model = shapes_model()
        return train(model, processor_of(model), Shapes(4), None, recipe, tmp_path, log_every=1)  # type: ignore[arg-type]

    def spy(callback: Any, arguments: Any, state: Any, control: Any, **named: Any) -> None:
        rates.append([group["lr"] for group in named["optimizer"].param_groups])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.StepCallback, "on_pre_optimizer_step", spy)
        start(recipe)
        rates.clear()
        longer = replace(recipe, steps=4, name="other")
        logged = [entry["learning_rate"] for entry in start(longer).state.log_history if "loss" in entry]
    expected = [1e-3 * longer.rate(step) for step in (2, 3)]
    assert [max(step) for step in rates] == logged[2:] == expected
    assert [min(step) for step in rates] == [0.5 * rate for rate in expected]
    for changed in ({"learning_rate": 9e-4}, {"weight_decay": 0.5}, {"augmentations": (RandomCrop(8, 8),)}):
        name = next(iter(changed))
        with pytest.raises(SettingsError, match=f"has a run whose recipe has {name} .*: choose another out, or resume"):
            start(replace(longer, **changed))  # type: ignore[arg-type]


def test_batches_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = digits_model()
    with pytest.raises(ValueError, match="batch of 4 is not a multiple of 3 images in 1 processes"):
        train(model, processor_of(model), DigitScenes("train", 4), None, RECIPE, tmp_path, per_device_batch_size=3)
    with pytest.raises(ValueError, match="precision must be"):
        train(model, processor_of(model), DigitScenes("train", 4), None, RECIPE, tmp_path, precision="int8")


def test_the_smallest_member_is_small_enough_to_ship() -> None:
    """At most 12 MB in half precision, and its classes are those of the scenes."""
    model = FaiM2FForUniversalSegmentation(digits_config())
    assert list(model.config.id2label.values()) == LABELS
    assert 2 * sum(tensor.numel() for tensor in model.state_dict().values()) < 12e6
    item = DigitScenes("train", 1)[0]
    batch = SegmentationCollator(FaiM2FImageProcessor(size={"shortest_edge": 128}), do_resize=True)([item])
    assert model(**batch).loss.isfinite()


def test_digit_scenes() -> None:
    scenes = DigitScenes("train", 40)
    for item in (scenes[index] for index in range(40)):
        assert item["image"].shape == (3, 128, 128) and item["image"].dtype == torch.uint8
        counts = torch.bincount(item["segments"].flatten(), minlength=len(item["classes"]))
        assert len(counts) == len(item["classes"]) and (counts > 20).all() and counts.sum() == 128 * 128
        assert item["classes"][-1] == 10 and (item["classes"][:-1] < 10).all() and 2 <= len(item["classes"]) <= 9
    assert torch.equal(scenes[3]["image"], DigitScenes("train", 9)[3]["image"])
    assert not torch.equal(scenes[3]["image"], DigitScenes("train", 9, seed=1)[3]["image"])
    assert not torch.equal(scenes[3]["image"], DigitScenes("test", 9)[3]["image"])
    with pytest.raises(ValueError, match="split must be"):
        DigitScenes("val", 3)
    with pytest.raises(IndexError):
        scenes[40]


def test_held_out_digits_are_never_seen_in_training() -> None:
    from hf_faim2f.data.digits import _digits

    train_inks, train_labels = _digits("train")
    test_inks, test_labels = _digits("test")
    assert len(train_inks) + len(test_inks) == 1797 and len(test_inks) > 350
    assert set(test_labels.tolist()) == set(train_labels.tolist()) == set(range(10))
    seen = {ink.tobytes() for ink in train_inks}
    assert sum(ink.tobytes() in seen for ink in test_inks) == 0


def test_the_collator_feeds_the_model() -> None:
    model = digits_model()
    batch = SegmentationCollator(processor_of(model), do_resize=True)([DigitScenes("train", 2)[i] for i in range(2)])
    assert [mask.ndim for mask in batch["mask_labels"]] == [2, 2]
    assert model(**batch).loss.isfinite()
