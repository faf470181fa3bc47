"""Semantic segmentation metrics: intersection over union and accuracy, from a confusion matrix.

Follows Focoos's evaluator, which is detectron2's `SemSegEvaluator`; mmsegmentation's mean is returned as well. The
metrics are defined in "Fully Convolutional Networks for Semantic Segmentation" (https://arxiv.org/abs/1411.4038,
section 5).

The confusion matrix takes one `torch.bincount` per image. torchmetrics does the same internally, but would be one more
dependency, and its state cannot be merged across processes without its own synchronization.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch

from .segments import check_same_size, read_map
from .streaming import MAP, PERCENT, Features, StreamingMetric, mean

USUAL_VOID = 255


class SemanticMetric(StreamingMetric):
    """mIoU, fwIoU, mean accuracy and pixel accuracy, over all images and per class.

    Predictions and references are maps (H, W) of class ids in 0..C-1. Both can be tensors (which are counted on their
    device), arrays, Pillow images or lists. Pixels that are `ignore_index` in the reference do not count. The metric
    keeps the confusion matrix, (C, C).

    `compute` returns, in percent, with the intersection, union and ground truth of a class in pixels over all images:

    - `mIoU`: the mean of intersection / union over the classes in the ground truth, as in Focoos and detectron2.
    - `mIoU_mmseg`: the same over the classes in the ground truth or in any prediction, as in mmsegmentation: a class
      that is only predicted counts as 0. It differs from `mIoU` only if a predicted class has no ground truth.
    - `fwIoU`: the mean of the IoU, weighted by each class's fraction of the ground truth.
    - `mACC`: the mean of intersection / ground truth over the classes in the ground truth.
    - `pACC`: the fraction of pixels with the right class.
    - `per_class`: {name: {`IoU`, `ACC`}}; NaN for a class that does not occur in the ground truth.

    Args:
        id2label: the name of each class id, 0..C-1.
        ignore_index: the value of reference pixels that do not count; None if all count.

    Raises:
        ValueError: the class ids are not 0..C-1, or `ignore_index` is 255 and so is one of them.
    """

    DESCRIPTION = "Intersection over union and accuracy of semantic segmentation, over all pixels of all images."
    CITATION = "https://arxiv.org/abs/1411.4038"
    INPUTS = """
        predictions: for each image a map (H, W) of class ids.
        references: for each image a map (H, W) of class ids, or ignore_index where a pixel does not count.
    """

    def __init__(self, id2label: Mapping[int, str], ignore_index: int | None = USUAL_VOID):
        self.ignore_index = ignore_index
        super().__init__(id2label)
        if list(self.class_names) != list(range(len(self.class_names))):
            raise ValueError(
                f"Semantic segmentation needs the class ids 0 to {len(self.class_names) - 1} for "
                f"{len(self.class_names)} classes, not {min(self.class_names)} to {max(self.class_names)}."
            )
        if ignore_index == USUAL_VOID and ignore_index in self.class_names:  # the default would drop a class
            raise ValueError(
                f"ignore_index is {ignore_index}, which is the class {self.class_names[ignore_index]!r}: pass the "
                "value of pixels without a class, such as -1, or None if there are none."
            )

    def _features(self) -> Features:
        return Features({"predictions": MAP, "references": MAP})

    def _update(self, prediction: Any, reference: Any, image_id: Hashable | None, name: str) -> None:
        predicted = read_map(prediction, "prediction", name)
        true = read_map(reference, "reference", name).to(predicted.device)
        check_same_size(predicted.shape, true.shape, name)
        classes = len(self.class_names)
        if self.ignore_index is not None:
            counted = true != self.ignore_index
            predicted, true = predicted[counted], true[counted]
        if not true.numel():
            return
        for labels, what in ((predicted, "prediction"), (true, "reference")):
            for label in labels.aminmax():
                self._check_label(label.item(), what, name)
        counts = torch.bincount((true * classes + predicted).view(-1), minlength=classes**2)
        self._confusion += counts.view(classes, classes).cpu().numpy()

    @property
    def confusion(self) -> np.ndarray:
        """(C, C) int64: the numbers of pixels counted so far; rows are the ground truth, columns the predictions."""
        return self._confusion.copy()

    def _result(self) -> dict[str, Any]:
        right = np.diag(self._confusion).astype(float)
        true, predicted = self._confusion.sum(1).astype(float), self._confusion.sum(0).astype(float)
        union = true + predicted - right
        occurs = true > 0  # implies a non-empty union
        iou, accuracy = (
            PERCENT * np.divide(right, by, out=np.full_like(right, np.nan), where=occurs) for by in (union, true)
        )
        pixels = true.sum()
        return {
            "mIoU": mean(iou[occurs].tolist()),
            "mIoU_mmseg": mean(np.where(occurs, iou, 0)[union > 0].tolist()),
            "fwIoU": float((iou * true)[occurs].sum() / pixels) if pixels else float("nan"),
            "mACC": mean(accuracy[occurs].tolist()),
            "pACC": float(PERCENT * right.sum() / pixels) if pixels else float("nan"),
            "per_class": {
                name: {"IoU": float(iou[i]), "ACC": float(accuracy[i])} for i, name in self.class_names.items()
            },
        }

    def _clear(self) -> None:
        self._confusion = np.zeros((len(self.class_names),) * 2, dtype=np.int64)

    def _state(self) -> np.ndarray:
        return self.confusion

    def _absorb(self, state: np.ndarray) -> None:
        self._confusion += state

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "ignore_index": self.ignore_index}
