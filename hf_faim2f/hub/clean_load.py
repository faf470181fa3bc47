"""Loading a folder as a stranger does: by its own code, in a process that has transformers and not this package."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .check import FolderError

# Half an hour: the largest models load in seconds, but machines can be busy.
PATIENCE = 1800
LOADED = "LOADED"
# Credentials stay here: the process has none, and no network.
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
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    with torch.no_grad():
        outputs = model.eval()(**processor(image, return_tensors="pt"))
    if not torch.isfinite(outputs.masks_queries_logits).all():
        raise ValueError("it answers with values that are not finite")
    processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 64)])
except Exception as error:
    line = next(iter(str(error).strip().splitlines()), "no reason given")
    print(f"FAILED {type(error).__name__}: {line}")
else:
    print("LOADED")
"""


def check_loading(folder: Path) -> None:
    """That the folder loads and segments an image where hf_faim2f is not installed.

    Raises:
        FolderError: it does not.
    """
    with tempfile.TemporaryDirectory() as home:
        kept = {name: value for name, value in os.environ.items() if name not in SECRETS and name != "PYTHONPATH"}
        environment = {**kept, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(name, None)
        try:
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, str(folder.resolve())],
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


__all__ = ["check_loading"]
