"""Answers of a sharded model: it continues texts a token at a time, one text on each rank.

A growing text has what the layers keep of its tokens so far, and gives the logits of the next token. `PromptSamples`
are answers to the same prompts over the course of a run. They are greedy, so only the training changes them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from trainer.base.find.processor import PROMPTS, TYPES
from trainer.data.compile.inputs import as_trained
from trainer.data.compile.prepare import load_tokenizer
from trainer.errors import ConfigError
from trainer.evaluate.prompts import Prompt, Prompter, Question, asked, has_pictures, read_prompts
from trainer.model.micro_batch import Seen
from trainer.model.packed import PackedModel
from trainer.model.parts import body
from trainer.model.rows.row import lengths_known
from trainer.plan.resolve import Resolved, keeps_features
from trainer.processes.ranks import Ranks
from trainer.run import layout
from trainer.run.background import Harmless
from trainer.state.zero.engine import Engine
from trainer.store.store import Store

# Bodies of transformers use these names for their cache, as an argument and in their output.
_KEPT = ("cache", "past_key_values", "cache_params")


@dataclass(eq=False)
class GrowingText:
    """One text. A base that keeps nothing reads the whole text again for each token.

    Attributes:
        tokens: (1, T) int64.
        keeps: whether the layers may keep anything. They may not if virtual tokens in the row are switched off: these
            are documents of their own then, which kept keys would not show.
        read: the number of tokens that have been read.
        kept: what the layers keep of them, keys and values or states, under transformers' name for it.
        pictures: those that the text began with.
        ahead: how far the positions of the last tokens lie from their places in the text, (1, 1), or (axes, 1, 1) where
            the class turns positions by several axes: the tokens of a picture share positions.
    """

    tokens: Tensor
    keeps: bool = True
    read: int = 0
    kept: tuple[str, Any] | None = None
    pictures: tuple[Seen, ...] = ()
    ahead: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        self.tokens = self.tokens.to(device)
        self.pictures = tuple(one.to(device) for one in self.pictures)
        return self

    def append(self, token: int) -> None:
        self.tokens = torch.nn.functional.pad(self.tokens, (0, 1), value=token)


def next_logits(model: PackedModel, text: GrowingText) -> Tensor:
    """Return the logits of the token after the text, (V,) fp32. From now on the text's tokens count as read."""
    tokens = torch.nn.functional.pad(text.tokens, (model.reserved, 0))
    length = tokens.shape[1]
    given = dict([text.kept]) if text.kept else {}
    borders = torch.tensor([[0, length - text.read], [0, length]], dtype=torch.int32, device=tokens.device)
    of_keys = (borders[1], length) if text.read else None
    with _one_text(text, length):
        result = body(model.model)(
            **_unread(model, text, tokens),
            use_cache=text.keeps,
            **given,
            **model.attention.arguments(borders[0], length - text.read, of_keys),
        )
    kept = next(((name, found) for name in _KEPT if (found := getattr(result, name, None)) is not None), None)
    if text.keeps and kept is not None:
        text.kept, text.read = kept, length
    return model.head(result.last_hidden_state[:, -1])[0].float()


def _one_text(text: GrowingText, length: int) -> AbstractContextManager[None]:
    """Positions that share or skip numbers do not tell that a text with pictures is one document."""
    return lengths_known((length - text.read,)) if text.pictures else nullcontext()


def _unread(model: PackedModel, text: GrowingText, tokens: Tensor) -> dict[str, Any]:
    """The tokens that the layers have not read yet, as the body takes them."""
    length, lent = tokens.shape[1], model.lent()
    places = torch.arange(text.read, length, device=tokens.device)[None]
    if not text.pictures:
        return {"input_ids": tokens[:, text.read :], "position_ids": places}
    if text.read:
        assert text.ahead is not None
        return {"input_ids": tokens[:, text.read :], "position_ids": places + text.ahead}
    assert model.front is not None, "a prompt has pictures, and the base was loaded without the tower"
    seen = [_grown(one, length, int(model.front.reads_prompts)) for one in text.pictures]
    embed = model.model.get_input_embeddings()
    handed = model.front.row(tokens, embed, [length], seen, lent, body(model.model))
    # Behind the pictures a class counts on by one for each token, on every axis.
    text.ahead = handed["position_ids"][..., -1:] - (length - 1)
    return handed


def _grown(seen: Seen, length: int, answer: int) -> Seen:
    """The pictures of a text that has `length` tokens by now. The new ones are of the type of text, or `answer`, where
    the types tell answers from prompts."""
    types = {
        name: torch.nn.functional.pad(value, (0, length - value.shape[1]), value=answer if name == PROMPTS else 0)
        for name, value in seen.inputs.items()
        if name in TYPES
    }
    return replace(seen, inputs={**seen.inputs, **types})


Ended = Callable[[Sequence[int]], bool]


Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Opening:
    """The tokens of a text to continue, and a test of whether the continuation is complete. `inputs` are those of the
    pictures among the tokens, as the base's processor made them."""

    tokens: Sequence[int]
    ended: Ended
    inputs: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Sampling:
    """How a next token is chosen.

    A `temperature` of 0 takes the most likely token. Otherwise the token is drawn from the likeliest tokens that
    together have the probability `top_p`. A draw depends only on `seed` and the number of the text, not on the ranks.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def chooser(self, number: int) -> Callable[[Tensor], int]:
        """Return a function from logits (V,) fp32 to a token, for the text of this number."""
        if not self.temperature:
            return lambda logits: int(logits.argmax())
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        warpers = [
            TemperatureLogitsWarper(float(self.temperature)),  # a task may say 1
            *([TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []),
        ]
        draw = torch.Generator().manual_seed((self.seed << 20) + number)

        def choose(logits: Tensor) -> int:
            scores = logits.cpu()[None]
            for warper in warpers:
                scores = warper(None, scores)  # type: ignore[arg-type]
            return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=draw))

        return choose


def continued(
    engine: Engine,
    openings: Sequence[Opening],
    sampling: Sampling,
    *,
    keeps: bool = True,
    longest: int | None = None,
    told: Told = lambda number, token: None,
    begin: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Return the tokens that the model writes after each of the texts, all of them on every rank. Collective.

    `keeps` is as in `GrowingText`. No text grows longer than `longest` tokens. `told` gets each token of this rank's
    texts, with the text's number, as it is written. `begin` is called before each pass.
    """
    ranks, mine = engine.ranks, dict[int, list[int]]()
    with engine.evaluating():
        for first in range(0, len(openings), ranks.world_size):
            number = first + ranks.rank
            answer = _Answer(openings[number] if number < len(openings) else None, keeps)
            choose, most = sampling.chooser(number), sampling.max_tokens
            if longest is not None:
                most = min(most, longest - answer.text.tokens.shape[1])
            while any(row[0] for row in ranks.gather(answer.going)):
                begin()
                logits = engine.look(next_logits, answer.row)
                if answer.going:
                    told(number, answer.take(choose(logits), most))
            if number < len(openings):
                mine[number] = answer.written
    every = ranks.gather_items(mine)
    return [every[number] for number in range(len(openings))]


class _Answer:
    """This rank's text in a round. It has no `opening` if there is no text for this rank.

    A round ends when the texts of all ranks have ended.
    """

    def __init__(self, opening: Opening | None, keeps: bool) -> None:
        self._ended = opening.ended if opening else None
        seen = (Seen(0, opening.inputs),) if opening and opening.inputs else ()
        self.text = GrowingText(_row(opening.tokens if opening else ()), keeps, pictures=seen)
        self.written = list[int]()
        self.going = opening is not None

    @property
    def row(self) -> GrowingText:
        """The text that the next pass reads.

        A rank that is done reads one token again and again, which helps the others to gather the model.
        """
        return self.text if self.going else GrowingText(_row((0,)))

    def take(self, token: int, most: int) -> int:
        """Write `token`. It may be the last one: after `most` tokens, or as the opening says."""
        assert self._ended
        self.text.append(token)
        self.written.append(token)
        self.going = len(self.written) < most and not self._ended(self.written)
        return token


def _row(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64)


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

    def read() -> tuple[list[Prompt], list[Question], frozenset[int]]:
        nonlocal prompter
        prompter = Prompter(load_tokenizer(base), as_trained(config), base.directory)
        prompts = read_prompts(config.eval.prompts or "", config.data.fields)
        if keeps_features(config, base.architecture) and any(map(has_pictures, prompts)):
            raise ConfigError(
                "eval.prompts: a prompt has pictures, and the run is over kept features, without the tower"
                " (sharding.tower_limit). Raise the limit, remove train.sample_every, or take the pictures out."
            )
        return prompts, prompter.fitting(prompts, resolved.longest), frozenset(prompter.stops)

    prompts, questions, stops = ranks.on_first(read)
    openings = [Opening(one.tokens, lambda written: written[-1] in stops, one.inputs) for one in questions]
    return PromptSamples(folder, resolved, prompts, openings, prompter, Harmless("keeping the samples"))
