"""A tiny model with non-trivial predictions, photographs for it, and a comparison of predictions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.runtime import Prediction
from tests.support.reference_models import small_model

LABELS = {0: "sky", 1: "roof", 2: "wall", 3: "petal", 4: "leaf"}
STUFF = [0, 3]


def lively_model() -> FaiM2FForUniversalSegmentation:
    """A tiny model whose queries differ and are confident, so that rounding has little effect on its predictions."""
    model = small_model(id2label=LABELS, decoder_layers=2, num_queries=12, use_mask_score=True, top_k=12,
                        predict_all_pixels=False, postprocessing_type="instance", threshold=0.1)  # fmt: skip
    decoder: Any = model.transformer_decoder
    torch.manual_seed(5)  # with this seed, masks are spread over the image and some have the same class
    with torch.no_grad():
        decoder.query_features.weight.normal_(0, 20)
        for layer in decoder.mask_embedder.layers:
            layer.weight.normal_(0, 0.3)
            layer.bias.zero_()
        decoder.class_predictor.weight.normal_(0, 0.5)
        pixel_values = FaiM2FImageProcessor(size=64)(photographs()[0], return_tensors="pt")["pixel_values"]
        spread = model(pixel_values).masks_queries_logits.std((2, 3)).mean()
        decoder.mask_embedder.layers[-1].weight.mul_(5 / spread)
    return model


def photographs() -> list[Image.Image]:
    """Crops of scikit-learn's photographs, of odd sizes; some have the same size at the network, one is gray."""
    china, flower = (Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower"))
    return [
        china.crop((100, 150, 283, 261)),
        flower.crop((200, 60, 355, 301)),
        china.crop((300, 200, 483, 311)),
        china.crop((17, 33, 68, 70)).convert("L"),
        flower.crop((250, 100, 433, 211)),
    ]


def save_model(folder: Path, **settings: Any) -> Path:
    """Saves the tiny model and its image processor; returns the folder."""
    model = lively_model()
    model.save_pretrained(folder)
    settings = {"size": {"shortest_edge": 64, "longest_edge": 160}, "label_ids_to_fuse": STUFF, **settings}
    FaiM2FImageProcessor.from_model_config(model.config, **settings).save_pretrained(folder)
    return folder


def check_same(ours: list[Prediction], theirs: list[Prediction], stray: float = 0.0) -> None:
    """Asserts that segments and maps are the same; `stray` is the fraction of pixels that may differ."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.size == other.size and one.subtask == other.subtask and one.id2label == other.id2label
        assert one.label_map.dtype == other.label_map.dtype == torch.int64
        assert (one.label_map != other.label_map).float().mean() <= stray
        assert len(one.segments) == len(other.segments)
        for a, b in zip(one.segments, other.segments, strict=True):
            assert (a.class_id, a.label) == (b.class_id, b.label)
            assert a.score == pytest.approx(b.score, abs=1e-4)
            if not stray:
                assert a.box == b.box and torch.equal(a.mask, b.mask)
        assert (one.masks() != other.masks()).float().mean() <= stray if one.segments else True
