"""Finds out which rows of a data set a script gives its trainer, by the syntax tree.

Scripts choose them behind `load_dataset`: `["train_sft"]`, `.shuffle(seed=42).select(range(1000))`,
`.train_test_split(test_size=0.1)`. Each becomes a part of a source here.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launcher.init.importing.mapped_rows import NotRead
from launcher.init.importing.names import Names

_MOST_STEPS = 50


@dataclass
class Trained:
    """The rows of what `call` loads. `tested` says that they are those that `train_test_split` holds out.

    `chosen` has parts of a source, such as `take`. `open` says what is chosen in a way that is not followed.
    """

    call: ast.Call
    chosen: dict[str, Any] = field(default_factory=dict[str, Any])
    held_out: float | None = None
    tested: bool = False
    seed: int | None = None
    open: list[str] = field(default_factory=list[str])

    def split(self, name: Any, shown: str) -> None:
        if self.held_out is not None and name in ("train", "test"):
            self.tested = name == "test"
        elif isinstance(name, str) and "split" not in self.chosen:
            self.chosen["split"] = name
        else:
            self.open.append(f"data.train: which rows {shown} are,")

    def take(self, begin: Any, end: Any, shown: str) -> None:
        numbers = isinstance(begin, int) and isinstance(end, int) and 0 <= begin < end
        if not numbers or {"take", "skip"} & set(self.chosen) or (begin and self.seed is not None):
            self.open.append(f"data.train: which rows {shown} takes,")
            return
        self.chosen |= {"take": end - begin, **({"skip": begin} if begin else {})}
        if self.seed is not None:
            self.chosen["take_seed"] = self.seed


def trained_rows(
    given: ast.expr, names: Names, value: Callable[[ast.expr], Any], loads: Callable[[ast.Call], bool]
) -> Trained:
    """Return the rows that the expression `given` stands for. Raises `NotRead` if they are of no single data set.

    `value` returns the value of a plain expression, and `loads` says whether a call loads rows.
    """

    def follow(node: ast.expr | None, depth: int) -> Trained:
        if depth > _MOST_STEPS:
            raise NotRead
        match node:
            case ast.Name(id=name):
                return follow(names.at(name, node), depth + 1)
            case ast.Subscript(value=of, slice=key):
                found = follow(of, depth + 1)
                found.split(value(key), ast.unparse(node))
                return found
            case ast.Call() if loads(node):
                return Trained(node)
            case ast.Call(func=ast.Attribute(value=of, attr=name)) if not _of_a_class(of):
                found = follow(of, depth + 1)
                _chosen(found, name, node, value)
                return found
            case ast.Call(args=[first, *_]):
                return follow(first, depth + 1)
            case _:
                raise NotRead

    return follow(given, 0)


def _of_a_class(of: ast.expr) -> bool:
    return isinstance(of, ast.Name) and of.id in ("Dataset", "DatasetDict", "datasets")


def _chosen(found: Trained, name: str, call: ast.Call, value: Callable[[ast.expr], Any]) -> None:
    """Record what a method of a data set leaves of its rows."""
    words = {word.arg: word.value for word in call.keywords}
    shown = f"{name}({', '.join(map(ast.unparse, [*call.args, *call.keywords]))})"[:80]
    first = call.args[0] if call.args else None
    match name:
        case "shuffle":
            seed = value(words["seed"]) if "seed" in words else 42
            found.seed = seed if isinstance(seed, int) else 42
        case "select" | "take":
            numbers = first or words.get("indices") or words.get("n")
            ends = numbers.args if isinstance(numbers, ast.Call) and ast.unparse(numbers.func) == "range" else []
            if name == "take" and numbers is not None:
                found.take(0, value(numbers), shown)
            elif len(ends) in (1, 2):
                found.take(value(ends[0]) if len(ends) == 2 else 0, value(ends[-1]), shown)
            else:
                found.take(None, None, shown)
        case "train_test_split":
            asked = words.get("test_size", first)
            trained = value(words["train_size"]) if "train_size" in words else 0.75
            rest = round(1 - trained, 12) if isinstance(trained, float) else None
            size = rest if asked is None else value(asked)
            if isinstance(size, int | float):
                found.held_out = size
            else:
                found.open.append(f"data.held_out: what {shown} leaves out,")
                found.held_out = 0.0
        case "filter" | "shard" | "skip" | "unique":
            found.open.append(f"data.train: which rows {shown} leaves,")
        case "rename_column" | "rename_columns":
            found.open.append(f"data.fields: what {shown} renames,")
        case _:
            pass
