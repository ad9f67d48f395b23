"""The name of a compiled data set: all that decides a token is in it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.material import make_base
from tests.unit.data.test_data_compile import settings, texts, word_tokenizer, write
from trainer.config import Data, Model
from trainer.data.compile.fingerprint import fingerprint, hash_tokenizer, hash_tokens
from trainer.data.compile.prepare import Datasets
from trainer.data.format.formats import explicit_form
from trainer.data.render.text_files import RunText, keep_text, kept_text, run_text
from trainer.data.source.files import SourceFile, Take, expand
from trainer.data.source.reading import Part
from trainer.errors import Damaged, NotFound
from trainer.run import layout
from trainer.store.store import open_store


def test_the_fingerprint_covers_all_that_decides_a_token(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts(0, 5))
    (tmp_path / "t.jinja").write_text("{{ messages }}")

    def of(data: Data, tokenizer: dict[str, str] | None = None) -> str:
        return fingerprint(data, expand(data.train, "data.train"), tokenizer or {"tokenizer.json": "00"})

    data = settings(path)
    chat = settings(path, format="chat")
    base = of(data)
    assert base == of(data) == of(settings(path, packing=False, train_on={"roles": "all"}))
    assert len(base) == 20
    others = [
        of(data, {"tokenizer.json": "01"}),
        of(settings(path, sequence_length=32)),
        of(settings(path, on_too_long="drop")),
        of(settings(path, path)),
        of(settings(path, fields={"text": "body"})),
        of(chat),
        of(settings(path, format="chat", train_on={"roles": "all"})),
        of(settings(path, format="chat", template=str(tmp_path / "t.jinja"))),
        of(settings(path, format="chat", system="be brief")),
        of(settings(path, format="chat", train_on={"end": "last"})),
        of(settings(path, format="chat", train_on={"end": False})),
        of(settings(path, format="chat", train_on={"frame": True})),
        of(settings(path, format="segments")),
        of(settings(path, format="segments", tokenize_apart=True)),
    ]
    write(tmp_path / "a.jsonl", texts(1, 5))
    others.append(of(data))
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("format", "changed"),
    [
        ("text", {"min_length": 2}),
        ("text", {"on_bad_row": "skip"}),
        ("chat", {"drop_system": True}),
        ("chat", {"thinking": "strip"}),
        ("chat", {"thinking": "keep"}),
        ("chat", {"train_on": {"thinking": False}}),
        ("chat", {"train_on": {"turns": "last"}}),
        ("chat", {"train_on": {"roles": ["user"]}}),
        ("classified", {"labels": ["b", "a"]}),
        ("preference", {"share_prefix": True}),
        ("preference", {"prompt_length": 8}),
    ],
    ids=str,
)
def test_each_setting_that_changes_documents_changes_it(format: str, changed: dict[str, Any]) -> None:
    def of(**options: Any) -> str:
        files = [SourceFile("/data/a.jsonl", open_store("memory://"), "a.jsonl", 9, "v1", 0)]
        return fingerprint(settings("a.jsonl", format=format, **options), files, {"tokenizer.json": "00"})

    assert of(**changed) != of(**({"labels": ["a", "b"]} if format == "classified" else {}))


def test_what_is_trained_of_sources_in_several_formats_changes_it() -> None:
    forms = [explicit_form(settings("a.jsonl", format=format)) for format in ("chat", "text")]
    files = [
        SourceFile("/data/a.jsonl", open_store("memory://"), "a.jsonl", 9, "v1", source, form=form)
        for source, form in enumerate(forms)
    ]
    ways: list[dict[str, Any]] = [{}, {"train_on": {"roles": "all"}}, {"train_on": {"turns": "last"}}]
    made = {fingerprint(settings("a.jsonl", format="auto", **way), files, {"tokenizer.json": "00"}) for way in ways}
    assert len(made) == len(ways)


def test_the_rows_that_are_taken_of_a_source_change_it() -> None:
    def of(take: Take | None) -> str:
        file = SourceFile("/data/a.jsonl", open_store("memory://"), "a.jsonl", 9, "v1", 0, take=take)
        return fingerprint(settings("a.jsonl"), [file], {"tokenizer.json": "00"})

    given = ((5, None, 0), (6, None, 0), (5, 1, 0), (5, 2, 0), (5, None, 2), (5, 1, 2))
    ways = [None, *(Take(amount, seed, (), skip) for amount, seed, skip in given)]
    assert len({of(take) for take in ways}) == len(ways)


def test_the_fingerprint_of_data_is_that_of_earlier_versions() -> None:
    files = [SourceFile("/data/a.jsonl", open_store("memory://"), "a.jsonl", 9, "v1", 0)]
    chat, text = (settings("a.jsonl", **options) for options in ({"format": "chat", "sequence_length": 2048}, {}))
    hashes = {"tokenizer.json": "00"}
    assert fingerprint(chat, files, hashes) == "ce8581df7048cb9c53f2"
    assert fingerprint(text, files, hashes, Part(0.1, 4, held_out=True)) == "e1802d60f397cd5de223"
    assert fingerprint(chat, files, hashes, Part(0)) == "ce8581df7048cb9c53f2"


def test_hash_tokenizer_covers_the_files_that_are_there(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("not the tokenizer's")
    hashes = hash_tokenizer(tmp_path)
    assert set(hashes) == {"tokenizer.json", "tokenizer_config.json"}
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert hash_tokenizer(tmp_path)["tokenizer_config.json"] != hashes["tokenizer_config.json"]


def test_the_class_of_a_tokenizer_counts_where_the_base_decides_it(tmp_path: Path) -> None:
    """The same files are read by Qwen2's own class in a base of that type, which has a token more."""
    hashes, sizes, files = dict[str, dict[str, str]](), dict[str, int](), set[bytes]()
    for kind in ("llama", "gemma2", "qwen2"):
        base = make_base(tmp_path / kind, kind)
        hashes[kind] = hash_tokens(base, Model(base=str(base)))
        sizes[kind] = len(AutoTokenizer.from_pretrained(base))
        files |= {b"".join((base / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json"))}
    assert len(files) == 1
    assert hashes["llama"] == hashes["gemma2"] == hash_tokenizer(tmp_path / "llama")
    assert hashes["qwen2"] == {**hashes["llama"], "class": "Qwen2Tokenizer"}
    assert sizes["llama"] == sizes["gemma2"] == sizes["qwen2"] - 1

    settings = json.loads((tmp_path / "qwen2/tokenizer_config.json").read_text())
    (tmp_path / "qwen2/tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "Qwen2TokenizerFast"})
    )
    assert "class" not in hash_tokens(tmp_path / "qwen2", Model(base=str(tmp_path / "qwen2"))), (
        "it names the class itself"
    )
    del settings["tokenizer_class"]
    (tmp_path / "llama/tokenizer_config.json").write_text(json.dumps(settings))
    assert hash_tokens(tmp_path / "llama", Model(base=str(tmp_path / "llama")))["class"] == "llama"


def test_a_text_that_the_run_keeps_is_read_back_or_damaged(tmp_path: Path) -> None:
    folder = open_store(str(tmp_path))
    text = RunText({"tokenizer.json": b"{}", "vocab.txt": b"a"}, "{{ messages }}")
    keep_text(folder, text)
    keep_text(folder, text)  # what is there already is not written again
    assert len(folder.list(layout.TEXT)) == 3
    assert kept_text(folder, text.hashes) == text
    assert kept_text(folder, replace(text.hashes, template=None)) == replace(text, template=None)
    key = layout.kept_text(text.hashes.tokenizer["vocab.txt"])
    folder.put(key, b"b")
    with pytest.raises(Damaged, match=f"{key} is damaged: its content does not match its name"):
        kept_text(folder, text.hashes)
    folder.delete(key)
    with pytest.raises(NotFound):
        kept_text(folder, text.hashes)


def test_the_text_of_a_run_has_the_template_of_its_settings(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for template in ("{{ messages }}", None):
        data = Data.model_validate({"train": [{"path": "a"}], "template": template})
        assert run_text(data, tmp_path) == RunText({"tokenizer.json": b"{}"}, template)


def test_the_data_that_decides_is_that_of_data_eval_or_the_first_set() -> None:
    assert Datasets("train", None).evaluated is None
    assert Datasets("train", None, sets={"a": "x", "b": "y"}).evaluated == "x"
    assert Datasets("train", "z", sets={"a": "x"}).evaluated == "z"
