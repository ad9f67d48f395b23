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

from tests.cli.conftest import Capstan
from tests.material import Workshop, commit
from trainer.run import layout
from trainer.store.canonical_json import digest_of
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
