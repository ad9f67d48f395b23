"""The documentation as the tests read it: every fenced block of every page, and every command in it, as the real parser
sees it.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.main import get_command

from launcher.cli.__main__ import app

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# A block of text is output, or a drawing. `yaml of=axolotl` is a file of another program.
LANGUAGES = ("sh", "yaml", "python", "json", "text")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)\n(?P<text>(?:.*\n)*?)(?P=indent)```$", re.MULTILINE)
_INLINE = re.compile(r"`(capstan [^`]+)`")
_BETWEEN = {"|", "||", "&&", "&", ";", "(", ")"}
_WORDS_OF_BASH = {"do", "done", "for", "if", "then", "fi", "else", "while"}


@dataclass(frozen=True)
class Block:
    """A fenced block: `place` is its page and line, `language` the first word behind the fence, `of` the program whose
    file it is.
    """

    place: str
    language: str
    of: str | None
    text: str


def blocks(*languages: str) -> list[Block]:
    """Every block of the pages in one of `languages`; without any, all blocks."""
    return [block for page in PAGES for block in blocks_of(page) if not languages or block.language in languages]


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        language, _, of = match["info"].strip().partition(" of=")
        place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
        yield Block(place, language, of or None, match["text"])


def commands(text: str) -> Iterator[list[str]]:
    """The words of every simple command of a script, without comments and without the words that bash itself reads."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _BETWEEN:
                command.append(word)
                continue
            while command and (command[0] in _WORDS_OF_BASH - {"for"} or re.fullmatch(r"\w+=.*", command[0])):
                del command[0]
            if command:
                yield command
            command = []


def of_capstan(command: Sequence[str]) -> list[str] | None:
    """The arguments of `capstan` in a command, also behind torchrun, srun or salloc; None where it is another
    program's.
    """
    if command[0] in ("torchrun", "srun", "salloc") and "capstan" in command:
        command = command[command.index("capstan") :]
    return list(command[1:]) if command[0].removeprefix(".venv/bin/") == "capstan" else None


def inline_commands() -> Iterator[tuple[str, list[str]]]:
    """Every `capstan ...` in the running text of pages and examples, with its place: verbs and options, and words in
    capitals.
    """
    for page in [*PAGES, *sorted((ROOT / "examples").rglob("*.yaml"))]:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for match in _INLINE.finditer(text):
            yield str(page.relative_to(ROOT)), match[1].replace("\n", " ").split()[1:]


@dataclass(frozen=True)
class Parsed:
    """A command line as the real parser takes it apart: the words of its verb, and its parameters by their names in
    code.
    """

    verb: tuple[str, ...]
    command: Any
    values: dict[str, Any]


def parse(arguments: Sequence[str]) -> Parsed:
    """Raises where the verb, an option or its value is wrong, as the command does."""
    verb, command = verb_of(arguments)
    context = command.make_context(" ".join(verb), list(arguments[len(verb) :]))
    return Parsed(verb, command, context.params)


def verb_of(words: Sequence[str]) -> tuple[tuple[str, ...], Any]:
    """The words of the verb that `words` begin with, and its command; raises `ValueError` where there is no such
    verb.
    """
    command: Any = get_command(app)
    verb: list[str] = []
    while hasattr(command, "commands") and len(verb) < len(words):
        name = words[len(verb)]
        if name not in command.commands:
            raise ValueError(f"there is no verb {name!r}")
        verb.append(name)
        command = command.commands[name]
    return tuple(verb), command
