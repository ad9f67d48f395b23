"""The one way to a terminal: control characters are shown and never sent.

Whoever may write to a store must not reach the terminal of those who look at it. launcher/view/console.py does the same
for tables and bars. rich takes too long to import for a line.
"""

import re
import sys
from typing import TextIO

# These are all control characters but line breaks and tabs, those that reorder the text of a line, and surrogates,
# which no encoding has.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return `text` with each control character as its escape, such as \x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_lines(text: str) -> str:
    """Return a log whose programs return to the beginning of a line to write it anew, as bars do.

    Each such time becomes a line.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n")


def put(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print text that may hold anything, at once."""
    print(visible(text), end=end, file=file or sys.stdout, flush=True)
