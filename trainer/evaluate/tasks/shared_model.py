"""One model of many ranks, of which rank 0 asks: a program that knows no ranks gets likelihoods and answers from all of
them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from trainer.evaluate.measure.generation import Opening, Sampling, continued
from trainer.evaluate.measure.scoring import Continued, Likelihood, likelihoods
from trainer.evaluate.sharded_model import OpenedRun

T = TypeVar("T")
Told = Callable[[int], None]


class PassFailed(BaseException):
    """A pass of all ranks failed on this one, which must end for it: the others wait inside that pass, and whoever
    started the ranks ends them then. No `Exception`, so that no program that asks the model can catch it."""


class OpenText(NamedTuple):
    """The tokens of a text to continue, until one of the strings in `until` is written, or the text ends."""

    tokens: Sequence[int]
    until: Sequence[str] = ()


class SharedModel:
    """The model of `opened`, which computes as its base or not as it is at that moment."""

    def __init__(self, opened: OpenedRun) -> None:
        self._opened = opened

    def serve(self, ask: Callable[["SharedModel"], T]) -> T | None:
        """Run `ask` on rank 0, which alone gets its result, while the others help. Collective; what it raises is raised
        on all, but for `PassFailed`."""
        ranks, result, failure = self._opened.ranks, None, None
        if ranks.rank == 0:
            try:
                result = ask(self)
            except Exception as error:
                failure = error
            ranks.broadcast(None)
        else:
            while (asked := ranks.broadcast(None)) is not None:
                job, given = asked
                job(self._opened, *given, told=lambda _done: None)
        ranks.agree(failure)
        return result

    def likelihoods(self, texts: Sequence[Continued], told: Told) -> list[Likelihood]:
        """On rank 0, inside `serve`."""
        return self._on_all(likelihoods_by, list(texts), told=told) if texts else []

    def continued(self, texts: Sequence[OpenText], sampling: Sampling, told: Told) -> list[list[int]]:
        """On rank 0, inside `serve`: the tokens written behind each text."""
        return self._on_all(_continued_by, list(texts), sampling, told=told) if texts else []

    def _on_all(self, job: Callable[..., Any], *given: Any, told: Told) -> Any:
        """The result of `job`, a function of this module, which every rank calls; it travels by its name."""
        self._opened.ranks.broadcast((job, given))
        try:
            return job(self._opened, *given, told=told)
        except Exception as error:
            raise PassFailed(f"{type(error).__name__}: {error}") from error


def likelihoods_by(opened: OpenedRun, texts: Sequence[Continued], *, told: Told) -> list[Likelihood]:
    """The likelihoods of all texts, in rows as long as those that the run trains on. Collective."""
    capacity = opened.resolved.config.data.sequence_length
    return likelihoods(opened.engine, texts, capacity, reserved=opened.reserved, told=told)


def _continued_by(opened: OpenedRun, texts: Sequence[OpenText], sampling: Sampling, *, told: Told) -> list[list[int]]:
    prompter, done = opened.words.prompter, set[int]()

    def count(number: int, _token: int) -> None:
        done.add(number)
        told(len(done) * opened.ranks.world_size)

    def ended(until: Sequence[str], written: Sequence[int]) -> bool:
        return prompter.ended(written) or any(end in prompter.text(written) for end in until)

    openings = [Opening(text.tokens, partial(ended, text.until)) for text in texts]
    return continued(opened.engine, openings, sampling, keeps=opened.keeps, longest=opened.resolved.longest, told=count)
