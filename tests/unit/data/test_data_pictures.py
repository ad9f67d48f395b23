"""Rows with pictures, as people write them: all forms give the same tokens and bytes, and what is damaged is a bad row."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.compiled import compile_dataset
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import Config, parse_config
from trainer.data.compile.inputs import find
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT, Dataset
from trainer.data.format.known.pictures.render import PICTURE
from trainer.errors import DataError
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
    "structs": {
        "messages": [{"role": "user", "content": QUESTION}, ANSWER],
        "images": [{"bytes": content(ONE), "path": None}, {"bytes": content(TWO), "path": "two.png"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_has_the_same_tokens_and_pictures(form: str, base: Path, folder: Path) -> None:
    rows = write(folder / ("rows.parquet" if form == "structs" else "rows.jsonl"), FORMS[form])
    data = compiled(config_of(base, rows))
    ((tokens, pictures),) = documents(data)
    tokenizer: Any = read_tokenizer(base, "base")
    first, second = ("<image>" * int(count) for count in pictures["tokens"])
    expected = f"<s>user: <begin>{first}<end>or<begin>{second}<end>what is it?</s>\n<s>assistant: a cat</s>\n"
    assert tokenizer.decode(tokens & ID_BITS) == expected
    assert tokenizer.decode((tokens & ID_BITS)[tokens >= TARGET_BIT]) == "a cat</s>"
    assert pictures[["height", "width"]].tolist() == [(20, 30), (40, 24)]
    for found, made in zip(pictures, (ONE, TWO), strict=True):
        digest = hashlib.sha256(content(made)).hexdigest()
        assert found["sha256"].tobytes().hex() == digest
        assert data.store.get(f"pictures/{digest}") == content(made)
        own = (tokens & ID_BITS)[found["begin"] : found["begin"] + found["tokens"]]
        assert set(own.tolist()) == {tokenizer.convert_tokens_to_ids("<image>")}


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
    ],
)  # fmt: skip
def test_a_row_whose_pictures_are_not_there_is_a_bad_row(row: Any, said: str, base: Path, folder: Path) -> None:
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
