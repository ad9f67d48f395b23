"""The commands of the pages, run in small: over a tiny base, a few rows, and runs of the names that the pages speak
of.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.drive.sweep import laid_out
from launcher.init.recipes import recipe_text, write_data
from tests.material import byte_tokenizer, commit, make_base, make_data
from tests.pages import ROOT, Parsed, blocks, blocks_of, commands, of_capstan, parse
from tests.stored import store_as
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, load_config
from trainer.data.compile.prepare import prepare
from trainer.export.formats import gguf, gguf_adapter
from trainer.run import layout
from trainer.store.store import open_run_store

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt"
    " %}<assistant>{% endif %}"
)
STEPS = (120, 400)  # that pages name checkpoints of
SIZES: dict[str, Any] = {"max_position_embeddings": 8192}
# Files of other tools that pages import.
THEIRS = {
    "theirs.yml": "axolotl/qlora.yml",
    "sft.py": "trl/script.py",
    "sft.yaml": "trl/sft.yaml",
    "accelerate.yaml": "trl/accelerate.yaml",
    "train.sh": "trl/dpo.sh",
}
# Options that wait for a run to go on.
WAITING = {"--watch", "--follow", "-f"}
# The verbs whose commands are run, with --dry-run where they have it. `generate` would load a model, and `doctor` looks
# at this machine.
VERBS = {
    *(
        "checkpoints ls",
        "checkpoints prune",
        "checkpoints verify",
        "data build",
        "data check",
        "data show",
    ),
    *("evaluate", "export", "import", "logs", "ls", "plan", "push", "report", "resume", "smoke", "status", "stop"),
    "teach",
    *("submit ray", "submit slurm", "sweep", "train"),
}


@pytest.mark.long
def test_every_command_of_the_pages_runs_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for form in (gguf, gguf_adapter):  # a tokenizer of bytes is none of llama.cpp's
        monkeypatch.setattr(form, "check_known", lambda *_, **__: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "CAPSTAN_STORE"):
        monkeypatch.delenv(name, raising=False)
    lay_out(tmp_path)
    failed, ran = dict[str, str](), set[str]()
    for arguments in runnable():
        parsed = parse(arguments)
        make_runs(parsed)
        result = CliRunner().invoke(app, in_small(arguments, parsed))
        line = "capstan " + " ".join(arguments)
        ran.add(line)
        if result.exit_code or result.exception:
            failed[line] = f"{result.exception}\n{result.output}"
        elif "as_json" in parsed.values:
            json.loads(result.stdout)
    assert not failed, "\n".join(f"{line}\n    {why}" for line, why in failed.items())
    assert {verb for line in ran for verb in VERBS if line.startswith(f"capstan {verb}")} == VERBS


def runnable() -> list[list[str]]:
    """The distinct commands whose configuration is of the pages' own making and that begin no training; examples have
    their own test.
    """
    found: dict[str, list[str]] = {}
    for block in blocks("sh"):
        for command in commands(block.text):
            arguments = of_capstan(command)
            if arguments is None:
                continue
            arguments = [
                word.replace("s3://bucket/", "bucket/")
                .replace("/models/Llama-3.1-8B", "base")
                .replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base")
                .replace("smoke/sample/data", "data")
                for word in arguments
                if word not in WAITING
            ]
            parsed = parse(arguments)
            verb, given = " ".join(parsed.verb), str(parsed.values.get("config", ""))
            if verb in VERBS and not given.startswith("examples/"):
                found[" ".join(arguments)] = arguments
    return list(found.values())


def in_small(arguments: list[str], parsed: Parsed) -> list[str]:
    """The command so that it changes nothing, answers as JSON, and starts a run that is not there yet."""
    more = ["--dry-run"] if parsed.values.get("dry_run") is False else []
    more += ["--force"] if parsed.values.get("force") is False else []
    more += ["--json"] if parsed.values.get("as_json") is False else []
    starts = parsed.verb in (("train",), ("sweep",), ("submit", "ray"), ("submit", "slurm"))
    return [*arguments, *more, *(["run.name=another"] if starts and not parsed.values.get("resume") else [])]


def lay_out(folder: Path) -> None:
    """The files that the pages' commands name, of the contents that the pages show."""
    base = make_base(folder / "base", **SIZES)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(base)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "data").mkdir()
    for name in ("train", "train-00000", "eval", "general"):
        make_data(folder / f"data/{name}.jsonl")
    for name, theirs in THEIRS.items():
        shutil.copy(ROOT / "tests/peers" / theirs, folder / name)
    (folder / "data/prompts.jsonl").write_text('{"prompt": "the ant? "}\n')
    write_data(folder / "sample-data", force=False)
    sailing = recipe_text("smollm2-135m-chat").replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base")
    (folder / "sailing.yaml").write_text(sailing)
    (folder / "tasks").mkdir()
    (task,) = (block.text for block in blocks("yaml") if block.text.startswith("# tasks/our-questions.yaml"))
    (folder / "tasks/our-questions.yaml").write_text(task)
    (folder / "Llama-3.1-8B").symlink_to(base)
    (folder / "verifiers/bin").mkdir(parents=True)  # a dry run asks its Python for the library
    (folder / "verifiers/bin/python").symlink_to(sys.executable)
    (folder / "verifiers/v1.py").write_text("")
    shown: dict[str, dict[str, Any]] = {}
    for block in blocks("yaml"):
        tree, named = next(yaml.safe_load_all(block.text)), re.match(r"# (\S+\.yaml)$", block.text.splitlines()[0])
        if named and {"run", "model", "data"} <= tree.keys():
            mixture = tree.get("tuning", {}).get("experts")
            tree["model"]["base"] = str(make_base(folder / "mixture", "qwen3-moe", **SIZES) if mixture else base)
            tree["run"]["store"] = tree["run"]["store"].replace("s3://bucket/", "bucket/")
            tree["data"]["held_out"] = 0.2
            for source in tree["data"]["train"]:
                source["path"] = source["path"].replace("smoke/sample/data/train-*", "data/train")
            if "teacher" in tree.get("objective", {}):
                tree["objective"]["teacher"] = str(base)
            if "serve" in tree.get("rollout", {}):  # a start, a dry one too, looks for the servers' program
                tree["rollout"]["serve"].update(command=[sys.executable], gpus=0)
            shown[named[1]] = tree
    mine = shown["my-run.yaml"]
    search = next(yaml.safe_load(block.text) for block in blocks_of(ROOT / "docs/sweep.md") if block.language == "yaml")
    slurm = next(yaml.safe_load(block.text) for block in blocks_of(ROOT / "docs/slurm.md") if block.language == "yaml")
    # The jobs of that page have 16 ranks, which would find rows of nothing in the quickstart's batch.
    shown["run.yaml"] = {**mine, **slurm, "train": {**mine["train"], "global_batch": 16}}
    codes = str(store_as(base, folder / "codes", "int8-rows"))
    shown["in-codes.yaml"] = {**mine, "run": {"name": "in-codes", "store": "runs"}, "model": {"base": codes}}
    shown["my-sweep.yaml"] = {
        **mine,
        **search,
        "run": {"name": "my-sweep", "store": "runs"},
        "eval": {"every": 50},
    }
    for name, tree in shown.items():
        (folder / name).write_text(yaml.safe_dump(tree))


def make_runs(parsed: Parsed) -> None:
    """The runs that a command names, with what a training would have left in their folders."""
    values = parsed.values
    named = values.get("runs") or [values["run"]] if "run" in values or "runs" in values else []
    if values.get("resume"):
        named = [load_config(values["config"]).run.name]
    for run in named:
        parent, _, name = str(run).rpartition("/")
        store = parent or values.get("store") or "runs"
        file = f"{name}.yaml" if Path(f"{name}.yaml").is_file() else "my-run.yaml"
        config = load_config(file, [f"run.name={name}", f"run.store={store}"])
        folder = open_run_store(config).sub(name)
        if folder.exists(layout.CONFIG):
            continue
        if config.sweep.settings:
            config, plan = laid_out(config, resume=False)
            folder.put(layout.CONFIG, dump_config(config).encode())
            folder.put(layout.SWEEP, json.dumps(plan.to_json()).encode())
        else:
            make_run(folder, config)


def make_run(folder: Any, config: Config) -> None:
    datasets = prepare(config, resolve_base(config.model), open_run_store(config))
    for step in STEPS:
        commit(folder, config, step, datasets.train, eval_loss=1 / step)
    folder.put(layout.DRIVER_LOG, b"a line\n")
    for rank in range(4):
        folder.put(layout.rank_log(1, rank), b"a line\n")
    start = {"kind": "start", "time": 1.0, "generation": 1, "world_size": 4, "step": 0, "total_steps": 400}
    records = [start, *({"kind": "step", "time": 2.0, "step": step, "loss": 1.0} for step in STEPS)]
    folder.put(layout.metrics(1), "".join(json.dumps(record) + "\n" for record in records).encode())
