"""Finds the inputs of each of a run's data sets: its files, which of their rows it uses, and the reading settings.

The rows of each source are read as the settings say, or as its first rows look.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config import Config, Data, Source
from trainer.config.objective import HEADS
from trainer.config.row_kinds import LIKELY, ROW_FORMATS, ROW_KINDS, is_templated
from trainer.data.format.formats import FORMATS, Row, RowForm, detect, lost_fields, or_error, wider_form
from trainer.data.format.known.classified import alike, label_name
from trainer.data.render.chat_template import has_template, no_template, tokens_of
from trainer.data.source.files import SourceFile, Take, expand
from trainer.data.source.reading import EVERYTHING, Part, batches, rows
from trainer.errors import CapstanError, ConfigError, DataError, few
from trainer.tuning.objective import find_objective

# Reading the files of a row, such as a picture, takes as long as encoding so many bytes of text.
_BYTES_OF_FILES = 20_000
_SETS = "eval.sets."
_ROWS = 64
"""The number of rows that decide how a source is read."""
_EVERY = 2**62
"""More rows than any source has."""


class Input(NamedTuple):
    """The files of a data set, the part of their rows that it uses, and the settings for reading them."""

    files: list[SourceFile]
    part: Part
    data: Data


def work_of(given: Input) -> int:
    """How many bytes of text take as long to encode as the rows of `given`, of which each may name files. Raises
    `DataError` if the first file is damaged."""
    size = sum(file.size for file in given.files)
    first = next(batches(given.files[0]), None) if ROW_KINDS[given.data.kind].sees else None
    return size + (_BYTES_OF_FILES * size * first.content.count() // max(1, first.read) if first else 0)


def find(config: Config) -> dict[str, Input]:
    """The inputs of "train", of "eval" if there is one, and of each of `eval.sets`, such as "eval.sets.general".

    Raises:
        ConfigError: the objective cannot learn from the rows of a source.
        DataError: a source is missing, or of a kind that cannot be read.
    """
    config = with_labels(config)
    train = find_train(config)
    return {"train": train} | find_evaluated(config, train.files)


def with_labels(config: Config) -> Config:
    """`config` with `data.labels` filled in, if the objective's head has an output for each label.

    Labels that are not set are collected from all rows of `data.train`.

    Raises:
        ConfigError, DataError: as `find`, or there are not two classes.
    """
    head, data = HEADS.get(config.objective.name), config.data
    if head is None or not head.labelled or data.labels:
        return config
    files = _read(config, data, data.train, "data.train")
    labels = _labels_of(tuple(files))
    if data.eval:
        _refuse_counting(labels, tuple(_read(config, data, data.eval, "data.eval")))
    return config.model_copy(update={"data": data.model_copy(update={"labels": labels})})


_UNLABELLED = frozenset(("-1", "-100"))


@lru_cache(maxsize=4)
def _labels_of(files: tuple[SourceFile, ...]) -> list[str]:
    """The classes of all rows in the files of `data.train`. Numbers are sorted by size, names alphabetically.

    Raises:
        DataError: a file is damaged, there are fewer than two classes, or two classes look the same to a reader.
    """
    found = {label_name(value) for file in files for _, value in _classes(file)}
    if not found:
        raise DataError("data.train: no row has a class. Check data.format and data.fields.label.")
    if len(found) == 1:
        raise DataError(
            f"data.train: the class of all rows is {found.pop()!r}. Add rows of another one, or name all in"
            " data.labels."
        )
    if unlabelled := sorted(found & _UNLABELLED):
        raise DataError(
            f"data.train: rows have the class {unlabelled[0]}, by which data sets mark what has no class. Remove these"
            " rows; if it is a class of yours, name all classes in data.labels."
        )
    if two := alike(found):
        raise DataError(
            f"data.train: rows have the class {two[0]!r}, and others {two[1]!r}, which look like one class that is"
            " written in two ways. Correct the rows, or name all classes in data.labels."
        )
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)


def _refuse_counting(labels: list[str], files: tuple[SourceFile, ...]) -> None:
    """Raise `DataError` if an evaluation row has a number as class while the rows of `data.train` have names.

    The order in which such numbers count the names is unknown.
    """
    for where, value in (found for file in files for found in _classes(file)):
        if type(value) is int and label_name(value) not in labels:
            raise DataError(
                f"{where}: the label is the number {value}, and the rows of data.train have the classes {few(labels)}."
                " Give data.labels, which says in what order numbers count them, or correct the row."
            )


def _classes(file: SourceFile) -> Iterator[tuple[str, Any]]:
    """Yield the place and the class of each row that has a class.

    Other rows are bad rows; the compilation counts or refuses them.
    """
    assert file.form is not None
    names = file.form.names
    called = names.get("label") or names.get("tags")
    if called is None:
        return  # a format without classes

    def read(row: Row) -> list[Any]:
        given = row.get(called)
        values = given if isinstance(given, list) else [given]
        return [value for value in values if label_name(value)]

    for where, row in rows(file, lambda _: None):
        found = or_error(read, row)
        if not isinstance(found, DataError):
            yield from ((where, value) for value in found)


def find_train(config: Config) -> Input:
    """The input of "train", as `find` gives it."""
    data = with_labels(config).data
    return Input(_read(config, data, data.train, "data.train"), Part(data.held_out, data.held_out_seed), data)


def find_evaluated(config: Config, train: list[SourceFile] | None = None) -> dict[str, Input]:
    """The inputs of `find` that are never trained on. `train` has the files of `data.train` if they are known."""
    data, inputs = with_labels(config).data, dict[str, Input]()
    if data.eval:
        inputs["eval"] = Input(_read(config, data, data.eval, "data.eval"), EVERYTHING, data)
    elif data.held_out:
        files = _read(config, data, data.train, "data.train") if train is None else train
        inputs["eval"] = Input(files, Part(data.held_out, data.held_out_seed, held_out=True), data)
    sets = {f"{_SETS}{name}": given.data(data) for name, given in config.eval.sets.items()}
    return inputs | {what: _read_set(config, data, what) for what, data in sets.items()}


def _read_set(config: Config, data: Data, what: str) -> Input:
    """The input of one of `eval.sets`. The settings of the training rows apply to it as far as its rows use them."""
    files = with_forms(config, data.for_rows("text"), expand(data.train, what), data.train, what, LIKELY)
    form = files[0].form
    return Input(files, EVERYTHING, data.for_rows(form.format) if form and data.format == "auto" else data)


def check_sources(config: Config, tokenizer: Path) -> None:
    """Raise the errors that end a run before it reads all of its rows. `tokenizer` is the folder of the base's files.

    Raises:
        ConfigError: as `find`, or there are conversations but no chat template.
        DataError: as `find`.
    """
    for files, _, data in find(config).values():
        if not has_template(data, tokenizer) and any(map(has_conversations, files)):
            raise no_template(tokens_of(tokenizer))


def has_conversations(file: SourceFile) -> bool:
    """Whether a chat template renders the rows of a file. Compared answers may be texts; their first row decides."""
    form = file.form
    if form is None or not is_templated(form.kind):
        return False
    if form.kind == "chat" or FORMATS[form.format].read:
        return True
    first = next((row for _, row in rows(replace(file, take=None), lambda _: None)), {})
    return any(isinstance(first.get(form.names.get(name, "")), list) for name in ("chosen", "completion", "prompt"))


def as_trained(config: Config) -> Data:
    """The data settings, with `format: auto` replaced by the kind of the training rows, conversations first.

    The settings stay unchanged if the rows cannot be read now, or are answers, whose prompts may be of either kind."""
    data = config.data
    if data.format != "auto":
        return data
    try:
        found = {file.form.kind for file in _read(config, data, data.train, "data.train") if file.form}
    except CapstanError:
        return data
    kind = next((kind for kind in LIKELY if kind in found - {"answers"}), data.format)
    return data.model_copy(update={"format": kind})


def _read(config: Config, data: Data, sources: Sequence[Source], setting: str) -> list[SourceFile]:
    kinds = find_objective(config).formats
    files = with_forms(config, data, expand(sources, setting), sources, setting, kinds)
    _refuse_unlike_columns(files, setting)
    taken = list[SourceFile]()
    for index, source in enumerate(sources):
        own = tuple(file for file in files if file.source == index)
        amount = source.take if source.take is not None else _EVERY if source.skip else None
        take = None if amount is None else Take(amount, source.take_seed, own, source.skip)
        taken += [replace(file, take=take) for file in own]
    return taken


def _refuse_unlike_columns(files: Sequence[SourceFile], setting: str) -> None:
    """Raise `ConfigError` if documents of some files have other columns beside their tokens than those of others."""
    kinds = dict.fromkeys(file.form.kind for file in files if file.form)
    found = {kind: tuple(column.name for column in ROW_KINDS[kind].columns) for kind in kinds}
    if len(set(found.values())) > 1:
        which = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in found.items())
        raise ConfigError(
            f"{setting}: its rows are of several kinds with different columns ({which}), and all documents of a data"
            " set have the same. Leave out the sources of one kind."
        )


def named(keys: Mapping[str, str]) -> dict[str, str]:
    """Name of the set -> fingerprint, for those keys of `locate` that are `eval.sets`."""
    return {what.removeprefix(_SETS): key for what, key in keys.items() if what.startswith(_SETS)}


def config_of_set(config: Config, name: str) -> Config:
    """The settings of a run over one of `eval.sets` alone. Its compiled rows are packed by them."""
    return config.model_copy(update={"data": config.eval.sets[name].data(config.data)})


def with_forms(
    config: Config,
    data: Data,
    files: Sequence[SourceFile],
    sources: Sequence[Source],
    setting: str,
    kinds: Collection[str],
) -> list[SourceFile]:
    """The files of `sources`, each with the form of its rows. `data` has the settings for reading them.

    `setting` is the name of the setting that lists the sources.

    Raises:
        ConfigError: the kind of the rows is none of `kinds`, or their format does not go with a setting.
        DataError: the first rows have no known format, cannot be read at all, or have fields of known meaning that
            their format does not read.
    """
    found: list[SourceFile] = []
    for index, own in groupby(files, lambda file: file.source):
        mine, name = list(own), f"{setting}[{index}]"
        replaced = tuple(sources[index].replace.items())  # in the given order, as one text may begin another
        written = tuple(sorted(sources[index].templates.items()))
        without = tuple(sorted(sources[index].left_out.items()))
        form = _form(data, sources[index], mine, kinds, name)
        form = replace(form, replaced=replaced, written=written, without=without)
        if sources[index].format or data.format == "auto":  # else the settings were compared with each other
            if form.kind not in kinds:
                other = ROW_KINDS[form.kind].objective
                raise ConfigError(
                    f"{name}: its rows are {form}, and objective.name: {config.objective.name} learns from"
                    f" {' or '.join(kinds)}. Choose objective.name={other}, other data, or name the format and the"
                    " fields with data.format and data.fields."
                )
            if unsuited := data.unsuited(form.format):
                raise ConfigError(f"{name}: {unsuited}")
        found += [replace(file, form=form) for file in mine]
    return found


def describe_forms(data: Data, sources: Sequence[Source], files: Sequence[SourceFile]) -> list[str]:
    """A line for each of `sources` whose format was detected: its place, its format, its fields, the unread ones."""
    forms = {file.source: file.form for file in files}
    return [
        f"{source.path} is read as {forms[index]}{_unread(forms[index])}"
        for index, source in enumerate(sources)
        if (source.format or data.format) == "auto"
    ]


def _unread(form: RowForm | None) -> str:
    return f"; not read: {few(form.unread)}" if form and form.unread else ""


def _form(data: Data, source: Source, files: Sequence[SourceFile], kinds: Collection[str], name: str) -> RowForm:
    given = source.fields if source.format else {**data.fields, **source.fields}
    format = source.format or data.format
    if format != "auto":
        return RowForm(format, tuple(sorted(given.items())))
    bad: list[DataError] = []
    sample = list(islice(_sample(files, bad), _ROWS))
    if not sample:
        raise DataError(
            f"{name}: no row can be read; the first: {bad[0]}" if bad else f"{name}: {source.path} has no rows."
        )
    form = detect(sample, given, kinds)
    if form is None:
        raise DataError(
            f"{name}: the first rows of {files[0].uri} are of no format known here: their fields are"
            f" {', '.join(sample[0])}. Name the format and the fields, such as data.format=prompt_completion"
            f" data.fields.prompt=... data.fields.completion=...; formats are {', '.join(ROW_FORMATS)}."
        )
    if form.kind in kinds and (lost := lost_fields(form, sample)):
        wider = wider_form(form, sample, lost)
        more = f"{wider.overrides} reads them too" if wider else "Name the format and the fields that read them"
        raise DataError(
            f"{name}: the rows of {files[0].uri} look like {form}, which leaves out what they say in {', '.join(lost)}."
            f" {more}; {form.overrides} does without."
        )
    return replace(form, unread=tuple(dict.fromkeys(unused for row in sample for unused in form.unused(row))))


def _sample(files: Sequence[SourceFile], bad: list[DataError]) -> Iterator[Row]:
    """Yield the readable rows, and put the first unreadable one into `bad`. A later pass reports the others."""

    def keep_first(error: DataError) -> None:
        if not bad:
            bad.append(error)

    for file in files:
        for _, row in rows(file, keep_first):
            yield row
