"""Videos of moving digits, with the identity and mask of every digit in every frame, and other videos for tests."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIDE = 192
DIGITS = (3, 0, 7, 4)
INK = 0.35


class Scene(NamedTuple):
    """A frame (H, W, 3) uint8, and the mask (H, W) bool of each visible digit by its identity."""

    pixels: np.ndarray
    masks: dict[int, np.ndarray]


def moving_digits(frames: int, side: int = SIDE) -> list[Scene]:
    """Digits whose paths cross, over a photograph; the third one appears after a third of the frames."""
    from sklearn.datasets import load_digits, load_sample_image

    data = load_digits()
    glyphs = [data.images[np.flatnonzero(data.target == digit)[2]] / 16 for digit in DIGITS]
    size = side // 3
    inks = [
        np.asarray(Image.fromarray(np.pad(glyph, 1).astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
        for glyph in glyphs
    ]
    colors = [(235, 230, 210), (245, 235, 190), (240, 210, 240), (210, 245, 240)]
    # Start and end of the upper left corners, as fractions of the free space.
    ways = [((0.0, 0.1), (1.0, 0.2)), ((1.0, 0.9), (0.0, 0.75)), ((0.05, 0.5), (0.55, 0.55)), ((0.95, 0.0), (0.6, 1.0))]
    photograph = Image.fromarray(load_sample_image("china.jpg")).crop((330, 220, 530, 420)).resize((side, side))
    ground = 0.5 * np.asarray(photograph, dtype=np.float64)
    scenes = []
    for frame in range(frames):
        part = frame / max(1, frames - 1)
        canvas = ground.copy()
        masks: dict[int, np.ndarray] = {}
        for number, (ink, color, (start, end)) in enumerate(zip(inks, colors, ways, strict=True)):
            if number == 2 and part < 1 / 3:
                continue
            left, top = (
                round((a + (b - a) * part) * (side - size)) for a, b in zip(start, end, strict=True)
            )  # fmt: skip
            opacity = np.clip((ink - INK) / 0.3 + 0.5, 0, 1)[..., None]
            window = (slice(top, top + size), slice(left, left + size))
            canvas[window] = opacity * np.array(color) + (1 - opacity) * canvas[window]
            for mask in masks.values():
                mask[window] &= ink <= INK
            masks[number] = np.zeros((side, side), dtype=bool)
            masks[number][window] = ink > INK
        scenes.append(Scene(canvas.astype(np.uint8), masks))
    return scenes


def write_film(
    path: Path,
    frames: Iterable[np.ndarray],
    pts: Iterable[int] | None = None,
    *,
    time_base: Fraction = Fraction(1, 1000),
    rotation: int = 0,
    sound: str | None = None,
    sound_seconds: float = 1.0,
    codec: str = "libx264",
    start: int = 0,
    **options: Any,
) -> None:
    """Writes frames (H, W, 3) uint8 with PyAV, in the container given by the path's suffix.

    Args:
        path: the file.
        frames: all of one even size.
        pts: time stamps in units of `time_base`; 40 apart by default.
        time_base: in seconds.
        rotation: the display rotation, in degrees counterclockwise.
        sound: an audio codec; None for no audio.
        sound_seconds: length of the audio.
        codec: the video codec.
        start: the time at which frames and audio start, in seconds.
        options: options of the container.
    """
    import av

    frames = list(frames)
    pts = list(pts) if pts is not None else [40 * number for number in range(len(frames))]
    with av.open(str(path), "w", options=options) as container:
        settings = {"crf": "12", "preset": "veryfast"} if codec == "libx264" else {}
        video: Any = container.add_stream(codec, options=settings)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.time_base = video.codec_context.time_base = time_base
        if rotation:
            video.set_display_rotation(rotation)
        audio: Any = None if sound is None else container.add_stream(sound, rate=48000, layout="mono")
        if audio is not None:
            rate, step = 48000, audio.codec_context.frame_size or 1024
            for first in range(0, int(rate * sound_seconds), step):
                wave = np.sin(np.arange(first, first + step) * 2 * np.pi * 440 / rate).astype(np.float32)
                tone = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
                tone.rate, tone.pts, tone.time_base = rate, first + start * rate, Fraction(1, rate)
                for piece in av.AudioResampler(audio.codec_context.format, "mono", rate).resample(tone):
                    container.mux(audio.encode(piece))
            container.mux(audio.encode(None))
        for pixels, stamp in zip(frames, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp + round(start / time_base), time_base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


class Read(NamedTuple):
    """A video as read by plain PyAV: upright frames, their times in seconds, and the audio packets."""

    frames: list[np.ndarray]
    seconds: list[float]
    sound: int
    rotation: int


def read_film(path: Path) -> Read:
    import av

    with av.open(str(path)) as container:
        frames, seconds, rotation = [], [], 0
        decoded: Any = container.decode(video=0)
        for frame in decoded:
            frames.append(frame.to_ndarray(format="rgb24"))
            seconds.append(float(frame.pts * frame.time_base))
            rotation = frame.rotation
    with av.open(str(path)) as container:
        sound = sum(1 for packet in container.demux() if packet.stream.type == "audio" and packet.size)
    return Read(frames, seconds, sound, rotation)
