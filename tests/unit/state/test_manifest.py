"""A manifest proves what it says, or is refused with the reason."""

import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import ATTEMPT, NAME, SHAPE, commit, manifest, write_shards
from trainer.errors import Damaged, StorageError
from trainer.run import layout
from trainer.state.checkpoint import manifest as manifests
from trainer.state.checkpoint.learnt_weights import LearntWeights, master_weights
from trainer.state.checkpoint.manifest import (
    TextHashes,
    committed_steps,
    comparable_losses,
    parse_manifest,
    plan_reads,
    problems_of,
    read_doubt,
    read_elements,
    read_manifest,
    readable_manifests,
    whole_checkpoint,
    write_doubt,
)
from trainer.state.checkpoint.shard import Contents, EvenDivision, Key, Shard
from trainer.state.optimizer import State, states_by_name
from trainer.store.store import Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_a_manifest_comes_back_as_it_was() -> None:
    assert parse_manifest(manifest(7).to_json(), "here") == manifest(7)


def damaged(change: Any) -> bytes:
    tree = json.loads(manifest(7).to_json())
    change(tree)
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (manifest(7).to_json()[:-30], "runs/step is damaged: it is not a manifest"),
        (b"", "runs/step is damaged: it is not a manifest"),
        (b"[1, 2]", "runs/step is damaged: it is not a manifest"),
        (b"\xff\xfe\x00", "runs/step is damaged: it is not a manifest"),
        (damaged(lambda tree: tree.pop("sha256")), "runs/step is damaged: it is not a manifest"),
        (damaged(lambda tree: tree["body"].update(step=8)), "its content does not match its sha256"),
        (damaged(lambda tree: tree["body"]["shards"].clear()), "its content does not match its sha256"),
        (damaged(lambda tree: tree.update(sha256="0" * 64)), "its content does not match its sha256"),
        (damaged(lambda tree: tree.update(format=4)), "is of format 4; this version reads format 3"),
        (damaged(lambda tree: tree.update(format=2)), "is of format 2; this version reads format 3"),
    ],
)
def test_what_is_no_whole_manifest_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(StorageError, match=reason):
        parse_manifest(data, "runs/step")


def sealed(tree: dict[str, Any]) -> bytes:
    """As its writer would have sealed it: with the right hash."""
    text = json.dumps(tree["body"], sort_keys=True, separators=(",", ":"))
    return json.dumps(tree | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


@pytest.mark.parametrize(
    "name",
    [
        "/home/reader/lib/site-packages/x.pth",
        "../../../x",
        "additional_chat_templates/../../x.jinja",
        "additional_chat_templates/a/b.jinja",
        "additional_chat_templates/a\\b.jinja",
        "additional_chat_templates/.jinja/../x.jinja",
        "additional_chat_templates/x.jinja\n",
        "additional_chat_templates/\x1b[2J.jinja",
        "tokenizer.json/../../x",
        "./tokenizer.json",
        "config.json",
        "x.pth",
        "",
    ],
)
def test_no_manifest_names_another_file_than_a_tokenizers(name: str) -> None:
    given = replace(manifest(7), text=TextHashes({"tokenizer.json": "0" * 64, name: "1" * 64}, None))
    with pytest.raises(Damaged, match="it is no file of a tokenizer"):
        parse_manifest(given.to_json(), "runs/step")


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
        "additional_chat_templates/tool use.jinja",
    ],
)
def test_a_manifest_names_the_files_of_a_tokenizer(name: str) -> None:
    given = replace(manifest(7), text=TextHashes({name: "1" * 64}, None))
    assert parse_manifest(given.to_json(), "runs/step").text == given.text


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body: body.update(shards=[]), "it names 0 shards, but 2 ranks wrote it"),
        (lambda body: body["shards"].pop(), "it names 1 shards, but 2 ranks wrote it"),
        (lambda body: body["shards"].__setitem__(1, body["shards"][0]), "it names a shard twice"),
        (lambda body: body["shards"][0].update(size="200"), "shards.0.size: Input should be a valid integer"),
        (lambda body: body["shards"][0].update(sha256=""), "shards.0.sha256: String should match"),
        (lambda body: body["shards"][0].update(key="../../other/config.yaml"), "files that are no shards of step 7"),
        (lambda body: body["shards"][0].update(key=layout.shard(8, ATTEMPT, 0)), "files that are no shards of step 7"),
        (lambda body: body["shards"][0].update(key=layout.shard(7, "..", 0)), "files that are no shards of step 7"),
        (lambda body: body.update(shapes={}), "shapes: Dictionary should have at least 1 item"),
        (lambda body: body.update(shapes={NAME: [4, -5]}), f"shapes.{NAME}.1: Input should be greater than"),
        (lambda body: body.update(shapes={NAME: [2**40, 2**40]}), "its shards are too small"),
        # 67 elements with two moments take 804 bytes, and the shards have 800.
        (lambda body: body.update(shapes={NAME: [67]}), "its shards are too small"),
        (lambda body: body.update(step=7.0), "step: Input should be a valid integer"),
        (lambda body: body.update(step=True), "step: Input should be a valid integer"),
        (lambda body: body.update(updates=-1), "updates: Input should be greater than"),
        (lambda body: body.update(created="now"), "created: Input should be a valid number"),
        (lambda body: body.update(created=float("nan")), "created: Input should be a finite number"),
        (lambda body: body.update(position={"next": 1}), "position.next.[key]: String should match"),
        (lambda body: body.update(groups={"lora_A": 5}), "groups.lora_A: Input should be an object"),
        (lambda body: body.update(dataset="\ud800"), "is damaged"),
        (lambda body: body.pop("base"), "base: Field required"),
    ],
)
def test_a_sealed_manifest_that_is_wrong_in_a_field_is_damaged(change: Change, reason: str) -> None:
    tree = json.loads(manifest(7).to_json())
    change(tree["body"])
    with pytest.raises(Damaged, match=re.escape(reason)):
        parse_manifest(sealed(tree), "here")


def test_a_manifest_in_the_folder_of_another_step_is_damaged(run: Store) -> None:
    commit(run, 1)
    run.put(layout.manifest(9), run.get(layout.manifest(1)))
    with pytest.raises(Damaged, match=f"{layout.manifest(9)} is damaged: it is the manifest of step 1"):
        read_manifest(run, 9)


def test_a_loss_that_is_not_finite_is_read_as_none(run: Store) -> None:
    tree = json.loads(manifest(7, eval_loss=2.0).to_json())
    tree["body"]["eval_loss"] = float("nan")
    assert parse_manifest(sealed(tree), "here").eval_loss is None
    assert json.loads(manifest(7, eval_loss=float("inf")).to_json())["body"]["eval_loss"] is None


def test_losses_are_compared_over_the_data_of_the_newest_and_none_is_as_good_as_zero() -> None:
    losses = {5: None, 4: 0.0, 3: 2.0, 2: 1.0, 1: 3.0}
    data = {4: "new", 3: "old", 2: "new", 1: None}
    given = [replace(manifest(step, eval_loss=loss), eval_data=data.get(step)) for step, loss in losses.items()]
    assert comparable_losses(given) == {4: 0.0, 2: 1.0, 1: 3.0}


@pytest.mark.parametrize("ranks", [1, 2, 3, 16, 50])
def test_each_rank_of_any_number_finds_its_elements_in_the_shards_of_another(ranks: int) -> None:
    numels = {"a": 20, "b": 1, "c": 7}
    states = {
        "a": (State("exp_avg"), State("scale", block=3), State("row", length=4)),
        "b": (State("exp_avg"), State("scale", block=3)),
        "c": (State("exp_avg", "U8"), State("row", length=2)),
    }
    everything = {Key(name, state): state.size(numels[name]) for name, every in states.items() for state in every}
    contents, division_now = Contents(EvenDivision(numels, 3), states, 3), EvenDivision(numels, ranks)
    found: dict[Key, set[int]] = {key: set() for key in everything}
    for rank in range(ranks):
        elements = {name: division_now.interval(name, rank) for name in numels}
        assert all(0 <= begin <= end <= numels[name] for name, (begin, end) in elements.items())
        wanted = {key: key.state.held(*elements[key.name]) for key in everything}
        read: dict[Key, list[int]] = {key: [] for key in everything}
        for shard, overlaps in plan_reads(contents, wanted):
            assert overlaps, "no shard is read for nothing"
            for key, (begin, end) in overlaps.items():
                first, last = contents.of(shard)[key]
                assert first <= begin < end <= last
                read[key] += range(begin, end)
        assert read == {key: list(range(*interval)) for key, interval in wanted.items()}
        for key, values in read.items():
            found[key].update(values)
    assert found == {key: set(range(size)) for key, size in everything.items()}
    written = Contents(division_now, states, ranks)
    for rank in range(ranks):
        types = [key.state.dtype for key in written.of(rank)]
        assert types == sorted(types), "bytes come last, so numbers of four bytes are aligned"
    for key, size in everything.items():
        held = [written.of(rank).get(key, (0, 0)) for rank in range(ranks)]
        assert [value for interval in held for value in range(*interval)] == list(range(size))


def test_only_a_manifest_makes_a_checkpoint(run: Store) -> None:
    commit(run, 10)
    commit(run, 9)
    commit(run, 100)
    run.put(layout.shard(200, ATTEMPT, 0), b"data")
    assert committed_steps(run) == [100, 10, 9]


def test_readable_manifests_are_newest_first_and_say_what_was_passed_over(run: Store) -> None:
    for step in (1, 2, 3):
        commit(run, step)
    run.put(layout.manifest(3), b"{")
    skipped: list[str] = []
    assert [found.step for found in readable_manifests(run, skipped)] == [2, 1]
    assert len(skipped) == 1
    assert layout.manifest(3) in skipped[0]
    gone: list[str] = []
    assert [found.step for found in readable_manifests(run, gone, [9, 2])] == [2], "removed since it was listed"
    assert len(gone) == 1
    assert layout.manifest(9) in gone[0]


def test_a_step_is_committed_once(run: Store) -> None:
    first = commit(run, 1)
    with pytest.raises(StorageError, match="exists already"):
        run.create(layout.manifest(1), b"another")
    assert read_manifest(run, 1) == first


def truncate(run: Store, key: str) -> None:
    run.put(key, run.get(key)[:-1])


def flip_a_byte(run: Store, key: str) -> None:
    run.put(key, run.get(key)[:-1] + b"?")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "bytes instead of"),
        (flip_a_byte, "does not match its sha256"),
        (Store.delete, "does not exist"),
    ],
)
def test_a_shard_is_verified_by_its_size_and_hash(run: Store, damage: Any, problem: str) -> None:
    written = commit(run, 1)
    assert problems_of(run, written) == []
    damage(run, written.shards[1].key)
    (found,) = problems_of(run, written)
    assert written.shards[1].key in found
    assert problem in found


def test_a_checkpoint_that_is_not_whole_is_refused_with_what_is_wrong_with_it(run: Store) -> None:
    flip_a_byte(run, commit(run, 1).shards[1].key)
    with pytest.raises(StorageError, match=r"^no checkpoint of .* is whole: .*shard-00001.* does not match its sha256"):
        whole_checkpoint(run)
    commit(run, 2)
    assert whole_checkpoint(run).step == 2
    with pytest.raises(StorageError, match=r"^the checkpoint of step 1 of .* is not whole: .*shard-00001"):
        whole_checkpoint(run, 1)
    assert whole_checkpoint(run, 1, by_manifest=True).step == 1


def test_a_shard_that_holds_other_elements_than_its_place_says_is_damaged(run: Store) -> None:
    """Its bytes are what its sha256 says: two of three shards, sealed as if they were all."""
    shards = write_shards(run, 1, ranks=3)[:2]
    problems = problems_of(run, manifest(1, shards))
    assert len(problems) == 2
    assert "does not hold the elements that its manifest says" in problems[0]


def test_a_shard_that_is_no_safetensors_file_is_damaged_whatever_its_hash(run: Store) -> None:
    """It is passed over, and ends no command as a mistake in the configuration."""
    key, data = layout.shard(1, ATTEMPT, 0), b"no header at all"
    run.put(key, data)
    written = manifest(1, [Shard(key, len(data), hashlib.sha256(data).hexdigest())])
    (problem,) = problems_of(run, written)
    assert key in problem
    assert "its header claims" in problem


def test_learnt_weights_come_whole_or_in_part_in_the_type_of_the_pass(run: Store) -> None:
    learnt = LearntWeights(run, commit(run, 3), torch.bfloat16)
    expected = torch.arange(1, 21, dtype=torch.float32).mul(3).view(SHAPE)  # see tests/checkpoints.py
    assert torch.equal(master_weights(run, learnt.manifest)[NAME], expected)
    assert torch.equal(learnt[NAME], expected.bfloat16())
    assert torch.equal(learnt.part(NAME, 7, 18), expected.flatten()[7:18].bfloat16())
    assert learnt[NAME].dtype == learnt.part(NAME, 7, 18).dtype == torch.bfloat16


def test_a_checkpoint_is_read_by_parts_of_any_size(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written = commit(run, 3)
    wanted = {Key(NAME, state): (3, 18) for state in states_by_name("adamw", {NAME: SHAPE})[NAME]}

    def read() -> dict[tuple[Key, int], float]:
        found = dict[tuple[Key, int], float]()
        for (key, begin, end), data in read_elements(run, written, wanted):
            values = struct.unpack(f"<{end - begin}f", bytes(data))
            found |= {(key, begin + place): value for place, value in enumerate(values)}
        return found

    asked, plain = list[int](), run.get_ranges
    monkeypatch.setattr(run, "get_ranges", lambda key, *of: (asked.append(len(of[0])), plain(key, *of))[1])
    whole = {(key, place): 3.0 * (1 + place) for key in wanted for place in range(3, 18)}
    # Two shards with 7 and 8 of the elements, 4 bytes in each of three states.
    for most, requests in ((2**20, [3, 3]), (0, [1] * 6), (60, [3, 2, 1])):
        asked.clear()
        monkeypatch.setattr(manifests, "PART_BYTES", most)
        assert read() == whole
        assert asked == requests, "no more is in memory at a time"


def test_a_doubt_whose_reason_is_lost_is_still_a_doubt(run: Store) -> None:
    written = commit(run, 3)
    assert read_doubt(run, written) is None
    write_doubt(run, [2, 3], written.generation, "a byte was wrong")
    assert read_doubt(run, written) == "a byte was wrong"
    assert run.exists(layout.doubt(2, written.generation))
    for lost in (b"{}", b"[]", b"\xff"):
        run.put(layout.doubt(3, written.generation), lost)
        assert read_doubt(run, written) == "the file that says why cannot be read"


def test_an_optimizer_of_another_version_is_named(run: Store) -> None:
    text = replace(manifest(3), optimizer="shampoo").to_json()
    with pytest.raises(StorageError, match="is of the optimizer 'shampoo', which this version does not have"):
        parse_manifest(text, "it")


def test_the_documented_way_to_read_a_checkpoint_without_capstan_works(run: Store) -> None:
    """On eight ranks: some of them hold nothing of so small a parameter."""
    commit(run, 120, ranks=8)
    page = (Path(__file__).parents[3] / "docs/checkpoint-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace("runs/first", run.uri.removeprefix("file://")), found)
    assert found["weights"][NAME].tolist() == [
        [120.0 * (1 + 5 * row + column) for column in range(5)] for row in range(4)
    ]


class FailingStore(Store):
    """A store that answers nothing but listings: down for a while, not damaged."""

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        raise StorageError(f"503 for {key}")

    def get(self, key: str) -> bytes:
        raise StorageError(f"503 for {key}")


def test_a_store_that_fails_is_not_a_damaged_checkpoint(run: Store) -> None:
    committed = commit(run, 5)
    failing = FailingStore(run.uri, run._backend, run._prefix)
    with pytest.raises(StorageError, match="503"):
        list(readable_manifests(failing, []))
    with pytest.raises(StorageError, match="503"):
        problems_of(failing, committed)
