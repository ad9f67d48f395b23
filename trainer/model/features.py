"""Takes out of a class that sees what it makes of the pictures of a document, and gives it back to the class.

The class asks its own `get_image_features` for them, and takes them ready made as `mm_encoder_outputs`. So the features
of a document can be kept, and its tower is not needed a second time. The same holds for videos and sounds:

    observed:   pixels -> class [get_image_features -> result] -> decoder's arguments       the result is kept
    given back: result -> class                                -> decoder's arguments       to the bit the same

Nothing here knows a family. Which fields of the result the class reads, which of the processor's inputs it reads beside
the pixels, and which weights it computes with behind the features, is seen while it does so.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

FEATURES = "features/"
"""Begins the names of kept features: `features/pooler_output/0` is the first tensor of a list of features of pictures,
and `features/video.pooler_output/0` of those of videos."""
ENCODERS = {"image": "get_image_features", "video": "get_video_features", "audio": "get_audio_features"}
"""By the name under which `mm_encoder_outputs` has the result of each."""
LISTS = "lists/"
"""Begins the names of inputs that a class takes as lists of whole numbers."""
TOKENS_OF = "get_image_tokens"


def given_back(kept: Mapping[str, Tensor]) -> dict[str, "Given"]:
    """The `mm_encoder_outputs` of kept features, by their names."""
    of = dict[str, dict[str, Tensor]]()
    for name, value in kept.items():
        kind, dot, field = name.removeprefix(FEATURES).rpartition(".")
        of.setdefault(kind if dot else "image", {})[field] = value
    return {kind: Given(fields) for kind, fields in of.items()}


def _named(kind: str, field: str) -> str:
    return f"{FEATURES}{field}" if kind == "image" else f"{FEATURES}{kind}.{field}"


class Given:
    """Stands in for the result of an encoder: it has the fields that were kept."""

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        tree: dict[str, Any] = {}
        for name, value in kept.items():
            *path, last = name.split("/")
            place = tree
            for step in path:
                place = place.setdefault(step, {})
            place[last] = value
        self.__dict__.update({name: _lists(value) for name, value in tree.items()})

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]


def _lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return [_lists(tree[key]) for key in sorted(tree, key=int)]


def flattened(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a field, which may be lists of them, by their names."""
    if isinstance(value, Tensor):
        yield name, value.detach().clone(memory_format=torch.contiguous_format)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            yield from flattened(f"{name}/{number}", one)


class Noted:
    """The result of the encoder of a `kind`, which writes down the `fields` that are read of it."""

    def __init__(self, kind: str, result: Any) -> None:
        self.kind = kind
        self._result, self.fields = result, set[str]()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._result, name)
        self.fields.add(name)
        return value

    def __getitem__(self, name: str) -> Any:
        value = self._result[name]
        self.fields.add(name)
        return value

    def kept(self) -> dict[str, Tensor]:
        every = (flattened(_named(self.kind, name), getattr(self._result, name)) for name in sorted(self.fields))
        return {name: value for field in every for name, value in field}


class Reads(TorchFunctionMode):
    """Notes which of the `watched` tensors take part in a computation."""

    def __init__(self, watched: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(value): name for name, value in watched.items()}
        self.found, self.paused = set[str](), False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if not self.paused:
            used = (self._names.get(id(one)) for one in tree_leaves((args, given)) if isinstance(one, Tensor))
            self.found.update(name for name in used if name is not None)
        return func(*args, **given)


@contextmanager
def observed(inner: nn.Module, reads: Reads) -> Iterator[list[Noted]]:
    """Inside, what the `inner` model's encoders return is noted, and what they read themselves is not."""
    results = list[Noted]()

    def encode(kind: str, plain: Callable[..., Any], *arguments: Any, **given: Any) -> Any:
        if reads.paused:  # a class may encode a video as pictures
            return plain(*arguments, **given)
        reads.paused = True
        try:
            results.append(Noted(kind, plain(*arguments, **given)))
        finally:
            reads.paused = False
        return results[-1]

    there = encoders_of(inner)
    inner.__dict__.update({ENCODERS[kind]: partial(encode, kind, plain) for kind, plain in there.items()})
    try:
        yield results
    finally:
        for kind in there:
            del inner.__dict__[ENCODERS[kind]]


def encoders_of(inner: nn.Module) -> dict[str, Callable[..., Any]]:
    """The encoders that a model has, by their kinds."""
    return {kind: getattr(inner, name) for kind, name in ENCODERS.items() if hasattr(inner, name)}


def alike(one: Any, other: Any) -> bool:
    """Whether two trees of tensors are the same, to the bit."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same and torch.equal(_bits(one), _bits(other))
    if isinstance(one, Mapping):
        if not isinstance(other, Mapping) or one.keys() != other.keys():
            return False
        return all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
