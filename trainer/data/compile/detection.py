"""Decides how the rows of each source are read: as the settings say, or by looking at the first rows."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice

from trainer.config import Config, Data, Source
from trainer.config.data.row_kinds import ROW_FORMATS, ROW_KINDS
from trainer.data.format.formats import Row, RowForm, detect, lost_fields, wider_form
from trainer.data.source.files import SourceFile
from trainer.data.source.reading import rows
from trainer.errors import ConfigError, DataError, few

_ROWS = 64


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
        replaced = tuple(sorted(sources[index].replace.items()))
        written = tuple(sorted(sources[index].templates.items()))
        form = replace(_form(data, sources[index], mine, kinds, name), replaced=replaced, written=written)
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
