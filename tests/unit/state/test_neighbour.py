"""Copies of what ranks learn on other machines: what comes back is what was given, and strangers get nothing."""

import hashlib
import hmac
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.processes.between_machines import sign
from trainer.processes.ranks import Ranks
from trainer.run.segments import Tail
from trainer.state import neighbour
from trainer.state.kept import Kept, Updates
from trainer.state.neighbour import Circle, Client, Copied, Holder, met

SIZE = 1000


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    made = [Holder("127.0.0.1") for _ in range(3)]
    for holder in made:
        threading.Thread(target=holder.serve, daemon=True).start()
    yield made
    for holder in made:
        holder.close()


def meet(members: Sequence[Callable[[Ranks], Any]]) -> list[Any]:
    """Call each with ranks of a world of as many, in a thread each. They have `gather` and `gather_objects`."""
    barrier, box = threading.Barrier(len(members)), [None] * len(members)
    results: list[Any] = [None] * len(members)

    def gather(rank: int, value: Any) -> list[Any]:
        box[rank] = value
        barrier.wait(30)
        every = list(box)
        barrier.wait(30)
        return every

    def run(rank: int) -> None:
        ranks: Any = SimpleNamespace(
            rank=rank,
            world_size=len(members),
            gather_objects=lambda value: gather(rank, value),
            gather=lambda *values: gather(rank, values),
        )
        results[rank] = members[rank](ranks)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def files(count: int) -> list[int]:
    return [os.memfd_create("test") for _ in range(count)]


def trained(steps: int, holder: Holder, first: int = 1) -> Callable[[Ranks], Copied]:
    """A rank of the holder's machine that makes so many updates. The store has the records before that of `first`."""

    def train(ranks: Ranks) -> Copied:
        updates, records = Updates(files(1)[0]), Tail(files(1)[0])
        records.start("metrics/1.jsonl", 0)
        rank = ranks.rank
        copied = Copied(updates, Circle(ranks, holder.address), ranks.world_size, rank, None if rank else records)
        for step in range(1, steps + 1):
            copied.arrived()
            if step == first:
                records.start("metrics/1.jsonl", 2 * (step - 1), b"%d\n" % step)
            else:
                records.add(b"%d\n" % step)
            facts = {"updates": step}
            copied.keep(step, facts, SIZE, lambda room, step=step: room.fill_(10 * step + rank))
        copied.arrived()
        return copied

    return train


def found(holder: Holder) -> Callable[[Ranks], dict[int, list[int]]]:
    """What a rank that has nothing of its own finds when it is started on the holder's machine."""

    def look(ranks: Ranks) -> dict[int, list[int]]:
        copied = Copied(Updates(files(1)[0]), Circle(ranks, holder.address), ranks.world_size, ranks.rank, None)
        return {step: data.unique().tolist() for step, (_, data) in copied.found().items()}

    return look


def test_the_last_two_updates_of_a_lost_machine_are_at_another(holders: list[Holder]) -> None:
    ranks = meet([trained(5, holder) for holder in holders])
    assert [(list(one.found()), one.source) for one in ranks] == [([4, 5], "memory")] * 3, "a rank has its own"
    # The machine of rank 1 is lost: its rank is started on a new one.
    new = Holder("127.0.0.1")
    threading.Thread(target=new.serve, daemon=True).start()
    again = meet([found(one) for one in (holders[0], new, holders[2])])
    assert again[1] == {4: [41], 5: [51]}
    assert again[0] == {}, "its copies were at the lost machine; it still has its own memory"
    holders[2]._updates[1][5][1][SIZE // 2] ^= 1
    assert meet([found(one) for one in (holders[0], new, holders[2])])[1] == {4: [41]}, "a wrong byte is no copy"


def test_with_two_machines_lost_that_are_not_neighbours_in_the_circle_nothing_is(holders: list[Holder]) -> None:
    """Each machine has the copies of the one before it, so those of a machine are gone with the one after it."""
    meet([trained(5, holder) for holder in holders])
    holders[2].close()
    fresh = [Holder("127.0.0.1") for _ in range(2)]
    for one in fresh:
        threading.Thread(target=one.serve, daemon=True).start()
    again = meet([found(one) for one in (holders[0], *fresh)])
    assert again[2] == {4: [42], 5: [52]}
    assert again[1] == {}


def test_what_follows_the_step_that_a_run_goes_on_from_is_forgotten(holders: list[Holder]) -> None:
    meet([trained(5, holder) for holder in holders])

    def go_on(holder: Holder) -> Callable[[Ranks], None]:
        return lambda ranks: Circle(ranks, holder.address).go_on_from(4)

    meet([go_on(holder) for holder in holders])
    assert meet([found(holder) for holder in holders]) == [{4: [40 + rank]} for rank in range(3)]


def test_a_rank_that_went_on_from_a_copy_keeps_it_and_copies_it_again(holders: list[Holder]) -> None:
    meet([trained(5, holder) for holder in holders])
    memory = [files(1)[0] for _ in holders]
    places = [holders[0], holders[2], holders[1]]  # each of the last two ranks is at the other's machine now

    def restored(ranks: Ranks) -> str:
        circle = Circle(ranks, places[ranks.rank].address)
        copied = Copied(Updates(memory[ranks.rank]), circle, ranks.world_size, ranks.rank, None)
        copied.found()
        copied.go_on_from(5)
        copied.arrived()
        return copied.source

    assert meet([restored] * 3) == ["neighbour"] * 3
    assert [list(Updates(file).found()) for file in memory] == [[5]] * 3
    held = [{rank: list(steps) for rank, steps in holder._updates.items()} for holder in places]
    assert held == [{2: [5]}, {1: [5], 0: [5]}, {0: [5], 1: [5]}], "where they were, and at the next machine"


@pytest.mark.parametrize(("first", "records"), [(1, b"1\n2\n3\n4\n"), (3, b"3\n4\n")])
def test_the_last_records_of_a_lost_rank_0_are_at_the_neighbour(
    holders: list[Holder], first: int, records: bytes
) -> None:
    meet([trained(4, holder, first) for holder in holders])

    def start(ranks: Ranks) -> Any:
        kept = met(ranks, Kept.made("test", holders[ranks.rank].address), copies=True)
        assert kept is not None
        return kept.records.found()

    assert meet([start] * 3) == [("metrics/1.jsonl", 2 * (first - 1), records), None, None]


def test_a_copy_with_a_wrong_byte_is_sent_again(holders: list[Holder]) -> None:
    """The holder sees it when the next one comes. The rank has the right one beside it."""
    of_rank, control = (holder._updates for holder in (holders[1], holders[2]))

    def train(ranks: Ranks) -> list[int]:
        updates, again = Updates(files(1)[0]), list[int]()
        copied = Copied(updates, Circle(ranks, holders[ranks.rank].address), ranks.world_size, ranks.rank, None)
        for step in range(1, 5):
            copied.keep(step, {"updates": step}, SIZE, lambda room, step=step: room.fill_(step))
            copied.arrived()
            again.append(copied.sent_again())
            if (step, ranks.rank) == (2, 0):
                of_rank[0][2][1][SIZE // 2] ^= 1
            if (step, ranks.rank) == (3, 0):
                assert sorted(of_rank[0]) == [2, 3]
                assert bytes(of_rank[0][2][1]) == bytes([2]) * SIZE
        return again

    assert meet([train] * 3) == [[0, 0, 1, 0], [0] * 4, [0] * 4]
    assert sorted(of_rank[0]) == sorted(control[1]) == [3, 4]


def test_a_copy_that_has_become_wrong_is_not_listed_any_more(holders: list[Holder]) -> None:
    """The rank may not have it beside itself any more."""
    holder, body = holders[0], memoryview(bytearray(16))
    with closing(Client(holder.address)) as client:

        def keep(step: int) -> list[int]:
            facts = {"step": step, "sum": 0}
            return client.ask("keep", body, facts=facts, rank=0, world_size=3)[0]["wrong"]

        assert keep(1) == []
        holder._updates[0][1][1][7] ^= 1
        assert keep(2) == [1]
        assert client.ask("list", world_size=3)[0]["updates"] == {"0": [2]}


def test_an_update_that_is_sent_again_takes_no_others_place(holders: list[Holder]) -> None:
    with closing(Client(holders[0].address)) as client:
        held = list[list[int]]()
        for step in (1, 2, 2, 1, 3):
            facts = {"step": step, "sum": 0}
            client.ask("keep", memoryview(bytes(16)), facts=facts, rank=0, world_size=3)
            held += client.ask("list", world_size=3)[0]["updates"].values()
    assert held == [[1], [1, 2], [1, 2], [1, 2], [2, 3]]


def test_a_rank_goes_on_from_one_update_here_and_elsewhere() -> None:
    told = list[tuple[str, int | None]]()
    own: Any = SimpleNamespace(go_on_from=lambda step: told.append(("here", step)))
    circle: Any = SimpleNamespace(next=None, go_on_from=lambda step: told.append(("elsewhere", step)))
    for step in (4, None):
        Copied(own, circle, 3, 0, None).go_on_from(step)
    assert told == [("here", 4), ("elsewhere", 4), ("here", None), ("elsewhere", None)]


def test_a_machine_by_itself_keeps_no_copies_of_its_own(holders: list[Holder]) -> None:
    assert meet([lambda ranks: Circle(ranks, holders[0].address).next] * 2) == [None, None]


def test_a_world_of_another_size_finds_nothing(holders: list[Holder]) -> None:
    meet([trained(5, holder) for holder in holders])
    assert meet([found(holder) for holder in holders[:2]]) == [{}, {}]
    meet([trained(2, holder) for holder in holders[:2]])
    again = meet([found(holder) for holder in holders[:2]])
    assert again == [{1: [10], 2: [20]}, {1: [11], 2: [21]}], "nothing of the start before"


def test_a_neighbour_that_is_gone_ends_the_copies_and_not_the_run(
    holders: list[Holder], capfd: pytest.CaptureFixture[str]
) -> None:
    gone = holders[1].address._replace(port=1)

    def train(ranks: Ranks) -> list[int]:
        circle = Circle(ranks, holders[0].address if ranks.rank == 0 else gone)
        updates = Updates(files(1)[0])
        copied = Copied(updates, circle, ranks.world_size, ranks.rank, None)
        for step in (1, 2, 3):
            copied.arrived()
            copied.keep(step, {}, SIZE, lambda room: room.zero_())
        copied.arrived()
        return sorted(updates.found())

    assert meet([train] * 2) == [[2, 3]] * 2
    said = capfd.readouterr().err
    assert said.count("no more copies are made at 127.0.0.1") == 1
    assert "cluster.keeper: the copies at 127.0.0.1 cannot be reached" in said


def test_a_rank_may_compute_for_longer_than_a_stranger_may_say_nothing(
    holders: list[Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbour, "_SECONDS", 1.0)
    with socket.create_connection(holders[0].address[:2], timeout=30) as stranger:
        stranger.recv(32, socket.MSG_WAITALL)
        client = Client(holders[0].address)
        client._line.settimeout(30)
        client.ask("list", world_size=3)
        assert stranger.recv(1) == b"", "hung up on"
        assert client.ask("list", world_size=3)[0]["records"] is False


def test_a_rank_without_a_keeper_acts_as_the_others() -> None:
    def start(ranks: Ranks) -> Kept | None:
        return met(ranks, Kept.made("test") if ranks.rank else None, copies=True)

    assert all(kept is not None for kept in meet([start] * 2))
    assert meet([lambda ranks: met(ranks, None, copies=True)] * 2) == [None, None]


def test_a_run_that_wants_no_copies_makes_none(holders: list[Holder]) -> None:
    def start(ranks: Ranks) -> Any:
        kept = met(ranks, Kept.made("test", holders[ranks.rank].address), copies=False)
        assert kept is not None
        return type(kept.updates)

    assert meet([start] * 2) == [Updates] * 2


def answer_to(holder: Holder, sent: Callable[[bytes], bytes]) -> bytes:
    """What a holder answers to a stranger who sends bytes of their own, after those that the holder has drawn."""
    with socket.create_connection(holder.address[:2], timeout=30) as line:
        nonce = line.recv(32, socket.MSG_WAITALL)
        with suppress(OSError):  # the holder may have hung up already
            line.sendall(sent(nonce))
            line.shutdown(socket.SHUT_WR)
            return line.recv(100)
        return b""


def genuine(holder: Holder, nonce: bytes, number: int = 0, *, holds: bool = False, **told: Any) -> bytes:
    key = hmac.new(holder.address.secret, nonce, hashlib.sha256).digest()
    return sign(key, {"what": "list", "world_size": 3, "size": 0, "number": [holds, number], **told})


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_strangers_get_no_answer(holders: list[Holder]) -> None:
    holder = holders[0]
    assert len({one.address.secret for one in holders}) == 3, "nobody can guess one"
    assert answer_to(holder, lambda nonce: genuine(holder, nonce))
    overheard = genuine(holder, bytes(32))
    for sent in (
        lambda nonce: b"GET / HTTP/1.1\r\n\r\n",
        lambda nonce: b"x" * 2**18,
        lambda nonce: json.dumps({"what": "list", "size": 0}).encode() + b"\n",
        lambda nonce: overheard,
        lambda nonce: genuine(holder, nonce, number=1),
        lambda nonce: genuine(holder, nonce, holds=True),  # as its own words, sent back
        lambda nonce: sign(bytes(32), {"what": "list", "size": 0, "number": [False, 0]}),
        lambda nonce: genuine(holder, nonce, what="__init__"),
        lambda nonce: genuine(holder, nonce, size=2**60),
        lambda nonce: genuine(holder, nonce, size=-1),
    ):
        assert answer_to(holder, sent) == b""


def test_a_holder_hangs_up_on_more_strangers_than_it_has_threads_for(
    holders: list[Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbour, "_CONNECTIONS", 0)
    with socket.create_connection(holders[0].address[:2], timeout=30) as line:
        assert line.recv(1) == b""
    monkeypatch.setattr(neighbour, "_CONNECTIONS", 1024)
    with closing(Client(holders[0].address)) as client:
        assert client.ask("list", world_size=3)[0]["updates"] == {}, "it goes on"


def test_an_update_that_was_changed_on_its_way_is_not_held(holders: list[Holder]) -> None:
    holder, body = holders[0], b"a" * SIZE
    told = {"what": "keep", "rank": 0, "world_size": 3, "facts": {"step": 1, "sum": 0}, "size": SIZE}

    def sends(content: bytes) -> Callable[[bytes], bytes]:
        def sent(nonce: bytes) -> bytes:
            key = hmac.new(holder.address.secret, nonce, hashlib.sha256).digest()
            mac = hmac.new(key, b"False 0 " + body, hashlib.sha256).digest()
            return genuine(holder, nonce, **told) + content + mac

        return sent

    for content, held in ((b"b" + body[1:], {}), (body, {"0": [1]})):
        assert bool(answer_to(holder, sends(content))) is bool(held)
        with closing(Client(holder.address)) as client:
            assert client.ask("list", world_size=3)[0]["updates"] == held


def test_a_rank_that_dies_in_the_middle_of_a_copy_leaves_the_copies_before(holders: list[Holder]) -> None:
    holder = holders[0]
    state = torch.ones(SIZE, dtype=torch.uint8)
    with closing(Client(holder.address)) as client:
        facts = {"step": 1, "sum": 0}
        client.ask("keep", state.numpy().data, facts=facts, rank=0, world_size=3)
    told = {"what": "keep", "rank": 0, "world_size": 3, "facts": {"step": 2, "sum": 0}, "size": SIZE}
    assert answer_to(holder, lambda nonce: genuine(holder, nonce, **told) + b"half") == b""
    with closing(Client(holder.address)) as client:
        assert client.ask("list", world_size=3)[0]["updates"] == {"0": [1]}


def test_the_first_rank_alone_goes_on_with_the_records_that_another_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Records:
        def __init__(self, ranks: Any, holder: Any) -> None:
            self.updates, self.next = dict, None

        def records(self) -> tuple[str, int, bytes]:
            return "metrics", 40, b"a line\n"

    monkeypatch.setattr("trainer.state.neighbour.Circle", Records)
    monkeypatch.setattr("trainer.state.neighbour.Copied", lambda updates, circle, size, rank, records: records)
    for rank in (0, 1):
        ranks: Any = SimpleNamespace(rank=rank, world_size=2, gather=lambda mine: [(mine,), (True,)])
        kept = met(ranks, Kept.made("test"), copies=True)
        assert kept is not None
        assert kept.records.found() == (("metrics", 40, b"a line\n") if rank == 0 else None)
        assert kept.updates is (kept.records if rank == 0 else None)
        own = Kept.made("test")
        own.records.start("own", 0, b"older\n")
        met(ranks, own, copies=True)
        assert own.records.found() == ("own", 0, b"older\n")
