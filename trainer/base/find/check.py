"""Checks whether Capstan can train the base with these settings, and knows the facts that identify the base.

All checks run without torch in this process and before any rank starts, so that a wrong base costs only seconds.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from trainer.base.architecture import KeptOfPictures
from trainer.base.base import Base
from trainer.base.describe.description import describe
from trainer.base.describe.torch_answers import Question, kept_answer
from trainer.base.find.locate import in_bucket, resolve_base
from trainer.base.find.media import Modality
from trainer.base.find.small_files import processor_files, read_config, tokenizer_content
from trainer.base.unreadable import unreadable
from trainer.base.weight_samples import hash_whole
from trainer.config import Config, Model
from trainer.config.paths import local_path
from trainer.config.row_kinds import ROW_KINDS
from trainer.errors import NOT_JSON, ConfigError, Damaged, DataError, NotFound
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, read_json


class LeftOutPart(NamedTuple):
    """A part of the files that the language model does not have. The names of its tensors begin with its path."""

    path: str
    tensors: int
    weights: int


def check_base(base: Base, config: Config) -> None:
    """Raises `ConfigError` for any error in the base or its settings that shows before weights are read.

    The weights' names, shapes and types are checked elsewhere (`check_weights`)."""
    wrong = base.description.mismatches(config)
    if wrong:
        raise ConfigError("\n".join(wrong))
    check_base_files(base, config)
    if ROW_KINDS[config.data.kind].sees:
        check_sight(base)


def check_base_files(base: Base, config: Config) -> None:
    """The part of `check_base` that reads other files than config.json: the tokenizer, and the weights' headers."""
    vocabulary = base.architecture.vocabulary
    tokens = tokenizer_size(base.directory, base.name)
    if tokens > vocabulary:
        raise ConfigError(
            f"model.base: the tokenizer of {base.name} has {tokens} tokens, the embedding {vocabulary} rows. "
            "Use the tokenizer that belongs to this model, or resize the embedding with resize_token_embeddings()."
        )
    base.stored.check(base, config)


def tokenizer_size(directory: Path, name: str) -> int:
    """One more than the largest token id, from the tokenizer's own files.

    Raises:
        ConfigError: there are no such files, or they cannot be read.
    """
    if (directory / "tokenizer.json").is_file():
        try:
            return _largest_id(json.loads((directory / "tokenizer.json").read_bytes())) + 1
        except (OSError, *NOT_JSON, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(unreadable(name, "tokenizer.json", error)) from error
    if (directory / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size()
        except (OSError, RuntimeError) as error:
            raise ConfigError(unreadable(name, "tokenizer.model", error)) from error
    raise ConfigError(
        f"model.base: {name} has neither tokenizer.json nor tokenizer.model. Copy the tokenizer's files there."
    )


def _largest_id(tokenizer: dict[str, Any]) -> int:
    vocabulary = tokenizer["model"]["vocab"]
    ids = [len(vocabulary) - 1, *(token["id"] for token in tokenizer.get("added_tokens", []))]
    if not isinstance(vocabulary, list):
        ids += vocabulary.values()
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError("its vocabulary is empty, or has ids that are no whole numbers")
    return max(ids)


def check_weights(base: Base, model: Model) -> list[LeftOutPart]:
    """The parts of the files that training leaves out. The ranks check and find the same when they load.

    Raises:
        ConfigError: the files lack a weight that the architecture needs, have it in another shape or type, or have an
            unknown weight.
        StorageError: the store of the files fails.
    """
    if model.layers:  # what is right for all layers is right for the first, and need not be asked for each number
        with suppress(ConfigError):
            return check_weights(base, model.model_copy(update={"layers": None}))
    given = {"model": model.model_dump(include={"base", "revision", "layers"})}
    question = Question("base.rows.parameters", "left_out_of", given, base.name, "looking for the weights in the files")
    facts = [base.fingerprint, model.layers]
    return kept_answer(question, facts, lambda parts: [LeftOutPart(*part) for part in parts])


def check_weights_at_hand(model: Model) -> list[LeftOutPart]:
    """As `check_weights`, if the files are on this machine or in a bucket.

    For a plan the base may be only a config.json, or still be on the Hub.
    """
    if not in_bucket(model.base) and not local_path(model.base, "model.base").is_dir():
        return []
    base = resolve_base(model)
    return check_weights(base, model) if base.versions else []


def check_sight(base: Base, *, keeps: bool = False) -> float:
    """Return how many values are kept for each token of a picture, if features are kept, as a multiple of its state.

    Raises `ConfigError` if rows with pictures cannot be trained with the base, or with kept features if it `keeps` any.
    """
    given = {
        "directory": str(base.directory),
        "name": base.name,
        "isolates": base.architecture.isolates_documents,
    }
    question = Question(
        "base.load.sight", "sight_of", given, base.name, "trying a small model of its class with pictures or sounds"
    )
    sight = kept_answer(question, _facts_of_sight(base.config, base.directory), dict[str, Any])
    if fails := sight["fails"]:
        raise ConfigError(f"data.format: pictures cannot be trained with {base.name}, as {fails}. Give another base.")
    if keeps and (fails := sight["keeps"]["fails"]):
        raise keeps_no_features(base.name, fails)
    return sight["keeps"]["values"]


def check_taken(directory: Path, name: str, modality: Modality) -> None:
    """Raises `ConfigError` if rows with files of the modality cannot be trained with the base in `directory`, although
    rows with those of another one can."""
    config = read_config(name, directory)
    isolates = describe(config, name=name).architecture.isolates_documents
    given = {"directory": str(directory), "name": name, "isolates": isolates, "kind": modality.kind}
    doing = f"trying a small model of its class with {modality.noun}s"
    question = Question("base.load.sight", "sight_of", given, name, doing)
    facts = [*_facts_of_sight(config, directory), modality.kind]
    if fails := kept_answer(question, facts, dict[str, Any])["fails"]:
        raise ConfigError(
            f"data.format: rows with {modality.noun}s cannot be trained with {name}, as {fails}. Give another base, or"
            f" rows without {modality.noun}s."
        )


def check_mixture(directory: Path, name: str, given: Sequence[Modality]) -> None:
    """Raises `DataError` if the base in `directory` takes no document with files of all of these modalities."""
    kinds = [modality.kind for modality in given]
    nouns = " and ".join(f"{modality.noun}s" for modality in given)
    question = Question(
        *("base.load.sight", "mixture_of", {"directory": str(directory), "name": name, "kinds": kinds}),
        *(name, f"trying a small model of its class with {nouns}"),
    )
    facts = [*_facts_of_sight(read_config(name, directory), directory), "mixture", kinds]
    if fails := kept_answer(question, facts, dict[str, Any])["fails"]:
        raise DataError(f"it has {nouns}, and the base's class takes no document with all of these ({fails})")


def keeps_no_features(base: str, why: str) -> ConfigError:
    """Return the error for a base whose features cannot be kept. `why` is a clause."""
    return ConfigError(
        f"sharding.tower_limit: features cannot be kept with {base}, as {why}. Set a limit that its tower (encoder and"
        " projector) does not exceed."
    )


def _facts_of_sight(config: dict[str, Any], directory: Path) -> list[Any]:
    return [
        config,
        *(
            {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            for files in (processor_files(directory), tokenizer_content(directory))
        ),
    ]


class PictureCost(NamedTuple):
    """A picture takes so many `tokens`, `operations` of the tower, and `seconds` of a core of this machine.
    `of` describes it, because it may also be a video or a sound.

    If that part learns, its backward pass is a part of the operations, with `repeated` in addition where its layers are
    computed again, and it keeps `kept`. `operations` and `kept` are None if they cannot be counted."""

    tokens: int
    operations: int | None
    seconds: float
    of: str = "picture"
    repeated: int = 0
    kept: KeptOfPictures | None = None


class SeesAndLearns(TypedDict):
    """How the tower learns: the type and kernel of the run, and shapes of what learns, by name in a `Lender`.

    What learns are `adapters` of the layers at these paths, with so much dropout, or `changes` of named parameters of
    the modules at these paths."""

    dtype: str
    attention: str
    shapes: dict[str, tuple[int, ...]]
    adapters: list[str]
    dropout: float
    changes: dict[str, list[str]]


def picture_costs(
    base: Base, sizes: Sequence[tuple[int, int]], learning: SeesAndLearns | None = None, modality: int = 0
) -> list[PictureCost]:
    """Return the cost of a picture of each height and width. For another modality, `sizes` are the two numbers that the
    index keeps of each file. Raises `ConfigError` if the base takes no files."""
    given = {"directory": str(base.directory), "name": base.name, "sizes": sizes, "learning": learning}
    given |= {"modality": modality}
    question = Question(
        "base.load.sight_cost", "sight_costs", given, base.name, "counting and timing what pictures cost"
    )
    facts = [*_facts_of_sight(base.config, base.directory), sizes, modality, learning, platform.node()]
    return kept_answer(question, facts, lambda costs: [_cost_of(**cost) for cost in costs])


def _cost_of(kept: dict[str, Any] | None = None, **others: Any) -> PictureCost:
    return PictureCost(**others, kept=None if kept is None else KeptOfPictures(**kept))


def check_sight_at_hand(config: Config, *, keeps: bool = False) -> float | None:
    """As `check_sight`, if the rows of the run have pictures and the files of the base are at hand. Else None."""
    here = in_bucket(config.model.base) or local_path(config.model.base, "model.base").is_dir()
    return check_sight(resolve_base(config.model), keeps=keeps) if ROW_KINDS[config.data.kind].sees and here else None


def left_out_sentence(parts: Sequence[LeftOutPart]) -> str:
    """The sentence that names the parts. Empty if nothing is left out."""
    named = [f"{part.path} ({part.tensors} tensors, {part.weights:,} weights)" for part in parts]
    return f"left out of the base, as its language model has no place for them: {', '.join(named)}" if named else ""


# In huggingface_hub's cache, models--OWNER--NAME/snapshots/COMMIT has links to blobs/HASH. The hash of a large file is
# its SHA-256.
_SNAPSHOT = re.compile(r".*/models--[^/]+/snapshots/([^/]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def content_of(base: Base) -> dict[str, Any]:
    """The facts that identify the base: `weights` has the samples of each file.

    If they are known, it also has the `commit` of the Hub and its `hashes` of whole files, or a digest of the
    `versions` of a bucket's objects. Raises `ConfigError` if a file is damaged, `StorageError` if the store fails.
    """
    facts = {
        "weights": base.samples,
        "commit": hub_commit(base.directory),
        "hashes": hub_hashes(base),
        "versions": hashlib.sha256(json.dumps(base.versions).encode()).hexdigest()[:16]
        if in_bucket(base.name)
        else None,
    }
    return {name: value for name, value in facts.items() if value}


def hub_commit(directory: Path) -> str | None:
    """The commit of a base in huggingface_hub's cache; None anywhere else."""
    found = _SNAPSHOT.fullmatch(str(directory))
    return found[1] if found else None


def hub_hashes(base: Base) -> dict[str, str]:
    """Name -> SHA-256, for each file of weights whose hash the Hub has given. Reads no file."""
    if hub_commit(base.directory) is None:
        return {}
    named = {key: os.path.basename(os.path.realpath(base.directory / key)) for key in base.headers}
    return {key: name for key, name in named.items() if _SHA256.fullmatch(name)}


def check_whole(base: Base, folder: Store, report: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Read every byte of the base's files, and compare their hashes with the Hub's.

    If the Hub gave none, compare with those that the first call kept in the run's folder. A run has one base from its
    first commit on. Returns in words what the files equal. `report` gets the bytes done and all bytes. Raises
    `ConfigError` if a file differs.
    """
    found, known = hash_whole(base.store, base.headers, report), hub_hashes(base)
    committed = bool(committed_steps(folder))
    known = {**(_kept(folder) if committed else {}), **known}
    for file, sha256 in found.items():
        if known.get(file, sha256) != sha256:
            raise ConfigError(
                f"model.base: {base.name} is not what it was: {file} has the SHA-256 {sha256} instead of {known[file]}."
                " Copy that file again."
            )
    if committed:
        folder.put(layout.BASE_HASHES, json.dumps(found, indent=1).encode())
    if known.keys() >= found.keys():
        return "every byte is as on the Hub" if hub_hashes(base) else "every byte is as when it was first read whole"
    return (
        "every byte was read for the first time, and is compared with that from now on"
        if committed
        else "every byte was read"
    )


def _kept(folder: Store) -> dict[str, str]:
    with suppress(NotFound, Damaged):
        kept = read_json(folder, layout.BASE_HASHES)
        return kept if isinstance(kept, dict) else {}
    return {}
