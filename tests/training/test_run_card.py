"""A run's `final`: written before it is evaluated, with a card that can be published without edits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli import main
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.hub.publish import check_folder
from hf_faim2f.hub.sections import holes
from hf_faim2f.training.run import train
from hf_faim2f.training.run_folder import TrainedOn
from hf_faim2f.zoo import open_model
from tests.support.hub_server import running_hub
from tests.support.hub_server_rules import metadata_errors
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, Shapes, write_tree
from tests.support.short_training import RECIPE


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("cards")
    data = write_tree("folder", root / "meadows", 3)
    model = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1)
    model.save_pretrained(root / "parent")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(root / "parent")
    return {"data": str(data), "model": str(root / "parent")}


def command(places: dict[str, str], out: Path, *more: str) -> list[str]:
    return ["train", "--model", places["model"], "--data", places["data"], "--format", "folder", "--out", str(out),
            "--batch-size", "2", "--image-size", "64", "--samples", "0", "--no-tensorboard", "--log-every", "1",
            *more]  # fmt: skip


@pytest.mark.large
def test_what_a_run_wrote_is_pushed_without_another_step(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "flowers"
    assert main(command(places, out, "--steps", "2", "--license", "mit", "--seed", "3")) == 0
    assert "before it can be published" not in capsys.readouterr().out
    final = out / "final"
    text = (final / "README.md").read_text()
    files = [path.name for path in final.iterdir()]
    assert holes(text, files) == [] and metadata_errors(text) == []
    assert check_folder(final)[1] == []
    log = json.loads((out / "log.json").read_text())
    last = [entry for entry in log["log"] if "loss" in entry][-1]
    for fact in (
        "# flowers", "- data: meadows (train), 3 images", "- started from: parent", "- recipe: finetune",
        "- steps: 2", "- batch size: 2", "learning rate 0.0001", "- schedule: cosine", "decay 0.999",
        "- precision: fp32", "- seed: 3", "RandomFlip", f"class {last['loss_ce']}, mask {last['loss_mask']}",
        "(curve.png)", "On meadows (val), in percent:", "which started from parent", "under mit",
    ):  # fmt: skip
        assert fact in text, fact
    assert str(tmp_path) not in text and str(Path(places["data"]).parent) not in text
    assert (final / "curve.png").read_bytes() == (out / "curve.png").read_bytes()
    measured = {r.metric_name: r.metric_value for r in ModelCard(text).data.eval_results}
    expected = {f"semantic {name}": value for name, value in log["results"]["semantic"].items() if name != "per_class"}
    assert measured == {name: pytest.approx(value, abs=1e-4) for name, value in expected.items()}

    # `faim2f card` rewrites it, and keeps what only the run knew.
    (final / "README.md").write_text(text + "\n## Thanks\n\nTo all.\n")
    assert main(["card", str(final), "--license", "apache-2.0"]) == 0
    again = (final / "README.md").read_text()
    assert again.replace("apache-2.0", "mit").replace("\n## Thanks\n\nTo all.\n", "").split("\n# ")[1].strip() == (
        text.split("\n# ")[1].strip().replace('"flowers/final"', '"flowers"')
    )
    # More steps give other weights, which have no metrics until they are evaluated.
    monkeypatch.setattr(Evaluator, "__call__", fail)
    with pytest.raises(MemoryError):
        main(command(places, out, "--steps", "3", "--license", "mit", "--seed", "3"))
    third = (final / "README.md").read_text()
    assert "- steps: 3" in third and "## Thanks\n\nTo all." in third
    assert ModelCard(third).data.eval_results is None and "Not evaluated yet" in third and holes(third, files) == []


def fail(*arguments: Any, **more: Any) -> Any:
    raise MemoryError("no room for the evaluation")


def test_final_is_there_before_the_evaluation_that_fails(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same weights as in a successful run; running the command again only evaluates."""
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    assert main(command(places, whole, "--steps", "1")) == 0
    monkeypatch.setattr(Evaluator, "__call__", fail)
    with pytest.raises(MemoryError):
        main(command(places, failed, "--steps", "1"))
    mine, theirs = open_model(failed / "final")[0].state_dict(), open_model(whole / "final")[0].state_dict()
    assert all((mine[name] == theirs[name]).all() for name in theirs)
    assert "Not evaluated yet" in (failed / "final" / "README.md").read_text()
    monkeypatch.undo()
    (failed / "final" / "LICENSE").write_text("mine")
    (failed / "final" / "adapter_model.safetensors").write_text("mine")
    (failed / "final" / "model-00001-of-00002.safetensors").write_text("the same weights in parts")
    (failed / "final" / "pictures").mkdir()
    (failed / "final" / "pictures" / "a.txt").symlink_to("../LICENSE")
    assert main(command(places, failed, "--steps", "1")) == 0
    assert "all 1 steps are done" in capsys.readouterr().out
    for name in ("LICENSE", "adapter_model.safetensors"):
        assert (failed / "final" / name).read_text() == "mine"
    assert [path.name for path in (failed / "final").glob("model*.safetensors")] == ["model.safetensors"]
    assert (failed / "final" / "pictures" / "a.txt").read_text() == "mine"
    shutil.rmtree(failed / "checkpoint-1")  # `final` is still that of another run
    assert main(command(places, failed, "--steps", "1", "--seed", "5")) == 2
    assert "has a run with the default seed, not with seed 5" in capsys.readouterr().err
    assert (failed / "final" / "LICENSE").is_file()
    results = [json.loads((out / "log.json").read_text())["results"] for out in (whole, failed)]
    assert results[0] == results[1] and results[0]["semantic"]["mIoU"] >= 0
    log = json.loads((whole / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_semantic_mIoU" in entry for entry in log) and any("loss" in entry for entry in log)


def test_results_on_images_of_the_training_are_not_in_the_card(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(places, tmp_path / "out", "--steps", "1", "--eval-split", "train")) == 0
    assert "The card omits them, as train may have images of the training." in capsys.readouterr().out
    assert ModelCard((tmp_path / "out" / "final" / "README.md").read_text()).data.eval_results is None
    results = json.loads((tmp_path / "out" / "log.json").read_text())["results"]
    assert results["semantic"]["mIoU"] >= 0
    about = TrainedOn("flowers", "flowers", "train", 6, "val", 3)
    assert not about.is_on_training and replace(about, shared=1).is_on_training
    for split, evaluated in (("all", "val"), ("train", "all"), ("train", "train"), ("val", "val")):
        assert replace(about, split=split, evaluation_split=evaluated).is_on_training


def test_results_on_copies_of_training_images_are_not_in_the_card(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under another name in a split of its own."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(places["data"], data)
    for folder in ("images", "masks"):
        first = min((data / "train" / folder).iterdir())
        shutil.copy(first, data / "val" / folder / f"copy{first.suffix}")
    assert main(command({**places, "data": str(data)}, out, "--steps", "1")) == 0
    said = capsys.readouterr().out
    assert "1 evaluation image is also in the training data" in said
    assert "The card omits them, as val may have images of the training." in said
    assert ModelCard((out / "final" / "README.md").read_text()).data.eval_results is None


def test_a_broken_image_in_the_evaluation_leaves_final(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(places["data"], data)
    # With an intact header, so that classes can be counted, and half of its pixels.
    broken = data / "val" / "images" / "002.png"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    assert main(command({**places, "data": str(data)}, out, "--steps", "1")) == 2
    assert "002.png" in capsys.readouterr().err
    assert open_model(out / "final")[0].config.num_labels == len(LABELS)


def test_what_a_person_has_to_say_is_said_to_them(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The license; the card omits metrics measured on a part of the data."""
    out = tmp_path / "out"
    assert main(command(places, out, "--steps", "1", "--eval-limit", "1")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "before it can be published" in line]
    assert len(lines) == 2 and "names no license" in lines[0] and "in the section License" in lines[1]
    assert ModelCard.load(out / "final" / "README.md").data.eval_results is None
    assert main(["push", str(out / "final"), "me/x", "--dry-run"]) == 2
    assert "names no license (`faim2f card DIR --license apache-2.0`" in capsys.readouterr().err
    # A license that the Hub may not know is said before the training, and one that it cannot know is refused.
    assert main(command(places, out, "--steps", "1", "--eval-limit", "1", "--license", "apache-2")) == 0
    printed = capsys.readouterr().out
    assert printed.index("'apache-2' is not an id of the Hub that this version knows") < printed.index(
        "Recipe finetune"
    )
    text = (out / "final" / "README.md").read_text()
    for words in (command(places, out, "--steps", "1"), ["card", str(out / "final")]):
        assert main([*words, "--license", "Apache 2.0"]) == 2
        assert (
            "--license 'Apache 2.0' is not a license id of the Hub: did you mean apache-2.0?" in capsys.readouterr().err
        )
    assert (out / "final" / "README.md").read_text() == text
    # Finishing the run again with a license rewrites the card.
    assert main(command(places, out, "--steps", "1", "--eval-limit", "1", "--license", "mit")) == 0
    assert check_folder(out / "final", load=False)[1] == ["the card has no results: `faim2f evaluate` measures them"]


def test_a_card_whose_metadata_a_person_broke_does_not_cost_the_run(places: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(places, out, "--steps", "1")) == 0
    card = out / "final" / "README.md"
    card.write_text("---\nlicense: [\n---\n\nmine\n")
    assert main(command(places, out, "--steps", "2")) == 0
    assert card.read_text() == "---\nlicense: [\n---\n\nmine\n" and not (out / "final" / "curve.png").exists()
    assert yaml.safe_load((out / "run.yaml").read_text())["steps"] == 2


def test_of_a_run_in_python_a_person_says_what_it_was_trained_on(tmp_path: Path) -> None:
    model = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1, train_num_points=64)
    processor = FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64})
    train(model, processor, Shapes(4), None, RECIPE, tmp_path / "mine", save_every=100)
    text = (tmp_path / "mine" / "final" / "README.md").read_text()
    assert "# mine" in text and "- steps: 6" in text and "moving average, decay 0.5" in text
    found = holes(text, ["README.md", "curve.png"])
    assert any("in the section Training" in hole for hole in found) and any("license" in hole for hole in found)


@pytest.mark.large
@pytest.mark.slow
def test_push_says_what_it_would_send(places: dict[str, str], tmp_path: Path) -> None:
    """The real client with a small Hub, in its own process, because it reads its environment once."""
    import os
    import subprocess
    import sys

    out = tmp_path / "flowers"
    assert main(command(places, out, "--steps", "1", "--license", "mit")) == 0
    with running_hub({"hf_me": "me"}) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "hf_faim2f.cli", "push", str(out / "final"), "me/flowers", "--dry-run", "--json"],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_me"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["notes"] == [] and {"README.md", "curve.png", "model.safetensors"} <= {
        file["name"] for file in document["files"]
    }
