"""Asks the reward, in a process of its own: the function is the user's, and may fail or never end."""

import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import trainer
from trainer.errors import CapstanError
from trainer.processes import children

ATTEMPTS = 3
_LONGEST_REASON = 300
_PROGRAM = "trainer.evaluate.rollout.rewards"
# A Python of another environment gets the package `trainer`, and nothing that lies beside it.
_ELSEWHERE = f"""
import sys
sys.path[:] = filter(None, sys.path)
import runpy, types
trainer = sys.modules["trainer"] = types.ModuleType("trainer")
trainer.__path__ = [{str(Path(trainer.__file__).parent)!r}]
runpy.run_module({_PROGRAM!r}, run_name="__main__")
"""


class RewardFailed(CapstanError):
    """The reward gives no numbers, and would not if it were asked again."""


class Scoring:
    """The reward called `name`, which may take so many `seconds` for the answers of a step.

    The process begins with the first answers, and is then reused. It runs under the interpreter `python`, if one is
    named.
    """

    def __init__(self, name: str, seconds: float, python: str | None = None) -> None:
        self._name, self._seconds, self._python = name, seconds, python
        self._process: subprocess.Popen[bytes] | None = None

    def rewards(self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return the reward of each completion.

        Raises:
            RewardFailed: three times the function fails, hangs, or returns something other than a finite number for
                each.
        """
        given = {"prompts": [*prompts], "completions": [*completions], "answer": [*answers]}
        for _ in range(ATTEMPTS):
            found = self._asked(json.dumps(given).encode() + b"\n")
            wrong = found if isinstance(found, str) else _wrong(found, len(completions))
            if wrong is None and not isinstance(found, str):
                return found
            self.close()
        raise RewardFailed(
            f"rollout.reward: {self._name} {wrong}, {ATTEMPTS} times. Nothing of this step is kept; correct it, and"
            " `capstan resume` goes on."
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _asked(self, line: bytes) -> list[float] | str:
        """Return the numbers, or a phrase that says why there are none."""
        if self._process is None:
            program = [self._python, "-c", _ELSEWHERE] if self._python else [sys.executable, "-m", _PROGRAM]
            try:
                self._process = children.start([*program, self._name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            except OSError as error:
                return f"cannot be run ({error}; rollout.reward_python)"
        process, deadline = self._process, time.monotonic() + self._seconds
        assert process.stdin is not None
        assert process.stdout is not None
        # A function that hangs at import reads nothing, and a pipe takes no more than 64 KiB.
        threading.Thread(target=_write, args=(process.stdin, line), daemon=True).start()
        said = b""
        while not said.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return f"has not answered within {self._seconds:g} s (rollout.reward_seconds)"
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                return "ended its process"
            said += part
        found = json.loads(said)
        return found["rewards"] if "rewards" in found else f"failed ({found['error'][:_LONGEST_REASON]})"


def _write(pipe: IO[bytes], line: bytes) -> None:
    with suppress(OSError):  # the process has ended, as its reader will find
        pipe.write(line)
        pipe.flush()


def _wrong(found: Sequence[float], wanted: int) -> str | None:
    if len(found) != wanted:
        return f"gave {len(found)} numbers for {wanted} answers"
    return None if all(map(math.isfinite, found)) else "gave a number that is not finite"
