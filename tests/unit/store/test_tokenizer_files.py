"""Only the names of a tokenizer's files may come out of a store, as they are written into a reader's folders."""

import pytest

from trainer.store.tokenizer_files import is_tokenizer_file

TEMPLATES = "additional_chat_templates"


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        f"{TEMPLATES}/tool_use.jinja",
        f"{TEMPLATES}/{'x' * 200}.jinja",
    ],
)
def test_what_decides_what_a_tokenizer_does_is_one_of_its_files(name: str) -> None:
    assert is_tokenizer_file(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "../tokenizer.json",
        TEMPLATES,
        f"{TEMPLATES}/.jinja",
        f"{TEMPLATES}/../../tool_use.jinja",
        f"{TEMPLATES}/a/b.jinja",
        f"{TEMPLATES}/a\\b.jinja",
        f"{TEMPLATES}/a\nb.jinja",
        f"{TEMPLATES}/tool_use.jinja.sh",
        f"{TEMPLATES}/{'x' * 201}.jinja",
        f"more/{TEMPLATES}/tool_use.jinja",
    ],
    ids=repr,
)
def test_no_other_name_is(name: str) -> None:
    assert not is_tokenizer_file(name)
