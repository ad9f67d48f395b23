"""`capstan generate`: it takes prompts from a file, a pipe or a person, and shows the answers as they are written."""

import os
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TextIO

from launcher.evaluate.evaluating import SIDES
from launcher.evaluate.ranks import for_server, run_ranks
from launcher.start.group import is_rank, is_silent_rank
from launcher.start.local_ranks import count_ranks
from launcher.view.terminal import put
from trainer.base.find.media import Modality, NotOfModality, modalities, recognized
from trainer.base.find.processor import check_packages
from trainer.config import Config
from trainer.config.paths import check_file, local_path
from trainer.config.row_kinds import ROW_KINDS
from trainer.errors import ConfigError, DataError, shown
from trainer.evaluate.program import Ask
from trainer.evaluate.prompts import Prompt, asked, has_pictures, read_prompts
from trainer.processes.helper_thread import waiting_for_a_person
from trainer.state.checkpoint.manifest import check_step, committed_steps
from trainer.store.store import Store


def answer_prompts(
    ask: Ask,
    folder: Store,
    config: Config,
    prompts: str | None,
    paths: Mapping[str, Sequence[str]],
    log: Callable[[str], None],
    *,
    shows: bool,
) -> dict[str, Any]:
    """Answer the prompts in the file at the path `prompts`, of a pipe, or of a chat on a terminal, with the files at
    `paths`, by the kind of their modality. With `shows` the answers are shown as they come. Returns what
    `generate_answers` does.

    Raises:
        ConfigError: there is no prompt, or one of the files cannot be used.
        CapstanError: as `generate_answers`.
    """
    chats = prompts is None and shows and not is_rank() and sys.stdin.isatty()
    files = read_files(paths, config, folder.uri)
    given = [] if chats or is_silent_rank() else given_prompts(config, prompts)
    if not (chats or given or is_silent_rank()):
        raise ConfigError(
            "there is no prompt: give --prompts FILE, set eval.prompts, or write lines to standard input."
        )
    turns = in_turns(with_files(given, files), config)
    if not shows:
        return generate_answers(ask, folder, config, turns, log, None)
    screen = Screen(sys.stdout, both=ask.base, streams=chats or all(len(turn) == 1 for turn in turns))
    coming = screen.conversation(files) if chats else screen.shown(turns)
    return generate_answers(ask, folder, config, coming, log, screen)


def generate_answers(
    ask: Ask,
    folder: Store,
    config: Config,
    prompts: Iterable[list[Prompt]],
    log: Callable[[str], None],
    screen: "Hears | None",
) -> dict[str, Any]:
    """Return the answers of a checkpoint of the run in `folder`, or of its server, to lists of prompts, and its step.

    `screen` shows the answers as they come.

    Raises:
        ConfigError: the server is asked for a checkpoint or for the base.
        CapstanError: the ranks raise it.
    """
    if ask.server and (ask.base or ask.step is not None):
        raise ConfigError(
            "--server: the server answers with the model that it serves, so --step, --best and --base have no effect."
            f" Leave them out, or name one of its models behind a #: {ask.server.partition('#')[0]}#NAME."
        )
    if ask.server:
        config = for_server(config, "--server", "generate")
    else:
        check_step(folder, committed_steps(folder), ask.step)

    def hear(told: dict[str, Any]) -> None:
        if "log" in told:
            log(told["log"])
        elif screen is not None and "ready" in told:
            screen.chats = told["chats"]
        elif screen is not None and "piece" in told:
            screen.piece(told["side"], told["piece"])
        elif screen is not None and "answers" in told:
            screen.answers(told["answers"])

    return run_ranks(ask, config, prompts, hear)


def given_prompts(config: Config, path: str | None) -> list[Prompt]:
    """Return the prompts in the file at `path`, or the lines of standard input for "-".

    Without a `path` they are the lines of a pipe. If there is no pipe or it is empty, they are those of `eval.prompts`.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    kept = config.eval.prompts if path is None else None
    if path in (None, "-") and not (kept and sys.stdin.isatty()):
        lines = _from_stdin(sys.stdin.read).split("\n")
        typed: list[Prompt] = [{"prompt": line} for line in lines if line.strip()]
        if typed or not kept:
            return typed
    fields = config.data.fields
    return read_prompts(kept, fields) if kept else read_prompts(path or "", fields, "--prompts")


def _from_stdin(read: Callable[[], str]) -> str:
    try:
        with waiting_for_a_person():
            return read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input is not text in UTF-8 (byte {error.start}). Send the prompts as UTF-8."
        ) from error


Files = Mapping[str, list[str]]
"""Files that each prompt has, as data URIs, by the field of a prompt that has such files."""


def read_files(paths: Mapping[str, Sequence[str]], config: Config, run: str) -> Files:
    """Return the files at `paths`, which are given by the kind of their modality.

    Raises `ConfigError` if one cannot be read or is of another modality, or the run in the folder `run` was trained on
    text alone."""
    given = {modality: paths[modality.kind] for modality in modalities() if paths.get(modality.kind)}
    if given and not ROW_KINDS[config.data.kind].sees:
        option = _option(next(iter(given)))
        raise ConfigError(
            f"{option}: {run} was trained on text (data.format: {config.data.format}), so its prompts have no files."
            " Leave it out, or train with data.format: pictures."
        )
    if given:
        check_packages()
    return {modality.fields[0]: [_read(path, modality) for path in names] for modality, names in given.items()}


def _option(modality: Modality) -> str:
    return f"--{modality.kind}"


def _read(path: str, modality: Modality) -> str:
    option = _option(modality)
    file = local_path(path, option)
    try:
        check_file(file)
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: {shown(path)} cannot be read: {error.strerror or error}.") from error
    try:
        modality.check(content)
    except NotOfModality as error:
        other = recognized(content)
        said = error if other is None else f"is a {other.noun}. Give it with {_option(other)}"
        raise ConfigError(f"{option}: {shown(path)} {said}.") from error
    except DataError as error:
        raise ConfigError(f"{option}: {shown(path)} {error}.") from error
    return f"data:application/octet-stream;base64,{b64encode(content).decode()}"


def with_files(prompts: Sequence[Prompt], files: Files) -> Sequence[Prompt]:
    """Return the prompts, each with `files`. Raises `ConfigError` if one has files of its own."""
    if files and any(map(has_pictures, prompts)):
        options = ", ".join(_option(modality) for modality in modalities() if modality.fields[0] in files)
        raise ConfigError(f"{options}: a prompt has files of its own. Give all of them in one of both places.")
    return [{**prompt, **files} for prompt in prompts]


def in_turns(prompts: Sequence[Prompt], config: Config) -> list[list[Prompt]]:
    """Return `prompts` in lists of as many as there are ranks, which answer one each."""
    ranks = int(os.environ["WORLD_SIZE"]) if is_rank() else count_ranks(config)
    return [list(prompts[first : first + ranks]) for first in range(0, len(prompts), ranks)]


class Hears(Protocol):
    """Somebody to whom the answers go as they come.

    `chats`: everything that is said is one conversation, as the ranks say when they are ready. `last` is the newest
    answer by sides. `side` is that of the base or of the adapter.
    """

    chats: bool
    last: dict[str, Any]

    def piece(self, side: str, text: str) -> None: ...

    def answers(self, rows: Sequence[dict[str, Any]]) -> None: ...


def conversation(lines: Iterable[str], hears: Hears, files: Files = MappingProxyType({})) -> Iterator[list[Prompt]]:
    """Yield what is said as prompts, one at a time, until there are no more lines.

    If `hears.chats`, they are one conversation, which includes the answers so far. An empty line begins a new one. Each
    conversation begins with `files`.
    """
    said = list[dict[str, str]]()
    for line in lines:
        if not line.strip():
            said.clear()
            continue
        said.append({"role": "user", "content": line})
        yield list(with_files([{"messages": list(said)} if hears.chats else {"prompt": line}], files))
        said.append({"role": "assistant", "content": hears.last["adapter"]})


class Screen:
    """Answers on the terminal.

    With `streams` an answer is shown as it is written, else when it is whole. If `both` sides answer, each has its name
    before it. `chats`: everything that is typed is one conversation, as the ranks say when they are ready.
    """

    def __init__(self, out: TextIO, *, both: bool, streams: bool) -> None:
        self._out, self._both, self._streams = out, both, streams
        self._side: str | None = None
        self.last: dict[str, Any] = {}
        self.chats = False

    def piece(self, side: str, text: str) -> None:
        if not self._streams:
            return
        if side != self._side:
            self._write(("\n" if self._side else "") + self._head(side))
            self._side = side
        self._write(text)

    def answers(self, rows: Sequence[dict[str, Any]]) -> None:
        if self._streams:
            self._write("\n")
        for row in rows:
            self.last = row
            if not self._streams:
                self._write(f"> {row['prompt']}\n")
                for side in SIDES:
                    if side in row:
                        self._write(f"{self._head(side)}{row[side]}\n")
        self._side = None

    def shown(self, turns: Iterable[list[Prompt]]) -> Iterator[list[Prompt]]:
        """Yield `turns`, each shown before its answer is written."""
        for turn in turns:
            if self._streams:
                self._write(f"> {asked(turn[0])}\n")
            yield turn

    def conversation(self, files: Files) -> Iterator[list[Prompt]]:
        """Yield the prompts that a person types, one at a time until the end of input, about `files`."""
        return conversation(self._typed(), self, files)

    def _typed(self) -> Iterator[str]:
        while True:
            self._write("> ")
            line = _from_stdin(sys.stdin.readline)
            if not line:
                self._write("\n")
                return
            yield line.rstrip("\n")

    def _head(self, side: str) -> str:
        return f"{SIDES[side]}: " if self._both else ""

    def _write(self, text: str) -> None:
        put(text, end="", file=self._out)
