"""This file finds out whether the Hugging Face Hub can be reached.

huggingface_hub itself tries for half a minute before it uses its cache.
"""

import os
import socket
from functools import cache, partial
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from trainer.processes.helper_thread import in_thread

_PATIENCE_SECONDS = 2.0


def hub_host() -> str:
    """Return the host and port of the Hub, or of the mirror in HF_ENDPOINT."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    return f"{url.hostname}:{url.port or (80 if url.scheme == 'http' else 443)}"


def proxy_host() -> str | None:
    """Return the host and port of the proxy that requests to the Hub go through, or None."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    known = getproxies()
    found = known.get(url.scheme) or known.get("all")
    if not found or proxy_bypass(url.hostname or ""):
        return None
    proxy = urlsplit(found if "://" in found else f"http://{found}")
    return f"{proxy.hostname}:{proxy.port or (443 if proxy.scheme == 'https' else 80)}"


@cache
def hub_answers() -> bool:
    """Return whether a connection to the Hub, or to the proxy before it, can be made. The connection is tried once."""
    host, _, port = (proxy_host() or hub_host()).rpartition(":")
    # Connect in a thread: resolving a name may take longer than the time limit of a connection.
    asking = in_thread(partial(socket.create_connection, (host, int(port)), _PATIENCE_SECONDS), "hub")
    try:
        asking.result(_PATIENCE_SECONDS).close()
    except (OSError, UnicodeError):  # also when the time is up, or when no host can have such a name
        return False
    return True
