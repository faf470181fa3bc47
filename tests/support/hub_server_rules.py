"""The Hub's rules for a card's metadata, written from its documentation, without this package or the Hub's client.

See https://huggingface.co/docs/hub/model-cards and the specification of `model-index` linked there.
"""

import re
from typing import Any

import yaml

# The common licenses of the Hub's list, which has some fifty more.
LICENSES = frozenset(
    "apache-2.0 mit bsd-3-clause bsd-2-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gpl-3.0 "
    "agpl-3.0 lgpl-3.0 mpl-2.0 openrail unlicense unknown other".split()
)
PIPELINE_TAGS = frozenset("image-segmentation mask-generation object-detection image-classification".split())
KEYS = ("task", "dataset", "metrics")


def metadata_of(card: str) -> Any:
    """The YAML between the first two lines of dashes; None if there is none."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def metadata_errors(card: str) -> list[str]:
    """The problems that the Hub would reject, one sentence each."""
    try:
        data = metadata_of(card)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if data is None:
        return []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    errors = []
    licenses = data.get("license", [])
    for license in [licenses] if isinstance(licenses, str) else licenses:
        if license not in LICENSES:
            errors.append(f'"license" must be one of the known ones, not {license!r}')
    name = data.get("license_name")
    if name is not None and (data.get("license") != "other" or not re.fullmatch(r"[a-z0-9-.]+", str(name))):
        errors.append('"license_name" goes with license: other, in small letters')
    link = data.get("license_link")
    if link is not None and not re.match(r"https?://|LICENSE", str(link)):
        errors.append('"license_link" must be a URL or LICENSE')
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINE_TAGS:
        errors.append('"pipeline_tag" is not known')
    for key in ("tags", "datasets"):
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            errors.append(f'"{key}" must be a list of strings')
    for dataset in data.get("datasets") or []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(dataset)):
            errors.append(f'"datasets" has {dataset!r}, which is no id')
    return errors + _index_errors(data.get("model-index", []))


def _index_errors(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be a list']
    errors = []
    for model in index:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append('"model-index[].name" is required')
            continue
        for result in model.get("results") or [None]:
            if not isinstance(result, dict) or any(key not in result for key in KEYS):
                errors.append('"model-index[].results[]" needs task, dataset and metrics')
                continue
            if not isinstance(result["task"].get("type"), str):
                errors.append('"task.type" is required')
            if any(not isinstance(result["dataset"].get(key), str) for key in ("type", "name")):
                errors.append('"dataset.type" and "dataset.name" are required')
            for metric in result["metrics"] or [{}]:
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append('"metrics[].type" and "metrics[].value" are required')
            source = result.get("source")
            if source is not None and not str(source.get("url", "")).startswith("http"):
                errors.append('"source.url" is required where there is a source')
    return errors
