"""Pages for the browser: their files, and in headless Chromium the predictor's segments."""

import base64
import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hf_faim2f.cli import main
from hf_faim2f.cli.export import ONNX_DOCUMENT
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.errors import ExportError
from hf_faim2f.export import web
from hf_faim2f.export.web import CPU_FILES, GPU_FILES, LIBRARY, RELEASE, copy_library, export_web
from hf_faim2f.runtime import Prediction, Predictor
from tests.support.lively_model import LABELS, photographs, save_model
from tests.support.shared import exported, shared_folder
from tests.support.shipped_digits import DIGITS

BROWSER = shutil.which("chromium")
# No sandbox, because root has none, and a camera that shows a test pattern.
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run", "--use-fake-device-for-media-stream",
         "--use-fake-ui-for-media-stream"]  # fmt: skip
WAIT = 120_000  # milliseconds; generous, not a measurement


def fake_library(folder: Path, release: str = RELEASE) -> Path:
    """A folder in the library's layout, with files of a few bytes."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": LIBRARY, "version": release}))
    for name in (*CPU_FILES, *GPU_FILES):
        (folder / "dist" / name).write_text(f"// {name}")
    return folder


def archive_of(folder: Path, path: Path, *more: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as members:
        members.add(folder, "package")
        for info, content in more:
            info.size = len(content)
            members.addfile(info, io.BytesIO(content))
    return path


def pinned(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    monkeypatch.setattr(web, "INTEGRITY", f"sha512-{digest}")


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Makes a shell script the only npm on the path; its last argument is the folder for the archive."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(shutil, "which", lambda name: str(folder / "npm") if name == "npm" else None)


def test_only_named_files_leave_an_archive_of_the_pinned_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fake_library(tmp_path / "library")
    hostile = tarfile.TarInfo("package/dist/../../../escaped"), b"x"
    archive = archive_of(source, tmp_path / "a.tgz", hostile)
    with pytest.raises(ExportError, match="a.tgz is not the archive of onnxruntime-web .* SHA-512 differs"):
        copy_library(archive, tmp_path / "one", CPU_FILES)
    pinned(monkeypatch, archive)
    assert copy_library(archive, tmp_path / "two", CPU_FILES) == RELEASE
    assert {path.name for path in (tmp_path / "two").iterdir()} == set(CPU_FILES)
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path.parent / "escaped").exists()
    # A link in place of a file, a file that is too large, and one that is missing.
    (source / "dist" / CPU_FILES[0]).unlink()
    (source / "dist" / CPU_FILES[0]).symlink_to("/etc/passwd")
    linked = archive_of(source, tmp_path / "b.tgz")
    pinned(monkeypatch, linked)
    with pytest.raises(ExportError, match="has an unusable package/dist/ort.wasm"):
        copy_library(linked, tmp_path / "three", CPU_FILES)
    pinned(monkeypatch, archive)
    with monkeypatch.context() as small, pytest.raises(ExportError, match="has an unusable"):
        small.setattr(web, "LARGEST_FILE", 5)
        copy_library(archive, tmp_path / "four", CPU_FILES)
    with pytest.raises(ExportError, match="a.tgz lacks package/dist/other.mjs"):
        copy_library(archive, tmp_path / "five", ("other.mjs",))
    truncated = tmp_path / "c.tgz"
    truncated.write_bytes(archive.read_bytes()[:-200])
    pinned(monkeypatch, truncated)
    with pytest.raises(ExportError, match="c.tgz (cannot be unpacked|lacks)"):
        copy_library(truncated, tmp_path / "six", GPU_FILES)


def test_a_folder_of_the_library_is_recognized(tmp_path: Path) -> None:
    source = fake_library(tmp_path / "library", "1.29.0")
    assert copy_library(source, tmp_path / "one", CPU_FILES) == "1.29.0"
    with pytest.raises(ExportError, match=r"is not onnxruntime-web \(no package.json\)"):
        copy_library(tmp_path, tmp_path / "two", CPU_FILES)
    (source / "dist" / GPU_FILES[0]).unlink()
    with pytest.raises(ExportError, match="ort.webgpu.min.mjs is missing"):
        copy_library(source, tmp_path / "three", GPU_FILES)
    (source / "package.json").write_text('{"name": "other", "version": "1"}')
    with pytest.raises(ExportError, match="is not onnxruntime-web's"):
        copy_library(source, tmp_path / "four", CPU_FILES)


def test_npm_downloads_the_pinned_release_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = archive_of(fake_library(tmp_path / "library"), tmp_path / "a.tgz")
    pinned(monkeypatch, archive)
    fake_npm(tmp_path / "good", monkeypatch, f'for last; do :; done; echo "$@" > {tmp_path}/said; cp {archive} "$last"')
    assert copy_library(None, tmp_path / "one", CPU_FILES) == RELEASE
    said = (tmp_path / "said").read_text().split()
    assert said[:3] == ["pack", f"{LIBRARY}@{RELEASE}", "--ignore-scripts"]
    fake_npm(tmp_path / "bad", monkeypatch, "echo 'npm error code ENOTFOUND' >&2; exit 1")
    with pytest.raises(ExportError, match=r"npm cannot download .* \(npm error code ENOTFOUND\): give its folder"):
        copy_library(None, tmp_path / "two", CPU_FILES)
    fake_npm(tmp_path / "slow", monkeypatch, "exec sleep 20")
    monkeypatch.setattr(web, "DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(ExportError, match=r"npm took more than 0.2 s"):
        copy_library(None, tmp_path / "three", CPU_FILES)


def test_mistakes_are_sentences_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_model(tmp_path / "tiny"), tmp_path / "out"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["export", "web", str(model), str(out)]) == 2
    assert "npm is not installed: give its folder or archive with --onnxruntime-web" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    library = fake_library(tmp_path / "library")
    for words, told in (
        (["--examples", str(tmp_path / "text.png")], "text.png cannot be an example"),
        (["--examples", *["x.png"] * 13], "at most 12 examples"),
        (["--onnxruntime-web", str(tmp_path)], "is not onnxruntime-web"),
        (["--size", "8x8", "--onnxruntime-web", str(library)], "size 8x8"),
    ):
        assert main(["export", "web", str(model), str(out), *words]) == 2
        assert told in capsys.readouterr().err

    def too_large(*_: Any, **__: Any) -> None:
        raise ExportError("the graph takes 3000000000 bytes, more than an ONNX file can hold.")

    monkeypatch.setattr(web, "export_onnx", too_large)
    assert main(["export", "web", str(model), str(out), "--onnxruntime-web", str(library)]) == 2
    assert "more than an ONNX file can hold" in capsys.readouterr().err
    assert not out.exists() and {path.name for path in tmp_path.iterdir()} == {"tiny", "text.png", "library"}
    with pytest.raises(ExportError, match="subtask must be one of panoptic, instance, semantic"):
        export_web(model, out, "depth")
    # What is missing is said before the download.
    monkeypatch.setattr(web, "copy_library", lambda *_: pytest.fail("It was downloaded."))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match="pip install 'hf-faim2f"):
        export_web(model, out)


def exported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pages use the graph that other tests of this module share."""

    def copy(
        model: str | Path, out: Path, outputs: str, input_name: str, size: Any, batch: int, verify: bool
    ) -> list[str]:
        assert (size, batch, verify) == (None, 1, False)
        shutil.copytree(exported(Path(model), outputs=outputs, input_name=input_name, batch=batch), out)
        return []

    monkeypatch.setattr(web, "export_onnx", copy)


@pytest.mark.large
def test_a_page_s_folder_has_no_address_of_another_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "tiny")
    exported_before(monkeypatch)
    library, picture, frames = fake_library(tmp_path / "library", "1.29.0"), tmp_path / "a.png", tmp_path / "a.jpg"
    photographs()[0].save(picture)
    photographs()[0].save(frames, "MPO", save_all=True, append_images=[photographs()[0]])  # as a phone writes
    out = tmp_path / "out"
    words = ["--onnxruntime-web", str(library), "--no-webgpu", "--no-check", "--title", "Roofs", "--json"]
    assert main(["export", "web", str(model), str(out), *words, "--examples", str(picture), str(frames)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {file["name"] for file in document["files"]} == {
        "index.html", "page.css", "page.js", "page.json", "model.onnx", "config.json", "preprocessor_config.json",
        "examples/1.png", "examples/2.jpg", *(f"ort/{name}" for name in CPU_FILES),
    }  # fmt: skip
    page = document["page"]
    assert (page["title"], page["subtask"], page["threshold"]) == ("Roofs", "instance", pytest.approx(0.1))
    assert page["library"] == {"release": "1.29.0", "webgpu": False}
    assert page["examples"] == ["examples/1.png", "examples/2.jpg"]
    assert any("tested with" in note for note in document["notes"])
    for name in ("index.html", "page.css", "page.js", "page.json"):
        assert "://" not in (out / name).read_text(encoding="utf-8")
    policy = (out / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


# In the browser


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def __init__(self, *arguments: Any, isolated: bool, **more: Any) -> None:
        self.isolated = isolated
        super().__init__(*arguments, **more)

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path, isolated: bool = True) -> Iterator[str]:
    handler = functools.partial(Handler, directory=str(folder), isolated=isolated)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("Chromium is not installed: apt-get install chromium.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def library() -> Path:
    """The real library, downloaded by npm, in the layout of `node_modules`."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, which downloads ONNX Runtime Web.")

    def make(folder: Path) -> None:
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "package.json").write_text(json.dumps({"name": LIBRARY, "version": RELEASE}))
        copy_library(None, partial / "dist", CPU_FILES + GPU_FILES)
        partial.rename(folder)

    try:
        return shared_folder(f"{LIBRARY} {RELEASE}", make)
    except ExportError as error:
        if "npm cannot download" in str(error) or "npm took" in str(error):
            pytest.skip(str(error))
        raise


@contextmanager
def opened(browser: Any, address: str, width: int = 1280, height: int = 900) -> Iterator[Any]:
    """The page with its model loaded; at the end, asserts that it made no request to other hosts and had no error."""
    context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    asked: list[str] = []
    failed: list[str] = []
    context.on("request", lambda one: asked.append(one.url))
    page = context.new_page()
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.locator("#status", has_text="Ready on").wait_for()
    yield page
    context.close()
    assert len(asked) > 5 and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not failed


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def segment(page: Any, name: str, content: bytes) -> dict[str, Any]:
    """The page's JSON for a picture."""
    page.set_input_files("#file", [{"name": name, "mimeType": "image/png", "buffer": content}])
    page.locator(f'#stage[data-segmented="{name}"]').wait_for()
    return json.loads(download(page, "Save JSON"))


def download(page: Any, name: str) -> bytes:
    with page.expect_download() as caught:
        page.get_by_role("button", name=name, exact=True).click()
    return Path(caught.value.path()).read_bytes()


def check_same(document: dict[str, Any], prediction: Prediction, least: float, score: float, moved: int = 0) -> None:
    """Asserts equal labels in order, scores within `score`, and masks with at least the IoU `least`, up to `moved`
    pixels."""
    assert (document["image"]["height"], document["image"]["width"]) == prediction.size
    assert document["subtask"] == prediction.subtask
    ours, theirs = document["segments"], prediction.to_json()
    assert [(one["class_id"], one["label"]) for one in ours] == [(one["class_id"], one["label"]) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["score"] == (None if other["score"] is None else pytest.approx(other["score"], abs=score))
        a, b = (coco_mask.decode(entry["segmentation"]).astype(bool) for entry in (one, other))
        assert (a & b).sum() >= least * (a | b).sum() - moved
        assert one["area"] == a.sum()
        rows, columns = np.flatnonzero(a.any(1)), np.flatnonzero(a.any(0))
        assert one["box"] == [columns[0], rows[0], columns[-1], rows[-1]]


def scenes() -> list[tuple[str, bytes]]:
    """Six pictures of digits: unchanged, enlarged, reduced, gray, square, and a JPEG with an EXIF rotation."""
    data = DigitScenes("test", 40)
    images = [Image.fromarray(data[place]["image"].permute(1, 2, 0).numpy()) for place in (0, 5, 11, 17, 23, 31)]
    turned = Image.Exif()
    turned[0x0112] = 6
    return [
        ("a.png", file_of(images[0])),
        ("b.png", file_of(images[1].resize((320, 240), Image.Resampling.BICUBIC))),
        ("c.png", file_of(images[2].resize((301, 417), Image.Resampling.BICUBIC))),
        ("d.png", file_of(images[3].resize((700, 513), Image.Resampling.BICUBIC).convert("L"))),
        ("e.png", file_of(images[4].resize((256, 256), Image.Resampling.BICUBIC))),
        ("f.jpg", file_of(images[5].resize((640, 480)).rotate(90, expand=True), "JPEG", quality=95, exif=turned)),
    ]


@pytest.mark.large  # exports, downloads with npm, and starts a browser
def test_the_page_of_the_shipped_model_gives_the_predictor_s_segments(
    browser: Any, library: Path, tmp_path: Path
) -> None:
    out, pictures = tmp_path / "page", scenes()
    (tmp_path / "scene.png").write_bytes(pictures[0][1])
    export_web(DIGITS, out, examples=[tmp_path / "scene.png"], library=library, verify=False)
    graph, network = Predictor.from_pretrained(out, "onnxruntime"), Predictor.from_pretrained(DIGITS, device="cpu")
    found = 0
    with served(out) as address, opened(browser, address) as page:
        assert page.evaluate("crossOriginIsolated")
        for name, content in pictures:
            document = segment(page, name, content)
            image = Image.open(io.BytesIO(content))
            # The same graph: equal, except for rounding in JPEG decoders and for pixels with nearly tied classes, which
            # the order of sums decides (WebAssembly's or this CPU's); a shift would move hundreds of pixels. In torch,
            # resized pictures are not rounded to bytes, which moves a few pixels of outlines.
            check_same(document, graph(image)[0], 0.999 if name.endswith(".jpg") else 1.0, 1e-3, moved=3)
            check_same(document, network(image)[0], 0.97, 1e-3)
            found += len(document["segments"])
        assert found >= 18
        check_page(page, document)
    with served(out, isolated=False) as address, opened(browser, address, 390, 844) as page:
        assert not page.evaluate("crossOriginIsolated")
        check_same(segment(page, *pictures[1]), graph(Image.open(io.BytesIO(pictures[1][1])))[0], 1.0, 1e-3)
        assert "1 thread" in page.locator("#status").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        for name in ("Choose picture", "Camera", "Save PNG", "Save JSON"):
            box = page.get_by_role("button", name=name, exact=True).bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 44
        # The camera's frames, until it is stopped; the last one remains.
        page.get_by_role("button", name="Camera", exact=True).click()
        page.locator('#stage[data-segmented="camera.png"]').wait_for()
        page.get_by_role("button", name="Stop camera", exact=True).click()
        page.get_by_role("button", name="Camera", exact=True).wait_for()
        assert json.loads(download(page, "Save JSON"))["image"]["file"] == "camera.png"


def check_page(page: Any, document: dict[str, Any]) -> None:
    """Checks the rest of the page: legend, overlay, threshold, examples and errors."""
    segments = document["segments"]
    rows = page.locator("#legend button")
    for text, one in zip(rows.all_inner_texts(), segments, strict=True):
        assert one["label"] in text and f"{one['score']:.2f}" in text and f"{one['area']:,} px" in text
    assert "Segmented in" in page.locator("#status").inner_text()

    def drawn() -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(download(page, "Save PNG"))).convert("RGB")).astype(int)

    whole = drawn()
    place = len(segments) - 1
    mask = coco_mask.decode(segments[place]["segmentation"]).astype(bool)
    factor = whole.shape[0] // mask.shape[0]
    assert whole.shape[:2] == (factor * mask.shape[0], factor * mask.shape[1])
    rows.nth(place).click()
    assert rows.nth(place).get_attribute("aria-pressed") == "true"
    alone, inside = drawn(), mask.repeat(factor, 0).repeat(factor, 1)
    assert alone[~inside].mean() < 0.5 * whole[~inside].mean() and alone[inside].mean() > 2 * alone[~inside].mean()
    rows.nth(place).click()
    page.get_by_label("Overlay").uncheck()
    plain = drawn()
    assert (np.abs(whole - plain)[inside].max(-1) > 10).mean() > 0.9
    page.get_by_label("Overlay").check()
    assert np.array_equal(drawn(), whole)
    page.locator("#threshold").fill("1")
    page.get_by_text("Nothing has so high a score").wait_for()
    page.locator("#threshold").fill("0.5")
    rows.nth(place).wait_for()
    page.get_by_role("button", name="Example 1").click()
    page.locator('#stage[data-segmented="1.png"]').wait_for()
    page.set_input_files("#file", [{"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"}])
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text().startswith("x.png cannot be decoded as a picture: choose")


@pytest.mark.slow  # as above
@pytest.mark.parametrize(
    "subtask", ["instance", *(pytest.param(name, marks=pytest.mark.large) for name in ("semantic", "panoptic"))]
)
def test_pages_of_a_tiny_model_give_the_segments_of_the_graph(
    browser: Any, library: Path, tmp_path: Path, subtask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_model(tmp_path / "tiny"), tmp_path / "page"
    exported_before(monkeypatch)
    export_web(model, out, subtask, library=library, webgpu=False, verify=False)
    predictor = Predictor.from_pretrained(out, "onnxruntime")
    with served(out, isolated=False) as address, opened(browser, address) as page:
        for number, image in enumerate(photographs()[:3]):
            name = f"{number}.png"
            check_same(segment(page, name, file_of(image)), predictor(image, subtask)[0], 0.999, 1e-3)
        if subtask == "instance":
            check_choices(page)
            check_threshold(page, predictor)


def check_choices(page: Any) -> None:
    """What was chosen last is shown, even if it is there first, and a camera that is not wanted any more is off."""
    one, other = (file_of(image) for image in photographs()[:2])
    page.evaluate("""() => {
      const later = (make) => async (...given) => {
        await new Promise((resolve) => setTimeout(resolve, 600));
        return make(...given);
      };
      const real = [createImageBitmap, navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices)];
      window.createImageBitmap = (...given) => {
        window.createImageBitmap = real[0];
        return later(real[0])(...given);
      };
      window.streams = [];
      navigator.mediaDevices.getUserMedia = later(async (...given) => {
        window.streams.push(await real[1](...given));
        return window.streams.at(-1);
      });
    }""")
    page.set_input_files("#file", [{"name": "slow.png", "mimeType": "image/png", "buffer": one}])
    segment(page, "fast.png", other)
    page.get_by_role("button", name="Camera", exact=True).click(click_count=2)
    segment(page, "picture.png", one)
    page.wait_for_function(
        "() => streams.length === 2 && streams.every((one) => one.getTracks()[0].readyState === 'ended')"
    )
    assert page.locator("#stage").get_attribute("data-segmented") == "picture.png"
    assert page.get_by_role("button", name="Camera", exact=True).is_visible()


def check_threshold(page: Any, predictor: Predictor) -> None:
    """Transparent pixels keep their colors; the threshold is used, also in a new worker and during a segmentation."""
    image = photographs()[0]
    content = file_of(Image.merge("RGBA", (*image.split(), image.convert("L").point(lambda value: 3 * (value > 99)))))
    check_same(segment(page, "clear.png", content), predictor(image, "instance")[0], 0.999, 1e-3)
    page.evaluate("document.getElementById('device').dispatchEvent(new Event('change'))")
    page.locator('#stage[data-segmented="clear.png"]').wait_for()

    def check(image: Image.Image, threshold: float) -> None:
        wanted = [segment.label for segment in predictor(image, "instance", threshold)[0].segments]
        page.wait_for_function(
            "wanted => [...document.querySelectorAll('#legend .name')].map(one => one.textContent).join() === wanted",
            arg=",".join(wanted),
        )

    page.locator("#threshold").fill("0.305")
    check(image, 0.305)
    large = image.resize((3 * 640, 3 * 388))
    page.set_input_files("#file", [{"name": "large.png", "mimeType": "image/png", "buffer": file_of(large)}])
    page.get_by_text("Segmenting", exact=True).wait_for()
    page.locator("#threshold").fill("0.5")
    page.locator('#stage[data-segmented="large.png"]').wait_for()
    check(large, 0.5)
    page.evaluate("OffscreenCanvas.prototype.getContext = () => null")
    page.set_input_files("#file", [{"name": "huge.png", "mimeType": "image/png", "buffer": file_of(image)}])
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text().startswith("This browser has no canvas of ")


@pytest.mark.large  # as above
def test_a_page_of_one_size(browser: Any, library: Path, tmp_path: Path) -> None:
    """The graph refuses all other sizes, also before the first picture."""
    model, out = save_model(tmp_path / "tiny"), tmp_path / "page"
    export_web(model, out, "instance", size=(64, 96), library=library, webgpu=False, verify=False)
    image = photographs()[0]
    with served(out, isolated=False) as address, opened(browser, address) as page:
        found = segment(page, "0.png", file_of(image))
        check_same(found, Predictor.from_pretrained(out, "onnxruntime")(image, "instance")[0], 0.999, 1e-3)


@pytest.mark.slow  # as above
def test_an_incomplete_page_says_what_is_missing(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = save_model(tmp_path / "tiny"), tmp_path / "page"
    exported_before(monkeypatch)
    export_web(model, out, library=fake_library(tmp_path / "library"), webgpu=False, verify=False)
    (out / "model.onnx").write_bytes(b"short")
    with served(out) as address:
        for break_it, told in (
            (lambda: None, "model.onnx is truncated: reload the page."),
            (lambda: (out / "model.onnx").unlink(), "model.onnx cannot be loaded (status 404)"),
            (lambda: (out / "page.json").unlink(), "page.json cannot be loaded (status 404)"),
        ):
            break_it()
            page = browser.new_page()
            page.goto(address)
            page.get_by_role("alert").wait_for()
            assert told in page.get_by_role("alert").inner_text()
            page.close()


def test_the_layout_of_transformers_js_keeps_the_report_of_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = save_model(tmp_path / "tiny"), tmp_path / "images"
    images.mkdir()

    def export(model: str, out: Path, **settings: Any) -> list[str]:
        shutil.copytree(model, out)
        (out / "model.onnx").write_bytes(b"float")
        return []

    def quantize(source: Path, out: Path, images: Path) -> list[str]:
        out.mkdir()
        (out / "model.onnx").write_bytes(b"int8")
        (out / "quantization.json").write_text("{}")
        return ["said", "model.onnx has 2.8 MB; quantization.json has the full report"]

    monkeypatch.setattr(web, "export_onnx", export)
    monkeypatch.setattr("hf_faim2f.export.quantize.quantize", quantize)
    lines = web.export_transformers_js(str(model), tmp_path / "out", images=images)
    assert lines[-2:] == ["said", "onnx/model_int8.onnx has 2.8 MB; quantization.json has the full report"]
    assert (tmp_path / "out" / "quantization.json").is_file()
    assert (tmp_path / "out" / "onnx" / "model_int8.onnx").read_bytes() == b"int8"


@pytest.mark.large  # exports two graphs
def test_the_layout_of_transformers_js(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_model(tmp_path / "tiny"), tmp_path / "out"

    def copy(model: str, out: Path, size: Any, batch: Any, opset: int, verify: bool, precision: str = "") -> list[str]:
        """Copies graphs that other tests share; the one in fp16 only accepts the size of the image below."""
        assert (size, batch, opset, verify) == (None, None, 18, False)
        options: dict[str, Any] = {"size": (64, 96), "precision": precision} if precision else {"outputs": "logits"}
        shutil.copytree(exported(Path(model), **options), out)
        return []

    monkeypatch.setattr(web, "export_onnx", copy)
    words = ["export", "onnx", str(model), str(out), "--layout", "transformers.js", "--no-check"]
    for more in (["--outputs", "semantic"], ["--input", "image"], ["--precision", "fp16"]):
        assert main([*words, *more]) == 2
        assert "has its own" in capsys.readouterr().err
    assert main(["export", "onnx", str(model), str(out), "--calibrate", str(tmp_path)]) == 2
    assert "--calibrate is for --layout transformers.js" in capsys.readouterr().err
    assert main([*words, "--calibrate", str(tmp_path / "nowhere")]) == 2  # int8 is not left out silently
    assert "nowhere is not a folder" in capsys.readouterr().err and not out.exists()
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    names = {"config.json", "preprocessor_config.json", "onnx/model.onnx", "onnx/model_fp16.onnx"}
    assert {file["name"] for file in document["files"]} == names
    assert set(", ".join(ONNX_DOCUMENT).split(", ")) == set(document) and document["nodes"] is None
    assert any("model_int8.onnx is not written: it needs calibration images" in note for note in document["notes"])
    config, settings = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "preprocessor_config"))
    assert config["model_type"] == "maskformer" and list(config["id2label"].values()) == list(LABELS.values())
    assert settings["size"] == {"shortest_edge": 64} and "size_divisor" not in settings and "auto_map" not in settings
    assert settings["do_pad"] is False and "pad_size" not in settings
    answers = []
    image = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    for path in ("onnx/model.onnx", "onnx/model_fp16.onnx"):
        session = onnxruntime.InferenceSession(str(out / path))
        answers.append(session.run(["class_queries_logits", "masks_queries_logits"], {"pixel_values": image}))
    expected = onnxruntime.InferenceSession(str(exported(model, outputs="logits") / "model.onnx"))
    for values in zip(*answers, expected.run(None, {"pixel_values": image}), strict=True):
        assert np.allclose(values[0], values[2], atol=1e-4) and values[1].shape == values[0].shape
