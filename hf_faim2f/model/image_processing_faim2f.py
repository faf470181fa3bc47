"""Image processor of FAI-M2F: photos to `pixel_values`, segmentation maps to mask and class labels, and back.

Its names, arguments and returned fields are those of transformers' Mask2Former processor, so scripts and collators
written for that one work with this one. It resizes with torch, on the device that an image is on.
"""

import copy
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.utils import logging

from .image_loading_faim2f import load_images, load_segmentation_maps
from .image_settings_faim2f import (
    OPTIONAL_SETTINGS,
    PREPROCESSING_SETTINGS,
    SERVICE_KEYS,
    SETTINGS,
    near_settings,
    refuse_unknown,
    square_if_asked,
    with_own_names,
)
from .padding_faim2f import fill_padding, own_logits
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
# Beside label_ids_to_fuse in preprocessor_config.json: how many classes the model has that they are ids of.
FUSE_AMONG = "label_ids_to_fuse_among"
DEFAULT_SIZE = {"shortest_edge": 640, "longest_edge": 2560}
# An 8K frame fits. More is the work of a wrong size or of an image of extreme aspect ratio without a cap.
MAX_RESIZED_PIXELS = 2**25


def resized_size(height: int, width: int, size: Mapping[str, int], size_divisor: int = 0) -> tuple[int, int]:
    """(height, width) of an image after resizing.

    With `{"height": H, "width": W}` that is (H, W). With `{"shortest_edge": S, "longest_edge": L}` the image keeps its
    aspect ratio: its shorter side becomes S, unless the longer would then exceed L (if given), which it becomes
    instead. A side that does not come out whole is rounded to the nearest integer, halves up, as detectron2's
    ResizeShortestEdge and Focoos do.

    A `size_divisor` of more than 0 asks for transformers' Mask2Former: sides are cut off to integers as it does, and
    then enlarged to the next multiple of `size_divisor`, which changes the aspect ratio a little.

    Raises:
        ValueError: the result has a side of 0 pixels, or more than 2**25 pixels.
    """
    if "height" in size:
        new_height, new_width = size["height"], size["width"]
    else:
        shortest, longest = float(size["shortest_edge"]), size.get("longest_edge")
        if size_divisor:
            new_height, new_width = get_size_with_aspect_ratio((height, width), size["shortest_edge"], longest)
        else:
            scale = shortest / min(height, width)
            exact = [shortest, scale * width] if height < width else [scale * height, shortest]
            if longest is not None and max(exact) > longest:
                scale = longest / max(exact)
                exact = [side * scale for side in exact]
            new_height, new_width = (int(side + 0.5) for side in exact)
    if size_divisor:
        new_height, new_width = (math.ceil(side / size_divisor) * size_divisor for side in (new_height, new_width))
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

    Every setting up to `num_labels` can also be given to a single call; None there means the processor's own. As in
    transformers' Mask2Former, `do_convert_rgb`, `do_center_crop`, `crop_size` and `disable_grouping` are taken and have
    no effect: images always become RGB, are never cropped, and are processed one by one.

    Args:
        do_resize: resize the image to `size`.
        size: `{"shortest_edge": S, "longest_edge": L}` keeps the aspect ratio, `{"height": H, "width": W}` does not;
            see `resized_size` for the rounding. A number S stands for a shortest edge of S and a longest of 4 S, a pair
            for (height, width). The default cap is detectron2's and Mask2Former's for ADE20K.
        do_rescale, rescale_factor: multiply the pixels by `rescale_factor`; whatever they are, so a float image that is
            in 0..1 already needs `do_rescale=False`.
        do_normalize, image_mean, image_std: subtract the mean and divide by the deviation, of rescaled pixels, one
            number or three (RGB). The defaults are ImageNet's; on 0..255 they are Focoos's 123.675, 58.395 and so on.
        do_pad: pad the images of a batch with zeros at the bottom and the right to the size of the largest. The model
            leaves out what `pixel_mask` marks as padding, and so do the `post_process_*` methods. Without it images of
            different sizes cannot be returned as one tensor.
        size_divisor: enlarge the size that `do_resize` resizes to, so that height and width are divisible by this, as
            transformers' Mask2Former does; 0 or None for not.
        pad_size: `{"height": H, "width": W}` to pad to, in place of the batch's largest size.
        default_to_square: a `size` of one number S means S x S, in place of a shortest edge of S.
        ignore_index: id in the segmentation maps of pixels without label; they belong to no mask.
        do_reduce_labels: make id 0 of the maps `ignore_index` and every other id one less, as for ADE20K's files.
        num_labels: number of classes; if given, a map that holds a higher class is refused.
        cls_sigmoid: whether the model's class scores are independent sigmoids in place of a softmax.
        threshold, mask_threshold, top_k, use_mask_score, predict_all_pixels, filter_empty_masks: defaults of
            `post_process_detections`; the other post-processing methods have transformers' own defaults.
        intermediate_size: (height, width) to which mask logits are brought before they are turned into probabilities,
            except in `post_process_detections`; None to leave them as they are.
        label_ids_to_fuse: classes whose segments `post_process_panoptic_segmentation` makes one where neither its
            caller nor the model's outputs name any: the "stuff" classes.

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
    ignore_index: int | None
    num_labels: int | None
    intermediate_size: list[int] | None
    default_to_square: bool
    label_ids_to_fuse_among: int | None

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
        default_to_square: bool | None = False,
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
        among = kwargs.pop(FUSE_AMONG, None)
        refuse_unknown(set(kwargs) - SERVICE_KEYS, SETTINGS, type(self).__name__)
        service = {"processor_class": kwargs.get("processor_class", kwargs.get("_processor_class"))}
        super().__init__(**service)
        if auto_map is not None:
            self.auto_map = auto_map
        values["default_to_square"] = default_to_square or False  # transformers' processors write null
        values["size"] = DEFAULT_SIZE if size is None else square_if_asked(size, values["default_to_square"])
        values["image_mean"] = IMAGENET_MEAN if image_mean is None else image_mean
        values["image_std"] = IMAGENET_STD if image_std is None else image_std
        values["size_divisor"] = size_divisor or 0
        for name, check in SETTINGS.items():
            unset = name in OPTIONAL_SETTINGS and values[name] is None
            setattr(self, name, None if unset else check(name, values[name]))
        if among is not None:
            self.label_ids_to_fuse_among = SETTINGS["num_labels"](FUSE_AMONG, among)

    @property
    def label_ids_to_fuse(self) -> list[int] | None:
        """The stuff classes; `label_ids_to_fuse_among` is the number of classes of the model that they are ids of,
        None where they were set without it."""
        return self._label_ids_to_fuse

    @label_ids_to_fuse.setter
    def label_ids_to_fuse(self, value: Iterable[int] | None) -> None:
        self._label_ids_to_fuse = None if value is None else sorted(value)
        self.label_ids_to_fuse_among = None

    def take_labels_from(self, config: Any) -> None:
        """Makes `label_ids_to_fuse` those of a model's configuration, unless that does not say which classes are stuff,
        and `num_labels`, where it is set, too."""
        if config.label_ids_to_fuse is not None:
            self.label_ids_to_fuse = config.label_ids_to_fuse
            self.label_ids_to_fuse_among = config.num_labels
        if self.num_labels is not None:
            self.num_labels = config.num_labels

    @classmethod
    def from_model_config(cls, config: Any, **overrides: Any) -> "FaiM2FImageProcessor":
        """A processor whose post-processing is what the model's configuration says.

        Pixels without label are those of its `ignore_value`, unless that is the id of a class.

        Args:
            config: `FaiM2FConfig`, or an object with its `cls_sigmoid`, `threshold`, `mask_threshold`, `top_k`,
                `use_mask_score`, `predict_all_pixels` and, optionally, `filter_empty_masks`, `label_ids_to_fuse`,
                `num_labels` and `ignore_value`.
            overrides: any settings; they win over the configuration.
        """
        names = ["cls_sigmoid", "threshold", "mask_threshold", "top_k", "use_mask_score", "predict_all_pixels"]
        values = {name: getattr(config, name) for name in names}
        optional = ("filter_empty_masks", "label_ids_to_fuse")
        values.update({name: getattr(config, name) for name in optional if hasattr(config, name)})
        num_labels, ignore_value = (getattr(config, name, None) for name in ("num_labels", "ignore_value"))
        if num_labels is not None and ignore_value is not None and not 0 <= ignore_value < num_labels:
            values["ignore_index"] = ignore_value
        processor = cls(**{**values, **overrides})
        if processor.label_ids_to_fuse is not None:
            processor.label_ids_to_fuse_among = num_labels
        return processor

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
        if "label_ids_to_fuse" in overrides:
            values.pop(FUSE_AMONG, None)
        unknown = sorted(set(values) - set(SETTINGS) - SERVICE_KEYS - {"auto_map", FUSE_AMONG})
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
        names = [*SETTINGS, FUSE_AMONG, "auto_map", "_processor_class"]
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
        data_format: str | None = None,
        device: "str | torch.device | None" = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Reads, resizes, rescales, normalizes and pads a batch of images, and makes labels of its segmentation maps.

        Args:
            images: one image or several; see `load_images` for all that can be one. They are turned upright by their
                EXIF orientation, as `PIL.ImageOps.exif_transpose` does it: the sizes to post-process to are those of
                the upright images.
            segmentation_maps: for each image the id of a class (or of an instance) at every pixel, of the size that
                the image has upright.
            instance_id_to_semantic_id: class of each instance id, one dictionary for all maps or a list of one each.
            input_data_format: "channels_first", "channels_last", or None to infer it from each array's shape.
            return_tensors: "pt" for torch tensors, "np" for NumPy arrays, None for lists of NumPy arrays.
            data_format: of `pixel_values`: "channels_first", which the model takes and None stands for, or
                "channels_last", (B, H, W, 3).
            device: where images are resized and returned; None for where each of them is.
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
        if data_format not in (None, "channels_first", "channels_last"):
            raise ValueError(f"data_format must be 'channels_first', 'channels_last' or None, got {data_format!r}.")
        pixels, sizes, new_sizes = [], [], []
        for i, image in enumerate(load_images(images, input_data_format, settings["do_rescale"])):
            height, width = image.shape[-2:]
            sizes.append((height, width))
            if settings["do_resize"]:
                try:
                    height, width = resized_size(height, width, settings["size"], settings["size_divisor"])
                except ValueError as error:
                    raise ValueError(f"image {i}: {error}") from None
            new_sizes.append((height, width))
            pixels.append(resize_image(image if device is None else image.to(device), height, width))
        maps = None
        if segmentation_maps is not None:
            maps = load_segmentation_maps(segmentation_maps, sizes)
            maps = [resize_segmentation_map(ids, *size) for ids, size in zip(maps, new_sizes, strict=True)]
        encoded = self._encode(pixels, maps, instance_id_to_semantic_id, settings, return_tensors)
        if data_format == "channels_last":
            values = encoded["pixel_values"]
            if return_tensors == "pt":
                encoded["pixel_values"] = values.permute(0, 2, 3, 1)
            else:
                moved = [np.moveaxis(value, 0, -1) for value in values]
                encoded["pixel_values"] = moved if return_tensors is None else np.stack(moved)
        return encoded

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
        own = set(inspect.signature(self.preprocess).parameters) - {"overrides"}
        refuse_unknown(overrides, own | set(PREPROCESSING_SETTINGS), f"{type(self).__name__}.preprocess")
        square = overrides.get("default_to_square")
        square = self.default_to_square if square is None else square
        overrides["size"] = square_if_asked(overrides.get("size"), square)
        settings: dict[str, Any] = {}
        for name, check in PREPROCESSING_SETTINGS.items():
            value = getattr(self, name) if overrides.get(name) is None else overrides[name]
            settings[name] = None if value is None else check(name, value)
        settings["own_ignore_index"] = overrides.get("ignore_index") is None
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
                if mapping is not None and settings["own_ignore_index"]:
                    _refuse_ignored_instance(segmentation_map, mapping, settings)
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
            return_coco_annotation: return the segmentation as a list of run lengths for each id of the map, in rising
                order, as transformers does. The first list is that of the background, -1, wherever some pixel has no
                instance, so that the instance of id k is then list k + 1; an instance that others cover has no list.
                A list is start (from 1, row by row), length, start, length, ...
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
                ids can repeat. An empty set fuses nothing. None stands for the model's own, which its outputs name
                (`fused_classes`), or else for this processor's: each of these classes is one segment, listed once,
                with an id of its own.

        Returns:
            For each image "segmentation", and "segments_info" with id, label_id, was_fused and score of each segment.
        """
        own = label_ids_to_fuse is None
        if own:
            label_ids_to_fuse = self._classes_to_fuse(outputs)
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

    def _classes_to_fuse(self, outputs: Any) -> list[int] | None:
        """The model's stuff, or this processor's where its outputs do not name it; with a warning where they differ.

        A processor that was loaded beside a model, which then got other labels, still has the stuff of the old ones.
        """
        own = self.label_ids_to_fuse
        fused = _field(outputs, "fused_classes")
        if fused is not None:
            of_model = fused[0].nonzero()[:, 0].tolist()
            if own is not None and own != of_model:
                logger.warning_once(
                    f"Fused are the classes {of_model}, as the model's configuration says, and not {own} as this image "
                    "processor does, perhaps for other labels: call its take_labels_from(model.config)."
                )
            return of_model
        among, num_labels = self.label_ids_to_fuse_among, _field(outputs, "class_queries_logits").shape[-1] - 1
        if own and among not in (None, num_labels):
            logger.warning_once(
                f"Nothing is fused: this image processor's label_ids_to_fuse {own} are of a model with {among} "
                f"classes, and the outputs of one with {num_labels}; pass label_ids_to_fuse."
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
            image's share of the mask logits, rounded up; and `fused_classes` (1, C) where the outputs have it.
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


def _check_return_tensors(return_tensors: str | None) -> None:
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}.")


def _refuse_ignored_instance(segmentation_map: Tensor, classes: Mapping[int, int], settings: dict[str, Any]) -> None:
    """The 256th instance of a map can have the id 255, for which it must not be left out unasked."""
    if settings["ignore_index"] is None:
        return
    shift = 1 if settings["do_reduce_labels"] else 0
    ignored = settings["ignore_index"] + shift
    label = classes.get(ignored)
    if label is None or int(label) == ignored or int(label) < shift:
        return
    if bool((segmentation_map == ignored).any()):
        raise ValueError(
            f"instance_id_to_semantic_id gives id {ignored} the class {label}, but this processor's ignore_index "
            f"{settings['ignore_index']} says that these pixels have no label: pass ignore_index, {ignored - shift} if "
            "they have none, or an id that no instance has, such as -1."
        )


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
        padded = tuple(map(max, zip(*sizes, strict=True)))
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


def _field(outputs: Any, name: str) -> Any:
    """An entry of a mapping, or an attribute of any other object; None where there is none."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _logits(outputs: Any) -> tuple[Tensor, Tensor]:
    """`class_queries_logits` and `masks_queries_logits` of a model output, any other object, or a mapping."""
    classes, masks = _field(outputs, "class_queries_logits"), _field(outputs, "masks_queries_logits")
    if classes is None or masks is None:
        raise ValueError(
            "The outputs must have class_queries_logits and masks_queries_logits, as a FAI-M2F or Mask2Former model "
            f"returns them; got {type(outputs).__name__}."
        )
    return classes, masks


__all__ = ["FaiM2FImageProcessor", "scale_and_shift"]
