"""Videos: reading frames upright with their time stamps, and writing a video of frames with the sound of another.

PyAV (the extra `video`) decodes and encodes. Videos are untrusted, so only common containers are opened, frames
have at most as many pixels as Pillow considers safe, and stated durations and numbers of frames are not trusted.
"""

import io
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..download import bare_url
from ..errors import VideoError, first_line
from ..files import printable

# The suffixes by which videos are recognized.
FILM_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".ogv",
    ".3gp",
)  # fmt: skip
# The containers that are opened, by FFmpeg's names. Playlists, which name other files and hosts, are not among them.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv,ogg"
# The additional formats of stream URLs.
STREAMS = f"{CONTAINERS},rtsp,rtp,hls,mpjpeg,mjpeg,h264,hevc"
SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")
# FFmpeg's name of the device for cameras, and its name of a camera.
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
# Seconds to wait for a stream to respond, and for its next frame.
PATIENCE = (10.0, 10.0)
# Threads that decode: each of them holds frames.
DECODERS = 8
# The finest time base that is written, in seconds.
FINEST = Fraction(1, 1_000_000)
# Without time stamps and a rate.
USUAL_RATE = 25
# Time stamps that go back by more than this, in seconds, start again, as in joined recordings: they are shifted.
SET_BACK = 0.1
# Limit on buffered audio packets that wait for their frames, in bytes; further packets are dropped.
MOST_SOUND = 1 << 26
# A video that ends this long before its stated end, in seconds and as a fraction of it, counts as truncated.
SHORT, SHORT_SHARE = 0.5, 0.05
# The matrices, without their translations, that turn and mirror frames, and the transpositions that do the same.
TURNS: dict[tuple[int, ...], Image.Transpose] = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
SIDEWAYS = {
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
}
# The video encoders, best first, and their settings.
ENCODERS = {"libx264": {"preset": "veryfast", "crf": "20"}, "libopenh264": {}, "mpeg4": {"qscale": "3"}}
BT709 = 1  # FFmpeg's number of this color standard


def names_film(word: str) -> bool:
    """Whether an argument names a video: a file by its suffix, a stream by its URL, or a camera by its index."""
    return is_live(word) or Path(word).suffix.lower() in FILM_SUFFIXES


def is_live(word: str) -> bool:
    """Whether an argument is a stream URL or a camera's index."""
    match = re.match(r"([a-z]+)://", word)
    return bool(match and match[1] in SCHEMES) or (word.isdecimal() and not os.path.lexists(word))


@dataclass
class Frame:
    """A frame of a video.

    Attributes:
        index: its number in the video, from 0.
        pts: its time stamp in units of the video's time base, from the video's start on; larger than that of the frame
            before.
        seconds: the same in seconds.
        image: RGB and upright.
    """

    index: int
    pts: int
    seconds: float
    image: Image.Image


class Film:
    """An open video; a context manager that closes it.

    Attributes:
        name: what messages call it; of a URL only the parts that are no secret.
        time_base: seconds per unit of time stamps.
        stated_frames: the number of frames that the file states, which may be wrong; None for none.
        start: the time stamp, in seconds, at which the video starts; recordings often do not start at 0.
        damaged: the number of packets so far that could not be decoded.
        ended: why it ended early; empty if it did not.
        unusable: a sentence about a later frame that cannot be used, at which the caller stopped; empty for none.
        sound: buffered audio packets, for `take_sound`.
        lost_sound: whether some audio was dropped.

    Args:
        source: a path, a stream URL, or a camera's index.

    Raises:
        VideoError: it cannot be opened, has no video stream, or its frames are too large.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self._av = _library()
        word = os.fspath(source)
        self.is_live = is_live(word)
        self.name = printable(bare_url(word) if self.is_live else word)
        self.limit = Image.MAX_IMAGE_PIXELS
        self.container = self._open(word)
        try:
            if not self.container.streams.video:
                raise VideoError(f"{self.name} has no video stream, so there is nothing to segment.")
            self.stream = self.container.streams.video[0]
            context = self.stream.codec_context
            if context is None:
                raise VideoError(f"{self.name} has a codec that PyAV cannot decode: convert it to H.264.")
            self._check_size(context.width, context.height)
            self.stream.thread_type = "AUTO"
            context.thread_count = min(DECODERS, os.cpu_count() or 1)
        except BaseException:
            self.container.close()
            raise
        own = self.stream.time_base
        self.own_base = own if own else Fraction(1, 1000)
        self.time_base = max(self.own_base, FINEST)
        self.start = Fraction(max(0, self.container.start_time or 0), 1_000_000)
        self.audio = self.container.streams.audio[0] if self.container.streams.audio else None
        self.stated_frames: int | None = self.stream.frames or None
        self.aspect: Fraction | None = self.stream.sample_aspect_ratio or None
        self.damaged, self.ended, self.unusable, self.reached = 0, "", "", 0.0
        self.sound: deque[Any] = deque()
        self.sound_size, self.lost_sound = 0, False

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Reads the video; call it once. Yields every `every`-th frame, from the first on.

        Packets that cannot be decoded are skipped and counted. A video that breaks off ends there, with the reason in
        `ended`.

        Raises:
            VideoError: the first frames cannot be decoded, or a frame is too large.
        """
        last: int | None = None
        first = None if self.is_live else round(self.start / self.time_base)
        step = max(1, round(1 / ((self.stream.average_rate or USUAL_RATE) * self.time_base)))
        shift = 0
        for index, decoded in enumerate(self._decoded()):
            if decoded.pts is None:
                pts = 0 if last is None else last + step
            else:
                stamp = round(decoded.pts * self.own_base / self.time_base)
                if first is None:  # cameras' time stamps start when they are switched on
                    first, self.start = stamp, stamp * self.time_base
                    shift = 0 if last is None else last + step  # after frames without a time stamp
                pts = stamp - first + shift
                if last is not None and (last - pts) * self.time_base > SET_BACK:
                    shift += last + step - pts
                    pts = last + step
            # Frames with equal time stamps would be merged.
            pts = pts if last is None else max(pts, last + 1)
            last = pts
            if index % every == 0:
                self._check_size(decoded.width, decoded.height)
                turn = _turn(decoded)
                if index == 0 and turn in SIDEWAYS and self.aspect:
                    self.aspect = 1 / self.aspect
                image = decoded.to_image()
                yield Frame(index, pts, float(pts * self.time_base), image if turn is None else image.transpose(turn))
        if last is None:
            raise VideoError(f"{self.name} has no frame that can be decoded: it is empty, truncated or damaged.")

    def problem(self, frames: int) -> str | None:
        """A sentence about what could not be read; None if all could.

        Args:
            frames: the number of frames that were read.
        """
        if self.unusable:
            reason = self.unusable.rstrip(".")
            return f"{reason}; the video ends before this frame, with {frames} of its frames written."
        if not self.damaged and not self.ended:
            return None
        lost = f"{self.damaged} damaged packet{'s' if self.damaged > 1 else ''}" if self.damaged else ""
        reasons = " and ".join(reason for reason in (lost, self.ended) if reason)
        what = "ended early" if self.is_live and not self.damaged else "is truncated or damaged"
        return f"{self.name} {what} ({reasons}): {frames} of its frames could be read, and are written."

    def _open(self, word: str) -> Any:
        settings: dict[str, Any] = {"options": {} if self.limit is None else {"max_pixels": str(self.limit)}}
        address = word
        if not self.is_live:
            address = os.path.abspath(word)  # an absolute path is never taken for a URL
            settings["options"] |= {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        elif word.isdecimal():
            if sys.platform not in CAMERAS:
                raise VideoError(f"Cameras cannot be opened on {sys.platform}: name a video file or a stream URL.")
            settings["format"], pattern = CAMERAS[sys.platform]
            address = pattern.format(word)
        else:
            settings["timeout"] = PATIENCE
            settings["options"] |= {"format_whitelist": STREAMS}
        try:
            return self._av.open(address, **settings)
        except (self._av.FFmpegError, OSError, ValueError) as error:
            reason = _reason(error)
        if word.isdecimal() and self.is_live:
            raise VideoError(f"There is no camera {word} ({reason}): name a video file, a stream URL or another index.")
        if self.is_live:
            raise VideoError(f"{self.name} cannot be opened: {reason}.")
        empty = os.path.isfile(word) and os.path.getsize(word) == 0
        what = "it is empty" if empty else f"{reason}; it is not a video, truncated, or in an unsupported container"
        raise VideoError(f"{self.name} cannot be opened as a video: {what}.")

    def _check_size(self, width: int, height: int) -> None:
        if self.limit is not None and width * height > self.limit:
            raise VideoError(
                f"{self.name} has frames of {height}x{width} pixels (height x width), more than the {self.limit} that "
                "Pillow considers safe: if you trust the video, raise PIL.Image.MAX_IMAGE_PIXELS."
            )

    def _decoded(self) -> Iterator[Any]:
        """Yields the decoded frames, and buffers the audio between them."""
        streams = [self.stream] if self.audio is None else [self.stream, self.audio]
        packets = self.container.demux(streams)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                self._check_length()
                return
            except (self._av.FFmpegError, OSError) as error:  # EOFError if the container reports truncation
                is_quiet = isinstance(error, self._av.error.ExitError)  # the timeout
                self.ended = f"it sent nothing for {PATIENCE[1]:g} seconds" if is_quiet else _reason(error)
                packet = None
            if packet is not None and packet.pts is not None:
                self.reached = max(self.reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet is not None and packet.stream is self.audio:
                self._keep(packet)
                continue
            if packet is not None and packet.size and packet.is_corrupt:
                self.damaged += 1
            try:
                frames = self.stream.decode(packet)  # None flushes the decoder
            except (self._av.FFmpegError, ValueError, MemoryError):
                self.damaged += 1
                frames = []
            yield from frames
            if packet is None:
                return

    def _check_length(self) -> None:
        """Detects truncation that the container does not report: the video ends long before its stated end."""
        stated = float((self.stream.duration or 0) * self.own_base) or (self.container.duration or 0) / 1e6
        # Matroska states the last time stamp.
        reached = self.reached - (0 if "matroska" in self.container.format.name else float(self.start))
        if not self.is_live and stated - reached > max(SHORT, SHORT_SHARE * stated):
            self.ended = f"it states {stated:.1f} seconds, but ends after {max(0.0, reached):.1f}"

    def _keep(self, packet: Any) -> None:
        if packet.dts is None:  # the end
            return
        if self.sound_size + packet.size > MOST_SOUND:
            self.lost_sound = True
            return
        self.sound_size += packet.size
        self.sound.append(packet)

    def take_sound(self) -> Iterator[Any]:
        """Yields the buffered audio packets and removes them from the buffer."""
        while self.sound:
            packet = self.sound.popleft()
            self.sound_size -= packet.size
            yield packet

    def __enter__(self) -> "Film":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()


class FilmWriter:
    """Writes frames to an MP4 file, with the unchanged audio of a video; `finish` makes the file playable.

    Args:
        file: binary, open for writing, seekable.
        film: the video whose time base, pixel aspect ratio and audio are used.
        size: (width, height) of the first frame. Frames of other sizes are resized to it. A last odd row or column is
            repeated, because most players require even sizes.
    """

    def __init__(self, file: BinaryIO, film: Film, size: tuple[int, int]) -> None:
        self._av = _library()
        self.film, self.size = film, size
        self.even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        self.sound = film.audio if film.audio is not None and self._takes_sound(film.audio) else None
        self.container = self._av.open(file, "w", format="mp4")
        self.video = self._add_video(self.container)
        self.audio = None if self.sound is None else self.container.add_stream_from_template(self.sound)
        self.lost_sound = film.audio is not None and self.sound is None

    def add(self, image: Image.Image, pts: int) -> None:
        """Writes a frame.

        Raises:
            VideoError: it cannot be encoded.
        """
        if image.size != self.size:
            image = image.resize(self.size, Image.Resampling.BILINEAR)
        if self.size != self.even:
            array = np.asarray(image)
            right, below = self.even[0] - self.size[0], self.even[1] - self.size[1]
            image = Image.fromarray(np.pad(array, ((0, below), (0, right), (0, 0)), mode="edge"))
        frame = self._av.VideoFrame.from_image(image)
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts, frame.time_base = pts, self.film.time_base
        self._encode(frame)
        for packet in self.film.take_sound():
            self._mux_sound(packet)

    def finish(self) -> None:
        """Writes the remaining packets and the file's index.

        Raises:
            VideoError: it cannot be encoded.
        """
        try:
            self._encode(None)
            for packet in self.film.take_sound():
                self._mux_sound(packet)
        finally:
            self.container.close()
        self.lost_sound |= self.film.lost_sound

    def abandon(self) -> None:
        """Closes the file after an error, ignoring further errors."""
        with suppress(Exception):
            self.container.close()

    def _add_video(self, container: Any) -> Any:
        name = next(name for name in ENCODERS if name in self._av.codecs_available)
        stream = container.add_stream(name, options=ENCODERS[name])
        stream.width, stream.height = self.even
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = self.film.time_base
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709
        if self.film.aspect:
            context.sample_aspect_ratio = self.film.aspect
        return stream

    def _takes_sound(self, audio: Any) -> bool:
        """Whether MP4 supports this audio's codec; tries it on a file in memory."""
        try:
            with self._av.open(io.BytesIO(), "w", format="mp4") as trial:
                trial.add_stream_from_template(audio)
                trial.start_encoding()
        except (self._av.FFmpegError, OSError, ValueError):
            return False
        return True

    def _encode(self, frame: Any) -> None:
        try:
            for packet in self.video.encode(frame):
                self.container.mux(packet)
        except (self._av.FFmpegError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
                raise OSError(error.errno, error.strerror) from error  # such as a full disk
            raise VideoError(f"The frames of {self.film.name} cannot be encoded: {_reason(error)}.") from error

    def _mux_sound(self, packet: Any) -> None:
        if self.audio is None:
            return
        start = round(self.film.start / packet.time_base)
        packet.dts -= start
        packet.pts = None if packet.pts is None else packet.pts - start
        packet.stream = self.audio
        try:
            self.container.mux(packet)
        except (self._av.FFmpegError, ValueError):  # its time stamps are damaged
            self.audio, self.lost_sound = None, True


def _turn(frame: Any) -> Image.Transpose | None:
    """The transposition that turns a frame upright; None if it is, or is turned by another angle."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None or len(bytes(data)) != 36:
        return None
    matrix = np.frombuffer(bytes(data), dtype=np.int32).reshape(3, 3)[:2, :2] / 65536
    return TURNS.get(tuple(int(value) for value in matrix.round().ravel()))


def _reason(error: BaseException) -> str:
    """FFmpeg's reason, without error numbers and file names."""
    return str(getattr(error, "strerror", None) or first_line(error, kind=False)).rstrip(".")


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"Video needs PyAV, which cannot be imported ({error}): install hf-faim2f[video].") from error
    return av


__all__ = ["FILM_SUFFIXES", "Film", "FilmWriter", "Frame", "is_live", "names_film"]
