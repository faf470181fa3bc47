"""Pictures to try the page with: those of a folder, or scenes of digits for a model of digits."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ..family.digits import LABELS
from ..model.image_loading_faim2f import IMAGE_SUFFIXES
from .limits import Limits, WebError
from .upload import open_picture

MOST = 8
# Browsers show no others.
SUFFIXES = tuple(
    suffix
    for suffix in IMAGE_SUFFIXES
    if suffix in (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif")
)
# Held-out scenes, enlarged for the eye; the model resizes them anyway.
SCENES, SCENE_SIZE = 6, 384


def example_pictures(folder: Path | None, id2label: Mapping[int, str], limits: Limits, into: Path) -> list[Path]:
    """The files of the examples; at most `MOST`, and none for a model that there are none for.

    Args:
        folder: of pictures, by name; None for those that come with the package.
        id2label: of the model.
        into: the folder in which examples are written that are no files yet.

    Raises:
        ValueError: the folder has no picture, or one that the page would refuse.
    """
    if folder is not None:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise ValueError(f"There is no picture in {folder} ({', '.join(SUFFIXES)}).")
        for path in paths[:MOST]:
            open_picture(path, str(path), limits).close()
        return paths[:MOST]
    if list(id2label.values()) != LABELS:
        return []
    try:
        from ..data.digits import DigitScenes

        scenes = DigitScenes("test", SCENES)
        pixels = [scenes[index]["image"].permute(1, 2, 0).numpy() for index in range(SCENES)]
    except ImportError as error:  # scikit-learn, which has the digits
        raise WebError(
            f"The examples of digits need {error.name}, which cannot be imported ({error}): install hf-faim2f[app]."
        ) from error
    paths = []
    for number, values in enumerate(pixels, 1):
        path = into / f"scene-{number}.png"
        Image.fromarray(values).resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


__all__ = ["example_pictures"]
