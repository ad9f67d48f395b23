"""Prompts as the model was trained to see them: files of prompts, their tokens, and where an answer ends. No torch."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainer.base.base import Tokenizer
from trainer.base.find.media import modalities
from trainer.base.unreadable import read_by_transformers
from trainer.config import Data
from trainer.config.paths import absolute_path, text_lines
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.format.messages import read_messages
from trainer.data.format.pictures import files_beside, names_of
from trainer.data.render.chat import framing
from trainer.data.render.chat_template import conversation_template
from trainer.data.render.document import reading
from trainer.errors import NOT_JSON, ConfigError, DataError
from trainer.servers import Pictured
from trainer.store import json_text

if TYPE_CHECKING:
    from torch import Tensor

Prompt = Mapping[str, Any]
"""A row with `prompt`, a text, or with `messages`, a conversation that the model is to answer.

It may have `images`, `videos` or `audios` beside the text, and then `file` is the path of the file whose folder their
paths begin in."""


class Question(NamedTuple):
    """The `tokens` before an answer. `inputs` are what the base's processor made of the pictures among them for the
    class that sees."""

    tokens: list[int]
    inputs: "Mapping[str, Tensor]"


_GIVEN: Mapping[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str),
    "messages": lambda value: isinstance(value, list) and bool(value) and all(isinstance(said, dict) for said in value),
}
_FILE = "file"


def read_prompts(path: str, fields: Mapping[str, str], setting: str = "eval.prompts") -> list[Prompt]:
    """Read the prompts of a .jsonl file, of a .json file with an array or with lines of JSON, or the lines of any other
    text file. Empty lines are skipped. `fields` are the names that the run's rows have for fields of files
    (`data.fields`).

    Raises:
        ConfigError: the file cannot be read, or a row has neither prompt nor messages.
    """
    rows = text_lines(path, setting)
    if not rows:
        raise ConfigError(f"{setting}: {path!r} holds no prompt. Give a line for each.")
    if not path.endswith((".jsonl", ".json")):
        return [{"prompt": line} for _, line in rows]
    file, where = str(absolute_path(path, setting)), f"{setting}: {path}"
    if path.endswith(".json") and rows[0][1].lstrip().startswith("["):
        array = _parsed("\n".join(line for _, line in rows), where)
        read = [_prompt(row, f"{where}: object {number}", fields) for number, row in enumerate(array, 1)]
    else:
        read = [prompt_of(line, f"{where}:{number}", fields) for number, line in rows]
    if not read:
        raise ConfigError(f"{where} holds no prompt. Give an object for each.")
    return [{**prompt, _FILE: file} if has_pictures(prompt) else prompt for prompt in read]


def prompt_of(line: str, where: str, fields: Mapping[str, str]) -> Prompt:
    """Read the prompt in a line of JSON. `fields` is as in `read_prompts`. Raises `ConfigError` if there is none."""
    return _prompt(_parsed(line, where), where, fields)


def _parsed(text: str, where: str) -> Any:
    try:
        return json_text.loads(text)
    except NOT_JSON as error:
        raise ConfigError(f"{where}: not JSON: {error}.") from error


def _prompt(row: Any, where: str, fields: Mapping[str, str]) -> Prompt:
    given = {name: row[name] for name in _GIVEN if name in row} if isinstance(row, dict) else {}
    if not given or not all(_GIVEN[name](value) for name, value in given.items()):
        raise ConfigError(f"{where}: a row needs the field prompt, a text, or messages, a list of objects with a role.")
    try:
        beside = {
            one.fields[0]: files_beside(row, one, names_of(one.fields[0], one.fields, fields)) for one in modalities()
        }
    except DataError as error:
        raise ConfigError(f"{where}: {error}.") from error
    return given | {name: files for name, files in beside.items() if files}


def has_pictures(prompt: Prompt) -> bool:
    """Whether pictures, or files of other modalities, are given beside the text of a prompt, or in parts of its
    messages."""
    parts = (part for message in prompt.get("messages", ()) for part in _parts(message))
    types = {name for modality in modalities() for name in modality.parts}
    return any(modality.fields[0] in prompt for modality in modalities()) or any(
        part.get("type") in types for part in parts
    )


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def asked(prompt: Prompt) -> str:
    """Return a prompt in one text for a reader. A conversation is shown by its last message, a picture by <image>."""
    given = prompt.get("messages", prompt.get("prompt"))
    last = {"content": given} if isinstance(given, str) else given[-1]
    tags = {kind: modality.tag for modality in modalities() for kind in modality.parts}
    shown = (str(part.get("text", tags.get(part.get("type", ""), "<image>"))) for part in _parts(last))
    text = "".join(shown) or str(last.get("content", ""))
    before = (
        modality.tag * len(prompt.get(modality.fields[0], ())) for modality in modalities() if modality.tag not in text
    )
    return "".join(before) + text


class Prompter:
    """Makes the tokens of prompts under the run's template and format, and the text of answers.

    `chats`: a prompt is the first message of a conversation. `stops` are the tokens that end an answer: the tokenizer's
    end of text, those of the base's generation_config.json, and in a chat the token that the template puts after an
    assistant's turn.
    """

    def __init__(self, tokenizer: Tokenizer, data: Data, directory: Path) -> None:
        self._tokenizer, self._data = tokenizer, data
        eos: Any = tokenizer.eos_token_id
        self.stops = {*([eos] if eos is not None else []), *_generation_ends(directory)}
        # If the tokenizer has no template, rows whose format is detected cannot be conversations.
        templated = data.template or getattr(tokenizer, "chat_template", None)
        is_talk = data.kind == "chat" or ROW_KINDS[data.kind].sees
        self.chats = is_talk and (data.format != "auto" or bool(templated))
        if self.chats:
            self.stops |= self._turn_ends()

    def question(self, prompt: Prompt) -> Question:
        """Return the tokens before the answer, and its pictures as the class takes them.

        Raises `ConfigError` when the prompt does not suit the run's format, or a picture cannot be read."""
        if not self._needs_processor(prompt):
            return Question(self.tokens(prompt), {})
        return Question(*self._of_pictures(prompt, "question"))

    def judged(self, prompt: Prompt) -> Question:
        """Return the tokens of a conversation that an objective's head reads to its end, and its pictures as the class
        takes them. Raises as `question`."""
        return Question(*self._of_pictures(prompt, "judged"))

    def _needs_processor(self, prompt: Prompt) -> bool:
        return has_pictures(prompt) or (self._pictures is not None and self._pictures.reads_prompts)

    def served(self, prompt: Prompt) -> list[int] | Pictured:
        """Return the tokens before the answer, with its pictures as a server takes them. Raises as `question`."""
        return self._of_pictures(prompt, "served") if self._needs_processor(prompt) else self.tokens(prompt)

    def _of_pictures(self, prompt: Prompt, what: Literal["question", "judged", "served"]) -> Any:
        """Return what the renderer of rows with pictures makes of a prompt."""
        if self._pictures is None:
            raise ConfigError(
                f"a prompt has a picture, and the run was trained on text (data.format: {self._data.format}). Leave the"
                " picture out, or train with data.format: pictures."
            )
        messages = prompt.get("messages", [{"role": "user", "content": prompt.get("prompt")}])
        files = {one.fields[0]: prompt[one.fields[0]] for one in modalities() if one.fields[0] in prompt}
        row = {"messages": messages, **files}
        try:
            with reading(str(prompt.get(_FILE, ""))):
                return getattr(self._pictures, what)(row)
        except DataError as error:
            raise ConfigError(f"a prompt cannot be read: {error}.") from error

    @cached_property
    def _pictures(self) -> Any:
        """Renders conversations with pictures. None for a run without."""
        kind = ROW_KINDS[self._data.kind]
        return kind.renderer(self._tokenizer, self._data) if kind.sees else None

    def tokens(self, prompt: Prompt) -> list[int]:
        """Return the tokens before the answer. Raises `ConfigError` when the prompt does not suit the run's format."""
        given = prompt.get("messages", prompt.get("prompt"))
        if self.chats or not isinstance(given, str):
            messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
            return self.encode(self._rendered(messages, generation_prompt=True))
        tokens, begin = self.encode(given), self.text_begin
        return tokens if tokens[:1] == begin else [*begin, *tokens]

    def fitting(self, prompts: Sequence[Prompt], longest: int | None) -> list[Question]:
        """Return the tokens of each prompt, and its pictures.

        Raises `ConfigError` as `question`, and for a prompt that leaves no room for an answer in `longest` tokens.
        """
        questions = [self.question(prompt) for prompt in prompts]
        most = max(len(question.tokens) for question in questions)
        if longest is not None and most >= longest:
            raise ConfigError(f"a prompt has {most} tokens, and the base has positions for {longest}. Shorten it.")
        return questions

    def ended(self, written: Sequence[int]) -> bool:
        return written[-1] in self.stops

    def text(self, written: Sequence[int]) -> str:
        """Return an answer as a reader sees it, without the tokens that end it."""
        shown: Any = self._tokenizer.decode(list(written), skip_special_tokens=True)
        return shown

    @property
    def text_begin(self) -> list[int]:
        """The token that the tokenizer itself puts before a text, if it does."""
        begin, _ = framing(self._tokenizer, self._data)
        return [] if begin is None else [begin]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text alone."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _rendered(self, messages: Any, **options: Any) -> str:
        try:
            return conversation_template(self._tokenizer, self._data).render(read_messages(messages), **options)
        except DataError as error:
            raise ConfigError(f"a prompt's messages: {error}.") from error

    def _turn_ends(self) -> set[int]:
        said = "zebra"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
        behind = self._rendered(turns).rpartition(said)[2]
        tokens, special = self.encode(behind.lstrip()), self._tokenizer.added_tokens_decoder
        return {tokens[0]} if tokens and tokens[0] in special else set()


def _generation_ends(directory: Path) -> set[int]:
    """Return the ends of text in the base's generation_config.json.

    Many chat models have more there than in the tokenizer.
    """
    from transformers import GenerationConfig

    if not (directory / "generation_config.json").is_file():
        return set()
    with read_by_transformers(str(directory), "the generation_config.json"):
        ends: Any = GenerationConfig.from_pretrained(directory).eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())
