"""Rows with sounds, as people write them: all forms give the same tokens and bytes, and what is damaged is a bad row."""

import base64
import hashlib
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("torchvision")
import av

from tests.hearing import RATE, hearing_base, make_sounding, noise, samples_of, wave_file
from tests.seeing import content, picture, video
from tests.unit.data.test_data_pictures import asks, compiled, config_of, documents, text, write
from trainer.base.find.media.sound import SOUND, Length, decoded, heard_at_most, wave_of
from trainer.base.find.media.still import STILL
from trainer.base.find.media.video import VIDEO
from trainer.base.find.processor import read_processor
from trainer.base.find.tokenizer import read_tokenizer
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT
from trainer.data.dataset.pictures import PictureFiles
from trainer.data.format.known.pictures.render import PictureRenderer
from trainer.data.order.pictures import PictureReader
from trainer.data.render.document import file_of_rows, reading
from trainer.errors import DataError

ONE, TWO = wave_file(noise(0.5, 1)), wave_file(noise(0.3, 2))
ANSWER = {"role": "assistant", "content": "a voice"}
QUESTION = [{"role": "user", "content": "<audio>or<audio>what is it?"}, ANSWER]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hearing_base(tmp_path_factory.mktemp("bases") / "qwen2_audio")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one.wav").write_bytes(ONE)
    (tmp_path / "two.wav").write_bytes(TWO)
    return tmp_path


def _said(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _talk(*sounds: dict[str, Any]) -> dict[str, Any]:
    first, second = sounds
    return {"messages": [asks(first, text("or"), second, text("what is it?"))[0], ANSWER]}


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "OpenAI": (
        ".jsonl",
        _talk(*({"type": "input_audio", "input_audio": {"data": _said(one), "format": "wav"}} for one in (ONE, TWO))),
    ),
    "Hugging Face": (".jsonl", _talk({"type": "audio", "path": "one.wav"}, {"type": "audio", "audio": "two.wav"})),
    "addresses": (
        ".jsonl",
        _talk(
            {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{_said(ONE)}"}},
            {"type": "audio", "url": "two.wav"},
        ),
    ),
    "a data URI as OpenAI's data": (
        ".jsonl",
        _talk(*({"type": "input_audio", "input_audio": {"data": f"data:;base64,{_said(one)}"}} for one in (ONE, TWO))),
    ),
    "LLaMA-Factory": (".jsonl", {"messages": QUESTION, "audios": ["one.wav", "two.wav"]}),
    "a column of the Hub": (
        ".parquet",
        {"messages": QUESTION, "audio": [{"bytes": ONE, "path": None}, {"bytes": TWO, "path": "two.wav"}]},
    ),
    "a tar": (".tar", {"messages": QUESTION}),
}


def _written(form: str, folder: Path) -> Path:
    ending, row = FORMS[form]
    return _tar(folder, row) if ending == ".tar" else write(folder / f"rows{ending}", row)


def _tar(folder: Path, row: dict[str, Any], *endings: str) -> Path:
    one, two = endings or ("wav", "wav")
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for name, stored in {f"k.0.{one}": ONE, f"k.1.{two}": TWO, "k.json": json.dumps(row).encode()}.items():
            header = tarfile.TarInfo(name)
            header.size = len(stored)
            tar.addfile(header, io.BytesIO(stored))
    return folder / "rows.tar"


def test_a_tar_has_sounds_of_every_kind_that_is_read(base: Path, folder: Path) -> None:
    """A member of an unknown ending is left out, and its text would be trained without the sound."""
    talk = [{"role": "user", "content": "what is it?"}, ANSWER]
    for endings in (("aac", "aiff"), ("amr", "au"), ("caf", "mka")):
        ((_, sounds),) = documents(compiled(config_of(base, _tar(folder, {"messages": talk}, *endings))))
        assert len(sounds) == 2, endings
    for modality, endings in ((STILL, "avif jp2 tga qoi"), (VIDEO, "flv mpg ts wmv m4v"), (SOUND, "oga aif w64")):
        assert set(endings.split()) <= set(modality.endings)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_has_the_same_tokens_and_sounds(form: str, base: Path, folder: Path) -> None:
    data = compiled(config_of(base, _written(form, folder)))
    ((tokens, sounds),) = documents(data)
    tokenizer: Any = read_tokenizer(base, "base")
    first, second = ("<audio>" * int(count) for count in sounds["tokens"])
    expected = f"<s>user: <begin>{first}<end>or<begin>{second}<end>what is it?</s>\n<s>assistant: a voice</s>\n"
    assert tokenizer.decode(tokens & ID_BITS) == expected
    assert tokenizer.decode((tokens & ID_BITS)[tokens >= TARGET_BIT]) == "a voice</s>"
    assert sounds[["height", "width", "modality"]].tolist() == [(8000, RATE, 2), (4800, RATE, 2)]
    for found, made in zip(sounds, (ONE, TWO), strict=True):
        assert found["sha256"].tobytes() == hashlib.sha256(made).digest()
        assert PictureFiles(data.store).read(found) == made


def test_numbers_of_a_row_are_its_sound(base: Path, folder: Path) -> None:
    parts = [{"array": samples_of(one).tolist(), "sampling_rate": RATE} for one in (ONE, TWO)]
    data = compiled(config_of(base, write(folder / "rows.jsonl", {"messages": QUESTION, "audios": parts})))
    ((_, sounds),) = documents(data)
    for found, made in zip(sounds, (ONE, TWO), strict=True):
        np.testing.assert_array_equal(decoded(PictureFiles(data.store).read(found), RATE), samples_of(made))


def test_the_class_gets_what_its_processor_makes_of_the_files(base: Path, folder: Path) -> None:
    from transformers import AutoProcessor

    data = compiled(config_of(base, _written("Hugging Face", folder)))
    ((tokens, sounds),) = documents(data)
    reader, ids = PictureReader(data.store, read_processor(base, "base")), (tokens & ID_BITS).astype(np.int32)
    values = sounds.view(np.uint8).reshape(len(sounds), -1)
    (seen,) = reader.begin(values, [0, 0], [ids], [len(ids)]).arrived()
    processor: Any = AutoProcessor.from_pretrained(base)
    own = processor(
        text=["<audio><audio>"], audio=[samples_of(ONE), samples_of(TWO)], sampling_rate=RATE, return_tensors="pt"
    )
    for name in ("input_features", "feature_attention_mask"):
        assert seen.inputs[name].equal(own[name])


def _file(kind: str, codec: str, samples: Any, rate: int, layout: str = "mono") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as file:
        stream: Any = file.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate = rate
        for part in (frame, None):
            for packet in stream.encode(part):
                file.mux(packet)
    return buffer.getvalue()


def test_channels_become_their_mean() -> None:
    left, right = noise(0.3, 1), noise(0.3, 2)
    found = decoded(wave_file(np.stack([left, right], 1)), RATE)
    np.testing.assert_allclose(found, (left / 2**15 + right / 2**15) / 2, atol=1e-7)


@pytest.mark.parametrize("channels", [9, 64])
def test_many_channels_become_their_mean(channels: int) -> None:
    """PyAV ends the process if it is asked for the planes of more than 8."""
    parts = np.stack([noise(0.3, number) for number in range(channels)], 1)
    np.testing.assert_allclose(decoded(wave_file(parts), RATE), (parts / 2**15).mean(1), atol=1e-6)


def test_integers_are_no_samples_between_minus_one_and_one() -> None:
    assert wave_of([1.5, -1.5], RATE)
    with pytest.raises(DataError, match="samples up to 12,000, and samples lie between -1 and 1"):
        wave_of([0, -12_000], RATE)


def test_a_number_that_no_float_can_be_is_no_sample() -> None:
    with pytest.raises(DataError, match="^is an array of something other than numbers$"):
        wave_of([0.5, 10**400], RATE)


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (None, "has an array of samples and no sampling_rate"),
        ("16000", "has the sampling_rate '16000', and a whole number from 1,000 to 384,000 is needed"),
        (16_000.5, "has the sampling_rate 16000.5, and a whole number"),
        (True, "has the sampling_rate true, and a whole number"),
        (16, "has the sampling_rate 16, and a whole number"),
    ],
)
def test_a_rate_that_is_none_is_named(rate: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"^{said}"):
        wave_of([0.5, -0.5], rate)
    assert wave_of([0.5, -0.5], 16_000.0) == wave_of([0.5, -0.5], 16_000)  # as a column of numbers has it
    with pytest.raises(DataError, match="is an array of 3 dimensions"):
        wave_of([[[0.5]]], 16_000)


def test_another_container_has_the_same_samples() -> None:
    samples = noise(0.5, 3)
    np.testing.assert_array_equal(
        decoded(_file("flac", "flac", samples, RATE), RATE), decoded(wave_file(samples), RATE)
    )


def test_a_sound_of_another_rate_is_resampled() -> None:
    def tone(rate: int) -> Any:
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 0.5

    found = decoded(wave_of(tone(44_100), 44_100), RATE)
    assert abs(len(found) - RATE) <= 1
    np.testing.assert_allclose(found[200:-200], tone(RATE)[200 : len(found) - 200], atol=2e-3)


def _silence(seconds: int, rate: int = RATE) -> bytes:
    """A minute in some kilobytes."""
    return _file("flac", "flac", np.zeros(seconds * rate, np.int16), rate)


def test_a_small_file_of_many_samples_takes_little_memory() -> None:
    """It has 11.5 million samples, of which the processor gets one of 24."""
    content = _silence(30, 384_000)
    assert len(content) < 20_000
    tracemalloc.start()
    try:
        samples = decoded(content, RATE)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == 30 * RATE
    assert most < 3 * samples.nbytes


def _with(at: int, value: int, size: int) -> bytes:
    return ONE[:at] + value.to_bytes(size, "little") + ONE[at + size :]


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: ONE[:-900], "its sound 'bad' has 15,144 of its 16,044 bytes: the file is truncated"),
    "truncated, of another kind": (
        lambda: _file("flac", "flac", noise(1, 1), RATE)[:-9000],
        "its sound 'bad' (cannot be decoded|ends after)",
    ),
    "no sound": (lambda: b"hello", "its sound 'bad' is no sound that can be read"),
    "empty": (lambda: b"", "its sound 'bad' is empty"),
    "without samples": (lambda: wave_file(noise(0, 1)), "its sound 'bad' (is empty|is no sound that can be read)"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "its sound 'bad' is no sound that can be read"),
    "another playlist": (lambda: b"ffconcat version 1.0\nfile /etc/hostname\n", "its sound 'bad' is no sound that"),
    "a picture": (
        lambda: content(picture(30, 20, 1)),
        "its sound 'bad' is a picture, which belongs in 'images' or a part of type 'image'",
    ),
    "a video without sound": (lambda: video(4, 32, 32, 1), "its sound 'bad' has no sound track"),
    "too short for the processor": (
        lambda: wave_file(noise(3 / RATE, 1)),
        "its sound of 0.0 seconds is refused by the base's processor .it makes no token of so little",
    ),
    "one sample a second": (lambda: _with(24, 1, 4), "its sound 'bad' has 1 sample a second in 1 channel,"),
    "too many a second": (lambda: _with(24, 2**31 - 1, 4), "its sound 'bad' has 2,147,483,647 samples a second"),
    "no numbers": (lambda: wave_of([0.0, float("nan")], RATE), "its sound 'bad' has samples that are not numbers"),
    "longer than the processor hears": (
        lambda: wave_file(noise(3, 1)),
        "its sound 'bad' has 3.0 seconds, and the base's processor uses only the first 2.0.",
    ),
    "too long": (lambda: _silence(60), "its sound 'bad' is longer than data.sounds.max_seconds, 20."),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_sound_is_a_bad_row(case: str, base: Path, folder: Path) -> None:
    made, said = BAD[case]
    (folder / "bad").write_bytes(made())
    good = {"messages": asks({"type": "audio", "path": "one.wav"}, text("what?"))}
    rows = write(folder / "rows.jsonl", good, {"messages": asks({"type": "audio", "path": "bad"}, text("what?"))})
    with pytest.raises(DataError, match=f"^{rows}:2: {said}[^\n]*$"):
        compiled(config_of(base, rows, "data.sounds.max_seconds=20"))


def test_a_processor_that_hears_everything_has_no_limit() -> None:
    from transformers import Qwen3ASRFeatureExtractor

    class Whole:
        audio_token = "<audio>"
        feature_extractor: Any = Qwen3ASRFeatureExtractor()

        def __call__(self, text: Any, audio: Any, **given: Any) -> Any:
            return self.feature_extractor(audio, sampling_rate=RATE, return_tensors="pt")

    assert heard_at_most(Whole(), 40 * RATE) is None


def test_a_base_that_hears_takes_no_picture(base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", {"messages": asks({"type": "image", "path": "one.wav"}, text("what?"))})
    with pytest.raises(DataError, match=r"it has a picture, and .* takes none"):
        compiled(config_of(base, rows))


def test_a_question_with_a_video_is_refused_by_a_base_that_hears(base: Path, folder: Path) -> None:
    (folder / "clip.mp4").write_bytes(video(4, 32, 32, 1))
    rows = write(folder / "rows.jsonl", {})
    renderer = PictureRenderer(read_tokenizer(base, "base"), config_of(base, rows).data)
    with reading(str(rows)), pytest.raises(DataError, match=r"^it has a video, and .* takes none$"):
        renderer.question({"messages": asks({"type": "video", "path": "clip.mp4"}, text("what?"))[:1]})


def test_the_longest_sound_is_in_the_fingerprint_where_it_is_set(base: Path, tmp_path: Path) -> None:
    from trainer.base.find.locate import resolve_base
    from trainer.data.compile.prepare import locate

    rows = make_sounding(tmp_path, rows=2)

    def name(*more: str) -> Any:
        config = config_of(base, rows, *more)
        return locate(config, resolve_base(config.model))

    assert name() == name() != name("data.sounds.max_seconds=20")


def test_an_index_keeps_the_shape_of_a_sound() -> None:
    shape = Length(4800, RATE)
    assert SOUND.kept(*SOUND.numbers(shape)) == shape
    for first, second in ((0, RATE), (2**31, RATE), (4800, 1)):
        with pytest.raises(ValueError, match="samples"):
            SOUND.kept(first, second)


def test_a_sound_between_two_of_one_text_has_that_text_and_the_processor_is_not_asked(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, fresh = (read_processor(base, "base") for _ in range(2))
    asked, plain = list[Any](), processor._listened
    monkeypatch.setattr(processor, "_listened", lambda *given: asked.append(given) or plain(*given))
    lengths = [*range(3_000, 9_000, 100), *range(3_050, 9_000, 100)]
    texts = [processor.replacements((Length(samples, RATE),)) for samples in lengths]
    assert len(asked) < 0.75 * len(lengths)
    assert texts[::7] == [fresh._ask((Length(samples, RATE),)) for samples in lengths[::7]]
    assert texts == [processor.replacements((Length(samples, RATE),)) for samples in lengths]


def test_rows_are_of_a_file_as_long_as_it_is_read() -> None:
    with reading("/a/rows.jsonl"):
        with pytest.raises(DataError), reading("/b/rows.jsonl"):
            raise DataError("a bad row")
        assert file_of_rows() == "/a/rows.jsonl"
    assert file_of_rows() == ""


def test_a_codec_that_is_not_listed_is_not_decoded_in_a_container_that_is() -> None:
    """FFmpeg has hundreds, and each is code that reads what somebody else has written."""
    made = _file("matroska", "ac3", noise(0.3, 1), 48_000)
    with av.open(io.BytesIO(made)) as opened:
        assert next(cast(Any, opened).decode(audio=0)).samples > 0  # FFmpeg alone reads it
    for codec in ("mp2", "libmp3lame", "aac"):
        assert len(decoded(_file("matroska", codec, noise(0.3, 1), 48_000), 48_000)) > 4_000
    with pytest.raises(DataError, match=r"^is coded as ac3, which Capstan does not read\. Encode it as flac$"):
        decoded(made, 48_000)


def test_a_playlist_opens_no_other_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    playlist = b"ffconcat version 1.0\nfile one.wav\n"
    with av.open(io.BytesIO(playlist), mode="r", options={"protocol_whitelist": "file", "safe": "0"}) as opened:
        assert next(cast(Any, opened).decode(audio=0)).samples > 0  # FFmpeg alone reads the file
    with pytest.raises(DataError, match="is no sound that can be read"):
        decoded(playlist, RATE)
