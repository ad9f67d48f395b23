"""`capstan generate` for a run with a head: it returns the class of a text, or its reward, instead of an answer."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import Config
from trainer.data.render.numbered import ClassifiedRenderer, TaggedRenderer
from trainer.errors import ConfigError, DataError
from trainer.evaluate.measure.prompts import Prompt
from trainer.evaluate.request import Ask
from trainer.evaluate.sharded_model import OpenedRun
from trainer.model.micro_batch import MicroBatch
from trainer.tuning.head import WithHead, outputs

_ANY = "any"  # stands for the class of a text that has none


def refuse_writing(ask: Ask, config: Config) -> None:
    """Raise `ConfigError` for an option that is only useful with a model that writes."""
    if ask.base:
        raise ConfigError(f"--base: the base has no head for objective.name: {config.objective.name}. Leave it out.")
    if ask.sampling.get("temperature"):
        raise ConfigError(
            f"--temperature: objective.name: {config.objective.name} draws no tokens, so it has no effect. Leave it"
            " out."
        )


class _Asked(NamedTuple):
    """The tokens of a text, and the places in it whose outputs are asked for.

    If words have classes, it also has the words that begin at these places.
    """

    tokens: list[int]
    places: Sequence[int]
    words: list[str]


def classes_of(opened: OpenedRun, head: WithHead, prompts: Sequence[Prompt]) -> list[str]:
    """Return the class of each text or conversation and its probability, its reward, or the tags of its words.

    Collective.
    """
    read = _words if head.head.per_token else _text
    asked = opened.ranks.on_first(lambda: [read(opened, head, prompt) for prompt in prompts])
    engine = opened.engine
    with engine.evaluating():
        found = [
            engine.look(
                partial(outputs, places=torch.tensor(text.places)), MicroBatch.of_text(torch.tensor([text.tokens]))
            )
            for text in asked
        ]
    return [_in_words(head, text, values.float().cpu()) for text, values in zip(asked, found, strict=True)]


def _in_words(head: WithHead, asked: _Asked, values: Tensor) -> str:
    if not head.labels:
        return f"{float(values[0]):.4f}"
    if head.head.several:
        shares = zip(head.labels, values[0].sigmoid().tolist(), strict=True)
        return " ".join(f"{label} ({share:.3f})" for label, share in shares if share > 0.5) or "none"
    best = values.argmax(-1).tolist()
    if asked.words:
        return " ".join(f"{word}/{head.labels[number]}" for word, number in zip(asked.words, best, strict=True))
    return f"{head.labels[best[0]]} ({float(values[0].softmax(-1)[best[0]]):.3f})"


def _words(opened: OpenedRun, head: WithHead, prompt: Prompt) -> _Asked:
    """Tokenize the words of a text (split at white space) like rows of words.

    Raises `ConfigError` if that cannot be done.
    """
    words = str(prompt.get("prompt", "")).split()
    data = opened.resolved.config.data.model_copy(update={"format": "tagged", "fields": {}})
    (found,) = TaggedRenderer(opened.words.tokenizer, data).encode(
        [{"words": words, "tags": [head.labels[0]] * len(words)}]
    )
    if isinstance(found, DataError) or not found.teaches:
        raise ConfigError("a prompt cannot be read: give a text with words in the field prompt.")
    return _Asked(found.text.tolist(), found.places, words)


def _text(opened: OpenedRun, head: WithHead, prompt: Prompt) -> _Asked:
    """Tokenize a text like rows of texts. Raises `ConfigError` if that cannot be done."""
    names = list(head.labels) or [_ANY]
    data = opened.resolved.config.data.model_copy(update={"format": "classified", "fields": {}, "labels": names})
    row = {"messages" if name == "messages" else "text": given for name, given in prompt.items()}
    (found,) = ClassifiedRenderer(opened.words.tokenizer, data).encode([{**row, "label": names[0]}])
    if isinstance(found, DataError) or not found.teaches:
        raise ConfigError(f"a prompt cannot be read: {found if isinstance(found, DataError) else 'it is empty'}.")
    tokens = found.text.tolist()
    return _Asked(tokens, [len(tokens) - 1], [])
