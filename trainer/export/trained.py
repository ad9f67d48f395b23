"""The settings that a checkpoint was trained with.

The checkpoint's manifest is the truth, and config.yaml is a request for the next start. If a manifest was written
before some value was recorded, only that value is taken from config.yaml.
"""

from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from trainer.base.base import Base, Description
from trainer.base.find.check import content_of, hub_commit
from trainer.base.find.locate import (
    base_files,
    check_mergeable,
    describe_base,
    in_bucket,
    is_hub_id,
    on_the_hub,
    resolve_base,
)
from trainer.base.find.small_files import cached_folder, is_small_file
from trainer.config import Config, Data, Model, Tuning
from trainer.config.paths import local_path
from trainer.data.compile.fingerprint import hash_tokenizer
from trainer.data.render.chat_template import template_text
from trainer.data.render.text_files import RunText, kept_text
from trainer.errors import ConfigError, Damaged, StorageError, shown
from trainer.export.figures import Rounding
from trainer.run.folder import run_config
from trainer.state.checkpoint.identity import check_content, check_text
from trainer.state.checkpoint.manifest import CheckpointManifest, TextHashes, whole_checkpoint
from trainer.store.store import Store
from trainer.store.tokenizer_files import CHAT_TEMPLATE, TOKENIZER_FILES
from trainer.tuning.method import Method, method_of, methods

# The keys that tell the place of a base, and their types in a manifest.
_PLACE = {"path": str, "fingerprint": str, "name": (str, NoneType), "revision": (str, NoneType)}
# The sections that belong to a checkpoint, and the settings in them that do not change what it computes.
_FREE = {"model": {"attention", "kernels"}, "quant": {"cache"}, "tuning": {"start"}}

Settings = TypeVar("Settings", bound=BaseModel)


class TrainedCheckpoint(NamedTuple):
    """A whole checkpoint, the settings that it was trained with, and its method."""

    manifest: CheckpointManifest
    config: Config
    method: Method


def trained_checkpoint(folder: Store, step: int | None) -> TrainedCheckpoint:
    """Return the checkpoint of `step`, or the newest whole one, for every format of an export.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or does not fit its settings.
        ConfigError: `trained_config` raises it.
    """
    manifest = whole_checkpoint(folder, step)
    config = trained_config(folder, manifest)
    method = method_of(config)
    check_trained_shapes(method, config.model, manifest)
    return TrainedCheckpoint(manifest, config, method)


def trained_config(folder: Store, manifest: CheckpointManifest) -> Config:
    """Return config.yaml with the base, its quantization, and the tuning method and its settings from the manifest.

    Raises:
        ConfigError: config.yaml cannot be read, or the base is not where the manifest says, and config.yaml names
            another.
        Damaged: the manifest holds settings that do not exist, or does not say where the base is.
    """
    for key, kind in _PLACE.items():
        if not isinstance(manifest.base.get(key), kind):
            raise Damaged(
                f"the manifest of step {manifest.step} is damaged: it has base.{key}: {shown(manifest.base.get(key))}."
                " Export another step."
            )
    given = run_config(folder)
    recorded = {key: manifest.base[key] for key in ("layers", "dtype") if key in manifest.base}
    recorded["add_tokens"] = manifest.base.get("add_tokens", [])
    recorded["special_tokens"] = manifest.base.get("special_tokens", {})
    every = {key.removeprefix("quant."): value for key, value in manifest.base.items() if key.startswith("quant.")}
    quant = {key: value for key, value in every.items() if key not in _FREE["quant"]}
    sections = {
        "model": _updated(given.model, {**recorded, **_place(manifest, given.model)}, manifest),
        "quant": _updated(given.quant, quant, manifest),
        "tuning": _tuning(manifest) if manifest.adapter else given.tuning,
        "data": with_trained_template(folder, given.data, manifest),
    }
    if labels := manifest.objective.get("labels"):  # the classes of the training, whatever `data.labels` says by now
        sections["data"] = sections["data"].model_copy(update={"labels": labels})
    return given.model_copy(update=sections)


def with_trained_template(folder: Store, given: Data, manifest: CheckpointManifest) -> Data:
    """Return the data's settings with the chat template of the training, whatever `data.template` holds by now.

    The template is in a file of this machine. Raises `ConfigError` if it has changed and the run's folder has lost it.
    """
    if manifest.text is None or _template_hash(given) == manifest.text.template:
        return given
    if manifest.text.template is None:
        return given.model_copy(update={"template": None})
    try:
        kept = kept_text(folder, replace(manifest.text, tokenizer={})).template
    except StorageError as error:
        raise ConfigError(
            f"data.template: {shown(given.template)} is not the template that the checkpoint of step {manifest.step}"
            f" was trained with, and the run's own copy cannot be read: {error} Put that template back."
        ) from error
    assert kept is not None
    copy = cached_folder({CHAT_TEMPLATE: kept.encode()})
    return given.model_copy(update={"template": str(copy / CHAT_TEMPLATE)})


def _template_hash(data: Data) -> str | None:
    try:
        return RunText({}, template_text(data)).hashes.template
    except ConfigError:  # the file is gone
        return ""


def check_overrides(trained: Config, given: Config, manifest: CheckpointManifest) -> None:
    """Raise `ConfigError` if `given` would be another model than `trained`, the checkpoint's settings."""
    if given.data.template != trained.data.template:
        raise ConfigError(
            f"data.template: {shown(given.data.template)} would be other texts than the checkpoint of step"
            f" {manifest.step} was trained on. Leave it out."
        )
    for section, free in _FREE.items():
        before, after = getattr(trained, section).model_dump(), getattr(given, section).model_dump()
        for key in before.keys() - free:
            if after[key] != before[key]:
                raise ConfigError(
                    f"{section}.{key}: {shown(after[key])} would be another model than the checkpoint of step"
                    f" {manifest.step}, which was trained with {shown(before[key])}. Leave it out."
                )


def check_trained_shapes(method: Method, model: Model, manifest: CheckpointManifest) -> None:
    """Raise `Damaged` when other parameters were trained than `method` has over the base of `model`."""
    expected = {name: list(shape) for name, shape in method.shapes(describe_base(model).architecture).items()}
    for name in sorted(expected.keys() | manifest.shapes.keys()):
        given, held = expected.get(name), manifest.shapes.get(name)
        if given != held:
            raise Damaged(
                f"the checkpoint of step {manifest.step} has {shown(name)} of shape {held}, but its settings of tuning "
                f"({', '.join(f'{key}: {shown(value)}' for key, value in method.identity.items())}) give {given} on "
                f"{model.base}. Export another step, or put the base back that it was trained on."
            )


def check_mergeable_run(config: Config, base: Description) -> None:
    """Raise `ConfigError` for a run that has no whole model.

    Such a run has only a part of its base, or what it has learnt cannot become part of the base's weights.
    """
    method = method_of(config)
    if method.exports_model and config.model.layers:
        raise ConfigError(
            f"model.layers: the run has the first {config.model.layers} layers of its base only, and the files of a"
            " model have all. Only a run of the whole base can be exported as a model."
        )
    if not method.exports_model:
        check_mergeable(config.model, base)
    if method.unmergeable:
        raise ConfigError(f"there is no merged model: {method.unmergeable}. Take --format peft.")


def refuse_towers(config: Config, form: str, other: str) -> None:
    """Raise `ConfigError` if the tower has learnt. llama.cpp's files of this `form` have none of it."""
    if config.tuning.towers is not None:
        raise ConfigError(
            f"--format {form}: the file has the language model alone, and would lose what the tower has learnt"
            f" (tuning.towers: {config.tuning.towers}). Take --format {other}."
        )


def check_written_as_stored(config: Config, base: Description, rounding: Rounding) -> None:
    """Raise `ConfigError` for a run whose model cannot be written as its base is stored."""
    check_mergeable_run(config, base)
    if method_of(config).through and rounding != "dither":
        raise ConfigError(
            f"rounding: {rounding} gives other codes than those that the run was trained through"
            " (tuning.through: stored). Leave it out."
        )
    if not base.stored.decoded:
        raise ConfigError(
            f"as: stored keeps the codes of a base in 4 or 8 bits, and {config.model.base} is stored in 16 or 32, which"
            " --format merged keeps by itself. Leave as out."
        )


def check_recodable(base: Description, code: str) -> None:
    """Raise `ConfigError` for a mixture: transformers has no experts in a `code` such as nf4."""
    if base.architecture.weights("experts"):
        raise unloadable("the experts of this base", code)


def unloadable(what: str, code: str) -> ConfigError:
    """Return the refusal of a model that nobody could load in `code`."""
    return ConfigError(f"--format {code}: transformers cannot load {what} in this form. Take --format merged.")


def resolve_trained_base(folder: Store, model: Model, manifest: CheckpointManifest) -> Base:
    """Return the base with its weights, and in its directory the run's own tokenizer.

    Raises `ConfigError` when the base is not here, or is another than the checkpoint's.
    """
    base = resolve_base(model)
    check_trained_base(base, manifest)
    return with_trained_tokenizer(folder, base, manifest)


def with_trained_tokenizer(folder: Store, base: Base, manifest: CheckpointManifest) -> Base:
    """Return the base with the run's own tokenizer. Raises as `trained_directory`."""
    return replace(base, directory=trained_directory(folder, base.directory, manifest))


def check_trained_base(base: Base, manifest: CheckpointManifest) -> None:
    """Raise `ConfigError` if its facts, or samples of its weights, show that the base is not the checkpoint's."""
    if base.fingerprint != manifest.base["fingerprint"]:
        raise ConfigError(
            f"model.base: {base.name} is not the model that the checkpoint of step {manifest.step} was trained on"
            " (other config.json, tensors or files). Put that one back."
        )
    check_content(manifest, {"name": base.name, "path": base.name, **content_of(base)})


def check_base_at_hand(model: Model, manifest: CheckpointManifest) -> None:
    """Check as `resolve_trained_base` does, if the base's weights can be read without a download.

    If the base is on the Hub, check its commit.
    """
    directory = base_files(model)
    if on_the_hub(model.base):
        check_content(manifest, {"name": model.base, "commit": hub_commit(directory)})
    elif in_bucket(model.base) or any(directory.glob("*.safetensors")):
        check_trained_base(resolve_base(model), manifest)


def trained_directory(folder: Store, directory: Path, manifest: CheckpointManifest) -> Path:
    """Return the base's `directory`.

    If its tokenizer has changed, return a copy of its small files with the run's tokenizer.

    Raises `ConfigError` if the run's folder has lost it, or the rows of added tokens are counted by the tokenizer
    beside the base.
    """
    if manifest.text is None or hash_tokenizer(directory) == manifest.text.tokenizer:
        return directory
    if manifest.base.get("add_tokens"):
        check_text(manifest, TextHashes(hash_tokenizer(directory), manifest.text.template))
    try:
        files = kept_text(folder, manifest.text).files
    except StorageError as error:
        raise ConfigError(
            f"model.base: the tokenizer in {directory} is not the one that the checkpoint of step {manifest.step} was"
            f" trained with, and the run's own copy cannot be read: {error} Put that tokenizer back."
        ) from error
    others = {path.name: path.read_bytes() for path in directory.iterdir() if is_small_file(path.name)}
    return cached_folder({**{name: others[name] for name in others.keys() - {*TOKENIZER_FILES}}, **files})


def _place(manifest: CheckpointManifest, given: Model) -> dict[str, Any]:
    """Return the name of the base in the run's configuration of that time.

    A directory that has moved is where config.yaml says.
    """
    name, revision = manifest.base.get("name") or manifest.base["path"], manifest.base.get("revision")
    if not (in_bucket(name) or is_hub_id(name) or local_path(name, "model.base").is_dir()) and given.base != name:
        check_trained_base(resolve_base(given), manifest)
        return {}
    pinned = manifest.base.get("commit") if on_the_hub(name) else None
    return {"base": name, "revision": pinned or revision}


def _tuning(manifest: CheckpointManifest) -> Tuning:
    """Return the tuning settings.

    A setting that the manifest leaves out has its method's default, whatever config.yaml says.
    """
    name = manifest.adapter.get("method", "")
    make = methods().get(name) if isinstance(name, str) else None
    defaults = make(Tuning()).defaults if make else {}
    trained = {key: value for key, value in manifest.adapter.items() if key not in _FREE["tuning"]}
    return _updated(Tuning(), {**defaults, **trained}, manifest)


def _updated(settings: Settings, values: dict[str, Any], manifest: CheckpointManifest) -> Settings:
    try:
        return type(settings).model_validate({**settings.model_dump(), **values})
    except ValidationError as error:
        problem = error.errors()[0]
        raise Damaged(
            f"the manifest of step {manifest.step} has {'.'.join(map(str, problem['loc']))}: {problem['input']!r},"
            f" which this version does not know ({problem['msg']}). Use the version that wrote it."
        ) from error
