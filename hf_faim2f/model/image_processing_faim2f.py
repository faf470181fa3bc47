"""Image processor of FAI-M2F: photos to `pixel_values`, segmentation maps to mask and class labels, and back.

Its names, arguments and returned fields are those of transformers' Mask2Former processor, so scripts and collators
written for that one work with this one. It resizes with torch, on the device that an image is on.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging

from .image_loading_faim2f import load_images, load_segmentation_maps
from .image_settings_faim2f import (
    OPTIONAL_SETTINGS,
    PREPROCESSING_SETTINGS,
    SERVICE_KEYS,
    SETTINGS,
    near_settings,
    refuse_unknown,
    with_own_names,
)
from .post_processing_faim2f import (
    post_process_detections,
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_queries,
    post_process_semantic_segmentation,
)

# Not used here, but by post-processing: transformers 4.57 takes from a local folder only what this very file imports.
from .resize_faim2f import BilinearResize  # noqa: F401
from .segmentation_labels_faim2f import convert_segmentation_map_to_binary_masks, resize_segmentation_map

logger = logging.get_logger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_SIZE = {"shortest_edge": 640, "longest_edge": 2560}
# An 8K frame fits. More is the work of a wrong size or of an image of extreme aspect ratio without a cap.
MAX_RESIZED_PIXELS = 2**25


def resized_size(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) of an image after resizing.

    With `{"height": H, "width": W}` that is (H, W). With `{"shortest_edge": S, "longest_edge": L}` the image keeps its
    aspect ratio: its shorter side becomes S, unless the longer would then exceed L (if given), which it becomes
    instead. A side that does not come out whole is rounded to the nearest integer, halves up, as detectron2's
    ResizeShortestEdge and Focoos do; transformers' Mask2Former cuts off, so it may be one pixel smaller.

    Raises:
        ValueError: the result has a side of 0 pixels, or more than 2**25 pixels.
    """
    if "height" in size:
        new_height, new_width = size["height"], size["width"]
    else:
        shortest, longest = float(size["shortest_edge"]), size.get("longest_edge")
        scale = shortest / min(height, width)
        exact = [shortest, scale * width] if height < width else [scale * height, shortest]
        if longest is not None and max(exact) > longest:
            scale = longest / max(exact)
            exact = [side * scale for side in exact]
        new_height, new_width = (int(side + 0.5) for side in exact)
    if min(new_height, new_width) == 0 or new_height * new_width > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"{height}x{width} pixels would be resized to {new_height}x{new_width} (height x width): crop an image of "
            f"such an aspect ratio, or choose another size than {dict(size)}."
        )
    return new_height, new_width


def resize_image(image: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) floats to (C, height, width): bilinear and antialiased like Pillow's, but not rounded."""
    if tuple(image.shape[-2:]) == (height, width):
        return image
    return F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


class FaiM2FImageProcessor(BaseImageProcessor):
    """Prepares images and segmentation maps for FAI-M2F and turns the model's outputs into segmentations.

    Every setting up to `num_labels` can also be given to a single call; None there means the processor's own.

    Args:
        do_resize: resize the image to `size`.
        size: `{"shortest_edge": S, "longest_edge": L}` keeps the aspect ratio, `{"height": H, "width": W}` does not;
            see `resized_size` for the rounding. A number S stands for a shortest edge of S and a longest of 4 S, a pair
            for (height, width). The default cap is detectron2's and Mask2Former's for ADE20K.
        do_rescale, rescale_factor: multiply the pixels by `rescale_factor`; whatever they are, so a float image that is
            in 0..1 already needs `do_rescale=False`.
        do_normalize, image_mean, image_std: subtract the mean and divide by the deviation, of rescaled pixels, one
            number or three (RGB). The defaults are ImageNet's; on 0..255 they are Focoos's 123.675, 58.395 and so on.
        do_pad: pad the images of a batch with zeros at the bottom and the right to the size of the largest, and that to
            `size_divisor`. Without it images of different sizes cannot be returned as one tensor.
        size_divisor: make height and width of the padded batch divisible by this; 0 or None for not. (Mask2Former's
            processor enlarges the image instead; here only padding is added, and `pixel_mask` tells it.)
        pad_size: `{"height": H, "width": W}` to pad to, in place of the batch's largest size and of `size_divisor`.
        ignore_index: id in the segmentation maps of pixels without label; they belong to no mask.
        do_reduce_labels: make id 0 of the maps `ignore_index` and every other id one less, as for ADE20K's files.
        num_labels: number of classes; if given, a map that holds a higher class is refused.
        cls_sigmoid: whether the model's class scores are independent sigmoids in place of a softmax.
        threshold, mask_threshold, top_k, use_mask_score, predict_all_pixels, filter_empty_masks: defaults of
            `post_process_detections`; the other post-processing methods have transformers' own defaults.
        intermediate_size: (height, width) to which mask logits are brought before they are turned into probabilities,
            except in `post_process_detections`; None to leave them as they are.
        label_ids_to_fuse: classes whose segments `post_process_panoptic_segmentation` makes one where its caller names
            none: the "stuff" classes.

    Raises:
        TypeError: a keyword that is no setting; the message names the nearest that is.
        ValueError: a value that cannot be; the message names the setting.
    """

    model_input_names = ["pixel_values", "pixel_mask"]
    # With this save_pretrained copies this file and those that it imports beside preprocessor_config.json, however the
    # processor came to be, so the folder that it writes always loads by itself.
    _auto_class = "AutoImageProcessor"  # type: ignore[assignment]

    # Set, with all the other settings, in a loop that a type checker does not see through.
    cls_sigmoid: bool
    intermediate_size: list[int] | None
    label_ids_to_fuse: list[int] | None

    def __init__(
        self,
        do_resize: bool = True,
        size: Any = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_pad: bool = True,
        size_divisor: int | None = 0,
        pad_size: dict[str, int] | None = None,
        ignore_index: int | None = None,
        do_reduce_labels: bool = False,
        num_labels: int | None = None,
        cls_sigmoid: bool = False,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        top_k: int = 100,
        use_mask_score: bool = False,
        predict_all_pixels: bool = True,
        filter_empty_masks: bool = True,
        intermediate_size: tuple[int, int] | None = (384, 384),
        label_ids_to_fuse: Iterable[int] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {name: value for name, value in locals().items() if name in SETTINGS}
        kwargs = with_own_names(kwargs)
        values["do_reduce_labels"] = do_reduce_labels or kwargs.pop("do_reduce_labels", False)  # was `reduce_labels`
        auto_map = kwargs.pop("auto_map", None)
        refuse_unknown(set(kwargs) - SERVICE_KEYS, SETTINGS, type(self).__name__)
        service = {"processor_class": kwargs.get("processor_class", kwargs.get("_processor_class"))}
        super().__init__(**service)
        if auto_map is not None:
            self.auto_map = auto_map
        values["size"] = DEFAULT_SIZE if size is None else size
        values["image_mean"] = IMAGENET_MEAN if image_mean is None else image_mean
        values["image_std"] = IMAGENET_STD if image_std is None else image_std
        values["size_divisor"] = size_divisor or 0
        for name, check in SETTINGS.items():
            unset = name in OPTIONAL_SETTINGS and values[name] is None
            setattr(self, name, None if unset else check(name, values[name]))

    @classmethod
    def from_model_config(cls, config: Any, **overrides: Any) -> "FaiM2FImageProcessor":
        """A processor whose post-processing is what the model's configuration says.

        Args:
            config: `FaiM2FConfig`, or an object with its `cls_sigmoid`, `threshold`, `mask_threshold`, `top_k`,
                `use_mask_score`, `predict_all_pixels` and, optionally, `filter_empty_masks` and `label_ids_to_fuse`.
            overrides: any settings; they win over the configuration.
        """
        names = ["cls_sigmoid", "threshold", "mask_threshold", "top_k", "use_mask_score", "predict_all_pixels"]
        values = {name: getattr(config, name) for name in names}
        optional = ("filter_empty_masks", "label_ids_to_fuse")
        values.update({name: getattr(config, name) for name in optional if hasattr(config, name)})
        return cls(**{**values, **overrides})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A processor from what `to_dict` gave, or a file holds; `kwargs` that are settings override it.

        Keys that are no settings are named in one warning and left out.
        `AutoImageProcessor` and `pipeline` pass keywords on that are meant for the download or the model, so one that
        is not a setting is refused only if it is nearly one, and otherwise ignored, as in transformers. With
        `return_unused_kwargs=True` all that are not settings are returned beside the processor instead.

        Raises:
            TypeError: a keyword that misspells a setting; the message names the setting.
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        kwargs = with_own_names(kwargs)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in SETTINGS}
        if not return_unused_kwargs:
            refuse_unknown(near_settings(kwargs), SETTINGS, cls.__name__)
        values = with_own_names(image_processor_dict)
        unknown = sorted(set(values) - set(SETTINGS) - SERVICE_KEYS - {"auto_map"})
        if unknown:  # of a later version, or of its owner: a published folder stays readable
            logger.warning_once(
                f"{cls.__name__}: this version knows nothing of {', '.join(unknown)} in the processor's configuration; "
                "it has no effect."
            )
        known = {name: value for name, value in values.items() if name not in unknown}
        processor = cls(**{**known, **overrides})
        return (processor, kwargs) if return_unused_kwargs else processor

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As transformers', and as lenient as `from_dict`."""
        with open(json_file, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def to_dict(self) -> dict[str, Any]:
        """The settings, without those that are not set, and what transformers needs to find this class again."""
        # transformers 4.57 saves "_processor_class" without its underscore; 5.x has no such attribute.
        names = [*SETTINGS, "auto_map", "_processor_class"]
        values = {name: copy.deepcopy(getattr(self, name, None)) for name in names}
        saved = {name: value for name, value in values.items() if value is not None or name == "intermediate_size"}
        return {**saved, "image_processor_type": type(self).__name__}

    def __call__(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, segmentation_maps, instance_id_to_semantic_id, **kwargs)

    @torch.no_grad()
    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: Mapping[int, int] | list[Mapping[int, int]] | None = None,
        input_data_format: str | None = None,
        return_tensors: str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Reads, resizes, rescales, normalizes and pads a batch of images, and makes labels of its segmentation maps.

        Args:
            images: one image or several; see `load_images` for all that can be one.
            segmentation_maps: for each image the id of a class (or of an instance) at every pixel, of the image's size.
            instance_id_to_semantic_id: class of each instance id, one dictionary for all maps or a list of one each.
            input_data_format: "channels_first", "channels_last", or None to infer it from each array's shape.
            return_tensors: "pt" for torch tensors, "np" for NumPy arrays, None for lists of NumPy arrays.
            overrides: settings up to `num_labels`, for this call.

        Returns:
            - **pixel_values** (B, 3, H, W), float32; 0 in the padding.
            - **pixel_mask** (B, H, W), int64; 1 on the image, 0 on the padding.
            - **mask_labels** list of (n_i, H, W), float32, 1 where the pixel is of the segment, 0 elsewhere and in the
              padding; only with `segmentation_maps`.
            - **class_labels** list of (n_i,), int64; only with `segmentation_maps`.

            Tensors are on the device of the images, labels on that of the segmentation maps.

        Raises:
            TypeError: an unknown keyword; the message names the nearest that exists.
            ValueError: an image, a map or a setting that cannot be; the message says which and why.
        """
        settings = self._settings_of_call(overrides)
        _check_return_tensors(return_tensors)
        pixels, sizes, new_sizes = [], [], []
        for i, image in enumerate(load_images(images, input_data_format, settings["do_rescale"])):
            height, width = image.shape[-2:]
            sizes.append((height, width))
            if settings["do_resize"]:
                try:
                    height, width = resized_size(height, width, settings["size"])
                except ValueError as error:
                    raise ValueError(f"image {i}: {error}") from None
            new_sizes.append((height, width))
            pixels.append(resize_image(image, height, width))
        maps = None
        if segmentation_maps is not None:
            maps = load_segmentation_maps(segmentation_maps, sizes)
            maps = [resize_segmentation_map(ids, *size) for ids, size in zip(maps, new_sizes, strict=True)]
        return self._encode(pixels, maps, instance_id_to_semantic_id, settings, return_tensors)

    @torch.no_grad()
    def encode_inputs(
        self,
        pixel_values_list: list[Any],
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: Mapping[int, int] | list[Mapping[int, int]] | None = None,
        ignore_index: int | None = None,
        do_reduce_labels: bool | None = None,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        pad_size: dict[str, int] | None = None,
    ) -> BatchFeature:
        """Pads images that are resized and normalized already into a batch, and makes labels of their maps.

        The arguments and the returned fields are those of `preprocess`; nothing is resized, rescaled or normalized.
        """
        settings = self._settings_of_call(
            {"ignore_index": ignore_index, "do_reduce_labels": do_reduce_labels, "pad_size": pad_size}
        )
        settings.update(do_rescale=False, do_normalize=False)
        _check_return_tensors(return_tensors)
        pixels = list(load_images(pixel_values_list, input_data_format))
        maps = None
        if segmentation_maps is not None:
            maps = load_segmentation_maps(segmentation_maps, [(image.shape[-2], image.shape[-1]) for image in pixels])
        return self._encode(pixels, maps, instance_id_to_semantic_id, settings, return_tensors)

    def _settings_of_call(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Every preprocessing setting: the call's where it gives one, else the processor's."""
        overrides = with_own_names(overrides)
        own = {"images", "segmentation_maps", "instance_id_to_semantic_id", "input_data_format", "return_tensors"}
        refuse_unknown(overrides, own | set(PREPROCESSING_SETTINGS), f"{type(self).__name__}.preprocess")
        settings = {}
        for name, check in PREPROCESSING_SETTINGS.items():
            value = getattr(self, name) if overrides.get(name) is None else overrides[name]
            settings[name] = None if value is None else check(name, value)
        return settings

    def _encode(
        self,
        images: list[Tensor],
        maps: list[Tensor] | None,
        instance_id_to_semantic_id: Any,
        settings: dict[str, Any],
        return_tensors: str | None,
    ) -> BatchFeature:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        padded_sizes = _padded_sizes(sizes, settings)
        if return_tensors is not None and len(set(padded_sizes)) > 1:
            raise ValueError(
                f"The images have different sizes {sorted(set(padded_sizes))} (height, width) and do_pad is False, so "
                "they are no single tensor: pad, choose a fixed size, or leave return_tensors out."
            )
        device = images[0].device
        for i, image in enumerate(images):
            if image.device != device:
                raise ValueError(f"image {i} is on {image.device} but image 0 on {device}: bring them onto one device.")

        scale, shift = (values.to(device) for values in scale_and_shift(settings))
        values: Tensor | list[Tensor]
        masks: Tensor | list[Tensor]
        if len(set(padded_sizes)) == 1:
            values = torch.empty((len(images), 3, *padded_sizes[0]), dtype=torch.float32, device=device)
            masks = torch.empty((len(images), *padded_sizes[0]), dtype=torch.int64, device=device)
        else:
            values = [torch.empty((3, *size), dtype=torch.float32, device=device) for size in padded_sizes]
            masks = [torch.empty(size, dtype=torch.int64, device=device) for size in padded_sizes]
        for image, (height, width), value, mask in zip(images, sizes, values, masks, strict=True):
            # One pass from the resized pixels into their place in the batch; a gray image becomes three channels in it.
            torch.addcmul(shift, image, scale, out=value[:, :height, :width])
            mask[:height, :width] = 1
            for padded in (value, mask):
                padded[..., height:, :] = 0
                padded[..., :height, width:] = 0

        data: dict[str, Any] = {
            "pixel_values": _in_type(values, return_tensors),
            "pixel_mask": _in_type(masks, return_tensors),
        }
        if maps is not None:
            # They cannot be one tensor: the images have different numbers of segments.
            labels = self._labels(maps, padded_sizes, instance_id_to_semantic_id, settings)
            data["mask_labels"], data["class_labels"] = (
                list(column) if return_tensors == "pt" else [_to_numpy(tensor) for tensor in column]
                for column in zip(*labels, strict=True)
            )
        return BatchFeature(data)

    @staticmethod
    def _labels(
        maps: list[Tensor],
        padded_sizes: list[tuple[int, int]],
        instance_id_to_semantic_id: Any,
        settings: dict[str, Any],
    ) -> list[tuple[Tensor, Tensor]]:
        mappings = instance_id_to_semantic_id
        if not isinstance(mappings, (list, tuple)):
            mappings = [mappings] * len(maps)
        if len(mappings) != len(maps):
            raise ValueError(
                f"instance_id_to_semantic_id has {len(mappings)} dictionaries for {len(maps)} segmentation maps: pass "
                "one for each, or one for all."
            )
        labels = []
        for i, (segmentation_map, mapping, padded_size) in enumerate(zip(maps, mappings, padded_sizes, strict=True)):
            try:
                masks, classes = convert_segmentation_map_to_binary_masks(
                    segmentation_map, mapping, settings["ignore_index"], settings["do_reduce_labels"], padded_size
                )
            except ValueError as error:
                raise ValueError(f"segmentation map {i}: {error}") from None
            limit = settings["num_labels"]
            if limit is not None and len(classes) and int(classes.max()) >= limit:
                raise ValueError(
                    f"segmentation map {i} has class {int(classes.max())} but num_labels is {limit}: name the id of "
                    "pixels without label in ignore_index, or check do_reduce_labels."
                )
            labels.append((masks, classes))
        return labels

    def _intermediate_size(self) -> tuple[int, int] | None:
        return None if self.intermediate_size is None else (self.intermediate_size[0], self.intermediate_size[1])

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any = None,
        return_segmentation_scores: bool = False,
    ) -> Any:
        """The class of every pixel; as transformers' Mask2Former, with this processor's `cls_sigmoid`.

        Args:
            outputs: the model's, an object or a mapping with `class_queries_logits` (B, Q, C+1) and
                `masks_queries_logits` (B, Q, H/4, W/4).
            target_sizes: (height, width) of the result for each image; without, `intermediate_size`.
            return_segmentation_scores: also return the scores of all classes.

        Returns:
            A tensor (height, width) of class ids for each image, or an object with it and the scores.
        """
        return post_process_semantic_segmentation(
            *_logits(outputs),
            target_sizes,
            cls_sigmoid=self.cls_sigmoid,
            intermediate_size=self._intermediate_size(),
            return_segmentation_scores=return_segmentation_scores,
        )

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
        """The instances of each image; as transformers' Mask2Former, with this processor's `cls_sigmoid`.

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            threshold: least score of an instance.
            mask_threshold: least probability of a pixel of its mask.
            overlap_mask_area_threshold: least share of its mask that an instance must keep.
            return_coco_annotation: return the segmentation as run lengths.
            return_binary_maps: return the segmentation as one mask an instance, (n, height, width).

        Returns:
            For each image "segmentation", and "segments_info" with id, label_id, was_fused and score of each segment.
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
        """One segment for every pixel; as transformers' Mask2Former, with this processor's `cls_sigmoid`.

        Args:
            outputs, target_sizes, thresholds: as in `post_process_instance_segmentation`.
            label_ids_to_fuse: classes whose segments become one, as transformers does it: each is still listed, and
                ids can repeat. An empty set fuses nothing. None stands for this processor's own classes, of which
                each is one segment, listed once, with an id of its own.

        Returns:
            For each image "segmentation", and "segments_info" with id, label_id, was_fused and score of each segment.
        """
        own = label_ids_to_fuse is None
        if own:
            label_ids_to_fuse = self.label_ids_to_fuse
        return post_process_panoptic_segmentation(
            *_logits(outputs),
            threshold,
            mask_threshold,
            overlap_mask_area_threshold,
            None if label_ids_to_fuse is None else set(label_ids_to_fuse),
            target_sizes,
            cls_sigmoid=self.cls_sigmoid,
            intermediate_size=self._intermediate_size(),
            unique_ids=own,
        )

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
        """The detections of each image as Focoos returns them: box, score, class id, label and mask.

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            network_size: (height, width) of the `pixel_values` that the model saw; None for 4 times the mask logits'.
            threshold, mask_threshold, top_k, use_mask_score, predict_all_pixels, filter_empty_masks: None for this
                processor's own.
            id2label: name of each class, for the label of a detection.
        """
        class_queries_logits, masks_queries_logits = _logits(outputs)
        if network_size is None:
            height, width = masks_queries_logits.shape[-2:]
            network_size = (4 * height, 4 * width)
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
            network_size,
            target_sizes,
            id2label=id2label,
            cls_sigmoid=self.cls_sigmoid,
            **settings,
        )

    def post_process_queries(
        self, outputs: Any, target_sizes: Any = None, network_size: tuple[int, int] | None = None
    ) -> Any:
        """What each query says, unfiltered, as Focoos's model cards describe it: `class_ids`, `scores` and `masks`.

        Args:
            outputs, target_sizes, network_size: as in `post_process_detections`, whose settings of this processor
                hold here too where they do not filter.
        """
        class_queries_logits, masks_queries_logits = _logits(outputs)
        if network_size is None:
            height, width = masks_queries_logits.shape[-2:]
            network_size = (4 * height, 4 * width)
        names = ("mask_threshold", "use_mask_score", "predict_all_pixels")
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        return post_process_queries(
            class_queries_logits,
            masks_queries_logits,
            network_size,
            target_sizes,
            cls_sigmoid=self.cls_sigmoid,
            **settings,
        )

    @staticmethod
    def remove_padding(outputs: Any, pixel_mask: Tensor) -> list[dict[str, Tensor]]:
        """The outputs of each image of a padded batch by itself, its masks without the padding.

        `target_sizes` stretch masks over the whole image, so masks that cover padding too come out displaced wherever
        the images of a batch differ in size. Post-process each of these in place of the whole batch's outputs.

        Args:
            outputs: the model's, for B images.
            pixel_mask: (B, H, W), as the processor returned it: 1 on the image, which begins at the upper left.

        Returns:
            For each image `class_queries_logits` (1, Q, C+1) and `masks_queries_logits` (1, Q, h, w), with h and w the
            image's share of the mask logits, rounded up.
        """
        classes, masks = _logits(outputs)
        if pixel_mask.ndim != 3 or len(pixel_mask) != len(masks):
            raise ValueError(
                f"pixel_mask must be (B, H, W) with one mask for each of {len(masks)} images, got "
                f"{tuple(pixel_mask.shape)}."
            )
        apart = []
        for index, mask in enumerate(pixel_mask):
            rows, columns = int(mask.any(1).sum()), int(mask.any(0).sum())
            height = math.ceil(rows / round(mask.shape[0] / masks.shape[-2]))  # by the mask logits' stride
            width = math.ceil(columns / round(mask.shape[1] / masks.shape[-1]))
            one = slice(index, index + 1)
            apart.append({"class_queries_logits": classes[one], "masks_queries_logits": masks[one, :, :height, :width]})
        return apart


def _check_return_tensors(return_tensors: str | None) -> None:
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}.")


def _padded_sizes(sizes: list[tuple[int, int]], settings: dict[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of each image with its padding."""
    if not settings["do_pad"]:
        return sizes
    if settings["pad_size"] is not None:
        padded = (settings["pad_size"]["height"], settings["pad_size"]["width"])
        for i, (height, width) in enumerate(sizes):
            if height > padded[0] or width > padded[1]:
                raise ValueError(
                    f"image {i} is {height}x{width} (height x width) and does not fit into pad_size "
                    f"{padded[0]}x{padded[1]}: choose a larger pad_size or a smaller size."
                )
    else:
        divisor = settings["size_divisor"] or 1
        padded = tuple(math.ceil(max(sides) / divisor) * divisor for sides in zip(*sizes, strict=True))
    return [padded] * len(sizes)


def scale_and_shift(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) each, so that rescaling and normalizing are one `pixels * scale + shift`; computed in float64."""
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    mean, std = (settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else ([0.0] * 3, [1.0] * 3)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return (factor / std).to(torch.float32), (-mean / std).to(torch.float32)


def _in_type(values: Tensor | list[Tensor], return_tensors: str | None) -> Any:
    if return_tensors == "pt":
        return values
    arrays = [_to_numpy(value) for value in values]
    return arrays if return_tensors is None else np.stack(arrays)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _logits(outputs: Any) -> tuple[Tensor, Tensor]:
    """`class_queries_logits` and `masks_queries_logits` of a model output, any other object, or a mapping."""
    get = outputs.get if isinstance(outputs, Mapping) else partial(getattr, outputs)
    classes, masks = get("class_queries_logits", None), get("masks_queries_logits", None)
    if classes is None or masks is None:
        raise ValueError(
            "The outputs must have class_queries_logits and masks_queries_logits, as a FAI-M2F or Mask2Former model "
            f"returns them; got {type(outputs).__name__}."
        )
    return classes, masks


__all__ = ["FaiM2FImageProcessor", "scale_and_shift"]
