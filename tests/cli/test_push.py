"""`capstan push` as a user calls it, against a stand-in of the Hub: a repository has a whole export, or what it had
before.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from launcher.export import Pushed, push_run
from tests.cli.conftest import ENVIRONMENT, Capstan
from tests.hub import READER, TOKEN, Hub, serve_hub
from tests.material import Workshop, commit
from trainer.errors import ConfigError, StorageError
from trainer.run import layout
from trainer.store.store import Store

pytestmark = pytest.mark.timeout(900)

MEASURED = {
    "step": 4,
    "sets": {"held out": {"base": {"loss": 3.25, "perplexity": 25.79}, "adapter": {"loss": 1.5, "perplexity": 4.4817}}},
    "tasks": {"hellaswag": {"acc": {"base": 0.25, "adapter": 0.5, "stderr": 0.01}}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    workshop = Workshop(tmp_path_factory.mktemp("push"))
    (workshop.base / "README.md").write_text("---\nlicense: llama3.1\n---\n\n# A base\n")
    run = workshop.store.sub("done")
    commit(run, workshop.config("done"))
    run.put(layout.evaluation(4), json.dumps(MEASURED).encode())
    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        for name, value in hub.environment.items():
            monkeypatch.setitem(ENVIRONMENT, name, value)
        yield hub


@pytest.mark.long
def test_a_push_that_was_killed_goes_on_and_the_card_says_what_was_pushed(
    capstan: Capstan, run: Store, hub: Hub, tmp_path: Path
) -> None:
    hub.hold_after = 1
    command = [
        sys.executable,
        "-m",
        "launcher.cli",
        "push",
        run.uri,
        "hf://me/mine",
        "--format",
        "merged",
        "--revision",
        "next",
    ]
    first = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, start_new_session=True)
    try:
        assert hub.holding.wait(300), "no second object came"
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert hub.files == {}, "half a push can be seen"
    assert hub.repositories == {"me/mine": "private"}
    there = list(hub.uploads)
    assert len(there) == 1

    hub.hold_after = None
    done = capstan("push", run.uri, "hf://me/mine", "--format", "merged", "--revision", "next", "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["url"], found["private"], found["exported"]["step"]) == (f"{hub.url}/me/mine", True, 4)
    assert len(hub.uploads) == len(set(hub.uploads)) > 1, "what was there already was sent again"
    assert hub.uploads[0] == there[0]
    files = hub.files["next"]
    assert {"README.md", "config.json", "model.safetensors.index.json", "tokenizer.json"} <= files.keys()
    assert sum(len(load(data)) for name, data in files.items() if name.endswith(".safetensors")) == 21

    card, metadata = files["README.md"].decode(), hub.cards[-1]
    assert (metadata["license"], metadata["library_name"]) == ("llama3.1", "transformers")
    assert "base_model" not in metadata, "the base is a folder, which the Hub does not take"
    assert "| held out | 3.2500 | 1.5000 | 25.7900 | 4.4817 |" in card
    assert "| hellaswag | acc | 0.2500 | 0.5000 |" in card
    assert "| learning rate | name: adamw, lr: 0.001, schedule: cosine, warmup_steps: 2 |" in card
    assert 'AutoModelForCausalLM.from_pretrained("me/mine", dtype="auto")' in card

    # An adapter in the place of the model: nothing of that may be loaded any more, and what is not ours stays.
    ours = {"notes.txt", "old/model.safetensors"}
    stale = {
        "chat_template.jinja",
        "generation_config.json",
        "adapter_model.bin",
        "merges.txt",
        "model-00009-of-00009.safetensors",
    }
    files.update(dict.fromkeys(ours | stale, b"of before"))
    done = capstan("push", run.uri, "hf://me/mine", "--revision", "next", timeout=600)
    assert done.returncode == 0, done.stderr
    read = {
        name for name in files.keys() - ours if name.endswith((".safetensors", ".index.json")) or name == "config.json"
    }
    assert read == {"adapter_model.safetensors"}
    assert {"adapter_config.json", *ours} <= files.keys()
    assert not stale & files.keys()


def test_an_adapter_of_a_base_that_was_cut_says_so_wherever_it_is_read(
    capstan: Capstan, hub: Hub, tmp_path: Path
) -> None:
    workshop = Workshop(tmp_path)
    run = workshop.store.sub("cut")
    commit(run, workshop.config("cut", "model.layers=1"))
    done = capstan("push", run.uri, "hf://me/cut", timeout=600)
    assert done.returncode == 0, done.stderr
    said = "It was trained over the first 1 layer of its base alone (model.layers)"
    files = hub.files["main"]
    assert said in done.stdout
    assert said in files["README.md"].decode()
    noted = json.loads(files["adapter_config.json"])["auto_mapping"]
    assert (noted["base_layers"], said in noted["remark"]) == (1, True)

    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    base = AutoModelForCausalLM.from_pretrained(workshop.base, num_hidden_layers=noted["base_layers"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")  # of a setting that PEFT does not know
        loaded = PeftModel.from_pretrained(base, str(tmp_path))
    loaded.save_pretrained(str(tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_bytes())
    assert again["auto_mapping"] == noted


def test_what_keeps_a_push_from_being_made_is_a_sentence(run: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def pushed(target: str = "hf://me/mine", dry_run: bool = False) -> Pushed:
        options = {"step": None, "revision": None, "public": False, "dry_run": dry_run, "log": lambda text: None}
        return push_run(run, target, "peft", **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    planned = pushed(dry_run=True)
    assert "would push adapter of step 4 to hf://me/mine@main, a private repository" in planned.sentence()
    with pytest.raises(ConfigError, match="is no repository of the Hub. Give hf://OWNER/NAME"):
        pushed("hf://mine")
    for target in ("hf://me/a--b", "hf://me/x.git"):
        with pytest.raises(ConfigError, match=f"'{target}' is no repository of the Hub: .* Give another name"):
            pushed(target, dry_run=True)
    with pytest.raises(ConfigError, match="needs a token that may write to the Hub, in HF_TOKEN"):
        pushed()
    for token, status in ((READER, 403), ("hf_wrong", 401)):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ConfigError, match=rf"the token in HF_TOKEN may not write to hf://me/mine: .* \({status}\)"):
            pushed()
    assert hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["me/mine"] = "public"
    with pytest.raises(ConfigError, match="hf://me/mine is there already, and everybody can read it. Give --public"):
        pushed()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="the Hub cannot be reached"):
        pushed()
