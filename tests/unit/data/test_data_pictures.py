"""Rows with pictures, as people write them: all forms give the same tokens and bytes, and what is damaged is a bad row."""

import base64
import hashlib
import io
import json
import os
import pickle
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.compiled import compile_dataset
from trainer.base.find.locate import resolve_base
from trainer.base.find.media import Shown
from trainer.base.find.media.still import Size, decoded
from trainer.base.find.processor import read_processor
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import Config, Data, parse_config
from trainer.data.compile.inputs import find
from trainer.data.compile.pool import map_batches
from trainer.data.compile.prepare import locate
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import ID_BITS, MISMATCHED_BIT, REJECTED_BIT, TARGET_BIT, Dataset
from trainer.data.dataset.pictures import PICTURE, PictureFiles, PictureWriter, cut_before, cut_behind
from trainer.data.format.known.pictures import sources
from trainer.data.order.settings import Order, Position
from trainer.data.order.stream import Stream
from trainer.errors import ConfigError, Damaged, DataError, StorageError
from trainer.evaluate.prompts import Prompter, read_prompts
from trainer.model.micro_batch import MicroBatch
from trainer.run import layout
from trainer.store.store import open_store

pytest.importorskip("torchvision")
from tests.seeing import content, make_pictured, picture, seeing_base
from trainer.data.order import pictures as pictures_read
from trainer.data.order.pictures import PictureReader, ServedPictures

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


def compiled(config: Config, store: str = "memory://") -> Dataset:
    files, part, settings = find(config)["train"]
    tokenizer = read_tokenizer(Path(config.model.base), "base")
    return compile_dataset(settings, files, tokenizer, open_store(store), "f" * 20, part)


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


def test_a_picture_that_rows_of_a_batch_repeat_is_copied_once_and_read_again_if_it_came_torn(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write(folder / "rows.jsonl", *[{"messages": asks({"type": "image", "path": "one.png"}, text("what?"))}] * 9)
    data = compiled(config_of(base, rows, "data.images.copy=true"))
    (pack,) = data.store.list("pictures")
    assert pack.size == len(content(ONE))
    answers, read = iter([b"torn"]), type(data.store).get_range
    monkeypatch.setattr(type(data.store), "get_range", lambda store, *of: next(answers, None) or read(store, *of))
    assert PictureFiles(data.store).read(documents(data)[0][1][0]) == content(ONE)


def test_a_picture_that_a_batch_has_in_two_shapes_is_kept_once_in_both() -> None:
    writer, (small, large) = PictureWriter(open_store("memory://")), (Size(4, 6), Size(40, 60))
    first, other, again = (
        writer.place(made, shape, None) for made, shape in ((b"one", small), (b"two", small), (b"one", large))
    )
    assert (first.shape, first.place, first.size) == (small, 0, 3)
    assert (other.shape, other.place) == (small, 3)
    assert (again.shape, again.place, again.sha256) == (large, 0, first.sha256)


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
    with pytest.raises(Damaged, match=f"^{file}: the picture has changed since the data was compiled\\. [^\n]*$"):
        files.read(two)
    file.unlink()
    with pytest.raises(Damaged, match=f"^{file}: the picture cannot be read any more [^\n]*data.images.copy[^\n]*$"):
        files.read(two)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"place": 2**31}, ""),
        ({"object": 7}, ""),
        ({"size": 2**32 - 1}, "one has 4,294,967,295 bytes"),
        ({"size": 0}, ""),
        ({"height": 0}, "one has .* 30 x 0 pixels"),
        ({"height": 2**32 - 1, "width": 2**32 - 1}, "one has .* 4294967295 x 4294967295 pixels"),
        ({"height": 2}, "its text has [0-9]+ tokens too many for them"),
        ({"height": 2000, "width": 9}, "they cannot be read as when it was compiled"),  # the processor refuses it
        ({"sha256": b"x" * 32}, ""),
    ],
    ids=str,
)
def test_an_entry_of_a_picture_that_somebody_has_edited_is_one_sentence(
    changed: dict[str, Any], said: str, copy: bool, base: Path, folder: Path
) -> None:
    rows = write(folder / "rows.jsonl", FORMS["LLaMA-Factory"])
    data = compiled(config_of(base, rows, f"data.images.copy={str(copy).lower()}"), (folder / "store").as_uri())
    ((tokens, entries),) = documents(data)
    ids = (tokens & ID_BITS).astype(np.int32)
    reader = PictureReader(data.store, read_processor(base, "it"))

    def read(own: NDArray[Any], ids: NDArray[np.int32]) -> Any:
        values = own.view(np.uint8).reshape(-1, PICTURE.itemsize)
        return reader.begin(values, [0] * len(own), [ids], [len(ids)]).arrived()

    assert len(read(entries, ids)) == 1
    edited = entries.copy()
    for name, value in changed.items():
        edited[name][0] = value
    with pytest.raises(StorageError, match=f"^[^\n]*{said}[^\n]*$"):
        read(edited, ids)
    with pytest.raises(StorageError, match="its text has [0-9]+ tokens too few for them"):
        read(entries, np.zeros_like(ids))
    with pytest.raises(StorageError, match="its text has [0-9,]+ tokens too many for them"):
        read(entries, np.tile(ids, 1000))


@pytest.mark.parametrize(
    "listed", [b"no zlib", zlib.compress(b"[1, 2]"), zlib.compress(b"[" * 9000), zlib.compress(b'[["a"]]')]
)
def test_a_list_of_pictures_that_somebody_has_edited_is_one_sentence(listed: bytes, base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", FORMS["LLaMA-Factory"])
    data = compiled(config_of(base, rows), (folder / "store").as_uri())
    ((_, entries),) = documents(data)
    data.store.put(layout.pictures(int(entries["object"][0])), listed)
    with pytest.raises(Damaged, match=r"^[^\n]*is damaged \(it is no list of names[^\n]*$"):
        PictureFiles(data.store).read(entries[0])


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
    changes = ("max_pixels=700", "min_pixels=800", "copy=true", f"root={folder}", "allow_urls=true", "read_ahead=9")
    names = [
        next(iter(locate(config, resolve_base(config.model)).values()))
        for config in (config_of(base, rows), *(config_of(base, rows, f"data.images.{change}") for change in changes))
    ]
    assert len(set(names)) == len(changes)
    assert names[-1] == names[0]  # how far pictures are read ahead changes none


def test_settings_of_pictures_that_contradict_each_other_are_refused(base: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.images\.min_pixels: 900 is more than data\.images\.max_pixels, 700"):
        config_of(base, folder, "data.images.max_pixels=700", "data.images.min_pixels=900")
    with pytest.raises(
        ConfigError, match=r"data\.images: has no effect with data\.format: chat, whose rows have no pictures"
    ):
        config_of(base, folder, "data.format=chat", "data.images.copy=true")


def test_the_token_that_gets_the_features_of_a_picture_is_no_text(tmp_path: Path, folder: Path) -> None:
    """Gemma 3's templates write another one for a picture."""
    gemma = seeing_base(tmp_path / "gemma3", "gemma3")
    rows = write(folder / "rows.jsonl", {"messages": asks({"type": "image", "path": "one.png"}, text("not <image>"))})
    with pytest.raises(DataError, match=f"^{rows}:1: its text has '<image>', which stands for a picture and may not"):
        compiled(config_of(gemma, rows))


class _Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if "?to=" in self.path:
            self.send_response(302)
            self.send_header("Location", self.path.partition("?to=")[2])
            self.end_headers()
            return
        found = self.path == "/one.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(content(ONE) if found else b"none")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        thread = Thread(target=server.serve_forever, args=[0.02], daemon=True)
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


@pytest.mark.parametrize(
    ("public", "to", "said"),
    [
        (True, "{web}/one.png", "is redirected to '{web}/one.png', an address of a private network"),
        (True, "file:///etc/hostname", "cannot be fetched"),
        (True, "ftp://127.0.0.1/one.png", "is redirected to 'ftp://127.0.0.1/one.png', which is not fetched"),
        (False, "{web}/one.png", None),
    ],
)
def test_a_redirect_leads_from_a_public_address_to_another_one_alone(
    public: bool, to: str, said: str | None, base: Path, folder: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "is_public", lambda host: public and host == "localhost")
    address = f"{web.replace('127.0.0.1', 'localhost')}/x?to={to.format(web=web)}"
    rows = write(folder / "rows.jsonl", {"messages": asks({"type": "image", "url": address}, text("what?"))})
    config = config_of(base, rows, "data.images.allow_urls=true")
    if said is None:
        assert len(documents(compiled(config))) == 1
        return
    with pytest.raises(DataError, match=f"^{rows}:1: its picture [^\n]*{re.escape(said.format(web=web))}[^\n]*$"):
        compiled(config)


@pytest.mark.parametrize(
    ("host", "public"),
    [("127.0.0.1", False), ("169.254.169.254", False), ("10.0.0.1", False), ("::1", False), ("1.1.1.1", True)],
)
def test_an_address_of_a_private_network_is_not_public(host: str, public: bool) -> None:
    assert sources.is_public(host) == public


def test_a_host_is_as_public_as_the_most_private_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(None, None, None, "", (one, 0)) for one in ("1.1.1.1", "fe80::1%eth0")]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    assert not sources.is_public("two.faces")
    found.pop()
    assert sources.is_public("two.faces")


def test_a_file_that_a_server_cannot_send_now_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()

    def answers(*codes: int) -> bytes:
        left = iter(codes)

        def open_(request: Any, timeout: float) -> Any:
            asked.append(timeout)
            if code := next(left):
                raise HTTPError(request.full_url, code, "no", Message(), None)
            return io.BytesIO(b"a file")

        monkeypatch.setattr("urllib.request.build_opener", lambda *_: SimpleNamespace(open=open_))
        asked.clear()
        return sources.fetched("http://a/b", "picture")

    assert answers(503, 500, 0) == b"a file"
    for codes, times in (((503, 503, 503), 3), ((404, 0), 1), ((499, 0), 1)):
        with pytest.raises(DataError, match="its picture 'http://a/b' cannot be fetched"):
            answers(*codes)
        assert len(asked) == times


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


def test_pictures_whose_tokens_depend_on_each_other_are_cut_off_together() -> None:
    """LLaVA-OneVision's processor makes fewer tokens of a picture that is not the only one of its document."""
    places = np.zeros(2, PICTURE)
    places["begin"], places["tokens"] = [2, 10], 4
    for together, before, behind in ((lambda: False, (10, [2]), (6, [4])), (lambda: True, (2, []), (14, []))):
        limit, kept = cut_before(places, 12, together)
        assert (limit, kept["begin"].tolist()) == before
        cut, kept = cut_behind(places, 3, together)
        assert (cut, kept["begin"].tolist()) == behind
        assert cut_before(places, 14, together)[0] == 14
        assert cut_behind(places, 2, together)[0] == 2


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
        (lambda: content(ONE.convert("P"), transparency=0), (20, 30)),
        (lambda: content(ONE.convert("1")), (20, 30)),
        (lambda: content(ONE, "AVIF"), (20, 30)),
        (lambda: content(ONE, "MPO", save_all=True, append_images=[TWO]), (20, 30)),  # a photo of many phones
    ],
)
def test_pictures_of_any_mode_have_the_size_that_they_are_seen_in(
    made: Callable[[], bytes], size: tuple[int, int], base: Path, folder: Path
) -> None:
    (folder / "one.png").write_bytes(made())
    rows = write(folder / "rows.jsonl", {"messages": asks({"type": "image", "path": "one.png"}, text("what?"))})
    ((_, pictures),) = documents(compiled(config_of(base, rows)))
    assert pictures[["height", "width"]].tolist() == [size]


def _moving(kind: str = "GIF") -> bytes:
    return content(ONE, kind, save_all=True, append_images=[TWO.resize(ONE.size)])


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
    "an animated PNG": (lambda: _moving("PNG"), "its picture 'bad' has 2 frames"),
    "an animated WebP": (lambda: _moving("WEBP"), "its picture 'bad' has 2 frames"),
    "16 bits": (
        lambda: content(Image.frombytes("I;16", (30, 20), bytes(1200))),
        "its picture 'bad' has grey values of more than 8 bits, and all values above 255 would become white. Save it",
    ),
    "floats": (
        lambda: content(Image.new("F", (30, 20), 0.5), "TIFF"),
        "its picture 'bad' has grey values of more than 8 bits",
    ),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "its picture 'bad' is no picture that can be read"),
    # Pillow would give it to Ghostscript.
    "a program": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "its picture 'bad' is no picture",
    ),
    "thin": (
        lambda: content(Image.new("RGB", (2, 10_000))),
        "its picture of 2 x 10000 pixels is refused by the base's processor .absolute aspect ratio must be smaller",
    ),
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
        ({"messages": asks({"type": "image", "path": "folder"}, text("a"))}, "its picture 'folder' cannot be read .Is a directory"),
        ({"messages": asks({"type": "image", "path": "a" * 3000}, text("a"))}, r"its picture 'a{10,200}\.\.\. cannot be read .File name too long: .{10,200}\.\.\.\)"),
        ({"messages": asks({"type": "image", "path": "s3://b/x.png"}, text("a"))}, "its picture 's3://b/x.png' lies outside of"),
        ({"messages": asks({"type": "image", "path": "%2e%2e/x.png"}, text("a"))}, "its picture '%2e%2e/x.png' cannot be read"),
        ({"messages": asks({"type": "image", "path": "..\\x.png"}, text("a"))}, "its picture .* cannot be read"),
        ({"messages": asks({"type": "image", "path": "links/hostname"}, text("a"))}, "its picture 'links/hostname' lies outside of"),
        ({"messages": asks({"type": "image", "url": "http://[::1"}, text("a"))}, "its picture 'http://.::1' is an address on the web"),
        ({"messages": asks({"type": "image", "url": "data:image/png,abc"}, text("a"))}, "a picture is a data URI that is not base64"),
        ({"messages": asks({"type": "image", "url": "data:text/html;base64,PGh0bWw+"}, text("a"))}, "its picture in the row is no picture"),
        ({"messages": asks(text("<video>"))}, "its text has '<video>', which stands for a video"),
        ({"messages": ["a", ANSWER], "images": ["one.png"]}, "it has 1 picture, and its text has places for 0"),
        ({"messages": asks({"type": "refusal", "refusal": "no"})}, "turn 1 has a part of type 'refusal'; only parts of pictures"),
        ({"messages": asks({"type": "image", "path": "../x.png"}, text("a"))}, "its picture '../x.png' lies outside of"),
        ({"messages": asks({"type": "image", "path": "/etc/passwd"}, text("a"))}, "its picture '/etc/passwd' lies outside"),
        (
            {"messages": asks({"type": "image", "url": "https://a.b/c.png"}, text("a"))},
            "its picture 'https://a.b/c.png' is an address on the web, from which nothing is fetched",
        ),
        ({"messages": asks({"type": "image", "base64": "%"}, text("a"))}, "a picture is no base64"),
        ({"messages": asks({"type": "image"}, text("a"))}, "turn 1 has a place for a picture, and the row has none in 'images' or 'image'"),
        ({"messages": [{"role": "user", "content": "<image>a"}, ANSWER], "photo": "one.png"}, "turn 1 has a place for a picture, and the row has none in"),
        ({"messages": [{"role": "user", "content": "<audio>a"}, ANSWER], "images": ["one.png"]}, "turn 1 has a place for a sound, and the row has none in"),
        (
            {"messages": [{"role": "user", "content": "<image>a"}, ANSWER, {"role": "user", "content": "<image>b"}, ANSWER], "images": ["one.png"]},
            "turn 3 has a place for a picture, and the row has no more pictures",
        ),
        ({"messages": [{"role": "user", "content": QUESTION}, ANSWER], "images": ["one.png", "two.png"], "image": "one.png"}, "it has other pictures in 'images' than in 'image'"),
        ({"messages": asks({"type": "image", "path": "one.png", "text": "a"})}, "turn 1 has a picture and a text in one part"),
        ({"messages": asks({"type": "image", "path": base64.b64encode(bytes(4000)).decode()})}, "a picture is 'AAAA.*, which is longer than a path. If it is base64"),
        ({"messages": asks(text("<image>")), "images": ["one.png", "two.png"]}, "it has 2 pictures, and its text has places for 1"),
        ({"messages": asks(text("a <image> b"))}, "its text has '<image>', which stands for a picture"),
        ({"messages": asks({"type": "video", "path": "one.png"})}, "its video 'one.png' is a picture, which belongs in 'images' or a part of type 'image'"),
        ({"messages": asks(text("<video> a")), "videos": ["a.mp4"]}, "its video 'a.mp4' cannot be read"),
        ({"messages": asks({"type": "image", "path": "pipe"}, text("a"))}, "its picture 'pipe' cannot be read"),
        ({"messages": asks({"type": "image", "path": "a\0b"}, text("a"))}, "its picture .* cannot be read"),
        ({"messages": asks({"type": "image", "path": "link.png"}, text("a"))}, "its picture 'link.png' lies outside of"),
        ({"messages": asks({"type": "image", "image_url": {"url": "two.png"}, "path": 3}, text("a"))}, "a picture is 3, and no path"),
    ],
)  # fmt: skip
def test_a_row_whose_pictures_are_not_there_is_a_bad_row(row: Any, said: str, base: Path, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "links").symlink_to("/etc")
    (folder / "link.png").symlink_to("/etc/hostname")
    rows = write(folder / "rows.jsonl", row)
    with pytest.raises(DataError, match=f"^{rows}:1: {said}[^\n]*$"):
        compiled(config_of(base, rows))


def test_a_row_may_name_its_picture_twice_and_write_of_tags(base: Path, folder: Path) -> None:
    talk = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a <video>"}]
    rows = write(folder / "rows.jsonl", {"messages": talk, "images": ["one.png"], "image": "one.png"})
    with pytest.raises(DataError, match="its text has '<video>', which stands for a video"):  # of this base
        compiled(config_of(base, rows))
    talk[1]["content"] = "an <audio>"
    ((_, pictures),) = documents(
        compiled(config_of(base, write(rows, json.loads(rows.read_text()) | {"messages": talk})))
    )
    assert len(pictures) == 1


def test_no_path_leads_out_of_the_bucket_of_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = open_store("memory://")
    bucket.put("a/one.png", content(ONE))
    monkeypatch.setattr(sources, "_opened", lambda root: bucket)
    images = {"root": "memory://bucket/of/"}
    given = {"train": [{"path": "x"}], "format": "pictures", "images": images}
    source = sources.PictureSource(Data.model_validate(given), None)
    for path in ("a/one.png", "memory://bucket/of/a/one.png"):
        found = source._stored("picture", path)
        assert found == (content(ONE), f"'{path}'", ("memory://bucket/of/", "a/one.png", 0))
        assert found[2].uri == "memory://bucket/of/a/one.png"
    for path in ("../one.png", "a/../../one.png", "/one.png", "memory://bucket/one.png", "file:///etc/passwd"):
        with pytest.raises(
            DataError, match=f"^its picture '{path}' lies outside of memory://bucket/of/\\. Set data.images"
        ):
            source._stored("picture", path)
    with pytest.raises(DataError, match="^its picture 'one.png' is not in memory://bucket/of/$"):
        source._stored("picture", "one.png")


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
    monkeypatch.setattr(
        Processor, "_call", lambda self, pictures, *more: asked.append(len(pictures)) or plain(self, pictures, *more)
    )
    rows = write(folder / "rows.jsonl", *[FORMS["LLaMA-Factory"]] * 5)
    compiled(config_of(base, rows))
    assert asked == [1, 2]  # once to learn what it makes, and once for these two sizes


# Answers and classes.
SHOWN = {"type": "image", "path": "one.png"}
OTHER = {"type": "image", "path": "two.png"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def said(*parts: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": parts[0] if len(parts) == 1 else list(parts)}


def of(base: Path, rows: Path, kind: str, *more: str) -> Any:
    objective = {"preference_pictures": "dpo", "labelled_pictures": "kto", "classified_pictures": "classification"}[
        kind
    ]
    return config_of(base, rows, f"data.format={kind}", f"objective.name={objective}", *more)


PAIRS: dict[str, dict[str, Any]] = {
    "a prompt": {"prompt": [user(SHOWN, text("what?"))], "chosen": [said("a cat")], "rejected": [said("a dog")]},
    "whole conversations": {
        "chosen": [user(SHOWN, text("what?")), said("a cat")], "rejected": [user(SHOWN, text("what?")), said("a dog")]
    },
    "a column beside parts": {
        "images": ["one.png"], "prompt": [user({"type": "image"}, text("what?"))], "chosen": [said("a cat")], "rejected": [said("a dog")]
    },
    "a column beside whole conversations": {
        "images": ["one.png"],
        "chosen": [user({"type": "image"}, text("what?")), said("a cat")],
        "rejected": [user({"type": "image"}, text("what?")), said("a dog")],
    },
    "a column beside texts": {"images": ["one.png"], "prompt": "what?", "chosen": "a cat", "rejected": "a dog"},
    "LLaMA-Factory": {
        "images": ["one.png"],
        "conversations": [{"from": "human", "value": "<image>what?"}],
        "chosen": {"from": "gpt", "value": "a cat"},
        "rejected": {"from": "gpt", "value": "a dog"},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", PAIRS)
def test_both_answers_of_a_pair_have_the_pictures_of_their_prompt(form: str, base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", PAIRS[form])
    ((tokens, pictures),) = documents(compiled(of(base, rows, "preference_pictures")))
    tokenizer: Any = read_tokenizer(base, "base")
    (border,) = np.flatnonzero(tokens & REJECTED_BIT)
    for answer, own, word in zip(np.split(tokens, [border]), pictures, ("cat", "dog"), strict=True):
        seen = "<image>" * int(own["tokens"])
        asked = f"<s>user: <begin>{seen}<end>what?</s>\n<s>assistant: a {word}</s>\n"
        assert tokenizer.decode(answer & ID_BITS) == asked
        assert tokenizer.decode((answer & ID_BITS)[answer >= TARGET_BIT]) == f"a {word}</s>"
    assert len(set(pictures["sha256"].tolist())) == 1
    image = tokenizer.convert_tokens_to_ids("<image>")
    for own in pictures:
        assert set((tokens & ID_BITS)[own["begin"] : own["begin"] + own["tokens"]].tolist()) == {image}


def test_a_prompt_that_is_cut_from_its_beginning_splits_no_picture(base: Path, folder: Path) -> None:
    row = {**PAIRS["a prompt"], "prompt": [user(text("see"), SHOWN, text("and"), OTHER, text("what?"))]}
    rows = write(folder / "rows.jsonl", row)
    ((whole, pictures),) = documents(compiled(of(base, rows, "preference_pictures")))
    first = np.flatnonzero(whole >= TARGET_BIT)[0]
    within = int(first - pictures["begin"][0] - 2)  # begins inside the first picture
    ((cut, left),) = documents(compiled(of(base, rows, "preference_pictures", f"data.prompt_length={within}")))
    assert len(left) == 2
    image = int((whole & ID_BITS)[pictures["begin"][0]])
    assert int(((cut & ID_BITS) == image).sum()) == int(left["tokens"].sum())
    for own in left:
        assert set((cut & ID_BITS)[own["begin"] : own["begin"] + own["tokens"]].tolist()) == {image}


def test_answers_are_mismatched_by_the_pictures_of_their_prompts_too(base: Path, folder: Path) -> None:
    """All prompts have the same text, and pictures of one size."""
    (folder / "three.png").write_bytes(content(picture(30, 20, 3)))
    third = {"type": "image", "path": "three.png"}
    asked = [(SHOWN, "cat", True), (SHOWN, "dog", False), (third, "emu", True)]
    rows = write(
        folder / "rows.jsonl",
        *[
            {"messages": [user(shown, text("what?")), said(word)], "kto_tag": label}
            if word == "dog"
            else {"prompt": [user(shown, text("what?"))], "completion": [said(word)], "label": label}
            for shown, word, label in asked
        ],
    )
    found = documents(compiled(of(base, rows, "labelled_pictures")))
    tokenizer: Any = read_tokenizer(base, "base")
    mismatched = list[str]()
    for tokens, pictures in found:
        (border,) = np.flatnonzero(tokens & MISMATCHED_BIT)
        second = tokens[border:]
        mismatched.append(tokenizer.decode((second & ID_BITS)[second >= TARGET_BIT]).removesuffix("</s>"))
        assert len(pictures) == 2
        assert tokenizer.decode(tokens & ID_BITS).count("assistant: ") == 2, "once before each answer"
        assert pictures["sha256"][0] == pictures["sha256"][1]
        assert pictures["begin"][1] == border + pictures["begin"][0]
    assert mismatched == ["emu", "emu", "dog"]


def test_a_conversation_with_pictures_has_a_class(base: Path, folder: Path) -> None:
    talks = [
        {"messages": [user(shown, text("what?"))], "label": label} for shown, label in ((SHOWN, "cat"), (OTHER, "dog"))
    ]
    rows = write(folder / "rows.jsonl", *talks)
    found = documents(compiled(of(base, rows, "classified_pictures")))
    assert [len(pictures) for _, pictures in found] == [1, 1]
    assert [tokens[-1] & ID_BITS for tokens, _ in found] == [0, 1]


@pytest.mark.parametrize("kind", ["classified_pictures", "pictures"])
def test_a_prompt_names_its_pictures_as_the_rows_of_the_run_do(kind: str, base: Path, folder: Path) -> None:
    """A head reads the tokens of a row without its class."""
    fields = {"messages": "talk", "images": "shots"}
    talk = [user({"type": "image"}, text("what?"))]
    row = {"talk": talk, "shots": ["one.png"], "label": "cat"}
    if kind == "pictures":
        row |= {"talk": [*talk, said("a cat")]}
    rows = write(folder / "rows.jsonl", row, {**row, "label": "dog"})
    named = f"data.fields={json.dumps(fields)}", f"data.format={kind}"
    objective = ["objective.name=classification", "data.labels=[cat, dog]"] if kind != "pictures" else []
    config = config_of(base, rows, *named, *objective)
    (tokens, pictures), *_ = documents(data := compiled(config))
    (prompt,) = read_prompts(str(write(folder / "prompts.jsonl", {"prompt": "what?", "shots": ["one.png"]})), fields)
    tokenizer: Any = read_tokenizer(base, "base")
    prompter = Prompter(tokenizer, config.data, base)
    ids = (tokens & ID_BITS).astype(np.int32)
    if kind == "pictures":
        found = prompter.question(prompt)
        ids = ids[: np.flatnonzero(tokens >= TARGET_BIT)[0]]
    else:
        found, ids = prompter.judged(prompt), ids[:-1]
    assert found.tokens == ids.tolist()
    values = pictures.view(np.uint8).reshape(len(pictures), -1)
    (seen,) = PictureReader(data.store, read_processor(base, "it")).begin(values, [0], [ids], [len(ids)]).arrived()
    assert found.inputs.keys() == seen.inputs.keys()
    assert all(value.equal(seen.inputs[name]) for name, value in found.inputs.items())


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("preference_pictures", {**PAIRS["a prompt"], "images": ["one.png", "two.png"]}, "it has 2 pictures, and its text has places for 0"),
        ("preference_pictures", {"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ("preference_pictures", {"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen: this is no text and no list of messages"),
        ("preference_pictures", {**PAIRS["a prompt"], "rejected": [said("a cat")]}, "chosen and rejected are the same"),
        (
            "preference_pictures",
            {**PAIRS["a column beside whole conversations"], "rejected": [user(text("what?")), said("a dog")]},
            "it has 1 picture, and its text has places for 0",
        ),
        ("labelled_pictures", {"prompt": "a", "completion": "b"}, "no field 'label'"),
        ("preference_pictures", {"images": ["gone.png"], "prompt": "a", "chosen": "b", "rejected": "c"}, ".*its picture 'gone.png' cannot be read"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_sentence(kind: str, row: Any, reason: str, base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", row)
    with pytest.raises(DataError, match=f"^{rows}:1: {reason}[^\n]*$"):
        compiled(of(base, rows, kind))


def test_answers_cannot_share_a_prompt_with_pictures(base: Path, folder: Path) -> None:
    why = r"preference_pictures, where each answer has the tokens of its prompt to itself"
    with pytest.raises(ConfigError, match=rf"data\.share_prefix: has no effect with data\.format: {why}"):
        of(base, folder, "preference_pictures", "data.share_prefix=true")


# Reading ahead while a run trains.


def _stream(data: Dataset, reader: Any, **options: Any) -> Stream:
    order = Order(weights=(1.0,), sequence_length=256, packing=False, seed=1)
    made = Stream(
        whole(data), order, options.pop("global_batch", 2), 1, options.pop("rank", 0), options.pop("world_size", 1)
    )
    made.pictures = reader
    return made


@pytest.fixture(scope="module")
def many(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rows = make_pictured(tmp_path_factory.mktemp("many"), rows=24)
    return compiled(config_of(base, rows), str(rows.parent / "store"))


class _Counted:
    """A processor that counts the pictures that it gets."""

    def __init__(self, base: Path) -> None:
        self.own, self.count = read_processor(base, "base"), 0
        self.made, self.lacks, self.reads_prompts = self.own.made, self.own.lacks, self.own.reads_prompts

    def inputs(self, pictures: Sequence[Shown], ids: Sequence[int], prompt: int) -> Any:
        self.count += len(pictures)
        return self.own.inputs(pictures, ids, prompt)


def counting(base: Path) -> Any:
    return _Counted(base)


def _pictures_of(steps: Iterable[list[MicroBatch]]) -> list[Any]:
    return [
        [(one.segment, {k: v.tolist() for k, v in one.inputs.items()}) for row in step for one in row.input.seen]
        for step in steps
    ]


@pytest.mark.parametrize("budget", [0, 1, 10**9])
def test_nothing_is_decoded_twice_or_beyond_the_last_step_however_far_is_read_ahead(
    budget: int, base: Path, many: Dataset
) -> None:
    counted, steps = counting(base), 7
    plain = _stream(many, PictureReader(many.store, read_processor(base, "base")))
    expected, position = list[Any](), Position()
    for _ in range(steps):
        expected.append(plain.step(position))
        position = plain.advance(position)
    reader = _stream(many, PictureReader(many.store, counted, budget)).read_from(Position(), steps=steps)
    found = list(islice(reader, steps))
    reader.close()
    assert _pictures_of(found) == _pictures_of(expected)
    assert counted.count == sum(len(one) for row in many_entries(expected) for one in row)


def many_entries(steps: Iterable[list[MicroBatch]]) -> list[Any]:
    return [[row.columns["picture"].values for row in step] for step in steps]


def test_ranks_decode_what_they_train_and_nothing_else(base: Path, many: Dataset) -> None:
    """Three ranks from the middle of an epoch on: together they decode each picture of the steps that are left once."""
    place = _stream(many, None)
    position = Position()
    for _ in range(3):
        position = place.advance(position)
    counts = list[int]()
    for rank in range(3):
        counted = counting(base)
        stream = _stream(many, PictureReader(many.store, counted, 10**9), rank=rank, world_size=3)
        reader = stream.read_from(position, steps=4)
        rows = list(islice(reader, 4))
        reader.close()
        assert counted.count == sum(len(row.columns["picture"].values) for step in rows for row in step)
        counts.append(counted.count)
    alone = counting(base)
    reader = _stream(many, PictureReader(many.store, alone, 10**9)).read_from(position, steps=4)
    list(islice(reader, 4))
    reader.close()
    assert sum(counts) == alone.count


def test_pictures_are_read_ahead_until_their_bytes_fill_the_budget(base: Path, many: Dataset) -> None:
    """A budget for the pictures of a few documents leaves the others alone."""
    sizes, counts = (10**9, 1), list[int]()
    for budget in sizes:
        counted = counting(base)
        held = PictureReader(many.store, counted, budget)
        reader = _stream(many, held).read_from(Position(), steps=12)
        for _ in range(6):
            next(reader)
        reader.close()
        counts.append(counted.count)
        assert held.has_room or budget == 1
    assert counts[0] > counts[1]


def test_what_is_read_ahead_counts_by_what_the_pictures_before_took(base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", FORMS["LLaMA-Factory"])
    data = compiled(config_of(base, rows), (folder / "store").as_uri())
    ((tokens, entries),) = documents(data)
    ids = (tokens & ID_BITS).astype("i4")
    given = entries.view(np.uint8).reshape(-1, PICTURE.itemsize), [0] * len(entries), [ids], [len(ids)]
    first = PictureReader(data.store, read_processor(base, "it")).begin(*given).arrived()
    size = sum(value.nbytes for one in first for value in one.inputs.values())
    reader = PictureReader(data.store, read_processor(base, "it"), budget=size + size // 2)
    reader.begin(*given).arrived()
    once = reader.begin(*given)
    assert reader.has_room, "for half of these pictures"
    twice = reader.begin(*given)
    assert not reader.has_room
    once.arrived()
    assert reader.has_room
    twice.arrived()
    reader.leave_out(lambda key: True)
    reader.begin(*given).arrived()
    waiting = [reader.begin(*given), reader.begin(*given)]
    assert not reader.has_room, "those that are left out say nothing of others"
    for one in waiting:
        one.arrived()
    processor = read_processor(base, "it")
    apart = PictureReader(data.store, processor, size, 1, lambda: processor, before_processes=0)
    apart.leave_out(lambda key: True)
    apart.begin(*given).arrived()
    assert apart.workers is None, "they would read what is left out"


def test_a_server_gets_the_text_and_the_pictures_of_a_document_in_their_order(base: Path, folder: Path) -> None:
    rows = write(folder / "rows.jsonl", FORMS["LLaMA-Factory"])
    data = compiled(config_of(base, rows), (folder / "store").as_uri())
    ((tokens, entries),) = documents(data)
    processor, ids = read_processor(base, "it"), (tokens & ID_BITS).tolist()
    sizes = tuple(Size(int(one["height"]), int(one["width"])) for one in entries)
    asked = ServedPictures(data.store, processor).prompt(entries, ids)
    texts = list(processor.replacements(sizes))
    assert [ids[span.start : span.stop] for span in asked.spans] == [processor.encode(text) for text in texts]
    sent = [
        base64.b64decode(one["image_url"]["url"].partition(",")[2]) for one in asked.parts if one["type"] == "image_url"
    ]
    assert [Image.open(io.BytesIO(one)).size for one in sent] == [(width, height) for height, width in sizes]
    whole_text = "".join(one["text"] if one["type"] == "text" else texts.pop(0) for one in asked.parts)
    assert processor.encode(whole_text) == ids


def test_every_type_of_tensor_that_a_process_makes_comes_back_with_its_bits() -> None:
    made = {str(kind): torch.tensor([[1.5, -2.25], [3e-3, 0.0]]).to(kind) for kind in (torch.bfloat16, torch.float32)}
    made["ids"] = torch.tensor([[1, 4, 4]])
    there = {name: (pictures_read._bits(value), str(value.dtype)) for name, value in made.items()}
    found = pictures_read._as_tensors(pickle.loads(pickle.dumps(there)))
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in made.items()}
    assert all(value.equal(made[name]) for name, value in found.items())


def test_worker_processes_make_what_threads_make(base: Path, many: Dataset) -> None:
    again = partial(read_processor, base, "base")
    found = list[Any]()
    for processes in (0, 1):
        reader = PictureReader(many.store, again(), 10**9, processes, again, before_processes=2)
        steps = _stream(many, reader).read_from(Position(), steps=5)
        found.append(_pictures_of(islice(steps, 5)))
        steps.close()
        assert (reader.workers is not None) == (processes > 0)
    assert found[0] == found[1]


def test_windows_that_are_skipped_have_no_pictures(base: Path, many: Dataset) -> None:
    counted = counting(base)
    stream = _stream(many, PictureReader(many.store, counted, 10**9))
    second = stream.advance(Position())
    reader = stream.read_from(Position(), steps=2, skipped=[second])
    first, blind, third = islice(reader, 3)
    reader.close()
    assert not any(row.input.seen for row in blind)
    assert counted.count == sum(len(row.columns["picture"].values) for step in (first, third) for row in step)


def test_sources_of_pictures_are_mixed_by_their_weights(base: Path, folder: Path) -> None:
    """Rows with pictures from one file, and rows of text from another; each has its pictures in any order."""
    seen = write(folder / "seen.jsonl", *[FORMS["LLaMA-Factory"]] * 4)
    texts = write(folder / "texts.jsonl", *[{"messages": [{"role": "user", "content": "hi"}, ANSWER]}] * 4)
    sources = f"data.train=[{{path: {seen}, weight: 2}}, {{path: {texts}}}]"
    data = compiled(config_of(base, seen, sources), str(folder / "store"))
    order = Order(weights=(2.0, 1.0), sequence_length=256, packing=True, seed=1)
    stream = Stream(whole(data), order, 1, 1, 0, 1, pictures=PictureReader(data.store, read_processor(base, "base")))
    rows = [row for step in stream.epoch(0) for row in step]
    visits = Counter(number for row in rows for number in row.documents)
    assert visits == dict.fromkeys(range(4), 2) | dict.fromkeys(range(4, 8), 1)
    for row in rows:
        assert len(row.input.seen) == sum(number < 4 for number in row.documents)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("copy", [False, True])
def test_several_processes_compile_what_one_does(
    copy: bool, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process writes the pictures of its batches of rows, as objects that are called by their content."""
    monkeypatch.setattr("trainer.data.source.rows.BATCH_ROWS", 8)
    config = config_of(base, make_pictured(folder / "many", 24), f"data.images.copy={copy}")
    files, part, settings = find(config)["train"]
    found = list[tuple[dict[str, bytes], Dataset]]()
    for processes in (1, 2):
        store = open_store(str(folder / f"store-{processes}"))
        mapper = partial(map_batches, processes=processes)
        tokenizer = read_tokenizer(base, "base")
        data = compile_dataset(settings, files, tokenizer, store, "f" * 20, part, mapper=mapper)
        found.append(({one.key: store.get(one.key) for one in store.list("")}, data))
    (one, alone), (other, several) = found
    assert [key for key in one if "/pictures/" in key] != []
    assert {key: value for key, value in one.items() if "manifest" not in key} == {
        key: value for key, value in other.items() if "manifest" not in key
    }
    for (tokens, pictures), (same, others) in zip(documents(alone), documents(several), strict=True):
        assert np.array_equal(tokens, same)
        assert np.array_equal(pictures, others)
