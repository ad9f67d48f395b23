"""Data is called damaged only after a second read: a proxy may cut an answer short and still report it as whole."""

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
    """Call `read`, and call it once more if it raises `Damaged`."""

    @wraps(read)
    def again(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return read(*arguments, **options)
        except Damaged:
            return read(*arguments, **options)

    return again


@read_twice
def read_json(store: Store, key: str) -> Any:
    """Read the JSON under `key`. Raises `NotFound`, and `Damaged` if it is not JSON."""
    try:
        return json.loads(store.get(key))
    except NOT_JSON as error:
        raise Damaged(f"{store.uri}/{key} is damaged: it is no JSON ({error}).") from error
