"""Encodes rows with one or more answers to a prompt, as messages or as strings, and the documents that they become.

In a document the answers may share the prompt's tokens (`data.share_prefix`):

alone:    p p p P a a a    p p p P b b        both predict their first token from P, the prompt's last one
sharing:  p p p P a a a P b b                 P and b see p p p, and none of a

A row of several answers becomes a document for each, or one that shares the prompt (`Alternatives`). A chosen and a
rejected answer stay together (`Pair`); their prompt is the field `prompt`, or else the common beginning of both. It is
never trained.

A labelled row becomes an answer to its prompt, and whether it is desired (`Labelled`). In the same document the answer
is followed by the same prompt with the answer of another row. From such mismatched pairs KTO estimates how far the
model is from its reference. The other row is the last one before it that has another prompt, in the same batch of rows
that are read together; before the first row comes the last. So the pairing depends only on the data set.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Tokenizer
from trainer.config import Data
from trainer.data.dataset.dataset import DESIRED_BIT, MISMATCHED_BIT, REJECTED_BIT, SHARED_BIT
from trainer.data.dataset.pictures import columns_of, end_to_end
from trainer.data.format.formats import or_error
from trainer.data.format.messages import Message, read_messages, text_of, untrained
from trainer.data.format.spans import shared_beginning
from trainer.data.render.chat import Example, Renderer, field_of, tools_of, turns_of
from trainer.data.render.document import Document, Turn
from trainer.errors import DataError

Row = dict[str, Any]
Made = TypeVar("Made", bound=Document)
_PAIR_MARKS = (np.uint32(0), REJECTED_BIT)
# Text tables can write the label only in these ways.
_WRITTEN = {"true": True, "True": True, "false": False, "False": False}


class EitherRenderer:
    """Encodes rows of messages, with the chat template, and rows of strings, without it.

    Each kind has a renderer with the settings `messages` or `texts`, which is made when its first rows come. `ends` is
    that of `Renderer`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Data,
        messages: Mapping[str, Any],
        texts: Mapping[str, Any],
        *,
        ends: bool = True,
    ) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._settings = {True: data.model_copy(update=messages), False: data.model_copy(update=texts)}
        self._renderers: dict[bool, Renderer] = {}

    def encode(self, rows: Sequence[Row]) -> list[Example | DataError]:
        """Each row's tokens and targets, or its error. A row with `messages` is a conversation.

        Raises:
            ConfigError: the tokenizer cannot serve rows of messages, or of strings, as `chat.Renderer` says.
        """
        found: dict[int, Example | DataError] = {}
        for in_messages in (True, False):
            mine = [number for number, row in enumerate(rows) if ("messages" in row) == in_messages]
            if mine:
                encoded = self._renderer(in_messages).encode([rows[number] for number in mine])
                found |= zip(mine, encoded, strict=True)
        return [found[number] for number in range(len(rows))]

    def turns(self, row: Row) -> list[Turn]:
        """The turns of a row. Raises `DataError` as `chat.Renderer.turns`."""
        return self._renderer("messages" in row).turns(row)

    def _renderer(self, in_messages: bool) -> Renderer:
        if in_messages not in self._renderers:
            self._renderers[in_messages] = Renderer(self._tokenizer, self._settings[in_messages], ends=self._ends)
        return self._renderers[in_messages]


class AnswerRenderer(Protocol):
    """Encodes conversations, each with one answer."""

    def encode(self, rows: Sequence[Row]) -> Sequence[Example | DataError]: ...

    def turns(self, row: Row) -> list[Turn]: ...


class ReadRow(NamedTuple):
    """A row of chat or of prompt_completion for each answer, the turns, and whether the answer is desired, if known."""

    rows: list[Row]
    turns: list[Turn]
    desired: bool = False


Encoded = tuple[ReadRow, list[Example | DataError]]
"""A row with the examples of its answers."""


class AnswersRenderer(Generic[Made]):
    """Encodes rows of one kind with one tokenizer.

    `read` takes a row apart, and raises `DataError` if it is not of this kind. `documents` gets the rows that are
    encoded together, and makes a document or an error of each. `rendered` makes what encodes the answers from the
    settings for conversations; by default it is an `EitherRenderer`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Data,
        read: Callable[[Row, Data], ReadRow],
        documents: Callable[[list[Encoded], Data], list[Made | DataError]],
        rendered: "Callable[[Data], AnswerRenderer] | None" = None,
    ) -> None:
        self._data, self._documents = data, documents
        self._read: Callable[[Row], ReadRow] = lambda row: read(row, data)
        answers = data.train_on.model_copy(update={"roles": ["assistant"]})
        messages = {"format": "chat", "train_on": answers, "fields": {}}
        texts = {"format": "prompt_completion", "train_on": answers, "fields": {}, "template": None}
        self._answers: AnswerRenderer = (
            EitherRenderer(tokenizer, data, messages, texts)
            if rendered is None
            else rendered(data.model_copy(update=messages))
        )

    def encode(self, rows: Sequence[Row]) -> list[Made | DataError]:
        """Each row's document, or its error, whose text does not name the row's place.

        Raises `ConfigError` as `EitherRenderer`.
        """
        read = [or_error(self._read, row) for row in rows]
        whole = [row for row in read if isinstance(row, ReadRow)]
        examples = iter(self._answers.encode([answer for row in whole for answer in row.rows]))
        encoded = [(row, [next(examples) for _ in row.rows]) for row in whole]
        documents = iter(self._documents(encoded, self._data))
        return [row if isinstance(row, DataError) else next(documents) for row in read]

    def turns(self, row: Row) -> list[Turn]:
        """The turns of the prompt, then those of each answer. Raises `DataError` if the row is not of this kind."""
        return self._read(row).turns


def messages_of(given: Any, name: str) -> list[Message]:
    """The messages in the field `name`. Raises `DataError` if it is not a conversation."""
    try:
        return read_messages(given)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


@dataclass(frozen=True, eq=False)
class PromptWithAnswers(Document):
    """Tokenized answers to one prompt, each with the prompt.

    A packed row holds the first `shared` tokens only once. The first token of answer i is stored with the bit
    `marks[i]`."""

    answers: Sequence[Example]
    shared: int = 0
    marks: Sequence[np.uint32] = ()

    @property
    def _parts(self) -> list[Example]:
        """The answers in the form in which they follow each other in a row."""
        first, *others = self.answers
        return [first, *(one.without(self.shared) for one in others)]

    @property
    def columns(self) -> Mapping[str, Any]:
        return columns_of(end_to_end((len(part.tokens), part.places) for part in self._parts))

    @property
    def tokens(self) -> NDArray[np.uint32]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.concatenate([part.tokens for part in self._parts])

    @property
    def targets(self) -> NDArray[np.bool_]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.concatenate([part.targets for part in self._parts])

    @property
    def left_out(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return list(dict.fromkeys(name for answer in self.answers for name in answer.left_out))

    @property
    def teaches(self) -> bool:
        return any(answer.teaches for answer in self.answers)

    def stored(self) -> NDArray[np.uint32]:
        parts = [part.stored() for part in self._parts]
        if self.shared:
            for part in parts[1:]:
                part[0] |= SHARED_BIT
        for part, mark in zip(parts, self.marks, strict=False):
            part[0] |= mark
        return np.concatenate(parts)


def prompt_tokens(answer: Example) -> int:
    """The number of tokens before the first trained one."""
    return int(answer.targets.argmax())


def shared_tokens(answer: Example) -> int:
    """The number of tokens that all answers to a prompt can share, from one answer with its prompt.

    It is the whole prompt except its last token, which predicts the first token of each answer."""
    return max(0, prompt_tokens(answer) - 1)


class Alternatives(PromptWithAnswers):
    """Answers that are each trained by themselves. If they share no tokens, each is a document of its own."""

    @property
    def longest(self) -> int:
        """The number of tokens of the longest answer with its prompt. A packed row must hold them."""
        return max(len(answer.tokens) for answer in self.answers)

    def cut(self, limit: int) -> "Alternatives":
        """Each answer with its prompt, cut to `limit` tokens."""
        return replace(self, answers=[answer.cut(limit) for answer in self.answers])

    def pieces(self, limit: int) -> list[Self]:
        """The answers in order, in as few documents of at most `limit` tokens as possible, each with the prompt."""
        assert self.longest <= limit
        groups: list[list[Example]] = []
        room = 0
        for answer in self.answers:
            more = len(answer.tokens) - self.shared
            if not groups or not self.shared or more > room:
                groups.append([])
                room = limit - self.shared
            groups[-1].append(answer)
            room -= more
        return [replace(self, answers=group) for group in groups]


def read_alternatives(row: Row, data: Data) -> ReadRow:
    prompt, answers = (field_of(row, name, data) for name in ("prompt", "answers"))
    if not isinstance(answers, list) or not answers:
        raise DataError("answers: this is no list with at least one answer")
    if not isinstance(prompt, list):
        text, texts = text_of(prompt, "prompt"), [text_of(answer, "answers") for answer in answers]
        turns = [Turn("user", text), *(Turn("assistant", answer) for answer in texts)]
        return ReadRow([{"prompt": text, "completion": answer} for answer in texts], turns)
    before, tools = [untrained(message) for message in messages_of(prompt, "prompt")], tools_of(row, data)
    talks = [_messages_of_answer(answer) for answer in answers]
    spoken = [*before, *(message for talk in talks for message in talk)]
    return ReadRow([{"messages": [*before, *talk], "tools": tools} for talk in talks], turns_of(spoken))


def _messages_of_answer(answer: Any) -> list[Row]:
    """An answer to a conversation: its messages, or the text of a single message."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else messages_of(answer, "answers")


def alternatives_of(rows: list[Encoded], data: Data) -> list[Alternatives | DataError]:
    return [_together(answers, data) for _, answers in rows]


def _together(answers: list[Example | DataError], data: Data) -> Alternatives | DataError:
    """Alternatives that share the tokens before the first trained one, if these are the same in all of them."""
    for number, answer in enumerate(answers, 1):
        if isinstance(answer, DataError):
            return DataError(f"answer {number}: {answer}")
    found = [answer for answer in answers if isinstance(answer, Example)]
    teaching = [answer for answer in found if answer.teaches] or found
    if not (data.share_prefix and len(teaching) > 1):
        return Alternatives(teaching)
    first = teaching[0].tokens[: prompt_tokens(teaching[0])]
    alike = [np.array_equal(answer.tokens[: prompt_tokens(answer)], first) for answer in teaching]
    if not all(alike):
        return DataError(
            f"the prompt is not the same tokens before answer {alike.index(False) + 1} and before the first one: a"
            " token reaches across its end; end a prompt of text with white space"
        )
    return Alternatives(teaching, shared_tokens(teaching[0]))


class Pair(PromptWithAnswers):
    """A chosen and a rejected answer, which are stored, packed and visited like one document."""

    @property
    def teaches(self) -> bool:
        """Whether both answers have trained tokens, and differ."""
        chosen, rejected = self.answers
        return chosen.teaches and rejected.teaches and not np.array_equal(chosen.tokens, rejected.tokens)

    def cut(self, limit: int) -> "Pair":
        """Both answers, cut so that they have `limit` tokens together.

        Each gets half of the room after the shared tokens, and what the other leaves of its half."""
        (chosen, rejected), shared = self.answers, self.shared
        room = max(0, limit - shared)
        # A prompt that is longer than a row leaves no room: the row then holds only a part of the prompt, which trains
        # nothing.
        chosen = chosen.cut(min(limit, shared + max(room // 2, room - len(rejected.tokens) + shared)))
        return replace(self, answers=(chosen, rejected.cut(limit - len(chosen.tokens) + shared)))


def read_pair(row: Row, data: Data) -> ReadRow:
    chosen, rejected = (field_of(row, name, data) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError("chosen and rejected are the same, so nothing is preferred")
    if isinstance(chosen, list) or isinstance(rejected, list):
        return _read_conversations(row, messages_of(chosen, "chosen"), messages_of(rejected, "rejected"), data)
    texts = [text_of(chosen, "chosen"), text_of(rejected, "rejected")]
    if data.fields.get("prompt", "prompt") in row:
        prompt = text_of(field_of(row, "prompt", data), "prompt")
    else:
        prompt = _shared_words(*texts)
        texts = [text.removeprefix(prompt) for text in texts]
    turns = [Turn("user", prompt), *(Turn("assistant", text) for text in texts)]
    return ReadRow([{"prompt": prompt, "completion": text} for text in texts], turns)


def _read_conversations(row: Row, chosen: list[Message], rejected: list[Message], data: Data) -> ReadRow:
    given = row.get(data.fields.get("prompt", "prompt"))
    if isinstance(given, list):
        prompt = messages_of(given, "prompt")
        chosen, rejected = prompt + chosen, prompt + rejected
    shared = len(list(takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))))
    # Some data sets repeat the first question as a string beside the messages that contain it.
    if isinstance(given, str) and all(message["content"] != given for message in chosen[:shared]):
        raise DataError("the prompt is a string, and not the content of a message that chosen and rejected begin with")
    if shared == min(len(chosen), len(rejected)):
        raise DataError("chosen or rejected has no message beyond those that both begin with, so it is no answer")
    prompt, tools = [untrained(message) for message in chosen[:shared]], tools_of(row, data)
    rows = [{"messages": prompt + answer[shared:], "tools": tools} for answer in (chosen, rejected)]
    return ReadRow(rows, turns_of(chosen + rejected[shared:]))


def _shared_words(chosen: str, rejected: str) -> str:
    """The words with which both begin. White space after them belongs to the answers, because tokens begin with it."""
    words = re.match(r"(.*\S)?(?=\s)", chosen[: shared_beginning(chosen, rejected)], re.DOTALL)
    return words[0] if words else ""


def pairs_of(rows: list[Encoded], data: Data) -> list[Pair | DataError]:
    return [_pair(chosen, rejected, data) for _, (chosen, rejected) in rows]


def _with_end_of_prompt(answer: Example, limit: int | None) -> Example:
    """The answer with the last `limit` tokens of its prompt."""
    cut = prompt_tokens(answer) - limit if limit is not None and answer.teaches else 0
    return answer.without(cut) if cut > 0 else answer


def _pair(chosen: Example | DataError, rejected: Example | DataError, data: Data) -> Pair | DataError:
    """The pair of both answers. Their prompts must have equal tokens.

    A difference before the first trained token would not be judged.
    """
    if isinstance(chosen, DataError):
        return DataError(f"chosen: {chosen}")
    if isinstance(rejected, DataError):
        return DataError(f"rejected: {rejected}")
    if chosen.teaches and rejected.teaches:
        first, second = prompt_tokens(chosen), prompt_tokens(rejected)
        if not np.array_equal(chosen.tokens[:first], rejected.tokens[:second]):
            return DataError(
                f"the prompt is not the same tokens in chosen ({first}) and rejected ({second}): they differ before an"
                " answer begins, or a token reaches across the prompt's end; end a prompt of text with white space"
            )
    chosen, rejected = (_with_end_of_prompt(answer, data.prompt_length) for answer in (chosen, rejected))
    pair = Pair((chosen, rejected), marks=_PAIR_MARKS)
    return replace(pair, shared=shared_tokens(chosen)) if data.share_prefix and pair.teaches else pair


class Labelled(PromptWithAnswers):
    """An answer to its prompt, marked if it is desired. The mismatched answer follows it if there is room."""

    @property
    def counts(self) -> Mapping[str, int]:
        return {"desired": int(self.marks[0] == DESIRED_BIT)}

    def cut(self, limit: int) -> "Labelled":
        """The first `limit` tokens of the answer. An answer that needs a cut leaves no room for a mismatched one."""
        return self if len(self.tokens) <= limit else replace(self, answers=(self.answers[0].cut(limit),))


def read_labelled(row: Row, data: Data) -> ReadRow:
    prompt, completion, label = (field_of(row, name, data) for name in ("prompt", "completion", "label"))
    label = _WRITTEN.get(label, label) if isinstance(label, str) else label
    if not isinstance(label, bool):
        raise DataError(f"the label is {label!r}, and not true (desired) or false (undesired)")
    if isinstance(prompt, list) or isinstance(completion, list):
        before, answer = messages_of(prompt, "prompt"), messages_of(completion, "completion")
        talk = {"messages": [*map(untrained, before), *answer], "tools": tools_of(row, data)}
        return ReadRow([talk], turns_of(before + answer), label)
    texts = {"prompt": text_of(prompt, "prompt"), "completion": text_of(completion, "completion")}
    return ReadRow([texts], [Turn("user", texts["prompt"]), Turn("assistant", texts["completion"])], label)


def labelled_of(rows: list[Encoded], data: Data) -> list[Labelled | DataError]:
    found = [_labelled(answer, row.desired) for row, (answer,) in rows]
    paired = iter(_paired([one for one in found if isinstance(one, Labelled) and one.teaches], data))
    return [next(paired) if isinstance(one, Labelled) and one.teaches else one for one in found]


def _labelled(answer: Example | DataError, desired: bool) -> Labelled | DataError:
    marks = (DESIRED_BIT if desired else np.uint32(0), MISMATCHED_BIT)
    return answer if isinstance(answer, DataError) else Labelled((answer,), marks=marks)


def _paired(found: list[Labelled], data: Data) -> list[Labelled]:
    """Pair each answer with the last one before it that has another prompt, or else with the one directly before it.

    The mismatched answer is cut so that a packed row holds both.
    """
    answers = [one.answers[0] for one in found]
    prompts = [answer.cut(prompt_tokens(answer)) for answer in answers]
    prompts = [prompt.tokens.tobytes() + prompt.places["sha256"].tobytes() for prompt in prompts]
    result = []
    for place, answer in enumerate(answers):
        before = [place - back for back in range(1, len(answers))]
        other = next((index for index in before if prompts[index] != prompts[place]), before[0] if before else None)
        room = data.sequence_length - len(answer.tokens)
        shared = shared_tokens(answer) if data.share_prefix else 0
        # Only the tokens after the shared ones need room in the row.
        mismatched = None if other is None else _mismatched(answer, answers[other]).cut(max(0, room) + shared)
        both = (answer, mismatched) if mismatched and mismatched.teaches else (answer,)
        result.append(replace(found[place], answers=both, shared=shared))
    return result


def _mismatched(answer: Example, other: Example) -> Example:
    """The prompt of an answer with that of another row."""
    mine, theirs = prompt_tokens(answer), prompt_tokens(other)
    prompt, said = answer.cut(mine), other.without(theirs)
    tokens = np.concatenate([prompt.tokens, said.tokens])
    targets = np.concatenate([prompt.targets, said.targets])
    return Example(
        tokens,
        targets,
        places=end_to_end([(mine, prompt.places), (len(said.tokens), said.places)]),
        together=prompt.together,
    )


def one_kind(desired: int, answers: int) -> str | None:
    """A sentence if all labelled training answers are of one kind. `desired` of the `answers` are desired."""
    if desired not in (0, answers):
        return None
    return (
        f"data.train: the label is {'true' if desired else 'false'} in all of the {answers} rows that can be trained"
        " on, so nothing tells desired answers from others. Add rows of the other kind, or choose another objective."
    )
