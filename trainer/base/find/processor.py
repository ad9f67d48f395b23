"""The processor of a base that sees, which makes pixels of pictures and says which text stands for them.

The text that stands for a picture is a function of the sizes of all pictures of a document. So it is asked for once for
each tuple of sizes, with blank pictures, and no file has to be decoded for it.
"""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.base.base import Tokenizer
from trainer.base.find.small_files import PROCESSOR_FILES
from trainer.base.unreadable import read_by_transformers
from trainer.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

Size = tuple[int, int]
"""Height and width in pixels, after a picture was turned as its EXIF says."""
_OF_TEXT = ("input_ids", "attention_mask")
_OFFSETS = "text_replacement_offsets"
TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
"""The names under which classes take the type of each token, 0 for text."""
_BLANK = (64, 96)


class Processor:
    """transformers' processor of a base, with the tokenizer of the run.

    Raises `ConfigError` if it does not say, as most do, which text replaces each picture.
    """

    def __init__(self, made: Any, name: str) -> None:
        self._made, self._name = made, name
        self.token: str = getattr(made, "image_token", None) or ""
        """The text that the processor replaces by the tokens of a picture."""
        if not self.token:
            raise ConfigError(f"model.base: the processor of {name} has no token for a picture. Give another base.")
        self._place, blank = self._tried()
        self.token, self._example = self._replaced(blank)
        self._replacements = lru_cache(maxsize=4096)(self._ask)
        self._featured = lru_cache(maxsize=4096)(self._count_featured)
        self._types = self._names_of_types(blank)

    def replacements(self, sizes: tuple[Size, ...]) -> list[str]:
        """The text that stands for each picture of a document with pictures of these sizes.

        Raises `DataError` if the processor refuses them."""
        return self._replacements(sizes)

    @cached_property
    def reserved(self) -> frozenset[int]:
        """The tokens that stand for pictures, video or sound, whose features the class puts there."""
        named = [getattr(self._made, f"{kind}_token_ids", None) or [] for kind in ("image", "video", "audio")]
        return self._added.intersection([self._feature, *chain.from_iterable(named)])

    @cached_property
    def _feature(self) -> int:
        """The token that gets a feature: the added one that the text of a picture has most often. -1 if it has none."""
        ids = [one for one in self.encode(self._example) if one in self._added]
        return max(ids, key=ids.count, default=-1)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._made.tokenizer.get_added_vocab().values())

    def lacks(self, sizes: tuple[Size, ...], ids: "NDArray[np.int32]") -> int:
        """How many tokens that get a feature a document with these `ids` has too few for pictures of these sizes; below
        0 if it has too many."""
        return self._featured(sizes) - int((ids == self._feature).sum())

    def together(self, sizes: tuple[Size, ...]) -> bool:
        """Whether pictures of these sizes have other tokens together than each alone, as LLaVA-OneVision's."""
        return self._featured(sizes) != sum(self._featured((size,)) for size in sizes)

    def _count_featured(self, sizes: tuple[Size, ...]) -> int:
        return sum(self.encode(text).count(self._feature) for text in self.replacements(sizes))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any that begin or end every text."""
        return self._made.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, with those that no reader sees."""
        return self._made.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def inputs(self, pictures: Sequence["Image"], ids: Sequence[int]) -> dict[str, "Tensor"]:
        """The inputs that the class takes for a document with these pictures, beside its `ids`."""
        made = self._call(pictures, self._place)
        offsets = made.pop(_OFFSETS)
        assert len(offsets[0]) == len(pictures)
        return {name: value for name, value in made.items() if name not in (*_OF_TEXT, *TYPES)} | self.token_types(ids)

    @property
    def place(self) -> str:
        """The text that the processor replaces for each picture."""
        return self._place

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the inputs that pictures have, beside what follows from the ids."""
        from PIL import Image

        made = self._call([Image.new("RGB", (_BLANK[1], _BLANK[0]))], self._place)
        return frozenset(made) - {_OFFSETS, *_OF_TEXT, *TYPES}

    def token_types(self, ids: Sequence[int]) -> dict[str, "Tensor"]:
        """Those of the inputs that follow from the `ids` alone: values (1, n) for each token."""
        import torch

        return {name: torch.tensor(self._types_of(name, [list(ids)])) for name in self._types}

    def _types_of(self, name: str, ids: list[list[int]]) -> list[list[int]]:
        """The values of one of `TYPES` for each token."""
        return getattr(self._made, f"create_{name}", self._made.create_mm_token_type_ids)(ids)

    def _ask(self, sizes: tuple[Size, ...]) -> list[str]:
        from PIL import Image

        try:
            made = self._call([Image.new("RGB", (width, height)) for height, width in sizes], self._place)
        except Exception as error:  # a processor may raise any error for sizes that it cannot take
            said = ", ".join(f"{width} x {height}" for height, width in sizes)
            raise DataError(
                f"its pictures of {said} pixels are refused by the base's processor ({first_line(error)})"
            ) from error
        return [part["replacement"] for part in made[_OFFSETS][0]]

    def _call(self, pictures: Sequence["Image"], place: str) -> dict[str, Any]:
        text = " ".join([place] * len(pictures))
        made = self._made(
            text=[text],
            images=[list(pictures)],
            return_tensors="pt",
            return_mm_token_type_ids=self._types_follow_from_ids,
            return_text_replacement_offsets=True,
        )
        return dict(made)

    @cached_property
    def _types_follow_from_ids(self) -> bool:
        """Idefics 3's processor needs more for the types of tokens, and the classes that it serves take none."""
        return len(inspect.signature(self._made.create_mm_token_type_ids).parameters) == 1

    def _tried(self) -> tuple[str, dict[str, Any]]:
        """The text in which the processor finds the place of a picture, and what it makes of one with a blank picture.

        The text is the processor's token, or what its chat template writes if it wants more around the token or another
        one."""
        from PIL import Image

        blank = [Image.new("RGB", (_BLANK[1], _BLANK[0]))]
        try:
            return self.token, self._call(blank, self.token)
        except Exception as error:  # a processor may raise any error for a text that it cannot take
            with suppress(Exception):  # and a template for a message
                place = _written(self._made)
                return place, self._call(blank, place)
            raise ConfigError(
                f"model.base: the processor of {self._name} refuses a text in which {self.token!r} stands for a picture"
                f" ({first_line(error)}). Give another base."
            ) from error

    def _replaced(self, made: dict[str, Any]) -> tuple[str, str]:
        """The text that was replaced, and the text of the tokens of a picture.

        Raises `ConfigError` if the processor says none."""
        offsets = made.get(_OFFSETS)
        if not offsets or len(offsets[0]) != 1:
            raise ConfigError(
                f"model.base: the processor of {self._name} moves pictures in the text or does not say which text"
                " replaces them, and rows with pictures need that. Give another base."
            )
        return offsets[0][0]["text"], offsets[0][0]["replacement"]

    def _names_of_types(self, made: dict[str, Any]) -> tuple[str, ...]:
        """The names under which the class gets the types of tokens, as `made` of a blank picture has them."""
        if listed := next((name for name, value in made.items() if name != _OFFSETS and isinstance(value, list)), ""):
            raise ConfigError(
                f"model.base: the processor of {self._name} makes a list of {listed} and no tensor, which rows with"
                " pictures cannot have yet. Give another base."
            )
        ids = made["input_ids"]
        beyond = [name for name, value in made.items() if getattr(value, "shape", ())[:2] == ids.shape]
        names = tuple(name for name in TYPES if name in made)
        known = [*_OF_TEXT, *(one for one in names if made[one].tolist() == self._types_of(one, ids.tolist()))]
        if unknown := [name for name in (*beyond, *names) if name not in known]:
            raise ConfigError(
                f"model.base: the processor of {self._name} makes {unknown[0]} for each token, which rows with pictures"
                " cannot have yet. Give another base."
            )
        return names


def _written(made: Any) -> str:
    """The text that the chat template of a processor writes for a picture between two words."""
    parts = [{"type": "text", "text": "BEFORE"}, {"type": "image"}, {"type": "text", "text": "BEHIND"}]
    text = made.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    return text.partition("BEFORE")[2].partition("BEHIND")[0]


def read_processor(directory: Path, name: str, tokenizer: Tokenizer | None = None) -> Processor:
    """The processor in the directory of the base `name`; with the run's own `tokenizer` if one is given.

    Raises `ConfigError` if there is none, or a package for it is missing."""
    from transformers import AutoProcessor, ProcessorMixin

    if not any((directory / file).exists() for file in PROCESSOR_FILES):
        raise ConfigError(
            f"model.base: {name} has no {PROCESSOR_FILES[0]}, so it takes no pictures. Give a base that sees, or rows"
            " of text."
        )
    check_packages()
    with read_by_transformers(name, "the processor"):
        made = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        if not isinstance(made, ProcessorMixin):
            raise ConfigError(f"model.base: {name} has no processor of pictures and text. Give a base that sees.")
        if tokenizer is not None:
            made.tokenizer = tokenizer
    return Processor(made, name)


def check_packages() -> None:
    """Raises `ConfigError` if a package is missing that reads pictures."""
    for name in ("PIL", "torchvision"):
        if find_spec(name) is None:
            raise ConfigError(
                f"data.format: pictures needs the package {name}. Install it: pip install 'capstan-llm[images]'."
            )
