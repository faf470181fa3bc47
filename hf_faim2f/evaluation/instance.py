"""COCO's average precision of masks: how well a model finds objects. Computed by faster-coco-eval.

The metric is defined in "Microsoft COCO: Common Objects in Context" (https://arxiv.org/abs/1405.0312, section 5), and
computed as in pycocotools: https://cocodataset.org/#detection-eval.
"""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..masks import map_run_lengths, to_run_lengths
from ..model.focoos_post_processing_faim2f import InstanceEvaluation
from .streaming import (
    MAP,
    PERCENT,
    Features,
    Sequence,
    StreamingMetric,
    Value,
    check_same_size,
    library,
    number_segments,
    order,
    read_map,
    read_segments,
)

Size = tuple[int, int]


class Instance(NamedTuple):
    """A predicted or true object, as COCO's compressed run lengths."""

    label: int
    counts: bytes
    score: float | None = None  # for predicted objects
    crowd: bool = False  # for true objects
    area: float | None = None  # for true objects, in pixels, if it differs from the mask's area


class Image(NamedTuple):
    """The objects of one image."""

    image_id: Hashable | None
    size: Size
    predictions: list[Instance]
    references: list[Instance]


class InstanceMetric(StreamingMetric):
    """COCO's AP of masks: over IoU thresholds 0.50 to 0.95, at 0.50, at 0.75, by object size, and per class.

    A prediction is one of:

    - a mapping with `masks`, (n, H, W) booleans or 0 and 1, or n COCO RLEs; `scores`, (n,); `labels`, (n,) class ids;
    - an `InstanceEvaluation`, as returned by `evaluate_instances`;
    - a mapping with `segmentation`, a map (H, W) of ids or binary maps (n, H, W), and `segments_info`, as returned by
      `post_process_instance_segmentation`. An object that others cover completely has an empty mask.

    A reference is one of:

    - a mapping with `masks` and `labels` as above, and optionally `iscrowd`, (n,), and `areas`, (n,);
    - a mapping with `segmentation`, a map (H, W) of ids, and `segments_info`, a list with the `id`, the `label_id` (or
      `category_id`) and optionally `iscrowd` and `area` of each; ids 0 and -1 are background unless listed;
    - COCO's `height`, `width` and `annotations`, a list with `segmentation` (polygons or RLE), `category_id`, and
      optionally `iscrowd` and `area`. Category ids must be those of `id2label`.

    An object's area decides whether it counts in APs, APm or APl. By default it is the mask's area. COCO's files give
    the polygon's area, which differs slightly; with `annotations`, results equal the official ones. A prediction inside
    a crowd counts neither as a hit nor as a miss.

    The metric keeps the compressed run lengths of all objects, whose size grows with the outlines, not the areas.

    `compute` returns, in percent: `AP`, `AP50`, `AP75`, `APs` (area up to 32x32 pixels), `APm` (up to 96x96), `APl`,
    `AR` (average recall over the IoU thresholds), and `per_class`, {name: {`AP`, `AP50`}}; NaN where there are no
    such objects in the ground truth.

    Equal scores are ranked by image id, as in COCO, if `image_ids` are given; otherwise by the order of adding.

    Args:
        id2label: the name of each class id.
        max_detections: maximum number of predictions per class and image, best first; COCO uses 100.

    Raises:
        ImportError: faster-coco-eval is not installed.
        ValueError: there are no classes, or max_detections is below 1.
    """

    DESCRIPTION = "Average precision of instance segmentation, as COCO defines it."
    CITATION = "https://arxiv.org/abs/1405.0312"
    INPUTS = """
        predictions: for each image masks with scores and labels, or a map with segments_info.
        references: for each image masks with labels, or a map with segments_info, or COCO annotations.
    """

    def __init__(self, id2label: Mapping[int, str], max_detections: int = 100):
        if max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, not {max_detections}.")
        self.max_detections = max_detections
        self._coco = library("faster_coco_eval")
        self._mask = library("faster_coco_eval.core.mask")
        super().__init__(id2label)

    def _features(self) -> Features:
        objects = {"masks": Sequence(MAP), "labels": Sequence(Value("int64"))}
        return Features({"predictions": objects | {"scores": Sequence(Value("float32"))}, "references": objects})

    def _update(self, prediction: Any, reference: Any, image_id: Hashable | None, name: str) -> None:
        if isinstance(prediction, InstanceEvaluation):
            prediction = {"masks": prediction.masks, "scores": prediction.scores, "labels": prediction.class_ids}
        predicted, size = self._read(prediction, "prediction", name)
        true, true_size = self._read(reference, "reference", name)
        if size and true_size:
            check_same_size(size, true_size, name)
        elif not (size or true_size):
            size = (1, 1)  # no predictions and no objects
        self._kept.append(Image(image_id, true_size or size or (1, 1), predicted, true))

    def _read(self, objects: Any, what: str, name: str) -> tuple[list[Instance], Size | None]:
        """The objects, and the image's size if it can be determined from them."""
        if not isinstance(objects, Mapping):
            raise ValueError(f"{name}: the {what} must be a mapping, not a {type(objects).__name__}.")
        if "annotations" in objects and what == "reference":
            return self._read_coco(objects, name)
        if "segmentation" in objects and "segments_info" in objects:
            return self._read_map(objects, what, name)
        if "masks" in objects and "labels" in objects:
            return self._read_masks(objects, what, name)
        raise ValueError(
            f"{name}: the {what} must have masks and labels, or segmentation and segments_info"
            f"{', or annotations' if what == 'reference' else ''}, but has {', '.join(map(str, objects)) or 'nothing'}."
        )

    def _read_masks(self, objects: Mapping[str, Any], what: str, name: str) -> tuple[list[Instance], Size | None]:
        masks = objects["masks"]
        size: Size | None
        if isinstance(masks, Tensor | np.ndarray):
            rles, size = self._encode(masks, what, name)
        elif all(isinstance(mask, Mapping) for mask in masks):
            rles, size = self._compress(masks, what, name)
        else:
            arrays = [mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask) for mask in masks]
            if len(shapes := {array.shape for array in arrays}) > 1:
                raise ValueError(f"{name}: masks of the {what} differ in size: {sorted(shapes)}.")
            rles, size = self._encode(np.stack(arrays), what, name)
        columns = {"labels": _values(objects["labels"])}
        wanted = {"prediction": {"scores": "score"}, "reference": {"iscrowd": "crowd", "areas": "area"}}[what]
        columns |= {ours: _values(objects[theirs]) for theirs, ours in wanted.items() if theirs in objects}
        if what == "prediction" and "score" not in columns:
            raise ValueError(f"{name}: the prediction has no scores, one for each mask.")
        for column, values in columns.items():
            if len(values) != len(rles):
                raise ValueError(f"{name}: the {what} has {len(rles)} masks, but {len(values)} values of {column}.")
        found = []
        for i, rle in enumerate(rles):
            row = {column: values[i] for column, values in columns.items()}
            found.append(self._instance(row.pop("labels"), rle, what, name, **row))
        return found, size

    def _read_map(self, objects: Mapping[str, Any], what: str, name: str) -> tuple[list[Instance], Size | None]:
        segments = read_segments(objects["segments_info"], what, name)
        segmentation = objects["segmentation"]
        size: Size | None
        if getattr(segmentation, "ndim", 2) == 3:  # binary maps, in the segments' order
            rles, size = self._encode(segmentation, what, name)
            if len(rles) != len(segments):
                raise ValueError(f"{name}: the {what} has {len(rles)} maps, but {len(segments)} segments_info.")
        else:
            ids = read_map(segmentation, what, name).cpu().numpy()
            size = (ids.shape[0], ids.shape[1])
            numbers = {segment.id: i for i, segment in enumerate(segments, 1)}
            if len(numbers) != len(segments):
                raise ValueError(f"{name}: two segments of the {what} have the same id.")
            counts = map_run_lengths(number_segments(ids, numbers, what, name), len(segments))
            rles, _ = self._compress([{"size": size, "counts": runs} for runs in counts], what, name)
        found = []
        for segment, rle in zip(segments, rles, strict=True):
            if what == "prediction":
                found.append(self._instance(segment.label, rle, what, name, score=segment.score))
            else:
                found.append(self._instance(segment.label, rle, what, name, crowd=segment.crowd, area=segment.area))
        return found, size

    def _read_coco(self, objects: Mapping[str, Any], name: str) -> tuple[list[Instance], Size]:
        if "height" not in objects or "width" not in objects:
            raise ValueError(f"{name}: a reference with annotations needs the image's height and width.")
        size = (int(objects["height"]), int(objects["width"]))
        found = []
        for annotation in objects["annotations"]:
            rle = _compress_shape(annotation["segmentation"], size, "reference", name)
            details = {"crowd": annotation.get("iscrowd", 0), "area": annotation.get("area")}
            found.append(self._instance(annotation["category_id"], rle, "reference", name, **details))
        return found, size

    def _instance(
        self,
        label: Any,
        rle: Mapping[str, Any],
        what: str,
        name: str,
        score: Any = None,
        crowd: Any = 0,
        area: Any = None,
    ) -> Instance:
        label = self._check_label(label, what, name)
        if what == "prediction":
            if score is None or not np.isfinite(score):
                raise ValueError(
                    f"{name}: the score of a predicted {self.class_names[label]} must be a number, not {score}."
                )
            return Instance(label, rle["counts"], score=float(score))
        return Instance(label, rle["counts"], crowd=bool(crowd), area=None if area is None else float(area))

    def _encode(self, masks: Tensor | np.ndarray, what: str, name: str) -> tuple[list[dict[str, Any]], Size]:
        """Encodes masks (n, H, W) as COCO RLEs."""
        if masks.ndim != 3 or 0 in masks.shape[1:]:
            raise ValueError(
                f"{name}: the {what}'s masks must have the shape (n, height, width), not {tuple(masks.shape)}."
            )
        if isinstance(masks, np.ndarray):
            masks = torch.from_numpy(np.require(masks, requirements="W"))  # torch warns about read-only arrays
        if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
            raise ValueError(f"{name}: the {what}'s masks must be of 0 and 1: cut probabilities at a threshold first.")
        # The library expects (H, W, n) in column-major order, which is (n, W, H) in row-major order.
        columns = masks.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
        return self._mask.encode(columns.transpose(2, 1, 0)) if len(columns) else [], (masks.shape[1], masks.shape[2])

    def _compress(self, rles: Any, what: str, name: str) -> tuple[list[dict[str, Any]], Size | None]:
        """Converts any COCO RLE to a compressed one."""
        compressed = []
        for rle in rles:
            if "size" not in rle or len(rle["size"]) != 2:
                raise ValueError(f"{name}: a mask of the {what} needs its size, [height, width], and its counts.")
            height, width = map(int, rle["size"])
            compressed.append(_compress_shape(rle, (height, width), what, name))
        sizes: set[Size] = {(rle["size"][0], rle["size"][1]) for rle in compressed}
        if len(sizes) > 1:
            raise ValueError(f"{name}: masks of the {what} differ in size: {sorted(sizes)}.")
        return compressed, next(iter(sizes), None)

    def _result(self) -> dict[str, Any]:
        images = sorted(self._kept, key=_rank)
        evaluation = self._coco.COCOeval_faster(
            self._dataset(images, predicted=False), self._dataset(images, predicted=True), iouType="segm"
        )
        evaluation.params.maxDets = [self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"][..., 0]  # (IoU threshold, recall, class, area range)
        at = {f"{threshold:.2f}": i for i, threshold in enumerate(evaluation.params.iouThrs)}
        ranges = {label: i for i, label in enumerate(evaluation.params.areaRngLbl)}
        overall = precision[..., ranges["all"]]
        return {
            "AP": _average(overall),
            "AP50": _average(overall[at["0.50"]]),
            "AP75": _average(overall[at["0.75"]]),
            "APs": _average(precision[..., ranges["small"]]),
            "APm": _average(precision[..., ranges["medium"]]),
            "APl": _average(precision[..., ranges["large"]]),
            "AR": _average(evaluation.eval["recall"][:, :, ranges["all"], 0]),
            "per_class": {
                name: {"AP": _average(overall[:, :, k]), "AP50": _average(overall[at["0.50"], :, k])}
                for k, name in enumerate(self.class_names.values())
            },
        }

    def _dataset(self, images: list[Image], predicted: bool) -> Any:
        annotations: list[dict[str, Any]] = []
        for number, image in enumerate(images, 1):
            for one in image.predictions if predicted else image.references:
                rle = {"size": list(image.size), "counts": one.counts}
                annotation = {
                    "id": len(annotations) + 1,  # from 1, because COCO's evaluation uses 0 for "no match"
                    "image_id": number,
                    "category_id": one.label,
                    "segmentation": rle,
                    "iscrowd": int(one.crowd),
                    "area": float(self._mask.area(rle)) if one.area is None else one.area,
                }
                annotations.append(annotation | ({"score": one.score} if predicted else {}))
        sizes = [(number, image.size) for number, image in enumerate(images, 1)]
        return self._coco.COCO(
            {
                "images": [{"id": number, "height": height, "width": width} for number, (height, width) in sizes],
                "annotations": annotations,
                "categories": [{"id": i, "name": name} for i, name in self.class_names.items()],
            }
        )

    def _clear(self) -> None:
        self._kept: list[Image] = []

    def _state(self) -> list[Image]:
        return list(self._kept)

    def _absorb(self, state: list[Image]) -> None:
        self._kept.extend(state)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "max_detections": self.max_detections}


def _compress_shape(shape: Any, size: Size, what: str, name: str) -> dict[str, Any]:
    """The compressed RLE of an object in any of COCO's formats, whose numbers may also be arrays."""
    try:
        if isinstance(shape, Mapping):
            counts = shape.get("counts")
            if not isinstance(counts, bytes | str):
                counts = np.asarray(counts).tolist()
            shape = {"size": np.asarray(shape.get("size")).tolist(), "counts": counts}
        elif isinstance(shape, list | tuple):
            shape = [np.asarray(polygon).tolist() for polygon in shape]
        return to_run_lengths(shape, *size)
    except ValueError as error:
        raise ValueError(f"{name}: a mask of the {what} cannot be used: {error}.") from error


def _rank(image: Image) -> tuple[str, Any]:
    """A sort key by id; images without one keep the order in which they were added."""
    return order("" if image.image_id is None else image.image_id)


def _average(values: np.ndarray) -> float:
    """The mean of the defined values, in percent; COCO marks undefined ones with -1."""
    defined = values[values > -1]
    return float(PERCENT * defined.mean()) if defined.size else float("nan")


def _values(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, Tensor | np.ndarray) else list(column)
