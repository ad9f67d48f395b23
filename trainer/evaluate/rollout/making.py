"""Makes the chapter of a step and commits it.

A chapter has the step's prompts in their order, a sampler's answers, their rewards and their advantages.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.compile.inputs import as_trained
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.dataset.chapters import open_chapters, whole
from trainer.data.dataset.dataset import open_dataset
from trainer.data.dataset.rollouts import Rollout, commit
from trainer.data.order.order import hash_key
from trainer.data.order.settings import eval_order, train_order
from trainer.evaluate.measure.prompts import Prompter
from trainer.evaluate.rollout.judging import judge_of, judged_gaps
from trainer.evaluate.rollout.prompts import Asked, Prompts
from trainer.evaluate.rollout.sampling import Drawn, Request
from trainer.evaluate.rollout.scoring import Scoring
from trainer.plan.resolve import Resolved
from trainer.run import layout
from trainer.servers.completions import CompletionsServer
from trainer.store.canonical_json import digest_of
from trainer.store.store import Store, open_run_store
from trainer.tuning.objective.rollouts import LearnsFromRollouts, rollout_identity


class Wanted(NamedTuple):
    """Prompts with the data's answers, and the request for new answers."""

    asked: Sequence[Asked]
    request: Request


class _Scored(NamedTuple):
    """The answers to each prompt by their tokens, `rewards` (prompts, answers), and a line to show for each."""

    drawn: list[Drawn]
    rewards: NDArray[np.float64]
    shown: list[dict[str, Any]]


def rollouts_of(resolved: Resolved, run: Store, dataset: str) -> Store:
    """Return the folder, inside the run's, of the answers to the prompts of this data set.

    A run that is begun anew with other settings finds no earlier answers.
    """
    config = resolved.config
    facts = {
        "dataset": dataset,
        "base": [resolved.base.fingerprint, config.quant.type, config.model.dtype],
        "adapter": resolved.method.identity,
        "objective": {**resolved.objective.identity, **rollout_identity(config, resolved.objective)},
        "batch": [config.run.seed, config.train.global_batch],
    }
    return run.sub(layout.rollouts(digest_of(facts)[:12]))


@dataclass(frozen=True)
class Making:
    """The parts of a run that its chapters are made of.

    `place` is the folder of the rollouts. `held_out` are prompts that are never trained on.
    """

    resolved: Resolved
    place: Store
    prompts: Prompts
    prompter: Prompter
    scoring: Scoring
    held_out: Sequence[Asked] = field(default=())
    judge: CompletionsServer | None = None

    @classmethod
    def of(cls, resolved: Resolved, run: Store, train: str, held_out: str | None) -> "Making":
        """Return the parts of the run in the folder `run`, whose prompts are in the data sets of these fingerprints."""
        store = open_run_store(resolved.config)
        config, rollout = resolved.config, resolved.config.rollout
        assert rollout.reward is not None
        prompter = Prompter(load_tokenizer(resolved.base), as_trained(config), resolved.base.directory)
        prompts = Prompts(open_chapters(store, train, run), train_order(config), config.train.global_batch)
        found: Sequence[Asked] = ()
        if rollout.held_out and held_out is not None:
            data = open_dataset(store, held_out)
            every = Prompts(whole(data), eval_order(config, data.manifest), min(rollout.held_out, len(data.lengths)))
            found = every.of(0)
        return cls(
            resolved,
            rollouts_of(resolved, run, train),
            prompts,
            prompter,
            Scoring(rollout.reward, rollout.reward_seconds, rollout.reward_python),
            found,
            judge_of(resolved, prompts.of(0)[0]),
        )

    def wanted(self, chapter: int) -> list[Wanted]:
        """Return the answers that the chapter needs.

        They answer its prompts and, if one of its steps is due for that, also the held-out prompts.
        """
        config, rollout = self.resolved.config, self.resolved.config.rollout
        every, seed = config.eval.every, int(hash_key(config.run.seed, chapter)) >> 33  # 31 bits
        trained = self._request(self.prompts.of(chapter), rollout.answers, rollout.temperature, seed)
        due = self.held_out and every and -rollout.first_step(chapter) % every < rollout.updates
        return [trained, *([self._request(self.held_out, 1, 0.0, seed)] if due else [])]

    def _request(self, asked: Sequence[Asked], answers: int, temperature: float, seed: int) -> Wanted:
        """Return a request for the answers to those prompts that leave any room."""
        config, longest = self.resolved.config, self.resolved.longest
        most = min(config.data.sequence_length, longest or config.data.sequence_length)
        rooms = [(one, min(config.rollout.max_tokens, most - len(one.prompt))) for one in asked]
        kept = [(one, room) for one, room in rooms if room > 0]
        stops, prompts = frozenset(self.prompter.stops), [one.prompt for one, _ in kept]
        request = Request(prompts, answers, [room for _, room in kept], temperature, seed, stops)
        return Wanted([one for one, _ in kept], request)

    def commit(
        self,
        chapter: int,
        adapter: int,
        wanted: Sequence[Wanted],
        drawn: Sequence[Sequence[Sequence[Drawn]]],
        began: float,
    ) -> bool:
        """Reward the answers of the adapter of the update `adapter`, and make them the chapter of this number.

        Returns False if another process was faster. `began` is the time at which sampling began, by `time.monotonic`.
        """
        objective = self.resolved.objective
        assert isinstance(objective, LearnsFromRollouts)
        sampled = time.monotonic()
        scored, *held_out = [self._scored(*both) for both in zip(wanted, drawn, strict=True)]
        prompts = [one.prompt for one in wanted[0].asked for _ in range(wanted[0].request.answers)]
        gaps = judged_gaps(self.judge, prompts, scored.drawn) if self.judge else None
        advantages = objective.advantages(scored.rewards, gaps)
        rollouts = [
            Rollout(prompt, one.tokens, one.log_p, advantage, shown)
            for prompt, one, advantage, shown in zip(prompts, scored.drawn, advantages, scored.shown, strict=True)
        ]
        figures: dict[str, Any] = {
            "adapter": adapter,
            "reward": float(scored.rewards.mean()),
            "reward_spread": float(scored.rewards.std(axis=1).mean()),
            "answer_tokens": float(np.mean([len(one.tokens) for one in scored.drawn])),
            "cut": float(np.mean([shown["cut"] for shown in scored.shown])),
            **({"divergence": -float(np.mean([gap for one in gaps for gap in one]))} if gaps else {}),
            **({"held_out_reward": float(held_out[0].rewards.mean())} if held_out else {}),
            "sampling_seconds": round(sampled - began, 3),
            "reward_seconds": round(time.monotonic() - sampled, 3),
        }
        return commit(self.place, chapter, rollouts, figures)

    def _scored(self, wanted: Wanted, drawn: Sequence[Sequence[Drawn]]) -> _Scored:
        text, n = self.prompter.text, wanted.request.answers
        every = [one for answers in drawn for one in answers]
        prompts, references = (
            [text(tokens) for one in wanted.asked for tokens in [one[side]] * n] for side in range(2)
        )
        said = [text(one.tokens) for one in every]
        rewards = self.scoring.rewards(prompts, said, references)
        cut = [one.tokens[-1] not in wanted.request.stops for one in every]
        rows = zip(prompts, said, references, rewards, cut, strict=True)
        names = ("prompt", "answer", "reference", "reward", "cut")
        return _Scored(every, np.array(rewards).reshape(-1, n), [dict(zip(names, row, strict=True)) for row in rows])
