"""The sizes of well-known bases, for plans without the Hub, or before a licence is accepted there.

known.jsonl has one line for each config.json: the Hub ids that have it, the number of parameters that the makers state,
in billions, and the parts that give the base's sizes. `python -m tests.known_bases` writes it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("known.jsonl")


def known_config(base: str) -> dict[str, Any] | None:
    """The known parts of the parsed config.json of the Hub id `base`. None for an unknown base."""
    return _configs().get(base.lower())


@cache
def _configs() -> dict[str, dict[str, Any]]:
    """Hub id in lower case -> config.json. The Hub does not distinguish upper and lower case."""
    entries = map(json.loads, FILE.read_text().splitlines())
    return {name.lower(): entry["config"] for entry in entries for name in entry["ids"]}
