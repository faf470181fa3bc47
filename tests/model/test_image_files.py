"""Image files from cameras and instruments: formats, color modes, and samples of more than 8 bits."""

import ast
import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.detectron2_config import read_settings
from hf_faim2f.conversion.focoos import read_info
from hf_faim2f.conversion.weights import read_state_dict
from PIL import Image, PngImagePlugin, features

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.data import files, load_folder, load_hub
from hf_faim2f.data.readers.folder import read_labels
from hf_faim2f.distributed.rows import find_rows
from hf_faim2f.errors import BulkError, ConversionError, DatasetError, WebError
from hf_faim2f.evaluation.cityscapes import CityscapesMetric
from hf_faim2f.export.calibration import choose_images
from hf_faim2f.files import files_below
from hf_faim2f.model.image_loading_faim2f import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    decode_image,
    eight_bit_image,
    load_images,
    load_segmentation_maps,
)
from hf_faim2f.runtime import Predictor
from hf_faim2f.serving.requests import Limits, open_picture
from tests.support.lively_model import photographs, save_model

RAW = {"do_resize": False, "do_normalize": False, "rescale_factor": 1.0}
# 12-bit values over the whole range, not all of them multiples of 16.
TWELVE = np.arange(0, 4096, 41, dtype=np.uint16)[:96].reshape(8, 12)
SIXTEEN = (TWELVE.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
DARK = "has 16 bits but no value above 3895, and does not say how many bits are used"


def read(source: Any) -> np.ndarray:
    """The processor's gray levels of a file, 0..255; asserts that training data reads the same levels, rounded."""
    pixels = FaiM2FImageProcessor(**RAW)(source, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    if isinstance(source, Path):
        item = files.read_image(files.file_source(source))
        assert torch.equal(item, pixels.round().to(torch.uint8))
        looked_at = eight_bit_image(source)
        assert torch.equal(looked_at, pixels[0]) or np.array_equal(np.asarray(looked_at), pixels[0].numpy())
    return pixels[0].numpy()


def save_png(path: Path, values: np.ndarray, bits: int | None = None) -> Path:
    """A 16-bit PNG with an sBIT chunk, written by the standard instead of Pillow."""
    height, width, channels = (*values.shape, 1)[:3]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    said = _chunk(b"sBIT", bytes([bits] * channels)) if bits else b""
    return _write_png(path, [row.astype(">u2").tobytes() for row in values], width, height, 16, color, said)


def _write_png(
    path: Path, rows: list[bytes], width: int, height: int, bits: int, color: int = 0, said: bytes = b""
) -> Path:
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)) + said
        + _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + _chunk(b"IEND", b"")
    )  # fmt: skip
    return path


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def save_tiff(path: Path, values: np.ndarray, tags: dict[int, Any] | None = None) -> Path:
    Image.fromarray(values).save(path, tiffinfo=tags or {})
    return path


def save_packed_tiff(path: Path, values: np.ndarray) -> Path:
    """A TIFF of 12 bits per sample, with two samples in three bytes."""
    height, width = values.shape
    pairs = values.reshape(height, width // 2, 2).astype(np.uint32)
    whole = pairs[..., 0] << 12 | pairs[..., 1]
    data = np.stack([whole >> shift & 255 for shift in (16, 8, 0)], axis=-1).astype(np.uint8).tobytes()
    return _write_tiff(path, data, width, height, bits=12)


def save_inverted_tiff(path: Path, values: np.ndarray) -> Path:
    """A 16-bit TIFF in which 0 is white."""
    return _write_tiff(path, values.astype("<u2").tobytes(), *values.shape[::-1], bits=16, photometric=0)


def _write_tiff(path: Path, data: bytes, width: int, height: int, bits: int, photometric: int = 1) -> Path:
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
               (277, 3, 1), (278, 4, height), (279, 4, len(data))]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)
    return path


# ------------------------------------------------------------------------------------------------- more than 8 bits


def test_the_file_says_how_many_bits_are_used(tmp_path: Path) -> None:
    expected = TWELVE.astype(np.float64) * 255 / 4095
    for path in (
        save_png(tmp_path / "sbit.png", TWELVE, 12),
        save_tiff(tmp_path / "max.tif", TWELVE, {281: 4095}),
        save_tiff(tmp_path / "largest.tif", TWELVE, {281: int(TWELVE.max())}),  # its statistics need 12 bits
        save_tiff(tmp_path / "smax.tif", TWELVE, {341: 4095}),
        save_packed_tiff(tmp_path / "packed.tif", TWELVE),
    ):
        np.testing.assert_allclose(read(path), expected, rtol=1e-6, err_msg=path.name)
    (tmp_path / "a.pgm").write_bytes(b"P5 12 8 4095\n" + TWELVE.astype(">u2").tobytes())
    np.testing.assert_allclose(read(tmp_path / "a.pgm"), expected, atol=1 / 257)  # Pillow rounds to 16 bits
    # Scaled to 16 bits, as PNG recommends: by zeros, or by repeating the upper bits.
    for name, values in (("zeros", TWELVE << 4), ("upper", TWELVE << 4 | TWELVE >> 8)):
        path = save_png(tmp_path / f"{name}.png", values.astype(np.uint16), 12)
        np.testing.assert_allclose(read(path), values / 257, rtol=1e-6)
    # Such a file may be dark, and so may one that uses all 16 bits.
    dark = (TWELVE >> 6 << 4).astype(np.uint16)
    assert dark.max() < 4096
    np.testing.assert_allclose(read(save_png(tmp_path / "dark.png", dark, 12)), dark / 257, rtol=1e-6)
    for path in (save_png(tmp_path / "all.png", TWELVE, 16), save_tiff(tmp_path / "all.tif", TWELVE, {281: 65535})):
        np.testing.assert_allclose(read(path), TWELVE / 257, rtol=1e-6)


def test_a_tiff_whose_white_is_0(tmp_path: Path) -> None:
    inverted = 65535 - SIXTEEN
    np.testing.assert_allclose(read(save_inverted_tiff(tmp_path / "a.tif", inverted)), SIXTEEN / 257, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_of_a_few_bits_are_those_of_the_file(tmp_path: Path, bits: int) -> None:
    """Pillow scales gray samples of 2 and 4 bits to 0..255, as is right for a picture, but not for ids."""
    ids = np.arange(24).reshape(3, 8) % 2**bits
    samples = (ids[..., None] >> np.arange(bits)[::-1]) & 1
    rows = [row.tobytes() for row in np.packbits(samples.astype(np.uint8).reshape(3, -1), axis=1)]
    for path in (
        _write_png(tmp_path / "map.png", rows, 8, 3, bits),
        _write_tiff(tmp_path / "map.tif", b"".join(rows), 8, 3, bits),
    ):
        opened = Image.open(path)
        for source in (path, opened, opened):  # decoding it discards its header
            assert load_segmentation_maps([source], [(3, 8)])[0].tolist() == ids.tolist(), path.name
        pixels = FaiM2FImageProcessor(**RAW)(path, return_tensors="pt")["pixel_values"]
        np.testing.assert_array_equal(pixels[0, 0].numpy(), ids * (255 // (2**bits - 1)))


def test_a_file_that_is_opened_by_the_caller_says_the_same(tmp_path: Path) -> None:
    path = save_png(tmp_path / "sbit.png", TWELVE, 12)
    with Image.open(path) as image:
        for _ in range(2):
            np.testing.assert_allclose(read(image), TWELVE * (255 / 4095), rtol=1e-6)
    np.testing.assert_allclose(read(io.BytesIO(path.read_bytes())), TWELVE * (255 / 4095), rtol=1e-6)


def test_sixteen_bits_that_may_be_twelve_are_refused(tmp_path: Path) -> None:
    sources = [save_png(tmp_path / "a.png", TWELVE), save_tiff(tmp_path / "a.tif", TWELVE), Image.fromarray(TWELVE),
               TWELVE, torch.from_numpy(TWELVE), Image.fromarray(TWELVE.astype(np.int32))]  # fmt: skip
    for source in sources:
        with pytest.raises(ValueError, match=DARK) as caught:
            FaiM2FImageProcessor(**RAW)([SIXTEEN, source])
        assert str(caught.value).startswith("image 1") and "multiply by 255 / 4095" in str(caught.value)
    with pytest.raises(DatasetError, match=f"a.png {DARK}"):
        files.read_image(files.file_source(tmp_path / "a.png"))
    # Values over the whole range, or entirely black images, are accepted.
    for source in (save_png(tmp_path / "b.png", SIXTEEN), Image.fromarray(SIXTEEN), SIXTEEN):
        np.testing.assert_allclose(read(source), SIXTEEN / 257, rtol=1e-6)
    assert not read(np.zeros((4, 5), dtype=np.uint16)).any()
    # Ids in a map are not brightness.
    masks = FaiM2FImageProcessor(do_resize=False)(SIXTEEN, [tmp_path / "a.png"])["class_labels"][0]
    assert masks.tolist() == TWELVE.flatten().tolist()


def test_colors_of_sixteen_bits_of_which_pillow_keeps_eight(tmp_path: Path) -> None:
    """Of 12 bits in 16, Pillow keeps 4, and no scaling restores the rest."""
    colors, alpha = np.stack([TWELVE, TWELVE // 2, TWELVE // 3], -1), np.full((8, 12, 1), 65535, dtype=np.uint16)
    with_alpha = np.concatenate([colors, alpha], -1)
    gray_alpha = np.concatenate([TWELVE[..., None], alpha], -1)
    for name, values, bits, end in (("none", colors, None, 4095), ("alpha", with_alpha, None, 4095),
                                    ("gray", gray_alpha, None, 4095), ("sbit", colors, 12, 4095),
                                    ("ten", colors // 4, 10, 1023)):  # fmt: skip
        path = save_png(tmp_path / f"{name}.png", values.astype(np.uint16), bits)
        with pytest.raises(ValueError, match=rf"{name}.png\) has 16 bits a channel.*no value above {end}"):
            next(load_images([path]))
    whole = np.stack([SIXTEEN, SIXTEEN // 2, SIXTEEN // 3], -1)
    with pytest.raises(DatasetError, match="16 bits a channel, of which Pillow reads the upper 8: save it with 8"):
        files.read_colors(files.file_source(save_png(tmp_path / "ids.png", whole)), 8, 12)  # ids, not brightness
    for bits in (None, 12, 16):
        got = next(load_images([save_png(tmp_path / "whole.png", whole, bits)]))
        assert np.array_equal(got.permute(1, 2, 0).numpy(), whole >> 8)
    assert next(load_images([save_png(tmp_path / "dark.png", colors, 16)])).max() == TWELVE.max() >> 8


def test_float_files(tmp_path: Path) -> None:
    level = (np.arange(96).reshape(8, 12) * 2.5).astype(np.float32)
    np.testing.assert_allclose(read(save_tiff(tmp_path / "255.tif", level)), level, rtol=1e-6)
    unit = level / 255
    np.testing.assert_allclose(read(save_tiff(tmp_path / "1.tif", unit)), level, rtol=1e-6)
    np.testing.assert_allclose(read(save_tiff(tmp_path / "s.tif", level * 40, {341: 10200.0})), level, rtol=1e-5)
    np.testing.assert_allclose(read(Image.fromarray(unit)), level, rtol=1e-6)
    # Without rescaling, values are in the caller's range.
    raw = FaiM2FImageProcessor(do_resize=False, do_normalize=False, do_rescale=False)
    np.testing.assert_array_equal(raw(tmp_path / "1.tif", return_tensors="np")["pixel_values"][0, 0], unit)
    for values in (unit * 4, level * 2, level - 90):
        with pytest.raises(ValueError, match="is a float image with values from .*, so that it is neither in 0..1 nor"):
            read(save_tiff(tmp_path / "x.tif", values))
    with pytest.raises(ValueError, match="where its file states 100 as the largest"):
        read(save_tiff(tmp_path / "x.tif", level, {341: 100.0}))
    with pytest.raises(ValueError, match="values up to 3895, but its file says that they end at 1023"):
        read(save_tiff(tmp_path / "x.tif", TWELVE, {281: 1000}))


def test_a_predictor_sees_what_the_file_says(tmp_path: Path) -> None:
    predictor = Predictor.from_pretrained(save_model(tmp_path / "model"))
    gray = np.asarray(photographs()[3]).astype(np.uint16)
    twelve = (gray * 4095 // 255).astype(np.uint16)
    eight = Image.fromarray((twelve * (255 / 4095)).round().astype(np.uint8))
    expected = predictor(eight)[0]
    for path in (save_png(tmp_path / "a.png", twelve, 12),
                 save_tiff(tmp_path / "a.tif", (twelve / 4095).astype(np.float32))):  # fmt: skip
        assert np.array_equal(np.asarray(predictor(path)[0].image), np.asarray(expected.image))
        assert [one.class_id for one in predictor(path)[0].segments] == [one.class_id for one in expected.segments]


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint32"])
def test_integers_say_nothing_of_their_range(dtype: str) -> None:
    array = TWELVE.astype(dtype)
    sources: list[Any] = [array] if dtype == "uint32" else [array, torch.from_numpy(array)]
    for source in sources:
        message = rf"image 0 has dtype .*{dtype} and values from 0 to 3895.*0\.\.65535 for uint16"
        with pytest.raises(ValueError, match=message):
            read(source)
        np.testing.assert_array_equal(read(source // 16), TWELVE // 16)
    if dtype != "uint32":
        with pytest.raises(ValueError, match="values from -5 to"):
            read(array // 16 - 5)
    # The remedy in the message: floats are read unchanged.
    np.testing.assert_allclose(read(array * (255 / 4095)), TWELVE * (255 / 4095), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- formats

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
REFUSED = {
    "EPS": POSTSCRIPT,
    "PDF": b"%PDF-1.7\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(12),
    "FITS": b"SIMPLE  =                    T",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever images are opened, whatever the file's name; no external program is started."""
    monkeypatch.setattr("subprocess.Popen", None)
    path = tmp_path / "photo_labelIds.png"
    path.write_bytes(REFUSED[name])
    said = f"cannot be opened as an image: it has the format {name}, and only JPEG, PNG, .* files are read."
    for source in (path, str(path), io.BytesIO(REFUSED[name])):
        with pytest.raises(ValueError, match=said) as caught:
            FaiM2FImageProcessor()([photographs()[0], source])
        assert str(caught.value).startswith("image 1") and "\n" not in str(caught.value)
    for read_file in (files.read_image, files.read_header, files.has_colors):
        for row in (files.file_source(path), {"bytes": REFUSED[name], "path": "row"}):
            with pytest.raises(DatasetError, match=said):
                read_file(row)
    with pytest.raises(DatasetError, match=said):
        files.read_map(files.file_source(path), 4, 4)
    with pytest.raises(WebError, match="cannot be read as an image: JPEG, PNG"):
        open_picture(path, "photo.png", Limits())
    (tmp_path / "photo_instanceIds.png").write_bytes(REFUSED[name])
    with pytest.raises(ValueError, match=f"it has the format {name}"):
        CityscapesMetric().add(prediction=np.zeros((2, 2), int), reference=str(path), image_id="a")
    Image.new("I;16", (2, 2)).save(tmp_path / "photo_instanceIds.png")
    with pytest.raises(ValueError, match=f"it has the format {name}"):
        CityscapesMetric().add(prediction=np.zeros((2, 2), int), reference=str(path), image_id="a")


def test_no_code_of_ours_opens_every_format() -> None:
    """Every `Image.open` passes the allowed formats."""
    root = Path(__file__).parents[2]
    calls = {}
    for folder in ("hf_faim2f", "conversion", "examples", "benchmarks"):
        for path in (root / folder).rglob("*.py"):
            if path.parent == root / "examples" / "digits":  # ignored by git: copies of hf_faim2f/model
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                    calls[f"{path.name}:{node.lineno}"] = {keyword.arg for keyword in node.keywords}
    assert len(calls) >= 3
    assert [place for place, keywords in calls.items() if "formats" not in keywords] == []


FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm",),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
}


def test_what_is_read_is_found_in_folders(tmp_path: Path) -> None:
    """All searches of folders: predict, benchmark and Ray, calibration, and the readers of datasets."""
    assert {name for name in FORMATS if name not in ("AVIF", "JPEG2000", "WEBP")} <= set(IMAGE_FORMATS)
    assert ("JPEG2000" in IMAGE_FORMATS) == features.check("jpg_2000")
    names = []
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in IMAGE_FORMATS:
        for suffix in FORMATS[name]:
            assert suffix in IMAGE_SUFFIXES
            names.append(f"{suffix[1:]}{suffix.upper() if suffix == '.jfif' else suffix}")
            photographs()[0].save(tmp_path / "images" / names[-1], name)
            Image.new("L", photographs()[0].size).save(tmp_path / "masks" / f"{suffix[1:]}.png")
    for name in ("a.eps", "a.pdf", "a.txt"):
        (tmp_path / "images" / name).write_bytes(POSTSCRIPT)
    assert sorted(path.name for path in files_below(tmp_path / "images", IMAGE_SUFFIXES)) == sorted(names)
    data = load_folder(tmp_path, ["ground"])
    assert sorted(data.with_format(None)["file_name"]) == sorted(names)
    assert all(item["image"].shape == (3, 111, 183) for item in data)
    graph_input = type("Shape", (), {"dim": [type("Side", (), {"dim_value": 0})] * 4})
    tensor = type("Tensor", (), {"shape": graph_input})
    given = type("Input", (), {"name": "pixel_values", "type": type("Type", (), {"tensor_type": tensor})})
    chosen = choose_images(tmp_path / "images", FaiM2FImageProcessor(size={"height": 32, "width": 32}), given, 99, 2)
    assert sorted(path.name for path in (*chosen.paths, *chosen.held_out_paths)) == sorted(names)
    assert chosen.skipped == []


def test_a_phone_s_pictures_of_several_frames_are_jpeg(tmp_path: Path) -> None:
    photo, small = photographs()[0], photographs()[0].resize((40, 30))
    photo.save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[small])
    assert next(load_images([tmp_path / "photo.jpg"])).shape == (3, 111, 183)


def tiled_tiff(path: Path, side: int, big: bool, wide: bool, more: tuple[int, ...]) -> Path:
    """A gray TIFF file of 20x20 pixels in one white tile, by the standard.

    Args:
        side: of the tile, in pixels.
        big: whether it is a BigTIFF file.
        wide: whether the tile's width has a type of 8 bytes that Pillow does not know, SLONG8.
        more: tags whose entries are repeated with the value 16, behind them.
    """
    tile, entry = zlib.compress(b"\xff" * side**2), struct.Struct("<HHQQ" if big else "<HHII")
    start = 32 + entry.size * (10 + len(more))
    entries = {256: 20, 257: 20, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: start, 325: len(tile)}
    if wide and not big:
        entries[322] = start + len(tile)
    directory = struct.pack("<Q" if big else "<H", 10 + len(more))
    for tag, value in entries.items():
        directory += entry.pack(tag, 17 if wide and tag == 322 else 4, 1, value)
        directory += entry.pack(tag, 4, 1, 16) if tag in more else b""
    header = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) if big else struct.pack("<2sHI", b"II", 42, 8)
    path.write_bytes((header + directory).ljust(start, b"\0") + tile + struct.pack("<Q", side))
    return path


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(("wide", "more"), [(False, ()), (True, ()), (False, (322, 323))])
def test_a_tile_much_larger_than_its_image_is_refused(
    big: bool, wide: bool, more: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libtiff allocates the whole tile, also if Pillow skips its entry or reads another one."""
    path = tiled_tiff(tmp_path / "x.tif", 256, big, wide, more)
    image = decode_image(path).image
    assert image.size == (20, 20) and np.asarray(image).min() == 255
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 256**2 - 1)
    with pytest.raises(ValueError, match=r"x\.tif\) has a tile of 65536 pixels, more than the 65535 .* bomb"):
        decode_image(path)
    with pytest.raises(WebError, match=r"has tiles of 0\.1 million pixels, and this page takes 0\.06 million"):
        open_picture(path, "x.tif", Limits(megapixels=0.06))


# ----------------------------------------------------------------------------------------------- what is not a file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="There are no pipes.")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe that nobody writes to would block forever."""
    os.mkfifo(tmp_path / "pipe.png")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    server.bind("socket.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    try:
        for path in (
            tmp_path / "pipe.png",
            tmp_path / "link.png",
            tmp_path / "socket.png",
            Path("/dev/zero"),
            tmp_path,
        ):
            said = rf"{path}\)? is not a file" if path != tmp_path else r"is not a file\.$"
            for source in (path, str(path)):
                with pytest.raises(ValueError, match=said):
                    FaiM2FImageProcessor()(source)
                with pytest.raises(ValueError, match=said):
                    decode_image(source)
            with pytest.raises(ValueError, match=r"segmentation map 0 .* is not a file"):
                FaiM2FImageProcessor()(photographs()[0], [path])
            with pytest.raises(ValueError, match="is not a file"):
                CityscapesMetric().add(prediction=str(path), reference=np.zeros((2, 2), int), image_id="a")
    finally:
        server.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="There are no pipes.")
def test_pipes_among_other_files_are_refused_at_once(tmp_path: Path) -> None:
    """In datasets, in rows of images, and as checkpoints."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read_file in (files.read_json, read_labels, lambda path: load_hub(path, labels=["a"]),
                      lambda path: files.read_image(files.file_source(path))):  # fmt: skip
        with pytest.raises(DatasetError, match=f"{pipe} is not a file"):
            read_file(pipe)
    (tmp_path / "pipe.parquet").symlink_to(pipe)
    with pytest.raises(BulkError, match="pipe.parquet is not a file"):
        find_rows([str(tmp_path / "pipe.parquet")])
    for name, convert in (("pipe", read_state_dict), ("pipe.json", lambda path: read_info(str(path))),
                          ("pipe.yaml", read_settings)):  # fmt: skip
        path = tmp_path / name
        if not path.exists():
            path.symlink_to(pipe)
        with pytest.raises(ConversionError, match=f"{path} is not a file"):
            convert(path)


def test_links_to_files_are_files(tmp_path: Path) -> None:
    photographs()[0].save(tmp_path / "a.png", pnginfo=PngImagePlugin.PngInfo())
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    assert torch.equal(next(load_images([tmp_path / "link.png"])), next(load_images([tmp_path / "a.png"])))
