"""The clients of `benchmarks/serve.py`, in a separate process with few imports.

    python benchmarks/serve_clients.py PORT FOLDER CLIENTS SECONDS

FOLDER has pictures, NAME.png, and the expected answers, NAME.json. Prints the clients' measurements as JSON.
"""

import asyncio
import base64
import hashlib
import io
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Fraction of a mask's pixels that may differ: other batch sizes round differently, which moves pixels of the border.
MOST_STRAY = 0.002


def is_right(document: Any, expected: Any) -> bool:
    """Whether an answer is the expected one up to rounding."""
    if [one["label"] for one in document] != [one["label"] for one in expected]:
        return False
    for one, other in zip(document, expected, strict=True):
        mask, same = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(each["mask"])), formats=["PNG"])) for each in (one, other)
        )
        if mask.shape != same.shape or (mask != same).mean() > MOST_STRAY:
            return False
    return True


async def client(number: int, port: int, files: list[bytes], ends: float, told: dict[str, Any], answers: Any) -> None:
    """Sends pictures over one connection until `ends`, a value of `time.monotonic`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for turn in itertools.count():
        if time.monotonic() > ends:
            break
        place, name = (number + turn) % len(files), f"{number}-{turn}"
        fields = {"Host": "localhost", "Content-Length": len(files[place]), "X-Request-Id": name}
        lines = ["POST / HTTP/1.1", *(f"{key}: {value}" for key, value in fields.items()), "", ""]
        started = time.monotonic()
        told["sent"] += 1
        writer.write("\r\n".join(lines).encode() + files[place])
        status, headers = await _head(reader)
        body = await reader.readexactly(int(headers["content-length"]))
        told["seconds"].append(time.monotonic() - started)
        told["statuses"][status] = told["statuses"].get(status, 0) + 1
        told["swapped"] += headers["x-request-id"] != name
        answers.setdefault((place, hashlib.sha256(body).digest()), body)  # each distinct answer is compared once
    told["last"] = time.monotonic()
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    _, headers = await _head(reader)
    rest = await reader.read()  # a duplicate answer would come before this one
    told["unasked"] += len(rest) != int(headers["content-length"])
    writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = (one.partition(":") for one in rest if one)
    return int(line.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def run(port: int, folder: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Runs the clients; returns their measurements."""
    paths = sorted(folder.glob("*.png"))
    files = [path.read_bytes() for path in paths]
    told: dict[str, Any] = {"sent": 0, "seconds": [], "statuses": {}, "swapped": 0, "unasked": 0, "last": 0.0}
    answers: dict[tuple[int, bytes], bytes] = {}
    started = time.monotonic()
    await asyncio.gather(*(client(n, port, files, started + seconds, told, answers) for n in range(clients)))
    told["lasted"] = told.pop("last") - started
    told["cpu"] = time.process_time() / max(told["sent"], 1)
    expected = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    told["different"] = len(answers)
    told["wrong"] = sum(not is_right(json.loads(body), expected[place]) for (place, _), body in answers.items())
    return told


if __name__ == "__main__":
    _, port, folder, clients, seconds = sys.argv
    print(json.dumps(asyncio.run(run(int(port), Path(folder), int(clients), float(seconds)))))
