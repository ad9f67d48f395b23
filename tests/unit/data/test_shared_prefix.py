"""Answers that share their prompt: each is, with what it sees, the document that it is without sharing, of fewer tokens
in a row.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families import FAMILIES, SIZES
from tests.unit.data.test_data_chat import CHATML, tokenizer
from tests.unit.data.test_data_compile import build, word_tokenizer, write
from tests.unit.data.test_data_pairs import BRIEF, EXPECTED, USER, words
from tests.unit.plan.test_plan import config, plan_of
from trainer.config import Data
from trainer.data.compile.encode import BatchEncoder
from trainer.data.dataset.chapters import whole
from trainer.data.format.known.prompts import ROW_FORMATS
from trainer.data.order.settings import Order
from trainer.data.order.stream import Stream
from trainer.data.render.answers import Alternatives, AnswersRenderer, Pair, alternatives_of, read_alternatives
from trainer.data.render.chat import Example
from trainer.data.source.files import expand
from trainer.data.source.reading import EVERYTHING, batches
from trainer.errors import ConfigError, DataError
from trainer.model.micro_batch import MicroBatch, Role
from trainer.store.store import open_store

LENGTH = 64
LLAMA: dict[str, Any] = {**SIZES, **FAMILIES["llama"]}


def test_several_answers_may_be_to_a_text_or_to_a_conversation() -> None:
    fits = ROW_FORMATS["answers"].fits
    assert fits({"prompt": "why?", "answers": ["so"]})
    assert fits({"prompt": [{"role": "user", "content": "why?"}], "answers": ["so"]})
    assert not any(
        map(fits, ({"prompt": "why?", "answers": []}, {"prompt": 5, "answers": ["so"]}, {"answers": ["so"]}))
    )


def numbers(begin: int, count: int) -> str:
    return " ".join(str((begin + n) % 1000) for n in range(count))


def prompt(row: int) -> str:
    return numbers(30 * row, 4 + row % 3) + " "


ROWS: dict[str, list[dict[str, Any]]] = {
    "answers": [
        {"prompt": prompt(n), "answers": [numbers(500 + 9 * n + a, 1 + (n + a) % 3) for a in range(1 + n % 8)]}
        for n in range(9)
    ],
    "preference": [
        {"prompt": prompt(n), "chosen": numbers(500 + n, 1 + n % 3), "rejected": numbers(700 + n, 1 + n % 4)}
        for n in range(9)
    ],
    "labelled": [
        {"prompt": prompt(n), "completion": numbers(500 + n, 1 + n % 3), "label": n % 2 == 0} for n in range(9)
    ],
}
Seen = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def settings(path: str, format: str, shared: bool, **more: Any) -> Data:
    given = {"train": [{"path": path}], "format": format, "sequence_length": LENGTH, "share_prefix": shared}
    return Data.model_validate(given | more)


def rows_of(folder: Path, format: str, shared: bool) -> list[MicroBatch]:
    data = settings(write(folder / "a.jsonl", ROWS[format]), format, shared)
    dataset = build(open_store(str(folder / f"store-{shared}")), data)
    return [row for rows in Stream(whole(dataset), Order((1.0,), LENGTH, True, 3), 2, 1, 0, 1).epoch(0) for row in rows]


def seen(row: MicroBatch) -> list[Seen]:
    """The ids, positions and labels of each document with what it sees before itself; labels of that count in its own
    document.
    """
    ids, positions, labels = (
        values[0].tolist() for values in (row.input.input_ids, row.input.position_ids, row.labels)
    )
    borders, found = row.input.cu_seqlens.tolist(), list[Seen]()
    for number, (begin, end) in enumerate(zip(borders, borders[1:], strict=False)):
        first, tokens = row.input.segments.prefixes[number] if row.input.segments.prefixes else (0, 0)
        places = [*range(first, first + tokens), *range(begin, end)]
        found.append(tuple(tuple(values[place] for place in places) for values in (ids, positions, labels)))  # type: ignore[arg-type]
    return [one for one in found if max(one[2]) >= 0]


@pytest.mark.parametrize("format", ROWS)
def test_each_answer_is_the_document_that_it_is_without_sharing(tmp_path: Path, format: str) -> None:
    shared, apart = (rows_of(tmp_path, format, value) for value in (True, False))
    documents = sorted(one for row in shared for one in seen(row))
    assert documents == sorted(one for row in apart for one in seen(row))
    assert all(one[1] == tuple(range(len(one[0]))) for one in documents)
    once = sum(tokens for row in shared for _, tokens in row.input.segments.prefixes)
    assert once > 0
    assert sum(row.tokens for row in shared) == sum(row.tokens for row in apart) - once
    assert sum(row.targets for row in shared) == sum(row.targets for row in apart)
    for role in (Role.REJECTED, Role.MISMATCHED):
        assert len({sum(len(row.segments(role)) for row in rows) for rows in (shared, apart)}) == 1
    # The parts of a row that KTO looks at by themselves have their prompts before them.
    for row in shared:
        part = row.part(Role.MISMATCHED)
        if len(row.segments(Role.MISMATCHED)):
            assert sum(part.lengths) == part.input.input_ids.shape[1]
            assert part.input.position_ids[0].tolist() == [place for length in part.lengths for place in range(length)]


@pytest.mark.parametrize(
    ("shared", "rows"), [(2, [["2"], ["3", "1"], ["5"]]), (0, [["2"], ["3"], ["1"], ["5"]])], ids=["shared", "alone"]
)
def test_a_row_takes_answers_to_its_last_token(shared: int, rows: list[list[str]]) -> None:
    """A prompt of 3 tokens, of which the last stays with each answer: 2 + (1 + 3) + (1 + 1) are the 8 of a row."""
    sizes = {str(size): 3 + size for size in (2, 3, 1, 5)}
    answers = [Example(np.arange(size, dtype=np.uint32), np.arange(size) >= 3, [name]) for name, size in sizes.items()]
    pieces = Alternatives(answers, shared).pieces(8)
    assert [list(piece.left_out) for piece in pieces] == rows
    assert [len(piece.tokens) for piece in pieces] == ([5, 8, 8] if shared else [5, 6, 4, 8])


@pytest.mark.parametrize(("shared", "lengths"), [(True, [7 + 2 * 3] * 4), (False, [8 + 2] * 8)])
def test_answers_that_do_not_fit_into_one_row_begin_another_one(
    tmp_path: Path, shared: bool, lengths: list[int]
) -> None:
    """Eight answers to a prompt of 8 tokens, of which seven are shared: the last one, an answer and the end are three
    more for each.
    """
    rows = [{"prompt": numbers(0, 8) + " ", "answers": [str(100 + n) for n in range(8)]}]
    data = settings(write(tmp_path / "a.jsonl", rows), "answers", shared, sequence_length=14)
    (batch,) = batches(expand(data.train, "data.train")[0])
    encoded = BatchEncoder(data, word_tokenizer(), EVERYTHING)(batch)
    assert encoded.lengths.tolist() == lengths
    assert encoded.counters.truncated == 0


@pytest.mark.parametrize(
    ("shared", "own", "left"),
    [
        (3, (9, 3), (7, 3)), (3, (3, 9), (3, 7)), (3, (9, 9), (5, 5)), (3, (2, 3), (2, 3)), (0, (9, 3), (9, 3)),
        (0, (12, 3), (10, 3)), (13, (4, 4), (0, 0)),
    ],
)  # fmt: skip
def test_an_answer_of_a_pair_gets_the_room_that_the_other_one_leaves(
    shared: int, own: tuple[int, int], left: tuple[int, int]
) -> None:
    """A row of 13 tokens, of which `shared` are the prompt's."""
    answers = [Example(np.arange(shared + n, dtype=np.uint32), np.arange(shared + n) >= shared) for n in own]
    found = Pair(answers, shared).cut(13)
    assert tuple(len(answer.tokens) - shared for answer in found.answers) == left
    assert len(found.tokens) == shared + sum(left) <= 13


@pytest.mark.parametrize("format", ["preference", "labelled", "answers"])
def test_a_prompt_that_is_longer_than_a_row_leaves_nothing_to_train(tmp_path: Path, format: str) -> None:
    answers = {"chosen": "600", "rejected": "700", "completion": "600", "label": True, "answers": ["600", "700"]}
    rows = [{"prompt": numbers(0, 20) + " ", **{name: answers[name] for name in ROWS[format][0] if name != "prompt"}}]
    data = settings(write(tmp_path / "a.jsonl", rows), format, True, sequence_length=14)
    (batch,) = batches(expand(data.train, "data.train")[0])
    encoded = BatchEncoder(data, word_tokenizer(), EVERYTHING)(batch)
    assert encoded.lengths.tolist() == []
    assert (encoded.counters.truncated, encoded.counters.without_targets) == (1, 1)


@pytest.mark.parametrize("shared", [False, True])
def test_answers_to_a_conversation_are_texts_or_messages(shared: bool) -> None:
    row = {"prompt": [USER], "answers": ["yo yo", [BRIEF]]}
    data = settings("x.jsonl", "answers", shared)
    renderer = AnswersRenderer(tokenizer(CHATML), data, read_alternatives, alternatives_of)
    (found,) = renderer.encode([row])
    assert isinstance(found, Alternatives)
    assert [text.removesuffix(" /") for text in words(found)] == EXPECTED
    assert found.shared == (len(EXPECTED[0].split()) - 4 if shared else 0)
    assert [(turn.role, turn.content) for turn in renderer.turns(row)] == [
        ("user", "hi"), ("assistant", "yo yo"), ("assistant", "be brief"),
    ]  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_a_prompt_is_never_trained_and_without_an_answer_nothing_is(shared: bool) -> None:
    def found(row: dict[str, Any]) -> Alternatives:
        made = AnswersRenderer(
            tokenizer(CHATML), settings("x.jsonl", "answers", shared), read_alternatives, alternatives_of
        )
        (one,) = made.encode([row])
        assert isinstance(one, Alternatives)
        return one

    plain, asked = (found({"prompt": [said], "answers": ["yo", "yo yo"]}) for said in (USER, {**USER, "train": True}))
    assert asked.targets.tolist() == plain.targets.tolist()
    silent = AnswersRenderer(
        word_tokenizer(), settings("x.jsonl", "answers", shared), read_alternatives, alternatives_of
    )
    (none,) = silent.encode([{"prompt": "1 ", "answers": ["", ""]}])
    assert isinstance(none, Alternatives)
    assert not none.teaches
    assert none.longest == len(none.answers[0].tokens)
    (some,) = silent.encode([{"prompt": "1 ", "answers": ["2", "", "3"]}])
    assert isinstance(some, Alternatives), some
    assert [answer.teaches for answer in some.answers] == [True, True], "an empty answer takes no room"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "1 ", "answers": []}, "answers: this is no list with at least one answer"),
        ({"prompt": "1 ", "answers": "2"}, "answers: this is no list with at least one answer"),
        ({"prompt": [USER], "answers": ["yo", "no"]}, "answer 2: the chat template refuses the conversation: no"),
        ({"prompt": "1", "answers": [" 2", "3"]}, "the prompt is not the same tokens before answer 2 and before the first"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_told_apart_are_a_bad_row(row: dict[str, Any], reason: str) -> None:
    strict = "{% if messages[-1].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    made = tokenizer(strict) if isinstance(row["prompt"], list) else word_tokenizer()
    renderer = AnswersRenderer(made, settings("x.jsonl", "answers", True), read_alternatives, alternatives_of)
    (found,) = renderer.encode([row])
    assert isinstance(found, DataError)
    assert str(found).startswith(reason)


def test_what_cannot_share_a_prompt_is_refused_by_a_sentence() -> None:
    def wrong(base: dict[str, Any], *more: str) -> list[str]:
        given = ("data.share_prefix=true", "data.format=preference", "objective.name=dpo", "data.sequence_length=64")
        return plan_of(config(*given, *more), base, 1, 1, None).shortfalls

    assert wrong(LLAMA) == wrong(LLAMA, "model.attention=flex_attention") == []
    (mamba,) = wrong({**SIZES, **FAMILIES["nemotron-h"]})
    assert mamba.startswith("data.share_prefix: answers cannot share a prompt with this base, as its NemotronHMamba2")
    (kernel,) = wrong(LLAMA, "model.attention=varlen")
    assert "varlen cannot run with data.share_prefix: it only knows where documents begin and end" in kernel
    (virtual,) = wrong(LLAMA, "tuning.method=prompt")
    assert "data.share_prefix: tuning.method: prompt has virtual tokens before each answer" in virtual
    with pytest.raises(ConfigError, match=r"data.share_prefix: has no effect with data.format: chat"):
        config("data.share_prefix=true", "data.format=chat")
    with pytest.raises(
        ConfigError, match=r"with data.format: preference_pictures, where each answer has the tokens of"
    ):
        config("data.share_prefix=true", "data.format=preference_pictures", "objective.name=dpo")
