"""`faim2f convert` and `python -m conversion`: convert checkpoints of other libraries to Hub folders."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_faim2f.conversion import focoos as focoos_models
from hf_faim2f.conversion import mask2former as mask2former_models
from hf_faim2f.conversion import mask2former_zoo as zoo_models
from hf_faim2f.conversion import transformers_model
from hf_faim2f.conversion.weights import ConvertedModel

from ..errors import ConversionError, first_line
from ..files import check_new_folder, read_text
from ..hub.results import CARD
from ..zoo import open_model, resolve
from .output import DONE, mistake, one_document
from .parser import MODEL_HELP, OneSentenceParser

DESCRIPTION = "Converts checkpoints of other libraries to Hub folders that load with transformers, and back."
PROGRAM = "python -m conversion"
FOCOOS = "model_final.pth my-model --info fai-mf-m-ade"
MASK2FORMER = "facebook/mask2former-swin-tiny-coco-panoptic my-model"
TRANSFORMERS = "my-model my-mask2former"
EXAMPLES = (
    ("A model that Focoos published or trained", f"focoos {FOCOOS}"),
    ("A Mask2Former model of transformers", f"mask2former {MASK2FORMER}"),
    ("Back to transformers' own class", f"transformers {TRANSFORMERS}"),
)
FOCOOS_EXAMPLES = (
    ("A published model", FOCOOS),
    ("A model of your own, with its description", "run/model_final.pth my-model --info run/model_info.json"),
)
MASK2FORMER_EXAMPLES = (
    ("From the Hub, or a folder that transformers saved", MASK2FORMER),
    ("From the original repository", "model_final.pth my-model --config coco/panoptic/maskformer2_R50_bs16_50ep"),
)
DOCUMENT = {
    "out": "the folder that was written",
    "name": "the model's name",
    "notes": "notes for the user, one sentence each",
}
MASK2FORMER_DOCUMENT = {
    **DOCUMENT,
    "error": "largest difference from transformers' logits, relative to the largest logit; null for a checkpoint file",
}


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES)
    kinds: Any = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    focoos = kinds.add_parser(
        "focoos",
        help="a checkpoint of Focoos's fai_mf and bisenetformer models",
        description="Converts a checkpoint of Focoos's fai_mf and bisenetformer models.",
        examples=FOCOOS_EXAMPLES,
        document=DOCUMENT,
    )
    focoos.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="model_final.pth, or a .safetensors file")
    focoos.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    focoos.add_argument(
        "--info",
        required=True,
        metavar="NAME_OR_JSON",
        help="a published name, such as fai-mf-m-ade, or the path of model_info.json",
    )
    focoos.add_json()
    mask2former = kinds.add_parser(
        "mask2former",
        help="a Mask2Former model of transformers, or of the original repository",
        description="Converts a Mask2Former model of transformers (a folder or Hub id), or a checkpoint of "
        "Mask2Former's original repository (.pkl of its model zoo, .pth of detectron2 training).",
        examples=MASK2FORMER_EXAMPLES,
        document=MASK2FORMER_DOCUMENT,
    )
    mask2former.add_argument(
        "model", metavar="MODEL", help="a folder that transformers saved, a Hub id, or a checkpoint file"
    )
    mask2former.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    subtask = "the task that the weights were trained for (default: from the model's name or configuration)"
    mask2former.add_argument("--subtask", choices=("semantic", "instance", "panoptic"), help=subtask)
    mask2former.add_argument(
        "--config",
        metavar="NAME_OR_YAML",
        help="for a checkpoint file: a configuration of the zoo, such as coco/panoptic/maskformer2_R50_bs16_50ep (or "
        "the end of its path), or a detectron2 YAML, such as the config.yaml of a training run (default: none; the "
        "zoo's own files need none, because their MD5 identifies them)",
    )
    mask2former.add_json()
    transformers = kinds.add_parser(
        "transformers",
        help="a model of this package with the deformable pixel decoder, to transformers' own Mask2Former",
        description="Writes a model of this package that has the deformable pixel decoder as a folder of transformers' "
        "own Mask2FormerForUniversalSegmentation, which loads without remote code.",
        examples=(("A converted or trained model", TRANSFORMERS),),
        document=MASK2FORMER_DOCUMENT,
    )
    transformers.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    transformers.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    transformers.add_json()
    return parser


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0 if OUT_DIR was written, else 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as emit:
        return _run(program, options, emit)


def _run(program: str, options: argparse.Namespace, emit: Callable[[Any], None]) -> int:
    try:
        if options.kind == "focoos":
            described = focoos_models.convert(options.checkpoint, options.out_dir, options.info)
        elif options.kind == "transformers":
            described = _to_transformers(options.model, options.out_dir)
        elif zoo_models.is_zoo_checkpoint(options.model):
            described = zoo_models.convert(Path(options.model), options.out_dir, options.config, options.subtask)
        elif options.config is not None:
            raise ConversionError(f"--config is for checkpoint files (.pkl, .pth), and {options.model} is not one.")
        else:
            described = mask2former_models.convert(options.model, options.out_dir, options.subtask)
    except ConversionError as error:
        return mistake(program, error)
    except (OSError, SafetensorError) as error:  # such as a full disk
        reason = getattr(error, "strerror", None) or first_line(error, kind=False)
        where = getattr(error, "filename", None) or options.out_dir
        return mistake(program, ConversionError(f"{where}: {reason}; nothing was written."))
    if described.error is not None:
        print(f"largest difference from transformers' model: {described.error:.1e} of the largest logit")
    for note in described.notes:
        print(f"note: {note}")
    print(f"{described.name}: written to {options.out_dir}")
    document: dict[str, Any] = {"out": str(options.out_dir), "name": described.name, "notes": described.notes}
    if options.kind != "focoos":
        document["error"] = described.error
    emit(document)
    return DONE


def _to_transformers(name: str, out_dir: Path) -> ConvertedModel:
    """Converts a model that `resolve` finds, with its card."""
    check_new_folder(out_dir, ConversionError)  # before anything is downloaded
    folder = resolve(name, error=ConversionError)
    model, processor = open_model(folder, error=ConversionError)
    path = folder / CARD
    try:
        card = read_text(path) if path.is_file() else ""
    except ValueError as error:
        raise ConversionError(f"{path}: {error}.") from error
    short = Path(name).resolve().name if Path(name).is_dir() else name
    return transformers_model.convert(model, processor, out_dir, name=short, card=card)
