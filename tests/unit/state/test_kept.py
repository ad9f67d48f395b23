"""Memory that outlives a rank: what is found is what was left, or nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.run.segments import Appender, Tail, store_tail
from trainer.state.kept import Kept, LastUpdates, Shares, Updates
from trainer.store.store import open_store


def files(count: int) -> list[int]:
    return [os.memfd_create("test") for _ in range(count)]


def left(memory: int, facts: int) -> list[Tensor]:
    """Partitions that a rank has filled."""
    shares = Shares(memory, facts)
    shares.begin()
    parts = [
        shares.room(torch.empty(sizes, dtype=kind)) for sizes, kind in (((5,), torch.uint8), ((3, 7), torch.float32))
    ]
    for part in parts:
        part.copy_(torch.arange(part.numel()).view(part.shape))
    shares.keep("a base", {"layer": [0.1]})
    return parts


def test_the_next_rank_finds_its_share() -> None:
    memory, facts = files(2)
    before = [part.clone() for part in left(memory, facts)]
    shares = Shares(memory, facts)
    assert shares.found("a base") == {"layer": [0.1]}
    for _ in range(2):
        shares.begin()
        assert all(torch.equal(shares.room(torch.empty_like(part)), part) for part in before)


@pytest.mark.parametrize("place", [0, 3, 64, 147])
def test_a_flipped_byte_is_found(place: int) -> None:
    memory, facts = files(2)
    left(memory, facts)
    (byte,) = os.pread(memory, 1, place)
    os.pwrite(memory, bytes([byte ^ 1]), place)
    assert Shares(memory, facts).found("a base") is None


def test_the_share_of_another_base_or_of_a_load_that_was_killed_is_not_found() -> None:
    memory, facts = files(2)
    assert Shares(memory, facts).found("a base") is None
    left(memory, facts)
    assert Shares(memory, facts).found("another") is None
    shares = Shares(memory, facts)
    shares.room(torch.empty(5, dtype=torch.uint8))
    shares.forget()
    assert Shares(memory, facts).found("a base") is None
    assert os.fstat(memory).st_size == 0 or not any(os.pread(memory, 200, 0))
    os.ftruncate(memory, 0)
    shares.room(torch.empty(5, dtype=torch.uint8))
    assert os.fstat(memory).st_size, "what comes next has room of its own"


def keep(updates: LastUpdates, step: int, size: int = 20, copy: Callable[[Tensor], object] | None = None) -> None:
    updates.keep(step, {"updates": step}, size, copy or (lambda room: room.fill_(step)))


def test_the_last_two_updates_are_found() -> None:
    (file,) = files(1)
    assert Updates(file).found() == {}
    updates = Updates(file)
    for step in range(1, 6):
        keep(updates, step)
    found = Updates(file).found()
    assert {step: (facts["updates"], data.tolist()) for step, (facts, data) in found.items()} == {
        step: (step, [step] * 20) for step in (4, 5)
    }


def test_an_update_in_whose_middle_the_rank_is_killed_leaves_the_one_before() -> None:
    (file,) = files(1)
    updates = Updates(file)
    keep(updates, 1)
    keep(updates, 2)

    def killed(room: Tensor) -> None:
        room[0], room[8] = 0, 2  # the sum of its words is still that of step 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep(updates, 3, copy=killed)
    assert list(Updates(file).found()) == [2]


def test_a_flipped_byte_of_an_update_is_found() -> None:
    (file,) = files(1)
    updates = Updates(file)
    keep(updates, 1)
    keep(updates, 2)
    place = os.fstat(file).st_size - 4096 + 5  # in the slot of step 1, which is the second
    os.pwrite(file, b"\xff", place)
    assert list(Updates(file).found()) == [2]


@pytest.mark.parametrize("place", [0, 3, 9, 14, 40, 4096, 4096 + 19])
def test_a_flipped_byte_is_seen_before_anybody_needs_the_update(place: int) -> None:
    """Of its facts, too, with which nobody could read it."""
    (file,) = files(1)
    updates = Updates(file)
    keep(updates, 1)
    keep(updates, 2)
    assert updates.is_sound(2)
    assert not updates.is_sound(4), "it was not kept, and its place has another one"
    (byte,) = os.pread(file, 1, place)
    os.pwrite(file, bytes([byte ^ 4]), place)  # the slot of step 2 is the first
    assert not updates.is_sound(2)
    assert list(Updates(file).found()) == [1]
    keep(updates, 2)
    assert updates.is_sound(2)
    assert list(Updates(file).found()) == [2, 1]


@pytest.mark.parametrize("place", [0, 5, 9, 13, 40])
def test_a_share_whose_facts_have_a_flipped_byte_is_not_found(place: int) -> None:
    memory, facts = files(2)
    left(memory, facts)
    (byte,) = os.pread(facts, 1, place)
    os.pwrite(facts, bytes([byte ^ 4]), place)
    assert Shares(memory, facts).found("a base") is None


@pytest.mark.parametrize("step", [4, 5, 3, None])
def test_updates_that_will_be_made_again_are_not_found_later(step: int | None) -> None:
    (file,) = files(1)
    updates = Updates(file)
    keep(updates, 4)
    keep(updates, 5)
    again = Updates(file)
    again.found()
    again.go_on_from(step)
    assert list(Updates(file).found()) == [one for one in (4, 5) if one == step]


def test_memory_is_there_for_a_forked_process() -> None:
    kept = Kept.made("rank 0")
    pid = os.fork()
    if pid == 0:
        keep(kept.updates, 7)
        os._exit(0)
    os.waitpid(pid, 0)
    assert list(kept.updates.found()) == [7]


@pytest.mark.parametrize("flushed", [0, 1, 3, 5])
def test_records_that_a_killed_process_had_not_written_come_to_the_store(tmp_path: Path, flushed: int) -> None:
    (file,) = files(1)
    folder = open_store(str(tmp_path))
    appender = Appender(folder, "metrics/1.jsonl", Tail(file))
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in range(5)]
    for number, line in enumerate(lines):
        if number == flushed:
            appender.flush()
        appender.append(line)
    if flushed == 5:
        appender.flush()
    for _ in range(2):  # a second time writes nothing
        store_tail(folder, Tail(file))
        stored = sorted(folder.list("metrics/"), key=lambda entry: entry.key)
        assert b"".join(folder.get(entry.key) for entry in stored) == b"".join(lines)


def test_a_stream_without_a_tail_and_a_tail_without_a_stream_are_left_alone(tmp_path: Path) -> None:
    (file,) = files(1)
    store_tail(open_store(str(tmp_path)), Tail(file))
    assert not list(open_store(str(tmp_path)).list(""))


def test_a_long_stream_keeps_its_newest_block_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.segments.BLOCK_BYTES", 100)
    (file,) = files(1)
    folder = open_store(str(tmp_path))
    appender = Appender(folder, "metrics/1.jsonl", Tail(file))
    for number in range(50):
        appender.append(b"%09d\n" % number)
        if number % 3 == 0:
            appender.flush()
    assert os.fstat(file).st_size < 200
    store_tail(folder, Tail(file))
    stored = sorted(folder.list("metrics/"), key=lambda entry: entry.key)
    assert b"".join(folder.get(entry.key) for entry in stored) == b"".join(b"%09d\n" % number for number in range(50))
