"""Configuration of the FAI-M2F model. The configurations of its own backbones are in the backbones' modules."""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, RTDetrResNetConfig
from transformers.activations import ACT2FN

from .backbone_resnet import FaiM2FResNetConfig
from .backbone_stdc import STDCConfig

# From a local folder, transformers 4.57 copies only the modules that the entry module itself imports.
from .compatibility_faim2f import BackboneConfigMixin  # noqa: F401
from .configuration_checks_faim2f import (
    IMPLEMENTATION,
    TRANSFORMERS_KEYS,
    ChannelsOfBackbone,
    ReadFromFile,
    base_values,
    check_flags,
    check_network,
    check_values_of_labels,
    class_names,
    inverted,
    is_int,
    is_number,
    parameters_of,
    refuse_other_number,
    refuse_unknown_keywords,
    require,
    reset_what_labels_meant,
    stride_of_map,
    warn_of_other_ids,
)

# Backbone configurations that are not in transformers' CONFIG_MAPPING.
OWN_BACKBONES: dict[str, Any] = {
    STDCConfig.model_type: STDCConfig,
    FaiM2FResNetConfig.model_type: FaiM2FResNetConfig,
}
# Settings whose meaning depends on the labels, and values that no labels contradict.
OF_LABELS = {"label_ids_to_fuse": None, "label_weights": None, "ignore_value": 255}
POSTPROCESSING_TYPES = ("semantic", "instance", "panoptic")
PIXEL_DECODER_TYPES = ("fpn", "deformable", "bisenet")


def _backbone_class(values: Mapping[str, Any]) -> Any:
    """The configuration class for a backbone's `model_type`; raises ValueError if there is none."""
    model_type = values.get("model_type")
    if model_type in OWN_BACKBONES:
        return OWN_BACKBONES[model_type]
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    nearest = next(iter(difflib.get_close_matches(str(model_type), [*OWN_BACKBONES, *CONFIG_MAPPING], 1)), None)
    hint = f" Did you mean `{nearest}`?" if nearest else ""
    raise ValueError(
        f"backbone_config: model_type {model_type!r} is not a backbone of transformers or this model.{hint}"
    )


def _unread(config_class: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """The keys that a configuration class of transformers does not know."""
    known = {*config_class().to_dict(), *TRANSFORMERS_KEYS, *base_values()}
    yield from (
        name for name in values if name not in known and (name[0] != "_" or IMPLEMENTATION.fullmatch(name) is not None)
    )


def _refuse_unknown_backbone_keywords(config_class: Any, values: Mapping[str, Any]) -> None:
    if config_class in OWN_BACKBONES.values():
        refuse_unknown_keywords(config_class, values)
        return
    for name in _unread(config_class, values):
        nearest = next(iter(difflib.get_close_matches(name, sorted(config_class().to_dict()), 1, 0.5)), None)
        hint = f"did you mean `{nearest}`?" if nearest else "see its documentation in transformers."
        raise TypeError(f"{config_class.__name__} has no parameter `{name}`; {hint}")


def build_backbone_config(
    backbone_config: "dict[str, Any] | PretrainedConfig | None", from_file: bool = False
) -> PretrainedConfig:
    """The configuration object of a backbone.

    A configuration that returns only its last feature map, the default, is set to return its last four (1/4 to 1/32).

    Args:
        backbone_config: a configuration, a dictionary with `model_type`, or None for STDC-2.
        from_file: the dictionary was read from a file; unknown keys are kept.

    Raises:
        ValueError: `model_type` is missing or unknown, or the backbone does not offer a choice of feature maps.
        TypeError: an unknown keyword of the backbone's configuration.
    """
    if backbone_config is None:
        backbone_config = STDCConfig()
    if isinstance(backbone_config, dict):
        config_class = _backbone_class(backbone_config)
        values = {name: value for name, value in backbone_config.items() if name != "model_type"}
        if not from_file:
            _refuse_unknown_backbone_keywords(config_class, values)
        implementation = values.pop("attn_implementation", None)  # 4.57 drops it
        own = config_class in OWN_BACKBONES.values()
        config = config_class._from_file(values, {}) if own else config_class.from_dict(values)
        config._attn_implementation = implementation
    else:
        config = copy.deepcopy(backbone_config)  # the caller's own stays as it is
    if not hasattr(config, "stage_names"):
        raise ValueError(
            f"backbone_config: {type(config).__name__} has no `stage_names`; choose a configuration whose "
            "model transformers' AutoBackbone can build, such as SwinConfig, ConvNextConfig or RTDetrResNetConfig."
        )
    if isinstance(getattr(config, "hidden_sizes", None), tuple):  # a default of 5.x that its own backbones fail on
        config.hidden_sizes = list(config.hidden_sizes)
    if config.out_features == config.stage_names[-1:]:
        config.out_features = config.stage_names[-4:]
    return config


class FaiM2FConfig(ChannelsOfBackbone, ReadFromFile, PretrainedConfig):
    """Configuration of `FaiM2FForUniversalSegmentation`; the defaults are those of fai-mf-m-ade, without its labels.

    Parameters are named as in transformers' Mask2Former if it has them, otherwise as in Focoos.

    Args:
        backbone_config: configuration of the backbone (object, or dictionary with `model_type`): STDC, RT-DETR's
            ResNet, or any other that `AutoBackbone` supports. None means STDC-2.
        feature_size: channels of the feature pyramid (Focoos: `pixel_decoder_feat_dim`).
        mask_feature_size: channels of mask features and mask embeddings (Focoos: `pixel_decoder_out_dim`).
        pixel_decoder_type: "fpn"; "deformable": Mask2Former's own, with deformable attention over three levels; or
            "bisenet": that of BiSeNetFormer, with two levels, and masks at 1/8 instead of 1/4.
        encoder_layers: transformer layers of the pixel decoder. "fpn": on the coarsest level, 0 for a plain FPN.
            "deformable": deformable layers, at least 1. "bisenet": 0, it has none.
        encoder_attention_heads, encoder_feedforward_dim, encoder_dropout: parameters of these layers.
        encoder_points: number of points per level that each head of deformable attention samples.
        hidden_dim: width of the queries.
        decoder_layers: layers of the transformer decoder, at least 1. (Mask2Former counts one more.)
        pre_norm: pre-norm decoder layers if true, else post-norm, as in Mask2Former.
        use_level_embedding: add a learned embedding to each level that the queries attend to (Mask2Former).
        enforce_input_projection: project the levels to `hidden_dim` even if they already have that width.
        num_attention_heads, dim_feedforward, dropout, activation_function: parameters of the transformer decoder; the
            encoder layers of "fpn" use the same activation. (Those of "deformable" use ReLU, as in Mask2Former.)
        num_queries: number of learned queries, which limits the number of segments per image.
        cls_sigmoid: classify with independent sigmoids (a query may have several classes) instead of one softmax.
        postprocessing_type: "semantic", "instance" or "panoptic": the task that the weights were trained for.
        threshold: minimum score of a detection, 0 to 1. An image processor copies this and the following five.
        mask_threshold: minimum probability of a mask's pixels, 0 to 1.
        top_k: maximum number of detections per image.
        use_mask_score: multiply a detection's class probability by its mask's mean probability.
        predict_all_pixels: assign each pixel to its most probable query instead of thresholding each mask.
        filter_empty_masks: drop detections whose mask has at most one pixel.
        label_ids_to_fuse: ids of the stuff classes; panoptic segmentation merges the segments of each into one. All
            other classes are things. None if unknown: nothing is merged. New labels reset it to [], also with
            `from_pretrained(..., id2label=...)`, unless it is passed with them.
        class_weight, mask_weight, dice_weight: weights of the losses.
        class_cost, mask_cost, dice_cost: weights of the matching costs.
        no_object_weight: weight of the no-object class in the classification loss.
        label_weights: weight of each class in the classification loss, in the order of the ids; None for 1 each. The
            matching and the mask losses do not use them. New labels reset it to None.
        train_num_points, oversample_ratio, importance_sample_ratio: point sampling of the mask losses (PointRend).
        use_auxiliary_loss: apply the loss to every intermediate prediction too (deep supervision).
        output_auxiliary_logits: return the intermediate predictions even without labels.
        ignore_value: value of unlabeled pixels in a map of class ids; 255, the default, yields to a class of that id.
        init_std: standard deviation of newly initialized queries.
        backbone_freeze_at: -1 trains the whole backbone; n >= 0 freezes the weights of its stem and first n stages.
        backbone_freeze_norm: freeze the statistics and weights of the backbone's batch norms.
        num_channels: number of channels of the images, stored in the backbone's configuration; None for its value.
        kwargs: parameters of `PretrainedConfig`. `id2label` names the classes 0, 1, 2, ...; `label2id` is derived
            from it.

    Raises:
        TypeError: an unknown keyword; the message suggests the closest valid name.
        ValueError: an invalid value; the message names the parameter.
    """

    model_type = "faim2f"
    sub_configs = {"backbone_config": AutoConfig}
    # Outputs that transformers' Trainer must not gather as predictions. The logits then come first.
    keys_to_ignore_at_inference = ["loss_dict", "fused_classes"]
    attribute_map = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "decoder_layers",
        "semantic_loss_ignore_index": "ignore_value",
    }
    has_no_defaults_at_init = False

    def __init__(
        self,
        backbone_config: "dict[str, Any] | PretrainedConfig | None" = None,
        feature_size: int = 128,
        mask_feature_size: int = 128,
        pixel_decoder_type: str = "fpn",
        encoder_layers: int = 0,
        encoder_attention_heads: int = 8,
        encoder_feedforward_dim: int = 1024,
        encoder_dropout: float = 0.0,
        encoder_points: int = 4,
        hidden_dim: int = 256,
        decoder_layers: int = 3,
        pre_norm: bool = True,
        use_level_embedding: bool = False,
        enforce_input_projection: bool = True,
        num_attention_heads: int = 8,
        dim_feedforward: int = 512,
        dropout: float = 0.0,
        activation_function: str = "relu",
        num_queries: int = 100,
        cls_sigmoid: bool = False,
        postprocessing_type: str = "semantic",
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        top_k: int = 100,
        use_mask_score: bool = False,
        predict_all_pixels: bool = True,
        filter_empty_masks: bool = True,
        label_ids_to_fuse: Sequence[int] | None = None,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        class_cost: float = 2.0,
        mask_cost: float = 5.0,
        dice_cost: float = 5.0,
        no_object_weight: float = 0.1,
        label_weights: Sequence[float] | None = None,
        train_num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        use_auxiliary_loss: bool = True,
        output_auxiliary_logits: bool = False,
        ignore_value: int = 255,
        init_std: float = 1.0,
        backbone_freeze_at: int = -1,
        backbone_freeze_norm: bool = False,
        num_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown_keywords(type(self), kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        id2label, label2id, num_labels = (kwargs.get(name) for name in ("id2label", "label2id", "num_labels"))
        if id2label is None and label2id:
            id2label = kwargs["id2label"] = inverted(label2id)
        if num_labels is not None and not is_int(num_labels, 1):
            raise ValueError(f"FaiM2FConfig: `num_labels` must be a positive integer, got {num_labels!r}.")
        if id2label is not None:
            # A label2id in the same file may be that of older labels.
            kwargs.pop("label2id", None)
            refuse_other_number(id2label, num_labels)
        # Before super().__init__, which passes the attention implementation on to existing sub-configurations.
        self.backbone_config = build_backbone_config(backbone_config)
        if num_channels is not None:
            self.num_channels = num_channels
        of_backbone = self.backbone_config._attn_implementation
        super().__init__(**kwargs)
        if kwargs.get("attn_implementation") is None:
            self.backbone_config._attn_implementation = of_backbone
        self.feature_size = feature_size
        self.mask_feature_size = mask_feature_size
        self.pixel_decoder_type = pixel_decoder_type
        self.encoder_layers = encoder_layers
        self.encoder_attention_heads = encoder_attention_heads
        self.encoder_feedforward_dim = encoder_feedforward_dim
        self.encoder_dropout = encoder_dropout
        self.encoder_points = encoder_points
        self.hidden_dim = hidden_dim
        self.decoder_layers = decoder_layers
        self.pre_norm = pre_norm
        self.use_level_embedding = use_level_embedding
        self.enforce_input_projection = enforce_input_projection
        self.num_attention_heads = num_attention_heads
        self.dim_feedforward = dim_feedforward
        self.dropout = dropout
        self.activation_function = activation_function
        self.num_queries = num_queries
        self.cls_sigmoid = cls_sigmoid
        self.postprocessing_type = postprocessing_type
        self.threshold = threshold
        self.mask_threshold = mask_threshold
        self.top_k = top_k
        self.use_mask_score = use_mask_score
        self.predict_all_pixels = predict_all_pixels
        self.filter_empty_masks = filter_empty_masks
        self.label_ids_to_fuse = label_ids_to_fuse
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.class_cost = class_cost
        self.mask_cost = mask_cost
        self.dice_cost = dice_cost
        self.no_object_weight = no_object_weight
        self.label_weights = label_weights
        self.train_num_points = train_num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.use_auxiliary_loss = use_auxiliary_loss
        self.output_auxiliary_logits = output_auxiliary_logits
        self.ignore_value = ignore_value
        self.init_std = init_std
        self.backbone_freeze_at = backbone_freeze_at
        self.backbone_freeze_norm = backbone_freeze_norm
        self._check_values()

    def __setattr__(self, name: str, value: Any) -> None:
        # Checked here because transformers and many scripts set the labels of an existing configuration.
        if name == "id2label" and value is not None:
            before, value = self.__dict__.get(name), class_names(value)
            super().__setattr__(name, value)
            super().__setattr__("label2id", {label: index for index, label in value.items()})
            if before is not None and value != before:
                reset_what_labels_meant(self, before)
        elif name == "label2id" and self.__dict__.get("id2label") is not None:
            warn_of_other_ids(value, self.label2id)
        else:
            super().__setattr__(name, value)
            # Once the constructor has set the last parameter.
            if name in ("label_ids_to_fuse", "label_weights") and "backbone_freeze_norm" in self.__dict__:
                check_values_of_labels(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like transformers' `from_dict`, but new labels in `kwargs` (`id2label`, `label2id` or `num_labels`) reset
        `label_ids_to_fuse` to [], `label_weights` to None, and an `ignore_value` that would be one of the new classes
        to 255, unless `kwargs` include them.

        Raises:
            ValueError: the ids in `id2label` have gaps, or the three contradict each other.
        """
        labels = {name: kwargs.pop(name, None) for name in ("id2label", "label2id", "num_labels")}
        of_labels = {name: kwargs.pop(name) for name in OF_LABELS if name in kwargs}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for name in of_labels:
            setattr(config, name, OF_LABELS[name])
        config._take_labels(**labels)
        for name, value in of_labels.items():
            setattr(config, name, value)
        config._check_values()
        return result

    def _take_labels(self, id2label: Any, label2id: Any, num_labels: int | None) -> None:
        if id2label is None and label2id is not None:
            id2label = inverted(label2id)
        if id2label is None:
            if num_labels is not None:
                self.num_labels = num_labels
            return
        refuse_other_number(id2label, num_labels)
        self.id2label = id2label
        for name, index in (label2id or {}).items():
            if self.id2label.get(int(index)) != name:
                raise ValueError(
                    f"FaiM2FConfig: `label2id` has {name!r} as class {index}, but `id2label` has "
                    f"{self.id2label.get(int(index))!r} there: leave label2id out, it follows from id2label."
                )

    def to_dict(self) -> dict[str, Any]:
        """Like transformers' `to_dict`, without the attribute that only the semantic model sets, and without
        `label_weights` if there are none."""
        values = super().to_dict()
        for name in ("keys_to_ignore_at_inference", "_num_channels_of_weights"):
            values.pop(name, None)
        if values.get("label_weights") is None:
            values.pop("label_weights", None)
        return values

    @classmethod
    def _unknown_keys(cls, values: Mapping[str, Any]) -> Iterator[str]:
        yield from super()._unknown_keys({name: value for name, value in values.items() if name != "backbone_config"})
        backbone = values.get("backbone_config")
        if isinstance(backbone, Mapping):
            backbone_class = _backbone_class(backbone)
            own = backbone_class in OWN_BACKBONES.values()
            unknown = backbone_class._unknown_keys(backbone) if own else _unread(backbone_class, backbone)
            yield from (f"backbone_config.{key}" for key in unknown)

    @classmethod
    def _from_file(cls, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
        backbone = values.get("backbone_config")
        override = overrides.pop("backbone_config", None)
        if isinstance(override, dict):
            # The override changes some values of the file's backbone, or selects another backbone.
            own = dict(backbone or {"model_type": STDCConfig.model_type})
            override = {"model_type": own["model_type"], **override}
            _refuse_unknown_backbone_keywords(_backbone_class(override), override)
            if override["model_type"] == own["model_type"]:
                if {"out_features", "out_indices"} & set(override):  # they have the same meaning
                    own = {name: own[name] for name in own if name not in ("out_features", "out_indices")}
                override = {**own, **override}
        before = values.get("num_channels", (backbone or {}).get("num_channels", 3))
        # The constructor checks the values; transformers would only set them.
        values.update({name: overrides.pop(name) for name in parameters_of(cls) if name in overrides})
        values["backbone_config"] = build_backbone_config(backbone if override is None else override, from_file=True)
        made = super()._from_file(values, overrides)
        config = made[0] if isinstance(made, tuple) else made
        if config.num_channels != before:
            config._num_channels_of_weights = before  # for `from_pretrained` of the model
        return made

    @property
    def thing_ids(self) -> list[int] | None:
        """The ids of the thing classes in ascending order; None if `label_ids_to_fuse` is None."""
        if self.label_ids_to_fuse is None:
            return None
        return sorted(set(self.id2label) - set(self.label_ids_to_fuse))

    @property
    def num_feature_levels(self) -> int:
        """The number of levels that the decoder's layers attend to in turn."""
        return min(2 if self.pixel_decoder_type == "bisenet" else 3, self.decoder_layers)

    @property
    def mask_stride(self) -> int:
        """Pixels of the image per pixel of the mask logits, along each side: 4, or 8 with "bisenet".

        If the backbone returns other maps than the usual four (1/4 to 1/32), it is the stride of the map that has the
        size of the masks; of a vision transformer, the size of its patches.
        """
        return stride_of_map(self.backbone_config, -3 if self.pixel_decoder_type == "bisenet" else 0)

    def _get_generation_parameters(self) -> dict[str, Any]:
        # transformers mistakes `top_k` for a text generation parameter, and refuses to save it (5.x) or warns (4.57).
        return {}

    _get_non_default_generation_parameters = _get_generation_parameters

    def _check_values(self) -> None:
        positive = (
            "feature_size mask_feature_size hidden_dim decoder_layers num_attention_heads encoder_attention_heads "
            "encoder_feedforward_dim encoder_points dim_feedforward num_queries top_k train_num_points"
        )
        for name in positive.split():
            require(self, is_int(getattr(self, name), 1), name, "a positive integer")
        require(self, is_int(self.encoder_layers, 0), "encoder_layers", "0 or a positive integer")
        require(self, is_int(self.backbone_freeze_at, -1), "backbone_freeze_at", "-1 (nothing frozen) or more")
        require(self, is_int(self.ignore_value), "ignore_value", "an integer, such as 255")
        require(self, self.activation_function in list(ACT2FN), "activation_function", f"one of {', '.join(ACT2FN)}")
        for name in ("threshold", "mask_threshold", "encoder_dropout", "dropout", "importance_sample_ratio"):
            require(self, is_number(getattr(self, name), 0, 1), name, "between 0 and 1")
        not_negative = "class_weight mask_weight dice_weight class_cost mask_cost dice_cost no_object_weight init_std"
        for name in not_negative.split():
            require(self, is_number(getattr(self, name)), name, "a number of at least 0")
        require(self, is_number(self.oversample_ratio, 1), "oversample_ratio", "a number of at least 1")
        for name, known in (("pixel_decoder_type", PIXEL_DECODER_TYPES), ("postprocessing_type", POSTPROCESSING_TYPES)):
            require(self, getattr(self, name) in known, name, f"one of {', '.join(known)}")
        check_flags(self)
        check_values_of_labels(self)
        check_network(self)


__all__ = ["FaiM2FConfig", "FaiM2FResNetConfig", "RTDetrResNetConfig", "STDCConfig"]
