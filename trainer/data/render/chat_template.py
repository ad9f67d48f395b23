"""The chat template of a run: a file, a named template, or the base's own.

The named templates are for bases without one. They follow the documentation of the owners of these formats. Each is a
short file in templates/, and none supports tools. The template's text is part of the fingerprint of data, so even a
new comment in it makes Capstan compile all data again. A template's tokens begin and end its turns. A base that lacks
one, or has never seen it, learns it with `model.add_tokens`.

A template reads a content as text or in parts, and the arguments of a call as an object or as JSON in a string. With
the other form it raises or writes nothing. Capstan renders a test conversation once to find out which form the template
reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.base.base import Tokenizer
from trainer.config import Data
from trainer.config.paths import check_file
from trainer.data.format.messages import Message, text_of
from trainer.data.format.spans import Span, joined, shared_beginning
from trainer.data.render.thinking import CLOSE, OPEN, ThinkingForm, find_form
from trainer.errors import ConfigError, DataError
from trainer.processes.time_limit import OutOfTime, time_limit

_CLOCK = "strftime_now"
"""The function by which a template asks for today's date."""
_FOR_TOOLS = "tool_use"
"""The name of the template that transformers uses for a conversation with tools."""
_DIRECTIVES = "aAbBcdDeFGHIjklmMnpPrRsStTuUVwWxXyYzZ"
# The same expression as in transformers, which fills its mask only if this matches.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKED, _SAID = "\ue0f3asked\ue0f3", "\ue0f4said\ue0f4"
_QUESTION: Message = {"role": "user", "content": _ASKED}
_ANSWER: Message = {"role": "assistant", "content": _SAID}
RENDER_SECONDS = 30.0
"""A template renders a conversation in milliseconds; one that has not ended by now never will."""
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class NamedTemplate:
    """A template's name, the tokens that it needs, and whose format it is."""

    name: str
    tokens: tuple[str, ...]
    source: str

    @property
    def text(self) -> str:
        return (Path(__file__).parent / "templates" / f"{self.name}.jinja").read_text(encoding="utf-8")


_TEMPLATES = (
    NamedTemplate("chatml", ("<|im_start|>", "<|im_end|>"), "OpenAI's ChatML, which Qwen has too"),
    NamedTemplate("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "Meta's Llama 3"),
    # Its tokenizer has Gemma's tokens, too.
    NamedTemplate("paligemma", ("<loc0000>", "<seg000>"), "Google's PaliGemma"),
    # Gemma and Mistral have no system turn. Gemma puts its text before the first question, Mistral before the last.
    NamedTemplate("gemma", ("<start_of_turn>", "<end_of_turn>"), "Google's Gemma 1 to 3"),
    NamedTemplate("mistral", ("[INST]", "[/INST]"), "Mistral's instruct models with the tokenizer of version 3"),
    NamedTemplate("phi3", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "Microsoft's Phi-3"),
    # Its headings are plain text, so any base can have it, and none is known by it.
    NamedTemplate("alpaca", (), "Stanford's Alpaca, as axolotl writes it"),
)
NAMED: Mapping[str, NamedTemplate] = {template.name: template for template in _TEMPLATES}
"""The named templates. If a base has the tokens of several, the first of these is proposed."""


def conversation_template(tokenizer: Tokenizer, data: Data) -> ChatTemplate:
    """The template that renders the run's conversations. Raises `ConfigError` as `chat_template`."""
    return ChatTemplate(tokenizer, chat_template(tokenizer, data))


def chat_template(tokenizer: Tokenizer, data: Data) -> str:
    """The text of the run's chat template, whose clock always shows the day of `data.today`.

    Raises:
        ConfigError: there is no template, or its file cannot be read.
    """
    own = template_text(data)
    if own is None:
        try:
            own = tokenizer.get_chat_template()
        except ValueError as error:
            raise no_template({token.content for token in tokenizer.added_tokens_decoder.values()}) from error
    return dated(own, date.fromisoformat(data.today))


def template_for_tools(tokenizer: Tokenizer, data: Data) -> str | None:
    """The name of the tokenizer's separate template for conversations with tools, which other programs use.

    None if the run has its own template, or the tokenizer has no such template.
    """
    named = tokenizer.chat_template
    return _FOR_TOOLS if data.template is None and isinstance(named, dict) and _FOR_TOOLS in named else None


def no_template(tokens: Collection[str] = ()) -> ConfigError:
    """The error for a base without a chat template. `tokens` are those of its tokenizer, if they are known."""
    name = fitting_template(tokens) or next(iter(NAMED))
    return ConfigError(
        "data.template: not set, and the tokenizer of model.base has no chat template. Set it to a named one"
        f" ({', '.join(NAMED)}; here {name}, with its tokens {', '.join(NAMED[name].tokens)} in model.add_tokens), or"
        " to a Jinja file; or data.format to prompt_completion or text."
    )


def fitting_template(tokens: Collection[str]) -> str | None:
    """The named template whose tokens are all among those of a tokenizer. None if there is none."""
    return next((name for name, named in NAMED.items() if named.tokens and set(named.tokens) <= set(tokens)), None)


def is_jinja(template: str) -> bool:
    """Whether a setting is the text of a template, and no name or path."""
    return "{%" in template or "{{" in template


def template_text(data: Data) -> str | None:
    """The chat template that replaces the tokenizer's own, or None.

    Raises:
        ConfigError: the file cannot be read.
    """
    if data.template is None:
        return None
    if data.template in NAMED:
        return NAMED[data.template].text
    if is_jinja(data.template):
        return data.template
    try:
        check_file(Path(data.template))
        return Path(data.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.template: {data.template!r} is none of the named templates ({', '.join(NAMED)}), and as a file it"
            f" cannot be read: {error}."
        ) from error


def has_template(data: Data, directory: Path) -> bool:
    """Whether the settings, or the files of the base's tokenizer in `directory`, have a chat template."""
    if data.template is not None or (directory / "chat_template.jinja").is_file():
        return True
    return any(_read(directory / name).get("chat_template") for name in ("tokenizer_config.json", "chat_template.json"))


def tokens_of(directory: Path) -> set[str]:
    """The tokens that a tokenizer's files add to its vocabulary. A chat template may use them."""
    added = _read(directory / "tokenizer.json").get("added_tokens") or []
    listed = _read(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    both = [*(added if isinstance(added, list) else []), *(listed.values() if isinstance(listed, dict) else [])]
    return {str(token["content"]) for token in both if isinstance(token, dict) and "content" in token}


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        tree = json.loads(path.read_bytes())
        return tree if isinstance(tree, dict) else {}
    return {}


def asks_for_the_date(text: str) -> bool:
    """Whether a template, or the file that holds one, prints the date on which it is rendered."""
    return _CLOCK in text


def dated(text: str, day: date) -> str:
    """The template with a clock that stands at midnight of `day`, so that it renders the same on every day."""
    if not asks_for_the_date(text):
        return text
    written = {f"%-{one}": day.strftime(f"%{one}").lstrip("0") or "0" for one in "dmHIMSjy"}
    written |= {f"%{one}": day.strftime(f"%{one}") for one in _DIRECTIVES}
    replaced = "".join(f" | replace({directive!r}, {value!r})" for directive, value in written.items())
    # The empty expression keeps the white space at the beginning of the template.
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}{text}"


class ChatTemplate:
    """The template `text` with a tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer, self._template = tokenizer, text
        self.tagged = _GENERATION.search(text) is not None
        self._forms: dict[bool, ThinkingForm | None] = {}

    def render(self, messages: Sequence[Message], tools: Tools = None, *, generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises `DataError` if the template refuses it."""
        return self._rendered(self._as_taken(messages), tools, generation_prompt)

    def enclosed(self, messages: Sequence[Message], tools: Tools = None) -> list[Span]:
        """The characters of the text between {% generation %} tags, sorted and disjoint.

        They are those of the tokens that transformers finds there."""
        options: dict[str, Any] = {"chat_template": self._template, "tools": tools}
        found = _or_refused(
            lambda: self._tokenizer.apply_chat_template(
                self._as_taken(messages),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
                **options,
            ),
            len(messages),
        )
        spans, ahead = list[Span](), 0
        for (begin, end), inside in zip(found["offset_mapping"], found["assistant_masks"], strict=True):
            if inside:
                spans.append((min(begin, ahead), end))  # a token's offsets may leave white space out
            ahead = end
        return joined(spans)

    @cached_property
    def end(self) -> str:
        """The text that the template writes after the last answer of a conversation, without white space around it."""
        return self._behind_the_answer(_QUESTION, _ANSWER).strip()

    @cached_property
    def behind_an_answer(self) -> str:
        """The text that the template writes after an answer if another question follows."""
        return self._behind_the_answer(_QUESTION, _ANSWER, _QUESTION)

    def _behind_the_answer(self, *messages: Message) -> str:
        """The text after the answer in such a conversation. Empty if the template refuses it."""
        try:
            return self.render(messages).rpartition(_SAID)[2]
        except DataError:
            return ""

    def check_prompt(self) -> None:
        """Raises `ConfigError` if the template also writes the generation prompt after the last answer.

        It would be trained there.
        """
        try:
            asked, talk = self.render([_QUESTION]), self.render([_QUESTION, _ANSWER])
        except DataError:
            return
        # If another question follows, other text comes after the answer.
        last, lead = talk.rpartition(_SAID)[2].rstrip(), talk.partition(_ASKED)[2].partition(_SAID)[0].rstrip()
        own = last[shared_beginning(last, self.behind_an_answer) :]
        if own and asked.rstrip().endswith(own) and lead.endswith(own):
            raise ConfigError(
                f"data.template: the chat template writes the generation prompt (... {own!r}) behind the last answer,"
                " too, where it would be trained; set data.template to a copy of it that writes it only where"
                " add_generation_prompt is true."
            )

    def thinking(self, calls: bool) -> ThinkingForm | None:
        """How the template writes thinking before an answer, or before `calls` only. None if it cannot be found."""
        if calls not in self._forms:
            self._forms[calls] = find_form(self.render, calls=calls)
        return self._forms[calls]

    @cached_property
    def reads_tags(self) -> bool:
        """Whether it takes <think> tags for thinking, or leaves them out, also behind other words of an answer."""
        said = f"{_SAID}{OPEN}{_ASKED}{CLOSE}{_SAID}"
        talk = [_QUESTION, {**_ANSWER, "content": said}]
        return not all(self._shows(self._as_taken([*talk, *later]), said) for later in ([], [_QUESTION, _ANSWER]))

    def _as_taken(self, messages: Sequence[Message]) -> list[Message]:
        return [self._one_as_taken(message) for message in messages]

    def _one_as_taken(self, message: Message) -> Message:
        if self._takes_parts:
            message = _in_parts(message)
        if "tool_calls" in message and self._takes_written_arguments:
            message = _with_written_arguments(message)
        return message

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether contents must be lists of parts, because the template does not write them as text."""
        talk = [_QUESTION, _ANSWER]
        return not self._shows(talk, _ASKED, _SAID) and self._shows(list(map(_in_parts, talk)), _ASKED, _SAID)

    @cached_property
    def _takes_written_arguments(self) -> bool:
        """Whether a call's arguments must be JSON in a string: the template does not write them as an object."""
        shape = _in_parts if self._takes_parts else dict
        call = {"type": "function", "function": {"name": _SAID, "arguments": {_ASKED: _ASKED}}, "id": "call00001"}
        talk = [shape({"role": "user", "content": "a"}), {"role": "assistant", "content": "", "tool_calls": [call]}]
        written = [talk[0], _with_written_arguments(talk[1])]
        return not self._shows(talk, _SAID, _ASKED) and self._shows(written, _SAID, _ASKED)

    def _shows(self, messages: list[Message], *marks: str) -> bool:
        try:
            text = self._rendered(messages, None, False)
        except DataError:
            return False
        return all(mark in text for mark in marks)

    def _rendered(self, messages: list[Message], tools: Tools, generation_prompt: bool) -> str:
        options: dict[str, Any] = {"chat_template": self._template, "tools": tools}
        text = _or_refused(
            lambda: self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **options
            ),
            len(messages),
        )
        return text_of(text, "conversation's text")


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_written_arguments(message: Message) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": _written(call["function"].get("arguments"))}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _written(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _or_refused(apply: Callable[[], Any], messages: int) -> Any:
    try:
        with time_limit(RENDER_SECONDS):
            return apply()
    except OutOfTime as error:
        raise ConfigError(
            f"data.template: the chat template has not rendered a conversation of {messages:,} messages within"
            f" {RENDER_SECONDS:.0f} seconds. It seems to loop without an end; correct the template of the base, or give"
            " another one."
        ) from error
    except Exception as error:  # a template is the user's program and may raise anything
        from jinja2 import TemplateSyntaxError  # transformers has imported it by now

        if isinstance(error, TemplateSyntaxError):  # it refuses every conversation
            raise ConfigError(
                f"data.template: the chat template is no Jinja template that can be read: line {error.lineno}:"
                f" {error.message}. Correct it, or give another one."
            ) from error
        raise DataError(f"the chat template refuses the conversation: {error}") from error
