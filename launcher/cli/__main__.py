"""The `capstan` command: its verbs, in the order that --help shows them.

Nothing heavy is imported here: a verb imports what it needs when it runs.
"""

import sys
import traceback
from typing import Annotated

import typer

from launcher.cli.command import commands, groups, log
from launcher.cli.shell import Verb, Verbs, answer_shells
from trainer.errors import CapstanError

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


def main() -> None:
    """The entry point. A user's mistake gives one sentence and its exit code; `--debug` adds the traceback."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except CapstanError as error:
        if debug:
            traceback.print_exc()
        log(f"capstan: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
