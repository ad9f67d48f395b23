"""An answer of a bucket that is lost, short, doubled or late changes nothing that a run has: each kind of object that is
created once, through a proxy before a real S3 server.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from launcher.smoke.local_s3 import S3Server
from tests import checkpoints
from tests.store.proxy import Fault, How, faulty_proxy
from trainer.config import Checkpoint
from trainer.data.dataset.rollouts import Rollout, Rollouts, commit, commit_judgement, is_committed, is_judged
from trainer.data.render.text_files import kept_text
from trainer.errors import AlreadyExists, ConfigError, StorageError, Unreachable
from trainer.export.destination import holds_export
from trainer.run import layout
from trainer.run.evaluations import keep_evaluation, read_evaluation
from trainer.run.owner import newest_number, read_owner, take
from trainer.run.records import claim_generation
from trainer.state.checkpoint.manifest import TextHashes, whole_checkpoint
from trainer.state.checkpoint.retention import plan_removal
from trainer.store.store import Store, open_store

Through = Callable[..., AbstractContextManager[Store]]
EVALUATION = {"base": {"name": "b"}, "sets": {}, "tasks": {"one": {"acc": {"adapter": 1.0}}}, "bias": {}}
WRITES: tuple[How, ...] = ("lost", "twice", "late", "refused")


@pytest.fixture
def through(s3: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Through:
    """A function that gives an empty folder in a bucket, through a proxy with these faults."""
    uri = f"{s3.uri('test-store')}/{request.node.name.translate(dict.fromkeys(map(ord, '[]|'), '-'))}"

    @contextmanager
    def opened(*faults: Fault) -> Iterator[Store]:
        with faulty_proxy(s3.endpoint, faults) as url, monkeypatch.context() as patched:
            patched.setenv("AWS_ENDPOINT_URL", url)
            yield open_store(uri, request_seconds=1.0)

    return opened


def rollouts() -> list[Rollout]:
    return [Rollout([5, 6], [7, 8, 9], [-0.1, -0.2, -0.3], 1.0, {"prompt": "?"}) for _ in range(3)]


@pytest.mark.parametrize("how", WRITES)
def test_an_object_that_is_created_is_there_whatever_became_of_the_answer(through: Through, how: How) -> None:
    fault = Fault("PUT", "claim", how)
    with through(fault) as store:
        store.create("claim", b"mine")
        assert fault.struck
        assert store.get("claim") == b"mine"
        with pytest.raises(AlreadyExists):
            store.create("claim", b"yours")


def test_an_object_is_anothers_when_two_reads_say_so(through: Through) -> None:
    with through(Fault("PUT", "claim", "lost"), Fault("GET", "claim", "short")) as store:
        store.create("claim", b"mine, and whole")
    with through() as store, pytest.raises(AlreadyExists):
        store.create("claim", b"yours")


@pytest.mark.parametrize("of", ["an object", "a range", "ranges"])
def test_a_connection_that_ends_within_an_answer_is_asked_again(through: Through, of: str) -> None:
    fault, content = Fault("GET", "shard", "cut", times=2), bytes(range(200))
    with through(fault) as store:
        store.put("shard", content)
        found = {
            "an object": lambda: [store.get("shard")],
            "a range": lambda: [store.get_range("shard", 0, 200)],
            "ranges": lambda: store.get_ranges("shard", [0, 100], [100, 200]),
        }[of]()
    assert b"".join(map(bytes, found)) == content
    assert len(fault.struck) == 2


def test_a_connection_that_always_ends_within_an_answer_is_named(
    through: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.store.store.RETRY_SECONDS", 0.1)
    with through(Fault("GET", "shard", "cut", times=99)) as store:
        store.put("shard", b"content")
        with pytest.raises(Unreachable, match="/shard: the connection ended within the answer"):
            store.failing_fast().get_range("shard", 0, 7)


@pytest.mark.parametrize("how", ["lost", "late"])
def test_an_empty_object_is_nobodys_own(through: Through, how: How) -> None:
    with through(Fault("PUT", "000001", how)) as store:
        assert claim_generation(store) == 2, "another start may have claimed the first"


@pytest.mark.parametrize("how", WRITES)
def test_a_chapter_of_rollouts_is_committed_and_read(through: Through, how: How) -> None:
    fault = Fault("PUT", "manifest", how)
    with through(fault) as store:
        assert commit(store, 0, rollouts(), {"reward": 0.5})
        assert fault.struck
        assert is_committed(store, 0)
        assert Rollouts(store, 1).read([0]).shape == (3, 2)
        assert not commit(store, 0, rollouts(), {"reward": 0.7})
        assert Rollouts(store, 1).figures(0) == {"reward": 0.5}


@pytest.mark.parametrize("how", WRITES)
def test_a_judgement_is_committed_and_read(through: Through, how: How) -> None:
    with through(Fault("PUT", "judged.json", how)) as store:
        commit(store, 0, rollouts(), {"reward": 0.5})
        said = np.array([-0.4] * 9, np.float32)
        assert commit_judgement(store, 0, said, 0.1)
        assert is_judged(store, 0)
        assert Rollouts(store, 1, judged=True).figures(0) == {"reward": 0.5, "divergence": 0.1}
        assert Rollouts(store, 1, judged=True).read([0]).shape == (3, 2)
        assert not commit_judgement(store, 0, said, 0.2)


@pytest.mark.parametrize("how", WRITES)
def test_a_run_is_the_one_who_took_it(through: Through, how: How) -> None:
    with through(Fault("PUT", "owners", how)) as store:
        own = take(store, "capstan train", newest_number(store))
        found = read_owner(store)
        assert found is not None
        assert replace(found, time=own.owner.time) == own.owner  # the time that is read is the store's
        assert json.loads(store.get(layout.owner(1)))["by"] == "capstan train"
        with pytest.raises(ConfigError, match="somebody else has just taken"):
            take(store, "capstan train", 0)


SHORT = (r"\.bin", "manifest", "shard", "judged.json", "text/", "evaluations/")


def test_a_short_answer_condemns_nothing(through: Through) -> None:
    """Each kind of object, of which one answer ends early and says that so it is whole."""
    words = b"the words of a tokenizer"
    digest = hashlib.sha256(words).hexdigest()
    with through() as store:
        checkpoints.commit(store, 4)
        commit(store, 0, rollouts(), {"reward": 0.5})
        commit_judgement(store, 0, np.array([-0.4] * 9, np.float32), 0.1)
        store.put(layout.kept_text(digest), words)
        keep_evaluation(store, {**EVALUATION, "step": 4})
    for what in SHORT:
        fault = Fault("GET", what, "short")
        with through(fault) as store:
            assert whole_checkpoint(store).step == 4, what
            assert plan_removal(store, Checkpoint(keep_last=1)).warning is None
            assert Rollouts(store, 1, judged=True).read([0]).shape == (3, 2), what
            assert Rollouts(store, 1, judged=True).figures(0)["divergence"] == 0.1, what
            found = kept_text(store, TextHashes({"tokenizer.json": digest}, None))
            assert found.files == {"tokenizer.json": words}
            assert read_evaluation(store, 4)["tasks"] == EVALUATION["tasks"]
            assert fault.struck, what


def test_an_evaluation_that_came_short_is_added_to(through: Through) -> None:
    with through(Fault("GET", "evaluations/", "short")) as store:
        store.put(layout.evaluation(4), json.dumps({**EVALUATION, "step": 4}).encode())
        keep_evaluation(store, {**EVALUATION, "step": 4, "tasks": {"other": {}}})
        assert read_evaluation(store, 4)["tasks"].keys() == {"one", "other"}


def test_what_two_answers_say_is_damaged(through: Through) -> None:
    with through() as store:
        checkpoints.commit(store, 4)
    with (
        through(Fault("GET", "shard-00001", "short", times=4)) as store,
        pytest.raises(StorageError, match="truncated"),
    ):
        whole_checkpoint(store)


@pytest.mark.parametrize("how", ["lost", "twice", "late"])
def test_an_export_ends_whatever_became_of_the_answer_to_its_last_file(through: Through, how: How) -> None:
    """As export/write/adapter.py writes it: what is there already is refused before, by its card."""
    with through(Fault("PUT", "adapter_model", how)) as store:
        store.create("adapter_model.safetensors", b"weights")
        assert holds_export(store, "adapter_config.json")


def test_a_checkpoint_is_committed_once_whatever_became_of_the_answer(through: Through) -> None:
    for step, how in enumerate(WRITES, 1):
        with through(Fault("PUT", "manifest", how)) as store:
            written = checkpoints.commit(store, step)
            assert whole_checkpoint(store).step == step
            store.create(layout.manifest(step), written.to_json())
            with pytest.raises(AlreadyExists):
                store.create(layout.manifest(step), replace(written, created=2.5).to_json())
