"""Rows and files that no format fits: each is one sentence with the settings that would read it, or is known to be
fine.
"""

import io
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.test_data_files import (
    SHAREGPT,
    TALK,
    TALKED,
    array,
    compiled,
    config_of,
    lines,
    name_of,
    same,
    says,
    tokenizer,
    turn,
    user,
    write,
)
from trainer.data.compile.inputs import describe_forms, find
from trainer.data.format.formats import RowForm, lost_fields
from trainer.data.format.pictures import refuse_pictures
from trainer.data.look.check import check_data
from trainer.errors import ConfigError, DataError
from trainer.store.json_text import elements


def test_a_row_that_differs_from_the_first_rows_is_a_bad_row_with_the_setting_that_reads_it(tmp_path: Path) -> None:
    rows = [{"messages": TALK}] * 3 + [{"conversations": SHAREGPT}] * 20
    path = write(tmp_path / "a.jsonl", lines(*rows))
    with pytest.raises(DataError, match=r":4: no field 'messages' \(.*\); data.format=sharegpt reads such rows\."):
        compiled(config_of(path, "data.format=chat"), tmp_path)
    config = config_of(path, "data.format=chat", "data.on_bad_row=skip")
    report = check_data(config, tokenizer(), find(config), lambda *_: None)
    (line,) = report.splits["train"].bad_row_examples  # twenty rows, one line
    assert line.startswith(f"{path}:4, {path}:5, {path}:6 and 17 more rows: no field 'messages'")
    assert len(compiled(config, tmp_path)) == 3


@pytest.mark.parametrize(
    ("row", "overrides", "error", "said"),
    [
        ({"a": 1, "b": 2}, [], DataError, "are of no format known here: their fields are a, b. Name the format and"),
        ({"prompt": "a", "reply": "b"}, ["data.format=prompt_completion"], DataError, "data.fields.completion=reply reads"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, [], ConfigError, "its rows are preference .* objective.name=dpo"),
        ({"text": "a"}, ["objective.name=dpo"], ConfigError, "its rows are text .*, and objective.name: dpo learns from"),
        ({"text": "a"}, ["data.train_on.turns=last"], ConfigError, "data.train_on.turns: has no effect with data.format: text"),
        ({"text": "a"}, ["data.train_on.roles=[user]"], ConfigError, "data.train_on.roles: has no effect with data.format: text"),
        ({"text": "a"}, ["data.template=t.jinja"], ConfigError, "data.template: has no effect with data.format: text"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_one_sentence_that_says_what_would(
    tmp_path: Path, row: dict[str, Any], overrides: list[str], error: type[Exception], said: str
) -> None:
    config = config_of(write(tmp_path / "a.jsonl", lines(row)), *overrides)
    with pytest.raises(error, match=f"^[^\n]*{said}[^\n]*$"):
        compiled(config, tmp_path)


def test_lists_that_no_field_of_the_form_holds_are_lost_and_empty_ones_are_not() -> None:
    row = {"instruction": "a", "output": "b", "history": [["c", "d"]], "tools": [], "system": " "}
    form = RowForm("prompt_completion", (("completion", "output"), ("prompt", "instruction")))
    assert lost_fields(form, [row]) == ["history"]
    assert lost_fields(form, [{**row, "tools": [{}], "history": [], "system": "s"}]) == ["system", "tools"]


@pytest.mark.parametrize("roles", ["all", "whole", "[assistant]"])
def test_words_for_what_is_trained_that_fit_a_text_too_are_fine_beside_conversations(
    tmp_path: Path, roles: str
) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "once"}))
    for form in ("auto", "text"):
        config = config_of(path, f"data.format={form}", f"data.train_on.roles={roles}")
        assert [same(document, "o«nce</s>»") for document in compiled(config, tmp_path / form)] == [True]


ASKED = [{"role": "user", "content": "<image>what is it?"}, TALK[1]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED, "images": ["a.jpg"]},  # LLaMA-Factory, ms-swift
        {"messages": TALK, "images": ["a.jpg"]},
        {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, SHAREGPT[1]], "image": "a.jpg"},  # LLaVA
        {"messages": TALK, "images": [{"bytes": "AA==", "path": None}]},  # the Hub's data sets
        {"messages": TALK, "image": {"bytes": None, "path": "a.jpg"}},
        {"messages": TALK, "image": {"url": "https://host/a.jpg"}},
        {"instruction": "<audio>what is said?", "output": "yo", "audios": ["a.wav"]},
        {"prompt": "what is it?", "completion": "a cat", "images": ["a.jpg"]},
    ],
)
def test_a_row_with_pictures_is_a_bad_row_and_never_trained_as_text_alone(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", lines({**row, "images": [], "image": None, "audios": None}, row))
    with pytest.raises(DataError, match=rf"^{path}:2: it has '(images?|audios)' beside its text[^\n]*$") as refused:
        compiled(config_of(path), tmp_path)
    noun = "sounds" if "audios" in row else "pictures"
    assert f"Set data.format: pictures to train on {noun}," in str(refused.value)


@pytest.mark.parametrize("row", [{"image": "a.jpg"}, {"images": []}, {"image": None}, {"video": ""}])
def test_a_field_that_only_says_where_a_text_is_from_refuses_nothing(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", lines({"messages": TALK, **row}))
    assert len(compiled(config_of(path), tmp_path)) == 1


def test_a_field_that_the_format_reads_is_its_text_whatever_its_name() -> None:
    row = {"videos": [{"role": "user", "content": "hi"}]}
    refuse_pictures(row, ["videos"])
    for held in (row, {"videos": b"\0\0\0\x18ftyp"}):
        with pytest.raises(DataError, match="it has 'videos' beside its text"):
            refuse_pictures(held, ["messages"])


LOST = {
    "question": (
        {"question": "who", "context": "Ann", "answer": "Ann."},
        "data.format=alpaca data.fields.input=context data.fields.instruction=question data.fields.output=answer",
        user("who\nAnn") + says("Ann."),
    ),
    "system": (
        {"messages": TALK, "system": "be brief"},
        "data.format=sharegpt data.fields.messages=messages",
        turn("system", "be brief") + TALKED,
    ),
    "prompt": (
        {"prompt": "hi", "response": "yo", "system": "be brief"},
        "data.format=alpaca data.fields.instruction=prompt data.fields.output=response",
        turn("system", "be brief") + TALKED,
    ),
    "pairs": (
        {"prompt": "hi", "chosen": "yo", "rejected": "no", "system": "be brief"},
        "data.format=preference_alpaca data.fields.instruction=prompt",
        (turn("system", "be brief") + TALKED, turn("system", "be brief") + user("hi") + says("no")),
    ),
    "labels": (
        {"prompt": "hi", "completion": "yo", "label": False, "context": "you"},
        (
            "data.format=labelled_alpaca data.fields.input=context data.fields.instruction=prompt"
            " data.fields.output=completion"
        ),
        user("hi\nyou") + says("yo"),
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_rows_that_say_more_than_their_format_reads_are_refused_with_the_settings_that_read_it(
    tmp_path: Path, name: str
) -> None:
    row, overrides, expected = LOST[name]
    path = write(tmp_path / f"{name}.jsonl", lines({**row, "id": 1}))
    with pytest.raises(
        DataError, match=f"^[^\n]*leaves out what they say in (system|context)[^\n]*{overrides} reads"
    ) as refused:
        find(config_of(path))
    (document,) = compiled(config_of(path, *overrides.split()), tmp_path)
    assert same(document, expected)
    without = str(refused.value).rpartition("; ")[2].removesuffix(" does without.").split()
    assert find(config_of(path, *without))["train"].files


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "instruction": "hi", "system": "", "context": " ", "history": [], "tools": None},
        {"text": "Be brief.\nhi\nyo", "system": "Be brief.\n", "input": "hi"},
        {"question": "hi", "answer": "yo", "input": 5},
    ],
)
def test_what_rows_say_twice_or_not_at_all_is_not_missed(tmp_path: Path, row: dict[str, Any]) -> None:
    assert find(config_of(write(tmp_path / "a.jsonl", lines(row))))["train"].files


def test_fields_that_are_not_read_are_named_beside_those_that_are(tmp_path: Path) -> None:
    others = {f"x{number}": "a" for number in range(9)}
    path = write(tmp_path / "a.jsonl", lines({"text": "a"}, {"text": "b", "id": 1, **others}))
    config = config_of(path)
    (line,) = describe_forms(config.data, config.data.train, find(config)["train"].files)
    assert line == f"{path} is read as text (text); not read: id, x0, x1, x2, x3, x4, x5, x6 and 2 more"
    assert name_of(config) == name_of(config_of(path, "data.format=text"))


def test_a_field_that_few_rows_have_is_read_by_the_name_it_has_there(tmp_path: Path) -> None:
    plain, more = {"instruction": "hi", "response": "yo"}, {"instruction": "who", "context": "Ann", "response": "Ann"}
    path = write(tmp_path / "a.jsonl", lines(*[plain] * 40, *[more] * 24))
    documents = compiled(config_of(path), tmp_path)
    assert sum(same(document, user("who\nAnn") + says("Ann")) for document in documents) == 24
    assert sum(same(document, TALKED) for document in documents) == 40


def test_rows_that_several_formats_fit_are_of_one_that_the_objective_learns_from(tmp_path: Path) -> None:
    row = {"prompt": "hi", "messages": TALK, "chosen": TALK, "rejected": [TALK[0], {**TALK[1], "content": "no"}]}
    path = write(tmp_path / "a.jsonl", lines(row))
    assert same(compiled(config_of(path), tmp_path)[0], TALKED)
    config = config_of(path, "objective.name=dpo", f"run.store={tmp_path}/2")
    assert same(compiled(config, tmp_path / "2")[0], (TALKED, user("hi") + says("no")))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ', "damaged or not of the kind its name says"),
        ("a.json", b'[{"text": "a"} {"text"', "damaged or not of the kind its name says"),
        ("a.csv", b'text\n"a', "damaged or not of the kind its name says .unexpected end of data"),
        ("a.csv", b"text,text\na,b\n", "two columns have the same name"),
        ("a.csv", b"text,id\na,1\nb\n", "a.csv:2: 1 values in a row of 2 columns"),
        ("a.json", b'[{"text": "a"}, 5]', "a.json:2: not JSON .an object is needed, this is int"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n', "a.json: damaged or .* .something follows the array"),
        ("a.json", b'[{"text": "a"},,{"text": "b"}]', "a.json: damaged or .* .Expecting value"),
        ("a.json", b'[{"text": "a"}{"text": "b"}]', "a.json: damaged or .* .two elements have no comma between them"),
        ("a.jsonl", b"", "data.train.0.: .*a.jsonl has no rows"),
        (
            "a.jsonl",
            '{"text": "ä"}\n'.encode("latin-1"),
            "data.train.0.: no row can be read; the first: .*a.jsonl:1: not UTF-8",
        ),
    ],
)
def test_damaged_tables_and_arrays_are_one_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        compiled(config_of(write(tmp_path / name, content)), tmp_path)


@pytest.mark.parametrize("size", [1, 7, 2**20])
def test_an_array_in_pieces_of_any_size_has_the_same_elements(size: int) -> None:
    rows = [{"text": "ä" * number, "deep": [{"a": "]},"}]} for number in range(300)]
    stream = io.BytesIO(array(*rows) + b" \n")
    assert [element for element, _ in elements(lambda _: stream.read(size), 10**6)] == rows
