"""`faim2f serve`: serves a model over HTTP with the Hub's image-segmentation API."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..runtime.backends import RUNTIMES
from ..serving.inference_server import TOKEN, Opener, ServeSettings, serve
from ..serving.requests import Limits
from .app import above_zero, add_limits, port_number
from .output import MISTAKES, mistake, use_weights_url
from .parser import MODEL_HELP, OneSentenceParser

if TYPE_CHECKING:
    from ..serving.batching import Segmenter

PROGRAM = "faim2f serve"
DESCRIPTION = "Serves a model over HTTP with the Hub's image-segmentation API."
EXAMPLES = (
    ("On http://127.0.0.1:8000, for huggingface_hub's InferenceClient", "my-model"),
    ("On a GPU, with batches of up to 16 pictures", "my-model --device cuda --precision bf16 --batch-size 16"),
    (f"For the network, where {TOKEN} is set", "my-onnx --host 0.0.0.0 --port 9000"),
    ("With two to eight replicas on a Ray cluster", "my-model --ray auto --replicas 2-8"),
)


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0 when the server is stopped, or 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    limits = Limits(options.max_megabytes, options.max_megapixels, options.time_limit, options.queue)
    try:
        use_weights_url(options.weights_url, options.model)
        settings = ServeSettings(
            options.model, options.runtime, options.device, options.precision, options.host, options.port,
            options.batch_size, options.batch_wait / 1000, limits,
        )  # fmt: skip
        serve(settings, _replicas(settings, options.ray, options.replicas))
    except MISTAKES as error:
        return mistake(program, error)
    return 0


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES)
    defaults = ServeSettings("")
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or the folder of an export with logits")
    runtime = "the runtime (default: the first without native code that the folder has files for)"
    parser.add_argument("--runtime", choices=RUNTIMES, help=runtime)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    precision = "precision of the network, for torch only (default: fp32)"
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help=precision)
    host = f"address to listen on (default: {defaults.host}, this machine only); any other needs the environment "
    host += f"variable {TOKEN}, which clients must send as Authorization: Bearer TOKEN"
    parser.add_argument("--host", default=defaults.host, metavar="NAME", help=host)
    port = f"port to listen on; 0 for any free one (default: {defaults.port})"
    parser.add_argument("--port", type=port_number, default=defaults.port, metavar="N", help=port)
    batch = "the largest batch of images of one size (default: 1 on a CPU, 4 on a GPU, or the graph's own)"
    parser.add_argument("--batch-size", type=_count, metavar="N", help=batch)
    wait = "how long an image waits for others to share its batch, in milliseconds (default: 5)"
    parser.add_argument("--batch-wait", type=above_zero, default=5.0, metavar="MS", help=wait)
    queue = f"requests accepted at once; others get status 503 (default: {defaults.limits.waiting})"
    parser.add_argument("--queue", type=_count, default=defaults.limits.waiting, metavar="N", help=queue)
    ray = "run replicas of the model on Ray Serve: local for this machine, auto, or a cluster's HOST:PORT (default: "
    ray += "this process alone)"
    parser.add_argument("--ray", metavar="ADDRESS", help=ray)
    replicas = "for --ray: their number, or MIN-MAX to follow the load (default: one per GPU, or per two cores)"
    parser.add_argument("--replicas", type=_range, metavar="N", help=replicas)
    add_limits(parser)
    parser.add_weights_url()
    return parser


def _replicas(settings: ServeSettings, address: str | None, replicas: tuple[int, int] | None) -> Opener | None:
    """The function that opens the replicas; None without --ray."""
    if address is None:
        if replicas is not None:
            raise SettingsError("--replicas is for --ray, which is not given: leave it out, or pass --ray local.")
        return None
    from ..serving.replicas import RayBatcher, application_name

    def opened(server: str, on_batch: Callable[[int, float], object]) -> "Segmenter":
        return RayBatcher(address, replicas, settings, application_name(server), on_batch)

    return opened


def _range(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    numbers = least, most if dash else least
    if not all(number.isdecimal() and 0 < int(number) < 1e4 for number in numbers) or int(numbers[0]) > int(numbers[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1, or two like 2-8")
    return int(numbers[0]), int(numbers[1])


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)
