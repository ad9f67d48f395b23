"""Finds out which data sets a script mixes into one, by its syntax tree and without running it.

Notebooks render the conversations of two data sets, draw some of the texts of one by pandas, and join both:

    texts = tokenizer.apply_chat_template(list(dataset.map(function, batched=True)["conversations"]), tokenize=False)
    some = pd.Series(texts).sample(int(len(others) * share), random_state=seed)
    mixed = Dataset.from_pandas(pd.DataFrame(pd.concat([pd.Series(others), pd.Series(some)])))

Each of them becomes a source here, with `take` for a draw. How many rows a draw has may depend on the size of a public
data set, which a table has.
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.init.importing.mapped_rows import NotRead, Rendered, Rows

_SAME = ("list", "Series", "DataFrame", "from_pandas", "shuffle", "standardize_sharegpt", "standardize_data_formats")
"""Calls that change neither the rows nor how many there are."""
_OPERATIONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
}


@dataclass(frozen=True)
class Drawn:
    """Rows of one data set: the call that loads it, what is made of them, and the random choice of them."""

    call: ast.Call
    rows: Rows = field(default_factory=Rows)
    column: str = ""
    rendered: bool = False
    take: int | None = None
    seed: int = 0

    def source(self) -> dict[str, Any]:
        """Return the parts of a source: what is made of the rows, and the choice. Raises `NotRead`."""
        if not self.rendered:
            raise NotRead
        value = self.rows.written.get(self.column, ((self.column,),))
        made = Rows({"text": Rendered(value)}).source("text")
        return {**made, **({} if self.take is None else {"take": self.take, "take_seed": self.seed})}


def mixture(
    tree: ast.Module, given: ast.expr | None, constants: Mapping[str, Any], count_of: Callable[[ast.Call], int | None]
) -> list[Drawn]:
    """Return the rows that `given`, the trainer's data set, is mixed of, which may be those of a single data set; none
    if it cannot be followed.

    `count_of` tells how many rows a loading call has, where that is known.
    """
    if given is None:
        return []
    try:
        found = _Follower(tree, given.lineno, constants, count_of).value(given)
    except NotRead:
        return []
    return list(found) if isinstance(found, tuple) else []


class _Follower:
    """Follows an expression back to the data sets that it is made of."""

    def __init__(
        self, tree: ast.Module, end: int, constants: Mapping[str, Any], count_of: Callable[[ast.Call], int | None]
    ) -> None:
        self._tree, self._constants, self._count_of = tree, constants, count_of
        self._line = end

    def value(self, node: ast.expr) -> Any:
        """Return a number, or the rows of one or more data sets, as a tuple of `Drawn`. Raises `NotRead`."""
        match node:
            case ast.Name(id=name):
                return self._named(name)
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return tuple(drawn for part in parts for drawn in self._rows(part))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                return _OPERATIONS[type(op)](self._number(left), self._number(right))
            case ast.Subscript(value=of, slice=ast.Constant(value=str() as column)):
                return self._each(of, lambda drawn: replace(drawn, column=column))
            case ast.Call():
                return self._call(node)
            case _:
                raise NotRead

    def _named(self, name: str) -> Any:
        """Return the value that the name was last given before this line."""
        given = [
            node
            for node in self._tree.body
            if isinstance(node, ast.Assign)
            and node.lineno < self._line
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        ]
        if not given:
            raise NotRead
        before, self._line = self._line, given[-1].lineno
        found = self.value(given[-1].value)
        self._line = before
        return found

    def _call(self, call: ast.Call) -> Any:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        of = call.func.value if isinstance(call.func, ast.Attribute) else None
        words = {word.arg: word.value for word in call.keywords}
        if name == "load_dataset":
            return (Drawn(call),)
        if name == "len" and call.args:
            return sum(self._length(drawn) for drawn in self._rows(call.args[0]))
        if name == "int" and call.args:
            return int(self._number(call.args[0]))
        if name == "concat" and call.args:
            return self.value(call.args[0])
        if name == "apply_chat_template" and call.args and set(words) == {"tokenize"}:
            return self._each(call.args[0], lambda drawn: replace(drawn, rendered=True))
        if name == "map" and of is not None and call.args:
            return self._mapped(of, call.args[0], "batched" in words)
        if name == "sample" and of is not None and call.args and set(words) == {"random_state"}:
            count, seed = int(self._number(call.args[0])), int(self._number(words["random_state"]))
            return self._each(of, lambda drawn: replace(drawn, take=count, seed=seed))
        if name in _SAME:
            own = of is not None and name == "shuffle"
            return self.value(of if own and of is not None else call.args[0]) if own or call.args else ()
        raise NotRead

    def _mapped(self, of: ast.expr, function: ast.expr, batched: bool) -> tuple[Drawn, ...]:
        named = [
            node
            for node in self._tree.body
            if isinstance(node, ast.FunctionDef) and isinstance(function, ast.Name) and node.name == function.id
        ]
        before = [node for node in named if node.lineno < self._line]
        if not before:
            raise NotRead
        found = list[Drawn]()
        for drawn in self._rows(of):
            rows = Rows(dict(drawn.rows.written))
            rows.map(before[-1], batched, self._constants)
            found.append(replace(drawn, rows=rows))
        return tuple(found)

    def _each(self, of: ast.expr, change: Callable[[Drawn], Drawn]) -> tuple[Drawn, ...]:
        rows: Sequence[Drawn] = self._rows(of)
        return tuple(change(drawn) for drawn in rows)

    def _rows(self, node: ast.expr) -> tuple[Drawn, ...]:
        found = self.value(node)
        if not isinstance(found, tuple):
            raise NotRead
        return found

    def _number(self, node: ast.expr) -> float:
        found = self.value(node)
        if not isinstance(found, int | float):
            raise NotRead
        return found

    def _length(self, drawn: Drawn) -> int:
        count = self._count_of(drawn.call) if drawn.take is None else drawn.take
        if count is None:
            raise NotRead
        return count
