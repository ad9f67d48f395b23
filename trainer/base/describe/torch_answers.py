"""Answers that need torch and transformers, for processes that must answer quickly.

A separate process takes some seconds to import them, and then answers the questions of this process one after the
other. Each answer is kept in the user's cache.

    <cache>/capstan/<function>/<hash>.json
    python -m trainer.base.describe.torch_answers < questions > answers     (one on each line)

The hash covers everything that decides an answer: the given facts, the versions of transformers and of the libraries
with which a base is tried, and the code that answers: of `trainer/base` and `trainer/model`, and all of `trainer` for
questions to other packages.
"""

import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from trainer import errors
from trainer.config.paths import users_folder
from trainer.errors import NOT_JSON, CapstanError, ConfigError
from trainer.processes import children
from trainer.processes.helper_thread import patiently

Parsed = TypeVar("Parsed")
_PACKAGES = ("transformers", "torch", "bitsandbytes")
_IDLE_SECONDS = 20
_SECONDS = 300  # on a slow disk transformers' import takes most of it; the model itself is on `meta`


class Question(NamedTuple):
    """A function in a module of `trainer`, such as `base.describe.meta`, and its arguments. All are JSON.

    The answer is JSON too. `base` is the base's name in messages, and `doing` says what is happening in the meantime.
    """

    module: str
    function: str
    given: dict[str, Any]
    base: str
    doing: str


def user_cache() -> Path:
    """The folder of this machine for files that can be made again."""
    return users_folder("XDG_CACHE_HOME", ".cache")


def kept_answer(question: Question, facts: Any, parse: Callable[[Any], Parsed]) -> Parsed:
    """The answer, from the cache if it has one for these `facts`.

    `parse` may raise `LookupError`, `TypeError` or `AttributeError` for a tree that is not an answer.

    Raises:
        CapstanError: the function raised it.
        ConfigError: transformers cannot answer, or takes too long.
    """
    digest = hashlib.sha256(json.dumps([*map(version, _PACKAGES), facts]).encode() + _code(question.module)).hexdigest()
    path = user_cache() / question.function / f"{digest[:32]}.json"
    # An entry that is damaged, missing or half written is made again. All processes write the same entry.
    with suppress(OSError, *NOT_JSON, LookupError, TypeError, AttributeError):
        return parse(json.loads(path.read_bytes()))
    written = json.dumps(_answer(question) if "torch" in sys.modules else _answer_elsewhere(question))
    with suppress(OSError):  # a home folder that cannot be written costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written)
    return parse(json.loads(written))


@cache
def _code(module: str) -> bytes:
    """The code that decides an answer. A cache entry of other code does not count."""
    base, trainer = Path(__file__).parents[1:3]
    files = [*base.rglob("*.py"), *base.rglob("*.yaml"), *trainer.glob("model/*.py")]
    if not module.startswith("base."):
        files = [*trainer.rglob("*.py"), *base.rglob("*.yaml")]
    return b"".join(file.read_bytes() for file in sorted(files))


def _answer(question: Question) -> Any:
    return getattr(import_module(f"trainer.{question.module}"), question.function)(**question.given)


def _answer_elsewhere(question: Question) -> Any:
    print(f"{question.doing} with transformers, once for this base: this takes longest", file=sys.stderr)
    with patiently(question.doing), _ONE_AT_A_TIME:
        said = _said_elsewhere(question)
    answer = json.loads(said)
    if "refusal" in answer:
        raise getattr(errors, answer["error"])(answer["refusal"])
    return answer["answer"]


class _Answering(NamedTuple):
    """A process that has imported torch and transformers, its stderr, and the surroundings that it was started in."""

    process: "subprocess.Popen[bytes]"
    errors: IO[bytes]
    place: tuple[str, dict[str, str]]


_ONE_AT_A_TIME = threading.Lock()
_answering: list[_Answering] = []
"""The process that has answered the question before, if there was one: most of an answer's time is its imports."""


def _said_elsewhere(question: Question) -> bytes:
    """Return the line that another process answers with."""
    asked = json.dumps(question).encode() + b"\n"
    place = (os.getcwd(), dict(os.environ))
    kept = _answering.pop() if _answering else None
    if kept is not None and kept.place == place and kept.process.poll() is None:
        with suppress(OSError, _Ended):  # it may end at this moment, as it was idle
            return _ask(kept, asked, question)
    command = [sys.executable, "-m", "trainer.base.describe.torch_answers"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # a compiler that is not needed is slow to import
    said = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
    started = _Answering(children.start(command, env=environment, **pipes), said, place)
    try:
        return _ask(started, asked, question)
    except (_Ended, OSError) as error:
        started.process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
        reason = next(reversed(lines), f"exit code {started.process.returncode}")
        raise ConfigError(
            f"model.base: transformers cannot build the model of {question.base} ({reason[:300]})."
        ) from error


class _Ended(Exception):
    """The process has ended without an answer."""


def _ask(answering: _Answering, asked: bytes, question: Question) -> bytes:
    """Return the line with which the process answers, and keep the process for the next question."""
    process = answering.process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(asked)
    process.stdin.flush()
    line, deadline = bytearray(), time.monotonic() + _SECONDS
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            process.kill()
            raise ConfigError(
                f"model.base: transformers has not built the model of {question.base} within {_SECONDS} seconds. Try"
                " again."
            )
        if not (read := os.read(process.stdout.fileno(), 2**16)):
            raise _Ended
        line += read
    _answering[:] = [answering]
    return bytes(line)


def _serve() -> None:
    """Answer the questions of stdin, one a line, until it ends or none has come for a while."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print anything
    while select.select([sys.stdin], [], [], _IDLE_SECONDS)[0] and (line := sys.stdin.readline()):
        try:
            said: dict[str, Any] = {"answer": _answer(Question(*json.loads(line)))}
        except CapstanError as refused:
            said = {"refusal": str(refused), "error": type(refused).__name__}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
