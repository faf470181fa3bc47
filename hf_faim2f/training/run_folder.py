"""The folder of a run: `run.yaml` says what the run is, so that it can go on, and no other is mixed into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint

RUN_FILE = "run.yaml"
# Settings that a run may be gone on with differently.
FREE = frozenset(
    "steps per_device_batch_size workers evaluate_every save_every log_every eval_limit subtasks samples tensorboard "
    "out skip_bad".split()
)


def last_checkpoint(out_dir: Path, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint that a run with these settings goes on from; None if it begins. Nothing is written.

    Raises:
        ValueError: something else is in the folder, or another run.
    """
    if not out_dir.exists():
        return None
    if not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file: choose another out.")
    if not any(out_dir.iterdir()):
        return None
    path = out_dir / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{out_dir} has other things in it, and no {RUN_FILE} of a run: choose another out.")
    checkpoint = get_last_checkpoint(str(out_dir))
    if checkpoint is None:
        return None
    try:
        earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: choose another out.") from error
    earlier = earlier if isinstance(earlier, dict) else {}
    for name in sorted({*earlier, *settings} - FREE):
        if earlier.get(name) != settings.get(name):
            raise ValueError(
                f"{out_dir} has a run with {_words(name, earlier)}, not with {_words(name, settings)}: choose another "
                "out, or go on with the same settings."
            )
    return Path(checkpoint)


def begin_run(out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder and says in it what the run is."""
    out_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    (out_dir / RUN_FILE).write_text(text, encoding="utf-8")


def _words(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name} {settings[name]}" if name in settings else f"the default {name}"
