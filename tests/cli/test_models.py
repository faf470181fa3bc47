"""`faim2f models`, and other commands with a published name instead of a folder."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from hf_faim2f import FaiM2FForUniversalSegmentation, load_config
from hf_faim2f.cli import main
from hf_faim2f.cli.models import rows
from hf_faim2f.data.dataset import Description
from hf_faim2f.errors import ModelError
from hf_faim2f.family import FAMILY
from hf_faim2f.family.mask2former import labels_and_stuff, zoo, zoo_models_named
from hf_faim2f.family.presets import label_keywords
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.training import start as start_module
from hf_faim2f.training.start import start_model
from hf_faim2f.zoo import open_model, resolve
from tests.support.published_models import TINY, add_tiny, focoos_file, path_of, tiny_file
from tests.support.weights_server import Fault, WeightsServer, go_online, running_weights_server


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsServer]:
    """A mirror with the checkpoint of `TINY`, an empty cache, and a working directory with images."""
    preset = add_tiny(monkeypatch)
    go_online(monkeypatch)
    monkeypatch.setenv("FAIM2F_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    with running_weights_server() as server:
        monkeypatch.setenv("FAIM2F_WEIGHTS_URL", server.url)
        server.files[path_of(preset.weights_url)] = tiny_file()
        yield server


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["models", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_the_table(mirror: WeightsServer, capsys: pytest.CaptureFixture[str]) -> None:
    resolve(TINY)
    capsys.readouterr()
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line for line in lines if line}
    assert set(table) >= {*FAMILY, *(model.short for model in zoo().values()), "Cache:", "Focoos"}
    assert "yes, " in table[TINY] and "12.30 mIoU" in table[TINY] and "456" in table[TINY]
    line = table["mask2former/ade20k/semantic/R50"]
    assert "ADE20K, semantic" in line and "44.0 M" in line and "47.20 mIoU" in line and "CC BY-NC 4.0" in line
    assert "yes" not in line and "not stated by Focoos" in table["fai-mf-m-ade"] and "14.0 M" in table["fai-mf-m-ade"]


def test_the_document(mirror: WeightsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = listed(capsys, TINY)["models"]
    assert row["cached"] is None and row["sha256"] is None and row["metrics"] == {"mIoU": 12.3}
    folder = resolve(TINY)
    (row,) = listed(capsys, TINY)["models"]
    assert row["cached"] == str(folder) and len(row["sha256"]) == 64 and row["url"].startswith(mirror.url)
    assert row["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    document = listed(capsys, "--clean", TINY)
    assert document["removed"] == [{"name": TINY, "bytes": row["bytes"]}] and not folder.exists()
    assert document["models"][0]["cached"] is None and document["models"][0]["sha256"] == row["sha256"]
    assert listed(capsys, "--clean")["removed"] == []


def test_a_partial_download_is_listed_and_removed(
    mirror: WeightsServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.faults = [Fault("cut", at=49_152), Fault(404, 9)]
    monkeypatch.setattr("hf_faim2f.download.URL_WAITS", (0.0,) * 4)
    with pytest.raises(ModelError):
        resolve(TINY)
    assert main(["models", TINY]) == 0
    assert "partly, 49." in capsys.readouterr().out
    assert listed(capsys, "--clean")["removed"][0]["bytes"] > 49_152


def test_clean_leaves_alone_what_is_not_its_own(mirror: WeightsServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    resolve(TINY)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (cache / "linked-01234567").symlink_to(outside)
    (cache / "mine").mkdir()
    (cache / "mine-01234567").mkdir()
    (cache / "mine-01234567" / "record.json").write_text('{"name": "mine", "url": "https://x"}')
    for name in ("mine", "mine-01234567"):
        (cache / name / "file").touch()
    assert main(["models", "--clean"]) == 0
    assert (outside / "file").exists() and (cache / "mine" / "file").exists()
    assert (cache / "mine-01234567" / "file").exists() and not list(cache.rglob("model.safetensors"))


@pytest.mark.parametrize("arguments", [["fai-mf-m-ad"], ["--clean", "nothing"]])
def test_unknown_names(arguments: list[str], mirror: WeightsServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *arguments]) == 2
    assert "There is no published model" in capsys.readouterr().err


def test_parameters_are_those_of_the_networks() -> None:
    counted = {row.name: row.parameters for row in rows()}
    # In one major version of transformers, Swin has an unused norm.
    for name, unused in (("mask2former/coco/panoptic/R50", 0), ("mask2former/coco/instance/swin_tiny", 2 * 768)):
        (model,) = zoo_models_named(name)
        config = FaiM2FConfig(**model.config, **label_keywords(labels_and_stuff(model.data, model.subtask)[0]))
        with torch.device("meta"):
            network = FaiM2FForUniversalSegmentation(config)
        assert counted[name] in (count := sum(own.numel() for own in network.parameters()), count - unused)


@pytest.mark.parametrize(
    "command",
    [
        ["predict", TINY, "photos", "--out", "out", "--no-overlays"],
        ["export", "onnx", TINY, "out", "--size", "64x64", "--batch", "1", "--no-check"],
        ["card", TINY, "--license", "apache-2.0"],
        pytest.param(["push", TINY, "me/tiny", "--dry-run", "--weights-url"], marks=pytest.mark.large),
    ],
    ids=lambda command: command[0],
)
def test_commands_take_a_published_name(
    command: list[str],
    mirror: WeightsServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command[0] == "push":  # after the checks, it asks the Hub, where nothing listens
        command = [*command, mirror.url]
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    status = main(command)
    printed = capsys.readouterr()
    assert len(mirror.asked) == 1 and TINY in printed.err
    if command[0] == "push":
        assert status == 2 and "http://127.0.0.1:1 cannot be reached" in printed.err
        return
    assert status == 0, printed.err
    if command[0] == "card":
        assert "license: apache-2.0" in (resolve(TINY) / "README.md").read_text()
    else:
        assert any((tmp_path / "out").iterdir())


def test_bulk_inference_pins_a_published_name(mirror: WeightsServer) -> None:
    pytest.importorskip("pyarrow")
    from hf_faim2f.distributed.plan import pin_model

    pinned, folder = pin_model(TINY)
    assert pinned.revision == "" and pinned.here() == folder == resolve(TINY)
    on_another_machine = replace(pinned, place="/not/here")
    assert on_another_machine.here() == folder


def test_models_of_the_hub_have_no_folder_to_write_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "someone/something"]) == 2
    assert "is not a folder here" in capsys.readouterr().err
    assert main(["push", "run/final", "me/tiny"]) == 2


def test_training_starts_with_published_weights_or_from_scratch(
    mirror: WeightsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(start_module, "NEW_MODELS", (*start_module.NEW_MODELS, TINY))
    flowers = Description("flowers", "semantic", ("petal", "leaf"))
    with pytest.raises(ModelError, match=r"150 classes, but flowers 2: .*--new-labels.*--from-scratch"):
        start_model(TINY, flowers)
    assert not mirror.asked  # the error comes before any download
    scratch = start_model(TINY, flowers, from_scratch=True)
    assert "its weights are random" in scratch.notes[0] and not mirror.asked
    start = start_model(TINY, flowers, new_labels=True)
    assert "starts with its published weights" in start.notes[0] and len(mirror.asked) == 1
    own, published, random = start.model, open_model(TINY)[0], scratch.model
    name = "backbone.stem.convolution.weight"
    assert torch.equal(own.get_parameter(name), published.get_parameter(name))
    assert not torch.equal(own.get_parameter(name), random.get_parameter(name))
    with pytest.raises(ModelError, match="is not an architecture to train from scratch: choose from fai-m2f-s-ade"):
        start_model("someone/something", flowers, from_scratch=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / TINY).mkdir()
    with pytest.raises(ModelError, match=f"{TINY} is a folder here, .* architecture .*: rename the folder"):
        start_model(TINY, flowers, from_scratch=True)


def test_training_on_a_published_backbone(mirror: WeightsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_module, "NEW_MODELS", (*start_module.NEW_MODELS, TINY))
    start = start_model(TINY, Description("flowers", "semantic", ("petal", "leaf")), backbone=TINY)
    published = open_model(TINY)[0]
    for name, tensor in start.model.backbone.state_dict().items():
        assert torch.equal(tensor, published.backbone.state_dict()[name])
    assert load_config(TINY).num_labels == 150 and start.model.config.num_labels == 2


@pytest.mark.large  # measures memory in another process
def test_benchmark_of_a_published_name(mirror: WeightsServer, tmp_path: Path) -> None:
    name = "fai-m2f-s-ade"
    mirror.files[path_of(FAMILY[name].weights_url)] = focoos_file(name)
    quick = ["--runs", "1", "--warm-up", "1", "--batch-sizes", "1", "--images", "photos", "--device", "cpu"]
    assert main(["benchmark", name, "--out", "out", *quick]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert row["model"] == name and row["metric"]["value"] == FAMILY[name].published["mIoU"]
    assert len(mirror.asked) == 1


@pytest.mark.large
def test_quantize_exports_a_published_name_first(mirror: WeightsServer, tmp_path: Path) -> None:
    assert main(["quantize", TINY, "int8", "--images", "photos", "--max-error", "1"]) == 0
    assert (tmp_path / "int8" / "quantization.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "int8", "photos"}
