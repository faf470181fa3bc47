"""Which classes of the well-known panoptic data sets are things, that are counted, and which are stuff.

Checkpoints of other libraries name their classes and do not say it; these tables do, wherever the names are known.
"""

from collections.abc import Sequence

from .presets import load_labels

# Cityscapes' evaluated classes: label id and name, in the order of the train ids. From the person on they are things.
CITYSCAPES_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES_FIRST_THING = list(CITYSCAPES_CLASSES).index(24)
# COCO's panoptic classes: its 80 things come first.
COCO_PANOPTIC = 133
# Of ADE20K's 150 classes the 100 of its instance annotations are things, and these 50 are not.
ADE20K_STUFF = (
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77, 79,
    84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145,
)  # fmt: skip
# Share of the names that must agree: "windowpane" is a "window" elsewhere.
ALIKE = 0.85


def stuff_of(labels: Sequence[str]) -> list[int] | None:
    """The ids of the stuff classes, if these are the panoptic classes of COCO, ADE20K or Cityscapes; otherwise None.

    Args:
        labels: class names in the order of their ids. Of several, divided by commas, the first is looked at.
    """
    coco = load_labels("coco")
    if len(labels) == COCO_PANOPTIC and _alike(labels[: len(coco)], coco):
        return list(range(len(coco), COCO_PANOPTIC))
    if _alike(labels, load_labels("ade20k")):
        return list(ADE20K_STUFF)
    if _alike(labels, list(CITYSCAPES_CLASSES.values())):
        return list(range(CITYSCAPES_FIRST_THING))
    return None


def _alike(labels: Sequence[str], known: Sequence[str]) -> bool:
    if len(labels) != len(known):
        return False
    same = sum(_first(one) == _first(other) for one, other in zip(labels, known, strict=True))
    return same >= ALIKE * len(known)


def _first(label: str) -> str:
    return label.partition(",")[0].strip().lower().replace("_", " ")
