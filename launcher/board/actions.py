"""The buttons of a run: each runs the command beside it, in a session of its own that outlives the board."""

import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

from launcher.board.live import Event, Look
from launcher.view.terminal import in_lines, visible
from trainer.errors import ConfigError
from trainer.processes import children
from trainer.run.folder import name_of, place_of
from trainer.store.store import Store

VERB = (sys.executable, "-m", "launcher.cli")
"""The command `capstan` of the environment that the board runs in."""
_MOST_OUTPUT = 2**18
_PIECE = 2**14
_LONGEST_VALUE = 4096


@dataclass(frozen=True)
class Field:
    """A field of a button's form: its words, and the option that it becomes.

    An `option` of None is a word of its own, and "=" stands for settings, `key=value`, with spaces between them.
    """

    about: str
    option: str | None = None
    kind: str = "text"
    needed: bool = False


@dataclass(frozen=True)
class Button:
    """A button: the verb that it runs, what that does, what is lost by it, and its fields."""

    verb: tuple[str, ...]
    about: str
    loses: str = ""
    fields: Mapping[str, Field] = field(default_factory=dict[str, Field])


_STEP = Field("step of the checkpoint; empty: the newest", "--step", "number")
BUTTONS: Mapping[str, Button] = {
    "stop": Button(
        ("stop",), "Asks the run to commit a checkpoint and end.", "The run ends. Nothing that it has learnt is lost."
    ),
    "resume": Button(
        ("resume",),
        "Goes on from the newest checkpoint, on this machine.",
        fields={"settings": Field("settings to change, such as cluster.workers=1", "=")},
    ),
    "evaluate": Button(("evaluate",), "Measures a checkpoint beside its base.", fields={"step": _STEP}),
    "export": Button(
        ("export",),
        "Writes what was trained for other programs.",
        fields={
            "destination": Field("folder or URI to write to", needed=True),
            "format": Field("format, such as peft or merged; empty: peft", "--format"),
            "step": _STEP,
        },
    ),
    "prune": Button(
        ("checkpoints", "prune"),
        "Removes the checkpoints that the rules do not keep, and what dead saves left.",
        "Removed checkpoints cannot be brought back.",
        {"keep_last": Field("newest checkpoints to keep; empty: as the run says", "--keep-last", "number")},
    ),
}


def command_of(name: str, folder: Store, given: Mapping[str, Any], *, dry_run: bool = False) -> list[str]:
    """Return the words of the command behind the button `name`, for the run in `folder`.

    Raises:
        ConfigError: there is no such button, a field has no allowed value, or the folder's name would be an option.
    """
    if name not in BUTTONS:
        raise ConfigError(f"there is no button {name[:40]!r}. Buttons: {', '.join(BUTTONS)}.")
    run = name_of(folder)
    if run.startswith("-"):  # whoever may write to the store has made it
        raise ConfigError(f"the folder {run[:80]!r} begins with a hyphen, as no run's does. Rename it.")
    action, words, options = BUTTONS[name], [run], list[str]()
    for key, known in action.fields.items():
        value = str(given.get(key) or "").strip()
        if not value:
            if known.needed:
                raise ConfigError(f"{key}: empty. Give the {known.about}.")
            continue
        if len(value) > _LONGEST_VALUE or value.startswith("-") or "\0" in value:
            raise ConfigError(f"{key}: {value[:80]!r} is not allowed. It may not begin with a hyphen.")
        if known.option == "=":
            words += _settings(key, value)
        elif known.option is None:
            words.append(value)
        else:
            options += [known.option, value]
    store, _ = place_of(folder)
    return ["capstan", *action.verb, *words, "--store", store, *options, *(["--dry-run"] if dry_run else [])]


def _settings(key: str, value: str) -> list[str]:
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {value[:80]!r} cannot be read: {error}.") from error
    if wrong := [word for word in words if "=" not in word or word.startswith("-")]:
        raise ConfigError(f"{key}: {wrong[0][:80]!r} is no setting. Write key=value, such as cluster.workers=1.")
    return words


class Job:
    """A command that was started, and its output.

    The output is in a file without a name, which is gone when the board and the command have ended. The command goes on
    when the board ends, unless it is `tied` to it. Its input is the text that is `given`. `page` is the address of what
    it makes.
    """

    look_seconds, macro = 0.3, "job"

    def __init__(self, words: Sequence[str], *, tied: bool = False, given: str = "", page: str = "") -> None:
        self.command, self.page = shlex.join(words), page
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as somebody may look at it
        started: Future[subprocess.Popen[Any]] = Future()

        # A tied command dies with the thread that starts it. Others go on without the board.
        start = children.start if tied else partial(subprocess.Popen, start_new_session=True)

        def run() -> None:
            with tempfile.TemporaryFile() as text:
                text.write(given.encode())
                text.seek(0)
                try:
                    command = children.apart([*VERB, *words[1:]])
                    begun = start(command, stdin=text, stdout=self._output, stderr=subprocess.STDOUT)
                except BaseException as error:
                    started.set_exception(error)
                    return
            started.set_result(begun)
            begun.wait()  # or it would stay in the list of processes after its end

        threading.Thread(target=run, daemon=True, name="job").start()
        self._process = started.result()

    def look(self, render: Callable[["Job", str], str]) -> Look:
        """Return looks at the command and its output. `render` draws it with the words on how it goes."""
        position: int | None = None

        def look() -> Iterable[Event]:
            nonlocal position
            if position is None:
                position = 0
                yield "parts", {"job": render(self, "goes on, also when this page is closed")}
            code = self._process.poll()  # first, because the output grows until the end
            while data := os.pread(self._output.fileno(), _PIECE, position):
                position += len(data)
                if position <= _MOST_OUTPUT:
                    yield "text", {"output": visible(in_lines(data.decode(errors="replace")))}
            if code is not None:
                yield "parts", {"how": f"ended with exit code {code}" if code else "done"}
                yield "end", None

        return look
