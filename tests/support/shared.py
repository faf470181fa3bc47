"""What takes long to make and several tests need: made once in a run, by whichever of its processes asks first.

The folders are shared, so nobody writes into them: a test that changes one takes a copy.
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
    """The folder that `make` writes at a path that is not there yet; `name` says all that its content depends on."""
    root = Path(os.environ["FAIM2F_SHARED"])  # of tests/conftest.py
    place = root / hashlib.sha256(name.encode()).hexdigest()[:16]
    with FileLock(f"{place}.lock"):
        if not place.exists():
            make(place)
    return place


def exported(model: Path, **options: Any) -> Path:
    """The ONNX folder of a model's folder, as `export_onnx` writes it without the comparison afterwards."""
    digest = hashlib.sha256()
    for path in sorted(model.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.name.encode() + path.read_bytes())
    name = f"{digest.hexdigest()} {json.dumps(options, sort_keys=True)}"
    return shared_folder(name, lambda out: export_onnx(model, out, verify=False, **options))
