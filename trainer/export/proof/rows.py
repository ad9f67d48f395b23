"""The rows on which a proof compares two models: documents of the run's own data, the same ones at every call.

The Kullback-Leibler divergence and the trained tokens' log-probabilities say how far apart two models' predictions are.
Differences of single logits say little: real models have logits above a hundred. The last bits of these in bf16 are
worth a whole nat each and yet hardly move a probability.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.base.base import Base
from trainer.base.find.media import numbered
from trainer.base.find.processor import PROMPTS, read_processor
from trainer.config import Config
from trainer.config.objective import HEADS
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.compile.prepare import locate
from trainer.data.dataset.dataset import ID_BITS, SEGMENT_BITS, TARGET_BIT, Dataset, ReadBlocks, open_chapter
from trainer.data.format.row_format import PICTURES
from trainer.errors import ConfigError, DataError, StorageError
from trainer.run.folder import store_of
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.store import Store
from trainer.tuning.head import WithHead

ROWS, TOKENS, TARGETS = 8, 512, 32  # the most: rows, tokens of a row, and trained tokens that are looked at in a row
_CANDIDATES = 64  # documents; some may have no trained tokens
_FALLBACK_TOKENS = 64


@dataclass(frozen=True)
class ProbeRow:
    """One unpacked document or its end.

    Attributes:
        tokens: (1, T) int64.
        places: (P,) int64, the positions whose next token is trained.
        targets: (P,) int64, that token.
        pictures: what the base's processor made of the document, beside its tokens, for the class that people load.
        entries: the bytes of the pictures' entries in their data set, whose folder is `folder`.
    """

    tokens: Tensor
    places: Tensor
    targets: Tensor
    beside_zero: bool = False
    pictures: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    entries: bytes = b""
    folder: str = ""


@dataclass(frozen=True)
class Probe:
    """The rows, and a description of them, such as "8 rows of the evaluation data"."""

    rows: list[ProbeRow]
    origin: str


def judged(probe: Probe, head: WithHead | None) -> Probe:
    """Return the rows as a `head` is compared on them.

    If the outputs of a head stand for themselves (a reward, or several classes), all of them are compared at once, at
    the end of the text: the tokens that are trained there name none of its outputs.
    """
    if head is None or not (head.head.several or head.outputs == 1):
        return probe
    kept = slice(1) if head.head.several else slice(None)
    rows = [
        replace(row, places=row.places[kept], targets=torch.zeros_like(row.targets[kept]), beside_zero=True)
        for row in probe.rows
    ]
    return replace(probe, rows=rows)


def find_probe(folder: Store, config: Config, manifest: CheckpointManifest, base: Base, most: int = ROWS) -> Probe:
    """Find some rows of the run's compiled evaluation data, else of its training data, else random tokens.

    Compiled data may have been deleted, or may never have been in this store.
    """
    root = store_of(folder)
    for what, fingerprint in _datasets(config, manifest, base, root):
        try:
            rows = _some_rows(open_chapter(root, fingerprint, 0), config, base, most)
        except StorageError:  # or `NotFound`, which is a StorageError
            continue
        if rows:
            return Probe(rows, f"{len(rows)} rows of the {what} data{_said_of_files(rows)}")
    tokens = torch.arange(3, 3 + _FALLBACK_TOKENS).remainder(base.architecture.vocabulary)
    row = ProbeRow(tokens[None], torch.arange(_FALLBACK_TOKENS - 1), tokens[1:])
    if base.architecture.reads_prompts:
        row = replace(row, pictures={PROMPTS: (tokens > _FALLBACK_TOKENS // 2).long()[None]})
    return Probe([row], f"tokens 3 to {2 + _FALLBACK_TOKENS}, as the run's compiled data is gone")


def _said_of_files(rows: Sequence[ProbeRow]) -> str:
    """Say how many of the rows have files of each modality: ", 3 of them with pictures"."""
    from trainer.data.dataset.pictures import PICTURE

    entries = (np.frombuffer(row.entries, PICTURE) for row in rows)
    numbers = Counter(int(number) for own in entries for number in np.unique(own["modality"]))
    return "".join(f", {count} of them with {numbered(number).noun}s" for number, count in sorted(numbers.items()))


def _some_rows(data: Dataset, config: Config, base: Base, most: int) -> list[ProbeRow]:
    if ROW_KINDS[config.data.kind].sees:
        return _seen_rows(data, base, most)
    return list(_rows(data, _reader(config)))[:most]


def training_rows(folder: Store, config: Config, manifest: CheckpointManifest, most: int) -> list[Tensor]:
    """Return the tokens (T,) of some documents of the run's training data, at even distances.

    Raises `ConfigError` if there are none, or if they are only a part of what the base is trained on.
    """
    if ROW_KINDS[config.data.kind].sees:
        raise ConfigError(
            "rounding: gptq computes the base over tokens alone, and the run's rows have pictures, videos or sounds."
            " Leave rounding out."
        )
    try:
        rows = [row.tokens[0] for row in _rows(open_chapter(store_of(folder), manifest.dataset, 0), _reader(config))]
    except StorageError as error:
        raise ConfigError(
            f"rounding: gptq looks at rows of the run's training data, which cannot be read ({error}) Leave rounding"
            " out."
        ) from error
    if not rows:
        raise ConfigError(
            "rounding: gptq looks at rows of the run's training data, which has none. Leave rounding out."
        )
    return rows[:most]


def _reader(config: Config) -> "Callable[[NDArray[np.uint32]], ProbeRow | None]":
    return _tags if (head := HEADS.get(config.objective.name)) is not None and head.per_token else _row


def _datasets(config: Config, manifest: CheckpointManifest, base: Base, root: Store) -> Iterator[tuple[str, str]]:
    try:
        found = locate(config, base)
    except (ConfigError, DataError, StorageError):  # the sources are gone; their compiled data may still be there
        found = {}
    if "eval" in found:
        yield "evaluation", found["eval"]
    yield "training", manifest.dataset


def _rows(data: Dataset, read: Callable[[NDArray[np.uint32]], ProbeRow | None]) -> Iterator[ProbeRow]:
    """Yield documents at even distances, each cut to its last tokens up to the last one that is trained."""
    for number, blocks in _candidates(data):
        row = read(blocks.gather(number))
        if row is not None:
            yield row


def _candidates(data: Dataset) -> Iterator[tuple[NDArray[np.int64], ReadBlocks]]:
    """Yield the numbers (1,) of documents at even distances, each with the block that has it."""
    documents = len(data.offsets) - 1
    for number in np.unique(np.linspace(0, documents - 1, _CANDIDATES, dtype=np.int64)):
        block = np.searchsorted(data.blocks, number, side="right") - 1
        yield np.array([number]), data.read(np.array([block]))


def _seen_rows(data: Dataset, base: Base, most: int) -> list[ProbeRow]:
    """Return documents from their beginning to their end, those with pictures first.

    The tokens of a picture are useless in part, and positions behind it count from the beginning."""
    from trainer.data.dataset.pictures import entries_in
    from trainer.data.order.pictures import PictureReader
    from trainer.data.order.stream import tokens_before_answer

    found = list[tuple[ProbeRow, NDArray[np.uint32], NDArray[np.uint8]]]()
    for number, blocks in _candidates(data):
        stored = blocks.gather(number)
        if (row := _row(stored, whole=True)) is not None:
            found.append((row, stored, blocks.gather_column(PICTURES, number)[0]))
    found.sort(key=lambda one: not len(one[2]))
    reader = PictureReader(data.store, read_processor(base.directory, base.name))
    rows = list[ProbeRow]()
    for row, stored, values in found[:most]:
        own = stored[: row.tokens.shape[1]]  # the first of several answers, and its pictures
        values = values[entries_in(values)["begin"] < len(own)]
        ids = (own & ID_BITS).astype(np.int32)
        seen = reader.begin(values, [0] * len(values), [ids], [tokens_before_answer(own)]).arrived()
        inputs = seen[0].inputs if seen else {}
        rows.append(replace(row, pictures=inputs, entries=values.tobytes(), folder=data.store.uri))
    return rows


def _tags(stored: NDArray[np.uint32]) -> ProbeRow:
    """Return a text and the tags of its words, whose numbers follow it."""
    text, tags = np.split(stored, 2)
    text, tags = text[:TOKENS], tags[:TOKENS]
    places = np.flatnonzero(tags & TARGET_BIT)[:TARGETS]
    numbers = torch.from_numpy((tags[places] & ID_BITS).astype(np.int64))
    return ProbeRow(torch.from_numpy((text & ID_BITS).astype(np.int64))[None], torch.from_numpy(places), numbers)


def _row(stored: NDArray[np.uint32], whole: bool = False) -> ProbeRow | None:
    second = np.flatnonzero(stored & SEGMENT_BITS)
    stored = stored[: second[0]] if len(second) else stored  # the first of several answers
    trained = np.flatnonzero(stored & TARGET_BIT)
    if not len(trained):
        return None
    first, end = (0, len(stored)) if whole else (max(0, int(trained[-1]) + 1 - TOKENS), int(trained[-1]) + 1)
    tokens = torch.from_numpy((stored[first:end] & ID_BITS).astype(np.int64))
    seen = trained[trained > first] - first  # nothing predicts the first token of a row
    if not len(seen):
        return None
    chosen = torch.from_numpy(seen[np.unique(np.linspace(0, len(seen) - 1, TARGETS, dtype=np.int64))])
    return ProbeRow(tokens[None], chosen - 1, tokens[chosen])


class Distance(NamedTuple):
    """The distance of two models. Both values are means over the places of all rows, in nats a token.

    `kl` is KL(one || other) of the next token's distributions. `log_prob` is the absolute difference of the
    log-probability of the token that is trained there.
    """

    kl: float
    log_prob: float


def as_shares(outputs: Tensor, row: ProbeRow) -> Tensor:
    """Return the outputs (P, outputs) of a head as logits of a distribution.

    Outputs of classes are logits already. Other outputs get a 0 beside them: a softmax over an output and 0 is the
    logistic function of the output.
    """
    return torch.nn.functional.pad(outputs, (0, 1)) if row.beside_zero else outputs


def distance(one: Sequence[Tensor], other: Sequence[Tensor], rows: Sequence[ProbeRow]) -> Distance:
    """Return the distance of `one` and `other`: for each row the logits (P, V) at its places.

    It is computed in fp64, a row at a time.
    """
    divergences, differences = list[Tensor](), list[Tensor]()
    for ours, theirs, row in zip(one, other, rows, strict=True):
        log_p, log_q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        differences.append((log_p - log_q).gather(-1, row.targets[:, None]).abs())
    return Distance(float(torch.cat(divergences).mean()), float(torch.cat(differences).mean()))
