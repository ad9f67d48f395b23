"""The sizes of well-known bases, by which they are planned where the Hub is out of reach or wants a licence accepted
first.

known.jsonl has one line for each config.json: the Hub ids that have it, the parameters that the makers state, in
billions, and the parts that say of what sizes the base is. `python -m tests.known_bases` writes it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("known.jsonl")


def known_config(base: str) -> dict[str, Any] | None:
    """The parsed config.json of the Hub id `base` as far as it is known here; None for a base that is not."""
    return _configs().get(base.lower())


@cache
def _configs() -> dict[str, dict[str, Any]]:
    """By Hub id in small letters, as the Hub does not tell them apart."""
    entries = map(json.loads, FILE.read_text().splitlines())
    return {name.lower(): entry["config"] for entry in entries for name in entry["ids"]}
