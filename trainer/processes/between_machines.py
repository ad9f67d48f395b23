"""Processes on several machines talk: they sign lines with a secret that they alone know, and find the address by which
others reach their machine.
"""

import hashlib
import hmac
import json
import socket
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

_DOCUMENTATION = ("198.51.100.1", 9)  # an address of RFC 5737, which is reached by the route to other networks


def sign(secret: bytes, told: Any) -> bytes:
    """The signed line for `told`, which is plain JSON."""
    text = json.dumps(told).encode()
    return hmac.new(secret, text, hashlib.sha256).hexdigest().encode() + b" " + text + b"\n"


def verified(secret: bytes, line: bytes) -> Any:
    """The value that a line carries, or None if it is not signed with `secret`."""
    digest, _, text = line.rstrip(b"\n").partition(b" ")
    expected = hmac.new(secret, text, hashlib.sha256).hexdigest().encode()
    return json.loads(text) if hmac.compare_digest(digest, expected) else None


def own_address(first: str, family: int = socket.AF_UNSPEC) -> str:
    """The address of this machine by which it reaches the machine `first`, and so is reached by the others. `first` may
    be this machine's own name. `family` is that of the address.
    """
    for target in (first, _DOCUMENTATION[0]):
        with suppress(OSError):
            kind, _, _, _, place = socket.getaddrinfo(target, _DOCUMENTATION[1], family, socket.SOCK_DGRAM)[0]
            with socket.socket(kind, socket.SOCK_DGRAM) as probe:
                probe.connect(place)  # sends nothing
                found = str(probe.getsockname()[0])
            # The name of this machine may stand for its loopback address here, and for another one elsewhere.
            if not ip_address(found.partition("%")[0]).is_loopback or first.startswith("127."):
                return found
    return first
