"""`python -m conversion`, and `faim2f convert`: checkpoints of other libraries to Hub folders."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from . import focoos as focoos_models
from . import mask2former as mask2former_models
from .errors import ConversionError

DESCRIPTION = "Checkpoints of other libraries to folders that load anywhere in the Hugging Face ecosystem."


def main(arguments: Sequence[str] | None = None, program: str = "python -m conversion") -> int:
    """Runs the command; 0 if OUT_DIR was written, 2 if not, with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    focoos = kinds.add_parser("focoos", help="a checkpoint of Focoos's fai_mf models")
    focoos.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="model_final.pth, or a .safetensors file")
    focoos.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    focoos.add_argument(
        "--info",
        required=True,
        metavar="NAME_OR_JSON",
        help="a published name, such as fai-mf-m-ade, or model_info.json",
    )
    mask2former = kinds.add_parser("mask2former", help="a Mask2Former of transformers")
    mask2former.add_argument("model", metavar="MODEL_OR_DIR", help="a folder that transformers saved, or a Hub id")
    mask2former.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    subtask = "what the weights were trained for; by default as the model's name says"
    mask2former.add_argument("--subtask", choices=("semantic", "instance", "panoptic"), help=subtask)
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # one folder is written in a moment; the bar would only bury the sentence
    try:
        described: focoos_models.FocoosModel | mask2former_models.Mask2FormerModel
        if options.kind == "focoos":
            described = focoos_models.convert(options.checkpoint, options.out_dir, options.info)
        else:
            described = mask2former_models.convert(options.model, options.out_dir, options.subtask)
            print(f"largest difference from transformers' model: {described.error:.1e} of the largest logit")
    except ConversionError as error:
        print(f"conversion: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"conversion: {error.filename or options.out_dir}: {error.strerror}; nothing was written.", file=sys.stderr
        )
        return 2
    for note in described.notes:
        print(f"note: {note}")
    print(f"{described.name}: written to {options.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
