"""PyAV, with which FFmpeg decodes video and sound."""

from importlib.util import find_spec
from threading import Lock
from typing import Any

from trainer.errors import ConfigError, first_line

_IMPORT = Lock()


def pyav(noun: str) -> Any:
    """The imported package. If it is missing, raises `ConfigError` with a message about a file that is a `noun`."""
    if find_spec("av") is None:
        raise ConfigError(
            f"data.format: a row has a {noun}, which needs the package av. Install it: pip install"
            " 'capstan-llm[media]'."
        )
    with _IMPORT:  # its parts import each other, so threads that import it at once may get an unfinished part
        import av
        import av.error

        return av


def reason(error: Exception) -> str:
    """Return why a file cannot be read. FFmpeg's messages also have a number, and a name that no file has here."""
    return getattr(error, "strerror", None) or first_line(error)
