"""Prediction with a model in any runtime, with the same results up to the differences listed in `prediction.py`.

`Predictor` reads images and turns the network's outputs into predictions with the model's own image processor. The
runtimes in `backends` only run the network.
"""

from ..errors import ImageError, PredictorError
from .prediction import Prediction, Segment
from .predictor import Predictor

__all__ = ["ImageError", "Prediction", "Predictor", "PredictorError", "Segment"]
