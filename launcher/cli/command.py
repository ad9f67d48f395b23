"""A verb of `capstan`, how verbs are found, and the parts that they share: options, finding a run, answering.

A file of launcher/cli/verbs names its verbs in `VERBS`, such as "train", or "data build" for a verb of a group. Its
`GROUPS` describes groups. A verb imports everything beyond its options when it runs, because --help and completion load
all of these files.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import typer

from launcher.cli import verbs
from launcher.cli.shell import complete_format, complete_run, complete_setting
from launcher.start.group import is_silent_rank
from launcher.view.terminal import put
from trainer.errors import ConfigError, few


class Command(NamedTuple):
    """The function of a verb: its docstring is the help, and its arguments are the options.

    The other fields are the words after `capstan` of the example that ends the help, the verb's place in --help, and
    what to write `instead` of options that the verb does not have but somebody may look for.
    """

    function: Callable[..., Any]
    example: str
    place: int = 200
    instead: Mapping[str, str] = MappingProxyType({})


def commands() -> list[tuple[str, Command]]:
    """Return every verb, in the order of --help."""
    return sorted(_declared("VERBS").items(), key=lambda item: (item[1].place, item[0]))


def groups() -> dict[str, str]:
    """Return the help of each group of verbs."""
    return _declared("GROUPS")


def _declared(table: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in iter_modules(verbs.__path__, f"{verbs.__name__}."):
        found |= getattr(import_module(module.name), table, {})
    return found


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value ...]",
        help="Settings to change, such as train.steps=20.",
        autocompletion=complete_setting,
    ),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name in the store, or its full URI.", autocompletion=complete_run)
]
StoreOption = Annotated[str, typer.Option("--store", envvar="CAPSTAN_STORE", help="The store that RUN is in.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; logs go to stderr.")]
TakeOver = Annotated[
    bool,
    typer.Option("--take-over", help=("Take the run over even if it is alive. What it has not committed is lost.")),
]
TrustRun = Annotated[
    bool,
    typer.Option(
        "--trust-run",
        envvar="CAPSTAN_TRUST_RUN",
        help=(
            "Read the files and run the code that the run's config.yaml names, although you have not started the run:"
            " docs/credentials.md."
        ),
    ),
]
StepOption = Annotated[
    int | None, typer.Option("--step", help="The checkpoint of this step. Default: the newest whole one.")
]
BestOption = Annotated[bool, typer.Option("--best", help="The checkpoint with the lowest evaluation loss.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")]

Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
FormatOptions = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Options of the format, such as 'types=[f16,q8_0]' for gguf."),
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="peft (the adapter), or another of those in docs/export.md.",
        autocompletion=complete_format,
    ),
]
MERGED = {"--merge": "--format merged", "--merged": "--format merged"}
"""Options that people look for, and what they write instead."""

# No machine has as many; a plan for them would say nothing.
_MOST_GPUS = 2**17


def finite(value: float | None) -> float | None:
    """Refuse `nan` and `inf` for options that are numbers: click takes `nan` and, without a bound, `inf`."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to count with.")
    return value


def countable(gpus: int | None) -> int | None:
    """Return `--gpus`, unless it is more than any machine has."""
    if gpus is not None and gpus > _MOST_GPUS:
        raise ConfigError(f"--gpus: {gpus:,} is more than any cluster has. Give at most {_MOST_GPUS:,}. Example: 8.")
    return gpus


def log(text: str) -> None:
    put(text, file=sys.stderr)


def say(text: str) -> None:
    """Print the text like `log`, but on one rank alone if torchrun or srun has started several."""
    if not is_silent_rank():
        log(text)


@runtime_checkable
class WithJson(Protocol):
    """A result whose JSON is not just its fields."""

    def to_json(self) -> dict[str, Any]: ...


def emit(value: Any, as_json: bool, show: Callable[[Any], Any]) -> None:
    """Print one JSON object on stdout, or what `show` makes of the value.

    Text is printed as it is, and rich prints anything else.
    """
    if as_json:
        print(json.dumps(value.to_json() if isinstance(value, WithJson) else asdict(value)))
    elif isinstance(shown := show(value), str):
        put(shown)
    else:
        from launcher.view.console import Terminal

        Terminal().print(shown)


def open_run(run: str, store: str, *, prepared: bool = False, sweeps: bool = False) -> Any:
    """Return the run's folder. Raises `ConfigError`, naming the existing runs, if it does not exist.

    With `prepared` a run that a start prepares counts too, and with `sweeps` a sweep.
    """
    from launcher.view.runs import find_run
    from launcher.view.sweep import is_sweep, read_plan

    folder = find_run(run, store, prepared=prepared)
    if not sweeps and is_sweep(folder):
        trials = [trial.run for trial in read_plan(folder).trials]
        raise ConfigError(f"{folder.uri} is a sweep. Its trials are runs: name one of them ({few(trials)}).")
    return folder
