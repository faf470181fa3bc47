"""Verifies an exported graph: compares the file, run by its runtime, with the model in torch.

No fixed tolerance separates a wrong graph from rounding: where a mask logit is almost 0, rounding decides whether a
query attends to a pixel, and that query's outputs may change by several percent. Therefore the model is also run in
float64, as the reference, and in the graph's precision, whose error measures the effect of rounding on this input. The
graph's error may be a small multiple of that. Rounding affects different entries on each input; a wrong graph is wrong
in the same entries on all of them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExportError, first_line
from ..masks import box_of
from ..model.focoos_post_processing_faim2f import Detection
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from .graph import FaiM2FGraph

# The graph's error may be this many times torch's. They sum in different orders; on the published models their errors
# agree within a factor of 2.
MULTIPLE = 5
# Differences below this fraction of the largest value are ignored.
FLOORS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}
# Differences above this fraction are errors, regardless of torch's.
MOST = 0.25
# The quantiles of differences that are compared. The few entries above them may have changed by rounding.
LEVELS = (0.5, 0.9)
# A pixel may have another label if its score differs from the best one by at most this fraction of the largest score:
# a tie.
TIE = 1e-4
# Pixels of a label map or mask that may be on the wrong side of a threshold: this number plus this fraction.
PIXELS, SHARE_OF_PIXELS = 2, 1e-4
# Maximum number of random inputs to try.
TRIES = 6
SIZES = ((2, (130, 166)), (1, (97, 64)))  # batch size and (height, width), if the graph does not fix them


class Comparison:
    """Differences between outputs and those of the model in float64.

    Args:
        floor: differences below this are ignored.
    """

    def __init__(self, floor: float = FLOORS["fp32"]) -> None:
        self.floor = floor
        self.error = 0.0  # the largest difference, as a fraction of the largest value
        self.pixels = 0  # number of compared pixels
        self.differing = 0  # how many of them differ, including ties
        self.unexplained = 0  # how many differ in label maps, excluding ties
        self._distances: dict[str, list[np.ndarray]] = {}
        self._floors: dict[str, float] = {}

    def numbers(self, name: str, ours: np.ndarray, theirs: Tensor) -> None:
        """Compares numbers of shape (B, N, ...): the largest difference of each of the B * N entries.

        Raises:
            ExportError: the shapes differ, or the model's own numbers are not finite.
        """
        if ours.shape != tuple(theirs.shape):
            raise ExportError(f"the exported graph gives {ours.shape} where the model gives {tuple(theirs.shape)}.")
        largest = max(float(theirs.abs().max()) if theirs.numel() else 0.0, 1e-12)
        if not np.isfinite(largest):
            raise ExportError(f"the model's own {name} are not finite, in float64 too.")
        errors = np.abs(ours.astype(np.float64) - theirs.double().numpy()) / largest
        self.note(name, errors.reshape(*ours.shape[:2], -1).max(-1).ravel(), self.floor)
        self.error = max(self.error, float(self._distances[name][-1].max(initial=0)))

    def label_map(self, ours: Tensor, sums: Tensor, tolerance: float = TIE) -> None:
        """Compares a label map (H, W) with class scores (C, H, W): each pixel must have the best class, or a tie."""
        best, labels = sums.max(0)
        chosen = sums.gather(0, ours.long()[None])[0]
        unexplained = int((best - chosen > tolerance * best.max()).sum())
        self.pixels += ours.numel()
        self.differing += int((ours != labels).sum())
        self.unexplained += unexplained
        self.note("segmentation", np.array([unexplained / ours.numel()]), _floor_of_pixels(ours.numel()))

    def mask(self, pixels: int, differing: int) -> None:
        """Adds a mask with `pixels` pixels, of which `differing` differ from the model's."""
        self.pixels += pixels
        self.differing += differing
        self.note("masks", np.array([differing / pixels]), _floor_of_pixels(pixels))

    def note(self, name: str, distances: np.ndarray, floor: float) -> None:
        """Adds differences of one kind. All comparisons must add them in the same order."""
        self._distances.setdefault(name, []).append(np.where(np.isfinite(distances), distances, np.inf))
        self._floors[name] = floor

    def is_finite(self) -> bool:
        """Whether all differences so far are finite."""
        return all(np.isfinite(values).all() for found in self._distances.values() for values in found)

    def agrees(self, rounding: "Comparison") -> bool:
        """Whether rounding explains the typical differences; `rounding` is torch's comparison on the same input."""
        return all(
            np.quantile(ours, level, method="lower")
            <= min(MOST, max(self._floors[name], MULTIPLE * np.quantile(theirs, level, method="higher")))
            for name, ours, theirs in self._pairs(rounding)
            for level in LEVELS
        )

    def moved(self, rounding: "Comparison") -> dict[str, np.ndarray]:
        """The entries, by kind, whose difference exceeds torch's for the entry and its typical one on this input."""
        return {
            name: ours > np.clip(MULTIPLE * np.maximum(theirs, np.median(theirs)), self._floors[name], MOST)
            for name, ours, theirs in self._pairs(rounding)
        }

    def _pairs(self, rounding: "Comparison") -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, found in self._distances.items():
            ours, theirs = np.concatenate(found), np.concatenate(rounding._distances[name])
            if len(ours):
                yield name, ours, theirs


def _floor_of_pixels(pixels: int) -> float:
    return PIXELS / pixels + SHARE_OF_PIXELS


class _Torch:
    """The model in float64 and in the precision of the graph."""

    def __init__(self, model: FaiM2FForUniversalSegmentation, precision: str) -> None:
        self.exact = copy.deepcopy(model).double()
        self.rounded = copy.deepcopy(model).float()
        if precision == "fp16":
            # Like ONNX Runtime on a CPU, which has few half-precision operations and computes the others in float32.
            self.rounded.half().float()
            for module in self.rounded.modules():
                if not any(module.children()):
                    module.register_forward_hook(_round_to_half)
        elif precision == "bf16":
            self.rounded.bfloat16()

    @torch.no_grad()
    def run(self, pixel_values: Tensor) -> tuple[Any, Any]:
        """The outputs of both models for `pixel_values` (B, 3, H, W), float32."""
        rounded = self.rounded(pixel_values.to(self.rounded.dtype))
        for name in ("class_queries_logits", "masks_queries_logits"):
            rounded[name] = rounded[name].float()
        return self.exact(pixel_values.double()), rounded


def _round_to_half(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output.half().float() if isinstance(output, Tensor) and output.dtype == torch.float32 else output


@dataclass(frozen=True)
class Exported:
    """An exported file that is open in its runtime.

    Args:
        runtime: its name, for messages.
        run: from the input (B, 3, H, W) to the outputs by name.
    """

    runtime: str
    run: Callable[[Tensor], dict[str, np.ndarray]]


def open_graph(path: Path) -> Exported:
    """An ONNX file in ONNX Runtime, on the CPU.

    Raises:
        ExportError: ONNX Runtime cannot open it; calling the result: or cannot run it.
    """
    import onnxruntime

    def refusal(verb: str, error: Exception) -> ExportError:
        return ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot {verb} the exported graph ({first_line(error)}), and "
            "nothing was kept: please report it with the model's config.json."
        )

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of ONNX Runtime's own classes
        raise refusal("open", error) from error
    names, entry = [output.name for output in session.get_outputs()], session.get_inputs()[0].name

    def run(inputs: Tensor) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, {entry: inputs.numpy()}), strict=True))
        except Exception as error:
            raise refusal("run", error) from error

    return Exported("onnxruntime", run)


def check(
    exported: Path | Exported,
    graph: FaiM2FGraph,
    model: FaiM2FForUniversalSegmentation,
    processor: FaiM2FImageProcessor,
) -> list[str]:
    """Runs the file on random inputs of several shapes and compares the outputs with `model` in float64.

    One input suffices if rounding explains the differences. Otherwise up to `TRIES` inputs are tried, until rounding
    explains the differences on one of them and every entry was correct on at least one input.

    Args:
        exported: an ONNX file, or a file that is open in its runtime.
        graph: the module that was exported.
        model, processor: the model and the image processor that it was exported from.

    Returns:
        What was verified, one sentence per line.

    Raises:
        ExportError: the outputs of the file and the model differ.
    """
    if isinstance(exported, Path):
        exported = open_graph(exported)
    networks = _Torch(model, graph.precision)
    lines = []
    shapes: list[tuple[int, ...]] = []
    for batch, size in SIZES:
        shape = tuple(graph.sample(batch, size)[graph.input_name].shape)
        if shape in shapes:
            continue
        shapes.append(shape)
        lines.append(_check_shape(exported, networks, graph, processor, batch, size))
    return lines


def _check_shape(
    exported: Exported,
    networks: _Torch,
    graph: FaiM2FGraph,
    processor: FaiM2FImageProcessor,
    batch: int,
    size: tuple[int, int],
) -> str:
    errors: list[float] = []
    agreed = False
    always: dict[str, np.ndarray] = {}  # entries that were wrong on all inputs so far
    for seed in range(TRIES):
        inputs = graph.sample(batch, size, seed)
        found, rounding = _run(exported, inputs, graph, networks, processor)
        errors.append(found.error)
        moved = found.moved(rounding)
        always = {name: moved[name] & always.get(name, True) for name in moved}
        agreed = agreed or found.agrees(rounding)
        if agreed and all(entries.mean() <= SHARE_OF_PIXELS for entries in always.values()):
            return _line(exported, found, rounding, inputs, errors, graph)
    line = _line(exported, found, rounding, inputs, errors, graph)
    raise ExportError(
        f"the exported graph does not agree with the model ({line}), and nothing was kept: please report it "
        "with the model's config.json, or pass --no-check to keep it."
    )


def _line(
    exported: Exported,
    found: Comparison,
    rounding: Comparison,
    inputs: dict[str, Tensor],
    errors: list[float],
    graph: FaiM2FGraph,
) -> str:
    what = {"logits": "logit", "semantic": "sum"}.get(graph.outputs, "score")
    shape = "x".join(map(str, inputs[graph.input_name].shape))
    line = f"{graph.precision} in {exported.runtime} against float64 in torch on {shape}: largest error "
    line += f"{found.error:.1e} of the largest {what}, where torch in {graph.precision} has {rounding.error:.1e}, "
    if graph.outputs in ("logits", "semantic"):
        line += f"label map differs in {found.differing} of {found.pixels} pixels ({found.unexplained} without a tie)"
    else:
        line += f"masks differ in {found.differing} of {found.pixels} pixels"
    line += f", that of torch in {rounding.differing}"
    if len(errors) > 1:
        before = ", ".join(f"{error:.1e}" for error in errors[:-1])
        line += f"; earlier inputs gave {before}, where rounding may have changed what a query attends to"
    return line


def _run(
    exported: Exported,
    inputs: dict[str, Tensor],
    graph: FaiM2FGraph,
    networks: _Torch,
    processor: FaiM2FImageProcessor,
) -> tuple[Comparison, Comparison]:
    """Compares the file, and torch in the file's precision, with torch in float64."""
    tensor = inputs[graph.input_name]
    try:
        answers = exported.run(tensor)
    except Exception as error:  # of the runtime's own classes, for example for a shape that the exporter made constant
        raise ExportError(
            f"the exported graph does not run on {'x'.join(map(str, tensor.shape))} "
            f"({' '.join(str(error).split()).rstrip('.')}), and nothing was kept: please report it with the model's "
            "config.json, or name a --size."
        ) from None
    if graph.outputs == "instances":
        bounds = [[box_of(mask) for mask in masks] for masks in answers["masks"]]
        if not np.array_equal(answers["boxes"], bounds):
            raise ExportError("the exported graph does not agree with the model: its boxes are not of its masks.")
    exact, rounded = networks.run(graph.normalize(tensor) if graph.input_name == "image" else tensor)
    size = (tensor.shape[2], tensor.shape[3])
    theirs = _expected(exact, size, graph, processor)
    found, rounding = (Comparison(FLOORS[graph.precision]) for _ in range(2))
    _compare(rounding, _as_graph(rounded, size, graph, processor), theirs, size, graph, processor)
    if not rounding.is_finite():
        raise ExportError(
            f"the model itself gives infinite or NaN values in {graph.precision}, whose range it exceeds: export it "
            + ("in fp32." if graph.precision != "fp32" else "with weights of a trained model.")
        )
    _compare(found, answers, theirs, size, graph, processor)
    return found, rounding


def _expected(outputs: Any, size: tuple[int, int], graph: FaiM2FGraph, processor: FaiM2FImageProcessor) -> Any:
    """The reference results: logits and class scores, queries or detections, by `graph.outputs`."""
    sizes = [size] * len(outputs.masks_queries_logits)
    if graph.outputs in ("logits", "semantic"):
        maps = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        return outputs, [found.segmentation_scores for found in maps]
    if graph.outputs == "queries":
        return processor.post_process_queries(outputs, sizes, size)
    # All queries too, because rounding may decide which are the best K.
    found = [
        processor.post_process_detections(outputs, sizes, size, threshold=0.0, top_k=top_k)
        for top_k in (graph.config.num_queries, graph.top_k)
    ]
    return list(zip(*found, strict=True))


def _as_graph(
    outputs: Any, size: tuple[int, int], graph: FaiM2FGraph, processor: FaiM2FImageProcessor
) -> dict[str, np.ndarray]:
    """The outputs that the graph should return, computed from logits by the image processor."""
    sizes = [size] * len(outputs.masks_queries_logits)
    if graph.outputs == "logits":
        return {name: outputs[name].numpy() for name in ("class_queries_logits", "masks_queries_logits")}
    if graph.outputs == "semantic":
        maps = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        scores = [found.segmentation_scores.gather(0, found.segmentation[None])[0] for found in maps]
        return {
            "segmentation": torch.stack([found.segmentation for found in maps]).numpy(),
            "segmentation_scores": torch.stack(scores).numpy(),
        }
    if graph.outputs == "queries":
        queries = processor.post_process_queries(outputs, sizes, size)
        return {
            name: torch.stack([getattr(query, name) for query in queries]).numpy()
            for name in ("class_ids", "scores", "masks")
        }
    shape = (len(sizes), graph.top_k)
    answers = {
        "class_ids": np.zeros(shape, np.int64),
        "scores": np.zeros(shape, np.float32),
        "masks": np.zeros((*shape, *size), np.uint8),
    }
    detected = processor.post_process_detections(outputs, sizes, size, threshold=0.0, top_k=graph.top_k)
    for i, detections in enumerate(detected):
        for k, detection in enumerate(sorted(detections, key=lambda detection: -detection.score)):
            answers["class_ids"][i, k], answers["scores"][i, k] = detection.class_id, detection.score
            answers["masks"][i, k] = _whole(detection, size).numpy()
    return answers


def _compare(
    found: Comparison,
    ours: dict[str, np.ndarray],
    theirs: Any,
    size: tuple[int, int],
    graph: FaiM2FGraph,
    processor: FaiM2FImageProcessor,
) -> None:
    if graph.outputs in ("logits", "semantic"):
        outputs, sums = theirs
        _semantic(found, ours, outputs, sums, size, processor)
    elif graph.outputs == "queries":
        found.numbers("scores", ours["scores"], torch.stack([query.scores for query in theirs]))
        for i, query in enumerate(theirs):
            found.note("class_ids", (ours["class_ids"][i] != query.class_ids.numpy()).astype(np.float64), 0.0)
            for mask, expected in zip(torch.from_numpy(ours["masks"][i]).bool(), query.masks, strict=True):
                found.mask(mask.numel(), int((mask != expected).sum()))
    else:
        best = np.zeros(ours["scores"].shape)
        for i, (detections, chosen) in enumerate(theirs):
            _instances(found, {name: values[i] for name, values in ours.items()}, detections, size)
            best[i, : len(chosen)] = sorted(-detection.score for detection in chosen)
        found.numbers("best scores", -np.sort(-ours["scores"]), torch.from_numpy(-best))


def _semantic(
    found: Comparison,
    ours: dict[str, np.ndarray],
    outputs: Any,
    sums: Sequence[Tensor],
    size: tuple[int, int],
    processor: FaiM2FImageProcessor,
) -> None:
    if "segmentation" in ours:
        maps = list(torch.from_numpy(ours["segmentation"]))
        scores = ours["segmentation_scores"]
        expected = torch.stack([image.amax(0) for image in sums])
        if scores.shape != tuple(expected.shape):
            raise ExportError(f"the exported graph gives {scores.shape} where the model gives {tuple(expected.shape)}.")
        found.numbers(
            "segmentation_scores", scores.reshape(len(scores), -1), expected.flatten(1)
        )  # one entry per pixel
    else:
        for name, values in ours.items():
            found.numbers(name, values, outputs[name])
        logits = {name: torch.from_numpy(values) for name, values in ours.items()}
        maps = processor.post_process_semantic_segmentation(logits, [size] * len(sums))
    for label_map, image in zip(maps, sums, strict=True):
        found.label_map(label_map, image)


def _instances(found: Comparison, ours: dict[str, np.ndarray], theirs: list[Detection], size: tuple[int, int]) -> None:
    """Compares each instance with the most similar mask among detections of its class and about its score."""
    scores = np.zeros(len(ours["scores"]))
    for k, (class_id, score, mask) in enumerate(zip(ours["class_ids"], ours["scores"], ours["masks"], strict=True)):
        if score == 0:  # filtered
            found.mask(mask.size, 0)
            continue
        alike = [detection for detection in theirs if detection.class_id == class_id]
        scores[k] = min((abs(detection.score - score) for detection in alike), default=1.0)
        pixels, differing = torch.from_numpy(mask).bool(), [mask.size]
        for detection in alike:
            if abs(detection.score - score) <= scores[k] + 1e-4:
                differing.append(int((_whole(detection, size) != pixels).sum()))
        found.mask(mask.size, min(differing))
    found.note("scores", scores, found.floor)
    found.error = max(found.error, float(scores.max(initial=0)))


def _whole(detection: Detection, size: tuple[int, int]) -> Tensor:
    """The mask of a detection at the image's size (H, W), bool."""
    whole = torch.zeros(size, dtype=torch.bool)
    x_min, y_min, x_max, y_max = detection.box
    whole[y_min : y_max + 1, x_min : x_max + 1] = detection.mask
    return whole


__all__ = ["Exported", "check", "open_graph"]
