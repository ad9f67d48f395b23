"""The first run of the README works as it is written: over a base without a chat template, on a user's
conversations.
"""

import json
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.start.check import anchored, check
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import make_base, make_policy
from tests.pages import ROOT, blocks_of
from trainer.config import dump_config, load_config
from trainer.data.compile.prepare import prepare
from trainer.store.store import open_run_store

(BLOCK,) = (block.text for block in blocks_of(ROOT / "README.md") if block.text.startswith("# my-run.yaml"))
ROWS = 30


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the file of the README and rows. The Hub is a small base that has no chat template, nor
    tokens of one.
    """
    base = make_base(tmp_path / "hub", "llama", max_position_embeddings=2048)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(base))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    turns = [{"role": "user", "content": "Open?"}, {"role": "assistant", "content": "Until six."}]
    (tmp_path / "data/train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * ROWS)
    (tmp_path / "my-run.yaml").write_text(BLOCK)
    return tmp_path


def ask(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "my-run.yaml"])
    assert result.exit_code == 0, f"{arguments}: {result.exception} {result.output}"
    return result.stdout


def test_the_first_run_of_the_readme_is_planned_shown_checked_compiled_and_trained(folder: Path) -> None:
    assert json.loads(ask("plan", "--json"))["shortfalls"] == []
    (document,) = json.loads(ask("data", "show", "--json"))["rows"][0]["documents"]
    assert "".join(piece["text"] for piece in document["pieces"] if piece["trained"]) == "Until six.<|im_end|>"
    assert json.loads(ask("data", "check", "--json"))["refusals"] == []
    config = anchored(load_config("my-run.yaml", ()))
    base = check(config, resume=False).base
    assert prepare(config, base, open_run_store(config)).train
    small = [
        "train.steps=1",
        "train.global_batch=1",
        "data.sequence_length=256",
        f"sharding.deepspeed={make_policy(folder / 'p.json')}",
        f"model.base={folder / 'hub'}",
    ]
    one = anchored(load_config("my-run.yaml", small))
    key = prepare(one, check(one, resume=False).base, open_run_store(one)).train
    (outcome,) = launch(1, runs.run, dump_config(one), key)
    assert outcome["outcome"] == "finished", outcome


def test_without_its_template_every_command_says_the_same(folder: Path) -> None:
    tree = yaml.safe_load(BLOCK)
    tree["data"].pop("template")
    (folder / "my-run.yaml").write_text(yaml.safe_dump(tree))
    said = "no chat template. Set it to a named one (chatml, llama3, gemma, mistral, phi3; here chatml"
    for command in (["plan"], ["data", "show"], ["data", "check"], ["data", "build"]):
        result = CliRunner().invoke(app, [*command, "my-run.yaml"])
        assert said in f"{result.exception}", command
    config = load_config("my-run.yaml", ())
    with pytest.raises(Exception, match="no chat template"):
        prepare(config, check(config, resume=False).base, open_run_store(config))
