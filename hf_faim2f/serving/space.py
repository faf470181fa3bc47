"""Starts the web page, for `faim2f app` and, copied as `app.py`, on a Hugging Face Space.

A Space starts its app without arguments, so environment variables say what to serve:

- `FAIM2F_MODEL`: a folder of the Space, or a model's Hub id;
- `FAIM2F_EXPORTS` (optional): folders of `faim2f export`, separated by commas;
- `FAIM2F_EXAMPLES` (optional): a folder of pictures;
- `GRADIO_SERVER_NAME`, `GRADIO_SERVER_PORT`: where to listen, which the Space sets; by default 127.0.0.1 and 7860.

The Space's `requirements.txt` is `hf-faim2f[app]`.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

# Imported by its full name because a Space's app.py is outside the package.
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
        raise SettingsError("The environment names no model: set FAIM2F_MODEL to a folder or Hub id.")
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
    """Serves the page until the process is interrupted or terminated; prints its address.

    Raises:
        ValueError, OSError, ImportError: a person's mistake, in one sentence.
    """
    # Deprecation warnings of these libraries about each other, which the page's owner cannot act on.
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
    except KeyboardInterrupt:
        print(flush=True)  # after the terminal's ^C


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Serves what the environment names; returns 0, or 2 after one sentence on a mistake in it."""
    try:
        serve(settings_of(environment))
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
