"""Whether the Hugging Face Hub can be reached: huggingface_hub itself asks for half a minute before it takes what is in its cache."""

import os
import socket
import threading
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

_PATIENCE_SECONDS = 2.0


def hub_host() -> str:
    """The host and port of the Hub, or of the mirror in HF_ENDPOINT."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    return f"{url.hostname}:{url.port or (80 if url.scheme == 'http' else 443)}"


@cache
def hub_answers() -> bool:
    """Whether a connection to the Hub can be made; asked once. Behind a proxy that is taken for granted."""
    if getproxies():
        return True
    host, _, port = hub_host().rpartition(":")
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, int(port)), _PATIENCE_SECONDS).close()
        except OSError:
            return
        connected.set()

    # In a thread, as a name that cannot be resolved may take longer than any time limit of a connection.
    asking = threading.Thread(target=connect, name="hub", daemon=True)
    asking.start()
    asking.join(_PATIENCE_SECONDS)
    return connected.is_set()
