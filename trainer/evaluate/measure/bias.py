"""Pairs of sentences that differ in the word for a group: how much likelier does the model find the first?

The gaps are measured before and after training.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trainer.config.paths import text_lines
from trainer.data.format import strict_json
from trainer.errors import NOT_JSON, ConfigError


class SentencePair(NamedTuple):
    """Two sentences, and the group that they are counted with."""

    group: str
    first: str
    second: str


class Gaps(NamedTuple):
    """Mean and standard deviation, over the pairs of a group, of log p(first) - log p(second) in nats."""

    mean: float
    std: float


def read_pairs(path: str) -> list[SentencePair]:
    """Read the pairs of the JSONL file of `eval.bias`, whose rows are {"group": "...", "pair": ["...", "..."]}.

    Raises:
        ConfigError: the file cannot be read, or a row is something else.
    """
    pairs = [_pair(line, f"eval.bias: {path}:{number}") for number, line in text_lines(path, "eval.bias")]
    if not pairs:
        raise ConfigError(f"eval.bias: {path!r} holds no pair.")
    return pairs


def _pair(line: str, where: str) -> SentencePair:
    try:
        row = strict_json.loads(line)
        (first, second), group = row["pair"], row["group"]
    except (*NOT_JSON, KeyError, TypeError) as error:
        raise ConfigError(f'{where}: a row is {{"group": "...", "pair": ["...", "..."]}}.') from error
    if not all(isinstance(value, str) and value for value in (first, second, group)):
        raise ConfigError(f"{where}: group and both sentences are texts, and not empty.")
    return SentencePair(group, first, second)


def gaps(pairs: Sequence[SentencePair], log_p: Sequence[float]) -> dict[str, Gaps]:
    """Return the gaps by group. The input alternates log p of the first and of the second sentence of each pair."""
    found: dict[str, list[float]] = {}
    for number, pair in enumerate(pairs):
        found.setdefault(pair.group, []).append(log_p[2 * number] - log_p[2 * number + 1])
    return {group: Gaps(statistics.fmean(values), statistics.pstdev(values)) for group, values in found.items()}


def to_json(pairs: Sequence[SentencePair], sides: Mapping[str, Mapping[str, Gaps]]) -> dict[str, object]:
    """Return JSON of `sides`, the gaps before and after by their names."""
    counts = Counter(pair.group for pair in pairs)
    return {
        group: {"pairs": count, **{side: found[group]._asdict() for side, found in sides.items()}}
        for group, count in counts.items()
    }
