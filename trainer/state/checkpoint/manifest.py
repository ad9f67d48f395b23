"""A committed checkpoint: how it is found, the manifest that proves that it is whole, and how its values are read.

A checkpoint exists when its manifest does. Manifest format 3, JSON: {"format": 3, "sha256": <of the canonical JSON of
body>, "body": {...}}. Readable without torch or DeepSpeed; docs/checkpoint-format.md describes every field.

The folders are found without listing every shard. A hundred checkpoints of a thousand ranks are a hundred thousand
objects: a listing of all takes as many requests as a look into each checkpoint's folder, but a hundred times the bytes,
and on a disk a look at each file.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.errors import NOT_JSON, ConfigError, Damaged, NotFound, NothingToResume, StorageError
from trainer.run import layout
from trainer.run.evaluations import json_number
from trainer.state.checkpoint.shard import Contents, EvenDivision, Key, Shard, tensors_of, title, verify_shard
from trainer.state.optimizer import Interval, optimizers, states_by_name
from trainer.store.json_text import canonical, digest_of, digest_of_text
from trainer.store.store import PART_BYTES, Buffer, Entry, Store, read_twice
from trainer.store.tokenizer_files import is_tokenizer_file

_LOOKS_AT_A_TIME = 16


class StepFolder(NamedTuple):
    """The folder of one step's checkpoint, with the number of attempts at its save. It is committed if it has a
    manifest.
    """

    step: int
    manifest: Entry | None
    attempts: int


def step_folders(folder: Store) -> list[StepFolder]:
    """The folders, newest first: one request, and one more for each folder."""
    with ThreadPoolExecutor(_LOOKS_AT_A_TIME) as pool:
        return list(pool.map(lambda step: _look(folder, step), _steps(folder)))


def newest_commit(folder: Store) -> StepFolder | None:
    """The newest committed step. Two requests, unless the newest folders belong to saves that were never committed."""
    looks = (_look(folder, step) for step in _steps(folder))
    return next((found for found in looks if found.manifest is not None), None)


def _steps(folder: Store) -> list[int]:
    names = folder.children(layout.CHECKPOINTS)[0]
    return sorted((step for name in names if (step := layout.step_of_folder(name)) is not None), reverse=True)


def _look(folder: Store, step: int) -> StepFolder:
    attempts, entries = folder.children(layout.checkpoint(step))
    manifest = next((entry for entry in entries if entry.key == layout.manifest(step)), None)
    return StepFolder(step, manifest, len(set(attempts) - {layout.ADAPTER}))


def committed_steps(folder: Store) -> list[int]:
    """The steps that have a manifest, newest first. Only reading a manifest shows whether the checkpoint is whole."""
    return [found.step for found in step_folders(folder) if found.manifest is not None]


FORMAT = 3

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]
_Place = Annotated[str, Field(pattern="^(epoch|chapter|window|bin)$")]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _tokenizer_file(name: str) -> str:
    """Raises `ValueError` for any other name, because whoever reads the run writes these files."""
    if not is_tokenizer_file(name):
        raise ValueError("it is no file of a tokenizer")
    return name


_TokenizerFile = Annotated[str, AfterValidator(_tokenizer_file)]
_Shape = Annotated[list[_Positive], Field(max_length=8)]


def _as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """Raises `ValueError` for a number that JSON lacks, such as NaN, which Python's reader takes."""
    json.dumps(facts, allow_nan=False)
    return facts


_Facts = Annotated[dict[str, Any], AfterValidator(_as_json)]


@dataclass(frozen=True)
class TextHashes:
    """SHA-256 of each file of the tokenizer, and of the chat template if `data.template` replaces the
    tokenizer's own.
    """

    tokenizer: dict[_TokenizerFile, _Sha256]
    template: _Sha256 | None


@dataclass(frozen=True)
class CheckpointManifest:
    """A committed checkpoint: the state after `step` updates."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, allow_inf_nan=False)

    step: Annotated[int, Field(ge=0, lt=10**9)]
    generation: _Count
    world_size: _Positive
    created: Annotated[float, Field(ge=0, lt=253_402_300_800)]  # seconds since 1970, before the year 10,000
    updates: _Count  # the optimizer's own step count
    position: dict[_Place, _Count]  # of the data
    dataset: str  # fingerprint of the compiled training data
    order: _Facts  # what else the data's order depends on: version, seed, packing, weights, sequence length
    base: _Facts  # path and fingerprint of the base, and how it is quantized
    adapter: _Facts  # method, rank, alpha and targets
    groups: dict[str, _Facts]  # of the optimizer: name -> hyperparameters
    versions: dict[str, str]  # of the software that wrote it
    # Nats a target token, if the step was evaluated. An infinite loss is not recorded, because it cannot be compared.
    eval_loss: Annotated[float | None, BeforeValidator(json_number)]
    shapes: Annotated[dict[str, _Shape], Field(min_length=1)]  # of every trainable parameter
    shards: list[Shard]  # in the order of the ranks that wrote them
    objective: _Facts = field(default_factory=dict)  # name and settings, without those of sft and of defaults
    optimizer: str = "adamw"  # it decides which states the shards hold
    text: TextHashes | None = None  # whose content is in the run's folder
    # The fingerprint of the data that `eval_loss` is of, which may change in the course of a run.
    eval_data: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements of every trainable parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def division(self) -> EvenDivision:
        """The elements that each of `shards` holds."""
        return EvenDivision(self.numels, len(self.shards))

    @cached_property
    def contents(self) -> Contents:
        """The values of each state that the `shards` hold."""
        return Contents(self.division, states_by_name(self.optimizer, self.shapes), len(self.shards))

    def problem(self) -> str | None:
        """Why this cannot be a whole checkpoint, whatever its shards contain; None if it can."""
        if any(layout.shard_step(shard.key) != self.step for shard in self.shards):
            return f"it names files that are no shards of step {self.step}"
        if len(self.shards) != self.world_size:
            return f"it names {len(self.shards)} shards, but {self.world_size} ranks wrote it"
        if len({shard.key for shard in self.shards}) < len(self.shards):
            return "it names a shard twice"
        states = ((state, self.numels[name]) for name, found in self.contents.states.items() for state in found)
        if self.size < sum(state.item * state.size(numel) for state, numel in states):
            return "its shards are too small for the parameters that it names"
        return None

    def to_json(self) -> bytes:
        body = asdict(self) | {"eval_loss": json_number(self.eval_loss)}
        if not self.objective:
            del body["objective"]  # manifests of the next-token loss are those of before there were others
        for name in ("text", "eval_data"):
            if body[name] is None:
                del body[name]
        if self.optimizer == "adamw":
            del body["optimizer"]  # and so are those of AdamW
        tree = {"format": FORMAT, "sha256": digest_of(body), "body": body}
        return json.dumps(tree, sort_keys=True, allow_nan=False).encode()


def comparable_losses(manifests: Iterable[CheckpointManifest]) -> dict[int, float]:
    """Step -> evaluation loss of the `manifests`, newest first, that were evaluated on the same data as the newest of
    them. A manifest that does not name its data counts as the same.
    """
    evaluated = [(found.step, found.eval_loss, found.eval_data) for found in manifests if found.eval_loss is not None]
    newest = next((data for _, _, data in evaluated if data is not None), None)
    return {step: loss for step, loss, data in evaluated if data in (None, newest)}


_READER = TypeAdapter(CheckpointManifest)


def parse_manifest(data: bytes, where: str) -> CheckpointManifest:
    """The manifest in `data`. Its shards hold every trainable element exactly once, if they are what it says.

    Raises `Damaged` when it is none, and `StorageError` when it is of another format.
    """
    try:
        tree = json.loads(data)
        number, body, digest = tree["format"], tree["body"], tree["sha256"]
        text = canonical(body)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{where} is damaged: it is not a manifest.") from error
    if type(number) is not int:
        raise Damaged(f"{where} is damaged: it is not a manifest.")
    if number != FORMAT:
        raise StorageError(
            f"{where} is of format {number}; this version reads format {FORMAT}. Use the version that wrote it."
        )
    if digest != digest_of_text(text):
        raise Damaged(f"{where} is damaged: its content does not match its sha256.")
    try:
        manifest = _READER.validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        raise Damaged(f"{where} is damaged: {'.'.join(map(str, found['loc']))}: {found['msg']}.") from error
    if manifest.optimizer not in optimizers():
        raise StorageError(
            f"{where} is of the optimizer {manifest.optimizer!r}, which this version does not have. Use the version"
            " that wrote it."
        )
    if problem := manifest.problem():
        raise Damaged(f"{where} is damaged: {problem}.")
    return manifest


def write_doubt(folder: Store, steps: Iterable[int], generation: int, reason: str) -> None:
    """Say that the checkpoints of these steps which `generation` has written, or is writing, are in doubt."""
    for step in steps:
        folder.put(layout.doubt(step, generation), json.dumps({"reason": reason}).encode())


def read_doubt(folder: Store, manifest: CheckpointManifest) -> str | None:
    """Why a checkpoint is in doubt, though it is whole; None if it is not."""
    try:
        return str(json.loads(folder.get(layout.doubt(manifest.step, manifest.generation)))["reason"])
    except NotFound:
        return None
    except (*NOT_JSON, KeyError, TypeError):
        return "the file that says why cannot be read"


@read_twice
def read_manifest(folder: Store, step: int) -> CheckpointManifest:
    """Read a manifest. Raises `NotFound`, and what `parse_manifest` raises."""
    key = layout.manifest(step)
    manifest = parse_manifest(folder.get(key), f"{folder.uri}/{key}")
    if manifest.step != step:
        raise Damaged(f"{folder.uri}/{key} is damaged: it is the manifest of step {manifest.step}.")
    return manifest


def readable_manifests(
    folder: Store, skipped: list[str], steps: list[int] | None = None
) -> Iterator[CheckpointManifest]:
    """Committed checkpoints (of `steps`), newest first; the reason for every damaged one is added to `skipped`.

    Raises `StorageError` when the store cannot be read or a manifest is of an unknown format: neither is damage.
    """
    for step in committed_steps(folder) if steps is None else steps:
        try:
            yield read_manifest(folder, step)
        except (Damaged, NotFound) as error:
            skipped.append(str(error))


def problems_of(folder: Store, manifest: CheckpointManifest) -> list[str]:
    """The problems of the manifest's shards. A store that fails raises `StorageError`."""
    found = (shard_problem(folder, manifest, number) for number in range(len(manifest.shards)))
    return [problem for problem in found if problem]


def shard_problem(folder: Store, manifest: CheckpointManifest, number: int) -> str | None:
    """The problem of one of the manifest's shards, or None."""
    return verify_shard(folder, manifest.shards[number], manifest.contents.of(number))


def check_step(folder: Store, steps: Sequence[int], step: int | None) -> None:
    """Check that the run has checkpoints, its `steps`, and one of `step` if that is given. Raises as `whole_checkpoint`
    does.
    """
    if not steps:
        raise NothingToResume(f"{folder.uri} has no committed checkpoint.")
    if step is not None and step not in steps:
        raise ConfigError(
            f"--step: {folder.uri} has no committed checkpoint of step {step}. Its steps are:"
            f" {', '.join(map(str, sorted(steps)))}."
        )


def chosen_step(folder: Store, step: int | None, *, best: bool) -> int | None:
    """The step of `--step`, or with `--best` that of the lowest evaluation loss, the newer of equals, over the data of
    the newest evaluation; with neither None, which stands for the newest that is whole. Reads manifests, no shards:
    `whole_checkpoint` of the step proves it.

    Raises:
        NothingToResume: the run has no committed checkpoint.
        ConfigError: both were given, there is no such step, or no checkpoint was evaluated; it names the steps that
            there are.
    """
    if best and step is not None:
        raise ConfigError(f"--best chooses the step, and --step {step} names one. Leave out one of them.")
    if step is None and not best:
        return None
    steps = committed_steps(folder)
    check_step(folder, steps, step)
    if step is not None:
        return step
    losses = comparable_losses(readable_manifests(folder, [], steps))
    if not losses:
        raise ConfigError(
            f"--best: no checkpoint of {folder.uri} was evaluated when it was saved (eval.every). Name one with --step."
            f" Its steps are: {', '.join(map(str, sorted(steps)))}."
        )
    return min(losses, key=lambda found: (losses[found], -found))


def whole_checkpoint(folder: Store, step: int | None = None, *, by_manifest: bool = False) -> CheckpointManifest:
    """The checkpoint of `step`, or the newest whose shards all verify; damaged ones are passed over. With `by_manifest`
    a readable manifest is enough and no shard is read, as for a dry run.

    Raises:
        NothingToResume: there is none.
        ConfigError: there are, but none of that step.
        StorageError: there are, but not a whole one.
    """
    steps = committed_steps(folder)
    check_step(folder, steps, step)
    wanted = steps if step is None else [step]
    while True:
        skipped: list[str] = []
        for manifest in readable_manifests(folder, skipped, wanted):
            problems = [] if by_manifest else problems_of(folder, manifest)
            if not problems:
                return manifest
            skipped += problems
        # A run that is training may have removed all of them meanwhile, in favour of newer ones.
        wanted = [newer for newer in committed_steps(folder) if newer > max(wanted)] if step is None else []
        if not wanted:
            break
    which = "no checkpoint" if step is None else f"the checkpoint of step {step}"
    raise StorageError(f"{which} of {folder.uri} is {'' if step is None else 'not '}whole: {skipped[0]}")


class StateSlice(NamedTuple):
    """Values [begin, end) of one state of a parameter."""

    key: Key
    begin: int
    end: int


def plan_reads(contents: Contents, wanted: Mapping[Key, Interval]) -> Iterator[tuple[int, dict[Key, Interval]]]:
    """(shard, what to read of it) for each shard that holds some of `wanted`; both are intervals by state."""
    holders = {shard for key, interval in wanted.items() for shard in contents.holders(key, *interval)}
    for shard in sorted(holders):
        overlaps: dict[Key, Interval] = {}
        for key, (first, last) in contents.of(shard).items():
            begin, end = wanted.get(key, (0, 0))
            if max(begin, first) < min(end, last):
                overlaps[key] = max(begin, first), min(end, last)
        yield shard, overlaps


def read_elements(
    folder: Store, manifest: CheckpointManifest, wanted: Mapping[Key, Interval]
) -> Iterator[tuple[StateSlice, Buffer]]:
    """Yield every wanted value once, as slices with their bytes. Raises `Damaged` if a shard holds something else than
    its manifest says.

    Only these bytes leave the store: near ones in one request, and a part's worth at a time.
    """
    for number, overlaps in plan_reads(manifest.contents, wanted):
        shard, contents = manifest.shards[number], manifest.contents.of(number)
        tensors = tensors_of(folder, shard, contents)
        batch, ranges, size = list[StateSlice](), list[Interval](), 0
        for key, (begin, end) in overlaps.items():
            if size > PART_BYTES:
                yield from _fetched(folder, shard, batch, ranges)
                batch, ranges, size = [], [], 0
            first = contents[key][0]
            batch.append(StateSlice(key, begin, end))
            ranges.append(tensors[title(key)].byte_range(begin - first, end - first))
            size += key.state.item * (end - begin)
        yield from _fetched(folder, shard, batch, ranges)


def _fetched(
    folder: Store, shard: Shard, slices: list[StateSlice], ranges: list[Interval]
) -> Iterator[tuple[StateSlice, Buffer]]:
    data = folder.get_ranges(shard.key, [begin for begin, _ in ranges], [end for _, end in ranges])
    yield from zip(slices, data, strict=True)
