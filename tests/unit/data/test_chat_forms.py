"""What families of chat templates make of thinking, calls and system messages, and what is trained of it: found from
what they render.

The templates are those of TRL's folder. The expected texts are written by hand, from the formats that the models'
owners document.
"""

import re
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.material import byte_tokenizer
from tests.unit.data.test_data_thinking import INLINE, PLAIN, TEMPLATES, THOUGHT
from trainer.config import Data
from trainer.data.format.messages import THOUGHTS, read_messages, text_of, with_default_system, without_system
from trainer.data.format.row_format import ask, talk, with_system
from trainer.data.format.unrendered import left_out_in_words
from trainer.data.render import conversation
from trainer.data.render.chat import Example, Renderer
from trainer.data.render.chat_template import ChatTemplate
from trainer.data.render.chat_text import ChatText
from trainer.data.render.conversation import Conversation
from trainer.errors import ConfigError, DataError

BAR = "\uff5c"  # as in DeepSeek's tokens
EOS, CALLS, NO_CALLS, CALL, NO_CALL, SEP = (
    f"<{BAR}{name}{BAR}>"
    for name in (
        "end▁of▁sentence",
        "tool▁calls▁begin",
        "tool▁calls▁end",
        "tool▁call▁begin",
        "tool▁call▁end",
        "tool▁sep",
    )
)
ENDS = [
    *("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|user|>", "<|assistant|>", "<|eot_id|>"),
    *("<turn|>", "<|tool_response>", "<end_of_utterance>", EOS, f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"),
]  # fmt: skip


def encoded(template: str, messages: list[dict[str, Any]], **settings: Any) -> tuple[str, Example]:
    """The text of a conversation, with what is trained of it between « and », and its example. `template` is a name in
    the folder, or a text.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ENDS})
    own = TEMPLATES / f"{template}.jinja"
    tokenizer.chat_template = template if "{" in template else own.read_text(encoding="utf-8")
    data = Data.model_validate({"train": [{"path": "x"}], "format": "chat", **settings})
    (example,) = Renderer(tokenizer, data).encode([{"messages": messages}])
    if isinstance(example, DataError):
        raise example
    pieces = list[str]()
    for target, run in groupby(zip(example.targets.tolist(), example.tokens.tolist(), strict=True), itemgetter(0)):
        text = str(tokenizer.decode([token for _, token in run]))
        pieces.append(f"«{text}»" if target else text)
    return "".join(pieces), example


def trained(template: str, messages: list[dict[str, Any]], **settings: Any) -> list[str]:
    return re.findall("«([^»]*)»", encoded(template, messages, **settings)[0])


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(content: str | None, *names: str, **more: Any) -> dict[str, Any]:
    made = [
        {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {"x": 1}}} for name in names
    ]
    return says("assistant", content, tool_calls=made, **more)


NO_JSON = {**calls("", "f"), "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "x = 1"}}]}
RESULT = says("tool", "5", tool_call_id="call00001", name="f")
CALLING = [says("user", "hi"), calls(None, "f"), RESULT, says("assistant", "five"), *PLAIN[2:]]
SPEAKING = [says("user", "hi"), calls("let me", "f"), RESULT, says("assistant", "five"), *PLAIN[2:]]

# As Kimi's and Hunyuan's: every turn has a block, which is empty where nothing was thought, and in earlier turns.
_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% set thought = (m.reasoning_content or '') if"
    " loop.last else '' %}BLOCK<|end|>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if"
    " add_generation_prompt %}<|assistant|>{% endif %}"
)
KIMI = _TURNS.replace("BLOCK", "<think>{{ thought }}</think>{{ m.content }}")
HUNYUAN = _TURNS.replace("BLOCK", "<think>\n{{ thought }}\n</think>\n<answer>\n{{ m.content }}\n</answer>")

FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
HM = ANALYSIS.format("hm one"), ANALYSIS.format("hm two")


@pytest.mark.parametrize("messages", [THOUGHT, INLINE], ids=["by key", "in tags"])
@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        ("gptoss", f"{HM[0]}{FINAL}yo<|end|>", f"{HM[1]}{FINAL}ciao<|return|>"),
        ("glm4moe", "\n<think>hm one</think>\nyo", "\n<think>hm two</think>\nciao"),
        ("qwen3_5_think", "hm one\n</think>\n\nyo<|im_end|>", "hm two\n</think>\n\nciao<|im_end|>"),
        ("gemma4_v5", "<|channel>thought\nhm one\n<channel|>yo<turn|>", "<|channel>thought\nhm two\n<channel|>ciao<turn|>"),
        ("deepseek_r1_distill", f"hm one\n</think>\n\nyo{EOS}", f"hm two\n</think>\n\nciao{EOS}"),
        ("deepseek_r1_distill_training", f"<{BAR}Assistant{BAR}><think>\nhm one\n</think>\n\nyo{EOS}", f"<{BAR}Assistant{BAR}><think>\nhm two\n</think>\n\nciao{EOS}"),
        ("nemotron_3_nano", "hm one\n</think>\nyo<|im_end|>", "hm two\n</think>\nciao<|im_end|>"),
    ],
)  # fmt: skip
def test_kept_thinking_has_the_templates_own_form_in_every_turn(
    template: str, first: str, second: str, messages: list[dict[str, Any]]
) -> None:
    assert trained(template, messages, thinking="keep") == [first, second]


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        ("gptoss", f"{FINAL}yo<|end|>", f"{FINAL}ciao<|return|>"),
        ("glm4moe", "yo", "ciao"),
        ("gemma4_v5", "yo<turn|>", "ciao<turn|>"),
        ("qwen3", "yo<|im_end|>", "ciao<|im_end|>"),
    ],
)
def test_thinking_in_any_form_is_left_untrained(template: str, first: str, second: str) -> None:
    settings = {"thinking": "keep", "train_on": {"thinking": False}}
    assert trained(template, THOUGHT, **settings) == [first, second]
    assert trained(template, THOUGHT, train_on={"thinking": False})[-1] == second


@pytest.mark.parametrize("key", THOUGHTS)
def test_thinking_is_found_by_each_key_that_a_template_may_read(key: str) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.KEY %}<think>\n{{ m.KEY }}\n</think>\n\n{% endif %}{{ m.content"
        " }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ).replace("KEY", key)
    messages = [{name.replace("reasoning_content", key): value for name, value in turn.items()} for turn in THOUGHT]
    both = [f"<think>\n{thought}\n</think>\n\n" for thought in ("hm one", "hm two")]
    for settings in ({}, {"thinking": "keep"}):
        assert trained(template, messages, **settings) == [f"{both[0]}yo<|end|>", f"{both[1]}ciao<|end|>"]
        silent = trained(template, messages, **settings, train_on={"thinking": False})
        assert silent == ["yo<|end|>", "ciao<|end|>"]
    assert trained(template, messages, thinking="strip") == ["yo<|end|>", "ciao<|end|>"]
    assert encoded(template, messages, thinking="strip")[0].count("think") == 0


def test_a_template_without_a_form_for_thinking_is_refused_where_it_is_to_be_kept() -> None:
    with pytest.raises(DataError, match=r"turn 2: .* leaves out its thinking .* data.thinking to as_template or strip"):
        encoded("llama3", THOUGHT, thinking="keep")
    assert trained("llama3", INLINE, thinking="keep")[0] == "<think>\nhm one\n</think>\n\nyo<|eot_id|>"


def test_thinking_is_not_kept_behind_a_prompt_that_has_closed_it() -> None:
    """As DeepSeek-V3.1's, whose answers without thinking begin with the closing tag."""
    closed = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}</think>{{"
        " m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if"
        " add_generation_prompt %}<|assistant|></think>{% endif %}"
    )
    for messages in (THOUGHT, INLINE):
        with pytest.raises(DataError, match="turn 2: .* leaves out its thinking and shows no form for it"):
            encoded(closed, messages, thinking="keep")
        assert trained(closed, messages, thinking="strip") == ["yo</s>", "ciao</s>"]
    with pytest.raises(DataError, match="turn 2: .* shows no form for an empty block of thinking"):
        encoded(closed, PLAIN, thinking="always")


@pytest.mark.parametrize("template", ["gptoss", "gemma4_v5", "qwen3", "qwen3_8", "nemotron_3_ultra", KIMI])
def test_thinking_in_tags_is_given_where_the_template_reads_it(template: str) -> None:
    """Else gpt-oss's stands in the answer, and that of others behind an empty block."""
    assert encoded(template, INLINE)[0] == encoded(template, THOUGHT)[0]
    nulls = [{**message, "reasoning_content": None} for message in INLINE]  # as in a table, where all rows have a key
    assert encoded(template, nulls)[0] == encoded(template, THOUGHT)[0]


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think"])
def test_stripped_thinking_leaves_no_empty_block(template: str) -> None:
    for messages in (THOUGHT, INLINE, PLAIN):
        assert "think>" not in encoded(template, messages, thinking="strip")[0]


@pytest.mark.parametrize("template", ["llama3", "qwen3"])
def test_tags_without_a_thought_are_stripped_too(template: str) -> None:
    """As the rows of answers without thinking have them that are meant for Qwen3."""
    empty = [{**turn, "content": f"<think>\n\n</think>\n\n{turn['content']}"} for turn in PLAIN[1::2]]
    messages = [PLAIN[0], empty[0], PLAIN[2], empty[1]]
    assert encoded(template, messages, thinking="strip")[0] == encoded(template, PLAIN, thinking="strip")[0]


@pytest.mark.parametrize("messages", [THOUGHT, INLINE, PLAIN], ids=["by key", "in tags", "without"])
@pytest.mark.parametrize(
    ("template", "block", "answer"),
    [
        (KIMI, "<think></think>", "{}<|end|>"),
        (HUNYUAN, "<think>\n\n</think>\n", "<answer>\n{}\n</answer><|end|>"),
        ("glm4moe", "\n<think></think>\n", "{}"),
    ],
    ids=["kimi", "hunyuan", "glm"],
)
def test_an_empty_block_in_every_turn_is_the_templates_own_form_of_an_answer_without_thinking(
    template: str, block: str, answer: str, messages: list[dict[str, Any]]
) -> None:
    answers = [answer.format("yo"), answer.format("ciao")]
    assert trained(template, messages, thinking="strip") == [block + one for one in answers]
    assert trained(template, messages, thinking="strip", train_on={"thinking": False}) == answers
    kept = trained(template, messages, thinking="keep")
    assert [one.replace("hm one", "").replace("hm two", "") for one in kept] == [block + one for one in answers]
    assert messages is PLAIN or ("hm one" in kept[0] and "hm two" in kept[1])


@pytest.mark.parametrize("template", ["llama3", "qwen3", "gptoss", "glm4moe", "qwen3_training"])
def test_tags_in_a_users_words_change_nothing_of_what_is_trained(template: str) -> None:
    open_, close = "what is <think> ?", "and </think> ?"
    tagged = [says("user", open_), says("assistant", "yo"), says("user", close), says("assistant", "ciao")]
    for settings in ({"train_on": {"thinking": False}}, {"thinking": "keep"}, {"thinking": "strip"}):
        assert trained(template, tagged, **settings) == trained(template, PLAIN, **settings)


CALL_OF_DEEPSEEK = f'{CALLS}{CALL}function{SEP}f\n```json\n{{"x": 1}}\n```{NO_CALL}{NO_CALLS}'
CALL_OF_QWEN = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("deepseekv3", CALLING, [CALL_OF_DEEPSEEK + EOS, f"five{EOS}", f"ciao{EOS}"]),
        ("deepseekv3", SPEAKING, ["let me" + CALL_OF_DEEPSEEK + EOS, f"five{EOS}", f"ciao{EOS}"]),
        ("qwen3_5_nothink", CALLING, [f"{CALL_OF_QWEN}<|im_end|>", "five<|im_end|>", "ciao<|im_end|>"]),
        ("gemma4", SPEAKING, ["<|tool_call>call:f{x:1}<tool_call|><|tool_response>", "let me<turn|>", "five<turn|>", "ciao<turn|>"]),
        ("gemma4_v5", SPEAKING, ["<|tool_call>call:f{x:1}<tool_call|><|tool_response>", "let mefive<turn|>", "ciao<turn|>"]),
    ],
    ids=str,
)  # fmt: skip
def test_calls_are_rendered_in_the_form_that_the_template_reads(
    template: str, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    assert trained(template, messages) == expected


# As Mistral's own: the system message stands before the last question.
MISTRAL = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else none %}{{- bos_token }}{%- set talk ="
    " messages[1:] if system else messages %}{%- set asks = talk | selectattr('role', 'eq', 'user') | list %}{%- for m"
    " in talk %}{%- if m.role == 'user' %}{{- '[INST] ' }}{%- if system and m == asks[-1] %}{{- system + '\n\n' }}{%-"
    " endif %}{{- m.content + '[/INST]' }}{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)


def test_turns_are_found_where_the_system_message_moves_to_the_last_question() -> None:
    text, _ = encoded(MISTRAL, [says("system", "be brief"), *PLAIN])
    assert text == "<s>[INST] hi[/INST]« yo</s>»[INST] be brief\n\nbye[/INST]« ciao</s>»"


# As those of SmolVLM and Idefics3: of a content that is text nothing comes out, and of calls nothing ever.
NO_TEXTS = (
    "{% for m in messages %}{{ m.role | capitalize }}:{% if m.content is not string %}{% for part in m.content %}{% if"
    " part.type == 'text' %} {{ part.text }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}{% if"
    " add_generation_prompt %}Assistant:{% endif %}"
)


@pytest.mark.parametrize("template", ["smolvlm", "idefics3", NO_TEXTS])
def test_a_content_is_given_in_parts_where_the_template_reads_no_other(template: str) -> None:
    text, example = encoded(template, PLAIN)
    assert text.count("yo<end_of_utterance>") == text.count(": bye<end_of_utterance>") == 1
    assert not example.left_out


LONG = [says("user", "hi"), says("assistant", "yo\nhow are you?")]
NO_EMPTY_CALLS = "{% if m.tool_calls is defined and not m.tool_calls %}{{ raise_exception('no calls') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        ("deepseek_r1_distill", CALLING, "turn 2: .* calls"),
        ("deepseek_r1_distill", SPEAKING, "turn 2: .* calls"),
        ("gptoss", [says("user", "hi"), calls(None, "f", "g"), RESULT], "turn 2: .* calls"),
        ("gptoss", SPEAKING, "turn 2: .* content"),
        *[(template, talk, "turn 2: .* calls") for template in ("smolvlm", "idefics3") for talk in (CALLING, SPEAKING)],
        (NO_TEXTS, CALLING, "turn 2: .* calls"),
        (NO_TEXTS.replace("<end", NO_EMPTY_CALLS + "<end"), CALLING, "turn 2: .* calls"),
        (NO_TEXTS.replace("is not string", "is not string and m.role == 'user'"), PLAIN, "turn 2: .* content"),
        ("{% for m in messages %}{{ m.role }}{{ m.text }}<|end|>{% endfor %}", PLAIN, "turn 2: .* content"),
        ("{% for m in messages %}{{ m.role }}{{ m.content[:5] }}<|end|>{% endfor %}", LONG, "turn 2: .* content"),
        (
            "{% for m in messages %}{{ m.role }}{{ m.content.split('\n')[0] }}<|end|>{% endfor %}",
            LONG,
            "turn 2: .* content",
        ),
    ],
)
def test_what_the_assistant_says_must_come_out(template: str, messages: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(DataError, match=f"{what}; set data.template"):
        encoded(template, messages)
    silent = [{**m, "weight": 0} if m["role"] == "assistant" and m is not messages[-1] else m for m in messages]
    if what.endswith("calls") and len(messages) > 3:
        assert [text.strip() for text in trained(template, silent)] in ([f"ciao{EOS}"], ["ciao<end_of_utterance>"])


OPEN_TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {%"
    " endif %}"
)


@pytest.mark.parametrize(("template", "end"), [("glm4moe", "end of turn <|user|>"), (OPEN_TURNS, "end of turn")])
def test_a_row_of_which_no_end_is_trained_says_so(template: str, end: str) -> None:
    assert end in encoded(template, PLAIN)[1].left_out
    assert "end of turn" not in encoded(template, PLAIN, train_on={"end": False})[1].left_out
    assert not encoded("qwen2_5", PLAIN)[1].left_out


# As those of Phi-3 and Phi-4: a token of its own ends a conversation, behind that of the last turn.
CLOSED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<|start|>{{"
    " c.function.name }}{% endfor %}<|end|>{{ gap }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}{{"
    " eos_token }}{% endif %}"
)


@pytest.mark.parametrize("gap", ["", "\n"])
def test_a_turn_ends_with_its_own_token_where_another_ends_the_conversation(gap: str) -> None:
    template = f"{{% set gap = {gap!r} %}}{CLOSED}"
    assert trained(template, PLAIN) == ["yo<|end|>", f"ciao<|end|>{gap}</s>"]
    asked = {**RESULT, "role": "user"}  # <|user|> is a token too
    assert trained(template, [PLAIN[0], calls(None, "f"), asked, PLAIN[3]])[0] == "<|start|>f<|end|>"


@pytest.mark.parametrize(
    ("turn", "prompt"),
    [
        ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"),
        ("<|{{ m.role }}|>{{ m.content }}<|end|>\n", "<|assistant|>"),
        ("### {{ m.role }}:\n{{ m.content }}</s>\n", "### assistant:\n"),
    ],
)
def test_a_template_that_always_writes_the_generation_prompt_is_refused(turn: str, prompt: str) -> None:
    """It would be trained behind the last answer."""
    turns = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    with pytest.raises(
        ConfigError, match=r"data\.template: the chat template writes the generation prompt .* behind the last answer"
    ):
        encoded(f"{turns}{prompt}", PLAIN)
    asked = (
        f"{turns}{{% if messages[-1].role != 'assistant' %}}{prompt}{{% endif %}}"  # as many do that ignore the flag
    )
    for good in (asked, f"{turns}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"):
        assert [text.startswith("yo") for text in trained(good, PLAIN)] == [True, False]


def test_what_ends_every_turn_is_no_generation_prompt() -> None:
    ChatTemplate(byte_tokenizer(), "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}").check_prompt()


TEXT = "m.content if m.content is string else m.content[0].text ~ ' in parts'"
NO_ASCII = says("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"x": "ü"}}}])
CALL_TEXTS = "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (f"{{% for m in messages %}}{{{{ {TEXT} }}}};{{% endfor %}}", PLAIN[:2], "hi;yo;"),
        (
            "{% for m in messages %}{{ (TEXT) if m.role == 'user' or m.content is not string }};{% endfor %}".replace("TEXT", TEXT),
            PLAIN[:2],
            "hi in parts;yo in parts;",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' and m.content is string %}{{ raise_exception('no') }}{% endif %}"
            f"{{% for p in m.content %}}{{{{ p.text }}}}{{% endfor %}};{CALL_TEXTS}{{% endfor %}}",
            [PLAIN[0], calls("", "f")],
            'hi;;f{"x": 1}',
        ),
        (f"{{% for m in messages %}}{{{{ m.content }}}};{CALL_TEXTS}{{% endfor %}}", [PLAIN[0], calls("", "f")], 'hi;;f{"x": 1}'),
        (f"{{% for m in messages %}}{{{{ m.content }}}};{CALL_TEXTS}{{% endfor %}}", [PLAIN[0], NO_JSON], "hi;;fx = 1"),
        (f"{{% for m in messages %}}{{{{ m.content }}}};{CALL_TEXTS}{{% endfor %}}", [PLAIN[0], NO_ASCII], 'hi;;f{"x": "ü"}'),
    ],
)  # fmt: skip
def test_a_template_gets_contents_as_texts_and_arguments_as_objects_if_it_writes_them(
    template: str, messages: list[dict[str, Any]], expected: str
) -> None:
    """Otherwise it gets parts, and the JSON of arguments."""
    assert ChatTemplate(byte_tokenizer(), template).render(messages) == expected


def test_what_a_template_encloses_reaches_from_the_end_of_the_token_before() -> None:
    """A tokenizer that writes white space as the beginning of a word may leave it out of the word's place."""
    tokens = {"offset_mapping": [(0, 1), (2, 3), (4, 6), (6, 7), (8, 9)], "assistant_masks": [0, 1, 1, 0, 1]}
    tokenizer = cast(Any, SimpleNamespace(apply_chat_template=lambda messages, **_: tokens))
    assert ChatTemplate(tokenizer, "{% generation %}").enclosed([]) == [(1, 6), (7, 9)]


def test_a_turn_is_ended_by_special_tokens_and_by_the_one_that_the_template_ends_it_with() -> None:
    tokenizer = byte_tokenizer()
    data = Data.model_validate({"train": [{"path": "x"}], "format": "chat"})
    for gap in ("", "\n", " "):
        turn = f"{{{{ m.role }}}}: {{{{ m.content }}}}{gap}<|stop|><|more|>"
        tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
        assert ChatText(tokenizer, data, {7: "<|stop|>", 8: "<|more|>", 9: "", 6: "<pad>"}, {6}).special == {6, 7}


def test_nothing_is_left_out_of_a_row_but_the_systems_message_that_is_dropped() -> None:
    dropped = encoded("qwen2_5", [says("system", "be brief"), *PLAIN], drop_system=True)
    assert (dropped[0].count("be brief"), dropped[1].left_out) == (0, [])
    noted = [says("system", "be brief"), PLAIN[0], {**PLAIN[1], "note": "lost"}]
    assert encoded("qwen2_5", noted, drop_system=True)[1].left_out == ["note"]


def test_a_template_that_is_changed_as_the_line_says_has_its_ends_trained() -> None:
    line = left_out_in_words("end of turn <|user|>")
    assert "but the next turn's <|user|>, so" in line
    assert "a copy of the template that writes <|user|> behind the last answer" in line
    own = (TEMPLATES / "glm4moe.jinja").read_text(encoding="utf-8")
    copy = own + "{% if not add_generation_prompt and messages[-1].role == 'assistant' %}<|user|>{% endif %}"
    assert [text.endswith("<|user|>") for text in trained(copy, PLAIN)] == [True, True]


class Drawn:
    """A template that is a function of all messages and one of them, and its generation prompt."""

    end = behind_an_answer = ""

    def __init__(self, draw: Callable[[list[Any], int], str], prompt: str = "A:") -> None:
        self.draw, self.prompt = draw, prompt

    def render(self, messages: list[Any], tools: Any = None, *, generation_prompt: bool = False) -> str:
        text = "".join(self.draw(messages, turn) for turn in range(len(messages)))
        return text + self.prompt * generation_prompt

    def talk(self, *messages: dict[str, Any]) -> Conversation:
        template: Any = self
        return Conversation(template, re.compile(";"), list(messages), None)


def _spoken(messages: list[Any], turn: int) -> str:
    """A text whose beginning tells how many turns follow. Questions come twice, and so no place in it is known."""
    said = messages[turn]["content"]
    lead = f"[{len(messages)}]" if turn == 0 else ""
    return lead + (f"Q:{said}|{said} " if messages[turn]["role"] == "user" else f"A:{said};")


ASK, TELL = says("user", "q"), says("assistant", "a")


@pytest.mark.parametrize(
    ("prompt", "thought", "expected"),
    [("A:", "", "a;"), ("A:<think>", "", "a;"), ("A:<think>", "<think>x</think>", "x</think>a;")],
)
def test_a_turn_whose_beginning_is_unknown_begins_behind_its_own_prompt(
    prompt: str, thought: str, expected: str
) -> None:
    talk = Drawn(lambda all, turn: _spoken(all, turn).replace("A:", f"A:{thought}"), prompt).talk(ASK, TELL, ASK, TELL)
    assert talk.content(0) is None, "it is written twice"
    for turn in (1, 3):
        ((begin, end),) = talk.written(turn)
        assert talk.whole[begin:end] == expected
    bare = Drawn(lambda all, turn: _spoken(all, turn) if turn < 2 else all[turn]["content"])
    with pytest.raises(DataError, match="turn 4: what the chat template makes"):
        bare.talk(ASK, TELL, ASK, TELL).written(3)


def test_a_turn_begins_behind_the_turn_before_whatever_its_thought_says() -> None:
    """The prompt opens a block of thinking, which stands there in another form."""

    def draw(messages: list[Any], turn: int) -> str:
        lead = f"[{len(messages)}]" if turn == 0 else ""
        said = messages[turn]["content"]
        return lead + (f"Q:{said} " if messages[turn]["role"] == "user" else f"A:(as A: says){said};")

    talk = Drawn(draw, "A:<think>").talk(ASK, TELL, ASK, TELL)
    assert [[talk.whole[slice(*span)] for span in talk.written(turn)] for turn in (1, 3)] == [["(as A: says)a;"]] * 2


def test_a_turn_whose_content_is_written_twice_has_no_place() -> None:
    def draw(messages: list[Any], turn: int) -> str:
        said = messages[turn]["content"]
        return (f"[{len(messages)}]" if turn == 0 else "") + f"{said}|{said};"

    talk = Drawn(draw).talk(ASK, TELL, ASK)
    for place in (talk.said, talk.place):
        with pytest.raises(DataError, match="turn 1: its content is not found in the conversation's text"):
            place(0)
    with pytest.raises(DataError, match="turn 2: what the chat template makes"):
        talk.written(1)


def test_a_question_whose_turn_is_not_found_is_its_content() -> None:
    def draw(messages: list[Any], turn: int) -> str:
        lead = f"[{len(messages)}]" if turn == 0 else ""
        return lead + {"user": "Q:{};", "assistant": "A:{};"}[messages[turn]["role"]].format(messages[turn]["content"])

    talk = Drawn(draw).talk(says("user", "why"), says("assistant", "so"), says("user", "ah"))
    assert talk.whole == "[3]Q:why;A:so;Q:ah;"
    assert [talk.whole[slice(*talk.said(turn))] for turn in (0, 2)] == ["why", "ah;"]
    assert [talk.whole[begin:end] for turn in (0, 1) for begin, end in talk.place(turn)] == ["why", "so;"]


def test_what_a_template_refuses_to_write_is_not_said_to_be_left_out() -> None:
    """It cannot be told by other words than the turn's own."""

    def draw(messages: list[Any], turn: int) -> str:
        calls = [call["function"]["name"] for call in messages[turn].get("tool_calls") or []]
        if messages[turn]["content"] not in ("q", "a", "") or calls not in ([], ["f"]):
            raise DataError("refused")
        return messages[turn]["role"] + ";"

    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for turn in (TELL, {**TELL, "content": "", "tool_calls": [call]}):
        assert Drawn(draw).talk(ASK, turn).vanished([1]) is None
    silent = Drawn(lambda all, turn: all[turn]["role"] + ";").talk(ASK, TELL)
    assert silent.vanished([1]) == (1, "content")


def test_a_turn_takes_no_part_of_the_next_content() -> None:
    """Only the last turn has an end token here, and the next content may begin with the same characters."""

    def draw(messages: list[Any], turn: int) -> str:
        last = turn == len(messages) - 1
        lead = f"[{len(messages)}]" if turn == 0 else ""
        asks = messages[turn]["role"] == "user"
        return lead + ("" if asks else "A:") + messages[turn]["content"] + (";" if last and not asks else "")

    talk = Drawn(draw).talk(ASK, TELL, says("user", "more"), TELL)
    assert [[talk.whole[slice(*span)] for span in talk.written(turn)] for turn in (1, 3)] == [["a"], ["a;"]]
    with pytest.raises(DataError, match="turn 2: what the chat template makes"):
        Drawn(draw).talk(ASK, TELL, says("user", ";more"), TELL).written(1)


def test_turns_whose_places_take_too_long_to_find_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "_MOST_MESSAGES", 8)
    talk = Drawn(_spoken).talk(ASK, TELL, ASK, TELL)
    talk.check_size([3])
    with pytest.raises(DataError, match="4 turns of .* characters are too long to find 2 of them"):
        talk.check_size([1, 3])


def test_a_content_has_no_place_where_it_is_empty_or_without_its_white_space() -> None:
    """Calls come in the place of words, or behind them in a line of their own."""
    words = Drawn(lambda all, turn: "f" if "tool_calls" in all[turn] else all[turn]["content"].strip())
    named = Drawn(
        lambda all, turn: (
            "".join(call["function"]["name"] for call in all[turn].get("tool_calls", [])) or all[turn]["content"]
        )
    )
    assert named.talk(ASK, calls("", "f")).vanished([1]) is None
    assert named.talk(ASK, calls("words", "f")).vanished([1]) == (1, "content")
    silent = words.talk(ASK, says("assistant", "  abcd", untrained=[(2, 4), (5, 6)]))
    assert [silent.whole[slice(*span)] for span in silent.silent(1)] == ["ab", "d"]
    lines = Drawn(lambda all, turn: "A:" + ("\n" + all[turn]["content"] if all[turn]["content"] else "") + "\nf;")
    assert lines.talk(calls("", "f")).content(0) == (3, 3)


def test_parts_of_a_content_are_trained_as_they_say() -> None:
    parts = [{"type": "text", "text": "I guess: "}, {"type": "text", "text": "no, ", "train": False}]
    parts += [{"type": "text", "text": " it is 4.", "train": True}]
    assert trained("qwen2_5", [PLAIN[0], says("assistant", parts)]) == ["I guess: ", " it is 4.<|im_end|>"]
    assert trained("qwen2_5", [PLAIN[0], says("assistant", parts[:1] * 2)]) == ["I guess: \nI guess: <|im_end|>"]
    thought = says("assistant", "yo", reasoning_content=[{"type": "text", "text": "hm"}])
    assert trained("qwen3", [PLAIN[0], thought]) == ["<think>\nhm\n</think>\n\nyo<|im_end|>"]
    with pytest.raises(DataError, match="turn 2 has a part of type 'image'"):
        trained("qwen3", [PLAIN[0], says("assistant", "yo", reasoning_content=[{"type": "image"}])])


def test_ranges_of_a_content_are_trained_as_they_say() -> None:
    ranges = ((0, 1, False), (3, 5, True), (7, 7, True))
    detail = [{"begin_offset": begin, "end_offset": end, "train": told} for begin, end, told in ranges]
    for template in ("qwen2_5", "qwen2_5_training"):
        found = trained(template, [PLAIN[0], says("assistant", "no yes so", train_detail=detail)])
        assert [piece.strip() for piece in found if piece.strip()] == ["yes", "s", "<|im_end|>"]
    for wrong in ([{"begin_offset": 0, "end_offset": 9, "train": True}], [{"begin_offset": 0}], "x"):
        with pytest.raises(DataError, match="turn 2 has a train_detail that is no list"):
            trained("qwen2_5", [PLAIN[0], says("assistant", "no yes so", train_detail=wrong)])
    loud = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="turn 2: the chat template rewrites its content, so which characters"):
        trained(loud, [PLAIN[0], says("assistant", "no yes so", train_detail=detail)])
    parts = [{"type": "text", "text": "yes", "train": True}, {"type": "text", "text": "", "train": False}]
    assert trained(loud, [PLAIN[0], says("assistant", parts)]) == trained(loud, [PLAIN[0], says("assistant", "yes")])


@pytest.mark.parametrize("template", ["qwen2_5", "qwen2_5_training"])
def test_a_users_turn_is_trained_where_its_row_asks_for_it(template: str) -> None:
    asked = [{**PLAIN[0], "train": True}, PLAIN[1], {**PLAIN[2], "weight": 1}, PLAIN[3]]
    assert [piece.strip() for piece in trained(template, asked)] == ["hi<|im_end|>", "yo<|im_end|>", "ciao<|im_end|>"]


@pytest.mark.parametrize(("weight", "train"), [(0, True), (1, False), (0, False)])
def test_a_turn_that_either_key_leaves_out_is_not_trained(weight: int, train: bool) -> None:
    for at, others in ((1, ["ciao<|im_end|>"]), (2, ["yo<|im_end|>", "ciao<|im_end|>"])):
        talk = [{**m, "weight": weight, "train": train} if place == at else m for place, m in enumerate(PLAIN)]
        assert [piece.strip() for piece in trained("qwen2_5", talk)] == others


def test_a_message_with_a_role_is_read_by_it_whatever_else_it_has() -> None:
    found = read_messages([{"from": "human", "value": "x", **PLAIN[0]}, {"from": "gpt", "value": "yo"}])
    assert [(message["role"], message["content"]) for message in found] == [("user", "hi"), ("assistant", "yo")]


def test_a_developers_message_stands_for_the_systems() -> None:
    own = [says("developer", "be brief"), *PLAIN]
    assert with_default_system(own, "be long") == own
    assert with_default_system(PLAIN, "be long") == [says("system", "be long"), *PLAIN]
    assert with_default_system(PLAIN, None) == PLAIN


def test_a_conversation_of_which_only_the_systems_message_is_left_out_has_to_have_another() -> None:
    system = says("system", "be brief")
    assert without_system([system, *PLAIN]) == without_system(PLAIN) == PLAIN
    with pytest.raises(DataError, match="its only message is the system's"):
        without_system([system])


def test_a_text_may_be_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.format.messages.LONGEST_TEXT", 1200)
    assert text_of("x" * 1200, "content") == "x" * 1200
    with pytest.raises(DataError, match="the content has 1,201 characters; at most 1,200 are allowed"):
        text_of("x" * 1201, "content")


def test_a_history_is_questions_with_their_answers() -> None:
    asked = ask({"instruction": "c", "history": [["a", "A"], ["b", "B"]]})
    assert [message["content"] for message in asked] == ["a", "A", "b", "B", "c"]
    assert [message["role"] for message in asked] == ["user", "assistant"] * 2 + ["user"]
    for wrong in ("a", [["a"]], [["a", "A"], ["b", "B", "c"]], [{"a": 1, "b": 2}]):
        with pytest.raises(DataError, match="the history is not a list of"):
            ask({"instruction": "c", "history": wrong})


def test_tools_that_another_template_would_render_are_refused() -> None:
    """Where the base has a template of its own for calls, programs take that one; the training has one template for
    all.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ENDS})
    qwen = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = {"default": qwen, "tool_use": "!" + qwen}  # type: ignore[assignment]
    rows = [{"messages": PLAIN}, {"messages": CALLING, "tools": [{"type": "function", "function": {"name": "f"}}]}]
    for template, refused in ((None, True), (str(TEMPLATES / "qwen3.jinja"), False)):
        data = Data.model_validate({"train": [{"path": "x"}], "format": "chat", "template": template})
        plain, with_tools = Renderer(tokenizer, data).encode(rows)
        assert isinstance(plain, Example)
        assert isinstance(with_tools, DataError) is refused
        assert not refused or "set data.template to a file with that template" in str(with_tools)


@pytest.mark.parametrize(
    ("system", "messages", "first"),
    [
        ("be brief", PLAIN, says("system", "be brief")),
        ("be brief", [says("system", "be long"), *PLAIN], says("system", "be long")),
        ("be brief", [{"from": "system", "value": "be long"}], {"from": "system", "value": "be long"}),
        ("be brief", [], says("system", "be brief")),
        ("", PLAIN, PLAIN[0]),
        (None, PLAIN, PLAIN[0]),
    ],
)
def test_a_rows_own_system_message_goes_first_unless_there_is_one(
    system: str | None, messages: list[Any], first: dict[str, Any]
) -> None:
    found = with_system({"system": system}, messages)
    assert found[0] == first
    assert len(found) - len(messages) == (first not in messages)
    assert with_system({}, messages) == messages


def test_messages_that_are_no_list_are_refused_by_their_type() -> None:
    assert talk({"messages": PLAIN}) == PLAIN
    with pytest.raises(DataError, match="chosen: this is of type str, and not a list of messages"):
        talk({"messages": PLAIN, "chosen": "hi"}, "chosen")


@pytest.mark.parametrize(("unended", "lacks"), [("first", False), ("last", True)])
def test_the_last_of_the_turns_that_a_template_encloses_has_to_end(unended: str, lacks: bool) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        f"{{% if not loop.{unended} %}}<|im_end|>{{% endif %}}{{% endgeneration %}}{{% else %}}{{{{ m.content }}}}"
        "<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ).replace("loop.first", "loop.index == 2")
    found = encoded(template, PLAIN)[1].left_out
    assert [one.startswith("end of turn") for one in found] == [True] * lacks
