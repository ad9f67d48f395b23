"""`capstan generate`: it takes prompts from a file, a pipe or a person, and shows the answers as they are written."""

import os
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TextIO

from launcher.evaluate.evaluating import SIDES
from launcher.evaluate.ranks import for_server, run_ranks
from launcher.start.group import is_rank, is_silent_rank
from launcher.start.local_ranks import count_ranks
from launcher.view.terminal import put
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
    images: Sequence[str],
    log: Callable[[str], None],
    *,
    shows: bool,
) -> dict[str, Any]:
    """Answer the prompts in the file at the path `prompts`, of a pipe, or of a chat on a terminal, with the pictures in
    the files `images`. With `shows` the answers are shown as they come. Returns what `generate_answers` does.

    Raises:
        ConfigError: there is no prompt, or one of the files cannot be used.
        CapstanError: as `generate_answers`.
    """
    chats = prompts is None and shows and not is_rank() and sys.stdin.isatty()
    pictures = read_images(images, config, folder.uri)
    given = [] if chats or is_silent_rank() else given_prompts(config, prompts)
    if not (chats or given or is_silent_rank()):
        raise ConfigError(
            "there is no prompt: give --prompts FILE, set eval.prompts, or write lines to standard input."
        )
    turns = in_turns(with_images(given, pictures), config)
    if not shows:
        return generate_answers(ask, folder, config, turns, log, None)
    screen = Screen(sys.stdout, both=ask.base, streams=chats or all(len(turn) == 1 for turn in turns))
    coming = screen.conversation(pictures) if chats else screen.shown(turns)
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
        with waiting_for_a_person():
            lines = sys.stdin.read().split("\n")
        typed: list[Prompt] = [{"prompt": line} for line in lines if line.strip()]
        if typed or not kept:
            return typed
    return read_prompts(kept) if kept else read_prompts(path or "", "--prompts")


def read_images(paths: Sequence[str], config: Config, run: str) -> list[str]:
    """Return the pictures in the files at `paths` as data URIs, which travel with the prompts.

    Raises `ConfigError` if one is no picture or cannot be read, or the run in the folder `run` was trained on text
    alone."""
    if paths and not ROW_KINDS[config.data.kind].sees:
        raise ConfigError(
            f"--image: {run} was trained on text (data.format: {config.data.format}), so its prompts have no pictures."
            " Leave it out, or train with data.format: pictures."
        )
    if not paths:
        return []
    check_packages()
    from trainer.base.find.media.still import STILL

    found = list[str]()
    for path in paths:
        file = local_path(path, "--image")
        try:
            check_file(file)
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"--image: {shown(path)} cannot be read: {error.strerror or error}.") from error
        try:
            STILL.check(content)
        except DataError as error:
            raise ConfigError(f"--image: {shown(path)} {error}.") from error
        found.append(f"data:application/octet-stream;base64,{b64encode(content).decode()}")
    return found


def with_images(prompts: Sequence[Prompt], images: list[str]) -> Sequence[Prompt]:
    """Return the prompts, each with `images`. Raises `ConfigError` if one has pictures of its own."""
    if images and any(map(has_pictures, prompts)):
        raise ConfigError("--image: a prompt of the file has pictures of its own. Give them in one of both places.")
    return [{**prompt, "images": images} for prompt in prompts] if images else prompts


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


def conversation(lines: Iterable[str], hears: Hears, images: list[str] | None = None) -> Iterator[list[Prompt]]:
    """Yield what is said as prompts, one at a time, until there are no more lines.

    If `hears.chats`, they are one conversation, which includes the answers so far. An empty line begins a new one. Each
    conversation begins with the pictures `images`.
    """
    said = list[dict[str, str]]()
    for line in lines:
        if not line.strip():
            said.clear()
            continue
        said.append({"role": "user", "content": line})
        yield list(with_images([{"messages": list(said)} if hears.chats else {"prompt": line}], images or []))
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

    def conversation(self, images: list[str]) -> Iterator[list[Prompt]]:
        """Yield the prompts that a person types, one at a time until the end of input, about the pictures `images`."""
        return conversation(self._typed(), self, images)

    def _typed(self) -> Iterator[str]:
        while True:
            self._write("> ")
            with waiting_for_a_person():
                line = sys.stdin.readline()
            if not line:
                self._write("\n")
                return
            yield line.rstrip("\n")

    def _head(self, side: str) -> str:
        return f"{SIDES[side]}: " if self._both else ""

    def _write(self, text: str) -> None:
        put(text, end="", file=self._out)
