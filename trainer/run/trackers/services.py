"""The services that `track.trackers` may name. Each is a file of this folder, and an extra installs its package."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from trainer.config.registry import chosen, kinds
from trainer.config.run import Track
from trainer.errors import ConfigError
from trainer.run.trackers.tracker import Page, Service


class ServiceKind(NamedTuple):
    """A service that a name in `track.trackers` stands for.

    `package` is imported. The extra that installs it has the service's name.
    """

    opens: Callable[[Page], Service]
    package: str


def find_service(name: str) -> ServiceKind:
    """Find the service of this name. Raises `ConfigError` if there is none."""
    return chosen(kinds("trainer.run.trackers", "SERVICES"), "track.trackers", name)


def check_trackers(track: Track) -> None:
    """Raise `ConfigError` for a name in `track.trackers` that is unknown, or whose package is not installed."""
    for name in track.trackers:
        if find_spec(find_service(name).package) is None:
            raise ConfigError(
                f"track.trackers: {name} is not installed. Install it with pip install 'capstan-llm[{name}]', or leave"
                " it out."
            )
