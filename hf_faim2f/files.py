"""A folder that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new_folder(out_dir: Path, error: type[Exception]) -> None:
    """Before any work is done for it.

    Args:
        out_dir: a folder that does not exist, in one that does.
        error: what is raised where that is not so, with one sentence that says what to do.
    """
    if out_dir.exists():
        raise error(f"{out_dir} exists already; name a new folder, or remove this one.")
    if not out_dir.parent.is_dir():
        raise error(f"{out_dir.parent} is no folder; make it first, or name another place for {out_dir.name}.")


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """A place to write in, which becomes `out_dir` at the end, and is gone if the block is left by an error."""
    # Beside its goal, so that the last step is a rename within one file system, which either happens or does not.
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        yield staging
        _publish_permissions(staging)
        staging.rename(out_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _publish_permissions(folder: Path) -> None:
    """A temporary folder, and what safetensors writes, is for its owner alone; the result is as any new file is."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


__all__ = ["check_new_folder", "new_folder"]
