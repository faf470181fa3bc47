"""Bulk inference on millions of images, in parts, with Ray Data workers on one machine or a cluster.

A run is a folder that all machines share:

- `part-00000-of-00012.parquet`, …: one row per image (see `parts`), written atomically by a worker;
- `_run/`: the plan (see `plan`), which is written first and defines each part's images and settings, and the state of a
  run in progress. Parquet readers skip folders whose names begin with an underscore.

A part is finished when its file exists, so a run can continue after any of its processes died.
"""

from ..errors import BulkError
from .plan import Plan, Settings

__all__ = ["BulkError", "Plan", "Settings"]
