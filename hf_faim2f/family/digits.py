"""The smallest model of the family, for the scenes of `data/digits.py`."""

from ..model.configuration_faim2f import FaiM2FConfig

LABELS = [*(str(digit) for digit in range(10)), "background"]
THING_IDS = tuple(range(10))
# Side of the input images of a new model, in pixels (the shipped one was trained further, up to 384). Scenes of 128
# pixels are upscaled: at a quarter of 128 pixels, the strokes of a digit are two pixels wide, which limits even perfect
# masks to an AP of 0.84.
RESOLUTION = 192


def digits_config() -> FaiM2FConfig:
    """STDC-1 at half its width, a pixel decoder of 64 channels and 3 decoder layers: 2.5 million parameters."""
    return FaiM2FConfig(
        backbone_config={"model_type": "faim2f_stdc", "embedding_size": 32, "depths": [2, 2, 2]},
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=128,
        decoder_layers=3,
        dim_feedforward=256,
        num_queries=20,
        train_num_points=1024,
        postprocessing_type="panoptic",
        predict_all_pixels=False,
        use_mask_score=True,
        label_ids_to_fuse=[label for label in range(len(LABELS)) if label not in THING_IDS],
        id2label=dict(enumerate(LABELS)),
    )
