"""Label Studio with a model of this package: predictions to start annotating from, as brush masks.

    pip install label-studio-sdk        # tried: 2.1.2
    python examples/integrations/label_studio_predictions.py MODEL FOLDER_OF_IMAGES OUT.json [URL_OF_FOLDER]

Prints the labeling configuration for the project's settings, and writes OUT.json for its Import button. URL_OF_FOLDER
is where Label Studio finds the images, such as /data/local-files/?d=photos. An ML backend's `predict` returns the same
predictions: see `to_prediction`.
"""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from label_studio_sdk.converter.brush import mask2rle

from hf_faim2f import Prediction, Predictor
from hf_faim2f.errors import ImageError
from hf_faim2f.model.image_loading_faim2f import IMAGE_SUFFIXES

# Names in the labeling configuration: the brush labels, the image, and the task's field with the image's URL.
LABELS, IMAGE, FIELD = "label", "image", "image"


def labeling_config(id2label: dict[int, str]) -> str:
    """The labeling configuration with all classes, as XML."""
    labels = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in id2label.values())
    return (
        f'<View>\n  <Image name="{IMAGE}" value="${FIELD}" zoom="true"/>\n'
        f'  <BrushLabels name="{LABELS}" toName="{IMAGE}">\n{labels}\n  </BrushLabels>\n</View>'
    )


def to_prediction(prediction: Prediction, model_version: str) -> dict[str, Any]:
    """One of a task's `predictions`: a pixel-exact brush region of Label Studio for each segment."""
    height, width = prediction.size
    regions = []
    for index, (segment, mask) in enumerate(zip(prediction.segments, prediction.masks().numpy(), strict=True)):
        region = {
            "id": f"segment-{index}", "type": "brushlabels", "from_name": LABELS, "to_name": IMAGE,
            "original_width": width, "original_height": height, "image_rotation": 0,
            "value": {
                "format": "rle", "rle": mask2rle(mask.astype(np.uint8) * 255), "brushlabels": [segment.label],
            },
        }  # fmt: skip
        if segment.score is not None:  # None in a semantic prediction
            region["score"] = segment.score
        regions.append(region)
    scores = [segment.score for segment in prediction.segments if segment.score is not None]
    result: dict[str, Any] = {"model_version": model_version, "result": regions}
    if scores:
        result["score"] = sum(scores) / len(scores)
    return result


def main(model: str, folder: str, out: str, url: str = "/data/local-files/?d=images") -> int:
    """Writes the tasks; returns 1 if an image was skipped, else 0."""
    predictor = Predictor.from_pretrained(model)
    print(labeling_config(predictor.network.config.id2label))
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    tasks = []
    for place, made in predictor.stream(files, in_order=True):
        if isinstance(made, ImageError):
            print(made, file=sys.stderr)
            continue
        prediction = to_prediction(made, model_version=Path(model).name)
        tasks.append({"data": {FIELD: f"{url}/{quote(files[place].name)}"}, "predictions": [prediction]})
    Path(out).write_text(json.dumps(tasks), encoding="utf-8")
    print(f"{len(tasks)} tasks: {out}", file=sys.stderr)
    return 1 if len(tasks) < len(files) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
