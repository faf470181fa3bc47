"""`python -m conversion`, and `faim2f convert`: checkpoints of other libraries to Hub folders."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from . import focoos as focoos_models
from . import mask2former as mask2former_models
from . import mask2former_zoo as zoo_models
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
    mask2former = kinds.add_parser(
        "mask2former",
        help="a Mask2Former of transformers, or of its original repository",
        description="A Mask2Former of transformers (a folder or a Hub id), or a checkpoint of Mask2Former's original "
        "repository (.pkl of its model zoo, .pth of a training with detectron2).",
    )
    mask2former.add_argument(
        "model", metavar="MODEL", help="a folder that transformers saved, a Hub id, or a checkpoint file"
    )
    mask2former.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    subtask = "what the weights were trained for; by default as the model's name or its configuration says"
    mask2former.add_argument("--subtask", choices=("semantic", "instance", "panoptic"), help=subtask)
    mask2former.add_argument(
        "--config",
        metavar="NAME_OR_YAML",
        help="of a checkpoint file: a configuration of the zoo, such as coco/panoptic/maskformer2_R50_bs16_50ep (or "
        "the end of its path), or a YAML of detectron2, such as the config.yaml that a training left; it can be left "
        "out for the zoo's own files, which are known by their MD5",
    )
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # one folder is written in a moment; the bar would only bury the sentence
    try:
        described: focoos_models.FocoosModel | mask2former_models.Mask2FormerModel | zoo_models.ZooConversion
        if options.kind == "focoos":
            described = focoos_models.convert(options.checkpoint, options.out_dir, options.info)
        elif zoo_models.is_zoo_checkpoint(options.model):
            described = zoo_models.convert(Path(options.model), options.out_dir, options.config, options.subtask)
        elif options.config is not None:
            raise ConversionError(f"--config is for a checkpoint file (.pkl, .pth), and {options.model} is none.")
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
