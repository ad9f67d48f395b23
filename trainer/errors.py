"""Errors that a user can cause or meet, each with the exit code that scripts and schedulers act on.

A `CapstanError` is a user's mistake or a failing machine: its text is one clear sentence (which setting, what was
given, what is allowed, what to do) and the command line prints it without a traceback. A programmer's mistake is an
`AssertionError` and keeps its traceback.
"""

from collections.abc import Sequence

# The errors that json.loads raises: the second for text that nests too deep.
NOT_JSON = (ValueError, RecursionError)
_LONGEST_SHOWN = 100
_MOST_NAMES = 8
_IN_YAML = {"None": "null", "True": "true", "False": "false"}


def shown(value: object) -> str:
    """`value` as a message quotes it: on one line, cut where it is long, and as YAML has it where there is none."""
    return shortened(_IN_YAML.get(repr(value), repr(value)))


def shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line of a library's error, which may go on for many, as a part of a sentence; the name of its kind
    where it has no words.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def few(names: Sequence[str]) -> str:
    """`names` as a message lists them: the first ones, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return (", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")) or "none"


def counted(count: float, what: str) -> str:
    """So many things of a kind: 1 rank, 1,024 ranks, 2.5 epochs."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:,.2f}".rstrip("0").removesuffix(".")
    return f"{number} {what}{'' if count == 1 else 's'}"


class CapstanError(Exception):
    """Base of every error with a message meant for the user; `exit_code` is the process's exit status."""

    exit_code = 1


class ConfigError(CapstanError):
    """The configuration, or what it points to, cannot be used."""

    exit_code = 2


class BaseOutOfReach(ConfigError):
    """A base of the Hub cannot be had on this machine, whose cache lacks it: the Hub cannot be reached, is not asked
    (HF_HUB_OFFLINE), or wants its licence accepted first. `reason` is the clause of the message that says which."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class DataError(CapstanError):
    """The training data cannot be read or holds nothing to learn from."""

    exit_code = 3


class DoesNotFit(CapstanError):
    """The plan or the machine says that memory does not suffice."""

    exit_code = 4


class NonFiniteLoss(CapstanError):
    """The loss or the gradient became NaN or infinite; `window` is the position of the step's data."""

    exit_code = 5

    def __init__(self, text: str, window: dict[str, int] | None = None) -> None:
        super().__init__(text)
        self.window = window


class StorageError(CapstanError):
    """The object store failed, refused, or returned what was not written."""

    exit_code = 6


class Unreachable(StorageError):
    """The store could not be reached or was busy, which passes: the same request may work later."""


class SlowDown(Unreachable):
    """The store is asked for more than it gives, and wants to be asked more slowly."""


class NotFound(StorageError):
    """The key does not exist in the store."""


class AlreadyExists(StorageError):
    """A create-only write found the key taken."""


class Damaged(StorageError):
    """An object was read, and is not what was written."""


class Superseded(StorageError):
    """A later start of the run has taken over its folder, so this one must not write there any more."""


class WrongBytes(CapstanError):
    """A machine holds bytes that nobody wrote, or computes something else than the others. Another start, from a state
    before it, may do right.
    """

    exit_code = 8


class NothingToResume(CapstanError):
    """No committed checkpoint exists where one was asked for."""

    exit_code = 7


class Stopped(CapstanError):
    """The run stopped on request with a checkpoint committed; resuming continues it."""

    exit_code = 75


class NothingCommitted(Stopped):
    """The run stopped on request before its first commit, so there is nothing to resume."""

    exit_code = NothingToResume.exit_code


class Interrupted(Stopped):
    """The ranks ended with a checkpoint committed in order to be started again: a machine leaves, or more have come."""


class MachineLeaves(Interrupted):
    """The same because one of the run's machines is being taken away."""


class SlowMachine(MachineLeaves):
    """The same because these `ranks`, on these `machines`, are slower than the others, and other machines should take
    their place.
    """

    def __init__(self, message: str, ranks: list[int], machines: list[str]) -> None:
        super().__init__(message, ranks, machines)  # so that it can be pickled
        self.ranks, self.machines = ranks, machines

    def __str__(self) -> str:
        return str(self.args[0])
