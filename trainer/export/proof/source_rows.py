"""Rows of a run's own data as its sources have them. An export's tokenizer and chat template render them."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from trainer.base.tokenizer import Tokenizer
from trainer.config import Config, Data
from trainer.data.compile.encode import RowEncoder, documents_of
from trainer.data.compile.inputs import Input, find_evaluated, find_train
from trainer.data.dataset.manifest import Counters
from trainer.data.format.formats import Row, RowForm, explicit_form
from trainer.data.source.reading import rows
from trainer.errors import CapstanError, DataError

ROWS = 40
"""Rows of each data set, at most."""


class SourceRow(NamedTuple):
    """A row at the place `where`, in the form that it is read in, and the settings of its data set."""

    where: str
    data: Data
    form: RowForm
    row: Row


def source_rows(config: Config) -> list[SourceRow]:
    """Return the first rows of the files of each of the run's data sets.

    A data set whose sources can no longer be read from here has none.
    """
    found = list[SourceRow]()
    inputs = list[Input]()
    with suppress(CapstanError):
        inputs.append(find_train(config))
    with suppress(CapstanError):
        inputs += find_evaluated(config).values()
    for given in inputs:
        with suppress(CapstanError):
            found += islice(_first_rows(given), ROWS)
    return found


def _first_rows(given: Input) -> Iterator[SourceRow]:
    each = max(1, ROWS // max(1, len(given.files)))
    for file in given.files:
        form = file.form or explicit_form(given.data)
        for where, row in islice(rows(file, lambda _: None), each):
            yield SourceRow(where, given.data, form, row)


def documents(tokenizer: Tokenizer, sources: Sequence[SourceRow], *, own: bool) -> Iterator[list[list[int]] | str]:
    """Compile each row: return its documents with trained tokens marked, or the sentence that refuses it.

    With `own` the tokenizer's own chat template is used, whatever `data.template` says.
    """
    encoders = dict[int, RowEncoder]()
    for source in sources:
        data = source.data.model_copy(update={"template": None}) if own else source.data
        try:
            if id(source.data) not in encoders:
                encoders[id(source.data)] = RowEncoder(tokenizer, data)
            (example,) = encoders[id(source.data)].encode(source.form, [source.row])
        except CapstanError as error:
            yield str(error)
            continue
        if isinstance(example, DataError):
            yield str(example)
        else:
            yield [document.stored().tolist() for document in documents_of(data, example, Counters())]
