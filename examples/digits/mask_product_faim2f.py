"""Masks that are not multiplied out: the product of mask embeddings and mask features, of which training needs little.

A mask logit is the product of a query's embedding and a pixel's features. Training asks an intermediate prediction
for two things: all masks at a few thousand points, to match them, and the masks that were matched. Sampling at points
is linear in the features, so it may come before the product; and the masks that were not matched are never formed,
neither on the way forward nor on the way back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .point_sampling_faim2f import sample_points, sample_shared


@dataclass
class MaskProduct:
    """The masks of a batch of queries: embedding (B, Q, C), and features (B, C, h, w) that all predictions share."""

    embedding: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.embedding)

    @property
    def device(self) -> torch.device:
        """Where the masks are."""
        return self.embedding.device

    def full(self) -> Tensor:
        """All masks (B, Q, h, w), raw."""
        masks = torch.matmul(self.embedding, self.features.flatten(2))
        return masks.unflatten(2, self.features.shape[-2:])


Masks = Tensor | MaskProduct


def matched_masks(
    predictions: Sequence[Masks], matched: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int]
) -> list[Tensor]:
    """The matched masks of all predictions, image by image.

    Args:
        predictions: S predictions of B images.
        matched: for each prediction, images (N,) in rising order and queries (N,).
        counts: how many of the N are of each image, the same for every prediction.

    Returns:
        for each image (S, n, h, w), raw.
    """
    of_layers = []  # for each prediction and image, (n, h, w), or (n, C) where they are products
    for masks, (image, query) in zip(predictions, matched, strict=True):
        if isinstance(masks, MaskProduct):
            rows = masks.embedding[image, query]
        else:
            # Whole rows of a flat table: their gradients are added in one go, those of pairs of indices value by value.
            rows = masks.flatten(0, 1).index_select(0, image * masks.shape[1] + query)
        of_layers.append(rows.split(list(counts)))
    of_images = [torch.stack(parts) for parts in zip(*of_layers, strict=True)]
    first = predictions[0]
    if not isinstance(first, MaskProduct):
        return of_images
    # One product for all layers of an image, so that the large gradient of its features is made once.
    size = first.features.shape[-2:]
    return [
        torch.matmul(rows, features.flatten(1)).unflatten(2, size)
        for rows, features in zip(of_images, first.features.unbind(), strict=True)
    ]


def zero_of(masks: Masks) -> Tensor:
    """0 with a gradient of 0 to everything the masks came from."""
    if isinstance(masks, MaskProduct):
        return masks.embedding.sum() * 0.0 + masks.features.sum() * 0.0
    return masks.sum() * 0.0


def values_at(predictions: Sequence[Masks], images: slice, points: Tensor) -> Iterator[Tensor]:
    """Of each prediction, all masks of `images` at `points` (P, 2): (b, Q, P), float32, new memory."""
    sampled: tuple[Tensor, Tensor] | None = None  # features, and they at the points
    for masks in predictions:
        if isinstance(masks, MaskProduct):
            embedding, features = masks.embedding[images].float(), masks.features
            if features.shape[-2] * features.shape[-1] > len(points):
                if sampled is None or sampled[0] is not features:
                    part = features[images].float()
                    sampled = features, sample_points(part, points.expand(len(part), -1, -1))  # (b, C, P)
                yield embedding @ sampled[1]
                continue
            whole = MaskProduct(embedding, features[images].float()).full()  # there are fewer pixels than points
        else:
            whole = masks[images].float()
        yield sample_shared(whole.flatten(0, 1), points).view(*whole.shape[:2], len(points))


__all__ = ["MaskProduct", "Masks", "matched_masks", "values_at", "zero_of"]
