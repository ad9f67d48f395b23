"""Reads a peer's file as a tree of plain values, and finds out which peer it belongs to."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.init.importing.script import notebook_code, read_script
from trainer.config.peers.table import PEERS, Peer, others
from trainer.config.reading import read_yaml
from trainer.errors import ConfigError, shown

COMPUTED = "(computed)"
PROGRAM = "(program)"
VARIABLES = "(variables)"
ROWS = "(rows)"
_PROGRAMS = {
    program: peer.tables.get("verbs", "").split()
    for peer in PEERS
    for program in peer.tables.get("programs", "").split()
}
"""Programs whose next word says what they do, and the words that train. None stands for all words."""
_REFERENCE = re.compile(r"\$\{([^{}]+)\}")
_MOST_REFERENCES = 20
# This ends a command of a shell script, if it is not within quotes.
_ENDS = re.compile(
    r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|\$\([^()]*\)|(?P<end>(?<!\S)\d>|&?[<>]|[|;&]+|\n(?!\s*-))""", re.DOTALL
)
_OPTION = re.compile(r"(?:^|\s)--[A-Za-z]")
# This is a line of a shell script that sets a variable to a plain value.
_ASSIGNMENT = re.compile(r"""\s*(?:export\s+)?([A-Za-z_]\w*)=("[^"$`]*"|'[^'$]*'|[^\s$;&|`()"']*)\s*(?:#.*)?""")
# This is a line that is a comment, and is none within the quotes of a value.
_COMMENT = re.compile(
    r"""^[ \t]*#.*\n?|(^[ \t]*(?:export\s+)?[A-Za-z_]\w*=(?:"(?:\\.|[^"\\])*"|'[^']*'))""", re.MULTILINE | re.ASCII
)
# These set a variable to an array, or to a text of options or of several lines. And this is where an array is used.
_OPTIONS = re.compile(
    r"""^[ \t]*(?:export\s+|declare\s+-a\s+)?([A-Za-z_]\w*)\+?="""
    r"""(?:\(((?:[^()]|\$\([^()]*\))*)\)|"([^"]*(?:--|\n)[^"]*)")""",
    re.MULTILINE,
)
_ARRAY = re.compile(r"""(["']?)\$\{([A-Za-z_]\w*)\[[@*]\]\}\1""")
_ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9_]*")
_SUM = re.compile(r"\$\(expr ([\d /*]+)\)|\$\(\(([\d /*]+)\)\)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^{}$]*))?\}|([A-Za-z_]\w*))")  # ${1:-x} is x where nothing is given
_COMMANDS_OUTPUT = re.compile(r"\$\([^()]*\)")
_UNSET = re.compile(r"\S*\$[A-Za-z_{(]\S*")
_NUMBER = re.compile(r"-\d|-\.\d")


def read_peer_file(path: Path) -> dict[str, Any]:
    """Return the keys of a file.

    It is YAML (which includes JSON), a command line with `--key value`, in a shell script or by itself, or a Python
    script or notebook of TRL's. `COMPUTED` lists the values of a script that are computed.

    Raises:
        ConfigError: the file cannot be read, or is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file {shown(str(path))} cannot be read: {error}.") from error
    if path.suffix in (".py", ".ipynb"):
        code = notebook_code(text, str(path)) if path.suffix == ".ipynb" else text
        keys, computed, rows = read_script(code, str(path))
        return {**keys, **({COMPUTED: computed} if computed else {}), **({ROWS: rows} if rows else {})}
    if (_OPTION.search(text) or _asked(text.split())) and not re.search(r"^[A-Za-z_]\w*:", text, re.MULTILINE):
        return _arguments(text, str(path))
    tree = read_yaml(text, str(path), repeated=True)
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path} holds no keys of a configuration, and no command line with --key value.")
    named = {str(key): value for key, value in tree.items()}
    return {key: _followed(value, named, ()) for key, value in named.items()}


def _arguments(text: str, path: str) -> dict[str, Any]:
    """Return the options of a command line: `--key value`, `--key=value`, `--flag` and `--list a b`.

    The launcher's own options come before the script.
    """
    text = _COMMENT.sub(lambda found: found[1] or "", text)
    text, variables = _with_values(text)
    words = _command(_COMMANDS_OUTPUT.sub("$(...)", _SUM.sub(_computed, text)), path)
    variables |= dict(word.split("=", 1) for word in words if re.match(r"[A-Z][A-Z0-9_]*=", word))
    found: dict[str, list[str]] = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = [value] if equals else []
        elif word.startswith("-") and not _NUMBER.match(word):
            key = ""
        elif key and not word.endswith(".py"):
            found[key].append(word)
    tree: dict[str, Any] = {}
    for name, values in found.items():
        if name.startswith("no_") and name != "no_cuda" and not values:
            tree[name[3:]] = False
            continue
        given: list[Any] = [_plain(value, path) for value in values]
        tree[name] = True if not given else given[0] if len(given) == 1 else given
    if isinstance(nodes := tree.pop("nnodes", None), int) and isinstance(tree.get("nproc_per_node"), int):
        tree["nproc_per_node"] *= nodes
    if named := {name: value for name, value in variables.items() if _ENVIRONMENT.fullmatch(name)}:
        tree[VARIABLES] = named
    script = next((Path(word).stem for word in words if word.endswith(".py")), None)
    if asked := _asked(words):
        tree |= {"script": asked[1], PROGRAM: asked[0]}
    elif script:
        tree["script"] = script
    return {**_named_keys(tree, words, Path(path)), **tree}


def _with_values(text: str) -> tuple[str, dict[str, str]]:
    """Return a shell script with the values of the variables that it sets, and these values by the variables' names."""
    variables: dict[str, str] = {}
    for name, words, quoted in _OPTIONS.findall(text):
        bare = (re.sub(r"(^|\s)#.*|\\$", "", line) for line in (words or quoted).splitlines())
        added = " ".join(bare) if words or _OPTION.search(quoted) else quoted
        variables[name] = f"{variables.get(name, '')} {added}".lstrip()
    text = _ARRAY.sub(lambda found: variables.get(found[2], found[0]), _OPTIONS.sub("", text))
    text = _VARIABLE.sub(lambda found: variables.get(found[3], found[0]), text)
    lines: list[str] = []
    for line in text.splitlines():
        lines.append(_VARIABLE.sub(lambda found: variables.get(found[1] or found[3]) or found[2] or found[0], line))
        if found := _ASSIGNMENT.fullmatch(lines[-1]):
            variables[found[1]] = found[2].strip("\"'")
    return "\n".join(lines), variables


def is_unset(value: Any) -> bool:
    """Return whether a word of a value is a variable that its file does not set, or the output of a command."""
    return any(
        isinstance(word, str) and _UNSET.fullmatch(word) for word in (value if isinstance(value, list) else [value])
    )


def _asked(words: Sequence[str]) -> tuple[str, str] | None:
    """Return a known program of a command and the word behind it, which says what the program does."""
    return next(
        ((word, verb) for word, verb in pairwise(words) if word in _PROGRAMS and not verb.startswith("-")), None
    )


def _named_keys(tree: dict[str, Any], words: Sequence[str], path: Path) -> dict[str, Any]:
    """Return the keys of the file that a command line names by --config, or behind its program's verb.

    Raises:
        ConfigError: the file is not here.
    """
    behind = words[words.index(tree["script"]) + 1 :][:1] if PROGRAM in tree else []
    named = [word for word in [*behind, tree.pop("config", None)] if str(word).endswith((".yaml", ".yml", ".json"))]
    if not named:
        return {}
    places = (Path(named[-1]), *(above / named[-1] for above in path.absolute().parents))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"{path} has its keys in {named[-1]}, which is not here. Give that file, or put it there.")
    return read_peer_file(found)


def _computed(found: re.Match[str]) -> str:
    """Return the value of `$(expr 32 / 4 / 2)`, in which `expr` divides and multiplies from left to right."""
    first, *rest = re.findall(r"[*/]|\d+", found[1] or found[2])
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = value * int(number) if sign == "*" else value // max(1, int(number))
    return str(value)


def _trains(command: str) -> bool:
    """Return whether a command may train. The word after a known program says what it does."""
    asked = _asked(command.split())
    return asked is None or not _PROGRAMS[asked[0]] or asked[1] in _PROGRAMS[asked[0]]


def _plain(value: str, path: str) -> Any:
    """Return the value of a word: a number, a list or a switch as in YAML, and a text if it is no YAML."""
    try:
        found = read_yaml(value, path) if value.strip() else value
        return value if isinstance(found, str) else found  # a text has no comments
    except ConfigError:
        return value


def _command(text: str, path: str) -> list[str]:
    """Return the words of the one command line in `text` that has options. Quoted text does not end it."""
    joined, commands, begin = re.sub(r"\\[ \t]*(\n|$)", " ", text), list[str](), 0
    for found in _ENDS.finditer(joined):
        if found["end"]:
            commands.append(joined[begin : found.start()])
            begin = found.end()
    commands.append(joined[begin:])
    commands = [command for command in commands if _trains(command)] or commands
    counts = [len(_OPTION.findall(command)) + bool(_asked(command.split())) for command in commands]
    longest = [command for command, count in zip(commands, counts, strict=True) if count and 2 * count >= max(counts)]
    if len(longest) > 1:
        raise ConfigError(
            f"{path} holds {len(longest)} command lines with --key value, each of which may be a training. Give a file"
            " with one of them."
        )
    try:
        return shlex.split(longest[0]) if longest else []
    except ValueError as error:
        raise ConfigError(f"{path} is no command line: {error}.") from error


def _followed(value: Any, root: dict[str, Any], seen: Sequence[str]) -> Any:
    """Return `value` with references such as `${output_dir}/logs` replaced, as OmegaConf does."""
    if isinstance(value, dict):
        return {str(key): _followed(item, root, seen) for key, item in value.items()}
    if isinstance(value, list):
        return [_followed(item, root, seen) for item in value]
    if not isinstance(value, str) or len(seen) > _MOST_REFERENCES:
        return value
    if whole := _REFERENCE.fullmatch(value.strip()):
        return _target(whole[1], root, seen, value)
    return _REFERENCE.sub(lambda found: str(_target(found[1], root, seen, found[0])), value)


def _target(name: str, root: dict[str, Any], seen: Sequence[str], otherwise: str) -> Any:
    if name.startswith(("env:", "oc.env:")):
        variable, _, default = name.partition(":")[2].partition(",")
        return os.environ.get(variable, default or otherwise)
    node: Any = root
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return otherwise if node is None or name in seen else _followed(node, root, [*seen, name])


def flat_keys(tree: dict[str, Any], peer: Peer, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of `tree` with its value, dotted as far as the peer's table lists keys inside."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        general = re.sub(r"\[\d+\]", "[]", key)
        if isinstance(value, dict) and value and peer.opens(general):
            yield from flat_keys({str(inner): item for inner, item in value.items()}, peer, f"{key}.")
        elif isinstance(value, list) and any(row.startswith(f"{general}[].") for row in peer.rows):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from flat_keys({str(inner): part for inner, part in item.items()}, peer, f"{key}[{index}].")
                else:
                    yield f"{key}[{index}]", item
        else:
            yield key, value


def refuse_others(tree: dict[str, Any], program: str | None, path: str) -> None:
    """Refuse a file of a tool that is recognised but not read: some of its keys have the same names as other tools'.

    Raises:
        ConfigError: it is of such a tool.
    """
    for name, signs in others().items():
        lines = [line.split() for line in signs["keys"]]
        if program in signs.get("programs", "").split() or any(all(_has(tree, key) for key in keys) for keys in lines):
            raise ConfigError(
                f"{path} is a file of {name}, which `capstan import` does not read. Write a configuration by `capstan"
                " init`; docs/migration.md says what the settings of other tools are called here. Nothing was written."
            )


def _has(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def detect(tree: dict[str, Any], peers: Sequence[Peer], path: str) -> Peer:
    """Return the peer whose marks the file has, or else the one that knows most of the keys.

    Raises:
        ConfigError: no peer knows a key, or two know as many.
    """
    if {"run", "model", "data", "train"} <= set(tree):
        raise ConfigError(f"{path} is a configuration of Capstan already: capstan plan {path} says what it needs.")
    lines = [(len(line.split()), line.split(), peer) for peer in peers for line in peer.tables.get("marks", ())]
    marked = [(size, peer) for size, line, peer in lines if all(_has(tree, key) for key in line)]
    if marked:
        return max(marked, key=lambda found: found[0])[1]
    keys = list(map(str, tree))
    counts = [(sum(peer.row(key) is not None or peer.opens(key) for key in keys), peer) for peer in peers]
    best = max(count for count, _ in counts)
    found = [peer for count, peer in counts if count == best]
    found = [peer for peer in found if peer.takes not in {other.name for other in found}]
    names = ", ".join(peer.name for peer in peers)
    if not best:
        raise ConfigError(f"{path}: none of its keys belongs to {names}. Say which tool it is for: --from NAME.")
    if len(found) > 1:
        same = " and ".join(peer.name for peer in found)
        raise ConfigError(f"{path}: its keys fit {same}. Say which tool it is for: --from NAME.")
    return found[0]
