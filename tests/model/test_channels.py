"""Images and models with other numbers of channels than three."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

from hf_faim2f import (
    FaiM2FConfig,
    FaiM2FForSemanticSegmentation,
    FaiM2FForUniversalSegmentation,
    FaiM2FImageProcessor,
)
from hf_faim2f.model.channels_faim2f import spread_channels, spread_values
from hf_faim2f.model.image_loading_faim2f import load_images
from tests.support.lively_model import photographs, save_model

SMALL = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
BACKBONES: dict[str, dict[str, Any]] = {
    "stdc": {"model_type": "faim2f_stdc", "embedding_size": 8, "depths": [1, 1, 1]},
    "resnet b": {"model_type": "faim2f_resnet", "variant": "b", **SMALL},
    "resnet d": {"model_type": "rt_detr_resnet", **SMALL},
    "swin": {
        "model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4,
    },
}  # fmt: skip
# Files of 9 x 7 pixels, written by tifffile from `values`: number of bands, data type, the file in base 85.
TIFFS: dict[str, tuple[int, str, str]] = {
    "lzw, 8 bits, pixels": (
        5,
        "u1",
        "Nl7XI2mk;84*&oG1ONd5000L7000321ONd5000R9000630{{g8006=O000940{{U4000F5000I70{{U400031000pI1ONj70"
        "07JY000#M0{{U4000F5000&N1ONd5000C4000*O0{{a6007tk000^R1pom6007<q000{S1pom6008Cy000~T0{{U40003100"
        "1Zf0{{U400031002D!0{{U400062002?}0{{d7008a)00000000O82mlBG2mlBG00961E&%`lT>$_9E&wk86954K00031000"
        "31000310000000000000000000000000fB*!fqk2#a2ZTalP`G3q7BDKFlknK2RuC2)m=LO{w00OFBO1~RSoD?=0RVst3MXX"
        "S01F3%LSaz2WE^f>K&hE<*rZkvLNlWlEoiiM7)?1P*NzzUmJSMlfPfYcswO+I3kQTkVIZhfHWL8=",
    ),
    "deflate, 16 bits, planes, big endian": (
        4,
        "u2",
        "O-%qQ0000801p8G00aO40096100#j900aO40096100{vC00RI300aO40Kx$S00RI3009690003700RI3009620003I00aO40"
        "1N;C0LlRs00RI3009650003N00aO40096100RLR00RI301N;C0QvzM00jU5009610TKZl00jU5009610U7}u00RI30096300"
        "03f00RI3009620003!00RI3009630003}00RI300RI30U`hZ0000G01yBW01yBG0Wbgn0Ym@*0ayS40c-#O0e}Di0h9m$0jK"
        "}~0lWYJ0nh*d0p$Py0r>y`0uBHa02BZe02BZe02BZe02BZf02BZf02KfL00961009610096100961000000000000000c${N"
        "kU_}Dl+{ipJF=QS96GH&^c$`yIWJLlxI><b8b7UR>D2M^Qc${-`VnqVJzR0|Y2xJ}rJ<S4xc$`yJWkmu82FN^XYh)e(D;xpU"
        "c${-{V?_difylg=7-Sv*Kw$!#c$`a5XGH=<MaaC`T4WvoRi*=Bc%1X{VnqU>p~$?11Y{lnLiGZ(c$~}5W<>&JWyrk7Mr0lUS"
        "ULlFc%19$VMPMdrz7(gEkfo20BwH+KX{zW&u2vfRaMBm)>dR509wuik$9Y&Fo6{b%$|+RTeb|D2LNyr1Xp;R+qjVx3GCT}%s"
        "YM@nFj!cSOpy",
    ),
    "tiles, LZW, 16 bits": (
        2,
        "u2",
        "Nl7XI2mk;85C8xH1ONd5000L7000321ONd5000R9000630{{X5000mG5C8)K0{{U4000F5000I70{{U400031000#M0{{U40"
        "0062000^R1pom6007Pa000{S1pom6007ni000~T0{{U400031001Zf0{{U400031002D!0{{U400062002S(1ONd5000mG00"
        "2V)1ONd5000mG002Y*1ONd5007_s002b+1ONd5005%^002?}0{{U400000000000003100031000310003100000fB*mjQ79"
        "G-2ZTalP<IoBdc1)|Vo^AxRwfGtj0O<6<aMsrSuA4GIV4Oh79Eb`vbakzmZwumW>PT-gp5X(PC%>{0&zDpphU%j!ih$8EL$y"
        "7DGCiV05=<#3zT_UtyG3W)2JjO5uDFdj;Isov(;*VO(vX<RtVx%C~!B~re%V`^!sduqLC(3CCdGOz+iA#JSG<nhs0uWSiEL7"
        "B>?~",
    ),
    "packbits, 8 bits": (
        7,
        "u1",
        "Nl7XI2mk;84gdfF1ONd5000L7000321ONd5000R9000630{{mA006cC000940{{U4000Gm000I70{{U400031000pI1ONd50"
        "07_s000#M0{{U4000L7000&N1ONd5000R9000*O1ONd5006=P000^R1pom6006`Q000{S1pom6007JY000~T0{{U40003100"
        "1Zf0{{U400031002?}0{{j9007hg00000000O82mlBG2mlBG2mlBG0RR910RR910RR910RR91000000000000000FaRY=Z<M"
        "*-1u9Q;nZDx+FI0J+!{`q*S$?C)?G!m)gQ(5&89rl(t<v`%Luie%*8wmKFjab=#OV+<T7RU;?iD&;gsIN+8b4%-uG9D*L}`w"
        "**a9R;Zj-p(2PsZ-n7!f*Fcv#tg{sf=8$e}>uhjV<MQV?<*#jj?Z<M*-2r5r>nZDx<FI0J+!{`z;S$?C)?H4d1Mr)9@+5{#`"
        "aFx2>2`f-_n!n@@Fjab=#OV_?T7RU;?ie~>gsIN+9Y17=uG9D;Ff37ao51A{F;;t^#p)C`TY#m??-@H_g{sf=9zbP^uhjV?M"
        "QV?<*#js_Z<M*-2rV!-T!E&`@ESZ}hO5x^A3<h|u+{n`Mr)9@+5{;}aFx2>2`*4|n!n@@GgW$@#OV__FhXaHvDN@3M{JR{+X"
        "X62ahAK_3NKN1o51A{G*)|{#p)C}TY#m??-@Q|g{sf=9z!rqa+kc}3ouf5oWbT0HCKG0#_JV2T!E&`@ESj1hO5x^A4F!0u+{"
        "n`No$a`+5{<1Fj#$}$Ltn6U4o~~@f$#5hpf@|AVp`4vDN@3N^Fs~+XX65ahAK_3NKW4o51A{G+6",
    ),
    "floats": (
        4,
        "f4",
        "Nl7XI2mk;84*&oG1ONd5000L7000321ONd5000R9000630{{d7006=O000940{{U4000O8000I70{{U400031000pI1ONd50"
        "08g+000#M0{{U4000C4000&N1ONd5000R9000*O1ONd5005%_000^R1pom6007DW000{S1pom6007be000~T0{{U40003100"
        "1Zf0{{U400031002?}0{{a6007zm002_~0{{d7007_s00000001BWAOIi$AOHaX00031000310003100000000000{{a60{{"
        "a60000000000c$`(zNhq~p7{>AE`#zs}%sgbC$xtXmIoyUqp^&h!pe!sbEi5ESl7%Emk}M=ik|arzBuSDiBuSDaNs=W0$L>D"
        "$>%Ojf>zuChn%_@AsWB6{#+<{LWbP~;5M5$S5qA-<=%Lqf*YIVZr+09-@lT97r1z2!;7Wg?50OvdMbDx;$V+%bKfQswj&J)t"
        "^e*lWoOu3}-bX%!8~uYmOg@7*-IqI#EBMpnxih#&2z{03yUDxwPrs!1laJs|H{21N!$<TM0iw4E6}?5I=q=*tPTWykz?UAvo"
        "x}|S>FIVeJR(f=7Ez+Nh!?#@is&se?4IO#JRzK3#$Cp{{qN|_+zl9Vg6J($MQ@QQdW#&<TjZmSyoo>LMD&pN;7m@#0Qndm_P"
        "2@NB3JYl1){eo7QICo2FWMzBxhrcd<j2t9;V2*2qG7X-ohbzi*nIhREgfA7Sr@Q1l#`_3*=`+kV~*a{y+@5Li85ZqPM6My+x"
        "zwEn4jRN&iGFxe{CCzuY9$V4v<{-y776-l9qL7OkSUXcxUjr~Clc)~-D",
    ),
}


def values(bands: int, height: int = 9, width: int = 7) -> np.ndarray:
    """(bands, height, width) int64, from 0 to 250."""
    band, row, column = np.indices((bands, height, width))
    return (band * 37 + row * 11 + column * 5) % 251


def tiff(bands: int, tags: dict[int, tuple[int, int]] | None = None, data: bytes | None = None) -> bytes:
    """A TIFF file of 8-bit pixels in one strip, with optional other tags (type, value) or data."""
    data = np.moveaxis(values(bands), 0, -1).astype(np.uint8).tobytes() if data is None else data
    entries = {256: (4, 7), 257: (4, 9), 258: (4, 8), 259: (4, 1), 262: (4, 1), 277: (4, bands), 278: (4, 9)}
    entries |= {279: (4, len(data)), **(tags or {})}
    entries[273] = (4, 8 + 2 + 12 * (len(entries) + 1) + 4)
    rows = b"".join(struct.pack("<HHII", tag, entries[tag][0], 1, entries[tag][1]) for tag in sorted(entries))
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + rows + struct.pack("<I", 0) + data


def read(image: Any, num_channels: int, do_rescale: bool = True) -> Tensor:
    return next(load_images([image], do_rescale=do_rescale, num_channels=num_channels))


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_bands_keep_their_order_and_values(name: str) -> None:
    bands, kind, text = TIFFS[name]
    found = read(io.BytesIO(base64.b85decode(text)), bands)
    # 16 bits are scaled to 0..255 without clipping; 257 times a byte gives that byte.
    assert torch.allclose(found, torch.from_numpy(values(bands)).float(), atol=1e-4)
    assert kind == "u2" or torch.equal(found, torch.from_numpy(values(bands)).float())
    with pytest.raises(ValueError, match=f"image 0 has {bands} bands, but the model takes 6 channels"):
        read(io.BytesIO(base64.b85decode(text)), 6)


def test_every_bit_of_16_is_kept(tmp_path: Path) -> None:
    array = np.arange(2 * 9 * 7, dtype=np.uint16).reshape(2, 9, 7) + 65000
    np.save(tmp_path / "deep.npy", array)
    for image in (array, np.moveaxis(array, 0, -1), tmp_path / "deep.npy"):
        assert torch.allclose(read(image, 2) * 257, torch.from_numpy(array.astype(np.float32)), atol=2e-2)
        assert len(read(image, 2).unique()) == array.size
    png = io.BytesIO()  # PNG with 16 bits and alpha, of which Pillow keeps 8 bits
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    rows = b"".join(b"\0" + struct.pack(">8H", *range(500, 508)) for _ in range(2))
    png.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 6, 0, 0, 0)))
    png.write(chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="image 0 has 16 bits a channel, of which Pillow reads the upper 8"):
        read(png, 4)
    with pytest.raises(ValueError, match="does not say how many bits are used"):
        read(np.full((2, 9, 7), 4000, np.uint16), 2)


def test_alpha_is_no_data_of_an_rgb_model() -> None:
    pixels = np.moveaxis(values(4), 0, -1).astype(np.uint8)
    rgba = Image.fromarray(pixels, "RGBA")
    assert read(rgba, 3).shape == (3, 9, 7) and torch.equal(read(rgba, 3), torch.from_numpy(values(4)[:3]).float())
    assert torch.equal(read(rgba, 4), torch.from_numpy(values(4)).float())
    for channels in (1, 2, 5):
        with pytest.raises(ValueError, match=f"'RGBA', but the model takes {channels} channel"):
            read(rgba, channels)
    with pytest.raises(ValueError, match="'RGB', but the model takes 4 channels: pass an array, a TIFF"):
        read(rgba.convert("RGB"), 4)


def test_one_channel_takes_gray_of_any_kind() -> None:
    gray = Image.fromarray(values(1)[0].astype(np.uint8))
    want = torch.from_numpy(values(1)).float()
    for image in (gray, gray.convert("RGB"), gray.convert("LA"), np.asarray(gray), np.asarray(gray)[..., None]):
        assert torch.equal(read(image, 1), want)
    with pytest.raises(ValueError, match="'RGB', but the model takes 1 channel: convert it to gray"):
        read(photographs()[0], 1)
    with pytest.raises(ValueError, match=r"shape \(9, 7, 3\), but the model takes 1 channel"):
        read(np.zeros((9, 7, 3), np.uint8), 1)


def test_orientation_turns_bands_as_pillow_does() -> None:
    array = np.moveaxis(values(3), 0, -1).astype(np.uint8)
    for orientation in range(1, 9):
        rgb = Image.open(io.BytesIO(tiff(3, {262: (4, 2), 274: (3, orientation)})))
        rgb.load()
        found = read(io.BytesIO(tiff(4, {274: (3, orientation)})), 4)
        assert torch.equal(found[:3], torch.from_numpy(np.moveaxis(np.array(rgb), -1, 0)).float())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(tiff(3, {262: (4, 2)})))), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff(5, {256: (4, 2**31 - 1), 257: (4, 2**31 - 1)}), "takes for safe"),
        (tiff(5, {278: (4, 2)}), "lists 1 segments, which do not cover it"),
        (tiff(5, {322: (4, 2**30), 323: (4, 2**30)}), "takes for safe"),
        (tiff(5, data=b"short"), "may be truncated or damaged"),
        (tiff(5, {259: (4, 8)}, zlib.compress(bytes(20))), "may be truncated or damaged"),
        (tiff(5, {259: (4, 8)}, b"no zlib data"), "cannot be decoded, the file may be truncated or damaged"),
        (tiff(5, {259: (4, 7)}), "compression 7 of TIFF"),
        (tiff(5, {317: (4, 3)}), "predictor 3 of TIFF"),
        (tiff(5, {258: (4, 4)}), "samples of 4 bits"),
        (tiff(5, {257: (4, 0)}), "so it is empty"),
    ],
)
def test_hostile_tiff_files_are_one_sentence(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(io.BytesIO(content), 5)
    assert str(caught.value).startswith("image 0 ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["u1", "u2", "f4", "f8"])
def test_the_size_of_a_tiff_is_limited_in_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many values as in the largest RGB, and as many bytes as in the largest .npy file, which is 8 a pixel."""
    data = np.ones((9, 7, 5), f"<{kind}")
    tags = {258: (4, 8 * data.itemsize), 339: (4, 3 if kind[0] == "f" else 1), 281: (4, 1)}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9 * 7 * 5 // 3)
    if kind[0] == "u":
        assert read(io.BytesIO(tiff(5, tags, data.tobytes())), 5).shape == (5, 9, 7)
        return
    with pytest.raises(ValueError, match="takes for safe"):
        read(io.BytesIO(tiff(5, tags, data.tobytes())), 5)


def test_a_bomb_of_deflate_is_not_unpacked() -> None:
    # 64 megabytes of zeros in a strip with a stated size of 315 bytes.
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    assert torch.equal(read(io.BytesIO(tiff(5, {259: (4, 8)}, data)), 5), torch.zeros(5, 9, 7))


@pytest.mark.parametrize("array", [np.array([{}], dtype=object), np.zeros((2, 2, 2, 2)), np.zeros((9, 7), complex)])
def test_npy_files_without_an_image_are_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy\) (has an array of shape|cannot be opened)"):
        read(tmp_path / "a.npy", 4)


def test_a_claimed_npy_array_is_not_allocated(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (4, 2**20, 2**20)})
    with pytest.raises(ValueError, match="takes for safe"):
        read(tmp_path / "a.npy", 4)


def test_the_image_processor_has_as_many_means() -> None:
    processor = FaiM2FImageProcessor(num_channels=4, do_resize=False)
    assert processor.image_mean == [0.485, 0.456, 0.406, 0.485] and len(processor.image_std) == 4
    assert FaiM2FImageProcessor(num_channels=1).image_mean == pytest.approx([0.449])
    pixels = values(4).astype(np.uint8)
    found = processor(pixels, return_tensors="pt")["pixel_values"]
    mean, std = (np.array(row)[:, None, None] for row in (processor.image_mean, processor.image_std))
    assert torch.allclose(found[0], torch.from_numpy((pixels / 255 - mean) / std).float(), atol=1e-5)
    assert FaiM2FImageProcessor.from_dict(processor.to_dict()).to_dict() == processor.to_dict()
    assert "num_channels" not in FaiM2FImageProcessor().to_dict()
    assert FaiM2FImageProcessor(num_channels=2, image_mean=0.5, image_std=[0.1, 0.2]).image_mean == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"image_mean must be one number or 4 \(num_channels\)"):
        FaiM2FImageProcessor(num_channels=4, image_mean=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="image_std must be one number or 4"):
        processor(pixels, image_std=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"shape \(3, 9, 7\), but the model takes 4 channels"):
        processor(pixels[:3])


def small(backbone: dict[str, Any], **settings: Any) -> FaiM2FConfig:
    return FaiM2FConfig(
        backbone_config=dict(backbone), feature_size=16, mask_feature_size=16, hidden_dim=16, decoder_layers=1,
        num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=3, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_from_pretrained_spreads_the_first_layer(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FaiM2FForUniversalSegmentation(small(BACKBONES[name])).eval()
    model.save_pretrained(tmp_path)
    gray = torch.randn(1, 1, 64, 64)
    other = {"model_type": BACKBONES[name]["model_type"], "num_channels": 6}
    with torch.no_grad():
        want = model(gray.expand(-1, 3, -1, -1)).masks_queries_logits
        for channels, made in (
            (1, AutoModelForUniversalSegmentation.from_pretrained(tmp_path, num_channels=1)),
            (6, FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, backbone_config=other)),
            (4, FaiM2FForSemanticSegmentation.from_pretrained(tmp_path, num_channels=4)),
        ):
            made.eval()
            assert made.config.num_channels == made.backbone.config.num_channels == channels
            found = made(gray.expand(-1, channels, -1, -1)).masks_queries_logits
            if channels != 4:  # with 4 channels, the red weights occur twice
                assert torch.allclose(found, want, atol=1e-4)
            with pytest.raises(ValueError, match=rf"pixel_values must be of shape \(B, {channels}, H, W\)"):
                made(torch.zeros(1, 3, 64, 64))
    made.save_pretrained(tmp_path / "again")
    again, info = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert again.config.num_channels == 4 and not info["missing_keys"]
    assert "_num_channels" not in (tmp_path / "again" / "config.json").read_text()
    # 3 / 4 of the weights of red, green, blue and red.
    first = next(weight for path, weight in model.backbone.named_parameters() if weight.ndim == 4)
    spread = next(weight for path, weight in again.backbone.named_parameters() if weight.ndim == 4)
    assert torch.allclose(spread, first[:, [0, 1, 2, 0]] * 0.75)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_first_layer_is_never_initialized_anew(ignore: bool, tmp_path: Path) -> None:
    FaiM2FForUniversalSegmentation(small(BACKBONES["stdc"])).save_pretrained(tmp_path)
    config = small(BACKBONES["stdc"], num_channels=4)
    message = "pass num_channels to from_pretrained" if ignore else "mismatch"
    with pytest.raises((ValueError, RuntimeError), match=message):
        FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=ignore)


def test_the_configuration_says_how_many_channels(tmp_path: Path) -> None:
    config = small(BACKBONES["stdc"], num_channels=4)
    assert config.num_channels == config.backbone_config.num_channels == 4
    config.save_pretrained(tmp_path)
    assert FaiM2FConfig.from_pretrained(tmp_path).num_channels == 4
    assert FaiM2FConfig().num_channels == 3 and "num_channels" not in FaiM2FConfig().to_diff_dict()
    with pytest.raises(ValueError, match="`num_channels` must be a positive integer, got 0"):
        small(BACKBONES["stdc"], num_channels=0)


def test_a_gray_image_as_one_channel_answers_as_it_did_as_rgb(tmp_path: Path) -> None:
    save_model(tmp_path, image_mean=0.5, image_std=0.25)
    gray = photographs()[0].convert("L")
    size = [(gray.height, gray.width)]
    maps = []
    for channels in (3, 1):
        processor = AutoImageProcessor.from_pretrained(tmp_path, num_channels=channels)
        model = AutoModelForUniversalSegmentation.from_pretrained(tmp_path, num_channels=channels).eval()
        inputs = processor(gray, return_tensors="pt")
        assert inputs["pixel_values"].shape[1] == processor.num_channels == channels
        with torch.no_grad():
            maps.append(processor.post_process_semantic_segmentation(model(**inputs), target_sizes=size)[0])
    assert torch.equal(*maps) and len(maps[0].unique()) > 1


def test_spreading_is_refused_where_the_first_layer_is_no_convolution() -> None:
    model = FaiM2FForUniversalSegmentation(small(BACKBONES["stdc"]))
    model.backbone.stem.convolution = torch.nn.Identity()
    with pytest.raises(ValueError, match="the first layer of STDCBackbone is not a convolution of 3 channels"):
        spread_channels(model, 4)
    assert spread_values([1.0, 2.0, 3.0], 5) == [1.0, 2.0, 3.0, 1.0, 2.0] and spread_values([1.0, 2.0], 1) == [1.5]
