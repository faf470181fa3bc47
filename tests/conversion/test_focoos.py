"""Conversion of Focoos's files: valid ones give the same outputs, invalid ones give one sentence and no folder."""

import collections
import dataclasses
import hashlib
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.focoos import (
    build_model,
    convert,
    convert_state_dict,
    expected_shapes,
    focoos_state_dict,
    read_info,
    translate_configuration,
)
from hf_faim2f.conversion.weights import read_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli.convert import main
from hf_faim2f.errors import ConversionError
from hf_faim2f.family import FAMILY, load_config
from tests.reference import recipe
from tests.support import forks
from tests.support.published_models import TINY, add_tiny, tiny_file
from tests.support.reference_models import (
    BISENET_VARIANT,
    MODELS,
    VARIANTS,
    checkpoint,
    description,
    info_file,
    outputs,
    pixels,
)

NAME = "variant-stdc-add"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return checkpoint(NAME)


def run(*arguments: object) -> int:
    return main(["focoos", *map(str, arguments)])


@pytest.mark.parametrize(
    "kind",
    ["wrapped.pth", *(pytest.param(kind, marks=pytest.mark.newest_only) for kind in ("bare.pth", "bare.safetensors"))],
)
def test_every_kind_of_file(kind: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file, out_dir = tmp_path / kind, tmp_path / "out"
    if kind == "bare.safetensors":
        save_file(state, file)
    else:
        torch.save({"model": state, "iteration": 7, "optimizer": {"lr": [0.1]}} if "wrapped" in kind else state, file)
    assert run(file, out_dir, "--info", info_file(tmp_path)) == 0
    model = FaiM2FForUniversalSegmentation.from_pretrained(out_dir)
    expected = outputs(NAME)
    with torch.no_grad():
        ours = model(pixels(NAME))
    for key in expected:
        error = (ours[key] - expected[key]).abs().max() / expected[key].abs().max()
        assert float(error) <= 1e-4
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    processor = FaiM2FImageProcessor.from_pretrained(out_dir)
    assert processor.size == {"shortest_edge": 320, "longest_edge": 1280}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_folder_is_a_complete_repository(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"model": state}, tmp_path / "model_final.pth")
    assert run(tmp_path / "model_final.pth", tmp_path / "out", "--info", info_file(tmp_path)) == 0
    out_dir = tmp_path / "out"
    config = json.loads((out_dir / "config.json").read_text())
    auto_classes = {"AutoConfig", "AutoImageProcessor", "AutoModel"} | {
        f"AutoModelFor{kind}Segmentation" for kind in ("Universal", "Instance", "Semantic", "Image")
    }
    assert set(config["auto_map"]) == auto_classes
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}(" in (out_dir / f"{module}.py").read_text()
    assert config["architectures"] == ["FaiM2FForUniversalSegmentation"]
    assert json.loads((out_dir / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "FaiM2FImageProcessor"
    )
    assert {path.suffix for path in out_dir.iterdir()} == {".json", ".py", ".safetensors", ".md"}
    card = (out_dir / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "library_name: transformers" in card
    assert "model_final.pth" in card
    package = Path(sys.modules["hf_faim2f"].__file__ or "").parent / "model"
    for source in package.glob("*.py"):
        if source.name != "__init__.py":
            assert (out_dir / source.name).read_text() == source.read_text()
    assert set(load_file(out_dir / "model.safetensors")) == set(
        FaiM2FForUniversalSegmentation.from_pretrained(out_dir).state_dict()
    )


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("code ran",)


def truncated(path: Path, source: Path) -> None:
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])


def rewritten(path: Path, source: Path, compression: int, content: bytes | None = None) -> Path:
    """The same archive, compressed or with another pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            is_replaced = content is not None and entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, content if is_replaced else old.read(entry))  # type: ignore[arg-type]
    return path


def broken_files(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, tuple[Path, str]]:
    """Invalid checkpoints, each with words that the error message must contain."""
    good = folder / "good.pth"
    torch.save({"model": state}, good)

    def saved(name: str, content: Any) -> Path:
        torch.save(content, folder / name)
        return folder / name

    def changed(**changes: Any) -> dict[str, Any]:
        return {"model": {**state, **changes}}

    classifier = "head.predictor.forward_prediction_heads.classifier.weight"
    files: dict[str, tuple[Path, str]] = {
        "code": (saved("code.pth", {"model": state, "hook": Evil()}), "refused"),
        "missing": (
            saved("missing.pth", {"model": {k: v for k, v in state.items() if k != classifier}}),
            f"lacks key '{classifier}'",
        ),
        "unexpected": (saved("unexpected.pth", changed(extra=torch.ones(2))), "unexpected key 'extra'"),
        "shape": (saved("shape.pth", changed(**{classifier: torch.ones(81, 256)})), f"'{classifier}' has the shape"),
        "nan": (
            saved("nan.pth", changed(**{classifier: torch.full((4, 256), float("nan"))})),
            f"'{classifier}' has values that are not finite",
        ),
        "integers": (
            saved("int.pth", changed(**{classifier: torch.ones(4, 256, dtype=torch.int)})),
            f"'{classifier}' holds torch.int32",
        ),
        "sparse": (saved("sparse.pth", changed(**{classifier: torch.ones(4, 256).to_sparse()})), "sparse"),
        "no values": (saved("meta.pth", changed(**{classifier: torch.ones(4, 256, device="meta")})), "has no values"),
        "repeated": (
            saved("repeated.pth", changed(**{classifier: torch.ones(1).expand(1 << 30)})),
            "refused as forged",
        ),
        "no tensors": (saved("strings.pth", {"model": {"a": "b"}}), "'a' is not a tensor"),
        "a list": (saved("list.pth", [1, 2]), "holds a list"),
        "empty": (saved("no-entries.pth", {}), "empty state dict"),
        "folder": (folder, "is a folder"),
        "absent": (folder / "absent.pth", "does not exist"),
    }
    variance = next(key for key in state if key.endswith("running_var"))
    files["variance"] = (saved("var.pth", changed(**{variance: -state[variance]})), f"'{variance}' has negative")
    for name, make, words in (
        ("truncated", lambda path: truncated(path, good), "truncated"),
        ("compressed", lambda path: rewritten(path, good, zipfile.ZIP_DEFLATED), "is compressed"),
        ("zip", lambda path: zipfile.ZipFile(path, "w").close(), "is a zip archive, but not a torch checkpoint"),
        ("text", lambda path: path.write_text("hello"), "not a torch checkpoint"),
        ("nothing", lambda path: path.write_bytes(b""), "not a torch checkpoint"),
        ("old pickle", lambda path: path.write_bytes(pickle.dumps(Evil())), "not a torch checkpoint"),
    ):
        path = folder / f"{name.replace(' ', '-')}.pth"
        make(path)
        files[name] = (path, words)
    tensors = folder / "good.safetensors"
    save_file(state, tensors)
    truncated(folder / "truncated.safetensors", tensors)
    files["truncated safetensors"] = (folder / "truncated.safetensors", "not a complete safetensors file")
    return files


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (b"c__builtin__\nbytearray\n(I1500000000\ntR", "bytearray"),
        (b"cbuiltins\nbytearray\n(I1500000000\ntR", "builtins.bytearray"),
        (b"ctorch.storage\nUntypedStorage\n(I1500000000\ntR", "torch.storage.UntypedStorage"),
        (b"ctorch\nFloatTensor\n(I1500000000\ntR", "torch.FloatTensor"),
        (b"X\x08\x00\x00\x00builtinsX\x09\x00\x00\x00bytearray\x93(I1500000000\ntR", "STACK_GLOBAL"),
    ],
)  # fmt: skip
def test_a_number_in_a_pickle_allocates_nothing(
    call: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's restricted unpickler allows most of these calls."""
    torch.save({"a": torch.zeros(1)}, tmp_path / "good.pth")
    path = rewritten(tmp_path / "bad.pth", tmp_path / "good.pth", zipfile.ZIP_STORED, b"\x80\x02" + call + b".")
    monkeypatch.setattr(torch, "load", None)  # nothing may be unpickled
    with pytest.raises(ConversionError, match=rf"holds `{name}`, which is neither a tensor nor a plain container"):
        read_state_dict(path)


def test_values_that_a_training_saves_are_read(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    content = {
        "model": layer.state_dict(), "optimizer": torch.optim.AdamW(layer.parameters()).state_dict(), "rng": {1, 2},
        "parameter": layer.weight, "milestones": collections.Counter([7]), "half": torch.zeros(2).bfloat16(),
        "others": (torch.float32, torch.Size([1]), torch.device("cpu"), None, 0.5, "text"),
    }  # fmt: skip
    torch.save(content, tmp_path / "model.pth")
    assert torch.equal(read_state_dict(tmp_path / "model.pth")["weight"], layer.weight)


@pytest.mark.parametrize("entry", ["ema_state", "state_dict_ema"])
def test_averaged_weights_are_preferred(entry: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """As in a training of Focoos, whose averages are of all parameters and buffers; others leave out buffers."""
    averages = {key: value / 2 if value.is_floating_point() else value for key, value in state.items()}
    if entry == "state_dict_ema":
        averages = {key: value for key, value in averages.items() if "running_" not in key}
    (tmp_path / "in").mkdir()
    file, info = tmp_path / "in" / "model_best.pth", info_file(tmp_path / "in")
    torch.save({"model": state, entry: {**averages, "unsaved_buffer": torch.zeros(1)}}, file)
    described = convert(file, tmp_path / "out", str(info))
    assert [note for note in described.notes if f"the averaged weights in the entry '{entry}' are converted" in note]
    again = focoos_state_dict(FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "out"))
    for key, value in state.items():
        if value.is_floating_point() and key != "head.criterion.empty_weight":
            is_raw = "running_" in key and entry == "state_dict_ema"
            assert torch.equal(again[key], value if is_raw else value / 2), key
    # An entry that is empty or not of this model decides nothing, or is refused.
    torch.save({"model": state, entry: {}}, file)
    assert convert(file, tmp_path / "raw", str(info)).notes == []
    torch.save({"model": state, entry: {"updates": 3}}, file)
    with pytest.raises(ConversionError, match=f"the averaged weights in the entry '{entry}' lack '"):
        convert(file, tmp_path / "no", str(info))


@pytest.mark.parametrize(("entry", "prefix"), [("model", "module."), ("state_dict", "model."), ("model", "_orig_mod.")])
def test_wrapped_models(entry: str, prefix: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({entry: {prefix + key: value for key, value in state.items()}, "epoch": 3}, tmp_path / "model.pth")
    found = read_state_dict(tmp_path / "model.pth")
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.newest_only
def test_broken_checkpoints_get_one_sentence_and_leave_nothing(
    state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, target = tmp_path / "in", tmp_path / "target"
    inputs.mkdir()
    target.mkdir()
    info = info_file(inputs)
    for kind, (file, words) in broken_files(inputs, state).items():
        assert run(file, target / "out", "--info", info) == 2, kind
        captured = capsys.readouterr()
        assert words in captured.err, (kind, captured.err)
        assert captured.err.count("\n") == 1 and "Traceback" not in captured.err, (kind, captured.err)
        assert str(file) in captured.err, kind
        assert "code ran" not in captured.out + captured.err
        assert list(target.iterdir()) == [], kind


@pytest.mark.newest_only
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"config": {"num_querys": 5}},
            "'num_querys', which this converter does not support. Did you mean 'num_queries'",
        ),
        ({"config": {"backbone_config": {"model_type": "stdc", "bass": 3}}}, "'bass'"),
        ({"config": {"backbone_config": {"model_type": "mit"}}}, "kind that cannot be converted"),
        ({"config": {"backbone_config": {"model_type": "resnet", "depth": 51}}}, "'depth' = 51"),
        ({"config": {"backbone_config": {"model_type": "resnet", "depth": [50]}}}, "'depth' = [50]"),
        (
            {"config": {"backbone_config": {"model_type": "stdc", "layers": [4, 10**9]}}},
            "'layers' = [4, 1000000000], more",
        ),
        ({"config": {"backbone_config": {"model_type": "stdc", "layers": [1] * 999}}}, "'layers' = [1, 1, 1"),
        (
            {"config": {"transformer_predictor_dec_layers": 10**9}},
            "'transformer_predictor_dec_layers' = 1000000000, more",
        ),
        ({"config": {"num_queries": 10**9}}, "'num_queries' = 1000000000, more than the 65536"),
        ({"config": {"num_classes": 10**9}, "classes": None}, "'num_classes' = 1000000000, more"),
        ({"im_size": float("inf")}, "cannot be converted"),
        ({"config": {"backbone_config": {"model_type": "resnet", "in_chans": "x"}}}, "cannot be converted"),
        ({"config": {"backbone_config": {"model_type": "resnet", "act": ["relu"]}}}, "'act' = ['relu']; it must be"),
        ({"config": {"backbone_config": {"model_type": "resnet", "num_stages": 3}}}, "'num_stages' = 3"),
        ({"config": {"backbone_config": {"model_type": "resnet", "variant": "e"}}}, "'variant' = 'e'"),
        ({"config": {"backbone_config": {"model_type": "stdc", "out_features": ["res5"]}}}, "'out_features'"),
        ({"config": {"transformer_predictor_out_dim": 64}}, "'transformer_predictor_out_dim' = 64"),
        ({"config": {"pixel_decoder_feat_dim": 64}}, "'pixel_decoder_feat_dim' = 64"),
        ({"config": {"postprocessing_type": "depth"}}, "`postprocessing_type` must be one of"),
        ({"config": {"threshold": 2}}, "`threshold` must be between 0 and 1"),
        ({"config": {"num_classes": 4}}, "'num_classes' = 4, but 'classes' names 3"),
        ({"config": {"transformer_predictor_dec_layers": 3}, "classes": None}, "do not match"),
        ({"config": {"num_classes": 7}, "classes": None}, "num_classes = 7"),
        ({"model_family": "fai_detr"}, "'model_family' is 'fai_detr'"),
        ({"model_family": "bisenetformer"}, "'pixel_decoder_transformer_layers', which a bisenetformer does not have"),
    ],
)
def test_descriptions_that_cannot_be_honoured_are_refused_by_name(
    changes: dict[str, Any],
    words: str,
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({"model": state}, tmp_path / "model.pth")
    assert run(tmp_path / "model.pth", tmp_path / "out", "--info", info_file(tmp_path, **changes)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_bisenetformer_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = checkpoint(BISENET_VARIANT)
    torch.save({"model": state}, tmp_path / "model.pth")
    assert run(tmp_path / "model.pth", tmp_path / "out", "--info", info_file(tmp_path, BISENET_VARIANT)) == 0
    model = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ours = model(pixels(BISENET_VARIANT))
    for key, expected in outputs(BISENET_VARIANT).items():
        assert float((ours[key] - expected).abs().max() / expected.abs().max()) <= 1e-4
    assert model.config.pixel_decoder_type == "bisenet" and model.config.id2label[3] == "fish"
    processor = FaiM2FImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.mask_stride == 8 and processor.cls_sigmoid and not processor.predict_all_pixels
    # Settings of other models, and settings that Focoos's own model does not run with, are rejected by name.
    for changes, words in (
        ({"config": {"pixel_decoder_transformer_layers": 3}}, "layers', which a bisenetformer does not have"),
        ({"config": {"postprocessing_type": "panoptic"}}, "'postprocessing_type' = 'panoptic'"),
        ({"config": {"pixel_decoder_feat_dim": 64}}, "'pixel_decoder_feat_dim' = 64"),
        ({"config": {"transformer_predictor_out_dim": 64}}, "'transformer_predictor_out_dim' = 64"),
        ({"config": {"transformer_predictor_dec_layers": 3}}, "do not match"),
        ({"model_family": "fai_mf"}, "do not match"),
    ):
        info = info_file(tmp_path, BISENET_VARIANT, **changes)
        capsys.readouterr()
        assert run(tmp_path / "model.pth", tmp_path / "no", "--info", info) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not (tmp_path / "no").exists()


def test_names_and_files_of_info_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text("{}")
    for info, words in (
        ("fai-mf-x-ade", "Known: fai-m2f-s-ade, fai-mf-m-ade"),
        (tmp_path / "absent.json", "does not exist"),
        (tmp_path / "broken.json", "not readable JSON"),
        (tmp_path / "list.json", "holds a list"),
        (tmp_path / "other.json", "not a description of a Focoos model"),
    ):
        assert run(tmp_path / "model.pth", tmp_path / "out", "--info", info) == 2
        assert words in capsys.readouterr().err


def test_an_existing_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert run(tmp_path / "model.pth", tmp_path / "out", "--info", "fai-mf-m-ade") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    assert run(tmp_path / "model.pth", tmp_path / "no" / "out", "--info", "fai-mf-m-ade") == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device", "preprocessor_config.json"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_failure_while_writing_leaves_nothing(
    error: Exception,
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    torch.save({"model": state}, tmp_path / "model.pth")

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FaiM2FImageProcessor, "save_pretrained", full)
    assert run(tmp_path / "model.pth", target / "out", "--info", info_file(tmp_path)) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("python -m conversion: ") and "No space left on device" in told
    assert "nothing was written" in told
    assert list(target.iterdir()) == []


@pytest.mark.newest_only
def test_as_a_command(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Runs the command in its own process on a checkpoint that contains code."""
    torch.save({"model": state, "hook": Evil()}, tmp_path / "model.pth")
    arguments = ["focoos", str(tmp_path / "model.pth"), str(tmp_path / "out"), "--info", str(info_file(tmp_path))]
    result = forks.run(forks.MODULE, "conversion", *arguments)
    assert result.returncode == 2
    assert result.out == "" and "`print`" in result.error
    assert "Traceback" not in result.error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MODELS + VARIANTS)
def test_keys_and_shapes_are_those_of_the_original(name: str) -> None:
    config = translate_configuration(description(name), name).config
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(config)
    expected = {key: tuple(shape) for key, shape in description(name)["state_dict"].items()}
    assert expected_shapes(model, config) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == description(name)["parameters"]


@pytest.mark.parametrize("name", MODELS)
def test_a_published_name_gives_the_published_configuration(name: str) -> None:
    """The configurations in `family`, compared with Focoos's own configurations of the same models."""
    theirs = translate_configuration(description(name), name)
    ours = read_info(name)
    assert ours.config.to_dict() == theirs.config.to_dict() == load_config(name).to_dict()
    assert ours.processor.to_dict() == theirs.processor.to_dict()
    assert len(ours.config.id2label) == {"ade20k": 150, "coco": 80}[FAMILY[name].dataset]
    assert ours.config.id2label[0] == {"ade20k": "wall", "coco": "person"}[FAMILY[name].dataset]


@pytest.mark.parametrize("variant", ["a", "b", "c", "d"])
@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.newest_only)])
def test_there_and_back(variant: str, depth: int) -> None:
    """A fine-tuned model with 3 classes, 50 queries and a ResNet that no reference has, to Focoos's names and back."""
    config = {
        **description("variant-resnet34c-sigmoid")["config"],
        "num_classes": 3,
        "num_queries": 50,
        "cls_sigmoid": False,
        "backbone_config": {"model_type": "resnet", "depth": depth, "variant": variant, "act": "relu"},
    }
    described = translate_configuration({"config": config, "classes": ["a", "b", "c"]})
    torch.manual_seed(0)
    model = FaiM2FForUniversalSegmentation(described.config).eval()
    state = focoos_state_dict(model)
    short = "pixel_decoder.backbone.res_layers.1.blocks.0.short."
    assert (short + ("conv.conv.weight" if variant == "d" else "conv.weight")) in state
    assert ("pixel_decoder.backbone.conv1.conv1_3.conv.weight" in state) == (variant in "cd")
    again = build_model(described.config, convert_state_dict(state, described.config))
    images = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        first, second = model(images), again(images)
        single = again(images[1:])
    assert torch.equal(first.masks_queries_logits, second.masks_queries_logits)
    assert first.class_queries_logits.shape == (2, 50, 4)
    torch.testing.assert_close(single.class_queries_logits, first.class_queries_logits[1:], rtol=1e-4, atol=1e-4)


def by_the_words(state: dict[str, torch.Tensor], maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """BiSeNetFormer's levels at 1/32 and 1/16 and its mask features, computed directly from a Focoos state dict."""
    res3, res4, res5 = maps[-3:]

    def convolution(name: str, values: torch.Tensor, norm: str | None = None) -> torch.Tensor:
        weight = state[f"pixel_decoder.{name}.weight"]
        bias = state.get(f"pixel_decoder.{name}.bias")
        values = nn.functional.conv2d(values, weight, bias, padding=weight.shape[-1] // 2)
        if norm is None:
            return values
        mean, variance, scale, shift = (
            state[f"pixel_decoder.{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return nn.functional.batch_norm(values, mean, variance, scale, shift)

    def block(name: str, values: torch.Tensor) -> torch.Tensor:
        return convolution(f"{name}.conv", values, f"{name}.bn").relu()

    def refined(name: str, values: torch.Tensor) -> torch.Tensor:
        values = block(f"{name}.conv", convolution(f"{name}.proj", values))
        attention = convolution(f"{name}.conv_atten", values.mean((2, 3), keepdim=True), f"{name}.bn_atten")
        return values * attention.sigmoid()

    def enlarged(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(values, size=like.shape[2:], mode="bilinear", align_corners=False)

    level32 = refined("cp.arm32", res5) + block("cp.conv_avg", res5.mean((2, 3), keepdim=True))
    level16 = refined("cp.arm16", res4) + block("cp.conv_head32", enlarged(level32, res4))
    level8 = block("cp.conv_head16", enlarged(level16, res3))
    fused = block("ffm.convblk", convolution("ffm.proj1", res3) + convolution("ffm.proj2", level8))
    attention = convolution("ffm.conv2", convolution("ffm.conv1", fused.mean((2, 3), keepdim=True)).relu()).sigmoid()
    return [level32, level16, block("conv_out", fused + fused * attention)]


@pytest.mark.parametrize(
    ("changes", "width", "backbone"),
    [
        ({"transformer_predictor_dec_layers": 1}, 64, {"model_type": "stdc", "base": 16, "layers": [1, 2, 1]}),
        ({"transformer_predictor_dec_layers": 3}, 40, {"model_type": "resnet", "depth": 18, "variant": "d"}),
        ({"num_queries": 7}, 96, {"model_type": "resnet", "depth": 18, "variant": "b"}),
        ({"transformer_predictor_hidden_dim": 96}, 96, {"model_type": "stdc", "base": 32, "block_type": "cat"}),
    ],
    ids=["one layer", "ResNet d", "ResNet b", "equal widths"],
)
def test_bisenetformers_that_no_reference_has(changes: dict[str, Any], width: int, backbone: dict[str, Any]) -> None:
    widths = ("pixel_decoder_out_dim", "pixel_decoder_feat_dim", "transformer_predictor_out_dim", "head_out_dim")
    base = {**description(BISENET_VARIANT)["config"], **dict.fromkeys(widths, width), "num_classes": 2}
    info = {"model_family": "bisenetformer", "config": {**base, **changes, "backbone_config": backbone}}
    described = translate_configuration(info)
    assert described.notes == []
    with torch.device("meta"):
        shapes = expected_shapes(FaiM2FForUniversalSegmentation(described.config), described.config)
    state = {key: torch.from_numpy(np.asarray(recipe.tensor(7, key, list(shape)))) for key, shape in shapes.items()}
    layers = changes.get("transformer_predictor_dec_layers", 4)
    assert sum("predictor.input_proj" in key for key in state) == 2 * min(2, layers)
    model = build_model(described.config, convert_state_dict(state, described.config))
    with torch.no_grad():
        maps = model.backbone(torch.randn(2, 3, 75, 130)).feature_maps
        ours, theirs = model.pixel_decoder(maps), by_the_words(state, maps)
    for one, other in zip((*ours.pyramid, ours.mask_features), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    back = focoos_state_dict(model)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state if key != "head.criterion.empty_weight")


@pytest.mark.parametrize("name", [NAME, BISENET_VARIANT])
def test_there_and_back_is_the_original_state_dict(name: str) -> None:
    state, config = checkpoint(name), translate_configuration(description(name), name).config
    back = focoos_state_dict(build_model(config, convert_state_dict(state, config)))
    assert set(back) == set(state)
    for key, tensor in state.items():
        if key != "head.criterion.empty_weight":
            assert torch.equal(back[key], tensor), key


def test_half_precision_and_frozen_norms_are_read(state: dict[str, torch.Tensor]) -> None:
    config = translate_configuration(description(NAME), NAME).config
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    frozen = {key: tensor for key, tensor in half.items() if not key.endswith("num_batches_tracked")}
    converted = convert_state_dict(frozen, config)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in converted.values())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/alice/weights/stdc.pth", "stdc.pth"),
        ("C:\\Users\\alice\\stdc.pth", "stdc.pth"),
        ("https://alice:secret@example.org/stdc.pth?token=1", "https://example.org/stdc.pth"),
        ("imagenet", "imagenet"),
        (True, True),
    ],
)
def test_no_path_of_the_training_is_published(value: Any, shown: Any) -> None:
    info = {"config": {"num_classes": 2, "backbone_config": {"model_type": "stdc", "backbone_url": value}}}
    assert translate_configuration(info).started_from == {"backbone_url": shown}


@pytest.mark.parametrize("how", ["own", "downloaded", "digest"])
def test_only_published_weights_have_the_published_figures(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = add_tiny(monkeypatch)
    (tmp_path / "model_final.pth").write_bytes(tiny_file())
    if how == "digest":
        digest = hashlib.sha256(tiny_file()).hexdigest()
        monkeypatch.setitem(FAMILY, TINY, dataclasses.replace(preset, sha256=digest))
    convert(tmp_path / "model_final.pth", tmp_path / "out", TINY, published=how == "downloaded")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("published by Focoos at" in card) == ("license_name: focoos" in card) == (how != "own")
    assert (f"The architecture is that of {TINY}" in card) == (how == "own")


def test_every_parameter_of_focoos_reaches_its_place() -> None:
    """Changes each parameter in turn: the converted model must change, or the message must name the parameter."""
    base = description("variant-resnet34c-sigmoid")["config"]
    started_from = {"use_pretrained", "backbone_url", "pretrained"}

    def built(config: dict[str, Any]) -> tuple[Any, ...]:
        described = translate_configuration({"config": config})
        return described.config.to_dict(), described.processor.to_dict(), described.started_from, described.notes

    def other(value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return value * 2 if value > 0 else 0.5 if isinstance(value, float) else value + 32
        if isinstance(value, list):
            return [2 * element for element in value]
        return {"instance": "semantic", "relu": "silu", "c": "b", None: "https://example.org/weights.pth"}[value]

    reference = built(base)
    for name, value in base.items():
        if name == "backbone_config":
            continue
        changed = {**base, name: other(value)}
        if name in ("pixel_decoder_out_dim", "pixel_decoder_feat_dim", "transformer_predictor_out_dim"):
            with pytest.raises(ConversionError, match=name):
                built(changed)
        elif name in ("threshold", "mask_threshold"):
            assert built({**base, name: 0.25}) != reference, name
        else:
            assert built(changed) != reference, name
    for name, value in base["backbone_config"].items():
        if name == "model_type":
            continue
        changed_value = 50 if name == "depth" else 1 if name == "freeze_at" else other(value)
        changed = {**base, "backbone_config": {**base["backbone_config"], name: changed_value}}
        if name == "num_stages":
            with pytest.raises(ConversionError, match=name):
                built(changed)
        else:
            result = built(changed)
            assert result != reference, name
            assert (name in result[2]) == (name in started_from)


def test_configurations_of_ours_are_refused_by_name_too() -> None:
    with pytest.raises(TypeError, match="no parameter `num_querys`; did you mean `num_queries`"):
        FaiM2FConfig(num_querys=3)
    with pytest.raises(TypeError, match="no parameter `num_classes`; did you mean `num_labels`"):
        FaiM2FConfig(num_classes=3)
    with pytest.raises(TypeError, match="no parameter `deptsh`; did you mean `depths`"):
        FaiM2FConfig(backbone_config={"model_type": "swin", "deptsh": [1, 1, 1, 1]})
    with pytest.raises(TypeError, match="STDCConfig has no parameter `base`; did you mean `embedding_size`"):
        FaiM2FConfig(backbone_config={"model_type": "faim2f_stdc", "base": 64})
    with pytest.raises(ValueError, match="Did you mean `faim2f_stdc`"):
        FaiM2FConfig(backbone_config={"model_type": "faim2f_std"})
    for values, words in (
        ({"decoder_layers": 0}, "`decoder_layers` must be a positive integer, got 0"),
        ({"hidden_dim": 30}, "`hidden_dim` must be divisible"),
        ({"mask_threshold": -0.1}, "`mask_threshold` must be between 0 and 1"),
        ({"backbone_config": {"model_type": "faim2f_stdc", "out_indices": [3, 4]}}, "at least 3 feature maps"),
        ({"backbone_config": {"model_type": "bert"}}, "no `stage_names`"),
    ):
        with pytest.raises(ValueError, match=words):
            FaiM2FConfig(**values)
