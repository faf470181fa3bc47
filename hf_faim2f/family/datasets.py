"""The public data sets that the family was trained on: what a card says of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dataset:
    """A public data set.

    Args:
        name: what it is called.
        hub_id: its id on the Hub, for a card's metadata.
        format: what `faim2f evaluate --format` calls it.
        url: its makers' page.
        training, validation: images in these parts.
        split: the part that published figures were measured on.
        scenes: what its images show.
        terms: what its makers allow.
    """

    name: str
    hub_id: str
    format: str
    url: str
    training: int
    validation: int
    split: str
    scenes: str
    terms: str


DATASETS = {
    "ade20k": Dataset(
        "ADE20K",
        "scene_parse_150",
        "ade20k",
        "https://groups.csail.mit.edu/vision/datasets/ADE20K/",
        20210,
        2000,
        "validation",
        "everyday scenes, indoors and outdoors",
        "its images are for non-commercial research and education",
    ),
    "coco": Dataset(
        "COCO",
        "coco",
        "coco-instance",
        "https://cocodataset.org",
        118287,
        5000,
        "val2017",
        "photographs of common objects in their surroundings",
        "its annotations are CC BY 4.0, its images under the terms of Flickr",
    ),
}

__all__ = ["DATASETS", "Dataset"]
