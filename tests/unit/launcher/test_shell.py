"""The shell's side of the commands: what Tab offers in real shells, help, and tables that cut nothing off."""

import io
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.cli.shell import complete_format, complete_gpu, complete_run, complete_setting
from launcher.doctor.doctor import Check, Diagnosis, diagnosis_table
from launcher.view.console import FoldedTable
from trainer.errors import ConfigError
from trainer.state.optimizer import optimizers
from trainer.store.store import open_store

LINES = {
    "capstan ev": ["evaluate"],
    "capstan data s": ["show"],
    "capstan plan run.yaml tr": ["train.", "track."],
    "capstan plan run.yaml train.ep": ["train.epochs="],
    "capstan plan run.yaml optim.name=": [f"optim.name={name}" for name in optimizers()],
    "capstan plan run.yaml quant.double=t": ["quant.double=true"],
    "capstan plan run.yaml --gpu A100": ["A100-40GB", "A100-80GB"],
    "capstan init --goal k": ["kto"],
    "capstan init --machine s": ["slurm"],
    "capstan init --gpu H20": ["H200", "H200-NVL", "H20"],
    "capstan import x.yaml --from t": ["trl"],
    "capstan status fi": ["first"],
    "capstan status --store elsewhere s": ["second"],
    "capstan plan no-such-ve": [],
}
# Each prints what the shell has at hand for one line after another; bash hands words to readline behind = and :.
ASKING = {
    "bash": """
source <(capstan completion bash)
compopt() { :; }
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${#line}; _capstan capstan
    word=${line##* }; echo "${COMPREPLY[*]/#/${word%"${word##*[=:]}"}}"
done""",
    "zsh": """
compdef() { :; }
compadd() { print -rn -- "${@:${@[(i)--]}+1} " }
_files() { :; }
source <(capstan completion zsh)
for line in "$@"; do
    words=("${(@s: :)line}") CURRENT=$#words; _capstan; print
done""",
    "fish": """
capstan completion fish | source
for line in $argv
    echo (complete -C $line | string replace -r '\\t.*' '')
end""",
}


@pytest.mark.parametrize("shell", ASKING)
def test_tab_offers_verbs_options_runs_settings_and_their_values(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed (apt-get install {shell})")
    for run in ("runs/first", "elsewhere/second"):
        open_store(str(tmp_path / run)).put("config.yaml", b"run: {}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = tmp_path / "ask"
    script.write_text(ASKING[shell])
    done = subprocess.run(
        [shell, script, *LINES],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    offered = [line.split() for line in done.stdout.splitlines()]
    assert [sorted(words) for words in offered] == [sorted(words) for words in LINES.values()]


def test_each_shell_has_a_script() -> None:
    for shell in ASKING:
        script = files("launcher.cli").joinpath(f"completion.{shell}").read_text(encoding="utf-8")
        assert CliRunner().invoke(app, ["completion", shell]).stdout == script


def test_help_says_of_a_flag_what_it_does_and_no_type() -> None:
    for verb in ([], ["plan"], ["export"], ["data"], ["data", "show"], ["generate"]):
        shown = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert "--help" in shown.stdout
        assert "<bool>" not in shown.stdout
    assert "<int" in CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).stdout


def letters(table: object, width: int) -> str:
    """What a terminal of this width shows of a table, row by row and column by column, without its lines and spaces."""
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    columns = zip(*(line.split("│")[1:-1] for line in out.getvalue().splitlines() if line.startswith("│")), strict=True)
    return "|".join("".join("".join(cell.split()) for cell in column) for column in columns)


def test_a_narrow_terminal_shows_whole_commands() -> None:
    command = "pip install --no-build-isolation 'capstan-llm[linear-attention]'"
    found = Diagnosis((Check("flash-linear-attention", "optional", "not installed", command),))
    (_, table) = diagnosis_table(found).renderables
    assert command.replace(" ", "") in letters(table, 60)
    plain, folded = Table("What", "How to get it"), FoldedTable("What", "How to get it")
    for cut in (plain, folded):
        cut.add_row("flash-linear-attention", Text(command))
    assert "…" in letters(plain, 40)
    assert command.replace(" ", "") in letters(folded, 40)


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ("export first out --merge", "Write --format merged."),
        ("push first hf://me/first --merged", "Write --format merged."),
        ("plan run.yaml --gpu-memory=80", "Write --gpu 80GiB."),
    ],
)
def test_an_option_of_another_name_is_refused_with_ours(given: str, instead: str) -> None:
    refused = CliRunner().invoke(app, given.split()).exception
    assert isinstance(refused, ConfigError)
    assert str(refused).endswith(f"there is no such option. {instead}")


def test_tab_offers_the_runs_of_a_folder_and_asks_no_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.view.runs.runs", lambda store: ["first", "second"])
    offered = {
        store: complete_run(cast(Any, SimpleNamespace(params={"store": store})), "f")
        for store in (str(tmp_path), "s3://bucket/runs")
    }
    assert list(offered.values()) == [[("first", "")], []]
    assert ("H100", "") in complete_gpu("h1")


def test_settings_are_completed_section_by_section_and_then_by_what_they_allow() -> None:
    def offered(incomplete: str) -> list[str]:
        return [word for word, _ in complete_setting(incomplete)]

    assert offered("tr") == ["train.", "track."]
    assert offered("train.ep") == ["train.epochs="]
    assert offered("quant.double=") == ["quant.double=true", "quant.double=false"]
    assert offered("quant.double=f") == ["quant.double=false"]
    assert offered("sweep.mode=") == ["sweep.mode=min", "sweep.mode=max"], "those of a setting that may be left out"
    assert offered("optim.name=adamw") == ["optim.name=adamw", "optim.name=adamw_8bit"]
    assert offered("train.epochs=") == offered("no.such=") == []
    assert all(about for _, about in complete_setting("train."))
    formats = [name for name, _ in complete_format("")]
    assert formats == sorted(formats)
    assert complete_format("me") == [("merged", "")]


def test_help_has_the_brackets_of_lists() -> None:
    shown = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).stdout
    assert shown.count("'types=[f16,q8_0]'") == 2, "of the option and of the example"


def test_a_word_behind_two_hyphens_is_no_option() -> None:
    refused = CliRunner().invoke(app, ["plan", "--", "--gpu-memory"]).exception
    assert isinstance(refused, ConfigError)
    assert "--gpu-memory" in str(refused)
    assert "no such option" not in str(refused)
