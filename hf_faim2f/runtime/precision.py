"""Which precision suits a model on a device: bfloat16 where it is multiplied natively and changes next to nothing.

bfloat16 has 8 bits of mantissa, float32 has 24. A trained model's answers hardly depend on the rest, but that is to be
measured and not assumed: calibration pictures are predicted in both precisions, and the answers are compared.
"""

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ImageError, PredictorError
from ..model.resize_faim2f import Size
from .prediction import Prediction, Segment

# At most this share of a picture's pixels may have another label.
MOST_CHANGED = 0.01
# Two segments are the same if they have the same class and at least this intersection over union.
LEAST_OVERLAP = 0.8
# Segments whose score is this close to the threshold may come or go.
SCORE_MARGIN = 0.05
# Number of pictures that commands calibrate with.
PICTURES = 8


@dataclass(frozen=True)
class Choice:
    """The precision that was chosen, a key of the torch runtime's `TYPES`, and why, as the rest of a sentence."""

    precision: str
    reason: str

    def __str__(self) -> str:
        return f"{self.precision}: {self.reason}."


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16 products: AMX or AVX512-BF16, ARM's BF16, or a GPU of 2020 on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    on_arm = platform.machine() in ("arm64", "aarch64")
    names = ("bf16", "sve_bf16") if on_arm else ("amx_bf16", "avx512_bf16")
    return torch.backends.mkldnn.is_available() and any(capabilities.get(name) is True for name in names)


def choose_precision(
    exact: Callable[[Any, str], list[Prediction]],
    rounded: Callable[[Any, str], list[Prediction]],
    images: Iterable[Any],
    own: str,
    threshold: float,
) -> Choice:
    """Compares a model in float32 and in bfloat16 on images.

    bfloat16 is chosen if in each image at most `MOST_CHANGED` of the pixels of the label map change, and if each
    segment has its own counterpart in the other precision, except those within `SCORE_MARGIN` of the threshold.

    Args:
        exact, rounded: predictors of one image and subtask in float32 and in bfloat16.
        images: calibration images; those that cannot be read are left out.
        own: the subtask whose segments are compared, if it is not "semantic", whose label map has all there is.
        threshold: the lowest score of its segments.
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
    kept = f"{count} calibration {'image keeps its' if count == 1 else 'images keep their'} segments in bfloat16"
    return Choice("bf16", f"{kept}, and {changed / pixels:.2%} of the pixels change their label")


def _unmatched(one: Prediction, other: Prediction, threshold: float) -> list[Segment]:
    """The segments of a prediction that have no counterpart of their own in another one of the same image.

    Left out are those whose score is so close to the threshold that rounding may take it below.
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


__all__ = ["PICTURES", "Choice", "choose_precision", "multiplies_bfloat16"]
