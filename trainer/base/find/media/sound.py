"""Sounds: speech, music and whatever else can be heard. FFmpeg decodes them, by PyAV.

The base's processor gets one channel, the mean of all of them, at its own rate:

    file    48,000 samples a second and channel, 2 channels    ->    their mean    ->    16,000 samples a second
"""

import base64
import io
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.base.find.media import Modality, NotOfModality, Shown
from trainer.base.find.media.ffmpeg import check_codec, pyav, reason
from trainer.errors import ConfigError, DataError, counted, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Generator

    from trainer.config.data import Data

    Samples = NDArray[np.float32]

_MOST_SAMPLES = 2**27  # more than two hours at 16,000 a second
_RATES = range(1_000, 384_001)
_MOST_CHANNELS = 64
# FFmpeg reads more, such as playlists, which make it open other files.
_CONTAINERS = "aac,aiff,amr,au,caf,flac,matroska,mov,mp3,ogg,w64,wav"
_CODECS = (
    *("aac", "alac", "amrnb", "amrwb", "flac", "mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float", "opus"),
    *("pcm_alaw", "pcm_mulaw", "pcm_u8", "pcm_s8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le"),
    *("pcm_s32be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be", "adpcm_ima_wav", "adpcm_ms", "vorbis"),
)
_OPTIONS = {
    "format_whitelist": _CONTAINERS,
    "codec_whitelist": ",".join(_CODECS),
    "protocol_whitelist": "none",  # the content is here, and nothing else is opened
}
_ENDS_EARLY = 0.25  # seconds
_LOUDEST = 16.0  # float samples may exceed 1 after mixing or resampling; integers exceed it by far
_UNHEARD = 10  # the trial of a processor changes the last tenth of a second


class Length(NamedTuple):
    """The number of samples that the processor gets, and their number in a second."""

    samples: int
    rate: int

    @property
    def modality(self) -> Modality:
        return SOUND

    @property
    def seconds(self) -> float:
        return self.samples / self.rate


class Sound:
    """Sounds, as `Modality`."""

    number = 2
    noun = "sound"
    kind = "audio"
    fields: tuple[str, ...] = ("audios", "audio")
    parts: tuple[str, ...] = ("audio", "audio_url", "input_audio")
    endings: tuple[str, ...] = (
        *("wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "aif", "aiff", "aifc", "amr", "au", "snd", "caf"),
        *("mka", "w64"),
    )
    tag = "<audio>"
    smaller_by: tuple[str, ...] = ()
    held: tuple[str, ...] = ("bytes", "base64", "data", "array", "audio", "path", "url", "audio_url", "input_audio")
    usual = Length(160_000, 16_000)
    small = Length(16_000, 16_000)
    tried: Sequence[tuple[Any, ...]] = ((Length(9_000, 16_000),), (Length(12_001, 16_000), Length(7_000, 16_000)), ())

    def check(self, content: bytes) -> None:
        with _opened(content) as container:
            _track(container)

    def shape_of(self, content: bytes, data: "Data", processor: Any) -> Length:
        rate = rate_of(processor)
        seconds = data.sounds.max_seconds
        try:
            samples = len(decoded(content, rate, seconds))
            if (hears := heard_at_most(processor, samples)) is not None:
                raise DataError(
                    f"has {samples / rate:.1f} seconds, and the base's processor uses only the first"
                    f" {hears / rate:.1f}. Cut the sound, or leave out such rows with data.on_bad_row: skip"
                )
        except (DataError, ConfigError):
            raise
        except Exception as error:  # decoders raise errors of any kind for damaged files
            raise DataError(f"cannot be decoded ({reason(error)})") from error
        return Length(samples, rate)

    def made(self, given: Mapping[str, Any]) -> bytes | None:
        array = given.get("array")
        try:
            return None if array is None else wave_of(array, given.get("sampling_rate"))
        except DataError as error:
            raise DataError(f"a sound {error}") from error

    def joined(self, pictures: Iterable[bytes]) -> None:
        return None

    def numbers(self, shape: Length) -> tuple[int, int]:
        return shape.samples, shape.rate

    def kept(self, first: int, second: int) -> Length:
        if not 0 < first <= _MOST_SAMPLES or second not in _RATES:
            raise ValueError(f"{first:,} samples, {second:,} a second")
        return Length(first, second)

    def length(self, shape: Length) -> int:
        return shape.samples

    def shown(self, content: bytes, kept: Length, processor: Any) -> Shown:
        samples = decoded(content, kept.rate)
        return Shown(Length(len(samples), kept.rate), samples)

    def blank(self, shape: Length) -> Shown:
        import numpy as np

        return Shown(shape, np.zeros(shape.samples, np.float32))

    def noise(self, shape: Length, draw: "Generator") -> Shown:
        import torch

        return Shown(shape, torch.empty(shape.samples).uniform_(-0.5, 0.5, generator=draw).numpy())

    def example(self, shape: Length, processor: Any) -> bytes:
        import numpy as np
        import torch

        av, buffer = pyav("sound"), io.BytesIO()
        samples = self.noise(shape, torch.Generator().manual_seed(0)).content
        with av.open(buffer, "w", format="flac") as file:
            stream = file.add_stream("flac", rate=shape.rate, layout="mono")
            frame = av.AudioFrame.from_ndarray((samples[None] * 2**15).astype(np.int16), format="s16", layout="mono")
            frame.sample_rate = shape.rate
            for part in (frame, None):
                file.mux(stream.encode(part))
        return buffer.getvalue()

    def arguments(self, contents: Sequence[Any], processor: Any) -> dict[str, Any]:
        return {"audio": list(contents), "sampling_rate": rate_of(processor)}

    def part(self, file: Shown) -> dict[str, Any]:
        data = base64.b64encode(wave_of(file.content, file.shape.rate)).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}

    def beside_parts(self, files: Sequence[Shown]) -> dict[str, Any]:
        return {}

    def preview(self, content: bytes) -> None:
        return None

    def browsed(self, content: bytes) -> Sequence[tuple[str, bytes]]:
        return [("audio/wav", content)]  # browsers find out what it is

    def title(self, kept: Length) -> str:
        return f"sound of {kept.seconds:.1f} seconds"


SOUND = Sound()
MODALITIES: dict[str, Modality] = {"sound": SOUND}


def rate_of(processor: Any) -> int:
    """How many samples a second transformers' `processor` takes."""
    part = getattr(processor, "audio_processor", None) or getattr(processor, "feature_extractor", None)
    return int(getattr(part, "sampling_rate", 16_000))


class _Hearing:
    """The longest sound that a processor takes whole, as far as is known: it takes `whole` samples, but not `more`."""

    def __init__(self, processor: Any) -> None:
        self._processor, self.whole, self.more = processor, 0, _MOST_SAMPLES + 1

    def try_all(self, samples: int) -> None:
        if self._hears_end(samples):
            self.whole = max(self.whole, samples)
        else:
            self.more = min(self.more, samples)

    def _hears_end(self, samples: int) -> bool:
        import numpy as np

        one, other = np.zeros((2, samples), np.float32)
        other[-(rate_of(self._processor) // _UNHEARD) :] = 0.5
        made = [self._made(values) for values in (one, other)]
        return None in made or any(not _alike(made[0][name], made[1][name]) for name in made[0])

    def _made(self, values: "Samples") -> Any:
        given = {"text": [self._processor.audio_token], **SOUND.arguments([values], self._processor)}
        try:
            return dict(self._processor(**given, return_tensors="pt"))
        except Exception:  # a processor may raise any error; asking for its text says which
            return None


@lru_cache(maxsize=8)
def _hearing(processor: Any) -> _Hearing:
    return _Hearing(processor)


def heard_at_most(processor: Any, samples: int) -> int | None:
    """Return how many samples transformers' `processor` uses of a sound that has `samples`. None if it uses all."""
    known = _hearing(processor)
    if known.whole < samples < known.more:
        known.try_all(samples)
    if samples < known.more:
        return None
    rate = rate_of(processor)
    while known.more - known.whole > rate // 100:
        known.try_all((known.more + known.whole) // 2)
    return known.whole - rate // _UNHEARD


def _alike(one: Any, other: Any) -> bool:
    return one.equal(other) if hasattr(one, "equal") else one == other


def decoded(content: bytes, rate: int, most_seconds: float | None = None) -> "Samples":
    """The samples (n,) of a sound, `rate` of them a second, between -1 and 1.

    Raises `DataError`, with a clause, if the sound has no samples, ends too early, or is too long. A decoder may raise
    any other error.
    """
    import numpy as np

    seconds = 0.0

    def given() -> Iterator[tuple[int, "Samples"]]:
        nonlocal seconds
        for own, samples in _mono(container.decode(stream)):
            seconds += len(samples) / own
            _check_length(seconds, most_seconds, rate)
            if not np.isfinite(samples).all():
                raise DataError("has samples that are not numbers")
            yield own, samples

    with _opened(content) as container:
        stream = _track(container)
        stream.thread_type = "SLICE"  # a thread for each frame would be slower
        said = _said_seconds(content, container, stream)
        # A file of a few kilobytes may hold hours of silence at a high rate, so each part is resampled as it comes.
        parts = list(_resampled(given(), rate))
    if not seconds:
        raise DataError("is empty")
    if said is not None and seconds < said - max(_ENDS_EARLY, said / 100):
        raise DataError(f"ends after {seconds:.2f} of its {said:.2f} seconds: the file is truncated")
    if not parts:
        raise DataError("is too short")
    return np.concatenate(parts)


def _opened(content: bytes) -> Any:
    av = pyav("sound")
    try:
        return av.open(io.BytesIO(content), options=_OPTIONS, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise NotOfModality(f"is no sound that can be read. Capstan reads {_CONTAINERS.replace(',', ', ')}") from error


def _track(container: Any) -> Any:
    if not container.streams.audio:
        raise DataError("has no sound track")
    stream = container.streams.audio[0]
    # FFmpeg's own list counts while it opens a file, and not while the file is decoded.
    check_codec(stream, _CODECS, "flac")
    return stream


def _mono(frames: Iterator[Any]) -> Iterator[tuple[int, "Samples"]]:
    """The sampling rate of each frame, and the mean of its channels. Raises `DataError` if the rate or the number of
    channels changes."""
    av = pyav("sound")
    known: tuple[int, int] | None = None
    made_plain: Any = None
    for frame in frames:
        own = frame.sample_rate, frame.layout.nb_channels
        if known is None:
            if own[0] not in _RATES or not 0 < own[1] <= _MOST_CHANNELS:
                raise DataError(
                    f"has {counted(own[0], 'sample')} a second in {counted(own[1], 'channel')}, which is not allowed"
                )
            known, made_plain = own, av.AudioResampler(format="flt")
        if own != known:
            raise DataError("changes its sampling rate or its number of channels")
        frame.pts = None  # a gap in a file's times is no silence
        # PyAV reads memory that is not there if more than 8 channels have a plane each, so they have one together.
        for plain in made_plain.resample(frame):
            yield own[0], plain.to_ndarray().reshape(-1, own[1]).mean(1)


def _check_length(seconds: float, most: float | None, rate: int) -> None:
    if most is not None and seconds > most:
        raise DataError(f"is longer than data.sounds.max_seconds, {most:g}. Cut it, or raise the setting")
    if seconds * rate > _MOST_SAMPLES:
        raise DataError(f"is longer than the {_MOST_SAMPLES / rate / 60:,.0f} minutes allowed. Cut it")


def _resampled(parts: "Iterator[tuple[int, Samples]]", rate: int) -> "Iterator[Samples]":
    """Yield the samples of parts, each given with its rate, at another `rate`."""
    av = pyav("sound")
    made = None
    for given, samples in parts:
        if given == rate:
            yield samples
            continue
        made = made or av.AudioResampler("fltp", "mono", rate)
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = given
        for one in made.resample(frame):
            yield one.to_ndarray()[0]
    for one in made.resample(None) if made else ():
        yield one.to_ndarray()[0]


def _said_seconds(content: bytes, container: Any, stream: Any) -> float | None:
    """The length that a file states. None if it states none; then FFmpeg only guesses from the file's size."""
    kind = container.format.name
    if kind == "wav" and content[:4] == b"RIFF":
        said = int.from_bytes(content[4:8], "little") + 8
        if len(content) + 1 < said < 2**31:  # one that was written into a pipe says nothing, or the largest number
            raise DataError(f"has {len(content):,} of its {said:,} bytes: the file is truncated")
    if kind == "aac" or (kind == "mp3" and not any(word in content[: 2**16] for word in (b"Xing", b"Info", b"VBRI"))):
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration and len(container.streams) == 1 else None


def wave_of(samples: Any, rate: Any) -> bytes:
    """A WAV file of the samples that a row holds as numbers, (n,) or (channels, n).

    Raises `DataError`, with a clause, if they are not samples.
    """
    import numpy as np

    try:
        values = np.asarray(samples, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError("is an array of something other than numbers") from error
    if values.ndim == 2:
        values = values.mean(0 if len(values) <= values.shape[1] else 1)
    if values.ndim != 1:
        raise DataError(f"is an array of {values.ndim} dimensions, and samples have one, or one beside the channels")
    if rate not in _RATES:  # a column of numbers may have 16000.0
        raise DataError(
            f"has the sampling_rate {shown(rate)}, and a whole number from {_RATES[0]:,} to {_RATES[-1]:,} is needed"
            if rate is not None
            else "has an array of samples and no sampling_rate"
        )
    if values.size and (loudest := np.abs(values).max()) > _LOUDEST:
        raise DataError(
            f"is an array with samples up to {loudest:,.0f}, and samples lie between -1 and 1. Divide them by 32768 if"
            " they are integers of 16 bits"
        )
    content = np.ascontiguousarray(values, "<f4").tobytes()
    header = struct.pack(
        "<4sI8sIHHIIHH4sI",
        b"RIFF",
        36 + len(content),
        b"WAVEfmt ",
        16,
        3,
        1,
        int(rate),
        4 * int(rate),
        4,
        32,
        b"data",
        len(content),
    )
    return header + content
