"""The uses of tokens that a run names hold for its data, and stand in its exports."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer

from tests.material import byte_tokenizer
from trainer.base.find.tokenizer import find_rows, read_tokenizer, tokenizer_files
from trainer.config import Model, parse_config
from trainer.config.model import Tokens
from trainer.data.compile.fingerprint import hash_tokenizer
from trainer.errors import ConfigError
from trainer.export.proof.rendering import Texts, _problems
from trainer.export.write.merged import complete_model
from trainer.store.store import open_store


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("special")
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    return folder


def model(base: Path, **given: object) -> Model:
    return Model.model_validate({"base": str(base), **given})


def test_named_uses_are_those_of_the_tokenizer_and_of_its_export(base: Path, tmp_path: Path) -> None:
    given = model(base, add_tokens=["<end>"], special_tokens={"eos": "<end>", "pad": "<s>"})
    own = read_tokenizer(base, "base", given.tokens)
    assert (own.eos_token, own.pad_token) == ("<end>", "<s>")
    for name, content in tokenizer_files(base, given, None).items():
        (tmp_path / name).write_bytes(content)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert (exported.eos_token_id, exported.pad_token_id) == (own.eos_token_id, own.pad_token_id)
    assert list(_problems(Texts(own), Texts(exported), [own.encode("a b <end> c</s>")])) == []
    config = parse_config("run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 1}")
    store, of_base = open_store(str(tmp_path / "merged")), SimpleNamespace(directory=base)
    whole: Any = of_base
    complete_model(whole, config.model_copy(update={"model": given}), store, b'{"eos_token_id": 1, "x": 2}')
    assert json.loads(store.get("config.json")) == {
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
        "x": 2,
    }


def test_data_of_other_uses_has_another_name(base: Path) -> None:
    plain, ended = hash_tokenizer(base), hash_tokenizer(base, model(base, special_tokens={"eos": "<s>"}).tokens)
    assert plain == hash_tokenizer(base, Tokens()) != ended


def test_a_text_that_is_no_token_is_refused(base: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.special_tokens\.eos: '<nothing>' is no token of the tokenizer of base\. Name one"
    ):
        read_tokenizer(base, "base", model(base, special_tokens={"eos": "<nothing>"}).tokens)
    with pytest.raises(
        ConfigError, match=r"pad: 'a' is a token that words are made of, .* Name one of <pad>, <s>, </s>"
    ):
        read_tokenizer(base, "base", model(base, special_tokens={"pad": "a"}).tokens)


def test_a_special_token_is_found_in_texts_as_before(base: Path, tmp_path: Path) -> None:
    own = byte_tokenizer()
    own.add_tokens([AddedToken("<eot>", rstrip=True, normalized=False)])
    own.save_pretrained(tmp_path)
    changed = read_tokenizer(tmp_path, "base", Tokens(special=(("eos", "<eot>"),)))
    assert changed.encode("a <eot> b") == own.encode("a <eot> b")
    assert changed.decode(changed.encode("a<eot>"), skip_special_tokens=True) == "a"


def test_an_added_token_learns_in_its_row_and_begins_as_the_tokens_that_its_text_was(tmp_path: Path) -> None:
    """Without the token that begins a text; one that is there already begins as itself."""
    own = byte_tokenizer()
    begun = len(own)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.convert_tokens_to_ids("<s>"))]
    )
    own.save_pretrained(tmp_path)
    assert find_rows(model(tmp_path)) == []
    rows = find_rows(model(tmp_path, add_tokens=["<end>", "</s>", "ab"]))
    there = own.convert_tokens_to_ids("</s>")
    assert [row for row, _ in rows] == [begun, there, begun + 1]
    assert [pieces for _, pieces in rows] == [
        own.encode("<end>", add_special_tokens=False),
        [there],
        own.encode("ab", add_special_tokens=False),
    ]


def test_an_added_token_is_found_by_its_own_letters_where_other_texts_are_lowered(tmp_path: Path) -> None:
    own = byte_tokenizer()
    own.backend_tokenizer.normalizer = normalizers.Lowercase()
    own.save_pretrained(tmp_path)
    added = model(tmp_path, add_tokens=["<END>", "A"])
    (new, pieces), (known, itself) = find_rows(added)
    assert pieces == own.encode("<end>")
    assert (known, itself) == (own.convert_tokens_to_ids("A"), [known]), "a token that is there begins as itself"
    tokens = read_tokenizer(tmp_path, "base", added.tokens)
    assert tokens.encode("b<END>") == [*own.encode("b"), new]
    assert new not in tokens.encode("b<end>")


def test_a_text_of_which_the_tokenizer_makes_no_token_cannot_be_one(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.encode", lambda *_, **__: [])
    with pytest.raises(
        ConfigError, match=r"^model\.add_tokens: the tokenizer of .* makes no token of '<end>'\. Remove"
    ):
        find_rows(model(base, add_tokens=["<end>"]))


def test_a_template_of_the_run_stands_alone_in_each_of_its_places(base: Path, tmp_path: Path) -> None:
    """Old programs read it among the settings. Those of calls of tools would be taken before it."""
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("the base's")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of old"}')
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("of tools")
    whole = tokenizer_files(tmp_path, model(tmp_path), None)
    assert whole["additional_chat_templates/tool_use.jinja"] == b"of tools"
    found = tokenizer_files(tmp_path, model(tmp_path), "ours: \u00e9")
    assert {name for name in found if "template" in name} == {"chat_template.jinja"}
    assert found["chat_template.jinja"].decode() == "ours: \u00e9"
    before, settings = (json.loads(files["tokenizer_config.json"]) for files in (whole, found))
    assert settings == {**before, "chat_template": "ours: \u00e9"}
    assert '\n  "chat_template": "ours: \u00e9"' in found["tokenizer_config.json"].decode()  # for people, too
    assert {name: content for name, content in found.items() if "_" not in name}.items() <= whole.items()
