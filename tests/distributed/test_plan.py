"""Bulk inference without Ray: a worker writes the predictor's results, once per image."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

pytest.importorskip("ray")

from hf_faim2f.cli import main, predict_ray
from hf_faim2f.distributed import BulkError, Plan, Settings
from hf_faim2f.distributed.parts import Piece, from_batch, into_parts, to_batch
from hf_faim2f.distributed.plan import begin, digest_of, locked, pin_model, read_plan
from hf_faim2f.distributed.rows import find_rows, names_rows, read_pieces
from hf_faim2f.distributed.workers import Attempts, Done, Share, Worker, share_out
from hf_faim2f.runtime import Predictor
from hf_faim2f.zoo import RUNTIME_FILES
from tests.support import forks
from tests.support.lively_model import photographs, save_model
from tests.support.parquet_rows import check_rows, rows_of


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, image in zip(("a.png", "b.png", "c.png", "more/a.png", "more/d.png"), photographs(), strict=True):
        image.save(folder / name)
    return folder


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, with its parts predicted in this process, one after the other, by the worker that Ray would
    start."""

    def parts(plan: Plan, left: list[int], device: str | None, batch_size: int | None, workers: int | None) -> Any:
        worker = Worker(str(plan.out), plan.digest, "cpu", batch_size)
        for number in left:
            done = worker({"part": np.array([number])})
            if done["failure"][0]:
                raise BulkError(done["failure"][0])
            yield Done(number, int(done["images"][0]), int(done["bad"][0]))

    monkeypatch.setattr(predict_ray, "connected", lambda address: nullcontext())
    monkeypatch.setattr(predict_ray, "predict_parts", parts)
    return lambda *words: main(["predict", *map(str, words), "--ray", "local"])


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_rows(path: Path, values: list[Any], name: str = "image", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": ["x"] * len(values), name: values}), path, **options)
    return path


def test_rows_are_what_the_predictor_says(
    model_folder: Path, photos: Path, tmp_path: Path, by_hand: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """For files and datasets together. An unusable image gives a row with the reason, and does not affect others."""
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:300])
    odd = os.fsencode(photos) + b"/\xff.png"
    shutil.copy(photos / "a.png", odd)
    pictures = photographs()
    values: list[Any] = [{"bytes": png(one), "path": f"{index}.png"} for index, one in enumerate(pictures)]
    values[2] = {"bytes": None, "path": "/etc/passwd"}
    values[3] = {"bytes": b"no image 3", "path": None}
    table = write_rows(tmp_path / "rows" / "train.parquet", values, row_group_size=2)
    bytes_ = write_rows(tmp_path / "bytes.parquet", [png(pictures[0]), b"", None], "photo")
    out = tmp_path / "out"
    words = (model_folder, photos, table, bytes_, "--out", out, "--part-size", 3, "--threshold", "0.1")
    assert by_hand(*words) == 1
    rows = rows_of(out)
    files = ["a.png", "b.png", "broken.png", "c.png", "\\xff.png", "more/a.png", "more/d.png"]
    keys = [str(photos / name) for name in files]
    keys += [f"{table}#{row}" for row in range(5)] + [f"{bytes_}#{row}" for row in range(3)]
    assert list(rows) == keys and len(list(out.glob("*.parquet"))) == 3 + 2 + 1
    errors = {key: row["error"] for key, row in rows.items() if row["error"]}
    for key, text in errors.items():
        assert "\n" not in text and text.endswith(".")
        assert all(rows[key][name] is None for name in ("height", "width", "subtask")) and rows[key]["segments"] == []
    assert list(errors) == [keys[2], keys[9], keys[10], keys[13], keys[14]]
    broken, named, no_image, empty, null = errors.values()
    assert "broken.png" in broken and "names the file /etc/passwd in place of" in named
    assert no_image == f"{table}#3 cannot be opened as an image: cannot identify image file."
    assert "is empty" in empty and "is empty" in null
    predictor = Predictor.from_pretrained(model_folder)
    sources = [*(photos / name for name in ("a.png", "b.png", "c.png")), photos / "a.png",
               photos / "more/a.png", photos / "more/d.png", *pictures[:2], pictures[4], pictures[0]]  # fmt: skip
    good = [row for row in rows.values() if row["error"] is None]
    check_rows(good, predictor(sources, "instance", 0.1, 4))
    assert [row["file"] for row in good] == [*[None] * 6, "0.png", "1.png", "4.png", None]
    told = capsys.readouterr().out
    left_out = (out / "_run" / "left_out.txt").read_text().splitlines()
    assert "15 images in 6 parts" in told and "5 images were left out" in told and "Written: 10 of 15" in told
    assert left_out == list(errors.values())
    about = json.loads(pq.read_metadata(out / "part-00001-of-00006.parquet").metadata[b"faim2f"])
    assert about["subtask"] == "instance" and about["threshold"] == 0.1 and about["part"] == 1


@pytest.mark.parametrize("kind", ["files", "rows", "pattern"])
def test_a_run_goes_on_with_out_inside_an_input_folder(
    model_folder: Path,
    photos: Path,
    tmp_path: Path,
    by_hand: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The files that the run wrote are not its inputs."""
    if kind != "files":
        photos = tmp_path / "rows"
        write_rows(photos / "set" / "a.parquet", [png(photographs()[0])])
    monkeypatch.chdir(photos)
    if kind == "files":  # neither are the outputs of runs without Ray, nor videos
        Path("more", "clip.mp4").touch()
        assert main(["predict", str(model_folder), "a.png", "--out", "earlier"]) == 0
    words = (model_folder, "**/*.parquet" if kind == "pattern" else ".", "--out", "out")
    for _ in range(2):
        assert by_hand(*words) == 0
    count = 5 if kind == "files" else 1
    printed = capsys.readouterr().out
    assert f"{count} image{'s'[: count > 1]} are finished" in printed
    assert ("3 outputs of earlier predictions are skipped" in printed) == (kind == "files")
    assert ("1 video is skipped: more/clip.mp4; to predict videos, name them without --ray." in printed) == (
        kind == "files"
    )
    assert len(rows_of(photos / "out")) == count


def test_a_run_goes_on_where_it_is_and_only_as_itself(
    model_folder: Path, photos: Path, tmp_path: Path, by_hand: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(model_folder, model)
    words = (model, photos, "--out", out, "--part-size", 2)
    assert by_hand(*words) == 0
    parts = sorted(out.glob("*.parquet"))
    whole = [path.read_bytes() for path in parts]
    first = parts[0].stat().st_mtime_ns
    # One part is missing, one is damaged, and there is an unfinished file.
    parts[1].unlink()
    parts[2].write_bytes(whole[2][:-3])
    (out / "_run" / "unfinished" / "x").write_text("half")
    capsys.readouterr()
    assert by_hand(*words, "--batch-size", 1) == 0
    assert "2 images are finished from an earlier run." in capsys.readouterr().out
    assert len(rows_of(out)) == 5 and parts[0].stat().st_mtime_ns == first
    assert [pq.read_table(path).num_rows for path in parts] == [2, 2, 1]
    assert not list((out / "_run" / "unfinished").iterdir())

    def told(*arguments: object) -> str:
        assert by_hand(*arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("faim2f predict: The run")
        return printed.err

    assert "(threshold None, now 0.5)" in told(*words, "--threshold", "0.5")
    assert "(subtask instance, now panoptic)" in told(*words, "--subtask", "panoptic")
    assert "(part size 2, now 3)" in told(*words[:-1], 3)
    shutil.copy(photos / "a.png", photos / "new.png")
    assert "(other or edited images)" in told(*words)
    (photos / "new.png").unlink()
    written = (photos / "a.png").stat()
    os.utime(photos / "a.png", ns=(written.st_atime_ns, written.st_mtime_ns + 1))
    assert "(other or edited images)" in told(*words)
    os.utime(photos / "a.png", ns=(written.st_atime_ns, written.st_mtime_ns))
    (model / "README.md").write_text("a card")  # does not affect predictions
    assert by_hand(*words) == 0
    capsys.readouterr()
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"shortest_edge": 32}}))
    assert "(another model)" in told(*words)
    assert len(rows_of(out)) == 5 and parts[0].stat().st_mtime_ns == first


def test_rows_that_changed_are_another_run(model_folder: Path, tmp_path: Path) -> None:
    """Even if the number of rows and the file size stay the same."""
    pictures = [png(one) for one in photographs()[:2]]
    stamps = []
    for values in (pictures, pictures[::-1]):
        found = find_rows([str(write_rows(tmp_path / "rows.parquet", values))])
        stamps.append(digest_of(found.pieces, found.stamps))
    assert stamps[0] != stamps[1]


def test_mistakes_are_one_sentence_and_leave_nothing(
    model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    table = write_rows(tmp_path / "t.parquet", [png(photographs()[0])])

    def told(*arguments: object, ray: tuple[str, ...] = ("--ray", "local")) -> str:
        assert main(["predict", *map(str, arguments), *ray]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("faim2f predict: ")
        assert not out.exists()
        return printed.err

    common = (model_folder, photos, "--out", out)
    assert "which this command does not support" in told(*common, ray=("--ray", "ray://head:10001"))
    assert "HOST:PORT, not 'photos'" in told(*common, ray=("--ray", "photos"))
    assert "--overwrite cannot be combined with --ray" in told(*common, "--overwrite")
    assert "--overlays cannot be combined with --ray" in told(*common, "--overlays")
    assert "it cannot be cuda:1" in told(*common, "--device", "cuda:1")
    assert "--part-size must be from 1 to" in told(*common, "--part-size", "0")
    assert "--workers must be at least 1" in told(*common, "--workers", "0")
    assert "from 0 to 1, not 2" in told(*common, "--threshold", "2")
    assert "--workers requires --ray" in told(*common, "--workers", "2", ray=())
    assert "--column requires --ray" in told(*common, "--column", "image", ray=())
    assert "--column is for datasets" in told(*common, "--column", "image")
    assert "There is no image in" in told(model_folder, tmp_path / "*.gif", "--out", out)
    told_of_name = told(model_folder, "nobody/nothing", "--out", out)
    assert "There is no file or folder nobody/nothing, and no data" in told_of_name
    assert "has no column 'photo'. Its columns: text (string), image (bytes)." in told(
        model_folder, table, "--out", out, "--column", "photo"
    )
    assert "'text'" in told(model_folder, table, "--out", out, "--column", "text")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    assert "bad.parquet cannot be read as a Parquet" in told(model_folder, tmp_path / "bad.parquet", "--out", out)
    assert "contains both image files and datasets" in told(model_folder, tmp_path, "--out", out)
    assert "cannot be downloaded from the Hub" in told("nobody/nothing", photos, "--out", out)
    assert "is not empty, and no run" in told(model_folder, photos, "--out", photos)
    assert "is a file" in told(model_folder, photos, "--out", photos / "a.png")
    monkeypatch.setitem(sys.modules, "ray.data", None)
    assert "install hf-faim2f[ray]" in told(*common)


def test_nobody_answers_at_the_address(
    model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(model_folder), str(photos), "--out", str(tmp_path / "out"), "--ray", "127.0.0.1:1"]
    assert main(words) == 2
    assert "There is no Ray cluster at 127.0.0.1:1: ConnectionRefusedError" in capsys.readouterr().err


def test_ray_that_does_not_start_is_a_sentence(
    model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def init(**options: Any) -> None:
        raise Exception("The current node timed out during startup.\nThe GCS has become overloaded.")  # as Ray does

    monkeypatch.setattr("ray.init", init)
    out = tmp_path / "out"
    assert main(["predict", str(model_folder), str(photos), "--out", str(out), "--ray", "local"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("faim2f predict: Ray cannot be started on this machine: Exception: The current node timed")


def test_two_runs_do_not_meet(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(BulkError, match="Another run is writing"), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass


def plan_of(out: Path, model: Path, pieces: list[Piece], size: int = 256) -> Plan:
    from hf_faim2f.version import __version__

    pinned, _ = pin_model(str(model))
    settings = Settings(pinned.digest, "torch", None, "instance", 0.1, digest_of(pieces), size, __version__)
    with locked(out):
        return begin(out, pieces, settings, pinned)


def test_a_worker_on_a_machine_that_differs(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    """Each worker reports what differs from the machine where the run started, and which machine it is on; nothing is
    written."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_folder, model)
    plan = plan_of(out, model, [Piece(str(photos / "a.png"), "a")])

    def failure(out: Path, digest: str = plan.digest) -> str:
        return str(Worker(str(out), digest, "cpu", None)({"part": np.array([0])})["failure"][0])

    assert "There is no folder" in failure(tmp_path / "nowhere")
    assert "is not the folder in which" in failure(out, "0" * 64)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert "other files on a machine" in failure(out) and "On the machine" in failure(out)
    shutil.rmtree(model)
    assert "There is no folder" in failure(out)
    plan_file = out / "_run" / "plan.json"
    plan_file.write_text(plan_file.read_text().replace('"parts": 1', '"parts": 2'))
    assert "it was changed" in failure(out)
    assert not list(out.glob("*.parquet")) and not list((out / "_run" / "tries").iterdir())


def test_a_gpu_without_memory_is_a_sentence(
    model_folder: Path,
    photos: Path,
    tmp_path: Path,
    by_hand: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(self: Predictor, values: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Predictor, "_run", full)
    out = tmp_path / "out"
    for options, words in (
        (["--batch-size", 8], "for batches of 8 images: pass a smaller --batch-size, or --precision bf16, or stop"),
        (["--batch-size", 1], "for one image: pass --precision bf16, or stop what else uses it."),
    ):
        assert by_hand(model_folder, photos, "--out", out, *options) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "The GPU has too little free memory" in said and words in said and "On the machine" in said
    assert not list(out.glob("*.parquet"))


def test_every_file_that_a_runtime_reads_is_pinned(model_folder: Path, tmp_path: Path) -> None:
    digests = {pin_model(str(model_folder))[0].digest}
    read = [
        *RUNTIME_FILES.values(),
        "openvino_model.bin",
        "format.json",
        "engine.json",
        "compiled.json",
        "pytorch_model.bin",
    ]
    for number, name in enumerate(read):
        folder = shutil.copytree(model_folder, tmp_path / str(number))
        for content in ("one", "other"):
            (folder / name).write_text(content)
            digests.add(pin_model(str(folder))[0].digest)
    assert len(digests) == 1 + 2 * len(read)
    (folder / "README.md").write_text("a card")
    assert pin_model(str(folder))[0].digest in digests


DEADLY = """
import os, sys
import numpy as np
from PIL import Image
from hf_faim2f.distributed.workers import Worker
opened = Image.open
def open_or_die(file, **settings):
    return os.kill(os.getpid(), 9) if os.path.basename(str(file)).startswith("kill") else opened(file, **settings)
Image.open = open_or_die
for tried in range(20):
    child = os.fork()
    if child == 0:
        done = Worker(sys.argv[1], sys.argv[2], "cpu", None)({"part": np.array([0])})
        print(tried, done["bad"][0], done["failure"][0], flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="Processes die as they do on Linux.")
def test_images_that_kill_workers_are_left_out(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    """Workers die three times, then twice more at each of the two images; the next worker completes the others."""
    for name in ("kill.png", "kill-too.png"):
        shutil.copy(photos / "a.png", photos / name)
    names = ["a.png", "kill.png", "kill-too.png", "b.png"]
    plan = plan_of(tmp_path / "out", model_folder, [Piece(str(photos / name), name) for name in names])
    ran = forks.run(DEADLY, plan.out, plan.digest)
    assert ran.returncode == 0 and ran.out.split() == ["7", "2"], ran.error
    rows = rows_of(plan.out)
    assert {key: row["error"] for key, row in rows.items()} == {
        "a.png": None,
        "kill.png": "kill.png was left out: 2 workers died while predicting it.",
        "kill-too.png": "kill-too.png was left out: 2 workers died while predicting it.",
        "b.png": None,
    }
    sources = [photos / "a.png", photos / "b.png"]
    check_rows([rows["a.png"], rows["b.png"]], Predictor.from_pretrained(model_folder)(sources, "instance", 0.1, 1))
    assert not list(plan.attempts.iterdir())


def test_attempts(tmp_path: Path) -> None:
    path = tmp_path / "00000"
    assert Attempts(path).count == 0 and not Attempts(path).careful
    for _ in range(12):
        assert not Attempts(path).hopeless
        Attempts(path).begin()
    assert Attempts(path).careful and Attempts(path).hopeless  # workers die before any image
    path.write_text("try try try 0 1 try 0 1 2 try 0 1 writing")
    assert Attempts(path).deaths == {1: 1, 2: 1} and not Attempts(path).left_out(1)
    path.write_text("try try try 0 1 try 0 1")
    assert Attempts(path).left_out(1) and not Attempts(path).left_out(0) and not Attempts(path).hopeless
    path.write_text("try try try 0 1 try 0 1 try 0 1")  # already left out, but workers still die
    assert Attempts(path).hopeless
    path.write_text("try try try 0 1" + 9 * " try")  # one died at an image, 11 before any
    assert not Attempts(path).hopeless
    path.write_text("try try try 0 1" + 10 * " try")
    assert Attempts(path).hopeless


def test_parts_hold_each_image_once(tmp_path: Path) -> None:
    pieces = [Piece(f"/{index}", f"k{index}") for index in range(7)]
    pieces[3:3] = [Piece("/rows", "rows", 0, 8, "image"), Piece("/x", "x", 0, 2, "image", "a/b", "c0ffee")]
    parts = list(into_parts(pieces, 3))
    assert all(1 <= sum(piece.count for piece in part) <= 3 for part in parts)
    keys = [key for part in parts for piece in part for key in piece.image_keys()]
    assert sorted(keys) == sorted(key for piece in pieces for key in piece.image_keys()) and len(set(keys)) == 17
    for part in parts:
        assert from_batch(to_batch(part)) == part
    odd = [Piece(os.fsdecode(b"/\xff"), "odd")]
    assert from_batch(to_batch(odd)) == odd


def test_rows_are_read_where_they_are(tmp_path: Path) -> None:
    """Reads any range across row groups; a damaged group affects only its own rows."""
    values = [{"bytes": f"{index}".encode() * 500, "path": None} for index in range(25)]
    path = write_rows(tmp_path / "rows.parquet", values, row_group_size=10, compression="none", use_dictionary=False)
    for first, count in ((0, 25), (9, 2), (12, 1), (3, 20), (20, 5)):
        entries = list(read_pieces([Piece(str(path), "r", first, count, "image")]))
        assert [entry.key for entry in entries] == [f"r#{row}" for row in range(first, first + count)]
        assert [entry.source.read() for entry in entries] == [one["bytes"] for one in values[first : first + count]]
    group = pq.read_metadata(path).row_group(1)
    start = min(group.column(i).data_page_offset for i in range(1, group.num_columns))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 40)
    entries = list(read_pieces([Piece(str(path), "r", 5, 20, "image")]))
    assert len(entries) == 20
    bad = [entry.key for entry in entries if entry.error]
    assert bad == [f"r#{row}" for row in range(10, 20)] and all("cannot be read" in e.error for e in entries if e.error)
    with pytest.raises(BulkError, match="fewer rows"):
        list(read_pieces([Piece(str(path), "r", 20, 6, "image")]))


def test_data_sets_are_found(tmp_path: Path) -> None:
    """Folders and patterns of Parquet files by split, folders saved by `datasets`, and downloads from the Hub."""
    pictures = photographs()
    images = [png(one) for one in pictures]
    for name, count in (("data/train-0.parquet", 2), ("data/train-1.parquet", 1), ("data/test-0.parquet", 3)):
        write_rows(tmp_path / "set" / name, [{"bytes": one, "path": None} for one in images[:count]])
    root = tmp_path / "set"

    def found(*words: object, **settings: Any) -> list[tuple[str, int]]:
        assert all(names_rows(str(word)) for word in words)
        pieces = find_rows([str(word) for word in words], **settings).pieces
        assert len(list(read_pieces(pieces))) == sum(piece.count for piece in pieces)
        return [(os.path.relpath(piece.key, tmp_path), piece.count) for piece in pieces]

    train = [("set/data/train-0.parquet", 2), ("set/data/train-1.parquet", 1)]
    assert found(root, split="train") == found(root / "data" / "train-*.parquet") == train
    assert found(root, root / "data" / "test-0.parquet") == [("set/data/test-0.parquet", 3), *train]
    # The folder that a word names may be a split; folders above it are not.
    assert found(root / "*" / "*.parquet", split="train") == train
    assert found(root / "data" / "test-0.parquet", split="test") == [("set/data/test-0.parquet", 3)]
    for words in ([root / "data"], [root / "data" / "*.parquet"], [root / "data" / "test-0.parquet"]):
        with pytest.raises(BulkError, match="is of the split 'set'"):
            found(*words, split="set")
    write_rows(tmp_path / "other" / "train" / "trainval-0.parquet", [{"bytes": images[0], "path": None}])
    write_rows(tmp_path / "other" / "train" / "test-0.parquet", [{"bytes": images[0], "path": None}])
    assert found(tmp_path / "other", split="train") == [("other/train/trainval-0.parquet", 1)]
    folder = tmp_path / "other" / "train"
    for word in (folder, folder / "*.parquet", folder / "trainval-0.parquet"):
        assert found(word, split="train") == [("other/train/trainval-0.parquet", 1)]
    data = datasets.Dataset.from_dict({"photo": pictures}, datasets.Features({"photo": datasets.Image()}))
    datasets.DatasetDict({"train": data, "test": data.select([4, 0])}).save_to_disk(tmp_path / "saved")
    assert found(tmp_path / "saved") == [("saved/train", 5), ("saved/test", 2)]
    (piece,) = find_rows([str(tmp_path / "saved")], split="test").pieces
    entries = list(read_pieces([piece]))
    for entry, picture in zip(entries, (pictures[4], pictures[0]), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(entry.source)), np.asarray(picture))
    assert not names_rows(str(tmp_path / "nothing.jpg")) and not names_rows(str(tmp_path / "set" / "*.jpg"))
    two = pa.table({"one": images[:1], "other": images[:1]})
    pq.write_table(two, tmp_path / "two.parquet")
    with pytest.raises(BulkError, match=r"cannot be determined: name it with --column.*one \(bytes\), other \(bytes\)"):
        found(tmp_path / "two.parquet")
    assert found(tmp_path / "two.parquet", column="other") == [("two.parquet", 1)]
    data.set_format("torch", columns=[])
    data.save_to_disk(tmp_path / "formatted")
    (tmp_path / "link-to-saved").symlink_to(tmp_path / "formatted")
    assert found(tmp_path / "formatted", tmp_path / "link-to-saved") == [("formatted", 5)]
    # Files may have any name, and are read once.
    write_rows(tmp_path / "any" / "_shards" / "_0.parquet", [{"bytes": images[0], "path": None}])
    (tmp_path / "link").symlink_to(tmp_path / "any")
    (tmp_path / "any" / "_run").mkdir()
    (tmp_path / "any" / "_run" / "part.parquet").write_text("of a bulk run")
    words = [tmp_path / "any", tmp_path / "link", tmp_path / "any" / ".." / "any"]
    assert found(*words) == [("any/_shards/_0.parquet", 1)]
    pq.write_table(pa.table({"mask": pa.array([], pa.binary())}), tmp_path / "any" / "none.parquet")
    (tmp_path / "any" / "_delta_log").mkdir()
    pq.write_table(pa.table({"mask": images[:1]}), tmp_path / "any" / "_delta_log" / "0.checkpoint.parquet")
    assert found(tmp_path / "any") == [("any/_shards/_0.parquet", 1)]
    pq.write_table(pa.table({"mask": images[:1]}), tmp_path / "any" / "masks.parquet")
    with pytest.raises(
        BulkError, match="0.parquet seems to have its images in the column 'image', and .* in 'mask': name"
    ):
        found(tmp_path / "any")


def test_the_hub_is_read_at_one_commit(model_folder: Path, tmp_path: Path) -> None:
    """Model and dataset in the layout of the Hub's cache; a later commit does not change a run."""
    cache = Path(HF_HUB_CACHE)

    def publish(kind: str, name: str, commit: str, ref: str = "main") -> Path:
        folder = cache / f"{kind}--{name.replace('/', '--')}"
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        return folder / "snapshots" / commit

    old, new = "1" * 40, "2" * 40
    shutil.copytree(model_folder, publish("models", "us/tiny", old))
    images = [png(one) for one in photographs()]
    write_rows(publish("datasets", "us/photos", old) / "data" / "train.parquet", images[:3])
    found = find_rows(["us/photos"])
    assert [key for piece in found.pieces for key in piece.image_keys()] == [
        f"us/photos/data/train.parquet#{i}" for i in range(3)
    ]
    pinned, folder = pin_model("us/tiny")
    assert pinned.revision == found.pieces[0].revision == old and pinned.here() == folder
    write_rows(publish("datasets", "us/photos", new) / "data" / "train.parquet", images)
    publish("models", "us/tiny", new).mkdir()
    assert pinned.here() == folder
    assert [entry.source.read() for entry in read_pieces(found.pieces)] == images[:3]
    assert sum(piece.count for piece in find_rows(["us/photos"]).pieces) == 5
    # A dataset without Parquet files uses the Hub's conversion.
    publish("datasets", "us/tars", old).mkdir(parents=True)
    write_rows(publish("datasets", "us/tars", new, "refs/convert/parquet") / "default" / "0.parquet", images[:1])
    assert find_rows(["us/tars"]).pieces[0].revision == new
    # A commit that changes only the dataset's card does not change the images.
    before = find_rows(["us/photos"])
    shutil.copytree(publish("datasets", "us/photos", new), publish("datasets", "us/photos", "3" * 40))
    after = find_rows(["us/photos"])
    assert after.pieces[0].revision == "3" * 40
    assert digest_of(after.pieces, after.stamps) == digest_of(before.pieces, before.stamps)
    # The conversion may be a part of the dataset, or have the same images in several configurations.
    for name, places, told in (
        ("us/huge", ["default/partial-train"], "The Hub converted only a part of the dataset us/huge to Parquet"),
        (
            "us/two",
            ["a/train", "b/train"],
            r"us/two has several configurations \(a, b\): download one with `hf download",
        ),
    ):
        publish("datasets", name, old).mkdir(parents=True)
        for place in places:
            file = publish("datasets", name, new, "refs/convert/parquet") / place / "0.parquet"
            write_rows(file, [{"bytes": images[0], "path": None}])
        with pytest.raises(BulkError, match=told):
            find_rows([name])


def test_an_ambiguous_name_of_a_model() -> None:
    with pytest.raises(BulkError, match="^maskformer2_swin_tiny_bs16_50ep could be mask2former/coco/"):
        pin_model("maskformer2_swin_tiny_bs16_50ep")


def test_workers_for_a_cluster() -> None:
    small, large = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}
    assert share_out([{"CPU": 1.0}], None, None) == Share(1, 1, 0)
    assert share_out([small], None, None) == Share(2, 2, 0)
    assert share_out([small, small], None, 1) == Share(1, 4, 0)  # limited to the cores of one machine
    assert share_out([small], "cpu", 9) == Share(4, 1, 0)
    assert share_out([small, large], None, None) == Share(4, 4, 1)
    assert share_out([small, large], "cuda", 2) == Share(2, 4, 1)
    assert share_out([large], "cpu", None) == Share(8, 2, 0)
    with pytest.raises(BulkError, match="no GPU"):
        share_out([small], "cuda", None)


def test_an_interrupted_command_says_so(
    model_folder: Path, photos: Path, tmp_path: Path, by_hand: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done = predict_ray.predict_parts

    def interrupted(*arguments: Any) -> Any:
        yield next(iter(done(*arguments)))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(predict_ray, "predict_parts", interrupted)
    out = tmp_path / "out"
    # Background processes ignore it otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert by_hand(model_folder, photos, "--out", out, "--part-size", 2) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same command continues the run" in capsys.readouterr().err
    assert len(rows_of(out)) == 2 and read_plan(out).parts == 3
