"""Predicting with a model in any runtime: the answers do not depend on which one runs the network.

`Predictor` reads images and turns the network's outputs into predictions with the model's own image processor; a
runtime in `backends` only runs the network.
"""

from ..errors import ImageError, PredictorError
from .prediction import Prediction, Segment
from .predictor import Predictor

__all__ = ["ImageError", "Prediction", "Predictor", "PredictorError", "Segment"]
