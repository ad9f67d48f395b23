"""Labelled rows become an answer with its label, and behind it, in the same document, a mismatched one that it never
sees.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.test_data_chat import CHATML, tokenizer
from tests.unit.data.test_data_compile import build, word_tokenizer, write
from tests.unit.data.test_data_pairs import AGAIN, BRIEF, USER, YO, numbers
from trainer.config import Data
from trainer.data.compile.encode import BatchEncoder
from trainer.data.compile.inputs import find
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import DESIRED_BIT, ID_BITS, MISMATCHED_BIT, TARGET_BIT, Dataset
from trainer.data.format.formats import detect
from trainer.data.look.check import check_data
from trainer.data.order.settings import Order
from trainer.data.order.stream import Stream
from trainer.data.render.answers import AnswersRenderer, Labelled, labelled_of, read_labelled
from trainer.data.source.files import expand
from trainer.data.source.reading import EVERYTHING, batches
from trainer.errors import DataError
from trainer.model.micro_batch import Role
from trainer.store.store import open_store


def settings(**options: Any) -> Data:
    return Data.model_validate({"train": [{"path": "x.jsonl"}], "format": "labelled", "sequence_length": 32} | options)


def rendered(*rows: dict[str, Any], template: str | None = CHATML, **options: Any) -> list[Labelled]:
    found = AnswersRenderer(tokenizer(template), settings(**options), read_labelled, labelled_of).encode(rows)
    for answer in found:
        if isinstance(answer, DataError):
            raise answer
    return [answer for answer in found if isinstance(answer, Labelled)]


def words(labelled: Labelled) -> list[str]:
    """The answer and the mismatched one, trained tokens in capitals."""
    text = []
    for document in labelled.answers:
        names = tokenizer().convert_ids_to_tokens(document.tokens.tolist())
        shown = [name.upper() if target else name for name, target in zip(names, document.targets, strict=True)]
        text.append(" ".join(shown).replace("\n", "/"))
    return text


def test_messages_train_the_completion_and_are_mismatched_with_the_row_before() -> None:
    rows = (
        {"prompt": [USER], "completion": [YO], "label": True},
        {"prompt": [USER, YO, AGAIN], "completion": [BRIEF], "label": False},
    )
    first, second = rendered(*rows)
    assert [bool(one.stored()[0] & DESIRED_BIT) for one in (first, second)] == [True, False]
    hi = "<|im_start|> user / hi <|im_end|> / <|im_start|> assistant / "
    bye = f"{hi}yo yo <|im_end|> / <|im_start|> user / bye <|im_end|> / <|im_start|> assistant / "
    assert [text.removesuffix(" /") for text in words(first)] == [f"{hi}YO YO <|IM_END|>", f"{hi}BE BRIEF <|IM_END|>"]
    cut = words(second)
    assert cut[0].removesuffix(" /") == f"{bye}BE BRIEF <|IM_END|>"
    assert len(cut) == 1, "32 tokens hold no second answer behind 22"
    assert words(rendered(*rows, sequence_length=64)[1])[1].removesuffix(" /") == f"{bye}YO YO <|IM_END|>"


def test_strings_end_with_the_end_token_and_fields_may_have_other_names() -> None:
    rows = [
        {"question": "hi ", "completion": "yo", "good": True},
        {"question": "bye ", "completion": "be brief", "good": False},
    ]
    first, second = rendered(*rows, template=None, fields={"prompt": "question", "label": "good"})
    assert words(first) == ["hi YO </S>", "hi BE BRIEF </S>"]
    assert words(second) == ["bye BE BRIEF </S>", "bye YO </S>"]


def test_an_answer_is_mismatched_with_one_to_another_prompt_where_there_is_one() -> None:
    same = [{"prompt": "hi ", "completion": text, "label": True} for text in ("yo", "be", "brief")]
    other = {"prompt": "bye ", "completion": "yo yo", "label": False}
    *_, last, _ = rendered(*same, other, template=None)
    assert words(last) == ["hi BRIEF </S>", "hi YO YO </S>"]
    assert words(rendered(*same, template=None)[2]) == ["hi BRIEF </S>", "hi BE </S>"]
    assert words(rendered(other, template=None)[0]) == ["bye YO YO </S>"], "a row by itself has none"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "hi ", "completion": "yo"}, "no field 'label' (the row has: prompt, completion)"),
        (
            {"prompt": "hi ", "completion": "yo", "label": 1},
            "the label is 1, and not true (desired) or false (undesired)",
        ),
        ({"prompt": "hi ", "completion": "yo", "label": "yes"}, "the label is 'yes', and not"),
        ({"prompt": [USER], "completion": "yo", "label": True}, "completion: the messages are of type str"),
        ({"prompt": "hi", "completion": [YO], "label": True}, "prompt: the messages are of type str"),
        ({"prompt": [USER], "completion": [], "label": True}, "completion: the messages are an empty list"),
        ({"completion": "yo", "label": True}, "no field 'prompt'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_row_that_is_no_labelled_answer_says_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        rendered(row)
    assert said in str(error.value)


@pytest.mark.parametrize("label", [True, False, "true", "True", "false", "False"])
def test_a_label_is_known_as_a_boolean_and_as_the_words_for_it(label: bool | str) -> None:
    row = {"prompt": "q ", "completion": "no", "label": label}

    def kind(**changed: Any) -> str | None:
        form = detect([{**row, **changed}], {}, ["labelled"])
        return form and form.kind

    assert kind() == "labelled"
    (answer,) = rendered(row, template=None)
    assert answer.counts == {"desired": str(label).lower() == "true"}
    assert "labelled" not in (kind(label="yes"), kind(label="no"), kind(label=None))


def labelled(begin: int, prompt: int, completion: int, desired: bool = True) -> dict[str, Any]:
    """A tokenizer of numbers, each a token; the end token comes behind the answer."""
    return {"prompt": numbers(begin, prompt) + " ", "completion": numbers(begin + 10, completion), "label": desired}


def expected(document: int) -> tuple[list[int], list[int]]:
    """The prompt and the answer of row `document` of the data set below."""
    begin = 30 * document
    return list(range(begin, begin + 1 + document % 3)), [*range(begin + 10, begin + 11 + document % 4), 1000]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    rows = [labelled(30 * n, 1 + n % 3, 1 + n % 4, n % 5 != 0) for n in range(30)]
    return build(open_store(str(tmp_path / "store")), settings(train=[{"path": write(tmp_path / "a.jsonl", rows)}]))


@pytest.mark.parametrize(("micro_batch", "packing"), [(1, True), (3, True), (1, False)])
def test_an_answer_and_its_mismatched_one_are_two_segments_of_one_row(
    dataset: Dataset, micro_batch: int, packing: bool
) -> None:
    stream = Stream(whole(dataset), Order((1.0,), 32, packing, seed=3), 4, micro_batch, 0, 1, epochs=1)
    seen = []
    for batch in (batch for step in stream.epoch(0) for batch in step):
        assert (
            len(batch.segments(Role.DOCUMENT))
            == len(batch.column("desired"))
            == len(batch.segments(Role.MISMATCHED))
            == len(batch.documents)
        )
        assert batch.segments(Role.MISMATCHED).tolist() == [
            first + 1 for first in batch.segments(Role.DOCUMENT).tolist()
        ]
        assert batch.column("desired").tolist() == [document % 5 != 0 for document in batch.documents]
        answers, others = batch.part(Role.DOCUMENT), batch.part(Role.MISMATCHED)
        for part, back in ((answers, 0), (others, 1)):
            if not batch.documents:
                assert part.input.input_ids.shape == batch.input.input_ids.shape, "a row of padding stays whole"
                continue
            borders = part.input.cu_seqlens.tolist()
            assert borders[-1] == part.input.input_ids.shape[1]
            for document, (begin, end) in zip(batch.documents, pairwise(borders), strict=True):
                prompt, answer = expected(document)[0], expected((document - back) % 30)[1]
                assert part.input.input_ids[0, begin:end].tolist() == prompt + answer
                assert part.labels[0, begin:end].tolist() == [-100] * (len(prompt) - 1) + answer + [-100]
                assert part.input.position_ids[0, begin:end].tolist() == list(range(end - begin))
        seen += batch.documents
    assert sorted(seen) == list(range(30))
    assert dataset.manifest.counters.desired == 24


def test_the_bits_of_a_stored_answer(dataset: Dataset) -> None:
    stored = dataset.read(np.array([0])).gather(
        np.array([4])
    )  # a prompt of 2 words, an answer of 1; the one before has 4
    assert (stored & ID_BITS).tolist() == [120, 121, 130, 1000, 120, 121, 100, 101, 102, 103, 1000]
    assert np.flatnonzero(stored & DESIRED_BIT).tolist() == [0]
    assert np.flatnonzero(stored & MISMATCHED_BIT).tolist() == [4]
    assert np.flatnonzero(stored & TARGET_BIT).tolist() == [2, 3, 6, 7, 8, 9, 10]
    assert not (dataset.read(np.array([0])).gather(np.array([5])) & DESIRED_BIT).any()


def encoded(tmp_path: Path, rows: list[Any], **options: Any) -> Any:
    data = settings(train=[{"path": write(tmp_path / "a.jsonl", rows)}], sequence_length=16, **options)
    (batch,) = batches(expand(data.train, "data.train")[0])
    return BatchEncoder(data, word_tokenizer(), EVERYTHING)(batch)


def test_only_the_answer_decides_what_is_too_long_and_the_mismatched_one_takes_the_room_that_is_left(
    tmp_path: Path,
) -> None:
    rows = [labelled(0, 2, 3), labelled(30, 2, 11), labelled(60, 2, 20), labelled(90, 2, 0, False)]
    result = encoded(tmp_path, rows)
    assert result.lengths.tolist() == [16, 14, 16]  # 6 and 10 of a second answer; 14 and no room for one; 16 of 23
    assert (result.counters.truncated, result.counters.without_targets, result.counters.desired) == (1, 1, 3)
    assert np.flatnonzero(result.tokens & MISMATCHED_BIT).tolist() == [6]
    dropped = encoded(tmp_path, rows, on_too_long="drop")
    assert (len(dropped.lengths), dropped.counters.dropped) == (2, 1)
    failed = encoded(tmp_path, rows, on_too_long="fail")
    assert "23 tokens, but data.sequence_length is 16" in failed.error
    assert "or set data.on_too_long to truncate or drop." in failed.error


@pytest.mark.parametrize("desired", [True, False])
def test_answers_of_one_kind_alone_are_refused_with_one_sentence(tmp_path: Path, desired: bool) -> None:
    from tests.material import Workshop

    workshop = Workshop(tmp_path, "speck")
    path = tmp_path / "a.jsonl"
    write(path, [labelled(30 * n, 1, 2, desired) for n in range(3)])
    config = workshop.config("one", f"data.train=[{{path: {path}}}]", "data.format=labelled")
    said = f"data.train: the label is {str(desired).lower()} in all of the 3 rows that can be trained on"
    with pytest.raises(DataError) as error:
        workshop.prepare(config)
    assert str(error.value).startswith(said)
    report = check_data(config, word_tokenizer(), find(config), lambda *_: None)
    assert report.refusals == [str(error.value)]
    both = [labelled(0, 1, 2, desired), labelled(30, 1, 2, not desired), labelled(60, 1, 2, not desired)]
    write(path, both)
    assert workshop.prepare(config).train
    report = check_data(config, word_tokenizer(), find(config), lambda *_: None)
    assert (report.refusals, report.splits["train"].desired) == ([], 1 if desired else 2)
