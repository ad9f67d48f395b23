"""Answers of a sharded model: it continues texts a token at a time, one text on each rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.evaluate.measure.decoding import GrowingText, next_logits
from trainer.state.zero.engine import Engine

Ended = Callable[[Sequence[int]], bool]
Told = Callable[[int, int], None]


class Opening(NamedTuple):
    """The tokens of a text to continue, and a test of whether the continuation is complete."""

    tokens: Sequence[int]
    ended: Ended


@dataclass(frozen=True)
class Sampling:
    """How a next token is chosen.

    A `temperature` of 0 takes the most likely token. Otherwise the token is drawn from the likeliest tokens that
    together have the probability `top_p`. A draw depends only on `seed` and the number of the text, not on the ranks.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def chooser(self, number: int) -> Callable[[Tensor], int]:
        """Return a function from logits (V,) fp32 to a token, for the text of this number."""
        if not self.temperature:
            return lambda logits: int(logits.argmax())
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        warpers = [
            TemperatureLogitsWarper(self.temperature),
            *([TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []),
        ]
        draw = torch.Generator().manual_seed((self.seed << 20) + number)

        def choose(logits: Tensor) -> int:
            scores = logits.cpu()[None]
            for warper in warpers:
                scores = warper(None, scores)  # type: ignore[arg-type]
            return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=draw))

        return choose


def continued(
    engine: Engine,
    openings: Sequence[Opening],
    sampling: Sampling,
    *,
    keeps: bool = True,
    longest: int | None = None,
    told: Told = lambda number, token: None,
    begin: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Return the tokens that the model writes after each of the texts, all of them on every rank. Collective.

    `keeps` is as in `GrowingText`. No text grows longer than `longest` tokens. `told` gets each token of this rank's
    texts, with the text's number, as it is written. `begin` is called before each pass.
    """
    ranks, mine = engine.ranks, dict[int, list[int]]()
    with engine.evaluating():
        for first in range(0, len(openings), ranks.world_size):
            number = first + ranks.rank
            answer = _Answer(openings[number] if number < len(openings) else None, keeps)
            choose, most = sampling.chooser(number), sampling.max_tokens
            if longest is not None:
                most = min(most, longest - answer.text.tokens.shape[1])
            while any(row[0] for row in ranks.gather(answer.going)):
                begin()
                logits = engine.look(next_logits, answer.row)
                if answer.going:
                    told(number, answer.take(choose(logits), most))
            if number < len(openings):
                mine[number] = answer.written
    every = ranks.gather_items(mine)
    return [every[number] for number in range(len(openings))]


class _Answer:
    """This rank's text in a round. It has no `opening` if there is no text for this rank.

    A round ends when the texts of all ranks have ended.
    """

    def __init__(self, opening: Opening | None, keeps: bool) -> None:
        self._ended = opening.ended if opening else None
        self.text = GrowingText(_row(opening.tokens if opening else ()), keeps)
        self.written = list[int]()
        self.going = opening is not None

    @property
    def row(self) -> GrowingText:
        """The text that the next pass reads.

        A rank that is done reads one token again and again, which helps the others to gather the model.
        """
        return self.text if self.going else GrowingText(_row((0,)))

    def take(self, token: int, most: int) -> int:
        """Write `token`. It may be the last one: after `most` tokens, or as the opening says."""
        assert self._ended
        self.text.append(token)
        self.written.append(token)
        self.going = len(self.written) < most and not self._ended(self.written)
        return token


def _row(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64)
