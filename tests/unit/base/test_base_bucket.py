"""Weights in a bucket that refuses, loses, stalls or restarts: a retry or one clear error, never other bytes."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.dist import loading
from tests.dist.launch import launch
from tests.material import Workshop, make_base
from trainer.base.find import locate
from trainer.base.find.locate import base_files, describe_base, resolve_base
from trainer.config import Model, dump_config
from trainer.errors import ConfigError, NotFound, StorageError
from trainer.store.safetensors_index import numel

NAME = "model.embed_tokens.weight"
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


class Bucket(ThreadingHTTPServer):
    """The part of S3 that reading takes: ListObjectsV2 and ranged GETs. `answers` come first for objects under
    weights.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.answers, self.asked = folder, list[int](), list[str]()
        self.may_go_on, self.listed = threading.Event(), 0


class _Handler(BaseHTTPRequestHandler):
    server: Bucket

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if "list-type=2" in query:
            self.server.listed += 1
            self._send(200, self._listing())
            return
        name = path.removeprefix("/bucket/llama/")
        self.server.asked.append(name)
        data = (self.server.folder / name).read_bytes() if (self.server.folder / name).is_file() else None
        status = self.server.answers.pop(0) if name.endswith(".safetensors") and self.server.answers else 200
        if data is None or status == 404:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif status in (403, 503):
            code = {403: b"AccessDenied", 503: b"SlowDown"}[status]
            self._send(status, b"<Error><Code>" + code + b"</Code></Error>")
        elif given := self.headers.get("Range"):
            first, last = (int(end) for end in given.removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            self._send(206, part, f"bytes {first}-{first + len(part) - 1}/{len(data)}", stalls=status == 0)
        else:
            self._send(200, data)

    def _send(self, status: int, body: bytes, content_range: str | None = None, stalls: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 12:00:00 GMT")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if stalls:
            self.server.may_go_on.wait(20)
        self.wfile.write(body[half:])

    def _listing(self) -> bytes:
        objects = "".join(
            f"<Contents><Key>llama/{path.name}</Key><LastModified>2026-11-24T12:00:00.000Z</LastModified>"
            f"<ETag>1</ETag><Size>{path.stat().st_size}</Size></Contents>"
            for path in sorted(self.server.folder.iterdir())
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>".encode()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bucket") / "llama", num_hidden_layers=1)


@pytest.fixture
def bucket(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket(folder)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.may_go_on.set()
    server.shutdown()
    server.server_close()


MODEL = Model(base="s3://bucket/llama")


def read(folder: Path) -> bool:
    """Whether the embedding in the bucket is the one in the folder."""
    there, here = (resolve_base(Model(base=base)).tensors[NAME] for base in (MODEL.base, str(folder)))
    size = numel(here)
    return torch.equal(*(torch.frombuffer(source.read(0, size), dtype=torch.bfloat16) for source in (there, here)))


def test_weights_are_read_by_ranges_and_small_files_come_once(bucket: Bucket, folder: Path) -> None:
    assert read(folder)
    small = [name for name in bucket.asked if not name.endswith((".safetensors", "index.json"))]
    assert sorted(small) == SMALL
    bucket.asked.clear()
    assert (base_files(MODEL) / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert bucket.asked == []


@pytest.mark.parametrize(("local_rank", "asked"), [(0, 1), (1, 0)])
def test_a_machine_has_room_for_its_part_of_a_copy_or_the_start_ends(
    local_rank: int, asked: int, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks of six are on this machine. One of them looks."""
    looked = list[Any]()
    monkeypatch.setattr(locate, "check_room", lambda *given: looked.append(given))
    ranks: Any = SimpleNamespace(
        local_rank=local_rank, ranks_per_node=2, world_size=6, on_first=lambda read: read(), agreeing=nullcontext
    )
    base = locate.resolve_base_alike(MODEL.model_copy(update={"local_copy": str(tmp_path / "copy")}), ranks)
    total = sum(file.stat().st_size for file in bucket.folder.glob("*.safetensors"))
    assert looked == [(base.store, tmp_path / "copy", total // 3, "model.local_copy")] * asked


def test_one_rank_asks_for_what_is_not_weights_and_tells_the_others(
    bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    """Each rank has a cache of its own here, as those of other machines have."""
    asked = []
    for world_size in (1, 3):
        caches = str(tmp_path / f"{world_size}-")
        found = launch(world_size, loading.resolved_alike, MODEL.base, caches)
        assert found == [[resolve_base(Model(base=str(folder))).fingerprint, *SMALL]] * world_size
        asked.append((sorted(bucket.asked), bucket.listed))
        bucket.asked.clear()
        bucket.listed = 0
    assert asked[0] == asked[1]
    assert asked[0][0].count("model-00001-of-00006.safetensors") == 1  # the header, whose length is before it


def test_a_load_asks_once_for_what_is_small_whatever_the_number_of_ranks(bucket: Bucket, tmp_path: Path) -> None:
    """All tensors of this base are small. Each rank has some of the values of each."""
    config, asked = dump_config(Workshop(tmp_path).config("load", "quant.type=none")), []
    for world_size in (1, 3):
        bucket.asked.clear()
        launch(world_size, loading.loaded_logits, config, [MODEL.base], [], str(tmp_path))
        asked.append(sorted(name for name in bucket.asked if name.endswith(".safetensors")))
    assert asked[0]
    assert asked[0] == asked[1]


def test_a_plan_asks_for_small_files_alone_and_once(bucket: Bucket) -> None:
    assert describe_base(MODEL).architecture.hidden == 64
    assert "config.json" in bucket.asked
    assert not [name for name in bucket.asked if name.endswith((".safetensors", "index.json"))]
    bucket.asked.clear()
    assert describe_base(MODEL).architecture.hidden == 64
    assert bucket.asked == []


def test_a_folder_without_config_json_is_no_base(bucket: Bucket) -> None:
    with pytest.raises(ConfigError, match=r"model\.base: s3://bucket/other has no config\.json"):
        describe_base(Model(base="s3://bucket/other"))


def test_a_bucket_that_is_overloaded_for_a_while_is_asked_again(bucket: Bucket, folder: Path) -> None:
    bucket.answers = [503]
    assert read(folder)
    assert bucket.answers == []


def test_a_slow_answer_is_waited_for(bucket: Bucket, folder: Path) -> None:
    base = resolve_base(MODEL)
    source = base.tensors[NAME]
    bucket.answers = [0]
    timer = threading.Timer(0.3, bucket.may_go_on.set)
    timer.start()
    data = source.read(0, numel(source))
    timer.join()
    here = resolve_base(Model(base=str(folder))).tensors[NAME]
    assert data == here.read(0, numel(here))


@pytest.mark.parametrize(
    ("status", "kind", "text"), [(403, StorageError, "403 Forbidden"), (404, NotFound, "does not exist")]
)
def test_a_refusal_is_told_at_once_with_the_object(
    bucket: Bucket, status: int, kind: type[StorageError], text: str
) -> None:
    source = resolve_base(MODEL).tensors[NAME]
    bucket.answers = [status] * 20
    with pytest.raises(kind, match=f"s3://bucket/llama/model-.*{text}") as error:
        source.read(0, 8)
    assert error.value.exit_code == 6
    assert len(bucket.answers) == 19  # a refusal is not tried again
