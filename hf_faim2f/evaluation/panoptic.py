"""Panoptic quality: how well a model divides an image into things and stuff. Computed by hotcoco.

The metric is defined in "Panoptic Segmentation" (https://arxiv.org/abs/1801.00868, section 4). Void and crowd are
treated as in COCO's panopticapi, whose results hotcoco reproduces.
"""

from collections.abc import Collection, Hashable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from ..masks import map_run_lengths
from .streaming import (
    MAP,
    PERCENT,
    Features,
    Segment,
    StreamingMetric,
    Value,
    check_same_size,
    library,
    mean,
    number_segments,
    read_map,
    read_segments,
)


class Matches(NamedTuple):
    """The counts for the panoptic quality of a class. The sum of IoUs is exact, so it does not depend on the order."""

    iou: Fraction = Fraction(0)
    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0

    def plus(self, other: "Matches") -> "Matches":
        """The sums of both."""
        return Matches(
            self.iou + other.iou,
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
        )


class PanopticMetric(StreamingMetric):
    """PQ, SQ and RQ: over all classes, things and stuff, and for each class.

    Predictions and references are mappings with `segmentation`, a map (H, W) of segment ids, and `segments_info`, a
    list with the `id` and `label_id` (or `category_id`) of each segment and, in a reference, optionally `iscrowd`.
    `post_process_panoptic_segmentation` returns such predictions. The ids 0 and -1 are void unless listed.

    A predicted segment matches a true one of its class if their IoU, without void pixels, is above 0.5. An unmatched
    prediction is ignored if more than half of it is void or a crowd of its class.

    Post-process with `label_ids_to_fuse=set()` for this metric, because it fuses stuff itself, and transformers' fusion
    can give two segments the same id.

    The metric keeps three counts and a sum of IoUs for each class.

    `compute` returns, in percent: `PQ`, `SQ`, `RQ`; the same with `_th` for things and `_st` for stuff; and
    `per_class`, {name: {`PQ`, `SQ`, `RQ`}}. A class with neither ground truth nor counted predictions is NaN and
    excluded from the means.

    Args:
        id2label: the name of each class id.
        thing_ids: the classes with instances; the others are stuff.
        fuse_stuff: count the predicted segments of a stuff class in an image as one. panopticapi expects fused
            predictions.

    Raises:
        ImportError: hotcoco is not installed.
        ValueError: there are no classes, or a thing is not among them.
    """

    DESCRIPTION = "Panoptic quality, and the segmentation and recognition quality that it is the product of."
    CITATION = "https://arxiv.org/abs/1801.00868"
    INPUTS = """
        predictions: for each image a map of segment ids with segments_info.
        references: for each image a map of segment ids with segments_info.
    """

    def __init__(self, id2label: Mapping[int, str], thing_ids: Collection[int], fuse_stuff: bool = True):
        self.thing_ids = frozenset(map(int, thing_ids))
        self.fuse_stuff = fuse_stuff
        self._hotcoco = library("hotcoco.panoptic")
        self._formulas = library("hotcoco.metrics")
        super().__init__(id2label)
        if unknown := self.thing_ids.difference(self.class_names):
            raise ValueError(f"thing_ids has {min(unknown)}, which is not a class of id2label.")

    def _features(self) -> Features:
        segments = [{"id": Value("int64"), "label_id": Value("int64")}]
        image = {"segmentation": MAP, "segments_info": segments}
        return Features({"predictions": image, "references": image})

    def _update(self, prediction: Any, reference: Any, image_id: Hashable | None, name: str) -> None:
        predicted, size = self._read(prediction, "prediction", name)
        true, true_size = self._read(reference, "reference", name)
        check_same_size(size, true_size, name)
        if not predicted and not true:
            return
        labels = {annotation["category_id"] for annotation in (*predicted, *true)}
        shared = {
            "images": [{"id": 1, "height": size[0], "width": size[1]}],
            "categories": [
                {"id": i, "name": self.class_names[i], "isthing": int(i in self.thing_ids)} for i in sorted(labels)
            ],
        }
        # One image per call, because within a call the library adds IoUs in floating point.
        evaluation = self._hotcoco.PanopticEval({**shared, "annotations": true}, {**shared, "annotations": predicted})
        evaluation.evaluate()
        for label, found in evaluation.results()["per_class"].items():
            matches = Matches(Fraction(found["iou"]), int(found["tp"]), int(found["fp"]), int(found["fn"]))
            self._matches[int(label)] = self._matches[int(label)].plus(matches)

    def _read(self, image: Any, what: str, name: str) -> tuple[list[dict[str, Any]], tuple[int, int]]:
        """An image's segments as annotations, and its size. Keeps the order: of several crowds of one class,
        panopticapi uses the last."""
        if not (isinstance(image, Mapping) and "segmentation" in image and "segments_info" in image):
            raise ValueError(f"{name}: the {what} must be a mapping with segmentation and segments_info.")
        ids = read_map(image["segmentation"], what, name).cpu().numpy()
        segments = read_segments(image["segments_info"], what, name)
        numbers: dict[int, int] = {}  # the number of each id's segment
        kept: list[Segment] = []
        number_of_stuff: dict[int, int] = {}
        for segment in segments:
            label = self._check_label(segment.label, what, name)
            if segment.id in numbers:
                same_class = kept[numbers[segment.id] - 1].label == label
                if same_class and what == "prediction" and label not in self.thing_ids:
                    continue  # fused by the post-processing
                raise ValueError(
                    f"{name}: two segments of the {what} have the id {segment.id}. Where transformers fused stuff, "
                    "post-process with label_ids_to_fuse=set() instead: the metric fuses stuff itself."
                )
            if what == "prediction" and self.fuse_stuff and label not in self.thing_ids:
                if label in number_of_stuff:
                    numbers[segment.id] = number_of_stuff[label]
                    continue
                number_of_stuff[label] = len(kept) + 1
            kept.append(segment)
            numbers[segment.id] = len(kept)
        counts = map_run_lengths(number_segments(ids, numbers, what, name), len(kept))
        size = (ids.shape[0], ids.shape[1])
        if what == "prediction":
            for segment, runs in zip(kept, counts, strict=True):
                if len(runs) == 1:
                    raise ValueError(
                        f"{name}: segments_info of the prediction lists {segment.id}, which has no pixels."
                    )
        annotations = []
        for i, (segment, runs) in enumerate(zip(kept, counts, strict=True), 1):
            rle = {"size": list(size), "counts": runs}
            annotation = {"id": i, "image_id": 1, "category_id": int(segment.label), "segmentation": rle}
            annotations.append(
                annotation | ({"iscrowd": int(segment.crowd)} if what == "reference" else {"score": 1.0})
            )
        return annotations, size

    def _result(self) -> dict[str, Any]:
        qualities: dict[int, tuple[float, ...]] = {}
        for label, (iou, *counts) in self._matches.items():
            values = self._formulas.panoptic_quality(float(iou), *counts)
            qualities[label] = tuple(PERCENT * v if any(counts) else float("nan") for v in values)
        groups = {
            "": set(self.class_names),
            "_th": set(self.thing_ids),
            "_st": set(self.class_names) - self.thing_ids,
        }
        result: dict[str, Any] = {}
        for suffix, labels in groups.items():
            defined = [qualities[label] for label in sorted(labels) if any(self._matches[label][1:])]
            for i, quality in enumerate(("PQ", "SQ", "RQ")):
                result[quality + suffix] = mean([values[i] for values in defined])
        result["per_class"] = {
            name: dict(zip(("PQ", "SQ", "RQ"), qualities[label], strict=True))
            for label, name in self.class_names.items()
        }
        return result

    def _clear(self) -> None:
        self._matches = dict.fromkeys(self.class_names, Matches())

    def _state(self) -> dict[int, Matches]:
        return dict(self._matches)

    def _absorb(self, state: Mapping[int, Matches]) -> None:
        for label, matches in state.items():
            self._matches[label] = self._matches[label].plus(matches)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "thing_ids": sorted(self.thing_ids), "fuse_stuff": self.fuse_stuff}
