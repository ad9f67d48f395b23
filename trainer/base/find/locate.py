"""Locates the base model, its files and its description.

Weights stay where they are, in a directory or a bucket. config.json and the tokenizer's files are always in a
directory. known.jsonl has the sizes of well-known bases, for plans without the Hub, or before a licence is accepted
there. It has one line for each config.json: the Hub ids that have it, the number of parameters that the makers state,
in billions, and the parts that give the base's sizes. `python -m tests.known_bases` writes it.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.base.base import Base, Description, file_versions
from trainer.base.describe.description import describe
from trainer.base.find.small_files import (
    CONFIG,
    SMALL_FILES,
    SmallFiles,
    fetched_small_files,
    kept_small_files,
    read_config,
    read_scaled,
    read_small_files,
    rescaled,
)
from trainer.config import Model
from trainer.config.paths import check_files, local_path
from trainer.errors import BaseOutOfReach, ConfigError, first_line
from trainer.store.hub import hub_answers, hub_host
from trainer.store.local_copy import CopiedStore, check_room
from trainer.store.safetensors_index import HeaderText, read_header_texts
from trainer.store.store import SCHEMES, Store, open_store
from trainer.store.tokenizer_files import NAMED_TEMPLATES

if TYPE_CHECKING:
    from trainer.processes.ranks import Ranks

# Subfolders on the Hub hold other formats, and consolidated files hold the same weights under other names.
_LEFT_ON_THE_HUB = [
    *(f"{NAMED_TEMPLATES[:at]}[!{NAMED_TEMPLATES[at]}]*/*" for at in range(len(NAMED_TEMPLATES))),
    "consolidated*",
]
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # a path that begins with a dot is none


class ReadInBucket(NamedTuple):
    """The small files of a base in a bucket, and the headers and the versions of its files of weights.

    A start reads these before the weights.
    """

    small: SmallFiles
    headers: dict[str, HeaderText]
    versions: list[tuple[str, int, str]]


def resolve_base(model: Model, told: ReadInBucket | None = None) -> Base:
    """Find the base: a directory, a bucket's folder, or a Hub id (downloaded through huggingface_hub's cache).

    A base in a bucket is not asked for what another rank has read there and `told`.

    Raises:
        ConfigError: it is missing, has no config.json, or its architecture is not supported.
        StorageError: the bucket does not answer or refuses.
    """
    local = None if in_bucket(model.base) else _directory(model, [*SMALL_FILES, "*.safetensors"])
    store = open_store(str(local or model.base), setting="model.base")
    if told and model.local_copy:
        copied = {key: version for key, _, version in told.versions}
        store = CopiedStore(store, local_path(model.local_copy, "model.local_copy"), copied)
    name, texts, versions = str(local or store.uri), told and told.headers, told and told.versions
    small = local or (kept_small_files(told.small) if told else fetched_small_files(store))
    directory, config = read_scaled(name, small, model.rope_scaling)
    description = describe(config, model.layers, name=name)
    return Base(name, directory, store, config, description, model.tokens, texts, versions)


def resolve_base_alike(model: Model, ranks: "Ranks") -> Base:
    """Find the base on all ranks. Rank 0 alone asks a bucket for what is not weights. Collective.

    Raises as `resolve_base`, and as `read_headers` for a base in a bucket.
    """
    told = None
    if in_bucket(model.base):
        told = ranks.on_first(lambda: _read_in_bucket(open_store(model.base, setting="model.base")))
    with ranks.agreeing():
        base = resolve_base(model, told)
        if told and model.local_copy and isinstance(base.store, CopiedStore) and ranks.local_rank == 0:
            total = sum(header.size for header in told.headers.values())
            needed = total * ranks.ranks_per_node // ranks.world_size
            check_room(base.store, local_path(model.local_copy, "model.local_copy"), needed, "model.local_copy")
        return base


def _read_in_bucket(store: Store) -> ReadInBucket:
    headers = read_header_texts(store)
    return ReadInBucket(read_small_files(store), headers, file_versions(store))


def base_files(model: Model) -> Path:
    """A directory with config.json and the tokenizer's files. Does not download weights."""
    if in_bucket(model.base):
        found = fetched_small_files(open_store(model.base, setting="model.base"))
    else:
        found = _directory(model, list(SMALL_FILES))
    scaled = model.rope_scaling.rope_type is not None and (found / CONFIG).is_file()
    return read_scaled(model.base, found, model.rope_scaling)[0] if scaled else found


def _directory(model: Model, patterns: list[str]) -> Path:
    """The local directory, or the snapshot of a Hub id with the files that match."""
    directory = local_path(model.base, "model.base")
    if directory.is_dir():
        check_files((*directory.glob("*"), *directory.glob(f"{NAMED_TEMPLATES}/*")), "model.base")
        return directory
    if not is_hub_id(model.base):
        raise ConfigError(
            f"model.base: the directory {model.base!r} does not exist. Give a Hugging Face model directory, a bucket's "
            "URI or a Hub id."
        )
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model.base,
                revision=model.revision,
                allow_patterns=patterns,
                ignore_patterns=_LEFT_ON_THE_HUB,
                local_files_only=HF_HUB_OFFLINE or not hub_answers(),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = first_line(error)
        if HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, and the cache lacks it"
        elif not hub_answers():
            reason = f"{hub_host()} cannot be reached from here, and the cache lacks it"
        elif isinstance(error, GatedRepoError):
            reason = "its licence has to be accepted there first, and HF_TOKEN set"
        at = f" at model.revision={model.revision}" if model.revision else ""
        said = (
            f"model.base: {model.base!r} is no directory here, and the Hub did not give it{at} ({reason}). Check the"
            f" name{', the revision' if at else ''}, HF_TOKEN for a gated model, or download it to a directory first."
        )
        if HF_HUB_OFFLINE or not hub_answers() or isinstance(error, GatedRepoError):
            raise BaseOutOfReach(said, reason) from error
        raise ConfigError(said) from error


def describe_base(model: Model) -> Description:
    """The description of the base by its config.json. Does not download weights. Raises as `resolve_base`."""
    return describe(read_config(model.base, base_files(model)), model.layers, name=model.base)


@dataclass(frozen=True)
class AtHand:
    """The parts of a base that a plan needs.

    `directory` has its config.json and the tokenizer's files. It is None if the sizes come from Capstan's own list,
    which the sentence `said` then tells. That list may lack the sizes of the tower, of which `assumes_sight`
    tells."""

    description: Description
    directory: Path | None
    said: str | None = None
    assumes_sight: str | None = None


def base_at_hand(model: Model) -> AtHand:
    """The description of the base, as by `describe_base`. A well-known base needs no Hub. Raises as `resolve_base`."""
    try:
        directory = base_files(model)
    except BaseOutOfReach as error:
        config = known_config(model.base)
        if config is None:
            raise
        said = (
            f"model.base: {model.base} was not seen ({error.reason}); its sizes are those that Capstan has with it of"
            " well-known bases, and neither its tokenizer nor its files were looked at."
        )
        if model.rope_scaling.rope_type:
            config = rescaled(config, model.rope_scaling)
        assumes = None
        if set(config.get("vision_config", ())) == {"model_type"}:
            assumes = (
                f"model.base: the config.json of {model.base} was not seen, so the sizes of its vision encoder are"
                " transformers' defaults. Give a folder with that config.json."
            )
        return AtHand(describe(config, model.layers, name=model.base), None, said, assumes)
    return AtHand(describe(read_config(model.base, directory), model.layers, name=model.base), directory)


def in_bucket(base: str) -> bool:
    return base.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def on_the_hub(base: str) -> bool:
    """Whether `base` is a Hub id, and not a directory of this machine."""
    return is_hub_id(base) and not local_path(base, "model.base").is_dir()


def is_hub_id(base: str) -> bool:
    """Whether `base` has the form of a Hub id. A directory of that name takes precedence."""
    return bool(_HUB_ID.fullmatch(base))


def check_mergeable(model: Model, base: Description) -> None:
    """Raises `ConfigError` if an adapter cannot be merged into the base. Reads no weights."""
    if base.stored.unmergeable:
        raise ConfigError(
            f"there is no merged model: {model.base} is {base.stored.unmergeable}. Take --format peft: PEFT and vLLM"
            " load the adapter beside it."
        )
    if model.layers:
        raise ConfigError(
            f"there is no merged model: the run has the first {model.layers} layers of its base only (model.layers),"
            " and would leave the rest untrained. Take --format peft."
        )


FILE = Path(__file__).with_name("known.jsonl")


def known_config(base: str) -> dict[str, Any] | None:
    """The known parts of the parsed config.json of the Hub id `base`. None for an unknown base."""
    return _configs().get(base.lower())


@cache
def _configs() -> dict[str, dict[str, Any]]:
    """Hub id in lower case -> config.json. The Hub does not distinguish upper and lower case."""
    entries = map(json.loads, FILE.read_text().splitlines())
    return {name.lower(): entry["config"] for entry in entries for name in entry["ids"]}
