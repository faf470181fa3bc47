"""`faim2f quantize`: quantizes an ONNX folder to int8; writes the new folder atomically.

Static quantization with ONNX Runtime's quantizer: QuantizeLinear and DequantizeLinear nodes (QDQ) around layers with
weights. Weights are int8 with one scale per output channel, activations 8 bits in a range calibrated on the user's
images. The change in the outputs is measured on held-out images; layers that change them too much stay in float.

Operations without weights stay in float: post-processing, and matrix products of two activations. Quantizing attention
and mask products made the error 1.3 times as large on the shipped model and 2.5 times on fai-mf-m-ade, and saved no
time.
"""

import heapq
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ExportError
from ..files import check_new_folder, new_folder, sha256_of
from ..hub.check import QUANTIZATION
from ..model.remote_code_faim2f import copy_remote_code
from ..version import __version__
from .calibration import Calibration, activation_ranges, choose_images, open_session
from .graph import quietly
from .graph_file import (
    LAYERS,
    cut_at,
    layers_with_weights,
    logits_of,
    name_nodes,
    read_graph,
    read_settings,
)
from .onnx import export_onnx

RUNTIMES = ("onnxruntime", "tensorrt")
# Node types that only quantized graphs have.
QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
             "ConvInteger", "MatMulInteger"}  # fmt: skip
IMAGES = 64
# Maximum number of held-out images, whose inputs and outputs are kept in memory, and how many batches of them a search
# uses.
MOST_HELD_OUT, IN_A_SEARCH = 16, 4
# At an error of 0.011, the shipped model loses nothing measurable on 300 scenes; at 0.023 it loses 1.3 points of mIoU
# and 0.8 of AP, at 0.044 4.9 and 2.8. On 16 images, the error varies by 0.003.
MAX_ERROR = 0.015
# After this many trials, groups of layers stay in float without a search for the single layer that causes the error.
MOST_TRIALS = 64
# Measured `_confidence`: 0.91 and 0.98 with trained weights, 0.07 to 0.74 with random ones.
TRAINED = 0.8
MOST_TOLD = 10


@dataclass(frozen=True)
class Scheme:
    """The quantization scheme of a runtime.

    Args:
        activations: description of the activations' type, for the report.
        unsigned: quantize activations to uint8 with a zero point instead of int8 around 0, and weights to 7 bits.
        outputs: quantize the outputs of layers as well as their inputs.
    """

    activations: str
    unsigned: bool
    outputs: bool


SCHEMES = {
    # With signed activations, ONNX Runtime's int8 is slower than its float32 on x86 (benchmarks/quantization.py). With
    # a zero point, non-negative activations use the full range. x86 CPUs without VNNI sum pairs of products in 16 bits,
    # which silently saturates with 8-bit weights: in the digits model it costs 11 points of mIoU.
    "onnxruntime": Scheme("uint8 with a zero point", True, True),
    # TensorRT only supports zero points of 0, and fuses a layer with the next operation if its output is float.
    "tensorrt": Scheme("int8 around 0", False, False),
}


@dataclass
class Group:
    """A group of layers that stay in float, and the error if only they were in int8."""

    nodes: list[str]
    error: float


@dataclass
class Choice:
    """The layers in int8, and the groups that stay in float."""

    quantized: list[str]
    whole_error: float
    left_out: list[Group] = field(default_factory=list)
    trials: int = 1


@dataclass(frozen=True)
class Change:
    """How int8 changes the outputs for an image.

    A query's scored mask is its mask probabilities times the probability of its best class in float. All outputs are
    computed from these.

    Args:
        intersection, union: the minimum and the maximum of the scored masks in float and in int8, summed over all
            queries and pixels.
        pixels: fraction of label map pixels, at the masks' size, whose class changes; 0 to 1.
    """

    intersection: float
    union: float
    pixels: float


def error_of(changes: Sequence[Change]) -> float:
    """1 minus the intersection over union of the scored masks, accumulated over all images; 0 to 1."""
    union = sum(change.union for change in changes)
    return 1 - sum(change.intersection for change in changes) / union if union else 0.0


def quantize(
    source: str | Path,
    out_dir: str | Path,
    images: str | Path,
    runtime: str = "onnxruntime",
    most_images: int = IMAGES,
    max_error: float = MAX_ERROR,
) -> list[str]:
    """Writes `out_dir` with `model.onnx`, the report `quantization.json`, the configuration and the image processor.

    Args:
        source: a folder written by `export_onnx` in float32, or a model's name (see `zoo.resolve`): it is exported
            first, with logits as outputs.
        out_dir: a folder that does not exist yet.
        images: a folder of images similar to those in deployment; no labels are needed. They are prepared by the image
            processor in `source`, one batch at a time.
        runtime: the runtime to quantize for, one of `RUNTIMES`; the graph may be slow in another.
        most_images: maximum number of images; a few dozen suffice. About a quarter of them, at most 16, are held out.
        max_error: layers are left in float until the error (`error_of`) on the held-out images is at most this.

    Returns:
        What was done and measured, one sentence per line.

    Raises:
        ExportError, OSError: quantizing failed, or the result cannot be written; nothing is left behind.
    """
    source, out_dir, images = Path(source), Path(out_dir), Path(images)
    _check_request(out_dir, runtime, most_images, max_error)
    path = source / "model.onnx"
    if not source.exists():
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as between:
            graph = Path(between) / "onnx"
            lines = export_onnx(source, graph)
            return [*lines, *quantize(graph, out_dir, images, runtime, most_images, max_error)]
    if not path.is_file():
        raise ExportError(f"{source} has no model.onnx: name a folder that `faim2f export onnx` wrote.")
    model, kind = read_graph(path)
    _check_precision(model, path)
    _, processor = read_settings(source)
    name_nodes(model)
    layers = layers_with_weights(model)
    ends = logits_of(model, kind, layers, path)
    calibration = choose_images(images, processor, model.graph.input[0], most_images, MOST_HELD_OUT)
    with new_folder(out_dir) as staging:
        network = cut_at(model, ends)
        trials = Trials(network, SCHEMES[runtime], calibration, processor.to_dict()["cls_sigmoid"])
        sure = [_confidence(classes, trials.sigmoid) for batch in trials.expected for classes, _ in batch]
        choice = _choose(trials, layers, max_error, sum(sure) / len(sure))
        changes = trials.changes(choice.quantized)
        _save(trials.quantized(model, choice.quantized), staging / "model.onnx", calibration)
        described = _describe(path, staging / "model.onnx", runtime, calibration, choice, changes, max_error)
        (staging / QUANTIZATION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copyfile(source / name, staging / name)
        copy_remote_code(staging)
    return _lines(described, calibration)


def _check_request(out_dir: Path, runtime: str, most_images: int, max_error: float) -> None:
    if runtime not in RUNTIMES:
        raise ExportError(f"the runtime must be one of {', '.join(RUNTIMES)}, not {runtime!r}.")
    if most_images < 1:
        raise ExportError(f"the number of images must be at least 1, not {most_images}.")
    if not 0 < max_error <= 1:
        raise ExportError(f"the largest error must be above 0 and at most 1, not {max_error}.")
    check_new_folder(out_dir, ExportError)
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"quantizing needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'hf-faim2f[onnx]'."
        )


def _check_precision(model: Any, path: Path) -> None:
    from .precision import precision_of

    if any(node.op_type in QUANTIZED for node in model.graph.node):
        raise ExportError(f"{path} is quantized already: name the float32 graph that it was made of.")
    precision = precision_of(model)
    if precision != "fp32":
        raise ExportError(f"{path} is in {precision}, and int8 is made of fp32: export the model in that.")


class Trials:
    """Compares the network in float with versions that have some layers in int8, on the held-out images.

    Args:
        network: the graph up to its logits.
        scheme: the quantization scheme.
        calibration: the images, on which the ranges of activations are also measured.
        sigmoid: class probabilities are sigmoids instead of a softmax.
    """

    def __init__(self, network: Any, scheme: Scheme, calibration: Calibration, sigmoid: bool) -> None:
        self.network, self.scheme, self.sigmoid = network, scheme, sigmoid
        self.name: str = network.graph.input[0].name
        self.held_out, session = calibration.held_out, open_session(network)
        self.expected = [self._answer(session, batch) for batch in self.held_out]
        del self.expected[-1][(len(calibration.held_out_paths) - 1) % calibration.batch + 1 :]  # copies, see `_batches`
        # With NaN in the outputs, no layer could be chosen by its error.
        if not all(part.isfinite().all() for batch in self.expected for answer in batch for part in answer):
            raise ExportError(
                "the graph answers these images with values that are not finite: export the weights of an earlier "
                "checkpoint, in fp32."
            )
        self.ranges = activation_ranges(network, calibration)

    def quantized(self, model: Any, nodes: Sequence[str]) -> Any:
        """Returns a copy of a graph with these layers in int8."""
        from onnxruntime.quantization import QDQQuantizer, QuantType

        unsigned = self.scheme.unsigned
        options = {
            "ActivationSymmetric": not unsigned,
            "WeightSymmetric": True,
            "QuantizeBias": False,  # TensorRT cannot read biases quantized to 32 bits
            "OpTypesToExcludeOutputQuantization": [] if self.scheme.outputs else list(LAYERS),
        }
        kind = QuantType.QUInt8 if unsigned else QuantType.QInt8
        with quietly():
            quantizer = QDQQuantizer(
                model, True, unsigned, QuantType.QInt8, kind, self.ranges, list(nodes), [], list(LAYERS), options
            )
            quantizer.quantize_model()
        quantizer.model.topological_sort()
        made = quantizer.model.model
        # Drops the quantizer's own metadata.
        kept = [entry for entry in made.metadata_props if not entry.key.startswith("onnx.")]
        kept = [(entry.key, entry.value) for entry in kept]
        del made.metadata_props[:]
        for key, value in kept:
            made.metadata_props.add(key=key, value="int8" if key == "faim2f.precision" else value)
        return made

    def changes(self, nodes: Sequence[str], count: int | None = None) -> list[Change]:
        """The change for each image in the first `count` held-out batches, or all, with these layers in int8."""
        session = open_session(self.quantized(self.network, nodes), is_quantized=True)
        found: list[Change] = []
        for batch, expected in zip(self.held_out[:count], self.expected, strict=False):
            found += [_change(*pair) for pair in zip(expected, self._answer(session, batch), strict=False)]
        return found

    def error(self, nodes: Sequence[str], count: int | None = None) -> float:
        """The error on the first `count` batches, or on all; 0 if no layers are given."""
        return error_of(self.changes(nodes, count)) if nodes else 0.0

    def _answer(self, session: Any, batch: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """Class probabilities (Q, C) and mask probabilities (Q, h * w) of each image."""
        classes, masks = (torch.from_numpy(values) for values in session.run(None, {self.name: batch}))
        probabilities = classes.sigmoid() if self.sigmoid else classes.softmax(-1)
        return list(zip(probabilities[..., :-1], masks.flatten(2).sigmoid(), strict=True))


def _change(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> Change:
    scores, best = expected[0].max(-1)  # (Q,)
    ours = scores[:, None] * expected[1]  # (Q, h * w)
    theirs = found[0].gather(-1, best[:, None]) * found[1]
    if not theirs.isfinite().all():
        return Change(0.0, float(ours.sum(dtype=torch.float64)), 1.0)
    sums = (torch.minimum(ours, theirs), torch.maximum(ours, theirs))
    maps = [(classes.T @ masks).argmax(0) for classes, masks in (expected, found)]  # (h * w,)
    pixels = float((maps[0] != maps[1]).double().mean())
    return Change(float(sums[0].sum(dtype=torch.float64)), float(sums[1].sum(dtype=torch.float64)), pixels)


def _confidence(classes: Tensor, sigmoid: bool) -> float:
    """The mean over queries of the largest class probability, including "no object"; 0 to 1.

    Args:
        classes: class probabilities without "no object", (Q, C).
        sigmoid: each class has a probability and its opposite, instead of one softmax.
    """
    opposite = 1 - (classes if sigmoid else classes.sum(-1))
    return float(torch.maximum(classes if sigmoid else classes.max(-1).values, opposite).mean())


def _choose(trials: "Trials", layers: Sequence[str], max_error: float, confidence: float = 1.0) -> Choice:
    """Chooses the layers to quantize: all, or, if the error is too large, all except those with the largest effect.

    Repeatedly halves the group of layers with the largest error down to a single layer, which stays in float, until the
    error of the remaining layers is small enough. If none can be quantized, the error says whether the `confidence` in
    float is that of untrained weights.
    """
    whole = trials.error(layers)
    choice = Choice(list(layers), whole)
    groups = [(-whole, 0, list(layers))]  # the position orders groups of equal error
    bar = tqdm(unit="trial", desc="search", disable=None if whole > max_error else True)
    error = whole
    while error > max_error:
        worst, place, nodes = heapq.heappop(groups)
        if len(nodes) > 1 and choice.trials < MOST_TRIALS:
            middle = len(nodes) // 2
            for half, start in ((nodes[:middle], place), (nodes[middle:], place + middle)):
                heapq.heappush(groups, (-trials.error(half, IN_A_SEARCH), start, half))
                choice.trials += 1
                bar.update()
            continue
        choice.left_out.append(Group(nodes, -worst))
        choice.quantized = [name for name in choice.quantized if name not in nodes]
        error = trials.error(choice.quantized)
        choice.trials += 1
        bar.update()
    bar.close()
    if not choice.quantized:
        advice = "allow more (--max-error), or keep the float graph."
        if confidence < TRAINED:
            advice = (
                f"in float, queries give their best class a probability of {confidence:.2f} on average, as untrained "
                "(random) weights do, whose answers any rounding changes: quantize trained weights."
            )
        wanted = f"no layer can be in int8 and change the answers by at most {max_error}"
        raise ExportError(f"{wanted}: all of them change {whole:.3f}; {advice}")
    return choice


def _save(model: Any, path: Path, calibration: Calibration) -> None:
    """Saves a single file, then opens and runs it once."""
    import onnx

    onnx.save(model, path)
    session = open_session(onnx.load(path), is_quantized=True)
    session.run(None, {session.get_inputs()[0].name: calibration.held_out[0]})


def _describe(
    path: Path,
    made: Path,
    runtime: str,
    calibration: Calibration,
    choice: Choice,
    changes: Sequence[Change],
    max_error: float,
) -> dict[str, Any]:
    import onnx
    import onnxruntime

    return {
        "for": runtime,
        "weights": f"int8 around 0{' (7 bits)' if SCHEMES[runtime].unsigned else ''}, by output channel",
        "activations": SCHEMES[runtime].activations,
        "images": {
            "calibration": calibration.names(calibration.paths),
            "held_out": calibration.names(calibration.held_out_paths),
            "skipped": calibration.skipped,
        },
        "error": {
            "what": "1 less the intersection over union of scored masks in float and in int8, of all held-out images",
            "allowed": max_error,
            "measured": error_of(changes),
            "worst_image": max(error_of([change]) for change in changes),
            "with_every_layer_in_int8": choice.whole_error,
            "label_map_pixels_that_differ": float(np.mean([change.pixels for change in changes])),
        },
        "quantized": choice.quantized,
        "left_in_float": [
            {"nodes": group.nodes, "error_if_they_alone_were_in_int8": group.error} for group in choice.left_out
        ],
        "trials": choice.trials,
        "source": _file(path),
        "graph": _file(made),
        "versions": {
            "hf_faim2f": __version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _file(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def _lines(described: dict[str, Any], calibration: Calibration) -> list[str]:
    error, held_out = described["error"], len(calibration.held_out_paths)
    own = "held out" if calibration.held_out_paths != calibration.paths else "the same one, because there is no other"
    own += "" if held_out >= MOST_HELD_OUT // 2 else f"; too few to rely on: use {IMAGES}"
    lines = [
        f"calibrated on {len(calibration.paths)} {'image' if len(calibration.paths) == 1 else 'images'}; "
        f"error measured on {held_out} {'image' if held_out == 1 else 'images'} ({own})"
    ]
    lines += [f"left out: {problem}" for problem in calibration.skipped]
    left = [(name, group) for group in described["left_in_float"] for name in group["nodes"]]
    lines.append(
        f"{len(described['quantized'])} of {len(described['quantized']) + len(left)} layers with weights are in int8, "
        f"for {described['for']}"
    )
    for name, group in left[:MOST_TOLD]:
        lines.append(
            f"left in float: {name} (in int8, {'it' if len(group['nodes']) == 1 else 'its group'} alone changes "
            f"{group['error_if_they_alone_were_in_int8']:.3f})"
        )
    if len(left) > MOST_TOLD:
        lines.append(f"and {len(left) - MOST_TOLD} more, listed in {QUANTIZATION}")
    if left:
        lines.append(f"with every layer in int8 the error would be {error['with_every_layer_in_int8']:.3f}")
    lines.append(
        f"int8 has an error of {error['measured']:.3f} on scored masks (limit {error['allowed']}; worst image "
        f"{error['worst_image']:.3f}); {100 * error['label_map_pixels_that_differ']:.1f} % of label map pixels change"
    )
    lines.append(
        f"model.onnx has {described['graph']['bytes'] / 1e6:.1f} MB, the float graph "
        f"{described['source']['bytes'] / 1e6:.1f} MB; {QUANTIZATION} has the full report"
    )
    return lines


__all__ = ["IMAGES", "MAX_ERROR", "QUANTIZATION", "RUNTIMES", "quantize"]
