from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from trainer.data.render.chat import Spelling, overlapping

TEXTS = ["the tokens of a text", "naïve café 東京 🎉", "one two  three\n\nfour", "<|end|>", "é"]


def byte_level(**changes: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 5, trainer)
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


BACKEND = byte_level()
SPELLING = Spelling(BACKEND)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TEXTS) | st.text(max_size=12), max_size=6).map(" ".join), st.data())
def test_bytes_find_the_tokens_that_offsets_find(text: str, data: st.DataObject) -> None:
    text = text.encode("utf-8", "ignore").decode()  # a lone surrogate is a bad row
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=4)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    encoding = BACKEND.encode(text)

    by_bytes = SPELLING.overlapping(text, np.array(encoding.ids, np.uint32), spans)

    assert by_bytes is not None
    np.testing.assert_array_equal(by_bytes, overlapping(encoding, spans))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": normalizers.NFC()},
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    ],
)
def test_a_text_that_the_tokenizer_changes_is_not_spelled(changes: dict[str, Any]) -> None:
    backend, text = byte_level(**changes), "Cafe\u0301"

    assert Spelling(backend).overlapping(text, np.array(backend.encode(text).ids, np.uint32), [(0, 4)]) is None


def test_a_special_token_that_takes_white_space_with_it_is_not_spelled() -> None:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|turn|>", lstrip=True, rstrip=True, special=True)])
    text = "one <|turn|> two"

    assert Spelling(backend).overlapping(text, np.array(backend.encode(text).ids, np.uint32), [(0, 3)]) is None


def test_only_a_byte_level_tokenizer_is_usable() -> None:
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<unk>": 2}, unk_token="<unk>"))

    assert SPELLING.usable
    assert not Spelling(byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))).usable
    assert not Spelling(words).usable
