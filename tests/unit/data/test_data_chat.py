from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainer.config import Data
from trainer.data.format.messages import read_messages
from trainer.data.render import chat
from trainer.data.render.chat import Example
from trainer.errors import ConfigError, DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Leaves out what earlier turns thought, as reasoning models do: a turn looks different once others follow.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last and message.role == 'assistant' %}<think></think> {% endif %}{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["assistant", "user", "system", "hi", "yo", "bye", "ciao", "be", "brief", "\n", "<think></think>"]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


class Renderer(chat.Renderer):
    def one(self, row: dict[str, Any]) -> Example:
        """The example of one row; raises what is wrong with it."""
        (example,) = self.encode([row])
        if isinstance(example, DataError):
            raise example
        return example


def tokenizer(template: str | None = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each word, line break and special token."""
    special = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[:2],
    )
    result.chat_template = template
    return result


def data(**settings: Any) -> Data:
    return Data.model_validate({"train": [{"path": "x.jsonl"}], "format": "chat", **settings})


def trained(example: Example) -> list[str]:
    """The trained tokens, with a bar between those that do not follow each other."""
    assert len(example.tokens) == len(example.targets)
    names = tokenizer().convert_ids_to_tokens(example.tokens.tolist())
    words, previous = [], True
    for name, target in zip(names, example.targets, strict=True):
        if target:
            words += [name] if previous or not words else ["|", name]
        previous = target
    return words


ASSISTANT = ["yo", "yo", "<|im_end|>", "|", "ciao", "<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize(("turns", "expected"), [("all", ASSISTANT), ("last", ["ciao", "<|im_end|>"])])
def test_assistant_turns_are_trained_up_to_their_end_token(template: str, turns: str, expected: list[str]) -> None:
    example = Renderer(tokenizer(template), data(train_on={"turns": turns})).one({"messages": TALK})
    assert trained(example) == expected


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_all_trains_everything_but_the_first_token(template: str) -> None:
    example = Renderer(tokenizer(template), data(train_on={"roles": "all"})).one({"messages": TALK})
    assert example.targets.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_an_empty_last_turn_does_not_train_the_one_before() -> None:
    talk = [*TALK[:-1], {"role": "assistant", "content": ""}]
    example = Renderer(tokenizer(TAGGED), data(train_on={"turns": "last"})).one({"messages": talk})
    assert trained(example) == ["<|im_end|>"]


def test_without_an_end_token_the_line_break_ends_a_turn_and_is_trained() -> None:
    template = (
        "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    example = Renderer(tokenizer(template), data(train_on={"turns": "last"})).one({"messages": TALK})
    assert trained(example) == ["ciao", "\n"]


def test_a_template_file_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TAGGED)
    renderer = Renderer(tokenizer(None), data(template=str(tmp_path / "t.jinja")))
    assert trained(renderer.one({"messages": TALK})) == ASSISTANT


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_a_begin_token_that_the_template_writes_is_not_doubled(template: str) -> None:
    example = Renderer(tokenizer("{{ bos_token }}" + template, adds_bos=True), data()).one({"messages": TALK})
    assert tokenizer().convert_ids_to_tokens(example.tokens.tolist())[:2] == ["<s>", "<|im_start|>"]
    assert trained(example) == ASSISTANT


def test_fields_beside_role_and_content_reach_the_template() -> None:
    template = "{% for message in messages %}{{ message.mood or 'hi' }} {{ message.content }} {% endfor %}"
    talk = [{"role": "user", "content": "yo", "mood": "bye"}, {"role": "assistant", "content": "ciao", "mood": None}]
    example = Renderer(tokenizer(template), data(train_on={"roles": "all"})).one({"messages": talk})
    assert tokenizer().convert_ids_to_tokens(example.tokens.tolist()) == ["bye", "yo", "hi", "ciao"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("system", "system"), ("observation", "tool"),
        *((role, role) for role in ("user", "assistant", "tool", "developer")),
    ],
)  # fmt: skip
def test_each_name_of_sharegpt_is_a_role(name: str, role: str) -> None:
    assert read_messages([{"from": name, "value": "a"}]) == [{"role": role, "content": "a"}]


def test_sharegpt_messages_are_the_same_as_openais() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[message["role"]], "value": message["content"]} for message in TALK]
    renderer = Renderer(tokenizer(), data(fields={"messages": "conversations"}))
    ours, theirs = renderer.one({"conversations": sharegpt}), Renderer(tokenizer(), data()).one({"messages": TALK})
    assert (ours.tokens.tolist(), trained(ours)) == (theirs.tokens.tolist(), trained(theirs))


def test_a_conversation_without_an_answer_has_no_targets() -> None:
    assert not any(Renderer(tokenizer(), data()).one({"messages": TALK[:2]}).targets)
    assert not any(Renderer(tokenizer(TAGGED), data()).one({"messages": TALK[:2]}).targets)


def weighted(*weights: Any) -> list[dict[str, Any]]:
    """TALK, whose messages have these weights, or these keys; None for none."""
    keys = [{} if w is None else w if isinstance(w, dict) and w else {"weight": w} for w in weights]
    return [{**message, **more} for message, more in zip(TALK, keys, strict=True)]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize(
    ("turns", "weights", "expected"),
    [
        ("all", (None, None, 0, None, None), ["ciao", "<|im_end|>"]),
        ("all", (0, 0, 0, 0, 1), ["ciao", "<|im_end|>"]),
        ("all", (None, None, 0.0, None, False), []),
        ("last", (None, None, 1, None, 0), []),
        ("last", (None, None, 0, None, 1), ["ciao", "<|im_end|>"]),
        ("all", (None, None, {"weight": 1, "train": False}, None, {"weight": 0, "train": True}), []),
        ("all", (None, None, {"train": False}, None, {"train": True}), ["ciao", "<|im_end|>"]),
    ],
)
def test_a_message_of_weight_zero_is_not_trained(
    template: str, turns: str, weights: tuple[Any, ...], expected: list[str]
) -> None:
    renderer = Renderer(tokenizer(template), data(train_on={"turns": turns}))
    example, plain = (renderer.one({"messages": messages}) for messages in (weighted(*weights), TALK))
    assert example.tokens.tolist() == plain.tokens.tolist()
    assert trained(example) == expected


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_where_all_is_trained_a_message_of_weight_zero_is_not(template: str) -> None:
    messages = weighted(None, 0, None, None, 0)
    example = Renderer(tokenizer(template), data(train_on={"roles": "all"})).one({"messages": messages})
    words = [word for word in trained(example) if word != "\n"]
    assistant = ["<|im_start|>", "assistant", "yo", "yo", "<|im_end|>"]
    assert words == [
        "system",
        "be",
        "brief",
        "<|im_end|>",
        "|",
        *assistant,
        "<|im_start|>",
        "user",
        "bye",
        "<|im_end|>",
    ]


@pytest.mark.parametrize("weight", [0.5, -1, 2, "0", [], {}, float("nan")])
def test_any_other_weight_is_a_bad_row(weight: Any) -> None:
    for messages in (
        weighted(None, None, weight, None, None),
        [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", "weight": weight}],
    ):
        with pytest.raises(DataError, match=r"turn [23] has the weight .*; allowed are 0, which is not trained, and 1"):
            Renderer(tokenizer(), data()).one({"messages": messages})


def test_a_weight_counts_in_sharegpts_form_too() -> None:
    talk = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yo", "weight": 0},
        {"from": "human", "value": "bye"},
    ]
    example = Renderer(tokenizer(), data()).one({"messages": [*talk, {"from": "gpt", "value": "ciao"}]})
    assert trained(example) == ["ciao", "<|im_end|>"]


def test_turns_are_found_where_the_template_rewrites_earlier_ones_but_not_where_it_drops_them() -> None:
    thinking = ["<think></think>", "ciao", "<|im_end|>"]
    assert trained(Renderer(tokenizer(FORGETFUL), data()).one({"messages": TALK})) == [*ASSISTANT[:4], *thinking]
    dropping = "{% for message in messages if message.content != 'yo yo' %}" + CHATML.removeprefix(
        "{% for message in messages %}"
    )
    with pytest.raises(DataError, match=r"^turn 3: .* not how the whole begins.*generation"):
        Renderer(tokenizer(dropping), data()).one({"messages": TALK})
    last = Renderer(tokenizer(FORGETFUL), data(train_on={"turns": "last"}))
    assert trained(last.one({"messages": TALK})) == ["<think></think>", "ciao", "<|im_end|>"]


@pytest.mark.timeout(60)
def test_a_conversation_whose_turns_would_take_very_long_to_find_is_a_bad_row() -> None:
    long = [TALK[1], TALK[2]] * 600
    refusal = r"^1,200 turns of \d+,\d+ characters are too long to find 600 of them in the text; split the conversation"
    with pytest.raises(DataError, match=refusal):
        Renderer(tokenizer(), data()).one({"messages": long})
    with pytest.raises(DataError, match="1,200 turns .* to find 1,200 of them"):
        Renderer(tokenizer(), data(train_on={"roles": "all"})).one(
            {"messages": [{**message, "weight": 0} for message in long]}
        )
    wide = [{"role": "user", "content": "hi " * 50_000}, TALK[2]] * 100
    with pytest.raises(DataError, match="200 turns of .* to find 100 of them"):
        Renderer(tokenizer(), data()).one({"messages": wide[:198] + TALK[1:3]})
    assert len(Renderer(tokenizer(), data()).one({"messages": long[:200]}).tokens)
    for template, train_on in ((CHATML, {"turns": "last"}), (CHATML, {"roles": "all"}), (TAGGED, {})):
        assert any(Renderer(tokenizer(template), data(train_on=train_on)).one({"messages": long}).targets)


def test_a_template_that_raises_is_quoted() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the chat template refuses the conversation: roles must alternate"):
        Renderer(tokenizer(template), data()).one({"messages": TALK})


def test_a_template_that_fails_in_its_own_way_is_quoted_too() -> None:
    with pytest.raises(DataError, match="refuses the conversation: .*division"):
        Renderer(tokenizer("{{ 1 // 0 }}"), data()).one({"messages": TALK})


@pytest.mark.parametrize(
    ("template", "words"), [("a\n{{ messages[0] ", "line 2: unexpected end of template"), ("{{ 1 | own }}", "'own'")]
)
def test_a_template_that_is_no_jinja_is_a_mistake_of_the_settings_and_of_no_row(template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.template: .*{words}"):
        Renderer(tokenizer(template), data(on_bad_row="skip")).one({"messages": TALK})


def test_half_a_surrogate_pair_is_found_wherever_the_template_takes_it_from() -> None:
    renderer = Renderer(
        tokenizer("{% for message in messages %}{{ message.mood }}{% endfor %}"), data(train_on={"roles": "all"})
    )
    with pytest.raises(DataError, match="the conversation's text has half of a surrogate pair"):
        renderer.one({"messages": [{"role": "user", "content": "hi", "mood": "\ud800"}]})


def test_tools_and_calls_reach_the_template_as_objects() -> None:
    """OpenAI writes a call's arguments as a string; Arrow files hold tools as one."""
    template = (
        "{% for tool in tools %}{{ tool.name }} {% endfor %}"
        "{% for message in messages %}{{ message.role }} {{ message.content }} "
        "{% for call in message.tool_calls or [] %}{{ call.function.arguments.word }} {% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "say", "arguments": '{"word": "ciao"}'}}
    talk = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    for tools, name in (([{"name": "be"}], "tools"), ('[{"name": "be"}]', "functions")):
        settings = data(train_on={"roles": "all"}, fields={"tools": name})
        example = Renderer(tokenizer(template), settings).one({"messages": talk, name: tools})
        words = tokenizer().convert_ids_to_tokens(example.tokens.tolist())
        assert words == ["be", "user", "hi", "assistant", "ciao"]


def test_rows_are_encoded_together_as_alone() -> None:
    rows = [{"messages": TALK}, {"messages": None}, {"messages": TALK[:3]}]
    first, bad, last = Renderer(tokenizer(), data()).encode(rows)
    assert isinstance(bad, DataError)
    assert isinstance(first, Example)
    assert isinstance(last, Example)
    assert (trained(first), trained(last)) == (ASSISTANT, ["yo", "yo", "<|im_end|>"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": None}, "the messages are null, and not a list"),
        ({"messages": TALK, "tools": "[oops"}, "tools are given as text that is not JSON"),
        ({"messages": TALK, "tools": {"name": "x"}}, "the tools are an object, and not a list of objects"),
        ({"messages": [TALK[1], {**TALK[2], "tool_calls": ["x"]}]}, "turn 2 has a tool call that is of type str"),
        ({"messages": [{"role": "user", "content": "x" * (16 * 2**20 + 1)}]}, "turn 1 has 16,777,217 characters"),
        ({"talk": TALK, "id": 1}, r"no field 'messages' \(the row has: talk, id\); data\.fields renames fields"),
        ({"messages": "hi"}, "the messages are of type str, and not a list"),
        ({"messages": []}, "the messages are an empty list"),
        ({"messages": ["hi"]}, "turn 1 is of type str, and not an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "turn 1 has the role 'bot'; allowed are system, developer"),
        ({"messages": [{"from": "bot", "value": "x"}]}, "turn 1 has the role 'bot'; allowed are human, gpt, system"),
        ({"messages": [TALK[0], {"role": "user", "content": None}]}, "the content of turn 2 is null, and not a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 has a part of type 'image'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "content of turn 1 has half of a surrogate pair"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"turn 1 has the role \['user'\]"),
        ({"messages": [{"from": ["human"], "value": "x"}]}, r"turn 1 has the role \['human'\]"),
        ({"messages": TALK[2:]}, "turn 1 is the assistant's"),
    ],
)
def test_a_row_of_another_shape_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Renderer(tokenizer(), data()).one(row)


def test_a_missing_template_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"data\.template: .* no chat template\. Set it to"):
        Renderer(tokenizer(None), data())


def test_a_template_may_be_given_as_text() -> None:
    given = CHATML.replace("<|im_end|>", "</s>")
    example = Renderer(tokenizer(), data(template=given)).one({"messages": TALK})
    assert trained(example) == ["yo", "yo", "</s>", "|", "ciao", "</s>"]


def test_a_conversation_without_a_system_message_gets_the_one_that_is_set() -> None:
    renderer = Renderer(tokenizer(), data(system="be brief"))
    own = [{"role": "system", "content": "ciao"}, *TALK[1:]]
    with_it, without = renderer.one({"messages": TALK}), renderer.one({"messages": TALK[1:]})
    assert without.tokens.tolist() == with_it.tokens.tolist()
    assert trained(without) == trained(with_it)
    assert renderer.one({"messages": own}).tokens.tolist() != with_it.tokens.tolist()
    assert renderer.turns({"messages": TALK[1:]})[0].content == "be brief"
    replaced = Renderer(tokenizer(), data(system="be brief", drop_system=True)).one({"messages": own})
    assert replaced.tokens.tolist() == with_it.tokens.tolist()
    without_one = Renderer(tokenizer(), data(drop_system=True))
    for here, roles in ((renderer, ["system", "user"]), (without_one, ["user", "assistant"])):
        assert [turn.role for turn in here.turns({"messages": own})[:2]] == roles


def test_only_the_end_of_the_last_trained_turn_is_trained_if_that_is_asked_for() -> None:
    every, last = (Renderer(tokenizer(), data(train_on={"end": end})).one({"messages": TALK}) for end in (True, "last"))
    assert trained(every) == ["yo", "yo", "<|im_end|>", "|", "ciao", "<|im_end|>"]
    assert trained(last) == ["yo", "yo", "|", "ciao", "<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_what_a_template_writes_around_an_answer_is_trained_if_that_is_asked_for(template: str) -> None:
    example = Renderer(tokenizer(template), data(train_on={"frame": True})).one({"messages": TALK})
    framed = ["<|im_start|>", "assistant", "\n", "yo", "yo", "<|im_end|>", "\n"]
    plain = ["yo", "yo", "<|im_end|>"]
    answer = framed if template == CHATML else plain
    last = ["ciao", "<|im_end|>"]
    tail = Renderer(tokenizer(template), data(train_on={"frame": "tail"})).one({"messages": TALK})
    ends = ["\n"] if template == CHATML else []
    assert trained(tail) == [*plain, *ends, "|", *last, *ends]
    only = Renderer(tokenizer(template), data(train_on={"frame": "tail", "end": "last"})).one({"messages": TALK})
    assert trained(only) == ["yo", "yo", "|", *last, *ends]
    both = data(train_on={"frame": "tail", "roles": ["user", "assistant"]})
    users = [["hi", "<|im_end|>"], ["bye", "<|im_end|>"]]
    each = ["|", *users[0], "|", *plain, *ends, "|", *users[1], "|", *last, *ends]
    assert trained(Renderer(tokenizer(template), both).one({"messages": TALK})) == each[1:], "a user's end has no tail"
    assert trained(example) == [*answer, "|", *([*framed[:3], *last, "\n"] if template == CHATML else last)]


def test_the_whole_of_a_conversation_is_trained_and_of_a_prompt_and_its_completion_the_completion() -> None:
    talk = {"messages": TALK[1:3]}
    everything, whole = (Renderer(tokenizer(), data(train_on={"roles": kind})).one(talk) for kind in ("all", "whole"))
    assert trained(whole) == trained(everything)
    assert data(train_on={"roles": "whole"}).targets == data(train_on={"roles": "all"}).targets
    row = {"prompt": "hi", "completion": " yo"}
    plain, whole = (
        Renderer(tokenizer(), data(format="prompt_completion", train_on=on)).one(row) for on in ({}, {"roles": "whole"})
    )
    assert trained(whole) == trained(plain) == ["yo", "</s>"]
    assert (
        data(format="prompt_completion", train_on={"roles": "whole"}).targets
        == data(format="prompt_completion").targets
    )


def test_a_prompt_and_its_completion_are_tokenized_apart_if_that_is_asked_for() -> None:
    row = {"prompt": "hi yo", "completion": "bye ciao"}
    whole = Renderer(tokenizer(), data(format="prompt_completion")).one(row)
    assert tokenizer().convert_ids_to_tokens(whole.tokens.tolist()) == ["hi", "<unk>", "ciao", "</s>"]
    apart = Renderer(tokenizer(), data(format="prompt_completion", tokenize_apart=True)).one(row)
    assert tokenizer().convert_ids_to_tokens(apart.tokens.tolist()) == ["hi", "yo", "bye", "ciao", "</s>"]
    assert trained(apart) == ["bye", "ciao", "</s>"]
    everything = data(format="prompt_completion", tokenize_apart=True, train_on={"roles": "all"})
    assert trained(Renderer(tokenizer(), everything).one(row)) == ["yo", "bye", "ciao", "</s>"]
    silent = Renderer(tokenizer(), data(format="prompt_completion", tokenize_apart=True)).one({**row, "completion": ""})
    assert trained(silent) == []
    parts = {
        "segments": [{"text": "hi", "label": True}, {"text": "yo", "label": False}, {"text": "bye", "label": True}]
    }
    segments = Renderer(tokenizer(), data(format="segments", tokenize_apart=True)).one(parts)
    assert (segments.tokens.tolist(), segments.targets.tolist()) == (
        tokenizer().convert_tokens_to_ids(["hi", "yo", "bye"]),
        [False, False, True],  # nothing predicts the first token
    )
    with pytest.raises(ValueError, match="data.tokenize_apart: has no effect with data.format: text"):
        data(format="text", tokenize_apart=True)
