"""The tokenizer of a run: its base's own, and the tokens that `model.add_tokens` adds to it.

An added token is found wherever its text stands, inside a word too, before anything else is split. It is not special in
transformers' sense, so decoding shows it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.base.describe.config_json import read_by_transformers
from trainer.base.find.locate import CHAT_TEMPLATE, TOKENIZER_FILES, base_files, named_files
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.files.scratch import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTINGS = "tokenizer_config.json"
_TEMPLATES = (CHAT_TEMPLATE, "chat_template.json")


def read_tokenizer(directory: Path, name: str, added_tokens: Sequence[str] = ()) -> "PreTrainedTokenizerBase":
    """The tokenizer in the directory of the base `name`, with `added_tokens`. Raises `ConfigError` when it cannot be read."""
    from transformers import AddedToken, AutoTokenizer

    with read_by_transformers(name, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        # A token that is one already stays what it is, special or not.
        there = {token.content for token in tokenizer.added_tokens_decoder.values()}
        new = [AddedToken(token, normalized=False) for token in added_tokens if token not in there]
        tokenizer.add_tokens(new)
        return tokenizer


class TokenRow(NamedTuple):
    """The row of an added token in embedding and head, and the tokens that its text was before: itself, where it was one."""

    row: int
    pieces: list[int]


def find_rows(model: Model) -> list[TokenRow]:
    """Where each of `model.add_tokens` learns, in their order.

    Raises:
        ConfigError: the base's tokenizer has no token for one of the texts, or is not here.
    """
    if not model.add_tokens:
        return []
    directory = base_files(model)
    before = read_tokenizer(directory, model.base)
    after = read_tokenizer(directory, model.base, model.add_tokens)
    there, rows = set(before.get_vocab().values()), list[TokenRow]()
    for token in model.add_tokens:
        row: Any = after.convert_tokens_to_ids(token)
        pieces = [row] if row in there else before.encode(token, add_special_tokens=False)
        if not pieces:
            raise ConfigError(f"model.add_tokens: {token!r} is nothing to the tokenizer of {model.base}. Remove it.")
        rows.append(TokenRow(row, pieces))
    return rows


def tokenizer_files(directory: Path, model: Model, template: str | None) -> dict[str, bytes]:
    """Name -> content of the files of the run's tokenizer: those in the base's `directory`, or as transformers saves what was added to;
    with the run's own chat `template` where it has one."""
    if not model.add_tokens:
        files = named_files(directory, TOKENIZER_FILES)
    else:
        with scratch_folder("export") as folder:
            read_tokenizer(directory, model.base, model.add_tokens).save_pretrained(folder)
            files = named_files(Path(folder), TOKENIZER_FILES)
    return files if template is None else _with_template(files, template)


def _with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Programs of before transformers 4.51 look for the template among the settings, others in a file of its own."""
    kept = {name: content for name, content in files.items() if name not in _TEMPLATES}
    settings: dict[str, Any] = json.loads(files.get(_SETTINGS, b"{}"))
    settings["chat_template"] = template
    return {
        **kept,
        _SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        CHAT_TEMPLATE: template.encode(),
    }
