"""Reading single files: pixel values, errors that name the file, and rejection of forbidden files."""

import io
import os
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f.data import files
from hf_faim2f.errors import DatasetError
from tests.support.image_files import photo, save, truncate


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60000x60000 pixels."""
    small = io.BytesIO()
    Image.new("L", (1, 1)).save(small, "PNG")
    data = bytearray(small.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def source(path: Path) -> dict[str, object]:
    return files.file_source(path)


def test_image_is_rgb_uint8(tmp_path: Path) -> None:
    array = photo(11, 7)
    image = files.read_image(source(save(tmp_path / "a.png", array)))
    assert image.dtype == torch.uint8 and image.shape == (3, 11, 7)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), array)
    assert torch.equal(files.read_image({"bytes": (tmp_path / "a.png").read_bytes(), "path": "x"}), image)


def test_further_pages_of_a_tiff_file_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not smaller ones, which belong to the first, and not the frames of other formats."""
    said: list[str] = []
    monkeypatch.setattr("hf_faim2f.model.image_bands_faim2f.logger.warning_once", said.append)
    pages = [Image.fromarray(photo(5, 6, seed)) for seed in range(3)]
    thumbnail = pages[1].resize((3, 2))
    for name, more in (("one.tif", []), ("small.tif", [thumbnail]), ("frames.gif", pages[1:]), ("one.png", [])):
        pages[0].save(tmp_path / name, save_all=True, append_images=more)
        assert files.read_image(source(tmp_path / name)).shape == (3, 5, 6)
    assert not said
    for name, big in (("two.tif", False), ("big.tif", True)):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], big_tiff=big)
        np.testing.assert_array_equal(files.read_image(source(tmp_path / name)).permute(1, 2, 0), photo(5, 6))
    assert len(said) == 2 and set(said) == {
        f"{tmp_path} has TIFF files of several pages, of which only the first is read: save each page as a file of its "
        "own."
    }
    content = (tmp_path / "two.tif").read_bytes()
    files.read_image({"bytes": content, "path": None})
    assert said[2].startswith("an image without file name has TIFF files")


def test_gray_alpha_and_sixteen_bits(tmp_path: Path) -> None:
    gray = photo(5, 6)[..., 0]
    image = files.read_image(source(save(tmp_path / "gray.png", gray)))
    np.testing.assert_array_equal(image.numpy(), np.stack([gray] * 3))
    deep = gray.astype(np.uint16) * 257
    assert torch.equal(files.read_image(source(save(tmp_path / "deep.png", deep))), image)
    between = np.array([[128, 129, 400, 65535]], dtype=np.uint16)  # over 257: 0.498, 0.502, 1.556, 255
    assert files.read_image(source(save(tmp_path / "between.png", between)))[0].tolist() == [[0, 1, 2, 255]]
    rgba = np.dstack([photo(5, 6), gray])
    image = files.read_image(source(save(tmp_path / "rgba.png", rgba)))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), rgba[..., :3])


def test_image_and_map_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    array = photo(4, 9)
    image = files.read_image(source(save(tmp_path / "a.png", array, exif=exif)))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.rot90(array, -1))
    upright = np.arange(36, dtype=np.uint8).reshape(9, 4)
    ids = files.read_map(source(save(tmp_path / "m.png", upright)), 9, 4)
    np.testing.assert_array_equal(ids.numpy(), upright)


@pytest.mark.parametrize("kind", ["L", "P", "1", "16 bits"])
def test_maps_keep_their_integers(tmp_path: Path, kind: str) -> None:
    ids: np.ndarray = np.arange(24, dtype=np.uint8).reshape(4, 6)
    if kind == "16 bits":
        ids = ids.astype(np.uint16) * 2000
    elif kind == "1":
        ids = ids % 2 == 1
    path = save(tmp_path / "m.png", ids, "P" if kind == "P" else None)
    np.testing.assert_array_equal(files.read_map(source(path), 4, 6).numpy(), ids)


def test_colors(tmp_path: Path) -> None:
    array = photo(4, 6)
    colors = files.read_colors(source(save(tmp_path / "m.png", array)), 4, 6)
    np.testing.assert_array_equal(colors.permute(1, 2, 0).numpy(), array)
    assert files.has_colors(source(tmp_path / "m.png"))
    assert not files.has_colors(source(save(tmp_path / "gray.png", array[..., 0])))


READERS = {
    "image": lambda s: files.read_image(s),
    "map": lambda s: files.read_map(s, 30, 40),
    "colors": lambda s: files.read_colors(s, 30, 40),
}


@pytest.mark.parametrize(
    ("reader", "suffix"), [("image", "jpg"), *((reader, suffix) for reader in READERS for suffix in ("png", "tif"))]
)
def test_truncated_file_is_named(tmp_path: Path, reader: str, suffix: str) -> None:
    array = photo(30, 40)
    path = save(tmp_path / f"a.{suffix}", array[..., 0] if reader == "map" else array)
    READERS[reader](source(path))
    truncate(path)
    with pytest.raises(DatasetError, match=f"^{path}"):
        READERS[reader](source(path))


@pytest.mark.parametrize("reader", READERS)
def test_no_image_missing_file_bomb_and_pipe_are_named(tmp_path: Path, reader: str) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "bomb.png").write_bytes(bomb())
    os.mkfifo(tmp_path / "pipe.png")
    began = time.perf_counter()
    for name in ("text.png", "empty.png", "bomb.png", "pipe.png", "missing.png", ""):
        with pytest.raises(DatasetError, match=str(tmp_path / name)):
            READERS[reader](source(tmp_path / name))
    assert time.perf_counter() - began < 2
    with pytest.raises(DatasetError, match="neither a file name nor contents"):
        READERS[reader]({"bytes": None, "path": None})


def test_bomb_is_refused_for_its_size(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="x.png.*(bomb|pixels)"):
        files.read_image({"bytes": bomb(), "path": "x.png"})


def test_map_of_wrong_size_or_mode_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", photo(5, 6)[..., 0])
    with pytest.raises(DatasetError, match=r"m\.png has shape \(5, 6\) but its image is 6x5"):
        files.read_map(source(path), 6, 5)
    with pytest.raises(DatasetError, match="m.png has one channel"):
        files.read_colors(source(path), 5, 6)
    path = save(tmp_path / "c.png", photo(5, 6))
    with pytest.raises(DatasetError, match=r"c\.png has mode 'RGB'"):
        files.read_map(source(path), 5, 6)
    with pytest.raises(DatasetError, match="c.png is 5x6 pixels, but its image 6x5"):
        files.read_colors(source(path), 6, 5)


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "x/../../a.png",
        "/etc/passwd",
        "..\\a.png",
        "C:\\a.png",
        "C:a.png",
        "\\a.png",
        "\\\\host\\a.png",
        "",
        3,
        "a\0b",
        "data:image/png;base64," + "A" * 300,
    ],
)
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(DatasetError, match="list.json names"):
        files.path_inside(tmp_path, name, "list.json")


@pytest.mark.parametrize("name", ["a.png", "train2017/a.png", "a..b.png", "./a.png"])
def test_names_inside_are_taken(tmp_path: Path, name: str) -> None:
    assert files.path_inside(tmp_path, name, "list.json") == tmp_path / name


def test_backslashes_are_slashes_unless_a_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").touch()
    assert files.path_inside(tmp_path, "a\\b.png", "list.json") == tmp_path / "a" / "b.png"
    for name in ("a\\..\\b.png", "\\a\\b.png", "C:\\a\\b.png"):
        with pytest.raises(DatasetError, match="lies outside of .* and is not read: write names relative to that"):
            files.path_inside(tmp_path, name, "list.json")
    if os.name == "posix":
        (tmp_path / "a\\b.png").touch()
        assert files.path_inside(tmp_path, "a\\b.png", "list.json") == tmp_path / "a\\b.png"


def test_json_is_named(tmp_path: Path) -> None:
    for content in (b"{", b"\xff\xfe\x00", b"[" * 200_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DatasetError, match=r"a\.json is not JSON"):
            files.read_json(tmp_path / "a.json")
    with pytest.raises(DatasetError, match=r"b\.json cannot be read"):
        files.read_json(tmp_path / "b.json")


def test_arrays_of_fractions_are_refused_as_in_predictions(tmp_path: Path) -> None:
    """They would be nearly black in training, where only a warning about "image 0" said so."""
    path, array = tmp_path / "a.npy", photo(5, 6).astype(np.float32)
    for channels, values in ((3, array / 255), (3, (array / 255).astype(">f8")), (4, array[..., [0, 1, 2, 0]] / 255)):
        np.save(path, values)
        with pytest.raises(DatasetError, match=rf"^{path} is an array of floats in 0..1, .*: multiply it by 255"):
            files.read_image(source(path), channels)
    # Dark images in 0..255 have larger or whole values.
    for values in (array + 0.25, array.round() % 2, np.zeros((5, 6, 3), dtype=np.float32)):
        np.save(path, values)
        found = files.read_image(source(path)).permute(1, 2, 0).to(torch.float32)
        assert torch.equal(found, torch.from_numpy(values))
    Image.fromarray(array[..., 0] / 255).save(tmp_path / "a.tif")  # scaled when it is read
    assert torch.equal(files.read_image(source(tmp_path / "a.tif"))[0], torch.from_numpy(array[..., 0]).to(torch.uint8))


def test_maps_whose_values_were_changed_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 20\n\0\1\2\x14")
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 20\n\0\1\2")
    ids = np.array([[0, 1], [2, 20]], dtype=np.uint8)
    save(tmp_path / "a.tif", ids, tiffinfo={262: 0})
    save(tmp_path / "a.jpg", ids)
    for name, message in (("a.pgm", "the largest value 20"), ("a.tif", "0 is white"), ("a.jpg", "compressed as JPEG")):
        with pytest.raises(DatasetError, match=rf"{name} .*{message}.*: save maps as PNG"):
            files.read_map(source(tmp_path / name), 2, 2)
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(DatasetError, match=r"a\.npy is a NumPy array: save maps as PNG"):
        files.read_map(source(tmp_path / "a.npy"), 2, 2)
    with pytest.raises(DatasetError, match=r"a\.ppm .*the largest value 20.*: save maps as PNG"):
        files.read_colors(source(tmp_path / "a.ppm"), 1, 1)


def test_listing_a_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "._a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in files.list_images(tmp_path)] == ["a.png", "b.JPG"]
    with pytest.raises(DatasetError, match="no folder"):
        files.list_images(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DatasetError, match="bare has no image"):
        files.list_images(tmp_path / "bare")
