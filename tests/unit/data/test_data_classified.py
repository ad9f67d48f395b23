"""Rows with a class become the text's tokens and behind them the number of the class, the one that is trained."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from tests.material import byte_tokenizer
from tests.unit.data.test_data_chat import CHATML, tokenizer
from tests.unit.plan.test_plan import LLAMA_70B
from trainer.base.describe.description import describe
from trainer.config import Config, Data, parse_config
from trainer.data.compile import inputs
from trainer.data.compile.encode import documents_of, untagged_note
from trainer.data.compile.inputs import find, with_labels
from trainer.data.dataset.dataset import MISMATCHED_BIT, TARGET_BIT
from trainer.data.dataset.manifest import Counters
from trainer.data.format.formats import RowForm, detect
from trainer.data.format.row_format import Column
from trainer.data.render.numbered import Classified, ClassifiedRenderer, Tagged, TaggedRenderer, length_without_padding
from trainer.errors import ConfigError, DataError
from trainer.tuning.linear_adapters import LABELS, PEFT_SETTINGS, PEFT_WEIGHTS
from trainer.tuning.method import ExportedFiles, method_of
from trainer.tuning.objective import find_objective, measured


def config(path: Path | str, *overrides: str) -> Config:
    text = f"run: {{name: demo}}\nmodel: {{base: b}}\ndata: {{train: [{{path: {path}}}]}}\ntrain: {{steps: 1}}\n"
    return parse_config(text, ["objective.name=classification", *overrides])


def encoded(made: Any, *rows: dict[str, Any], **options: Any) -> list[Classified | DataError]:
    given = {"train": [{"path": "x"}], "format": "classified", "labels": ["no", "yes"], "sequence_length": 32}
    return ClassifiedRenderer(made, Data.model_validate(given | options)).encode(rows)


def test_a_text_is_a_users_turn_and_a_conversation_has_its_own() -> None:
    data = Data.model_validate({"train": [{"path": "x"}], "format": "classified", "labels": ["no", "yes"]})
    renderer = ClassifiedRenderer(tokenizer(CHATML), data)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    found = renderer.turns({"messages": talk, "label": "yes"})
    assert [(turn.role, turn.content) for turn in found] == [("user", "hi"), ("assistant", "yo")]
    assert [(turn.role, turn.content) for turn in renderer.turns({"text": "ab", "label": "no"})] == [("user", "ab")]
    words = TaggedRenderer(byte_tokenizer(), data.model_copy(update={"format": "tagged"}))
    (turn,) = words.turns({"words": ["ab", "c"], "tags": ["yes", 0]})
    assert (turn.role, turn.content) == ("user", "ab c")


def test_the_number_of_the_class_stands_behind_the_text_as_the_tokenizer_frames_it() -> None:
    made = byte_tokenizer()
    (row,) = encoded(made, {"text": "ab", "label": "yes"})
    assert isinstance(row, Classified)
    assert row.tokens.tolist() == [*made("ab")["input_ids"], 1]
    assert row.targets.tolist() == [False, False, True]
    assert (row.stored() >> 31).tolist() == [0, 0, 1]
    assert row.cut(2).tokens.tolist() == [*made("a")["input_ids"], 1], "the class stays"
    (renamed,) = encoded(made, {"said": "ab", "kind": "yes"}, fields={"text": "said", "label": "kind"})
    assert isinstance(renamed, Classified)
    assert renamed.tokens.tolist() == row.tokens.tolist()


def test_several_classes_are_a_flag_for_each_behind_the_text(tmp_path: Path) -> None:
    made = byte_tokenizer()
    some, none, wrong, single = encoded(
        made,
        {"text": "ab", "label": ["c", "a", 2]},
        {"text": "ab", "label": []},
        {"text": "ab", "label": ["d"]},
        {"text": "ab", "label": "a"},
        format="multilabel",
        labels=["a", "b", "c"],
    )
    assert isinstance(some, Classified)
    assert isinstance(none, Classified)
    assert some.tokens.tolist() == [*made("ab")["input_ids"], 1, 0, 1]
    assert (some.stored() >> 31).tolist() == [0, 0, 1, 1, 1]
    assert none.numbers.tolist() == [0, 0, 0]
    assert some.cut(4).tokens.tolist() == [*made("a")["input_ids"], 1, 0, 1], "the classes stay"
    assert some.cut(4).teaches
    assert not some.cut(3).teaches
    assert "the label is 'd', which is none of data.labels (a, b, c)" in str(wrong)
    assert "the labels are 'a', and no list of classes" in str(single)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "labels": ["x", "y"]}\n{"text": "b", "labels": []}\n')
    found = with_labels(config(file, "objective.name=multilabel_classification"))
    assert found.data.labels == ["x", "y"]
    assert str(detect([{"text": "a", "labels": ["x"]}], {}, ["multilabel"])) == "multilabel (text, labels)"


def test_the_f1_of_several_classes_is_that_of_scikit_learn() -> None:
    given = config("a.jsonl", "objective.name=multilabel_classification", 'data.labels=["a", "b", "c"]')
    # Four texts: {a} {a b} {} {b} are taken for {a} {a} {b} {b}; none is of class c.
    sums = [2 * 3, *(2, 1, 0), *(2, 2, 0), *(2, 2, 0)]
    figures = measured(find_objective(given), [number / 12 for number in sums])
    assert figures == {"accuracy": 0.5, "micro_f1": pytest.approx(6 / 8), "macro_f1": pytest.approx((1 + 1 / 2) / 2)}


def test_padding_at_the_end_is_left_out_as_transformers_looks_at_the_token_before_it() -> None:
    made = byte_tokenizer()
    (row,) = encoded(made, {"text": "ab<pad><pad>", "label": "no"})
    assert isinstance(row, Classified)
    assert row.text.tolist() == made("ab")["input_ids"]


@pytest.mark.parametrize(("padding", "kept"), [(0, 2), (None, 4), (7, 4)])
def test_a_text_ends_before_padding_alone(padding: int | None, kept: int) -> None:
    made: Any = SimpleNamespace(pad_token_id=padding)
    assert length_without_padding([0, 7, 0, 0], made) == kept
    assert length_without_padding([7, 7], made) == (0 if padding == 7 else 2)


def test_a_conversation_is_rendered_whole_by_the_chat_template() -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (row,) = encoded(made := tokenizer(CHATML), {"messages": talk, "label": "yes"})
    assert isinstance(row, Classified)
    text: Any = made.apply_chat_template(talk, tokenize=False)
    assert row.text.tolist() == made(text, add_special_tokens=False)["input_ids"]
    assert row.numbers.tolist() == [1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "label": "maybe"}, "the label is 'maybe', which is none of data.labels (no, yes)"),
        ({"text": "a", "label": 2}, "the label is '2', which is none of data.labels (no, yes)"),
        ({"text": "a", "label": -1}, "the label is '-1', which is none of data.labels (no, yes)"),
        ({"text": "a", "label": True}, "the label is 'true', which is none of data.labels (no, yes)"),
        ({"text": "a", "label": None}, "the label is None, and not the name or the number of a class"),
        ({"text": "a"}, "no field 'label'"),
        ({"label": "yes"}, "no field 'text'"),
    ],
)
def test_a_row_without_a_known_class_says_why(row: dict[str, Any], said: str) -> None:
    (found,) = encoded(byte_tokenizer(), row)
    assert isinstance(found, DataError)
    assert said in str(found)


def test_a_number_names_a_class_or_counts_them_and_never_both() -> None:
    found = encoded(byte_tokenizer(), *({"text": "a", "label": label} for label in (0, 1, "5")), labels=list("12345"))
    assert [row.numbers.tolist() for row in found if isinstance(row, Classified)] == [[0], [4]]
    assert "the label is '0', which is none of data.labels (1, 2, 3, 4, 5); these are numbers themselves" in str(
        found[0]
    )
    (truth,) = encoded(byte_tokenizer(), {"text": "a", "label": 1}, labels=["true", "false"])
    assert "the label is '1', which is none of data.labels (true, false)" in str(truth), "1 was false"
    (mixed,) = encoded(byte_tokenizer(), {"text": "a", "label": 0}, labels=["a", "1"])
    assert "the label is '0', which is none of data.labels (a, 1)" in str(mixed)
    words = {"words": ["a", "b"], "tags": [0, 1]}
    given = {"train": [{"path": "x"}], "format": "tagged", "labels": ["1", "2"]}
    (tags,) = TaggedRenderer(byte_tokenizer(), Data.model_validate(given)).encode([words])
    assert "the label is '0', which is none of data.labels" in str(tags)


def test_a_letter_is_the_same_in_every_form_of_unicode(tmp_path: Path) -> None:
    one, other = "caf\u00e9", "cafe\u0301"
    for named in (one, other):
        found = encoded(byte_tokenizer(), *({"text": "a", "label": form} for form in (one, other)), labels=["x", named])
        assert [row.numbers.tolist() for row in found if isinstance(row, Classified)] == [[1], [1]]
    assert with_labels(config(rows(tmp_path / "a.jsonl", one, other, "x"))).data.labels == [one, "x"]
    with pytest.raises(ConfigError, match="names a class twice"):
        config("a.jsonl", f'data.labels=["{one}", "{other}"]')


@pytest.mark.parametrize(
    "labels",
    [
        ("1", "1.0", 2),
        (True, 1, 0),
        ("good", "good ", "bad"),
        ("01", 1),
        ("+1", 1),
        ("-3", "-3."),
        ("so  so", " so so", "no"),
    ],
    ids=["form", "truth", "space", "zero", "plus", "minus", "spaces"],
)
def test_classes_that_look_like_one_are_refused(tmp_path: Path, labels: Any) -> None:
    file = rows(tmp_path / "a.jsonl", *labels)
    with pytest.raises(DataError, match=r"rows have the class '.*', and others '.*', which look like one class"):
        with_labels(config(file))
    assert with_labels(config(file, 'data.labels=["a", "b"]')).data.labels == ["a", "b"], "whoever names them knows"


@pytest.mark.parametrize("form", ["chat", "pictures"])
def test_rows_of_a_format_without_classes_have_none(form: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    for name in ("classification", "token_classification"):
        with pytest.raises(DataError, match=r"^data.train: no row has a class\. Check data.format"):
            with_labels(config(file, f"objective.name={name}", f"data.format={form}"))


def test_evaluation_rows_do_not_count_classes_that_training_rows_name(tmp_path: Path) -> None:
    named, counted = rows(tmp_path / "a.jsonl", "spam", "ham"), rows(tmp_path / "b.jsonl", "ham", 1)
    given = f"data.eval=[{{path: {counted}}}]"
    with pytest.raises(DataError, match=r"b.jsonl:2: the label is the number 1, and .* have the classes ham, spam"):
        with_labels(config(named, given))
    assert with_labels(config(named, given, "data.labels=[spam, ham]")).data.labels == ["spam", "ham"]
    rows(counted, "ham", "eggs")  # a name of no class, which the compilation counts as a bad row
    assert with_labels(config(named, given)).data.labels == ["ham", "spam"]


@pytest.mark.parametrize("label", [1.0, float("nan"), None, "", {}, [1], b"x", "\ud800"])
def test_a_value_that_is_no_class_is_a_bad_row(label: Any) -> None:
    (found,) = encoded(byte_tokenizer(), {"text": "a", "label": label}, labels=["0", "1"])
    assert isinstance(found, DataError)


def rows(path: Path, *labels: Any) -> Path:
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    return path


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("so", "bad", "so", "good"), ["bad", "good", "so"]),
        ((10, 9, 0), ["0", "9", "10"]),
        ((True, False), ["false", "true"]),
    ],
)
def test_the_classes_are_those_of_the_training_rows(tmp_path: Path, labels: Any, names: list[str]) -> None:
    given = config(rows(tmp_path / "a.jsonl", *labels))
    assert with_labels(given).data.labels == names
    assert find(given)["train"].data.labels == names
    named = config(tmp_path / "a.jsonl", 'data.labels=["x", "y"]')
    assert with_labels(named) is named
    sft = config(tmp_path / "a.jsonl", "objective.name=sft")
    assert with_labels(sft) is sft


def test_one_class_alone_teaches_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.train: the class of all rows is 'x'. Add rows of another one"):
        with_labels(config(rows(tmp_path / "a.jsonl", "x", "x")))


def test_rows_of_both_forms_are_found_out() -> None:
    talk = [{"role": "user", "content": "hi"}]
    for row, name in (
        ({"sentence": "a", "label": 1}, "classified (sentence, label)"),
        ({"conversations": talk, "label": "x"}, "classified_messages (conversations, label, system, tools)"),
    ):
        assert str(detect([row], {}, ["classified"])) == name
    assert str(detect([{"text": "a", "label": 1}], {}, ["text"])) == "text (text)", "sft reads the text alone"
    assert detect([{"text": "a", "label": ""}], {}, ["classified"]) == RowForm("text"), "an empty text names no class"
    whole = {"conversations": talk, "label": "x", "system": "Be brief.", "tools": [{"name": "clock"}]}
    assert (form := detect([whole], {}, ["classified"]))
    assert form.read(whole) == {
        "messages": [{"role": "system", "content": "Be brief."}, *talk],
        "tools": [{"type": "function", "function": {"name": "clock"}}],
        "label": "x",
    }


def test_a_field_of_several_names_has_the_one_with_the_most_values() -> None:
    full, other = {"text": "a", "sentence": "b", "label": 1}, {"text": "", "sentence": "b", "label": 1}

    def found(*rows: dict[str, Any], **given: str) -> str:
        return str(detect(rows, given, ["classified"]))

    assert found(full, other) == "classified (sentence, label)"
    assert found(full, full) == "classified (text, label)", "the first name, where both have as many"
    assert found({"sentence": "b", "label": 1}, full) == "classified (sentence, label)"
    assert found({"text": "a", "sentence": None, "label": 1}) == "classified (text, label)"
    assert found(full, other, text="text") == "classified (text, label)"
    (form,) = {detect([full], {"text": "text"}, ["classified"])}
    assert form is not None
    assert form.overrides == "data.format=classified data.fields.text=text"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.on_too_long=split",), "data.on_too_long: split would part a text from its class"),
        (
            ("data.train_on.roles=all",),
            "data.train_on.roles: has no effect with data.format: classified, whose rows have a class, which is trained.",
        ),
        (("data.train_on.end=false",), "data.train_on: has no effect with data.format: classified"),
        (("data.train_on.thinking=false",), "data.train_on: has no effect with data.format: classified"),
        (("data.labels=[a, a]",), "data.labels: names a class twice"),
        (("data.format=text", "data.labels=[a, b]"), "data.labels: has no effect with data.format: text"),
        (
            ("tuning.method=full",),
            "tuning.method: full has no adapter that PEFT keeps beside a head, as objective.name: classification",
        ),
        (("tuning.method=prompt",), "Choose one of dora, lora, rslora"),
        (
            ("tuning.start=other",),
            "tuning.start: an adapter has no head for objective.name: classification to begin with",
        ),
        (('model.add_tokens=["<x>"]',), "which objective.name: classification replaces by a head of its own"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        method_of(config("a.jsonl", "data.format=classified", *overrides))
    assert said in str(refused.value)


def test_accuracy_and_macro_f1_are_those_of_scikit_learn() -> None:
    given = config("a.jsonl", 'data.labels=["a", "b", "c"]')
    objective = find_objective(given)
    # Of six texts, the classes 0 0 1 1 1 0 are taken for 0 1 1 1 0 0; none is of class 2.
    sums = [2 / 6, 2 / 6, 0, 3 / 6, 3 / 6, 0, 3 / 6, 3 / 6, 0]
    figures = measured(objective, sums)
    assert figures == pytest.approx({"accuracy": 4 / 6, "macro_f1": 2 / 3})


def test_a_base_without_such_a_class_is_refused() -> None:
    given = config("a.jsonl", "data.labels=[a, b]")
    llama = describe(LLAMA_70B).architecture
    assert method_of(given).mismatches(llama) == []
    (said,) = method_of(given).mismatches(replace(llama, heads=()))
    assert said.startswith("objective.name: classification needs a base for which transformers has a class with such a")
    assert method_of(given).shapes(llama)["score.weight"] == (2, 8192)


def test_an_export_has_the_head_and_the_names_of_its_outputs() -> None:
    method: Any = method_of(config("a.jsonl", "data.labels=[bad, good]"))
    described = {"task_type": "CAUSAL_LM", "modules_to_save": None, "r": 8}
    files = {PEFT_WEIGHTS: save({"a": torch.zeros(1)}), PEFT_SETTINGS: json.dumps(described).encode()}
    head = {"score.weight": torch.ones(2, 4)}
    found = method.added_to(ExportedFiles("peft", "A LoRA adapter", files), head, describe(LLAMA_70B).architecture)
    assert json.loads(found.files[LABELS]) == {"0": "bad", "1": "good"}
    assert json.loads(found.files[PEFT_SETTINGS]) == {**described, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    assert load(found.files[PEFT_WEIGHTS]).keys() == {"a", "base_model.model.score.weight"}
    assert [*found.files][-1] == PEFT_SETTINGS, "nothing loads before all is there"
    assert (found.what, method.outputs) == ("A classifier's head and LoRA adapter", 2)


def tagged(made: Any, *rows: dict[str, Any]) -> list[Tagged | DataError]:
    given = {"train": [{"path": "x"}], "format": "tagged", "labels": ["O", "B"], "sequence_length": 32}
    return TaggedRenderer(made, Data.model_validate(given)).encode(rows)


def test_the_first_token_of_each_word_has_its_tag_in_a_segment_behind_the_text() -> None:
    made = byte_tokenizer()
    (row,) = tagged(made, {"words": ["ab", "c"], "tags": ["B", 0]})
    assert isinstance(row, Tagged)
    assert row.text.tolist() == made("ab c")["input_ids"]
    assert row.numbers.tolist() == [1, 0, 0, 0]
    assert row.trained.tolist() == [True, False, False, True]
    stored = row.stored()
    assert np.flatnonzero(stored & MISMATCHED_BIT).tolist() == [4]
    assert np.flatnonzero(stored & TARGET_BIT).tolist() == [4, 7]
    cut = row.cut(7)  # three tokens of the text, and their tags
    assert cut.tokens.tolist() == [*made("ab ")["input_ids"], 1, 0, 0]
    assert (cut.trained.tolist(), cut.places, row.cut(8).places) == ([True, False, False], [0], [0, 3])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"words": ["a"], "tags": ["B", "O"]}, "the tags are no list of 1, one for each word"),
        ({"words": ["a", " "], "tags": ["B", "O"]}, "the words are no list of texts that each have a character"),
        ({"words": ["a"], "tags": ["X"]}, "the label is 'X', which is none of data.labels (O, B)"),
        ({"words": ["\ud800"], "tags": ["B"]}, "the text of the words has half of a surrogate pair in it"),
        ({"words": ["a"], "tags": [2]}, "the label is '2', which is none of data.labels (O, B)"),
    ],
)
def test_words_without_known_tags_say_why(row: dict[str, Any], said: str) -> None:
    (found,) = tagged(byte_tokenizer(), row)
    assert isinstance(found, DataError)
    assert said in str(found)


def spanning(text: str) -> Any:
    """A tokenizer whose tokens may span words: each is as long as one of `text`'s parts between bars."""

    class Spanning:
        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            ends = np.cumsum([len(part) for part in text.split("|")]).tolist()
            spans = list(zip([0, *ends], ends, strict=False))
            assert texts == [text.replace("|", "")]
            return {"input_ids": [list(range(len(spans)))], "offset_mapping": [spans]}

    return Spanning()


def test_a_token_of_several_words_carries_the_tag_that_they_share_and_no_other() -> None:
    (same,) = tagged(spanning("of the| way"), {"words": ["of", "the", "way"], "tags": ["O", "O", "B"]})
    assert isinstance(same, Tagged)
    assert (same.numbers.tolist(), same.trained.tolist()) == ([0, 1], [True, True])
    assert same.untagged == 0
    (other,) = tagged(spanning("of the| way"), {"words": ["of", "the", "way"], "tags": ["O", "B", "B"]})
    assert isinstance(other, Tagged)
    assert (other.trained.tolist(), other.untagged) == ([False, True], 2)
    (border,) = tagged(spanning("o|f th|e"), {"words": ["of", "the"], "tags": ["O", "B"]})
    assert isinstance(border, Tagged)
    assert (border.numbers.tolist(), border.trained.tolist()) == ([0, 1, 0], [True, True, False]), "t begins in it"


def test_words_whose_tags_no_token_carries_are_counted_and_said() -> None:
    given = {"train": [{"path": "x"}], "format": "tagged", "labels": ["O", "B"], "sequence_length": 32}
    (row,) = tagged(spanning("of the| way"), {"words": ["of", "the", "way"], "tags": ["O", "B", "B"]})
    assert isinstance(row, Tagged)
    counters = Counters()
    documents_of(Data.model_validate(given), row, counters)
    assert counters.plus(Counters(untagged=1)).untagged == 3
    assert untagged_note(counters.untagged)[0].startswith("2 words are not trained, as a token that begins several")
    assert untagged_note(None) == ()


def test_a_word_that_the_tokenizer_drops_takes_no_other_words_token() -> None:
    (found,) = tagged(spanning("\u200b |b"), {"words": ["\u200b", "b"], "tags": ["B", "O"]})
    assert isinstance(found, Tagged), "a token of its own"

    def dropping(spans: list[tuple[int, int]]) -> Any:
        return lambda texts, **_: {"input_ids": [[7] * len(spans)], "offset_mapping": [spans]}

    for spans, word in (
        ([(2, 3)], "\u200b"),
        ([(1, 3)], "\u200b"),  # a token that includes the space before its word
        ([(0, 1)], "b"),
        ([], "\u200b"),
    ):
        (found,) = tagged(dropping(spans), {"words": ["\u200b", "b"], "tags": ["B", "O"]})
        assert str(found) == f"the word {word!r} has no token of its own"


def test_the_tags_are_those_of_all_words(tmp_path: Path) -> None:
    row = {"tokens": ["a", "b"], "ner_tags": ["O", "B-PER"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    given = config(tmp_path / "a.jsonl", "objective.name=token_classification")
    assert with_labels(given).data.labels == ["B-PER", "O"]
    assert str(detect([row], {}, ["tagged"])) == "tagged (tokens, ner_tags)"
    more = {**row, "pos_tags": ["DET", "NOUN"]}
    assert str(form := detect([more], {}, ["tagged"])) == "tagged (tokens, ner_tags)"
    assert form is not None
    assert (form.unused(more), RowForm("tagged").unused(more)) == (["pos_tags"], ["pos_tags"])
    for words, tags in ((["a", "b"], ["O"]), (["a"], [0.5]), (["a"], [["O"]]), ([], []), (["a"], "O"), ("a", ["O"])):
        assert detect([{"tokens": words, "ner_tags": tags}], {}, ["tagged"]) is None


@pytest.mark.parametrize("unlabelled", [-1, -100, "-1"])
def test_marks_of_rows_without_a_class_become_none(tmp_path: Path, unlabelled: Any) -> None:
    file = rows(tmp_path / "a.jsonl", 0, 1, unlabelled)
    with pytest.raises(DataError, match=f"rows have the class {unlabelled}, by which data sets mark what has no class"):
        with_labels(config(file))
    assert with_labels(config(file, 'data.labels=["-1", "0", "1"]')).data.labels == ["-1", "0", "1"]


def test_rows_of_kinds_with_other_columns_are_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, text = tmp_path / "talk.jsonl", tmp_path / "text.jsonl"
    talk.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    text.write_text(json.dumps({"text": "a b c"}) + "\n")
    both = config("x", "objective.name=sft", f"data.train=[{{path: {talk}}}, {{path: {text}}}]")
    assert {file.form.kind for file in find(both)["train"].files if file.form} == {"prompt_completion", "text"}
    column = Column("weights", "<f4", "token")
    monkeypatch.setitem(inputs.ROW_KINDS, "text", replace(inputs.ROW_KINDS["text"], columns=(column,)))
    sentence = r"data.train: its rows are of several kinds with different columns \(prompt_completion: none; text: wei"
    with pytest.raises(ConfigError, match=sentence):
        find(both)
