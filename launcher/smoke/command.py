"""One of our modules in a process of its own, as a user would start it, with an end to it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from trainer.errors import CapstanError
from trainer.processes import children

_LONGEST_SECONDS = 600.0
_POLL_SECONDS = 0.5


class Command:
    """`python -m module arguments`, started at once. Its stderr is appended to `log`; leaving its context kills it.

    What it reads from stdin, if it reads, is `output`'s `said`.
    """

    def __init__(self, log: Path, module: str, *arguments: str) -> None:
        self._log = log
        self._deadline = time.monotonic() + _LONGEST_SECONDS
        with log.open("ab") as stderr:
            self._process = children.start(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "CAPSTAN_TRUST_RUN": "1"},  # they are runs of its own, also where nobody has a home
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def runs(self) -> bool:
        """Whether it still runs, after a short wait. Raises `CapstanError` when it has taken too long."""
        try:
            self._process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if time.monotonic() > self._deadline:
                raise CapstanError(f"no end after {_LONGEST_SECONDS:.0f} s: {self.last_words()}") from None
            return True
        return False

    def output(self, said: str = "") -> str:
        """Its output, once it has ended well. It reads what is `said` to it."""
        with self:
            try:
                out, _ = self._process.communicate(said.encode(), timeout=_LONGEST_SECONDS)
            except subprocess.TimeoutExpired:
                raise CapstanError(f"no end after {_LONGEST_SECONDS:.0f} s: {self.last_words()}") from None
        self.check()
        return out.decode()

    def check(self) -> None:
        """Raises `CapstanError`, with the same exit code, unless it has ended with exit code 0."""
        if code := self._process.returncode:
            error = CapstanError(f"a part of the smoke run ended with exit code {code}: {self.last_words()}")
            error.exit_code = max(code, 1)  # negative for a signal
            raise error

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (all of it in {self._log})"
