"""The methods that there are, so that a test of every method has one that is added, too."""

from trainer.config import Tuning
from trainer.tuning.method import Method, methods

# Values that suit the small bases of the tests.
_IN_SMALL = {"block": 4, "virtual_tokens": 4}


def methods_of(kind: type) -> list[str]:
    """The names of those of a class."""
    return [name for name in methods() if isinstance(method_named(name), kind)]


def method_named(name: str) -> Method:
    """The method with its default settings."""
    return methods()[name](Tuning(method=name))


def trained_by(name: str) -> tuple[str, ...]:
    """The settings of a run that trains a small base by the method."""
    method = method_named(name)
    small = [f"{setting}: {value}" for setting, value in _IN_SMALL.items() if setting in method.settings]
    tuning = f"tuning={{{', '.join([f'method: {name}', *small])}}}"
    return (tuning, "quant.type=none") if method.trains_base else (tuning,)
