"""What the verbs make of their options: whom they ask with which of them, what they print where, and their exit codes."""

import io
import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli import __main__ as main
from launcher.cli.__main__ import app
from launcher.cli.command import commands, say
from tests.unit.launcher.test_sweep import write_run, write_sweep
from trainer.config import dump_config, load_config
from trainer.errors import ConfigError, DataError, StorageError
from trainer.run import layout
from trainer.run.folder import command
from trainer.run.owner import newest_number, take
from trainer.run.records import claim_generation
from trainer.run.requests import read_stop
from trainer.store.store import Store, open_store

RUN = "run: {name: mine, store: %s}\nmodel: {base: base}\ndata: {train: [{path: train.jsonl}]}\ntrain: {steps: 10}\n"


@dataclass
class Told:
    """What a function that a verb calls was given, and what it answers."""

    answer: Any = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls.append((given, named))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass
class Answer:
    """A result of any verb."""

    ok: bool = True
    exit_code: int = 0
    sentence_of: str = "it is so"

    def to_json(self) -> dict[str, Any]:
        return {"answer": self.sentence_of}

    def text(self) -> str:
        return self.sentence_of

    table = sentence = text

    def check(self) -> None:
        if not self.ok:
            raise ConfigError("does not fit")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


@pytest.fixture
def given(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(RUN % tmp_path)
    return str(tmp_path / "run.yaml")


def told(monkeypatch: pytest.MonkeyPatch, name: str, answer: Any = None) -> Told:
    function = Told(answer)
    monkeypatch.setattr(name, function)
    return function


def capstan(*words: str, code: int | type[Exception] = 0) -> tuple[str, str]:
    """What a command prints on stdout and on stderr."""
    done = CliRunner().invoke(app, [*words])
    if isinstance(code, int):
        assert done.exit_code == code, done.output
    else:
        assert isinstance(done.exception, code), done.output
    return done.stdout, done.stderr


def test_an_export_is_compared_with_a_server_only_to_verify_it(store: Store) -> None:
    refused = (
        CliRunner().invoke(app, ["export", "first", "out", "--store", store.uri, "--server", "http://a"]).exception
    )
    assert str(refused) == "--server is what --verify compares with, so it has no effect alone. Add --verify."


def test_doctor_needs_a_file_only_to_read_its_base(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    asked = told(monkeypatch, "launcher.doctor.doctor.diagnose", Answer())
    told(monkeypatch, "launcher.doctor.doctor.diagnosis_table", "a table")
    assert capstan("doctor", "--store", "s3://b")[0] == "a table\n"
    assert capstan("doctor", "--config", given, "--base", "--json")[0] == '{"answer": "it is so"}\n'
    assert asked.calls == [
        (("s3://b", None), {"reads_base": False}),
        ((None, load_config(given)), {"reads_base": True}),
    ]
    capstan("doctor", "--base", code=ConfigError)
    asked.answer = Answer(ok=False)
    capstan("doctor", code=2)


def test_plan_asks_for_the_longest_row_or_for_the_run(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    longest = told(monkeypatch, "launcher.plan.summary.find_longest", Answer())
    told(monkeypatch, "launcher.plan.summary.show_longest", "rows")
    planned = told(monkeypatch, "launcher.plan.planning.plan_run", Answer())
    shown = told(monkeypatch, "launcher.plan.summary.show_plan", "a plan")
    assert capstan("plan", given, "train.steps=3", "--longest", "--gpu", "H100", "--ranks-per-node", "8")[0] == "rows\n"
    assert not planned.calls
    run = load_config(given, ["train.steps=3"])
    assert longest.calls == [((run, "H100", 8), {})]
    assert capstan("plan", given, "train.steps=3", "--store-rate", "2")[0] == "a plan\n"
    assert planned.calls == [((run, None, None, 50_000, 2e9), {})]
    assert shown.calls == [((planned.answer, run), {})]
    planned.answer = Answer(ok=False)
    assert capstan("plan", given, code=ConfigError)[0] == "a plan\n", "it is shown although it does not fit"
    assert planned.calls[-1] == ((load_config(given), None, None, 50_000, None), {})


def test_smoke_ends_with_the_exit_code_of_what_failed(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    smoked = told(monkeypatch, "launcher.smoke.life.run_smoke", Answer())
    planned = told(monkeypatch, "launcher.smoke.life.plan_smoke", Answer())
    told(monkeypatch, "launcher.smoke.verdict.table", "all is well")
    assert capstan("smoke", given, "--dry-run", "--layers", "2")[0] == "it is so\n"
    assert planned.calls == [((load_config(given),), {"layers": 2, "directory": Path("smoke")})]
    assert not smoked.calls
    assert capstan("smoke", "--online", "--json")[0] == '{"answer": "it is so"}\n'
    kinds = {"online": True, "images": False, "layers": None, "directory": Path("smoke"), "show": False}
    assert smoked.calls == [((None, ()), kinds)]
    for exit_code, code in ((6, 6), (0, 1)):
        smoked.answer = Answer(ok=False, exit_code=exit_code)
        assert capstan("smoke", given, "train.steps=3", code=code)[0] == "all is well\n"
    assert smoked.calls[-1] == (
        (load_config(given, ["train.steps=3"]), ["train.steps=3"]),
        {**kinds, "online": False, "show": True},
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_that_ends_is_described_and_one_that_was_refused_is_not(
    monkeypatch: pytest.MonkeyPatch, store: Store, given: str, as_json: bool
) -> None:
    started = told(monkeypatch, "launcher.drive.local.start")
    alone = told(monkeypatch, "trainer.processes.deferred.makes_tokens_alone")
    read = told(monkeypatch, "launcher.view.status.read_status", Answer())
    told(monkeypatch, "launcher.view.watch.render_status", "finished")
    options = ["--json"] if as_json else []
    status = '{"answer": "it is so"}\n' if as_json else "finished\n"
    assert capstan("train", given, *options)[0] == status
    ((config,), named) = started.calls[0]
    assert config == load_config(given)
    assert (named["resume"], named["take_over"], named["live"]) == (False, False, False)
    started.answer = StorageError("the store is away")
    assert capstan("train", given, *options, code=StorageError)[0] == "", "there is no run in the store"
    store.put(f"mine/{layout.CONFIG}", b"")
    assert capstan("train", given, *options, code=StorageError)[0] == (status if as_json else "")
    assert len(read.calls) == 1 + as_json
    assert len(alone.calls) == 3
    started.answer = ConfigError("the name is taken")
    assert capstan("train", given, *options, code=ConfigError)[0] == "", "the run of this name is another one"
    started.answer = StorageError("the store is away")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert capstan("train", given, *options, code=StorageError)[0] == "", "the first rank speaks"
    started.answer = None
    assert capstan("train", given, *options)[0] == ""
    assert len(alone.calls) == 4, "a rank imports all of PyTorch"


def test_a_run_whose_rank_finds_a_mistake_is_described(
    monkeypatch: pytest.MonkeyPatch, store: Store, given: str
) -> None:
    def start(*_args: object, **_options: object) -> None:
        claim_generation(store.sub("mine"))
        raise ConfigError("this kernel cannot run here")

    monkeypatch.setattr("launcher.drive.local.start", start)
    told(monkeypatch, "launcher.view.status.read_status", Answer())
    store.put(f"mine/{layout.CONFIG}", b"")
    for _ in range(2):
        assert capstan("train", given, "--json", code=ConfigError)[0] == '{"answer": "it is so"}\n'
    told(monkeypatch, "launcher.drive.local.start", ConfigError("the name is taken"))
    assert capstan("train", given, "--json", code=ConfigError)[0] == "", "no rank has begun this time"


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_progress_is_drawn_on_a_terminal_for_a_person(monkeypatch: pytest.MonkeyPatch, given: str, verb: str) -> None:
    started = told(monkeypatch, "launcher.drive.local.start" if verb == "train" else "launcher.drive.sweep.run_sweep")
    started.answer = StorageError("enough")
    told(monkeypatch, "trainer.processes.deferred.makes_tokens_alone")
    for is_terminal in (True, False):
        stream = SimpleNamespace(stderr=SimpleNamespace(isatty=lambda is_terminal=is_terminal: is_terminal))
        monkeypatch.setattr("launcher.cli.verbs.train.sys", stream)
        for options in ([], ["--json"]):
            capstan(verb, given, *options, code=StorageError)
    assert [named["live"] for _, named in started.calls] == [True, False, False, False]


def test_a_run_whose_job_waits_is_not_trained_here_too(
    monkeypatch: pytest.MonkeyPatch, store: Store, given: str
) -> None:
    started = told(monkeypatch, "launcher.drive.local.start")
    asked = told(monkeypatch, "launcher.cluster.slurm.queue.check_no_job", ConfigError("job 7 has the run"))
    told(monkeypatch, "trainer.processes.deferred.makes_tokens_alone")
    told(monkeypatch, "launcher.view.status.read_status", Answer())
    told(monkeypatch, "launcher.view.watch.render_status", "finished")
    capstan("train", given, code=ConfigError)
    assert (len(asked.calls), started.calls) == (1, [])
    store.put(f"mine/{layout.CONFIG}", Path(given).read_bytes())
    capstan("resume", "mine", "--store", store.uri, "--take-over", "--trust-run")
    assert (len(asked.calls), len(started.calls)) == (1, 1), "--take-over asks nobody"


def test_a_dry_run_prints_what_a_run_would_begin_with(
    monkeypatch: pytest.MonkeyPatch, store: Store, given: str
) -> None:
    started = told(monkeypatch, "launcher.drive.local.start")
    found = load_config(given, ["model.dtype=fp32"])
    checked = told(monkeypatch, "launcher.drive.local.checked_here", (found, None))
    assert capstan("train", given, "--dry-run")[0] == dump_config(found)
    assert json.loads(capstan("train", given, "--dry-run", "--json")[0])["model"]["dtype"] == "fp32"
    store.put(f"mine/{layout.CONFIG}", Path(given).read_bytes())
    capstan("resume", "mine", "--store", store.uri, "--take-over", "--trust-run", "--dry-run")
    options = [{"resume": False, "take_over": False}] * 2 + [{"resume": True, "take_over": True}]
    asked = [{name: named[name] for name in ("resume", "take_over")} for _, named in checked.calls]
    assert (asked, started.calls) == (options, [])


def test_what_a_run_has_trained_is_measured_and_asked_as_the_options_say(
    monkeypatch: pytest.MonkeyPatch, store: Store, given: str
) -> None:
    at = ("--store", store.uri)
    store.put(f"mine/{layout.CONFIG}", Path(given).read_bytes())
    monkeypatch.delenv("CAPSTAN_TRUST_RUN", raising=False)
    measured = told(monkeypatch, "launcher.evaluate.evaluating.evaluate_run", "would evaluate the base")
    parts = ("--set", "g=/g.jsonl", "--tasks", "arc", "--bias", "/b.jsonl", "--chat", "--base", "--server", "http://s")
    assert capstan("evaluate", "mine", "train.steps=3", *at, *parts, "--dry-run")[0] == "would evaluate the base\n"
    said = json.loads(capstan("evaluate", "mine", *at, "--trust-run", "--dry-run", "--json")[0])
    assert said == {"run": f"{store.uri}/mine", "dry_run": True, "what": "would evaluate the base"}
    assert [named["trust"] for _, named in measured.calls] == [False, True]
    how = {"step": None, "best": False, "base": True, "chat": True, "server": "http://s"}
    ((folder, settings), named) = measured.calls[0]
    assert {name: named[name] for name in (*how, "dry_run")} == {**how, "dry_run": True}
    assert folder.uri == f"{store.uri}/mine"
    assert [one.partition("=")[0] for one in settings] == ["train.steps", "eval.sets.g.path", "eval.tasks", "eval.bias"]

    asked = told(monkeypatch, "launcher.evaluate.answering.answer_prompts", {"step": 4})
    own = told(monkeypatch, "launcher.policy.foreign.check_own")
    monkeypatch.setattr("trainer.state.checkpoint.manifest.chosen_step", lambda folder, step, best: (step, best))
    files = ("--image", "a.png", "--video", "b.mp4", "--audio", "c.wav")
    sampled = ("--max-tokens", "9", "--temperature", "0.5", "--top-p", "0.9", "--seed", "7")
    said = capstan("generate", "mine", *at, "--prompts", "p.txt", "--step", "4", "--base", *files, *sampled, "--json")
    assert json.loads(said[0]) == {"run": f"{store.uri}/mine", "step": 4}
    ((ask, _, _, prompts, paths, _), named) = asked.calls[0]
    assert (prompts, named) == ("p.txt", {"shows": False})
    assert paths == {"image": ["a.png"], "video": ["b.mp4"], "audio": ["c.wav"]}
    assert ask.sampling == {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    assert (ask.step, ask.base, ask.server) == ((4, False), True, "")
    assert own.calls[0][0][3] == ("eval.prompts",)
    capstan("generate", "mine", *at, "--prompts", "p.txt", "--best")
    ask = asked.calls[-1][0][0]
    assert (ask.step, ask.base) == ((None, True), False)
    assert ask.sampling == {"max_tokens": 256, "temperature": 0.0, "top_p": 1.0, "seed": 0}, "as --help says"
    assert asked.calls[-1][1] == {"shows": True}
    capstan("generate", "mine", *at)
    assert own.calls[-1][0][3] == (), "the run's own prompts are its owner's"
    assert "--top-p: has no effect without --temperature" in refused("generate", "mine", *at, "--top-p", "0.9")
    assert len(asked.calls) == 3
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert capstan("generate", "mine", *at, "--prompts", "p.txt", "--json")[0] == "", "rank 0 says it"


def test_what_hands_out_a_run_gets_each_option_in_its_place(
    monkeypatch: pytest.MonkeyPatch, store: Store, given: str
) -> None:
    store.put(f"mine/{layout.CONFIG}", Path(given).read_bytes())
    monkeypatch.delenv("CAPSTAN_TRUST_RUN", raising=False)
    monkeypatch.setattr("trainer.state.checkpoint.manifest.chosen_step", lambda folder, step, best: (step, best))
    own = told(monkeypatch, "launcher.policy.foreign.check_own")
    exported, pushed, dequantized = (
        told(monkeypatch, f"launcher.export.{name}", Answer()) for name in ("export_run", "push_run", "dequantize")
    )
    at = ("--store", store.uri)
    compared = ("--format", "gguf", "--best", "--verify", "--server", "http://a")
    assert capstan("export", "mine", "out", "types=[f16]", *at, *compared)[0] == "it is so\n"
    ((run, *where), named) = exported.calls[0]
    assert (run.uri, where) == (f"{store.uri}/mine", ["out", "gguf", ["types=[f16]"]])
    assert named == {"step": (None, True), "verify": True, "server": "http://a", "dry_run": False}
    target = ("hf://me/it", "--step", "4", "--revision", "v2")
    assert capstan("push", "mine", *target, *at, "--dry-run", "--trust-run")[0] == "it is so\n"
    ((run, *where), named) = pushed.calls[0]
    assert (run.uri, where) == (f"{store.uri}/mine", ["hf://me/it", "peft", ()])
    about = ("step", "revision", "public", "dry_run")
    assert [named[name] for name in about] == [(4, False), "v2", False, True]
    assert [named["trust"] for _, named in own.calls] == [False, True]
    assert capstan("dequantize", given, "there", "train.steps=3", "--dry-run")[0] == "it is so\n"
    ((path, *where), named) = dequantized.calls[0]
    assert (path, where, named["dry_run"]) == (Path(given), ["there", ["train.steps=3"]], True)


@pytest.mark.parametrize(
    ("cluster", "more", "asked"), [("slurm", ("--after", "first"), {"after": "first"}), ("ray", (), {})]
)
def test_a_submission_gets_the_settings_and_options_of_its_command(
    monkeypatch: pytest.MonkeyPatch, given: str, cluster: str, more: tuple[str, ...], asked: dict[str, str]
) -> None:
    name = "launcher.cluster.slurm.submit.submit" if cluster == "slurm" else "launcher.cluster.ray.jobs.submit"
    submitted = told(monkeypatch, name, Answer())
    assert capstan("submit", cluster, given, "train.steps=3", *more, "--resume")[0] == "it is so\n"
    capstan("submit", cluster, given, "--take-over", "--dry-run")
    first, second = ({name: how[name] for name in how if name != "log"} for _, how in submitted.calls)
    assert submitted.calls[0][0] == (load_config(given, ["train.steps=3"]),)
    assert first == {"resume": True, "take_over": False, "dry_run": False, **asked}
    assert second == {"resume": False, "take_over": True, "dry_run": True, **dict.fromkeys(asked)}


def test_data_is_built_and_checkpoints_are_pruned_as_the_options_say(
    monkeypatch: pytest.MonkeyPatch, store: Store, given: str
) -> None:
    store.put(f"mine/{layout.CONFIG}", b"")
    told(monkeypatch, "trainer.processes.deferred.makes_tokens_alone")
    built = told(monkeypatch, "launcher.data.data.build", Answer())
    assert capstan("data", "build", given, "train.steps=3", "--dry-run")[0] == "it is so\n"
    ((config,), named) = built.calls[0]
    assert (config.train.steps, named["dry_run"]) == (3, True)
    pruned = told(monkeypatch, "launcher.view.checkpoints.prune_checkpoints", Answer())
    rules = ("--keep-last", "1", "--keep-every", "5", "--keep-best", "2", "--orphan-hours", "0.5", "--dry-run")
    assert capstan("checkpoints", "prune", "mine", "--store", store.uri, *rules)[0] == "it is so\n"
    capstan("checkpoints", "prune", "mine", "--store", store.uri)
    names = ("keep_last", "keep_every", "keep_best", "orphan_hours", "dry_run")
    assert [[named[name] for name in names] for _, named in pruned.calls] == [
        [1, 5, 2, 0.5, True],
        [None, None, None, 24.0, False],
    ]


@pytest.mark.parametrize(("refusals", "code"), [((), 0), (("train: every row is bad", "eval: no rows"), DataError)])
def test_a_check_of_data_shows_its_report_and_ends_as_train_would(
    monkeypatch: pytest.MonkeyPatch, given: str, refusals: tuple[str, ...], code: int | type[Exception]
) -> None:
    report = SimpleNamespace(refusals=refusals)
    told(monkeypatch, "trainer.processes.deferred.makes_tokens_alone")
    told(monkeypatch, "launcher.data.data.report_data", report)
    told(monkeypatch, "launcher.data.data.report_table", "a report")
    assert capstan("data", "check", given, code=code)[0] == "a report\n"


def refused(*words: str) -> str:
    """The sentence with which a command is refused."""
    return str(CliRunner().invoke(app, [*words]).exception)


def test_a_dry_run_of_a_sweep_prints_its_trials(monkeypatch: pytest.MonkeyPatch, store: Store, given: str) -> None:
    trial = SimpleNamespace(run="s-1", settings={"optim.lr": 0.1})
    plan = SimpleNamespace(trials=[trial], to_json=lambda: {"trials": ["s-1"]})
    laid = told(monkeypatch, "launcher.drive.sweep.laid_out", (None, plan))
    ran = told(monkeypatch, "launcher.drive.sweep.run_sweep")
    assert capstan("sweep", given, "run.name=s", "--dry-run")[0] == "s-1: lr=0.1\n"
    at = str(write_sweep(store).uri.removesuffix("/s"))
    assert capstan("resume", "s", "--store", at, "--dry-run", "--json", "--trust-run")[0] == '{"trials": ["s-1"]}\n'
    assert ([named for _, named in laid.calls], ran.calls) == ([{"resume": False}, {"resume": True}], [])


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("train run.yaml", "train"),
        ("data show run.yaml", "data show"),
        ("logs first --follow", None),
        ("status first --watch", None),
        ("board", None),
        ("--help", None),
    ],
)
def test_a_verb_says_what_it_does_but_where_it_prints_what_others_do(
    monkeypatch: pytest.MonkeyPatch, line: str, name: str | None
) -> None:
    spoken = told(monkeypatch, "launcher.cli.__main__.never_silent")
    main._spoken(line.split())
    assert [given[0] for given, _ in spoken.calls] == ([name] if name else [])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    main._spoken(line.split())
    assert len(spoken.calls) == bool(name), "the first rank speaks"


def test_output_escapes_what_its_encoding_lacks_and_a_closed_stream_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é".encode()), encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    main._open_streams()
    print("é", end="", flush=True)
    assert (written.getvalue(), sys.stdin.read()) == (rb"\xe9", "é")
    stream: Any = sys.stderr
    assert (stream.name, os.get_inheritable(stream.fileno())) == (os.devnull, True)
    stream.close()


def test_a_dry_run_refuses_what_the_start_would(given: str) -> None:
    with pytest.raises(ConfigError, match=r"^retry\.slow_rank: replace is not possible here"):
        app(["train", given, "retry.slow_rank=replace", "--dry-run"], standalone_mode=False)


def test_resume_goes_on_with_a_run_or_with_a_sweep(monkeypatch: pytest.MonkeyPatch, store: Store, given: str) -> None:
    run, sweep = (told(monkeypatch, f"launcher.cli.verbs.train.start_{name}") for name in ("run", "sweep"))
    trusted = told(monkeypatch, "launcher.policy.foreign.check_own")
    store.put(f"mine/{layout.CONFIG}", Path(given).read_bytes())
    capstan("resume", "mine", "--store", store.uri, "--take-over", "train.steps=20", "--trust-run")
    capstan("resume", "s", "--store", str(write_sweep(store).uri.removesuffix("/s")), "--dry-run", "--trust-run")
    ((config,), named) = run.calls[0]
    assert config.train.steps == 20
    assert named == {"resume": True, "take_over": True, "as_json": False, "dry_run": False}
    assert [(given[3], named) for given, named in trusted.calls] == [
        (["train.steps=20"], {"trust": True}),
        ((), {"trust": True}),
    ]
    ((config,), named) = sweep.calls[0]
    assert config.run.name == "s"
    assert named == {"resume": True, "take_over": False, "as_json": False, "dry_run": True}


def test_a_sweep_that_cannot_go_on_is_described_unless_another_has_its_name(
    monkeypatch: pytest.MonkeyPatch, store: Store, given: str
) -> None:
    ran = told(monkeypatch, "launcher.drive.sweep.run_sweep", Answer())
    told(monkeypatch, "launcher.view.sweep.render_sweep", "a sweep")
    assert capstan("sweep", given, "run.name=s")[0] == "a sweep\n"
    ran.answer = StorageError("the store is away")
    assert capstan("sweep", given, "run.name=s", code=StorageError)[0] == ""
    write_sweep(store)
    assert capstan("sweep", given, "run.name=s", code=StorageError)[0] == "a sweep\n"
    ran.answer = ConfigError("the name is taken")
    assert capstan("sweep", given, "run.name=s", code=ConfigError)[0] == ""


def test_status_is_shown_once_or_followed(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    where = ("--store", store.uri)
    store.put(f"mine/{layout.CONFIG}", b"")
    write_sweep(store)
    read = told(monkeypatch, "launcher.view.status.read_status", Answer())
    jobs = told(monkeypatch, "launcher.cluster.slurm.queue.submitted_jobs")
    told(monkeypatch, "launcher.cluster.slurm.queue.slurm_status", Answer(sentence_of="in a queue"))
    told(monkeypatch, "launcher.cluster.slurm.queue.is_over", "over")
    told(monkeypatch, "launcher.view.watch.render_status", "trains")
    watched, followed = (
        told(monkeypatch, f"launcher.view.{name}") for name in ("watch.watch_table", "sweep.watch_sweep")
    )
    told(monkeypatch, "launcher.view.sweep.render_sweep", "a sweep")
    told(monkeypatch, "launcher.view.sweep.read_sweep", Answer(sentence_of="of trials"))
    assert capstan("status", "mine", *where)[0] == "trains\n"
    assert capstan("status", "mine", *where, "--json")[0] == '{"answer": "it is so"}\n'
    assert not watched.calls
    assert capstan("status", "mine", *where, "--watch")[0] == ""
    assert capstan("status", "mine", *where, "--watch", "--json")[0] == '{"answer": "it is so"}\n'
    assert [given[1] for given, _ in watched.calls] == [None, None]
    jobs.answer = "a job"
    assert capstan("status", "mine", *where)[0] == "in a queue\n"
    assert capstan("status", "mine", *where, "--watch")[0] == ""
    assert capstan("status", "mine", *where, "--watch", "--json")[0] == '{"answer": "in a queue"}\n'
    assert [given[1] for given, _ in watched.calls] == [None, None, "over", "over"]
    assert capstan("status", "s", *where)[0] == "a sweep\n"
    assert not followed.calls
    assert capstan("status", "s", *where, "--watch")[0] == ""
    assert capstan("status", "s", *where, "--watch", "--json")[0] == '{"answer": "of trials"}\n'
    assert len(followed.calls) == 2
    assert len(read.calls) == 3


def test_logs_of_a_rank_a_driver_or_a_job(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    store.put(f"mine/{layout.CONFIG}", b"")
    for name in ("watch.read_log", "watch.read_driver_log"):
        told(monkeypatch, f"launcher.view.{name}", f"{name}\n")
    told(monkeypatch, "launcher.cluster.slurm.queue.job_output", "of the job\n")
    told(monkeypatch, "launcher.view.watch.find_in_log", ["found", "twice"])
    told(monkeypatch, "launcher.view.watch.follow_log", ["more ", "and more\n"])

    def shown(*options: str, code: int | type[Exception] = 0) -> str:
        return capstan("logs", "mine", "--store", store.uri, *options, code=code)[0]

    assert shown() == "watch.read_log\n"
    assert shown("--driver") == "watch.read_driver_log\n"
    assert shown("--job") == "of the job\n"
    assert shown("--find", "x") == "found\ntwice\n"
    assert shown("--follow") == "more and more\n"
    owners = [json.loads(shown("--json", *options)) for options in ([], ["--driver"], ["--job"], ["--rank", "3"])]
    run = store.sub("mine").uri
    assert owners == [
        {"run": run, "rank": 0, "generation": None, "text": "watch.read_log\n"},
        {"run": run, "driver": True, "text": "watch.read_driver_log\n"},
        {"run": run, "job": True, "text": "of the job\n"},
        {"run": run, "rank": 3, "generation": None, "text": "watch.read_log\n"},
    ]
    for other in ("--follow", "--driver", "--job"):
        shown("--find", "x", other, code=ConfigError)
    for other in ("--json", "--driver", "--job"):
        shown("--follow", other, code=ConfigError)


def test_stop_asks_a_run_that_can_stop_and_tells_so(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    jobs = told(monkeypatch, "launcher.cluster.slurm.queue.submitted_jobs")
    cancelled = told(monkeypatch, "launcher.cluster.slurm.queue.stop_jobs", "cancelled job 7")
    gave_up = told(monkeypatch, "launcher.start.attempts.give_up_waiting")
    run = store.sub("mine")
    run.put(layout.CONFIG, b"")
    write_run(run, (10, 4.0))

    def stop(*options: str) -> tuple[str, str]:
        return capstan("stop", "mine", "--store", store.uri, *options)

    assert stop("--dry-run") == ("", f"would ask {run.uri} to stop\n")
    assert json.loads(stop("--dry-run", "--json")[0])["stop_requested"] is False
    assert read_stop(run) is None
    assert not gave_up.calls
    assert stop() == ("", f"asked {run.uri} to stop; {command('status', run)} shows what becomes of it\n")
    assert (read_stop(run) or ("", ""))[0] == "capstan stop"
    assert json.loads(stop("--json")[0])["stop_requested"] is True
    assert len(gave_up.calls) == 2
    write_run(run, (10, 4.0), end="finished")
    export = f"{command('export', run, 'adapter/')} writes what was trained"
    assert stop() == ("", f"{run.uri} is finished already; nothing was asked. Next: {export}\n")
    assert json.loads(stop("--json")[0])["stop_requested"] is False
    assert len(gave_up.calls) == 2
    jobs.answer = "a job"
    assert stop() == ("", f"cancelled job 7; {command('status', run)} shows what becomes of it\n")
    assert [named for _, named in cancelled.calls] == [{"dry_run": False}]
    assert len(gave_up.calls) == 3


def test_stop_tells_nobody_to_resume_what_has_no_checkpoint(store: Store) -> None:
    run = store.sub("mine")
    run.put(layout.CONFIG, b"")
    write_run(run, end="failed")
    said = capstan("stop", "mine", "--store", store.uri)[1]
    assert (
        said == f"{run.uri} is failed already; nothing was asked. Next: {command('logs', run)} shows the last lines\n"
    )


def test_one_rank_alone_says_what_all_find(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for silent in (True, False):
        monkeypatch.setattr("launcher.cli.command.is_silent_rank", lambda silent=silent: silent)
        say(f"silent: {silent}")
    assert capsys.readouterr().err == "silent: False\n"


def test_a_run_whose_driver_is_about_to_start_it_again_is_asked_to_stop(store: Store) -> None:
    run = store.sub("mine")
    run.put(layout.CONFIG, b"")
    take(run, "capstan train", newest_number(run))
    write_run(run, end="failed")
    assert capstan("stop", "mine", "--store", store.uri)[1].startswith(f"asked {run.uri} to stop; ")
    assert read_stop(run) is not None


@pytest.mark.parametrize(("silent", "said"), [(False, "it is so\n"), (True, "")])
def test_one_rank_alone_says_what_the_teacher_has_written(
    monkeypatch: pytest.MonkeyPatch, given: str, silent: bool, said: str
) -> None:
    taught = told(monkeypatch, "launcher.data.answers.teach", Answer())
    monkeypatch.setattr("launcher.start.group.is_silent_rank", lambda: silent)
    assert capstan("teach", given, "train.steps=3", "--dry-run")[0] == said
    ((asked, options),) = taught.calls
    assert (asked, options["dry_run"]) == ((Path(given), ["train.steps=3"]), True)


def test_rows_are_shown_or_written_as_a_page(monkeypatch: pytest.MonkeyPatch, given: str, tmp_path: Path) -> None:
    rows = SimpleNamespace(rows=["one", "two"], to_json=lambda: {"rows": 2})
    shown = told(monkeypatch, "launcher.data.data.show", rows)
    told(monkeypatch, "launcher.data.data.page_of_rows", "<html>\n")
    told(monkeypatch, "launcher.data.data.render_shown", "the rows")
    file = tmp_path / "rows.html"
    assert capstan("data", "show", given)[0] == "the rows\n"
    assert not file.exists()
    assert capstan("data", "show", given, "--html", str(file)) == ("", f"{file} shows 2 rows\n")
    assert file.read_text() == "<html>\n"
    options = ("--json", "--row", "3", "--packed", "--split", "eval")
    assert json.loads(capstan("data", "show", given, "--html", str(file), *options)[0]) == {"rows": 2}
    assert shown.calls[-1][1] == {"row": 3, "packed": True, "split": "eval"}
    capstan("data", "show", given, "--html", str(tmp_path), code=StorageError)


def test_a_sweep_that_has_ended_is_not_asked_to_stop(store: Store) -> None:
    sweep = write_sweep(store)
    said = json.loads(capstan("stop", "s", "--store", store.uri, "--json")[0])
    assert not said["stop_requested"]
    assert said["what"].startswith(f"{sweep.uri} is stopped already; nothing was asked. Next: capstan resume s")
    assert read_stop(sweep) is None


@pytest.mark.parametrize(
    "words", ["logs", "generate", "evaluate", "export /x", "rollout", "checkpoints ls", "checkpoints prune"]
)
def test_a_verb_about_one_run_names_the_trials_of_a_sweep(store: Store, words: str) -> None:
    write_sweep(store)
    verb, *more = [words] if words.startswith("checkpoints") else words.split()
    with pytest.raises(ConfigError, match=r"/s is a sweep\. Its trials are runs: name one of them \(s-1, s-2"):
        app([*verb.split(), "s", *more, "--store", store.uri], standalone_mode=False)


def test_a_report_is_written_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, store: Store, tmp_path: Path
) -> None:
    made = SimpleNamespace(figures={"loss": 2.0}, page=lambda: "<html>\n")
    written, read = (told(monkeypatch, f"launcher.report.report.{name}_report", made) for name in ("write", "read"))
    told(monkeypatch, "launcher.report.report.target_of", "report.html")
    store.put(f"mine/{layout.CONFIG}", b"")
    file = str(tmp_path / "other.html")

    def report(*options: str) -> tuple[str, str]:
        return capstan("report", "mine", "--store", store.uri, *options)

    assert report() == ("", "wrote report.html\n")
    assert report("-o", file) == ("", "wrote report.html\n")
    assert json.loads(report("--json", "-o", file)[0]) == {"written": "report.html", "loss": 2.0}
    assert [given[1] for given, _ in written.calls] == [None, Path(file), Path(file)]
    assert not read.calls
    assert report("--dry-run") == ("", "would write report.html\n")
    assert json.loads(report("--json")[0]) == {"written": None, "loss": 2.0}
    assert report("-o", "-") == ("<html>\n", "")
    assert report("-o", file, "--dry-run") == ("", "would write report.html\n")
    assert (len(written.calls), len(read.calls)) == (3, 4)


def test_lists_and_the_board_take_stores_by_name_or_as_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = told(monkeypatch, "launcher.view.listing.list_runs", Answer())
    served = told(monkeypatch, "launcher.board.server.serve")
    opened = told(monkeypatch, "trainer.store.store.open_store", "a store")
    assert capstan("ls", "here", "--store", "there")[0] == "it is so\n"
    capstan("ls", "--store", "there")
    capstan("board", "one", "two", "--port", "9000")
    capstan("board", "--store", "there", "--read-only")
    assert [given[0] for given, _ in opened.calls] == ["here", "there", "one", "two", "there"]
    assert [given for given, _ in (*listed.calls, *served.calls)] == [
        ("a store",),
        ("a store",),
        (["a store", "a store"],),
        (["a store"],),
    ]
    assert [(named["port"], named["read_only"]) for _, named in served.calls] == [(9000, False), (None, True)]
    for present in ("starlette", "uvicorn"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, present=present: name == present)
        capstan("board", code=ConfigError)


def test_checkpoints_that_are_damaged_end_with_6(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    store.put(f"mine/{layout.CONFIG}", b"")
    found = told(monkeypatch, "launcher.view.checkpoints.verify_checkpoints", Answer())
    told(monkeypatch, "launcher.view.checkpoints.checkpoint_table", "checkpoints")
    told(monkeypatch, "trainer.state.checkpoint.manifest.chosen_step", 7)
    assert capstan("checkpoints", "verify", "mine", "--store", store.uri)[0] == "checkpoints\n"
    found.answer = Answer(ok=False)
    assert capstan("checkpoints", "verify", "mine", "--store", store.uri, code=6)[0] == "checkpoints\n"
    assert found.calls[0][0][1] == 7


def test_help_lists_the_verbs_in_the_order_in_which_a_run_needs_them() -> None:
    known = """doctor recipe init import plan teach rollout train resume ls status logs stop evaluate generate report board
        sweep export dequantize push smoke completion""".split()
    grouped = ["data build", "data check", "data show", "submit ray", "submit slurm", "config schema"]
    grouped += [f"checkpoints {verb}" for verb in ("ls", "verify", "prune")]
    names = [name for name, _ in commands()]
    assert [name for name in names if name in {*known, *grouped}] == [*known, *grouped]


@dataclass
class Made(Answer):
    """A configuration that `init` or `import` has made."""

    config: str = "train: {steps: 3}\n"
    to_do: tuple[str, ...] = ("look at it",)

    @property
    def text(self) -> str:  # type: ignore[override]
        return self.config

    def lines(self) -> list[str]:
        return ["what it takes"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_init_asks_a_person_for_what_no_option_gives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_terminal: bool
) -> None:
    made = told(monkeypatch, "launcher.init.initial.initial_config", Made())
    asked = told(monkeypatch, "typer.prompt", " said ")
    streams = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: is_terminal))
    monkeypatch.setattr("launcher.cli.verbs.init.sys", streams)
    file = tmp_path / "new.yaml"
    if not is_terminal:
        capstan("init", str(file), "--data", "rows.jsonl", code=ConfigError)
        capstan("init", str(file), "--base", "b", code=ConfigError)
    capstan("init", str(file), "--base", "b", "--json", code=ConfigError)
    capstan("init", str(file), "--base", " ", "--data", "d", code=ConfigError)
    capstan("init", str(file), "--base", "b", "--data", "d", "--gpus", "200000", code=ConfigError)
    assert not asked.calls
    assert not file.exists()
    dry = capstan("init", str(file), "--base", "b", "--data", "d", "--dry-run")
    assert dry == ("train: {steps: 3}\n", f"would write {file}\nwhat it takes\n")
    assert not file.exists()
    assert capstan("init", str(file), "--base", "b", "--data", "d", "--gpus", "2") == (
        "",
        f"wrote {file}\nwhat it takes\n",
    )
    assert file.read_text() == made.answer.config
    capstan("init", str(file), "--base", "b", "--data", "d", code=ConfigError)
    told_of = json.loads(capstan("init", str(file), "--base", "b", "--data", "d", "--json", "--force")[0])
    assert (told_of["config"], told_of["written"]) == (made.answer.config, True)
    answers = made.calls[1][0][0]
    assert (answers.base, answers.data, answers.goal, answers.machine, answers.gpus) == ("b", "d", "sft", "one", 2)
    assert not asked.calls
    if is_terminal:
        capstan("init", str(file), "--force", "--base", "b")
        assert len(asked.calls) == 1, "a goal and a machine are asked for only beside the base"
        capstan("init", str(file), "--force")
        answers = made.calls[-1][0][0]
        assert (answers.base, answers.data, answers.goal, answers.machine) == ("said",) * 4
        assert len(asked.calls) == 5


def test_import_writes_to_a_file_or_to_stdout_and_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = Made()
    told(monkeypatch, "launcher.init.importing.importing.import_files", made)
    (given := tmp_path / "other.yaml").write_text("")
    file = tmp_path / "new.yaml"

    def imported(*options: str, code: int | type[Exception] = 0) -> tuple[str, list[str]]:
        out, said = capstan("import", str(given), *options, code=code)
        return out, [line.partition(";")[0] for line in said.splitlines() if line.strip()]

    left = ["it is so", "to do: look at it", "it is so"]
    assert imported() == (made.config, left)
    assert imported("-o", str(file), "--dry-run") == (made.config, [*left, f"would write {file}"])
    assert json.loads(imported("-o", str(file), "--dry-run", "--json")[0])["written"] is None
    assert not file.exists()
    assert imported("-o", str(file)) == ("", [*left, f"wrote {file}"])
    assert file.read_text() == made.config
    imported("-o", str(file), code=ConfigError)
    assert imported("-o", str(file), "--dry-run") == (made.config, [*left, f"would write {file}"])
    assert json.loads(imported("-o", str(file), "--force", "--json")[0])["written"] == str(file)
    spaced = tmp_path / "Ann's run.yaml"
    said = capstan("import", str(given), "-o", str(spaced))[1]
    assert f"capstan plan {shlex.quote(str(spaced))} says what it needs" in said, "it can be typed as it stands"


@pytest.mark.parametrize(("given", "public"), [((), False), (("--public",), True)])
def test_a_push_makes_a_private_repository_unless_it_is_asked_for_a_public_one(
    given: tuple[str, ...], public: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushes, asked = list[dict[str, Any]](), told(monkeypatch, "launcher.cli.verbs.export._exported_run", (None, 6))

    def pushed(*_given: object, **told: Any) -> Any:
        pushes.append(told)
        raise ConfigError("enough")

    monkeypatch.setattr("launcher.export.push_run", pushed)
    monkeypatch.delenv("CAPSTAN_TRUST_RUN", raising=False)
    CliRunner().invoke(app, ["push", "first", "hf://me/it", *given])
    CliRunner().invoke(app, ["push", "first", "hf://me/it", *given, "--trust-run"])
    assert [(told["public"], told["step"]) for told in pushes] == [(public, 6)] * 2
    assert [named["trust"] for _, named in asked.calls] == [False, True]


def test_a_full_disk_behind_standard_output_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(main, "log", said.append)
    monkeypatch.setattr("sys.argv", ["capstan", "--version"])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as ended:
            main.main()
    assert ended.value.code == StorageError.exit_code
    (line,) = said
    assert line.startswith("capstan: the command cannot write all: [Errno 28] No space left on device.")
