"""Nothing is condemned by one answer: a proxy may cut it short, and say that so it is whole."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from trainer.errors import Damaged

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
