"""`capstan generate` of a run with a head: its class of a text, or its reward, in the place of an answer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.config import Config
from trainer.data.render.classified import Classified, ClassifiedRenderer
from trainer.errors import ConfigError, DataError
from trainer.evaluate.ask import Ask
from trainer.evaluate.sharded_model import OpenedRun
from trainer.measure.prompts import Prompt
from trainer.model.packed import PackedModel, TextRow
from trainer.tuning.head import WithHead, outputs

_ANY = "any"  # stands for the class of a text that has none


def refuse_writing(ask: Ask, config: Config) -> None:
    """Raises `ConfigError` for an option that only a model which writes has a use for."""
    if ask.base:
        raise ConfigError(f"--base: the base has no head for objective.name: {config.objective.name}. Leave it out.")
    if ask.sampling.get("temperature"):
        raise ConfigError(
            f"--temperature: objective.name: {config.objective.name} draws no tokens, so it has no effect. Leave it out."
        )


def classes_of(opened: OpenedRun, head: WithHead, prompts: Sequence[Prompt]) -> list[str]:
    """The class of each text or conversation and its probability, or its reward. Collective."""
    tokens = opened.ranks.on_first(lambda: [_tokens(opened, head, prompt) for prompt in prompts])
    opened.engine.evaluating(True)
    found = [opened.engine.look(_last, TextRow.of(torch.tensor([text]))) for text in tokens]
    opened.engine.evaluating(False)
    return [_in_words(head, values[0].float()) for values in found]


def _last(model: PackedModel, row: TextRow) -> Tensor:
    return outputs(model, row, row.last)


def _in_words(head: WithHead, values: Tensor) -> str:
    if not head.labels:
        return f"{float(values[0]):.4f}"
    number = int(values.argmax())
    return f"{head.labels[number]} ({float(values.softmax(-1)[number]):.3f})"


def _tokens(opened: OpenedRun, head: WithHead, prompt: Prompt) -> list[int]:
    """The tokens of a text as rows of its kind are tokenized. Raises `ConfigError` where that cannot be done."""
    names = list(head.labels) or [_ANY]
    data = opened.resolved.config.data.model_copy(update={"format": "classified", "fields": {}, "labels": names})
    row = {"messages" if name == "messages" else "text": given for name, given in prompt.items()}
    (found,) = ClassifiedRenderer(opened.tokenizer, data).encode([{**row, "label": names[0]}])
    if isinstance(found, DataError) or not found.teaches:
        raise ConfigError(f"a prompt cannot be read: {found if isinstance(found, DataError) else 'it is empty'}.")
    assert isinstance(found, Classified)
    return found.text.tokens.tolist()
