"""FiftyOne with a model of this package: predictions as labels of a dataset (`pip install fiftyone`, tried: 1.22.1).

    python examples/integrations/fiftyone_model.py MODEL FOLDER_OF_IMAGES

FiftyOne's own wrapper of transformers' models needs torchvision. `FaiM2FModel` below does not: it wraps a `Predictor`
for `Dataset.apply_model`.
"""

import sys
from typing import Any

import fiftyone as fo
import numpy as np

from hf_faim2f import Prediction, Predictor


def to_labels(prediction: Prediction) -> fo.Detections | fo.Segmentation:
    """A semantic prediction as a `Segmentation`, others as `Detections` with masks.

    FiftyOne treats 0 in a segmentation's mask as background, so mask values are class ids plus 1: see `mask_targets`.
    """
    if prediction.subtask == "semantic":
        return fo.Segmentation(mask=(prediction.label_map.numpy() + 1).astype(np.uint16))
    height, width = prediction.size
    detections = []
    for segment in prediction.segments:
        x_min, y_min, x_max, y_max = segment.box  # inclusive
        # FiftyOne truncates x * width: without the millionth, rounding would shift some masks by one pixel.
        x, y = (x_min + 1e-6) / width, (y_min + 1e-6) / height
        box = [x, y, (x_max - x_min + 1) / width, (y_max - y_min + 1) / height]
        detections.append(
            fo.Detection(label=segment.label, bounding_box=box, mask=segment.mask.numpy(), confidence=segment.score)
        )
    return fo.Detections(detections=detections)


class FaiM2FModel(fo.Model):
    """A model for `Dataset.apply_model(model, label_field=...)`.

    Args:
        model: anything that `Predictor.from_pretrained` accepts.
        subtask: "semantic", "instance" or "panoptic"; None for the one that the model was trained for.
        threshold: lowest score of a segment, 0..1; None for the default. Not used for semantic predictions.
        device: as in `Predictor.from_pretrained`.
    """

    def __init__(
        self, model: str, subtask: str | None = None, threshold: float | None = None, device: str | None = None
    ) -> None:
        self.predictor = Predictor.from_pretrained(model, device=device)
        self.subtask = subtask or self.predictor.subtasks[0]
        self.threshold = threshold if self.subtask != "semantic" else None

    @property
    def media_type(self) -> str:
        return "image"

    @property
    def mask_targets(self) -> dict[int, str]:
        """The names of the values in a segmentation's mask, for `dataset.mask_targets`."""
        return {index + 1: name for index, name in self.predictor.network.config.id2label.items()}

    def predict(self, arg: Any) -> fo.Detections | fo.Segmentation:
        """`arg`: (H, W, 3) uint8, RGB, as FiftyOne reads images."""
        return to_labels(self.predictor(arg, subtask=self.subtask, threshold=self.threshold)[0])


def main(model: str, folder: str) -> None:
    dataset = fo.Dataset.from_images_dir(folder)
    segmenter = FaiM2FModel(model)
    dataset.mask_targets = {"predictions": segmenter.mask_targets}
    dataset.apply_model(segmenter, label_field="predictions")
    fo.launch_app(dataset).wait()


if __name__ == "__main__":
    main(*sys.argv[1:3])
