"""Makes the chapter of a step: its prompts in their order, answers by a sampler, their rewards and advantages, committed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.compile.inputs import as_trained
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.dataset.chapters import Chapters
from trainer.data.dataset.rollouts import Rollout, commit
from trainer.data.order.settings import train_order
from trainer.evaluate.measure.prompts import Prompter
from trainer.evaluate.rollout.prompts import Asked, Prompts
from trainer.evaluate.rollout.sampling import Drawn, Request, seed_of
from trainer.evaluate.rollout.scoring import Scoring
from trainer.plan.resolve import Resolved
from trainer.store.store import Store
from trainer.tuning.objective.rollouts import LearnsFromRollouts


@dataclass(frozen=True)
class Making:
    """The parts of a run that its chapters are made of; `run` is its folder."""

    resolved: Resolved
    run: Store
    prompts: Prompts
    prompter: Prompter
    scoring: Scoring

    @classmethod
    def of(cls, resolved: Resolved, run: Store, data: Chapters) -> "Making":
        """The parts of the run whose prompts are `data`."""
        config, rollout = resolved.config, resolved.config.rollout
        assert rollout.reward is not None
        prompter = Prompter(load_tokenizer(resolved.base), as_trained(config), resolved.base.directory)
        prompts = Prompts(data, train_order(config), config.train.global_batch)
        return cls(resolved, run, prompts, prompter, Scoring(rollout.reward, rollout.reward_seconds))

    def asked(self, step: int) -> tuple[list[Asked], Request]:
        """The prompts of the update behind `step`, and the request for its answers."""
        config, rollout = self.resolved.config, self.resolved.config.rollout
        asked = self.prompts.of(step)
        longest = self.resolved.method.virtual.longest(self.resolved.base.architecture.positions)
        most = min(config.data.sequence_length, longest or config.data.sequence_length)
        room = [min(rollout.max_tokens, most - len(one.prompt)) for one in asked]
        kept = [number for number, tokens in enumerate(room) if tokens > 0]
        request = Request(
            [asked[number].prompt for number in kept],
            rollout.answers,
            [room[number] for number in kept],
            rollout.temperature,
            seed_of(config.run.seed, step),
            frozenset(self.prompter.stops),
        )
        return [asked[number] for number in kept], request

    def commit(
        self,
        step: int,
        adapter: int,
        asked: Sequence[Asked],
        request: Request,
        drawn: Sequence[Sequence[Drawn]],
        began: float,
    ) -> bool:
        """Reward the answers that the adapter of the update `adapter` has given, and make them the chapter of the update behind `step`; False where
        another process was faster. `began` is when sampling did, by `time.monotonic`."""
        objective = self.resolved.objective
        assert isinstance(objective, LearnsFromRollouts)
        sampled = time.monotonic()
        text, every = self.prompter.text, [one for answers in drawn for one in answers]
        prompts = [text(one.prompt) for one in asked for _ in range(request.answers)]
        references = [text(one.reference) for one in asked for _ in range(request.answers)]
        said = [text(one.tokens) for one in every]
        rewards = self.scoring.rewards(prompts, said, references)
        advantages = objective.advantages(np.array(rewards).reshape(len(asked), -1)).reshape(-1).tolist()
        owners = [number for number in range(len(asked)) for _ in range(request.answers)]
        cut = [one.tokens[-1] not in request.stops for one in every]
        rollouts = [
            Rollout(
                asked[owner].prompt,
                one.tokens,
                one.log_p,
                advantage,
                {"prompt": prompt, "answer": answer, "reference": reference, "reward": reward, "cut": was_cut},
            )
            for owner, one, advantage, prompt, answer, reference, reward, was_cut in zip(
                owners, every, advantages, prompts, said, references, rewards, cut, strict=True
            )
        ]
        figures: dict[str, Any] = {
            "adapter": adapter,
            "reward": float(np.mean(rewards)),
            "reward_spread": float(np.std(np.array(rewards).reshape(len(asked), -1), axis=1).mean()),
            "answer_tokens": float(np.mean([len(one.tokens) for one in every])),
            "cut": float(np.mean(cut)),
            "sampling_seconds": round(sampled - began, 3),
            "reward_seconds": round(time.monotonic() - sampled, 3),
        }
        return commit(self.run, step, rollouts, figures)
