"""The page in a real browser, at desktop and phone width: results match the predictor's."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.runtime import Prediction, Predictor
from hf_faim2f.runtime.drawing import DARKNESS
from hf_faim2f.serving import space as web

GRADIO = importlib.metadata.version("gradio")
# The page is the same in every environment, and its Python code is tested in test_parts.py.
pytestmark = pytest.mark.skipif(
    tuple(map(int, GRADIO.split(".")[:2])) < (6, 31),
    reason=f"The browser tests need gradio 6.31 or later, and {GRADIO} is installed: the translations in the frontend "
    "of 6.17.3 sometimes fail (\"Cannot read properties of undefined (reading '0')\"), so the tests that no error "
    "occurs in the browser would fail at random. The page as a visitor sees it is not tested here.",
)
MODEL = Path(__file__).parents[2] / "examples" / "digits"
BROWSER = shutil.which("chromium")
# An empty profile, no sandbox because root has none, and no network traffic by the browser itself.
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run", "--disable-quic"]  # fmt: skip
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
NAME = "a <b>{{scene}}</b> ${1}.png"
WAIT = 60_000  # milliseconds; generous, because the machine may be busy


class Server(NamedTuple):
    address: str
    folder: Path  # for temporary files
    scene: bytes  # a picture
    prediction: Prediction  # of the scene, by the predictor


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A copy of the Space's file, started and stopped as on a Space; it leaves no files behind."""
    root = tmp_path_factory.mktemp("space")
    shutil.copy(web.__file__, root / "app.py")
    temporary = root / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "FAIM2F_MODEL": str(MODEL), "GRADIO_SERVER_PORT": "0", "TMPDIR": str(temporary),
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MODEL.parent.parent)}  # fmt: skip
    process = subprocess.Popen([sys.executable, "app.py"], cwd=root, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout and process.stderr
    said = process.stdout.readline()  # returns when the line is printed, or when the process ends
    if "The page is at http://127.0.0.1:" not in said:
        process.kill()
        pytest.fail(f"{said}{process.stderr.read()}")
    pixels = DigitScenes("test", 40)[23]["image"]
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((320, 240)).save(file, "PNG")
    prediction = Predictor.from_pretrained(MODEL, device="cpu")(Image.open(io.BytesIO(file.getvalue())))[0]
    try:
        yield Server(said.split()[4], temporary, file.getvalue(), prediction)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert not list(temporary.glob("faim2f-app-*"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("Chromium is not installed: apt-get install chromium.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page at a given width; at the end, asserts that it loaded nothing from other hosts and had no error."""
    width, height = WIDTHS[getattr(request, "param", "desktop")]
    context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    page = context.new_page()
    asked: list[str] = []
    failed: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.on("pageerror", lambda error: failed.append(f"{error} {error.stack}"))
    page.goto(server.address)
    page.get_by_role("button", name="Segment", exact=True).wait_for()
    yield page
    context.close()
    assert not [url for url in asked if not url.startswith((server.address, "data:", "blob:"))] and len(asked) > 5
    assert not failed


def upload(page: Any, name: str, content: bytes) -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.set_input_files("#picture input[type=file]", [file])


def shown(page: Any) -> np.ndarray:
    """The overlay's pixels as loaded by the browser."""
    answer = page.request.get(page.locator("#overlay img").get_attribute("src"))
    assert answer.ok
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))


def after(page: Any, act: Any) -> np.ndarray:
    """The new overlay after an action."""
    before = page.locator("#overlay img").get_attribute("src")
    act()
    page.wait_for_function("old => (document.querySelector('#overlay img')?.src ?? old) !== old", arg=before)
    return shown(page)


def download(page: Any, name: str) -> bytes:
    with page.expect_download() as caught:
        page.get_by_role("button", name=name, exact=True).click()
    return Path(caught.value.path()).read_bytes()


def whole_mask(prediction: Prediction, place: int) -> np.ndarray:
    return coco_mask.decode(prediction.run_lengths()[place]).astype(bool)


@pytest.mark.parametrize("page", WIDTHS, indirect=True)
def test_a_picture_is_segmented_and_each_segment_shown_alone(page: Any, server: Server) -> None:
    prediction = server.prediction
    assert len(prediction.segments) >= 3
    upload(page, NAME, server.scene)
    page.locator("#legend button").first.wait_for()
    overlay = shown(page)
    assert np.array_equal(overlay, np.asarray(prediction.draw()))
    rows = page.locator("#legend button").all_inner_texts()
    for row, segment, entry in zip(rows, prediction.segments, prediction.to_json(), strict=True):
        assert segment.label in row and f"{segment.score:.2f}" in row and f"{entry['area']:,} px" in row
    # All controls fit the width, and are legible and reachable.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for role, name in [("radio", "panoptic"), ("radio", "torch"), ("button", "Segment"), ("button", "JSON"),
                       ("slider", None), ("button", "Masks (zip)"), ("button", "COCO")]:  # fmt: skip
        control = page.get_by_role(role, name=name, exact=True) if name else page.locator("#threshold input").last
        box = control.first.bounding_box()
        assert box and box["width"] > 0 and box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
    # A segment's row, by keyboard: the segment is unchanged, and everything outside it is darkened.
    place = 1
    button = page.locator("#legend button").nth(place)
    button.focus()
    alone = after(page, lambda: page.keyboard.press("Enter"))
    check_alone(alone, prediction, place)
    assert button.get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.dataset.place") == str(place)
    # The same row again shows all segments; a click on another segment's pixel shows that one.
    assert np.array_equal(after(page, button.click), overlay)
    place = 2
    inner = np.argwhere(whole_mask(prediction, place) & (prediction.segment_map().numpy() == place))
    y, x = inner[len(inner) // 2]
    image = page.locator("#overlay img")
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    scale = min(box["width"] / 320, box["height"] / 240)  # the image may be centered in a larger box
    left, top = (box["width"] - 320 * scale) / 2, (box["height"] - 240 * scale) / 2
    position = {"x": left + (x + 0.5) * scale, "y": top + (y + 0.5) * scale}
    alone = after(page, lambda: image.click(position=position))
    check_alone(alone, prediction, place)
    page.locator("#legend button[aria-pressed=true]").wait_for()
    assert page.locator("#legend button[aria-pressed=true]").get_attribute("data-place") == str(place)


def check_alone(alone: np.ndarray, prediction: Prediction, place: int) -> None:
    image = np.asarray(prediction.image).astype(float)
    inside = whole_mask(prediction, place)
    dark = np.abs(alone - (1 - DARKNESS) * image).max(-1) <= 2
    assert dark[~inside].mean() > 0.9  # except for the label
    tinted = np.abs(alone[inside].astype(float) - image[inside]).max(-1)
    assert (tinted > 10).mean() > 0.9 and alone[inside].mean() > 2 * alone[~inside].mean()


def test_downloads_are_the_prediction(page: Any, server: Server) -> None:
    prediction = server.prediction
    upload(page, NAME, server.scene)
    page.locator("#legend button").first.wait_for()
    document = json.loads(download(page, "JSON"))
    assert document["segments"] == prediction.to_json() and document["subtask"] == "panoptic"
    assert (document["image"]["height"], document["image"]["width"]) == (240, 320)
    assert "/" not in document["model"] and "/" not in document["image"]["file"]  # no paths on the server
    with zipfile.ZipFile(io.BytesIO(download(page, "Masks (zip)"))) as archive:
        names = archive.namelist()
        masks = [np.asarray(Image.open(archive.open(name))) for name in names if name.startswith("masks/")]
        labels = np.asarray(Image.open(archive.open("labels.png"))).astype(int)
        segments = np.asarray(Image.open(archive.open("segments.png"))).astype(int)
    assert len(masks) == len(prediction.segments)
    for place, mask in enumerate(masks):
        assert np.array_equal(mask.astype(bool), whole_mask(prediction, place))
    assert np.array_equal(np.where(labels == 255, -1, labels), prediction.label_map.numpy())
    assert np.array_equal(segments, prediction.segment_map().numpy() + 1)
    coco = COCO()
    coco.dataset = json.loads(download(page, "COCO"))
    coco.createIndex()
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert len(annotations) == len(prediction.segments)
    for place, annotation in enumerate(annotations):
        mask = whole_mask(prediction, place)
        assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
        assert annotation["area"] == mask.sum()
        assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
        assert coco.loadCats([annotation["category_id"]])[0]["name"] == prediction.segments[place].label


@pytest.mark.large
def test_choices_count_and_mistakes_are_sentences(page: Any, server: Server) -> None:
    told = page.locator("#message p")
    upload(page, "broken.png", server.scene[: len(server.scene) // 2])
    page.locator("#message [role=alert]").wait_for()
    assert told.inner_text().startswith("broken.png cannot be decoded, the file may be truncated")
    # The button is "Clear" or "Remove Image", depending on Gradio's version.
    page.locator("#picture button[aria-label*='clear' i], #picture button[aria-label*='remove' i]").first.click()
    page.get_by_text("Drop an image, or choose an example.").wait_for()
    upload(page, NAME, b"no picture")
    page.locator("#message [role=alert]").wait_for()
    assert "cannot be read as an image: JPEG, PNG" in told.inner_text() and page.locator("#message b").count() == 0
    assert page.locator("#overlay img").count() == 0
    # A file that is too large is not sent at all.
    upload(page, "large.png", bytes(21_000_000))
    page.get_by_text('exceed the maximum allowed size of 19.1 Mb: "large.png"').wait_for()
    # An example, first semantic, then instances above a threshold that none reaches.
    page.get_by_role("radio", name="semantic").check()
    page.locator("#threshold input[disabled]").first.wait_for()
    page.locator("#examples button").first.click()
    page.locator("#legend button").first.wait_for()
    assert "class" in told.inner_text() and page.locator("#legend .score").first.inner_text() == ""
    assert page.get_by_role("button", name="COCO", exact=True).is_enabled()
    page.get_by_role("radio", name="instance").check()
    number = page.locator("#threshold input[type=number]:not([disabled])")
    number.fill("1")
    number.press("Tab")
    page.get_by_role("button", name="Segment", exact=True).click()
    page.get_by_text("Nothing has a score above 1.00").wait_for()
    for name in ("JSON", "Masks (zip)", "COCO"):  # of the previous prediction
        assert page.get_by_role("button", name=name, exact=True).is_disabled(), name


def test_nothing_else_is_served(server: Server) -> None:
    for path in ("/gradio_api/file=/etc/passwd", f"/gradio_api/file={MODEL}/config.json", "/gradio_api/file=app.py",
                 "/gradio_api/file=../../etc/passwd", "/docs", "/openapi.json", "/monitoring"):  # fmt: skip
        with pytest.raises(HTTPError) as refused:
            urlopen(server.address + path)
        assert refused.value.code in (401, 403, 404), path
    with urlopen(f"{server.address}/gradio_api/info") as answer:
        assert json.load(answer)["named_endpoints"] == {}
    # Rejected by its Content-Length, before the body is sent.
    headers = {"Content-Type": "application/json", "Content-Length": str(2 << 20)}
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(f"{server.address}/gradio_api/queue/join", b" ", headers))
    assert refused.value.code == 413
    with urlopen(server.address) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
