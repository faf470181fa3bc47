"""Cityscapes' IoU, and its iIoU, which weights all instances equally.

Computed image by image by cityscapesscripts' own evaluation, `evalPixelLevelSemanticLabeling`. The metrics are defined
in "The Cityscapes Dataset for Semantic Urban Scene Understanding" (https://arxiv.org/abs/1604.01685, section 4.1).
"""

import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Hashable, Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from ..model.image_loading_faim2f import open_image
from .streaming import MAP, PERCENT, Features, StreamingMetric, Value, check_same_size, library, read_map

IGNORED_TRAIN_ID = 255
# An instance id is the class id times this, plus an index; smaller ids are class ids.
INSTANCES = 1000
COUNTS = ("tp", "fn", "tpWeighted", "fnWeighted")


class CityscapesMetric(StreamingMetric):
    """IoU and iIoU of classes and of categories.

    A prediction is a map (H, W), or the path of such an image, with train ids 0..18 and 255 for none, or with
    `train_ids=False` Cityscapes' own ids 0..33. A reference is the path of a `*_gtFine_labelIds.png` with the matching
    `*_gtFine_instanceIds.png` beside it, or the map (H, W) of the latter, which contains the former.

    The metric keeps the confusion matrix and, for each class and category with instances, four sums.

    `compute` returns, in percent (cityscapesscripts prints fractions): the four averages `IoU_class`, `iIoU_class`,
    `IoU_category` and `iIoU_category`; `per_class`, {name: {`IoU`, `iIoU`}} for the 19 evaluated classes; and
    `per_category`, the same for the 7 evaluated categories. iIoU is NaN for classes without instances, and both are NaN
    for classes that do not occur.

    Args:
        train_ids: whether predictions are train ids rather than Cityscapes' own ids.

    Raises:
        ImportError: cityscapesscripts is not installed.
    """

    DESCRIPTION = "IoU and instance-weighted iIoU over Cityscapes' classes and categories."
    CITATION = "https://arxiv.org/abs/1604.01685"
    INPUTS = """
        predictions: for each image a map (H, W) of train ids.
        references: for each image the path of its *_labelIds.png, with its *_instanceIds.png beside it, or the map
            (H, W) of the latter.
    """

    def __init__(self, train_ids: bool = True):
        self.train_ids = train_ids
        self._official = _official_evaluation()
        self._labels = {label.id: label for label in self._official.labels if label.id >= 0}
        # Predicted values to Cityscapes' ids; -1 for invalid values.
        self._ids = np.full(256, -1, dtype=np.int64)
        if train_ids:
            trained = {label.trainId: label.id for label in self._labels.values() if not label.ignoreInEval}
            self._ids[list(trained)] = list(trained.values())
            self._ids[IGNORED_TRAIN_ID] = 0  # unlabeled
        else:
            self._ids[list(self._labels)] = list(self._labels)
        super().__init__({label.id: label.name for label in self._labels.values() if not label.ignoreInEval})

    def _features(self) -> list[Features]:
        return [Features({"predictions": MAP, "references": reference}) for reference in (MAP, Value("string"))]

    def _update(self, prediction: Any, reference: Any, image_id: Hashable | None, name: str) -> None:
        predicted = self._read_prediction(prediction, name)
        with tempfile.TemporaryDirectory(prefix="faim2f-cityscapes-") as folder:
            if isinstance(reference, str | os.PathLike):
                truth = Path(reference)
                instances = _open(truth.parent / truth.name.replace("labelIds", "instanceIds"), "reference", name)
                if "labelIds" not in truth.name or not truth.is_file():
                    raise ValueError(f"{name}: {truth} is not a *_labelIds.png with an *_instanceIds.png beside it.")
                _open(truth, "reference", name)  # checked here, because cityscapesscripts opens any format
            else:
                # The evaluation reads its inputs from files.
                truth = Path(folder, "truth_labelIds.png")
                instances = read_map(reference, "reference", name).cpu().numpy()
                self._check_instances(instances, name)
                labels = np.where(instances < INSTANCES, instances, instances // INSTANCES)
                _write(labels.astype(np.uint8), truth)
                _write(instances.astype(np.uint16), Path(folder, "truth_instanceIds.png"))
            self._check_instances(instances, name)
            check_same_size(predicted.shape, instances.shape, name)
            file = Path(folder, "prediction.png")
            _write(predicted.astype(np.uint8), file)
            # The sums of this image only. As fractions, their total is exact in any order.
            settings = self._settings_of_evaluation()
            confusion = self._official.generateMatrix(settings)
            instance_sums = self._official.generateInstanceStats(settings)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                try:
                    self._official.evaluatePair(str(file), str(truth), confusion, instance_sums, {}, settings)
                except SystemExit:  # how cityscapesscripts reports an error
                    raise ValueError(f"{name}: cityscapesscripts says: {said.getvalue().strip()}") from None
        self._confusion += confusion.astype(np.int64)
        self._add_sums(_exact(instance_sums))

    def _read_prediction(self, prediction: Any, name: str) -> np.ndarray:
        """Reads a prediction as a map (H, W) of Cityscapes' ids."""
        if isinstance(prediction, str | os.PathLike):
            prediction = _open(Path(prediction), "prediction", name)
        values = read_map(prediction, "prediction", name).cpu().numpy()
        lowest, highest = int(values.min()), int(values.max())
        allowed = "the train ids 0 to 18, or 255" if self.train_ids else "Cityscapes' ids 0 to 33"
        for extreme in (lowest, highest):
            if not 0 <= extreme < len(self._ids):
                raise ValueError(f"{name}: the prediction has the value {extreme}, but may have {allowed}.")
        ids = self._ids[values]
        if (ids < 0).any():
            raise ValueError(f"{name}: the prediction has the value {values[ids < 0][0]}, but may have {allowed}.")
        return ids

    def _check_instances(self, instances: np.ndarray, name: str) -> None:
        for value in np.unique(instances).tolist():
            label = self._labels.get(value if value < INSTANCES else value // INSTANCES)
            if label is None or (value >= INSTANCES and not (label.hasInstances or label.ignoreInEval)):
                raise ValueError(
                    f"{name}: the reference has the instance id {value}, which Cityscapes does not define."
                )

    def _settings_of_evaluation(self) -> Any:
        settings = copy.copy(self._official.args)
        settings.evalInstLevelScore, settings.evalPixelAccuracy = True, False
        settings.JSONOutput, settings.quiet, settings.colorized = False, True, False
        return settings

    def _result(self) -> dict[str, Any]:
        official, settings = self._official, self._settings_of_evaluation()
        confusion = official.generateMatrix(settings)  # which also lists the labels in the settings
        confusion += self._confusion.astype(confusion.dtype)
        sums = official.generateInstanceStats(settings)
        for kind, names in self._sums.items():
            for name, counts in names.items():
                sums[kind][name].update({count: float(value) for count, value in counts.items()})
        of_class: dict[str, tuple[float, float]] = {}
        for label in settings.evalLabels:
            of_class[self._labels[label].name] = (
                official.getIouScoreForLabel(label, confusion, settings),
                official.getInstanceIouScoreForLabel(label, confusion, sums, settings),
            )
        of_category: dict[str, tuple[float, float]] = {}
        for category in official.category2labels:
            of_category[category] = (
                official.getIouScoreForCategory(category, confusion, settings),
                official.getInstanceIouScoreForCategory(category, confusion, sums, settings),
            )
        result: dict[str, Any] = {}
        for kind, scores in (("class", of_class), ("category", of_category)):
            for i, measure in enumerate(("IoU", "iIoU")):
                average = official.getScoreAverage({name: score[i] for name, score in scores.items()}, settings)
                result[f"{measure}_{kind}"] = float(PERCENT * average)
        categories = {label.category for label in self._labels.values() if not label.ignoreInEval}
        for kind, scores, evaluated in (
            ("per_class", of_class, set(self.class_names.values())),
            ("per_category", of_category, categories),
        ):
            result[kind] = {
                name: {"IoU": float(PERCENT * iou), "iIoU": float(PERCENT * weighted)}
                for name, (iou, weighted) in scores.items()
                if name in evaluated
            }
        return result

    def _clear(self) -> None:
        settings = self._settings_of_evaluation()
        self._confusion = np.zeros(self._official.generateMatrix(settings).shape, dtype=np.int64)
        self._sums = _exact(self._official.generateInstanceStats(settings))

    def _add_sums(self, sums: Mapping[str, Mapping[str, Mapping[str, Fraction]]]) -> None:
        for kind, names in sums.items():
            for name, counts in names.items():
                for count, value in counts.items():
                    self._sums[kind][name][count] += value

    def _state(self) -> dict[str, Any]:
        return {"confusion": self._confusion.copy(), "sums": copy.deepcopy(self._sums)}

    def _absorb(self, state: Mapping[str, Any]) -> None:
        self._confusion += state["confusion"]
        self._add_sums(state["sums"])


def _official_evaluation() -> Any:
    """cityscapesscripts' module, patched to run on NumPy 2.4 and later."""
    official: Any = library("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    if not hasattr(official.np, "in1d"):
        # cityscapesscripts 2.3.0 calls in1d, which NumPy 2.4 removed. It is restored for that module only.
        official.np = _NumPyWithIn1d("numpy")
    return official


class _NumPyWithIn1d(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def in1d(values: np.ndarray, among: Any, invert: bool = False) -> np.ndarray:
        return np.isin(values, among, invert=invert).ravel()


def _exact(sums: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, Fraction]]]:
    """Converts cityscapesscripts' `instanceStats` to exact fractions, by kind, name and count."""
    return {
        kind: {name: {count: Fraction(counts[count]) for count in COUNTS} for name, counts in names.items()}
        for kind, names in sums.items()
    }


def _open(path: Path, what: str, name: str) -> np.ndarray:
    try:
        with open_image(path, "it") as image:
            return np.array(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: the {what} {path} cannot be read: {str(error).rstrip('.')}.") from None


def _write(values: np.ndarray, path: Path) -> None:
    Image.fromarray(values).save(path, compress_level=1)
