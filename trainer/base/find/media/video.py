"""Videos. The base's processor chooses their frames, and FFmpeg decodes these, through PyAV.

To learn which frames the processor samples, Capstan gives it a video without pixels. It decodes only those frames, and
passes them to the processor with the metadata of the file, as transformers' own reader does:

    a file of 90 frames, 30 a second    the processor samples 0, 15, 30, 45, 60, 75    six decoded frames, their times

A file may have been made to do harm. So FFmpeg gets its bytes, never its name, and reads only the containers and codecs
that are listed here. Others, such as playlists, could open files and addresses.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.base.find.media import Modality, NotOfModality, Shown
from trainer.base.find.media.ffmpeg import check_codec, pyav, reason
from trainer.base.find.media.still import STILL, Size, decoded, photo, png_of, size_of
from trainer.errors import ConfigError, DataError, counted, first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Generator

    from trainer.config.data import Data

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg,gif"
_CODECS = (
    *("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg1video", "mpeg2video", "mpeg4"),
    *("msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "flv", "wmv1", "wmv2", "wmv3", "vc1", "theora", "mjpeg", "gif"),
)
_MOST_PIXELS = 2**25  # of a frame
_LONGEST_SIDE = 2**16 - 1  # of a frame
_MOST_FRAMES = 2**16 - 1  # that are sampled
_MOST_STORED = 2**20  # in a file
_MOST_SAMPLED = 2**29  # pixels of all sampled frames
_LISTED = b"frames of a video\n"
"""Begins the content of a video that a row gives as a list of pictures."""
_LISTED_FPS = 2.0
"""How many of such frames LLaMA-Factory and ms-swift take for a second."""
_UNSAMPLED = 32
"""How many frames of a video Capstan takes if the processor samples none by itself."""
_EXAMPLE_FPS, _EXAMPLE_SHARES = 24, (12, 24, 48)
"""An example has 24 frames a second, of which a processor takes one of 12, or one of more."""
_CUT = ("video_start", "video_end")
"""With these keys qwen-vl-utils takes a part of a file. A text about the part would be trained with all of it."""


class Clip(NamedTuple):
    """A video as the processor gets it: its number of frames, and their height and width in pixels.

    `indices` are the numbers of these frames in the file, which has `total` frames, `fps` in a second. The index of a
    data set leaves out `indices`, `total` and `fps`, because they can be read from the file again."""

    height: int
    width: int
    frames: int
    indices: tuple[int, ...] = ()
    total: int = 0
    fps: float = 24.0

    @property
    def modality(self) -> Modality:
        return VIDEO

    @property
    def without_times(self) -> "Clip":
        return Clip(self.height, self.width, self.frames)

    def metadata(self) -> dict[str, Any]:
        """transformers' `VideoMetadata`."""
        return {
            "total_num_frames": self.total or self.frames,
            "fps": self.fps,
            "duration": (self.total or self.frames) / self.fps,
            "height": self.height,
            "width": self.width,
            "video_backend": "pyav",
            "frames_indices": list(self.indices) or list(range(self.frames)),
        }


class Video:
    """Videos, as `Modality`."""

    number = 1
    noun = "video"
    kind = "video"
    fields: tuple[str, ...] = ("videos", "video")
    parts: tuple[str, ...] = ("video", "video_url")
    endings: tuple[str, ...] = (
        *("mp4", "m4v", "mov", "3gp", "webm", "mkv", "avi", "flv", "mpg", "mpeg", "ts", "mts", "m2ts", "asf", "wmv"),
        "ogv",
    )
    tag = "<video>"
    smaller_by: tuple[str, ...] = ("data.videos.max_frames", "data.videos.max_pixels")
    held: tuple[str, ...] = ("bytes", "base64", "video", "path", "url", "video_url")
    usual = Clip(360, 640, 16)
    small = Clip(64, 96, 4)
    tried: Sequence[tuple[Any, ...]] = ((Clip(64, 96, 4),), (Clip(112, 64, 6), Clip(96, 160, 4)), ())

    def check(self, content: bytes) -> None:
        with _opened(content) as video:
            video.stored()

    def shape_of(self, content: bytes, data: "Data", processor: Any) -> Clip:
        try:
            with _opened(content) as video:
                stored = video.stored()
                clip = _sampled(
                    stored, data.videos.limited((stored.height, stored.width)), processor, data.videos.max_frames
                )
                if clip.frames * clip.height * clip.width > _MOST_SAMPLED:
                    raise DataError(
                        f"has {clip.frames} sampled frames of {clip.width} x {clip.height} pixels, more than the"
                        f" {_MOST_SAMPLED:,} pixels allowed. Set data.videos.max_frames"
                    )
                for _ in video.frames(clip.indices):
                    pass
        except (DataError, ConfigError):
            raise
        except Exception as error:  # a decoder may raise any error for a damaged file
            raise DataError(f"is damaged ({reason(error)})") from error
        return clip

    def made(self, given: Mapping[str, Any]) -> bytes | None:
        if any(given.get(name) is not None for name in _CUT):
            raise DataError(f"a video has {' or '.join(_CUT)}, which are not read. Cut the file itself")
        return None

    def joined(self, pictures: Iterable[bytes]) -> bytes:
        return _LISTED + b"".join(len(one).to_bytes(8, "little") + one for one in pictures)

    def numbers(self, shape: Clip) -> tuple[int, int]:
        return shape.height << 16 | shape.width, shape.frames

    def kept(self, first: int, second: int) -> Clip:
        height, width = first >> 16, first & 0xFFFF
        if not (0 < height * width <= _MOST_PIXELS and 0 < second <= _MOST_FRAMES):
            raise ValueError(f"{second} frames of {width} x {height} pixels")
        return Clip(height, width, second)

    def length(self, shape: Clip) -> None:
        return None

    def shown(self, content: bytes, kept: Clip, processor: Any) -> Shown:
        import numpy as np

        with _opened(content) as video:
            clip = _sampled(video.stored(), (kept.height, kept.width), processor, kept.frames)
            if clip.frames != kept.frames:
                raise DataError(f"{self.title(clip)}, and not a {self.title(kept)}")
            frames = {index: _scaled(frame, kept) for index, frame in video.frames(clip.indices)}
        return Shown(clip, (np.stack([frames[index] for index in clip.indices]), clip.metadata()))

    def blank(self, shape: Clip) -> Shown:
        import numpy as np

        return Shown(shape, (np.zeros((shape.frames, shape.height, shape.width, 3), np.uint8), shape.metadata()))

    def noise(self, shape: Clip, draw: "Generator") -> Shown:
        import torch

        size = (shape.frames, shape.height, shape.width, 3)
        return Shown(shape, (torch.randint(0, 256, size, generator=draw, dtype=torch.uint8).numpy(), shape.metadata()))

    def example(self, shape: Clip, processor: Any) -> bytes:
        """The processor samples one of 12 frames, if it samples two a second, or one of more."""
        for share in _EXAMPLE_SHARES:
            stored = _Stored(shape.height, shape.width, share * shape.frames, _EXAMPLE_FPS)
            if _sampled(stored, shape[:2], processor, shape.frames).frames == shape.frames:
                return _encoded(stored)
        return self.joined([STILL.example(Size(*shape[:2]), processor)] * shape.frames)

    def arguments(self, contents: Sequence[Any], processor: Any) -> dict[str, Any]:
        videos, metadata = zip(*contents, strict=True)
        # A processor may change the metadata.
        said = {"video_metadata": [dict(one) for one in metadata], "return_metadata": True}
        return {"videos": list(videos), "do_sample_frames": False, **said}

    def part(self, file: Shown) -> dict[str, Any]:
        from PIL import Image

        frames, _ = file.content
        # vLLM knows a list of frames by this type. It takes files of any format that Pillow reads.
        listed = ",".join(png_of(Image.fromarray(frame)) for frame in frames)
        return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{listed}"}}

    def beside_parts(self, files: Sequence[Shown]) -> dict[str, Any]:
        said, *others = [file.content[1] for file in files]
        names = ("fps", "frames_indices", "total_num_frames", "duration")
        if any(other[name] != said[name] for other in others for name in names):
            raise DataError(
                "a text has several videos, whose frames have different times, and a request to a server can give"
                " only the times of one"
            )
        times = {name: said[name] for name in names}
        return {"media_io_kwargs": {"video": {**times, "num_frames": -1, "do_sample_frames": False}}}

    def preview(self, content: bytes) -> "Image":
        from PIL import Image

        with _opened(content) as video:
            video.stored()
            (first,) = [frame for _, frame in video.frames([0])]
        return Image.fromarray(first)

    def browsed(self, content: bytes) -> Sequence[tuple[str, bytes]]:
        if content.startswith(_LISTED):
            return [part for frame in _Listed(content).pictures for part in STILL.browsed(frame)]
        return [("video/mp4", content)]  # browsers find out what it is

    def title(self, kept: Clip) -> str:
        return f"video of {counted(kept.frames, 'frame')} of {kept.width} x {kept.height} pixels"


VIDEO = Video()
MODALITIES: dict[str, Modality] = {"video": VIDEO}


class _Stored(NamedTuple):
    """A video in its file: `total` frames, `fps` in a second, of this height and width in pixels. If it is `chosen`,
    the author of the rows has already sampled its frames, and the processor does not."""

    height: int
    width: int
    total: int
    fps: float
    chosen: bool = False


@contextmanager
def _opened(content: bytes) -> "Iterator[_Coded | _Listed]":
    """The opened file of a video. Raises `DataError`, with a clause, if it cannot be opened."""
    if content.startswith(_LISTED):
        yield _Listed(content)
        return
    av = pyav("video")
    lists = {"format_whitelist": _CONTAINERS, "protocol_whitelist": ""}
    try:
        opened = av.open(io.BytesIO(content), options=lists, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise NotOfModality(
            f"is no video that can be read, or it is damaged. Capstan reads {_CONTAINERS.replace(',', ', ')}"
        ) from error
    with opened as file:
        yield _Coded(file)


class _Listed:
    """A video that a row gives as a list of pictures, each of which is a frame."""

    def __init__(self, content: bytes) -> None:
        self.pictures, at = list[bytes](), len(_LISTED)
        while at < len(content):
            begin = at + 8
            at = begin + int.from_bytes(content[at:begin], "little")
            self.pictures.append(content[begin:at])

    def stored(self) -> _Stored:
        """Raises `DataError`, with a clause, if a frame is no picture, or their sizes differ."""
        if not 0 < len(self.pictures) <= _MOST_FRAMES:
            raise DataError(f"has {len(self.pictures):,} frames, and 1 to {_MOST_FRAMES:,} are allowed")
        try:
            sizes = set(map(size_of, self.pictures))
        except DataError as error:
            raise DataError(f"has a frame that {error}") from error
        if len(sizes) > 1:
            raise DataError("has frames of different sizes. Give them one size")
        ((height, width),) = (_allowed(*size) for size in sizes)
        return _Stored(height, width, len(self.pictures), _LISTED_FPS, chosen=True)

    def frames(self, indices: Sequence[int]) -> "Iterator[tuple[int, NDArray[np.uint8]]]":
        import numpy as np

        for index in indices:
            yield index, np.asarray(decoded(self.pictures[index]))


class _Coded:
    """A video in a file that PyAV has opened."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def stored(self) -> _Stored:
        """Return the size, the number of frames and the rate of the video. Raises `DataError`, with a clause, if it
        cannot be trained on."""
        if not self._file.streams.video:
            raise NotOfModality("has no video stream")
        stream = self._file.streams.video[0]
        check_codec(stream, _CODECS, "h264")
        stream.codec_context.thread_count = 1  # processes read several videos at once
        height, width = _allowed(stream.height, stream.width)
        total = read = 0
        for packet in self._file.demux(stream):
            read += 1
            total += bool(packet.size) and not packet.is_discard
            if total > _MOST_STORED:
                raise DataError(f"has more than the {_MOST_STORED:,} frames allowed")
        if read < stream.frames:
            raise DataError(f"ends after {read} of {stream.frames} frames. Replace the file")
        if not total:
            raise DataError("has no frames")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if not 0 < fps < 10_000:
            raise DataError("does not say how many frames a second has")
        return _Stored(height, width, total, fps)

    def frames(self, indices: Sequence[int]) -> "Iterator[tuple[int, NDArray[np.uint8]]]":
        """The frames with these numbers, each (height, width, 3) in red, green and blue.

        Raises `DataError` if the file ends before the last one."""
        self._file.seek(0)
        wanted, last, number = frozenset(indices), max(indices), -1
        for number, frame in enumerate(self._file.decode(video=0)):
            if number in wanted:
                yield number, frame.to_ndarray(format="rgb24")
            if number >= last:
                return
        raise DataError(f"ends after {number + 1} of at least {last + 1} frames. Replace the file")


def _allowed(height: int, width: int) -> tuple[int, int]:
    """The height and width of frames. Raises `DataError`, with a clause, if frames may not have them."""
    if not 0 < height * width <= _MOST_PIXELS or max(height, width) > _LONGEST_SIDE:
        raise DataError(
            f"has frames of {width} x {height} pixels, more than {_MOST_PIXELS:,} pixels or {_LONGEST_SIDE:,} at a side"
        )
    return height, width


def _encoded(stored: _Stored) -> bytes:
    """A video of `stored.total` frames in H.264. It repeats its first second."""
    import numpy as np

    av, buffer = pyav("video"), io.BytesIO()
    pixels = np.asarray(photo(stored.height + stored.height % 2, stored.width + stored.width % 2))
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=_EXAMPLE_FPS, options={"preset": "veryfast", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
        moved = [np.roll(pixels, 8 * number, 1) for number in range(min(stored.total, _EXAMPLE_FPS))]
        frames = [*(av.VideoFrame.from_ndarray(one, format="rgb24") for one in moved), None]
        second = [(bytes(packet), packet.is_keyframe) for frame in frames for packet in stream.encode(frame)]
        for number in range(stored.total):
            content, begins = second[number % len(second)]
            packet = av.Packet(content)
            packet.stream, packet.is_keyframe = stream, begins
            packet.pts = packet.dts = number
            packet.time_base = Fraction(1, _EXAMPLE_FPS)
            file.mux(packet)
    return buffer.getvalue()


class _Asked(Exception):
    """A processor asked for the frames with these numbers."""

    def __init__(self, indices: Any) -> None:
        self.indices = tuple(int(index) for index in indices)


def _scaled(frame: "NDArray[np.uint8]", kept: Clip) -> "NDArray[np.uint8]":
    """A frame in the height and width of `kept`."""
    if frame.shape[:2] == (kept.height, kept.width):
        return frame
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((kept.width, kept.height), Image.Resampling.BICUBIC))


def _sampled(stored: _Stored, size: tuple[int, int], processor: Any, most: int | None) -> Clip:
    """The video as the processor gets it: frames of this `size`, and of the frames that transformers' `processor`
    samples at most `most`, evenly spaced.

    Raises `DataError` if the processor refuses the video."""
    indices: tuple[int, ...] = tuple(range(stored.total))
    if not stored.chosen:
        if getattr(processor.video_processor, "do_sample_frames", False):
            indices = _asked_for(stored, processor)
        elif most is None:
            most = _UNSAMPLED
    most = min(most or _MOST_FRAMES, _MOST_FRAMES)
    if len(indices) > most:
        indices = tuple(indices[number * len(indices) // most] for number in range(most))
    return Clip(*size, len(indices), indices, stored.total, stored.fps)


def _asked_for(stored: _Stored, processor: Any) -> tuple[int, ...]:
    import numpy as np

    class Asking(np.ndarray):
        """A video that has no memory for its pixels, and says which frames it is asked for."""

        def __getitem__(self, key: Any) -> Any:
            raise _Asked(key)

    pixels = np.broadcast_to(np.zeros((), np.uint8), (stored.total, stored.height, stored.width, 3)).view(Asking)
    metadata: Mapping[str, Any] = {
        **Clip(stored.height, stored.width, stored.total, (), stored.total, stored.fps).metadata(),
        "frames_indices": None,
    }
    try:
        processor(text=[processor.video_token], videos=[pixels], video_metadata=[dict(metadata)])
    except _Asked as asked:
        return asked.indices
    except Exception as error:  # a processor may raise any error for a video that it cannot sample
        if stored.total < (getattr(processor.video_processor, "num_frames", None) or 0):
            return tuple(range(stored.total))  # one that is shorter than its usual number of frames
        raise DataError(
            f"has {counted(stored.total, 'frame')}, {stored.fps:g} a second, and is refused by the base's processor"
            f" ({first_line(error)})"
        ) from error
    raise DataError("is read whole by the base's processor, although it is set to sample frames (do_sample_frames)")
