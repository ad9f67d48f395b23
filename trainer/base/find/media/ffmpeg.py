"""PyAV, with which FFmpeg decodes video and sound."""

from collections.abc import Collection
from importlib.util import find_spec
from threading import Lock
from typing import Any

from trainer.errors import ConfigError, DataError, first_line

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


def check_codec(stream: Any, known: Collection[str], advised: str) -> None:
    """Raises `DataError`, with a clause that advises a codec, if the decoder of a stream is not one of `known`."""
    codec = "unknown" if stream.codec_context is None else stream.codec_context.name
    if codec not in known:
        raise DataError(f"is coded as {codec}, which Capstan does not read. Encode it as {advised}")


def reason(error: Exception) -> str:
    """Return why a file cannot be read. FFmpeg's messages also have a number, and a name that no file has here."""
    return getattr(error, "strerror", None) or first_line(error)
