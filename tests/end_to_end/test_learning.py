"""Training reduces errors: a fixed seed, a model with 100,000 parameters, images of shapes."""

from pathlib import Path

import pytest
import torch

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.training import Recipe
from hf_faim2f.training.run import train
from tests.support.reference_models import small_config
from tests.support.shapes import LABELS, THINGS, Shapes

RECIPE = Recipe(
    "shapes", steps=150, batch_size=8, learning_rate=2e-3, backbone_multiplier=1.0, schedule="cosine", warmup_steps=10,
    clip=1.0, ema_decay=0.9,
)  # fmt: skip


def new_model() -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor]:
    torch.manual_seed(0)
    config = small_config(id2label=dict(enumerate(LABELS)), decoder_layers=2, encoder_layers=0, train_num_points=512)
    model = FaiM2FForUniversalSegmentation(config)
    return model, FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64})


@pytest.mark.large
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_and_the_metrics_rise(tmp_path: Path, precision: str) -> None:
    """On held-out images, mIoU is below 30 with random weights; after training, it was 86 and 87 with two seeds."""
    model, processor = new_model()
    held_out = Shapes(30, seed=10_000)
    evaluator = Evaluator(processor, model.config.id2label, ("semantic", "panoptic"), THINGS)
    before = evaluator(model, held_out)
    trainer = train(
        model, processor, Shapes(400), held_out, RECIPE, tmp_path,
        evaluator=evaluator, log_every=10, save_every=1000, precision=precision,
    )  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.45 * losses[0]
    assert trainer.results is not None
    _, after = trainer.results
    assert before["semantic"]["mIoU"] < 35 and after["semantic"]["mIoU"] > 65
    assert before["panoptic"]["PQ"] < 30 and after["panoptic"]["PQ"] > 45
    kept = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "final").eval()
    assert evaluator(kept, held_out)["semantic"]["mIoU"] == pytest.approx(after["semantic"]["mIoU"], abs=0.5)


def test_half_precision_gives_finite_outputs_and_losses() -> None:
    """float16, which Trainer only supports on GPUs, with autocast if the CPU supports it."""
    model, processor = new_model()
    items = [Shapes(2)[index] for index in range(2)]
    pixels = processor([item["image"] for item in items], input_data_format="channels_first", return_tensors="pt")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            outputs = model(
                pixel_values=pixels["pixel_values"],
                mask_labels=[item["segments"] for item in items],
                class_labels=[item["classes"] for item in items],
            )
        outputs.loss.backward()
        assert outputs.loss.isfinite() and outputs.masks_queries_logits.isfinite().all(), dtype
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), dtype
        model.zero_grad()
