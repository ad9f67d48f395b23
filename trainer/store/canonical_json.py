"""One canonical text for a tree of JSON, whoever writes it.

Its hash shows whether a JSON file is whole, and tells settings apart.
"""

import hashlib
import json
from typing import Any


def canonical(tree: Any) -> str:
    """Return the text with sorted keys and without white space."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def digest_of(tree: Any) -> str:
    """Return the SHA-256 of that text, in hexadecimal."""
    return digest_of_text(canonical(tree))


def digest_of_text(text: str) -> str:
    """Return the same digest, from the canonical text itself."""
    return hashlib.sha256(text.encode()).hexdigest()
