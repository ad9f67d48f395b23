"""A manifest with any content is damaged, of a newer format, or reliable for every reader. Never a traceback."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.view.checkpoints import checkpoint_table, list_checkpoints
from tests.checkpoints import manifest
from trainer.config import Checkpoint
from trainer.errors import Damaged, StorageError
from trainer.run import layout
from trainer.state.checkpoint.manifest import CheckpointManifest, parse_manifest, plan_reads
from trainer.state.checkpoint.retention import Removal, plan_removal
from trainer.state.checkpoint.shard import Key
from trainer.state.optimizer import Interval
from trainer.store.store import open_store

TREES = [
    manifest(4).to_json(),
    replace(manifest(4), optimizer="adamw_8bit").to_json(),
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), -0.0, 1.0]),
    st.text(st.characters(codec=None)),  # lone surrogates too
    st.sampled_from(["../x", "/etc/passwd", "", "\ud800", "\x00", "a|b", layout.manifest(4)]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in children for found in paths(child, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A manifest with up to three places replaced, removed or doubled; mostly sealed as its writer
    would.
    """
    tree = json.loads(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(paths(tree)[1:]))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "double"])):
            case "replace":
                parent[path[-1]] = draw(values)
            case "remove":
                del parent[path[-1]]
            case "double" if isinstance(parent, list):
                parent.insert(path[-1], parent[path[-1]])
        if not tree:
            break
    return signed(tree) if draw(st.integers(0, 9)) and "body" in tree else json.dumps(tree).encode()


def signed(tree: dict[str, Any]) -> bytes:
    """The manifest of a tree whose body may be anything, with the hash of it."""
    text = json.dumps(tree["body"], sort_keys=True, separators=(",", ":"))
    return json.dumps({**tree, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def check(data: bytes) -> None:
    found = outcome_of(lambda: parse_manifest(data, "here"))
    if isinstance(found, CheckpointManifest):
        check_what_readers_rely_on(found)
    else:
        newer = "here is of format ", "here is of the optimizer "
        assert str(found).startswith("here is damaged: " if isinstance(found, Damaged) else newer)


def outcome_of(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except StorageError as error:
        return error


def check_what_readers_rely_on(found: CheckpointManifest) -> None:
    assert len(found.shards) == found.world_size
    assert all(shard.key.startswith(layout.checkpoint(found.step)) and ".." not in shard.key for shard in found.shards)
    states = found.contents.states.items()
    everything = {Key(name, each): (0, each.size(found.numels[name])) for name, every in states for each in every}
    held: dict[Key, list[Interval]] = {key: [] for key in everything}
    for _, overlaps in plan_reads(found.contents, everything):
        for key, interval in overlaps.items():
            held[key].append(interval)
    for key, intervals in held.items():
        borders = [border for interval in sorted(intervals) for border in interval]
        assert (borders[0], borders[-1]) == everything[key]
        assert borders[1:-1:2] == borders[2::2], "each element is held once"
    assert parse_manifest(found.to_json(), "here") == found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_a_changed_manifest_is_damaged_or_can_be_relied_on(data: bytes) -> None:
    check(data)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(), values.map(lambda value: json.dumps(value).encode()), st.text().map(str.encode)))
def test_any_bytes_are_damaged_or_can_be_relied_on(data: bytes) -> None:
    check(data)


@pytest.mark.parametrize("deep", [b"[", b'{"body":', b'{"format": 3, "sha256": "", "body":['])
def test_a_manifest_that_nests_without_end_is_damaged(deep: bytes) -> None:
    with pytest.raises(Damaged):
        parse_manifest(deep * 100_000, "here")


@pytest.mark.parametrize(
    "body", [b'{"step": ' + b"9" * 5000 + b"}", b'{"created": NaN}', b'{"dataset": "\\ud800"}', b"[" * 990 + b"]" * 990]
)
def test_a_body_that_no_writer_makes_is_damaged(body: bytes) -> None:
    with pytest.raises(Damaged):
        parse_manifest(b'{"format": 3, "sha256": "", "body": ' + body + b"}", "here")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_damaged_wherever_it_stands(number: float) -> None:
    tree = json.loads(TREES[0])
    assert isinstance(parse_manifest(signed(tree), "here"), CheckpointManifest)
    tree["body"]["adapter"] = {"alpha": [number]}
    with pytest.raises(Damaged):
        parse_manifest(signed(tree), "here")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mutated())
def test_the_verbs_list_and_plan_over_any_manifest(data: bytes, tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    run.put(layout.manifest(4), data)
    run.put(layout.manifest(2), manifest(2).to_json())

    def verbs() -> Removal:
        checkpoint_table(list_checkpoints(run))
        return plan_removal(run, Checkpoint(keep_last=1, keep_best=1))

    found = outcome_of(verbs)
    if isinstance(found, Removal):
        assert found.steps == [], "nothing is whole: no shard is there"
    else:
        assert "is of format" in str(found)
