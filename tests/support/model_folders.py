"""Folders of a small model that can be published, and edits that make them invalid."""

from pathlib import Path

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli import main
from tests.support.reference_models import small_model


def write_model(folder: Path, **overrides: object) -> Path:
    model = small_model(decoder_layers=1, **overrides)
    model.save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(folder)
    assert main(["card", str(folder), "--license", "mit"]) == 0
    card = (folder / "README.md").read_text()
    start, end = card.index("## Training"), card.index("## Results")
    (folder / "README.md").write_text(f"{card[:start]}## Training\n\nOf random weights.\n\n{card[end:]}")
    return folder


def edit(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
