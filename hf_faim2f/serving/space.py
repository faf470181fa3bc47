"""Starts the web page for `faim2f app` and, copied as `app.py`, on a Hugging Face Space.

A Space starts its app without arguments, so environment variables hold the settings:

- `FAIM2F_MODEL`: a folder of the Space, a published name, or a model's Hub id;
- `FAIM2F_EXPORTS` (optional): folders written by `faim2f export`, separated by commas;
- `FAIM2F_EXAMPLES` (optional): a folder of images;
- `GRADIO_SERVER_NAME`, `GRADIO_SERVER_PORT`: the address to listen on, set by the Space; by default 127.0.0.1 and 7860.

The Space's `requirements.txt` is `hf-faim2f[app]`.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

# Absolute imports, because a Space's app.py is outside the package.
from hf_faim2f.errors import SettingsError
from hf_faim2f.serving.server import Settings, serving

PROGRAM = "app"
MISTAKE = 2


def settings_of(environment: Mapping[str, str]) -> Settings:
    """Reads the settings from environment variables.

    Raises:
        SettingsError: no model is named, or the port is invalid.
    """
    model = environment.get("FAIM2F_MODEL", "").strip()
    if not model:
        raise SettingsError("The environment names no model: set FAIM2F_MODEL to a folder, published name or Hub id.")
    port = environment.get("GRADIO_SERVER_PORT", "7860")
    if not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"GRADIO_SERVER_PORT must be a port from 0 to 65535, not {port!r}.")
    examples = environment.get("FAIM2F_EXAMPLES")
    return Settings(
        model=model,
        exports=tuple(name.strip() for name in environment.get("FAIM2F_EXPORTS", "").split(",") if name.strip()),
        examples=Path(examples) if examples else None,
        host=environment.get("GRADIO_SERVER_NAME") or "127.0.0.1",
        port=int(port),
    )


def serve(settings: Settings) -> None:
    """Prints the page's address and serves it until the process is interrupted or terminated.

    Raises:
        ValueError, OSError, ImportError: invalid settings or unusable input; one sentence.
    """
    # These libraries warn about deprecated uses of each other, which the operator cannot change.
    warnings.filterwarnings("ignore", module="gradio|starlette|uvicorn|websockets")
    ended = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        with serving(settings) as (address, notes):
            for note in notes:
                print(note, flush=True)
            print(f"The page is at {address} (Ctrl+C ends it).", flush=True)
            ended.wait()
    except KeyboardInterrupt as stop:
        print(stop, flush=True)  # on a new line after the terminal's ^C


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Serves the page with settings from the environment; returns 0, or 2 after an error in one sentence."""
    try:
        serve(settings_of(environment))
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
