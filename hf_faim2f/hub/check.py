"""Checks a model folder before it is published: its files, its code, and that it loads without this package.

Only files that belong to a model are allowed; the error names any others. The folder is then loaded with remote code in
a clean subprocess, without this package, credentials or network.
"""

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..errors import FolderError
from ..model.remote_code_faim2f import AUTO_MAP
from .results import CARD
from .sections import images_of

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
KNOWN = frozenset(
    [
        CARD, "config.json", "preprocessor_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE",
        ".gitattributes", "evaluation.json", "per_class.md",
    ]
)  # fmt: skip
# The report of `faim2f quantize`.
QUANTIZATION = "quantization.json"
# Files that `faim2f export onnx` and `faim2f quantize` write, allowed in the subfolder onnx/.
OF_ONNX = frozenset(["config.json", "preprocessor_config.json", QUANTIZATION])
IMAGES = {
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".gif": (b"GIF87a", b"GIF89a"),
    ".webp": (b"RIFF",),
}
# Files and folders of other tools. They are skipped with a note.
LEFT_OUT = frozenset([".git", ".cache", "__pycache__", ".DS_Store"])
MAY_HOLD_PICKLES = frozenset(
    ".bin .pt .pth .pkl .pickle .ckpt .joblib .npy .npz .h5 .hdf5 .keras .pb .msgpack .dill .model".split()
)
# First bytes of a pickle (protocol 2 or later), a ZIP archive (as torch.save writes) and HDF5.
FOREIGN_STARTS = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK\x03\x04", b"\x89HDF")
# Limits far above those of a model folder.
MOST_FILES, MOST_TEXT = 1000, 1 << 25
MOST_NAMED = 5
MODEL_CODE = Path(__file__).parents[1] / "model"
RENEW_CODE = (
    "python -c \"from hf_faim2f.model.remote_code_faim2f import copy_remote_code; copy_remote_code('{folder}')\""
)


# The clean subprocess: its time limit in seconds (models load in seconds, but the machine may be busy), the environment
# variables with credentials that are withheld from it, and its program.
PATIENCE = 1800
LOADED = "LOADED"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE")
SCRIPT = """
import sys
for name in ("hf_faim2f", "conversion"):
    sys.modules[name] = None  # importing it fails
import numpy as np, torch, transformers
from PIL import Image
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = sys.argv[1]
try:
    model, info = transformers.AutoModelForUniversalSegmentation.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{len(wrong)} weights are not those of config.json, such as {wrong[0]}")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    channels = getattr(processor, "num_channels", 3)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, channels), dtype=np.uint8)
    image = Image.fromarray(image) if channels == 3 else image
    with torch.no_grad():
        outputs = model.eval()(**processor(image, return_tensors="pt"))
    if not torch.isfinite(outputs.masks_queries_logits).all():
        raise ValueError("it gives values that are not finite")
    processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 64)])
except Exception as error:
    line = next(iter(str(error).strip().splitlines()), "no reason given")
    print(f"FAILED {type(error).__name__}: {line}")
else:
    print("LOADED")
"""


@dataclass(frozen=True)
class File:
    """A file to publish: its path in the repository, its local path, and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Contents:
    """The files of a folder to publish, sorted by name, and the names of skipped files."""

    folder: Path
    files: list[File]
    left_out: list[str]


def list_files(folder: Path) -> Contents:
    """The files of a folder that belong in a model's repository.

    Raises:
        FolderError: it has other files, a link that leads out of it, or a file whose contents do not match its name.
        OSError: a file cannot be read.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder} is not a folder.")
    paths, left_out = _walk(folder)
    code = {path.name for path in MODEL_CODE.glob("*.py")} - {"__init__.py"}
    names = [path.relative_to(folder).as_posix() for path in paths]
    pickles = [name for name in names if PurePosixPath(name).suffix.lower() in MAY_HOLD_PICKLES]
    if pickles:
        raise FolderError(
            f"{folder} has {_listed(pickles)}, which can hold pickles, and these run code when they are loaded: keep "
            "the weights as safetensors only, and remove the other files."
        )
    strays = [
        name
        for name in names
        if not _belongs(name, code) and (len(name.split("/")) > 2 or Path(name).suffix.lower() not in IMAGES)
    ]
    if strays:
        raise FolderError(
            f"{folder} has {_listed(strays)}, which {'does' if len(strays) == 1 else 'do'} not belong in a model's "
            "repository: move what is not part of the model elsewhere."
        )
    if {"model.safetensors", "model.safetensors.index.json"} <= set(names):
        raise FolderError(
            f"{folder} has model.safetensors and model.safetensors.index.json, and transformers loads only the former: "
            "keep the weights of one of them."
        )
    files = [File(name, path, path.stat().st_size) for name, path in zip(names, paths, strict=True)]
    for file in files:
        _check_kind(folder, file)
    card = folder / CARD
    shown = images_of(card.read_text(encoding="utf-8-sig")) if CARD in names else set()
    unseen = [name for name in names if Path(name).suffix.lower() in IMAGES and name not in shown]
    if unseen:
        raise FolderError(
            f"{folder} has {_listed(unseen)}, which {CARD} does not show: show it there, or move it elsewhere."
        )
    return Contents(folder, files, left_out)


def with_code(contents: Contents) -> Contents:
    """The contents with this package's model code added; the folder is not changed."""
    code = [
        File(path.name, path, path.stat().st_size) for path in MODEL_CODE.glob("*.py") if path.name != "__init__.py"
    ]
    return replace(contents, files=sorted([*contents.files, *code], key=lambda file: file.name))


def check_code(contents: Contents) -> None:
    """Checks that the folder's code is byte-identical to this package's, and that the Auto classes find it.

    Raises:
        FolderError: a module is missing or differs, or `auto_map` names other code.
    """
    renew = RENEW_CODE.format(folder=contents.folder)
    have = {file.name: file.path for file in contents.files}
    for name in ("config.json", "preprocessor_config.json", "README.md"):
        if name not in have:
            raise FolderError(f"{contents.folder} has no {name}: the model is incomplete.")
    if not any(name.endswith(".safetensors") for name in have):
        raise FolderError(f"{contents.folder} has no model.safetensors: the model is incomplete.")
    places = {""} | {f"{PurePosixPath(name).parent}/" for name in have if name.startswith("onnx/") and ".py" in name}
    for source in sorted(MODEL_CODE.glob("*.py")):
        for place in places if source.name != "__init__.py" else ():
            name = place + source.name
            if name not in have:
                raise FolderError(f"{contents.folder} lacks {name}, which is part of its code: run {renew}.")
            if have[name].read_bytes() != source.read_bytes():
                raise FolderError(
                    f"{contents.folder}/{name} is not the code of this hf_faim2f, but of another version: replace "
                    f"it by running {renew}, and check that the model still works."
                )
    for name, wanted in (
        ("config.json", AUTO_MAP),
        ("preprocessor_config.json", {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}),
    ):
        values = json.loads(have[name].read_text(encoding="utf-8"))
        found = values.get("auto_map") if isinstance(values, dict) else None
        if found != wanted:
            raise FolderError(
                f"{contents.folder}/{name} has an auto_map that does not name the code beside it: load the model and "
                "the image processor with hf_faim2f, and save them again."
            )


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """All files below the folder, and the names of skipped ones."""
    root = folder.resolve()
    paths: list[Path] = []
    left_out: list[str] = []
    todo = [folder]
    while todo:
        for path in sorted(todo.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.name in LEFT_OUT:
                left_out.append(name)
                continue
            if path.is_symlink():
                target = Path(os.path.realpath(path))
                if root not in target.parents or not target.is_file():
                    raise FolderError(
                        f"{folder}/{name} is a link that leads out of the folder, or not to a file: copy the file."
                    )
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                todo.append(path)
            elif stat.S_ISREG(mode):
                paths.append(path)
            else:
                raise FolderError(f"{folder}/{name} is not a regular file.")
            if len(paths) + len(todo) > MOST_FILES:
                raise FolderError(f"{folder} has more than {MOST_FILES} files: it is not a model folder.")
    return sorted(paths), left_out


def _belongs(name: str, code: set[str]) -> bool:
    *place, last = name.split("/")
    if not place:
        return last in KNOWN or last in code or bool(WEIGHTS.fullmatch(last))
    if place[0] == "onnx" and len(place) <= 2:
        return last in OF_ONNX or last in code or last.endswith(".onnx")
    return False


def _check_kind(folder: Path, file: File) -> None:
    """Checks that a file's contents match its name: by its first bytes, or in full for text files."""
    where = f"{folder}/{file.name}"
    with file.path.open("rb") as opened:
        start = opened.read(16)
    if start.startswith(FOREIGN_STARTS):
        raise FolderError(f"{where} is a pickle or an archive under another name: remove it.")
    suffix = file.path.suffix.lower()
    if suffix == ".safetensors":
        header = int.from_bytes(start[:8], "little")
        if len(start) < 9 or header + 8 > file.size or start[8:9] != b"{":
            raise FolderError(f"{where} is not a safetensors file: save the model again.")
    elif suffix in IMAGES:
        if not start.startswith(IMAGES[suffix]):
            raise FolderError(f"{where} is not an image of the kind that its name says.")
    elif suffix != ".onnx":
        if file.size > MOST_TEXT:
            raise FolderError(f"{where} has {file.size} bytes, too many for a text file.")
        try:
            text = file.path.read_text(encoding="utf-8")
            if suffix == ".json":
                json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FolderError(f"{where} is not {'JSON' if suffix == '.json' else 'UTF-8 text'} ({error}).") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def check_loading(contents: Contents) -> None:
    """Loads the files to publish with remote code in a clean subprocess without hf_faim2f, and runs the model.

    Raises:
        FolderError: it does not load, or its outputs are not finite.
    """
    folder = contents.folder
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as published:
        for file in contents.files:
            link = Path(published, file.name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.path.resolve())
        kept = {name: value for name, value in os.environ.items() if name not in SECRETS and name != "PYTHONPATH"}
        environment = {**kept, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(name, None)
        try:
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, published],
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                cwd=home,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise FolderError(f"{folder} did not load within {PATIENCE // 60} minutes.") from error
    told = [line for line in done.stdout.splitlines() if line.startswith((LOADED, "FAILED"))]
    if not told or told[-1] != LOADED:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = told[-1].removeprefix("FAILED ") if told else (lines[-1] if lines else f"status {done.returncode}")
        raise FolderError(f"{folder} does not load where hf_faim2f is not installed: {reason.rstrip('.')}.")


__all__ = ["QUANTIZATION", "Contents", "File", "FolderError", "check_code", "check_loading", "list_files", "with_code"]
