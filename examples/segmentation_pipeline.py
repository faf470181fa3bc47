"""Runs transformers' pipeline on an image and writes the mask of every segment.

    python examples/segmentation_pipeline.py IMAGE OUT_FOLDER [MODEL [SUBTASK]]

MODEL is a folder or Hub id (default: `demo-output/digits`, which `make demo` writes). SUBTASK is semantic, instance or
panoptic (default: instance).
"""

import sys
from pathlib import Path

from transformers import pipeline


def main(
    image_file: str,
    out_folder: str,
    model_name: str = str(Path(__file__).parents[1] / "demo-output" / "digits"),
    subtask: str = "instance",
) -> None:
    """Writes `00-LABEL.png` and so on, in the pipeline's order."""
    if not Path(image_file).is_file():
        sys.exit(f"{image_file} is not a file: name an image.")
    segmenter = pipeline("image-segmentation", model=model_name, trust_remote_code=True)
    out = Path(out_folder)
    out.mkdir(parents=True, exist_ok=True)
    for number, segment in enumerate(segmenter(image_file, subtask=subtask)):
        # A label may contain characters that are not allowed in file names.
        label = "".join(letter if letter.isalnum() else "-" for letter in segment["label"])
        path = out / f"{number:02}-{label}.png"
        segment["mask"].save(path)
        score = "" if segment["score"] is None else f", {segment['score']:.2f}"
        print(f"{path}: {segment['label']}{score}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
