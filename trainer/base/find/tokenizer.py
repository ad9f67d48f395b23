"""The tokenizer of a run: the base's, with `model.add_tokens` added and the uses that `model.special_tokens` gives.

An added token is found wherever its text stands, even inside a word, before other text is split. It is not special in
transformers' sense, so decoding shows it.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainer.base.base import Tokenizer
from trainer.base.find.locate import base_files
from trainer.base.find.small_files import PROCESSOR_FILES, tokenizer_content, write_small_files
from trainer.base.unreadable import read_by_transformers
from trainer.config import Model
from trainer.config.model import Tokens
from trainer.errors import ConfigError
from trainer.processes.deferred import transformers_without_torch
from trainer.store.scratch import scratch_folder
from trainer.store.tokenizer_files import CHAT_TEMPLATE, NAMED_TEMPLATES

_SETTINGS = "tokenizer_config.json"
_OWN = Tokens()
_MOST_NAMED = 8
_TEMPLATES = (CHAT_TEMPLATE, "chat_template.json")


def read_tokenizer(directory: Path, name: str, tokens: Tokens = _OWN) -> Tokenizer:
    """The tokenizer in the directory of the base `name`, with the run's own `tokens`.

    Raises `ConfigError` if it cannot be read, or lacks a token that a setting names."""
    if not any((directory / file).exists() for file in PROCESSOR_FILES):  # processors of pictures compute with torch
        transformers_without_torch()
    from transformers import AddedToken, AutoTokenizer

    with read_by_transformers(name, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        # A text that already is a token stays as it is, special or not.
        there = {token.content for token in tokenizer.added_tokens_decoder.values()}
        new = [AddedToken(token, normalized=False) for token in tokens.added if token not in there]
        tokenizer.add_tokens(new)
    for use, text in tokens.special:
        if text not in tokenizer.get_vocab():
            raise ConfigError(
                f"model.special_tokens.{use}: {text!r} is no token of the tokenizer of {name}. Name one that is, or put"
                " it into model.add_tokens as well."
            )
        known = next((token for token in tokenizer.added_tokens_decoder.values() if token.content == text), None)
        if known is None:
            raise ConfigError(
                f"model.special_tokens.{use}: {text!r} is a token that words are made of, and programs find a special"
                " one wherever its text stands, so texts would become other tokens in an export. Name one of"
                f" {_listed(tokenizer)}, or a new one that is in model.add_tokens as well."
            )
        # As transformers reads it from an export: what is special, an answer is shown without.
        found = {flag: getattr(known, flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
        tokenizer.add_special_tokens({f"{use}_token": AddedToken(text, **found, special=True)})
    return tokenizer


def _listed(tokenizer: Tokenizer) -> str:
    """The first tokens of those that are found as a whole."""
    found = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return ", ".join([*found[:_MOST_NAMED], *(["..."] if len(found) > _MOST_NAMED else [])])


class TokenRow(NamedTuple):
    """The row of an added token in embedding and head, and the tokens that its text was before (or itself)."""

    row: int
    pieces: list[int]


def find_rows(model: Model) -> list[TokenRow]:
    """The row in which each of `model.add_tokens` learns, in their order.

    Raises:
        ConfigError: the base's tokenizer has no token for one of the texts, or is not on this machine.
    """
    if not model.add_tokens:
        return []
    directory = base_files(model)
    before = read_tokenizer(directory, model.base)
    after = read_tokenizer(directory, model.base, model.tokens)
    there, rows = set(before.get_vocab().values()), list[TokenRow]()
    for token in model.add_tokens:
        row: Any = after.convert_tokens_to_ids(token)
        pieces = [row] if row in there else before.encode(token, add_special_tokens=False)
        if not pieces:
            raise ConfigError(
                f"model.add_tokens: the tokenizer of {model.base} makes no token of {token!r}. Remove it."
            )
        rows.append(TokenRow(row, pieces))
    return rows


def tokenizer_files(directory: Path, model: Model, template: str | None) -> dict[str, bytes]:
    """Name -> content, for the files of the run's tokenizer, with the run's own chat `template` if it has one.

    They are the files in the base's `directory`, or as transformers saves them if the run adds tokens."""
    if model.tokens == _OWN:
        files = tokenizer_content(directory)
    else:
        with scratch_folder("export") as folder:
            read_tokenizer(directory, model.base, model.tokens).save_pretrained(folder)
            files = tokenizer_content(Path(folder))
    if template is None:
        return files
    # Programs of before transformers 4.51 look for the template among the settings, others in a file of its own. It
    # replaces those by name, too, which programs take for calls of tools.
    kept = {name: content for name, content in files.items() if not name.startswith((*_TEMPLATES, NAMED_TEMPLATES))}
    return {**kept, **_with_settings(files, chat_template=template), CHAT_TEMPLATE: template.encode()}


def with_special_tokens(content: bytes, directory: Path, model: Model) -> bytes:
    """`content`, a config.json or generation_config.json, with the ids of `model.special_tokens`."""
    if not model.tokens.special:
        return content
    tokenizer = read_tokenizer(directory, model.base, model.tokens)
    numbers = {f"{use}_token_id": tokenizer.convert_tokens_to_ids(text) for use, text in model.tokens.special}
    return json.dumps(json.loads(content) | numbers, indent=2, ensure_ascii=False).encode()


def beside_no_config(files: Mapping[str, bytes], directory: Path, name: str) -> dict[str, bytes]:
    """The `files` of a tokenizer, adapted to a folder without a config.json.

    With the config.json in `directory`, that of the base `name`, transformers may choose another class, which may split
    texts differently. If so, the settings get the name of that class."""
    with suppress(ConfigError), scratch_folder("export") as folder:
        write_small_files(Path(folder), files)
        alone, beside = (type(read_tokenizer(place, name)).__name__ for place in (Path(folder), directory))
        if alone != beside:
            return {**files, **_with_settings(files, tokenizer_class=beside)}
    return dict(files)


def _with_settings(files: Mapping[str, bytes], **settings: Any) -> dict[str, bytes]:
    tree: dict[str, Any] = json.loads(files.get(_SETTINGS, b"{}")) | settings
    return {_SETTINGS: json.dumps(tree, indent=2, ensure_ascii=False).encode()}
