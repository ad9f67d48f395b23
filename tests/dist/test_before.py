"""Files that an earlier version wrote are read today, and results that it computed are computed today.

`golden/before` holds the bucket of a run by that version: its base, rows, compiled data, quantized base and a
checkpoint. In a bucket all names are the same wherever the tests run, and so are the versions of files, which are
hashes there.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from launcher.smoke.local_s3 import S3Server
from launcher.view.status import read_generation
from tests.dist import runs
from tests.dist.launch import launch
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, override, parse_config
from trainer.data.compile.prepare import prepare
from trainer.data.dataset.chapters import open_chapters
from trainer.data.order.settings import Position
from trainer.data.order.stream import train_stream
from trainer.export.write.adapter import export_adapter
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, open_store

BEFORE = Path(__file__).parents[1] / "golden/before"
FACTS = json.loads((BEFORE / "facts.json").read_text(encoding="utf-8"))
RUN = "kept"
# Another version of torch, or a CPU with other instructions, rounds the products of 16-bit matrices otherwise (with
# AVX2 in place of AVX-512 these losses differ by up to 0.0008). There they are compared with this tolerance, and bytes
# cannot be.
SAME_ARITHMETIC = torch.__version__ == FACTS["torch"] and FACTS["cpu"] == sorted(
    name for name, has in torch.cpu.get_capabilities().items() if has is True
)
TOLERANCE = 2e-3  # nats
_LONG = [pytest.param(ranks, marks=pytest.mark.long) for ranks in (1, 3)]


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The bucket as the earlier version left it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = open_store(s3.uri("golden"))
    for entry in bucket.list():
        bucket.delete(entry.key)
    for file in (BEFORE / "bucket").rglob("*"):
        if file.is_file():
            bucket.put(file.relative_to(BEFORE / "bucket").as_posix(), file.read_bytes())
    return bucket


@pytest.fixture
def train(bucket: Store, tmp_path: Path) -> Callable[..., dict[int, float]]:
    """Trains the run on so many ranks, as the launchers do; the losses of what it trained by step."""

    def run(name: str, world_size: int, how: str) -> dict[int, float]:
        config = override(of_run(bucket), f"run.name={name}", f"sharding.deepspeed={BEFORE / 'policy.json'}")
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        arguments, starts = (dump_config(config), FACTS["dataset"], how), 2 if how == "resume" else 1
        outcomes = launch(world_size, runs.run, *arguments, extra_environment=cache)
        assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
        return {
            record["step"]: record["loss"] for record in read_generation(bucket.sub(f"store/{name}"), starts)["step"]
        }

    return run


def of_run(bucket: Store) -> Config:
    return parse_config(bucket.get(f"store/{RUN}/{layout.CONFIG}").decode())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def assert_same_losses(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found == (expected if SAME_ARITHMETIC else pytest.approx(expected, abs=TOLERANCE))


@pytest.mark.parametrize("world_size", [*_LONG, 2])
def test_ten_steps_have_the_losses_and_give_the_adapter_of_before(
    bucket: Store, train: Callable[..., dict[int, float]], tmp_path: Path, world_size: int
) -> None:
    expected, name = FACTS["runs"][str(world_size)], f"ten-{world_size}"
    bucket.put(f"store/{name}/{layout.CONFIG}", dump_config(override(of_run(bucket), f"run.name={name}")).encode())
    assert_same_losses(train(name, world_size, "start"), dict(enumerate(expected["losses"], start=1)))
    export_adapter(bucket.sub(f"store/{name}"), open_store(str(tmp_path / "adapter")))
    if SAME_ARITHMETIC:
        assert sha256((tmp_path / "adapter/adapter_model.safetensors").read_bytes()) == expected["adapter"]


@pytest.mark.parametrize("world_size", [*_LONG, 2])
def test_a_checkpoint_of_before_resumes_at_any_world_size_from_the_data_of_before(
    bucket: Store, train: Callable[..., dict[int, float]], world_size: int
) -> None:
    run, objects = bucket.sub(f"store/{RUN}"), {entry.key for entry in bucket.list("store/bases/")}
    assert committed_steps(run) == [5]
    losses = train(RUN, world_size, "resume")
    expected = dict(enumerate(FACTS["resumed"], start=6))
    if world_size == 2:  # the number of ranks that made it
        assert_same_losses(losses, expected)
    assert losses == pytest.approx(expected, abs=TOLERANCE)
    assert committed_steps(run) == [10]

    # The quantized base of that version has another format, so it is not read: one of today's lies beside it.
    assert {entry.key for entry in bucket.list("store/bases/")} > objects


def test_a_checkpoint_of_before_is_exported_as_before(bucket: Store, tmp_path: Path) -> None:
    assert export_adapter(bucket.sub(f"store/{RUN}"), open_store(str(tmp_path / "adapter"))).step == 5
    written = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert written.keys() == FACTS["exported"].keys()
    for name in ("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert sha256(written[name]) == FACTS["exported"][name], name
    before, now = (
        json.loads(text) for text in ((BEFORE / "adapter_config.json").read_bytes(), written["adapter_config.json"])
    )
    # PEFT writes its own version, which may have more settings, and the targets in no fixed order.
    for settings in (before, now):
        del settings["peft_version"]
        settings["target_modules"].sort()
    assert {name: now.get(name) for name in before} == before


def test_data_compiled_before_is_found_and_gives_the_batches_of_before(bucket: Store) -> None:
    config, store = of_run(bucket), bucket.sub("store")
    objects = [(entry.key, entry.modified) for entry in bucket.list("store/data/")]
    datasets = prepare(config, resolve_base(config.model), store)
    assert datasets.train == FACTS["dataset"]
    assert [(entry.key, entry.modified) for entry in bucket.list("store/data/")] == objects

    chapters = open_chapters(store, datasets.train, store.sub(RUN))
    stream = train_stream(config, chapters, rank=0, world_size=1)
    position, batches = Position(), []
    with closing(chapters):
        for _ in FACTS["order"]:
            step = stream.step(position)
            fields = [
                (batch.input.input_ids, batch.labels, batch.input.position_ids, batch.input.cu_seqlens)
                for batch in step
            ]
            batches.append(sha256(b"".join(tensor.numpy().tobytes() for batch in fields for tensor in batch)))
            position = stream.advance(position)
    assert batches == FACTS["order"]
