"""Rollouts: chapters that are committed once and checked, prompts in their order, rewards and servers that fail in one
sentence, and settings that do not fit.
"""

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launcher.evaluate.answering import generate_answers
from tests.material import Workshop
from tests.needs import need
from tests.unit.export.test_served import stub
from trainer import servers as completions
from trainer.config import dump_config, override
from trainer.config.objective import RolloutSettings
from trainer.data.dataset.chapters import give_up, given_up, open_chapters
from trainer.data.dataset.rollouts import Rollout, Rollouts, chapter_figures, commit, commit_judgement, is_committed
from trainer.data.order.settings import Position, train_order
from trainer.data.order.stream import rollout_stream
from trainer.errors import CapstanError, ConfigError, Damaged, DataError, NotFound
from trainer.evaluate.generate import generate
from trainer.evaluate.program import Ask
from trainer.evaluate.rollout import making, published, rewards, serving
from trainer.evaluate.rollout.making import Drawn, Prompts, Request, ServerSampler
from trainer.evaluate.rollout.published import StoreResolver, adapter_named, served_name
from trainer.evaluate.rollout.rewards import BUILT_IN, RewardFailed, Scoring
from trainer.model.micro_batch import Role
from trainer.run import layout
from trainer.servers import CompletionsServer, Refused
from trainer.store.store import Store, open_store
from trainer.train import supply
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.rollouts import REWARDS, rollout_identity, rollout_mismatches, unlike_sampler

GRPO = ("objective.name=grpo", "rollout.reward=exact", "rollout.max_tokens=8")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("rollouts"))


def rollouts(seed: int, answers: int = 6) -> list[Rollout]:
    draw = np.random.default_rng(seed)
    made = []
    for number in range(answers):
        prompt, answer = (draw.integers(3, 200, draw.integers(1, 9)).tolist() for _ in range(2))
        log_p = (-draw.random(len(answer))).tolist()
        made.append(Rollout(prompt, answer, log_p, float(number) - 2, {"prompt": "?", "reward": number}))
    return made


def test_a_chapter_is_what_was_sampled(workshop: Workshop, tmp_path: Path) -> None:
    run, made = open_store(str(tmp_path)), rollouts(1)
    assert commit(run, 0, made, {"reward": 0.5, "adapter": 0})
    assert chapter_figures(run, 0) == {"reward": 0.5, "adapter": 0}
    for world_size in (1, 2):
        config = workshop.config("a", *GRPO, "train.micro_batch=1")
        found = dict[int, tuple[list[int], list[list[float]]]]()
        for rank in range(world_size):
            stream = rollout_stream(config, Rollouts(run, 5), rank, world_size)
            for batch in stream.step(Position()):
                assert batch.column("sampled") is not None
                ends = np.concatenate([[0], np.cumsum((batch.labels[0] >= 0).numpy())])
                for number, segment in zip(batch.documents, batch.segments(Role.DOCUMENT).tolist(), strict=True):
                    begin, end = batch.input.cu_seqlens[segment : segment + 2].tolist()
                    found[number] = (
                        batch.input.input_ids[0, begin:end].tolist(),
                        batch.column("sampled")[ends[begin] : ends[end]].tolist(),
                    )
            assert stream.advance(Position()) == Position(chapter=1)
            stream.chapters.close()
        assert sorted(found) == list(range(len(made)))
        for number, one in enumerate(made):
            tokens, columns = found[number]
            assert tokens == [*one.prompt, *one.answer]
            assert np.array(columns) == pytest.approx(
                np.array([[log_p, one.advantage] for log_p in one.log_p]), rel=1e-6
            )


def test_prompts_of_several_sources_leave_each_answer_its_one_visit(workshop: Workshop, tmp_path: Path) -> None:
    sources = f"[{{path: {workshop.data}, weight: 0.5}}, {{path: {workshop.data}, fraction: 0.2}}]"
    config, run = workshop.config("a", *GRPO, f"data.train={sources}"), open_store(str(tmp_path))
    commit(run, 0, rollouts(3), {})
    stream = rollout_stream(config, Rollouts(run, 1), 0, 1)
    assert sorted(number for batch in stream.step(Position()) for number in batch.documents) == list(range(6))
    stream.chapters.close()


def test_several_updates_learn_from_a_chapter(workshop: Workshop, tmp_path: Path) -> None:
    """Which chapter an update learns from is told by where it begins alone, also in the middle of one."""
    run, config = open_store(str(tmp_path)), workshop.config("a", *GRPO, "rollout.updates=3", "train.steps=7")
    for number in range(3):
        commit(run, number, rollouts(number), {})
    stream = rollout_stream(config, Rollouts(run, config.rollout.chapters(7)), 0, 1)
    places = [Position()]
    while len(places) < 7:
        places.append(stream.advance(places[-1]))
    assert [config.rollout.chapter(step) for step in range(7)] == [place.chapter for place in places]
    assert (config.rollout.chapters(7), len(set(places))) == (3, 7)
    stream.chapters.close()
    again = rollout_stream(config, Rollouts(run, 3), 0, 1)
    first, second = ([batch.input.input_ids.tolist() for batch in again.step(places[step])] for step in (3, 4))
    assert first == second != [batch.input.input_ids.tolist() for batch in again.step(places[6])]
    again.chapters.close()


def test_the_newest_adapter_samples_that_the_chapter_allows(tmp_path: Path) -> None:
    """Of chapters for three updates each that of number 2 is for the steps from 6 on."""
    place, rules = open_store(str(tmp_path)), RolloutSettings(engine=["http://a:1"], updates=3, max_lag=1)
    found = []
    for step in (2, 4, 5, 6, 7, 9):
        place.put(layout.published(step), b"")
        found.append(serving._adapter_for(place, 2, rules))
    assert found == [None, None, 5, 6, 7, 7]  # 7 is there first where the chapter was lost behind step 6


def test_of_two_processes_one_commits(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    assert not is_committed(run, 3)
    assert commit(run, 3, rollouts(1), {"by": 1})
    before = {entry.key for entry in run.list()}
    assert not commit(run, 3, rollouts(2), {"by": 2})
    assert {entry.key for entry in run.list()} == before
    assert chapter_figures(run, 3) == {"by": 1}


@pytest.mark.parametrize("what", ["tokens", "columns", "samples", "manifest"])
def test_a_damaged_chapter_is_not_trained_on(workshop: Workshop, tmp_path: Path, what: str) -> None:
    run = open_store(str(tmp_path))
    commit(run, 0, rollouts(1), {})
    (key,) = (entry.key for entry in run.list(layout.dataset(layout.chapter_of_rollouts(0))) if f"/{what}" in entry.key)
    content = bytearray(run.get(key))
    content[len(content) // 2] ^= 1
    run.put(key, bytes(content))
    stream = rollout_stream(workshop.config("a", *GRPO), Rollouts(run, 1), 0, 1)
    with pytest.raises(Damaged):
        chapter_figures(run, 0) if what == "samples" else stream.step(Position())


def test_chapters_go_with_the_oldest_checkpoint_and_leave_their_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gone = open_store(str(tmp_path)), list[str]()
    delete = run.delete
    monkeypatch.setattr(run, "delete", lambda key: (gone.append(key), delete(key)))
    for number in range(4):
        commit(run, number, rollouts(number), {})
    Rollouts(run, 4).forget_before(2)
    assert [is_committed(run, number) for number in range(4)] == [False, False, True, True]
    kept = [
        entry.key.split("/")[1:] for entry in run.list() if "-000000001/" in entry.key or "-000000000/" in entry.key
    ]
    assert [name.partition("-")[0] for _, name in kept] == ["samples", "samples"]
    assert all(key.endswith("manifest.json") for key in gone[:2]), "a chapter that is half gone is none"


def prompts_of(workshop: Workshop, *overrides: str) -> Prompts:
    config = workshop.config("prompts", *GRPO, *overrides)
    store: Store = workshop.store
    data = open_chapters(store, workshop.prepare(config).train, store.sub("prompts"))
    return Prompts(data, train_order(config), config.train.global_batch)


def test_prompts_come_in_an_order_of_their_own(workshop: Workshop) -> None:
    rows = {
        tuple(row["prompt"].encode()): row["completion"]
        for row in map(json.loads, workshop.data.read_text().splitlines())
    }
    prompts, again = prompts_of(workshop), prompts_of(workshop)
    epoch = [one for step in range(15) for one in prompts.of(step)]
    assert len({tuple(one.prompt) for one in epoch}) == len(rows)
    assert again.of(7) == epoch[28:32]
    assert again.of(2) == epoch[8:12], "also backwards"
    assert prompts.of(15) != epoch[:4], "another epoch has another order"
    prompts._order = replace(prompts._order, weights=(1e-6,))
    with pytest.raises(DataError, match="epoch 0 visits no document, as weights of 1e-06 are too small"):
        prompts.of(0)


@pytest.mark.parametrize(
    ("name", "said", "wanted", "value"),
    [
        ("exact", " 12\n", "12 ", 1.0),
        ("exact", "12.", "12", 0.0),
        ("regex", "it is 12", "\\b12$ \n", 1.0),
        ("regex", "it is 123", r"\b12$", 0.0),
        ("math", r"It is \boxed{\frac12}.", "0.5", 1.0),
        ("math", "$1+x^2$", "x^2+1", 1.0),
        ("math", "1", "x^2+1", 0.0),
        ("math", "$0.5$", r"so \boxed{\frac12}", 1.0),
        ("math", "2", r"half of 4 is \boxed{2}", 1.0),
        ("json_schema", '{"a": 1}', '{"required": ["a"]}', 1.0),
        ("json_schema", '{"b": 1}', '{"required": ["a"]}', 0.1),
        ("json_schema", "a", '{"required": ["a"]}', 0.0),
        ("json_schema", "[" * 5000, "{}", 0.0),
        ("length", "1234", "12", 0.5),
        ("length", "1", "12", 1.0),
        ("length", "", "", 1.0),
        ("length", "12", "", 0.5),
    ],
)
def test_built_in_rewards(name: str, said: str, wanted: str, value: float) -> None:
    if name == "math":
        need(None if find_spec("math_verify") else "there is no math-verify: pip install math-verify")
    assert BUILT_IN[name](completions=[said], answer=[wanted]) == [value]
    assert set(BUILT_IN) == set(REWARDS)


def test_a_reward_gets_the_lists_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"prompts": ["?"], "completions": ["ab"], "answer": ["c"]}
    assert rewards.called(lambda completions, **more: [len(completions) + len(more)], given) == [3.0]
    assert rewards.called(lambda completions: [True], given) == [1.0]

    def of_numpy(completions: list[str]) -> Any:
        return np.array([0.5, 1], np.float32)

    figures = rewards.called(of_numpy, given)
    assert json.dumps(figures) == "[0.5, 1.0]", "as the process that asks reads them"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "own_reward.py").write_text("def most(completions):\n    return [7]\n")
    assert rewards.called(rewards.find_reward("own_reward:most"), given) == [7.0]
    assert rewards.find_reward("exact") is BUILT_IN["exact"]
    (tmp_path / "imported_later.py").write_text("VALUE = 3\n")
    (tmp_path / "imports_later.py").write_text(
        "def reward(completions):\n    import imported_later\n\n    return [imported_later.VALUE]\n"
    )
    found = rewards.find_reward("imports_later:reward")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert rewards.called(found, given) == [3.0], "its folder stays the one that it was started in"


def test_no_file_of_the_current_folder_stands_for_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, value in (("library", 1), ("here", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "in_both.py").write_text(f"def reward(completions):\n    return [{value}]\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.path", [*(path for path in sys.path if path), str(tmp_path / "library")])
    assert rewards.called(rewards.find_reward("in_both:reward"), {"completions": ["ab"]}) == [1.0]


OWN = "import json as other\n\ndef most(completions): ...\n"


@pytest.mark.parametrize(
    ("name", "source", "missing"),
    [
        ("exact", None, None),
        ("mine:most", OWN, None),
        ("mine:other", OWN, None),
        ("mine:least", OWN, "the module 'mine' has no 'least'"),
        ("mine:least", "from json import *\n", None),
        ("mine:least", "globals()['le' + 'ast'] = len\n", None),
        ("mine:most", "def most(:\n", "the module 'mine' cannot be read (invalid syntax (mine.py, line 1))"),
        ("mine:most", None, f"there is no module 'mine' in HERE nor among the packages of {sys.executable}"),
        ("mine.py:most", OWN, "there is no module 'mine.py' in HERE"),
        ("json.decoder:JSONDecoder", None, None),
        ("json.decoders:JSONDecoder", None, "there is no module 'json.decoders' in HERE"),
        ("math:factorial", None, None),  # a compiled module
        ("mine.made:most", "import sys\nsys.modules['mine.made'] = sys\n", None),
        ("mine.made:most", OWN, "there is no module 'mine.made' in HERE"),
        ("folder.mine:most", OWN, None),
        ("folder:most", OWN, "the module 'folder' has no 'most'"),
        ("folder.other:most", OWN, "there is no module 'folder.other' in HERE"),
        ("verifiers:some", "x = 1\n", None if find_spec("verifiers") else "there is no module 'verifiers' in HERE"),
        ("math", None, None if find_spec("math_verify") else "there is no module 'math_verify' in HERE"),
    ],
)
def test_a_reward_that_is_not_there_is_missed_before_it_is_called(
    name: str, source: str | None, missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source is not None:
        where = tmp_path / ("folder" if name.startswith("folder") else "")
        where.mkdir(exist_ok=True)
        (where / "mine.py").write_text(source)
    found = rewards.why_missing(name)
    assert (found or "").startswith((missing or "").replace("HERE", str(tmp_path)))
    assert (found is None) == (missing is None)
    assert "mine" not in sys.modules, "none of the user's code is run"


@pytest.mark.parametrize(
    ("code", "printed", "sentence"),
    [
        (3, "", "/env/python cannot look for it (exit code 3; rollout.reward_python)"),
        (0, "null", None),
        (
            0,
            '"there is no module"',
            "rollout.reward: mine:most is not found on .*: there is no module. Correct the name",
        ),
        (1, "", "/env/python cannot look for it (No module named x; rollout.reward_python)"),
        (None, "", "/env/python cannot be run (not there; rollout.reward_python)"),
    ],
)
def test_another_python_is_asked_what_it_lacks(
    code: int | None, printed: str, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> Any:
        assert (command[:2], command[3:]) == (["/env/python", "-c"], ["mine:most", "find"])
        if code is None:
            raise OSError("not there")
        return subprocess.CompletedProcess(
            command, code, printed, "Traceback\nNo module named x\n" if code == 1 else "\n"
        )

    monkeypatch.setattr(rewards.children, "run", run)
    given = RolloutSettings(reward="mine:most", reward_python="/env/python")
    if sentence is None:
        rewards.check_reward(given)
        return
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        rewards.check_reward(given)


def test_this_python_is_asked_for_a_reward_without_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rewards.check_reward(RolloutSettings())
    rewards.check_reward(RolloutSettings(reward="exact"))
    with pytest.raises(ConfigError, match="rollout.reward: mine:most is not found on .*: there is no module 'mine' in"):
        rewards.check_reward(RolloutSettings(reward="mine:most"))


@pytest.mark.parametrize(("name", "package"), [("math", "math_verify"), ("json_schema", "jsonschema")])
def test_a_built_in_reward_whose_package_lacks_is_missed(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("empty", "installed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "installed" / f"{package}.py").touch()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("sys.meta_path", [PathFinder])
    monkeypatch.setattr("sys.path", [str(tmp_path / "empty")])
    assert (rewards.why_missing(name) or "").startswith(f"there is no module '{package}' in {tmp_path}/empty nor")
    monkeypatch.setattr("sys.path", [str(tmp_path / "installed")])
    assert rewards.why_missing(name) is None


def test_the_process_of_a_reward_answers_each_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each answer is a line of its standard output, where nothing comes that the function prints."""
    (tmp_path / "of_lengths.py").write_text(
        "import os\nos.write(1, b'imported;')\n\ndef reward(completions):\n    os.write(1, b'printed;')\n"
        "    return [10 / len(said) for said in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.argv", ["rewards", "of_lengths:reward"])
    find, sought = rewards.find_reward, list[str]()
    monkeypatch.setattr(rewards, "find_reward", lambda name: sought.append(name) or find(name))
    given = [{"completions": said, "answer": [""] * len(said)} for said in (["ab", "abcd"], ["a", ""], ["abcde"])]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(one) + "\n" for one in given)))
    out = os.dup(1)
    try:
        rewards.main()
    finally:
        os.dup2(out, 1)
        os.close(out)
    found = capfd.readouterr()
    assert [json.loads(line) for line in found.out.splitlines()] == [
        {"rewards": [5.0, 2.5]},
        {"error": "ZeroDivisionError: division by zero"},
        {"rewards": [2.0]},
    ]
    assert found.err == "imported;" + 3 * "printed;"
    assert sought == ["of_lengths:reward"], "once, as the tasks of an environment may take long to load"


def test_a_process_that_is_asked_to_find_a_reward_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("exact", "null"), ("json:no_such", "\"the module 'json' has no 'no_such'\"")):
        monkeypatch.setattr("sys.argv", ["-c", name, "find"])
        rewards.main()
        assert capsys.readouterr().out == f"{said}\n"


@pytest.mark.parametrize(
    ("program", "sentence", "starts"),
    [
        ("time.sleep(60)", "has not answered within 0.2 s (rollout.reward_seconds), 3 times", 3),
        ("os.fork(); time.sleep(60)", "has not answered within 0.2 s (rollout.reward_seconds), 3 times", 3),
        (
            "while True:\n        sys.stdout.write('.'); sys.stdout.flush(); time.sleep(0.01)",
            "has not answered within 0.2 s (rollout.reward_seconds), 3 times",
            3,
        ),
        ("sys.exit()", "ended its process, 3 times", 3),
        ("print(json.dumps({'rewards': [1]}))", "gave 1 numbers for 2 answers, 3 times", 3),
        ("print(json.dumps({'rewards': [1, 2, 3]}))", "gave 3 numbers for 2 answers, 3 times", 3),
        ("print('{\"rewards\": [1, NaN]}')", "gave a number that is not finite, 3 times", 3),
        ("print(json.dumps({'error': 'ValueError: ' + 'x' * 400}))", "failed (ValueError: " + "x" * 288 + "), 3", 3),
        ("print(json.dumps({'rewards': [1, len(given['answer'][0])]}))", "", 1),
    ],
)
def test_a_process_that_gives_no_rewards_is_started_three_times(
    program: str, sentence: str, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[list[str]]()

    def start(command: list[str], **given: Any) -> Any:
        started.append(command)
        code = f"import json, os, sys, time\nfor line in sys.stdin:\n    given = json.loads(line)\n    {program}\n"
        return subprocess.Popen([sys.executable, "-I", "-S", "-u", "-c", code], **given)

    monkeypatch.setattr(rewards.children, "start", start)
    scoring = Scoring("mine:reward", 0.2 if "sleep" in program else 60.0)
    if sentence:
        with pytest.raises(RewardFailed) as error:
            scoring.rewards(["?", "?"], ["a", "b"], ["c", "d"])
        assert str(error.value).startswith(f"rollout.reward: mine:reward {sentence}")
    else:
        long = "y" * 200_000  # more than a pipe takes at once
        for _ in range(2):
            assert scoring.rewards(["?", "?"], ["a", "b"], [long, "d"]) == [1, 200_000]
    scoring.close()
    assert scoring._process is None
    assert started == [[sys.executable, "-m", "trainer.evaluate.rollout.rewards", "mine:reward"]] * starts


@pytest.mark.long  # each starts three processes
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tests.dist.rewards:hangs", "has not answered within 1 s"),
        ("tests.dist.rewards:fails", "failed (ValueError: no way to judge 2 answers), 3 times"),
        ("tests.dist.rewards:too_few", "gave 1 numbers for 2 answers"),
        ("tests.dist.no_such:thing", "failed (ModuleNotFoundError"),
    ],
)
def test_a_reward_that_gives_nothing(name: str, sentence: str) -> None:
    scoring = Scoring(name, 1.0 if "hangs" in name else 60.0)
    with pytest.raises(CapstanError) as error:
        scoring.rewards(["?", "?"], ["a", "b"], ["c", "d"])
    assert str(error.value).startswith(f"rollout.reward: {name} ")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.reward=null"], "rollout.reward: objective.name: grpo has each answer rewarded"),
        (["rollout.reward=exakt"], "rollout.reward: 'exakt' is not allowed"),
        (["rollout.reward='mine:'"], "rollout.reward: 'mine:' is not allowed"),
        (["rollout.max_lag=2"], "rollout.max_lag: has no effect with rollout.engine: own"),
        (["rollout.max_tokens=64"], "rollout.max_tokens: 64 leaves no room"),
        (["rollout.held_out=4"], "rollout.held_out: has no effect without eval.every"),
        (
            ["rollout.held_out=4", "eval.every=1", "eval.sets={more: {path: a.jsonl}}"],
            "rollout.held_out: has no effect without eval.every",
        ),
        (["train.epochs=1"], "train.epochs: objective.name: grpo has a step for"),
        (["sharding.sequence_parallel=2"], "sharding.sequence_parallel: 2 is not possible"),
        (["eval.per_epoch=2", "data.held_out=0.2"], "eval.per_epoch: objective.name: grpo counts no epochs"),
        (["checkpoint.per_epoch=2"], "checkpoint.per_epoch: objective.name: grpo counts no epochs"),
        (
            ["data.format=auto", "data.share_prefix=true"],
            "data.share_prefix: is not possible with objective.name: grpo",
        ),
        (["tuning={method: full}", "rollout.engine=[http://a:1]"], "rollout.engine: servers take adapters"),
        (
            ["tuning.through=stored", "rollout.engine=[http://a:1]"],
            "rollout.engine: servers put the adapter beside the base, but tuning.through: stored",
        ),
        (["rollout.serve.replicas=2"], "rollout.serve: has no effect without rollout.engine: serve"),
        (
            ["rollout.engine=[http://a:1]", "rollout.serve.replicas=2"],
            "rollout.serve: has no effect without rollout.engine: serve",
        ),
        (["objective.name=sft"], "rollout.reward: has no effect with objective.name: sft"),
    ],
)
def test_settings_that_do_not_suit_rollouts(workshop: Workshop, overrides: list[str], sentence: str) -> None:
    config = override(workshop.config("a", *GRPO), *overrides)
    (said,) = rollout_mismatches(config, find_objective(config), method_of(config))
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.reward=mine:judge"],
        ["tuning={method: full}", "quant.type=none"],
        ["tuning.through=stored"],
        ["rollout.engine=[http://a:1]", "rollout.max_lag=2"],
        ["rollout.engine=serve", "rollout.serve.replicas=2"],
        ["rollout.max_tokens=63"],
        ["rollout.held_out=4", "eval.every=1", "data.held_out=0.2"],
    ],
    ids=str,
)
def test_settings_that_suit_rollouts(workshop: Workshop, overrides: list[str]) -> None:
    config = override(workshop.config("a", *GRPO), *overrides)
    assert rollout_mismatches(config, find_objective(config), method_of(config)) == []


def test_a_run_goes_on_under_the_same_reward_alone(workshop: Workshop) -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        config = override(workshop.config("a", *GRPO), *overrides)
        return rollout_identity(config, find_objective(config))

    mine, other = identity(), {"reward": "length", "answers": 3, "max_tokens": 7, "temperature": 0.5, "updates": 2}
    for name, value in other.items():
        assert identity(f"rollout.{name}={value}", "rollout.max_lag=null") == {**mine, f"rollout.{name}": value}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"lag": 0, "log_ratio": 0.026}, True),  # a base in 4 bits that is served in 16
        ({"lag": 0, "log_ratio": 0.004}, False),
        ({"lag": 1, "log_ratio": 0.026}, False),  # the adapter is another one
        ({"loss": 1.0}, False),
    ],
)
def test_a_server_of_another_base_is_found(record: dict[str, float], said: bool) -> None:
    assert (unlike_sampler(record) is not None) is said


def served(
    run: Store, folder: Path, answer: Callable[[dict[str, Any]], Any], *, finds: bool = False
) -> list[list[Drawn]]:
    """The answers by two addresses of a server, which have the adapter of step 3 loaded. `finds`: they find it by its
    name.
    """
    prompts = 3

    def answered(body: dict[str, Any]) -> Any:
        return ({"tokens": [5]} if finds else 404) if isinstance(body.get("prompt"), str) else answer(body)

    for name in ("adapter_config.json", "PUBLISHED"):
        run.put(f"adapters/step-000000003/{name}", b"{}")
    with stub(answered) as url:
        servers = [CompletionsServer("rollout.engine", url, "") for _ in range(2)]
        sampler = ServerSampler(run, folder, servers)
        sampler.load(3)
        request = Request([[5, 6]] * prompts, 2, [4] * prompts, 1.0, 7, frozenset({2}))
        return sampler.sample(request)


def choices(body: dict[str, Any]) -> Any:
    drawn = {"token_ids": [9, 2], "logprobs": {"token_logprobs": [-0.5, -0.25]}}
    return b"loaded" if "lora_name" in body else {"choices": [drawn] * body["n"]}


def test_a_server_that_fails_for_a_moment_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_PAUSES", (0.0, 0.0))
    asked = list[dict[str, Any]]()

    def at_first(body: dict[str, Any]) -> Any:
        fails = body not in asked
        asked.append(body)
        return 500 if fails else choices(body)

    found = served(open_store(str(tmp_path / "run")), tmp_path / "adapters", at_first)
    assert found == [[Drawn([9, 2], [-0.5, -0.25])] * 2] * 3
    loaded = [body["lora_path"] for body in asked if "lora_path" in body]
    assert len(loaded) >= 2, "each server is told"
    assert all(Path(path).is_relative_to(tmp_path / "adapters") for path in loaded)
    assert {body["seed"] for body in asked if "seed" in body} == {7, 8, 9}
    asks = [body for body in asked if "seed" in body]
    assert all((body["stop_token_ids"], body["max_tokens"], body["n"]) == ([2], 4, 2) for body in asks)
    again = asked[asked.index(asks[0]) :]
    assert any("lora_path" in body for body in again), "a server that has started anew has no adapter"


def test_a_server_that_comes_later_gets_the_adapter_too_and_none_is_left_behind(tmp_path: Path) -> None:
    run, asked = open_store(str(tmp_path / "run")), list[str]()

    def answer(body: dict[str, Any]) -> Any:
        asked.extend(path for path in ("lora_path", "lora_name") if path in body)
        return 404 if isinstance(body.get("prompt"), str) else choices(body)

    for step in (3, 4):
        for name in ("adapter_config.json", "PUBLISHED"):
            run.put(f"adapters/step-00000000{step}/{name}", b"{}")
    with stub(answer) as one, stub(answer) as other:
        first, second = (CompletionsServer("rollout.engine", url, "") for url in (one, other))
        sampler, loaded = ServerSampler(run, tmp_path / "adapters", [first]), list[int]()
        for step, servers in ((3, [first]), (3, [first]), (3, [first, second]), (3, [first, second]), (4, [second])):
            sampler.servers = servers
            asked.clear()
            sampler.load(step)
            loaded.append(asked.count("lora_path"))
        assert loaded == [1, 0, 2, 0, 1]
        kept = {path.parent for path in (tmp_path / "adapters").rglob("adapter_config.json")}
        assert len(kept) == 1, "of the adapters before nothing is left on this machine"
        sampler.forget()
        assert not list((tmp_path / "adapters").rglob("adapter_config.json"))
        sampler.load(4)
        assert asked.count("lora_path") == 2, "what was dropped is loaded again"
        assert len(list((tmp_path / "adapters").rglob("adapter_config.json"))) == 1


def test_servers_that_start_with_the_run_are_those_that_are_still_there() -> None:
    there = {"a": b"http://a:1", "c": b"http://c:1"}

    def get(key: str) -> bytes:
        if key not in there:
            raise NotFound(key)
        return there[key]

    run: Any = SimpleNamespace(list=lambda of: [SimpleNamespace(key=key) for key in "abc"], get=get)
    rules = RolloutSettings(engine="serve")
    assert [server.url for server in serving._servers(rules, run)] == ["http://a:1", "http://c:1"]
    assert [server.url for server in serving._servers(RolloutSettings(engine=["http://b:1"]), run)] == ["http://b:1"]


def test_ranks_that_wait_for_answers_end_when_there_will_be_none(tmp_path: Path) -> None:
    run, waited = open_store(str(tmp_path)).sub("a"), list[str]()

    def pulse(*_: Any) -> None:
        waited.append("")
        give_up(run, ConfigError("server-1 is not there."))

    ranks: Any = SimpleNamespace(rank=0, gather=lambda *row: [row], on_first=lambda action: action())
    rollouts: Any = SimpleNamespace(is_ready=lambda chapter: False)
    start: Any = SimpleNamespace(ranks=ranks, folder=run, pulse=pulse, stop=SimpleNamespace(requested=0))
    start.config = SimpleNamespace(rollout=RolloutSettings())
    with pytest.raises(DataError, match="server-1 is not there."):
        supply._ready(start, rollouts, 0)
    assert len(waited) == 1


def test_what_a_server_that_has_died_was_asked_another_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_PAUSES", (0.0, 0.0))
    run = open_store(str(tmp_path / "run"))
    for name in ("adapter_config.json", "PUBLISHED"):
        run.put(f"adapters/step-000000003/{name}", b"{}")

    def loads(body: dict[str, Any]) -> Any:
        return 404 if isinstance(body.get("prompt"), str) else choices(body)

    with stub(loads) as living:
        with stub(loads) as dying:
            servers = [CompletionsServer("rollout.engine", url, "") for url in (living, dying)]
            sampler = ServerSampler(run, tmp_path / "adapters", servers)
            sampler.load(3)
        request = Request([[5, 6]] * 3, 2, [4] * 3, 1.0, 7, frozenset({2}))
        assert sampler.sample(request) == [[Drawn([9, 2], [-0.5, -0.25])] * 2] * 3


def test_what_no_waiting_mends_ends_the_run(tmp_path: Path) -> None:
    """A prompt that a server does not take is asked for once; an error of its own is not given up by itself."""
    run, asked = open_store(str(tmp_path)), list[Any]()

    def refuses(body: dict[str, Any]) -> Any:
        asked.append(body)
        return 400

    with stub(refuses) as url, pytest.raises(Refused, match="answered 400 to /v1/completions"), serving.giving_up(run):
        completions.again(lambda: CompletionsServer("rollout.engine", url, "").sample("m", [1, 2], max_tokens=3))
    assert len(asked) == 1
    assert "answered 400" in str(given_up(run))
    run.delete(layout.NO_MORE_DATA)
    with pytest.raises(CapstanError), serving.giving_up(run):
        raise CapstanError("it does not answer")
    assert given_up(run) is None
    with pytest.raises(RewardFailed), serving.giving_up(run):
        Scoring("tests.dist.no_such:thing", 60.0, "/no/python").rewards(["?"], ["a"], ["b"])
    assert "correct it" in str(given_up(run))


def test_a_server_that_reads_the_store_takes_the_adapter_by_its_name(tmp_path: Path) -> None:
    asked, run = list[dict[str, Any]](), open_store(str(tmp_path)).sub("first/rollouts/0123456789ab")

    def answer(body: dict[str, Any]) -> Any:
        asked.append(body)
        return choices(body)

    served(run, tmp_path / "adapters", answer, finds=True)
    assert not any("lora_path" in body for body in asked)
    assert not (tmp_path / "adapters").exists(), "nothing is copied to this machine"
    (name,) = {body["model"] for body in asked if "model" in body}
    resolver = StoreResolver(open_store(str(tmp_path)), dict)
    request = asyncio.run(resolver.resolve_lora("base", name))
    assert request["lora_name"] == name
    assert (Path(request["lora_path"]) / "adapter_config.json").read_bytes() == b"{}"
    absent = name.replace("000000003", "000000004")
    for other in (absent, "first", name.replace("first", ".."), f"../{name}", name.replace("first", "x/first")):
        assert asyncio.run(resolver.resolve_lora("base", other)) is None
    assert adapter_named(served_name(run, 3, "0" * 8)) == ("first/rollouts/0123456789ab", 3, "0" * 8)
    assert adapter_named(name.replace("first", "..")) is None, "it lies in no folder of a run"


def test_published_adapters_are_told_in_order() -> None:
    keys = [f"adapters/step-0000000{step}/{name}" for step in ("10", "03") for name in ("PUBLISHED", "weights")]
    place: Any = SimpleNamespace(list=lambda prefix: [SimpleNamespace(key=key) for key in keys])
    assert published.published(place) == [3, 10]


def test_a_server_keeps_the_newest_adapters_that_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_KEPT", 2)
    run = open_store(str(tmp_path)).sub("first/rollouts/0123456789ab")
    for name in ("adapter_config.json", "PUBLISHED"):
        run.put(f"adapters/step-000000003/{name}", b"{}")
    resolver = StoreResolver(open_store(str(tmp_path)), dict)
    read = [asyncio.run(resolver.resolve_lora("base", served_name(run, 3, f"{number:08x}"))) for number in range(3)]
    assert [Path(one["lora_path"]).is_dir() for one in read] == [False, True, True]


@pytest.mark.parametrize("uri", [None, "", "the store"])
def test_a_server_finds_adapters_if_the_environment_names_a_store(
    uri: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = dict[str, Any]()
    asks = SimpleNamespace(LoRARequest=lambda **given: given)
    registry = SimpleNamespace(register_resolver=registered.__setitem__)
    for name, module in (("request", asks), ("resolver", SimpleNamespace(LoRAResolverRegistry=registry))):
        monkeypatch.setitem(sys.modules, f"vllm.lora.{name}", module)
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.delenv("CAPSTAN_STORE", raising=False)
    if uri is not None:
        monkeypatch.setenv("CAPSTAN_STORE", uri and str(tmp_path))
    published.register()
    assert list(registered) == (["capstan"] if uri else [])
    if uri:
        run = open_store(str(tmp_path)).sub("first/rollouts/0123456789ab")
        for name in ("adapter_config.json", "PUBLISHED"):
            run.put(f"adapters/step-000000003/{name}", b"{}")
        name = served_name(run, 3, "0" * 8)
        assert asyncio.run(registered["capstan"].resolve_lora("base", name))["lora_name"] == name


def test_servers_share_the_prompts(tmp_path: Path) -> None:
    asked: list[list[int]] = [[], []]
    sampler: Any = ServerSampler(open_store(str(tmp_path)), tmp_path)
    sampler.servers = [
        SimpleNamespace(sample=lambda *_, seed, mine=mine, **__: mine.append(seed) or [([9], [-0.5])]) for mine in asked
    ]  # type: ignore[assignment]
    sampler._name = "an adapter"
    sampler.sample(Request([[5, 6]] * 5, 1, [4] * 5, 1.0, 7, frozenset({2})))
    assert [sorted(mine) for mine in asked] == [[7, 9, 11], [8, 10]]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda body: b"loaded" if "lora_name" in body else 500, "answered 500 to /v1/completions: out of slots"),
        (
            lambda body: b"loaded" if "lora_name" in body else {"choices": [{"token_ids": []}]},
            "without what vLLM gives",
        ),
        (lambda body: 404, "answered 404 to /v1/load_lora_adapter"),
        (lambda body: b"loaded" if "lora_name" in body else 400, "answered 400 to /v1/completions"),
    ],
    ids=["fails", "nothing", "no-adapters", "too-long"],
)
def test_a_server_that_gives_nothing_is_one_sentence(
    answer: Callable[[dict[str, Any]], Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "_PAUSES", (0.0, 0.0))
    with pytest.raises(CapstanError, match=sentence):
        served(open_store(str(tmp_path / "run")), tmp_path / "adapters", answer)


OPD = ("objective={name: opd, teacher: 'http://teacher:8000#big'}", *GRPO[1:])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("{name: opd}", "objective.teacher and objective.teacher_run: none is set, and opd has one teacher"),
        ("{name: opd, teacher: 'http://a', teacher_quant: nf4}", "objective.teacher_quant: a server as teacher"),
        ("{name: opd, teacher_run: big, teacher_quant: nf4}", "objective.teacher_quant: has no effect"),
    ],
)
def test_a_run_has_one_judge(workshop: Workshop, given: str, sentence: str) -> None:
    (said,) = find_objective(override(workshop.config("a", *OPD), f"objective={given}")).mismatches()
    assert said.startswith(sentence)


def test_a_token_is_worth_what_the_judge_thinks_of_it(workshop: Workshop, tmp_path: Path) -> None:
    """The advantages of a chapter are the judge's log p less the sampler's, and the loss goes where the judge is
    surer.
    """
    objective: Any = find_objective(workshop.config("a", *OPD))
    judged = {5: -1.0, 9: -0.25, 2: -2.0}

    def judge(body: dict[str, Any]) -> Any:
        assert body["model"] == "big"
        places = [None, *({str(token): {"logprob": judged[token]}} for token in body["prompt"][1:])]
        return {"choices": [{"prompt_logprobs": places, "token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}}]}

    with stub(judge, "big") as url:
        asked = CompletionsServer.find("objective.teacher", f"{url}#big")
        gaps = making.judged_gaps(asked, [[7, 5], [7]], [Drawn([9, 2], [-0.5, -0.75]), Drawn([9], [-1.0])])
    assert gaps == [[0.25, -1.25], [0.75]]
    (advantages,) = {tuple(map(tuple, objective.advantages(np.zeros((1, 2)), gaps)))}
    run = open_store(str(tmp_path))
    commit(run, 0, [Rollout([7, 5], [9, 2], [-0.5, -0.75], advantages[0], {})], {})
    assert Rollouts(run, 1).read([0])[:, 1].tolist() == [0.25, -1.25]


def test_a_chapter_is_ready_when_its_teacher_has_judged_it(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    commit(
        run, 0, [Rollout([7, 5], [9, 2], [-0.5, -0.75], 0.0, {}), Rollout([7], [4], [-1.0], 0.0, {})], {"adapter": 0}
    )
    assert Rollouts(run, 1).is_ready(0)
    judged = Rollouts(run, 1, judged=True)
    with pytest.raises(NotFound):  # so nobody reads ahead what is not judged
        judged._open(0)
    said = np.array([-0.25, -1.75, -2.0], np.float32)
    assert commit_judgement(run, 0, said, 0.5)
    assert not commit_judgement(run, 0, said + 1, 0.25), "of two processes one commits"
    assert judged.is_ready(0)
    assert judged.figures(0) == {"adapter": 0, "divergence": 0.5}
    assert judged.read([0, 1])[:, 1].tolist() == [0.25, -1.0, -1.0]
    (key,) = (entry.key for entry in run.list() if "/judged-" in entry.key)
    run.put(key, said.tobytes()[:-4] + b"abcd")
    with pytest.raises(Damaged):
        Rollouts(run, 1, judged=True).read([0])


def test_a_server_answers_under_the_runs_format(workshop: Workshop) -> None:
    asked, told = list[dict[str, Any]](), list[dict[str, Any]]()
    run = workshop.store.sub("first")
    run.put(layout.CONFIG, dump_config(workshop.config("first")).encode())

    def answer(body: dict[str, Any]) -> Any:
        asked.append(body)
        return choices(body)

    with stub(answer, "base", "first") as url:
        ask = Ask("generate", run.uri, sampling={"temperature": 0.5, "seed": 7}, server=url)
        found = generate(ask, [[{"prompt": "ant? "}], [], [{"prompt": "bee? "}]], told.append)
    assert [row["prompt"] for row in found["answers"]] == ["ant? ", "bee? "]
    assert found["server"] == f"{url}#first"
    assert told[0] == {"log": f"answers are those of first at {url}"}
    assert [(body["model"], body["seed"], len(body["prompt"])) for body in asked] == [("first", 7, 5), ("first", 8, 5)]
    assert 2 in asked[0]["stop_token_ids"]
    assert all(one["answers"] for one in told if "answers" in one), "an empty list asks nothing"


def test_a_server_is_asked_for_no_step(workshop: Workshop) -> None:
    run = workshop.store.sub("first")
    for step in (3, 0):
        ask = Ask("generate", run.uri, step, server="http://gpu-1:8000")
        with pytest.raises(ConfigError, match="--step, --best and --base have no effect"):
            generate_answers(ask, run, workshop.config("first"), (), print, None)
