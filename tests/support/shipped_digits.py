"""The shipped model as a complete Hub folder: the repository keeps `examples/digits` without its remote code."""

import shutil
from pathlib import Path

from hf_faim2f.model.remote_code_faim2f import copy_remote_code

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


def complete_digits(target: Path) -> Path:
    """Copies `examples/digits` to `target`, which must not exist, and adds the code of `hf_faim2f/model/`."""
    shutil.copytree(DIGITS, target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    copy_remote_code(target)
    return target
