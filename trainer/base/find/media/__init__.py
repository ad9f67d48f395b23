"""The modalities of the files that rows have beside their text, such as pictures. Each is a file in this folder.

The files of all modalities are handled in the same way. A file has a place in the text and an entry in the index. Its
bytes are read ahead and checked by their hash, and the base's processor makes inputs from it. A modality defines what
differs:

    a row           {"type": "image", "image": "cat.jpg"}        `parts`, `fields`, `tag` and `held`: how rows name it
    its shape       Size(height=480, width=640)                  `shape_of`: what decides the text that stands for it
    its entry       480, 640                                     `numbers` and `kept`: two numbers of the shape
    the processor   processor(images=[<picture>], ...)           `shown` and `arguments`: what the processor gets
    a server        {"type": "image_url", ...}                   `part` and `beside_parts`
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trainer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator

    from trainer.config.data import Data


class Shape(Protocol):
    """Everything about a file that decides the text that stands for it. A shape is hashable and knows its modality."""

    @property
    def modality(self) -> "Modality": ...


class NotOfModality(DataError):
    """The content is no file of a modality, as far as can be told: perhaps it is one of another modality."""


class Shown(NamedTuple):
    """A file of a row as the base's processor gets it: its shape, and its decoded content."""

    shape: Any
    content: Any


class Modality(Protocol):
    """One kind of files of rows.

    Attributes:
        number: its number in the index of a compiled data set.
        noun: its name in messages, such as "picture".
        kind: transformers' name, as in `image_token`, and the type of a part for a chat template.
        fields: the names of the row's field that holds the files; the first name is the format's own.
        parts: the types of the parts of a message's content.
        endings: the endings of such files in a tar of WebDataset.
        tag: the text that stands for a file in the rows of LLaVA, LLaMA-Factory and ms-swift.
        smaller_by: the settings that make such files smaller for the base's processor.
        held: the keys under which a struct or a part has the file, or says where it is.
        usual: the shape to assume if the shapes of the data are not known.
        small: the shape of a small file, for questions to a processor.
        tried: the shapes of the files in the three documents of a trial: one file, two unlike files, and none.
    """

    number: int
    noun: str
    kind: str
    fields: tuple[str, ...]
    parts: tuple[str, ...]
    endings: tuple[str, ...]
    tag: str
    smaller_by: tuple[str, ...]
    held: tuple[str, ...]
    usual: Any
    small: Any
    tried: Sequence[tuple[Any, ...]]

    def check(self, content: bytes) -> None:
        """Raise `DataError`, with a clause, if the content is no file of this modality, as far as can be told without
        a processor: `NotOfModality` if it may be one of another. Raises `ConfigError` if a package is missing."""
        ...

    def shape_of(self, content: bytes, data: "Data", processor: Any) -> Any:
        """The shape in which transformers' `processor` gets a file with the settings `data`. Decodes the whole file,
        because a truncated one begins like a whole one.

        Raises as `check`, and `DataError`, with a clause, if the file cannot be trained on."""
        ...

    def made(self, given: Mapping[str, Any]) -> bytes | None:
        """A file made from a struct or a part that holds its content in another form, such as an array of samples. None
        if it holds no such form.

        Raises `DataError` if the file cannot be made."""
        ...

    def joined(self, pictures: Iterable[bytes]) -> bytes | None:
        """One file made from a list of picture files, such as the frames of a video. None if the modality takes no such
        lists."""
        ...

    def numbers(self, shape: Any) -> tuple[int, int]:
        """The two numbers, each below 2^32, that the index keeps of a shape."""
        ...

    def kept(self, first: int, second: int) -> Any:
        """The shape, as far as its two numbers in the index tell it. Raises `ValueError`, which describes the numbers,
        if they fit no shape."""
        ...

    def length(self, shape: Any) -> int | None:
        """The one number that decides the text which stands for a file, if the text grows with it: as long as that of
        two files is the same, that of any between them is, too. None if more decides it."""
        ...

    def shown(self, content: bytes, kept: Any, processor: Any) -> Shown:
        """The file as transformers' `processor` gets it. `kept` is its shape as the index has it. A decoder may raise
        any error."""
        ...

    def blank(self, shape: Any) -> Shown:
        """A blank file of this shape, for questions to a processor."""
        ...

    def noise(self, shape: Any, draw: "Generator") -> Shown:
        """A file of this shape with random content, for the trial of a class."""
        ...

    def example(self, shape: Any, processor: Any) -> bytes:
        """A file of this shape for transformers' `processor`, as cameras and recorders write it: to measure how long
        reading takes."""
        ...

    def arguments(self, contents: Sequence[Any], processor: Any) -> dict[str, Any]:
        """The arguments of transformers' `processor` for the contents of one document, in the order of its text."""
        ...

    def preview(self, content: bytes) -> "Image | None":
        """A picture that shows the file to a reader. None if the file cannot be seen. A decoder may raise any error."""
        ...

    def browsed(self, content: bytes) -> Sequence[tuple[str, bytes]]:
        """The files by which a browser shows the file, each with its media type."""
        ...

    def title(self, kept: Any) -> str:
        """A description of a file of this shape: "picture of 3 x 4 pixels"."""
        ...

    def part(self, file: Shown) -> dict[str, Any]:
        """A part of a message in OpenAI's form, for a server. It holds the content that the base's processor gets."""
        ...

    def beside_parts(self, files: Sequence[Shown]) -> dict[str, Any]:
        """The fields that a request to a vLLM server has beside the `part` of each of these files.

        Raises `DataError` if the server cannot get them together."""
        ...


@cache
def modalities() -> tuple[Modality, ...]:
    """All modalities, in the order of their numbers."""
    from trainer.config.registry import kinds  # the configuration reads the formats, whose fields are those here

    return tuple(sorted(kinds(__name__, "MODALITIES").values(), key=lambda one: one.number))


def recognized(content: bytes) -> Modality | None:
    """The modality of a file. None if it cannot be told."""
    for modality in modalities():
        with suppress(Exception):  # a decoder may raise any error
            modality.check(content)
            return modality
    return None


def numbered(number: int) -> Modality:
    """The modality of this number in an index. Raises `ValueError` if there is none."""
    found = next((one for one in modalities() if one.number == number), None)
    if found is None:
        raise ValueError(f"the unknown modality {number}")
    return found
