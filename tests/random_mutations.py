"""Random changes of one place in the product, over all packages, and the quick tests that could notice them.

`python -m tests.mutations --random N SEED` draws N of them. A package is drawn first, so that a small one is asked as
often as a large one; then any place in its files that a change means something: a condition, a comparison, a number, a
call whose result nobody takes. The tests nearest to the changed module run first: those that import it, then those of
its package, then those that import what imports it (the tests' own modules, too), then all quick ones.
"""

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_SUMS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Add,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """`old`, which begins at `offset` characters in `file` (relative to the root) in line `line`, becomes `new`."""

    file: str
    line: int
    offset: int
    old: str
    new: str

    @property
    def name(self) -> str:
        shown = [" ".join(text.split()) for text in (self.old, self.new)]
        return f"{self.file}:{self.line}: {shown[0][:70]} -> {shown[1][:70]}"

    def applied(self, source: str) -> str:
        assert source[self.offset :].startswith(self.old), self.name
        return source[: self.offset] + self.new + source[self.offset + len(self.old) :]


def drawn(count: int, seed: int, root: Path = ROOT) -> list[Change]:
    """`count` changes, the same ones for a seed while the files stay as they are."""
    generator = random.Random(seed)
    packages = _packages(root)
    order = [name for name, found in sorted(packages.items()) if found]
    generator.shuffle(order)
    return [generator.choice(packages[order[index % len(order)]]) for index in range(count)]


@cache
def _packages(root: Path) -> dict[str, list[Change]]:
    """Every change of each package, by its path."""
    packages: dict[str, list[Change]] = {}
    for top in ("trainer", "launcher"):
        for file in sorted((root / top).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            packages.setdefault("/".join(name.split("/")[:2]), []).extend(changes(name, file.read_text("utf-8")))
    return packages


def changes(file: str, source: str) -> Iterator[Change]:
    """Every change of `source` that this module knows."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def of(node: ast.expr | ast.stmt, new: str) -> Change:
        begin = offset(node.lineno, node.col_offset)
        end = offset(node.end_lineno or node.lineno, node.end_col_offset or 0)
        return Change(file, node.lineno, begin, source[begin:end], new)

    tree = ast.parse(source)
    places = _places(tree)
    for node in _meaningful(tree):
        match node:
            case ast.If() | ast.While() | ast.IfExp():
                yield of(node.test, f"(not ({ast.unparse(node.test)}))")
            case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
                other = ast.Compare(node.left, [_COMPARISONS[type(op)]()], node.comparators)
                yield of(node, f"({ast.unparse(other)})")
            case ast.BoolOp():
                other = ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
                yield of(node, f"({ast.unparse(other)})")
            case ast.BinOp() if type(node.op) in _SUMS and not _is_text(node):
                yield of(node, f"({ast.unparse(ast.BinOp(node.left, _SUMS[type(node.op)](), node.right))})")
            case ast.Constant(value=bool()):
                yield of(node, str(not node.value))
            case ast.Constant(value=int(number)):
                yield of(node, f"({number + (1000 if node in places else 1)})")
            case ast.Expr(value=ast.Call()):
                yield of(node, "pass")


def _meaningful(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `tree` that run: no annotations, decorators, assertions, and no text of messages."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Assert | ast.JoinedStr | ast.Raise):
            continue
        if isinstance(child, ast.If) and re.search(r"TYPE_CHECKING|__name__", ast.unparse(child.test)):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for statement in child.body:
                yield statement
                yield from _meaningful(statement)
            continue
        if isinstance(child, ast.AnnAssign):
            if child.value is not None:
                yield child.value
                yield from _meaningful(child.value)
            continue
        yield child
        yield from _meaningful(child)


def _places(tree: ast.AST) -> set[ast.AST]:
    """The numbers that only put a kind or a verb among the others: one more would change nothing, and such a change puts
    it behind them.
    """
    found = set[ast.AST]()
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="place", value=ast.Constant() as number):
                found.add(number)
            case ast.Call(func=ast.Name(id="Command"), args=[_, _, ast.Constant() as number, *_]):
                found.add(number)
    return found


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def nearest(file: str, line: int = 1, root: Path = ROOT) -> list[tuple[str, ...]]:
    """The test files that could notice a change of `line` in `file`, in four stages: those that name its module, those
    that lie in its package's folder, those that name a module that imports it (also one of the tests' own, such as
    tests/dist/proofs.py), all.

    A stage begins with those that name what the line is in, then those that name what uses that; unit tests first.
    """
    sources = {
        path.relative_to(root).as_posix(): path.read_text("utf-8")
        for top in ("trainer", "launcher", "tests")
        for path in (root / top).rglob("*.py")
        if not path.name.startswith("test_")
    }
    tests = {
        path.relative_to(root).as_posix(): path.read_text("utf-8")
        for path in sorted((root / "tests").rglob("test_*.py"))
    }
    module = _module(file)
    importing = [_module(name) for name, text in sources.items() if _names(text, module)]
    near = [name for name, text in tests.items() if _names(text, module)]
    room = file.split("/")[1].removesuffix(".py") if file.startswith("trainer/") else "launcher"
    beside = [name for name in tests if name.startswith(f"tests/unit/{room}/") and name not in near]
    known = {*near, *beside}
    behind = [name for name, text in tests.items() if name not in known and any(_names(text, one) for one in importing)]
    others = [name for name in tests if name not in {*known, *behind}]
    around = _around(sources[file], line)
    distances = {
        name: next((at for at, words in enumerate(around) if words & set(re.findall(r"\w+", text))), len(around))
        for name, text in tests.items()
    }

    def turn(name: str) -> tuple[int, bool]:
        return distances[name], "/unit/" not in name

    return [tuple(sorted(stage, key=turn)) for stage in (near, beside, behind, others)]


def _around(source: str, line: int) -> list[set[str]]:
    """The names of the functions, classes and constants of a module that `line` is in, then of those that use these, and
    so on.
    """
    spans: list[tuple[str, int, int]] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                spans.append((name, node.lineno, node.end_lineno or node.lineno))
            case ast.Assign(targets=[ast.Name(id=name)], col_offset=0):
                spans.append((name, node.lineno, node.end_lineno or node.lineno))
    lines = source.splitlines()
    words = [(name, set(re.findall(r"\w+", "\n".join(lines[begin - 1 : end])))) for name, begin, end in spans]
    found = [{name for name, begin, end in spans if begin <= line <= end}]
    while found[-1]:
        seen = set().union(*found)
        found.append({name for name, used in words if name not in seen and used & found[-1]})
    return found[:-1]


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _names(text: str, module: str) -> bool:
    package, _, name = module.rpartition(".")
    return f"{module} import" in text or bool(
        re.search(rf"\b{re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{re.escape(name)}\b", text)
    )
