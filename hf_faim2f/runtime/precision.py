"""Chooses the precision of a model on a device: bfloat16 if the device multiplies it natively and it changes little.

bfloat16 has 8 significant bits, float32 has 24. A trained model's predictions usually depend little on the other 16.
Whether they do is measured: the model predicts calibration images in both precisions, and the results are compared.
"""

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..errors import ImageError, PredictorError
from ..model.resize_faim2f import Size
from .prediction import Prediction, Segment

logger = logging.get_logger(__name__)

# Maximum fraction of an image's pixels whose label may change.
MOST_CHANGED = 0.01
# Two segments are the same if they have the same class and at least this intersection over union.
LEAST_OVERLAP = 0.8
# Segments whose score is this close to the threshold may appear or disappear.
SCORE_MARGIN = 0.05
# Number of calibration images in commands.
PICTURES = 8
# Names of the types, and the instructions that multiply them on x86 and on ARM CPUs.
INSTRUCTIONS = {
    "bf16": ("bfloat16", ("amx_bf16", "avx512_bf16"), ("bf16", "sve_bf16")),
    "fp16": ("float16", ("amx_fp16", "avx512_fp16"), ("fp16_arith",)),
}


@dataclass(frozen=True)
class Choice:
    """The chosen precision, a key of the torch runtime's `TYPES`, and the reason, as the rest of a sentence."""

    precision: str
    reason: str

    def __str__(self) -> str:
        return f"{self.precision}: {self.reason}."


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively: AMX or AVX512-BF16, ARM's BF16, or compute capability 8+."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and _has_instructions("bf16")


def _has_instructions(precision: str) -> bool:
    """Whether this CPU has instructions for a precision of `INSTRUCTIONS`, and torch the library that uses them."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = INSTRUCTIONS[precision][2 if platform.machine() in ("arm64", "aarch64") else 1]
    return torch.backends.mkldnn.is_available() and any(capabilities.get(name) is True for name in names)


def warn_if_emulated(precision: str, device: torch.device) -> None:
    """Warns, once, if a CPU has no instructions for 16-bit floats, which then take longer than float32."""
    if precision in INSTRUCTIONS and device.type == "cpu" and not _has_instructions(precision):
        logger.warning_once(
            f"This CPU has no instructions that multiply {INSTRUCTIONS[precision][0]}: precision {precision} takes "
            "several times as long as fp32. Use fp32."
        )


def choose_precision(
    exact: Callable[[Any, str], list[Prediction]],
    rounded: Callable[[Any, str], list[Prediction]],
    images: Iterable[Any],
    own: str,
    threshold: float,
) -> Choice:
    """Compares a model in float32 and in bfloat16 on images.

    bfloat16 is chosen if in each image at most `MOST_CHANGED` of the label map's pixels change, and each segment has
    its own counterpart in the other precision, except segments within `SCORE_MARGIN` of the threshold.

    Args:
        exact, rounded: predict one image for a subtask in float32 and in bfloat16.
        images: calibration images; unreadable ones are skipped.
        own: the model's subtask, whose segments are compared too; for "semantic", only the label map is compared.
        threshold: the lowest score of a segment.
    """
    count, changed, pixels = 0, 0, 0
    for number, image in enumerate(images, 1):
        try:
            for subtask in dict.fromkeys(("semantic", own)):
                (one,), (other,) = exact(image, subtask), rounded(image, subtask)
                if subtask == "semantic":
                    differing = int((one.label_map != other.label_map).sum())
                    changed, pixels = changed + differing, pixels + one.label_map.numel()
                    share = differing / one.label_map.numel()
                    if share > MOST_CHANGED:
                        told = f"bfloat16 changes the label of {share:.1%} of the pixels of calibration image {number}"
                        return Choice("fp32", f"{told}, and {MOST_CHANGED:.0%} may change")
                elif lost := [*_unmatched(one, other, threshold), *_unmatched(other, one, threshold)]:
                    return Choice("fp32", f"bfloat16 changes segments of calibration image {number} ({lost[0].label})")
        except ImageError:
            continue
        except PredictorError as error:  # NaN in one of the precisions
            return Choice("fp32", f"calibration image {number} cannot be predicted in both precisions: {error}")
        count += 1
    if not count:
        return Choice("fp32", "none of the calibration images can be read")
    share, images_ = changed / pixels, f"{count} calibration {'image' if count == 1 else 'images'}"
    if own == "semantic":
        return Choice("bf16", f"on {images_}, {share:.2%} of the pixels change their label in bfloat16")
    kept = "keeps its" if count == 1 else "keep their"
    return Choice("bf16", f"{images_} {kept} segments in bfloat16, and {share:.2%} of the pixels change their label")


def _unmatched(one: Prediction, other: Prediction, threshold: float) -> list[Segment]:
    """The segments of a prediction that have no counterpart of their own in another one of the same image.

    Segments that rounding may have moved below the threshold are left out.
    """
    free = list(other.segments)
    lost = []
    for segment in one.segments:
        alike = [candidate for candidate in free if candidate.class_id == segment.class_id]
        best = max(alike, key=lambda candidate: _overlap(segment, candidate, one.size), default=None)
        if best is not None and _overlap(segment, best, one.size) >= LEAST_OVERLAP:
            free = [candidate for candidate in free if candidate is not best]
        elif segment.score is None or segment.score >= threshold + SCORE_MARGIN:
            lost.append(segment)
    return lost


def _overlap(one: Segment, other: Segment, size: Size) -> float:
    """Intersection over union of two masks."""
    first, second = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
    for whole, segment in ((first, one), (second, other)):
        left, top, right, bottom = segment.box
        whole[top : bottom + 1, left : right + 1] = segment.mask
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


__all__ = ["PICTURES", "Choice", "choose_precision", "multiplies_bfloat16", "warn_if_emulated"]
