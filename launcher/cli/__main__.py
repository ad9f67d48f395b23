"""The `capstan` command: its verbs, in the order that --help shows them.

Nothing heavy is imported here: a verb imports what it needs when it runs.
"""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import TextIOWrapper
from itertools import takewhile
from typing import Annotated

import typer

from launcher.cli.command import commands, groups, log
from launcher.cli.shell import Verb, Verbs, answer_shells
from launcher.start.group import is_silent_rank
from trainer.errors import CapstanError, StorageError
from trainer.processes.helper_thread import never_silent

answer_shells()
app = typer.Typer(
    cls=Verbs,
    help=(
        "Fine-tune language models that are too large for one machine. --debug anywhere adds the traceback of an error."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"capstan {version('capstan-llm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Fine-tune language models that are too large for one machine. --debug anywhere adds the traceback of an error."""


def _add_verbs() -> None:
    about, made = groups(), dict[str, typer.Typer]()
    for name, command in commands():
        group, _, verb = name.rpartition(" ")
        if group and group not in made:
            made[group] = typer.Typer(cls=Verbs, help=about.get(group), no_args_is_help=True)
            app.add_typer(made[group], name=group)
        epilog = f"Example: capstan {command.example}".replace("[", r"\[")
        kind = type("Verb", (Verb,), {"instead": command.instead})
        made.get(group, app).command(verb, cls=kind, epilog=epilog)(command.function)


_add_verbs()


_FOLLOW = {"board", "status", "logs", "completion", "config"}
"""Verbs that print what others do, as it comes, or answer a program."""


def _spoken(arguments: list[str]) -> AbstractContextManager[None]:
    """Return a context in which the verb says what it does whenever it is silent for some seconds."""
    words = list(takewhile(lambda word: not word.startswith("-"), arguments))[:2]
    if not words or words[0] in _FOLLOW or is_silent_rank():
        return nullcontext()
    return never_silent(" ".join(words if words[0] in groups() else words[:1]))


def _open_streams() -> None:
    """Give a stream that the shell has closed (`2>&-`) to nobody. It is None, for which print takes stdout, and the
    first file that is opened would get its number.

    Standard output escapes characters that its encoding lacks, as standard error does. Input is UTF-8 in any locale.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  # open as long as the process
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _with_room() -> Iterator[None]:
    """Raises `StorageError` if the disk has no room for what the verb writes, also for what it has printed last."""
    try:
        try:
            yield
        finally:
            with suppress(BrokenPipeError):
                sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise StorageError(f"the command cannot write all: {error}. Free some space, or write elsewhere.") from error


def main() -> None:
    """The entry point. A user's mistake gives one sentence and its exit code; `--debug` adds the traceback."""
    _open_streams()
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with _spoken(arguments), _with_room():
            app(args=arguments)
    except CapstanError as error:
        if debug:
            traceback.print_exc()
        log(f"capstan: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
