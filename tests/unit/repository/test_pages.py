"""Whatever the pages tell people to type is what the program takes: every block is parsed by the thing that will read
it.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.pages import (
    LANGUAGES,
    ROOT,
    Block,
    blocks,
    blocks_of,
    commands,
    inline_commands,
    of_capstan,
    parse,
    verb_of,
)
from trainer.config import load_config, parse_config

# Programs that come with neither Capstan nor its dependencies: no test can see whether they take what a page says.
OTHERS = set(
    "apptainer cd cp docker echo eval export for git gsutil aws az helm kubectl llama-server podman source srun ssh tar"
    " uv uvx verifiers/bin/python vllm".split()
)
COMPLETE: dict[str, Any] = {
    "run": {"name": "whole"},
    "model": {"base": "/models/base"},
    "data": {"train": [{"path": "data/train.jsonl"}]},
    "train": {"steps": 100},
}
SEARCH = {"sweep": {"settings": {"optim.lr": {"log_uniform": [1e-5, 1e-3]}}}}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def by_place(*languages: str) -> Any:
    return pytest.mark.parametrize("block", blocks(*languages), ids=lambda block: block.place)


def test_every_block_says_what_it_is() -> None:
    every = blocks()
    assert len(every) > 60
    assert [block.place for block in every if block.language not in LANGUAGES] == [], (
        f"begin a block with one of {LANGUAGES}"
    )


@by_place("sh")
def test_a_script_is_bash_and_its_programs_take_what_it_gives_them(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stderr
    check_script(block.text)


def check_script(text: str) -> None:
    if re.search(r"^\w+\(\)", text, re.MULTILINE):  # a file of functions, which another program reads
        return
    for command in commands(text):
        check_command(command)


def check_command(command: list[str]) -> None:
    """Raises where a program does not take its arguments, or is none that these pages may speak of."""
    program, *rest = command
    arguments = of_capstan(command)
    if arguments is not None:
        check_settings(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), command
    elif "install" in rest and ("pip" in command or program.endswith("pip")):
        check_requirements(rest)
    elif program.startswith("python") and rest[:1] == ["-m"]:
        if rest[1].partition(".")[0] != "sglang":
            assert importlib.util.find_spec(rest[1]), command
    elif program not in OTHERS:
        scripts = importlib.metadata.entry_points(group="console_scripts").names
        assert program.removeprefix(".venv/bin/") in scripts, f"no program {program!r}: {command}"


def check_settings(arguments: list[str]) -> None:
    """The command line parses, and the settings in it make a valid configuration."""
    parsed = parse(arguments)
    overrides = parsed.values.get("overrides") or ()
    config = parsed.values.get("config")
    if config is not None and (ROOT / config).is_file():
        load_config(ROOT / config, overrides)
    elif overrides:
        search = SEARCH if any(setting.startswith("sweep.") for setting in overrides) else {}
        parse_config(yaml.safe_dump({**COMPLETE, **search}), overrides)


def check_requirements(words: list[str]) -> None:
    """An extra of ours that `pip install` is asked for exists."""
    for word in words:
        named = re.match(r"(?:capstan-llm|\.)(?:\[([\w,-]+)\])?", word)
        if named and named[1]:
            assert set(named[1].split(",")) <= PROJECT["optional-dependencies"].keys(), word
        if word.startswith("capstan-llm"):
            assert Requirement(word.partition(" @ ")[0]).name == PROJECT["name"]


@pytest.mark.parametrize(
    ("place", "words"), [*inline_commands()], ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_command_in_the_text_has_a_verb_and_options_that_exist(place: str, words: list[str]) -> None:
    _, command = verb_of(words)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options = {
        word.partition("=")[0].strip("[]")
        for word in words
        if word.lstrip("[").startswith("-") and word.strip("[]") != "-"
    }
    assert options <= known | {"--help", "--debug"}, place


@by_place("yaml")
def test_a_configuration_or_a_part_of_one_is_valid(block: Block) -> None:
    if block.of is None:
        check_yaml(block.text)
    else:
        assert isinstance(yaml.safe_load(block.text), dict)


def check_yaml(text: str) -> None:
    for tree in yaml.safe_load_all(text):
        if "task" in tree:
            from lm_eval.api.task import TaskConfig

            TaskConfig(**tree)
        else:
            parse_config(yaml.safe_dump(completed(tree)))


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """A part of a configuration with what every configuration needs beside it."""
    whole = {**COMPLETE, **tree}
    for section, needed in COMPLETE.items():
        ends = {"steps", "epochs"} & whole[section].keys()
        whole[section] = whole[section] if ends else {**needed, **whole[section]}
    return whole


@by_place("python")
def test_a_snippet_compiles_and_what_it_imports_is_there(block: Block) -> None:
    tree = ast.parse(block.text)
    compile(tree, block.place, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("trainer", "launcher")):
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            tops = {(name or "").partition(".")[0] for name in names}
            # The file that an exported bottleneck adapter has beside its weights, and what is for an environment of its
            # own.
            assert all(importlib.util.find_spec(top) for top in tops - {"load_bottleneck", "verifiers"})


@by_place("json")
def test_rows_are_json(block: Block) -> None:
    for line in block.text.splitlines():
        json.loads(line.replace("{...}", "{}"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("capstan plam my-run.yaml", "no verb 'plam'"),
        ("capstan plan my-run.yaml --gpu-memry 80", "No such option: --gpu-memry"),
        ("torchrun --nproc-per-node 8 --no-python capstan train my-run.yaml train.stepz=3", "train.stepz"),
        ("capstan train examples/8b-dora.yaml tuning.rnak=4", "tuning.rnak"),
        ("CAPSTAN_STORE=x capstan ls | grpe running", "no program 'grpe'"),
        ("make smokes", "smokes"),
        ("pip install 'capstan-llm[taks]'", "taks"),
    ],
)
def test_a_wrong_command_is_found(wrong: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        check_script(wrong)


def test_a_wrong_setting_and_a_block_without_a_language_are_found(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Exception, match="optim.lrr"):
        check_yaml("optim: {lrr: 1.0e-4}")
    monkeypatch.setattr("tests.pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```\noutput\n```\n\n- b\n\n  ```yaml of=axolotl\n  a: 1\n  ```\n")
    assert [(block.language, block.of) for block in blocks_of(page)] == [("", None), ("yaml", "axolotl")]
