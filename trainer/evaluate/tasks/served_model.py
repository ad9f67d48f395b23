"""A model on a server, which answers the same questions as the ranks' model: likelihoods, and answers."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from trainer.evaluate.measure.generation import Sampling
from trainer.evaluate.measure.scoring import Continued, Likelihood
from trainer.evaluate.tasks.shared_model import OpenText, Told
from trainer.servers.completions import CompletionsServer

_AT_ONCE = 32

T = TypeVar("T")
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
        return self.each(partial(self._continued, sampling), enumerate(texts), told)

    def each(self, ask: Callable[[T], R], given: Iterable[T], told: Told) -> list[R]:
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

    def _continued(self, sampling: Sampling, numbered: tuple[int, OpenText]) -> list[int]:
        number, text = numbered
        (answer,) = self.server.sample(
            self.server.model,
            list(text.tokens),
            n=1,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=(sampling.seed + number) % 2**31,
            stop=list(text.until),
            stop_token_ids=sorted(self.stops),
        )
        return answer[0]
