"""Keeps libraries that no run uses out of a rank's start.

DeepSpeed imports its autotuner, and with it mlflow, pandas and fastapi. transformers imports scipy for losses of
images. bitsandbytes imports torch's compiler for devices that it has no kernels for, and DeepSpeed imports it, with
networkx, for an optimizer. Together they are a third of the processor time that every rank, and every process of a
proof, would spend on imports before it does anything.

Nothing is taken away. While such a module is imported, a stand-in takes the place of the library, and gets it when one
of its functions is called. No library has a setting for it, and Python's own `importlib.util.LazyLoader` defers whole
modules, of which these imports want names at once. tests/unit/repository/test_imports.py fails where one comes back.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _StandIn(ModuleType):
    """A module of functions, each of which imports the real module when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            return getattr(import_module(self.__name__), name)(*arguments, **options)

        return call


@contextmanager
def _stand_in(name: str) -> Iterator[None]:
    if name in sys.modules:  # somebody has paid for it already
        yield
        return
    sys.modules[name] = _StandIn(name)
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _compile_at_the_first_call() -> Iterator[None]:
    """Make `torch.compile` wait until a decorated function is called. It imports the compiler for every function that
    it decorates.
    """
    import torch

    compile_now: Any = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return partial(compile_later, **options)
        compiled: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*arguments: Any, **given: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*arguments, **given)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


# A module of a library, with everything below it -> the wrapper of its import.
_DEFERRED: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "deepspeed.autotuning.autotuner": partial(_stand_in, "mlflow"),
    "transformers.loss": partial(_stand_in, "scipy.optimize"),
    "bitsandbytes.backends": _compile_at_the_first_call,
    # DeepSpeed imports this optimizer only to ask whether the given one is an instance of it.
    "deepspeed.runtime.zero.muon": _compile_at_the_first_call,
}


class _Finder(MetaPathFinder):
    """Finds the modules of `_DEFERRED` at their places, and wraps their import."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        around = next((how for name, how in _DEFERRED.items() if f"{fullname}.".startswith(f"{name}.")), None)
        if around is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_within(module: ModuleType) -> None:
                with around():
                    execute(module)

            spec.loader.exec_module = execute_within
        return spec


def defer_imports() -> None:
    """Defer imports from now on in this process. A second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


_makes_tokens_alone = False


def makes_tokens_alone() -> None:
    """Say that this process makes tokens with transformers, and never a model. `transformers_without_torch` may then
    leave torch out, which takes two thirds of the processor time that a tokenizer takes to come."""
    global _makes_tokens_alone
    _makes_tokens_alone = True


def transformers_without_torch() -> None:
    """Import transformers as if torch were not installed, if this process `makes_tokens_alone` and has neither yet.

    transformers asks once whether torch is there. Later imports of torch find it.
    """
    if not _makes_tokens_alone or {"torch", "transformers"} & sys.modules.keys():
        return
    silent = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # the caller wants no models to be available
    before = os.environ.get(silent)
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that a module is not there
    os.environ[silent] = "1"
    try:
        from transformers.utils.import_utils import is_torch_available

        assert not is_torch_available()
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[silent]
        else:
            os.environ[silent] = before
