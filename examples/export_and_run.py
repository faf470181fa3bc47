"""Exports a model to ONNX, runs the graph on an image, and builds a TensorRT engine from the same graph.

    python examples/export_and_run.py IMAGE OUT_FOLDER [MODEL [GPU]]

MODEL is a folder or Hub id (default: `examples/digits`). GPU is the type of GPU that the engine is built for, which
need not be in this machine: sm75, sm80, sm86 (default), sm89 or sm120. Needs the extras `onnx` and `tensorrt-rtx`.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.export.tensorrt import export_tensorrt
from hf_faim2f.model.image_loading_faim2f import open_image
from hf_faim2f.runtime import Predictor

SIZE = (256, 256)  # (height, width) of the graph's input


def main(
    image_file: str, out_folder: str, model_name: str = str(Path(__file__).parent / "digits"), gpu: str = "sm86"
) -> None:
    """Writes OUT_FOLDER/onnx, OUT_FOLDER/engine and OUT_FOLDER/overlay.png."""
    if not Path(image_file).is_file():
        sys.exit(f"{image_file} is not a file: name an image.")
    out = Path(out_folder)
    out.mkdir(parents=True, exist_ok=True)
    for line in export_onnx(model_name, out / "onnx", outputs="instances", input_name="image", size=SIZE, batch=1):
        print(line)

    # The graph alone, as any program could run it: bytes in, instances out.
    session = onnxruntime.InferenceSession(str(out / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    upright = ImageOps.exif_transpose(open_image(image_file, image_file))
    resized = upright.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR)
    batch = np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))[None]
    names = [output.name for output in session.get_outputs()]
    answer = dict(zip(names, session.run(None, {"image": batch}), strict=True))
    print(", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in answer.items()))

    # The same graph in the package's predictor, which also resizes, thresholds and draws.
    prediction = Predictor.from_pretrained(out / "onnx", runtime="onnxruntime")(image_file)[0]
    for segment in prediction.segments:
        print(f"{segment.label}: {segment.score:.2f}")
    prediction.draw().save(out / "overlay.png")

    for line in export_tensorrt(out / "onnx", out / "engine", gpu=gpu):
        print(line)
    print(f"On a machine with that GPU: Predictor.from_pretrained({str(out / 'engine')!r}, runtime='tensorrt')")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
