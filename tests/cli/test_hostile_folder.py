"""The installed command in a current folder that somebody has filled with files called like libraries: no verb, and
nothing that it starts, imports one of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ENVIRONMENT
from tests.material import Workshop, commit, make_data
from trainer.config import dump_config

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]

NAMES = (
    "torch numpy trainer launcher json pickle socket typer rich pydantic yaml obstore transformers tokenizers peft "
    "safetensors deepspeed ray multiprocessing sitecustomize usercustomize lm_eval"
).split()
VERBS = {
    "doctor": ["doctor"],
    "plan": ["plan", "RUN.YAML"],
    "data build": ["data", "build", "RUN.YAML"],
    "data check": ["data", "check", "RUN.YAML"],
    "data show": ["data", "show", "RUN.YAML"],
    "train": ["train", "RUN.YAML", "run.name=new", "train.steps=1", "data.eval=[]", "checkpoint.adapters=true"],
    "train on ray": ["train", "RUN.YAML", "run.name=ray", "train.steps=1", "data.eval=[]", "cluster.workers=[1,2]"],
    "export": ["export", "RUN", "exported", "--verify"],
    "export merged": ["export", "RUN", "merged", "--format", "merged"],
    "evaluate": ["evaluate", "RUN"],
    "generate": ["generate", "RUN", "--prompts", "PROMPTS", "--max-tokens", "2"],
    "ls": ["ls", "--store", "STORE"],
    "status": ["status", "RUN"],
    "logs": ["logs", "RUN"],
    "report": ["report", "RUN"],
    "checkpoints": ["checkpoints", "verify", "RUN"],
}


UNSURE = ("doctor", "logs")
"""Verbs whose exit code says something of this machine, or of a run that nobody has trained."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("workshop"), "speck", shard_size="2KB")
    other = make_data(workshop.folder / "eval.jsonl", seed=9)
    config = workshop.config("done", f"data.eval=[{{path: {other}}}]")
    (workshop.folder / "run.yaml").write_text(dump_config(config))
    (workshop.folder / "prompts.txt").write_text("the ant\n")
    commit(workshop.store.sub("done"), config)
    return workshop


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_imports_from_the_current_folder(workshop: Workshop, tmp_path: Path, verb: str) -> None:
    folder, marks = tmp_path / "current", tmp_path / "imported"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(marks)!r}, 'a').write({name!r} + ' ')\n")
    words = {
        "RUN.YAML": str(workshop.folder / "run.yaml"),
        "RUN": f"{workshop.folder}/store/done",
        "STORE": f"{workshop.folder}/store",
        "PROMPTS": str(workshop.folder / "prompts.txt"),
    }
    command = [str(Path(sys.executable).with_name("capstan")), *(words.get(word, word) for word in VERBS[verb])]
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert not marks.exists(), marks.read_text()
    assert done.returncode == 0 or verb in UNSURE, done.stderr
