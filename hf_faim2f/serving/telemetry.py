"""Telemetry of the inference server: logs as JSON lines, and metrics for Prometheus."""

import json
import logging
import sys
import time
import traceback
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LOGGER = "hf_faim2f.serving"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time (UTC), level, message, and the record's `facts`, if it has any."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


def log_as_json() -> None:
    """Writes the logs of this package's server, and warnings of uvicorn and Ray Serve, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in ((LOGGER, logging.INFO), ("uvicorn", logging.WARNING), ("ray.serve", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class Metrics:
    """The metrics of one server.

    Names and units follow Prometheus's conventions: counters end with `_total`, times are in seconds.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("faim2f_requests", "Requests for segments, by HTTP status.", ["status"], **kept)
        self.seconds = Histogram("faim2f_request_seconds", "Time of an answered request.", buckets=SECONDS, **kept)
        self.images = Histogram("faim2f_batch_images", "Images per run of the network.", buckets=IMAGES, **kept)
        self.network = Histogram("faim2f_network_seconds", "Time of a run of the network.", buckets=SECONDS, **kept)
        self.accepted = Gauge("faim2f_accepted_requests", "Requests that are being received or answered now.", **kept)
        self.places = Gauge("faim2f_places", "The most requests that are accepted at once.", **kept)

    def on_batch(self, count: int, seconds: float) -> None:
        """Counts a run of the network."""
        self.images.observe(count)
        self.network.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


__all__ = ["LOGGER", "JsonLines", "Metrics", "log_as_json"]
