"""Remote code: saves the model code with a model, and registers the classes with transformers' Auto classes."""

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
    """Copies this package's modules to `folder`, in which a model or image processor is being saved.

    transformers copies code only for classes that were loaded as remote code. This also works for the installed
    package. (If only the image processor was loaded as remote code, only its modules exist and are copied.)
    """
    for source in sorted(Path(__file__).parent.glob("*.py")):
        target = Path(folder) / source.name
        if source.name != "__init__.py" and not (target.exists() and source.samefile(target)):
            shutil.copyfile(source, target)


def register(
    config_class: Any, processor_class: Any, model_classes: list[Any], backbones: list[tuple[Any, Any]]
) -> None:
    """Registers the classes with the Auto classes.

    Configurations and image processors are registered by name, which affects every folder loaded later. Therefore only
    the installed package does this. If remote code did, transformers 5.x would load the next folder, possibly of
    another revision, with the code of the first.

    Args:
        config_class, processor_class: the model's configuration and image processor.
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
    # Pipelines read only these names, and warn that any other model is not supported.
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[config_class.model_type] = tuple(classes)


__all__ = ["AUTO_MAP", "MODEL_AUTO_CLASS_NAMES", "copy_remote_code", "register"]
