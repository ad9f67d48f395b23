"""`capstan checkpoints ls | verify | prune`, and names that are not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from launcher.cli.__main__ import app
from tests.checkpoints import commit
from trainer.errors import CapstanError, ConfigError, NothingToResume
from trainer.run import layout
from trainer.state.checkpoint.manifest import chosen_step, committed_steps, whole_checkpoint
from trainer.store.store import Store, open_store

CONFIG = {
    "run": {"name": "mine"},
    "model": {"base": "/models/b"},
    "data": {"train": [{"path": "a.jsonl"}]},
    "train": {"steps": 9},
    "checkpoint": {"keep_last": 2},
}


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run with commits of steps 1 to 4, of two shards each, and an orphan."""
    run = open_store(str(tmp_path)).sub("mine")
    run.put(layout.CONFIG, yaml.safe_dump(CONFIG).encode())
    for step in (1, 2, 3, 4):
        commit(run, step, attempt="000002-000001", eval_loss=1 / step)
    run.put(layout.shard(9, "000001-000001", 0), b"lost")
    return run


def capstan(run: Store, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["checkpoints", *arguments, "mine", "--store", run.uri.rpartition("/")[0]])


def answer(result: Result) -> Any:
    return json.loads(result.stdout)


def test_ls_tells_size_age_world_size_and_loss(run: Store) -> None:
    found = answer(capstan(run, "ls", "--json"))
    assert [row["step"] for row in found["checkpoints"]] == [4, 3, 2, 1]
    first = found["checkpoints"][0]
    assert (first["world_size"], first["generation"], first["eval_loss"]) == (2, 2, 0.25)
    assert first["bytes"] == sum(e.size for e in run.list(layout.checkpoint(4)) if "shard" in e.key)
    assert first["age_seconds"] > 0
    text = capstan(run, "ls").stdout
    assert "world size" in text
    assert "0.2500" in text
    losses = [line.split("│")[-2].strip() for line in text.splitlines() if line.count("│") > 5]
    assert losses == ["0.2500", "0.3333", "0.5000", "1.0000"], "the newest first"


def test_verify_reads_every_byte_and_names_what_is_wrong(run: Store) -> None:
    whole = capstan(run, "verify", "--json")
    assert (whole.exit_code, answer(whole)["problems"], answer(whole)["verified"]) == (0, {}, True)
    key = layout.shard(3, "000002-000001", 1)
    run.put(key, run.get(key)[:-1] + b"\x01")
    run.delete(layout.shard(2, "000002-000001", 0))
    run.put(layout.manifest(1), b"{")
    damaged = capstan(run, "verify", "--json")
    problems = answer(damaged)["problems"]
    assert damaged.exit_code == 6
    assert problems.keys() == {"3", "2", "1"}
    assert problems["3"] == [f"{run.uri}/{key} does not match its sha256."]
    assert "does not exist" in problems["2"][0]
    assert "is not a manifest" in problems["1"][0]
    table = capstan(run, "verify")
    assert table.exit_code == 6
    assert "damaged" in table.stdout
    run.put(layout.doubt(4, 2), b'{"reason": "a rank computes another gradient"}')
    doubted = capstan(run, "verify", "--step", "4", "--json")
    assert doubted.exit_code == 0
    assert [row["doubt"] for row in answer(doubted)["checkpoints"]] == ["a rank computes another gradient"]
    table, other = (" ".join(capstan(run, "verify", "--step", step).stdout.split()) for step in ("4", "2"))
    assert "step 4 is in doubt: a rank computes another gradient" in table
    assert ("whole" in table, "damaged" in table) == (True, False)
    assert ("whole" in other, "damaged" in other, "in doubt" in other) == (False, True, False)
    assert capstan(run, "verify", "--step", "3", "--json").exit_code == 6


def test_a_step_that_is_not_there_is_a_wrong_argument(run: Store) -> None:
    failed = capstan(run, "verify", "--step", "7")
    assert isinstance(failed.exception, CapstanError)
    assert failed.exception.exit_code == 2
    assert "no committed checkpoint of step 7. Its steps are: 1, 2, 3, 4." in str(failed.exception)
    with pytest.raises(ConfigError, match="no committed checkpoint of step 7. Its steps are: 1, 2, 3, 4."):
        whole_checkpoint(run, 7)


def test_the_best_is_the_newest_of_those_with_the_lowest_evaluation_loss(run: Store) -> None:
    commit(run, 5, attempt="000002-000001", eval_loss=None)
    commit(run, 6, attempt="000002-000001", eval_loss=0.5)
    assert chosen_step(run, None, best=True) == 4
    run.delete(layout.manifest(4))
    run.delete(layout.manifest(3))
    assert chosen_step(run, None, best=True) == 6, "of steps 2 and 6, whose losses are the same"
    only = answer(capstan(run, "verify", "--best", "--json"))
    assert [row["step"] for row in only["checkpoints"]] == [6]
    assert (chosen_step(run, None, best=False), chosen_step(run, 2, best=False)) == (None, 2)


def test_a_choice_that_cannot_be_met_names_what_there_is(run: Store) -> None:
    with pytest.raises(ConfigError, match="--best chooses the step, and --step 3 names one"):
        chosen_step(run, 3, best=True)
    for step in (3, 4):
        run.delete(layout.manifest(step))
    for step in (1, 2):
        run.delete(layout.manifest(step))
        commit(run, step, attempt="000002-000001", eval_loss=None)
    with pytest.raises(ConfigError, match="--best: no checkpoint of .* was evaluated .* Its steps are: 1, 2"):
        chosen_step(run, None, best=True)
    with pytest.raises(ConfigError, match="no committed checkpoint of step 3. Its steps are: 1, 2"):
        chosen_step(run, 3, best=False)


def test_without_any_checkpoint_there_is_nothing_to_resume(run: Store) -> None:
    for step in committed_steps(run):
        run.delete(layout.manifest(step))
    failed = capstan(run, "verify", "--step", "7")
    assert isinstance(failed.exception, NothingToResume)
    with pytest.raises(NothingToResume):
        whole_checkpoint(run, 7)


def test_prune_follows_the_runs_own_rules_and_a_dry_run_changes_nothing(run: Store) -> None:
    before = run.list()
    dry = answer(capstan(run, "prune", "--dry-run", "--json"))
    assert (dry["steps"], dry["kept"], dry["orphans"], dry["dry_run"]) == ([2, 1], [4, 3], [], True)
    told = " ".join(capstan(run, "prune", "--dry-run").stdout.split())
    assert told.startswith("would remove checkpoints of steps: 1, 2; orphans: 0; ")
    assert told.endswith(" in all. Kept steps: 3, 4.")
    assert run.list() == before
    done = answer(capstan(run, "prune", "--json"))
    assert done["steps"] == [2, 1]
    assert done["bytes"] == dry["bytes"] == sum(entry.size for entry in before) - sum(e.size for e in run.list())
    assert committed_steps(run) == [4, 3]


def test_prune_takes_other_rules_and_orphans_of_any_age(run: Store) -> None:
    rules = ("--keep-last", "1", "--keep-every", "3", "--keep-best", "1", "--orphan-hours", "0")
    result = capstan(run, "prune", *rules)
    assert "removed checkpoints of steps: 1, 2; orphans: 1;" in " ".join(result.stdout.split())
    assert committed_steps(run) == [4, 3]
    assert run.list(layout.checkpoint(9)) == []


def test_a_rule_of_0_turns_the_runs_own_off(run: Store) -> None:
    rules = {"keep_last": 1, "keep_every": 2, "keep_best": 3}
    evaluated = {"data": {**CONFIG["data"], "held_out": 0.5}, "eval": {"every": 1}}
    run.put(layout.CONFIG, yaml.safe_dump({**CONFIG, **evaluated, "checkpoint": rules}).encode())
    for off, kept in ((), [4, 3, 2]), (("--keep-best", "0"), [4, 2]), (("--keep-best", "0", "--keep-every", "0"), [4]):
        assert answer(capstan(run, "prune", *off, "--dry-run", "--json"))["kept"] == kept


def test_a_misspelt_run_or_store_is_named_and_leaves_no_folder(run: Store, tmp_path: Path) -> None:
    for store, hint in ((tmp_path, "Did you mean 'mine'?"), (tmp_path / "typo", "Runs there: none.")):
        failed = CliRunner().invoke(app, ["status", "mime", "--store", str(store)])
        assert isinstance(failed.exception, ConfigError)
        assert hint in str(failed.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
