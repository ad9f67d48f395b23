"""The uses of tokens that a run names hold for its data, and stand in its exports."""

import json
from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer

from tests.material import byte_tokenizer
from trainer.base.find.tokenizer import read_tokenizer, tokenizer_files, with_special_tokens
from trainer.config import Model
from trainer.config.model import Tokens
from trainer.data.compile.fingerprint import hash_tokenizer
from trainer.errors import ConfigError
from trainer.export.proof.rendering import Texts, _problems


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
    told = json.loads(with_special_tokens(b'{"eos_token_id": 1, "x": 2}', base, given))
    assert told == {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id, "x": 2}


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
