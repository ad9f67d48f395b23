"""One sentence for each file of a base that cannot be read, whatever kind of error a library raises for it."""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import CapstanError, ConfigError, shown


@contextmanager
def read_by_transformers(name: str, what: str) -> Iterator[None]:
    """Around transformers as it reads `what` of the base `name`.

    Raises:
        ConfigError: in place of the many kinds of error that it and its libraries raise for what they cannot read.
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
    """The same for panics of Rust code alone. Raises `ConfigError` for them, which are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise ConfigError(unreadable(name, what, error)) from error


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # each library written in Rust has a class of its own


def unreadable(name: str, what: str, error: BaseException) -> str:
    reason = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, LookupError):
        reason = f"it lacks {reason}"
    return (
        f"model.base: {what} of {name} cannot be read ({shown(reason)[1:-1] or type(error).__name__}). Copy the model"
        " again."
    )
