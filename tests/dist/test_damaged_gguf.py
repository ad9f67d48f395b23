"""`--verify` refuses a GGUF file in which anything has changed that llama.cpp reads: weights, settings, tokens, the
template, files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, Keys

from tests.dist.test_gguf import exported, workshop_of
from tests.material import commit
from trainer.errors import CapstanError
from trainer.export.format import find_format
from trainer.export.formats import gguf as gguf_format
from trainer.export.gguf.proof import _check_texts
from trainer.export.proof.rendering import trained_texts
from trainer.export.proof.verify import check_again
from trainer.export.trained import resolve_trained_base, trained_config
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store, open_store

pytestmark = pytest.mark.long

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    workshop = workshop_of(tmp_path_factory.mktemp("damaged"), "llama")
    settings = workshop.base / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    commit(workshop.store.sub("done"), workshop.config("done"), 4)
    return workshop.store.sub("done")


@pytest.fixture(scope="module")
def exports(run: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    exported(run, folder / "gguf", "gguf", "types=[f16,f32]")
    exported(run, folder / "gguf-adapter", "gguf-adapter")
    return {form: folder / form for form in ("gguf", "gguf-adapter")}


def model(folder: Path) -> Path:
    return max(folder.glob("*.gguf"), key=lambda file: ("f16" in file.name, file.name))


def in_place(change: Callable[[GGUFReader], object]) -> Change:
    """Values are overwritten where they are, so all others stay where they were."""

    def apply(folder: Path) -> None:
        reader = GGUFReader(model(folder), "r+")
        change(reader)
        reader.data.flush()

    return apply


def value(key: str, number: float, at: int = 0) -> Change:
    """The value of a setting, or one of a list."""

    def change(reader: GGUFReader) -> None:
        field: Any = reader.fields[key]
        assert field.parts[field.data[at]][0] != number
        field.parts[field.data[at]][0] = number

    return in_place(change)


def letter(key: str, before: bytes, after: bytes) -> Change:
    def change(reader: GGUFReader) -> None:
        field: Any = reader.fields[key]
        part = field.parts[field.data[0]]
        text = bytes(part)
        assert before in text
        assert len(before) == len(after)
        part[:] = np.frombuffer(text.replace(before, after, 1), np.uint8)

    return in_place(change)


def two_tokens(reader: GGUFReader) -> None:
    field: Any = reader.fields[Keys.Tokenizer.LIST]
    first, second = field.parts[field.data[-1]], field.parts[field.data[-2]]
    assert len(first) == len(second)
    first[:], second[:] = second.copy(), first.copy()


def tensor(name: str, change: Callable[[Any], object]) -> Change:
    def apply(reader: GGUFReader) -> None:
        change(next(found.data for found in reader.tensors if found.name == name))

    return in_place(apply)


def swapped(one: str, other: str) -> Change:
    def change(reader: GGUFReader) -> None:
        first, second = (next(found.data for found in reader.tensors if found.name == name) for name in (one, other))
        first[:], second[:] = second.copy(), first.copy()

    return in_place(change)


def one_bit(folder: Path) -> None:
    content = bytearray(model(folder).read_bytes())
    content[-3] ^= 1
    model(folder).write_bytes(content)


def more(values: Any) -> None:
    values.reshape(-1)[-1] += 0.01


def nothing(values: Any) -> None:
    values[:] = 0


# Damages that the texts show, whatever wrote the file.
TEXTS: dict[str, Change] = {
    "another end": value(Keys.Tokenizer.EOS_ID, 1),
    "another begin": value(Keys.Tokenizer.BOS_ID, 2),
    "the end is no special token": value(Keys.Tokenizer.TOKEN_TYPE, 1, 2),
    "two tokens swapped": in_place(two_tokens),
    "another template": letter(Keys.Tokenizer.CHAT_TEMPLATE, b"role }}: ", b"role }}; "),
    "a template without an end": letter(Keys.Tokenizer.CHAT_TEMPLATE, b"</s>", b"    "),
}
FILES: dict[str, Change] = {
    "cut short": lambda folder: model(folder).write_bytes(model(folder).read_bytes()[:-32]),
    "longer": lambda folder: model(folder).write_bytes(model(folder).read_bytes() + b"\0" * 32),
    "one bit": one_bit,
    "another model beside it": lambda folder: shutil.copy(model(folder), folder / "other.gguf"),
    "another name": lambda folder: model(folder).rename(folder / "other.gguf"),
    "gone": lambda folder: model(folder).unlink(),
    "a torn header": lambda folder: model(folder).write_bytes(b"GGUX" + model(folder).read_bytes()[4:]),
}
MODELS: dict[str, Change] = {
    "one weight": tensor("blk.0.ffn_up.weight", more),
    "a norm": tensor("output_norm.weight", more),
    "a head of zeros": tensor("output.weight", nothing),
    "keys of two layers swapped": swapped("blk.0.attn_k.weight", "blk.1.attn_k.weight"),
    "keys and values swapped": swapped("blk.0.attn_k.weight", "blk.0.attn_v.weight"),
    "another theta": value("llama.rope.freq_base", 10001),
    "another epsilon": value("llama.attention.layer_norm_rms_epsilon", 2e-6),
    "a shorter context": value("llama.context_length", 128),
    "fewer rotated": value("llama.rope.dimension_count", 8),
    "another number of heads": value("llama.attention.head_count", 2),
    "another padding": value(Keys.Tokenizer.PAD_ID, 5),
    "another score": value(Keys.Tokenizer.SCORES, -7, 280),
    "another way to split": letter(Keys.Tokenizer.PRE, b"default", b"falcon3"),
    "another kind of tokenizer": letter(Keys.Tokenizer.MODEL, b"llama", b"plamo"),
    "the file of another type": lambda folder: shutil.copy(folder / "done-f32.gguf", folder / "done-f16.gguf"),
}
ADAPTERS: dict[str, Change] = {
    "another alpha": value(Keys.Adapter.LORA_ALPHA, 17),
    "another kind": letter(Keys.Adapter.TYPE, b"lora", b"ALoR"),
    "one weight": tensor("blk.0.attn_q.weight.lora_a", more),
    "a matrix of zeros": tensor("blk.0.attn_q.weight.lora_b", nothing),
    "two layers swapped": swapped("blk.0.attn_q.weight.lora_b", "blk.1.attn_q.weight.lora_b"),
    "another architecture": letter(Keys.General.ARCHITECTURE, b"llama", b"qwen2"),
}
CHANGES = {"gguf": {**FILES, **TEXTS, **MODELS}, "gguf-adapter": {**FILES, **ADAPTERS}}


@pytest.mark.parametrize(
    ("form", "damage"), [(form, damage) for form, changes in CHANGES.items() for damage in changes]
)
def test_a_damaged_file_is_refused(
    run: Store, exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, damage: str
) -> None:
    # llama.cpp's converter, which gives the same bytes again, would take 20 s each time.
    monkeypatch.setattr(
        gguf_format,
        "convert",
        lambda model, kind, file, name: shutil.copy(exports["gguf"] / f"{name}-{kind}.gguf", file),
    )
    again = find_format(form, ["types=[f16,f32]"] if form == "gguf" else [])
    copy = Path(shutil.copytree(exports[form], tmp_path / "copy"))
    check_again(again, run, 4, open_store(str(copy)))
    CHANGES[form][damage](copy)
    with pytest.raises(CapstanError, match="It is not what was trained; do not use it"):
        check_again(again, run, 4, open_store(str(copy)))


@pytest.mark.parametrize("damage", TEXTS)
def test_texts_that_llama_cpp_would_read_otherwise_are_refused_whoever_wrote_the_file(
    run: Store, exports: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    config, copy = trained_config(run, read_manifest(run, 4)), Path(shutil.copytree(exports["gguf"], tmp_path / "copy"))
    ours = trained_texts(config, resolve_trained_base(run, config.model, read_manifest(run, 4)).directory)
    _check_texts(model(copy), ours)
    TEXTS[damage](copy)
    with pytest.raises(CapstanError, match="than the run. It is not what was trained; do not use it"):
        _check_texts(model(copy), ours)
