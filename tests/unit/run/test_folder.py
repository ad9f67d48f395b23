"""A run's configuration is read from its folder, whose place and name count."""

import shlex
from pathlib import Path

import pytest

from launcher.cluster.ray import jobs as ray
from launcher.cluster.slurm import submit as slurm
from launcher.view.runs import find_run
from tests.material import Workshop
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.folder import changes, command, is_own, keep_as_own, name_of, run_config, run_folder, store_of
from trainer.store.store import open_store

CONFIG = (
    b"run: {name: orig, store: /elsewhere}\nmodel: {base: b}\ndata: {train: [{path: rows.jsonl}]}\ntrain: {steps: 1,"
    b" global_batch: 1}\n"
)


@pytest.mark.parametrize("name", ["fork", "007", "1e5"])
def test_a_copied_run_is_the_run_of_its_own_folder(tmp_path: Path, name: str) -> None:
    folder = open_store(str(tmp_path)).sub(name)
    folder.put(layout.CONFIG, CONFIG)
    config = run_config(folder, ["run.seed=7"])
    assert (config.run.name, config.run.store, config.run.seed) == (name, str(tmp_path), 7)
    assert run_folder(config).uri == folder.uri


@pytest.mark.parametrize("override", ["run.name=orig", "run.store=/somewhere", "run={name: orig}"])
def test_an_override_does_not_lead_to_another_run(tmp_path: Path, override: str) -> None:
    folder = open_store(str(tmp_path)).sub("fork")
    folder.put(layout.CONFIG, CONFIG)
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}: .* would be another run than .*fork"):
        run_config(folder, [override])


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is no run"), (b"run: \xff", "not UTF-8"), (b"[]", "is not a configuration")]
)
def test_a_folder_without_a_readable_configuration_says_so(tmp_path: Path, content: bytes | None, said: str) -> None:
    folder = open_store(str(tmp_path)).sub("demo")
    if content is not None:
        folder.put(layout.CONFIG, content)
    with pytest.raises(ConfigError, match=said):
        run_config(folder)


def test_wrong_settings_are_said_with_their_file_and_where_they_are_once_more(tmp_path: Path) -> None:
    folder = open_store(str(tmp_path)).sub("demo")
    for generation in (1, 2):
        folder.put(layout.settings(generation), CONFIG)
    folder.put(layout.CONFIG, CONFIG.replace(b"train: {steps", b"trian: {steps"))
    for overrides in ([], ["run.seed=7"]):
        with pytest.raises(ConfigError, match=r"demo/config.yaml cannot be used: trian: .*\nsettings/000002.yaml in "):
            run_config(folder, overrides)
    folder.put(layout.CONFIG, CONFIG)
    with pytest.raises(ConfigError, match=r"^train.stepz: "):
        run_config(folder, ["train.stepz=7"])
    folder.delete(layout.CONFIG)
    with pytest.raises(ConfigError, match="demo has lost its config.yaml. settings/000002.yaml in the same folder has"):
        find_run("demo", str(tmp_path))


def test_a_user_without_a_home_owns_nothing_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's configuration is trusted because it cannot be known whose it is."""
    folder = open_store(str(tmp_path)).sub("demo")
    folder.put(layout.CONFIG, CONFIG)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", home)
    keep_as_own(CONFIG)
    assert not is_own(folder)


def test_where_a_run_lies_is_no_change_of_its_settings() -> None:
    before = {"run": {"name": "a", "store": "/old", "seed": 1}, "train": {"steps": 10}}
    now = {"run": {"name": "b", "store": "/new", "seed": 2}, "train": {"steps": 10}}
    assert changes(before, now) == [("run.seed", 1, 2)]


def test_the_next_command_of_a_submission_can_be_pasted(tmp_path: Path) -> None:
    config = Workshop(tmp_path).config("mine", f"run.store={tmp_path / 'my runs'}", "cluster.workers=2")
    told = [
        ray.submit(config, resume=False, take_over=False, dry_run=True, log=print),
        slurm.submit(config, resume=False, take_over=False, after=None, dry_run=True, log=print),
    ]
    for submission in told:
        assert shlex.split(submission.next) == ["capstan", "status", submission.uri, "--watch"]


def test_a_command_for_a_run_names_its_store_where_its_name_does_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_store(str(tmp_path / "my runs")).sub("demo")
    told = command("resume", run, "--dry-run")
    assert shlex.split(told.strip("`")) == [*"capstan resume demo --dry-run --store".split(), f"{tmp_path}/my runs"]
    monkeypatch.setenv("CAPSTAN_STORE", str(tmp_path / "my runs"))
    assert command("resume", run) == "`capstan resume demo`"


def test_a_store_can_be_the_root_of_the_disk() -> None:
    run = open_store("/").sub("demo")
    assert (run.uri, run.local_folder) == ("file:///demo", Path("/demo"))
    assert (store_of(run).local_folder, name_of(run)) == (Path("/"), "demo")
    assert command("resume", run) == "`capstan resume demo --store /`"
