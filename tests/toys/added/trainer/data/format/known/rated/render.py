"""Tokenizes texts with a rating. Each token has its place in the text, and each target half of it behind the whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.format.formats import or_error
from trainer.data.render.chat import Example, Renderer, field_of
from trainer.errors import DataError


@dataclass(frozen=True, eq=False)
class Rated(Example):
    rating: float = 0.0

    @property
    def columns(self) -> dict[str, Any]:
        places = np.arange(len(self.tokens))
        mine = places[self.targets]
        return {"rating": self.rating, "place": places, "share": np.stack([mine, mine / 2], 1)}


class RatedRenderer:
    def __init__(self, tokenizer: Any, data: Any) -> None:
        self._data, self._texts = data, Renderer(tokenizer, data.model_copy(update={"format": "text"}))

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Rated | DataError]:
        texts = [or_error(self._rating, row) for row in rows]
        return list(map(_rated, self._texts.encode(rows), texts))

    def turns(self, row: dict[str, Any]) -> list[Any]:
        return self._texts.turns(row)

    def _rating(self, row: dict[str, Any]) -> float:
        given = field_of(row, "rating", self._data)
        if not isinstance(given, int | float):
            raise DataError(f"the rating is {given!r}, and not a number")
        return float(given)


def _rated(text: Example | DataError, rating: float | DataError) -> Rated | DataError:
    if isinstance(text, DataError):
        return text
    return rating if isinstance(rating, DataError) else Rated(text.tokens, text.targets, text.left_out, rating=rating)
