"""A short training in any number of processes: `python -m ... OUT [UNLABELLED | --live]`.

Random points and batch norm statistics would depend on how a batch is divided. Here the points are fixed, and the norms
keep their statistics; but not with `--live`.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data.collate import MixedItems, TrainingItems, UnlabelledImages
from hf_faim2f.data.item import Item
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.model import loss_faim2f
from hf_faim2f.training import Recipe
from hf_faim2f.training.distillation import Teacher
from hf_faim2f.training.progress import TEACHER_COLUMNS
from hf_faim2f.training.run import process_count, train
from tests.support.painting_teacher import painting_teacher
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, THINGS, Shapes

ROOT = Path(__file__).parents[2]
# A low rate, because AdamW can turn a rounding error in a gradient near 0 into a full step of the opposite sign.
RECIPE = Recipe("test", steps=3, batch_size=4, learning_rate=1e-5, backbone_multiplier=1.0, clip=1e9, ema_decay=0.5)


def fixed_points(count: int, device: torch.device) -> torch.Tensor:
    """Replaces `draw_points`: (count, 2), always the same for the same count."""
    points = torch.rand(count, 2, generator=torch.Generator().manual_seed(count))
    return points[points[:, 1].argsort()].to(device)


def frozen_norms(model: FaiM2FForUniversalSegmentation) -> FaiM2FForUniversalSegmentation:
    """The model, with its batch norms kept in evaluation mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]
    return model


def in_float64(model: FaiM2FForUniversalSegmentation) -> FaiM2FForUniversalSegmentation:
    """The model in float64, including its inputs. Rounding depends on how a batch is divided (and on the CPU); in
    float64, it does not decide attention masks, uncertain points or the matching."""
    model.double().register_forward_pre_hook(
        lambda module, args, inputs: (args, {**inputs, "pixel_values": inputs["pixel_values"].double()}),
        with_kwargs=True,
    )
    return model


def run(
    out_dir: Path, at_once: int, teacher: Teacher | None = None, unlabelled: Any = None, **overrides: object
) -> dict:
    """Trains; returns the losses and gradient norm of each step, and the evaluation results."""
    model = in_float64(
        frozen_norms(
            small_model(
                id2label=dict(enumerate(LABELS)), num_queries=6, decoder_layers=1, train_num_points=200, **overrides
            )
        )
    )
    processor = FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64})
    evaluator = Evaluator(processor, model.config.id2label, ("semantic", "instance", "panoptic"), THINGS, batch_size=1)
    items: Any = Shapes(12)
    trainer = train(
        model, processor, items if unlabelled is None else MixedItems(items, unlabelled), Shapes(5, seed=100), RECIPE,
        out_dir, evaluator=evaluator, per_device_batch_size=at_once, save_every=100, log_every=1, teacher=teacher,
    )  # fmt: skip
    names = ("loss", "grad_norm", "loss_ce", "loss_mask", "loss_dice", *TEACHER_COLUMNS.values())
    assert trainer.results is not None
    return {
        "log": [
            {name: entry[name] for name in names if name in entry}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "results": trainer.results[1],
    }


@dataclass(frozen=True)
class Drawn:
    """An augmentation that keeps the id of each image and a random number, and changes nothing."""

    found: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, item: Item, generator: torch.Generator) -> Item:
        self.found.append((int(item["image_id"]), float(torch.rand((), generator=generator))))
        return item


def run_live(out_dir: Path) -> dict[str, Any]:
    """Trains three epochs with batch norms that learn and with frozen stages; returns what was drawn, and the results.

    Training starts from a model in evaluation mode, as `open_model` returns it.
    """
    model = small_model(
        id2label=dict(enumerate(LABELS)), num_queries=6, decoder_layers=1, train_num_points=200, backbone_freeze_at=2
    ).eval()
    processor = FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64})
    evaluator = Evaluator(processor, model.config.id2label)
    drawn = Drawn()
    recipe = replace(RECIPE, steps=9, learning_rate=1e-3, clip=1.0)
    trainer = train(
        model, processor, TrainingItems(Shapes(12), (drawn,)), Shapes(5, seed=100), recipe, out_dir,
        evaluator=evaluator, per_device_batch_size=recipe.batch_size // process_count(),
    )  # fmt: skip
    assert trainer.results is not None
    return {"drawn": drawn.found, "results": trainer.results[1]}


if __name__ == "__main__":
    loss_faim2f.draw_points = fixed_points
    torch.set_num_threads(1)
    more: dict[str, Any] = {}
    if sys.argv[2:] == ["--live"]:
        live = run_live(Path(sys.argv[1]))
        Path(sys.argv[1], f"live-{torch.distributed.get_rank()}.json").write_text(json.dumps(live))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.exit()
    if len(sys.argv) > 2:  # a folder of unlabeled images, which also selects a teacher
        more = {"teacher": painting_teacher(), "unlabelled": UnlabelledImages(sys.argv[2])}
    result = run(Path(sys.argv[1]), 1, **more)
    if process_count() == 1 or torch.distributed.get_rank() == 0:
        Path(sys.argv[1], "result.json").write_text(json.dumps(result))
    if process_count() > 1:
        torch.distributed.barrier()  # if one process ended first, the connections of the other would break
        torch.distributed.destroy_process_group()
