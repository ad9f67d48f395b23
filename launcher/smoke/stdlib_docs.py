"""Reads text that every Python brings along: the documentation and the source code of its standard library.

"What does os.path.join do?" and its docstring are thousands of real question-answer pairs, without a download.
"""

import ast
import contextlib
import hashlib
import importlib
import inspect
import io
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Importing these opens a window or a browser, prints, or loads a test suite; distutils is what setuptools makes of it;
# and the last four are known by another name: os and os.path.
_SKIPPED_MODULES = {"antigravity", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo"}
_SKIPPED_MODULES |= {"distutils", "posix", "posixpath", "genericpath", "ntpath"}
# Where a module's public objects say that they are from, besides the module itself and its C twin `_module`.
_IMPLEMENTED_IN = {"os": ("posix",), "os.path": ("posixpath", "genericpath")}
SHORTEST, LONGEST = 20, 1200  # characters of an answer
_EVAL_SHARE = 32


def pairs() -> list[tuple[str, str]]:
    """(question, answer) for every documented public name of the standard library, sorted by name.

    An answer occurs once: a docstring that several names share (by inheritance or re-export) goes to the first of them.
    """
    names = {name for name in sys.stdlib_module_names if not name.startswith("_")} - _SKIPPED_MODULES
    found: dict[str, str] = {}
    # Old modules warn when they are imported or looked at, some print.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for root in sorted(names | {"os.path"}):
            for module_name, module in _modules(root):
                for name, thing in _public(module_name, module):
                    if docstring := _docstring(thing):
                        found.setdefault(docstring, name)
    return sorted((f"What does {name} do?", docstring) for docstring, name in found.items())


def split(all_pairs: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(train, held out), by a hash of the question: a pair stays on its side when others come or go."""
    train, held_out = [], []
    for pair in all_pairs:
        digest = hashlib.sha256(pair[0].encode()).digest()
        (held_out if digest[0] % _EVAL_SHARE == 0 else train).append(pair)
    return train, held_out


def _modules(name: str) -> Iterator[tuple[str, ModuleType]]:
    """(name, module) of the module and the public ones inside it, as far as this machine can import them."""
    try:
        module = importlib.import_module(name)
    except Exception:
        return  # it belongs to another operating system, or to a library that this Python was built without
    yield name, module
    for folder in getattr(module, "__path__", []):
        for path in sorted(Path(folder).iterdir()):
            inner = path.stem if path.suffix == ".py" else path.name if (path / "__init__.py").exists() else ""
            if inner.isidentifier() and not inner.startswith("_") and inner not in ("test", "tests"):
                yield from _modules(f"{name}.{inner}")


def _public(module_name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """(dotted name, object) of the public functions and classes that the module defines, and of their methods."""
    homes = (module_name, f"_{module_name}", *_IMPLEMENTED_IN.get(module_name, ()))
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        if getattr(thing, "__module__", None) not in homes:
            continue
        yield f"{module_name}.{name}", thing
        if inspect.isclass(thing):
            for member, method in sorted(vars(thing).items()):
                if not member.startswith("_") and (inspect.isroutine(method) or isinstance(method, property)):
                    yield f"{module_name}.{name}.{member}", method


def _docstring(thing: Any) -> str:
    """The cleaned docstring, cut at a paragraph when long; empty when there is none worth learning."""
    raw = getattr(thing, "__doc__", None)
    if not isinstance(raw, str):
        return ""
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(raw).splitlines()).strip()
    if len(text) > LONGEST:
        text = text[:LONGEST].rpartition("\n\n")[0] or text[:LONGEST].rpartition("\n")[0]
    # An address in memory (`<object at 0x7f...>`) differs from process to process.
    return text if len(text) >= SHORTEST and " at 0x" not in text else ""


def source_files() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def source_code(path: Path) -> str:
    """A module without its docstrings: a base that has read the code is yet to learn to explain it."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
