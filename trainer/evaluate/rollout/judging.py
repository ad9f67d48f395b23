"""A server that judges each token of an answer by its own log-probability."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from trainer.evaluate.rollout.prompts import Asked
from trainer.evaluate.rollout.sampling import Drawn
from trainer.evaluate.teach_server import check_tokenizer
from trainer.plan.resolve import Resolved
from trainer.servers.completions import CompletionsServer, again
from trainer.tuning.objective.rollouts import LearnsFromRollouts

_AT_ONCE = 16


def judged_gaps(
    judge: CompletionsServer, prompts: Sequence[Sequence[int]], answers: Sequence[Drawn]
) -> list[list[float]]:
    """Return the judge's log p of each token of each answer minus the sampler's, in nats.

    Raises `CapstanError` if the judge gives none after some attempts.
    """

    def of_answer(prompt: Sequence[int], answer: Drawn) -> list[float]:
        found = again(partial(judge.ask, [*prompt, *answer.tokens], 1)).log_p[len(prompt) - 1 :]
        return [theirs - ours for theirs, ours in zip(found, answer.log_p, strict=True)]

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(of_answer, prompts, answers))


def judge_of(resolved: Resolved, asked: Asked) -> CompletionsServer | None:
    """Return the teacher that judges for the run's objective, if that is a server. Then no rank has it in memory.

    `asked` is a prompt that shows which tokenizer it has.

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
