"""FAI-M2F for semantic, instance and panoptic segmentation, as a transformers model.

The backbone's feature maps go through the pixel decoder and the transformer decoder. This file combines the three,
implements the model interface of transformers, and registers the classes with the Auto classes.
"""

import copy
import os
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PretrainedConfig, PreTrainedModel

# From a local folder, transformers 4.57 copies only the modules that the entry module imports directly. The imports
# marked `noqa` are needed by the other imports.
from .argmax_faim2f import resized_argmax  # noqa: F401
from .attention_faim2f import FaiM2FAttention  # noqa: F401
from .backbone_resnet import FaiM2FResNetBackbone, FaiM2FResNetConfig
from .backbone_stdc import STDCBackbone, STDCConfig
from .channels_faim2f import SpreadsChannels
from .compatibility_faim2f import CheckpointsWithoutReentry, initialize_with, returns_dictionary
from .configuration_checks_faim2f import ReadFromFile  # noqa: F401
from .configuration_faim2f import FaiM2FConfig
from .focoos_post_processing_faim2f import post_process_detections  # noqa: F401
from .handler import EndpointHandler  # noqa: F401
from .image_bands_faim2f import read_bands  # noqa: F401
from .image_files_faim2f import open_image  # noqa: F401
from .image_loading_faim2f import load_images  # noqa: F401
from .image_processing_faim2f import FaiM2FImageProcessor
from .image_settings_faim2f import SETTINGS  # noqa: F401
from .inference_api_faim2f import SegmentationRequests  # noqa: F401
from .inference_faim2f import compile_network, prepare_for_inference
from .loss_faim2f import FaiM2FLoss
from .outputs_faim2f import (
    FaiM2FForSemanticSegmentationOutput,
    FaiM2FForUniversalSegmentationOutput,
    fused_classes,
    semantic_logits,
)
from .padding_faim2f import fill_padding, group_by_size, image_sizes, join_outputs, masks_in_frame
from .pixel_decoder_bisenet import FaiM2FBiSeNetPixelDecoder
from .pixel_decoder_faim2f import (
    FaiM2FDeformablePixelDecoder,
    FaiM2FPixelDecoder,
    FaiM2FPointWeights,
    FaiM2FSamplingOffsets,
)
from .point_sampling_faim2f import sample_points  # noqa: F401
from .post_processing_faim2f import post_process_semantic_segmentation  # noqa: F401
from .remote_code_faim2f import AUTO_MAP, copy_remote_code, register
from .resize_faim2f import BilinearResize  # noqa: F401
from .segmentation_labels_faim2f import segments_of_class_maps
from .segmentation_post_processing_faim2f import SegmentationPostProcessing  # noqa: F401
from .transformer_decoder_faim2f import FaiM2FTransformerDecoder

# Backbones that AutoBackbone does not know. They are found by model type, because a configuration loaded as remote code
# is not an instance of the class imported here.
OWN_BACKBONES: dict[str, tuple[Any, Any]] = {
    STDCConfig.model_type: (STDCConfig, STDCBackbone),
    FaiM2FResNetConfig.model_type: (FaiM2FResNetConfig, FaiM2FResNetBackbone),
}
PIXEL_DECODERS: dict[str, Any] = {
    "fpn": FaiM2FPixelDecoder,
    "deformable": FaiM2FDeformablePixelDecoder,
    "bisenet": FaiM2FBiSeNetPixelDecoder,
}


class FaiM2FPreTrainedModel(SpreadsChannels, CheckpointsWithoutReentry, PreTrainedModel):
    config_class = FaiM2FConfig
    base_model_prefix = "faim2f"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # Their forwards combine the outputs of several children, which must be on one device.
    _no_split_modules = """FaiM2FPixelDecoder FaiM2FDeformablePixelDecoder FaiM2FBiSeNetPixelDecoder
        FaiM2FTransformerDecoder STDCBlock RTDetrResNetBasicLayer RTDetrResNetBottleNeckLayer ResNetBasicLayer
        ResNetBottleNeckLayer InferenceResidualBlock""".split()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # With torch's own functions, which transformers 5.x prevents from changing loaded weights.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, FaiM2FSamplingOffsets):
            nn.init.zeros_(module.weight)
            initialize_with(module.bias, module.first_offsets())
        elif isinstance(module, nn.Linear):
            initialize = nn.init.zeros_ if isinstance(module, FaiM2FPointWeights) else nn.init.xavier_uniform_
            initialize(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            for name, buffer in module.named_buffers(recurse=False):  # a batch norm's statistics and counter
                nn.init.constant_(buffer, 1 if name == "running_var" else 0)

    def save_pretrained(
        self, save_directory: "str | os.PathLike[str]", is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Like transformers' method, but also saves the model code, so that the folder loads without this package.

        Raises:
            ValueError: the model was optimized for inference, or a value in its configuration is invalid.
        """
        if getattr(self, "is_optimized_for_inference", False):
            raise ValueError(
                "A model that was optimized for inference has lost its batch norms and cannot be saved: save it before "
                "`optimize_for_inference()`, or load it again."
            )
        self.config._check_values()  # it may have been changed, and could not be loaded
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process and not os.path.isfile(save_directory):
            # Copied before the weights, so that push_to_hub=True uploads a complete folder.
            os.makedirs(save_directory, exist_ok=True)
            copy_remote_code(save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


class FaiM2FForUniversalSegmentation(FaiM2FPreTrainedModel):
    """FAI-M2F / FAI-MF, a fast Mask2Former without deformable attention; BiSeNetFormer; and Mask2Former itself.

    ```python
    model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    image = ImageOps.exif_transpose(Image.open("photo.jpg"))  # upright, as the image processor reads it
    inputs = processor(image, return_tensors="pt")
    outputs = model(**inputs)
    label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
    ```
    """

    is_optimized_for_inference = False

    def __init__(self, config: FaiM2FConfig) -> None:
        if "keys_to_ignore_at_inference" in vars(config):  # a semantic model's, whose predictions are other outputs
            config = copy.deepcopy(config)
            del config.keys_to_ignore_at_inference
        super().__init__(config)
        self.backbone = self._build_backbone(config.backbone_config)
        self.pixel_decoder = PIXEL_DECODERS[config.pixel_decoder_type](config, list(self.backbone.channels))
        self.transformer_decoder = FaiM2FTransformerDecoder(config)
        self.criterion = FaiM2FLoss(config)
        self.post_init()
        self._freeze()

    @staticmethod
    def _build_backbone(config: PretrainedConfig) -> PreTrainedModel:
        if config.model_type in OWN_BACKBONES:
            return OWN_BACKBONES[config.model_type][1](config)
        if type(config) in AutoBackbone._model_mapping and not AutoBackbone._model_mapping[type(config)]._supports_sdpa:
            # Do not force the model's attention implementation on a backbone that has only one.
            config._attn_implementation = None
        return AutoBackbone.from_config(config)

    def train(self, mode: bool = True) -> "FaiM2FForUniversalSegmentation":
        """Sets training or evaluation mode; frozen parts of the backbone stay frozen.

        Raises:
            ValueError: the model was optimized for inference.
        """
        if mode and self.is_optimized_for_inference:
            raise ValueError("A model that was optimized for inference cannot be trained: load it again.")
        super().train(mode)
        if mode:
            self._freeze()
        # PEFT does not save the statistics of frozen layers with its adapters, so they must not change.
        for module in self.modules() if mode and hasattr(self, "peft_config") else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self

    def _freeze(self) -> None:
        """Freezes the configured parts; also at the start, as DistributedDataParallel looks before `train()`."""
        for stage in self._frozen_stages():
            stage.requires_grad_(False)
        for module in self.backbone.modules() if self.config.backbone_freeze_norm else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval().requires_grad_(False)

    def _frozen_stages(self) -> list[nn.Module]:
        """The stem and stages that `backbone_freeze_at` freezes."""
        count = self.config.backbone_freeze_at
        if count < 0:
            return []
        backbone: Any = self.backbone
        if hasattr(backbone, "stem") and hasattr(backbone, "stages"):
            return [backbone.stem, *backbone.stages[:count]]
        if hasattr(backbone, "embedder") and hasattr(getattr(backbone, "encoder", None), "stages"):
            return [backbone.embedder, *backbone.encoder.stages[:count]]
        raise ValueError(
            f"FaiM2FConfig: `backbone_freeze_at` = {count} is for STDC and ResNet; of {type(backbone).__name__} freeze "
            "parameters yourself by `requires_grad_(False)`."
        )

    def optimize_for_inference(self, compile: bool = False) -> "FaiM2FForUniversalSegmentation":
        """Makes inference faster, in-place, and returns the model; the outputs change only by rounding.

        Folds batch norms into the preceding convolutions, fuses ReLUs into them, and stores weights and feature maps
        channels-last. Afterward, the model is in evaluation mode, without gradients, and can be neither trained nor
        saved. It can be copied, moved to a device, cast and compiled, before or after.

        Args:
            compile: also compile the network when it first runs; see `compile_network`.
        """
        self.eval().requires_grad_(False)
        if not self.is_optimized_for_inference:
            prepare_for_inference(self)
            self.is_optimized_for_inference = True
        if compile:
            compile_network(self)
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        """None: the model has no embedding table. (Quantization tools call this to exclude such a table.)"""
        return None

    def set_attn_implementation(self, attn_implementation: "str | dict[str, str]", **kwargs: Any) -> None:
        """Like transformers' method, but does not change a backbone that has only one implementation."""
        if isinstance(attn_implementation, str) and not self.backbone._supports_sdpa:
            unchanged = self.backbone.config._attn_implementation
            attn_implementation = {"": attn_implementation, "backbone_config": unchanged}
        super().set_attn_implementation(attn_implementation, **kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> FaiM2FForUniversalSegmentationOutput | tuple[Any, ...]:
        """
        Args:
            pixel_values: (B, num_channels, H, W), normalized as by `FaiM2FImageProcessor`; H and W at least 32.
            mask_labels: for each image (n_i, H, W), the mask of each segment: bool, or numbers from 0 to 1; or a map of
                segment ids (H, W), see `FaiM2FLoss`. With `pixel_mask`, also of the size of the image without padding.
            class_labels: for each image (n_i,), the class id of each segment, 0..num_labels-1.
            pixel_mask: (B, H, W), 1 on the image and 0 on the padding, as returned by the image processor. In
                evaluation mode each image gets the same logits as without padding, and its masks are filled up to the
                batch's size with `PADDING_LOGIT` (`padding_faim2f.py`). In training, with labels, and in a compiled or
                traced model, padding is processed like any other pixels, as in the original models.
            output_hidden_states, output_auxiliary_logits, output_attentions: what else to return; None for the
                configuration's value.
            return_dict: False for a tuple.
            num_items_in_batch: number of masks in the whole (accumulated, distributed) batch, by which the losses are
                divided; None for the number in this batch.

        Raises:
            ValueError: the inputs are inconsistent; the message says how.
        """
        if not isinstance(pixel_values, Tensor):
            kind = type(pixel_values).__name__
            raise ValueError(f"pixel_values is a {kind}, not a tensor: give the image processor return_tensors='pt'.")
        config, shape = self.config, tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != config.num_channels:
            raise ValueError(f"pixel_values must be of shape (B, {config.num_channels}, H, W), got {shape}.")
        if (mask_labels is not None or class_labels is not None) and getattr(self, "_is_replica", False):
            raise ValueError("DataParallel splits each image's masks, not the list of images: run one process per GPU.")
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("mask_labels and class_labels go together: give both to get a loss, or neither.")
        asked = {
            "output_hidden_states": output_hidden_states,
            "output_auxiliary_logits": output_auxiliary_logits,
            "output_attentions": output_attentions,
        }
        options = {name: bool(getattr(config, name) if value is None else value) for name, value in asked.items()}
        sizes: list[tuple[int, int]] = []
        if pixel_mask is not None:
            wanted = (shape[0], *shape[2:])
            if pixel_mask.shape != wanted:
                raise ValueError(f"pixel_mask must be of shape {wanted} (B, H, W), got {tuple(pixel_mask.shape)}.")
            pixel_mask = pixel_mask.to(pixel_values.device)
            if not (self.training or torch.compiler.is_compiling() or torch.jit.is_tracing()):
                sizes = image_sizes(pixel_mask)
        labels = None
        if mask_labels is not None:
            frame = (pixel_values.shape[2], pixel_values.shape[3])
            labels = (masks_in_frame(mask_labels, frame, pixel_mask), class_labels, num_items_in_batch)
        if any(size != tuple(pixel_values.shape[2:]) for size in sizes):
            output = self._run_by_size(pixel_values, sizes, options)
            if labels is not None:  # the loss is computed on padded images, as in training
                padded = self._run(pixel_values, labels=labels)
                output = type(output)(**{**output, "loss": padded.loss, "loss_dict": padded.loss_dict})
        else:
            output = self._run(pixel_values, pixel_mask, labels, **options)
        return output if returns_dictionary(config, return_dict) else output.to_tuple()

    def _run(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: tuple[Any, Any, Any] | None = None,
        output_hidden_states: bool = False,
        output_auxiliary_logits: bool = False,
        output_attentions: bool = False,
    ) -> FaiM2FForUniversalSegmentationOutput:
        """Runs the network on the whole batch. `labels`: mask labels, class labels, number of items in the batch."""
        if self.is_optimized_for_inference:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        supervise = labels is not None and self.config.use_auxiliary_loss
        feature_maps = self.backbone(pixel_values, return_dict=True).feature_maps
        pixels = self.pixel_decoder(feature_maps)
        decoded = self.transformer_decoder(
            pixels.pyramid,
            pixels.mask_features,
            intermediate=supervise or output_auxiliary_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        loss, loss_dict, auxiliary_logits = None, None, None
        if labels is not None:
            masks, classes, count = labels
            auxiliary = [
                {"class_queries_logits": class_logits, "masks_queries_logits": product}
                for class_logits, product in decoded.intermediate
            ]
            loss_dict = self.criterion(
                decoded.mask_product, decoded.class_logits, masks, classes, auxiliary if supervise else None, count
            )
            loss = sum(loss_dict.values())
        if output_auxiliary_logits:
            auxiliary_logits = [
                {"class_queries_logits": classes, "masks_queries_logits": fill_padding(masks.full(), pixel_mask)}
                for classes, masks in decoded.intermediate
            ]
        return FaiM2FForUniversalSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            class_queries_logits=decoded.class_logits,
            masks_queries_logits=fill_padding(decoded.mask_logits, pixel_mask),
            auxiliary_logits=auxiliary_logits,
            hidden_states=tuple(decoded.hidden_states) if output_hidden_states else None,
            attentions=tuple(decoded.self_attentions) if output_attentions else None,
            cross_attentions=tuple(decoded.cross_attentions) if output_attentions else None,
            fused_classes=fused_classes(decoded.class_logits, self.config),
        )

    def _run_by_size(
        self, pixel_values: Tensor, sizes: list[tuple[int, int]], options: dict[str, Any]
    ) -> FaiM2FForUniversalSegmentationOutput:
        """Runs the images (B, C, H, W) in groups of equal size, cropped to their `sizes` (height, width).

        Raises:
            ValueError: cross-attentions are requested, whose shapes would differ.
        """
        if options["output_attentions"] and len(set(sizes)) > 1:
            raise ValueError(
                "output_attentions: images of different sizes have cross-attentions of different shapes; run images of "
                "one size together."
            )
        groups = group_by_size(sizes)
        parts = []
        for places in groups:
            height, width = sizes[places[0]]
            parts.append(self._run(pixel_values[places, :, :height, :width], **options))
        frame, stride = pixel_values.shape[2:], self.config.mask_stride
        # Along a side that an image fills, the masks are as large as its own; a vision transformer rounds down.
        filled = [side in own for side, own in zip(frame, zip(*sizes, strict=True), strict=True)]
        grid = [0 if fills else -(-side // stride) for side, fills in zip(frame, filled, strict=True)]
        values = join_outputs(groups, parts, grid)
        fused = fused_classes(values["class_queries_logits"], self.config)
        return FaiM2FForUniversalSegmentationOutput(**values, fused_classes=fused)


class FaiM2FForSemanticSegmentation(FaiM2FForUniversalSegmentation):
    """The same model and weights, with the inputs and outputs of `AutoModelForSemanticSegmentation`.

    A folder saved by either class loads in both. transformers' Trainer gathers only `logits` as predictions.

    ```python
    outputs = model(pixel_values=pixel_values, labels=labels)
    logits = torch.nn.functional.interpolate(outputs.logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    label_maps = logits.argmax(dim=1)
    ```
    """

    # 4.57 stores in the universal class the Auto class that loaded it, and would save this class under that name.
    _auto_class = None

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__(copy.deepcopy(config))  # so that the next line changes only this model
        names = [field.name for field in fields(FaiM2FForSemanticSegmentationOutput)]
        self.config.keys_to_ignore_at_inference = [name for name in names if name not in ("loss", "logits")]

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> FaiM2FForSemanticSegmentationOutput | tuple[Any, ...]:
        """
        Args:
            pixel_values, pixel_mask, output_hidden_states, output_auxiliary_logits, output_attentions, return_dict: as
                in `FaiM2FForUniversalSegmentation`.
            labels: (B, H, W), the class id of each pixel, or the configuration's `ignore_value` (255) for unlabeled
                pixels. They cover the same area as `pixel_values`, at any resolution. The loss is that of the universal
                model, with one mask per class and image.

        Raises:
            ValueError: the inputs are inconsistent; the message says how.
        """
        masks, classes = None, None
        if labels is not None:
            masks, classes = segments_of_class_maps(labels, self.config.num_labels, self.config.ignore_value)
        outputs: Any = super().forward(
            pixel_values,
            mask_labels=masks,
            class_labels=classes,
            pixel_mask=pixel_mask,
            output_hidden_states=output_hidden_states,
            output_auxiliary_logits=output_auxiliary_logits,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = semantic_logits(
            outputs["class_queries_logits"], outputs["masks_queries_logits"], self.config.cls_sigmoid
        )
        output = FaiM2FForSemanticSegmentationOutput(logits=logits, **outputs)
        return output if returns_dictionary(self.config, return_dict) else output.to_tuple()


MODELS: list[Any] = [FaiM2FForUniversalSegmentation, FaiM2FForSemanticSegmentation]
register(FaiM2FConfig, FaiM2FImageProcessor, MODELS, list(OWN_BACKBONES.values()))

__all__ = [
    "FaiM2FForSemanticSegmentation",
    "FaiM2FForSemanticSegmentationOutput",
    "FaiM2FForUniversalSegmentation",
    "FaiM2FForUniversalSegmentationOutput",
    "FaiM2FPreTrainedModel",
]
