"""The chat template of a run: a file, a named template, or the base's own.

The named templates are for bases without one. They follow the documentation of the owners of these formats. Each is a
short file beside this one, and none supports tools. The template's text is part of the fingerprint of data, so even a
new comment in it makes Capstan compile all data again. A template's tokens begin and end its turns. A base that lacks
one, or has never seen it, learns it with `model.add_tokens`.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from trainer.base.base import Tokenizer
from trainer.config import Data
from trainer.config.paths import check_file
from trainer.data.render.templates.chat_template import ChatTemplate
from trainer.errors import ConfigError

_CLOCK = "strftime_now"
"""The function by which a template asks for today's date."""
_FOR_TOOLS = "tool_use"
"""The name of the template that transformers uses for a conversation with tools."""
_DIRECTIVES = "aAbBcdDeFGHIjklmMnpPrRsStTuUVwWxXyYzZ"


@dataclass(frozen=True)
class NamedTemplate:
    """A template's name, the tokens that it needs, and whose format it is."""

    name: str
    tokens: tuple[str, ...]
    source: str

    @property
    def text(self) -> str:
        return (Path(__file__).parent / f"{self.name}.jinja").read_text(encoding="utf-8")


_TEMPLATES = (
    NamedTemplate("chatml", ("<|im_start|>", "<|im_end|>"), "OpenAI's ChatML, which Qwen has too"),
    NamedTemplate("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "Meta's Llama 3"),
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


def template_text(data: Data) -> str | None:
    """The chat template that replaces the tokenizer's own, or None.

    Raises:
        ConfigError: the file cannot be read.
    """
    if data.template is None:
        return None
    if data.template in NAMED:
        return NAMED[data.template].text
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
