"""Prompts are refused where they are read, and take the form that the training's rows had."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.material import Workshop, byte_tokenizer, make_classified, make_pairs
from tests.unit.data.test_data_chat import tokenizer as word_tokenizer
from trainer.config import Data, override, parse_config
from trainer.data.compile.inputs import as_trained
from trainer.errors import ConfigError, DataError
from trainer.evaluate.measured import texts_of
from trainer.evaluate.prompts import Prompter, asked, prompt_of, read_prompts
from trainer.evaluate.subjects import Gaps, SentencePair, gaps_as_json, gaps_of, read_pairs, subjects

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<s>{% endfor %}{% if add_generation_prompt %}assistant: {%"
    " endif %}"
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "a bee"}],
    "pairs": [{"prompt": "a bee", "completion": "an ant"}],
    "talks": [{"messages": [{"role": "user", "content": "a bee"}, {"role": "assistant", "content": "an ant"}]}],
    "judged": [{"prompt": "a bee", "chosen": "an ant", "rejected": "no"}],
}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "a", "id": 5}, {"prompt": "a"}),
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "a"}]}),
        ({"prompt": "a", "image": "one.png"}, {"prompt": "a", "images": ["one.png"]}),
        *[
            (row, None)
            for row in (
                *({"prompt": 5}, {"messages": []}, {"messages": "a"}, {"messages": [5]}, {"text": "a"}, 7),
                {"prompt": "a", "messages": []},
            )
        ],
    ],
    ids=str,
)
def test_a_row_is_a_text_or_a_conversation_or_refused_with_its_place(row: Any, found: Any) -> None:
    if found is not None:
        assert prompt_of(json.dumps(row), "here", {}) == found
        return
    with pytest.raises(ConfigError, match="here: a row needs the field prompt, a text, or messages, a list"):
        prompt_of(json.dumps(row), "here", {})


def test_a_prompt_with_pictures_knows_its_file_and_is_shown_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    parts = [{"type": "image", "path": "one.png"}, {"type": "text", "text": "what?"}]
    rows = [{"prompt": "what?", "images": ["one.png"]}, {"messages": [{"role": "user", "content": parts}]}]
    rows.append({"prompt": "on <image> what?", "images": ["one.png"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "what?"}]))
    read = read_prompts(str(path), {})
    assert [prompt.get("file") for prompt in read] == [*[str(path)] * 3, None]
    assert [asked(prompt) for prompt in read] == ["<image>what?", "<image>what?", "on <image> what?", "what?"]
    talk = [{"role": role, "content": said} for role, said in (("system", "be kind"), ("user", "who?"))]
    assert asked({"messages": talk}) == "who?"
    path.write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(str(path), {})


def test_a_file_of_json_has_an_array_or_an_object_on_each_line(tmp_path: Path) -> None:
    path, every = tmp_path / "prompts.json", [{"prompt": "one"}, {"messages": [{"role": "user"}]}]
    array = json.dumps(every)
    for text in (array, f"\n \t{array}\n", json.dumps(every, indent=1), "\n\n".join(map(json.dumps, every))):
        path.write_text(text)
        assert read_prompts(str(path), {}) == every
    for wrong, said in (
        ("[]", "prompts.json holds no prompt. Give an object for each"),
        ('[{"prompt": "one"}, "two"]', "prompts.json: object 2: a row needs the field prompt"),
        ('[{"prompt": "one"},\n', "prompts.json: not JSON"),
        ('{"prompt": "one"}\ntwo', "prompts.json:2: not JSON"),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=said):
            read_prompts(str(path), {})


def test_a_picture_for_a_run_over_text_is_refused(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    prompter = Prompter(byte_tokenizer(), workshop.config("text", "data.format=text").data, workshop.base)
    with pytest.raises(
        ConfigError, match=r"^a prompt has a picture, and the run was trained on text \(data.format: te"
    ):
        prompter.fitting([{"prompt": "what?", "images": ["one.png"]}], None)


def test_only_the_end_of_a_line_ends_a_row(tmp_path: Path) -> None:
    """JSON allows the separators of Unicode within a text."""
    within = "one\u2028two\u0085three"
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_text(json.dumps({"prompt": within}, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    pairs.write_text(json.dumps({"group": "g", "pair": [within, "b"]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(str(prompts), {}) == [{"prompt": within}]
    assert read_pairs(str(pairs)) == [("g", within, "b")]


@pytest.mark.parametrize(("rows", "chats"), [("text", False), ("pairs", False), ("talks", True), ("judged", True)])
def test_prompts_of_rows_whose_format_was_found_out_are_as_those_rows(tmp_path: Path, rows: str, chats: bool) -> None:
    """The tokenizer's template says nothing about rows of text; of answers to be judged it is the only sign."""
    workshop, file = Workshop(tmp_path), tmp_path / f"{rows}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[rows] * 3))
    objective = ("objective.name=dpo",) if rows == "judged" else ()
    config = workshop.config("run", f"data.train=[{{path: {file}}}]", "data.format=auto", *objective)
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompter = Prompter(tokenizer, as_trained(config), workshop.base)
    assert prompter.chats == chats
    shown = tokenizer.decode(prompter.tokens({"prompt": "a bee"}))
    assert ("assistant: " in shown) == chats

    file.unlink()  # rows that cannot be read here leave the template as the sign
    assert Prompter(tokenizer, as_trained(config), workshop.base).chats


def test_prompts_of_rows_of_answers_may_be_of_either_kind(tmp_path: Path) -> None:
    workshop, file = Workshop(tmp_path), tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": "a bee", "answers": ["an ant", "no"]}) + "\n")
    config = workshop.config("run", f"data.train=[{{path: {file}}}]", "data.format=auto")
    assert as_trained(config).format == "auto"
    both = workshop.config("run", f"data.train=[{{path: {file}}}, {{path: {workshop.data}}}]", "data.format=auto")
    assert as_trained(both).format == "prompt_completion"


def test_what_cannot_be_read_of_a_prompt_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^here: .*image"):
        prompt_of(json.dumps({"prompt": "a", "image": "one.png", "images": ["two.png"]}), "here", {})
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = Data.model_validate({"train": [{"path": "x"}], "format": "chat"})
    prompter = Prompter(tokenizer, data, tmp_path)
    with pytest.raises(ConfigError, match="^a prompt's messages: turn 1 has the role 'bot'"):
        prompter.tokens({"messages": [{"role": "bot", "content": "a"}]})

    def question(row: Any) -> Any:
        raise DataError(f"{row['images'][0]} is no picture")

    prompter.__dict__["_pictures"] = SimpleNamespace(question=question)
    with pytest.raises(ConfigError, match="^a prompt cannot be read: one.png is no picture"):
        prompter.question({"prompt": "a", "images": ["one.png"]})


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    data: Any = SimpleNamespace(template=None, kind="text", format="text")
    prompter = Prompter(byte_tokenizer(), data, tmp_path)
    (dog,) = prompter.fitting([{"prompt": "dog"}], 5)
    assert len(dog.tokens) < 5
    prompter.fitting([{"prompt": "dog"}], len(dog.tokens) + 1)
    with pytest.raises(ConfigError, match="Shorten it"):
        prompter.fitting([{"prompt": "dog"}], len(dog.tokens))
    for before in ([], [{"prompt": "dog"}]):
        with pytest.raises(ConfigError, match="a prompt has 13 tokens, .* has positions for 5. Shorten it"):
            prompter.fitting([*before, {"prompt": "a long prompt"}], 5)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_begins_once_with_the_token_that_texts_of_the_training_begin_with(
    adds_bos: bool, tmp_path: Path
) -> None:
    data: Any = SimpleNamespace(template=None, kind="text", format="text")
    made = word_tokenizer(adds_bos=adds_bos)
    prompter = Prompter(made, data, tmp_path)
    begin = ["<s>"] if adds_bos else []
    for text, first in (("hi yo", begin), ("<s> hi yo", ["<s>"])):
        assert made.convert_ids_to_tokens(prompter.tokens({"prompt": text})) == [*first, "hi", "yo"]


@pytest.mark.parametrize("begin", [[], [7]])
def test_each_sentence_of_a_pair_has_a_token_that_another_predicts(begin: list[int]) -> None:
    prompter: Any = SimpleNamespace(text_begin=begin, encode=lambda text: [*text.encode()])
    both = texts_of([SentencePair("g", "ab", "abc")], prompter)
    assert [text.tokens for text in both] == [[*begin, *b"ab"], [*begin, *b"abc"]]
    if begin:
        assert len(texts_of([SentencePair("g", "a", "b")], prompter)) == 2
    else:
        for pair in (SentencePair("g", "a", "b"), SentencePair("g", "ab", "a")):
            with pytest.raises(DataError, match="eval.bias: a sentence is one token"):
                texts_of([pair], prompter)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("", "holds no pair"),
        ("a", "a row is"),
        ('{"group": "g"}', "a row is"),
        ('{"group": "g", "pair": "abc"}', "a row is"),
        ('{"group": "g", "pair": ["a", ""]}', "group and both sentences are texts, and not empty"),
        ('{"group": 1, "pair": ["a", "b"]}', "group and both sentences are texts, and not empty"),
    ],
)
def test_a_file_of_something_else_than_pairs_is_refused(tmp_path: Path, rows: str, sentence: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match=sentence):
        read_pairs(str(tmp_path / "pairs.jsonl"))


def test_gaps_are_of_the_pairs_of_each_group() -> None:
    pairs = [SentencePair(group, "a", "b") for group in "xyx"]
    gaps = gaps_of(pairs, [-1.0, -3.0, -2.0, -1.5, -5.0, -4.0])
    assert gaps == {"x": Gaps(0.5, 1.5), "y": Gaps(-0.5, 0.0)}
    assert gaps_as_json(pairs, {"base": gaps}) == {
        "x": {"pairs": 2, "base": {"mean": 0.5, "std": 1.5}},
        "y": {"pairs": 1, "base": {"mean": -0.5, "std": 0.0}},
    }


def test_what_is_evaluated_is_named_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop(tmp_path)
    pairs, task = tmp_path / "pairs.jsonl", tmp_path / "task.yaml"
    pairs.write_text('{"group": "g", "pair": ["a", "b"]}')
    task.write_text("task: a")
    data = f"data.eval=[{{path: {workshop.data}}}]"
    sets = f"eval.sets={{more: {{path: {workshop.data}}}}}"
    given = (data, sets, f"eval.tasks=[arc_easy, {task}]", f"eval.bias={pairs}")
    every = subjects(workshop.config("a", *given))
    assert len(every) == 5
    assert every[-4:] == ["more", "arc_easy", str(task), str(pairs)]
    grpo = ("objective.name=grpo", "rollout.reward=exact")
    assert subjects(workshop.config("a", *grpo, data))[:1] == every[:1]
    with pytest.raises(ConfigError, match="there is nothing to evaluate"):
        subjects(workshop.config("a"))
    for missing in (str(tmp_path / "no.yaml"), "no.yml"):
        with pytest.raises(ConfigError, match="does not exist. Give a task's name, a YAML file or a folder of them"):
            subjects(workshop.config("a", f"eval.tasks=[{missing}]"))
    with pytest.raises(ConfigError, match=r"eval\.bias"):
        subjects(workshop.config("a", f"eval.bias={tmp_path / 'no.jsonl'}"))
    monkeypatch.setattr("trainer.evaluate.subjects.find_spec", lambda name: None)
    assert subjects(workshop.config("a", data)) == every[:1]
    with pytest.raises(ConfigError, match=r"pip install 'capstan-llm\[tasks\]'"):
        subjects(workshop.config("a", data, "eval.tasks=[arc_easy]"))


@pytest.mark.parametrize(
    ("tasks", "unknown"),
    [
        (["arc_easy", "in_a_list", "tagged", "quoted", "from-a.template"], ""),
        (["arc_easy", "arc_eazy", "arc", "nope"], "no task 'arc_eazy', 'arc', 'nope', and no such file is here"),
        (["read_me"], "no task 'read_me'"),
        (["{here}/mine.yaml", "{here}/mine"], ""),
        (["{here}/empty"], r"empty' holds no \.yaml file"),
    ],
)
def test_a_task_that_the_harness_lacks_is_refused_without_the_base(
    tasks: list[str], unknown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "harness/tasks/arc/arc_easy.yaml": "tag:\n  - tagged # of many\ntask: arc_easy\n",
        "harness/tasks/group.yaml": "group: 'quoted'\ntask: [a,in_a_list, b]\n",
        "harness/tasks/arc/_template": "task: from-a.template",
        "harness/tasks/README.md": "- read_me",
        "mine.yaml": "task: mine",
        "mine/one.yaml": "task: one",
        "empty/_base.yaml": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "harness")])
    monkeypatch.setattr("trainer.evaluate.subjects.find_spec", lambda name: spec)
    monkeypatch.setattr("trainer.evaluate.subjects.find_evaluated", lambda config: {})
    given = [task.format(here=tmp_path) for task in tasks]
    config = parse_config("run: {name: a}\nmodel: {base: b}\ntrain: {steps: 1}\ndata: {train: [{path: d}]}\n")
    config = override(config, f"eval.tasks=[{', '.join(given)}]")
    if unknown:
        with pytest.raises(ConfigError, match=unknown):
            subjects(config)
    else:
        assert subjects(config) == given


def test_data_of_a_head_is_evaluated_by_its_measures_and_answers_to_be_judged_not_at_all(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    classified, pairs = make_classified(tmp_path / "classified.jsonl"), make_pairs(tmp_path / "pairs.jsonl")

    def found(objective: str, kind: str, rows: Path) -> list[str]:
        every = f"[{{path: {rows}}}]"
        given = (f"objective.name={objective}", f"data.format={kind}", f"data.train={every}", f"data.eval={every}")
        return subjects(workshop.config("a", *given, f"eval.sets={{more: {{path: {workshop.data}, format: auto}}}}"))

    assert found("sft", "prompt_completion", workshop.data) == ["eval", "more"]
    assert found("classification", "classified", classified) == ["eval", "more"]
    assert found("reward", "preference", pairs) == ["eval", "more"]
    assert found("dpo", "preference", pairs) == ["more"]


def test_a_text_alone_gets_no_tokens_of_the_tokenizers_own(tmp_path: Path) -> None:
    data: Any = SimpleNamespace(template=None, kind="text", format="text")
    tokenizer: Any = SimpleNamespace(
        eos_token_id=None, encode=lambda text, add_special_tokens: [len(text), add_special_tokens]
    )
    prompter = Prompter(tokenizer, data, tmp_path)
    assert prompter.encode("abc") == [3, False]
    assert prompter.stops == set()
    tokenizer.eos_token_id = 0
    assert Prompter(tokenizer, data, tmp_path).stops == {0}
    for ends, stops in ((7, {0, 7}), ([7, 8], {0, 7, 8}), (None, {0})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert Prompter(tokenizer, data, tmp_path).stops == stops, "the base's own ends of an answer"


@pytest.mark.parametrize(
    ("end", "stops"), [("<s>\n", {"</s>", "<s>"}), ("\n<s>", {"</s>", "<s>"}), ("\nEND", {"</s>"}), ("", {"</s>"})]
)
def test_a_token_of_the_template_ends_an_answer_and_is_not_shown(end: str, stops: set[str], tmp_path: Path) -> None:
    """Words of it end none: an answer may have them, too."""
    made: Any = byte_tokenizer()
    made.chat_template = f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}{end}{{% endfor %}}"
    data: Any = SimpleNamespace(template=None, kind="chat", format="chat", today="2026-01-01")
    prompter = Prompter(made, data, tmp_path)
    assert prompter.stops == set(made.convert_tokens_to_ids(sorted(stops)))
    assert prompter.text([*prompter.encode("yo\nyo"), *prompter.stops]) == "yo\nyo"
