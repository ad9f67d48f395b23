"""Texts, prompts and completions as tokens, and tokenizers that cannot make them."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.material import byte_tokenizer
from tests.unit.data.test_data_chat import CHATML, Renderer, data, tokenizer, trained
from trainer.data.format.formats import detect
from trainer.data.render.chat import Example
from trainer.errors import ConfigError, DataError


def test_prompt_completion_trains_the_completion_and_the_end() -> None:
    row = {"prompt": "hi ", "completion": "yo yo"}
    example = Renderer(tokenizer(), data(format="prompt_completion")).one(row)
    assert trained(example) == ["yo", "yo", "</s>"]
    example = Renderer(tokenizer(), data(format="prompt_completion", train_on={"roles": "all"})).one(row)
    assert tokenizer().convert_ids_to_tokens(example.tokens.tolist()) == ["hi", "yo", "yo", "</s>"]
    assert example.targets.tolist() == [False, True, True, True]


def test_segments_are_one_text_of_which_some_are_trained_and_nothing_is_added() -> None:
    parts = [("hi ", False), ("yo", True), (" hi ", False), ("yo</s>", True)]
    row = {"segments": [{"text": text, "label": label} for text, label in parts]}
    words = tokenizer(adds_bos=True)
    renderer = Renderer(words, data(format="segments"))
    example = renderer.one(row)
    assert words.convert_ids_to_tokens(example.tokens.tolist()) == ["hi", "yo", "hi", "yo", "</s>"]
    assert example.targets.tolist() == [False, True, False, True, True]
    assert [turn.role for turn in renderer.turns(row)] == ["user", "assistant", "user", "assistant"]
    with pytest.raises(DataError, match="segment 1 is no object with text and label, which is true where"):
        renderer.render({"segments": [{"text": "a", "label": 1}]})
    for none in ([], "a"):
        with pytest.raises(DataError, match="the segments are no list with at least one segment"):
            renderer.render({"segments": none})
    assert str(detect([row], {}, ["chat"])) == "segments (segments)"


def test_a_row_that_has_several_formats_has_the_one_that_is_tried_first() -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    row |= {"instruction": "hi", "output": "yo", "text": "hi yo", "question": "hi", "answer": "yo"}
    found = list[str]()
    while row and (form := detect([row], {}, ["chat", "text"])):
        found.append(form.format)
        del row[form.names[next(iter(form.names))]]
    assert found == ["chat", "alpaca", "question_answer", "text"]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_nothing_to_say_is_not_trained(adds_bos: bool) -> None:
    words = tokenizer(adds_bos=adds_bos)
    answer = Renderer(words, data(format="prompt_completion")).one({"prompt": "hi", "completion": ""})
    assert not any(answer.targets)
    assert not any(Renderer(words, data(format="text")).one({"text": ""}).targets)


def test_a_token_across_the_border_and_every_byte_of_a_character_are_trained() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hi yo hi yo"], trainer)
    bpe = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    renderer = Renderer(bpe, data(format="prompt_completion"))
    example = renderer.one({"prompt": "hi ", "completion": "yo"})
    assert bpe.convert_ids_to_tokens(example.tokens.tolist()) == ["hi", "Ġyo", "</s>"]
    assert example.targets.tolist() == [False, True, True]
    example = renderer.one({"prompt": "hi", "completion": "🙂"})
    assert example.targets.tolist() == [False] + [True] * 5
    # Text that the tokenizer rewrites is not found by its bytes: three characters become two tokens of two bytes each.
    bpe.backend_tokenizer.normalizer = normalizers.NFC()
    example = Renderer(bpe, data(format="prompt_completion")).one({"prompt": "e\u0301", "completion": "e\u0301"})
    assert len(example.tokens) == 5
    assert example.targets.tolist() == [False, False, True, True, True]
    # White space is text, also where a tokenizer leaves it out of its offsets.
    bpe.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for prompt in ("e\u0301", "\u00e9"):
        example = Renderer(bpe, data(format="prompt_completion")).one({"prompt": prompt, "completion": "  yo"})
        assert example.targets.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("adds_bos", "text", "expected"),
    [
        (False, "hi yo", ["hi", "yo", "</s>"]),
        (True, "hi yo", ["<s>", "hi", "yo", "</s>"]),
        (True, "<s>hi yo</s>", ["<s>", "hi", "yo", "</s>"]),
    ],
)
def test_text_is_framed_once(adds_bos: bool, text: str, expected: list[str]) -> None:
    example = Renderer(tokenizer(adds_bos=adds_bos), data(format="text")).one({"text": text})
    assert tokenizer().convert_ids_to_tokens(example.tokens.tolist()) == expected
    assert example.targets.tolist() == [False] + [True] * (len(expected) - 1)


def test_texts_stay_whole_whatever_length_a_tokenizer_was_made_for() -> None:
    """A tokenizer.json may ask to cut and to pad each text: sentence-transformers' do."""
    made = tokenizer()
    made.backend_tokenizer.enable_truncation(2)
    made.backend_tokenizer.enable_padding(length=9)
    for example in Renderer(made, data(format="text")).encode([{"text": "hi yo bye"}, {"text": "hi"}]):
        assert isinstance(example, Example)
        words = made.convert_ids_to_tokens(example.tokens.tolist())
        assert words in (["hi", "yo", "bye", "</s>"], ["hi", "</s>"])


@pytest.mark.parametrize(
    ("format_", "row"), [("text", {"text": "hi yo"}), ("prompt_completion", {"prompt": "hi ", "completion": "yo"})]
)
def test_the_end_of_a_text_is_there_and_not_trained_if_that_is_asked_for(format_: str, row: dict[str, Any]) -> None:
    example = Renderer(tokenizer(), data(format=format_, train_on={"end": False})).one(row)
    assert tokenizer().convert_ids_to_tokens(example.tokens.tolist()) == ["hi", "yo", "</s>"]
    assert example.targets.tolist() == [False, True, False]


def damaged_tokenizer(**parts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes whose tokenizer.json has other `parts`: transformers loads it all the same."""
    whole = json.loads(byte_tokenizer().backend_tokenizer.to_str()) | parts
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token="</s>")
    made.chat_template = CHATML
    return made


UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0], *([letter, -1.0] for letter in "onetw hia")]}


@pytest.mark.parametrize("format_", ["chat", "text"])
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            {"model": {"type": "WordLevel", "vocab": {"</s>": 0, "hi": 1}, "unk_token": "[UNK]"}},
            r"Missing \[UNK\] token",
        ),
        ({"model": UNIGRAM | {"vocab": UNIGRAM["vocab"][:3]}, "pre_tokenizer": None}, "`unk_id` is missing"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}}, "index out of bounds"),
    ],
)
def test_a_tokenizer_that_loads_and_cannot_encode_is_refused(parts: dict[str, Any], reason: str, format_: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.base: the tokenizer of .* cannot be read \(.*{reason}.*\)\. Copy"):
        Renderer(damaged_tokenizer(**parts), data(format=format_))


def test_a_text_that_the_tokenizer_has_no_tokens_for_is_a_bad_row_and_a_panic_ends_it_all() -> None:
    renderer = Renderer(damaged_tokenizer(model=UNIGRAM, pre_tokenizer=None), data(format="text"))
    first, bad, last = renderer.encode([{"text": "hi"}, {"text": "hi yo"}, {"text": "hihi"}])
    assert (type(first), type(last)) == (Example, Example)
    assert "the tokenizer cannot encode it (" in str(bad)
    apart = Renderer(renderer._tokenizer, data(format="prompt_completion", tokenize_apart=True))
    rows = [{"prompt": "hi", "completion": text} for text in ("hi", "hi yo", 1, "hihi")]
    whole, bad, wrong, other = apart.encode(rows)
    assert isinstance(whole, Example)
    assert isinstance(other, Example)
    assert len(whole.tokens) < len(other.tokens)
    assert "the tokenizer cannot encode it (" in str(bad)
    assert "completion" in str(wrong)
    renderer._backend.normalizer = normalizers.Precompiled(bytes(4))
    with pytest.raises(ConfigError, match="the tokenizer of .* cannot be read"):
        renderer.encode([{"text": "hi"}])


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(ConfigError, match=r"model\.base: its tokenizer is not a fast one"):
        Renderer(slow, data(format="text"))


def test_text_without_an_end_token_is_a_configuration_error() -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        Renderer(endless, data(format="text"))
