"""Files below a folder and files that a pattern stands for, also where links lead back up."""

import fnmatch
import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, by name, those of a folder before those of its folders.

    What is hidden is not looked for. Links are followed, except those to a folder that they are in. A folder that
    cannot be read is left out with a warning.
    """
    return _files_below(str(folder), ())


def _files_below(folder: str, above: tuple[str, ...]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        logger.warning(f"{folder} is left out: {error.strerror or error}.")
        return
    yield from (Path(folder, entry.name) for entry in entries if _is(entry.is_file))
    for entry in entries:
        if _is(entry.is_dir):
            yield from _files_below(os.path.join(folder, entry.name), (*above, here))


def _is(test: Callable[[], bool]) -> bool:
    """A test of an entry; a link in a circle of links alone is nothing."""
    try:
        return test()
    except OSError:
        return False


def files_of_pattern(pattern: str) -> list[tuple[Path, bool]]:
    """The files that a pattern stands for, by name, and those in the folders that it stands for.

    Args:
        pattern: as in `glob`, with `**` for any folders.

    Returns:
        Each file, and whether the pattern stands for the file itself and not for a folder above it.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        paths = [Path(name) for name in sorted(glob.glob(pattern))]
        folders = [path for path in paths if path.is_dir()]
        return [(path, True) for path in paths if not path.is_dir()] + [
            (file, False) for folder in folders for file in files_below(folder)
        ]
    place = parts.index("**")
    head, tail = Path(*parts[:place]), parts[place:]
    heads = sorted(glob.glob(str(head))) if glob.has_magic(str(head)) else [str(head)]
    found: dict[Path, bool] = {}
    for base in map(Path, heads):
        for path in files_below(base) if base.is_dir() else ():
            own = path.relative_to(base).parts
            itself = _fits(own, tail)
            if itself or any(_fits(own[:depth], tail) for depth in range(len(own))):
                found[path] = found.get(path, False) or itself
    return sorted(found.items())


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern, of which `**` is for any number."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[count:], pattern[1:]) for count in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def place_of(path: Path) -> str:
    """The same for all ways to a file through links to folders; a link to a file is a file of its own."""
    return os.path.join(os.path.realpath(path.parent), path.name)


__all__ = ["files_below", "files_of_pattern", "place_of"]
