"""Somebody else's run is an attacker's file: whoever reads it runs nothing of theirs, and nothing is written or read
outside of where the command says.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.policy.foreign import check_own, evaluated_settings
from launcher.start.claim import claimed
from tests.cli.conftest import ENVIRONMENT, Capstan
from tests.material import Workshop, commit, make_data
from trainer.config import dump_config, parse_config
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.store.json_text import digest_of
from trainer.store.store import Store, open_store

pytestmark = pytest.mark.timeout(600)

READERS = ("export", "evaluate", "generate")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The folder of an attacker, who has a run of one checkpoint."""
    workshop = Workshop(tmp_path_factory.mktemp("theirs"), "speck", shard_size="2KB")
    config = workshop.config("done", f"data.eval=[{{path: {workshop.data}}}]")
    commit(workshop.store.sub("done"), config)
    return workshop


@pytest.fixture
def run(theirs: Workshop, tmp_path: Path) -> Store:
    """A copy of their run, for a test to change."""
    shutil.copytree(theirs.folder / "store", tmp_path / "shared" / "store")
    return open_store(str(tmp_path / "shared" / "store" / "done"))


def rewritten(run: Store, change: Mapping[str, Any]) -> None:
    """Change the body of the manifest, and seal it anew."""
    tree = json.loads(run.get(layout.manifest(4)))
    tree["body"] |= change
    run.put(layout.manifest(4), json.dumps({**tree, "sha256": digest_of(tree["body"])}).encode())


def arguments(verb: str, run: Store, folder: Path) -> list[object]:
    return {
        "export": ["export", run.uri, folder / "exported"],
        "evaluate": ["evaluate", run.uri],
        "generate": ["generate", run.uri, "--prompts", _prompts(folder), "--max-tokens", "2"],
    }[verb]


def _prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("the ant\n")
    return folder / "prompts.txt"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", READERS)
def test_a_manifest_chooses_no_file_of_whoever_reads_it(
    run: Store, tmp_path: Path, capstan: Capstan, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    content, home = b"import os\n", tmp_path / "home"
    home.mkdir()
    digest = hashlib.sha256(content).hexdigest()
    run.put(layout.kept_text(digest), content)
    names = [f"{home}/site-packages/x.pth", "../../../../home/x.pth", "additional_chat_templates/../../x.jinja"]
    rewritten(run, {"text": {"tokenizer": dict.fromkeys(names, digest), "template": None}})
    given = arguments(verb, run, tmp_path)
    before = files(tmp_path)
    done = capstan(*given)
    assert done.returncode == 6, done.stderr
    assert "it is no file of a tokenizer" in done.stderr
    assert files(tmp_path) == before


@pytest.fixture
def reader(capstan: Capstan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Capstan:
    """The command, as somebody who has started and trusts nothing."""
    monkeypatch.delitem(ENVIRONMENT, "CAPSTAN_TRUST_RUN")
    monkeypatch.setitem(ENVIRONMENT, "XDG_STATE_HOME", str(tmp_path / "state"))
    return capstan


def configured(run: Store, *overrides: str) -> None:
    """Change their config.yaml as they can, and leave only what a run needs."""
    text = run.get(layout.CONFIG).decode()
    plain = ("sharding.deepspeed=auto", "data.eval=[]")
    run.put(layout.CONFIG, dump_config(parse_config(text, (*plain, *overrides))).encode())


EVIL_TASK = """
task: evil
dataset_path: json
output_type: multiple_choice
process_docs: !function evil.process
"""


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A task whose code leaves a mark."""
    (tmp_path / "evil.yaml").write_text(EVIL_TASK)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef process(docs): return docs\n")
    return tmp_path / "evil.yaml"


def test_an_evaluation_runs_no_task_that_somebody_elses_run_names(run: Store, reader: Capstan, evil: Path) -> None:
    configured(run, f"eval.tasks=[{evil}]")
    before = files(evil.parent / "shared")
    done = reader("evaluate", run.uri)
    assert done.returncode == 2
    assert "somebody else's" in done.stderr
    assert "eval.tasks" in done.stderr
    assert "--trust-run" in done.stderr
    assert not (evil.parent / "ran").exists()
    assert files(evil.parent / "shared") == before


NAMED = [
    ("evaluate", "eval.sets.x.path={private}", "eval.sets.x.path"),
    ("evaluate", "data.eval=[{{path: {private}}}]", "data.eval"),
    ("evaluate", "data.eval=[{{path: s3://of-the-reader/private.jsonl}}]", "data.eval"),
    ("evaluate", "data.held_out=0.5", "data.train"),
    ("evaluate", "eval.bias={private}", "eval.bias"),
    ("evaluate", "data.template={private}", "data.template"),
    ("evaluate", "sharding.deepspeed={private}", "sharding.deepspeed"),
    ("evaluate", "quant.cache=true", "quant.cache"),
    ("generate", "quant.cache=true", "quant.cache"),
    ("generate", "eval.prompts={private}", "eval.prompts"),
    ("generate", "data.template={private}", "data.template"),
    ("export", "data.template={private}", "data.template"),
    ("push", "data.template={private}", "data.template"),
    ("resume", "tuning.rank=8", "data.train"),
    ("resume", "cluster.slurm.setup=[touch {private}]", "cluster.slurm.setup"),
    ("resume", "cluster.ray.runtime_env={{pip: [evil]}}", "cluster.ray.runtime_env"),
    ("rollout", "rollout.reward=evil:reward", "rollout.reward"),
    ("rollout", "rollout.serve.command=[/shared/evil]", "rollout.serve.command"),
]
"""A verb, what their config.yaml names, and the setting that is refused; the first row of each verb is quick."""
QUICK = {row[0]: row for row in reversed(NAMED)}.values()


@pytest.mark.parametrize(
    ("verb", "setting", "name"), [row if row in QUICK else pytest.param(*row, marks=pytest.mark.long) for row in NAMED]
)
def test_what_somebody_elses_run_names_is_neither_read_nor_run(
    run: Store, reader: Capstan, tmp_path: Path, verb: str, setting: str, name: str
) -> None:
    private = tmp_path / "private.txt"
    private.write_text("the reader's own words\n")
    grpo = ("objective.name=grpo", "rollout.reward=exact", "rollout.max_tokens=8", "rollout.engine=serve")
    before_it = grpo if verb == "rollout" else ("data.format=chat",) if "template" in setting else ()
    configured(run, *before_it, setting.format(private=private))
    before = files(tmp_path)
    more = {"export": [tmp_path / "exported"], "push": ["hf://me/mine"]}
    done = reader(verb, run.uri, *more.get(verb, []))
    assert done.returncode == 2, done.stderr
    assert "somebody else's" in done.stderr
    assert f"{name}: " in done.stderr
    assert files(tmp_path) == before
    assert not any("own words" in path.read_text(errors="replace") for path in (tmp_path / "shared").rglob("*.*"))


def test_who_names_a_set_or_trusts_the_run_evaluates_it(run: Store, reader: Capstan, theirs: Workshop) -> None:
    configured(run, f"data.eval=[{{path: {theirs.data}}}]")
    done = reader("evaluate", run.uri, "--dry-run")
    assert done.returncode == 2
    assert "data.eval" in done.stderr
    for given in ([f"data.eval=[{{path: {theirs.data}}}]"], ["--set", f"own={theirs.data}", "data.eval=[]"]):
        done = reader("evaluate", run.uri, *given, "--dry-run")
        assert done.returncode == 0, done.stderr
    assert reader("evaluate", run.uri, "--dry-run", "--trust-run").returncode == 0
    assert reader("evaluate", run.uri, "--dry-run").returncode == 0, "it is trusted once and for all"
    configured(run, f"data.eval=[{{path: {theirs.base}/config.json}}]")
    assert reader("evaluate", run.uri, "--dry-run").returncode == 2, "somebody has changed it since"


def test_a_run_that_names_nothing_is_read_by_anybody(run: Store, reader: Capstan, tmp_path: Path) -> None:
    configured(run)
    done = reader(*arguments("generate", run, tmp_path))
    assert done.returncode == 0, done.stderr


def test_the_text_of_a_template_is_no_file(theirs: Workshop) -> None:
    """It may be longer than any path."""
    text = "{% for message in messages %}" + "{{ message.content }}" * 300 + "{% endfor %}"
    config = theirs.config("text")
    config = config.model_copy(update={"data": config.data.model_copy(update={"template": text})})
    assert dict(evaluated_settings(config))["data.template"] is None


def test_who_has_started_a_run_reads_it_without_a_flag(
    theirs: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = theirs.config("mine", f"run.store={tmp_path / 'store'}", f"data.eval=[{{path: {theirs.data}}}]")
    with claimed(config, by="capstan train", resume=False, code=None, log=print):
        pass
    mine = run_folder(config)
    check_own(mine, config, evaluated_settings, (), trust=False)
    moved = open_store(str(tmp_path / "elsewhere"))
    moved.put(layout.CONFIG, mine.get(layout.CONFIG))
    check_own(moved, config, evaluated_settings, (), trust=False)
    moved.put(layout.CONFIG, mine.get(layout.CONFIG) + b"\n")
    with pytest.raises(ConfigError, match="data.eval"):
        check_own(moved, config, evaluated_settings, (), trust=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of another user"))
    with pytest.raises(ConfigError, match="data.eval"):
        check_own(mine, config, evaluated_settings, (), trust=False)


@pytest.mark.long
def test_a_run_of_ones_own_is_trained_measured_and_continued_without_a_flag(
    theirs: Workshop, reader: Capstan, tmp_path: Path
) -> None:
    other = make_data(tmp_path / "eval.jsonl", seed=9)
    config = theirs.config("own", f"run.store={tmp_path / 'store'}", f"data.eval=[{{path: {other}}}]", "train.steps=1")
    (tmp_path / "own.yaml").write_text(dump_config(config))
    run, before = str(tmp_path / "store" / "own"), dict(ENVIRONMENT)
    for given in (
        ("train", tmp_path / "own.yaml"),
        ("evaluate", run),
        ("generate", run, "--prompts", _prompts(tmp_path), "--max-tokens", "2"),
        ("export", run, tmp_path / "exported"),
        ("resume", run, "train.steps=2"),
        ("evaluate", run),
    ):
        done = reader(*given, timeout=500)
        assert done.returncode == 0, done.stderr
    shutil.move(tmp_path / "store" / "own", tmp_path / "store" / "moved")
    assert reader("evaluate", tmp_path / "store" / "moved", "--dry-run").returncode == 0
    assert before == ENVIRONMENT
