"""The parts of a conversation that its template leaves out of the text are found and named."""

from typing import Any

import pytest

from tests.unit.data.test_data_chat import CHATML, TALK, Renderer, data, tokenizer
from trainer.data.format.messages import read_messages
from trainer.data.format.unrendered import left_out

CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
WITH_CALL = [
    {"role": "user", "content": "how is the weather ?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
    {"role": "tool", "content": 'it\'s\n"fine" 🌞', "tool_call_id": "1"},
    {"role": "assistant", "content": " fine ", "reasoning_content": "the tool says so"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
COMPLETE = (
    "{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.tool_call_id }} {{ m.reasoning_content }} "
    "{{ m.content | trim if m.role != 'tool' else m.content | tojson }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        (COMPLETE, []),
        (CHATML, ["tools", "tool_calls", "tool_call_id", "reasoning_content"]),
        ("{{ tools }}" + CHATML, ["tool_calls", "tool_call_id", "reasoning_content"]),
        (COMPLETE.replace("call.function | tojson", "call.function.name"), ["tool_calls"]),
        (COMPLETE.replace("{{ tools }}", ""), ["tools"]),
        (COMPLETE.replace("in messages", "in messages if m.role != 'tool'"), ["content of tool", "tool_call_id"]),
        ("{{ messages[0].content }}" + COMPLETE.replace("in messages", "in messages[1:]"), []),
    ],
)
def test_what_a_row_carries_and_the_template_leaves_out_is_named(template: str, missing: list[str]) -> None:
    """That the tools or the question name the function does not hide that a call is gone."""
    row = {"messages": WITH_CALL, "tools": TOOLS, "id": 5}
    example = Renderer(tokenizer(template), data(train_on={"roles": "all"})).one(row)
    assert sorted(example.left_out) == sorted(missing)


def test_what_sharegpts_form_has_no_place_for_is_named() -> None:
    talk = [{"from": "human", "value": "hi", "mood": "bye"}, {"from": "gpt", "value": "yo", "weight": 1}]
    assert Renderer(tokenizer(), data()).one({"messages": talk}).left_out == ["mood"]


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ({"from": "human", "value": "hi", "tool_calls": [{"function": {"name": "look_up"}}]}, ["tool_calls"]),
        ({"from": "human", "value": "hi", "content": "OTHER"}, ["content"]),
        ({"from": "human", "value": "hi", "content": None, "role": None, "tool_calls": []}, []),
        ({"role": "user", "content": "hi", "value": "OTHER"}, ["value"]),
        ({"role": "user", "content": "hi", "from": "Alice"}, ["from"]),
        ({"role": "user", "content": "hi", "from": None, "value": None, "weight": 1}, []),
    ],
)
def test_the_keys_of_the_other_form_are_left_out_too(message: dict[str, Any], lost: list[str]) -> None:
    assert Renderer(tokenizer(), data()).one({"messages": [message, TALK[2]]}).left_out == lost


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("\\n" * 40, "n " * 19 + "zzz"),
        ("n " * 500_000, "n " * 19 + "zzz"),
        ("n" + "!" * 500_000 + "n", "n n z"),
        ("a" * 500_000, "a" * 99 + " z"),
    ],
)
def test_what_is_left_out_is_found_in_one_pass_over_the_text(content: str, note: str) -> None:
    given = [{"role": "user", "content": content, "note": note}]
    assert left_out(given, read_messages(given), f"<user>{content}</user>") == ["note"]


@pytest.mark.parametrize(
    ("text", "note", "lost"),
    [  # of a long word 100 letters count, and of a text 20 words
        ('hi {"note": "one\\n two\\tthree"}', "one\n\ntwo three", []),
        ("hi one two  three", " one\ntwo three\n", []),
        ("hi C:\\\\new", "C:\\new", []),
        ('hi "🌞\\n→"', "🌞\n→", []),
        ("hi one two", "one three", ["note"]),
        ("hi " + "a" * 100 + "b", "a" * 101, []),
        ("hi " + "a" * 99 + "b", "a" * 101, ["note"]),
        ("hi " + "a" * 101 + ", b", "a" * 101 + " c", []),
        ("hi " + "a" * 100 + ", b", "a" * 100 + " c", ["note"]),
        ("hi " + "n, " * 20 + "b", "n " * 20 + "c", []),
        ("hi " + "n, " * 19 + "b", "n " * 19 + "c", ["note"]),
    ],
)
def test_what_stands_in_the_text_otherwise_is_not_left_out(text: str, note: str, lost: list[str]) -> None:
    given = [{"role": "user", "content": "hi", "note": note}]
    assert left_out(given, read_messages(given), text) == lost


@pytest.mark.parametrize(("behind", "lost"), [("", ["note"]), (" yes", [])])
def test_a_part_is_sought_behind_the_whole_message_before(behind: str, lost: list[str]) -> None:
    given = [
        {"role": "user", "content": "say yes now", "note": "calm"},
        {"role": "assistant", "content": "ok", "note": "yes"},
    ]
    assert left_out(given, read_messages(given), f"<calm> say yes now <ok>{behind}") == lost
