"""Publishing with the real client to a small Hub (`hub_server`), up to segmentation with the downloaded model.

huggingface_hub reads its environment on import, so clients are separate processes. Each runs a list of steps, because
imports take most of the time.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_faim2f.model.remote_code_faim2f import AUTO_MAP
from tests.support.hub_server import Entry, Fault, Hub, running_hub
from tests.support.mask2former_models import RESNET, saved
from tests.support.mask2former_models import tiny as tiny_mask2former
from tests.support.model_folders import edit, write_model

TOKEN, OTHER = "hf_thesecretofsomeone0001", "hf_thesecretofelse0002"
COMMIT, LFS = "POST /api/models/someone/{}/commit", "PUT /lfs/someone/{}"
ROOT = Path(__file__).parents[2]

# Runs one step per line, a call and its arguments, and prints one line of JSON for each.
CLIENT = """
import contextlib, io, json, os, sys, traceback
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import huggingface_hub.constants

def step(kind, folder=None, to=None, arguments=(), environment=(), endpoint=None, **more):
    os.environ.update(dict(environment))
    before = huggingface_hub.constants.ENDPOINT
    huggingface_hub.constants.ENDPOINT = endpoint or before
    try:
        if kind == "command":
            from hf_faim2f.cli import main
            return main(["push", folder, to, *arguments])
        if kind == "publish":
            from hf_faim2f.hub.publish import check_folder, publish
            commit, sent = publish(check_folder(Path(folder), load=False)[0], to, **more)
            return {"commit": commit, "sent": [change.name for change in sent]}
        if kind == "transformers":
            from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
            FaiM2FForUniversalSegmentation.from_pretrained(folder).push_to_hub(to)
            FaiM2FImageProcessor.from_pretrained(folder).push_to_hub(to)
            return None
        if kind == "load":
            from hf_faim2f.zoo import open_model
            return type(open_model(to)[0]).__name__
        if kind == "convert":
            from hf_faim2f.conversion.mask2former import convert
            return convert(to, Path(folder)).name
        if kind == "pin":
            from hf_faim2f.distributed.plan import pin_model
            return pin_model(to)[0].revision
    finally:
        huggingface_hub.constants.ENDPOINT = before

for line in sys.stdin:
    out, err, result, error = io.StringIO(), io.StringIO(), None, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = step(**json.loads(line))
        except ValueError as caught:
            error = str(caught)
        except BaseException as caught:
            error = "UNEXPECTED " + traceback.format_exc()
    told = {"result": result, "error": error, "out": out.getvalue(), "err": err.getvalue()}
    print("STEP" + json.dumps(told), flush=True)
"""

# Without this package: tries every way of loading that a model's page shows, with an empty cache.
STRANGER = """
import json, sys
for name in ("hf_faim2f", "conversion"):
    sys.modules[name] = None
import numpy as np, torch, transformers
from PIL import Image
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
for line in sys.stdin:
    name, revision = json.loads(line)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
        model = transformers.AutoModel.from_pretrained(
            name, revision=revision, code_revision=revision, trust_remote_code=True
        ).eval()
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        found = processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 70)])[0]
        segment = transformers.pipeline("image-segmentation", model=model, image_processor=processor)
        told = {"shape": list(found.shape), "mean": float(outputs.masks_queries_logits.mean()),
                "labels": sorted({s["label"] for s in segment(image, subtask="semantic")})}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    print("STEP" + json.dumps(told), flush=True)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, and copies whose cards have another sentence (`later`) or an unknown license (`unlicensed`)."""
    root = tmp_path_factory.mktemp("hub")
    write_model(root / "tiny", id2label={0: "wall", 1: "sky", 2: "tree"})
    shutil.copytree(root / "tiny", root / "later")
    edit(root / "later", "README.md", "Of random weights.", "Of random weights, revised.")
    shutil.copytree(root / "tiny", root / "unlicensed")
    edit(root / "unlicensed", "README.md", "license: mit", "license: of-my-own")
    return root


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub({TOKEN: "someone", OTHER: "else"}) as hub:
        yield hub


def run(hub: Hub, home: Path, script: str, steps: list[Any], token: str | None = TOKEN) -> list[dict[str, Any]]:
    """The result of each step; asserts that the process printed no token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {
        **kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {}),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)],
        input="\n".join(map(json.dumps, steps)), capture_output=True, text=True, env=environment, cwd=home,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("STEP")]
    assert len(lines) == len(steps), done.stderr + done.stdout
    for secret in (TOKEN, OTHER, TOKEN[3:], OTHER[3:]):
        assert secret not in done.stdout and secret not in done.stderr
    return [json.loads(line.removeprefix("STEP")) for line in lines]


def tree(hub: Hub, name: str, branch: str = "main") -> dict[str, Entry]:
    repo = hub.repos[name]
    return repo.trees[repo.branches[branch]]


@pytest.mark.large
@pytest.mark.slow  # three processes that import transformers, one of them started by the command
def test_pushed_and_segmented_by_a_stranger(hub: Hub, folders: Path, tmp_path: Path) -> None:
    """The whole procedure: dry run, push, push again, a branch; then a download on another machine with an empty
    cache."""
    name, tiny = "someone/fai-mf-m-ade", str(folders / "tiny")
    hub.multipart = 100_000  # uploads the weights in parts
    steps: list[dict[str, Any]] = [
        {"kind": "command", "folder": tiny, "to": name, "arguments": ["--dry-run"]},
        {"kind": "command", "folder": tiny, "to": name},
        {"kind": "publish", "folder": tiny, "to": name},
        {"kind": "publish", "folder": str(folders / "later"), "to": name, "revision": "dev"},
        {"kind": "transformers", "folder": tiny, "to": "someone/by-transformers"},
    ]
    sizes = {path.name: path.stat().st_size for path in (folders / "tiny").iterdir()}
    dry, pushed, again, branch, both = run(hub, tmp_path, CLIENT, steps)

    # The dry run lists every file, and sends only GET and HEAD requests.
    assert dry["result"] == 0, dry
    assert "(new, public)" in dry["out"] and "Nothing was sent" in dry["out"]
    assert "the card has no results" in dry["out"] and f"{len(sizes)} files to send" in dry["out"]
    lines = {line.split()[1]: line for line in dry["out"].splitlines() if line.startswith("  new")}
    assert set(lines) == set(sizes)
    assert [key for key, line in lines.items() if line.endswith("LFS")] == ["model.safetensors"]
    posts = [i for i, (method, *_) in enumerate(hub.log) if method not in ("GET", "HEAD")]
    # The Hub checks the card, which changes nothing, before the repository is made.
    assert posts[0] >= 1 and [hub.log[i][1] for i in posts[:2]] == ["/api/validate-yaml", "/api/repos/create"]

    # One commit has all files; the weights were uploaded once, in parts, by hash.
    assert pushed["result"] == 0 and pushed["err"] == "", pushed
    assert "files sent in one commit" in pushed["out"]
    repo = hub.repos[name]
    assert repo.summaries == ["initial commit", "Upload tiny", "Upload later"]
    assert len(hub.requests(f"POST /api/models/{name}/commit")) == 2
    files = tree(hub, name)
    assert set(files) == set(sizes) | {".gitattributes"}
    weights = (folders / "tiny" / "model.safetensors").read_bytes()
    assert files["model.safetensors"].lfs == hashlib.sha256(weights).hexdigest()
    assert len(hub.requests(f"PUT /lfs/{name}/.*/part/")) == -(-len(weights) // hub.multipart)
    for key in sizes:
        if key != "README.md":
            assert repo.read("main", key) == (folders / "tiny" / key).read_bytes(), key
    card = repo.read("main", "README.md").decode()
    assert card.count(f'repository = "{name}"') == 3
    assert (folders / "tiny" / "README.md").read_text() == card.replace(f'repository = "{name}"', 'repository = "tiny"')

    # The storage of large files is another host, and gets no token.
    stored = [headers for method, path, headers in hub.log if method == "PUT"]
    assert stored and not any("Authorization" in headers for headers in stored)

    # Nothing is uploaded without changes; changes on a branch leave main as it is.
    assert again["result"] == {"commit": repo.branches["main"], "sent": []}, again
    assert branch["result"] == {"commit": repo.branches["dev"], "sent": ["README.md"]}, branch
    assert b"revised" in repo.read("dev", "README.md") and b"revised" not in repo.read("main", "README.md")

    # `push_to_hub` of both also uploads the code, and sets auto_map to this repository.
    assert both["error"] is None, both
    published = tree(hub, "someone/by-transformers")
    assert {key for key in sizes if key.endswith(".py")} <= set(published)
    for file, auto_map in (
        ("config.json", AUTO_MAP),
        ("preprocessor_config.json", {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}),
    ):
        assert json.loads(hub.repos["someone/by-transformers"].read("main", file))["auto_map"] == auto_map

    # Another machine: an empty cache, no token, and a download that is interrupted and then completed.
    hub.log.clear()
    hub.faults = [Fault(f"GET /cdn/{name}", "cut")]
    home = tmp_path / "stranger"
    home.mkdir()
    wanted = [[name, "main"], [name, "main"], [name, repo.branches["dev"]], ["someone/by-transformers", "main"]]
    interrupted, *answers = run(hub, home, STRANGER, wanted, token=None)
    if version("huggingface_hub") >= "1":
        assert interrupted == answers[0]
    else:  # older clients reported the missing bytes, and completed the file when called again
        assert "IncompleteRead" in interrupted["error"]
    assert all(answer == answers[0] for answer in answers) and "error" not in answers[0], answers
    assert answers[0]["shape"] == [50, 70] and set(answers[0]["labels"]) <= {"wall", "sky", "tree"}
    # Clients keep only whole chunks of 10 MB, so such small weights are downloaded from the start.
    assert len(hub.requests(f"GET /cdn/{name}")) == 2 and len(hub.requests("GET /cdn/someone/by-transformers")) == 1
    assert not any("Authorization" in headers for _, _, headers in hub.log)
    assert not [path for method, path, _ in hub.log if method not in ("GET", "HEAD")]
    assert ModelCard(card).data.pipeline_tag == "image-segmentation"


@pytest.mark.large
@pytest.mark.slow  # a process with two dozen steps
def test_faults_of_a_push_are_survived_or_told(hub: Hub, folders: Path, tmp_path: Path) -> None:
    """Each repository has its own fault. A failed attempt leaves no commit, and the next one completes it."""
    tiny, now = str(folders / "tiny"), {"Retry-After": "0"}

    def publish(name: str, **more: Any) -> dict[str, Any]:
        return {"kind": "publish", "folder": tiny, "to": f"someone/{name}", **more}

    hub.faults = [
        Fault(COMMIT.format("once-500"), 500, headers=now),
        Fault(COMMIT.format("once-429"), 429, times=2, headers=now),
        Fault(COMMIT.format("long-429"), 429, headers={"Retry-After": "3600"}),
        Fault(COMMIT.format("always-500"), 503, times=4, headers=now),
        Fault(LFS.format("broken-off"), "drop"),
        Fault(COMMIT.format("answer-lost"), "lose"),
        Fault(LFS.format("wrong-hash"), "corrupt"),
        Fault(COMMIT.format("damaged"), "corrupt"),
        Fault(COMMIT.format("meanwhile"), 412),
        Fault(COMMIT.format("too-large"), 413),
        Fault("POST /api/models/someone/interrupted/branch", 500, times=4, headers=now),
    ]
    hub.new_repo("someone/public")
    adapted = hub.new_repo("someone/adapted")
    adapted.commit("main", {**tree(hub, "someone/adapted"), "adapter_config.json": Entry(b"{}", size=2)}, "adapter")
    scenes = {
        "once-500": publish("once-500"),
        "once-429": publish("once-429"),
        "long-429": publish("long-429"),
        "always-500": publish("always-500"),
        "always-500 again": publish("always-500"),
        "broken-off": publish("broken-off"),
        "answer-lost": publish("answer-lost"),
        "wrong-hash": publish("wrong-hash"),
        "wrong-hash again": publish("wrong-hash"),
        "damaged": publish("damaged"),
        "damaged again": publish("damaged"),
        "meanwhile": publish("meanwhile"),
        "too-large": publish("too-large"),
        "interrupted": publish("interrupted", revision="dev"),
        "interrupted again": publish("interrupted", revision="dev"),
        "private": publish("hidden", private=True),
        "public": publish("public", private=True),
        "adapted": publish("adapted"),
        "metadata": {**publish("unlicensed"), "folder": str(folders / "unlicensed")},
        "name": {**publish("x"), "to": "no/such/name"},
        "another's": {**publish("x"), "to": "else/x"},
        "unreachable": publish("x", endpoint="http://127.0.0.1:1"),
        "no token": publish("x", environment={"HF_TOKEN": "hf_nobodysecret0003"}),
    }
    results = dict(zip(scenes, run(hub, tmp_path, CLIENT, list(scenes.values())), strict=True))
    commits = {name: len(repo.summaries) - 1 for name, repo in hub.repos.items()}

    def survived(scene: str, name: str, uploads: int = 1) -> None:
        assert results[scene]["error"] is None, (scene, results[scene])
        assert commits[f"someone/{name}"] == 1, scene
        assert len(hub.requests(LFS.format(name))) == uploads, scene

    def told(scene: str, *words: str) -> None:
        error = results[scene]["error"]
        assert error and "UNEXPECTED" not in error and "\n" not in error, (scene, error)
        assert all(word in error for word in words), (scene, error)

    survived("once-500", "once-500")
    survived("once-429", "once-429")
    told("long-429", "3600 seconds (429)", "nothing was committed")
    assert commits["someone/long-429"] == 0 and len(hub.requests(COMMIT.format("long-429"))) == 1
    told("always-500", "failed (503)", "run the same command later")
    survived("always-500 again", "always-500")  # both uploaded the weights only once
    survived("broken-off", "broken-off", 2)
    survived("answer-lost", "answer-lost")
    assert results["answer-lost"]["result"]["sent"] == results["once-500"]["result"]["sent"] != []
    assert results["answer-lost"]["result"]["commit"] == hub.repos["someone/answer-lost"].branches["main"]
    told("wrong-hash", "did not match")
    survived("wrong-hash again", "wrong-hash", 2)
    told("damaged", "another hash on the Hub than here")
    assert results["damaged again"]["error"] is None and commits["someone/damaged"] == 2
    told("meanwhile", "changed by someone else meanwhile (412)")
    told("too-large", "too large for the Hub (413)")
    told("interrupted", "failed (500)")
    assert results["interrupted again"]["error"] is None
    assert hub.repos["someone/interrupted"].summaries == ["initial commit", "Upload tiny"]
    assert len(tree(hub, "someone/interrupted")) == 1 and len(tree(hub, "someone/interrupted", "dev")) > 20
    assert results["private"]["error"] is None and hub.repos["someone/hidden"].private
    told("public", "exists and is public")
    told("adapted", "someone/adapted has adapter_config.json, which transformers would load instead of the config.json")
    told("metadata", '"license" must be one of')
    told("name", "is not the name of a repository")
    told("another's", "may not write to else/x (403)", "a member of else")
    told("unreachable", "http://127.0.0.1:1 cannot be reached")
    told("no token", "rejected the token (401)", "hf auth login")
    for result in results.values():
        assert "nobodysecret" not in json.dumps(result)
    assert adapted.summaries == ["initial commit", "adapter"]
    assert "someone/unlicensed" not in hub.repos
    for name in ("public", "too-large", "meanwhile", "long-429"):
        assert len(tree(hub, f"someone/{name}")) == 1, name  # no partial commit


@pytest.mark.large
@pytest.mark.slow  # a process with transformers, and one without this package
def test_faults_of_a_download_are_survived_or_told(hub: Hub, folders: Path, tmp_path: Path) -> None:
    """Downloads by this package, which compares hashes, and by transformers alone, which compares sizes."""
    repo = hub.new_repo("someone/tiny")
    files = {path.name: path.read_bytes() for path in (folders / "tiny").iterdir()}
    weights = files.pop("model.safetensors")
    oid = hashlib.sha256(weights).hexdigest()
    repo.large[oid] = weights
    entries = {name: Entry(content, size=len(content)) for name, content in files.items()}
    repo.commit("main", {**entries, "model.safetensors": Entry(lfs=oid, size=len(weights))}, "all")
    for name in ("damaged", "cut", "once", "failing", "short"):
        hub.repos[f"someone/{name}"] = repo
    hub.repos["someone/secret"] = type(repo)(True, repo.branches, repo.trees, repo.summaries, repo.large)
    hub.faults = [
        Fault("GET /cdn/someone/damaged", "corrupt"),
        Fault("GET /cdn/someone/cut", "cut"),
        Fault("GET /cdn/someone/failing", 501, times=99),
        Fault("GET /cdn/someone/once", 500),
        Fault("GET /cdn/someone/short", 429, headers={"Retry-After": "0"}),
    ]
    names = ["damaged", "damaged", "cut", "once", "failing", "nothing"]
    steps: list[dict[str, Any]] = [{"kind": "load", "to": f"someone/{name}"} for name in names]
    damaged, mended, cut, once, failing, nothing = run(hub, tmp_path, CLIENT, steps)
    assert "model.safetensors" in damaged["error"] and "SHA-256" in damaged["error"] and "again" in damaged["error"]
    assert mended["error"] is None and mended["result"] == "FaiM2FForUniversalSegmentation", mended
    assert cut["error"] is None and once["error"] is None, (cut, once)
    assert "501" in failing["error"] and "UNEXPECTED" not in failing["error"], failing
    assert "someone/nothing is not a folder here" in nothing["error"] and "UNEXPECTED" not in nothing["error"], nothing

    # Downloads for conversion and for Ray are also checked; a Mask2Former can be used by its name alone.
    name = "someone/mask2former-tiny-coco-instance"
    theirs = saved(tmp_path / "theirs", tiny_mask2former(RESNET))
    repo = hub.new_repo(name)
    oid = hashlib.sha256((theirs / "model.safetensors").read_bytes()).hexdigest()
    repo.large[oid] = (theirs / "model.safetensors").read_bytes()
    entries = {path.name: Entry(path.read_bytes(), size=path.stat().st_size) for path in theirs.glob("*.json")}
    repo.commit("main", {**entries, "model.safetensors": Entry(lfs=oid, size=len(repo.large[oid]))}, "all")
    hub.repos["someone/pinned"] = hub.repos["someone/tiny"]
    hub.faults += [Fault("GET /cdn/someone/mask2former", "corrupt"), Fault("GET /cdn/someone/pinned", "corrupt")]
    again = {"kind": "convert", "to": name, "folder": str(tmp_path / "again")}
    damaged, ours, converted, not_pinned, pinned = run(hub, tmp_path, CLIENT, [
        again, {"kind": "load", "to": name}, again, {"kind": "pin", "to": "someone/pinned"},
        {"kind": "pin", "to": "someone/pinned"},
    ])  # fmt: skip
    assert "without the SHA-256 that the Hub lists" in damaged["error"], damaged
    assert ours["result"] == "FaiM2FForUniversalSegmentation" and list((tmp_path / "faim2f").glob("*/record.json")), (
        ours
    )
    assert converted["error"] is None and "without the SHA-256" in not_pinned["error"], (converted, not_pinned)
    assert pinned["result"] == hub.repos["someone/tiny"].branches["main"], pinned

    home = tmp_path / "stranger"
    home.mkdir()
    wanted = [["someone/failing", "main"], ["someone/secret", "main"], ["someone/tiny", "nowhere"],
              ["someone/short", "main"]]  # fmt: skip
    server_error, hidden, revision, short = run(hub, home, STRANGER, wanted, token=None)
    assert "501" in server_error["error"] and "error" in hidden and "nowhere" in revision["error"]
    assert "someone/secret" in hidden["error"]
    assert short.get("shape") == [50, 70] or "429" in short["error"], short
