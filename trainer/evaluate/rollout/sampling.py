"""The request to a sampler, and the two samplers: the ranks themselves, or vLLM servers of the base.

Each rank continues one text at a time with the sharded model. A server gets the adapter first, then the prompts.
"""

import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from trainer.errors import CapstanError
from trainer.evaluate.generation import Opening, Sampling, continued
from trainer.evaluate.rollout.published import fetch, served_name
from trainer.servers import CompletionsServer, again
from trainer.state.zero.engine import Engine
from trainer.store.store import Store

_AT_ONCE = 64  # requests to each server


class Drawn(NamedTuple):
    """The tokens of an answer, and for each its log p by the sampler in nats, at temperature 1."""

    tokens: list[int]
    log_p: list[float]


class Request(NamedTuple):
    """The answers that a step needs.

    They are `answers` to each of the `prompts`, of at most `room` tokens each, drawn with `seed` and `temperature`. A
    token of `stops` ends one.
    """

    prompts: Sequence[Sequence[int]]
    answers: int
    room: Sequence[int]
    temperature: float
    seed: int
    stops: frozenset[int]


@dataclass(frozen=True)
class OwnSampler:
    """The model on these ranks. `begin` is called before each pass.

    The sampled answers do not depend on the number of ranks.
    """

    engine: Engine
    longest: int | None
    begin: Callable[[], None]

    def sample(self, request: Request) -> list[list[Drawn]]:
        """Return the answers to each prompt. Collective."""
        n = request.answers
        openings, rooms = list[Opening](), list[int]()
        for prompt, room in zip(request.prompts, request.room, strict=True):
            for _ in range(n):
                openings.append(
                    Opening(prompt, lambda written, room=room: written[-1] in request.stops or len(written) >= room)
                )
                rooms.append(room)
        noting = _Noting(max(rooms), request.temperature, seed=request.seed)
        written = continued(self.engine, openings, noting, longest=self.longest, begin=self.begin)
        noted = self.engine.ranks.gather_items(noting.log_p)
        drawn = [Drawn(tokens, noted[number]) for number, tokens in enumerate(written)]
        return [drawn[first : first + n] for first in range(0, len(drawn), n)]


@dataclass(frozen=True)
class _Noting(Sampling):
    """Sampling that records the log p of what it chooses, by the number of the text."""

    log_p: dict[int, list[float]] = field(default_factory=dict)

    def chooser(self, number: int) -> Callable[[Tensor], int]:
        choose, noted = super().chooser(number), self.log_p.setdefault(number, [])

        def note(logits: Tensor) -> int:
            token = choose(logits)
            noted.append(float(logits.log_softmax(-1)[token]))
            return token

        return note


@dataclass
class ServerSampler:
    """Servers of one base. Each has loaded the adapter that was loaded last.

    Servers with Capstan's plugin take the adapter from the store. The others find it below `folder`.
    """

    place: Store
    folder: Path
    servers: Sequence[CompletionsServer] = ()
    _name: str | None = None
    _loaded: int | None = None
    _having: frozenset[CompletionsServer] = frozenset()

    def load(self, adapter: int) -> None:
        """Have every server load the adapter of this update. Raises `NotFound` if it has been removed."""
        if self._loaded == adapter and self._having.issuperset(self.servers):
            return
        name = served_name(self.place, adapter, secrets.token_hex(4))
        lacking = [server for server in self.servers if not again(partial(server.has, name))]
        if lacking:
            fetch(self.place, adapter, self.folder / name)
        for server in lacking:
            again(partial(server.load, name, str(self.folder / name)))
        self.forget()
        self._name, self._loaded, self._having = name, adapter, frozenset(self.servers)

    def forget(self) -> None:
        """Have the servers drop the adapter. A server that has gone has none."""
        if self._name is not None:
            for server in self._having:
                with suppress(CapstanError):
                    server.unload(self._name)
            shutil.rmtree(self.folder / self._name, ignore_errors=True)
            self._name = self._loaded = None

    def sample(self, request: Request) -> list[list[Drawn]]:
        numbers = range(len(request.prompts))
        with ThreadPoolExecutor(_AT_ONCE * len(self.servers)) as pool:
            return list(pool.map(partial(self._ask, request), numbers))

    def _ask(self, request: Request, number: int) -> list[Drawn]:
        """Ask one of the servers for the answers to the prompt of this number. Each attempt asks another server."""
        name, turns = self._name, islice(cycle(self.servers), number % len(self.servers), None)
        assert name is not None
        server = next(turns)

        def ask() -> list[tuple[list[int], list[float]]]:
            return server.sample(
                name,
                list(request.prompts[number]),
                n=request.answers,
                max_tokens=request.room[number],
                temperature=request.temperature,
                seed=(request.seed + number) % 2**31,
                stop_token_ids=sorted(request.stops),
            )

        def turn() -> None:
            nonlocal server
            server = next(turns)
            server.load(name, str(self.folder / name))  # a restarted server has no adapter

        return [Drawn(*one) for one in again(ask, between=turn)]
