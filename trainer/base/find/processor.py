"""The processor of a base that sees, which makes pixels of pictures and says which text stands for them.

The text that stands for a picture is a function of the sizes of all pictures of a document. So it is asked for once for
each tuple of sizes, with blank pictures, and no file has to be decoded for it. A document may have files of other
modalities, too (trainer/base/find/media), and then the same holds for their shapes.

Some processors change more of the text: Idefics 2 has one token between two pictures that touch, and PaliGemma writes
a begin token behind the last picture and a line break behind the prompt. These are given each document's whole text,
with blank pictures, and what they hand to their tokenizer is compared with it:

    given       "See <image> well."
    tokenized   "See <image><image><image><bos> well.\n"
                     a picture            more       tail
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.base.base import Tokenizer
from trainer.base.find.media import Modality, Shown, modalities
from trainer.base.find.media.still import STILL
from trainer.base.find.media.video import VIDEO
from trainer.base.find.small_files import PROCESSOR_FILES
from trainer.base.find.without_files import BlankPictures, BlankVideos, Listening, Steps
from trainer.base.unreadable import read_by_transformers
from trainer.errors import ConfigError, DataError, few, first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Shapes = tuple[Any, ...]
"""The shapes (`trainer.base.find.media.Shape`) of the files of a document, in the order of its text."""
_OF_TEXT = ("input_ids", "attention_mask", "labels")
_OFFSETS = "text_replacement_offsets"
PROMPTS = "token_type_ids"
"""The types that may tell what is before an answer, 0, from the answer, 1."""
TYPES = ("mm_token_type_ids", PROMPTS, "moe_mm_token_type_ids")
"""The names under which classes take the type of each token, 0 for text."""
_BEFORE, _BEHIND = "Zq", "qZ"
_MOST_KNOWN = 4096  # tuples of shapes


class WrittenAround(NamedTuple):
    """A processor writes these texts around the pieces of a text that pictures divide: `head` before the first piece,
    a text for each of the `pictures` between two pieces, and `tail` behind the last one."""

    head: str
    pictures: Sequence[str]
    tail: str


class _Tried(NamedTuple):
    """A processor made `made` of the text `given` with a small blank file, and its tokenizer got the text `heard`, if
    any."""

    given: str
    made: Mapping[str, Any]
    heard: str | None


class Stand(NamedTuple):
    """The text that stands for a file of one modality.

    The processor replaces the `token` in the text `place`, which it wants around it. `example` are the tokens of a
    small one. If it `is_plain`, the processor changes nothing else of a text."""

    place: str
    token: str
    example: str
    is_plain: bool


class Processor:
    """transformers' processor of a base, with the tokenizer of the run.

    Raises `ConfigError` if it cannot be told which text stands for each picture.
    """

    def __init__(self, made: Any, name: str) -> None:
        self.made, self._name = made, name
        self.takes = [one for one in modalities() if getattr(made, f"{one.kind}_token", None)]
        """The modalities of the files that it takes."""
        if not self.takes:
            raise ConfigError(f"model.base: the processor of {name} has no token for a picture. Give another base.")
        self._nested = True
        self._blanks: dict[Shapes, Any] | None = None
        self._blank_videos = dict[Shapes, Any]()
        self._types: tuple[str, ...] = ()
        self.reads_prompts = False
        """Whether the types of tokens tell the class which are the prompt's, 0, and which the answer's, 1."""
        self._stands = dict[str, Stand]()
        self._steps = Steps()
        self._replacements = lru_cache(maxsize=_MOST_KNOWN)(self._ask)
        self._featured = lru_cache(maxsize=_MOST_KNOWN)(self._count_featured)
        self._main = self._stands[self.takes[0].kind] = self._learn(self.takes[0])

    def _learn(self, modality: Modality) -> Stand:
        """Find out what stands for a file of the modality, and which types of tokens come with it."""
        place, tried = self._tried(modality)
        token, example = self._replaced(modality, place, tried)
        written = tried.given.replace(token, example)
        is_plain = bool(tried.made.get(_OFFSETS)) and tried.heard in (None, written)
        if not is_plain and self._blanks is None:  # it is then asked for each text
            self._blanks = {}
        if modality is STILL:
            asks = "suffix" in inspect.signature(self.made.__call__).parameters
            self.reads_prompts = asks and self._tells_answers(place)
        self._types = tuple(dict.fromkeys([*self._types, *self._names_of_types(modality, tried.made)]))
        return Stand(place, token, example, is_plain)

    def stand(self, modality: Modality) -> Stand:
        """Return what stands for a file of the modality. Raises `DataError` if the base takes none."""
        if modality not in self.takes:
            raise DataError(f"it has a {modality.noun}, and {self._name} takes none")
        if modality.kind not in self._stands:
            self._stands[modality.kind] = self._learn(modality)
        return self._stands[modality.kind]

    def written_around(self, modality: Modality) -> tuple[str, str]:
        """Return what the processor's own chat template writes before and behind the token of a file: nothing if it has
        no template."""
        try:
            before, found, behind = _written(self.made, modality).partition(self.stand(modality).token)
        except Exception:  # a template may raise any error
            return "", ""
        return (before, behind) if found else ("", "")

    def replacements(self, shapes: Shapes) -> list[str]:
        """The text that stands for each file of a document with files of these shapes, between words.

        Raises `DataError` if the processor refuses them."""
        length = shapes[0].modality.length(shapes[0]) if len(shapes) == 1 else None
        if length is None:
            return self._replacements(shapes)
        found = self._steps.find(length)  # hardly two lengths are alike, and a processor takes long for each
        if found is None:
            (found,) = self._replacements(shapes)
            self._steps.add(length, found)
        return [found]

    def gaps(self, pieces: Sequence[str], shapes: Shapes) -> WrittenAround:
        """Return the texts around the `pieces` of a text that files of these shapes divide. If the processor
        `reads_prompts`, the text is a prompt.

        Raises `DataError` if the processor refuses them, or changes the text of a piece."""
        if all(self.stand(shape.modality).is_plain for shape in shapes) and (shapes or self._main.is_plain):
            return WrittenAround("", self.replacements(shapes) if shapes else (), "")
        if shapes:
            head, pictures, tail = self._aligned(pieces, shapes)
            return WrittenAround(head, ["".join(one) for one in pictures], tail)
        try:
            head, tail = _around(pieces[0], self._heard(pieces[0], ()))
        except Exception:  # a processor may raise any error for a text without a picture
            head, ((_, more),), tail = self._aligned(["", pieces[0]], (self.takes[0].small,))
            head += more  # what it writes beside one stays
        return WrittenAround(head, (), tail)

    @property
    def is_plain(self) -> bool:
        """Whether the processor replaces places of pictures alone, each by the text of its picture."""
        return self._main.is_plain

    @cached_property
    def reserved(self) -> frozenset[int]:
        """The tokens that stand for pictures, video or sound, whose features the class puts there."""
        named = [getattr(self.made, f"{one.kind}_token_ids", None) or [] for one in modalities()]
        return self._added.intersection([self._feature(self.takes[0]), *chain.from_iterable(named)])

    def _feature(self, modality: Modality) -> int:
        """The token that gets a feature: the added one that the text of a file has most often. -1 if it has none."""
        ids = [one for one in self.encode(self.stand(modality).example) if one in self._added]
        return max(ids, key=ids.count, default=-1)

    def _features(self, shapes: Shapes) -> frozenset[int]:
        return frozenset(self._feature(modality) for modality in _of(shapes))

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.made.tokenizer.get_added_vocab().values())

    def lacks(self, shapes: Shapes, ids: "NDArray[np.int32]") -> int:
        """How many tokens that get a feature a document with these `ids` has too few for files of these shapes; below
        0 if it has too many."""
        return self._featured(shapes) - sum(int((ids == token).sum()) for token in self._features(shapes))

    def together(self, shapes: Shapes) -> bool:
        """Whether files of these shapes have other tokens together than each alone, as pictures of LLaVA-OneVision."""
        return self._featured(shapes) != sum(self._featured((shape,)) for shape in shapes)

    def _count_featured(self, shapes: Shapes) -> int:
        features = self._features(shapes)
        encoded = map(self.encode, self.replacements(shapes))
        return sum(ids.count(token) for ids in encoded for token in features)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any that begin or end every text."""
        return self.made.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, with those that no reader sees."""
        return self.made.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def inputs(self, files: Sequence[Shown], ids: Sequence[int], prompt: int | None = None) -> dict[str, "Tensor"]:
        """The inputs that the class takes for a document with these files, beside its `ids`. The first `prompt`
        tokens are those before its answer; without it, all are."""
        made = self._call(files, self._places([one.shape.modality for one in files]))
        offsets = made.pop(_OFFSETS, None)
        assert offsets is None or len(offsets[0]) == len(files)
        own = {name: value for name, value in made.items() if name not in (*_OF_TEXT, *TYPES)}
        return own | self.token_types(ids, prompt)

    def tokens(self, pieces: Sequence[str], files: Sequence[Shown]) -> list[int]:
        """The processor's own tokens of a text that `files` part, with those that begin and end every text."""
        places = [self.stand(one.shape.modality).place for one in files]
        return self._call(files, _alternating(pieces, places))["input_ids"][0].tolist()

    @property
    def token(self) -> str:
        """The text that the processor replaces by the tokens of a picture."""
        return self._main.token

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the inputs that files have, beside what follows from the ids."""
        taken = [one for one in self.takes if one is self.takes[0] or one.kind in self._stands or self._takes(one)]
        made = [self._call([one.blank(one.small)], self.stand(one).place) for one in taken]
        return frozenset(name for given in made for name in given) - {_OFFSETS, *_OF_TEXT, *TYPES}

    def _takes(self, modality: Modality) -> bool:
        """Whether it can be told what stands for a file of the modality."""
        with suppress(ConfigError):
            self.stand(modality)
            return True
        return False

    def token_types(self, ids: Sequence[int], prompt: int | None = None) -> dict[str, "Tensor"]:
        """Those of the inputs that follow from the text: values (1, n) for each of `ids`. See `inputs`."""
        import torch

        types = {name: torch.tensor(self._types_of(name, [list(ids)])) for name in self._types}
        if self.reads_prompts:
            length = len(ids) if prompt is None else prompt
            types[PROMPTS] = (torch.arange(len(ids)) >= length).long()[None]
        return types

    def _types_of(self, name: str, ids: list[list[int]]) -> list[list[int]]:
        """The values of one of `TYPES` for each token."""
        return getattr(self.made, f"create_{name}", self.made.create_mm_token_type_ids)(ids)

    def _ask(self, shapes: Shapes) -> list[str]:
        def ask() -> list[str]:
            text = " ".join(f"{_BEFORE} {self.stand(shape.modality).place} {_BEHIND}" for shape in shapes)
            made, heard = self._listened(text, shapes)
            if offsets := made.get(_OFFSETS):
                found = [part["replacement"] for part in offsets[0]]
            else:
                found = re.findall(f"{_BEFORE} (.*?) {_BEHIND}", heard or "", re.DOTALL)
            assert len(found) == len(shapes)
            if not all(found):
                raise DataError("it makes no token of so little")
            return found

        return _refusing(shapes, ask)

    def _places(self, given: Sequence[Modality]) -> str:
        return " ".join(self.stand(modality).place for modality in given)

    def _aligned(self, pieces: Sequence[str], shapes: Shapes) -> tuple[str, list[tuple[str, str]], str]:
        """As `gaps`. Each picture has the text that stands for it, and what more the processor writes behind it."""
        alone = self.replacements(shapes)
        tokens = [self.stand(shape.modality).token for shape in shapes]
        heard = _refusing(shapes, lambda: self._heard(_alternating(pieces, tokens), shapes))
        head, pictures = "", list[tuple[str, str]]()
        if pieces[0]:
            head, heard = _around(pieces[0], heard)
        for text, token, piece in zip(alone, tokens, pieces[1:], strict=True):
            # A neighbour may have the beginning of what stands for a picture.
            begins = range(max(text.find(token), 0) + 1)
            own = next((text[begin:] for begin in begins if heard.startswith(text[begin:])), None)
            if own is None:
                raise DataError(
                    "the base's processor writes other text for its pictures here than for the same pictures alone"
                )
            more, heard = _around(piece, heard.removeprefix(own))
            pictures.append((own, more))
        return head, pictures, heard

    def _heard(self, text: str, shapes: Shapes) -> str:
        _, heard = self._listened(text, shapes)
        assert heard is not None
        return heard

    def _listened(self, text: str, shapes: Shapes) -> tuple[dict[str, Any], str | None]:
        """Return the processor's result for a text with blank files, and the text that its tokenizer got."""
        listening = copy.copy(self.made)
        tokenizer = listening.tokenizer = Listening(self.made.tokenizer)
        if self._blanks is not None and (sizes := tuple(shape for shape in shapes if shape.modality is STILL)):
            listening.image_processor = BlankPictures(self.made.image_processor, sizes, self._blanks)
        if clips := tuple(shape.without_times for shape in shapes if shape.modality is VIDEO):
            listening.video_processor = BlankVideos(self.made.video_processor, clips, self._blank_videos)
        blank = [shape.modality.blank(shape) for shape in shapes]
        return self._call(blank, text, listening), tokenizer.heard

    def _call(self, files: Sequence[Shown], text: str, made: Any = None) -> dict[str, Any]:
        given: dict[str, Any] = {"images": None}
        for modality in _of([one.shape for one in files]):
            given |= modality.arguments([one.content for one in files if one.shape.modality is modality], self.made)
        if given["images"] and self._nested:
            given["images"] = [given["images"]]
        found = (made or self.made)(
            text=[text],
            **given,
            return_tensors="pt",
            return_mm_token_type_ids=self._types_follow_from_ids,
            return_text_replacement_offsets=True,
        )
        return dict(_as_tensor(name, value) for name, value in found.items() if name != "video_metadata")

    @cached_property
    def _types_follow_from_ids(self) -> bool:
        """Idefics 3's processor needs more for the types of tokens, and the classes that it serves take none."""
        return len(inspect.signature(self.made.create_mm_token_type_ids).parameters) == 1

    def _tried(self, modality: Modality) -> tuple[str, _Tried]:
        """The text in which the processor finds the place of a file, and what it makes of one with a blank file.

        The text is the processor's token, or what its chat template writes if it wants more around the token or another
        one."""
        token = str(getattr(self.made, f"{modality.kind}_token"))
        try:
            return token, self._try(modality, token)
        except Exception as error:  # a processor may raise any error for a text that it cannot take
            if modality is STILL:
                with suppress(Exception):  # and for pictures of which it wants a list
                    self._nested = False
                    return token, self._try(modality, token)
                self._nested = True
            with suppress(Exception):  # and a template for a message
                place = _written(self.made, modality)
                return place, self._try(modality, place)
            raise ConfigError(
                f"model.base: the processor of {self._name} refuses a text in which {token!r} stands for a"
                f" {modality.noun} ({first_line(error)}). Give another base."
            ) from error

    def _try(self, modality: Modality, place: str) -> _Tried:
        given = f"{_BEFORE} {place} {_BEHIND}"
        return _Tried(given, *self._listened(given, (modality.small,)))

    def _replaced(self, modality: Modality, place: str, tried: _Tried) -> tuple[str, str]:
        """The text that was replaced, and the text of the tokens of a file.

        Raises `ConfigError` if it cannot be told."""
        token = str(getattr(self.made, f"{modality.kind}_token"))
        heard = tried.given if tried.heard is None else tried.heard
        found = re.search(f"{_BEFORE} (.*?) ?{_BEHIND}", heard, re.DOTALL)
        if found is None:
            raise ConfigError(
                f"model.base: the processor of {self._name} replaces a row's text by a text of its own, and rows with"
                f" {modality.noun}s need their own text. Give another base."
            )
        offsets = tried.made.get(_OFFSETS)
        if offsets and len(offsets[0]) == 1:
            return offsets[0][0]["text"], offsets[0][0]["replacement"]
        if tried.heard is None or token not in found[1]:
            raise ConfigError(
                f"model.base: the processor of {self._name} does not say which text replaces a {modality.noun}, and"
                f" rows with {modality.noun}s need this. Give another base."
            )
        return token, found[1]

    def _tells_answers(self, place: str) -> bool:
        """Whether the processor gives the tokens of a suffix, an answer, the type 1 and those before it the type 0."""
        blank = [[STILL.blank(STILL.small).content]]
        found = self.made(text=[place], images=blank, suffix=[_BEHIND], return_tensors="pt").get(PROMPTS)
        return found is not None and found[0].unique().tolist() == [0, 1] and bool((found[0].diff() >= 0).all())

    def _names_of_types(self, modality: Modality, made: Mapping[str, Any]) -> tuple[str, ...]:
        """The names under which the class gets the types of tokens, as `made` of a blank file has them."""
        from trainer.model.features import LISTS

        if listed := next((name for name, value in made.items() if name != _OFFSETS and isinstance(value, list)), ""):
            raise ConfigError(
                f"model.base: the processor of {self._name} makes a list of {listed} and no tensor, which rows with"
                f" {modality.noun}s cannot have yet. Give another base."
            )
        ids = made["input_ids"]
        tensors = {name: value for name, value in made.items() if not name.startswith(LISTS)}
        beyond = [name for name, value in tensors.items() if getattr(value, "shape", ())[:2] == ids.shape]
        names = tuple(name for name in TYPES if name in made and not (name == PROMPTS and self.reads_prompts))
        known = [
            *_OF_TEXT,
            *([PROMPTS] if self.reads_prompts else []),
            *(one for one in names if made[one].tolist() == self._types_of(one, ids.tolist())),
        ]
        if unknown := [name for name in (*beyond, *names) if name not in known]:
            raise ConfigError(
                f"model.base: the processor of {self._name} makes {unknown[0]} for each token, which rows with"
                f" {modality.noun}s cannot have yet. Give another base."
            )
        return names


def _of(shapes: Sequence[Any]) -> list[Modality]:
    """The modalities of shapes, each once."""
    return list(dict.fromkeys(shape.modality for shape in shapes))


def _alternating(pieces: Sequence[str], between: Sequence[str]) -> str:
    return pieces[0] + "".join(one + piece for one, piece in zip(between, pieces[1:], strict=True))


def _around(piece: str, text: str) -> tuple[str, str]:
    """Return the parts of a text before and behind a piece of it. Raises `DataError` if it is not in the text."""
    begin = text.find(piece)
    if begin < 0:
        raise DataError("the base's processor changes text outside of its pictures")
    return text[:begin], text[begin + len(piece) :]


def _refusing(shapes: Shapes, ask: Callable[[], Any]) -> Any:
    """Return a processor's answer. Raises `DataError` if it cannot take files of these shapes."""
    try:
        return ask()
    except Exception as error:  # a processor may raise any error for sizes that it cannot take
        said = f"{few([shape.modality.title(shape) for shape in shapes])} {'is' if len(shapes) == 1 else 'are'}"
        raise DataError(f"its {said} refused by the base's processor ({first_line(error)})") from error


def _as_tensor(name: str, value: Any) -> tuple[str, Any]:
    """An input of the class. A list of whole numbers is a tensor until the class gets it."""
    import torch

    from trainer.model.features import LISTS

    if not isinstance(value, list) or name == _OFFSETS:
        return name, value
    try:
        numbers = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):  # of texts, of nothing, or of rows that differ in length
        return name, value
    return (name, value) if numbers.is_floating_point() else (f"{LISTS}{name}", numbers)


def _written(made: Any, modality: Modality) -> str:
    """The text that the chat template of a processor writes for a file of the modality between two words."""
    parts = [{"type": "text", "text": "BEFORE"}, {"type": modality.kind}, {"type": "text", "text": "BEHIND"}]
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
