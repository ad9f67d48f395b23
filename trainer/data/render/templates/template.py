"""The chat template of a run: a file, one by name, or the base's own.

The named ones are for bases that have none, as the owners of these formats document them. Each is a file beside this
one, is short and has no tools. Its text belongs to the fingerprint of data, so that a comment in it would have all data
compiled again. The tokens are those that end and begin its turns; a base that lacks one, or has never seen it, learns
it with `model.add_tokens`.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from trainer.base.tokenizer import Tokenizer
from trainer.config import Data
from trainer.config.paths import check_file
from trainer.data.render.templates.chat_template import ChatTemplate
from trainer.errors import ConfigError

_CLOCK = "strftime_now"
"""The function by which a template asks for today's date."""
_FOR_TOOLS = "tool_use"
"""The name that transformers looks for where a conversation has tools."""
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
    # Gemma and Mistral have no turn of a system: its words stand before the first question, and before the last.
    NamedTemplate("gemma", ("<start_of_turn>", "<end_of_turn>"), "Google's Gemma 1 to 3"),
    NamedTemplate("mistral", ("[INST]", "[/INST]"), "Mistral's instruct models with the tokenizer of version 3"),
    NamedTemplate("phi3", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "Microsoft's Phi-3"),
)
NAMED: Mapping[str, NamedTemplate] = {template.name: template for template in _TEMPLATES}
"""The named templates; where a base has the tokens of several, the first is the one to take."""


def conversation_template(tokenizer: Tokenizer, data: Data) -> ChatTemplate:
    """The template that the run's conversations are rendered by. Raises `ConfigError` as `chat_template`."""
    return ChatTemplate(tokenizer, chat_template(tokenizer, data))


def chat_template(tokenizer: Tokenizer, data: Data) -> str:
    """The text of the run's chat template, in which it is always the day of `data.today`.

    Raises:
        ConfigError: there is none, or its file cannot be read.
    """
    own = template_text(data)
    if own is None:
        try:
            own = tokenizer.get_chat_template()
        except ValueError as error:
            raise no_template({token.content for token in tokenizer.added_tokens_decoder.values()}) from error
    return dated(own, date.fromisoformat(data.today))


def template_for_tools(tokenizer: Tokenizer, data: Data) -> str | None:
    """The name of the tokenizer's other template, by which programs render conversations with tools, where the run has
    none of its own.
    """
    named = tokenizer.chat_template
    return _FOR_TOOLS if data.template is None and isinstance(named, dict) and _FOR_TOOLS in named else None


def no_template(tokens: Collection[str] = ()) -> ConfigError:
    """The error for a base without a chat template; `tokens` are those of its tokenizer, where they are known."""
    name = fitting_template(tokens) or next(iter(NAMED))
    return ConfigError(
        "data.template: not set, and the tokenizer of model.base has no chat template. Set it to a named one"
        f" ({', '.join(NAMED)}; here {name}, with its tokens {', '.join(NAMED[name].tokens)} in model.add_tokens), or"
        " to a Jinja file; or data.format to prompt_completion or text."
    )


def fitting_template(tokens: Collection[str]) -> str | None:
    """The named template whose tokens are all among those of a tokenizer; None where there is none."""
    return next((name for name, named in NAMED.items() if set(named.tokens) <= set(tokens)), None)


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
    """Whether there is a chat template, by the settings and the files of the base's tokenizer in `directory`."""
    if data.template is not None or (directory / "chat_template.jinja").is_file():
        return True
    return any(_read(directory / name).get("chat_template") for name in ("tokenizer_config.json", "chat_template.json"))


def tokens_of(directory: Path) -> set[str]:
    """The tokens that the files of a tokenizer add to its vocabulary, which are those that a chat template may be made
    of.
    """
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
    """Whether a template, or the file that holds one, prints the date of the day on which it is rendered."""
    return _CLOCK in text


def dated(text: str, day: date) -> str:
    """The template with its own clock, which stands at midnight of `day`: it renders the same on every day."""
    if not asks_for_the_date(text):
        return text
    written = {f"%-{one}": day.strftime(f"%{one}").lstrip("0") or "0" for one in "dmHIMSjy"}
    written |= {f"%{one}": day.strftime(f"%{one}") for one in _DIRECTIVES}
    replaced = "".join(f" | replace({directive!r}, {value!r})" for directive, value in written.items())
    # The empty expression keeps the white space that the template begins with.
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}{text}"
