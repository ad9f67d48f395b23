"""Files in the formats that people bring, one a format and oddity: `auto` gives the very tokens and targets that are
written here.

The rows become the conversations that LLaMA-Factory's converters (alpaca, ShareGPT, ranking and KTO forms) and TRL's
data utilities (messages, prompts and completions, implicit prompts) make of them; the expected texts are these
conversations in the template below, written out. «» enclose what is trained: an assistant's words and the end of its
turn.
"""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from tests.compiled import compile_dataset
from tests.material import byte_tokenizer
from trainer.config import Config, parse_config
from trainer.config.row_kinds import ROW_KINDS, most_segments
from trainer.data.compile.fingerprint import fingerprint
from trainer.data.compile.inputs import describe_forms, find
from trainer.data.dataset.dataset import DESIRED_BIT, ID_BITS, REJECTED_BIT, TARGET_BIT
from trainer.data.format.formats import FORMATS
from trainer.store.store import open_store

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    return made


def turn(role: str, content: str) -> str:
    """A turn in the template above, written by hand: an assistant's is trained."""
    return f"<|im_start|>{role}\n" + (f"«{content}<|im_end|>»\n" if role == "assistant" else f"{content}<|im_end|>\n")


def user(content: str) -> str:
    return turn("user", content)


def says(content: str) -> str:
    return turn("assistant", content)


def quiet(content: str) -> str:
    """An assistant's turn that is not trained."""
    return f"<|im_start|>assistant\n{content}<|im_end|>\n"


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(*rows: Any) -> bytes:
    return json.dumps(rows, indent=2).encode()


def table(*rows: Any, delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(*rows: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


def arrow(*rows: Any) -> bytes:
    made, sink = pyarrow.Table.from_pylist(list(rows)), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, made.schema) as stream:
        stream.write_table(made)
    return sink.getvalue().to_pybytes()


def mds(*rows: Any) -> bytes:
    """A shard of one column of JSON, `messages`."""
    header = {"column_names": ["messages"], "column_encodings": ["json"], "column_sizes": [None]}
    values = [json.dumps(row["messages"]).encode() for row in rows]
    samples = [np.uint32(len(value)).tobytes() + value for value in values]
    described = json.dumps(header).encode()
    offsets = np.cumsum([4 * (len(rows) + 2) + len(described), *map(len, samples)], dtype=np.uint32)
    return np.uint32(len(rows)).tobytes() + offsets.tobytes() + described + b"".join(samples)


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TALKED = user("hi") + says("yo")
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TOOLS = '<|im_start|>tools\n{"type": "function", "function": {"name": "f", "parameters": {}}}\n<|im_end|>\n'
CALLS = '<call>{"name": "f", "arguments": {"x": 1}}</call>'
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
SAYS_NO = {"from": "gpt", "value": "no"}

# Name of the file -> what is in it, and the text of each document; that of a pair is (chosen, rejected).
FILES: dict[str, tuple[bytes, list[str | tuple[str, str]]]] = {
    "openai.jsonl": (lines({"messages": TALK}), [TALKED]),
    "openai-turns.jsonl": (
        lines({"messages": [{"role": "system", "content": "be brief"}, *TALK, *TALK]}),
        [turn("system", "be brief") + TALKED + TALKED],
    ),
    "openai-weight.jsonl": (
        lines({"messages": [TALK[0], {**TALK[1], "weight": 0}, *TALK]}),
        [user("hi") + quiet("yo") + TALKED],
    ),
    "axolotl-train.jsonl": (
        lines({"messages": [TALK[0], {**TALK[1], "train": False}, TALK[0], {**TALK[1], "train": True}]}),
        [user("hi") + quiet("yo") + TALKED],
    ),
    "openai-parts.jsonl": (
        lines(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}, TALK[1]]}
        ),
        [user("one\ntwo") + says("yo")],
    ),
    "openai-tools.jsonl": (
        lines(
            {
                "messages": [
                    TALK[0],
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "5"},
                    TALK[1],
                ],
                "tools": [TOOL],
            }
        ),
        [TOOLS + user("hi") + says(CALLS) + turn("tool", "5") + says("yo")],
    ),
    "openai-name.jsonl": (
        lines({"messages": [{**TALK[0], "name": "ann"}, TALK[1]]}),
        ["<|im_start|>user ann\nhi<|im_end|>\n" + says("yo")],
    ),
    "beside-others.jsonl": (lines({"prompt": "hi", "prompt_id": "7", "messages": TALK}), [TALKED]),
    "array.json": (array({"messages": TALK}, {"messages": TALK}), [TALKED, TALKED]),
    "lines.json": (lines({"messages": TALK}), [TALKED]),
    "packed.jsonl.gz": (gzip.compress(lines({"messages": TALK}), mtime=0), [TALKED]),
    "empty-lines-and-bom.jsonl": (b"\xef\xbb\xbf\n" + lines({"messages": TALK}) + b"\n\n", [TALKED]),
    "messages.parquet": (
        parquet({"messages": [*TALK, {"role": "user", "content": "bye", "name": "bob"}, TALK[1]]}),
        [TALKED + "<|im_start|>user bob\nbye<|im_end|>\n" + says("yo")],
    ),
    "messages.arrow": (arrow({"messages": TALK}), [TALKED]),
    "messages.mds": (mds({"messages": TALK}, {"messages": TALK * 2}), [TALKED, TALKED * 2]),
    "sharegpt.json": (array({"conversations": SHAREGPT}), [TALKED]),
    "sharegpt-system.json": (
        array({"conversations": SHAREGPT, "system": "be brief"}),
        [turn("system", "be brief") + TALKED],
    ),
    "sharegpt-system-turn.jsonl": (
        lines({"conversations": [{"from": "system", "value": "be brief"}, *SHAREGPT], "system": "be long"}),
        [turn("system", "be brief") + TALKED],
    ),
    "sharegpt-tools.json": (
        array(
            {
                "conversations": [
                    SHAREGPT[0],
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "5"},
                    SHAREGPT[1],
                ],
                "tools": '[{"name": "f", "parameters": {}}]',
            }
        ),
        [TOOLS + user("hi") + says(CALLS) + turn("tool", "5") + says("yo")],
    ),
    "conversations-of-roles.jsonl": (lines({"conversations": TALK}), [TALKED]),
    "alpaca.json": (array({"instruction": "hi", "input": "", "output": "yo"}), [TALKED]),
    "alpaca-input.json": (array({"instruction": "add", "input": "1 2", "output": "3"}), [user("add\n1 2") + says("3")]),
    "alpaca-history.json": (
        array({"instruction": "b", "output": "B", "system": "s", "history": [["a", "A"]], "input": None}),
        [turn("system", "s") + user("a") + says("A") + user("b") + says("B")],
    ),
    "alpaca-and-its-text.json": (
        array({"instruction": "hi", "input": "", "output": "yo", "text": "Below is an instruction ..."}),
        [TALKED],
    ),
    "alpaca.csv": (table({"instruction": "hi", "input": "", "output": 'a "b",\nc'}), [user("hi") + says('a "b",\nc')]),
    "dolly.jsonl": (
        lines({"instruction": "who", "context": "ann", "response": "Ann", "category": "qa"}),
        [user("who\nann") + says("Ann")],
    ),
    "prompts.jsonl": (lines({"prompt": "1 + 1 =", "completion": " 2"}), ["1 + 1 =« 2</s>»"]),
    "lines.txt": (b"once\n\n  upon a time\r\n", ["o«nce</s>»", " « upon a time</s>»"]),
    "responses.tsv": (table({"prompt": "a, b", "response": " c"}, delimiter="\t"), ["a, b« c</s>»"]),
    "prompts-of-messages.jsonl": (
        lines({"prompt": [*TALK, {"role": "user", "content": "bye"}], "completion": [TALK[1]]}),
        [user("hi") + quiet("yo") + user("bye") + says("yo")],
    ),
    "questions.jsonl": (lines({"question": "1 + 1", "answer": "2"}), [user("1 + 1") + says("2")]),
    "text.jsonl": (lines({"text": "once"}, {"text": "zwei ä"}), ["o«nce</s>»", "z«wei ä</s>»"]),
    "text.csv": ('\ufefftext,id\r\n"a, b\r\nc",1\r\n'.encode(), ["a«, b\r\nc</s>»"]),
    "pairs.jsonl": (lines({"prompt": "q ", "chosen": "yes", "rejected": "no"}), [("q «yes</s>»", "q «no</s>»")]),
    "pairs-without-prompt.jsonl": (
        lines({"chosen": "Human: hi\n\nAssistant: yes sir", "rejected": "Human: hi\n\nAssistant: yet"}),
        [("Human: hi\n\nAssistant:« yes sir</s>»", "Human: hi\n\nAssistant:« yet</s>»")],
    ),
    "pairs-of-messages.jsonl": (
        lines({"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "no"}], "score": 1}),
        [(TALKED, user("hi") + says("no"))],
    ),
    "ranking-alpaca.json": (
        array({"instruction": "hi", "input": "you", "chosen": "yo", "rejected": "no"}),
        [(user("hi\nyou") + says("yo"), user("hi\nyou") + says("no"))],
    ),
    "ranking-sharegpt.json": (
        array(
            {
                "conversations": [SHAREGPT[0]],
                "chosen": SHAREGPT[1],
                "rejected": SAYS_NO,
            }
        ),
        [(TALKED, user("hi") + says("no"))],
    ),
    "ranking-sharegpt-system.json": (
        array({"system": "be brief", "conversations": [SHAREGPT[0]], "chosen": SHAREGPT[1], "rejected": SAYS_NO}),
        [(turn("system", "be brief") + TALKED, turn("system", "be brief") + user("hi") + says("no"))],
    ),
    "labels.jsonl": (lines({"prompt": "q ", "completion": "yes", "label": True}), ["q «yes</s>»"]),
    "labels.csv": (table({"prompt": "q ", "completion": "no", "label": "false"}), ["q «no</s>»"]),
    "kto-prompt.jsonl": (lines({"prompt": "q ", "completion": "yes", "kto_tag": True}), ["q «yes</s>»"]),
    "kto-alpaca.json": (array({"instruction": "hi", "output": "yo", "kto_tag": True}), [TALKED]),
    "kto-sharegpt.json": (array({"conversations": SHAREGPT, "kto_tag": False}), [TALKED]),
}
OBJECTIVES = {"pairs": "dpo", "ranking": "dpo", "labels": "kto", "kto": "kto"}


def config_of(path: Path, *overrides: str) -> Config:
    objective = next((name for word, name in OBJECTIVES.items() if path.name.startswith(word)), "sft")
    text = f"""
    run: {{name: arriving, store: {path.parent}}}
    model: {{base: {path.parent}}}
    objective: {{name: {objective}}}
    data: {{train: [{{path: {path}}}], sequence_length: 512}}
    train: {{steps: 1}}
    """
    return parse_config(text, overrides)


def compiled(config: Config, folder: Path) -> list[np.ndarray]:
    """The stored tokens of each document."""
    files, part, settings = find(config)["train"]
    data = compile_dataset(settings, files, tokenizer(), open_store(str(folder / "store")), "f" * 20, part)
    tokens = data.read(np.arange(len(data.digests))).gather(np.arange(len(data.lengths)))
    return np.split(tokens, data.offsets[1:-1])


def marked(text: str) -> tuple[list[int], list[bool]]:
    """The tokens of a text, piece by piece between the marks, and whether each is trained."""
    own, ids, trained = tokenizer(), list[int](), list[bool]()
    for number, piece in enumerate(part for half in text.split("«") for part in half.split("»")):
        found = own(piece, add_special_tokens=False)["input_ids"]
        ids += found
        trained += [number % 2 == 1] * len(found)
    assert ids == own(text.replace("«", "").replace("»", ""), add_special_tokens=False)["input_ids"]
    return ids, trained


def same(document: np.ndarray, expected: str | tuple[str, str]) -> bool:
    answers = [expected] if isinstance(expected, str) else list(expected)
    pieces = np.split(document, np.flatnonzero(document & REJECTED_BIT))
    found = [((piece & ID_BITS).tolist(), (piece & TARGET_BIT).astype(bool).tolist()) for piece in pieces]
    return found == [marked(answer) for answer in answers]


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_the_very_tokens_and_targets_of_its_format(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    documents = compiled(config_of(path), tmp_path)
    assert len(documents) == len(expected)
    assert all(map(same, documents, expected)), [tokenizer().decode(document & ID_BITS) for document in documents]
    desired = [bool(document[0] & DESIRED_BIT) for document in documents]
    assert desired == [b"rue" in content and name.startswith(("labels", "kto"))] * len(documents)


def test_the_comparison_sees_a_token_and_a_target_that_differ(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": TALK}))
    (document,) = compiled(config_of(tmp_path / "a.jsonl"), tmp_path)
    assert same(document, TALKED)
    assert not same(document, TALKED.replace("yo", "yp"))
    assert not same(document, user("hi") + quiet("yo"))
    assert not same(document, TALKED.replace("»\n", "\n»"))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def name_of(config: Config) -> str:
    files, part, settings = find(config)["train"]
    return fingerprint(settings, files, {}, part)


@pytest.mark.parametrize(
    ("name", "explicit"),
    [
        ("openai.jsonl", ["data.format=chat"]),
        ("prompts.jsonl", ["data.format=prompt_completion"]),
        ("text.jsonl", ["data.format=text"]),
        ("pairs.jsonl", ["data.format=preference"]),
        ("labels.jsonl", ["data.format=labelled"]),
        ("responses.tsv", ["data.format=prompt_completion", "data.fields.completion=response"]),
        ("sharegpt.json", ["data.format=sharegpt"]),
    ],
)
def test_data_is_the_same_whether_its_format_is_named_or_found_out(
    tmp_path: Path, name: str, explicit: list[str]
) -> None:
    path = write(tmp_path / name, FILES[name][0])
    assert name_of(config_of(path)) == name_of(config_of(path, *explicit))
    assert name_of(config_of(path)) != name_of(config_of(path, *explicit, "data.sequence_length=64"))


def test_fields_that_were_given_before_formats_were_found_out_mean_what_they_meant(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"conversations": SHAREGPT}))
    given = ["data.fields.messages=conversations"]
    assert name_of(config_of(path, *given)) == name_of(config_of(path, *given, "data.format=chat"))
    assert name_of(config_of(path)) != name_of(config_of(path, *given))  # which is sharegpt, and reads more fields


def test_each_source_has_its_own_format_and_name(tmp_path: Path) -> None:
    talks = write(tmp_path / "a.jsonl", lines({"messages": TALK}))
    texts = write(tmp_path / "b.jsonl", lines({"body": "once", "text": "id"}))
    sources = f"data.train=[{{path: {talks}}}, {{path: {texts}, format: text, fields: {{text: body}}}}]"
    config = config_of(talks, sources)
    documents = compiled(config, tmp_path)
    assert [same(*two) for two in zip(documents, [TALKED, "o«nce</s>»"], strict=True)] == [True, True]
    files = find(config)["train"].files
    assert describe_forms(config.data, config.data.train, files) == [f"{talks} is read as chat (messages, tools)"]
    assert name_of(config) != name_of(config_of(talks, sources.replace("text: body", "text: text")))


def test_a_sources_own_fields_win_over_those_of_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"ask": "a", "say": "b", "reply": "c"}))
    fields = ["data.format=prompt_completion", "data.fields={prompt: ask, completion: say}"]
    (plain,) = find(config_of(path, *fields))["train"].files
    (own,) = find(config_of(path, f"data.train=[{{path: {path}, fields: {{completion: reply}}}}]", *fields))[
        "train"
    ].files
    assert plain.form is not None
    assert own.form is not None
    assert (plain.form.names, own.form.names) == (
        {"prompt": "ask", "completion": "say"}, {"prompt": "ask", "completion": "reply"},
    )  # fmt: skip


def test_a_document_takes_a_segment_more_where_an_answer_or_tags_follow_the_first() -> None:
    two = {kind for kind in ROW_KINDS if most_segments(kind) == 2}
    assert two == {"preference", "labelled", "tagged", "preference_pictures", "labelled_pictures"}
    assert {most_segments(kind) for kind in ROW_KINDS if kind not in two} == {1}


def test_a_format_names_fields_that_it_has_and_a_kind_that_is_tokenized() -> None:
    for name, found in FORMATS.items():
        assert set(found.needs) | set(found.names) <= set(found.fields), name
        assert FORMATS[found.kind].read is None, name
        if found.wider:
            assert set(found.wider[1].values()) <= set(FORMATS[found.wider[0]].fields), name
    # The first of those that fit a row equally well is taken: narrower before wider, and what is frequent first.
    known = """chat sharegpt alpaca answers prompt_completion prompt_completion_messages question_answer segments text
        preference_sharegpt preference_alpaca preference labelled_messages labelled_alpaca labelled classified
        classified_messages multilabel multilabel_messages tagged pictures preference_pictures labelled_pictures
        classified_pictures multilabel_pictures""".split()
    assert [name for name in FORMATS if name in known] == known
