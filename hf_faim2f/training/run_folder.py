"""The folder of a run: `run.yaml` says what the run is, so that it can go on, and no other is mixed into it."""

import json
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

RUN_FILE = "run.yaml"
# Settings that a run may be gone on with differently.
FREE = frozenset(
    "steps per_device_batch_size workers evaluate_every save_every log_every eval_limit subtasks samples tensorboard "
    "out skip_bad license".split()
)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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
    checkpoint = newest_checkpoint(out_dir)
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
    return checkpoint


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The whole checkpoint of the most steps; None where there is none."""
    whole = [path for path in _checkpoints(out_dir) if _is_whole(path)]
    return max(whole, key=checkpoint_step, default=None)


def remove_unfinished(out_dir: Path) -> None:
    """Takes away checkpoints that a run which was killed had begun to write: they would push out whole ones."""
    for path in _checkpoints(out_dir):
        if not _is_whole(path):
            shutil.rmtree(path)


def set_aside(out_dir: Path, step: int) -> None:
    """Renames the checkpoint of a step, if there is one, to `diverged-N`: a run goes on from an earlier one then.

    Its weights are finite, but what the model makes of the next batch is not.
    """
    checkpoint = out_dir / f"checkpoint-{step}"
    if checkpoint.is_dir():
        aside = out_dir / f"diverged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)


def checkpoint_step(folder: str | Path) -> int:
    """The step after which a checkpoint was written: transformers puts it into the folder's name."""
    return int(Path(folder).name.rpartition("-")[2])


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A block that writes a folder, or a file, which is gone if it cannot be written.

    Raises:
        OSError: one sentence, whatever Python, torch and safetensors make of a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _is_of_archive(error):
            raise
        if folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"{folder} cannot be written ({reason}): see that there is room; nothing of it was kept."
        ) from error


def _is_of_archive(error: RuntimeError) -> bool:
    """Whether torch could not write an archive, for which it has no error of its own, and no words of one kind."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename == torch.serialization.__file__ for frame, _ in frames)


def _checkpoints(out_dir: Path) -> list[Path]:
    return [path for path in out_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _is_whole(checkpoint: Path) -> bool:
    """Whether transformers' state of the trainer is there, which is written last."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == checkpoint_step(checkpoint)


def begin_run(out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder and says in it what the run is."""
    out_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    (out_dir / RUN_FILE).write_text(text, encoding="utf-8")


def _words(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name} {settings[name]}" if name in settings else f"the default {name}"
