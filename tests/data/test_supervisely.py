"""Supervisely's projects, against masks written in the tests and pycocotools."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference

from hf_faim2f.data import binary_masks, class_map, describe
from hf_faim2f.data.counts import count_classes
from hf_faim2f.data.dataset import reader_of
from hf_faim2f.data.formats import DataSource, recognize
from hf_faim2f.data.readers import supervisely
from hf_faim2f.data.readers.supervisely import load_supervisely
from hf_faim2f.errors import DatasetError, MissingPartError

HEIGHT, WIDTH = 10, 12
CLASSES = {"cat": "any", "dog": "bitmap", "pin": "point", "Background": "polygon", "void": "any"}
SQUARE = [[2, 2], [5, 2], [5, 5], [2, 5]]
BITS = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)


def drawn(text: str) -> np.ndarray:
    """A mask drawn with `#`, one row per line, from the top left corner."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for y, line in enumerate(text.split()):
        for x, character in enumerate(line):
            mask[y, x] = character == "#"
    return mask


def filled(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """A mask of a rectangle; all sides belong to it."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def polygon(points: list[Any], holes: Any = (), title: str = "cat", **more: Any) -> dict[str, Any]:
    about = {"classTitle": title, "geometryType": "polygon", "tags": []}
    return {**about, "points": {"exterior": points, "interior": list(holes)}, **more}


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def bitmap(data: bytes, x: Any = 4, y: Any = 3, title: str = "dog", compress: bool = True) -> dict[str, Any]:
    text = base64.b64encode(zlib.compress(data) if compress else data).decode()
    return {"classTitle": title, "geometryType": "bitmap", "bitmap": {"data": text, "origin": [x, y]}}


def figure(kind: str, title: str = "cat", **more: Any) -> dict[str, Any]:
    return {"classTitle": title, "geometryType": kind, **more}


def meta(root: Path, classes: Any = None, **more: Any) -> Path:
    found = [{"title": title, "shape": shape, "color": "#FF0000"} for title, shape in (classes or CLASSES).items()]
    root.mkdir(parents=True, exist_ok=True)
    (root / "meta.json").write_text(json.dumps({"classes": found, "tags": [], "projectType": "images", **more}))
    return root


def project(
    root: Path, objects: Any = (), place: str = "ds", name: str = "a.png", ann: str | None = None, **changes: Any
) -> Path:
    """Adds an image with objects to a project; writes meta.json if there is none."""
    if not (root / "meta.json").exists():
        meta(root)
    for folder in ("img", "ann"):
        (root / place / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (9, 99, 199)).save(root / place / "img" / name)
    content = {"description": "", "tags": [], "size": {"height": HEIGHT, "width": WIDTH}, "objects": list(objects)}
    (root / place / "ann" / (ann or f"{name}.json")).write_text(json.dumps({**content, **changes}))
    return root


def masks_of(root: Path, task: Any = "instance") -> np.ndarray:
    return binary_masks(load_supervisely(root, "all", task)[0]).numpy()


def test_polygons_with_holes_include_their_outlines(tmp_path: Path) -> None:
    """As Supervisely's SDK draws them, with OpenCV's fillPoly: the outline of a hole is not part of the object."""
    hole = [[3, 3], [7, 3], [7, 6], [3, 6]]
    triangle = polygon([[2, 1], [9, 3], [4, 7]])
    frame = polygon([[1, 1], [10, 1], [10, 8], [1, 8]], [hole, [[9, 2], [9, 3]]])  # two points have no area
    data = load_supervisely(project(tmp_path, [triangle, frame]), "all")
    masks = binary_masks(data[0]).numpy()
    assert np.array_equal(
        masks[0],
        drawn("""
            ............
            ..##........
            ..######....
            ...#######..
            ...######...
            ...#####....
            ....##......
            ....#.......
        """),
    )
    assert np.array_equal(masks[1], filled(1, 1, 8, 10) & ~filled(3, 3, 6, 7))
    assert data[0]["classes"].tolist() == [0, 0] and data[0]["file_name"] == data[0]["image_id"] == "ds/img/a.png"


def test_fractions_are_positions_in_the_image(tmp_path: Path) -> None:
    corners, hole = [[1.5, 1.2], [10.6, 2.0], [4.3, 8.9]], [[3.5, 3.5], [6.0, 3.5], [6.0, 5.5], [3.5, 5.5]]
    masks = masks_of(project(tmp_path, [polygon(corners), polygon(corners, [hole])]))
    outer, inner = (
        reference.decode(reference.merge(reference.frPyObjects([ring], HEIGHT, WIDTH))).astype(bool)
        for ring in ([number for point in points for number in point] for points in (corners, hole))
    )
    assert np.array_equal(masks[0], outer) and np.array_equal(masks[1], outer & ~inner) and (outer & inner).any()


def test_shapes_at_the_border_and_without_width(tmp_path: Path) -> None:
    objects = [
        polygon([[-1, -2], [3, -2], [3, 2], [-1, 2]]),
        polygon([[9, 7], [12, 7], [12, 10], [9, 10]]),
        polygon([[2, 4], [8, 4], [8, 4]]),
        polygon([[6, 6]] * 3),
    ]
    masks = masks_of(project(tmp_path, objects))
    expected = (filled(0, 0, 2, 3), filled(7, 9, 9, 11), filled(4, 2, 4, 8), filled(6, 6, 6, 6))
    for mask, other in zip(masks, expected, strict=True):
        assert np.array_equal(mask, other)


def test_rectangles_and_polygons_of_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(supervisely.logger, "warning_once", said.append)
    parts = [
        {"exterior": SQUARE, "interior": [[[3, 3], [4, 3], [4, 4], [3, 4]]]},
        {"exterior": [[3, 3], [3, 3], [9, 3]]},
    ]
    objects = [
        figure("rectangle", points={"exterior": [[7, 6], [3, 2]], "interior": []}),
        figure("rectangle", points={"exterior": [[2.0, 2.5], [6.5, 8.0]], "interior": []}),
        figure("multipolygon", parts=parts),
    ]
    masks = masks_of(project(tmp_path, objects))
    assert np.array_equal(masks[0], filled(2, 3, 6, 7))
    box = reference.frPyObjects([[2.0, 2.5, 6.5, 2.5, 6.5, 8.0, 2.0, 8.0]], HEIGHT, WIDTH)
    assert np.array_equal(masks[1], reference.decode(reference.merge(box)).astype(bool))
    assert np.array_equal(masks[2], (filled(2, 2, 5, 5) & ~filled(3, 3, 4, 4)) | filled(3, 3, 3, 9))
    (text,) = said
    assert "rectangles, which are read as masks of the whole rectangles (2 of cat): if they are bounding boxes" in text


def pictures() -> dict[str, tuple[bytes, bool]]:
    """PNG files that show BITS, and whether they are compressed by zlib."""
    white, height, width = BITS.astype(np.uint8) * 255, *BITS.shape
    own = Image.fromarray(BITS.astype(np.uint8))  # as Supervisely's SDK writes it
    own.putpalette([0, 0, 0, 255, 255, 255])
    swapped = Image.fromarray((~BITS).astype(np.uint8))  # index 1 is transparent
    swapped.putpalette([0, 0, 0, 255, 255, 255])
    plain = Image.fromarray(BITS.astype(np.uint8) * 3)
    plain.putpalette([9, 9, 9] * 4)
    color = np.zeros((height, width, 3), dtype=np.uint8)
    color[..., 2] = BITS * 5
    clear = np.full((height, width, 4), 200, dtype=np.uint8)
    clear[..., 3] = BITS * 90
    gray = np.stack([np.full_like(white, 77), white], -1)
    keyed = np.where(BITS, 0, 50).astype(np.uint8)  # 50 is transparent
    return {
        "palette": (png(own, transparency=0, optimize=0), True),
        "palette, one bit": (png(own, transparency=0, bits=1), True),
        "palette, uncompressed": (png(own, transparency=0), False),
        "palette, index 1 transparent": (png(swapped, transparency=1), True),
        "palette, alpha of each color": (png(swapped, transparency=bytes([255, 0])), True),
        "palette without transparency": (png(plain), True),
        "gray": (png(Image.fromarray(white)), True),
        "gray, one bit": (png(Image.fromarray(BITS)), True),
        "gray, one bit, black transparent": (png(Image.fromarray(BITS), transparency=0), True),
        "gray, 16 bits": (png(Image.fromarray(BITS.astype(np.uint16) * 256)), True),
        "gray, one value transparent": (png(Image.fromarray(keyed), transparency=50), True),
        "gray and alpha": (png(Image.fromarray(gray, "LA")), True),
        "color": (png(Image.fromarray(color)), True),
        "color and alpha": (png(Image.fromarray(clear)), True),
        "color and alpha, uncompressed": (png(Image.fromarray(clear)), False),
    }


PICTURES = pictures()


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_bitmap(tmp_path: Path, kind: str) -> None:
    data, compress = PICTURES[kind]
    masks = masks_of(project(tmp_path, [bitmap(data, 4, 3, compress=compress)]))
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[3:7, 4:7] = BITS
    assert np.array_equal(masks[0], expected)


def test_a_bitmap_of_supervisely_itself(tmp_path: Path) -> None:
    """From the documentation of its SDK: a ring of 3x3 pixels."""
    text = (
        "eJzrDPBz5+WS4mJgYOD19HAJAtLMIMwIInOeqf8BUmwBPiGuQPr///9Lb86/C2QxlgT5BTM4PLuRBuTwebo4hlTMSa44sKHhISMDuxpTYrr0"
        "3F6gDIOnq5/LOqeEJgDM5ht6"
    )
    entry = figure("bitmap", "dog", bitmap={"data": text, "origin": [9, 7]})
    ring = filled(7, 9, 9, 11) & ~filled(8, 10, 8, 10)
    assert np.array_equal(masks_of(project(tmp_path, [entry]))[0], ring)


def test_later_objects_are_on_top(tmp_path: Path) -> None:
    large, small = [[1, 1], [8, 1], [8, 8], [1, 8]], SQUARE
    project(tmp_path, [polygon(small), polygon(large), bitmap(png(Image.fromarray(BITS)))])
    item = load_supervisely(tmp_path, "all")[0]
    assert int((item["segments"] == 0).sum()) == 0 and item["classes"].tolist() == [0, 0, 1]
    assert int(item["segments"][3, 4]) == 2 and int(item["segments"][3, 5]) == 1
    assert np.array_equal(binary_masks(item)[0].numpy(), filled(2, 2, 5, 5))


def test_classes(tmp_path: Path) -> None:
    """Points have no class, `void` is none, and the background is what no object covers."""
    objects = [polygon(SQUARE), polygon([[0, 0], [2, 0], [2, 2], [0, 2]], title="void"), polygon(SQUARE, title="dog"),
               polygon([[0, 9], [11, 9], [11, 9]], title="Background")]  # fmt: skip
    project(tmp_path, objects)
    instance, semantic = (load_supervisely(tmp_path, "all", task) for task in ("instance", "semantic"))
    assert describe(instance).labels == ("cat", "dog") and describe(instance).things == {0, 1}
    assert instance[0]["classes"].tolist() == [0, 1]
    assert describe(semantic).labels == ("cat", "dog", "Background") and not describe(semantic).things
    truth = np.where(filled(2, 2, 5, 5), 1, np.where(filled(0, 0, 2, 2), -1, 2))
    assert torch.equal(class_map(semantic[0]), torch.from_numpy(truth).long())
    counts = count_classes(instance, describe(instance))
    assert (counts.pixels, counts.segments) == ((16, 16), (1, 1))


def test_void_on_top_is_none(tmp_path: Path) -> None:
    project(tmp_path, [polygon(SQUARE), polygon([[4, 4], [8, 4], [8, 8], [4, 8]], title="void")])
    found = class_map(load_supervisely(tmp_path, "all", "semantic")[0])
    truth = np.where(filled(4, 4, 8, 8), -1, np.where(filled(2, 2, 5, 5), 0, 2))
    assert torch.equal(found, torch.from_numpy(truth).long())


def test_objects_without_an_area_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(supervisely.logger, "warning_once", said.append)
    points = {"exterior": [[1, 1]], "interior": []}
    lines = [figure(kind, points=points) for kind in ("line", "polyline", "graph", "cuboid")]
    project(tmp_path, [*lines, figure("point", "pin", points=points), polygon(SQUARE)])
    assert len(load_supervisely(tmp_path, "all")[0]["classes"]) == 1
    (text,) = said
    assert "points, lines, graphs or cuboids" in text and "left out (4 of cat, 1 of pin)" in text


def test_older_projects(tmp_path: Path) -> None:
    """The annotations of a.jpg are in a.json, the shape is only in meta.json, and tags are words."""
    meta(tmp_path, {"cat": "polygon"})
    entry = {"classTitle": "cat", "bitmap": None, "points": {"exterior": SQUARE, "interior": []}}
    project(tmp_path, [entry], name="a.JPG", ann="a.json", tags=["day"])
    data = load_supervisely(tmp_path, "all")
    assert data[0]["file_name"] == "ds/img/a.JPG"
    assert np.array_equal(binary_masks(data[0])[0].numpy(), filled(2, 2, 5, 5))


def test_datasets_called_like_parts(tmp_path: Path) -> None:
    for place, names in (("Train", "ab"), ("valid", "c"), ("city", "d"), ("train/datasets/day", "")):
        for name in names:
            project(tmp_path, [polygon(SQUARE)], place, f"{name}.png")
    project(tmp_path, [polygon(SQUARE)], "Train/datasets/day", "e.png")
    project(tmp_path, [polygon(SQUARE)], "town/datasets/test/datasets/x", "f.png")
    found = {part: [Path(item["file_name"]).stem for item in load_supervisely(tmp_path, part)]
             for part in ("train", "val", "test", "city")}  # fmt: skip
    assert found == {"train": ["a", "b", "e"], "val": ["c"], "test": ["f"], "city": ["d"]}
    with pytest.raises(MissingPartError, match="has no part 'all'; it is divided into Train, city, test, valid"):
        load_supervisely(tmp_path, "all")


def test_datasets_with_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(supervisely.logger, "warning_once", said.append)
    for number in range(11):
        tag = {"name": "val" if number > 8 else "train"}
        project(tmp_path, [polygon(SQUARE)], "one" if number < 6 else "two", f"{number:02}.png", tags=[tag])
    parts = {part: load_supervisely(tmp_path, part) for part in ("train", "val", "all", "two")}
    assert [len(part) for part in parts.values()] == [9, 2, 11, 5]
    assert [item["image_id"] for item in parts["val"]] == ["one/img/00.png", "two/img/10.png"]
    assert len(said) == 3 and "images with the tag 'val'. Tags are not read: if they are splits, put" in said[0]


def test_datasets_in_no_split_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(supervisely.logger, "warning_once", said.append)
    for place, name in (("train", "a"), ("train/datasets/test", "b"), ("val", "c"), ("extra", "d"), ("Training", "e")):
        project(tmp_path, [polygon(SQUARE)], place, f"{name}.png")
    found = {part: [Path(item["file_name"]).stem for item in load_supervisely(tmp_path, part)]
             for part in ("train", "val", "test", "extra")}  # fmt: skip
    assert found == {"train": ["a"], "val": ["c"], "test": ["b"], "extra": ["d"]}
    assert [text.partition("so ")[2].partition(":")[0] for text in said] == [
        "Training, extra is not used with train", "extra is not used with val", "extra is not used with test"
    ]  # fmt: skip


def test_links_to_datasets_are_followed_once(tmp_path: Path) -> None:
    meta(tmp_path)
    for number in range(9):
        (tmp_path / f"d{number}" / "datasets").mkdir(parents=True)
        for other in range(9):
            (tmp_path / f"d{number}" / "datasets" / f"to{other}").symlink_to(tmp_path / f"d{other}")
    assert len(list(supervisely._datasets(tmp_path))) == 9
    assert not supervisely.is_project(tmp_path)
    assert len(load_supervisely(project(tmp_path, [polygon(SQUARE)], "d4"), "all")) == 1


def test_spaces_around_class_names(tmp_path: Path) -> None:
    meta(tmp_path, {"cat ": "any", " void": "any", "background ": "any"})
    project(tmp_path, [polygon(SQUARE, title="cat "), polygon(SQUARE, title=" void")])
    assert describe(load_supervisely(tmp_path, "all")).labels == ("cat",)
    semantic = load_supervisely(tmp_path, "all", "semantic")
    assert describe(semantic).labels == ("cat", "background")
    assert torch.equal(class_map(semantic[0]), torch.from_numpy(np.where(filled(2, 2, 5, 5), -1, 1)).long())


def test_images_and_annotations_that_do_not_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(supervisely.logger, "warning_once", said.append)
    project(tmp_path, [polygon(SQUARE)])
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "ds" / "img" / "b.png")
    (tmp_path / "ds" / "ann" / "._a.png.json").write_text("left by a file system")
    assert len(load_supervisely(tmp_path, "all")) == 1
    (text,) = said
    assert "ds has an image without an annotation file in ann, such as b.png: not read" in text
    (tmp_path / "ds" / "img" / "b.png").unlink()
    project(tmp_path / "two", [polygon(SQUARE)], name="a.jpg", ann="a.json")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "two" / "ds" / "img" / "a.png")
    assert [item["file_name"] for item in load_supervisely(tmp_path / "two", "all")] == ["ds/img/a.jpg"]
    assert len(said) == 2 and "such as a.png: not read" in said[1]
    (tmp_path / "ds" / "ann" / "c.png.json").write_bytes((tmp_path / "ds" / "ann" / "a.png.json").read_bytes())
    with pytest.raises(DatasetError, match=r"c.png.json has no image: there is no file .*ds/img/c.png"):
        load_supervisely(tmp_path, "all")
    data = load_supervisely(tmp_path, "all", skip_bad=True)
    assert len(data) == 1 and len(describe(data).skipped) == 1
    (tmp_path / "ds" / "ann" / "c.png.json").rename(tmp_path / "ds" / "ann" / "a.json")
    with pytest.raises(DatasetError, match=r"a.png.json and a.json are of the same image a.png: remove one"):
        load_supervisely(tmp_path, "all")


def test_a_rotated_image(tmp_path: Path) -> None:
    """The size in the annotation shows that it refers to the stored pixels, or to the upright image."""
    project(tmp_path, [polygon([[0, 0], [4, 0], [4, 1], [0, 1]])])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "ds" / "img" / "a.png", exif=exif)
    item = load_supervisely(tmp_path, "all")[0]
    assert item["image"].shape[1:] == (WIDTH, HEIGHT)
    stored = filled(0, 0, 1, 4)
    assert np.array_equal(binary_masks(item)[0].numpy(), np.rot90(stored, -1))
    project(tmp_path, [polygon([[0, 0], [4, 0], [4, 1], [0, 1]])], size={"height": WIDTH, "width": HEIGHT})
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "ds" / "img" / "a.png", exif=exif)
    upright = binary_masks(load_supervisely(tmp_path, "all")[0])[0].numpy()
    assert upright.shape == (WIDTH, HEIGHT) and upright[:2, :5].all() and upright.sum() == 10


def test_remarks(tmp_path: Path) -> None:
    empty = bitmap(png(Image.fromarray(np.zeros((2, 2), dtype=bool))))
    data = load_supervisely(project(tmp_path, [polygon([[1, 1], [16, 1], [5, 5]]), empty]), "all")
    remarks = reader_of(data).remarks(data.with_format(None)[0])
    assert [kind for kind, _ in remarks] == ["outside", "vanished"]
    assert "a.png.json: object 0 (cat) extends beyond its image" in remarks[0][1]


def bomb(zeros: int) -> bytes:
    return b"not a PNG" + bytes(zeros)


def oversized_png(side: int) -> bytes:
    """A valid header of a large image, with the first of its pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9))
    parts = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


WHOLE = png(Image.fromarray(BITS))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({**bitmap(WHOLE), "bitmap": {"data": "a", "origin": [1, 1]}}, "object 0 (dog): its bitmap is not base64"),
        (bitmap(b"GIF89a", compress=False), "object 0 (dog): its bitmap is neither a PNG nor one compressed by zlib"),
        (bitmap(b"GIF89a"), "object 0 (dog): its bitmap is not a PNG."),
        (bitmap(WHOLE[:-30]), "object 0 (dog): its bitmap is a damaged PNG"),
        (bitmap(bomb(1 << 24)), "its bitmap has more than 66,136 bytes, too many for an image of 10x12"),
        (bitmap(oversized_png(5000)), "its bitmap of 5000x5000 pixels (height x width) at x=4, y=3 leaves its image"),
        (bitmap(oversized_png(50_000)), "its bitmap is not a PNG that can be opened (Image size"),
        (bitmap(WHOLE, 10, 3), "its bitmap of 4x3 pixels (height x width) at x=10, y=3 leaves its image of 10x12"),
        (bitmap(WHOLE, 3, 7), "at x=3, y=7 leaves its image"),
        (bitmap(WHOLE, -1, 3), "at x=-1, y=3 leaves its image"),
    ],
)
def test_unusable_bitmaps(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    data = load_supervisely(project(tmp_path, [entry]), "all")
    with pytest.raises(DatasetError) as caught:
        data[0]
    assert "a.png.json: " in str(caught.value) and words in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_bitmap_in_a_corner_fits(tmp_path: Path) -> None:
    masks = masks_of(project(tmp_path, [bitmap(WHOLE, WIDTH - 3, HEIGHT - 4), bitmap(WHOLE, 0.5, 0)]))
    assert np.array_equal(masks[0][-4:, -3:], BITS) and np.array_equal(masks[1][:4, :3], BITS)


def test_bombs_are_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    make = zlib.decompressobj

    class Watched:
        def __init__(self) -> None:
            self.inner = make()

        def decompress(self, data: bytes, most: int = 0) -> bytes:
            found = self.inner.decompress(data, most)
            sizes.append(len(found))
            return found

        @property
        def unconsumed_tail(self) -> bytes:
            return self.inner.unconsumed_tail

    data = load_supervisely(project(tmp_path, [bitmap(bomb(1 << 26))]), "all")
    monkeypatch.setattr("hf_faim2f.data.readers.supervisely_document.zlib.decompressobj", Watched)
    with pytest.raises(DatasetError, match="too many for an image"):
        data[0]
    assert sizes == [5 * HEIGHT * WIDTH + (1 << 16)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (polygon(SQUARE, title="cow"), "object 0 has the class 'cow', which meta.json does not have: add it there."),
        (polygon(SQUARE, title="pin"), "object 0 is a polygon, but meta.json gives its class 'pin' the shape point"),
        ({"geometryType": "polygon"}, "object 0 has no classTitle"),
        ("cat", "object 0 has no classTitle"),
        (
            figure("alpha_mask", bitmap={}),
            "(cat) has the geometryType 'alpha_mask', which is not read: convert it to a",
        ),
        (figure("oriented_bbox"), "(cat) has the geometryType 'oriented_bbox'"),
        (figure(["x"]), "(cat) has the geometryType \"['x']\""),
        (figure("bitmap"), "object 0 (cat) has no bitmap with data and origin"),
        (figure("bitmap", bitmap={"data": None, "origin": [1, 1]}), "has no bitmap with data and origin"),
        (figure("bitmap", bitmap={"data": "", "origin": [1]}), "has no list of points, each with two numbers"),
        (figure("bitmap", bitmap={"data": ""}), "has no list of points, each with two numbers"),
        (polygon(SQUARE[:2]), "is a polygon of 2 points: it needs three or more"),
        (polygon([[1, 1], [float("nan"), 2], [3, 3]]), "has no list of points, each with two numbers"),
        (polygon([[1, 1], [10**400, 2], [3, 3]]), "has no list of points"),
        (polygon([[1, 1], ["2", 2], [3, 3]]), "has no list of points"),
        (polygon(SQUARE, [[[1, 1, 1]]]), "has no list of points"),
        (polygon(SQUARE, [[]]), "has no list of points"),
        (polygon([]), "has no list of points"),
        (figure("polygon", points=None), "has no list of points"),
        (polygon([[1, 1], [99, 2], [3, 3]]), "has the coordinate 99, far outside of the image"),
        (polygon(SQUARE, [[[1, 1], [2, 99], [3, 3]]]), "has the coordinate 99, far outside of the image"),
        (figure("rectangle", points={"exterior": SQUARE}), "is a rectangle of 4 points: it needs two corners"),
        (figure("multipolygon", parts=[]), "is a multipolygon without parts"),
    ],
)
def test_unusable_objects(tmp_path: Path, entry: Any, words: str) -> None:
    project(tmp_path, [entry])
    with pytest.raises(DatasetError) as caught:
        load_supervisely(tmp_path, "all")
    assert "a.png.json: object 0" in str(caught.value) and words in str(caught.value)
    with pytest.raises(DatasetError, match="has no image that could be used"):
        load_supervisely(tmp_path, "all", skip_bad=True)


def test_a_polygon_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_faim2f.masks.LONGEST_POLYGON", 30)
    data = load_supervisely(project(tmp_path, [polygon([[0, 0], [11, 9]] * 3)]), "all")
    with pytest.raises(DatasetError, match=r"a.png.json: object 0 \(cat\): a polygon .* more than 30: simplify it"):
        data[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": None}, "a.png.json has no size and list of objects: it is not an annotation of Supervisely's"),
        ({"objects": None}, "has no size and list of objects"),
        ({"size": {"height": -3, "width": 4}}, "has the height and width -3 and 4"),
        ({"size": {"height": 200_000, "width": 200_000}}, "has the size 200000x200000, more than"),
    ],
)
def test_unusable_annotations(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    project(tmp_path)
    content = {"size": {"height": HEIGHT, "width": WIDTH}, "objects": [polygon(SQUARE)], **changes}
    (tmp_path / "ds" / "ann" / "a.png.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError) as caught:
        load_supervisely(tmp_path, "all")
    assert words in str(caught.value)


def test_an_image_of_another_size(tmp_path: Path) -> None:
    project(tmp_path, [polygon(SQUARE)], size={"height": HEIGHT + 1, "width": WIDTH})
    with pytest.raises(DatasetError, match=r"a.png is 10x12 pixels, but .*a.png.json says 11x12"):
        load_supervisely(tmp_path, "all")[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "There is no file .*meta.json"),
        ("[]", "meta.json is not Supervisely's: it must be an object"),
        ("{", "meta.json is not JSON"),
        ('{"classes": {}}', "meta.json has no list of classes"),
        ('{"classes": ["cat"]}', "meta.json has a class without a title: cat"),
        ('{"classes": [{"title": " "}]}', "meta.json has a class without a title"),
        ('{"classes": [{"title": "a"}, {"title": "a"}]}', "meta.json has the class 'a' twice"),
        ('{"classes": [{"title": "a", "shape": "point"}]}', "meta.json has no class of objects with an area"),
        ('{"classes": [], "projectType": "videos"}', "meta.json is of a project of videos, not of images"),
    ],
)
def test_an_unusable_meta_json(tmp_path: Path, text: str | None, words: str) -> None:
    project(tmp_path, [polygon(SQUARE)])
    (tmp_path / "meta.json").unlink()
    if text is not None:
        (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DatasetError, match=words):
        load_supervisely(tmp_path, "all")


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, [polygon(SQUARE)])
    monkeypatch.setattr("hf_faim2f.data.readers.supervisely_document.MOST_JSON", 10)
    with pytest.raises(DatasetError, match="meta.json has more than 10 bytes: it is not read"):
        load_supervisely(tmp_path, "all")


def test_folders_that_are_no_project(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has no dataset: there are no folders DATASET/img and DATASET/ann"):
        load_supervisely(meta(tmp_path), "all")
    (tmp_path / "ds" / "img").mkdir(parents=True)
    with pytest.raises(DatasetError, match="has no image that could be used"):
        load_supervisely(tmp_path, "all")
    (tmp_path / "ds" / "datasets").symlink_to(tmp_path)  # a circle
    with pytest.raises(DatasetError, match="has no image that could be used"):
        load_supervisely(tmp_path, "all")


def test_a_dataset_instead_of_its_project(tmp_path: Path) -> None:
    dataset = next(project(tmp_path / "a", [polygon(SQUARE)]).glob("*/img")).parent
    with pytest.raises(DatasetError, match=f"{dataset} is one dataset .* folder of the project, {tmp_path / 'a'}"):
        load_supervisely(dataset, "all")
    with pytest.raises(DatasetError, match=f"it is one dataset of a project.* {tmp_path / 'a'} "):
        recognize(DataSource(str(dataset)))


def test_recognition(tmp_path: Path) -> None:
    found = recognize(DataSource(str(project(tmp_path / "a", [polygon(SQUARE)]))))
    assert found == ("supervisely", "meta.json with classes, and datasets of img and ann")
    # The kind of a project, "images", is not the key of COCO's JSON.
    assert '"projectType": "images"' in (tmp_path / "a" / "meta.json").read_text()
    (tmp_path / "a" / "result.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DatasetError, match=r"result.json .*\(coco\), and meta.json .* \(supervisely\): choose one"):
        recognize(DataSource(str(tmp_path / "a")))
    with pytest.raises(DatasetError, match="has none of the known formats"):
        recognize(DataSource(str(meta(tmp_path / "b"))))
