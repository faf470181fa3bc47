"""What a training starts from: a trained model, or a new one of the family, with the labels of the data."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.augmentation import at_size
from ..data.lazy import Description
from ..family import ALIASES, FAMILY, find_preset, load_config
from ..family.digits import RESOLUTION, digits_config
from ..family.presets import INSTANCE, SEMANTIC
from ..hub.load import ModelError, label_difference, load_model
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from .recipe import Recipe

DIGITS = "digits"
NEW_MODELS = (*FAMILY, *ALIASES, DIGITS)
POST_PROCESSING: dict[str, dict[str, Any]] = {
    "semantic": SEMANTIC,
    "instance": INSTANCE,
    "panoptic": {**INSTANCE, "postprocessing_type": "panoptic"},
}


@dataclass
class Start:
    """A model that is ready to be trained.

    Args:
        model, processor: with the labels of the data.
        notes: what a person should know of how they came to be.
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
) -> Start:
    """The model to train on data of this description.

    Args:
        name: one of `NEW_MODELS`, for a new model; otherwise a folder or an id on the Hub.
        description: of the data; a new model gets its labels and post-processing.
        new_labels: a trained model gets them, too, and weights that then do not fit begin anew.
        backbone: a folder or id of a model whose backbone's weights a new model starts from.
        image_size: the shorter edge to which the processor resizes; None for the model's own.

    Raises:
        ModelError: the model cannot be used, or its labels are not the data's.
    """
    # A folder that is called like a member of the family is what the person has, and wins.
    if name in NEW_MODELS and not Path(name).is_dir():
        return _new(name, description, backbone, image_size)
    if backbone is not None:
        raise ModelError(f"{name} has a trained backbone: backbone is for a new model ({', '.join(NEW_MODELS)}).")
    if not new_labels:
        model, processor = load_model(name)
        if difference := label_difference(name, model.config, description):
            raise ModelError(f"{difference}: choose other data, or train with new labels (new_labels, --new-labels).")
        notes = []
    else:
        model, processor = load_model(name, new_weights=True, **_of_data(description))
        processor = _processor(model.config, description, size=dict(processor.size))  # type: ignore[attr-defined]
        notes = [f"{name} gets the {len(description.labels)} labels of {description.name}."]
    if image_size is not None:
        processor = FaiM2FImageProcessor.from_dict(processor.to_dict(), size=_size(image_size))
    return Start(model, processor, notes)


def recipe_at(recipe: Recipe, image_size: int | None) -> Recipe:
    """The recipe with crops of `image_size`; None, or a recipe without augmentations, leaves it as it is."""
    if image_size is None or not recipe.augmentations:
        return recipe
    return dataclasses.replace(recipe, augmentations=at_size(recipe.augmentations, image_size))


def _new(name: str, description: Description, backbone: str | None, image_size: int | None) -> Start:
    if name == DIGITS:
        config = digits_config()
        config.update(_of_data(description))
        resolution = RESOLUTION
    else:
        config = load_config(name, **_of_data(description))
        resolution = find_preset(name).resolution
    model = FaiM2FForUniversalSegmentation(config)
    notes = [f"A new {name} with the {len(description.labels)} labels of {description.name}; its weights are random."]
    if backbone is not None:
        trained, _ = load_model(backbone)
        try:
            model.backbone.load_state_dict(trained.backbone.state_dict())
        except RuntimeError as error:
            raise ModelError(f"The backbone of {backbone} does not fit {name}: it is of another shape.") from error
        notes = [f"A new {name} with the {len(description.labels)} labels of {description.name}, on the backbone of "
                 f"{backbone}."]  # fmt: skip
    return Start(model, _processor(config, description, size=_size(image_size or resolution)), notes, backbone is None)


def _of_data(description: Description) -> dict[str, Any]:
    """What a configuration takes from the data."""
    return {
        "id2label": description.id2label,
        "label2id": {label: index for index, label in description.id2label.items()},
        **POST_PROCESSING[description.task],
    }


def _processor(config: FaiM2FConfig, description: Description, size: Any) -> FaiM2FImageProcessor:
    settings: dict[str, Any] = {"size": size}
    if description.task == "panoptic":
        settings["label_ids_to_fuse"] = sorted(set(description.id2label) - description.things)
    return FaiM2FImageProcessor.from_model_config(config, **settings)


def _size(shortest: int) -> dict[str, int]:
    return {"shortest_edge": shortest, "longest_edge": 4 * shortest}
