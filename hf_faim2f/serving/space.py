"""The web page of a model, here and on a Hugging Face Space: this same file, copied as `app.py`, is the Space's app.

There, the environment says what is served, for a Space starts its app without arguments:

- `FAIM2F_MODEL`: a folder of the Space, or a model's id on the Hub;
- `FAIM2F_EXPORTS`: folders of `faim2f export`, apart by commas; `FAIM2F_EXAMPLES`: a folder of pictures; both optional;
- `GRADIO_SERVER_NAME`, `GRADIO_SERVER_PORT`: where, which the Space sets; else 127.0.0.1 and 7860.

Its `requirements.txt` is `hf-faim2f[app]`.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

# By its full name: a Space's file stands outside the package.
from hf_faim2f.serving.server import Settings, serving

PROGRAM = "app"
MISTAKE = 2


def settings_of(environment: Mapping[str, str]) -> Settings:
    """What the environment says.

    Raises:
        ValueError: it names no model, or a port that is none.
    """
    model = environment.get("FAIM2F_MODEL", "").strip()
    if not model:
        raise ValueError("The environment names no model: set FAIM2F_MODEL to a folder, or to an id on the Hub.")
    port = environment.get("GRADIO_SERVER_PORT", "7860")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"GRADIO_SERVER_PORT must be a port from 0 to 65535, not {port!r}.")
    examples = environment.get("FAIM2F_EXAMPLES")
    return Settings(
        model=model,
        exports=tuple(name.strip() for name in environment.get("FAIM2F_EXPORTS", "").split(",") if name.strip()),
        examples=Path(examples) if examples else None,
        host=environment.get("GRADIO_SERVER_NAME") or "127.0.0.1",
        port=int(port),
    )


def serve(settings: Settings) -> None:
    """Serves the page until the process is interrupted or asked to end; says where.

    Raises:
        ValueError, OSError, ImportError: a person's mistake, in one sentence.
    """
    # Of the server's libraries, about each other; a page's owner can do nothing about them.
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
    """Serves what the environment says; 2 for a mistake in it, told in one sentence."""
    try:
        serve(settings_of(environment))
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
