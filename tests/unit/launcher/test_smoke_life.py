"""The smoke run's own work beside the commands that it starts: what it makes of a configuration, when it kills, what it
compares, and what it says of a part that fails.
"""

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from rich.progress import TaskID

from launcher.smoke import life, local_s3
from launcher.smoke.life import LifeCommand, _Life, plan_smoke, run_smoke
from launcher.smoke.small import config_of_sample, first_rows, rows_with_regex
from launcher.smoke.verdict import SmokePlan, SmokeResult, table
from tests.unit.run.made_records import CONFIG, start, step, write
from trainer.config import override, parse_config
from trainer.errors import CapstanError, ConfigError, DataError, DoesNotFit
from trainer.run import layout
from trainer.store.store import Store


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def shown(count: int) -> None:
        monkeypatch.setattr("launcher.smoke.small.local_gpus", lambda: count)

    shown(0)
    return shown


ANSWERING = ("tests.toys.answering", "{}")


def test_a_command_gives_what_it_prints_or_its_exit_code_and_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert json.loads(LifeCommand(log, "json.tool").output('{"a": 1}')) == {"a": 1}
    with pytest.raises(CapstanError, match=r"exit code 3: rank 0 of 1 \(all of it in .*log\)$") as refused:
        LifeCommand(log, *ANSWERING).output('[{"prompt": "refuse"}]\n')
    assert refused.value.exit_code == 3
    killed = LifeCommand(log, "json.tool")
    with killed:
        assert killed._process.poll() is None
    with pytest.raises(CapstanError, match="exit code -9") as caught:
        killed.check()
    assert caught.value.exit_code == 1


def test_a_command_that_does_not_end_is_waited_for_as_long_as_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "_POLL_SECONDS", 0.05)
    with LifeCommand(tmp_path / "log", "json.tool") as command:
        assert command.runs()
        command._deadline = 0.0
        with pytest.raises(CapstanError, match="no end after 600 s: it said nothing"):
            command.runs()
        command._process.kill()
        command._process.wait()
        assert not command.runs()


def test_the_secret_of_the_local_store_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_s3, "_binary", lambda: "weed")
    server = local_s3.S3Server(tmp_path)
    command = server._command()
    settings = tmp_path / "s3.json"
    assert f"-s3.config={settings}" in command
    assert server.environment["AWS_SECRET_ACCESS_KEY"] in settings.read_text()
    assert settings.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("code", "exit_code"), [(5, 5), (-9, 1)])
def test_a_part_that_fails_ends_the_smoke_run_with_its_own_exit_code(tmp_path: Path, code: int, exit_code: int) -> None:
    part = LifeCommand.__new__(LifeCommand)
    part._log, part._process = tmp_path / "log", cast(Any, SimpleNamespace(returncode=code))
    part._log.write_text("before\ndoes not fit\n")
    said = rf"^a part of the smoke run ended with exit code {code}: does not fit \(all of it in "
    with pytest.raises(CapstanError, match=said) as failed:
        part.check()
    assert failed.value.exit_code == exit_code


@pytest.fixture
def begun(tmp_path: Path) -> _Life:
    made = _Life(tmp_path, SmokeResult(), False, online=True)
    made.store_uri = str(tmp_path / "store")
    return made


class Ends:
    """A command that does these things in turn while it is looked at, and then ends."""

    def __init__(self, *meanwhile: Callable[[], None]) -> None:
        self._meanwhile = list(meanwhile)

    def runs(self) -> bool:
        if self._meanwhile:
            self._meanwhile.pop(0)()
            return True
        return False

    def last_words(self) -> str:
        return "all done"


def test_a_run_is_killed_behind_its_first_commit_and_not_at_it(begun: _Life, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = list[tuple[int, int]]()
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    run, task = begun.runs.sub("smoke"), begun.progress.add_task("", steps="")
    first, commit = {**start(1), "pids": [11, 12]}, {"kind": "commit", "step": 5}

    def taken(steps: int, *others: dict[str, Any]) -> Callable[[], None]:
        return lambda: write(run, 1, first, *others, *(step(number, 3.0) for number in range(1, steps + 1)))

    command = Ends(taken(7, {**commit, "step": 4}), taken(5, commit), taken(6, commit), taken(9, commit))
    assert begun.kill(cast(LifeCommand, command), run, TaskID(task)) == 6
    assert killed == [(11, signal.SIGKILL), (12, signal.SIGKILL)]
    with pytest.raises(CapstanError, match="the run to be killed ended by itself: all done"):
        begun.kill(cast(LifeCommand, Ends(taken(5, commit))), run, TaskID(task))


def test_the_resumed_run_is_compared_with_the_undisturbed_one_step_by_step(begun: _Life) -> None:
    run, other, result = begun.runs.sub("smoke"), begun.runs.sub("undisturbed"), begun.result
    losses = {number: 20.0 - number for number in range(1, 16)}

    def steps(numbers: range, rewards: float, apart: dict[int, float] | None = None) -> list[dict[str, Any]]:
        return [
            {**step(number, losses[number] + (apart or {}).get(number, 0.0)), "reward": rewards + number}
            for number in numbers
        ]

    write(run, 1, start(1, world_size=2), *steps(range(1, 9), 100))
    write(run, 2, start(2, step=5, world_size=1), *steps(range(6, 16), 0, {9: 0.25, 12: -0.5}))
    write(other, 1, start(1, world_size=1), *steps(range(1, 16), 0))
    for number in (5, 10, 15):
        run.put(layout.manifest(number), b"{}")
    begun.compare()
    assert (result.world_after, result.resumed_at_step, result.steps, result.checkpoints) == (1, 5, 15, 3)
    assert (result.loss_first, result.loss_last) == (17.0, 7.0 - 0.5 / 5)
    assert result.resume_loss_gap == 0.5

    kept = {
        f"rollouts/chapter-{number:09d}/{name}": name.encode() for number in (0, 1) for name in ("manifest.json", "a")
    }
    for key, content in kept.items():
        run.put(key, content)
    begun.hand_over_answers()
    assert {key: other.get(key) for key in kept} == kept
    assert result.chapters == 2
    # Steps 6 to 8 were taken again: the later start's count.
    assert (result.reward_first, result.reward_last) == (103.0, 13.0)


USERS = """
run: {name: mine}
model: {base: /bases/large}
data: {train: [{path: /rows/a.jsonl}], held_out: 0.1, sequence_length: 4096}
train: {epochs: 3, global_batch: 64, micro_batch: 4, sample_every: 10}
eval: {every: 5, prompts: /rows/prompts.txt, sets: {own: {path: /rows/b.jsonl}}}
optim: {warmup_ratio: 0.1}
checkpoint: {keep_best: 2, every_steps: 500}
cluster: {workers: 8, keeper: true, spares: 1}
sharding: {sequence_parallel: 4}
"""


def test_a_users_run_in_small_has_few_short_steps_on_two_ranks_and_saves_all_of_them(
    tmp_path: Path, gpus: Callable[[int], None]
) -> None:
    planned = plan_smoke(parse_config(USERS), layers=3, directory=tmp_path)
    small: Any = planned.config
    assert (small["run"]["name"], small["run"]["store"]) == ("mine", str(tmp_path / "store"))
    assert (small["model"]["base"], small["model"]["layers"]) == ("/bases/large", 3)
    assert (small["train"]["steps"], small["train"]["epochs"], small["train"]["sample_every"]) == (15, None, 0)
    assert (small["train"]["global_batch"], small["train"]["micro_batch"]) == (2, 1)
    assert small["data"]["sequence_length"] == 512
    assert (small["checkpoint"]["every_steps"], small["checkpoint"]["keep_last"]) == (5, 15)
    assert (small["checkpoint"]["keep_best"], small["eval"]["every"], small["eval"]["sets"]) == (0, 0, {})
    assert (small["cluster"]["workers"], small["cluster"]["spares"], small["sharding"]["sequence_parallel"]) == (
        2,
        0,
        2,
    )
    assert (small["optim"]["warmup_ratio"], small["optim"]["warmup_steps"]) == (None, 0)
    assert small["retry"] == {**small["retry"], "failures": 0, "skip_bad_window": False}
    assert small["train"]["deterministic"] is False
    gpus(1)
    small = plan_smoke(parse_config(USERS), layers=None, directory=tmp_path).config
    assert (small["cluster"]["workers"], small["sharding"]["sequence_parallel"], small["model"]["layers"]) == (
        1,
        1,
        None,
    )
    assert small["train"]["deterministic"] is True, "a killed run is compared with one that was not"
    assert planned.to_json()["dry_run"] is True
    assert "train 15 steps undisturbed" in planned.text()
    assert "base: /bases/large" in planned.text()
    assert "a sample made on the spot" in SmokePlan("here", 15, 5, None).text()


def test_a_users_run_that_is_smaller_already_stays_as_small(tmp_path: Path) -> None:
    mine = ("train.global_batch=1", "data.sequence_length=64", "cluster.workers=1", "sharding.sequence_parallel=1")
    rewarded = ("objective.name=grpo", "rollout={reward: exact, answers: 3, max_tokens: 2}")
    given = override(parse_config(USERS), *mine, *rewarded, "optim.warmup_ratio=null", "optim.warmup_steps=1")
    small: Any = plan_smoke(given, layers=None, directory=tmp_path).config
    assert (small["train"]["global_batch"], small["data"]["sequence_length"]) == (1, 64)
    assert (small["cluster"]["workers"], small["optim"]["warmup_steps"]) == (1, 1)
    assert (small["rollout"]["answers"], small["rollout"]["max_tokens"]) == (3, 2)


def test_a_run_that_learns_from_rewards_in_small_samples_few_short_answers_by_itself(tmp_path: Path) -> None:
    online = override(
        parse_config(USERS),
        "objective.name=grpo",
        "rollout={engine: serve, answers: 64, max_tokens: 999, updates: 2, held_out: 5, reward: exact}",
        "data.sequence_length=100",
        "sharding.sequence_parallel=1",
        "cluster.workers=1",
    )
    small: Any = plan_smoke(online, layers=None, directory=tmp_path).config
    asked = {"engine": "own", "answers": 8, "max_tokens": 4, "updates": 1, "held_out": 0, "max_lag": None}
    assert small["rollout"] == {**small["rollout"], **asked, "reward": "exact"}
    assert (small["data"]["sequence_length"], small["cluster"]["workers"]) == (100, 1)


def test_the_sample_learns_from_what_it_was_asked_to_and_takes_overrides(gpus: Callable[[int], None]) -> None:
    def sample(*overrides: str, **kind: bool) -> Any:
        return config_of_sample("/base", ["/a", "/b"], "fp32", overrides, "/store", **kind).model_dump()

    plain, online, pictures = sample("optim.lr=1"), sample(online=True), sample(images=True)
    assert (plain["optim"]["lr"], plain["data"]["sequence_length"], plain["train"]["steps"]) == (1.0, 256, 15)
    assert [source["path"] for source in plain["data"]["train"]] == ["/a"]
    assert (plain["objective"]["name"], plain["data"]["format"]) == ("sft", "auto")
    assert (online["objective"]["name"], online["rollout"]["reward"]) == ("grpo", "regex")
    assert (pictures["data"]["format"], pictures["data"]["sequence_length"]) == ("pictures", 512)
    assert (pictures["train"]["steps"], pictures["train"]["global_batch"]) == (40, 4)
    assert plain["model"]["dtype"] == "fp32"
    gpus(2)
    assert sample()["model"]["dtype"] == "bf16"


def test_rows_are_the_first_of_each_source_and_a_bad_one_is_what_the_settings_make_of_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "no"}]
    file.write_text("".join(json.dumps({"messages": talk, "number": number}) + "\n" for number in range(2005)))
    config = parse_config(CONFIG, [f"data.train=[{{path: {file}, weight: 2}}]"])
    (source,) = first_rows(config.data, tmp_path)
    kept = [json.loads(line)["number"] for line in Path(source.path).read_text().splitlines()]
    assert (kept, source.weight) == (list(range(2000)), 2)
    of_hub = config.data.train[0].model_copy(update={"subset": "en", "split": "train"})
    (source,) = first_rows(config.data.model_copy(update={"train": [of_hub]}), tmp_path)
    assert (source.subset, source.split) == (None, None), "the copy is a local file, which has neither"
    rewarded = Path(rows_with_regex(str(file), tmp_path)).read_text().splitlines()
    assert (len(rewarded), json.loads(rewarded[0])["messages"]) == (
        2000,
        [talk[0], {"role": "assistant", "content": "^[a-z]+"}],
    )
    file.write_text('{"text": "good"}\nbad\n')
    with pytest.raises(DataError):
        first_rows(config.data, tmp_path)
    (source,) = first_rows(override(config, "data.on_bad_row=skip").data, tmp_path)
    assert Path(source.path).read_text() == '{"text": "good"}\n'


def test_options_that_a_configuration_answers_are_refused_and_a_part_that_fails_is_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(CONFIG, [f"data.train=[{{path: {tmp_path}/none.jsonl}}]"])

    def smoke(given: Any, *, online: bool = False, images: bool = False) -> SmokeResult:
        asked: dict[str, Any] = {"layers": None, "directory": tmp_path / "work", "show": False}
        return run_smoke(given, (), online=online, images=images, **asked)

    for given, options, said in (
        (config, {"online": True}, "--online: has no effect"),
        (config, {"images": True}, "--images: has no effect"),
        (None, {"online": True, "images": True}, "--images: rollouts take text alone"),
    ):
        with pytest.raises(ConfigError, match=said):
            smoke(given, **options)
    monkeypatch.setattr(local_s3, "available", lambda: False)
    before = dict(os.environ)
    result = smoke(config)
    assert dict(os.environ) == before
    assert (result.ok, result.exit_code) == (False, 3)
    assert result.error is not None
    assert "none.jsonl" in result.error
    assert "a local folder" in str(result.store)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(result))
    assert "capstan smoke: NOT OK" in shown.get()
    assert result.error.split("/")[0] in shown.get()
    assert "FAILED" in shown.get()


def test_the_commands_of_a_smoke_run_trust_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[dict[str, Any]]()
    monkeypatch.delenv("CAPSTAN_TRUST_RUN", raising=False)
    monkeypatch.setattr(life.children, "start", lambda command, **how: started.append({"command": command, **how}))
    LifeCommand(tmp_path / "log", "launcher.cli", "train", "run.yaml")
    (found,) = started
    assert found["command"][1:] == ["-m", "launcher.cli", "train", "run.yaml"]
    assert found["env"] == {**os.environ, "CAPSTAN_TRUST_RUN": "1"}, "even where nobody has a home"


def test_a_local_s3_is_there_for_the_smoke_run_alone(begun: _Life, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()

    class Server:
        def __init__(self, directory: Path) -> None:
            self.environment = {"AWS_REGION": "here", "no_proxy": "127.0.0.1"}

        def start(self) -> None:
            done.append("started")

        def uri(self, bucket: str) -> str:
            return f"s3://{bucket}"

        def kill(self) -> None:
            done.append("killed")

    monkeypatch.setattr(local_s3, "available", lambda: True)
    monkeypatch.setattr(local_s3, "S3Server", Server)
    monkeypatch.delenv("AWS_REGION", raising=False)
    monkeypatch.setenv("no_proxy", "mine")
    before = dict(os.environ)
    with begun.store(None):
        assert (os.environ["AWS_REGION"], os.environ["no_proxy"]) == ("here", "127.0.0.1")
        assert begun.store_uri.startswith("s3://capstan/smoke-")
        assert done == ["started"]
    assert (done, dict(os.environ)) == (["started", "killed"], before)
    assert begun.result.store == "S3 (SeaweedFS on 127.0.0.1)"


def test_a_smoke_run_that_does_not_fit_its_ranks_ends_before_it_begins(
    begun: _Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, short = list[Any](), list[str]()

    def make_plan(config: Any, base: Any, *machine: Any) -> Any:
        planned.append((config.cluster.most_workers, base, *machine))
        return SimpleNamespace(shortfalls=short)

    monkeypatch.setattr(life, "make_plan", make_plan)
    monkeypatch.setattr(life, "describe_base", lambda model: "the base")
    begun.plan(parse_config(USERS, ["cluster.workers=2", "sharding.sequence_parallel=1"]))
    begun.plan(parse_config(CONFIG))
    assert planned == [(2, "the base", 2, 2, None), (None, "the base", 1, 1, None)]
    short.extend(["too large", "too long"])
    with pytest.raises(DoesNotFit, match="^too large\ntoo long$"):
        begun.plan(parse_config(CONFIG))


@pytest.mark.parametrize(
    ("users", "gpus_here", "together"), [(False, 0, True), (False, 2, False), (True, 0, False), (True, 2, False)]
)
def test_runs_of_the_sample_share_processors_and_those_of_a_users_base_take_turns(
    users: bool, gpus_here: int, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()
    for name, made in {
        "store": lambda *_: nullcontext(),
        "material": lambda *_: "the configuration",
        "plan": lambda *_: None,
        "prove": lambda _self, config, *, together: asked.append(together),
    }.items():
        monkeypatch.setattr(_Life, name, made)
    monkeypatch.setattr(life, "local_gpus", lambda: gpus_here)
    given = parse_config(CONFIG) if users else None
    run_smoke(given, (), layers=None, online=False, images=False, directory=tmp_path, show=False)
    assert asked == [together]


@pytest.mark.parametrize(
    ("how", "order"),
    [
        ("together", ["interrupt", "export", "follow undisturbed", "compare"]),
        ("in turn", ["follow undisturbed", "interrupt", "export", "compare"]),
        ("online", ["interrupt", "export", "hand_over_answers", "follow undisturbed", "compare"]),
    ],
)
def test_the_undisturbed_run_is_beside_before_or_behind_the_others(
    how: str, order: list[str], begun: _Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, exported = list[str](), threading.Event()

    def follow(_command: Any, run: Store, generation: int, _what: str) -> None:
        if how == "together":
            assert exported.wait(30)
        done.append(f"follow {run.uri.rpartition('/')[2]}")
        assert generation == 1

    def export() -> None:
        done.append("export")
        exported.set()

    for name in ("interrupt", "hand_over_answers", "compare"):
        monkeypatch.setattr(begun, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(begun, "export", export)
    monkeypatch.setattr(begun, "follow", follow)
    monkeypatch.setattr(begun, "begin", lambda *_: nullcontext())
    learns = ["objective.name=grpo", "rollout.reward=exact"] if how == "online" else []
    begun.prove(parse_config(CONFIG, learns), together=how == "together")
    assert done == order
    alone = parse_config((begun.directory / "undisturbed.yaml").read_text())
    assert (alone.run.name, alone.cluster.most_workers) == ("undisturbed", 1)
