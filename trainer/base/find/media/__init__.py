"""The modalities of the files that rows have beside their text, such as pictures. Each is a file in this folder.

What is done with a file of a row is the same for all of them: it has a place in the text, an entry in the index, bytes
that are read ahead and checked by their hash, and a part in what the base's processor makes of a document. A modality
says what differs:

    a row           {"type": "image", "image": "cat.jpg"}        `parts`, `fields`, `tag` and `held`: how rows name one
    its shape       Size(height=480, width=640)                  `shape_of`: all that the text which stands for it needs
    its entry       480, 640                                     `numbers` and `kept`: two numbers of the shape
    the processor   processor(images=[<picture>], ...)           `shown` and `arguments`: what it is given
    a server        {"type": "image_url", ...}                   `part`
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator

    from trainer.config.data import Data


class Shape(Protocol):
    """All that the text which stands for a file depends on. It can be hashed, and knows its modality."""

    @property
    def modality(self) -> "Modality": ...


class Shown(NamedTuple):
    """A file of a row as the base's processor gets it: its shape, and its decoded content."""

    shape: Any
    content: Any


class Modality(Protocol):
    """One kind of files of rows.

    Attributes:
        number: in the index of a compiled data set.
        noun: for messages: "picture".
        kind: transformers' name, as in `image_token`, and the type of a part for a chat template.
        fields: the names of a row's field beside its text; the first one is the format's own.
        parts: the types of a part of a content.
        tag: the text that stands for one in the rows of LLaVA, LLaMA-Factory and ms-swift.
        held: the keys of a struct or a part that has one or says where it is.
        usual: the shape of one where nothing is known of those of the data.
        small: the shape of a small one, for questions to a processor.
        tried: the shapes in the documents by which a class is tried: of one, of two that are unlike, and of none.
    """

    number: int
    noun: str
    kind: str
    fields: tuple[str, ...]
    parts: tuple[str, ...]
    tag: str
    held: tuple[str, ...]
    usual: Any
    small: Any
    tried: Sequence[tuple[Any, ...]]

    def shape_of(self, content: bytes, name: str, data: "Data", processor: Any) -> Any:
        """The shape in which transformers' `processor` gets a file with the settings `data`. Decodes all of it, as a
        truncated one begins like a whole one.

        Raises `DataError` if nothing can be trained with it; `name` is its name in messages."""
        ...

    def made(self, given: Mapping[str, Any]) -> bytes | None:
        """The file of a struct, or a part of a content, that holds one without its bytes. None if it does not.

        Raises `DataError` if it cannot be made."""
        ...

    def joined(self, pictures: Sequence[bytes]) -> bytes | None:
        """The file of one that a row gives as a list of files of pictures. None if no such list stands for one."""
        ...

    def numbers(self, shape: Any) -> tuple[int, int]:
        """The two numbers, each below 2^32, that the index keeps of a shape."""
        ...

    def kept(self, first: int, second: int) -> Any:
        """What two numbers of the index say of a shape. Raises `ValueError`, with what they say, for those of none."""
        ...

    def shown(self, content: bytes, kept: Any, processor: Any) -> Shown:
        """The file as transformers' `processor` gets it. `kept` is what the index says of its shape. A decoder may
        raise any error."""
        ...

    def blank(self, shape: Any) -> Shown:
        """The same without a file, for questions to a processor."""
        ...

    def noise(self, shape: Any, draw: "Generator") -> Shown:
        """The same with random content, for the trial of a class."""
        ...

    def arguments(self, contents: Sequence[Any], processor: Any) -> dict[str, Any]:
        """The arguments of transformers' `processor` for the contents of one document, in the order of its text."""
        ...

    def preview(self, content: bytes) -> "Image | None":
        """A picture of the file for a reader. None if nothing of it can be seen. A decoder may raise any error."""
        ...

    def title(self, kept: Any) -> str:
        """One of this shape for a reader: "picture of 3 x 4 pixels"."""
        ...

    def part(self, file: Shown) -> dict[str, Any]:
        """OpenAI's part of a content, for a server, which holds what the base's processor gets."""
        ...

    def said(self, shapes: Sequence[Any]) -> str:
        """Several of these shapes for a message: "pictures of 3 x 4, 5 x 6 pixels"."""
        ...


@cache
def modalities() -> tuple[Modality, ...]:
    """All modalities, in the order of their numbers."""
    from trainer.config.registry import kinds  # the configuration reads the formats, whose fields are those here

    return tuple(sorted(kinds(__name__, "MODALITIES").values(), key=lambda one: one.number))


def numbered(number: int) -> Modality:
    """The modality of this number in an index. Raises `ValueError` if there is none."""
    found = next((one for one in modalities() if one.number == number), None)
    if found is None:
        raise ValueError(f"the unknown modality {number}")
    return found
