"""Predictions, and the runtimes that a model's network can run in; which one never changes the answer.

A runtime is a file with `open_network`, and a row of `predictor.RUNTIMES`. All else is the same code for each of them:
images are read and resized, and outputs turned into predictions, by the model's own image processor.
"""

from ..errors import ImageError, PredictorError
from .prediction import Prediction, Segment
from .predictor import Predictor

__all__ = ["ImageError", "Prediction", "Predictor", "PredictorError", "Segment"]
