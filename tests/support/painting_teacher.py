"""A teacher without weights that recognizes the shapes: it decomposes every pixel into the classes' colors."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.image_processing_faim2f import scale_and_shift
from hf_faim2f.model.padding_faim2f import fill_padding
from hf_faim2f.training.distillation import Teacher
from tests.support.reference_models import small_config
from tests.support.shapes import LABELS

COLORS = torch.tensor([[60.0, 60, 60], [200, 90, 60], [90, 200, 60], [60, 90, 200]])
STRIDE = 4


class Painter(nn.Module):
    """One confident query per class; its mask is the class's share of each cell of `STRIDE` pixels."""

    def __init__(self, processor: FaiM2FImageProcessor, **overrides: Any) -> None:
        super().__init__()
        self.processor = processor
        self.config = small_config(id2label=dict(enumerate(LABELS)), num_queries=len(LABELS), **overrides)
        self.calls: list[tuple[int, ...]] = []  # the input shapes of all calls

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> dict[str, Tensor]:
        self.calls.append(tuple(pixel_values.shape))
        scale, shift = scale_and_shift(self.processor.to_dict())
        pixels = (pixel_values - shift) / scale
        unmixed = torch.linalg.pinv((COLORS[1:] - COLORS[0]).T) @ (pixels - COLORS[0][:, None, None]).flatten(2)
        of_shapes = unmixed.clamp(0, 1).unflatten(2, pixels.shape[2:])
        of_classes = torch.cat([(1 - of_shapes.sum(1, keepdim=True)).clamp(0, 1), of_shapes], 1)
        shares = nn.functional.avg_pool2d(of_classes, STRIDE, ceil_mode=True, count_include_pad=False)
        masks = fill_padding(torch.logit(shares.double(), 1e-5).float(), pixel_mask)
        sure = torch.cat([10 * torch.eye(len(COLORS)), torch.zeros(len(COLORS), 1)], 1)
        return {"class_queries_logits": sure.expand(len(pixels), -1, -1), "masks_queries_logits": masks}


def painting_teacher(
    weight: float = 1.0,
    classes: list[int] | None = None,
    name: str = "painter",
    notes: tuple[str, ...] = (),
    **settings: Any,
) -> Teacher:
    """A teacher for semantic segmentation of the shapes.

    Args:
        weight: weight of the teacher's losses.
        classes: the student's class id of each of the teacher's classes.
        name, notes: as in `Teacher`.
        settings: settings of its image processor.
    """
    processor = FaiM2FImageProcessor(**{"size": {"shortest_edge": 64}, **settings})
    ids = torch.tensor(classes or list(range(len(LABELS))))
    model: Any = Painter(processor)
    return Teacher(name, model, processor, ids, frozenset(range(len(LABELS))), weight, notes)
