"""The image processor of FAI-M2F: images to `pixel_values`, segmentation maps to labels, outputs to segmentations.

Names, arguments and returned fields are those of transformers' Mask2Former image processor, so scripts and collators
written for it work unchanged. Images are resized with torch, on their own device.
"""

import copy
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging

# From a local folder, transformers 4.57 copies only the modules that the entry module imports directly. The imports
# marked `noqa` are needed by the other imports.
from .argmax_faim2f import resized_argmax  # noqa: F401
from .channels_faim2f import RGB, spread_values
from .configuration_checks_faim2f import parameters_of
from .focoos_post_processing_faim2f import post_process_detections  # noqa: F401
from .image_bands_faim2f import read_bands  # noqa: F401
from .image_files_faim2f import open_image  # noqa: F401
from .image_loading_faim2f import load_images, load_segmentation_maps
from .image_settings_faim2f import (
    OPTIONAL_SETTINGS,
    PREPROCESSING_SETTINGS,
    SERVICE_KEYS,
    SETTINGS,
    fit_channels,
    near_settings,
    padded_sizes,
    refuse_unknown,
    resized_size,
    scale_and_shift,
    square_if_asked,
    warn_of_scale,
    with_own_names,
)
from .padding_faim2f import fill_padding  # noqa: F401
from .post_processing_faim2f import post_process_semantic_segmentation  # noqa: F401
from .resize_faim2f import BilinearResize  # noqa: F401
from .segmentation_labels_faim2f import ignored_class_id, labels_of_maps, resize_segmentation_map
from .segmentation_post_processing_faim2f import SegmentationPostProcessing

logger = logging.get_logger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Key in preprocessor_config.json: num_labels of the model that label_ids_to_fuse refers to.
FUSE_AMONG = "label_ids_to_fuse_among"
# Key in preprocessor_config.json: the stride of the model's mask logits, if it is not the usual one.
MASK_STRIDE, USUAL_STRIDE = "mask_stride", 4
# Key in preprocessor_config.json: the number of channels, if it is not three.
NUM_CHANNELS = "num_channels"
DEFAULT_SIZE = {"shortest_edge": 640, "longest_edge": 2560}


def resize_image(image: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) float to (C, height, width): bilinear and antialiased like Pillow, but without rounding."""
    if tuple(image.shape[-2:]) == (height, width):
        return image
    return F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


class FaiM2FImageProcessor(SegmentationPostProcessing, BaseImageProcessor):
    """Prepares images and segmentation maps for FAI-M2F and converts the model's outputs to segmentations.

    Every setting up to `num_labels` can also be passed to a single call, where None means the image processor's value.
    As in transformers' Mask2Former, `do_convert_rgb`, `do_center_crop`, `crop_size` and `disable_grouping` are accepted
    but have no effect: images are always converted to RGB, never cropped, and processed one by one.

    Args:
        do_resize: resize the image to `size`.
        size: `{"shortest_edge": S, "longest_edge": L}` keeps the aspect ratio, `{"height": H, "width": W}` does not;
            see `resized_size` for the rounding. A single number S means a shortest edge of S and a longest edge of 4 S;
            a pair is (height, width). The default is that of detectron2 and Mask2Former for ADE20K.
        do_rescale, rescale_factor: multiply the pixels by `rescale_factor`. Float images in 0..1 need
            `do_rescale=False`.
        do_normalize, image_mean, image_std: subtract the mean from the rescaled pixels and divide by the standard
            deviation; one number or three (RGB). The defaults are ImageNet's, as in Focoos (123.675, ... on 0..255).
            For other than three channels ImageNet's three values are repeated in order; one channel gets their mean.
        do_pad: pad the images of a batch with zeros at the bottom and the right to the largest size. The model and the
            `post_process_*` methods ignore what `pixel_mask` marks as padding. Without padding, images of different
            sizes cannot be returned as one tensor.
        size_divisor: round the resized height and width up to multiples of this, as transformers' Mask2Former does; 0
            or None for no rounding.
        pad_size: `{"height": H, "width": W}` to pad to, instead of the largest size of the batch.
        default_to_square: a single number S as `size` means S x S instead of a shortest edge of S.
        ignore_index: id of unlabeled pixels in the segmentation maps; they belong to no mask.
        do_reduce_labels: map id 0 to `ignore_index` and decrease every other id by 1 (for ADE20K's files).
        num_labels: number of classes; if given, maps with a higher class id are rejected.
        cls_sigmoid: the model's class scores are independent sigmoids instead of a softmax.
        threshold, mask_threshold, top_k, use_mask_score, predict_all_pixels, filter_empty_masks: defaults of
            `post_process_detections`; the other post-processing methods have transformers' defaults.
        intermediate_size: (height, width) to which mask logits are resized before the sigmoid, except in
            `post_process_detections`; None to keep their size.
        label_ids_to_fuse: ids of the stuff classes that `post_process_panoptic_segmentation` fuses, unless its argument
            or the model's outputs specify them.
        kwargs: `mask_stride`, the pixels of the image per pixel of the mask logits along each side (4; 8 for
            BiSeNetFormer), from which `post_process_detections` and `post_process_queries` infer the size of the
            network's input if it is not passed; `num_channels`, the number of channels of the images (3); and keys that
            transformers writes into files.

    Raises:
        TypeError: an unknown keyword; the message suggests the closest setting.
        ValueError: an invalid value; the message names the setting.
    """

    model_input_names = ["pixel_values", "pixel_mask"]
    # Makes save_pretrained copy this module and its imports, so that the folder loads without this package.
    _auto_class = "AutoImageProcessor"  # type: ignore[assignment]

    # For the type checker: __init__ sets all settings in a loop.
    cls_sigmoid: bool
    ignore_index: int | None
    num_labels: int | None
    intermediate_size: list[int] | None
    default_to_square: bool
    label_ids_to_fuse_among: int | None
    num_channels: int
    mask_stride: int

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
        among, stride = kwargs.pop(FUSE_AMONG, None), kwargs.pop(MASK_STRIDE, None)
        refuse_unknown(set(kwargs) - SERVICE_KEYS - {NUM_CHANNELS}, SETTINGS, type(self).__name__)
        service = {"processor_class": kwargs.get("processor_class", kwargs.get("_processor_class"))}
        super().__init__(**service)
        if auto_map is not None:
            self.auto_map = auto_map
        values["default_to_square"] = default_to_square or False  # transformers' image processors write null
        values["size"] = DEFAULT_SIZE if size is None else square_if_asked(size, values["default_to_square"])
        channels = kwargs.get(NUM_CHANNELS)
        self.num_channels = RGB if channels is None else SETTINGS["num_labels"](NUM_CHANNELS, channels)
        values["image_mean"] = spread_values(IMAGENET_MEAN, self.num_channels) if image_mean is None else image_mean
        values["image_std"] = spread_values(IMAGENET_STD, self.num_channels) if image_std is None else image_std
        values["size_divisor"] = size_divisor or 0
        for name, check in SETTINGS.items():
            unset = name in OPTIONAL_SETTINGS and values[name] is None
            setattr(self, name, None if unset else check(name, values[name]))
        for name in ("image_mean", "image_std"):
            setattr(self, name, fit_channels(name, getattr(self, name), self.num_channels))
        self.mask_stride = USUAL_STRIDE if stride is None else SETTINGS["num_labels"](MASK_STRIDE, stride)
        if among is not None:
            self.label_ids_to_fuse_among = SETTINGS["num_labels"](FUSE_AMONG, among)

    @property
    def label_ids_to_fuse(self) -> list[int] | None:
        """The stuff classes. `label_ids_to_fuse_among` is the number of classes of their model; None if unknown."""
        return self._label_ids_to_fuse

    @label_ids_to_fuse.setter
    def label_ids_to_fuse(self, value: Iterable[int] | None) -> None:
        self._label_ids_to_fuse = None if value is None else SETTINGS["label_ids_to_fuse"]("label_ids_to_fuse", value)
        self.label_ids_to_fuse_among = None

    def take_labels_from(self, config: Any) -> None:
        """Copies `label_ids_to_fuse` from a model's configuration, unless None, and `num_labels`, if it is set here."""
        if config.label_ids_to_fuse is not None:
            self.label_ids_to_fuse = config.label_ids_to_fuse
            self.label_ids_to_fuse_among = config.num_labels
        if self.num_labels is not None:
            self.num_labels = config.num_labels

    @classmethod
    def from_model_config(cls, config: Any, **overrides: Any) -> "FaiM2FImageProcessor":
        """Creates an image processor with the post-processing settings of a model's configuration.

        The configuration's `ignore_value` becomes `ignore_index`, unless it is 255 and a class has that id.

        Args:
            config: a `FaiM2FConfig`, or an object with its `cls_sigmoid`, `threshold`, `mask_threshold`, `top_k`,
                `use_mask_score`, `predict_all_pixels` and, optionally, `filter_empty_masks`, `label_ids_to_fuse`,
                `num_labels`, `ignore_value`, `mask_stride` and `num_channels`.
            overrides: settings that take precedence.
        """
        names = ["cls_sigmoid", "threshold", "mask_threshold", "top_k", "use_mask_score", "predict_all_pixels"]
        values = {name: getattr(config, name) for name in names}
        optional = ("filter_empty_masks", "label_ids_to_fuse", MASK_STRIDE, NUM_CHANNELS)
        values.update({name: getattr(config, name) for name in optional if hasattr(config, name)})
        num_labels, ignore_value = (getattr(config, name, None) for name in ("num_labels", "ignore_value"))
        if num_labels is not None and ignore_value is not None:
            values["ignore_index"] = ignored_class_id(ignore_value, num_labels)
        processor = cls(**{**values, **overrides})
        if processor.label_ids_to_fuse is not None:
            processor.label_ids_to_fuse_among = num_labels
        return processor

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Creates an image processor from the dictionary of `to_dict` or a file; settings in `kwargs` override it.

        Unknown keys of the dictionary are dropped and listed in one warning. `AutoImageProcessor` and `pipeline` also
        pass keywords for the download or the model. Therefore an unknown keyword raises an error only if it resembles a
        setting, and is otherwise ignored, as in transformers. With `return_unused_kwargs=True` such keywords are
        returned together with the image processor.

        Raises:
            TypeError: a keyword that misspells a setting; the message names the setting.
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        kwargs = with_own_names(kwargs)
        own = (*parameters_of(cls, BaseImageProcessor), MASK_STRIDE, NUM_CHANNELS)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        if not return_unused_kwargs:
            refuse_unknown(near_settings(kwargs), SETTINGS, cls.__name__)
        values = with_own_names(image_processor_dict)
        if "label_ids_to_fuse" in overrides:
            values.pop(FUSE_AMONG, None)
        channels = overrides.get(NUM_CHANNELS)
        for name in ("image_mean", "image_std"):  # spread over the channels like the model's weights
            if channels is not None and isinstance(values.get(name), list) and values[name]:
                values[name] = spread_values(values[name], channels)
        unknown = sorted(set(values) - {*own, *SERVICE_KEYS, "auto_map", FUSE_AMONG})
        if unknown:  # written by a later version or the user: published folders stay readable
            logger.warning_once(
                f"{cls.__name__}: unknown keys in the image processor's configuration are ignored: "
                f"{', '.join(unknown)}."
            )
        known = {name: value for name, value in values.items() if name not in unknown}
        processor = cls(**{**known, **overrides})
        return (processor, kwargs) if return_unused_kwargs else processor

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Like transformers' `from_json_file`, but as lenient as `from_dict`."""
        with open(json_file, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not None, and the keys by which transformers finds this class.

        Raises:
            ValueError: a setting was changed to an invalid value; the message names it.
        """
        # transformers 4.57 saves "_processor_class" without its underscore; 5.x has no such attribute.
        names = [*SETTINGS, *parameters_of(type(self), BaseImageProcessor), FUSE_AMONG, "auto_map", "_processor_class"]
        values = {name: copy.deepcopy(getattr(self, name, None)) for name in names}
        values |= {name: check(name, values[name]) for name, check in SETTINGS.items() if values[name] is not None}
        values[MASK_STRIDE] = None if self.mask_stride == USUAL_STRIDE else self.mask_stride
        values[NUM_CHANNELS] = None if self.num_channels == RGB else self.num_channels
        saved = {name: value for name, value in values.items() if value is not None or name == "intermediate_size"}
        return {**saved, "image_processor_type": type(self).__name__}

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Like transformers' method; raises ValueError for an invalid setting before it writes anything."""
        self.to_dict()
        return super().save_pretrained(save_directory, **kwargs)

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
        """Reads, resizes, rescales, normalizes and pads a batch of images, and creates labels from segmentation maps.

        Args:
            images: one image or several; see `load_images` for the accepted forms. They are rotated upright by their
                EXIF orientation, like `PIL.ImageOps.exif_transpose`; `target_sizes` are sizes of upright images.
            segmentation_maps: for each image the id of a class (or an instance) at every pixel; of the same size as the
                upright image. Pass gray files of 2 and 4 bits as paths: Pillow scales their ids when it decodes them.
            instance_id_to_semantic_id: class of each instance id; one dictionary for all maps, or one per map.
            input_data_format: "channels_first", "channels_last", or None to infer it from each array's shape.
            return_tensors: "pt" for torch tensors, "np" for NumPy arrays, None for lists of NumPy arrays.
            data_format: layout of `pixel_values`: "channels_first" (also None), which the model expects, or
                "channels_last", (B, H, W, num_channels).
            device: device on which to process and return the images; None for the images' own device.
            overrides: settings up to `num_labels`, for this call.

        Returns:
            - **pixel_values** (B, num_channels, H, W), float32; 0 in the padding.
            - **pixel_mask** (B, H, W), int64; 1 on the image, 0 on the padding.
            - **mask_labels** list of (n_i, H, W), float32, 1 on the segment, 0 elsewhere; only with
              `segmentation_maps`.
            - **class_labels** list of (n_i,), int64; only with `segmentation_maps`.

            Labels are on the device of the segmentation maps.

        Raises:
            TypeError: an unknown keyword; the message suggests the closest valid name.
            ValueError: an invalid image, map or setting; the message names it and gives the reason.
        """
        settings = self._settings_of_call(overrides)
        _check_return_tensors(return_tensors)
        if data_format not in (None, "channels_first", "channels_last"):
            raise ValueError(f"data_format must be 'channels_first', 'channels_last' or None, got {data_format!r}.")
        pixels, sizes, new_sizes = [], [], []
        loaded = load_images(images, input_data_format, settings["do_rescale"], self.num_channels)
        for i, image in enumerate(loaded):
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

    def _settings_of_call(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """All preprocessing settings: from the call if passed there, else from the image processor."""
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
        for name in ("image_mean", "image_std"):
            settings[name] = fit_channels(name, settings[name], self.num_channels)
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
        whole = padded_sizes(sizes, settings)
        if return_tensors is not None and len(set(whole)) > 1:
            raise ValueError(
                f"The images have different sizes {sorted(set(whole))} (height, width) and do_pad is False, so "
                "they do not fit into one tensor: pad, choose a fixed size, or leave return_tensors out."
            )
        device = images[0].device
        for i, image in enumerate(images):
            if image.device != device:
                raise ValueError(f"image {i} is on {image.device} but image 0 on {device}: move them to one device.")

        warn_of_scale(settings, images)
        scale, shift = (values.to(device) for values in scale_and_shift(settings))
        values: Tensor | list[Tensor]
        masks: Tensor | list[Tensor]
        if len(set(whole)) == 1:
            values = torch.empty((len(images), len(scale), *whole[0]), dtype=torch.float32, device=device)
            masks = torch.empty((len(images), *whole[0]), dtype=torch.int64, device=device)
        else:
            values = [torch.empty((len(scale), *size), dtype=torch.float32, device=device) for size in whole]
            masks = [torch.empty(size, dtype=torch.int64, device=device) for size in whole]
        for image, (height, width), value, mask in zip(images, sizes, values, masks, strict=True):
            # Normalizes directly into the batch, in one pass. A gray image broadcasts to three channels.
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
            # Lists, because images have different numbers of segments.
            labels = labels_of_maps(maps, whole, instance_id_to_semantic_id, settings)
            data["mask_labels"], data["class_labels"] = (
                list(column) if return_tensors == "pt" else [_to_numpy(tensor) for tensor in column]
                for column in zip(*labels, strict=True)
            )
        return BatchFeature(data)


def _check_return_tensors(return_tensors: str | None) -> None:
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}.")


def _in_type(values: Tensor | list[Tensor], return_tensors: str | None) -> Any:
    if return_tensors == "pt":
        return values
    arrays = [_to_numpy(value) for value in values]
    return arrays if return_tensors is None else np.stack(arrays)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


__all__ = ["FaiM2FImageProcessor", "resized_size", "scale_and_shift"]
