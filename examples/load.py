"""Loads a model with transformers' Auto classes and lists the objects in an image.

    python examples/load.py IMAGE [MODEL]

MODEL is a folder or Hub id (default: `demo-output/digits`, which `make demo` writes). Only torch and transformers are
needed: the model's code is in its folder.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

# Pillow can open more formats, but starts external programs for some of them.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")


def main(image_file: str, model_name: str = str(Path(__file__).parents[1] / "demo-output" / "digits")) -> None:
    """Prints each object's class, score and box (x_min, y_min, x_max, y_max, in pixels), and each class's area."""
    if not Path(image_file).is_file():
        sys.exit(f"{image_file} is not a file: name an image.")
    processor = AutoImageProcessor.from_pretrained(model_name, trust_remote_code=True)
    model = AutoModelForUniversalSegmentation.from_pretrained(model_name, trust_remote_code=True).eval()
    # Upright by its EXIF orientation, as in the image processor: results refer to this size.
    image = ImageOps.exif_transpose(Image.open(image_file, formats=FORMATS))
    sizes = [(image.height, image.width)]
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    found = processor.post_process_detections(outputs, target_sizes=sizes, id2label=model.config.id2label)[0]
    for one in found:
        print(f"{one.label}: {one.score:.2f}, box {one.box}")
    label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0]
    for class_id, count in zip(*label_map.unique(return_counts=True), strict=True):
        print(f"{model.config.id2label[int(class_id)]}: {int(count) / label_map.numel():.0%} of the image")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
