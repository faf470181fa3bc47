"""Between masks with classes, which the model predicts, and maps of one class a pixel, which its users may have."""

import torch
from torch import Tensor

# Smallest score of a class at a pixel whose logarithm is taken.
LEAST_SCORE = 1e-6


def semantic_logits(class_queries_logits: Tensor, masks_queries_logits: Tensor, cls_sigmoid: bool = False) -> Tensor:
    """Logits of the classes at each pixel of the masks' grid.

    A class's score at a pixel is the sum, over the queries, of its probability times the mask's ("Per-Pixel
    Classification is Not All You Need for Semantic Segmentation", section 3.4). Its logarithm is the logit: the argmax
    is that of the scores, the softmax is each score's share of the pixel, and cross-entropy is the negative logarithm
    of the true class's share. Enlarged bilinearly, logarithms keep thin objects that enlarged scores lose.

    Args:
        class_queries_logits: (B, Q, C + 1), raw; the last class is "no object".
        masks_queries_logits: (B, Q, h, w), raw.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.

    Returns:
        (B, C, h, w), float32, at least log(1e-6).
    """
    with torch.autocast(class_queries_logits.device.type, enabled=False):
        classes = class_queries_logits.float()
        chances = (classes.sigmoid() if cls_sigmoid else classes.softmax(-1))[..., :-1]  # (B, Q, C)
        scores = chances.transpose(1, 2) @ masks_queries_logits.float().sigmoid().flatten(2)  # (B, C, h * w)
        return (scores + LEAST_SCORE).log().unflatten(2, masks_queries_logits.shape[-2:])


def segments_of_class_maps(labels: Tensor, num_labels: int, ignore_value: int) -> tuple[list[Tensor], list[Tensor]]:
    """Maps of class ids as the loss takes them: one segment for each class of an image.

    Args:
        labels: (B, H, W), integers: class ids 0..num_labels-1, and `ignore_value` where a pixel has no label.
        ignore_value: if it is a class's id, every pixel has a label.

    Returns:
        for each image a map (H, W), int64, of segments 0..n-1, and -1 where a pixel has no label; and their class ids
        (n,), int64, in rising order.

    Raises:
        ValueError: the shape or type is another, or a value is no class.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a torch tensor of shape (B, H, W), not a {type(labels).__name__}.")
    if labels.ndim != 3 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must be class ids, integers of shape (B, H, W), not {labels.dtype} of {tuple(labels.shape)}."
        )
    labels = labels.long()
    is_class = 0 <= ignore_value < num_labels
    ignored = torch.zeros_like(labels, dtype=torch.bool) if is_class else labels == ignore_value
    wrong = labels[~ignored & ((labels < 0) | (labels >= num_labels))]
    if len(wrong):
        raise ValueError(
            f"labels have the value {int(wrong[0])}, which is none of the classes 0 to {num_labels - 1} and not "
            f"{ignore_value}, which says that a pixel has no label (ignore_value of the configuration)."
        )
    maps, classes = [], []
    for ids in labels.masked_fill(ignored, num_labels):
        found = ids.unique()
        found = found[found < num_labels]
        place = torch.full((num_labels + 1,), -1, device=ids.device)
        place[found] = torch.arange(len(found), device=ids.device)
        maps.append(place[ids])
        classes.append(found)
    return maps, classes


__all__ = ["segments_of_class_maps", "semantic_logits"]
