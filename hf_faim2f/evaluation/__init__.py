"""Metrics of the `evaluate` library that work offline, accumulate counts, and merge across processes.

Call `add_batch(predictions=..., references=..., image_ids=...)` for each batch, then `compute()`; see `streaming.py`.
"""

from .cityscapes import CityscapesMetric
from .instance import InstanceMetric
from .panoptic import PanopticMetric
from .semantic import SemanticMetric
from .streaming import StreamingMetric

__all__ = ["CityscapesMetric", "InstanceMetric", "PanopticMetric", "SemanticMetric", "StreamingMetric"]
