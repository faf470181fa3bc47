"""Prediction with a model in any runtime. `prediction.py` lists where the results of runtimes differ.

`Predictor` reads images, and turns the network's outputs into predictions with the model's own image processor. The
runtimes in `backends` only run the network.
"""

from ..errors import ImageError, PredictorError
from .prediction import Prediction, Segment
from .predictor import Predictor

__all__ = ["ImageError", "Prediction", "Predictor", "PredictorError", "Segment"]
