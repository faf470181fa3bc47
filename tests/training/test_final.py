"""The best evaluation of a run determines the final weights, even after an interruption; without progress, a run
stops."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_faim2f.errors import SettingsError
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.training.final import BEST, find_metric
from hf_faim2f.training.run import train
from hf_faim2f.training.run_folder import begin_run, last_checkpoint
from hf_faim2f.training.trainer import FaiM2FTrainer
from hf_faim2f.zoo import open_model
from tests.support.shapes import Shapes
from tests.support.short_training import WITHOUT_WARMUP as RECIPE
from tests.support.short_training import processor_of, shapes_model

NAME = "transformer_decoder.query_features.weight"
VALUES = {1: 20.0, 2: 10.0, 3: 30.0, 4: 25.0, 5: 30.0, 6: 29.0}  # step 5 is as good as step 3, but not better


class Scripted(Evaluator):
    """Returns the test's value for each step, and the same value when the same weights are evaluated again."""

    def prepare(self, values: Mapping[int, float], stop_at: int | None, weights: Mapping[int, Tensor]) -> "Scripted":
        self.values = values
        self.stop_at = stop_at
        self.weights = dict(weights)
        self.step = 0
        return self

    def __call__(self, model: Any, items: Any, process: int = 0, processes: int = 1) -> dict[str, dict[str, Any]]:
        weight = model.state_dict()[NAME].clone()
        seen = [step for step, known in self.weights.items() if torch.equal(known, weight)]
        step = seen[0] if seen else self.step
        self.weights[step] = weight
        return {"semantic": {"mIoU": self.values[step], "pACC": 1.0, "per_class": {"ground": {"IoU": float(step)}}}}


@pytest.fixture(autouse=True)
def _steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the step of a scripted evaluator, and interrupts the run after the evaluation of a given step, or in it if
    the step is negative."""
    evaluate = FaiM2FTrainer.evaluate

    def told(self: FaiM2FTrainer, *arguments: Any, **more: Any) -> dict[str, float]:
        scripted: Any = self.evaluator
        scripted.step = self.state.global_step
        if scripted.stop_at == -self.state.global_step:
            raise KeyboardInterrupt
        metrics = evaluate(self, *arguments, **more)
        if scripted.stop_at == self.state.global_step:
            raise KeyboardInterrupt
        return metrics

    monkeypatch.setattr(FaiM2FTrainer, "evaluate", told)


def run(
    out: Path,
    values: Mapping[int, float] = VALUES,
    stop_at: int | None = None,
    ema: float = 0.5,
    weights: Mapping[int, Tensor] = MappingProxyType({}),
    **more: Any,
) -> tuple[FaiM2FTrainer, Scripted]:
    torch.manual_seed(0)
    model = shapes_model()
    evaluator = Scripted(processor_of(model), model.config.id2label).prepare(values, stop_at, weights)
    options: dict[str, Any] = {"best": "semantic mIoU", "evaluate_every": 1, "save_every": 2, **more}
    recipe = replace(RECIPE, ema_decay=ema)
    trainer = train(
        model, processor_of(model), Shapes(12), Shapes(2, seed=100), recipe, out, evaluator=evaluator, **options
    )
    return trainer, evaluator


def weight_of(folder: Path) -> Tensor:
    return open_model(folder)[0].state_dict()[NAME]


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_final_has_the_weights_of_the_best_evaluation(tmp_path: Path, ema: float) -> None:
    trainer, evaluator = run(tmp_path, ema=ema)
    assert trainer.state.global_step == 6 and trainer.best is not None and trainer.best.step == 3
    for folder in ("final", BEST):
        assert torch.equal(weight_of(tmp_path / folder), evaluator.weights[3])
    assert not torch.equal(evaluator.weights[3], evaluator.weights[6])
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["best"] == {"metric": "semantic mIoU", "step": 3, "value": 30.0}
    assert log["results"]["semantic"]["mIoU"] == 30.0 and trainer.results == (3, log["results"])
    card = (tmp_path / "final" / "README.md").read_text()
    assert "- weights of: step 3, the best by semantic mIoU (30.00)\n" in card and "- steps: 6\n" in card
    assert "| ground | 3.00 |" in (tmp_path / "per_class.md").read_text()
    # Again: nothing is trained, and the choice stays the same.
    again, _ = run(tmp_path, ema=ema, weights=evaluator.weights)
    assert again.best == trainer.best and torch.equal(weight_of(tmp_path / "final"), evaluator.weights[3])
    assert json.loads((tmp_path / "log.json").read_text())["log"] == log["log"]


@pytest.mark.large
@pytest.mark.parametrize("stop_at", [3, *(pytest.param(step, marks=pytest.mark.newest_only) for step in (1, 5))])
def test_an_interrupted_run_chooses_the_same_weights(tmp_path: Path, stop_at: int) -> None:
    """Interrupted before the first checkpoint, after a best evaluation that no checkpoint records yet, and later."""
    _, whole = run(tmp_path / "whole", patience=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=stop_at, patience=3)
    assert (tmp_path / "cut" / BEST / "best.json").is_file() and not (tmp_path / "cut" / "final").exists()
    trainer, _ = run(tmp_path / "cut", patience=3, weights=whole.weights)
    assert trainer.best is not None and trainer.best.step == 3 and trainer.state.global_step == 6
    for folder in ("final", BEST):
        assert torch.equal(weight_of(tmp_path / "cut" / folder), whole.weights[3])
    assert json.loads((tmp_path / "cut" / "log.json").read_text())["results"]["semantic"]["mIoU"] == 30.0


def test_the_evaluation_in_which_a_run_was_interrupted_counts(tmp_path: Path) -> None:
    """The last one, before which the last checkpoint is written."""
    values = {**VALUES, 6: 40.0}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, values, stop_at=-6)
    assert (tmp_path / "checkpoint-6").is_dir()
    trainer, evaluator = run(tmp_path, values)
    assert trainer.best is not None and (trainer.best.step, trainer.best.value) == (6, 40.0)
    for folder in ("final", BEST):
        assert torch.equal(weight_of(tmp_path / folder), evaluator.weights[6])
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["results"]["semantic"]["mIoU"] == 40.0
    assert [entry["step"] for entry in log["log"] if "eval_semantic_mIoU" in entry] == [1, 2, 3, 4, 5, 6]


@pytest.mark.large
def test_patience_ends_a_run_and_more_of_it_goes_on(tmp_path: Path) -> None:
    trainer, evaluator = run(tmp_path, patience=2)
    assert trainer.state.global_step == 5 and torch.equal(weight_of(tmp_path / "final"), evaluator.weights[3])
    assert "- steps: 5 of 6, stopped early\n" in (tmp_path / "final" / "README.md").read_text()
    checkpoint = tmp_path / "checkpoint-5" / "model.safetensors"
    before = checkpoint.stat().st_mtime_ns
    again, _ = run(tmp_path, patience=2, weights=evaluator.weights)
    assert again.state.global_step == 5 and checkpoint.stat().st_mtime_ns == before
    more, _ = run(tmp_path, {**VALUES, 6: 31.0}, patience=3)
    assert more.state.global_step == 6 and more.best is not None and more.best.step == 6
    assert not torch.equal(weight_of(tmp_path / "final"), evaluator.weights[3])


def test_a_metric_that_is_never_defined_chooses_nothing(tmp_path: Path) -> None:
    trainer, evaluator = run(tmp_path, dict.fromkeys(range(7), math.nan), patience=2)
    assert trainer.best is None and trainer.state.global_step == 2 and not (tmp_path / BEST).exists()
    assert torch.equal(weight_of(tmp_path / "final"), evaluator.weights[2])


@pytest.mark.large
def test_a_run_from_the_start_forgets_the_best_of_an_earlier_one(tmp_path: Path) -> None:
    """There was no checkpoint, so it may have been a different run."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {1: 99.0}, stop_at=1)
    trainer, _ = run(tmp_path)
    assert trainer.best is not None and (trainer.best.step, trainer.best.value) == (3, 30.0)


@pytest.mark.large
def test_a_best_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=3)
    (tmp_path / BEST).rename(tmp_path / f".{BEST}.before")
    trainer, evaluator = run(tmp_path, {**VALUES, 3: 29.0, 5: 28.0})  # the record has 30
    assert trainer.best is not None and trainer.best.value == 30.0
    assert torch.equal(weight_of(tmp_path / "final"), evaluator.weights[3])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "metric"),
    [("mIoU", "semantic mIoU"), ("eval_panoptic_PQ", "panoptic PQ"), ("Instance AP", "instance AP"), ("pq_th", None)],
)
def test_metrics_have_the_names_that_are_printed_and_logged(name: str, metric: str | None) -> None:
    model = shapes_model()
    evaluator = Evaluator(processor_of(model), model.config.id2label, ("semantic", "instance", "panoptic"))
    assert find_metric(name, evaluator) == (metric or "panoptic PQ_th")


def test_an_unknown_metric_names_the_known_ones(tmp_path: Path) -> None:
    model = shapes_model()
    evaluator = Evaluator(processor_of(model), model.config.id2label)
    with pytest.raises(SettingsError) as error:
        find_metric("mIuU", evaluator)
    assert str(error.value) == (
        "There is no metric 'mIuU' here. The evaluation has: semantic mIoU, semantic mIoU_mmseg, semantic fwIoU, "
        "semantic mACC, semantic pACC. Did you mean 'mIoU'?"
    )
    with pytest.raises(ValueError, match="patience needs a metric to improve: choose one"):
        train(model, processor_of(model), Shapes(4), None, RECIPE, tmp_path, patience=3)
    with pytest.raises(ValueError, match="pass an evaluator, items and evaluate_every"):
        train(model, processor_of(model), Shapes(4), Shapes(2), RECIPE, tmp_path, evaluator=evaluator, best="mIoU")


def test_the_best_of_other_images_is_not_compared(tmp_path: Path) -> None:
    """The metric on a few images could be better than any on all images, and would be kept."""
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5}')
    for best in ({}, {"best": "semantic mIoU"}):
        begin_run(tmp_path, {"model": "m", "eval_limit": 3, "workers": 2, **best}, {})
        assert last_checkpoint(tmp_path, {"model": "m", "eval_limit": 3, **best}) == tmp_path / "checkpoint-5"
        if not best:
            assert last_checkpoint(tmp_path, {"model": "m"}) == tmp_path / "checkpoint-5"
            continue
        with pytest.raises(ValueError, match="a run with eval_limit 3, not with the default eval_limit"):
            last_checkpoint(tmp_path, {"model": "m", **best})
