"""Videos in rows: their forms, the frames that the processor samples, and files that were made to do harm."""

import base64
import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import read_video_pyav

from tests import every_seeing, every_watching
from tests.seeing import content, picture, seeing_base, video
from tests.unit.data.test_data_pictures import ANSWER, asks, compiled, config_of, documents, text, write
from trainer.base.find.locate import resolve_base
from trainer.base.find.media import ffmpeg
from trainer.base.find.media import video as media
from trainer.base.find.processor import read_processor
from trainer.config import Config
from trainer.data.compile.inputs import find, work_of
from trainer.data.compile.pool import BYTES_FOR_PROCESSES
from trainer.data.compile.prepare import locate
from trainer.data.dataset.dataset import ID_BITS, Dataset
from trainer.data.format.known.pictures import sources
from trainer.data.order.pictures import PictureReader
from trainer.errors import CapstanError, ConfigError, Damaged
from trainer.store.store import open_store

pytest.importorskip("torchvision")
av = pytest.importorskip("av")
READ: Any = read_video_pyav  # its types are no types
CLIP, STILL = video(12, 64, 48, 1), picture(30, 20, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_base(tmp_path_factory.mktemp("bases") / "qwen3_vl", "qwen3_vl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    (tmp_path / "still.png").write_bytes(content(STILL))
    return tmp_path


def _rows(folder: Path, *rows: dict[str, Any]) -> Path:
    return write(folder / "rows.jsonl", *rows)


def _config(base: Path, rows: Path, *overrides: str) -> Config:
    return config_of(base, rows, "data.sequence_length=1024", *overrides)


def _data(base: Path, rows: Path, *overrides: str) -> Dataset:
    return compiled(_config(base, rows, *overrides), (rows.parent / "store").as_uri())


def _uri(made: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(made).decode()}"


def _asks(clip: dict[str, Any], *, said: str = "or") -> list[dict[str, Any]]:
    return asks({"type": "image", "path": "still.png"}, text(said), clip, text("what?"))


_BESIDE = {"videos": ["clip.mp4"], "images": ["still.png"]}
FORMS: dict[str, dict[str, Any]] = {
    "Hugging Face": {"messages": _asks({"type": "video", "video": "clip.mp4"})},
    "a path": {"messages": _asks({"type": "video", "path": "clip.mp4"})},
    "base64": {"messages": _asks({"type": "video", "base64": base64.b64encode(CLIP).decode()})},
    "OpenAI": {"messages": _asks({"type": "video_url", "video_url": {"url": _uri(CLIP)}})},
    "LLaMA-Factory": {"messages": [{"role": "user", "content": "<image>or<video>what?"}, ANSWER], **_BESIDE},
    "ms-swift": {"messages": asks({"type": "image"}, text("or"), {"type": "video"}, text("what?")), **_BESIDE},
    "one": {
        "messages": [{"role": "user", "content": "<image>or<video>\nwhat?"}, ANSWER],
        "video": "clip.mp4",
        "image": "still.png",
    },
}


def _theirs(base: Path, folder: Path) -> dict[str, Any]:
    """What the base's own processor makes of the whole file, as transformers' reader reads it."""
    processor: Any = AutoProcessor.from_pretrained(base)
    pixels, said = READ(folder / "clip.mp4", lambda metadata: np.arange(metadata.total_num_frames))
    metadata = {name: said[name] for name in said if name != "frames_indices"}
    prompt = processor.apply_chat_template(FORMS["a path"]["messages"], tokenize=False)
    made = processor(text=[prompt], images=[[STILL]], videos=[pixels], video_metadata=[metadata], return_tensors="pt")
    return dict(made)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_video_gives_what_the_processor_makes_of_the_file(form: str, base: Path, folder: Path) -> None:
    data = _data(base, _rows(folder, FORMS[form]))
    ((tokens, entries),) = documents(data)
    theirs = _theirs(base, folder)
    ids = (tokens & ID_BITS).astype(np.int32)
    assert ids.tolist() == theirs["input_ids"][0].tolist()
    assert entries["modality"].tolist() == [0, 1]
    reader = PictureReader(data.store, read_processor(base, "it"))
    values = np.ascontiguousarray(entries).view(np.uint8).reshape(len(entries), -1)
    (seen,) = reader.begin(values, [0, 0], [ids], [0]).arrived()
    assert seen.inputs.keys() == theirs.keys() - {"input_ids", "attention_mask"}
    for name, found in seen.inputs.items():
        assert found.equal(theirs[name]), name


@pytest.mark.parametrize(("kind", "rate"), [("mp4", 6), ("webm", 6), ("avi", 6), ("mpegts", 25)])
def test_frames_of_every_container_are_those_of_transformers_reader(
    kind: str, rate: int, base: Path, tmp_path: Path
) -> None:
    made, processor = video(12, 64, 48, 2, rate, kind), read_processor(base, "it").made
    (tmp_path / "it").write_bytes(made)
    clip = media.VIDEO.shape_of(made, _config(base, tmp_path).data, processor)
    expected, _ = READ(tmp_path / "it", lambda metadata: np.array(clip.indices))
    kept = media.VIDEO.kept(*media.VIDEO.numbers(clip))
    shown = media.VIDEO.shown(made, kept, processor)
    assert shown.shape == clip
    assert (clip.total, clip.frames, clip.fps) == (12, len(clip.indices), rate)
    pixels: NDArray[np.uint8] = shown.content[0]
    assert np.array_equal(pixels, expected)


def test_a_limit_of_frames_takes_them_evenly_and_is_in_the_fingerprint_where_it_is_set(
    base: Path, folder: Path
) -> None:
    rows = _rows(folder, FORMS["a path"])
    plain, limited = _config(base, rows), _config(base, rows, "data.videos.max_frames=2")

    def fingerprint(config: Config) -> str:
        return next(iter(locate(config, resolve_base(config.model)).values()))

    assert fingerprint(plain) == fingerprint(_config(base, rows, "data.videos.max_frames=null")) != fingerprint(limited)
    ((_, entries),) = documents(_data(base, rows, "data.videos.max_frames=2"))
    processor = read_processor(base, "it")
    clip = media.VIDEO.shape_of(CLIP, limited.data, processor.made)
    whole = media.VIDEO.shape_of(CLIP, plain.data, processor.made)
    assert (clip.frames, clip.indices) == (2, whole.indices[:: len(whole.indices) // 2])
    assert entries[1]["width"] == 2
    kept = media.VIDEO.kept(*media.VIDEO.numbers(clip))
    assert media.VIDEO.shown(CLIP, kept, processor.made).shape == clip


def _coded(codec: str, kind: str, frames: int = 2) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as file:
        stream: Any = file.add_stream(codec, rate=6)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def _sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream: Any = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


_CONCAT = b"ffconcat version 1.0\nfile /etc/hostname\n"
_PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n"
_DAMAGED = "its video 'bad' is no video that can be read, or it is damaged. Capstan reads mov, mp4"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (b"", "its video 'bad' is empty"),
        (CLIP[: len(CLIP) // 2], _DAMAGED),
        (
            video(12, 64, 48, 1, kind="avi")[:6000],
            "its video 'bad' ends after [0-9]+ of 12 frames",
        ),
        (_CONCAT, _DAMAGED),
        (_PLAYLIST, _DAMAGED),
        (content(STILL), "its video 'bad' is a picture, which belongs in 'images' or a part of type 'image'"),
        (b"<svg/>" * 100, _DAMAGED),
        (_coded("ffv1", "matroska"), "its video 'bad' is coded as ffv1, which Capstan does not read"),
        (_sound(), "its video 'bad' is a sound, which belongs in 'audios' or a part of type 'audio'"),
        (_coded("libx264", "mp4", frames=0), "its video 'bad' is empty"),
    ],
    ids=["empty", "truncated", "truncated avi", "concat", "playlist", "picture", "svg", "codec", "sound", "no frames"],
)
def test_a_file_that_is_no_whole_video_is_a_bad_row_in_one_sentence(
    made: bytes, said: str, base: Path, folder: Path
) -> None:
    (folder / "bad").write_bytes(made)
    with pytest.raises(CapstanError, match=f"rows.jsonl:1: ({said})") as refused:
        _data(base, _rows(folder, {"messages": asks({"type": "video", "path": "bad"}, text("what?"))}))
    assert "hostname" not in str(refused.value)


def test_frames_that_are_too_large_or_too_many_are_refused_before_they_are_decoded(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(folder, FORMS["a path"])
    for name, most, said in (
        ("_MOST_PIXELS", 1000, "has frames of 64 x 48 pixels, more than 1,000 pixels"),
        ("_MOST_STORED", 11, "has more than the 11 frames allowed"),
        ("_MOST_SAMPLED", 6000, "sampled frames of 64 x 48 pixels, more than the 6,000 pixels allowed"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(media, name, most)
            with pytest.raises(CapstanError, match=said):
                _data(base, rows)


def test_a_base_that_takes_no_videos_says_so(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CapstanError, match="it has a video, and .* takes none"):
        _data(seeing_base(tmp_path / "llava", "llava"), _rows(folder, FORMS["a path"]))


def test_a_video_without_the_package_that_reads_it_is_one_sentence(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffmpeg, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package av. Install it: pip install 'capstan-llm\[media\]'"):
        _data(base, _rows(folder, FORMS["a path"]))


def test_a_video_that_has_changed_since_it_was_compiled_ends_in_one_sentence(base: Path, folder: Path) -> None:
    data = _data(base, _rows(folder, FORMS["a path"]))
    ((tokens, entries),) = documents(data)
    reader = PictureReader(data.store, read_processor(base, "it"))

    def read(changed: NDArray[Any]) -> None:
        values = np.ascontiguousarray(changed).view(np.uint8).reshape(len(changed), -1)
        reader.begin(values, [0, 0], [(tokens & ID_BITS).astype(np.int32)], [0]).arrived()

    for name, value, said in (
        ("width", 3, "tokens too few for them|they cannot be read as when it was compiled"),
        ("height", 0, "frames of 0 x 0 pixels"),
        ("modality", 9, "the unknown modality 9"),
    ):
        edited = entries.copy()
        edited[name][1] = value
        with pytest.raises(Damaged, match=said):
            read(edited)
    (folder / "clip.mp4").write_bytes(video(12, 64, 48, 3))
    with pytest.raises(Damaged, match="the video has changed since the data was compiled"):
        read(entries)


def test_a_data_set_of_pictures_is_what_it_was(base: Path, folder: Path) -> None:
    """The name of the index and its bytes are those of a data set from before there were videos."""
    rows = _rows(folder, {"messages": asks({"type": "image", "path": "still.png"}, text("what?"))})
    ((_, entries),) = documents(compiled(_config(base, rows), open_store((folder / "s").as_uri()).uri))
    assert entries.dtype.itemsize == 66
    assert json.loads(json.dumps(entries[["height", "width", "modality"]].tolist())) == [[20, 30, 0]]


def test_a_class_that_takes_no_document_with_a_picture_and_a_video_says_so(tmp_path: Path, folder: Path) -> None:
    base = tmp_path / "base"
    every_seeing.write_base("glm46v", base, every_watching.CASES["glm46v"])
    alone = [{"messages": asks(part, text("what?"))} for part in FORMS["a path"]["messages"][0]["content"][::2]]
    assert len(documents(_data(base, _rows(folder, *alone), "data.sequence_length=8192"))) == 2
    with pytest.raises(CapstanError, match="rows.jsonl:1: it has pictures and videos, and the base's class takes no"):
        compiled(_config(base, _rows(folder, FORMS["a path"])))


def test_a_list_of_pictures_is_a_video_of_two_frames_a_second(base: Path, folder: Path) -> None:
    stills = [picture(64, 48, number) for number in range(4)]
    for number, one in enumerate(stills):
        (folder / f"{number}.png").write_bytes(content(one))
    names = [f"{number}.png" for number in range(4)]
    rows = [
        {"messages": [{"role": "user", "content": "<video>what?"}, ANSWER], "videos": [names]},
        {"messages": asks({"type": "video", "video": names}, text("what?"))},
    ]
    data = _data(base, _rows(folder, *rows))
    (tokens, entries), (other, _) = documents(data)
    assert tokens.tolist() == other.tolist()
    processor: Any = AutoProcessor.from_pretrained(base)
    pixels = np.stack([np.asarray(one) for one in stills])
    said = {"total_num_frames": 4, "fps": 2.0, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    prompt = processor.apply_chat_template(rows[1]["messages"], tokenize=False)
    made = processor(text=[prompt], videos=[pixels], video_metadata=[said], do_sample_frames=False, return_tensors="pt")
    ids = (tokens & ID_BITS).astype(np.int32)
    assert ids.tolist() == made["input_ids"][0].tolist()
    values = np.ascontiguousarray(entries).view(np.uint8).reshape(1, -1)
    (seen,) = PictureReader(data.store, read_processor(base, "it")).begin(values, [0], [ids], [0]).arrived()
    assert seen.inputs["pixel_values_videos"].equal(made["pixel_values_videos"])
    uneven = {"messages": asks({"type": "video", "video": [names[0], "still.png"]}, text("what?"))}
    with pytest.raises(CapstanError, match="has frames of different sizes"):
        compiled(_config(base, _rows(folder, uneven)))
    with pytest.raises(CapstanError, match="its video in the row has a frame that is no picture"):
        compiled(_config(base, _rows(folder, {"messages": asks({"type": "video", "video": ["clip.mp4"]}, text("?"))})))


def test_frames_are_no_longer_at_a_side_than_the_index_can_say(base: Path, folder: Path) -> None:
    Image.new("RGB", (2**16, 16)).save(folder / "long.png")
    rows = _rows(folder, {"messages": asks({"type": "video", "video": ["long.png"]}, text("what?"))})
    with pytest.raises(CapstanError, match="has frames of 65536 x 16 pixels, more than .* or 65,535 at a side"):
        _data(base, rows)


def test_rows_that_name_files_are_encoded_by_several_processes_though_they_are_few_bytes(
    base: Path, folder: Path
) -> None:
    """1,000 videos take many minutes, and the rows that name them 100 kB. A row that holds its file is what it is."""
    named = _rows(folder, *([FORMS["a path"]] * 1000))
    assert named.stat().st_size < 2**20
    assert work_of(find(_config(base, named))["train"]) > BYTES_FOR_PROCESSES
    held = write(folder / "held.jsonl", *([FORMS["OpenAI"]] * 100))
    assert held.stat().st_size < work_of(find(_config(base, held))["train"]) < BYTES_FOR_PROCESSES


def test_no_more_pictures_of_a_list_are_read_than_a_file_may_have(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "still.png").stat().st_size
    monkeypatch.setattr(sources, "_MOST_BYTES", 3 * size)
    read, plain = list[Any](), sources.PictureSource._stored
    monkeypatch.setattr(sources.PictureSource, "_stored", lambda *given: read.append(given) or plain(*given))
    rows = _rows(folder, {"messages": asks({"type": "video", "video": ["still.png"] * 1000}, text("what?"))})
    with pytest.raises(CapstanError, match=f"its video in the row has more than the {3 * size:,} bytes allowed"):
        _data(base, rows)
    assert len(read) == 4


def test_a_part_of_a_video_is_refused_as_all_of_it_would_be_trained(base: Path, folder: Path) -> None:
    for end in ("video_start", "video_end"):
        part = {"type": "video", "video": "clip.mp4", end: 1.0}
        with pytest.raises(CapstanError, match="a video has video_start or video_end, which are not read"):
            _data(base, _rows(folder, {"messages": asks(part, text("what is it?"))}))
    whole = {"type": "video", "video": "clip.mp4", "video_start": None}  # as a column of structs has it
    assert documents(_data(base, _rows(folder, {"messages": asks(whole, text("what is it?"))})))


def test_a_text_with_the_token_of_a_video_is_told_that_it_is_one_of_a_video(base: Path, folder: Path) -> None:
    with pytest.raises(CapstanError, match="'<video>', which stands for a video and may not be text"):
        _data(base, _rows(folder, {"messages": asks(text("what is <video>?"))}))


def test_larger_frames_are_scaled_down_in_proportion(base: Path, folder: Path) -> None:
    rows = _rows(folder, FORMS["a path"])
    data = _data(base, rows, "data.videos.max_pixels=768")
    ((tokens, entries),) = documents(data)
    kept = media.VIDEO.kept(int(entries[1]["height"]), int(entries[1]["width"]))
    assert (kept.height, kept.width, kept.frames) == (24, 32, 4)
    processor = read_processor(base, "it")
    whole = media.VIDEO.shown(CLIP, kept._replace(height=48, width=64), processor.made).content[0]
    scaled = media.VIDEO.shown(CLIP, kept, processor.made).content[0]
    expected = [np.asarray(Image.fromarray(one).resize((32, 24), Image.Resampling.BICUBIC)) for one in whole]
    assert np.array_equal(scaled, np.stack(expected))
    values = np.ascontiguousarray(entries).view(np.uint8).reshape(len(entries), -1)
    ids = (tokens & ID_BITS).astype(np.int32)
    (seen,) = PictureReader(data.store, processor).begin(values, [0, 0], [ids], [0]).arrived()
    assert seen.inputs["video_grid_thw"][0].prod() * 16 <= 2 * 768
