"""The base class of all metrics: a metric of the `evaluate` library that accumulates counts.

`evaluate.Metric` writes all predictions and references to an Arrow file and reads them back to compute. Masks would
take gigabytes, with every pixel as a Python number. A `StreamingMetric` has the same interface (`add`, `add_batch`,
`compute`, `info`, `evaluate.combine`), but immediately reduces each image to the counts that the result needs. It uses
neither disk nor network.

With several processes, each adds its own images, and `gather` (or `merge`, with the `state_dict` of others) combines
the counts. They are integers, exact fractions or run lengths, so the result is bit-identical for any split of images.

Libraries that only evaluation needs are imported by `library`, whose error message names the extra to install.

A prediction or a reference is a map (H, W) of integers. With a list that describes each id (transformers'
`segmentation` and `segments_info`, COCO's panoptic format), it represents any number of disjoint segments.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Sequence as Values
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

REMEDY = "install hf-faim2f[evaluate]"
# Ids of pixels without a segment in transformers.
NO_SEGMENT = (0, -1)


def library(name: str) -> ModuleType:
    """Imports a module by its dotted name.

    Raises:
        ImportError: it cannot be imported; the message says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise missing(name, error) from error


def missing(name: str, error: ImportError) -> ImportError:
    """The error for a module that could not be imported."""
    return ImportError(f"Evaluation needs {name}, which cannot be imported ({error}): {REMEDY}.", name=name)


# Imported here for all metrics.
try:
    import evaluate
    from datasets import Features, Sequence, Value
except ImportError as error:
    raise missing("evaluate", error) from error

PERCENT = 100.0
MAP = Sequence(Sequence(Value("int64")))  # (H, W), as a feature


class StreamingMetric(evaluate.Metric):
    """Base class of the metrics. Subclasses define the counts of an image, and the result from all counts.

    Args:
        id2label: the name of each class id, as in a model's configuration.

    Attributes:
        DESCRIPTION, CITATION, INPUTS: the metric, the paper that defines it, and its inputs; set by subclasses.
        class_names: the names by class id, in ascending order. Names that several classes share have the id appended.

    Raises:
        ValueError: there are no classes, or an id is not an integer.
    """

    DESCRIPTION: str
    CITATION: str
    INPUTS: str

    def __init__(self, id2label: Mapping[int, str]):
        self.class_names = _class_names(id2label)
        self._image_ids: set[Hashable] = set()
        self._images = 0
        self._gathered = False
        super().__init__()
        self._clear()

    def add(
        self, *, prediction: Any = None, reference: Any = None, image_id: Hashable | None = None, **kwargs: Any
    ) -> None:
        """Counts one image.

        Args:
            prediction: the prediction.
            reference: the ground truth.
            image_id: identifies the image in error messages, and prevents counting it twice.

        Raises:
            ValueError: the prediction or the reference is invalid; the image is not counted.
        """
        # `evaluate.combine` calls `add` with the names of `add_batch`.
        prediction, reference = kwargs.pop("predictions", prediction), kwargs.pop("references", reference)
        _refuse(kwargs)
        self._add(prediction, reference, image_id)

    def add_batch(
        self,
        *,
        predictions: Iterable[Any] | None = None,
        references: Iterable[Any] | None = None,
        image_ids: Iterable[Hashable] | None = None,
        **kwargs: Any,
    ) -> None:
        """Counts a batch of images.

        Args:
            predictions: one for each image.
            references: one for each image.
            image_ids: one for each image; see `add`.

        Raises:
            ValueError: their numbers differ, or an image is invalid; the images before it have been counted.
        """
        _refuse(kwargs)
        if predictions is None or references is None:
            raise ValueError("A metric takes predictions and references together: one of them is missing.")
        predictions, references = list(predictions), list(references)
        ids = [None] * len(predictions) if image_ids is None else list(image_ids)
        if not len(predictions) == len(references) == len(ids):
            raise ValueError(
                f"There are {len(predictions)} predictions, {len(references)} references and {len(ids)} image_ids: "
                "give one of each for every image."
            )
        for prediction, reference, image_id in zip(predictions, references, ids, strict=True):
            self._add(prediction, reference, image_id)

    def compute(
        self,
        *,
        predictions: Iterable[Any] | None = None,
        references: Iterable[Any] | None = None,
        image_ids: Iterable[Hashable] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The result over all images counted so far; also resets the metric.

        Args:
            predictions, references, image_ids: if given, counted first.

        Returns:
            The metric's values by name; NaN for a value that is undefined.

        Raises:
            ValueError: there are no images, or as in `add_batch`.
        """
        _refuse(kwargs)
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, image_ids=image_ids)
        if not self._images:
            raise ValueError("There is nothing to compute: no images were added. Call add or add_batch first.")
        result = self._result()
        self.reset()
        return result

    def reset(self) -> None:
        """Resets all counts."""
        self._image_ids = set()
        self._images = 0
        self._gathered = False
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """All counts as plain, picklable objects, for `merge` in another process."""
        return {
            "metric": type(self).__name__,
            "settings": self._settings(),
            "images": self._images,
            "image_ids": sorted(self._image_ids, key=order),
            "counts": self._state(),
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds the counts of another metric of the same class and settings.

        Args:
            state: its `state_dict`.

        Raises:
            ValueError: its class or settings differ, or both have counted the same image.
        """
        mine = {"metric": type(self).__name__, "settings": self._settings()}
        for what, value in mine.items():
            if state[what] != value:
                raise ValueError(f"Two metrics can be merged only with the same {what}: {value} is not {state[what]}.")
        if twice := self._image_ids.intersection(state["image_ids"]):
            raise ValueError(
                f"Image {min(twice, key=order)!r} was counted by two processes, and {len(twice) - 1} others: let each "
                "image go to one process, with even_batches=False in Accelerate's DataLoaderConfiguration."
            )
        self._absorb(state["counts"])
        self._images += state["images"]
        self._image_ids.update(state["image_ids"])

    def gather(self) -> None:
        """Sums the counts of all processes, so that each of them computes the result over all images.

        Every process must call it once, after its last image. With one process it does nothing.

        Raises:
            ValueError: it was already called, or two processes have counted the same image.
        """
        if self._gathered:
            raise ValueError("The counts of all processes are gathered already: call compute or reset first.")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            try:
                from accelerate.utils import gather_object
            except ImportError as error:
                raise missing("accelerate", error) from error
            states = gather_object([self.state_dict()])
            self.reset()
            for state in states:
                self.merge(state)
        self._gathered = True

    def __len__(self) -> int:
        """The number of counted images."""
        return self._images

    def __bool__(self) -> bool:
        return True  # otherwise a metric without images would be falsy

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.DESCRIPTION,
            citation=self.CITATION,
            inputs_description=self.INPUTS,
            features=self._features(),
        )

    def _build_data_dir(self) -> str:
        return ""  # `evaluate` would create a folder for its Arrow files here

    def _add(self, prediction: Any, reference: Any, image_id: Any) -> None:
        if prediction is None or reference is None:
            raise ValueError("A metric takes a prediction and a reference together: one of them is missing.")
        if self._gathered:
            raise ValueError("The counts of all processes are gathered: call compute or reset before adding images.")
        if image_id is None:
            name = f"image {self._images + 1} (in the order they were added)"
        else:
            image_id = image_id.item() if hasattr(image_id, "item") else image_id
            name = f"image {image_id!r}"
            if image_id in self._image_ids:
                raise ValueError(f"{name} was counted before: each image counts once.")
        self._update(prediction, reference, image_id, name)
        self._images += 1
        if image_id is not None:
            self._image_ids.add(image_id)

    def _check_label(self, label: Any, what: str, name: str) -> int:
        """The class id; ValueError if there is no such class. `what` is "prediction" or "reference"."""
        try:
            known = int(label) == label and int(label) in self.class_names
        except (TypeError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"{name}: class {label} of the {what} is not one of the {len(self.class_names)} classes of id2label, "
                f"{min(self.class_names)} to {max(self.class_names)}."
            )
        return int(label)

    def _features(self) -> Features | list[Features]:
        """The types of predictions and references, for `info`."""
        raise NotImplementedError

    def _update(self, prediction: Any, reference: Any, image_id: Hashable | None, name: str) -> None:
        """Counts one image, or raises before anything is counted. Error messages start with `name`."""
        raise NotImplementedError

    def _result(self) -> dict[str, Any]:
        raise NotImplementedError

    def _clear(self) -> None:
        raise NotImplementedError

    def _state(self) -> Any:
        raise NotImplementedError

    def _absorb(self, state: Any) -> None:
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        """The settings that must be equal for two metrics to be merged."""
        return {"class_names": self.class_names}


def order(image_id: Hashable) -> tuple[str, Any]:
    """A sort key for image ids, which may be of several types."""
    return type(image_id).__name__, image_id


def mean(values: Values[float]) -> float:
    """The mean of the values; NaN if there are none."""
    return sum(values) / len(values) if len(values) else float("nan")


def _class_names(id2label: Mapping[int, str]) -> dict[int, str]:
    try:
        names = {int(i): str(label) for i, label in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"id2label must give a name for each class id, a whole number, not {id2label!r}.") from None
    if not names:
        raise ValueError("id2label must name at least one class.")
    shared = {name for name, times in Counter(names.values()).items() if times > 1}
    return {i: f"{names[i]} ({i})" if names[i] in shared else names[i] for i in sorted(names)}


def _refuse(kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        raise ValueError(f"A metric takes predictions, references and image_ids, not {', '.join(sorted(kwargs))}.")


@dataclass(frozen=True)
class Segment:
    """One entry of `segments_info`."""

    id: int  # its value in the map
    label: Any  # class id, not yet checked
    crowd: bool = False  # a group of objects that were not separated
    score: float | None = None
    area: float | None = None  # in pixels, if given


def read_map(value: Any, what: str, name: str) -> Tensor:
    """Converts a map to an int64 tensor (H, W) on the device of the input.

    Args:
        value: a tensor, array, Pillow image or nested list (H, W) of integers, which may be stored as floats. (Pillow
            scales the values of gray files of 2 and 4 bits.)
        what, name: "prediction" or "reference", and the image, for error messages.

    Raises:
        ValueError: the value is not such a map.
    """
    try:
        # Through NumPy: torch does not read Pillow images, and supports few operations on uint16.
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(_signed(np.asarray(value)))
    except (TypeError, ValueError):
        raise ValueError(f"{name}: the {what} is not a map of whole numbers but a {type(value).__name__}.") from None
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{name}: the {what} must be a map (height, width) with at least one pixel, not {_shape(tensor)}."
        )
    whole = tensor.to(torch.int64)
    if tensor.is_floating_point() and not torch.equal(whole.to(tensor.dtype), tensor):
        raise ValueError(f"{name}: the {what} must have whole numbers, but has fractions: are these scores?")
    return whole


def check_same_size(prediction: Iterable[int], reference: Iterable[int], name: str) -> None:
    """Raises ValueError if two sizes, (height, width), differ."""
    (height, width), (true_height, true_width) = prediction, reference
    if (height, width) != (true_height, true_width):
        raise ValueError(
            f"{name}: the prediction is {height}x{width} pixels (height x width), but the reference is "
            f"{true_height}x{true_width}: post-process with target_sizes."
        )


def read_segments(segments_info: Iterable[Mapping[str, Any]], what: str, name: str) -> list[Segment]:
    """Reads the entries of `segments_info`: `id`, `label_id` (or COCO's `category_id`), and optionally `score`, `area`
    and `iscrowd`.

    Raises:
        ValueError: an entry has no id or no class.
    """
    segments = []
    for entry in segments_info:
        label = entry.get("label_id", entry.get("category_id"))
        if "id" not in entry or label is None:
            raise ValueError(f"{name}: a segment of the {what} has no id or no label_id: {dict(entry)}.")
        segments.append(
            Segment(int(entry["id"]), label, bool(entry.get("iscrowd", 0)), entry.get("score"), entry.get("area"))
        )
    return segments


def number_segments(ids: np.ndarray, numbers: Mapping[int, int], what: str, name: str) -> np.ndarray:
    """Replaces the ids of a map by the numbers of their segments, and ids of no segment by 0.

    Args:
        ids: (H, W).
        numbers: the segment number of each id, from 1.
        what, name: for error messages.

    Returns:
        (H, W) int64.

    Raises:
        ValueError: the map has an id without a number, other than those for "no segment".
    """
    present, inverse = np.unique(ids, return_inverse=True)
    unknown = [int(i) for i in present if int(i) not in numbers and int(i) not in NO_SEGMENT]
    if unknown:
        raise ValueError(
            f"{name}: the {what}'s map has the id {unknown[0]}, which its segments_info does not list; pixels without "
            "a segment must have the id 0 or -1."
        )
    return np.array([numbers.get(int(i), 0) for i in present], dtype=np.int64)[inverse].reshape(ids.shape)


def _signed(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "ub":
        return array.astype(np.int64)
    if array.dtype.kind not in "if":
        raise TypeError
    return np.require(array, requirements=["C", "W"])  # torch warns about read-only arrays


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"
