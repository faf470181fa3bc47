"""What a card lacks before it may be published."""

import re
from collections.abc import Collection
from typing import Any

import yaml
from huggingface_hub import ModelCard

from .results import TASK
from .sections import has_words, split_sections

# Words that stand where someone still has to write; in any case.
PLACEHOLDERS = re.compile(
    r"\[?more information needed\]?|\bTODO\b|\bTBD\b|\bFIXME\b|\{\{.*?\}\}|lorem ipsum", re.IGNORECASE
)
CODE = re.compile(r"^(```+|~~~+).*?^\1", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)>\s]+)|<img[^>]*\ssrc=[\"']([^\"']+)", re.IGNORECASE)
REQUIRED = {"library_name": "transformers", "pipeline_tag": TASK}
RENEW = "`faim2f card DIR` writes it"


def images_of(card: str) -> set[str]:
    """The files that a card shows, without those of other places."""
    _, _, words = _parts(card)
    found = {one or other for one, other in IMAGE.findall(CODE.sub("", words))}
    return {name.removeprefix("./") for name in found if not re.match(r"[a-z][a-z0-9+.-]*:|//", name, re.IGNORECASE)}


def holes(card: str, files: Collection[str]) -> list[str]:
    """What keeps a card from being published, a sentence each; empty where nothing does.

    Args:
        card: the contents of README.md.
        files: the names of the folder's files, as the card would call them.
    """
    data, problem, words = _parts(card)
    if problem:
        return [problem]
    found = []
    for key, value in REQUIRED.items():
        if data.get(key) != value:
            found.append(f"its metadata has {key}: {data.get(key)!r}, not {value!r} ({RENEW}).")
    tags = data.get("tags")
    if not isinstance(tags, list) or "faim2f" not in tags:
        found.append(f"its metadata has no tag 'faim2f' ({RENEW}).")
    if not isinstance(data.get("license"), (str, list)) or not data.get("license"):
        found.append(
            "its metadata names no license (`faim2f card DIR --license apache-2.0`, or another id of the Hub)."
        )
    elif data["license"] == "other" and not data.get("license_name"):
        found.append("its metadata has the license 'other' without license_name, which says which.")
    prose = CODE.sub("", words)
    for placeholder in dict.fromkeys(match[0] for match in PLACEHOLDERS.finditer(prose)):
        heading = next((s.heading for s in split_sections(words) if placeholder in CODE.sub("", s.text)), "")
        where = f" in the section {heading}" if heading else ""
        found.append(f"it still has {placeholder!r}{where}, where something is to be written.")
    sections = split_sections(words)
    if not any(has_words(section) for section in sections):
        found.append(f"it has no words ({RENEW}).")
    for section in sections:
        if section.heading and not has_words(section):
            found.append(f"its section {section.heading!r} is empty.")
    for name in sorted(images_of(card) - set(files)):
        found.append(f"it shows {name!r}, which is not in the folder.")
    return found


def has_results(card: str) -> bool:
    """Whether its metadata has any evaluation result."""
    return bool(_parts(card)[0].get("model-index"))


def _parts(card: str) -> tuple[dict[str, Any], str, str]:
    """Metadata, what is wrong with it, and words."""
    if not card.lstrip().startswith("---"):
        return {}, "it has no metadata in front (`faim2f card DIR` writes it).", card
    try:
        parsed = ModelCard(card, ignore_metadata_errors=False)
        return parsed.data.to_dict(), "", parsed.text
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        return {}, f"its metadata cannot be read ({str(error).splitlines()[0]}).", card


__all__ = ["has_results", "holes", "images_of"]
