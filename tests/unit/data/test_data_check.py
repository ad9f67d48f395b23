"""The findings of `capstan data check`, on data whose faults are known."""

import io
import json
import random
import re
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.data.data import report_table
from tests.compiled import compile_dataset
from tests.material import byte_tokenizer
from trainer.config import Config, Data
from trainer.data.compile.inputs import find
from trainer.data.compile.pool import map_batches
from trainer.data.look.check import DataReport, Findings, Fingerprint, SeenTexts, check_data
from trainer.data.source.files import expand
from trainer.errors import DataError
from trainer.store.store import open_store

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
WORDS = "ant bee cat dog emu fox gnu hen ibis jay kite lark mole newt owl pig quail rat seal toad".split()


def sentence(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + str(draw.randint(0, 99)) for _ in range(words))


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def check(
    tmp_path: Path,
    rows: list[Any],
    evaluation: list[Any] = (),  # pyright: ignore
    template: str = TEMPLATE,
    **data: Any,
) -> DataReport:
    """The report on rows of one file each; a `bytes` row is a line as it stands."""
    sources: dict[str, Any] = {}
    for what, content in (("train", rows), ("eval", evaluation)):
        if content:
            lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in content)
            (tmp_path / f"{what}.jsonl").write_bytes(b"\n".join(lines))
            sources[what] = [{"path": str(tmp_path / f"{what}.jsonl")}]
    (tmp_path / "t.jinja").write_text(template)
    settings = {"sequence_length": 2048, **data}
    if data.get("format", "chat") == "chat":
        settings["template"] = str(tmp_path / "t.jinja")
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"base": "x"},
            "data": {**sources, **settings},
            "train": {"steps": 1},
        }
    )
    return check_data(config, byte_tokenizer(), find(config), lambda *_: None)


def found(report: DataReport) -> Findings:
    assert report.to_json()["train"]["rows"] == report.splits["train"].rows
    return report.splits["train"]


def test_sound_data_has_counts_and_nothing_to_complain_of(tmp_path: Path) -> None:
    rows = [talk(sentence(n, 20), sentence(100 + n, 20)) for n in range(50)]
    rows[0]["messages"].insert(0, {"role": "system", "content": "be brief"})
    report = check(tmp_path, rows)
    train = found(report)
    assert (train.rows, train.documents, report.refusals) == (50, 50, [])
    assert 0 < train.targets < train.tokens
    assert sum(train.histogram.values()) == 50
    assert train.lengths["max"] <= max(train.histogram) < 2 * train.lengths["max"], "bounds from above"
    assert train.lengths["min"] <= train.lengths["median"] <= train.lengths["max"]
    assert 0.8 < train.fill <= 1
    assert train.packed_rows * 2048 * train.fill == pytest.approx(train.tokens, rel=1e-3)
    odd = (
        "bad_rows",
        "undecodable",
        "too_long",
        "tokens_cut",
        "without_targets",
        "one_sided",
        "empty_turns",
        "odd_roles",
    )
    assert all(getattr(train, name) == 0 for name in (*odd, "exact_duplicates", "near_duplicates"))


def test_bad_rows_are_named_by_file_and_line_and_refused_unless_skipped(tmp_path: Path) -> None:
    rows = [talk("a", "b"), b"{oops", b'{"messages": "\xff"}', {"messages": None}, {"messages": [{"role": "bot"}]}]
    report = check(tmp_path, rows)
    train = found(report)
    assert (train.rows, train.bad_rows, train.documents, train.undecodable) == (5, 4, 1, 1)
    places = [text.rpartition("train.jsonl:")[2].partition(":")[0] for text in train.bad_row_examples]
    assert places == ["2", "3", "4", "5"]
    assert len(report.refusals) == 1
    assert "4 bad rows, the first is" in report.refusals[0]
    assert check(tmp_path, rows, on_bad_row="skip").refusals == []


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([("user", "hi")], "one_sided"),
        ([("system", "be"), ("assistant", "yo")], "one_sided"),
        ([("user", "hi"), ("assistant", " ")], "empty_turns"),
        ([("user", "hi"), ("user", "ho"), ("assistant", "yo")], "odd_roles"),
        ([("user", "hi"), ("system", "be"), ("assistant", "yo")], "odd_roles"),
        ([("user", "h\ufffdi"), ("assistant", "yo")], "undecodable"),
        ([("user", "hi")], "without_targets"),
    ],
)
def test_an_odd_conversation_is_counted(tmp_path: Path, messages: list[tuple[str, str]], fault: str) -> None:
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    train = found(check(tmp_path, [talk("a", "b"), row]))
    assert (train.bad_rows, getattr(train, fault)) == (0, 1)


def test_calls_of_tools_and_their_answers_are_no_odd_roles_and_what_the_template_leaves_out_is_named(
    tmp_path: Path,
) -> None:
    call = {"function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call, call], "weight": 0},
        *({"role": "tool", "content": "sun"} for _ in range(2)),
        {"role": "assistant", "content": "fine"},
    ]
    report = check(tmp_path, [{**talk("a", "b"), "id": 1}, {"messages": messages, "id": 2}, {"messages": messages}])
    train = found(report)
    assert (train.bad_rows, train.odd_roles, train.empty_turns) == (0, 0, 0), "a turn of calls alone says something"
    path = tmp_path / "train.jsonl"
    printed = report.to_json()["train"]
    assert printed["left_out"] == {"tool_calls": {"rows": 2, "examples": [f"{path}:2", f"{path}:3"]}}
    assert printed["unused_fields"] == {"id": {"rows": 2, "examples": [f"{path}:1", f"{path}:2"]}}
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(report_table(report))
    assert f"left out by the chat template: tool_calls in 2 rows, such as {path}:2" in console.export_text()


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([{"text": "x" * 99}, {"text": "y" * 150}], {"format": "text", "sequence_length": 32, "on_too_long": "drop"}),
        ([{"text": ""}], {"format": "text"}),
        ([b"{oops"], {"format": "text", "on_bad_row": "skip"}),
        ([talk("a", "")], {"train_on": {"end": False}}),
        ([{"text": "x" * 99}, {"text": "y"}], {"format": "text", "sequence_length": 32, "on_too_long": "drop"}),
    ],
)
def test_a_report_refuses_what_a_compilation_refuses(tmp_path: Path, rows: list[Any], settings: dict[str, Any]) -> None:
    report = check(tmp_path, rows, **settings)
    data = Data.model_validate({"train": [{"path": str(tmp_path / "train.jsonl")}], "format": "chat", **settings})
    if data.format == "chat":
        data = data.model_copy(update={"template": str(tmp_path / "t.jinja")})
    said = list[str]()
    try:
        compile_dataset(data, expand(data.train, "data.train"), byte_tokenizer(), open_store(str(tmp_path / "s")), "f")
    except DataError as error:
        said = [str(error).partition(": ")[2]]
    assert [sentence.partition(": ")[2] for sentence in report.refusals] == said


def test_a_set_of_another_format_keeps_what_its_rows_have_a_use_for(tmp_path: Path) -> None:
    for name, row in (("talks", talk("a", "b")), ("texts", {"text": "a"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    data = {
        "train": [{"path": str(tmp_path / "talks.jsonl")}],
        "thinking": "strip",
        "train_on": {"turns": "last", "end": False},
        "template": "chatml",
    }
    named = {"talks": "chat", "texts": "text"}
    for formats in (named, dict.fromkeys(named, "auto"), dict.fromkeys(named)):
        sets = {name: {"path": str(tmp_path / f"{name}.jsonl"), "format": kind} for name, kind in formats.items()}
        tree = {
            "run": {"name": "x"},
            "model": {"base": "x"},
            "data": data,
            "train": {"steps": 1},
            "eval": {"sets": sets},
        }
        inputs = find(Config.model_validate(tree))
        talks, texts = (inputs[f"eval.sets.{name}"].data for name in named)
        assert (talks.thinking, talks.train_on.turns, talks.train_on.end, talks.template) == (
            "strip",
            "last",
            False,
            "chatml",
        )
        assert (texts.thinking, texts.train_on.turns, texts.train_on.end, texts.template) == (
            "as_template",
            "all",
            False,
            None,
        )


def test_other_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [talk(sentence(n % 300, 5), "yes") if n % 50 else {"messages": n} for n in range(500)]
    alone = check(tmp_path, rows, rows[:40])
    assert found(alone).exact_duplicates > 0
    places = [place.rpartition(":")[2] for place in found(alone).duplicate_examples[0]]
    assert (places, len(found(alone).duplicate_examples)) == (["302", "2"], 5), "the first ones"
    monkeypatch.setattr("trainer.data.look.check.mapper_for", lambda size: partial(map_batches, processes=2))
    assert check(tmp_path, rows, rows[:40]) == alone


def test_what_is_cut_at_the_sequence_length(tmp_path: Path) -> None:
    rows = [{"text": "x" * 99}, {"text": "y" * 150}]
    train = found(check(tmp_path, rows, format="text", sequence_length=100))
    assert (train.too_long, train.tokens_cut, train.tokens) == (1, 51, 100 + 151)
    refused = check(tmp_path, rows, format="text", sequence_length=100, on_too_long="fail")
    assert "1 rows are longer than data.sequence_length: 100" in refused.refusals[0]


def test_duplicates_are_found_within_a_split_and_between_training_and_evaluation(tmp_path: Path) -> None:
    texts = [{"text": sentence(n)} for n in range(40)]
    nearly = {"text": texts[3]["text"] + " and more"}
    report = check(
        tmp_path, [*texts, texts[7], nearly], [{"text": sentence(99)}, texts[5], nearly, nearly], format="text"
    )
    train, evaluation = report.splits["train"], report.splits["eval"]
    assert (train.exact_duplicates, train.near_duplicates, train.in_train) == (1, 1, None)
    assert [tuple(place.rpartition(":")[2] for place in pair) for pair in train.duplicate_examples] == [
        ("41", "8"),
        ("42", "4"),
    ]
    assert evaluation.in_train == {"exact": 1, "near": 2}
    assert (evaluation.exact_duplicates, evaluation.near_duplicates) == (1, 0)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_what_rows_are_told_to_be_makes_them_neither_alike_nor_different(role: str, tmp_path: Path) -> None:
    def told(prompt: str, question: str) -> dict[str, Any]:
        row = talk(question, "yes")
        return {"messages": [{"role": role, "content": prompt}, *row["messages"]]}

    rows = [told(sentence(1), "one?"), told(sentence(2), "one?"), told(sentence(1), "two?")]
    train = found(check(tmp_path, rows))
    assert (train.exact_duplicates, train.near_duplicates) == (1, 0)


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    report = check(tmp_path, [{"messages": [{"role": "user", "content": "hi"}]}])
    assert "none of the 1 rows can be trained on: 0 bad rows, 1 without" in report.refusals[0]


@pytest.mark.parametrize("others", [[], [talk("a", "b")]])
def test_a_row_that_the_template_renders_to_nothing_is_packed_into_no_row(tmp_path: Path, others: list[Any]) -> None:
    template = "{% for m in messages %}{% if m.role != 'system' %}" + TEMPLATE.partition("%}")[2].replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    nothing = {"messages": [{"role": "system", "content": "be brief"}]}
    train = found(check(tmp_path, [nothing, *others], template=template))
    assert (train.documents, train.without_targets, train.packed_rows) == (1 + len(others), 1, len(others))
    assert (train.lengths["min"], train.fill > 0) == (0, bool(others))


@pytest.mark.parametrize(("changed", "alike"), [(0, True), (2, True), (30, False), (60, False)])
def test_near_is_a_matter_of_how_much_differs(changed: int, alike: bool) -> None:
    """The second text has 60 words like the first one, but its last `changed` words are others."""
    misses = 0
    for seed in range(20):
        seen, text = SeenTexts(), sentence(seed)
        seen.add(Fingerprint.of(text), "first")
        other = " ".join([*text.split()[: 60 - changed], *sentence(1000 + seed).split()[:changed]])
        misses += (seen.find(Fingerprint.of(other.upper())) is not None) != alike
    assert misses <= 1


def test_each_length_says_what_documents_and_targets_it_would_lose(tmp_path: Path) -> None:
    rows = [{"text": "a" * 300}, {"text": "b" * 700}, {"text": "c" * 99}, {"text": "d" * 98}]
    report = check(tmp_path, rows, format="text")
    train = found(report)
    assert list(train.lost) == [256, 512]
    beginnings = train.tokens - train.targets  # no token predicts the first of a text
    each = beginnings // 4
    lost = train.lost[256]
    assert lost.documents == 0.5
    added = (train.tokens - 1197) // 4  # special tokens around each text
    assert lost.targets_dropped == pytest.approx((300 + 700 + 2 * (added - each)) / train.targets, abs=1e-6)
    assert lost.targets_cut == pytest.approx((300 + 700 + 2 * (added - 256)) / train.targets, abs=1e-6)
    assert train.lost[512].documents == 0.25
    assert report.to_json()["train"]["lost"][512]["documents"] == 0.25
    shown = io.StringIO()
    Console(file=shown, width=100).print(report_table(report))
    assert "50.00 %" in shown.getvalue()


def test_each_line_of_the_report_has_its_own_count_and_share() -> None:
    findings = Findings(
        rows=2000, documents=1000, tokens=4000, targets=1000, too_long=2, tokens_cut=7, bad_rows=4, undecodable=6,
        without_targets=8, one_sided=10, empty_turns=12, odd_roles=14, exact_duplicates=16, near_duplicates=18,
        in_train={"exact": 20, "near": 22}, packed_rows=24, fill=0.5,
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=100).print(report_table(DataReport({"train": findings}, [])))
    cells = ([cell.strip(" │┃") for cell in re.split("[│┃]", line)] for line in out.getvalue().splitlines())
    shown = {row[0] or row[1]: row[-1] or row[-2] for row in cells if len(row) > 1}
    wanted = {
        "rows": "2,000",
        "documents": "1,000",
        "tokens": "4,000",
        "trained tokens": "1,000 (25.0 %)",
        "longer than sequence_length": "2 (0.10 %)",
        "tokens above it": "7",
        "fill of packed rows": "0.5000 (24 rows)",
        "bad rows": "4 (0.20 %)",
        "undecodable bytes": "6 (0.30 %)",
        "nothing to train on": "8 (0.40 %)",
        "one-sided": "10 (0.50 %)",
        "an empty turn": "12 (0.60 %)",
        "odd roles": "14 (0.70 %)",
        "exact duplicates": "16 (0.80 %)",
        "near duplicates": "18 (0.90 %)",
        "also in the training data": "20 exactly, 22 nearly",
    }
    assert wanted.items() <= shown.items()


def test_virtual_tokens_fill_their_part_of_a_packed_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * size}) for size in (30, 50, 50)))
    data = {"train": [{"path": str(tmp_path / "a.jsonl")}], "format": "text", "sequence_length": 64}
    tree = {"run": {"name": "x"}, "model": {"base": "x"}, "train": {"steps": 1}, "data": data}
    config = Config.model_validate({**tree, "tuning": {"method": "prompt", "virtual_tokens": 16}})
    train = check_data(config, byte_tokenizer(), find(config), lambda *_: None).splits["train"]
    assert train.packed_rows == 3
    assert train.fill == pytest.approx((train.tokens + 3 * 16) / (3 * (64 + 16)), abs=1e-4)


@pytest.mark.usefixtures("chapters")
def test_a_source_whose_last_rows_are_empty_has_documents(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("a", "b", "c", "d", "", "", "", "")]
    report = check(tmp_path, rows, format="text")
    assert (found(report).documents, found(report).without_targets, report.refusals) == (8, 4, [])


def test_a_source_whose_last_file_has_bad_rows_alone_is_no_empty_one(tmp_path: Path) -> None:
    for name, row in (("a", {"text": "good"}), ("b", {"text": 5})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    tree = {"run": {"name": "x"}, "model": {"base": "x"}, "train": {"steps": 1}}
    data = {"train": [{"path": f"{tmp_path}/*.jsonl"}], "format": "text", "on_bad_row": "skip"}
    config = Config.model_validate({**tree, "data": data})
    found = check_data(config, byte_tokenizer(), find(config), lambda *_: None)
    assert (found.splits["train"].bad_rows, found.refusals) == (1, [])


def test_a_source_with_a_fraction_and_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    for name, text in (("a", "good"), ("b", "")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    sources = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "fraction": 0.5}]
    tree = {"run": {"name": "x"}, "model": {"base": "x"}, "train": {"steps": 1}}
    config = Config.model_validate({**tree, "data": {"train": sources, "format": "text"}})
    refused = check_data(config, byte_tokenizer(), find(config), lambda *_: None).refusals
    assert refused == ["data.train[1]: has a fraction of 0.5, but no document. Remove it."]


def test_progress_goes_over_all_files(tmp_path: Path) -> None:
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in "abc"]
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name * 9}))
    tree = {"run": {"name": "x"}, "model": {"base": "x"}, "train": {"steps": 1}}
    config = Config.model_validate({**tree, "data": {"train": sources, "format": "text"}})
    told = list[tuple[int, int]]()
    check_data(config, byte_tokenizer(), find(config), lambda what, done, size: told.append((done, size)))
    size = (tmp_path / "a.jsonl").stat().st_size
    assert told == [(size, 3 * size), (2 * size, 3 * size), (3 * size, 3 * size)]


def test_a_bar_of_the_lengths_is_as_long_as_its_share_of_the_longest(tmp_path: Path) -> None:
    rows = [talk(sentence(n, 4), "b") for n in range(40)] + [talk(sentence(n, 200), "b") for n in range(10)]
    shown = io.StringIO()
    Console(file=shown, width=100).print(report_table(check(tmp_path, rows)))
    bars = {int(found[1]): found[2] for found in re.finditer(r"up to [\d,]+ +│ (\d+) +│ (█+)", shown.getvalue())}
    assert max(bars) == 40
    assert len(bars) > 1
    assert all(len(bar) == ceil(len(bars[40]) * count / 40) for count, bar in bars.items())


def test_a_text_is_like_the_first_of_those_that_it_equals() -> None:
    seen, one, other = SeenTexts(), Fingerprint.of("What is two and two?"), Fingerprint.of("Quite another text.")
    assert seen.find(one) is None
    for number in (1, 2, 3):
        seen.add(one, f"a.jsonl:{number}")
    assert seen.find(one) == ("exact", "a.jsonl:1")
    assert seen.find(Fingerprint.of("what  is two and TWO?")) == ("near", "a.jsonl:1")
    assert seen.find(other) is None
    assert seen.find(Fingerprint.of("What is two and two?", b"a picture")) is None
