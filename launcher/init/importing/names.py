"""Finds the expression that a name of a script stands for at a place, by the syntax tree.

Several assignments of one name are told apart by where they are. A name that depends on a branch, or is changed in
place, has no expression.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_BRANCHES = (ast.If, ast.Try, ast.For, ast.While)


@dataclass(frozen=True)
class _Bound:
    """One place where a name gets a value; `value` is None if no expression says it."""

    line: int
    around: tuple[ast.AST, ...]
    value: ast.expr | None
    argument: tuple[str, int, ast.expr | None] | None = None  # of which function, its place there, and its default


class Names:
    """Knows where a script gives values to its names, and the defaults of its own options."""

    def __init__(self, tree: ast.AST) -> None:
        self._bound: dict[str, list[_Bound]] = {}
        self._around: dict[ast.AST, tuple[ast.AST, ...]] = {}
        self._calls: dict[str, list[ast.Call]] = {}
        self._classes: dict[str, dict[str, ast.expr]] = {}
        self.options: dict[str, ast.expr] = {}
        """The default of each option that the script's parser has, or of each field of its data classes."""
        self._visit(tree, ())

    def at(self, name: str, place: ast.AST) -> ast.expr | None:
        """Return the expression that `name` stands for at `place`, or None."""
        around, line = self._around.get(place, ()), getattr(place, "lineno", 0)
        scopes = [node for node in around if isinstance(node, _SCOPES)]
        own = next((node for node in reversed(scopes) if any(_scope(one) is node for one in self._all(name))), None)
        found = [one for one in self._all(name) if _scope(one) is own]
        # A function is called after the whole module has run, and sees the last value.
        found = [one for one in found if one.around[-1] not in around]
        before = [one for one in found if one.line < line or (own is None and scopes)]
        possible: list[_Bound] = []
        for one in sorted(before or found, key=lambda one: -one.line):
            possible.append(one)
            if not any(isinstance(node, _BRANCHES) and node not in around for node in one.around):
                break
        values = [self._passed(name, one) if one.argument else [one.value] for one in possible]
        return _same([value for some in values for value in some])

    def attribute(self, of: str, name: str, place: ast.AST) -> ast.expr | None:
        """Return the expression of an attribute of a class of the script's, or of an instance of it, or None."""
        made = self.at(of, place)
        kind = made.func.id if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) else of
        return self._classes.get(kind, {}).get(name)

    def _passed(self, name: str, bound: _Bound) -> list[ast.expr | None]:
        """Return what the calls of a function pass for an argument of it, or its default if they pass nothing."""
        function, index, default = bound.argument or ("", 0, None)
        found: list[ast.expr | None] = []
        for call in self._calls.get(function, []):
            named = next((word.value for word in call.keywords if word.arg == name), None)
            whole = all(not isinstance(one, ast.Starred) for one in call.args) and all(w.arg for w in call.keywords)
            given = call.args[index] if index < len(call.args) else named
            found.append((given or default) if whole else None)
        return found or [default]

    def _all(self, name: str) -> list[_Bound]:
        return self._bound.get(name, [])

    def _bind(self, target: ast.AST, value: ast.expr | None, around: tuple[ast.AST, ...]) -> None:
        if isinstance(target, ast.Name):
            self._bound.setdefault(target.id, []).append(_Bound(target.lineno, around, value))
        elif isinstance(target, ast.Tuple | ast.List):
            same = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
            values = value.elts if same and isinstance(value, ast.Tuple | ast.List) else [None] * len(target.elts)
            for one, part in zip(target.elts, values, strict=True):
                self._bind(one, part, around)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, None, around)

    def _visit(self, node: ast.AST, around: tuple[ast.AST, ...]) -> None:
        self._around[node] = around
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind(target, value, (*around, node))
                    if around and isinstance(around[-1], ast.ClassDef) and isinstance(target, ast.Name):
                        self._of(around[-1])[target.id] = value
            case ast.AnnAssign(target=ast.Name(id=name) as target, value=ast.expr() as value):
                self._bind(target, value, (*around, node))
                if around and isinstance(of := around[-1], ast.ClassDef) and (given := _default(value)) is not None:
                    (self.options if of.decorator_list else self._of(of))[name] = given
            case ast.AugAssign(target=target) | ast.For(target=target):
                self._bind(target, None, (*around, target))
            case ast.FunctionDef(args=arguments) | ast.AsyncFunctionDef(args=arguments) | ast.Lambda(args=arguments):
                positional = [*arguments.posonlyargs, *arguments.args]
                defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
                named = [*zip(positional, defaults, strict=True)]
                named += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
                for index, (one, default) in enumerate(named):
                    argument = (getattr(node, "name", ""), index, default)
                    self._bound.setdefault(one.arg, []).append(
                        _Bound(node.lineno, (*around, node, one), None, argument)
                    )
            case ast.Call(func=ast.Attribute(attr="add_argument"), args=[*flags], keywords=words):
                self._option(flags, words)
            case ast.Call(func=ast.Name(id=name)):
                self._calls.setdefault(name, []).append(node)
            case _:
                pass
        for child in ast.iter_child_nodes(node):
            self._visit(child, (*around, node))

    def _of(self, kind: ast.ClassDef) -> dict[str, ast.expr]:
        return self._classes.setdefault(kind.name, {})

    def _option(self, flags: list[ast.expr], words: list[ast.keyword]) -> None:
        given = {word.arg: word.value for word in words}
        names = [flag.value for flag in flags if isinstance(flag, ast.Constant) and isinstance(flag.value, str)]
        long = next((name for name in names if name.startswith("--")), None)
        action = given.get("action")
        if long is None:
            return
        if (default := given.get("default")) is not None:
            self.options[long.strip("-").replace("-", "_")] = default
        elif isinstance(action, ast.Constant) and action.value == "store_true":
            self.options[long.strip("-").replace("-", "_")] = ast.Constant(False)


def _same(values: list[ast.expr | None]) -> ast.expr | None:
    """Return the expression that all of these are, or None."""
    return values[0] if len({ast.dump(value) if value is not None else "" for value in values}) == 1 else None


def _default(value: ast.expr) -> ast.expr | None:
    """Return the default of a data class's field, written alone or as `field(default=...)`."""
    if not isinstance(value, ast.Call):
        return value
    return next((word.value for word in value.keywords if word.arg == "default"), None)


def _scope(bound: _Bound) -> ast.AST | None:
    return next((node for node in reversed(bound.around) if isinstance(node, _SCOPES)), None)


def keywords(call: ast.Call, names: Names) -> Iterator[tuple[str | None, ast.expr]]:
    """Yield the arguments of a call that have names, with those of `**options` where the script writes them out.

    One without a name is `**options` that are not known.
    """
    for word in call.keywords:
        value = names.at(word.value.id, call) if isinstance(word.value, ast.Name) and word.arg is None else word.value
        match (word.arg, value):
            case (str() as name, ast.expr()):
                yield name, value
            case (None, ast.Dict(keys=keys, values=values)) if all(isinstance(key, ast.Constant) for key in keys):
                yield from ((str(ast.literal_eval(key)), one) for key, one in zip(keys, values, strict=True) if key)
            case (None, ast.Call(func=ast.Name(id="dict"), args=[], keywords=inner)):
                yield from ((one.arg, one.value) for one in inner)
            case _:
                yield None, word.value
