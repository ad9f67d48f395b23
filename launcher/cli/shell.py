"""The shell's side of the commands: the candidates of Tab, and a short help of options."""

from collections.abc import Iterator, Mapping
from textwrap import shorten
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import typer
from typer.completion import completion_init  # pyright: ignore[reportPrivateImportUsage]
from typer.core import TyperCommand, TyperGroup, TyperOption

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Choices = list[tuple[str, str]]

_HELP_WIDTH = 60  # a candidate and its help are one line


class Verb(TyperCommand):
    """A command whose help shows no type for flags, because a flag is either there or not.

    An option that the command does not have is refused with what to write `instead`.
    """

    instead: Mapping[str, str] = MappingProxyType({})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = args[: args.index("--")] if "--" in args else args
        for name in (argument.partition("=")[0] for argument in given):
            if name in self.instead:
                raise ConfigError(f"{name}: there is no such option. Write {self.instead[name]}.")
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        return [_untyped(parameter) for parameter in super().get_params(ctx)]


class Verbs(TyperGroup):
    """The same for a group."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [_untyped(parameter) for parameter in super().get_params(ctx)]


def _untyped(parameter: Any) -> Any:
    if isinstance(parameter, TyperOption) and parameter.is_flag:
        parameter.metavar = ""
    if parameter.help:  # help is markup, in which [q8_0] would be a style
        parameter.help = parameter.help.replace(r"\[", "[").replace("[", r"\[")
    return parameter


def answer_shells() -> None:
    """Let Typer answer the scripts' requests.

    Otherwise it would do so beside options of its own, whose script for bash does not know `=`.
    """
    completion_init()


def complete_setting(incomplete: str) -> Choices:
    """Complete sections first, then the settings in them, then the values of settings that have few."""
    from trainer.config import fields

    known = dict(fields())
    name, equals, value = incomplete.partition("=")
    if equals:
        values = _values(known[name]) if name in known else ()
        return [(f"{name}={found}", "") for found in values if found.startswith(value)]
    if "." not in incomplete:
        sections = dict.fromkeys(path.partition(".")[0] for path in known)
        return [(f"{section}.", "") for section in sections if section.startswith(incomplete)]
    return [
        (f"{path}=", shorten(field.description or "", _HELP_WIDTH, placeholder=" ..."))
        for path, field in known.items()
        if path.startswith(incomplete)
    ]


def _values(setting: "FieldInfo") -> Iterator[str]:
    from trainer.config.registry import one_of

    yield from _written_in(setting.annotation)
    for kinds in one_of(setting):
        yield from kinds.about()


def _written_in(annotation: Any) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    for inside in get_args(annotation):
        if isinstance(inside, str):
            yield inside
        else:
            yield from _written_in(inside)


def complete_format(incomplete: str) -> Choices:
    """Complete the formats of exports, each a file of trainer/export/formats."""
    from trainer.config.registry import kinds

    names = sorted(kinds("trainer.export.formats", "FORMATS"))
    return [(name, "") for name in names if name.startswith(incomplete)]


def complete_run(ctx: typer.Context, incomplete: str) -> Choices:
    """Complete the runs of a store that is a folder. A bucket may take longer than a person waits at a prompt."""
    from launcher.view.runs import runs
    from trainer.errors import CapstanError
    from trainer.store.store import open_store

    store = str(ctx.params.get("store") or "runs")
    try:
        names = [] if "://" in store else runs(open_store(store))
    except CapstanError:
        return []
    return [(name, "") for name in names if name.startswith(incomplete)]


def complete_gpu(incomplete: str) -> Choices:
    from trainer.plan.gpus import names

    return [(name, "") for name in names() if name.lower().startswith(incomplete.lower())]


def complete_goal(incomplete: str) -> Choices:
    from launcher.init.initial import GOALS

    return _begun(incomplete, {name: goal.about for name, goal in GOALS.items()})


def complete_recipe(incomplete: str) -> Choices:
    from launcher.init.recipes import recipe_rows

    return _begun(incomplete, {row["name"]: row["goal"] for row in recipe_rows()})


def complete_machine(incomplete: str) -> Choices:
    from launcher.init.initial import KINDS

    return _begun(incomplete, dict.fromkeys(KINDS, ""))


def complete_peer(incomplete: str) -> Choices:
    from trainer.config.peers.table import PEERS

    return _begun(incomplete, {peer.name: peer.title for peer in PEERS})


def _begun(incomplete: str, about: Mapping[str, str]) -> Choices:
    return [(name, what) for name, what in about.items() if name.startswith(incomplete)]
