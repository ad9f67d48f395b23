"""Answers to the same prompts over the course of a run. They are greedy, so only the training changes them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.compile.inputs import as_trained
from trainer.data.compile.prepare import load_tokenizer
from trainer.evaluate.measure.generation import Opening, Sampling, continued
from trainer.evaluate.measure.prompts import Prompt, Prompter, asked, read_prompts
from trainer.plan.resolve import Resolved
from trainer.processes.ranks import Ranks
from trainer.run import layout
from trainer.run.background import Harmless
from trainer.state.zero.engine import Engine
from trainer.store.store import Store


@dataclass(frozen=True)
class PromptSamples:
    """The prompts of a run, as this rank needs them, and the texts with which answers to them begin.

    Only rank 0 has the `prompter`.
    """

    run: Store
    resolved: Resolved
    prompts: Sequence[Prompt]
    openings: Sequence[Opening]
    prompter: Prompter | None
    keeping: Harmless

    def take(self, engine: Engine, step: int, begin: Callable[[], None]) -> None:
        """Answer by the state at `step`, and store the answers in the run's folder. Collective.

        A store that fails ends nothing. As many prompts as there are ranks take at most `eval.max_tokens` passes.
        `begin` is called before each pass.
        """
        sampling, longest = Sampling(self.resolved.config.eval.max_tokens), self.resolved.longest
        written = continued(engine, self.openings, sampling, longest=longest, begin=begin)
        if (prompter := self.prompter) is None:
            return
        rows: list[dict[str, Any]] = [
            {"prompt": asked(prompt), "adapter": prompter.text(answer)}
            for prompt, answer in zip(self.prompts, written, strict=True)
        ]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        self.keeping(lambda: self.run.put(layout.samples(step), content))


def open_samples(resolved: Resolved, folder: Store, ranks: Ranks) -> PromptSamples:
    """Open the samples of `eval.prompts`. Collective.

    Raises:
        ConfigError: the file cannot be read on rank 0's machine, or a prompt does not suit the run's format, or is too
            long.
    """
    config, base = resolved.config, resolved.base
    prompter: Prompter | None = None

    def read() -> tuple[list[Prompt], list[list[int]], frozenset[int]]:
        nonlocal prompter
        prompter = Prompter(load_tokenizer(base), as_trained(config), base.directory)
        prompts = read_prompts(config.eval.prompts or "")
        return prompts, prompter.fitting(prompts, resolved.longest), frozenset(prompter.stops)

    prompts, tokens, stops = ranks.on_first(read)
    openings = [Opening(one, lambda written: written[-1] in stops) for one in tokens]
    return PromptSamples(folder, resolved, prompts, openings, prompter, Harmless("keeping the samples"))
