"""What lm-evaluation-harness asks of a model reaches it within its longest text, and comes back in the right order."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.material import Workshop
from tests.unit.data.test_data_chat import tokenizer as word_tokenizer
from trainer.base.find.locate import resolve_base
from trainer.errors import CapstanError, ConfigError
from trainer.evaluate import harness
from trainer.evaluate.generation import Sampling
from trainer.evaluate.harness import HarnessLM, run_tasks
from trainer.evaluate.losses import Continued, Likelihood
from trainer.evaluate.models import OpenText, Words
from trainer.evaluate.subjects import task_specs


class Noting:
    """A model that notes what it is asked. A continuation is as likely as its tokens are small."""

    def __init__(self) -> None:
        self.asked = list[Continued]()
        self.opened = list[tuple[OpenText, Sampling]]()

    def likelihoods(self, texts: Sequence[Continued], told: Any) -> list[Likelihood]:
        self.asked += texts
        told(len(texts))
        return [Likelihood(-float(sum(text.tokens[text.first :])), len(text.tokens) % 2 == 0) for text in texts]

    def continued(self, texts: Sequence[OpenText], sampling: Sampling, told: Any) -> list[list[int]]:
        self.opened += [(text, sampling) for text in texts]
        told(2 * len(texts))
        return [[*text.tokens[-2:], *self.ends] for text in texts]

    ends: Sequence[int] = ()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Words:
    workshop = Workshop(tmp_path_factory.mktemp("harness"))
    config = workshop.config("a")
    return Words(resolve_base(config.model), config.data)


def asking(words: Words, longest: int | None = 8) -> tuple[HarnessLM, Noting, list[tuple[int, int]]]:
    told, model = list[tuple[int, int]](), Noting()
    return HarnessLM(model, words, longest, lambda *of: told.append(of)), model, told


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_continuations_are_scored_behind_as_much_of_their_context_as_fits(words: Words) -> None:
    lm, model, told = asking(words)
    requests = [(None, [1] * 4, [2, 3]), (None, [1] * 9, [4]), (None, [], [5, 6]), (None, [1], [2] * 9)]
    assert lm._loglikelihood_tokens(requests) == [(-5.0, True), (-4.0, False), (-11.0, True), (-18.0, False)]
    assert model.asked == [
        Continued([1, 1, 1, 1, 2, 3], 4),
        Continued([1] * 8 + [4], 8),
        Continued([5, 6], 0),
        Continued([2] * 9, 0),
    ]
    assert told == [(4, 4)]


def test_each_token_of_a_long_text_is_scored_once_in_windows_that_fit(words: Words) -> None:
    lm, model, _ = asking(words)
    texts = ["a text that is longer than the model's windows", "short", "and one more text"]
    tokens = [lm.tok_encode(text) for text in texts]
    assert lm.loglikelihood_rolling([request(text) for text in texts]) == [-float(sum(ids)) for ids in tokens]
    assert max(len(text.tokens) for text in model.asked) == 8 + 1
    assert len(model.asked) == sum(-(-len(ids) // 8) for ids in tokens), "a window gives up one token to the context"
    assert all(text.first >= 1 for text in model.asked)
    assert [text.tokens[0] for text in model.asked].count(lm.prefix_token_id) == 3
    scored = [token for text in model.asked for token in text.tokens[text.first :]]
    assert scored == [token for ids in tokens for token in ids]


def test_answers_end_where_the_task_says_and_come_back_in_its_order(words: Words) -> None:
    lm, model, told = asking(words, 12)
    model.ends = [*lm.tok_encode("b", add_special_tokens=False), lm.eot_token_id]
    greedy, drawn = {"until": ["b"], "max_gen_toks": 5}, {"do_sample": True, "temperature": 0.5, "top_p": 0.25}
    asked = [("x" * 20 + "1a", greedy), ("2a", {**drawn, "max_gen_toks": 3}), ("3a", greedy)]
    assert lm.generate_until([request(*one) for one in asked]) == ["1a", "2ab", "3a"]
    end = lm.tokenizer.decode(lm.eot_token_id)
    (first, sampling), (third, same), (second, other) = model.opened
    assert (sampling, same) == (Sampling(5, 0.0, 1.0),) * 2
    assert other == Sampling(3, 0.5, 0.25)
    assert first.tokens == lm.tok_encode("x" * 20 + "1a")[-7:]
    assert (third.tokens, second.tokens) == (lm.tok_encode("3a"), lm.tok_encode("2a"))
    assert ([*first.until], [*second.until]) == (["b", end], [end])
    assert told == [(3, 3), (2, 3)], "never more than there are"
    lm.generate_until([request("a", {"max_gen_toks": 11})])
    with pytest.raises(ConfigError, match="a task asks for up to 12 tokens, and the base has positions for 12"):
        lm.generate_until([request("a", {"max_gen_toks": 12})])
    assert asking(words, None)[0].max_length == 2048
    unsaid = asking(words, None)
    unsaid[0].generate_until([request("a", {})])
    assert unsaid[1].opened[0][1].max_tokens == 256


def test_a_text_that_begins_as_texts_do_gets_no_second_beginning(words: Words) -> None:
    lm, _, _ = asking(words)
    begin = lm.tokenizer.decode(lm.prefix_token_id)
    assert lm.tok_encode("ab") == lm.tokenizer.encode("ab")
    assert lm.tok_encode(f"{begin}ab") == lm.tokenizer.encode(f"{begin}ab", add_special_tokens=False)
    assert lm.tok_encode("ab", add_special_tokens=True) == lm.tokenizer.encode("ab")
    assert lm.tokenizer_name == words.base.name.replace("/", "__")
    lm.tokenizer = adds = word_tokenizer(adds_bos=True)
    for text in ("hi yo", "<s> hi yo"):
        assert adds.convert_ids_to_tokens(lm.tok_encode(text)) == ["<s>", "hi", "yo"]
    given: Any = SimpleNamespace(bos_token_id=None, eos_token_id=7)
    lm.tokenizer = given
    assert (lm.prefix_token_id, lm.eot_token_id) == (7, 7)
    given.bos_token_id = 0
    assert lm.prefix_token_id == 0
    given.apply_chat_template = lambda chat, **of: (chat, of)
    history = [{"role": "user", "content": "?"}]
    for goes_on in (False, True):
        options = {"tokenize": False, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        assert lm.apply_chat_template(history, add_generation_prompt=not goes_on) == (history, options)
    assert lm.apply_chat_template(history) == lm.apply_chat_template(history, add_generation_prompt=True)


def test_scores_of_tasks_have_their_errors_and_the_names_of_filters(
    words: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "0")
    metrics = {
        "alias": "task", "acc,none": 0.5, "acc_stderr,none": 0.25, "exact,strict": 1, "exact_stderr,strict": "N/A",
        "sample_len": 3, "text,none": "x",
    }  # fmt: skip
    given = dict[str, Any]()

    def evaluate(model: HarnessLM, **options: Any) -> Any:
        assert os.environ["DISABLE_MULTIPROC"] == "1"
        given.update(options)
        return {"results": {"task": metrics}}

    monkeypatch.setattr(harness, "simple_evaluate", evaluate)
    monkeypatch.setattr(harness, "TaskManager", lambda include_defaults: include_defaults)
    task = tmp_path / "task.yaml"
    task.write_text("task: task")
    for names, defaults in ((["arc_easy"], True), ([str(task)], False), (["arc_easy", str(task)], True)):
        found = run_tasks(Noting(), words, 8, names, chat=defaults, told=lambda *_: None)
        assert found == {"task": {"acc": (0.5, 0.25), "exact,strict": (1.0, None)}}
        assert (given["tasks"], given["task_manager"], given["apply_chat_template"]) == (names, defaults, defaults)
        assert (given["log_samples"], given["bootstrap_iters"]) == (False, 200)
    for error, kind, said in (
        (KeyError("no such task"), ConfigError, "eval.tasks: arc_easy: KeyError"),
        (CapstanError("the server is gone"), CapstanError, "^the server is gone"),
    ):
        monkeypatch.setattr(harness, "simple_evaluate", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(kind, match=said):
            run_tasks(Noting(), words, 8, ["arc_easy"], chat=False, told=lambda *_: None)


def test_a_folder_of_tasks_is_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.yaml file"):
        task_specs([str(tmp_path / "tasks")])
    for name in ("b.yaml", "a.yaml", "_default.yaml", "notes.txt"):
        (tmp_path / "tasks" / name).write_text("")
    files = [str(tmp_path / "tasks" / name) for name in ("a.yaml", "b.yaml")]
    assert task_specs([str(tmp_path / "tasks"), "arc_easy", files[1]]) == [*files, "arc_easy", files[1]]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert task_specs(["~/tasks/b.yaml", "~/tasks"]) == [files[1], *files], "the harness knows no ~"
