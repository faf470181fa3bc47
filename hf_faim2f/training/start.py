"""The initial model of a training run: trained or new, with the requested labels and queries."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.augmentation import at_size, with_crop
from ..data.dataset import Description
from ..errors import ModelError
from ..family import ALIASES, FAMILY, find_preset, load_config
from ..family.digits import RESOLUTION, digits_config
from ..family.mask2former import MASK2FORMER, mask2former_values
from ..family.mask2former import RESOLUTION as MASK2FORMER_RESOLUTION
from ..family.presets import INSTANCE, SEMANTIC
from ..model.channels_faim2f import spread_channels
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.image_settings_faim2f import PREPROCESSING_SETTINGS
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..zoo import label_difference, open_model, open_with_settings, published_source
from .backbone import load_backbone
from .recipe import Recipe

DIGITS = "digits"
UNPUBLISHED = (*MASK2FORMER, DIGITS)  # always new, because no weights are published under these names
NEW_MODELS = (*FAMILY, *ALIASES, *UNPUBLISHED)
POST_PROCESSING: dict[str, dict[str, Any]] = {
    "semantic": SEMANTIC,
    "instance": INSTANCE,
    "panoptic": {**INSTANCE, "postprocessing_type": "panoptic"},
}


@dataclass
class Start:
    """A model that is ready to be trained.

    Args:
        model, processor: the model and its image processor, with the labels of the data.
        notes: sentences for the user about how the model was prepared.
        new_backbone: whether the backbone's weights are random.
    """

    model: FaiM2FForUniversalSegmentation
    processor: FaiM2FImageProcessor
    notes: list[str]
    new_backbone: bool = False


def start_model(
    name: str,
    description: Description,
    *,
    new_labels: bool = False,
    backbone: str | None = None,
    image_size: int | None = None,
    queries: int | None = None,
    from_scratch: bool = False,
    channels: int | None = None,
) -> Start:
    """Prepares the model to train on a dataset.

    Args:
        name: a folder, a published name or a Hub id, see `zoo.resolve`; or one of `UNPUBLISHED`, which are new models
            with random weights.
        description: metadata of the dataset. A new model gets its labels and post-processing; every model gets its
            stuff classes, if it has any.
        new_labels: replace the labels of a trained model, and reinitialize weights whose shape changes.
        backbone: for a new model, the name of a model with a trained backbone: a model of this package, or
            a transformers backbone of the same type, such as microsoft/resnet-50 for mask2former-r50.
        image_size: the shorter edge to which images are resized; None for the model's own.
        queries: the maximum number of segments per image, for a new model or with `new_labels`; None for the model's
            own. A trained model keeps its learned queries, or the first of them if the number decreases.
        from_scratch: start a new model with random weights; `name` is then one of `NEW_MODELS`. With `backbone`, a
            published name also stands for a new model.
        channels: the number of channels of the images; None for the model's own. The weights of a trained first layer
            are spread over them.

    Raises:
        ModelError: the model cannot be used, or its labels differ from those of the dataset.
    """
    if from_scratch and name in NEW_MODELS and Path(name).is_dir():
        raise ModelError(f"{name} is a folder here, and an architecture to train from scratch: rename the folder.")
    if from_scratch and name not in NEW_MODELS:
        raise ModelError(f"{name} is not an architecture to train from scratch: choose from {', '.join(NEW_MODELS)}.")
    if is_new(name, from_scratch or backbone is not None):
        return _with_channels(_new(name, description, backbone, image_size, queries, channels), channels)
    if backbone is not None:
        raise ModelError(f"{name} has a trained backbone: backbone is for new models ({', '.join(NEW_MODELS)}).")
    if not new_labels:
        if queries is not None:
            raise ModelError(
                f"{name} has trained queries: set their number only for a new model or together with new labels "
                "(new_labels, --new-labels)."
            )
        if name in (*FAMILY, *ALIASES) and not Path(name).is_dir():
            difference = label_difference(name, load_config(name), description.name, description.labels)
            if difference is not None:  # reported before anything is downloaded
                raise ModelError(
                    f"{difference}: choose other data, train its published weights with new labels (new_labels, "
                    "--new-labels), or a new model with random weights (from_scratch, --from-scratch)."
                )
        model, processor = open_model(name)
        if difference := label_difference(name, model.config, description.name, description.labels):
            raise ModelError(f"{difference}: choose other data, or train with new labels (new_labels, --new-labels).")
        notes = []
        if (kind := model.config.postprocessing_type) != description.task:
            notes.append(
                f"{name} stays a model for {kind} segmentation, although {description.name} is for {description.task}: "
                f"it predicts {description.task} segments only if asked to. With new labels (new_labels, "
                "--new-labels), even the same ones, it becomes a model for these, and keeps all weights that fit."
            )
        if description.task == "panoptic":
            model.config.label_ids_to_fuse = _stuff(description)
            processor.take_labels_from(model.config)
    else:
        model, processor, fresh = open_with_settings(name, **_of_data(description))
        # Keep the image preprocessing, on which the weights depend, but not the reading of class maps.
        kept = PREPROCESSING_SETTINGS.keys() - {"ignore_index", "do_reduce_labels", "num_labels"}
        # The folder's image processor may be for another number of channels than the model.
        processor = FaiM2FImageProcessor.from_dict(processor.to_dict(), num_channels=model.config.num_channels)
        settings = processor.to_dict()
        processor = _processor(model.config, **{name: settings[name] for name in sorted(kept & settings.keys())})
        count = len(description.labels)
        labels = "label" if count == 1 else f"{count} labels"
        notes = [f"{name} gets the {labels} of {description.name}; {_describe_reinitialized(model, fresh, queries)}."]
    if not Path(name).is_dir() and published_source(name) is not None:
        notes.insert(0, f"{name} starts with its published weights; use --from-scratch (from_scratch) for random ones.")
    if image_size is not None:
        processor = FaiM2FImageProcessor.from_dict(processor.to_dict(), size=_size(image_size), do_resize=True)
    return _with_channels(Start(model, processor, notes), channels)


def is_new(name: str, from_scratch: bool = False) -> bool:
    """Whether a name stands for a new model with random weights. A folder of the same name takes precedence.

    Args:
        name: as in `start_model`.
        from_scratch: whether published names stand for new models, too.
    """
    return name in (NEW_MODELS if from_scratch else UNPUBLISHED) and not Path(name).is_dir()


def recipe_at(recipe: Recipe, image_size: int | None, crop: tuple[int, int] | None = None) -> Recipe:
    """Adapts a recipe to another image size.

    Args:
        recipe: returned unchanged if it has no augmentations and no `crop` is given.
        image_size: the shorter edge of the model's input images; None for the recipe's own. The recipe's crop and
            resize sizes are scaled so that the shorter edge of the crops becomes `image_size`. If the recipe has an
            `evaluation_size`, it becomes `image_size` instead.
        crop: (height, width) of the crops at that size; None for the recipe's own.

    Raises:
        ValueError: `crop` is given, but the recipe does not crop.
    """
    if not recipe.augmentations:
        if crop is not None:
            raise ValueError(f"The recipe {recipe.name} does not crop: leave out crop (--crop), or choose another.")
        return recipe
    augmentations = recipe.augmentations
    if image_size is not None:
        whole = recipe.evaluation_size
        augmentations = at_size(augmentations, image_size, whole)
        recipe = dataclasses.replace(recipe, evaluation_size=None if whole is None else image_size)
    if crop is not None:
        augmentations = with_crop(augmentations, *crop)
    return dataclasses.replace(recipe, augmentations=augmentations)


@torch.no_grad()
def resize_queries(model: FaiM2FForUniversalSegmentation, queries: int) -> None:
    """Changes the number of a model's queries in-place; learned queries are kept, or the first ones if it decreases.

    Args:
        model: its `query_features` and `query_position`, (Q, channels), become (queries, channels). No other weights
            depend on the number of queries.
        queries: at least 1.
    """
    decoder: Any = model.transformer_decoder
    for name in ("query_features", "query_position"):
        learned: nn.Embedding = getattr(decoder, name)
        weight = learned.weight
        resized = type(learned)(queries, learned.embedding_dim, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(resized.weight, std=model.config.init_std)  # as in a new model
        kept = min(queries, learned.num_embeddings)
        resized.weight[:kept] = learned.weight[:kept]
        setattr(decoder, name, resized)
    model.config.num_queries = queries


def _describe_reinitialized(model: FaiM2FForUniversalSegmentation, fresh: list[str], queries: int | None) -> str:
    """Resizes the queries of a trained model, and returns the end of a sentence that names its new weights."""
    said = f"new and random: {', '.join(fresh)}" if fresh else "all weights fit and stay"
    learned = int(model.config.num_queries)
    if queries is None or queries == learned:
        return said
    resize_queries(model, queries)
    if queries > learned:
        return f"{said}; of {queries} queries {learned} are the learned ones, and {queries - learned} are new"
    return f"{said}; {queries} of the {learned} learned queries are kept"


def _new(
    name: str,
    description: Description,
    backbone: str | None,
    image_size: int | None,
    queries: int | None = None,
    channels: int | None = None,
) -> Start:
    if name == DIGITS:
        config = digits_config()
        config.update(_of_data(description))
        resolution = RESOLUTION
    elif name in MASK2FORMER:
        config = FaiM2FConfig(**{**mask2former_values(name), **_of_data(description)})
        resolution = MASK2FORMER_RESOLUTION
    else:
        config = load_config(name, **_of_data(description))
        resolution = find_preset(name).resolution
    if queries is not None:
        config.num_queries = queries
    if channels is not None and backbone is None:
        config.num_channels = channels
    model = FaiM2FForUniversalSegmentation(config)
    notes = [f"A new {name} with the {len(description.labels)} labels of {description.name}; its weights are random."]
    if backbone is not None:
        load_backbone(model, backbone, name)
        notes = [f"A new {name} with the {len(description.labels)} labels of {description.name}, on the backbone of "
                 f"{backbone}; all other weights are random."]  # fmt: skip
    return Start(model, _processor(config, size=_size(image_size or resolution)), notes, backbone is None)


def _with_channels(start: Start, channels: int | None) -> Start:
    """Changes the number of channels of the model, by spreading the weights of its first layer, and adds a note."""
    before = start.model.config.num_channels
    if channels is not None and channels != before:
        spread_channels(start.model, channels)
        start.processor = FaiM2FImageProcessor.from_dict(start.processor.to_dict(), num_channels=channels)
        start.notes.append(f"The first layer's weights for {before} channels are spread over {channels}.")
    return start


def _of_data(description: Description) -> dict[str, Any]:
    """The settings of a configuration that come from the dataset."""
    return {
        "id2label": description.id2label,
        "label_ids_to_fuse": _stuff(description) if description.task == "panoptic" else None,
        **POST_PROCESSING[description.task],
    }


def _stuff(description: Description) -> list[int]:
    return sorted(set(description.id2label) - description.things)


def _processor(config: FaiM2FConfig, **settings: Any) -> FaiM2FImageProcessor:
    return FaiM2FImageProcessor.from_model_config(config, **settings)


def _size(shortest: int) -> dict[str, int]:
    return {"shortest_edge": shortest, "longest_edge": 4 * shortest}


__all__ = ["NEW_MODELS", "Start", "is_new", "recipe_at", "resize_queries", "start_model"]
