"""Configurations of the FAI-M2F model and of the backbones that transformers does not have.

Every constructor here refuses a keyword that it does not know and names the nearest one that it does:
a misspelt `num_querys` would otherwise be stored, never read, and the model silently built with 100 queries.
A file is not refused for a key that this version does not know, which a later one, or its owner, may have written:
it loads, keeps the key, and one warning names it.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, RTDetrResNetConfig
from transformers.utils import logging

from .compatibility_faim2f import BackboneConfigMixin

logger = logging.get_logger(__name__)

# What transformers itself writes into a config.json, or passes when it reads one, on either major.
TRANSFORMERS_KEYS = frozenset(
    "architectures attn_implementation auto_map chunk_size_feed_forward dtype experts_implementation "
    "finetuning_task id2label is_encoder_decoder label2id model_type name_or_path num_labels out_features "
    "out_indices output_attentions output_hidden_states per_layer_config problem_type quantization_config "
    "return_dict stage_names task_specific_params tie_word_embeddings torch_dtype torchscript "
    "transformers_version transformers_weights use_cache use_return_dict".split()
)
# What Focoos and transformers' siblings call a thing that has another name here: no spelling is near enough to guess.
OTHER_NAMES = {
    "num_classes": "num_labels",
    "depth": "depths",
    "layers": "depths",
    "base": "embedding_size",
    "in_chans": "num_channels",
    "transformer_predictor_dec_layers": "decoder_layers",
    "num_decoder_layers": "decoder_layers",
    "transformer_predictor_hidden_dim": "hidden_dim",
    "pixel_decoder_feat_dim": "feature_size",
    "pixel_decoder_out_dim": "mask_feature_size",
    "pixel_decoder_transformer_layers": "encoder_layers",
    "criterion_eos_coef": "no_object_weight",
    "criterion_num_points": "train_num_points",
    "criterion_deep_supervision": "use_auxiliary_loss",
    "score_threshold": "threshold",
    "stuff_ids": "label_ids_to_fuse",
    "stuff_classes": "label_ids_to_fuse",
    "semantic_loss_ignore_index": "ignore_value",
}


# How a configuration says which code computes attention. The names with an underscore are transformers' own state.
IMPLEMENTATION = re.compile(r"(_?)(attn|experts)_implementation(_internal)?")


@functools.cache
def _base_values() -> dict[str, Any]:
    """What every configuration of the installed transformers has, with its default."""
    return PretrainedConfig().to_dict()


def _parameters(config_class: Any) -> list[str]:
    return [name for name in inspect.signature(config_class.__init__).parameters if name not in ("self", "kwargs")]


def _is_parameter(config_class: Any, name: str) -> bool:
    if name.startswith("_"):  # transformers' own
        return IMPLEMENTATION.fullmatch(name) is None
    return name in TRANSFORMERS_KEYS or name in _parameters(config_class)


def _nearest(config_class: Any, name: str, likeness: float = 0.5) -> str | None:
    own = _parameters(config_class)
    if OTHER_NAMES.get(name) in [*own, "num_labels"]:
        return OTHER_NAMES[name]
    return next(iter(difflib.get_close_matches(name, [*own, *sorted(TRANSFORMERS_KEYS)], 1, likeness)), None)


def refuse_unknown_keywords(config_class: Any, keywords: Mapping[str, Any]) -> None:
    """Raises TypeError for the first of `keywords` that neither `config_class` nor transformers reads.

    The message names the nearest real keyword. Names that begin with an underscore are transformers' own and pass; so
    does what `to_dict` adds, as long as it has its default.
    """
    for name, value in keywords.items():
        if _is_parameter(config_class, name) or _base_values().get(name, inspect.Parameter.empty) == value:
            continue
        nearest = _nearest(config_class, name)
        hint = f"did you mean `{nearest}`?" if nearest else f"it knows: {', '.join(sorted(_parameters(config_class)))}."
        raise TypeError(f"{config_class.__name__} has no parameter `{name}`; {hint}")


def _refuse_chosen_code(values: Mapping[str, Any]) -> None:
    """Raises ValueError where a file's values name a kernel, which is code of whatever repository the file says.

    transformers 4.57 loads and runs it without `trust_remote_code` (CVE-2026-4372), also where only the state behind
    the public key is set.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            _refuse_chosen_code(value)
        found = IMPLEMENTATION.fullmatch(name) if isinstance(name, str) else None
        if found is None or value is None:
            continue
        named = value.values() if isinstance(value, Mapping) else [value]
        if found[1] or any("/" in str(implementation) for implementation in named):
            raise ValueError(
                f"The configuration sets `{name}` to {value!r}, but a file may not choose the code of attention. "
                "Remove the key, and pass attn_implementation to from_pretrained if you trust that code."
            )


def _unknown_keys(config_class: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a file that nothing reads, each with the nearest that is read; those of the backbone included."""
    for name, value in values.items():
        if name == "backbone_config" and isinstance(value, Mapping):
            backbone_class = _backbone_class(value)
            if backbone_class in OWN_BACKBONES.values():
                yield from (f"backbone_config.{key}" for key in _unknown_keys(backbone_class, value))
            else:
                yield from (f"backbone_config.{key}" for key in _unread(backbone_class, value))
        elif not _is_parameter(config_class, name) and name not in _base_values() and not name.startswith("_"):
            nearest = _nearest(config_class, name, likeness=0.8)
            yield f"{name} (did you mean {nearest}?)" if nearest else name


class ReadFromFile:
    """Configurations whose files load whatever keys they have, while their constructors refuse unknown keywords."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', for what a file holds; keys that nothing reads are kept, and named in one warning.

        Raises:
            ValueError: the values name a kernel, a backbone that does not exist, or one thing in two ways.
        """
        _refuse_chosen_code(config_dict)
        config_dict = cls._with_real_names(config_dict)
        unknown = list(_unknown_keys(cls, config_dict))
        if unknown:
            logger.warning_once(
                f"{cls.__name__}: this version knows nothing of {', '.join(unknown)} in the configuration; "
                "it is kept, and has no effect."
            )
        return cls._from_file(config_dict, kwargs)

    @classmethod
    def _with_real_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """A file's values under the parameters' own names, where it uses transformers' common ones.

        Raises:
            ValueError: it has both, and they differ.
        """
        values = {name: value for name, value in values.items() if name != "use_return_dict"}  # a property
        for alias, name in getattr(cls, "attribute_map", {}).items():
            if alias in values and values.setdefault(name, values[alias]) != values.pop(alias):
                raise ValueError(
                    f"The configuration has `{name}` and, with another value, `{alias}`, which is the same: remove one."
                )
        return values

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As transformers', and as lenient as `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))  # type: ignore[attr-defined]

    @classmethod
    def _from_file(cls, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
        """The configuration, or with `return_unused_kwargs` a pair; what the constructor would refuse is set after."""
        others = {name: values.pop(name) for name in list(values) if not _is_parameter(cls, name)}
        others.update({name: overrides.pop(name) for name in list(overrides) if name in others})
        made = super().from_dict(values, **overrides)  # type: ignore[misc]
        config = made[0] if isinstance(made, tuple) else made
        for name, value in others.items():
            if not hasattr(cls, name):  # a file cannot replace methods and properties
                setattr(config, name, value)
        return made


def _require(config: PretrainedConfig, condition: bool, name: str, what: str) -> None:
    if not condition:
        raise ValueError(f"{type(config).__name__}: `{name}` must be {what}, got {getattr(config, name)!r}.")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float = 0.0, most: float = float("inf")) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _refuse_other_number(id2label: Any, num_labels: int | None) -> None:
    if num_labels is not None and num_labels != len(id2label):
        raise ValueError(
            f"FaiM2FConfig: `num_labels` is {num_labels}, but `id2label` names {len(id2label)} classes: leave "
            "num_labels out."
        )


def _inverted(label2id: Any) -> dict[Any, Any]:
    try:
        return {index: name for name, index in dict(label2id).items()}
    except (TypeError, ValueError):
        raise ValueError(f"FaiM2FConfig: `label2id` must map names to class ids, got {label2id!r}.") from None


def _class_names(id2label: Any) -> dict[int, str]:
    """`id2label` with whole numbers as keys, in rising order.

    Raises:
        ValueError: its ids are not 0, 1, 2 and so on: a class's id is its place among the model's outputs.
    """
    try:
        names = {int(index): name for index, name in dict(id2label).items()}
    except (TypeError, ValueError):
        raise ValueError(f"FaiM2FConfig: `id2label` must map class ids to names, got {id2label!r}.") from None
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"FaiM2FConfig: `id2label` must name at least one class, each by a string, got {id2label!r}.")
    if missing := set(range(len(id2label))) - set(names):
        raise ValueError(
            f"FaiM2FConfig: `id2label` names {len(id2label)} classes, so their ids must be 0 to {len(id2label) - 1}, "
            f"but {min(missing)} is missing and {max(names)} is there: number the classes anew, in the segmentation "
            "maps too, and leave out the value of pixels without label (ignore_value; the image processor's "
            "ignore_index)."
        )
    return {index: names[index] for index in sorted(names)}


def _choose_feature_maps(config: Any, out_features: list[str] | None, out_indices: list[int] | None) -> None:
    """Sets which stages a backbone returns, by the setters that both majors of transformers have."""
    if out_features is None and out_indices is not None:
        config.out_indices = list(out_indices)
        return
    config.out_features = out_features
    if out_indices is not None and list(config.out_indices) != list(out_indices):
        raise ValueError(
            f"{type(config).__name__}: out_features {out_features} and out_indices {out_indices} name other stages."
        )


class STDCConfig(ReadFromFile, BackboneConfigMixin, PretrainedConfig):
    """Configuration of the STDC backbone (Fan et al., "Rethinking BiSeNet", CVPR 2021, section 3.1).

    Args:
        num_channels: channels of the input image.
        embedding_size: width of the feature map at 1/4 (Focoos: `base`); 4, 8 and 16 times that at 1/8, 1/16, 1/32.
        depths: blocks of the three stages at 1/8, 1/16 and 1/32; (2, 2, 2) is STDC-1, (4, 5, 3) is STDC-2.
        block_type: "cat" concatenates a block's convolutions, "add" also adds the block's input.
        block_num: convolutions in a block, at least 2, of widths out/2, out/4, ..., the last two equal.
        use_conv_last: one more 1x1 convolution on the coarsest map, to max(1024, 16 * embedding_size) channels.
        hidden_act: activation after each batch norm.
        out_features, out_indices: which of "stem" (1/2), "stage1" (1/4) ... "stage4" (1/32) the backbone returns.
    """

    model_type = "faim2f_stdc"

    def __init__(
        self,
        num_channels: int = 3,
        embedding_size: int = 64,
        depths: Sequence[int] = (4, 5, 3),
        block_type: str = "cat",
        block_num: int = 4,
        use_conv_last: bool = False,
        hidden_act: str = "relu",
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown_keywords(type(self), kwargs)
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.depths = list(depths)
        self.block_type = block_type
        self.block_num = block_num
        self.use_conv_last = use_conv_last
        self.hidden_act = hidden_act
        _require(self, _is_int(num_channels, 1), "num_channels", "a positive integer")
        _require(self, block_type in ("cat", "add"), "block_type", '"cat" or "add"')
        _require(self, _is_int(block_num, 2), "block_num", "an integer of at least 2")
        width = 2 ** (block_num - 1)
        divides = _is_int(embedding_size, 2) and embedding_size % 2 == 0 and 4 * embedding_size % width == 0
        _require(self, divides, "embedding_size", f"even, and 4 times it divisible by 2**(block_num - 1) = {width}")
        three = len(self.depths) == 3 and all(_is_int(depth, 1) for depth in self.depths)
        _require(self, three, "depths", "three positive integers (stages at 1/8, 1/16 and 1/32)")
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        _choose_feature_maps(self, out_features, out_indices)


class FaiM2FResNetConfig(ReadFromFile, BackboneConfigMixin, PretrainedConfig):
    """Configuration of the ResNet variants a, b and c of Focoos's models (variant d is transformers' RTDetrResNet).

    Variants (He et al., "Bag of Tricks", CVPR 2019, section 4): "a" has the stride on a bottleneck's first 1x1
    convolution and "b" on its 3x3; both have the 7x7 stem. "c" is "b" with a stem of three 3x3 convolutions.
    All take a strided shortcut through one strided 1x1 convolution.

    Args:
        variant: "a", "b" or "c".
        num_channels, embedding_size, hidden_sizes, depths, layer_type, hidden_act: as in `RTDetrResNetConfig`.
        out_features, out_indices: which of "stem", "stage1" (1/4) ... "stage4" (1/32) the backbone returns.
    """

    model_type = "faim2f_resnet"

    def __init__(
        self,
        variant: str = "c",
        num_channels: int = 3,
        embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        layer_type: str = "bottleneck",
        hidden_act: str = "relu",
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown_keywords(type(self), kwargs)
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.variant = variant
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.hidden_sizes = list(hidden_sizes)
        self.depths = list(depths)
        self.layer_type = layer_type
        self.hidden_act = hidden_act
        _require(self, variant in ("a", "b", "c"), "variant", '"a", "b" or "c" (variant d is RTDetrResNetConfig)')
        _require(self, layer_type in ("basic", "bottleneck"), "layer_type", '"basic" or "bottleneck"')
        four = len(self.depths) == len(self.hidden_sizes) == 4 and all(_is_int(d, 1) for d in self.depths)
        _require(self, four, "depths", "four positive integers, as many as hidden_sizes")
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        _choose_feature_maps(self, out_features, out_indices)

    @property
    def downsample_in_bottleneck(self) -> bool:
        """Where RTDetrResNet's bottleneck puts its stride: on the first 1x1 convolution (variant a) or on the 3x3."""
        return self.variant == "a"

    @property
    def downsample_in_first_stage(self) -> bool:
        """Always False: the stem's pooling has brought the image to 1/4 already."""
        return False


# Backbone configurations that transformers' own CONFIG_MAPPING does not know: one line a kind.
OWN_BACKBONES: dict[str, Any] = {
    STDCConfig.model_type: STDCConfig,
    FaiM2FResNetConfig.model_type: FaiM2FResNetConfig,
}
POSTPROCESSING_TYPES = ("semantic", "instance", "panoptic")
PIXEL_DECODER_TYPES = ("fpn", "deformable")


def _backbone_class(values: Mapping[str, Any]) -> Any:
    """The configuration class of a backbone's `model_type`; ValueError if there is none."""
    model_type = values.get("model_type")
    if model_type in OWN_BACKBONES:
        return OWN_BACKBONES[model_type]
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    nearest = next(iter(difflib.get_close_matches(str(model_type), [*OWN_BACKBONES, *CONFIG_MAPPING], 1)), None)
    hint = f" Did you mean `{nearest}`?" if nearest else ""
    raise ValueError(
        f"backbone_config: model_type {model_type!r} is no backbone that transformers or this model has.{hint}"
    )


def _unread(config_class: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """The keys that transformers' own `config_class` does not have."""
    known = {*config_class().to_dict(), *TRANSFORMERS_KEYS, *_base_values()}
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
    """The configuration object of a backbone, given as object, dictionary with `model_type`, or None (STDC-2).

    A configuration that asks only for its last feature map is set to return its last four (1/4 to 1/32).

    Args:
        from_file: the dictionary is a file's, whose unknown keys are kept.

    Raises:
        ValueError: `model_type` is missing or unknown, or the backbone has no feature maps to choose from.
        TypeError: a keyword that the backbone's configuration does not have.
    """
    if backbone_config is None:
        backbone_config = STDCConfig()
    if isinstance(backbone_config, dict):
        config_class = _backbone_class(backbone_config)
        values = {name: value for name, value in backbone_config.items() if name != "model_type"}
        if not from_file:
            _refuse_unknown_backbone_keywords(config_class, values)
        implementation = values.pop("attn_implementation", None)  # which 4.57 drops
        own = config_class in OWN_BACKBONES.values()
        config = config_class._from_file(values, {}) if own else config_class.from_dict(values)
        config._attn_implementation = implementation
    else:
        config = backbone_config
    if not hasattr(config, "stage_names"):
        raise ValueError(
            f"backbone_config: {type(config).__name__} has no `stage_names`; choose a configuration whose "
            "model transformers' AutoBackbone can build, such as SwinConfig, ConvNextConfig or RTDetrResNetConfig."
        )
    if config.out_features == config.stage_names[-1:]:
        config.out_features = config.stage_names[-4:]
    return config


class FaiM2FConfig(ReadFromFile, PretrainedConfig):
    """Configuration of `FaiM2FForUniversalSegmentation`; the defaults are fai-mf-m-ade's without its labels.

    Names are transformers' Mask2Former's where it has the thing, Focoos's where it has not.

    Args:
        backbone_config: a backbone's configuration (object or dictionary with `model_type`): STDC, the ResNet of
            RT-DETR, or any other that `AutoBackbone` builds. None means STDC-2.
        feature_size: channels of the feature pyramid (Focoos: `pixel_decoder_feat_dim`).
        mask_feature_size: channels of the mask features and of the mask embeddings (`pixel_decoder_out_dim`).
        pixel_decoder_type: "fpn", or "deformable": Mask2Former's own, with deformable attention over three levels.
        encoder_layers: transformer layers of the pixel decoder: on the coarsest level, 0 for a plain FPN; or the
            deformable ones, of which there is at least one.
        encoder_attention_heads, encoder_feedforward_dim, encoder_dropout: of those layers.
        encoder_points: points of each level that a head of deformable attention looks at.
        hidden_dim: width of the queries.
        decoder_layers: layers of the transformer decoder, at least 1. (Mask2Former counts one more.)
        pre_norm: norms stand before the attentions and the feed-forward network of the decoder, or, as Mask2Former has
            it, behind them.
        use_level_embedding: add to each level, that the queries look at, a learned embedding of its own (Mask2Former).
        enforce_input_projection: project the levels to `hidden_dim` even where they have that width.
        num_attention_heads, dim_feedforward, dropout, activation_function: of the transformer decoder;
            the activation is also that of the encoder layers.
        num_queries: learned queries, so the most segments that an image can have.
        cls_sigmoid: classes by independent sigmoids (a query may be several classes) in place of one softmax.
        postprocessing_type: "semantic", "instance" or "panoptic": what the weights were trained for.
        threshold: least score of a detection, 0 to 1.
        mask_threshold: least probability of a pixel of a mask, 0 to 1.
        top_k: most detections of an image.
        use_mask_score: multiply a detection's class probability by its mask's mean probability.
        predict_all_pixels: give each pixel to the query that is surest of it, in place of thresholding each mask.
        filter_empty_masks: drop detections whose mask has at most one pixel.
        label_ids_to_fuse: the stuff: classes that are not counted, so that panoptic segmentation makes one segment of
            each; all others are things. None where nobody has said, and then nothing is fused. It is emptied when
            the labels change, also by `from_pretrained(..., id2label=...)`, unless it is given with them.
        class_weight, mask_weight, dice_weight: weights of the losses.
        class_cost, mask_cost, dice_cost: weights of the matching costs.
        no_object_weight: weight of the no-object class in the classification loss.
        train_num_points, oversample_ratio, importance_sample_ratio: point sampling of the mask losses (PointRend).
        use_auxiliary_loss: train every intermediate prediction too (deep supervision).
        output_auxiliary_logits: return the intermediate predictions also without labels.
        ignore_value: value of a pixel without label in a segmentation map.
        init_std: standard deviation of the learned queries when a model is made new.
        backbone_freeze_at: -1 trains the whole backbone; n >= 0 freezes its stem and first n stages.
        backbone_freeze_norm: keep the backbone's batch norms at their statistics and weights.
        kwargs: transformers' own; of them `id2label` names the classes 0, 1, 2 and so on, and `label2id` follows from
            it always.

    Raises:
        TypeError: an unknown keyword; the message names the nearest real one.
        ValueError: a value that cannot be; the message names the parameter.
    """

    model_type = "faim2f"
    sub_configs = {"backbone_config": AutoConfig}
    # Of the outputs, what transformers' Trainer does not gather as predictions: the logits come first, as of the peers.
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
        train_num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        use_auxiliary_loss: bool = True,
        output_auxiliary_logits: bool = False,
        ignore_value: int = 255,
        init_std: float = 1.0,
        backbone_freeze_at: int = -1,
        backbone_freeze_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_unknown_keywords(type(self), kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        id2label, label2id, num_labels = (kwargs.get(name) for name in ("id2label", "label2id", "num_labels"))
        if id2label is None and label2id:
            id2label = kwargs["id2label"] = _inverted(label2id)
        if num_labels is not None and not _is_int(num_labels, 1):
            raise ValueError(f"FaiM2FConfig: `num_labels` must be a positive integer, got {num_labels!r}.")
        if id2label is not None:
            # What is in a file beside id2label may be of older labels.
            kwargs.pop("label2id", None)
            _refuse_other_number(id2label, num_labels)
        # First, because transformers hands the implementation of attention on to what there is of sub-configurations.
        self.backbone_config = build_backbone_config(backbone_config)
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
        # Here, because transformers and many a script set labels on a configuration that is finished.
        if name == "id2label" and value is not None:
            value = _class_names(value)
            changed = value != self.__dict__.get(name, value)
            super().__setattr__(name, value)
            super().__setattr__("label2id", {label: index for index, label in value.items()})
            if changed and self.__dict__.get("label_ids_to_fuse"):
                logger.warning_once(
                    f"The labels changed, so label_ids_to_fuse {self.label_ids_to_fuse}, of the old ones, is emptied: "
                    "set it again if some of the new classes are stuff."
                )
                self.label_ids_to_fuse = []
        elif name != "label2id" or self.__dict__.get("id2label") is None:
            super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but what belongs to the labels of `config_dict` goes where `kwargs` have others.

        `id2label`, `label2id` or `num_labels` each tell the new labels. With them the classes that are stuff
        (`label_ids_to_fuse`) go, unless `kwargs` say which of the new ones are.

        Raises:
            ValueError: `id2label` has gaps, or the three contradict each other.
        """
        labels = {name: kwargs.pop(name, None) for name in ("id2label", "label2id", "num_labels")}
        stuff = {name: kwargs.pop(name) for name in ("label_ids_to_fuse",) if name in kwargs}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if stuff:
            config.label_ids_to_fuse = None
        config._take_labels(**labels)
        for name, value in stuff.items():
            setattr(config, name, value)
        config._check_values()
        return result

    def _take_labels(self, id2label: Any, label2id: Any, num_labels: int | None) -> None:
        if id2label is None and label2id is not None:
            id2label = _inverted(label2id)
        if id2label is None:
            if num_labels is not None:
                self.num_labels = num_labels
            return
        _refuse_other_number(id2label, num_labels)
        self.id2label = id2label
        for name, index in (label2id or {}).items():
            if self.id2label.get(int(index)) != name:
                raise ValueError(
                    f"FaiM2FConfig: `label2id` has {name!r} as class {index}, but `id2label` has "
                    f"{self.id2label.get(int(index))!r} there: leave label2id out, it follows from id2label."
                )

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without what a model of this configuration sets for its class alone."""
        values = super().to_dict()
        values.pop("keys_to_ignore_at_inference", None)
        return values

    @classmethod
    def _from_file(cls, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
        backbone = values.get("backbone_config")
        override = overrides.pop("backbone_config", None)
        if isinstance(override, dict):
            # Some values of the file's backbone, or another backbone.
            own = dict(backbone or {"model_type": STDCConfig.model_type})
            override = {"model_type": own["model_type"], **override}
            _refuse_unknown_backbone_keywords(_backbone_class(override), override)
            if override["model_type"] == own["model_type"]:
                if {"out_features", "out_indices"} & set(override):  # they say the same in two ways
                    own = {name: own[name] for name in own if name not in ("out_features", "out_indices")}
                override = {**own, **override}
        # To the constructor, which checks them; transformers would only set them.
        values.update({name: overrides.pop(name) for name in _parameters(cls) if name in overrides})
        values["backbone_config"] = build_backbone_config(backbone if override is None else override, from_file=True)
        return super()._from_file(values, overrides)

    @property
    def thing_ids(self) -> list[int] | None:
        """The classes that are counted, in rising order; None where nobody has said which are stuff."""
        if self.label_ids_to_fuse is None:
            return None
        return sorted(set(self.id2label) - set(self.label_ids_to_fuse))

    def _get_generation_parameters(self) -> dict[str, Any]:
        # `top_k` is Focoos's number of detections; transformers would take it for a parameter of text generation,
        # which this model does not do, and refuse to save it (5.x) or warn of it (4.57, below).
        return {}

    _get_non_default_generation_parameters = _get_generation_parameters

    def _check_values(self) -> None:
        for name in ("feature_size", "mask_feature_size", "hidden_dim", "decoder_layers", "num_attention_heads"):
            _require(self, _is_int(getattr(self, name), 1), name, "a positive integer")
        for name in ("encoder_attention_heads", "encoder_feedforward_dim", "dim_feedforward", "num_queries", "top_k"):
            _require(self, _is_int(getattr(self, name), 1), name, "a positive integer")
        _require(self, _is_int(self.train_num_points, 1), "train_num_points", "a positive integer")
        _require(self, _is_int(self.encoder_points, 1), "encoder_points", "a positive integer")
        _require(self, self.pixel_decoder_type in PIXEL_DECODER_TYPES, "pixel_decoder_type",
                 f"one of {', '.join(PIXEL_DECODER_TYPES)}")  # fmt: skip
        _require(self, _is_int(self.encoder_layers, 0), "encoder_layers", "0 or a positive integer")
        _require(self, _is_int(self.backbone_freeze_at, -1), "backbone_freeze_at", "-1 (nothing frozen) or more")
        for name in ("threshold", "mask_threshold", "encoder_dropout", "dropout", "importance_sample_ratio"):
            _require(self, _is_number(getattr(self, name), 0, 1), name, "between 0 and 1")
        for name in ("class_weight", "mask_weight", "dice_weight", "class_cost", "mask_cost", "dice_cost", "init_std"):
            _require(self, _is_number(getattr(self, name)), name, "a number of at least 0")
        _require(self, _is_number(self.no_object_weight), "no_object_weight", "a number of at least 0")
        _require(self, _is_number(self.oversample_ratio, 1), "oversample_ratio", "a number of at least 1")
        _require(self, self.postprocessing_type in POSTPROCESSING_TYPES, "postprocessing_type",
                 f"one of {', '.join(POSTPROCESSING_TYPES)}")  # fmt: skip
        stuff = self.label_ids_to_fuse
        are_ids = stuff is None or (isinstance(stuff, (list, tuple)) and all(_is_int(label, 0) for label in stuff))
        _require(self, are_ids, "label_ids_to_fuse", "a list of class ids, or None")
        beyond = [label for label in stuff or () if label >= self.num_labels]
        if beyond:
            raise ValueError(
                f"{type(self).__name__} has the class {beyond[0]} in label_ids_to_fuse, but only the classes 0 to "
                f"{self.num_labels - 1}: leave it out, or name the class in id2label."
            )
        if stuff is not None:
            self.label_ids_to_fuse = sorted(set(stuff))
        for width, heads in (("hidden_dim", "num_attention_heads"), ("feature_size", "encoder_attention_heads")):
            if width == "feature_size" and self.encoder_layers == 0:
                continue
            count = getattr(self, heads)
            fits = getattr(self, width) % count == 0 and getattr(self, width) % 4 == 0
            _require(self, fits, width, f"divisible by 4 (position embedding) and by {heads} = {count}")
        least = 3
        if self.pixel_decoder_type == "deformable":
            least = 4
            _require(
                self, self.encoder_layers > 0, "encoder_layers", "at least 1 where the pixel decoder is deformable"
            )
            _require(self, self.feature_size % 32 == 0, "feature_size",
                     "divisible by 32 (group norm) where the pixel decoder is deformable")  # fmt: skip
        if len(self.backbone_config.out_features) < least:
            raise ValueError(
                f"FaiM2FConfig: the backbone must return at least {least} feature maps, "
                f"got {self.backbone_config.out_features}."
            )


__all__ = ["FaiM2FConfig", "FaiM2FResNetConfig", "RTDetrResNetConfig", "STDCConfig"]
