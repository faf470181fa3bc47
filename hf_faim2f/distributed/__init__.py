"""Bulk inference on millions of images, in parts, with Ray Data workers on one machine or a cluster.

A run is a folder that all machines share:

- `part-00000-of-00012.parquet`, …: one row an image (see `parts`), written by a worker, complete or not at all;
- `_run/`: the plan (see `plan`), which is written first and says what each part holds and how it is predicted, and the
  state of a run in progress. Parquet readers skip folders whose names begin with an underscore.

A part is finished when its file exists: whichever process dies, the next one finds what is left to do.
"""

from ..errors import BulkError
from .plan import Plan, Settings

__all__ = ["BulkError", "Plan", "Settings"]
