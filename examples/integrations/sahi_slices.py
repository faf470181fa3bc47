"""SAHI with a model of this package: sliced prediction in large images (`pip install sahi`, tried: 0.12.8).

    python examples/integrations/sahi_slices.py MODEL IMAGE OUT_DIR [SLICE]

SAHI's own `HuggingfaceSegmentationModel` accepts transformers' classes only, by their names. `FaiM2FDetectionModel`
below is the same for this package. MODEL is anything that `Predictor.from_pretrained` accepts, including exports.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from sahi.models.base import DetectionModel
from sahi.predict import get_sliced_prediction
from sahi.prediction import ObjectPrediction
from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list
from sahi.utils.cv import get_coco_segmentation_from_bool_mask

from hf_faim2f import Prediction, Predictor


class FaiM2FDetectionModel(DetectionModel):
    """Instance segmentation for SAHI; `model_path` is the model, or `model` a `Predictor`.

    `mask_threshold` is not used: masks come from the model's own post-processing. SAHI keeps masks as polygons, and so
    drops parts of one or two pixels.
    """

    required_packages = ["torch", "hf_faim2f"]

    def load_model(self) -> None:
        self.set_model(Predictor.from_pretrained(self.model_path, device=str(self.device)))

    def set_model(self, model: Predictor, **kwargs: Any) -> None:
        self.model = model
        self.category_mapping = dict(model.network.config.id2label)

    def perform_inference(self, image: np.ndarray) -> None:
        """`image`: (H, W, 3) uint8, RGB."""
        self._original_predictions = self.model(
            np.ascontiguousarray(image), subtask="instance", threshold=self.confidence_threshold
        )[0]

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Any = None, full_shape_list: Any = None
    ) -> None:
        prediction: Prediction = self._original_predictions
        shift = fix_shift_amount_list(shift_amount_list or [0, 0])[0]
        full_shape = (fix_full_shape_list(full_shape_list) or [list(prediction.size)])[0]
        found = []
        for segment, mask in zip(prediction.segments, prediction.masks().numpy(), strict=True):
            polygons = get_coco_segmentation_from_bool_mask(mask)
            if polygons:
                found.append(
                    ObjectPrediction(
                        segmentation=polygons,
                        category_id=segment.class_id,
                        category_name=segment.label,
                        score=segment.score,
                        shift_amount=shift,
                        full_shape=full_shape,
                    )
                )
        self._object_prediction_list_per_image = [found]


def main(model: str, image: str, out_dir: str, slice_size: str = "512") -> None:
    size = int(slice_size)
    detector = FaiM2FDetectionModel(model_path=model, confidence_threshold=0.5)
    result = get_sliced_prediction(
        image, detector, slice_height=size, slice_width=size, overlap_height_ratio=0.2, overlap_width_ratio=0.2
    )
    result.export_visuals(export_dir=out_dir, file_name=Path(image).stem)
    for found in result.object_prediction_list:
        print(f"{found.category.name}: {found.score.value:.2f} at {[int(side) for side in found.bbox.to_xyxy()]}")


if __name__ == "__main__":
    main(*sys.argv[1:5])
