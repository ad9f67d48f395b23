"""A server that judges each token of an answer by its own log-probability, and the patience with servers."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from trainer.errors import CapstanError
from trainer.evaluate.rollout.prompts import Asked
from trainer.evaluate.rollout.sampling import Drawn
from trainer.evaluate.teach_server import check_tokenizer
from trainer.export.proof.completions import CompletionsServer, Refused
from trainer.plan.resolve import Resolved
from trainer.tuning.objective.rollouts import LearnsFromRollouts

_PAUSES = (2.0, 10.0, 30.0)  # in seconds, between the attempts of a request: a server may be starting again
_AT_ONCE = 16

T = TypeVar("T")


def patiently(request: Callable[[], T], between: Callable[[], object] = lambda: None) -> T:
    """A request to a server that may be starting again: so many attempts, and something to try `between` them."""
    for pause in _PAUSES:
        try:
            return request()
        except Refused:
            raise
        except CapstanError:
            time.sleep(pause)
            with suppress(CapstanError):
                between()
    return request()


def judged_gaps(
    judge: CompletionsServer, prompts: Sequence[Sequence[int]], answers: Sequence[Drawn]
) -> list[list[float]]:
    """The judge's log p of each token of each answer less the sampler's, in nats. Raises `CapstanError` where it gives
    none after some attempts.
    """

    def of_answer(prompt: Sequence[int], answer: Drawn) -> list[float]:
        found = patiently(partial(judge.ask, [*prompt, *answer.tokens], 1)).log_p[len(prompt) - 1 :]
        return [theirs - ours for theirs, ours in zip(found, answer.log_p, strict=True)]

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(of_answer, prompts, answers))


def judge_of(resolved: Resolved, asked: Asked) -> CompletionsServer | None:
    """The teacher that judges for the run's objective, where that is a server, so that no rank has it in memory;
    `asked` is a prompt by which its tokenizer is seen.

    Raises:
        ConfigError: nothing answers there, or it has another tokenizer.
    """
    objective = resolved.objective
    assert isinstance(objective, LearnsFromRollouts)
    if objective.judge is None or not objective.judge.is_server:
        return None
    server = CompletionsServer.find(objective.judge.setting, objective.judge.name)
    check_tokenizer(server, resolved.base, [*asked.prompt, *asked.reference])
    return server
