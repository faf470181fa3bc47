"""Bulk inference: images by the million, in parts, by workers of Ray Data on one machine or on a cluster.

A run is a folder that all machines see:

- `part-00000-of-00012.parquet`, …: one row an image (`parts`), written by a worker, whole or not at all;
- `_run/`: the plan (`plan`), which says what each part holds and how it is predicted and is written before anything
  else, and what of a run that goes on must be remembered. Readers of Parquet pass over folders that begin so.

What is finished is what has its file: whichever process dies, the next to look finds the rest to do.
"""

from ..errors import BulkError
from .plan import Plan, Settings

__all__ = ["BulkError", "Plan", "Settings"]
