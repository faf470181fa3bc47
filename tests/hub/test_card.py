"""Cards: facts and runnable snippets of all family members, hand-written sections, and checks before publishing."""

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli import card as card_command
from hf_faim2f.cli import main
from hf_faim2f.evaluation.report import folded_table
from hf_faim2f.family import DATASETS, FAMILY, load_config
from hf_faim2f.hub.card import HOLE, Provenance, load_from, model_card, read_provenance, title_of
from hf_faim2f.hub.results import Measured, merge_results, merge_tables
from hf_faim2f.hub.sections import MARK, has_results, holes, images_of, keep_own_words, license_note, split_sections
from tests.support import forks
from tests.support.hub_server_rules import metadata_errors
from tests.support.reference_models import small_config, small_model

SHA = "0123456789abcdef" * 4
SOURCE = Provenance("model_final.pth", SHA, {"pretrained": "imagenet"}, published=True)
PUBLISHED_FILE = Path(__file__).parents[2] / "hf_faim2f" / "family" / "data" / "published.json"
HEADINGS = [
    "How to load it", "Architecture", "Intended use and limits", "Training", "Results", "Speed", "Provenance",
    "License", "Citation",
]  # fmt: skip


def snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", list(FAMILY))
def test_the_family_s_cards_have_every_fact(name: str) -> None:
    """Compared with the file of published figures, and with the known parameter counts."""
    card = model_card(name, load_config(name), SOURCE)
    facts = json.loads(PUBLISHED_FILE.read_text())["members"][name]
    data = ModelCard(card).data
    assert holes(card, ["README.md"]) == [] and metadata_errors(card) == []
    assert data.pipeline_tag == "image-segmentation" and data.library_name == "transformers"
    assert "faim2f" in data.tags and data.model_name == name
    assert data.datasets == [DATASETS[FAMILY[name].dataset].hub_id] and data.license == "other"
    assert [section.heading for section in split_sections(ModelCard(card).text)] == ["", *HEADINGS]
    published = {
        r.metric_name: r.metric_value for r in data.eval_results if r.dataset_config.startswith("as published")
    }
    again = {r.metric_name: r.metric_value for r in data.eval_results if r.dataset_config.startswith("evaluated again")}
    first, key = ("mIoU", "mIoU") if name.endswith("ade") else ("AP", "segm/AP")
    assert published[first] == facts["published"][key] and f"| {first} | {facts['published'][key]:.2f} |" in card
    later = facts.get("re_evaluated", {})
    assert again.get(first) == later.get("sem_seg/mIoU" if first == "mIoU" else key)
    speed = next((value for key, value in facts["published"].items() if key.startswith("fps")), None)
    assert (speed is None) == (name in ("bisenetformer-s-ade", "bisenetformer-l-ade"))
    if speed is not None:
        assert re.search(rf"^\| NVIDIA T4, TensorRT.* \| {speed} \|$", card, re.MULTILINE)
    bisenet = "bisenet" in name
    assert ("masks at an eighth of that size" in card) == bisenet != ("masks at a quarter of that size" in card)
    assert ("@inproceedings{rosi2024bisenetformer" in card) == bisenet
    per_class = later or facts["published"].get("per_class_IoU")
    folded = re.findall(r"<details><summary>Each class.*?</details>", card, re.DOTALL)
    assert len(folded) == bool(per_class)
    if per_class:
        rows = re.findall(r"^\| (?!class|---)(.*?) \|(.*)\|$", folded[0], re.MULTILINE)
        assert [label for label, _ in rows] == [label.strip() for label in FAMILY[name].labels]
        assert not any(set(cells) <= set(" |–") for _, cells in rows)  # every class has a figure
    last = FAMILY[name].labels[-1]
    value = later.get(f"segm/AP-{last}", later.get(f"sem_seg/IoU-{last}"))
    assert value is None or f"{value:.2f}" in folded[0].splitlines()[-3]
    assert SHA in card and "hf_faim2f 0" in card and f"pretrained_models/{name}/" in card and "@inproceedings" in card
    assert f"{load_config(name).decoder_layers} layers, 100 queries, {len(FAMILY[name].labels)} classes" in card


def test_the_six_snippets_differ_in_what_they_load_and_ask_for_alone() -> None:
    """So the snippets that the next test runs represent all of them."""
    kinds = set()
    for name, preset in FAMILY.items():
        found = snippets(model_card(name, load_config(name), SOURCE))
        task = preset.config["postprocessing_type"]
        kinds.add((task, tuple(text.replace(f'"{name}"', '"NAME"') for text in found)))
    assert len(kinds) == 2
    semantic, instance = (dict(kinds)[task] for task in ("semantic", "instance"))
    assert [text.replace("semantic", "instance") for text in semantic] == list(instance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small saved model with the card written by `faim2f card`."""
    folder = tmp_path_factory.mktemp("cards") / "tiny"
    labels = {0: "wall", 1: "sky|light", 2: "<b>tree</b>", 3: "road", 4: "bed"}
    model = small_model(
        id2label=labels, postprocessing_type="instance", use_mask_score=True, num_queries=6, decoder_layers=1
    )
    model.save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(folder)
    assert main(["card", str(folder), "--license", "mit"]) == 0
    return folder


# Runs each snippet unchanged, in its own namespace, next to the files that it reads.
RUN_SNIPPETS = """
import json, os, sys
os.chdir(sys.argv[1])
for text in json.loads(sys.argv[2]):
    names = {"__name__": "__main__"}
    exec(text, names)
    shown = names.get("result", names.get("segments"))
    print("SAW", type(shown).__name__, sorted(shown) if isinstance(shown, dict) else "")
"""


@pytest.mark.large
@pytest.mark.slow  # exports a graph
def test_the_snippets_run(folder: Path, tmp_path: Path) -> None:
    """As a reader would run them: next to the folder and a photograph."""
    found = snippets((folder / "README.md").read_text())
    assert len(found) == 3 and all('repository = "tiny"' in text for text in found)
    (tmp_path / "tiny").symlink_to(folder, target_is_directory=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    done = forks.run(RUN_SNIPPETS, tmp_path, json.dumps(found))
    assert done.returncode == 0, done.error
    answer = "SAW dict ['segmentation', 'segments_info']"
    assert [line.strip() for line in done.out.splitlines() if "SAW" in line] == [answer, "SAW list", answer]


def test_a_card_made_anew_keeps_what_a_person_and_evaluations_wrote(folder: Path, tmp_path: Path) -> None:
    """Hand-written sections stay in place, new results are merged, and the source checkpoint is kept."""
    config = small_config()
    first = model_card("tiny", config, Provenance("a.pth", SHA, {"backbone": "x"}, error=2e-6), license="mit")
    assert first == model_card("tiny", config, before=first)  # idempotent
    assert read_provenance(first) == Provenance("a.pth", SHA, {"backbone": "x"}, error=2e-6)
    assert "2.0e-06 of the largest logit" in first
    own = "## Training\n\nOn my own photographs.\n\n```bash\n## no heading\n```\n\n## Thanks\n\nTo all.\n\n"
    edited = re.sub(r"## Training.*?(?=## Results)", lambda _: own, first, flags=re.DOTALL)
    measured = Measured("meadows", "Meadows", "val", 7, 0, {"semantic": {"mIoU": 12.34}})
    edited = merge_results(edited, "tiny", measured.results())
    again = model_card("tiny", config, tables={"Each class on Meadows": "| a |\n| --- |"}, before=edited)
    headings = [section.heading for section in split_sections(ModelCard(again).text)]
    assert headings == ["", *HEADINGS[:4], "Thanks", *HEADINGS[4:]]
    assert own.strip() in again and "| semantic mIoU | 12.3 |" in again and "On Meadows (val), in percent" in again
    third = model_card("tiny", config, before=again)
    assert third == again and third.count("<summary>Each class on Meadows</summary>") == 1
    replaced = Measured("meadows", "Meadows", "val", 7, 0, {"semantic": {"mIoU": 56.78}}).results()
    fourth = model_card("tiny", config, results=replaced, before=third)
    assert "| semantic mIoU | 56.8 |" in fourth and "12.3" not in fourth
    # A metric that has become undefined does not keep its old value.
    undefined = Measured("meadows", "Meadows", "val", 7, 0, {"semantic": {"mIoU": float("nan"), "pACC": 9.0}}).results()
    for fifth in (
        model_card("tiny", config, results=undefined, before=fourth), merge_results(fourth, "tiny", undefined)
    ):  # fmt: skip
        assert [(one.metric_name, one.metric_value) for one in ModelCard(fifth).data.eval_results] == [
            ("semantic pACC", 9.0)
        ]
    assert ModelCard(fourth).data.license == "mit" and metadata_errors(fourth) == []
    moved = load_from(fourth, 'some"one/tiny')
    assert moved.count('repository = "some\\"one/tiny"') == 3 and load_from(moved, "tiny") == fourth


def test_earlier_marks_and_headings_are_recognized() -> None:
    config = small_config()
    card = model_card("tiny", config, license="mit")
    mark = "<!-- Generated by `faim2f card`; without this line the section is yours and stays. -->"
    earlier = card.replace(MARK, mark).replace("## License", "## Licence")
    assert earlier.count(MARK) == 0 and model_card("tiny", config, before=earlier) == card
    own = re.sub(r"## Licence.*?(?=## Citation)", "## Licence\n\nAsk me.\n\n", earlier, flags=re.DOTALL)
    renewed = model_card("tiny", config, before=own)
    assert "## Licence\n\nAsk me.\n\n## Citation" in renewed and "## License" not in renewed


def test_a_fine_tuned_model_does_not_borrow_figures() -> None:
    """The name alone is not enough: source and classes must match the family member's, too, and the file must be the
    published one."""
    name = "fai-mf-m-ade"
    for config, source in (
        (load_config(name), None),
        (load_config(name, num_labels=3), SOURCE),
        (load_config(name), Provenance("model_final.pth", SHA, model=name, published=False)),
        (load_config(name), Provenance("w", SHA, library="transformers", model=name, error=1e-6)),
    ):
        card = model_card(name, config, source)
        assert "45.32" not in card and ModelCard(card).data.eval_results is None


def test_strangers_words_do_not_become_markup(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "<b>" not in card and "&lt;b&gt;tree&lt;/b&gt;" in card and "sky\\|light" in card
    assert title_of(card) == "tiny" and title_of("# Words\n") == "Words" and title_of("words") is None
    hostile = 'x"\n---\n{{ 7 * 7 }} {% for a in b %}'
    made = model_card(hostile, small_config(id2label={0: "{{ 6 * 7 }}", 1: "b\n## Results"}), SOURCE)
    assert "42" not in re.sub(r"[0-9a-f]{64}", "", made.partition("## Architecture")[2].partition("## Intended")[0])
    assert ModelCard(made).data.model_name == hostile and made.count("\n## Results") == 1


def test_the_card_command_writes_an_evaluation_s_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (model / name).write_bytes((folder / name).read_bytes())
    evaluation = {
        "model": "x", "data": {"format": "folder", "name": "meadows", "split": "val", "task": "semantic"},
        "images": 3, "left_out": [],
        "results": {"semantic": {"mIoU": 41.5, "pACC": None, "per_class": {"a|b": {"IoU": 41.5}, "c": {"IoU": None}}}},
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert main(["card", str(model), "--evaluation", str(tmp_path), "--repository", "me/tiny"]) == 0
    printed = capsys.readouterr().out
    assert "names no license" in printed and "'[More Information Needed]' in the section Training" in printed
    card = (model / "README.md").read_text()
    assert (
        "<summary>Each class on meadows (val)</summary>" in card and "| a\\|b | 41.50 |" in card and "| c | – |" in card
    )
    assert card.count('repository = "me/tiny"') == 3 and HOLE in card
    results = {r.metric_name: r.metric_value for r in ModelCard(card).data.eval_results}
    assert results == {"semantic mIoU": 41.5}
    assert main(["card", str(model)]) == 0
    card = (model / "README.md").read_text()
    assert "| a\\|b | 41.50 |" in card  # kept
    (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation, "labels": ["sky", "sea"]}))
    assert main(["card", str(model), "--evaluation", str(tmp_path)]) == 2
    assert "is the evaluation of x, whose labels differ from this model's" in capsys.readouterr().err
    assert (model / "README.md").read_text() == card
    for other, is_noted in ((folder, True), (model, False)):
        (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation, "model": str(other)}))
        assert main(["card", str(model), "--evaluation", str(tmp_path)]) == 0
        assert (f"is the evaluation of {other}, not of {model}" in capsys.readouterr().out) == is_noted
    weights = (folder / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights)
    for digest, status in ((hashlib.sha256(weights).hexdigest(), 0), (hashlib.sha256(b"before").hexdigest(), 2)):
        (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation, "weights": digest}))
        assert main(["card", str(model), "--evaluation", str(tmp_path)]) == status
    assert f"is the evaluation of other weights than those in {model}" in capsys.readouterr().err
    (model / "model.safetensors").unlink()  # then nothing is known of them
    assert main(["card", str(model), "--evaluation", str(tmp_path)]) == 0


def test_a_file_that_cannot_be_read_does_not_end_a_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even for root, such as on a network file system."""

    def fail(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "model.safetensors"))

    monkeypatch.setattr(card_command, "list_files", fail)
    assert main(["card", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"] == str(folder / "README.md")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "model_type is 'bert'"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be used"),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "metadata cannot be read"),
        (lambda f: (f / "README.md").write_bytes(b"---\n\xff\n---\n"), "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_mistakes_are_told_and_nothing_is_written(
    spoil, told: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    for name in ("config.json", "README.md"):
        (model / name).write_bytes((folder / name).read_bytes())
    spoil(model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert main(["card", str(model)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "Traceback" not in error
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_an_evaluation_that_is_none_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "README.md").read_bytes()
    for text in ("[]", '{"data": 3}', "{"):
        (tmp_path / "evaluation.json").write_text(text)
        assert main(["card", str(folder), "--evaluation", str(tmp_path)]) == 2
        assert "is not an evaluation.json" in capsys.readouterr().err
    assert (folder / "README.md").read_bytes() == before


def test_subtasks_that_are_evaluated_one_by_one_share_a_table() -> None:
    """As in the metadata, the results of the other subtasks stay, in the table of an evaluation of all."""
    nan = float("nan")
    results = {
        "semantic": {"mIoU": 50.0, "per_class": {"sky": {"IoU": 40.0, "ACC": 60.0}, "a|b": {"IoU": 60.0, "ACC": nan}}},
        "instance": {"AP": 30.0, "per_class": {"a|b": {"AP": 30.0}}},
        "panoptic": {"PQ": 20.0, "per_class": {"sky": {"PQ": 10.0}, "a|b": {"PQ": 30.0}}},
        "cityscapes": {
            "IoU_class": 9.0, "per_class": {"sky": {"IoU": 9.0}, "a|b": {"IoU": 9.0}},
            "per_category": {"flat": {"IoU": 8.0}},
        },
    }  # fmt: skip
    (whole,) = folded_table(results, "meadows", "val").items()
    # The last evaluation replaces what the first one has of the same subtask.
    parts: list[dict[str, Any]] = [{"semantic": {"mIoU": 1.0, "per_class": {"sky": {"IoU": 1.0}}}}, *(
        {name: result} for name, result in results.items()
    )]  # fmt: skip
    tables: dict[str, str] = {}
    card = model_card("tiny", small_config())
    for part in parts:
        tables = merge_tables(tables, folded_table(part, "meadows", "val"))
        card = model_card("tiny", small_config(), before=card, tables=folded_table(part, "meadows", "val"))
    assert tables == dict([whole])
    assert f"<details><summary>{whole[0]}</summary>\n\n{whole[1]}\n\n</details>" in card


def test_holes() -> None:
    whole = model_card("tiny", small_config(), SOURCE, license="mit")
    assert holes(whole, []) == [] and not has_results(whole)
    for broken, told in (
        (whole.replace("pipeline_tag: image-segmentation", "pipeline_tag: text"), "pipeline_tag: 'text'"),
        (whole.replace("library_name: transformers\n", ""), "library_name: None"),
        (whole.replace("- faim2f\n", "", 1), "no tag 'faim2f'"),
        (whole.replace("license: mit\n", ""), "names no license"),
        (whole.replace("license: mit\n", "license: other\n"), "without license_name"),
        (whole.replace("license: mit\n", "license: Apache 2.0\n"), "(`faim2f card DIR --license apache-2.0`"),
        (whole.replace("license: mit\n", "license:\n- mit\n- GPL\n"), "'GPL', which is not an id"),
        (whole + "\nTODO: more\n", "'TODO' in the section Citation"),
        (whole + "\n[More information needed]\n", "'[More information needed]'"),
        (whole + "\nThe `data` is TBD, `code` too.\n", "'TBD' in the section Citation"),
        (whole + "\n{{ results }}\n", "'{{ results }}'"),
        (whole + f"\n## Empty\n\n{MARK}\n", "section 'Empty' is empty"),
        (whole + "\n![A curve](curve.png)\n", "shows 'curve.png', which is not in the folder"),
        (whole.replace("---\n", "---\n\t- :\n", 1), "metadata cannot be read"),
        ("# Only a title\n", "no metadata"),
    ):
        found = holes(broken, ["README.md"])
        assert len(found) >= 1 and any(told in hole for hole in found), (told, found)
    assert license_note(whole) is None
    for license, told in (("apache-2", "did you mean apache-2.0?"), ("of-my-own", "the Hub may refuse it")):
        other = whole.replace("license: mit\n", f"license: {license}\n")
        assert holes(other, []) == [] and told in str(license_note(other))
    for good in ("El modelo segmenta todo el suelo.", "Write `{{ name }}` or ``{{ `a` }}``, not `TODO`."):
        assert holes(whole + f"\n{good}\n", []) == []
    spaces = whole + '\n![A](my%20plot.png) ![B](<your plot.png> "title") `![no](c.png)`\n'
    assert images_of(spaces) == {"my plot.png", "your plot.png"}
    shown = whole + "\n![A](./a.png) <img alt='' src=\"b.jpg\"> ![C](https://x/c.png)\n```\n![no](d.png) TODO\n```\n"
    assert images_of(shown) == {"a.png", "b.jpg"} and holes(shown, ["a.png", "b.jpg"]) == []


def test_sections_do_not_begin_within_code() -> None:
    text = "# T\n\n## A\n\n~~~\n## not\n```\n~~~\n\n## B\nx\n"
    assert [section.heading for section in split_sections(text)] == ["", "A", "B"]
    assert keep_own_words(text, "") == "\n".join(str(section) for section in split_sections(text))


def test_sections_with_the_same_heading_are_all_kept() -> None:
    own = "## Notes\n\none\n\n## A\n\nmine\n\n## Notes\n\ntwo\n\n## A\n\nalso mine\n\n"
    before = f"# T\n\n{own}## B\n\n{MARK}\n\nold\n"
    made = f"# T\n\n{MARK}\n\n## A\n\n{MARK}\n\nnew\n\n## B\n\n{MARK}\n\nnew\n"
    kept = keep_own_words(made, before)
    texts = [(section.heading, section.text.split()[-1]) for section in split_sections(kept)][1:]
    assert texts == [("Notes", "one"), ("A", "mine"), ("Notes", "two"), ("A", "mine"), ("B", "new")]
    assert keep_own_words(made, kept) == kept


@pytest.mark.parametrize("source", [SOURCE, Provenance("w", SHA, library="transformers", model="m", error=1e-6)])
def test_a_license_that_the_card_names_is_that_of_the_weights(source: Provenance) -> None:
    card = model_card("tiny", small_config(), source)
    # As `faim2f models` says, Focoos states none.
    terms = "Focoos, who states no license" if source is SOURCE else "under the source model's license"
    assert terms in card
    link = "license_link: https://acme.example"
    named = re.sub("license_name: .*\n(license_link: .*\n)?", f"license_name: acme\n{link}\n", card)
    renewed = model_card("tiny", small_config(), before=named)
    assert f"The weights are licensed under acme ({link.split()[1]})." in renewed and terms not in renewed
    several = model_card(
        "tiny", small_config(), before=re.sub("license: other\n(license_.*\n)+", "license:\n- mit\n- cc0-1.0\n", card)
    )
    assert "The weights are licensed under mit and cc0-1.0." in several


def test_only_generated_snippets_are_edited_and_line_endings_stay() -> None:
    own = '## Use\n\n```python\nrepository = "mine"\n```\n'
    card = model_card("tiny", small_config(), license="mit") + f"\n{own}"
    for text in (card, card.replace("\n", "\r\n")):
        moved = load_from(text, "me/tiny")
        assert moved == text.replace('repository = "tiny"', 'repository = "me/tiny"') != text
        assert moved.count('repository = "mine"') == 1
        branch = load_from(moved, "me/tiny", "a-branch")
        line = 'repository = snapshot_download("me/tiny", revision="a-branch")'
        assert branch.count(line) == 3 and branch.count("import snapshot_download") == 3
        assert branch.count("\r") == (branch.count("\n") if "\r" in text else 0)
        assert (
            load_from(branch, "me/tiny") == moved and load_from(branch, "a", "b").count("import snapshot_download") == 3
        )
        for code in snippets(branch.replace("\r\n", "\n")):
            ast.parse(code)


def test_weights_of_a_stranger_are_not_the_published_ones() -> None:
    name = "fai-mf-m-ade"
    own = model_card(name, load_config(name), Provenance("model_final.pth", SHA, model=name, published=False))
    assert "converted from a checkpoint trained with Focoos's library to Hugging Face transformers" in own
    assert f"The architecture is that of {name}: Mask2Former with" in own and "trained by the authors" in own
    assert "public.focoos.ai" not in own and ModelCard(own).data.license_name == "as-the-source"
    for published, told in ((True, "a checkpoint of the original repository"), (False, "trained with the code of the")):
        source = Provenance("model.pkl", SHA, library="Mask2Former", model="leaf", published=published)
        card = model_card("tiny", small_config(), source)
        assert told in card and read_provenance(card) == source
    # A card of an earlier version does not say, and keeps its figures.
    before = model_card(name, load_config(name), Provenance("model_final.pth", SHA))
    assert "45.32" in before and ModelCard(before).data.license_name == "focoos"


def test_mask2former_s_card_cites_its_own() -> None:
    source = Provenance("model.safetensors", SHA, library="transformers", model="mask2former-x", error=3e-7)
    card = model_card("tiny", small_config(), source)
    assert "Focoos" not in card and "3.0e-07" in card and holes(card, []) == [] and metadata_errors(card) == []
