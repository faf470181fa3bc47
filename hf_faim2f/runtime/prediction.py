"""Predictions, and their computation from a network's outputs.

Logits are post-processed by the model's own image processor. Graphs with built-in post-processing return results at the
network's size. Their masks are resized to the image exactly as by the image processor, but their label maps by nearest
neighbor, which is coarser along edges (the image processor resizes class scores instead). A graph with the outputs
`instances` selects the best queries itself; `export.graph.FaiM2FGraph` documents where the image processor selects
others.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..masks import encode_run_lengths, last_on_top
from ..model.resize_faim2f import MaskEnlargement
from ..model.segmentation_labels_faim2f import resize_segmentation_map
from .backends import Network
from .drawing import Segments, draw_segments

Box = tuple[int, int, int, int]


@dataclass
class Segment:
    """A segment. Its mask is cropped to its box to save memory."""

    class_id: int
    label: str
    score: float | None  # 0..1; None in a semantic prediction
    box: Box  # x_min, y_min, x_max, y_max in pixels of the image, inclusive
    mask: Tensor  # (y_max - y_min + 1, x_max - x_min + 1) bool, on the CPU
    track: int | None = None  # the object's number in a video, from 1; see `tracking`


@dataclass
class Prediction:
    """The prediction for one image of H x W pixels.

    - **subtask**: "semantic", "instance" or "panoptic".
    - **label_map**: (H, W) int64, on the CPU: the class of each pixel, -1 for none. Where instances overlap, the class
      of the one with the best score.
    - **segments**: best first. Instance: the detections, which may overlap. Panoptic: the segments, with one segment
      per stuff class. Semantic: the classes in the map, by id.
    - **image**: the image, RGB and upright by its EXIF orientation.
    - **id2label**: the name of each class.
    - **stuff_ids**: the classes that are drawn lightly. Those that the model's configuration calls stuff; without any,
      all classes of a semantic prediction, and none of others.
    """

    subtask: str
    label_map: Tensor
    segments: list[Segment]
    image: Image.Image = field(repr=False)
    id2label: Mapping[int, str] = field(repr=False)
    stuff_ids: Collection[int] = field(default=frozenset(), repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.image.height, self.image.width

    def run_lengths(self) -> list[dict[str, Any]]:
        """Each segment's mask as compressed COCO run lengths, {"size": [height, width], "counts": str}."""
        crops, boxes = [segment.mask.numpy() for segment in self.segments], [segment.box for segment in self.segments]
        return encode_run_lengths(crops, boxes, self.size)

    def segment_map(self) -> Tensor:
        """(H, W) int64: the index in `segments` of the best segment at each pixel, -1 for none."""
        return paint(self.segments, list(range(len(self.segments))), self.size)

    def masks(self, size: tuple[int, int] | None = None) -> Tensor:
        """(n, height, width) bool: the uncropped masks, resized by nearest neighbor to `size` if given."""
        if size == self.size:
            size = None
        height, width = size or self.size
        rows, columns = torch.arange(height) * self.size[0] // height, torch.arange(width) * self.size[1] // width
        masks = torch.zeros(len(self.segments), height, width, dtype=torch.bool)
        for whole, segment in zip(masks, self.segments, strict=True):
            x_min, y_min, x_max, y_max = segment.box
            # The sampled rows and columns that lie inside the box are contiguous.
            top, below = torch.searchsorted(rows, torch.tensor([y_min, y_max + 1])).tolist()
            left, right = torch.searchsorted(columns, torch.tensor([x_min, x_max + 1])).tolist()
            crop = segment.mask
            if size is not None:
                crop = crop[rows[top:below] - y_min][:, columns[left:right] - x_min]
            whole[top:below, left:right] = crop
        return masks

    def draw(self, longest: int | None = None) -> Image.Image:
        """Draws the segments, tinted, outlined and labeled, over the image; see `drawing.draw_segments`.

        Args:
            longest: maximum of the longer side in pixels; None for the image's own size.
        """
        height, width = self.size
        factor = min(1.0, (longest or max(self.size)) / max(self.size))
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
        image = self.image
        if factor < 1:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        scores = [segment.score for segment in self.segments if segment.score is not None]
        segments = Segments(
            self.masks((height, width)),
            torch.tensor([segment.class_id for segment in self.segments], dtype=torch.int64),
            torch.tensor(scores) if len(scores) == len(self.segments) else None,
            self.stuff_ids,
            [segment.track for segment in self.segments],
        )
        return draw_segments(image, segments, self.id2label)

    def to_json(self) -> list[dict[str, Any]]:
        """The segments as plain data in the same order: class id, label, score, box, area in pixels and run lengths.

        In a video whose objects are tracked, also the number of the object.
        """
        return [
            {
                "class_id": segment.class_id,
                "label": segment.label,
                "score": segment.score,
                "box": list(segment.box),
                "area": int(np.count_nonzero(segment.mask.numpy())),
                "segmentation": run_lengths,
                **({} if segment.track is None else {"track": segment.track}),
            }
            for segment, run_lengths in zip(self.segments, self.run_lengths(), strict=True)
        ]


def paint(segments: list[Segment], values: list[int], size: tuple[int, int]) -> Tensor:
    """(H, W) int64 with each segment's value inside its mask, -1 elsewhere; earlier segments are on top."""
    crops = [(segment.mask.numpy(), segment.box) for segment in reversed(segments)]
    table = np.array([-1, *reversed(values)], dtype=np.int64)
    return torch.from_numpy(table.take(last_on_top(crops, size)))


# Subtasks that each kind of graph outputs supports.
SUBTASKS: dict[str, tuple[str, ...]] = {
    "logits": ("semantic", "instance", "panoptic"),
    "semantic": ("semantic",),
    "instances": ("instance",),
    "queries": ("instance",),
}
# The default in transformers; for instances, the image processor defines it.
PANOPTIC_THRESHOLD = 0.5


def several_images(images: Any) -> Iterable[Any]:
    """The images, one after the other; a single one as a list."""
    is_one = isinstance(images, (str, bytes, dict, os.PathLike, Image.Image)) or hasattr(images, "read")
    is_one |= getattr(images, "ndim", 1) not in (1, 4) or not isinstance(images, Iterable)
    return [images] if is_one else images


def usual_threshold(network: Network, subtask: str) -> float:
    """The lowest score of a segment, 0 to 1, if the caller does not choose it; without effect on "semantic"."""
    settings: dict[str, Any] = network.processor.to_dict()
    return PANOPTIC_THRESHOLD if subtask == "panoptic" else float(settings["threshold"])


@torch.no_grad()
def answer(
    network: Network,
    outputs: Mapping[str, Tensor],
    network_size: tuple[int, int],
    image: Image.Image,
    subtask: str,
    threshold: float | None,
) -> Prediction:
    """The prediction for one image.

    Args:
        network: the network that returned the outputs.
        outputs: the outputs for this image, as a batch of one.
        network_size: (height, width) of the network's input.
        image: the image at its own size.
        subtask: one of `SUBTASKS[network.outputs]`.
        threshold: lowest score; None for the default. Ignored for semantic predictions.
    """
    size = (image.height, image.width)
    names = network.config.id2label
    stuff = frozenset(network.config.label_ids_to_fuse or (names if subtask == "semantic" else ()))
    if subtask == "semantic":
        if network.outputs == "logits":
            label_map = network.processor.post_process_semantic_segmentation(outputs, [size])[0]
        else:
            label_map = resize_segmentation_map(outputs["segmentation"][0].long(), *size)
        label_map = label_map.cpu()
        # Class ids are small, so counting takes a tenth of the time of unique(), which sorts.
        segments = _segments_of_map(label_map, label_map.flatten().bincount().nonzero()[:, 0].tolist(), names)
        return Prediction(subtask, label_map, segments, image, names, stuff)
    if subtask == "panoptic":
        segments = _panoptic(network, outputs, size, threshold)
    elif network.outputs == "logits":
        found = network.processor.post_process_detections(
            outputs, [size], network_size, threshold=threshold, id2label=names
        )[0]
        segments = [Segment(d.class_id, str(d.label), d.score, d.box, d.mask.cpu()) for d in found]
    else:
        segments = _instances(network, outputs, size, threshold)
    segments.sort(key=lambda segment: -(segment.score or 0.0))
    label_map = paint(segments, [segment.class_id for segment in segments], size)
    return Prediction(subtask, label_map, segments, image, names, stuff)


def _panoptic(
    network: Network, outputs: Mapping[str, Tensor], size: tuple[int, int], threshold: float | None
) -> list[Segment]:
    names = network.config.id2label
    found = network.processor.post_process_panoptic_segmentation(
        outputs, PANOPTIC_THRESHOLD if threshold is None else threshold, target_sizes=[size]
    )[0]
    infos = found["segments_info"]
    segments = _segments_of_map(found["segmentation"].cpu().long(), [info["id"] for info in infos], names)
    for segment, info in zip(segments, infos, strict=True):
        segment.class_id, segment.label, segment.score = info["label_id"], names[info["label_id"]], info["score"]
    return segments


def _instances(
    network: Network, outputs: Mapping[str, Tensor], size: tuple[int, int], threshold: float | None
) -> list[Segment]:
    """Runs the remaining steps of `post_process_detections`; the graph has done those up to the masks."""
    settings: dict[str, Any] = network.processor.to_dict()
    threshold = settings["threshold"] if threshold is None else threshold
    class_ids, scores, masks = (outputs[name][0] for name in ("class_ids", "scores", "masks"))
    kept = torch.arange(len(scores), device=scores.device)
    if threshold > 0:
        kept = (scores > threshold).nonzero()[:, 0]
    if len(scores) > settings["top_k"]:
        kept = kept[scores[kept].argsort(descending=True, stable=True)][: settings["top_k"]]
    masks = masks[kept].bool()
    to_image = MaskEnlargement((masks.shape[1], masks.shape[2]), size, masks.device)
    boxes = to_image.boxes(masks).tolist() if len(kept) else []
    pixels = masks.flatten(1).sum(1).tolist()
    segments = []
    rows = zip(class_ids[kept].tolist(), scores[kept].tolist(), boxes, pixels, masks, strict=True)
    for class_id, score, box, count, mask in rows:
        # Graphs mark empty masks by the score 0.
        if settings["filter_empty_masks"] and (count <= 1 or box[2] < 0 or score == 0):
            continue
        if box[2] < 0:
            box, crop = [0, 0, 0, 0], mask.new_zeros(1, 1)
        else:
            crop = to_image.crop(mask, box)
        segments.append(Segment(class_id, network.config.id2label[class_id], score, tuple(box), crop.cpu()))
    return segments


def _segments_of_map(places: Tensor, values: list[int], names: Mapping[int, str]) -> list[Segment]:
    """One segment for each of these values, all of which occur in the map (H, W)."""
    segments = []
    # NumPy compares small integers, and reduces with any(), in a tenth of torch's time.
    small = places.numpy().astype(np.min_scalar_type(-1 - max(values, default=0)))
    for value in values:
        mask = small == value
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
        crop = torch.from_numpy(mask[box[1] : box[3] + 1, box[0] : box[2] + 1].copy())
        segments.append(Segment(value, names.get(value, str(value)), None, box, crop))
    return segments


__all__ = ["SUBTASKS", "Prediction", "Segment", "answer", "paint", "several_images", "usual_threshold"]
