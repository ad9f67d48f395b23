"""The interval of a change keeps its promise, however few and however unequal the documents are, or there is none."""

import json
import re
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from launcher.evaluate import evaluating
from launcher.evaluate.evaluating import Evaluated, sentences
from trainer.config import parse_config
from trainer.errors import ConfigError, StorageError
from trainer.evaluate.measured import (
    EvaluatedSet,
    MeasuredSide,
    Work,
    _of_set,
    _of_task,
    clusters_of,
    difference_interval,
    evaluation,
    trained_on,
)
from trainer.run.evaluations import FEWEST

RUN = "run: {name: demo}\nmodel: {base: b}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 1}\n"
SETS = 2000
CHANGE = 0.03


def simulated(seed: int, documents: int, spread: float, of: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The nats by which documents change, and their tokens, (SETS, documents): lengths by a log-normal of this spread,
    changes of whole documents or of their tokens."""
    draw = np.random.default_rng(seed)
    tokens = np.ceil(200 * np.exp(spread * draw.standard_normal((SETS, documents))))
    noise = (
        tokens * draw.standard_t(5, tokens.shape)
        if of == "documents"
        else draw.standard_normal(tokens.shape) * tokens**0.5
    )
    return CHANGE * tokens + 0.1 * noise, tokens


def interval_of(changes: NDArray[np.float64], tokens: NDArray[np.float64]) -> tuple[float, float] | None:
    return difference_interval(np.zeros(len(tokens)), changes, tokens, np.arange(len(tokens)))


@pytest.mark.parametrize(("spread", "of"), [(0.0, "documents"), (1.0, "documents"), (1.0, "tokens")])
@pytest.mark.parametrize("documents", [2, 5, 8, 20, 100])
def test_the_interval_has_the_true_change_in_95_of_100_sets_or_is_not_given(
    documents: int, spread: float, of: str
) -> None:
    found = [interval_of(*one) for one in zip(*simulated(documents, documents, spread, of), strict=True)]
    given = [interval for interval in found if interval is not None]
    assert len(given) == (SETS if documents >= FEWEST else 0)
    if given:
        assert sum(low <= CHANGE <= high for low, high in given) / SETS == pytest.approx(0.95, abs=0.02)


def test_pieces_of_a_long_text_count_as_one() -> None:
    lengths = np.array([64, 64, 30, 12, 64, 9, 64])
    assert clusters_of(lengths, 64).tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert clusters_of(lengths[:0], 64).tolist() == []
    draw = np.random.default_rng(0)
    texts, pieces = 8, 25
    clusters = np.repeat(np.arange(texts), pieces)
    changes, tokens = np.repeat(draw.standard_normal(texts), pieces), np.ones(texts * pieces)
    together = difference_interval(0 * tokens, changes, tokens, clusters)
    apart = difference_interval(0 * tokens, changes, tokens, np.arange(len(tokens)))
    assert together is not None
    assert apart is not None
    assert together[1] - together[0] > 3 * (apart[1] - apart[0])
    assert difference_interval(0 * tokens, changes, tokens, clusters // 2) is None


def test_copies_of_a_document_count_as_one() -> None:
    hashes, one = np.array([7, 9, 7, 7, 5], np.uint64), np.full(50, 3, np.uint64)
    assert clusters_of(np.full(5, 8), None, hashes).tolist() == [1, 2, 1, 1, 0]
    pieces = clusters_of(np.array([64, 8, 64, 8, 5]), 64, np.array([3, 4, 3, 4, 9], np.uint64))
    assert len(set(pieces[:4])) == 1 != len(set(pieces)) == 2
    tokens = np.full(50, 10.0)
    assert difference_interval(tokens, 0.6 * tokens, tokens, clusters_of(tokens.astype(int), None, one)) is None


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_said_and_has_no_interval(lost: float) -> None:
    before, after = np.ones(9), np.ones(9)
    after[4] = lost
    assert difference_interval(before, after, np.ones(9), np.arange(9)) is None
    none: Any = None
    sides = {
        "base": MeasuredSide({"a": (before, np.ones(9))}, {}),
        "adapter": MeasuredSide({"a": (after, np.ones(9))}, {}),
    }
    found = {"a": _of_set("a", sides, Work({"a": EvaluatedSet(none, none, np.arange(9))}, [], None))}
    assert (found["a"]["adapter"]["loss"], found["a"]["difference"]) == (None, None)
    assert list(sentences(found)) == ["a: the loss is no finite number (now), so nothing can be said of the change."]
    json.dumps(found, allow_nan=False)
    shown = StringIO()
    Console(file=shown, width=100).print(
        Evaluated({"step": 4, "sets": found, "tasks": {}, "bias": {}}, "r", "w").tables()
    )
    assert "1.0000 → not finite" in shown.getvalue()


def test_a_loss_whose_perplexity_is_too_large_for_a_number_has_none() -> None:
    none: Any = None
    sides = {"adapter": MeasuredSide({"a": (np.array([1500.0, 700.0]), np.ones(2))}, {})}
    found = _of_set("a", sides, Work({"a": EvaluatedSet(none, none, np.arange(2))}, [], None))
    assert found["adapter"] == {"loss": 1100.0, "perplexity": None}


def test_an_evaluation_has_the_figures_that_are_added_up_by_hand() -> None:
    """A loss is that of a token, so a long document counts more; copies are documents, and one cluster."""
    none: Any = None
    tokens = np.array([1.0, 3.0, 4.0])
    sides = {
        "base": MeasuredSide({"a": (np.array([2.0, 3.0, 3.0]), tokens)}, {}),
        "adapter": MeasuredSide({"a": (np.array([1.0, 2.0, 1.0]), tokens)}, {}),
    }
    base: Any = SimpleNamespace(name="b", fingerprint="f")
    work = Work({"a": EvaluatedSet(none, none, np.array([0, 0, 1]))}, [], None, {"a": 2}, {"a": "key"})
    found = evaluation(parse_config(RUN, ["quant.type=none"]), base, 4, work, sides)
    assert found.pop("made") == pytest.approx(time.time(), abs=100)
    assert found == {
        "step": 4,
        "base": {"name": "b", "fingerprint": "f", "quant.type": "none"},
        "sets": {
            "a": {
                "data": "key",
                "tokens": 8,
                "documents": 3,
                "clusters": 2,
                "trained_on": 2,
                "base": {"loss": 1.0, "perplexity": pytest.approx(2.71828, abs=1e-5)},
                "adapter": {"loss": 0.5, "perplexity": pytest.approx(1.64872, abs=1e-5)},
                "difference": -0.5,
                "interval": None,
            }
        },
        "tasks": {},
        "bias": {},
    }


def test_the_same_figures_have_the_same_interval_in_every_call() -> None:
    changes = np.random.default_rng(0).standard_normal(30)
    assert interval_of(changes, np.ones(30)) == interval_of(changes, np.ones(30))


def test_training_data_that_is_gone_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run began from a checkpoint of another: what both have learnt from counts, as far as it is there."""

    def overlap(store: Any, dataset: str, key: str) -> Any:
        if dataset == "gone":
            raise StorageError("gone")
        return SimpleNamespace(shared={"own": 2, "before": 5}[dataset])

    monkeypatch.setattr("trainer.evaluate.measured.overlap_of", overlap)
    none: Any = None
    manifest: Any = SimpleNamespace(dataset="gone", base={"start_data": ["own", "before"]})
    assert trained_on(none, manifest, {"a": "key"}) == {"a": 5}
    assert trained_on(none, None, {"a": "key"}) == {}


def test_documents_without_a_trained_token_are_none() -> None:
    tokens = np.array([5.0, 0, 7, 0, 3, 0, 2, 0])
    assert difference_interval(tokens, 2 * tokens, tokens, np.arange(8)) is None


def test_documents_that_were_trained_on_are_said() -> None:
    (said,) = sentences({"task": {"documents": 4, "trained_on": 3}})
    assert said.startswith("task: 3 of 4 documents are in the training data")
    assert not list(sentences({"task": {"documents": 4, "trained_on": 0}}))


def test_each_side_of_a_task_has_its_own_error() -> None:
    sides = {
        side: MeasuredSide({}, {}, {"arc": {"acc": (score, error)}})
        for side, score, error in (("base", 0.25, 0.0625), ("adapter", 0.75, 0.125))
    }
    wanted = {"base": 0.25, "adapter": 0.75, "base_stderr": 0.0625, "stderr": 0.125}
    assert _of_task("arc", sides) == {"acc": wanted}
    del sides["base"]
    assert _of_task("arc", sides) == {"acc": {"adapter": 0.75, "base_stderr": None, "stderr": 0.125}}


def test_words_of_certainty_need_an_interval() -> None:
    def said(difference: float, interval: list[float] | None, clusters: int = 3) -> str:
        found = {"difference": difference, "interval": interval, "documents": 9, "clusters": clusters}
        (sentence,) = sentences({"general": found})
        return sentence

    assert "has become better" in said(-0.4, [-0.5, -0.3])
    assert "has become worse" in said(0.4, [0.3, 0.5])
    for interval in ([-0.1, 0.3], [0.0, 0.3], [-0.3, 0.0]):
        assert "no certain change" in said(0.1, interval)
    assert "; one independent document is too few to tell" in said(-0.4, None, clusters=1)
    few = said(-0.4, None)
    assert (
        few
        == "general: -0.4000 nats a token; 3 independent documents are too few to tell that from chance, for which 6"
        " are needed."
    )


def test_each_figure_of_an_evaluation_stands_in_its_column() -> None:
    base, now = ({"loss": loss, "perplexity": perplexity} for loss, perplexity in ((3.0, 20.0855), (2.5, 12.1825)))
    sets = {"legal": {"tokens": 1234, "base": base, "adapter": now, "difference": -0.5, "interval": [-0.625, -0.375]}}
    accuracy = {"base": 0.25, "adapter": 0.75, "base_stderr": 0.0625, "stderr": 0.125}
    sides = {"base": {"mean": 0.5, "std": 1.5}, "adapter": {"mean": -0.25, "std": 2.5}}
    found = {"step": 4, "sets": sets, "tasks": {"arc": {"acc": accuracy}}, "bias": {"words": {"pairs": 8, **sides}}}
    out = StringIO()
    Console(file=out, width=200).print(Evaluated(found, "r", "w").tables())
    rows = [re.split("  +|[│┃]", line.strip(" │┃")) for line in out.getvalue().splitlines()]
    shown = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    of_sets = ["1,234", "3.0000 → 2.5000", "20.09 → 12.18", "-0.5000", "-0.625 to -0.375"]
    assert shown["set"] == ["tokens", "loss", "perplexity", "change", "95 % interval"]
    assert shown["legal"] == of_sets
    assert shown["task"] == ["metric", "base", "now"]
    assert shown["arc"] == ["acc", "0.2500 ± 0.0625", "0.7500 ± 0.1250"]
    assert shown["pairs of"] == ["pairs", "mean gap, base", "spread, base", "mean gap, now", "spread, now"]
    assert shown["words"] == ["8", "+0.5000", "1.5000", "-0.2500", "2.5000"]


def test_a_figure_of_a_task_has_its_error_beside_it_if_it_has_one() -> None:
    assert evaluating._with_error(0.5, 0.03125) == "0.5000 ± 0.0312"
    assert evaluating._with_error(0.5, None) == "0.5000"
    assert evaluating._with_error(None, None) == "not finite"


def test_options_stand_for_settings_and_files_are_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("")
    given = evaluating.settings(["a=1"], ["legal=l.jsonl", "far=s3://b/f.jsonl"], ["arc_easy", "own.yaml"], "pairs.csv")
    text = "{run: {name: a}, model: {base: c}, data: {train: [{path: d}]}, train: {steps: 1}}"
    assert given[0] == "a=1"
    config = parse_config(text, given[1:])
    assert {name: one.path for name, one in config.eval.sets.items()} == {
        "legal": f"{tmp_path}/l.jsonl",
        "far": "s3://b/f.jsonl",
    }
    assert (config.eval.tasks, config.eval.bias) == (["arc_easy", f"{tmp_path}/own.yaml"], f"{tmp_path}/pairs.csv")
    assert evaluating.settings(["a=1"], [], [], None) == ["a=1"]
    with pytest.raises(ConfigError, match=r"^--set: expected NAME=PATH, and 'legal' is not"):
        evaluating.settings([], ["legal"], [], None)
    for wrong in ("=l.jsonl", "legal="):
        with pytest.raises(ConfigError, match="--set: expected NAME=PATH"):
            evaluating.settings([], [wrong], [], None)
