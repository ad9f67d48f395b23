"""What is trained of conversations, in the chat templates of well-known models: those of TRL's folder.

TRL's own training templates enclose in tags what it trains; the tokens and targets found in the plain template, which
has no tags, must be the same, but for white space behind the end of a turn, which is not trained here.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl

from tests.material import byte_tokenizer
from trainer.config import Data
from trainer.data.render.chat import Renderer
from trainer.data.render.conversation import Conversation
from trainer.data.render.thinking import Edit, EditedText, find_form
from trainer.errors import DataError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ENDS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"]
THOUGHT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo", "reasoning_content": "hm one"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao", "reasoning_content": "hm two"},
]
INLINE = [
    {"role": m["role"], "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
    if "reasoning_content" in m
    else m
    for m in THOUGHT
]
PLAIN = [{"role": message["role"], "content": message["content"]} for message in THOUGHT]


def marked(template: str, messages: list[dict[str, Any]], /, **settings: Any) -> str:
    """The text, with what is trained of it between « and »."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ENDS})
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    data = Data.model_validate({"train": [{"path": "x"}], "format": "chat", **settings})
    (example,) = Renderer(tokenizer, data).encode([{"messages": messages}])
    if isinstance(example, DataError):
        raise example
    text, before = "", False
    for token, target in zip(example.tokens.tolist(), example.targets.tolist(), strict=True):
        text += ("«" if target else "»") if target != before else ""
        text, before = text + str(tokenizer.decode([token])), target
    return text + ("»" if before else "")


@pytest.mark.parametrize(
    "name", ["cohere", "gemma3", "lfm2", "llama3", "nemotron_3_nano", "phi3", "qwen2_5_vl", "qwen3_instruct_2507"]
)
def test_turns_are_found_in_a_template_without_tags_as_its_tagged_form_says(name: str) -> None:
    theirs = marked(f"{name}_training", PLAIN)
    assert marked(name, PLAIN) == re.sub(r"(\s+)»", r"»\1", theirs)
    assert theirs.count("«") == 2  # or the comparison would hold for nothing at all


@pytest.mark.parametrize("messages", [THOUGHT, INLINE], ids=["by key", "in tags"])
def test_kept_thinking_is_what_trls_template_for_training_keeps(messages: list[dict[str, Any]]) -> None:
    theirs = marked("qwen3_training", messages)
    assert marked("qwen3", messages, thinking="keep") == re.sub(r"(\s+)»", r"»\1", theirs)
    assert marked("qwen3", messages) != marked("qwen3", messages, thinking="keep")


USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
FIRST, SECOND = USER.format("hi"), USER.format("bye")
ONE, TWO, NONE = ("<think>\n" + thought + "\n</think>\n\n" for thought in ("hm one", "hm two", ""))
END = "<|im_end|>"


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({}, f"«yo{END}»", f"«{TWO}ciao{END}»"),
        ({"thinking": "strip"}, f"«yo{END}»", f"«ciao{END}»"),
        ({"thinking": "keep"}, f"«{ONE}yo{END}»", f"«{TWO}ciao{END}»"),
        ({"train_on": {"thinking": False}}, f"«yo{END}»", f"{TWO}«ciao{END}»"),
        ({"thinking": "keep", "train_on": {"thinking": False}}, f"{ONE}«yo{END}»", f"{TWO}«ciao{END}»"),
        ({"train_on": {"turns": "last"}}, f"yo{END}", f"«{TWO}ciao{END}»"),
        ({"train_on": {"end": False}}, f"«yo»{END}", f"«{TWO}ciao»{END}"),
    ],
)
@pytest.mark.parametrize("messages", [THOUGHT, INLINE], ids=["by key", "in tags"])
def test_thinking_is_kept_stripped_and_trained_as_the_settings_say(
    messages: list[dict[str, Any]], settings: dict[str, Any], first: str, second: str
) -> None:
    assert marked("qwen3", messages, **settings) == f"{FIRST}{first}\n{SECOND}{second}\n"


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({"train_on": {"thinking": False}}, f"{ONE}«yo{END}\n»", f"{TWO}«ciao{END}\n»"),
        ({"thinking": "strip"}, f"«{NONE}yo{END}\n»", f"«{NONE}ciao{END}\n»"),
        ({"train_on": {"turns": "last"}}, f"{ONE}yo{END}\n", f"«{TWO}ciao{END}\n»"),
        ({"train_on": {"end": False}}, f"«{ONE}yo»{END}\n", f"«{TWO}ciao»{END}\n"),
    ],
)
def test_so_it_is_where_the_template_has_tags(settings: dict[str, Any], first: str, second: str) -> None:
    assert marked("qwen3_training", THOUGHT, **settings) == f"{FIRST}{first}{SECOND}{second}"


EMPTY = [m if m["role"] == "user" else {**m, "content": f"<think>\n\n</think>\n\n{m['content']}"} for m in PLAIN]


@pytest.mark.parametrize("messages", [PLAIN, EMPTY], ids=["none", "in tags"])
@pytest.mark.parametrize("trained", [True, False])
def test_an_empty_block_stands_before_answers_without_a_thought_and_is_not_trained(
    messages: list[dict[str, Any]], trained: bool
) -> None:
    settings: dict[str, Any] = {"thinking": "always", "train_on": {"thinking": trained}}
    both = f"{FIRST}{NONE}«yo{END}»\n{SECOND}{NONE}«ciao{END}»\n"
    assert marked("qwen3", messages, **settings) == both
    assert marked("qwen3_training", messages, **settings) == both.replace("»\n", "\n»")
    one = [*THOUGHT[:2], *messages[2:]]
    thought = f"«{ONE}yo{END}»" if trained else f"{ONE}«yo{END}»"
    assert marked("qwen3", one, **settings) == f"{FIRST}{thought}\n{SECOND}{NONE}«ciao{END}»\n"
    last = [*messages[:2], *THOUGHT[2:]]
    thought = f"«{TWO}ciao{END}»" if trained else f"{TWO}«ciao{END}»"
    assert marked("qwen3", last, **settings) == f"{FIRST}{NONE}«yo{END}»\n{SECOND}{thought}\n"


def test_a_template_that_knows_no_thinking_gets_the_empty_blocks_all_the_same() -> None:
    found = marked("llama3", PLAIN, thinking="always")
    assert found.count("<think>\n\n</think>\n\n«") == 2


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training"])
def test_other_roles_are_trained_with_the_end_of_their_turns(name: str) -> None:
    found = marked(name, PLAIN, train_on={"roles": ["user"]})
    assert re.findall("«([^»]*)»", found) == [f"hi{END}", f"bye{END}"]
    found = marked(name, PLAIN, train_on={"roles": ["user", "assistant"], "turns": "last"})
    assert re.findall("«([^»]*)»", found) == [f"{NONE}ciao{END}"]


@pytest.mark.parametrize("inline", [False, True], ids=["by key", "in tags"])
def test_thinking_whose_words_are_in_an_answer_too_is_kept(inline: bool) -> None:
    thought = {"content": "<think>\nyo\n</think>\n\nyo."} if inline else {"content": "yo.", "reasoning_content": "yo"}
    messages = [THOUGHT[0], {"role": "assistant", **thought}, *THOUGHT[2:]]
    own = "<think>\nyo\n</think>\n\nyo."
    assert marked("qwen3", messages, thinking="keep") == f"{FIRST}«{own}{END}»\n{SECOND}«{TWO}ciao{END}»\n"


@pytest.mark.parametrize("thought", ["by key", "in tags", "none"])
def test_tags_that_an_answer_writes_about_are_no_thinking(thought: str) -> None:
    answer = "Models write <think>a</think> or <think>b</think>."
    before = TWO if thought == "in tags" else ""
    key = {"reasoning_content": "hm two"} if thought == "by key" else {}
    messages = [*PLAIN[:3], {"role": "assistant", "content": before + answer, **key}]
    assert marked("llama3", messages, thinking="strip").endswith(f"«{answer}<|eot_id|>»")
    if thought != "none":  # else the template itself takes them for thinking
        assert marked("qwen3", messages, thinking="keep").endswith(f"«{TWO}{answer}{END}»\n")


@pytest.mark.parametrize("before", ["", ONE])
def test_no_thinking_is_left_where_the_template_would_read_it_behind_other_words(before: str) -> None:
    said = f"{before}First <think>a</think> words, <think>b</think> then more."
    messages = [*PLAIN[:1], {"role": "assistant", "content": said}, *PLAIN[2:3], {"role": "assistant", "content": said}]
    answer = f"«First words, then more.{END}»"
    assert marked("qwen3", messages, thinking="strip") == f"{FIRST}{answer}\n{SECOND}{answer}\n"


def test_a_turn_that_is_not_trained_is_found_where_the_template_rewrites_it() -> None:
    silent = [THOUGHT[0], {**THOUGHT[1], "weight": 0}, *THOUGHT[2:]]
    assert marked("qwen3", silent) == f"{FIRST}yo{END}\n{SECOND}«{TWO}ciao{END}»\n"


def _calls(*names: str) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _written(*names: str) -> str:
    calls = (f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>' for name in names)
    return "«" + "\n".join(calls) + f"{END}»\n"


RESULT = {"role": "tool", "content": "5"}
ANSWERED = "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("names", [("f",), ("f", "g")], ids=["one call", "two calls"])
@pytest.mark.parametrize("thought", [{}, {"reasoning_content": "hm two"}], ids=["without thinking", "with thinking"])
@pytest.mark.parametrize("earlier", [[], PLAIN[:2]], ids=["the first turn", "after a turn"])
def test_calls_without_words_are_trained_and_nothing_before_them(
    names: tuple[str, ...], thought: dict[str, Any], earlier: list[dict[str, Any]]
) -> None:
    messages = [*earlier, THOUGHT[2], _calls(*names), RESULT, {**PLAIN[3], **thought}]
    before = f"{FIRST}«yo{END}»\n" if earlier else ""
    end = f"{ANSWERED}«{TWO if thought else NONE}ciao{END}»\n"
    assert marked("qwen3", messages) == before + SECOND + _written(*names) + end


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"thinking": "keep"}, f"«{ONE}CALL"),
        ({"thinking": "always", "train_on": {"thinking": False}}, f"{ONE}«CALL"),
        ({"thinking": "strip"}, "«CALL"),
        ({"train_on": {"thinking": False}}, "«CALL"),
    ],
)
def test_thinking_before_calls_without_words_is_kept_stripped_and_trained_as_the_settings_say(
    settings: dict[str, Any], expected: str
) -> None:
    messages = [THOUGHT[0], {**_calls("f"), "reasoning_content": "hm one"}, RESULT, *PLAIN[1:]]
    found = marked("qwen3", messages, **settings)
    assert found.startswith(FIRST + expected.replace("CALL", _written("f").removeprefix("«")))


def test_thinking_that_the_template_writes_twice_is_not_left_untrained(tmp_path: Path) -> None:
    twice = tmp_path / "twice.jinja"
    thought = "{{ m.reasoning_content }}"
    twice.write_text(
        f"{{% for m in messages %}}<|im_start|>{thought}{thought}{{{{ m.content }}}}<|im_end|>{{% endfor %}}"
    )
    with pytest.raises(DataError, match="turn 2: its thinking is not found in the conversation's text"):
        marked("qwen3", THOUGHT, template=str(twice), train_on={"thinking": False})


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "<|end|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|><think>\n{% endif %}"
)


def test_an_answer_without_thinking_after_one_that_thought_begins_at_its_own_prompt(tmp_path: Path) -> None:
    own = tmp_path / "r1.jinja"
    own.write_text(R1)
    found = marked("qwen3", [*INLINE[:2], *PLAIN[2:]], template=str(own), thinking="keep")
    assert re.findall("«([^»]*)»", found) == ["hm one\n</think>\n\nyo<|im_end|>", "ciao<|im_end|>"]
    assert found.startswith("<|im_start|>hi<|end|><think>\n«hm one")


def test_a_span_that_reaches_over_another_turns_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert marked("qwen3", THOUGHT).count("«") == 2
    monkeypatch.setattr(Conversation, "_begin", lambda *_: 0)
    with pytest.raises(DataError, match="its place is unknown"):
        marked("qwen3", THOUGHT)
    monkeypatch.undo()
    monkeypatch.setattr(Conversation, "_end", lambda talk, turn: len(talk.whole))
    with pytest.raises(DataError, match="its place is unknown"):
        marked("qwen3", THOUGHT)


def test_texts_end_untrained_where_ends_are_not_trained() -> None:
    data = Data.model_validate({"train": [{"path": "x"}], "format": "text", "train_on": {"end": False}})
    (example,) = Renderer(byte_tokenizer(), data).encode([{"text": "abc"}])
    assert not isinstance(example, DataError)
    assert example.targets.tolist() == [False, True, True, False]


def test_text_at_the_beginning_of_a_span_belongs_to_it_and_text_behind_its_end_does_not() -> None:
    edited = EditedText("ask answer", {1: Edit(4, 4, "thought ", 4, 0)})
    assert edited.text == "ask thought answer"
    assert [edited.text[slice(*edited.moved(span))] for span in ((0, 4), (4, 10))] == ["ask ", "thought answer"]


def _renders(
    asked: str = "U:{}", answered: str = "A:{}", thought: str = "({})", prompt: str = "A:"
) -> Callable[..., str]:
    """A template of these parts. An exclamation mark in one of them refuses what it stands for."""

    def one(message: dict[str, Any]) -> str:
        if message["role"] == "user":
            return asked.format(message["content"])
        said = message.get("reasoning_content")
        return (thought.format(said) if said else "") + answered.format(message["content"])

    def render(messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        text = "".join(one(message) for message in messages) + prompt * generation_prompt
        if "!" in text:
            raise DataError("refused")
        return text

    return render


def test_the_form_of_thinking_is_what_a_template_writes_around_it() -> None:
    form = find_form(_renders(), calls=False)
    assert form is not None
    assert (form.by_key, form.prompt, form.bare, form.empty) == (True, "A:", "A:", "A:")
    assert (form.before, form.after) == ("(", ")A:")


@pytest.mark.parametrize(
    "parts",
    [
        {"asked": "U:"},
        {"answered": "A:"},
        {"prompt": "!"},
        {"answered": "A:{}!"},
        {"prompt": "A:</think>"},
    ],
    ids=str,
)
def test_a_template_that_leaves_out_or_refuses_a_turn_shows_no_form_of_thinking(parts: dict[str, str]) -> None:
    assert find_form(_renders(**parts), calls=False) is None


def test_an_empty_block_has_no_place_in_a_turn_that_begins_otherwise(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.index == 2 %}first: {% endif %}"
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match="turn 4: the chat template shows no form for an empty block of thinking"):
        marked("qwen3", PLAIN, template=str(own), thinking="always")
