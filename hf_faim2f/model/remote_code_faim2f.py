"""What makes a saved folder load by itself: these very files, and the `auto_map` that names their classes."""

import os
import shutil
from pathlib import Path

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
    """Copies the modules beside this one into `folder`, where a model or processor is being saved.

    transformers' own copying starts from one registered class and runs only for classes that came as remote code;
    this one serves the installed package and remote code alike. (Where only the processor was loaded as remote code,
    only its modules are here to copy.)
    """
    for source in sorted(Path(__file__).parent.glob("*.py")):
        target = Path(folder) / source.name
        if source.name != "__init__.py" and not (target.exists() and source.samefile(target)):
            shutil.copyfile(source, target)


__all__ = ["AUTO_MAP", "MODEL_AUTO_CLASS_NAMES", "copy_remote_code"]
