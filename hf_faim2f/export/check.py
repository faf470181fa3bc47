"""Whether an exported graph says what the model says: the file run by onnxruntime against torch and its processor."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..model.post_processing_faim2f import Detection
from .errors import ExportError
from .graph import FaiM2FGraph

# Largest difference from torch in float32, as a share of the largest value. Half precision has 11 bits, and a query
# that looks elsewhere because of them changes more than its rounding: what is allowed it finds a broken graph only.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.25}
# Pixels of label maps that may differ where no tie explains it.
UNEXPLAINED = {"fp32": 0.0, "fp16": 0.2}
# Pixels of masks that may differ, on the wrong side of a threshold that they lie on.
MASK_PIXELS = {"fp32": 1e-3, "fp16": 0.2}
# Where a mask logit is 0 but for rounding, rounding decides whether a query looks there, and torch differs from itself
# by more than the tolerance. Few inputs have such a pixel; a wrong graph is wrong on all.
TRIES = 4
SIZES = ((2, (130, 166)), (1, (97, 64)))  # batch and (height, width) where they are not fixed


class Comparison:
    """The worst of all that was compared."""

    def __init__(self) -> None:
        self.error = 0.0  # of numbers, relative to the largest
        self.pixels = 0  # compared
        self.differing = 0  # of them, with ties
        self.unexplained = 0  # of label maps, without
        self.mask_pixels = 0  # of masks

    def agrees(self, precision: str) -> bool:
        """Whether nothing differs by more than the precision explains."""
        pixels = max(self.pixels, 1)
        return (
            self.error <= TOLERANCES[precision]
            and self.unexplained <= UNEXPLAINED[precision] * pixels
            and self.mask_pixels <= MASK_PIXELS[precision] * pixels
        )

    def numbers(self, ours: np.ndarray, theirs: Tensor) -> None:
        if ours.shape != tuple(theirs.shape):
            raise ExportError(f"the exported graph gives {ours.shape} where the model gives {tuple(theirs.shape)}.")
        error = np.abs(ours.astype(np.float64) - theirs.double().numpy()).max(initial=0)
        error /= max(float(theirs.abs().max()) if theirs.numel() else 0.0, 1e-12)
        self.error = max(self.error, error if np.isfinite(error) else np.inf)

    def label_map(self, ours: Tensor, sums: Tensor, tolerance: float) -> None:
        """A map (H, W) against the sums (C, H, W) of which it should name the largest; near the largest is a tie."""
        best, labels = sums.max(0)
        chosen = sums.gather(0, ours.long()[None])[0]
        self.pixels += ours.numel()
        self.differing += int((ours != labels).sum())
        self.unexplained += int((best - chosen > tolerance * best.max()).sum())

    def mask(self, ours: Tensor, theirs: Tensor) -> None:
        self.nearest_mask(ours.numel(), int((ours != theirs).sum()))

    def nearest_mask(self, pixels: int, differing: int) -> None:
        """A mask of which `differing` pixels are otherwise in the most similar of torch's."""
        self.pixels += pixels
        self.differing += differing
        self.mask_pixels += differing


def check(
    path: Path, graph: FaiM2FGraph, model: FaiM2FForUniversalSegmentation, processor: FaiM2FImageProcessor
) -> list[str]:
    """Runs the file on inputs of every kind that it takes and compares with `model` in float32.

    Returns:
        what was verified, a sentence a line.

    Raises:
        ExportError: the file and the model do not agree.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    lines = []
    shapes: list[tuple[int, ...]] = []
    for batch, size in SIZES:
        shape = tuple(graph.sample(batch, size)[graph.input_name].shape)
        if shape in shapes:
            continue
        shapes.append(shape)
        errors = []
        for seed in range(TRIES):
            found = _run(session, graph.sample(batch, size, seed), graph, model, processor)
            errors.append(found.error)
            if found.agrees(graph.precision):
                break
        else:
            raise ExportError(
                f"the exported graph does not agree with the model ({_line(found, shape, errors, graph)}), and "
                "nothing was kept: please report it with the model's config.json, or pass --no-check to keep it."
            )
        lines.append(_line(found, shape, errors, graph))
    return lines


def _line(found: Comparison, shape: tuple[int, ...], errors: list[float], graph: FaiM2FGraph) -> str:
    what = {"logits": "logit", "semantic": "sum"}.get(graph.outputs, "score")
    line = f"{graph.precision} in onnxruntime against float32 in torch on {'x'.join(map(str, shape))}: largest error "
    line += f"{found.error:.1e} of the largest {what}, "
    if graph.outputs in ("logits", "semantic"):
        line += f"label map equal but for {found.differing} of {found.pixels} pixels ({found.unexplained} no ties)"
    else:
        line += f"masks equal but for {found.differing} of {found.pixels} pixels"
    if len(errors) > 1:
        before = ", ".join(f"{error:.1e}" for error in errors[:-1])
        line += f"; on inputs tried before it {before}, where rounding may have moved what a query looks at"
    return line


def _run(
    session: Any,
    inputs: dict[str, Tensor],
    graph: FaiM2FGraph,
    model: FaiM2FForUniversalSegmentation,
    processor: FaiM2FImageProcessor,
) -> Comparison:
    tensor = inputs[graph.input_name]
    with torch.no_grad():
        outputs = model(graph.normalize(tensor) if graph.input_name == "image" else tensor)
    names = [output.name for output in session.get_outputs()]
    try:
        answers = session.run(names, {graph.input_name: tensor.numpy()})
    except Exception as error:  # of onnxruntime's own kinds: a shape of one image that was written down as any's
        raise ExportError(
            f"the exported graph does not run on {'x'.join(map(str, tensor.shape))} "
            f"({' '.join(str(error).split()).rstrip('.')}), and nothing was kept: please report it with the model's "
            "config.json, or name a --size."
        ) from None
    ours = dict(zip(names, answers, strict=True))
    found = Comparison()
    size = (tensor.shape[2], tensor.shape[3])
    sizes = [size] * len(tensor)
    if graph.outputs in ("logits", "semantic"):
        _semantic(found, ours, outputs, sizes, processor)
    elif graph.outputs == "queries":
        for i, query in enumerate(processor.post_process_queries(outputs, sizes, size)):
            found.numbers(ours["scores"][i], query.scores)
            found.mask(torch.from_numpy(ours["masks"][i]).bool(), query.masks)
    else:
        # All of them: which are the best K may hang on rounding, but each of the K must be among them.
        detections = processor.post_process_detections(
            outputs, sizes, size, threshold=0.0, top_k=graph.config.num_queries
        )
        for i, theirs in enumerate(detections):
            _instances(found, {name: values[i] for name, values in ours.items()}, theirs, size, graph)
    return found


def _semantic(
    found: Comparison,
    ours: dict[str, np.ndarray],
    outputs: Any,
    sizes: list[tuple[int, int]],
    processor: FaiM2FImageProcessor,
) -> None:
    theirs = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    if "segmentation" in ours:
        maps = list(torch.from_numpy(ours["segmentation"]))
        for scores, expected in zip(ours["segmentation_scores"], theirs, strict=True):
            found.numbers(scores, expected.segmentation_scores.amax(0))
    else:
        for name, values in ours.items():
            found.numbers(values, outputs[name])
        logits = {name: torch.from_numpy(values) for name, values in ours.items()}
        maps = processor.post_process_semantic_segmentation(logits, sizes)
    for label_map, expected in zip(maps, theirs, strict=True):
        found.label_map(label_map, expected.segmentation_scores, TOLERANCES["fp32"])


def _instances(
    found: Comparison,
    ours: dict[str, np.ndarray],
    theirs: list[Detection],
    size: tuple[int, int],
    graph: FaiM2FGraph,
) -> None:
    """Every instance against the detection of that class, nearly that score and the most similar mask."""
    if graph.top_k == graph.config.num_queries and graph.filter_empty_masks:
        found.numbers(np.array([(ours["scores"] > 0).sum()]), torch.tensor([len(theirs)]))
    for class_id, score, mask in zip(ours["class_ids"], ours["scores"], ours["masks"], strict=True):
        if score == 0:  # filtered
            continue
        alike = [detection for detection in theirs if detection.class_id == class_id]
        nearest = min((abs(detection.score - score) for detection in alike), default=np.inf)
        found.error = max(found.error, float(nearest))
        pixels, differing = torch.from_numpy(mask).bool(), [mask.size]
        for detection in alike:
            if abs(detection.score - score) <= nearest + 1e-4:
                whole = torch.zeros(size, dtype=torch.bool)
                x_min, y_min, x_max, y_max = detection.box
                whole[y_min : y_max + 1, x_min : x_max + 1] = detection.mask
                differing.append(int((whole != pixels).sum()))
        found.nearest_mask(pixels.numel(), min(differing))


__all__ = ["check"]
