"""The request to a sampler, and the sampler on the ranks themselves.

Each rank continues one text at a time with the sharded model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from trainer.evaluate.measure.generation import Opening, Sampling, continued
from trainer.state.zero.engine import Engine


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
