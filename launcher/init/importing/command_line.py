"""Reads the command of a shell script that trains: its options, and the file of keys that it names.

Nothing of the script is run. Variables have the values that the script gives them. A value that another command makes,
or one of several branches, is not known.
"""

import ast
import operator
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.config.peers.table import PEERS
from trainer.config.reading import read_yaml
from trainer.errors import ConfigError

COMPUTED = "(computed)"
PROGRAM = "(program)"
VARIABLES = "(variables)"
LAUNCHER = "(launcher)"
ALONE = "(alone)"
"""The names of what `read_command` tells beside the keys."""
_PROGRAMS = {
    program: peer.tables.get("verbs", "").split()
    for peer in PEERS
    for program in peer.tables.get("programs", "").split()
}
"""Programs whose next word says what they do, and the words that train. None stands for all words."""
_ENTRIES: Mapping[str, list[str]] = {
    entry: command.split() for peer in PEERS for entry, command in peer.tables.get("entries", {}).items()
}
"""Modules of Python, dotted, that do what a program's command does."""
_LAUNCHERS = re.compile(r"(torch\.distributed|accelerate\.commands|deepspeed)\..*|pip|venv")
# This ends a command of a shell script, if it is not within quotes.
_ENDS = re.compile(
    r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|\$\([^()]*\)|(?P<end>(?<!\S)\d>|&?[<>]|[|;&]+|\n(?!\s*-))""", re.DOTALL
)
_OPTION = re.compile(r"(?:^|\s)--[A-Za-z]")
_VALUE = r"""(?:"[^"$`]*"|'[^'$]*'|[^\s$;&|`()"']*)"""
# This is a line of a shell script that sets variables to plain values.
_ASSIGNMENTS = re.compile(
    rf"\s*(?:export\s+)?[A-Za-z_]\w*={_VALUE}(?:\s*[; \t]\s*(?:export\s+)?[A-Za-z_]\w*={_VALUE})*\s*;?\s*(?:#.*)?"
)
_ASSIGNMENT = re.compile(rf"([A-Za-z_]\w*)=({_VALUE})")
# These begin commands that train nothing: they set a variable, or print.
_IDLE = re.compile(r"""\s*(?:(?:export\s+|local\s+)?[A-Za-z_]\w*=(?:"[^"]*"|'[^']*'|\S*)\s*$|(?:echo|printf)\b)""")
# This is a line that is a comment, and is none within the quotes of a value.
_COMMENT = re.compile(
    r"""^[ \t]*#.*\n?|(^[ \t]*(?:export\s+)?[A-Za-z_]\w*=(?:"(?:\\.|[^"\\])*"|'[^']*'))""", re.MULTILINE | re.ASCII
)
# These set a variable to an array, or to a text of options or of several lines. And this is where an array is used.
_OPTIONS = re.compile(
    r"""^[ \t]*(?:export\s+|declare\s+-a\s+|local\s+)?([A-Za-z_]\w*)\+?="""
    r"""(?:\(((?:[^()]|\$\([^()]*\))*)\)|"([^"]*(?:--|\n)[^"]*)")""",
    re.MULTILINE,
)
_ARRAY = re.compile(r"""(["']?)\$\{([A-Za-z_]\w*)\[[@*]\]\}\1""")
# These are the words around the branches of a script, and the assignments.
_BRANCHES = re.compile(
    r"^[ \t]*(?:(?P<begin>if|case)\b|(?P<end>fi|esac)\b|(?:export[ \t]+)?(?P<name>[A-Za-z_]\w*)\+?=(?P<value>.*))",
    re.MULTILINE,
)
# This writes the lines behind it, up to a word, into a file.
_HEREDOC = re.compile(
    r"""^([^\n]*?)<<-?[ \t]*(['"]?)([A-Za-z_]\w*)\2([^\n]*)\n(.*?)^[ \t]*\3[ \t]*$""", re.MULTILINE | re.DOTALL
)
_WRITTEN = re.compile(r"""(?:>>?|\btee(?:[ \t]+-a)?)[ \t]*["']?([^\s"'<>|;&]+)""")
_ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9_]*")
_SUM = re.compile(r"\$\(expr ([\w${} /*+-]+)\)|\$\(\(((?:[^()]|\([^()]*\))*)\)\)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^{}$]*))?\}|([A-Za-z_]\w*))")  # ${1:-x} is x where nothing is given
_COMMANDS_OUTPUT, _OUTPUT = re.compile(r"\$\([^()]*\)"), "\N{REPLACEMENT CHARACTER}"
_UNSET = re.compile(r"\S*\$[A-Za-z0-9_{(]\S*")
_GIVEN = re.compile(r"\$(?:[@*]|\{[@*][^}]*\})")  # what the script itself is given
_COMMAND = re.compile(r"-[a-z]*c")  # a shell's option whose value is a command: -c, -lc, -exc
_SET_APART = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*=.*", re.DOTALL)
_NUMBER = re.compile(r"-\d|-\.\d")
_FILE = (".yaml", ".yml", ".json")


def computed(what: str) -> str:
    """Return the sentence that asks for a value that only the running script knows."""
    return f"{what} is computed by the script, which is not run. Give the value."


def is_command(text: str, path: Path) -> bool:
    """Return whether a file holds a command line with options, and is no YAML."""
    if path.suffix in (".sh", ".bash", ".slurm", ".sbatch") or text.startswith("#!"):
        return True
    return bool(_OPTION.search(text) or _asked(_entered(text.split()))) and not re.search(
        r"^[A-Za-z_]\w*:", text, re.MULTILINE
    )


def is_unset(value: Any) -> bool:
    """Return whether a word of a value is a variable that its file does not set, or the output of a command."""
    return any(
        isinstance(word, str) and _UNSET.fullmatch(word) for word in (value if isinstance(value, list) else [value])
    )


def read_command(text: str, path: str, keys_in: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Return the options of a command line: `--key value`, `--key=value`, `--flag`, `--list a b` and `key=value`.

    The launcher's own options come before the script or the program; `LAUNCHER` lists them. `keys_in` returns the keys
    of a file, given its text and name. `ALONE` says that a Python script is run without such a file.

    Raises:
        ConfigError: the script has no such command, or several, or the file that the command names is not here.
    """
    text, variables, left = _with_values(_COMMENT.sub(lambda found: found[1] or "", text))
    text, written = _written(text)
    while (inner := _COMMANDS_OUTPUT.sub(_OUTPUT, text)) != text:
        text = inner
    words = [word.replace(_OUTPUT, "$(...)") for word in _entered(_command(text, path))]
    variables |= dict(word.split("=", 1) for word in words if re.match(r"[A-Z][A-Z0-9_]*=", word))
    asked = _asked(words)
    begin, script = (words.index(asked[0], 0) + 1, asked[1]) if asked else _script(words)
    found, launcher = dict[str, list[str]](), list[str]()
    key = ""
    for index, word in enumerate(words):
        if begin - bool(asked) <= index <= begin:
            key = ""  # the launcher's options end here
        elif _GIVEN.fullmatch(word):
            continue
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = [value] if equals else []
            launcher += [key] if index < begin else []
        elif word.startswith("-") and not _NUMBER.match(word):
            key = ""
        elif (found[key] if key else begin < index) and re.fullmatch(r"\$\{?\w+\}?", word):
            left.append(f"what {word} adds")
        elif key:
            found[key].append(word)
        elif begin < index and _SET_APART.fullmatch(word):
            name, _, value = word.partition("=")
            found[name] = [value]
    found.pop("", None)
    tree: dict[str, Any] = {}
    for name, values in found.items():
        if name.startswith("no_") and name != "no_cuda" and not values:
            tree[name[3:]] = False
            continue
        given: list[Any] = [_plain(value, path) for value in values]
        tree[name] = True if not given else given[0] if len(given) == 1 else given
    if isinstance(nodes := tree.pop("nnodes", None), int) and isinstance(tree.get("nproc_per_node"), int):
        tree["nproc_per_node"] *= nodes
    behind = words[begin + 1 : begin + 2] if script else []
    if unknown := next(filter(is_unset, [*(behind if asked else []), tree.get("config")]), None):
        raise ConfigError(f"{path} has its keys in {unknown}, and does not say which file that is. Give that file.")
    named = _file(tree, behind)
    more = keys_in(_text_of(named, written, path), named) if named else {}
    if named_variables := {name: value for name, value in variables.items() if _ENVIRONMENT.fullmatch(name)}:
        tree[VARIABLES] = named_variables
    if script:
        tree["script"] = script
        tree[LAUNCHER] = [name for name in launcher if name in tree]
    if asked:
        tree[PROGRAM] = asked[0]
    elif script and not named:
        tree[ALONE] = True
    if left:
        tree[COMPUTED] = list(map(computed, left))
    return {**more, **tree}


def _script(words: Sequence[str]) -> tuple[int, str]:
    """Return the place and the name of the script or module that a command runs; (-1, "") if there is none."""
    for index, word in enumerate(words):
        if word.endswith(".py"):
            return index, Path(word).stem
    modules = (index + 1 for index, word in enumerate(words[:-1]) if word == "-m")
    place = next((index for index in modules if not _LAUNCHERS.fullmatch(words[index])), -1)
    return place, words[place].rpartition(".")[2] if place >= 0 else ""


def _entered(words: Sequence[str]) -> list[str]:
    """Return the words with a program and its verb in the place of a module or script that is the same."""
    found = list[str]()
    for word in words:
        dotted = f".{word.removesuffix('.py').replace('/', '.')}"
        command = next((command for entry, command in _ENTRIES.items() if dotted.endswith(f".{entry}")), None)
        if command and found and found[-1] == "-m":
            found.pop()
        found += command or [word]
    return found


def _with_values(text: str) -> tuple[str, dict[str, str], list[str]]:
    """Return a shell script with the values of the variables that it sets, and these values by the variables' names.

    The third value says what one of several branches adds.
    """
    variables: dict[str, str] = {}
    left: list[str] = []
    branches, open_names = _in_branches(text)
    for found in _OPTIONS.finditer(text):
        name, words, quoted = found.groups()
        if name in open_names:
            continue
        if name in variables and any(begin < found.start() < end for begin, end in branches):
            left.append(f"what {' '.join(found[0].split())[:60]} adds")
            continue
        bare = (re.sub(r"(^|\s)#.*|\\$", "", line) for line in (words or quoted or "").splitlines())
        added = " ".join(bare) if words or _OPTION.search(quoted or "") else quoted or ""
        before = variables.get(name, "") if f"{name}+=" in found[0] else ""
        variables[name] = f"{before} {added}".lstrip()
    text = _ARRAY.sub(lambda found: variables.get(found[2], found[0]), _OPTIONS.sub("", text))
    text = _VARIABLE.sub(lambda found: variables.get(found[3], found[0]), text)
    lines: list[str] = []
    for line in text.splitlines():
        summed = _SUM.sub(lambda found: _computed(found, variables), line)
        lines.append(_VARIABLE.sub(lambda found: variables.get(found[1] or found[3]) or found[2] or found[0], summed))
        if _ASSIGNMENTS.fullmatch(lines[-1]):
            set_here = ((name, value.strip("\"'")) for name, value in _ASSIGNMENT.findall(lines[-1]))
            kept = {name: value for name, value in set_here if name not in open_names}
            variables.update({name: value for name, value in kept.items() if value or name not in variables})
    return "\n".join(lines), variables, left


def _in_branches(text: str) -> tuple[list[tuple[int, int]], set[str]]:
    """Return where the branches of a script begin and end, and the names whose value depends on a branch."""
    branches, begun = list[tuple[int, int]](), list[int]()
    values, inside = dict[str, set[str]](), set[str]()
    for found in _BRANCHES.finditer(text):
        if found["begin"]:
            begun.append(found.start())
        elif found["end"] and begun:
            branches.append((begun.pop(), found.start()))
        elif (name := found["name"]) and f"{name}+=" not in found[0]:
            values.setdefault(name, set()).add(found["value"].strip())
            inside |= {name} if begun else set()
    return branches, {name for name in inside if len(values[name]) > 1}


def _written(text: str) -> tuple[str, dict[str, str]]:
    """Return a script without the lines that it writes into files, and these lines by the files' names."""
    written = dict[str, str]()
    for before, _, _, behind, lines in _HEREDOC.findall(text):
        for name in _WRITTEN.findall(f"{before} {behind}"):
            written[name] = written.get(name, "") + lines
    return _HEREDOC.sub("", text), written


def _asked(words: Sequence[str]) -> tuple[str, str] | None:
    """Return a known program of a command and the word behind it, which says what the program does."""
    return next(
        ((word, verb) for word, verb in pairwise(words) if word in _PROGRAMS and not verb.startswith("-")), None
    )


def _file(tree: dict[str, Any], behind: Sequence[str]) -> str | None:
    """Return the file with more keys that a command names by --config, or behind its script or its program's verb."""
    named = [word for word in [*behind, tree.pop("config", None)] if str(word).endswith(_FILE)]
    return str(named[-1]) if named else None


def _text_of(name: str, written: Mapping[str, str], path: str) -> str:
    """Return the text of a file that the script writes, or that is beside the script or above it.

    Raises:
        ConfigError: the file is not here, or cannot be read.
    """
    if name in written:
        return written[name]
    places = (Path(name), *(above / name for above in Path(path).absolute().parents))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"{path} has its keys in {name}, which is not here. Give that file, or put it there.")
    try:
        return found.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file {found} cannot be read: {error}.") from error


def _computed(found: re.Match[str], variables: Mapping[str, str]) -> str:
    """Return the value of `$((GLOBAL / GPUS))` or `$(expr 32 / 4)` in whole numbers, or the text if it has none."""
    named = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda name: variables.get(name[1], name[0]), found[1] or found[2])
    try:
        return str(_number(ast.parse(named.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        return found[0]


_OPERATIONS: Mapping[type, Callable[[int, int], int]] = {
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mod: operator.mod,
}


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_number(left), _number(right))
        case _:
            raise ValueError


def _trains(words: Sequence[str]) -> bool:
    """Return whether a command may train. The word after a known program says what it does."""
    asked = _asked(words)
    return asked is None or not _PROGRAMS[asked[0]] or asked[1] in _PROGRAMS[asked[0]]


def _plain(value: str, path: str) -> Any:
    """Return the value of a word: a number, a list or a switch as in YAML, and a text if it is no YAML."""
    try:
        found = read_yaml(value, path) if value.strip() else value
        return value if isinstance(found, str) else found  # a text has no comments
    except ConfigError:
        return value


def _likely(words: Sequence[str]) -> int:
    """Return how likely a command is a training: a known program's, then that of a script, then any other."""
    return 2 if _asked(words) else int(_script(words)[0] >= 0)


def _runs(words: Sequence[str]) -> bool:
    """Return whether a command gives a file of keys to a program or a script."""
    place = _script(words)[0]
    named = any(word.endswith(_FILE) for word in words[place + 1 : place + 2])
    return bool(_asked(words)) or (place >= 0 and named)


def _command(text: str, path: str) -> list[str]:
    """Return the words of the one command line in `text` that has options. Quoted text does not end it."""
    joined, commands, begin = re.sub(r"\\[ \t]*(\n|$)", " ", text), list[str](), 0
    for found in _ENDS.finditer(joined):
        if found["end"]:
            commands.append(joined[begin : found.start()])
            begin = found.end()
    commands.append(joined[begin:])
    busy = (command.strip() for command in commands if not _IDLE.match(command))
    entered = {command: _entered([word.strip("\"'") for word in command.split()]) for command in busy}
    training = {command: words for command, words in entered.items() if _trains(words)} or entered
    most = max(map(_likely, training.values()), default=0)
    counts = {
        command: len(_OPTION.findall(command)) + _runs(words)
        for command, words in training.items()
        if _likely(words) == most
    }
    longest = [command for command, count in counts.items() if count and 2 * count >= max(counts.values())]
    if len(longest) > 1:
        raise ConfigError(
            f"{path} holds {len(longest)} command lines with --key value, each of which may be a training. Give a file"
            " with one of them."
        )
    try:
        words = shlex.split(longest[0]) if longest else []
        return [
            part
            for before, word in pairwise(["", *words])
            for part in (shlex.split(word) if _COMMAND.fullmatch(before) and " " in word else [word])
        ]
    except ValueError as error:
        raise ConfigError(f"{path} is no command line: {error}.") from error
