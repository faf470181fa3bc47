"""FAI-M2F for semantic, instance and panoptic segmentation, as a transformers model.

The backbone's feature maps go through `pixel_decoder_faim2f` and `transformer_decoder_faim2f`; this file joins them,
holds what transformers asks of a model, and registers it with the Auto classes, also where it runs as remote code.
"""

import copy
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.utils import ModelOutput

# transformers 4.57 brings, of a local folder's code, only the files that the entry file itself imports. Every file
# that this one needs, however indirectly, is therefore named here.
from .attention_faim2f import FaiM2FAttention  # noqa: F401
from .backbone_resnet import FaiM2FResNetBackbone
from .backbone_stdc import STDCBackbone
from .compatibility_faim2f import initialize_with, returns_dictionary
from .configuration_faim2f import FaiM2FConfig, FaiM2FResNetConfig, STDCConfig
from .deformable_pixel_decoder_faim2f import (
    FaiM2FDeformablePixelDecoder,
    FaiM2FPointWeights,
    FaiM2FSamplingOffsets,
)
from .image_loading_faim2f import load_images  # noqa: F401
from .image_processing_faim2f import FaiM2FImageProcessor
from .image_settings_faim2f import SETTINGS  # noqa: F401
from .inference_faim2f import fold_normalizations, images_at_once
from .loss_faim2f import FaiM2FLoss
from .mask_product_faim2f import MaskProduct  # noqa: F401
from .padding_faim2f import fill_padding, image_sizes, stack_masks
from .pixel_decoder_faim2f import FaiM2FPixelDecoder
from .point_sampling_faim2f import sample_points  # noqa: F401
from .position_embedding_faim2f import sine_position_embedding  # noqa: F401
from .post_processing_faim2f import post_process_semantic_segmentation  # noqa: F401
from .remote_code_faim2f import AUTO_MAP, MODEL_AUTO_CLASS_NAMES, copy_remote_code
from .resize_faim2f import BilinearResize  # noqa: F401
from .segmentation_labels_faim2f import resize_segmentation_map  # noqa: F401
from .semantic_segmentation_faim2f import segments_of_class_maps, semantic_logits
from .transformer_decoder_faim2f import FaiM2FTransformerDecoder

# Backbones that AutoBackbone does not have: one line a kind. By model type, because a configuration that came as
# remote code is of a class of its own, which is not the one imported here.
OWN_BACKBONES: dict[str, tuple[Any, Any]] = {
    STDCConfig.model_type: (STDCConfig, STDCBackbone),
    FaiM2FResNetConfig.model_type: (FaiM2FResNetConfig, FaiM2FResNetBackbone),
}
PIXEL_DECODERS: dict[str, Any] = {"fpn": FaiM2FPixelDecoder, "deformable": FaiM2FDeformablePixelDecoder}


@dataclass
class FaiM2FForUniversalSegmentationOutput(ModelOutput):
    """What `FaiM2FForUniversalSegmentation` returns; the image processor's `post_process_*` methods take it.

    Args:
        loss: (), the weighted sum; only with `mask_labels` and `class_labels`.
        loss_dict: every named component of it, weighted: `loss_ce`, `loss_mask`, `loss_dice`, and the same with `_i`
            for the i-th intermediate prediction.
        class_queries_logits: (B, Q, num_labels + 1), raw; the last class is "no object".
        masks_queries_logits: (B, Q, H/4, W/4), raw: the sigmoid is the probability of a pixel. Where `pixel_mask` marks
            padding they are `PADDING_LOGIT` (-100.5), and the processor's `post_process_*` cut that off.
        auxiliary_logits: the intermediate predictions, each a dictionary of the two names above.
        hidden_states: the queries (B, Q, hidden_dim) before the first and after each decoder layer.
        attentions: the decoder's self-attention (B, heads, Q, Q) per layer.
        cross_attentions: the decoder's cross-attention (B, heads, Q, h * w) per layer, at 1/32, 1/16, 1/8 in turn.
        fused_classes: (B, num_labels), bool: the stuff, `label_ids_to_fuse` of the configuration, for the image
            processor; None where the configuration does not say which classes are stuff.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    fused_classes: Tensor | None = None


class FaiM2FPreTrainedModel(PreTrainedModel):
    config_class = FaiM2FConfig
    base_model_prefix = "faim2f"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = [
        "FaiM2FDecoderLayer",
        "FaiM2FEncoderLayer",
        "FaiM2FDeformableLayer",
        "FaiM2FMaskEmbedder",
        "STDCBlock",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own functions: transformers 5.x guards them against touching weights that were loaded.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, FaiM2FSamplingOffsets):
            nn.init.zeros_(module.weight)
            initialize_with(module.bias, module.first_offsets())
        elif isinstance(module, FaiM2FPointWeights):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            for name, buffer in module.named_buffers(recurse=False):  # a batch norm's statistics and counter
                nn.init.constant_(buffer, 1 if name == "running_var" else 0)

    @classmethod
    def from_pretrained(cls, *inputs: Any, **kwargs: Any) -> Any:
        """As transformers'; buffers are offloaded with their weights unless `offload_buffers=False`."""
        # Of a batch norm that is on disk, 4.57 would otherwise use the initial statistics, without a word.
        kwargs.setdefault("offload_buffers", True)
        return super().from_pretrained(*inputs, **kwargs)

    def save_pretrained(
        self, save_directory: "str | os.PathLike[str]", is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As transformers', and with the remote code, so that the folder loads by itself wherever it goes.

        Raises:
            ValueError: the model was optimized for inference, and its weights are no longer those of its configuration.
        """
        if getattr(self, "is_optimized_for_inference", False):
            raise ValueError(
                "A model that was optimized for inference has lost its batch norms and cannot be saved: save it before "
                "`optimize_for_inference()`, or load it again."
            )
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process and not os.path.isfile(save_directory):
            # First, so that what transformers uploads where push_to_hub is asked for is whole.
            os.makedirs(save_directory, exist_ok=True)
            copy_remote_code(save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


class FaiM2FForUniversalSegmentation(FaiM2FPreTrainedModel):
    """FAI-M2F / FAI-MF: Mask2Former without deformable attention, made for speed; and Mask2Former itself.

    ```python
    model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    image = ImageOps.exif_transpose(Image.open("photo.jpg"))  # upright, as the processor sees it
    inputs = processor(image, return_tensors="pt")
    outputs = model(**inputs)
    label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
    ```
    """

    is_optimized_for_inference = False

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__(config)
        self.backbone = self._build_backbone(config.backbone_config)
        self.pixel_decoder = PIXEL_DECODERS[config.pixel_decoder_type](config, list(self.backbone.channels))
        self.transformer_decoder = FaiM2FTransformerDecoder(config)
        self.criterion = FaiM2FLoss(config)
        self._frozen_stages()  # refuses, at once, a backbone that cannot be frozen as asked
        self.post_init()

    @staticmethod
    def _build_backbone(config: PretrainedConfig) -> PreTrainedModel:
        if config.model_type in OWN_BACKBONES:
            return OWN_BACKBONES[config.model_type][1](config)
        if type(config) in AutoBackbone._model_mapping and not AutoBackbone._model_mapping[type(config)]._supports_sdpa:
            # An implementation asked of the whole model is not asked of a backbone that has no choice of them.
            config._attn_implementation = None
        return AutoBackbone.from_config(config)

    def _frozen_stages(self) -> list[nn.Module]:
        """The stem and the stages that `backbone_freeze_at` freezes; ValueError if the backbone has no such parts."""
        count = self.config.backbone_freeze_at
        if count < 0:
            return []
        if hasattr(self.backbone, "stem") and hasattr(self.backbone, "stages"):
            stem, stages = self.backbone.stem, self.backbone.stages
        elif hasattr(self.backbone, "embedder") and hasattr(getattr(self.backbone, "encoder", None), "stages"):
            stem, stages = self.backbone.embedder, self.backbone.encoder.stages
        else:
            raise ValueError(
                f"FaiM2FConfig: `backbone_freeze_at` = {count} is for STDC and ResNet; of "
                f"{type(self.backbone).__name__} freeze parameters yourself by `requires_grad_(False)`."
            )
        return [stem, *stages[:count]]

    def train(self, mode: bool = True) -> "FaiM2FForUniversalSegmentation":
        """Training mode, in which what the configuration freezes of the backbone stays as it is.

        Raises:
            ValueError: the model was optimized for inference.
        """
        if mode and self.is_optimized_for_inference:
            raise ValueError(
                "A model that was optimized for inference lost its batch norms and cannot be trained: load it again."
            )
        super().train(mode)
        for stage in self._frozen_stages() if mode else []:
            stage.requires_grad_(False)
        if mode and self.config.backbone_freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(False)
        return self

    def optimize_for_inference(self) -> "FaiM2FForUniversalSegmentation":
        """Makes the model faster at the same answers (but for rounding), in place, for prediction only.

        Batch norms go into the convolutions before them, weights and maps are laid out channels last, and a CPU runs
        large batches in parts. The model is in evaluation mode then, without gradients, and can neither be trained
        nor saved. It can be copied, moved to a device, cast and compiled, before or after.

        Returns:
            the model itself.
        """
        self.eval().requires_grad_(False)
        if not self.is_optimized_for_inference:
            fold_normalizations(self)
            self.to(memory_format=torch.channels_last)
            self.is_optimized_for_inference = True
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        """None: pixels have no table of embeddings. Who quantizes a model asks, to leave such a table as it is."""
        return None

    def set_attn_implementation(self, attn_implementation: "str | dict[str, str]", **kwargs: Any) -> None:
        """As transformers', but a backbone that has no choice of implementations is left as it is."""
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
            pixel_values: (B, 3, H, W), normalized as `FaiM2FImageProcessor` does; any H and W of at least 32.
            mask_labels: per image (n_i, H, W), the mask of each segment: bool, or numbers from 0 to 1; or a map of
                segment ids (H, W), see `FaiM2FLoss`.
            class_labels: per image (n_i,), the class id of each segment, 0..num_labels-1.
            pixel_mask: (B, H, W), 1 on the image and 0 on the padding, as the processor returns it. Evaluated images
                get the logits that each of them gets alone, and `PADDING_LOGIT` fills their masks up to the batch's
                size (`padding_faim2f.py`). In training, and for the loss, the network sees padding like any pixel, as
                in the originals, and so it does where the model is compiled or traced.
            output_hidden_states, output_auxiliary_logits, output_attentions: what else to return.
            return_dict: False for a tuple.
            num_items_in_batch: masks in the whole (accumulated, distributed) batch, to average the losses over;
                by default those of this batch.

        Raises:
            ValueError: the inputs do not fit each other; the message says which and how.
        """
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be of shape (B, C, H, W), got {tuple(pixel_values.shape)}.")
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("mask_labels and class_labels go together: give both to get a loss, or neither.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_auxiliary_logits is None:
            output_auxiliary_logits = self.config.output_auxiliary_logits
        with_loss = mask_labels is not None
        supervise = with_loss and self.config.use_auxiliary_loss
        wants_dict = returns_dictionary(self.config, return_dict)

        if pixel_mask is not None:
            if pixel_mask.shape != (len(pixel_values), *pixel_values.shape[2:]):
                raise ValueError(
                    f"pixel_mask must be of shape {(len(pixel_values), *pixel_values.shape[2:])} (B, H, W) like "
                    f"pixel_values, got {tuple(pixel_mask.shape)}."
                )
            pixel_mask = pixel_mask.to(pixel_values.device)
            one_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
            sizes = [] if self.training or one_graph else image_sizes(pixel_mask)
            if any(size != tuple(pixel_values.shape[2:]) for size in sizes):
                output = self._each_size_alone(
                    pixel_values, sizes, output_hidden_states, output_auxiliary_logits, output_attentions
                )
                if with_loss:
                    padded: Any = FaiM2FForUniversalSegmentation.forward(
                        self,
                        pixel_values,
                        mask_labels,
                        class_labels,
                        return_dict=True,
                        num_items_in_batch=num_items_in_batch,
                    )
                    output = type(output)(**{**output, "loss": padded.loss, "loss_dict": padded.loss_dict})
                return output if wants_dict else output.to_tuple()

        if self.is_optimized_for_inference:
            more = with_loss or output_hidden_states or output_attentions or output_auxiliary_logits
            parts = [pixel_values] if more else images_at_once(pixel_values)
            if len(parts) > 1:
                class_logits, mask_logits = self._answers_of_parts(parts)
                output = FaiM2FForUniversalSegmentationOutput(
                    class_queries_logits=class_logits,
                    masks_queries_logits=mask_logits,
                    fused_classes=self._fused_classes(class_logits),
                )
                return output if wants_dict else output.to_tuple()
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        feature_maps = self.backbone(pixel_values, return_dict=True).feature_maps
        pixels = self.pixel_decoder(feature_maps)
        decoded = self.transformer_decoder(
            pixels.pyramid,
            pixels.mask_features,
            intermediate=supervise or bool(output_auxiliary_logits),
            output_hidden_states=bool(output_hidden_states),
            output_attentions=bool(output_attentions),
        )
        loss, loss_dict = None, None
        if with_loss:
            auxiliary = [
                {"class_queries_logits": classes, "masks_queries_logits": masks}
                for classes, masks in decoded.intermediate
            ]
            loss_dict = self.criterion(
                decoded.mask_product,
                decoded.class_logits,
                mask_labels,
                class_labels,
                auxiliary if supervise else None,
                num_items_in_batch,
            )
            loss = sum(loss_dict.values())
        auxiliary_logits = None
        if output_auxiliary_logits:
            auxiliary_logits = [
                {"class_queries_logits": classes, "masks_queries_logits": masks.full()}
                for classes, masks in decoded.intermediate
            ]
        mask_logits = decoded.mask_logits
        if pixel_mask is not None:
            mask_logits = fill_padding(mask_logits, pixel_mask)
        output = FaiM2FForUniversalSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            class_queries_logits=decoded.class_logits,
            masks_queries_logits=mask_logits,
            auxiliary_logits=auxiliary_logits,
            hidden_states=tuple(decoded.hidden_states) if output_hidden_states else None,
            attentions=tuple(decoded.self_attentions) if output_attentions else None,
            cross_attentions=tuple(decoded.cross_attentions) if output_attentions else None,
            fused_classes=self._fused_classes(decoded.class_logits),
        )
        return output if wants_dict else output.to_tuple()

    def _each_size_alone(
        self,
        pixel_values: Tensor,
        sizes: list[tuple[int, int]],
        output_hidden_states: bool | None,
        output_auxiliary_logits: bool | None,
        output_attentions: bool | None,
    ) -> FaiM2FForUniversalSegmentationOutput:
        """The outputs of a padded batch: images of one size run together, and none sees padding.

        Args:
            pixel_values: (B, 3, H, W).
            sizes: (height, width) in pixels of each image, without padding.

        Raises:
            ValueError: cross-attentions are asked for, which differ in shape.
        """
        if output_attentions and len(set(sizes)) > 1:
            raise ValueError(
                "output_attentions: images of different sizes have cross-attentions of different shapes; run images of "
                "one size together."
            )
        batch = len(sizes)
        groups = [[i for i, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)]
        parts: list[Any] = []
        for places in groups:
            height, width = sizes[places[0]]
            part = FaiM2FForUniversalSegmentation.forward(
                self,
                pixel_values[places, :, :height, :width],
                output_hidden_states=output_hidden_states,
                output_auxiliary_logits=output_auxiliary_logits,
                output_attentions=output_attentions,
                return_dict=True,
            )
            parts.append(part)
        in_order = torch.tensor([place for places in groups for place in places], device=pixel_values.device).argsort()
        grid = (-(-pixel_values.shape[2] // 4), -(-pixel_values.shape[3] // 4))

        def joined(values: list[Tensor]) -> Tensor:
            return torch.cat(values)[in_order]

        def masks(logits: list[Tensor]) -> Tensor:
            return stack_masks(batch, list(zip(groups, logits, strict=True)), grid)

        values: dict[str, Any] = {
            "class_queries_logits": joined([part.class_queries_logits for part in parts]),
            "masks_queries_logits": masks([part.masks_queries_logits for part in parts]),
        }
        for name in ("hidden_states", "attentions", "cross_attentions"):
            layers = [getattr(part, name) for part in parts]
            if layers[0] is not None:
                values[name] = tuple(joined(list(layer)) for layer in zip(*layers, strict=True))
        if output_auxiliary_logits:
            values["auxiliary_logits"] = [
                {
                    "class_queries_logits": joined([logits["class_queries_logits"] for logits in layer]),
                    "masks_queries_logits": masks([logits["masks_queries_logits"] for logits in layer]),
                }
                for layer in zip(*(part.auxiliary_logits for part in parts), strict=True)
            ]
        return FaiM2FForUniversalSegmentationOutput(
            **values, fused_classes=self._fused_classes(values["class_queries_logits"])
        )

    def _fused_classes(self, class_logits: Tensor) -> Tensor | None:
        """(B, num_labels) for the output; a tensor, as what gathers outputs of several GPUs takes tensors alone."""
        stuff = self.config.label_ids_to_fuse
        if stuff is None:
            return None
        fused = torch.tensor([label in stuff for label in range(self.config.num_labels)])
        # `len` would make the batch a constant of exported graphs.
        return fused.to(class_logits.device, non_blocking=True).expand(class_logits.shape[0], -1)

    def _answers_of_parts(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Runs the batch in parts and copies their logits into preallocated outputs, so that parts share memory."""
        whole: list[Tensor] = []
        start = 0
        for part in parts:
            answers = FaiM2FForUniversalSegmentation.forward(self, part, return_dict=False)[:2]
            if not whole:
                count = sum(map(len, parts))
                whole = [answer.new_empty((count, *answer.shape[1:])) for answer in answers]
            for values, answer in zip(whole, answers, strict=True):
                values[start : start + len(part)] = answer
            del answers, answer
            start += len(part)
        class_logits, mask_logits = whole
        return class_logits, mask_logits


@dataclass
class FaiM2FForSemanticSegmentationOutput(FaiM2FForUniversalSegmentationOutput):
    """What `FaiM2FForSemanticSegmentation` returns: `loss` and `logits` first, then the universal model's output.

    Args:
        logits: (B, num_labels, H/4, W/4), float32: logarithms of the classes' scores, see `semantic_logits`. Enlarge
            them bilinearly and take the argmax, as of any semantic model; or call the image processor's
            `post_process_semantic_segmentation`, which has more: it enlarges the masks before they are summed. Of a
            padded batch they cover the padding, too, where they say nothing: enlarge them to `pixel_values`, and cut
            each image out before it is resized. The image processor does that by itself.
    """

    logits: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("logits", "loss"):
            if name in self:
                self.move_to_end(name, last=False)


class FaiM2FForSemanticSegmentation(FaiM2FForUniversalSegmentation):
    """The same model and weights, with the inputs and outputs of `AutoModelForSemanticSegmentation`.

    A folder of either class loads in both. transformers' Trainer gathers `logits` alone as predictions.

    ```python
    outputs = model(pixel_values=pixel_values, labels=labels)
    logits = torch.nn.functional.interpolate(outputs.logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    label_maps = logits.argmax(dim=1)
    ```
    """

    # Of its own: 4.57 notes in the universal class the Auto class that it came by, and would save this one under it.
    _auto_class = None

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__(copy.deepcopy(config))  # what is set here is not for other models of this configuration
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
            labels: (B, H, W), the class id of each pixel, and the configuration's `ignore_value` (255) where it has
                none. They are of the images as `pixel_values` show them, at this or another resolution. The loss is
                that of the universal model, from one mask for each class in an image.

        Raises:
            ValueError: the inputs do not fit each other; the message says which and how.
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


def _register() -> None:
    """Makes the classes known to the Auto classes, also where they came as remote code.

    Two registrations work by name, for every folder that is read afterwards: a model type's configuration and an
    image processor's class. They belong to the installed package alone. Were remote code to make them,
    transformers 5.x would read the next folder, of another revision perhaps, with the code of the first.
    """
    installed = not __name__.startswith("transformers_modules.")
    if installed:
        AutoConfig.register(FaiM2FConfig.model_type, FaiM2FConfig, exist_ok=True)
        AutoImageProcessor.register(FaiM2FConfig, slow_image_processor_class=FaiM2FImageProcessor, exist_ok=True)
    for config_class, backbone_class in OWN_BACKBONES.values():
        if installed:
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoBackbone.register(config_class, backbone_class, exist_ok=True)
    classes = {kind.__name__: kind for kind in (FaiM2FForUniversalSegmentation, FaiM2FForSemanticSegmentation)}
    for name in MODEL_AUTO_CLASS_NAMES:
        model_class = classes[AUTO_MAP[name].rpartition(".")[2]]
        getattr(transformers, name).register(FaiM2FConfig, model_class, exist_ok=True)
    # The pipeline reads these names alone, and calls a model that is not among them unsupported.
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[FaiM2FConfig.model_type] = tuple(classes)


_register()

__all__ = [
    "FaiM2FForSemanticSegmentation",
    "FaiM2FForSemanticSegmentationOutput",
    "FaiM2FForUniversalSegmentation",
    "FaiM2FForUniversalSegmentationOutput",
    "FaiM2FPreTrainedModel",
]
