"""What a figure was measured with: the machine, and the versions of what ran."""

import os
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

PROCESSORS = Path("/proc/cpuinfo")
# Told where a run has loaded them.
LIBRARIES = ("torch", "transformers", "numpy", "onnxruntime", "tensorrt", "tensorrt_rtx")


def describe_machine() -> dict[str, Any]:
    """Date (UTC), processor, its cores and how busy they are, torch's threads, GPUs, and versions, as plain data."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in LIBRARIES}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        # How many programs wanted a core in the minute before: figures of a busy machine are worth little.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "hf-faim2f": __version__,
            "python": platform.python_version(),
            **{name: str(version) for name, version in loaded.items() if version},
        },
    }


def processor_name() -> str:
    """The processor's model, as well as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", PROCESSORS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


__all__ = ["describe_machine", "processor_name"]
