"""Short trainings: recipes, small models for the digits and the shapes, and injected faults."""

from typing import Any

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data.digits import LABELS as DIGITS
from hf_faim2f.training import Recipe
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS as SHAPES

RECIPE = Recipe("test", steps=6, batch_size=4, learning_rate=1e-3, warmup_steps=2, clip=1.0, ema_decay=0.5)
WITHOUT_WARMUP = Recipe("test", steps=6, batch_size=2, learning_rate=1e-3, clip=1.0, ema_decay=0.5)


def digits_model() -> FaiM2FForUniversalSegmentation:
    return small_model(id2label=dict(enumerate(DIGITS)), num_queries=12, decoder_layers=1, train_num_points=128)


def processor_of(model: FaiM2FForUniversalSegmentation) -> FaiM2FImageProcessor:
    return FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64})


def shapes_model(**overrides: Any) -> FaiM2FForUniversalSegmentation:
    return small_model(
        id2label=dict(enumerate(SHAPES)), num_queries=6, decoder_layers=1, train_num_points=64, **overrides
    )


class SpoiltAfter:
    """A hook that multiplies its last argument by a value, after the given number of calls."""

    def __init__(self, calls: int, value: float) -> None:
        self.left = calls
        self.value = value

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        return arguments[-1] * self.value if self.left < 0 else None  # still part of the graph
