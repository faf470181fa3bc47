"""Models by name: every kind of name resolves to a folder that loads; cached models need no network; faults are
handled."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.mask2former import convert
from PIL import Image

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, Predictor, download, model_cache
from hf_faim2f.cli import main
from hf_faim2f.download import size_in_words
from hf_faim2f.errors import ModelError, PredictorError
from hf_faim2f.family import ALIASES, FAMILY
from hf_faim2f.family.mask2former import zoo
from hf_faim2f.zoo import model_type, open_model, open_settings, own_folder, published_source, resolve
from tests.support.mask2former_models import RESNET, saved, tiny
from tests.support.published_models import (
    TINY,
    add_tiny,
    focoos_file,
    mark_large,
    path_of,
    shrink_the_zoo,
    tiny_file,
    torch_file,
    zoo_file,
)
from tests.support.reference_models import RELATIVE_ERROR, outputs, pixels, relative_error, small_model
from tests.support.weights_server import Fault, WeightsServer, go_online, running_weights_server

FORK: Any = multiprocessing.get_context("fork")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAIM2F_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def mirror(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsServer]:
    """A mirror with the checkpoint of `TINY`."""
    preset = add_tiny(monkeypatch)
    go_online(monkeypatch)
    monkeypatch.setattr(download, "URL_WAITS", (0.0,) * 4)
    with running_weights_server() as server:
        monkeypatch.setenv("FAIM2F_WEIGHTS_URL", f"{server.url}/")
        server.files[path_of(preset.weights_url)] = tiny_file()
        yield server


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def refused(name: str = TINY) -> str:
    with pytest.raises(ModelError) as error:
        resolve(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_name_is_enough_and_the_second_time_needs_no_network(
    mirror: WeightsServer, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor.from_pretrained(TINY)
    said = capsys.readouterr()
    size = len(mirror.files[mirror.asked[0][0]])
    assert said.err.count(TINY) == 2 and f"{size_in_words(size)} from {mirror.url}/" in said.err
    assert "license not stated by Focoos" in said.err and str(cache) in said.err and said.out == ""
    first = predictor(PICTURE)[0].label_map
    assert predictor.network.name == TINY and predictor.network.config._name_or_path == TINY
    (entry,) = cache.iterdir()
    assert files_of(entry) >= {"record.json", "lock", "config.json", "model.safetensors", "README.md"}
    assert not list(entry.rglob("*.pth*"))
    go_online(monkeypatch, False)
    monkeypatch.setattr(torch, "load", None)
    started = time.perf_counter()
    folder = resolve(TINY)
    assert time.perf_counter() - started < 0.05 and len(mirror.asked) == 1
    assert torch.equal(Predictor.from_pretrained(TINY)(PICTURE)[0].label_map, first)
    assert torch.equal(Predictor.from_pretrained(folder)(PICTURE)[0].label_map, first)
    assert open_settings(TINY)[0].num_labels == 150
    FaiM2FForUniversalSegmentation.from_pretrained(folder)  # a normal folder
    assert TINY not in capsys.readouterr().err


def test_what_is_offline_and_not_in_the_cache(mirror: WeightsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_online(monkeypatch, False)
    assert f"{TINY} is not in the cache, and HF_HUB_OFFLINE is set" in refused()
    assert not mirror.asked


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fai-mf-m-ad", "did you mean fai-mf-m-ade?"),
        ("fai_mf_l_ade", "did you mean fai-mf-l-ade?"),
        ("mask2former/coco/panoptic/swin_tinny", "did you mean mask2former/coco/panoptic/swin_tiny?"),
        ("coco/panoptic/maskformer2_R50_bs16", "did you mean coco/panoptic/maskformer2_R50_bs16_50ep?"),
        ("qwertyuiop", "`faim2f models` lists the names"),
        ("swin", "`faim2f models` lists the names"),
        ("configs", "`faim2f models` lists the names"),
        ("/no/such/folder", "is not a folder here"),
        ("./folder", "is not a folder here"),
        (__file__, "is a file, and not a model's folder"),
        ("maskformer2_swin_tiny_bs16_50ep", "could be mask2former/coco/panoptic/swin_tiny, mask2former/coco/instance"),
    ],
)
def test_unknown_names_are_said_at_once(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_online(monkeypatch)
    started = time.perf_counter()
    assert words in refused(name)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("text", ["[1, 2]", '"words"', "3"])
def test_a_configuration_that_is_no_object_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"is a model of type None, not 'faim2f'\.|cannot be loaded: "):
        open_settings(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "faim2f"}')
    index = "model.safetensors.index.json"
    for file, content, words in (
        ("LICENSE", "", f"{tmp_path} has no preprocessor_config.json, which says how images are resized: copy that"),
        ("preprocessor_config.json", "[]", "has no weights (model.safetensors): copy them there"),
        ("model.onnx", "", "has no weights (model.safetensors), but model.onnx: name the folder that it was exported"),
        (index, "[]", "preprocessor_config.json is damaged (it holds a list): copy it"),  # not the defaults
        ("preprocessor_config.json", "{}", f"{index} is damaged (it holds a list)"),
        (index, '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "lacks model-00001-of-00002.safetensors"),
    ):
        (tmp_path / file).write_text(content)
        with pytest.raises(ModelError) as error:
            open_model(tmp_path)
        assert words in str(error.value) and "huggingface" not in str(error.value)


def test_the_error_is_of_the_class_that_is_asked_for() -> None:
    with pytest.raises(PredictorError, match="did you mean"):
        Predictor.from_pretrained("fai-mf-m-ad")


def test_a_folder_comes_before_a_published_name(
    mirror: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / TINY).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_cache, "converted_model", None)
    warned: list[str] = []
    monkeypatch.setattr("hf_faim2f.zoo.logger.warning_once", warned.append)
    assert resolve(TINY) == Path(TINY) and not mirror.asked
    assert len(warned) == 1 and f"{TINY} is a folder here and also a published model: the folder is used" in warned[0]


@pytest.mark.parametrize("name", ["swin", "configs", "maskformer2_R50_bs16_50ep"])
def test_a_folder_with_any_name(
    name: str, mirror: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose name is part of all paths of the zoo, or is that of several of its models."""
    small_model().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert resolve(name) == Path(name) == own_folder(name) and model_type(name) == "faim2f" and not mirror.asked


def test_a_revision_of_transformers_model_is_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return saved(cache.parent / str(revision), tiny(num_labels=3 if revision is None else 4))

    monkeypatch.setattr("hf_faim2f.zoo.download_model", download)
    monkeypatch.setattr("hf_faim2f.zoo.model_type", lambda name, revision: "mask2former")
    name = "me/my-instance-model"
    for _ in range(2):  # the second time from the cache
        for revision, labels in ((None, 3), ("v2", 4)):
            folder = resolve(name, revision=revision)
            assert FaiM2FConfig.from_pretrained(folder).num_labels == labels
    assert asked == [(name, None), (name, "v2")]
    assert f"`{name}` of transformers" in (folder / "README.md").read_text()


def test_all_published_names_and_their_urls() -> None:
    names = [*FAMILY, *ALIASES, *(name for model in zoo().values() for name in (model.short, model.name))]
    found = {name: published_source(name, "") for name in names}
    assert all(found.values()) and len({source.url for source in found.values() if source}) == len(FAMILY) + 47
    for name, url in (
        ("fai-m2f-m-ade", "https://public.focoos.ai/pretrained_models/fai-mf-m-ade/model_final.pth"),
        ("mask2former/coco/panoptic/r50", "https://dl.fbaipublicfiles.com/maskformer/mask2former/coco/panoptic/"
         "maskformer2_R50_bs16_50ep/model_final_94dc52.pkl"),
        ("mapillary-vistas/semantic/maskformer_R50_bs16_300k", "https://dl.fbaipublicfiles.com/maskformer/mask2former/"
         "mapillary_vistas/semantic/maskformer_R50_bs16_300k/model_final_6c66d0.pkl"),
        ("configs/coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml", "https://dl.fbaipublicfiles."
         "com/maskformer/mask2former/coco/panoptic/maskformer2_swin_tiny_bs16_50ep/model_final_9fd0ae.pkl"),
    ):  # fmt: skip
        source = published_source(name, "")
        assert source is not None and source.url == url, name
    assert published_source("facebook/mask2former-swin-tiny-coco-panoptic") is None


def test_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    def url(mirror: str | None) -> str:
        source = published_source("fai-mf-m-ade", mirror)
        assert source is not None
        return source.url

    path = "pretrained_models/fai-mf-m-ade/model_final.pth"
    assert url("https://me/files/") == f"https://me/files/{path}" == url("https://me/files")
    assert url("https://me/my.pth?key=1") == "https://me/my.pth?key=1"
    monkeypatch.setenv("FAIM2F_WEIGHTS_URL", "https://env")
    assert url(None) == f"https://env/{path}" and url("") == f"https://public.focoos.ai/{path}"


@pytest.mark.parametrize("how", ["page", "disguised", "garbage", "truncated", "pickle", "other"])
def test_a_file_that_is_no_checkpoint_is_refused_and_forgotten(mirror: WeightsServer, cache: Path, how: str) -> None:
    (path,) = mirror.files
    good = mirror.files[path]
    if how in ("page", "disguised"):
        mirror.faults = [Fault(how)]
    else:
        bad = {"garbage": b"\0" * 99, "truncated": good[:-200], "pickle": b"cos\nsystem\n(S'touch ran'\ntR.",
               "other": torch_file(small_model().state_dict())}  # fmt: skip
        mirror.files[path] = bad[how]
    message = refused()
    assert mirror.url in message, message
    assert {path.name for path in cache.rglob("*") if path.is_file() and path.stat().st_size} <= {
        "record.json", "model_final.pth.partial.json"
    }  # fmt: skip
    mirror.files[path] = good
    assert resolve(TINY).is_dir()


def test_a_changed_file_is_refused_after_the_model_was_removed(
    mirror: WeightsServer, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(TINY)
    (path,) = mirror.files
    good = mirror.files[path]
    assert main(["models", TINY, "--clean"]) == 0
    assert f"Removed: {TINY}, " in capsys.readouterr().out and files_of(cache) == {"record.json", "lock"}
    mirror.files[path] = tiny_file(seed=1)
    assert len(mirror.files[path]) == len(good)
    message = refused()
    assert "has changed since" in message and "record.json" in message and not list(cache.rglob("*.pth"))
    mirror.files[path] = good + b"more"
    message = refused()
    assert f"has {len(good) + 4} bytes now, and had {len(good)}" in message
    (record,) = cache.rglob("record.json")
    assert f"If you trust the new file, delete {record}." in message
    mirror.files[path] = good
    assert resolve(TINY).is_dir()


def test_a_pinned_hash(mirror: WeightsServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILY, TINY, replace(FAMILY[TINY], sha256="0" * 64))
    assert "has the SHA-256" in refused() and not list(cache.rglob("*.pth"))


def test_another_version_of_the_converter_converts_anew(
    mirror: WeightsServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(TINY)
    monkeypatch.setattr(model_cache, "VERSION", model_cache.VERSION + 1)
    second = resolve(TINY)
    assert first != second and second.is_dir() and not first.exists() and len(mirror.asked) == 2


@pytest.mark.parametrize("damage", ["weights", "config", "half"])
def test_a_damaged_cache_is_made_anew(mirror: WeightsServer, cache: Path, damage: str) -> None:
    folder = resolve(TINY)
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"")
    elif damage == "config":
        (folder / "config.json").unlink()
    else:  # like after a process was killed
        shutil.move(folder, folder.with_name(f".{folder.name}.abc"))
    assert resolve(TINY) == folder and open_model(TINY)[0] is not None
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written(mirror: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FAIM2F_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in refused() and "FAIM2F_CACHE" in refused()


def test_a_full_disk_at_the_conversion(mirror: WeightsServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FaiM2FForUniversalSegmentation, "save_pretrained", full)
        message = refused()
    assert "was downloaded, but could not be written" in message and "No space left on device" in message
    assert "model_final.pth" in files_of(cache) and "config.json" not in files_of(cache)
    resolve(TINY)
    assert len(mirror.asked) == 1


def test_two_processes_download_once(mirror: WeightsServer, cache: Path) -> None:
    mirror.faults = [Fault("hang", at=49_152)]
    told: Any = FORK.Queue()

    def run() -> None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        told.put(str(resolve(TINY)))

    first, second = FORK.Process(target=run), FORK.Process(target=run)
    first.start()
    assert mirror.reached.wait(60)
    second.start()
    time.sleep(0.3)
    mirror.released.set()
    assert told.get(timeout=60) == told.get(timeout=60) == str(resolve(TINY))
    first.join()
    second.join()
    assert len(mirror.asked) == 1


def test_ctrl_c_in_a_command_says_what_is_kept(
    mirror: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    PICTURE.save(tmp_path / "photo.png")
    command = ["predict", TINY, str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), "--no-overlays"]
    mirror.faults = [Fault("hang", at=49_152)]
    process = FORK.Process(target=lambda: os._exit(main(command)))
    process.start()
    assert mirror.reached.wait(60)
    arrived = 0
    while arrived < 49_152:
        assert process.is_alive()
        for path in tmp_path.rglob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # another file was renamed in the meantime
                arrived = max(arrived, path.stat().st_size)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and not (tmp_path / "out").exists()
    assert f"interrupted; 49.2 kB of {TINY} have arrived; the same command continues" in capfd.readouterr().err
    assert main(command) == 0
    assert mirror.ranges[-1] == "bytes=49152-"
    assert json.loads((tmp_path / "out" / "photo.json").read_text())["model"] == TINY


def test_weights_url_of_a_command(
    mirror: WeightsServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("FAIM2F_WEIGHTS_URL", "http://127.0.0.1:1")
    PICTURE.save(tmp_path / "photo.png")
    command = ["predict", TINY, str(tmp_path / "photo.png"), "--no-overlays", "--out"]
    assert main([*command, str(tmp_path / "one"), "--weights-url", mirror.url]) == 0
    assert os.environ["FAIM2F_WEIGHTS_URL"] == "http://127.0.0.1:1"
    capsys.readouterr()
    assert main([*command, str(tmp_path / "two"), "--weights-url", "file:///etc/passwd"]) == 2
    assert "not a URL to download from" in capsys.readouterr().err
    arguments = ["predict", str(resolve(TINY, weights_url=mirror.url)), str(tmp_path), "--out", str(tmp_path / "three")]
    assert main([*arguments, "--weights-url", mirror.url]) == 2
    assert "--weights-url is for published models" in capsys.readouterr().err


def test_the_zoo_s_checkpoints(mirror: WeightsServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_the_zoo(monkeypatch)
    name = "coco/panoptic/maskformer2_swin_tiny_bs16_50ep"
    content = zoo_file(zoo()[name], monkeypatch)
    mirror.files[path_of(zoo()[name].weights_url)] = content[:-1] + b"!"
    assert "has the MD5" in refused(name)
    mirror.files[path_of(zoo()[name].weights_url)] = content
    folder = resolve("mask2former/coco/panoptic/swin_tiny")
    assert folder == resolve(name) and folder.name == "mask2former-coco-panoptic-swin_tiny"
    predictor = Predictor.from_pretrained(name)
    assert predictor.subtasks[0] == "panoptic" and predictor.network.config.num_labels == 133


def test_transformers_mask2former_of_the_hub(
    mirror: WeightsServer,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a cache with the layout of the Hub's library, online, then offline."""
    hub = tmp_path / "hub" / "models--us--mask2former-tiny-coco-instance"
    theirs = tiny(RESNET)
    saved(hub / "snapshots" / ("1" * 40), theirs)
    settings = hub / "snapshots" / ("1" * 40) / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "resample": 3}))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("1" * 40)
    go_online(monkeypatch, False)
    cache_of_hub(monkeypatch, tmp_path / "hub")
    name = "us/mask2former-tiny-coco-instance"
    ours, _ = open_model(name)
    said = capsys.readouterr().err
    notes = convert(str(hub / "snapshots" / ("1" * 40)), tmp_path / "own", name=name.split("/")[1]).notes
    assert notes and all(f"{name}: {note}\n" in said for note in notes)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(ours(image).class_queries_logits, theirs(image).class_queries_logits) < RELATIVE_ERROR
    shutil.rmtree(hub)
    assert resolve(name).is_relative_to(cache) and open_model(name)[0].config.postprocessing_type == "instance"


def cache_of_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Redirects huggingface_hub and transformers to another cache; both read its location on import."""
    import transformers.utils.hub
    from huggingface_hub import _snapshot_download, constants, file_download

    for module in (constants, file_download, _snapshot_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(folder), raising=False)
    for name in ("TRANSFORMERS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.setattr(transformers.utils.hub, name, str(folder), raising=False)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(folder))


@pytest.mark.newest_only
@pytest.mark.slow  # checkpoints of up to 66 million parameters
@pytest.mark.parametrize("name", mark_large(FAMILY))
def test_every_model_of_focoos_end_to_end(name: str, mirror: WeightsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads and converts the model, compares it with the outputs of Focoos's implementation, then opens it
    offline."""
    mirror.files[path_of(FAMILY[name].weights_url)] = focoos_file(name)
    model, _ = open_model(name)
    with torch.no_grad():
        ours = model(pixels(name))
    for key, theirs in outputs(name).items():
        assert relative_error(ours[key], theirs) < RELATIVE_ERROR
    del model, ours
    mirror.files.clear()
    go_online(monkeypatch, False)
    predictor = Predictor.from_pretrained(name)
    predictor.network.processor.size = {"shortest_edge": 64, "longest_edge": 128}
    assert predictor(PICTURE)[0].label_map.shape == (48, 64) and len(mirror.asked) == 1


@pytest.mark.large
@pytest.mark.newest_only
@pytest.mark.slow  # 47 conversions
def test_every_model_of_the_zoo_end_to_end(mirror: WeightsServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks with the published names, labels, queries, sizes and URLs."""
    shrink_the_zoo(monkeypatch)
    for model in list(zoo().values()):
        content = zoo_file(model, monkeypatch)
        model = zoo()[model.name]
        mirror.files[path_of(model.weights_url)] = content
        predictor = Predictor.from_pretrained(model.short)
        assert predictor.subtasks[0] == model.subtask
        predictor.network.processor.size = {"shortest_edge": 64, "longest_edge": 128}
        assert predictor(PICTURE)[0].label_map.shape == (48, 64)
        with monkeypatch.context() as patch:
            go_online(patch, False)
            assert resolve(model.name).is_relative_to(cache)
    assert len(mirror.asked) == 47
