"""The modules to export: the model with optional normalization before it and post-processing after it.

There are several kinds of graphs, each of which returns only its own outputs: for example, a label map of one byte per
pixel instead of a hundred float masks. They compute the same as `post_processing_faim2f.py`, but with operations that
need no control flow. Nothing is skipped depending on values, so queries below a threshold are returned too, with their
scores.

`SwinForGraphs` runs the weights of transformers' Swin without branches on shapes. The forward pass in transformers
checks whether each map needs padding. An exporter with symbolic shapes then accumulates a condition on remainders for
each layer and never finishes solving them; a tracing exporter makes the branches of the traced image constant, which is
wrong for other sizes. Here maps are always padded to multiples of the window, if necessary by zero rows and columns
(Liu et al., ICCV 2021, section 3.2). Queries, keys and values are computed in one product, and position biases are
constants. The mask of shifted windows is computed once per stage and not merged with the biases, because together they
would be a constant of hundreds of megabytes for an image of 1024x1024.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinBackbone
from transformers.modeling_outputs import BackboneOutput

from ..model.image_processing_faim2f import FaiM2FImageProcessor, scale_and_shift
from ..model.inference_faim2f import fold_normalizations
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation

# Outputs of each kind of graph, in order, and their dimensions: H, W are those of the image, h, w of the mask logits.
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
PRECISIONS = ("fp32", "fp16")  # of ONNX graphs
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


MASKED = -100.0  # added between parts of a window that are not neighbors in the image, as in training


@contextmanager
def quietly() -> Iterator[None]:
    """Silences the progress output and warnings of exporters and quantizers, but not errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class FaiM2FGraph(nn.Module):
    """A model as one graph, from `pixel_values` or `image` to one of four kinds of outputs.

    Args:
        model: the model. It is copied; the copy's batch norms are folded and its weights converted to `precision`.
        processor: image processor whose normalization and post-processing settings are used, except the threshold: the
            caller compares `scores` with it.
        outputs: a key of `OUTPUTS`.
            - "logits": `class_queries_logits` (B, Q, C + 1) and `masks_queries_logits` (B, Q, H/4, W/4), float32; of
              BiSeNetFormer H/8 and W/8.
            - "semantic": `segmentation` (B, H, W), uint8, or int32 for more than 255 labels, as in
              `post_process_semantic_segmentation`, and `segmentation_scores` (B, H, W), float32, the score (the sum
              over queries) of that class.
            - "instances": K = min(top_k, Q), best first: `class_ids` (B, K) int64, `scores` (B, K) float32, `boxes`
              (B, K, 4) int64 and `masks` (B, K, H, W) uint8 of 0 and 1. Those with a score above the threshold are the
              detections of `post_process_detections`. Masks that it would filter as empty have score 0. The K queries
              are those with the highest class probability, chosen before any mask is resized: if more than K queries
              reach the threshold, `use_mask_score` may rank another one higher.
            - "queries": `class_ids` (B, Q) int64, `scores` (B, Q) float32 and `masks` (B, Q, H, W) uint8, as in
              `post_process_queries`.
        input_name: "pixel_values" (B, C, H, W) float32, from the image processor, or "image" (B, C, H, W) uint8,
            which the graph rescales and normalizes.
        precision: a key of `TYPES`, the type of the network; inputs, outputs and post-processing are in the same types
            as in "fp32", so one file can replace the other.
        batch: the fixed batch size; None for a dynamic one.
        size: the fixed (height, width); None for a dynamic one.
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
        self.config = self.model.config  # exporters read it, like `device`
        self.outputs, self.input_name, self.precision = outputs, input_name, precision
        self.batch, self.size = batch, size
        self.model.to(TYPES[precision])
        settings: dict[str, Any] = processor.to_dict()
        scale, shift = scale_and_shift(settings)
        # These are the first parameters, from which transformers' exporter takes the dtype of the inputs.
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
        """A random input (blurred noise) with the fixed batch size and image size, or else with those given."""
        batch, (height, width) = self.batch or batch or 2, self.size or size or (130, 166)
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch, len(self.scale), 2 + height // 32, 2 + width // 32, generator=generator)
        smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        fine = torch.rand(batch, len(self.scale), height, width, generator=generator)
        image = (255 * (0.8 * smooth + 0.2 * fine)).round().to(torch.uint8)
        return {self.input_name: image if self.input_name == "image" else self.normalize(image)}

    @torch.no_grad()
    def dimensions(self) -> dict[str, list[int | str]]:
        """Dimensions of the input and each output by name: numbers if fixed, names if dynamic."""
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
        """Converts uint8 pixels (B, C, H, W) to `pixel_values` as the image processor does."""
        return image.to(torch.float32) * self.scale + self.shift

    def forward(self, pixel_values: Tensor | None = None, image: Tensor | None = None) -> dict[str, Tensor]:
        """Computes the outputs by name from one of the two inputs, (B, C, H, W)."""
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
        # Resizing is linear, so the sums over queries are computed first and only they are resized to the image.
        sums = torch.matmul(probabilities.transpose(1, 2), masks.flatten(2)).unflatten(2, masks.shape[-2:])
        sums = _resize(sums, size)  # (B, C, H, W)
        labels = sums.argmax(1, keepdim=True)
        scores = sums.gather(1, labels)  # reads one value per pixel; max() would read all classes
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
        if self.use_mask_score or self.filter_empty_masks:  # the order may have changed
            scores, order = scores.topk(self.top_k)
            class_ids = class_ids.gather(1, order)
            boxes, inside = self._rows_of(boxes, order), self._rows_of(inside, order)
        # uint8 at the end: TensorRT supports it only for outputs.
        return {"class_ids": class_ids, "scores": scores, "boxes": boxes, "masks": inside.to(torch.uint8)}

    def _owners(self, class_scores: Tensor, masks: Tensor, size: torch.Size) -> Tensor | None:
        """The query (B, H, W) that owns each pixel; None unless each pixel belongs to exactly one query."""
        if not self.predict_all_pixels:
            return None
        return _resize(masks * class_scores[..., None, None], size).argmax(1)

    def _inside(self, resized: Tensor, owners: Tensor | None, queries: Tensor) -> Tensor:
        """1.0 inside the masks (B, K, H, W) of the queries (B, K), 0.0 outside."""
        if owners is None:
            return (resized >= self.mask_threshold).to(resized.dtype)
        return (owners[:, None] == queries[..., None, None]).to(resized.dtype)

    def _rows_of(self, table: Tensor, rows: Tensor) -> Tensor:
        """Rows (B, K) of each image's table (B, N, ...): (B, K, ...), copied as whole rows instead of elements."""
        if self.batch == 1:
            return table[0].index_select(0, rows[0])[None]
        first = torch.arange(rows.shape[0], device=rows.device)[:, None] * table.shape[1]
        picked = table.flatten(0, 1).index_select(0, (rows + first).flatten())
        return picked.unflatten(0, (-1, rows.shape[1]))


def _for_inference(model: FaiM2FForUniversalSegmentation, any_size: bool) -> FaiM2FForUniversalSegmentation:
    """A copy with eager attention (matrix products and a softmax) and batch norms folded into convolutions."""
    model = copy.deepcopy(model).eval().float().cpu()
    # Runtimes fuse eager attention themselves. Exporters add guards against rows without keys to fused attention.
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
    # Through float32: TensorRT only converts floating-point numbers to uint8.
    return labels.to(torch.float32).to(torch.uint8) if count <= 255 else labels.to(torch.int32)


def _mask_scores(resized: Tensor, inside: Tensor) -> Tensor:
    """Mean probability inside each mask, (B, K), with Focoos's scaling by 1e-3 and 1e-5 added to the denominator."""
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


class SwinForGraphs(nn.Module):
    """A `SwinBackbone` without branches on shapes, for evaluation mode only.

    Args:
        backbone: backbone of transformers 4.57 or 5.x. Its modules are shared, or copied if they are merged.
        any_size: the graph must accept images of any size; otherwise unnecessary padding operations are omitted.
    """

    def __init__(self, backbone: SwinBackbone, any_size: bool) -> None:
        super().__init__()
        swin = backbone.swin if hasattr(backbone, "swin") else backbone  # 5.x, 4.57
        self.any_size, self.window = any_size, int(backbone.config.window_size)
        self.patch = swin.embeddings.patch_embeddings.projection
        self.patch_norm = swin.embeddings.norm
        self.positions = swin.embeddings.position_embeddings
        self.stages = nn.ModuleList([SwinStageForGraphs(stage, self.window, any_size) for stage in swin.encoder.layers])
        # The stem's output is stage 0. The norms of the returned maps, by stage name.
        self.norms: Mapping[str, nn.Module] = backbone.hidden_states_norms
        self.names = list(backbone.stage_names)

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> BackboneOutput:
        """(B, C, H, W) to the configured feature maps, (B, channels, H/stride, W/stride) each."""
        height, width = self.patch.kernel_size
        pixel_values = _pad(pixel_values, (2, 3), (int(height), int(width)), self.any_size)
        hidden_state = self.patch(pixel_values).permute(0, 2, 3, 1)  # (B, h, w, C), here and everywhere
        hidden_state = self.patch_norm(hidden_state)
        if self.positions is not None:
            hidden_state = hidden_state + self.positions.view(1, *hidden_state.shape[1:])
        maps = [hidden_state]
        for stage in self.stages:
            before, hidden_state = stage(hidden_state)
            maps.append(before)
        named = zip(self.names, maps, strict=True)
        features = [self.norms[name](found).permute(0, 3, 1, 2) for name, found in named if name in self.norms]
        return BackboneOutput(feature_maps=tuple(features))


class SwinStageForGraphs(nn.Module):
    """Layers with alternating regular and shifted windows, followed by patch merging."""

    def __init__(self, stage: Any, window: int, any_size: bool) -> None:
        super().__init__()
        self.window, self.any_size = window, any_size
        self.layers = nn.ModuleList([SwinLayerForGraphs(layer, window) for layer in stage.blocks])
        self.merge_norm: Any = None
        self.merge: Any = None
        if stage.downsample is not None:
            self.merge_norm, self.merge = stage.downsample.norm, stage.downsample.reduction

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) to the same shape, and to the next stage's input, (B, h/2, w/2, 2 C), rounded up."""
        batch, height, width, channels = hidden_state.shape
        rows, columns = (_parts(side, self.window) for side in (height, width))
        mask: Tensor | None = None
        layer: Any
        for layer in self.layers:
            if layer.shift and mask is None:
                mask = _shifted_mask(rows, columns, self.window, layer.shift, hidden_state)
            hidden_state = layer(hidden_state, rows, columns, mask if layer.shift else None, self.any_size)
        if self.merge is None:
            return hidden_state, hidden_state
        padded = _pad(hidden_state, (1, 2), (2, 2), self.any_size)
        pairs = padded.reshape(batch, _parts(height, 2), 2, _parts(width, 2), 2, channels)
        merged = pairs.permute(0, 1, 3, 4, 2, 5).flatten(3)  # left column first, top to bottom
        return hidden_state, self.merge(self.merge_norm(merged))


class SwinLayerForGraphs(nn.Module):
    """Attention within windows and a feed-forward network, both pre-norm."""

    bias: Tensor

    def __init__(self, layer: Any, window: int) -> None:
        super().__init__()
        self.window, self.shift = window, int(layer.shift_size)
        attention = layer.attention
        if hasattr(attention, "q_proj"):  # 5.x
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            self.output, table, index = attention.o_proj, *_table(attention.relative_position_bias)
            self.feed_forward: nn.Module = layer.mlp
        else:  # 4.57
            projections = [attention.self.query, attention.self.key, attention.self.value]
            self.output, table, index = attention.output.dense, *_table(attention.self)
            self.feed_forward = nn.Sequential(layer.intermediate, layer.output)
        self.attention_norm, self.feed_forward_norm = layer.layernorm_before, layer.layernorm_after
        self.heads = table.shape[1]
        self.projection = _as_one(projections, self.heads)
        bias = table.detach()[index.view(-1)].view(window**2, window**2, self.heads).permute(2, 0, 1).contiguous()
        self.register_buffer("bias", bias)  # (heads, N, N), where N = window * window

    def forward(self, hidden_state: Tensor, rows: int, columns: int, mask: Tensor | None, any_size: bool) -> Tensor:
        """(B, h, w, C) to the same shape, in rows x columns windows; the mask is (rows * columns, 1, N, N)."""
        batch, height, width, channels = hidden_state.shape
        side, heads = self.window, self.heads
        inner = _pad(self.attention_norm(hidden_state), (1, 2), (side, side), any_size)
        if self.shift:
            inner = _roll(_roll(inner, 1, self.shift), 2, self.shift)
        inner = inner.view(batch, rows, side, columns, side, channels).transpose(2, 3)
        inner = self.projection(inner.reshape(batch, rows * columns, side * side, channels))  # q, k and v
        query, key, value = inner.unflatten(3, (3, heads, channels // heads)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        scores = torch.matmul(query, key.transpose(-1, -2)) + self.bias  # (B, windows, heads, N, N)
        if mask is not None:
            scores = scores + mask
        attended = torch.matmul(scores.softmax(-1), value).transpose(2, 3).flatten(3)  # (B, windows, N, C)
        attended = self.output(attended).view(batch, rows, columns, side, side, channels).transpose(2, 3)
        attended = attended.reshape(batch, rows * side, columns * side, channels)
        if self.shift:
            attended = _roll(_roll(attended, 1, rows * side - self.shift), 2, columns * side - self.shift)
        if any_size or rows * side != height:
            attended = attended.narrow(1, 0, height)
        if any_size or columns * side != width:
            attended = attended.narrow(2, 0, width)
        hidden_state = hidden_state + attended
        return hidden_state + self.feed_forward(self.feed_forward_norm(hidden_state))


def _parts(side: int, length: int) -> int:
    """The number of parts of this length that cover a side."""
    return (side + length - 1) // length


def _pad(maps: Tensor, axes: tuple[int, int], lengths: tuple[int, int], any_size: bool) -> Tensor:
    """Zero-pads rows and columns at the end to multiples of these lengths."""
    down, right = (_parts(maps.shape[a], n) * n - maps.shape[a] for a, n in zip(axes, lengths, strict=True))
    if not any_size and down == 0 and right == 0:
        return maps
    behind = (0, 0) if axes[1] == 2 else ()  # channels, if they come last
    return F.pad(maps, (*behind, 0, right, 0, down))


def _roll(maps: Tensor, axis: int, count: int) -> Tensor:
    """Moves the first `count` rows or columns to the end, without the remainders that `torch.roll` computes."""
    return torch.cat((maps.narrow(axis, count, maps.shape[axis] - count), maps.narrow(axis, 0, count)), axis)


def _shifted_mask(rows: int, columns: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(rows * columns, 1, N, N): 0 between pixels that were neighbors before the shift, `MASKED` between others.

    Only the last window in a row or column has pixels from the opposite edge of the image: its last `shift`.
    """
    areas = []
    for count in (rows, columns):
        places = torch.arange(count * window, device=like.device)
        # 0 except in the last window: only pixels of the same window are compared.
        area = (places >= count * window - shift).to(like.dtype)
        areas.append(area.view(count, window))
    vertical, horizontal = areas
    area = 2 * vertical[:, None, :, None] + horizontal[None, :, None, :]  # (rows, columns, window, window)
    area = area.reshape(rows * columns, 1, window * window)
    differ = (area[:, :, :, None] - area[:, :, None, :]).abs()
    return differ.clamp(max=1) * MASKED


def _table(module: Any) -> tuple[Tensor, Tensor]:
    return module.relative_position_bias_table, module.relative_position_index


def _as_one(projections: list[nn.Linear], heads: int) -> nn.Linear:
    """Merges three layers with the same input into one; the first includes attention's scale."""
    size = projections[0].in_features
    scales = (float(size // heads) ** -0.5, 1.0, 1.0)
    merged = nn.Linear(size, 3 * size, bias=projections[0].bias is not None)
    pairs = list(zip(projections, scales, strict=True))
    with torch.no_grad():
        merged.weight.copy_(torch.cat([layer.weight * scale for layer, scale in pairs]))
        if merged.bias is not None:
            merged.bias.copy_(torch.cat([layer.bias * scale for layer, scale in pairs]))
    return merged


__all__ = ["INPUTS", "OUTPUTS", "PRECISIONS", "TYPES", "FaiM2FGraph", "SwinForGraphs", "quietly"]
