import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.material import byte_tokenizer
from trainer.config import Data
from trainer.data import chat
from trainer.data.chat import Example
from trainer.data.left_out import left_out
from trainer.data.messages import read_messages
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
@pytest.mark.parametrize(("loss_on", "expected"), [(None, ASSISTANT), ("last_assistant", ["ciao", "<|im_end|>"])])
def test_assistant_turns_are_trained_up_to_their_end_token(
    template: str, loss_on: str | None, expected: list[str]
) -> None:
    example = Renderer(tokenizer(template), data(loss_on=loss_on)).one({"messages": TALK})
    assert trained(example) == expected


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_all_trains_everything_but_the_first_token(template: str) -> None:
    example = Renderer(tokenizer(template), data(loss_on="all")).one({"messages": TALK})
    assert example.targets.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_an_empty_last_turn_does_not_train_the_one_before() -> None:
    talk = [*TALK[:-1], {"role": "assistant", "content": ""}]
    example = Renderer(tokenizer(TAGGED), data(loss_on="last_assistant")).one({"messages": talk})
    assert trained(example) == ["<|im_end|>"]


def test_without_an_end_token_the_line_break_ends_a_turn_and_is_trained() -> None:
    template = (
        "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    example = Renderer(tokenizer(template), data(loss_on="last_assistant")).one({"messages": TALK})
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
    example = Renderer(tokenizer(template), data(loss_on="all")).one({"messages": talk})
    assert tokenizer().convert_ids_to_tokens(example.tokens.tolist()) == ["bye", "yo", "hi", "ciao"]


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
    """TALK, whose messages have these weights; None for none."""
    return [message if w is None else {**message, "weight": w} for message, w in zip(TALK, weights, strict=True)]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize(
    ("loss_on", "weights", "expected"),
    [
        (None, (None, None, 0, None, None), ["ciao", "<|im_end|>"]),
        (None, (0, 0, 0, 0, 1), ["ciao", "<|im_end|>"]),
        (None, (None, None, 0.0, None, False), []),
        ("last_assistant", (None, None, 1, None, 0), []),
        ("last_assistant", (None, None, 0, None, 1), ["ciao", "<|im_end|>"]),
    ],
)
def test_a_message_of_weight_zero_is_not_trained(
    template: str, loss_on: str | None, weights: tuple[Any, ...], expected: list[str]
) -> None:
    example = Renderer(tokenizer(template), data(loss_on=loss_on)).one({"messages": weighted(*weights)})
    plain = Renderer(tokenizer(template), data(loss_on=loss_on)).one({"messages": TALK})
    assert example.tokens.tolist() == plain.tokens.tolist()
    assert trained(example) == expected


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_where_all_is_trained_a_message_of_weight_zero_is_not(template: str) -> None:
    messages = weighted(None, 0, None, None, 0)
    example = Renderer(tokenizer(template), data(loss_on="all")).one({"messages": messages})
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


CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
WITH_CALL = [
    {"role": "user", "content": "how is the weather ?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
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
    example = Renderer(tokenizer(template), data(loss_on="all")).one(row)
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
    [
        ('hi {"note": "one\\n two\\tthree"}', "one\n\ntwo three", []),
        ("hi one two  three", " one\ntwo three\n", []),
        ("hi C:\\\\new", "C:\\new", []),
        ("hi one two", "one three", ["note"]),
    ],
)
def test_what_stands_in_the_text_otherwise_is_not_left_out(text: str, note: str, lost: list[str]) -> None:
    given = [{"role": "user", "content": "hi", "note": note}]
    assert left_out(given, read_messages(given), text) == lost


def test_turns_are_found_where_the_template_rewrites_earlier_ones_but_not_where_it_drops_them() -> None:
    thinking = ["<think></think>", "ciao", "<|im_end|>"]
    assert trained(Renderer(tokenizer(FORGETFUL), data()).one({"messages": TALK})) == [*ASSISTANT[:4], *thinking]
    dropping = "{% for message in messages if message.content != 'yo yo' %}" + CHATML.removeprefix(
        "{% for message in messages %}"
    )
    with pytest.raises(DataError, match=r"^turn 3: .* not how the whole begins.*generation"):
        Renderer(tokenizer(dropping), data()).one({"messages": TALK})
    last = Renderer(tokenizer(FORGETFUL), data(loss_on="last_assistant"))
    assert trained(last.one({"messages": TALK})) == ["<think></think>", "ciao", "<|im_end|>"]


@pytest.mark.timeout(60)
def test_a_conversation_whose_turns_would_take_very_long_to_find_is_a_bad_row() -> None:
    long = [TALK[1], TALK[2]] * 600
    refusal = r"^1,200 turns of \d+,\d+ characters are too long to find 600 of them in the text; split the conversation"
    with pytest.raises(DataError, match=refusal):
        Renderer(tokenizer(), data()).one({"messages": long})
    with pytest.raises(DataError, match="1,200 turns .* to find 1,200 of them"):
        Renderer(tokenizer(), data(loss_on="all")).one({"messages": [{**message, "weight": 0} for message in long]})
    wide = [{"role": "user", "content": "hi " * 50_000}, TALK[2]] * 100
    with pytest.raises(DataError, match="200 turns of .* to find 100 of them"):
        Renderer(tokenizer(), data()).one({"messages": wide[:198] + TALK[1:3]})
    assert len(Renderer(tokenizer(), data()).one({"messages": long[:200]}).tokens)
    for template, loss_on in ((CHATML, "last_assistant"), (CHATML, "all"), (TAGGED, "assistant")):
        assert any(Renderer(tokenizer(template), data(loss_on=loss_on)).one({"messages": long}).targets)


def test_a_template_that_raises_is_quoted() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the chat template refuses the conversation: roles must alternate"):
        Renderer(tokenizer(template), data()).one({"messages": TALK})


def test_a_template_that_fails_in_its_own_way_is_quoted_too() -> None:
    with pytest.raises(DataError, match="refuses the conversation: .*division"):
        Renderer(tokenizer("{{ 1 // 0 }}"), data()).one({"messages": TALK})


def test_half_a_surrogate_pair_is_found_wherever_the_template_takes_it_from() -> None:
    renderer = Renderer(tokenizer("{% for message in messages %}{{ message.mood }}{% endfor %}"), data(loss_on="all"))
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
    for tools in ([{"name": "be"}], '[{"name": "be"}]'):
        example = Renderer(tokenizer(template), data(loss_on="all")).one({"messages": talk, "tools": tools})
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


def test_prompt_completion_trains_the_completion_and_the_end() -> None:
    row = {"prompt": "hi ", "completion": "yo yo"}
    example = Renderer(tokenizer(), data(format="prompt_completion")).one(row)
    assert trained(example) == ["yo", "yo", "</s>"]
    example = Renderer(tokenizer(), data(format="prompt_completion", loss_on="all")).one(row)
    assert tokenizer().convert_ids_to_tokens(example.tokens.tolist()) == ["hi", "yo", "yo", "</s>"]
    assert example.targets.tolist() == [False, True, True, True]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_nothing_to_say_is_not_trained(adds_bos: bool) -> None:
    words = tokenizer(adds_bos=adds_bos)
    answer = Renderer(words, data(format="prompt_completion")).one({"prompt": "hi", "completion": ""})
    assert not any(answer.targets)
    assert not any(Renderer(words, data(format="text")).one({"text": ""}).targets)


def test_a_token_across_the_border_and_every_byte_of_a_character_are_trained() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hi yo hi yo"], trainer)
    bpe = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    renderer = Renderer(bpe, data(format="prompt_completion"))
    example = renderer.one({"prompt": "hi ", "completion": "yo"})
    assert bpe.convert_ids_to_tokens(example.tokens.tolist()) == ["hi", "Ġyo", "</s>"]
    assert example.targets.tolist() == [False, True, True]
    example = renderer.one({"prompt": "hi", "completion": "🙂"})
    assert example.targets.tolist() == [False] + [True] * 5
    # Text that the tokenizer rewrites is not found by its bytes: three characters become two tokens of two bytes each.
    bpe.backend_tokenizer.normalizer = normalizers.NFC()
    example = Renderer(bpe, data(format="prompt_completion")).one({"prompt": "e\u0301", "completion": "e\u0301"})
    assert len(example.tokens) == 5
    assert example.targets.tolist() == [False, False, True, True, True]
    # White space is text, also where a tokenizer leaves it out of its offsets.
    bpe.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for prompt in ("e\u0301", "\u00e9"):
        example = Renderer(bpe, data(format="prompt_completion")).one({"prompt": prompt, "completion": "  yo"})
        assert example.targets.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("adds_bos", "text", "expected"),
    [
        (False, "hi yo", ["hi", "yo", "</s>"]),
        (True, "hi yo", ["<s>", "hi", "yo", "</s>"]),
        (True, "<s>hi yo</s>", ["<s>", "hi", "yo", "</s>"]),
    ],
)
def test_text_is_framed_once(adds_bos: bool, text: str, expected: list[str]) -> None:
    example = Renderer(tokenizer(adds_bos=adds_bos), data(format="text")).one({"text": text})
    assert tokenizer().convert_ids_to_tokens(example.tokens.tolist()) == expected
    assert example.targets.tolist() == [False] + [True] * (len(expected) - 1)


def damaged_tokenizer(**parts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes whose tokenizer.json has other `parts`: transformers loads it all the same."""
    whole = json.loads(byte_tokenizer().backend_tokenizer.to_str()) | parts
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token="</s>")
    made.chat_template = CHATML
    return made


UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0], *([letter, -1.0] for letter in "onetw hia")]}


@pytest.mark.parametrize("format_", ["chat", "text"])
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            {"model": {"type": "WordLevel", "vocab": {"</s>": 0, "hi": 1}, "unk_token": "[UNK]"}},
            r"Missing \[UNK\] token",
        ),
        ({"model": UNIGRAM | {"vocab": UNIGRAM["vocab"][:3]}, "pre_tokenizer": None}, "`unk_id` is missing"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}}, "index out of bounds"),
    ],
)
def test_a_tokenizer_that_loads_and_cannot_encode_is_refused(parts: dict[str, Any], reason: str, format_: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.base: the tokenizer of .* cannot be read \(.*{reason}.*\)\. Copy"):
        Renderer(damaged_tokenizer(**parts), data(format=format_))


def test_a_text_that_the_tokenizer_has_no_tokens_for_is_a_bad_row_and_a_panic_ends_it_all() -> None:
    renderer = Renderer(damaged_tokenizer(model=UNIGRAM, pre_tokenizer=None), data(format="text"))
    first, bad, last = renderer.encode([{"text": "hi"}, {"text": "hi yo"}, {"text": "hihi"}])
    assert (type(first), type(last)) == (Example, Example)
    assert "the tokenizer cannot encode it (" in str(bad)
    renderer._backend.normalizer = normalizers.Precompiled(bytes(4))
    with pytest.raises(ConfigError, match="the tokenizer of .* cannot be read"):
        renderer.encode([{"text": "hi"}])


def test_text_without_an_end_token_is_a_configuration_error() -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        Renderer(endless, data(format="text"))
