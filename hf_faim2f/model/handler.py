"""Answers requests on Hugging Face Inference Endpoints, whose toolkit loads this file by its name.

The toolkit loads this file alone, outside of any package, so transformers loads the modules beside it.
"""

from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation
from transformers.dynamic_module_utils import get_class_from_dynamic_module


class EndpointHandler:
    """Loads the model of a folder, on a GPU if there is one, and answers requests.

    Args:
        path: the folder that contains this file, or a Hub id.
    """

    def __init__(self, path: str = "") -> None:
        model: Any = AutoModelForUniversalSegmentation.from_pretrained(path, trust_remote_code=True).eval()
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        model.optimize_for_inference().to("cuda" if torch.cuda.is_available() else "cpu")
        # After the model, whose module transformers 4.57 needs to find those that the others import.
        requests = get_class_from_dynamic_module("inference_api_faim2f.SegmentationRequests", path)
        self.requests = requests(model, processor)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """The segments of an image, as from transformers' image segmentation pipeline.

        Args:
            data: `inputs`, a PIL image, or an image's file as bytes or in base64; and optionally `parameters`:
                subtask, threshold, mask_threshold and overlap_mask_area_threshold.

        Returns:
            For each segment its score (None for the subtask "semantic"), label, and mask as a PNG in base64.

        Raises:
            ValueError: the request is invalid; one sentence.
        """
        return self.requests(data)


__all__ = ["EndpointHandler"]
