"""The image processor's `post_process_*` methods.

They call the functions of `post_processing_faim2f.py`, whose results equal those of transformers' Mask2Former, and of
`focoos_post_processing_faim2f.py`, whose results equal those of Focoos, with the image processor's settings.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers.image_processing_utils import BatchFeature
from transformers.utils import logging

from .focoos_post_processing_faim2f import post_process_detections, post_process_queries
from .padding_faim2f import fill_padding, own_logits
from .post_processing_faim2f import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)

logger = logging.get_logger(__name__)


class SegmentationPostProcessing:
    """Mixin that converts the model's outputs to segmentations, with the image processor's settings."""

    cls_sigmoid: bool
    intermediate_size: list[int] | None
    label_ids_to_fuse: Any  # list[int] | None
    label_ids_to_fuse_among: int | None
    mask_stride: int

    def _intermediate_size(self) -> tuple[int, int] | None:
        return None if self.intermediate_size is None else (self.intermediate_size[0], self.intermediate_size[1])

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any = None,
        return_segmentation_scores: bool = False,
    ) -> Any:
        """The class of every pixel, as in transformers' Mask2Former, with this image processor's `cls_sigmoid`.

        Args:
            outputs: the model's output: an object or a mapping with `class_queries_logits` (B, Q, C+1) and
                `masks_queries_logits` (B, Q, H/4, W/4), or H/8 and W/8 for BiSeNetFormer.
            target_sizes: (height, width) of each image's result; None for `intermediate_size`. Results leave out the
                batch's padding, so give sizes of images, not of the batch: crop `mask_labels` to compare with them.
            return_segmentation_scores: also return the scores of all classes.

        Returns:
            For each image a tensor (height, width) of class ids, or this tensor and the scores (C, height, width), as
            the attributes and items `segmentation` and `segmentation_scores`.
        """
        results: list[Any] = post_process_semantic_segmentation(
            *_logits(outputs),
            target_sizes,
            cls_sigmoid=self.cls_sigmoid,
            intermediate_size=self._intermediate_size(),
            return_segmentation_scores=return_segmentation_scores,
        )
        return [BatchFeature(vars(result)) for result in results] if return_segmentation_scores else results

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Any = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
    ) -> list[dict[str, Any]]:
        """The instances of each image, as in transformers' Mask2Former, with this image processor's `cls_sigmoid`.

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            threshold: minimum score of an instance.
            mask_threshold, overlap_mask_area_threshold: without effect, as in transformers.
            return_coco_annotation: return the segmentation as run lengths, one list for each id in the map, in
                ascending order. If some pixel has no instance, the first list is that of the background, -1, and id k
                has list k + 1. An instance that is covered completely has no list. A list is start, length, start,
                length, ...; starts count from 1 in row-major order.
            return_binary_maps: return the segmentation as one mask per instance, (n, height, width).

        Returns:
            For each image a dict of "segmentation" and "segments_info": id, label_id, was_fused and score per segment.
        """
        return post_process_instance_segmentation(
            *_logits(outputs),
            threshold,
            mask_threshold,
            overlap_mask_area_threshold,
            target_sizes,
            return_coco_annotation,
            return_binary_maps,
            cls_sigmoid=self.cls_sigmoid,
            intermediate_size=self._intermediate_size(),
        )

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Iterable[int] | None = None,
        target_sizes: Any = None,
    ) -> list[dict[str, Any]]:
        """One segment per pixel, as in transformers' Mask2Former, with this image processor's `cls_sigmoid`.

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            threshold: a query's class score must exceed it.
            mask_threshold: a query's area consists of the pixels at which its score times mask probability reaches
                this.
            overlap_mask_area_threshold: the fraction of its area that a query must win.
            label_ids_to_fuse: classes whose segments are fused as in transformers: each segment is still listed, and
                ids can repeat. An empty set fuses nothing. None means the stuff classes in the model's outputs
                (`fused_classes`), or else of this image processor; each of these becomes one segment with a unique id,
                listed once.

        Returns:
            For each image a dict of "segmentation" and "segments_info": id, label_id, was_fused and score per segment.

        Raises:
            ValueError: `label_ids_to_fuse` are not ids of classes of these outputs, or as in
                `post_processing_faim2f.post_process_panoptic_segmentation`.
        """
        class_queries_logits, masks_queries_logits = _logits(outputs)
        own = label_ids_to_fuse is None
        if label_ids_to_fuse is None:
            label_ids_to_fuse = self._classes_to_fuse(outputs)
        else:
            label_ids_to_fuse = _class_ids(label_ids_to_fuse, class_queries_logits.shape[-1] - 1)
        return post_process_panoptic_segmentation(
            class_queries_logits,
            masks_queries_logits,
            threshold,
            mask_threshold,
            overlap_mask_area_threshold,
            label_ids_to_fuse,
            target_sizes,
            cls_sigmoid=self.cls_sigmoid,
            intermediate_size=self._intermediate_size(),
            unique_ids=own,
        )

    def _classes_to_fuse(self, outputs: Any) -> list[int] | None:
        """The stuff classes in the outputs, or those of this image processor if the outputs have none.

        Warns if they differ: if only the model gets new labels, an image processor keeps the old stuff classes.
        """
        own = self.label_ids_to_fuse
        fused = _field(outputs, "fused_classes")
        if fused is not None:
            of_model = fused[0].nonzero()[:, 0].tolist()
            if own is not None and own != of_model:
                logger.warning_once(
                    f"Fusing the classes {of_model}, as the model's configuration says, and not {own} as this image "
                    "processor does, perhaps for other labels: call its take_labels_from(model.config)."
                )
            return of_model
        among, num_labels = self.label_ids_to_fuse_among, _field(outputs, "class_queries_logits").shape[-1] - 1
        if own and (among not in (None, num_labels) or max(own) >= num_labels):
            logger.warning_once(
                f"Nothing is fused: this image processor's label_ids_to_fuse {own} are of a model with "
                f"{among or f'at least {max(own) + 1}'} classes, and the outputs of one with {num_labels}; pass "
                "label_ids_to_fuse."
            )
            return None
        return own

    def post_process_detections(
        self,
        outputs: Any,
        target_sizes: Any = None,
        network_size: tuple[int, int] | None = None,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        top_k: int | None = None,
        use_mask_score: bool | None = None,
        predict_all_pixels: bool | None = None,
        filter_empty_masks: bool | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> Any:
        """The detections of each image, as in Focoos: box, score, class id, label and mask.

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            network_size: (height, width) of `pixel_values`; None for the size of the mask logits times their stride,
                which is this image processor's `mask_stride`.
            threshold, mask_threshold, top_k, use_mask_score, predict_all_pixels, filter_empty_masks: None for this
                image processor's settings.
            id2label: name of each class, for `Detection.label`.

        Returns:
            For each image a list of `Detection`.
        """
        class_queries_logits, masks_queries_logits = _logits(outputs)
        given = {
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "top_k": top_k,
            "use_mask_score": use_mask_score,
            "predict_all_pixels": predict_all_pixels,
            "filter_empty_masks": filter_empty_masks,
        }
        settings: dict[str, Any] = {
            name: getattr(self, name) if value is None else value for name, value in given.items()
        }
        return post_process_detections(
            class_queries_logits,
            masks_queries_logits,
            self._network_size(masks_queries_logits) if network_size is None else network_size,
            target_sizes,
            id2label=id2label,
            cls_sigmoid=self.cls_sigmoid,
            **settings,
        )

    def post_process_queries(
        self, outputs: Any, target_sizes: Any = None, network_size: tuple[int, int] | None = None
    ) -> Any:
        """The prediction of every query, unfiltered: `class_ids`, `scores` and `masks`, as in Focoos's model cards.

        Uses this image processor's settings, except those that filter.

        Args:
            outputs, target_sizes, network_size: as in `post_process_detections`.
        """
        class_queries_logits, masks_queries_logits = _logits(outputs)
        names = ("mask_threshold", "use_mask_score", "predict_all_pixels")
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        return post_process_queries(
            class_queries_logits,
            masks_queries_logits,
            self._network_size(masks_queries_logits) if network_size is None else network_size,
            target_sizes,
            cls_sigmoid=self.cls_sigmoid,
            **settings,
        )

    def _network_size(self, masks_queries_logits: Tensor) -> tuple[int, int]:
        height, width = masks_queries_logits.shape[-2:]
        return self.mask_stride * height, self.mask_stride * width

    @staticmethod
    def remove_padding(outputs: Any, pixel_mask: Tensor) -> list[dict[str, Tensor]]:
        """The outputs of each image of a padded batch, with masks cropped to the image.

        For outputs that do not mark padding themselves, such as those of an exported graph. Post-processing stretches
        masks over the whole image, so masks that include padding would be displaced.

        Args:
            outputs: the model's output for B images.
            pixel_mask: (B, H, W), as returned by the image processor: 1 on the image, 0 on the padding.

        Returns:
            For each image `class_queries_logits` (1, Q, C+1), `masks_queries_logits` (1, Q, h, w), with h and w the
            image's part of the mask logits, rounded up, and `fused_classes` (1, C) if the outputs have it.

        Raises:
            ValueError: `pixel_mask` has another shape.
        """
        classes, masks = _logits(outputs)
        fused = _field(outputs, "fused_classes")
        if pixel_mask.ndim != 3 or len(pixel_mask) != len(masks):
            raise ValueError(
                f"pixel_mask must be (B, H, W) with one mask for each of {len(masks)} images, got "
                f"{tuple(pixel_mask.shape)}."
            )
        apart = []
        for index, own in enumerate(own_logits(fill_padding(masks, pixel_mask))):
            one = slice(index, index + 1)
            apart.append({"class_queries_logits": classes[one], "masks_queries_logits": own[None]})
            if fused is not None:
                apart[-1]["fused_classes"] = fused[one]
        return apart


def _field(outputs: Any, name: str) -> Any:
    """An entry of a mapping, or an attribute of any other object; None if it is missing."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _class_ids(values: Iterable[Any], num_labels: int) -> set[int]:
    """Validates class ids to be fused, and converts them to integers: a tensor's elements would equal no class."""
    try:
        ids = {operator.index(value) for value in values}
    except TypeError:
        raise ValueError(f"label_ids_to_fuse must be class ids, whole numbers, not {values!r}.") from None
    wrong = sorted(label for label in ids if not 0 <= label < num_labels)
    if wrong:
        raise ValueError(
            f"label_ids_to_fuse has {wrong[0]}, but the outputs are of the classes 0 to {num_labels - 1}: leave it out."
        )
    return ids


def _logits(outputs: Any) -> tuple[Tensor, Tensor]:
    """`class_queries_logits` and `masks_queries_logits` of a model output, any other object, or a mapping."""
    classes, masks = _field(outputs, "class_queries_logits"), _field(outputs, "masks_queries_logits")
    if classes is None or masks is None:
        raise ValueError(
            "The outputs must have class_queries_logits and masks_queries_logits, as a FAI-M2F or Mask2Former model "
            f"returns them; got {type(outputs).__name__}."
        )
    return classes, masks
