"""Text as Windows' editors write it, wherever a file of a person's is read."""

import codecs
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hf_faim2f.conversion.detectron2_config import _read as read_detectron2
from hf_faim2f.conversion.focoos import read_info

from hf_faim2f.cli.evaluate import EvaluateSettings
from hf_faim2f.cli.settings import read_settings_file
from hf_faim2f.data import DatasetError, load_coco_instance, load_folder
from hf_faim2f.data.files import read_json
from hf_faim2f.data.readers.folder import read_labels
from hf_faim2f.errors import ConversionError, SettingsError
from hf_faim2f.files import decode_text
from hf_faim2f.hub.results import Measured, update_card
from tests.support.image_files import photo, save
from tests.support.reference_models import info_file

TEXT = "weiß\nschwarz\n"
WINDOWS = codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode()
UNICODE = [codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
           TEXT.encode("utf-16-le")]  # fmt: skip


def test_a_mark_and_line_ends_are_no_text() -> None:
    assert decode_text(WINDOWS) == decode_text(TEXT.encode()) == TEXT
    assert decode_text(b"") == "" and decode_text(codecs.BOM_UTF8) == ""
    for content in UNICODE:
        with pytest.raises(ValueError, match='UTF-16, which Notepad calls "Unicode".*: save it as UTF-8'):
            decode_text(content)
    with pytest.raises(ValueError, match="line 2 is in another encoding: save it as UTF-8"):
        decode_text("schwarz\nweiß\n".encode("cp1252"))


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(WINDOWS)
    assert read_labels(path) == ("weiß", "schwarz")
    path.write_bytes(UNICODE[0])
    with pytest.raises(DatasetError, match=r"labels\.txt cannot be read as UTF-8 text: it is UTF-16"):
        read_labels(path)
    path.write_text("a \n b\n\n  \n")
    assert read_labels(path) == ("a", "b")


@pytest.mark.parametrize(("text", "line"), [("a\n\nb\n", 2), ("\na\nb", 1), ("a\nb\n \t\n\nc", 3)])
def test_a_blank_line_does_not_shift_the_classes(tmp_path: Path, text: str, line: int) -> None:
    save(tmp_path / "images" / "0.png", photo(2, 2))
    save(tmp_path / "masks" / "0.png", np.zeros((2, 2), dtype=np.uint8))
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(
        DatasetError, match=rf"labels\.txt has no class name in line {line}, .*: write a name there, or"
    ):
        load_folder(tmp_path)


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump({"model": "größe", "limit": 3}, allow_unicode=True)
    path.write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    assert read_settings_file(EvaluateSettings, path) == {"model": "größe", "limit": 3}
    path.write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
    with pytest.raises(SettingsError, match=r"run\.yaml is not YAML: it is UTF-16"):
        read_settings_file(EvaluateSettings, path)


def test_a_list_has_no_blank_word(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for value in ('"a,,b"', "[a, '', b]", '"a,b,"'):
        path.write_text(f"labels: {value}\n")
        with pytest.raises(SettingsError, match=r"run\.yaml: labels must be a list of words"):
            read_settings_file(EvaluateSettings, path)


def test_annotations(tmp_path: Path) -> None:
    save(tmp_path / "val2017" / "1.png", photo(4, 4))
    document = {"images": [{"id": 1, "file_name": "1.png", "height": 4, "width": 4}], "annotations": [],
                "categories": [{"id": 1, "name": "Käfer"}]}  # fmt: skip
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(document, ensure_ascii=False).encode())
    assert len(load_coco_instance(tmp_path)) == 1
    path.write_bytes(codecs.BOM_UTF16_LE + json.dumps(document).encode("utf-16-le"))
    with pytest.raises(DatasetError, match=r"instances_val2017\.json is not JSON: it is UTF-16"):
        read_json(path)


def test_configurations_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "configs" / "a.yaml"
    path.parent.mkdir()
    path.write_bytes(codecs.BOM_UTF8 + b"MODEL:\r\n  WEIGHTS: x\r\n")
    assert read_detectron2(path) == {"MODEL": {"WEIGHTS": "x"}}
    path.write_bytes(codecs.BOM_UTF16_LE + "MODEL: 1".encode("utf-16-le"))
    with pytest.raises(ConversionError, match=r"a\.yaml is not readable YAML \(it is UTF-16"):
        read_detectron2(path)
    info = Path(info_file(tmp_path))
    plain = read_info(str(info)).config.to_dict()
    info.write_bytes(codecs.BOM_UTF8 + info.read_bytes())
    assert read_info(str(info)).config.to_dict() == plain
    info.write_bytes(codecs.BOM_UTF16_BE + "{}".encode("utf-16-be"))
    with pytest.raises(ConversionError, match=r"model_info\.json is not readable JSON \(it is UTF-16"):
        read_info(str(info))


def test_a_card_keeps_its_metadata(tmp_path: Path) -> None:
    card = "---\nlicense: mit\ntags:\n- flowers\n---\n\n# Words\n"
    (tmp_path / "README.md").write_bytes(codecs.BOM_UTF8 + card.replace("\n", "\r\n").encode())
    update_card(tmp_path, Measured("folder", "meadows", "val", 3, 0, {"semantic": {"mIoU": 50.0}}).results())
    content = (tmp_path / "README.md").read_bytes()
    assert content.startswith(b"---") and b"\xef\xbb\xbf" not in content
    metadata = yaml.safe_load(content.split(b"---")[1])
    assert metadata["license"] == "mit" and metadata["tags"] == ["flowers"] and len(metadata["model-index"]) == 1
