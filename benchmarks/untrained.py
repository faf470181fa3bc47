"""Published architectures with random weights that give confident predictions, and photographs for them.

Nothing is downloaded: time and memory depend on the weights only through the number of segments. Freshly initialized
weights predict no segments; here queries differ, some are confident in a class, and masks have clear borders.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.family import load_config

# Standard deviations to which logits are scaled, similar to those of a trained model.
CLASS_SPREAD, MASK_SPREAD = 4.0, 8.0
# Added to the logit of "no object", so that about twenty of a hundred queries predict a segment.
NO_OBJECT = 9.0


def photograph(width: int, height: int, which: int = 0) -> Image.Image:
    """One of the two photographs of scikit-learn (640 x 427), resized."""
    name = ("china", "flower")[which % 2]
    return Image.fromarray(load_sample_image(f"{name}.jpg")).resize((width, height), Image.Resampling.BICUBIC)


def untrained_model(config: FaiM2FConfig) -> FaiM2FForUniversalSegmentation:
    """A model of this configuration in evaluation mode."""
    torch.manual_seed(0)
    model = FaiM2FForUniversalSegmentation(config).eval()
    decoder: Any = model.transformer_decoder
    processor = FaiM2FImageProcessor.from_model_config(config)
    with torch.no_grad():
        decoder.query_features.weight.normal_(0, 20)
        outputs = model(processor(photograph(640, 480), return_tensors="pt")["pixel_values"])
        decoder.mask_embedder.layers[-1].weight.mul_(MASK_SPREAD / outputs.masks_queries_logits.std())
        decoder.mask_embedder.layers[-1].bias.zero_()
        decoder.class_predictor.weight.mul_(CLASS_SPREAD / outputs.class_queries_logits.std(1).mean())
        decoder.class_predictor.bias.zero_()
        decoder.class_predictor.bias[-1] = NO_OBJECT
    return model


def save_untrained(folder: Path, name: str = "fai-mf-m-ade", **settings: Any) -> Path:
    """Writes a model's folder, with its image processor.

    Args:
        folder: a new folder.
        name: the name of a published model.
        settings: settings of the image processor.
    """
    config = load_config(name)
    untrained_model(config).save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(config, **settings).save_pretrained(folder)
    return folder
