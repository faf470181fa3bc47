"""Our deformable models as transformers' own Mask2Former: the same weights, configuration and outputs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_faim2f.conversion.transformers_model import convert, their_config, their_model, their_processor
from PIL import Image
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation, RTDetrResNetConfig, SwinConfig
from transformers.utils import logging

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli.convert import main
from hf_faim2f.errors import ConversionError
from tests.support.mask2former_models import KEYS, RESNET, STAGES, SWIN, ours_of, tiny
from tests.support.reference_models import relative_error, small_model
from tests.support.shipped_digits import DIGITS

FIXED = {"size": {"height": 64, "width": 96}, "ignore_index": 255, "do_reduce_labels": True}
# A user's program: only transformers, without remote code.
PLAIN = """
import sys, torch
sys.modules["hf_faim2f"] = None
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation
folder, picture, out = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
inputs = processor(Image.open(picture), return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
answers = {"model": type(model).__name__, "processor": type(processor).__name__}
for name in ("class_queries_logits", "masks_queries_logits"):
    answers[name] = outputs[name]
for task in ("semantic", "instance", "panoptic"):
    answers[task] = getattr(processor, f"post_process_{task}_segmentation")(outputs, target_sizes=[(64, 96)])[0]
torch.save(answers, out)
"""


@pytest.fixture(autouse=True)
def without_progress_bars() -> None:
    logging.disable_progress_bar()


def picture(height: int = 64, width: int = 96) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_several_segments() -> FaiM2FForUniversalSegmentation:
    """A model that finds several segments in `picture()`, with the same random weights in both major versions."""
    model = ours_of(tiny(RESNET, id2label={0: "cat", 1: "dog", 2: "sky"}, num_queries=20, decoder_layers=4))
    generator = torch.Generator().manual_seed(10)
    decoder: Any = model.transformer_decoder
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
            else:
                weight.fill_(float(name.endswith("weight")))
        decoder.query_features.weight.mul_(6)
        decoder.class_predictor.weight.mul_(4)
        decoder.mask_embedder.layers[-1].weight.mul_(4)
    return model


def saved_ours(folder: Path, model: FaiM2FForUniversalSegmentation, **settings: Any) -> Path:
    model.save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(model.config, **{**FIXED, **settings}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("backbone", "overrides"),
    [
        (SWIN, {"class_weight": 3.0, "mask_weight": 4.0, "dice_weight": 6.0, "dropout": 0.1}),
        (RESNET, {"pre_norm": True, "output_auxiliary_logits": True, "activation_function": "gelu"}),
        (SWIN, {"enforce_input_projection": True, "mask_feature_size": 24, "no_object_weight": 0.2}),
    ],
    ids=["swin", "resnet, pre-norm", "projected"],
)
def test_there_and_back(backbone: Any, overrides: dict[str, Any]) -> None:
    """transformers' model to ours and back: all weights are bit-identical, and all fields of the configuration are
    equal.

    Only the field `init_std` does not exist in ours; the models here have its default.
    """
    if overrides.get("enforce_input_projection") and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4.57 saves no weights of these projections")
    theirs = tiny(
        backbone, id2label={0: "cat", 1: "dog", 2: "cow"}, label2id={"cat": 0, "dog": 1, "cow": 2}, **overrides
    )
    back = their_model(ours_of(theirs))
    weights, expected = back.state_dict(), theirs.state_dict()
    assert list(weights) == list(expected)
    assert not [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert back.config.to_dict() == theirs.config.to_dict()


@pytest.mark.parametrize("decoder_layers", [1, 2, 3])
def test_other_sources(decoder_layers: int) -> None:
    """Another backbone, and so few layers that transformers' class has levels that nothing reads."""
    torch.manual_seed(2)
    backbone = RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    )
    ours = small_model(
        backbone_config=backbone.to_dict(), pixel_decoder_type="deformable", encoder_layers=1, feature_size=32,
        hidden_dim=32, enforce_input_projection=False, use_level_embedding=True, decoder_layers=decoder_layers,
        num_attention_heads=4, encoder_attention_heads=4,
    ).eval()  # fmt: skip
    theirs = their_model(ours)
    images = torch.randn(2, 3, 95, 130)
    with torch.no_grad():
        one, other = ours(images), theirs(images)
    for key in KEYS:
        assert relative_error(other[key], one[key]) <= 1e-5


class TestCommand:
    @pytest.mark.large
    def test_loads_with_transformers_alone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = with_several_segments()
        model.config.postprocessing_type, model.config.label_ids_to_fuse = "panoptic", [2]
        source = saved_ours(tmp_path / "my-model", model)
        card = (
            "---\nlicense: cc-by-4.0\nlicense_link: https://example.org\ndatasets:\n- coco\ntags:\n- faim2f\n---\n# A\n"
        )
        (source / "README.md").write_text(card)
        assert main(["transformers", str(source), str(tmp_path / "theirs"), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["name"] == "my-model" and 0 <= document["error"] <= 1e-4
        assert len(document["notes"]) == 1 and "label_ids_to_fuse=[2]" in document["notes"][0]

        picture().save(tmp_path / "picture.png")
        subprocess.run(
            [sys.executable, "-c", PLAIN, str(tmp_path / "theirs"), str(tmp_path / "picture.png"), "answers.pt"],
            check=True, capture_output=True, cwd=tmp_path,
        )  # fmt: skip
        answers = torch.load(tmp_path / "answers.pt")
        assert answers["model"] == "Mask2FormerForUniversalSegmentation"
        assert answers["processor"].startswith("Mask2FormerImageProcessor")
        processor = FaiM2FImageProcessor.from_pretrained(source)
        with torch.no_grad():
            outputs = model(**processor(picture(), return_tensors="pt"))
        for key in KEYS:
            assert relative_error(answers[key], outputs[key]) <= 1e-4
        sizes = [(64, 96)]
        semantic = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0]
        assert torch.equal(answers["semantic"], semantic) and len(semantic.unique()) > 1
        for task in ("instance", "panoptic"):
            options: dict[str, Any] = (
                {"label_ids_to_fuse": []} if task == "panoptic" else {}
            )  # none, which is transformers' default
            process = getattr(processor, f"post_process_{task}_segmentation")
            ours = process(outputs, target_sizes=sizes, **options)[0]
            assert len(ours["segments_info"]) > 1, task
            assert torch.equal(answers[task]["segmentation"].int(), ours["segmentation"].int()), task
            for one, other in zip(answers[task]["segments_info"], ours["segments_info"], strict=True):
                assert one["label_id"] == other["label_id"] and one["score"] == pytest.approx(other["score"], abs=1e-4)

        written = (tmp_path / "theirs" / "README.md").read_text()
        assert "license: cc-by-4.0" in written and "- coco" in written and "- faim2f" not in written
        assert "from the model my-model" in written and "label_ids_to_fuse=[2]" in written
        assert not [path.name for path in (tmp_path / "theirs").iterdir() if path.suffix == ".py"]
        assert not [path for path in (tmp_path / "theirs").glob("*.*") if str(tmp_path).encode() in path.read_bytes()]

    def test_mistakes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def mistake(*arguments: object) -> str:
            assert main(["transformers", *map(str, arguments)]) == 2
            told = capsys.readouterr().err
            assert told.count("\n") == 1 and "Traceback" not in told
            return told

        out = tmp_path / "out"
        assert "does not support this model's pixel_decoder_type = 'fpn'" in mistake(DIGITS, out)
        assert "exists already" in mistake(DIGITS, tmp_path)
        tiny().save_pretrained(tmp_path / "theirs")
        assert "is a model of type 'mask2former', not 'faim2f'" in mistake(tmp_path / "theirs", out)
        source = saved_ours(tmp_path / "ours", ours_of(tiny()))
        for card, told in ((b"---\nlicense: [\n---\n", "model card of ours cannot be kept"), (b"\xff\xfe", "UTF-16")):
            (source / "README.md").write_bytes(card)
            assert told in mistake(source, out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_writer_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs of both models are compared before the folder is kept."""
    import hf_faim2f.conversion.transformers_model as module

    exact = module.to_their_names

    def wrong(state: Any) -> Any:
        written = exact(state)
        written["class_predictor.bias"] = written["class_predictor.bias"] + 1
        return written

    monkeypatch.setattr(module, "to_their_names", wrong)
    with pytest.raises(ConversionError, match="differs from transformers' by"):
        convert(ours_of(tiny()), FaiM2FImageProcessor(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"pixel_decoder_type": "fpn"}, "pixel_decoder_type = 'fpn'"),
        ({"encoder_points": 2}, "encoder_points = 2"),
        ({"use_level_embedding": False}, "use_level_embedding = False"),
        ({"cls_sigmoid": True}, "cls_sigmoid = True"),
        ({"label_weights": [1.0, 2.0]}, "label_weights = "),
        ({"use_auxiliary_loss": False}, "use_auxiliary_loss = False"),
        ({"encoder_attention_heads": 4}, "encoder_attention_heads = 4.*num_attention_heads, which is 8"),
        ({"encoder_dropout": 0.1}, "encoder_dropout = 0.1"),
        ({"mask_cost": 1.0}, "mask_cost = 1.0.*mask_weight, which is 5.0"),
        ({"backbone_config": None}, "backbone_config.*'faim2f_stdc' is a backbone of this package"),
        ({"backbone_config": SwinConfig(out_features=["stem", *STAGES]).to_dict()}, "takes four feature maps"),
    ],
)
def test_what_the_class_cannot_express(overrides: dict[str, Any], told: str) -> None:
    values = {
        "backbone_config": SWIN.to_dict(), "pixel_decoder_type": "deformable", "encoder_layers": 1,
        "use_level_embedding": True, **overrides,
    }  # fmt: skip
    with pytest.raises(ConversionError, match=told) as raised:
        their_config(FaiM2FConfig(**values))
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_every_setting_is_considered() -> None:
    """A new parameter of our configuration must be mapped, required, or listed as having no equivalent."""
    import inspect

    from hf_faim2f.conversion.mask2former import SAME, TIED
    from hf_faim2f.conversion.transformers_model import REQUIRED, WITHOUT_PLACE

    otherwise = {
        "backbone_config", "decoder_layers", "output_auxiliary_logits",  # converted separately
        "label_ids_to_fuse", "postprocessing_type",  # on the card
        "top_k", "use_mask_score", "predict_all_pixels", "filter_empty_masks",  # only for post_process_detections
        "init_std",  # only for new weights
    }  # fmt: skip
    parameters = set(inspect.signature(FaiM2FConfig.__init__).parameters) - {"self", "kwargs"}
    assert parameters == {*SAME, *TIED, *REQUIRED, *WITHOUT_PLACE, *otherwise}


@pytest.mark.parametrize("overrides", [{"enforce_input_projection": True}, {"feature_size": 64}])
def test_projections_that_older_releases_lose(overrides: dict[str, Any], tmp_path: Path) -> None:
    values = {"backbone_config": RESNET.to_dict(), "pixel_decoder_type": "deformable", "encoder_layers": 1,
              "use_level_embedding": True, "hidden_dim": 32, "feature_size": 32, "num_attention_heads": 8,
              "enforce_input_projection": False, **overrides}  # fmt: skip
    model = FaiM2FForUniversalSegmentation(FaiM2FConfig(**values)).eval()
    if transformers.__version__.startswith("4."):
        with pytest.raises(ConversionError, match=f"{next(iter(overrides))} = .* with transformers 5.21 or later"):
            convert(model, FaiM2FImageProcessor(**FIXED), tmp_path / "out")
    else:
        described = convert(model, FaiM2FImageProcessor(**FIXED), tmp_path / "out")
        assert len(described.notes) == 1 and "only transformers 5.21 or later" in described.notes[0]


def test_padding_to_a_size_is_not_written(tmp_path: Path) -> None:
    """transformers would stretch the mask of the padded image over the whole image."""
    ours = FaiM2FImageProcessor(**FIXED, pad_size={"height": 128, "width": 128})
    settings, notes = their_processor(ours)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    assert len(notes) == 1 and "pad_size = {'height': 128, 'width': 128} is not written" in notes[0]
    assert theirs([picture()], return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 96)


def test_notes(tmp_path: Path) -> None:
    model = ours_of(tiny())
    model.config.backbone_freeze_norm, model.config.threshold = True, 0.3
    described = convert(model, FaiM2FImageProcessor(size=64, intermediate_size=None), tmp_path / "out")
    assert [note.split(" is not written")[0] for note in described.notes[1:]] == [
        "intermediate_size = None", "backbone_freeze_norm = True", "threshold = 0.3",
    ]  # fmt: skip
    assert "one pixel smaller" in described.notes[0]
    assert Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out").config.num_labels == 3


@pytest.mark.parametrize(
    "settings",
    [
        {**FIXED, "do_normalize": False},
        {
            "size": {"shortest_edge": 64, "longest_edge": 100},
            "size_divisor": 32,
            "ignore_index": 255,
            "image_mean": 0.5,
            "image_std": 0.25,
        },
        {"size": {"shortest_edge": 64}, "size_divisor": 0, "ignore_index": 0},
        {"do_resize": False, "do_rescale": False, "ignore_index": 9},
    ],
    ids=["fixed", "edges", "uncapped", "as they are"],
)
def test_processors_prepare_the_same_images(settings: dict[str, Any], tmp_path: Path) -> None:
    ours = FaiM2FImageProcessor(**settings)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(their_processor(ours)[0]))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    maps = [np.random.default_rng(1).integers(0, 4, (80, 120))]
    one, other = (processor([picture(80, 120)], maps, return_tensors="pt") for processor in (ours, theirs))
    assert one["pixel_values"].shape == other["pixel_values"].shape
    assert torch.equal(one["pixel_mask"], other["pixel_mask"])
    allowed = 1e-4 * float(one["pixel_values"].abs().max())
    if ours.do_resize:  # transformers rounds pixels to integers, once per direction
        allowed = 1.01 / 255 / (min(ours.image_std) if ours.do_normalize else 1)
    assert (one["pixel_values"] - other["pixel_values"]).abs().max() <= allowed
    assert torch.equal(one["class_labels"][0], other["class_labels"][0])
