"""Remote code: makes a saved folder load by itself, and the classes known to transformers' Auto classes."""

import os
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

MODEL_AUTO_CLASS_NAMES = (
    "AutoModel",
    "AutoModelForUniversalSegmentation",
    "AutoModelForInstanceSegmentation",
    "AutoModelForSemanticSegmentation",
    "AutoModelForImageSegmentation",
)
AUTO_MAP = {
    "AutoConfig": "configuration_faim2f.FaiM2FConfig",
    "AutoImageProcessor": "image_processing_faim2f.FaiM2FImageProcessor",
    **dict.fromkeys(MODEL_AUTO_CLASS_NAMES, "modeling_faim2f.FaiM2FForUniversalSegmentation"),
    "AutoModelForSemanticSegmentation": "modeling_faim2f.FaiM2FForSemanticSegmentation",
}


def copy_remote_code(folder: "str | os.PathLike[str]") -> None:
    """Copies the modules of this folder into `folder`, where a model or processor is being saved.

    transformers' own copying runs only for classes that came as remote code. This works for the installed package too.
    (If only the processor was loaded as remote code, only its modules are here to copy.)
    """
    for source in sorted(Path(__file__).parent.glob("*.py")):
        target = Path(folder) / source.name
        if source.name != "__init__.py" and not (target.exists() and source.samefile(target)):
            shutil.copyfile(source, target)


def register(
    config_class: Any, processor_class: Any, model_classes: list[Any], backbones: list[tuple[Any, Any]]
) -> None:
    """Registers the classes with the Auto classes.

    Configurations and image processors are registered by name, for every folder that is read later. Only the installed
    package does that. If remote code did, transformers 5.x would read the next folder, perhaps of another revision,
    with the code of the first.

    Args:
        config_class, processor_class: of the model.
        model_classes: the classes that `AUTO_MAP` names.
        backbones: pairs of configuration and backbone class.
    """
    installed = not __name__.startswith("transformers_modules.")
    if installed:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoImageProcessor.register(config_class, slow_image_processor_class=processor_class, exist_ok=True)
    for backbone_config_class, backbone_class in backbones:
        if installed:
            AutoConfig.register(backbone_config_class.model_type, backbone_config_class, exist_ok=True)
        AutoBackbone.register(backbone_config_class, backbone_class, exist_ok=True)
    classes = {model_class.__name__: model_class for model_class in model_classes}
    for name in MODEL_AUTO_CLASS_NAMES:
        model_class = classes[AUTO_MAP[name].rpartition(".")[2]]
        getattr(transformers, name).register(config_class, model_class, exist_ok=True)
    # The pipeline reads only these names, and warns that a model that is not among them is not supported.
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[config_class.model_type] = tuple(classes)


__all__ = ["AUTO_MAP", "MODEL_AUTO_CLASS_NAMES", "copy_remote_code", "register"]
