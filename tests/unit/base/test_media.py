"""What the file of a video or of a sound says of itself, and where it says nothing."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.base.find.media.sound import _said_seconds
from trainer.base.find.media.video import _CODECS, VIDEO, Clip, _Coded
from trainer.errors import DataError


def coded(packets: list[tuple[int, bool]], **stream: Any) -> _Coded:
    """A video of packets that have so many bytes, and are discarded or not."""
    codec = SimpleNamespace(name="h264", thread_count=0)
    known = {"codec_context": codec, "height": 48, "width": 64, "frames": 0, "average_rate": 30, "guessed_rate": 12}
    found = SimpleNamespace(**{**known, **stream})
    made = [SimpleNamespace(size=size, is_discard=is_discard) for size, is_discard in packets]
    file: Any = SimpleNamespace(streams=SimpleNamespace(video=[found]), demux=lambda _stream: iter(made))
    return _Coded(file)


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
