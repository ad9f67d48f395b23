"""The tasks of an environment of verifiers reward answers, by a Python of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT
from tests.needs import need
from trainer.errors import CapstanError
from trainer.evaluate.rollout.rewards import Scoring

VERIFIERS = ROOT / ".servers/verifiers"
TASKS = """
import verifiers.v1 as vf

__all__ = ["LettersTaskset"]


class LettersData(vf.TaskData):
    wanted: str


class LettersTask(vf.Task[LettersData]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.wanted)

    @vf.reward
    async def asked(self, task, trace) -> float:
        return 0.25 * (trace.messages[0].content == task.prompt)
{more}

class LettersTaskset(vf.Taskset[LettersTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        for said in {said}:
            data = LettersData(prompt=f"{{said}}>", system_prompt="Turn it round.", wanted=said[::-1])
            yield LettersTask(data, self.config.task)
"""
IN_A_SANDBOX = """
    @vf.reward
    async def built(self, trace, runtime) -> float:
        return 1.0
"""


def write_tasks(folder: Path, said: list[str], more: str = "") -> None:
    (folder / "letters.py").write_text(TASKS.format(said=said, more=more))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_tasks_of_verifiers_become_rows_and_reward_answers_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are made by the program of docs/rollouts.md."""
    need(None if (VERIFIERS / ".installed").exists() else "there is no verifiers: `make verifiers` installs it")
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path, ["abc", "de"])
    (program,) = re.findall(r"```python\n(# tasks.py.*?)```", (ROOT / "docs/rollouts.md").read_text(), re.S)
    (tmp_path / "tasks.py").write_text(program)
    python = str(VERIFIERS / "bin/python")
    made = subprocess.run([python, "tasks.py", "letters"], capture_output=True, text=True, check=True, timeout=300)
    rows = [
        [(one["role"], one["content"]) for one in json.loads(line)["messages"]] for line in made.stdout.splitlines()
    ]
    assert rows == [
        [("system", "Turn it round."), ("user", f"{said}>"), ("assistant", str(number))]
        for number, said in enumerate(["abc", "de"])
    ]
    scoring = Scoring("verifiers:letters", 300.0, python)
    assert scoring.rewards(["", "", ""], ["ed", " cba\n", "cba"], ["1", "0", "1"]) == [2.25, 2.25, 0.25]
    scoring.close()
    monkeypatch.setattr("trainer.evaluate.rollout.rewards.ATTEMPTS", 1)
    write_tasks(tmp_path, ["abc"], more=IN_A_SANDBOX)
    for name, sentence in (
        ("letters", "TypeError: built of letters judges what a sandbox has become, and an answer has none"),
        ("no_such", "ModuleNotFoundError: taskset 'no_such' not found"),
    ):
        with pytest.raises(CapstanError, match=re.escape(sentence)):
            Scoring(f"verifiers:{name}", 300.0, python).rewards(["", ""], ["a", "b"], ["0", "0"])


def test_a_reward_runs_by_another_python_without_our_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the user's own module, as the own Python does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import sys\n\ndef outside(completions, **_):\n    return [float('torch' in sys.modules or 'site-packages' in"
        " str(sys.path))] * len(completions)\n"
    )
    # -S and -I would hide what lies beside it from any Python.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    scoring = Scoring("mine:outside", 60.0, str(bare))
    assert scoring.rewards(["?"], ["a"], ["b"]) == [0.0]
    scoring.close()
    with pytest.raises(CapstanError, match=r"cannot be run \(/no/python: not found; rollout.reward_python\), 3 times"):
        Scoring("mine:outside", 60.0, "/no/python").rewards(["?"], ["a"], ["b"])
