"""Copies of what a rank has learnt, at the keeper of another machine, so that they outlive the rank's machine.

Each keeper (`launcher.start.keeper`) of a run on several machines has a process that holds copies for the ranks of the
machine before it (`Holder`). While a rank computes its next update, a thread sends the state after the last one there,
and with it rank 0's records that are not in the store yet. The exchange of an update waits until the update before has
arrived, so all ranks find a common one, whichever machine is lost. A start asks all holders of its machines for what
its ranks do not find beside them (`Circle`).

A connection begins with bytes that the holder draws. Both sides sign what they send with a key that follows from these
and from the holder's secret, and count their messages, so that nothing that was overheard is of use in another
connection, or for a second time. A message is a signed line and, if the line says so, that many bytes and their
HMAC-SHA256. Nothing is held of a message before all of it is known to be genuine.
"""

import hashlib
import hmac
import mmap
import os
import secrets
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.processes.between_machines import own_address, sign, verified
from trainer.processes.ranks import Ranks
from trainer.run.background import say
from trainer.run.segments import Tail
from trainer.state.kept import Address, Kept, LastUpdates, words_sum

_LINE_BYTES = 2**16
_NONCE_BYTES = 32
_SECONDS = 20.0
"""So long one side waits for the other. A holder that does not answer gets no more copies."""
_CONNECTIONS = 1024
"""A holder talks to so many at a time: a few ranks of another machine, and those that are being started."""


class _Talk:
    """One side of a connection."""

    def __init__(self, line: socket.socket, secret: bytes, nonce: bytes, *, holder: bool) -> None:
        self._line, self._file = line, line.makefile("rb")
        self._key = hmac.new(secret, nonce, hashlib.sha256).digest()
        self._holder, self._sent, self._heard = holder, 0, 0

    def tell(self, told: Mapping[str, Any], body: memoryview | None = None) -> None:
        size = 0 if body is None else len(body)
        self._line.sendall(sign(self._key, {**told, "size": size, "number": [self._holder, self._sent]}))
        if body is not None:
            self._line.sendall(body)
            self._line.sendall(self._mac(self._holder, self._sent, body))
        self._sent += 1

    def hear(self, room: Callable[[int], memoryview]) -> tuple[dict[str, Any], memoryview]:
        """Return the next message, and its bytes in the `room` that is given for their number.

        Raises `ConnectionError` if the connection has ended or the message is not genuine.
        """
        told = verified(self._key, self._file.readline(_LINE_BYTES))
        if not isinstance(told, dict) or told.get("number") != [not self._holder, self._heard]:
            raise ConnectionError("the connection has ended, or a message is not genuine")
        body = room(told["size"]) if told["size"] else memoryview(b"")
        if told["size"]:
            read = 0
            while read < len(body):
                if not (more := self._file.readinto(body[read:])):
                    raise ConnectionError("the connection has ended")
                read += more
            made = self._mac(not self._holder, self._heard, body)
            if not hmac.compare_digest(self._file.read(hashlib.sha256().digest_size), made):
                raise ConnectionError("a message is not genuine")
        self._heard += 1
        return told, body

    def _mac(self, holder: bool, number: int, body: memoryview) -> bytes:
        made = hmac.new(self._key, f"{holder} {number} ".encode(), hashlib.sha256)
        made.update(body)
        return made.digest()


def _new_room(size: int) -> memoryview:
    if not 0 <= size <= os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2:
        raise ConnectionError(f"a message of {size} bytes does not fit in this machine's memory")
    return memoryview(bytearray(size))


class Holder:
    """Holds the last two updates of other machines' ranks, in memory of this process.

    `serve` listens at the address of this machine by which it reaches the machine named `first`.
    """

    def __init__(self, first: str) -> None:
        host = own_address(first)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family, backlog=1024)
        self._secret = secrets.token_bytes(32)
        self.address = Address(host, self._listening.getsockname()[1], self._secret)
        self._lock = threading.Lock()
        self._updates = defaultdict[int, dict[int, tuple[dict[str, Any], memoryview]]](dict)
        self._world_size: int | None = None
        self._records = _Records()

    def close(self) -> None:
        self._listening.close()

    def fileno(self) -> int:
        return self._listening.fileno()

    def serve(self) -> None:
        """Talk to everybody who comes, for ever."""
        while True:
            line, _ = self._listening.accept()
            if threading.active_count() > _CONNECTIONS:  # strangers hold the others, for a while
                line.close()
                continue
            threading.Thread(target=self._talk, args=(line,), daemon=True).start()

    def _talk(self, line: socket.socket) -> None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        answers: dict[str, Callable[..., tuple[dict[str, Any], memoryview | None]]] = {
            "keep": self._keep,
            "go_on": self._go_on,
            "list": self._list,
            "give": self._give,
            "add": self._add,
            "give_records": self._give_records,
        }
        with line, suppress(OSError, ValueError, LookupError, TypeError):
            line.settimeout(_SECONDS)  # a stranger says nothing genuine by then
            line.sendall(nonce)
            talk = _Talk(line, self._secret, nonce, holder=True)
            while True:
                told, body = talk.hear(_new_room)
                line.settimeout(None)  # a rank may compute for as long as it likes before it sends the next update
                with self._lock:
                    answer, given = answers[told["what"]](told, body)
                talk.tell(answer, given)

    def _keep(self, told: Mapping[str, Any], body: memoryview) -> tuple[dict[str, Any], None]:
        if told["world_size"] != self._world_size:
            self._updates.clear()
            self._world_size = told["world_size"]
        of_rank, facts = self._updates[told["rank"]], told["facts"]
        if facts["step"] not in of_rank:
            for step in sorted(of_rank)[:-1]:
                del of_rank[step]
        wrong = [step for step, copy in of_rank.items() if step != facts["step"] and not _is_sound(*copy)]
        for step in wrong:
            del of_rank[step]
        of_rank[facts["step"]] = facts, body
        return {"wrong": wrong}, None

    def _go_on(self, told: Mapping[str, Any], _: memoryview) -> tuple[dict[str, Any], None]:
        """Forget all updates but one, because the run goes on from that one."""
        for rank, of_rank in self._updates.items():
            self._updates[rank] = {step: copy for step, copy in of_rank.items() if step == told["step"]}
        return {}, None

    def _list(self, told: Mapping[str, Any], _: memoryview) -> tuple[dict[str, Any], None]:
        same = told["world_size"] == self._world_size
        found = {str(rank): sorted(steps) for rank, steps in self._updates.items()} if same else {}
        return {"updates": found, "records": self._records.found() is not None}, None

    def _give(self, told: Mapping[str, Any], _: memoryview) -> tuple[dict[str, Any], memoryview]:
        facts, body = self._updates[told["rank"]][told["step"]]
        return {"facts": facts}, body

    def _add(self, told: Mapping[str, Any], body: memoryview) -> tuple[dict[str, Any], None]:
        self._records.add(told["stream"], told["begin"], told["at"], bytes(body))
        return {}, None

    def _give_records(self, _told: Mapping[str, Any], _: memoryview) -> tuple[dict[str, Any], memoryview | None]:
        found = self._records.found()
        if found is None:
            return {}, None
        stream, begin, data = found
        return {"stream": stream, "begin": begin}, memoryview(data)


def _is_sound(facts: Mapping[str, Any], body: memoryview) -> bool:
    return words_sum(torch.frombuffer(body, dtype=torch.uint8)) == facts["sum"]


class _Records:
    """The end of rank 0's records, as a `Tail` has them."""

    def __init__(self) -> None:
        self._place: tuple[str, int] | None = None
        self._data = bytearray()

    def add(self, stream: str, begin: int, at: int, data: bytes) -> None:
        self._place = stream, begin
        self._data[at:] = data

    def found(self) -> tuple[str, int, bytes] | None:
        return None if self._place is None else (*self._place, bytes(self._data))


class Client:
    """A rank's connection to a holder. Everything raises `OSError` where the holder does not answer."""

    def __init__(self, address: Address) -> None:
        self._line = socket.create_connection((address.host, address.port), timeout=_SECONDS)
        nonce = self._line.recv(_NONCE_BYTES, socket.MSG_WAITALL)
        self._talk = _Talk(self._line, address.secret, nonce, holder=False)

    def close(self) -> None:
        self._line.close()

    def ask(self, what: str, body: memoryview | None = None, **told: Any) -> tuple[dict[str, Any], memoryview]:
        self._talk.tell({"what": what, **told}, body)
        return self._talk.hear(_new_room)


class Circle:
    """The holders of a start's machines, as one of its ranks asks them. Making it is collective."""

    def __init__(self, ranks: Ranks, own: Address | None) -> None:
        self._rank, self._world_size = ranks.rank, ranks.world_size
        every: list[Address | None] = ranks.gather_objects(own)
        machines = list(dict.fromkeys(one for one in every if one is not None))
        self.own = own if own is not None and every.index(own) == ranks.rank else None
        """The holder of this machine, on the first of its ranks."""
        self.next: Address | None = None
        """The holder that gets this rank's copies: that of the machine after its own."""
        if own is not None and len(machines) > 1:
            self.next = machines[(machines.index(own) + 1) % len(machines)]
        listed = self._asked(self.own, "list", world_size=ranks.world_size) if self.own else None
        held: list[dict[str, Any] | None] = ranks.gather_objects(listed and listed[0])
        there = [(place, found) for place, found in zip(every, held, strict=True) if place is not None and found]
        self._updates = [(place, found["updates"].get(str(self._rank), [])) for place, found in there]
        self._records = next((place for place, found in there if found["records"]), None)

    def updates(self) -> dict[int, tuple[dict[str, Any], Tensor]]:
        """The facts and the state after each update of this rank that some holder has, by step."""
        whole = dict[int, tuple[dict[str, Any], Tensor]]()
        for place, steps in self._updates:
            for step in steps:
                answer = self._asked(place, "give", rank=self._rank, step=step)
                if answer is not None:
                    facts, body = answer[0]["facts"], torch.frombuffer(answer[1], dtype=torch.uint8)
                    if words_sum(body) == facts["sum"]:
                        whole[step] = facts, body
        return whole

    def records(self) -> tuple[str, int, bytes] | None:
        """The end of rank 0's records that some holder has, as `Tail.found` returns it."""
        answer = self._asked(self._records, "give_records") if self._records else None
        return None if answer is None else (answer[0]["stream"], answer[0]["begin"], bytes(answer[1]))

    def go_on_from(self, step: int | None) -> None:
        """Have the holder of this machine forget all updates but the one after `step`."""
        if self.own is not None:
            self._asked(self.own, "go_on", step=step)

    @staticmethod
    def _asked(place: Address, what: str, **told: Any) -> tuple[dict[str, Any], memoryview] | None:
        try:
            with closing(Client(place)) as client:
                return client.ask(what, **told)
        except OSError as error:
            say(f"cluster.keeper: the copies at {place.host} cannot be reached: {error}")
            return None


class Copied:
    """A rank's memory of the last two updates (`Updates`), with a copy of each at the holder of another machine.

    `tail` is the end of rank 0's records, which is copied with each update.
    """

    def __init__(self, own: LastUpdates, circle: Circle, world_size: int, rank: int, tail: Tail | None) -> None:
        self._own, self._circle, self._tail = own, circle, tail
        self._names = {"rank": rank, "world_size": world_size}
        self._fetched = dict[int, tuple[dict[str, Any], Tensor]]()
        self._client: Client | None = None
        self._stored: tuple[str, int, int] = "", 0, 0  # the stream, its begin, and how many bytes of it were sent
        self._newest: tuple[dict[str, Any], Tensor] | None = None
        self._failed = False
        self._sent_again = 0
        self._changed = threading.Condition()
        if circle.next is not None:
            threading.Thread(target=self._send_all, name="copies", daemon=True).start()

    @property
    def source(self) -> str:
        return "neighbour" if self._fetched else "memory"

    def keep(self, step: int, facts: dict[str, Any], size: int, copy: Callable[[Tensor], object]) -> None:
        """Keep the state as `Updates.keep` does, and begin to copy it."""
        self._own.keep(step, facts, size, copy_to := _Remembered(copy))
        with self._changed:
            self._newest = {**facts, "step": step}, copy_to.room
            self._changed.notify_all()

    def arrived(self) -> None:
        """Return when the copy of the last update is there, or cannot get there."""
        with self._changed:
            while self._newest is not None and not self._failed and self._circle.next is not None:
                self._changed.wait()

    def found(self) -> dict[int, tuple[dict[str, Any], Tensor]]:
        """Return what `Updates.found` does, or else what a holder has."""
        if found := self._own.found():
            return found
        self._fetched = self._circle.updates()
        return self._fetched

    def is_sound(self, step: int) -> bool:
        return self._own.is_sound(step)

    def sent_again(self) -> int:
        found, self._sent_again = self._sent_again, 0
        return found

    def go_on_from(self, step: int | None) -> None:
        self._own.go_on_from(step)
        self._circle.go_on_from(step)
        if step in self._fetched:
            facts, state = self._fetched[step]
            self.keep(step, facts, len(state), lambda room: room.copy_(state))

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while self._newest is None:
                    self._changed.wait()
                facts, state = self._newest
            try:
                self._send(facts, state)
            except Exception as error:  # whatever it is, the run goes on without copies
                assert self._circle.next is not None
                say(f"cluster.keeper: no more copies are made at {self._circle.next.host} in this start: {error}")
                self._failed = True
            with self._changed:
                self._newest = None
                self._changed.notify_all()
            if self._failed:
                return

    def _send(self, facts: dict[str, Any], state: Tensor) -> None:
        assert self._circle.next is not None
        if self._client is None:
            self._client = Client(self._circle.next)
        if self._tail is not None and (found := self._tail.found()) is not None:
            stream, begin, data = found
            at = self._stored[2] if self._stored[:2] == (stream, begin) else 0
            self._client.ask("add", memoryview(data)[at:] or None, stream=stream, begin=begin, at=at)
            self._stored = stream, begin, len(data)
        answer, _ = self._keep_there(facts, state)
        for step in answer["wrong"]:  # an update that the holder has had for a while, and that is beside this rank too
            self._sent_again += 1
            if (found := self._own.found().get(step)) is not None:
                self._keep_there(*found)

    def _keep_there(self, facts: dict[str, Any], state: Tensor) -> tuple[dict[str, Any], memoryview]:
        assert self._client is not None
        facts = {**facts, "sum": words_sum(state)}
        return self._client.ask("keep", state.numpy().data, facts=facts, **self._names)


class _Remembered:
    """Copies a state, and remembers where to."""

    room: Tensor

    def __init__(self, copy: Callable[[Tensor], object]) -> None:
        self._copy = copy

    def __call__(self, room: Tensor) -> None:
        self.room = room
        self._copy(room)


def met(ranks: Ranks, kept: Kept | None, *, copies: bool) -> Kept | None:
    """Return the memory of this rank, now that all ranks have met. Collective.

    A rank that no keeper has forked, among others, gets memory of its own, so that it acts as the others. With `copies`
    the updates are copied to other machines, and come from there where this machine has none.
    """
    if not any(forked for (forked,) in ranks.gather(kept is not None)):
        return None
    kept = kept or Kept.made(f"rank {ranks.rank}")
    if not copies:
        return kept
    circle, first = Circle(ranks, kept.holder), ranks.rank == 0
    if first and kept.records.found() is None and (records := circle.records()) is not None:
        kept.records.start(*records)
    updates = Copied(kept.updates, circle, ranks.world_size, ranks.rank, kept.records if first else None)
    return replace(kept, updates=updates)
