"""Samples of a run: its prompts are read once, and answered at a step in the run's folder."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.evaluate import generation
from trainer.evaluate.generation import Sampling, open_samples
from trainer.evaluate.prompts import Question
from trainer.run import layout
from trainer.store.store import Store, open_store

ALONE: Any = SimpleNamespace(on_first=lambda action: action())
TEXT, SEEN = {"prompt": "what is ü?"}, {"prompt": "what is it?", "images": ["one.png"]}


class Prompts:
    """A prompter whose tokens are the lengths of prompts."""

    stops = frozenset({2, 9})

    def fitting(self, prompts: list[Any], longest: int | None) -> list[Question]:
        assert longest == 40
        return [Question([len(prompt["prompt"])], {}) for prompt in prompts]

    def text(self, written: list[int]) -> str:
        return f"ä {written}"


def opened(monkeypatch: pytest.MonkeyPatch, folder: Store, prompts: list[Any], *, kept: bool = False) -> Any:
    """The samples of a run, perhaps over kept features."""
    monkeypatch.setattr(generation, "Prompter", lambda *of: Prompts())
    monkeypatch.setattr(generation, "load_tokenizer", lambda base: None)
    monkeypatch.setattr(generation, "as_trained", lambda config: config.data)
    monkeypatch.setattr(
        generation, "read_prompts", lambda path, fields: {("p.jsonl", "the fields"): prompts}[path, fields]
    )
    monkeypatch.setattr(generation, "keeps_features", lambda config, architecture: kept)
    evaluation, data = SimpleNamespace(prompts="p.jsonl", max_tokens=7), SimpleNamespace(fields="the fields")
    config, base = SimpleNamespace(eval=evaluation, data=data), SimpleNamespace(directory=Path(), architecture=None)
    return open_samples(SimpleNamespace(config=config, base=base, longest=40), folder, ALONE)  # type: ignore[arg-type]


def test_an_answer_to_each_prompt_is_a_line_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = open_store(str(tmp_path)), list[Any]()

    def continued(engine: Any, openings: Any, sampling: Any, *, longest: int, begin: Any) -> list[list[int]]:
        asked.append((engine, sampling, longest))
        begin()
        ends = [[one.ended([3, token]) for token in (2, 3, 9)] for one in openings]
        assert ends == [[True, False, True]] * len(openings)
        return [[*one.tokens, 2] for one in openings]

    monkeypatch.setattr(generation, "continued", continued)
    samples, begun = opened(monkeypatch, folder, [TEXT, SEEN]), list[int]()
    samples.take("the engine", 5, lambda: begun.append(1))
    assert asked == [("the engine", Sampling(max_tokens=7), 40)]
    assert begun == [1]
    content = folder.get(layout.samples(5)).decode()
    assert [json.loads(line) for line in content.splitlines()] == [
        {"prompt": "what is ü?", "adapter": "ä [10, 2]"},
        {"prompt": "<image>what is it?", "adapter": "ä [11, 2]"},
    ]
    assert "ü" in content


def test_a_store_that_fails_ends_no_run_and_another_rank_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def put(key: str, content: bytes) -> None:
        raise OSError("no room")

    monkeypatch.setattr(generation, "continued", lambda *of, **more: [[1]])
    full: Any = SimpleNamespace(put=put)
    samples = opened(monkeypatch, full, [TEXT])
    samples.take(None, 5, lambda: None)
    assert "keeping the samples failed, which does not end the run" in "".join(capsys.readouterr())
    monkeypatch.setattr(ALONE, "on_first", lambda action: ([TEXT], [Question([1], {})], frozenset({2})))
    opened(monkeypatch, full, [TEXT]).take(None, 5, lambda: None)
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize(
    ("prompts", "kept", "refused"), [([TEXT], True, False), ([TEXT, SEEN], True, True), ([SEEN], False, False)]
)
def test_a_picture_in_a_prompt_needs_the_tower_that_a_run_over_kept_features_lacks(
    prompts: list[Any], kept: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store("memory://samples")
    if refused:
        with pytest.raises(ConfigError, match=r"eval\.prompts: a prompt has pictures, and the run is over kept feat"):
            opened(monkeypatch, store, prompts, kept=kept)
    else:
        assert len(opened(monkeypatch, store, prompts, kept=kept).openings) == len(prompts)
