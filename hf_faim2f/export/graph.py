"""What is in an exported graph: the model, the normalization before it and the post-processing behind it.

The exported files differ in what they return, and each returns only that: a label map of one byte a pixel in place of
a hundred masks of floats. The arithmetic is that of `post_processing_faim2f.py`, said in operations that a graph
without control flow can have: nothing here depends on a value, so what that module leaves out because of its values
(queries below a threshold) stays in, with its score.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinBackbone

from ..model.image_processing_faim2f import FaiM2FImageProcessor, scale_and_shift
from ..model.inference_faim2f import fold_normalizations
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from .swin import SwinForGraphs

# What each kind of graph returns, in order, and which dimensions of it follow the batch (B), the image (H, W) and the
# mask logits (h, w).
OUTPUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "logits": {"class_queries_logits": ("B", "Q", "C"), "masks_queries_logits": ("B", "Q", "h", "w")},
    "semantic": {"segmentation": ("B", "H", "W"), "segmentation_scores": ("B", "H", "W")},
    "instances": {
        "class_ids": ("B", "K"),
        "scores": ("B", "K"),
        "boxes": ("B", "K", "4"),
        "masks": ("B", "K", "H", "W"),
    },
    "queries": {"class_ids": ("B", "Q"), "scores": ("B", "Q"), "masks": ("B", "Q", "H", "W")},
}
INPUTS = ("pixel_values", "image")
PRECISIONS = ("fp32", "fp16")


class FaiM2FGraph(nn.Module):
    """A model as one graph, from `pixel_values` or `image` to one of four kinds of output.

    Args:
        model: left as it is; its copy here has its batch norms folded into its convolutions and, in fp16, halves.
        processor: its normalization and its settings of post-processing hold here; the graph's threshold is its
            reader's, who compares `scores` with it.
        outputs: a key of `OUTPUTS`.
            - "logits": `class_queries_logits` (B, Q, C + 1) and `masks_queries_logits` (B, Q, H/4, W/4), float32.
            - "semantic": `segmentation` (B, H, W), uint8, or int32 for more than 255 labels, as
              `post_process_semantic_segmentation`, and `segmentation_scores` (B, H, W), float32, the sum of that
              class.
            - "instances": best first, K = min(top_k, Q) of `class_ids` (B, K) int64, `scores` (B, K) float32, `boxes`
              (B, K, 4) int64 and `masks` (B, K, H, W) uint8 of 0 and 1, as `post_process_detections`: those of score
              above the threshold are its detections. A mask that it would filter as empty has score 0. The K are
              those of best class probability, which decides before any mask is resized: where more than K queries
              reach the threshold by it, `use_mask_score` may rank another query higher that is not among them.
            - "queries": `class_ids` (B, Q) int64, `scores` (B, Q) float32 and `masks` (B, Q, H, W) uint8, as
              `post_process_queries`.
        input_name: "pixel_values" (B, 3, H, W) float32, as the processor returns it, or "image" (B, 3, H, W) uint8,
            red, green and blue, which the graph rescales and normalizes.
        precision: "fp32", or "fp16": weights and network in half precision; inputs and outputs, and the arithmetic
            between the logits and the outputs, stay as they are, so either file takes the other's place.
        batch: the number of images, where it is fixed.
        size: their (height, width), where it is fixed.
    """

    def __init__(
        self,
        model: FaiM2FForUniversalSegmentation,
        processor: FaiM2FImageProcessor,
        outputs: str = "logits",
        input_name: str = "pixel_values",
        precision: str = "fp32",
        batch: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = _for_inference(model, any_size=size is None)
        self.config = self.model.config  # what exporters read of a transformers model, as `device`
        self.outputs, self.input_name, self.precision = outputs, input_name, precision
        self.batch, self.size = batch, size
        self.model.to(torch.float16 if precision == "fp16" else torch.float32)
        settings: dict[str, Any] = processor.to_dict()
        scale, shift = scale_and_shift(settings)
        # Parameters, and so the first of them: of their type transformers' exporter takes the inputs to be.
        self.scale, self.shift = (nn.Parameter(values, requires_grad=False) for values in (scale, shift))
        self.cls_sigmoid: bool = settings["cls_sigmoid"]
        self.intermediate_size: list[int] | None = settings["intermediate_size"]
        self.mask_threshold: float = settings["mask_threshold"]
        self.use_mask_score: bool = settings["use_mask_score"]
        self.predict_all_pixels: bool = settings["predict_all_pixels"]
        self.filter_empty_masks: bool = settings["filter_empty_masks"]
        self.top_k = min(settings["top_k"], self.config.num_queries)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def sample(self, batch: int | None = None, size: tuple[int, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """An input of the batch and size that are fixed, or else asked for: blurred noise, of every seed another."""
        batch, (height, width) = self.batch or batch or 2, self.size or size or (130, 166)
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch, 3, 2 + height // 32, 2 + width // 32, generator=generator)
        smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        fine = torch.rand(batch, 3, height, width, generator=generator)
        image = (255 * (0.8 * smooth + 0.2 * fine)).round().to(torch.uint8)
        return {self.input_name: image if self.input_name == "image" else self.normalize(image)}

    @torch.no_grad()
    def dimensions(self) -> dict[str, list[int | str]]:
        """Of the input and each output by name: numbers where they are fixed and names where they vary."""
        names = {"h": "mask_height", "w": "mask_width", "H": "height", "W": "width"} if self.size is None else {}
        if self.batch is None:
            names["B"] = "batch"
        sample = self.sample()
        letters = {self.input_name: ("B", "3", "H", "W"), **OUTPUTS[self.outputs]}
        return {
            name: [names.get(letter, side) for letter, side in zip(letters[name], tensor.shape, strict=True)]
            for name, tensor in {**sample, **self(**sample)}.items()
        }

    def normalize(self, image: Tensor) -> Tensor:
        """Bytes (B, 3, H, W) to `pixel_values`, as the processor makes them of an image of that size."""
        return image.to(torch.float32) * self.scale + self.shift

    def forward(self, pixel_values: Tensor | None = None, image: Tensor | None = None) -> dict[str, Tensor]:
        """One of the two inputs, (B, 3, H, W), to the outputs of this kind, by name."""
        if pixel_values is None:
            assert image is not None
            pixel_values = self.normalize(image)
        size = pixel_values.shape[-2:]
        raw = self.model(pixel_values.to(self.model.dtype), return_dict=True)
        class_logits, mask_logits = raw.class_queries_logits.float(), raw.masks_queries_logits.float()
        if self.outputs == "logits":
            return {"class_queries_logits": class_logits, "masks_queries_logits": mask_logits}
        probabilities = class_logits.sigmoid() if self.cls_sigmoid else class_logits.softmax(-1)
        probabilities = probabilities[..., :-1]  # (B, Q, C), without "no object"
        if self.outputs == "semantic":
            return self._semantic(probabilities, mask_logits, size)
        class_scores, class_ids = probabilities.max(-1)  # (B, Q)
        masks = mask_logits.sigmoid()  # (B, Q, h, w)
        if self.outputs == "queries":
            return self._queries(class_scores, class_ids, masks, size)
        return self._instances(class_scores, class_ids, masks, size)

    def _semantic(self, probabilities: Tensor, mask_logits: Tensor, size: torch.Size) -> dict[str, Tensor]:
        if self.intermediate_size is not None:
            mask_logits = _resize(mask_logits, self.intermediate_size)
        masks = mask_logits.sigmoid()
        # Resizing is linear, so the sums over queries are made first and only they are resized to the image.
        sums = torch.matmul(probabilities.transpose(1, 2), masks.flatten(2)).unflatten(2, masks.shape[-2:])
        sums = _resize(sums, size)  # (B, C, H, W)
        labels = sums.argmax(1, keepdim=True)
        scores = sums.gather(1, labels)  # one look for each pixel, where a second reduction would take all classes
        segmentation = _small_integers(labels[:, 0], probabilities.shape[-1])
        return {"segmentation": segmentation, "segmentation_scores": scores[:, 0]}

    def _queries(self, class_scores: Tensor, class_ids: Tensor, masks: Tensor, size: torch.Size) -> dict[str, Tensor]:
        resized = _resize(masks, size)
        owners = self._owners(class_scores, masks, size)
        inside = self._inside(resized, owners, torch.arange(masks.shape[1], device=masks.device)[None])
        scores = class_scores * _mask_scores(resized, inside) if self.use_mask_score else class_scores
        return {"class_ids": class_ids, "scores": scores, "masks": inside.to(torch.uint8)}

    def _instances(self, class_scores: Tensor, class_ids: Tensor, masks: Tensor, size: torch.Size) -> dict[str, Tensor]:
        owners = self._owners(class_scores, masks, size)
        scores, queries = class_scores.topk(self.top_k)  # (B, K)
        class_ids = class_ids.gather(1, queries)
        resized = _resize(self._rows_of(masks, queries), size)
        inside = self._inside(resized, owners, queries)
        if self.use_mask_score:
            scores = scores * _mask_scores(resized, inside)
        if self.filter_empty_masks:
            scores = scores * (inside.sum((2, 3)) > 1).to(scores.dtype)
        boxes = _boxes(inside)
        if self.use_mask_score or self.filter_empty_masks:  # the order may be another now
            scores, order = scores.topk(self.top_k)
            class_ids = class_ids.gather(1, order)
            boxes, inside = self._rows_of(boxes, order), self._rows_of(inside, order)
        # Bytes last: TensorRT has them as outputs and nowhere between.
        return {"class_ids": class_ids, "scores": scores, "boxes": boxes, "masks": inside.to(torch.uint8)}

    def _owners(self, class_scores: Tensor, masks: Tensor, size: torch.Size) -> Tensor | None:
        """The query (B, H, W) that each pixel belongs to, where every pixel belongs to one."""
        if not self.predict_all_pixels:
            return None
        return _resize(masks * class_scores[..., None, None], size).argmax(1)

    def _inside(self, resized: Tensor, owners: Tensor | None, queries: Tensor) -> Tensor:
        """1.0 inside the masks (B, K, H, W) of the queries (B, K), 0.0 outside."""
        if owners is None:
            return (resized >= self.mask_threshold).to(resized.dtype)
        return (owners[:, None] == queries[..., None, None]).to(resized.dtype)

    def _rows_of(self, table: Tensor, rows: Tensor) -> Tensor:
        """table (B, N, ...) at rows (B, K) of each image: (B, K, ...), by whole rows and not by single elements."""
        if self.batch == 1:
            return table[0].index_select(0, rows[0])[None]
        first = torch.arange(rows.shape[0], device=rows.device)[:, None] * table.shape[1]
        picked = table.flatten(0, 1).index_select(0, (rows + first).flatten())
        return picked.unflatten(0, (-1, rows.shape[1]))


def _for_inference(model: FaiM2FForUniversalSegmentation, any_size: bool) -> FaiM2FForUniversalSegmentation:
    """A copy whose attention is plain products and softmaxes and whose batch norms are in their convolutions."""
    model = copy.deepcopy(model).eval().float().cpu()
    # Any runtime fuses these for itself; of a fused operation exporters make what guards against rows without keys.
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = False
    model.config.output_auxiliary_logits = False
    fold_normalizations(model)
    if isinstance(model.backbone, SwinBackbone):
        model.backbone = SwinForGraphs(model.backbone, any_size)
    return model.requires_grad_(False)


def _resize(maps: Tensor, size: Any) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _small_integers(labels: Tensor, count: int) -> Tensor:
    # Through float32, because TensorRT makes bytes of floating numbers only.
    return labels.to(torch.float32).to(torch.uint8) if count <= 255 else labels.to(torch.int32)


def _mask_scores(resized: Tensor, inside: Tensor) -> Tensor:
    """Mean probability inside each mask, (B, K), with Focoos's weight of 1e-3 and 1e-5 below the line."""
    pixels, totals = inside.sum((2, 3)), (resized * inside).sum((2, 3))
    return totals * 1e-3 / (pixels * 1e-3 + 1e-5)


def _boxes(inside: Tensor) -> Tensor:
    """x_min, y_min, x_max, y_max, inclusive, of masks (B, K, H, W): int64 (B, K, 4), zeros for an empty mask."""
    columns, rows = inside.amax(2), inside.amax(3)  # (B, K, W), (B, K, H) of 0.0 and 1.0
    lows, highs = [], []
    for occupied in (columns, rows):
        places = torch.arange(occupied.shape[-1], dtype=torch.float32, device=occupied.device)
        last = places[-1:]
        highs.append((occupied * places).amax(-1))
        lows.append((last - (occupied * (last - places)).amax(-1)) * columns.amax(-1))
    return torch.stack([*lows, *highs], -1).to(torch.int64)


__all__ = ["INPUTS", "OUTPUTS", "PRECISIONS", "FaiM2FGraph"]
