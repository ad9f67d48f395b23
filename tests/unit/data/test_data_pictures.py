"""Rows with pictures, as people write them: all forms give the same tokens and bytes, and what is damaged is a bad row."""

import base64
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.compiled import compile_dataset
from trainer.base.find.locate import resolve_base
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import Config, parse_config
from trainer.data.compile.inputs import find
from trainer.data.compile.prepare import locate
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT, Dataset
from trainer.data.dataset.pictures import PICTURE, PictureFiles
from trainer.data.format.known.pictures.sources import decoded
from trainer.errors import ConfigError, DataError
from trainer.store.store import open_store

pytest.importorskip("torchvision")
from tests.seeing import content, picture, seeing_base

ONE, TWO = picture(30, 20, 1), picture(24, 40, 2)
ANSWER = {"role": "assistant", "content": "a cat"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_base(tmp_path_factory.mktemp("bases") / "qwen3_vl", "qwen3_vl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one.png").write_bytes(content(ONE))
    (tmp_path / "two.png").write_bytes(content(TWO))
    return tmp_path


def config_of(base: Path, rows: Path, *overrides: str) -> Config:
    tree = {
        "model": {"base": str(base)},
        "data": {"train": [{"path": str(rows)}], "format": "pictures", "sequence_length": 256},
        "train": {"steps": 1},
        "run": {"name": "r", "store": "memory://"},
    }
    return parse_config(json.dumps(tree), overrides)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def compiled(config: Config) -> Dataset:
    files, part, settings = find(config)["train"]
    tokenizer = read_tokenizer(Path(config.model.base), "base")
    return compile_dataset(settings, files, tokenizer, open_store("memory://"), "f" * 20, part)


def documents(data: Dataset) -> list[tuple[NDArray[np.uint32], NDArray[Any]]]:
    """The stored tokens of each document, and its pictures."""
    read = data.read(np.arange(len(data.blocks) - 1))
    numbers = np.arange(len(data.lengths))
    pictures = read.gather_column("picture", numbers)
    return [
        (read.gather(np.array([number])), np.ascontiguousarray(found).view(PICTURE)[:, 0])
        for number, found in zip(numbers, pictures, strict=True)
    ]


def asks(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}, ANSWER]


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def uri(made: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(content(made)).decode()}"


QUESTION = "<image>or<image>what is it?"
FORMS: dict[str, dict[str, Any]] = {
    "Hugging Face": {
        "messages": asks({"type": "image", "path": "one.png"}, text("or"), {"type": "image", "url": "two.png"}, text("what is it?"))
    },
    "base64": {
        "messages": asks(
            {"type": "image", "base64": base64.b64encode(content(ONE)).decode()}, text("or"), {"type": "image", "image": uri(TWO)}, text("what is it?")
        )
    },
    "OpenAI": {
        "messages": asks(
            {"type": "image_url", "image_url": {"url": uri(ONE)}}, text("or"), {"type": "image_url", "image_url": "two.png"}, text("what is it?")
        )
    },
    "parts and a column": {
        "messages": asks({"type": "image"}, text("or"), {"type": "image"}, text("what is it?")),
        "images": ["one.png", "two.png"],
    },
    "LLaMA-Factory": {"messages": [{"role": "user", "content": QUESTION}, ANSWER], "images": ["one.png", "two.png"]},
    "LLaVA": {
        "conversations": [{"from": "human", "value": "<image>\nor<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}],
        "image": ["one.png", "two.png"],
    },
    "a member of a row's tar": {
        "messages": [{"role": "user", "content": QUESTION}, ANSWER]
    },
    "members that the row names": {
        "messages": [{"role": "user", "content": QUESTION}, ANSWER], "images": ["k.b.png", "k.a.png"]
    },
    "structs": {
        "messages": [{"role": "user", "content": QUESTION}, ANSWER],
        "images": [{"bytes": content(ONE), "path": None}, {"bytes": content(TWO), "path": "two.png"}],
    },
}  # fmt: skip


def in_a_tar(path: Path, row: dict[str, Any]) -> Path:
    """A sample of WebDataset. If the row names its pictures, they stand in another order."""
    pictures = {"k.0.png": ONE, "k.1.png": TWO}
    if row.get("images"):
        pictures, row = {"k.a.png": TWO, "k.b.png": ONE}, {**row, "images": ["k.b.png", "k.a.png"]}
    members = {name: content(made) for name, made in pictures.items()} | {"k.json": json.dumps(row).encode()}
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, stored in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(stored)
            tar.addfile(header, io.BytesIO(stored))
    return path


def written(form: str, folder: Path, ending: str) -> Path:
    return (
        in_a_tar(folder / f"rows{ending}", FORMS[form])
        if "tar" in ending
        else write(folder / f"rows{ending}", FORMS[form])
    )


ENDINGS = {
    "structs": (".parquet",),
    "a member of a row's tar": (".tar", ".tar.gz"),
    "members that the row names": (".tar",),
}


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("form", "ending"), [(form, ending) for form in FORMS for ending in ENDINGS.get(form, (".jsonl",))]
)
def test_every_form_of_a_row_has_the_same_tokens_and_pictures(
    form: str, ending: str, copy: bool, base: Path, folder: Path
) -> None:
    data = compiled(config_of(base, written(form, folder, ending), f"data.images.copy={copy}"))
    ((tokens, pictures),) = documents(data)
    tokenizer: Any = read_tokenizer(base, "base")
    first, second = ("<image>" * int(count) for count in pictures["tokens"])
    expected = f"<s>user: <begin>{first}<end>or<begin>{second}<end>what is it?</s>\n<s>assistant: a cat</s>\n"
    assert tokenizer.decode(tokens & ID_BITS) == expected
    assert tokenizer.decode((tokens & ID_BITS)[tokens >= TARGET_BIT]) == "a cat</s>"
    assert pictures[["height", "width"]].tolist() == [(20, 30), (40, 24)]
    for found, made in zip(pictures, (ONE, TWO), strict=True):
        assert found["sha256"].tobytes() == hashlib.sha256(content(made)).digest()
        assert PictureFiles(data.store).read(found) == content(made)
        own = (tokens & ID_BITS)[found["begin"] : found["begin"] + found["tokens"]]
        assert set(own.tolist()) == {tokenizer.convert_tokens_to_ids("<image>")}


def mds_shard(columns: dict[str, tuple[str, bytes]]) -> bytes:
    """A shard of MosaicML Streaming with one sample of columns of any size."""
    header = {"column_names": list(columns), "column_encodings": [kind for kind, _ in columns.values()]}
    said = json.dumps({**header, "column_sizes": [None] * len(columns), "format": "mds", "version": 2}).encode()
    values = [value for _, value in columns.values()]
    sample = np.array([len(value) for value in values], "<u4").tobytes() + b"".join(values)
    begin = 4 * 3 + len(said)
    return np.array([1, begin, begin + len(sample)], "<u4").tobytes() + said + sample


def _pixels(made: Image.Image) -> bytes:
    return np.array([*made.size, len(made.mode)], "<u4").tobytes() + made.mode.encode() + made.tobytes()


@pytest.mark.parametrize("encoding", ["png", "jpeg:75", "bytes", "pil"])
def test_a_picture_in_a_column_of_mds_is_that_of_its_row(encoding: str, base: Path, folder: Path) -> None:
    talk = json.dumps(asks({"type": "image"}, text("what?"))).encode()
    stored = _pixels(ONE) if encoding == "pil" else content(ONE)
    (folder / "rows.mds").write_bytes(mds_shard({"messages": ("json", talk), "image": (encoding, stored)}))
    data = compiled(config_of(base, folder / "rows.mds"))
    ((_, (found,)),) = documents(data)
    seen = decoded(PictureFiles(data.store).read(found))
    assert seen.tobytes() == ONE.tobytes()


def test_a_tar_whose_row_names_some_of_its_pictures_has_a_bad_row(base: Path, folder: Path) -> None:
    row = {"messages": asks({"type": "image", "path": "k.0.png"}, text("a"))}
    rows = in_a_tar(folder / "rows.tar", row)
    with pytest.raises(DataError, match=f"^{rows}:1: its fields name 1 of its 2 pictures[^\n]*$"):
        compiled(config_of(base, rows))


def _files(data: Dataset) -> int:
    return len(data.store.list("pictures"))


def test_pictures_stay_where_they_are_unless_copies_are_asked_for(base: Path, folder: Path) -> None:
    """A picture of the row itself is always copied."""
    inside = {"type": "image", "base64": base64.b64encode(content(TWO)).decode()}
    rows = write(folder / "rows.jsonl", {"messages": asks({"type": "image", "path": "one.png"}, inside, text("what?"))})
    for copy, stays in ((False, [1, 0]), (True, [0, 0])):
        data = compiled(config_of(base, rows, f"data.images.copy={copy}"))
        ((_, pictures),) = documents(data)
        assert pictures["stays"].tolist() == stays
        held = b"".join(data.store.get(entry.key) for entry in data.store.list("pictures"))
        assert (content(ONE) in held) == copy
        assert content(TWO) in held


def test_a_picture_that_rows_of_a_batch_repeat_is_copied_once(base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", *[{"messages": asks({"type": "image", "path": "one.png"}, text("what?"))}] * 9)
    data = compiled(config_of(base, rows, "data.images.copy=true"))
    (pack,) = data.store.list("pictures")
    assert pack.size == len(content(ONE))


@pytest.mark.parametrize("ending", [".jsonl", ".tar"])
def test_a_picture_that_changed_after_the_compilation_is_named(ending: str, base: Path, folder: Path) -> None:
    if ending == ".jsonl":
        rows, file = write(folder / "rows.jsonl", FORMS["LLaMA-Factory"]), folder / "two.png"
    else:
        rows = file = in_a_tar(folder / "rows.tar", FORMS["a member of a row's tar"])
    data = compiled(config_of(base, rows))
    ((_, (one, two)),) = documents(data)
    files = PictureFiles(data.store)
    assert files.read(two) == content(TWO)
    stored = bytearray(file.read_bytes())
    stored[stored.index(content(TWO)[-40:]) + 1] ^= 1
    file.write_bytes(stored)
    assert files.read(one) == content(ONE)
    with pytest.raises(DataError, match=f"^{file}: the picture has changed since the data was compiled\\. [^\n]*$"):
        files.read(two)
    file.unlink()
    with pytest.raises(DataError, match=f"^{file}: the picture cannot be read any more [^\n]*data.images.copy[^\n]*$"):
        files.read(two)


def test_limits_of_pixels_decide_what_the_processor_gets(base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", FORMS["LLaMA-Factory"])  # 30 x 20, and 24 x 40
    data = compiled(config_of(base, rows, "data.images.max_pixels=700"))
    ((_, pictures),) = documents(data)
    assert pictures[["height", "width"]].tolist() == [(20, 30), (34, 20)]
    for entry, size in zip(pictures, ((30, 20), (20, 34)), strict=True):
        seen = decoded(PictureFiles(data.store).read(entry), (entry["height"], entry["width"]))
        assert seen.size == size
    ((_, pictures),) = documents(compiled(config_of(base, rows, "data.images.min_pixels=800")))
    assert pictures[["height", "width"]].tolist() == [(24, 35), (40, 24)]


def test_every_setting_of_pictures_that_decides_something_is_in_the_fingerprint(base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", FORMS["LLaMA-Factory"])
    changes = ("max_pixels=700", "min_pixels=800", "copy=true", f"root={folder}", "allow_urls=true")
    names = [
        next(iter(locate(config, resolve_base(config.model)).values()))
        for config in (config_of(base, rows), *(config_of(base, rows, f"data.images.{change}") for change in changes))
    ]
    assert len(set(names)) == len(names)


def test_settings_of_pictures_that_contradict_each_other_are_refused(base: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.images\.min_pixels: 900 is more than data\.images\.max_pixels, 700"):
        config_of(base, folder, "data.images.max_pixels=700", "data.images.min_pixels=900")
    with pytest.raises(
        ConfigError, match=r"data\.images: has no effect with data\.format: chat, whose rows have no pictures"
    ):
        config_of(base, folder, "data.format=chat", "data.images.copy=true")


class _Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/one.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(content(ONE) if found else b"none")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_fetched_once_if_that_is_allowed(base: Path, folder: Path, web: str) -> None:
    rows = write(folder / "rows.jsonl", {"messages": asks({"type": "image", "url": f"{web}/one.png"}, text("what?"))})
    with pytest.raises(DataError, match="is an address on the web, from which nothing is fetched"):
        compiled(config_of(base, rows))
    data = compiled(config_of(base, rows, "data.images.allow_urls=true"))
    ((_, (found,)),) = documents(data)
    assert not found["stays"]
    assert PictureFiles(data.store).read(found) == content(ONE)
    write(rows, {"messages": asks({"type": "image_url", "image_url": {"url": f"{web}/two.png"}}, text("what?"))})
    with pytest.raises(DataError, match=f"^{rows}:1: its picture '{web}/two.png' cannot be fetched [^\n]*404[^\n]*$"):
        compiled(config_of(base, rows, "data.images.allow_urls=true"))


def test_no_token_of_a_picture_is_trained_whatever_is(base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", FORMS["LLaMA-Factory"])
    ((tokens, pictures),) = documents(compiled(config_of(base, rows, "data.train_on.roles=all")))
    trained = tokens >= TARGET_BIT
    inside = np.zeros(len(tokens), bool)
    for one in pictures:
        inside[one["begin"] : one["begin"] + one["tokens"]] = True
    assert not trained[inside].any()
    assert trained[~inside][1:].all()


def test_a_cut_splits_no_picture(base: Path, folder: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, ANSWER, {"role": "user", "content": QUESTION}, ANSWER]
    rows = write(folder / "rows.jsonl", {"messages": talk, "images": ["one.png", "two.png"]})
    ((whole, pictures),) = documents(compiled(config_of(base, rows)))
    inside = int(pictures["begin"][1]) + 2
    ((cut, left),) = documents(compiled(config_of(base, rows, f"data.sequence_length={inside}")))
    assert len(left) == 1
    assert cut.tolist() == whole[: pictures["begin"][1]].tolist()


def _jpeg(made: Image.Image, **options: Any) -> bytes:
    return content(made, "JPEG", **options)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(ONE, exif=exif)


@pytest.mark.parametrize(
    ("made", "size"),
    [
        (_turned, (30, 20)),
        (lambda: _jpeg(ONE.convert("CMYK")), (20, 30)),
        (lambda: content(ONE.convert("LA")), (20, 30)),
        (lambda: content(ONE.convert("P"), "GIF"), (20, 30)),
    ],
)
def test_pictures_of_any_mode_have_the_size_that_they_are_seen_in(
    made: Callable[[], bytes], size: tuple[int, int], base: Path, folder: Path
) -> None:
    (folder / "one.png").write_bytes(made())
    rows = write(folder / "rows.jsonl", {"messages": asks({"type": "image", "path": "one.png"}, text("what?"))})
    ((_, pictures),) = documents(compiled(config_of(base, rows)))
    assert pictures[["height", "width"]].tolist() == [size]


def _moving() -> bytes:
    return content(ONE, "GIF", save_all=True, append_images=[TWO.resize(ONE.size)])


def _bomb() -> bytes:
    """A picture of 400 million pixels in a few hundred kilobytes."""
    return content(Image.new("1", (20_000, 20_000)))


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: _jpeg(picture(200, 200, 3))[:-900], "its picture 'bad' is damaged"),
    "no picture": (lambda: b"hello", "its picture 'bad' is no picture that can be read"),
    "empty": (lambda: b"", "its picture 'bad' is empty"),
    "one pixel": (
        lambda: content(picture(1, 1, 0)),
        "its picture 'bad' has 1 x 1 pixels, in which nothing can be seen",
    ),
    "animated": (_moving, "its picture 'bad' has 2 frames"),
    "a bomb": (_bomb, "its picture 'bad' has (20000 x 20000|too many) pixels"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_picture_is_a_bad_row(case: str, base: Path, folder: Path) -> None:
    made, said = BAD[case]
    (folder / "bad").write_bytes(made())
    good = {"messages": asks({"type": "image", "path": "one.png"}, text("what?"))}
    rows = write(folder / "rows.jsonl", good, {"messages": asks({"type": "image", "path": "bad"}, text("what?"))})
    with pytest.raises(DataError, match=f"^{rows}:2: {said}[^\n]*$"):
        compiled(config_of(base, rows))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": asks({"type": "image", "path": "none.png"}, text("a"))}, "its picture 'none.png' cannot be read"),
        ({"messages": asks({"type": "image", "path": "../x.png"}, text("a"))}, "its picture '../x.png' lies outside of"),
        ({"messages": asks({"type": "image", "path": "/etc/passwd"}, text("a"))}, "its picture '/etc/passwd' lies outside"),
        (
            {"messages": asks({"type": "image", "url": "https://a.b/c.png"}, text("a"))},
            "its picture 'https://a.b/c.png' is an address on the web, from which nothing is fetched",
        ),
        ({"messages": asks({"type": "image", "base64": "%"}, text("a"))}, "a picture is no base64"),
        ({"messages": asks({"type": "image"}, text("a"))}, "turn 1 has a place for a picture, and the row has no more"),
        ({"messages": asks(text("<image>")), "images": ["one.png", "two.png"]}, "it has 2 pictures, and its text has places for 1"),
        ({"messages": asks(text("a <image> b"))}, "its text has '<image>', which stands for a picture"),
        ({"messages": asks({"type": "video", "path": "one.png"})}, "turn 1 has a part of type 'video'"),
        ({"messages": asks(text("<video> a")), "videos": ["a.mp4"]}, "it has 'videos', and only pictures and text are trained"),
        ({"messages": asks({"type": "image", "path": "pipe"}, text("a"))}, "its picture 'pipe' cannot be read"),
        ({"messages": asks({"type": "image", "path": "a\0b"}, text("a"))}, "its picture .* cannot be read"),
        ({"messages": asks({"type": "image", "path": "link.png"}, text("a"))}, "its picture 'link.png' lies outside of"),
        ({"messages": asks({"type": "image", "image_url": {"url": "two.png"}, "path": 3}, text("a"))}, "a picture is 3, and no path"),
    ],
)  # fmt: skip
def test_a_row_whose_pictures_are_not_there_is_a_bad_row(row: Any, said: str, base: Path, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "link.png").symlink_to("/etc/hostname")
    rows = write(folder / "rows.jsonl", row)
    with pytest.raises(DataError, match=f"^{rows}:1: {said}[^\n]*$"):
        compiled(config_of(base, rows))


def test_pictures_may_lie_elsewhere(base: Path, folder: Path) -> None:
    away = folder / "away"
    away.mkdir()
    (folder / "one.png").rename(away / "one.png")
    rows = write(folder / "rows.jsonl", {"messages": asks({"type": "image", "path": "one.png"}, text("what?"))})
    ((_, pictures),) = documents(compiled(config_of(base, rows, f"data.images.root={away}")))
    assert len(pictures) == 1


def test_the_processor_is_asked_once_for_each_tuple_of_sizes(base: Path, folder: Path, monkeypatch: Any) -> None:
    from trainer.base.find.processor import Processor

    asked, plain = list[Any](), Processor._call
    monkeypatch.setattr(Processor, "_call", lambda self, pictures: asked.append(len(pictures)) or plain(self, pictures))
    rows = write(folder / "rows.jsonl", *[FORMS["LLaMA-Factory"]] * 5)
    compiled(config_of(base, rows))
    assert asked == [1, 2]  # once to learn what it makes, and once for these two sizes
