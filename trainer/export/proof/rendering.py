"""The half of `--verify` about texts: the exported tokenizer and chat template must give the tokens of the training.

The run keeps its own tokenizer and template (trainer/data/render/text_files.py). The proof compares rows of the run's
sources as a compilation encodes them. It also compares the compiled data, which may be all that is left, a text of many
kinds of characters, and conversations. Finally it compares what rows cannot show: every token's number, which tokens
are special, and the template's own text.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trainer.base.base import Tokenizer
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import Config, Data
from trainer.data.compile.encode import RowEncoder, documents_of
from trainer.data.compile.inputs import Input, find_evaluated, find_train
from trainer.data.dataset.manifest import Counters
from trainer.data.format.formats import Row, RowForm, explicit_form
from trainer.data.render.chat_template import template_text
from trainer.data.source.reading import rows
from trainer.errors import CapstanError, ConfigError, DataError
from trainer.export.figures import NOT_TRAINED

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
_CHARACTERS = (
    'Zoë paid 1,234.50 € at 12:05.\n\n\tdef f(x):\r\n    return x ** 2  # "ok"\n東京は今日も晴れ。 Привет, мир! नमस्ते'
    " مرحبا 👩‍👩‍👧 ﬁ Å A\u030a"
)
_CONVERSATIONS = (
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4."}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": " Ja? "},
        {"role": "assistant", "content": "Nein\n"},
        {"role": "user", "content": "<b>Why</b>"},
    ],
)


ROWS = 40
"""Rows of each data set, at most."""


class SourceRow(NamedTuple):
    """A row at the place `where`, in the form that it is read in, and the settings of its data set."""

    where: str
    data: Data
    form: RowForm
    row: Row


class Texts:
    """The tokens of texts by one tokenizer, and by its chat template or the template that replaces it."""

    def __init__(self, tokenizer: Tokenizer, instead: str | None = None) -> None:
        self.tokenizer, self._instead = tokenizer, instead

    @property
    def template(self) -> Any:
        return self._instead or self.tokenizer.chat_template

    def tokens(self, text: str) -> list[list[int]]:
        """Return the tokens of the text as a part of a document, and as a text that the tokenizer frames itself."""
        every: list[Any] = [self.tokenizer.encode(text, add_special_tokens=framed) for framed in (False, True)]
        return every

    @property
    def begins_with_bos(self) -> bool:
        """Whether the tokenizer puts its begin token before a text."""
        return self.tokens("a")[1][:1] == [self.tokenizer.bos_token_id]

    def read_back(self, text: str) -> list[str]:
        """Return the text of its tokens, as an answer is shown: with special tokens, and without."""
        tokens = self.tokens(text)[1]
        every: list[Any] = [self.tokenizer.decode(tokens, skip_special_tokens=skipped) for skipped in (False, True)]
        return every

    def rendered(self, messages: Any, begun: bool) -> str:
        """Render the conversation, or return the reason if the template refuses it.

        With `begun` it ends where an answer begins.
        """
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages, chat_template=self._instead, tokenize=False, add_generation_prompt=begun
            )
            return text
        except Exception as error:  # a template is a program by its author
            return f"refused: {error}"


def trained_texts(config: Config, directory: Path) -> Texts:
    """Return the texts as the run was trained: `directory` has the run's tokenizer, `config` its template."""
    tokenizer = read_tokenizer(directory, config.model.base, config.model.tokens)
    return Texts(tokenizer, template_text(config.data))


def check_rendering(
    trained: Texts, folder: Path, rows: Sequence[Sequence[int]], sources: Sequence[SourceRow] = ()
) -> None:
    """Raise `CapstanError` if the tokenizer in `folder` is not the run's.

    `rows` are tokens of the run's documents, and `sources` are rows before they became documents.
    """
    try:
        tokenizer = read_tokenizer(folder, "the export")
    except ConfigError as error:
        raise CapstanError(f"the export's tokenizer cannot be loaded: {error} {NOT_TRAINED}") from error
    for problem in (*_problems(trained, Texts(tokenizer), rows), *_other_rows(trained, tokenizer, sources)):
        raise CapstanError(f"the export's tokenizer is not the run's: {problem}. {NOT_TRAINED}")


def _problems(ours: Texts, theirs: Texts, rows: Sequence[Sequence[int]]) -> Iterator[str]:
    if ours.template != theirs.template:
        yield "its chat template is another" if theirs.template else "it has no chat template"
    texts: list[Any] = [ours.tokenizer.decode(list(row)) for row in rows]
    for number, text in enumerate([*texts, _CHARACTERS]):
        what = f"row {number + 1} of the run's data" if number < len(texts) else repr(_CHARACTERS[:30])
        if ours.tokens(text) != theirs.tokens(text):
            yield f"{what} becomes other tokens"
        elif ours.read_back(text) != theirs.read_back(text):
            yield f"the tokens of {what} become another text"
    if ours.template:
        for messages in _CONVERSATIONS:
            for begun in (False, True):
                expected, found = (texts.rendered(messages, begun) for texts in (ours, theirs))
                if expected != found or ours.tokens(expected) != theirs.tokens(found):
                    yield "a conversation becomes other tokens"
    for name in _SPECIAL:
        if getattr(ours.tokenizer, name) != getattr(theirs.tokenizer, name):
            yield f"its {name} is {getattr(theirs.tokenizer, name)} instead of {getattr(ours.tokenizer, name)}"
    if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        yield "its tokens have other numbers"
    if _flags(ours.tokenizer) != _flags(theirs.tokenizer):
        yield "its added tokens are found or shown otherwise"


def _flags(tokenizer: Tokenizer) -> dict[int, tuple[Any, ...]]:
    """Return each added token, how it is found in a text, and whether an answer is shown without it."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return {
        number: (token.content, token.lstrip, token.rstrip, token.single_word, token.normalized, token.special)
        for number, token in added.items()
    }


def _other_rows(ours: Texts, theirs: Tokenizer, sources: Sequence[SourceRow]) -> Iterator[str]:
    expected, found = documents(ours.tokenizer, sources, own=False), documents(theirs, sources, own=True)
    for source, before, after in zip(sources, expected, found, strict=True):
        if before != after:
            yield f"the row {source.where} becomes other tokens{f' ({after})' if isinstance(after, str) else ''}"


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
            (example,) = encoders[id(source.data)].encode(source.form, [source.row], source.where.rpartition(":")[0])
        except CapstanError as error:
            yield str(error)
            continue
        if isinstance(example, DataError):
            yield str(example)
        else:
            yield [document.stored().tolist() for document in documents_of(data, example, Counters())]
