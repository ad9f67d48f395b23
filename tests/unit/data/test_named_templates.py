"""Named chat templates write what their owners document, end every turn with a token, and print no other day than the
run's.
"""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.material import byte_tokenizer
from trainer.config import Data
from trainer.data.compile.fingerprint import fingerprint, hash_tokenizer
from trainer.data.format.formats import RowForm
from trainer.data.render.chat import Example, Renderer
from trainer.data.render.chat_template import (
    NAMED,
    conversation_template,
    dated,
    fitting_template,
    has_template,
    template_text,
    tokens_of,
)
from trainer.errors import ConfigError, DataError

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Open?"},
    {"role": "assistant", "content": "Until six."},
    {"role": "user", "content": "Today?"},
    {"role": "assistant", "content": "Yes."},
]
# Written by hand, from OpenAI's page on ChatML, Meta's on Llama 3, Google's on Gemma, Mistral's on its tokenizers
# (version 3) and Microsoft's card of Phi-3. <s> and </s> are the test tokenizer's begin and end.
DOCUMENTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOpen?<|im_end|>\n<|im_start|>assistant\nUntil"
        " six.<|im_end|>\n<|im_start|>user\nToday?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe"
        " brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nOpen?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nUntil"
        " six.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nToday?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nOpen?<end_of_turn>\n<start_of_turn>model\nUntil six.<end_of_turn>\n"
        "<start_of_turn>user\nToday?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    ),
    "mistral": "<s>[INST] Open?[/INST] Until six.</s>[INST] Be brief.\n\nToday?[/INST] Yes.</s>",
    "phi3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nOpen?<|end|>\n<|assistant|>\nUntil six.<|end|>\n"
        "<|user|>\nToday?<|end|>\n<|assistant|>\nYes.<|end|>\n"
    ),
    "alpaca": (
        "<s>### System:\nBe brief.\n\n### Instruction:\nOpen?\n\n### Response:\nUntil six.</s>\n\n"
        "### Instruction:\nToday?\n\n### Response:\nYes.</s>"
    ),
}


def settings(**more: Any) -> Data:
    return Data.model_validate({"train": [{"path": "x"}], "format": "chat", **more})


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_named_template_writes_what_its_owner_documents_and_trains_every_end(name: str) -> None:
    tokenizer, data = byte_tokenizer(), settings(template=name)
    tokenizer.add_tokens(list(NAMED[name].tokens))
    assert conversation_template(tokenizer, data).render([SYSTEM, *TALK]) == DOCUMENTED[name]
    (example,) = Renderer(tokenizer, data).encode([{"messages": [SYSTEM, *TALK]}])
    assert isinstance(example, Example)
    assert not example.left_out
    trained = str(tokenizer.decode(example.tokens[example.targets].tolist()))
    end = next(
        part for part in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<|end|>") if part in DOCUMENTED[name]
    )
    assert trained.replace(" ", "") == f"Untilsix.{end}Yes.{end}"
    whole, prompt = conversation_template(tokenizer, data), TALK[:3]
    assert whole.render(TALK).startswith(whole.render(prompt, generation_prompt=True))


def test_the_template_paligemma_writes_one_question_and_its_answer() -> None:
    """The processor writes the rest: tests/unit/data/test_processors_of_whole_texts.py."""
    assert {"paligemma", *DOCUMENTED} == set(NAMED)
    template = conversation_template(byte_tokenizer(), settings(template="paligemma"))
    assert template.render(TALK[:2]) == "Open?Until six.</s>"
    assert template.render(TALK[:1], generation_prompt=True) == "Open?"
    for others in (TALK, [SYSTEM, *TALK[:2]], TALK[1:2]):
        with pytest.raises(DataError, match="paligemma takes a question of user, and one answer of assistant"):
            template.render(others)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            {"instruction": "Add\nthese.", "input": "1, 2"},
            "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write"
            " a response that appropriately completes the request.\n\n### Instruction:\nAdd\nthese.\n\n### Input:\n1,"
            " 2\n\n### Response:\n3</s>",
        ),
        (
            {"instruction": "Add 1 to 2."},
            "<s>Below is an instruction that describes a task. Write a response that appropriately completes the"
            " request.\n\n### Instruction:\nAdd 1 to 2.\n\n### Response:\n3</s>",
        ),
    ],
)
def test_the_template_alpaca_writes_a_rows_input_below_a_heading_of_its_own(asked: dict[str, str], text: str) -> None:
    tokenizer, row = byte_tokenizer(), RowForm("alpaca", ()).read({**asked, "output": "3"})
    assert conversation_template(tokenizer, settings(template="alpaca")).render(row["messages"]) == text
    (example,) = Renderer(tokenizer, settings(template="alpaca")).encode([row])
    assert isinstance(example, Example)
    assert str(tokenizer.decode(example.tokens[example.targets].tolist())).replace(" ", "") == "3</s>"


def test_a_named_template_fits_a_tokenizer_that_has_its_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert not has_template(settings(), tmp_path)
    assert has_template(settings(template="chatml"), tmp_path)
    assert fitting_template(tokens_of(tmp_path)) is None
    tokenizer.add_tokens(list(NAMED["gemma"].tokens))
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    assert fitting_template(tokens_of(tmp_path)) == "gemma"
    assert fitting_template([*NAMED["gemma"].tokens, *NAMED["paligemma"].tokens]) == "paligemma"
    assert has_template(settings(), tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(
        ConfigError, match=r"no chat template.* here gemma, with its tokens <start_of_turn>, <end_of_turn>"
    ):
        Renderer(tokenizer, settings())
    with pytest.raises(ConfigError, match=r"data\.template: 'chattml' is none of the named templates \(chatml, llama3"):
        template_text(settings(template="chattml"))


CLOCKED = (
    "\n{{ '%d' }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %-d/%-m/%y %-H:%M') }}{% endif %}{{"
    " messages[0].content }}"
)


def test_a_template_that_prints_todays_date_prints_that_of_the_run(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CLOCKED
    day = settings(today="2026-06-05")
    assert conversation_template(tokenizer, day).render(TALK) == "\n%d05 Jun 2026, 5/6/26 0:00Open?"
    assert conversation_template(tokenizer, settings()).render(TALK) == "\n%d01 Jan 2025, 1/1/25 0:00Open?"
    assert dated("{{ messages }}", date.fromisoformat("2026-06-05")) == "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    assert named(tmp_path) != named(tmp_path, today="2026-06-05")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert named(tmp_path) == named(tmp_path, today="2026-06-05")
    with pytest.raises(ValueError, match=r"data\.today: '5 June' is no day\. Write it as YYYY-MM-DD"):
        settings(today="5 June")
    with pytest.raises(ValueError, match=r"data\.today: has no effect with data\.format: text\. Remove it"):
        settings(today="2026-06-05", format="text")


def named(directory: Path, **more: Any) -> str:
    return fingerprint(settings(**more), [], hash_tokenizer(directory))


def test_the_files_of_older_tokenizers_hold_their_template_in_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert has_template(settings(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert not has_template(settings(), tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert has_template(settings(), tmp_path)
    added = {str(number): {"content": token} for number, token in enumerate(NAMED["phi3"].tokens)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert fitting_template(tokens_of(tmp_path)) == "phi3"


def test_what_is_no_token_in_the_files_of_a_tokenizer_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<a>"}, {"id": 3}, "<b>", None]}))
    listed = {"0": {"special": True}, "1": "<c>", "2": {"content": "<d>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    assert tokens_of(tmp_path) == {"<a>", "<d>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": {"content": "<a>"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": ["<c>"]}))
    assert tokens_of(tmp_path) == set()


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages }}"])
def test_a_text_with_an_expression_or_a_statement_is_a_template_itself(template: str) -> None:
    assert template_text(settings(template=template)) == template
