"""The models that a program asks that knows no ranks, such as lm-evaluation-harness: likelihoods, and answers.

One model is on many ranks, and rank 0 asks it for all. The other is on a server.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from trainer.evaluate.generation import Opening, Sampling, continued
from trainer.evaluate.losses import Continued, Likelihood, likelihoods
from trainer.evaluate.sharded_model import OpenedRun
from trainer.servers import CompletionsServer, Pictured

T = TypeVar("T")
Told = Callable[[int], None]


class PassFailed(BaseException):
    """A pass of all ranks failed on this one, so this rank must end: the others wait inside that pass.

    The parent process of the ranks then ends them. This class is no `Exception`, so no program that asks the model can
    catch it.
    """


class OpenText(NamedTuple):
    """The tokens of a text to continue, until one of the strings in `until` is written, or the text ends."""

    tokens: Sequence[int]
    until: Sequence[str] = ()


class SharedModel:
    """The model of `opened`. At any moment it computes either as its base or as itself."""

    def __init__(self, opened: OpenedRun) -> None:
        self._opened = opened

    def serve(self, ask: Callable[["SharedModel"], T]) -> T | None:
        """Run `ask` on rank 0, which alone gets its result, while the others help. Collective.

        What it raises is raised on all ranks, except for `PassFailed`.
        """
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
        """Return the likelihoods. Call this on rank 0, inside `serve`."""
        return self._on_all(likelihoods_by, list(texts), told=told) if texts else []

    def continued(self, texts: Sequence[OpenText], sampling: Sampling, told: Told) -> list[list[int]]:
        """Return the tokens written after each text. Call this on rank 0, inside `serve`."""
        return self._on_all(_continued_by, list(texts), sampling, told=told) if texts else []

    def _on_all(self, job: Callable[..., Any], *given: Any, told: Told) -> Any:
        """Return the result of `job`, a function of this module that every rank calls. The job travels by its name."""
        self._opened.ranks.broadcast((job, given))
        try:
            return job(self._opened, *given, told=told)
        except Exception as error:
            raise PassFailed(f"{type(error).__name__}: {error}") from error


def likelihoods_by(opened: OpenedRun, texts: Sequence[Continued], *, told: Told) -> list[Likelihood]:
    """Return the likelihoods of all texts, in rows as long as those that the run trains on. Collective."""
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


_AT_ONCE = 32

G = TypeVar("G")
R = TypeVar("R")


@dataclass(frozen=True)
class ServedModel:
    """The model of `server`, with many requests at a time. A token of `stops` ends an answer."""

    server: CompletionsServer
    stops: Sequence[int]

    def likelihoods(self, texts: Sequence[Continued], told: Told) -> list[Likelihood]:
        return self.each(self._likelihood, texts, told)

    def continued(self, texts: Sequence[OpenText], sampling: Sampling, told: Told) -> list[list[int]]:
        """Return the tokens written after each text."""
        asked = [(list(text.tokens), text.until) for text in texts]
        return self.each(partial(self._continued, sampling, lambda number, token: None), enumerate(asked), told)

    def written(
        self, prompts: Sequence[list[int] | Pictured], sampling: Sampling, told: Callable[[int, int], None]
    ) -> list[list[int]]:
        """Return the tokens of the answer to each prompt. `told` gets the number of a prompt and each token when it
        comes."""
        asked = [(prompt, ()) for prompt in prompts]
        return self.each(partial(self._continued, sampling, told), enumerate(asked), lambda done: None)

    def each(self, ask: Callable[[G], R], given: Iterable[G], told: Told) -> list[R]:
        """Return the server's answers to all, in their order. Raises `CapstanError` if it gives none."""
        found = list[R]()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for answer in pool.map(ask, given):
                    found.append(answer)
                    told(len(found))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return found

    def _likelihood(self, text: Continued) -> Likelihood:
        ranked = self.server.ranked(list(text.tokens))[max(1, text.first) - 1 :]
        return Likelihood(sum(log_p for log_p, _ in ranked), all(first for _, first in ranked))

    def _continued(
        self,
        sampling: Sampling,
        told: Callable[[int, int], None],
        numbered: tuple[int, tuple[list[int] | Pictured, Sequence[str]]],
    ) -> list[int]:
        number, (prompt, until) = numbered
        answer = list[int]()
        parts = self.server.written(
            self.server.model,
            prompt,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=(sampling.seed + number) % 2**31,
            stop=list(until),
            stop_token_ids=sorted(self.stops),
        )
        for part in parts:
            answer += part
            for token in part:
                told(number, token)
        return answer
