"""What the file of a video or of a sound says of itself, and where it says nothing."""

import base64
import io
import struct
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.base.find import media
from trainer.base.find.media import Shown, recognized, sound, still
from trainer.base.find.media.sound import SOUND, Length, _said_seconds, wave_of
from trainer.base.find.media.still import decoded, size_of
from trainer.base.find.media.video import _CODECS, VIDEO, Clip, _Coded, _sampled, _Stored
from trainer.errors import ConfigError, DataError


def coded(packets: list[tuple[int, bool]], **stream: Any) -> _Coded:
    """A video of packets that have so many bytes, and are discarded or not."""
    codec = SimpleNamespace(name="h264", thread_count=0)
    known = {"codec_context": codec, "height": 48, "width": 64, "frames": 0, "average_rate": 30, "guessed_rate": 12}
    found = SimpleNamespace(**{**known, **stream})
    made = [SimpleNamespace(size=size, is_discard=is_discard) for size, is_discard in packets]
    file: Any = SimpleNamespace(streams=SimpleNamespace(video=[found]), demux=lambda _stream: iter(made))
    return _Coded(file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_has_the_size_in_which_it_is_shown(orientation: int) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(file, "JPEG", exif=exif)
    shown = decoded(file.getvalue())
    assert size_of(file.getvalue()) == (shown.height, shown.width) == ((30, 20) if orientation > 4 else (20, 30))


def test_frames_that_a_file_does_not_show_are_not_counted() -> None:
    """An edit list discards packets, and the last packet of a stream is empty."""
    stored = coded([(9, False), (9, True), (9, False), (0, False)]).stored()
    assert (stored.height, stored.width, stored.total, stored.fps) == (48, 64, 2, 30.0)
    assert not stored.chosen, "the processor samples frames of it"


def test_a_rate_that_a_file_does_not_state_is_guessed() -> None:
    assert coded([(9, False)], average_rate=None).stored().fps == 12.0
    assert coded([(9, False)], average_rate=Fraction(30000, 1001)).stored().fps == pytest.approx(29.97, abs=0.01)


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ({"average_rate": None, "guessed_rate": None}, "does not say how many frames a second has"),
        ({"average_rate": 10_000}, "does not say how many frames a second has"),
        ({"frames": 3}, r"ends after 2 of 3 frames\. Replace the file"),
        ({"height": 2**16, "width": 2}, "has frames of 2 x 65536 pixels, more than"),
        ({"height": 2**13, "width": 2**12 + 1}, "has frames of 4097 x 8192 pixels, more than 33,554,432 pixels"),
        ({"codec_context": None}, r"is coded as unknown, which Capstan does not read\. Encode it as h264"),
        ({"codec_context": SimpleNamespace(name="ffv1")}, "is coded as ffv1"),
    ],
)
def test_a_stream_that_cannot_be_trained_on_is_refused(stream: dict[str, Any], said: str) -> None:
    assert "h264" in _CODECS
    with pytest.raises(DataError, match=f"^{said}"):
        coded([(9, False), (9, False)], **stream).stored()


def test_a_clip_that_was_sampled_has_the_times_of_its_file() -> None:
    clip = Clip(48, 64, 3, (0, 30, 60), 90, 30.0)
    told = clip.metadata()
    assert (told["total_num_frames"], told["fps"], told["duration"]) == (90, 30.0, 3.0)
    assert told["frames_indices"] == [0, 30, 60]
    assert (told["height"], told["width"]) == (48, 64)
    blank = Clip(48, 64, 6).metadata()
    assert (blank["total_num_frames"], blank["duration"], blank["frames_indices"]) == (6, 0.25, [0, 1, 2, 3, 4, 5])
    assert VIDEO.kept(*VIDEO.numbers(clip)) == clip.without_times == Clip(48, 64, 3)


def said_seconds(kind: str, content: bytes = b"", of_stream: int | None = None, **container: Any) -> float | None:
    given = SimpleNamespace(format=SimpleNamespace(name=kind), **{"duration": None, "streams": [1], **container})
    return _said_seconds(content, given, SimpleNamespace(duration=of_stream, time_base=Fraction(1, 1000)))


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("mp3", b"ID3 ... Xing", 2.5),
        ("mp3", b"ID3 ... Info", 2.5),
        ("mp3", b"ID3 ... VBRI", 2.5),
        ("mp3", b"ID3 ... LAME", None),  # FFmpeg guesses then, from the file's size
        ("mp3", b"." * 2**16 + b"Xing", None),
        ("aac", b"Xing", None),
        ("flac", b"fLaC", 2.5),
    ],
)
def test_the_length_of_a_sound_is_known_where_its_file_states_it(
    kind: str, content: bytes, expected: float | None
) -> None:
    assert said_seconds(kind, content, 2500) == expected


def test_the_length_of_a_file_is_that_of_its_only_stream() -> None:
    assert said_seconds("matroska", duration=2_500_000) == 2.5
    assert said_seconds("matroska", duration=2_500_000, streams=[1, 2]) is None
    assert said_seconds("matroska") is None


@pytest.mark.parametrize("size", [0, 2**32 - 9])
def test_a_wave_file_that_was_written_into_a_pipe_says_no_size(size: int) -> None:
    assert said_seconds("wav", b"RIFF" + size.to_bytes(4, "little") + bytes(100), 2500) == 2.5


def test_a_wave_file_that_lacks_bytes_is_truncated() -> None:
    whole = b"RIFF" + (101).to_bytes(4, "little") + bytes(100)
    assert said_seconds("wav", whole, 2500) == 2.5, "a last byte that fills up to an even number may be missing"
    with pytest.raises(DataError, match=r"^has 107 of its 109 bytes: the file is truncated"):
        said_seconds("wav", whole[:-1], 2500)


class Sampling:
    """A processor that samples frames as `sample` says of a video without pixels."""

    video_token = "<video>"

    def __init__(self, sample: Any, samples: bool = True) -> None:
        self.video_processor, self._sample = SimpleNamespace(do_sample_frames=samples, num_frames=8), sample

    def __call__(self, text: Any, videos: Any, video_metadata: Any) -> None:
        assert text == [self.video_token]
        assert (video_metadata[0]["fps"], video_metadata[0]["frames_indices"]) == (30.0, None)
        self._sample(videos[0])


def sampled(total: int, most: int | None, processor: Any, chosen: bool = False) -> Clip:
    found = _sampled(_Stored(48, 64, total, 30.0, chosen), (24, 32), processor, most)
    assert (found.height, found.width, found.total, found.fps) == (24, 32, total, 30.0)
    assert found.frames == len(found.indices)
    return found


def test_frames_are_those_that_the_processor_asks_for_or_fewer_of_them() -> None:
    asks = Sampling(lambda video: video[[0, 15, 30, 45]])
    assert sampled(90, None, asks).indices == (0, 15, 30, 45)
    assert sampled(90, 4, asks).indices == (0, 15, 30, 45)
    assert sampled(90, 3, asks).indices == (0, 15, 30)
    assert sampled(90, 2, asks).indices == (0, 30)


def test_a_processor_that_samples_nothing_gets_32_frames_evenly_or_as_many_as_are_set() -> None:
    plain = Sampling(None, samples=False)
    assert sampled(64, None, plain).indices == tuple(range(0, 64, 2))
    assert sampled(20, None, plain).indices == tuple(range(20))
    assert sampled(64, 4, plain).indices == (0, 16, 32, 48)
    assert sampled(64, None, plain, chosen=True).indices == tuple(range(64)), "the author of the rows has chosen them"


def test_a_video_that_is_shorter_than_a_processor_samples_is_taken_whole() -> None:
    def refuses(_video: Any) -> None:
        raise ValueError("too few frames")

    assert sampled(7, None, Sampling(refuses)).indices == tuple(range(7))
    with pytest.raises(
        DataError, match=r"has 8 frames, 30 a second, and is refused by the base's processor .too few frames."
    ):
        sampled(8, None, Sampling(refuses))
    with pytest.raises(DataError, match="is read whole by the base's processor, although it is set to sample frames"):
        sampled(8, None, Sampling(lambda _video: None))


def test_a_video_that_ends_early_is_named_by_its_frames() -> None:
    sought = list[int]()
    frames = [SimpleNamespace(to_ndarray=lambda format, n=n: (format, n)) for n in range(2)]
    file: Any = SimpleNamespace(seek=sought.append, decode=lambda video: iter(frames))
    assert list(_Coded(file).frames([1])) == [(1, ("rgb24", 1))]
    assert sought == [0], "it was read to its end before"
    with pytest.raises(DataError, match="ends after 2 of at least 4 frames. Replace the file"):
        list(_Coded(file).frames([0, 3]))


def wave(content: bytes) -> tuple[int, list[float]]:
    """The rate and the samples of a WAV file of fp32 in one channel."""
    riff, size, kind, length, form, channels, rate, each, item, bits, data, count = struct.unpack_from(
        "<4sI8sIHHIIHH4sI", content
    )
    assert (riff, size, kind, length, data) == (b"RIFF", len(content) - 8, b"WAVEfmt ", 16, b"data")
    assert (form, channels, each, item, bits, count) == (3, 1, 4 * rate, 4, 32, len(content) - 44)
    return rate, np.frombuffer(content[44:], "<f4").tolist()


def test_numbers_of_a_row_become_a_file_of_the_mean_of_their_channels() -> None:
    assert wave(wave_of([0.5, -0.25], 8000)) == (8000, [0.5, -0.25])
    assert wave(wave_of([[0.5, 0.5, 1.0], [0.0, 1.0, -1.0]], 16_000)) == (16_000, [0.25, 0.75, 0.0])
    assert wave(wave_of([[0.5, 0.0], [0.5, 1.0], [1.0, -1.0]], 16_000)) == (16_000, [0.25, 0.75, 0.0])
    assert wave(wave_of([-16.0], 8000.0)) == (8000, [-16.0])


@pytest.mark.parametrize(
    ("samples", "rate", "said"),
    [
        (["a"], 8000, "is an array of something other than numbers"),
        ([[[0.1]]], 8000, "is an array of 3 dimensions"),
        (0.1, 8000, "is an array of 0 dimensions"),
        ([0.1], None, "has an array of samples and no sampling_rate"),
        ([0.1], 8000.5, "has the sampling_rate 8000.5, and a whole number from 1,000 to 384,000 is needed"),
        ([0.1], True, "has the sampling_rate "),
        ([0.1], 999, "has the sampling_rate 999"),
        ([0.1], 384_001, "has the sampling_rate 384001"),
        ([0, -300], 8000, r"is an array with samples up to 300, and .* between -1 and 1\. Divide them by 32768"),
    ],
)
def test_an_array_that_is_no_sound_is_refused(samples: Any, rate: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"^{said}"):
        wave_of(samples, rate)
    with pytest.raises(DataError, match=f"^a sound {said}"):
        SOUND.made({"array": samples, "sampling_rate": rate})
    assert SOUND.made({"path": "a.wav"}) is None


def test_a_file_is_told_whatever_error_a_modality_before_its_own_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(content: bytes) -> None:
        raise (ConfigError if content == b"ours" else OverflowError)("a package is missing")

    broken, ours = SimpleNamespace(check=check), SimpleNamespace(check=lambda content: content.index(b"ours"))
    monkeypatch.setattr(media, "modalities", lambda: (broken, ours))
    assert recognized(b"ours") is ours
    assert recognized(b"else") is None


def test_modalities_are_in_the_order_of_their_numbers_and_an_index_names_no_other() -> None:
    assert [one.number for one in media.modalities()] == [0, 1, 2]
    assert [media.numbered(number).kind for number in range(3)] == ["image", "video", "audio"]
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"^the unknown modality {wrong}$"):
            media.numbered(wrong)


def png(height: int, width: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def gif(*colours: str) -> bytes:
    file = io.BytesIO()
    first, *more = (Image.new("RGB", (6, 4), colour) for colour in colours)
    first.save(file, "GIF", save_all=True, append_images=more)
    return file.getvalue()


def grey(mode: str, form: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (6, 4)).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png(4, 6), None),
        (gif("red"), None),
        (grey("L", "PNG"), None),
        (png(2, 12), None),
        (gif("red", "blue"), r"has 2 frames\. Give one of them as a picture"),
        (png(1, 9), "has 9 x 1 pixels, in which nothing can be seen"),
        (png(9, 1), "has 1 x 9 pixels, in which nothing can be seen"),
        (png(5, 5), "has 5 x 5 pixels, more than the 24 allowed"),
        (grey("I;16", "PNG"), "has grey values of more than 8 bits"),
        (grey("I", "TIFF"), "has grey values of more than 8 bits"),
        (grey("F", "TIFF"), "has grey values of more than 8 bits"),
        (b"GIF89a", "is no picture that can be read|is damaged"),
    ],
    ids=[
        *("colours", "one frame", "grey", "two rows", "two frames", "a row", "a column", "large", "16 bits"),
        *("32 bits", "fractions", "torn"),
    ],
)
def test_a_picture_is_one_that_can_be_seen_whole(
    content: bytes, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(still, "_MOST_PIXELS", 24)
    if said is None:
        size_of(content)
        return
    with pytest.raises(DataError, match=f"^({said})"):
        size_of(content)


def test_a_picture_of_another_size_is_scaled_smoothly() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, ::2] = 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert np.array_equal(np.asarray(decoded(file.getvalue(), (8, 8))), pixels)
    scaled = decoded(file.getvalue(), (4, 2))
    assert scaled.size == (2, 4)
    assert 60 < int(np.asarray(scaled).min()) <= int(np.asarray(scaled).max()) < 140, "columns are blended"


def frames(*kinds: tuple[int, int]) -> Any:
    """Decoded frames of these rates and channels, each of two samples: 0 and 1 in the first channel, 0 in others."""
    for rate, channels in kinds:
        samples = np.zeros((2, channels), np.float32)
        samples[1, 0] = 1
        layout = SimpleNamespace(nb_channels=channels)
        yield SimpleNamespace(sample_rate=rate, layout=layout, pts=7, to_ndarray=samples.reshape(1, -1).copy)


def test_the_samples_of_a_sound_are_the_means_of_its_channels_which_stay_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = SimpleNamespace(resample=lambda frame: [frame] if frame.pts is None else [])
    monkeypatch.setattr(sound, "pyav", lambda noun: SimpleNamespace(AudioResampler=lambda format: plain))
    made = list(sound._mono(frames((8000, 4), (8000, 4))))
    assert [(rate, values.tolist()) for rate, values in made] == [(8000, [0, 0.25])] * 2
    for changed in ((16_000, 4), (8000, 2)):
        with pytest.raises(DataError, match="^changes its sampling rate or its number of channels"):
            list(sound._mono(frames((8000, 4), changed)))
    for wrong, said in {(999, 1): "999 samples a second in 1 channel,", (8000, 65): "in 65 channels,"}.items():
        with pytest.raises(DataError, match=f"^has .*{said} which is not allowed"):
            list(sound._mono(frames(wrong)))


def test_a_sound_is_as_long_as_the_setting_and_the_memory_allow() -> None:
    longest = sound._MOST_SAMPLES / 16_000
    for seconds, most in ((5.0, 5.0), (longest, None)):
        sound._check_length(seconds, most, 16_000)
    with pytest.raises(DataError, match=r"^is longer than data\.sounds\.max_seconds, 5\. Cut it, or raise"):
        sound._check_length(5.1, 5.0, 16_000)
    with pytest.raises(DataError, match=r"^is longer than the 140 minutes allowed\. Cut it$"):
        sound._check_length(longest + 1, None, 16_000)


@pytest.mark.parametrize(
    ("parts", "rate"),
    [
        ({"audio_processor": 8000, "feature_extractor": 9000}, 8000),
        ({"feature_extractor": 24_000}, 24_000),
        ({"audio_processor": None}, 16_000),
        ({}, 16_000),
    ],
)
def test_the_rate_of_a_processor_is_that_of_its_part_for_sounds(parts: dict[str, int | None], rate: int) -> None:
    made = {name: SimpleNamespace(**({} if own is None else {"sampling_rate": own})) for name, own in parts.items()}
    assert sound.rate_of(SimpleNamespace(**made)) == rate


def test_a_list_of_pictures_is_shown_picture_by_picture_and_a_file_as_it_is() -> None:
    frames = [png(4, 6, "red"), png(4, 6, "blue")]
    listed = VIDEO.joined(frames)
    assert VIDEO.browsed(listed) == [("image", frame) for frame in frames]
    assert VIDEO.browsed(b"mp4") == [("video/mp4", b"mp4")]
    first = VIDEO.preview(listed)
    assert (first.size, first.getpixel((0, 0))) == ((6, 4), (255, 0, 0))  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(DataError, match="^has frames of different sizes"):
        VIDEO.check(VIDEO.joined([*frames, png(6, 4)]))


def test_a_video_has_the_frames_that_its_entry_says_or_is_another_file() -> None:
    frames = [png(4, 6, colour) for colour in ("red", "blue", "red")]
    file = VIDEO.shown(VIDEO.joined(frames), Clip(4, 6, 3), None)
    pixels, told = file.content
    assert (file.shape.frames, pixels.shape, told["frames_indices"]) == (3, (3, 4, 6, 3), [0, 1, 2])
    assert pixels[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [255, 0, 0]]
    with pytest.raises(
        DataError, match=r"^video of 2 frames of 6 x 4 pixels, and not a video of 3 frames of 6 x 4 pix"
    ):
        VIDEO.shown(VIDEO.joined(frames[:2]), Clip(4, 6, 3), None)


def test_a_request_has_the_times_of_one_video_alone() -> None:
    def shown(*indices: int) -> Shown:
        clip = Clip(4, 6, len(indices), indices, 90, 30.0)
        return Shown(clip, (np.zeros((len(indices), 4, 6, 3), np.uint8), clip.metadata()))

    times = {"fps": 30.0, "frames_indices": [0, 45], "total_num_frames": 90, "duration": 3.0}
    expected = {"media_io_kwargs": {"video": {**times, "num_frames": -1, "do_sample_frames": False}}}
    assert VIDEO.beside_parts([shown(0, 45)]) == VIDEO.beside_parts([shown(0, 45)] * 2) == expected
    with pytest.raises(DataError, match="several videos, whose frames have different times"):
        VIDEO.beside_parts([shown(0, 45), shown(0, 30)])


def test_a_sound_is_described_by_its_seconds_and_a_server_gets_its_samples() -> None:
    length = SOUND.kept(*SOUND.numbers(Length(24_000, 16_000)))
    assert length == Length(24_000, 16_000)
    assert SOUND.title(length) == "sound of 1.5 seconds"
    part = SOUND.part(Shown(Length(2, 8000), np.array([0.5, -0.5], np.float32)))
    assert (part["type"], part["input_audio"]["format"]) == ("input_audio", "wav")
    assert wave(base64.b64decode(part["input_audio"]["data"])) == (8000, [0.5, -0.5])
    assert SOUND.preview(b"") is None
    assert SOUND.joined([b""]) is None
    for first, second in ((0, 16_000), (2**27 + 1, 16_000), (5, 999), (5, 384_001)):
        with pytest.raises(ValueError, match="a second$"):
            SOUND.kept(first, second)
