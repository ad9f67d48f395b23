"""`capstan data show`: what it says is trained is what a compilation trains."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launcher.data.data import Shown, render_shown, show
from tests.unit.data.test_data_files import (
    FILES,
    TALK,
    compiled,
    config_of,
    lines,
    marked,
    says,
    tokenizer,
    user,
    write,
)
from trainer.config import dump_config
from trainer.data.dataset.dataset import ID_BITS, REJECTED_BIT, SHARED_BIT, TARGET_BIT
from trainer.data.look.show import Decoding, ShownPicture, _Stored
from trainer.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer().save_pretrained(folder)
    return folder


def shown(base: Path, path: Path, *overrides: str, **options: Any) -> Shown:
    configuration = path.parent / "run.yaml"
    configuration.write_text(dump_config(config_of(path, f"model.base={base}", *overrides)))
    return show(configuration, (), **{"row": None, "packed": False, "split": "train", **options})


def in_marks(found: Shown) -> str:
    return render_shown(found, Console(no_color=True, width=40))


@pytest.mark.parametrize(
    "name", ["openai-weight.jsonl", "sharegpt-tools.json", "text.jsonl", "pairs.jsonl", "kto-alpaca.json"]
)
def test_rows_are_shown_as_they_are_compiled(base: Path, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, FILES[name][0])
    documents = [document for row in shown(base, path).rows for document in row.documents]
    stored = np.concatenate(compiled(config_of(path), tmp_path))
    assert np.array_equal(np.concatenate([document.tokens for document in documents]), stored & ID_BITS)
    assert np.array_equal(np.concatenate([document.trained for document in documents]), stored >= TARGET_BIT)
    for document in documents:
        assert marked("".join(f"«{p.text}»" if p.trained else p.text for p in document.pieces)) == (
            document.tokens,
            document.trained,
        )


def test_what_is_trained_stands_in_brackets_without_colours_and_is_green_with_them(base: Path, tmp_path: Path) -> None:
    found = shown(base, write(tmp_path / "a.jsonl", lines({"messages": TALK}, {"messages": TALK})), row=2)
    text = in_marks(found)
    assert f"{tmp_path}/a.jsonl:2, read as chat (messages, tools)" in text
    assert (user("hi") + says("yo")).replace("«", "⟦").replace("»", "⟧") in text
    assert " ".join(text.split()).endswith("trained tokens are in ⟦⟧; special tokens are as written")
    coloured = render_shown(found, Console(force_terminal=True, color_system="standard", no_color=False))
    assert "\x1b[1;32myo\x1b[0m\x1b[1;4;32m<|im_end|>\x1b[0m" in coloured
    assert "⟦" not in coloured
    assert "⟦" in render_shown(found, Console(force_terminal=True, color_system="standard", no_color=True))
    assert "trained tokens are green; special tokens are underlined" in coloured


@pytest.mark.parametrize(
    ("objective", "row", "pieces"),
    [
        ("classification", {"text": "so so", "label": "sad"}, ["so so", " sad"]),
        ("multilabel_classification", {"text": "so so", "label": ["sad", "glad"]}, ["so so", " glad sad"]),
        ("multilabel_classification", {"text": "so so", "label": []}, ["so so", " "]),
        ("token_classification", {"words": ["so", "so"], "tags": ["calm", "sad"]}, ["so so", " calm sad"]),
    ],
)
def test_classes_are_shown_by_their_names_behind_the_text(
    base: Path, tmp_path: Path, objective: str, row: dict[str, Any], pieces: list[str]
) -> None:
    path = write(tmp_path / "a.jsonl", lines(row))
    (shown_row,) = shown(base, path, f"objective.name={objective}", "data.labels=[calm, glad, sad]").rows
    (document,) = shown_row.documents
    text = "".join(piece.text for piece in document.pieces if not piece.trained).strip()
    assert [text, *(piece.text for piece in document.pieces if piece.trained)] == pieces


def test_a_packed_row_has_its_documents_borders_and_its_padding(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*({"text": "x" * size} for size in (9, 4, 5))))
    (row,) = shown(base, path, "data.sequence_length=16", packed=True).rows
    assert [(document.where[-1], len(document.tokens)) for document in row.documents] == [("1", 10), ("3", 6)]
    assert row.padding == 0
    (row,) = shown(base, path, "data.sequence_length=16", packed=True, row=2).rows
    assert ([document.where[-1] for document in row.documents], row.padding) == (["2"], 11)
    assert "── 11 tokens of padding" in in_marks(Shown("train", [row]))
    path.write_bytes(lines(*[{"text": "x" * 15}] * 9))
    assert len(shown(base, path, "data.sequence_length=16", packed=True, row=4).rows) == 1
    with pytest.raises(DataError, match="--row: the first 4 documents fill 4 packed rows, and 5 is none"):
        shown(base, path, "data.sequence_length=16", packed=True, row=5)
    path.write_bytes(lines(*({"text": "x" * size} for size in (9, 4, 5))))
    prompt = ("data.sequence_length=16", "tuning.method=prompt", "tuning.virtual_tokens=4")  # 20 positions a row
    (first,), (second,) = (shown(base, path, *prompt, packed=True, row=row).rows for row in (1, 2))
    assert ([document.where[-1] for document in first.documents], first.padding) == (["1"], 20 - 14)
    assert (sorted(document.where[-1] for document in second.documents), second.padding) == (["2", "3"], 20 - 10 - 9)


def test_a_labelled_answer_is_said_to_be_desired_or_not(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    found = shown(base, write(tmp_path / "kto.jsonl", lines(*rows)))
    assert [row.documents[0].part for row in found.rows] == ["desired", "undesired"]


@pytest.mark.parametrize("lead", ["one", ""], ids=["behind a word", "at the beginning"])
def test_a_picture_of_the_second_answer_is_shown_in_its_place(lead: str) -> None:
    made, picture = tokenizer(), ShownPicture("ab" * 32, 4, 6, 3, "image", "picture of 4 x 6 pixels")
    answers = [[*made(lead)["input_ids"], 1, 1, 1, *made("end")["input_ids"]] for _ in range(2)]
    begins = [len(made(lead)["input_ids"]), len(answers[0]) + len(made(lead)["input_ids"])]
    stored = np.array([*answers[0], *answers[1]], np.uint32)
    stored[len(answers[0])] |= REJECTED_BIT
    found = list(Decoding(made, None).answers("row", _Stored(stored, dict.fromkeys(begins, picture))))
    assert [document.part for document in found] == ["chosen", "rejected"]
    said = f"{lead}[{picture.title}]end"
    assert ["".join(piece.text for piece in document.pieces) for document in found] == [said, said]


def test_answers_to_one_prompt_are_counted_from_1_and_the_first_has_the_prompt() -> None:
    made = tokenizer()
    parts = [[*made(text)["input_ids"]] for text in ("ask one", "two", "three")]
    stored = np.concatenate(parts).astype(np.uint32)
    stored[np.cumsum([len(part) for part in parts])[:-1]] |= SHARED_BIT
    stored[-1] |= TARGET_BIT
    found = list(Decoding(made, None).answers("row", _Stored(stored)))
    assert [(one.part, one.tokens) for one in found] == [(f"answer {n}", part) for n, part in enumerate(parts, 1)]
    assert [any(one.trained) for one in found] == [False, False, True]


@pytest.mark.parametrize(
    ("row", "overrides", "said"),
    [
        ({"messages": [{**TALK[0], "mood": "glad"}, TALK[1]]}, (), "not in the text: mood"),
        ({"messages": TALK, "id": 5}, (), "fields without a use: id"),
        ({"messages": TALK[:1]}, (), "left out, as nothing of it is trained"),
        ({"messages": TALK}, ("data.sequence_length=24",), "cut to data.sequence_length"),
        ({"messages": TALK}, ("data.sequence_length=9", "data.on_too_long=drop"), "dropped, as it is longer"),
        ({"messages": [{"role": "bot", "content": ""}]}, ("data.on_bad_row=skip",), "a bad row, which is skipped: .* 'bot'"),
        ({"messages": [{"role": "bot", "content": ""}]}, (), "the run would end here: .* 'bot'"),
    ],
)  # fmt: skip
def test_what_is_lost_of_a_row_is_said(
    base: Path, tmp_path: Path, row: dict[str, Any], overrides: tuple[str, ...], said: str
) -> None:
    path = write(tmp_path / "a.jsonl", lines(row, {"messages": TALK}))
    first, second = shown(base, path, *overrides).rows
    assert any(re.search(said, warning) for warning in first.warnings), first.warnings
    assert second.warnings == [] or overrides


def test_a_row_that_is_split_or_cut_is_shown_as_what_remains_of_it(base: Path, tmp_path: Path) -> None:
    path, limit = write(tmp_path / "a.jsonl", lines({"text": "x" * 24})), "data.sequence_length=10"
    (row,) = shown(base, path, limit, "data.on_too_long=split").rows
    assert [len(document.tokens) for document in row.documents] == [10, 10, 5]
    assert row.warnings == ["split into 3 documents of data.sequence_length"]
    (row,) = shown(base, path, limit).rows
    assert [len(document.tokens) for document in row.documents] == [10]
    (row,) = shown(base, path, limit, "data.on_too_long=drop").rows
    assert [len(document.tokens) for document in row.documents] == [25], "of what is left out all is shown"


def test_characters_that_move_the_cursor_are_written_out(base: Path, tmp_path: Path) -> None:
    found = shown(base, write(tmp_path / "a.jsonl", lines({"text": "a\x1b[2J\u202eb"})))
    assert "\\x1b[2J\\u202eb" in in_marks(found)


def test_what_is_trained_up_to_the_end_of_a_row_ends_with_its_bracket(base: Path, tmp_path: Path) -> None:
    text = in_marks(shown(base, write(tmp_path / "a.jsonl", lines({"text": "so so"}))))
    row = next(line for line in text.splitlines() if "⟦" in line)
    assert (row.count("⟦"), row[-1]) == (1, "⟧")


def test_a_row_is_shown_alone_and_else_the_first_three(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*({"text": f"row {number}"} for number in range(1, 6))))
    assert [row.where for row in shown(base, path, row=2).rows] == [f"{path}:2"]
    assert [row.where for row in shown(base, path).rows] == [f"{path}:{number}" for number in (1, 2, 3)]


def test_a_row_or_a_split_that_there_is_not_is_refused(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "a"}))
    with pytest.raises(DataError, match="--row: there is no row 2"):
        shown(base, path, row=2)
    with pytest.raises(ConfigError, match="--split: 'eval' is none of this configuration's: train"):
        shown(base, path, split="eval")
    assert [row.where for row in shown(base, path, f"data.eval=[{{path: {path}}}]", split="eval").rows] == [f"{path}:1"]


def test_the_command_prints_json_and_needs_neither_torch_nor_a_compilation(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"messages": TALK}))
    shown(base, path)  # which writes the configuration
    # transformers imports torch for a tokenizer wherever it is installed, so here it is not.
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "sys.modules['torch'] = None; from launcher.cli.__main__ import main\n"
        f"sys.argv = ['capstan', 'data', 'show', '{tmp_path}/run.yaml', '--json']\n"
        "try: main()\nfinally: assert not {'ray', 'deepspeed'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["documents"][0]["tokens"], row["documents"][0]["trained"]) == marked(user("hi") + says("yo"))
    assert not (tmp_path / "data").exists()


def test_rows_that_are_held_out_are_named(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "many.jsonl", lines(*({"text": f"row {number}"} for number in range(60))))
    found = shown(base, path, "data.held_out=0.5", "data.format=text", row=12)
    assert len(found.held_out) > 2
    assert found.rows[0].where not in found.held_out
    said = in_marks(found)
    assert "held out (data.held_out), as --split eval shows: " in said
    assert found.held_out[0] in said
    kept = shown(base, path, "data.held_out=0.5", "data.format=text", split="eval", row=1)
    assert kept.rows[0].where in found.held_out
    assert not kept.held_out
    assert not shown(base, path, "data.format=text", row=12).held_out
    for count, dots in ((5, False), (6, True)):
        named = in_marks(Shown("train", [], [f"a.jsonl:{number}" for number in range(count)]))
        assert ("a.jsonl:4" in named, "..." in named) == (True, dots)
