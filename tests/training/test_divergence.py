"""Diverging training stops in every process, and leaves no files that could be mistaken for a model."""

import json
import math
import re
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Trainer, TrainingArguments

from hf_faim2f import FaiM2FForUniversalSegmentation
from hf_faim2f.cli import main
from hf_faim2f.data.collate import SegmentationCollator
from hf_faim2f.errors import DivergenceError, ExportError, ModelError, PredictorError
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.runtime.backends import Network, check_numbers
from hf_faim2f.runtime.predictor import Predictor
from hf_faim2f.training import Recipe
from hf_faim2f.training.run import train
from hf_faim2f.training.run_folder import newest_checkpoint, reading
from hf_faim2f.training.trainer import FaiM2FTrainer
from hf_faim2f.zoo import first_not_finite, open_model
from tests.support import forks
from tests.support.shapes import Shapes, write_tree
from tests.support.short_training import WITHOUT_WARMUP as RECIPE
from tests.support.short_training import SpoiltAfter, processor_of, shapes_model

ROOT = Path(__file__).parents[2]
CLASSES = "transformer_decoder.class_predictor.weight"


def run(model: FaiM2FForUniversalSegmentation, out: Path, recipe: Recipe = RECIPE, **more: Any) -> FaiM2FTrainer:
    return train(model, processor_of(model), Shapes(12), None, recipe, out, log_every=1, save_every=1, **more)


@pytest.mark.parametrize("at_once", [2, 1])
def test_a_loss_that_is_nan_stops_before_the_weights_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], at_once: int
) -> None:
    """Even if only the second of two accumulated batches has the NaN."""
    model = shapes_model()
    forwards = 3 * (2 // at_once) + (2 // at_once) - 1  # three good steps, and all but the last batch of the fourth
    model.transformer_decoder.class_predictor.register_forward_hook(SpoiltAfter(2 * forwards, math.nan))
    before: dict[str, Tensor] = {}

    def step(optimizer: Any, *_: Any) -> None:
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    handle = register_optimizer_step_post_hook(step)
    try:
        with pytest.raises(
            DivergenceError, match=r"diverged in step 4: loss_ce\w* is nan, at a learning rate of 0.001"
        ):
            run(model, tmp_path, per_device_batch_size=at_once)
    finally:
        handle.remove()
    weights = {name: tensor for name, tensor in model.state_dict().items() if "running" not in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items() if "num_batches" not in name)
    assert first_not_finite(model) is None
    # The checkpoint with the weights that gave NaN is renamed; the previous one stays, and there is no final model.
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "diverged-3", "recipe.json"}
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "3"  # no row for the step with NaN, nor a loss of 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path, value: float) -> None:
    """The losses are finite; the checkpoint of the previous step is good."""
    model = shapes_model()
    model.transformer_decoder.class_predictor.weight.register_hook(SpoiltAfter(2, value))
    with pytest.raises(DivergenceError, match="diverged in step 3: the gradient is not finite"):
        run(model, tmp_path)
    assert first_not_finite(model) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "recipe.json"]


class Scaler(torch.amp.GradScaler):
    """torch's own scaler, as on a GPU."""

    def __init__(self, scale: float) -> None:
        super().__init__("cpu", init_scale=scale)


def test_what_the_scaler_skips_is_no_divergence_until_there_is_nothing_to_scale_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three steps overflow and are skipped; the log has the third step's loss. Training stops below a scale of
    1."""
    model = shapes_model()
    trainer = FaiM2FTrainer(
        recipe=RECIPE,
        model=model,
        args=TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True, remove_unused_columns=False),
    )
    trainer.create_optimizer_and_scheduler(3)
    trainer.accelerator.scaler = Scaler(4.0)

    def step(loss: float, gradient: float) -> None:
        trainer._of_step = {"loss_ce": torch.tensor(loss), "loss_mask": torch.tensor(1.0)}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        model.transformer_decoder.class_predictor.weight.grad[0] = gradient
        trainer.check_step()

    step(2.0, 1.0)
    step(math.nan, math.nan)
    step(3.0, math.inf)
    logs = {"loss": 0.0, "learning_rate": 1.0, "grad_norm": math.inf}
    trainer.log(logs)
    assert "grad_norm" not in logs and logs["skipped_steps"] == 2 and logs["loss_ce"] == 2.0 and logs["loss"] == 3.0
    step(2.0, math.nan)
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert "loss" not in logs and logs["skipped_steps"] == 1  # not 0, as in transformers
    with pytest.raises(DivergenceError, match="loss_ce is nan"):
        step(math.nan, 1.0)  # which the scaler does not skip
    trainer.accelerator.scaler = Scaler(1.0)
    with pytest.raises(DivergenceError, match="the gradient is not finite"):
        step(2.0, math.inf)


def test_weights_that_overflow_are_written_nowhere(tmp_path: Path) -> None:
    """In the only step, loss and gradient are finite, but the weights after it are not."""
    model = shapes_model()

    def overflow(*_: Any) -> None:
        model.get_parameter(CLASSES).data[0, 0] = math.inf

    handle = register_optimizer_step_post_hook(overflow)
    try:
        with pytest.raises(DivergenceError, match=rf"diverged in step 1: {CLASSES} is not finite after it"):
            run(model, tmp_path, replace(RECIPE, steps=1))
    finally:
        handle.remove()
    assert first_not_finite(model) is not None
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(tmp_path: Path) -> None:
    """Such as one written by an earlier version; the same for the average."""
    run(shapes_model(), tmp_path, replace(RECIPE, steps=1))
    for name in ("model.safetensors", "average.safetensors"):
        path = tmp_path / "checkpoint-1" / name
        good = path.read_bytes()
        state = load_file(path)
        next(tensor for tensor in state.values() if tensor.is_floating_point()).fill_(math.nan)
        save_file(state, path, metadata={"format": "pt"})
        for steps in (1, 2):
            with pytest.raises(DivergenceError, match="checkpoint-1.* has weights that are not finite, the first "):
                run(shapes_model(), tmp_path, replace(RECIPE, steps=steps))
        path.write_bytes(good)
    assert run(shapes_model(), tmp_path, replace(RECIPE, steps=2)).state.global_step == 2


def test_the_backbone_alone_stops_likewise(tmp_path: Path) -> None:
    model = shapes_model()
    with pytest.raises(DivergenceError, match="diverged in step 3: the loss of the backbone alone is nan"):
        run(model, tmp_path, replace(RECIPE, backbone_steps=50, backbone_learning_rate=1e30))
    assert not (tmp_path / "backbone.safetensors").exists()


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return Shapes(8)[index]


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_own_trainer_is_stopped_by_the_model(tmp_path: Path, bf16: bool) -> None:
    """Otherwise it would log a loss of 0, and write NaN weights."""
    model = shapes_model()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=1e30, report_to=[], use_cpu=True,
        remove_unused_columns=False, logging_steps=1, bf16=bf16, save_strategy="no",
    )  # fmt: skip
    collator = SegmentationCollator(processor_of(model), do_resize=True)
    with pytest.raises(FloatingPointError, match=r"^loss_\w+ is (nan|inf): the training has diverged"):
        Trainer(model, arguments, train_dataset=Items(), data_collator=collator).train()


def test_in_float16_it_is_left_to_the_scaler() -> None:
    model = shapes_model().train()
    batch = SegmentationCollator(processor_of(model), do_resize=True)([Shapes(1)[0]])
    with torch.no_grad():
        model.transformer_decoder.class_predictor.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        model(**batch)
    with torch.autocast("cpu", torch.float16):
        assert model(**batch).loss.isnan()


def save(model: FaiM2FForUniversalSegmentation, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor_of(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data, a good model for it, and a model with a single infinite weight."""
    root = tmp_path_factory.mktemp("divergence")
    model = shapes_model()
    good = save(model, root / "good")
    with torch.no_grad():
        model.transformer_decoder.class_predictor.weight[0, 0] = math.inf
    return {"data": write_tree("folder", root / "data", 3), "good": good, "bad": save(model, root / "bad")}


REFUSED = f"bad has weights that are not finite, the first {CLASSES}: the training that wrote them diverged. Take an"


def test_every_place_that_loads_weights_refuses_them(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, data = str(places["bad"]), str(places["data"])
    image = str(places["data"] / "val" / "images" / "000.png")
    of_data = ["--data", data, "--format", "folder"]
    train_it = ["train", *of_data, "--no-tensorboard", "--out", str(tmp_path / "d")]
    commands = [
        ["predict", bad, image, "--out", str(tmp_path / "a")],
        ["evaluate", bad, *of_data, "--out", str(tmp_path / "b")],
        ["benchmark", bad, "--out", str(tmp_path / "c")],
        [*train_it, "--model", bad],
        [*train_it, "--model", bad, "--new-labels", "--labels", "a,b,c,d"],
    ]
    for command in commands:
        assert main(command) == 2, command
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and REFUSED in error, command
    with pytest.raises(ExportError, match=REFUSED):
        export_onnx(bad, tmp_path / "e", verify=False)
    with pytest.raises(PredictorError, match=REFUSED):
        Predictor.from_pretrained(bad)
    with pytest.raises(ModelError, match=REFUSED):
        open_model(bad)
    assert not list(tmp_path.iterdir())


def test_answers_that_are_nan_are_refused_whatever_gave_them(places: dict[str, Path]) -> None:
    """The weights are finite, but the network overflows; infinite logits without NaN are accepted."""
    predictor = Predictor.from_pretrained(places["good"])
    image = str(places["data"] / "val" / "images" / "000.png")
    own = predictor.network.run

    def unusable(value: float) -> Any:
        def run(batch: Tensor) -> dict[str, Tensor]:
            outputs = own(batch)
            outputs["masks_queries_logits"][:, 0, 0, 0] = value
            return outputs

        return run

    predictor.network.run = unusable(math.inf)
    assert len(predictor(image)) == 1
    predictor.network.run = unusable(math.nan)
    with pytest.raises(PredictorError, match="good outputs masks_queries_logits that are NaN"):
        predictor(image)
    model = open_model(places["good"])[0]
    model.transformer_decoder.class_predictor.register_forward_hook(SpoiltAfter(0, math.nan))
    evaluator = Evaluator(processor_of(model), model.config.id2label)
    with pytest.raises(PredictorError, match="The model outputs class_queries_logits that are NaN"):
        evaluator(model, Shapes(2))
    check_numbers(
        "it", {"label_map": torch.zeros(1, 4, 4, dtype=torch.int64), "x": torch.tensor([math.inf, -math.inf])}
    )
    assert isinstance(predictor.network, Network)


def command(places: dict[str, Path], out: Path, *more: str) -> list[str]:
    return ["train", "--model", str(places["good"]), "--data", str(places["data"]), "--format", "folder",
            "--out", str(out), "--batch-size", "2", "--image-size", "64", "--samples", "0", "--no-tensorboard",
            "--log-every", "1", "--save-every", "1", "--eval-limit", "1", *more]  # fmt: skip


@pytest.mark.newest_only
def test_the_command_says_where_and_what_to_do(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that the message recommends can be trained further."""
    out = tmp_path / "out"
    own = FaiM2FTrainer.compute_loss

    def unusable(self: FaiM2FTrainer, *arguments: Any, **more: Any) -> Any:
        loss = own(self, *arguments, **more)
        if self.state.global_step == 2:
            self._of_step["loss_dice"] = self._of_step["loss_dice"] * math.nan
        return loss

    monkeypatch.setattr(FaiM2FTrainer, "compute_loss", unusable)
    for _ in range(2):  # the same command continues from before the bad weights
        assert main(command(places, out, "--steps", "4")) == 2
        error = capsys.readouterr().err.strip()
        assert re.fullmatch(
            r"faim2f train: The training diverged in step 3: loss_dice is nan, at a learning rate of \S+\. Try a lower "
            rf"one, such as \S+, .*\. To continue from the last checkpoint, pass --model {out}/checkpoint-1, "
            r"other settings and another --out\.",
            error,
        ), error
        assert sorted(path.name for path in out.iterdir()) == [
            "checkpoint-1",
            "counts.json",
            "diverged-2",
            "recipe.json",
            "run.yaml",
        ]
    monkeypatch.undo()
    again = command(places, tmp_path / "again", "--steps", "1", "--learning-rate", "1e-5")
    again[again.index("--model") + 1] = str(out / "checkpoint-1")
    assert main(again) == 0


def test_a_run_whose_only_checkpoint_diverged_stays(places: dict[str, Path], tmp_path: Path) -> None:
    """The user may want to look at it, so the folder is not removed like that of a run without steps."""
    out = tmp_path / "out"
    assert main(command(places, out, "--steps", "9", "--learning-rate", "1e10")) == 2
    assert [path.name for path in out.glob("diverged-*")] and not list(out.glob("checkpoint-*"))


@pytest.mark.large
@pytest.mark.newest_only
def test_a_full_disk_leaves_the_checkpoints_before(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the file size simulates it, for each file of a checkpoint."""
    out = tmp_path / "out"
    assert main(command(places, out, "--steps", "1")) == 0
    sizes = {path.name: path.stat().st_size for path in (out / "checkpoint-1").iterdir() if path.is_file()}
    final = {path: path.read_bytes() for path in (out / "final").iterdir() if path.is_file()}
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name in ("average.safetensors", "optimizer.pt"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] - 1, limits[1]))
        try:
            status = main(command(places, out, "--steps", "3"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = capsys.readouterr().err.strip().splitlines()
        assert status == 2 and re.search(r"checkpoint-2 cannot be written \(.*\): free some space", error[-1])
        assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1"]
        assert final == {path: path.read_bytes() for path in (out / "final").iterdir() if path.is_file()}
    signal.signal(signal.SIGXFSZ, ignored)
    assert main(command(places, out, "--steps", "3")) == 0
    assert "it continues after step 1." in capsys.readouterr().out


@pytest.mark.large
def test_a_checkpoint_that_was_being_written_is_not_gone_on_from(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last file is missing or incomplete; it does not displace a complete checkpoint, either."""
    out = tmp_path / "out"
    assert main(command(places, out, "--steps", "1")) == 0
    for damage in ("missing", "cut"):
        shutil.copytree(out / "checkpoint-1", out / "checkpoint-90", dirs_exist_ok=True)
        state = out / "checkpoint-90" / "trainer_state.json"
        text = state.read_text().replace('"global_step": 1', '"global_step": 90')
        state.write_text(text[: len(text) // 2])
        if damage == "missing":
            state.unlink()
        capsys.readouterr()
        assert main(command(places, out, "--steps", "2" if damage == "missing" else "3")) == 0
        assert f"it continues after step {1 if damage == 'missing' else 2}." in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_damaged_checkpoint_is_one_sentence(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of a run that goes on nor of a finished one; nothing is changed."""
    out = tmp_path / "out"
    assert main(command(places, out, "--steps", "1")) == 0
    for name, is_cut, steps in (
        ("model.safetensors", False, "1"),
        ("average.safetensors", True, "2"),
        ("average.safetensors", None, "2"),
        ("model.safetensors", None, "2"),
        ("optimizer.pt", False, "2"),
        ("optimizer.pt", True, "2"),
        ("optimizer.pt", None, "2"),
    ):
        path = out / "checkpoint-1" / name
        whole = path.read_bytes()
        path.write_bytes(b"" if is_cut is None else whole[: len(whole) // 2] if is_cut else b"damaged")
        if is_cut is None and path.suffix == ".safetensors":
            path.unlink()
        capsys.readouterr()
        assert main(command(places, out, "--steps", steps)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"faim2f train: A file of {out / 'checkpoint-1'} cannot be read ("), error
        assert (out / "checkpoint-1").is_dir() and (out / "final").is_dir()
        path.write_bytes(whole)


def test_a_missing_file_of_another_checkpoint_is_not_this_one_s(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), reading(tmp_path / "checkpoint-1"):
        (tmp_path / "checkpoint-10" / "optimizer.pt").read_bytes()
    with pytest.raises(ModelError, match="checkpoint-1 cannot be read"), reading(tmp_path / "checkpoint-1"):
        (tmp_path / "checkpoint-1" / "optimizer.pt").read_bytes()


def test_a_gpu_that_is_too_small_for_a_checkpoint_does_not_damage_it(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    torch.save({"step": torch.ones(1)}, tmp_path / "optimizer.pt")
    with pytest.raises(torch.OutOfMemoryError), reading(tmp_path):
        torch.load(tmp_path / "optimizer.pt", map_location=fail, weights_only=True)


@pytest.mark.newest_only
@pytest.mark.large
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_the_same_command_goes_on_with(
    places: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """Tested with a real process and its checkpoint."""
    out = tmp_path / "out"
    process = forks.Fork(forks.COMMAND, *command(places, out, "--steps", "100000", "--workers", "1"))
    for _ in range(1200):
        if newest_checkpoint(out) is not None or process.returncode is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    error = process.wait(120).error
    assert process.returncode == 130, error
    told = [line for line in error.splitlines() if line.startswith("faim2f train: ")]
    assert told == [
        f"faim2f train: interrupted; the same command resumes from the last checkpoint in {out}, if there is one."
    ]
    assert newest_checkpoint(out) is not None and not (out / "final").exists()


PROCESSES = """
import sys
from pathlib import Path
import torch
from tests.support.short_training import WITHOUT_WARMUP, SpoiltAfter, processor_of, shapes_model
from tests.support.shapes import Shapes
from hf_faim2f.errors import DivergenceError
from hf_faim2f.training.run import train
model = shapes_model()
rank = int(__import__("os").environ["RANK"])
if rank == 1:
    model.transformer_decoder.class_predictor.register_forward_hook(SpoiltAfter(4, float("nan")))
try:
    train(model, processor_of(model), Shapes(12), None, WITHOUT_WARMUP, Path(sys.argv[1]), save_every=1, log_every=1)
except DivergenceError as error:
    sys.stdout.write(f"STOPPED {rank} {str(error).split(' at ')[0]}\\n")  # print writes its parts one by one
torch.distributed.barrier()  # both come here: neither was ended by the other's end
torch.distributed.destroy_process_group()
"""


@pytest.mark.newest_only
@pytest.mark.slow
def test_all_processes_stop_together(tmp_path: Path) -> None:
    """Only one of two processes has NaN, in its own loss."""
    out = tmp_path / "out"
    printed = ""
    for process in forks.run_together(PROCESSES, out):
        assert process.returncode == 0, process.error
        printed += process.out
    stopped = sorted(line for line in printed.splitlines() if line.startswith("STOPPED"))
    assert [line.split()[1] for line in stopped] == ["0", "1"], printed
    assert all("diverged in step 3" in line for line in stopped)
    assert json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "diverged-2", "recipe.json"]


def test_the_check_finds_one_value_among_all() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm)
    assert first_not_finite(model) is None
    norm.running_var[2] = -math.inf
    assert first_not_finite(model) == "1.running_var"
