"""Turns any error that a library raises for an unreadable file of a base into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import CapstanError, ConfigError, shown


@contextmanager
def read_by_transformers(name: str, what: str) -> Iterator[None]:
    """A context in which transformers reads `what` of the base `name`.

    Raises:
        ConfigError: replaces the many kinds of errors that transformers and its libraries raise for unreadable files.
    """
    try:
        yield
    except CapstanError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model.base: {what} of {name} needs code that the base brings along (auto_map), which is never run."
                " Give a base that transformers knows."
            ) from error
        raise ConfigError(unreadable(name, what, error)) from error


@contextmanager
def without_panics(name: str, what: str) -> Iterator[None]:
    """The same, but only for panics of Rust code, which are not an `Exception`. Raises `ConfigError` for them."""
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise ConfigError(unreadable(name, what, error)) from error


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # each library written in Rust has its own class of that name


def unreadable(name: str, what: str, error: BaseException) -> str:
    reason = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, LookupError):
        reason = f"it lacks {reason}"
    return (
        f"model.base: {what} of {name} cannot be read ({shown(reason)[1:-1] or type(error).__name__}). Copy the model"
        " again."
    )
