"""Expensive folders that several tests need, created once per run by the first process that asks for them.

The folders are shared and read-only by convention: a test that changes one must copy it.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_faim2f.export.onnx import export_onnx


def shared_folder(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` writes to a new path. `name` must identify its contents."""
    root = Path(os.environ["FAIM2F_SHARED"])  # set by tests/conftest.py
    place = root / hashlib.sha256(name.encode()).hexdigest()[:16]
    with FileLock(f"{place}.lock"):
        if not place.exists():
            make(place)
    return place


def exported(model: Path, **options: Any) -> Path:
    """The ONNX folder of a model's folder, as written by `export_onnx` without verification."""
    digest = hashlib.sha256()
    for path in sorted(model.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.name.encode() + path.read_bytes())
    name = f"{digest.hexdigest()} {json.dumps(options, sort_keys=True)}"
    return shared_folder(name, lambda out: export_onnx(model, out, verify=False, **options))
