"""What `capstan evaluate` and `capstan generate` do on a rank, one thing after the other, whatever the model says."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.config import override
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.dataset.dataset import TARGET_BIT
from trainer.errors import ConfigError, DataError
from trainer.evaluate import evaluate, generate, measured, models, program
from trainer.evaluate.program import Ask
from trainer.evaluate.subjects import Gaps, SentencePair
from trainer.store.store import open_store


class Opened:
    """A run whose model is its base until it is loaded, of one rank."""

    def __init__(self, manifest: Any, **config: Any) -> None:
        self.done, self.manifest = list[Any](), manifest
        self.ranks = SimpleNamespace(
            on_first=lambda of: of(), rank=0, broadcast=lambda value: None, agree=lambda of: None
        )
        evaluation = SimpleNamespace(tasks=config.pop("tasks", []))
        self.resolved = SimpleNamespace(
            config=SimpleNamespace(eval=evaluation, tuning=SimpleNamespace(method="full"), **config),
            base="the base",
            method=SimpleNamespace(trains_base=False),
            longest=40,
        )
        self.words = SimpleNamespace(
            prompter=SimpleNamespace(
                chats=True, fitting=lambda given, longest: [f"{one['prompt']} {longest}" for one in given]
            )
        )
        self.run = "the run"

    @contextmanager
    def as_base(self) -> Iterator["Opened"]:
        self.done.append("base")
        yield self
        self.done.append("no base")

    def load(self, *, or_newer: bool) -> Any:
        self.done.append(("load", or_newer))
        return SimpleNamespace(step=7)


@pytest.mark.parametrize("step", [None, 7])
def test_the_base_is_measured_before_the_checkpoint_is_loaded(
    monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    opened, told = Opened(SimpleNamespace(step=6)), list[Any]()

    def measure(given: Any, work: Any, side: str, progress: Any) -> str:
        opened.done.append(side)
        progress(side, 1, 2)
        progress(side, 2, 2)
        return f"{side} of {work}"

    def open_model(run: Any, of: Any, overrides: Any, *, base_alone: bool, log: Any) -> Any:
        log("loading")
        opened.done.append((run.uri, of, overrides, base_alone))
        return opened

    monkeypatch.setattr(evaluate, "open_model", open_model)
    monkeypatch.setattr(evaluate, "subjects", lambda config: opened.done.append("subjects"))
    monkeypatch.setattr(evaluate, "find_work", lambda opened, tasks, progress: f"work, {tasks}")
    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr(evaluate, "evaluation", lambda *of: of)
    monkeypatch.setattr(
        evaluate, "keep", lambda run, config, manifest, found: {"kept": found, "of": (run, manifest.step)}
    )
    monkeypatch.setattr(evaluate, "_TOLD_SECONDS", 1e9)
    ask = Ask("evaluate", "memory://flows/a", step, ("eval.tasks=[]",))
    found = evaluate.evaluate(ask, told.append)
    sides = {"base": "base of work, None", "adapter": "adapter of work, None"}
    config = opened.resolved.config
    assert found == {"kept": (config, "the base", 7, "work, None", sides), "of": ("the run", 7)}
    begun = ("memory://flows/a", step, ("eval.tasks=[]",), False)
    assert opened.done == [begun, "subjects", "base", "base", "no base", ("load", step is None), "adapter"]
    ends = [one for one in told if one.get("done") == 2]
    assert told[0] == {"log": "loading"}
    assert [one["progress"] for one in ends] == ["base", "adapter"]
    opened.manifest = None
    alone: Any = evaluate.evaluate(replace(ask, base=True), told.append)
    assert alone == (config, "the base", 0, "work, None", {"base": "base of work, None"})
    assert (*begun[:3], True) in opened.done


def test_progress_is_told_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told, now = list[Any](), [0.0]
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = evaluate._progress(told.append)
    for now[0], done in ((100.0, 1), (100.1, 2), (100.3, 3), (100.4, 9)):
        progress("rows", done, 9)
    assert told == [{"progress": "rows", "done": done, "total": 9} for done in (1, 3, 9)]


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False), (None, True)])
def test_the_first_rank_speaks_for_all(rank: str | None, speaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[Any]()
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(evaluate, "evaluate", lambda ask, say: say({"log": "here"}) or {"found": 1})
    assert program.answer(Ask("evaluate", "a"), [], told.append) == {"found": 1}
    assert told == [{"log": "here"}] * speaks


@pytest.mark.parametrize(
    ("error", "leaves"), [(None, True), (DataError("line 7"), True), (RuntimeError("on this rank alone"), False)]
)
def test_ranks_part_after_an_answer_or_a_refusal_and_else_end_at_once(
    error: Exception | None, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[str]()

    def work(ask: Ask, say: Any) -> dict[str, Any]:
        if error:
            raise error
        return {}

    monkeypatch.setattr(evaluate, "evaluate", work)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: done.append("left"))
    with pytest.raises(type(error)) if error else nullcontext():
        program.answer(Ask("evaluate", "a"), [], print)
    assert done == ["left"] * leaves


def test_tasks_are_asked_by_the_first_rank_while_the_others_help(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, told = Opened(None, tasks=["arc_easy"]), list[Any]()

    def run_tasks(model: Any, words: Any, longest: int, names: list[str], *, chat: bool, told: Any) -> Any:
        assert isinstance(model, models.SharedModel)
        told(1, 3)
        return {"asked": (words, longest, names, chat)}

    monkeypatch.setattr("trainer.evaluate.harness.run_tasks", run_tasks)
    ask, given = Ask("evaluate", "", chat=True), opened
    found = evaluate._tasks(ask, lambda *of: told.append(of), given, "base")  # type: ignore[arg-type]
    assert found == {"asked": (opened.words, 40, ["arc_easy"], True)}
    assert told == [("tasks, base", 1, 3)]


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_rank_stays_on_the_cpu_where_that_is_asked_before_it_sees_a_device(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[str]()
    monkeypatch.setattr(program, "stay_on_cpu", lambda: done.append("stays"))
    monkeypatch.setattr(evaluate, "evaluate", lambda ask, say: done.append(ask.run) or {"found": 1})
    assert program.answer(Ask("evaluate", "a", on_cpu=on_cpu), [], print) == {"found": 1}
    assert done == ["stays"] * on_cpu + ["a"]


def test_the_program_of_a_rank_ends_with_the_code_of_its_error_and_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()

    def refuse(ask: Ask, prompts: Any, tell: Any) -> Any:
        assert ask.overrides == ("train.steps=2",)
        tell({"log": "here"})
        raise DataError("line 7")

    monkeypatch.setattr(program, "answer", refuse)
    monkeypatch.setattr(program, "end_with_agent", lambda: None)
    monkeypatch.setattr(program.os, "dup2", lambda *_: None)
    monkeypatch.setattr(program.os, "fdopen", lambda *_, **__: told)
    monkeypatch.setattr(program.os, "dup", lambda file: file)
    monkeypatch.setattr(program.sys, "argv", ["", Ask("evaluate", "a", overrides=("train.steps=2",)).to_json()])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == DataError.exit_code
    assert [*map(json.loads, told.getvalue().splitlines())] == [{"log": "here"}, {"error": "line 7", "exit_code": 3}]


def test_each_figure_by_a_server_says_so() -> None:
    loss, gap, accuracy = {"loss": 1.0}, {"gap": 2.0}, {"adapter": 0.5}
    found = {"step": 4, "sets": {"eval": loss}, "bias": {"crows": gap}, "tasks": {"arc": {"acc": accuracy}}}
    by: Any = {"server": "http://a#m"}
    assert evaluate._said_by("http://a#m", found) == {
        "step": 4,
        "sets": {"eval": loss | by},
        "bias": {"crows": gap | by},
        "tasks": {"arc": {"acc": accuracy | by}},
        "server": "http://a#m",
    }


@pytest.mark.parametrize(("longest", "most"), [(4096, 4094), (None, None)])
def test_a_text_of_a_task_leaves_room_for_what_a_request_to_a_server_needs(
    monkeypatch: pytest.MonkeyPatch, longest: int | None, most: int | None
) -> None:
    asked = list[int | None]()
    monkeypatch.setattr("trainer.evaluate.harness.run_tasks", lambda _, __, most, *___, **____: asked.append(most))
    config: Any = SimpleNamespace(data=SimpleNamespace(kind="text"), eval=SimpleNamespace(tasks=["arc_easy"]))
    work: Any = SimpleNamespace(sets={}, pairs=[])
    model: Any = SimpleNamespace(likelihoods=lambda texts, told: texts)
    given: Any = None
    ask = Ask("evaluate", "")
    evaluate._measured(ask, config, given, model, given, work, longest, "base", lambda *_: None)
    assert asked == [most]


def test_a_document_without_targets_has_no_loss_by_a_server() -> None:
    asked, told = list[list[int]](), list[tuple[int, int]]()

    def ranked(ids: list[int]) -> list[tuple[float, bool]]:
        asked.append(ids)
        return [(-float(token), True) for token in ids[1:]]

    empty = np.zeros(0, np.void)
    rows = [np.array(row, np.uint32) for row in ([5, 7 | TARGET_BIT, 9, 4 | TARGET_BIT], [5, 7])]
    model = models.ServedModel(SimpleNamespace(ranked=ranked), [])  # type: ignore[arg-type]
    of: Any = SimpleNamespace(
        clusters=[0, 1],
        dataset=SimpleNamespace(blocks=[0, 2], store=None, columns={}, documents=lambda block: rows),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "pictured_documents", lambda data, block: [(row, empty) for row in rows])
        nats, tokens = evaluate._losses(model, of, lambda *of: told.append(of), None)
    assert (nats.tolist(), tokens.tolist()) == ([11.0, 0.0], [2.0, 0.0])
    assert asked == [[5, 7, 9, 4]]
    assert told == [(1, 2), (2, 2)]


def test_gaps_are_of_the_model_and_an_evaluation_under_other_settings_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, kept = list[Any](), list[Any]()

    def likelihoods_by(opened: Any, texts: Any, *, told: Any) -> Any:
        told(len(texts))
        return [SimpleNamespace(log_p=-float(len(text.tokens))) for text in texts]

    monkeypatch.setattr(measured, "likelihoods_by", likelihoods_by)
    prompter = SimpleNamespace(text_begin=[1], encode=lambda text: [*text.encode()])
    opened: Any = SimpleNamespace(words=SimpleNamespace(prompter=prompter))
    pairs = [SentencePair("g", "abc", "a"), SentencePair("g", "ab", "a")]
    assert measured._gaps(opened, pairs, "base", lambda *of: told.append(of)) == {"g": Gaps(-1.5, 0.5)}
    assert told == [("pairs, base", 4, 4)]
    assert measured._gaps(opened, [], "base", lambda *of: None) == {}
    others = iter([{"data": "other"}, {}])
    monkeypatch.setattr(measured, "trained_config", lambda run, manifest: {})
    monkeypatch.setattr(measured, "override", lambda tree: tree)
    monkeypatch.setattr(measured, "other_settings", lambda own, config: next(others))
    monkeypatch.setattr(measured, "keep_evaluation", lambda run, found: kept.append(found))
    nothing: Any = None
    assert measured.keep(nothing, nothing, nothing, {"step": 3}) == {"step": 3, "under": {"data": "other"}}
    assert kept == []
    assert measured.keep(nothing, nothing, nothing, {"step": 3}) == {"step": 3}
    assert kept == [{"step": 3}]


def test_data_of_a_head_is_measured_by_its_objective_and_answers_that_are_judged_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measured, "evaluated", lambda config, base, store, progress: {"eval": "own", "more": "set"})
    monkeypatch.setattr(measured, "sets_of", lambda config, store, keys: dict(keys))
    monkeypatch.setattr(measured, "trained_on", lambda store, manifest, keys: dict.fromkeys(keys, 1))
    seen = list[Any]()
    monkeypatch.setattr(measured, "open_dataset", lambda store, key: SimpleNamespace(store=f"rows of {key}"))
    monkeypatch.setattr(measured, "eval_stream", lambda config, data, rank, ranks: f"stream of {data.store}")
    monkeypatch.setattr(measured, "sees_pictures", lambda stream, config, base, folder: seen.append((stream, folder)))
    for name, likely, of_head in (
        ("sft", True, None), ("classification", False, "stream of rows of own"), ("dpo", False, None),
    ):  # fmt: skip
        monkeypatch.setattr(measured, "has_likelihood", lambda config, likely=likely: likely)
        config = SimpleNamespace(objective=SimpleNamespace(name=name), eval=SimpleNamespace(bias=None))
        ranks = SimpleNamespace(on_first=lambda of: of(), rank=0, world_size=1)
        opened: Any = SimpleNamespace(
            resolved=SimpleNamespace(config=config, base=None), ranks=ranks, store=None, manifest=None
        )
        work = measured.find_work(opened, None, lambda *of: None)
        assert (work.of_head, "eval" in work.sets, "more" in work.sets) == (of_head, likely, True)
        assert work.trained_on.keys() == work.sets.keys()
    assert seen == [("stream of rows of own", "rows of own")]


@pytest.mark.parametrize("base", [False, True])
def test_prompts_are_answered_list_by_list_by_the_base_first(monkeypatch: pytest.MonkeyPatch, base: bool) -> None:
    opened, told = Opened("a manifest"), list[Any]()

    def answers(given: Any, questions: list[str], sampling: Any, side: str, tell: Any) -> list[str]:
        opened.done.append((side, sampling.seed))
        return [f"{side}: {one}" for one in questions]

    monkeypatch.setattr(generate, "open_model", lambda *_, **__: opened)
    monkeypatch.setattr(generate, "head_of", lambda method: None)
    monkeypatch.setattr(generate, "_answers", answers)
    ask = Ask("generate", "memory://flows/a", base=base, sampling={"seed": 3})
    prompts = [[{"prompt": "a"}], [], [{"prompt": "b"}, {"prompt": "c"}]]
    found = generate.generate(ask, prompts, told.append)
    sides = ("base", "adapter") if base else ("adapter",)
    rows = [{"prompt": one, **{side: f"{side}: {one} 40" for side in sides}} for one in "abc"]
    assert found == {"step": 7, "answers": rows}
    assert told == [{"ready": 7, "chats": True}, {"answers": rows[:1]}, {"answers": rows[1:]}]
    turn = ["base", ("base", 3), "no base", ("adapter", 3)] if base else [("adapter", 3)]
    assert opened.done == [("load", True), *turn, *turn]
    opened.resolved.method.trains_base = True
    if base:
        with pytest.raises(ConfigError, match="--base: tuning.method: full has changed the base itself"):
            generate.generate(ask, prompts, told.append)
    else:
        assert generate.generate(ask, prompts, told.append)["answers"] == rows


def test_a_head_writes_nothing_and_reads_texts_and_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    workshop = Workshop(tmp_path)
    config = workshop.config("a", "data.format=tagged", "objective.name=token_classification", "data.labels=[O, B]")
    ask = Ask("generate", "")
    generate.refuse_writing(ask, config)
    with pytest.raises(ConfigError, match="--base: the base has no head"):
        generate.refuse_writing(Ask("generate", "", base=True), config)
    with pytest.raises(ConfigError, match="--temperature: objective.name: token_classification draws no tokens"):
        generate.refuse_writing(Ask("generate", "", sampling={"temperature": 0.5}), config)
    tokenizer: Any = load_tokenizer(resolve_base(config.model))
    opened: Any = SimpleNamespace(words=SimpleNamespace(tokenizer=tokenizer), resolved=SimpleNamespace(config=config))
    head: Any = SimpleNamespace(labels=["O", "B"])
    asked = generate._words(opened, head, {"prompt": "the ant  bee"})
    assert list(asked.words) == ["the", "ant", "bee"]
    texts = [tokenizer.decode(asked.tokens[place:]) for place in asked.places]
    assert [text.split()[0] for text in texts] == ["the", "ant", "bee"]
    for empty in ({"prompt": ""}, {"messages": []}):
        with pytest.raises(ConfigError, match="give a text with words in the field prompt"):
            generate._words(opened, head, empty)
    one = generate._text(opened, head, {"prompt": "the ant"})
    assert one.places == [len(one.tokens) - 1]
    assert "the ant" in tokenizer.decode(one.tokens)
    assert generate._text(opened, SimpleNamespace(labels=[]), {"prompt": "the ant"}) == one  # type: ignore[arg-type]
    opened.resolved.config = override(config, "data.template=chatml")
    talk = generate._text(opened, head, {"messages": [{"role": "user", "content": "the ant"}]})
    assert "<|im_start|>user\nthe ant" in tokenizer.decode(talk.tokens)
    assert talk.places == [len(talk.tokens) - 1]


def test_an_evaluation_shares_no_row_between_ranks() -> None:
    with pytest.raises(ConfigError, match=r"sharding\.sequence_parallel: an evaluation computes each row on one rank"):
        models.open_model(
            open_store("memory://flows/a"), None, ["sharding.sequence_parallel=2"], base_alone=False, log=print
        )


@pytest.mark.parametrize("trains_base", [False, True])
@pytest.mark.parametrize("reserved", [0, 3])
def test_a_run_computes_as_its_base_with_its_adapter_off(trains_base: bool, reserved: int) -> None:
    off = list[Any]()

    @contextmanager
    def switched_off(model: Any) -> Iterator[None]:
        off.append(model)
        yield
        off.clear()

    method = SimpleNamespace(
        trains_base=trains_base, switched_off=switched_off, virtual=SimpleNamespace(reserved=reserved)
    )
    engine = SimpleNamespace(model="the model")
    opened: Any = models.OpenedRun(None, SimpleNamespace(method=method), None, None, engine, None)  # type: ignore[arg-type]
    with opened.as_base() as base:
        assert off == ([] if trains_base else ["the model"])
        assert base.keeps is (not reserved), "positions that are switched off are no text to keep"
    assert opened.keeps
    assert off == []


def test_a_run_is_opened_over_its_own_base_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    checked, newest = list[Any](), ["newest"]
    monkeypatch.setattr(models, "readable_manifests", lambda folder, skipped: iter(newest))
    monkeypatch.setattr(models, "check_trained_base", lambda base, manifest: checked.append(manifest))
    given: Any = None
    cases: list[Any] = [(None, []), (None, ["model.base=/m"]), (None, ["model={base: /m}"])]
    cases += [("own", []), ("own", ["model.base=/m"])]
    for manifest, overrides in cases:
        models._check_base(given, given, manifest, overrides)
    assert checked == ["newest", "own", "own"]
    newest.clear()
    models._check_base(given, given, given, [])
    assert len(checked) == 3


def test_the_settings_of_a_checkpoint_may_be_changed_in_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    checked, kept = list[Any](), ["newest"]
    monkeypatch.setattr(models, "whole_checkpoint", lambda folder, step: f"step {step}")
    monkeypatch.setattr(models, "readable_manifests", lambda folder, skipped: iter(kept))
    monkeypatch.setattr(models, "trained_config", lambda folder, manifest: f"trained at {manifest}")
    monkeypatch.setattr(models, "run_config", lambda folder, overrides: ("of the run", *overrides))
    monkeypatch.setattr(models, "override", lambda tree, *overrides: (tree, *overrides))
    monkeypatch.setattr(models, "check_overrides", lambda *of: checked.append(of))
    folder: Any = None
    own, changed = ("trained at step 4",), ("trained at step 4", "eval.every=1")
    assert models.settings_of(folder, 4, ["eval.every=1"], base_alone=False) == (changed, "step 4")
    assert checked == [(own, changed, "step 4")]
    alone = models.settings_of(folder, None, ["eval.every=1"], base_alone=True)
    assert alone == (("trained at newest", "eval.every=1"), None)
    other = models.settings_of(folder, None, ["model.base=/m"], base_alone=True)
    assert other == (("of the run", "model.base=/m"), None)
    kept.clear()
    assert models.settings_of(folder, None, [], base_alone=True) == (("of the run",), None)
    assert len(checked) == 1
