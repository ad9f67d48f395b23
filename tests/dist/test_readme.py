"""The blocks of the README and of the quickstart work as they stand, one after the other, in a folder where `make smoke`
has left its material.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.smoke.sample import Sizes, make_sample
from launcher.start.check import anchored, check
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import byte_tokenizer, make_base, make_policy
from tests.pages import ROOT, Block, blocks_of, commands, of_capstan, parse
from trainer.config import dump_config, load_config
from trainer.data.compile.prepare import prepare
from trainer.store.store import open_run_store

PAGES = ("README.md", "docs/quickstart.md")
(BLOCK,) = (block.text for block in blocks_of(ROOT / "docs/quickstart.md") if block.text.startswith("# my-run.yaml"))
NOTEBOOK = ROOT / "examples/first-run.ipynb"
ROWS = 600
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the blocks install or make is there; the tests of the wheel and CI run these.
OF_INSTALLATION = ("make ", "pip ")
# Over another base than Qwen's the command is the walk-through's, whose page has its own test.
OF_OTHER_PAGES = "moe.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the file of the quickstart and rows where it has them. The Hub is a small base."""
    base = make_base(tmp_path / "hub", "llama", max_position_embeddings=2048)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(base))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke/sample/data").mkdir(parents=True)
    turns = [{"role": "user", "content": "Open?"}, {"role": "assistant", "content": "Until six."}]
    rows = [{"messages": [{"role": "user", "content": f"Open on day {n}?"}, turns[1]]} for n in range(ROWS)]
    (tmp_path / "smoke/sample/data/train-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my-run.yaml").write_text(BLOCK)
    return tmp_path


def with_template(folder: Path) -> None:
    """Make the base one that a chat was trained into."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    make_base(folder / "hub", "llama", max_position_embeddings=2048, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "hub")


def ask(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "my-run.yaml"])
    assert result.exit_code == 0, f"{arguments}: {result.exception} {result.output}"
    return result.stdout


def test_the_first_run_of_the_quickstart_is_planned_shown_checked_compiled_and_trained(folder: Path) -> None:
    with_template(folder)
    assert json.loads(ask("plan", "--json"))["shortfalls"] == []
    (document,) = json.loads(ask("data", "show", "--json"))["rows"][0]["documents"]
    assert "".join(piece["text"] for piece in document["pieces"] if piece["trained"]) == "Until six.<|im_end|>"
    assert json.loads(ask("data", "check", "--json"))["refusals"] == []
    small = [
        "train.steps=1",
        "train.global_batch=1",
        f"sharding.deepspeed={make_policy(folder / 'p.json')}",
        f"model.base={folder / 'hub'}",
    ]
    one = anchored(load_config("my-run.yaml", small))
    data = prepare(one, check(one, resume=False).base, open_run_store(one))
    (outcome,) = launch(1, runs.run, dump_config(one), data.train)
    assert outcome["outcome"] == "finished", outcome


def test_a_base_without_a_template_is_answered_with_the_setting_by_every_command(folder: Path) -> None:
    said = "no chat template. Set it to a named one (chatml, llama3, paligemma, gemma, mistral, phi3"
    for command in (["plan"], ["data", "show"], ["data", "check"], ["data", "build"]):
        result = CliRunner().invoke(app, [*command, "my-run.yaml"])
        assert said in f"{result.exception}", command
    config = load_config("my-run.yaml", ())
    with pytest.raises(Exception, match="no chat template"):
        prepare(config, check(config, resume=False).base, open_run_store(config))


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_every_block_of_the_readme_and_of_the_quickstart_works_as_it_stands(tmp_path: Path) -> None:
    """Over the sample's base under the name that the pages have, as the Hub's cache keeps it. The run is there once: what
    both pages show is done by the first.
    """
    environment = with_sample(tmp_path)
    done = set[str]()
    for block in (block for page in PAGES for block in blocks_of(ROOT / page)):
        if block.language == "yaml":
            (tmp_path / block.text.split()[1]).write_text(block.text)
        elif block.language == "python":
            program(block.text, tmp_path, environment)
        elif block.language == "sh" and not block.text.startswith(OF_INSTALLATION) and OF_OTHER_PAGES not in block.text:
            lines = [re.sub(r"\s+#.*", "", line) for line in block.text.splitlines()]
            lines = [line for line in lines if line not in done]
            done.update(lines)
            shell("source .venv/bin/activate\n" + "\n".join(lines), tmp_path, environment, block)
    assert (tmp_path / "runs/first/report.html").is_file()
    assert {"adapter", "sailing", "merged", "for-24gb.yaml"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.long
@pytest.mark.timeout(2000)
def test_every_cell_of_the_notebook_runs(tmp_path: Path) -> None:
    environment = with_sample(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith("!pip install")
    for cell in code[1:]:
        if cell.startswith("!"):
            script = "source .venv/bin/activate\n" + cell.removeprefix("!")
            shell(script, tmp_path, environment, Block(NOTEBOOK.name, "sh", None, cell))
        else:
            program(cell, tmp_path, environment)
    assert (tmp_path / "sailing.zip").is_file()


def test_the_notebook_is_one_and_names_recipes_and_verbs_that_there_are() -> None:
    tree = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (tree["nbformat"], tree["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in tree["cells"]}) == len(tree["cells"])
    cells = ["".join(cell["source"]) for cell in tree["cells"] if cell["cell_type"] == "code"]
    asked = [cell.removeprefix("!") for cell in cells if cell.startswith("!capstan") or "| capstan" in cell]
    assert len(asked) > 5
    for command in (command for cell in asked for command in commands(cell)):
        if arguments := of_capstan(command):
            parse(arguments)
    assert all(not cell["outputs"] for cell in tree["cells"] if cell["cell_type"] == "code")


def with_sample(folder: Path) -> dict[str, str]:
    """Leave in `folder` what `make smoke` leaves, and the sample's base in the Hub's cache; returns the environment."""
    make_sample(folder / "smoke/sample", sizes=Sizes(steps=4))
    (folder / ".venv").symlink_to(sys.prefix)
    cached(folder / "hub", folder / "smoke/sample/base")
    offline = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **offline, "PYTHONPATH": str(ROOT)}


def test_the_pages_name_no_file_that_is_not_there() -> None:
    """What a command of the two pages reads is written by a block before it, or left by `make smoke`."""
    there = {"my-run.yaml", "moe.yaml", "sailing.yaml"}
    for block in (block for page in PAGES for block in blocks_of(ROOT / page) if block.language == "sh"):
        for command in commands(block.text):
            for word in of_capstan(command) or []:
                if re.search(r"\.(yaml|yml|jsonl)$", word):
                    assert word in there or word.startswith("smoke/sample/data/") or command[1] == "init", word


def cached(hub: Path, base: Path) -> None:
    """The base in the Hub's cache, under the name that the README's configuration has."""
    (name,) = re.findall(r"base: (\S+?)\}", BLOCK)
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    shutil.copytree(base, place / "snapshots" / ("0" * 40))


def shell(script: str, folder: Path, environment: dict[str, str], block: Block) -> None:
    ran = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert ran.returncode == 0, f"{block.place}: {script}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"


def program(text: str, folder: Path, environment: dict[str, str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
