"""Stand-ins for the parts of a processor, so that it says which text stands for files without making their pixels."""

from bisect import bisect_left
from threading import Lock
from typing import Any

_MOST_KNOWN = 4096  # tuples of shapes


class Steps:
    """Texts that stand for files, by `Modality.length`. If two lengths have the same text, those between them have it.
    Several threads may use it."""

    def __init__(self) -> None:
        self._known: list[tuple[int, str]] = []
        self._lock = Lock()

    def find(self, length: int) -> str | None:
        with self._lock:
            place = bisect_left(self._known, (length, ""))
            around = self._known[max(0, place - 1) : place + 1]
        if len(around) == 2 and around[0][1] == around[1][1]:
            return around[1][1]
        return next((text for known, text in around if known == length), None)

    def add(self, length: int, text: str) -> None:
        with self._lock:
            if (length, text) not in self._known[(place := bisect_left(self._known, (length, text))) : place + 1]:
                self._known.insert(place, (length, text))


class Listening:
    """A tokenizer that notes the text which a processor gives it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.heard: str | None = None

    def __call__(self, text: Any, *arguments: Any, **given: Any) -> Any:
        self.heard = text[0] if isinstance(text, list) else text
        return self._tokenizer(text, *arguments, **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class BlankPictures:
    """Stands in for an image processor that gets blank pictures of these `sizes`. What it makes of them is looked up in
    `known`, and kept there without the values of pixels. Several threads may use one `known`."""

    def __init__(self, made: Any, sizes: tuple[Any, ...], known: dict[tuple[Any, ...], Any]) -> None:
        self._made, self._sizes, self._known = made, sizes, known

    def __call__(self, *arguments: Any, **given: Any) -> Any:
        known = self._known.get(self._sizes)
        if known is None:
            made = self._made(*arguments, **given)
            known = type(made)({name: without_values(value) for name, value in made.items()})
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[self._sizes] = known
        return type(known)(dict(known))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


class BlankVideos(BlankPictures):
    """The same of a video processor. Clips of one size at other times differ in their metadata alone."""

    def __call__(self, *arguments: Any, **given: Any) -> Any:
        from transformers.video_utils import VideoMetadata

        known = super().__call__(*arguments, **given)
        if "video_metadata" in known:
            known["video_metadata"] = [VideoMetadata(**one) for one in given["video_metadata"]]
        return known


def without_values(value: Any) -> Any:
    """Zeros of the shape of pixels or of their mask, which take no memory. Anything else stays."""
    import numpy as np
    import torch

    if isinstance(value, list):
        return [without_values(one) for one in value]
    if getattr(value, "ndim", 0) < 3:
        return value
    if isinstance(value, torch.Tensor):
        return value.new_zeros(()).expand(value.shape)
    return np.broadcast_to(np.zeros((), value.dtype), value.shape)
