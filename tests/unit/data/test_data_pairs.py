"""Preference rows become pairs: two documents that begin with the same prompt, stay together and never see each
other.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.test_data_chat import CHATML, TAGGED, tokenizer
from tests.unit.data.test_data_compile import build, write
from trainer.config import Config, Data, parse_config
from trainer.data.compile.encode import BatchEncoder
from trainer.data.compile.inputs import find
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import ID_BITS, REJECTED_BIT, TARGET_BIT, Dataset
from trainer.data.look.check import check_data
from trainer.data.order.settings import Order
from trainer.data.order.stream import Stream
from trainer.data.render.answers import AnswersRenderer, Pair, PromptWithAnswers, pairs_of, read_pair
from trainer.data.source.files import expand
from trainer.data.source.reading import EVERYTHING, batches
from trainer.errors import ConfigError, DataError
from trainer.model.micro_batch import Role
from trainer.store.store import open_store

USER, AGAIN = {"role": "user", "content": "hi"}, {"role": "user", "content": "bye"}
YO, BRIEF = {"role": "assistant", "content": "yo yo"}, {"role": "assistant", "content": "be brief"}


def settings(**options: Any) -> Data:
    return Data.model_validate(
        {"train": [{"path": "x.jsonl"}], "format": "preference", "sequence_length": 16} | options
    )


def one(row: dict[str, Any], template: str | None = CHATML, **options: Any) -> Pair:
    (pair,) = AnswersRenderer(tokenizer(template), settings(**options), read_pair, pairs_of).encode([row])
    if isinstance(pair, DataError):
        raise pair
    return pair


def words(pair: PromptWithAnswers) -> list[str]:
    """The documents, trained tokens in capitals."""
    text = []
    for document in pair.answers:
        names = tokenizer().convert_ids_to_tokens(document.tokens.tolist())
        shown = [name.upper() if target else name for name, target in zip(names, document.targets, strict=True)]
        text.append(" ".join(shown).replace("\n", "/"))
    return text


PROMPT = "<|im_start|> user / hi <|im_end|> / <|im_start|> assistant / "
EXPECTED = [f"{PROMPT}YO YO <|IM_END|>", f"{PROMPT}BE BRIEF <|IM_END|>"]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, YO], "rejected": [USER, BRIEF]},
        {"prompt": [USER], "chosen": [YO], "rejected": [BRIEF]},
        {"prompt": "hi", "chosen": [USER, YO], "rejected": [USER, BRIEF]},
        {
            "chosen": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo yo"}],
            "rejected": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "be brief"}],
        },
    ],
    ids=["implied", "given", "repeated", "sharegpt"],
)
def test_messages_share_their_prompt_and_train_the_answers(row: dict[str, Any], template: str) -> None:
    """TAGGED writes fewer line breaks."""
    shown = [text.replace(" /", "") for text in words(one(row, template))]
    assert shown == [text.replace(" /", "") for text in EXPECTED]


@pytest.mark.parametrize(("limit", "left"), [(4, "/ <|im_start|> assistant / "), (9, PROMPT), (100, PROMPT)])
@pytest.mark.parametrize("shares", [False, True])
def test_a_long_prompt_loses_its_beginning_and_no_answer_changes(limit: int, left: str, shares: bool) -> None:
    row = {"chosen": [USER, YO], "rejected": [USER, BRIEF]}
    pair = one(row, prompt_length=limit, share_prefix=shares)
    assert words(pair) == [f"{left}YO YO <|IM_END|> /", f"{left}BE BRIEF <|IM_END|> /"]
    assert pair.shared == (len(left.split()) - 1 if shares else 0)


def test_a_limit_of_prompts_has_no_effect_on_rows_without_two_answers() -> None:
    for format in ("labelled", "chat"):
        with pytest.raises(ValueError, match=f"data.prompt_length: has no effect with data.format: {format}, whose"):
            settings(format=format, prompt_length=4)
    assert settings(prompt_length=4).beyond_targets["prompt_length"] == 4
    assert "prompt_length" not in settings().beyond_targets


def test_an_assistants_turn_of_the_prompt_is_not_trained_and_a_second_turn_of_an_answer_is() -> None:
    pair = one({"chosen": [USER, YO, AGAIN, BRIEF, AGAIN, YO], "rejected": [USER, YO, AGAIN, YO]})
    chosen, rejected = words(pair)
    before = f"{PROMPT}yo yo <|im_end|> / <|im_start|> user / bye <|im_end|> / <|im_start|> assistant / "
    again = "<|im_start|> user / bye <|im_end|> / <|im_start|> assistant / YO YO <|IM_END|> /"
    assert chosen == f"{before}BE BRIEF <|IM_END|> / {again}"
    assert rejected == f"{before}YO YO <|IM_END|> /"


def test_strings_have_a_prompt_and_end_with_the_end_token() -> None:
    row = {"question": "hi ", "chosen": "yo", "rejected": "bye bye"}
    pair = one(row, template=None, fields={"prompt": "question"})
    assert words(pair) == ["hi YO </S>", "hi BYE BYE </S>"]


def test_messages_and_strings_may_stand_in_one_file() -> None:
    rows = [
        {"prompt": "hi ", "chosen": "yo", "rejected": "bye"},
        {"chosen": [USER, YO], "rejected": [USER, BRIEF]},
        {"chosen": 3},
    ]
    found = AnswersRenderer(tokenizer(), settings(), read_pair, pairs_of).encode(rows)
    assert [type(pair) for pair in found] == [Pair, Pair, DataError]
    with pytest.raises(ConfigError, match=r"data\.template: not set"):
        AnswersRenderer(tokenizer(None), settings(), read_pair, pairs_of).encode(rows)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a"}, "no field 'rejected' (the row has: chosen)"),
        ({"prompt": "hi", "chosen": "yo", "rejected": "yo"}, "chosen and rejected are the same"),
        ({"prompt": [USER], "chosen": "yo", "rejected": "bye"}, "the prompt is a list, and not a string"),
        ({"chosen": [USER, YO], "rejected": "bye"}, "rejected: the messages are of type str"),
        ({"chosen": [USER, YO], "rejected": [USER, {"role": "gpt"}]}, "rejected: turn 2 has the role 'gpt'"),
        ({"chosen": [USER, YO], "rejected": [USER]}, "has no message beyond those that both begin with"),
        ({"prompt": "bye", "chosen": [USER, YO], "rejected": [USER, BRIEF]}, "the prompt is a string, and not the"),
        ({"chosen": [YO], "rejected": [BRIEF]}, "chosen: turn 1 is the assistant's"),
        (
            {"chosen": [USER, YO], "rejected": [AGAIN, BRIEF]},
            "the prompt is not the same tokens in chosen (9) and rejected (9)",
        ),
        ({"prompt": "hi", "chosen": " yo", "rejected": "yo"}, "the prompt is not the same tokens in chosen (1) and"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_row_that_is_no_pair_says_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        one(row)
    assert said in str(error.value)


@pytest.mark.parametrize(("chosen", "rejected", "which"), [(YO, BRIEF, "rejected"), (BRIEF, YO, "chosen")])
def test_an_answer_that_the_template_refuses_is_named(
    chosen: dict[str, str], rejected: dict[str, str], which: str
) -> None:
    strict = CHATML + "{% if 'brief' in messages[-1].content %}{{ raise_exception('too short') }}{% endif %}"
    with pytest.raises(DataError, match=f"^{which}: .*too short"):
        one({"chosen": [USER, chosen], "rejected": [USER, rejected]}, strict)


def numbers(begin: int, count: int) -> str:
    return " ".join(str(begin + n) for n in range(count))


def pair(begin: int, prompt: int, chosen: int, rejected: int) -> dict[str, str]:
    """A tokenizer of numbers, each a token; the end token comes behind either answer."""
    return {
        "prompt": numbers(begin, prompt) + " ",
        "chosen": numbers(begin + 10, chosen),
        "rejected": numbers(begin + 20, rejected),
    }


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    rows = [pair(30 * n, 1 + n % 3, 1 + n % 4, 1 + n % 5) for n in range(30)]
    data = settings(train=[{"path": write(tmp_path / "a.jsonl", rows)}])
    return build(open_store(str(tmp_path / "store")), data)


def steps(dataset: Dataset, micro_batch: int, packing: bool = True) -> list[Any]:
    stream = Stream(whole(dataset), Order((1.0,), 16, packing, seed=3), 4, micro_batch, 0, 1, epochs=1)
    return [batch for batches in stream.epoch(0) for batch in batches]


@pytest.mark.parametrize(("micro_batch", "packing"), [(1, True), (3, True), (1, False)])
def test_a_pair_stays_in_one_row_as_two_segments(dataset: Dataset, micro_batch: int, packing: bool) -> None:
    seen, several = [], 0
    for batch in steps(dataset, micro_batch, packing):
        ids, borders = batch.input.input_ids[0].numpy(), batch.input.cu_seqlens.numpy()
        assert len(batch.segments(Role.REJECTED)) == len(batch.documents)
        several += len(batch.segments(Role.REJECTED)) > 1
        for document, second in zip(batch.documents, batch.segments(Role.REJECTED).tolist(), strict=True):
            begin, middle, end = borders[second - 1 : second + 2]
            chosen, rejected = ids[begin:middle].tolist(), ids[middle:end].tolist()
            prompt = 1 + document % 3
            assert chosen[:prompt] == rejected[:prompt] == list(range(30 * document, 30 * document + prompt))
            assert chosen[prompt:-1] == list(range(30 * document + 10, 30 * document + 11 + document % 4))
            assert rejected[prompt:-1] == list(range(30 * document + 20, 30 * document + 21 + document % 5))
            assert chosen[-1] == rejected[-1] == 1000
            assert batch.input.position_ids[0, begin:middle].tolist() == list(range(len(chosen)))
            assert batch.input.position_ids[0, middle:end].tolist() == list(range(len(rejected)))
            for first, tokens in ((begin, chosen), (middle, rejected)):
                expected = [-100] * (prompt - 1) + tokens[prompt:] + [-100]
                assert batch.labels[0, first : first + len(tokens)].tolist() == expected
            seen.append(document)
        assert borders.tolist() == sorted({*borders.tolist()})
        assert borders[-1] == 16 * micro_batch
    assert sorted(seen) == list(range(30))
    assert (several > 0) == (packing or micro_batch > 1)


def test_the_bits_of_a_stored_pair(dataset: Dataset) -> None:
    stored = dataset.read(np.array([0])).gather(np.array([4]))  # a prompt of 2, 1 and 5 words
    assert (stored & ID_BITS).tolist() == [120, 121, 130, 1000, 120, 121, 140, 141, 142, 143, 144, 1000]
    assert np.flatnonzero(stored & REJECTED_BIT).tolist() == [4]
    assert np.flatnonzero(stored & TARGET_BIT).tolist() == [2, 3, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [((2, 8, 9), (8, 8)), ((2, 1, 20), (4, 12)), ((2, 20, 1), (12, 4)), ((2, 5, 6), (8, 8)), ((2, 5, 5), (8, 8))],
    ids=str,
)
def test_a_pair_that_is_too_long_is_cut_as_a_pair(
    tmp_path: Path, lengths: tuple[int, int, int], kept: tuple[int, int]
) -> None:
    """Each side keeps half of the room, and what the other does not need of its own."""
    row = pair(0, *lengths)
    row["rejected"] = numbers(500, lengths[2])
    data = settings(train=[{"path": write(tmp_path / "a.jsonl", [row])}])
    dataset = build(open_store(str(tmp_path / "store")), data)
    stored = dataset.read(np.array([0])).gather(np.array([0]))
    border = int(np.flatnonzero(stored & REJECTED_BIT)[0])
    assert (border, len(stored) - border) == kept
    assert dataset.manifest.counters.truncated == (sum(lengths) + lengths[0] + 2 > 16)


def encoded(tmp_path: Path, rows: list[Any], **options: Any) -> Any:
    from tests.unit.data.test_data_compile import word_tokenizer

    data = settings(train=[{"path": write(tmp_path / "a.jsonl", rows)}], **options)
    (batch,) = batches(expand(data.train, "data.train")[0])
    return BatchEncoder(data, word_tokenizer(), EVERYTHING)(batch)


def test_pairs_that_cannot_teach_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        pair(0, 2, 1, 2),
        pair(0, 2, 0, 2),  # an empty answer
        pair(0, 9, 5, 6),  # the prompt alone fills half of the room
        {"prompt": "1 ", "chosen": numbers(10, 30), "rejected": numbers(10, 31)},  # differ behind the cut
    ]
    result = encoded(tmp_path, rows)
    assert (len(result.lengths), result.counters.without_targets, result.counters.truncated) == (1, 3, 2)
    dropped = encoded(tmp_path, rows, on_too_long="drop")
    assert (len(dropped.lengths), dropped.counters.without_targets, dropped.counters.dropped) == (1, 1, 2)
    too_long = encoded(tmp_path, rows[2:], on_too_long="fail").error
    assert "31 tokens, but data.sequence_length is 16" in too_long
    assert "or set data.on_too_long to truncate or drop." in too_long
    failed = encoded(tmp_path, [rows[0], {"prompt": "1 ", "chosen": "2", "rejected": "2"}])
    assert "a.jsonl:2: chosen and rejected are the same" in failed.error
    skipped = encoded(tmp_path, [rows[0], {"chosen": "2"}], on_bad_row="skip")
    assert (len(skipped.lengths), skipped.counters.bad_rows) == (1, 1)


def test_data_check_names_such_rows(tmp_path: Path) -> None:
    from tests.unit.data.test_data_compile import word_tokenizer

    rows = [pair(0, 2, 1, 2), {"prompt": "1 ", "chosen": "2", "rejected": "2"}, pair(0, 2, 0, 2) | {"score": 1}]
    settings = config(f"data.train=[{{path: {write(tmp_path / 'a.jsonl', rows)}}}]")
    report = check_data(settings, word_tokenizer(), find(settings), print)
    found = report.splits["train"]
    assert (found.rows, found.documents, found.bad_rows, found.without_targets, found.empty_turns) == (3, 2, 1, 1, 1)
    assert "a.jsonl:2: chosen and rejected are the same" in found.bad_row_examples[0]
    assert list(found.unused_fields) == ["score"]
    assert "Correct them, or set data.on_bad_row: skip." in report.refusals[0]


def config(*overrides: str) -> Config:
    run = "run: {name: a}\nmodel: {base: b}\ntrain: {steps: 1}\n"
    return parse_config(run, ("data.train=[{path: a}]", "data.format=preference", *overrides))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.on_too_long=split", "data.on_too_long: split would part a pair"),
        (
            "data.train_on.roles=all",
            "data.train_on.roles: has no effect with data.format: preference. Remove it.",
        ),
        ("data.fields={messages: talk}", "data.fields: 'messages' is not a field of data.format: preference."),
    ],
)
def test_settings_that_no_pair_has_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(override)
    assert said in str(error.value)
    assert json.dumps(str(error.value)).count("\\n") == 0
