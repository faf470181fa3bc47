"""Reads untrusted checkpoints without running code from them or allocating more memory than their contents need."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_faim2f.errors import ConversionError, first_line


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict from a `.safetensors` file, or from a `.pth` file, where it may be the entry "model".

    Args:
        path: the file. A pickle is read by torch's restricted unpickler, which rejects everything except tensors and
            plain containers, and only from an uncompressed zip archive: with compressed entries, or in the format
            before torch 1.6, a small file can make torch allocate any amount of memory.

    Returns:
        Tensors on the CPU by key. Keys, shapes and values are not checked.

    Raises:
        ConversionError: the file is missing, truncated, of another type, or contains more than tensors.
    """
    if path.is_dir():
        raise ConversionError(
            f"{path} is a folder; name the checkpoint file in it, such as {path / 'model_final.pth'}."
        )
    if not path.exists():
        raise ConversionError(f"{path} does not exist; name a Focoos checkpoint (.pth or .safetensors).")
    if not path.is_file():  # reading a pipe could block forever
        raise ConversionError(f"{path} is not a file; name a Focoos checkpoint (.pth or .safetensors).")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _take_state_dict(_read_pickle(path), path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path} is not a complete safetensors file ({error}); download it again.") from error


def _check_archive(path: Path) -> None:
    """Rejects anything but an uncompressed zip archive whose entries fit into the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        size = path.stat().st_size
        raise ConversionError(
            f"{path} ({size} bytes) is not a torch checkpoint, or a truncated one ({error}); download it again, or, if "
            "it is older than torch 1.6, load it there and save it once more with `torch.save`."
        ) from error
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise ConversionError(f"{path} is a zip archive, but not a torch checkpoint: it has no entry data.pkl.")
    compressed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if compressed is not None:
        raise ConversionError(
            f"{path}: the entry {compressed.filename!r} is compressed, which torch.save never does; refused."
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ConversionError(f"{path}: its entries are larger than the file; refused as damaged or forged.")


def _read_pickle(path: Path) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        what = f"`{name.group(1)}`" if name else "something that is neither tensor nor plain container"
        raise ConversionError(
            f"{path} holds {what}, and reading it could run code: refused. Save the weights alone, by "
            '`torch.save({"model": model.state_dict()}, path)`.'
        ) from error
    # torch raises RuntimeError for broken records; a malicious pickle can make its unpickler raise any exception.
    except Exception as error:
        reason = first_line(error, kind=False)
        raise ConversionError(f"{path} cannot be read as a torch checkpoint ({reason}); download it again.") from error


def _take_state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    state = content
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        state = content["model"]
    if not isinstance(state, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__} where a state dict was expected, bare or under the key 'model'."
        )
    if not state:
        raise ConversionError(f"{path} holds an empty state dict; there is nothing to convert.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            found = ", ".join(repr(name) for name in list(state)[:5])
            raise ConversionError(
                f"{path}: the entry {key!r} is not a tensor ({type(value).__name__}); a state dict was expected, bare "
                f"or under the key 'model' (found the keys {found})."
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise ConversionError(
                f"{path}: the entry {key!r} is a sparse or quantized tensor; save it dense, in float."
            )
    return state
