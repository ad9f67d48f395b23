"""The name of a compiled data set. It is known before the compilation, and covers everything that decides a token."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.find.small_files import processor_files, read_config, tokenizer_content
from trainer.config import Data
from trainer.config.model import Model, Tokens
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.dataset.manifest import FORMAT
from trainer.data.format.formats import RowForm, as_read, explicit_form
from trainer.data.render.chat_template import asks_for_the_date, template_text
from trainer.data.source.files import SourceFile
from trainer.data.source.reading import EVERYTHING, Part
from trainer.errors import NOT_JSON

_DATED = "prints the date"  # an entry among a tokenizer's hashes, if its own template prints the date
_PROCESSOR = "processor: "  # begins the entries of the processor's files among a tokenizer's hashes
_OWN = Tokens()
CHAPTER_BYTES = 4 * 2**30
"""Size of the sources of a chapter. It is small enough to be compiled soon, and large enough to be shuffled in."""


def hash_tokenizer(directory: Path, tokens: Tokens = _OWN) -> dict[str, str]:
    """The SHA-256 of each file of a Hugging Face model directory that decides what a tokenizer does.

    If the run adds tokens, also the SHA-256 of these."""
    contents = tokenizer_content(directory)
    for setting, own in (("model.add_tokens", list(tokens.added)), ("model.special_tokens", dict(tokens.special))):
        if own:
            contents[setting] = json.dumps(own).encode()
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    dated = any(asks_for_the_date(content.decode(errors="replace")) for content in contents.values())
    return {**hashes, _DATED: "data.today"} if dated else hashes


def hash_tokens(directory: Path, model: Model) -> dict[str, str]:
    """The facts that decide the tokens of a text in a run over `model`, whose small files are in `directory`.

    These are `hash_tokenizer`, and the tokenizer's class if config.json decides it: from the same files, Qwen2's class
    and the general one make different tokens.

    Raises:
        ConfigError: config.json is of a kind that is not supported.
    """
    hashes = hash_tokenizer(directory, model.tokens) | hash_processor(directory)
    config, settings = read_config(model.base, directory), directory / "tokenizer_config.json"
    with suppress(FileNotFoundError, *NOT_JSON, AttributeError):  # the code that reads the tokenizer reports it
        named = json.loads(settings.read_bytes()).get("tokenizer_class")
        forced = read_architecture(config, model.layers, name=model.base).tokenizer
        taken = forced or named or config.get("tokenizer_class") or config["model_type"]
        if taken.removesuffix("Fast") != (named or "").removesuffix("Fast"):
            hashes["class"] = taken
    return hashes


def hash_processor(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of a base that decides which tokens stand for a picture. They count for rows with
    pictures alone."""
    return {
        f"{_PROCESSOR}{name}": hashlib.sha256(content).hexdigest()
        for name, content in processor_files(directory).items()
    }


def fingerprint(
    data: Data,
    files: Sequence[SourceFile],
    tokenizer_files: Mapping[str, str],
    part: Part = EVERYTHING,
) -> str:
    """20 hex digits that change with the sources' content, the tokenizer, the template or a setting that matters.

    `tokenizer_files` comes from `hash_tokens`. The sources' weights and the packing are not included, because they
    belong to the epoch's plan.

    Raises:
        ConfigError: `data.template` cannot be read.
    """
    template = template_text(data)
    dated = _DATED in tokenizer_files if template is None else asks_for_the_date(template)
    sees = any(ROW_KINDS[(file.form or explicit_form(data)).kind].sees for file in files)
    inputs = {
        "format_version": FORMAT,
        "sources": [[file.source, file.uri, file.version, file.size, *_taken(file)] for file in files],
        "chapters": count_chapters(files),
        "tokenizer": {
            name: digest for name, digest in tokenizer_files.items() if sees or not name.startswith(_PROCESSOR)
        },
        "template": template,
        **({"today": data.today} if dated else {}),
        **({"pictures": {"backend": "torchvision", **data.images.decisive}} if sees else {}),
        **({"videos": most} if sees and (most := data.videos.model_dump(exclude_defaults=True)) else {}),
        **({"sounds": longest} if sees and (longest := data.sounds.model_dump(exclude_defaults=True)) else {}),
        **_reading(data, files),
        "part": [float(part.amount), part.seed, part.held_out],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]


def _taken(file: SourceFile) -> list[Any]:
    take = file.take
    return [] if take is None else [take.amount, take.seed, *([take.skip] if take.skip else [])]


def _reading(data: Data, files: Sequence[SourceFile]) -> dict[str, Any]:
    """The settings for reading rows. If all sources have the same form, they are the settings that name this form."""
    forms = {file.source: file.form for file in files if file.form is not None}
    settings = data.model_dump(include={"sequence_length", "on_too_long", "on_bad_row"}) | data.beyond_targets
    if len(set(forms.values())) > 1:
        ways = [
            [source, form.format, dict(form.fields), as_read(data, form).targets, *_made(form)]
            for source, form in sorted(forms.items())
        ]
        return {"settings": settings, "ways": ways}
    form = next(iter(forms.values()), None) or explicit_form(data)
    columns = [asdict(column) for column in ROW_KINDS[form.kind].columns]
    return {
        "settings": settings | {"format": form.format, "fields": dict(form.fields)},
        **({"made": made} if (made := _made(form)) else {}),
        "targets": as_read(data, form).targets,
        **({"columns": columns} if columns else {}),
    }


def _made(form: RowForm) -> list[Any]:
    """Return what the form replaces in rows, writes into them and leaves out; an empty list if it does none."""
    if not (form.replaced or form.written or form.without):
        return []
    return [form.replaced, form.written, *([form.without] if form.without else [])]


def count_chapters(files: Sequence[SourceFile]) -> int:
    """The number of chapters that a data set of these sources gets: 1 unless they are large."""
    return max(1, -(-sum(map(_bytes_taken, files)) // CHAPTER_BYTES))


def _bytes_taken(file: SourceFile) -> int:
    """About how many bytes of the file are taken, if a share of it is."""
    share = file.take.amount if file.take and file.take.amount < 1 else 1
    return int(share * file.size)
