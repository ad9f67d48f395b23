"""A tree of JSON as one text, whoever writes it: by its hash, what is kept as JSON is known to be whole, and settings
are told apart.
"""

import hashlib
import json
from typing import Any


def canonical(tree: Any) -> str:
    """The text with sorted keys and without white space."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def digest_of(tree: Any) -> str:
    """The SHA-256 of that text, in hexadecimal."""
    return digest_of_text(canonical(tree))


def digest_of_text(text: str) -> str:
    """The same where the canonical text is at hand."""
    return hashlib.sha256(text.encode()).hexdigest()
