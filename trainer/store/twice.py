"""Nothing is condemned by one answer: a proxy may cut it short, and say that so it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from trainer.errors import NOT_JSON, Damaged

if TYPE_CHECKING:
    from trainer.store.store import Store

P = ParamSpec("P")
T = TypeVar("T")


def read_twice(read: Callable[P, T]) -> Callable[P, T]:
    """`read`, which is called once more where it raises `Damaged`."""

    @wraps(read)
    def again(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return read(*arguments, **options)
        except Damaged:
            return read(*arguments, **options)

    return again


@read_twice
def read_json(store: Store, key: str) -> Any:
    """The JSON under `key`. Raises `NotFound`, and `Damaged` for what is none."""
    try:
        return json.loads(store.get(key))
    except NOT_JSON as error:
        raise Damaged(f"{store.uri}/{key} is damaged: it is no JSON ({error}).") from error
